"""A collector for prometheus_client: the statistics of segments and engines, read at each scrape.

    from prometheus_client import REGISTRY, start_http_server
    from shmcache.prometheus import CacheCollector
    REGISTRY.register(CacheCollector("sessions", "sysv:///tokens"))
    start_http_server(9100, addr="127.0.0.1")

I1  A scrape attaches read-only, takes no guard and counts as no read; with pre-forked workers any one of them, or a process of
    its own, may answer for all.
I2  A target that cannot be read at a scrape gives shmcache_up 0 and no other sample; the scrape itself does not fail.

Needs the package prometheus_client.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from .engine import Engine
from .errors import ShmCacheError
from .inspect import View, locate
from .url import Url

__all__ = ["CacheCollector"]

COUNTERS: Final = {
    "hits": "Reads that found an item.",
    "misses": "Reads that found none.",
    "sets": "Items stored.",
    "deletes": "Items removed because somebody asked.",
    "expired": "Items removed because their lifetime was over.",
    "evicted": "Items removed because space was needed.",
    "evicted_before_ttl": "Evicted items whose lifetime was not over.",
    "incrs": "Counters changed.",
    "touches": "Lifetimes renewed.",
    "no_space": "Writes refused for want of space.",
    "corrupt": "Reads that met a damaged item.",
    "read_contended": "Reads given up because of writers.",
    "guard_waits": "Guards that had to be waited for.",
    "guard_timeouts": "Guards not granted in time.",
    "recoveries": "Shards recovered after a dead writer.",
}
GAUGES: Final = {
    "items": ("items", "Items stored; a hint that the sweep keeps right."),
    "bytes": ("live_bytes", "Bytes of keys and values stored."),
    "dead_bytes": ("dead_bytes", "Bytes of replaced and removed items not yet given back."),
    "size": ("size_bytes", "Size of the segment."),
    "slots_used": ("workers", "Worker slots that were ever used."),
}


class CacheCollector(Collector):
    """Reads the statistics of targets at each scrape; samples carry the label `cache`.

    Args: targets: what `shmcache stats` takes (URL, segment name, ...), or open engines.
    """

    def __init__(self, *targets: str | Engine) -> None:
        self._targets = targets

    def describe(self) -> list[Any]:
        """Nothing: registering reads no cache."""
        return []

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """One family a statistic, one sample a target."""
        read = [(str(getattr(t, "engine_id", t)), _stats(t)) for t in self._targets]
        up = GaugeMetricFamily("shmcache_up", "1 if the cache could be read.", labels=["cache"])
        for name, stats in read:
            up.add_metric([name], float(stats is not None))
        yield up
        for key, text in COUNTERS.items():
            counter = CounterMetricFamily(f"shmcache_{key}", text, labels=["cache"])
            for name, stats in read:
                if stats is not None and key in stats:
                    counter.add_metric([name], stats[key])
            if counter.samples:
                yield counter
        for key, (metric, text) in GAUGES.items():
            gauge = GaugeMetricFamily(f"shmcache_{metric}", text, labels=["cache"])
            for name, stats in read:
                if stats is not None and key in stats:
                    gauge.add_metric([name], stats[key])
            if gauge.samples:
                yield gauge
        pages = GaugeMetricFamily("shmcache_pages", "Pages by state.", labels=["cache", "state"])
        for name, stats in read:
            if stats is not None and "pages_free" in stats:
                pages.add_metric([name, "free"], stats["pages_free"])
                pages.add_metric([name, "used"], stats["pages"] - stats["pages_free"])
        if pages.samples:
            yield pages


def _stats(target: str | Engine) -> Mapping[str, Any] | None:
    try:
        if isinstance(target, Engine):
            return dict(target.stats())
        found = locate(target)
        if isinstance(found, Url):
            from . import registry

            return dict(registry.open(found).stats())
        with View(found) as view:
            return view.stats()
    except (ShmCacheError, OSError, ValueError):
        return None
