"""The script functions of OpenSIPS's key-value interface, its engine_ids and return codes, over any engine.

    import shmcache
    from shmcache.opensips import cache_fetch, cache_store

    shmcache.open("posix:///local")
    cache_store("posix:local", "passwd_alice", "secret", 1200)
    code, password = cache_fetch("posix:local", "passwd_alice")

I1  No function raises: what goes wrong is logged (logger `shmcache`, once a call, without values) and is -1.
I2  Values are text, as in the script. Canonical decimal text (`0`, `-12`; no `007`, `+5`, `1.5`) in signed
    64 bits is stored as an int, so that it counts, and is given back as text.

Source: the functions of the tutorials "Memory Caching" and "Key-Value Interface" of OpenSIPS.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Callable
from typing import Any, Final

from . import registry
from .arguments import MISS
from .engine import Engine
from .errors import NotANumber, ShmCacheError

__all__ = [
    "ERROR",
    "NOT_A_NUMBER",
    "NOT_FOUND",
    "OK",
    "cache_add",
    "cache_counter_fetch",
    "cache_fetch",
    "cache_raw_query",
    "cache_remove",
    "cache_remove_chunk",
    "cache_store",
    "cache_sub",
]

OK: Final = 1
ERROR: Final = -1
"""Anything else: server down, engine not open, wrong argument, counter overflow."""
NOT_FOUND: Final = -2
NOT_A_NUMBER: Final = -3

_log = logging.getLogger("shmcache")
_DECIMAL = re.compile(r"0|-?[1-9][0-9]{0,18}")


def cache_store(engine_id: str, attr: str, value: str | bytes | int, timeout: float = 0) -> int:
    """Store a value.

    Args: engine_id: id of an open engine, such as `memcached:cluster1`. attr: the key. value: text, bytes or
    int. timeout: seconds, also as decimal text; 0 = for ever, whatever the engine's default.
    Returns: 1; -1 when it was not stored.
    """

    def store(engine: Engine) -> tuple[int, None]:
        if isinstance(value, bool) or not isinstance(value, (str, bytes, int)):
            raise TypeError(f"value: str, bytes or int wanted, {type(value).__name__} found")
        stored = _as_number(value) if isinstance(value, str) else value
        return (OK if engine.set(attr, stored, _seconds(timeout)) else ERROR), None

    return _call("cache_store", engine_id, store)[0]


def cache_fetch(engine_id: str, attr: str) -> tuple[int, str | bytes | None]:
    """`(1, value)`: text as stored, a number as its decimal text, bytes as they are; `(-2, None)` if absent;
    `(-1, None)` for a value that is none of these, and for errors."""

    def fetch(engine: Engine) -> tuple[int, Any]:
        value = engine.get(attr, MISS)
        if value is MISS:
            return NOT_FOUND, None
        if type(value) is int:
            return OK, str(value)
        if not isinstance(value, (str, bytes)):
            raise TypeError(f"value of {attr!r:.80}: text or a number wanted, {type(value).__name__} found")
        return OK, value

    return _call("cache_fetch", engine_id, fetch)


def cache_counter_fetch(engine_id: str, attr: str) -> tuple[int, int | None]:
    """`(1, number)`; `(-2, None)` if absent, `(-3, None)` for a value that is no number. Creates nothing."""

    def fetch(engine: Engine) -> tuple[int, Any]:
        number = engine.counter(attr)
        return (NOT_FOUND, None) if number is None else (OK, number)

    return _call("cache_counter_fetch", engine_id, fetch)


def cache_remove(engine_id: str, attr: str) -> int:
    """Remove: 1, also when there was nothing; -1 for errors."""

    def remove(engine: Engine) -> tuple[int, None]:
        engine.delete(attr)
        return OK, None

    return _call("cache_remove", engine_id, remove)[0]


def cache_remove_chunk(engine_id: str, glob: str) -> int:
    """Remove every attribute that matches the glob (as fnmatch.fnmatchcase): 1, also when none did; -1 for
    errors, one of which is an engine that cannot list its keys."""

    def remove(engine: Engine) -> tuple[int, None]:
        engine.delete_match(glob)
        return OK, None

    return _call("cache_remove_chunk", engine_id, remove)[0]


def cache_add(engine_id: str, attr: str, by: int, timeout: float = 0) -> tuple[int, int | None]:
    """Add to a counter, in one step for all processes and machines that use the engine.

    Args: by: int or decimal text, may be negative. timeout: seconds that a counter lives which this call
    creates; an existing one keeps its lifetime.
    Returns: `(1, new number)`, which is `by` if it was absent; `(-3, None)` if the stored value is no number;
    `(-1, None)` for errors, a result beyond signed 64 bits included. Except for `(1, ...)` nothing changed,
    unless a server died in mid-reply.
    """
    return _call("cache_add", engine_id, lambda engine: _count(engine.incr, attr, by, timeout))


def cache_sub(engine_id: str, attr: str, by: int, timeout: float = 0) -> tuple[int, int | None]:
    """Subtract from a counter; as `cache_add`. May go below zero; gives `-by` if it was absent."""
    return _call("cache_sub", engine_id, lambda engine: _count(engine.decr, attr, by, timeout))


def cache_raw_query(engine_id: str, query: str) -> tuple[int, list[list[Any]]]:
    """Send a command of the engine's own, split like a shell line: `cache_raw_query("redis:b", "KEYS *")`.

    Returns: `(1, rows)`: a row for each element of the answer, a column for each element of that; one row
    of one column for a single answer. Bytes that are UTF-8 are given as text. `(-2, [])` for no or an empty
    answer, `(-1, [])` for errors. Keys and values are as they lie in the server, prefix included.
    """

    def ask(engine: Engine) -> tuple[int, Any]:
        command, *args = shlex.split(query)
        answer = engine.raw(command, *args)
        error = engine._raw_error(answer)
        if error is not None:
            raise ShmCacheError(f"raw: an answer wanted, {error} found")
        rows = _rows(answer)
        return (OK if rows else NOT_FOUND), rows

    code, rows = _call("cache_raw_query", engine_id, ask)
    return code, rows or []


def _call(name: str, engine_id: str, work: Callable[[Engine], tuple[int, Any]]) -> tuple[int, Any]:
    try:
        return work(registry.engine(engine_id))
    except NotANumber:
        return NOT_A_NUMBER, None
    except Exception as error:
        _log.error("opensips: %s on engine %.80r: %s: %s", name, engine_id, type(error).__name__, error)
        return ERROR, None


def _count(call: Callable[..., int | None], attr: str, by: Any, timeout: Any) -> tuple[int, Any]:
    step = _as_number(by) if isinstance(by, str) else by
    if type(step) is not int:
        raise TypeError(f"by: int or decimal text wanted, {type(by).__name__} found")
    return OK, call(attr, step, ttl=_seconds(timeout))


def _as_number(text: str) -> int | str:
    """The int that canonical decimal text within 64 bits stands for; other text as it is."""
    if _DECIMAL.fullmatch(text):
        number = int(text)
        if -(2**63) <= number < 2**63:
            return number
    return text


def _seconds(timeout: Any) -> Any:
    return _as_number(timeout) if isinstance(timeout, str) else timeout


def _rows(answer: Any) -> list[list[Any]]:
    if answer is None:
        return []
    if isinstance(answer, dict):
        answer = [list(pair) for pair in answer.items()]
    if not isinstance(answer, (list, tuple, set)):
        return [[_text(answer)]]
    return [
        [_text(column) for column in row] if isinstance(row, (list, tuple)) else [_text(row)]
        for row in answer
    ]


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value
