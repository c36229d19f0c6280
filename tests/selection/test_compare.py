"""`select --compare`: the table, the files, and what the command passes on."""

import csv
import dataclasses

import numpy as np
import pytest

from hybrid_jax import save_model
from hybrid_jax.commands.main import main
from hybrid_jax.data.tokenizer import save_tokenizer
from hybrid_jax.selection.compare import Compared, agreement, comparison_table
from hybrid_jax.selection.scorers import SCORERS
from hybrid_jax.selection.scorers.contract import Scores
from tests.conftest import tiny_model


@dataclasses.dataclass(frozen=True)
class Toy:
    """Layers cost 0, 1, 2, ..."""

    def check(self, config, mesh): ...

    def forward_passes(self, config):
        return 2.5 * config.num_layers

    def costs(self, config):
        return np.arange(float(config.num_layers))

    def score(self, model, corpus, mesh):
        return Scores(self.costs(model.config), "toys")


class OfHeads(Toy):
    """The last layers' heads cost least."""

    of_heads, forward_passes = True, None

    def costs(self, config):
        return -np.arange(float(config.num_layers * config.num_heads)).reshape(config.num_layers, config.num_heads)


@pytest.fixture
def toys(monkeypatch, tokenizer, tmp_path):
    """Toys in place of the published scorer and of that of heads, a model of four layers, and a text."""
    for name in list(SCORERS):
        monkeypatch.delitem(SCORERS, name)
    for name, toy in (("swa_retrieval", Toy), ("uniform", Toy), ("head_ablation", OfHeads)):
        monkeypatch.setitem(SCORERS, name, f"{__name__}:{toy.__name__}")
    save_model(tiny_model("*-*-*-*", vocab_size=tokenizer.get_vocab_size()), tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model", 256)
    (tmp_path / "text.txt").write_text("abc def " * 50)
    return [str(tmp_path / "model"), f"--text={tmp_path / 'text.txt'}"]


def test_the_command_compares_scorers_with_the_published_one_and_writes_table_numbers_and_picture(toys, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["select", *toys, "--compare", "uniform,head_ablation", "--mixer=GDN", "--fraction=0.5", f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    lines = list(csv.DictReader((out / "comparison.csv").open()))
    assert [line["scorer"] for line in lines] == ["swa_retrieval", "uniform", "head_ablation", "head_ablation, of heads"]
    assert [line["agreement"] for line in lines] == ["+1.00", "+1.00", "-1.00", "–"]
    assert [line["layers in common"] for line in lines] == ["2 of 2", "2 of 2", "0 of 2", "–"]
    assert [line["pattern"] for line in lines] == ["GDN-GDN-*-*", "GDN-GDN-*-*", "*-*-GDN-GDN", "*-*-GDN-GDN"]
    assert [line["forward passes"] for line in lines] == ["10.0", "10.0", "–", "–"]
    assert "| uniform | toys | 10.0 |" in printed and "Kendall" in printed
    costs = list(csv.reader((out / "scores.csv").open()))
    assert ["uniform", "3", "", "3.0", "", "toys"] in costs and ["head_ablation", "1", "2", "-6.0", "", "toys"] in costs
    assert (out / "scores.png").stat().st_size > 1000 and "scores.png" in (out / "comparison.md").read_text()


def test_options_that_compare_nothing_are_refused(toys, capsys):
    for options, message in (
        (["--out=x"], "--out is where --compare writes"),
        (["--budget=bytes", "--state-bytes=9", "--tokens=9", "--fraction=0.5"], "leave --fraction out"),
        (["--compare", "--budget=heads"], "leave --budget, --state-bytes and --tokens out"),
        (["--compare", "--tokens=9"], "leave --budget, --state-bytes and --tokens out"),
        (["--compare", "nothing"], "--compare must be one of"),
        (["--compare", "--option=step=2"], "unknown key 'step'"),
        (["--compare", "--scorer=uniform"], "--compare names the scorers itself: --compare uniform"),
        (["--compare", "--fraction=0.1"], "--fraction 0.1 of 4 layers is none"),
    ):
        assert main(["select", *toys, *options]) == 1
        assert message in capsys.readouterr().err, options


def test_heads_are_kept_only_beside_a_recurrent_mixer_and_equal_costs_agree_with_nothing():
    flat = np.zeros(2)
    assert np.isnan(agreement(flat, np.arange(2.0)))
    compared = [
        Compared("swa_retrieval", Scores(np.arange(2.0), "nats"), 1.25, 3.5, "SWA-*"),
        Compared("toy", Scores(flat, "toys"), 0.0, None, "SWA-*"),
    ]
    table = comparison_table(compared)
    assert table.rows[0][2:5] == ("3.5", "1.2", "+1.00") and table.rows[1][2:5] == ("–", "0.0", "–") and len(table.rows) == 2
