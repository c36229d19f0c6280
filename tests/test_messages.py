"""The command line's words: every number is checked, a misspelling is named with its neighbour, and help is there at once."""

import json
import subprocess
import sys
import types

import pytest
from ml_collections import ConfigDict

from hybrid_jax.claim import claim
from hybrid_jax.commands.main import COMMANDS, main, read_arguments
from hybrid_jax.convert import read_model_config
from hybrid_jax.data import HELD_OUT_SEED
from hybrid_jax.experiment_config import Experiment, with_absolute_paths
from hybrid_jax.fields import load_experiment_config
from hybrid_jax.workdir import is_run

PRIME = ["prime", "--config=configs/prime_tiny.py:GKA", "--workdir=run"]


def refused(capsys, *arguments):
    """The one line with which a wrong command line ends, and the exit code 2."""
    with pytest.raises(SystemExit) as e:
        main(list(arguments))
    error = capsys.readouterr().err.strip()
    assert e.value.code == 2 and len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("select", "m", "--rows", "0"), "--rows: must be an integer at least 1, got 0"),
        (("select", "m", "--seq-len", "-5"), "--seq-len: must be an integer at least 1, got -5"),
        (("select", "m", "--window", "1.5"), "--window: must be an integer at least 1, got '1.5'"),
        (("select", "m", "--fraction", "nan"), "--fraction: must be a number above 0 and at most 1, got nan"),
        (("evaluate", "--rows", "0"), "--rows: must be an integer at least 1, got 0"),
        (("evaluate", "--seq-len", "0"), "--seq-len: must be an integer at least 1, got 0"),
        (("prepare", "a", "b", "--tokenizer", "c", "--workers", "0"), "--workers: must be an integer at least 1, got 0"),
        (("prepare", "a", "b", "--tokenizer", "c", "--held-out", "100"), "--held-out: must be a number at least 0 and below 100"),
        (("generate", "m", "p", "--temperature", "-1"), "--temperature: must be a number at least 0, got -1.0"),
        (("generate", "m", "p", "--temperature", "nan"), "--temperature: must be a number at least 0, got nan"),
        (("generate", "m", "p", "--top-p", "1.7"), "--top-p: must be a number above 0 and at most 1, got 1.7"),
        (("generate", "m", "p", "--top-p", "0"), "--top-p: must be a number above 0 and at most 1, got 0.0"),
        (("generate", "m", "p", "--top-k", "-2"), "--top-k: must be an integer at least 0, got -2"),
        (("generate", "m", "p", "--max-new-tokens", "-3"), "--max-new-tokens: must be an integer at least 1, got -3"),
        (("generate", "m", "p", "--max-new-tokens", "x"), "--max-new-tokens: must be an integer at least 1, got 'x'"),
        (("generate", "m", "p", "--seed", "-1"), "--seed: must be an integer at least 0 and at most 4294967295, got -1"),
        (("convert", "a", "b", "--seed", "-1"), "--seed: must be an integer at least 0 and at most 4294967295, got -1"),
        (("export", "a", "b", "--max-shard-gb", "0"), "--max-shard-gb: must be a number above 0, got 0.0"),
        (("export", "a", "b", "--phase", "p", "--step", "-2"), "--step: must be an integer at least 0, got -2"),
        (("cache-teacher", "--config=c", "--phase", "p", "--k", "0"), "--k: must be an integer at least 1, got 0"),
        (
            ("plan", "--source", "a", "--topology", "v5p", "--efficiency", "2"),
            "--efficiency: must be a number above 0 and at most 1",
        ),
        (("plan", "--source", "a", "--topology", "v5p", "--rows", "-1"), "--rows: must be an integer at least 0, got -1"),
        ((*PRIME, "--profile", "5:2"), "--profile: must be FIRST:LAST, e.g. 10:12, got '5:2'"),
    ],
)
def test_a_number_that_nobody_can_mean_is_refused_where_it_enters(capsys, arguments, words):
    assert words in refused(capsys, *arguments)


def test_an_unknown_option_is_blamed_alone_and_its_neighbour_is_named(capsys):
    error = refused(capsys, *PRIME, "--steps=3", "--config.seed=2")
    assert "unknown option --steps=3; Fields of the config" in error and "seed" not in error
    assert "--fraction" not in refused(capsys, "select", "m", "--rosw=3", "--fraction", "1")
    assert "did you mean --rows?" in refused(capsys, "select", "m", "--rosw=3")
    assert "unknown option --config.seed=1" in refused(capsys, "select", "m", "--config.seed=1")  # it has no config


def overridden(*overrides):
    return load_experiment_config(["--config=prime_tiny.py:GKA", *overrides])


@pytest.mark.parametrize(
    "override, words",
    [
        ("typo=1", "config has the unknown key 'typo'; known: copy_attention, data, fresh_parameters, mesh"),
        ("phases.align.stps=3", "config.phases.align has the unknown key 'stps' (did you mean 'steps'?)"),
        ("phases.algin.steps=3", "config.phases has the unknown key 'algin' (did you mean 'align'?)"),
        ("mesh.fsd=2", "config.mesh has the unknown key 'fsd' (did you mean 'fsdp'?)"),
        ("data.mix.txt=1", "config.data.mix has the unknown key 'txt' (did you mean 'text'?)"),
        ("seed.x=1", "config.seed is one value, it has no field 'x'"),
        ("mesh=2", "config.mesh is a group; set its fields, --config.mesh.NAME=VALUE"),
        ("seed", "--config.seed needs a value: --config.seed=VALUE"),
        ("seed=1.5", "config.seed must be an integer, got '1.5'"),
        ("phases.align.learning_rate=fast", "config.phases.align.learning_rate must be a number, got 'fast'"),
        ("mixers.gka_config.use_gate=no", "config.mixers.gka_config.use_gate must be true or false, got 'no'"),
        ("schedule=align train", "config.schedule must be a Python tuple"),
    ],
)
def test_a_wrong_override_is_one_clear_sentence(override, words):
    with pytest.raises(ValueError) as e:
        overridden(f"--config.{override}")
    assert str(e.value).startswith(words) and "\n" not in str(e.value)


def test_no_phase_is_trained_on_the_synthetic_rows_that_evaluations_measure():
    for seed, words in (
        (HELD_OUT_SEED - 2, "config.seed is 987654319, which gives phase 2 the seed of the rows"),
        (-1, "config.seed must be an integer at least 0"),
        (2**32, "at most 2147483647"),
    ):
        with pytest.raises(ValueError, match=words):
            Experiment.from_config(overridden(f"--config.seed={seed}"))
    for seed in (HELD_OUT_SEED - 3, HELD_OUT_SEED):
        assert Experiment.from_config(overridden(f"--config.seed={seed}")).seed == seed


def test_every_field_can_be_set_whether_or_not_the_config_names_it():
    config = overridden(
        "--config.mesh.fsdp=1", "--config.phases.train.mesh.seq=1", "--config.phases.align.weight_decay=1",
        "--config.phases.align.learning_rate=1", "--config.phases.train.trainable=('gka', 'norm')",
        "--config.mixers.gka_config.use_gate=false", "--config.schedule=('train',)", "--config.pattern=*-GKA",
    )  # fmt: skip
    assert config.mesh.to_dict() == {"fsdp": 1} and config.phases.train.mesh.to_dict() == {"seq": 1}
    assert config.to_dict()["mesh"] == {"fsdp": 1} and overridden().get("mesh") is None
    for value in (config.phases.align.weight_decay, config.phases.align.learning_rate):
        assert value == 1.0 and isinstance(value, float)
    assert config.phases.train.trainable == ("gka", "norm") and config.schedule == ("train",)
    assert config.mixers.gka_config.use_gate is False and config.pattern == "*-GKA"


def test_the_options_of_a_phase_s_objective_can_be_set_and_no_others():
    config = overridden("--config.phases.train.objective=distill", "--config.phases.train.options.temperature=2.5")
    assert config.phases.train.options.to_dict() == {"temperature": 2.5}
    with pytest.raises(ValueError, match=r"options has the unknown key 'temperature'; known: error, inputs, pre_lm_head"):
        overridden("--config.phases.align.options.temperature=2.5")


def test_a_number_without_a_point_in_a_config_does_not_make_a_field_one_of_integers(tmp_path):
    (tmp_path / "c.py").write_text("def get_config():\n    return dict(phases=dict(train=dict(weight_decay=0, steps=2)))")
    config = load_experiment_config([f"--config={tmp_path / 'c.py'}", "--config.phases.train.weight_decay=0.1"])
    assert config.phases.train.to_dict() == {"weight_decay": 0.1, "steps": 2}


def test_a_config_is_a_module_while_it_is_read(tmp_path):
    lines = "from __future__ import annotations", "import dataclasses", "@dataclasses.dataclass", "class A:", "    seed: int = 3"
    (tmp_path / "c.py").write_text("\n".join((*lines, "def get_config():", "    return dict(seed=A().seed)")))
    assert load_experiment_config([f"--config={tmp_path / 'c.py'}"]).seed == 3 and "hybrid_jax_config" not in sys.modules


def test_where_a_plan_or_an_evaluation_cannot_be_written_is_said_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hybrid_jax.plan.planner.make_plan", None)
    (tmp_path / "file").write_text("x")
    plan = ("plan", "--source", "launch/tiny_qwen3", "--topology", "h100:8", "--json")
    evaluate = ("evaluate", "--model", "a=launch/tiny_qwen3", "--out")
    for command, words in (
        ((*plan, str(tmp_path / "no" / "x.json")), "there is no directory"),
        ((*plan, str(tmp_path)), "it is a directory"),
        ((*evaluate, str(tmp_path / "file")), "file exists already"),
        ((*evaluate, str(tmp_path / "file" / "out")), "file is a file"),
    ):
        assert main(list(command)) == 1
        assert words in capsys.readouterr().err


def test_an_error_within_a_config_is_said_with_its_file(tmp_path):
    (tmp_path / "c.py").write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(ValueError, match="c.py: ZeroDivisionError: division by zero"):
        load_experiment_config([f"--config={tmp_path / 'c.py'}"])
    with pytest.raises(
        ValueError, match="no config file at 'nothing.py'; hybrid_jax comes with configs/analyze_heads.py, configs/evaluate.py"
    ):
        load_experiment_config(["--config=nothing.py"])


def record_of(config):
    """What an experiment of this config keeps of it."""
    return json.loads(json.dumps(with_absolute_paths(config.to_dict()), default=list))


def test_another_config_in_a_workdir_is_refused_with_the_fields_that_differ(tmp_path, monkeypatch):
    phases = dict(train=dict(objective="next_token", steps=20, mesh=dict(fsdp=2)))
    config = ConfigDict(dict(source="launch/tiny_qwen3", seed=1, schedule=("train",), phases=phases))
    claim(tmp_path / "run", record_of(config))
    (tmp_path / "run" / "stages").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the source is the same one from here
    config.phases.train.mesh.fsdp = 4
    claim(tmp_path / "run", record_of(config))
    config.phases.train.steps, config.phases.train.clip = 30, 0.5
    with pytest.raises(ValueError) as e:
        claim(tmp_path / "run", record_of(config))
    words = "config.phases.train.clip is 0.5 now and was absent; config.phases.train.steps is 30 now and was 20 (compare"
    assert words in str(e.value)


def test_a_run_that_made_nothing_leaves_its_directory_to_the_corrected_command(tmp_path, capsys):
    config = ConfigDict(dict(source="launch/tiny_qwen3", seed=1, schedule=(), phases={}, data=dict(text="a")))
    claim(tmp_path / "run", record_of(config))
    assert is_run(tmp_path / "run")
    with pytest.raises(ValueError, match="working directory of a run, not a model directory; it has no model yet"):
        read_model_config(tmp_path / "run")
    config.data.text = "b"
    claim(tmp_path / "run", record_of(config))
    assert "the new config takes its place" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == {"text": "b"}
    (tmp_path / "run" / "stages").mkdir()
    config.data.text = "c"
    with pytest.raises(ValueError, match="config.data.text is 'c' now and was 'b'"):
        claim(tmp_path / "run", record_of(config))


def test_help_shows_defaults_an_example_and_the_exit_codes(capsys):
    for command, row in COMMANDS.items():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert f"hybrid-jax {command} {row.example}" in text and "3 stopped by Ctrl-C or SIGTERM" in text
        assert "default: None" not in text and "default: False" not in text
    with pytest.raises(SystemExit):
        main(["select", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for default in ("(default: GKA)", "(default: 0.5)", "(default: 256)", "(default: stdlib)"):
        assert default in text


def test_the_examples_of_help_are_command_lines_that_are_read():
    import shlex

    for command, row in COMMANDS.items():
        assert read_arguments([command, *shlex.split(row.example)]).command == command


def test_help_and_the_parsers_import_no_large_library():
    program = "import json, sys; import hybrid_jax.commands.main as m; m._parsers(); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    large = {"jax", "flax", "numpy", "transformers", "orbax", "matplotlib", "grain", "tokenizers", "ml_collections", "absl", "rich"}
    assert not large & set(json.loads(done.stdout))


def test_the_package_s_functions_are_functions_whatever_was_imported_before():
    import hybrid_jax
    import hybrid_jax.generation  # before `hybrid_jax.generate` is asked for

    assert all(isinstance(getattr(hybrid_jax, name), types.FunctionType) for name in hybrid_jax.__all__)
    assert hybrid_jax.generate is hybrid_jax.generation.generate and {*hybrid_jax.__all__} <= {*dir(hybrid_jax)}
    assert not hasattr(hybrid_jax, "load_modle")
