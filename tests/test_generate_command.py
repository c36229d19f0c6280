"""`generate`: where it ends, where the prompt comes from, conversations, and what it refuses before loading a model."""

import io
import json
import sys

import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer, decoders, models

from hybrid_jax import generate, load_model
from hybrid_jax.commands.main import main
from hybrid_jax.data.tokenizer import decode_continuation

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
NEW = 8


def said(capsys, *arguments):
    assert main(["generate", *map(str, arguments), "--max-new-tokens", str(NEW)]) == 0
    return capsys.readouterr().out


def fails(capsys, *arguments):
    assert main(["generate", *map(str, arguments)]) == 1
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    return error


def theirs(directory, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    out = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :].tolist()
    ends = model.generation_config.eos_token_id
    return out[:-1] if ends is not None and out[-1] in ends else out


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_generation_ends_at_any_end_id_as_in_transformers(model, tokenizer, capsys, file):
    ids = tokenizer.encode("abc").ids
    free = generate(load_model(model, dtype=jnp.float32), [ids], max_new_tokens=NEW)[0]
    end = next(t for t in free[1:] if t != free[0])
    path = model / file
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**values, "eos_token_id": [0, end]}))
    want = theirs(model, ids)
    assert want == free[: free.index(end)]
    assert said(capsys, model, "abc") == "abc" + tokenizer.decode(want) + "\n"


def test_a_prompt_comes_from_an_argument_a_file_or_stdin(model, tmp_path, capsys, monkeypatch):
    want = said(capsys, model, "abc def")
    (tmp_path / "prompt.txt").write_text("abc def\n")
    assert said(capsys, model, "--file", tmp_path / "prompt.txt") == want
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc def\n")))
    assert said(capsys, model, "-") == want
    (tmp_path / "prompt.txt").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in fails(capsys, model, "--file", tmp_path / "prompt.txt")
    assert "nothing.txt" in fails(capsys, model, "--file", tmp_path / "nothing.txt")


def test_a_conversation_goes_through_the_chat_template_and_only_the_answer_is_printed(model, tokenizer, capsys):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert "no chat template" in fails(capsys, model, "--chat", "abc")
    (model / "chat_template.jinja").write_text(template)
    ids = tokenizer.encode("system: be brief\nuser: abc\nassistant:").ids
    want = generate(load_model(model, dtype=jnp.float32), [ids], max_new_tokens=NEW, eos_id=0)[0]
    assert said(capsys, model, "--chat", "--system", "be brief", "abc") == tokenizer.decode(want) + "\n"
    assert "--system needs --chat" in fails(capsys, model, "--system", "x", "abc")


def test_options_given_go_before_the_models_own(model, capsys):
    greedy = said(capsys, model, "abc")
    values = dict(do_sample=True, temperature=5.0, eos_token_id=0)
    (model / "generation_config.json").write_text(json.dumps(values))
    assert said(capsys, model, "abc", "--seed", 1) != greedy
    assert said(capsys, model, "abc", "--temperature", 0) == greedy


@pytest.mark.parametrize(
    "options, message",
    [
        (["--top-p", 0.5], "no effect on greedy generation"),
        (["--top-k", 5], "no effect on greedy generation"),
        (["--max-new-tokens", 3000], "more than the model's 256 positions"),
    ],
    ids=str,
)
def test_values_nobody_can_mean_are_refused_before_the_model_is_loaded(model, capsys, monkeypatch, options, message):
    monkeypatch.setattr("hybrid_jax.convert.load_model", None)
    assert message in fails(capsys, model, "abc", *options)


def test_the_space_between_the_prompt_and_its_continuation_is_printed():
    words = Tokenizer(models.BPE({"▁": 0, "▁Hello": 1, "▁world": 2, "<unk>": 3}, [], unk_token="<unk>"))
    replaced = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    for decoder in (decoders.Metaspace(), replaced):
        words.decoder = decoder
        assert decode_continuation(words, [1], [2, 2]) == " world world"
        assert decode_continuation(words, [], [2]) == "world"


def test_a_run_is_answered_with_its_model(tmp_path, capsys):
    for name in ("stages", "model"):
        (tmp_path / "run" / name).mkdir(parents=True)
    assert str(tmp_path / "run" / "model") in fails(capsys, tmp_path / "run", "abc")
