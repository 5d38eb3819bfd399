"""Workers killed by SIGKILL at random moments while they read and write one segment; nothing committed may be lost (R4).

The parent forks workers, kills one every few milliseconds and forks its successor. It measures its own first write after each
kill (whoever repairs, that write waits for it), watches that every worker makes progress, and at the end compares the segment
with the ledger, the worker slots and the audit.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import shmcache
from shmcache import _core
from tests.crash.ledger import is_delete, parse
from tests.crash.worker import N_OWN, Board, Worker

__all__ = ["Outcome", "judge_rest", "live_beacons", "segment", "storm"]

HUNG: Final = 20.0
"""Seconds without progress after which a worker counts as hung; a loaded machine delays one by about a second."""


@dataclass(slots=True)
class Outcome:
    """What a harness counted and what it found wrong."""

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def report(self) -> int:
        """Print; 1 if something was found."""
        figures = ", ".join(f"{k} {v}" for k, v in self.figures.items())
        print(f"{self.name}: {figures}, violations {len(self.violations)}")
        for text in self.violations[:10]:
            print(f"  {text}")
        sys.stdout.flush()
        return 1 if self.violations else 0


@contextlib.contextmanager
def segment(form: str, guard: str, tag: str, **options: Any) -> Iterator[tuple[Any, str]]:
    """A fresh segment and its URL; removed with its semaphores whatever happens."""
    url = f"{form}://" if form == "anon" else f"{form}:///crash-{tag}-{os.getpid()}"
    options = {"size": "1M", "guards": 1, "guard": guard, "lock_timeout": 30.0, **options}
    cache = shmcache.open(url, mode="x", **options)
    owner = os.getpid()
    try:
        yield cache, url
    finally:
        if os.getpid() == owner:
            if form != "anon":
                with contextlib.suppress(shmcache.ShmCacheError, OSError):
                    cache.unlink()
            cache.close()


def live_beacons(cache: Any) -> int:
    """Worker slots that a live process holds."""
    header = cache._header()
    return sum(_core.sem_values(header["sem_id"], header["n_sems"])[1 + header["n_shards"] :])


class Storm:
    """The parent's side."""

    def __init__(self, cache: Any, url: str, board: Board, seed: int, until: float) -> None:
        self.cache, self.url, self.board, self.until = cache, url, board, until
        self.rng = random.Random(seed)
        self.pids: dict[int, int] = {}
        self.read_end, self.write_end = os.pipe()
        self.violations: list[str] = []
        self.progress = {i: (0, time.monotonic()) for i in range(board.n)}
        self.text = b""

    def fork(self) -> int:
        """How a worker is begun; a harness may put it somewhere else."""
        return os.fork()

    def enter(self) -> None:
        """What a worker does first."""

    def pid_in_segment(self, pid: int) -> int:
        """What a worker calls itself."""
        return pid

    def spawn(self, index: int, first: Callable[[], None] = lambda: None) -> None:
        """Fork a worker that does `first` before anything else; every third opens the segment itself, the others inherit it."""
        seed, own = self.rng.getrandbits(32), self.rng.random() < 0.3 and not self.url.startswith("anon")
        pid = self.fork()
        if pid == 0:
            code = 1
            try:
                self.enter()
                first()
                cache = type(self.cache).from_url(self.cache.url, mode="a", lock_timeout=30.0) if own else self.cache
                Worker(cache, self.board, index, seed, self.write_end).run(self.until + 60)
                code = 0
            except BaseException as error:  # the child must not unwind into the parent's frames
                os.write(self.write_end, f"worker {index}: {type(error).__name__}: {error}"[:900].encode() + b"\n")
            finally:
                os._exit(code)
        self.pids[index] = pid
        self.progress[index] = (self.board.ledger.word(index), time.monotonic())

    def aim(self, index: int) -> None:
        """Stop a worker where it stands, at most 60 times, until that is inside a guard; it is left stopped."""
        pid = self.pids[index]
        for _ in range(60):
            os.kill(pid, signal.SIGSTOP)
            _, status = os.waitpid(pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                del self.pids[index]
                self.violations.append(f"worker {index} ended by itself, status {status}")
                return
            if any(guard["pid"] == self.pid_in_segment(pid) and guard["state"] != "free" for guard in self.cache._guards()):
                return
            os.kill(pid, signal.SIGCONT)
            time.sleep(self.rng.uniform(0, 0.0002))

    def kill(self, index: int) -> None:
        """SIGKILL and collect."""
        pid = self.pids.pop(index, None)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def listen(self) -> None:
        """Take in what workers complained about."""
        while select.select([self.read_end], [], [], 0)[0]:
            self.text += os.read(self.read_end, 65536)
        *lines, self.text = self.text.split(b"\n")
        self.violations += [line.decode("utf-8", "replace") for line in lines]

    def watch(self) -> None:
        """A worker whose heart does not beat is hung."""
        now = time.monotonic()
        for index, (beats, since) in list(self.progress.items()):
            beat = self.board.ledger.word(index)
            if beat != beats:
                self.progress[index] = (beat, now)
            elif now - since > HUNG:
                self.violations.append(f"hung: worker {index} made no progress in {HUNG:g} s; guards {self.cache._guards()}")
                self.progress[index] = (beat, now)

    def close(self) -> None:
        """Kill what is left."""
        for index in list(self.pids):
            self.kill(index)
        self.listen()
        os.close(self.read_end)
        os.close(self.write_end)


def judge_rest(cache: Any, board: Board, found: list[str]) -> None:
    """Compare what stands with the ledger, and audit; findings go to `found`."""
    for worker in range(board.n):
        for i in range(N_OWN):
            key, pair = f"own:{worker}:{i}", board.own(worker, i)
            low, high = board.ledger.acked(pair), board.ledger.begun(pair)
            value = cache.get(key, shmcache.MISS)
            if value is shmcache.MISS:
                if low and not board.may_miss and not any(is_delete(v) for v in range(low, high + 1)):
                    found.append(f"lost at the end: {key}, versions {low} to {high} wanted")
            elif not low <= parse(key, value) <= high:
                found.append(f"at the end: {key} gives version {parse(key, value)}, {low} to {high} wanted")
    found += [f"check: {finding}" for finding in cache.check()[:5]]


def storm(
    form: str, guard: str, *, seconds: float, seed: int, evict: bool, workers: int = 3, kills: int | None = None,
    kind: type[Storm] = Storm, **more: Any,
) -> Outcome:  # fmt: skip
    """Run one storm of `seconds`, or of `kills` kills; `evict` makes the segment too small for its keys. `more`: options of the
    segment."""
    name = f"storm {form} {guard}{' evicting' if evict else ''}"
    until = time.monotonic() + (seconds if kills is None else 86400.0)
    board = Board(workers, evict)
    killed, waits, repairs = 0, [0.0], [0.0]
    options = {"size": "256K", "eviction": "auto"} if evict else {"size": "4M", "eviction": "none"}
    with segment(form, guard, f"storm-{seed}", **options, **more) as (cache, url):
        run = kind(cache, url, board, seed, until)
        try:
            for index in range(workers):
                run.spawn(index)
            while time.monotonic() < until and (kills is None or killed < kills) and len(run.violations) < 20:
                time.sleep(run.rng.uniform(0.0005, 0.006))
                index = run.rng.randrange(workers)
                if killed % 2:  # every other one where it hurts
                    run.aim(index)
                repaired = cache._stats()["recoveries"]
                run.kill(index)
                killed += 1
                begun = time.perf_counter()
                cache.set("parent", killed)
                wait = time.perf_counter() - begun
                (repairs if cache._stats()["recoveries"] > repaired else waits).append(wait)
                run.spawn(index)
                run.listen()
                run.watch()
        finally:
            run.close()
        judge_rest(cache, board, run.violations)
        stats = cache._stats()
        if live_beacons(cache) > 1:
            run.violations.append(f"slots: 1 held at the end wanted, {live_beacons(cache)} found")
        waits.sort()
        repairs.sort()
        figures = {
            "kills": killed,
            "inside": stats["recoveries"],
            "operations": sum(board.ledger.word(i) for i in range(workers)),
            "first write after a kill p99": f"{waits[int(len(waits) * 0.99)] * 1e3:.2f} ms",
            "with repair p50": f"{repairs[len(repairs) // 2] * 1e3:.2f} ms",
            "p99": f"{repairs[int(len(repairs) * 0.99)] * 1e3:.2f} ms",
            "corrupt": stats["corrupt"],
        }
        if stats["corrupt"]:
            run.violations.append(f"corrupt: 0 items wanted, {stats['corrupt']} found")
        return Outcome(name, figures, run.violations)
