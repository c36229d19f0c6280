"""What an implementation of an operation receives and returns.

Every operation has one table, `IMPLEMENTATIONS` (and `STEPS` for one token), from names to functions, and one public
function that checks its arguments, fills in the defaults and calls an entry of the table. An entry can therefore count on:

*Names.* `reference` is the recurrence token by token and is what the others are tested against; `xla` is its chunked form,
runs everywhere and takes float64; `pallas_tpu` and `pallas_gpu` are kernels, are never called with float64, and run
interpreted where the backend is another one. `arguments.pick_implementation` chooses by these names.

*Shapes.* q, k are [B, T, H, K], v [B, T, H, V], numbers per head [B, T, H], with T >= 1; all have been checked against
each other. Nothing is padded: an entry pads to its chunk or block itself, and returns what it was given room for.

*Dtypes.* Inputs come as the caller gave them (bfloat16, float32 or float64, also mixed). `state` is never None; it is in
the dtype of sums (`arguments.accumulator`: float32, or float64 if an input is). The output has the dtype of v, unless the
operation says otherwise; the final state has the dtype of `state`.

*Segments.* `segments` is None, or [B, T] int32 that begins with 0 in every row and rises by one where a new sequence
begins (`arguments.segment_index`). The state is reset there; `state` belongs to segment 0.

*Meshes.* All arrays vary over the same axes of a manual mesh (`arguments.alike`), so that loops type-check inside
`jax.shard_map`. No axis is Explicit.

*Gradients.* An entry is differentiable in every array, in the initial and the final state too. The options are Python
values, known when the program is traced, and are passed by position.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax

State = jax.Array  # [B, H, K, V]
States = tuple[jax.Array, jax.Array]  # of Gated KalmaNet: (h_kk [B, H, K, K], h_kv [B, H, K, V])


class Mamba3State(NamedTuple):
    """What Mamba-3 keeps of the tokens so far; all float32 (float64 if an input is).

    Attributes:
      angle: [B, H, A], the sum of the rotations, in [0, 2 pi).
      S: [B, H, K, V].
      k: [B, R, H, K], the last token's rotated keys.
      v: [B, R, H, V], the last token's values.
    """

    angle: jax.Array
    S: jax.Array
    k: jax.Array
    v: jax.Array


class LinearAttention(Protocol):
    """An implementation of `linear_attention`."""

    def __call__(
        self,
        q: jax.Array,  # [B, T, H, K]
        k: jax.Array,  # [B, T, H, K]
        v: jax.Array,  # [B, T, H, V]
        log_decay: jax.Array,  # [B, T, H], at most 0
        state: State,
        segments: jax.Array | None,  # [B, T]
        scale: float,
        chunk_size: int | None,  # None: the implementation's own
        /,
    ) -> tuple[jax.Array, State]:
        """Returns (o [B, T, H, V], the final state)."""
        ...


class LinearAttentionStep(Protocol):
    """An implementation of `linear_attention_step`: as `LinearAttention` without T."""

    def __call__(
        self,
        q: jax.Array,  # [B, H, K]
        k: jax.Array,  # [B, H, K]
        v: jax.Array,  # [B, H, V]
        log_decay: jax.Array,  # [B, H]
        state: State,
        scale: float,
        /,
    ) -> tuple[jax.Array, State]:
        """Returns (o [B, H, V], the state after the token)."""
        ...


class GatedDeltaRule(Protocol):
    """An implementation of `gated_delta_rule`."""

    def __call__(
        self,
        q: jax.Array,  # [B, T, H, K]
        k: jax.Array,  # [B, T, H, K]
        v: jax.Array,  # [B, T, H, V]
        log_decay: jax.Array,  # [B, T, H], at most 0
        beta: jax.Array,  # [B, T, H], in [0, 2]
        state: State,
        segments: jax.Array | None,  # [B, T]
        scale: float,
        chunk_size: int | None,  # None: the implementation's own
        /,
    ) -> tuple[jax.Array, State]:
        """Returns (o [B, T, H, V], the final state)."""
        ...


class GatedDeltaRuleStep(Protocol):
    """An implementation of `gated_delta_rule_step`: as `GatedDeltaRule` without T."""

    def __call__(
        self,
        q: jax.Array,  # [B, H, K]
        k: jax.Array,  # [B, H, K]
        v: jax.Array,  # [B, H, V]
        log_decay: jax.Array,  # [B, H]
        beta: jax.Array,  # [B, H]
        state: State,
        scale: float,
        /,
    ) -> tuple[jax.Array, State]:
        """Returns (o [B, H, V], the state after the token)."""
        ...


class GatedKalmaNet(Protocol):
    """An implementation of `gated_kalmanet`, which documents the options. With precision "accurate" the output is float32."""

    def __call__(
        self,
        q: jax.Array,  # [B, T, H, K]
        k: jax.Array,  # [B, T, H, K]
        v: jax.Array,  # [B, T, H, V]
        alpha: jax.Array,  # [B, T, H]
        log_decay: jax.Array,  # [B, T, H], at most 0
        state: States,
        segments: jax.Array | None,  # [B, T]
        scale: float,
        chunk_size: int | None,  # None: the implementation's own
        ridge_strength: float,
        num_iter: int,
        bp_lambda: bool,
        precision: str,
        solver: str,  # of `gated_kalmanet.solvers.SOLVERS`
        /,
    ) -> tuple[jax.Array, States]:
        """Returns (o [B, T, H, V], the final states)."""
        ...


class GatedKalmaNetStep(Protocol):
    """An implementation of `gated_kalmanet_step`: as `GatedKalmaNet` without T."""

    def __call__(
        self,
        q: jax.Array,  # [B, H, K]
        k: jax.Array,  # [B, H, K]
        v: jax.Array,  # [B, H, V]
        alpha: jax.Array,  # [B, H]
        log_decay: jax.Array,  # [B, H]
        state: States,
        scale: float,
        ridge_strength: float,
        num_iter: int,
        bp_lambda: bool,
        solver: str,  # of `gated_kalmanet.solvers.SOLVERS`
        /,
    ) -> tuple[jax.Array, States]:
        """Returns (o [B, H, V], the states after the token)."""
        ...


class Mamba3(Protocol):
    """An implementation of `mamba3`, which documents the arrays."""

    def __call__(
        self,
        q: jax.Array,  # [B, T, R, H, K]
        k: jax.Array,  # [B, T, R, H, K]
        v: jax.Array,  # [B, T, R, H, V]
        log_decay: jax.Array,  # [B, T, H], at most 0
        dt: jax.Array,  # [B, T, H]
        mix: jax.Array,  # [B, T, H], in [0, 1]
        turn: jax.Array,  # [B, T, H, A]
        state: Mamba3State,
        segments: jax.Array | None,  # [B, T]
        chunk_size: int | None,  # None: the implementation's own
        halves: bool,
        /,
    ) -> tuple[jax.Array, Mamba3State]:
        """Returns (o [B, T, R, H, V], the final state)."""
        ...


class ShortConv(Protocol):
    """An implementation of `short_conv`, with the activation. It computes in x's dtype; the sum of the taps is float32."""

    def __call__(
        self,
        x: jax.Array,  # [B, T, D]
        weight: jax.Array,  # [D, W]
        bias: jax.Array,  # [D]
        state: jax.Array,  # [B, W - 1, D], in x's dtype
        segments: jax.Array | None,  # [B, T]
        activation: str | None,  # "silu" or None
        /,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (y [B, T, D], the state after the tokens: the last W - 1 inputs, those of earlier segments as 0)."""
        ...
