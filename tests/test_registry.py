"""shmcache.registry: open, engine, schemes."""

import importlib.metadata
import os
import threading

import pytest

import shmcache
from shmcache import Capability, registry
from shmcache.engines.memory import MemoryEngine
from shmcache.testing import in_processes, in_threads
from shmcache.url import Url


@pytest.fixture
def opened(unique_name):
    """Opens memory engines under new ids and closes them."""
    engines = []

    def make(options="", group=None, **keywords):
        engines.append(shmcache.open(f"memory:{group or unique_name()}://{options}", **keywords))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def test_equal_url(opened, unique_name):
    """An equal URL gives the same engine, wherever its options stand and however they are written."""
    name = unique_name()
    engine = opened("?size=1M&eviction=none", name)
    assert opened("?eviction=none&size=1024K", name) is engine
    assert opened("?eviction=none", name, size=1 << 20) is engine
    assert shmcache.open(Url.parse(f"memory:{name}://"), size="1M", eviction="none") is engine
    assert shmcache.engine(f"memory:{name}") is engine


def test_different_url(opened, unique_name):
    """A different URL under a used engine_id is a ValueError that shows both."""
    name = unique_name()
    opened("?size=1M", name)
    for options in ("", "?size=2M", "?size=1M&eviction=auto"):
        with pytest.raises(ValueError, match=f"memory:{name}.*1048576"):
            opened(options, name)


def test_different_url_hides_passwords(monkeypatch):
    """The ValueError about a used engine_id shows no password."""
    monkeypatch.setitem(registry.BUILT_IN, "fake", f"{__name__}:Fake")
    engine = shmcache.open("fake:g://u:s3cret@h")
    with pytest.raises(ValueError, match="fake:g") as caught:
        shmcache.open("fake:g://u:s3cret2@h")
    assert "s3cret" not in str(caught.value)
    engine.close()


class Fake(MemoryEngine):
    @classmethod
    def from_url(cls, url, **options):
        return cls(url=url, **options)


def test_close_frees_the_id(opened, unique_name):
    """A closed engine leaves the registry, and its id is free for another URL."""
    name = unique_name()
    engine = opened("", name)
    engine.close()
    with pytest.raises(KeyError, match=name):
        shmcache.engine(f"memory:{name}")
    assert f"memory:{name}" not in registry.opened()
    assert opened("?size=1M", name) is not engine


def test_unknown_engine(opened):
    """engine() of an id that is not open is a KeyError listing the open ones."""
    engine = opened()
    with pytest.raises(KeyError, match=engine.engine_id):
        shmcache.engine("memory:nobody")
    with pytest.raises(TypeError, match="engine_id"):
        shmcache.engine(None)


def test_unknown_scheme():
    """An unknown scheme is a ValueError listing the known ones."""
    with pytest.raises(ValueError, match=r"mongodb.*memcached, memory, posix, redis.*sysv, tiered"):
        shmcache.open("mongodb://h")


def test_unknown_option():
    """An unknown option, in the URL or as keyword, is a ValueError listing the known ones."""
    with pytest.raises(ValueError, match=r"sise.*default_ttl.*size"):
        shmcache.open("memory://?sise=1M")
    with pytest.raises(ValueError, match=r"sise.*default_ttl.*size"):
        shmcache.open("memory://", sise="1M")
    assert "memory" not in registry.opened()


def test_failed_open_registers_nothing(unique_name):
    """An engine that fails to open takes no id."""
    name = unique_name()
    with pytest.raises(ValueError, match="memory"):
        shmcache.open(f"memory:{name}://host")
    assert f"memory:{name}" not in registry.opened()


def test_environment(monkeypatch, unique_name):
    """open() takes SHMCACHE_URL, and posix:///default where that is unset or empty."""
    monkeypatch.setitem(registry.BUILT_IN, "posix", f"{__name__}:Fake")
    name = unique_name()
    monkeypatch.setenv("SHMCACHE_URL", f"memory:{name}://")
    with shmcache.open() as engine:
        assert engine.engine_id == f"memory:{name}"
    monkeypatch.setenv("SHMCACHE_URL", "")
    with shmcache.open() as engine:
        assert engine.engine_id == "posix:default"
    monkeypatch.delenv("SHMCACHE_URL")
    with shmcache.open() as engine:
        assert str(engine.url) == "posix:///default"


def test_entry_points(monkeypatch):
    """An entry point of shmcache.engines adds a scheme; built-in schemes cannot be taken over."""
    points = [
        importlib.metadata.EntryPoint(name, f"{__name__}:{target}", registry.ENTRY_POINTS)
        for name, target in (("mine", "Fake"), ("memory", "Fake"), ("wrong", "test_entry_points"))
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "shmcache.engines" else [])
    assert "mine" in registry.known_schemes()
    with shmcache.open("mine:g://h?size=1M") as engine:
        assert type(engine) is Fake
        assert shmcache.engine("mine:g") is engine
    with shmcache.open("memory:mine://") as engine:
        assert type(engine) is MemoryEngine
    with pytest.raises(TypeError, match="wrong"):
        shmcache.open("wrong://")


def test_threads_get_one_engine(unique_name):
    """Threads that open one URL at once get one engine."""
    name = unique_name()
    engines = in_threads(8, lambda i: shmcache.open(f"memory:{name}://"))
    assert len({id(engine) for engine in engines}) == 1
    engines[0].close()


def test_fork(opened):
    """A child finds the parent's engines under their ids, and closes its own copy only."""
    engine = opened()
    engine.set("k", 1)

    def child(i):
        found = shmcache.engine(engine.engine_id)
        value = found.get("k")
        found.close()
        return value

    assert in_processes(1, child) == [1]
    assert shmcache.engine(engine.engine_id) is engine
    assert engine.get("k") == 1


def test_fork_while_opening(monkeypatch, unique_name):
    """A thread that is opening an engine at the fork does not block the child's open()."""
    entered, leave = threading.Event(), threading.Event()

    class Slow(Fake):
        @classmethod
        def from_url(cls, url, **options):
            entered.set()
            leave.wait()
            return super().from_url(url, **options)

    monkeypatch.setitem(registry.BUILT_IN, "slow", f"{__name__}:Slow")
    monkeypatch.setitem(globals(), "Slow", Slow)
    name = unique_name()
    thread = threading.Thread(target=lambda: shmcache.open(f"slow:{name}://").close())
    thread.start()
    entered.wait()
    try:
        assert in_processes(1, lambda i: shmcache.open(f"memory:{name}://").add("k", os.getpid())) == [True]
    finally:
        leave.set()
        thread.join()


@pytest.mark.parametrize("scheme", ["posix", "sysv", "anon", "memory"])
def test_what_is_claimed(unique_name, scheme):
    """Named segments outlive their last process and answer raw commands; anon and memory do not outlive it."""
    name = unique_name()
    url = f"{scheme}:{name}:///{name}?size=1M" if scheme in ("posix", "sysv") else f"{scheme}:{name}://"
    with shmcache.open(url, **({"size": "1M"} if scheme == "anon" else {})) as engine:
        flags = engine.capabilities & (Capability.RAW | Capability.PERSIST)
        wanted = {"anon": Capability.RAW, "memory": Capability(0)}.get(scheme, Capability.RAW | Capability.PERSIST)
        assert flags == wanted
        if scheme in ("posix", "sysv"):
            engine.unlink()
