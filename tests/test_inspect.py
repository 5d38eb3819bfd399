"""inspect: segments that are sound, wedged, damaged, of another layout, removed, or copies."""

from __future__ import annotations

import contextlib
import math
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shmcache
from shmcache import _core, catalog, inspect, processes
from shmcache.arguments import MISS, compile_glob
from shmcache.catalog import Found
from shmcache.inspect import View, locate
from shmcache.url import Url

from .scenes import WRITER, stopped_writer


@pytest.fixture(params=["posix", "sysv"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cache(scheme: str, unique_name: Callable[[], str]) -> Iterator[shmcache.Engine]:
    """A segment of 4 MiB in two shards with seven items."""
    yield from opened(f"{scheme}:///{unique_name()}", size="4M", guards=2)


def opened(url: str, **options: object) -> Iterator[shmcache.Engine]:
    engine = shmcache.open(url, **options)
    engine.set("text", "abc", ttl=100)
    engine.set("number", 7)
    engine.set(b"\xff\x00", b"\x01\x02", ttl=None)
    engine.set("map", {"a": [1]})
    engine.set("huge", 10**40)
    engine.set("nothing", None)
    engine.set("flag", True)
    try:
        yield engine
    finally:
        with contextlib.suppress(shmcache.ShmCacheError):
            engine.unlink()
        engine.close()


def name_of(engine: shmcache.Engine) -> str:
    return engine.url.path


def found(text: str) -> Found:
    row = locate(text)
    assert isinstance(row, Found)
    return row


def copy_of(engine: shmcache.Engine, path: Path) -> Path:
    path.write_bytes(Path(catalog.shm_path(name_of(engine))).read_bytes())
    return path


def test_locate_finds_a_segment_by_url_form_and_bare_name(cache: shmcache.Engine, scheme: str) -> None:
    """URL, form:name and bare name lead to the same segment."""
    name = name_of(cache)
    rows = [found(text) for text in (f"{scheme}:///{name}", f"{scheme}:{name}", name)]
    assert {(row.form, row.name, row.header["uuid"]) for row in rows} == {(scheme, name, rows[0].header["uuid"])}


def test_locate_takes_posix_before_sysv(unique_name: Callable[[], str]) -> None:
    """A bare name that both forms have is the POSIX segment."""
    name = unique_name()
    with shmcache.open(f"sysv:///{name}", size="1M") as sysv, shmcache.open(f"posix:///{name}", size="1M") as posix:
        assert found(name).form == "posix"
        posix.unlink()
        assert found(name).form == "sysv"
        sysv.unlink()


def test_locate_finds_a_segment_by_shared_memory_id(unique_name: Callable[[], str]) -> None:
    """@ID names a System V segment, an anonymous one too."""
    name = unique_name()
    with shmcache.open(f"anon:{name}://", size="1M") as anon:
        anon.set("k", 1)
        row = next(f for f in catalog.list_segments() if f.form == "anon" and f.name == name)
        with View(found(f"@{row.shm_id}")) as view:
            assert [item.key for item in view.items()] == ["k"]
        assert found(name).shm_id == row.shm_id


@pytest.mark.parametrize("text", ["posix:///none-such", "sysv:///none-such", "none-such", "@2147483000", "./none-such"])
def test_locate_absent(text: str) -> None:
    """What does not exist is a FileNotFoundError."""
    with pytest.raises(FileNotFoundError):
        locate(text)


@pytest.mark.parametrize("text", ["anon://", "posix://host/x", "://", "/dev/null", "posix:///a/b"])
def test_locate_refuses(text: str) -> None:
    """What cannot name a segment is a ValueError."""
    with pytest.raises(ValueError, match="wanted"):
        locate(text)


def test_locate_gives_other_engines_their_url() -> None:
    """A scheme without a segment comes back as its Url."""
    assert locate("memory:x://") == Url.parse("memory:x://")


def test_items(cache: shmcache.Engine) -> None:
    """Each item is seen once with its type, size and lifetime."""
    with View(found(name_of(cache))) as view:
        items = {item.key: item for item in view.items()}
    assert {key: (i.type, i.size, i.state) for key, i in items.items()} == {
        "text": ("str", 3, "live"),
        "number": ("int", 8, "live"),
        b"\xff\x00": ("bytes", 2, "live"),
        "map": ("msgpack", 5, "live"),
        "huge": ("int", 41, "live"),
        "nothing": ("none", 0, "live"),
        "flag": ("bool", 0, "live"),
    }
    assert items["number"].ttl is None
    assert items["text"].ttl is not None
    assert 0 < items["text"].ttl <= 100
    assert items["text"].lane == "probation"


def test_items_match(cache: shmcache.Engine) -> None:
    """A glob chooses keys."""
    with View(found(name_of(cache))) as view:
        assert sorted(str(i.key) for i in view.items(compile_glob("n*"))) == ["nothing", "number"]


def test_expired_items_are_shown_on_request(cache: shmcache.Engine) -> None:
    """An expired item that still lies there is seen with `expired` only."""
    with View(found(name_of(cache))) as view:
        view.table._set_clock(view.table._now_ms() + 200_000)
        assert "text" not in [i.key for i in view.items()]
        states = {i.key: (i.state, (i.ttl or 0) < 0) for i in view.items(expired=True)}
    assert states["text"] == ("expired", True)


def test_a_view_leaves_no_trace(cache: shmcache.Engine) -> None:
    """Looking changes no statistics and no use bits, and claims no worker slot."""
    before = dict(cache.stats())
    with View(found(name_of(cache))) as view:
        uses = [i.use for i in view.items()]
        assert view.value("text") == "abc"
        assert view.value("absent") is MISS
        assert view.ttl("number") == math.inf
        assert view.ttl("absent") is None
        assert (view.check(), len(view.guards()), len(view.shards())) == ([], 2, 2)
        assert [i.use for i in view.items()] == uses
    assert dict(cache.stats()) == before


def test_attached_lists_this_process(cache: shmcache.Engine) -> None:
    """The processes that have a segment mapped are found, this one among them."""
    row = found(name_of(cache))
    assert os.getpid() in [p.pid for p in processes.attached(row)]
    assert processes.attached_counts([row]) == [1]


@pytest.mark.parametrize("guard", ["fast", "semaphore"])
def test_wedged(scheme: str, guard: str, unique_name: Callable[[], str]) -> None:
    """A segment whose writer is stopped inside its guard is walked, and its guard is shown as stopped, then dead."""
    for engine in opened(f"{scheme}:///{unique_name()}", size="40M", guards=1, guard=guard):
        with View(found(name_of(engine))) as view, stopped_writer(str(engine.url.without_options()), view) as child:
            (held,) = [g for g in view.guards() if g.state != "free"]
            assert (held.state, held.pid, held.alive) == ("stopped", child.pid, True)
            assert held.started is not None
            assert abs(time.time() - held.started) < 3600
            assert "text" in [i.key for i in view.items()]
            assert view.value("text") == "abc"
            child.kill()
            child.wait()
            (left,) = [g for g in view.guards() if g.state != "free"]
            assert (left.state, left.pid, left.alive) == ("dead", child.pid, False)
            assert engine.set("after", 1)
            assert [g.state for g in view.guards()] == ["free"]


def test_without_semaphores(cache: shmcache.Engine) -> None:
    """A segment whose semaphores were removed is walked; its status says so."""
    row = found(name_of(cache))
    _core.sem_remove(row.header["sem_id"])
    with View(row) as view:
        assert inspect.status(row, view) == "no-semaphores"
        assert view.sem_problem == f"set {row.header['sem_id']} is gone"
        assert len(list(view.items())) == 7
        assert [g.state for g in view.guards()] == ["free", "free"]
        assert view.check() == []


def test_a_busy_segment_is_sound(unique_name: Callable[[], str]) -> None:
    """An audit under a writer that stores, deletes and evicts all the time finds nothing."""
    code = (
        "import sys, os, shmcache; cache = shmcache.open(sys.argv[1], mode='a'); print('on', flush=True); i = 0\n"
        "while True:\n  i += 1; cache.set(b'k%d' % (i * 7919 % 50000), os.urandom(i % 300), ttl=600)\n"
        "  if i % 3 == 0: cache.delete(b'k%d' % (i * 31 % 50000))"
    )
    for engine in opened(f"posix:///{unique_name()}", size="1M", guards=1):
        shell = [sys.executable, "-c", code, str(engine.url.without_options())]
        with View(found(name_of(engine))) as view, subprocess.Popen(shell, stdout=subprocess.PIPE, cwd="/") as child:
            try:
                assert child.stdout is not None
                child.stdout.readline()
                while view.stats()["evicted"] < 1000:
                    time.sleep(0.01)
                assert [view.check() for _ in range(150)] == [[]] * 150
            finally:
                child.kill()


def test_damage_is_counted_where_it_is(unique_name: Callable[[], str], tmp_path: Path) -> None:
    """One damaged header in the log is named once, with its place; the entries of sound items behind it are not blamed."""
    for engine in opened(f"posix:///{unique_name()}", size="1M"):
        for i in range(500):
            engine.set(f"after:{i}", i)
        path = copy_of(engine, tmp_path / "copy.bin")
        data = path.read_bytes()
        at = data.index(b"textabc") - 16
        path.write_bytes(data[:at] + b"\xff" * 8 + data[at + 8 :])
        with View(found(str(path))) as view:
            codes = [finding["code"] for finding in view.check()]
        assert codes == ["item-header", "item-header"]


def test_removed(cache: shmcache.Engine) -> None:
    """A view that was open before the segment was unlinked goes on reading; its status is removed."""
    row = found(name_of(cache))
    with View(row) as view:
        cache.unlink()
        assert inspect.status(row, view) == "removed"
        assert len(list(view.items())) == 7


def test_copy_is_read_as_of_its_last_change(unique_name: Callable[[], str], tmp_path: Path) -> None:
    """What lived when a copy was made lives in it, however late it is looked at."""
    for engine in opened(f"posix:///{unique_name()}", size="1M"):
        path = copy_of(engine, tmp_path / "copy.bin")
        row = found(str(path))
        later = row.header["created_ns"] + 50_000_000_000
        os.utime(path, ns=(later, later))
        with View(row) as view:
            assert inspect.status(row, view) == "copy"
            (item,) = view.items(compile_glob("text"))
            assert item.ttl is not None
            assert 40 < item.ttl <= 100
            assert view.value("map") == {"a": [1]}


def test_damaged_copy(unique_name: Callable[[], str], tmp_path: Path) -> None:
    """Bytes changed in an item are found by check; the other items are seen."""
    for engine in opened(f"posix:///{unique_name()}", size="1M"):
        path = copy_of(engine, tmp_path / "copy.bin")
        data = path.read_bytes()
        at = data.index(b"textabc")
        path.write_bytes(data[:at] + b"tuxt" + data[at + 4 :])
        with View(found(str(path))) as view:
            assert {i.key for i in view.items() if i.state == "live"} >= {"number", "map", "huge"}
            assert [i.state for i in view.items() if i.key is None] == ["corrupt"]
            assert view.check() != []


@pytest.mark.parametrize(("at", "data", "error", "word"), [
    (0, b"NOTOURS!", shmcache.SegmentInvalid, "invalid"),
    (8, struct.pack("<I", 99), shmcache.LayoutMismatch, "other-layout"),
    (100, b"\xff", shmcache.SegmentInvalid, "invalid"),
])  # fmt: skip
def test_bad_header(
    at: int, data: bytes, error: type[Exception], word: str, unique_name: Callable[[], str], tmp_path: Path
) -> None:
    """A header that cannot be believed is refused with what is wrong, and located all the same."""
    for engine in opened(f"posix:///{unique_name()}", size="1M"):
        path = copy_of(engine, tmp_path / "copy.bin")
        with path.open("r+b") as f:
            f.seek(at)
            f.write(data)
        row = found(str(path))
        assert row.header == {}
        assert inspect.status(row, None) == word
        with pytest.raises(error, match="wanted"):
            View(row)


def test_short_copy(unique_name: Callable[[], str], tmp_path: Path) -> None:
    """A copy that was cut short is refused, naming both sizes."""
    for engine in opened(f"posix:///{unique_name()}", size="1M"):
        path = copy_of(engine, tmp_path / "copy.bin")
        os.truncate(path, 500_000)
        with pytest.raises(shmcache.LayoutMismatch, match="1048576 bytes, the segment has 500000"):
            View(found(str(path)))
        path.write_bytes(b"")
        with pytest.raises(shmcache.SegmentInvalid, match="0 bytes"):
            View(found(str(path)))


def test_settings(cache: shmcache.Engine) -> None:
    """The settings are those the segment was opened with."""
    told = inspect.settings(found(name_of(cache)).header)
    assert (told["size"], told["guards"], told["perms"], told["eviction"], told["clean_period"]) == (
        4 << 20,
        2,
        0o600,
        "auto",
        600,
    )


def test_damaged_value(unique_name: Callable[[], str], tmp_path: Path) -> None:
    """A value that fails its check is corrupt, with its key, though nobody asked for values; without `content` it looks live."""
    for engine in opened(f"posix:///{unique_name()}", size="1M"):
        path = copy_of(engine, tmp_path / "copy.bin")
        data = path.read_bytes()
        at = data.index(b"textabc")
        path.write_bytes(data[:at] + b"textabd" + data[at + 7 :])
        with View(found(str(path))) as view:
            states = {i.key: (i.state, i.type, i.size) for i in view.items()}
            assert states["text"] == ("corrupt", "str", 3)
            assert {s for k, (s, _, _) in states.items() if k != "text"} == {"live"}
            assert {i.state for i in view.items(content=False)} == {"live"}
            assert view.value("text") is MISS


def test_a_value_rewritten_under_every_look_is_torn(unique_name: Callable[[], str]) -> None:
    """An item whose bytes changed during all the looks it was given is torn, with its key; a later look sees it live."""
    name = unique_name()
    for engine in opened(f"posix:///{name}", size="40M", guards=1):
        with View(found(name)) as view:
            shell = [sys.executable, "-c", WRITER, str(engine.url.without_options())]
            child = subprocess.Popen(shell, stdout=subprocess.PIPE, cwd="/")
            try:
                assert child.stdout is not None
                assert child.stdout.readline() == b"on\n"
                states = set()
                for _ in range(20_000):
                    rows = [row for g in range(view.n_groups) for row in view.table._scan_meta(g, True, 1)]
                    states |= {row[14] for row in rows if row[0] == "large"}
                    if "torn" in states:
                        break
                assert "torn" in states
            finally:
                child.kill()
                child.wait()
                child.stdout.close()  # type: ignore[union-attr]
            assert [i.state for i in view.items() if i.key == "large"] == ["live"]


def test_workers(cache: shmcache.Engine) -> None:
    """Every worker slot that was used has a line: who took it, whether it lives, and what it counted."""
    cache.get("text")
    cache.get("absent")
    with View(found(name_of(cache))) as view:
        (worker,) = view.workers()
    assert (worker.pid, worker.held, worker.hits, worker.misses, worker.guard_timeouts) == (os.getpid(), True, 1, 1, 0)
    assert abs(time.time() - worker.started) < 3600
