"""cuDNN's fused attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`, for rows that hold one document.

JAX gives cuDNN no packed segments, and its results cannot be merged in a ring, so it serves rows of one document (padding at the
end) whose tokens are not sharded; a program decides when it runs, and packed rows take the tiled form. It has been lowered for
GPUs and compared with the tiled form through JAX's own XLA implementation; it has never run on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas.arguments import backend

LARGEST_HEAD = 128


def cudnn_applies(q: jax.Array) -> bool:
    """Returns whether cuDNN can serve queries of this shape and dtype: the program is traced for GPUs, those of this machine are
    Ampere or newer, the dtype is float16 or bfloat16, and the head dim is a multiple of 8 of at most 128."""
    if backend() != "gpu" or float(getattr(jax.devices()[0], "compute_capability", 0)) < 8:
        return False
    return q.dtype in (jnp.float16, jnp.bfloat16) and q.shape[-1] <= LARGEST_HEAD and q.shape[-1] % 8 == 0


def document_lengths(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Finds the rows that hold one document.

    Args:
      segment_ids: [B, T], 0 for padding.

    Returns:
      ([B] int32 tokens of each row's first document, scalar: every row is one document and padding after it).
    """
    T, first = segment_ids.shape[1], segment_ids[:, :1]
    lengths = jnp.sum(jnp.cumprod(segment_ids == first, axis=1, dtype=jnp.int32), axis=1)
    expected = jnp.where(jnp.arange(T) < lengths[:, None], first, 0)
    return lengths, jnp.all(segment_ids == expected)


def attend_documents(
    window: int | None,
    otherwise: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Returns causal attention, by cuDNN if every row holds one document, else by `otherwise`.

    What padding attends to differs between the two, and nothing reads it.

    Args:
      window: keys a query sees, itself included; None for all.
      otherwise: (q, k, v, segment_ids) -> o, for packed rows.
      q: [B, T, H, D]; k, v: [B, T, Hkv, D].
      segment_ids: [B, T].
      implementation: of `jax.nn.dot_product_attention`; tests pass "xla".

    Returns:
      o [B, T, H, D] in q's dtype.
    """
    lengths, alone = document_lengths(segment_ids)
    fused = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )

    def documents(q: jax.Array, k: jax.Array, v: jax.Array, _: jax.Array) -> jax.Array:
        return fused(q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths)

    return jax.lax.cond(alone, documents, otherwise, q, k, v, segment_ids)
