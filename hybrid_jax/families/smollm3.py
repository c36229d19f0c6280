"""SmolLM3: Llama without rotary embeddings in some layers, which may have a sliding window instead."""

from hybrid_jax.families.base import Family
from hybrid_jax.families.llama import LLAMA


def rotary_layers(hf) -> tuple[bool, ...]:
    """`no_rope_layers`, whose 1 says that a layer has rotary embeddings; absent: all but every `no_rope_layer_interval`th."""
    layers, given = hf["num_hidden_layers"], hf["no_rope_layers"]
    if given is None:
        return tuple((i + 1) % hf["no_rope_layer_interval"] != 0 for i in range(layers))
    if len(given) < layers:
        raise ValueError(f"no_rope_layers has {len(given)} entries, num_hidden_layers is {layers}; give one for each layer")
    return tuple(map(bool, given[:layers]))


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    lambda hf: {**LLAMA.read(hf), "rotary_layers": rotary_layers(hf)},
    lambda config: {**LLAMA.write(config), "no_rope_layers": [int(rotary) for rotary in config.rotary_layers]},
    window_keys=("sliding_window", "use_sliding_window"),
    layer_types=True,
    windowed=lambda hf, layer: not rotary_layers(hf)[layer],
    defaults={
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    rope_theta=2_000_000.0,
)
