"""What the tests of the command line share: running a command in this process or on a terminal, and segments to look at."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import shmcache
from shmcache import _core, inspect, segment
from shmcache.catalog import Found
from shmcache.cli import app


@dataclass
class Run:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(self.out), delimiter="\t", quoting=csv.QUOTE_NONE))

    @property
    def objects(self) -> list[Any]:
        return [json.loads(line) for line in self.lines]


@functools.cache
def _command() -> Any:
    """The command of `app`: making it takes 30 ms, most of what a small command takes."""
    return get_command(app)


def run(*args: str, stdin: bytes = b"") -> Run:
    """Run a command in this process."""
    with CliRunner().isolation(input=stdin) as (out, err, *_):
        code: Any = 0
        try:
            _command().main(args=list(args), prog_name="shmcache")
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        sys.stderr.flush()
        return Run(int(code or 0), out.getvalue().decode(errors="replace"), err.getvalue().decode(errors="replace"))


@pytest.fixture(params=["posix", "sysv"])
def cache(request: pytest.FixtureRequest, unique_name: Callable[[], str]) -> Iterator[shmcache.Engine]:
    yield from opened(f"{request.param}:///{unique_name()}")


@pytest.fixture
def posix(unique_name: Callable[[], str]) -> Iterator[shmcache.Engine]:
    yield from opened(f"posix:///{unique_name()}")


def opened(url: str, **options: Any) -> Iterator[shmcache.Engine]:
    engine = shmcache.open(url, **{"size": "1M", **options})
    engine.set("user:1", "ann", ttl=100)
    engine.set("user:2", "bob" * 50)
    engine.set("count", 5)
    engine.set(b"\xff\x00\t", b"\x00secret\n")
    engine.set("esc\x1b[31m", {"a": [1, b"x", float("inf")]})
    header = engine.raw("info")
    engine.close()
    try:
        yield engine
    finally:
        with contextlib.suppress(FileNotFoundError):
            found = inspect.locate(url)
            assert isinstance(found, Found)
            segment.remove(found)
        with contextlib.suppress(OSError):
            _core.sem_remove(header["sem_id"])


def name_of(engine: shmcache.Engine) -> str:
    return engine.url.path


def on_terminal(*args: str, program: tuple[str, ...] = ("-m", "shmcache"), **env: str) -> str:
    """What a command prints on a terminal of 90 columns, its messages too."""
    master, slave = pty.openpty()
    try:
        subprocess.run(
            [sys.executable, *program, *args], stdout=slave, stderr=slave, stdin=slave, check=True, cwd="/",
            env={**os.environ, "COLUMNS": "90", "TERM": "xterm-256color", **env},
        )  # fmt: skip
        os.close(slave)
        slave = -1
        text = b""
        with contextlib.suppress(OSError):  # EIO: all read
            while data := os.read(master, 65536):
                text += data
        return text.decode()
    finally:
        os.close(master)
        if slave >= 0:
            os.close(slave)
