"""The README's table "engine x contract line", made from what the conformance run found.

    pytest tests/test_conformance.py --contract-table       writes it; wants every engine of COLUMNS

Any run that went through the whole suite for an engine compares its column, and fails the session where the README
says something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- contract table -->\n", "<!-- end of contract table -->\n"

LINES = {
    "keys: str and bytes, 1 to 65,535 bytes, compared byte by byte": "bad_key key_str_and_bytes odd_keys",
    "values come back with their type; one refused changes nothing": "round_trip tuples_are_lists values_are_copies bad_value",
    "`ValueTooLarge`, and the old value stays": "too_large",
    "`get` `set` `add` `replace` `delete`": "get_default add_replace_delete add_has_one_winner",
    "`gets` `cas` `pop`; a token dies with any write": "pop cas cas_sees_changes cas_loses_nothing",
    "`append` `prepend`": "append_prepend",
    "`incr` `decr`, below zero too; no update lost": "incr_decr counter_threads",
    "text and bool are `NotANumber`": "not_a_number",
    "beyond signed 64 bits is `CounterOverflow`": "counter_overflow",
    "`ttl` of `incr` counts when it creates": "counter_lifetime",
    "processes count from an absent key and lose nothing": "counter_processes",
    "no `ttl`, None, 0: for ever; negative, NaN, over ten years: `ValueError`": "bad_ttl for_ever",
    "`ttl()`": "ttl_left",
    "`DEFAULT` stands for `default_ttl`": "default_ttl",
    "absent from its deadline on": "moment_of_expiry",
    "lifetimes to the millisecond, not rounded up to seconds": "subsecond",
    "expired is absent for every call, swept or not": "expired_is_absent",
    "`set` gives a new lifetime, `incr` and `append` keep it": "writes_and_lifetime",
    "`touch` `gat`": "touch",
    "`expire_at=`": "expire_at",
    "`get_many` `set_many` `delete_many`": "many many_items many_checks_first",
    "mapping protocol, `setdefault`, `update`": "mapping setdefault_update",
    "`keys` `items` `len` `delete_match`": "iteration globs iteration_under_writes items_deleted_meanwhile",
    "`clear` `clean`": "clear clean clean_counts_expired",
    "`get_or_set`: one filler among threads": "get_or_set get_or_set_threads nested",
    "`get_or_set`: one filler among processes": "get_or_set_processes",
    "a filler that fails, dies, is late or interrupted": "factory_fails filler_dies lease_ends fill_interrupted",
    "`grace`: the old value while one refills": "grace",
    "`memoize`, of coroutines too": "memoize memoize_key memoize_async memoize_processes",
    "`lock`: one holder, a growing token": "lock lock_excludes lock_arguments",
    "a lock ends by its lease, not by fork or interrupt": "lock_lease lock_and_fork lock_interrupted",
    "`namespace`, its `clear()` in O(1)": (
        "namespace namespace_iteration namespace_generation namespace_recipes namespace_threads"
    ),
    "`stats`": "stats stats_items",
    "`raw`": "raw",
    "one object for threads; `with`, `close`, repr": "threads truth_and_repr context_manager",
}
"""Contract line -> tests of shmcache.testing, without their `test_`; each test stands in one line."""

COLUMNS = {
    "posix": ("posix-fast", "posix-semaphore"),
    "sysv": ("sysv-fast", "sysv-semaphore"),
    "anon": ("anon-fast", "anon-semaphore"),
    "memory": ("memory",),
    "memcached": ("memcached",),
    "redis": ("redis",),
    "redis+cluster": ("redis+cluster",),
    "tiered, memcached": ("tiered:memcached",),
    "tiered, redis": ("tiered:redis",),
}
"""Column -> forms of conftest.FORMS."""

Results = dict[tuple[str, str], set[str]]
"""(form, test) -> words: "yes", or "no" for a test that wanted what the engine does not claim, or "failed"."""


def column(results: Results, name: str) -> list[str] | None:
    """The cells of a column, from top to bottom; None if the run left out a test of it, or one failed."""
    cells = []
    for tests in LINES.values():
        words: set[str] = set()
        for form in COLUMNS[name]:
            for test in tests.split():
                words |= results.get((form, test), {"failed"})
        if "failed" in words:
            return None
        cells.append("yes" if words == {"yes"} else "-" if words == {"no"} else "in part")
    return cells


def table(columns: dict[str, list[str]]) -> str:
    rows = [["", *columns], ["---", *("---" for _ in columns)]]
    rows += [[line, *(cells[i] for cells in columns.values())] for i, line in enumerate(LINES)]
    return "".join("| " + " | ".join(row).strip() + " |\n" for row in rows)


def parse(text: str) -> dict[str, dict[str, str]]:
    """Column -> line -> cell, of the table in a README."""
    body = re.search(re.escape(BEGIN) + "(.*)" + re.escape(END), text, re.DOTALL)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in body[1].splitlines()] if body else [[""]]
    return {name: {row[0]: row[i] for row in rows[2:]} for i, name in enumerate(rows[0]) if i}


def differences(results: Results, text: str) -> Iterator[str]:
    """What the README's table says otherwise than the run, of the columns that the run went through."""
    said = parse(text)
    for name in COLUMNS:
        cells = column(results, name)
        if cells is not None:
            for line, cell in zip(LINES, cells, strict=True):
                found = said.get(name, {}).get(line)
                if found != cell:
                    yield f"README, {name}, {line}: {cell!r} wanted, {found!r} found"


class Plugin:
    """Gathers the conformance run, on the controller of a distributed one."""

    def __init__(self, config: pytest.Config) -> None:
        self.write = bool(config.getoption("--contract-table"))
        self.results: Results = {}
        self.lines: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        found: Any = item
        if call.when == "call" and getattr(found.cls, "__name__", "") == "TestConformance":
            form = str(found.callspec.params["form"])
            word = "failed" if call.excinfo else "no" if found.instance.missing else "yes"
            item.user_properties.append(("contract", [form, found.originalname.removeprefix("test_"), word]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            for name, value in report.user_properties:
                if name == "contract":
                    form, test, word = value  # type: ignore[misc]
                    self.results.setdefault((form, test), set()).add(word)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return
        text = README.read_text()
        if self.write:
            columns = {name: cells for name in COLUMNS if (cells := column(self.results, name)) is not None}
            if len(columns) < len(COLUMNS):
                self.lines = [f"README not written: no whole run of {', '.join(COLUMNS.keys() - columns)}"]
            else:
                start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
                README.write_text(text[:start] + table(columns) + text[end:])
                return
        self.lines += differences(self.results, text)
        if self.lines:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for line in self.lines:
            terminalreporter.write_line(line, red=True)
