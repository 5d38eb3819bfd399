"""Conformance: keys, values, storing, counting."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from .. import errors
from ..engine import MISS, Capability, Engine
from .harness import Harness, in_processes, in_threads, needs

__all__ = ["StoreTests"]

INT_MIN, INT_MAX = -(2**63), 2**63 - 1

VALUES = [
    b"", b"\x00\xff\r\n", b"x" * 100_000, "", "5", "d\u00e9j\u00e0 \U0001f600",
    0, -1, INT_MAX, INT_MIN, INT_MAX + 1, INT_MIN - 1, -(10**5000), 0.0, 1.5, -math.inf, True, False, None,
    [], [1, [2.5, None]], {}, {"a": [1, b"\xff"], "b": {"c": 2**70}, 3: True},
]  # fmt: skip


class StoreTests(Harness):
    """Sections 3 and 4, what concerns one moment."""

    # -- keys --

    @pytest.mark.parametrize(
        "call",
        [
            lambda e, k: e.get(k), lambda e, k: e.gets(k), lambda e, k: e[k], lambda e, k: k in e,
            lambda e, k: e.set(k, 1), lambda e, k: e.add(k, 1), lambda e, k: e.replace(k, 1),
            lambda e, k: e.cas(k, 1, e.gets("other")[1]), lambda e, k: e.append(k, b""),
            lambda e, k: e.prepend(k, b""),
            lambda e, k: e.delete(k), lambda e, k: e.pop(k), lambda e, k: e.ttl(k),
            lambda e, k: e.touch(k, 1), lambda e, k: e.gat(k, 1), lambda e, k: e.incr(k),
            lambda e, k: e.decr(k), lambda e, k: e.counter(k), lambda e, k: e.get_many([k]),
            lambda e, k: e.set_many({k: 1}), lambda e, k: e.delete_many([k]), lambda e, k: e.setdefault(k, 1),
            lambda e, k: e.get_or_set(k, int), lambda e, k: e.lock(k).__enter__(),
            lambda e, k: e.__setitem__(k, 1), lambda e, k: e.__delitem__(k),
        ],
    )  # fmt: skip
    def test_bad_key(self, engine: Engine, call: Callable[[Engine, Any], Any]) -> None:
        """Every method refuses an empty, too long or mistyped key by its own error."""
        engine.set("other", 1)
        for key, error in [("", ValueError), (b"", ValueError), ("k" * 65_536, errors.KeyTooLong)]:
            with pytest.raises((error, errors.NotSupported)):
                call(engine, key)
        with pytest.raises((ValueError, errors.NotSupported)):
            call(engine, "\ud800")
        for wrong in (1, None, bytearray(b"k"), ("k",)):
            with pytest.raises((TypeError, errors.NotSupported)):
                call(engine, wrong)
        assert engine.get("k" * 65_535) is None

    def test_key_str_and_bytes(self, engine: Engine) -> None:
        """A str and its UTF-8 are one key."""
        engine.set("d\u00e9", 1)
        assert engine.get("d\u00e9".encode()) == 1
        assert engine.delete(b"d\xc3\xa9")
        assert "d\u00e9" not in engine

    def test_odd_keys(self, engine: Engine) -> None:
        """Keys are compared byte by byte, whatever their bytes and length; none is cut or rewritten."""
        keys = [
            b"a",
            b"A",
            b"a ",
            b" a",
            b"a\n",
            b"a\0",
            b"\0",
            b"\xff\xfe",
            b"%61",
            b"k" * 250,
            b"k" * 251,
            b"k" * 65_535,
        ]
        keys += [b"k" * 65_534 + b"j", "e\u0301".encode(), "\u00e9".encode()]
        for i, key in enumerate(keys):
            assert engine.set(key, i)
        assert [engine.get(key) for key in keys] == list(range(len(keys)))
        assert engine.get_many(keys) == {key: i for i, key in enumerate(keys)}

    # -- values --

    @pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
    def test_round_trip(self, engine: Engine, value: Any) -> None:
        """A value comes back equal and with the type it went in with."""
        assert engine.set("k", value) is True
        found = engine.get("k", MISS)
        assert type(found) is type(value)
        assert found == value
        assert "k" in engine
        assert engine.get_many(["k"]) == {"k": value}

    def test_tuples_are_lists(self, engine: Engine) -> None:
        """A tuple comes back as a list."""
        engine.set("k", (1, (2, 3)))
        assert engine.get("k") == [1, [2, 3]]

    def test_values_are_copies(self, engine: Engine) -> None:
        """What was stored does not change with the object, nor with what `get` returned."""
        value = {"a": [1]}
        engine.set("k", value)
        value["a"].append(2)
        engine.get("k")["a"].append(3)
        assert engine.get("k") == {"a": [1]}

    @pytest.mark.parametrize(
        "value", [object(), {1, 2}, lambda: 0, "\ud800", 1j], ids=lambda value: type(value).__name__
    )
    def test_bad_value(self, engine: Engine, value: Any) -> None:
        """A value the codec cannot take is a TypeError, and the old value stays."""
        engine.set("k", 1)
        for store in (engine.set, engine.replace):
            with pytest.raises(TypeError):
                store("k", value)
        with pytest.raises(TypeError):
            engine.add("absent", value)
        with pytest.raises(TypeError):
            engine.set_many({"first": 1, "k": value})
        assert engine.get_many(["k", "absent", "first"]) == {"k": 1}

    def test_too_large(self, make_engine: Callable[..., Engine]) -> None:
        """A value over max_value is ValueTooLarge, and the old value stays."""
        engine = make_engine(**{self.small_option: self.small})
        assert engine.set("k", b"x" * (self.small // 2))
        with pytest.raises(errors.ValueTooLarge):
            engine.set("k", b"x" * (2 * self.small))
        with pytest.raises(errors.ValueTooLarge):
            engine.set_many({"first": 1, "k": b"x" * (2 * self.small)})
        if Capability.APPEND in engine.capabilities:
            for join in (engine.append, engine.prepend):
                with pytest.raises(errors.ValueTooLarge):
                    join("k", b"x" * self.small)
        assert engine.get("k") == b"x" * (self.small // 2)
        assert "first" not in engine

    # -- get, set, add, replace, delete, pop --

    def test_get_default(self, engine: Engine) -> None:
        """An absent key gives the default; a stored None is told apart by MISS."""
        assert engine.get("k") is None
        assert engine.get("k", 7) == 7
        assert engine.get("k", MISS) is MISS
        engine.set("k", None)
        assert engine.get("k", MISS) is None

    def test_add_replace_delete(self, engine: Engine) -> None:
        """add stores if absent, replace if present, delete says whether it existed."""
        assert engine.replace("k", 0) is False
        assert engine.add("k", 1) is True
        assert engine.add("k", 2) is False
        assert engine.get("k") == 1
        assert engine.replace("k", 3) is True
        assert engine.get("k") == 3
        assert engine.delete("k") is True
        assert engine.delete("k") is False
        assert "k" not in engine

    def test_add_has_one_winner(self, engine: Engine) -> None:
        """Of several threads that add one key, one succeeds."""
        assert sum(in_threads(8, lambda i: engine.add("k", i))) == 1

    @needs(Capability.CAS)
    def test_pop(self, engine: Engine) -> None:
        """pop removes and returns; absent gives the default; one of several gets the item."""
        assert engine.pop("k") is None
        assert engine.pop("k", MISS) is MISS
        engine.set("k", None)
        assert engine.pop("k", MISS) is None
        engine.set("k", [1])
        assert sorted(in_threads(4, lambda i: engine.pop("k", [])), key=len) == [[], [], [], [1]]

    @needs(Capability.CAS)
    def test_cas(self, engine: Engine) -> None:
        """cas is True if nothing changed since gets, False if something did, None if the item is gone."""
        assert engine.gets("k") is None
        assert engine.gets("k", MISS) is MISS
        engine.set("k", "a")
        value, token = engine.gets("k")
        assert value == "a"
        assert engine.cas("k", "b", token) is True
        assert engine.cas("k", "c", token) is False
        assert engine.get("k") == "b"
        engine.delete("k")
        assert engine.cas("k", "d", token) is None
        assert "k" not in engine

    @needs(Capability.CAS)
    @pytest.mark.parametrize(
        "change",
        [
            lambda e: e.set("k", 1),
            lambda e: e.incr("k"),
            lambda e: e.delete("k") and e.add("k", 1),
            lambda e: (e.clear(), e.set("k", 1)),
        ],
    )
    def test_cas_sees_changes(self, engine: Engine, change: Callable[[Engine], Any]) -> None:
        """A token dies with any write to the key, also with one that stores an equal value anew."""
        engine.set("k", 1)
        _, token = engine.gets("k")
        change(engine)
        value = engine.get("k")
        assert engine.cas("k", 5, token) is False
        assert engine.get("k") == value

    @needs(Capability.CAS)
    def test_cas_loses_nothing(self, engine: Engine) -> None:
        """Concurrent gets-cas loops add up."""
        engine.set("k", [])

        def work(i: int) -> None:
            for j in range(20):
                while True:
                    value, token = engine.gets("k")
                    if engine.cas("k", [*value, (i, j)], token):
                        break

        in_threads(4, work)
        assert sorted(engine.get("k")) == sorted([i, j] for i in range(4) for j in range(20))

    @needs(Capability.APPEND)
    def test_append_prepend(self, engine: Engine) -> None:
        """append and prepend join bytes to bytes and str to str, and nothing else."""
        assert engine.append("k", b"x") is False
        assert engine.prepend("k", "x") is False
        assert "k" not in engine
        joins: list[tuple[Any, Any, Any]] = [(b"b", b"a", b"c\xff"), ("b", "a", "\u00e9"), (b"", b"", b"")]
        for value, head, tail in joins:
            engine.set("k", value)
            assert engine.append("k", tail) is True
            assert engine.prepend("k", head) is True
            assert engine.get("k") == head + value + tail
        wrong: list[tuple[Any, Any]] = [
            (5, b"5"),
            (None, b"x"),
            ([1], b"x"),
            (b"b", "x"),
            ("s", b"x"),
            (b"b", 5),
            ("s", None),
        ]
        for value, data in wrong:
            engine.set("k", value)
            for join in (engine.append, engine.prepend):
                with pytest.raises(TypeError):
                    join("k", data)
            assert engine.get("k") == value

    # -- counters --

    @needs(Capability.COUNTER)
    def test_incr_decr(self, engine: Engine) -> None:
        """incr and decr create at initial plus or minus delta, then count, also below zero."""
        assert engine.incr("a") == 1
        assert engine.incr("a", 5) == 6
        assert engine.decr("a", 10) == -4
        assert engine.decr("b") == -1
        assert engine.incr("c", 2, initial=10) == 12
        assert engine.incr("d", initial=None) is None
        assert "d" not in engine
        assert [engine.counter(key) for key in "abcd"] == [-4, -1, 12, None]
        assert type(engine.get("a")) is int
        engine.set("e", 41)
        assert engine.incr("e", initial=None) == 42

    @needs(Capability.COUNTER)
    @pytest.mark.parametrize("value", ["5", b"5", "", True, None, 1.0, [1]])
    def test_not_a_number(self, engine: Engine, value: Any) -> None:
        """Counting what is no int, text and bool included, is NotANumber and changes nothing."""
        engine.set("k", value)
        for count in (engine.incr, engine.decr, engine.counter):
            with pytest.raises(errors.NotANumber):
                count("k")
        assert engine.get("k") == value
        assert type(engine.get("k")) is type(value)

    @needs(Capability.COUNTER)
    def test_counter_overflow(self, engine: Engine) -> None:
        """Leaving signed 64 bits is CounterOverflow and changes nothing, for stored and for created
        counters."""
        for start, delta in ((INT_MAX, 1), (INT_MIN, -1), (1, INT_MAX), (INT_MAX + 1, 1)):
            engine.set("k", start)
            with pytest.raises(errors.CounterOverflow):
                engine.incr("k", delta)
            assert engine.get("k") == start
        engine.set("k", INT_MAX - 1)
        assert engine.incr("k") == INT_MAX
        assert engine.decr("k", INT_MAX) == 0
        with pytest.raises(errors.CounterOverflow):
            engine.incr("absent", INT_MAX, initial=1)
        assert "absent" not in engine

    @needs(Capability.COUNTER, Capability.EXPIRE, Capability.TTL)
    def test_counter_lifetime(self, engine: Engine) -> None:
        """The ttl of incr counts when it creates; an existing item keeps its lifetime."""
        engine.incr("k", ttl=self.life)
        engine.incr("k", ttl=1000 * self.life)
        left = engine.ttl("k")
        assert left is not None
        assert left <= self.life
        self.expire(engine)
        assert engine.counter("k") is None
        assert engine.incr("k") == 1
        assert engine.ttl("k") == math.inf

    @needs(Capability.COUNTER)
    def test_counter_threads(self, engine: Engine) -> None:
        """Threads that count from an absent key lose nothing."""
        in_threads(8, lambda i: [engine.incr("k") for _ in range(200)])
        assert engine.counter("k") == 1600

    @needs(Capability.COUNTER, Capability.EXPIRE, Capability.TTL)
    @pytest.mark.parametrize("ttl", [None, 1000])
    def test_counter_processes(self, engine: Engine, ttl: int | None) -> None:
        """K processes that add 1 M times to an absent key, with a lifetime or without, end at K * M, and the
        lifetime is the first one's; without SHARED each has its own counter."""

        def work(i: int) -> int | None:
            return [engine.incr("k", ttl=ttl) for _ in range(self.increments)][-1]

        done = in_processes(self.processes, work)
        if self.lacks(engine, Capability.SHARED):
            assert done == [self.increments] * self.processes
            assert "k" not in engine
        elif Capability.ATOMIC_CREATE in engine.capabilities:
            assert engine.counter("k") == self.processes * self.increments
            left = engine.ttl("k")
            assert left == math.inf if ttl is None else left is not None and 900 < left <= ttl
