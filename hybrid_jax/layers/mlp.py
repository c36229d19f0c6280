"""The MLP, gated or not, and its mixture-of-experts form."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hybrid_jax.config import ModelConfig, MoEConfig
from hybrid_jax.layers.linear import Linear
from hybrid_jax.layers.parameter import parameter
from hybrid_jax.parallel.experts import from_groups, group, grouped_matmul, to_groups
from hybrid_jax.parallel.sharding import TOKENS, axis_size, shard_map_by_axes

# ModelConfig.activation -> the function
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), or, without a gate, down(activation(up(x))).

    `inner` is the hidden width; None: `config.intermediate_size`.
    """

    def __init__(self, config: ModelConfig, *, inner: int | None = None, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        hid, inner = config.hidden_size, inner or config.intermediate_size
        linear = functools.partial(Linear, bias=config.mlp_bias, std=config.initializer_range, rngs=rngs, dtype=dtype)
        self.gate_proj = linear(hid, inner, axes=("embed", "mlp")) if config.gated_mlp else None
        self.up_proj = linear(hid, inner, axes=("embed", "mlp"))
        self.down_proj = linear(inner, hid, axes=("mlp", "embed"))
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, T, hidden] to the same shape."""
        activation = ACTIVATIONS[self.activation]
        if self.gate_proj is None:
            return self.down_proj(activation(self.up_proj(x)))
        return self.down_proj(activation(self.gate_proj(x)) * self.up_proj(x))


def _experts_of(config: ModelConfig) -> MoEConfig:
    if config.moe is None:
        raise ValueError("a mixture of experts needs ModelConfig.moe")
    return config.moe


class Experts(nnx.Module):
    """E gated MLPs in three stacked kernels: gate and up [E, hidden, inner], down [E, inner, hidden]."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        moe, hid = _experts_of(config), config.hidden_size

        def stack(din, dout, axes):
            value = config.initializer_range * jax.random.normal(rngs.params(), (moe.num_experts, din, dout), dtype)
            return parameter(value, ("expert", *axes), compute=True, frozen=True, decay=True, muon=True, layout="experts")

        self.gate_proj = stack(hid, moe.intermediate_size, ("embed", "mlp"))
        self.up_proj = stack(hid, moe.intermediate_size, ("embed", "mlp"))
        self.down_proj = stack(moe.intermediate_size, hid, ("mlp", "embed"))


def _own_experts(rows, chosen, weights, gate, up, down, first, *, weighted_inputs: bool):
    """What experts first ... first + E - 1, those of the kernels [E, ...], add to every row [n, hidden]."""
    n, k = chosen.shape
    if weighted_inputs:  # every choice has a row of its own, whose output counts as it is
        rows, chosen = (rows[:, None] * weights[..., None].astype(rows.dtype)).reshape(n * k, -1), chosen.reshape(n * k, 1)
        weights = jnp.ones_like(weights)
    groups = group(chosen, len(gate), first)
    x = to_groups(rows, groups)
    hidden = jax.nn.silu(grouped_matmul(x, gate, groups.sizes)) * grouped_matmul(x, up, groups.sizes)
    out = from_groups(grouped_matmul(hidden, down, groups.sizes), groups).reshape(n, k, -1)
    return jnp.einsum("nk,nkh->nh", weights.astype(rows.dtype), out, preferred_element_type=jnp.float32).astype(rows.dtype)


def _choices(x: jax.Array, router: jax.Array, moe: MoEConfig) -> tuple[jax.Array, jax.Array]:
    """Returns the weights (float32) and the numbers of the experts that each token of x [..., hidden] chose, [..., k]."""
    scores = (x @ router).astype(jnp.float32)
    if moe.sigmoid_router:  # of the scores: sigmoids of large ones are all 1
        weights, chosen = jax.lax.top_k(scores, moe.experts_per_token)
        weights = jax.nn.sigmoid(weights)
    else:
        weights, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), moe.experts_per_token)
    return weights / weights.sum(-1, keepdims=True) if moe.norm_topk_prob else weights, chosen


def _route(x, router, gate, up, down, *, moe, experts: int, tensor: bool):
    """A device's tokens through all experts; with experts on several devices the tokens visit each in a ring.

    Nothing is dropped, and no device holds more rows than its own tokens' choices.
    """
    rows = x.reshape(-1, x.shape[-1])
    weights, chosen = _choices(rows, router, moe)
    own_experts = functools.partial(_own_experts, weighted_inputs=moe.weighted_inputs)
    if experts == 1:
        out = own_experts(rows, chosen, weights, gate, up, down, 0)
    else:
        first = jax.lax.axis_index("expert") * gate.shape[0]
        onward = [(i, (i + 1) % experts) for i in range(experts)]

        def visit(guests, _):
            rows, chosen, weights, out = guests
            out = out + own_experts(rows, chosen, weights, gate, up, down, first)
            return jax.lax.ppermute((rows, chosen, weights, out), "expert", onward), None

        (_, _, _, out), _ = jax.lax.scan(visit, (rows, chosen, weights, jnp.zeros_like(rows)), None, length=experts)
    if tensor:
        out = jax.lax.psum(out, "tensor")
    return out.reshape(x.shape)


class MoE(nnx.Module):
    """Top-k mixture of experts without dropped tokens: rows sorted by expert, grouped matmuls.

    Router probabilities are a float32 softmax over all experts, or sigmoids; the chosen ones are rescaled to sum
    to one if `norm_topk_prob`. A shared expert adds sigmoid(shared_expert_gate(x)) * shared_expert(x), or without a gate
    shared_expert(x).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.moe = _experts_of(config)
        fresh: dict[str, Any] = dict(rngs=rngs, dtype=dtype)
        of_tokens = functools.partial(Linear, axes=("embed", None), muon=False, std=config.initializer_range, **fresh)
        self.gate = of_tokens(config.hidden_size, self.moe.num_experts)
        self.experts = Experts(config, **fresh)
        shared = self.moe.shared_intermediate_size
        self.shared_expert = MLP(config, inner=shared, **fresh) if shared else None
        self.shared_expert_gate = of_tokens(config.hidden_size, 1) if shared and self.moe.shared_gate else None

    def choices(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the weights (float32) and the numbers of the experts that each token of x [B, T, hidden] chose, [B, T, k]."""
        return _choices(x, self.gate.kernel[...].astype(x.dtype), self.moe)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, T, hidden] to the same shape."""
        local = functools.partial(_route, moe=self.moe, experts=axis_size("expert"), tensor=axis_size("tensor") > 1)
        gate, up, down = (p[...].astype(x.dtype) for p in (self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj))
        wide = ("expert", None, "mlp")
        axes = (TOKENS, (None,), wide, wide, ("expert", "mlp"))
        out = shard_map_by_axes(local, (x, self.gate.kernel[...].astype(x.dtype), gate, up, down), axes, TOKENS)
        if self.shared_expert is None:
            return out
        if self.shared_expert_gate is None:
            return out + self.shared_expert(x)
        return out + jax.nn.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
