"""How long a call takes on this machine, beside a private dict in the same run: what `shmcache bench` prints.

The workloads and the way of timing are those of the project's own comparison with other caches (tools/bench), which
builds on this file. Bias, which every report repeats: the loop over the keys is part of every figure, which favours the
slower of two; dict is asked with the very key objects it holds and hands out references, which favours dict.

Timing: a pass is a few milliseconds of calls; the figure is the median over passes. Subjects that answer within the process
are timed by the processor time of the thread, which other processes cannot lengthen but through caches; those that wait
for a server, by the clock. Ratios hold within one run only.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import resource
import time
import uuid
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from .engine import Engine
from .registry import open as open_engine

__all__ = [
    "BIAS", "OBJECT", "WORKLOADS", "Call", "Field", "Plan", "Report", "Subject", "Tail", "Timing", "chunked", "dict_subject",
    "engine_subject", "measure", "one_argument", "run", "tail", "tails", "text", "two_arguments", "work", "zipf",
]  # fmt: skip

BIAS = (
    "Bias: written by the makers of shmcache. The loop over the keys is part of every figure, which favours the slower of "
    "two. dict is asked with the key objects it holds and returns references, which favours dict. Clients of servers are "
    "measured from Python, one request at a time, on the machine of the server."
)
OBJECT = {"user": "user000123", "domain": "example.com", "ha1": "5f4dcc3b5aa765d61d8327deb882cf99", "uid": 1000}
ZIPF = 0.99

Call = Callable[..., Any]


@dataclass
class Subject:
    """What is measured: the calls of one store, each as cheap as its author offers it; None: it has no such call.

    key makes the type of key the store wants, ahead of the timing. fork gives a child process its own subject. local says
    that calls are answered within the process, without waiting for another.
    """

    name: str
    get: Call
    set: Call | None
    get_many: Call | None = None
    incr: Call | None = None
    set_ttl: Call | None = None
    set_object: Call | None = None
    get_object: Call | None = None
    incr_loop: Callable[[int], None] | None = None
    key: Callable[[str], Any] = str
    fork: Callable[[], Subject] | None = None
    close: Callable[[], None] = lambda: None
    local: bool = True
    notes: str = ""


@dataclass(frozen=True)
class Timing:
    """Nanoseconds a call: median, least and most over the passes."""

    ns: float
    least: float
    most: float
    passes: int


@dataclass(frozen=True)
class Tail:
    """Percentiles of single calls in ns, the clock's two readings included.

    switches says how often the kernel took the processor away meanwhile; for subjects that answer within the process as
    many calls of over half a millisecond are left out of the percentiles, not of the worst.
    """

    p50: int
    p99: int
    p999: int
    p9999: int
    worst: int
    calls: int
    switches: int


@dataclass(frozen=True)
class Plan:
    """Sizes of a run. seconds is the time a timing takes at least; chunk the calls of a pass."""

    items: int = 100_000
    value_size: int = 100
    large_items: int = 25_000
    large_size: int = 4096
    seconds: float = 0.15
    chunk: int = 20_000
    tail_calls: int = 200_000
    seed: int = 1


def zipf(n_items: int, n_calls: int, seed: int) -> list[int]:
    """Item numbers drawn by Zipf's law with exponent 0.99; which items are frequent is drawn as well."""
    places = list(range(n_items))
    random.Random(seed).shuffle(places)
    weights = list(itertools.accumulate(1.0 / (rank + 1) ** ZIPF for rank in range(n_items)))
    return random.Random(seed + 1).choices(places, cum_weights=weights, k=n_calls)


def measure(call: Callable[[], int], seconds: float, local: bool = True) -> Timing:
    """Time passes of `call`, which returns how many calls it made, for `seconds`, at least five passes.

    local: by the processor time of this thread, else by the clock.
    """
    call()
    clock = time.thread_time_ns if local else time.perf_counter_ns
    passes: list[float] = []
    until = time.perf_counter() + seconds
    while len(passes) < 5 or time.perf_counter() < until:
        start = clock()
        n = call()
        passes.append((clock() - start) / n)
    return Timing(median(passes), min(passes), max(passes), len(passes))


def tail(call: Call, keys: Sequence[Any], extra: tuple[Any, ...] = (), local: bool = True) -> Tail:
    """Time every single call of call(key, *extra); extra is one value or nothing."""
    clock = time.perf_counter_ns
    took = array("q", bytes(8 * len(keys)))
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
    if extra:
        (value,) = extra
        for i, key in enumerate(keys):
            start = clock()
            call(key, value)
            took[i] = clock() - start
    else:
        for i, key in enumerate(keys):
            start = clock()
            call(key)
            took[i] = clock() - start
    switches = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw - before
    ordered = sorted(took)
    worst = ordered[-1]
    if local:
        sliced = min(switches, sum(ns > 500_000 for ns in ordered[-switches:])) if switches else 0
        ordered = ordered[: len(ordered) - sliced]

    def at(share: float) -> int:
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)]

    return Tail(at(0.5), at(0.99), at(0.999), at(0.9999), worst, len(took), switches)


# ---- loops: as little as possible beside the call ------------------------------------------------------------------------


def chunked(keys: list[Any], chunk: int) -> Iterator[list[Any]]:
    """The keys in whole chunks, over and over."""
    return itertools.cycle([keys[i : i + chunk] for i in range(0, len(keys) - chunk + 1, chunk)])


def one_argument(call: Call, keys: list[Any], chunk: int) -> Callable[[], int]:
    """A pass of call(key) over the next chunk of keys."""
    chunks = chunked(keys, chunk)

    def passed() -> int:
        some = next(chunks)
        for key in some:
            call(key)
        return len(some)

    return passed


def two_arguments(call: Call, keys: list[Any], value: Any, chunk: int) -> Callable[[], int]:
    """A pass of call(key, value) over the next chunk of keys."""
    chunks = chunked(keys, chunk)

    def passed() -> int:
        some = next(chunks)
        for key in some:
            call(key, value)
        return len(some)

    return passed


@dataclass
class Field:
    """A subject filled with items, and the keys to ask it for."""

    subject: Subject
    plan: Plan
    prefix: str = ""
    value: bytes = b""
    keys: list[Any] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)
    large: list[Any] = field(default_factory=list)

    @classmethod
    def fill(cls, subject: Subject, plan: Plan, prefix: str = "") -> Field:
        """Store the items; a subject without set (a memoized function) is asked for them instead."""
        draw = random.Random(plan.seed)
        made = cls(subject, plan, prefix, draw.randbytes(plan.value_size))
        made.keys = [subject.key(f"{prefix}passwd_user{i:06d}") for i in range(plan.items)]
        n_calls = max(5 * plan.items, 2 * plan.chunk) if subject.local else plan.items
        made.asked = [made.keys[i] for i in zipf(plan.items, n_calls, plan.seed)]
        if subject.set is None:
            for key in made.keys:
                subject.get(key)
        else:
            for key in made.keys:
                subject.set(key, draw.randbytes(plan.value_size))
        gc.collect()
        gc.freeze()
        return made

    @property
    def chunk(self) -> int:
        """Calls of a pass: servers answer a hundred times more slowly."""
        return self.plan.chunk if self.subject.local else max(self.plan.chunk // 20, 200)

    def fill_large(self) -> None:
        """Store the large items once."""
        if self.subject.set is None or self.large:
            return
        draw = random.Random(self.plan.seed)
        keys = [self.subject.key(f"{self.prefix}large_{i:05d}") for i in range(self.plan.large_items)]
        for key in keys:
            self.subject.set(key, draw.randbytes(self.plan.large_size))
        places = zipf(self.plan.large_items, max(50_000, 2 * self.chunk), self.plan.seed)
        self.large = [keys[i] for i in places]


# ---- workloads: a filled subject gives one pass, or None where the subject has no such call ------------------------------

Maker = Callable[[Field], Callable[[], int] | None]


def _get_zipf(f: Field) -> Callable[[], int]:
    return one_argument(f.subject.get, f.asked, f.chunk)


def _get_hot(f: Field) -> Callable[[], int]:
    return one_argument(f.subject.get, f.keys[:64] * (f.chunk // 64 + 1), f.chunk)


def _get_large(f: Field) -> Callable[[], int] | None:
    f.fill_large()
    return one_argument(f.subject.get, f.large, f.chunk // 4) if f.large else None


def _miss(f: Field) -> Callable[[], int] | None:
    if f.subject.set is None:
        return None
    absent = [f.subject.key(f"{f.prefix}absent_user{i:06d}") for i in range(64)]
    return one_argument(f.subject.get, absent * (f.chunk // 64 + 1), f.chunk)


def _many(f: Field) -> Callable[[], int] | None:
    call = f.subject.get_many
    if call is None:
        return None
    batches = itertools.cycle([f.asked[i : i + 100] for i in range(0, len(f.asked) - 99, 100)])
    n = max(f.chunk // 100, 1)

    def passed() -> int:
        for batch in itertools.islice(batches, n):
            call(batch)
        return 100 * n

    return passed


def _set(f: Field) -> Callable[[], int] | None:
    return two_arguments(f.subject.set, f.asked, f.value, f.chunk) if f.subject.set else None


def _incr(f: Field) -> Callable[[], int] | None:
    n, call, own = f.chunk, f.subject.incr, f.subject.incr_loop
    if own is not None:

        def inline() -> int:
            own(n)
            return n

        return inline
    if call is None:
        return None
    return one_argument(call, [f.subject.key(f"{f.prefix}counter")] * n, n)


def _object_get(f: Field) -> Callable[[], int] | None:
    put, get = f.subject.set_object or f.subject.set, f.subject.get_object or f.subject.get
    if put is None:
        return None
    keys = [f.subject.key(f"{f.prefix}object_{i:02d}") for i in range(64)]
    for key in keys:
        put(key, OBJECT)
    return one_argument(get, keys * (f.chunk // 64 + 1), f.chunk)


def _object_set(f: Field) -> Callable[[], int] | None:
    put = f.subject.set_object or f.subject.set
    keys = [f.subject.key(f"{f.prefix}object_{i:02d}") for i in range(64)]
    return two_arguments(put, keys * (f.chunk // 64 + 1), OBJECT, f.chunk) if put else None


def _get_lived(f: Field) -> Callable[[], int] | None:
    """The same gets as get-hot, of items with a lifetime of an hour."""
    put = f.subject.set_ttl
    if put is None:
        return None
    keys = [f.subject.key(f"{f.prefix}lived_user{i:06d}") for i in range(64)]
    for key in keys:
        put(key, f.value)
    return one_argument(f.subject.get, keys * (f.chunk // 64 + 1), f.chunk)


WORKLOADS: dict[str, tuple[str, Maker]] = {
    "get": ("get 100 B, Zipf over 100k keys", _get_zipf),
    "get-hot": ("get 100 B, 64 hot keys", _get_hot),
    "get-4k": ("get 4 KiB, Zipf", _get_large),
    "miss": ("miss", _miss),
    "many": ("multi-get of 100 keys, per key", _many),
    "set": ("set 100 B (overwrite)", _set),
    "incr": ("incr, one counter", _incr),
    "get-object": ("get of a small dict (4 fields)", _object_get),
    "set-object": ("set of the same dict", _object_set),
    "get-ttl": ("get 100 B, 64 hot keys with a lifetime", _get_lived),
}


def work(f: Field, name: str) -> Timing | None:
    """Time one workload on a filled subject; None where the subject has no such call."""
    made = WORKLOADS[name][1](f)
    return None if made is None else measure(made, f.plan.seconds, f.subject.local)


def tails(f: Field) -> dict[str, Tail]:
    """Percentiles of get and of set."""
    n = min(f.plan.tail_calls if f.subject.local else f.plan.tail_calls // 20, len(f.asked))
    out = {"get": tail(f.subject.get, f.asked[:n], (), f.subject.local)}
    if f.subject.set is not None:
        out["set"] = tail(f.subject.set, f.asked[:n], (f.value,), f.subject.local)
    return out


# ---- the two subjects of the short form ----------------------------------------------------------------------------------


def dict_subject() -> Subject:
    """A private dict; a forked child gets one of its own objects."""
    d: dict[str, Any] = {}

    def incr_loop(n: int) -> None:
        for _ in itertools.repeat(None, n):
            d["counter"] += 1

    def get_many(keys: list[str]) -> dict[str, Any]:
        return {key: d[key] for key in keys if key in d}

    def fork() -> Subject:
        own = dict_subject()
        put = own.set
        assert put is not None
        for key, value in d.items():
            put(key, bytes(bytearray(value)) if isinstance(value, bytes) else value)
        return own

    d["counter"] = 0
    return Subject(
        "dict", d.get, d.__setitem__, get_many, None, None, incr_loop=incr_loop, fork=fork,
        notes="private to the process; returns references; += in place of incr",
    )  # fmt: skip


LOCAL = ("posix", "sysv", "anon", "memory")
"""Schemes of engines that answer within the process."""


def engine_subject(engine: Engine, name: str = "shmcache") -> Subject:
    """An open engine; timed by the clock unless its scheme is one of LOCAL."""
    put = engine.set

    def set_ttl(key: str, value: Any) -> Any:
        return put(key, value, 3600)

    local = engine.url.scheme in LOCAL
    return Subject(name, engine.get, put, engine.get_many, engine.incr, set_ttl, close=engine.close, local=local)


@dataclass(frozen=True)
class Report:
    """What `run` found, by subject and workload."""

    url: str
    timings: dict[str, dict[str, Timing]]
    tails: dict[str, dict[str, Tail]]
    loop: float


def run(
    url: str | Engine | None = None, options: dict[str, Any] | None = None, plan: Plan | None = None, rounds: int = 3,
    progress: Callable[[int], None] | None = None,
) -> Report:  # fmt: skip
    """Measure the engine of a URL beside a dict in this process.

    Args:
        url: engine URL, or an open engine; None = an anonymous segment of 192 MiB, which holds all of the default plan, gone
            at the end. An existing segment is used as it is: the keys have a random prefix and are deleted at the end, but
            where memory is short they push others out.
        options: engine options.
        plan: sizes.
        rounds: times everything is measured, dict and engine in turn; the round of the middle figure counts.
        progress: called after each measurement with how many are done, of rounds * len(WORKLOADS) * 2.

    Raises: what opening and calling the engine raise.
    """
    plan = plan or Plan()
    prefix, made_here = f"bench-{uuid.uuid4().hex[:8]}:", url is None
    if url is None:
        url, options = f"anon:{prefix[:-1]}://", {"size": "192M", **(options or {})}
    engine = url if isinstance(url, Engine) else open_engine(url, **(options or {}))
    fields = [Field.fill(dict_subject(), plan, prefix), Field.fill(engine_subject(engine), plan, prefix)]
    timings: dict[str, dict[str, Timing]] = {f.subject.name: {} for f in fields}
    done = 0
    try:
        for name in WORKLOADS:
            made: dict[str, list[Timing]] = {f.subject.name: [] for f in fields}
            for _ in range(rounds):
                for f in fields:
                    timing = work(f, name)
                    done += 1
                    if progress is not None:
                        progress(done)
                    if timing is not None:
                        made[f.subject.name].append(timing)
            for subject, found in made.items():
                if found:
                    timings[subject][name] = sorted(found, key=lambda t: t.ns)[len(found) // 2]
        ends = {f.subject.name: tails(f) for f in fields}
        loop = measure(one_argument(_nothing, fields[0].asked, plan.chunk), plan.seconds).ns
    finally:
        gc.unfreeze()
        engine.delete_match(prefix + "*")
        if made_here:
            engine.close()
    return Report(str(engine.url), timings, ends, loop)


def _nothing(_key: Any) -> None:
    return None


def text(report: Report) -> str:
    """The report as it is printed."""
    lines = [BIAS, "", f"{report.url}; ns a call, ratio to dict; {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}",
             f"{'':40}{'dict':>9}{'shmcache':>10}{'ratio':>8}   least..most of the passes"]  # fmt: skip
    ours, dicts = report.timings["shmcache"], report.timings["dict"]
    for name, (what, _) in WORKLOADS.items():
        if name not in ours:
            continue
        mine, base = ours[name], dicts.get(name)
        left = f"{base.ns:>9.0f}" if base else f"{'-':>9}"
        ratio = f"{mine.ns / base.ns:>8.2f}" if base else f"{'-':>8}"
        lines.append(f"{what:40}{left}{mine.ns:>10.0f}{ratio}   {mine.least:.0f}..{mine.most:.0f}")
    lines += ["", f"{'single calls, clock included':40}{'p50':>9}{'p99':>9}{'p99.9':>9}{'p99.99':>9}"]
    for subject, found in report.tails.items():
        for name, t in found.items():
            lines.append(f"{subject + ' ' + name:40}{t.p50:>9}{t.p99:>9}{t.p999:>9}{t.p9999:>9}")
    lines.append(f"\nan empty Python function in the same loop: {report.loop:.0f} ns")
    return "\n".join(lines)
