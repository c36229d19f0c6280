"""Weights in fewer bits: integers in groups as MLX stores them, FP8 in blocks as transformers reads it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hybrid_jax import load_model, save_model
from hybrid_jax.commands.main import main
from hybrid_jax.convert import Groups, check_model_directory
from hybrid_jax.convert.quantized import Blocks, read_quantization
from hybrid_jax.convert.weights import SINGLE
from hybrid_jax.parameters import split_model
from tests.conftest import relative_error, tiny_model

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mlx_reads_what_we_quantize_and_we_read_what_mlx_quantizes(bits, dtype):
    mx = pytest.importorskip("mlx.core")
    form, weight = Groups(bits, 32), RNG.standard_normal((5, 96)).astype(jnp.dtype(dtype))
    ours = form.quantize(weight)
    parts = [mx.array(ours["weight"]), *(mx.array(ours[x].astype(np.float32)) for x in ("scales", "biases"))]
    theirs = np.array(mx.dequantize(*parts, group_size=32, bits=bits))
    again = form.dequantize(ours["weight"], ours["scales"], ours["biases"])
    assert again.dtype == weight.dtype and relative_error(again, theirs) < (1e-6 if dtype == "float32" else 8e-3)
    back = mx.quantize(mx.array(weight.astype(np.float32)), group_size=32, bits=bits)
    found = form.dequantize(*map(np.array, back))
    assert relative_error(found, np.array(mx.dequantize(*back, group_size=32, bits=bits))) < 1e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_no_value_is_further_from_its_integer_than_half_a_step(bits):
    weight = RNG.standard_normal((7, 64)).astype(np.float32)
    weight[3, :32] = 0.25  # a group of one value
    form = Groups(bits, 32)
    parts = form.quantize(weight)
    error = np.abs(form.dequantize(**parts) - weight).reshape(7, 2, 32).max(-1)
    assert (error <= parts["scales"] * 0.501 + 1e-7).all() and error[3, 0] < 1e-7
    assert parts["weight"].shape == (7, 64 * bits // 32) and parts["weight"].dtype == np.uint32


def test_an_export_in_integers_is_generated_with_and_says_what_it_costs(tmp_path, capsys):
    source = tiny_model("*-GKA", hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=64)
    save_model(source, tmp_path / "source")
    for name in ("int8", "int4"):
        arguments = ["export", str(tmp_path / "source"), str(tmp_path / name), "--quantize", name, "--group-size", "32"]
        assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "weights quantized: " in said and "relative error" in said
    ids = jnp.arange(12)[None]
    errors = [relative_error(load_model(tmp_path / name)(ids), source(ids)) for name in ("int8", "int4")]
    assert errors[0] < 0.05 < 0.1 < errors[1] < 1.5
    tensors = load_file(tmp_path / "int4" / SINGLE)
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == np.uint32 and "model.embed_tokens.scales" in tensors
    assert tensors["model.layers.1.gka.alpha_proj.weight"].dtype == np.float32  # one number per head stays as it is
    assert json.loads((tmp_path / "int4/config.json").read_text())["quantization"] == {"group_size": 32, "bits": 4}
    # what is read is dense: an export of it has no quantization, and holds the same values
    again = load_model(tmp_path / "int4")
    save_model(again, tmp_path / "dense")
    assert "quantization" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert all(np.array_equal(x, split_model(again)[1][n]) for n, x in split_model(load_model(tmp_path / "dense"))[1].items())


def test_a_model_without_inputs_of_whole_groups_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no weight has inputs that are a multiple of 64; choose smaller groups"):
        save_model(tiny_model("*"), tmp_path / "out", quantization=Groups(4))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def fp8(tmp_path):
    """A model, its directory with the MLP's and the attention's weights in FP8, in blocks of 16 x 16 that do not divide them, and
    its tensors."""
    model = tiny_model("*-*")
    save_model(model, tmp_path / "fp8")
    tensors = load_file(tmp_path / "fp8" / SINGLE)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name]
        scales = np.ones((-(-weight.shape[0] // 16), -(-weight.shape[1] // 16)), np.float32)
        for i, j in np.ndindex(*scales.shape):
            scales[i, j] = np.abs(weight[16 * i : 16 * i + 16, 16 * j : 16 * j + 16]).max() / 448
        spread = np.repeat(np.repeat(scales, 16, 0), 16, 1)[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight / spread).astype(jnp.float8_e4m3fn)
        tensors[name.replace(".weight", ".weight_scale_inv")] = scales
    save_file(tensors, tmp_path / "fp8" / SINGLE)
    change(tmp_path / "fp8", quant_method="fp8", fmt="e4m3", weight_block_size=[16, 16], activation_scheme="dynamic")
    return model, tmp_path / "fp8", tensors


def test_blocks_of_an_absurd_size_take_no_memory():
    weight = RNG.standard_normal((4, 6)).astype(jnp.float8_e4m3fn)
    dense = Blocks(2, 10**12).dequantize(weight, np.array([[2.0], [3.0]], np.float32))  # a row of scales would have 4 TB
    assert np.array_equal(dense, (weight.astype(np.float32) * np.array([[2], [2], [3], [3]])).astype(jnp.bfloat16))


def change(directory, **quantization):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def test_fp8_in_blocks_is_read_as_bfloat16_with_every_block_s_scale(fp8):
    model, directory, _ = fp8
    loaded, wanted = (split_model(m)[1] for m in (load_model(directory), model))
    name = "layers.1.mlp.up_proj.kernel"
    assert loaded[name].dtype == jnp.bfloat16 and loaded["norm.weight"].dtype == jnp.float32
    for name, value in wanted.items():
        assert relative_error(loaded[name].astype(jnp.float32), value) < 0.04, name
    assert check_model_directory(directory).extra.get("quantization_config") is None


def test_the_parity_report_says_which_tensors_are_dequantized(fp8, tmp_path, capsys):
    assert main(["convert", str(fp8[1]), "--verify", str(tmp_path / "report")]) == 0
    assert "not compared with transformers: its weights are quantized" in capsys.readouterr().out
    report = (tmp_path / "report" / "report.md").read_text()
    assert "tensors come back bit for bit, 14 of them as they are dequantized" in report and "BF16 (quantized)" in report


@pytest.mark.parametrize(
    "quantization, message",
    [
        (dict(quant_method="fp8", weight_block_size=[16, 8]), "the scales of tensor .*Blocks.rows=16, columns=8. needs"),
        (dict(quant_method="fp8"), "weight_block_size must be two numbers"),
        (dict(quant_method="gptq", bits=4), "weights quantized as 'gptq' are not read"),
        (dict(quant_method="bitsandbytes", load_in_8bit=True), "weights quantized as 'bitsandbytes' are not read"),
        (dict(bits=3, group_size=64), "bits of a quantized weight must be 4 or 8, got 3"),
        (dict(bits=4, group_size=20), "group_size must be a multiple of 8, got 20"),
        (dict(bits=4, group_size=64, lm_head=False), "lm_head is not supported"),
    ],
)
def test_other_quantizations_are_refused_by_name(fp8, quantization, message):
    change(fp8[1], **quantization)
    with pytest.raises(ValueError, match=message):
        check_model_directory(fp8[1])


def test_scales_that_are_missing_or_alone_are_named(fp8):
    _, directory, tensors = fp8
    scales = tensors.pop("model.layers.0.mlp.up_proj.weight_scale_inv")
    save_file(tensors, directory / SINGLE)
    with pytest.raises(ValueError, match="up_proj.weight is quantized and model.layers.0.mlp.up_proj.weight_scale_inv is missing"):
        load_model(directory)
    save_file({**tensors, "model.layers.0.mlp.up_proj.weight": np.zeros((40, 24), np.float32)}, directory / SINGLE)
    load_model(directory)  # a weight that is dense needs none
    save_file({**tensors, "model.norm.weight_scale_inv": scales}, directory / SINGLE)
    with pytest.raises(ValueError, match="is quantized and"):
        load_model(directory)


def test_one_of_two_descriptions_that_differ_is_refused():
    one, other = {"bits": 4, "group_size": 32}, {"bits": 8, "group_size": 32}
    assert read_quantization({"quantization": one, "quantization_config": one}) == Groups(4, 32)
    assert read_quantization({"quantization_config": None}) is None
    assert read_quantization({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 64]}}) == Blocks(128, 64)
    with pytest.raises(ValueError, match="contradict each other"):
        read_quantization({"quantization": one, "quantization_config": other})


def test_weights_that_stay_dense_are_counted_and_one_that_is_not_finite_is_named(tmp_path, capsys):
    model = tiny_model("*", hidden_size=32, intermediate_size=40)
    save_model(model, tmp_path / "out", quantization=Groups(bits=4, group_size=32))
    assert "1 more weights stay as they are, the first model.layers.0.mlp.down_proj.weight" in capsys.readouterr().err
    kernel = model.layers[0].self_attn.k_proj.kernel
    kernel.set_value(kernel[...].at[3, 2].set(jnp.inf))
    with pytest.raises(ValueError, match="tensor model.layers.0.self_attn.k_proj.weight has numbers that are not finite"):
        save_model(model, tmp_path / "none", quantization=Groups(bits=4, group_size=32))
    assert not (tmp_path / "none").exists()
