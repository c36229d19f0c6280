"""Suites of prompts from files: a model continues each prompt greedily, and the continuation is scored."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import numpy as np
from jax.sharding import Mesh

from hybrid_jax.checks import check_boolean, check_choice, check_integer
from hybrid_jax.config import ModelConfig
from hybrid_jax.data import Corpus
from hybrid_jax.data.chat import ChatTemplate
from hybrid_jax.data.corpus import source_stamp
from hybrid_jax.data.tokenizer import decode_continuation, encode_prompt
from hybrid_jax.evaluate.instruments.contract import Instrument, Progress, Subject
from hybrid_jax.evaluate.measurement import Measurement, weighted_mean
from hybrid_jax.evaluate.prompts import SUITES
from hybrid_jax.evaluate.prompts.contract import Example, read_examples
from hybrid_jax.generation import bucket, generate, generation_defaults, rows_on
from hybrid_jax.parallel.distributed import say


@dataclasses.dataclass(frozen=True)
class Prompts(Instrument):
    """Measures `score` on a suite, from 0 to 1; also by what its examples are `at`, and `empty`, the share of empty continuations.

    A prompt that with its continuation has more tokens than the model has positions is left out, never truncated; how many are
    left out is said, and is the measure `left_out`.

    Args:
      suite: a name of `evaluate.prompts.SUITES`: `ruler`, `babilong`, `helmet`, `helmet_reranking`, `mrcr`.
      path: a file, or a folder with files.
      limit: of every file only so many examples; 0: all.
      new_tokens: tokens that are generated; 0: as many as the suite says.
      chat: ask by the model's chat template, as an instruct model expects; the suite's beginning of the answer follows it.
      batch_size: prompts at a time.
    """

    headline: ClassVar[tuple[str, ...]] = ("score",)

    suite: str = "ruler"
    path: str = ""
    limit: int = 0
    new_tokens: int = 0
    chat: bool = False
    batch_size: int = 8

    def __post_init__(self):
        check_choice("suite", self.suite, SUITES)
        for name, least in (("limit", 0), ("new_tokens", 0), ("batch_size", 1)):
            check_integer(name, getattr(self, name), minimum=least)
        check_boolean("chat", self.chat)

    def check(self, config: ModelConfig, corpus: Corpus, mesh: Mesh | None = None) -> None:
        rows_on(mesh, self.batch_size)
        if self.chat:
            _template(config)
        _ = self.examples

    @functools.cached_property
    def examples(self) -> list[Example]:
        """The suite's examples, read once for all models."""
        return read_examples(SUITES[self.suite], self.path, self.limit)

    def stamp(self) -> Any:
        return source_stamp(self.path) if self.path else None

    def measure(self, subject: Subject, progress: Progress = lambda done, total: None) -> list[Measurement]:
        suite, examples = SUITES[self.suite], self.examples
        new, config = self.new_tokens or suite.new_tokens, subject.model.config
        tokens = self._tokens(subject, examples)
        fits = [n for n in range(len(examples)) if len(tokens[n]) + new <= config.max_position_embeddings]
        if left_out := len(examples) - len(fits):
            say(
                f"{self.suite}: {left_out} of {len(examples)} prompts are left out: with {new} new tokens they are longer than the "
                f"model's {config.max_position_embeddings:,} positions"
            )
        ends = generation_defaults(config.directory, config).eos_ids
        order = sorted(fits, key=lambda n: -len(tokens[n]))  # what needs most memory first, and like lengths together
        scores, empty = np.zeros(len(examples)), np.zeros(len(examples), bool)
        for begin in range(0, len(order), self.batch_size):
            batch = order[begin : begin + self.batch_size]
            length = bucket(max(len(tokens[n]) for n in batch))
            prompts = [tokens[n] for n in batch]
            rows = generate(subject.model, prompts, max_new_tokens=new, eos_id=ends, padded_to=length, mesh=subject.mesh)
            for n, row in zip(batch, rows, strict=True):
                text = decode_continuation(subject.tokenizer, tokens[n], row)
                scores[n], empty[n] = suite.score(text, examples[n]), not text.strip()
            progress(min(begin + self.batch_size, len(order)), len(order))
        return self._measured(examples, fits, scores, empty)

    def _tokens(self, subject: Subject, examples: list[Example]) -> list[list[int]]:
        """Returns what the model continues; chat templates write the tokens that begin a document themselves."""
        if not self.chat:
            return [encode_prompt(subject.tokenizer, example.plain) for example in examples]
        template = _template(subject.model.config)
        texts = (template.render(e.conversation, add_generation_prompt=True) + e.begin.lstrip() for e in examples)
        return [subject.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]

    def _measured(self, examples: list[Example], fits: list[int], scores: np.ndarray, empty: np.ndarray) -> list[Measurement]:
        counted = np.isin(np.arange(len(examples)), fits).astype(np.float64)[:, None]
        found = [
            weighted_mean("score", scores[:, None], counted, share=True),
            weighted_mean("empty", empty[:, None], counted, share=True),
            weighted_mean("left_out", 1 - counted, np.ones_like(counted), share=True),
        ]
        for name in dict.fromkeys(name for example in examples for name in example.at):
            for value in dict.fromkeys(example.at[name] for example in examples if name in example.at):
                here = np.array([[float(example.at.get(name) == value)] for example in examples])
                mean = weighted_mean("score", scores[:, None], counted * here, share=True)
                found.append(mean and dataclasses.replace(mean, at={name: value}))
        return [m for m in found if m is not None]


def _template(config: ModelConfig) -> ChatTemplate:
    """Returns the chat template of a model that was loaded from a directory.

    Raises:
      ValueError: it has none.
    """
    if not config.directory:
        raise ValueError("prompts: chat needs a model that was loaded from a directory with a chat template")
    return ChatTemplate(config.directory)
