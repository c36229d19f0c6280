"""A model with other iterations of Gated KalmaNet, on a mesh of two CPU devices that shards its tokens; run by test_iterations.py.

    python -m tests.distributed.iteration_programs 0 1 PORT

prints one line of JSON: whether its outputs are, bit for bit, those of a model whose config has so many, and those of the trained one.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import with_iterations
from hybrid_jax.config import GKAConfig
from hybrid_jax.parallel.mesh import make_mesh
from hybrid_jax.parallel.sequence import to_zigzag
from hybrid_jax.parameters import with_config
from tests.conftest import tiny_model


def main() -> None:
    model, mesh = tiny_model("*-GKA-GKA", gka=GKAConfig(num_iter=6, chunk_size=16)), make_mesh({"seq": 2})
    config = model.config.with_options(dataclasses.replace(model.config.options(GKAConfig), num_iter=2))
    ids = np.random.default_rng(0).integers(1, 61, (1, 16))
    arrays = [to_zigzag(jnp.asarray(x), 2) for x in (ids, np.ones_like(ids), np.arange(16)[None])]
    with jax.set_mesh(mesh):
        found = [
            np.asarray(jax.jit(lambda *x, m=m: m.hidden_states(*x)[0])(*arrays))
            for m in (with_iterations(model, 2), with_config(model, config), model)
        ]
    equal = [np.array_equal(found[0], other) for other in found[1:]]
    print(json.dumps(dict(zip(("equal to the config's", "equal to the trained"), equal, strict=True))), flush=True)


if __name__ == "__main__":
    main()
