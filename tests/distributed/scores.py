"""A process of a job that measures rows by tokens and heads, and continues prompts, on a mesh, and compares with one device."""

import sys

import jax
import numpy as np

from hybrid_jax.evaluate.instruments.mixing import add_roles, role_sums
from hybrid_jax.evaluate.lm_eval.scoring import Scorer
from hybrid_jax.evaluate.token_scores import token_scores
from hybrid_jax.generation import generate
from hybrid_jax.parallel.mesh import make_mesh
from hybrid_jax.parallel.sharding import load_sharded
from hybrid_jax.parameters import join_model, logical_axes, split_model
from tests.conftest import relative_error, tiny_model
from tests.distributed.parity import WELL_CONDITIONED, packed


def main(process, processes, port):
    if int(processes) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    model = tiny_model("*-GKA-SWA", vocab_size=62, gka=WELL_CONDITIONED)
    structure, parameters = split_model(model)
    rng, segments = np.random.default_rng(0), packed(32, 5)
    rows = [
        {"input_ids": rng.integers(0, 62, 32).astype(np.int32), "segment_ids": s, "loss_weights": (s > 0).astype(np.float32)}
        for s in segments
    ]
    want, mesh, axes = token_scores(model, rows, batch_size=4), make_mesh({"data": 2, "seq": 4}), logical_axes(model)
    placed = {name: load_sharded(mesh, name, np.asarray(p), axes[name]) for name, p in parameters.items()}
    on_mesh = join_model(structure, placed)
    got = token_scores(on_mesh, rows, mesh=mesh, batch_size=4)
    counted = got.weights > 0
    same = np.mean(got.right[counted] == want.right[counted])
    distances = np.zeros((5, 32), int)
    distances[:, [6, 9, 21, 22, 30]] = [2, 3, 4, 4, 25]
    roles = [add_roles({**row, "distances": d}, key_tokens=1) for row, d in zip(rows, distances, strict=True)]
    wanted, found = role_sums(model, roles, batch_size=4), role_sums(on_mesh, roles, mesh=mesh, batch_size=4)
    if process == "0":
        print(f"roles {relative_error(np.stack(found), np.stack(wanted)):.1e}", flush=True)
        print(f"losses {relative_error(got.losses[counted], want.losses[counted]):.1e}, right {same:.3f}", flush=True)
    continuations(process)


def continuations(process):
    """Greedy and drawn continuations, and log-probabilities after shared prefixes, of a model with every kind of state."""
    model = tiny_model("*-GKA-SWA-GDN[1,2,3]-M3", vocab_size=62, gka=WELL_CONDITIONED)
    structure, parameters = split_model(model)
    mesh, axes = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), logical_axes(model)
    placed = {name: load_sharded(mesh, name, np.asarray(p), axes[name]) for name, p in parameters.items()}
    placed = join_model(structure, placed)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 62, n).tolist() for n in (9, 3, 5)]  # three rows on four shards
    prefix = rng.integers(0, 62, 20).tolist()
    queries = [(prefix, [1, 2]), (prefix, [3]), (prompts[0], [4, 5, 6]), (prefix, [7, 8, 9])]
    same = []
    for options in ({}, dict(temperature=1.0, top_k=5, seed=3)):
        want = generate(model, prompts, max_new_tokens=6, **options)
        same.append(want == generate(placed, prompts, max_new_tokens=6, mesh=mesh, **options))
    want, got = (dict(scorer(queries, 64)) for scorer in (Scorer(model, 3), Scorer(placed, 3, mesh)))
    worst = max(abs(got[n].log_probability - want[n].log_probability) for n in range(len(queries)))
    greedy = all(got[n].greedy == want[n].greedy for n in range(len(queries)))
    if process == "0":
        print(f"continued {same}, scored {worst:.1e} {greedy}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
