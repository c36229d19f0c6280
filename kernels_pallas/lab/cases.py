"""What the laboratory compiles and the benchmark times: an operation, forward or forward+backward, at a shape."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

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
    options: from a Shape, further keywords of `run`.
    """

    run: Callable
    arrays: Callable[[Shape], list]
    backward: bool = False
    decode: bool = False
    kernel: str = ""
    options: Callable[[Shape], dict] = lambda shape: {}


def _tokens(n_scalars: int):
    """Returns the arrays q, k, v and n numbers per token and head, as `Case.arrays`."""

    def arrays(s: Shape):
        B, T, H = s.batch, s.seq_len, s.heads
        heads = [((B, T, H, s.key_dim), s.dtype)] * 2 + [((B, T, H, s.value_dim), s.dtype)]
        return heads + [((B, T, H), "float32")] * n_scalars

    return arrays


def _grouped(n_scalars: int):
    """Returns the arrays of `_tokens`, four heads (or the most that divide the heads) sharing one of k and v, as `Case.arrays`."""

    def arrays(s: Shape):
        q, _, _, *scalars = _tokens(n_scalars)(s)
        _, *kv = _tokens(0)(s._replace(heads=s.heads // math.gcd(s.heads, 4)))
        return [q, *kv, *scalars]

    return arrays


def _mamba2(s: Shape):
    """Returns q, k, v as `_grouped`, log decays, dt and the skip D."""
    return [*_grouped(2)(s), ((s.heads,), "float32")]


def _linear_attention_of_mamba2(q, k, v, log_decay, dt, skip, **options):
    return ops.linear_attention(q, k, v, log_decay, value_scale=dt, skip=skip, **options)


def _kalmanet_with_beta(q, k, v, alpha, log_decay, beta, **options):
    return ops.gated_kalmanet(q, k, v, alpha, log_decay, beta=beta, **options)


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


def _normed(kind: Literal["l2", "rms"]):
    """Returns the options of a convolution that norms every head, as `Case.options`."""
    return lambda s: dict(norm=ops.HeadNorm(kind, s.key_dim))


def _conv_rms(s: Shape):
    return [*_conv(s), ((s.key_dim,), s.dtype)]


def _short_conv_rms(x, weight, norm_weight, **options):
    return ops.short_conv(x, weight, norm_weight=norm_weight, **options)


def _gated(s: Shape):
    o = ((s.batch, s.seq_len, s.heads, s.value_dim), s.dtype)
    return [o, o, ((s.value_dim,), s.dtype)]


def _without_segments(op):
    """Returns an operation that norms every token by itself, with the keywords and the results of the others."""

    def run(*args, segment_ids, **options):
        del segment_ids
        return op(*args, **options), None

    return run


def _hidden(s: Shape):
    D = s.heads * s.key_dim
    x = ((s.batch, s.seq_len, D), s.dtype)
    return [x, x, ((D,), s.dtype)]


def _rms_norm(x, residual, weight, **options):
    return ops.rms_norm(x, weight, 1e-6, residual, **options)


def _queries_keys(s: Shape):
    x, w, table = (s.batch, s.seq_len, s.heads, s.key_dim), (s.key_dim,), (s.batch, s.seq_len, s.key_dim // 2)
    return [(x, s.dtype)] * 2 + [(w, s.dtype)] * 2 + [(table, "float32")] * 2


def _queries_keys_angles(s: Shape):
    """Returns the arrays of `qk_norm_turn`: four heads (or the most that divide the heads) share one of the keys, and half of the
    channels are rotated."""
    B, T, H, K = s.batch, s.seq_len, s.heads, s.key_dim
    heads = [((B, T, 1, n, K), s.dtype) for n in (H, H // math.gcd(H, 4))]
    return [*heads, *[((K,), s.dtype)] * 2, *[((H, 1, K), s.dtype)] * 2, ((B, T, H, K // 4), "float32")]


def _rates(s: Shape):
    return [((s.batch, s.seq_len, s.key_dim // 4), "float32"), ((s.batch, s.seq_len, s.heads), "float32")]


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
accurate_conjugate = functools.partial(accurate, solver="cg", num_iter=30)
CASES = {
    "linear_attention": Case(ops.linear_attention, _tokens(1)),
    "linear_attention.backward": Case(ops.linear_attention, _tokens(1), backward=True),
    "gated_delta_rule": Case(ops.gated_delta_rule, _tokens(2)),
    "gated_delta_rule.backward": Case(ops.gated_delta_rule, _tokens(2), backward=True),
    "linear_attention_grouped": Case(ops.linear_attention, _grouped(1), kernel="linear_attention"),
    "linear_attention_grouped.backward": Case(ops.linear_attention, _grouped(1), backward=True, kernel="linear_attention"),
    "gated_delta_rule_grouped": Case(ops.gated_delta_rule, _grouped(2), kernel="gated_delta_rule"),
    "gated_delta_rule_grouped.backward": Case(ops.gated_delta_rule, _grouped(2), backward=True, kernel="gated_delta_rule"),
    "mamba2": Case(_linear_attention_of_mamba2, _mamba2, kernel="linear_attention"),
    "mamba2.backward": Case(_linear_attention_of_mamba2, _mamba2, backward=True, kernel="linear_attention"),
    "gated_kalmanet": Case(ops.gated_kalmanet, _tokens(2)),
    "gated_kalmanet.backward": Case(ops.gated_kalmanet, _tokens(2), backward=True),
    "gated_kalmanet_accurate": Case(accurate, _tokens(2), kernel="gated_kalmanet"),
    "gated_kalmanet_accurate.backward": Case(accurate, _tokens(2), backward=True, kernel="gated_kalmanet"),
    "gated_kalmanet_accurate_cg": Case(accurate_conjugate, _tokens(2), kernel="gated_kalmanet"),
    "gated_kalmanet_accurate_cg.backward": Case(accurate_conjugate, _tokens(2), backward=True, kernel="gated_kalmanet"),
    "gated_kalmanet_cg": Case(conjugate, _tokens(2), kernel="gated_kalmanet"),
    "gated_kalmanet_cg.backward": Case(conjugate, _tokens(2), backward=True, kernel="gated_kalmanet"),
    "gated_kalmanet_grouped": Case(_kalmanet_with_beta, _grouped(3), kernel="gated_kalmanet"),
    "gated_kalmanet_grouped.backward": Case(_kalmanet_with_beta, _grouped(3), backward=True, kernel="gated_kalmanet"),
    "mamba3": Case(ops.mamba3, _rotated(1), kernel="linear_attention"),
    "mamba3.backward": Case(ops.mamba3, _rotated(1), backward=True, kernel="linear_attention"),
    "mamba3_mimo": Case(ops.mamba3, _rotated(4), kernel="linear_attention"),
    "mamba3_mimo.backward": Case(ops.mamba3, _rotated(4), backward=True, kernel="linear_attention"),
    "short_conv": Case(ops.short_conv, _conv),
    "short_conv.backward": Case(ops.short_conv, _conv, backward=True),
    "short_conv_l2": Case(ops.short_conv, _conv, kernel="short_conv", options=_normed("l2")),
    "short_conv_l2.backward": Case(ops.short_conv, _conv, backward=True, kernel="short_conv", options=_normed("l2")),
    "short_conv_rms": Case(_short_conv_rms, _conv_rms, kernel="short_conv", options=_normed("rms")),
    "short_conv_rms.backward": Case(_short_conv_rms, _conv_rms, backward=True, kernel="short_conv", options=_normed("rms")),
    "gated_rms_norm": Case(_without_segments(ops.gated_rms_norm), _gated),
    "gated_rms_norm.backward": Case(_without_segments(ops.gated_rms_norm), _gated, backward=True),
    "rms_norm": Case(_without_segments(_rms_norm), _hidden),
    "rms_norm.backward": Case(_without_segments(_rms_norm), _hidden, backward=True),
    "qk_norm_rope": Case(_without_segments(ops.qk_norm_rope), _queries_keys),
    "qk_norm_rope.backward": Case(_without_segments(ops.qk_norm_rope), _queries_keys, backward=True),
    "qk_norm_turn": Case(_without_segments(ops.qk_norm_turn), _queries_keys_angles),
    "qk_norm_turn.backward": Case(_without_segments(ops.qk_norm_turn), _queries_keys_angles, backward=True),
    "angle_sums": Case(ops.angle_sums, _rates),
    "angle_sums.backward": Case(ops.angle_sums, _rates, backward=True),
    "linear_attention_step": Case(_with_state(ops.linear_attention_step), _token(1, "KV"), decode=True),
    "gated_delta_rule_step": Case(_with_state(ops.gated_delta_rule_step), _token(2, "KV"), decode=True),
    "gated_kalmanet_step": Case(_kalmanet_step, _token(2, "KK", "KV"), decode=True),
    "gated_kalmanet_cg_step": Case(
        functools.partial(_kalmanet_step, **CG), _token(2, "KK", "KV"), decode=True, kernel="gated_kalmanet_step"
    ),
}


def program(case: Case, shape: Shape, implementation: str | None) -> tuple[Callable, list]:
    """Returns the function to compile, and (dims, dtype) of its arguments; with `backward` the last are the outputs' cotangents."""
    arrays = case.arrays(shape)
    if shape.packed and not case.decode:
        arrays = [*arrays, ((shape.batch, shape.seq_len), "int32")]
    packed = shape.packed and not case.decode

    def forward(*args):
        *args, segment_ids = args if packed else (*args, None)
        options = case.options(shape) | ({} if case.decode else dict(segment_ids=segment_ids))
        return case.run(*args, implementation=implementation, **options)

    if not case.backward:
        return forward, arrays
    n = len(arrays) - packed

    def forward_backward(*args):
        o, pull = jax.vjp(lambda *x: forward(*x, *args[n : len(arrays)])[0], *args[:n])
        return o, pull(jax.tree.unflatten(jax.tree.structure(o), args[len(arrays) :]))

    outputs = jax.tree.leaves(jax.eval_shape(forward, *(jax.ShapeDtypeStruct(*a) for a in arrays))[0])
    return forward_backward, [*arrays, *((out.shape, out.dtype.name) for out in outputs)]


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
