"""Phases that change the pattern: what converts, what stays, and a run's model within such a phase."""

import shutil

import ml_dtypes
import numpy as np
import pytest

from hybrid_jax import load_model
from hybrid_jax.commands.main import main
from hybrid_jax.config import GDNConfig, GKAConfig
from hybrid_jax.experiment import begin_phase, run_experiment
from hybrid_jax.experiment_config import Experiment
from hybrid_jax.priming.fuse import fuse, unfuse
from hybrid_jax.priming.initialize import initialize_hybrid
from hybrid_jax.train import Phase
from hybrid_jax.workdir import load_run
from tests.train.conftest import arrays, experiment

BEGUN = "layers.0.gdn."  # the mixer that begins in the second phase
TRAINED = f"{BEGUN}o_norm.weight"  # and what of it trains there


def progressive(source, text, **changes):
    """Layer 1 converts before the first phase, layer 0 before the second, of which no parameter but `TRAINED` trains."""
    common = dict(steps=3, batch_size=2, seq_len=32, log_every=1, learning_rate=1e-2)
    first = dict(**common, form="fused", objective="distill", trainable=("all",))
    second = dict(**common, pattern="GDN-GDN", form="fused", objective="distill", trainable=(r"layers\.0\.gdn\.o_norm",))
    second |= dict(checkpoint_every=1, keep_every=1)
    phases = {"first": first, "second": second}
    config = experiment(source, pattern="*-GDN", schedule=tuple(phases), phases=phases, **changes)
    config.data.text = text
    return config


@pytest.fixture(scope="module")
def run(made_source, tmp_path_factory):
    """(the working directory of the run, its config)."""
    config = progressive(*made_source)
    workdir = tmp_path_factory.mktemp("runs") / "run"
    run_experiment(config, workdir)
    return workdir, config


@pytest.fixture(scope="module")
def stages(run):
    """The models of the run's stages, by their names."""
    return {path.name: load_model(path) for path in sorted((run[0] / "stages").iterdir())}


def test_every_stage_has_the_pattern_of_its_phase(run, stages):
    patterns = {name: model.config.pattern for name, model in stages.items()}
    assert patterns == {"00_initial": "*-GDN", "01_first": "*DA-GDN*", "02_second": "GDN*-GDN*"}
    assert load_model(run[0] / "model").config.pattern == "GDN-GDN"


def test_a_converted_layer_keeps_its_trained_mixer_when_another_one_converts(stages):
    initial, first, second = (arrays(stages[name]) for name in ("00_initial", "01_first", "02_second"))
    of_layer_1 = [name for name in first if name.startswith("layers.1.gdn.")]
    assert of_layer_1 and all(np.array_equal(first[n], second[n]) for n in of_layer_1)
    assert not np.array_equal(initial["layers.1.gdn.q_proj.kernel"], first["layers.1.gdn.q_proj.kernel"])


def test_what_converts_begins_from_the_model_as_it_is_and_learns_from_the_source(made_source, stages):
    source, first, second = arrays(load_model(made_source[0])), arrays(stages["01_first"]), arrays(stages["02_second"])
    trained, begun = "layers.0.self_attn.v_proj.kernel", f"{BEGUN}v_proj.kernel"
    assert np.array_equal(second[begun], first[trained]) and not np.array_equal(source[trained], first[trained])
    assert np.array_equal(second[trained], source[trained]), "the teacher must stay the source"


def test_a_phase_draws_what_attention_does_not_give_from_a_seed_of_its_own(stages):
    drawn, before = arrays(stages["02_second"])[f"{BEGUN}b_proj.kernel"], unfuse(stages["01_first"])
    for seed in (0, 1, 2):  # the experiment's is 0, so that the second phase has 2
        found = arrays(initialize_hybrid(before, "GDN-GDN", seed=seed))[f"{BEGUN}b_proj.kernel"]
        assert np.array_equal(drawn, found) == (seed == 2)


@pytest.mark.parametrize("left", [(), ("1",)])
def test_a_run_that_was_stopped_after_the_pattern_changed_ends_as_one_that_was_not(run, stages, tmp_path, left):
    """Before the first checkpoint of the phase, and after it."""
    workdir, config = run
    shutil.copytree(workdir, tmp_path / "run")
    for gone in ("model", "stages/02_second"):
        shutil.rmtree(tmp_path / "run" / gone)
    for checkpoint in (tmp_path / "run" / "checkpoints" / "second").iterdir():
        if checkpoint.name not in left:
            shutil.rmtree(checkpoint)
    run_experiment(config, tmp_path / "run")
    found, wanted = arrays(load_model(tmp_path / "run" / "stages" / "02_second")), arrays(stages["02_second"])
    assert {*found} == {*wanted} and all(np.array_equal(found[n], x) for n, x in wanted.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_within_a_phase_is_exported_in_the_phase_s_pattern(run, stages, tmp_path, dtype):
    workdir, _ = run
    command = ["export", str(workdir), str(tmp_path / "out"), "--phase", "second", "--step", "1", "--dtype", dtype]
    assert main(command) == 0
    model, second, first = load_model(tmp_path / "out"), arrays(stages["02_second"]), arrays(stages["01_first"])
    assert model.config.pattern == "GDN-GDN"
    for name, x in arrays(model).items():
        assert x.dtype == (np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
        if name != TRAINED:  # what does not train is what the phase began with, the newly drawn parameters too
            assert np.array_equal(x, second[name].astype(x.dtype)), name
    assert not np.array_equal(arrays(model)[TRAINED], second[TRAINED].astype(dtype)) and TRAINED not in first


def test_a_phase_under_way_is_had_in_its_pattern_and_its_end_is_its_last_checkpoint(run, stages, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    for gone in ("model", "stages/02_second"):
        shutil.rmtree(tmp_path / "run" / gone)
    model, second = load_run(tmp_path / "run", "second"), arrays(stages["02_second"])
    assert model.config.pattern == "GDN*-GDN*" and all(np.array_equal(x, second[n]) for n, x in arrays(model).items())


def begun(model, made_source, *, form, pattern, **said):
    """The model with which the second phase of an experiment that says this begins, after `model`."""
    source = made_source[0]
    phase = Phase(objective="next_token", steps=1, form=form, pattern=pattern)
    return begin_phase(model, Experiment.of_conversions({"source": str(source), "seed": 0, **said}), 2, phase, source, None)


def test_mixers_begin_as_the_experiment_says_though_the_phase_before_had_none_of_them(made_source):
    said = dict(mixers={"gdn_config": {"conv_size": 3}}, fresh_parameters="torch", copy_attention=False)
    source = load_model(made_source[0])
    model = begun(source, made_source, form="as_is", pattern="GDN-*", **said)
    kernel, bound = arrays(model)[f"{BEGUN}v_proj.kernel"], 1 / np.sqrt(16)  # of 16 inputs
    assert model.config.pattern == "GDN-*" and model.config.options(GDNConfig).conv_size == 3
    assert not np.array_equal(kernel, arrays(source)["layers.0.self_attn.v_proj.kernel"]), "attention is not copied"
    assert 0.8 * bound < np.abs(kernel).max() <= bound, "as torch draws it"


def test_a_phase_that_leaves_the_form_keeps_the_teachers(made_source):
    source = load_model(made_source[0])
    hybrid = initialize_hybrid(source, "*-GDN")
    assert begun(fuse(hybrid, source), made_source, form="as_is", pattern="GDN-GDN").config.pattern == "GDN*-GDN*"
    assert begun(fuse(hybrid, source), made_source, form="unfused", pattern="GDN-GDN").config.pattern == "GDN-GDN"


def test_a_trained_mixer_becomes_another_where_there_is_a_copy_and_learns_from_attention(made_source):
    hybrid = initialize_hybrid(load_model(made_source[0]), "*-GDN", seed=7)
    model = begun(hybrid, made_source, form="fused", pattern="*-GKA", mixers={"gka_config": {"num_iter": 3}})
    assert model.config.pattern == "*DA-GKA*" and model.config.options(GKAConfig).num_iter == 3
    assert np.array_equal(arrays(model)["layers.1.gka.b_proj.kernel"], arrays(hybrid)["layers.1.gdn.b_proj.kernel"])


def test_a_later_phase_has_the_pattern_of_the_one_before(made_source):
    config = progressive(*made_source)
    config.phases.last = dict(form="unfused", objective="next_token", steps=1, seq_len=32, trainable=(r"layers\.0\.gdn",))
    config.schedule = ("first", "second", "last")
    Experiment.from_config(config).check_source()
    config.phases.last.trainable = ("self_attn",)
    with pytest.raises(ValueError, match="phase 'last': the pattern 'self_attn' matches no parameter"):
        Experiment.from_config(config).check_source()


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(pattern="GDN-*"), "phase 'second': the model is *-GDN before it and cannot become GDN-*: layer 1 is 'GDN'"),
        (dict(pattern="GDN-GKB"), "phase 'second': hybrid pattern, layer 1: 'GKB' is not a known symbol"),
        (
            dict(pattern="GDN"),
            "phase 'second': the model is *-GDN before it and cannot become GDN: the hybrid pattern has 1 symbols",
        ),
        (dict(pattern="GDN*-GDN*"), "phase 'second': phase.pattern has 'GDN*', but phase.form says whether mixers stand beside"),
        (dict(pattern="GDN*-GDN*"), "write 'GDN-GDN'"),
        (dict(pattern="*-GDN"), "phase 'second': the pattern"),
        (dict(trainable=(r"\.gka\.",)), "phase 'second': the pattern"),
        (dict(trainable=(r"self_attn",)), "phase 'second': the pattern 'self_attn' matches only parameters of the teacher"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused_before_anything_is_written(made_source, tmp_path, changes, words):
    config = progressive(*made_source)
    config.phases.second.update(changes)
    with pytest.raises(ValueError) as e:
        run_experiment(config, tmp_path / "run")
    assert words in str(e.value) and not (tmp_path / "run").exists()


def test_a_pattern_that_is_no_text_and_one_after_a_selection_are_refused(made_source):
    config = progressive(*made_source)
    config.phases.second = {**config.phases.second.to_dict(), "pattern": ("GDN", "GDN")}
    with pytest.raises(ValueError, match="phase 'second': phase.pattern must be a string of one symbol per layer"):
        Experiment.from_config(config)
    selecting = progressive(*made_source, select=dict(mixer="GDN", fraction=0.5))
    selecting.pattern = ""
    with pytest.raises(ValueError, match="phase 'second' has a pattern, and config.select chooses the one before it only when"):
        Experiment.from_config(selecting)
