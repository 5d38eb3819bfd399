"""resize: the items, and whoever reads, writes, walks and holds locks meanwhile."""

# ruff: noqa: F811

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import shmcache
from shmcache import _core, catalog
from shmcache.engines.shm import ShmEngine

from .resize_help import again, cache, form, make  # noqa: F401
from .shm_help import in_child, reap, run_child, take_guard, wait_for


def rows(cache: ShmEngine) -> dict[Any, tuple[Any, ...]]:
    """What the index says of each key: type, size, deadline, soft deadline, version, use."""
    found = [row for group in range(cache._n_groups) for row in cache._scan_meta(group, True, None)]
    return {row[0]: (*row[1:6], row[12]) for row in found}


@pytest.mark.parametrize("size", ["1M", "7M", "40M"])
def test_every_item_is_the_same(cache: ShmEngine, size: str) -> None:
    """Values, types, lifetimes, soft deadlines, versions and use counts are those of before."""
    cache._set_clock(1000)
    cache.set_many({f"bytes:{i}": os.urandom(i * 7) for i in range(200)}, ttl=500)
    cache.set_many({"str": "é" * 9, "none": None, "true": True, "huge": 1 << 90, "map": {"a": [1, 2.5]}, "empty": b""})
    cache.set("large", os.urandom(200_000))
    cache._set_grace("grace", "stale soon", 10.0, 60.0)
    cache._set_grace("stale", "stale", 0.001, 60.0)
    for i in range(50):
        cache.incr(f"n{i}", i, ttl=9 if i % 2 else None)
    for _ in range(3):
        cache.get_many([f"bytes:{i}" for i in range(0, 200, 3)])
    cache.set("gone", 1, ttl=2)
    cache.namespace("space").set("key", "value")
    cache._set_clock(4000)
    before, values, sets = rows(cache), dict(cache.items()), cache.stats()["sets"]
    del before["gone"]
    done = cache.resize(size)
    assert cache._header()["size"] == done.size == int(size[:-1]) << 20
    assert (done.items, done.left_out, done.corrupt) == (len(before), 0, 0)
    assert rows(cache) == before
    assert dict(cache.items()) == values
    assert cache._get_grace("stale") == ("stale", False)
    assert cache.namespace("space").get("key") == "value"
    assert cache.stats()["sets"] == sets
    cache._set_clock(501_000)
    assert cache.get("bytes:7") is None
    assert cache.get("str") == "é" * 9


def test_tokens_mean_what_they_meant(cache: ShmEngine) -> None:
    """A cas token from before stores once if nobody wrote since, and never if somebody did, before the change or after it."""
    for key in ("still", "before", "after", "number"):
        cache.set(key, 1 if key == "number" else "x")
    tokens = {key: cache.gets(key)[1] for key in ("still", "before", "after", "number")}
    cache.set("before", "x")
    cache.resize("4M")
    cache.set("after", "x")
    cache.incr("number")
    assert [cache.cas(key, "y", tokens[key]) for key in tokens] == [True, False, False, False]
    assert cache.cas("still", "z", tokens["still"]) is False


def test_other_handles_follow(cache: ShmEngine) -> None:
    """The first call after the change, of whatever kind, by a handle that was attached before sees what came after it."""
    others = [again(cache), again(cache), again(cache, mode="r"), again(cache, mode="r"), again(cache)]
    cache.set("k", 1)
    assert [other.get("k") for other in others] == [1] * 5
    cache.resize("3M")
    cache.set("k", 2)
    assert others[0].get("k") == 2
    assert others[1].incr("k") == 3
    assert others[2].get("k") == 3
    assert others[3].stats()["size"] == 3 << 20
    assert len(others[4]) == 1
    assert {other._header()["size"] for other in others} == {3 << 20}
    assert [other.get("k") for other in others] == [3] * 5
    with pytest.raises(shmcache.NotSupported):
        others[2].set("k", 4)
    for other in others:
        other.close()
        with pytest.raises(shmcache.ShmCacheError):
            other.get("k")


def test_handles_asleep_over_several_changes_follow_to_the_last(cache: ShmEngine) -> None:
    """A handle that made no call during three resizes goes to the newest segment at once."""
    idle = again(cache)
    for n, size in enumerate(("3M", "5M", "1M")):
        cache.set("n", n)
        cache.resize(size)
    assert idle.get("n") == 2
    assert idle.incr("n") == 3
    assert cache["n"] == 3
    idle.close()


def test_a_reader_of_another_process_follows(cache: ShmEngine) -> None:
    """A process that only reads sees what is written after the change."""
    cache.set("k", 0)

    def read() -> None:
        wait_for(lambda: cache.get("k") == 1)

    reader = in_child(read)
    time.sleep(0.05)
    cache.resize("3M")
    cache.set("k", 1)
    reap(reader)


def test_a_recreated_segment_is_not_followed(cache: ShmEngine) -> None:
    """A handle whose segment was replaced, and the new one removed and made anew, raises GuardLost; reattach() mends it."""
    idle = again(cache)
    cache.set("k", 1)
    cache.resize("3M")
    cache.unlink()
    cache.reattach()
    assert idle.get("k") == 1
    with pytest.raises(shmcache.GuardLost):
        idle.set("k", 2)
    idle.reattach()
    assert idle.get("k") is None
    idle.close()


def test_unlink_removes_what_replaced_the_segment(cache: ShmEngine) -> None:
    """unlink() by a handle that has not followed yet removes the new segment, not the old one's ghost."""
    idle = again(cache)
    cache.resize("3M")
    idle.unlink()
    idle.close()
    with pytest.raises(shmcache.GuardLost):
        cache.set("k", 1)
    cache.reattach()
    assert cache._header()["size"] == 3 << 20


def test_four_writers_lose_nothing(make: Callable[..., ShmEngine]) -> None:
    """Counters, lists of appended bytes, deletions and touches of four processes are exact over eight resizes."""
    cache = make(lock_timeout=30.0)
    stop = mmap.mmap(-1, 4096)

    def write(n: int) -> None:
        done = 0
        while not stop[0]:
            done += 1
            cache.incr("all")
            cache.incr(f"own:{n}")
            cache.set(f"last:{n}:{done % 50}", done)
            assert cache.get(f"last:{n}:{done % 50}") == done
            if done % 10 == 0:
                assert cache.delete(f"last:{n}:{done % 50}")
                assert cache.touch(f"own:{n}", 1000)
            if done % 20 == 1:
                if done % 1000 == 1:
                    cache.set(f"text:{n}", b"")
                assert cache.append(f"text:{n}", b"%d " % done)
        struct.pack_into("<Q", stop, 8 + 8 * n, done)

    writers = [in_child(lambda n=n: write(n)) for n in range(4)]
    with contextlib.ExitStack() as end:
        end.callback(stop.__setitem__, 0, 1)
        for size in itertools.islice(itertools.cycle(("3M", "8M", "2M")), 8):
            done = cache.resize(size, timeout=30.0)
            assert done.left_out == 0
            time.sleep(0.02)
    reap(*writers)
    counts = struct.unpack_from("<4Q", stop, 8)
    assert cache.counter("all") == sum(counts)
    assert [cache.counter(f"own:{n}") for n in range(4)] == list(counts)
    for n, count in enumerate(counts):
        for i in range(max(count - 49, 1), count + 1):
            assert cache.get(f"last:{n}:{i % 50}") == (None if i % 10 == 0 else i)
        first = (count - 1) // 1000 * 1000 + 1
        assert cache.get(f"text:{n}") == b"".join(b"%d " % i for i in range(first, count + 1, 20))
        assert cache.ttl(f"own:{n}") is not None


def test_threads_use_one_handle_over_the_change(make: Callable[..., ShmEngine]) -> None:
    """Threads that read large values without the GIL and write through the resizing handle itself go on undisturbed."""
    cache = make(size=16 << 20, eviction="none", lock_timeout=30.0)
    value, stop, counts = os.urandom(150_000), threading.Event(), [0, 0]
    cache.set("large", value)

    def read() -> None:
        while not stop.is_set():
            assert cache.get("large") == value

    def write(n: int) -> None:
        while not stop.is_set():
            cache.incr("n")
            cache.set(f"w{n}", b"x" * 40_000)
            counts[n] += 1

    threads = [threading.Thread(target=read), *(threading.Thread(target=write, args=(n,)) for n in range(2))]
    for thread in threads:
        thread.start()
    for size in ("24M", "12M", "16M", "8M"):
        cache.resize(size, timeout=30.0)
    stop.set()
    for thread in threads:
        thread.join()
    assert cache.counter("n") == sum(counts)
    assert cache.get("large") == value


def test_a_walk_stays_on_the_segment_it_began_on(make: Callable[..., ShmEngine]) -> None:
    """keys(), items() and a namespace's keys() begun before the change give every item once."""
    cache = make(item_size=64)
    wanted = {f"k{i}" for i in range(3000)}
    cache.set_many(dict.fromkeys(wanted, 1))
    space = cache.namespace("space")
    space.set_many(dict.fromkeys(wanted, 1))
    walks = [(key for key in iter(cache) if isinstance(key, str)), (k for k, _ in cache.items("k*")), space.keys()]
    firsts = [next(walk) for walk in walks]
    cache.resize("1M")
    cache.set("k-new", 1)
    for first, walk in zip(firsts, walks, strict=True):
        found = [first, *walk]
        assert len(found) == len(set(found))
        assert set(found) == wanted
    assert cache.delete_match("k*") == 3001


def test_locks_are_carried_over(cache: ShmEngine) -> None:
    """A lock held over the change keeps others out, can be extended, and is freed by its release, not by a child's."""
    lock = cache.lock("job", lease=60.0, timeout=0.0)
    with lock:
        cache.resize("3M")
        with pytest.raises(shmcache.LockTimeout), cache.lock("job", timeout=0.0):
            pass
        lock.extend(60.0)
        cache.resize("4M")
        run_child(lambda: lock.__exit__(None, None, None))
        with pytest.raises(shmcache.LockTimeout), cache.lock("job", timeout=0.0):
            pass
    with cache.lock("job", timeout=0.0):
        pass


def test_a_carried_lock_ends_with_its_lease(cache: ShmEngine) -> None:
    """The lock of a holder that died after the change is free when the lease is over."""
    cache._set_clock(1000)

    def hold() -> None:
        cache.lock("job", lease=5.0, timeout=0.0).__enter__()
        cache.resize("3M")

    run_child(hold)
    with pytest.raises(shmcache.LockTimeout), cache.lock("job", timeout=0.0):
        pass
    cache._set_clock(6001)
    with cache.lock("job", timeout=0.0):
        pass


def test_shrinking_leaves_out_what_is_used_least(cache: ShmEngine) -> None:
    """With eviction=auto a segment too small for all keeps what was read most, and says how many went."""
    cache.set_many({f"k{i}": os.urandom(1000) for i in range(1200)})
    for _ in range(3):
        cache.get_many([f"k{i}" for i in range(100)])
    done = cache.resize("512K")
    assert done.items == 1200
    assert done.left_out == 1200 - len(cache) > 500
    assert len(cache.get_many([f"k{i}" for i in range(100)])) > 90


def test_eviction_none_never_drops(make: Callable[..., ShmEngine]) -> None:
    """With eviction=none a segment too small is refused with NoSpace, and nothing is changed."""
    cache = make(eviction="none")
    cache.set_many({f"k{i}": os.urandom(1000) for i in range(1200)})
    uuid, before = cache._header()["uuid"], dict(cache.items())
    with pytest.raises(shmcache.NoSpace):
        cache.resize("512K")
    cache.set("large", os.urandom(200_000))
    cache.resize("4M")
    with pytest.raises(shmcache.NoSpace):
        cache.resize("256K")
    assert cache._header()["uuid"] != uuid
    del cache["large"]
    assert dict(cache.items()) == before


def test_what_was_given_once_is_kept(make: Callable[..., ShmEngine]) -> None:
    """Guards, workers and max_value that the segment was opened with stay; buckets go with the size; the rest is planned anew."""
    cache = make(guards=2, workers=40, max_value=9000, buckets=4096, clean_period=33.0, integrity="header", secure_delete=True)
    cache.resize("4M")
    found = cache._header()
    assert (found["n_shards"], found["n_workers"], found["max_value"]) == (2, 40, 9000)
    assert found["n_buckets"] * 2 == 8192
    assert found["clean_period_ms"] == 33000
    assert found["flags"] & (_core.FLAG_HEADER_ONLY | _core.FLAG_SECURE) == _core.FLAG_HEADER_ONLY | _core.FLAG_SECURE
    cache.resize(guards=4, max_value="10K", buckets=1024, workers=50)
    found = cache._header()
    assert (found["size"], found["n_shards"], found["n_buckets"], found["n_workers"]) == (4 << 20, 4, 256, 50)
    assert found["max_value"] == 10240
    plain = make()
    plain.resize("4M")
    fresh = make(size=4 << 20)
    for field in ("n_shards", "n_buckets", "n_pages", "page_size", "n_workers", "max_value"):
        assert plain._header()[field] == fresh._header()[field]


def test_counters_and_the_birth_go_on(cache: ShmEngine) -> None:
    """Statistics never fall over a resize, and the segment's age is that of the first."""
    for i in range(100):
        cache.set(f"k{i}", i)
        cache.get(f"k{i}")
        cache.get("absent")
    before, created = cache.stats(), cache._header()["created_ns"]
    cache.resize("4M")
    after = cache.stats()
    assert all(after[name] >= before[name] for name in ("hits", "misses", "sets", "deletes", "incrs", "items", "bytes"))
    assert cache._header()["created_ns"] == created


def test_one_resize_at_a_time(cache: ShmEngine) -> None:
    """While another process resizes, resize() raises LockTimeout and changes nothing."""
    _core.lifecycle_enter(cache._header()["sem_id"], 0)
    with pytest.raises(shmcache.LockTimeout, match="another resize"):
        cache.resize("4M")
    _core.lifecycle_leave(cache._header()["sem_id"])
    assert cache.resize("4M").size == 4 << 20


def test_a_stopped_writer_makes_it_give_up(form: str, make: Callable[..., ShmEngine]) -> None:
    """With a guard held by a stopped process, resize() raises LockTimeout, gives back every guard and leaves nothing."""
    if form.startswith("sysv"):
        pytest.skip("a guard is held by writing to the segment's file")
    cache = make(guards=2)
    cache.set("k", 1)

    def hold() -> None:
        cache.set("claims a slot", 1)
        take_guard(cache, 1)
        signal.pause()

    holder = in_child(hold)
    wait_for(lambda: cache._guards()[1]["state"] == "held")
    try:
        with pytest.raises(shmcache.LockTimeout):
            cache.resize("4M", timeout=0.2)
        assert cache._guards()[0]["state"] == "free"
        assert cache._header()["size"] == 2 << 20
        assert [f for f in os.listdir("/dev/shm") if f.startswith(catalog.PRIVATE) and f.endswith(f".{cache._name}")] == []
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    assert cache.resize("4M").items == 2


@pytest.mark.parametrize("size", ["100K", "1T", -1, "many"])
def test_impossible_sizes(cache: ShmEngine, size: Any) -> None:
    """A size that cannot be is an error that names it; the segment stays."""
    cache.set("k", 1)
    with pytest.raises((ValueError, shmcache.NoSpace), match=r"size|bytes"):
        cache.resize(size)
    assert cache.get("k") == 1
    assert cache._header()["size"] == 2 << 20


def test_refused_where_there_is_no_name(unique_name: Callable[[], str]) -> None:
    """Anonymous segments, explicit System V keys and mode=r are NotSupported."""
    key = f"0x{random.randrange(1 << 24, 1 << 31):x}"
    with shmcache.open(f"anon:{unique_name()}://", size="1M") as anon, pytest.raises(shmcache.NotSupported):
        anon.resize("2M")  # type: ignore[attr-defined]
    with shmcache.open(f"sysv:///{key}", size="1M") as explicit:
        with pytest.raises(shmcache.NotSupported):
            explicit.resize("2M")  # type: ignore[attr-defined]
        explicit.unlink()
    with shmcache.open(f"posix:///{unique_name()}", size="1M") as cache:
        with again(cache, mode="r") as reader, pytest.raises(shmcache.NotSupported):  # type: ignore[arg-type]
            reader.resize("2M")
        cache.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change the user")
def test_only_the_owner_or_root(make: Callable[..., ShmEngine]) -> None:
    """Another user who may write is refused; root's copy belongs to the owner, whose workers follow."""
    cache = make(owner="nobody", perms=0o666, owners=(0,))

    def as_nobody() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        mine = again(cache, owners=(0,), perms=0o666)
        mine.set("k", 1)
        os.write(ready[1], b"x")
        wait_for(lambda: mine._header()["size"] == 4 << 20)
        assert mine.incr("k") == 2

    ready = os.pipe()
    worker = in_child(as_nobody)
    os.read(ready[0], 1)
    cache.resize("4M")
    reap(worker)
    assert cache["k"] == 2
    for fd in ready:
        os.close(fd)
