"""The commands that look, on segments in every state: they answer, take no guard, and write no byte."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shmcache
from shmcache.catalog import Found
from shmcache.inspect import View
from shmcache.web import Live

if importlib.util.find_spec("typer") is None or importlib.util.find_spec("rich") is None:
    pytest.skip("typer and rich are not installed", allow_module_level=True)

from shmcache.cli.output import Code

from .cli_help import opened, run
from .scenes import found, overwrite, scribble, segment_bytes, stopped_writer, without_semaphores
from .shm_help import die_inside

COMMANDS = [
    ("info",), ("stats",), ("stats", "--lifetimes"), ("stats", "--watch", "0.05", "--count", "1"),
    ("stats", "--format", "prometheus"), ("dump",), ("dump", "--values", "--expired"),
    ("dump", "--sort", "-size", "--limit", "3"), ("guards",), ("guards", "--workers"),
    ("check",), ("top", "--count", "1", "--interval", "0.1"), ("distribution",),
    ("bigkeys",), ("bigkeys", "--hot"),
]  # fmt: skip
FORMS = ["posix", "sysv"]
KINDS = ["fast", "semaphore"]


def answers(row: Found, to: Path) -> dict[str, int]:
    """Exit codes of every command that looks at a segment, each run with the segment's bytes the same before and after."""
    name = f"{row.form}:{row.name}"
    commands = [(word, name, *rest) for word, *rest in COMMANDS]
    commands += [("ls",), ("get", name, "user:1"), ("ttl", name, "user:1"), ("save", name, str(to / "s.snap"))]
    commands += [("report", name, "--interval", "0.05", "-o", str(to / "r.html"))]
    codes = {}
    before = segment_bytes(row)
    for args in commands:
        codes[" ".join((args[0], *args[2:3])).replace(str(to), "").split("/")[0].strip()] = run(*args).code
        assert segment_bytes(row) == before or None, args  # None: pytest would compare megabytes for the message
    with contextlib.suppress(shmcache.ShmCacheError), contextlib.closing(Live(name, 1, None)) as live:
        codes["web"] = 0 if live.page().startswith("<!doctype html>") else 1
    assert segment_bytes(row) == before or None, "web"
    return codes


@pytest.fixture(params=FORMS)
def row(request: pytest.FixtureRequest, unique_name: Callable[[], str]) -> Iterator[Found]:
    """A segment of five items that no process has attached."""
    for engine in opened(f"{request.param}:///{unique_name()}", guards=2):
        yield found(f"{request.param}:{engine.url.path}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_stopped_holder(form: str, kind: str, unique_name: Callable[[], str], tmp_path: Path) -> None:
    """With a writer stopped inside its guard every command answers as on a sound segment, and the guard stays his."""
    for engine in opened(f"{form}:///{unique_name()}", size="28M", guards=1, guard=kind):
        row = found(f"{form}:{engine.url.path}")
        with View(row) as view, stopped_writer(str(engine.url.without_options()), view) as child:
            codes = answers(row, tmp_path)
            assert set(codes.values()) == {0}, codes
            (held,) = [g for g in view.guards() if g.state != "free"]
            assert (held.state, held.pid) == ("stopped", child.pid)
            assert "Writers of shard 0 cannot go on" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_holder(kind: str, unique_name: Callable[[], str], tmp_path: Path) -> None:
    """After a writer's death inside its guard every command answers, and recovery is left to the next writer."""
    for engine in opened(f"posix:///{unique_name()}", guards=1, guard=kind):
        with shmcache.open(engine.url, mode="a") as writer:
            die_inside(writer, range(1))  # type: ignore[arg-type]
        row = found(f"posix:{engine.url.path}")
        codes = answers(row, tmp_path)
        assert set(codes.values()) == {0}, codes
        with View(row) as view:
            assert [g.state for g in view.guards()] == ["dead"]


def test_nobody_attached(row: Found, tmp_path: Path) -> None:
    """On a segment that nobody has attached every command answers."""
    codes = answers(row, tmp_path)
    assert set(codes.values()) == {0}, codes


def test_without_semaphores(row: Found, tmp_path: Path) -> None:
    """On a segment whose semaphores are gone every command answers; check names it."""
    without_semaphores(row)
    codes = answers(row, tmp_path)
    assert codes.pop("check") == Code.DAMAGED
    assert set(codes.values()) == {0}, codes
    assert "The semaphores are gone" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("seed", range(2))
def test_scribbled_over(seed: int, row: Found, tmp_path: Path) -> None:
    """On a segment with rot all over every command answers, with what is left or by saying what is wrong."""
    scribble(row, seed)
    codes = answers(row, tmp_path)
    assert codes.pop("check") == Code.DAMAGED
    assert {codes.pop("get user:1"), codes.pop("ttl user:1")} <= {Code.OK, Code.ABSENT}
    assert set(codes.values()) == {0}, codes


@pytest.mark.parametrize(("at", "data", "word"), [
    (8, struct.pack("<I", 77), "other-layout"), (0, b"NOTOURS!", "invalid"), (40, b"\xff" * 8, "invalid"),
])  # fmt: skip
def test_another_header(at: int, data: bytes, word: str, row: Found, tmp_path: Path) -> None:
    """Of a segment whose header cannot be believed every command says so and ends with 5; ls and info say what it is."""
    sem_id = row.header["sem_id"]
    before = segment_bytes(row)[:4096]
    overwrite(row, at, data)
    try:
        codes = answers(row, tmp_path)
        assert codes.pop("ls") == 0
        assert codes.pop("stats --format") == 0, "a scrape says up 0"
        assert set(codes.values()) == {Code.DAMAGED}, codes
        assert run("info", f"{row.form}:{row.name}", "--json").objects[0]["status"] == word
    finally:
        overwrite(row, 0, before)
    assert found(f"{row.form}:{row.name}").header["sem_id"] == sem_id


def test_the_mapping_is_read_only(row: Found) -> None:
    """A view maps the segment without the right to write: the processor would refuse a store."""
    with View(row):
        name = f"/dev/shm/shmcache.{row.name}" if row.form == "posix" else f"/SYSV{row.shm_key:08x}"
        lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if name in line]
        inode = os.stat(name).st_ino if row.form == "posix" else row.shm_id
        assert [line.split()[1] for line in lines if line.split()[4] == str(inode)] == ["r--s"]
