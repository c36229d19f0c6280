"""Answers to a file of prompts, written as they are made, so that the same call goes on where it was stopped.

    OUT.partial   the settings, then one line per answer in the order in which they were made
    OUT           the answers in the order of the prompts; written last, from the other one, which is then removed

An answer depends on the model, its prompt, the settings and its own number alone, but for the rounding of matrix products: batches
hold prompts of one bucket of lengths and are filled up to `batch_size`, so every bucket is one program.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hybrid_jax.data.prompts import Prompt
from hybrid_jax.generation import Sampling, bucket, generate
from hybrid_jax.generation.sampling import row_keys
from hybrid_jax.model import Decoder
from hybrid_jax.parallel.distributed import say
from hybrid_jax.progress import progress_bar

FORMAT = "hybrid_jax answers 1"
LENGTH, STOP = "length", "stop"  # `finish_reason` of an answer: the limit of new tokens, or an end token

Item = tuple[int, int]
"""An answer to make: the number of its prompt, from 0, and that of its sample."""


class Answered(NamedTuple):
    """How many answers there are, how many ended by the limit of new tokens, and how many are empty."""

    answers: int
    limited: int
    empty: int


def batches(lengths: Sequence[int], samples: int, batch_size: int) -> Iterator[tuple[int, list[Item]]]:
    """Yields (bucket of lengths, at most `batch_size` items of it), the longest first, which need the most memory.

    Args:
      lengths: of the prompts, in tokens.
      samples: answers per prompt.
    """
    by_bucket: dict[int, list[Item]] = {}
    for prompt, length in enumerate(lengths):
        by_bucket.setdefault(bucket(length), []).extend((prompt, sample) for sample in range(samples))
    for size in sorted(by_bucket, reverse=True):
        items = by_bucket[size]
        yield from ((size, items[i : i + batch_size]) for i in range(0, len(items), batch_size))


def _difference(name: str, was: Any, now: Any) -> str:
    """Returns in words how a setting differs; of objects, their first member that does."""
    if isinstance(was, dict) and isinstance(now, dict):
        key = next(key for key in {**was, **now} if was.get(key) != now.get(key))
        return _difference(f"{name}: {key}", was.get(key), now.get(key))
    return f"{name} was {was!r:.80}, now {now!r:.80}"


class Partial:
    """The unfinished file of answers beside `out`; begun, or continued if it has the same settings.

    Args:
      out: the file that will have the answers.
      settings: everything that decides the answers, in JSON's types.

    Attributes:
      found: the lines of the answers that are there.

    Raises:
      ValueError: there is one of other settings, or of other prompts; the message says what differs.
    """

    def __init__(self, out: pathlib.Path, settings: Mapping[str, Any]):
        self.out, self.path = out, out.with_name(f"{out.name}.partial")
        self.found: dict[Item, str] = {}
        head = {"format": FORMAT, **json.loads(json.dumps(settings))}
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []  # what follows the last break is half a line
        if lines:
            old = json.loads(lines[0])
            differ = [_difference(n, old.get(n), head.get(n)) for n in {**old, **head} if old.get(n) != head.get(n)]
            if differ:
                raise ValueError(
                    f"{self.path} holds answers with other settings: {'; '.join(differ)}. Give the same ones to go on, "
                    "choose another --out, or remove it to begin again"
                )
            for line in lines[1:]:
                prompt, sample, record = json.loads(line)
                self.found[prompt, sample] = json.dumps(record, ensure_ascii=False)
            say(f"{out}: going on with {len(self.found):,} answers that are there")
        self.file = open(self.path, "r+b" if lines else "wb")  # noqa: SIM115 (closed by `close`)
        self.file.truncate(self.file.seek(sum(len(line) + 1 for line in lines)))
        if not lines:
            self._write(json.dumps(head) + "\n")

    def _write(self, text: str) -> None:
        self.file.write(text.encode())
        self.file.flush()
        os.fsync(self.file.fileno())

    def add(self, answers: Mapping[Item, Mapping[str, Any]]) -> None:
        """Writes answers to the disk."""
        self._write("".join(json.dumps([*item, record], ensure_ascii=False) + "\n" for item, record in answers.items()))
        self.found |= {item: json.dumps(record, ensure_ascii=False) for item, record in answers.items()}

    def close(self) -> None:
        """Closes the file; what is in it stays."""
        self.file.close()

    def finish(self) -> None:
        """Writes `out` in the order of the prompts, under another name first, and removes the unfinished file."""
        work = self.out.with_name(f".{self.out.name}.{os.getpid()}")
        with open(work, "w", encoding="utf-8") as file:
            file.writelines(self.found[item] + "\n" for item in sorted(self.found))
        work.rename(self.out)
        self.path.unlink()


def answer_prompts(
    model: Callable[[], Decoder],
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    out: pathlib.Path,
    *,
    decode: Callable[[Prompt, Sequence[int], list[int]], str],
    settings: Mapping[str, Any],
    sampling: Sampling,
    eos_ids: Sequence[int],
    max_new_tokens: int,
    samples: int,
    batch_size: int,
    seed: int,
) -> Answered:
    """Answers prompts and writes the answers to `out`, or goes on with it.

    Args:
      model: loads the model; called if there is an answer to make.
      prompts: what is answered.
      ids: the tokens of each prompt.
      out: a file that does not exist.
      decode: (prompt, its ids, new ids) -> the answer's text.
      settings: everything that decides the answers, see `Partial`.
      sampling, eos_ids, max_new_tokens: see `generate`.
      samples: answers per prompt.
      batch_size: answers made at a time.
      seed: with the numbers of the prompt and the sample it decides what is drawn.

    Raises:
      ValueError: `out` was begun with other settings.
    """
    partial, loaded = Partial(out, settings), None
    options: dict[str, Any] = dict(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
    try:
        with progress_bar(name="generate", unit="answer", total=samples * len(prompts), done=len(partial.found)) as bar:
            for size, items in batches([len(x) for x in ids], samples, batch_size):
                missing = [item for item in items if item not in partial.found]
                if not missing:
                    continue
                loaded = model() if loaded is None else loaded
                filled = [*items, *[items[-1]] * (batch_size - len(items))]
                made = generate(
                    loaded,
                    [ids[prompt] for prompt, _ in filled],
                    max_new_tokens=max_new_tokens,
                    eos_id=eos_ids,
                    row_keys=row_keys(seed, filled),
                    padded_to=size,
                    **options,
                )
                records = {}
                for (prompt, sample), new in zip(items, made, strict=False):
                    record = prompts[prompt].answered(decode(prompts[prompt], ids[prompt], new))
                    record |= {"sample": sample} if samples > 1 else {}
                    records[prompt, sample] = record | {"finish_reason": LENGTH if len(new) == max_new_tokens else STOP}
                partial.add({item: records[item] for item in missing})
                bar.update(len(missing))
    finally:
        partial.close()
    partial.finish()
    records = [json.loads(line) for line in partial.found.values()]
    said = [r["messages"][-1]["content"] if "messages" in r else r["completion"] for r in records]
    return Answered(len(records), sum(r["finish_reason"] == LENGTH for r in records), sum(not text.strip() for text in said))
