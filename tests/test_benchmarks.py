"""Results of benchmarks are files with versions and machine, and the guides quote them word for word."""

import re

import pytest

from kernels_pallas.recorded import recorded, versions, without_out
from tests.conftest import ROOT, guides

RESULTS = ROOT / "tests" / "benchmarks"
# In a guide a result is a ```text block after a sentence with a link to its file.
QUOTED = re.compile(r"\]\((?:\.\./)*tests/benchmarks/([\w.]+)\)(?:(?!```).)*?```text\n(.*?)```", re.DOTALL)


def quotations():
    return [(guide, name, block) for guide in guides() for name, block in QUOTED.findall(guide.read_text())]


def test_what_is_printed_is_kept_with_the_command_the_versions_and_the_machine(tmp_path, capsys):
    with recorded(str(tmp_path / "new" / "x.txt"), "some.bench", ["--cores", "1"]):
        print("a table")
    kept = (tmp_path / "new" / "x.txt").read_text().splitlines()
    assert kept[0] == "# python -m some.bench --cores 1" and versions() in kept[1] and "cores of" in kept[2]
    assert kept[3:] == ["a table"] and capsys.readouterr().out == "a table\n"


def test_a_benchmark_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), recorded(str(tmp_path / "x.txt"), "some.bench", []):
        print(1 / 0)
    assert not list(tmp_path.iterdir())


def test_the_command_of_a_record_does_not_name_its_file():
    assert without_out(["--out", "a", "--cores", "1", "--out=b"]) == ["--cores", "1"]


def test_guides_quote_results_word_for_word_and_every_result_is_quoted():
    found = quotations()
    for guide, name, block in found:
        assert block in (RESULTS / name).read_text(), f"{guide}: not what {name} says"
    assert {name for _, name, _ in found} == {p.name for p in RESULTS.glob("*.txt")}
    for path in RESULTS.glob("*.txt"):
        head = path.read_text().splitlines()[:3]
        assert head[0].startswith("# python -m ") and "Python 3" in head[1] and "cores of" in head[2], path
