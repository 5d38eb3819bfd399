"""shmcache bench: the user's short form, on a segment of its own or on a cache that exists."""

# ruff: noqa: F811
from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import shmcache
from shmcache import bench

if importlib.util.find_spec("typer") is None or importlib.util.find_spec("rich") is None:
    pytest.skip("typer and rich are not installed", allow_module_level=True)

from shmcache.cli import bench as command
from shmcache.cli.output import Code

from .cli_help import name_of, on_terminal, posix, run  # noqa: F401

SMALL = bench.Plan(items=2000, large_items=20, seconds=0.001, chunk=400, tail_calls=1000)
SHORT = ("bench", "--quick", "--rounds", "1")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "QUICK", SMALL)


def test_a_private_segment_is_gone_at_the_end() -> None:
    """Without --url nothing is left; every workload has a row for each subject, with least, median and most in order."""
    result = run(*SHORT)
    assert result.code == 0
    assert result.err.startswith("shmcache: Bias:")
    assert not re.search(rf"bench-{'[0-9a-f]' * 8}", "".join(row["name"] for row in run("ls").rows))
    rows = [row for row in result.rows if row["passes"] and row["least"]]
    assert {row["workload"] for row in rows if row["subject"] == "shmcache"} == set(bench.WORKLOADS)
    assert all(float(row["least"]) <= float(row["ns"]) <= float(row["most"]) for row in rows)
    assert {row["ratio"] for row in rows if row["subject"] == "dict"} == {"1"}
    assert {row["workload"] for row in result.rows if row["subject"] == "shmcache"} > {"get-p50", "set-p9999"}


def test_json() -> None:
    """--json is one object with figures by subject and workload."""
    (record,) = run(*SHORT, "--json").objects
    assert set(record["timings"]) == set(record["tails"]) == {"dict", "shmcache"}
    assert {"ns", "least", "most", "passes"} == set(record["timings"]["shmcache"]["get"])
    assert record["url"].startswith("anon:bench-")


@pytest.mark.parametrize("form", ["{}", "posix:{}", "posix:///{}"])
def test_a_segment_that_exists_keeps_its_items(form: str, posix: shmcache.Engine) -> None:
    """--url measures in the segment named, and leaves its items and no others."""
    before = sorted(row["key"] for row in run("dump", name_of(posix)).rows)
    assert run(*SHORT, "--url", form.format(name_of(posix))).code == 0
    assert sorted(row["key"] for row in run("dump", name_of(posix)).rows) == before


def test_an_engine_of_another_scheme() -> None:
    """--url takes any engine."""
    (record,) = run(*SHORT, "--url", "memory:benchcli://", "--json").objects
    assert record["url"] == "memory:benchcli://"


def test_absent() -> None:
    """A segment that does not exist is not made: 3."""
    assert run(*SHORT, "--url", "posix:///none-such").code == Code.NO_SEGMENT
    assert not Path("/dev/shm/shmcache.none-such").exists()


def test_servers_are_timed_by_the_clock() -> None:
    """Engines that wait for another process are no local subjects, however the URL names them."""
    with shmcache.open("memory:benchlocal://") as engine:
        assert bench.engine_subject(engine).local
    assert "memcached" not in bench.LOCAL
    assert "redis" not in bench.LOCAL


def test_a_terminal_gets_the_report() -> None:
    """On a terminal the report is printed, and a progress bar before it that is wiped away."""
    code = f"from shmcache import bench, cli; cli.bench.QUICK = bench.{SMALL}; cli.main()"
    text = on_terminal(*SHORT, program=("-c", code))
    assert "measuring" in text
    assert text.index("measuring") < text.rindex("\x1b[2K") < text.index("Bias:")
    assert "get 100 B, 64 hot keys" in text
    assert "single calls, clock included" in text
