"""shmcache.engines.tiered: what a near copy may show, and what it may not. Faults and opening are in
test_tiered_whole.py."""

from __future__ import annotations

import itertools
import math
import random
import threading
import time

import pytest

import shmcache
from shmcache import MISS, EngineDown
from shmcache.engines.memory import MemoryEngine
from shmcache.engines.tiered_near import DIRECT, MARK
from shmcache.testing import in_processes, in_threads

from .tiered_help import CORE, Far, OneStep, Setup


@pytest.fixture(params=[Far, OneStep])
def setup(request):
    return Setup(request.param)


# -- copies --------------------------------------------------------------------------------------------------


def test_reads_are_copied(setup):
    """What was read or written is read again from L1; L2 is not asked."""
    MemoryEngine.set(setup.far, "k", ["v"])
    assert setup.engine.get("k") == ["v"]
    setup.engine.set("w", "written")
    setup.far.calls.clear()
    assert setup.engine.get("k") == ["v"]
    assert setup.engine["w"] == "written"
    assert "k" in setup.engine
    assert setup.engine.get_many(["k", b"k", "w"]) == {"k": ["v"], b"k": ["v"], "w": "written"}
    assert setup.far.calls == []
    assert setup.engine.stats().l1_hits == 4


def test_get_many_asks_once():
    """What L1 has not, get_many asks L2 for in one call, and copies."""
    setup = Setup()
    MemoryEngine.set_many(setup.far, {"a": "1", "b": "2", "n": 3})
    setup.engine.get("a")
    setup.far.calls.clear()
    assert setup.engine.get_many(["a", "b", "n", "absent"]) == {"a": "1", "b": "2", "n": 3}
    assert setup.far.calls == ["get_many"]
    setup.far.calls.clear()
    assert setup.engine.get("b") == "2"
    assert setup.far.calls == []


def test_a_copy_ends(setup):
    """A copy lives l1_ttl, not longer, and its reads do not prolong it."""
    MemoryEngine.set(setup.far, "k", "old")
    assert setup.engine.get("k") == "old"
    MemoryEngine.set(setup.far, "k", "new")
    setup.clock.now += 3.9
    assert setup.engine.get("k") == "old"
    setup.clock.now += 1.1
    assert setup.engine.get("k") == "new"


@pytest.mark.parametrize("ttl", [0.5, 1.5, 3, 100])
def test_a_copy_ends_with_its_item(setup, ttl):
    """No copy is read at or after its item's deadline, whoever made it."""
    writers = [
        lambda: setup.engine.set("k", "v", ttl),
        lambda: setup.engine.add("k", "v", ttl),
        lambda: MemoryEngine.set(setup.far, "k", "v", ttl) and setup.engine.get("k"),
        lambda: MemoryEngine.set(setup.far, "k", "v", ttl) and setup.engine.get_many(["k"]),
        lambda: setup.engine.set_many({"k": "v"}, ttl),
        lambda: setup.engine.set("k", "v") and setup.engine.touch("k", ttl),
        lambda: setup.engine.set("k", "v", 1000) and setup.engine.gat("k", ttl),
    ]
    for write in writers:
        setup.engine.delete("k")
        write()
        setup.clock.now += ttl - 0.001
        assert setup.engine.get("k") == "v"
        setup.clock.now += 0.001
        assert setup.engine.get("k") is None
        assert "k" not in setup.engine


def test_counters_are_far(setup):
    """An int is never copied: what another machine counted is seen at once."""
    one, other = setup.engines
    for i in range(3):
        assert one.incr("n") == 2 * i + 1
        assert other.get("n") == 2 * i + 1
        assert other.incr("n") == 2 * i + 2
        assert one.get("n") == one.counter("n") == 2 * i + 2
    assert one.get_many(["n"]) == {"n": 6}
    other.set("n", 10)
    assert one.get("n") == 10
    other.set("n", "text")
    assert one.get("n") == "text"
    assert other.incr("m", ttl=10) == 1
    assert one.get("m") == 1


def test_marks_are_values_too(setup):
    """A value that looks like a mark is stored and read like any other."""
    for value in (MARK, DIRECT, MARK + b"F" + b"x" * 16):
        setup.engine.set("k", value)
        assert setup.engine.get("k") == value
        assert setup.engine.get_many(["k"]) == {"k": value}
        assert setup.engine.append("k", b"y")
        assert setup.engine.pop("k") == value + b"y"


def test_absence_is_not_copied(setup):
    """A key that another machine stores is found at once."""
    assert setup.engine.get("k") is None
    assert setup.near_keys() == []
    setup.engines[1].set("k", "v")
    assert setup.engine.get("k") == "v"


# -- writes meet ---------------------------------------------------------------------------------------------

WRITES = {
    "set": lambda e, v: e.set("k", v),
    "add": lambda e, v: e.add("k", v),
    "delete": lambda e, v: e.delete("k"),
    "pop": lambda e, v: e.pop("k"),
    "append": lambda e, v: _or_none(lambda: e.append("k", v)),
    "incr": lambda e, v: _or_none(lambda: e.incr("k")),
    "cas": lambda e, v: e.cas("k", v, MemoryEngine.gets(e._l2, "k", (0, -1))[1]),
    "touch": lambda e, v: e.touch("k", 50),
    "set_many": lambda e, v: e.set_many({"k": v}),
    "get": lambda e, v: e.get("k"),
    "get_many": lambda e, v: e.get_many(["k"]),
}


def _or_none(call):
    try:
        return call()
    except TypeError:  # of another type: an int, or none
        return None


@pytest.mark.parametrize("pause", [0.0, 1.5])
@pytest.mark.parametrize("first", WRITES)
def test_two_inside_one(first, pause):
    """Whatever a call of L2 is interrupted by, and by what that is, L1 has nothing older than L2 afterwards;
    also if the interruption takes so long that marks die."""
    serial = itertools.count()
    for second, third, *when in itertools.product(WRITES, WRITES, ("before", "after"), ("before", "after")):
        setup = Setup()
        setup.engine.set("k", "begin")

        def run(names, when, setup=setup):
            if names:
                setup.far.hooks.append(lambda at: at == when[0] and inside(names[1:], when[1:]))
                WRITES[names[0]](setup.engine, f"v{next(serial)}")
                setup.far.hooks.clear()
                if not pause:  # a call has returned, others are under way
                    assert setup.engine.get("k", MISS) == setup.truth()

        def inside(names, when, run=run, setup=setup):
            setup.clock.now += pause
            run(names, when)
            setup.clock.now += pause

        run([first, second, third], [*when, ""])
        assert setup.engine.get("k", MISS) == setup.truth()
        assert setup.engine.get_many(["k"]) == ({} if setup.truth() is MISS else {"k": setup.truth()})


def test_late_filler(setup):
    """A filler that read before a delete and stores after it brings nothing back."""
    MemoryEngine.set(setup.far, "k", "old")
    setup.far.hooks.append(lambda at: at == "after" and setup.engine.delete("k"))
    assert setup.engine.get("k") == "old"
    assert setup.engine.get("k") is None


@pytest.mark.parametrize("make", ["get", "get_many", "set"])
def test_slow_copy(setup, make):
    """A copy that takes long to make ends no later: l1_ttl after L2 was asked, and with its item."""
    call = {
        "get": lambda: setup.engine.get("k"),
        "get_many": lambda: setup.engine.get_many(["k"]),
        "set": lambda: setup.engine.set("k", "old", ttl),
    }[make]
    for ttl in (3, None):
        start = setup.clock.now
        MemoryEngine.set(setup.far, "k", "old", ttl)

        def late(at, ttl=ttl):
            if at == "after":
                if ttl is None:
                    MemoryEngine.set(setup.far, "k", "new")
                setup.clock.now += 0.9

        setup.far.hooks.append(late)
        call()
        setup.clock.now = start + (ttl or 5)
        assert setup.engine.get("k") == (None if ttl else "new")


def test_late_copy():
    """A copy whose mark is replaced while it is looked at is not stored."""
    setup = Setup()
    MemoryEngine.set(setup.far, "k", "old")
    near, gets = setup.near[0], setup.near[0].gets

    def interrupted(*args):
        found = gets(*args)
        near.gets = gets
        setup.engine.set("k", "new")
        return found

    near.gets = interrupted
    assert setup.engine.get("k") == "old"
    assert setup.engine.get("k") == "new"


@pytest.mark.parametrize("seed", range(8))
def test_bounds(seed):
    """Reads show the machine's own last write or something newer, of others' writes nothing that was replaced
    l1_ttl or longer ago, and nothing after its deadline."""
    dice = random.Random(seed)
    l1_ttl = dice.choice([0.2, 1.0, 5.0, 20.0])
    setup = Setup(dice.choice([Far, OneStep]), l1_ttl)
    history = [(setup.clock.now, MISS, math.inf)]  # since when, what, until when it lives
    own = [0, 0]  # place in history of a machine's last write
    for step in range(3000):
        now = setup.clock.now = setup.clock.now + dice.choice(
            [0, 0.001, 0.05, l1_ttl / 5, l1_ttl / 2, l1_ttl]
        )
        machine = dice.randrange(2)
        engine = setup.engines[machine]
        name = dice.choice(
            ["get", "get", "get_many", "set", "add", "delete", "touch", "pop", "cas", "set_many"]
        )
        ttl = dice.choice([None, l1_ttl / 4, l1_ttl, 3 * l1_ttl])
        if name in ("get", "get_many"):
            found = engine.get("k", MISS) if name == "get" else engine.get_many(["k"]).get("k", MISS)
            possible, place, replaced = set(), len(history), math.inf
            while place > own[machine] and replaced > now - l1_ttl:
                place -= 1
                since, what, deadline = history[place]
                possible |= {MISS} if now >= deadline - 0.001 else set()  # the engines count whole ms
                possible |= {what} if now < deadline + 0.001 else set()
                replaced = since
            assert found in possible
            continue
        if name == "cas":
            engine.cas("k", str(step), MemoryEngine.gets(setup.far, "k", (0, -1))[1], ttl)
        elif name in ("set", "add"):
            getattr(engine, name)("k", str(step), ttl)
        elif name == "set_many":
            engine.set_many({"k": str(step)}, ttl)
        else:
            engine.touch("k", ttl) if name == "touch" else getattr(engine, name)("k")
        what = setup.truth()
        deadline = math.inf if what is MISS else now + MemoryEngine.ttl(setup.far, "k")
        history.append((now, what, deadline))
        own[machine] = len(history) - 1


# -- one filler ----------------------------------------------------------------------------------------------


def test_one_filler():
    """Of 8 threads that miss at once one asks L2; the others take its copy."""
    setup = Setup()
    MemoryEngine.set(setup.far, "k", "v")
    setup.far.hooks.append(lambda at: at == "before" and time.sleep(0.1))
    assert in_threads(8, lambda i: setup.engine.get("k")) == ["v"] * 8
    assert setup.far.calls == ["get"]
    assert setup.engine.stats().l1_fills == 1


@pytest.mark.parametrize("end", ["absent", "down", "dead"])
def test_filler_without_a_copy(end):
    """If the filler finds nothing, fails or dies, who waited asks L2."""
    setup = Setup(l1_ttl=0.5)
    if end == "dead":  # its mark stands, and on a frozen clock does not end
        setup.near[0].set(setup.engine._name("k"), MARK + b"F" + b"x" * 16)
        MemoryEngine.set(setup.far, "k", "v")
        assert setup.engine.get("k") == "v"
        return
    entered = threading.Event()

    def hook(at):
        if at == "before":
            entered.set()
            time.sleep(0.05)
            if end == "down":
                raise EngineDown("far")
            return
        if end == "absent":
            MemoryEngine.set(setup.far, "k", "late")

    setup.far.hooks.append(hook)

    def work(i):
        if i:
            entered.wait()
        try:
            return setup.engine.get("k")
        except EngineDown:
            return "down"

    MemoryEngine.delete(setup.far, "k")
    found = in_threads(2, work)
    assert found == {"absent": [None, "late"], "down": ["down", None]}[end]


@pytest.mark.skipif(not CORE, reason="shmcache._core is not built")
def test_processes_share_l1(redis_server, unique_name):
    """Processes on one segment: one fills, all see a write once it has returned, and counters add up."""
    unique = unique_name()
    with (
        shmcache.open(f"posix:///{unique}?size=2M") as near,
        shmcache.open(f"redis:{unique}://{redis_server}/0?health=no&prefix={unique}:") as far,
        shmcache.open(f"tiered:{unique}://", l1=near, l2=far, l1_ttl=60) as engine,
    ):
        far.set("cold", "v")
        fills = in_processes(6, lambda i: [engine.get("cold") == "v", engine.stats().l1_fills])
        assert [good for good, _ in fills] == [True] * 6
        assert sum(count for _, count in fills) == 1

        def work(i):
            seen = -1
            for j in range(300):
                if i == 0:
                    engine.set("k", [j])
                    assert engine.get("k") == [j]
                else:
                    now = engine.get("k", [-1])[0]
                    assert now >= seen
                    seen = now
                engine.incr("n")

        in_processes(4, work)
        assert engine.get("k") == [299]
        assert engine.counter("n") == 1200
        engine.clear()
        near.unlink()
