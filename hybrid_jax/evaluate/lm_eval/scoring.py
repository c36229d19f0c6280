"""Log-probabilities of continuations, in few programs of fixed shapes; logits exist for scored tokens only."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hybrid_jax.evaluate.lm_eval.prefixes import Group, Row, group_by_prefix, make_rows
from hybrid_jax.generation import bucket, empty_state, rows_on
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.cross_entropy import cross_entropy
from hybrid_jax.parallel.distributed import whole_array
from hybrid_jax.parallel.placement import in_mesh
from hybrid_jax.parallel.tiles import top_k_tokens
from hybrid_jax.parameters import Parameters, join_model, split_model

CHUNK = 512  # tokens of a shared prefix that are computed at a time


class Score(NamedTuple):
    """Of a continuation: the sum of its tokens' log-probabilities in nats, and whether each is the most likely token."""

    log_probability: float
    greedy: bool


@functools.partial(jax.jit, static_argnums=0)
def _forward(structure: nnx.GraphDef, parameters: Parameters, ids: Any, segment_ids: Any) -> jax.Array:
    """Returns the final hidden states [B, T, hidden] of rows that begin at position 0."""
    return join_model(structure, parameters).hidden_states(ids, segment_ids)[0]


@functools.partial(jax.jit, static_argnums=0)
def _continued(
    structure: nnx.GraphDef, parameters: Parameters, ids: Any, segment_ids: Any, positions: Any, state: Any
) -> tuple[jax.Array, Any]:
    """Returns the final hidden states [B, T, hidden] after a state, and the state after them."""
    return join_model(structure, parameters).hidden_states(ids, segment_ids, positions, state)


@functools.partial(jax.jit, static_argnums=0)
def _forked(structure: nnx.GraphDef, parameters: Parameters, state: Any, rows: Any) -> Any:
    """Returns the state whose row i is row `rows[i]` of `state`: keys and values, recurrent states, ends of convolutions."""
    leaves, tree = jax.tree.flatten(state)
    axes = tree.flatten_up_to(join_model(structure, parameters).state_axes())
    return tree.unflatten(
        [jnp.take(x, rows, axis=names.index("batch")) if "batch" in names else x for x, names in zip(leaves, axes, strict=True)]
    )


@functools.partial(jax.jit, static_argnums=(0, 4))
def _begun(structure: nnx.GraphDef, parameters: Parameters, state: Any, begun: Any, length: int) -> Any:
    """Returns the state [B, ...] with the rows that have not `begun` [B] as before the first token.

    Padding is a segment of its own within a call; a state that a call begins with belongs to its first segment.
    """
    model = join_model(structure, parameters)
    leaves, tree = jax.tree.flatten(state)
    axes, empty = (tree.flatten_up_to(x) for x in (model.state_axes(), model.empty_state(len(begun), length)))

    def one(x, names, nothing):
        if "batch" not in names:
            return x
        where = [-1 if name == "batch" else 1 for name in names]
        return jnp.where(begun.reshape(where), x, nothing)

    return tree.unflatten([one(*leaf) for leaf in zip(leaves, axes, empty, strict=True)])


@jax.jit
def _picked(hidden: jax.Array, rows: Any, columns: Any) -> jax.Array:
    """Returns the hidden states [R, M, hidden] at (rows, columns) [R, M] of hidden [B, T, hidden]."""
    return hidden[rows, columns]


@functools.partial(jax.jit, static_argnums=0)
def _scores(structure: nnx.GraphDef, parameters: Parameters, hidden: jax.Array, targets: Any) -> tuple[jax.Array, jax.Array]:
    """Returns log p of the targets [R, M] after the hidden states [R, M, hidden], and whether each is the most likely token."""
    head = join_model(structure, parameters).head
    best = top_k_tokens(hidden, head, 1)[0][..., 0]
    return -cross_entropy(hidden, head, targets), best == targets


class Scorer:
    """Scores continuations by a model.

    Every program has `batch_size` rows of a length of `bucket`; rows and tokens that are missing are padding.

    Args:
      batch_size: rows at a time.
      mesh: that the model is on; batches are filled up to what it divides. None: one device.
    """

    def __init__(self, model: Decoder, batch_size: int, mesh: Mesh | None = None):
        self.structure, self.parameters = split_model(model)
        self.config = model.config
        self.mesh, self.shards = mesh, rows_on(mesh, 1)
        self.batch_size = rows_on(mesh, batch_size)

    def __call__(self, queries: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int) -> Iterator[tuple[int, Score]]:
        """Yields (number of the query, its score) for all queries, in the order in which they are computed.

        Args:
          queries: (context, continuation) of token ids, each with at least one; a continuation has at most `max_length`.
          max_length: longer inputs are truncated on the left.
        """
        groups = group_by_prefix(make_rows(queries, max_length))
        alone = sorted((row for group in groups if not group.shared for row in group.rows), key=lambda row: -len(row.ids))
        for begin in range(0, len(alone), self.batch_size):
            rows = alone[begin : begin + self.batch_size]
            ids, segments = self._padded([row.ids for row in rows])
            with in_mesh(self.mesh):
                hidden = _forward(self.structure, self.parameters, ids, segments)
            yield from self._answers(rows, 0, hidden)
        for pack in self._packs([group for group in groups if group.shared]):
            yield from self._after_prefixes(pack)

    def _padded(self, sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and segment ids [batch_size, bucket], padded on the right."""
        ids = np.zeros((self.batch_size, bucket(max(map(len, sequences)))), np.int32)
        segments = np.zeros_like(ids)
        for row, tokens in enumerate(sequences):
            ids[row, : len(tokens)] = tokens
            segments[row, : len(tokens)] = 1
        return ids, segments

    def _packs(self, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """Yields groups whose rows fill a batch together; a group of more rows is alone. Those of similar length meet."""
        pack: list[Group] = []
        for group in sorted(groups, key=lambda group: (-bucket(group.shared), -max(len(row.ids) for row in group.rows))):
            if pack and sum(len(g.rows) for g in pack) + len(group.rows) > self.batch_size:
                yield pack
                pack = []
            pack.append(group)
        if pack:
            yield pack

    def _after_prefixes(self, pack: Sequence[Group]) -> Iterator[tuple[int, Score]]:
        """Computes the state after each group's prefix once, and forks it for the group's rows.

        Raises:
          ValueError: a row is longer than can be continued with caches (`ModelConfig.check_cache`).
        """
        rows = [(n, row) for n, group in enumerate(pack) for row in group.rows]
        self.config.check_cache(max(len(row.ids) for _, row in rows))
        most = max(len(row.ids) - pack[n].shared for n, row in rows)
        state = self._after([group.rows[0].ids[: group.shared] for group in pack], bucket(most))
        for begin in range(0, len(rows), self.batch_size):
            part = rows[begin : begin + self.batch_size]
            shared = np.zeros(self.batch_size, np.int32)
            owners = np.zeros(self.batch_size, np.int32)
            owners[: len(part)] = [n for n, _ in part]
            shared[: len(part)] = [pack[n].shared for n, _ in part]
            ids, segments = self._padded([row.ids[pack[n].shared :] for n, row in part])
            positions = shared[:, None] + np.arange(ids.shape[1], dtype=np.int32)
            with in_mesh(self.mesh):
                forked = _forked(self.structure, self.parameters, state, owners)
                hidden, _ = _continued(self.structure, self.parameters, ids, segments, positions, forked)
            yield from self._answers([row for _, row in part], shared, hidden)

    def _after(self, prefixes: Sequence[Sequence[int]], room: int) -> Any:
        """Returns the state after prefixes, which are padded on the left, with caches that have room for so many tokens more."""
        G = rows_on(self.mesh, 1 if len(prefixes) == 1 else self.batch_size // 2)  # groups have at least two rows
        longest = max(map(len, prefixes))
        P = bucket(longest)
        chunk = P if P <= CHUNK else math.gcd(P, CHUNK)
        ids = np.zeros((G, P), np.int32)
        segments = np.zeros_like(ids)
        for row, tokens in enumerate(prefixes):
            ids[row, P - len(tokens) :] = tokens
            segments[row, P - len(tokens) :] = 1
        positions = np.maximum(np.cumsum(segments, axis=1, dtype=np.int32) - 1, 0)
        with in_mesh(self.mesh):
            state = empty_state(self.structure, self.parameters, G, P + room)
            for begin in range((P - longest) // chunk * chunk, P, chunk):  # chunks of padding alone are left out
                part = np.s_[:, begin : begin + chunk]
                _, state = _continued(self.structure, self.parameters, ids[part], segments[part], positions[part], state)
                begun = segments[:, : begin + chunk].any(axis=1)
                if not begun.all():
                    state = _begun(self.structure, self.parameters, state, begun, P + room)
        return state

    def _answers(self, rows: Sequence[Row], shared: Any, hidden: jax.Array) -> Iterator[tuple[int, Score]]:
        """Yields the answers of rows from their hidden states [batch_size, T, hidden].

        Args:
          shared: tokens of each row before the first of `hidden`, [batch_size] or one number for all.
        """
        shared = np.broadcast_to(shared, self.batch_size)
        places = [
            (n, i, len(row.ids) - len(targets) + k - shared[i], target)
            for i, row in enumerate(rows)
            for n, targets in row.answers
            for k, target in enumerate(targets)
        ]
        numbers, *arrays = np.array(places, np.int32).T
        size = 16 * self.shards
        while size < len(places):
            size *= 4
        at_rows, columns, targets = (np.pad(x, (0, size - len(places))).reshape(self.shards, -1) for x in arrays)
        with in_mesh(self.mesh):
            found = _scores(self.structure, self.parameters, _picked(hidden, at_rows, columns), targets)
        logs, greedy = (whole_array(x).reshape(-1)[: len(places)] for x in found)
        for n in dict.fromkeys(numbers.tolist()):
            own = numbers == n
            yield n, Score(float(np.sum(logs[own], dtype=np.float64)), bool(greedy[own].all()))
