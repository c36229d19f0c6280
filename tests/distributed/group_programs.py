"""Recurrences whose keys and values have fewer heads, on meshes of eight CPU devices, beside one device; run by test_groups.py.

    python -m tests.distributed.group_programs 0 1 PORT

prints one line of JSON: {"CASE ON MESH": [largest relative error of outputs and gradients, heads of k, heads of v on a device]}.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from hybrid_jax.layers.gdn import _rule
from hybrid_jax.parallel import recurrence
from hybrid_jax.parallel.mesh import make_mesh
from hybrid_jax.parallel.recurrence import linear_recurrence
from hybrid_jax.parallel.sequence import from_zigzag, to_zigzag
from hybrid_jax.parallel.sharding import TOKENS, partition_spec
from kernels_pallas import gated_kalmanet, gated_kalmanet_summary
from tests.conftest import relative_error

B, T, H, HK, HV, D = 2, 16, 8, 4, 2, 6
MESHES = ({"seq": 2, "tensor": 4}, {"fsdp": 2, "tensor": 2, "seq": 2}, {"fsdp": 2, "tensor": 4})


def _kalmanet(q, k, v, g, alpha, *, state, segment_ids):
    def op(q, k, v, g, alpha, **options):
        return gated_kalmanet(q, k, v, alpha, g, 1.0, 4, **options)

    summary = lambda q, k, v, g, alpha, **options: gated_kalmanet_summary(k, v, g, **options)  # noqa: E731
    return recurrence.recurrence(op, None, summary, (q, k, v, g, alpha), state=state, segment_ids=segment_ids)


def _linear(q, k, v, g, gate, skip, **options):
    return linear_recurrence((q, k, v, g), value_scale=gate, skip=skip, **options)


CASES = {
    "linear attention": _linear,
    "gated delta rule": lambda q, k, v, g, gate, skip, **options: _rule((q, k, v, g, gate), **options),
    "Gated KalmaNet": lambda q, k, v, g, gate, skip, **options: _kalmanet(q, k, v, g, gate, **options),
}


def draw(tokens):
    keys = iter(jax.random.split(jax.random.key(0), 9))
    q, k, v = (jax.random.normal(next(keys), (B, tokens, n, D)) for n in (H, HK, HV))
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    g, gate = (jax.random.uniform(next(keys), (B, tokens, H)) for _ in range(2))
    return q, k, v, -0.3 * g, gate, jax.random.normal(next(keys), (H,))


def results(run, arrays, segment_ids, state=None):
    """Outputs and, without a state, the gradients of all arrays."""
    if state is not None:
        return jax.jit(lambda *x: run(*x, state=state, segment_ids=segment_ids))(*arrays)

    def loss(arrays):
        o = run(*arrays, state=None, segment_ids=segment_ids)[0]
        return jnp.sum(jnp.sin(o)), o

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)


def main(process, processes, port):
    del process, processes, port
    ids, found = jnp.asarray(np.repeat([[1, 2, 3]], [5, 8, 3], axis=1).repeat(B, axis=0)), {}
    seen, mapped = [], recurrence.shard_map_by_axes

    def spy(function, arrays, axes, out_axes):
        def local(*xs):
            seen.append([x.shape[-2] for x in xs if x is not None and x.ndim in (3, 4) and x.shape[-1] == D][-2:])
            return function(*xs)

        return mapped(local, arrays, axes, out_axes)

    recurrence.shard_map_by_axes = spy
    programs = [(mesh, name, draw(T), ids, None) for mesh in MESHES[:2] for name in CASES]
    start = jax.random.normal(jax.random.key(1), (B, H, D, D))
    programs.append((MESHES[2], "linear attention", draw(1), ids[:, :1], start))
    for sizes, name, arrays, segment_ids, state in programs:
        want = results(CASES[name], arrays, segment_ids, state)
        mesh, n = make_mesh(sizes), sizes.get("seq", 1)
        where = NamedSharding(mesh, partition_spec(mesh, TOKENS))
        with jax.set_mesh(mesh):
            put = [jax.device_put(to_zigzag(x, n), where) if x.ndim > 1 else x for x in (*arrays, segment_ids)]
            got = results(CASES[name], tuple(put[:-1]), put[-1], state)
        got = jax.tree.map(lambda x, n=n: from_zigzag(x, n) if x.shape[1:2] == (T,) else x, got)
        error = max(relative_error(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
        found[f"{name} on {sizes}"] = [error, *seen[-1]]
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
