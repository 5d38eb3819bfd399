"""Namespaces: views of an engine with keys of their own and clear() in O(1).

A key is stored as 0xFF `N` name 0xFF generation key. The generation, 16 random hex digits, lies under the
reserved key 0xFF `G` name: made on first write by `add`, read by every call, replaced by `clear()`.

I1  A generation is drawn at random from 2**64 and never used again: losing the reserved key, by eviction or
    clear() of the parent, empties the namespace and never brings an older generation back.
I2  A str key reaches neither the reserved key nor another namespace: 0xFF is in no UTF-8.
I3  get_or_set binds to the generation it started with: what is computed from before a clear() is not seen
    after it.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard, TypeVar, cast

from .arguments import DEFAULT, MISS, Key, Ttl, check_key, key_text, lifetime
from .engine import Capability, Engine
from .errors import EngineDown

__all__ = ["Namespace"]

_Method = TypeVar("_Method", bound=Callable[..., Any])


class _NoGeneration(EngineDown):
    """With on_down=miss: a write whose generation could be neither read nor stored. Nobody would find it."""


def _answers_no(method: _Method) -> _Method:
    """A write that answers False where its generation's server is down and on_down=miss."""

    @functools.wraps(method)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return method(*args, **options)
        except _NoGeneration:
            return False

    return cast(_Method, run)


class Namespace(Engine):
    """A view of `parent` under `name`; what `Engine.namespace` returns. Namespaces nest.

    Items whose generation is gone are out of reach and leave the store by expiry or eviction. Locks belong to
    the name: clear() keeps them. Each call reads the generation first, one `get` of the parent, which counts
    there. stats, clean and check are the parent's; raw, unlink and reattach raise NotSupported; close()
    leaves the parent open.
    """

    def __init__(self, parent: Engine, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"namespace: str wanted, {type(name).__name__} found")
        data = check_key(name)
        self._parent = parent
        self._name = name
        self._reserved = b"\xffG" + data
        self._head = b"\xffN" + data + b"\xff"
        self.url = parent.url
        self.engine_id = parent.engine_id
        self.default_ttl = parent.default_ttl

    @property
    def capabilities(self) -> Capability:  # type: ignore[override]
        """The parent's at this moment, but for RAW."""
        return self._parent.capabilities & ~Capability.RAW

    def _can(self, flag: Capability) -> bool:
        return Capability.RAW not in flag and self._parent._can(flag)

    @property
    def _closed(self) -> bool:  # type: ignore[override]
        return self._parent._closed

    @property
    def _readonly(self) -> bool:  # type: ignore[override]
        return self._parent._readonly

    @property
    def _miss(self) -> bool:  # type: ignore[override]
        return self._parent._miss

    @property
    def _n_groups(self) -> int:  # type: ignore[override]
        return self._parent._n_groups

    def __repr__(self) -> str:
        return f"<Namespace {self._name!r} of {self._parent!r}>"

    # -- keys --

    def _prefix(self) -> bytes | None:
        """Head and generation; None while there is none, that is, while the namespace is empty."""
        generation = self._parent.get(self._reserved)
        return self._head + generation.encode() if _valid(generation) else None

    def _made_prefix(self) -> bytes:
        """Head and generation, made if there is none. _NoGeneration if that cannot be."""
        fresh = secrets.token_hex(8)
        for _ in range(8):  # one or two; more only while others clear, and with on_down=miss
            generation = self._parent.get(self._reserved, MISS)
            if _valid(generation):
                return self._head + generation.encode()
            stored = (self._parent.add if generation is MISS else self._parent.set)(
                self._reserved, fresh, None
            )
            if stored:
                return self._head + fresh.encode()
        raise _NoGeneration(f"namespace {self._name!r}: a generation wanted, none that could be stored found")

    def _old(self, key: Key) -> bytes | None:
        """The stored key of what may be there; None while the namespace is empty."""
        data, prefix = check_key(key), self._prefix()
        return None if prefix is None else prefix + data

    def _new(self, key: Key) -> bytes:
        """The stored key of what shall be there."""
        data = check_key(key)
        return self._made_prefix() + data

    def _resolve(self, key: Key) -> tuple[Engine, Key]:
        try:
            return self._parent._resolve(self._new(key))
        except _NoGeneration:  # get_or_set goes on, with a generation that nobody else has
            return self._parent._resolve(self._head + secrets.token_hex(8).encode() + check_key(key))

    # -- reading and changing what is there --

    def get(self, key: Key, default: Any = None) -> Any:
        full = self._old(key)
        return default if full is None else self._parent.get(full, default)

    def gets(self, key: Key, default: Any = None) -> Any:
        full = self._old(key)
        return default if full is None else self._parent.gets(full, default)

    def _peek(self, key: Key) -> Any:
        full = self._old(key)
        return MISS if full is None else self._parent._peek(full)

    def _get_grace(self, key: Key) -> tuple[Any, bool] | None:
        full = self._old(key)
        return None if full is None else self._parent._get_grace(full)

    def ttl(self, key: Key) -> float | None:
        full = self._old(key)
        return None if full is None else self._parent.ttl(full)

    def delete(self, key: Key) -> bool:
        full = self._old(key)
        return False if full is None else self._parent.delete(full)

    def pop(self, key: Key, default: Any = None) -> Any:
        full = self._old(key)
        return default if full is None else self._parent.pop(full, default)

    @_answers_no
    def append(self, key: Key, data: str | bytes) -> bool:
        return self._parent.append(self._new(key), data)

    @_answers_no
    def prepend(self, key: Key, data: str | bytes) -> bool:
        return self._parent.prepend(self._new(key), data)

    @_answers_no
    def touch(self, key: Key, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        return self._parent.touch(self._new(key), ttl, expire_at=expire_at)

    def gat(
        self, key: Key, ttl: Ttl = DEFAULT, default: Any = None, *, expire_at: float | None = None
    ) -> Any:
        try:
            return self._parent.gat(self._new(key), ttl, default, expire_at=expire_at)
        except _NoGeneration:
            return default

    def get_many(self, keys: Iterable[Key]) -> dict[Key, Any]:
        pairs, prefix = [(key, check_key(key)) for key in keys], self._prefix()
        if prefix is None:
            return {}
        found = self._parent.get_many([prefix + data for _, data in pairs])
        return {key: found[prefix + data] for key, data in pairs if prefix + data in found}

    def delete_many(self, keys: Iterable[Key]) -> int:
        data, prefix = [check_key(key) for key in keys], self._prefix()
        return 0 if prefix is None else self._parent.delete_many([prefix + key for key in data])

    def _walk(self) -> tuple[range, Callable[[int], list[Key]]]:
        groups, live = self._parent._walk()
        return groups, lambda group: self._own(live, group)

    def _scan_keys(self, group: int) -> list[Key]:
        return self._own(self._parent._scan_keys, group)

    def _own(self, live: Callable[[int], list[Key]], group: int) -> list[Key]:
        prefix = self._prefix()
        if prefix is None:
            return []
        return [
            key_text(key[len(prefix) :])
            for key in live(group)
            if isinstance(key, bytes) and key.startswith(prefix)
        ]

    # -- storing --

    @_answers_no
    def set(self, key: Key, value: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        return self._parent.set(self._new(key), value, ttl, expire_at=expire_at)

    @_answers_no
    def add(self, key: Key, value: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        return self._parent.add(self._new(key), value, ttl, expire_at=expire_at)

    @_answers_no
    def replace(self, key: Key, value: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        return self._parent.replace(self._new(key), value, ttl, expire_at=expire_at)

    def cas(
        self, key: Key, value: Any, token: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None
    ) -> bool | None:
        return self._parent.cas(self._new(key), value, token, ttl, expire_at=expire_at)

    def incr(
        self,
        key: Key,
        delta: int = 1,
        *,
        initial: int | None = 0,
        ttl: Ttl = DEFAULT,
        expire_at: float | None = None,
    ) -> int | None:
        return self._parent.incr(self._new(key), delta, initial=initial, ttl=ttl, expire_at=expire_at)

    def decr(
        self,
        key: Key,
        delta: int = 1,
        *,
        initial: int | None = 0,
        ttl: Ttl = DEFAULT,
        expire_at: float | None = None,
    ) -> int | None:
        return self._parent.decr(self._new(key), delta, initial=initial, ttl=ttl, expire_at=expire_at)

    def set_many(
        self, mapping: Mapping[Any, Any], ttl: Ttl = DEFAULT, *, expire_at: float | None = None
    ) -> list[Key]:
        lifetime(ttl, expire_at)
        names = {check_key(key): key for key in mapping}
        try:
            prefix = self._made_prefix()
        except _NoGeneration:
            return list(mapping)
        stored = {prefix + check_key(key): value for key, value in mapping.items()}
        failed = self._parent.set_many(stored, ttl, expire_at=expire_at)
        return [names[check_key(key)[len(prefix) :]] for key in failed]

    @_answers_no
    def _set_grace(self, key: Key, value: Any, ttl: float, grace: float) -> bool:
        return self._parent._set_grace(self._new(key), value, ttl, grace)

    # -- the whole --

    def clear(self) -> None:
        """Empty the namespace in O(1) by a new generation. EngineDown if it could not be stored."""
        if not self._parent.set(self._reserved, secrets.token_hex(8), None):
            raise EngineDown(f"clear: a new generation of namespace {self._name!r} wanted, none stored found")

    def clean(self, limit: int | None = None) -> int:
        return self._parent.clean(limit)

    def close(self) -> None:
        """Nothing: the parent stays open."""

    def _stats(self) -> dict[str, Any]:
        return self._parent._stats()

    def _check(self) -> list[dict[str, Any]]:
        return self._parent._check()

    # -- leases: by name, whatever the generation --

    def _lease_take(
        self, name: bytes, lease: float, owners: list[int] | None = None
    ) -> tuple[int, int] | bool | None:
        return self._parent._lease_take(self._head + name, lease, owners)

    def _lease_extend(self, name: bytes, owner: int, lease: float) -> bool:
        return self._parent._lease_extend(self._head + name, owner, lease)

    def _lease_release(self, name: bytes, owner: int) -> bool:
        return self._parent._lease_release(self._head + name, owner)

    def _lease_wait(self, name: bytes, timeout: float) -> None:
        self._parent._lease_wait(self._head + name, timeout)


def _valid(generation: Any) -> TypeGuard[str]:
    return isinstance(generation, str) and len(generation) == 16
