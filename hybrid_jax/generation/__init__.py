"""Generation with the hybrid cache: keys and values for attention, states for recurrent layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hybrid_jax.checks import check_integer
from hybrid_jax.config import ModelConfig
from hybrid_jax.generation.defaults import GenerationDefaults, generation_defaults
from hybrid_jax.generation.sampling import Sampling, keys_of_step, sample
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import whole_array
from hybrid_jax.parallel.mesh import divided_rows
from hybrid_jax.parallel.placement import in_mesh
from hybrid_jax.parallel.sharding import constrain
from hybrid_jax.parameters import join_model, split_model

__all__ = [
    "SLOTS", "GenerationDefaults", "Sampling", "bucket", "check_prompts", "decode", "empty_state", "end_ids", "generate",
    "generation_defaults", "rows_on",
]  # fmt: skip

# Prompts up to so long are read token by token where all rows are equally long: the program of one token reads them and
# writes the answer, and compiling another one for the prompt takes seconds.
STEPWISE = 64
SLOTS = 64  # caches have a multiple of so many slots, so that prompts of various lengths share a program


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    structure: nnx.GraphDef, parameters: Mapping[str, jax.Array], ids: Any, segment_ids: Any, positions: Any, state: Any
) -> tuple[jax.Array, Any]:
    """Returns the logits [B, vocab] after the last of the tokens [B, T], and the state after them."""
    model = join_model(structure, parameters)
    hidden, state = model.hidden_states(ids, segment_ids, positions, state)
    return model.head(hidden[:, -1]), state


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def empty_state(structure: nnx.GraphDef, parameters: Mapping[str, jax.Array], batch: int, length: int) -> Any:
    """Returns the state before the first token, with caches of `length` slots; on the mesh in context, sharded by its axes.

    Slots may be more than a document's tokens; whether documents of so many tokens can be decoded is checked by their own length
    (`ModelConfig.check_cache`).
    """
    model = join_model(structure, parameters)
    return jax.tree.map(lambda x, axes: constrain(x, *axes), model.empty_state(batch, length), model.state_axes())


def rows_on(mesh: Mesh | None, rows: int) -> int:
    """Returns the next number of rows that the mesh divides.

    Raises:
      ValueError: the mesh shards tokens, of which there is one at a time.
    """
    if mesh is not None and mesh.shape["seq"] > 1:
        raise ValueError(
            "generation does not shard tokens over the mesh: give a mesh whose 'seq' is 1, with more 'tensor' or 'data'"
        )
    return divided_rows(mesh, rows)


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[np.ndarray]:
    """Checks that a model can continue token sequences, and returns each as an integer array.

    Raises:
      ValueError: no prompt or an empty one, an id outside the vocabulary, more tokens than the model has positions, or than can be
        decoded with caches (`ModelConfig.check_cache`).
    """
    check_integer("max_new_tokens", max_new_tokens, minimum=1)
    rows = [np.asarray(p) for p in prompts]
    if not rows or not all(row.size for row in rows):
        raise ValueError("generate needs at least one prompt, and every prompt at least one token")
    if any(row.ndim != 1 or row.dtype.kind not in "iu" for row in rows):
        raise ValueError("a prompt must be a sequence of integer token ids")
    if max(row.max() for row in rows) >= config.vocab_size or min(row.min() for row in rows) < 0:
        raise ValueError(f"a prompt has a token id outside 0 ... {config.vocab_size - 1}; is it this model's tokenizer?")
    longest, most = max(map(len, rows)), config.max_position_embeddings
    if longest + max_new_tokens > most and any(layer.attends for layer in config.layers):
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than the model's {most} positions "
            "(max_position_embeddings); shorten the prompt or lower max_new_tokens"
        )
    config.check_cache(longest + max_new_tokens)
    return rows


def bucket(length: int) -> int:
    """Returns the smallest of 16, 24, 32, 48, 64, 96, 128, ... that is at least `length`: few shapes, and little padding."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    eos_id: int | Sequence[int] | None = None,
    seed: int = 0,
    row_keys: np.ndarray | None = None,
    on_token: Callable[[np.ndarray], None] | None = None,
    ended: Callable[[int, list[int]], bool] | None = None,
    padded_to: int = 0,
    mesh: Mesh | None = None,
) -> list[list[int]]:
    """Continues token sequences, all rows at once.

    Rows of different lengths are padded on the left; padding is a segment of its own, which neither
    attention nor a recurrent state sees, so a row's continuation does not depend on its neighbours.

    Args:
      prompts: token ids, at least one in each row.
      max_new_tokens: at most so many new ids for each row.
      temperature, top_p, top_k: see `Sampling`; the defaults are greedy.
      eos_id: any of these ids ends a row; it is not returned. `generation_defaults` reads a model directory's.
      seed: of sampling.
      row_keys: [rows, 2], a key of sampling for each row in place of the seed (see `sampling.row_keys`); then what a row draws does
        not depend on its neighbours either.
      on_token: called with every step's ids [B], of rows that have ended too.
      ended: called with a row's number and its new ids after each of them; True ends the row, which keeps them all.
      padded_to: prompts are padded to at least so many tokens; with a `bucket`, batches of various lengths share a program.
      mesh: that the model is on; rows are sharded over its batch axes, heads over `tensor`, and rows that it does not divide are
        filled up. Every process of a job must call this, and all get all rows. None: one device.

    Returns:
      The new ids of each row.

    Raises:
      ValueError: an empty prompt, an id outside the vocabulary, more tokens than the model has positions, a bad option, or a mesh
        that shards tokens.
    """
    sampling = Sampling(temperature, top_p, top_k)
    rows_in = check_prompts(model.config, prompts, max_new_tokens)
    ends = end_ids(model.config, eos_id)
    count, longest = len(rows_in), max(padded_to, *map(len, rows_in))
    B = rows_on(mesh, count)
    rows_in += [rows_in[-1]] * (B - count)
    ids = np.zeros((B, longest), np.int32)
    segments = np.zeros((B, longest), np.int32)
    for row, prompt in enumerate(rows_in):
        ids[row, longest - len(prompt) :] = prompt
        segments[row, longest - len(prompt) :] = 1
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)

    structure, parameters = split_model(model)
    slots = -(-(longest + max_new_tokens) // SLOTS) * SLOTS
    at_a_time = 1 if segments.all() and longest <= STEPWISE else longest  # steps of one token cannot leave out padding
    with in_mesh(mesh):
        state = empty_state(structure, parameters, B, slots)
        for begin in range(0, longest, at_a_time):
            part = np.s_[:, begin : begin + at_a_time]
            logits, state = _forward(structure, parameters, ids[part], segments[part], positions[part], state)
    at = (structure, parameters, logits, state, positions[:, -1:])
    options: dict[str, Any] = dict(sampling=sampling, ends=ends, seed=seed, row_keys=row_keys, mesh=mesh)
    return decode(*at, count=count, max_new_tokens=max_new_tokens, on_token=on_token, ended=ended, **options)


def end_ids(config: ModelConfig, eos_id: int | Sequence[int] | None) -> list[int]:
    """Returns the ids that end a row, as `generate` takes them.

    Raises:
      ValueError: an id outside the vocabulary.
    """
    ends = [] if eos_id is None else [eos_id] if isinstance(eos_id, (int, np.integer)) else list(eos_id)
    return [check_integer("eos_id", i, minimum=0, maximum=config.vocab_size - 1) for i in ends]


def decode(
    structure: nnx.GraphDef,
    parameters: Mapping[str, jax.Array],
    logits: jax.Array,
    state: Any,
    position: np.ndarray,
    *,
    count: int,
    max_new_tokens: int,
    sampling: Sampling,
    ends: Sequence[int],
    seed: int,
    row_keys: np.ndarray | None = None,
    mesh: Mesh | None = None,
    on_token: Callable[[np.ndarray], None] | None = None,
    ended: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """Writes tokens after what a state has read; the other half of `generate`, whose arguments are not repeated here.

    Args:
      structure, parameters: of `split_model`.
      logits: [B, vocab], after the last token that was read.
      state: after that token, with room for the new ones.
      position: [B, 1], that token's.
      count: rows that are returned; those behind them fill up the batch.
      ends: ids that end a row.

    Returns:
      The new ids of each row.
    """
    key, B = jax.random.key(check_integer("seed", seed)), len(position)
    if row_keys is not None:
        row_keys = np.concatenate([row_keys, np.repeat(row_keys[-1:], B - count, axis=0)])
    rows: list[list[int]] = [[] for _ in range(count)]
    alive = np.arange(B) < count
    ones = np.ones((B, 1), np.int32)
    for step in range(max_new_tokens):
        key, now = jax.random.split(key)
        now = jax.random.key_data(now) if row_keys is None else keys_of_step(row_keys, step)
        with in_mesh(mesh):
            token = whole_array(sample(logits, np.asarray(now), sampling)).astype(np.int32)
        alive &= ~np.isin(token, ends)
        if not alive.any():
            break
        if on_token is not None:
            on_token(token[:count])
        for row in np.flatnonzero(alive):
            rows[row].append(int(token[row]))
            alive[row] = ended is None or not ended(int(row), rows[row])
        if step + 1 < max_new_tokens:
            position = position + 1
            with in_mesh(mesh):
                logits, state = _forward(structure, parameters, token[:, None], ones, position, state)
    return rows
