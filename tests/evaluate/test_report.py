"""The table of an evaluation."""

import pytest

from hybrid_jax.evaluate.evaluation_report import Row, markdown_table, notes, recovered

ROWS = [
    Row("source", "s", "*-*", 2.0, 1.0),
    Row("GKA initial", "a", "*-GKA", 4.0, 0.1, "GKA", 0),
    Row("GKA train", "b", "*-GKA", 2.1, 0.9, "GKA", 1),
    Row("SWA initial", "c", "*-SWA", 2.01, 1.0, "SWA", 0),
    Row("SWA train", "d", "*-SWA", 2.0, 1.0, "SWA", 1),
]


def test_recovery_is_the_share_of_what_stage_0_lost():
    assert recovered(ROWS[2], ROWS) == pytest.approx(0.95)


def test_nothing_is_recovered_where_nothing_was_lost_nor_by_a_source_nor_by_stage_0():
    assert [recovered(ROWS[i], ROWS) for i in (0, 1, 4)] == [None, None, None]


def test_the_table_has_a_line_a_model():
    lines = markdown_table(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS) and "95.0 %" in lines[4] and "90.0 %" in lines[4] and "`*-GKA`" in lines[4]


def test_a_run_s_recovery_is_of_its_own_source_whichever_model_comes_first():
    exported = Row("export", "models/e", "*-GKA", 3.0, 0.5)
    source = Row("source", "models/../models/s", "*-*", 2.0, 1.0)
    stages = (("initial", 4.0), ("end", 2.5))
    run = [Row(name, name, "*-GKA", loss, 0.5, "r", n, "", "models/s") for n, (name, loss) in enumerate(stages)]
    for models in ((exported, source), (source, exported)):
        assert recovered(run[1], [*models, *run]) == pytest.approx(0.75) and notes([*models, *run]) == []
    assert recovered(run[1], [exported, *run]) == pytest.approx(1.5)  # the only one, and it is said
    assert notes([exported, *run]) == ["what r recovered is of the loss to export; its own source is models/s."]
    other = Row("other", "models/o", "*-*", 2.0, 1.0)
    assert recovered(run[1], [exported, other, *run]) is None
    assert "what r recovered is not known: its source models/s is not among the models." in notes([exported, other, *run])


def test_a_text_of_fewer_rows_than_asked_for_is_noted():
    row = Row("m", "m", "*", 2.0, 1.0, text_rows=5)
    assert notes([row], 5) == [] and notes([Row("m", "m", "*", 2.0, 1.0)], 6) == []
    assert notes([row], 6) == ["the held-out text has only 5 rows, not the 6 asked for; all of them were read."]
