"""Tokenizes a source ahead of time, by any number of processes and hosts, into shards; run again, it continues where it was.

    OUT/plan.json            what is being prepared, in which pieces, with the size and time of every file
    OUT/shard-00000/         one piece: train/ and held_out/, each ids.npy, starts.npy and, for conversations, weights.npy
    OUT/index.json           what there is; written last, so that a directory that has it is complete

The directory serves any row length, packing and mesh, because rows are packed when they are read.
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
from typing import Any, NoReturn

import jax

from hybrid_jax.data.documents import HELD_OUT_PERCENT, Piece, is_held_out, pieces, read_piece, unread_files
from hybrid_jax.data.stamps import changes, stamp
from hybrid_jax.data.tokenizer import EosTokenId
from hybrid_jax.data.tokens import FORMAT, INDEX, MIXED, Encoder, Tokens
from hybrid_jax.files import new_directory, write_text
from hybrid_jax.parallel.distributed import barrier, is_first, say
from hybrid_jax.progress import progress_bar

PLAN, SUMMARY = "plan.json", "shard.json"
COUNTED = ("documents", "tokens", "text_bytes")
LENIENT = ("skip_bad", "replace_invalid")  # settings that change only the shards of pieces with bad records
AT_A_TIME = 4096  # documents tokenized together

Work = tuple[str, Piece, dict[str, Any]]
"""A shard to make: its directory, the piece it is made of, and the piece's stamp in the plan."""


def prepare(
    source: str,
    out: str | pathlib.Path,
    tokenizer_from: str,
    *,
    eos_token_id: EosTokenId = None,
    workers: int = 1,
    held_out_percent: float = HELD_OUT_PERCENT,
    skip_bad: bool = False,
    replace_invalid: bool = False,
) -> dict[str, Any]:
    """Makes a prepared directory, or finishes one. The processes of a job share the work: all call this with the same arguments.

    Args:
      source: see `documents.pieces`.
      out: the directory to make or to finish.
      tokenizer_from: a model directory.
      eos_token_id: of the model's config, see `end_of_text_id`.
      workers: number of processes that this one starts.
      held_out_percent: how many percent of the documents are kept for evaluation.
      skip_bad: count records that cannot be read instead of ending at the first.
      replace_invalid: put U+FFFD in place of bytes that are not UTF-8, and count them, instead of refusing them.

    Returns:
      The index: what decides the tokens, and for each part and shard how many documents, tokens and bytes of text; `bad`,
      the number of skipped records; `counts` of what was replaced, left out or rendered differently (see `tokens.NOTES`).

    Raises:
      ValueError: the source has no document or a bad one, or `out` holds the preparation of another source or with other
        settings; the message says what differs.
    """
    out, parts = pathlib.Path(out), pieces(source)
    settings: dict[str, Any] = {
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
    done = _is_done(out, plan)
    barrier("prepare: everybody knows whether it is done")
    if done:
        return json.loads((out / INDEX).read_text())
    if is_first():
        _start_or_go_on(out, plan, names)
    barrier("prepare: the plan is written")

    planned = zip(names, parts, plan["pieces"], strict=True)
    todo = [(str(out / name), part, stamped) for name, part, stamped in planned if not (out / name).exists()]
    barrier("prepare: everybody knows what is to do")
    lenient = {name: settings[name] for name in LENIENT}
    mine, finished = todo[jax.process_index() :: jax.process_count()], len(parts) - len(todo)
    _run(mine, workers, (str(tokenizer_from), eos_token_id, held_out_percent, source, lenient), finished)
    barrier("prepare: the shards are written")
    shards = [json.loads((out / name / SUMMARY).read_text()) for name in names]
    totals = {part: {k: sum(s[part][k] for s in shards) for k in COUNTED} for part in ("train", "held_out")}
    bad = sum(s["bad"] for s in shards)
    if not any(part["documents"] for part in totals.values()):
        first = next((s["first_bad"][0] for s in shards if s["first_bad"]), "")
        why = f"none of its {bad:,} records could be read, the first: {first}" if bad else "there is nothing in it"
        raise ValueError(f"{source} has no documents: {why}")
    if len({s[part].get("pairs", False) for s in shards for part in totals if s[part]["documents"]}) > 1:
        raise ValueError(f"{source}: {MIXED}")
    counts = {n: sum(s["counts"].get(n, 0) for s in shards) for n in sorted({n for s in shards for n in s["counts"]})}
    shards = [{k: v for k, v in s.items() if k not in ("piece", "counts", *LENIENT)} for s in shards]
    if not any((out / name / part / "weights.npy").exists() for name in names for part in totals):
        settings["chat_template"] = ""  # there are no conversations
    index = {"format": FORMAT, **settings, **totals, "bad": bad, "counts": counts, "shards": shards}
    if is_first():
        write_text(out / INDEX, json.dumps(index, indent=1) + "\n")
    barrier("prepare: the index is written")
    return index


def _differences(old: Mapping[str, Any], plan: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Describes how two plans differ: (in the settings, in the source)."""
    names = [n for n in plan if n not in ("source", "tokenizer_from", "pieces", *LENIENT) and old.get(n) != plan[n]]
    if "format" in names:  # the rest cannot be compared
        return [f"its format was {old.get('format')!r}, now {FORMAT!r}"], []
    return [f"{n} was {old[n]!r:.40}, now {plan[n]!r:.40}" for n in names], changes(old["pieces"], plan["pieces"])


def _refuse(out: pathlib.Path, differences: list[str]) -> NoReturn:
    raise ValueError(
        f"{out} holds another preparation: {'; '.join(differences)}. Choose another directory, or remove it and everything is "
        "tokenized again"
    )


def _is_done(out: pathlib.Path, plan: Mapping[str, Any]) -> bool:
    """Returns whether `out` is the finished preparation of a plan.

    Raises:
      ValueError: it is the finished preparation of another plan; the message says what differs.
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


def _start_or_go_on(out: pathlib.Path, plan: Mapping[str, Any], names: Sequence[str]) -> None:
    """Writes the plan, and removes what an unfinished preparation left and the plan cannot use.

    Raises:
      ValueError: there are finished shards that were made with other settings; the message names them.
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
        say(f"{out}: {len(stale)} of {len(finished)} finished shards are made again: {why}")


def _is_of_use(shard: pathlib.Path, piece: Mapping[str, Any] | None, plan: Mapping[str, Any]) -> bool:
    """Returns whether a finished shard is what the plan would make of a piece."""
    summary = json.loads((shard / SUMMARY).read_text())
    as_strict = not summary["bad"] and not summary["counts"].get("replaced_documents")
    return summary["piece"] == piece and (as_strict or all(summary[name] == plan[name] for name in LENIENT))


def _run(todo: Sequence[Work], workers: int, settings: tuple[Any, ...], finished: int) -> None:
    """Makes this process's part of the missing shards; the first process shows a progress bar of its own.

    Args:
      settings: arguments of `_start`.
      finished: number of shards that are there already.
    """
    bar = progress_bar(name="prepare", unit="piece", total=finished + len(todo), done=finished, shown=is_first())
    tokens = 0
    with bar:
        for made in _made(todo, workers, settings):
            tokens += made
            bar.update()
            bar.set_postfix_str(f"{tokens:,} tokens")


def _made(todo: Sequence[Work], workers: int, settings: tuple[Any, ...]) -> Iterator[int]:
    """Makes the shards in this process or in several others; yields the number of tokens of each."""
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


def _pool(workers: int, settings: tuple[Any, ...]) -> concurrent.futures.ProcessPoolExecutor:
    """Starts processes that have the tokenizer; they are spawned, not forked, because this one may hold a device."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_start, initargs=settings)


_worker: dict[str, Any] = {}


def _start(
    tokenizer_from: str, eos_token_id: EosTokenId, held_out_percent: float, source: str, lenient: Mapping[str, bool]
) -> None:
    """Prepares this process for `_shard`."""
    _worker.update(encode=Encoder(tokenizer_from, eos_token_id), percent=held_out_percent, source=source, lenient=lenient)


def _shard(directory: str, piece: Piece, planned: dict[str, Any]) -> int:
    """Makes one shard, written under another name and then renamed; returns how many tokens it has.

    Raises:
      ValueError: a record cannot be read, or a file changes while it is read.
    """
    bad: list[str] = []
    encode, lenient = _worker["encode"], _worker["lenient"]
    counts = encode.counts = collections.Counter()
    documents = read_piece(piece, bad.append if lenient["skip_bad"] else None, lenient["replace_invalid"])
    parts: dict[str, list[Tokens]] = {"train": [], "held_out": []}
    for some in iter(lambda: list(itertools.islice(documents, AT_A_TIME)), []):
        chosen = [is_held_out(d.name, _worker["percent"]) for d in some]
        counts.update(replaced_documents=sum(d.replaced > 0 for d in some), replaced_characters=sum(d.replaced for d in some))
        for name, wanted in (("train", False), ("held_out", True)):
            parts[name].append(encode([d for d, held in zip(some, chosen, strict=True) if held == wanted]))
    if changed := changes([planned], [json.loads(json.dumps(stamp(piece, _worker["source"])))]):
        raise ValueError(f"the source changed while it was being prepared: {'; '.join(changed)}; start again")
    with new_directory(directory) as work:
        summary: dict[str, Any] = {"name": pathlib.Path(directory).name, "bad": len(bad), "first_bad": bad[:1], **lenient}
        summary |= {"counts": {n: c for n, c in sorted(counts.items()) if c}, "piece": planned}
        for name, found in parts.items():
            tokens = Tokens.join(found, encode.dtype)
            tokens.save(work / name)
            sizes = (tokens.documents, len(tokens.ids), tokens.text_bytes)
            summary[name] = {**dict(zip(COUNTED, sizes, strict=True)), "digest": tokens.fingerprint, "pairs": tokens.pairs}
        write_text(work / SUMMARY, json.dumps(summary) + "\n")
    return summary["train"]["tokens"] + summary["held_out"]["tokens"]
