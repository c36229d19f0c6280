"""The Discrete Mamba-2 mixer, MOHAWK's student (arXiv 2408.10189), named as in the released block."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hybrid_jax.config import DiscreteMamba2Config, ModelConfig
from hybrid_jax.layers.linear import Linear
from hybrid_jax.layers.mixer import Arrays
from hybrid_jax.layers.mixing import Mixing, of_operation
from hybrid_jax.layers.parameter import parameter
from hybrid_jax.layers.recurrent import STATE_AXES, ShortConv, query_key_maps
from hybrid_jax.parallel.recurrence import linear_recurrence
from kernels_pallas import linear_attention_summary
from kernels_pallas.heads import repeat_heads

OPEN_GATE = 1.278464542761  # SiLU of it is 1


class DiscreteMamba2State(NamedTuple):
    """S [B,H,N,D] float32 (N is `state_size`) and the conv tail [B,W-1,H*D+2*G*N] of x, B, C (G is `qk_heads`)."""

    S: jax.Array
    conv: jax.Array


class DiscreteMamba2(nnx.Module):
    """x, B, C, z, a = in_proj(u); xBC = conv(xBC), without an activation unless `conv_activation`; linear attention of queries C,
    keys B and values x with the log decay g = -softplus(a) per head and token, and D skip; out_proj(y SiLU(z + z_bias)).

    A new mixer begins as MOHAWK's student, whatever the model's `initializer_range`: x, B, C and a are drawn uniformly within
    +-1/sqrt(hidden), the gate is 1 (z is 0), the convolution is the identity, and out_proj is drawn uniformly within
    +-1/sqrt(H * D * number of layers). With `bias` z is drawn as x is, there is no z_bias, and biases begin at 0.
    """

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        del layer
        o, hidden, H, D = config.options(DiscreteMamba2Config), config.hidden_size, config.num_heads, config.head_dim
        self.config, self.options, self.state_size = config, o, o.state_size or D
        self.sizes, inner = o.sizes(H, D), H * D
        fresh: dict[str, Any] = dict(rngs=rngs, dtype=dtype)
        linear = functools.partial(Linear, bias=o.bias, own_start=True, **fresh)
        self.in_proj = linear(hidden, sum(self.sizes), axes=("embed", "heads"), std=(3 * hidden) ** -0.5)
        activation = "silu" if o.conv_activation else None
        conv = functools.partial(ShortConv, bias=o.conv_bias, activation=activation, identity=True, std=0.0, **fresh)
        self.conv1d = conv(sum(self.sizes[:3]), o.conv_size)
        self.D = parameter(jnp.ones(H, dtype), ("heads",))
        self.z_bias = None if o.bias else parameter(jnp.full(inner, OPEN_GATE, dtype), ("heads",))
        if not o.bias:
            z = sum(self.sizes[:3])
            self.in_proj.kernel.set_value(self.in_proj.kernel[...].at[:, z : z + inner].set(0))
        self.out_proj = linear(inner, hidden, axes=("heads", "embed"), std=(3 * inner * config.num_layers) ** -0.5)

    def __call__(
        self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array, state: DiscreteMamba2State | None = None
    ) -> tuple[jax.Array, DiscreteMamba2State | None]:
        """Returns (y [B, T, hidden], the state after x) of x [B, T, hidden]."""
        del positions
        z, (q, k, v, g), conv = self._inputs(x, segment_ids, state and state.conv)
        y, S = linear_recurrence((q, k, v, g), skip=self.D[...], state=state and state.S, segment_ids=segment_ids)
        if self.z_bias is not None:
            z = z + self.z_bias[...].astype(z.dtype)
        return self.out_proj(y.reshape(z.shape) * jax.nn.silu(z)), DiscreteMamba2State._make([S, conv])

    def mixing(self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array) -> Mixing:
        """Returns the mixing matrices on x [B, T, hidden]; the skip D is part of them."""
        del positions
        _, (q, k, v, g), _ = self._inputs(x, segment_ids, None)
        q, k, v = q.astype(jnp.float32), k.astype(jnp.float32), repeat_heads(v, q.shape[2])

        def operation(v):
            return linear_recurrence((q, k, v, g), state=None, segment_ids=segment_ids, implementation="xla")[0]

        return of_operation(operation, v, skip=self.D[...].astype(jnp.float32))

    def summary(
        self, x: jax.Array, *, segment_ids: jax.Array, state: DiscreteMamba2State
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns (decay [B, H], (S,)): what x [B, T, hidden] makes of the state before it; see `layers.mixer`."""
        _, (_, k, v, g), _ = self._inputs(x, segment_ids, state.conv)
        decay, S = linear_attention_summary(k, v, g, segment_ids=segment_ids)
        return decay, (S,)

    def _inputs(
        self, x: jax.Array, segment_ids: jax.Array, tail: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array | None]:
        """Returns z [B, T, H * D], the arguments C, B, x, g of `linear_recurrence`, and the conv's tail after x [B, T, hidden]."""
        batch, T, _ = x.shape
        H, D, N = self.config.num_heads, self.config.head_dim, self.state_size
        v, B, C, z, a = self.in_proj.parts(x, self.sizes)
        (v, B, C), conv = self.conv1d.parts((v, B, C), norms=(None, None, None), segment_ids=segment_ids, state=tail)
        v, B, C = (y.reshape(batch, T, -1, n) for y, n in ((v, D), (B, N), (C, N)))
        return z, (repeat_heads(C, H), B, v, -jax.nn.softplus(a.astype(jnp.float32))), conv

    @staticmethod
    def from_attention(source: Arrays, fresh: Arrays, config: ModelConfig, layer: int) -> dict[str, jax.Array]:
        """Returns in_proj with columns x = v, B = k, C = q of attention, each key-value head repeated for its queries, and
        out_proj = o; a, and the gate, stay as drawn.

        MOHAWK draws all of them anew (`copy_attention = False`); one of its configs copies. Biases of q, k and v go to the
        convolution's, which adds them as attention does, or, if it has none, to in_proj's; where neither has any (`conv_bias` and
        `bias` False) they are lost. That of o goes to out_proj if it has one (`bias`). Norms of queries and
        keys have no place here (`query_key_maps`). B and C stay as drawn where they have not as many heads as queries, or a
        state is not as large as a head.
        """
        o, H, D = config.options(DiscreteMamba2Config), config.num_heads, config.head_dim
        sizes, kernels = o.sizes(H, D), {**source, **query_key_maps(source, config)}
        names = "vkq" if sizes[1] == sizes[0] and o.qk_heads in (None, H) else "v"

        def repeated(x: jax.Array) -> jax.Array:
            return repeat_heads(x.reshape(*x.shape[:-1], -1, D), H).reshape(*x.shape[:-1], H * D)

        parts = [repeated(kernels[f"{x}_proj.kernel"]) for x in names]
        drawn = fresh["in_proj.kernel"][:, len(parts) * H * D :]
        copied = {
            "in_proj.kernel": jnp.concatenate([*parts, drawn], axis=1),
            "out_proj.kernel": source["o_proj.kernel"],
        }
        place = next((name for name in ("conv1d.bias", "in_proj.bias") if name in fresh), None)
        if place is not None and "v_proj.bias" in source:
            biases = [repeated(kernels[f"{x}_proj.bias"]) for x in names]
            copied[place] = jnp.concatenate([*biases, fresh[place][len(parts) * H * D :]])
        if "out_proj.bias" in fresh and "o_proj.bias" in source:
            copied["out_proj.bias"] = source["o_proj.bias"]
        return copied

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike = jnp.float32) -> DiscreteMamba2State:
        del max_length
        H, D = self.config.num_heads, self.config.head_dim
        return DiscreteMamba2State(jnp.zeros((batch, H, self.state_size, D), jnp.float32), self.conv1d.init_state(batch, dtype))

    def state_axes(self) -> DiscreteMamba2State:
        return DiscreteMamba2State._make([STATE_AXES, self.conv1d.state_axes()])
