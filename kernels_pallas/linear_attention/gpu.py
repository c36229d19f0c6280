"""Pallas kernels for NVIDIA: a sweep over the chunks for the states, and all outputs at once (formulas in `tpu.py`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from kernels_pallas import triton
from kernels_pallas.arguments import differentiable
from kernels_pallas.operands import operand_dtype
from kernels_pallas.triton import Decay, Sizes, dot, load_decay


def _write_kernel(k, v, coarse, fine, segment, carried, initial, before, final, *, N, C):
    """H <- total H + (keep K)' V over the chunks, for a block of V's columns."""

    def chunk(n, H):
        at = pl.ds(n * C, C)
        decay = load_decay(coarse, fine, segment, carried, at)
        before[n] = H.astype(before.dtype)
        return decay.total * H + dot((k[at] * decay.keep[:, None]).astype(k.dtype), v[at], trans_a=True)

    final[...] = jax.lax.fori_loop(0, N, chunk, initial[...])


def _read_kernel(q, k, v, coarse, fine, segment, carried, before, o, *, scale):
    """O = scale [reach (Q H0) + ((Q K') M) V] of one chunk."""
    decay = load_decay(coarse, fine, segment, carried, slice(None))
    Q, K = q[...], k[...]
    scores = (dot(Q, K, trans_b=True) * decay.mask).astype(K.dtype)
    o[...] = (scale * (decay.reach[:, None] * dot(Q, before[...]) + dot(scores, v[...]))).astype(o.dtype)


def _reverse_kernel(q, do, coarse, fine, segment, carried, dfinal, dH, dinitial, *, N, C):
    """dH <- total dH + (reach Q)' dO from the last chunk to the first, for a block of V's columns."""

    def chunk(i, D):
        n = N - 1 - i
        at = pl.ds(n * C, C)
        decay = load_decay(coarse, fine, segment, carried, at)
        dH[n] = D.astype(dH.dtype)
        return decay.total * D + dot((q[at] * decay.reach[:, None]).astype(q.dtype), do[at], trans_a=True)

    dinitial[...] = jax.lax.fori_loop(0, N, chunk, dfinal[...])


def read_backward(
    Q: jax.Array, K: jax.Array, V: jax.Array, H0: jax.Array, dO: jax.Array, decay: Decay, strict: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of one chunk's read, under cotangents dO [C,V]: dQ, dK, dV and da [C].

    Args:
      Q, K, V, H0: [C,K], [C,K], [C,V] and the state before the chunk [K,V].
      strict: whether a token does not read itself.
    """
    C, low = Q.shape[0], K.dtype
    index = jnp.arange(C)
    off = index[:, None] > index[None, :]
    mask = jnp.where(off, decay.mask, 0.0) if strict else decay.mask
    raw, draw = dot(Q, K, trans_b=True), dot(dO, V, trans_b=True)
    E = jnp.where(off, raw * draw * decay.mask, 0.0)
    scores, dscores = (raw * mask).astype(low), (draw * mask).astype(low)
    across = decay.reach[:, None] * dot(dO, H0, trans_b=True)
    dQ = across + dot(dscores, K)
    dK = dot(dscores, Q, trans_a=True)
    dV = dot(scores, dO, trans_a=True)
    return dQ, dK, dV, jnp.sum(E, axis=1) + jnp.sum(across * Q, axis=1) - jnp.sum(E, axis=0)


def write_backward(
    K: jax.Array, V: jax.Array, H0: jax.Array, dH: jax.Array, decay: Decay
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of one chunk's write, under cotangents dH [K,V] of the state after it: dK, dV and da [C]."""
    C = K.shape[0]
    kept = decay.keep[:, None] * dot(V, dH, trans_b=True)
    dV = decay.keep[:, None] * dot(K, dH)
    taken = jnp.sum(kept * K, axis=1)
    end = jnp.sum(taken) + decay.total * jnp.sum(H0.astype(jnp.float32) * dH.astype(jnp.float32))
    return kept, dV, jnp.where(jnp.arange(C) == C - 1, end, 0.0) - taken


def _backward_kernel(q, k, v, coarse, fine, segment, carried, before, do, dH, dq, dk, dv, da, *, scale):
    decay = load_decay(coarse, fine, segment, carried, slice(None))
    Q, K, V, H0, D = q[...], k[...], v[...], before[...], dH[...]
    dQ, dK, dV, a = read_backward(Q, K, V, H0, do[...], decay)
    dK2, dV2, a2 = write_backward(K, V, H0, D, decay)
    dq[...] = (scale * dQ).astype(dq.dtype)
    dk[...] = (scale * (dK + dK2)).astype(dk.dtype)
    dv[...] = (scale * (dV + dV2)).astype(dv.dtype)
    da[...] = scale * (a + a2)


def states(k: jax.Array, v: jax.Array, scalars: Sequence[jax.Array], state: jax.Array, s: Sizes) -> tuple[jax.Array, jax.Array]:
    """Returns the states before every chunk [B,N,H,K,V], in k's dtype, and after the last [B,H,K,V], for padded arrays."""
    sequence = s.sequence_scalars()
    before, final = triton.run(
        functools.partial(_write_kernel, N=s.N, C=s.C),
        "linear_attention_states",
        (s.B, s.H, s.V // s.columns),
        [
            (k, s.sequence(s.K)),
            (v, s.sequence(s.V, columns=True)),
            *((x, sequence) for x in scalars),
            (state, s.state()),
        ],
        [
            (jax.ShapeDtypeStruct((s.B, s.N, s.H, s.K, s.V), k.dtype), s.states()),
            (jax.ShapeDtypeStruct((s.B, s.H, s.K, s.V), jnp.float32), s.state()),
        ],
    )
    return before, final


def outputs(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scalars: Sequence[jax.Array],
    before: jax.Array,
    s: Sizes,
    scale: float,
    dtype: DTypeLike,
) -> jax.Array:
    """Returns the outputs of all chunks, [B,T,H,V] in `dtype`, for padded arrays and the states before the chunks."""
    return triton.run(
        functools.partial(_read_kernel, scale=scale),
        "linear_attention_outputs",
        (s.B, s.H, s.N),
        [
            *s.chunk_inputs(q, k, v, scalars=scalars),
            (before, s.chunk_state()),
        ],
        [(s.tokens(s.V, dtype), s.chunk(s.V))],
    )[0]


def linear_attention_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    segments: jax.Array | None,
    scale: float,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """The `pallas_gpu` implementation of `linear_attention`; see `kernels_pallas.contract`."""
    low = operand_dtype(q, k, v)
    o, final = _linear_attention(*(x.astype(low) for x in (q, k, v)), log_decay, state, segments, scale, chunk_size)
    return o.astype(v.dtype), final


@differentiable(6, 7)
def _linear_attention(q, k, v, log_decay, state, segments, scale, chunk_size) -> tuple[jax.Array, jax.Array]:
    return _forward(q, k, v, log_decay, state, segments, scale, chunk_size)[0]


def _forward(q, k, v, log_decay, state, segments, scale, chunk_size):
    s = triton.sizes_of("linear_attention", q, v, chunk_size)
    scalars = triton.scalars_of(log_decay, segments, s)
    qp, kp, vp = (triton.pad_tokens(x, s.T, d) for x, d in ((q, s.K), (k, s.K), (v, s.V)))
    before, final = states(kp, vp, scalars, triton.pad_state(state, s), s)
    o = outputs(qp, kp, vp, scalars, before, s, scale, v.dtype)
    T, K, V = q.shape[1], q.shape[3], v.shape[3]
    return (o[:, :T, :, :V], final[:, :, :K, :V]), (q, k, v, log_decay, segments, before)


def _backward(scale, chunk_size, residuals, cotangents):
    q, k, v, log_decay, segments, before = residuals
    do, dfinal = cotangents
    s = triton.sizes_of("linear_attention", q, v, chunk_size)
    scalars = triton.scalars_of(log_decay, segments, s)
    qp, kp, vp, dop = (triton.pad_tokens(x, s.T, d) for x, d in ((q, s.K), (k, s.K), (v, s.V), (do, s.V)))
    sequence = s.sequence_scalars()
    dH, dinitial = triton.run(
        functools.partial(_reverse_kernel, N=s.N, C=s.C),
        "linear_attention_reverse",
        (s.B, s.H, s.V // s.columns),
        [
            (qp, s.sequence(s.K)),
            (dop, s.sequence(s.V, columns=True)),
            *((x, sequence) for x in scalars),
            (triton.pad_state(dfinal, s) / scale, s.state()),
        ],
        [
            (jax.ShapeDtypeStruct(before.shape, before.dtype), s.states()),
            (jax.ShapeDtypeStruct((s.B, s.H, s.K, s.V), jnp.float32), s.state()),
        ],
    )
    dq, dk, dv, da = triton.run(
        functools.partial(_backward_kernel, scale=scale),
        "linear_attention_backward",
        (s.B, s.H, s.N),
        [
            *s.chunk_inputs(qp, kp, vp, scalars=scalars),
            (before, s.chunk_state()),
            (dop, s.chunk(s.V)),
            (dH, s.chunk_state()),
        ],
        s.gradient_outputs(q, k, v, 1),
    )
    T, K, V = q.shape[1], q.shape[3], v.shape[3]
    return (
        dq[:, :T, :, :K],
        dk[:, :T, :, :K],
        dv[:, :T, :, :V],
        triton.decay_gradient(da, s, T).astype(log_decay.dtype),
        scale * dinitial[:, :, :K, :V],
        None,
    )


_linear_attention.defvjp(_forward, _backward)
