"""Random operations on each engine and on the in-process reference: every answer has to be the same.

SHMCACHE_DIFFERENTIAL_STEPS in the environment is the least number of operations per engine: 500 without it. The
long leg is `SHMCACHE_DIFFERENTIAL_STEPS=10000 pytest tests/test_differential.py`. memcached against shared memory is
in test_memcached.py, 10,000 operations in every run. Engines whose clock can be set live through lifetimes; for
the others none ends while the test runs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import shmcache
from shmcache import MISS, Capability
from shmcache.engines.memory import MemoryEngine

STEPS = int(os.environ.get("SHMCACHE_DIFFERENTIAL_STEPS") or 500)
LENGTH = 20
"""Operations of one example, to twice as many: enough for an item to be made, changed by several calls and
lost; so few that what fails can be read."""

KEYS = st.sampled_from(["a", "b", "c", b"\xff\x00", "k" * 300])
TEXTS = st.sampled_from(["", "5", "text", "\u00e9", b"", b"5", b"\xff\r\n"])
INTS = st.integers(-3, 3) | st.sampled_from([2**63 - 1, -(2**63)])
VALUES = st.one_of(INTS, TEXTS, st.sampled_from([None, True, 1.5, [1, {"x": b"y"}], 2**64, -(2**70)]))
TTLS = st.sampled_from([None, 0, 5, 40, 1000.5])
DELTAS = st.integers(-3, 3) | st.sampled_from([2**63 - 1, -(2**63), 2**62])


@dataclass
class Pair:
    """The engine under test and the reference, with the tokens that both gave for the same reads."""

    engine: Any
    reference: MemoryEngine
    frozen: bool
    tokens: list[tuple[Any, Any, Any]] = field(default_factory=list)

    def forget(self, key: Any) -> None:
        """Drop the tokens of a key: whether touch ends them is left to the engine."""
        self.tokens = [token for token in self.tokens if token[0] != key]

    def both(self, call: Callable[[Any], Any]) -> tuple[Any, Any]:
        return answer(call, self.engine), answer(call, self.reference)


def answer(call: Callable[[Any], Any], engine: Any) -> Any:
    """What a call returns, made comparable by type, or the type of what it raises."""
    try:
        return typed(call(engine))
    except (shmcache.ShmCacheError, TypeError, ValueError, KeyError) as error:
        return type(error)


def typed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: typed(inner) for key, inner in value.items()}
    return type(value), value


Step = Callable[[Pair], tuple[Any, Any]]
OPERATIONS: list[st.SearchStrategy[tuple[str, Capability, Step]]] = []


def operation(needs: Capability, **arguments: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """Make an operation of a function of a pair and drawn arguments."""

    def decorate(function: Any) -> Any:
        def bind(drawn: dict[str, Any]) -> tuple[str, Capability, Step]:
            return f"{function.__name__}({drawn})", needs, lambda pair: function(pair, **drawn)

        OPERATIONS.append(st.fixed_dictionaries(arguments).map(bind))
        return function

    return decorate


NONE = Capability(0)


@operation(NONE, key=KEYS)
def get(pair, key):
    return pair.both(lambda e: e.get(key, MISS))


@operation(NONE, key=KEYS)
def contains(pair, key):
    return pair.both(lambda e: (key in e, e._peek(key)))


@operation(
    NONE, key=KEYS, value=VALUES, ttl=TTLS, how=st.sampled_from(["set", "add", "replace", "setdefault"])
)
def store(pair, key, value, ttl, how):
    return pair.both(lambda e: getattr(e, how)(key, value, ttl))


@operation(NONE, key=KEYS, value=VALUES, how=st.sampled_from(["set", "add", "replace"]))
def store_in_the_past(pair, key, value, how):
    return pair.both(lambda e: getattr(e, how)(key, value, expire_at=1.0))


@operation(Capability.CAS, key=KEYS)
def gets(pair, key):
    ours, theirs = pair.engine.gets(key, (MISS, None)), pair.reference.gets(key, (MISS, None))
    if MISS not in (ours[0], theirs[0]):
        pair.tokens.append((key, ours[1], theirs[1]))
    return typed(ours[0]), typed(theirs[0])


@operation(Capability.CAS, value=VALUES, ttl=TTLS, which=st.integers(0, 5))
def cas(pair, value, ttl, which):
    if not pair.tokens:
        return None, None
    key, ours, theirs = pair.tokens[-1 - which % len(pair.tokens)]
    return (
        answer(lambda e: e.cas(key, value, ours, ttl), pair.engine),
        answer(lambda e: e.cas(key, value, theirs, ttl), pair.reference),
    )


@operation(Capability.APPEND, key=KEYS, data=TEXTS, how=st.sampled_from(["append", "prepend"]))
def join(pair, key, data, how):
    return pair.both(lambda e: getattr(e, how)(key, data))


@operation(NONE, key=KEYS)
def delete(pair, key):
    return pair.both(lambda e: e.delete(key))


@operation(Capability.CAS, key=KEYS)
def pop(pair, key):
    return pair.both(lambda e: e.pop(key, MISS))


@operation(Capability.TOUCH, key=KEYS, ttl=TTLS)
def touch(pair, key, ttl):
    pair.forget(key)
    return pair.both(lambda e: e.touch(key, ttl))


@operation(Capability.TOUCH, key=KEYS, ttl=TTLS)
def gat(pair, key, ttl):
    pair.forget(key)
    return pair.both(lambda e: e.gat(key, ttl, MISS))


@operation(Capability.TTL, key=KEYS)
def lifetime(pair, key):
    ours, theirs = pair.engine.ttl(key), pair.reference.ttl(key)
    if None in (ours, theirs) or math.inf in (ours, theirs):
        return ours, theirs
    return ours, pytest.approx(theirs, abs=0.001 if pair.frozen else 5)


@operation(
    Capability.COUNTER,
    key=KEYS,
    delta=DELTAS,
    initial=st.none() | INTS,
    ttl=TTLS,
    how=st.sampled_from(["incr", "decr"]),
)
def count(pair, key, delta, initial, ttl, how):
    return pair.both(lambda e: getattr(e, how)(key, delta, initial=initial, ttl=ttl))


@operation(Capability.COUNTER, key=KEYS)
def counter(pair, key):
    return pair.both(lambda e: e.counter(key))


@operation(NONE, keys=st.lists(KEYS, max_size=4))
def get_many(pair, keys):
    return pair.both(lambda e: e.get_many(keys))


@operation(NONE, mapping=st.dictionaries(KEYS, VALUES, max_size=4), ttl=TTLS)
def set_many(pair, mapping, ttl):
    return pair.both(lambda e: e.set_many(mapping, ttl))


@operation(NONE, keys=st.lists(KEYS, max_size=3))
def delete_many(pair, keys):
    return pair.both(lambda e: e.delete_many(keys))


@operation(Capability.ITERATE, glob=st.sampled_from(["*", "[ab]", "?", "k*", b"\xff*"]))
def items(pair, glob):
    def plain(engine):  # the keys of namespaces differ: their generations are random
        found = {key: value for key, value in engine.items(glob) if key[:2] not in (b"\xffN", b"\xffG")}
        return found, len(engine)

    return pair.both(plain)


@operation(Capability.ITERATE, glob=st.sampled_from(["[ab]", "?", b"\xff\x00*", "none"]))
def delete_match(pair, glob):
    return pair.both(lambda e: e.delete_match(glob))


@operation(Capability.GRACE, key=KEYS, value=VALUES, ttl=st.sampled_from([5.0, 40.0]))
def set_grace(pair, key, value, ttl):
    return pair.both(lambda e: e._set_grace(key, value, ttl, 30.0))


@operation(Capability.GRACE, key=KEYS)
def get_grace(pair, key):
    return pair.both(lambda e: e._get_grace(key))


@operation(NONE, key=KEYS, value=VALUES, name=st.sampled_from(["x", "y"]))
def in_namespace(pair, key, value, name):
    return pair.both(lambda e: (e.namespace(name).get(key, MISS), e.namespace(name).set(key, value)))


@operation(NONE, clear=st.integers(0, 5))
def clear_once_in_a_while(pair, clear):
    return (None, None) if clear else pair.both(lambda e: e.clear())


@operation(NONE, seconds=st.sampled_from([0.001, 1, 5, 39, 100]))
def wait(pair, seconds):
    if pair.frozen:
        for engine in (pair.engine, pair.reference):
            engine._set_clock(engine._now_ms() + round(seconds * 1000))
    return None, None


def run(engine: Any, frozen: bool) -> None:
    """As many examples as make STEPS operations, each from an empty engine."""
    done = 0

    @settings(
        max_examples=max(1, STEPS // LENGTH),
        deadline=None,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.large_base_example,
        ],
    )
    @given(st.lists(st.one_of(OPERATIONS), min_size=LENGTH, max_size=2 * LENGTH))
    def example(steps):
        nonlocal done
        pair = Pair(engine, MemoryEngine(), frozen)
        engine.clear()
        if frozen:
            for one in (engine, pair.reference):
                one._set_clock(one._now_ms())
        for name, needs, step in steps:
            if needs & ~engine.capabilities:
                continue
            note(name)
            ours, theirs = step(pair)
            assert ours == theirs, name
            done += 1

    example()
    assert done >= STEPS


def test_differential(form, make_engine):
    """Every answer of an engine is the reference's."""
    run(make_engine(), form.frozen)
