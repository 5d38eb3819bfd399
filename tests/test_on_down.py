"""Recipes over a server that is gone: on_down=raise and on_down=miss, on memcached and Redis, alone and behind a
near tier."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import shmcache
from shmcache import MISS, EngineDown
from shmcache.testing import in_processes, in_threads


class Served:
    """An engine, its server, and the engine that talks to it."""

    def __init__(self, engine: shmcache.Engine, far: Any, server: Any) -> None:
        self.engine, self.far, self.server = engine, far, server

    def revive(self) -> None:
        self.server.start()
        assert self.far.set_server(str(self.server), True)

    def disconnect(self) -> None:
        if hasattr(self.far, "_abandon"):
            self.far._abandon()
        else:
            self.far._servers[0].close()


Opener = Callable[[str], Served]


@pytest.fixture(params=["memcached", "redis", "tiered:memcached", "tiered:redis"])
def open_on(request: pytest.FixtureRequest, unique_name: Callable[[], str]) -> Iterator[Opener]:
    """Opens an engine with that on_down, and its server, which the test may kill. Its tier has the policy, not the
    server's engine."""
    *tiered, scheme = request.param.split(":")
    engines: list[shmcache.Engine] = []

    def open_engine(on_down: str) -> Served:
        name, server = unique_name(), request.getfixturevalue(f"start_{scheme}")()
        options = {"health": "no", "retry_interval": -1, "timeout": 10, "connect_timeout": 10}
        if not tiered:
            options["on_down"] = on_down
        far = shmcache.open(f"{scheme}:{name}://{server}/", **options)
        engines.append(far)
        if tiered:
            engines.append(shmcache.open(f"memory:{name}://"))
            tiers = {"l1": f"memory:{name}", "l2": f"{scheme}:{name}"}
            engines.append(shmcache.open(f"tiered:{name}://", **tiers, on_down=on_down))
        return Served(engines[-1], far, server)

    yield open_engine
    for engine in reversed(engines):
        engine.close()


def test_fill_without_a_server(open_on: Opener) -> None:
    """With on_down=miss get_or_set and memoize call the function each time and store nothing; locks raise."""
    served = open_on("miss")
    engine, calls = served.engine, []
    served.server.kill()

    def factory() -> int:
        calls.append(1)
        return len(calls)

    space = engine.namespace("space")
    for n in (1, 4):
        assert engine.get_or_set("k", factory) == n
        assert engine.get_or_set("k", factory, 5, grace=5) == n + 1
        assert space.get_or_set("k", factory) == n + 2
    plain = engine.memoize(5)(factory)

    @engine.memoize(5, grace=5)
    async def waiting() -> int:
        return factory()

    assert [plain(), plain(), asyncio.run(waiting()), asyncio.run(waiting())] == [7, 8, 9, 10]
    for name in ("a", "b"):
        with pytest.raises(EngineDown, match=str(served.server)), engine.lock(name, timeout=0):
            pass


def test_fill_raises(open_on: Opener) -> None:
    """With on_down=raise get_or_set and lock raise EngineDown, and the factory is not called."""
    served = open_on("raise")
    engine = served.engine
    served.server.kill()
    for call in (
        lambda: engine.get_or_set("k", os.abort),
        lambda: engine.get_or_set("k", os.abort, 5, grace=5),
        lambda: engine.memoize(5)(os.abort)(),
        lambda: engine.lock("name", timeout=0).__enter__(),
    ):
        with pytest.raises(EngineDown, match=str(served.server)):
            call()


@pytest.mark.parametrize("grace", [0, 5])
def test_server_dies_during_a_fill(open_on: Opener, grace: float) -> None:
    """A server that dies while the factory runs costs the stored copy with on_down=miss, is EngineDown with raise, and
    lets through what the factory raises."""
    served = open_on("miss")

    def factory() -> str:
        served.server.kill()
        return "made"

    assert served.engine.get_or_set("k", factory, 5, grace=grace) == "made"
    assert served.engine.get("k", MISS) is MISS
    served = open_on("raise")
    with pytest.raises(EngineDown):
        served.engine.get_or_set("k", factory, 5, grace=grace)
    served.revive()

    def fails() -> None:
        served.server.kill()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        served.engine.get_or_set("k", fails, 5, grace=grace)


def test_waiter_whose_server_dies(open_on: Opener) -> None:
    """With on_down=miss a caller that waits for a filler calls its own factory when the server is gone."""
    served = open_on("miss")
    filling, leave = threading.Event(), threading.Event()

    def slow() -> str:
        filling.set()
        leave.wait(30)
        return "filler's"

    def work(i: int) -> Any:
        if i == 0:
            return served.engine.get_or_set("k", slow)
        filling.wait()
        killer = threading.Timer(0.1, served.server.kill)
        killer.start()
        value = served.engine.get_or_set("k", lambda: "own")
        killer.join()
        leave.set()
        return value

    assert in_threads(2, work) == ["filler's", "own"]


def test_body_of_a_lock_goes_first(open_on: Opener) -> None:
    """A lock left by an exception lets that one through with the server gone; left otherwise it raises EngineDown."""
    served = open_on("miss")

    def leave(error: type[Exception] | None) -> None:
        with served.engine.lock("name"):
            served.server.kill()
            if error is not None:
                raise error

    with pytest.raises(ZeroDivisionError):
        leave(ZeroDivisionError)
    served.revive()
    with pytest.raises(EngineDown):
        leave(None)


def test_no_descriptor_left(open_on: Opener) -> None:
    """A process without a descriptor for the connection gets EngineDown, and its answer as soon as it has one."""
    served = open_on("raise")

    def child(i: int) -> list[Any]:
        served.far.set("k", [5])  # connects, and loads what is loaded late
        served.disconnect()
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        taken: list[int] = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        with pytest.raises(EngineDown, match="Too many open files"):
            served.far.get("k")
        for descriptor in taken:
            os.close(descriptor)
        return served.far.get("k")

    assert in_processes(1, child) == [[5]]
