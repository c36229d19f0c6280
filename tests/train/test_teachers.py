"""The teacher is the source, whatever trains, whatever the student became before, whatever the phase changes of the student."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_jax import load_model, save_model
from hybrid_jax.config import GDNConfig, GKAConfig, RopeConfig, SWAConfig
from hybrid_jax.convert import write_model
from hybrid_jax.data import read_corpus, training_batches
from hybrid_jax.data.layout import training_batch
from hybrid_jax.data.tokenizer import save_tokenizer, train_tokenizer
from hybrid_jax.experiment import run_experiment
from hybrid_jax.parameters import join_model, split_model
from hybrid_jax.plan.plan_report import plan_rows
from hybrid_jax.plan.planner import make_plan
from hybrid_jax.plan.program import Job
from hybrid_jax.priming.fuse import check_teacher, fuse, share
from hybrid_jax.priming.initialize import initialize_hybrid
from hybrid_jax.train import read_metrics
from hybrid_jax.train.loop import apply_phase_settings
from hybrid_jax.train.objective import INPUTS, Mean, Objective, Outcome
from hybrid_jax.train.objectives import OBJECTIVES, make_objective
from hybrid_jax.train.phase_layout import TEACHER, PhaseLayout
from tests.conftest import relative_error, tiny_config, tiny_model
from tests.train.conftest import arrays, experiment, phase

IDS = np.random.default_rng(0).integers(0, 61, (2, 12)).astype(np.int32)


def moved(model, names=("",), by=0.1):
    """The model with parameters whose names contain one of `names` elsewhere."""
    structure, parameters = split_model(model)
    return join_model(structure, {n: p + by if any(part in n for part in names) else p for n, p in parameters.items()})


def logits_of_the_teacher(layout, state, frozen):
    model, teacher = layout.models(state.trainable, frozen)
    teacher = teacher or model
    return teacher.head(teacher.hidden_states(IDS, stream="teacher")[0])


@pytest.fixture
def registered():
    """An objective of somebody else's: another name, other options."""

    def loss(model, batch, teacher=None, *, kind="symmetric", target=1.0):
        streams = model.two_streams(batch["input_ids"], teacher=teacher)
        return Outcome(Mean(target * jnp.mean(jnp.abs(streams.student - streams.teacher)), jnp.float32(1)))

    OBJECTIVES["mine"] = Objective(loss, reads=INPUTS, two_streams=True)
    yield "mine"
    del OBJECTIVES["mine"]


@pytest.mark.parametrize("objective", ["align_all", "align_none", "distill", "mine"])
def test_a_teacher_does_not_move_when_what_it_shares_trains(registered, objective):
    source = tiny_model("*-*")
    model = fuse(initialize_hybrid(source, "*-SWA"), source)
    layout = PhaseLayout(model, phase(objective=objective, form="fused"))
    state, frozen, _ = layout.begin(None, split_model(model)[1])
    state = state._replace(trainable=jax.tree.map(lambda x: x + 0.1, state.trainable))
    assert relative_error(logits_of_the_teacher(layout, state, frozen), source(IDS)) < 1e-6
    assert "layers.0.self_attn.q_proj.kernel" in state.trainable
    assert not any(n.startswith("layers.1.self_attn") for n in state.trainable), "the teacher's own attention never trains"


def test_the_options_of_an_objective_are_its_own(registered):
    assert make_objective(registered, {"kind": "symmetric", "target": 2.0}).keywords == {"kind": "symmetric", "target": 2.0}
    with pytest.raises(ValueError, match="'align_all' has no option 'target'; it has pre_lm_head"):
        make_objective("align_all", {"target": "mixer"})
    with pytest.raises(ValueError, match="form = 'fused'"):
        phase(objective=registered)


@pytest.mark.parametrize("trainable", [("all",), (r"\.swa\.",)])
def test_a_model_fused_again_learns_from_the_source(trainable):
    """After post-training of everything in one layer, whose MLPs and norms are stacked with another's; and of the embeddings."""
    source = tiny_model("*-*-*-*")
    hybrid = moved(initialize_hybrid(source, "*-SWA-*-SWA"), ("layers.3.", "embed_tokens", "layers.2.self_attn", "lm_head"))
    model, p = fuse(hybrid, source), phase(objective="align_all", form="fused", trainable=trainable)
    layout = PhaseLayout(apply_phase_settings(model, p), p, teacher := share(source, model))
    state, frozen, _ = layout.begin(None, split_model(model)[1], split_model(teacher)[1])
    assert relative_error(logits_of_the_teacher(layout, state, frozen), source(IDS)) < 1e-6
    student, _ = layout.models(state.trainable, frozen)
    assert relative_error(student(IDS), hybrid(IDS)) < 1e-6 and relative_error(hybrid(IDS), source(IDS)) > 0.1
    copies = {n.removeprefix(TEACHER) for n in frozen if n.startswith(TEACHER)}
    if trainable != ("all",):
        assert "layers.1.mlp.up_proj.kernel" in copies and "norm.weight" not in copies
        assert not any("layers.0.mlp" in n or ".swa." in n for n in copies)


def test_two_streams_with_a_teacher_of_its_own_are_two_models():
    """Of which no parameter is equal: embeddings, norms and MLPs are each one's own."""
    source = tiny_model("*-*")
    hybrid = moved(initialize_hybrid(source, "*-SWA"), by=0.05)
    streams = fuse(hybrid, source).two_streams(IDS, teacher=source)
    taught, learned = source.hidden_states(IDS)[0], hybrid.hidden_states(IDS)[0]
    assert relative_error(streams.teacher, taught) < 1e-6 and relative_error(streams.student, learned) < 1e-6
    assert relative_error(learned, taught) > 0.1


def test_a_phase_s_rope_and_context_are_the_student_s_alone():
    yarn = RopeConfig(theta=1e4, kind="yarn", options=(("factor", None), ("original_max_position_embeddings", 64)))
    source = tiny_model("*-*", rope=yarn)
    model = fuse(initialize_hybrid(source, "*-SWA"), source)
    p = phase(objective="distill", form="fused", trainable=(r"\.swa\.",), rope_theta=1e6, max_position_embeddings=512)
    layout = PhaseLayout(apply_phase_settings(model, p), p, source := share(source, model))
    state, frozen, _ = layout.begin(None, split_model(model)[1], split_model(source)[1])
    assert relative_error(logits_of_the_teacher(layout, state, frozen), source(IDS)) < 1e-6
    student, teacher = layout.models(state.trainable, frozen)
    assert student.config.rope.theta == 1e6 and student.config.max_position_embeddings == 512
    assert teacher.config.rope.theta == 1e4 and teacher.config.max_position_embeddings == 256
    assert relative_error(student(IDS), initialize_hybrid(source, "*-SWA")(IDS)) > 1e-3
    assert not any(n.startswith(TEACHER) for n in frozen), "no parameter differs"


def test_what_is_equal_and_frozen_is_shared_also_after_rounding():
    source = tiny_model("*-*", swa=SWAConfig(5))
    model = fuse(initialize_hybrid(source, "*-SWA"), source)
    p = phase(objective="align_none", form="fused", trainable=(r"\.swa\.",), frozen_dtype="bfloat16")
    structure, parameters = split_model(model)
    rounded = {n: x if x.ndim == 1 else x.astype(jnp.bfloat16).astype(jnp.float32) for n, x in parameters.items()}
    for before in (model, join_model(structure, rounded)):  # as a phase with this frozen_dtype saves it
        other = source.config.with_options(SWAConfig(9))  # an option of a mixer that the source does not have
        teacher = share(join_model(*split_model(source)), before, p.frozen_dtype)
        teacher.config = other
        layout = PhaseLayout(apply_phase_settings(before, p), p, teacher)
        state, frozen, _ = layout.begin(None, split_model(before)[1], split_model(teacher)[1])
        assert not layout.copied and layout.models(state.trainable, frozen)[1] is None
    other = moved(model, ("layers.0.mlp",))
    copied = PhaseLayout(other, p, share(source, other, "bfloat16")).copied
    assert copied == {f"layers.0.mlp.{n}_proj.kernel" for n in ("up", "gate", "down")}


def test_a_pattern_that_finds_only_the_teacher_s_is_refused():
    model = tiny_model("*DA-SWA*")
    with pytest.raises(ValueError, match=r"'layers.1.self_attn' matches only parameters of the teacher, which never trains"):
        PhaseLayout(model, phase(objective="distill", form="fused", trainable=("layers.1.self_attn",)))


def test_the_plan_says_what_the_teacher_s_copies_cost():
    """Everything trains: the teacher keeps what both streams read, its matrices in the plan's frozen bfloat16."""
    config = tiny_config("*-SWA", hidden_size=32, num_heads=4, vocab_size=64)
    found = make_plan(Job(config, "align", 64, 1, trainable=("all",)), "h100:1", {"data": 1})
    both = split_model(tiny_model("*", hidden_size=32, num_heads=4, vocab_size=64))[1]
    second = {
        n: x for n, x in both.items() if n.startswith("layers.0") and "self_attn" not in n
    }  # the second layer's attention is frozen
    want = sum(x.size * (2 if x.ndim > 1 else 4) for x in (*both.values(), *second.values()))
    assert found.teacher == want and found.parameters > want
    assert "of which the teacher's own copies" in " ".join(row[0] for row in plan_rows(found, 1e9, 0.5))
    frozen = make_plan(Job(config, "align", 64, 1), "h100:1", {"data": 1})
    assert frozen.teacher == 0 and "teacher" not in " ".join(row[0] for row in plan_rows(frozen, 1e9, 0.5))


@pytest.fixture(scope="module")
def source_and_text(tmp_path_factory):
    """A source of two layers with a tokenizer, untrained; (its directory, a text)."""
    folder = tmp_path_factory.mktemp("source")
    text = folder / "text.py"
    text.write_text("def f(x):\n    return x + 1\n" * 400)
    (folder / "model").mkdir()
    tokenizer = train_tokenizer([text.read_text()], 264)
    write_model(tiny_model("*-*", vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=256), folder / "model")
    save_tokenizer(tokenizer, folder / "model", 256)
    return folder / "model", str(text)


@pytest.fixture(scope="module")
def run(source_and_text, tmp_path_factory):
    """A run that trains all of the hybrid and fuses it again, for another RoPE; (its directory, its source, its config)."""
    source, text = source_and_text
    config = experiment(source, schedule=("train", "align"))
    config.data.text = text
    config.phases.train.learning_rate = 0.05
    changes = dict(objective="align_decoder", trainable=("all",), rope_theta=1e6, checkpoint_every=1, keep_every=1)
    config.phases.align.update(changes)
    workdir = tmp_path_factory.mktemp("teachers") / "run"
    run_experiment(config, workdir)
    return workdir, source, config


def test_a_run_aligns_with_its_source_after_post_training(run):
    """The first step's loss, from the source and the hybrid that the phase began with, each a model of one stream."""
    workdir, source, config = run
    teacher, student = load_model(source), load_model(workdir / "stages" / "01_train")
    student = apply_phase_settings(student, phase(rope_theta=1e6))
    corpus = read_corpus(config.data.to_dict(), source, 0)
    batch = training_batch(next(training_batches(corpus, {"text": 1.0}, batch_size=2, length=32, seed=2, answer_weight=1.0)))
    final = nnx.jit(lambda model, batch: model.hidden_states(batch["input_ids"], batch["segment_ids"])[0])
    a, b = (final(m, batch) for m in (teacher, student))
    first = next(r for r in read_metrics(workdir) if r["phase"] == "align" and r["step"] == 1)
    want = np.mean(np.square(np.asarray(a, np.float64) - np.asarray(b)))
    assert first["pre_lm_head_mse"] == pytest.approx(want, rel=1e-4)
    assert relative_error(a, b) > 0.1


def test_a_resumed_phase_has_the_same_teacher(run, tmp_path):
    workdir, _, config = run
    whole = arrays(load_model(workdir / "stages" / "02_align"))
    shutil.copytree(workdir, tmp_path / "run")
    for gone in ("model", "stages/02_align", "checkpoints/align/2"):
        shutil.rmtree(tmp_path / "run" / gone)
    run_experiment(config, tmp_path / "run")
    again = arrays(load_model(tmp_path / "run" / "stages" / "02_align"))
    assert all(np.array_equal(whole[n], again[n]) for n in whole)


def test_a_phase_is_not_resumed_with_another_text_or_another_teacher(run, tmp_path):
    """The same paths hold other text, then other weights, than when the phase began."""
    workdir, source, config = run
    shutil.copytree(workdir, tmp_path / "run")
    for gone in ("model", "stages/02_align", "checkpoints/align/2"):
        shutil.rmtree(tmp_path / "run" / gone)
    text = pathlib.Path(config.data.text)
    weights = source / "model.safetensors"
    kept = {path: path.read_bytes() for path in (text, weights)}
    (tmp_path / "other").mkdir()
    try:
        text.write_text(text.read_text().replace("x + 1", "x + 2"))
        with pytest.raises(ValueError, match="align: up to its checkpoint of step 1 the phase had text.tokens = .*now it is"):
            run_experiment(config, tmp_path / "run")
        text.write_bytes(kept[text])
        write_model(moved(load_model(source), ("norm.weight",), 0.01), tmp_path / "other")
        weights.write_bytes((tmp_path / "other" / weights.name).read_bytes())
        with pytest.raises(ValueError, match="align: up to its checkpoint of step 1 the phase had teacher = .*now it is"):
            run_experiment(config, tmp_path / "run")
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    assert not (tmp_path / "run" / "stages" / "02_align").exists()


def test_a_source_that_cannot_teach_a_fused_phase_is_refused_at_once(source_and_text, tmp_path):
    source, text = source_and_text
    config = experiment(tmp_path / "hybrid", pattern="")
    config.data.text = text
    save_model(initialize_hybrid(load_model(source), "*-GKA"), tmp_path / "hybrid", tokenizer_from=source)
    with pytest.raises(
        ValueError, match="phase 'align': layer 1 of the fused model is 'GKA.*': it learns from '.*', the source has 'GKA'"
    ):
        run_experiment(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config.pattern = "GKA-GDN"
    with pytest.raises(ValueError, match="layer 1 is 'GKA': only attention can become 'GDN'"):
        run_experiment(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_fused_source_teaches_by_its_teacher_stream():
    source = tiny_model("*-*")
    fused = moved(fuse(initialize_hybrid(source, "*-SWA"), source), (".swa.",))
    check_teacher(fused.config, fused.config)
    layout = PhaseLayout(fused, p := phase(objective="distill", form="fused"), fused)
    state, frozen, _ = layout.begin(None, split_model(fused)[1])
    assert relative_error(logits_of_the_teacher(layout, state, frozen), source(IDS)) < 1e-6
    with pytest.raises(ValueError, match="the teacher's vocab_size is 64, the model's is 61"):
        PhaseLayout(fused, p, tiny_model("*-*", vocab_size=64))
    with pytest.raises(ValueError, match="must have the model's 2 layers, it has 1"):
        PhaseLayout(fused, p, tiny_model("*"))


def test_alignment_does_not_see_padding():
    """The loss is the sum of means over the real tokens' elements, whatever the padding holds."""
    source = tiny_model("*-*")
    model, loss = fuse(moved(initialize_hybrid(source, "*-SWA"), (".swa.",)), source), OBJECTIVES["align_all"]
    ids = np.random.default_rng(0).integers(1, 61, (2, 16)).astype(np.int32)
    real = np.arange(16) < np.array([[10], [16]])
    rows = {"input_ids": ids, "segment_ids": real.astype(np.int32), "loss_weights": real.astype(np.float32)}
    found, *_ = loss(model, training_batch(rows))
    other, *_ = loss(model, training_batch({**rows, "input_ids": np.where(real, ids, 7)}))
    streams = model.two_streams(ids, real.astype(np.int32))

    def error(a, b):
        return np.square(np.asarray(a, np.float64) - np.asarray(b))[real].mean()

    layers = sum(error(a, b) for teacher, student in streams.layers for a, b in zip(teacher, student, strict=True))
    assert relative_error(found.value, layers / 2 + error(streams.teacher, streams.student)) < 1e-5
    assert float(found) == float(other) and found.weight == 26
    empty, *_ = loss(model, training_batch({**rows, "segment_ids": np.zeros_like(ids)}))
    assert float(empty) == 0 and empty.weight == 0


def test_a_gated_kalmanet_is_aligned_with_the_gated_deltanet_of_a_hybrid_source_that_it_began_from(source_and_text, tmp_path):
    source, text = source_and_text
    hybrid = initialize_hybrid(load_model(source), "*-GDN")
    save_model(hybrid, tmp_path / "hybrid", tokenizer_from=source)
    config = experiment(tmp_path / "hybrid", mixers={"gka_config": {"num_iter": 3}})
    config.data.text = text
    out = load_model(run_experiment(config, tmp_path / "run"))
    assert load_model(tmp_path / "run" / "stages" / "01_align").config.pattern == "*DA-GDN>GKA"
    assert out.config.pattern == "*-GKA" and out.config.options(GKAConfig).norm_eps == GDNConfig().norm_eps
    assert [r["mixer_mse/01"] > 0 for r in read_metrics(tmp_path / "run") if "mixer_mse/01" in r] == [True, True]
