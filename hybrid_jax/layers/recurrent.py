"""What the recurrent mixers share: heads and their expansion, L2 norm, decay parameters, output gate, the conv of q, k, v."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hybrid_jax.config import ModelConfig
from hybrid_jax.layers.linear import Linear
from hybrid_jax.layers.mixer import Arrays
from hybrid_jax.layers.parameter import marks_of, parameter
from hybrid_jax.parallel.recurrence import convolution
from hybrid_jax.recurrent_options import HeadsOptions
from kernels_pallas import HeadNorm
from kernels_pallas.heads import repeat_heads
from kernels_pallas.short_conv.heads import norm_outputs

STATE_AXES = ("batch", "heads", None, None)  # logical axes of a state [B,H,K,V]


class HeadSizes(NamedTuple):
    """Heads of q, of k, of v, and of gates and states (H); channels of q and k (N), and of v (D)."""

    q: int
    k: int
    v: int
    H: int
    N: int
    D: int

    @classmethod
    def of(cls, config: ModelConfig, options: HeadsOptions) -> HeadSizes:
        """Returns attention's sizes, with `state_size` in place of N if it is given, or the mixer's own (`key_heads`)."""
        H, Hkv, D = config.num_heads, config.num_kv_heads, config.head_dim
        if options.key_heads and options.value_heads and options.value_size:
            own = (options.key_heads, options.key_heads, options.value_heads, options.value_heads)
            return cls(*own, options.state_size or D, options.value_size)
        return cls(H, Hkv, Hkv, H, options.state_size or D, D)


def gate_of_attention(source: Arrays, config: ModelConfig) -> jax.Array:
    """Returns an output gate made from attention, (o_proj^T + v_proj, each column repeated in place) / 2, [hidden, H * D].

    hybrid-model-factory repeats the rows of `v_proj.weight` one by one, not head by head, and so does this function.

    A gate that attention itself has (`ModelConfig.attention_gate`) is left out, because no mixer can compute it: a mixer's gate is
    z sigmoid(z) behind a norm, attention's is sigmoid(z) without one. Windows and kept heads of attention keep it.
    """
    groups = config.num_heads // config.num_kv_heads
    return 0.5 * (source["o_proj.kernel"].T + jnp.repeat(source["v_proj.kernel"], groups, axis=1))


def query_key_maps(source: Arrays, config: ModelConfig, *, weights: bool = True) -> dict[str, jax.Array]:
    """Returns attention's kernels of q and k, and their biases if it has them, by name.

    A norm over all heads together gives its weights to their columns: a norm of each head, which a mixer has, then leaves the
    direction of every query and key that attention has. Its rescaling of a token is lost. Weights of a norm of each head are not
    the kernels' (as in hybrid-model-factory). A LayerNorm of each head takes off the mean of its channels, and so do the kernels
    here; its bias is lost.

    Args:
      weights: whether those of a norm over all heads go to the kernels and biases.
    """
    maps = {name: x for name, x in source.items() if name in {f"{x}_proj.{leaf}" for x in "qk" for leaf in ("kernel", "bias")}}
    if config.qk_norm and config.layer_norm:
        heads = {name: x.reshape(*x.shape[:-1], -1, config.head_dim) for name, x in maps.items()}
        maps = {name: (x - jnp.mean(x, axis=-1, keepdims=True)).reshape(maps[name].shape) for name, x in heads.items()}
    if not (weights and config.qk_norm_all_heads):
        return maps
    return {name: x * (source[f"{name[0]}_norm.weight"] + config.norm_offset) for name, x in maps.items()}


def from_projections(source: Arrays, fresh: Arrays, config: ModelConfig) -> dict[str, jax.Array]:
    """Returns q, k (see `query_key_maps`), v, o of attention (biases where both have them), and `g_proj` made from o and v.

    q and k stay as drawn where the mixer's `state_size` gives them another size than attention's."""
    source = {**source, **query_key_maps(source, config)}
    copied = {n: source[n] for n in fresh if n in source and n.split(".")[0] in ("q_proj", "k_proj", "v_proj", "o_proj")}
    copied = {n: x for n, x in copied.items() if x.shape == fresh[n].shape}
    if "g_proj.kernel" in fresh:
        copied["g_proj.kernel"] = gate_of_attention(source, config)
    return copied


def projections_for_heads(source: Arrays, fresh: Arrays, config: ModelConfig, options: HeadsOptions) -> dict[str, jax.Array]:
    """Returns `from_projections`, also for a mixer that may have heads of its own (`HeadsOptions.key_heads`).

    Such a mixer gets v, o and the gate where its value heads are together as wide as attention's query heads, whose values it then
    has in one or several value heads each; q and k where its key heads are as many and as wide as attention's query heads. The rest
    stays as drawn.
    """
    if options.key_heads is None:
        return from_projections(source, fresh, config)
    sizes, H, D = HeadSizes.of(config, options), config.num_heads, config.head_dim
    kernels = {**source, **query_key_maps(source, config)}
    for name in ("k_proj.kernel", "v_proj.kernel"):
        kernels[name] = repeat_heads(kernels[name].reshape(-1, config.num_kv_heads, D), H).reshape(-1, H * D)
    wide = dataclasses.replace(config, num_kv_heads=H, qk_norm_all_heads=False, mixers=())
    copied = from_projections(kernels, fresh, wide)
    left = () if (sizes.k, sizes.N) == (H, D) else ("q_proj.kernel", "k_proj.kernel")
    return {n: x for n, x in copied.items() if n not in left and x.shape == fresh[n].shape}


class LowRankLinear(nnx.Module):
    """y = B SiLU(A x), with A: din -> rank and B: rank -> dout, which begins at 0, so that a sum with y begins without it.

    Parameters are named as in hybrid-model-factory: `linearA`, `linearB`.
    """

    def __init__(self, din: int, dout: int, rank: int, *, std: float, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.linearA = Linear(din, rank, axes=("kv_heads", None), std=std, rngs=rngs, dtype=dtype)
        self.linearB = Linear(rank, dout, axes=(None, "heads"), std=0.0, own_start=True, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., din] to [..., dout]."""
        return self.linearB(jax.nn.silu(self.linearA(x)))


class ExpandedHeads(nnx.Module):
    """Base of mixers with fewer heads of keys and values, which are repeated or expanded to all heads (see `HeadsOptions`).

    Parameters, where the options ask for an expansion: `proj_k`, `proj_v` and the mixtures `k_rep`, `v_rep` [H, heads of k or v].
    """

    sizes: HeadSizes
    expands: bool

    def make_expansion(self, sizes: HeadSizes, options: HeadsOptions, *, std: float, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        """Makes the parameters of the expansion."""
        rank, H, N, D = options.kv_proj_rank, sizes.H, sizes.N, sizes.D
        fresh: dict[str, Any] = dict(std=std, rngs=rngs, dtype=dtype)
        self.proj_k = LowRankLinear(sizes.k * N, H * N, rank, **fresh) if rank else None
        self.proj_v = LowRankLinear(sizes.v * D, H * D, rank, **fresh) if rank else None
        learned = options.kv_learnable_residual
        self.k_rep = _repetition(sizes.k, H, dtype) if learned else None
        self.v_rep = _repetition(sizes.v, H, dtype) if learned else None
        self.sizes, self.expands = sizes, bool(rank or learned)

    def expanded(self, k: jax.Array, v: jax.Array, norm: HeadNorm) -> tuple[jax.Array, jax.Array]:
        """Returns normed k [B, T, H, N] and v [B, T, H, D] of all heads, of k [B, T, heads * N] and v [B, T, heads * D].

        Where nothing `expands` them k comes normed, and both keep their heads, which the operations repeat; else the norm is of the
        expanded heads."""
        if not self.expands:
            return k.reshape(*k.shape[:2], -1, self.sizes.N), v.reshape(*v.shape[:2], -1, self.sizes.D)
        k = _expanded(k, self.sizes.H, self.sizes.N, self.proj_k, self.k_rep)
        return norm_outputs(k, norm), _expanded(v, self.sizes.H, self.sizes.D, self.proj_v, self.v_rep)


def _repetition(heads: int, num_heads: int, dtype: DTypeLike) -> nnx.Param:
    """Returns a mixture of heads [num_heads, heads] that is the repetition of each (`repeat_heads`)."""
    return parameter(jnp.repeat(jnp.eye(heads, dtype=dtype), num_heads // heads, axis=0), ("heads", None))


def _expanded(x: jax.Array, num_heads: int, size: int, low_rank: LowRankLinear | None, mixture: nnx.Param | None) -> jax.Array:
    heads = x.reshape(*x.shape[:2], -1, size)
    if mixture is None:
        repeated = repeat_heads(heads, num_heads)
    else:
        repeated = jnp.einsum("nh,bthd->btnd", mixture[...].astype(x.dtype), heads)
    return repeated if low_rank is None else repeated + low_rank(x).reshape(repeated.shape)


def init_a_log(rngs: nnx.Rngs, num_heads: int, dtype: DTypeLike = jnp.float32) -> nnx.Param:
    """Returns a new A_log [H] = log U(1e-4, 16)."""
    a = jax.random.uniform(rngs.params(), (num_heads,), dtype, minval=1e-4, maxval=16.0)
    return parameter(jnp.log(a), ("heads",))


def init_dt_bias(
    rngs: nnx.Rngs, num_heads: int, dtype: DTypeLike = jnp.float32, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4
) -> nnx.Param:
    """Returns a new dt_bias [H] = softplus^-1(dt), where dt is log-uniform in [low, high] and at least `floor` (as in Mamba-2)."""
    u = jax.random.uniform(rngs.params(), (num_heads,), dtype)
    dt = jnp.maximum(jnp.exp(u * (math.log(high) - math.log(low)) + math.log(low)), floor)
    return parameter(dt + jnp.log(-jnp.expm1(-dt)), ("heads",))


def log_decay(dt: jax.Array, a_log: jax.Array, dt_bias: jax.Array) -> jax.Array:
    """Returns g = -exp(A_log) softplus(dt + dt_bias) [B, T, H] float32, of dt [B, T, H], A_log [H], dt_bias [H]."""
    f32 = jnp.float32
    return -jnp.exp(a_log.astype(f32)) * jax.nn.softplus(dt.astype(f32) + dt_bias.astype(f32))


class ShortConv(nnx.Module):
    """Causal depthwise conv + SiLU: `kernel` [D, W] (a checkpoint's `weight` [D, 1, W]), optional `bias` [D].

    A new kernel is normal with standard deviation `std`, a new bias 0, as Transformers initializes a `Conv1d`.

    Args:
      activation: behind the conv: "silu" or None.
      identity: a new kernel gives every token to itself, whatever `fresh_parameters` (`priming.fresh`) says of others.
    """

    def __init__(
        self,
        dim: int,
        size: int,
        *,
        std: float,
        bias: bool = False,
        activation: str | None = "silu",
        identity: bool = False,
        axes: tuple[str] = ("heads",),
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ):
        if identity:
            kernel = jnp.zeros((dim, size), dtype).at[:, -1].set(1)
        else:
            kernel = std * jax.random.normal(rngs.params(), (dim, size), dtype)
        self.activation = activation
        self.kernel = parameter(kernel, (*axes, None), frozen=True, decay=True, own_start=identity, layout="conv")
        self.bias = parameter(jnp.zeros(dim, dtype), axes) if bias else None

    def __call__(
        self, x: jax.Array, *, norm: HeadNorm | None = None, segment_ids: jax.Array, state: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns (y [B, T, D], state [B, W-1, D]) of x [B, T, D]; the state holds the tokens before the next one.

        `norm` is an L2 norm of each head of y."""
        bias = None if self.bias is None else self.bias[...]
        return convolution(x, self.kernel[...], bias, self.activation, norm=norm, state=state, segment_ids=segment_ids)

    def parts(
        self,
        xs: Sequence[jax.Array],
        *,
        norms: Sequence[tuple[HeadNorm, jax.Array] | None],
        segment_ids: jax.Array,
        state: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        """Applies the conv to inputs [B, T, size] that are side by side in the kernel; each is sharded by itself.

        `norms` has an RMS norm of each head of an input, with its weight, or None for it."""
        bounds = list(itertools.accumulate(x.shape[-1] for x in xs))[:-1]
        weights = jnp.split(self.kernel[...], bounds)
        biases = [None] * len(xs) if self.bias is None else jnp.split(self.bias[...], bounds)
        states = [None] * len(xs) if state is None else jnp.split(state, bounds, axis=-1)
        pairs = [(None, None) if norm is None else norm for norm in norms]
        outs = [
            convolution(x, weight, bias, self.activation, norm=norm, norm_weight=w, state=s, segment_ids=segment_ids)
            for x, weight, bias, (norm, w), s in zip(xs, weights, biases, pairs, states, strict=True)
        ]
        ys, states = zip(*outs, strict=True)
        return ys, None if state is None else jnp.concatenate(states, axis=-1)

    def init_state(self, batch: int, dtype: DTypeLike) -> jax.Array:
        """Returns the empty state, [batch, W-1, D]."""
        dim, size = self.kernel.shape
        return jnp.zeros((batch, size - 1, dim), dtype)

    def state_axes(self) -> tuple[str | None, ...]:
        """Returns the logical axes of `init_state`."""
        return ("batch", None, marks_of(self.kernel).axes[0])
