"""The parity report of a checkpoint: every tensor and layer is in it, and what is off is named and fails the command."""

import json

import numpy as np
import pytest
import transformers

from hybrid_jax import save_model
from hybrid_jax.commands.main import main
from hybrid_jax.config import RopeConfig
from hybrid_jax.convert import load_model, save
from hybrid_jax.parity_report import _untested
from tests.conftest import tiny_config, tiny_model

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random Qwen2 of transformers whose head is its embedding table, in bfloat16."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6)
    config = transformers.Qwen2Config(**sizes, num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True)
    directory = tmp_path_factory.mktemp("source")
    transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def test_a_checkpoint_that_is_read_as_it_is_is_proven_tensor_by_tensor_and_layer_by_layer(source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path / "copy"), "--verify", str(tmp_path / "report")]) == 0
    assert "largest relative error of a layer " in capsys.readouterr().out and (tmp_path / "copy" / "config.json").exists()
    found = json.loads((tmp_path / "report" / "parity.json").read_text())
    assert len(found["layers"]) == 4 and max(found["layers"]) < 1e-5 and found["logits"] < 1e-5 and found["off"] == []
    assert len(found["tensors"]) == 2 + 3 * 12 and all(t["returns"] and t["dtype"] == "BF16" for t in found["tensors"])
    by_name = {t["name"]: t for t in found["tensors"]}
    assert by_name["model.layers.1.self_attn.q_proj.bias"]["parameters"] == ["layers.1.self_attn.q_proj.bias"]
    report = (tmp_path / "report" / "report.md").read_text()
    assert "38 tensors come back bit for bit" in report and "| final norm | " in report
    assert (tmp_path / "report" / "layers.png").stat().st_size > 1000


def test_a_hybrid_has_its_tensors_proven_and_the_report_says_that_transformers_has_no_such_class(tmp_path, capsys):
    save_model(tiny_model("GKA-*"), tmp_path / "hybrid")
    assert main(["convert", str(tmp_path / "hybrid"), "--verify", str(tmp_path / "report")]) == 0
    assert "not compared with transformers: transformers has no class for hybrids" in capsys.readouterr().out
    found = json.loads((tmp_path / "report" / "parity.json").read_text())
    assert found["layers"] is None and all(t["returns"] for t in found["tensors"]) and not found["missing"]


def test_windows_and_factors_that_the_sample_is_too_short_for_are_named(tmp_path, capsys):
    save_model(tiny_model("*-*", attention_windows=(None, 40)), tmp_path / "model")
    for tokens, untested in (("40", ["windows of 40 tokens"]), ("41", [])):
        assert main(["convert", str(tmp_path / "model"), "--verify", str(tmp_path / tokens), "--tokens", tokens]) == 0
        assert json.loads((tmp_path / tokens / "parity.json").read_text())["untested"] == untested
        assert ("not tested, because the sample is too short" in capsys.readouterr().out) == bool(untested)
    factors = tuple((name, (1.0, 2.0, 3.0, 4.0)) for name in ("long_factor", "short_factor"))
    rope = RopeConfig(kind="longrope", options=(*factors, ("original_max_position_embeddings", 64)))
    longrope = tiny_config("*", rope=rope, attention_windows=(300,))  # of 256 positions it hides none
    assert _untested(longrope, 64) == ("the long factors of longrope, for more than 64 tokens",) and not _untested(longrope, 65)


def wrong_rope(path, **options):
    model = load_model(path, **options)
    for layer in model.layers:
        layer.self_attn.rope = RopeConfig(theta=2.0)
    return model


def changed_norm(*args):
    yield from (x._replace(value=np.negative(x.value)) if x.name == "model.norm.weight" else x for x in save.hf_pieces(*args))


def other_norm(*args):
    yield from (x._replace(name=f"other.{x.name}") if x.name == "model.norm.weight" else x for x in save.hf_pieces(*args))


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("load_model", wrong_rope, "layer 0: relative error "),
        ("hf_pieces", changed_norm, "1 tensors do not come back as they are stored, the first model.norm.weight, BF16"),
        ("hf_pieces", other_norm, "1 tensors of an export are not in the files, the first other.model.norm.weight"),
    ],
)
def test_what_is_off_is_named_and_fails_and_nothing_is_converted(source, tmp_path, monkeypatch, capsys, name, wrong, message):
    monkeypatch.setattr(f"hybrid_jax.parity_report.{name}", wrong)
    assert main(["convert", str(source), str(tmp_path / "copy"), "--verify", str(tmp_path / "report")]) == 1
    assert message in capsys.readouterr().err and message in (tmp_path / "report" / "report.md").read_text()
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "name the directory to make (OUT), or the report of --verify"),
        (["out", "--tolerance", "0.1"], "--tolerance is that of --verify"),
        (["out", "--tokens", "9"], "--tokens is that of --verify"),
        (["--verify", "report", "--pattern", "*-*-*"], "--pattern converts into OUT; name it"),
    ],
)
def test_options_that_do_not_fit_are_refused(source, options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(source), *options]) == 1
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())
