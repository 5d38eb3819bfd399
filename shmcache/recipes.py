"""get_or_set and memoize (lock is in lock.py, namespace in namespace.py): written once, over the primitives of any
engine.

I1  An exception, also one from outside such as KeyboardInterrupt, leaves no lease behind, at whatever line of
    a fill it arrives (lock.py).
I2  What runs while a lease is held is the caller's factory alone; no guard of the engine is held meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import inspect
import os
import threading
import zlib
from collections.abc import Callable, Generator, Iterator
from contextvars import ContextVar
from datetime import date, timedelta
from datetime import time as daytime
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from typing import Any, NamedTuple
from uuid import UUID

from .arguments import DEFAULT, MISS, Key, Ttl, check_key, lifetime
from .engine import Capability, Engine
from .errors import EngineDown, ShmCacheError
from .lock import POLL, Lease, Lock, seconds_of
from .namespace import Namespace

__all__ = ["CacheInfo", "Lock", "Memoized", "Namespace", "get_or_set", "memoize"]

_FILL, _WAIT, _DONE = "fill", "wait", "done"


# -- get_or_set --


def get_or_set(
    engine: Engine,
    key: Key,
    factory: Callable[[], Any],
    ttl: Ttl = DEFAULT,
    *,
    lease: float = 30.0,
    grace: float = 0.0,
) -> Any:
    """See Engine.get_or_set. The filler gets factory's own object, everybody else what the codec makes of
    it."""
    if not callable(factory):
        raise TypeError(f"factory: a callable wanted, {type(factory).__name__} found")
    home, steps = _begin(engine, key, ttl, lease, grace)
    with contextlib.closing(steps):
        step, name, answer = _next(steps)
        while step is not _DONE:
            _refuse_own_key(home, name)
            if step is _WAIT:
                with _without_server(home):
                    home._lease_wait(name, POLL)
                step, name, answer = _next(steps)
                continue
            mark = _filling.set(_filling.get() | {(id(home), name)})
            try:
                value = factory()
            finally:
                _filling.reset(mark)
            step, name, answer = _next(steps, (value,))
        return answer


async def _get_or_set_async(
    engine: Engine, key: Key, factory: Callable[[], Any], ttl: Ttl, lease: float, grace: float
) -> Any:
    """get_or_set for a coroutine function: waits by asyncio.sleep, 1 to 50 ms, and lets the loop run."""
    home, steps = _begin(engine, key, ttl, lease, grace)
    pause = 0.001
    with contextlib.closing(steps):
        step, name, answer = _next(steps)
        while step is not _DONE:
            _refuse_own_key(home, name)
            if step is _WAIT:
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.05)
                step, name, answer = _next(steps)
                continue
            mark = _filling.set(_filling.get() | {(id(home), name)})
            try:
                value = await factory()
            finally:
                _filling.reset(mark)
            step, name, answer = _next(steps, (value,))
        return answer


_filling: ContextVar[frozenset[tuple[int, bytes]]] = ContextVar("shmcache filling", default=frozenset())
"""Leases this thread or task holds as a filler: asking for one of them again would wait for oneself."""


def _refuse_own_key(home: Engine, name: bytes) -> None:
    if (id(home), name) in _filling.get():
        raise ShmCacheError("get_or_set: a factory that asks for other keys wanted, one that asks for its own found")


@contextlib.contextmanager
def _without_server(engine: Engine) -> Iterator[None]:
    """What is done inside may be left undone where the server is down and on_down=miss."""
    try:
        yield
    except EngineDown:
        if not engine._miss:
            raise


_Steps = Generator[tuple[str, bytes], "tuple[Any] | None", Any]


def _next(steps: _Steps, filled: tuple[Any] | None = None) -> tuple[str, bytes, Any]:
    """What to do next, the lease's name, and, after _DONE, the answer."""
    try:
        return *steps.send(filled), None
    except StopIteration as done:
        return _DONE, b"", done.value


def _begin(engine: Engine, key: Key, ttl: Ttl, lease: float, grace: float) -> tuple[Engine, _Steps]:
    left = lifetime(ttl, None, engine.default_ttl)
    lease, grace = seconds_of("lease", lease, 1), seconds_of("grace", grace, 0)
    data = check_key(key)
    home, full = engine._resolve(data)
    return home, _steps(home, full, left, lease, grace)


def _steps(engine: Engine, key: Key, left: float | None, lease: float, grace: float) -> _Steps:
    """Yields what to do next, (_WAIT, lease name) or (_FILL, ...), is sent `(value,)`, returns the answer.

    Closing it after a _FILL gives the lease back.
    """
    name = b"F:" + check_key(key)

    def look(read: Callable[[Key], Any]) -> tuple[Any, bool] | None:
        if grace > 0 and left is not None:
            return engine._get_grace(key)
        value = read(key)
        return None if value is MISS else (value, True)

    def store(value: Any) -> None:
        if grace > 0 and left is not None:
            engine._set_grace(key, value, left, grace)
        else:
            engine.set(key, value, left)

    found = look(lambda key: engine.get(key, MISS))  # later looks leave hits and misses alone
    while True:
        if found is not None and found[1]:
            return found[0]
        held = Lease(engine, name)
        try:
            try:
                taken: tuple[int, int] | bool | None = None  # a full table, no server: filled without a lease
                with _without_server(engine):
                    taken = held.take(lease)
                if taken is not False:
                    if taken:
                        found = look(engine._peek)  # the filler before us may have finished since our look
                        if found is not None and found[1]:
                            return found[0]
                    filled = yield _FILL, name
                    assert filled is not None
                    ours = not taken
                    with _without_server(engine):
                        ours = ours or held.extend(lease)
                    if ours:
                        store(filled[0])
                    else:  # our lease ended, somebody else fills or has filled: no older value over a newer one
                        engine.add(key, filled[0], left)
                    return filled[0]
            finally:
                with contextlib.suppress(EngineDown):  # it ends by itself
                    held.release()
        except BaseException:
            with contextlib.suppress(EngineDown):  # again, for what interrupted the first
                held.release()
            raise
        if found is not None:
            return found[0]
        yield _WAIT, name
        found = look(engine._peek)


# -- memoize --


class CacheInfo(NamedTuple):
    """hits and misses of this process since decoration; currsize: live results in the cache, counted by a
    scan."""

    hits: int
    misses: int
    maxsize: None
    currsize: int | None


class Memoized:
    """A function whose results are cached; what `memoize` returns. Methods of a class need `key=`."""

    __name__: str
    __qualname__: str
    __wrapped__: Callable[..., Any]

    def __init__(
        self,
        engine: Engine,
        function: Callable[..., Any],
        ttl: Ttl,
        key: Callable[..., Key] | str | None,
        grace: float,
    ) -> None:
        if not callable(function):
            raise TypeError(f"memoize: a function wanted, {type(function).__name__} found")
        lifetime(ttl)
        if key is not None and not isinstance(key, str) and not callable(key):
            raise TypeError(f"key: a callable or str wanted, {type(key).__name__} found")
        functools.update_wrapper(self, function)
        self.__wrapped__ = function
        self._function = function
        self._name = key if isinstance(key, str) else _name(function)
        self._view = engine.namespace("memoize:" + self._name)
        self._key = key if callable(key) else None
        try:
            self._signature = inspect.signature(function)
        except ValueError:  # some built-in callables have none: their arguments count as written
            self._signature = inspect.signature(lambda *args, **kwargs: None)
        parameters = self._signature.parameters
        plain = all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters.values())
        self._plain = tuple(parameters) if plain else None
        self._ttl, self._grace = ttl, seconds_of("grace", grace, 0)
        self._async = inspect.iscoroutinefunction(function)
        self._hits = self._misses = 0
        if self._async:
            _mark_coroutine(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = self._entry(args, kwargs)
        return (self._call_async if self._async else self._call)(key, args, kwargs)

    def _call(self, key: bytes, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ran = False

        def factory() -> Any:
            nonlocal ran
            ran = True
            self._count(ran)
            return self._function(*args, **kwargs)

        value = get_or_set(self._view, key, factory, self._ttl, grace=self._grace)
        if not ran:
            self._count(ran)
        return value

    async def _call_async(self, key: bytes, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ran = False

        async def factory() -> Any:
            nonlocal ran
            ran = True
            self._count(ran)
            return await self._function(*args, **kwargs)

        value = await _get_or_set_async(self._view, key, factory, self._ttl, 30.0, self._grace)
        if not ran:
            self._count(ran)
        return value

    def _count(self, ran: bool) -> None:
        with _counting:
            if ran:
                self._misses += 1
            else:
                self._hits += 1

    def _entry(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        """The key of a call inside the function's namespace; equal for calls that bind the same arguments."""
        if self._key is not None:
            return check_key(self._key(*args, **kwargs))
        plain = self._plain
        if plain is not None and not kwargs and len(args) == len(plain):
            bound: Any = zip(plain, args, strict=True)  # what bind would say, in a tenth
        else:
            call = self._signature.bind(*args, **kwargs)
            call.apply_defaults()
            bound = call.arguments.items()
        text = "".join([f"{name}={_encode(value)};" for name, value in bound]).encode(
            "utf-8", "surrogatepass"
        )
        if len(text) <= 100:
            return b"=" + text
        return b"#" + hashlib.blake2b(text, digest_size=32).hexdigest().encode()

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def cache_info(self) -> CacheInfo:
        """Hits, misses (calls in which the function ran), None, and the number of live results."""
        size = len(self._view) if self._view._can(Capability.ITERATE) else None
        return CacheInfo(self._hits, self._misses, None, size)

    def invalidate(self, *args: Any, **kwargs: Any) -> bool:
        """Forget the result for these arguments: True, or False if there was none."""
        return self._view.delete(self._entry(args, kwargs))

    def cache_clear(self) -> None:
        """Forget all results of this function, for all processes, in O(1)."""
        self._view.clear()


def _name(function: Callable[..., Any]) -> str:
    """Module and qualified name; of a lambda also its line and what tells it from others there."""
    name = getattr(function, "__qualname__", None)
    if name is None:
        raise TypeError(f"memoize: key= as a str wanted, a {type(function).__name__} without a name found")
    code = getattr(function, "__code__", None)
    if name.endswith("<lambda>") and code is not None:
        plain = [const for const in code.co_consts if isinstance(const, (bool, int, float, str, bytes))]
        name += (
            f":{code.co_firstlineno}:{zlib.crc32(code.co_code + repr((plain, code.co_names)).encode()):08x}"
        )
    return f"{function.__module__}.{name}"


def _mark_coroutine(wrapper: Any) -> None:
    """Let asyncio and inspect take the wrapper for a coroutine function, where the interpreter has a mark for
    that."""
    mark = getattr(inspect, "markcoroutinefunction", None)
    if mark is not None:
        mark(wrapper)
    else:
        wrapper._is_coroutine = getattr(asyncio.coroutines, "_is_coroutine", None)


_counting = threading.Lock()


def _new_counting() -> None:
    global _counting
    _counting = threading.Lock()


os.register_at_fork(after_in_child=_new_counting)


def memoize(
    engine: Engine, ttl: Ttl = DEFAULT, *, key: Callable[..., Key] | str | None = None, grace: float = 0.0
) -> Callable[[Callable[..., Any]], Memoized]:
    """Decorator that caches results by arguments, for all processes that decorate a function of the same
    name.

    Args: ttl, grace: as in get_or_set. key: a callable that makes the key (str or bytes), within the
    function's own namespace, from the call's arguments; or a str that stands for the function's module and
    qualified name. Without a callable, arguments are told apart by type and value: None, bool, int, float,
    complex, str, bytes, Decimal, Fraction, UUID, date, time, datetime, timedelta, Enum, and tuple, list,
    dict, set, frozenset of these.
    Returns: a callable with cache_info, invalidate, cache_clear and __wrapped__; one caller at a time
    computes, as in get_or_set; None is cached, exceptions are not. A coroutine function stays one: waiting
    sleeps in the event loop, and the engine is called from it.
    Raises: at the call, TypeError for an argument that cannot be told apart so (give `key`), and what
    get_or_set raises.
    """
    return functools.partial(_memoized, engine, ttl, key, grace)


def _memoized(engine: Engine, ttl: Ttl, key: Any, grace: float, function: Callable[..., Any]) -> Memoized:
    return Memoized(engine, function, ttl, key, grace)


_PLAIN = (date, daytime, timedelta, Decimal, Fraction, UUID)


def _encode(value: Any) -> str:
    """Text that is the same in every process and differs between values and between their types."""
    kind = type(value)
    if value is None or kind in (bool, int, float, complex, str, bytes):
        return hex(value) if kind is int else repr(value)  # hex: no limit of digits
    if kind in (tuple, list):
        return f"{kind.__name__}({','.join(map(_encode, value))})"
    if kind is dict:
        return f"dict({','.join(sorted(f'{_encode(k)}:{_encode(v)}' for k, v in value.items()))})"
    if isinstance(value, tuple):  # a named tuple
        return f"{kind.__module__}.{kind.__qualname__}({','.join(map(_encode, value))})"
    if kind in (set, frozenset):
        return f"{kind.__name__}({','.join(sorted(map(_encode, value)))})"
    if isinstance(value, Enum):
        return f"{kind.__module__}.{kind.__qualname__}.{value.name}"
    if isinstance(value, _PLAIN):
        return f"{kind.__module__}.{kind.__qualname__}({value!r})"
    raise TypeError(f"memoize: an argument of a plain type wanted, {kind.__qualname__} found (give key=)")
