"""The engine contract: what every engine implements, and what is derived from that.

I1  Engine has no state of its own (`__slots__ = ()`), so that it can stand beside a C type as second base.
I2  Arguments are checked before anything is touched: a ValueError or TypeError leaves the cache as it was.
I3  Derived methods use primitives only; an engine that can do better in one step overrides them.

To write an engine: derive from Engine, set OPTIONS, `capabilities`, `url`, `engine_id`, and implement
`from_url`, `get`, `set`, `add`, `replace`, `delete`, `clear`, `close`, `_stats`; then what the claimed
capabilities ask for: CAS `gets` `cas`; TOUCH `touch`; TTL `ttl`; COUNTER `incr`; APPEND `append` `prepend`;
ITERATE `_n_groups` `_scan_keys` `_peek`; LOCK `_lease_*`; GRACE `_get_grace` `_set_grace`. `shmcache.testing`
checks the result. An unclaimed one raises NotSupported.

An engine that a tiered one may stand before, and that can tell a value and its lifetime in one step, also has

    _get_left(key) -> tuple[Any, float] | None      the value and the seconds it surely has left (math.inf: it
                                                    never expires), both of one moment; None if absent
    _get_left_many(keys) -> dict[Key, tuple[Any, float]]    the hits so, under the keys as given

which count and fail as `get` and `get_many` do. Without the first a tiered engine asks for the lifetime after
the value; without the second it copies nothing that a get_many finds.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

from .arguments import (
    DEFAULT,
    MAX_KEY,
    MISS,
    Key,
    Ttl,
    check_key,
    check_number,
    compile_glob,
    key_text,
    lifetime,
)
from .errors import EngineDown, LockTimeout, NoSpace, NotSupported
from .stats import STAT_NAMES, Stats
from .url import MAX_TTL, Parser, Url

if TYPE_CHECKING:
    from .namespace import Namespace
    from .recipes import Lock, Memoized

__all__ = [
    "DEFAULT",
    "MAX_KEY",
    "MAX_TTL",
    "MISS",
    "STAT_NAMES",
    "Capability",
    "Engine",
    "Key",
    "Stats",
    "Ttl",
    "check_key",
    "check_number",
    "compile_glob",
    "key_text",
    "lifetime",
]


class Capability(enum.Flag):
    """What an engine can do. A method whose flag is missing raises NotSupported."""

    EXPIRE = enum.auto()  #: lifetimes
    SUBSECOND = enum.auto()  #: lifetimes to 1 ms; without it they are rounded up to whole seconds
    COUNTER = enum.auto()  #: incr, decr, counter
    ATOMIC_CREATE = enum.auto()  #: incr on an absent key loses nothing when several begin at once
    CAS = enum.auto()  #: gets, cas, pop
    TTL = enum.auto()  #: ttl
    TOUCH = enum.auto()  #: touch, gat
    APPEND = enum.auto()  #: append, prepend
    ITERATE = enum.auto()  #: keys, items, len, iter, delete_match
    LOCK = enum.auto()  #: lock, get_or_set, memoize
    GRACE = enum.auto()  #: get_or_set and memoize with grace
    SHARED = enum.auto()  #: other processes see the same items
    RAW = enum.auto()  #: raw
    PERSIST = enum.auto()  #: items outlive the last process that uses them


class Engine:
    """A cache with the API of the contract; see the module's head for what a subclass adds.

    Keys are str (UTF-8) or bytes, 1 to 65,535 bytes. Any method taking a key raises ValueError, KeyTooLong or
    TypeError for others; any taking a ttl (seconds; None or 0 = for ever; DEFAULT = default_ttl) or
    `expire_at` (Unix time) raises ValueError or TypeError as `lifetime` says; both before anything is
    touched. An expired item is absent for everything. Each primitive is atomic against all users of the same
    store; derived calls say what may be seen in between.
    """

    __slots__ = ()

    OPTIONS: ClassVar[Mapping[str, Parser]] = {}
    """Option name -> parser, for `url.parse_options`."""
    capabilities: Capability = Capability(0)
    url: Url
    engine_id: str
    default_ttl: float | None = None
    """Seconds that DEFAULT stands for; None = for ever."""
    _closed: bool = False
    _readonly: bool = False
    _miss: bool = False
    """on_down=miss: get_or_set then goes on without a lease where one cannot be asked for."""
    _n_groups: int = 1

    @classmethod
    def from_url(cls, url: Url, **options: Any) -> Engine:
        """Open an engine. Called by the registry with options typed by OPTIONS; those not given are left
        out."""
        raise NotImplementedError

    # -- primitives --

    def get(self, key: Key, default: Any = None) -> Any:
        """The value, or `default` if absent; pass MISS to tell a stored None apart."""
        raise NotImplementedError

    def set(self, key: Key, value: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        """Store, replacing value, lifetime and flags; True. TypeError, ValueTooLarge, NoSpace: the old value
        stays."""
        raise NotImplementedError

    def add(self, key: Key, value: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        """Store if absent: True stored, False present."""
        raise NotImplementedError

    def replace(self, key: Key, value: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        """Store if present: True stored, False absent."""
        raise NotImplementedError

    def delete(self, key: Key) -> bool:
        """Remove: True, or False if absent."""
        raise NotImplementedError

    def clear(self) -> None:
        """Remove everything; LockTimeout says how much was removed. Items set meanwhile may survive."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the store; other processes do not notice. Again: nothing happens. Other calls then raise
        ShmCacheError."""
        raise NotImplementedError

    def gets(self, key: Key, default: Any = None) -> Any:
        """`(value, token)` for `cas`, or `default` if absent. The token is opaque and good for this engine
        only."""
        self._unsupported("gets", Capability.CAS)

    def cas(
        self, key: Key, value: Any, token: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None
    ) -> bool | None:
        """Store if unchanged since `token`: True stored, False changed by another, None absent."""
        self._unsupported("cas", Capability.CAS)

    def touch(self, key: Key, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        """Give a new lifetime in one step, value untouched: True, or False if absent."""
        self._unsupported("touch", Capability.TOUCH)

    def ttl(self, key: Key) -> float | None:
        """Seconds left; math.inf if it never expires; None if absent."""
        self._unsupported("ttl", Capability.TTL)

    def incr(
        self,
        key: Key,
        delta: int = 1,
        *,
        initial: int | None = 0,
        ttl: Ttl = DEFAULT,
        expire_at: float | None = None,
    ) -> int | None:
        """Add `delta` to a signed 64-bit counter; the new value. An existing item keeps its lifetime.

        Absent: creates `initial + delta` with `ttl`; with `initial=None` returns None.
        Raises: NotANumber for another value (bool and text included), CounterOverflow; the value is
        untouched.
        """
        self._unsupported("incr", Capability.COUNTER)

    def append(self, key: Key, data: str | bytes) -> bool:
        """Add to the end of a bytes or str value, lifetime kept: True, or False if absent.

        Raises: TypeError if the value is neither bytes nor str or `data` is not of the value's type;
        ValueTooLarge, NoSpace.
        """
        self._unsupported("append", Capability.APPEND)

    def prepend(self, key: Key, data: str | bytes) -> bool:
        """Add to the start of a bytes or str value; as `append`."""
        self._unsupported("prepend", Capability.APPEND)

    def raw(self, command: str, *args: Any) -> Any:
        """The engine's own answer to its own command; NotSupported where there is none."""
        self._unsupported("raw", Capability.RAW)

    def _raw_error(self, answer: Any) -> str | None:
        """The server's error text in an answer of `raw` that has one; None where errors are raised."""
        return None

    def unlink(self) -> None:
        """Remove segment and semaphores; shared-memory engines only."""
        self._unsupported("unlink")

    def reattach(self) -> None:
        """Attach again after GuardLost; shared-memory engines only."""
        self._unsupported("reattach")

    def check(self) -> list[dict[str, Any]]:
        """Audit the store without changing it; findings, empty when sound. NotSupported where there is
        none."""
        return self._check()

    def _scan_keys(self, group: int) -> list[Key]:
        """The live keys of one group, 0 <= group < self._n_groups, copied, as `key_text` gives them, prefix
        stripped."""
        self._unsupported("iteration", Capability.ITERATE)

    def _peek(self, key: Key) -> Any:
        """The value or MISS, leaving use bits and statistics alone."""
        return self.get(key, MISS)

    def _stats(self) -> dict[str, Any]:
        """Statistics under the names of STAT_NAMES and others."""
        return {}

    def _check(self) -> list[dict[str, Any]]:
        self._unsupported("check")

    def _get_grace(self, key: Key) -> tuple[Any, bool] | None:
        """`(value, fresh)`, fresh False between soft and hard deadline; None if absent. Counts as `get`."""
        self._unsupported("grace", Capability.GRACE)

    def _set_grace(self, key: Key, value: Any, ttl: float, grace: float) -> bool:
        """Store with a soft deadline in `ttl` and a hard one `grace` seconds later; all but `_get_grace` heed
        the soft one."""
        self._unsupported("grace", Capability.GRACE)

    def _lease_take(
        self, name: bytes, lease: float, owners: list[int] | None = None
    ) -> tuple[int, int] | bool | None:
        """Take the lease `name` for `lease` seconds: `(owner, fence)`; False held by a live other; None table
        full.

        owner is a word nobody else got; fence grows with each taking of any lease. Not re-entrant. Freed by
        `_lease_release`, by its end, and, where the engine can know, by the death of the process that took
        it. owners: a list that gets the owner word before anybody can see the lease taken (in C: before a
        signal can be noticed), whatever is raised then: an interrupt loses the answer, not the lease.
        """
        self._unsupported("lock", Capability.LOCK)

    def _lease_extend(self, name: bytes, owner: int, lease: float) -> bool:
        """Let a held lease end `lease` seconds from now: True, or False if it is no longer `owner`'s."""
        self._unsupported("lock", Capability.LOCK)

    def _lease_release(self, name: bytes, owner: int) -> bool:
        """Free the lease if it is `owner`'s: True, or False if it is not."""
        self._unsupported("lock", Capability.LOCK)

    def _lease_wait(self, name: bytes, timeout: float) -> None:
        """Wait until `name` may be free, at most `timeout` real seconds. May return early."""
        time.sleep(min(max(timeout, 0.0), 0.01))

    # -- derived --

    def decr(
        self,
        key: Key,
        delta: int = 1,
        *,
        initial: int | None = 0,
        ttl: Ttl = DEFAULT,
        expire_at: float | None = None,
    ) -> int | None:
        """`incr` by `-delta`; may go below zero."""
        return self.incr(key, -check_number(delta, "delta"), initial=initial, ttl=ttl, expire_at=expire_at)

    def counter(self, key: Key) -> int | None:
        """The int under `key`, None if absent. NotANumber for another value, CounterOverflow beyond 64
        bits."""
        if not self._can(Capability.COUNTER):
            self._unsupported("counter", Capability.COUNTER)
        value = self.get(key, MISS)
        return None if value is MISS else check_number(value, "counter")

    def pop(self, key: Key, default: Any = None) -> Any:
        """Remove and return the value, atomically; `default` if absent."""
        while (found := self.gets(key, MISS)) is not MISS:
            value, token = found
            if self.cas(key, None, token, expire_at=0):
                return value
        return default

    def gat(
        self, key: Key, ttl: Ttl = DEFAULT, default: Any = None, *, expire_at: float | None = None
    ) -> Any:
        """Touch, then get; `default` if absent. Derived: a write in between may be what is returned."""
        return self.get(key, default) if self.touch(key, ttl, expire_at=expire_at) else default

    def get_many(self, keys: Iterable[Key]) -> dict[Key, Any]:
        """The hits as a dict under the keys as given. Derived: one get after the other."""
        checked = [(key, check_key(key)) for key in keys]
        found = ((key, self.get(data, MISS)) for key, data in checked)
        return {key: value for key, value in found if value is not MISS}

    def set_many(
        self, mapping: Mapping[Any, Any], ttl: Ttl = DEFAULT, *, expire_at: float | None = None
    ) -> list[Key]:
        """Store several; the keys not stored for want of space, guard or server. One set after the other, in
        order.

        Raises: what a bad key, value or ttl raises, before anything is stored.
        """
        lifetime(ttl, expire_at)
        pairs = list(mapping.items())
        for key, value in pairs:
            check_key(key)
            self._check_value(value)
        failed = []
        for key, value in pairs:
            try:
                if not self.set(key, value, ttl, expire_at=expire_at):
                    failed.append(key)
            except (NoSpace, LockTimeout, EngineDown):
                failed.append(key)
        return failed

    def _check_value(self, value: Any) -> None:
        """Raise what `set` would raise for this value whatever the store holds: TypeError, ValueTooLarge."""

    def delete_many(self, keys: Iterable[Key]) -> int:
        """Remove several; how many existed. One after the other."""
        return sum(map(self.delete, [check_key(key) for key in keys]))

    def delete_match(self, glob: Key) -> int:
        """Remove the items whose key matches (fnmatchcase, see `compile_glob`); how many. Group by group, no
        global stop."""
        matches = compile_glob(glob)
        groups, live = self._walk()
        return sum(self.delete_many([key for key in live(group) if matches(key)]) for group in groups)

    def keys(self, match: Key = "*") -> Iterator[Key]:
        """The keys, str where valid UTF-8, else bytes, that match the glob (fnmatchcase, see `compile_glob`).

        Nothing is held while you look at a key; an item present throughout is seen, once unless it is
        rewritten meanwhile.
        """
        matches, (groups, live) = compile_glob(match), self._walk()
        return (key for group in groups for key in live(group) if matches(key))

    def items(self, match: Key = "*") -> Iterator[tuple[Key, Any]]:
        """Pairs of key and value, as `keys`; an item gone since its key was read is left out. Does not count
        as use."""
        return ((key, value) for key in self.keys(match) if (value := self._peek(key)) is not MISS)

    def _walk(self) -> tuple[range, Callable[[int], list[Key]]]:
        """The groups of one walk, and what gives the live keys of each for as long as the walk lasts."""
        if not self._can(Capability.ITERATE):
            self._unsupported("iteration", Capability.ITERATE)
        return range(self._n_groups), self._scan_keys

    def __iter__(self) -> Iterator[Key]:
        return self.keys()

    def __len__(self) -> int:
        groups, live = self._walk()
        return sum(len(live(group)) for group in groups)

    def __bool__(self) -> bool:
        """True: `cache or other` neither scans nor drops an empty cache."""
        return True

    def __contains__(self, key: Key) -> bool:
        return self._peek(key) is not MISS

    def __getitem__(self, key: Key) -> Any:
        value = self.get(key, MISS)
        if value is MISS:
            raise KeyError(key)
        return value

    def __setitem__(self, key: Key, value: Any) -> None:
        self.set(key, value)

    def __delitem__(self, key: Key) -> None:
        if not self.delete(key):
            raise KeyError(key)

    def setdefault(
        self, key: Key, default: Any = None, ttl: Ttl = DEFAULT, *, expire_at: float | None = None
    ) -> Any:
        """The value; if absent, `default`, stored by `add`. Of several at once all return the one that was
        stored."""
        lifetime(ttl, expire_at)
        for _ in range(100):  # one pass, unless it comes and goes each time; with on_down=miss it never comes
            value = self.get(key, MISS)
            if value is not MISS:
                return value
            if self.add(key, default, ttl, expire_at=expire_at):
                break
        return default

    def update(self, other: Mapping[Any, Any] | Iterable[tuple[Key, Any]] = (), /, **more: Any) -> None:
        """Store all pairs with the default lifetime. Raises what the first pair that could not be stored
        raises."""
        pairs = dict(other, **more)
        for key in self.set_many(pairs):
            self.set(key, pairs[key])

    def clean(self, limit: int | None = None) -> int:
        """Sweep expired items once, at most `limit` of them; how many were reclaimed. 0 where the store does
        it alone."""
        return 0

    def stats(self) -> Stats:
        """Statistics: a mapping and attributes, see STAT_NAMES."""
        return Stats(self._stats())

    def get_or_set(
        self,
        key: Key,
        factory: Callable[[], Any],
        ttl: Ttl = DEFAULT,
        *,
        lease: float = 30.0,
        grace: float = 0.0,
    ) -> Any:
        """The value; if absent, `factory()`, called by one caller at a time across all processes, and stored.

        Args: lease: seconds after which a filler that has not finished is given up and the next waiter fills.
        grace: seconds the item stays beyond ttl; who meets it then gets it at once while one caller refills.
        Raises: what factory raises (the next waiter then fills) and what `set` raises (the computed value is
        lost). With the lease table full, or with on_down=miss and the server down, factory is called without a
        lease, by every caller.
        """
        from .recipes import get_or_set

        return get_or_set(self, key, factory, ttl, lease=lease, grace=grace)

    def memoize(
        self, ttl: Ttl = DEFAULT, *, key: Callable[..., Key] | str | None = None, grace: float = 0.0
    ) -> Callable[[Callable[..., Any]], Memoized]:
        """Decorator: cache a sync or async function's results by its arguments. See recipes.memoize."""
        from .recipes import memoize

        return memoize(self, ttl, key=key, grace=grace)

    def lock(self, name: Key, *, lease: float = 30.0, timeout: float | None = None) -> Lock:
        """A lock across processes, threads and tasks, as context manager. See recipes.Lock."""
        from .recipes import Lock

        return Lock(self, name, lease, timeout)

    def namespace(self, name: str) -> Namespace:
        """A view with keys of its own and `clear()` in O(1). See namespace.Namespace."""
        from .namespace import Namespace

        return Namespace(self, name)

    def _can(self, flag: Capability) -> bool:
        """Whether `flag` is claimed; asks no server that need not be asked for it."""
        return flag in self.capabilities

    def _resolve(self, key: Key) -> tuple[Engine, Key]:
        """The engine and key that hold `key` at this moment; a namespace answers with its parent and the
        prefixed key."""
        return self, key

    def _unsupported(self, what: str, wanted: Capability | None = None) -> NoReturn:
        flag = f"capability {wanted.name} wanted, " if wanted is not None else ""
        raise NotSupported(f"{what}: {flag}engine {self.engine_id!r} found without it")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.engine_id} {self.url}{' closed' if self._closed else ''}>"
