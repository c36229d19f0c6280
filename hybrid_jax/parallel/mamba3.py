"""Mamba-3 on a mesh: the angles are summed over the chunks of a row, the rest is linear attention, see `kernels_pallas.mamba3`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from hybrid_jax.parallel.recurrence import HEADS, incoming_states, linear_recurrence, recurrence
from hybrid_jax.parallel.sequence import as_chunks, as_rows, from_pair, shift, to_pair
from hybrid_jax.parallel.sharding import TOKENS, axis_size, shard_map_by_axes
from kernels_pallas import mamba3, mamba3_step
from kernels_pallas.arguments import segment_index
from kernels_pallas.mamba3 import Mamba3State, cumulative_angles, mamba3_inputs, mamba3_output, rotate
from kernels_pallas.mamba3.rotation import within_turn


def mamba3_recurrence(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    dt: jax.Array,
    mix: jax.Array,
    turn: jax.Array,
    *,
    halves: bool,
    state: Mamba3State | None,
    segment_ids: jax.Array,
    implementation: str | None = None,
) -> tuple[jax.Array, Mamba3State | None]:
    """Runs Mamba-3's recurrence, however its arrays are sharded.

    Args:
      q, k, v: [B, T, H, R, ...]; they and the others as in `kernels_pallas.mamba3`.
      halves: which channels are rotated together, see `rotate`.
      state: with k and v [B, H, R, ...], or None: from nothing, and no final state where tokens are sharded.

    Returns:
      o [B, T, H, R, V] in v's dtype, and the final state.

    Raises:
      NotImplementedError: a state where tokens are sharded over the mesh.
    """
    arrays = (q, k, v, log_decay, dt, mix, turn)
    if axis_size("seq") == 1:
        op = functools.partial(_all_tokens, halves=halves, implementation=implementation)
        step = functools.partial(_one_token, halves=halves)
        return recurrence(op, step, None, arrays, state=state, segment_ids=segment_ids)
    if state is not None:
        raise NotImplementedError("generation does not shard tokens over the mesh: give a mesh whose 'seq' is 1")
    f32, R = jnp.float32, q.shape[3]
    log_decay, dt, mix, turn = (x.astype(f32) for x in (log_decay, dt, mix, turn))
    before = (1 - mix) * dt
    angle, later = shard_map_by_axes(_over_chunks, (segment_ids, turn, before), (TOKENS, HEADS, HEADS), (HEADS, HEADS))
    q, k = (rotate(jnp.swapaxes(x, 2, 3), angle[:, :, None], halves) for x in (q, k))
    v = jnp.swapaxes(v, 2, 3)
    x = mamba3_inputs(q, k, v, log_decay, mix * dt, later)
    rows = jnp.repeat(segment_ids, R, axis=1)
    o, _ = linear_recurrence((x.q, x.k, x.v, x.log_decay), state=None, segment_ids=rows, implementation=implementation)
    return jnp.swapaxes(mamba3_output(o, q, k, v, x.own), 2, 3), None


def _over_chunks(segment_ids: jax.Array, turn: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns each token's angle [B, T, H, A], and `before` of the token after it [B, T, H]; the row's last token has 0."""
    ids, weights = to_pair(segment_ids), to_pair(before)
    segments = as_chunks(segment_index(as_rows(ids)))  # 0: the segment with which the chunk begins
    angle = as_chunks(cumulative_angles(as_rows(to_pair(turn)), None, as_rows(segments)))
    one = segments[:, :, -1] == 0
    keeps = jnp.broadcast_to(one[..., None], weights.shape[:2] + weights.shape[3:]).astype(angle.dtype)
    start = incoming_states((keeps, angle[:, :, -1, :, :, None]), ids)[..., 0]
    first = (segments == 0)[..., None, None]
    angle = within_turn(angle + jnp.where(first, start[:, :, None], 0))
    after = shift(weights[:, :, :1], -1)
    return from_pair(angle), from_pair(jnp.concatenate([weights[:, :, 1:], after], axis=2))


def _all_tokens(*arrays, initial_state, segment_ids, halves, implementation):
    state = None if initial_state is None else _swapped(initial_state)
    q, k, v, *rest = arrays
    q, k, v = (jnp.swapaxes(x, 2, 3) for x in (q, k, v))
    options = dict(halves=halves, implementation=implementation)
    o, state = mamba3(q, k, v, *rest, initial_state=state, segment_ids=segment_ids, **options)
    return jnp.swapaxes(o, 2, 3), _swapped(state)


def _one_token(*arrays, state, halves):
    q, k, v, *rest = arrays
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    o, state = mamba3_step(q, k, v, *rest, state=_swapped(state), halves=halves)
    return jnp.swapaxes(o, 1, 2), _swapped(state)


def _swapped(state: Mamba3State) -> Mamba3State:
    """Returns a state with k and v [B, R, H, ...] for one with [B, H, R, ...], and the other way round."""
    return state._replace(k=jnp.swapaxes(state.k, 1, 2), v=jnp.swapaxes(state.v, 1, 2))
