"""The tables, pictures and pages of an evaluation."""

import json
import math
import pathlib
import re

import numpy as np
import pytest

from hybrid_jax.evaluate.evaluation import Evaluation
from hybrid_jax.evaluate.instruments import make_instrument
from hybrid_jax.evaluate.measured import SEVERAL, Measured, Target, over_repeats, read_measured, write_measured
from hybrid_jax.evaluate.measurement import Measurement, difference, exact, weighted_mean
from hybrid_jax.evaluate.report import first_table, notes, pictures, write_report
from hybrid_jax.evaluate.report.document import Code, Heading, Table, as_markdown
from hybrid_jax.evaluate.report.pictures import _legend
from hybrid_jax.evaluate.report.tables import difference_table, recovered, show

EVALUATION = Evaluation(
    {
        "text": make_instrument("text", {"instrument": "text", "rows": 4}),
        "pairs": make_instrument("pairs", {"instrument": "recall"}),
        "cost": make_instrument("cost", {"instrument": "cost"}),
    },
    {"text": "stdlib"},
)
NOISE = np.array([[-0.5], [0.5], [1.0], [-1.0]])  # what makes rows hard for every model


def row(name, pattern, loss, accuracy, run="", stage=0, path="", source="", rows=4):
    losses = loss + NOISE[:rows] * np.ones((1, 8))
    right = (np.arange(8) < 8 * accuracy) * np.ones((rows, 1))
    results = {
        "text": [
            weighted_mean("loss", losses, np.ones((rows, 8)), "nats/token"),
            *(
                weighted_mean("loss", losses[:, part], np.ones((rows, 4)), "nats/token", position=at)
                for part, at in ((slice(0, 4), 4), (slice(4, 8), 8))
            ),
        ],
        "pairs": [weighted_mean("accuracy", right, np.ones((rows, 8)), share=True)],
        "cost": [exact("parameters", 6_558_464), exact("state_bytes", 1536.0 * 1024, "bytes", tokens=1024)],
    }
    return Measured(Target(name, pathlib.Path(path or name), run, stage, source), pattern, "tok", results)


ROWS = [
    row("source", "*-*", 2.0, 1.0),
    row("GKA initial", "*-GKA", 4.0, 0.125, "GKA", 0),
    row("GKA train", "*-GKA", 2.1, 0.875, "GKA", 1),
    row("SWA initial", "*-SWA", 2.01, 1.0, "SWA", 0),
    row("SWA train", "*-SWA", 2.0, 1.0, "SWA", 1),
]


def test_recovery_is_the_share_of_what_stage_0_lost():
    assert recovered(ROWS[2], ROWS, "text") == pytest.approx(0.95)


def test_nothing_is_recovered_where_nothing_was_lost_nor_by_a_source_nor_by_stage_0():
    assert [recovered(ROWS[i], ROWS, "text") for i in (0, 1, 4)] == [None, None, None]


def test_the_first_table_has_a_line_per_model_and_the_headline_of_every_instrument():
    table = first_table(EVALUATION, ROWS)
    assert table.header == (
        "model", "pattern", "text: loss (nats/token)", "share of the lost loss recovered", "pairs: accuracy", "cost: parameters",
        "cost: state bytes at tokens 1,024",
    )  # fmt: skip
    assert table.rows[2][:4] == ("GKA train", "*-GKA", "2.100 ± 1.453", "95.0 %")
    assert table.rows[2][4].startswith("87.5 % (") and table.rows[2][5:] == ("6,558,464", "1.50 MiB")
    assert table.rows[0][3] == "–" and "`*-GKA`" in table.markdown() and len(table.markdown().splitlines()) == 2 + len(ROWS)
    assert r"2.100 $\pm$ 1.453" in table.latex() and r"95.0 \%" in table.latex() and "$*$-GKA" in table.latex()


def test_differences_are_of_the_same_rows_and_far_more_certain_than_the_two_numbers():
    one, other = (r.results["text"][0] for r in (ROWS[2], ROWS[0]))
    gap = difference(one, other)
    assert gap.value == pytest.approx(0.1) and gap.high - gap.low == pytest.approx(0, abs=1e-9)
    assert one.high - one.low > 1.5  # the rows differ much more than the models
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):  # the interval holds as often as it says
        hard, weights = rng.normal(size=(50, 1)), rng.integers(1, 9, (50, 1))
        first, second = (weighted_mean("loss", hard + at + 0.1 * rng.normal(size=(50, 1)), weights) for at in (0.3, 0.0))
        gap = difference(first, second)
        inside += gap.low <= 0.3 <= gap.high
    assert 0.90 < inside / 300 < 0.98
    always = weighted_mean("accuracy", np.ones((16, 8)), np.ones((16, 8)), share=True)
    equal = difference(always, always)  # two models that are always right: 16 rows do not prove them equal
    assert equal.value == 0 and equal.high == -equal.low == pytest.approx(1 - always.low)
    fewer = weighted_mean("loss", np.ones((3, 8)), np.ones((3, 8)))
    assert difference(one, fewer) is None and difference(one, ROWS[0].results["pairs"][0]) is None
    table = difference_table(EVALUATION, ROWS)
    assert table.header == ("difference", "text: loss (nats/token)", "pairs: accuracy")
    assert table.rows[1][:2] == ("GKA train − source", "+0.100 ± 0.000") and table.rows[1][2].startswith("-12.5 ± ")
    assert difference_table(EVALUATION, ROWS[:1]) is None


def test_a_run_s_recovery_is_of_its_own_source_whichever_model_comes_first():
    exported = row("export", "*-GKA", 3.0, 0.5, path="models/e")
    source = row("source", "*-*", 2.0, 1.0, path="models/../models/s")
    run = [
        row(name, "*-GKA", loss, 0.5, "r", n, source="models/s") for n, (name, loss) in enumerate((("start", 4.0), ("end", 2.5)))
    ]
    for models in ((exported, source), (source, exported)):
        assert recovered(run[1], [*models, *run], "text") == pytest.approx(0.75) and notes(EVALUATION, [*models, *run]) == []
    assert recovered(run[1], [exported, *run], "text") == pytest.approx(1.5)  # the only one, and it is said
    assert notes(EVALUATION, [exported, *run]) == ["what r recovered is of the loss to export; its own source is models/s."]
    other = row("other", "*-*", 2.0, 1.0, path="models/o")
    assert recovered(run[1], [exported, other, *run], "text") is None
    words = "what r recovered is not known: its source models/s is not among the models."
    assert words in notes(EVALUATION, [exported, other, *run])


def test_a_text_of_fewer_rows_than_asked_for_is_noted():
    assert notes(EVALUATION, [row("m", "*", 2.0, 1.0)]) == []
    want = "text: the held-out text has only 3 rows, not the 4 asked for; all of them were read."
    assert notes(EVALUATION, [row("m", "*", 2.0, 1.0, rows=3)]) == [want]


def test_seeds_are_not_called_rows():
    three = over_repeats("m (3 seeds)", [row("m", "*", loss, 1.0) for loss in (2.0, 2.1, 2.2)])
    assert three.results["text"][0].count == 3 and notes(EVALUATION, [three]) == []


def test_numbers_are_shown_with_their_unit_and_interval():
    assert show(Measurement("accuracy", 0.5, 0.4, 0.61, "share")) == "50.0 % (40.0–61.0)"
    assert show(exact("b", 512, "bytes")) == "512 bytes" and show(exact("b", 3 * 2**30, "bytes")) == "3.00 GiB"
    assert show(None) == "–" and show(Measurement("loss", float("nan"), 0, 0)) == "not a number"
    assert show(Measurement("prefill", 12345.6, 12000, 13000, "tokens/s")) == "12,346 ± 500"


def test_a_report_has_every_number_in_each_of_its_forms_and_one_page_without_other_files(tmp_path):
    grid = [
        weighted_mean("accuracy", np.eye(4)[:, :2], np.ones((4, 2)), share=True, depth=d, length=n)
        for d in (0, 1)
        for n in (64, 128)
    ]
    rows = [Measured(r.target, r.pattern, r.tokenizer, {**r.results, "pairs": [*r.results["pairs"], *grid]}) for r in ROWS]
    assert write_report(EVALUATION, rows, tmp_path, continuations=[("source", "a < b")]) == tmp_path / "report.md"
    names = {p.name for p in tmp_path.iterdir()}
    pictures = {"recovery.png", "text_loss_position.png", "pairs_accuracy_depth_and_length.png"}
    assert names == {"report.md", "report.html", "table.tex", "results.csv", "results.json", *pictures}
    page, html = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert all(f"({name})" in page for name in pictures) and html.count("data:image/png;base64,") == 3
    assert "a &lt; b" in html and 'src="http' not in html and "| position 8 |" in page and "| depth 1, length 128 |" in page
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows) * (3 + 5 + 2) and lines[1].startswith("source,*-*,,0,text,loss,,2.0,")
    assert read_measured(tmp_path / "results.json") == rows
    json.loads((tmp_path / "results.json").read_text())


def test_repetitions_are_one_line_with_student_s_interval():
    three = over_repeats("GKA (3 seeds)", [row("a", "*-GKA", loss, 0.5) for loss in (2.0, 2.2, 2.4)])
    loss = three.results["text"][0]
    assert loss.value == pytest.approx(2.2) and loss.count == 3 and loss.sums == ()
    assert loss.high - loss.value == pytest.approx(4.302653 * 0.2 / np.sqrt(3), rel=1e-5)
    share = over_repeats("x", [row("a", "*", 2.0, accuracy) for accuracy in (1.0, 0.75, 1.0)]).results["pairs"][0]
    assert share.value < share.high == 1.0 and 0 < share.low < 0.7
    assert three.pattern == "*-GKA" and over_repeats("x", [row("a", p, 2.0, 0.5) for p in ("*-GKA", "GKA-*")]).pattern == SEVERAL
    assert three.target.name == "GKA (3 seeds)" and three.results["cost"][0].low == 6_558_464


NAMES = ("a|b", "_m_", "a&b<i>x", 'quo"te', "$x_{$", "[z]", "*st*", "__init__")


def test_names_are_shown_as_they_are_in_every_form_of_a_table():
    table = Table(("model", *NAMES), [(name, "GDN>GKA", *NAMES[1:]) for name in NAMES], code=(1,))
    lines = table.markdown().splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(NAMES) + 2}  # as many cells in every line
    for mark in (r"a\|b", r"\_m\_", r"a\&b\<i>x", r"\$x\_{\$", r"\[z\]", r"\*st\*", r"\_\_init\_\_"):
        assert mark in lines[0] and any(line.startswith(f"| {mark} |") for line in lines[2:])
    latex = table.latex()
    for mark in (r"a\textbar{}b", r"\_m\_", r"a\&b\textless{}i\textgreater{}x", r"\$x\_\{\$", "{[}z]", "GDN\\textgreater{}GKA"):
        assert mark in latex
    assert not re.search(r"\\\\\s*\[", latex)  # LaTeX would read an option of the line break
    assert "a|b" in table.html() and "a&amp;b&lt;i&gt;x" in table.html()
    assert as_markdown([Heading("my_model _x_")]) == "## my_model \\_x\\_\n\n".removesuffix("\n")


def test_a_continuation_with_a_fence_of_its_own_ends_where_it_ends():
    assert as_markdown([Code("a\n```\nb")]) == "````\na\n```\nb\n````\n"


def test_pictures_name_every_model_whatever_characters_its_name_has(tmp_path, monkeypatch):
    legends = []
    monkeypatch.setattr(pictures, "_legend", lambda axis: legends.append(_legend(axis) or axis.get_legend()))
    write_report(EVALUATION, [row(name, "GDN>GKA", 2.0, 1.0) for name in NAMES], tmp_path)
    assert [[text.get_text() for text in legend.get_texts()] for legend in legends] == [list(NAMES)]


def test_many_curves_have_no_bands_and_a_picture_as_high_as_their_legend(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures.plt, "close", lambda figure: drawn.append(figure))
    measurements = [exact("loss", float(n), "nats/token", position=n) for n in (8, 16)]
    for models in (2, 30):
        rows = [Measured(Target(str(i), pathlib.Path("m")), "*", "tok", {"text": measurements}) for i in range(models)]
        assert pictures.draw_series(rows, "text", [m.key for m in measurements], tmp_path / f"{models}.png")
    few, many = drawn
    assert [len(figure.axes[0].collections) for figure in drawn] == [2, 0]
    legend = many.axes[0].get_legend().get_window_extent()
    assert few.get_figheight() == 4 and legend.y0 >= 0 and legend.y1 <= many.bbox.height


def test_a_heat_map_has_numbers_and_all_ticks_only_where_there_is_room(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures.plt, "close", lambda figure: drawn.append(figure.axes[0]))
    for layers in (3, 40):
        measurements = [exact("gather", 0.5, "share", layer=layer, head=head) for layer in range(layers) for head in range(4)]
        rows = [Measured(Target("m", pathlib.Path("m")), "*", "tok", {"mixing": measurements})]
        assert pictures.draw_series(rows, "mixing", [m.key for m in measurements], tmp_path / f"{layers}.png")
    small, large = drawn
    assert [len(a.texts) for a in drawn] == [12, 0] and small.get_ylabel() == "head" and small.get_xlabel() == "layer"
    assert [t.get_text() for t in large.get_xticklabels()] == [str(n) for n in range(0, 40, 3)]
    assert {t.get_rotation() for t in small.get_xticklabels()} == {0}
    names = [exact("composed", 0.5, "share", composition=name, tokens=n) for name in ("concat:soup", "sw:exact") for n in (1, 2)]
    rows = [Measured(Target("m", pathlib.Path("m")), "*", "tok", {"composed": names})]
    assert pictures.draw_series(rows, "composed", [m.key for m in names], tmp_path / "names.png")
    assert {t.get_rotation() for t in drawn[-1].get_xticklabels()} == {60}, "names are not written over each other"
    assert large.images[0].get_array().shape == (4, 40) and large.figure.get_figwidth() > 2 * small.figure.get_figwidth()


@pytest.mark.parametrize(
    "values, want",
    [
        ((1.543, 1.23e-3, -2e-5), ["1.54", "0.00", "-0.00"]),
        ((72.6, 3.5e-3), ["72.6", "0.0"]),
        ((100.0, 5.0), ["100", "5"]),
        ((0.0, 0.0), ["0", "0"]),
        ((2e8, 300.0), ["2e+08", "3e+02"]),
    ],
)
def test_numbers_of_a_heat_map_have_the_decimals_of_the_largest(values, want):
    assert [pictures._number_format(values)(v) for v in values] == want


def test_two_instruments_do_not_draw_into_one_picture(tmp_path):
    names = ("far.1", "far 1")
    evaluation = Evaluation({n: EVALUATION.instruments["text"] for n in names}, {"text": "stdlib"})
    one = row("m", "*", 2.0, 1.0)
    results = dict(zip(names, (one.results["text"], row("m", "*", 3.0, 1.0).results["text"]), strict=True))
    page = write_report(evaluation, [Measured(one.target, one.pattern, one.tokenizer, results)], tmp_path).read_text()
    drawn = re.findall(r"\((far.*\.png)\)", page)
    assert len(set(drawn)) == 2 and (tmp_path / drawn[0]).read_bytes() != (tmp_path / drawn[1]).read_bytes()


def test_a_model_that_an_instrument_did_not_measure_has_a_gap(tmp_path):
    most = Measured(ROWS[0].target, "*-*", "tok", {k: v for k, v in ROWS[0].results.items() if k != "pairs"})
    write_report(EVALUATION, [most, *ROWS[1:]], tmp_path)
    assert first_table(EVALUATION, [most, *ROWS[1:]]).rows[0][4] == "–"


def test_numbers_that_json_does_not_have_are_read_back_and_any_program_reads_the_file(tmp_path):
    one = row("m", "*", math.inf, 1.0, rows=1)
    write_measured([one], tmp_path / "r.json")
    json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    (read,) = read_measured(tmp_path / "r.json")
    assert read.results["text"][0].value == math.inf and math.isnan(read.results["text"][0].low)
