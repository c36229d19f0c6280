"""Tokenising ahead of time: a source -> a directory of shards, in parallel; killed, it goes on where it was.

    OUT/plan.json            what is being prepared, in which pieces, with the size and time of every file
    OUT/shard-00000/         of one piece: train/ and held_out/, each ids.npy, starts.npy and, of conversations, weights.npy
    OUT/index.json           what is there; written last, so that a directory that has it is whole

One set serves every row length, packing and mesh: rows are packed when they are read.
"""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import json
import multiprocessing
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybrid_jax.data.documents import HELD_OUT_PERCENT, Piece, is_held_out, pieces, read_piece, unread_files
from hybrid_jax.data.stamps import changes, stamp
from hybrid_jax.data.tokens import FORMAT, INDEX, Encoder, Tokens
from hybrid_jax.files import new_directory, write_text
from hybrid_jax.parallel.distributed import say
from hybrid_jax.progress import progress_bar

PLAN, SUMMARY = "plan.json", "shard.json"
COUNTED = ("documents", "tokens", "text_bytes")
LENIENT = ("skip_bad", "replace_invalid")  # settings that change only shards which have something to be lenient about
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
    replace_invalid: bool = False,
) -> dict:
    """Makes a prepared directory, or finishes one.

    Args:
      source: see `documents.pieces`.
      tokenizer_from: a model directory.
      workers: processes.
      skip_bad: count records that cannot be read instead of ending at the first.
      replace_invalid: put U+FFFD in place of bytes that are not UTF-8, and count them, instead of refusing them.

    Returns:
      The index: what decides the tokens, and for each part and shard how many documents, tokens and bytes of text; `bad`
      records that were skipped; `counts` of what was replaced, left out or rendered differently (see `tokens.NOTES`).

    Raises:
      ValueError: bad input, or `out` holds the preparation of another source or with other settings; says what differs.
    """
    out, parts = pathlib.Path(out), pieces(source)
    settings = {
        "source": source if source == "stdlib" or source.startswith("hf:") else str(pathlib.Path(source).absolute()),
        "tokenizer_from": str(pathlib.Path(tokenizer_from).absolute()),
        **Encoder(tokenizer_from, eos_token_id).identity,
        "held_out_percent": held_out_percent,
        "skip_bad": skip_bad,
        "replace_invalid": replace_invalid,
    }
    plan = {"format": FORMAT, **settings, "pieces": [stamp(part, source) for part in parts]}
    plan = json.loads(json.dumps(plan))
    names = [f"shard-{i:05d}" for i in range(len(parts))]
    if unread := unread_files(source):
        say(f"{source}: {unread}")
    if _is_done(out, plan):
        return json.loads((out / INDEX).read_text())
    _start_or_go_on(out, plan, names)

    todo = [(str(out / n), *work) for n, *work in zip(names, parts, plan["pieces"], strict=True) if not (out / n).exists()]
    lenient = {name: settings[name] for name in LENIENT}
    _run(todo, workers, (str(tokenizer_from), eos_token_id, held_out_percent, source, lenient), len(parts))
    shards = [json.loads((out / name / SUMMARY).read_text()) for name in names]
    totals = {part: {k: sum(s[part][k] for s in shards) for k in COUNTED} for part in ("train", "held_out")}
    counts = {n: sum(s["counts"].get(n, 0) for s in shards) for n in sorted({n for s in shards for n in s["counts"]})}
    shards = [{k: v for k, v in s.items() if k not in ("piece", "counts", *LENIENT)} for s in shards]
    if not any((out / name / part / "weights.npy").exists() for name in names for part in totals):
        settings["chat_template"] = ""  # there are no conversations
    index = {"format": FORMAT, **settings, **totals, "bad": sum(s["bad"] for s in shards), "counts": counts, "shards": shards}
    write_text(out / INDEX, json.dumps(index, indent=1) + "\n")
    return index


def _differences(old: Mapping, plan: Mapping) -> tuple[list[str], list[str]]:
    """(in the settings, in the source) what differs between two plans, in words."""
    names = [n for n in plan if n not in ("source", "tokenizer_from", "pieces", *LENIENT) and old.get(n) != plan[n]]
    if "format" in names:  # the rest cannot be compared
        return [f"its format was {old.get('format')!r}, now {FORMAT!r}"], []
    return [f"{n} was {old[n]!r:.40}, now {plan[n]!r:.40}" for n in names], changes(old["pieces"], plan["pieces"])


def _refuse(out: pathlib.Path, differences: list[str]):
    raise ValueError(
        f"{out} holds another preparation: {'; '.join(differences)}. Choose another directory, or remove it and everything is "
        "tokenized again"
    )


def _is_done(out: pathlib.Path, plan: Mapping) -> bool:
    """Whether `out` is the finished preparation of a plan.

    Raises:
      ValueError: it is finished, and differs; says in what.
    """
    if not (out / INDEX).exists() or not (out / PLAN).exists():
        return False
    old, index = (json.loads((out / name).read_text()) for name in (PLAN, INDEX))
    settings, source = _differences(old, plan)
    counts = index.get("counts", {})
    for name, count in (("skip_bad", index.get("bad")), ("replace_invalid", counts.get("replaced_documents"))):
        if count and not plan[name]:
            settings.append(f"{name} was on ({count:,} records), now off")
    if settings or source:
        _refuse(out, settings + source)
    return True


def _start_or_go_on(out: pathlib.Path, plan: Mapping, names: Sequence[str]):
    """Writes the plan and removes what an unfinished preparation left that is of no use for it.

    Raises:
      ValueError: finished shards are there that were made with other settings; says which.
    """
    finished = sorted(out.glob("shard-*"))
    if not (out / PLAN).exists():
        if not finished:
            with new_directory(out) as directory:
                write_text(directory / PLAN, json.dumps(plan) + "\n")
            return
        _refuse(out, [f"it has {len(finished)} finished shards and no {PLAN}"])
    old = json.loads((out / PLAN).read_text())
    settings, source = _differences(old, plan)
    if settings and finished:
        _refuse(out, settings)
    write_text(out / PLAN, json.dumps(plan) + "\n")
    wanted = dict(zip(names, plan["pieces"], strict=True))
    stale = [shard for shard in finished if not _is_of_use(shard, wanted.get(shard.name), plan)]
    for leftover in (*stale, *out.glob(".shard-*")):
        shutil.rmtree(leftover)
    if stale:
        why = "; ".join(source) or "they were read more leniently"
        print(f"{out}: {len(stale)} of {len(finished)} finished shards are made again: {why}", flush=True)


def _is_of_use(shard: pathlib.Path, piece: Mapping | None, plan: Mapping) -> bool:
    """Whether a finished shard is what the plan would make of a piece."""
    summary = json.loads((shard / SUMMARY).read_text())
    as_strict = not summary["bad"] and not summary["counts"].get("replaced_documents")
    return summary["piece"] == piece and (as_strict or all(summary[name] == plan[name] for name in LENIENT))


def _run(todo: Sequence[tuple[str, Piece, dict]], workers: int, settings: tuple, total: int):
    bar = progress_bar(name="prepare", unit="piece", total=total, done=total - len(todo))
    tokens = 0
    with bar:
        for made in _made(todo, workers, settings):
            tokens += made
            bar.update()
            bar.set_postfix_str(f"{tokens:,} tokens")


def _made(todo: Sequence[tuple[str, Piece, dict]], workers: int, settings: tuple) -> Iterator[int]:
    """Makes the shards, by this process alone or by several others; yields the tokens of each."""
    if workers == 1:
        _start(*settings)
        yield from (_shard(*work) for work in todo)
        return
    with _pool(workers, settings) as pool:
        running = {pool.submit(_shard, *work) for work in todo}
        try:
            yield from (done.result() for done in concurrent.futures.as_completed(running))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _pool(workers: int, settings: tuple):
    """Processes that have the tokenizer; fresh ones, as this one may hold a device."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_start, initargs=settings)


_worker: dict[str, Any] = {}


def _start(tokenizer_from, eos_token_id, held_out_percent, source, lenient):
    _worker.update(encode=Encoder(tokenizer_from, eos_token_id), percent=held_out_percent, source=source, lenient=lenient)


def _shard(directory: str, piece: Piece, planned: dict) -> int:
    """One shard, written beside and renamed; how many tokens it has.

    Raises:
      ValueError: a record that cannot be read, or a file that changes while it is read.
    """
    bad: list[str] = []
    encode, lenient = _worker["encode"], _worker["lenient"]
    counts = encode.counts = collections.Counter()
    documents = read_piece(piece, bad.append if lenient["skip_bad"] else None, lenient["replace_invalid"])
    parts = {"train": [], "held_out": []}
    for some in iter(lambda: list(itertools.islice(documents, AT_A_TIME)), []):
        chosen = [is_held_out(d.name, _worker["percent"]) for d in some]
        counts.update(replaced_documents=sum(d.replaced > 0 for d in some), replaced_characters=sum(d.replaced for d in some))
        for name, wanted in (("train", False), ("held_out", True)):
            parts[name].append(encode([d for d, held in zip(some, chosen, strict=True) if held == wanted]))
    if changed := changes([planned], [json.loads(json.dumps(stamp(piece, _worker["source"])))]):
        raise ValueError(f"the source changed while it was being prepared: {'; '.join(changed)}; start again")
    with new_directory(directory) as work:
        summary = {"name": pathlib.Path(directory).name, "bad": len(bad), "first_bad": bad[:1], **lenient}
        summary |= {"counts": {n: c for n, c in sorted(counts.items()) if c}, "piece": planned}
        for name, found in parts.items():
            tokens = Tokens.join(found, encode.dtype)
            tokens.save(work / name)
            sizes = (len(tokens.starts) - 1, len(tokens.ids), tokens.text_bytes)
            summary[name] = {**dict(zip(COUNTED, sizes, strict=True)), "digest": tokens.fingerprint}
        write_text(work / SUMMARY, json.dumps(summary) + "\n")
    return summary["train"]["tokens"] + summary["held_out"]["tokens"]
