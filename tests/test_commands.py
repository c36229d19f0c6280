"""The command line: what it does, and one clear message for each kind of bad input, leaving nothing behind."""

import json
import os
import shutil

import pytest

from hybrid_jax import load_model, save_model
from hybrid_jax.commands.main import COMMANDS, Command, main, read_arguments
from hybrid_jax.data.tokenizer import save_tokenizer, train_tokenizer
from hybrid_jax.evaluate.evaluation import Evaluation, read_evaluation, targets_of
from hybrid_jax.evaluate.instruments import make_instrument
from hybrid_jax.evaluate.instruments.text import TextLoss
from hybrid_jax.evaluate.results import StoredResults, data_stamp, fingerprint, key_of
from tests.conftest import GOLDEN, tiny_model


@pytest.fixture
def source(tmp_path):
    save_model(tiny_model("*-*"), tmp_path / "source", max_shard_bytes=6000)
    return tmp_path / "source"


def fails(capsys, *arguments):
    """Runs a command that must fail; returns its one message."""
    assert main([str(a) for a in arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("hybrid-jax ") and "Traceback" not in error and len(error.splitlines()) == 1
    return error


def only_source(tmp_path):
    return sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_convert_makes_a_hybrid_that_loads(source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path / "out"), "--pattern", "*-GDN"]) == 0
    assert load_model(tmp_path / "out").config.pattern == "*-GDN"
    assert "*-GDN" in capsys.readouterr().out


def test_export_unfuses_and_casts(source, tmp_path):
    assert main(["convert", str(source), str(tmp_path / "fused"), "--pattern", "*DA-GKA*"]) == 0
    assert main(["export", str(tmp_path / "fused"), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    model = load_model(tmp_path / "out")
    assert model.config.pattern == "*-GKA" and str(model.norm.weight[...].dtype) == "bfloat16"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as e:
        main([command, "--help"])
    assert e.value.code == 0 and "usage" in capsys.readouterr().out


TOY = """
def add_arguments(parser):
    parser.add_argument("name", help="whom to greet")


def run(args):
    if args.name == "nobody":
        raise ValueError("there is nobody to greet")
    print(f"hello {args.name} {args.overrides}")
"""


def test_a_row_of_the_table_is_all_that_a_command_needs(tmp_path, capsys, monkeypatch):
    (tmp_path / "toy_commands").mkdir()
    (tmp_path / "toy_commands" / "greet.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    row = Command("toy_commands.greet", "greet somebody", "world", overrides=True, resumable=True)
    monkeypatch.setitem(COMMANDS, "greet", row)
    assert main(["greet", "world", "--config.a=1"]) == 0 and capsys.readouterr().out == "hello world ['--config.a=1']\n"
    assert fails(capsys, "greet", "nobody") == "hybrid-jax greet: there is nobody to greet"
    with pytest.raises(SystemExit) as e:
        main(["greet", "world", "--loud"])
    assert e.value.code == 2 and "unknown option --loud" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        main(["greet", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and "hybrid-jax greet world" in words and "whom to greet" in words
    assert "and greet continue when the same command is given again" in words


def test_a_missing_shard_is_named(source, tmp_path, capsys):
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in fails(capsys, "convert", source, tmp_path / "out", "--pattern", "*-GKA")
    assert only_source(tmp_path)


def test_a_truncated_shard_is_named(source, tmp_path, capsys):
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    error = fails(capsys, "convert", source, tmp_path / "out")
    assert shard.name in error and "truncated" in error
    assert only_source(tmp_path)


def test_an_unknown_family_is_named_beside_the_known_ones(source, tmp_path, capsys):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    error = fails(capsys, "convert", source, tmp_path / "out")
    assert "'gpt2'" in error and "qwen3" in error
    assert only_source(tmp_path)


def test_a_pattern_of_the_wrong_length_or_symbol_is_refused(source, tmp_path, capsys):
    assert "3 symbols" in fails(capsys, "convert", source, tmp_path / "out", "--pattern", "*-GKA-*")
    assert "layer 1: 'GKX'" in fails(capsys, "convert", source, tmp_path / "out", "--pattern", "*-GKX")
    assert "keeps head 9" in fails(capsys, "convert", source, tmp_path / "out", "--pattern", "*-GDN[9]")
    assert only_source(tmp_path)


def test_overwrite_replaces_a_model_directory_when_the_new_one_is_complete_and_nothing_else(source, tmp_path, capsys, monkeypatch):
    out, other = tmp_path / "out", tmp_path / "other"
    assert main(["convert", str(source), str(out)]) == 0
    (out / "merges.txt").write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr("hybrid_jax.convert.writer.WeightWriter.check_complete", lambda *args: pytest.fail("a full disk"))
        with pytest.raises(BaseException, match="a full disk"):
            main(["export", str(source), str(out), "--overwrite"])
    assert (out / "merges.txt").exists() and (out / "config.json").exists()
    assert main(["convert", str(source), str(out), "--overwrite", "--pattern", "*-GKA"]) == 0
    assert json.loads((out / "config.json").read_text())["hybrid_override_pattern"] == "*-GKA" and not (out / "merges.txt").exists()
    other.mkdir()
    capsys.readouterr()
    (other / "precious.txt").write_text("x")
    assert "only a model directory" in fails(capsys, "export", source, other, "--overwrite") and (other / "precious.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({"other", "out", source.name})


def test_an_output_that_can_not_be_written_is_refused_before_loading(source, tmp_path, capsys):
    shutil.rmtree(source / "nothing", ignore_errors=True)
    (tmp_path / "file").write_text("x")
    assert "is a file" in fails(capsys, "convert", source, tmp_path / "file" / "out")
    assert "exists already" in fails(capsys, "convert", tmp_path / "unread", source)
    (tmp_path / "file").unlink()
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "not writable" in fails(capsys, "convert", source, tmp_path / "closed" / "out")
        (tmp_path / "closed").rmdir()
    else:
        assert "not writable" in fails(capsys, "convert", source, "/proc/out")
    assert only_source(tmp_path)


def test_a_directory_without_a_model_is_refused(tmp_path, capsys):
    assert "no model directory" in fails(capsys, "convert", tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "config.json" in fails(capsys, "convert", tmp_path / "empty", tmp_path / "out")
    shutil.copy(GOLDEN / "hmf" / "qwen3_gka" / "config.json", tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"")
    error = fails(capsys, "convert", tmp_path / "empty", tmp_path / "out")
    assert ".bin" in error and "safetensors" in error


def test_contradictions_in_a_hybrid_config_are_refused(tmp_path, capsys):
    shutil.copytree(GOLDEN / "hmf" / "qwen3_gka", tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "layer_types": ["*", "GDN"]}))
    assert "contradict" in fails(capsys, "convert", tmp_path / "source", tmp_path / "out")
    path.write_text(json.dumps({**config, "hybrid_override_pattern": "*-M2", "layer_types": ["*", "M2"]}))
    error = fails(capsys, "convert", tmp_path / "source", tmp_path / "out")
    assert "missing" in error and "unexpected" in error and "gka" in error
    path.write_text(json.dumps({**config, "vocab_size": 300}))
    assert "(300, 64)" in fails(capsys, "convert", tmp_path / "source", tmp_path / "out")


def test_priming_a_damaged_source_is_refused_before_anything_is_written(source, tmp_path, capsys):
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    run = ["prime", "--config=configs/prime_tiny.py:GKA", "--workdir", tmp_path / "run", f"--config.source={source}"]
    assert "truncated" in fails(capsys, *run)
    shard.unlink()
    assert "missing" in fails(capsys, *run)
    assert only_source(tmp_path)


def test_bad_experiment_arguments_are_refused(tmp_path, capsys):
    assert "nothing.py" in fails(capsys, "prime", "--config=nothing.py", "--workdir", tmp_path / "run")
    bad = "--config.phases.align.stepz=3"
    assert "stepz" in fails(capsys, "prime", "--config=configs/prime_tiny.py:GKA", "--workdir", tmp_path / "run", bad)
    assert "prime_tiny knows" in fails(capsys, "prime", "--config=configs/prime_tiny.py:XYZ", "--workdir", tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["convert", "a", "b", "--colour"])


def test_evaluate_wants_something_to_measure(tmp_path, capsys):
    assert "at least one" in fails(capsys, "evaluate")
    assert "NAME=DIR" in fails(capsys, "evaluate", "--model", "dir")
    assert "not a run" in fails(capsys, "evaluate", "--run", f"a={tmp_path}")
    twice = ("--model", f"a={tmp_path}", "--run", f"a={tmp_path}")
    assert "the name 'a' is given twice" in fails(capsys, "evaluate", *twice)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def broken(*a, **k):
        raise OSError("No space left on device")

    monkeypatch.setattr("hybrid_jax.convert.writer.WeightWriter.write", broken)
    with pytest.raises(OSError):
        save_model(tiny_model("*"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def two_tokenizers(tmp_path_factory):
    """Two small models of one text, each with a tokenizer of its own."""
    root = tmp_path_factory.mktemp("evaluation")
    lines = [f"line {i} of {i * i} words: {'abc def ghi jkl'[i % 9 :]}" for i in range(1500)]
    (root / "text.txt").write_text("\n".join(lines))
    for name, size in (("small", 280), ("large", 400)):
        save_model(tiny_model("*", vocab_size=size), root / name)
        save_tokenizer(train_tokenizer(lines, size), root / name, 256)
    return root


SMALL = """
from ml_collections import ConfigDict

def get_config():
    data = {"text": "stdlib", "tasks": {"few": {"task": "retrieval", "max_pairs": 4}}}
    text = {"instrument": "text", "seq_len": 80, "rows": 4}
    few = {"instrument": "recall", "task": "few", "seq_len": 80, "rows": 2}
    return ConfigDict({"data": data, "instruments": {"text": text, "few": few}})
"""


def test_analyze_heads_is_an_evaluation_by_its_own_config(capsys):
    arguments = read_arguments(["analyze", "heads", "--model", "a=m", "--config.instruments.heads_needle.rows=2"])
    assert arguments.config == "configs/analyze_heads.py" and len(arguments.overrides) == 1
    assert "at least one" in fails(capsys, "analyze", "heads")
    with pytest.raises(SystemExit):
        read_arguments(["analyze", "tails", "--model", "a=m"])


def evaluated(root, out, *models, capsys, more=()):
    """{name: its loss} by `evaluate --out`, and what it printed."""
    (root / "evaluation.py").write_text(SMALL)
    flags = [f"--model={m}={root / m}" for m in models]
    flags += ["--config", str(root / "evaluation.py"), "--text", str(root / "text.txt"), "--out", str(out)]
    assert main(["evaluate", *flags, *more]) == 0
    rows = json.loads((out / "results.json").read_text())
    return {r["target"]["name"]: r["results"]["text"][0]["value"] for r in rows}, "".join(capsys.readouterr())


def test_evaluate_refuses_before_any_work_what_does_not_fit_the_model(two_tokenizers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hybrid_jax.evaluate.evaluation.load_model", None)
    command = ("evaluate", f"--model=a={two_tokenizers / 'small'}", "--text", two_tokenizers / "text.txt")
    error = fails(capsys, *command, "--seq-len=257")
    assert "instruments.text does not fit 'a'" in error and "seq_len 257 is more than the model's max_position_embeddings" in error
    assert "256 positions" in fails(capsys, *command, "--prompt", "12 " * 200)
    assert "at least one token" in fails(capsys, *command, "--prompt", "")
    assert "nowhere" in fails(capsys, *command[:2], "--text", tmp_path / "nowhere")
    assert "unknown key 'rowz'" in fails(capsys, *command, "--config.instruments.text.rowz=3")
    (tmp_path / "empty.py").write_text("def get_config():\n    return {'data': {'text': 'stdlib'}}\n")
    assert "needs 'instruments'" in fails(capsys, *command[:2], "--config", tmp_path / "empty.py")
    assert "no instrument" in fails(capsys, *command[:2], "--config", tmp_path / "empty.py", "--rows=3")


def test_any_field_of_an_evaluation_is_overridden_also_one_that_its_config_does_not_name():
    changes = ("data.tasks.needle.text_weight=0.5", "instruments.text.batch_size=2", "mesh.data=2")
    evaluation = read_evaluation("configs/evaluate_tiny.py", [f"--config.{c}" for c in changes], rows=3)
    assert evaluation.data["tasks"]["needle"]["text_weight"] == 0.5 and evaluation.mesh == {"data": 2}
    assert evaluation.instruments["text"] == TextLoss(seq_len=1024, rows=3, batch_size=2)
    for wrong in ("data.tasks.needle.width=1", "instruments.text.width=1", "width=1"):
        with pytest.raises(ValueError, match="unknown key 'width'"):
            read_evaluation("configs/evaluate_tiny.py", [f"--config.{wrong}"])


def test_a_stored_result_is_of_its_options(two_tokenizers):
    def of(text=str(two_tokenizers / "text.txt"), tasks=(), **options):
        instrument = make_instrument("x", {"instrument": "text", "seq_len": 80, **options})
        return fingerprint(two_tokenizers / "small", data_stamp({"text": text, "tasks": dict(tasks)}), instrument)

    others = [of(), of(seq_len=81), of(rows=5), of(text="stdlib"), of(tasks={"few": {"task": "retrieval"}})]
    assert of() == others[0] and all(a != b for n, a in enumerate(others) for b in others[:n])


def test_a_stored_result_is_of_the_chat_template_and_of_the_first_text(two_tokenizers, tmp_path):
    model, instrument = shutil.copytree(two_tokenizers / "small", tmp_path / "m"), make_instrument("x", {"instrument": "text"})
    text, data = {"path": str(two_tokenizers / "text.txt")}, data_stamp({"text": "stdlib"})
    before = fingerprint(model, data, instrument)
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert fingerprint(model, data, instrument) != before
    orders = [data_stamp({"sources": {name: text for name in names}}) for names in ("ab", "ba")]
    assert key_of(orders[0]) != key_of(orders[1])


@pytest.mark.parametrize("part", [0, 40, -30])
def test_a_stored_result_that_is_not_complete_is_said_and_measured_again(tmp_path, capsys, part):
    StoredResults(tmp_path).store("m", "text", {"format": 2}, [])
    assert StoredResults(tmp_path).find({"format": 2}) == []
    (path,) = (tmp_path / "stored").iterdir()
    path.write_text(path.read_text()[:part])
    assert StoredResults(tmp_path).find({"format": 2}) is None
    assert f"{path} is not a complete stored result" in "".join(capsys.readouterr())


def test_two_lines_of_a_table_never_have_the_same_name(tmp_path):
    (tmp_path / "run" / "stages" / "00_initial").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="'r initial'"):
        targets_of([f"r initial={tmp_path}"], [f"r={tmp_path / 'run'}"])


def test_a_run_may_be_measured_at_the_length_of_its_last_stage(two_tokenizers, tmp_path):
    for number, (stage, positions) in enumerate((("initial", 64), ("longer", 128))):
        directory = shutil.copytree(two_tokenizers / "small", tmp_path / "run" / "stages" / f"0{number}_{stage}")
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
    (tmp_path / "run" / "config.json").write_text(json.dumps({"source": "somewhere"}))
    targets = targets_of([], [f"r={tmp_path / 'run'}"])
    assert [(t.name, t.stage, t.source) for t in targets] == [("r initial", 0, "somewhere"), ("r longer", 1, "somewhere")]

    def of(length):
        instrument = make_instrument("text", {"instrument": "text", "seq_len": length, "rows": 1})
        return Evaluation({"text": instrument}, {"text": str(two_tokenizers / "text.txt")})

    assert [len(row.results["text"]) > 3 for row in of(128).run(targets)] == [True, True]
    with pytest.raises(ValueError, match="does not fit 'r longer'"):
        of(129).run(targets)


def test_an_evaluation_that_is_stopped_keeps_what_it_measured_and_continues_there(two_tokenizers, tmp_path, capsys, monkeypatch):
    out, measure, done = tmp_path / "out", TextLoss.measure, []

    def stopped(self, subject, progress):
        done.append(subject)
        if len(done) == 2:
            raise KeyboardInterrupt
        return measure(self, subject, progress)

    (two_tokenizers / "evaluation.py").write_text(SMALL)
    monkeypatch.setattr(TextLoss, "measure", stopped)
    flags = [f"--model={m}={two_tokenizers / m}" for m in ("small", "large")]
    flags += ["--config", str(two_tokenizers / "evaluation.py"), "--text", str(two_tokenizers / "text.txt"), "--out", str(out)]
    assert main(["evaluate", *flags]) == 3 and "continues" in capsys.readouterr().err
    assert len(list((out / "stored").iterdir())) == 2 and not (out / "report.md").exists()  # both instruments of the first model
    assert set(evaluated(two_tokenizers, out, "small", "large", capsys=capsys)[0]) == {"small", "large"} and len(done) == 3


def test_every_model_is_evaluated_with_its_own_tokenizer(two_tokenizers, tmp_path, capsys):
    alone = {m: evaluated(two_tokenizers, tmp_path / m, m, capsys=capsys)[0][m] for m in ("small", "large")}
    for order in (("small", "large"), ("large", "small")):
        losses, printed = evaluated(two_tokenizers, tmp_path / "-".join(order), *order, capsys=capsys)
        assert losses == alone
        assert "2 different tokenizers" in printed
    assert "tokenizer" not in evaluated(two_tokenizers, tmp_path / "again", "small", capsys=capsys)[1]


def replaced(out, loss):
    """Puts a loss that no evaluation gives in the stored results of text."""
    for path in (out / "stored").iterdir():
        record = json.loads(path.read_text())
        if record["name"] == "text":
            record["measurements"][0]["value"] = loss
            path.write_text(json.dumps(record))


@pytest.mark.parametrize("changed", ["text.txt", "config.json", "tokenizer.json", "model.safetensors"])
def test_a_stored_result_is_used_only_while_nothing_it_depends_on_has_changed(two_tokenizers, tmp_path, capsys, changed):
    root = shutil.copytree(two_tokenizers, tmp_path / "root")
    out = tmp_path / "out"
    evaluated(root, out, "small", capsys=capsys)
    replaced(out, 1.25)
    assert evaluated(root, out, "small", capsys=capsys)[0]["small"] == 1.25
    path = root / changed if changed == "text.txt" else root / "small" / changed
    if changed == "model.safetensors":
        save_model(tiny_model("*", vocab_size=280, seed=5), tmp_path / "other")
        shutil.copy(tmp_path / "other" / changed, path)
    else:
        path.write_text(path.read_text() + "\n")
    losses, printed = evaluated(root, out, "small", capsys=capsys)
    assert losses["small"] != 1.25 and "measured again" in printed and changed.removesuffix(".txt") in printed


def test_a_copy_of_a_model_uses_the_stored_result_wherever_it_is(two_tokenizers, tmp_path, capsys):
    out = tmp_path / "out"
    evaluated(two_tokenizers, out, "small", capsys=capsys)
    replaced(out, 1.25)
    root = shutil.copytree(two_tokenizers, tmp_path / "moved")
    (root / "small").rename(root / "renamed")
    assert evaluated(root, out, "renamed", capsys=capsys)[0]["renamed"] == 1.25


def test_results_in_the_model_s_own_directory_are_used_again(two_tokenizers, tmp_path, capsys):
    out = shutil.copytree(two_tokenizers, tmp_path / "root") / "small"
    evaluated(tmp_path / "root", out, "small", capsys=capsys)
    replaced(out, 1.25)
    assert evaluated(tmp_path / "root", out, "small", capsys=capsys)[0]["small"] == 1.25


def test_evaluate_writes_a_report_with_continuations(two_tokenizers, tmp_path, capsys):
    more = ("--prompt", "line 7", "--rows=2")
    printed = evaluated(two_tokenizers, tmp_path / "out", "small", capsys=capsys, more=more)[1]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| small |" in report and "line 7" in report and "few: accuracy" in report and "line 7" in printed
