"""check and repair: which damage the audit sees, word by word, and what is left of it after a repair."""

from __future__ import annotations

import importlib.util
import mmap
import os
import random
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shmcache
from shmcache import _core, inspect
from shmcache.catalog import Found, shm_path
from shmcache.engines.shm import ShmEngine
from shmcache.repair import Repaired, repair

from .shm_help import in_child, run_child, semop, wait_for

ITEMS = {f"k{i}": b"v%d" % i * (1 + i % 9) for i in range(700)} | {f"n{i}": i for i in range(50)} | {"large": b"x" * 9000}


class Places:
    """Where the parts of the only shard of a small segment lie, by the layout of layout.h."""

    def __init__(self, header: dict[str, int]) -> None:
        at = header["shard_off"]
        self.parts: dict[str, tuple[int, int]] = {
            "header": (0, 512), "control": (4096, 4096 + 96), "worker": (8192, 8192 + 128), "guard": (at, at + 8),
            "hard": (at + 64, at + 64 + 120), "soft": (at + 192, at + 192 + 512),
        }  # fmt: skip
        at += 704
        for name, size in (
            ("lease", header["n_leases"] * 24), ("life", header["n_pages"] * 8), ("next", header["n_pages"] * 4),
            ("birth", header["n_pages"] * 4), ("ghost", header["n_ghosts"] * 4),
        ):  # fmt: skip
            self.parts[name] = (at, at + size)
            at += size
        at = (at + 63) // 64 * 64
        pages = at + header["n_buckets"] * 64
        self.parts["bucket"], self.parts["page"] = (at, pages), (pages, pages + header["n_pages"] * header["page_size"])


def fill(name: str, **options: object) -> dict[str, int]:
    """A segment of one shard with ITEMS, used by nobody afterwards."""
    with ShmEngine.from_url(shmcache.Url.parse(f"posix:///{name}"), size=512 << 10, guards=1, item_size=64, **options) as cache:
        for key, value in ITEMS.items():
            cache.set(key, value, ttl=1000 if key.endswith("5") else None)
        for key in list(ITEMS)[::7]:
            cache.set(key, ITEMS[key])
        return cache._header()


@pytest.fixture(params=["fast", "semaphore"])
def name(request: pytest.FixtureRequest, unique_name: Callable[[], str]) -> Iterator[str]:
    chosen = unique_name()
    fill(chosen, guard=request.param)
    yield chosen
    with shmcache.open(f"posix:///{chosen}", mode="a") as cache:
        cache.unlink()


def found(name: str) -> Found:
    row = inspect.locate(f"posix:{name}")
    assert isinstance(row, Found)
    return row


def write(name: str, at: int, data: bytes) -> None:
    with open(shm_path(name), "r+b") as f:
        f.seek(at)
        f.write(data)


def read(name: str, at: int, size: int) -> bytes:
    with open(shm_path(name), "rb") as f:
        f.seek(at)
        return f.read(size)


def audit(name: str) -> list[dict[str, object]]:
    with inspect.View(found(name)) as view:
        return view.check()


def mended(name: str) -> Repaired:
    """After a repair the audit finds nothing, no value is wrong, and every key can be written."""
    done = repair(found(name))
    assert done.left == []
    assert audit(name) == []
    with shmcache.open(f"posix:///{name}", mode="a") as cache:
        there = cache.get_many(ITEMS)
        assert all(ITEMS[key] == value for key, value in there.items())
        assert len(there) >= len(ITEMS) - done.lost
        assert cache.stats()["items"] == len(cache)
        cache.set_many(ITEMS)
        assert cache.get_many(ITEMS) == ITEMS
        assert cache.check() == []
    return done


def test_a_sound_segment_is_left_as_it_is(name: str) -> None:
    """Nothing is mended in a sound segment, and its file stays byte for byte, the slot of the repairer excepted."""
    before = Path(shm_path(name)).read_bytes()
    done = repair(found(name))
    assert (done.mended, done.lost, done.moved, done.left) == ([], 0, 0, [])
    after = Path(shm_path(name)).read_bytes()
    assert [i for i in range(0, len(after), 64) if before[i : i + 64] != after[i : i + 64] and not 8192 <= i < 12288] == []


# -- what the audit sees -------------------------------------------------------------------------------------------------------

HINTS = {"worker", "soft", "birth", "ghost"}
"""Statistics and hints: wrong values cost figures or performance, never an item."""


def excused(part: str, index: int, old: int, new: int, lanes: list[tuple[int, int]], life: list[int]) -> bool:
    """Whether damage to a word may stay unseen: no reader and no writer acts on it, or it is as good a value as the old one.

    lanes: the page numbers of tail and head; life: the life words of the pages. `next` is in units of 4 bytes.
    """

    def is_free(word: int) -> bool:
        lane, seq = word >> 56, word & (1 << 56) - 1
        if lane >= 6 or lanes[lane][0] >= len(life):
            return True
        tail, head = (life[p] & (1 << 56) - 1 for p in lanes[lane])
        return not head <= seq <= tail

    if part == "header":  # the byte behind the longest name; the word after the state
        return (index == 61 and (old ^ new) >> 56 << 56 == old ^ new) or (index == 63 and (old ^ new) & 0xFFFFFFFF == 0)
    if part == "control":
        return index != 0  # all but the successor word: clamped wherever it is used
    if part == "guard":  # a slot that exists: nobody lives in it, so the next writer takes over
        return all((word >> 20 & 0xFFF) < 32 for word in (new & 0xFFFFFFFF, new >> 32))
    if part == "hard":
        if index < 12:
            empty = lanes[index % 6][0] >= len(life)
            return empty and (index >= 6 or new >> 32 == 0xFFFFFF)
        return index == 13 or (index == 12 and new > old)  # version; a later page life
    if part == "lease":
        return True  # free without an owner, and without a live one
    if part == "life":
        return is_free(old) and is_free(new)
    if part == "next":
        return is_free(life[index]) or any(tail == index for tail, _ in lanes)
    if part == "bucket":
        return index % 8 == 0 or (old >> 8 == new >> 8 and (old & 0xFF == 0 or new & 0xFF != 0))  # use bits; the time of sweeping
    return part in HINTS


def lanes_of(m: mmap.mmap, places: Places, n_pages: int) -> tuple[list[tuple[int, int]], list[int]]:
    hard = struct.unpack_from("<12Q", m, places.parts["hard"][0])
    life = list(struct.unpack_from(f"<{n_pages}Q", m, places.parts["life"][0]))
    return [(hard[lane] >> 32, hard[lane + 6] >> 32) for lane in range(6)], life


def test_the_audit_sees_every_word_that_matters(name: str) -> None:
    """Each word of header, control page and shard, damaged alone: a finding, or a word whose damage is harmless by definition."""
    header, rng = found(name).header, random.Random(6)
    places = Places(header)
    unseen = []
    with open(shm_path(name), "r+b") as f, mmap.mmap(f.fileno(), 0) as m, inspect.View(found(name)) as view:
        lanes, life = lanes_of(m, places, header["n_pages"])
        for part, (first, end) in places.parts.items():
            if part == "page":
                continue
            unit = 4 if part == "next" else 8
            spots = range(first, end, unit)
            for at in spots if len(spots) <= 130 else rng.sample(spots, 130):
                old = int.from_bytes(m[at : at + unit], "little")
                for new in (old ^ 1 << rng.randrange(8 * unit), old ^ 1 << 8 * unit - 1, (1 << 8 * unit) - 1):
                    m[at : at + unit] = new.to_bytes(unit, "little")
                    try:
                        seen = bool(view.check()) if part != "header" else not header_sound(f.fileno(), len(m))
                    finally:
                        m[at : at + unit] = old.to_bytes(unit, "little")
                    if new != old and not seen and not excused(part, (at - first) // unit, old, new, lanes, life):
                        unseen.append((part, (at - first) // unit, f"{old:#x}", f"{new:#x}"))
        assert unseen == []
        assert view.check() == []


def header_sound(fd: int, size: int) -> bool:
    try:
        _core.read_header(fd, -1, size)
    except (shmcache.SegmentInvalid, shmcache.LayoutMismatch):
        return False
    return True


def item_bytes(name: str) -> list[tuple[int, int]]:
    """Where the bytes of live items lie that their check covers: offset in the file, length; items on one page only."""
    row = found(name)
    start, size = Places(row.header).parts["page"][0], row.header["page_size"]
    spans = []
    with inspect.View(row) as view:  # byte 7 of the header is a check where integrity=header
        for item in view.items():
            key = item.key.encode() if isinstance(item.key, str) else item.key or b""
            if item.type == "int" or item.off + 24 + len(key) + item.size > size:
                continue
            at = start + item.page * size + item.off
            total = (16 + len(key) + item.size + 4 + 7) // 8 * 8
            spans += [(at, 7), (at + 16, len(key) + item.size), (at + total - 4, 4)]
    return spans


def test_the_audit_sees_every_byte_of_an_item(name: str) -> None:
    """A bit of an item's header, key, value or check, turned over, is a finding; what is left out is changed in place."""
    rng = random.Random(6)
    spans = item_bytes(name)
    with open(shm_path(name), "r+b") as f, mmap.mmap(f.fileno(), 0) as m, inspect.View(found(name)) as view:
        for first, length in rng.sample(spans, 300):
            at, bit = first + rng.randrange(length), 1 << rng.randrange(8)
            m[at] ^= bit
            assert view.check() != [], (at - first, length, bit)
            m[at] ^= bit
        assert view.check() == []


# -- what a repair leaves ------------------------------------------------------------------------------------------------------


def test_damage_of_every_part_is_mended(name: str) -> None:
    """Whatever word is damaged, alone or with others: no finding is left, no wrong value, every key can be written again."""
    header, rng = found(name).header, random.Random(6)
    places = Places(header)
    for part, (first, end) in places.parts.items():
        if part == "header":
            continue
        for n_words in (1, 1, 1, 20):
            spans = item_bytes(name)
            for _ in range(n_words):
                if part == "page":  # what a check covers: a deadline or a number that was changed is as good as the old one
                    at, length = rng.choice(spans)
                    at += rng.randrange(length)
                    write(name, at, bytes([read(name, at, 1)[0] ^ 1 << rng.randrange(8)]))
                    continue
                at = rng.randrange(first, end - 7, 4)
                old = read(name, at, 8)
                word = int.from_bytes(old, "little")
                new = rng.choice((word ^ 1 << rng.randrange(64), rng.getrandbits(64), (1 << 64) - 1, word + 8))
                if part == "control" and at < 4104 and new & (1 << 64) - 1 <= 1:
                    continue  # not marked as removed
                if part == "hard" and abs(at - first - 112) < 8:
                    continue  # nor cleared: a lower flush_seq is as good as any
                write(name, at, (new & (1 << 64) - 1).to_bytes(8, "little"))
            mended(name)


def test_items_around_a_damaged_log_are_kept(name: str) -> None:
    """With the ends of every lane overwritten nothing is lost: items are found through the index and stored anew."""
    first, _ = Places(found(name).header).parts["hard"]
    write(name, first, b"\xff" * 96)
    done = mended(name)
    assert (done.lost, done.moved) == (0, len(ITEMS))
    assert {line["code"] for line in done.mended} >= {"lane", "counts"}


def test_what_a_repair_says(name: str) -> None:
    """A line names each thing mended: a forged guard, a rotten entry, a key twice, a damaged item, a stuck sweep, a word of a
    successor that is not there."""
    places = Places(found(name).header)
    write(name, places.parts["guard"][0], struct.pack("<II", 0xFFF00002, 0xFFF00002))
    write(name, 4096, struct.pack("<Q", 12345))
    write(name, 4096 + 64, struct.pack("<Q", 1 << 60))
    with inspect.View(found(name)) as view:
        items = [item for item in view.items() if item.type != "int"]
    bucket = places.parts["bucket"][0]
    one, two = (bucket + item.bucket * 64 + 8 + item.slot * 8 for item in items[:2])
    write(name, one, read(name, two, 8)[:6] + b"\x01\x00")
    at = places.parts["page"][0] + items[5].page * found(name).header["page_size"] + items[5].off + 16 + len(str(items[5].key))
    write(name, at, b"\x00")
    assert {f["code"] for f in audit(name)} == {"successor", "guard-owner", "entry-key", "item-check"}
    done = mended(name)
    assert sorted({line["code"] for line in done.mended}) == ["counts", "entry", "guard", "successor", "sweep"]
    assert done.lost == 2
    assert {line["text"].partition(", ")[2] for line in done.mended if line["code"] == "entry"} == {
        "it leads to no item of its key", "it has an item that fails its check",
    }  # fmt: skip


@pytest.mark.parametrize("value", [0, 2])
def test_a_guard_semaphore_that_is_not_one_is_set_right(name: str, value: int) -> None:
    """A guard semaphore at 0 or 2 with nobody alive becomes 1."""
    header = found(name).header
    run_child(lambda: semop(header["sem_id"], 1, value - 1, 0))
    assert [f["code"] for f in audit(name)] == (["guard-value"] if value == 2 else [])
    assert [line["code"] for line in mended(name).mended] == ["guard"]


def test_refused_while_somebody_uses_the_segment(name: str) -> None:
    """A process that has the segment attached, be it stopped or a reader, is named, and nothing is changed."""
    write(name, Places(found(name).header).parts["guard"][0], b"\xff" * 4)

    def user(mode: str) -> None:
        with shmcache.open(f"posix:///{name}", mode=mode) as cache:
            cache.get("k1")
            signal.pause()

    for mode in ("a", "r"):
        pid = in_child(lambda mode=mode: user(mode))  # type: ignore[misc]
        try:
            wait_for(lambda pid=pid: str(pid) in str(attached_error(name)))  # type: ignore[misc]
            assert read(name, Places(found(name).header).parts["guard"][0], 4) == b"\xff" * 4
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert [line["code"] for line in mended(name).mended] == ["guard"]


def attached_error(name: str) -> str:
    try:
        with inspect.View(found(name)) as view:
            view.check()
        from shmcache import processes

        if not [p for p in processes.attached(found(name)) if p.pid != os.getpid()]:
            return ""
        repair(found(name))
    except shmcache.LockTimeout as error:
        return str(error)
    return ""


def test_a_worker_slot_that_is_held_refuses(name: str) -> None:
    """A live worker that /proc does not show, known by its beacon, refuses the repair; two repairs at once, too."""
    header, ready = found(name).header, os.pipe()

    def worker() -> None:
        semop(header["sem_id"], 1 + header["n_shards"] + 3, 1)
        os.write(ready[1], b"x")
        signal.pause()

    pid = in_child(worker)
    os.read(ready[0], 1)
    with pytest.raises(shmcache.LockTimeout, match="worker slot"):
        repair(found(name))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for fd in ready:
        os.close(fd)
    _core.lifecycle_enter(header["sem_id"], 0)
    with pytest.raises(shmcache.LockTimeout, match="at work"):
        repair(found(name))
    _core.lifecycle_leave(header["sem_id"])
    assert repair(found(name)).left == []


def test_beyond_repair(unique_name: Callable[[], str]) -> None:
    """A header that cannot be believed, and semaphores that are gone, are SegmentInvalid and say what then."""
    name = unique_name()
    header = fill(name)
    old = read(name, 100, 1)
    write(name, 100, bytes([old[0] ^ 1]))
    with pytest.raises(shmcache.SegmentInvalid, match="beyond repair: `shmcache rm"):
        repair(found(name))
    write(name, 100, old)
    _core.sem_remove(header["sem_id"])
    with pytest.raises(shmcache.SegmentInvalid, match="beyond repair: `shmcache dump`"):
        repair(found(name))
    os.unlink(shm_path(name))


def test_system_v(unique_name: Callable[[], str]) -> None:
    """A System V segment whose writer left a forged owner is mended as well."""
    name = unique_name()
    with shmcache.open(f"sysv:///{name}", size="512K") as cache:
        cache.set("k", 1)
    row = inspect.locate(f"sysv:{name}")
    assert isinstance(row, Found)
    assert repair(row).mended == []
    with shmcache.open(f"sysv:///{name}", mode="a") as cache:
        assert cache.get("k") == 1
        cache.unlink()


@pytest.mark.skipif(importlib.util.find_spec("typer") is None, reason="typer is not installed")
def test_the_command(name: str) -> None:
    """`shmcache check --repair` prints what it mended and ends with 0; refused it ends with 6; on memory:// with 4."""
    from .cli_help import run

    write(name, Places(found(name).header).parts["guard"][0], b"\xff" * 4)
    assert run("check", f"posix:{name}").code == 5
    result = run("check", "--repair", f"posix:{name}")
    assert (result.code, [row["code"] for row in result.rows]) == (0, ["guard"])
    assert result.err == "shmcache: 1 mended, 0 items stored anew, 0 lost\n"
    assert run("check", f"posix:{name}").code == 0

    def refused() -> None:
        assert run("check", "--repair", f"posix:{name}").code == 6

    with shmcache.open(f"posix:///{name}", mode="a") as cache:
        cache.set("k1", ITEMS["k1"])
        run_child(refused)
    assert run("check", "--repair", "memory://").code == 4
