"""Hooks that a config names: they run in the loop, resume, and are checked before any work."""

import json
import types

import jax
import pytest
from ml_collections import ConfigDict

from hybrid_jax import load_model
from hybrid_jax.evaluate.instruments import Subject, make_instrument
from hybrid_jax.experiment import run_experiment
from hybrid_jax.fields import load_experiment_config
from hybrid_jax.parallel.mesh import make_mesh
from hybrid_jax.train import Phase, read_metrics
from hybrid_jax.train.hook import call
from hybrid_jax.train.hooks import make_hooks
from hybrid_jax.train.instrument_hook import InstrumentHook
from hybrid_jax.workdir import load_run
from tests.conftest import tiny_config
from tests.train.conftest import arrays, experiment, phase, train

TOY = """
from hybrid_jax.train.hook import Hook


class Toy(Hook):
    calls = 0

    def __init__(self, every, *, group: str, factor: int = 1):
        super().__init__(every)
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        self.group, self.factor = group, factor

    def __call__(self, view):
        self.calls += 1
        sources = len(view.corpus.held_out)
        return {f"{self.group}/calls": self.factor * self.calls, f"{self.group}/sources": sources, f"{self.group}/step": view.step}

    def state(self):
        return {"calls": self.calls}

    def set_state(self, state):
        self.calls = state["calls"]


class Other:
    pass
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_hooks.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    return dict(hook="toy_hooks:Toy", every=2, group="toy")


def test_two_hooks_of_one_class_run_beside_each_other_and_each_resumes_its_own_state(corpus, tmp_path, toy):
    hooks = {"a": toy, "b": {**toy, "every": 4, "group": "b", "factor": 10}}
    for steps in (4, 6):
        train(corpus, tmp_path, steps=steps, schedule="constant", hooks=hooks)
    rows = {r["step"]: r for r in read_metrics(tmp_path)}
    calls = {n: {s: r[f"{n}/calls"] for s, r in rows.items() if f"{n}/calls" in r} for n in ("toy", "b")}
    assert calls == {"toy": {2: 1, 4: 2, 6: 3}, "b": {4: 10, 6: 20}}
    assert rows[6]["toy/sources"] == 1 and rows[6]["toy/step"] == 6


def test_a_hook_changes_nothing_of_the_training(corpus, tmp_path, toy):
    plain, hooked = (arrays(train(corpus, tmp_path / n, hooks=h)) for n, h in (("plain", {}), ("hooked", {"a": toy})))
    assert all((plain[n] == x).all() for n, x in hooked.items())


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(hook="toy_hooks.Toy"), "phase.hooks.a.hook must be 'MODULE:CLASS', got 'toy_hooks.Toy'"),
        (dict(hook="no_such_hooks:Toy"), "phase.hooks.a.hook: cannot import no_such_hooks:Toy (ModuleNotFoundError"),
        (dict(hook="toy_hooks:Tory"), "phase.hooks.a.hook: cannot import toy_hooks:Tory (AttributeError"),
        (dict(hook="toy_hooks:Other"), "toy_hooks:Other is not a subclass of hybrid_jax.train.hook.Hook"),
        (dict(every=0), "phase.hooks.a.every must be an integer at least 1, got 0"),
        (dict(facter=2), "phase.hooks.a has the unknown key 'facter' (did you mean 'factor'?)"),
        (dict(factor=0), "phase.hooks.a: factor must be at least 1, got 0"),
    ],
)
def test_a_wrong_hook_is_refused_when_the_config_is_read(toy, changes, words):
    with pytest.raises(ValueError) as e:
        Phase.from_config("train", ConfigDict(dict(objective="next_token", steps=1, hooks={"a": {**toy, **changes}})))
    assert str(e.value).startswith("phase 'train': phase.hooks.a") and words in str(e.value)


def test_a_hook_without_its_fields_is_refused(toy):
    needs = "needs 'hook' .'MODULE:CLASS'. and 'every'"
    for missing, words in (("hook", needs), ("every", needs), ("group", "needs the option 'group' of toy_hooks:Toy")):
        with pytest.raises(ValueError, match=f"phase.hooks.a {words}"):
            phase(hooks={"a": {k: v for k, v in toy.items() if k != missing}})
    for hooks, words in (
        ({"evaluation": toy}, "evaluation by phase.eval_every"),
        ({"eval": toy}, "evaluation by phase.eval_every"),
        ("toy_hooks:Toy", "must map names to hooks"),
    ):
        with pytest.raises(ValueError, match=words):
            phase(hooks=hooks)


def test_no_two_hooks_log_one_name_and_none_logs_the_evaluation_s(toy):
    """The best checkpoint is chosen by `eval/loss`."""
    view = types.SimpleNamespace(corpus=types.SimpleNamespace(held_out={}), step=3)

    def values(*groups):
        return call(make_hooks({f"of {group} {n}": {**toy, "group": group} for n, group in enumerate(groups)}), view)

    assert values("a", "b") == {f"{g}/{n}": v for g in "ab" for n, v in (("calls", 1), ("sources", 0), ("step", 3))}
    with pytest.raises(ValueError, match="phase.hooks.of a 1 logs 'a/calls', a name of another hook's"):
        values("a", "a")
    with pytest.raises(ValueError, match="phase.hooks.of eval 0 logs 'eval/calls', a name of phase.eval_every's"):
        values("eval")


def test_an_instrument_of_one_device_is_refused_on_a_mesh(corpus):
    mesh, model = make_mesh({"fsdp": 1}, jax.devices()[:1]), types.SimpleNamespace(config=tiny_config("*"))
    hook = InstrumentHook(1, instrument="speed", options=dict(lengths=(8,)))
    with pytest.raises(ValueError, match="speed: it is measured on one device"):
        hook(types.SimpleNamespace(model=model, corpus=corpus, mesh=mesh))


def test_the_fields_of_a_hook_are_set_on_the_command_line(tmp_path, toy):
    config = dict(phases=dict(train=dict(hooks=dict(a=toy))))
    (tmp_path / "c.py").write_text(f"def get_config():\n    return {config!r}\n")

    def overridden(*fields):
        return load_experiment_config([f"--config={tmp_path / 'c.py'}", *(f"--config.phases.train.hooks.a.{f}" for f in fields)])

    assert overridden("every=5", "factor=3").phases.train.hooks.a.to_dict() == {**toy, "every": 5, "factor": 3}
    with pytest.raises(ValueError, match=r"config.phases.train.hooks.a has the unknown key 'facter' .did you mean 'factor'"):
        overridden("facter=3")


def test_an_experiment_runs_the_hooks_of_its_config_and_is_read_without_their_package(made_source, tmp_path, toy, monkeypatch):
    source, text = made_source
    config = experiment(source, schedule=("train",))
    config.data.text = text
    config.phases.train.hooks = ConfigDict({"a": toy})
    config.phases.train.keep_every = 1
    run_experiment(config, tmp_path / "run")
    assert [r["toy/calls"] for r in read_metrics(tmp_path / "run") if "toy/calls" in r] == [1]
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    record["phases"]["train"]["hooks"]["a"]["hook"] = "not_here:Toy"
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    end = arrays(load_model(tmp_path / "run" / "stages" / "01_train"))
    assert all((end[n] == x).all() for n, x in arrays(load_run(tmp_path / "run", "train", 2)).items())


def test_an_instrument_runs_in_the_loop_and_finds_what_it_finds_of_the_outcome(corpus, tmp_path):
    options = dict(task="needles", seq_len=64, rows=4, options=dict(max_needles=2))
    hook = dict(hook="hybrid_jax.train.instrument_hook:InstrumentHook", every=2, instrument="recall", options=options)
    model = train(corpus, tmp_path, hooks={"needles": hook})
    logged = [row for row in read_metrics(tmp_path) if "needles/loss" in row][-1]
    subject = Subject(model, corpus.tokenizer, corpus)
    want = {
        (m.measure, *m.at.values()): m.value for m in make_instrument("x", dict(instrument="recall", **options)).measure(subject)
    }
    assert logged["needles/loss"] == pytest.approx(want["loss",], rel=1e-5)
    assert logged["needles/accuracy/distance=63"] == pytest.approx(want["accuracy", 63])


def test_an_instrument_with_a_wrong_option_is_refused_when_the_config_is_read():
    hook = dict(hook="hybrid_jax.train.instrument_hook:InstrumentHook", every=2, instrument="recall", options=dict(row=4))
    with pytest.raises(ValueError, match="phase.hooks.needles: instruments.recall: recall has no option 'row'"):
        phase(hooks={"needles": hook})


def test_an_instrument_whose_rows_are_longer_than_the_model_s_positions_is_refused(corpus, tmp_path):
    options = dict(task="needles", seq_len=512, rows=1)
    hook = dict(hook="hybrid_jax.train.instrument_hook:InstrumentHook", every=1, instrument="recall", options=options)
    with pytest.raises(ValueError, match="recall: seq_len 512 is more than the model's max_position_embeddings, 256"):
        train(corpus, tmp_path, hooks={"needles": hook})
