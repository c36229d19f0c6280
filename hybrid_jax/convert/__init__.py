"""Hugging Face directories to decoders and back."""

from hybrid_jax.convert.load import check_model_directory, load_model, read_model_config
from hybrid_jax.convert.quantized import Groups
from hybrid_jax.convert.save import save_model, write_model
from hybrid_jax.convert.stream import convert_directory

__all__ = [
    "Groups",
    "check_model_directory",
    "convert_directory",
    "load_model",
    "read_model_config",
    "save_model",
    "write_model",
]
