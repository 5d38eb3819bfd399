"""survey: histograms of what lies in a segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import shmcache
from shmcache.catalog import Found
from shmcache.distribution import AGES, SIZES, Histogram, survey
from shmcache.inspect import View, locate


@pytest.fixture
def view(unique_name: Callable[[], str]) -> Iterator[View]:
    """A view of a segment of 2,100 items."""
    engine = shmcache.open(f"posix:///{unique_name()}", size="4M", guards=2)
    for i in range(1000):
        engine.set(f"small:{i}", b"x" * 3)
        engine.set(f"medium:{i}", "y" * 100, ttl=30)
    for i in range(100):
        engine.set(f"large:{i}", [b"z" * (1000 + i)], ttl=7200)
    for _ in range(4):
        engine.get("small:7")
    found = locate(f"posix:{engine.url.path}")
    assert isinstance(found, Found)
    try:
        with View(found) as opened:
            yield opened
    finally:
        engine.unlink()
        engine.close()


def test_counts(view: View) -> None:
    """Every item is counted once in each histogram, with its bytes."""
    seen = survey(view)
    assert (seen.share, seen.items, seen.expired, seen.corrupt) == (1.0, 2100, 0, 0)
    assert sum(seen.sizes.items) == sum(seen.ages.items) == sum(seen.ttls.items) + seen.ttls.never == sum(seen.uses) == 2100
    assert seen.types == {"bytes": 1000, "str": 1000, "msgpack": 100}
    assert seen.ttls.never == 1000
    assert sum(seen.sizes.bytes) == seen.bytes == sum(seen.type_bytes.values()) == sum(seen.shard_bytes.values())
    classes = {low: n for low, _, n, _ in seen.sizes.classes() if n}
    assert (classes[0], classes[64], classes.get(256, 0) + classes[1024]) == (1000, 1000, 100)


def test_buckets(view: View) -> None:
    """Every bucket is counted once by its entries, and the entries add up."""
    seen = survey(view)
    assert sum(seen.fill) == view.header["n_buckets"] * view.header["n_shards"]
    assert sum(n * buckets for n, buckets in enumerate(seen.fill)) == 2100


def test_probe_length(view: View) -> None:
    """Each item is read from its home bucket, or from that and the other one."""
    seen = survey(view)
    assert seen.probes[0] == 0
    assert sum(seen.probes) == 2100
    assert seen.probes[1] > seen.probes[2]


def test_biggest_and_hottest(view: View) -> None:
    """The largest and the most used keys come first."""
    seen = survey(view, top=3)
    assert [item.key for item in seen.biggest] == ["large:99", "large:98", "large:97"]
    assert seen.hottest[0].key == "small:7"


def test_expired_items_are_counted_apart(view: View) -> None:
    """Expired items that still lie there count as expired only."""
    view.table._set_clock(view.table._now_ms() + 60_000)
    seen = survey(view)
    assert (seen.items, seen.expired, seen.expired_bytes) == (1100, 1000, 100_000)


def test_sample(view: View) -> None:
    """A sample walks a share of the groups and sees about that share of the items."""
    seen = survey(view, sample=500)
    assert 0 < seen.share < 1
    assert abs(seen.items - 2100 * seen.share) < 300


def test_classes() -> None:
    """A value on an edge belongs to the class above it."""
    histogram = Histogram((10, 20))
    for value in (0, 9, 10, 19, 20, 1000):
        histogram.add(value, 1)
    assert list(histogram.classes()) == [(0, 10, 2, 2), (10, 20, 2, 2), (20, None, 2, 2)]
    assert (tuple(sorted(SIZES)), tuple(sorted(AGES))) == (SIZES, AGES)
