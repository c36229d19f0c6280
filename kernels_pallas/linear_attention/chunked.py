"""The chunked form: matmuls inside a chunk, a scan of states across chunks; and its gradient in the same form.

O = scale [(Q e^a) H0 + ((Q K') M) V],     H1 = e^{a_C} H0 + (K e^{a_C - a})' V

The gradient (formulas in `tpu.py`) keeps the state before each chunk and nothing else.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.arguments import differentiable
from kernels_pallas.chunks import (
    ChunkDecay,
    chunk_decay,
    chunk_outputs,
    chunk_states,
    default_chunk,
    from_chunks,
    matmul,
    scan_blocks,
    to_chunks,
)


def read_write_backward(
    Q: jax.Array,
    K: jax.Array,
    V: jax.Array,
    H0: jax.Array,
    dO: jax.Array,
    dH: jax.Array,
    mask: jax.Array,
    decay: ChunkDecay,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of reads reach (Q H0) + ((Q K') mask) V and writes total H0 + (keep K)' V of every chunk.

    Args:
      Q: [N,B,H,R,K], R a multiple of C: the rows of one or more readers one after another, C each.
      K, V, H0: [N,B,H,C,K], [N,B,H,C,V], [N,B,H,K,V].
      dO: [N,B,H,R,V], cotangents of the reads; dH: [N,B,H,K,V], of the writes.
      mask: [N,B,H,R,C], decays and zeros.

    Returns:
      dQ, dK, dV, and da [N,B,H,C], the gradient of the cumulative decays, in the accumulator's dtype.
    """
    dtype, low = H0.dtype, K.dtype
    N, B, H, R, C = mask.shape
    H0, dHl = H0.astype(low), dH.astype(low)
    raw = matmul("nbhrk,nbhik->nbhri", Q, K, dtype=dtype)
    draw = matmul("nbhrv,nbhiv->nbhri", dO, V, dtype=dtype)
    scores, dscores = (raw * mask).astype(low), (draw * mask).astype(low)
    reach = jnp.tile(decay.reach, R // C)[..., None]
    across = reach * matmul("nbhrv,nbhkv->nbhrk", dO, H0, dtype=dtype)
    kept = decay.keep[..., None] * matmul("nbhcv,nbhkv->nbhck", V, dHl, dtype=dtype)
    dQ = across + matmul("nbhri,nbhik->nbhrk", dscores, K, dtype=dtype)
    dK = kept + matmul("nbhri,nbhrk->nbhik", dscores, Q, dtype=dtype)
    dV = matmul("nbhri,nbhrv->nbhiv", scores, dO, dtype=dtype)
    dV = dV + decay.keep[..., None] * matmul("nbhck,nbhkv->nbhcv", K, dHl, dtype=dtype)
    # e^{a_t - a_i} adds to row t and takes from row i; on the diagonal the two cancel, and it is left out
    off = jnp.arange(R)[:, None] % C > jnp.arange(C)
    E = jnp.where(off, raw * draw * mask, 0.0)
    rows = jnp.sum(E, axis=-1) + jnp.sum(across * Q, axis=-1)
    kept = jnp.sum(kept * K, axis=-1)
    da = jnp.sum(rows.reshape(N, B, H, R // C, C), axis=3) - jnp.sum(E, axis=-2) - kept
    end = jnp.sum(kept, axis=-1) + decay.total * jnp.sum(dH * H0, axis=(-2, -1))
    return dQ, dK, dV, da.at[..., -1].add(end)


def linear_attention_chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    segments: jax.Array | None,
    scale: float,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """The `xla` implementation of `linear_attention`; see `kernels_pallas.contract`."""
    chunk_size = chunk_size or default_chunk()

    def run(arrays, state, segments):
        return _linear_attention(*arrays, state, segments, scale, chunk_size)

    return scan_blocks(run, (q, k, v, log_decay), state, segments, chunk_size)


@differentiable(6, 7)
def _linear_attention(q, k, v, log_decay, state, segments, scale, chunk_size) -> tuple[jax.Array, jax.Array]:
    return _forward(q, k, v, log_decay, state, segments, scale, chunk_size)[0]


def _forward(q, k, v, log_decay, state, segments, scale, chunk_size):
    decay = chunk_decay(log_decay, segments, chunk_size, state.dtype)
    qc, kc, vc = (to_chunks(x, chunk_size) for x in (q, k, v))
    before, final = chunk_states(kc, vc, decay, state)
    o = scale * chunk_outputs(qc, kc, vc, decay, before)
    return (from_chunks(o, q.shape[1]).astype(v.dtype), final), (q, k, v, log_decay, segments, before)


def _backward(scale, chunk_size, residuals, cotangents):
    q, k, v, log_decay, segments, before = residuals
    do, dfinal = cotangents
    T, dtype = q.shape[1], before.dtype
    decay = chunk_decay(log_decay, segments, chunk_size, dtype)
    qc, kc, vc, dO = (to_chunks(x, chunk_size) for x in (q, k, v, do))
    reached = (decay.reach[..., None] * qc).astype(q.dtype)
    push = matmul("nbhck,nbhcv->nbhkv", reached, dO, dtype=dtype)

    def step(dH, chunk):
        total, push = chunk
        return total[..., None, None] * dH + push, dH

    dinitial, dH = jax.lax.scan(step, dfinal / scale, (decay.total, push), reverse=True)
    dQ, dK, dV, da = read_write_backward(qc, kc, vc, before, dO, dH, decay.mask, decay)
    dQ, dK, dV = (from_chunks(scale * x, T) for x in (dQ, dK, dV))
    dg = from_chunks(scale * jax.lax.cumsum(da, axis=3, reverse=True)[..., None], T)[..., 0]
    return (
        dQ.astype(q.dtype),
        dK.astype(k.dtype),
        dV.astype(v.dtype),
        dg.astype(log_decay.dtype),
        scale * dinitial,
        None,
    )


_linear_attention.defvjp(_forward, _backward)
