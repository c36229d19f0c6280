"""Shared by the tests of training: small phases, experiments and batches."""

import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from hybrid_jax.data.layout import training_batch
from hybrid_jax.parameters import split_model
from hybrid_jax.train import MetricWriter, Phase, read_metrics, train_phase
from hybrid_jax.train.loop import apply_phase_settings
from hybrid_jax.train.optimizer import make_optimizer
from hybrid_jax.train.phase_layout import PhaseLayout
from hybrid_jax.train.step import make_step
from tests.conftest import tiny_model

MIX = {"text": 1.0}
LARGER = dict(family="llama", qk_norm=False, hidden_size=32, intermediate_size=48, head_dim=16, vocab_size=64)  # of a teacher


def phase(**changes):
    return Phase(
        **{
            **dict(objective="next_token", steps=6, batch_size=2, seq_len=16, log_every=1, checkpoint_every=2, learning_rate=1e-2),
            **changes,
        }
    )


def model_for(corpus):
    return tiny_model("*-GKA", vocab_size=corpus.tokenizer.get_vocab_size())


def train(corpus, directory, model=None, **changes):
    writer = MetricWriter(directory)
    try:
        return train_phase(
            model or model_for(corpus),
            "p",
            phase(**changes),
            corpus,
            MIX,
            seed=0,
            directory=directory / "checkpoints",
            writer=writer,
        )
    finally:
        writer.close()


def arrays(model):
    return {n: np.asarray(v) for n, v in split_model(model)[1].items()}


def losses(directory):
    return {r["step"]: r["loss"] for r in read_metrics(directory)}


def experiment(path, **changes):
    align = dict(form="fused", objective="align_mixer", trainable=(r"\.gka\.",), steps=2, batch_size=2, seq_len=32, log_every=1)
    final = dict(form="unfused", objective="next_token", steps=2, batch_size=2, seq_len=32, log_every=1)
    return ConfigDict(
        {
            "source": str(path),
            "pattern": "*-GKA",
            "schedule": ("align", "train"),
            "phases": {"align": align, "train": final},
            "data": {"text": "", "mix": {"text": 1.0}},
            "seed": 0,
            **changes,
        }
    )


def batch_of(rows=4, length=16, seed=0):
    """Rows that weigh unevenly: of the first, one token."""
    rng = np.random.default_rng(seed)
    weights = np.ones((rows, length), np.float32)
    weights[0, 2:] = 0
    ids = rng.integers(0, 61, (rows, length)).astype(np.int32)
    return training_batch({"input_ids": ids, "segment_ids": np.ones_like(ids), "loss_weights": weights})


class Linear:
    """In place of a `PhaseLayout`: what trains is given, its gradients are the batch."""

    def __init__(self, p, marks):
        self.optimizer = make_optimizer(p, marks)

    def models(self, trainable, frozen):
        return trainable, None


def one_step(model, batch, **changes):
    """The state before and after, and the metrics."""
    p = phase(**changes)
    layout = PhaseLayout(apply_phase_settings(model, p), p)
    state, frozen, _ = layout.begin(None, split_model(model)[1])
    before = jax.tree.map(np.asarray, state)
    after, metrics = make_step(layout, p)(state, frozen, batch)
    return before, after, metrics


def saved_steps(directory: pathlib.Path):
    return sorted(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())
