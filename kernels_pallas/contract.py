"""What an implementation of an operation receives and returns.

Every operation has one table, `IMPLEMENTATIONS` (and `STEPS` for one token), from names to functions, and one public
function that checks its arguments, fills in the defaults and calls an entry of the table. An entry can therefore count on:

*Names.* `reference` is the recurrence token by token and is what the others are tested against; `xla` is its chunked form,
runs everywhere and takes float64; `pallas_tpu` and `pallas_gpu` are kernels, are never called with float64, and run
interpreted where the backend is another one. `arguments.pick_implementation` chooses by these names.

*Shapes.* q is [B, T, H, K], k [B, T, Hk, K], v [B, T, Hv, V], numbers per head [B, T, H], with T >= 1; all have been checked
against each other. Hk and Hv are divisors of H, and head h reads head h // (H / Hk) of k; `heads.with_groups` makes such an
implementation from one for Hk = Hv = H, as those of one token are. Nothing is padded: an entry pads to
its chunk or block itself, and returns what it was given room for.

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

from typing import Literal, NamedTuple, Protocol

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
    """An implementation of `linear_attention`; `linear_attention.composed` makes one from a `PlainLinearAttention`."""

    def __call__(
        self,
        q: jax.Array,  # [B, T, H, K]
        k: jax.Array,  # [B, T, Hk, K]
        v: jax.Array,  # [B, T, Hv, V]
        log_decay: jax.Array,  # [B, T, H], at most 0
        value_scale: jax.Array | None,  # [B, T, H]; None: 1
        own_scale: jax.Array | None,  # [B, T, H]; None: value_scale
        skip: jax.Array | None,  # [H]; None: 0
        state: State,
        segments: jax.Array | None,  # [B, T]
        scale: float,
        chunk_size: int | None,  # None: the implementation's own
        together: int,  # 1 without own_scale; a divisor of T
        /,
    ) -> tuple[jax.Array, State]:
        """Returns (o [B, T, H, V], the final state)."""
        ...


class PlainLinearAttention(Protocol):
    """A `LinearAttention` for Hk = Hv = H, without `value_scale`, `own_scale` and `skip`."""

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
        k: jax.Array,  # [B, T, Hk, K]
        v: jax.Array,  # [B, T, Hv, V]
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
    """An implementation of `gated_kalmanet`, which documents the options. With precision "accurate" the output is float32.

    `gated_kalmanet.composed` makes one from a `PlainGatedKalmaNet`.
    """

    def __call__(
        self,
        q: jax.Array,  # [B, T, H, K]
        k: jax.Array,  # [B, T, Hk, K]
        v: jax.Array,  # [B, T, Hv, V]
        alpha: jax.Array,  # [B, T, H]
        log_decay: jax.Array,  # [B, T, H], at most 0
        beta: jax.Array | None,  # [B, T, H]; None: 1
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


class PlainGatedKalmaNet(Protocol):
    """A `GatedKalmaNet` for Hk = Hv = H, without `beta`."""

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


class HeadNorm(NamedTuple):
    """A norm of each head, `dim` channels side by side, that `short_conv` also computes.

    Attributes:
      kind: "l2": the outputs, behind the activation, become y / sqrt(|y|^2 + eps); "rms": the inputs, before the convolution,
        become x / sqrt(mean(x^2) + eps), times a weight; the convolution's state then has normed inputs.
      dim: channels per head.
      eps: above 0.
      eps_outside: of "l2" only: y / (|y| + eps) instead.
    """

    kind: Literal["l2", "rms"]
    dim: int
    eps: float = 1e-6
    eps_outside: bool = False


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
        norm: HeadNorm | None,
        norm_weight: jax.Array | None,  # [dim of the norm], only where its kind is "rms", and then never None
        /,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (y [B, T, D], the state after the tokens: the last W - 1 inputs, those of earlier segments as 0)."""
        ...


class GatedRMSNorm(Protocol):
    """An implementation of `gated_rms_norm`. Its sums are float32, and float64 where o is."""

    def __call__(
        self,
        o: jax.Array,  # [B, T, H, D]
        gate: jax.Array,  # [B, T, H, D]
        weight: jax.Array,  # [D] or [H, D]
        eps: float,
        gate_first: bool,
        /,
    ) -> jax.Array:
        """Returns y [B, T, H, D] in o's dtype."""
        ...


class RMSNorm(Protocol):
    """An implementation of `rms_norm`. Its sums are float32, and float64 where x is."""

    def __call__(
        self,
        x: jax.Array,  # [..., D]
        weight: jax.Array | None,  # [D]
        residual: jax.Array | None,  # as x, also in dtype
        eps: float,
        /,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (y [..., D], x + residual, or x without a residual), both in x's dtype."""
        ...


class NormRope(Protocol):
    """An implementation of `qk_norm_rope`, which calls it for the queries and for the keys."""

    def __call__(
        self,
        x: jax.Array,  # [B, T, H, D]
        weight: jax.Array | None,  # [D]
        cos: jax.Array,  # [B, T, R / 2]
        sin: jax.Array,  # [B, T, R / 2]
        eps: float,
        scale: float,
        /,
    ) -> jax.Array:
        """Returns y [B, H, T, D] in x's dtype."""
        ...


class NormTurn(Protocol):
    """An implementation of `qk_norm_turn`, which documents the arrays."""

    def __call__(
        self,
        q: jax.Array,  # [B, T, R, Hq, K]
        k: jax.Array,  # [B, T, R, Hk, K]
        q_weight: jax.Array,  # [K]
        k_weight: jax.Array,  # [K]
        q_bias: jax.Array,  # [H, R, K]
        k_bias: jax.Array,  # [H, R, K]
        angle: jax.Array,  # [B, T, H, A]
        eps: float,
        halves: bool,
        /,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (q, k) [B, T, R, H, K], in their dtypes."""
        ...


class AngleSums(Protocol):
    """An implementation of `angle_sums`. Its inputs and its output are float32, and float64 where an input of the operation is."""

    def __call__(
        self,
        rate: jax.Array,  # [B, T, A]
        dt: jax.Array,  # [B, T, H]
        state: jax.Array,  # [B, H, A]
        segments: jax.Array | None,  # [B, T]
        /,
    ) -> jax.Array:
        """Returns the angles [B, T, H, A], about [0, 2 pi)."""
        ...
