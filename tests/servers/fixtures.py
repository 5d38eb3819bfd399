"""Fixtures that start servers; conftest.py takes over every public name of this file.

`memcached_server`, `redis_server`, `redis_cluster_server`: one for the whole session (of a worker), shared by
tests: clear before use, and never stop or pause it. `start_memcached`, `start_redis`, `start_redis_cluster`:
functions that start one for this test alone, ended with the test. `open_memcached` opens engines, with the
module's `memcached_options`; `health_url` is a store for health in shared memory. A program that is not
installed skips the test by its name; with SHMCACHE_CI=1 or SHMCACHE_REQUIRE_ALL=1 in the environment that is a failure.

The directory of tests is put on sys.path, so that tests say `from servers import fake, processes`.
"""

from __future__ import annotations

import contextlib
import functools as _functools
import itertools as _itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if str(Path(__file__).parent.parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent.parent))

from servers import processes as _processes

import shmcache as _shmcache

_serial = _itertools.count()


def _need(program: str) -> None:
    reason = _processes.missing(program)
    if reason is None:
        return
    if any(os.environ.get(name, "0") not in ("", "0") for name in ("SHMCACHE_CI", "SHMCACHE_REQUIRE_ALL")):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _one(start: Callable[..., Any], program: str, factory: pytest.TempPathFactory) -> Iterator[Any]:
    _need(program)
    with start(factory.mktemp("server")) as server:
        yield server


def _many(start: Callable[..., Any], program: str, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    _need(program)
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(start(tmp_path, **options))


@pytest.fixture(scope="session")
def memcached_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_processes.Server]:
    """A memcached that the tests of a session share."""
    yield from _one(_processes.start_memcached, "memcached", tmp_path_factory)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_processes.Server]:
    """A redis-server that the tests of a session share."""
    yield from _one(_processes.start_redis, "redis-server", tmp_path_factory)


@pytest.fixture(scope="session")
def redis_cluster_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_processes.Cluster]:
    """A cluster of three redis-server that the tests of a session share."""
    yield from _one(_processes.start_redis_cluster, "redis-server", tmp_path_factory)


@pytest.fixture
def start_memcached(tmp_path: Path) -> Iterator[Callable[..., _processes.Server]]:
    """Starts memcached for this test: `start_memcached(**options)`, as processes.start_memcached."""
    yield from _many(_processes.start_memcached, "memcached", tmp_path)


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[Callable[..., _processes.Server]]:
    """Starts redis-server for this test: `start_redis(**options)`, as processes.start_redis."""
    yield from _many(_processes.start_redis, "redis-server", tmp_path)


@pytest.fixture
def start_redis_cluster(tmp_path: Path) -> Iterator[Callable[..., _processes.Cluster]]:
    """Starts a cluster for this test: `start_redis_cluster(nodes=3)`, as processes.start_redis_cluster."""
    yield from _many(_processes.start_redis_cluster, "redis-server", tmp_path)


@pytest.fixture
def memcached_options() -> dict[str, Any]:
    """Options of the engines that `open_memcached` opens; a module may have its own."""
    return {}


@pytest.fixture
def open_memcached(request: pytest.FixtureRequest, memcached_options: dict[str, Any]) -> Iterator[Callable[..., Any]]:
    """Opens engines with health=no unless told otherwise: on an address, or on the session's server, which is
    emptied before."""
    engines: list[_shmcache.Engine] = []

    @_functools.cache
    def emptied() -> Any:
        server = request.getfixturevalue("memcached_server")
        server.ask(b"flush_all\r\n")
        return server

    def open_engine(address: object = None, **options: Any) -> Any:
        url = f"memcached:m{os.getpid()}-{next(_serial)}://{emptied() if address is None else address}/"
        engines.append(_shmcache.open(url, **({"health": "no"} | memcached_options | options)))
        return engines[-1]

    if "memcached_server" in request.fixturenames:
        emptied()
    yield open_engine
    for engine in engines:
        engine.close()


@pytest.fixture
def health_url(unique_name: Callable[[], str]) -> Iterator[str]:
    """The URL of a store in shared memory for servers' health, removed after the test."""
    url = f"posix:///{unique_name()}?size=1M"
    yield url
    engine = _shmcache.open(url)
    engine.unlink()
    engine.close()
