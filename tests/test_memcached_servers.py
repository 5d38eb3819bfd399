"""shmcache.engines.memcached against real servers: limits, iteration, several servers, processes, URLs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

import shmcache
from shmcache import (
    Capability,
    NotSupported,
    ValueTooLarge,
)
from shmcache.engines.memcached import MemcachedEngine
from shmcache.testing import in_processes, in_threads

_serial = itertools.count()
MAX, MIN = 2**63 - 1, -(2**63)


@pytest.fixture
def engine(open_memcached: Callable[..., MemcachedEngine]) -> MemcachedEngine:
    return open_memcached()


# -- limits --


@pytest.mark.parametrize("length", [1, 100, 250, 251, 40_000])
def test_largest_value(engine: MemcachedEngine, memcached_server: Any, length: int) -> None:
    """What is not ValueTooLarge fits into the server; one byte more is refused and the old value stays."""
    key, room = "k" * length, 2**20 - 64
    room -= length if length <= 250 else 66 + 2 + length
    assert engine.set(key, b"x" * room)
    assert engine.get(key) == b"x" * room
    for store in (engine.set, engine.replace):
        with pytest.raises(ValueTooLarge, match="max_item"):
            store(key, b"x" * (room + 1))
    with pytest.raises(ValueTooLarge):
        engine.append(key, b"x")
    with pytest.raises(ValueTooLarge):
        engine.set_many({"other": 1, key: b"x" * (room + 1)})
    assert engine.get_many([key, "other"]) == {key: b"x" * room}


def test_server_limit(open_memcached: Callable[..., MemcachedEngine]) -> None:
    """A max_item above the server's limit lets the server refuse: ValueTooLarge, and the connection goes on."""
    engine = open_memcached(max_item="8M")
    with pytest.raises(ValueTooLarge, match="max_item"):
        engine.set("k", b"x" * 2**21)
    assert engine.set_many({"a": 1, "k": b"x" * 2**21, "b": 2}) == ["k"]
    assert engine.get_many("akb") == {"a": 1, "b": 2}


def test_no_space(open_memcached: Callable[..., MemcachedEngine], start_memcached: Any) -> None:
    """A full server that does not evict gives NoSpace, and set_many the keys it could not store."""
    engine = open_memcached(start_memcached(args=["-M"], memory=2))
    with pytest.raises(shmcache.NoSpace):
        sum(engine.set(f"k{i}", b"x" * 900_000) for i in range(10))
    failed = engine.set_many({f"l{i}": b"x" * 900_000 for i in range(3)})
    assert failed == ["l0", "l1", "l2"]


def test_large_batches(engine: MemcachedEngine) -> None:
    """Batches whose requests and answers exceed every buffer go through."""
    mapping: dict[str | bytes, Any] = {f"key{i:04d}" + "k" * 200: b"x" * 20_000 for i in range(600)}
    assert engine.set_many(mapping) == []
    assert engine.get_many(mapping) == mapping
    assert engine.delete_many(mapping) == 600


# -- servers as a whole --


def test_iteration_where_it_works(
    open_memcached: Callable[..., MemcachedEngine], start_memcached: Any
) -> None:
    """ITERATE is claimed where the server lists its keys, and else len and keys raise NotSupported."""
    for args in (["-X"], ["-o", "no_lru_crawler"]):
        engine = open_memcached(start_memcached(args=args))
        engine.set("k", 1)
        assert Capability.ITERATE not in engine.capabilities
        for call in (len, list, lambda e: e.delete_match("*"), lambda e: list(e.items())):
            with pytest.raises(NotSupported, match="ITERATE"):
                call(engine)
        assert engine.stats().items == 1
    engine = open_memcached()
    engine.update({"a": 1, "b b": 2, "k" * 300: 3})
    assert Capability.ITERATE in engine.capabilities
    with engine.lock("name"):
        engine.decr("n", ttl=50)
        engine.incr("n", ttl=50)
        assert dict(engine.items()) == {"a": 1, "b b": 2, "k" * 300: 3, "n": 0}


def test_iteration_from_threads(engine: MemcachedEngine) -> None:
    """Threads that list keys at once, which the server does for one at a time, all get them."""
    engine.update({f"k{i}": i for i in range(500)})
    assert in_threads(4, lambda i: len(list(engine))) == [500] * 4


def test_raw(
    engine: MemcachedEngine, open_memcached: Callable[..., MemcachedEngine], start_memcached: Any
) -> None:
    """raw gives the lines of an answer, of several servers by server; a command with data is refused."""
    engine.set("k", 5)
    assert engine.raw("get", "k") == [b"VALUE k 2 1", b"5", b"END"]
    assert engine.raw("nonsense") == [b"ERROR"]
    assert b"END" in engine.raw("stats slabs")
    for bad in ("set k 0 0 1", "quit", "watch", "get k\r\nflush_all", "", "shutdown"):
        with pytest.raises(ValueError, match="raw"):
            engine.raw(bad)
    for other in (5, None, b"version"):
        with pytest.raises(TypeError, match="command: str wanted"):
            engine.raw(other)  # type: ignore[arg-type]
    servers = [start_memcached(), start_memcached()]
    several = open_memcached(",".join(map(str, servers)))
    answers = several.raw("version")
    assert list(answers) == [str(server) for server in servers]
    assert engine.get("k") == 5


def test_flush_refused(open_memcached: Callable[..., MemcachedEngine], start_memcached: Any) -> None:
    """clear on a server that refuses flush_all is NotSupported."""
    engine = open_memcached(start_memcached(args=["-F"]))
    engine.set("k", 1)
    with pytest.raises(NotSupported, match="flush_all"):
        engine.clear()
    assert engine.get("k") == 1


def test_stats(engine: MemcachedEngine) -> None:
    """stats has the servers' numbers beside this process's."""
    engine.set("k", b"x" * 1000)
    stats = engine.stats()
    assert (stats.items, stats.servers, stats.servers_down, stats.sets) == (1, 1, 0, 1)
    assert stats.bytes > 1000


def test_unix_socket(open_memcached: Callable[..., MemcachedEngine], start_memcached: Any) -> None:
    """A unix socket is given in brackets or as the path."""
    server = start_memcached(unix=True)
    engine = open_memcached(server)
    engine.set("k", 1)
    other = shmcache.open(f"memcached:u{next(_serial)}://{server.host}", health=False)
    with other:
        assert other.get("k") == 1


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("memcached://u:secret@h/", {}, "user"), ("memcached://h/5", {}, "database"),
        ("memcached://h,h/", {}, "twice"), ("memcached://h,i/?weights=1", {}, "weights"),
        ("memcached://h/?weights=0", {}, "weights"), ("memcached://h/?timeout=0", {}, "timeout"),
        ("memcached://h/?health=perhaps", {}, "health"), ("memcached://h/?nonsense=1", {}, "known are"),
        ("memcached://h/?on_down=wait", {}, "on_down"),
    ],
)  # fmt: skip
def test_bad_urls(url: str, options: dict[str, Any], message: str) -> None:
    """A URL or option that makes no sense is a ValueError that names it."""
    with pytest.raises(ValueError, match=message) as caught:
        shmcache.open(url, **options)
    assert "secret" not in str(caught.value)


# -- several servers --


def test_rendezvous(open_memcached: Callable[..., MemcachedEngine]) -> None:
    """Keys spread by weight, whatever the order of the servers; one that goes takes its own keys along only."""
    keys = [b"key%d" % i for i in range(4000)]
    names = ["10.9.9.1", "10.9.9.2", "10.9.9.3"]

    def owners(hosts: list[str], **options: Any) -> dict[bytes, str]:
        engine = open_memcached(",".join(hosts), **options)
        return {key: engine._name(engine._owner(key)) for key in keys}

    even = owners(names)
    assert even == owners(names[::-1])
    share = Counter(owners(names, weights="1,2,1").values())
    assert share["10.9.9.2:11211"] == pytest.approx(2000, abs=200)
    fewer = owners(names[:2])
    assert all(fewer[key] == owner for key, owner in even.items() if owner in fewer.values())


def test_several_servers(open_memcached: Callable[..., MemcachedEngine], start_memcached: Any) -> None:
    """Over several servers all calls see all items, each on one server."""
    servers = [start_memcached() for _ in range(3)]
    engine = open_memcached(",".join(map(str, servers)))
    mapping: dict[str | bytes, Any] = {f"key{i}": i for i in range(300)}
    mapping["odd key"] = -1
    assert engine.set_many(mapping) == []
    assert engine.get_many(mapping) == mapping
    assert dict(engine.items()) == mapping
    assert len(engine) == 301
    assert engine.stats().items == 301
    counts = [int(server.ask(b"stats\r\n").partition(b"curr_items ")[2].split()[0]) for server in servers]
    assert sum(counts) == 301
    assert min(counts) > 50
    assert engine.delete_match("key1*") == 111
    engine.clear()
    assert len(engine) == 0


# -- processes and threads --


def test_fork_opens_its_own(engine: MemcachedEngine) -> None:
    """Parent and children that use one engine at once get their own answers, on sockets of their own."""
    engine.set("k", 0)
    before = int(dict(line.split(b" ")[1:] for line in engine.raw("stats")[:-1])[b"total_connections"])

    def work(i: int) -> bool:
        return all(engine.set(f"{i}-{n}", [i, n]) and engine.get(f"{i}-{n}") == [i, n] for n in range(300))

    assert in_processes(4, work) == [True] * 4
    assert work(9)
    after = int(dict(line.split(b" ")[1:] for line in engine.raw("stats")[:-1])[b"total_connections"])
    assert after - before == 4


def test_pool_follows_threads(engine: MemcachedEngine) -> None:
    """As many sockets are opened as threads call at the same time, and used again."""
    in_threads(8, lambda i: [engine.set(f"{i}", n) for n in range(50)])
    idle = len(engine._servers[0]._idle)
    assert 1 <= idle <= 8
    for n in range(50):
        engine.set("k", n)
    assert len(engine._servers[0]._idle) == idle


def test_lease_is_its_owners(engine: MemcachedEngine) -> None:
    """A lease is extended and released by its owner word alone, and fences grow with each taking."""
    taken = engine._lease_take(b"name", 30)
    assert isinstance(taken, tuple)
    owner, fence = taken
    assert engine._lease_take(b"name", 30) is False
    assert engine._lease_extend(b"name", owner + 1, 30) is False
    assert engine._lease_release(b"name", owner + 1) is False
    assert engine._lease_extend(b"name", owner, 30) is True
    assert engine._lease_release(b"name", owner) is True
    assert engine._lease_release(b"name", owner) is False
    again = engine._lease_take(b"name", 30)
    assert isinstance(again, tuple)
    assert again[1] > fence
    engine.clear()
    after_loss = engine._lease_take(b"name", 30)
    assert isinstance(after_loss, tuple)
    assert after_loss[1] > again[1]
