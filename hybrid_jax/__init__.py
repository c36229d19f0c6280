"""hybrid_jax: turn pretrained Transformers into hybrids of attention and state-space layers.

The functions below are imported when they are first used, so that `hybrid-jax --help` does not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybrid_jax.convert import load_model, save_model
    from hybrid_jax.generation import generate
    from hybrid_jax.parameters import with_iterations

__all__ = ["generate", "load_model", "save_model", "with_iterations"]

_MODULES = {
    "generate": "hybrid_jax.generation",
    "load_model": "hybrid_jax.convert",
    "save_model": "hybrid_jax.convert",
    "with_iterations": "hybrid_jax.parameters",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
