"""The Gated KalmaNet mixer (arXiv 2511.21016), parameters named as in hybrid-model-factory."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hybrid_jax.config import GKAConfig, ModelConfig
from hybrid_jax.layers.linear import Linear, RMSNorm, products
from hybrid_jax.layers.mixer import Arrays
from hybrid_jax.layers.mixing import Mixing, of_operation
from hybrid_jax.layers.recurrent import (
    STATE_AXES,
    ExpandedHeads,
    HeadSizes,
    ShortConv,
    init_a_log,
    init_dt_bias,
    log_decay,
    projections_for_heads,
)
from hybrid_jax.parallel.norms import gated_norm
from hybrid_jax.parallel.recurrence import linear_recurrence, recurrence
from kernels_pallas import (
    HeadNorm,
    gated_kalmanet,
    gated_kalmanet_queries,
    gated_kalmanet_step,
    gated_kalmanet_summary,
    linear_attention_summary,
)
from kernels_pallas.heads import repeat_heads


class GKAState(NamedTuple):
    """h_kk [B,H,N,N], h_kv [B,H,N,D] float32 and the conv tails [B,W-1,heads*size] of q, k, v (see `HeadSizes`)."""

    h_kk: jax.Array
    h_kv: jax.Array
    q_conv: jax.Array
    k_conv: jax.Array
    v_conv: jax.Array | None


class GatedKalmaNet(ExpandedHeads):
    """q, k, v = SiLU(conv(proj x)); q, k L2-normalized; k, v times (beta + 1e-6); the GKA recurrence with
    alpha = sigmoid(alpha_proj x) and g = -exp(A_log) softplus(a_proj x + dt_bias); o = RMSNorm(o) SiLU(g_proj x).

    Without `use_v_conv` v = proj x, with no activation, as in hybrid-model-factory. Without `use_forgetting_gate` g is
    0; the parameters of the gate exist all the same, as in its checkpoints.
    """

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        hid, gka, sizes = config.hidden_size, config.options(GKAConfig), HeadSizes.of(config, config.options(GKAConfig))
        H, N, D = sizes.H, sizes.N, sizes.D
        fresh: dict[str, Any] = dict(std=config.initializer_range, rngs=rngs, dtype=dtype)
        linear = functools.partial(Linear, **fresh)
        conv = functools.partial(ShortConv, size=gka.conv_size, **fresh)
        self.q_proj = linear(hid, sizes.q * N, axes=("embed", "heads"))
        self.k_proj = linear(hid, sizes.k * N, axes=("embed", "kv_heads"))
        self.v_proj = linear(hid, sizes.v * D, axes=("embed", "kv_heads"))
        self.q_conv1d = conv(sizes.q * N, axes=("heads",))
        self.k_conv1d = conv(sizes.k * N, axes=("kv_heads",))
        self.v_conv1d = conv(sizes.v * D, axes=("kv_heads",)) if gka.use_v_conv else None
        self.a_proj = linear(hid, H, axes=("embed", "heads"))
        self.A_log = init_a_log(rngs, H, dtype)
        self.dt_bias = init_dt_bias(rngs, H, dtype)
        self.b_proj = linear(hid, H, bias=True, axes=("embed", "heads")) if gka.use_beta_gate else None
        self.alpha_proj = linear(hid, H, bias=True, axes=("embed", "heads")) if gka.use_alpha_connection else None
        self.g_proj = linear(hid, H * D, axes=("embed", "heads")) if gka.use_gate else None
        self.o_norm = RMSNorm(D, eps=gka.norm_eps, dtype=dtype)
        self.o_proj = linear(H * D, hid, axes=("heads", "embed"))
        self.make_expansion(sizes, gka, **fresh)
        self.config, self.num_iter = config, config.iterations_of(layer)

    def __call__(
        self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array, state: GKAState | None = None
    ) -> tuple[jax.Array, GKAState | None]:
        """Returns (y [B, T, hidden], the state after x) of x [B, T, hidden]."""
        del positions
        s = GKAState._make([None] * 5) if state is None else state
        arrays, tails = self._inputs(x, segment_ids, s)
        o, states = self._solved(arrays, state=None if state is None else (s.h_kk, s.h_kv), segment_ids=segment_ids)
        if self.g_proj is None:
            o = self.o_norm(o)
        else:
            o = gated_norm(o, self.g_proj(x).reshape(o.shape), self.o_norm.weight[...], self.o_norm.eps)
        return self.o_proj(o.reshape(*x.shape[:2], -1)), GKAState._make([*(states or (None, None)), *tails])

    def mixing(self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array) -> Mixing:
        """Returns the mixing matrices on x [B, T, hidden]; beta, with which values are written, is part of them.

        The solve does not depend on the values: the matrices are those of linear attention with the solved queries.
        """
        del positions
        (q, k, v, alpha, g, beta), _ = self._inputs(x, segment_ids, GKAState._make([None] * 5))
        k, v = (repeat_heads(y, self.sizes.H) for y in (k, v))
        k = (k if beta is None else beta[..., None] * k).astype(jnp.float32)
        queries, _ = recurrence(
            functools.partial(gated_kalmanet_queries, **self._solve(), **self._chunks()),
            None,
            lambda q, k, alpha, g, **kw: linear_attention_summary(k, k, g, **kw),
            (q.astype(jnp.float32), k, alpha, g),
            state=None,
            segment_ids=segment_ids,
        )

        def operation(v):
            arrays = (self._scale() * queries, k, v, g)
            return linear_recurrence(arrays, state=None, segment_ids=segment_ids, implementation="xla")[0]

        return of_operation(operation, v, weight=beta)

    def summary(self, x: jax.Array, *, segment_ids: jax.Array, state: GKAState) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns (decay [B, H], (h_kk, h_kv)): what x [B, T, hidden] makes of the states before it; see `layers.mixer`."""
        (_, k, v, _, g, beta), _ = self._inputs(x, segment_ids, state)
        return gated_kalmanet_summary(k, v, g, beta=beta, segment_ids=segment_ids)

    def _scale(self) -> float:
        return self.sizes.N**-0.5 if self.config.options(GKAConfig).gla_rescale else 1.0

    def _solve(self) -> dict[str, Any]:
        gka = self.config.options(GKAConfig)
        num_iter = self.num_iter if gka.solver == "chebyshev" else -(-3 * self.num_iter // 5)
        return dict(ridge_strength=gka.ridge_strength, num_iter=num_iter, solver=gka.solver)

    def _chunks(self) -> dict[str, Any]:
        gka = self.config.options(GKAConfig)
        return dict(bp_lambda=gka.bp_lambda, chunk_size=gka.chunk_size)

    def _inputs(self, x: jax.Array, segment_ids: jax.Array, s: GKAState) -> tuple[tuple[Any, ...], list[jax.Array | None]]:
        """Returns q, k, v, alpha, g, beta (None without its gate) [B, T, heads, ...] of x [B, T, hidden], and the convs' tails."""
        B, T, _ = x.shape
        H, N = self.sizes.H, self.sizes.N
        norm = HeadNorm("l2", N, eps_outside=True)
        gates = {"a": self.a_proj if self.config.options(GKAConfig).use_forgetting_gate else None, "b": self.b_proj}
        maps = {"k": self.k_proj, "v": self.v_proj, **gates, "alpha": self.alpha_proj}
        maps = {name: linear for name, linear in maps.items() if linear is not None}
        y = dict(zip(maps, products(x, list(maps.values())), strict=True))
        q, q_conv = self.q_conv1d(self.q_proj(x), norm=norm, segment_ids=segment_ids, state=s.q_conv)
        k_norm = None if self.expands else norm
        k, k_conv = self.k_conv1d(y["k"], norm=k_norm, segment_ids=segment_ids, state=s.k_conv)
        v, v_conv = y["v"], None
        if self.v_conv1d is not None:
            v, v_conv = self.v_conv1d(v, segment_ids=segment_ids, state=s.v_conv)
        q, (k, v) = repeat_heads(q.reshape(B, T, -1, N), H), self.expanded(k, v, norm)
        beta = jax.nn.sigmoid(y["b"]) + 1e-6 if "b" in y else None
        ones = jnp.ones((B, T, H), jnp.float32)
        alpha = jax.nn.sigmoid(y["alpha"].astype(jnp.float32)) if "alpha" in y else ones
        g = log_decay(y["a"], self.A_log[...], self.dt_bias[...]) if "a" in y else 0 * ones
        return (q, k, v, alpha, g, beta), [q_conv, k_conv, v_conv]

    def _solved(
        self,
        arrays: tuple[Any, ...],
        *,
        state: tuple[jax.Array, jax.Array] | None = None,
        segment_ids: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Runs Gated KalmaNet on q, k, v, alpha, g, beta, however they are sharded; see `recurrence`."""
        solve, precision = dict(self._solve(), scale=self._scale()), self.config.options(GKAConfig).precision
        return recurrence(
            functools.partial(gated_kalmanet, precision=precision, **self._chunks(), **solve),
            functools.partial(gated_kalmanet_step, **solve),
            lambda q, k, v, alpha, g, **kw: gated_kalmanet_summary(k, v, g, **kw),
            arrays[:5],
            beta=arrays[5],
            state=state,
            segment_ids=segment_ids,
        )

    @staticmethod
    def from_attention(source: Arrays, fresh: Arrays, config: ModelConfig, layer: int) -> dict[str, jax.Array]:
        """Returns q, k, v, o of attention, and the output gate made from o and v (see `projections_for_heads`)."""
        return projections_for_heads(source, fresh, config, config.options(GKAConfig))

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike = jnp.float32) -> GKAState:
        del max_length
        H, N, D = self.sizes.H, self.sizes.N, self.sizes.D
        states = (jnp.zeros((batch, H, N, n), jnp.float32) for n in (N, D))
        convs = (c and c.init_state(batch, dtype) for c in (self.q_conv1d, self.k_conv1d, self.v_conv1d))
        return GKAState._make([*states, *convs])

    def state_axes(self) -> GKAState:
        convs = (c and c.state_axes() for c in (self.q_conv1d, self.k_conv1d, self.v_conv1d))
        return GKAState._make([STATE_AXES, STATE_AXES, *convs])
