"""The Mamba-2 mixer (arXiv 2405.21060) in the shape of grouped attention, named as in hybrid-model-factory."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hybrid_jax.config import Mamba2Config, ModelConfig
from hybrid_jax.layers.linear import Linear, RMSNorm, norm_heads
from hybrid_jax.layers.mixer import Arrays
from hybrid_jax.layers.mixing import Mixing, of_operation
from hybrid_jax.layers.parameter import parameter
from hybrid_jax.layers.recurrent import (
    STATE_AXES,
    ShortConv,
    gate_of_attention,
    init_a_log,
    init_dt_bias,
    query_key_maps,
)
from hybrid_jax.parallel.norms import gated_norm
from hybrid_jax.parallel.recurrence import linear_recurrence
from kernels_pallas import HeadNorm, linear_attention_summary, ssd_inputs
from kernels_pallas.heads import repeat_heads

CONV_SIZE, NORM_EPS, QK_NORM_EPS = 4, 1e-5, 1e-6


class Mamba2State(NamedTuple):
    """S [B,H,N,D] float32 (N is `state_size`) and the conv tail [B,W-1,Hkv*D+(H+Hkv)*N] of x, B, C."""

    S: jax.Array
    conv: jax.Array


class Mamba2(nnx.Module):
    """z, x, B, C, dt = in_proj(u); C, B normed if the source norms q, k; xBC = SiLU(conv(xBC));
    SSD with D skip; out_proj(RMSNorm per head of y SiLU(z))."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        hid, H, Hkv, D = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        options = config.options(Mamba2Config)
        normed, N = config.norms_queries(layer) and options.use_qk_norm, options.state_size or D
        fresh: dict[str, Any] = dict(std=config.initializer_range, rngs=rngs, dtype=dtype)
        self.in_proj = Linear(hid, (H + Hkv) * (D + N) + H, axes=("embed", "heads"), **fresh)
        self.conv1d = ShortConv(Hkv * D + (H + Hkv) * N, CONV_SIZE, bias=True, **fresh)
        self.A_log = init_a_log(rngs, H, dtype)
        self.dt_bias = init_dt_bias(rngs, H, dtype)
        self.D = parameter(jnp.ones(H, dtype), ("heads",))
        B_heads, C_heads = (Hkv, H) if config.qk_norm_all_heads else (1, 1)  # that are normed together
        self.B_norm = RMSNorm(B_heads * N, eps=QK_NORM_EPS, dtype=dtype) if normed else None
        self.C_norm = RMSNorm(C_heads * N, eps=QK_NORM_EPS, dtype=dtype) if normed else None
        self.norm = RMSNorm(H * D, eps=NORM_EPS, dtype=dtype)
        self.out_proj = Linear(H * D, hid, axes=("heads", "embed"), **fresh)
        self.config, self.state_size = config, N

    def __call__(
        self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array, state: Mamba2State | None = None
    ) -> tuple[jax.Array, Mamba2State | None]:
        """Returns (y [B, T, hidden], the state after x) of x [B, T, hidden]."""
        del positions
        (batch, T, _), H, D = x.shape, self.config.num_heads, self.config.head_dim
        z, inputs, conv = self._inputs(x, segment_ids, state and state.conv)
        *arrays, dt = ssd_inputs(*inputs)
        skip = self.D[...]
        y, S = linear_recurrence(arrays, value_scale=dt, skip=skip, state=state and state.S, segment_ids=segment_ids)
        y = gated_norm(y, z.reshape(y.shape), self.norm.weight[...].reshape(H, D), NORM_EPS, gate_first=True)
        return self.out_proj(y.reshape(batch, T, H * D)), Mamba2State._make([S, conv])

    def mixing(self, x: jax.Array, *, positions: jax.Array, segment_ids: jax.Array) -> Mixing:
        """Returns the mixing matrices on x [B, T, hidden]; the steps dt and the skip D are part of them."""
        del positions
        _, (v, dt, a, B, C), _ = self._inputs(x, segment_ids, None)
        q, k, v, g, dt = ssd_inputs(v, dt, a, B.astype(jnp.float32), C.astype(jnp.float32))

        def operation(v):
            return linear_recurrence((q, k, v, g), state=None, segment_ids=segment_ids, implementation="xla")[0]

        return of_operation(operation, repeat_heads(v, q.shape[2]), weight=dt, skip=self.D[...].astype(jnp.float32))

    def summary(self, x: jax.Array, *, segment_ids: jax.Array, state: Mamba2State) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns (decay [B, H], (S,)): what x [B, T, hidden] makes of the state before it; see `layers.mixer`."""
        _, inputs, _ = self._inputs(x, segment_ids, state.conv)
        _, k, v, g, dt = ssd_inputs(*inputs)
        decay, S = linear_attention_summary(k, v, g, value_scale=dt, segment_ids=segment_ids)
        return decay, (S,)

    def _inputs(
        self, x: jax.Array, segment_ids: jax.Array, tail: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array | None]:
        """Returns z [B, T, H * D], the arguments of `ssd_inputs`, x, dt, a, B, C, and the conv's tail after x [B, T, hidden]."""
        batch, T, _ = x.shape
        c, N = self.config, self.state_size
        H, Hkv, D = c.num_heads, c.num_kv_heads, c.head_dim
        z, v, B, C, dt = self.in_proj.parts(x, (H * D, Hkv * D, Hkv * N, H * N, H))
        norms: list[Any] = [None, None, None]
        if self.B_norm is not None and self.C_norm is not None and c.qk_norm_all_heads:
            C = norm_heads(self.C_norm, C.reshape(batch, T, H, N)).reshape(C.shape)
            B = norm_heads(self.B_norm, B.reshape(batch, T, Hkv, N)).reshape(B.shape)
        elif self.B_norm is not None and self.C_norm is not None:
            norms[1:] = [(HeadNorm("rms", N, QK_NORM_EPS), norm.weight[...]) for norm in (self.B_norm, self.C_norm)]
        (v, B, C), conv = self.conv1d.parts((v, B, C), norms=norms, segment_ids=segment_ids, state=tail)
        v, B, C = (a.reshape(batch, T, -1, n) for a, n in ((v, D), (B, N), (C, N)))
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        a = -jnp.exp(self.A_log[...].astype(jnp.float32))
        return z, (v, dt, a, B, C), conv

    @staticmethod
    def from_attention(source: Arrays, fresh: Arrays, config: ModelConfig, layer: int) -> dict[str, jax.Array]:
        """Returns in_proj with columns z, x = v, B = k, C = q of attention (dt's stay as drawn), out_proj = o, and the norms of
        C and B, which are those of q and k, or begin at 1 where those have no weights. B, C and their norms stay as drawn where a
        state is not as large as a head."""
        copies = (config.options(Mamba2Config).state_size or config.head_dim) == config.head_dim
        kernels = {**source, **query_key_maps(source, config, weights=False)}
        parts = [gate_of_attention(source, config), *(kernels[f"{p}_proj.kernel"] for p in ("vkq" if copies else "v"))]
        width = sum(p.shape[1] for p in parts)
        copied = {
            "in_proj.kernel": jnp.concatenate([*parts, fresh["in_proj.kernel"][:, width:]], axis=1),
            "out_proj.kernel": source["o_proj.kernel"],
        }
        if copies and config.qk_norm and "C_norm.weight" in fresh:
            copied |= {f"{ours}_norm.weight": source[f"{x}_norm.weight"] + config.norm_offset for ours, x in ("Cq", "Bk")}
        return copied

    def init_state(self, batch: int, max_length: int, dtype: DTypeLike = jnp.float32) -> Mamba2State:
        del max_length
        H, D = self.config.num_heads, self.config.head_dim
        return Mamba2State(jnp.zeros((batch, H, self.state_size, D), jnp.float32), self.conv1d.init_state(batch, dtype))

    def state_axes(self) -> Mamba2State:
        return Mamba2State._make([STATE_AXES, self.conv1d.state_axes()])
