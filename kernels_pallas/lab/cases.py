"""What the laboratory compiles and the benchmark times: an operation, forward or forward+backward, at a shape."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

import kernels_pallas as ops


class Shape(NamedTuple):
    """The sizes of a case; the defaults are those of the README's table."""

    batch: int = 1
    seq_len: int = 8192
    heads: int = 32
    key_dim: int = 128
    value_dim: int = 128
    dtype: str = "bfloat16"
    packed: bool = False

    @property
    def token_heads(self) -> int:
        """Tokens times heads."""
        return self.batch * self.seq_len * self.heads


class Case(NamedTuple):
    """An operation to compile or time.

    run: computes (output, state) of its arrays.
    arrays: from a Shape, (dims, dtype) of every array argument.
    backward: whether the gradient of every array is computed too.
    decode: one token per sequence: `seq_len` is not used, and the last arguments are the state.
    kernel: what the names of its kernels begin with; empty: the operation's name.
    """

    run: Callable
    arrays: Callable[[Shape], list]
    backward: bool = False
    decode: bool = False
    kernel: str = ""


def _tokens(n_scalars: int):
    """Returns the arrays q, k, v and n numbers per token and head, as `Case.arrays`."""

    def arrays(s: Shape):
        B, T, H = s.batch, s.seq_len, s.heads
        heads = [((B, T, H, s.key_dim), s.dtype)] * 2 + [((B, T, H, s.value_dim), s.dtype)]
        return heads + [((B, T, H), "float32")] * n_scalars

    return arrays


def _token(n_scalars: int, *states: str):
    """Returns the arrays q, k, v of one token, n numbers per head, and states of the named sizes ("KK", "KV")."""

    def arrays(s: Shape):
        B, H, size = s.batch, s.heads, dict(K=s.key_dim, V=s.value_dim)
        heads = [((B, H, s.key_dim), s.dtype)] * 2 + [((B, H, s.value_dim), s.dtype)]
        return heads + [((B, H), "float32")] * n_scalars + [((B, H, size[a], size[b]), "float32") for a, b in states]

    return arrays


def _conv(s: Shape):
    D = s.heads * s.key_dim
    return [((s.batch, s.seq_len, D), s.dtype), ((D, 4), s.dtype)]


def _rotated(rank: int):
    """Returns the arrays of `mamba3` with so many inputs and outputs per token, half of the channels rotated, as `Case.arrays`."""

    def arrays(s: Shape):
        B, T, H, R = s.batch, s.seq_len, s.heads, rank
        heads = [((B, T, R, H, s.key_dim), s.dtype)] * 2 + [((B, T, R, H, s.value_dim), s.dtype)]
        return heads + [((B, T, H), "float32")] * 3 + [((B, T, H, s.key_dim // 4), "float32")]

    return arrays


def _kalmanet_step(*args, **options):
    *args, h_kk, h_kv = args
    return ops.gated_kalmanet_step(*args, state=(h_kk, h_kv), **options)


def _with_state(step):
    return lambda *args, **options: step(*args[:-1], state=args[-1], **options)


CG = dict(solver="cg", num_iter=18)
accurate = functools.partial(ops.gated_kalmanet, precision="accurate")
conjugate = functools.partial(ops.gated_kalmanet, **CG)
CASES = {
    "linear_attention": Case(ops.linear_attention, _tokens(1)),
    "linear_attention.backward": Case(ops.linear_attention, _tokens(1), backward=True),
    "gated_delta_rule": Case(ops.gated_delta_rule, _tokens(2)),
    "gated_delta_rule.backward": Case(ops.gated_delta_rule, _tokens(2), backward=True),
    "gated_kalmanet": Case(ops.gated_kalmanet, _tokens(2)),
    "gated_kalmanet.backward": Case(ops.gated_kalmanet, _tokens(2), backward=True),
    "gated_kalmanet_accurate": Case(accurate, _tokens(2), kernel="gated_kalmanet"),
    "gated_kalmanet_accurate.backward": Case(accurate, _tokens(2), backward=True, kernel="gated_kalmanet"),
    "gated_kalmanet_cg": Case(conjugate, _tokens(2), kernel="gated_kalmanet"),
    "gated_kalmanet_cg.backward": Case(conjugate, _tokens(2), backward=True, kernel="gated_kalmanet"),
    "mamba3": Case(ops.mamba3, _rotated(1), kernel="linear_attention"),
    "mamba3.backward": Case(ops.mamba3, _rotated(1), backward=True, kernel="linear_attention"),
    "mamba3_mimo": Case(ops.mamba3, _rotated(4), kernel="linear_attention"),
    "mamba3_mimo.backward": Case(ops.mamba3, _rotated(4), backward=True, kernel="linear_attention"),
    "short_conv": Case(ops.short_conv, _conv),
    "short_conv.backward": Case(ops.short_conv, _conv, backward=True),
    "linear_attention_step": Case(_with_state(ops.linear_attention_step), _token(1, "KV"), decode=True),
    "gated_delta_rule_step": Case(_with_state(ops.gated_delta_rule_step), _token(2, "KV"), decode=True),
    "gated_kalmanet_step": Case(_kalmanet_step, _token(2, "KK", "KV"), decode=True),
    "gated_kalmanet_cg_step": Case(
        functools.partial(_kalmanet_step, **CG), _token(2, "KK", "KV"), decode=True, kernel="gated_kalmanet_step"
    ),
}


def program(case: Case, shape: Shape, implementation: str | None) -> tuple[Callable, list]:
    """Returns the function to compile, and (dims, dtype) of its arguments; with `backward` the last is the output's cotangent."""
    arrays = case.arrays(shape)
    if shape.packed and not case.decode:
        arrays = [*arrays, ((shape.batch, shape.seq_len), "int32")]
    packed = shape.packed and not case.decode

    def forward(*args):
        *args, segment_ids = args if packed else (*args, None)
        options = {} if case.decode else dict(segment_ids=segment_ids)
        return case.run(*args, implementation=implementation, **options)

    if not case.backward:
        return forward, arrays
    n = len(arrays) - packed

    def forward_backward(*args):
        *args, cotangent = args
        o, pull = jax.vjp(lambda *x: forward(*x, *args[n:])[0], *args[:n])
        return o, pull(cotangent)

    out = jax.eval_shape(forward, *(jax.ShapeDtypeStruct(*a) for a in arrays))[0]
    return forward_backward, [*arrays, (out.shape, out.dtype.name)]


def random_arrays(case: Case, shape: Shape, seed: int = 0) -> list[jax.Array]:
    """Returns inputs similar to a model's: keys of norm 1, small decays, gates in (0, 1)."""
    arrays = program(case, shape, "xla")[1]
    values, scalars = [], 0
    for n, ((dims, dtype), key) in enumerate(zip(arrays, jax.random.split(jax.random.key(seed), len(arrays)), strict=True)):
        if dtype == "int32":
            values.append(jnp.broadcast_to(jnp.arange(dims[1]) // 1000, dims).astype(dtype))
            continue
        x = jax.random.normal(key, dims)
        if len(dims) == 4 and dims[-1] == dims[-2] and case.decode:
            x = jnp.einsum("bhij,bhkj->bhik", x, x) / dims[-1]
        elif n < 2 and len(dims) > 2:
            x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        elif dtype == "float32" and len(dims) in (2, 3):
            x, scalars = (-0.1 * jax.nn.sigmoid(x) if scalars == 0 else jax.nn.sigmoid(x)), scalars + 1
        values.append(x.astype(dtype))
    return values
