"""shmcache.engines.memory: what it has beyond the contract."""

import math
import os
import random
import threading

import pytest

import shmcache
from shmcache import Capability, NoSpace, NotSupported, ShmCacheError, ValueTooLarge
from shmcache.engines.memory import MemoryEngine
from shmcache.testing import EngineConformance, in_processes


class Derived(MemoryEngine):
    """With what Engine derives in place of what MemoryEngine does in one step."""

    pop = shmcache.Engine.pop
    gat = shmcache.Engine.gat
    _lease_wait = shmcache.Engine._lease_wait


class Plain(MemoryEngine):
    """Without the capabilities an engine can do without."""

    capabilities = Capability.EXPIRE | Capability.SUBSECOND
    for _name in (
        "gets",
        "cas",
        "pop",
        "touch",
        "gat",
        "ttl",
        "incr",
        "append",
        "prepend",
        "_scan_keys",
        "_get_grace",
    ):
        locals()[_name] = getattr(shmcache.Engine, _name)
    for _name in ("_set_grace", "_lease_take", "_lease_extend", "_lease_release"):
        locals()[_name] = getattr(shmcache.Engine, _name)


class TestDerived(EngineConformance):
    @pytest.fixture
    def make_engine(self):
        return Derived


class TestPlain(EngineConformance):
    @pytest.fixture
    def make_engine(self):
        return Plain


@pytest.fixture
def make():
    """Makes engines with frozen clocks, and audits them after the test."""
    engines = []

    def new(**options):
        engines.append(MemoryEngine(**options))
        if "clock" not in options:
            engines[-1]._set_clock(0)
        return engines[-1]

    yield new
    for engine in engines:
        if not engine._closed:
            assert engine.check() == []
            engine.close()


def test_injected_clock(make):
    """clock= is read in seconds, from the engine's birth on."""
    now = [1000.0]
    cache = make(clock=lambda: now[0])
    cache.set("k", 1, 1.1)
    now[0] = 1001.0
    assert cache.ttl("k") == 0.1
    assert cache._now_ms() == 1000
    now[0] = 1001.1
    assert "k" not in cache


def test_real_clock(make):
    """Without a clock time passes, also after a freeze."""
    cache = MemoryEngine()
    cache._set_clock(5)
    assert cache._now_ms() == 5
    cache._set_clock(None)
    first = cache._now_ms()
    while cache._now_ms() == first:
        pass
    assert cache._now_ms() > first
    cache.close()


def test_counts_are_exact(make):
    """Hits, misses, sets, deletes, expired, evicted, items and bytes are exact."""
    cache = make()
    cache.set("a", b"12345", 10)
    cache.set("b", 7)
    cache.add("b", 8)
    cache.get("a"), cache.get("x"), cache.gets("b"), cache.pop("b"), cache.gat("a", 10), cache.get_many("ax")
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.sets, stats.deletes) == (5, 2, 2, 1)
    assert (stats.items, stats.bytes) == (1, 1 + 5 + 64)
    cache._set_clock(10_000)
    assert cache.stats().items == 0
    assert cache.clean() == 1
    stats = cache.stats()
    assert (stats.expired, stats.evicted, stats.bytes) == (1, 0, 0)


def test_looking_is_no_use(make):
    """in, ttl and iteration count neither as hit nor as miss."""
    cache = make()
    cache.set("a", 1)
    assert "a" in cache
    assert "b" not in cache
    assert cache.ttl("a") == math.inf
    assert dict(cache.items()) == {"a": 1}
    assert (cache.stats().hits, cache.stats().misses) == (0, 0)


def test_expired_items_are_swept(make):
    """Writes give the memory of expired items back: it does not pile up without clean()."""
    cache = make()
    for i in range(10_000):
        cache._set_clock(i)
        cache.set(f"k{i}", i, 0.01)
    assert len(cache._items) < 50
    assert len(cache._due) < 200
    assert cache.stats().items == 10


def test_touch_keeps_the_heap_small(make):
    """Touching one item many times does not grow the list of deadlines."""
    cache = make()
    cache.set("k", 1)
    for i in range(1000):
        cache.touch("k", i + 1)
    assert len(cache._due) < 100


def test_eviction(make):
    """A full engine evicts what is expired, then what was used least recently."""
    cache = make(size=1000, max_value=1000)
    cache.set("old", b"x" * 100)
    cache.set("used", b"x" * 100)
    cache.set("dead", b"x" * 300, 10)
    cache.get("old"), cache.get("used")
    cache._set_clock(10_000)
    cache.set("new", b"x" * 400)
    assert cache.stats().evicted == 0
    assert sorted(cache) == ["new", "old", "used"]
    cache.get("old")
    cache.set("more", b"x" * 200)
    assert sorted(cache) == ["more", "new", "old"]
    assert cache.stats().evicted == 1
    assert cache.stats().bytes <= 1000


def test_own_item_is_no_victim(make):
    """A set that finds no room leaves the key's old value; a fitting one may take all other items' room."""
    cache = make(size=1000, max_value=2000)
    cache.set("k", b"x" * 100)
    cache.set("other", b"x" * 500)
    with pytest.raises(NoSpace, match="size"):
        cache.set("k", b"x" * 1000)
    assert sorted(cache) == ["k", "other"]
    cache.set("k", b"y" * 900)
    assert list(cache) == ["k"]


def test_no_eviction(make):
    """eviction=none raises NoSpace, the old value stays, and expired items make room."""
    cache = make(size=1010, max_value=1000, eviction="none")
    cache.set("a", b"x" * 400)
    cache.set("b", b"x" * 400, 10)
    for store in (
        lambda: cache.set("c", b"x" * 200),
        lambda: cache.set("a", b"x" * 600),
        lambda: cache.append("a", b"x" * 200),
    ):
        with pytest.raises(NoSpace, match="1010"):
            store()
    assert cache.set_many({"c": b"x" * 200, "d": 1}) == ["c"]
    assert cache.get("a") == b"x" * 400
    cache._set_clock(10_000)
    assert cache.set("c", b"x" * 200)
    assert cache.stats().evicted == 0


def test_max_value(make):
    """max_value is a quarter of size unless given."""
    cache = make(size=4000)
    cache.set("k", b"x" * 1000)
    with pytest.raises(ValueTooLarge, match="1000"):
        cache.set("k", b"x" * 1001)
    assert make().max_value is None


def test_random_operations(make):
    """Under random writes, lifetimes and evictions the accounts stay right and the size is kept."""
    cache, rng, now = make(size=5000), random.Random(1), 0
    for _ in range(5000):
        key = f"k{rng.randrange(60)}"
        call = rng.randrange(8)
        if call < 4:
            cache.set(key, b"x" * rng.randrange(500), rng.choice([None, 0.5, 1, 5]))
        elif call == 4:
            cache.delete(key)
        elif call == 5:
            cache.touch(key, rng.choice([0, 2]))
        elif call == 6:
            cache.incr(f"n{key}", ttl=1)
        else:
            cache._set_grace(key, b"x" * rng.randrange(500), 0.5, 0.5)
        now += rng.randrange(20)
        cache._set_clock(now)
        assert cache._bytes <= 5000
        assert cache.check() == []


def test_pickle(make):
    """codec=pickle keeps types."""
    cache = make(codec="pickle")
    cache.set("k", {(1, 2)})
    assert cache.get("k") == {(1, 2)}


def test_closed(make):
    """A closed engine refuses every call and has forgotten its items."""
    cache = make()
    cache.set("k", 1)
    cache.close()
    for call in (
        lambda: cache.get("k"),
        lambda: cache.incr("k"),
        lambda: len(cache),
        cache.stats,
        cache.clear,
        cache.clean,
    ):
        with pytest.raises(ShmCacheError, match="closed"):
            call()
    assert "closed" in repr(cache)


def test_not_supported(make):
    """There is no segment to remove or to attach, and no raw command."""
    cache = make()
    for call in (cache.unlink, cache.reattach, lambda: cache.raw("x")):
        with pytest.raises(NotSupported, match="memory"):
            call()


@pytest.mark.parametrize("url", ["memory://host", "memory://u@h", "memory:///name"])
def test_bad_url(url):
    """memory:// has a group and options, no host, user or name."""
    with pytest.raises(ValueError, match="memory"):
        shmcache.open(url)


def test_child_has_a_copy(make):
    """A forked child starts with the parent's items and leases, and changes nothing in the parent."""
    cache = make()
    cache.set("k", 1)

    def child(i):
        found = cache.get("k"), cache.lock("name", timeout=0)
        cache.set("k", 2)
        cache.incr("n")
        try:
            found[1].__enter__()
        except shmcache.LockTimeout:
            return found[0], cache.get("k")
        return None

    with cache.lock("name"):
        assert in_processes(1, child) == [(1, 2)]
    assert dict(cache.items()) == {"k": 1}


def test_fork_under_load(make):
    """Children forked while other threads write neither hang nor see half an operation."""
    cache = make()
    stop = threading.Event()

    def write():
        i = 0
        while not stop.is_set():
            cache.set(f"k{i % 100}", b"x" * (i % 50), 5)
            i += 1

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            assert (
                in_processes(2, lambda i: (cache.check(), cache.set("mine", os.getpid()))) == [([], True)] * 2
            )
    finally:
        stop.set()
        for thread in threads:
            thread.join()
