"""Suites of prompts from files: how they are read and scored, and what a model gets for its continuations."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from hybrid_jax.evaluate.instruments import Subject, make_instrument, prompts
from hybrid_jax.evaluate.prompts import SUITES
from hybrid_jax.evaluate.prompts.contract import read_examples
from hybrid_jax.parallel.mesh import abstract_mesh
from tests.conftest import tiny_model


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def example(suite, record, path="niah_single_1/validation.jsonl"):
    return SUITES[suite].read(record, pathlib.Path(path))


RULER = {"input": "The magic number of x is 7. What is it?", "outputs": ["7", "Eight"], "answer_prefix": " It is", "length": 30}


def test_ruler_counts_the_references_in_a_continuation_and_for_questions_whether_any_is_there():
    one, question = example("ruler", RULER), example("ruler", RULER, "qa_1/validation.jsonl")
    assert one.plain == RULER["input"] + " It is" and one.at == {"task": "niah_single_1"}
    score = SUITES["ruler"].score
    assert [score(text, one) for text in (" 7 and EIGHT", "\x007", "nine", "")] == [1, 0.5, 0, 0]
    assert [score(text, question) for text in ("eight", "nine")] == [1, 0]


def test_babilong_wants_the_target_in_the_first_sentence():
    record = {"input": "Mary went to the garden.", "question": "Where is Mary?", "target": "garden"}
    one = example("babilong", record, "qa1.jsonl")
    assert one.at == {"task": "qa1"} and record["input"] in one.prompt and record["question"] in one.prompt
    score = SUITES["babilong"].score
    assert [score(text, one) for text in (" The Garden. Or", "kitchen. garden", "gardens", "")] == [1, 0, 0, 0]
    two = example("babilong", {**record, "target": "garden,kitchen", "task": "qa8", "length": "4k"})
    assert two.at == {"task": "qa8", "length": "4k"} and [score(t, two) for t in ("kitchen, garden", "garden")] == [1, 0]


def test_helmet_compares_without_case_punctuation_and_articles():
    one = example("helmet", {"context": "c", "question": "k", "answer": "the Red-fox", "demos": [["a", "b"]]})
    assert one.plain.endswith("Key: a\nValue: b\n\nKey: k\nValue:")
    score = SUITES["helmet"].score
    assert [score(text, one) for text in ("It is a redfox!", "red fox")] == [1, 0]
    several = example("helmet", {"context": "c", "query": "q", "outputs": ["x1", "x2"]})
    assert score("x2 only", several) == 0.5


def test_mrcr_wants_the_random_text_first_and_then_measures_similarity():
    record = {"prompt": json.dumps([{"role": "user", "content": "hi"}]), "answer": "R7abcd", "n_needles": 2}
    one = example("mrcr", {**record, "random_string_to_prepend": "R7"})
    score = SUITES["mrcr"].score
    assert one.plain == "user: hi\n\nassistant:" and one.at == {"needles": 2}
    assert one.conversation == [{"role": "user", "content": "hi"}]
    assert score("R7abcd", one) == 1 and score("abcd", one) == 0 and score("R7abxx", one) == pytest.approx(0.5)


def test_files_of_a_folder_are_read_in_order_and_a_bad_record_is_named(tmp_path):
    for task in ("vt", "cwe"):
        write(tmp_path / task / "validation.jsonl", RULER, RULER, RULER)
    found = read_examples(SUITES["ruler"], tmp_path, limit=2)
    assert [e.at["task"] for e in found] == ["cwe", "cwe", "vt", "vt"]
    (tmp_path / "vt" / "validation.jsonl").write_text(json.dumps(RULER) + "\n\n{\n")
    with pytest.raises(ValueError, match=r"vt/validation.jsonl, line 3: not JSON"):
        read_examples(SUITES["ruler"], tmp_path)
    for record, message in (
        ({"input": "x"}, "line 1: the record has no field 'outputs'; it has input"),
        ({"input": "x", "outputs": []}, "the field 'outputs' must be a text or a list of texts"),
        ([], "expected a JSON object, got list"),
    ):
        with pytest.raises(ValueError, match=message):
            read_examples(SUITES["ruler"], write(tmp_path / "bad.jsonl", record))
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        read_examples(SUITES["ruler"], tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_examples(SUITES["mrcr"], tmp_path)
    with pytest.raises(ValueError, match="holds no examples"):
        read_examples(SUITES["ruler"], write(tmp_path / "empty.jsonl"))


def test_parquet_files_are_read(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    record = {"prompt": "[]", "answer": "ab", "random_string_to_prepend": "a", "n_needles": 4}
    parquet.write_table(pyarrow.Table.from_pylist([record, record]), tmp_path / "m.parquet")
    assert [e.at for e in read_examples(SUITES["mrcr"], tmp_path)] == [{"needles": 4}] * 2


def test_a_model_is_scored_by_its_continuations_and_what_does_not_fit_is_left_out_and_said(tmp_path, corpus, monkeypatch, capsys):
    """The model is replaced by one that repeats the prompt's last letter, so that the right scores are known."""
    subject = Subject(tiny_model("*-GKA", vocab_size=300, max_position_embeddings=64), corpus.tokenizer, corpus)
    given = []

    def repeat(model, rows, **options):
        given.append([len(r) for r in rows])
        last = [corpus.tokenizer.decode(r)[-1] for r in rows]
        return [corpus.tokenizer.encode(c * options["max_new_tokens"]).ids if c != "!" else [] for c in last]

    monkeypatch.setattr(prompts, "generate", repeat)
    write(
        tmp_path / "a" / "validation.jsonl",
        {"input": "which? x", "outputs": ["xx"]},
        {"input": "which? y", "outputs": ["xx", "yyyy"]},
        {"input": "no!", "outputs": ["n"]},
        {"input": "long " * 40, "outputs": ["x"]},
    )
    values = dict(instrument="prompts", suite="ruler", path=str(tmp_path), new_tokens=4, batch_size=2)
    instrument = make_instrument("p", values)
    instrument.check(subject.model.config, corpus)
    found = {(m.measure, *m.at.items()): m for m in instrument.measure(subject)}
    assert "ruler: 1 of 4 prompts are left out: with 4 new tokens they are longer than the model's 64" in capsys.readouterr().out
    assert found["score",].value == pytest.approx((1 + 0.5 + 0) / 3) and found["score",].count == 3
    assert found["empty",].value == pytest.approx(1 / 3) and found["left_out",].value == 0.25
    assert found["score", ("task", "a")].value == found["score",].value
    assert given == [sorted(given[0] + given[1], reverse=True)[:2], given[1]]  # the longest first
    before = instrument.stamp()
    write(tmp_path / "a" / "validation.jsonl", {"input": "x", "outputs": ["x"]})
    assert instrument.stamp() != before


def test_the_prompts_of_a_real_model_are_continued_as_generate_does(tmp_path, corpus):
    subject = Subject(tiny_model("*-GKA", vocab_size=300), corpus.tokenizer, corpus)
    path = write(tmp_path / "a" / "validation.jsonl", *({"input": "a line of " * n, "outputs": ["zzz"]} for n in (1, 5)))
    found = make_instrument("p", dict(instrument="prompts", path=str(path), new_tokens=2)).measure(subject)
    assert found[0].measure == "score" and found[0].value == 0 and found[0].count == 2


def test_an_instruct_model_is_asked_by_its_chat_template_and_begins_as_the_suite_says(tmp_path, corpus, monkeypatch):
    model = tiny_model("*", vocab_size=300)
    given = []
    monkeypatch.setattr(prompts, "generate", lambda _, rows, **__: given.extend(rows) or [[0]] * len(rows))
    path = write(tmp_path / "a" / "validation.jsonl", {"input": "which?", "outputs": ["x"], "answer_prefix": " It is"})
    instrument = make_instrument("p", dict(instrument="prompts", path=str(path), chat=True))
    with pytest.raises(ValueError, match="has no chat template"):
        instrument.check(dataclasses.replace(model.config, directory=str(tmp_path)), corpus)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[model]")
    model.config = dataclasses.replace(model.config, directory=str(tmp_path))
    instrument.check(model.config, corpus)
    instrument.measure(Subject(model, corpus.tokenizer, corpus))
    assert [corpus.tokenizer.decode(row) for row in given] == ["[user]which?[model]It is"]
    with pytest.raises(ValueError, match="loaded from a directory"):
        instrument.check(tiny_model("*").config, corpus)


def test_suites_and_meshes_that_do_not_work_are_refused(corpus):
    with pytest.raises(ValueError, match="suite"):
        make_instrument("p", dict(instrument="prompts", suite="riddles"))
    with pytest.raises(FileNotFoundError):
        make_instrument("p", dict(instrument="prompts", path="nowhere")).check(tiny_model("*").config, corpus)
    with pytest.raises(ValueError, match="give a mesh whose 'seq' is 1"):
        make_instrument("p", dict(instrument="prompts")).check(tiny_model("*").config, corpus, abstract_mesh({"seq": 2}))


def test_a_line_of_a_file_may_hold_separators_that_are_no_ends_of_lines(tmp_path):
    text = "one\u2028two\u0085three"
    (tmp_path / "qa1.jsonl").write_text(json.dumps({"input": text, "question": "q", "target": "t"}, ensure_ascii=False) + "\n")
    (one,) = read_examples(SUITES["babilong"], str(tmp_path))
    assert text in one.prompt


def lines(path, *records, suite="helmet"):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [example for example in read_examples(SUITES[suite], str(path))]


def test_an_answer_from_retrieved_documents_is_right_if_any_reference_stands_in_it(tmp_path):
    ctxs = [{"title": "Paris", "text": "It is the capital of France."}, {"text": "Rome is old."}]
    (one,) = lines(tmp_path / "nq.jsonl", {"question": "Capital of France?", "answers": ["Lutetia", "the Paris"], "ctxs": ctxs})
    assert "Document (title: Paris): It is the capital of France.\n\nDocument: Rome is old." in one.plain
    assert one.plain.endswith("Question: Capital of France?\nAnswer:")
    score = SUITES["helmet"].score
    assert [score(text, one) for text in ("It is Paris.", "Lutetia", "Rome")] == [1.0, 1.0, 0.0]


THIRD = 1 / np.log2(3)  # what rank 2 counts
BEST = 3 + THIRD  # of labels 3, 0, 1


@pytest.mark.parametrize(
    "text, want",
    [
        (" D-7 > 9 > b\nD-7", 1.0),
        ("b > D-7", 3 * THIRD / BEST),
        ("x > 9 > 9 > D-7", (1 + 3 * THIRD) / BEST),
        ("Here are the 9 best:\n[ID: D-7] > ID9", 1.0),
        ("", 0.0),
    ],
)
def test_a_ranking_is_scored_by_ndcg_at_10_by_hand(text, want, tmp_path):
    ctxs = [{"id": i, "label": n, "text": f"text of {i}"} for i, n in (("D-7", 3), ("b", 0), (9, 1))]
    (one,) = lines(tmp_path / "msmarco.jsonl", {"qid": "1", "query": "q", "ctxs": ctxs}, suite="helmet_reranking")
    assert "[b] Document: text of b" in one.plain and one.plain.endswith("Query: q\nRanking:")
    assert SUITES["helmet_reranking"].score(text, one) == pytest.approx(want)


def test_ranks_behind_the_tenth_do_not_count_and_documents_need_labels(tmp_path):
    many = [{"id": n, "label": int(n == 11), "text": ""} for n in range(12)]
    (one,) = lines(tmp_path / "many.jsonl", {"qid": "1", "query": "q", "ctxs": many}, suite="helmet_reranking")
    assert SUITES["helmet_reranking"].score(" > ".join(map(str, range(12))), one) == 0
    with pytest.raises(ValueError, match="msmarco.jsonl, line 1: the record has no field 'label'"):
        lines(tmp_path / "msmarco.jsonl", {"qid": "1", "query": "q", "ctxs": [{"id": 1, "text": ""}]}, suite="helmet_reranking")
