"""What a tiered engine leaves to its far tier, and what concerns both tiers as wholes.

I1  on_down is applied here: a call of L2 goes through `_far`, which knows the answer for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from ..arguments import Key, check_key
from ..engine import Capability, Engine
from ..errors import EngineDown, NotSupported, ShmCacheError

__all__ = ["FarItems"]

_RAISE: Final = object()


class FarItems(Engine):
    """Iteration, tokens, lifetimes, leases: L2's."""

    _l1: Engine
    _l2: Engine
    _head: bytes
    _miss: bool
    _counts: dict[str, int]

    @property
    def capabilities(self) -> Capability:  # type: ignore[override]
        """L2's at this moment."""
        return self._l2.capabilities

    def _can(self, flag: Capability) -> bool:
        return self._l2._can(flag)

    @property
    def _n_groups(self) -> int:  # type: ignore[override]
        return self._l2._n_groups

    def _name(self, key: Key) -> bytes:
        if self._closed:
            raise ShmCacheError(f"engine {self.engine_id!r}: an open one wanted, closed found")
        return self._head + check_key(key)

    def _far(self, call: Callable[..., Any], *args: Any, down: Any = _RAISE, **options: Any) -> Any:
        """A call of L2, and the policy of on_down."""
        try:
            return call(*args, **options)
        except EngineDown:
            self._counts["down"] += 1
            if self._miss and down is not _RAISE:
                return down
            raise

    def counter(self, key: Key) -> int | None:
        self._name(key)
        number: int | None = self._far(self._l2.counter, key, down=None)
        return number

    def gets(self, key: Key, default: Any = None) -> Any:
        self._name(key)
        return self._far(self._l2.gets, key, default, down=default)

    def ttl(self, key: Key) -> float | None:
        self._name(key)
        left: float | None = self._far(self._l2.ttl, key, down=None)
        return left

    def keys(self, match: Key = "*") -> Iterator[Key]:
        return self._l2.keys(match)

    def items(self, match: Key = "*") -> Iterator[tuple[Key, Any]]:
        return self._l2.items(match)

    def __len__(self) -> int:
        return len(self._l2)

    def _walk(self) -> tuple[range, Callable[[int], list[Key]]]:
        return self._l2._walk()

    def _scan_keys(self, group: int) -> list[Key]:
        return self._l2._scan_keys(group)

    def raw(self, command: str, *args: Any) -> Any:
        """L2's answer. What the command changes, copies show within l1_ttl."""
        return self._l2.raw(command, *args)

    def _raw_error(self, answer: Any) -> str | None:
        return self._l2._raw_error(answer)

    def _lease_take(
        self, name: bytes, lease: float, owners: list[int] | None = None
    ) -> tuple[int, int] | bool | None:
        return self._l2._lease_take(name, lease, owners)

    def _lease_extend(self, name: bytes, owner: int, lease: float) -> bool:
        return self._l2._lease_extend(name, owner, lease)

    def _lease_release(self, name: bytes, owner: int) -> bool:
        return self._l2._lease_release(name, owner)

    def _lease_wait(self, name: bytes, timeout: float) -> None:
        self._l2._lease_wait(name, timeout)

    # -- both --

    def clean(self, limit: int | None = None) -> int:
        self._l1.clean(limit)
        return self._l2.clean(limit)

    def reattach(self) -> None:
        """Attach again the tiers that can."""
        for engine in (self._l1, self._l2):
            if getattr(type(engine), "reattach", None) is not Engine.reattach:
                engine.reattach()

    def _stats(self) -> dict[str, Any]:
        """This process's counts; items and bytes are L2's, l1_bytes is all of L1."""
        far = self._l2._stats()
        near = self._l1._stats()
        shared = {name: far.get(name, 0) for name in ("items", "bytes", "expired", "evicted")}
        return {**shared, **self._counts, "l1_bytes": near.get("bytes", 0)}

    def _check(self) -> list[dict[str, Any]]:
        """The findings of the tiers that can be audited. NotSupported where neither can."""
        found: list[dict[str, Any]] = []
        unable = 0
        for name, engine in (("l1", self._l1), ("l2", self._l2)):
            try:
                found += ({"tier": name, **finding} for finding in engine._check())
            except NotSupported:
                unable += 1
        if unable == 2:
            self._unsupported("check")
        return found

    def _now_ms(self) -> int:
        """L2's clock, for tests."""
        clock: Any = self._l2
        return int(clock._now_ms())

    def _set_clock(self, ms: int | None) -> None:
        """Freeze the clocks of both tiers: L2's at `ms`, L1's as much further; None: back to real."""
        near: Any = self._l1
        far: Any = self._l2
        near._set_clock(None if ms is None else near._now_ms() + ms - far._now_ms())
        far._set_clock(ms)
