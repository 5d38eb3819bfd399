"""dump: that it streams, whatever the format."""

from __future__ import annotations

import importlib.util
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

import shmcache
from shmcache.inspect import View

if importlib.util.find_spec("typer") is None or importlib.util.find_spec("rich") is None:
    pytest.skip("typer and rich are not installed", allow_module_level=True)

from shmcache.cli import dump
from shmcache.cli.output import Format, Output

from .scenes import found

ITEMS = 15_000


@pytest.fixture(scope="module")
def view() -> Iterator[View]:
    """A view of a segment of 15,000 items, whose rows take over 5 MiB as Python objects."""
    name = f"t{os.getpid()}-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}-dump"
    engine = shmcache.open(f"posix:///{name}", size="16M")
    for i in range(ITEMS):
        engine.set(f"{i:08}" + "k" * 100, i)
    try:
        with View(found(f"posix:{name}")) as opened:
            yield opened
    finally:
        engine.unlink()
        engine.close()


def peak_of(call: Callable[[], object]) -> int:
    """Bytes of Python objects at their most during a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_rows_kept_are_large(view: View) -> None:
    """What the next test rests on: all rows at once take many times the memory that streaming is allowed."""
    assert peak_of(lambda: [dump._row(item) for item in view.items()]) > 5 << 20


@pytest.mark.parametrize("fmt", Format)
def test_memory_does_not_grow_with_the_items(fmt: Format, view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each format is written as the segment is walked: never more than a bucket group and a screenful in memory."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        monkeypatch.setattr(sys, "stdout", nowhere)
        out = Output(fmt)
        rows = (dump._row(item) for item in view.items())
        peak = peak_of(lambda: out.rows(list(dump.COLUMNS), rows))
    assert peak < 2 << 20
