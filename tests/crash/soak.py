"""A long run with worker restarts: memory, free pages and live items stay flat, nothing goes wrong (`soak`, R12).

Workers do a share of the operations each and end: by closing, by leaving without it, or by a signal in the middle; the parent
forks the next. A value says whose it is, so a foreign one is an error, as is any exception.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import mmap
import os
import random
import signal
import statistics
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.crash.storm import HUNG, Outcome, live_beacons, segment

__all__ = ["add_commands", "soak"]

N_KEYS: Final = 60_000
KEYS: Final = [f"soak:{i}" for i in range(N_KEYS)]
VALUES: Final = [(b"%d|" % i) * (1 + (3, 10, 20, 60, 300)[i * 7 % 5] // (len(str(i)) + 1)) for i in range(N_KEYS)]
BATCH: Final = 500
WORKERS: Final = 2
SLACK: Final = 0.1
"""Share by which the last third of a run may differ from the second; sampled every `step` seconds, warm-up left out."""


@dataclass(slots=True)
class Sample:
    """One look at the run."""

    rss: float
    worker_rss: float
    free: float
    items: float
    descriptors: float


def _resident() -> int:
    """Resident memory of this process for itself, the segment left out, in KiB."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1])


class _Words:
    """What workers tell the parent: per worker index operations done, errors, highest memory; and the last error's text."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, 8192)
        self.words = memoryview(self.map).cast("Q")

    def complain(self, index: int, text: str) -> None:
        self.words[8 * index + 1] += 1
        data = text.encode()[:900]
        self.map[4096 : 4096 + len(data) + 1] = data + b"\0"

    def done(self) -> int:
        return sum(self.words[8 * i] for i in range(WORKERS))

    def text(self) -> str:
        return bytes(self.map[4096:]).split(b"\0")[0].decode("utf-8", "replace")


def _life(cache: Any, words: _Words, index: int, n: int, seed: int, picks: Sequence[int]) -> None:
    """`n` operations, at least a batch; a key of a get_many counts as one."""
    rng, row, board = random.Random(seed), 8 * index, words.words
    get, put, get_many = cache.get, cache.set, cache.get_many
    while n > 0:
        at = rng.randrange(len(picks) - BATCH)
        for i in picks[at : at + 200]:
            value = get(KEYS[i])
            if value is None:
                put(KEYS[i], VALUES[i])
            elif value != VALUES[i]:
                words.complain(index, f"{KEYS[i]}: {VALUES[i][:20]!r} wanted, {value[:20]!r} found")
        for start in range(at + 200, at + BATCH - 40, 65):
            some = picks[start : start + 65]
            got = get_many([KEYS[i] for i in some])
            for i in some:
                value = got.get(KEYS[i])
                if value is not None and value != VALUES[i]:
                    words.complain(index, f"{KEYS[i]}: {VALUES[i][:20]!r} wanted, {value[:20]!r} found by get_many")
        for i in picks[at : at + 10]:
            put(KEYS[i], VALUES[i], (0.05, 5, 0)[i % 3])
            cache.incr(f"n:{i % 50}")
            cache.delete(KEYS[-i])
            cache.touch(KEYS[i // 2], 100)
        n -= BATCH
        board[row] += BATCH
    board[row + 2] = max(board[row + 2], _resident())


def _child(cache: Any, words: _Words, index: int, n: int, seed: int, picks: Sequence[int]) -> None:
    way = seed % 3
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        if way == 2:  # by default SIGALRM ends a process wherever it stands
            signal.setitimer(signal.ITIMER_REAL, 0.0005 + (seed % 997) / 200000)
        _life(cache, words, index, n, seed, picks)
        if way == 0:
            cache.close()
        if way == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    except BaseException as error:  # the child must not unwind into the parent's frames
        words.complain(index, f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)


def _look(cache: Any, words: _Words) -> Sample:
    pages = sum(guard["pages_free"] for guard in cache._guards())
    workers = max(words.words[8 * i + 2] for i in range(WORKERS))
    return Sample(_resident(), workers, pages, cache._stats()["items"], len(os.listdir("/proc/self/fd")))


def _flat(name: str, samples: list[Sample], found: list[str]) -> str:
    values = [getattr(sample, name) for sample in samples[len(samples) // 10 :]]
    third = len(values) // 3
    if third < 3:
        return f"{values[-1]:g}"
    second, last = statistics.median(values[third : 2 * third]), statistics.median(values[2 * third :])
    if abs(last - second) > max(SLACK * second, 3):
        found.append(f"{name}: {second:g} wanted as in the second third, {last:g} found in the last")
    return f"{second:g} then {last:g}"


def soak(form: str, guard: str, *, operations: float, restarts: float, seconds: float, seed: int) -> Outcome:
    """`operations` in all by `restarts` lives of workers, until `seconds` are over (0: no end but that), SIGINT or SIGTERM."""
    begun = time.monotonic()
    until = begun + seconds if seconds else float("inf")
    step = max(0.05, min(10.0, seconds / 100 if seconds else 10.0))
    each, lives, found = max(BATCH, int(operations / restarts)), 0, list[str]()
    rng, words, samples = random.Random(seed), _Words(), list[Sample]()
    weights = list(itertools.accumulate(1 / (i + 1) ** 0.9 for i in range(N_KEYS)))
    picks = array("I", rng.choices(range(N_KEYS), cum_weights=weights, k=1 << 18))
    gc.freeze()  # children do not copy pages for the collector's sake
    asked: list[int] = []
    before = {number: signal.signal(number, lambda n, _: asked.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    with segment(form, guard, f"soak-{seed}", size="8M", guards=1, clean_period=2.0) as (cache, _):
        for i in range(N_KEYS):  # full from the beginning
            cache.set(KEYS[i], VALUES[i])
        pids: dict[int, tuple[int, float]] = {}
        free, beaten, due = list(range(WORKERS)), [0] * WORKERS, begun + step
        try:
            while words.done() < operations and time.monotonic() < until and not found and not asked:
                while free:
                    index, number = free.pop(), rng.getrandbits(30)
                    pid = os.fork()
                    if pid == 0:
                        _child(cache, words, index, each, number, picks)
                    pids[pid] = (index, time.monotonic())
                    lives += 1
                pid, _status = os.waitpid(-1, os.WNOHANG)
                now = time.monotonic()
                if pid:
                    free.append(pids.pop(pid)[0])
                else:
                    time.sleep(0.0002)
                for child, (index, since) in pids.items():
                    if words.words[8 * index] != beaten[index]:
                        beaten[index] = words.words[8 * index]
                        pids[child] = (index, now)
                    elif now - since > HUNG:
                        found.append(f"hung: worker {index} made no progress in {HUNG:g} s: {cache._guards()}")
                if now > due:
                    due = now + step
                    samples.append(_look(cache, words))
                if any(words.words[8 * i + 1] for i in range(WORKERS)):
                    found.append(f"error: {words.text()}")
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for child in pids:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        cache.set("parent", b"x")
        if live_beacons(cache) > 1:
            found.append(f"slots: 1 held wanted, {live_beacons(cache)} found")
        stats = cache._stats()
        if stats["corrupt"]:
            found.append(f"corrupt: 0 items wanted, {stats['corrupt']} found")
        found += [f"check: {finding}" for finding in cache.check()[:5]]
        done, spent = words.done(), time.monotonic() - begun
        samples.append(_look(cache, words))
        figures = {
            "operations": f"{done:,}", "lives of workers": f"{lives:,}", "in": f"{spent:.0f} s",
            "ended inside a guard": stats["recoveries"], "evicted": stats["evicted"], "expired": stats["expired"],
            "parent KiB": _flat("rss", samples, found), "worker KiB": _flat("worker_rss", samples, found),
            "free pages": _flat("free", samples, found), "live items": _flat("items", samples, found),
            "descriptors": _flat("descriptors", samples, found),
        }  # fmt: skip
        return Outcome(f"soak {form} {guard}", figures, found)


def _soak(options: argparse.Namespace) -> int:
    return sum(
        soak(form, guard, operations=options.operations, restarts=options.restarts, seconds=options.seconds, seed=options.seed)
        .report()
        for form in ([options.form] if options.form else ("posix",))
        for guard in ([options.guard] if options.guard else ("fast",))
    )  # fmt: skip


def add_commands(command: Callable[[str, str, float], argparse.ArgumentParser]) -> None:
    """The sub-command of this module."""
    sub = command("soak", "a long run with restarts: memory and counts stay flat (R12)", 0.0)
    sub.add_argument("--operations", type=float, default=1e9, help="in all; seconds end it earlier")
    sub.add_argument("--restarts", type=float, default=1e5, help="lives the operations are divided among")
    sub.add_argument("--form", choices=("posix", "sysv", "anon"), help="posix unless told")
    sub.add_argument("--guard", choices=("fast", "semaphore"), help="fast unless told")
    sub.set_defaults(run=_soak)
