"""The chunked (WY) form of the gated delta rule, and its gradient in the same form.

A  = (I + tril(beta K K' M, -1))^-1        V' = A beta (V - e^a (K H0))
O  = scale [(Q e^a) H0 + ((Q K') M) V'],   H1 = e^{a_C} H0 + (K e^{a_C - a})' V'

The gradient keeps A, V' and the state before each chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.arguments import differentiable
from kernels_pallas.chunks import (
    chunk_decay,
    default_chunk,
    from_chunks,
    matmul,
    scan_blocks,
    to_chunks,
)
from kernels_pallas.linear_attention.chunked import read_write_backward


def unit_lower_inverse(L: jax.Array) -> jax.Array:
    """Returns (I + L)^-1, [n, C, C], of strictly lower triangular L [..., C, C], C a power of two, by block doubling:

        [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]

    Matmuls above blocks of 8, and no powers of L, so nothing overflows however long its products are.
    """
    C = L.shape[-1]
    L = L.reshape(-1, C, C)
    n, half = L.shape[0], C // 2
    if C <= 8:  # on two CPU devices at once LAPACK's solves of 32 and more wait for each other's threads for ever
        identity = jnp.broadcast_to(jnp.eye(C, dtype=L.dtype), L.shape)
        return jax.lax.linalg.triangular_solve(L, identity, left_side=True, lower=True, unit_diagonal=True)
    diagonal = unit_lower_inverse(jnp.concatenate([L[:, :half, :half], L[:, half:, half:]]))
    first, second = diagonal[:n], diagonal[n:]
    corner = matmul("nij,njk->nik", matmul("nij,njk->nik", second, L[:, half:, :half], dtype=L.dtype), first, dtype=L.dtype)
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([-corner, second], axis=-1)], axis=-2)


def gated_delta_rule_chunked(
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
    """The `xla` implementation of `gated_delta_rule`; see `kernels_pallas.contract`."""
    chunk_size = chunk_size or default_chunk()
    if chunk_size & (chunk_size - 1):
        raise ValueError(f"gated_delta_rule: chunk_size must be a power of two, got {chunk_size}")

    def run(arrays, state, segments):
        return _gated_delta_rule(*arrays, state, segments, scale, chunk_size)

    return scan_blocks(run, (q, k, v, log_decay, beta), state, segments, chunk_size)


@differentiable(7, 8)
def _gated_delta_rule(q, k, v, log_decay, beta, state, segments, scale, chunk_size) -> tuple[jax.Array, jax.Array]:
    return _forward(q, k, v, log_decay, beta, state, segments, scale, chunk_size)[0]


def _forward(q, k, v, log_decay, beta, state, segments, scale, chunk_size):
    T, C, dtype, low = q.shape[1], chunk_size, state.dtype, k.dtype
    decay = chunk_decay(log_decay, segments, C, dtype)
    qc, kc, vc = (to_chunks(x, C) for x in (q, k, v))
    b = to_chunks(beta.astype(dtype), C)[..., None]
    reach = decay.reach[..., None]

    kq = jnp.concatenate([kc, qc], axis=3)
    both = matmul("nbhck,nbhik->nbhci", kq, kc, dtype=dtype)
    L = jnp.tril(b * both[..., :C, :] * decay.mask, -1)
    scores = (both[..., C:, :] * decay.mask).astype(low)
    A = unit_lower_inverse(L).astype(low).reshape(L.shape)
    kept = (kc * decay.keep[..., None]).astype(low)

    def step(H, chunk):
        kq, v, b, reach, A, kept, total = chunk
        seen = matmul("bhck,bhkv->bhcv", kq, H.astype(low), dtype=dtype)
        error = (b * (v - reach * seen[..., :C, :])).astype(low)
        new = matmul("bhci,bhiv->bhcv", A, error, dtype=dtype).astype(low)
        update = matmul("bhck,bhcv->bhkv", kept, new, dtype=dtype)
        return total[..., None, None] * H + update, (H, new, reach * seen[..., C:, :])

    chunks = (kq, vc, b, reach, A, kept, decay.total)
    final, (before, new, across) = jax.lax.scan(step, state, chunks)
    o = scale * (across + matmul("nbhci,nbhiv->nbhcv", scores, new, dtype=dtype))
    residuals = (q, k, v, log_decay, beta, segments, A, before, new)
    return (from_chunks(o, T).astype(v.dtype), final), residuals


def _backward(scale, chunk_size, residuals, cotangents):
    """V' reads like O does: with rows -beta K, the mask without its diagonal, and the cotangents dR = A' dV'."""
    q, k, v, log_decay, beta, segments, A, before, new = residuals
    do, dfinal = cotangents
    T, C, dtype, low = q.shape[1], chunk_size, before.dtype, k.dtype
    decay = chunk_decay(log_decay, segments, C, dtype)
    qc, kc, vc, dO = (to_chunks(x, C) for x in (q, k, v, do))
    b = to_chunks(beta.astype(dtype), C)[..., None]
    readers = jnp.concatenate([qc, (-b * kc).astype(low)], axis=3)
    mask = jnp.concatenate([decay.mask, jnp.tril(decay.mask, -1)], axis=3)
    scores = (matmul("nbhck,nbhik->nbhci", qc, kc, dtype=dtype) * decay.mask).astype(low)
    inside = matmul("nbhci,nbhcv->nbhiv", scores, dO, dtype=dtype)
    reached = (jnp.tile(decay.reach, 2)[..., None] * readers).astype(low)
    kept = (decay.keep[..., None] * kc).astype(low)

    def step(dH, chunk):
        inside, dO, reached, kept, A, total = chunk
        dU = inside + matmul("bhck,bhkv->bhcv", kept, dH.astype(low), dtype=dtype)
        dR = matmul("bhci,bhcv->bhiv", A, dU.astype(low), dtype=dtype).astype(low)
        cotangents = jnp.concatenate([dO, dR], axis=2)
        return total[..., None, None] * dH + matmul("bhrk,bhrv->bhkv", reached, cotangents, dtype=dtype), (dH, cotangents)

    chunks = (inside, dO.astype(low), reached, kept, A, decay.total)
    dinitial, (dH, cotangents) = jax.lax.scan(step, dfinal / scale, chunks, reverse=True)
    dreaders, dK, _, da = read_write_backward(readers, kc, new, before, cotangents, dH, mask, decay)
    dQ, dE, dR = dreaders[..., :C, :], dreaders[..., C:, :], cotangents[..., C:, :]
    dK = dK - b * dE
    dbeta = jnp.sum(dR * vc, axis=-1) - jnp.sum(dE * kc, axis=-1)
    dg = jax.lax.cumsum(da, axis=3, reverse=True)
    dQ, dK, dV = (from_chunks(scale * x, T) for x in (dQ, dK, b * dR))
    dg, dbeta = (from_chunks(scale * x[..., None], T)[..., 0] for x in (dg, dbeta))
    return (
        dQ.astype(q.dtype),
        dK.astype(k.dtype),
        dV.astype(v.dtype),
        dg.astype(log_decay.dtype),
        dbeta.astype(beta.dtype),
        scale * dinitial,
        None,
    )


_gated_delta_rule.defvjp(_forward, _backward)
