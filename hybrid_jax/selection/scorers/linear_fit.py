"""How well a linear recurrence with a fitted output projection stands in for a layer's attention.

Each head of the layer becomes causal linear attention of its own queries, keys and values, once without decay and once with a
fixed one, gamma < 1:

    f_t = sum_s gamma^(t-s) (1 + q_t . k_s) v_s / sum_s gamma^(t-s) (1 + q_t . k_s),     |q_t| = |k_s| = 1,  s <= t, same document

The weights 1 + q . k are those of arXiv 2007.14902 (softmax to first order in q . k, of normalized queries and keys, so that no
weight is negative); queries and keys are rotated as the layer's are. All f_t side by side, [2 H D], and a constant are the
features from which ridge regression predicts the layer's output y_t, [hidden]: the prediction of a recurrent layer with the
best output projection. A layer's cost is the relative error 1 - R^2 = |y - prediction|^2 / |y - mean of y|^2 on rows that were
not fitted. The choice is ours.

The layers are fitted one after the other, each on the source's own activations: nothing trains, and errors do not accumulate.
What a trained mixer can do (gates that depend on the token, convolutions) and what the model makes of an error are not seen.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy import linalg

from hybrid_jax.checks import check_integer, check_number
from hybrid_jax.config import ATTENTION, ModelConfig
from hybrid_jax.data import Corpus
from hybrid_jax.evaluate.measures import padded_batches
from hybrid_jax.layers.attention import Attention
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import is_first, say, whole_array
from hybrid_jax.parallel.placement import in_mesh
from hybrid_jax.parallel.recurrence import linear_recurrence
from hybrid_jax.parameters import Parameters, join_model, split_model
from hybrid_jax.progress import progress_bar
from hybrid_jax.selection.scorers.contract import Scores
from hybrid_jax.selection.scorers.rows import OnRows, no_hidden_states
from kernels_pallas.numerics import l2_normalize

FOLDS = 2
CONSTANT = 1e-12  # of the mean square: an output that varies less is constant


@dataclasses.dataclass(frozen=True)
class LinearFit(OnRows):
    """Scores a layer by the relative error of a linear recurrence in its place, the mean of that on text and on the synthetic task.

    Tokens count whose next token counts in the loss: all of a text, those before the answers of the task. Every second row is
    fitted, of text and task together, and the error measured on the others; then the other way round. Several times more tokens
    than features, 2 * heads * head_dim, are needed to see more than the ridge. While a layer is fitted, matrices of
    [features, features + hidden_size] numbers of 8 bytes are held for each of the four sets of rows.

    Args:
      rows, seq_len, task: see `OnRows`; at least 2 rows.
      half_life: tokens after which the decaying half of the features weighs a key half.
      ridge: added to the diagonal of the features' second moments, as a fraction of a feature's sum of squares around its mean
        (the mean over features). Features are running means, which differ little from token to token: with 1e-3 and 8 rows of the
        small source they fitted rows rather than tokens, and errors on the other rows were up to 2.6.
    """

    half_life: int = 16
    ridge: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        check_integer("select.rows", self.rows, minimum=FOLDS)
        check_integer("select.half_life", self.half_life, minimum=1)
        check_number("select.ridge", self.ridge, above=0)

    def forward_passes(self, config: ModelConfig) -> float:
        """One; and the features, their second moments and a solve on the host."""
        return 1.0

    def score(self, model: Decoder, corpus: Corpus, mesh: Mesh | None = None) -> Scores:
        """Returns the relative error of every layer; 0 of a layer whose output is constant.

        Raises:
          ValueError: the text has a single row.
        """
        text, task = self.text_rows(corpus), self.task_rows(corpus)
        if len(text) < FOLDS:
            raise ValueError(f"select.seq_len {self.seq_len:,}: the text fills {len(text)} row, {FOLDS} are needed; give more text")
        c, counted = model.config, sum(int((row["loss_weights"] > 0).sum()) for row in (*text, *task)) // FOLDS
        if (features := 2 * c.num_heads * c.head_dim) > counted:
            say(f"select: linear_fit fits {features:,} features to {counted:,} tokens; more rows would tell layers apart better")
        (structure, parameters), L = split_model(model), c.num_layers
        batches = [(n, batch) for n, rows in enumerate((text, task)) for batch in padded_batches(rows, mesh)]
        errors = np.zeros(L)
        with progress_bar(name="select", unit="layer", total=L, shown=is_first()) as bar, in_mesh(mesh):
            hidden = [no_hidden_states(b["input_ids"], c.hidden_size, model.compute_dtype) for _, b in batches]
            for layer in range(L):
                sums: Any = [[0, 0], [0, 0]]  # of (text, task) by folds
                for b, (which, batch) in enumerate(batches):
                    found, hidden[b] = _moments(self.half_life, structure, parameters, batch, hidden[b], np.int32(layer))
                    found = [np.asarray(whole_array(x), np.float64) for x in found]
                    for fold in range(FOLDS):
                        sums[which][fold] += Moments(*(x[fold] for x in found))
                errors[layer] = self._error(*sums)
                bar.update()
        return Scores(errors, "relative error")

    def _error(self, text, task) -> float:
        """Returns the mean relative error of text and task, each the mean over the folds."""
        fits = [self._fit(text[fold] + task[fold]) for fold in range(FOLDS)]
        return float(np.mean([moments[1 - fold].error(fits[fold]) for moments in (text, task) for fold in range(FOLDS)]))

    def _fit(self, moments: Moments) -> np.ndarray:
        """Returns the ridge regression's coefficients, [features + 1, hidden]; the constant's are not shrunk."""
        count, total = moments.features[-1, -1], moments.features[-1, :-1]
        variation = (np.diag(moments.features)[:-1] - total**2 / count).mean()
        strength = self.ridge * (variation if variation > 0 else 1.0)
        regular = moments.features + np.diag(np.append(np.full(len(total), strength), 0))
        return linalg.solve(regular, moments.outputs, assume_a="sym")


@dataclasses.dataclass(frozen=True)
class Moments:
    """Sums over tokens of features x [features + 1], whose last one is 1, and outputs y [hidden].

    Args:
      features: of x x', [features + 1, features + 1].
      outputs: of x y', [features + 1, hidden].
      square: of |y|^2.
    """

    features: np.ndarray
    outputs: np.ndarray
    square: np.ndarray

    def __add__(self, other: Moments) -> Moments:
        mine, its = ((m.features, m.outputs, m.square) for m in (self, other))
        return Moments(*(a + b for a, b in zip(mine, its, strict=True)))

    def __radd__(self, nothing: int) -> Moments:
        return self

    def error(self, fit: np.ndarray) -> float:
        """Returns the sum of |y - fit' x|^2 over that of |y - mean of y|^2."""
        count, total = self.features[-1, -1], self.outputs[-1]
        spread = self.square - np.sum(total**2) / count
        if spread <= CONSTANT * self.square:
            return 0.0
        rest = self.square - 2 * np.sum(fit * self.outputs) + np.sum(fit * (self.features @ fit))
        return float(rest / spread)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moments(
    half_life: int,
    structure: Any,
    parameters: Parameters,
    batch: Mapping[str, jax.Array],
    hidden: jax.Array,  # [B, T, hidden]
    number: jax.Array,  # []
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Runs one layer.

    Args:
      hidden: the input of layer `number`; ignored if that is layer 0.

    Returns:
      The `Moments` of even rows and those of odd ones, [2, ...] each, and the layer's output.
    """
    model = join_model(structure, parameters)
    embedded, at = model.inputs(batch["input_ids"], batch["segment_ids"], batch["positions"])
    start, c = jnp.where(number == 0, embedded, hidden), model.config
    size = 2 * c.num_heads * c.head_dim + 1
    fold = jnp.arange(len(start)) % FOLDS == jnp.arange(FOLDS)[:, None]
    counted = (batch["weights"] > 0) * fold[..., None].astype(jnp.float32)  # [FOLDS, B, T]

    def run(layer, carry):
        n, hidden, found = carry

        def here():
            x = _features(layer.mixer(ATTENTION), layer.mixer_input(hidden), half_life, **at)
            out = layer.run(ATTENTION, hidden, **at)[0]
            y = out.mixer.astype(jnp.float32)
            sums = functools.partial(jnp.einsum, precision="highest")
            found = (
                sums("fbt,btx,bty->fxy", counted, x, x),
                sums("fbt,btx,bty->fxy", counted, x, y),
                sums("fbt,bty,bty->f", counted, y, y),
            )
            return out.hidden, found

        hidden, found = jax.lax.cond(n == number, here, lambda: (hidden, found))
        return (n + 1, hidden, found), None

    nothing = tuple(jnp.zeros((FOLDS, *shape)) for shape in ((size, size), (size, c.hidden_size), ()))
    (_, hidden, found), _ = model.through_layers(run, (jnp.int32(0), start, nothing))
    return found, hidden


def _features(
    attention: Attention,
    x: jax.Array,  # [B, T, hidden], normed
    half_life: int,
    *,
    positions: jax.Array,  # [B, T]
    segment_ids: jax.Array,  # [B, T]
) -> jax.Array:
    """Returns the features of the module's docstring and a constant, [B, T, 2 H D + 1] float32."""
    B, T, _ = x.shape
    q, k, v = (y.astype(jnp.float32) for y in attention.project(x, positions, segment_ids=segment_ids))
    H = q.shape[2]
    q, k = l2_normalize(q, eps_outside=False), l2_normalize(k, eps_outside=False)
    arrays = [jnp.concatenate([y, jnp.ones((*y.shape[:3], 1))], axis=-1) for y in (q, k, v)]  # of v: the sum of the weights

    def attend(log_decay):
        o, _ = linear_recurrence((*arrays, jnp.full((B, T, H), log_decay)), state=None, segment_ids=segment_ids)
        return (o[..., :-1] / (o[..., -1:] + 1e-6)).reshape(B, T, -1)

    return jnp.concatenate([attend(0.0), attend(-math.log(2) / half_life), jnp.ones((B, T, 1))], axis=-1)
