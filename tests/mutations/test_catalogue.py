"""The catalogue of mutations applies to the code as it is; with `-m long`, the tests notice the mutations."""

import pytest

from tests.mutations import ROOT, catalogue
from tests.mutations.__main__ import outcomes


def test_every_mutation_applies_to_the_code_and_names_tests_that_exist():
    mutations = catalogue()
    assert len({(m.file, m.old, m.new) for m in mutations}) == len(mutations)
    for m in mutations:
        assert m.old != m.new and (ROOT / m.file).read_text().count(m.old) == 1, f"{m.file}: {m.old!r} ({m.why})"
        assert m.tests, m
        for test in m.tests:
            file, *names = test.split("::")
            text = (ROOT / file).read_text()
            assert all(f"def {name.partition('[')[0]}(" in text for name in names), f"{test} does not exist ({m.why})"


@pytest.mark.long
def test_the_tests_notice_at_least_95_percent_of_150_mutations():
    found = outcomes(catalogue(), processes=2)
    survived = [f"{o.mutation.file}: {o.mutation.why} {o.error}" for o in found if not o.noticed_by]
    assert len(found) >= 150 and len(survived) <= 0.05 * len(found), survived
