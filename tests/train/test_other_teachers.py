"""A teacher other than the source: a wider and deeper model of another family, in the step or through the cache."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import load_model, save_model
from hybrid_jax.commands.main import main
from hybrid_jax.config import MoEConfig
from hybrid_jax.convert import write_model
from hybrid_jax.data import read_corpus
from hybrid_jax.data.layout import training_batch
from hybrid_jax.data.pipeline import training_batches
from hybrid_jax.data.tokenizer import save_tokenizer, train_tokenizer
from hybrid_jax.experiment import run_experiment
from hybrid_jax.parallel.mesh import abstract_mesh, check_mesh_fits
from hybrid_jax.parameters import join_model, split_model
from hybrid_jax.plan.program import training_program
from hybrid_jax.priming.fuse import fuse
from hybrid_jax.priming.initialize import initialize_hybrid
from hybrid_jax.train import Phase, read_metrics
from hybrid_jax.train.cache import cache_teacher
from hybrid_jax.train.diagnose import first_bad
from hybrid_jax.train.objectives import make_objective
from hybrid_jax.train.phase_layout import TEACHER, PhaseLayout
from hybrid_jax.train.step import make_step
from hybrid_jax.train.teacher import BLOCK, BLOCKS, files_digest, teach_student_ids
from hybrid_jax.workdir import load_run
from tests.conftest import relative_error, tiny_config, tiny_model
from tests.train.conftest import LARGER, MIX, batch_of, experiment, phase


def distilled(**changes):
    return phase(**{**dict(objective="distill", teacher="larger", form="unfused"), **changes})


def larger(seed=1, **changes):
    return tiny_model("*-GDN-*-*", seed, **{**LARGER, **changes})


def laid_out(p, student=None, teacher=None):
    """A phase's layout, its state and what is frozen, of a student and a teacher, both by default as here."""
    student = tiny_model("*-SWA") if student is None else student
    teacher = teach_student_ids(larger(logits_scaling=2.0) if teacher is None else teacher, student.config)
    layout = PhaseLayout(student, p, teacher)
    state, frozen, _ = layout.begin(None, split_model(student)[1], split_model(teacher)[1])
    return layout, state, frozen


def textbook(student, teacher, batch, kind, temperature):
    """The mean divergence over the student's ids, of logits that exist in full."""
    at = (batch["input_ids"], batch["segment_ids"], batch["positions"])

    def logits(model):
        structure, parameters = split_model(model)
        return jax.jit(lambda p: join_model(structure, p)(*at))(parameters)

    log_p = jax.nn.log_softmax(logits(student) / temperature)
    log_q = jax.nn.log_softmax(logits(teacher)[..., : student.config.vocab_size] / temperature)
    log_p, log_q = (log_q, log_p) if kind == "reverse" else (log_p, log_q)
    kl = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
    return jnp.sum(kl * batch["weights"]) / jnp.sum(batch["weights"])


def in_float64(model):
    structure, parameters = split_model(model)
    model = join_model(structure, {n: jnp.asarray(x, jnp.float64) for n, x in parameters.items()})
    model.compute_dtype = jnp.dtype(jnp.float64)
    return model


@pytest.mark.parametrize("kind, temperature", [("forward", 1.0), ("reverse", 2.0)])
def test_loss_and_gradients_are_the_textbook_s_and_the_teacher_takes_none(kind, temperature):
    """The teacher has 64 rows of ids, the student 61: both distributions are over the student's."""
    layout, state, frozen = laid_out(distilled())
    objective, batch = make_objective("distill", dict(kind=kind, temperature=temperature)), batch_of()

    def loss(trainable, frozen):
        student, teacher = layout.models(trainable, frozen)
        return objective(student, batch, teacher).loss.value

    found, (gradients, of_frozen) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state.trainable, frozen)
    with jax.enable_x64(True):
        structure, parameters = split_model(in_float64(tiny_model("*-SWA")))
        teacher = in_float64(larger(logits_scaling=2.0))
        of_student = lambda p: temperature**2 * textbook(join_model(structure, p), teacher, batch, kind, temperature)  # noqa: E731
        want, wanted = jax.value_and_grad(of_student)(parameters)
        want = float(want)
    assert want > 0.1 and found == pytest.approx(want, rel=1e-5)
    assert set(gradients) == set(wanted)  # no two of the student's layers are alike, so none are stacked
    assert all(relative_error(gradients[n], wanted[n]) < 1e-4 for n in wanted)
    assert len(of_frozen) > 20 and all(n.startswith(TEACHER) and not np.any(x) for n, x in of_frozen.items())


def test_a_teacher_is_stacked_and_rounded_and_stays_what_it_was():
    p = distilled(frozen_dtype="bfloat16", accumulate=2, options=dict(next_token_weight=0.5))
    layout, state, frozen = laid_out(p)
    assert len(layout.source(state, frozen).layers) == 4
    stacked = frozen[TEACHER + "layers.2.mlp.up_proj.kernel"]  # of the last two layers, which are alike
    assert stacked.shape == (2, 32, 48) and stacked.dtype == jnp.bfloat16
    assert frozen[TEACHER + "norm.weight"].dtype == jnp.float32
    want = split_model(larger())[1]["layers.3.mlp.up_proj.kernel"]
    assert np.array_equal(stacked[1], want.astype(jnp.bfloat16))
    before, step, batch, losses = {n: np.asarray(x) for n, x in frozen.items()}, make_step(layout, p), batch_of(), []
    for _ in range(6):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["divergence"]))
    assert losses[-1] < 0.8 * losses[0]
    assert all(np.array_equal(x, before[n]) for n, x in frozen.items())
    assert set(layout.parameters(state, frozen)) == set(split_model(tiny_model("*-SWA"))[1])


def test_the_first_layer_that_went_bad_may_be_one_that_the_student_has_not():
    teacher = larger()
    for name in ("down_proj", "up_proj"):
        kernel = getattr(teacher.layers[3].mlp, name).kernel
        kernel[...] = kernel[...] * 1e38
    layout, state, frozen = laid_out(distilled(), teacher=teacher)
    student, source = tiny_model("*-SWA"), layout.source(state, frozen)
    want = "layer 3 (*) is the first whose output of the teacher is not finite: its mlp"
    assert first_bad(student, batch_of(), source) == want


def test_a_phase_with_a_teacher_has_an_objective_and_a_form_for_it():
    for changes, words in (
        (
            dict(objective="align_mixer", form="fused"),
            "'align_mixer' does not compare next-token distributions alone.*distill_cached",
        ),
        (dict(objective="align_matrices", form="fused"), "no other model than the source can teach it"),
        (dict(objective="next_token"), "leave phase.teacher out, or take one of distill, distill_cached"),
        (dict(form="fused"), "phase.form is 'fused'.*set 'unfused' or 'as_is'"),
        (dict(teacher=7), "phase.teacher must be the path of a model directory, got 7"),
    ):
        with pytest.raises(ValueError, match=words):
            distilled(**changes)
    source = tiny_model("*-*")
    with pytest.raises(ValueError, match=r"teaches a model that is not fused; this one is .*: set phase.form = 'unfused'"):
        laid_out(distilled(form="as_is"), student=fuse(initialize_hybrid(source, "*-SWA"), source))
    with pytest.raises(ValueError, match="a vocabulary of 64, the model of 61; give it the model's ids"):
        PhaseLayout(source, distilled(), tiny_model("*", vocab_size=64))
    with pytest.raises(ValueError, match="the teacher has a vocabulary of 60, the student one of 61"):
        teach_student_ids(tiny_model("*", vocab_size=60), source.config)
    with pytest.raises(ValueError, match=r"the teacher is a fused model \(\*DA-SWA\*\).*hybrid-jax export"):
        teach_student_ids(tiny_model("*DA-SWA*"), source.config)


def test_a_mesh_must_divide_the_teacher_too_and_experts_may_be_the_teacher_s():
    config, experts = tiny_config("*", vocab_size=64), tiny_config("*", family="qwen3_moe", vocab_size=64, moe=MoEConfig(4, 2, 8))
    mesh = abstract_mesh({"expert": 4})
    check_mesh_fits(config, mesh, 4, 16, experts)
    with pytest.raises(ValueError, match="'expert' needs a mixture-of-experts model"):
        check_mesh_fits(config, mesh, 4, 16, config)
    with pytest.raises(ValueError, match=r"divides hidden_size of the teacher in 4 shards, which do not divide 30"):
        check_mesh_fits(config, abstract_mesh({"fsdp": 4}), 4, 16, tiny_config("*", vocab_size=64, hidden_size=30))


def test_a_step_is_planned_with_the_teacher_s_config_and_no_weights():
    config, teacher = tiny_config("*-SWA"), tiny_config("*-GDN-*-*", **LARGER)
    program = training_program(config, distilled(), abstract_mesh({}), teacher)
    sizes = [x.size * 4 for n, x in split_model(larger(vocab_size=61))[1].items()]
    assert program.teacher == sum(sizes) and program.parameters > program.teacher
    with pytest.raises(ValueError, match="phase.teacher is 'larger'; a step is planned with its config"):
        training_program(config, distilled(), abstract_mesh({}))


def test_a_model_directory_is_known_by_its_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    content = bytearray(BLOCK * (BLOCKS + 2))
    found = set()
    for place in (None, 0, BLOCK * BLOCKS // 2, len(content) - 1):
        changed = bytearray(content)
        if place is not None:
            changed[place] = 1
        weights.write_bytes(changed)
        found.add(files_digest(tmp_path))
    (tmp_path / "config.json").write_text('{"rms_norm_eps": 1}')
    found.add(files_digest(tmp_path))
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert len(found) == 5 and files_digest(tmp_path / "copy") in found


def test_all_of_the_vocabulary_in_a_cache_is_the_teacher_in_the_step(corpus, tmp_path):
    """Of a teacher with more ids than the student."""
    size = corpus.tokenizer.get_vocab_size()
    student = tiny_model("*-SWA", vocab_size=size)
    teacher = teach_student_ids(larger(vocab_size=size + 5), student.config)
    p = Phase(objective="next_token", steps=1, batch_size=2, seq_len=32)
    cache_teacher(teacher, p, corpus, MIX, seed=0, out=tmp_path / "cache", k=size)
    rows = p.described_rows(MIX, 0)
    batch = next(training_batches(corpus, **rows, teacher_cache=str(tmp_path / "cache")))
    batch = training_batch(batch)
    cached, run = (
        nnx.jit(lambda *models, name=name: make_objective(name, {})(models[0], batch, *models[1:]).loss.value)(student, *teachers)
        for name, teachers in (("distill_cached", ()), ("distill", (teacher,)))
    )
    assert run > 0.1 and cached == pytest.approx(float(run), rel=1e-3)  # float16's


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A source, a larger teacher with more rows of ids, and a text; all of one tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    text = folder / "text.py"
    text.write_text("def f(x):\n    return x + 1\n" * 400)
    tokenizer = train_tokenizer([text.read_text()], 264)
    size = tokenizer.get_vocab_size()
    for name, model in (
        ("source", tiny_model("*-*", vocab_size=size)),
        ("teacher", larger(vocab_size=size + 5)),
    ):
        (folder / name).mkdir()
        write_model(model, folder / name)
        save_tokenizer(tokenizer, folder / name, 256)
    return folder / "source", folder / "teacher", str(text)


def config_of(models, **changes):
    """One phase, `kd`, of two steps."""
    source, teacher, text = models
    kd = dict(objective="distill", teacher=str(teacher), form="unfused", steps=2, batch_size=2, seq_len=32, log_every=1)
    kd |= {"checkpoint_every": 1, "keep_every": 1, **changes}
    config = experiment(source, schedule=("kd",), phases={"kd": kd})
    config.data.text = text
    return config


def test_a_run_learns_from_the_teacher_that_it_names_and_resumes_with_it_alone(models, tmp_path):
    source, teacher, _ = models
    config = config_of(models)
    run_experiment(config, tmp_path / "run")
    first = read_metrics(tmp_path / "run")[0]
    student = load_model(tmp_path / "run" / "stages" / "00_initial")
    corpus = read_corpus(config.data.to_dict(), source, 0)
    rows = phase(batch_size=2, seq_len=32).described_rows(MIX, 1)
    want = textbook(student, load_model(teacher), training_batch(next(training_batches(corpus, **rows))), "forward", 1.0)
    assert first["loss"] == pytest.approx(float(want), rel=1e-4)
    ended = split_model(load_model(tmp_path / "run" / "model"))[1]
    for gone in ("model", "stages/01_kd", "checkpoints/kd/2"):
        shutil.rmtree(tmp_path / "run" / gone)
    assert load_run(tmp_path / "run", "kd").config.pattern == "*-GKA"
    other = shutil.copytree(teacher, tmp_path / "teacher")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    kept = (teacher / "model.safetensors").read_bytes()
    try:
        save_model(larger(seed=2, vocab_size=load_model(teacher).config.vocab_size), other / "new")
        shutil.copy(other / "new" / "model.safetensors", teacher)
        with pytest.raises(ValueError, match="kd: up to its checkpoint of step 1 the phase had teacher = .*now it is"):
            run_experiment(config, tmp_path / "again")
    finally:
        (teacher / "model.safetensors").write_bytes(kept)
    run_experiment(config, tmp_path / "run")
    again = split_model(load_model(tmp_path / "run" / "model"))[1]
    assert all(np.array_equal(x, again[n]) for n, x in ended.items())


def test_what_no_teacher_can_teach_is_refused_before_any_work(models, tmp_path):
    source, teacher, text = models
    other = shutil.copytree(teacher, tmp_path / "other")
    save_tokenizer(train_tokenizer(["a quite different text"], 264), other, 256)
    short = shutil.copytree(source, tmp_path / "short")
    (tmp_path / "new").mkdir()
    write_model(tiny_model("*", vocab_size=load_model(source).config.vocab_size, max_position_embeddings=16), tmp_path / "new")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "new" / name, short)
    fused_before = config_of(models)
    fused_before.schedule = ("align", "kd")
    fused_before.phases.align = experiment(source).phases.align
    fused_before.phases.kd.form = "as_is"
    new = config_of(models)
    new.source, new.model = "", dict(model_type="qwen3")
    for config, words in (
        (
            config_of(models, teacher=str(other)),
            r"phase 'kd', teacher .*: \d+ tokens have other ids .*other than in .*source: '.*' is",
        ),
        (config_of(models, teacher=str(short)), "seq_len 32 is more than the teacher's max_position_embeddings, 16"),
        (fused_before, "phase 'kd' has a teacher, but its model is still fused"),
        (new, "phase 'kd' has a teacher, but config.model is a new model"),
    ):
        with pytest.raises(ValueError, match=words):
            run_experiment(config, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="phase 'kd', teacher nowhere: no model directory at nowhere"):
        run_experiment(config_of(models, teacher="nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


CONFIG = """
from ml_collections import ConfigDict

def get_config():
    kd = dict(objective="distill_cached", teacher="TEACHER", teacher_cache="CACHE", steps=2, batch_size=2, seq_len=32)
    return ConfigDict(dict(source="SOURCE", pattern="*-SWA", schedule=("kd",), phases=dict(kd=kd), seed=0,
                           data=dict(text="TEXT", mix=dict(text=1.0))))
"""


def test_a_cache_says_whose_answers_it_holds(models, tmp_path, capsys):
    source, teacher, text = models
    path, cache, third = tmp_path / "config.py", tmp_path / "cache", tmp_path / "third"
    words = CONFIG
    for name, value in {"TEACHER": teacher, "CACHE": cache, "SOURCE": source, "TEXT": text}.items():
        words = words.replace(name, str(value))
    path.write_text(words)
    make, train = (["cache-teacher", f"--config={path}", "--phase=kd", "--k=4"], ["prime", f"--config={path}"])
    assert main([*make, f"--teacher={source}"]) == 1
    assert "leave --teacher out" in capsys.readouterr().err and not cache.exists()
    assert main(make) == 0
    size = load_model(source).config.vocab_size
    assert max(int(np.load(file).max()) for file in cache.rglob("ids.npy")) < size
    structure, parameters = split_model(load_model(teacher))
    save_model(join_model(structure, {n: x + 0.01 for n, x in parameters.items()}), third, tokenizer_from=teacher)
    for command in ([*train, f"--workdir={tmp_path / 'run'}"], make):
        assert main([*command, f"--config.phases.kd.teacher={third}"]) == 1
        said = capsys.readouterr().err
        assert "was made with teacher" in said and "make another with hybrid-jax cache-teacher" in said
    assert not (tmp_path / "run").exists()
    assert main([*train, f"--workdir={tmp_path / 'run'}"]) == 0
    assert main([*train, f"--workdir={tmp_path / 'other'}", "--config.phases.kd.teacher="]) == 1
    assert "phase 'kd' has no teacher, but" in capsys.readouterr().err
    record = cache / "cache.json"
    record.write_text(json.dumps({n: x for n, x in json.loads(record.read_text()).items() if n != "teacher_files"}))
    assert main([*train, f"--workdir={tmp_path / 'other'}"]) == 1
    assert "does not say with which teacher_files it was made" in capsys.readouterr().err
