"""Mamba-3 on a mesh: the angles are summed over the chunks of a row, the rest is linear attention, see `kernels_pallas.mamba3`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybrid_jax.parallel.norms import normed_and_turned
from hybrid_jax.parallel.recurrence import HEADS, STATE, incoming_states, linear_recurrence, recurrence
from hybrid_jax.parallel.sequence import as_chunks, as_rows, from_pair, shift, to_pair
from hybrid_jax.parallel.sharding import TOKENS, axis_size, shard_map_by_axes
from kernels_pallas import angle_sums, mamba3_step
from kernels_pallas.arguments import accumulator, segment_index
from kernels_pallas.heads import repeat_heads
from kernels_pallas.mamba3 import Mamba3State, mamba3_inputs
from kernels_pallas.mamba3.rotation import within_turn
from kernels_pallas.qk_norm_turn import norm_bias


class Norms(NamedTuple):
    """The norms and biases of Mamba-3's queries and keys, as `qk_norm_turn` takes them.

    Attributes:
      q_weight, k_weight: [K].
      q_bias, k_bias: [H, R, K].
      eps: of both norms.
    """

    q_weight: jax.Array
    k_weight: jax.Array
    q_bias: jax.Array
    k_bias: jax.Array
    eps: float


def mamba3_recurrence(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    dt: jax.Array,
    mix: jax.Array,
    rate: jax.Array,
    *,
    norms: Norms,
    skip: jax.Array | None,
    halves: bool,
    state: Mamba3State | None,
    segment_ids: jax.Array,
    implementation: str | None = None,
) -> tuple[jax.Array, Mamba3State | None]:
    """Runs Mamba-3's recurrence, however its arrays are sharded.

    Args:
      q, k, v: [B, T, R, heads, ...], before their norms; each head is that of several heads of H if there are fewer.
      log_decay, dt, mix: [B, T, H], as in `kernels_pallas.mamba3`.
      rate: [B, T, A]; times dt it is the rotation that a token adds.
      norms: of q and k.
      skip: [H], times v it is added to o, or None.
      halves: which channels are rotated together, see `rotate`.
      state: with k and v [B, H, R, ...], or None: from nothing, and no final state where tokens are sharded.
      implementation: of `qk_norm_turn` and `linear_attention`.

    Returns:
      o [B, T, R, H, V] in v's dtype, and the final state.

    Raises:
      NotImplementedError: a state where tokens are sharded over the mesh.
    """
    (B, T, R), H = q.shape[:3], dt.shape[2]
    if state is not None and T == 1:
        return _one_token(q, k, v, (log_decay, dt, mix, rate), norms, skip, halves, state, segment_ids)
    sharded, dtype = axis_size("seq") > 1, accumulator(q, k, v)
    if sharded and state is not None:
        raise NotImplementedError("generation does not shard tokens over the mesh: give a mesh whose 'seq' is 1")
    log_decay, dt, mix, rate = (x.astype(dtype) for x in (log_decay, dt, mix, rate))
    before = (1 - mix) * dt
    arrays, axes = (segment_ids, rate, dt, before), (TOKENS, TOKENS, HEADS, HEADS)
    if sharded:
        angle, later = shard_map_by_axes(_over_chunks, arrays, axes, (HEADS, HEADS))
    else:
        start = None if state is None else state.angle
        angle, later = shard_map_by_axes(_all_tokens, (*arrays, start), (*axes, STATE), (HEADS, HEADS))
    q, k = normed_and_turned(q, k, *norms[:4], angle, norms.eps, halves=halves, implementation=implementation)
    x = mamba3_inputs(q, k, v, log_decay, mix * dt, later)
    S = None
    if state is not None:
        S = state.S + before[:, 0, :, None, None] * jnp.einsum("bhrk,bhrv->bhkv", state.k, state.v, precision="highest")
    o, S = linear_recurrence(
        x[:4],
        value_scale=x.value_scale,
        own_scale=x.own_scale,
        together=R,
        skip=skip,
        state=S,
        segment_ids=jnp.repeat(segment_ids, R, axis=1),
        implementation=implementation,
    )
    o = o.reshape(B, T, R, H, -1)
    if sharded:
        return o, None
    last = (jnp.swapaxes(repeat_heads(x[:, -1], H), 1, 2).astype(dtype) for x in (k, v))
    return o, Mamba3State(angle[:, -1], S, *last)


def _all_tokens(
    segment_ids: jax.Array, rate: jax.Array, dt: jax.Array, before: jax.Array, start: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns each token's angle [B, T, H, A], and `before` of the token after it [B, T, H]; the row's last token has 0."""
    angle, _ = angle_sums(rate, dt, initial_state=start, segment_ids=segment_ids)
    return angle, jnp.pad(before[:, 1:], ((0, 0), (0, 1), (0, 0)))


def _over_chunks(segment_ids: jax.Array, rate: jax.Array, dt: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what `_all_tokens` does, of the chunks that a device has."""
    ids, weights = to_pair(segment_ids), to_pair(before)
    segments = as_chunks(segment_index(as_rows(ids)))  # 0: the segment with which the chunk begins
    angle = as_chunks(angle_sums(*(as_rows(to_pair(x)) for x in (rate, dt)), segment_ids=as_rows(segments))[0])
    one = segments[:, :, -1] == 0
    keeps = jnp.broadcast_to(one[..., None], weights.shape[:2] + weights.shape[3:]).astype(angle.dtype)
    start = incoming_states((keeps, angle[:, :, -1, :, :, None]), ids)[..., 0]
    first = (segments == 0)[..., None, None]
    angle = within_turn(angle + jnp.where(first, start[:, :, None], 0))
    after = shift(weights[:, :, :1], -1)
    return from_pair(angle), from_pair(jnp.concatenate([weights[:, :, 1:], after], axis=2))


def _one_token(q, k, v, scalars, norms: Norms, skip, halves, state, segment_ids) -> tuple[jax.Array, Mamba3State]:
    """Returns what `mamba3_recurrence` does, of one token that continues a state."""
    log_decay, dt, mix, rate = scalars
    q, k = norm_bias(q, norms.q_weight, norms.q_bias, norms.eps), norm_bias(k, norms.k_weight, norms.k_bias, norms.eps)
    v = repeat_heads(v, dt.shape[2])
    arrays = (*(jnp.swapaxes(x, 2, 3) for x in (q, k, v)), log_decay, dt, mix, rate[:, :, None] * dt[..., None])

    def step(q, k, v, *rest, state):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        o, state = mamba3_step(q, k, v, *rest, state=_swapped(state), halves=halves)
        return jnp.swapaxes(o, 1, 2), _swapped(state)

    o, state = recurrence(step, step, None, arrays, state=state, segment_ids=segment_ids)  # of one token: only the step runs
    o = jnp.swapaxes(o, 2, 3)
    return o if skip is None else o + (skip[:, None] * v).astype(o.dtype), state


def _swapped(state: Mamba3State) -> Mamba3State:
    """Returns a state with k and v [B, R, H, ...] for one with [B, H, R, ...], and the other way round."""
    return state._replace(k=jnp.swapaxes(state.k, 1, 2), v=jnp.swapaxes(state.v, 1, 2))
