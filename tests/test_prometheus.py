"""The Prometheus collector."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import shmcache

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry, generate_latest

from shmcache.prometheus import COUNTERS, GAUGES, CacheCollector


def exposed(*targets: str | shmcache.Engine) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(CacheCollector(*targets))
    lines = generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


@pytest.mark.parametrize("scheme", ["posix", "sysv"])
def test_a_segment(scheme: str, unique_name: Callable[[], str]) -> None:
    """A scrape gives every counter and gauge of a segment, and leaves them as they are."""
    name = f"{scheme}:{unique_name()}"
    engine = shmcache.open(name.replace(":", ":///"), size="1M")
    try:
        engine.set("k", "v")
        engine.get("k")
        engine.get("absent")
        first = exposed(name)
        assert first == exposed(name)
    finally:
        engine.unlink()
        engine.close()
    label = f'{{cache="{name}"}}'
    assert {f"shmcache_{key}_total{label}" for key in COUNTERS} <= set(first)
    assert {f"shmcache_{metric}{label}" for metric, _ in GAUGES.values()} <= set(first)
    assert [first[f"shmcache_{n}{label}"] for n in ("up", "hits_total", "misses_total", "items")] == [1, 1, 1, 1]
    assert first[f'shmcache_pages{{cache="{name}",state="free"}}'] > 0


def test_an_absent_target_is_down() -> None:
    """A target that cannot be read is up 0 and fails no scrape."""
    assert exposed("posix:none-such") == {'shmcache_up{cache="posix:none-such"}': 0}


def test_an_engine() -> None:
    """An open engine is a target, one in this process too."""
    with shmcache.open("memory:prom://") as engine:
        engine.set("k", 1)
        samples = exposed(engine)
    assert samples['shmcache_items{cache="memory:prom"}'] == 1


def test_the_text_format(unique_name: Callable[[], str]) -> None:
    """What `stats --format prometheus` prints is read by the parser: counters and gauges with help, one sample a cache."""
    pytest.importorskip("typer")
    from prometheus_client.parser import text_string_to_metric_families

    from .cli_help import run

    name = f"posix:{unique_name()}"
    engine = shmcache.open(name.replace(":", ":///"), size="1M")
    try:
        engine.set('k"\n', "v", ttl=5)
        engine.get('k"\n')
        result = run("stats", name, "--format", "prometheus")
    finally:
        engine.unlink()
        engine.close()
    assert result.code == 0
    families = {family.name: family for family in text_string_to_metric_families(result.out)}
    assert {f"shmcache_{key}" for key in COUNTERS} <= {n for n, f in families.items() if f.type == "counter"}
    assert {f"shmcache_{metric}" for metric, _ in GAUGES.values()} <= {n for n, f in families.items() if f.type == "gauge"}
    assert all(f.documentation and f.samples for f in families.values())
    samples = {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families.values() for s in f.samples}
    assert samples["shmcache_sets_total", (("cache", name),)] == samples["shmcache_hits_total", (("cache", name),)] == 1
    assert {labels[0] for _, labels in samples} == {("cache", name)}
