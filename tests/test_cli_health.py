"""shmcache health: the table of servers, and an operator's changes of it."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import shmcache
from shmcache import MISS, EngineDown, health
from shmcache.engines.memcached import MemcachedEngine
from shmcache.health import Health
from shmcache.url import Host

if importlib.util.find_spec("typer") is None or importlib.util.find_spec("rich") is None:
    pytest.skip("typer and rich are not installed", allow_module_level=True)

from shmcache.cli.output import Code

from .cli_help import on_terminal, run


@pytest.fixture
def workers(health_url: str, unique_name: Callable[[], str]) -> Iterator[shmcache.Engine]:
    """The store of health_url as workers have it open, under an engine_id of its own."""
    with shmcache.open(health_url.replace("posix:", f"posix:{unique_name()}:")) as store:
        yield store


@pytest.fixture
def failed(workers: shmcache.Engine, health_url: str) -> str:
    """The URL of a store that knows a memcached and a redis which did not answer."""
    for scheme, port in (("memcached", 11211), ("redis", 6379)):
        host, table = Host("10.0.0.1", port), Health(workers, scheme=scheme)
        table.failed(host, table.admit(host, lambda: None), TimeoutError("timed \x1bout"))
    return health_url


def test_health_lists_servers(failed: str) -> None:
    """health prints a line for each server that ever failed: state, times, counters of every change, last error."""
    memcached, redis = run("health", "--health", failed, "--json").objects
    assert (memcached["server"], redis["server"]) == ("memcached 10.0.0.1:11211", "redis 10.0.0.1:6379")
    assert [memcached[n] for n in ("state", "probes", "changes", "downs", "ups", "offs")] == ["down", 0, 1, 1, 0, 0]
    assert memcached["since"] == pytest.approx(time.time(), abs=60)
    assert memcached["tried_ago"] == pytest.approx(0, abs=60)
    rows = run("health", "--health", failed).rows
    assert [(row["server"], row["state"], row["error"]) for row in rows] == [
        (name, "down", r"TimeoutError: timed \x1bout") for name in ("memcached 10.0.0.1:11211", "redis 10.0.0.1:6379")
    ]
    assert "memcached 10.0.0.1:11211" in on_terminal("health", "--health", failed)


def test_health_of_the_default_store(health_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --health it is the store that engines use by default, looked at whatever its size, made by --set alone."""
    monkeypatch.setattr(health, "default_url", lambda: health_url)
    assert run("health").code == Code.NO_SEGMENT
    assert run("health", "--set", "memcached://h:1", "down").rows[0]["state"] == "off"
    monkeypatch.setattr(health, "default_url", lambda: health_url.replace("1M", "2M"))
    assert [row["server"] for row in run("health").rows] == ["memcached h:1"]


@pytest.mark.parametrize("named", ["memcached 10.0.0.1:11211", "10.0.0.1:11211", "memcached://10.0.0.1:11211"])
def test_set_is_for_all_workers(failed: str, workers: shmcache.Engine, named: str) -> None:
    """--set HOST down takes a server out for every process, however it is named."""
    (row, other) = run("health", "--health", failed, "--set", named, "down").rows
    assert (row["state"], row["offs"], row["changes"], other["state"]) == ("off", "1", "2", "down")
    with pytest.raises(EngineDown, match="turned off"):
        Health(workers, scheme="memcached").admit(Host("10.0.0.1", 11211), lambda: None)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("10.0.0.1", "down"), "one of memcached 10.0.0.1:11211, redis 10.0.0.1:6379"),
        (("10.0.0.9:1", "up"), "'10.0.0.9:1' found"), (("10.0.0.1:6379", "off"), "up or down wanted, 'off' found"),
        (("posix://h:1", "up"), "redis://HOST:PORT wanted"), (("redis://h", "up"), "redis://HOST:PORT wanted"),
    ],
)  # fmt: skip
def test_set_of_an_unknown_server(failed: str, args: tuple[str, str], message: str) -> None:
    """A host that names no server or two, or a state that is none, ends with 2 and changes nothing."""
    result = run("health", "--health", failed, "--set", *args)
    assert (result.code, result.out) == (Code.USAGE, "")
    assert message in result.err
    assert {row["changes"] for row in run("health", "--health", failed).rows} == {"1"}


@pytest.mark.parametrize("flush", [True, False])
def test_put_back_in(
    start_memcached: Any, health_url: str, workers: shmcache.Engine, open_memcached: Callable[..., MemcachedEngine], flush: bool
) -> None:
    """A server put back in is asked by the next call first, and emptied where the engine says so, even with no retries."""
    server = start_memcached()
    engine = open_memcached(server, health=workers, retry_interval=-1, flush_on_rejoin=flush)
    engine.set("k", "old")
    assert run("health", "--health", health_url, "--set", f"memcached://{server}", "down").code == 0
    with pytest.raises(EngineDown, match="turned off"):
        engine.get("k")
    (row,) = run("health", "--health", health_url, "--set", server.host, "up").rows
    assert (row["state"], row["error"], row["tried_ago"]) == ("down", health.DUE, "")
    assert engine.get("k", MISS) == (MISS if flush else "old")
    for args in ((), ("--set", server.host, "up")):
        (row,) = run("health", "--health", health_url, *args).rows
        assert [row[n] for n in ("state", "offs", "downs", "ups", "probes", "error")] == ["up", "1", "1", "1", "1", ""]

def test_put_back_in_too_early(
    start_memcached: Any, health_url: str, workers: shmcache.Engine, open_memcached: Callable[..., MemcachedEngine]
) -> None:
    """A server that is put back in and does not answer is asked once, and stays down."""
    server = start_memcached()
    engine = open_memcached(server, health=workers, retry_interval=-1)
    server.kill()
    with pytest.raises(EngineDown, match="refused"):
        engine.get("k")
    run("health", "--health", health_url, "--set", str(server), "up")
    for _ in range(2):
        with pytest.raises(EngineDown, match="until set_server"):
            engine.get("k")
    (row,) = run("health", "--health", health_url).rows
    assert [row[name] for name in ("state", "changes", "probes")] == ["down", "1", "1"]
