"""A mixer as a program for a TPU computes it: interpreted kernels and joint products equal the portable form."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from hybrid_jax.config import Mamba3Config
from hybrid_jax.layers import linear, make_mixer
from kernels_pallas import arguments, mosaic
from tests.conftest import relative_error, tiny_config

T = 40


def outputs(config):
    """A mixer's output on packed rows, and the gradients of its input and its parameters."""
    mixer = make_mixer(config.layers[0].kind, config, 0, rngs=nnx.Rngs(0))
    structure, state = nnx.split(mixer)
    x, cotangent = (jax.random.normal(jax.random.key(n), (2, T, config.hidden_size)) for n in (1, 2))
    at = dict(positions=jnp.arange(T)[None].repeat(2, 0) % 25, segment_ids=jnp.repeat(jnp.array([[1, 2], [3, 3]]), T // 2, axis=1))

    @jax.jit
    def run(state, x):
        y, pull = jax.vjp(lambda state, x: nnx.merge(structure, state)(x, **at)[0], state, x)
        return y, pull(cotangent)

    return run(jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(3), p.shape), state), x)


KERNELS = {
    "*": {"qk_norm_rope"},
    "GDN": {"short_conv", "gated_delta_rule", "gated_rms_norm"},
    "GKA": {"short_conv", "gated_kalmanet", "gated_rms_norm"},
    "M2": {"short_conv", "linear_attention", "gated_rms_norm"},
    "M3": {"angle_sums", "qk_norm_turn", "linear_attention", "gated_rms_norm"},
    "M3 of two inputs, in halves": {"angle_sums", "qk_norm_turn", "linear_attention", "gated_rms_norm"},
    "DM2": {"short_conv", "linear_attention"},
}
OPTIONS = {"M3 of two inputs, in halves": dict(mamba3=Mamba3Config(rank=2, rotate_halves=True))}


@pytest.mark.parametrize("case", KERNELS)
def test_a_mixer_s_tpu_path_equals_its_portable_form(case, monkeypatch):
    symbol, sizes = case.split()[0], dict(hidden_size=32, num_heads=4, num_kv_heads=2)
    sizes["head_dim"] = 128 if symbol in ("*", "M3") else 64
    config, names, run = tiny_config(symbol, qk_norm=True, **sizes, **OPTIONS.get(case, {})), set(), mosaic.run
    want = outputs(config)
    monkeypatch.setattr(mosaic, "run", lambda kernel, grid, name, *rest: (names.add(name), run(kernel, grid, name, *rest))[1])
    monkeypatch.setattr(arguments, "backend", lambda: "tpu")
    monkeypatch.setattr(linear, "backend", lambda: "tpu")
    got = outputs(config)
    assert names == {f"{kernel}_{way}" for kernel in KERNELS[case] for way in ("forward", "backward")}
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(a, b) < 2e-4


def test_parts_of_equal_widths_are_products_of_their_own(monkeypatch):
    made = linear.Linear(3, 8, std=1.0, bias=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 3))
    want = made.parts(x, (4, 4))
    monkeypatch.setattr(linear, "backend", lambda: "tpu")
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(made.parts(x, (4, 4)), want, strict=True))
