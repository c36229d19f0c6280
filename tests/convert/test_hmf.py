"""hybrid-model-factory's tiny hybrids: logits, losses, gradients, stage-1 losses; and our exports of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from hybrid_jax import load_model, save_model
from hybrid_jax.convert.names import hf_tensors
from hybrid_jax.data.layout import training_batch
from hybrid_jax.parameters import join_model, marks, split_model
from hybrid_jax.priming.fuse import fuse, unfuse
from hybrid_jax.train.objectives import ALIGN_TARGETS, align, next_token
from tests.conftest import GOLDEN, relative_error

HYBRIDS = sorted(p.name for p in (GOLDEN / "hmf").iterdir())
FUSED = sorted(p.name for p in (GOLDEN / "hmf_fused").iterdir())


def io(path):
    with np.load(path / "io.npz") as z:
        return {k: z[k] for k in z.files}


def batch_of(ids):
    ids = np.asarray(ids, np.int32)
    return training_batch({"input_ids": ids, "segment_ids": np.ones_like(ids), "loss_weights": np.ones(ids.shape, np.float32)})


def tensors(model, arrays):
    """Arrays by our names (parameters, or their gradients) as a checkpoint's tensors."""
    stated = marks(model)
    return {t.name: t.to_hf(np.asarray(x)) for n, x in arrays.items() for t in hf_tensors(n, stated[n].layout, model.config)}


@pytest.mark.parametrize("name", HYBRIDS)
def test_logits_equal(name):
    z = io(GOLDEN / "hmf" / name)
    got = nnx.jit(lambda m, x: m(x))(load_model(GOLDEN / "hmf" / name), jnp.asarray(z["input_ids"]))
    error = relative_error(got, z["logits"])
    print(f"PARITY hmf {name}: {error:.1e}")
    assert error < 1e-4


@pytest.mark.parametrize("name", ["qwen3_gka", "qwen3_gdn", "qwen3_swa"])
def test_loss_and_every_gradient_equal(name):
    z = io(GOLDEN / "hmf" / name)
    model = load_model(GOLDEN / "hmf" / name)
    structure, parameters = split_model(model)
    batch = batch_of(z["input_ids"])
    loss, grads = jax.jit(jax.value_and_grad(lambda p: next_token(join_model(structure, p), batch).loss.value))(parameters)
    assert abs(float(loss) - float(z["loss"])) < 1e-5
    got = tensors(model, grads)
    wanted = [k for k in z if k.startswith("grad/")]
    assert len(wanted) > 20
    for key in wanted:
        assert relative_error(got[key.removeprefix("grad/")], z[key]) < 2e-4, key


@pytest.mark.parametrize("name", FUSED)
def test_fused_models_give_both_streams_and_every_stage_1_loss(name):
    path = GOLDEN / "hmf_fused" / name
    z = io(path)
    model = load_model(path / "fused")
    batch = batch_of(z["input_ids"])
    streams = model.two_streams(batch["input_ids"])
    assert relative_error(model.head(streams.teacher), z["teacher_logits"]) < 1e-5
    assert relative_error(model.head(streams.student), z["student_logits"]) < 1e-4
    mixer, mlp, decoder = (z[f"mse_per_layer_{k}"] for k in ("mixer", "mlp", "decoder"))
    want = {
        "decoder": decoder.mean(),
        "mixer": mixer.mean(),
        "residuals": (mixer + mlp).mean(),
        "all": (mixer + mlp + decoder).mean(),
        "none": 0.0,
    }
    assert set(want) == set(ALIGN_TARGETS)
    for target, value in want.items():
        alone = align(model, batch, target=target, pre_lm_head=False).loss
        both, metrics, _ = align(model, batch, target=target)
        assert abs(float(alone) - value) <= 1e-4 * max(value, 1e-9), target
        assert abs(float(both) - value - z["pre_lm_head_mse"]) < 1e-4, target
    assert abs(float(metrics["pre_lm_head_mse"]) - z["pre_lm_head_mse"]) < 1e-4


@pytest.mark.parametrize("name", FUSED)
def test_the_teacher_stream_is_the_source_and_the_student_the_unfused_model(name):
    path = GOLDEN / "hmf_fused" / name
    z = io(path)
    ids = jnp.asarray(z["input_ids"])
    fused, source = load_model(path / "fused"), load_model(path / "source")
    assert relative_error(source(ids), z["source_logits"]) < 1e-5
    assert relative_error(fused.head(fused.two_streams(ids).teacher), source(ids)) < 1e-5
    student = unfuse(fused)
    assert not student.config.is_fused
    assert relative_error(student(ids), z["student_logits"]) < 1e-4
    again = fuse(student, source)
    assert again.config.pattern == fused.config.pattern
    assert relative_error(again.head(again.two_streams(ids).student), z["student_logits"]) < 1e-4


@pytest.mark.parametrize("name", FUSED)
def test_stage_0_takes_from_attention_what_the_reference_takes(name):
    path = GOLDEN / "hmf_fused" / name
    want, kind = load_file(path / "fused" / "model.safetensors"), name.split("_")[1]
    model = load_model(path / "source", pattern=f"*DA-{kind.upper()}*")
    _, parameters = split_model(model)
    got = tensors(model, parameters)
    assert got.keys() == want.keys()
    fresh = ("A_log", "dt_bias", "conv1d.weight", "a_proj", "gk_proj", "b_proj", "alpha_proj")
    for tensor, value in want.items():
        if not any(f in tensor for f in fresh):
            assert relative_error(got[tensor], value) < 1e-6, tensor


@pytest.mark.parametrize("name", FUSED)
def test_what_stage_0_draws_has_the_distribution_that_the_reference_draws_from(name):
    path, kind = GOLDEN / "hmf_fused" / name, name.split("_")[1]
    want = load_file(path / "fused" / "model.safetensors")
    model = load_model(path / "source", pattern=f"*DA-{kind.upper()}*")
    got = tensors(model, split_model(model)[1])
    drawn = [
        t for t in want if t.endswith(("conv1d.weight", "a_proj.weight", "gk_proj.weight", "b_proj.weight", "alpha_proj.weight"))
    ]
    assert len(drawn) == (6 if kind == "gka" else 5)
    for tensor in drawn:  # 256 numbers and more: the standard deviation of one draw is known to 5 %
        assert abs(np.std(got[tensor]) / np.std(want[tensor]) - 1) < 0.2, tensor
        assert abs(np.std(got[tensor]) / model.config.initializer_range - 1) < 0.15, tensor
        assert abs(np.mean(got[tensor])) < 0.2 * model.config.initializer_range, tensor
        assert np.abs(got[tensor]).max() > 2.2 * np.std(got[tensor]), tensor  # normal; a uniform one ends at 1.73
    biases = [t for t in want if t.endswith("proj.bias") and f".{kind}." in t]
    assert len(biases) == (2 if kind == "gka" else 0)
    for tensor in biases:
        assert not want[tensor].any() and not got[tensor].any(), tensor
    for tensor in (t for t in want if t.endswith(("A_log", "dt_bias"))):
        a, b = (np.exp(x[tensor]) if "A_log" in tensor else np.log1p(np.exp(x[tensor])) for x in (got, want))
        low, high = (0, 16) if "A_log" in tensor else (1e-4, 0.1)
        for x in (a, b):
            assert (x > low * 0.999).all() and (x < high * 1.001).all(), tensor


@pytest.mark.parametrize("path", [f"hmf/{n}" for n in HYBRIDS] + [f"hmf_fused/{n}/fused" for n in FUSED])
def test_our_export_has_their_layout_and_comes_back_bit_identical(path, tmp_path):
    model = load_model(GOLDEN / path)
    save_model(model, tmp_path / "ours")
    theirs, ours = (load_file(p / "model.safetensors") for p in (GOLDEN / path, tmp_path / "ours"))
    assert theirs.keys() == ours.keys()
    for name in theirs:
        assert theirs[name].dtype == ours[name].dtype and np.array_equal(theirs[name], ours[name]), name
    want, got = (json.loads((p / "config.json").read_text()) for p in (GOLDEN / path, tmp_path / "ours"))
    for key in ("model_type", "architectures", "hybrid_override_pattern", "layer_types", "head_dim", "rope_parameters"):
        assert got[key] == want[key], key
    again = load_model(tmp_path / "ours")
    assert again.config == model.config
    for (name, a), b in zip(split_model(model)[1].items(), split_model(again)[1].values(), strict=True):
        assert np.array_equal(a, b), name
