"""What the TPU kernels of one token share: several heads' states in VMEM, read once and written once.

Decoding moves states, it computes little: a grid step holds a few of the B*H heads, with q, k as columns of one
transpose, and updates their states in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.arguments import backend
from kernels_pallas.mosaic import VMEM_LIMIT
from kernels_pallas.operands import output_types


def run_step(
    update: Callable[..., tuple[list[jax.Array], ...]],
    name: str,
    vectors: Sequence[jax.Array],
    scalars: Sequence[jax.Array],
    states: Sequence[jax.Array],
    heads: int = 8,
) -> tuple[jax.Array, ...]:
    """Runs one token of every head.

    Args:
      update: (vectors [[n,D], ...], scalars [[n,1], ...], states [[K,V] of n heads], ...) in float32 ->
        (o [[1,V] of n heads], new states likewise).
      vectors: each [B,H,D]; the last one's size is o's.
      scalars: each [B,H].
      states: each [B,H,K,V] float32; their buffers are reused where the caller donates them.
      heads: n, a multiple of 8, the sublanes of a register.

    Returns:
      o [B,H,V] in the last vector's dtype, then the states.
    """
    B, H = vectors[0].shape[:2]
    vectors = [x.reshape(B * H, -1) for x in vectors]
    flat = [s.reshape(B * H, *s.shape[2:]) for s in states]
    table = jnp.stack([x.reshape(B * H).astype(jnp.float32) for x in scalars], axis=1)
    out = jax.ShapeDtypeStruct(vectors[-1].shape, vectors[-1].dtype)
    n_vectors, n_states = len(vectors), len(flat)

    def kernel(*refs):
        inputs, (o, *new) = refs[: n_vectors + 1 + n_states], refs[n_vectors + 1 + n_states :]
        scalars = [inputs[n_vectors][:, i : i + 1] for i in range(table.shape[1])]
        values = [ref[...].astype(jnp.float32) for ref in inputs[:n_vectors]]
        outputs, *updated = update(values, scalars, *([ref[h] for h in range(heads)] for ref in inputs[n_vectors + 1 :]))
        o[...] = jnp.concatenate(outputs, axis=0).astype(o.dtype)
        for ref, state in zip(new, updated, strict=True):
            for h in range(heads):
                ref[h] = state[h]

    def rows(x):
        return pl.BlockSpec((heads, x.shape[1]), lambda n: (n, 0))

    def state(x):
        return pl.BlockSpec((heads, *x.shape[1:]), lambda n: (n, 0, 0))

    steps = -(-B * H // heads)
    o, *new = pl.pallas_call(
        kernel,
        grid=(steps,),
        in_specs=[*map(rows, (*vectors, table)), *map(state, flat)],
        out_specs=[rows(out), *map(state, flat)],
        out_shape=output_types(
            name, [out, *(jax.ShapeDtypeStruct(s.shape, s.dtype) for s in flat)], (*vectors, *flat), backend() != "tpu"
        ),
        input_output_aliases={n_vectors + 1 + i: 1 + i for i in range(n_states)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*vectors, table, *flat, out, *flat))
        ),
        interpret=backend() != "tpu",
        metadata={"grid_steps": str(steps)},
        name=name,
    )(*vectors, table, *flat)
    return o.reshape(B, H, -1), *(s.reshape(old.shape) for s, old in zip(new, states, strict=True))


def columns(x: jax.Array) -> list[jax.Array]:
    """Returns x [n, D] as n columns [D, 1]."""
    cols = x.T
    return [cols[:, h : h + 1] for h in range(x.shape[0])]


def head_rows(x: jax.Array) -> list[jax.Array]:
    """Returns x [n, D] as n rows [1, D]."""
    return [x[h : h + 1] for h in range(x.shape[0])]


def with_gradient_of(reference: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `kernel` with the gradient of `reference`, for the rare caller who differentiates a step."""

    @jax.custom_vjp
    def step(*args):
        return kernel(*args)

    step.defvjp(lambda *args: (kernel(*args), args), lambda args, cotangents: jax.vjp(reference, *args)[1](cotangents))
    return step
