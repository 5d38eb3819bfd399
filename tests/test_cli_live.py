"""What is shown again and again: each line when it is there, and of the segment that has the name by then."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice

import pytest

import shmcache

if importlib.util.find_spec("typer") is None or importlib.util.find_spec("rich") is None:
    pytest.skip("typer and rich are not installed", allow_module_level=True)

from shmcache.cli.app import followed
from shmcache.cli.output import Column, Format, Output
from shmcache.cli.top import _lines

from .cli_help import run


@pytest.fixture
def url(unique_name: Callable[[], str]) -> Iterator[str]:
    """The URL of a segment of one item."""
    url = f"posix:///{unique_name()}"
    with shmcache.open(url, size="1M") as engine:
        engine.set("k", 1)
    try:
        yield url
    finally:
        run("rm", url)


@pytest.mark.parametrize("command", [("stats", "--watch"), ("top", "--interval")])
def test_a_pipe_gets_each_line_at_once(command: tuple[str, str], url: str) -> None:
    """Who reads a pipe sees a line before the next is due, though the command goes on."""
    name, option = command
    shell = [sys.executable, "-m", "shmcache", name, url, option, "0.1"]
    with subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/") as child:
        assert child.stdout is not None
        lines = list(islice(child.stdout, 3))
        assert child.poll() is None
        child.kill()
    assert [len(line.split("\t")) for line in lines] == [len(lines[0].split("\t"))] * 3


@pytest.mark.parametrize("fmt", [Format.TABLE, Format.TSV, Format.JSON, Format.CSV])
def test_a_live_row_is_out_before_the_next_is_asked_for(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each format writes a live row, and flushes it, before it asks for another."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))

    def rows() -> Iterator[tuple[int]]:
        for n in range(1000, 1005):
            yield (n,)
            assert str(n) in raw.getvalue().decode()

    assert Output(fmt).rows([Column("n")], rows(), live=True) == 5


def test_a_segment_made_anew_is_followed(url: str) -> None:
    """top and stats --watch go on with the segment that took the name of the one they began with."""
    with followed(url, "top") as current:
        lines = _lines(current, 0.01, None)
        assert next(lines)[-3] == 1
        assert run("rm", url).code == 0
        assert next(lines)[-3] == 1, "the old one is still mapped"
        with shmcache.open(url, size="1M") as engine:
            for i in range(7):
                engine.set(f"k{i}", i)
        row = next(lines)
        assert row[-3] == 7
        assert row[3] > 0, "sets of the new one count from 0"


def test_a_segment_resized_is_followed(url: str) -> None:
    """A resize is a segment of another size under the name: the view of it is the new one's."""
    with followed(url, "top") as current:
        assert current().header["size"] == 1 << 20
        assert run("resize", url, "--size", "2M").code == 0
        assert current().header["size"] == 2 << 20
        assert [item.key for item in current().items()] == ["k"]
