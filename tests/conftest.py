"""Shared by all tests: where the golden data lives, tiny models, relative errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Interpreted kernels run in XLA, which else takes x -> bf16 -> float32 for x; Mosaic and Triton round, and the kernels count on it.
os.environ["XLA_FLAGS"] = f"--xla_allow_excess_precision=false {os.environ.get('XLA_FLAGS', '')}"

import pathlib
import socket

import jax
import numpy as np
import pytest
from flax import nnx

from hybrid_jax.config import BMojoConfig, GKAConfig, ModelConfig, SWAConfig, parse_pattern
from hybrid_jax.mixers import KINDS
from hybrid_jax.model import Decoder

if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:  # most of the tests' time is XLA's, optimising programs that run once
    jax.config.update("jax_disable_most_optimizations", True)

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module", autouse=True)
def free_compiled_programs():
    """A process may map only so many pieces of memory, and every program for the CPU takes some: 300 tests' are too many."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


def relative_error(got, want):
    """|got - want| / |want| (norms), or |got| where want is 0."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / (np.linalg.norm(want) or 1.0)


def free_port() -> int:
    """A port of the loopback interface that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def tiny_config(pattern, **changes) -> ModelConfig:
    """A Qwen3 of odd sizes: head_dim != hidden / heads, two query heads per key head, windows of 6.

    Args:
      changes: fields of `ModelConfig`, or options of mixers by kind (`gka=GKAConfig(...)`).
    """
    layers = parse_pattern(pattern)
    values = dict(
        family="qwen3",
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        layers=layers,
        qk_norm=True,
        initializer_range=0.2,
        max_position_embeddings=256,
    )
    mixers = {"swa": SWAConfig(6), "bmojo": BMojoConfig(4, "gka"), "gka": GKAConfig(chunk_size=16)}
    mixers |= {kind: changes.pop(kind) for kind in KINDS if kind in changes}
    return ModelConfig(**{**values, "mixers": tuple(mixers.values()), **changes})


def tiny_model(pattern, seed=0, **changes) -> Decoder:
    return Decoder(tiny_config(pattern, **changes), rngs=nnx.Rngs(seed))
