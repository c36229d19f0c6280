"""hybrid_jax: turn pretrained Transformers into hybrids of attention and state-space layers."""

from hybrid_jax.convert import load_model, save_model
from hybrid_jax.generate import generate

__all__ = ["generate", "load_model", "save_model"]
