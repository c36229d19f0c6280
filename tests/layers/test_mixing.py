"""Mixing matrices: a mixer's output is made of its matrices and its values, in blocks of rows too, with gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax.config import GDNConfig, GKAConfig, Mamba2Config, Mamba3Config
from hybrid_jax.layers import make_mixer
from hybrid_jax.layers.linear import rms_norm
from hybrid_jax.layers.mixing import over_blocks
from hybrid_jax.parallel.sequence import positions_of
from tests.conftest import relative_error, tiny_config

B, T = 2, 37  # more than a chunk of GKA, and no multiple of one
SEGMENTS = np.stack([np.repeat([1, 2, 3, 0], [19, 1, 14, 3]), np.repeat([1, 2, 0], [8, 27, 2])])
X = np.random.default_rng(0).normal(size=(B, T, 24)).astype(np.float32)
AT = dict(positions=positions_of(SEGMENTS), segment_ids=jnp.asarray(SEGMENTS))
CASES = {
    "attention": ("attention", {}),
    "attention, one head per key": ("attention", dict(num_kv_heads=4, qk_norm=False)),
    "swa": ("swa", {}),
    "gdn": ("gdn", dict(gdn=GDNConfig(allow_neg_eigval=True))),
    "gdn without conv": ("gdn", dict(gdn=GDNConfig(use_short_conv=False), num_kv_heads=4)),
    X,
    "gka, no gates": ("gka", dict(gka=GKAConfig(use_beta_gate=False, use_alpha_connection=False, use_v_conv=False))),
    "mamba2": ("mamba2", dict(mamba2=Mamba2Config())),
    "mamba3": ("mamba3", dict(mamba3=Mamba3Config(out_norm=True))),
    "mamba3 of rank 3": ("mamba3", dict(mamba3=Mamba3Config(rank=3))),
}


@functools.cache
def mixer(case):
    """A mixer whose biases, gates and skips are not what they are at first."""
    kind, changes = CASES[case]
    made, rng = make_mixer(kind, tiny_config("*", **changes), 0, rngs=nnx.Rngs(0)), np.random.default_rng(1)
    for path, parameter in nnx.to_flat_state(nnx.state(made)):
        name, value = path[-1], parameter[...]
        if name in ("D", "B_bias", "C_bias", "bias", "A_log"):
            parameter.set_value(value + 0.5 * rng.normal(size=value.shape).astype(np.float32))
        if name in ("mimo_x", "mimo_o"):  # the channels of a head agree
            parameter.set_value(jnp.broadcast_to(rng.normal(size=(*value.shape[:2], 1)).astype(np.float32), value.shape))
    nnx.update(made, nnx.state(made))
    return made


def finish(kind, m, o, x):
    """What a mixer makes of the heads' outputs [B, T, H, D]: norm, gate, projection."""
    flat = (*o.shape[:2], -1)
    if kind in ("attention", "swa"):
        return m.o_proj(o.reshape(flat))
    if kind in ("gdn", "gka"):
        return m.o_proj(m.o_norm(o).reshape(flat) * jax.nn.silu(m.g_proj(x)))
    z = jax.nn.silu(m.in_proj(x)[..., : o.shape[2] * o.shape[3]].reshape(o.shape))
    if kind == "mamba2":
        return m.out_proj(rms_norm(o * z, m.norm.weight[...].reshape(o.shape[2:]), 1e-5).reshape(flat))
    return m.out_proj(((o if m.norm is None else m.norm(o)) * z).reshape(flat))


@nnx.jit
def matrix_and_output(m, x):
    mixing = m.mixing(x, **AT)
    blocks = over_blocks(lambda begin, rows: rows, mixing, rows=16)
    return mixing.matrix(), blocks, mixing.values, m(x, **AT)[0]


@pytest.mark.parametrize("case", CASES)
def test_a_mixer_s_output_is_its_matrix_times_its_values(case):
    m = mixer(case)
    M, blocks, v, y = matrix_and_output(m, X)
    assert M.shape == (B, 4, T, T) and M.dtype == jnp.float32 and blocks.shape == (3, B, 4, 16, T)
    o = jnp.einsum("bhts,bshd->bthd", M, v, precision="highest")
    inside = SEGMENTS > 0
    assert relative_error(finish(CASES[case][0], m, o, X)[inside], y[inside]) < 1e-4
    sees = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & np.tril(np.ones((T, T), bool))
    assert not np.any(np.where(sees[:, None], 0, M)), "a token has a value of another segment, or a later one"
    rows = np.moveaxis(np.asarray(blocks), 0, 2).reshape(B, 4, 48, T)
    assert relative_error(rows[:, :, :T], M) < 1e-6 and not rows[:, :, T:].any()
