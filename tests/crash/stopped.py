"""The holder of a guard stopped (SIGSTOP) at every crash point: readers never notice, writers get LockTimeout (`stopped`, R6).

For each pair of operation and point a worker stops itself there. Meanwhile
  - a reader reads every key without one system call (the kernel would end it) and without one repeated pass (counted),
  - writers of the stopped shard get LockTimeout, those of the other shard go on; where no guard is held, all go on,
  - nobody takes the guard away: the holder goes on afterwards, its ledger intact, and no recovery was counted.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from shmcache.errors import LockTimeout
from tests.crash.ledger import parse
from tests.crash.points import LEGS, OUTSIDE
from tests.crash.points_build import Points, in_points_build
from tests.crash.silent import NUMBERS, forbid_system_calls, keep_memory
from tests.crash.storm import HUNG, Outcome, Storm, segment
from tests.crash.worker import N_LOGS, N_OWN, Board

__all__ = ["add_commands", "stopped"]

READS: Final = 4000
TIMEOUT: Final = 0.02
"""Seconds a writer waits for a guard."""

class _Stop(Storm):
    """A storm with one worker, which is stopped instead of killed."""

    def __init__(self, cache: Any, url: str, board: Board, seed: int, points: Points) -> None:
        super().__init__(cache, url, board, seed, time.monotonic() + 86400.0)
        self.points = points
        self.writer = type(cache).from_url(cache.url, mode="a", lock_timeout=TIMEOUT)
        self.keys = [f"own:0:{i}" for i in range(N_OWN)] + [f"log:0:{i}" for i in range(N_LOGS)] + ["all:0", "swap:0", "absent"]
        self.shared = mmap.mmap(-1, 8 * (READS + 8))
        self.words = memoryview(self.shared).cast("Q")
        self.p99: dict[bool, list[float]] = {True: [], False: []}
        self.waits: list[float] = []
        self.reads = self.retries = self.noticed = 0
        self.inside: set[tuple[str, str]] = set()
        self.outside: set[tuple[str, str]] = set()

    def read_all(self, what: str, held: bool) -> None:
        """A fresh reader reads every key again and again, and may make no system call."""
        self.words[0] = 0
        before = self.points.passes().get(("get", "read_again"), 0)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = self._reader()
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        self.reads += READS
        retries = self.points.passes().get(("get", "read_again"), 0) - before
        self.retries += retries
        if status or self.words[0] != READS or retries:
            self.noticed += 1
            self.violations.append(
                f"{what}: {READS} reads, no system call and no repeated pass wanted, {self.words[0]} reads, {retries} passes and "
                f"status {status:#x} found"
            )
        self.p99[held].append(sorted(self.words[1 : 1 + READS])[int(READS * 0.99)] / 1e3)

    def _reader(self) -> int:
        keep_memory()
        self._read()  # the interpreter takes from the kernel now what the same reads will need again
        forbid_system_calls()
        return 3 if self._read() else 0

    def _read(self) -> int:
        cache, words, keys, now = self.cache, self.words, self.keys, time.perf_counter_ns
        bad, n = 0, len(keys)
        for i in range(READS):
            key = keys[i % n]
            begun = now()
            value = cache.get(key)
            words[1 + i] = now() - begun
            if value is not None and key.startswith("own:") and parse(key, value) < 0:
                bad += 1
            words[0] = i + 1
        return bad

    def write_all(self) -> tuple[int, int]:
        """Writes beside the stopped one: how many were done, how many timed out."""
        done = timed_out = 0
        for i in range(12):
            begun = time.monotonic()
            try:
                self.writer.set(f"beside:{i}", b"x" * 20)
                done += 1
            except LockTimeout:
                timed_out += 1
                waited = time.monotonic() - begun
                self.waits.append(waited)
                if waited < TIMEOUT:
                    self.violations.append(f"LockTimeout after {TIMEOUT} s wanted, {waited:.4f} s found")
        return done, timed_out

    def pair(self, operation: str, point: str, nth: int, patience: float) -> bool:
        """Stop at the point, look, let it go on. False: it was not reached in `patience` seconds."""
        what = f"{operation}:{point}:{nth}"
        self.spawn(0, lambda: self.points.arm(f"{what}:STOP"))
        pid, until = self.pids[0], time.monotonic() + patience
        while True:
            done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if done:
                break
            if time.monotonic() > until:
                self.kill(0)
                return False
            time.sleep(0.0005)
        if not os.WIFSTOPPED(status):
            del self.pids[0]
            self.violations.append(f"{what}: the holder ended by itself, status {status:#x}")
            return True
        held = point not in OUTSIDE
        repaired = self.cache._stats()["recoveries"]
        self.read_all(what, held)
        done, timed_out = self.write_all()
        if held != bool(timed_out) or not done:
            self.violations.append(
                f"{what}: {'some' if held else 'no'} LockTimeout and some writes wanted, {timed_out} and {done} found"
            )
        (self.inside if held else self.outside).add((operation, point))
        self.go_on(what, pid, repaired)
        return True

    def repair(self) -> None:
        """A write in each shard, so that what a kill left is repaired and counted before the next look."""
        for i in range(16):
            self.cache.set(f"repair:{i}", b"x")

    def go_on(self, what: str, pid: int, repaired: int) -> None:
        """The holder continues; it must make progress, and nobody may have taken its guard for a dead one's."""
        beat, begun = self.board.ledger.word(0), time.monotonic()
        os.kill(pid, signal.SIGCONT)
        while self.board.ledger.word(0) < beat + 3 and not self.violations:
            if time.monotonic() - begun > HUNG:
                self.violations.append(f"{what}: the holder makes no progress after SIGCONT; guards {self.cache._guards()}")
            self.listen()
            time.sleep(0.0005)
        if self.cache._stats()["recoveries"] != repaired:
            self.violations.append(f"{what}: a guard was taken from a live process")
        self.kill(0)
        self.listen()


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.2f} us ({min(values):.2f} to {sorted(values)[int(len(values) * 0.9)]:.2f})"


def stopped(form: str, guard: str, *, seconds: float, seed: int) -> Outcome:
    """One stop at every pair of operation and point that a worker passes; `seconds` ends it early (0: does not)."""
    board = Board(1, may_miss=True)
    until = time.monotonic() + seconds if seconds else float("inf")
    options = {**LEGS["full"], "size": "512K", "guards": 2}
    with segment(form, guard, f"stopped-{seed}", **options) as (cache, url), contextlib.ExitStack() as stack:
        run = _Stop(cache, url, board, seed, Points())
        stack.callback(run.writer.close)
        missed = 0
        try:
            run.spawn(0)
            time.sleep(min(1.0, seconds / 5 or 1.0))
            run.kill(0)
            run.repair()
            for key in run.keys:
                cache.get(key)
            tried: set[tuple[str, str]] = set()
            while time.monotonic() < until and not run.violations:
                fresh = [pair for pair in run.points.passes().items() if pair[0] not in tried]
                if not fresh:
                    break
                (operation, point), passes = run.rng.choice(fresh)
                tried.add((operation, point))
                nth = run.rng.randint(1, max(1, min(100, passes // 50)))
                if not run.pair(operation, point, nth, 1.0 if seconds else 4.0):
                    missed += 1
                run.repair()
                if len(tried) % 4 == 0:
                    run.read_all("nobody stopped", False)
        finally:
            run.close()
        figures = {
            "stopped inside a guard": len(run.inside), "points": len({p for _, p in run.inside}),
            "outside": len(run.outside), "not reached again": missed, "reads": run.reads, "repeated passes": run.retries,
            "p99 of a read, holder stopped": _spread(run.p99[True]), "nobody stopped": _spread(run.p99[False]),
            "LockTimeouts": len(run.waits),
            f"after (asked {TIMEOUT * 1e3:g} ms)": f"{statistics.median(run.waits or [0]) * 1e3:.1f} ms, at most "
            f"{max(run.waits or [0]) * 1e3:.1f}",
        }  # fmt: skip
        run.violations += [f"check: {finding}" for finding in cache.check()[:5]]
        return Outcome(f"stopped {form} {guard}", figures, run.violations)


def _stopped(options: argparse.Namespace) -> int:
    if platform.machine() not in NUMBERS:
        print(f"skipped: system calls can be forbidden on {', '.join(NUMBERS)}, this is {platform.machine()}")
        return 0
    code = in_points_build(sys.argv[1:])
    if code is not None:
        return code
    return sum(
        stopped(form, guard, seconds=options.seconds, seed=options.seed).report()
        for form in ([options.form] if options.form else ("posix", "sysv"))
        for guard in ([options.guard] if options.guard else ("fast", "semaphore"))
    )


def add_commands(command: Callable[[str, str, float], argparse.ArgumentParser]) -> None:
    """The sub-command of this module."""
    sub = command("stopped", "the holder of a guard stopped at every crash point (R6)", 0.0)
    sub.add_argument("--form", choices=("posix", "sysv"))
    sub.add_argument("--guard", choices=("fast", "semaphore"))
    sub.set_defaults(run=_stopped)
