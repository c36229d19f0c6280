"""The Gated DeltaNet mixer (arXiv 2412.06464), parameters named as in hybrid-model-factory."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hybrid_jax.config import GDNConfig, ModelConfig
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
from hybrid_jax.parallel.recurrence import recurrence
from kernels_pallas import HeadNorm, gated_delta_rule, gated_delta_rule_step, gated_delta_rule_summary
from kernels_pallas.heads import repeat_heads
from kernels_pallas.short_conv.heads import norm_outputs


class GDNState(NamedTuple):
    """S [B,H,N,D] float32 and the conv tails [B,W-1,heads*size] of q, k, v (see `HeadSizes`)."""

    S: jax.Array
    q_conv: jax.Array | None
    k_conv: jax.Array | None
    v_conv: jax.Array | None


class GatedDeltaNet(ExpandedHeads):
    """q, k, v = SiLU(conv(proj x)); q, k L2-normalized; beta = sigmoid(b_proj x), twice that if
    `allow_neg_eigval`; the gated delta rule; o = RMSNorm(o) SiLU(g_proj x).

    Without `use_short_conv` q, k, v = SiLU(proj x), as in hybrid-model-factory.
    """

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        del layer
        hid, gdn, sizes = config.hidden_size, config.options(GDNConfig), HeadSizes.of(config, config.options(GDNConfig))
        H, N, D = sizes.H, sizes.N, sizes.D
        fresh: dict[str, Any] = dict(std=config.initializer_range, rngs=rngs, dtype=dtype)
        linear = functools.partial(Linear, **fresh)

        def conv(dim, axis):
            if not gdn.use_short_conv:
                return None
            return ShortConv(dim, gdn.conv_size, bias=gdn.conv_bias, axes=(axis,), **fresh)

        self.q_proj = linear(hid, sizes.q * N, axes=("embed", "heads"))
        self.k_proj = linear(hid, sizes.k * N, axes=("embed", "kv_heads"))
        self.v_proj = linear(hid, sizes.v * D, axes=("embed", "kv_heads"))
        self.q_conv1d = conv(sizes.q * N, "heads")
        self.k_conv1d, self.v_conv1d = conv(sizes.k * N, "kv_heads"), conv(sizes.v * D, "kv_heads")
        self.gk_proj = linear(hid, H, axes=("embed", "heads"))
        self.b_proj = linear(hid, H, axes=("embed", "heads"))
        self.A_log = init_a_log(rngs, H, dtype)
        self.dt_bias = init_dt_bias(rngs, H, dtype)
        self.g_proj = linear(hid, H * D, axes=("embed", "heads")) if gdn.use_gate else None
        self.o_norm = RMSNorm(D, eps=gdn.norm_eps, dtype=dtype)
        self.o_proj = linear(H * D, hid, axes=("heads", "embed"))
        self.make_expansion(sizes, gdn, **fresh)
        self.config = config

    def __call__(
        self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array, state: GDNState | None = None
    ) -> tuple[jax.Array, GDNState | None]:
        """Returns (y [B, T, hidden], the state after x) of x [B, T, hidden]."""
        del positions
        s = GDNState._make([None] * 4) if state is None else state
        arrays, tails = self._inputs(x, segment_ids, s)
        o, S = _rule(arrays, state=s.S, segment_ids=segment_ids)
        if self.g_proj is None:
            o = self.o_norm(o)
        else:
            o = gated_norm(o, self.g_proj(x).reshape(o.shape), self.o_norm.weight[...], self.o_norm.eps)
        return self.o_proj(o.reshape(*x.shape[:2], -1)), GDNState._make([S, *tails])

    def mixing(self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array) -> Mixing:
        """Returns the mixing matrices on x [B, T, hidden]; beta is part of them."""
        del positions
        (q, k, v, g, beta), _ = self._inputs(x, segment_ids, GDNState._make([None] * 4))
        q, k, v = q.astype(jnp.float32), k.astype(jnp.float32), repeat_heads(v, q.shape[2])
        return of_operation(lambda v: _rule((q, k, v, g, beta), segment_ids=segment_ids, implementation="xla")[0], v)

    def summary(self, x: jax.Array, *, segment_ids: jax.Array, state: GDNState) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns (transition [B, H, N, N], (S,)): what x [B, T, hidden] makes of the state before it; see `layers.mixer`."""
        (_, k, v, g, beta), _ = self._inputs(x, segment_ids, state)
        transition, S = gated_delta_rule_summary(k, v, g, beta, segment_ids=segment_ids)
        return transition, (S,)

    def _inputs(self, x: jax.Array, segment_ids: jax.Array, s: GDNState) -> tuple[tuple[jax.Array, ...], list[jax.Array | None]]:
        """Returns q, k, v, g, beta [B, T, heads, ...] of x [B, T, hidden], and the tails of the three convs after x."""
        B, T, _ = x.shape
        H, N = self.sizes.H, self.sizes.N

        def mixed(y, conv, tail, norm=None):
            if conv is None:
                return norm_outputs(jax.nn.silu(y), norm), None
            return conv(y, norm=norm, segment_ids=segment_ids, state=tail)

        norm = HeadNorm("l2", N)
        k, v, b, decay = products(x, (self.k_proj, self.v_proj, self.b_proj, self.gk_proj))
        q, q_conv = mixed(self.q_proj(x), self.q_conv1d, s.q_conv, norm)
        k, k_conv = mixed(k, self.k_conv1d, s.k_conv, None if self.expands else norm)
        v, v_conv = mixed(v, self.v_conv1d, s.v_conv)
        q, (k, v) = repeat_heads(q.reshape(B, T, -1, N), H), self.expanded(k, v, norm)
        beta = jax.nn.sigmoid(b.astype(jnp.float32))
        if self.config.options(GDNConfig).allow_neg_eigval:
            beta = 2 * beta
        g = log_decay(decay, self.A_log[...], self.dt_bias[...])
        return (q, k, v, g, beta), [q_conv, k_conv, v_conv]

    @staticmethod
    def from_attention(source: Arrays, fresh: Arrays, config: ModelConfig, layer: int) -> dict[str, jax.Array]:
        """Returns q, k, v, o of attention, and the output gate made from o and v (see `projections_for_heads`)."""
        return projections_for_heads(source, fresh, config, config.options(GDNConfig))

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike = jnp.float32) -> GDNState:
        del max_length
        H, N, D = self.sizes.H, self.sizes.N, self.sizes.D
        convs = (c and c.init_state(batch, dtype) for c in (self.q_conv1d, self.k_conv1d, self.v_conv1d))
        return GDNState._make([jnp.zeros((batch, H, N, D), jnp.float32), *convs])

    def state_axes(self) -> GDNState:
        return GDNState._make([STATE_AXES, *(c and c.state_axes() for c in (self.q_conv1d, self.k_conv1d, self.v_conv1d))])


def _rule(
    arrays: tuple[jax.Array, ...],
    *,
    state: jax.Array | None = None,
    segment_ids: jax.Array,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the gated delta rule of q, k, v, g, beta, however they are sharded; see `recurrence`."""
    kw: dict[str, Any] = dict(implementation=implementation)
    return recurrence(
        functools.partial(gated_delta_rule, **kw),
        gated_delta_rule_step,
        lambda q, k, v, g, beta, segment_ids: gated_delta_rule_summary(k, v, g, beta, segment_ids=segment_ids, **kw),
        arrays,
        state=state,
        segment_ids=segment_ids,
    )
