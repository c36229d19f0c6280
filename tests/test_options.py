"""An option that a command accepts, or a field that a config has, reaches what it is for."""

import types

import numpy as np
import pytest
from tokenizers import Tokenizer, models

import hybrid_jax.convert
import hybrid_jax.data
import hybrid_jax.experiment
import hybrid_jax.selection.select
from hybrid_jax import load_model, save_model
from hybrid_jax.commands.main import main
from hybrid_jax.config import GKAConfig, SWAConfig
from hybrid_jax.experiment_config import Experiment
from hybrid_jax.parameters import split_model
from hybrid_jax.selection.scorers.contract import Scores
from hybrid_jax.selection.select import Selection
from hybrid_jax.train import Phase
from tests.conftest import tiny_config, tiny_model


def test_select_scores_what_its_options_say_and_prints_the_cheapest(monkeypatch, capsys):
    seen = {}
    model = types.SimpleNamespace(config=types.SimpleNamespace(extra={"eos_token_id": 7}))

    def load(source, dtype, mesh):
        seen["source"] = source
        return model

    def corpus(data, source, *_):
        seen["text"] = (data["text"], source)

    def scores(_, __, selection, mesh=None):
        seen["selection"] = selection
        return Scores([0.3, 0.1, 0.2, 0.4], "nats")

    monkeypatch.setattr(hybrid_jax.convert, "check_model_directory", lambda _: tiny_config("*-*-*-*"))
    monkeypatch.setattr(hybrid_jax.convert, "load_model", load)
    monkeypatch.setattr(hybrid_jax.data, "load_tokenizer", lambda _: Tokenizer(models.BPE()))
    monkeypatch.setattr(hybrid_jax.data, "read_corpus", corpus)
    monkeypatch.setattr(hybrid_jax.selection.select, "score_layers", scores)
    options = ["--mixer", "GDN", "--fraction", "0.75", "--window", "9", "--rows", "5", "--seq-len", "77", "--text", "t"]
    assert main(["select", "src", *options]) == 0
    assert seen == {
        "source": "src",
        "text": ("t", "src"),
        "selection": Selection("GDN", 0.75, options=dict(window=9, rows=5, seq_len=77)),
    }
    assert capsys.readouterr().out == "GDN-GDN-GDN-*\n"
    assert main(["select", "src", "--seq-len", "257"]) == 1
    assert "--seq-len 257 is more than the model's max_position_embeddings, 256" in capsys.readouterr().err


def test_prime_passes_its_config_its_directory_and_the_steps_to_trace(monkeypatch, capsys):
    seen = []

    def run(*arguments):
        seen.extend(arguments)
        return "out"

    monkeypatch.setattr(hybrid_jax.experiment, "run_experiment", run)
    command = ["prime", "--config=prime_tiny.py:GDN", "--workdir=w", "--profile=3:5", "--config.seed=9", "--config.mesh.fsdp=2"]
    assert main(command) == 0
    config, *others = seen
    assert others == ["w", (3, 5)] and (config.seed, config.mesh.fsdp, config.select.mixer) == (9, 2, "GDN")
    assert capsys.readouterr().out == "model: out\n"


def test_convert_draws_new_parameters_from_its_seed(tmp_path):
    save_model(tiny_model("*-*"), tmp_path / "source")
    drawn = {}
    for name, seed in (("a", 1), ("b", 2)):
        assert main(["convert", str(tmp_path / "source"), str(tmp_path / name), "--pattern", "*-GDN", "--seed", str(seed)]) == 0
        drawn[name] = {n: np.asarray(v) for n, v in split_model(load_model(tmp_path / name))[1].items()}
    differ = {n for n, v in drawn["a"].items() if not np.array_equal(v, drawn["b"][n])}
    assert differ and all(".gdn." in n for n in differ)


def test_the_mixers_of_a_config_take_the_place_of_the_model_s():
    config = Experiment(mixers={"swa_config": {"window_size": 5}, "gka_config": {"num_iter": 3}}).with_mixer_options(
        tiny_config("*-SWA-GKA")
    )
    assert config.options(SWAConfig).window_size == 5 and config.options(GKAConfig).num_iter == 3
    assert tiny_config("*-SWA-GKA").options(SWAConfig).window_size == 6  # the model's own


def test_an_option_that_the_mixers_of_a_config_leave_out_stays_the_model_s():
    sized = tiny_config("*-GKA").with_options(GKAConfig(num_iter=7, state_size=6))
    options = Experiment(mixers={"gka_config": {"num_iter": 3}}).with_mixer_options(sized).options(GKAConfig)
    assert (options.num_iter, options.state_size) == (3, 6)


@pytest.mark.parametrize(
    "pattern, mixers, parameter",
    [
        ("*-GKA", {"gka_config": {"state_size": 6}}, "layers.1.gka"),
        ("*-GDN[1]", {"head_hybrid_config": {"merge": "sum"}}, "layers.1.gdn"),
    ],
)
def test_options_that_ask_for_other_parameters_than_a_hybrid_has_are_refused(pattern, mixers, parameter):
    with pytest.raises(ValueError, match=f"already a hybrid: {parameter}"):
        Experiment(mixers=mixers).with_mixer_options(tiny_config(pattern))
    with_attention = tiny_config("*-*")
    assert Experiment(mixers=mixers).with_mixer_options(with_attention).mixers  # they are for layers that are still attention


def test_a_phase_s_own_mix_and_mesh_go_before_the_experiment_s():
    experiment = Experiment(data=dict(mix=dict(text=1.0)), mesh=dict(fsdp=1))
    plain = Phase("next_token", steps=1)
    own = Phase("next_token", steps=1, mix={"retrieval": 0.5, "text": 0.5}, mesh={"seq": 1, "fsdp": -1})
    assert experiment.mix_of(plain) == {"text": 1.0} and experiment.mix_of(own) == {"retrieval": 0.5, "text": 0.5}
    assert experiment.mesh_of(plain) is not None and Experiment().mesh_of(plain) is None
    assert Experiment().mesh_of(own) is not None


def test_rows_longer_than_the_model_s_positions_are_refused_unless_a_phase_raises_them():
    def check(*phases):
        named = tuple((f"p{i}", Phase("next_token", steps=1, **p)) for i, p in enumerate(phases))
        Experiment(phases=named)._check_phases(tiny_config("*"))

    check(dict(seq_len=256), dict(seq_len=512, max_position_embeddings=512), dict(seq_len=512))
    with pytest.raises(ValueError, match="phase 'p1': seq_len 257 is more than the model's max_position_embeddings, 256"):
        check(dict(seq_len=256), dict(seq_len=257))
