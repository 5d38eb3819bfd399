"""The stores that the storm of `rivals` is let loose on: each behind `set` and `get` of text keys and bytes.

A store is prepared once, before workers are forked; `attach` is called in each worker. Packages are imported where used.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any, Final, Protocol

__all__ = ["STORES", "Store", "StoreInfo", "version_of"]

SLOT: Final = 32768


class Store(Protocol):
    """What a worker calls."""

    def set(self, key: str, value: bytes) -> Any: ...
    def get(self, key: str) -> bytes | None: ...


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """`package`: what to install, empty for the standard library; `prepare` gives the function that attaches in a worker."""

    name: str
    package: str
    prepare: Any


def version_of(package: str) -> str | None:
    """The installed version, None if it is not; the standard library's is Python's."""
    if not package:
        import platform

        return platform.python_version()
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _shmcache(guard: str) -> Any:
    def prepare(directory: str, keys: list[str]) -> Any:
        import shmcache

        cache = shmcache.open("posix:///rival", mode="x", size="1M", guards=1, eviction="none", guard=guard, lock_timeout=30.0)
        return lambda: cache

    return prepare


def _diskcache(directory: str, keys: list[str]) -> Any:
    diskcache = import_module("diskcache")
    diskcache.Cache(directory).close()
    return lambda: diskcache.Cache(directory)


class _Lmdb:
    def __init__(self, directory: str) -> None:
        self.environment = import_module("lmdb").open(directory, map_size=8 << 20, sync=False)

    def set(self, key: str, value: bytes) -> None:
        with self.environment.begin(write=True) as transaction:
            transaction.put(key.encode(), value)

    def get(self, key: str) -> bytes | None:
        with self.environment.begin() as transaction:
            found: bytes | None = transaction.get(key.encode())
            return found


def _lmdb(directory: str, keys: list[str]) -> Any:
    return lambda: _Lmdb(directory)


class _Mapping:
    """Over an object with the mapping protocol."""

    def __init__(self, mapping: Any) -> None:
        self.mapping = mapping

    def set(self, key: str, value: bytes) -> None:
        self.mapping[key] = value

    def get(self, key: str) -> bytes | None:
        found: bytes | None = self.mapping.get(key)
        return found


def _ultradict(directory: str, keys: list[str]) -> Any:
    ultradict = import_module("UltraDict").UltraDict
    kept = ultradict(name="rival", shared_lock=True, buffer_size=1 << 20, full_dump_size=1 << 22)
    return lambda: _Mapping(ultradict(name="rival", shared_lock=True)) if kept is not None else None


def _shared_memory_dict(directory: str, keys: list[str]) -> Any:
    os.environ["SHARED_MEMORY_USE_LOCK"] = "1"
    kept = import_module("shared_memory_dict").SharedMemoryDict(name="rival", size=1 << 20)
    return lambda: _Mapping(kept)


class _Locked:
    """A lock of the standard library over slots in shared anonymous memory."""

    def __init__(self, keys: list[str]) -> None:
        import mmap
        import multiprocessing

        self.lock, self.at = multiprocessing.Lock(), {key: i * SLOT for i, key in enumerate(keys)}
        self.memory = mmap.mmap(-1, SLOT * len(keys))

    def set(self, key: str, value: bytes) -> None:
        at = self.at[key]
        with self.lock:
            self.memory[at : at + 4] = len(value).to_bytes(4, "little")
            self.memory[at + 4 : at + 4 + len(value)] = value

    def get(self, key: str) -> bytes | None:
        at = self.at[key]
        with self.lock:
            n = int.from_bytes(self.memory[at : at + 4], "little")
            return bytes(self.memory[at + 4 : at + 4 + n]) if n else None


def _locked(directory: str, keys: list[str]) -> Any:
    store = _Locked(keys)
    return lambda: store


STORES: Final = (
    StoreInfo("shmcache, fast guard", "shmcache", _shmcache("fast")),
    StoreInfo("shmcache, semaphore guard", "shmcache", _shmcache("semaphore")),
    StoreInfo("diskcache", "diskcache", _diskcache),
    StoreInfo("lmdb, sync off", "lmdb", _lmdb),
    StoreInfo("UltraDict, shared_lock", "UltraDict", _ultradict),
    StoreInfo("shared-memory-dict, lock on", "shared-memory-dict", _shared_memory_dict),
    StoreInfo("mmap + multiprocessing.Lock", "", _locked),
    StoreInfo("uWSGI cache, default locks", "uWSGI", None),
    StoreInfo("uWSGI cache, lock-engine=ipcsem", "uWSGI", None),
)
"""`prepare` None: workers are mules of a uWSGI server."""
