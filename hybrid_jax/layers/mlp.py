"""The gated MLP and its mixture-of-experts form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax.config import ModelConfig
from hybrid_jax.layers.linear import Linear


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, *, rngs, dtype=jnp.float32):
        hid, inner = config.hidden_size, config.intermediate_size
        kw = dict(bias=config.mlp_bias, std=config.initializer_range, rngs=rngs, dtype=dtype)
        self.gate_proj = Linear(hid, inner, axes=("embed", "mlp"), **kw)
        self.up_proj = Linear(hid, inner, axes=("embed", "mlp"), **kw)
        self.down_proj = Linear(inner, hid, axes=("mlp", "embed"), **kw)

    def __call__(self, x):
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nnx.Module):
    """E gated MLPs in three stacked kernels: gate and up [E, hidden, inner], down [E, inner, hidden]."""

    def __init__(self, config: ModelConfig, *, rngs, dtype=jnp.float32):
        moe, hid = config.moe, config.hidden_size

        def stack(din, dout, axes):
            value = config.initializer_range * jax.random.normal(rngs.params(), (moe.num_experts, din, dout), dtype)
            return nnx.Param(value, axes=("expert", *axes))

        self.gate_proj = stack(hid, moe.intermediate_size, ("embed", "mlp"))
        self.up_proj = stack(hid, moe.intermediate_size, ("embed", "mlp"))
        self.down_proj = stack(moe.intermediate_size, hid, ("mlp", "embed"))

    def __call__(self, x, group_sizes):
        """x [N, hidden], sorted by expert; group_sizes [E] rows of each."""
        gate, up, down = (p[...].astype(x.dtype) for p in (self.gate_proj, self.up_proj, self.down_proj))
        hidden = jax.nn.silu(jax.lax.ragged_dot(x, gate, group_sizes)) * jax.lax.ragged_dot(x, up, group_sizes)
        return jax.lax.ragged_dot(hidden, down, group_sizes)


class MoE(nnx.Module):
    """Top-k mixture of experts without dropped tokens: rows sorted by expert, grouped matmuls.

    Router probabilities are a float32 softmax over all experts; the chosen ones are rescaled to sum
    to one if `norm_topk_prob`.
    """

    def __init__(self, config: ModelConfig, *, rngs, dtype=jnp.float32):
        self.moe = config.moe
        self.gate = Linear(
            config.hidden_size,
            config.moe.num_experts,
            axes=("embed", None),
            std=config.initializer_range,
            rngs=rngs,
            dtype=dtype,
        )
        self.experts = Experts(config, rngs=rngs, dtype=dtype)

    def __call__(self, x):
        B, T, hid = x.shape
        k, E = self.moe.experts_per_token, self.moe.num_experts
        rows = x.reshape(B * T, hid)
        probs = jax.nn.softmax(self.gate(rows).astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(probs, k)
        if self.moe.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdims=True)
        flat = chosen.reshape(-1)
        order = jnp.argsort(flat)
        sizes = jnp.bincount(flat, length=E).astype(jnp.int32)
        out = self.experts(rows[order // k], sizes) * weights.reshape(-1)[order, None].astype(x.dtype)
        return jnp.zeros_like(rows).at[order // k].add(out).reshape(B, T, hid)
