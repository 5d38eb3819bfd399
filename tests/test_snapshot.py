"""Snapshots: what is saved comes back, lifetimes included, and damage is noticed."""

from __future__ import annotations

import contextlib
import io
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shmcache
from shmcache import snapshot
from shmcache.catalog import Found
from shmcache.inspect import View, locate
from shmcache.snapshot import RawCodec, SnapshotDamaged, Summary, load, save, verify

ITEMS: dict[Any, Any] = {
    "text": "abc", "empty": "", b"\xff\x00": b"\x00\x01", "int": -(2**63), "big": 10**50, "float": math.inf, "none": None,
    "yes": True, "no": False, "map": {"a": [1, b"x"]}, "large": b"x" * 200_000,
}  # fmt: skip


@pytest.fixture
def segment(unique_name: Callable[[], str]) -> Iterator[Callable[..., shmcache.Engine]]:
    """Makes segments; removes them after the test."""
    made: list[shmcache.Engine] = []

    def make(url: str = "posix:///{}", **options: Any) -> shmcache.Engine:
        made.append(shmcache.open(url.format(unique_name()), **{"size": "2M", **options}))
        return made[-1]

    yield make
    for engine in made:
        with contextlib.suppress(shmcache.ShmCacheError):
            engine.unlink()
        engine.close()


def view_of(engine: shmcache.Engine) -> View:
    found = locate(f"{engine.url.scheme}:{engine.url.path}")
    assert isinstance(found, Found)
    return View(found)


def saved(engine: shmcache.Engine) -> io.BytesIO:
    file = io.BytesIO()
    with view_of(engine) as view:
        save(view, file)
    return file


def contents(engine: shmcache.Engine) -> dict[Any, Any]:
    return dict(engine.items())


@pytest.fixture
def full(segment: Callable[..., shmcache.Engine]) -> shmcache.Engine:
    engine = segment()
    assert engine.set_many(ITEMS) == []
    return engine


@pytest.mark.parametrize("url", ["posix:///{}", "sysv:///{}"])
def test_there_and_back(url: str, full: shmcache.Engine, segment: Callable[..., shmcache.Engine]) -> None:
    """Every item comes back with its type, in a segment of another size and form."""
    other = segment(url, size="3M", guards=2)
    summary = load(saved(full), other)
    assert summary == Summary(items=len(ITEMS))
    assert contents(other) == contents(full) == ITEMS
    assert {k: type(v) for k, v in contents(other).items()} == {k: type(v) for k, v in ITEMS.items()}


def test_into_another_engine_and_back(full: shmcache.Engine, segment: Callable[..., shmcache.Engine]) -> None:
    """A snapshot of a segment loads into an engine in this process, and one of that into a segment."""
    with shmcache.open("memory:snapshot://") as memory:
        load(saved(full), memory)
        assert contents(memory) == ITEMS
        file = io.BytesIO()
        save(memory, file)
        back = segment()
        load(file, back)
    assert contents(back) == ITEMS


def test_payloads_are_not_decoded(segment: Callable[..., shmcache.Engine]) -> None:
    """A pickle goes from one private segment to another as it is; a segment others may read does not take it."""
    pickled = segment(codec="pickle")
    pickled.set("set", {1, 2})
    file = saved(pickled)
    raw = segment(codec=RawCodec())
    assert load(file, raw).items == 1
    name = raw.url
    raw.close()
    again = shmcache.open(name, codec="pickle", mode="a")
    assert again.get("set") == {1, 2}
    again.unlink()
    again.close()
    assert load(file, segment(codec=RawCodec(), perms=0o640)) == Summary(skipped=1)
    assert load(file, segment()) == Summary(skipped=1)


def test_lifetimes_are_absolute(segment: Callable[..., shmcache.Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Items keep their end; what ended between save and load is left out."""
    source, target = segment(), segment()
    source.set_many({"short": 1}, ttl=100)
    source.set("long", 2, ttl=1000)
    source.set("ever", 3)
    file = saved(source)
    real = time.time
    monkeypatch.setattr(snapshot, "unix_time", lambda: real() + 500)
    assert load(file, target) == Summary(items=2, expired=1)
    monkeypatch.undo()
    assert target.ttl("ever") == math.inf
    assert 990 < (target.ttl("long") or 0) <= 1000


def test_lifetimes_rebased(segment: Callable[..., shmcache.Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """With `remaining` an item gets the lifetime it had left when it was saved."""
    source, target = segment(), segment()
    source.set("k", 1, ttl=100)
    real = time.time
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "unix_time", lambda: real() - 5000)
        file = saved(source)
    assert load(file, target) == Summary(expired=1)
    assert load(file, target, remaining=True) == Summary(items=1)
    assert 95 < (target.ttl("k") or 0) < 101


def test_match(full: shmcache.Engine) -> None:
    """Only keys that match are saved."""
    file = io.BytesIO()
    with view_of(full) as view:
        assert save(view, file, match="n*").items == 2


def test_add_keeps_what_is_there(full: shmcache.Engine, segment: Callable[..., shmcache.Engine]) -> None:
    """With `add` a present item is kept, so that a load can be run again."""
    target = segment()
    target.set("text", "mine")
    assert load(saved(full), target, add=True) == Summary(items=len(ITEMS) - 1, skipped=1)
    assert target.get("text") == "mine"


def test_too_large_items_are_counted(full: shmcache.Engine, segment: Callable[..., shmcache.Engine]) -> None:
    """An item that does not fit the engine is counted and left out."""
    target = segment(max_value="1K")
    assert load(saved(full), target) == Summary(items=len(ITEMS) - 1, refused=1)


def test_verify(full: shmcache.Engine) -> None:
    """verify gives the header and the number of items."""
    file = saved(full)
    file.seek(0)
    header = verify(file)
    assert (header["items"], header["source"]) == (len(ITEMS), f"posix:{full.url.path}")


def test_every_cut_is_noticed(segment: Callable[..., shmcache.Engine]) -> None:
    """A file cut short anywhere is refused and nothing is stored."""
    source, target = segment(), segment()
    source.set_many({"a": 1, "b": "x", "c": [1]})
    data = saved(source).getvalue()
    for length in range(len(data)):
        with pytest.raises(SnapshotDamaged):
            load(io.BytesIO(data[:length]), target)
    assert len(target) == 0


@pytest.mark.parametrize("more", [b"\x00", b"junk", b"\xc6\xff", None], ids=["a byte", "text", "half an object", "a snapshot"])
def test_more_after_the_end_is_noticed(more: bytes | None, segment: Callable[..., shmcache.Engine]) -> None:
    """Bytes after the trailer are refused, another snapshot among them, and nothing is stored."""
    source, target = segment(), segment()
    source.set_many({"a": 1, "b": "x"})
    data = saved(source).getvalue()
    with pytest.raises(SnapshotDamaged, match="after the trailer of 2 items"):
        load(io.BytesIO(data + (data if more is None else more)), target)
    assert len(target) == 0


def test_every_changed_byte_is_noticed(segment: Callable[..., shmcache.Engine]) -> None:
    """A changed byte is noticed, wherever it is."""
    source, target = segment(), segment()
    source.set_many({"a": 1, "b": "x", "c": [1]})
    data = saved(source).getvalue()
    for at in range(len(data)):
        broken = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        with pytest.raises(SnapshotDamaged):
            load(io.BytesIO(broken), target)
    assert len(target) == 0


def test_partial_loads_the_good_part(segment: Callable[..., shmcache.Engine]) -> None:
    """With `partial` the sound blocks of a damaged file are stored and the damage is told."""
    source = segment(size="4M")
    source.set_many({f"{i:04}": b"v" * 1000 for i in range(1000)})
    data = bytearray(saved(source).getvalue())
    data[len(data) // 2] ^= 1
    target = segment(size="4M")
    summary = load(io.BytesIO(bytes(data)), target, partial=True)
    assert "checksum" in summary.damaged
    assert 850 < summary.items == len(target) < 1000
    target.clear()
    summary = load(io.BytesIO(bytes(data[: len(data) // 3])), target, partial=True)
    assert summary.damaged
    assert 200 < summary.items == len(target) < 400


def test_save_is_atomic(full: shmcache.Engine, tmp_path: Path) -> None:
    """A save that fails leaves the old file and no other; one that succeeds leaves a file of mode 0600."""
    path = tmp_path / "s.snap"
    path.write_bytes(b"old")

    def fail(n: int) -> None:
        raise KeyboardInterrupt

    with view_of(full) as view:
        with pytest.raises(KeyboardInterrupt):
            save(view, str(path), progress=fail)
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("s.snap", b"old")]
        save(view, str(path))
    assert os.listdir(tmp_path) == ["s.snap"]
    assert path.stat().st_mode & 0o777 == 0o600
    with path.open("rb") as file:
        assert verify(file)["items"] == len(ITEMS)


@pytest.mark.parametrize("data", [b"", b"\x00", b"hello world", b"\x81\xa6format\xa1x", b"\xc1" * 100])
def test_other_files(data: bytes, segment: Callable[..., shmcache.Engine]) -> None:
    """What is no snapshot is refused."""
    with pytest.raises(SnapshotDamaged, match="wanted"):
        load(io.BytesIO(data), segment())
