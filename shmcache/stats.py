"""Stats: what `Engine.stats()` returns.

I1  Every engine's Stats has the names of STAT_NAMES; an engine adds its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

__all__ = ["STAT_NAMES", "ItemCount", "Stats"]

STAT_NAMES: Final = (
    "hits", "misses", "sets", "deletes", "expired", "evicted", "items", "bytes",
    "guard_waits", "recoveries", "corrupt", "read_contended",
)  # fmt: skip
"""In every engine's Stats; 0 where an engine has no such thing."""


class ItemCount(int):
    """`Stats.items`: the number of items, and, called, the mapping's item view; both meanings have the name
    `items`."""

    _stats: Mapping[str, Any]

    def __call__(self) -> Any:
        return self._stats.items()


class Stats:
    """Statistics at one moment: a read-only mapping whose keys are attributes too. Not exact after a
    crash."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values: dict[str, Any] = dict.fromkeys(STAT_NAMES, 0) | dict(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(
                f"stats: one of {', '.join(getattr(self, '_values', ()))} wanted, {name!r} found"
            )
        return self._values[name]

    @property
    def items(self) -> ItemCount:
        count = ItemCount(self._values["items"])
        count._stats = self._values
        return count

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __eq__(self, other: object) -> bool:
        return self._values == (other._values if isinstance(other, Stats) else other)

    __hash__ = None  # type: ignore[assignment]

    def keys(self) -> Any:
        return self._values.keys()

    def values(self) -> Any:
        return self._values.values()

    def get(self, name: str, default: Any = None) -> Any:
        return self._values.get(name, default)

    def __reduce__(self) -> tuple[type[Stats], tuple[dict[str, Any]]]:
        return Stats, (self._values,)

    def __repr__(self) -> str:
        return f"Stats({', '.join(f'{k}={v!r}' for k, v in self._values.items())})"


Mapping.register(Stats)
