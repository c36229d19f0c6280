"""Released recurrent models are read as they are, written back, decoded, and refused where they say what cannot be honoured."""

import dataclasses
import json
import math

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from hybrid_jax import load_model, save_model
from hybrid_jax.config import Mamba3Config, parse_pattern
from hybrid_jax.convert.load import read_model_config
from hybrid_jax.convert.save import planned_tensors
from hybrid_jax.families import config_from_hf, config_to_hf
from hybrid_jax.model import Decoder
from hybrid_jax.parameters import abstract_parameters, split_model
from hybrid_jax.parity_report import verify
from hybrid_jax.priming.initialize import check_convertible, initialize_hybrid
from tests.conftest import relative_error
from tests.convert.released_models import (
    CASES,
    CORE,
    HYBRID,
    LLAMBA,
    MAMBA3,
    MIMO,
    PHI_ATTENTION,
    PHI_MAMBA,
    WITHOUT_MLPS,
    Model,
    block,
    torch,
)
from tests.convert.test_family_contract import decoded

IDS = np.random.default_rng(1).integers(0, 90, (2, 13))


def tensors(theirs):
    return {name: x.numpy() for name, x in theirs.state_dict().items() if not name.startswith("head.")}


def write(path, hf, arrays):
    path.mkdir()
    save_file(arrays, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(hf))


@pytest.fixture(scope="module", params=CASES)
def source(request, tmp_path_factory):
    """(config.json, the torch model's logits in float64, its directory)."""
    path, hf = tmp_path_factory.mktemp("released") / "model", CASES[request.param]
    theirs = Model(hf)
    write(path, hf, tensors(theirs))
    with torch.no_grad():
        return hf, theirs.double()(torch.from_numpy(IDS)).numpy(), path


def test_logits_equal_the_released_model_s(source):
    _, want, path = source
    model = load_model(path)
    assert not model.config.is_hybrid
    assert relative_error(nnx.jit(lambda m, ids: m(ids))(model, IDS), want) < 2e-5


def test_decoding_with_states_equals_the_released_model(source):
    _, want, path = source
    assert relative_error(decoded(load_model(path), IDS, 5), want) < 2e-5


def complete(hf, written):
    """config.json with the defaults of keys that it leaves out, which an export states."""
    return {k: complete(hf[k], w) if isinstance(w, dict) and k in hf else hf.get(k, w) for k, w in written.items()}


def test_the_export_has_the_released_tensors_and_keys(source, tmp_path):
    hf, _, path = source
    save_model(load_model(path), tmp_path / "ours")
    want, got = (load_file(folder / "model.safetensors") for folder in (path, tmp_path / "ours"))
    assert want.keys() == got.keys() and all(np.array_equal(want[name], got[name]) for name in want)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert hf.keys() <= written.keys() and written == complete(hf, written)
    assert read_model_config(tmp_path / "ours") == read_model_config(path)
    assert "model_type" in hf or "model_type" not in written, "the released program takes no keys that it does not know"


def test_a_tied_head_that_is_stored_beside_the_embedding_is_read_as_one(tmp_path):
    arrays = tensors(Model(MAMBA3))
    embedding = arrays.pop("backbone.embedding.weight")
    write(tmp_path / "both", MAMBA3, {**arrays, "lm_head.weight": embedding, "backbone.embedding.weight": embedding.copy()})
    write(tmp_path / "head", MAMBA3, {**arrays, "lm_head.weight": embedding})
    for path in (tmp_path / "both", tmp_path / "head"):
        model = load_model(path)
        assert model.config.tie_embeddings and model.lm_head is None
        assert np.array_equal(model.embed_tokens.embedding[...], embedding)


def test_attention_of_a_hybrid_phi_mamba_becomes_another_mixer_and_the_model_is_exported_and_loaded(tmp_path):
    write(tmp_path / "source", HYBRID, tensors(Model(HYBRID)))
    hybrid = load_model(tmp_path / "source", pattern="DM2-DM2-GDN-DM2")
    save_model(hybrid, tmp_path / "hybrid")
    written, again = json.loads((tmp_path / "hybrid" / "config.json").read_text()), load_model(tmp_path / "hybrid")
    assert written["model_type"] == "hybrid_phi_mamba" and again.config == hybrid.config and again.config.is_hybrid
    want, got = (split_model(model)[1] for model in (hybrid, again))
    assert want.keys() == got.keys() and all(np.array_equal(want[name], got[name]) for name in want)
    with pytest.raises(ValueError, match="released.vocab_size must be an integer at least 1 .*got 'many'"):
        config_from_hf({**written, "released": {**written["released"], "vocab_size": "many"}})
    with pytest.raises(ValueError, match="layer 0 is 'DM2': only attention can become 'GDN'"):
        check_convertible(hybrid.config, hybrid.config.with_pattern("GDN-DM2-GDN-DM2"))


def test_verification_says_that_transformers_has_no_such_class(tmp_path):
    write(tmp_path / "model", LLAMBA, tensors(Model(LLAMBA)))
    assert verify(tmp_path / "model").why_not == "transformers has no class for LlambaLMHeadModel"


def test_siso_and_mimo_have_their_rotations_and_ranks():
    siso, mimo = (config_from_hf({**MAMBA3, "ssm_cfg": ssm}).options(Mamba3Config) for ssm in (MAMBA3["ssm_cfg"], MIMO))
    assert (siso.rank, siso.rotate_halves, siso.groups, siso.out_norm) == (1, False, 1, False)
    assert (mimo.rank, mimo.rotate_halves, mimo.groups, mimo.out_norm, mimo.decay_floor) == (2, True, 2, True, 1.2)


def test_tensors_of_the_published_sizes_have_their_shapes():
    """Phi-Mamba's published config.json with one layer, and a Mamba-3 of 768 channels with the defaults of its program."""
    core = {**CORE, "d_state": 64, "n_v_heads": 32, "n_qk_heads": 32}
    phi = {
        "LanguageModel": {"input": {"vocab_size": 51200, "pad_vocab_size_multiple": 8}},
        "MixerModel": {"input": {"d_model": 2048, "n_layer": 1, "lm_head_prenorm": "layer"}},
        "Block1": block(1, "discrete_mamba2", core),
    }
    mamba3 = {"d_model": 768, "d_intermediate": 1500, "n_layer": 1, "ssm_cfg": {"layer": "Mamba3"}}
    for hf, want in (
        (phi, {"mixer.in_proj.weight": (8224, 2048), "mixer.conv1d.weight": (6144, 1, 4), "mixer.z_bias": (2048,)}),
        (mamba3, {"mixer.in_proj.weight": (3432, 768), "mixer.B_bias": (24, 1, 128), "mlp.fc1.weight": (3072, 768)}),
    ):
        config = config_from_hf(hf)
        planned = planned_tensors(config, dict.fromkeys(abstract_parameters(config), np.float32))
        assert {name: planned[f"backbone.layers.0.{name}"][1] for name in want} == want
    assert planned["backbone.embedding.weight"][1] == (50280, 768) and "lm_head.weight" not in planned


def test_a_layer_without_an_mlp_has_an_mlp_and_its_norm_less():
    with_mlps, without = (config_from_hf({**hf, "d_model": 768, "n_layer": 3}) for hf in (MAMBA3, WITHOUT_MLPS))
    assert with_mlps.intermediate_size == 128 and without == dataclasses.replace(with_mlps, intermediate_size=0)
    counts = [sum(math.prod(x.shape) for x in abstract_parameters(config).values()) for config in (with_mlps, without)]
    assert counts[0] - counts[1] == 3 * (3 * 768 * 128 + 768)


def test_tensors_of_an_mlp_that_config_json_does_not_state_are_refused(tmp_path):
    write(tmp_path / "model", WITHOUT_MLPS, tensors(Model(MAMBA3)))
    with pytest.raises(ValueError, match=r"norm2\.weight|mlp\.fc"):
        load_model(tmp_path / "model")


def test_a_hybrid_whose_layers_have_no_mlp_is_not_written():
    """hybrid-model-factory's layout has an MLP in every layer."""
    hybrid = dataclasses.replace(config_from_hf(WITHOUT_MLPS), layers=parse_pattern("GDN-M3"))
    with pytest.raises(
        ValueError, match="intermediate_size = 0 is not supported: .* which hybrids have too, every layer has an MLP"
    ):
        config_to_hf(hybrid)
    written = config_to_hf(dataclasses.replace(hybrid, intermediate_size=128))
    assert (written["model_type"], written["intermediate_size"]) == ("hybrid_mamba3", 128)


def test_what_the_released_layout_cannot_describe_is_not_written():
    config = config_from_hf(MAMBA3)
    with pytest.raises(ValueError, match="config.json of a mamba3 cannot describe this model: mixers is"):
        config_to_hf(config.with_options(Mamba3Config(groups=1, out_norm=True)))
    with pytest.raises(ValueError, match="its heads have 32 channels together, which must be a multiple of hidden_size, 24"):
        config_to_hf(type(config)(**{**vars(config_from_hf(LLAMBA)), "hidden_size": 24}))


REFUSED = {
    "llamba": (
        LLAMBA,
        [
            (dict(norm_epsilon=1e-6), "norm_epsilon = 1e-06 is not supported; only 1e-05 is"),
            (dict(lm_head_prenorm="layer"), "lm_head_prenorm = 'layer' is not supported; only 'rms' is"),
            (dict(d_model="32"), "d_model must be an integer at least 1"),
            (dict(n_layer=10**9), "n_layer must be an integer at least 1 and at most 10000"),
            (dict(pad_vocab_size_multiple=0), "pad_vocab_size_multiple must be an integer at least 1"),
            (dict(tie_embeddings=True, lm_head_bias=True), "tie_word_embeddings = true is not supported where the output head"),
            (dict(ssm_cfg=[]), "ssm_cfg must be an object"),
            (dict(mlp_cfg={"bias": False}), "mlp_cfg lacks intermediate_size"),
            (dict(mlp_cfg={**LLAMBA["mlp_cfg"], "act_fn": "gelu"}), "mlp_cfg.act_fn = 'gelu' is not supported; only 'silu' is"),
            (dict(ssm_cfg={**LLAMBA["ssm_cfg"], "n_v_heads": 5}), r"ssm_cfg.n_v_heads must divide expand \* d_model \(32\), got 5"),
            (dict(ssm_cfg={**LLAMBA["ssm_cfg"], "n_qk_heads": 3}), r"ssm_cfg.n_qk_heads must divide n_v_heads \(4\), got 3"),
            (dict(ssm_cfg={**LLAMBA["ssm_cfg"], "activation": "gelu"}), "ssm_cfg.activation must be one of 'identity', 'silu'"),
            (dict(ssm_cfg={**LLAMBA["ssm_cfg"], "norm_cls": "rms"}), "ssm_cfg has the unknown key 'norm_cls'"),
            (dict(released={}), "config.json has the key 'released', which only hybrids"),
            (dict(resid_dropout=float("nan")), "config.json: resid_dropout must be finite, got nan"),
        ],
    ),
    "phi-mamba": (
        HYBRID,
        [
            (dict(MixerModel={}), "MixerModel lacks input"),
            (dict(MixerModel={"input": {"d_model": 32, "n_layer": 4}}), "MixerModel.input lacks lm_head_prenorm"),
            (
                dict(MixerModel={"input": {"d_model": 32, "n_layer": 5, "lm_head_prenorm": "layer"}}),
                "MixerModel.input.n_layer is 5, the blocks have 4 layers",
            ),
            (
                dict(LanguageModel={"input": {"vocab_size": 96, "pad_vocab_size_multiple": 8, "tie_embeddings": True}}),
                "LanguageModel.input.tie_embeddings = True is not supported; only False is",
            ),
            (dict(Block2=block(1, "llama_attention", {})), "Block2.CoreType must be one of"),
            (
                dict(Block2=block(1, "phi_attention", {})),
                "core_input.hidden_size = 2048 there .*d_model = 32",
            ),
            (
                dict(Block2=block(1, "phi_attention", {**PHI_ATTENTION, "num_attention_heads": 8})),
                "attention has num_attention_heads 8, Discrete Mamba-2 4",
            ),
            (
                dict(Block3=block(1, "discrete_mamba2", {**CORE, "d_state": 4})),
                "Block3.core_input.d_state is 4, and 8 in another block of its kind",
            ),
            (dict(Block1={**HYBRID["Block1"], "block_input": {"resid_dropout": 0.1}}), "resid_dropout must be 0, .* got 0.1"),
            (dict(Block1={**HYBRID["Block1"], "BlockType": "other"}), "Block1.BlockType = 'other' is not supported"),
            (dict(Block1=None), "Block1 must be an object"),
        ],
    ),
    "mamba3": (
        MAMBA3,
        [
            (dict(d_intermediate=-1), "d_intermediate must be an integer at least 0 .*got -1"),
            (dict(attn_layer_idx=[1]), r"attn_layer_idx = \[1\] is not supported"),
            (dict(ssm_cfg={}), "ssm_cfg.layer = 'Mamba1' is not supported; only 'Mamba3' is"),
            (dict(ssm_cfg={**MAMBA3["ssm_cfg"], "headdim": 12}), r"ssm_cfg.headdim must divide expand \* d_model \(32\), got 12"),
            (dict(ssm_cfg={**MAMBA3["ssm_cfg"], "ngroups": 3}), r"ssm_cfg.ngroups must divide the number of heads \(4\), got 3"),
            (dict(ssm_cfg={**MAMBA3["ssm_cfg"], "d_state": 5}), "mamba3_config.state_size must be even"),
            (dict(ssm_cfg={**MIMO, "mimo_rank": 1}), "ssm_cfg.mimo_rank = 1 with is_mimo = true is not supported"),
            (dict(ssm_cfg={**MIMO, "rope_fraction": 0.25}), "ssm_cfg.rope_fraction must be 0.5 or 1.0, got 0.25"),
            (dict(ssm_cfg={**MIMO, "use_rope": True}), "ssm_cfg has the unknown key 'use_rope'"),
            (dict(rms_norm="true"), "rms_norm must be true or false"),
        ],
    ),
}


@pytest.mark.parametrize("hf, keys, words", [(hf, keys, words) for hf, cases in REFUSED.values() for keys, words in cases])
def test_what_cannot_be_honoured_is_refused_by_name(hf, keys, words):
    config_from_hf(hf)
    with pytest.raises(ValueError, match=words):
        config_from_hf({**hf, **keys})


def test_a_config_without_a_model_type_that_is_of_no_released_layout_is_refused():
    with pytest.raises(ValueError, match="config.json has model_type None; supported: "):
        config_from_hf({"d_model": 32, "n_layer": 2})
    assert config_from_hf(PHI_MAMBA).family == "phi_mamba"


def test_a_model_whose_last_attention_is_converted_is_written(tmp_path):
    model = Decoder(config_from_hf(HYBRID), rngs=nnx.Rngs(0))
    hybrid = initialize_hybrid(model, "-".join(["DM2"] * model.config.num_layers))
    save_model(hybrid, tmp_path / "out")
    assert load_model(tmp_path / "out").config.pattern == hybrid.config.pattern
