"""shmcache.kamailio: the pseudo-variables, over memory and over a real memcached."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import shmcache
from shmcache import kamailio
from shmcache.engines.memory import MemoryEngine
from shmcache.kamailio import Module
from shmcache.testing import in_processes

from .clock_help import Clock

_serial = itertools.count()


@pytest.fixture
def module(clock: Clock) -> Module:
    return Module(MemoryEngine(clock=clock))


@pytest.fixture
def on_memcached(memcached_server: Any) -> Iterator[Callable[..., Module]]:
    """Makes modules on the session's memcached, emptied before."""
    modules: list[Module] = []

    def make(**options: Any) -> Module:
        engine = shmcache.open(
            f"memcached:kt{next(_serial)}://{memcached_server}/", kamailio=True, health=False
        )
        modules.append(Module(engine, **options))
        return modules[-1]

    memcached_server.ask(b"flush_all\r\n")
    yield make
    for module in modules:
        module.engine.close()


def test_the_documentations_examples(module: Module, clock: Clock) -> None:
    """The three examples of the module's documentation give what it says."""
    mct, mcinc, mcdec, mctex = module.mct, module.mcinc, module.mcdec, module.mctex
    mct["test"] = 1
    assert mct["test"] == 1
    mct["test"] = None
    assert mct["test"] is None

    mct["cnt"] = 1
    mcinc["cnt"] = 1
    assert mct["cnt"] == 2
    mcdec["cnt"] = 1
    assert mct["cnt"] == 1

    mct["test"] = 1
    mctex["test"] = 10
    clock.now += 9.9
    assert mct["test"] == 1
    clock.now += 0.2
    assert mct["test"] is None
    assert module.errors == 0


def test_lifetimes(module: Module, clock: Clock) -> None:
    """An item lives for `expire`, 10,800 s unless set, or for the lifetime written beside its key; 0 is for ever;
    over 30 days is a Unix time."""
    module.mct["default"] = "a"
    module.mct["own", 60] = "b"
    module.mct["ever", 0] = "c"
    module.mct["until", int(time.time()) + 100] = "d"
    module.mct["past", 2_592_001] = "e"
    engine = module.engine
    assert engine.ttl("default") == 10_800
    assert engine.ttl("own") == 60
    assert engine.ttl("ever") == float("inf")
    assert engine.ttl("until") == pytest.approx(100, abs=2)
    assert "past" not in engine
    module.modparam("expire", 5)
    module.mct["default"] = "a"
    assert engine.ttl("default") == 5
    module.mctex["own"] = int(time.time()) + 50
    assert engine.ttl("own") == pytest.approx(50, abs=2)
    assert module.errors == 0


def test_write_once(module: Module, caplog: pytest.LogCaptureFixture) -> None:
    """With mode 1 what is there stays; the second write is logged and counted."""
    module.modparam("mode", 1)
    module.mct["k"] = "first"
    module.mct["k"] = "second"
    assert module.mct["k"] == "first"
    assert module.errors == 1
    assert "mct(k)" in caplog.text
    module.mct["k"] = None
    module.mct["k"] = "third"
    assert module.mct["k"] == "third"


def test_counting_needs_a_number(module: Module, caplog: pytest.LogCaptureFixture) -> None:
    """Counting what is absent or text, or by what is no int, changes nothing; it is logged and counted."""
    module.mct["text"] = "5"
    module.mct["n"] = 5
    module.mcinc["absent"] = 1
    module.mcdec["text"] = 1
    module.mcinc["n"] = "1"  # type: ignore[assignment]
    module.mcinc["n"] = True
    module.mctex["absent"] = 5
    module.mctex["n"] = "5"  # type: ignore[assignment]
    assert module.errors == 6
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 6
    assert (module.mct["absent"], module.mct["text"], module.mct["n"]) == (None, "5", 5)


def test_below_zero(module: Module) -> None:
    """mcdec goes below zero."""
    module.mct["n"] = 1
    module.mcdec["n"] = 3
    assert module.mct["n"] == module.mcinc["n"] == module.mctex["n"] == -2


def test_mapping(module: Module) -> None:
    """in, get and del work as for a dict, but for what is absent."""
    module.mct["k"] = 1
    assert "k" in module.mct
    assert module.mct.get("absent", 5) == 5
    del module.mct["k"]
    del module.mct["k"]
    assert "k" not in module.mct
    assert module.errors == 0


@pytest.mark.parametrize("key", ["", None, 5, ("k",), "k" * 70_000, b""])
def test_nothing_raises(module: Module, key: Any) -> None:
    """Keys, lifetimes and values that make no sense are logged and counted, and the script goes on."""
    assert module.mct[key] is None
    module.mct[key] = 1
    module.mct[key] = None
    module.mcinc[key] = 1
    module.mctex[key] = 1
    assert module.errors == 5
    module.mct["k", -5] = 1
    module.mct["k", "soon"] = 1  # type: ignore[index]
    module.mct["k"] = object()
    assert module.errors == 8
    assert module.mct["k"] is None


def test_server_down(start_memcached: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A server that is gone reads None and raises nothing; it is used again when it is back."""
    server = start_memcached()
    engine = shmcache.open(
        f"memcached:kd{next(_serial)}://{server}/", health=False, retry_interval=0.05, timeout=0.5
    )
    module = Module(engine)
    with engine:
        module.mct["k"] = 1
        server.kill()
        assert module.mct["k"] is None
        module.mct["k"] = 2
        module.mcinc["k"] = 1
        module.mctex["k"] = 1
        assert module.errors == 4
        assert "EngineDown" in caplog.text
        server.start()
        time.sleep(0.1)
        module.mct["k"] = 3
        assert module.mct["k"] == 3


def test_engine_that_does_not_open(caplog: pytest.LogCaptureFixture) -> None:
    """An engine that cannot be opened is an error of each use, not an exception."""
    module = Module("nonsense://")
    assert module.mct["k"] is None
    module.servers = "memory:never-opened"
    module._engine = None
    assert module.mct["k"] is None
    assert module.errors == 2
    assert "known are" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("expire", -1, ValueError), ("expire", "1", TypeError), ("expire", True, TypeError), ("mode", 2, ValueError),
        ("timeout", 0, ValueError), ("servers", 5, TypeError), ("servers", "", TypeError), ("other", 1, ValueError),
    ],
)  # fmt: skip
def test_bad_parameters(module: Module, name: str, value: Any, error: type[Exception]) -> None:
    """A module parameter of a wrong name, type or value raises, naming it."""
    with pytest.raises(error, match=name if name != "other" else "servers, expire"):
        module.modparam(name, value)
    if name != "other":
        with pytest.raises(error, match=name):
            Module(**{name: value})


def test_servers(start_memcached: Any, memcached_server: Any) -> None:
    """`servers` is a host with a port, several, a socket, an engine URL, or an engine_id."""
    unix = start_memcached(unix=True)
    engine = shmcache.open(f"memory:k{next(_serial)}://")
    kinds = [str(memcached_server), f"{memcached_server}, {start_memcached()}", unix.host, engine.engine_id]
    for servers in [*kinds, f"memory:k{next(_serial)}://"]:
        module = Module(servers, timeout=700)
        module.mct["k"] = servers
        assert module.mct["k"] == servers
        assert module.errors == 0
        module.engine.close()
    assert module.engine is not engine


def test_timeout_is_milliseconds(memcached_server: Any) -> None:
    """timeout is in milliseconds, for connecting and for an answer."""
    module = Module(str(memcached_server), timeout=250)
    engine: Any = module.engine
    assert (engine._timeout, engine._connect_timeout) == (0.25, 0.25)
    engine.close()


def test_module_variables(memcached_server: Any) -> None:
    """The module's own variables follow modparam of a script."""
    engine = MemoryEngine()
    kamailio.modparam("memcached", "servers", engine)
    kamailio.mct["k"] = 1
    kamailio.mcinc["k"] = 4
    kamailio.mcdec["k"] = 2
    kamailio.mctex["k"] = 60
    assert engine.get("k") == kamailio.mct["k"] == 3
    assert engine.ttl("k") == pytest.approx(60, abs=2)
    with pytest.raises(ValueError, match="htable"):
        kamailio.modparam("htable", "servers", engine)
    kamailio.modparam("memcached", "servers", "localhost:11211")


def test_what_kamailio_stores(on_memcached: Callable[..., Module], memcached_server: Any) -> None:
    """Ints, text and long keys written by Kamailio's module are read as such, and counted on."""
    module = on_memcached()
    memcached_server.ask(b"set n 0 0 2\r\n41\r\n")
    memcached_server.ask(b"set t 1 0 2\r\n41\r\n")
    assert (module.mct["n"], module.mct["t"]) == (41, "41")
    module.mcinc["n"] = 1
    assert memcached_server.ask(b"get n\r\n") == b"VALUE n 0 2\r\n42\r\nEND\r\n"
    digest = hashlib.md5(b"k" * 250).hexdigest().encode()
    memcached_server.ask(b"set %b 1 0 4\r\nlong\r\n" % digest)
    assert module.mct["k" * 250] == "long"
    assert module.errors == 0


def test_what_kamailio_reads(on_memcached: Callable[..., Module], memcached_server: Any) -> None:
    """Ints are stored as decimal text without the string flag (1), text with it, as Kamailio's module reads them."""
    module = on_memcached()
    module.mct["n"] = 7
    module.mct["t"] = "seven"
    assert memcached_server.ask(b"get n\r\n") == b"VALUE n 2 1\r\n7\r\nEND\r\n"
    assert memcached_server.ask(b"get t\r\n") == b"VALUE t 1 5\r\nseven\r\nEND\r\n"
    assert memcached_server.ask(b"incr n 3\r\n") == b"10\r\n"
    assert module.mct["n"] == 10


def test_forked_workers_count(on_memcached: Callable[..., Module]) -> None:
    """Workers that count with mcinc and mcdec at once lose nothing."""
    module = on_memcached()
    module.mct["n"] = 0

    def work(i: int) -> int:
        for _ in range(100):
            module.mcinc["n"] = 3
            module.mcdec["n"] = 1
        return module.errors

    assert in_processes(4, work) == [0] * 4
    assert module.mct["n"] == 800
