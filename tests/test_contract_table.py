"""The README's table of engines and contract lines, and what compares it with the run."""

from __future__ import annotations

from shmcache.testing import EngineConformance

from .conftest import FORMS
from .contract_table import BEGIN, COLUMNS, END, LINES, README, Results, differences, parse, table

WHOLE: Results = {
    (form, test): {"yes"} for forms in COLUMNS.values() for form in forms for tests in LINES.values() for test in tests.split()
}


def said(columns: dict[str, list[str]]) -> str:
    return BEGIN + table(columns) + END


def test_every_test_stands_in_one_line() -> None:
    """The lines of the table are made of all tests of the public suite, each once."""
    tests = [test for line in LINES.values() for test in line.split()]
    assert sorted(tests) == sorted(name[5:] for name in dir(EngineConformance) if name.startswith("test_"))
    assert {form for forms in COLUMNS.values() for form in forms} <= {form.id for form in FORMS}


def test_the_readme_has_the_table() -> None:
    """README has a cell for each engine and line, and no other."""
    found = parse(README.read_text())
    assert list(found) == list(COLUMNS)
    for cells in found.values():
        assert list(cells) == list(LINES)
        assert set(cells.values()) <= {"yes", "-"}


def test_a_table_that_drifted_is_found() -> None:
    """A cell that the run found otherwise, a line or a column left out, is a difference."""
    columns = {name: ["yes"] * len(LINES) for name in COLUMNS}
    assert list(differences(WHOLE, said(columns))) == []
    (found,) = differences(WHOLE | {("memory", "raw"): {"no"}}, said(columns))
    assert found == "README, memory, `raw`: '-' wanted, 'yes' found"
    (found,) = differences(WHOLE | {("posix-fast", "raw"): {"no"}}, said(columns))
    assert "'in part' wanted" in found
    del columns["redis"]
    assert len(list(differences(WHOLE, said(columns)))) == len(LINES)
    assert len(list(differences(WHOLE, "no table"))) == len(LINES) * len(COLUMNS)


def test_a_part_of_the_run_says_nothing() -> None:
    """An engine whose run was not whole, or failed, is not compared."""
    nothing = {name: ["-"] * len(LINES) for name in COLUMNS}
    results = {key: words for key, words in WHOLE.items() if key[1] != "raw"}
    assert list(differences(results, said(nothing))) == []
    assert list(differences({key: {"yes", "failed"} for key in WHOLE}, said(nothing))) == []
