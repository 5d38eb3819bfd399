"""What the tests of resize share: segments of each form and guard, sound and alone of their name when a test ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import shmcache
from shmcache import catalog
from shmcache.engines.shm import ShmEngine

FORMS = [f"{form}-{guard}" for form in ("posix", "sysv") for guard in ("fast", "semaphore")]


def opened(form: str, name: str, **options: Any) -> ShmEngine:
    scheme, _, guard = form.partition("-")
    engine = ShmEngine.from_url(shmcache.Url.parse(f"{scheme}:///{name}"), **{"size": 2 << 20, "guard": guard, **options})
    assert isinstance(engine, ShmEngine)
    return engine


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(form: str, unique_name: Callable[[], str]) -> Iterator[Callable[..., ShmEngine]]:
    """Opens a segment; it is sound, and the only one of its name, when the test ends."""
    made: list[ShmEngine] = []

    def one(**options: Any) -> ShmEngine:
        made.append(opened(form, unique_name(), **options))
        return made[-1]

    yield one
    for engine in made:
        name = engine._name
        if not engine._attached:
            engine = opened(form, name, mode="a", size=engine._attachment.size)
        assert engine.check() == []
        catalog.gc(0, name=engine._name)  # a killed resizer's shared memory is known by its key as long as the name is in use
        engine.unlink()
        engine.close()
        catalog.gc(0, name=engine._name)
        assert [f for f in catalog.list_segments() if f.name == name] == []
        assert not [entry for entry in os.listdir("/dev/shm") if entry.endswith(f".{name}")]


@pytest.fixture
def cache(make: Callable[..., ShmEngine]) -> ShmEngine:
    return make()


def again(cache: ShmEngine, **options: Any) -> ShmEngine:
    """Another handle of the same segment."""
    return ShmEngine.from_url(cache.url, **{"mode": "a", **options})
