"""Conformance: get_or_set, memoize, lock and namespace."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from .. import errors
from ..arguments import check_key
from ..engine import MISS, Capability, Engine
from .harness import Harness, in_processes, in_threads, interrupted, needs

__all__ = ["RecipeTests"]


class RecipeTests(Harness):
    """Section 3, what recipes make of an engine."""

    # -- get_or_set --

    @needs(Capability.LOCK)
    def test_get_or_set(self, engine: Engine) -> None:
        """get_or_set calls the factory if absent and stores what it gives, None included."""
        assert engine.get_or_set("k", lambda: None) is None
        assert engine.get("k", MISS) is None
        assert engine.get_or_set("k", lambda: 1) is None
        with pytest.raises(TypeError):
            engine.get_or_set("other", 5)  # type: ignore[arg-type]
        for lease in (0, -1, math.nan, math.inf):
            with pytest.raises(ValueError, match="lease"):
                engine.get_or_set("other", int, lease=lease)
        with pytest.raises(ValueError, match="grace"):
            engine.get_or_set("other", int, grace=-1)
        assert "other" not in engine

    @needs(Capability.LOCK)
    def test_get_or_set_threads(self, engine: Engine) -> None:
        """Of 8 threads that miss at once one calls the factory, and all get its value."""
        calls: list[int] = []

        def factory() -> str:
            calls.append(1)
            time.sleep(0.05)
            return "value"

        assert in_threads(8, lambda i: engine.get_or_set("k", factory)) == ["value"] * 8
        assert len(calls) == 1

    @needs(Capability.LOCK, Capability.COUNTER)
    def test_get_or_set_processes(self, engine: Engine) -> None:
        """Of 8 processes that miss at once one calls the factory; without SHARED each has its own."""

        def factory() -> int:
            time.sleep(0.1)
            return engine.incr("calls") or 0

        results = in_processes(8, lambda i: engine.get_or_set("k", factory))
        assert results == [1] * 8
        assert engine.counter("calls") == (None if self.lacks(engine, Capability.SHARED) else 1)

    @needs(Capability.LOCK)
    def test_factory_fails(self, engine: Engine) -> None:
        """An exception of the factory reaches its caller, stores nothing and lets the next waiter fill at
        once."""
        order: list[str] = []

        def work(i: int) -> str:
            def factory() -> str:
                order.append("called")
                time.sleep(0.05)
                if len(order) == 1:
                    raise ZeroDivisionError("first")
                return "second"

            try:
                return str(engine.get_or_set("k", factory, lease=60))
            except ZeroDivisionError as error:
                return str(error)

        assert sorted(in_threads(4, work)) == ["first", "second", "second", "second"]
        assert len(order) == 2

    @needs(Capability.LOCK)
    def test_filler_dies(self, engine: Engine) -> None:
        """If the process that fills is gone, the next caller fills."""
        with pytest.raises(AssertionError, match="status"):
            in_processes(1, lambda i: engine.get_or_set("k", lambda: os._exit(7), lease=1.0))
        assert engine.get_or_set("k", lambda: "mine") == "mine"

    @needs(Capability.LOCK)
    def test_lease_ends(self, engine: Engine) -> None:
        """A filler that outlives its lease is replaced, and its late value does not overwrite the newer
        one."""

        def slow() -> str:
            self.advance(engine, self.life + self.slack)
            assert in_threads(1, lambda i: engine.get_or_set("k", lambda: "new")) == ["new"]
            return "old"

        assert engine.get_or_set("k", slow, lease=self.life) == "old"
        assert engine.get("k") == "new"

    @needs(Capability.LOCK)
    def test_fill_interrupted(self, engine: Engine) -> None:
        """KeyboardInterrupt at whatever line of a fill leaves no lease behind."""
        for at in itertools.count(1):
            if not interrupted(lambda at=at: engine.get_or_set(f"k{at}", lambda: 1), at):  # type: ignore[misc]
                break
            home, key = engine._resolve(f"k{at}".encode())
            taken = home._lease_take(b"F:" + check_key(key), 1.0)
            assert isinstance(taken, tuple), at
            home._lease_release(b"F:" + check_key(key), taken[0])
        assert at > 20

    @needs(Capability.LOCK)
    def test_nested(self, engine: Engine) -> None:
        """A factory may call get_or_set for other keys, to any depth."""

        def make(n: int) -> Callable[[], int]:
            return lambda: n + (engine.get_or_set(f"k{n - 1}", make(n - 1)) if n else 0)

        assert engine.get_or_set("k20", make(20)) == 210

    @needs(Capability.LOCK, Capability.EXPIRE, Capability.GRACE)
    def test_grace(self, engine: Engine) -> None:
        """Between soft and hard deadline get_or_set gives the old value while one refills; for others it is
        absent."""
        grace = 4 * self.life
        assert engine.get_or_set("k", lambda: 1, self.life, grace=grace) == 1
        assert engine.get_or_set("k", lambda: 2, self.life, grace=grace) == 1
        assert engine.get("k") == 1
        self.expire(engine)
        assert engine.get("k", MISS) is MISS
        assert "k" not in engine
        assert engine.get_many(["k"]) == {}

        def refill() -> int:  # while it runs, others get the stale value at once
            others = in_threads(3, lambda i: engine.get_or_set("k", lambda: 0, self.life, grace=grace))
            assert others == [1, 1, 1]
            return 3

        assert engine.get_or_set("k", refill, self.life, grace=grace) == 3
        assert engine.get("k") == 3
        self.advance(engine, 5 * self.life + self.slack)
        assert engine.get_or_set("k", lambda: 4, self.life, grace=grace) == 4

    # -- memoize --

    @needs(Capability.LOCK)
    def test_memoize(self, engine: Engine) -> None:
        """memoize calls once per arguments, caches None, and tells arguments of different types apart."""
        calls: list[Any] = []

        @engine.memoize()
        def function(x: Any, y: int = 0) -> Any:
            """Doc."""
            calls.append(x)
            return None if y else [repr(x)]

        for x in (1, 1.0, "1", True, b"1", None, (1,), "None"):
            assert function(x) == function(x, 0) == function(x=x) == [repr(x)]
        assert len(calls) == 8
        assert function(1, 1) is None
        assert function(1, y=1) is None
        info = function.cache_info()
        assert (info.hits, info.misses) == (17, 9)
        assert function.invalidate(1, y=1) is True
        assert function.invalidate(1, 1) is False
        function(1, 1)
        assert len(calls) == 10
        function.cache_clear()
        function(1)
        assert len(calls) == 11
        assert function.__wrapped__(2) == ["2"]
        assert (function.__name__, function.__doc__) == ("function", "Doc.")

    @needs(Capability.LOCK)
    def test_memoize_key(self, engine: Engine) -> None:
        """key= makes the key from the arguments; without it an argument of no plain type is a TypeError."""
        thing = object()
        plain = engine.memoize()(lambda x: 1)
        with pytest.raises(TypeError, match="key="):
            plain(thing)
        keyed = engine.memoize(key=lambda x: str(type(x)))(lambda x: id(x))
        assert keyed(thing) == keyed(object()) == id(thing)

    @needs(Capability.LOCK)
    def test_memoize_async(self, engine: Engine) -> None:
        """A coroutine function stays one; of several tasks that miss at once one runs it, and the loop goes
        on."""
        calls: list[int] = []
        ticks: list[int] = []

        @engine.memoize()
        async def function(x: int) -> int:
            calls.append(x)
            for _ in range(2000):
                await asyncio.sleep(0.005)
                if len(ticks) > 2:
                    break
            return x

        async def tick() -> None:
            while True:
                ticks.append(1)
                await asyncio.sleep(0.005)

        async def main() -> list[int]:
            ticker = asyncio.ensure_future(tick())
            try:
                return list(await asyncio.gather(*(function(5) for _ in range(8))))
            finally:
                ticker.cancel()

        assert asyncio.iscoroutinefunction(function)
        assert asyncio.run(main()) == [5] * 8
        assert calls == [5]
        assert len(ticks) > 2

    @needs(Capability.LOCK)
    def test_memoize_processes(self, engine: Engine) -> None:
        """A result computed by one process is a hit in its children: keys are the same in both."""
        function = engine.memoize()(lambda *args: os.getpid())
        first = function("a", 1.5, ("x", None))
        assert in_processes(2, lambda i: function("a", 1.5, ("x", None))) == [first] * 2

    # -- lock --

    @needs(Capability.LOCK)
    def test_lock(self, engine: Engine) -> None:
        """A lock admits one holder, has a growing token, and is no key."""
        with engine.lock("name") as lock:
            first = lock.token
            for name in ("name", b"name"):
                with pytest.raises(errors.LockTimeout, match="name"), engine.lock(name, timeout=0.02):
                    pass
            with engine.lock("other", timeout=0):
                pass
            assert "name" not in engine
        with engine.lock("name", timeout=0) as lock:
            assert lock.token is not None
            assert first is not None
            assert lock.token > first
        assert lock.token is None

    @needs(Capability.LOCK)
    def test_lock_excludes(self, engine: Engine) -> None:
        """Threads under one lock do not meet, and each gets its turn."""
        inside: list[int] = []

        def work(i: int) -> None:
            for _ in range(5):
                with engine.lock("name"):
                    inside.append(i)
                    assert len(inside) == 1
                    inside.pop()

        in_threads(4, work)

    @needs(Capability.LOCK)
    def test_lock_lease(self, engine: Engine) -> None:
        """After its lease a lock is anyone's; its late holder neither extends nor releases the new one's."""
        with engine.lock("name", lease=self.life) as late:
            assert late.extend(2 * self.life) is True
            self.advance(engine, 1.5 * self.life)
            with pytest.raises(errors.LockTimeout), engine.lock("name", timeout=0):
                pass
            self.advance(engine, self.life + self.slack)
            new = engine.lock("name", timeout=0)
            new.__enter__()
            assert late.extend() is False
        with pytest.raises(errors.LockTimeout), engine.lock("name", timeout=0):
            pass
        new.__exit__(None, None, None)
        with engine.lock("name", timeout=0):
            pass

    @needs(Capability.LOCK)
    def test_lock_interrupted(self, engine: Engine) -> None:
        """KeyboardInterrupt at whatever line of entering a lock leaves it free."""
        lock = engine.lock("name")
        for at in itertools.count(1):
            if not interrupted(lock.__enter__, at):
                break
            assert lock.token is None
            with engine.lock("name", timeout=0):
                pass
        assert at > 10
        lock.__exit__(None, None, None)

    @needs(Capability.LOCK)
    def test_lock_and_fork(self, engine: Engine) -> None:
        """A forked child does not hold its parent's lock, and does not release it."""
        with engine.lock("name") as lock:

            def child(i: int) -> bool:
                extended = lock.extend()
                lock.__exit__(None, None, None)
                return extended

            assert in_processes(1, child) == [False]
            with pytest.raises(errors.LockTimeout), engine.lock("name", timeout=0):
                pass

    @needs(Capability.LOCK)
    def test_lock_arguments(self, engine: Engine) -> None:
        """A bad lease, timeout or name is refused before anything is touched."""
        for bad in (0, -1, math.nan, math.inf):
            with pytest.raises(ValueError, match="lease"):
                engine.lock("name", lease=bad)
        for bad in (-1, math.nan, math.inf):
            with pytest.raises(ValueError, match="timeout"):
                engine.lock("name", timeout=bad)
        with pytest.raises(TypeError, match="lease"):
            engine.lock("name", lease=True)

    # -- namespace --

    def test_namespace(self, engine: Engine) -> None:
        """A namespace has keys of its own, apart from its parent, from others, and from those inside it."""
        first, second = engine.namespace("first"), engine.namespace("second")
        inner = first.namespace("second")
        spaces = [engine, first, second, inner]
        for i, space in enumerate(spaces):
            assert space.get("k", MISS) is MISS
            assert space.set("k", i)
        assert [space.get("k") for space in spaces] == [0, 1, 2, 3]
        assert [engine.namespace("first").get("k"), first.namespace("second")["k"]] == [1, 3]
        first.clear()
        assert [space.get("k") for space in spaces] == [0, None, 2, None]
        assert first.add("k", 5)
        assert second.delete("k")
        assert [space.get("k") for space in spaces] == [0, 5, None, None]
        for name, error in (("", ValueError), (b"first", TypeError), (None, TypeError)):
            with pytest.raises(error):
                engine.namespace(name)  # type: ignore[arg-type]

    @needs(Capability.ITERATE)
    def test_namespace_iteration(self, engine: Engine) -> None:
        """len, keys, items and delete_match of a namespace see its items alone, under their own keys."""
        space = engine.namespace("space")
        assert len(space) == 0
        engine.set("a", 0)
        space.update({"a": 1, b"\xff": 2, "b": 3})
        assert dict(space.items()) == {"a": 1, b"\xff": 2, "b": 3}
        assert space.get_many(["a", "absent"]) == {"a": 1}
        assert sorted(space.keys("[ab]")) == ["a", "b"]
        assert space.delete_match("[ab]") == 2
        assert len(space) == 1
        assert engine.get("a") == 0

    def test_namespace_generation(self, engine: Engine) -> None:
        """Losing the generation empties a namespace; what was stored before never comes back."""
        space = engine.namespace("space")
        space.set("k", "old")
        reserved = b"\xffGspace"
        generation = engine.get(reserved)
        assert engine.delete(reserved)
        assert space.get("k", MISS) is MISS
        space.set("other", 1)
        assert engine.get(reserved) != generation
        assert space.get("k", MISS) is MISS

    @needs(Capability.LOCK)
    def test_namespace_recipes(self, engine: Engine) -> None:
        """Locks and fills of namespaces are apart; what was computed from before a clear is not seen after
        it."""
        space = engine.namespace("space")
        with engine.lock("name"), space.lock("name", timeout=0):
            space.clear()
            with pytest.raises(errors.LockTimeout), space.lock("name", timeout=0):
                pass
        assert space.get_or_set("k", lambda: space.clear() or 1) == 1  # type: ignore[func-returns-value]
        assert space.get("k", MISS) is MISS
        assert space.get_or_set("k", lambda: 2) == 2
        assert space.get("k") == 2

    def test_namespace_threads(self, engine: Engine) -> None:
        """Threads that use a new namespace at once agree on its generation."""
        start = threading.Barrier(8)

        def work(i: int) -> None:
            space = engine.namespace("space")
            start.wait()
            space.set(str(i), i)

        in_threads(8, work)
        assert engine.namespace("space").get_many(map(str, range(8))) == {str(i): i for i in range(8)}
