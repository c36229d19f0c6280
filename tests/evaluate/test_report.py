"""The table of an evaluation."""

import pytest

from hybrid_jax.evaluate.report import Row, markdown_table, recovered

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
