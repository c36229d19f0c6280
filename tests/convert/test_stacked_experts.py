"""Experts of a layer in one tensor or in one for each: the same model, and an export in the form that came."""

import json

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from hybrid_jax import load_model, save_model
from hybrid_jax.convert import convert_directory
from hybrid_jax.convert.load import open_parameters, read_model_config
from hybrid_jax.convert.quantized import Groups
from hybrid_jax.families import config_from_hf, config_to_hf
from hybrid_jax.parameters import split_model
from hybrid_jax.parity_report import _round_trip
from tests.convert.test_transformers_parity import make

torch = pytest.importorskip("torch")

QWEN, LLAMA = "qwen3.5 moe text", "llama4 chunks, a dense layer, a layer without rope, biased"


def stack(directory, out):
    """Writes a checkpoint with the experts of each layer in two tensors, as the released files of Qwen3.5 have them."""
    tensors = load_file(directory / "model.safetensors")
    out.mkdir()
    for layer in sorted({n.split(".experts.")[0] for n in tensors if ".experts." in n}):
        maps = {}
        for name in ("gate_proj", "up_proj", "down_proj"):
            count = sum(n.startswith(f"{layer}.experts.") and n.endswith(f".{name}.weight") for n in tensors)
            maps[name] = np.stack([tensors.pop(f"{layer}.experts.{e}.{name}.weight") for e in range(count)])
        tensors[f"{layer}.experts.gate_up_proj"] = np.concatenate([maps["gate_proj"], maps["up_proj"]], axis=1)
        tensors[f"{layer}.experts.down_proj"] = maps["down_proj"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((directory / "config.json").read_bytes())


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """(transformers' model, its directory with a tensor for each expert, that with one for all)."""
    folder = tmp_path_factory.mktemp("qwen")
    theirs = make(QWEN)
    theirs.save_pretrained(folder / "each")
    stack(folder / "each", folder / "all")
    return theirs, folder / "each", folder / "all"


def same(one, other):
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) and a[n].shape == b[n].shape for n in a)


@pytest.mark.parametrize("form", [1, 2], ids=["a tensor for each expert", "one for all"])
def test_both_forms_are_the_same_model_and_are_exported_as_they_came(qwen, form, tmp_path):
    theirs, directory = qwen[0], qwen[form]
    model = load_model(directory)
    want, got = (split_model(m)[1] for m in (load_model(qwen[1]), model))
    assert want.keys() == got.keys() and all(np.array_equal(want[n], got[n]) for n in want)
    save_model(model, tmp_path / "saved")
    convert_directory(directory, tmp_path / "streamed")
    assert same(directory, tmp_path / "saved") and same(directory, tmp_path / "streamed")
    again = type(theirs).from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), theirs.parameters(), strict=True))


def test_a_hybrid_keeps_the_form_of_its_source(qwen, tmp_path):
    convert_directory(qwen[2], tmp_path / "hybrid", lambda config: config.with_pattern("GDN-GKA"))
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(tmp_path / "hybrid" / "model.safetensors")
    assert load_model(tmp_path / "hybrid").config.pattern == "GDN-GKA"


@pytest.mark.parametrize("case", ["qwen", LLAMA])
def test_every_stacked_tensor_is_proven_to_come_back(case, qwen, tmp_path):
    directory = qwen[2]
    if case == LLAMA:
        make(LLAMA).save_pretrained(directory := tmp_path / "llama4")
    tensors, missing = _round_trip(*open_parameters(directory))
    assert all(t.returns for t in tensors) and not missing
    made_of = {t.name.rpartition(".")[2]: len(t.parameters) for t in tensors if ".layers.0." in t.name and ".experts." in t.name}
    assert made_of == {"gate_up_proj": 2, "down_proj": 1}


def test_experts_in_one_tensor_are_not_quantized(qwen, tmp_path):
    with pytest.raises(ValueError, match=r"experts\.\w+ holds the experts of a layer together, and such tensors are not quantized"):
        save_model(load_model(qwen[2]), tmp_path / "small", quantization=Groups(bits=8, group_size=8))


def test_experts_of_the_wrong_width_are_refused_by_name(qwen, tmp_path):
    keys = json.loads((qwen[2] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**keys, "moe_intermediate_size": 10}))
    (tmp_path / "model.safetensors").symlink_to(qwen[2] / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor model.layers.0.mlp.experts.down_proj must have shape \(5, 48, 10\) .* 48, 8"):
        load_model(tmp_path)


def test_a_config_without_a_width_of_dense_layers_is_read_and_written(qwen):
    """No layer of Qwen3.5's mixtures is dense, and their config.json has no `intermediate_size`."""
    config = read_model_config(qwen[1])
    keys = {n: x for n, x in json.loads((qwen[1] / "config.json").read_text()).items() if n != "intermediate_size"}
    assert config_from_hf(keys) == config and "intermediate_size" not in config_to_hf(config_from_hf(keys))


def test_the_decoder_of_a_checkpoint_with_images_is_read_and_exported_alone(qwen, tmp_path):
    from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeVisionConfig

    text = {**qwen[0].config.to_dict(), "tie_word_embeddings": False}  # the one beside `text_config` counts
    sizes = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=48, num_position_embeddings=16)
    images = dict(image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
    vision = Qwen3_5MoeVisionConfig(**sizes, patch_size=4).to_dict()
    config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **images)
    theirs = transformers.Qwen3_5MoeForConditionalGeneration(config)
    theirs.save_pretrained(tmp_path / "hf")
    assert read_model_config(tmp_path / "hf") == read_model_config(qwen[1])
    save_model(load_model(tmp_path / "hf"), tmp_path / "ours")
    again = type(qwen[0]).from_pretrained(tmp_path / "ours", dtype=torch.float32)
    want = theirs.model.language_model.state_dict()
    got = {n.removeprefix("model."): x for n, x in again.state_dict().items() if n.startswith("model.")}
    assert got.keys() == want.keys() and all(torch.equal(x, want[n]) for n, x in got.items())
