"""A tokenizer that is none, or belongs to another model, is refused before any work; a saved model keeps its own."""

import json
import shutil

import pytest

from hybrid_jax import load_model, save_model
from hybrid_jax.commands.main import main
from hybrid_jax.convert.save import TOKENIZER_FILES
from hybrid_jax.data import check_tokenizer_fits, load_tokenizer
from hybrid_jax.data.chat import ChatTemplate
from hybrid_jax.data.tokenizer import end_of_text_id, save_tokenizer
from tests.conftest import tiny_model


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "[" * 100_000, '{"version": "1.0", "model": {"type": "BPE"}}'], ids=lambda c: c[:9]
)
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_may_have_fewer_ids_than_the_model_but_none_beyond(tokenizer):
    size = tokenizer.get_vocab_size()
    assert check_tokenizer_fits(tokenizer, size, "x") is check_tokenizer_fits(tokenizer, size + 100, "x")
    with pytest.raises(ValueError, match=f"of x has ids up to {size - 1}, the model has a vocabulary of {size - 1}"):
        check_tokenizer_fits(tokenizer, size - 1, "x")


def test_an_added_token_beyond_the_model_counts(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["added_tokens"].append({**values["added_tokens"][0], "id": 5000, "content": "<far>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="ids up to"):
        check_tokenizer_fits(load_tokenizer(tmp_path), tokenizer.get_vocab_size(), tmp_path)


@pytest.mark.parametrize("command", ["generate", "select", "evaluate", "prepare", "prime", "cache-teacher"])
def test_every_command_refuses_a_tokenizer_of_another_vocabulary(model, tokenizer, tmp_path, capsys, command):
    size = tokenizer.get_vocab_size()
    shutil.rmtree(model)
    save_model(tiny_model("*", vocab_size=size - 5), model)
    save_tokenizer(tokenizer, model, 256)
    (tmp_path / "text.txt").write_text("abc def " * 500)
    cached = tmp_path / "cached.py"
    cached.write_text(
        "from configs.prime_tiny import get_config as base\n\n\ndef get_config(mixer):\n    config = base(mixer)\n"
        "    config.phases.train.update(objective='distill_cached', teacher_cache='cache')\n    return config\n"
    )
    config = ["--config=configs/prime_tiny.py:GKA", f"--config.source={model}", f"--config.data.text={tmp_path / 'text.txt'}"]
    config.append("--config.phases.train.seq_len=256")  # this model's positions
    arguments = {
        "generate": [model, "abc"],
        "select": [model, "--text", tmp_path / "text.txt"],
        "evaluate": ["--model", f"m={model}", "--text", tmp_path / "text.txt"],
        "prepare": [tmp_path / "text.txt", tmp_path / "out", "--tokenizer", model],
        "prime": [*config, "--config.pattern=GKA", "--workdir", tmp_path / "run"],
        "cache-teacher": [f"--config={cached}:GKA", *config[1:], "--phase", "train"],
    }[command]
    assert main([command, *map(str, arguments)]) == 1
    assert f"has ids up to {size - 1}, the model has a vocabulary of {size - 5}" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cached.py", "model", "text.txt"]


def test_a_loaded_model_is_saved_with_its_tokenizer_unless_told_otherwise(model, tmp_path):
    (model / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    have = {n: (model / n).read_bytes() for n in TOKENIZER_FILES if (model / n).is_file()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= have.keys()
    loaded = load_model(model, pattern="SWA")
    save_model(loaded, tmp_path / "hybrid")
    assert {n: (tmp_path / "hybrid" / n).read_bytes() for n in have} == have
    assert "directory" not in json.loads((tmp_path / "hybrid" / "config.json").read_text())
    save_model(loaded, tmp_path / "bare", tokenizer_from=False)
    assert not any((tmp_path / "bare" / n).exists() for n in have)


def test_a_directory_named_for_the_tokenizer_must_be_there(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory at .*typo"):
        save_model(load_model(model), tmp_path / "out", tokenizer_from=tmp_path / "typo")
    assert not (tmp_path / "out").exists()


def test_chat_templates_in_several_files_are_saved_too(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    (model / "chat_template.jinja").write_text("default")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    save_model(load_model(model), tmp_path / "out")
    saved = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out").chat_template
    assert saved == {"default": "default", "tool_use": "tools"}


@pytest.mark.parametrize("decoder", [{}, {"added_tokens_decoder": {}}], ids=["before transformers 4.34", "since"])
@pytest.mark.parametrize("own", [{}, {"eos_token": "<|pairs|>"}], ids=["absent", "another"])
def test_special_tokens_of_a_template_are_transformers(model, decoder, own):
    transformers = pytest.importorskip("transformers")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ eos_token }}|{{ bos_token }}", **own, **decoder}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|ask|>"}, "bos_token": "<|endoftext|>"}))
    talk = [{"role": "user", "content": "x"}]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(model).apply_chat_template(talk, tokenize=False)
    assert ChatTemplate(model).render(talk) == theirs


def test_a_model_whose_directory_is_gone_is_saved_and_that_is_said(model, tmp_path, capsys):
    loaded = load_model(model)
    shutil.rmtree(model)
    save_model(loaded, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file() and "without tokenizer files" in capsys.readouterr().err


def test_an_empty_list_of_end_ids_is_as_none(tokenizer):
    assert end_of_text_id(tokenizer, []) == end_of_text_id(tokenizer, None) == 0
