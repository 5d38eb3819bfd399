"""Workers killed at every crash point, in every operation that passes it, while others read and write (`points`).

The workers are those of the storm, judged by the same ledger. A first run counts which operation passes which point; then for
each such pair one worker is armed with it, dies there, and is succeeded. Points of a repair are reached by a death inside a
guard just before: the armed successor dies repairing.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from tests.crash.points_build import Points, in_points_build
from tests.crash.storm import Outcome, Storm, judge_rest, live_beacons, segment
from tests.crash.worker import Board

__all__ = ["LEGS", "OUTSIDE", "add_commands", "points"]

LEGS: Final[dict[str, dict[str, Any]]] = {
    "roomy": {"size": "1M", "eviction": "none", "clean_period": 1.0},
    "full": {"size": "256K", "clean_period": 1.0},
    "crowded": {"size": "2M", "buckets": 16, "secure_delete": True, "clean_period": 1.0},
}
"""Nothing may go missing; pages are evicted; the index is full and dead bytes are wiped."""

ONCE: Final = ("beacon_won", "generation_raised")
REPAIR: Final = ("guard_inherited", "recover_begin", "recover_lanes", "recount_free", "recover_end")
INSIDE: Final = ("guard_taken", "page_prepared", "before_tail", "before_publish", "after_publish", "before_unlock")
OUTSIDE: Final = (
    "beacon_won", "generation_raised", "after_unlock", "before_wake", "lease_before_wake", "step_won", "step_half_noted",
    "read_begun", "read_copied", "read_valid", "read_again",
)  # fmt: skip
"""Points where no guard is held."""

UNMARKED: Final = ("semaphore_taken", "dirty_cleared")
"""Points where a semaphore is held and the dirty word is 0: nothing was begun, or all is done, and nothing is repaired."""

PATIENCE: Final = 4.0
"""Seconds after which a pair counts as not reached again; a quarter of it where the time is limited."""


class _Run(Storm):
    """A storm whose workers die where they are told to."""

    def __init__(self, cache: Any, url: str, board: Board, seed: int, points: Points, patience: float) -> None:
        super().__init__(cache, url, board, seed, time.monotonic() + 86400.0)
        self.points, self.patience = points, patience
        self.done: set[tuple[str, str]] = set()
        self.unreached: set[tuple[str, str]] = set()
        self.kills = 0
        self.begun = time.monotonic()

    def discover(self, seconds: float) -> None:
        """Count what unarmed workers pass."""
        for index in range(self.board.n):
            self.spawn(index)
        time.sleep(seconds)

    def go(self, until: float, turn: int) -> None:
        """A death at each pair passed so far, and at those that only repairs bring about, as they come up."""
        tried: set[tuple[str, str]] = set()
        double = [(inside, point) for inside in INSIDE for point in REPAIR]
        self.rng.shuffle(double)
        while time.monotonic() < until and not self.violations:
            fresh = [pair for pair in self.points.passes().items() if pair[0] not in tried and pair[0][1] not in REPAIR]
            if not fresh:
                break
            (operation, point), passes = self.rng.choice(fresh)
            tried.add((operation, point))
            self.pair(operation, point, passes)
            if len(tried) % 6 == turn % 6 and double:
                self.repairer(*double.pop())
            if len(tried) % 25 == 0:
                self.quiet()
        self.quiet()

    def die(self, indices: Sequence[int], operation: str, point: str, nth: int) -> bool:
        """Arm these workers with the point; whether one of them died there in time. None of them is left running."""
        for index in indices:
            self.kill(index)
            self.spawn(index, lambda: self.points.arm(f"{operation}:{point}:{nth}"))
        until, died = time.monotonic() + self.patience, False
        while not died and not self.violations and time.monotonic() < until:
            time.sleep(0.0005)
            for index in indices:
                done, status = os.waitpid(self.pids[index], os.WNOHANG)
                if done:
                    del self.pids[index]
                    died = True
                    self.kills += 1
                    if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
                        self.violations.append(f"{operation}:{point}:{nth}: the worker ended by itself, status {status:#x}")
                    break
            self.listen()
            self.watch()
        for index in indices:
            self.kill(index)
        return died

    def quiet(self) -> None:
        """Everybody killed, the ledger and the audit compared, everybody back."""
        for index in list(self.pids):
            self.kill(index)
        self.listen()
        self.cache.set("parent", b"x")
        judge_rest(self.cache, self.board, self.violations)
        if live_beacons(self.cache) > 1:
            self.violations.append(f"slots: 1 held wanted, {live_beacons(self.cache)} found")
        for index in range(self.board.n):
            self.spawn(index)

    def pair(self, operation: str, point: str, passes: int) -> None:
        """One worker dies at the point while the others go on."""
        soon = int(passes / (time.monotonic() - self.begun) / self.board.n / 5)  # so many in a fifth of a second
        indices = [self.rng.randrange(self.board.n)] if soon > 1 else list(range(self.board.n))
        nth = self.rng.randint(1, max(1, min(1000, soon))) if point not in ONCE else 1
        repaired = self.cache._stats()["recoveries"]
        died = self.die(indices, operation, point, nth)
        (self.done if died else self.unreached).add((operation, point))
        if died and point not in (*OUTSIDE, *UNMARKED):
            self.cache.set("parent", b"x")
            if self.cache._stats()["recoveries"] == repaired:
                self.violations.append(f"{operation}:{point}:{nth}: a recovery wanted, none found")
        for index in indices:
            self.spawn(index)

    def repairer(self, inside: str, point: str) -> None:
        """One worker dies inside its guard, the next one while it repairs, a third repairs both."""
        for index in list(self.pids):
            self.kill(index)
        if not self.die([0], "*", inside, self.rng.randint(1, 20)):
            return
        counted = self.cache._stats()["recoveries"] + (point == "recover_end")  # where the first one has counted itself
        died = self.die([0], "*", point, 1)
        (self.done if died else self.unreached).add(("*", point))
        self.cache.set("parent", b"x")
        if died and self.cache._stats()["recoveries"] <= counted:
            self.violations.append(f"{inside}, then {point} while repairing: another recovery wanted, none found")
        for index in range(self.board.n):
            self.spawn(index)


def points(form: str, guard: str, leg: str, *, seed: int, seconds: float, rounds: int = 1, verbose: bool = False) -> Outcome:
    """Every pair of operation and point that the leg's workers pass, `rounds` times; `seconds` ends it early (0: does not)."""
    board = Board(3, may_miss=leg != "roomy")
    until = time.monotonic() + seconds if seconds else float("inf")
    with segment(form, guard, f"points-{seed}", **LEGS[leg]) as (cache, url):
        run = _Run(cache, url, board, seed, Points(), PATIENCE / 4 if seconds else PATIENCE)
        try:
            run.discover(min(2.0, seconds / 4 or 2.0))
            for turn in range(rounds):
                run.go(until, turn)
        finally:
            run.close()
        seen = run.points.passes()
        stats = cache._stats()
        if verbose:
            print("never passed:", ", ".join(p for p in run.points.points[1:] if p not in {q for _, q in seen}))
            print("not reached again:", ", ".join(sorted(f"{o}:{p} ({seen.get((o, p), 0)})" for o, p in run.unreached)))
        if stats["corrupt"]:
            run.violations.append(f"corrupt: 0 items wanted, {stats['corrupt']} found")
        figures = {
            "points passed": f"{len({p for _, p in seen})} of {len(run.points.points) - 1}",
            "pairs of operation and point": len(seen),
            "died at": len(run.done), "not reached again": len(run.unreached),
            "kills": run.kills, "inside a guard": stats["recoveries"],
            "operations": sum(board.ledger.word(i) for i in range(board.n)),
        }  # fmt: skip
        return Outcome(f"points {form} {guard} {leg}", figures, run.violations)


def _legs(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    for form in [options.form] if options.form else ("posix", "sysv", "anon"):
        for guard in [options.guard] if options.guard else ("fast", "semaphore"):
            for leg in [options.leg] if options.leg else LEGS:
                yield form, guard, leg


def _points(options: argparse.Namespace) -> int:
    code = in_points_build(sys.argv[1:])
    if code is not None:
        return code
    if options.list:
        table = Points()
        print("operations: " + ", ".join(table.operations[1:]))
        print("\n".join(f"{n:3} {name}" for n, name in enumerate(table.points) if n))
        return 0
    return sum(
        points(*leg, seed=options.seed, seconds=options.seconds, rounds=options.rounds, verbose=options.verbose).report()
        for leg in _legs(options)
    )


def add_commands(command: Callable[[str, str, float], argparse.ArgumentParser]) -> None:
    """The sub-command of this module."""
    sub = command("points", "a worker killed at every crash point in every operation that passes it (R4)", 0.0)
    sub.add_argument("--form", choices=("posix", "sysv", "anon"))
    sub.add_argument("--guard", choices=("fast", "semaphore"))
    sub.add_argument("--leg", choices=list(LEGS))
    sub.add_argument("--rounds", type=int, default=1)
    sub.add_argument("--verbose", action="store_true", help="name the points that were not reached")
    sub.add_argument("--list", action="store_true", help="print the points and operations")
    sub.set_defaults(run=_points)
