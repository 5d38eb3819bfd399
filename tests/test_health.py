"""shmcache.health: states shared by workers, one probe per interval, and what memcached does when a server fails."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import shmcache
from shmcache import EngineDown, LockTimeout, NoSpace, ShmCacheError, health, inspect, segment
from shmcache.catalog import Found
from shmcache.engines.memcached import MemcachedEngine
from shmcache.engines.memory import MemoryEngine
from shmcache.health import DOWN, OFF, UP, Health, Record
from shmcache.testing import in_processes, in_threads
from shmcache.url import Host

from .clock_help import Clock

HOST = Host("10.0.0.1", 11211)
BOOM = ConnectionRefusedError(111, "refused")


@pytest.fixture
def store() -> MemoryEngine:
    return MemoryEngine()


@pytest.fixture
def make(store: MemoryEngine, clock: Clock) -> Callable[..., Health]:
    """Makes tables over one store, as several workers have them."""
    return lambda **options: Health(store, scheme="memcached", servers=(HOST,), clock=clock, **options)


def answering() -> None:
    return None


def refuse() -> BaseException:
    return BOOM


def never() -> BaseException:
    raise AssertionError("no probe wanted, one found")


def fail(table: Health, host: Host = HOST) -> None:
    table.failed(host, table.admit(host, never), BOOM)


# -- the table --


def test_known_to_all(make: Callable[..., Health]) -> None:
    """What one worker found dead, no other asks."""
    one, other = make(), make()
    other.admit(HOST, never)
    fail(one)
    with pytest.raises(EngineDown, match=r"10\.0\.0\.1:11211.*ConnectionRefusedError.*next probe in 1"):
        other.admit(HOST, never)
    assert other.status(HOST).status == DOWN


def test_one_probe_per_interval(make: Callable[..., Health], clock: Clock) -> None:
    """Of many workers that ask in an interval one probes, at its end and not before."""
    tables = [make(retry_interval=15.0) for _ in range(5)]
    probes: list[float] = []

    def probe() -> BaseException:
        probes.append(clock.now)
        return BOOM

    fail(tables[0])
    for _ in range(400):
        clock.now += 0.25
        for table in tables:
            with pytest.raises(EngineDown):
                table.admit(HOST, probe)
    assert 5 <= len(probes) <= 6
    gaps = [later - before for before, later in itertools.pairwise([1000.0, *probes])]
    assert all(15.0 <= gap <= 15.0 * (1 + health.SPREAD) + 0.25 for gap in gaps)
    assert tables[1].status(HOST).probes == len(probes)


def test_threads_probe_once(make: Callable[..., Health], clock: Clock) -> None:
    """Threads that find the interval over at once make one probe."""
    table = make(retry_interval=1.0)
    fail(table)
    clock.now += 1.2
    probes: list[int] = []

    def probe() -> BaseException:
        probes.append(1)
        time.sleep(0.02)
        return BOOM

    def work(i: int) -> None:
        with pytest.raises(EngineDown):
            table.admit(HOST, probe)

    in_threads(8, work)
    assert len(probes) == 1


def test_recovery(make: Callable[..., Health], clock: Clock) -> None:
    """A probe that is answered puts the server up for all, and its worker goes on."""
    one, other = make(retry_interval=10.0), make(retry_interval=10.0)
    fail(one)
    clock.now += 11.5
    other.admit(HOST, answering)
    one.admit(HOST, never)
    record = one.status(HOST)
    assert (record.status, record.downs, record.ups, record.probes, record.changes) == (UP, 1, 1, 1, 2)


def test_dead_prober(make: Callable[..., Health], clock: Clock) -> None:
    """If the worker that probes dies, another probes an interval later."""
    one, other = make(retry_interval=10.0), make(retry_interval=10.0)
    fail(one)
    clock.now += 11.5

    def dies() -> BaseException:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.admit(HOST, dies)
    with pytest.raises(EngineDown):
        other.admit(HOST, never)
    clock.now += 11.5
    other.admit(HOST, answering)


@pytest.mark.parametrize("interval", [-1, -0.5])
def test_never_retried(make: Callable[..., Health], clock: Clock, interval: float) -> None:
    """With a negative retry_interval a server stays down until set_server."""
    table = make(retry_interval=interval)
    fail(table)
    clock.now += 1e6
    with pytest.raises(EngineDown, match="until set_server"):
        table.admit(HOST, never)
    assert table.set_server(HOST, True) is True
    table.admit(HOST, never)


def test_old_failure(make: Callable[..., Health], clock: Clock) -> None:
    """A failure that began before a recovery does not undo it, and several at once are one change."""
    one, other, third = make(retry_interval=10.0), make(retry_interval=10.0), make(retry_interval=10.0)
    slow, slower = other.admit(HOST, never), third.admit(HOST, never)
    fail(one)
    other.failed(HOST, slow, BOOM)
    assert one.status(HOST).downs == 1
    clock.now += 11.5
    one.admit(HOST, answering)
    third.failed(HOST, slower, BOOM)
    assert one.status(HOST).status == UP


def test_own_failure(make: Callable[..., Health]) -> None:
    """A worker that has no descriptor, memory or port left takes no server from the others."""
    table = make()
    for number in (errno.EMFILE, errno.ENOBUFS, errno.EADDRNOTAVAIL, errno.EAGAIN):
        wrapped = ConnectionError("a driver's")
        wrapped.__context__ = OSError(number, "short of it")
        for error in (OSError(number, "short of it"), wrapped):
            table.failed(HOST, table.admit(HOST, never), error)
    assert table.status(HOST).changes == 0
    table.failed(HOST, table.admit(HOST, never), OSError(errno.ECONNREFUSED, "refused"))
    assert table.status(HOST).downs == 1


def test_set_server(make: Callable[..., Health], clock: Clock) -> None:
    """What an operator took out is out for all and never probed, until it is put back."""
    one, other = make(), make()
    assert one.set_server(HOST, False) is True
    assert other.set_server(HOST, False) is False
    clock.now += 1e6
    with pytest.raises(EngineDown, match="turned off"):
        other.admit(HOST, never)
    assert other.set_server(HOST, True) is True
    one.admit(HOST, never)
    assert one.status(HOST).offs == 1


def test_set_server_during_probe(make: Callable[..., Health], clock: Clock) -> None:
    """A server taken out while it is probed stays out, whatever the probe finds."""
    table = make(retry_interval=10.0)
    fail(table)
    clock.now += 11.5

    def probe() -> None:
        table.set_server(HOST, False)

    with pytest.raises(EngineDown, match="turned off"):
        table.admit(HOST, probe)
    assert table.status(HOST).status == OFF


def test_on_change(make: Callable[..., Health], clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Each change calls on_change of the worker that made it, once, and is one log line; one that raises is
    logged."""
    seen: list[Any] = []

    def broken(*args: Any) -> None:
        raise ZeroDivisionError("from the callback")

    one = make(retry_interval=10.0, on_change=lambda *args: seen.append(args))
    other = make(retry_interval=10.0)
    ticket = other.admit(HOST, never)
    fail(one)
    other.failed(HOST, ticket, BOOM)
    clock.now += 11.5
    one.admit(HOST, answering)
    one.set_server(HOST, False)
    assert seen == [
        ("10.0.0.1", 11211, UP, DOWN, BOOM),
        ("10.0.0.1", 11211, DOWN, UP, None),
        ("10.0.0.1", 11211, UP, OFF, None),
    ]
    assert (
        len([record for record in caplog.records if "memcached server 10.0.0.1:11211" in record.message]) == 3
    )
    make(on_change=broken).set_server(HOST, True)
    assert "from the callback" in caplog.text


def test_snapshot(make: Callable[..., Health], store: MemoryEngine) -> None:
    """snapshot lists the engine's servers; of a store, those that ever failed, and no other item."""
    table = make()
    assert [(row["server"], row["status"], row["changes"]) for row in table.snapshot()] == [
        ("memcached 10.0.0.1:11211", UP, 0)
    ]
    fail(table)
    store.set("other", 1)
    rows = health.snapshot(store)
    assert [(row["server"], row["status"], row["downs"]) for row in rows] == [
        ("memcached 10.0.0.1:11211", DOWN, 1)
    ]
    assert "refused" in rows[0]["error"]
    assert rows[0]["since"] == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize(
    "stored", [None, 5, "down", [], ["down"], ["x", 1.0, "", 0, 0, 0, 0, 0.0, 1.0], {"a": 1}]
)
def test_foreign_record(make: Callable[..., Health], store: MemoryEngine, stored: Any) -> None:
    """What is no record counts as up, and the next change replaces it."""
    store.set("health memcached 10.0.0.1:11211", stored)
    table = make()
    fail(table)
    assert table.status(HOST).downs == 1
    assert Record.read(store.get("health memcached 10.0.0.1:11211")).status == DOWN


def test_schemes_are_apart(store: MemoryEngine) -> None:
    """A memcached and a redis on one address have records of their own."""
    one, other = Health(store, scheme="memcached"), Health(store, scheme="redis")
    fail(one)
    other.admit(HOST, never)


@pytest.mark.parametrize("error", [NoSpace("full"), ShmCacheError("closed"), OSError(28, "no space")])
def test_store_that_fails(
    make: Callable[..., Health],
    store: MemoryEngine,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A store that fails leaves each process to itself, which is said once."""
    monkeypatch.setattr(health, "_said", {})
    tables = [make(), make()]

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise error

    for name in ("gets", "add", "cas"):
        monkeypatch.setattr(store, name, broken)
    for table in tables:
        fail(table)
        assert table.shared is False
        with pytest.raises(EngineDown):
            table.admit(HOST, never)
    assert len([record for record in caplog.records if "finds out for itself" in record.message]) == 1


def test_store_that_is_busy(
    make: Callable[..., Health], store: MemoryEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store whose guard is held by a stopped process is kept: the next failure is written."""
    table = make()
    with monkeypatch.context() as patch:

        def busy(*args: Any, **kwargs: Any) -> Any:
            raise LockTimeout("held")

        patch.setattr(store, "add", busy)
        fail(table)
        assert table.status(HOST).status == UP
    fail(table)
    assert table.status(HOST).status == DOWN


@pytest.mark.parametrize(
    "url", ["posix:///a/b?size=1M", "posix:///x?size=1", "nonsense://", "posix:///x?mode=a&size=1M"]
)
def test_store_that_cannot_be_opened(
    url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that cannot be opened is one log line if the machine does not allow it, a ValueError if the URL makes
    no sense."""
    monkeypatch.setattr(health, "_said", {})
    try:
        tables = [Health(url, scheme="memcached") for _ in range(2)]
    except ValueError:
        return
    assert [table.shared for table in tables] == [False, False]
    assert len(caplog.records) == 1
    fail(tables[0])
    tables[1].admit(HOST, never)


def test_option() -> None:
    """health= is an engine URL, an engine, yes or no."""
    engine = MemoryEngine()
    assert [health.health_option("health", value) for value in ("yes", "no", True, "memory://", engine)] == [
        True, False, True, "memory://", engine,
    ]  # fmt: skip
    for bad in ("perhaps", 5, 1.5, None):
        with pytest.raises(ValueError, match="health"):
            health.health_option("health", bad)


# -- workers and a server that stops --


def test_four_workers(
    start_memcached: Any, health_url: str, open_memcached: Callable[..., MemcachedEngine]
) -> None:
    """Four workers and a server stopped for 10 s, with an interval of 2 s: it is found dead once, probed once per
    interval by all of them together, no call waits for it to go on, and then all use it again."""
    server = start_memcached()
    options = {"health": health_url, "retry_interval": 2.0, "timeout": 2.0, "connect_timeout": 2.0}
    engine = open_memcached(server, **options)
    engine.set("k", "there")
    start, stopped, window = time.monotonic() + 0.5, 10.0, 3.0

    def work(i: int) -> tuple[int, set[int], int]:
        mine, probes = open_memcached(server, **options), []
        ask = mine._probe
        mine._probe = lambda *args: probes.append(1) or ask(*args)  # type: ignore[func-returns-value,method-assign]
        answered, downs = 0, set[int]()
        while not answered and time.monotonic() < start + 60.0:
            try:
                answered += mine.get("k") == "there" and time.monotonic() > start + stopped
            except EngineDown:
                downs.add(int((time.monotonic() - start) // window))
            time.sleep(0.005)
        return answered, downs, len(probes)

    timers = [threading.Timer(0.5, server.pause), threading.Timer(0.5 + stopped, server.resume)]
    for timer in timers:
        timer.start()
    try:
        results = in_processes(4, work, limit=120)
    finally:
        for timer in timers:
            timer.join()
    record = engine.health.status(Host(server.host, server.port))
    assert (record.status, record.downs, record.ups) == (UP, 1, 1)
    assert record.probes == sum(probes for _, _, probes in results)
    assert 3 <= record.probes <= 1 + (time.monotonic() - start) / 2.0
    assert [answered for answered, _, _ in results] == [1] * 4
    assert all(downs >= {0, 1, 2} for _, downs, _ in results)


def test_health_in_shared_memory(health_url: str) -> None:
    """A change by one process is seen by the next call of another."""
    table = Health(health_url, scheme="memcached", servers=(HOST,))
    assert table.shared

    def child(i: int) -> str:
        fail(Health(health_url, scheme="memcached"))
        return table.status(HOST).status

    assert in_processes(1, child) == [DOWN]
    with pytest.raises(EngineDown):
        table.admit(HOST, never)
    assert [row["status"] for row in health.snapshot(health_url)] == [DOWN]


def test_killed_worker(health_url: str) -> None:
    """A worker killed in its probe leaves a table that the others go on with."""
    table = Health(health_url, scheme="memcached", retry_interval=0.05)
    fail(table)
    time.sleep(0.06)

    def suicide() -> BaseException:
        os.kill(os.getpid(), signal.SIGKILL)
        return BOOM

    with pytest.raises(AssertionError, match="status"):
        in_processes(1, lambda i: table.admit(HOST, suicide))
    time.sleep(0.06)
    table.admit(HOST, answering)
    assert table.status(HOST).probes == 2


def test_removed_store(health_url: str) -> None:
    """A store that was removed under its workers is made anew by the next that finds a server dead, for all."""
    table = Health(health_url, scheme="memcached")
    fail(table)
    shmcache.open(health_url).unlink()
    for _ in range(2):  # the first one finds the store gone
        table.set_server(HOST, True)
        fail(table)
    assert table.shared
    assert in_processes(1, lambda i: Health(health_url, scheme="memcached").status(HOST).status) == [DOWN]


@pytest.mark.skipif(os.geteuid() != 0, reason="root wanted, to drop its privileges")
def test_dropped_privileges(unique_name: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that dropped privileges after the engine was opened share the store of the user they are."""
    name = unique_name()
    monkeypatch.setattr(health, "default_url", lambda: f"posix:///{name}-{os.geteuid()}?size=1M")
    table = Health(scheme="memcached")

    def worker(i: int) -> tuple[bool, str]:
        os.setresuid(65534, 65534, 65534)
        if i == 0:
            fail(table)
        end = time.monotonic() + 30
        while table.status(HOST).status != DOWN and time.monotonic() < end:
            time.sleep(0.005)
        return table.shared, table.status(HOST).status

    try:
        assert in_processes(3, worker) == [(True, DOWN)] * 3
        assert table.status(HOST).status == UP
    finally:
        for euid in (0, 65534):
            found = inspect.locate(f"posix:///{name}-{euid}")
            assert isinstance(found, Found)
            segment.remove(found)

