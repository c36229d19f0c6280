"""Conversion from directory to directory, parameter by parameter: the same files as through a model, in bounded memory."""

import dataclasses
import errno
import json
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from hybrid_jax import load_model, save_model
from hybrid_jax.config import ModelConfig, MoEConfig
from hybrid_jax.convert import convert_directory, read_model_config
from hybrid_jax.convert.weights import SINGLE, TensorFiles
from hybrid_jax.convert.writer import WeightWriter
from hybrid_jax.parameters import join_model, split_model
from hybrid_jax.priming.fresh import FreshLayers
from hybrid_jax.priming.fuse import fuse
from hybrid_jax.priming.initialize import new_model
from tests.conftest import tiny_model


def stored(directory):
    """Every tensor's dtype, shape and bytes, by name."""
    return {name: (t.dtype, t.shape, t.hash()) for name, t in TensorFiles(directory).items()}


CASES = {
    "every mixer, of float32": (lambda: tiny_model("*-*-*-*-*-*-*"), "GKA-GDN-M2-M3-BMF-SWA-DM2", None),
    "heads kept, in bfloat16": (lambda: tiny_model("*-*-*"), "GDN[1]-*-GKA*", "bfloat16"),
    "experts": (lambda: tiny_model("*-*", family="qwen3_moe", moe=MoEConfig(4, 2, 16)), "GKA-*", None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_streamed_conversion_writes_the_bytes_that_a_loaded_model_would(case, tmp_path):
    make, pattern, dtype = CASES[case]
    save_model(make(), tmp_path / "source")
    config = convert_directory(
        tmp_path / "source", tmp_path / "streamed", lambda c: c.with_pattern(pattern), dtype=dtype, seed=5, max_shard_bytes=20_000
    )
    model = load_model(tmp_path / "source", pattern, dtype, seed=5)
    save_model(model, tmp_path / "loaded")
    assert stored(tmp_path / "streamed") == stored(tmp_path / "loaded") and config == model.config
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "streamed/config.json").read_text()) == json.loads((tmp_path / "loaded/config.json").read_text())


def test_an_export_without_teachers_is_the_unfused_model(tmp_path):
    source = tiny_model("*-*")
    save_model(source, tmp_path / "source")
    hybrid = load_model(tmp_path / "source", "GKA-*")
    save_model(fuse(hybrid, source), tmp_path / "fused")
    convert_directory(tmp_path / "fused", tmp_path / "out", ModelConfig.unfused)
    save_model(hybrid, tmp_path / "wanted")
    assert stored(tmp_path / "out") == stored(tmp_path / "wanted")


def test_a_conversion_holds_one_layer_s_mixers_and_never_the_model(tmp_path):
    layers = 8
    save_model(tiny_model("-".join("*" * layers), hidden_size=64, intermediate_size=4096), tmp_path / "source")
    size = (tmp_path / "source" / SINGLE).stat().st_size
    convert_directory(tmp_path / "source", tmp_path / "warm", lambda c: c.with_pattern("-".join(["GKA", "*"] * (layers // 2))))
    tracemalloc.start()
    convert_directory(tmp_path / "source", tmp_path / "out", lambda c: c.with_pattern("-".join(["GKA", "*"] * (layers // 2))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 16e6 and peak < 0.25 * size, (peak, size)


def test_layers_are_drawn_one_by_one_as_a_new_decoder_draws_them():
    config = tiny_model("GKA-*-M3-GDN[0]-GKA").config
    new = split_model(new_model(config, seed=7))[1]
    fresh = FreshLayers(config, seed=7, dtype=jnp.float32, mesh=None, how="transformers")
    for i in range(config.num_layers):
        names = [n.removeprefix(f"layers.{i}.") for n in new if n.startswith(f"layers.{i}.")]
        for name, value in fresh.of_layer(i, names).items():
            np.testing.assert_allclose(value, new[f"layers.{i}.{name}"], rtol=1e-6, err_msg=name)


def test_a_writer_makes_files_that_safetensors_reads_and_knows_what_is_missing(tmp_path):
    planned = {"a": (np.dtype("float16"), (3,)), "b": (np.dtype("float32"), (4, 2)), "c": (np.dtype("float32"), ())}
    writer = WeightWriter(tmp_path, planned, 10**9)
    b = np.arange(8.0, dtype=np.float32).reshape(2, 4).T  # not contiguous
    writer.write("b", b[2:], 2)
    writer.write("a", np.array([1.0, 2.0, 3.0]))
    writer.write("c", np.array(5.0))
    with pytest.raises(ValueError, match=r"tensor b was not written completely \(16 bytes are missing\)"):
        writer.check_complete()
    with pytest.raises(ValueError, match=r"tensor b: rows 3 ... of shape \(2, 2\) do not fit into \(4, 2\)"):
        writer.write("b", b[:2], 3)
    writer.write("b", b[:2])
    writer.check_complete()
    with safe_open(tmp_path / SINGLE, "numpy") as file:
        assert np.array_equal(file.get_tensor("b"), b) and file.get_tensor("c") == 5
        assert file.get_tensor("a").dtype == np.float16 and file.get_tensor("a").tolist() == [1, 2, 3]
        assert file.metadata() == {"format": "pt"}
    assert all(t.offset % planned[name][0].itemsize == 0 for name, t in TensorFiles(tmp_path).items())


def test_what_a_hybrid_keeps_is_copied_and_the_rest_is_written(tmp_path, monkeypatch):
    save_model(tiny_model("*-*"), tmp_path / "source")
    written, write = set(), WeightWriter.write
    monkeypatch.setattr(WeightWriter, "write", lambda self, name, *args: (written.add(name), write(self, name, *args)))
    convert_directory(tmp_path / "source", tmp_path / "out", lambda c: c.with_pattern("*-GDN"))
    source, out = stored(tmp_path / "source"), stored(tmp_path / "out")
    same = {f"model.layers.1.gdn.{x}_proj.weight": source[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkvo"}
    kept = {name: source[name] for name in out.keys() & source.keys()} | same
    assert written == out.keys() - kept.keys() and "model.layers.1.gdn.g_proj.weight" in written
    assert "model.layers.0.mlp.up_proj.weight" in kept and all(out[name] == tensor for name, tensor in kept.items())


@pytest.mark.parametrize("refusal", [None, 0, errno.EXDEV, errno.EPERM])
def test_a_tensor_is_copied_from_another_file_whether_the_kernel_can_or_not(refusal, tmp_path, monkeypatch):
    def refuses(*args):
        if refusal:
            raise OSError(refusal, "not here")
        return 0

    if refusal is not None:
        monkeypatch.setattr("os.copy_file_range", refuses)
    monkeypatch.setattr("hybrid_jax.convert.writer._CHUNK", 7)
    values = {"a": np.arange(3, dtype=np.float16), "b": np.arange(10, dtype=np.float32).reshape(2, 5)}
    planned = {name: (x.dtype, x.shape) for name, x in values.items()}
    (tmp_path / "out").mkdir()
    first, second = WeightWriter(tmp_path, planned, 10**9), WeightWriter(tmp_path / "out", planned, 10**9)
    for name, value in values.items():
        first.write(name, value)
    have = TensorFiles(tmp_path)
    for name in values:
        second.copy(name, have[name])
    second.check_complete()
    assert stored(tmp_path / "out") == stored(tmp_path)
    with pytest.raises(ValueError, match=r"tensor a: F32 \(2, 5\) is not the planned float16 \(3,\)"):
        second.copy("a", have["b"])
    with open(tmp_path / SINGLE, "r+b") as file:
        file.truncate(have["b"].offset + 20)
    with pytest.raises(ValueError, match="ends in the middle of a tensor"):
        second.copy("b", have["b"])


def test_layers_that_are_converted_later_are_drawn_anew(tmp_path):
    """With the same seed and in any order: no two parameters of a hybrid are equal by their draws."""
    save_model(tiny_model("*-*-*", num_kv_heads=4), tmp_path / "0")
    for number, pattern in enumerate(("*-*-GDN", "GDN-*-GDN", "GDN-GDN-GDN"), start=1):
        convert_directory(tmp_path / str(number - 1), tmp_path / str(number), lambda c, p=pattern: c.with_pattern(p))
    drawn = {n: t.hash() for n, t in TensorFiles(tmp_path / "3").items() if "_conv1d" in n or ".b_proj" in n or ".gk_proj" in n}
    assert len(drawn) == 15 == len(set(drawn.values())), "two tensors have the same bytes"


def test_copies_of_attention_keep_its_dtype_where_the_embedding_has_another(tmp_path):
    model = tiny_model("*-*")
    structure, parameters = split_model(model)
    table = parameters["embed_tokens.embedding"].astype(jnp.bfloat16)
    save_model(join_model(structure, {**parameters, "embed_tokens.embedding": table}), tmp_path / "source")
    convert_directory(tmp_path / "source", tmp_path / "out", lambda c: c.with_pattern("GKA-*"))
    found, source = TensorFiles(tmp_path / "out"), TensorFiles(tmp_path / "source")
    q = "model.layers.0.gka.q_proj.weight"
    assert found[q].dtype == "F32" and found[q].hash() == source[q.replace("gka", "self_attn")].hash()
    loaded = split_model(load_model(tmp_path / "source", "GKA-*"))[1]
    assert loaded["layers.0.gka.q_proj.kernel"].dtype == jnp.float32


def test_a_conversion_neither_replaces_its_source_nor_ties_its_head(tmp_path):
    save_model(tiny_model("*-*"), tmp_path / "source")
    with pytest.raises(FileExistsError, match="is, or is in, the source"):
        convert_directory(tmp_path / "source", tmp_path / "source", lambda c: c.with_pattern("GKA-*"), overwrite=True)
    tied = read_model_config(tmp_path / "source").tie_embeddings
    with pytest.raises(ValueError, match=f"tie_word_embeddings is {tied} there, and a conversion cannot change it"):
        convert_directory(tmp_path / "source", tmp_path / "out", lambda c: dataclasses.replace(c, tie_embeddings=not tied))
    with pytest.raises(ValueError, match="seed must be an integer .*4,?294,?967,?295"):
        convert_directory(tmp_path / "source", tmp_path / "out", lambda c: c.with_pattern("GKA-*"), seed=2**32)
    assert not (tmp_path / "out").exists()
