"""Mixing matrices: a mixer's output is made of its matrices and its values, in blocks of rows too, with gradients."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax.config import DiscreteMamba2Config, GDNConfig, GKAConfig, HeadHybridConfig, Mamba2Config, Mamba3Config
from hybrid_jax.layers import make_mixer
from hybrid_jax.layers.mixing import over_blocks
from hybrid_jax.parallel.sequence import positions_of
from kernels_pallas.numerics import rms_normalize
from tests.conftest import relative_error, tiny_config

B, T = 2, 37  # more than a chunk of GKA, and no multiple of one
SEGMENTS = np.stack([np.repeat([1, 2, 3, 0], [19, 1, 14, 3]), np.repeat([1, 2, 0], [8, 27, 2])])
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, 24)), jnp.float32)
AT = dict(positions=jnp.asarray(positions_of(SEGMENTS)), segment_ids=jnp.asarray(SEGMENTS))
CASES = {
    "attention": ("attention", {}),
    "swa": ("swa", {}),
    "gdn": ("gdn", dict(gdn=GDNConfig(allow_neg_eigval=True, state_size=5))),
    "gka": ("gka", dict(gka=GKAConfig(chunk_size=16))),
    "gka, no gates": ("gka", dict(gka=GKAConfig(use_beta_gate=False, use_alpha_connection=False), num_kv_heads=4)),
    "gka of heads of its own, expanded": ("gka", dict(gka=GKAConfig(key_heads=2, value_heads=4, value_size=5, kv_proj_rank=3))),
    "mamba2": ("mamba2", dict(mamba2=Mamba2Config(state_size=4))),
    "discrete_mamba2": ("discrete_mamba2", dict(discrete_mamba2=DiscreteMamba2Config(state_size=4, qk_heads=2))),
    "mamba3": ("mamba3", dict(mamba3=Mamba3Config())),
    "mamba3 of rank 3": ("mamba3", dict(mamba3=Mamba3Config(rank=3, out_norm=False))),
}


@functools.cache
def mixer(case) -> Any:
    """A mixer whose biases, gates and skips are not what they are at first."""
    kind, changes = CASES[case]
    made, rng, flat = make_mixer(kind, tiny_config("*", **changes), 0, rngs=nnx.Rngs(0)), np.random.default_rng(1), []
    for path, parameter in nnx.to_flat_state(nnx.state(made)):
        name, value = str(path[-1]), parameter[...]
        if name in ("mimo_x", "mimo_o"):  # the channels of a head agree
            value = jnp.broadcast_to(rng.normal(size=(*value.shape[:2], 1)).astype(np.float32), value.shape)
        elif value.ndim == 1 or name.endswith("_bias"):
            value = value + 0.5 * rng.normal(size=value.shape).astype(np.float32)
        flat.append((path, parameter.replace(value)))
    nnx.update(made, nnx.from_flat_state(flat))
    return made


def finish(kind, m, o, x):
    """What a mixer makes of the heads' outputs [B, T, H, D]: norm, gate, projection."""
    flat = (*o.shape[:2], -1)
    if kind in ("attention", "swa"):
        return m.o_proj(o.reshape(flat))
    if kind in ("gdn", "gka"):
        return m.o_proj(m.o_norm(o).reshape(flat) * jax.nn.silu(m.g_proj(x)))
    if kind == "discrete_mamba2":
        return m.out_proj(o.reshape(flat) * jax.nn.silu(m.in_proj.parts(x, m.sizes)[3] + m.z_bias[...]))
    z = jax.nn.silu(m.in_proj(x)[..., : o.shape[2] * o.shape[3]].reshape(o.shape))
    if kind == "mamba2":
        return m.out_proj(rms_normalize(o * z, m.norm.weight[...].reshape(o.shape[2:]), 1e-5).reshape(flat))
    return m.out_proj(((o if m.norm is None else m.norm(o)) * z).reshape(flat))


@nnx.jit
def blocks_and_output(m, x):
    mixing = m.mixing(x, **AT)
    return over_blocks(lambda begin, rows: (begin, rows), mixing, rows=16), mixing.values, m(x, **AT)[0]


@pytest.mark.parametrize("case", CASES)
def test_a_mixer_s_output_is_its_matrices_times_its_values(case):
    m = mixer(case)
    (begins, blocks), v, y = blocks_and_output(m, X)
    assert begins.tolist() == [0, 16, 32] and blocks.shape == (3, B, 4, 16, T) and blocks.dtype == jnp.float32
    M = np.moveaxis(np.asarray(blocks), 0, 2).reshape(B, 4, 48, T)
    assert not M[:, :, T:].any(), "rows behind the last token are 0"
    o = jnp.einsum("bhts,bshd->bthd", M[:, :, :T], v, precision="highest")
    inside = SEGMENTS > 0
    assert relative_error(finish(CASES[case][0], m, o, X)[inside], y[inside]) < 1e-4
    sees = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & np.tril(np.ones((T, T), bool))
    assert not np.any(np.where(sees[:, None], 0, M[:, :, :T])), "a token has a value of another segment, or a later one"


def test_matrices_of_a_hybrid_of_heads_are_those_of_its_mixer_and_behind_them_those_of_the_kept_heads():
    config = tiny_config("GDN[1,2]").with_options(HeadHybridConfig("sum"))
    m: Any = make_mixer("gdn", config, 0, rngs=nnx.Rngs(3))
    mixing = m.mixing(X, **AT)
    o = jnp.einsum("bhts,bshd->bthd", over_blocks(lambda begin, rows: rows, mixing, rows=T)[0], mixing.values, precision="highest")
    y = finish("gdn", m.recurrent, o[:, :, :4], X) + finish("attention", m.attention, o[:, :, 4:], X)
    assert o.shape[2] == 6 and relative_error(y[SEGMENTS > 0], m(X, **AT)[0][SEGMENTS > 0]) < 1e-4


def steps(way, size):
    return jax.tree.map(lambda d: size * d, way), jax.tree.map(lambda d: -size * d, way)


@pytest.mark.parametrize("case", ["gdn", "discrete_mamba2", "mamba3 of rank 3", "gka, no gates", "gka"])
def test_a_distance_of_matrices_has_the_gradient_that_its_differences_say(case):
    """As in the matrix orientation of MOHAWK: the squared distance of a student's matrices to a teacher's, in blocks."""
    graph, parameters = nnx.split(mixer(case))
    teacher = mixer("swa").mixing(X, **AT)

    @jax.jit
    @jax.value_and_grad
    def distance(parameters):
        student = cast(Any, nnx.merge(graph, parameters)).mixing(X, **AT)
        return jnp.sum(over_blocks(lambda begin, a, b: jnp.sum((a - b) ** 2), student, teacher, rows=32))

    way = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(2).normal(size=x.shape), x.dtype), parameters)
    after, before = (distance(jax.tree.map(lambda x, d: x + d, parameters, step))[0] for step in steps(way, 1e-3))
    gradient = distance(parameters)[1]
    slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))
    assert float(slope) == pytest.approx(float(after - before) / 2e-3, rel=2e-2) and abs(slope) > 0.1
