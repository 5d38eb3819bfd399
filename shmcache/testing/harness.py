"""Hooks and helpers of the conformance suite.

I1  What a test of time waits for is `advance`: the engine's own clock where it can be set, else a sleep.
"""

from __future__ import annotations

import functools
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from .. import errors, lock, recipes
from ..engine import Capability, Engine

__all__ = ["Harness", "in_processes", "in_threads", "interrupted", "needs"]

_PROBES: dict[Capability, Callable[[Engine], Any]] = {
    Capability.EXPIRE: lambda e: e.set("k", 1, 5),
    Capability.COUNTER: lambda e: e.incr("k"),
    Capability.CAS: lambda e: e.gets("k"),
    Capability.TTL: lambda e: e.ttl("k"),
    Capability.TOUCH: lambda e: e.touch("k", 5),
    Capability.APPEND: lambda e: e.append("k", b""),
    Capability.ITERATE: lambda e: list(e.keys()),
    Capability.LOCK: lambda e: e.lock("k").__enter__(),
    Capability.GRACE: lambda e: e.get_or_set("k", int, 5, grace=5),
}


def needs(*flags: Capability) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a test of a capability: an engine without it has to raise NotSupported, and no more is asked of
    it."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(self: Any, *args: Any, engine: Engine, **kwargs: Any) -> None:
            missing = [flag for flag in flags if self.lacks(engine, flag)]
            for flag in missing:
                with pytest.raises(errors.NotSupported):
                    _PROBES[flag](engine)
            if not missing:
                test(self, *args, engine=engine, **kwargs)

        return run

    return decorate


def in_threads(count: int, work: Callable[[int], Any], limit: float = 60.0) -> list[Any]:
    """`work(i)` in `count` threads at once; the results, or the first exception. AssertionError after `limit`
    seconds."""
    results: list[Any] = [None] * count
    failures: list[BaseException] = []
    start = threading.Barrier(count)

    def run(i: int) -> None:
        try:
            start.wait()
            results[i] = work(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + limit
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    if failures:
        raise failures[0]
    assert not any(thread.is_alive() for thread in threads), f"work done within {limit} seconds wanted"
    return results


def in_processes(count: int, work: Callable[[int], Any], limit: int = 60) -> list[Any]:
    """`work(i)` in `count` children forked off here; the results, pickled back. A child is killed after
    `limit` seconds."""
    go_read, go_write = os.pipe()
    children = []
    for i in range(count):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(limit)
                os.close(go_write)
                os.read(go_read, 1)  # returns at the end of file: all start at once
                try:
                    answer: tuple[bool, Any] = (True, work(i))
                except BaseException as error:
                    answer = (False, repr(error))
                with open(write, "wb") as out:
                    pickle.dump(answer, out)
                code = 0
            finally:
                os._exit(code)
        os.close(write)
        children.append((pid, read))
    os.close(go_read)
    os.close(go_write)
    results: list[Any] = []
    failures: list[Any] = []
    for pid, read in children:
        with open(read, "rb") as source:
            data = source.read()
        status = os.waitpid(pid, 0)[1]
        good, found = pickle.loads(data) if data else (False, f"child ended with status {status}")
        (results if good else failures).append(found)
    assert not failures, failures
    return results


def interrupted(
    call: Callable[[], Any], at: int, files: tuple[str, ...] = (lock.__file__, recipes.__file__)
) -> bool:
    """Run `call`, with a KeyboardInterrupt at the `at`-th line of files whose paths begin so, or end of a `_lease_`
    primitive, whose answer is then lost; whether it came so far."""
    left = at

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code.co_name.startswith("_lease_"):
            wanted = "return"
        elif frame.f_code.co_filename.startswith(files):
            wanted = "line"
        else:
            return None
        if event == wanted:
            count()
        return trace

    def profile(frame: Any, event: str, arg: Any) -> None:
        if event == "c_return" and arg.__name__.startswith("_lease_"):
            count()

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(before[1])
        sys.settrace(before[0])
    return False


class Harness:
    """What a subclass of EngineConformance may override; `make_engine` it must."""

    frozen = True
    """The engine's clock is set by the tests. False: they sleep."""
    life = 10.0
    """Seconds of the lifetimes used in tests; a whole number."""
    slack = 0.0
    """Seconds after a deadline by which an item is surely gone."""
    small = 1000
    """Bytes of the largest value of the engines made with `small_option`."""
    small_option = "max_value"
    processes = 4
    increments = 2000
    missing: tuple[Capability, ...] = ()
    """What the test wanted and the engine does not claim, for who reports of a run."""

    @pytest.fixture
    def make_engine(self) -> Callable[..., Engine]:
        raise NotImplementedError("override the fixture make_engine")

    @pytest.fixture
    def engine(self, make_engine: Callable[..., Engine]) -> Engine:
        return self.freeze(make_engine())

    def lacks(self, engine: Engine, flag: Capability) -> bool:
        """Whether the engine does not claim `flag`, which is then noted in `missing`."""
        if flag in engine.capabilities:
            return False
        self.missing += (flag,)
        return True

    def freeze(self, engine: Engine) -> Engine:
        if self.frozen:
            clock: Any = engine
            clock._set_clock(clock._now_ms())
        return engine

    def advance(self, engine: Engine, seconds: float) -> None:
        """Let `seconds` pass for the engine."""
        if self.frozen:
            clock: Any = engine
            clock._set_clock(clock._now_ms() + round(seconds * 1000))
        else:
            time.sleep(seconds)

    def expire(self, engine: Engine) -> None:
        """Let a lifetime of `life` that began now end."""
        self.advance(engine, self.life + self.slack)
