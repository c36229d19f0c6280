"""The gradient of Gated KalmaNet's kernel, with the tokens that read in lanes, as in `tpu_solve.py`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from kernels_pallas import mosaic
from kernels_pallas.gated_kalmanet.tpu_norms import Lanes, norms_backward
from kernels_pallas.gated_kalmanet.tpu_solve import Scratch, solve
from kernels_pallas.mosaic import NT, Decay, column_sum, dot_parts, each, head_slices, iota, row_sum, store_heads
from kernels_pallas.operands import parts


def gated_slices(ref, beta, heads, group) -> list[jax.Array]:
    """Reads a block of k or v as every head's K or V [C,D]: times beta, columns [C,1] of every head, or none, and rounded."""
    slices = head_slices(ref, heads, group)
    return each(lambda x, b: (b * x.astype(jnp.float32)).astype(x.dtype), slices, beta) if beta else slices


def store_gated(ref, x, gradients, beta, scale, group) -> list[jax.Array]:
    """Writes the gradient of a block x of k or v, given those of every head's K or V; returns dbeta as columns, if any."""
    if not beta:
        store_heads(ref, gradients, scale, group)
        return []
    store_heads(ref, each(jnp.multiply, beta, gradients), scale, group)
    return each(lambda d, x: row_sum(d * x), gradients, head_slices(x, len(beta), group))


def _pairs(scores, dscores, C):
    """what each pair of tokens i < t contributes to the decays"""
    strict = iota((C, C), 0) < iota((C, C), 1)
    return each(lambda s, ds: jnp.where(strict, s * ds, 0.0), scores, dscores)


def _of_read(Q, K, V, lanes, S0, dO, dS, decay, low):
    C = K[0].shape[0]
    Q2, S2, O2, dS2 = (each(lambda x: parts(x, low), xs) for xs in (Q, S0, dO, dS))
    scores = each(lambda k, q, d: dot_parts((k,), q) * d.mask, K, Q2, decay)
    dscores = each(lambda v, o: dot_parts((v,), o, NT), V, O2)
    E = _pairs(scores, dscores, C)
    dscores = each(lambda ds, d: parts(ds * d.mask, low), dscores, decay)
    scores = each(lambda s: parts(s, low), scores)
    across = each(lambda s, o, d: d.reach * dot_parts(s, o, NT), S2, O2, decay)
    kept = each(lambda v, s, d: d.keep * dot_parts((v,), s, NT), V, dS2, decay)
    dV = each(lambda s, o, k, h, d: dot_parts(s, o) + d.keep * dot_parts((k,), h), scores, O2, K, dS2, decay)
    dQ = each(lambda a, x, ds: a + dot_parts((x.k,), ds), across, lanes, dscores)
    dK = each(lambda a, ds, q: a + dot_parts(ds, q, NT), kept, dscores, Q2)
    reached = each(lambda q, d: parts(d.reach * q, low), Q, decay)
    dS0 = each(lambda h, q, o, d: d.total * h + dot_parts(q, o), dS, reached, O2, decay)
    kept = each(jnp.multiply, kept, K)
    row = each(lambda e, a, q: column_sum(e + a * q), E, across, Q)
    row = each(_with_end, row, kept, dS, S0, decay)
    return dQ, dK, dV, dS0, each(jnp.add, E, kept), row


def _with_end(row, kept, dH, H0, d):
    end = iota(row.shape, 1) == row.shape[1] - 1
    at_end = jnp.sum(column_sum(kept), axis=1, keepdims=True) + d.total * jnp.sum(column_sum(dH * H0), axis=1, keepdims=True)
    return row + jnp.where(end, at_end, 0.0)


def _of_states(X, G, K, H0, dH, decay, low):
    C = K[0].shape[0]
    X2, G2, H2 = (each(lambda x: parts(x, low), xs) for xs in (X, G, H0))
    both = each(lambda h: parts(h + h.T, low), dH)
    scores = each(lambda k, x, d: dot_parts((k,), x) * d.mask, K, X2, decay)
    dscores = each(lambda k, g: dot_parts((k,), g), K, G2)
    E = _pairs(scores, dscores, C)
    dscores = each(lambda ds, d: parts(ds * d.mask, low), dscores, decay)
    scores = each(lambda s: parts(s, low), scores)
    across = each(lambda h, g, d: d.reach * dot_parts(h, g), H2, G2, decay)
    kept = each(lambda k, h, d: d.keep * dot_parts((k,), h), K, both, decay)
    dK = each(lambda a, ds, x: a + dot_parts(ds, x, NT), kept, dscores, X2)
    dK = each(lambda a, s, g: a + dot_parts(s, g, NT), dK, scores, G2)
    outer = each(lambda x, g, d: dot_parts(parts(d.reach * x, low), g, NT), X, G2, decay)
    dH0 = each(lambda h, a, d: d.total * h + 0.5 * (a + a.T), dH, outer, decay)
    kept = each(lambda a, k: 0.5 * a * k, kept, K)
    row = each(lambda e, a, x: column_sum(e + a * x), E, across, X)
    row = each(_with_end, row, kept, dH, H0, decay)
    return dK, dH0, each(jnp.add, E, kept), row


def backward_kernel(*refs, heads, groups, gated, scale, packed, plan, bp_lambda):
    omegas, q, k, v, rows, kk_before, kv_before, solution, norms, do, dfinal_kk, dfinal_kv = refs[:12]
    dq, dk, dv, dscalars, dinitial_kk, dinitial_kv, dkk, dkv, *buffers = refs[12:]
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1

    @pl.when(first)
    def _():
        dkk[...], dkv[...] = dfinal_kk[0] / scale, dfinal_kv[0] / scale

    low = k.dtype
    decay, scalars = mosaic.chunk_scalars(rows, heads, packed, further=1 + gated, lanes=True)
    alpha = [rows[0, 0, 0, 2 * heads + h : 2 * heads + h + 1, :] for h in range(heads)]
    beta = scalars[heads:]
    K, V = (gated_slices(x, beta, heads, n) for x, n in zip((k, v), groups, strict=True))
    dO = head_slices(do, heads)
    H0, S0 = [kk_before[0, 0, h] for h in range(heads)], [kv_before[0, 0, h] for h in range(heads)]
    dH, dS = [dkk[h] for h in range(heads)], [dkv[h] for h in range(heads)]
    lanes = each(lambda k, d: Lanes(k.astype(jnp.float32).T.astype(k.dtype), d.mask, d.reach), K, decay)
    Q = each(lambda q: q.astype(jnp.float32).T, head_slices(q, heads))
    X = [solution[0, 0, h] for h in range(heads)] if plan.num_iter else Q
    query = each(lambda q, x, a: q + a * (x - q), Q, X, alpha) if plan.num_iter else Q
    dquery, dK, dV, dS0, E, row = _of_read(query, K, V, lanes, S0, dO, dS, decay, low)
    of_values = store_gated(dv, v, dV, beta, scale, groups[1])
    for h in range(heads):
        dkv[h] = dS0[h]
    dalpha = each(lambda g, x, q: column_sum(g * (x - q)), dquery, X, Q)
    if plan.num_iter:
        inverse, size, squares = ([norms[0, 0, 0, n + h : n + h + 1, :] for h in range(heads)] for n in (0, heads, 2 * heads))
        dX = each(jnp.multiply, alpha, dquery)
        W = solve(dX, K, lanes, H0, inverse, omegas, Scratch(*buffers), low, plan)
        dQ = each(lambda g, a, w: (g - a * g + w).T, dquery, alpha, W)
        minus_w = each(jnp.negative, W)
    else:
        dQ = each(jnp.transpose, dquery)
        minus_w = each(jnp.zeros_like, X)
    store_heads(dq, dQ, scale)
    dK_h, dH0, E_h, row_h = _of_states(X, minus_w, K, H0, dH, decay, low)
    dK, E, row = (each(jnp.add, *pair) for pair in ((dK, dK_h), (E, E_h), (row, row_h)))
    if plan.num_iter and bp_lambda:  # lambda = ridge_strength |H|
        dF = each(lambda w, x: -plan.ridge_strength * column_sum(w * x), W, X)
        dK_n, dH_n, E_n, row_n = norms_backward(dF, inverse, size, squares, K, lanes, H0, low)
        dK, dH0, E, row = (each(jnp.add, *p) for p in ((dK, dK_n), (dH0, dH_n), (E, E_n), (row, row_n)))
    dbeta = each(jnp.add, of_values, store_gated(dk, k, dK, beta, scale, groups[0]))
    column = each(lambda e: -row_sum(e), E)
    mosaic.store_rows(dscalars, [*column, *dbeta], [*row, *each(jnp.zeros_like, row * gated), *dalpha], scale)
    for h in range(heads):
        dkk[h] = dH0[h]

    @pl.when(last)
    def _():
        dinitial_kk[0], dinitial_kv[0] = scale * dkk[...], scale * dkv[...]
