"""What a model directory says about generation: where it ends and how tokens are sampled, read as transformers reads it."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from hybrid_jax.checks import check_boolean, check_integer
from hybrid_jax.config import ModelConfig
from hybrid_jax.files import read_json
from hybrid_jax.generation.sampling import Sampling
from hybrid_jax.parallel.distributed import notice

FILE = "generation_config.json"
# transformers' values for a file that samples and does not set them.
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
# Options that change what is generated and are not applied here -> the values that change nothing.
NOT_APPLIED: dict[str, tuple] = {
    "repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "sequence_bias": ({},),
    "guidance_scale": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "min_length": (0,),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "stop_strings": ([],),
}
# These change only what is sampled.
NOT_APPLIED_SAMPLING: dict[str, tuple] = {"min_p": (0.0,), "typical_p": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,)}


class GenerationDefaults(NamedTuple):
    """Ids any of which ends generation (None: nothing says), and how tokens are chosen."""

    eos_ids: tuple[int, ...] | None
    sampling: Sampling


def _eos_ids(name: str, value: Any) -> tuple[int, ...]:
    """Returns the ids; negative ones mean none, as in config.json."""
    ids = value if isinstance(value, (list, tuple)) else [value]
    return tuple(i for i in (check_integer(name, i, minimum=-1) for i in ids) if i >= 0)


def _sampling(path: pathlib.Path, values: Mapping[str, Any]) -> Sampling:
    """Returns the sampling of a generation_config.json, and reports its options that are not applied."""
    samples = check_boolean("do_sample", values.get("do_sample") or False)
    options = NOT_APPLIED | (NOT_APPLIED_SAMPLING if samples else {})
    ignored = [n for n, neutral in options.items() if values.get(n) is not None and values[n] not in neutral]
    if ignored:
        notice(f"{path}: {', '.join(f'{n} = {values[n]!r}' for n in ignored)} is not applied")
    if not samples:
        return Sampling()
    return Sampling(**{name: default if values.get(name) is None else values[name] for name, default in SAMPLING.items()})


def generation_defaults(directory: str | pathlib.Path, config: ModelConfig) -> GenerationDefaults:
    """Reads the defaults of a model directory.

    `generation_config.json` decides where it exists; else, or without a directory, config.json's `eos_token_id`, and greedy.

    Raises:
      ValueError: the file is not a JSON object, or a value in it is invalid; names the file.
    """
    path = pathlib.Path(directory) / FILE
    if not directory or not path.is_file():
        eos = config.extra.get("eos_token_id")
        return GenerationDefaults(None if eos is None else _eos_ids("config.json: eos_token_id", eos), Sampling())
    values = read_json(path)
    try:
        eos = values.get("eos_token_id")
        return GenerationDefaults(() if eos is None else _eos_ids("eos_token_id", eos), _sampling(path, values))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
