"""Llama 4 beside its logits: what mixers begin with, published configs, checkpoints that hold images too, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from hybrid_jax import load_model, save_model
from hybrid_jax.convert.load import read_model_config
from hybrid_jax.families import config_from_hf, config_to_hf
from hybrid_jax.families.public import PUBLIC
from kernels_pallas.numerics import rms_normalize
from tests.conftest import relative_error, tiny_config
from tests.convert.test_transformers_parity import make

torch = pytest.importorskip("torch")

CASE = "llama4 chunks, a dense layer, a layer without rope, biased"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The directory of transformers' model."""
    path = tmp_path_factory.mktemp("llama4") / "hf"
    make(CASE).save_pretrained(path)
    return path


def test_mamba2_norms_what_takes_the_place_of_queries_where_the_source_norms_them(source):
    """Layer 1 rotates nothing, and norms nothing; the first norms have no weights in the source, and begin at 1."""
    model, hybrid = load_model(source), load_model(source, pattern="M2-M2-*")
    normed, plain = (layer.mamba for layer in hybrid.layers[:2])
    assert plain.C_norm is None and plain.B_norm is None
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 48)), jnp.float32)
    queries = (x @ model.layers[0].self_attn.q_proj.kernel[...]).reshape(1, 5, 6, 10)
    begin = 60 + 20 + 20  # z, x and B come before C
    found = normed.C_norm(normed.in_proj(x)[..., begin : begin + 60].reshape(1, 5, 6, 10))
    assert relative_error(found, rms_normalize(queries, None, 1e-5)) < 1e-4
    written = config_to_hf(hybrid.config)
    assert written["mamba2_config"]["use_qk_norm"] is True and config_from_hf(written) == hybrid.config


def test_published_configs_are_read_and_written():
    scout = config_from_hf(PUBLIC["meta-llama/Llama-4-Scout-17B-16E"])
    assert scout.rotary_layers == (True, True, True, False) * 12 and scout.attention_windows == (8192, 8192, 8192, None) * 12
    assert scout.dense_layers == (False,) * 48 and scout.qk_norm_rotated
    maverick = config_from_hf(PUBLIC["meta-llama/Llama-4-Maverick-17B-128E"])
    assert maverick.dense_layers == (True, False) * 24 and not maverick.qk_norm_rotated
    assert (maverick.intermediate_size, maverick.moe.intermediate_size, maverick.moe.shared_intermediate_size) == (
        16384,
        8192,
        8192,
    )


def test_chunks_that_no_layer_has_stay_in_the_config_because_transformers_asks_for_their_size(source):
    keys = json.loads((source / "config.json").read_text())
    config = config_from_hf({**keys, "layer_types": ["full_attention"] * 3})
    assert config.attention_windows == (None,) * 3 and config_to_hf(config)["attention_chunk_size"] == 7


def test_the_decoder_of_a_checkpoint_with_images_is_read_and_exported_alone(tmp_path, capsys):
    text = make(CASE).config
    sizes = dict(hidden_size=16, num_hidden_layers=5, num_attention_heads=2, intermediate_size=16, image_size=28)
    vision = transformers.Llama4VisionConfig(
        **sizes, vision_output_dim=16, patch_size=14, projector_input_dim=16, projector_output_dim=16
    )
    images = dict(image_token_index=90, boi_token_index=91, eoi_token_index=92)
    config = transformers.Llama4Config(text_config=text.to_dict(), vision_config=vision.to_dict(), **images)
    theirs = transformers.Llama4ForConditionalGeneration(config)
    theirs.save_pretrained(tmp_path / "hf")
    assert read_model_config(tmp_path / "hf") == config_from_hf(text.to_dict())
    save_model(load_model(tmp_path / "hf"), tmp_path / "ours")
    assert "tensors are no part of the decoder and are not read, the first multi_modal_projector" in "".join(capsys.readouterr())
    again = transformers.Llama4ForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    want = theirs.language_model.state_dict()
    assert again.state_dict().keys() == want.keys() and all(torch.equal(x, want[n]) for n, x in again.state_dict().items())


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(attention_chunk_size=None), "a layer is 'chunked_attention' but attention_chunk_size set no window"),
        (dict(attention_chunk_size=0), "attention_chunk_size must be an integer at least 1"),
        (dict(layer_types=["chunked_attention"]), "layer_types has 1 entries, num_hidden_layers is 3"),
        (dict(no_rope_layers=[1]), "no_rope_layers has 1 entries, num_hidden_layers is 3"),
        (dict(moe_layers=[-1]), r"moe_layers\[0\] must be an integer at least 0"),
        (dict(num_experts_per_tok=6), r"num_experts_per_tok must be at most num_experts \(5\), got 6"),
        (dict(floor_scale=0), "floor_scale must be an integer at least 1"),
        (dict(attn_scale=-0.1), "attn_scale must be a number at least 0"),
        (dict(use_qk_norm=1), "use_qk_norm must be true or false"),
        (dict(hidden_act="gelu"), "hidden_act must be one of"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5 is not supported"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(source, keys, words):
    with pytest.raises(ValueError, match=words):
        config_from_hf({**json.loads((source / "config.json").read_text()), **keys})


def test_queries_are_normed_once():
    with pytest.raises(ValueError, match="qk_norm and qk_norm_rotated exclude each other"):
        tiny_config("*", qk_norm_rotated=True)


def test_a_scaling_of_unrotated_queries_is_checked_also_where_it_is_made_in_python():
    with pytest.raises(ValueError, match=r"unrotated_query_scaling\[1\] must be an integer at least 1, got 0"):
        tiny_config("*", unrotated_query_scaling=(0.1, 0))
