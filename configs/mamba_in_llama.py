"""Progressive replacement: the recipes of MambaInLlama and of M1 (arXiv 2408.15237; the distilled reasoners, 2502.20339).

    python -m hybrid_jax prime --config=configs/mamba_in_llama.py:Stepwise-50 --config.source=PATH/TO/Meta-Llama-3-8B-Instruct \\
        --config.data.sources.answers.path=TOKENS --workdir=/mnt/shared/Stepwise-50

Recipes:
  Stepwise-SHARE  a quarter of the layers converts, then half, 75, 87.5 and 100 %, up to SHARE (25, 50, 75, 87.5 or 100); only the
                  mixers train, those of earlier phases too, on what the teacher wrote;
  Layerwise       the same with one layer at a time, in 32 phases;
  EndToEnd        half of the layers convert at once, and everything trains towards the predictions of a larger model;
  M1              a reasoner, Llama-3.2-3B with attention in 6 of 28 layers: reverse divergence on answers, then the answers as
                  they are, then reasoning traces.
Stepwise-SHARE and EndToEnd end with `preferences`, the direct preference optimization of MambaInLlama. After the recipe's name may
come another mixer than Mamba-2, `Stepwise-50-GDN` for example. The sources of text are prepared directories (`hybrid-jax prepare`):
answers that the teacher wrote (`hybrid-jax generate --prompts`), in which their own tokens count, and pairs of preferences. The
teacher is the source; that of EndToEnd is Llama-3.1-70B-Instruct, to be given as `--config.phases.end_to_end.teacher=PATH`.

Where the numbers come from:
  [C]  the released code: jxiw/MambaInLlama (train_mamba2, mamba2_llama, mamba2_llama_stepwise, llama3.1_8B) and jxiw/M1 (sft), the
       successor of the distilled reasoners, whose abstract says 8 billion tokens in all;
  [O]  ours: what it does not say, and the mixer of M1. The released models of 75 % and more were not trained stepwise from there
       on: everything trained on text. Here every share is a step.
"""

from ml_collections import ConfigDict

from hybrid_jax.mixers import KINDS

KEYS = {row.symbol: row.parameter_key for row in KINDS.values() if row.recurrent}
SHARES = {"25": 1 / 4, "50": 1 / 2, "75": 3 / 4, "87.5": 7 / 8, "100": 1.0}  # [C]
# Layers of 32 in the order in which they convert [C]: every second one, then every fourth of the others, and so on.
ORDER = (*range(0, 32, 4), *range(2, 32, 4), *range(1, 32, 4), *range(3, 32, 8), 7, 23, 15, 31)
ONE_BY_ONE = (*range(0, 32, 2), *ORDER[16:])  # [C] mamba2_llama_stepwise
DEPTH = {"Layerwise": 32, "EndToEnd": 32, "M1": 28}
KEPT = (3, 8, 13, 18, 23, 27)  # layers of M1 that stay attention [C]
LENGTH = 2048  # [C] max_seq_length
GPUS = 8  # [C] of the README; batches are given for one
RECIPES = (*(f"Stepwise-{share}" for share in SHARES), *DEPTH)

COMMON = {"optimizer": "adamw", "compute_dtype": "bfloat16", "frozen_dtype": "bfloat16", "remat": "full"}  # [C] bf16, [O]
SUMMED = float(LENGTH)  # [C] the divergence is summed over a row's tokens, ours is their mean


def pattern_of(converted: tuple[int, ...], depth: int, mixer: str) -> str:
    return "-".join(mixer if i in converted else "*" for i in range(depth))


def stepwise(converted: list[tuple[int, ...]], names: list[str], mixer: str) -> dict[str, dict]:
    """Returns the phases, one for each of the growing sets of converted layers."""
    phases = {}
    for name, layers in zip(names, converted, strict=True):
        phases[name] = {
            **COMMON,
            "pattern": pattern_of(layers, 32, mixer),
            "form": "fused",
            "objective": "distill",
            "options": {"divergence_weight": 0.1 * SUMMED, "next_token_weight": 1.0},  # [C] kl_weight, ce_weight
            "trainable": (rf"\.{KEYS[mixer]}\.",),  # [C]
            "epochs": 1.0, "batch_size": GPUS * 8, "seq_len": LENGTH,  # [C], the length of the stepwise rows [O]
            "beta1": 0.9, "beta2": 0.98, "weight_decay": 0.0, "clip": 0.1,  # [C]
            "learning_rate": 8e-5, "schedule": "cosine",  # [C]
            "warmup_steps": 500 if name != names[0] and len(names) <= len(SHARES) else 1500,  # [C]
            "mix": {"answers": 1.0},
        }  # fmt: skip
    return phases


def end_to_end() -> dict[str, dict]:
    distill = {
        **COMMON,
        "form": "unfused",
        "teacher": "meta-llama/Llama-3.1-70B-Instruct",  # [C]
        "objective": "distill",
        "options": {"divergence_weight": 1.0 * SUMMED, "next_token_weight": 0.0},  # [C] kl_weight, ce_weight
        "trainable": ("all",),  # [C]
        "epochs": 1.0, "batch_size": GPUS * 8, "seq_len": LENGTH,  # [C]
        "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "clip": 1.0,  # [C]: the defaults of transformers' Trainer
        "learning_rate": 2e-5, "schedule": "cosine", "warmup_fraction": 0.01,  # [C]
        "mix": {"answers": 1.0},
    }  # fmt: skip
    return {"end_to_end": distill}


def preferences() -> dict[str, dict]:
    dpo = {
        **COMMON,
        "form": "unfused",
        "objective": "dpo",
        "options": {"beta": 0.01},  # [C]
        "trainable": ("all",),  # [O]
        "epochs": 1.0,  # [C]
        "batch_size": GPUS * 4, "seq_len": LENGTH,  # [O]
        "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "clip": 1.0,  # [O]
        "learning_rate": 5e-7, "schedule": "cosine", "warmup_fraction": 0.1,  # [C]
        "mix": {"preferences": 1.0},
    }  # fmt: skip
    return {"preferences": dpo}


def m1() -> dict[str, dict]:
    common = {
        **COMMON,
        "trainable": ("all",),  # [C]
        "batch_size": GPUS,  # [C] a row of a device, [O] how many devices
        "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "clip": 1.0,  # [C]
        "schedule": "cosine", "warmup_steps": 200,  # [C]
    }  # fmt: skip
    math = {**common, "epochs": 2.0, "seq_len": 8192, "learning_rate": 1e-5, "mix": {"math": 1.0}}  # [C]
    reverse = {"kind": "reverse", "divergence_weight": 1.0, "next_token_weight": 0.0}  # [C], over the tokens of the answers
    return {
        "distill": {**math, "form": "fused", "objective": "distill", "options": reverse},
        "answers": {**math, "form": "unfused", "objective": "next_token"},
        "reasoning": {
            **common, "form": "unfused", "objective": "next_token",
            "epochs": 5.0, "seq_len": 24_576, "learning_rate": 6e-6,  # [C]
            "mix": {"reasoning": 1.0},
        },
    }  # fmt: skip


def get_config(recipe: str = "Stepwise-50") -> ConfigDict:
    name = next((n for n in RECIPES if recipe == n or recipe.startswith(f"{n}-")), "")
    mixer = recipe.removeprefix(name).removeprefix("-") or "M2"
    if not name or mixer not in KEYS:
        raise ValueError(f"expected RECIPE or RECIPE-MIXER of {', '.join(RECIPES)} and {', '.join(KEYS)}, got {recipe!r}")
    source, pattern = "meta-llama/Meta-Llama-3-8B-Instruct", ""  # [C]
    if name == "M1":
        source, phases = "meta-llama/Llama-3.2-3B-Instruct", m1()  # [C]
        pattern = pattern_of(tuple(i for i in range(28) if i not in KEPT), 28, mixer)
    elif name == "EndToEnd":
        source, phases = "meta-llama/Llama-3.1-8B-Instruct", end_to_end() | preferences()  # [C]
        pattern = pattern_of(ORDER[:16], 32, mixer)
    elif name == "Layerwise":
        phases = stepwise([ONE_BY_ONE[: n + 1] for n in range(32)], [f"layer_{i:02d}" for i in ONE_BY_ONE], mixer)
    else:
        shares = list(SHARES)[: 1 + list(SHARES).index(name.removeprefix("Stepwise-"))]
        converted = [ORDER[: round(32 * SHARES[share])] for share in shares]
        phases = stepwise(converted, [f"share_{share.replace('.', '_')}" for share in shares], mixer) | preferences()
    first = next(iter(phases.values()))
    pattern = first.pop("pattern", pattern)
    sources = sorted({name for phase in phases.values() for name in phase["mix"]})
    return ConfigDict(
        {
            "source": source,
            "pattern": pattern,
            "mixers": {},
            "schedule": tuple(phases),
            "phases": phases,
            "data": {"sources": {name: {"path": f"data/{name}"} for name in sources}, "mix": {}},
            "seed": 42,  # [C]
        }
    )
