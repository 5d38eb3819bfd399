"""shmcache.engines.memcached against a real memcached: the wire, counters, lifetimes."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmcache
from shmcache import (
    MISS,
    CounterOverflow,
    EngineDown,
    KeyTooLong,
    LockTimeout,
    NotANumber,
    NotSupported,
    ShmCacheError,
)
from shmcache.engines import memcached_wire as wire
from shmcache.engines.memcached import MemcachedEngine
from shmcache.testing import in_processes

MAX, MIN = 2**63 - 1, -(2**63)


@pytest.fixture
def engine(open_memcached: Callable[..., MemcachedEngine]) -> MemcachedEngine:
    return open_memcached()


def ends(engine: MemcachedEngine) -> dict[bytes, int]:
    """Unix time at which each item ends, as the server lists it; -1 = never."""
    lines = engine._on(0, lambda link: link.lines(b"lru_crawler metadump hash", b"END"))
    words = [line.split(b" ") for line in lines]
    return {word[0].removeprefix(b"key="): int(word[1].removeprefix(b"exp=")) for word in words}


# -- the wire --


@pytest.mark.parametrize(
    ("value", "flags", "data"),
    [
        (b"\0\r\n", 0, b"\0\r\n"), ("d\u00e9", 1, "d\u00e9".encode()), (42, 2, b"42"), (-7, 2, b"-7"),
        (None, 4, b""), (False, 5, b""), (True, 6, b""), (2**64, 7, b"%d" % 2**64), ([1], 8, b"\x91\x01"),
    ],
)  # fmt: skip
def test_values_on_the_wire(
    engine: MemcachedEngine, memcached_server: Any, value: Any, flags: int, data: bytes
) -> None:
    """The codec's flags byte is the low byte of the client flags; an int is decimal text."""
    engine.set("k", value)
    assert memcached_server.ask(b"get k\r\n") == b"VALUE k %d %d\r\n%b\r\nEND\r\n" % (flags, len(data), data)


def test_other_clients_items(engine: MemcachedEngine, memcached_server: Any) -> None:
    """What another client stored without flags, or with flags of its own, is bytes."""
    memcached_server.ask(b"set a 0 0 1\r\n5\r\n")
    memcached_server.ask(b"set b 512 0 1\r\n5\r\n")
    assert engine.get_many(["a", "b"]) == {"a": b"5", "b": b"5"}
    with pytest.raises(NotANumber):
        engine.incr("a")


def test_undecodable(engine: MemcachedEngine, memcached_server: Any) -> None:
    """Bytes that their flags do not fit are a ShmCacheError, and the connection goes on."""
    memcached_server.ask(b"set a 2 0 1\r\nx\r\n")
    with pytest.raises(ShmCacheError):
        engine.get("a")
    assert engine.set("b", 1)
    assert engine.get("b") == 1


ODD = [
    b"a b",
    b"a\tb",
    b"a\r\nset x 0 0 1\r\n1",
    b"\0",
    b"\x7f",
    b"k" * 251,
    b"\xffLlock",
    b"\xffC1",
    b"\xffF",
    b"\xffDx",
    b"\xff\xfe",
]


@pytest.mark.parametrize("key", [*ODD, b"k" * 250, "d\u00e9".encode(), b"\xffGspace"])
def test_odd_keys(engine: MemcachedEngine, memcached_server: Any, key: bytes) -> None:
    """A key that memcached cannot take, or that looks like one of ours, lies under a digest; others as they are."""
    engine.set(key, 1)
    assert engine.get(key) == 1
    digest = wire.Keys().wire(key)[0]
    assert (digest != key) == (key in ODD)
    assert memcached_server.ask(b"mg %b s\r\n" % digest) == b"HD s%d\r\n" % (
        1 if digest == key else 3 + len(key)
    )


def test_injection(engine: MemcachedEngine) -> None:
    """Keys with line ends and commands in them are keys."""
    engine.set("k", 1)
    for key in (b"k\r\nflush_all", b"k \r\ndelete k", b"k v\r\nmd k\r\n"):
        assert engine.get(key) is None
        assert engine.touch(key, 5) is False
        assert engine.incr(key) == 1
        assert engine.delete(key) is True
    assert engine.get("k") == 1


def test_clash_is_a_miss(engine: MemcachedEngine) -> None:
    """Of two keys with one digest each sees its own item or none, whatever is done with the other."""
    engine._keys = wire.Keys(digest=lambda key: b"same")
    one, other = "a b", "c d"
    engine.set(one, 1)
    assert engine.get(other, MISS) is MISS
    assert engine.gets(other) is None
    assert engine.ttl(other) is None
    assert other not in engine
    assert engine.get_many([one, other]) == {one: 1}
    assert engine.delete(other) is False
    assert engine.pop(other, MISS) is MISS
    assert engine.replace(other, 2) is False
    assert engine.touch(other, 5) is False
    assert engine.append(other, "x") is False
    assert engine.incr(other, initial=None) is None
    assert engine.get(one) == 1
    assert engine.add(other, "x") is True
    assert engine.get(one, MISS) is MISS
    assert engine.incr(one) == 1
    assert engine.get(other, MISS) is MISS


def test_long_keys_raise(open_memcached: Callable[..., MemcachedEngine]) -> None:
    """With long_keys=raise a key that would need a digest is KeyTooLong; locks and namespaces go on."""
    engine = open_memcached(long_keys="raise")
    for key in (b"k" * 251, b"a b"):
        for call in (
            engine.get,
            engine.incr,
            engine.delete,
            lambda k: engine.set(k, 1),
            lambda k: engine.get_many([k]),
        ):
            with pytest.raises(KeyTooLong, match="long_keys"):
                call(key)
    with engine.lock("name " * 100):
        assert engine.set("k" * 250, 1)
    assert engine.namespace("space").set("k", 1)


def test_prefix(open_memcached: Callable[..., MemcachedEngine]) -> None:
    """Engines with different prefixes on one server have keys, iteration and clear apart."""
    one, two = open_memcached(prefix="one:"), open_memcached(prefix="two:")
    for engine in (one, two):
        engine.update({"k": engine.engine_id, "a b": 1, "k" * 249: 2})
    assert one.get("k") == one.engine_id
    assert set(one) == {"k", "a b", "k" * 249}
    one.clear()
    assert len(one) == 0
    assert set(two) == {"k", "a b", "k" * 249}
    for bad in ("a b", "p" * 181):
        with pytest.raises(ValueError, match="prefix"):
            open_memcached(prefix=bad)


def test_kamailio(open_memcached: Callable[..., MemcachedEngine], memcached_server: Any) -> None:
    """With kamailio=yes, keys of 250 bytes go as MD5 and decimal values without flags are ints, as its module does."""
    engine = open_memcached(kamailio=True)
    key = b"k" * 250
    name = hashlib.md5(key).hexdigest().encode()
    assert wire.Keys(kamailio=True).wire(b"k" * 249) == (b"k" * 249, False)
    assert wire.Keys(kamailio=True).wire(key) == (name, False)
    engine.set(key, "text")
    assert memcached_server.ask(b"get %b\r\n" % name) == b"VALUE %b 1 4\r\ntext\r\nEND\r\n" % name
    memcached_server.ask(b"set cnt 0 0 2\r\n10\r\n")
    assert engine.get("cnt") == 10
    assert engine.incr("cnt", -1) == 9
    assert memcached_server.ask(b"get cnt\r\n") == b"VALUE cnt 0 2\r\n9 \r\nEND\r\n"
    assert engine.get("cnt") == 9
    assert engine.decr("cnt", 10) == -1
    memcached_server.ask(b"set bin 0 0 2\r\n\x00\xff\r\n")
    assert engine.get("bin") == b"\x00\xff"


# -- counters --


def test_counter_keeps_its_end(engine: MemcachedEngine) -> None:
    """A counter counted for more than two ticks of the server's clock, above, below and across zero, ends when it
    was to end, to the second."""
    engine.incr("up", ttl=100)
    engine.decr("down", 10**6, ttl=100)
    engine.incr("across", ttl=100)
    engine.incr("digest ed", ttl=100)
    engine.incr("never")
    before = ends(engine)
    end, n = time.monotonic() + 2.2, 0
    while time.monotonic() < end:
        n += 1
        engine.incr("up", 3)
        engine.decr("down")
        engine.incr("across", -2 if n % 2 else 2)
        engine.incr("digest ed")
        engine.decr("never", 5)
    after = {name: when for name, when in ends(engine).items() if not name.startswith(b"%FFC")}
    assert after == before
    assert before[b"never"] == -1
    assert engine.counter("up") == 1 + 3 * n
    assert engine.counter("down") == -(10**6) - n
    assert engine.counter("digest ed") == 1 + n


def test_join_keeps_its_end(engine: MemcachedEngine) -> None:
    """append and prepend leave the end of the item as it was, under a digest too."""
    for key in ("k", "k k"):
        engine.set(key, "m", 100)
    before = ends(engine)
    end, n = time.monotonic() + 1.2, 0
    while time.monotonic() < end:
        n += 1
        for key in ("k", "k k"):
            assert engine.append(key, "z")
            assert engine.prepend(key, "a")
    assert {name: when for name, when in ends(engine).items() if not name.startswith(b"%FFC")} == before
    assert engine.get("k k") == engine.get("k") == "a" * n + "m" + "z" * n


def test_padding_is_stripped(engine: MemcachedEngine, memcached_server: Any) -> None:
    """The blanks that the server's own decr leaves are not part of the number."""
    engine.set("k", 100)
    assert engine.decr("k", 99) == 1
    assert b"1  \r\n" in memcached_server.ask(b"get k\r\n")
    assert engine.get("k") == engine.counter("k") == 1
    assert engine.incr("k", 0) == 1
    assert engine.get_many(["k"]) == {"k": 1}


@pytest.mark.parametrize("start", [None, 5, -5])
@pytest.mark.parametrize("ttl", [0, 100])
def test_no_update_is_lost(engine: MemcachedEngine, start: int | None, ttl: float) -> None:
    """Processes that add and subtract at once, from absence and across zero, lose nothing."""
    if start is not None:
        engine.set("k", start, ttl)

    def work(i: int) -> int:
        random.seed(i)
        steps = [random.randint(-3, 3) for _ in range(150)]
        for step in steps:
            engine.incr("k", step, ttl=ttl)
        return sum(steps)

    assert sum(in_processes(4, work)) + (start or 0) == engine.counter("k")


def test_native_overflow_is_not_met(engine: MemcachedEngine) -> None:
    """Where the server would count on to 2**64 or stop at 0, the answer is CounterOverflow or the negative number."""
    engine.set("k", MAX)
    with pytest.raises(CounterOverflow):
        engine.incr("k")
    assert engine.decr("k", MAX) == 0
    assert engine.decr("k", MAX) == MIN + 1
    assert engine.decr("k") == MIN
    with pytest.raises(CounterOverflow):
        engine.decr("k")
    assert engine.incr("k", MAX) == -1
    assert engine.incr("k", MAX) == MAX - 1


def test_races_end(engine: MemcachedEngine) -> None:
    """An incr that loses every race ends in LockTimeout, not never."""
    engine._patience = 0.5
    engine._load = lambda *a, **k: wire.Item(2, b"1", 0, -1, 10**15, True, 1)  # type: ignore[method-assign]
    engine.set("k", 1)
    with pytest.raises(LockTimeout, match="incr"):
        engine.incr("k")


def test_without_cas(open_memcached: Callable[..., MemcachedEngine], start_memcached: Any) -> None:
    """A server started without cas is refused where cas is needed, before anything is changed."""
    engine = open_memcached(start_memcached(args=["-C"]))
    engine.set("k", 1)
    for call in (engine.gets, engine.incr, engine.pop):
        with pytest.raises(NotSupported, match="-C"):
            call("k")
    assert engine.get("k") == 1


@pytest.mark.parametrize("token", [0, -1, "1", None, b"x", 1.5, (1, 2)])
def test_no_token(engine: MemcachedEngine, token: object) -> None:
    """A token that gets never gave changes nothing: 0 is none to the server either."""
    assert engine.cas("k", 2, token) is None
    engine.set("k", 1)
    assert engine.cas("k", 2, token) is False
    assert engine.get("k") == 1


# -- lifetimes --


@pytest.mark.parametrize(
    ("ttl", "seconds"), [(None, -1), (0.001, 2), (0.5, 2), (1, 2), (1.001, 3), (2_591_000, 2_591_001)]
)
def test_lifetime_is_rounded_up(
    engine: MemcachedEngine, memcached_server: Any, ttl: float, seconds: int
) -> None:
    """An item gets its lifetime in whole seconds, rounded up, and one for the tick the server is in."""
    engine.set("k", 1, ttl)
    engine.add("l", 1, ttl)
    engine.set("m", 1, 5)
    engine.touch("m", ttl)
    for key in b"klm":
        assert memcached_server.ask(b"mg %c t\r\n" % key) in (
            b"HD t%d\r\n" % seconds,
            b"HD t%d\r\n" % (seconds - 1),
        )


@pytest.mark.parametrize("days", [29.999, 30, 30.001, 31, 365, 3652])
def test_long_lifetimes(engine: MemcachedEngine, days: float) -> None:
    """Lifetimes around and beyond 30 days are as long as asked."""
    ttl = days * 86_400
    engine.set("k", 1, ttl)
    assert engine.get("k") == 1
    assert engine.ttl("k") == pytest.approx(ttl, abs=2.5)
    assert engine.gat("k", ttl / 2) == 1
    assert engine.ttl("k") == pytest.approx(ttl / 2, abs=2.5)
    assert engine.incr("k") == 2
    assert engine.decr("k", 5) == -3
    assert engine.ttl("k") == pytest.approx(ttl / 2, abs=2.5)


def test_never_shorter(engine: MemcachedEngine) -> None:
    """An item set for a second, at whatever moment between two ticks, is there half a second later."""
    for i in range(10):
        engine.set(f"k{i}", i, 0.6)
        time.sleep(0.05)
    time.sleep(0.05)
    assert engine.get_many([f"k{i}" for i in range(10)]) == {f"k{i}": i for i in range(10)}


@pytest.mark.parametrize("seconds", [0, 1, 1.5, 131_071, 131_072, 1e6, 3e8])
def test_grace_bits(seconds: float) -> None:
    """A grace comes back from the client flags rounded up, by less than a second or 1 in 65,536."""
    flags = int(wire.pack_flags(8, True, wire.grace_bits(seconds)))
    codec_flags, with_key, grace = wire.read_flags(flags)
    assert (codec_flags, with_key) == (8, True)
    assert flags < 2**32
    assert seconds <= grace <= max(seconds + 1, seconds * (1 + 2**-16) + 1)


def test_grace_and_other_calls(engine: MemcachedEngine) -> None:
    """An item past its soft deadline is absent for every call but those with grace; touch and set take the grace
    away; counting keeps it."""
    engine._set_grace("n", 1, 100, 50)
    assert engine.incr("n") == 2
    assert engine.decr("n", 5) == -3
    assert engine.ttl("n") == pytest.approx(100, abs=2)
    value, token = engine.gets("n")
    assert engine.cas("n", value, token) is True
    engine._set_grace("t", 1, 100, 50)
    assert engine.touch("t", 10) is True
    assert engine.get("t") == 1
    assert engine.ttl("t") == pytest.approx(10, abs=2)
    for key in "abcdefghi":
        engine._set_grace(key, "old", 0.001, 1000)
    token = engine.gets("a")[1]
    time.sleep(2.1)
    assert engine._get_grace("a") == ("old", False)
    assert engine.get_many("abcdefghi") == {}
    assert engine.cas("a", "x", token) is None
    assert engine.delete("a") is False
    assert engine._get_grace("a") is None
    assert engine.touch("b", 10) is False
    assert engine.gat("b", 10, MISS) is MISS
    assert engine.replace("b", 1) is False
    assert engine.append("b", "x") is False
    assert "b" not in engine
    assert engine.ttl("b") is None
    assert engine._get_left("b") is None
    assert engine._get_left_many(["b"]) == {}
    assert engine.pop("c", MISS) is MISS
    assert engine.delete_many(["d"]) == 0
    assert engine.add("e", "new") is True
    assert engine._get_grace("e") == ("new", True)
    assert engine.incr("f") == 1
    assert engine.incr("g", initial=None) is None
    assert engine.set("h", 1)
    assert engine.ttl("h") == math.inf
    assert {key for key in engine if len(key) == 1} == {"n", "t", "e", "f", "h"}


@pytest.mark.parametrize(("ttl", "least", "most"), [(0, math.inf, math.inf), (0.5, 0.0, 1.0), (1, 0.0, 1.0), (100, 98.0, 100.0)])
def test_value_and_lifetime_in_one_answer(engine: MemcachedEngine, ttl: float, least: float, most: float) -> None:
    """_get_left tells the value and what it surely has left, in one answer."""
    for key in ("k", "k k"):
        engine.set(key, [1], ttl)
        value, left = engine._get_left(key) or (None, -1.0)
        assert value == [1]
        assert least <= left <= most
    assert [value for value, _ in engine._get_left_many(["k", "k k", "absent"]).values()] == [[1], [1]]
    assert engine._get_left("absent") is None
    engine._set_grace("g", 1, 100, 50)
    assert engine._get_left_many(["g"])["g"][1] <= 100


# -- against the reference --

KEYS = st.sampled_from(["a", "b", "c c", "d" * 260])
VALUES = st.one_of(
    st.integers(-(2**65), 2**65), st.sampled_from([0, 1, -1, MAX, MIN]), st.text(max_size=5), st.binary(max_size=5),
    st.none(), st.booleans(), st.lists(st.integers(0, 9), max_size=2),
)  # fmt: skip
DELTAS = st.one_of(st.integers(-3, 3), st.sampled_from([MAX, MIN + 1, 10**18]))
STEPS = st.one_of(
    st.tuples(st.sampled_from(["get", "delete", "pop", "ttl", "counter", "__contains__"]), KEYS),
    st.tuples(st.sampled_from(["set", "add", "replace", "cas", "setdefault"]), KEYS, VALUES),
    st.tuples(
        st.sampled_from(["append", "prepend"]), KEYS, st.one_of(st.text(max_size=3), st.binary(max_size=3))
    ),
    st.tuples(st.sampled_from(["incr", "decr"]), KEYS, DELTAS),
    st.tuples(st.sampled_from(["touch", "gat"]), KEYS, st.sampled_from([0, 1000, 10**7])),
    st.tuples(st.sampled_from(["get_many", "delete_many"]), st.lists(KEYS, max_size=3)),
    st.tuples(st.just("set_many"), st.dictionaries(KEYS, VALUES, max_size=3)),
)


def outcome(engine: shmcache.Engine, step: tuple[Any, ...], tokens: dict[Any, Any]) -> Any:
    name, *args = step
    try:
        if name == "cas":
            if args[0] not in tokens:
                return "no token"
            args.append(tokens[args[0]])
        answer = getattr(engine, name)(*args)
    except (ShmCacheError, TypeError) as error:
        answer = type(error)
    if isinstance(args[0], str):
        found = engine.gets(args[0])
        if found:
            tokens[args[0]] = found[1]
    if name == "ttl" and isinstance(answer, float) and answer != math.inf:
        return round(answer, -2)
    return answer


@pytest.fixture(params=["memory", "posix"])
def reference(request: pytest.FixtureRequest, unique_name: Callable[[], str]) -> Iterator[shmcache.Engine]:
    """An engine to compare with."""
    url = (
        f"{request.param}:///{unique_name()}?size=4M"
        if request.param == "posix"
        else f"memory:{unique_name()}://"
    )
    with shmcache.open(url) as engine:
        yield engine
        if request.param == "posix":
            engine.unlink()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, min_size=50, max_size=60))
def test_like_the_reference(
    engine: MemcachedEngine, reference: shmcache.Engine, steps: list[tuple[Any, ...]]
) -> None:
    """10,000 random operations have the results they have in memory, of this process and shared."""
    engine.clear()
    reference.clear()
    tokens: tuple[dict[Any, Any], dict[Any, Any]] = ({}, {})
    for step in steps:
        assert outcome(engine, step, tokens[0]) == outcome(reference, step, tokens[1]), step
    assert dict(engine.items()) == dict(reference.items())


def test_closed(engine: MemcachedEngine) -> None:
    """A closed engine says so; closing again does nothing."""
    engine.close()
    engine.close()
    with pytest.raises(ShmCacheError, match="closed"):
        engine.get("k")
    with pytest.raises(ShmCacheError) as caught:
        engine.incr("k")
    assert not isinstance(caught.value, EngineDown)
