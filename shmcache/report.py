"""What a report says of a segment: numbers over a sampled interval, a survey of the items, and warnings in plain words.

I1  Collecting looks only: a read-only View, no guard, no statistics, no use bits; values are never read.
I2  Every warning names the numbers it is drawn from and what to do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from . import inspect
from .distribution import Survey, survey
from .inspect import Guard, View
from .processes import Process, attached, user_name

__all__ = ["Point", "Report", "Warn", "assemble", "collect", "warnings"]

HOUR: Final = 3600.0
RATES: Final = ("hits", "misses", "sets", "deletes", "expired", "evicted")


@dataclass(frozen=True, slots=True)
class Warn:
    """One warning. `level`: bad (something is broken), poor (it costs), or note."""

    level: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Point:
    """Rates a second in one part of the interval; `at` is seconds since its start."""

    at: float
    rates: dict[str, float]


@dataclass(slots=True)
class Report:
    """Everything a page shows. Times are Unix times, rates are per second over `seconds`."""

    name: str
    form: str
    status: str
    owner: str
    taken: float
    seconds: float
    header: dict[str, Any]
    settings: dict[str, Any]
    stats: dict[str, int]
    rates: dict[str, float]
    points: list[Point]
    survey: Survey
    shards: list[dict[str, Any]]
    guards: list[Guard]
    findings: list[dict[str, Any]]
    processes: list[Process]
    semaphores: str
    warnings: list[Warn]

    @property
    def page_bytes(self) -> int:
        """Bytes for items in the whole segment."""
        return self.stats["pages"] * self.stats["page_size"]


def collect(view: View, *, interval: float = 2.0, points: int = 20, sample: int | None = 200_000, top: int = 12) -> Report:
    """Look at a segment for `interval` seconds and once through its items.

    Args: points: parts of the interval with rates of their own. sample: items surveyed, about; None = all. top: length of the
    lists of keys. A copy is not watched.
    """
    history = [(time.monotonic(), view.stats())]
    if view.found.form != "file" and interval > 0:
        step = interval / points
        for i in range(points):
            time.sleep(max(history[0][0] + step * (i + 1) - time.monotonic(), step / 2))
            history.append((time.monotonic(), view.stats()))
    return assemble(view, history, sample=sample, top=top)


def assemble(
    view: View, history: Sequence[tuple[float, dict[str, int]]], *, sample: int | None = 200_000, top: int = 12,
    findings: list[dict[str, Any]] | None = None,
) -> Report:  # fmt: skip
    """A report from readings of the counters, oldest first, each with its time on the monotonic clock.

    Args: history: at least one reading; the last is what the report shows. findings: those of an audit made before; None = audit
    now.
    """
    (start, first), (end, stats) = history[0], history[-1]
    seconds = end - start
    series = [
        Point(now - start, {n: (after[n] - before[n]) / max(now - then, 1e-6) for n in RATES})
        for (then, before), (now, after) in pairwise(history)
    ]
    report = Report(
        name=view.found.name,
        form=view.found.form,
        status=inspect.status(view.found, view),
        owner=user_name(view.found.uid),
        taken=time.time(),
        seconds=seconds,
        header=view.header,
        settings=inspect.settings(view.header),
        stats=stats,
        rates={name: (stats[name] - first[name]) / max(seconds, 1e-6) for name in RATES},
        points=series,
        survey=survey(view, top=top, sample=sample),
        shards=view.shards(),
        guards=view.guards(),
        findings=view.check() if findings is None else findings,
        processes=attached(view.found),
        semaphores=view.sem_problem or "ok",
        warnings=[],
    )
    report.warnings = warnings(report)
    return report


def hit_ratio(hits: float, misses: float) -> float | None:
    """Hits over reads; None without reads."""
    return hits / (hits + misses) if hits + misses else None


def warnings(report: Report) -> list[Warn]:
    """What an operator should know, the worst first."""
    order = {"bad": 0, "poor": 1, "note": 2}
    return sorted([*_broken(report), *_space(report), *_shape(report)], key=lambda w: order[w.level])


def _broken(r: Report) -> Iterator[Warn]:
    s = r.stats
    if r.findings:
        codes = ", ".join(sorted({str(f["code"]) for f in r.findings}))
        yield Warn(
            "bad",
            f"The audit found {len(r.findings)} damaged places",
            f"Kinds: {codes}. Reads of damaged items are misses;"
            " the next write to a key mends it. `shmcache check` lists them all.",
        )
    for g in r.guards:
        if g.state == "stopped":
            yield Warn(
                "bad",
                f"Writers of shard {g.shard} cannot go on",
                f"Process {g.pid} ({g.command or 'unknown'}) holds its guard"
                f" and is stopped. Writes there end in LockTimeout until it goes on (kill -CONT {g.pid}) or ends; reads are"
                " not affected.",
            )
        elif g.state == "dead":
            yield Warn(
                "note",
                f"Shard {g.shard} waits for its recovery",
                f"Process {g.pid} died while it held the guard; the next write to the shard repairs it.",
            )
    if r.status == "removed":
        yield Warn("bad", "The segment was removed", "Who has it attached may read; writes raise GuardLost until reattach().")
    elif r.form != "file" and r.semaphores != "ok":
        yield Warn(
            "bad",
            "The semaphores are gone",
            f"Semaphores: {r.semaphores}. Writes raise GuardLost. Remove the segment"
            " (`shmcache rm`) and let the workers open it again.",
        )
    if s["corrupt"]:
        yield Warn(
            "poor",
            f"{s['corrupt']:,} reads met a damaged item",
            "They were answered as misses. Something wrote into the segment past the library, or the memory is faulty.",
        )
    if s["guard_timeouts"]:
        yield Warn(
            "poor",
            f"{s['guard_timeouts']:,} writes gave up waiting for a guard",
            "A holder was stopped, swapped out or dumping core for longer than lock_timeout.",
        )
    if s["recoveries"]:
        yield Warn(
            "note",
            f"{s['recoveries']:,} shards were recovered after a writer's death",
            "Nothing was lost. Workers that are killed while they write are worth a look.",
        )
    if r.header["perms"] & 0o007:
        yield Warn("poor", "Other users may open the segment", f"Its permissions are 0{r.header['perms']:o}; 0600 is private.")


def _space(r: Report) -> Iterator[Warn]:
    s = r.stats
    early, evicted = s["evicted_before_ttl"], s["evicted"]
    if evicted and early / evicted > 0.1:
        wanted, span = size_wanted(r), span_of(r)
        of = "the last hour's set" if span >= HOUR else f"what was stored in the {span / 60:.0f} minutes since it was made"
        if span < 120:
            of = f"what was stored in the {span:.0f} seconds since it was made"
        text = f"{early:,} of {evicted:,} evicted items had lifetime left: the segment is too small; " + (
            f"{wanted >> 20}M would have held {of}." if wanted else f"more than 16 times its size would have held {of}."
        )
        yield Warn("poor", f"{early / evicted:.0%} of evictions hit items younger than their lifetime", text)
    if s["no_space"]:
        yield Warn(
            "poor",
            f"{s['no_space']:,} writes found no space",
            "eviction=none refuses what does not fit. Give a larger size, or lifetimes, or eviction=auto.",
        )
    used = s["pages"] - s["pages_free"]
    if used and s["dead_bytes"] > 0.25 * used * s["page_size"] and s["pages_free"] < 0.1 * s["pages"]:
        yield Warn(
            "note",
            f"{s['dead_bytes'] / (used * s['page_size']):.0%} of the memory in use is dead",
            "Replaced and removed items not yet given back; the next writes compact it.",
        )
    seen = r.survey
    if seen.expired > 0.25 * (seen.items + seen.expired) and seen.expired > 100:
        yield Warn(
            "note",
            f"{seen.expired / (seen.items + seen.expired):.0%} of the items there have expired",
            f"They are absent for everybody; their memory comes back within clean_period ({r.settings['clean_period']:g} s)"
            " of traffic, or with `shmcache clean`.",
        )


def _shape(r: Report) -> Iterator[Warn]:
    s, seen = r.stats, r.survey
    reads, ratio = s["hits"] + s["misses"], hit_ratio(s["hits"], s["misses"])
    if ratio is not None and reads >= 1000 and ratio < 0.5:
        yield Warn(
            "poor",
            f"Only {ratio:.0%} of {reads:,} reads were hits",
            "Either the keys are seldom asked for twice within their lifetime, or they are evicted before.",
        )
    full = seen.fill[-1] / max(sum(seen.fill), 1)
    if full > 0.2:
        yield Warn(
            "poor",
            f"{full:.0%} of the buckets are full",
            "The index is too small for so many items: give more buckets=, or a"
            f" smaller item_size= than {r.settings['item_size']} when the segment is made again.",
        )
    if s["slots_used"] >= 0.9 * r.settings["workers"]:
        yield Warn(
            "note",
            f"{s['slots_used']} of {r.settings['workers']} worker slots were used",
            "When all are taken by live processes, writes of others raise TooManyWorkers; give workers=.",
        )
    if s["leases_full"]:
        yield Warn(
            "note",
            f"The lease table was full {s['leases_full']:,} times",
            "get_or_set then called its factory without a lease, lock() timed out. More guards= give more leases.",
        )


def span_of(r: Report) -> float:
    """The seconds that `size_wanted` speaks of: the last hour, or the segment's age if that is less."""
    return min(r.taken - inspect.created_at(r.header), HOUR)


def size_wanted(r: Report) -> int | None:
    """Bytes that would have held what was stored in the last hour; None where nothing can be said, or beyond 16 times.

    By Little's law: items evicted early each second (over the interval if it saw any, else since creation), times the mean time
    such an item would have stayed (the lifetimes left of those that are there, an hour at most), are the items missing; each
    needs the memory a stored one takes. A key evicted and stored again counts each time, so this is an upper bound. Rounded up
    to 1/16 of a power of two.
    """
    s, seen, span = r.stats, r.survey, span_of(r)
    n = sum(seen.ttls.items)
    if not n or span <= 0 or not s["evicted"]:
        return None
    stays = sum(count * min(math.sqrt(max(low, 1) * (high or low * 2)), span) for low, high, count, _ in seen.ttls.classes()) / n
    age = max(r.taken - inspect.created_at(r.header), 1.0)
    rate = (r.rates["evicted"] or s["evicted"] / age) * s["evicted_before_ttl"] / s["evicted"]
    times = 1 + rate * stays / max(s["items"], 1)
    if times > 16:
        return None
    wanted = r.header["size"] * times
    step = max(1 << 20, 1 << (math.ceil(math.log2(wanted)) - 4))
    return int(math.ceil(wanted / step) * step)
