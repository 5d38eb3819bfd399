"""How a segment's items are spread: sizes, lifetimes, ages, bucket fill, types, lanes, and the largest and most used keys.

I1  One pass over a View; memory is that of the histograms, whatever the number of items.
I2  A survey of a sample walks whole bucket groups, evenly spaced; a key's group depends on its keyed hash alone, so groups are a
    random sample of keys. `share` is the part walked; counts are as seen, not scaled.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from .inspect import Item, View

__all__ = ["AGES", "SIZES", "Histogram", "Survey", "survey"]

SIZES: Final = tuple(4**n for n in range(1, 15))
"""Upper edges of the size classes in bytes: powers of four, 4 to 256 MiB."""
AGES: Final = (1, 10, 60, 300, 1800, 3600, 6 * 3600, 86400, 7 * 86400, 30 * 86400)
"""Upper edges of the classes of ages and lifetimes in seconds."""
SLOTS: Final = 7
"""Entries of a bucket."""


@dataclass(slots=True)
class Histogram:
    """Counts by class. Class i holds what is below edges[i] and not below edges[i-1]; the last class has no upper edge."""

    edges: tuple[int, ...]
    items: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    never: int = 0  #: items without a value here: lifetimes that never end

    def __post_init__(self) -> None:
        self.items = self.items or [0] * (len(self.edges) + 1)
        self.bytes = self.bytes or [0] * (len(self.edges) + 1)

    def add(self, value: float, size: int) -> None:
        i = bisect_right(self.edges, value)
        self.items[i] += 1
        self.bytes[i] += size

    def classes(self) -> Iterator[tuple[int, int | None, int, int]]:
        """(from, below, items, bytes) of each class; below None for the last."""
        edges: tuple[int | None, ...] = (0, *self.edges, None)
        for i, n in enumerate(self.items):
            yield edges[i] or 0, edges[i + 1], n, self.bytes[i]


@dataclass(slots=True)
class Survey:
    """What one pass saw. `items` and the histograms count live items; bytes are those of their values."""

    share: float = 1.0
    items: int = 0
    bytes: int = 0
    expired: int = 0
    expired_bytes: int = 0
    corrupt: int = 0  #: entries that lead to no item, or to one rewritten under every look; values are not compared
    sizes: Histogram = field(default_factory=lambda: Histogram(SIZES))
    ttls: Histogram = field(default_factory=lambda: Histogram(AGES))
    ages: Histogram = field(default_factory=lambda: Histogram(AGES))
    fill: list[int] = field(default_factory=lambda: [0] * (SLOTS + 1))  #: buckets by entries in use
    probes: list[int] = field(default_factory=lambda: [0] * 3)  #: items by buckets a read looks at: [1] home, [2] the other too
    uses: list[int] = field(default_factory=lambda: [0] * 4)
    types: Counter[str] = field(default_factory=Counter)
    type_bytes: Counter[str] = field(default_factory=Counter)
    lanes: Counter[str] = field(default_factory=Counter)
    shard_bytes: Counter[int] = field(default_factory=Counter)
    shard_expired: Counter[int] = field(default_factory=Counter)  #: bytes of the log
    biggest: list[Item] = field(default_factory=list)  #: largest first
    hottest: list[Item] = field(default_factory=list)  #: highest use class first, larger ones first in a class

    def rows(self) -> Iterator[tuple[str, Any, Any, int, int | None]]:
        """(histogram, from, below, items, bytes) of every class of every histogram."""
        for name, histogram in (("size", self.sizes), ("ttl", self.ttls), ("age", self.ages)):
            for low, high, n, size in histogram.classes():
                yield name, low, high, n, size
            if name == "ttl":
                yield name, None, None, histogram.never, None
        for n, buckets in enumerate(self.fill):
            yield "bucket_fill", n, n + 1, buckets, None
        for n in (1, 2):
            yield "probe_length", n, n + 1, self.probes[n], None
        for use, n in enumerate(self.uses):
            yield "use", use, use + 1, n, None
        for lane, n in self.lanes.most_common():
            yield "lane", lane, None, n, None
        for kind, n in self.types.most_common():
            yield "type", kind, None, n, self.type_bytes[kind]


def survey(view: View, *, top: int = 10, sample: int | None = None) -> Survey:
    """Walk the items once.

    Args: top: length of `biggest` and `hottest`. sample: walk only so many groups that about this many items are seen; None =
    all. The pass takes about 2 s for a million items.
    """
    groups, n_groups = range(view.n_groups), view.n_groups
    if sample is not None:
        items = max(view.stats()["items"], 1)
        groups = range(0, n_groups, max(1, min(items // max(sample, 1), n_groups)))
    seen = Survey(share=len(groups) / n_groups)
    for group in groups:
        _add_group(seen, list(view.items(expired=True, groups=(group,), content=False)), top)
    buckets = view.header["n_buckets"] * view.header["n_shards"]
    seen.fill[0] = max(round(buckets * seen.share) - sum(seen.fill[1:]), 0)
    return seen


def _whole(item: Item) -> int:
    """Bytes of the log an item takes, about: a header of 16, key, value and check, rounded to 8."""
    key = item.key if isinstance(item.key, bytes) else (item.key or "").encode()
    return (16 + len(key) + item.size + 4 + 7) & ~7


def _add_group(seen: Survey, items: list[Item], top: int) -> None:
    for n in Counter(item.bucket for item in items).values():
        seen.fill[min(n, SLOTS)] += 1
    live = []
    for item in items:
        if item.state == "expired":
            seen.expired += 1
            seen.expired_bytes += item.size
            seen.shard_expired[item.shard] += _whole(item)
        elif item.state == "live":
            live.append(item)
        else:
            seen.corrupt += 1
    for item in live:
        size = item.size
        seen.bytes += size
        seen.sizes.add(size, size)
        seen.ages.add(item.age, size)
        if item.ttl is None:
            seen.ttls.never += 1
        else:
            seen.ttls.add(item.ttl, size)
        seen.uses[item.use & 3] += 1
        seen.probes[min(item.probes, 2)] += 1
        seen.types[item.type] += 1
        seen.type_bytes[item.type] += size
        seen.lanes[item.lane] += 1
        seen.shard_bytes[item.shard] += size
    seen.items += len(live)
    seen.biggest = heapq.nlargest(top, [*seen.biggest, *live], key=lambda i: i.size)
    seen.hottest = heapq.nlargest(top, [*seen.hottest, *live], key=lambda i: (i.use, i.size))
