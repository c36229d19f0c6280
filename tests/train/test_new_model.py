"""Training from scratch: the new model is the one that the config describes."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from hybrid_jax import load_model
from hybrid_jax.config import GKAConfig, Mamba3Config
from hybrid_jax.experiment import run_experiment
from hybrid_jax.parameters import split_model
from hybrid_jax.priming.initialize import new_model
from hybrid_jax.train import read_metrics
from tests.conftest import tiny_config


@pytest.fixture
def config(made_source):
    """An experiment that makes and trains a model of its own."""
    directory, text = made_source
    model = json.loads((directory / "config.json").read_text())
    pretrain = dict(objective="next_token", steps=2, batch_size=2, seq_len=32, log_every=1)
    data = {"text": text, "mix": {"text": 1.0}}
    return ConfigDict({"model": model, "schedule": ("pretrain",), "phases": {"pretrain": pretrain}, "data": data, "seed": 0})


def test_a_new_model_has_the_pattern_and_the_mixers_options_of_its_config_and_they_are_what_trains(config, tmp_path):
    config.update({"pattern": "GKA-*", "mixers": {"gka_config": {"num_iter": 3, "chunk_size": 16}}, "fresh_parameters": "torch"})
    for model in (run_experiment(config, tmp_path), tmp_path / "stages" / "00_initial"):
        found = load_model(model).config
        assert found.pattern == "GKA-*" and found.options(GKAConfig) == GKAConfig(num_iter=3, chunk_size=16)
    assert all(record["grad_norm/mixer"] > 0 for record in read_metrics(tmp_path))


def test_the_layers_of_a_new_model_cannot_be_selected_nor_taught_by_attention_that_it_does_not_have(config, tmp_path):
    config.select = ConfigDict({"mixer": "GKA"})
    with pytest.raises(ValueError, match="config.model is a new model; name its layers in config.pattern"):
        run_experiment(config, tmp_path)
    del config.select
    config.pattern = "GKA-*"
    config.phases.pretrain.update({"form": "fused", "objective": "align_mixer"})
    with pytest.raises(ValueError, match="phase 'pretrain': layer 0 of the fused model is 'GKA"):
        run_experiment(config, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_new_model_s_mixers_begin_as_their_layers_say_and_not_as_attention_is_converted(tmp_path):
    """Conversion sets Mamba-3's angles and biases to 0; a new Mamba-3 has angles, and biases of 1."""
    config = tiny_config("M3-*")
    for fresh_parameters in ("transformers", "torch"):
        found = split_model(new_model(config, fresh_parameters=fresh_parameters))[1]
        assert np.all(np.asarray(found["layers.0.mamba3.B_bias"]) == 1)
        assert np.abs(np.asarray(found["layers.0.mamba3.in_proj.kernel"])[:, -2:]).min() > 0  # the angles are last
    drawn = {how: split_model(new_model(config, fresh_parameters=how))[1] for how in ("transformers", "torch")}
    differs = {n for n, x in drawn["torch"].items() if not np.array_equal(x, drawn["transformers"][n])}
    assert differs and all(".mamba3." in n for n in differs)


def test_a_new_mamba3_s_steps_are_in_the_range_of_its_options():
    config = tiny_config("M3-M3").with_options(Mamba3Config(dt_min=0.2, dt_max=0.3))
    found = split_model(new_model(config))[1]
    dt = np.log1p(np.exp(np.stack([found[f"layers.{i}.mamba3.dt_bias"] for i in (0, 1)])))
    assert np.all((dt > 0.2) & (dt < 0.3)) and np.unique(dt).size == dt.size
    with pytest.raises(ValueError, match="mamba3_config.dt_min must be at most dt_max, got 0.5 and 0.1"):
        Mamba3Config(dt_min=0.5)
