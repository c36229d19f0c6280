"""FLOPs are counted from what a program multiplies: loops, branches, kernels, experts and every device of a mesh."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from hybrid_jax.config import MoEConfig
from hybrid_jax.flops import count_flops, traced, traced_flops
from hybrid_jax.parallel import attention_block
from hybrid_jax.parallel.attention_block import FULL, Mask
from hybrid_jax.parallel.experts import gradient_of_kernels
from hybrid_jax.parallel.mesh import abstract_mesh, make_mesh
from hybrid_jax.plan.program import program_flops, topology_devices, training_program
from hybrid_jax.train.phase import Phase
from tests.conftest import tiny_config


def test_flops_count_loops_and_branches_and_kernels():
    x = jnp.zeros((4, 8))

    def looped(w):
        def body(h, _):
            return jax.lax.cond(h.sum() > 0, lambda h: h @ w, lambda h: h, h), None

        return jax.lax.scan(body, x, None, length=5)[0]

    assert traced_flops(looped, jnp.zeros((8, 8))) == 5 * 2 * 4 * 8 * 8
    sizes = jnp.asarray([1, 3])
    assert traced_flops(lambda w: jax.lax.ragged_dot(x, w, sizes), jnp.zeros((2, 8, 6))) == 2 * 4 * 8 * 6
    f = jax.checkpoint(lambda w: jnp.sum((x @ w) ** 2))
    assert traced_flops(jax.value_and_grad(f), jnp.zeros((8, 6))) == 3 * 2 * 4 * 8 * 6  # forward, again, and the weights' gradient


def test_flops_of_a_pallas_kernel_are_those_of_every_step_of_its_grid():
    def kernel(x, y, o):
        o[...] = x[...] @ y[...]

    rows, whole = pl.BlockSpec((8, 16), lambda i, j: (i, 0)), pl.BlockSpec((16, 128), lambda i, j: (0, j))
    tiled = pl.pallas_call(
        kernel,
        grid=(3, 2),
        in_specs=[rows, whole],
        out_specs=pl.BlockSpec((8, 128), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((24, 256), jnp.float32),
    )
    assert traced_flops(tiled, jnp.zeros((24, 16)), jnp.zeros((16, 256))) == 2 * 24 * 16 * 256


def test_flops_of_experts_are_the_same_on_every_mesh_and_in_the_kernel_of_the_tpu():
    pytest.importorskip("libtpu")
    sizes = dict(vocab_size=64, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8)
    config, devices = tiny_config("*", family="qwen3_moe", moe=MoEConfig(4, 2, 64), **sizes), topology_devices("v5e", "2x2")
    phase = Phase(objective="next_token", steps=1, batch_size=4, seq_len=64)
    made = [make_mesh(sizes, devices) for sizes in ({"fsdp": 4}, {"expert": 4}, {"fsdp": 2, "expert": 2})]
    counted = [program_flops(training_program(config, phase, mesh))[0] for mesh in made]
    assert counted[1:] == pytest.approx(counted[:1] * 2, rel=0.03)
    x, d, sizes = jnp.zeros((256, 128)), jnp.zeros((256, 64)), jnp.zeros(4, jnp.int32)
    assert traced_flops(gradient_of_kernels, x, d, sizes) == 2 * 256 * 128 * 64


def test_flops_are_those_of_every_device_of_a_mesh():
    def local(x, w):
        return x @ w

    mesh = abstract_mesh({"fsdp": 4, "tensor": 2})
    cut = jax.shard_map(local, mesh=mesh, in_specs=(P("fsdp"), P(None, "tensor")), out_specs=P("fsdp", "tensor"), check_vma=False)
    with jax.sharding.use_abstract_mesh(mesh):
        assert traced_flops(cut, jnp.zeros((16, 8)), jnp.zeros((8, 6))) == 2 * 16 * 8 * 6


@pytest.mark.parametrize("mask, tiles", [(Mask(), 10), (FULL, 16)])
def test_flops_of_splash_attention_leave_out_what_a_causal_mask_hides(monkeypatch, mask, tiles):
    """2048 tokens are 4 x 4 tiles of 512, of which 10 are on the diagonal or below it; 3 query heads of 128 numbers."""
    monkeypatch.setattr(attention_block, "_use_splash", lambda q, k: True)
    q, ids = jnp.zeros((1, 2048, 3, 128), jnp.bfloat16), jnp.ones((1, 2048), jnp.int32)
    product = 2 * 3 * 512 * 512 * 128
    forward = traced_flops(lambda q: attention_block.block_forward(q, q, q, ids, ids, mask), q)
    lse = jnp.zeros((1, 3, 2048))
    backward = traced_flops(lambda q: attention_block.block_backward(q, q, q, ids, ids, mask, q, lse, q), q)
    assert forward == 2 * tiles * product  # scores and values
    rows = 2 * 3 * 2048 * 128  # o times its cotangent, summed
    assert backward == 7 * tiles * product + rows  # kernels for dk and dv, for dq; both make the scores and their gradient


def test_flops_of_named_kernels_are_theirs_alone():
    def product(x, y, o):
        o[...] = x[...] @ y[...]

    def both(x):
        for name in ("delta_rule_forward", "other"):
            x = pl.pallas_call(product, out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32), name=name)(x, x)
        return jax.lax.scan(lambda h, _: (h @ h, None), x, None, length=3)[0]

    jaxpr = traced(both, jnp.zeros((8, 8)))
    assert count_flops(jaxpr, ("delta_rule",)) == 2 * 8**3 and count_flops(jaxpr) == 5 * 2 * 8**3
