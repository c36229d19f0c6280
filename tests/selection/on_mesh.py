"""Scores a tiny source on a mesh of eight devices, and compares with one device; run by test_mesh.py."""

import numpy as np
from tokenizers import Tokenizer, models

from hybrid_jax.data.corpus import Corpus, Source
from hybrid_jax.data.tokens import Tokens
from hybrid_jax.parallel.mesh import make_mesh
from hybrid_jax.parallel.sharding import load_sharded
from hybrid_jax.parameters import join_model, logical_axes, split_model
from hybrid_jax.selection.scorers import find_scorer
from tests.conftest import relative_error, tiny_model

NAMES = ("attention_distance", "linear_fit", "gradient_error", "head_ablation")
MESH = {"data": 2, "seq": 2, "tensor": 2}


def main():
    rng, starts = np.random.default_rng(0), np.asarray([0, 40, 100, 300])
    tokens = Tokens(rng.integers(0, 62, starts[-1]).astype(np.uint16), starts)
    corpus = Corpus(Tokenizer(models.BPE()), {"text": Source("", "split")}, {"text": [tokens]}, {"text": [tokens]}, (1, 2), (3, 60))
    model = tiny_model("*-*", vocab_size=62)
    structure, parameters = split_model(model)
    mesh, axes = make_mesh(MESH), logical_axes(model)
    placed = {name: load_sharded(mesh, name, np.asarray(value), axes[name]) for name, value in parameters.items()}
    for name in NAMES:
        scorer = find_scorer(name)(rows=3, seq_len=72)
        scorer.check(model.config, mesh)
        want, got = scorer.score(model, corpus, None), scorer.score(join_model(structure, placed), corpus, mesh)
        print(f"{name}: {relative_error(got.costs, want.costs):.1e} {np.ptp(want.costs):.1e}", flush=True)


if __name__ == "__main__":
    main()
