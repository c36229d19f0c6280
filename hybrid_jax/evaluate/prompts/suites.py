"""RULER, BABILong, HELMET's recall, retrieved-documents and re-ranking tasks, and MRCR, from the files of their repositories.

Formats and scores follow NVIDIA/RULER (arXiv 2404.06654), booydar/babilong (2406.10149), princeton-nlp/HELMET (2410.02694) and
openai/mrcr. RULER's files hold complete prompts. The prompts of the others are built here in our own words and, but for the
key-value task, without examples, which changes scores of small models: compare models within one evaluation. HELMET's tasks that
a language model judges, or that are scored by summaries, are not here.
"""

from __future__ import annotations

import difflib
import json
import math
import pathlib
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_jax.evaluate.prompts.contract import Example, Suite

Record = Mapping[str, Any]


def _texts(value: Any, field: str) -> tuple[str, ...]:
    """Returns one text or a list of texts as a tuple."""
    values = [value] if isinstance(value, str | int) else value
    if not isinstance(values, Sequence) or not values or not all(isinstance(v, str | int) for v in values):
        raise ValueError(f"the field {field!r} must be a text or a list of texts, got {value!r}")
    return tuple(map(str, values))


def _without_control_characters(text: str) -> str:
    """RULER's clean-up of a prediction."""
    return re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip()


def read_ruler(record: Record, path: pathlib.Path) -> Example:
    """A line of TASK/validation.jsonl: `input`, `outputs`, and maybe `answer_prefix` and `length`."""
    at: dict[str, str | int] = {"task": path.parent.name}
    return Example(record["input"], _texts(record["outputs"], "outputs"), at, record, begin=record.get("answer_prefix", ""))


def score_ruler(prediction: str, example: Example) -> float:
    """The share of the references that stand in the prediction, whatever their case; for `qa` tasks whether any does."""
    text = _without_control_characters(prediction).lower()
    there = [reference.lower() in text for reference in example.references]
    part = str(example.at["task"]).startswith("qa")
    return float(any(there)) if part else sum(there) / len(there)


def read_babilong(record: Record, path: pathlib.Path) -> Example:
    """A line with `input`, `question`, `target`; the file is called after its task, e.g. qa1.jsonl, or the record has `task`."""
    prompt = (
        "Facts about persons and things are hidden in a text. Answer the question after it in one or two words.\n\n"
        f"Text:\n{record['input']}\n\nQuestion: {record['question']}"
    )
    at: dict[str, str | int] = {"task": str(record.get("task", path.stem))}
    at |= {"length": str(record["length"])} if "length" in record else {}
    return Example(prompt, _texts(record["target"], "target"), at, record, begin="\nAnswer:")


def score_babilong(prediction: str, example: Example) -> float:
    """Whether the first sentence names the target, and, of a target with commas, every part of it."""
    text = re.split(r"[.\n]", prediction.lower().strip())[0]
    parts = [part.strip().lower() for target in example.references for part in target.split(",")]
    return float(all(re.search(rf"\b{re.escape(part)}\b", text) for part in parts))


def _documents(record: Record, *, numbered: bool) -> str:
    """Returns the documents of a record, with their ids if they are to be ranked."""
    ids = (f"[{ctx['id']}] " if numbered else "" for ctx in record["ctxs"])
    titles = (f"Document (title: {ctx['title']})" if ctx.get("title") else "Document" for ctx in record["ctxs"])
    texts = (ctx["text"] for ctx in record["ctxs"])
    return "\n\n".join(f"{n}{title}: {text}" for n, title, text in zip(ids, titles, texts, strict=True))


def read_helmet(record: Record, path: pathlib.Path) -> Example:
    """A line of one of HELMET's files:

    json_kv, ruler    `context`, `question` or `query`, `answer` or `outputs`, and maybe `demos`.
    kilt, popqa       `ctxs` (documents with `text` and maybe `title`), `question`, `answers`: documents that a search found.
    """
    at: dict[str, str | int] = {"task": path.stem}
    if "ctxs" in record:
        documents = _documents(record, numbered=False)
        prompt = f"Answer the question in a few words from the documents.\n\n{documents}\n\nQuestion: {record['question']}"
        return Example(prompt, _texts(record["answers"], "answers"), at, record, begin="\nAnswer:")
    question = record["question"] if "question" in record else record["query"]
    answers = record["outputs"] if "outputs" in record else record["answer"]
    demos = "".join(f"Key: {key}\nValue: {value}\n\n" for key, value in record.get("demos") or ())
    prompt = f"{record['context']}\n\n{demos}Key: {question}" if demos else f"{record['context']}\n\n{question}"
    begin = "\nValue:" if demos else "\nAnswer:"
    return Example(prompt, _texts(answers, "answer"), at, record, begin=begin)


def _normalized(text: str) -> str:
    """SQuAD's normalization: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def score_helmet(prediction: str, example: Example) -> float:
    """The share of the references that stand in the prediction, both normalized as for SQuAD; of retrieved documents whether any
    does."""
    text = _normalized(prediction)
    there = [_normalized(reference) in text for reference in example.references]
    return float(any(there)) if "ctxs" in example.record else sum(there) / len(there)


def read_reranking(record: Record, path: pathlib.Path) -> Example:
    """A line of HELMET's msmarco files: `query`, and `ctxs`, documents with `id`, `text`, `label` (relevance) and maybe `title`."""
    labels = tuple(str(ctx["label"]) for ctx in record["ctxs"])
    prompt = (
        "Rank the documents by how relevant they are to the query, the most relevant first. Write the ten best ids, joined by "
        f"' > '.\n\n{_documents(record, numbered=True)}\n\nQuery: {record['query']}"
    )
    return Example(prompt, labels, {"task": path.stem}, record, begin="\nRanking:")


def score_reranking(prediction: str, example: Example) -> float:
    """NDCG@10 of the longest `id > id > ...` in the prediction, wherever it is; the word ID and brackets do not count."""
    text = re.sub(r"\bID:?\s*(?=\w)|[\[\]]", "", prediction)
    runs = re.findall(r"[\w-]+(?:[ \t]*>[ \t]*[\w-]+)*", text)
    longest = max((re.split(r"[ \t]*>[ \t]*", run) for run in runs), key=len, default=[])
    return _ndcg(longest, example.record["ctxs"])


def _ndcg(ranking: Sequence[str], ctxs: Sequence[Record], most: int = 10) -> float:
    """Returns NDCG at `most` as trec_eval defines it: sums of relevance / log2(1 + rank), over that of the best ranking.

    Ids that are no document's, and repeated ones, are left out; 0 where nothing is relevant.
    """
    relevance = {str(ctx["id"]): float(ctx["label"]) for ctx in ctxs}
    ranked = [relevance[i] for i in dict.fromkeys(ranking) if i in relevance]

    def gain(values: Sequence[float]) -> float:
        return sum(value / math.log2(2 + rank) for rank, value in enumerate(values[:most]))

    best = gain(sorted(relevance.values(), reverse=True))
    return gain(ranked) / best if best else 0.0


def read_mrcr(record: Record, path: pathlib.Path) -> Example:
    """A row of MRCR: `prompt` (messages as JSON), `answer`, `random_string_to_prepend`, `n_needles`."""
    messages = json.loads(record["prompt"]) if isinstance(record["prompt"], str) else record["prompt"]
    prompt = "".join(f"{m['role']}: {m['content']}\n\n" for m in messages) + "assistant:"
    _ = record["random_string_to_prepend"]
    return Example(prompt, (record["answer"],), {"needles": int(record.get("n_needles", 0))}, record, messages=tuple(messages))


def score_mrcr(prediction: str, example: Example) -> float:
    """0 unless the prediction starts with the random text; else the similarity of the rest to the answer's, by difflib."""
    start, text = example.record["random_string_to_prepend"], prediction.strip()
    if not text.startswith(start):
        return 0.0
    return difflib.SequenceMatcher(None, text.removeprefix(start), example.references[0].removeprefix(start)).ratio()


SUITES: dict[str, Suite] = {
    "ruler": Suite(read_ruler, score_ruler, new_tokens=128, files="**/validation*.jsonl"),
    "babilong": Suite(read_babilong, score_babilong, new_tokens=16),
    "helmet": Suite(read_helmet, score_helmet, new_tokens=50),
    "helmet_reranking": Suite(read_reranking, score_reranking, new_tokens=200),
    "mrcr": Suite(read_mrcr, score_mrcr, new_tokens=1024, files="**/*.parquet"),
}
