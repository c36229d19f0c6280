"""A job of several processes by the command that a laptop runs: the environment says who is who."""

import functools
import os
import re
import shutil
import signal
import time

import numpy as np

from hybrid_jax import load_model, save_model
from hybrid_jax.evaluate.measured import read_measured
from hybrid_jax.parameters import split_model
from hybrid_jax.train import read_metrics
from tests.conftest import free_port, relative_error, tiny_model
from tests.distributed.conftest import losses, member, start, write_config


def test_two_processes_of_which_one_is_asked_to_stop_and_one_on_another_mesh_are_the_run_of_one_device(made_source, tmp_path):
    def config(name, mesh):
        argument, path = write_config(tmp_path / f"{name}.py", made_source, mesh), tmp_path / f"{name}.py"
        path.write_text(
            path.read_text().replace('"next_token", **each', '"next_token", **{**each, "steps": 60}, eval_every=1, eval_rows=5')
        )
        return argument

    alone = start(["prime", config("alone", "dict()"), f"--workdir={tmp_path}/alone"], 1, {})
    run, port = ["prime", config("first", "dict(data=2, fsdp=2, seq=2)"), f"--workdir={tmp_path}/run"], free_port()
    both = [start(run, 4, member(port, 2, i)) for i in range(2)]
    while not any(phase == "train" for phase, _ in losses(tmp_path / "run")):
        assert both[0].poll() is None, both[0].stderr.read()[-2000:]
        time.sleep(0.01)
    both[1].send_signal(signal.SIGTERM)
    outs = [p.communicate(timeout=300) for p in both]
    assert [p.returncode for p in both] == [3, 3], outs[0][1][-2000:] + outs[1][1][-2000:]
    gloo = re.compile(r"^\[Gloo\]|connected to \d+ peer ranks")  # what XLA prints, from several threads at once
    said = [[line for line in out.splitlines() if line and not gloo.search(line)] for out, _ in outs]
    assert any("training" in line for line in said[0]) and said[1] == []  # what a job says it says once
    stopped = [int(re.search(r"saved at step (\d+) of 60", errors)[1]) for _, errors in outs]
    assert stopped[0] == stopped[1] and 0 < stopped[0] < 60
    run[1] = config("second", "dict(fsdp=2)")
    again = start(run, 2, {})
    out, errors = again.communicate(timeout=900)
    assert again.returncode == 0, errors[-2000:]
    assert f"resumed at step {stopped[0]}" in out
    assert alone.wait(timeout=600) == 0, alone.stderr.read()[-2000:]
    want, got = losses(tmp_path / "alone"), losses(tmp_path / "run")
    assert got.keys() == want.keys()
    for name, tolerance in (("align", 1e-4), ("train", 1e-3)):
        steps = [k for k in want if k[0] == name]
        assert np.allclose([got[k] for k in steps], [want[k] for k in steps], rtol=tolerance)
    assert np.allclose([got["train", n] for n in (1, 2, 3)], [want["train", n] for n in (1, 2, 3)], rtol=1e-4)
    assert want["train", 3] < want["train", 1] - 0.01
    own = [{(r["step"], n): r[n] for r in read_metrics(tmp_path / d) for n in r if n.startswith("loss/")} for d in ("alone", "run")]
    assert own[0].keys() == own[1].keys() and {n for _, n in own[0]} == {"loss/text", "loss/more"}
    assert all(np.isclose(own[1][k], x, rtol=1e-3) for k, x in own[0].items())
    held_out = [
        {(r["step"], n): r[n] for r in read_metrics(tmp_path / d) for n in r if n.startswith("eval/")} for d in ("alone", "run")
    ]
    assert held_out[0].keys() == held_out[1].keys() and len(held_out[0]) == 60 * 3  # two sources and their mean
    assert all(np.isclose(held_out[1][k], x, rtol=1e-3) for k, x in held_out[0].items())
    assert all(np.isclose(held_out[1][k], held_out[0][k], rtol=1e-5) for k in held_out[0] if k[0] == 1)
    want, got = (split_model(load_model(tmp_path / d / "model"))[1] for d in ("alone", "run"))
    for name, value in want.items():
        assert relative_error(got[name], value) < 1e-2, name


def test_a_phase_converts_layers_on_a_mesh_as_on_one_device(made_source, tmp_path):
    processes = []
    for name, mesh, devices in (("alone", "dict()", 1), ("spread", "dict(fsdp=2, seq=2)", 4)):
        argument, path = write_config(tmp_path / f"{name}.py", made_source, mesh), tmp_path / f"{name}.py"
        text = path.read_text().replace('schedule=("align", "train")', 'schedule=("train",)')
        path.write_text(text.replace('form="unfused"', 'form="unfused", pattern="GDN-GDN"'))
        processes.append(start(["prime", argument, f"--workdir={tmp_path}/{name}"], devices, {}))
    for process in processes:
        assert process.wait(timeout=900) == 0, process.stderr.read()[-2000:]
    want, got = losses(tmp_path / "alone"), losses(tmp_path / "spread")
    assert got.keys() == want.keys() and np.allclose([got[k] for k in want], list(want.values()), rtol=1e-4)
    want, got = (load_model(tmp_path / name / "model") for name in ("alone", "spread"))
    assert want.config.pattern == got.config.pattern == "GDN-GDN"
    found = split_model(got)[1]
    for name, value in split_model(want)[1].items():
        assert relative_error(found[name], value) < 1e-2, name


DISTILL = r"""
from ml_collections import ConfigDict

def get_config():
    rows = dict(epochs=0.5, mix=dict(text=1.0), batch_size=4, seq_len=32, accumulate=2)
    kd = dict(objective="distill_cached", teacher_cache="CACHE", **rows)
    return ConfigDict(dict(source="SOURCE", mesh=MESH, schedule=("kd",), seed=3, phases=dict(kd=kd),
                           data=dict(text="TEXT", mix=dict(text=1.0))))
"""


def test_the_teacher_of_two_processes_answers_as_that_of_one_device(made_source, tmp_path):
    source, text = made_source
    save_model(tiny_model("*-*-*", vocab_size=270), tmp_path / "teacher", tokenizer_from=source)

    def command(name, mesh):
        given = {"CACHE": tmp_path / name, "SOURCE": tmp_path / "teacher", "TEXT": text, "MESH": mesh}
        config = functools.reduce(lambda text, word: text.replace(word, str(given[word])), given, DISTILL)
        (tmp_path / f"{name}.py").write_text(config)
        return ["cache-teacher", f"--config={tmp_path / name}.py", "--phase", "kd", "--k", "200"]

    port = free_port()
    both = [start(command("mesh", "dict(data=2, seq=2, tensor=2)"), 4, member(port, 2, i)) for i in range(2)]
    for process in (*both, start(command("alone", "dict()"), 1, {})):
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-2000:]
    steps = sorted(p.name for p in (tmp_path / "alone").glob("step-*"))
    assert len(steps) > 1
    for step in steps:
        want, got = (tmp_path / name / step for name in ("alone", "mesh"))
        a, b = (np.load(d / "log_probabilities.npy").astype(np.float32) for d in (want, got))
        assert a.shape == (4, 32, 200) and np.allclose(a, b, rtol=2e-3)  # float16's
        assert (np.load(want / "ids.npy") == np.load(got / "ids.npy")).mean() > 0.99  # all but ties


EVALUATION = """
from ml_collections import ConfigDict

def get_config():
    text = dict(instrument="text", seq_len=32, rows=5, batch_size=4)
    pairs = dict(instrument="recall", task="retrieval", options=dict(max_pairs=4), seq_len=32, rows=4, batch_size=4)
    return ConfigDict(dict(data=dict(text="TEXT"), instruments=dict(text=text, pairs=pairs), mesh=MESH))
"""


def test_an_evaluation_by_two_processes_on_a_mesh_is_that_of_one_device(made_source, tmp_path):
    source, text = made_source

    def command(name, mesh):
        (tmp_path / f"{name}.py").write_text(EVALUATION.replace("TEXT", str(text)).replace("MESH", mesh))
        return ["evaluate", f"--model=m={source}", f"--config={tmp_path / name}.py", f"--out={tmp_path / name}"]

    alone, port = start(command("alone", "dict()"), 1, {}), free_port()
    both = [start(command("both", "dict(data=2, fsdp=2, seq=2)"), 4, member(port, 2, i)) for i in range(2)]
    outs = [p.communicate(timeout=300) for p in (alone, *both)]
    assert [p.returncode for p in (alone, *both)] == [0] * 3, [errors[-1000:] for _, errors in outs]
    assert "text: loss" in outs[1][0] and "text: loss" not in outs[2][0]  # the first process reports
    (want,), (got,) = (read_measured(tmp_path / name / "results.json") for name in ("alone", "both"))
    for name, measurements in want.results.items():
        assert [m.key for m in measurements] == [m.key for m in got.results[name]]
        values = [[m.value for m in row.results[name]] for row in (got, want)]
        assert np.allclose(*values, rtol=1e-5)
    assert len(list((tmp_path / "both" / "stored").iterdir())) == 2


def test_layers_are_scored_by_two_processes_on_a_mesh_as_by_one_device(made_source):
    """Rows are sharded over `data`, their tokens over `seq`; five rows fill no batch."""
    source, text = made_source
    command, port = ["select", str(source), f"--text={text}", "--mixer=GDN", "--window=2", "--rows=5", "--seq-len=80"], free_port()
    processes = [start(command, 1, {}), *(start([*command, "--mesh=data=2,seq=4"], 4, member(port, 2, i)) for i in range(2))]
    outs = [p.communicate(timeout=300) for p in processes]
    assert [p.returncode for p in processes] == [0] * 3, [errors[-1000:] for _, errors in outs]
    want, got = ([float(x) for x in re.findall(r"costs (\S+) ± \S+ nats", out)] for out, _ in outs[:2])
    assert len(want) == 2 and np.allclose(got, want, atol=1.01e-4) and np.ptp(want) > 1e-3
    assert outs[1][0].splitlines()[-1] == outs[0][0].splitlines()[-1] and "costs" not in outs[2][0]


def test_two_processes_prepare_what_one_prepares_and_continue_together(made_source, tmp_path):
    """A stopped job left the plan and one shard; the first process alone writes what is written once."""
    source, _ = made_source
    folder = tmp_path / "lines"
    folder.mkdir()
    for n in range(5):
        (folder / f"{n}.jsonl").write_text("".join(f'{{"text": "line {i} of {n}"}}\n' for i in range(20)))
    command, port = ["prepare", str(folder), f"--tokenizer={source}"], free_port()
    outs = [start([*command, str(tmp_path / "one")], 1, {}).communicate(timeout=120)]
    shutil.copytree(tmp_path / "one", tmp_path / "both")
    for path in ("index.json", *(f"shard-0000{n}" for n in (0, 2, 3, 4))):
        (shutil.rmtree if path.startswith("shard") else os.unlink)(tmp_path / "both" / path)
    both = [start([*command, str(tmp_path / "both")], 1, member(port, 2, i)) for i in range(2)]
    outs += [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    files = {p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()}
    assert files == {p.relative_to(tmp_path / "both") for p in (tmp_path / "both").rglob("*") if p.is_file()}
    assert len(files) > 15 and all((tmp_path / "one" / f).read_bytes() == (tmp_path / "both" / f).read_bytes() for f in files)
    assert "5 shards" in outs[1][0] and "shards" not in outs[2][0]
    assert "3/3" in outs[1][1].replace(" ", "") and "prepare" not in outs[2][1]  # the finished one and its own two of four


def test_a_job_whose_other_host_is_missing_ends_and_says_so(tmp_path):
    env = {**member(free_port(), 2, 0), "HYBRID_JAX_START_TIMEOUT": "5"}
    process = start(["prime", "--config=configs/prime_tiny.py:GKA", f"--workdir={tmp_path}/run"], 1, env)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "not all processes of the job came up within 5 s" in errors
    assert not (tmp_path / "run").exists()


def test_a_failure_of_the_first_process_alone_ends_the_job_with_its_message(made_source, tmp_path):
    """It would leave the second one at a barrier: only the first claims the directory, which holds another run."""
    config, port = write_config(tmp_path / "config.py", made_source, "dict(data=2)"), free_port()
    (tmp_path / "run" / "stages").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text('{"phases": {}, "seed": 4}')
    both = [start(["prime", config, f"--workdir={tmp_path}/run"], 1, member(port, 2, i)) for i in range(2)]
    errors = [p.communicate(timeout=120)[1] for p in both]
    assert [p.returncode for p in both] == [1, 1], errors
    assert all("holds a run of another config: config.data.mix.more is 0.4 now" in e and "Traceback" not in e for e in errors)
    assert "on process 0, which ended the job" in errors[1]


def test_half_an_environment_is_refused(tmp_path):
    process = start(["prime", "--config=configs/prime_tiny.py:GKA", f"--workdir={tmp_path}/run"], 1, {"JAX_NUM_PROCESSES": "2"})
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "JAX_COORDINATOR_ADDRESS is not" in errors


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_written(made_source, tmp_path):
    config = write_config(tmp_path / "config.py", made_source, "dict(data=3)")
    process = start(["prime", config, f"--workdir={tmp_path}/run"], 3, {})
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and "divides batch_size in 3 shards, which do not divide 4" in errors
    assert not (tmp_path / "run").exists()
