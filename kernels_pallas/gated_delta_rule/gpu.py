"""Pallas kernels for NVIDIA: A of all chunks at once, a sweep for the states, and all outputs at once.

Formulas in `tpu.py`; in the backward, U reads like O does, with rows -beta K and the cotangents dR = A' dU.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from kernels_pallas import triton
from kernels_pallas.arguments import differentiable
from kernels_pallas.linear_attention.gpu import outputs, read_backward, write_backward
from kernels_pallas.operands import operand_dtype, pad_axis
from kernels_pallas.triton import dot, load_decay


def unit_lower_inverse(L: jax.Array, low: DTypeLike) -> jax.Array:
    """Returns (I + L)^-1 of strictly lower triangular L [C,C], by doubling on full matrices, X <- X - X (L of the level) X.

    In bf16 a Newton step with the residual of L's two bf16 parts takes back what the single products lost.
    """
    C = L.shape[0]
    row, col = jnp.arange(C)[:, None], jnp.arange(C)[None, :]
    identity = jnp.where(row == col, 1.0, 0.0)
    X, size = identity, 1
    while size < C:
        level = (row // (2 * size) == col // (2 * size)) & ((row // size) % 2 == 1) & ((col // size) % 2 == 0)
        corner = jnp.where(level, L, 0.0)
        if size > 1:
            Xl = X.astype(low)
            corner = dot(Xl, dot(corner.astype(low), Xl).astype(low))
        X, size = X - corner, 2 * size
    if low == jnp.float32:
        return X
    Xl, high = X.astype(low), L.astype(low)
    rest = (L - high.astype(jnp.float32)).astype(low)
    residual = identity - Xl.astype(jnp.float32) - dot(high, Xl) - dot(rest, Xl)
    return Xl.astype(jnp.float32) + dot(Xl, residual.astype(low))


def _inverse_kernel(k, coarse, fine, segment, carried, beta, A):
    decay = load_decay(coarse, fine, segment, carried, slice(None))
    K, index = k[...], jnp.arange(k.shape[0])
    L = jnp.where(index[:, None] > index[None, :], beta[...][:, None] * dot(K, K, trans_b=True) * decay.mask, 0.0)
    A[...] = unit_lower_inverse(L, K.dtype).astype(A.dtype)


def _write_kernel(k, v, A, coarse, fine, segment, carried, beta, initial, before, update, final, *, N, C):
    """U = A beta (V - reach K H0) and H <- total H + (keep K)' U over the chunks, for a block of V's columns."""

    def chunk(n, H):
        at = pl.ds(n * C, C)
        decay = load_decay(coarse, fine, segment, carried, at)
        K, low = k[at], H.astype(k.dtype)
        before[n] = low
        error = beta[at][:, None] * (v[at] - decay.reach[:, None] * dot(K, low))
        U = dot(A[at], error.astype(K.dtype)).astype(K.dtype)
        update[at] = U
        return decay.total * H + dot((K * decay.keep[:, None]).astype(K.dtype), U, trans_a=True)

    final[...] = jax.lax.fori_loop(0, N, chunk, initial[...])


def _reverse_kernel(q, k, A, do, coarse, fine, segment, carried, beta, dfinal, dH, dR, dinitial, *, N, C):
    """dR = A' dU and dH from the last chunk to the first, for a block of V's columns."""

    def chunk(i, D):
        n = N - 1 - i
        at = pl.ds(n * C, C)
        decay = load_decay(coarse, fine, segment, carried, at)
        Q, K, O = q[at], k[at], do[at]
        low = K.dtype
        scores = (dot(Q, K, trans_b=True) * decay.mask).astype(low)
        Dl = D.astype(low)
        dH[n] = Dl
        dU = dot(scores, O, trans_a=True) + decay.keep[:, None] * dot(K, Dl)
        R = dot(A[at], dU.astype(low), trans_a=True).astype(low)
        dR[at] = R
        reached, erased = decay.reach[:, None] * Q, (beta[at] * decay.reach)[:, None] * K
        return decay.total * D + dot(reached.astype(low), O, trans_a=True) - dot(erased.astype(low), R, trans_a=True)

    dinitial[...] = jax.lax.fori_loop(0, N, chunk, dfinal[...])


def _backward_kernel(q, k, v, update, coarse, fine, segment, carried, beta, before, do, dR, dH, dq, dk, dv, da, dbeta, *, scale):
    decay = load_decay(coarse, fine, segment, carried, slice(None))
    Q, K, U, H0, D, R, b = q[...], k[...], update[...], before[...], dH[...], dR[...], beta[...][:, None]
    dQ, dK, _, a = read_backward(Q, K, U, H0, do[...], decay)
    dE, dK2, _, a2 = read_backward((-b * K).astype(K.dtype), K, U, H0, R, decay, strict=True)
    dK3, _, a3 = write_backward(K, U, H0, D, decay)
    dq[...] = (scale * dQ).astype(dq.dtype)
    dk[...] = (scale * (dK + dK2 + dK3 - b * dE)).astype(dk.dtype)
    dv[...] = (scale * b * R).astype(dv.dtype)
    da[...] = scale * (a + a2 + a3)
    dbeta[...] = scale * (jnp.sum(R * v[...].astype(jnp.float32), axis=1) - jnp.sum(dE * K, axis=1))


def gated_delta_rule_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    segments: jax.Array | None,
    scale: float,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """The `pallas_gpu` implementation of `gated_delta_rule`; see `kernels_pallas.contract`."""
    low = operand_dtype(q, k, v)
    arrays = (x.astype(low) for x in (q, k, v))
    o, final = _gated_delta_rule(*arrays, log_decay, beta, state, segments, scale, chunk_size)
    return o.astype(v.dtype), final


@differentiable(7, 8)
def _gated_delta_rule(q, k, v, log_decay, beta, state, segments, scale, chunk_size) -> tuple[jax.Array, jax.Array]:
    return _forward(q, k, v, log_decay, beta, state, segments, scale, chunk_size)[0]


def _prepare(q, k, v, log_decay, beta, segments, chunk_size):
    s = triton.sizes_of("gated_delta_rule", q, v, chunk_size)
    gates = pad_axis(beta.astype(jnp.float32), 1, s.T).transpose(0, 2, 1)
    scalars = [*triton.scalars_of(log_decay, segments, s), gates]
    return s, scalars, [triton.pad_tokens(x, s.T, d) for x, d in ((q, s.K), (k, s.K), (v, s.V))]


def _forward(q, k, v, log_decay, beta, state, segments, scale, chunk_size):
    s, scalars, (qp, kp, vp) = _prepare(q, k, v, log_decay, beta, segments, chunk_size)
    sequence, chunk = s.sequence_scalars(), s.chunk_scalars()
    A = triton.run(
        _inverse_kernel,
        "gated_delta_rule_inverse",
        (s.B, s.H, s.N),
        [(kp, s.chunk(s.K)), *((x, chunk) for x in scalars)],
        [(s.tokens(s.C, k.dtype), s.chunk(s.C))],
    )[0]
    before, update, final = triton.run(
        functools.partial(_write_kernel, N=s.N, C=s.C),
        "gated_delta_rule_states",
        (s.B, s.H, s.V // s.columns),
        [
            (kp, s.sequence(s.K)),
            (vp, s.sequence(s.V, columns=True)),
            (A, s.sequence(s.C)),
            *((x, sequence) for x in scalars),
            (triton.pad_state(state, s), s.state()),
        ],
        [
            (jax.ShapeDtypeStruct((s.B, s.N, s.H, s.K, s.V), k.dtype), s.states()),
            (s.tokens(s.V, k.dtype), s.sequence(s.V, columns=True)),
            (jax.ShapeDtypeStruct((s.B, s.H, s.K, s.V), jnp.float32), s.state()),
        ],
    )
    o = outputs(qp, kp, update, scalars[:4], before, s, scale, v.dtype)
    T, K, V = q.shape[1], q.shape[3], v.shape[3]
    return (o[:, :T, :, :V], final[:, :, :K, :V]), (q, k, v, log_decay, beta, segments, A, before, update)


def _backward(scale, chunk_size, residuals, cotangents):
    q, k, v, log_decay, beta, segments, A, before, update = residuals
    do, dfinal = cotangents
    s, scalars, (qp, kp, vp) = _prepare(q, k, v, log_decay, beta, segments, chunk_size)
    dop = triton.pad_tokens(do.astype(k.dtype), s.T, s.V)
    sequence = s.sequence_scalars()
    dH, dR, dinitial = triton.run(
        functools.partial(_reverse_kernel, N=s.N, C=s.C),
        "gated_delta_rule_reverse",
        (s.B, s.H, s.V // s.columns),
        [
            (qp, s.sequence(s.K)),
            (kp, s.sequence(s.K)),
            (A, s.sequence(s.C)),
            (dop, s.sequence(s.V, columns=True)),
            *((x, sequence) for x in scalars),
            (triton.pad_state(dfinal, s) / scale, s.state()),
        ],
        [
            (jax.ShapeDtypeStruct(before.shape, before.dtype), s.states()),
            (s.tokens(s.V, k.dtype), s.sequence(s.V, columns=True)),
            (jax.ShapeDtypeStruct((s.B, s.H, s.K, s.V), jnp.float32), s.state()),
        ],
    )
    dq, dk, dv, da, dbeta = triton.run(
        functools.partial(_backward_kernel, scale=scale),
        "gated_delta_rule_backward",
        (s.B, s.H, s.N),
        [
            *s.chunk_inputs(qp, kp, vp, update, scalars=scalars),
            (before, s.chunk_state()),
            (dop, s.chunk(s.V)),
            (dR, s.chunk(s.V)),
            (dH, s.chunk_state()),
        ],
        s.gradient_outputs(q, k, v, 2),
        num_warps=8,
    )
    T, K, V = q.shape[1], q.shape[3], v.shape[3]
    return (
        dq[:, :T, :, :K],
        dk[:, :T, :, :K],
        dv[:, :T, :, :V],
        triton.decay_gradient(da, s, T).astype(log_decay.dtype),
        dbeta.transpose(0, 2, 1)[:, :T].astype(beta.dtype),
        scale * dinitial[:, :, :K, :V],
        None,
    )


_gated_delta_rule.defvjp(_forward, _backward)
