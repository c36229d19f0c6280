"""The small hybrid of every mixer that the check trains, and its rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from flax import nnx

from hybrid_jax.config import BMojoConfig, GKAConfig, ModelConfig, SWAConfig, parse_pattern
from hybrid_jax.data.layout import training_batch
from hybrid_jax.mixers import mixer_symbols
from hybrid_jax.model import Decoder

VOCABULARY = 256


def small_model(devices: int = 1, symbols: tuple[str, ...] | None = None) -> Decoder:
    """Returns a model with a layer of each mixer, float32, the same on every machine.

    Args:
      devices: the width is a multiple of it, so that a mesh axis of so many divides the model.
      symbols: of the layers; default: every mixer.
    """
    hidden = 64 if 64 % devices == 0 else 64 * devices // math.gcd(64, devices)
    config = ModelConfig(
        family="qwen3",
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        layers=parse_pattern("-".join(symbols or mixer_symbols())),
        qk_norm=True,
        initializer_range=0.08,
        max_position_embeddings=4096,
        mixers=(GKAConfig(ridge_strength=1.0, chunk_size=16), SWAConfig(12), BMojoConfig(12)),
    )
    return Decoder(config, rngs=nnx.Rngs(0))


def small_rows(rows: int, length: int) -> dict[str, Any]:
    """Returns rows of several documents: every token is the sum of the two before it, with a few random ones."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCABULARY, (rows, length))
    for t in range(2, length):
        ids[:, t] = np.where(rng.random(rows) < 0.1, ids[:, t], (ids[:, t - 1] + ids[:, t - 2]) % VOCABULARY)
    segments = np.ones((rows, length), np.int32)
    segments[0, length // 3 :] = 2
    segments[-1, length - length // 5 :] = 0
    return {"input_ids": ids.astype(np.int32), "segment_ids": segments, "loss_weights": (segments > 0).astype(np.float32)}


def small_batch(rows: int, length: int) -> dict[str, Any]:
    """Returns `small_rows` as a training step takes them."""
    return training_batch(small_rows(rows, length))
