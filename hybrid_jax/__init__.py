"""hybrid_jax: turn pretrained Transformers into hybrids of attention and state-space layers.

The functions below are imported when they are first used, so that `hybrid-jax --help` does not wait for JAX.
"""

import importlib
import sys
import types

_MODULES = {"generate": "hybrid_jax.generate", "load_model": "hybrid_jax.convert", "save_model": "hybrid_jax.convert"}

__all__ = ["generate", "load_model", "save_model"]  # noqa: F822 (properties of the module, see below)


def _function(name: str, module: str) -> property:
    # Importing the subpackage `generate` sets the attribute of that name; the setter keeps the function there.
    return property(lambda _: getattr(importlib.import_module(module), name), lambda _, submodule: None)


sys.modules[__name__].__class__ = type("Package", (types.ModuleType,), {n: _function(n, m) for n, m in _MODULES.items()})
