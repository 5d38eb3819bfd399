"""The command line: what it prints, where, and with which exit code."""

# ruff: noqa: F811
from __future__ import annotations

import csv
import importlib.util
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shmcache
from shmcache import _core, catalog, inspect

if importlib.util.find_spec("typer") is None or importlib.util.find_spec("rich") is None:
    pytest.skip("typer and rich are not installed", allow_module_level=True)

from shmcache.cli.output import Code

from .cli_help import cache, name_of, on_terminal, opened, posix, run  # noqa: F401


def corrupt(path: Path) -> None:
    data = path.read_bytes()
    at = data.index(b"user:1ann")
    with path.open("r+b") as f:
        f.seek(at)
        f.write(b"oops")


# -- looking -------------------------------------------------------------------------------------------------------------------


def test_ls_has_the_columns_of_ipcs(cache: shmcache.Engine) -> None:
    """ls prints a header of key to status, then name, form, items and fill, and a row for each segment."""
    result = run("ls")
    assert result.lines[0].split("\t") == [
        "key", "shmid", "owner", "perms", "bytes", "nattch", "status", "name", "form", "items", "fill",
    ]  # fmt: skip
    (row,) = [r for r in result.rows if r["name"] == name_of(cache)]
    form = cache.url.scheme
    assert (row["perms"], row["bytes"], row["nattch"], row["status"], row["form"], row["items"]) == (
        "600", "1048576", "0", "ok", form, "5",
    )  # fmt: skip
    assert (row["key"] == "") == (form == "posix")


def test_ls_json(posix: shmcache.Engine) -> None:
    """ls --json is one object a line with the same names."""
    (row,) = [r for r in run("ls", "--json").objects if r["name"] == name_of(posix)]
    assert (row["shmid"], row["bytes"], row["items"]) == (None, 1 << 20, 5)


def test_info(cache: shmcache.Engine) -> None:
    """info tells name, creator, settings and semaphores."""
    (record,) = run("info", name_of(cache), "--json").objects
    assert record["header_name"] == f"{cache.url.scheme}:{name_of(cache)}"
    assert (record["creator_pid"], record["semaphores"], record["guards"], record["items"]) == (os.getpid(), "ok", 1, 5)


def test_info_of_another_engine() -> None:
    """info of an engine without a segment tells engine_id and capabilities."""
    (record,) = run("info", "memory:cli://", "--json").objects
    assert record["engine_id"] == "memory:cli"
    assert "EXPIRE" in record["capabilities"]


def test_stats(cache: shmcache.Engine) -> None:
    """stats prints the counters and the hit ratio, unchanged by looking."""
    engine = shmcache.open(cache.url, mode="a")
    engine.get("user:1")
    engine.get("absent")
    engine.close()
    first, second = (run("stats", name_of(cache), "--json").objects[0] for _ in range(2))
    assert first == second
    assert (first["hits"], first["misses"], first["hit_ratio"], first["sets"]) == (1, 1, 0.5, 5)


def test_stats_lifetimes(posix: shmcache.Engine) -> None:
    """stats --lifetimes counts what expires and what does not."""
    (record,) = run("stats", name_of(posix), "--lifetimes", "--json").objects
    assert (record["items_expiring"], record["items_forever"]) == (1, 4)
    assert 0 < record["ttl_min"] <= record["ttl_max"] <= 100


def test_stats_watch(posix: shmcache.Engine) -> None:
    """stats --watch prints rates, one line an interval."""
    rows = run("stats", name_of(posix), "--watch", "0.05", "--count", "2", "--json").objects
    assert [(row["hits"], row["hit_ratio"]) for row in rows] == [(0, None), (0, None)]


def test_stats_prometheus(posix: shmcache.Engine) -> None:
    """stats --format prometheus prints the text format, or says what is missing."""
    result = run("stats", name_of(posix), "--format", "prometheus")
    if importlib.util.find_spec("prometheus_client") is None:
        assert (result.code, "prometheus_client" in result.err) == (Code.REFUSED, True)
    else:
        assert f'shmcache_sets_total{{cache="{name_of(posix)}"}} 5.0' in result.lines


def test_dump_hides_values(cache: shmcache.Engine) -> None:
    """dump prints keys escaped and no value unless asked."""
    result = run("dump", name_of(cache))
    assert sorted(row["key"] for row in result.rows) == [
        r"\xff\x00\x09", "count", r"esc\x1b[31m", "user:1", "user:2",
    ]  # fmt: skip
    assert "ann" not in result.out
    assert "secret" not in result.out
    assert list(result.rows[0]) == [
        "key", "type", "size", "age", "ttl", "use", "cas", "lane", "shard", "bucket", "state",
    ]  # fmt: skip


def test_dump_values(cache: shmcache.Engine) -> None:
    """dump --values prints them on one line each, escaped."""
    values = {row["key"]: row["value"] for row in run("dump", name_of(cache), "--values").rows}
    assert values["user:1"] == "ann"
    assert values[r"\xff\x00\x09"] == r"\x00secret\x0a"


def test_dump_json_is_lossless_for_keys(posix: shmcache.Engine) -> None:
    """dump --json gives a key that is no UTF-8 in base64 too, and bytes values as base64."""
    rows = {row["key"]: row for row in run("dump", name_of(posix), "--json", "--values").objects}
    row = rows[r"\xff\x00\t".replace(r"\t", r"\x09")]
    assert (row["key_base64"], row["value"], row["ttl"]) == ("/wAJ", {"base64": "AHNlY3JldAo="}, None)
    assert rows["esc\x1b[31m"]["value"] == {"a": [1, {"base64": "eA=="}, "inf"]}


def test_dump_formats(posix: shmcache.Engine) -> None:
    """csv and msgpack hold the same items."""
    import msgpack  # type: ignore[import-untyped]

    rows = list(csv.reader(io.StringIO(run("dump", name_of(posix), "--format", "csv").out)))
    assert (rows[0][0], len(rows)) == ("key", 6)
    shell = [sys.executable, "-m", "shmcache", "dump", name_of(posix), "--format", "msgpack", "--values"]
    data = subprocess.run(shell, capture_output=True, check=True, cwd="/").stdout
    items = {item["key"]: item for item in msgpack.Unpacker(io.BytesIO(data))}
    assert items[b"\xff\x00\t"]["value"] == b"\x00secret\n"


def test_dump_match_sort_limit(posix: shmcache.Engine) -> None:
    """--match, --sort and --limit choose and order."""
    rows = run("dump", name_of(posix), "--match", "user:*", "--sort", "-size").rows
    assert [row["key"] for row in rows] == ["user:2", "user:1"]
    assert [row["key"] for row in run("dump", name_of(posix), "--sort", "size", "--limit", "1").rows] == ["user:1"]
    assert run("dump", name_of(posix), "--limit", "0").rows == []
    assert run("dump", name_of(posix), "--sort", "beauty").code == Code.USAGE


def test_dump_of_another_engine() -> None:
    """dump walks any engine that iterates."""
    engine = shmcache.open("memory:clidump://")
    try:
        engine.set("k", [1, 2], ttl=50)
        (row,) = run("dump", "memory:clidump://", "--json", "--values").objects
    finally:
        engine.close()
    assert (row["key"], row["type"], row["value"], row["size"]) == ("k", "msgpack", [1, 2], 3)


def test_guards(cache: shmcache.Engine) -> None:
    """guards prints a row for each shard; --held only those that somebody holds."""
    (row,) = run("guards", name_of(cache), "--json").objects
    assert (row["shard"], row["state"], row["pid"], row["alive"]) == (0, "free", None, None)
    assert run("guards", name_of(cache), "--held").rows == []


def test_guards_by_worker(cache: shmcache.Engine) -> None:
    """guards --workers prints a row for each worker slot that was used; a terminal shows the sums under the guards."""
    (row,) = run("guards", name_of(cache), "--workers", "--json").objects
    assert (row["slot"], row["pid"], row["held"], row["guard_waits"], row["guard_timeouts"]) == (0, os.getpid(), False, 0, 0)
    assert "waits 0  timeouts 0  recoveries 0" in on_terminal("guards", name_of(cache))


def test_dump_of_a_damaged_value(posix: shmcache.Engine) -> None:
    """dump without --values names an item whose value fails its check, with its key."""
    path = Path(catalog.shm_path(name_of(posix)))
    with path.open("r+b") as f:
        f.seek(path.read_bytes().index(b"user:1ann"))
        f.write(b"user:1anx")
    states = {row["key"]: row["state"] for row in run("dump", name_of(posix)).rows}
    assert (states.pop("user:1"), set(states.values())) == ("corrupt", {"live"})
    assert [row["value"] for row in run("dump", name_of(posix), "--values", "--match", "user:1").rows] == [""]


def test_check_sound(cache: shmcache.Engine) -> None:
    """check of a sound segment ends with 0 and prints no finding."""
    result = run("check", name_of(cache))
    assert (result.code, result.out) == (0, "")
    assert "sound" in result.err


def test_check_and_dump_of_a_damaged_segment(posix: shmcache.Engine) -> None:
    """check names the damage and ends with 5; dump shows the rest."""
    corrupt(Path(catalog.shm_path(name_of(posix))))
    result = run("check", name_of(posix), "--json")
    assert result.code == Code.DAMAGED
    assert {finding["code"] for finding in result.objects} <= {"item-check", "entry-key"}
    rows = run("dump", name_of(posix)).rows
    assert {row["key"] for row in rows if row["state"] == "live"} == {
        "count", "user:2", r"\xff\x00\x09", r"esc\x1b[31m",
    }  # fmt: skip


def test_commands_that_look_take_a_copy(posix: shmcache.Engine, tmp_path: Path) -> None:
    """info, stats, dump, check, guards and get read the copy of a segment."""
    copy = tmp_path / "copy.bin"
    copy.write_bytes(Path(catalog.shm_path(name_of(posix))).read_bytes())
    for name in ("info", "stats", "dump", "check", "guards"):
        assert run(name, str(copy)).code == 0
    assert run("get", str(copy), "user:1").out == "ann\n"
    assert run("set", str(copy), "user:1", "x").code == Code.REFUSED
    assert run("rm", str(copy)).code == Code.USAGE


def test_another_layout(unique_name: Callable[[], str]) -> None:
    """A segment of another layout is listed, explained by info, found by check, and removed with --force only."""
    name = unique_name()
    path = Path(catalog.shm_path(name))
    for _ in opened(f"posix:///{name}"):
        with path.open("r+b") as f:
            f.seek(8)
            f.write((77).to_bytes(4, "little"))
        result = run("info", name, "--json")
        assert (result.code, result.objects[0]["status"]) == (Code.DAMAGED, "other-layout")
        assert "found 77" in result.objects[0]["problem"]
        assert (run("check", name).code, run("dump", name).code, run("get", name, "k").code) == (5, 5, 5)
        assert next(r for r in run("ls").rows if r["name"] == name)["status"] == "other-layout"
        assert run("set", name, "k", "v").code == Code.DAMAGED
        assert run("rm", name).code == Code.DAMAGED
        assert path.exists()
        assert run("rm", "--force", name).code == 0
        assert not path.exists()


def test_no_such_segment() -> None:
    """What is absent ends with 3 for every command that takes a segment."""
    for name in ("info", "stats", "dump", "check", "guards", "clean", "clear", "rm"):
        result = run(name, "posix:none-such")
        assert (result.code, result.out) == (Code.NO_SEGMENT, "")
        assert "none-such" in result.err
    for args in (("get", "none-such", "k"), ("set", "none-such", "k", "v"), ("set", "posix:///none-such", "k", "v")):
        assert run(*args).code == Code.NO_SEGMENT
    assert not Path(catalog.shm_path("none-such")).exists()


@pytest.fixture
def wedged(unique_name: Callable[[], str]) -> Iterator[str]:
    """The name of a segment whose writer is stopped inside its guard."""
    name = unique_name()
    code = (
        "import sys, shmcache; cache = shmcache.open(sys.argv[1], mode='a'); value = b'x' * (6 << 20); print('on', flush=True)\n"
        "while True: cache.set('large', value)"
    )
    for engine in opened(f"posix:///{name}", size="40M", guards=1):
        assert engine._closed
        shell = [sys.executable, "-c", code, f"posix:///{name}"]
        child = subprocess.Popen(shell, stdout=subprocess.PIPE, cwd="/")
        try:
            assert child.stdout is not None
            child.stdout.readline()
            for _ in range(3000):
                os.kill(child.pid, signal.SIGSTOP)
                os.waitpid(child.pid, os.WUNTRACED)
                if run("guards", name, "--held").rows:
                    break
                os.kill(child.pid, signal.SIGCONT)
                time.sleep(0.0005)
            yield name
        finally:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()


def test_wedged(wedged: str) -> None:
    """With a writer stopped inside its guard every command that looks answers, and one that writes ends with 6."""
    (guard,) = run("guards", wedged, "--held").rows
    assert (guard["state"], guard["alive"]) == ("stopped", "yes")
    for name in ("info", "stats", "dump", "check"):
        assert run(name, wedged).code == 0
    assert "ok" in [row["status"] for row in run("ls").rows if row["name"] == wedged]
    assert run("get", wedged, "user:1").out == "ann\n"
    assert run("ttl", wedged, "user:2").out == "inf\n"
    result = run("set", wedged, "user:2", "bob")
    assert (result.code, result.out) == (Code.TIMEOUT, "")
    assert run("clear", wedged).code == Code.TIMEOUT


# -- items ---------------------------------------------------------------------------------------------------------------------


def test_set_get_ttl_touch_delete(cache: shmcache.Engine) -> None:
    """An item's life from the shell."""
    name = name_of(cache)
    assert run("get", name, "k").code == Code.ABSENT
    assert run("set", name, "k", "väl\x07ue", "--ttl", "2h").code == 0
    assert run("get", name, "k").out == "väl\\x07ue\n"
    assert 7190 < float(run("ttl", name, "k").out) <= 7200
    assert run("touch", name, "k", "never").code == 0
    assert run("ttl", name, "k").out == "inf\n"
    assert run("ttl", name, "k", "--json").objects == [{"key": "k", "ttl": None}]
    assert run("set", name, "k", "2", "--add").code == Code.ABSENT
    assert run("set", name, "new", "2", "--replace").code == Code.ABSENT
    assert run("delete", name, "k", "absent").out == "1\n"
    assert run("delete", name, "k").code == Code.ABSENT
    assert run("touch", name, "k", "5").code == Code.ABSENT
    assert run("ttl", name, "k").code == Code.ABSENT
    assert run("delete", name, "--match", "user:*").out == "2\n"


@pytest.mark.parametrize(("kind", "text", "value"), [
    ("str", "12", "12"), ("int", "-12", -12), ("float", "1.5", 1.5), ("bool", "no", False), ("none", "", None),
    ("bytes", "ab", b"ab"), ("json", '{"a": [1, null]}', {"a": [1, None]}),
])  # fmt: skip
def test_set_types(kind: str, text: str, value: object, posix: shmcache.Engine) -> None:
    """set --type stores a value of that type."""
    assert run("set", name_of(posix), "k", text, "--type", kind).code == 0
    with shmcache.open(posix.url, mode="a") as engine:
        assert engine.get("k", shmcache.MISS) == value
        assert type(engine.get("k")) is type(value)


def test_set_from_stdin_and_get_raw(posix: shmcache.Engine) -> None:
    """set - reads the value from stdin; get --raw writes bytes as they are."""
    data = bytes(range(256))
    assert run("set", name_of(posix), "k", "-", "--type", "bytes", stdin=data).code == 0
    shell = [sys.executable, "-m", "shmcache", "get", name_of(posix), "k", "--raw"]
    assert subprocess.run(shell, capture_output=True, check=True, cwd="/").stdout == data


def test_escaped_keys(posix: shmcache.Engine) -> None:
    """--escaped takes a key as dump prints it."""
    assert run("get", name_of(posix), "-e", r"\xff\x00\x09").out == "\\x00secret\\x0a\n"
    assert run("get", name_of(posix), "-e", r"bad\q").code == Code.USAGE


def test_get_of_several_keys(posix: shmcache.Engine) -> None:
    """get of several keys prints each with its key; 1 when one is absent."""
    result = run("get", name_of(posix), "user:1", "absent", "count")
    assert (result.code, result.lines) == (Code.ABSENT, ["user:1\tann", "count\t5"])


def test_incr(cache: shmcache.Engine) -> None:
    """incr adds, creates, and refuses what is no number."""
    name = name_of(cache)
    assert run("incr", name, "count").out == "6\n"
    assert run("incr", name, "count", "-10").out == "-4\n"
    assert run("incr", name, "fresh", "2", "--initial", "100", "--ttl", "1h").out == "102\n"
    assert run("incr", name, "other", "--existing").code == Code.ABSENT
    result = run("incr", name, "user:1")
    assert (result.code, result.out) == (Code.REFUSED, "")


@pytest.mark.parametrize("args", [
    ("set", "{}", "k", "v", "--ttl", "soon"), ("set", "{}", "k", "x", "--type", "int"), ("set", "{}", "k", "x", "--type", "blob"),
    ("set", "{}", "k", "v", "--add", "--replace"), ("set", "{}", "", "v"), ("get", "{}"), ("delete", "{}"),
    ("dump", "{}", "--format", "xml"), ("frobnicate",), ("ls", "--nonsense"), ("set", "{}", "k", "v", "--ttl", "400000000"),
    ("dump", "nosuch://x"),
])  # fmt: skip
def test_usage_errors(args: tuple[str, ...], posix: shmcache.Engine) -> None:
    """Wrong arguments end with 2, a message on stderr and nothing on stdout."""
    result = run(*(arg.format(name_of(posix)) if arg == "{}" else arg for arg in args))
    assert (result.code, result.out) == (Code.USAGE, "")
    assert result.err


def test_value_too_large(posix: shmcache.Engine) -> None:
    """A value that does not fit ends with 7."""
    assert run("set", name_of(posix), "k", "-", stdin=b"x" * (1 << 20)).code == Code.NO_ROOM


def test_url_with_mode_creates(unique_name: Callable[[], str]) -> None:
    """A URL with mode=c creates the segment; without it nothing is created."""
    url = f"posix:///{unique_name()}"
    assert run("set", url, "k", "v").code == Code.NO_SEGMENT
    assert run("set", f"{url}?mode=c&size=1M", "k", "v").code == 0
    assert run("get", url, "k").out == "v\n"
    assert run("rm", url).code == 0


def test_url_options_count(posix: shmcache.Engine) -> None:
    """Options of the URL hold: a prefix is put before keys, another size is refused."""
    url = str(posix.url.without_options())
    assert run("get", f"{url}?prefix=user:", "1").out == "ann\n"
    assert run("set", f"{url}?size=2M", "k", "v").code == Code.DAMAGED


# -- whole segments --------------------------------------------------------------------------------------------------------------


def test_clean_and_clear(cache: shmcache.Engine) -> None:
    """clean prints how many expired items it took; clear empties the segment."""
    name = name_of(cache)
    assert run("set", name, "gone", "x", "--expire-at", "1").code == 0
    assert run("clean", name).out.strip().isdigit()
    assert run("clear", name).code == 0
    assert run("dump", name).rows == []


def test_rm(cache: shmcache.Engine) -> None:
    """rm removes segment and semaphores, and tells who has it attached."""
    name = name_of(cache)
    sem_id = inspect.locate(name).header["sem_id"]  # type: ignore[union-attr]
    with shmcache.open(cache.url, mode="a") as engine:
        result = run("rm", name)
        assert (result.code, result.out) == (0, f"removed\t{cache.url.scheme}:{name}\n")
        assert engine.get("user:1") == "ann"
        with pytest.raises(shmcache.GuardLost):
            engine.set("k", 1)
    with pytest.raises(OSError, match=r"Invalid argument|removed"):
        _core.sem_stat(sem_id)
    assert run("rm", name).code == Code.NO_SEGMENT


def test_rm_without_semaphores(cache: shmcache.Engine) -> None:
    """rm removes a segment whose semaphores are gone."""
    name = name_of(cache)
    _core.sem_remove(inspect.locate(name).header["sem_id"])  # type: ignore[union-attr]
    assert next(r for r in run("ls").rows if r["name"] == name)["status"] == "no-semaphores"
    assert run("dump", name).code == 0
    assert run("check", name).code == Code.DAMAGED
    assert run("set", name, "k", "v").code == Code.DAMAGED
    assert run("rm", name).code == 0
    assert run("info", name).code == Code.NO_SEGMENT


def test_rm_goes_on_after_a_failure(posix: shmcache.Engine) -> None:
    """rm of several removes what it can and ends with the code of what it could not."""
    result = run("rm", "none-such", name_of(posix))
    assert (result.code, result.out) == (Code.NO_SEGMENT, f"removed\tposix:{name_of(posix)}\n")


def test_gc_dry_run_removes_nothing(unique_name: Callable[[], str]) -> None:
    """gc --dry-run names a dead creator's file and leaves it."""
    path = Path(f"/dev/shm/.shmcache-new.1.x.{unique_name()}")
    path.write_bytes(b"")
    os.utime(path, (1, 1))
    try:
        assert str(path) in run("gc", "--dry-run").out
        assert path.exists()
    finally:
        path.unlink()


def test_save_and_load(cache: shmcache.Engine, unique_name: Callable[[], str], tmp_path: Path) -> None:
    """save writes a file that load puts into another segment; a damaged file ends with 5 and stores nothing."""
    path, other = tmp_path / "s.snap", f"posix:///{unique_name()}"
    assert run("save", name_of(cache), str(path), "--json").objects == [{"items": 5, "skipped": 0}]
    for _ in opened(other):
        run("clear", other)
        result = run("load", other, str(path), "--json")
        assert (result.code, result.objects) == (0, [{"items": 5, "expired": 0, "skipped": 0, "refused": 0}])
        assert run("get", other, "user:1").out == "ann\n"
        run("clear", other)
        path.write_bytes(path.read_bytes()[:-10])
        assert run("load", other, str(path)).code == Code.DAMAGED
        assert run("dump", other).rows == []
        assert run("load", other, str(path), "--partial").code == Code.DAMAGED
        assert len(run("dump", other).rows) == 5
    assert run("load", name_of(cache), str(tmp_path / "absent")).code == Code.NO_SEGMENT


def test_save_to_stdout_and_load_from_stdin(posix: shmcache.Engine) -> None:
    """save - and load - make a pipe, into another engine too."""
    shell = [sys.executable, "-m", "shmcache", "save", name_of(posix), "-", "--match", "user:*"]
    data = subprocess.run(shell, capture_output=True, check=True, cwd="/").stdout
    assert "loaded 2 items" in run("load", "memory:cliload://", "-", stdin=data).err


def test_distribution(posix: shmcache.Engine) -> None:
    """distribution prints a row for each class of each histogram."""
    rows = run("distribution", name_of(posix)).rows
    assert list(dict.fromkeys(row["histogram"] for row in rows)) == [
        "size", "ttl", "age", "bucket_fill", "probe_length", "use", "lane", "type",
    ]  # fmt: skip
    assert sum(int(row["items"]) for row in rows if row["histogram"] == "type") == 5
    assert "█" in on_terminal("distribution", name_of(posix))


def test_bigkeys(posix: shmcache.Engine) -> None:
    """bigkeys lists the largest first."""
    assert [row["key"] for row in run("bigkeys", name_of(posix), "-n", "1").rows] == ["user:2"]
    assert len(run("bigkeys", name_of(posix), "--hot").rows) == 5
