"""The table of mixer kinds, and the options of each.

`KINDS` is the only list of mixers: the pattern language, config.json, checkpoints, metrics and tests read it. To add a
mixer, write its options class and its row here, and its layer class and row in `hybrid_jax.layers`. Options that several mixers
share are in `hybrid_jax.recurrent_options`. This module imports no array library, so that `--help` stays fast.

The attributes of an options class in capitals describe the mixer's dict in hybrid-model-factory's config.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from hybrid_jax.checks import check_boolean, check_choice
from hybrid_jax.options import EPSILON, Check, MixerOptions, choice, integer, number, option, optional
from hybrid_jax.recurrent_options import GDNConfig, GKAConfig

ATTENTION = "attention"


@dataclasses.dataclass(frozen=True)
class Mamba2Config(MixerOptions):
    """Options of Mamba-2 (arXiv 2405.21060), named as in hybrid-model-factory's `mamba2_config`.

    Args:
      use_qk_norm: norm C and B, which take the place of queries and keys, with the source's query and key norms. It
        means nothing where the source norms neither.
      state_size: channels of B and C, so that a head's state is [state_size, head_dim]; null: head_dim. Conversion copies
        keys and queries to them only where the two are equal, and otherwise draws them anew. The option is ours; it is
        exported only if it is set.
    """

    KEY: ClassVar[str] = "mamba2_config"
    REPEATED: ClassVar[frozenset[str]] = frozenset(
        {"d_model", "d_inner", "d_xb", "intermediate_size", "hidden_act", "rms_norm_eps", "n_layer", "ssm_cfg"}
    )
    FIXED: ClassVar[Mapping[str, Any]] = {
        "use_pos_emb": False, "use_pos_embed": False, "use_rotary_emb": False, "d_conv": 4, "use_conv_bias": True,
        "use_bias": False, "xb_proj_rank": None, "xb_proj_activation": False, "xb_learnable_residual": False,
    }  # fmt: skip
    FREE: ClassVar[Mapping[str, Check]] = {"chunk_size": integer()}
    STATED: ClassVar[Mapping[str, Any]] = {
        "d_conv": 4, "use_conv_bias": True, "use_bias": False, "use_pos_emb": False, "chunk_size": 256,
    }  # fmt: skip
    ONLY_WITH_QK_NORM: ClassVar[frozenset[str]] = frozenset({"use_qk_norm"})

    ONLY_IF_CHANGED: ClassVar[frozenset[str]] = frozenset({"state_size"})

    use_qk_norm: bool = option(check_boolean, True)
    state_size: int | None = option(optional(integer()), None)


@dataclasses.dataclass(frozen=True)
class DiscreteMamba2Config(MixerOptions):
    """Options of Discrete Mamba-2, MOHAWK's student (arXiv 2408.10189). The key and the options are ours.

    For each head, with g = -softplus(a):  S <- e^g S + B x^T;  y = S^T C + D x;  the output is out_proj(y SiLU(z + z_bias)).

    Args:
      state_size: channels of B and C, so that a head's state is [state_size, head_dim]; null: head_dim. Conversion copies keys and
        queries of attention only where the two are equal, and otherwise draws them anew.
      qk_heads: how many heads B and C have, a divisor of the number of query heads, which x has; null: as many.
      conv_size: width of the causal convolution of x, B and C, in tokens.
      conv_bias: give the convolution a bias.
      conv_activation: apply SiLU behind the convolution. The released models do not.
      bias: give in_proj and out_proj biases, in place of z_bias (as the hybrids of arXiv 2602.11374 have); z is then drawn too.
    """

    KEY: ClassVar[str] = "discrete_mamba2_config"
    DIVIDE_HEADS: ClassVar[frozenset[str]] = frozenset({"qk_heads"})

    state_size: int | None = option(optional(integer()), None)
    qk_heads: int | None = option(optional(integer()), None)
    conv_size: int = option(integer(1, 1024), 4)
    conv_bias: bool = option(check_boolean, True)
    conv_activation: bool = option(check_boolean, False)
    bias: bool = option(check_boolean, False)

    def sizes(self, num_heads: int, head_dim: int) -> tuple[int, ...]:
        """Returns the widths of x, B, C, z and a in in_proj, in the released order."""
        inner, keys = num_heads * head_dim, (self.qk_heads or num_heads) * (self.state_size or head_dim)
        return (inner, keys, keys, inner, num_heads)

    def sharded_widths(self, num_heads: int, num_kv_heads: int, head_dim: int) -> Mapping[str, int]:
        return {"discrete_mamba2.in_proj": self.sizes(num_heads, head_dim)[1]}


@dataclasses.dataclass(frozen=True)
class Mamba3Config(MixerOptions):
    """Options of Mamba-3 (arXiv 2603.15569). hybrid-model-factory has no such mixer; the key and the options are ours.

    For each head, with B, C of `rank` vectors and an angle theta per pair of channels that grows by pi tanh(angle) dt:

        S <- e^{A dt} (S + (1 - trap) dt B'_{t-1} x_{t-1}') + trap dt B' x'     y = S' C'     B' = rotate(norm(B) + bias, theta)

    Args:
      state_size: channels of B and C, so that a head's state is [state_size, head_dim]. null: head_dim, which conversion
        from attention needs in order to copy keys and queries; another size draws them anew.
      rank: inputs and outputs per head and token (the paper's R); 1 is SISO, more is MIMO.
      rope_fraction: share of the channels of B and C that are rotated; 0: none.
      rotate_halves: rotate channel j together with j + state_size / 2, as the released MIMO kernel does, and not 2j with
        2j + 1, as the released SISO kernel does.
      out_norm: apply an RMSNorm to the output of every head before the gate. The released model has none; a hybrid needs it,
        because dt makes the output small beside attention's.
      norm_eps: epsilon of the RMSNorms of B, C and the output.
      decay_floor: the least that -A may be.
      dt_min, dt_max: range of dt in a new mixer, log-uniform by head, in [1e-4, 1]. A pair of channels turns by at most pi dt
        per token, and the state decays by A dt: the published range suits language. State tracking from scratch learns sooner
        with [0.1, 1], because parity needs turns of pi.
      groups: how many heads B and C have, a divisor of the number of query heads (the released model has 1); null: as many as keys
        and queries of attention, which conversion needs in order to copy them.
      norm_per_head: every head has weights of its own in the output norm, as in the released model.
    """

    KEY: ClassVar[str] = "mamba3_config"
    ONLY_IF_CHANGED: ClassVar[frozenset[str]] = frozenset({"groups", "norm_per_head"})
    DIVIDE_HEADS: ClassVar[frozenset[str]] = frozenset({"groups"})

    state_size: int | None = option(optional(integer(2)), None)
    rank: int = option(integer(1, 64), 1)
    rope_fraction: float = option(number(minimum=0, maximum=1), 0.5)
    rotate_halves: bool = option(check_boolean, False)
    out_norm: bool = option(check_boolean, True)
    norm_eps: float = option(EPSILON, 1e-5)
    decay_floor: float = option(number(above=0), 1e-4)
    dt_min: float = option(number(minimum=1e-4, maximum=1), 1e-3)
    dt_max: float = option(number(minimum=1e-4, maximum=1), 0.1)
    groups: int | None = option(optional(integer()), None)
    norm_per_head: bool = option(check_boolean, False)

    def __post_init__(self):
        super().__post_init__()
        if self.dt_min > self.dt_max:
            raise ValueError(f"mamba3_config.dt_min must be at most dt_max, got {self.dt_min} and {self.dt_max}")
        if (self.state_size or 0) % 2:
            raise ValueError(f"mamba3_config.state_size must be even, because channels rotate in pairs, got {self.state_size}")

    def angles(self, state_size: int) -> int:
        """Returns how many pairs of the channels of B and C are rotated."""
        return int(state_size * self.rope_fraction) // 2

    def sizes(self, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """Returns the widths of z, x, B, C, dt, A, trap and angle in in_proj, in the released order."""
        H, Hkv, N = num_heads, num_kv_heads, self.state_size or head_dim
        G, RN = self.groups, self.rank * N
        return (H * head_dim, Hkv * head_dim, (G or Hkv) * RN, (G or H) * RN, H, H, H, self.angles(N))

    def sharded_widths(self, num_heads: int, num_kv_heads: int, head_dim: int) -> Mapping[str, int]:
        return {"mamba3.in_proj": sum(self.sizes(num_heads, num_kv_heads, head_dim))}


@dataclasses.dataclass(frozen=True)
class SWAConfig(MixerOptions):
    """Options of sliding-window attention.

    Args:
      window_size: query i sees the keys j with 0 <= i - j < window_size. A larger window costs memory and time in
        proportion. The cache of a layer holds window_size - 1 tokens. A layer that has a shorter window in the source keeps it.
    """

    KEY: ClassVar[str] = "swa_config"

    window_size: int = option(integer(), 2048)

    @property
    def window(self) -> int:
        return self.window_size


def _check_recurrent(name: str, value: Any) -> str:
    return check_choice(name, value, [kind for kind, row in KINDS.items() if row.recurrent and not row.attends])


@dataclasses.dataclass(frozen=True)
class BMojoConfig(MixerOptions):
    """Options of B'MOJO-F (arXiv 2407.06324): one softmax over a window of keys and a window of keys made by a mixer.

    Args:
      window_size: length of each of the two windows, in tokens.
      ssm_mixer: the kind of the mixer that makes the second window's keys and values; its own options apply.
      tie_attn_weights: use one set of query, key and value projections for both windows. False gives the second window
        its own set.
    """

    KEY: ClassVar[str] = "bmojo_config"
    REPEATED: ClassVar[frozenset[str]] = frozenset(
        {"hidden_size", "head_dim", "num_heads", "num_key_value_heads", "rms_norm_eps", "use_qk_norm"}
    )

    window_size: int = option(integer(), 2048)
    ssm_mixer: str = option(_check_recurrent, "mamba2")
    tie_attn_weights: bool = option(check_boolean, True)

    @property
    def inner(self) -> tuple[str, ...]:
        return (self.ssm_mixer,)

    @property
    def window(self) -> int:
        return 2 * self.window_size


@dataclasses.dataclass(frozen=True)
class HeadHybridConfig(MixerOptions):
    """Options of layers in which some heads stay attention beside a recurrent mixer (`GDN[3,17]`; arXiv 2602.11374).

    The recurrent mixer keeps all its heads. a is the output of the kept heads with their part of attention's output
    projection, y that of the recurrent mixer, both [hidden] per token.

    Args:
      merge: how the two are merged. `standardized`, as published: a is standardized over its channels and given y's mean and
        standard deviation, then (y + linear(a)) / 2, with a new linear map of [hidden, hidden] and a bias. `sum`, ours: y + a,
        which is attention and recurrent heads side by side in front of one output projection; conversion from attention then
        begins with the recurrent mixer's own output of the kept heads at 0, so that no head counts twice.
    """

    KEY: ClassVar[str] = "head_hybrid_config"

    merge: str = option(choice("standardized", "sum"), "standardized")


@dataclasses.dataclass(frozen=True)
class MixerKind:
    """One row of `KINDS`: what the project knows of a mixer kind without its layer.

    Args:
      symbol: its name in patterns; upper-case letters and digits.
      parameter_key: the name of its module in a checkpoint, `layers.N.PARAMETER_KEY.*`.
      options: its options class; None if it has none.
      attends: it attends to earlier keys, which rotate by position, so a model with it is limited to
        `max_position_embeddings` tokens.
      recurrent: it keeps a state of fixed size.
      output: the linear map behind its heads, by its path in the module; its input is the heads' outputs side by side.
    """

    symbol: str
    parameter_key: str
    options: type[MixerOptions] | None = None
    attends: bool = False
    recurrent: bool = True
    output: str = "o_proj"


KINDS: dict[str, MixerKind] = {
    ATTENTION: MixerKind("*", "self_attn", attends=True, recurrent=False),
    "gka": MixerKind("GKA", "gka", GKAConfig),
    "gdn": MixerKind("GDN", "gdn", GDNConfig),
    "mamba2": MixerKind("M2", "mamba", Mamba2Config, output="out_proj"),
    "discrete_mamba2": MixerKind("DM2", "discrete_mamba2", DiscreteMamba2Config, output="out_proj"),
    "mamba3": MixerKind("M3", "mamba3", Mamba3Config, output="out_proj"),
    "swa": MixerKind("SWA", "swa", SWAConfig, attends=True, recurrent=False),
    "bmojo": MixerKind("BMF", "bmojo_f", BMojoConfig, attends=True, output="bmojo_attn.o_proj"),
}


def kinds_by_symbol() -> dict[str, str]:
    """Returns pattern symbol -> mixer kind."""
    return {row.symbol: kind for kind, row in KINDS.items()}


def mixer_symbols() -> list[str]:
    """Returns the pattern symbols of all mixers, attention first."""
    return [row.symbol for row in KINDS.values()]


def options_by_key() -> dict[str, type[MixerOptions]]:
    """Returns key of config.json (`gka_config`, ...) -> the options class that it describes, in the order of `KINDS`."""
    classes = [row.options for row in KINDS.values() if row.options is not None]
    return {cls.KEY: cls for cls in (*classes, HeadHybridConfig)}
