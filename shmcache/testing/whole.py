"""Conformance: many keys, iteration, the mapping protocol, statistics, opening and closing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .. import errors
from ..engine import MISS, STAT_NAMES, Capability, Engine
from .harness import Harness, in_threads, needs

__all__ = ["WholeTests"]


class WholeTests(Harness):
    """Section 3, what concerns several items or the engine."""

    # -- many --

    def test_many(self, engine: Engine) -> None:
        """set_many stores all, get_many gives the hits under the keys as given, delete_many counts."""
        assert engine.set_many({"a": 1, b"b": None, "c": "x"}) == []
        assert engine.get_many(["a", b"b", "absent", b"c"]) == {"a": 1, b"b": None, b"c": "x"}
        assert engine.get_many(iter(["a"])) == {"a": 1}
        assert engine.get_many([]) == {}
        assert engine.set_many({}) == []
        assert engine.delete_many(["a", "b", "absent"]) == 2
        assert engine.delete_many(iter(["c", "c"])) == 1
        assert engine.delete_many([]) == 0

    def test_many_items(self, engine: Engine) -> None:
        """A thousand keys at once are stored, found and removed."""
        mapping: dict[str | bytes, Any] = {f"key{i}": i for i in range(1000)}
        assert engine.set_many(mapping) == []
        assert engine.get_many(mapping) == mapping
        assert engine.delete_many(mapping) == 1000
        assert engine.get_many(mapping) == {}

    def test_many_checks_first(self, engine: Engine) -> None:
        """A bad key or value in a set_many, get_many or delete_many raises before anything is touched."""
        with pytest.raises(ValueError, match="key"):
            engine.set_many({"a": 1, "": 2})
        with pytest.raises(TypeError):
            engine.set_many({"a": 1, "b": object()})
        assert "a" not in engine
        engine.set("a", 1)
        with pytest.raises(ValueError, match="key"):
            engine.delete_many(["a", ""])
        assert engine.get("a") == 1

    # -- mapping --

    def test_mapping(self, engine: Engine) -> None:
        """[], []=, del and in work as for a dict, KeyError for what is absent."""
        with pytest.raises(KeyError):
            engine["k"]
        with pytest.raises(KeyError):
            del engine["k"]
        engine["k"] = None
        assert engine["k"] is None
        assert "k" in engine
        del engine["k"]
        assert "k" not in engine

    def test_setdefault_update(self, engine: Engine) -> None:
        """setdefault gives what is stored, storing if absent; update stores mappings, pairs and keywords."""
        assert engine.setdefault("k", 1) == 1
        assert engine.setdefault("k", 2) == 1
        engine.set("none", None)
        assert engine.setdefault("none", 1) is None
        engine.update({"a": 1, b"b": 2})
        engine.update([("c", 3)], d=4)
        assert engine.get_many("abcd") == {"a": 1, "b": 2, "c": 3, "d": 4}

    @needs(Capability.ITERATE)
    def test_iteration(self, engine: Engine) -> None:
        """keys, items, iter and len give all live items; keys are str where valid UTF-8, else bytes."""
        mapping: dict[str | bytes, Any] = {"a": 1, "d\u00e9": None, b"\xff\xfe": b"x"}
        assert len(engine) == 0
        assert list(engine) == []
        assert engine.set_many(mapping) == []
        assert dict(engine.items()) == mapping
        assert set(engine) == set(engine.keys()) == set(mapping)
        assert len(list(engine)) == len(engine) == 3
        assert dict(engine) == mapping

    @needs(Capability.ITERATE)
    @pytest.mark.parametrize(
        ("glob", "wanted"),
        [
            ("*", {"a1", "a2", "b1", "A1", "x.y", "\u00e9", b"\xe9", "a\n1"}),
            ("a*", {"a1", "a2", "a\n1"}),
            ("?1", {"a1", "b1", "A1"}),
            ("[ab]1", {"a1", "b1"}),
            ("[!a]1", {"b1", "A1"}),
            ("a1", {"a1"}),
            ("x.?", {"x.y"}),
            ("?", {"\u00e9", b"\xe9"}),
            (b"a*", {"a1", "a2", "a\n1"}),
            (b"\xe9", {b"\xe9"}),
            ("", set()),
            ("absent*", set()),
        ],
    )
    def test_globs(self, engine: Engine, glob: str | bytes, wanted: set[Any]) -> None:
        """keys, items and delete_match take globs as fnmatchcase does, over the whole key."""
        names: list[str | bytes] = ["a1", "a2", "b1", "A1", "x.y", "\u00e9", b"\xe9", "a\n1"]
        assert engine.set_many(dict.fromkeys(names, 1)) == []
        assert set(engine.keys(glob)) == wanted
        assert dict(engine.items(glob)) == dict.fromkeys(wanted, 1)
        assert engine.delete_match(glob) == len(wanted)
        assert set(engine) == set(names) - wanted

    @needs(Capability.ITERATE)
    def test_iteration_under_writes(self, engine: Engine) -> None:
        """An item present throughout an iteration is seen, once, while others come and go."""
        steady = {f"steady{i}" for i in range(300)}
        engine.update(dict.fromkeys(steady, 1))
        seen = []
        for i, key in enumerate(engine.keys()):
            seen.append(key)
            engine.set(f"new{i % 50}", i)
            engine.delete(f"new{(i + 25) % 50}")
            if i > 10_000:
                break
        assert sorted(key for key in seen if key in steady) == sorted(steady)

    @needs(Capability.ITERATE)
    def test_items_deleted_meanwhile(self, engine: Engine) -> None:
        """items leaves out what is gone by the time its turn comes, and a caller may delete while it
        looks."""
        engine.update({f"k{i}": i for i in range(100)})
        for key, value in engine.items():
            assert engine.pop(key) == value
        assert len(engine) == 0

    def test_clear(self, engine: Engine) -> None:
        """clear removes everything, and what is stored afterwards stays."""
        engine.update({f"k{i}": i for i in range(100)})
        assert engine.clear() is None  # type: ignore[func-returns-value]
        assert engine.get_many([f"k{i}" for i in range(100)]) == {}
        assert engine.set("k1", 2)
        assert engine.get("k1") == 2

    # -- the engine --

    def test_threads(self, engine: Engine) -> None:
        """One engine object serves several threads: each reads what it wrote."""

        def work(i: int) -> None:
            for j in range(100):
                engine.set(f"{i}:{j}", [i, j])
                assert engine.get(f"{i}:{j}") == [i, j]

        in_threads(4, work)

    def test_stats(self, engine: Engine) -> None:
        """stats counts hits, misses, sets and deletes, as mapping and as attributes."""
        before = engine.stats()
        assert set(STAT_NAMES) <= set(before)
        engine.set("a", 1)
        engine.get("a")
        engine.get("absent")
        engine.get_many(["a", "absent"])
        engine.delete("a")
        engine.delete("absent")
        after = engine.stats()
        gained = {name: after[name] - before[name] for name in ("hits", "misses", "sets", "deletes")}
        assert gained == {"hits": 2, "misses": 2, "sets": 1, "deletes": 1}
        assert after.hits == after["hits"]
        assert dict(after) == dict(after.items())
        with pytest.raises(AttributeError):
            _ = after.nonsense

    @needs(Capability.ITERATE)
    def test_stats_items(self, engine: Engine) -> None:
        """stats().items is the number of live items, bytes more than their payload."""
        before = engine.stats()
        engine.update({f"k{i}": b"x" * 100 for i in range(10)})
        after = engine.stats()
        assert after.items - before.items == len(engine) == 10
        assert after.bytes - before.bytes >= 1000

    def test_raw(self, engine: Engine) -> None:
        """raw raises NotSupported unless the engine claims RAW."""
        if self.lacks(engine, Capability.RAW):
            with pytest.raises(errors.NotSupported):
                engine.raw("anything")

    def test_truth_and_repr(self, engine: Engine) -> None:
        """An empty engine is true; its repr has the engine_id, and no value."""
        engine.set("k", "geheim")
        assert bool(engine) is True
        assert engine.engine_id in repr(engine)
        assert "geheim" not in repr(engine)
        assert isinstance(engine.capabilities, Capability)

    def test_context_manager(self, make_engine: Callable[..., Engine]) -> None:
        """`with` closes; closing again does nothing; a closed engine raises a ShmCacheError or ValueError."""
        with make_engine() as engine:
            engine.set("k", 1)
        engine.close()
        for call in (lambda: engine.get("k", MISS), lambda: engine.set("k", 1), lambda: engine.delete("k")):
            with pytest.raises((errors.ShmCacheError, ValueError)):
                call()

    @pytest.mark.parametrize("limit", [None, 0, 10])
    def test_clean(self, engine: Engine, limit: int | None) -> None:
        """clean returns how many it reclaimed and leaves live items alone."""
        engine.set("k", 1)
        assert engine.clean(limit) == 0
        assert engine.get("k") == 1
