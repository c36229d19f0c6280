"""Options of the mixers with attention's projections, Gated KalmaNet and Gated DeltaNet, and what the two share.

Like `hybrid_jax.mixers`, which has the table of all mixers, this module imports no array library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from hybrid_jax.checks import check_boolean
from hybrid_jax.options import EPSILON, MixerOptions, choice, integer, number, option, optional


@dataclasses.dataclass(frozen=True)
class HeadsOptions(MixerOptions):
    """Base class of the options of mixers that project to queries, keys and values: their heads, and how keys and values get them.

    A key or value head x serves several queries' heads. It is repeated for them or, with a rank r, expanded to all heads:
    repeat(x) + B SiLU(A x), where x has the channels of all its heads side by side, behind the convolution and in front of the L2
    norm of keys; A maps them to r numbers, and B, which begins at 0, to the channels of all H heads.

    Args:
      state_size: channels of keys and queries, so that a head's state is [state_size, head_dim]; null: head_dim. Conversion copies
        the keys and queries of attention only where the two are equal, and otherwise draws them anew. The option is ours; it is
        exported only if it is set.
      key_heads, value_heads, value_size: how many heads queries and keys have; how many values, gates and states have, a multiple
        of it; channels of values. All three or, where the heads are attention's, none. A source family that has the mixer itself
        (Qwen3-Next) sets them. The options are ours; they are exported only if they are set.
      kv_proj_rank: the rank r of the expansion of keys, and of that of values; null: heads are only repeated. Larger ranks have
        more parameters, r times the channels before and behind. It needs fewer key heads than queries (or values) have.
      kv_learnable_residual: with a rank, repeat(x) is a learned mixture of heads, which begins as the repetition: matrices of
        [H, heads of x].
    """

    REPEATED: ClassVar[frozenset[str]] = frozenset({"hidden_size", "head_dim", "num_q_heads", "num_k_heads", "num_v_heads"})
    # The plugin also gives a `norm_eps` that is present to the block norms, which are trained with rms_norm_eps.
    ONLY_IF_CHANGED: ClassVar[frozenset[str]] = frozenset({"norm_eps", "state_size", "key_heads", "value_heads", "value_size"})

    state_size: int | None = option(optional(integer()), None)
    key_heads: int | None = option(optional(integer()), None)
    value_heads: int | None = option(optional(integer()), None)
    value_size: int | None = option(optional(integer()), None)
    kv_proj_rank: int | None = option(optional(integer(1, 2**16)), None)
    kv_learnable_residual: bool = option(check_boolean, False)

    def __post_init__(self):
        super().__post_init__()
        own = (self.key_heads, self.value_heads, self.value_size)
        if own.count(None) not in (0, 3):
            raise ValueError(f"{self.KEY}.key_heads, value_heads and value_size are given together, got {own}")
        if self.key_heads and self.value_heads and self.value_heads % self.key_heads:
            raise ValueError(f"{self.KEY}.value_heads ({self.value_heads}) must be a multiple of key_heads ({self.key_heads})")
        if self.kv_learnable_residual and self.kv_proj_rank is None:
            raise ValueError(f"{self.KEY}.kv_learnable_residual = true has no effect without kv_proj_rank; give both, or neither")

    @property
    def own_heads(self) -> int | None:
        return self.value_heads

    def sharded_widths(self, num_heads: int, num_kv_heads: int, head_dim: int) -> Mapping[str, int]:
        if self.key_heads is None or self.value_heads is None:
            return {}
        mixer = self.KEY.removesuffix("_config")
        return {f"{mixer}.k_proj": self.key_heads * (self.state_size or head_dim), f"{mixer}.b_proj": self.value_heads}

    def check_heads(self, num_heads: int, num_kv_heads: int) -> None:
        heads, key_heads = self.value_heads or num_heads, self.key_heads or num_kv_heads
        if self.kv_proj_rank is not None and heads == key_heads:
            raise ValueError(
                f"{self.KEY}.kv_proj_rank = {self.kv_proj_rank} expands key heads to more heads, but both are {heads}; leave it out"
            )


@dataclasses.dataclass(frozen=True)
class GKAConfig(HeadsOptions):
    """Options of Gated KalmaNet (arXiv 2511.21016), named as in hybrid-model-factory's `gka_config`.

    For each head the mixer keeps two states, H (of keys and keys) and U (of keys and values), in float32:

        H <- e^g H + k k^T     U <- e^g U + k v^T     x = approximately (H + lambda I)^-1 q     o = U^T x

    where lambda = ridge_strength * |H|_F, and x is mixed with q by alpha (see `use_alpha_connection`).

    Args beside those of `HeadsOptions`:
      num_iter: number of Chebyshev iterations of the solve (see `solver` for `cg`). 0 skips the solve, which leaves gated
        linear attention. More iterations are slower and more exact; 30 is the published setting.
      ridge_strength: the `a` of the paper's lambda = a * |H|_F. It bounds the condition number of the solve by
        (1 + a) / a, so a larger value converges in fewer iterations and remembers less exactly. It is relative to |H|_F
        because the scale of H depends on the data, on the decay and on the position in the document: a fixed lambda would
        dominate at the start of a document, when H is small, and vanish later.
      chunk_size: tokens that a kernel processes at a time. It changes speed and memory, not the result.
      conv_size: width of the causal convolutions of q, k and v, in tokens.
      norm_eps: epsilon of the RMSNorm of the output.
      gla_rescale: multiply the readout of U by 1 / sqrt(state_size), as attention scales its scores.
      use_alpha_connection: mix x and q with alpha = sigmoid(alpha_proj u), per head and token; without it only the
        solution x is used.
      use_beta_gate: multiply k and v by beta = sigmoid(b_proj u), per head and token, so that a token can be kept out of
        the states.
      use_forgetting_gate: decay the states with g = -exp(A_log) softplus(a_proj u + dt_bias); without it nothing is
        forgotten (g = 0). The gate's parameters exist in either case, as in released checkpoints.
      use_forgetting_gate_kk: decay H too. False is supported only without the solve (`num_iter` 0), where H is unused.
      use_gate: multiply the normed output by SiLU(g_proj u).
      use_v_conv: apply the convolution and SiLU to v; without it v is the bare projection.
      bp_lambda: propagate gradients through lambda, that is, through |H|_F. False treats it as a constant.
      precision: of the solve in the TPU kernel: `fast` is within 2e-3 of float64 for bf16 inputs, `accurate` within
        2e-5 and about 1.5 times slower. Other kernels always solve in float32. The option is ours; it is exported
        only if it is not `fast`.
      solver: of the equation of x: `chebyshev`, the one of released checkpoints, or `cg`, conjugate gradients, which reach the
        same exactness with 3/5 of the iterations and run so many (18 for `num_iter` 30, rounded up). The TPU kernel is about a
        quarter faster with `cg`. The two differ by less than the solve's own error only while x is nearly exact: below
        `num_iter` 27 keep the solver a model was trained with. The option is ours; it is exported only if it is not
        `chebyshev`, and `solver_type`, by which the plug-in solves, always says `chebyshev`.
    """

    KEY: ClassVar[str] = "gka_config"
    FIXED: ClassVar[Mapping[str, Any]] = {"solver_type": "chebyshev", "conv_bias": False, "num_sketches_per_head": 1}
    STATED: ClassVar[Mapping[str, Any]] = {"solver_type": "chebyshev"}
    ONLY_IF_CHANGED: ClassVar[frozenset[str]] = HeadsOptions.ONLY_IF_CHANGED | {"precision", "solver"}

    num_iter: int = option(integer(0, 10_000), 30)
    ridge_strength: float = option(number(minimum=0), 0.02)
    chunk_size: int = option(integer(1, 2**16), 64)
    conv_size: int = option(integer(1, 1024), 4)
    norm_eps: float = option(EPSILON, 1e-6)
    gla_rescale: bool = option(check_boolean, True)
    use_alpha_connection: bool = option(check_boolean, True)
    use_beta_gate: bool = option(check_boolean, True)
    use_forgetting_gate: bool = option(check_boolean, True)
    use_forgetting_gate_kk: bool = option(check_boolean, True)
    use_gate: bool = option(check_boolean, True)
    use_v_conv: bool = option(check_boolean, True)
    bp_lambda: bool = option(check_boolean, True)
    precision: str = option(choice("fast", "accurate"), "fast")
    solver: str = option(choice("chebyshev", "cg"), "chebyshev")

    def __post_init__(self):
        super().__post_init__()
        if not self.use_forgetting_gate_kk and self.num_iter:
            raise ValueError("gka_config.use_forgetting_gate_kk = false is supported only without the solve, with num_iter = 0")
        if self.solver == "cg" and self.ridge_strength < 1e-4:
            raise ValueError(f"gka_config.solver = 'cg' needs a ridge_strength of at least 1e-4, got {self.ridge_strength}")


@dataclasses.dataclass(frozen=True)
class GDNConfig(HeadsOptions):
    """Options of Gated DeltaNet (arXiv 2412.06464), named as in hybrid-model-factory's `gdn_config`.

    For each head:  S <- e^g S;  S <- S + beta k (v - S^T k)^T;  o = S^T q / sqrt(head_dim).

    Args beside those of `HeadsOptions`:
      conv_size: width of the causal convolutions of q, k and v, in tokens.
      conv_bias: give the convolutions a bias. Only for checkpoints that have one.
      norm_eps: epsilon of the RMSNorm of the output.
      allow_neg_eigval: beta = 2 sigmoid(.) instead of sigmoid(.), so that I - beta k k^T can have the eigenvalue -1 and
        a state can flip sign, which state tracking (parity, counting) needs.
      use_gate: multiply the normed output by SiLU(g_proj u).
      use_short_conv: apply the convolutions; without them q, k, v = SiLU(projection).
    """

    KEY: ClassVar[str] = "gdn_config"

    conv_size: int = option(integer(1, 1024), 4)
    conv_bias: bool = option(check_boolean, False)
    norm_eps: float = option(EPSILON, 1e-5)
    allow_neg_eigval: bool = option(check_boolean, False)
    use_gate: bool = option(check_boolean, True)
    use_short_conv: bool = option(check_boolean, True)
