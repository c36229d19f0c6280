"""Mamba-3's recurrence (arXiv 2603.15569): a trapezoidal rule, rotations that the data chooses, and R inputs and outputs per head.

    theta_t = theta_{t-1} + turn_t,     q'_t = rotate(q_t, theta_t),     k'_t = rotate(k_t, theta_t)
    S_t = e^{g_t} (S_{t-1} + (1 - mix_t) dt_t sum_r k'_{t-1,r} v_{t-1,r}') + mix_t dt_t sum_r k'_{t,r} v_{t,r}'
    o_{t,r} = S_t' q'_{t,r}

R = 1 is SISO. A token's product enters twice, at its own step and at the next one; both then decay alike. So the output is that
of linear attention whose values have the sum of the two weights, but for each token's own product, which has only the first
weight when the token reads it (`own_scale`). R products of a token are R steps of linear attention, of which the first one
decays. So every implementation of linear attention is one of Mamba-3, and a state passes between devices as that of linear
attention does.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.arguments import accumulator, alike, check_options, check_shapes, pick_implementation, segment_index
from kernels_pallas.contract import Mamba3, Mamba3State
from kernels_pallas.linear_attention import IMPLEMENTATIONS as LINEAR_ATTENTION
from kernels_pallas.mamba3.reference import mamba3_reference, mamba3_update
from kernels_pallas.mamba3.rotation import cumulative_angles, rotate

__all__ = ["Mamba3State", "cumulative_angles", "mamba3", "mamba3_inputs", "mamba3_step", "rotate"]


class Mamba3Inputs(NamedTuple):
    """The linear attention (scale 1, R tokens together) that Mamba-3 equals.

    Attributes:
      q, k: [B, T R, H, K], rotated.
      v: [B, T R, Hv, V].
      log_decay: [B, T R, H].
      value_scale: [B, T R, H], the weights with which later tokens read v.
      own_scale: [B, T R, H], the weights with which a token reads its own.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array
    value_scale: jax.Array
    own_scale: jax.Array


def mamba3_inputs(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    now: jax.Array,
    later: jax.Array,
) -> Mamba3Inputs:
    """Returns the linear attention that equals Mamba-3.

    Args:
      q, k: [B, T, R, H, K], rotated.
      v: [B, T, R, Hv, V], Hv a divisor of H.
      log_decay: [B, T, H].
      now: [B, T, H], mix_t dt_t.
      later: [B, T, H], (1 - mix_{t+1}) dt_{t+1}; 0 for the last token, whose state must not have it yet. Where the next token
        is of another segment any value will do: the state is reset, and the token's own output does not depend on it.
    """
    B, T, R, H, _ = q.shape
    first = jnp.zeros((R, 1), log_decay.dtype).at[0].set(1)
    decay = (log_decay[:, :, None] * first).reshape(B, T * R, H)
    both, now = (jnp.repeat(x, R, axis=1) for x in (now + later, now))
    q, k, v = (x.reshape(B, T * R, *x.shape[3:]) for x in (q, k, v))
    return Mamba3Inputs(q, k, v, decay, both, now)


def _by_linear_attention(name: str) -> Mamba3:
    """Returns the implementation of `mamba3` that an implementation of linear attention makes."""

    def run(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        log_decay: jax.Array,
        dt: jax.Array,
        mix: jax.Array,
        turn: jax.Array,
        state: Mamba3State,
        segments: jax.Array | None,
        chunk_size: int | None,
        halves: bool,
    ) -> tuple[jax.Array, Mamba3State]:
        dtype, R = state.S.dtype, q.shape[2]
        log_decay, dt, mix, turn = (x.astype(dtype) for x in (log_decay, dt, mix, turn))
        angle = cumulative_angles(turn, state.angle, segments)
        q, k = (rotate(x, angle[:, :, None], halves) for x in (q, k))
        now, before = mix * dt, (1 - mix) * dt
        later = jnp.pad(before[:, 1:], ((0, 0), (0, 1), (0, 0)))
        x = mamba3_inputs(q, k, v, log_decay, now, later)
        last = jnp.einsum("brhk,brhv->bhkv", state.k, state.v, precision="highest")
        S = state.S + before[:, 0, :, None, None] * last
        rows = None if segments is None else jnp.repeat(segments, R, axis=1)
        o, S = LINEAR_ATTENTION[name](*x, None, S, rows, 1.0, chunk_size, R)
        return o.reshape(v.shape), Mamba3State(angle[:, -1], S, k[:, -1].astype(dtype), v[:, -1].astype(dtype))

    return run


IMPLEMENTATIONS: dict[str, Mamba3] = {
    "reference": mamba3_reference,
    **{name: _by_linear_attention(name) for name in LINEAR_ATTENTION if name != "reference"},
}


def mamba3(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    dt: jax.Array,
    mix: jax.Array,
    turn: jax.Array,
    *,
    halves: bool = False,
    initial_state: Mamba3State | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Mamba3State]:
    """Mamba-3's recurrence.

    Args:
      q, k: [B, T, R, H, K], with their biases, not rotated.
      v: [B, T, R, H, V].
      log_decay: [B, T, H], <= 0.
      dt: [B, T, H], step sizes.
      mix: [B, T, H] in [0, 1], how much of a step's input is its own token's; the rest is the token's before it.
      turn: [B, T, H, A], A <= K / 2: the rotation that each token adds to its and all later tokens, in radians.
      halves: which channels are rotated together, see `rotate`.
      initial_state, segment_ids: as in `linear_attention`.
      chunk_size, implementation: of the linear attention, see there; its tokens are T R.

    Returns:
      o [B, T, R, H, V] in v's dtype and the final state.

    Raises:
      ValueError: a shape does not fit the others, or an option is out of its range; the message names it.
    """
    op = "mamba3"
    d = _dims(op, q, v, turn, "B T R H")
    state = initial_state
    check_shapes(
        op, d, k=(k, "B T R H K"), v=(v, "B T R H V"), log_decay=(log_decay, "B T H"), dt=(dt, "B T H"), mix=(mix, "B T H"),
        turn=(turn, "B T H A"), segment_ids=(segment_ids, "B T"), **({} if state is None else _state_shapes(state)),
    )  # fmt: skip
    check_options(op, chunk_size=chunk_size)
    dtype = accumulator(q, k, v, log_decay, dt, mix, turn)
    if state is None:
        B, R, H, K, V, A = (d[n] for n in "BRHKVA")
        state = Mamba3State._make(jnp.zeros(s, dtype) for s in ((B, H, A), (B, H, K, V), (B, R, H, K), (B, R, H, V)))
    state = jax.tree.map(lambda s: s.astype(dtype), state)
    run = pick_implementation(op, implementation, IMPLEMENTATIONS, q, k, v)
    q, k, v, log_decay, dt, mix, turn, state, segments = alike(
        op, q, k, v, log_decay, dt, mix, turn, state, segment_index(segment_ids)
    )
    return run(q, k, v, log_decay, dt, mix, turn, state, segments, chunk_size, halves)


def mamba3_step(
    q: jax.Array,  # [B, R, H, K]
    k: jax.Array,  # [B, R, H, K]
    v: jax.Array,  # [B, R, H, V]
    log_decay: jax.Array,  # [B, H]
    dt: jax.Array,  # [B, H]
    mix: jax.Array,  # [B, H]
    turn: jax.Array,  # [B, H, A]
    *,
    state: Mamba3State,
    halves: bool = False,
) -> tuple[jax.Array, Mamba3State]:
    """Returns (o [B, R, H, V], the state after one token); the arguments are those of `mamba3` without T.

    Raises:
      ValueError: a shape does not fit the others.
    """
    op = "mamba3_step"
    d = _dims(op, q, v, turn, "B R H")
    check_shapes(
        op, d, k=(k, "B R H K"), v=(v, "B R H V"), log_decay=(log_decay, "B H"), dt=(dt, "B H"), mix=(mix, "B H"),
        turn=(turn, "B H A"), **_state_shapes(state),
    )  # fmt: skip
    dtype = accumulator(q, k, v, log_decay, dt, mix, turn)
    given = alike(op, q, k, v, log_decay, dt, mix, turn, state)
    o, state = mamba3_update(halves, *jax.tree.map(lambda x: x.astype(dtype), given))
    return o.astype(v.dtype), state


def _dims(op: str, q: jax.Array, v: jax.Array, turn: jax.Array, axes: str) -> dict[str, int]:
    """Returns the sizes of `axes`, K, V and A.

    Raises:
      ValueError: q, v or turn has not these axes, there is no token, or more pairs are rotated than there are.
    """
    letters = axes.split()
    if q.ndim != len(letters) + 1 or v.ndim != q.ndim or turn.ndim != len(letters):
        want = ", ".join(letters)
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, v, turn))
        raise ValueError(f"{op}: q and v must be [{want}, D] and turn [{want.replace('R, ', '')}, A], got {shapes}")
    d = dict(zip((*letters, "K"), q.shape, strict=True), V=v.shape[-1], A=turn.shape[-1])
    if d.get("T") == 0:
        raise ValueError(f"{op}: needs at least one token, got T = 0")
    if 2 * d["A"] > d["K"] or d["K"] % 2:
        raise ValueError(f"{op}: turn has {d['A']} angles, q {d['K']} channels; an angle rotates two of an even number of channels")
    return d


def _state_shapes(state: Mamba3State) -> dict[str, tuple[jax.Array | None, str]]:
    """Returns the arrays of a state with their axes, for `check_shapes`."""
    axes = Mamba3State._make(("B H A", "B H K V", "B R H K", "B R H V"))
    return {f"state.{name}": (getattr(state, name), getattr(axes, name)) for name in Mamba3State._fields}
