"""Conformance: lifetimes, section 4 rows 1 to 7."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from ..engine import DEFAULT, MAX_TTL, MISS, Capability, Engine
from ..errors import NotSupported
from .harness import Harness, needs

__all__ = ["LifetimeTests"]

YEAR = 365.25 * 86_400
BAD_TTLS = [
    (-1, ValueError), (-0.001, ValueError), (math.nan, ValueError), (math.inf, ValueError),
    (-math.inf, ValueError), (10 * YEAR + 1, ValueError), (10**400, ValueError), (1_700_000_000, ValueError),
    (timedelta(seconds=-1), ValueError), (timedelta(days=5000), ValueError),
    (True, TypeError), ("5", TypeError), (b"5", TypeError), ([5], TypeError), (1j, TypeError),
]  # fmt: skip

TTL_CALLS: list[tuple[Capability, Callable[[Engine, Any], Any]]] = [
    (Capability.EXPIRE, lambda e, t: e.set("k", 2, t)),
    (Capability.EXPIRE, lambda e, t: e.set("k", 2, ttl=t)),
    (Capability.EXPIRE, lambda e, t: e.add("k", 2, t)),
    (Capability.EXPIRE, lambda e, t: e.replace("k", 2, t)),
    (Capability.EXPIRE, lambda e, t: e.set_many({"k": 2}, t)),
    (Capability.EXPIRE, lambda e, t: e.setdefault("k", 2, t)),
    (Capability.EXPIRE, lambda e, t: e.get_or_set("k", int, t)),
    (Capability.CAS, lambda e, t: e.cas("k", 2, e.gets("other")[1], t)),
    (Capability.TOUCH, lambda e, t: e.touch("k", t)),
    (Capability.TOUCH, lambda e, t: e.gat("k", t)),
    (Capability.COUNTER, lambda e, t: e.incr("k", ttl=t)),
    (Capability.COUNTER, lambda e, t: e.decr("k", ttl=t)),
]

AT_CALLS: list[Callable[[Engine, float], Any]] = [
    lambda e, t: e.set("k", 2, expire_at=t), lambda e, t: e.replace("k", 2, expire_at=t),
    lambda e, t: e.cas("k", 2, e.gets("k")[1], expire_at=t), lambda e, t: e.touch("k", expire_at=t),
    lambda e, t: e.gat("k", expire_at=t) and True, lambda e, t: not e.set_many({"k": 2}, expire_at=t),
    lambda e, t: e.delete("k") and e.add("k", 2, expire_at=t),
    lambda e, t: e.delete("k") and e.incr("k", 2, expire_at=t),
    lambda e, t: e.delete("k") and e.decr("k", -2, expire_at=t),
]  # fmt: skip


class LifetimeTests(Harness):
    """Section 4, rows 1 to 7."""

    @pytest.mark.parametrize(("flag", "call"), TTL_CALLS)
    def test_bad_ttl(self, engine: Engine, flag: Capability, call: Callable[[Engine, Any], Any]) -> None:
        """A negative, NaN, infinite or over ten years' ttl, or one of another type, touches nothing."""
        if flag not in engine.capabilities:
            with pytest.raises(NotSupported):
                call(engine, 5)
            return
        engine.set("other", 1)
        for ttl, error in BAD_TTLS:
            for present in (False, True):
                engine.delete("k")
                if present:
                    engine.set("k", 1)
                with pytest.raises(error, match="ttl"):
                    call(engine, ttl)
                assert engine.get("k", MISS) == (1 if present else MISS)
        if Capability.TTL in engine.capabilities:
            assert engine.ttl("k") == math.inf

    @needs(Capability.EXPIRE, Capability.TTL)
    @pytest.mark.parametrize("ttl", [None, 0, 0.0, timedelta(0), DEFAULT])
    def test_for_ever(self, engine: Engine, ttl: Any) -> None:
        """A ttl of None or 0 means for ever, as does DEFAULT without a default_ttl."""
        engine.set("k", 1, self.life)
        engine.set("k", 1, ttl)
        assert engine.ttl("k") == math.inf
        if self.frozen:
            self.advance(engine, 20 * YEAR)
            assert engine.get("k") == 1

    @needs(Capability.EXPIRE, Capability.TTL)
    @pytest.mark.parametrize("ttl", [1, 1.5, timedelta(minutes=1), 31 * 86_400, 10 * 365 * 86_400, MAX_TTL])
    def test_ttl_left(self, engine: Engine, ttl: Any) -> None:
        """ttl gives the seconds left, also beyond 30 days; None if absent."""
        assert engine.ttl("k") is None
        engine.set("k", 1, ttl)
        wanted = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
        left = engine.ttl("k")
        assert left is not None
        assert left == pytest.approx(wanted, abs=0.001 if self.frozen else 2)
        assert engine.get("k") == 1

    @needs(Capability.EXPIRE)
    def test_default_ttl(self, make_engine: Callable[..., Engine], *, engine: Engine) -> None:
        """DEFAULT takes default_ttl; an explicit None or 0 overrides it."""
        short = self.freeze(make_engine(default_ttl=self.life))
        short.set("a", 1)
        if Capability.COUNTER in short.capabilities:
            short.incr("b")
        short.set("c", 1, 0)
        short.set("d", 1, None)
        short.set_many({"e": 1})
        self.expire(short)
        assert short.get_many("abcde") == {"c": 1, "d": 1}

    @needs(Capability.EXPIRE)
    def test_moment_of_expiry(self, engine: Engine) -> None:
        """An item is there until its deadline, and absent when now >= deadline."""
        if not self.frozen:
            engine.set("k", 1, self.life)
            assert engine.get("k") == 1
            self.expire(engine)
        else:
            engine.set("k", 1, self.life)
            engine.set("short", 1, 0.0001)
            self.advance(engine, 0.001)
            assert "short" not in engine
            self.advance(engine, self.life - 0.002)
            assert engine.get("k") == 1
            if Capability.TTL in engine.capabilities:
                assert engine.ttl("k") == 0.001
            self.advance(engine, 0.001)
        assert engine.get("k", MISS) is MISS

    @needs(Capability.EXPIRE)
    def test_subsecond(self, engine: Engine) -> None:
        """With SUBSECOND a lifetime of 50 ms ends after 50 ms; without, it is rounded up to a second."""
        engine.set("k", 1, 0.05)
        self.advance(engine, 0.06)
        assert ("k" in engine) is self.lacks(engine, Capability.SUBSECOND)

    @needs(Capability.EXPIRE)
    def test_expired_is_absent(self, engine: Engine) -> None:
        """An expired item that nobody swept is absent for every call."""
        flags = engine.capabilities
        engine.set_many(dict.fromkeys("abcdefghijklmnop", 1), self.life)
        token = engine.gets("a")[1] if Capability.CAS in flags else None
        self.expire(engine)
        assert "a" not in engine
        assert engine.get("a", MISS) is MISS
        assert engine.get_many("ab") == {}
        with pytest.raises(KeyError):
            engine["a"]
        if Capability.ITERATE in flags:
            assert len(engine) == 0
            assert list(engine.items()) == []
            assert engine.delete_match("*") == 0
        if Capability.CAS in flags:
            assert engine.gets("a") is None
            assert engine.cas("a", 2, token) is None
            assert engine.pop("b", MISS) is MISS
        if Capability.TOUCH in flags:
            assert engine.touch("c", 100) is False
            assert engine.gat("d", 100, MISS) is MISS
        if Capability.TTL in flags:
            assert engine.ttl("e") is None
        if Capability.APPEND in flags:
            assert engine.append("f", b"x") is False
        if Capability.COUNTER in flags:
            assert engine.counter("g") is None
            assert engine.incr("h", 5) == 5
            assert engine.incr("i", initial=None) is None
        assert engine.replace("j", 2) is False
        assert engine.delete("k") is False
        assert engine.delete_many("lm") == 0
        assert engine.add("n", 2) is True
        assert engine.setdefault("o", 3) == 3
        assert engine.get_many("acdfjn") == {"n": 2}

    @needs(Capability.EXPIRE, Capability.TTL)
    def test_writes_and_lifetime(self, engine: Engine) -> None:
        """set, replace and cas give a new lifetime; append, prepend and incr keep the one there is."""
        writes: list[Callable[[], Any]] = [
            lambda: engine.set("k", "b"),
            lambda: engine.replace("k", "b"),
            lambda: engine.cas("k", "b", engine.gets("k")[1]),
        ]
        for write in writes[: 3 if Capability.CAS in engine.capabilities else 2]:
            engine.set("k", "a", self.life)
            assert write()
            assert engine.ttl("k") == math.inf
        engine.set("s", "a", self.life)
        engine.set("n", 1, self.life)
        engine.incr("n")
        engine.decr("n", 5)
        if Capability.APPEND in engine.capabilities:
            engine.append("s", "b")
            engine.prepend("s", "b")
        for key in "sn":
            left = engine.ttl(key)
            assert left is not None
            assert 0 < left <= self.life

    @needs(Capability.EXPIRE, Capability.TOUCH)
    def test_touch(self, engine: Engine) -> None:
        """touch and gat give a new lifetime, longer, shorter or endless, and leave the value alone."""
        assert engine.touch("k", 5) is False
        assert engine.gat("k", 5, MISS) is MISS
        engine.set_many({"a": [1], "b": [2], "c": None, "d": 4}, self.life)
        engine.set("e", 5)
        assert engine.touch("a", 100 * self.life) is True
        assert engine.gat("b", 100 * self.life) == [2]
        assert engine.gat("c", 0, MISS) is None
        assert engine.touch("e", self.life) is True
        self.expire(engine)
        assert engine.get_many("abcde") == {"a": [1], "b": [2], "c": None}
        if Capability.TTL in engine.capabilities:
            assert engine.ttl("c") == math.inf

    @needs(Capability.EXPIRE, Capability.TTL, Capability.CAS, Capability.COUNTER, Capability.TOUCH)
    @pytest.mark.parametrize("call", AT_CALLS)
    def test_expire_at(self, engine: Engine, call: Callable[[Engine, float], Any]) -> None:
        """expire_at is a Unix time wherever there is ttl; one that has passed removes; both together are
        refused."""
        engine.set("k", 1)
        assert call(engine, time.time() + 100)
        left = engine.ttl("k")
        assert left == pytest.approx(100, abs=2)
        call(engine, time.time() - 5)
        assert "k" not in engine
        engine.set("k", 1)
        for moment in (-1, math.nan, math.inf, time.time() + 11 * YEAR):
            with pytest.raises(ValueError, match="expire_at"):
                engine.set("k", 2, expire_at=moment)
        for wrong in (True, "5"):
            with pytest.raises(TypeError, match="expire_at"):
                engine.set("k", 2, expire_at=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="expire_at"):
            engine.set("k", 2, 5, expire_at=time.time() + 5)
        assert engine.get("k") == 1
        assert engine.ttl("k") == math.inf

    @needs(Capability.EXPIRE)
    def test_clean_counts_expired(self, engine: Engine) -> None:
        """What clean reclaims is expired, and clean never takes more than its limit."""
        engine.set_many({f"k{i}": i for i in range(20)}, self.life)
        engine.set("live", 1)
        self.expire(engine)
        assert engine.clean(5) <= 5
        assert engine.clean() <= 20
        assert engine.clean() == 0
        assert engine.get("live") == 1
