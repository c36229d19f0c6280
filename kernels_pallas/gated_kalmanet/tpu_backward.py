"""The backward kernel of Gated KalmaNet for TPU; `tpu.py` has the formulas."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from kernels_pallas import mosaic_chunk
from kernels_pallas.gated_kalmanet.tpu_norms import norms_backward
from kernels_pallas.gated_kalmanet.tpu_solve import Scratch, solve
from kernels_pallas.linear_attention.tpu import Tokens, decay_gradient, read_write_backward
from kernels_pallas.mosaic import Groups
from kernels_pallas.mosaic_chunk import (
    NT,
    Decay,
    column_sum,
    dot_parts,
    each,
    earlier,
    head_columns,
    head_slices,
    store_tokens,
    sums_of_rows,
)
from kernels_pallas.operands import parts


def gated_tokens(
    k: jax.Ref, v: jax.Ref, beta: Sequence[jax.Array], heads: int, groups: Groups
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """Reads blocks of k and v as every head's K' [K,C], K [C,K] and V [C,V]: times beta, if any, and rounded.

    Args:
      beta: rows [1,C] of every head, or none.
    """
    if not beta:
        return head_columns(k, heads, groups[0]), head_slices(k, heads, groups[0]), head_slices(v, heads, groups[1])

    def gated(ref, group):
        return each(lambda x, b: (b * x.astype(jnp.float32)).astype(x.dtype), head_columns(ref, heads, group), beta)

    Kt = gated(k, groups[0])
    return Kt, each(jnp.transpose, Kt), each(jnp.transpose, gated(v, groups[1]))


def blend(Q: Sequence[jax.Array], X: Sequence[jax.Array], alpha: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns q + alpha (x - q), float32."""
    return each(lambda q, x, a: q + a * (x - q), Q, X, alpha)


def _states_backward(
    X: Sequence[jax.Array],
    G: Sequence[jax.Array],
    K: Sequence[jax.Array],
    Kt: Sequence[jax.Array],
    H0: Sequence[jax.Array],
    dH: Sequence[jax.Array],
    decay: Sequence[Decay],
    low: DTypeLike,
) -> list[tuple[jax.Array, ...]]:
    """Returns every head's gradients of reading H x under cotangents g of it, and of writing H.

    This is `read_write_backward` with q = x and k = v, but for H, which is symmetric: of it K needs dH + dH' only.

    Args:
      X, G: x and g [K,C], float32.
      K, Kt: the keys [C,K] and [K,C], in `low`.
      H0, dH: the states before the chunk and the gradients of those after it [K,K], float32.

    Returns:
      dK [K,C], dH0 [K,K], and of the decays `pairs` [C,C] and `da` [1,C], as in `linear_attention.tpu.Gradients`.
    """
    X2, G2, H2 = (each(lambda a: parts(a, low), arrays) for arrays in (X, G, H0))
    scores = each(lambda k, x, d: dot_parts((k,), x) * d.mask, K, X2, decay)
    dscores = each(lambda k, g: dot_parts((k,), g), K, G2)
    pairs = each(lambda s, ds: earlier(s * ds), scores, dscores)
    scores = each(lambda s: parts(s, low), scores)
    dscores = each(lambda ds, d: parts(ds * d.mask, low), dscores, decay)
    across = each(lambda h, g, d: d.reach * dot_parts(h, g), H2, G2, decay)
    kept = each(lambda h, k: dot_parts(parts(h + h.T, low), (k,)), dH, Kt)
    dK = each(
        lambda a, s, ds, x, g, d: d.keep * a + dot_parts(x, ds, NT) + dot_parts(g, s, NT), kept, scores, dscores, X2, G2, decay
    )
    outer = each(lambda x, g, d: dot_parts(parts(d.reach * x, low), g, NT), X, G2, decay)
    dH0 = each(lambda h, a, d: d.total * h + 0.5 * (a + a.T), dH, outer, decay)
    kept = each(lambda a, k: 0.5 * column_sum(a * k), kept, Kt)
    da = each(lambda a, x: column_sum(a * x), across, X)
    return list(zip(dK, dH0, pairs, each(decay_gradient, da, kept, dH, H0, decay), strict=True))


def _store(ref, x, gradients, beta, scale, group) -> list[jax.Array]:
    """Writes the gradient of a block x of k or v, given those of every head's K' or V'; returns dbeta as rows [1,C], if any."""
    if not beta:
        store_tokens(ref, gradients, scale, group)
        return []
    store_tokens(ref, each(jnp.multiply, beta, gradients), scale, group)
    return each(lambda d, x: column_sum(d * x), gradients, head_columns(x, len(gradients), group))


def backward_kernel(*refs, heads, groups, gated, scale, packed, plan, bp_lambda):
    """The gradients of a chunk, from the last one to the first. The references are those of `tpu._vjp_backward`."""
    omegas, q, k, v, rows, kk_before, kv_before, solution, norms, do, dfinal_kk, dfinal_kv = refs[:12]
    dq, dk, dv, dscalars, dinitial_kk, dinitial_kv, dkk, dkv, *buffers = refs[12:]
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1

    @pl.when(first)
    def _():
        dkk[...], dkv[...] = dfinal_kk[0] / scale, dfinal_kv[0] / scale

    low = k.dtype
    decay, scalars = mosaic_chunk.chunk_scalars(rows, heads, packed, further=1 + gated)
    alpha, beta = scalars[:heads], scalars[heads:]
    Q = each(lambda x: x.astype(jnp.float32), head_columns(q, heads))
    Kt, K, V = gated_tokens(k, v, beta, heads, groups)
    H0, S0 = [kk_before[0, 0, h] for h in range(heads)], [kv_before[0, 0, h] for h in range(heads)]
    dH, dS = [dkk[h] for h in range(heads)], [dkv[h] for h in range(heads)]
    X = [solution[0, 0, h] for h in range(heads)] if plan.num_iter else Q
    query = blend(Q, X, alpha)
    tokens = Tokens(query, K, Kt, V, head_slices(do, heads), head_columns(do, heads))
    of_read = read_write_backward(tokens, S0, dS, decay, low, n=2)
    for h in range(heads):
        dkv[h] = of_read[h].dS
    dV, dquery = [g.dV for g in of_read], [g.dQ for g in of_read]
    of_values = _store(dv, v, dV, beta, scale, groups[1])
    dalpha = each(lambda g, x, q: column_sum(g * (x - q)), dquery, X, Q)

    W = each(jnp.zeros_like, X)
    if plan.num_iter:
        inverse, size, squares = ([norms[0, 0, 0, n + h : n + h + 1, :] for h in range(heads)] for n in (0, heads, 2 * heads))
        dX = each(jnp.multiply, alpha, dquery)
        W = solve(dX, K, Kt, H0, decay, inverse, omegas, Scratch(*buffers), low, plan)
        dquery = each(lambda g, x, w: (g - x) + w, dquery, dX, W)
    store_tokens(dq, dquery, scale)
    of_states = []
    if plan.num_iter and bp_lambda:  # lambda = ridge_strength |H|
        dF = each(lambda w, x: -plan.ridge_strength * column_sum(w * x), W, X)
        of_states.append(norms_backward(dF, inverse, size, squares, K, Kt, H0, decay, low))
    of_states.append(_states_backward(X, each(jnp.negative, W), K, Kt, H0, dH, decay, low))
    sums = each(lambda *heads: [sum(x) for x in zip(*heads, strict=True)], *of_states)
    dK = each(lambda g, s: g.dK + s[0], of_read, sums)
    pairs = each(lambda g, s: g.pairs + s[2], of_read, sums)
    da = each(lambda g, s, p, lost: g.da + s[3] + column_sum(p) - lost, of_read, sums, pairs, sums_of_rows(pairs))
    of_keys = _store(dk, k, dK, beta, scale, groups[0])
    dbeta = each(jnp.add, of_keys, of_values) if gated else []
    mosaic_chunk.store_rows(dscalars, [*da, *dalpha, *dbeta], scale)
    for h in range(heads):
        dkk[h] = sums[h][1]

    @pl.when(last)
    def _():
        dinitial_kk[0], dinitial_kv[0] = scale * dkk[...], scale * dkv[...]
