"""open(url), engine(engine_id), and which class serves which scheme.

I1  An open engine is known under its engine_id; a closed one is not, and its id is free again.
I2  Equal is: same URL apart from options, and equal typed options, wherever each was written.
I3  A class is imported when its scheme is opened; entry points are read when no built-in scheme matches.
I4  A forked child has the parent's engines under the same ids; the lock is made anew in the child, so that a
    thread of the parent that was opening something at that moment does not block it.

The registry holds its engines: one that was opened stays open until `close()`.
"""

from __future__ import annotations

import os
import threading
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from .engine import Engine
from .url import Url, parse_options

__all__ = ["BUILT_IN", "ENTRY_POINTS", "engine", "known_schemes", "open", "opened"]

ENTRY_POINTS = "shmcache.engines"
"""Group of the entry points that name engine classes: scheme = module:Class. Built-in schemes cannot be taken
over."""

BUILT_IN = {
    "posix": "shmcache.engines.shm:ShmEngine",
    "sysv": "shmcache.engines.shm:ShmEngine",
    "anon": "shmcache.engines.shm:ShmEngine",
    "memory": "shmcache.engines.memory:MemoryEngine",
    "memcached": "shmcache.engines.memcached:MemcachedEngine",
    "redis": "shmcache.engines.redis:RedisEngine",
    "rediss": "shmcache.engines.redis:RedisEngine",
    "redis+unix": "shmcache.engines.redis:RedisEngine",
    "redis+cluster": "shmcache.engines.redis:RedisEngine",
    "tiered": "shmcache.engines.tiered:TieredEngine",
}

DEFAULT_URL = "posix:///default"


class _Entry(NamedTuple):
    engine: Engine
    url: Url
    options: dict[str, Any]


_entries: dict[str, _Entry] = {}
_lock = threading.RLock()  # re-entrant: a tiered engine opens others while it is opened


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def open(url: str | Url | None = None, /, **options: Any) -> Engine:
    """Open an engine, or return the open one of an equal URL.

    Args: url: engine URL; None = the environment's SHMCACHE_URL, if empty posix:///default. options: engine
    options as keywords, of native types or text; None = not given.
    Returns: the engine; one object for all callers in this process, so that `close()` closes it for all of
    them.
    Raises: ValueError for a malformed URL, an unknown scheme or option (the known ones are listed), an option
    given twice with different values, or a different URL under an engine_id in use; TypeError for types; what
    the engine raises on opening.
    """
    if url is None:
        url = os.environ.get("SHMCACHE_URL") or DEFAULT_URL
    parsed = url if isinstance(url, Url) else Url.parse(url)
    cls = _load(parsed.scheme)
    typed = parse_options(parsed.scheme, cls.OPTIONS, parsed.options, options)
    plain, name = parsed.without_options(), parsed.engine_id
    with _lock:
        entry = _entries.get(name)
        if entry is not None and not entry.engine._closed:
            if entry.url == plain and entry.options == typed:
                return entry.engine
            raise ValueError(
                f"engine_id {name!r} is in use: {_describe(entry.url, entry.options)} found,"
                f" {_describe(plain, typed)} wanted (another group gives another id: {parsed.scheme}:group://...)"
            )
        made = cls.from_url(parsed, **typed)
        _entries[name] = _Entry(made, plain, typed)
        return made


def engine(engine_id: str) -> Engine:
    """The engine opened under `engine_id` in this process, or before it was forked off.

    Raises: KeyError, whose message lists the open ids; TypeError for something else than str.
    """
    if not isinstance(engine_id, str):
        raise TypeError(f"engine_id: str wanted, {type(engine_id).__name__} found")
    entry = _entries.get(engine_id)
    if entry is None or entry.engine._closed:
        raise KeyError(
            f"engine_id {engine_id!r} is not open; open are: {', '.join(sorted(opened())) or 'none'}"
        )
    return entry.engine


def opened() -> dict[str, Engine]:
    """The open engines by engine_id."""
    return {name: entry.engine for name, entry in list(_entries.items()) if not entry.engine._closed}


def known_schemes() -> list[str]:
    """The schemes of built-in engines and of installed entry points, sorted."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def _load(scheme: str) -> type[Engine]:
    if scheme in BUILT_IN:
        module, _, name = BUILT_IN[scheme].partition(":")
        return getattr(import_module(module), name)  # type: ignore[no-any-return]
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == scheme:
            cls = point.load()
            if not (isinstance(cls, type) and issubclass(cls, Engine)):
                raise TypeError(
                    f"entry point {scheme!r}: a subclass of shmcache.Engine wanted, {cls!r} found"
                )
            return cls
    raise ValueError(f"url: scheme {scheme!r} is unknown; known are: {', '.join(known_schemes())}")


def _describe(url: Url, options: dict[str, Any]) -> str:
    shown = {name: "***" if "password" in name else value for name, value in options.items()}
    return f"{url} with {shown}" if shown else str(url)
