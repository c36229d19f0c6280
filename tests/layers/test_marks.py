"""How parameters are cast, frozen, decayed, updated and stored is stated on them; for the mixers here it follows their names."""

import re

import jax.numpy as jnp
import pytest
from flax import nnx

from hybrid_jax.config import BMojoConfig, GDNConfig, Mamba3Config, MoEConfig
from hybrid_jax.layers.parameter import marks_of, parameter
from hybrid_jax.mixers import mixer_symbols
from hybrid_jax.model import abstract_decoder
from hybrid_jax.parameters import abstract_parameters, marks
from tests.conftest import tiny_config

NOT_DECAYED = re.compile(r"(norm\w*\.weight|\.bias|\.A_log|\.dt_bias|\.D|\.[BCz]_bias|\.mimo_[xzo])$")
MANY_VECTORS = re.compile(r"\.([BC]_bias|mimo_[xzo])$")  # of several axes, but no matrices
MATRIX = re.compile(r"(\.kernel|\.experts\.\w+)$")
NOT_MUON = re.compile(r"(embed_tokens|lm_head|conv1d|\.mlp\.gate\.)")


@pytest.mark.parametrize("moe", [None, MoEConfig(2, 1, 4)])
def test_marks_of_the_mixers_follow_from_names_and_ranks(moe):
    biases = dict(
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        gdn=GDNConfig(conv_bias=True),
        bmojo=BMojoConfig(4, "mamba2", False),
        mamba3=Mamba3Config(rank=2),
    )
    config = tiny_config("-".join(mixer_symbols()), moe=moe, **biases)
    shapes, found = abstract_parameters(config), marks(abstract_decoder(config))
    assert found.keys() == shapes.keys()
    for name, mark in found.items():
        matrix = len(shapes[name].shape) > 1 and not MANY_VECTORS.search(name)
        conv, layer = "conv1d" in name, name.startswith("layers.")
        assert len(mark.axes) == len(shapes[name].shape), name
        assert mark.frozen == matrix, name
        assert mark.decay == (not NOT_DECAYED.search("." + name)), name
        assert mark.muon == bool(MATRIX.search(name) and not NOT_MUON.search(name)), name
        assert mark.compute == (matrix and not conv) or not layer, name
        layout = "experts" if ".experts." in name else "conv" if conv and matrix else "transposed" if matrix else "same"
        assert mark.layout == (layout if name != "embed_tokens.embedding" else "same"), name


def test_a_parameter_must_name_an_axis_for_each_dimension_and_have_marks():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) needs an axis for each dimension, got \('embed',\)"):
        parameter(jnp.zeros((2, 3)), ("embed",))
    with pytest.raises(TypeError, match="make it with hybrid_jax.layers.parameter.parameter"):
        marks_of(nnx.Param(jnp.zeros(2)))
