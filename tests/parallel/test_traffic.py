"""What parameters cost on the wire, counted in what the TPU compiler makes of them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_jax.parallel.cross_entropy import cross_entropy
from hybrid_jax.parallel.embedding import lookup
from hybrid_jax.parallel.mesh import make_mesh
from hybrid_jax.parallel.sharding import TOKENS, gathered, partition_spec
from hybrid_jax.plan.program import topology_devices
from hybrid_jax.plan.wire import wire_bytes

DATA, FSDP, SIZE = 4, 4, 1024


@pytest.fixture(scope="module")
def mesh():
    pytest.importorskip("libtpu")
    return make_mesh(dict(data=DATA, fsdp=FSDP), topology_devices("v5e", "4x4"))


def wire_of_gradient(mesh, function, parameter, axes, *inputs):
    """Collectives of function(parameter, *inputs)'s gradient to `parameter`, which is sharded by its axes."""

    def placed(shape, dtype, axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition_spec(mesh, axes)))

    arguments = (placed(parameter, jnp.float32, axes), *(placed(shape, dtype, TOKENS) for shape, dtype in inputs))
    step = jax.grad(lambda *x: jnp.sum(function(*x).astype(jnp.float32) ** 2))
    with jax.set_mesh(mesh):
        where = NamedSharding(mesh, PartitionSpec(*partition_spec(mesh, axes)))
        return wire_bytes(jax.jit(step, out_shardings=where).lower(*arguments).compile().as_text())


def test_a_layer_s_parameters_are_gathered_and_its_gradients_scattered_in_the_compute_dtype(mesh):
    hidden = ((16, 256, SIZE), jnp.bfloat16)
    axes = ("embed", "mlp")
    found = wire_of_gradient(mesh, lambda w, x: x @ gathered(w.astype(x.dtype), axes), (SIZE, SIZE), axes, hidden)
    whole = 2 * SIZE * SIZE * (FSDP - 1) / FSDP  # bf16
    assert found["all-gather"] == whole and found["reduce-scatter"] <= 1.2 * whole
    assert found.get("all-reduce", 0) <= 2 * 1.2 * 2 * SIZE * SIZE / FSDP  # of the parts, over `data`


def test_the_gradient_of_a_gathered_parameter_is_sharded_as_the_parameter_is(mesh):
    """Also where nothing else asks for it; else the sum would stand on every device."""
    axes = ("embed", "mlp")
    where = NamedSharding(mesh, partition_spec(mesh, axes))
    w = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32, sharding=where)
    x = jax.ShapeDtypeStruct((16, 256, SIZE), jnp.float32, sharding=NamedSharding(mesh, partition_spec(mesh, TOKENS)))

    def gradient(w, x):
        return jax.grad(lambda w: jnp.sum((x @ gathered(w, axes)) ** 2))(w)

    with jax.set_mesh(mesh):
        compiled = jax.jit(gradient).lower(w, x).compile()
    assert compiled.output_shardings.is_equivalent_to(where, 2)


def test_embeddings_cost_the_tokens_not_the_table(mesh):
    ids, vocab = ((16, 256), jnp.int32), 2**15
    found = wire_of_gradient(mesh, lambda w, ids: lookup(w, ids, jnp.bfloat16), (vocab, SIZE), ("vocab", "embed"), ids)
    tokens = 2 * 256 * SIZE  # bytes of a device's hidden states
    assert found["all-to-all"] <= 2 * tokens and found.get("all-gather", 0) <= 4 * 16 * 256
    assert found["all-reduce"] <= 2 * 4 * vocab * SIZE / FSDP  # the gradient over `data`, float32


def test_the_head_is_gathered_once_for_forward_and_backward(mesh):
    ids, hidden, vocab = ((16, 256), jnp.int32), ((16, 256, SIZE), jnp.bfloat16), 2**13
    found = wire_of_gradient(mesh, lambda w, h, t: cross_entropy(h, w, t), (SIZE, vocab), ("embed", "vocab"), hidden, ids)
    assert found["all-gather"] == 2 * vocab * SIZE * (FSDP - 1) / FSDP
    assert found.get("all-reduce", 0) + found.get("reduce-scatter", 0) <= 2 * 2 * vocab * SIZE
