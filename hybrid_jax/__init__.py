"""hybrid_jax: turn pretrained Transformers into hybrids of attention and state-space layers."""

from hybrid_jax.convert import load_model, save_model

__all__ = ["load_model", "save_model"]
