"""What a storm's worker does between two SIGKILLs: mixed operations, each judged against the ledger.

A worker index owns its keys (only it writes them) and shares counters, compare-and-swap values and a lock with the others.
Violations go to a pipe as one line each, so that a kill tears none.
"""

from __future__ import annotations

import os
import random
import struct
import time
from dataclasses import dataclass, field
from typing import Any, Final

import shmcache
from shmcache.errors import LockTimeout, ShmCacheError
from tests.crash.ledger import Ledger, is_delete, make, parse

__all__ = ["N_LOGS", "N_OWN", "N_SHARED", "Board", "Worker"]

N_OWN: Final = 40
N_LOGS: Final = 4
N_COUNTERS: Final = 3
N_SHARED: Final = 4
LOG_RESET: Final = 40


@dataclass(slots=True)
class Board:
    """Where the ledger's rows lie, for `n` worker indices."""

    n: int
    may_miss: bool
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.n * self.per_worker, 2 * self.n + 8)

    @property
    def per_worker(self) -> int:
        """Pairs of one worker index."""
        return N_OWN + N_LOGS + N_COUNTERS + 2 * N_SHARED

    def own(self, worker: int, i: int) -> int:
        """Pair of an owned key."""
        return worker * self.per_worker + i

    def log(self, worker: int, i: int) -> int:
        """Pair of an owned log."""
        return worker * self.per_worker + N_OWN + i

    def counter(self, worker: int, i: int) -> int:
        """Pair of an owned counter."""
        return worker * self.per_worker + N_OWN + N_LOGS + i

    def added(self, worker: int, i: int) -> int:
        """Pair of this index's share of a shared counter."""
        return worker * self.per_worker + N_OWN + N_LOGS + N_COUNTERS + i

    def swapped(self, worker: int, i: int) -> int:
        """Pair of this index's share of a compare-and-swap value."""
        return worker * self.per_worker + N_OWN + N_LOGS + N_COUNTERS + N_SHARED + i

    def sum_acked(self, row: Any, i: int) -> int:
        """Acknowledged sum over all indices."""
        return sum(self.ledger.acked(row(w, i)) for w in range(self.n))

    def sum_begun(self, row: Any, i: int) -> int:
        """Begun sum over all indices."""
        return sum(self.ledger.begun(row(w, i)) for w in range(self.n))


class Worker:
    """One process's run; `run` ends when the deadline (monotonic seconds) is over, usually by a kill before that."""

    def __init__(self, cache: Any, board: Board, index: int, seed: int, pipe: int) -> None:
        self.cache, self.board, self.ledger, self.index = cache, board, board.ledger, index
        self.rng = random.Random(seed)
        self.pipe = pipe
        self.ops = 0

    def complain(self, text: str) -> None:
        """Tell the parent; one write, never torn."""
        os.write(self.pipe, f"worker {self.index}: {text}"[:900].encode() + b"\n")

    # -- owned keys ------------------------------------------------------------------------------------------------------------

    def look(self, worker: int, i: int) -> int | None:
        """Read anybody's owned key and judge it; the version seen, None for a miss."""
        key, pair = f"own:{worker}:{i}", self.board.own(worker, i)
        low = self.ledger.acked(pair)
        value = self.cache.get(key, shmcache.MISS)
        high = self.ledger.begun(pair)
        if value is shmcache.MISS:
            if not self.board.may_miss and low and not any(is_delete(v) for v in range(low, high + 1)):
                self.complain(f"lost: {key} is a miss, versions {low} to {high} wanted")
            return None
        version = parse(key, value)
        if version < 0:
            self.complain(f"torn: {key} gives {value[:60]!r}... of {len(value)} bytes")
        elif not low <= version <= high or is_delete(version):
            self.complain(f"stale: {key} gives version {version}, {low} to {high} wanted")
        return version

    def write(self, i: int) -> None:
        """The next version of one of our keys, by one of the calls that can do it."""
        key, pair = f"own:{self.index}:{i}", self.board.own(self.index, i)
        version = self.ledger.begun(pair) + 1
        self.ledger.begin(pair, version)
        if is_delete(version):
            self.cache.delete(key)
        else:
            value, way = make(key, version), self.rng.randrange(6)
            done: Any = False
            if way == 0:
                done = self.cache.replace(key, value)
            elif way == 1:
                done = self.cache.add(key, value)
            elif way == 2:
                got = self.cache.gets(key)
                done = self.cache.cas(key, value, got[1]) if got else False
                if got and done is False and not self.board.may_miss:
                    self.complain(f"cas: {key} was changed by somebody else")
            elif way == 3:
                done = not self.cache.set_many({key: value})
            if not done:
                self.cache.set(key, value, self.rng.choice([0, 5000, 100000]))
        self.ledger.ack(pair, version)
        if self.rng.random() < 0.1 and not is_delete(version):
            left = self.cache.touch(key, 7000) and self.cache.ttl(key)
            if not self.board.may_miss and not left:
                self.complain(f"touch: {key} gives {left!r}")
        seen = self.look(self.index, i)
        if not self.board.may_miss and seen != (None if is_delete(version) else version):
            self.complain(f"lost: {key} gives {seen}, {version} was acknowledged a moment ago")

    def settle(self) -> None:
        """Acknowledge what the predecessor of this index left in the air (L3)."""
        for i in range(N_OWN):
            pair = self.board.own(self.index, i)
            if self.ledger.begun(pair) != self.ledger.acked(pair):
                seen = self.look(self.index, i)
                if seen is not None and seen > self.ledger.acked(pair):
                    self.ledger.ack(pair, seen)
        for i in range(N_LOGS):
            self.append(i, settle=True)
        for i in range(N_COUNTERS):
            self.count(i, settle=True)

    # -- logs, counters, shared things -----------------------------------------------------------------------------------------

    def append(self, i: int, *, settle: bool = False) -> None:
        """A log holds consecutive numbers; append the next, or begin anew now and then."""
        key, pair = f"log:{self.index}:{i}", self.board.log(self.index, i)
        low, high = self.ledger.acked(pair), self.ledger.begun(pair)
        value = self.cache.get(key)
        if value is None:
            if low and not self.board.may_miss:
                self.complain(f"lost: {key}, {low} to {high} wanted")
            last = high
        else:
            numbers = struct.unpack(f"<{len(value) // 8}Q", value)
            last = numbers[-1]
            if list(numbers) != list(range(numbers[0], last + 1)) or not low <= last <= high:
                self.complain(f"append: {key} holds {numbers[:3]}..{last}, up to {low} to {high} wanted")
            self.ledger.ack(pair, last)
        if settle:
            return
        self.ledger.begin(pair, last + 1)
        record = struct.pack("<Q", last + 1)
        if (last + 1) % LOG_RESET == 0 or not self.cache.append(key, record):
            self.cache.set(key, record)
        self.ledger.ack(pair, last + 1)

    def count(self, i: int, *, settle: bool = False) -> None:
        """An owned counter is exact; after a kill it is the old or the new number."""
        key, pair = f"count:{self.index}:{i}", self.board.counter(self.index, i)
        low, high = self.ledger.acked(pair), self.ledger.begun(pair)
        if settle:
            now = self.cache.counter(key) or 0
            if not self.board.may_miss and not low <= now <= high:
                self.complain(f"incr: {key} is {now}, {low} to {high} wanted")
            self.ledger.begin(pair, now)
            self.ledger.ack(pair, now)
            return
        self.ledger.begin(pair, high + 1)
        now = self.cache.incr(key)
        if now != high + 1:
            if not (self.board.may_miss and now == 1):
                self.complain(f"incr: {key} gives {now}, {high + 1} wanted")
            self.ledger.begin(pair, now)
        self.ledger.ack(pair, now)

    def share(self, i: int) -> None:
        """Counters everybody raises, values everybody swaps: between what was acknowledged and what was begun."""
        board, ledger = self.board, self.ledger
        pair = board.added(self.index, i)
        ledger.begin(pair, ledger.begun(pair) + 1)
        low = board.sum_acked(board.added, i)
        now = self.cache.incr(f"all:{i}")
        high = board.sum_begun(board.added, i)
        ledger.ack(pair, ledger.acked(pair) + 1)
        if not board.may_miss and not low < now <= high:
            self.complain(f"incr: all:{i} gives {now}, {low + 1} to {high} wanted")
        pair = board.swapped(self.index, i)
        key = f"swap:{i}"
        got = self.cache.gets(key)
        if got is None:
            self.cache.add(key, make(key, 0))
            if not board.may_miss and board.sum_acked(board.swapped, i):
                self.complain(f"lost: {key}")
            return
        low = board.sum_acked(board.swapped, i)
        version = parse(key, got[0])
        ledger.begin(pair, ledger.begun(pair) + 1)
        if version < 0:
            self.complain(f"torn: {key} gives {got[0][:60]!r}")
        elif self.cache.cas(key, make(key, version + 1), got[1]):
            ledger.ack(pair, ledger.acked(pair) + 1)
            if not board.may_miss:
                seen, high = parse(key, self.cache.get(key)), board.sum_begun(board.swapped, i)
                if seen < low + 1 or seen > high:
                    self.complain(f"cas: {key} gives {seen}, {low + 1} to {high} wanted")

    def mutex(self) -> None:
        """Inside the lock nobody else writes the word."""
        word = 2 * self.board.n
        try:
            with self.cache.lock("storm", lease=60.0, timeout=0.02):
                mark = (self.index << 32) | (self.ops & 0xFFFFFFFF) | 1 << 60
                self.ledger.put(word, mark)
                self.cache.get("own:0:0")
                if self.ledger.word(word) != mark:
                    self.complain("lock: two holders")
        except LockTimeout:
            pass

    def walk(self) -> None:
        """A walk gives each key once, and each of ours that stands."""
        keys = list(self.cache.keys(f"own:{self.index}:*"))
        if len(keys) != len(set(keys)):
            self.complain(f"walk: a key twice in {len(keys)}")
        for i in range(N_OWN):
            version = self.ledger.acked(self.board.own(self.index, i))
            if version == self.ledger.begun(self.board.own(self.index, i)) and version and not self.board.may_miss:
                stands = f"own:{self.index}:{i}" in keys
                if stands == is_delete(version):
                    self.complain(f"walk: own:{self.index}:{i} of version {version} is {'given' if stands else 'left out'}")

    def fleet(self) -> None:
        """A value that expires in a moment: of this key, or gone; a clear, where keys may go missing."""
        key = f"fleet:{self.rng.randrange(8)}"
        value = self.cache.get(key, shmcache.MISS)
        if value is not shmcache.MISS and parse(key, value) < 0:
            self.complain(f"torn: {key} gives {value[:60]!r}")
        self.cache.set(key, make(key, self.ops), ttl=self.rng.uniform(0.001, 0.05))
        if self.board.may_miss and self.rng.random() < 0.1:
            self.cache.clear()

    def run(self, until: float) -> None:
        """Mixed operations until killed, or until the deadline."""
        self.settle()
        heart = self.index
        while time.monotonic() < until:
            self.ops += 1
            self.ledger.put(heart, self.ledger.word(heart) + 1)
            r = self.rng.random()
            try:
                if r < 0.55:
                    self.write(self.rng.randrange(N_OWN))
                elif r < 0.70:
                    self.look(self.rng.randrange(self.board.n), self.rng.randrange(N_OWN))
                elif r < 0.78:
                    self.append(self.rng.randrange(N_LOGS))
                elif r < 0.86:
                    self.count(self.rng.randrange(N_COUNTERS))
                elif r < 0.94:
                    self.share(self.rng.randrange(N_SHARED))
                elif r < 0.96:
                    self.mutex()
                elif r < 0.97:
                    self.fleet()
                elif r < 0.98:
                    self.walk()
                elif r < 0.99:
                    self.cache.get_many([f"own:{w}:{i}" for w in range(self.board.n) for i in range(5)])
                else:
                    self.cache.clean(50)
            except ShmCacheError as error:
                self.complain(f"{type(error).__name__}: {error}")
                return
