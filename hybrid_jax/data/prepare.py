"""Tokenising ahead of time: a source -> a directory of shards, in parallel; killed, it goes on where it was.

    OUT/plan.json            what is being prepared, in which pieces
    OUT/shard-00000/         of one piece: train/ and held_out/, each ids.npy, starts.npy and, of conversations, weights.npy
    OUT/index.json           what is there; written last, so that a directory that has it is whole

One set serves every row length, packing and mesh: rows are packed when they are read.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import multiprocessing
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from hybrid_jax.data.documents import HELD_OUT_PERCENT, Piece, is_held_out, pieces, read_piece
from hybrid_jax.data.tokenizer import load_tokenizer
from hybrid_jax.data.tokens import FORMAT, INDEX, Encoder, Tokens, tokenizer_fingerprint
from hybrid_jax.files import new_directory, write_text
from hybrid_jax.progress import progress_bar

PLAN, SUMMARY = "plan.json", "shard.json"
AT_A_TIME = 4096  # documents


def prepare(
    source: str,
    out: str | pathlib.Path,
    tokenizer_from: str,
    *,
    eos_token_id=None,
    workers: int = 1,
    held_out_percent: float = HELD_OUT_PERCENT,
    skip_bad: bool = False,
) -> dict:
    """Makes a prepared directory, or finishes one.

    Args:
      source: see `documents.pieces`.
      tokenizer_from: a model directory.
      workers: processes.
      skip_bad: count records that can not be read instead of ending at the first.

    Returns:
      The index.

    Raises:
      ValueError: bad input, or `out` holds another preparation.
    """
    out = pathlib.Path(out)
    parts = pieces(source)
    settings = {
        "source": source,
        "tokenizer_from": str(tokenizer_from),
        "tokenizer": tokenizer_fingerprint(load_tokenizer(tokenizer_from)),
        "eos_token_id": eos_token_id,
        "held_out_percent": held_out_percent,
        "skip_bad": skip_bad,
        "pieces": [[p.reader, *p.arguments, _stamp(p)] for p in parts],
    }
    settings = json.loads(json.dumps(settings))
    if not (out / PLAN).exists():
        with new_directory(out) as directory:
            write_text(directory / PLAN, json.dumps(settings) + "\n")
    elif json.loads((out / PLAN).read_text()) != settings:
        raise ValueError(f"{out} holds another preparation (compare {out / PLAN}); choose another directory, or remove it")
    if (out / INDEX).exists():
        return json.loads((out / INDEX).read_text())
    for leftover in out.glob(".shard-*"):
        shutil.rmtree(leftover)

    names = [f"shard-{i:05d}" for i in range(len(parts))]
    todo = [(str(out / n), p) for n, p in zip(names, parts, strict=True) if not (out / n).exists()]
    _run(todo, workers, (str(tokenizer_from), eos_token_id, held_out_percent, skip_bad), len(parts))
    shards = [json.loads((out / name / SUMMARY).read_text()) for name in names]
    totals = {part: {k: sum(s[part][k] for s in shards) for k in shards[0][part]} for part in ("train", "held_out")}
    kept = {k: v for k, v in settings.items() if k != "pieces"}
    index = {"format": FORMAT, **kept, **totals, "bad": sum(s["bad"] for s in shards), "shards": shards}
    write_text(out / INDEX, json.dumps(index, indent=1) + "\n")
    return index


def _stamp(piece: Piece) -> Any:
    """Changes when the piece's file does."""
    if piece.reader not in ("jsonl", "parquet", "arrow"):
        return None
    stat = pathlib.Path(piece.arguments[0]).stat()
    return [stat.st_size, stat.st_mtime_ns]


def _run(todo: Sequence[tuple[str, Piece]], workers: int, settings: tuple, total: int):
    bar = progress_bar(name="prepare", unit="piece", total=total, done=total - len(todo))
    tokens = 0
    with bar, _pool(workers, settings) as pool:
        running = {pool.submit(_shard, *work) for work in todo}
        try:
            for done in concurrent.futures.as_completed(running):
                tokens += done.result()
                bar.update()
                bar.set_postfix_str(f"{tokens:,} tokens")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _pool(workers: int, settings: tuple):
    """Processes that have the tokenizer; fresh ones, as this one may hold a device."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_start, initargs=settings)


_worker: dict[str, Any] = {}


def _start(tokenizer_from, eos_token_id, held_out_percent, skip_bad):
    _worker.update(encode=Encoder(tokenizer_from, eos_token_id), percent=held_out_percent, skip_bad=skip_bad)


def _shard(directory: str, piece: Piece) -> int:
    """One shard, written beside and renamed; how many tokens it has."""
    bad: list[str] = []
    documents = read_piece(piece, bad.append if _worker["skip_bad"] else None)
    parts = {"train": [], "held_out": []}
    for some in iter(lambda: list(itertools.islice(documents, AT_A_TIME)), []):
        chosen = [is_held_out(d.name, _worker["percent"]) for d in some]
        for name, wanted in (("train", False), ("held_out", True)):
            parts[name].append(_worker["encode"]([d for d, held in zip(some, chosen, strict=True) if held == wanted]))
    with new_directory(directory) as work:
        summary = {"name": pathlib.Path(directory).name, "bad": len(bad), "first_bad": bad[:1]}
        for name, found in parts.items():
            tokens = Tokens.join(found, _worker["encode"].dtype)
            tokens.save(work / name)
            summary[name] = {"documents": len(tokens.starts) - 1, "tokens": len(tokens.ids), "text_bytes": tokens.text_bytes}
        write_text(work / SUMMARY, json.dumps(summary) + "\n")
    return summary["train"]["tokens"] + summary["held_out"]["tokens"]
