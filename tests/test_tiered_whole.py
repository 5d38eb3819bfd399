"""shmcache.engines.tiered: what fails, what concerns all items, opening, and examples/swap_engine.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import shmcache
from shmcache import (
    DEFAULT,
    MISS,
    Capability,
    EngineDown,
    GuardLost,
    LockTimeout,
    NoSpace,
    NotSupported,
    ShmCacheError,
    Url,
)
from shmcache.engines.memory import MemoryEngine
from shmcache.engines.tiered import TieredEngine

from .tiered_help import CORE, Far, OneStep, Setup

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(params=[Far, OneStep])
def setup(request):
    return Setup(request.param)


# -- what fails ----------------------------------------------------------------------------------------------


def test_far_tier_down(setup):
    """While L2 is down copies are read, the rest raises, and no copy is left of what a write met."""
    engine = setup.engine
    engine.set_many({"k": "v", "other": "o"})
    setup.far.down = True
    assert engine.get("k") == "v"
    calls = [lambda: engine.get("absent"), lambda: engine.incr("n"), lambda: engine.get_many(["k", "absent"])]
    for call in [
        *calls,
        lambda: engine.set("k", "w"),
        lambda: engine.get("k"),
        lambda: engine.delete("other"),
    ]:
        with pytest.raises(EngineDown, match="far server"):
            call()
    assert engine.set_many({"other": "p"}) == ["other"]
    setup.far.down = False
    assert engine.get("k") == "v"
    assert engine.stats().down >= 6


def test_far_tier_down_on_miss():
    """With on_down=miss reads without a copy miss and writes say no; counters, cas and clear raise."""
    setup = Setup(on_down="miss")
    engine = setup.engine
    engine.set_many({"k": "v", "w": "w"})
    setup.far.down = True
    assert engine.get("k") == "v"
    assert engine.get("absent", 5) == 5
    assert engine.get_many(["k", "absent"]) == {"k": "v"}
    for call in (engine.add, engine.set):
        assert call("w", "x") is False
    assert engine.get("w", MISS) is MISS
    assert [engine.delete("k"), engine.touch("k", 5), engine.append("k", "x")] == [False] * 3
    assert engine.pop("k", 7) == 7
    for raising in (lambda: engine.incr("n"), lambda: engine.cas("k", 1, 1)):
        with pytest.raises(EngineDown):
            raising()
    setup.far.down = False
    assert engine.get_many(["k", "w"]) == {"k": "v", "w": "w"}


@pytest.mark.parametrize("error", [LockTimeout, GuardLost])
def test_near_tier_fails(setup, error):
    """If L1 does not take a mark, a write raises before L2 is touched; reads go to L2."""
    engine, near = setup.engine, setup.near[0]
    engine.set("k", "v")

    def fail(*args, **options):
        raise error("near")

    for name in ("set", "add", "delete", "cas"):
        setattr(near, name, fail)
    writes = [lambda: engine.set("k", "w"), lambda: engine.delete("k"), lambda: engine.incr("n")]
    for write in [*writes, lambda: engine.delete_many(["k"])]:
        with pytest.raises(error):
            write()
    if error is LockTimeout:
        assert engine.set_many({"k": "w", "x": 1}) == ["k", "x"]
    assert setup.truth() == "v"
    MemoryEngine.set(setup.far, "cold", "c")
    assert engine.get("cold") == "c"
    assert engine.get_many(["cold", "k"]) == {"cold": "c", "k": "v"}


def test_near_tier_without_room(setup):
    """What L1 has no room for is L2's alone; an older copy goes."""
    small = MemoryEngine(clock=setup.clock, size=2000, eviction="none")
    engine = TieredEngine(small, setup.far, url=Url("tiered"), l1_ttl=5.0)
    engine.set("k", "small")
    for i in range(30):
        engine.set(f"fill{i}", "x" * 40)
    engine.set("k", "x" * 5000)
    assert engine.get("k") == "x" * 5000
    engine.set("k", "again")
    assert engine.get("k") == "again"
    assert engine.get_many([f"fill{i}" for i in range(30)]) == {f"fill{i}": "x" * 40 for i in range(30)}
    with pytest.raises(NoSpace):
        small.set("own", "x" * 490)


def test_far_error_keeps_nothing(setup):
    """A write that L2 refuses leaves L2's value to be read."""
    setup.engine.set("k", "v")
    with pytest.raises(TypeError):
        setup.engine.set("k", object())
    with pytest.raises(shmcache.NotANumber):
        setup.engine.incr("k")
    with pytest.raises(TypeError):
        setup.engine.append("k", b"bytes")
    assert setup.engine.get("k") == "v"
    with pytest.raises(TypeError):
        setup.engine.set_many({"k": "w", "x": object()})
    assert setup.engine.get("k") == "v"


def test_long_keys(setup):
    """A key that is too long for L1, with what stands before it, is L2's alone."""
    key = "k" * 65_535
    setup.engine.set(key, "v")
    assert setup.engine.get(key) == "v"
    assert setup.engine.get_many([key]) == {key: "v"}
    assert setup.engine.incr("n" * 65_535) == 1
    assert setup.engine.delete(key) is True
    assert setup.near_keys() == []


# -- the whole -----------------------------------------------------------------------------------------------


def test_clear_and_delete_match(setup):
    """clear and delete_match remove copies too, and nothing of other users of L1."""
    engine, near = setup.engine, setup.near[0]
    near.set("theirs", 1)
    other = TieredEngine(near, setup.far, url=Url("tiered", "other"), l1_ttl=5.0)
    for i in range(3):
        engine.set(f"a{i}", "v")
        engine.set(f"b{i}", "v")
    other.set("c", "v")
    assert engine.delete_match("a*") == 3
    assert engine.get("a1") is None
    assert len(engine) == 4
    MemoryEngine.clear(setup.far)
    assert engine.get("b1") == "v"  # of another machine's clear: within l1_ttl
    engine.clear()
    assert engine.get("b1") is None
    assert other.get("c") == "v"
    assert near.get("theirs") == 1


def test_grace_and_locks_are_far():
    """Locks exclude across machines; a stale value is given while it is refilled, and is no copy."""
    setup = Setup()
    one, other = setup.engines
    with one.lock("name"), pytest.raises(LockTimeout), other.lock("name", timeout=0):
        pass
    assert one.get_or_set("k", lambda: "first", 10, grace=50) == "first"
    setup.clock.now += 11
    assert one.get("k") is None
    assert one._get_grace("k") == ("first", False)

    def refill():
        assert other.get_or_set("k", lambda: "wrong", 10, grace=50) == "first"
        return "second"

    assert one.get_or_set("k", refill, 10, grace=50) == "second"
    assert other.get_or_set("k", lambda: "wrong", 10, grace=50) == "second"
    assert one._get_grace("k") == ("second", True)


def test_namespace_cleared_elsewhere(setup):
    """A namespace cleared on one machine is empty there at once and elsewhere within l1_ttl."""
    one, other = (engine.namespace("space") for engine in setup.engines)
    one.set("k", "v")
    assert other.get("k") == "v"
    one.clear()
    assert one.get("k") is None
    setup.clock.now += 5
    assert other.get("k") is None


def test_opening(unique_name):
    """Tiers are named by id, URL or object; those that it opened itself are closed with it."""
    unique = unique_name()
    near, far = shmcache.open(f"memory:{unique}n://"), shmcache.open(f"memory:{unique}f://")
    ids = shmcache.open(f"tiered:{unique}a://?l1=memory:{unique}n&l2=memory:{unique}f&l1_ttl=0.5")
    mixed = shmcache.open(f"tiered:{unique}b://?l1=memory:{unique}o://%3Fsize=1M", l2=far)
    assert ids.capabilities == far.capabilities
    for engine in (ids, mixed):
        assert engine.set("k", [1])
        assert engine.get("k") == [1]
    opened = shmcache.engine(f"memory:{unique}o")
    ids.close()
    mixed.close()
    assert opened._closed
    assert not near._closed
    assert not far._closed
    with pytest.raises(ShmCacheError, match="closed"):
        ids.get("k")
    near.close()
    far.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l1": "memory:nobody", "l2": "memory://"}, "'l1'.*'memory:nobody' found"),
        ({"l2": "memory://"}, "'l1': an engine_id or URL wanted"),
        ({"l1": "memory:one://", "l2": "memory:one://"}, "found as both"),
        ({"l1": "memory://", "l2": "memory:x://?nonsense=1"}, "nonsense"),
        ({"l1": "memory://", "l2": "memory:two://", "l1_ttl": 0}, "'l1_ttl'"),
        ({"l1": "memory://", "l2": "memory:two://", "on_down": "perhaps"}, "'on_down'"),
    ],
)
def test_bad_options(options, message):
    """Tiers that are missing, unknown, the same or misnamed are refused, and nothing stays open."""
    before = set(shmcache.registry.opened())
    with pytest.raises(ValueError, match=message):
        shmcache.open("tiered:bad://", **options)
    assert set(shmcache.registry.opened()) == before


def test_what_l1_needs():
    """An engine without cas cannot be L1; what L2 cannot do the whole cannot."""

    class Poor(MemoryEngine):
        capabilities = Capability.EXPIRE | Capability.SUBSECOND | Capability.ITERATE

    with pytest.raises(ValueError, match="CAS"):
        TieredEngine(Poor(), MemoryEngine())
    engine = TieredEngine(MemoryEngine(), Poor())
    assert engine.capabilities == Poor.capabilities
    with pytest.raises(NotSupported):
        engine.lock("k")
    engine.set("k", "v", DEFAULT)
    assert engine.get("k") == "v"


def test_password_is_hidden(unique_name):
    """The password of a tier's URL is in no message."""
    unique = unique_name()
    with shmcache.open(f"memory:{unique}://") as near:
        url = f"tiered:{unique}://?l2=redis:{unique}://:geheim@127.0.0.1:1/0%3Fhealth=no"
        with shmcache.open(url, l1=near) as engine:
            assert "geheim" not in repr(engine)
            with pytest.raises(ValueError, match="in use") as caught:
                shmcache.open(url, l1=near, l1_ttl=9)
            assert "geheim" not in str(caught.value)


# -- the example ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["posix", "sysv", "memcached", "redis", "cluster", "tiered"])
def test_swap_engine(form, request, unique_name):
    """examples/swap_engine.py prints the same for every engine as for memory."""
    unique = unique_name()
    if form in ("posix", "sysv") and not CORE:
        pytest.skip("shmcache._core is not built")
    if form == "memcached" and importlib.util.find_spec("shmcache.engines.memcached") is None:
        pytest.skip("shmcache.engines.memcached is not there")
    servers = {"tiered": "redis", "cluster": "redis_cluster"}
    server = "" if form in ("posix", "sysv") else request.getfixturevalue(f"{servers.get(form, form)}_server")
    urls = {
        "memory": "memory://",
        "posix": f"posix:///swap-{unique}?size=2M",
        "sysv": f"sysv:///swap-{unique}?size=2M",
        "memcached": f"memcached://{server}/?health=no",
        "redis": f"redis://{server}/0?health=no",
        "cluster": f"redis+cluster://{server}/?health=no",
        "tiered": f"tiered://?l1=memory://&l2=redis://{server}/0%3Fhealth=no",
    }
    printed = {}
    for name in ("memory", form):
        remove = ["--remove"] if name in ("posix", "sysv") else []
        done = subprocess.run(
            [sys.executable, EXAMPLES / "swap_engine.py", *remove],
            env={**os.environ, "SHMCACHE_URL": urls[name]},
            cwd=EXAMPLES.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert f"engine {Url.parse(urls[name]).engine_id}" in done.stderr
        printed[name] = done.stdout
    assert printed[form] == printed["memory"]
    assert len(printed["memory"].splitlines()) > 30
