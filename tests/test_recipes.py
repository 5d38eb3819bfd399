"""shmcache.recipes: what the conformance suite does not say of every engine."""

import asyncio
import enum
import functools
import os
import subprocess
import sys
import threading
import time
from collections import namedtuple
from datetime import date, datetime, timedelta
from decimal import Decimal
from uuid import UUID

import pytest

import shmcache
from shmcache import Capability, LockTimeout, NotSupported
from shmcache.engines.memory import MemoryEngine
from shmcache.recipes import _encode
from shmcache.testing import in_processes, in_threads


@pytest.fixture
def cache():
    with MemoryEngine() as engine:
        engine._set_clock(0)
        yield engine


# -- get_or_set --


def test_full_lease_table():
    """With the lease table full the factory is called without a lease, by each caller."""
    with MemoryEngine(max_leases=0) as cache:
        calls = []
        assert cache.get_or_set("k", lambda: calls.append(1) or 5) == 5
        assert cache.get_or_set("k", lambda: calls.append(1) or 6) == 5
        assert calls == [1]
        with pytest.raises(LockTimeout, match="lease table"), cache.lock("name", timeout=0.01):
            pass


def test_one_miss_per_call(cache):
    """A get_or_set that fills counts as one miss, and one that finds as one hit."""
    cache.get_or_set("k", lambda: 1)
    assert (cache.stats().hits, cache.stats().misses) == (0, 1)
    cache.get_or_set("k", lambda: 1)
    assert (cache.stats().hits, cache.stats().misses) == (1, 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, LockTimeout])
def test_any_exception_frees_the_lease(cache, error):
    """Whatever leaves the factory reaches the caller as it is, and the lease is free."""

    def factory():
        raise error

    with pytest.raises(error):
        cache.get_or_set("k", factory)
    assert cache.get_or_set("k", lambda: 1) == 1
    assert cache.stats()["leases"] == 0


def test_unstorable_result(cache):
    """A result the codec refuses raises, stores nothing and frees the lease."""
    with pytest.raises(TypeError):
        cache.get_or_set("k", object)
    assert cache.stats()["leases"] == 0
    assert "k" not in cache


def test_fork_inside_the_factory(cache):
    """A child forked inside a factory does not give its parent's lease back."""

    def factory():
        in_processes(1, lambda i: cache._lease_release(b"F:other", 1))
        assert cache._lease_take(b"F:k", 1.0) is False
        return 1

    assert cache.get_or_set("k", factory) == 1

    def leaves_in_child():
        pid = os.fork()
        if pid == 0:
            return "child"
        os.waitpid(pid, 0)
        return "parent"

    parent = os.getpid()
    value = cache.get_or_set("fork", leaves_in_child)
    if os.getpid() != parent:
        os._exit(0)
    assert value == "parent"


def test_default_ttl():
    """get_or_set without a ttl takes the engine's default_ttl."""
    with MemoryEngine(default_ttl=10) as cache:
        cache._set_clock(0)
        cache.get_or_set("a", lambda: 1)
        cache.get_or_set("b", lambda: 1, 0)
        cache.get_or_set("c", lambda: 1, grace=10)
        assert [cache.ttl(key) for key in "abc"] == [10, float("inf"), 10]
        assert cache._get_grace("c") == (1, True)
        cache._set_clock(10_000)
        assert cache._get_grace("c") == (1, False)


def test_needs_capabilities():
    """Without LOCK a miss raises NotSupported, without GRACE a grace does."""

    class Plain(MemoryEngine):
        capabilities = MemoryEngine.capabilities & ~(Capability.LOCK | Capability.GRACE)
        _lease_take = shmcache.Engine._lease_take
        _get_grace = shmcache.Engine._get_grace

    with Plain() as cache:
        with pytest.raises(NotSupported, match="LOCK"):
            cache.get_or_set("k", lambda: 1)
        with pytest.raises(NotSupported, match="LOCK"):
            cache.lock("k")
        with pytest.raises(NotSupported, match="GRACE"):
            cache.get_or_set("k", lambda: 1, 5, grace=5)


def test_waiter_takes_over(cache):
    """When a filler's lease ends, one of its waiters fills."""
    entered, leave = threading.Event(), threading.Event()

    def stuck():
        entered.set()
        leave.wait()
        return "late"

    thread = threading.Thread(target=lambda: cache.get_or_set("k", stuck, lease=10))
    thread.start()
    entered.wait()
    cache._set_clock(10_000)
    calls = []
    assert in_threads(4, lambda i: cache.get_or_set("k", lambda: calls.append(i) or "new")) == ["new"] * 4
    assert len(calls) == 1
    leave.set()
    thread.join()
    assert cache.get("k") == "new"


# -- memoize --

Point = namedtuple("Point", "x y")


class Colour(enum.Enum):
    RED = 1


class Shade(enum.IntEnum):
    RED = 1


DIFFERENT = [
    None, True, False, 0, 1, -1, 0.0, -0.0, 1.0, 1j, "", "1", "None", b"", b"1", (), (1,), (1.0,), ("1",), [],
    [1], {}, {1: 1}, {1: "1"}, set(), frozenset(), {1}, frozenset({1}), (1, 2), ((1, 2),), ((1,), 2), "(1,)",
    "a;y=2", Point(1, 2), Colour.RED, Shade.RED, Decimal(1), Decimal("1.0"), UUID(int=1), date(2024, 1, 1),
    datetime(2024, 1, 1), timedelta(1), "\ud800", 10**5000, "x" * 500, "x" * 501,
]  # fmt: skip


def test_arguments_are_told_apart(cache):
    """Arguments that differ in value or type make different keys."""
    function = cache.memoize()(lambda x, y=2: None)
    keys = [function._entry((value,), {}) for value in DIFFERENT]
    assert len(set(keys)) == len(keys)


def test_equal_calls_are_one(cache):
    """Calls that bind the same arguments make one key; sets and dicts count without their order."""
    function = cache.memoize()(lambda x, y=2, *rest, z=3, **more: None)
    wanted = function._entry((1,), {})
    calls = [((1, 2), {}), ((), {"x": 1}), ((), {"y": 2, "x": 1}), ((1,), {"z": 3}), ((1, 2), {"z": 3})]
    assert {function._entry(*call) for call in calls} == {wanted}
    assert function._entry((1, 2, 3), {}) != wanted
    assert function._entry((1,), {"a": 1, "b": 2}) == function._entry((1,), {"b": 2, "a": 1})
    assert _encode({"a": 1, "b": 2}) == _encode({"b": 2, "a": 1})
    with pytest.raises(TypeError):
        function._entry((), {})


def test_keys_are_stable():
    """Keys are the same in another process with another hash seed."""
    code = (
        "from shmcache.recipes import _encode; from decimal import Decimal;"
        "print(_encode(({'a', 'b', 'c', 1, 2.5}, {'x': {'p', 'q'}, 'y': b'1'}, Decimal('1.50'), None)))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(seen) == 1


def test_functions_are_apart(cache):
    """Two functions do not share results, two of one key= name do, and cache_clear reaches one only."""

    @cache.memoize()
    def first(x):
        return "first"

    @cache.memoize()
    def second(x):
        return "second"

    assert [first(1), second(1)] == ["first", "second"]
    second.cache_clear()
    assert first.cache_info().currsize == 1
    assert second.cache_info().currsize == 0
    one = cache.memoize(key="shared")(lambda x: 1)
    two = cache.memoize(key="shared")(lambda x: 2)
    assert [one(5), two(5)] == [1, 1]


def test_methods(cache):
    """A method is memoized by a key of its instance."""

    class User:
        def __init__(self, name):
            self.name = name

        @cache.memoize(key=lambda self, x: f"{self.name}:{x}")
        def greet(self, x):
            return f"{self.name} {x}"

    assert User("ann").greet(1) == "ann 1"
    assert User("bob").greet(1) == "bob 1"
    assert User.greet.cache_info().misses == 2
    assert User("ann").greet(1) == "ann 1"
    assert User.greet.cache_info().hits == 1
    with pytest.raises(TypeError, match="key="):
        cache.memoize()(User.greet.__wrapped__)(User("ann"), 1)


def test_memoize_exceptions(cache):
    """An exception is not cached and counts as a miss."""
    function = cache.memoize()(lambda x: 1 // x)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            function(0)
    assert function.cache_info()[:2] == (0, 2)


def test_memoize_lifetime(cache):
    """Results live for ttl, and with grace the stale one serves others while one refills."""
    calls = []

    @cache.memoize(10, grace=20)
    def function():
        calls.append(1)
        if len(calls) == 2:
            assert function() == 1
        return len(calls)

    assert function() == 1
    cache._set_clock(10_000)
    assert function() == 2
    cache._set_clock(40_000)
    assert function() == 3
    for bad in ({"ttl": -1}, {"grace": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            cache.memoize(**bad)(function)
    with pytest.raises(TypeError, match="key"):
        cache.memoize(key=5)(function)


def test_memoize_async_failure(cache):
    """An exception or a cancellation inside a coroutine frees the lease; a waiting task takes over."""
    calls = []

    @cache.memoize()
    async def function(x):
        calls.append(x)
        await asyncio.sleep(0.01 if len(calls) > 2 else 30)
        return x

    async def main():
        first = asyncio.ensure_future(function(1))
        await asyncio.sleep(0.005)
        waiting = asyncio.ensure_future(function(1))
        await asyncio.sleep(0.005)
        assert len(calls) == 1
        waiting.cancel()
        second = asyncio.ensure_future(function(1))
        await asyncio.sleep(0.005)
        first.cancel()
        while len(calls) < 2:
            await asyncio.sleep(0.005)
        second.cancel()
        return await function(1)

    assert asyncio.run(main()) == 1
    assert calls == [1, 1, 1]
    assert cache.stats()["leases"] == 0


def test_memoize_partial(cache):
    """A callable without a name of its own needs a str as key."""
    function = functools.partial(int, base=16)
    with pytest.raises(TypeError, match="key"):
        cache.memoize()(function)
    assert cache.memoize(key="hex")(function)("ff") == 255
    with pytest.raises(TypeError, match="function"):
        cache.memoize()(5)


def test_lambdas_are_apart(cache):
    """Two lambdas on one line are two functions."""
    one, two = cache.memoize()(lambda x: 1), cache.memoize()(lambda x: 2)
    assert [one(0), two(0)] == [1, 2]


# -- lock --


def test_lock_object_is_shared(cache):
    """Threads may share one Lock object; each leaves what it entered."""
    lock = cache.lock("name")
    inside = []

    def work(i):
        for _ in range(5):
            with lock:
                inside.append(i)
                assert len(inside) == 1
                inside.pop()

    in_threads(4, work)
    assert lock.token is None


def test_late_holder_of_a_shared_object(cache):
    """A thread whose lease ended does not release what another thread took through the same object."""
    lock = cache.lock("name", lease=10)
    lock.__enter__()
    cache._set_clock(10_000)
    entered, leave = threading.Event(), threading.Event()

    def other():
        with lock:
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait()
    lock.__exit__(None, None, None)
    with pytest.raises(LockTimeout), cache.lock("name", timeout=0):
        pass
    leave.set()
    thread.join()
    with cache.lock("name", timeout=0):
        pass


def test_lock_not_reentrant(cache):
    """Entering a held lock again waits like anybody else."""
    with cache.lock("name", timeout=0.01) as lock, pytest.raises(LockTimeout, match="held by another"):
        lock.__enter__()
    assert cache.stats()["leases"] == 0


def test_lock_extend(cache):
    """extend starts the lease anew from now, with its first length or another."""
    with cache.lock("name", lease=10) as lock:
        cache._set_clock(9_000)
        assert lock.extend() is True
        cache._set_clock(18_999)
        assert lock.extend(1) is True
        cache._set_clock(19_999)
        assert lock.extend() is False
    assert lock.extend() is False
    assert "name" in repr(lock)


def test_waiter_gets_the_lock(cache):
    """A waiter is let in once the holder leaves."""
    lock = cache.lock("name")
    lock.__enter__()
    thread = threading.Timer(0.02, lock.__exit__, (None, None, None))
    thread.start()
    started = time.monotonic()
    with cache.lock("name", timeout=30):
        assert time.monotonic() - started >= 0.01
    thread.join()
