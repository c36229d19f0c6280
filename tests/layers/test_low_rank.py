"""Keys and values expanded by a low-rank map: names in checkpoints, how it begins, where it is refused, what plans count."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from hybrid_jax import load_model, save_model
from hybrid_jax.config import GDNConfig, GKAConfig
from hybrid_jax.families import config_from_hf, config_to_hf
from hybrid_jax.parallel.mesh import abstract_mesh, check_mesh_fits
from hybrid_jax.parameters import join_model, logical_axes, split_model
from hybrid_jax.plan.formula import flops_by_formula
from hybrid_jax.plan.program import Job
from hybrid_jax.priming.initialize import initialize_hybrid, new_model
from tests.conftest import tiny_config, tiny_model

OPTIONS = {"GKA": GKAConfig, "GDN": GDNConfig}
EXPANSION = ("proj_k", "proj_v", "k_rep", "v_rep")
IDS = np.random.default_rng(0).integers(0, 61, (2, 13))


def sized(symbol, **options):
    """Changes to `tiny_config`: the options of one mixer."""
    return {symbol.lower(): OPTIONS[symbol](kv_proj_rank=3, **options)}


def moved(model):
    """The model with other values in place of zeros and ones."""
    structure, have = split_model(model)
    rng = np.random.default_rng(1)
    return join_model(structure, {n: x + 0.2 * jnp.asarray(rng.normal(size=x.shape), x.dtype) for n, x in have.items()})


@pytest.mark.parametrize("symbol", OPTIONS)
def test_checkpoints_have_the_released_names_and_shapes_and_come_back(symbol, tmp_path):
    """4 heads and 2 key heads of 8 channels, rank 3; the released linear maps are stored as [outputs, inputs]."""
    model = moved(tiny_model(f"*-{symbol}", **sized(symbol, kv_learnable_residual=True)))
    save_model(model, tmp_path)
    found = {n.split(f".{symbol.lower()}.")[1]: x.shape for n, x in load_file(tmp_path / "model.safetensors").items() if "rep" in n}
    tensors = load_file(tmp_path / "model.safetensors")
    found = {n: tensors[f"model.layers.1.{symbol.lower()}.{n}"].shape for n in (*found, *LINEAR)}
    assert found == {"k_rep": (4, 2), "v_rep": (4, 2), **LINEAR}
    mixer = getattr(model.layers[1], symbol.lower())
    assert np.array_equal(tensors[f"model.layers.1.{symbol.lower()}.proj_k.linearB.weight"], mixer.proj_k.linearB.kernel[...].T)
    keys = json.loads((tmp_path / "config.json").read_text())[f"{symbol.lower()}_config"]
    assert keys["kv_proj_rank"] == 3 and keys["kv_learnable_residual"] is True
    again = load_model(tmp_path)
    assert again.config == model.config and np.array_equal(again(IDS), model(IDS))


LINEAR = {
    "proj_k.linearA.weight": (3, 16),
    "proj_k.linearB.weight": (32, 3),
    "proj_v.linearA.weight": (3, 16),
    "proj_v.linearB.weight": (32, 3),
}


@pytest.mark.parametrize("how", ["transformers", "torch"])
@pytest.mark.parametrize("symbol, learned", [("GKA", True), ("GKA", False), ("GDN", True)])
def test_a_conversion_begins_as_without_the_expansion(symbol, learned, how):
    """The mixer with the same parameters and no expansion gives the same numbers; the first map is drawn, the second is 0."""
    source = tiny_model("*-*", **sized(symbol, kv_learnable_residual=learned))
    hybrid = initialize_hybrid(source, f"{symbol}-*", fresh_parameters=how)
    plain = tiny_model(f"{symbol}-*", **{symbol.lower(): OPTIONS[symbol]()})
    have = split_model(hybrid)[1]
    assert np.array_equal(hybrid(IDS), join_model(split_model(plain)[0], {n: have[n] for n in split_model(plain)[1]})(IDS))
    new = {n.split(".", 3)[3]: np.asarray(x) for n, x in have.items() if any(f".{e}" in n for e in EXPANSION)}
    assert len(new) == (6 if learned else 4)
    for x in "kv":
        assert not new[f"proj_{x}.linearB.kernel"].any() and new[f"proj_{x}.linearA.kernel"].std() > 0.1
        if learned:
            assert np.array_equal(new[f"{x}_rep"], np.kron(np.eye(2), np.ones((2, 1))))


def test_a_new_model_begins_so_too():
    model = new_model(tiny_config("GKA", **sized("GKA")), fresh_parameters="torch")
    assert not model.layers[0].gka.proj_v.linearB.kernel[...].any()


@pytest.mark.parametrize("symbol", OPTIONS)
def test_the_expansion_is_sharded_by_heads(symbol):
    axes = logical_axes(tiny_model(symbol, **sized(symbol, kv_learnable_residual=True)))
    found = {n.split(".", 3)[3]: x for n, x in axes.items() if ".proj_k" in n or "v_rep" in n}
    assert found == {
        "proj_k.linearA.kernel": ("kv_heads", None),
        "proj_k.linearB.kernel": (None, "heads"),
        "v_rep": ("heads", None),
    }


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(kv_learnable_residual=True), "gka_config.kv_learnable_residual = true has no effect without kv_proj_rank"),
        (dict(kv_proj_rank=0), "gka_config.kv_proj_rank must be an integer at least 1"),
        (
            dict(key_heads=2, value_heads=4),
            r"gka_config.key_heads, value_heads and value_size are given together, got \(2, 4, None\)",
        ),
        (dict(key_heads=3, value_heads=4, value_size=1), r"gka_config.value_heads \(4\) must be a multiple of key_heads \(3\)"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        GKAConfig(**options)


def test_a_rank_where_every_query_head_has_its_own_key_head_is_refused():
    with pytest.raises(
        ValueError, match="gdn_config.kv_proj_rank = 3 expands key heads to more heads, but both are 4; leave it out"
    ):
        tiny_config("*-GDN", num_kv_heads=4, **sized("GDN"))
    tiny_config("*-*", num_kv_heads=4, **sized("GDN"))  # nothing has it
    own = dict(key_heads=6, value_heads=6, value_size=4)
    with pytest.raises(ValueError, match="gka_config.kv_proj_rank = 3 expands key heads to more heads, but both are 6"):
        tiny_config("*-GKA", **sized("GKA", **own))


def test_plans_count_the_expansion_and_the_widths_of_heads_of_its_own():
    """A token is multiplied with 3 numbers for each channel of 2 key heads and of 4 heads, of keys and of values."""
    jobs = [Job(tiny_config("*-GKA", **changes), "decode", 64, 5) for changes in ({}, sized("GKA"))]
    assert flops_by_formula(jobs[1]) - flops_by_formula(jobs[0]) == 2 * 5 * 2 * 3 * (2 * 8 + 4 * 8)
    own = GKAConfig(key_heads=3, value_heads=6, value_size=4, state_size=5)
    config = tiny_config("*-GKA", gka=own, num_heads=6, num_kv_heads=2, vocab_size=64)
    with pytest.raises(ValueError, match="'tensor' divides width of gka.k_proj in 2 shards, which do not divide 15"):
        check_mesh_fits(config, abstract_mesh({"tensor": 2}), 4, 20)
    check_mesh_fits(config.with_pattern("*-*"), abstract_mesh({"tensor": 2}), 4, 20)


def test_a_gated_kalmanet_with_heads_of_its_own_is_exported_with_its_sizes_and_holds_its_state():
    own = GKAConfig(key_heads=2, value_heads=6, value_size=5, state_size=3)
    config = tiny_config("*-GKA", gka=own)
    written = config_to_hf(config)["gka_config"]
    sizes = ("num_q_heads", "num_k_heads", "num_v_heads", "head_dim", "key_heads", "value_heads", "value_size", "state_size")
    assert [written[name] for name in sizes] == [2, 2, 6, 5, 2, 6, 5, 3]
    assert config_from_hf(config_to_hf(config)) == config
    state = tiny_model("GKA", gka=own).init_state(2, 9)[0]
    assert [x.shape for x in state] == [(2, 6, 3, 3), (2, 6, 3, 5), (2, 3, 6), (2, 3, 6), (2, 3, 30)]


def test_attention_gives_a_gated_kalmanet_of_other_heads_its_values():
    """4 heads of 8 channels become 16 value heads of 2, whose values are those of the query heads."""
    own = GKAConfig(key_heads=4, value_heads=16, value_size=2)
    source = tiny_model("*", gka=own)
    got, have = initialize_hybrid(source, "GKA").layers[0].gka, source.layers[0].self_attn
    assert np.array_equal(got.q_proj.kernel[...], have.q_proj.kernel[...])
    values = np.repeat(have.v_proj.kernel[...].reshape(24, 2, 8), 2, axis=1).reshape(24, 32)
    assert np.array_equal(got.v_proj.kernel[...], values) and np.array_equal(got.o_proj.kernel[...], have.o_proj.kernel[...])
