"""The stores compared, each through the cheapest calls its own package offers, opened in a fresh process.

A rival gets keys in the type it wants, no durability, no compression, and msgpack where it stores bytes only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shmcache.bench import Subject, dict_subject, engine_subject

__all__ = ["PEERS", "SIZE", "UWSGI_CACHE", "Context", "Peer"]

SIZE = 192 << 20
UWSGI_CACHE = "name=bench,items=250000,blocks=1000000,blocksize=128,bitmap=1,keysize=64"
HOUR = 3600


@dataclass(frozen=True)
class Context:
    """Where a peer lives: a directory in memory of its own, and the sockets of the servers."""

    directory: Path
    sockets: dict[str, str]


@dataclass(frozen=True)
class Peer:
    """A store: how it is opened, what it needs, which workloads make sense (None: all it has calls for)."""

    open: Callable[[Context], Subject]
    needs: tuple[str, ...] = ()
    server: str = ""
    workloads: tuple[str, ...] | None = None
    two: bool = True
    version: tuple[str, ...] = ()
    launcher: str = ""


def _encode(value: Any) -> bytes:
    return bytes(importlib.import_module("msgpack").packb(value))


def _with_msgpack(get: Callable[[Any], Any], put: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    msgpack = importlib.import_module("msgpack")
    pack, unpack = msgpack.packb, msgpack.unpackb

    def get_object(key: Any) -> Any:
        data = get(key)
        return None if data is None else unpack(data)

    def set_object(key: Any, value: Any) -> Any:
        return put(key, pack(value))

    return get_object, set_object


def _dict(_context: Context) -> Subject:
    return dict_subject()


def _lru_cache(_context: Context) -> Subject:
    @functools.lru_cache(maxsize=1 << 20)
    def compute(key: str) -> bytes:
        return os.urandom(100)

    return Subject("functools.lru_cache", compute, None, notes="maxsize=2**20; a memoized function, so only hits")


def _shm(**options: Any) -> Callable[[Context], Subject]:
    def opened(_context: Context) -> Subject:
        shmcache = importlib.import_module("shmcache")
        name = f"bench-{uuid.uuid4().hex[:12]}"
        engine = shmcache.open(f"posix:///{name}", size=SIZE, lock_timeout=10, **options)  # a loaded machine is no failure

        def close() -> None:
            engine.unlink()
            engine.close()

        subject = engine_subject(engine)
        subject.close = close
        header = engine.raw("info")
        subject.notes = f"posix, {SIZE >> 20} MiB, {header['n_shards']} guards, {options or 'defaults'}"
        return subject

    return opened


def _lmdb(context: Context) -> Subject:
    lmdb: Any = importlib.import_module("lmdb")
    options = {"map_size": 1 << 30, "sync": False, "metasync": False, "writemap": True, "readahead": False}

    def make() -> Subject:
        env = lmdb.open(str(context.directory), **options)
        begin = env.begin

        def get(key: bytes) -> bytes | None:
            with begin() as txn:
                found: bytes | None = txn.get(key)
                return found

        def put(key: bytes, value: bytes) -> None:
            with begin(write=True) as txn:
                txn.put(key, value)

        def get_many(keys: list[bytes]) -> dict[bytes, bytes]:
            with begin() as txn:
                return {key: txn.get(key) for key in keys}

        def incr(key: bytes) -> int:
            with begin(write=True) as txn:
                value = int(txn.get(key) or b"0") + 1
                txn.put(key, b"%d" % value)
                return value

        get_object, set_object = _with_msgpack(get, put)
        return Subject(
            "lmdb", get, put, get_many, incr, None, set_object, get_object, key=str.encode, close=env.close,
            notes=", ".join(f"{k}={v}" for k, v in options.items()) + ", in memory; get and put in incr",
        )  # fmt: skip

    first = make()

    def fork() -> Subject:
        first.close()
        return make()

    first.fork = fork
    return first


def _diskcache(context: Context) -> Subject:
    cache: Any = importlib.import_module("diskcache").Cache(str(context.directory), size_limit=1 << 30)

    def set_ttl(key: str, value: Any) -> None:
        cache.set(key, value, expire=HOUR)

    return Subject(
        "diskcache", cache.get, cache.set, None, cache.incr, set_ttl, close=cache.close, local=False,
        notes="default settings, directory in memory; small dict through pickle",
    )  # fmt: skip


def _pymemcache(context: Context) -> Subject:
    module: Any = importlib.import_module("pymemcache")

    def make() -> Subject:
        client = module.Client(context.sockets["memcached"], default_noreply=False)
        client.set("counter", b"0")

        def incr(key: str) -> Any:
            return client.incr(key, 1)

        def set_ttl(key: str, value: Any) -> None:
            client.set(key, value, HOUR)

        get_object, set_object = _with_msgpack(client.get, client.set)
        return Subject(
            "memcached, pymemcache", client.get, client.set, client.get_many, incr, set_ttl, set_object, get_object,
            close=client.close, local=False, fork=make,
        )  # fmt: skip

    return make()


def _pylibmc(context: Context) -> Subject:
    module: Any = importlib.import_module("pylibmc")

    def make() -> Subject:
        client = module.Client([context.sockets["memcached"]])
        client.set("counter", 0)

        def set_ttl(key: str, value: Any) -> None:
            client.set(key, value, HOUR)

        get_object, set_object = _with_msgpack(client.get, client.set)
        return Subject(
            "memcached, pylibmc", client.get, client.set, client.get_multi, client.incr, set_ttl, set_object, get_object,
            close=client.disconnect_all, local=False, fork=make,
        )  # fmt: skip

    return make()


def _redis(context: Context) -> Subject:
    module: Any = importlib.import_module("redis")

    def make() -> Subject:
        client = module.Redis(unix_socket_path=context.sockets["redis"])

        def set_ttl(key: str, value: Any) -> None:
            client.set(key, value, HOUR)

        get_object, set_object = _with_msgpack(client.get, client.set)
        hiredis = "with" if importlib.util.find_spec("hiredis") else "without"
        return Subject(
            "redis", client.get, client.set, client.mget, client.incr, set_ttl, set_object, get_object,
            close=client.close, local=False, fork=make, notes=f"redis-py {hiredis} hiredis",
        )  # fmt: skip

    return make()


def _uwsgi(_context: Context) -> Subject:
    uwsgi: Any = importlib.import_module("uwsgi")

    def get(key: str) -> Any:
        return uwsgi.cache_get(key, "bench")

    def put(key: str, value: bytes) -> Any:
        return uwsgi.cache_update(key, value, 0, "bench")

    def incr(key: str) -> Any:
        return uwsgi.cache_inc(key, 1, 0, "bench")

    def set_ttl(key: str, value: bytes) -> Any:
        return uwsgi.cache_update(key, value, HOUR, "bench")

    get_object, set_object = _with_msgpack(get, put)
    return Subject(
        "uWSGI cache2", get, put, None, incr, set_ttl, set_object, get_object,
        notes=f"{UWSGI_CACHE}, one worker; a Python function names the cache in each call",
    )  # fmt: skip


_SEMAPHORE = ("set", "incr", "set-object")
PEERS: dict[str, Peer] = {
    "dict": Peer(_dict),
    "lru_cache": Peer(_lru_cache, two=False),
    "shmcache": Peer(_shm(guard="fast"), ("shmcache",), version=("shmcache",)),
    "shmcache-semaphore": Peer(_shm(guard="semaphore"), ("shmcache",), workloads=_SEMAPHORE, version=("shmcache",)),
    "shmcache-header": Peer(_shm(guard="fast", integrity="header"), ("shmcache",), two=False, version=("shmcache",)),
    "uwsgi": Peer(_uwsgi, two=False, launcher="uwsgi"),
    "lmdb": Peer(_lmdb, ("lmdb",), version=("lmdb",)),
    "diskcache": Peer(_diskcache, ("diskcache",), version=("diskcache",), two=False),
    "pylibmc": Peer(_pylibmc, ("pylibmc",), "memcached", version=("pylibmc",)),
    "pymemcache": Peer(_pymemcache, ("pymemcache",), "memcached", version=("pymemcache",)),
    "redis": Peer(_redis, ("redis",), "redis", version=("redis", "hiredis")),
}
