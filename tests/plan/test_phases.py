"""Plans of the phases of an experiment: the step is the phase's own, and what the phase says is not said twice."""

import json
import subprocess
import sys

import jax
import pytest

from hybrid_jax.commands.main import main
from hybrid_jax.data.teacher_cache import DEFAULT_K, TeacherCache
from hybrid_jax.experiment_config import Experiment
from hybrid_jax.families import config_to_hf
from hybrid_jax.fields import load_experiment_config
from hybrid_jax.parallel.mesh import abstract_mesh, make_mesh
from hybrid_jax.parameters import abstract_marks, abstract_parameters, join_model, split_model
from hybrid_jax.plan.formula import flops_by_formula, traffic
from hybrid_jax.plan.planner import make_plan, meshes
from hybrid_jax.plan.program import Job, make_program, program_flops, training_program
from hybrid_jax.priming.fuse import fuse, share
from hybrid_jax.priming.initialize import initialize_hybrid
from hybrid_jax.train import Phase
from hybrid_jax.train.phase_layout import PhaseLayout
from tests.conftest import tiny_config, tiny_model

SMALL = ("batch_size=4", "seq_len=128", "accumulate=2", "steps=8", "decay_steps=1")
PROGRAM = "import sys; from hybrid_jax.commands.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def arguments(tmp_path):
    """A recipe with a small source and rows; its data are nowhere."""
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(tiny_config("*-*", vocab_size=64, hidden_size=32))))
    rows = [f"--config.phases.{phase}.{value}" for phase in ("matrices", "layers", "distill") for value in SMALL]
    return ["--config=configs/mohawk.py:Llamba-1B", f"--config.source={tmp_path}", "--config.pattern=*-DM2", *rows]


def job_of(arguments, name):
    experiment = Experiment.from_config(load_experiment_config(arguments), with_data=False)
    phase, source = dict(experiment.phases)[name], tiny_config("*-*", vocab_size=64, hidden_size=32)
    return Job.of_phase(experiment.models(source)[name], phase, source), phase, source


@pytest.mark.parametrize("name", ["matrices", "layers", "distill"])
def test_the_step_of_a_phase_is_the_one_that_the_loop_runs(arguments, name):
    job, phase, source = job_of(arguments, name)
    assert job.phase == phase and job.model_config == source.with_pattern("*-DM2").fused(source)
    assert job.tokens == 4 * 128 and job.rows_at_a_time == 2
    mesh = abstract_mesh({"fsdp": 2})
    planned, run = make_program(job, mesh), training_program(job.model_config, phase, mesh)
    assert (planned.parameters, planned.optimizer, planned.teacher) == (run.parameters, run.optimizer, run.teacher)
    assert (planned.teacher > 0) == (name != "matrices")  # its own copies of MLPs and norms, which train after the matrices


def test_a_mesh_is_chosen_that_divides_the_rows_of_a_microbatch(arguments):
    job, _, _ = job_of(arguments, "layers")
    assert {"fsdp": 4} not in list(meshes(job, 4)) and {"fsdp": 2, "seq": 2} in list(meshes(job, 4))


def test_the_command_compiles_a_phase_without_data_or_weights(arguments, tmp_path):
    pytest.importorskip("libtpu")
    found = tmp_path / "plan.json"
    command = ["plan", *arguments, "--phase", "matrices", "--topology", "v5e:2x2", "--mesh", "fsdp=2,seq=2", "--json", str(found)]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(found.read_text())
    assert (answer["fits"], answer["objective"], answer["pattern"]) == (True, "align_matrices", "*-DM2")
    assert "align_matrices, qwen3, 2 layers, 1 DM2, 1 *" in done.stdout


@pytest.mark.parametrize(
    "more, words",
    [
        (("--phase", "polish"), "--phase 'polish': the config's schedule has matrices, layers, distill"),
        (("--phase", "layers", "--seq-len", "64"), "--seq-len cannot stand beside --config, whose phase says it"),
        (("--phase", "layers", "--source", "Qwen/Qwen3-8B"), "give either --source, a model, or --config and --phase"),
        (("--phase", "layers", "--config.source=nowhere"), "config.source 'nowhere' is no directory and no name known here"),
    ],
)
def test_what_the_phase_says_is_not_said_twice(arguments, capsys, more, words):
    assert main(["plan", *arguments, *more, "--topology", "v5e:2x2"]) == 1
    assert words in capsys.readouterr().err


def test_a_phase_without_a_config_is_refused(capsys):
    assert main(["plan", "--source", "Qwen/Qwen3-8B", "--phase", "layers", "--topology", "v5e:2x2"]) == 1
    assert "--phase needs --config" in capsys.readouterr().err


def test_no_formula_describes_the_stages_of_mohawk_on_gpus(arguments):
    job, _, _ = job_of(arguments, "layers")
    with pytest.raises(
        ValueError, match="'align_decoder' cannot be planned for h100:2: .* next_token, align_none; plan it for a TPU"
    ):
        make_plan(job, "h100:2", {"fsdp": 2})


def test_a_plan_counts_the_teacher_s_copies_of_what_phases_before_have_trained():
    source, rows = tiny_config("*-*"), dict(steps=2, batch_size=2, seq_len=32)
    trained = (r"\.mlp\.", r"layers\.0\.self_attn\.")  # of layer 0 the second phase takes the source's attention
    first = Phase(objective="next_token", form="unfused", trainable=trained, **rows)
    second = Phase(objective="distill", form="fused", pattern="GDN-GDN", trainable=(r"\.gdn\.",), **rows)
    experiment = Experiment(source="there", pattern="*-GDN", phases=(("first", first), ("second", second)))
    models = experiment.models(source)
    job = Job.of_phase(models["second"], second, source, changed=experiment.trained_before("second", models))
    before = tiny_model("*-*")
    model = initialize_hybrid(before, "GDN-GDN")
    for name, x in (parameters := split_model(model)[1]).items():
        parameters[name] = x + 1 if ".mlp." in name else x
    model = fuse(join_model(split_model(model)[0], parameters), before)
    copied = PhaseLayout(model, second, share(before, model)).copied  # as the loop finds it
    assert copied == {name for name in parameters if ".mlp." in name}
    assert make_program(job, abstract_mesh({})).teacher == sum(4 * parameters[name].size for name in copied)
    assert experiment.trained_before("first", models) == frozenset()


@pytest.mark.parametrize("dtype, again, own", [("float32", "", True), ("bfloat16", "", False), ("float32", "bfloat16", False)])
def test_a_plan_counts_the_teacher_s_copies_of_what_phases_before_have_rounded(arguments, tmp_path, dtype, again, own):
    source = tiny_config("*-*", vocab_size=64, hidden_size=32)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(source) | {"dtype": dtype}))
    options = ("options.inputs=student", "options.error=mse", "options.pre_lm_head=True")
    align = ("objective=align_none", *options, "trainable=('discrete_mamba2',)", f"frozen_dtype={again}")
    command = ["plan", *arguments, *(f"--config.phases.layers.{x}" for x in align), "--phase", "layers", "--topology", "h100:1"]
    assert main([*command, "--json", str(tmp_path / "plan.json")]) == 0
    model = source.with_pattern("*-DM2").fused()
    marks, shapes = abstract_marks(model), abstract_parameters(model)
    frozen = {n: 4 * x.size for n, x in shapes.items() if marks[n].frozen and ".discrete_mamba2." not in n}
    assert json.loads((tmp_path / "plan.json").read_text())["teacher"] == (sum(frozen.values()) if own else 0)


@pytest.mark.parametrize("schedule", [dict(warmup_steps=500), dict(schedule="wsd", decay_steps=200, warmup_fraction=0.1)])
def test_a_phase_in_epochs_is_planned_whatever_its_schedule_is(schedule):
    source = tiny_config("*-SWA")
    phase = Phase(objective="dpo", epochs=1, mix={"pairs": 1.0}, batch_size=2, seq_len=32, **schedule)
    assert make_program(Job.of_phase(source, phase, source), abstract_mesh({})).teacher > 0


@pytest.mark.parametrize("k", [64, 3])
def test_a_step_of_cached_answers_is_planned_before_they_are_made_and_with_as_many_as_there_are(k, tmp_path):
    source, cache = tiny_config("*-SWA"), tmp_path / "cache"
    if k != DEFAULT_K:
        TeacherCache(cache, k, mix={"text": 1.0})
    phase = Phase(objective="distill_cached", teacher_cache=str(cache), steps=1, batch_size=2, seq_len=32)
    program = make_program(Job.of_phase(source, phase, source), make_mesh({"data": 1}, jax.devices()[:1]))
    assert program.arguments[2]["teacher_ids"].shape == (2, 32, k)
    assert program_flops(program)[0] > 0


def test_a_formula_of_a_fused_model_s_next_token_has_no_teacher_s_stream():
    source, rows = tiny_config("*-*"), dict(objective="next_token", steps=1, batch_size=4, seq_len=32)
    hybrid, sizes = source.with_pattern("*-GDN"), {"fsdp": 2, "tensor": 2}
    fused, unfused = (Job.of_phase(model, Phase(**rows), source) for model in (hybrid.fused(source), hybrid))
    assert flops_by_formula(fused) == flops_by_formula(unfused)
    assert traffic(fused, sizes).sent == traffic(unfused, sizes).sent


def test_microbatches_send_their_gradients_each_by_itself():
    source, sizes = tiny_config("*-SWA"), {"data": 2, "fsdp": 2}
    one, four = (
        traffic(
            Job.of_phase(source, Phase(objective="next_token", steps=1, batch_size=16, seq_len=32, accumulate=n), source), sizes
        ).by_kind()
        for n in (1, 4)
    )
    of_gradients = {"all-reduce of gradients", "reduce-scatter of gradients"}
    assert of_gradients < {*one} and four == {kind: n * (4 if kind in of_gradients else 1) for kind, n in one.items()}
