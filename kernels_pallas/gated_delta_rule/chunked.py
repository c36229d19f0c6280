"""The chunked (WY) form of the gated delta rule.

A  = (I + tril(beta K K' M, -1))^-1        U = A (beta V)        W = A (beta e^a K)
V' = U - W H0
O  = scale [(Q e^a) H0 + ((Q K') M) V'],   H1 = e^{a_C} H0 + (K e^{a_C - a})' V'
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.chunks import CHUNK, chunk_decay, chunk_outputs, from_chunks, matmul, to_chunks


def unit_lower_inverse(L: jax.Array) -> jax.Array:
    """(I + L)^-1 for strictly lower triangular L [..., C, C], C a power of two, by block doubling.

        [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]

    Only matmuls and no powers of L, so nothing overflows however long its products are.
    """
    C = L.shape[-1]
    if C == 1:
        return jnp.ones_like(L)
    h = C // 2
    diagonal = unit_lower_inverse(jnp.stack([L[..., :h, :h], L[..., h:, h:]]))
    first, second = diagonal[0], diagonal[1]
    product = matmul("...ij,...jk->...ik", L[..., h:, :h], first, dtype=L.dtype)
    corner = -matmul("...ij,...jk->...ik", second, product, dtype=L.dtype)
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)


def gated_delta_rule_chunked(q, k, v, log_decay, beta, state, segments, scale, chunk_size):
    chunk_size = chunk_size or CHUNK
    if chunk_size & (chunk_size - 1):
        raise ValueError(f"gated_delta_rule: chunk_size must be a power of two, got {chunk_size}")
    T, dtype, low = q.shape[1], state.dtype, k.dtype
    decay = chunk_decay(log_decay, segments, chunk_size, dtype)
    qc, kc, vc = (to_chunks(x, chunk_size) for x in (q, k, v))
    b = to_chunks(beta.astype(dtype), chunk_size)[..., None]

    L = jnp.tril(b * matmul("nbhck,nbhik->nbhci", kc, kc, dtype=dtype) * decay.mask, -1)
    A = unit_lower_inverse(L).astype(low)
    U = matmul("nbhci,nbhiv->nbhcv", A, (b * vc).astype(low), dtype=dtype)
    W = matmul("nbhci,nbhik->nbhck", A, (b * decay.reach[..., None] * kc).astype(low), dtype=dtype).astype(low)
    kept = (kc * decay.keep[..., None]).astype(low)

    def step(H, chunk):
        U, W, kept, total = chunk
        new = U - matmul("bhck,bhkv->bhcv", W, H.astype(low), dtype=dtype)
        update = matmul("bhck,bhcv->bhkv", kept, new.astype(low), dtype=dtype)
        return total[..., None, None] * H + update, (H, new)

    final, (before, new) = jax.lax.scan(step, state, (U, W, kept, decay.total))
    o = scale * chunk_outputs(qc, kc, new.astype(low), decay, before)
    return from_chunks(o, T).astype(v.dtype), final
