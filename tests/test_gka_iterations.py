"""`--gka-iterations` of every command that decodes with a given model or measures it, and models of an evaluation's config."""

import json

import jax.numpy as jnp
import pytest

from hybrid_jax import generate, load_model, save_model, with_iterations
from hybrid_jax.commands.main import main, read_arguments
from hybrid_jax.config import GKAConfig
from hybrid_jax.data.tokenizer import save_tokenizer
from hybrid_jax.evaluate.evaluation import read_evaluation, targets_of
from hybrid_jax.sweep import points_of, running
from hybrid_jax.sweep.points import MODELS
from tests.conftest import TEXT, tiny_model

COMMANDS = {"generate": ["m", "abc"], "evaluate": ["--model=a=m"], "lm-eval": ["m", "--tasks", "x"]}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_decodes_or_measures_takes_them(command, capsys):
    given = [command, *COMMANDS[command]]
    assert read_arguments(given).gka_iterations is None
    assert read_arguments([*given, "--gka-iterations", "8"]).gka_iterations == 8
    assert read_arguments([*given, "--gka-iterations=5:4,3:0"]).gka_iterations == {5: 4, 3: 0}
    for wrong in ("-1", "10001", "3:", "3:8,3:4", "many"):
        with pytest.raises(SystemExit) as e:
            read_arguments([*given, f"--gka-iterations={wrong}"])
        assert e.value.code == 2 and "argument --gka-iterations: " in capsys.readouterr().err


@pytest.fixture
def hybrid(tokenizer, tmp_path):
    """The directory of a model of one layer that was trained with 6 iterations."""
    gka = GKAConfig(num_iter=6, chunk_size=16)
    save_model(tiny_model("GKA", gka=gka, vocab_size=tokenizer.get_vocab_size()), tmp_path / "hybrid")
    save_tokenizer(tokenizer, tmp_path / "hybrid", 256)
    return tmp_path / "hybrid"


def fails(capsys, *arguments):
    assert main([*map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_generate_decodes_with_them_and_leaves_the_model_as_it_is(hybrid, model, tokenizer, capsys):
    before = {path.name: path.read_bytes() for path in hybrid.iterdir()}
    ids = tokenizer.encode("abc").ids
    few, trained = (
        tokenizer.decode(generate(m, [ids], max_new_tokens=8, eos_id=0)[0])
        for m in (with_iterations(load_model(hybrid, dtype=jnp.float32), 0), load_model(hybrid, dtype=jnp.float32))
    )
    command = ["generate", str(hybrid), "abc", "--max-new-tokens", "8"]
    assert main([*command, "--gka-iterations", "0:0"]) == 0 and few != trained
    assert capsys.readouterr().out == f"abc{few}\n"
    assert {path.name: path.read_bytes() for path in hybrid.iterdir()} == before
    assert "layer 1, which does not exist" in fails(capsys, *command, "--gka-iterations=1:3")
    assert "the model has none; its pattern is *" in fails(capsys, "generate", model, "abc", "--gka-iterations=3")


CONFIG = """
from ml_collections import ConfigDict


def get_config():
    models = {"few": {"path": "HYBRID", "gka_iterations": 1}, "trained": {"path": "HYBRID"}}
    text = {"instrument": "text", "seq_len": 32, "rows": 2}
    speed = {"instrument": "speed", "lengths": (4,), "new_tokens": 2, "repeats": 1}
    return ConfigDict({"data": {"text": "TEXT"}, "instruments": {"text": text, "speed": speed}, "models": models})
"""


@pytest.fixture
def config(hybrid, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "config.py").write_text(CONFIG.replace("HYBRID", str(hybrid)).replace("TEXT", str(tmp_path / "text.txt")))
    return tmp_path / "config.py"


def test_a_report_has_a_row_for_each_setting_of_one_model(hybrid, config, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["evaluate", "--config", str(config), f"--model=it={hybrid}", "--gka-iterations=0:1", "--out", str(out)]) == 0
    rows = {r["target"]["name"]: r for r in json.loads((out / "results.json").read_text())}
    assert list(rows) == ["trained", "few", "it (iterations 0:1)"]
    trained, few, it = (r["results"]["text"][0]["value"] for r in rows.values())
    assert few == it != trained and all(len(r["results"]["speed"]) == 2 for r in rows.values())
    page, printed = (out / "report.md").read_text(), "".join(capsys.readouterr())
    assert "in place of config.json's: few 1; it (iterations 0:1) 0:1." in page and "| it (iterations 0:1) |" in page
    assert "measured again" not in printed and len(list((out / "stored").iterdir())) == 4  # `it` is `few`, by layer
    assert main(["evaluate", "--config", str(config), "--config.models.few.gka_iterations=6", "--out", str(out)]) == 0
    rows = json.loads((out / "results.json").read_text())
    assert len({r["results"]["text"][0]["value"] for r in rows}) == 1 and len(list((out / "stored").iterdir())) == 4


def test_what_a_model_of_a_config_or_of_the_command_line_cannot_have_is_refused(hybrid, model, config, capsys):
    given = ["evaluate", "--config", config]
    assert f"source ({model}): iterations are set of layers with Gated" in fails(
        capsys, *given, f"--model=source={model}", "--gka-iterations=3"
    ).replace(" (iterations 3)", "")
    assert "few" in (error := fails(capsys, *given, "--config.models.few.gka_iterations=10001")) and "at most 10000" in error
    for old, new, message in (
        ('"gka_iterations": 1', '"iterations": 1', "unknown key 'iterations'"),
        ('"trained": {"path"', '"trained": {"gka_iterations"', "config.models.trained needs a path"),
        ('"gka_iterations": 1', '"gka_iterations": "1:3"', "layer 1, which does not exist"),
    ):
        config.write_text((text := config.read_text()).replace(old, new))
        assert message in fails(capsys, *given)
        config.write_text(text)
    with pytest.raises(ValueError, match="two lines of the tables would be named 'few'"):
        targets_of([f"few={hybrid}"], [], None, read_evaluation(str(config)).models)


@pytest.mark.parametrize("given", ["3:8", {"3": 8}, {3: 8}])
def test_a_sweep_measures_its_points_with_them_and_not_the_models_beside_them(tmp_path, monkeypatch, given):
    seen = []
    monkeypatch.setattr(running, "_command", lambda *arguments, env: seen.append(arguments) or ("done", ""))
    evaluate = {"config": "c.py", MODELS: {"source": "s"}, "gka_iterations": given}
    assert points_of({"configs": ("c.py",), "evaluate": evaluate})
    running.measure_models(tmp_path, evaluate)
    running._evaluate({"it": "m"}, tmp_path, evaluate, {})
    assert ["--gka-iterations=3:8" in arguments for arguments in seen] == [False, True]


def test_a_sweep_refuses_an_evaluation_with_models_of_its_own(config, tmp_path, capsys):
    sweep = "def get_config():\n    return {'configs': ('configs/prime_tiny.py',), 'evaluate': {'config': '%s'}}\n"
    (tmp_path / "sweep.py").write_text(sweep % config)
    assert "name them in the sweep's evaluate.models" in fails(
        capsys, "sweep", "--config", tmp_path / "sweep.py", "--out", tmp_path / "out"
    )
