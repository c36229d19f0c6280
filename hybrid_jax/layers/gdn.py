"""The Gated DeltaNet mixer (arXiv 2412.06464), parameters named as in hybrid-model-factory."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hybrid_jax.config import GDNConfig, ModelConfig
from hybrid_jax.layers.linear import Linear, RMSNorm
from hybrid_jax.layers.mixer import Arrays
from hybrid_jax.layers.mixing import Mixing, of_operation
from hybrid_jax.layers.recurrent import (
    STATE_AXES,
    ExpandedHeads,
    HeadSizes,
    ShortConv,
    init_a_log,
    init_dt_bias,
    l2_normalize,
    log_decay,
    projections_for_heads,
    repeat_heads,
)
from hybrid_jax.parallel.recurrence import recurrence
from kernels_pallas import gated_delta_rule, gated_delta_rule_step, gated_delta_rule_summary


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
        o = self.o_norm(o).reshape(*x.shape[:2], -1)
        if self.g_proj is not None:
            o = o * jax.nn.silu(self.g_proj(x))
        return self.o_proj(o), GDNState._make([S, *tails])

    def mixing(self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array) -> Mixing:
        """Returns the mixing matrices on x [B, T, hidden]; beta is part of them."""
        del positions
        (q, k, v, g, beta), _ = self._inputs(x, segment_ids, GDNState._make([None] * 4))
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        return of_operation(lambda v: _rule((q, k, v, g, beta), segment_ids=segment_ids, implementation="xla")[0], v)

    def _inputs(self, x: jax.Array, segment_ids: jax.Array, s: GDNState) -> tuple[tuple[jax.Array, ...], list[jax.Array | None]]:
        """Returns q, k, v, g, beta [B, T, H, ...] of x [B, T, hidden], and the tails of the three convs after x."""
        B, T, _ = x.shape
        H, N = self.sizes.H, self.sizes.N

        def mixed(proj, conv, tail):
            if conv is None:
                return jax.nn.silu(proj(x)), None
            return conv(proj(x), segment_ids=segment_ids, state=tail)

        q, q_conv = mixed(self.q_proj, self.q_conv1d, s.q_conv)
        k, k_conv = mixed(self.k_proj, self.k_conv1d, s.k_conv)
        v, v_conv = mixed(self.v_proj, self.v_conv1d, s.v_conv)
        q, (k, v) = repeat_heads(q.reshape(B, T, -1, N), H), self.expanded(k, v)
        q, k = (l2_normalize(a, eps_outside=False) for a in (q, k))
        beta = jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32))
        if self.config.options(GDNConfig).allow_neg_eigval:
            beta = 2 * beta
        g = log_decay(self.gk_proj(x), self.A_log[...], self.dt_bias[...])
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
