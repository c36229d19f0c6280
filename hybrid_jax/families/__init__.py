"""Source families: one table. Adding a family is one file here and one line below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid_jax.config import ModelConfig
from hybrid_jax.families.base import HYBRID_PREFIX, Family, read_config, write_config
from hybrid_jax.families.gemma import GEMMA2, GEMMA3
from hybrid_jax.families.llama import LLAMA
from hybrid_jax.families.llama4 import LLAMA4
from hybrid_jax.families.llamba import LLAMBA
from hybrid_jax.families.mamba3 import MAMBA3
from hybrid_jax.families.mistral import MINISTRAL, MINISTRAL3, MISTRAL
from hybrid_jax.families.mixtral import MIXTRAL
from hybrid_jax.families.olmo import OLMO2, OLMO3
from hybrid_jax.families.phi import PHI
from hybrid_jax.families.phi3 import PHI3
from hybrid_jax.families.phi_mamba import PHI_MAMBA
from hybrid_jax.families.plugin import plugin_notes
from hybrid_jax.families.qwen2 import QWEN2
from hybrid_jax.families.qwen3 import QWEN3, QWEN3_MOE
from hybrid_jax.families.qwen3_next import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT
from hybrid_jax.families.smollm3 import SMOLLM3
from hybrid_jax.schema import mapping

__all__ = ["FAMILIES", "Family", "config_from_hf", "config_to_hf", "plugin_notes"]

FAMILIES = {
    f.model_type: f
    for f in (
        QWEN3,
        QWEN3_MOE,
        QWEN3_NEXT,
        QWEN3_5,
        QWEN3_5_MOE,
        QWEN2,
        LLAMA,
        LLAMA4,
        MISTRAL,
        MINISTRAL,
        MINISTRAL3,
        SMOLLM3,
        PHI,
        PHI3,
        MIXTRAL,
        OLMO2,
        OLMO3,
        GEMMA2,
        GEMMA3,
        LLAMBA,
        PHI_MAMBA,
        MAMBA3,
    )
}


# Keys beside `text_config` that are of the decoder too.
_OF_BOTH = ("tie_word_embeddings", "quantization", "quantization_config")


def _text_config(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's keys of a config.json: of a class that reads images too (`Family.wrapper`) those in `text_config`."""
    wrapped = next((f for f in FAMILIES.values() if f.wrapper and f.wrapper == hf.get("model_type")), None)
    if wrapped is None:
        return hf
    keys = mapping("text_config", hf.get("text_config"))
    return {**keys, **{name: hf[name] for name in _OF_BOTH if name in hf}, "model_type": wrapped.model_type}


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """A config.json, of a source model, of one that reads images too (its decoder is taken), or of a hybrid, as a ModelConfig.

    Raises:
      ValueError: it is not an object, the family is unknown, a value breaks the schema (`hybrid_jax.schema`), or the config
        asks for something unsupported.
    """
    hf = _text_config(mapping("config.json", hf))
    model_type = hf.get("model_type")
    family = FAMILIES.get(str(model_type).removeprefix(HYBRID_PREFIX))
    if "model_type" not in hf:
        family = next((f for f in FAMILIES.values() if f.own_layout is not None and f.own_layout.recognizes(hf)), None)
    if family is None:
        raise ValueError(f"config.json has model_type {model_type!r}; supported: {', '.join(FAMILIES)} and hybrid_ forms of them")
    return read_config(family, hf)


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """A ModelConfig as config.json. `dtype` names the dtype of the weights beside it.

    Raises:
      ValueError: a config.json of the family cannot describe the model, or it has iterations for inference.
    """
    if config.gka_iterations:
        raise ValueError(
            "the model has other iterations of Gated KalmaNet than its options say, which are for inference and not saved; save "
            "hybrid_jax.with_iterations(model, None), or train with gka_config.num_iter"
        )
    return write_config(FAMILIES[config.family], config, dtype)
