"""shmcache.engines.memcached when servers hang, break off, answer garbage, die, and come back."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from servers import fake

import shmcache
from shmcache import MISS, Capability, EngineDown, NotSupported
from shmcache.engines import memcached_whole
from shmcache.engines.memcached import MemcachedEngine
from shmcache.engines.memcached_stream import Stream
from shmcache.health import UP
from shmcache.testing import in_processes, in_threads
from shmcache.url import Host


@pytest.fixture
def memcached_options() -> dict[str, Any]:
    """Engines wait 5 s for an answer."""
    return {"timeout": 5.0, "connect_timeout": 5.0}


# -- faults of a server, as the engine meets them --


def patience(engine: MemcachedEngine, seconds: float) -> None:
    """Let calls wait so long: little while a fault is on, much else, for a machine that is busy."""
    engine._timeout = engine._connect_timeout = seconds
    engine._patience = 2 * seconds
    for server in engine._servers:
        server.close()


def hurry(engine: MemcachedEngine) -> None:
    patience(engine, 0.2)


MODES = ("hang", "deaf", "drop", "reset", "half", "stall", "trickle", "garbage", "refuse")
CALLS: dict[str, Callable[[MemcachedEngine], Any]] = {
    "get": lambda e: e.get("k"),
    "set": lambda e: e.set("k", "new"),
    "incr": lambda e: e.incr("n"),
    "delete": lambda e: e.delete("k"),
    "touch": lambda e: e.touch("k", 5),
    "get_many": lambda e: e.get_many(["k", "n"]),
    "stats": lambda e: e.raw("stats"),
    "keys": lambda e: list(e.keys()),
    "clear": lambda e: e.clear(),
    "lock": lambda e: e.lock("name").__enter__(),
}


@pytest.fixture
def proxy(memcached_server: Any) -> Iterator[fake.Proxy]:
    with fake.Proxy(memcached_server.host, memcached_server.port) as proxy:
        yield proxy


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CALLS)
def test_faults(
    proxy: fake.Proxy,
    open_memcached: Callable[..., MemcachedEngine],
    mode: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever a server does in place of answering is EngineDown that names it, and once it answers again no call
    gets another's answer."""
    monkeypatch.setattr(memcached_whole, "DUMP_TIME", 0.3)
    engine = open_memcached(proxy, retry_interval=0.0)
    engine.set("k", "old")
    engine.set("n", 5)
    assert Capability.ITERATE in engine.capabilities
    proxy.mode = mode
    if mode == "refuse":
        proxy.drop_all()
    hurry(engine)
    for _ in range(2):
        with pytest.raises(EngineDown, match=str(proxy)) as caught:
            CALLS[name](engine)
        assert caught.value.__cause__ is not None
    proxy.mode = "pass"
    patience(engine, 5.0)
    for i in range(3):
        assert engine.set(f"a{i}", i)
        assert engine.get(f"a{i}") == i
        assert engine.get_many(["a0", "absent"]) == {"a0": 0}
    assert engine.get("k") in ("old", "new", None)
    assert engine.health.status(Host(proxy.host, proxy.port)).ups >= 1


@pytest.mark.parametrize(
    "answer",
    [
        b"VA 5 f1 t-1\r\nabcdefg\r\n", b"VA 99999999999 f1\r\n", b"VA -1\r\n\r\n", b"VA x f1\r\n", b"HD f1 t-1 fx-\r\n",
        b"\r\n", b"HD\r\nHD\r\n", b"x" * 100_000, b"END\r\n", b"VALUE k 1 1\r\na\r\nEND\r\n", b"VA 1 fzz t\xff\r\na\r\n",
    ],
)  # fmt: skip
def test_bad_answers(open_memcached: Callable[..., MemcachedEngine], answer: bytes) -> None:
    """An answer that is not exactly one is EngineDown, and its connection is not used again."""
    with fake.Fake(answer) as server:
        engine = open_memcached(server, retry_interval=0.0, timeout=0.5)
        for _ in range(2):
            with pytest.raises(EngineDown):
                engine.get("k")
        assert server.accepted >= 2
        server.script = lambda request: b"VERSION 1\r\n" if request.startswith(b"version") else b"EN\r\n"
        assert engine.get("k", MISS) is MISS


def test_server_error(open_memcached: Callable[..., MemcachedEngine]) -> None:
    """SERVER_ERROR is EngineDown for that call; the server is not down for it, and the connection is not used again."""
    with fake.Fake(b"SERVER_ERROR busy\r\n") as server:
        engine = open_memcached(server)
        for call in (lambda: engine.get("k"), lambda: engine.set("k", 1), lambda: engine.incr("n")):
            with pytest.raises(EngineDown, match="busy") as caught:
                call()
            assert type(caught.value.__cause__).__name__ == "MemcacheServerError"
        assert engine.health.status(Host(server.host, server.port)).status == UP
        assert server.accepted == 3


def test_unsolicited_bytes(open_memcached: Callable[..., MemcachedEngine]) -> None:
    """Bytes that arrive after an answer was complete never answer the next question."""

    def script(request: bytes) -> list[Any]:
        return [b"EN\r\n", fake.delay(0.05), b"VA 6 f1 t-1\r\nforged\r\n"]

    with fake.Fake(script) as server:
        engine = open_memcached(server)
        for _ in range(3):
            assert engine.get("k", MISS) is MISS
            while engine._servers[0]._idle[-1].sock.quiet():  # until it has come
                time.sleep(0.01)
        assert server.accepted == 3


def test_too_old(open_memcached: Callable[..., MemcachedEngine]) -> None:
    """A server without meta commands is NotSupported that says which version is wanted."""
    with fake.Fake(b"ERROR\r\n") as server, pytest.raises(NotSupported, match=r"1\.6"):
        open_memcached(server).get("k")


def test_connect_hangs(open_memcached: Callable[..., MemcachedEngine]) -> None:
    """A host that answers no connection attempt is EngineDown, and then at once for everybody."""
    with fake.FullBacklog() as nobody:
        engine = open_memcached(nobody.address, connect_timeout=0.2)
        with pytest.raises(EngineDown, match="TimeoutError"):
            engine.get("k")
        with pytest.raises(EngineDown, match="down for"):
            engine.get("k")


def test_lost_connection_of_a_server_that_answers(
    proxy: fake.Proxy, open_memcached: Callable[..., MemcachedEngine]
) -> None:
    """When a connection ends in the middle and the server answers others, a read is done again, a write is
    EngineDown, done or not, and the server is not down."""
    engine = open_memcached(proxy)
    engine.set("k", 1)
    proxy.mode = "drop"
    proxy.filter = lambda request: request.startswith(b"ms ")
    with pytest.raises(EngineDown, match="not known"):
        engine.set("k", 2)
    assert engine.get("k") == 2
    seen = []

    def first(request: bytes) -> bool:
        seen.append(request)
        return request.startswith(b"mg ") and sum(r.startswith(b"mg ") for r in seen) == 1

    proxy.filter = first
    assert engine.get("k") == 2
    assert engine.health.status(Host(proxy.host, proxy.port)).changes == 0


def test_stopped_while_the_answer_came() -> None:
    """Who finds the time over, because it did not run, reads the answer that lies there; where none does, or half of
    one, the time is over."""
    near, far = socket.socketpair()
    stream = Stream(near)
    with contextlib.closing(stream), far:
        stream.end = time.monotonic() - 1
        far.sendall(b"VA 3\r\na")
        with pytest.raises(TimeoutError):
            stream.exchange(b"mg k v\r\n", 1)
        with pytest.raises(TimeoutError):
            stream.recv(1)
        stream.end, stream.looked = time.monotonic() - 1, False
        far.sendall(b"VA 3\r\nabc\r\n")
        assert stream.exchange(b"mg k v\r\n", 1)[0].data == b"abc"
        stream.end, stream.looked = time.monotonic() - 1, False
        with pytest.raises(TimeoutError):
            stream.exchange(b"mg k v\r\n", 1)


def test_restarted_server(start_memcached: Any, open_memcached: Callable[..., MemcachedEngine]) -> None:
    """A server that was restarted between two calls is empty, not down."""
    server = start_memcached()
    engine = open_memcached(server)
    engine.set("k", 1)
    in_threads(4, lambda i: engine.get("k"))
    server.restart()
    assert engine.get("k", MISS) is MISS
    assert engine.incr("n") == 1
    assert engine.health.status(Host(server.host, server.port)).changes == 0


def test_down_and_back(start_memcached: Any, open_memcached: Callable[..., MemcachedEngine]) -> None:
    """A server that is gone is EngineDown until it is back, and used again after the interval."""
    server = start_memcached()
    engine = open_memcached(server, retry_interval=0.2)
    engine.set("k", 1)
    server.kill()
    for _ in range(3):
        with pytest.raises(EngineDown, match=str(server)):
            engine.get("k")
    server.start()
    time.sleep(0.25)
    assert engine.get("k", MISS) is MISS


def test_on_down_miss(
    start_memcached: Any, open_memcached: Callable[..., MemcachedEngine], caplog: pytest.LogCaptureFixture
) -> None:
    """With on_down=miss reads miss, writes answer False, the many-key calls report all keys, and what cannot be
    answered so raises; all counted, one log line."""
    server = start_memcached()
    engine = open_memcached(server, on_down="miss", retry_interval=-1)
    token = engine.set("k", 1) and engine.gets("k")[1]
    server.kill()
    reads: list[tuple[Callable[[], Any], Any]] = [
        (lambda: engine.get("k", MISS), MISS), (lambda: engine.gets("k", MISS), MISS), (lambda: "k" in engine, False),
        (lambda: engine.ttl("k"), None), (lambda: engine.counter("k"), None), (lambda: engine.get_many(["k"]), {}),
        (lambda: engine.pop("k", 5), 5), (lambda: engine.gat("k", 5, 6), 6), (lambda: engine._get_grace("k"), None),
        (lambda: engine._get_left("k"), None), (lambda: engine._get_left_many(["k"]), {}),
        (lambda: engine.set("k", 1), False), (lambda: engine.add("k", 1), False), (lambda: engine.replace("k", 1), False),
        (lambda: engine.delete("k"), False), (lambda: engine.touch("k", 1), False), (lambda: engine.append("k", ""), False),
        (lambda: engine.prepend("k", b""), False), (lambda: engine.set_many({"a": 1, "b": 2}), ["a", "b"]),
        (lambda: engine.delete_many(["a", "b"]), 0), (lambda: engine._set_grace("k", 1, 5, 5), False),
        (lambda: engine.delete("odd key"), False), (lambda: engine.setdefault("k", 9), 9),
    ]  # fmt: skip
    for call, wanted in reads:
        assert call() == wanted
    with pytest.raises(KeyError):
        engine["k"]
    for raising in (
        lambda: engine.incr("k"), lambda: engine.decr("k"), lambda: engine.cas("k", 1, token),
        lambda: engine.clear(), lambda: engine.lock("name").__enter__(),
    ):  # fmt: skip
        with pytest.raises(EngineDown):
            raising()
    assert engine.stats().down >= len(reads)
    assert engine.stats().servers_down == 1
    assert len([record for record in caplog.records if str(server) in record.message]) == 1


def test_many_with_one_server_down(
    start_memcached: Any, open_memcached: Callable[..., MemcachedEngine]
) -> None:
    """Of several servers one that is down takes its keys along: set_many lists them, get_many raises or leaves them
    out, clear empties the others."""
    servers = [start_memcached() for _ in range(3)]
    address = ",".join(map(str, servers))
    strict, lenient = open_memcached(address), open_memcached(address, on_down="miss")
    mapping: dict[str | bytes, Any] = {f"key{i}": i for i in range(60)}
    strict.update(mapping)
    servers[1].kill()
    lost = {key for key in mapping if strict._owner(str(key).encode()) == 1}
    assert 5 < len(lost) < 55
    assert set(strict.set_many(mapping)) == lost
    with pytest.raises(EngineDown, match=str(servers[1])):
        strict.get_many(mapping)
    assert lenient.get_many(mapping) == {key: value for key, value in mapping.items() if key not in lost}
    with pytest.raises(EngineDown):
        strict.clear()
    assert lenient.get_many(mapping) == {}


def test_failover(start_memcached: Any, open_memcached: Callable[..., MemcachedEngine]) -> None:
    """With failover=yes the keys of a server that is down move to the others until it is back; with no they are
    down. The keys of the others stay where they are in both."""
    servers = [start_memcached() for _ in range(3)]
    address = ",".join(map(str, servers))
    moving = open_memcached(address, failover="yes", retry_interval=0.3)
    staying = open_memcached(address, retry_interval=0.3)
    mapping: dict[str | bytes, Any] = {f"key{i}": i for i in range(60)}
    moving.update(mapping)
    servers[1].kill()
    lost = {key for key in mapping if moving._owner(str(key).encode()) == 1}
    assert moving.get_many(mapping) == {key: value for key, value in mapping.items() if key not in lost}
    assert moving.set_many(mapping) == []
    assert moving.get_many(mapping) == mapping
    for key in lost:
        assert moving.incr(f"{key!r}-n") == 1
        with pytest.raises(EngineDown):
            staying.get(key)
    servers[1].start()
    time.sleep(0.4)
    assert set(moving.get_many(mapping)) == set(mapping) - lost
    for server in servers:
        server.kill()
    with pytest.raises(EngineDown):
        moving.get("key1")


def test_failover_past_several_that_hang(memcached_server: Any, open_memcached: Callable[..., MemcachedEngine]) -> None:
    """Servers that hang take nothing of the time of the next one: it answers, and is not down."""
    with fake.FullBacklog() as first, fake.FullBacklog() as second:
        engine = open_memcached(
            f"{first.address},{second.address},{memcached_server}",
            failover="yes", timeout=0.5, connect_timeout=0.5, weights="1000000,1000000,0.000001",
        )  # fmt: skip
        assert engine.set("k", 1)
        assert [row["status"] for row in engine.health.snapshot()] == ["down", "down", UP]


def test_flush_on_rejoin(start_memcached: Any, open_memcached: Callable[..., MemcachedEngine]) -> None:
    """A server that was out of reach and comes back with what it had is emptied before it is used."""
    server = start_memcached()
    with fake.Proxy(server.host, server.port) as proxy:
        stale = open_memcached(proxy, retry_interval=0.1)
        clean = open_memcached(proxy, retry_interval=0.1, flush_on_rejoin=True)
        for engine, wanted in ((stale, "old"), (clean, MISS)):
            engine.set("k", "old")
            proxy.mode = "hang"
            hurry(engine)
            with pytest.raises(EngineDown):
                engine.get("k")
            proxy.mode = "pass"
            patience(engine, 5.0)
            time.sleep(0.15)
            assert engine.get("k", MISS) == wanted
        clean.set("k", "old")
        assert clean.set_server(str(proxy), False) is True
        with pytest.raises(EngineDown, match="turned off"):
            clean.get("k")
        assert clean.set_server(str(proxy), True) is True
        assert clean.get("k", MISS) is MISS


def test_set_server_of_an_engine(
    start_memcached: Any, open_memcached: Callable[..., MemcachedEngine], health_url: str
) -> None:
    """set_server takes a server out for every process, by its name as in the URL."""
    server = start_memcached()
    engine = open_memcached(server, health=health_url)
    engine.set("k", 1)
    assert in_processes(1, lambda i: engine.set_server(str(server), False)) == [True]
    with pytest.raises(EngineDown, match="turned off"):
        engine.get("k")
    assert engine.set_server(server.host, True) is True
    assert engine.get("k") == 1
    with pytest.raises(ValueError, match="set_server"):
        engine.set_server("10.9.9.9:11211", True)


def test_interrupted(proxy: fake.Proxy, open_memcached: Callable[..., MemcachedEngine]) -> None:
    """A call interrupted while it waits leaves no connection whose answer the next one could get."""
    engine = open_memcached(proxy)
    engine.set("k", "mine")
    engine.set("other", "not mine")
    proxy.mode = "hang"

    class Stop(BaseException):
        pass

    def stop(*args: Any) -> None:
        raise Stop

    old = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Stop):
            engine.get("other")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    proxy.mode = "pass"
    assert engine.get("k") == "mine"


def test_claims_are_asked_for_once_needed(start_memcached: Any, open_memcached: Callable[..., MemcachedEngine]) -> None:
    """What was opened while the server was down raises EngineDown from iteration, and iterates when it is back; locks
    and counters never ask whether it can."""
    server = start_memcached()
    server.kill()
    far = open_memcached(server, retry_interval=0.0)
    space = far.namespace("space")
    near = shmcache.open(f"memory:{far.engine_id.partition(':')[2]}://")
    tiered = shmcache.open(f"tiered:{far.engine_id.partition(':')[2]}://", l1=near, l2=far)
    for engine in (far, space, tiered):
        assert Capability.ITERATE not in engine.capabilities
        lock = engine.lock("name")
        with pytest.raises(EngineDown):
            lock.__enter__()
        with pytest.raises(EngineDown):
            list(engine.keys())
        with pytest.raises(EngineDown):
            len(engine)
        with pytest.raises(EngineDown):
            engine.delete_match("*")
    server.start()
    asked = []
    ask = far._can_iterate
    far._can_iterate = lambda: asked.append(1) or ask()  # type: ignore[func-returns-value,method-assign]
    for engine in (far, space, tiered):
        with engine.lock("name"):
            assert engine.counter("n") is None
    assert asked == []
    for engine in (far, space, tiered):
        assert Capability.ITERATE in engine.capabilities
        assert len(engine) == 0
    tiered.close()
    near.close()
