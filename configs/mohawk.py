"""MOHAWK's published recipes: Phi-Mamba, Hybrid Phi-Mamba and Llamba 1B, 3B and 8B (arXiv 2408.10189, 2502.14458).

    python -m hybrid_jax prime --config=configs/mohawk.py:Llamba-1B --config.source=PATH/TO/Llama-3.2-1B \\
        --config.data.sources.pretraining.path=TOKENS --workdir=/mnt/shared/Llamba-1B

Three phases: `matrices` makes the mixing matrices of new Discrete Mamba-2 mixers those of attention, `layers` the output of every
layer on the teacher's states, `distill` the predictions. The mixers start as new ones; embeddings, norms, MLPs and the head are the
teacher's. The source of text is a prepared directory (`hybrid-jax prepare`), C4 for Phi-Mamba and FineWeb-Edu for Llamba. After the
recipe's name may come another mixer that has mixing matrices, `Llamba-1B-GDN` for example.

Where the numbers come from:
  [A]  the papers' abstracts: 3 billion tokens for Phi-Mamba, 5 billion for the hybrid;
  [C]  the released code, goombalab/mohawk and goombalab/phi-mamba, and its configs, which differ from the papers in places;
  [N]  notes that quote the papers' tables;
  [O]  ours: what none of them says (a batch of Llamba, meshes, remat, the learning rates of Phi-Mamba).
"""

import math

from ml_collections import ConfigDict

from hybrid_jax.mixers import KINDS

KEYS = {row.symbol: row.parameter_key for row in KINDS.values() if row.recurrent and not row.attends}
# recipe -> (source, layers, layers that stay attention, tokens of each phase, learning rates, rows of 2,048 tokens)
RECIPES = {
    "Phi-Mamba": ("microsoft/phi-1_5", 24, (), (80e6, 160e6, 2.76e9), (1e-4, 1e-4, 5e-5), 128),  # [A] [C] [O]
    "Hybrid-Phi-Mamba": ("microsoft/phi-1_5", 24, (4, 10, 16, 22), (80e6, 160e6, 4.76e9), (1e-4, 1e-4, 5e-5), 128),  # [A] [C] [O]
    "Llamba-1B": ("meta-llama/Llama-3.2-1B", 16, (), (300e6, 2.7e9, 5e9), (1e-4, 1e-4, 5e-5), 128),  # [N] [O]
    "Llamba-3B": ("meta-llama/Llama-3.2-3B", 28, (), (500e6, 4e9, 5.5e9), (1e-4, 1e-4, 5e-5), 128),  # [N] [O]
    "Llamba-8B": ("meta-llama/Llama-3.1-8B", 32, (), (500e6, 5e9, 6.5e9), (1e-4, 1e-4, 1e-5), 128),  # [N] [O]
}
LENGTH = 2048  # [C] [N]


def get_config(recipe: str = "Llamba-1B") -> ConfigDict:
    name = next((n for n in RECIPES if recipe == n or recipe.startswith(f"{n}-")), "")
    mixer = recipe.removeprefix(name).removeprefix("-") or "DM2"
    if not name or mixer not in KEYS:
        raise ValueError(f"expected RECIPE or RECIPE-MIXER of {', '.join(RECIPES)} and {', '.join(KEYS)}, got {recipe!r}")
    source, depth, kept, tokens, rates, rows = RECIPES[name]
    common = {
        "batch_size": rows, "seq_len": LENGTH,
        "optimizer": "adamw", "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1,  # [C]
        "schedule": "wsd", "warmup_fraction": 0.1,  # [C] [N]; the decay, 10 % too, follows from the steps
        "compute_dtype": "bfloat16", "frozen_dtype": "bfloat16", "remat": "full",  # [O]
        "mix": {"pretraining": 1.0},
    }  # fmt: skip
    mixers = (rf"\.{KEYS[mixer]}\.",)
    phases = {
        # [C] everything that makes the matrices; the gradients of the rest are 0
        "matrices": {"form": "fused", "objective": "align_matrices", "trainable": mixers},
        # [C] blocks read the teacher's states; which weights train is a choice, and MLPs and norms stay the teacher's in Phi-Mamba
        "layers": {
            "form": "fused",
            "objective": "align_decoder",
            "options": {"inputs": "teacher", "pre_lm_head": False, "error": "norm"},
            "trainable": (*mixers, r"\.mlp\.", "norm") if name.startswith("Llamba") else mixers,
        },
        "distill": {"form": "fused", "objective": "distill", "trainable": ("all",)},  # [C] cross-entropy against the teacher
    }
    for (_, phase), budget, rate in zip(phases.items(), tokens, rates, strict=True):
        steps = math.ceil(budget / (rows * LENGTH))
        phase |= {**common, "steps": steps, "decay_steps": steps // 10, "learning_rate": rate}
    return ConfigDict(
        {
            "source": source,
            "pattern": "-".join("*" if i in kept else mixer for i in range(depth)),
            "copy_attention": False,  # [C] the mixers start as new ones
            "mixers": {},
            "schedule": tuple(phases),
            "phases": phases,
            "data": {"sources": {"pretraining": {"path": "data/pretraining"}}, "mix": {}},
            "seed": 0,
        }
    )
