"""The Mamba-3 mixer (arXiv 2603.15569) in the shape of grouped attention, named as in the released block."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hybrid_jax.config import Mamba3Config, ModelConfig
from hybrid_jax.layers.linear import Linear, RMSNorm
from hybrid_jax.layers.mixer import Arrays
from hybrid_jax.layers.mixing import Mixing, of_operation
from hybrid_jax.layers.parameter import parameter
from hybrid_jax.layers.recurrent import STATE_AXES, gate_of_attention, init_dt_bias, query_key_maps
from hybrid_jax.parallel.mamba3 import Norms, mamba3_recurrence
from hybrid_jax.parallel.norms import gated_norm
from kernels_pallas.heads import repeat_heads
from kernels_pallas.mamba3 import Mamba3State, rotate
from kernels_pallas.mamba3.rotation import within_turn


class Mamba3(nnx.Module):
    """z, x, B, C, dt, A, trap, angle = in_proj(u); B, C = norm + bias; Mamba-3's recurrence with D skip; the output's norm, times
    SiLU(z); out_proj. With rank R > 1 a head has R inputs x mimo_x[r], gates z mimo_z[r] and outputs, summed with mimo_o[r].

    The released block has as many heads of x as of z and shares B and C among the heads of a group: `groups`, in a model with one
    key-value head per query head. Without `groups` x and B have as many heads as attention has keys and values, and C as many as
    queries.
    """

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        del layer
        o: Mamba3Config = config.options(Mamba3Config)
        hidden, H, D, N = config.hidden_size, config.num_heads, config.head_dim, o.state_size or config.head_dim
        fresh: dict[str, Any] = dict(std=config.initializer_range, rngs=rngs, dtype=dtype)
        self.config, self.options, self.state_size = config, o, N
        self.angles = o.angles(N)
        self.in_proj = Linear(hidden, sum(self._sizes()), axes=("embed", "heads"), **fresh)
        self.dt_bias = init_dt_bias(rngs, H, dtype, o.dt_min, o.dt_max)
        self.B_bias = parameter(jnp.ones((H, o.rank, N), dtype), ("heads", None, None))
        self.C_bias = parameter(jnp.ones((H, o.rank, N), dtype), ("heads", None, None))
        self.B_norm, self.C_norm = (RMSNorm(N, eps=o.norm_eps, dtype=dtype) for _ in "BC")
        self.D = parameter(jnp.ones(H, dtype), ("heads",))

        def per_rank(value: float) -> nnx.Param | None:
            return parameter(jnp.full((H, o.rank, D), value, dtype), ("heads", None, None)) if o.rank > 1 else None

        self.mimo_x, self.mimo_z, self.mimo_o = per_rank(1 / o.rank), per_rank(1.0), per_rank(1 / o.rank)
        self.norm = RMSNorm(H * D if o.norm_per_head else D, eps=o.norm_eps, dtype=dtype) if o.out_norm else None
        self.out_proj = Linear(H * D, hidden, axes=("heads", "embed"), **fresh)

    def _sizes(self) -> tuple[int, ...]:
        c = self.config
        return self.options.sizes(c.num_heads, c.num_kv_heads, c.head_dim)

    def __call__(
        self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array, state: Mamba3State | None = None
    ) -> tuple[jax.Array, Mamba3State | None]:
        """Returns (y [B, T, hidden], the state after x) of x [B, T, hidden]; the state's k and v are [B, H, R, ...]."""
        del positions
        z, q, k, v, rest = self._inputs(x)
        (batch, T, _), (H, D) = x.shape, z.shape[3:]
        if self.mimo_x is not None and self.mimo_z is not None:
            v, z = repeat_heads(v, H) * _by_rank(self.mimo_x, v), z * _by_rank(self.mimo_z, z)
        y, state = mamba3_recurrence(q, k, v, *rest, **self._options(), skip=self.D[...], state=state, segment_ids=segment_ids)
        y, z = y.reshape(batch, -1, H, D), z.reshape(batch, -1, H, D)
        if self.norm is None:
            y = y * jax.nn.silu(z)
        else:
            weight = self.norm.weight[...]
            y = gated_norm(y, z, weight.reshape(H, D) if self.options.norm_per_head else weight, self.norm.eps)
        if self.mimo_o is not None:
            y = jnp.sum(y.reshape(batch, T, -1, H, D) * _by_rank(self.mimo_o, y), axis=2)
        return self.out_proj(y.reshape(batch, T, H * D)), state

    def mixing(self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array) -> Mixing:
        """Returns the mixing matrices on x [B, T, hidden]; the steps and the skip D are part of them.

        With rank R > 1 a token has R inputs, made by mimo_x, and R outputs, added up by mimo_o, with factors for every channel. The
        matrix has the mean of mimo_o mimo_x over the channels: of the matrices that treat all channels alike it is the nearest
        one, and it is exact where the channels of a head agree, as in a new model.
        """
        del positions
        _, q, k, v, rest = self._inputs(x)
        q, k, f32 = q.astype(jnp.float32), k.astype(jnp.float32), jnp.float32
        R, H = self.options.rank, self.config.num_heads
        factors = jnp.ones((H, 1, 1), f32)  # [H, outputs, inputs]
        if self.mimo_x is not None and self.mimo_o is not None:
            factors = jnp.einsum("hod,hid->hoi", self.mimo_o[...].astype(f32), self.mimo_x[...].astype(f32)) / v.shape[-1]

        def operation(v):
            inputs = jnp.einsum("oi,bthc->btohic", jnp.eye(R), v)  # each input has channels of its own
            inputs = inputs.reshape(*v.shape[:2], R, H, -1)
            options = dict(skip=None, state=None, segment_ids=segment_ids, implementation="xla")
            y, _ = mamba3_recurrence(q, k, inputs, *rest, **self._options(), **options)
            return jnp.einsum("btohic,hoi->bthc", y.reshape(*v.shape[:2], R, H, R, -1), factors)

        skip = self.D[...].astype(f32) * jnp.trace(factors, axis1=1, axis2=2)
        return of_operation(operation, repeat_heads(v[:, :, 0], H), skip=skip)

    def composed(self, before: Mamba3State, x: jax.Array, own: Mamba3State) -> Mamba3State:
        """Returns the state after x [B, T, hidden], of the state before it and the one that x alone leaves from nothing.

        The state is affine in S and in the first token's share of the product before it, whose keys turned by `before.angle`; keys
        that were turned from 0 turn on by that angle, and so do the rows of their S.
        """
        _, _, _, _, (log_decay, dt, mix, _) = self._inputs(x)
        angle, halves = before.angle[:, None], self.options.rotate_halves
        decay, first = jnp.exp(jnp.sum(log_decay, axis=1)), (1 - mix[:, 0]) * dt[:, 0]
        last = jnp.einsum("bhrk,bhrv->bhkv", before.k, before.v, precision="highest")
        carried = decay[..., None, None] * (before.S + first[..., None, None] * last)
        turned = jnp.transpose(rotate(jnp.transpose(own.S, (0, 3, 1, 2)), angle, halves), (0, 2, 3, 1))
        k = jnp.swapaxes(rotate(jnp.swapaxes(own.k, 1, 2), angle, halves), 1, 2)
        return Mamba3State(within_turn(before.angle + own.angle), carried + turned, k, own.v)

    def _inputs(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, tuple[jax.Array, ...]]:
        """Returns z [B, T, 1, H, D], q and k [B, T, R, heads, N], v [B, T, 1, heads, D] of x [B, T, hidden], and the other
        arrays of `mamba3_recurrence`."""
        (batch, T, _), o, f32 = x.shape, self.options, jnp.float32
        D = self.config.head_dim
        z, v, B, C, dt, A, trap, angle = self.in_proj.parts(x, self._sizes())
        k, q = (part.reshape(batch, T, o.rank, -1, self.state_size) for part in (B, C))
        v, z = (part.reshape(batch, T, 1, -1, D) for part in (v, z))
        dt = jax.nn.softplus(dt.astype(f32) + self.dt_bias[...].astype(f32))
        decay = -jnp.maximum(_positive(A.astype(f32)), o.decay_floor) * dt
        return z, q, k, v, (decay, dt, jax.nn.sigmoid(trap.astype(f32)), jnp.pi * jnp.tanh(angle.astype(f32)))

    def _options(self) -> dict[str, Any]:
        """Returns the options of `mamba3_recurrence`."""
        biases = self.C_bias[...], self.B_bias[...]
        norms = Norms(self.C_norm.scale(), self.B_norm.scale(), *biases, self.options.norm_eps)
        return dict(norms=norms, halves=self.options.rotate_halves)

    @staticmethod
    def from_attention(source: Arrays, fresh: Arrays, config: ModelConfig, layer: int) -> dict[str, jax.Array]:
        """Returns in_proj with columns z, x = v, B = k, C = q of attention, out_proj = o, no rotation, and no biases of B and C.

        No paper converts attention to Mamba-3; this recipe is ours, after that of Mamba-2. Columns of the angles are 0, so that
        the rotation begins at none; the biases, which are 1 in a new model, are 0, so that C B is the query times the key. The
        norms of B and C are those of k and q where the source has them for each head; the weights of norms over all heads go to
        the columns of B and C (`query_key_maps`). B and C are copied if the state is as large as the head, the rank is 1 and
        there are no `groups`; otherwise they, the biases and the angles stay as drawn. Decay, step size and trap stay as drawn.
        """
        o, drawn = config.options(Mamba3Config), fresh["in_proj.kernel"]
        H, Hkv, D = config.num_heads, config.num_kv_heads, config.head_dim
        outer = {"out_proj.kernel": source["o_proj.kernel"]}
        parts = [gate_of_attention(source, config), source["v_proj.kernel"]]
        if o.rank > 1 or o.groups or (o.state_size or D) != D:
            return outer | {"in_proj.kernel": jnp.concatenate([*parts, drawn[:, (H + Hkv) * D :]], axis=1)}
        rest = drawn[:, 2 * (H + Hkv) * D :]
        rest = rest.at[:, rest.shape[1] - o.angles(D) :].set(0)
        kernels = query_key_maps(source, config)
        copied = {"in_proj.kernel": jnp.concatenate([*parts, kernels["k_proj.kernel"], kernels["q_proj.kernel"], rest], axis=1)}
        if config.qk_norm and not config.qk_norm_all_heads:
            copied |= {f"{ours}_norm.weight": source[f"{x}_norm.weight"] + config.norm_offset for ours, x in ("Bk", "Cq")}
        return outer | copied | {name: jnp.zeros_like(fresh[name]) for name in ("B_bias", "C_bias")}

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike = jnp.float32) -> Mamba3State:
        del max_length, dtype  # the token before is read at float32's precision, as the state is
        H, D, N, R = self.config.num_heads, self.config.head_dim, self.state_size, self.options.rank
        sizes = [(self.angles,), (N, D), (R, N), (R, D)]
        return Mamba3State._make(jnp.zeros((batch, H, *size), jnp.float32) for size in sizes)

    def state_axes(self) -> Mamba3State:
        return Mamba3State._make([STATE_AXES[:3], STATE_AXES, STATE_AXES, STATE_AXES])


def _positive(x: jax.Array) -> jax.Array:
    """Returns 1 + x for x >= 0 and 1 / (1 - x) below: positive, and 1 at 0."""
    return jnp.where(x >= 0, 1 + x, 1 / (1 - jnp.minimum(x, 0)))


def _by_rank(weight: nnx.Param, like: jax.Array) -> jax.Array:
    """Returns a weight [H, R, D] as [R, H, D] in the dtype of an array."""
    return jnp.swapaxes(weight[...], 0, 1).astype(like.dtype)
