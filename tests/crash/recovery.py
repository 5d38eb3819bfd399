"""How long a writer waits for a shard whose holder was killed, and what that time is made of (`recovery`, R4).

A holder stands at a crash point inside its guard and is killed. Measured is the first write afterwards, of a process that came
later and of one that was already waiting, as wall time, time on a processor (the repair itself and the write), time runnable
without a processor (the machine's load), and the rest: asleep until it noticed.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.crash.points_build import Points, in_points_build
from tests.crash.storm import Outcome, segment

__all__ = ["Split", "add_commands", "percentile", "recovery", "scheduled"]

INSIDE: Final = ("guard_taken", "version_raised", "before_tail", "before_publish", "after_publish", "before_unlock")
SIZES: Final = {"8M": 400, "64M": 1500, "512M": 12000}
"""Size of the one shard, and the length of values that fill it in about 40,000 sets."""


def scheduled() -> int:
    """Nanoseconds this thread has been runnable without a processor."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1])


def percentile(values: list[float], share: float) -> float:
    """The value `share` of all are at or below; 0 of none."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0


@dataclass(slots=True)
class Split:
    """Waits, split: milliseconds each."""

    wall: list[float] = field(default_factory=list)
    on: list[float] = field(default_factory=list)
    runnable: list[float] = field(default_factory=list)
    asleep: list[float] = field(default_factory=list)

    def add(self, wall_ns: int, on_ns: int, runnable_ns: int) -> None:
        """One wait."""
        self.wall.append(wall_ns / 1e6)
        self.on.append(on_ns / 1e6)
        self.runnable.append(runnable_ns / 1e6)
        self.asleep.append(max(0, wall_ns - on_ns - runnable_ns) / 1e6)

    def text(self) -> str:
        """p50 and p99 of each part."""
        return "; ".join(
            f"{name} {percentile(values, 0.5):.2f} / {percentile(values, 0.99):.2f}"
            for name, values in (
                ("wall", self.wall), ("on a processor", self.on), ("waiting for one", self.runnable), ("asleep", self.asleep),
            )
        )  # fmt: skip


class _Run:
    def __init__(self, cache: Any, seed: int) -> None:
        self.cache, self.rng, self.points = cache, random.Random(seed), Points()
        self.words = memoryview(mmap.mmap(-1, 4096)).cast("Q")
        self.late, self.waiting, self.dying = Split(), Split(), list[float]()

    def _fork(self, work: Callable[[], None]) -> int:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        return pid

    def _hold(self) -> None:
        self.points.arm(f"set:{self.rng.choice(INSIDE)}:{self.rng.randint(1, 20)}:STOP")
        for i in range(1000):
            self.cache.set(f"held:{i % 50}", b"h" * 100)

    def _wait(self) -> None:
        words, cache = self.words, self.cache
        cache.get("held:0")  # claims the slot
        runnable = scheduled()
        words[0] = 1
        on = time.thread_time_ns()
        cache.set("waiter", b"w")
        words[1], words[2] = time.monotonic_ns(), time.thread_time_ns() - on
        words[3] = scheduled() - runnable

    def once(self, waiting: bool) -> str | None:
        """One death; None, or what was wrong."""
        holder = self._fork(self._hold)
        if not os.WIFSTOPPED(os.waitpid(holder, os.WUNTRACED)[1]):
            return "the holder did not reach its point"
        repaired = self.cache._stats()["recoveries"]
        if waiting:
            self.words[0] = 0
            waiter = self._fork(self._wait)
            while not self.words[0]:
                time.sleep(0.0002)
            time.sleep(0.003)
        begun = time.monotonic_ns()
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        gone = time.monotonic_ns()
        self.dying.append((gone - begun) / 1e6)
        if waiting:
            os.waitpid(waiter, 0)
            self.waiting.add(max(0, self.words[1] - gone), self.words[2], self.words[3])
        else:
            runnable, on, begun = scheduled(), time.thread_time_ns(), time.monotonic_ns()
            self.cache.set("late", b"l")
            wall, on = time.monotonic_ns() - begun, time.thread_time_ns() - on
            self.late.add(wall, on, scheduled() - runnable)
        if self.cache._stats()["recoveries"] != repaired + 1:
            return f"recoveries: {repaired + 1} wanted, {self.cache._stats()['recoveries']} found"
        return None


def recovery(form: str, guard: str, size: str, *, deaths: int, seed: int) -> Outcome:
    """`deaths` with a latecomer and as many with a waiter, in a full segment of one shard."""
    found: list[str] = []
    with segment(form, guard, f"recovery-{seed}", size=size, guards=1, item_size=SIZES[size]) as (cache, _):
        value = b"f" * SIZES[size]
        for i in range(40_000):
            cache.set(f"fill:{i}", value)
        run = _Run(cache, seed)
        for n in range(2 * deaths):
            wrong = run.once(n % 2 == 1)
            if wrong:
                found.append(wrong)
                break
        pages = cache._header()["n_pages"]
        found += [f"check: {finding}" for finding in cache.check()[:5]]
    figures = {
        "pages": pages, "deaths": len(run.late.wall) + len(run.waiting.wall),
        "ms p50 / p99 of a latecomer": run.late.text(), "of a waiter": run.waiting.text(),
        "a killed holder was gone after": f"{percentile(run.dying, 0.5):.2f} / {percentile(run.dying, 0.99):.2f}",
    }  # fmt: skip
    return Outcome(f"recovery {form} {guard} {size}", figures, found)


def _recovery(options: argparse.Namespace) -> int:
    code = in_points_build(sys.argv[1:])
    if code is not None:
        return code
    if options.realtime:  # inherited by those forked
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    return sum(
        recovery(options.form or "posix", guard, size, deaths=options.deaths, seed=options.seed).report()
        for guard in ([options.guard] if options.guard else ("fast", "semaphore"))
        for size in ([options.size] if options.size else SIZES)
    )


def add_commands(command: Callable[[str, str, float], argparse.ArgumentParser]) -> None:
    """The sub-command of this module."""
    sub = command("recovery", "time from a holder's death to the next write, split (R4)", 0.0)
    sub.add_argument("--form", choices=("posix", "sysv"), help="posix unless told")
    sub.add_argument("--guard", choices=("fast", "semaphore"))
    sub.add_argument("--size", choices=list(SIZES))
    sub.add_argument("--deaths", type=int, default=300)
    sub.add_argument("--realtime", action="store_true", help="under SCHED_RR, so that other load does not count; needs root")
    sub.set_defaults(run=_recovery)
