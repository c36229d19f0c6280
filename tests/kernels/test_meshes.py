"""Operations under `jax.shard_map` with its check of varying axes, its default, and under a mesh with Explicit axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import kernels_pallas as kp
from hybrid_jax.parallel import attention_block, tiles
from hybrid_jax.parallel.attention import Part, parts_attention
from hybrid_jax.parallel.attention_block import Mask
from hybrid_jax.parallel.cross_entropy import cross_entropy
from kernels_pallas import mosaic
from tests.conftest import relative_error, tiny_model
from tests.kernels.conftest import cut, make_inputs, make_state, run

OPS = ["linear_attention", "gated_delta_rule", "gated_kalmanet", "ssd", "short_conv"]
ROWS, HERE = PartitionSpec("data"), PartitionSpec()


def on(mesh, function, inputs, rows=ROWS):
    """function(inputs) in `jax.shard_map`: what has a batch is split over `data`, the rest is replicated."""
    specs = {n: HERE if n in ("a", "d", "weight", "bias") else rows for n in inputs}
    return jax.shard_map(function, mesh=mesh, in_specs=(specs,), out_specs=rows)


def loss(op, implementation, inputs):
    o, state = run(op, inputs, implementation, **({"num_iter": 3} if op == "gated_kalmanet" else {}))
    return jnp.sum(jnp.sin(o), axis=tuple(range(1, o.ndim))) + sum(
        jnp.sum(s, axis=tuple(range(1, s.ndim))) for s in jax.tree.leaves(state)
    )


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("op", OPS)
def test_values_and_gradients_in_a_shard_map_that_checks_varying_axes_are_those_without(op, implementation):
    inputs = make_inputs(op, 9)
    local = functools.partial(loss, op, implementation)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    got = jax.jit(jax.value_and_grad(lambda x: on(mesh, local, x)(x).sum()))(inputs)
    want = jax.value_and_grad(lambda x: local(x).sum())(inputs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("op", OPS)
def test_steps_and_summaries_trace_in_a_shard_map_that_checks_varying_axes(op):
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    token = jax.tree.map(jnp.asarray, cut(make_inputs(op, 3), 1)) | {"state": make_state(op)}
    with jax.sharding.use_abstract_mesh(mesh):
        step = on(mesh, lambda x: getattr(kp, f"{op}_step")(**x), token)
        assert jax.eval_shape(step, token)[0].shape[0] == 2
        if op in OPS[:3]:
            inputs = {n: x for n, x in make_inputs(op, 9).items() if n not in ("q", "alpha")}
            summary = on(mesh, lambda x: getattr(kp, f"{op}_summary")(**x), inputs)
            assert jax.eval_shape(summary, inputs)[0].shape[0] == 2


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_an_interpreted_kernel_refuses_a_shard_map_that_checks_varying_axes(implementation):
    inputs = make_inputs("linear_attention", 9)
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    call = on(mesh, lambda x: run("linear_attention", x, implementation, None)[0], inputs)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match="use implementation='xla', or jax.shard_map"):
        jax.eval_shape(call, inputs)


@pytest.mark.parametrize("op", [*OPS[:3], "short_conv"])
def test_the_kernels_of_a_tpu_trace_in_a_shard_map_that_checks_varying_axes(op, monkeypatch):
    monkeypatch.setattr(mosaic, "backend", lambda: "tpu")
    inputs = make_inputs(op, 9)
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    local = functools.partial(loss, op, "pallas_tpu")
    with jax.sharding.use_abstract_mesh(mesh):
        assert "pallas_call" in str(jax.make_jaxpr(jax.grad(lambda x: on(mesh, local, x)(x).sum()))(inputs))


@pytest.mark.parametrize("op", OPS)
def test_a_mesh_with_explicit_axes_is_refused_with_what_to_do(op):
    inputs = make_inputs(op, 9)
    token = cut(inputs, 1) | {"state": make_state(op)}
    ids = jnp.ones((2, 9), jnp.int32)
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.sharding.use_abstract_mesh(mesh):
        for call in (lambda: run(op, inputs, segment_ids=ids), lambda: getattr(kp, f"{op}_step")(**token)):
            with pytest.raises(ValueError, match="mesh axes data are of type Explicit.*AxisType.Auto"):
                jax.eval_shape(call)


def test_tiled_attention_and_loss_in_a_shard_map_that_checks_varying_axes_are_those_without(monkeypatch):
    monkeypatch.setattr(attention_block, "TILE", 8)
    monkeypatch.setattr(tiles, "TILE", 8)
    rng = np.random.default_rng(0)
    inputs = {n: jnp.asarray(rng.standard_normal((2, 20, 2, 4)), jnp.float32) for n in "qkv"}
    inputs |= {"weight": jnp.asarray(rng.standard_normal((8, 11)), jnp.float32), "ids": jnp.asarray(rng.integers(0, 11, (2, 20)))}
    segments = jnp.asarray([[0] * 9 + [1] * 11] * 2)

    def local(x, segments):
        o = parts_attention((Part(x["q"], x["k"], x["v"], segments),), segments, (Mask(),))
        return jnp.sum(cross_entropy(o.reshape(*o.shape[:2], -1), x["weight"], x["ids"]), axis=1)

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    specs = ({n: HERE if n == "weight" else ROWS for n in inputs}, ROWS)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=ROWS)
    floats = {n: x for n, x in inputs.items() if n != "ids"}

    def pulled(function):
        return jax.value_and_grad(lambda x: function(x | {"ids": inputs["ids"]}, segments).sum())(floats)

    for a, b in zip(*map(jax.tree.leaves, (pulled(jax.jit(mapped)), pulled(local))), strict=True):
        assert relative_error(a, b) < 1e-5


def test_a_decoder_runs_in_a_shard_map_that_checks_varying_axes_and_refuses_explicit_axes(monkeypatch):
    monkeypatch.setattr(attention_block, "TILE", 8)
    model = tiny_model("*-SWA-GKA-GDN-M2-BMF")
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 12)))
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        local = jax.shard_map(lambda ids: jnp.sum(model(ids), axis=(1, 2)), mesh=mesh, in_specs=ROWS, out_specs=ROWS)
        assert jax.eval_shape(local, ids).shape == (2,)
    explicit = AbstractMesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.sharding.use_abstract_mesh(explicit), pytest.raises(ValueError, match="mesh axes data are of type Explicit"):
        jax.eval_shape(model, ids)
