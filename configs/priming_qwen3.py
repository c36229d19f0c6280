"""Priming's published recipes for Qwen3 4B, 8B and 32B: align, long context, then instruct or reasoning.

    python -m hybrid_jax prime --config=configs/priming_qwen3.py:8B-GKA --config.source=PATH/TO/Qwen3-8B \\
        --config.data.sources.pretraining.path=TOKENS --config.data.sources.long.path=TOKENS \\
        --config.data.sources.instruct.path=TOKENS --workdir=/mnt/shared/8B-GKA

After the colon: the size (4B, 8B, 32B), the mixer (GKA, GDN, M2, SWA), and `-reasoning` for the last stage on reasoning
traces instead of instructions. The three sources are prepared directories (`hybrid-jax prepare`). Expect the paper's table:
with GKA an 8B reasoner of average 56.8 against Qwen3-8B's 55.3.

Where the numbers come from:
  [P]  the paper, arXiv 2605.08301;
  [H]  the released code, awslabs/hybrid-model-factory: training/examples/priming/stage0 ... stage2 and full_pipeline, and the
       layers' scores in vllm-inference/selection, ranked by their mean;
  [O]  ours: the meshes, chosen with `hybrid-jax plan`, and `accumulate`, which follows from them.
"""

from ml_collections import ConfigDict

from hybrid_jax.mixers import KINDS

KEYS = {row.symbol: row.parameter_key for row in KINDS.values() if row.symbol in ("GKA", "GDN", "M2", "SWA")}  # [P]

# Layers that become mixers, 50 % of all [P].
LAYERS = {
    "4B": [i for i in range(36) if i % 2],  # no scores are published; every second one, as in [H] full_pipeline/8xA100
    "8B": [*range(1, 7), *range(9, 12), *range(26, 29), *range(30, 36)],  # [P], and the scores of [H]
    "32B": [  # the scores of [H]
        *(2, 3, *range(7, 17), 20, 22, 23, 24, 26, 27, 28, 29, 32, 33),
        *(35, 36, 39, 40, 41, 43, 44, 57, 60, 63),
    ],
}  # fmt: skip
DEPTH = {"4B": 36, "8B": 36, "32B": 64}
CONTEXT = {"4B": 65_536, "8B": 131_072, "32B": 131_072}  # [H] full_pipeline: 4B at 64K, 8B at 128K; 32B [P]

# How devices are used at each length of row [O]: v5p:4x4x4 for 4B and 8B, v5p:4x4x8 for 32B. Parameters are sharded over two of
# the torus' dimensions and repeated over `data`, the third: over all three the compiler gathers them by all-reduce, twice
# the bytes.
MESHES = {
    "4B": {8192: dict(fsdp=16), 32_768: dict(fsdp=8, seq=2), 65_536: dict(fsdp=4, seq=4)},
    "8B": {8192: dict(fsdp=16), 32_768: dict(fsdp=8, seq=2), 131_072: dict(fsdp=2, seq=8)},
    "32B": {8192: dict(fsdp=32), 32_768: dict(fsdp=8, seq=4), 131_072: dict(fsdp=2, seq=16)},
}


def get_config(recipe: str = "8B-GKA") -> ConfigDict:
    size, _, rest = recipe.partition("-")
    mixer, _, last = rest.partition("-")
    if size not in LAYERS or mixer not in KEYS or last not in ("", "reasoning"):
        raise ValueError(
            f"expected SIZE-MIXER or SIZE-MIXER-reasoning of {', '.join(LAYERS)} and {', '.join(KEYS)}, got {recipe!r}"
        )
    common = {
        "optimizer": "adamw",
        "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0,  # [H]: the defaults of transformers' Trainer
        "clip": 1.0,  # [H] max_grad_norm
        "compute_dtype": "bfloat16", "frozen_dtype": "bfloat16",  # [H] bf16; ours keeps float32 masters of what trains
        "remat": "full",  # [O]
        "checkpoint_every": 500,  # [H] save_steps
        "log_every": 1,  # [H] logging_steps
    }  # fmt: skip
    align = {
        **common,
        "form": "fused",
        "objective": "align_none",  # [H] hybrid_lw_distill_target none, hybrid_distill_pre_lm_head
        "trainable": (rf"\.{KEYS[mixer]}\.",),  # [H] hybrid_learnable_params
        "steps": 19_000,  # [H]
        "batch_size": 256, "seq_len": 8192,  # [H] 2M tokens per step
        "accumulate": 2 if size == "32B" else 1,  # [O]
        "learning_rate": 1e-4, "schedule": "constant", "warmup_steps": 720,  # [H]
        "mix": {"pretraining": 1.0},
    }  # fmt: skip
    long_context = {
        **common,
        "form": "unfused",
        "objective": "next_token",
        "trainable": (KEYS[mixer], "norm", "self_attn"),  # [H] hybrid_learnable_params gka,norm,self_attn
        "steps": 4480,  # [H]
        "batch_size": 48 * 131_072 // CONTEXT[size], "seq_len": CONTEXT[size],  # [H] 6M tokens per step
        "accumulate": 6,  # [O]
        "learning_rate": 5e-5, "schedule": "cosine", "warmup_steps": 209,  # [H]
        "rope_theta": 5_000_000.0, "max_position_embeddings": CONTEXT[size],  # [H] config_overrides_json
        "mix": {"long": 1.0},
    }  # fmt: skip
    sft = {
        **common,
        "form": "unfused",
        "objective": "next_token",  # the data weighs the assistant's turns alone
        "trainable": ("all",),
        "seq_len": 32_768,  # [H]
        "accumulate": 2,  # [O]
        "learning_rate": 5e-5,  # [H]
    }
    instruct = {
        **sft,
        "epochs": 2.0, "batch_size": 64,  # [H] 2M tokens per step
        "schedule": "linear", "warmup_fraction": 0.03,  # [H]
        "mix": {"instruct": 1.0},
    }  # fmt: skip
    reasoning = {
        **sft,
        "epochs": 1.0, "batch_size": 128,  # [H] 4M tokens per step
        "schedule": "cosine", "warmup_fraction": 0.1,  # [H]
        "mix": {"reasoning": 1.0},
    }  # fmt: skip
    third = {"instruct": instruct} if not last else {"reasoning": reasoning}
    phases = {"align": align, "long_context": long_context, **third}
    for phase in phases.values():
        phase["mesh"] = dict(data=4, **MESHES[size][phase["seq_len"]])
    sources = {
        "pretraining": {"path": "data/pretraining"},
        "long": {"path": "data/long"},
        # [H] drop_exceed_length_data of the reasoning recipe; the instruct recipe truncates (cutoff_len)
        **{name: {"path": f"data/{name}", "packing": "first_fit", "long": "drop" if last else "truncate"} for name in third},
    }
    return ConfigDict(
        {
            "source": f"Qwen/Qwen3-{size}",
            "pattern": "-".join(mixer if i in LAYERS[size] else "*" for i in range(DEPTH[size])),
            "select": {},
            # the defaults of every mixer but the window are the recipe's [H] stage0
            "mixers": {"swa_config": {"window_size": 512}},
            "schedule": tuple(phases),
            "phases": phases,
            "data": {"sources": sources, "mix": {}},
            "seed": 42,  # [H]
        }
    )
