"""The measurement tools: instruction counts held against the record, and reports that say what they must."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

_ROOT = str(Path(__file__).parent.parent)
if _ROOT not in sys.path:
    sys.path.append(_ROOT)  # at the end: the package under test stays the installed one

from shmcache import bench  # noqa: E402
from tools.bench import __main__ as command  # noqa: E402
from tools.bench import instructions, machine, memory, native, peers, plot, report, servers, together  # noqa: E402

SMALL = bench.Plan(items=2000, large_items=20, seconds=0.001, chunk=400, tail_calls=1000)


def absent(reason: str) -> None:
    """Skip by name, or fail where everything is asked for."""
    if os.environ.get("SHMCACHE_CI") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def need(program: str) -> None:
    """The program on the PATH, or `absent`."""
    if shutil.which(program) is None:
        absent(f"{program}: not on the PATH")


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    """The record, when it was made with this compiler and interpreter."""
    need("valgrind")
    need(os.environ.get("CC", "gcc"))
    record: dict[str, Any] = json.loads(instructions.RECORD.read_text())
    setting = instructions.setting()
    if record["setting"] != setting:
        absent(f"instructions.json: recorded with {record['setting']}, this is {setting}")
    return record


def test_core_takes_the_recorded_instructions(recorded: dict[str, Any]) -> None:
    """A get, miss, set and incr of the core each take the recorded number of instructions within 3 %."""
    assert instructions.compare(recorded["core"], instructions.core()) == []


def test_extension_takes_the_recorded_instructions(recorded: dict[str, Any]) -> None:
    """The same calls through the extension, the interpreter's share included, take the recorded number within 3 %."""
    assert instructions.compare(recorded["extension"], instructions.extension()) == []


@pytest.mark.parametrize(("found", "lines"), [(100.0, 0), (103.0, 0), (97.0, 0), (103.2, 1), (96.8, 1)])
def test_a_count_is_compared_both_ways(found: float, lines: int) -> None:
    """More than 3 % above or below the record is named with both figures."""
    beyond = instructions.compare({"get": 100.0}, {"get": found})
    assert len(beyond) == lines
    assert all("100.0 instructions" in line and f"{found} found" in line for line in beyond)


def test_short_form_measures_every_workload() -> None:
    """The short form opens with its bias and has a line per workload, dict beside the engine."""
    made = bench.run(plan=SMALL, rounds=1)
    assert set(made.timings["shmcache"]) == set(bench.WORKLOADS)
    assert all(timing.least <= timing.ns <= timing.most for of in made.timings.values() for timing in of.values())
    text = bench.text(made)
    assert text.startswith("Bias:")
    assert all(what in text for what, _ in bench.WORKLOADS.values())


def test_short_form_leaves_a_users_segment_as_it_was() -> None:
    """Measuring an engine that exists leaves its items and no others."""
    import shmcache

    engine = shmcache.open("memory:benchuser://")
    engine.set("mine", b"1")
    bench.run("memory:benchuser://", plan=SMALL, rounds=1)
    assert list(engine.keys("*")) == ["mine"]
    engine.close()


def test_zipf_is_repeatable_and_skewed() -> None:
    """The draw is the same for a seed, within range, and the most frequent item takes its share."""
    draw = bench.zipf(1000, 20_000, 7)
    assert draw == bench.zipf(1000, 20_000, 7) != bench.zipf(1000, 20_000, 8)
    assert 0 <= min(draw) <= max(draw) < 1000
    assert 0.10 < max(map(draw.count, set(draw[:200]))) / len(draw) < 0.16


def test_tail_counts_every_call() -> None:
    """Percentiles rise and the worst call is among the calls made."""
    seen: list[int] = []
    found = bench.tail(seen.append, range(1000))
    assert seen == list(range(1000))
    assert found.calls == 1000
    assert found.p50 <= found.p99 <= found.p999 <= found.p9999 <= found.worst


def test_processes_run_together() -> None:
    """Two forked processes answer with a rate by the clock and one by processor time."""
    f = bench.Field.fill(bench.dict_subject(), SMALL)
    for kind in ("mixed", "set"):
        clock, processor = together.together(f, kind, 2, 0.02)
        assert clock > 0
        assert processor > 0


def test_a_child_that_fails_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    """A process that dies in the middle of a measurement fails it instead of counting as slow."""

    def broken(_key: Any) -> Any:
        raise KeyError("gone")

    f = bench.Field.fill(bench.dict_subject(), SMALL)
    f.subject = bench.Subject("broken", broken, None)
    with pytest.raises(RuntimeError, match="answer of every one of 2 processes wanted"):
        together.together(f, "mixed", 2, 0.01)
    assert "gone" in capfd.readouterr().err


def run_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str) -> dict[str, Any]:
    """A run of two rounds with tiny sizes; the figures it wrote."""
    monkeypatch.setattr(command, "QUICK", SMALL)
    command.main(["--quick", "--rounds", "2", "--peers", names, "--out", str(tmp_path)])
    data: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    return data


def test_a_run_measures_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run measures each peer in its own process and prints bias, table, limits, percentiles, versions and settings."""
    data = run_small(tmp_path, monkeypatch, "dict,lru_cache,shmcache,shmcache-semaphore")
    assert data["missing"] == {}
    assert [set(made) for made in data["rounds"]] == [{"dict", "lru_cache", "shmcache", "shmcache-semaphore"}] * 2
    page = (tmp_path / "bench.md").read_text()
    assert capsys.readouterr().out.strip() == page.strip()
    assert page.startswith("# Speed\n\nBias:")
    for wanted in ("## Limits", "x dict", "semop pair", "two processes, 95 % get: scaling", "p99.99", "Linux", "192 MiB"):
        assert wanted in page, wanted


def test_missing_peers_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A peer whose package or server is missing, or that fails, is named with the reason; the others are measured."""
    monkeypatch.setitem(peers.PEERS, "lmdb", peers.Peer(peers.PEERS["lmdb"].open, ("no_such_package",)))
    monkeypatch.setitem(peers.PEERS, "uwsgi", peers.Peer(peers.PEERS["uwsgi"].open, launcher="no_such_program"))
    monkeypatch.setattr(servers, "start", _no_server)
    data = run_small(tmp_path, monkeypatch, "dict,lmdb,uwsgi,redis")
    assert set(data["missing"]) == {"lmdb", "uwsgi", "redis"}
    page = capsys.readouterr().out
    for wanted in ("no_such_package not installed", "no_such_program not found", "no server here"):
        assert wanted in page


def _no_server(name: str, _where: Path) -> servers.Server:
    raise FileNotFoundError(f"{name}: no server here")


def test_unknown_peers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown peer ends the command with the known ones."""
    with pytest.raises(SystemExit):
        command.main(["--peers", "dict,nonesuch"])
    assert "lru_cache" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["memcached", "redis"])
def test_servers_start_and_end(name: str, tmp_path: Path) -> None:
    """A server answers on its own socket and is gone after stop."""
    need({"memcached": "memcached", "redis": "redis-server"}[name])
    server = servers.start(name, tmp_path)
    assert server.process.poll() is None
    assert Path(server.socket).is_socket()
    server.stop()
    assert server.process.poll() is not None


def figures(get: float, base: float) -> dict[str, Any]:
    """The least data a report can be made of."""
    timing = {"ns": get, "least": get, "most": get, "passes": 5}
    made = {
        "dict": {"name": "dict", "notes": "", "timings": {"get": {**timing, "ns": base}}},
        "shmcache": {"name": "shmcache", "notes": "", "timings": {"get": timing}},
    }
    noise = dict.fromkeys(("seconds", "own percent", "stolen percent", "load before", "load after"), 1.0)
    return {
        "rounds": [made] * 3, "floors": {}, "missing": {}, "versions": {}, "servers": {}, "machine": {"kernel": "K"},
        "noise": {**noise, "others percent": 40.0}, "plan": {"items": 10, "value_size": 100},
    }  # fmt: skip


@pytest.mark.parametrize(("get", "kept"), [(130.0, True), (131.0, False)])
def test_limits_are_judged_by_ratio(get: float, kept: bool) -> None:
    """A get of 1.3 times a dict's is kept, above it missed; disturbance by others is said."""
    page, good = report.markdown(figures(get, 100.0))
    assert good is kept
    assert ("**missed**" in page) is not kept
    assert "others disturbed this run" in page


def test_a_plot_is_drawn_or_named_as_left_out(tmp_path: Path) -> None:
    """With matplotlib an SVG is written, without it the answer says so."""
    data = figures(130.0, 100.0)
    data["machine"] = {"processor": "P", "python": "CPython"}
    (tmp_path / "bench.json").write_text(json.dumps(data))
    said = plot.draw(tmp_path / "bench.json", tmp_path / "bench.svg")
    assert (tmp_path / "bench.svg").exists() or "matplotlib not installed" in said


def test_machine_is_described() -> None:
    """Processor, kernel and interpreter are named; the watch gives shares of the machine."""
    described = machine.describe()
    assert all(described[what] for what in ("processor", "kernel", "python"))
    watch = machine.Watch([os.getpid()])
    assert set(watch.stop()) >= {"own percent", "others percent", "stolen percent"}


def test_floors_are_measured() -> None:
    """The compiled floor gives a figure above zero for the semaphore pair and leaves no semaphores."""
    need(os.environ.get("CC", "gcc"))
    assert machine.floors()["semop pair with SEM_UNDO"] > 0


def test_memory_of_an_item_is_within_its_limit() -> None:
    """100,000 items of 17 + 100 bytes fit 16 MiB at 168 bytes each, 160 with integrity=header, everything included."""
    for integrity in ("full", "header"):
        row = memory.ours(117, integrity)
        assert row.items >= 99_000
        assert row.limit is not None
        assert row.per_item <= row.limit


def test_a_compiler_that_is_missing_is_named() -> None:
    """Building with a compiler that does not exist raises CompilerMissing and names it."""
    with pytest.raises(native.CompilerMissing, match="no-such-compiler"):
        native.build("replay", cc="no-such-compiler")


def test_a_driver_that_does_not_compile_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's own words are in the error."""
    need(os.environ.get("CC", "gcc"))
    (tmp_path / "broken.c").write_text("int main(void) { return not_declared; }\n")
    monkeypatch.setattr(native, "HERE", tmp_path)
    with pytest.raises(RuntimeError, match="not_declared"):
        native.build("broken")
