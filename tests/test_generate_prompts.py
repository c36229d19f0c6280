"""`generate --prompts`: the same answers whatever the batches are and wherever it was stopped, as records to learn from."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybrid_jax.generation.answers as answers_module
from hybrid_jax import generate, load_model
from hybrid_jax.commands.main import main
from hybrid_jax.data import read_corpus
from hybrid_jax.data.chat import ChatTemplate
from hybrid_jax.data.prepare import prepare
from hybrid_jax.data.prompts import read_prompts
from hybrid_jax.generation.answers import batches
from hybrid_jax.generation.sampling import row_keys
from tests.data.test_pairs import TEMPLATE, written

NEW = 6
PROMPTS = [
    {"id": "a", "prompt": "abc"},
    {"messages": [{"role": "user", "content": "abc def"}]},
    {"prompt": "def" * 20, "id": 7},
    {"prompt": "d"},
    {"prompt": "abc def abc"},
]
SAMPLED = ("--temperature", 1, "--samples", 2)


@pytest.fixture
def taught(model):
    """The directory of a model that has a chat template, and ends with no token."""
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (model / "generation_config.json").write_text("{}")
    return model


def answered(model, file, out, *options, code=0):
    assert (
        main(["generate", str(model), "--prompts", str(file), "--out", str(out), *map(str, ("--max-new-tokens", NEW, *options))])
        == code
    )
    return out.read_bytes() if out.exists() else b""


def test_answers_are_those_of_each_prompt_alone_and_are_learned_from(taught, tokenizer, tmp_path, capsys):
    file = written(tmp_path / "prompts.jsonl", PROMPTS)
    records = [json.loads(line) for line in answered(taught, file, tmp_path / "out.jsonl", "--batch-size", 2).splitlines()]
    assert [r.get("id") for r in records] == ["a", None, 7, None, None]
    ids = tokenizer.encode("<|pairs|>user\nabc def<|ask|><|pairs|>assistant\n").ids
    model = load_model(taught, dtype=jnp.float32)
    said = [tokenizer.decode(generate(model, [x], max_new_tokens=NEW)[0]) for x in (ids, tokenizer.encode("d").ids)]
    assert records[1]["messages"] == [{"role": "user", "content": "abc def"}, {"role": "assistant", "content": said[0]}]
    assert (records[3]["prompt"], records[3]["completion"]) == ("d", said[1])
    said = capsys.readouterr()
    assert "5 of them end by --max-new-tokens 6" in said.out and "4 prompts are continued as plain text" in said.err + said.out
    assert {r["finish_reason"] for r in records} == {"length"}
    index = prepare(str(tmp_path / "out.jsonl"), tmp_path / "data", str(taught), held_out_percent=0)
    rows = read_corpus({"text": str(tmp_path / "data")}, taught).rows("text", 200, 0)
    learned = [tokenizer.decode(r["input_ids"][(r["loss_weights"] > 0) & (r["segment_ids"] == 2)]) for r in rows]
    assert index["train"]["documents"] == 5 and learned[0] == records[1]["messages"][1]["content"]


def test_an_end_token_ends_an_answer(taught, tokenizer, tmp_path, capsys):
    first = generate(load_model(taught, dtype=jnp.float32), [tokenizer.encode("d").ids], max_new_tokens=1)[0]
    (taught / "generation_config.json").write_text(json.dumps({"eos_token_id": first}))
    record = json.loads(answered(taught, written(tmp_path / "prompts.jsonl", PROMPTS[3:4]), tmp_path / "out.jsonl"))
    assert record == {"prompt": "d", "completion": "", "finish_reason": "stop"}
    printed = capsys.readouterr().out
    assert "1 of them are empty" in printed and "length" not in printed


def test_the_largest_seed_of_the_command_line_makes_keys_and_small_ones_make_those_of_jax():
    assert row_keys(2**32 - 1, [(0, 1)]).tolist() != row_keys(2**31 - 1, [(0, 1)]).tolist()
    want = jax.random.fold_in(jax.random.fold_in(jax.random.key(2**32 - 1), 3), 1)
    np.testing.assert_array_equal(row_keys(2**32 - 1, [(3, 1)])[0], jax.random.key_data(want))


def test_batches_do_not_change_what_is_drawn(taught, tmp_path):
    file = written(tmp_path / "prompts.jsonl", PROMPTS)
    two, three = (answered(taught, file, tmp_path / f"{n}.jsonl", *SAMPLED, "--batch-size", n) for n in (2, 3))
    assert two == three
    records = [json.loads(line) for line in two.splitlines()]
    assert [r["sample"] for r in records] == [0, 1] * 5
    assert sum(a.get("completion") != b.get("completion") for a, b in zip(records[::2], records[1::2], strict=True)) >= 3
    assert answered(taught, file, tmp_path / "seed.jsonl", *SAMPLED, "--batch-size", 2, "--seed", 1) != two


def test_a_stopped_run_goes_on_to_the_same_file(taught, tmp_path, monkeypatch, capsys):
    file = written(tmp_path / "prompts.jsonl", PROMPTS)
    whole = answered(taught, file, tmp_path / "whole.jsonl", *SAMPLED, "--batch-size", 3)
    calls, original = [], answers_module.generate

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(answers_module, "generate", stopping)
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    assert answered(taught, file, out, *SAMPLED, "--batch-size", 3, code=3) == b""
    with open(partial, "ab") as half:
        half.write(b'[3, 0, {"prompt": "hal')  # as if it was killed while it wrote
    assert "the same command continues" in capsys.readouterr().err
    answered(taught, file, out, *SAMPLED, "--batch-size", 3, "--seed", 5, code=1)
    assert "seed was 0, now 5" in capsys.readouterr().err
    other = written(tmp_path / "other.jsonl", PROMPTS[:2])
    answered(taught, other, out, *SAMPLED, "--batch-size", 3, code=1)
    assert "holds answers with other settings: prompts was" in capsys.readouterr().err
    done, total = len(partial.read_bytes().splitlines()), len(calls)
    assert answered(taught, file, out, *SAMPLED, "--batch-size", 3) == whole
    assert done == 2 + 2 and len(calls) - total == 3 and not partial.exists()
    answered(taught, file, out, code=1)
    assert "out.jsonl exists already" in capsys.readouterr().err


def test_answers_in_the_model_s_own_directory_go_on_until_a_file_of_the_model_changes(taught, tmp_path, monkeypatch, capsys):
    file, out = written(tmp_path / "prompts.jsonl", PROMPTS[3:4]), taught / "out.jsonl"
    monkeypatch.setattr(answers_module, "generate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    answered(taught, file, out, code=3)
    (taught / "README.md").write_text("about the model\n")
    answered(taught, file, out, code=3)
    assert "going on with 0 answers" in capsys.readouterr().out
    (taught / "generation_config.json").write_text('{"eos_token_id": null}')
    answered(taught, file, out, code=1)
    assert "files of the model: generation_config.json was [2, " in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "not JSON"),
        ('["abc"]', "expected a JSON object with one of 'prompt' (a text) and 'messages'"),
        ('{"prompt": "a", "messages": []}', "expected a JSON object with one of"),
        ('{"prompt": " "}', "'prompt' must be a text that is not empty"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "the last of the messages must be the user's and not empty"),
        ('{"messages": [{"role": "user"}]}', "a message needs a role and a content"),
        ('{"prompt": "a", "system": "b"}', "'system' is for conversations"),
        (r'{"prompt": "a\ud800"}', "half of a surrogate pair"),
        (r'{"prompt": "a", "id": "\ud800"}', "half of a surrogate pair"),
        (json.dumps({"prompt": "abc" * 300}), "more than the model's 256 positions"),
    ],
    ids=["no JSON", "a list", "two kinds", "empty", "an answer", "no content", "a system message", "half", "half id", "too long"],
)
def test_a_line_that_is_no_prompt_is_refused_with_its_number_before_any_work(taught, tmp_path, monkeypatch, capsys, line, words):
    monkeypatch.setattr("hybrid_jax.convert.load_model", None)
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "a"}}\n\n{line}\n')
    answered(taught, tmp_path / "prompts.jsonl", tmp_path / "out.jsonl", code=1)
    error = capsys.readouterr().err
    assert f"line 3: {words}" in error or ("line 3: " in error and words in error)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "prompts.jsonl"]


@pytest.mark.parametrize(
    "options, words",
    [
        (["a", "--prompts", "b"], "either a prompt or --prompts"),
        (["a", "--out", "b"], "--out needs --prompts"),
        (["a", "--batch-size", "2"], "--batch-size needs --prompts"),
        (["--prompts", "b"], "--prompts needs --out"),
        (["--prompts", "b", "--file", "--out", "c"], "--file is of a single prompt"),
    ],
    ids=str,
)
def test_options_of_one_prompt_and_of_many_are_not_mixed(options, words, capsys):
    assert main(["generate", "model", *options]) == 1
    assert words in capsys.readouterr().err


def test_a_conversation_to_answer_has_the_date_with_which_it_is_learned(tmp_path, capsys):
    dated = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": dated}))
    file = written(tmp_path / "prompts.jsonl", PROMPTS[1:2])
    (prompt,), _ = read_prompts(file, lambda: ChatTemplate(tmp_path))
    assert prompt.text == "26 Jul 2024: abc def"
    assert "writes today's date" in capsys.readouterr().err


def test_several_greedy_answers_are_refused_because_they_would_be_equal(taught, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hybrid_jax.convert.load_model", None)
    file = written(tmp_path / "prompts.jsonl", PROMPTS)
    assert answered(taught, file, tmp_path / "out.jsonl", "--samples", 2, code=1) == b""
    assert "makes --samples 2 equal answers; give --temperature above 0" in capsys.readouterr().err


def test_without_a_file_there_must_be_a_prompt(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "model", "--chat"])
    assert "required: prompt" in capsys.readouterr().err


def test_a_batch_has_prompts_of_one_bucket_the_longest_first():
    found = list(batches([3, 40, 16, 17], 2, 3))
    assert found == [(48, [(1, 0), (1, 1)]), (24, [(3, 0), (3, 1)]), (16, [(0, 0), (0, 1), (2, 0)]), (16, [(2, 1)])]
    assert np.sum([len(items) for _, items in found]) == 8
