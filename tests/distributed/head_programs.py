"""Mixers and generation on a mesh whose `tensor` does not divide their heads of keys, beside one device; run by test_groups.py.

    python -m tests.distributed.head_programs 0 1 PORT

prints one line of JSON: the relative errors of two mixers with key heads of their own, and the tokens of two models, with and
without a mesh.
"""

import json
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_jax.config import GDNConfig, GKAConfig
from hybrid_jax.convert import load_model, save_model
from hybrid_jax.generation import generate
from hybrid_jax.layers import make_mixer
from hybrid_jax.parallel.mesh import check_mesh_fits, make_mesh
from tests.conftest import relative_error, tiny_config, tiny_model

MIXERS = {
    "GDN": {"gdn": GDNConfig(key_heads=3, value_heads=12, value_size=8, state_size=8)},
    "GKA": {"gka": GKAConfig(key_heads=1, value_heads=4, value_size=8, state_size=8)},
}


def mixer_error(symbol, mesh):
    config = tiny_config(symbol, vocab_size=62, num_heads=4, num_kv_heads=2, **MIXERS[symbol])
    check_mesh_fits(config, mesh, 2, 16)
    structure, state = nnx.split(make_mixer(config.layers[0].kind, config, 0, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (2, 16, config.hidden_size))
    at = dict(positions=jnp.arange(16)[None].repeat(2, 0), segment_ids=jnp.ones((2, 16), jnp.int32))

    def run(state, x):
        return nnx.merge(structure, state)(x, **at)[0]

    want = jax.jit(run)(state, x)
    with jax.set_mesh(mesh):
        return float(relative_error(jax.jit(run)(state, x), want))


def tokens(symbol, mesh):
    with tempfile.TemporaryDirectory() as directory:
        save_model(tiny_model(symbol, vocab_size=62, num_heads=2, num_kv_heads=1), f"{directory}/model")
        alone, sharded = load_model(f"{directory}/model"), load_model(f"{directory}/model", mesh=mesh)
    prompt: Any = ([[1, 2, 3, 4]],)
    return [generate(alone, *prompt, max_new_tokens=3), generate(sharded, *prompt, max_new_tokens=3, mesh=mesh)]


def main(process, processes, port):
    del process, processes, port
    mesh = make_mesh({"tensor": 2}, jax.devices()[:2])
    errors = {symbol: mixer_error(symbol, mesh) for symbol in MIXERS}
    print(json.dumps({"errors": errors, "tokens": {symbol: tokens(symbol, mesh) for symbol in ("*", "GDN")}}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
