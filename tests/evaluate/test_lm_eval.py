"""The lm-evaluation-harness: every kind of request has the answers of its own class for transformers, and hybrids work."""

import functools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import datasets
import jax
import numpy as np
import pytest
from flax import nnx
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CachingLM
from lm_eval.tasks import TaskManager
from ml_collections import ConfigDict
from tokenizers import AddedToken, processors

from hybrid_jax.commands.main import main
from hybrid_jax.config import GKAConfig, RopeConfig
from hybrid_jax.convert import save_model
from hybrid_jax.data.tokenizer import save_tokenizer, train_tokenizer
from hybrid_jax.evaluate.lm_eval import HybridLM, scoring
from hybrid_jax.evaluate.lm_eval.options import GenerationOptions
from hybrid_jax.evaluate.lm_eval.prefixes import group_by_prefix, make_rows
from hybrid_jax.evaluate.lm_eval.scoring import Scorer
from hybrid_jax.experiment import run_experiment
from hybrid_jax.generation import bucket
from hybrid_jax.generation.sampling import Sampling
from tests.conftest import relative_error, tiny_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TASKS = pathlib.Path(__file__).parent / "lm_eval_tasks"
NAMES = ["tiny_choice", "tiny_letter", "tiny_last_word", "tiny_text", "tiny_answer"]
TEXT = "".join(path.read_text() for path in sorted(TASKS.glob("*.jsonl")))
POSITIONS = 96


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Data is read from this folder, and what `datasets` stores is removed with the test's files; torch has one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are so small that threads would mostly wait for each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.chdir(TASKS)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 300)


def save_source(directory, tokenizer, **special):
    """Writes a random Qwen3 of transformers and a tokenizer."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=304, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    config = transformers.Qwen3Config(
        **sizes, num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.3, eos_token_id=0
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(directory)
    save_tokenizer(tokenizer, directory, POSITIONS)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **special}))
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer):
    return save_source(tmp_path_factory.mktemp("source"), tokenizer)


@pytest.fixture(scope="module")
def ours(source):
    return HybridLM(str(source), batch_size=4)


def reference(directory):
    """Returns the harness's own model of a directory, on torch."""
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=1)


@pytest.fixture(scope="module")
def theirs(source):
    return reference(source)


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=str(TASKS), include_defaults=False)


def hybrid(tmp_path, tokenizer):
    """The directory of a random hybrid with the tokenizer."""
    save_model(tiny_model("GDN-*", vocab_size=tokenizer.get_vocab_size()), tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model", 256)
    return tmp_path / "model"


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=n) for n, args in enumerate(arguments)]


def same_scores(found, wanted):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    np.testing.assert_allclose([log for log, _ in found], [log for log, _ in wanted], atol=1e-4, rtol=1e-5)


def test_every_kind_of_task_has_the_answers_of_the_harness_s_own_model(ours, theirs, manager):
    options = dict(tasks=NAMES, num_fewshot=1, limit=4, task_manager=manager, bootstrap_iters=0)
    found, wanted = (simple_evaluate(model, **options) for model in (ours, theirs))
    for name in NAMES:
        for a, b in zip(found["samples"][name], wanted["samples"][name], strict=True):
            for (x,), (y,) in zip(a["resps"], b["resps"], strict=True):
                if isinstance(y, str):
                    assert x == y, a["arguments"]
                else:
                    same_scores([x], [y]) if isinstance(y, tuple) else np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4)
        for key, value in wanted["results"][name].items():
            if isinstance(value, float):
                assert found["results"][name][key] == pytest.approx(value, rel=1e-4), (name, key)
    assert any(resp for (resp,) in (r for s in found["samples"]["tiny_answer"] for r in s["resps"])), "some answer has text"
    assert found["config"]["truncated"]["loglikelihood_rolling"]["inputs"] == 0


ODD = [
    ("", "one"),
    ("", "<|endoftext|>one"),
    ("<|endoftext|>", " a b"),
    ("ends with spaces   ", "and goes on"),
    ("a word is di", "vided here"),
    ("naïve ☃", " ☃☃"),
    ("far too long " * 40, " a cat"),
    ("short", " far too long" * 6),
    ("x", "y" * 30),
]


def test_contexts_of_every_sort_are_encoded_and_truncated_as_in_the_harness(ours, theirs, capsys):
    found = ours.loglikelihood(requests("loglikelihood", *ODD))
    same_scores(found, theirs.loglikelihood(requests("loglikelihood", *ODD), disable_tqdm=True))
    assert all(type(log) is float and type(greedy) is bool for log, greedy in found)
    assert "1 of 9 inputs are longer than 96 tokens" in capsys.readouterr().err
    assert ours.truncated["loglikelihood"]["inputs"] >= 1
    same_scores(*(ours.loglikelihood(requests("loglikelihood", pair)) for pair in (("\n ", "a"), ("", "\n a"))))
    assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", ("",))) == [0]


def test_a_tokenizer_that_begins_texts_adds_its_token_once(tmp_path, tokenizer):
    added = type(tokenizer).from_str(tokenizer.to_str())
    added.add_special_tokens([AddedToken("<s>", special=True)])
    added.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", added.token_to_id("<s>"))])
    directory = save_source(tmp_path / "source", added, bos_token="<s>")
    ours = HybridLM(str(directory), batch_size=2)
    theirs = reference(directory)
    assert ours.tok_encode("<s>a") == ours.tok_encode("a") == [ours.prefix_token_id, *tokenizer.encode("a").ids]
    pairs = [("", "one"), ("", "<s>one"), ("<s>a", " b"), ("a", " b")]
    same_scores(*(m.loglikelihood(requests("loglikelihood", *pairs)) for m in (ours, theirs)))
    texts = [("a b c",), ("<s>a b c",), ("",)]
    found, wanted = (m.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) for m in (ours, theirs))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    asked = [("a cat", {"max_gen_toks": 6}), ("<s>a cat", {"max_gen_toks": 6})]
    assert ours.generate_until(requests("generate_until", *asked)) == theirs.generate_until(requests("generate_until", *asked))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_windows_of_a_long_text_are_the_harness_s(source, theirs, length, monkeypatch):
    ours = HybridLM(str(source), batch_size=4, max_length=length)
    monkeypatch.setattr(theirs, "_max_length", length)
    texts = [(line,) for line in ["a b", "", *TEXT.splitlines()[-3:]]]
    found, wanted = (m.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) for m in (ours, theirs))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)
    assert found[1] == 0


def test_answers_end_at_stop_texts_and_prompts_are_truncated_as_in_the_harness(ours, theirs, capsys):
    free = {"until": [], "max_gen_toks": 24}
    (text,) = ours.generate_until(requests("generate_until", ("A week has", free)))
    stops = [text[3:5], text[8:11]]
    asked = [("A week has", {"until": stop, "max_gen_toks": 24}) for stop in (stops[0], stops, stops[1:], [])]
    asked += [("far too long " * 40, {"until": ["\n"], "max_gen_toks": 40}), ("A week", {"max_gen_toks": 3, "temperature": 0.0})]
    before = json.dumps(asked)
    found = ours.generate_until(requests("generate_until", *asked))
    assert found == theirs.generate_until(requests("generate_until", *asked))
    assert found[0] == text.split(stops[0])[0] and found[3] == text and json.dumps(asked) == before
    assert "generate_until: 1 of 1 inputs are longer than 56 tokens" in capsys.readouterr().err


def test_a_row_ends_as_soon_as_its_stop_text_is_complete(ours, monkeypatch):
    (text,) = ours.generate_until(requests("generate_until", ("A week has", {"max_gen_toks": 24})))
    steps = []
    generate = sys.modules[HybridLM.__module__].generate
    monkeypatch.setattr(f"{HybridLM.__module__}.generate", lambda *a, **k: generate(*a, on_token=steps.append, **k))
    ours.generate_until(requests("generate_until", ("A week has", {"until": text[2:4], "max_gen_toks": 24})))
    assert 0 < len(steps) < 10


def test_drawn_answers_depend_on_the_seed_alone_and_repeats_differ(source):
    draw = ("A week has", {"do_sample": True, "temperature": 3.0, "max_gen_toks": 12})
    runs = [
        HybridLM(str(source), batch_size=2, seed=seed).generate_until(requests("generate_until", draw, draw, draw))
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2] and len(set(runs[0])) == 3


@pytest.mark.parametrize(
    "values, want",
    [
        ({}, (("<e>",), 256, Sampling())),
        ({"until": "x", "max_new_tokens": 5}, (("x", "<e>"), 5, Sampling())),
        ({"until": ["", "x"]}, (("x", "<e>"), 256, Sampling())),
        ({"max_tokens": 4, "max_gen_toks": 3}, (("<e>",), 3, Sampling())),
        ({"temperature": 0.5}, (("<e>",), 256, Sampling(0.5))),
        ({"temperature": 0.5, "do_sample": False}, (("<e>",), 256, Sampling())),
        ({"do_sample": True, "top_p": 0.9, "top_k": 7}, (("<e>",), 256, Sampling(1.0, 0.9, 7))),
        ({"num_beams": 1, "repetition_penalty": None}, (("<e>",), 256, Sampling())),
    ],
    ids=str,
)
def test_the_options_of_a_task_mean_what_they_mean_in_the_harness(values, want):
    assert GenerationOptions.from_task(values, "<e>") == GenerationOptions(*want)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_beams": 4}, "num_beams = 4 is not supported"),
        ({"max_gen_toks": 0}, "max_gen_toks must be an integer at least 1, got 0"),
        ({"do_sample": True, "top_p": 0}, "top_p must be"),
        ({"until": [3]}, "'until' must be texts, got 3"),
        ({"max_gen_toks": POSITIONS}, "96 new tokens"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_anything_is_generated(ours, values, message, monkeypatch):
    monkeypatch.setattr(f"{HybridLM.__module__}.generate", None)
    with pytest.raises(ValueError, match=message):
        ours.generate_until(requests("generate_until", ("a", {"max_gen_toks": 4}), ("a", {"max_gen_toks": 4, **values})))


def test_a_continuation_without_tokens_or_too_long_is_refused(ours):
    with pytest.raises(ValueError, match="empty continuation"):
        ours.loglikelihood(requests("loglikelihood", ("a", "")))
    with pytest.raises(ValueError, match="needs 1 to 96"):
        ours.loglikelihood(requests("loglikelihood", ("a", " a☃" * 90)))


@nnx.jit
def all_log_probabilities(model, ids, segments):
    return jax.nn.log_softmax(model(ids, segments))


def log_probability(model, context, continuation):
    """The slow way: all logits of one row."""
    ids = np.array([[*context, *continuation[:-1]]], np.int32)
    room = ((0, 0), (0, 96 - ids.shape[1]))
    logs = np.asarray(all_log_probabilities(model, np.pad(ids, room), np.pad(np.ones_like(ids), room)))
    logs = logs[0, ids.shape[1] - len(continuation) : ids.shape[1]]
    targets = np.asarray(continuation)
    return logs[np.arange(len(targets)), targets].sum(), bool((logs.argmax(-1) == targets).all())


def queries_with_prefixes():
    """Two questions of three choices after the same 40 tokens, one of 45 tokens, and two texts that share nothing."""
    rng = np.random.default_rng(0)
    preamble, found = rng.integers(0, 61, 40).tolist(), []
    contexts = [preamble + rng.integers(0, 61, n).tolist() for n in (3, 9)] + [rng.integers(0, 61, 45).tolist()]
    for context in contexts:
        found += [(context, [1]), (context, [2]), (context, rng.integers(0, 61, 4).tolist())]
    return [*found, ([5], [6, 7]), (rng.integers(0, 61, 12).tolist(), [1])]


@pytest.mark.parametrize("pattern, batch_sizes", [("*-GKA", (12,)), ("SWA-GDN", (2, 12))])
def test_scores_of_a_hybrid_do_not_depend_on_shared_prefixes_or_the_batch_size(pattern, batch_sizes, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", 16)  # prefixes are computed in several parts
    model, queries = tiny_model(pattern), queries_with_prefixes()
    assert [len(g.rows) for g in group_by_prefix(make_rows(queries, 200)) if g.shared] == [2, 4]
    wanted = [log_probability(model, *query) for query in queries]
    for batch_size in batch_sizes:  # rows of a group in several batches; several groups in one
        found = dict(Scorer(model, batch_size)(queries, 200))
        same_scores([found[n] for n in range(len(queries))], wanted)


def test_shared_prefixes_of_longrope_are_scored_up_to_its_original_context():
    """Rows of 40 tokens, in caches of 48 and 16 slots."""
    factors = (("long_factor", (9.0,) * 4), ("original_max_position_embeddings", 40), ("short_factor", (1.0, 1.5, 2.0, 2.5)))
    model, rng = tiny_model("*", rope=RopeConfig(kind="longrope", options=factors)), np.random.default_rng(0)
    context = rng.integers(0, 61, 36).tolist()
    queries = [(context, rng.integers(0, 61, 5).tolist()) for _ in range(2)]
    assert [len(g.rows) for g in group_by_prefix(make_rows(queries, 200)) if g.shared] == [2]
    found = dict(Scorer(model, 2)(queries, 200))
    same_scores([found[n] for n in range(2)], [log_probability(model, *query) for query in queries])
    with pytest.raises(ValueError, match="longrope: .* room for 41 tokens is not supported, give at most 40"):
        dict(Scorer(model, 2)([(context, [*end, 1]) for _, end in queries], 200))


@pytest.mark.parametrize("shorter", [31, 32, 33])
def test_a_short_prefix_beside_a_long_one_begins_from_nothing(shorter, monkeypatch):
    """Of a prefix of 32 tokens beside one of 48 the first chunk of 16 is padding, whose state is not the prefix's."""
    monkeypatch.setattr(scoring, "CHUNK", 16)
    model, rng = tiny_model("GDN-M3"), np.random.default_rng(0)
    prefixes = [rng.integers(1, 61, n).tolist() for n in (48, shorter)]
    scorer = Scorer(model, 4)
    together, alone = scorer._after(prefixes, 16), scorer._after(prefixes[1:], 16)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        assert relative_error(a[1], b[0]) < 1e-4


def test_every_array_of_a_state_is_forked():
    model = tiny_model("M2-BMF-*")
    scorer, rng = Scorer(model, 2), np.random.default_rng(0)
    state = jax.tree.map(lambda x: rng.integers(0, 9, x.shape).astype(x.dtype), model.init_state(3, 4))
    forked = scoring._forked(scorer.structure, scorer.parameters, state, np.array([2, 0]))
    for old, new in zip(*map(jax.tree.leaves, (state, forked)), strict=True):
        assert np.array_equal(new, old if old.ndim == 0 else old[[2, 0]])


def test_a_hybrid_has_the_same_results_for_every_batch_size(tmp_path, tokenizer, manager):
    directory = hybrid(tmp_path, tokenizer)
    options = dict(tasks=["tiny_choice", "tiny_answer"], limit=1, task_manager=manager, bootstrap_iters=0)
    runs = [
        simple_evaluate("hybrid_jax", {"pretrained": str(directory), "batch_size": size}, **options)["samples"] for size in (1, 5)
    ]
    for name in runs[0]:
        for a, b in zip(*(run[name] for run in runs), strict=True):
            for (x,), (y,) in zip(a["resps"], b["resps"], strict=True):
                assert x == y if isinstance(x, str) else np.allclose(x, y, rtol=1e-5, atol=1e-4)


def test_iterations_of_gated_kalmanet_are_those_of_a_model_trained_with_so_many(tmp_path, tokenizer):
    asked = requests("loglikelihood", ("The cat", " sat"))
    for number in (6, 1):
        gka = GKAConfig(num_iter=number, chunk_size=16)
        save_model(tiny_model("GKA", gka=gka, vocab_size=tokenizer.get_vocab_size()), tmp_path / str(number))
        save_tokenizer(tokenizer, tmp_path / str(number), POSITIONS)
    wanted, trained = (HybridLM(str(tmp_path / name), batch_size=1).loglikelihood(asked) for name in ("1", "6"))
    for given in ("0:1", {0: 1}):
        found = HybridLM(str(tmp_path / "6"), batch_size=1, gka_iterations=given)
        assert found.loglikelihood(asked) == wanted != trained and found.get_model_info()["gka_iterations"] == [1]
    with pytest.raises(ValueError, match="layer 1, which does not exist"):
        HybridLM(str(tmp_path / "6"), gka_iterations="0:1;1:3")


def test_choices_of_one_token_share_a_row_and_prefixes_are_grouped_where_fewest_tokens_are_computed():
    context = tuple(range(40))
    assert [len(row.answers) for row in make_rows([(context, (1,)), (context, (2,)), (context, (1, 2))], 200)] == [2, 1]
    long = (*context, *range(100, 140))
    rows = make_rows([(long, (1, 2, 3)), (long, (4, 5, 6)), (context, (7, 8, 9)), (context, (1, 2, 3))], 200)
    groups = group_by_prefix(rows)
    # 79 + 2 * 3 and 39 + 2 * 3 tokens, together 130; one group of the 39 that all share would compute 39 + 2 * 43 + 2 * 3 = 131
    assert sorted((group.shared, len(group.rows)) for group in groups) == [(39, 2), (79, 2)]
    many = make_rows([((*context, n), (1, 2)) for n in range(5)], 200)
    assert [(g.shared, len(g.rows)) for g in group_by_prefix(many)] == [(40, 5)]
    assert all(group.shared == 0 for group in group_by_prefix(make_rows([((n, *context), (1,)) for n in range(5)], 200)))
    assert sorted(n for g in groups for row in g.rows for n, _ in row.answers) == [0, 1, 2, 3]
    assert group_by_prefix([]) == []


def test_inputs_of_various_lengths_share_few_programs():
    assert [bucket(n) for n in (1, 16, 17, 25, 33, 64, 65, 1000)] == [16, 16, 24, 32, 48, 64, 96, 1024]
    model, rng = tiny_model("*"), np.random.default_rng(0)
    before = scoring._forward._cache_size(), scoring._scores._cache_size()
    queries = [(rng.integers(0, 61, n).tolist(), [1]) for n in range(1, 60)]
    dict(Scorer(model, 4)(queries, 200))
    assert scoring._forward._cache_size() - before[0] <= 5 and scoring._scores._cache_size() - before[1] == 1


def test_finished_requests_are_stored_while_the_others_run(ours, tmp_path, manager, monkeypatch):
    options = dict(tasks=["tiny_letter", "tiny_text"], task_manager=manager, bootstrap_iters=0, use_cache=str(tmp_path / "done"))
    stored = []
    hook = "lm_eval.api.model.CacheHook.add_partial"
    with monkeypatch.context() as patch:
        patch.setattr(hook, lambda self, method, args, answer: stored.append((method, args, answer)))
        first = simple_evaluate(ours, **options)
    assert {m: sum(s[0] == m for s in stored) for m in ("loglikelihood", "loglikelihood_rolling")} == {
        "loglikelihood": 18,
        "loglikelihood_rolling": 4,
    }
    monkeypatch.setattr(HybridLM, "_scored", None)
    assert simple_evaluate(ours, **options)["results"] == first["results"]


class Answers(LM):
    """A model that says nothing of itself."""

    def loglikelihood(self, requests):
        return [(0.0, True) for _ in requests]

    loglikelihood_rolling = generate_until = loglikelihood


def test_stored_answers_of_another_dial_or_model_are_refused(tmp_path, tokenizer):
    save_model(tiny_model("GKA", vocab_size=tokenizer.get_vocab_size()), tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model", POSITIONS)
    asked, models = requests("loglikelihood", ("The cat", " sat")), [HybridLM(str(tmp_path / "model"), batch_size=1)]
    models += [HybridLM(str(tmp_path / "model"), batch_size=2, gka_iterations=n) for n in (30, 0)]
    first, again = (CachingLM(model, str(tmp_path / "answers.db")).loglikelihood(asked) for model in models[:2])  # 30 are its own
    assert first == again
    with pytest.raises(ValueError, match="answers.db holds answers of a model with another gka_iterations"):
        CachingLM(models[2], str(tmp_path / "answers.db"))
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    with pytest.raises(ValueError, match="with another generation_config.json"):
        CachingLM(models[0], str(tmp_path / "answers.db"))
    CachingLM(Answers(), str(tmp_path / "other.db")).loglikelihood(asked)
    with pytest.raises(ValueError, match="other.db holds answers, and nothing says of which model"):
        CachingLM(models[0], str(tmp_path / "other.db"))


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and m.content == 'no' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_conversations_are_rendered_as_transformers_renders_them(tmp_path, tokenizer, manager, capsys):
    directory = save_source(tmp_path / "chat", tokenizer, chat_template=TEMPLATE)
    ours = HybridLM(str(directory), batch_size=4)
    theirs = reference(directory)
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "The answer is"}]
    for system in ([], [{"role": "system", "content": "be brief"}], [{"role": "system", "content": "no"}]):
        for prompt in (True, False):
            history = system + (turns[:1] if prompt else turns)
            assert ours.apply_chat_template(history, prompt) == theirs.apply_chat_template(history, prompt)
    assert capsys.readouterr().err.count("refuses system messages") == 1
    assert ours.chat_template(True) == theirs.chat_template(True) and ours.chat_template(False) is None
    with pytest.raises(ValueError, match="got the name 'other'"):
        ours.chat_template("other")
    options = dict(tasks=["tiny_choice"], limit=1, num_fewshot=1, task_manager=manager, apply_chat_template=True)
    found, wanted = (simple_evaluate(model, **options)["samples"]["tiny_choice"] for model in (ours, theirs))
    for a, b in zip(found, wanted, strict=True):
        assert a["arguments"] == b["arguments"] and "<user>" in a["arguments"][0][0]
        same_scores([r[0] for r in a["resps"]], [r[0] for r in b["resps"]])
    name = ours.tokenizer_name
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert "/" not in name and HybridLM(str(directory)).tokenizer_name != name, "stored requests were rendered otherwise"


@pytest.fixture
def quick(monkeypatch):
    """The harness's own tasks are left out: their thousands of files take seconds to list."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))


@pytest.mark.usefixtures("quick")
def test_the_command_prints_the_table_and_writes_results_and_samples(source, tmp_path, capsys):
    out = tmp_path / "a" / "out"
    options = ["--include-path", str(TASKS), "--batch-size", "4", "--limit", "3", "--num-fewshot", "1"]
    command = ["lm-eval", str(source), "--tasks", "tiny_choice,tiny_answer", *options, "--out", str(out), "--log-samples"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "|tiny_choice|" in printed and "exact_match" in printed and str(out / "results.json") in printed
    results = json.loads((out / "results.json").read_text())
    assert results["n-samples"]["tiny_choice"]["effective"] == 3 and results["config"]["model_pattern"] == "*-*"
    assert results["n-shot"]["tiny_choice"] == 1 and results["config"]["model_name"] == str(source)
    assert len((out / "samples_tiny_answer.jsonl").read_text().splitlines()) == 3
    assert sorted(p.name for p in out.iterdir()) == ["results.json", "samples_tiny_answer.jsonl", "samples_tiny_choice.jsonl"]


@pytest.mark.usefixtures("quick")
def test_samples_of_an_earlier_evaluation_beside_other_results_are_named(source, tmp_path, capsys):
    for name in ("tiny_choice", "tiny_answer"):
        (tmp_path / f"samples_{name}.jsonl").write_text("{}\n")
    options = ["--include-path", str(TASKS), "--limit", "1", "--out", str(tmp_path), "--log-samples"]
    assert main(["lm-eval", str(source), "--tasks", "tiny_choice", *options]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "earlier evaluation" in line]
    assert len(said) == 1 and "samples_tiny_answer.jsonl is of an earlier evaluation, not of this one's results.json" in said[0]


def test_the_readme_s_commands_export_a_primed_hybrid_and_run_the_harness_on_it(source, tmp_path, monkeypatch, capsys):
    """Word for word, but the tasks of these names read this folder's questions. Nothing forks a process in which JAX runs."""
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    commands = [re.search(rf"^hybrid-jax ({name} [^#\n]*)", readme, re.MULTILINE) for name in ("export", "lm-eval")]
    export, run = (shlex.split(found[1]) for found in commands if found)
    assert run[-1] == "runs/harness" and "arc_easy,lambada_openai" in run
    for name, like in (("arc_easy", "tiny_choice"), ("lambada_openai", "tiny_last_word")):
        (tmp_path / f"{name}.yaml").write_text((TASKS / f"{like}.yaml").read_text().replace(f"task: {like}", f"task: {name}"))
    for file in TASKS.glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda **given: TaskManager(**{**given, "include_path": str(tmp_path)}, include_defaults=False)
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT * 9)
    train = dict(objective="next_token", steps=1, batch_size=2, seq_len=32, learning_rate=1e-3)
    data = dict(text=str(tmp_path / "text.txt"), mix=dict(text=1.0))
    prime = dict(source=str(source), pattern="GDN-*", schedule=("train",), phases=dict(train=train), data=data, seed=0)
    run_experiment(ConfigDict(prime), "runs/mine")
    assert main(export) == 0 and main(run) == 0
    printed = capsys.readouterr().out
    assert "|arc_easy" in printed and "|lambada_openai" in printed
    results = json.loads((tmp_path / "runs" / "harness" / "results.json").read_text())
    assert results["config"]["model_pattern"] == "GDN-*" and results["config"]["model_name"] == "out"
    assert set(results["results"]) == {"arc_easy", "lambada_openai"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", "no_such_task", "--include-path", str(TASKS)], "there is no task, group or tag 'no_such_task'"),
        (["--tasks", "tiny_text", "--include-path", str(TASKS), "--apply-chat-template"], "no chat template"),
        (["--tasks", "tiny_text", "--include-path", "nowhere"], "there is no folder nowhere"),
        (["--tasks", "tiny_text", "--log-samples"], "--log-samples needs --out"),
        (["--tasks", "tiny_text", "--include-path", str(TASKS), "--max-length", "97"], "max_length is 97, the model has 96"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_command_refuses_in_one_line(source, capsys, options, message):
    assert main(["lm-eval", str(source), *options]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]


def test_wrong_arguments_of_the_model_are_refused_and_unused_ones_are_named(source, capsys):
    for options, message in (
        ({"batch_size": "auto"}, "batch_size must be an integer"),
        ({"prefix_token_id": 999}, "prefix_token"),
        ({"max_length": 0}, "max_length must be an integer at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            HybridLM(str(source), **options)
    HybridLM.create_from_arg_string(f"pretrained={source},dtype=bfloat16", {"batch_size": "2", "device": "cuda:0"})
    assert "device = cuda:0 has no effect" in capsys.readouterr().err


def test_the_adapter_needs_no_torch_and_leaves_the_harness_s_other_models():
    code = (
        "import sys; sys.modules['torch'] = None; import hybrid_jax.evaluate.lm_eval as ours, lm_eval.api.registry as r; "
        "assert r.get_model('hybrid_jax') is ours.HybridLM; assert 'hf' in r.model_registry"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
