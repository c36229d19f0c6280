"""Retrieval-aware distillation: every head becomes recurrent but the few that retrieve (arXiv 2602.11374).

    python -m hybrid_jax prime --config=configs/retrieval_aware.py:Llama-1B --config.source=PATH/TO/Llama-3.2-1B \\
        --config.data.sources.pretraining.path=TOKENS --workdir=/mnt/shared/Llama-1B

All layers become Discrete Mamba-2 with all its heads; beside it stay the heads of attention whose removal costs retrieval most
(`hybrid-jax analyze heads` finds them for other models). What they return is standardized to the recurrent output's mean and
deviation and goes through a linear map; half of the sum is the layer's output (`merge`). The mixers start as new ones, the kept
heads are the source's. Then come the second and the third stage of MOHAWK (configs/mohawk.py).
`configs/retrieval_aware.py:Llama-1B-8` has states of 8 channels per head in place of 64.

Where the numbers come from:
  [A]  the paper's abstract: 10 of 512 heads, states 8 times smaller;
  [C]  the authors' code: which heads of which model, in the order of their importance; the layer and its merge;
  [O]  ours: tokens, learning rates and rows, which are those of configs/mohawk.py for a model of the size.
"""

from ml_collections import ConfigDict

from hybrid_jax.config_file import load_config

# model -> (source, recipe of MOHAWK whose phases are taken, layers, kept heads as (layer, head))  [C]
RECIPES = {
    "Llama-1B": (
        "meta-llama/Llama-3.2-1B",
        "Llamba-1B",
        16,
        ((9, 25), (4, 4), (10, 26), (0, 20), (8, 20), (8, 19), (8, 16), (7, 22), (10, 20), (5, 5)),
    ),
    "Llama-8B": (
        "meta-llama/Llama-3.1-8B",
        "Llamba-8B",
        32,
        ((13, 18), (15, 11), (17, 24), (13, 17), (13, 16), (14, 21), (15, 8), (13, 0), (15, 9), (17, 27)),
    ),
    "Qwen-1.5B": (
        "Qwen/Qwen2.5-1.5B",
        "Llamba-1B",
        28,
        ((13, 4), (18, 0), (16, 3), (16, 6), (22, 7), (18, 1), (16, 1), (17, 2), (21, 11), (15, 10)),
    ),
}
STATES = {"": 64, "-8": 8}  # channels of a state per head  [C] [A]


def get_config(recipe: str = "Llama-1B") -> ConfigDict:
    known = [name + suffix for name in RECIPES for suffix in STATES]
    if recipe not in known:
        raise ValueError(f"retrieval_aware knows {', '.join(known)}, got {recipe!r}")
    suffix = "-8" if recipe.endswith("-8") else ""
    source, phases_of, depth, heads = RECIPES[recipe.removesuffix(suffix)]
    config = load_config([f"--config=configs/mohawk.py:{phases_of}"])
    kept = [sorted(head for layer, head in heads if layer == at) for at in range(depth)]
    config.source = source
    config.pattern = "-".join(f"DM2[{','.join(map(str, of_layer))}]" if of_layer else "DM2" for of_layer in kept)
    config.mixers = {
        "discrete_mamba2_config": {"bias": True, "state_size": STATES[suffix]},  # [C]
        "head_hybrid_config": {"merge": "standardized"},  # [C]
    }
    config.schedule = ("layers", "distill")  # [C]
    return config
