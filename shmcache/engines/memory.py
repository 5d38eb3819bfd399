"""memory:// - one process; the reference the other engines are compared with.

I1  All state changes under one lock, which is held for no codec and no caller's code but the injected clock.
I2  A fork waits for that lock, so a child starts with a copy between two operations, which is its own from
    then on.
I3  Values are stored encoded: what comes back is never the object that went in, as with any other engine.
I4  Time is in ms since the engine's birth; an item is absent when now >= its soft deadline, gone when now >=
    its hard one.

With `size`, the least recently used items are evicted after the expired ones. Driver: none.
"""

from __future__ import annotations

import heapq
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from .. import url as _url
from ..arguments import DEFAULT, MISS, Key, Ttl, check_key, check_number, key_text, lifetime
from ..codec import BIGINT, BYTES, INT, STR, Codec, codec_option, get_codec, pack, unpack
from ..engine import Capability, Engine
from ..errors import CounterOverflow, NoSpace, NotANumber, ShmCacheError, ValueTooLarge
from ..url import Parser, Url

__all__ = ["MemoryEngine"]

_OVERHEAD: Final = 64
"""Bytes an item counts for beyond key and value: the order of what a dict entry and an object take."""
_SWEEP: Final = 8
"""Expired items a write removes at most: more than one write can add, so that they never pile up."""

_lock = threading.RLock()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(
    before=lambda: _lock.acquire(),
    after_in_parent=lambda: _lock.release(),
    after_in_child=_after_fork_in_child,
)


def _boot_clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(slots=True, eq=False)
class _Item:
    flags: int
    data: Any  # bytes; an int for INT
    deadline: float
    soft: float
    token: int


_Verdict = Callable[[_Item | None], bool | None]


class MemoryEngine(Engine):
    """An engine in this process's memory.

    Args: default_ttl: seconds, None = for ever. max_value: bytes of an encoded value (None: a quarter of
    size, or unlimited). size: bytes of all items, key and value plus 64 each (None: unlimited). eviction:
    "auto", or "none" for NoSpace when full. codec: see codec.get_codec. clock: callable giving seconds, in
    place of the boot-time clock. max_leases: leases at one time.
    """

    OPTIONS: ClassVar[dict[str, Parser]] = {
        "default_ttl": _url.seconds(),
        "max_value": _url.size(1),
        "size": _url.size(1),
        "eviction": _url.choice("auto", "none"),
        "codec": codec_option,
        "clock": _url.keyword_only(_url.function),
        "max_leases": _url.integer(0),
    }
    capabilities = ~(Capability.SHARED | Capability.RAW | Capability.PERSIST)

    def __init__(
        self,
        *,
        url: Url | None = None,
        default_ttl: float | None = None,
        max_value: int | None = None,
        size: int | None = None,
        eviction: str = "auto",
        codec: Codec | str = "msgpack",
        clock: Callable[[], float] = _boot_clock,
        max_leases: int = 1024,
    ) -> None:
        self.url = Url("memory") if url is None else url
        self.engine_id = self.url.engine_id
        self.default_ttl = lifetime(default_ttl)
        self.max_value = size // 4 if max_value is None and size is not None else max_value
        self._size = size
        self._evict = eviction != "none"
        self._codec = get_codec(codec)
        self._clock = clock
        self._birth = clock()
        self._frozen: int | None = None
        self._closed = False
        self._items: OrderedDict[bytes, _Item] = OrderedDict()  # with a size: least recently used first
        self._due: list[tuple[float, bytes]] = []  # heap of hard deadline, key; stale ones among them
        self._bytes = 0
        self._token = 0
        self._leases: dict[bytes, tuple[int, int]] = {}  # name -> owner, deadline
        self._max_leases = max_leases
        self._fence = 0
        counts = "hits misses sets deletes expired evicted incrs touches"
        self._counts = dict.fromkeys(counts.split(), 0)

    @classmethod
    def from_url(cls, url: Url, **options: Any) -> MemoryEngine:
        if url.hosts or url.user is not None or url.path:
            raise ValueError(f"url: memory:// or memory:group:// wanted, {url} found")
        return cls(url=url, **options)

    def close(self) -> None:
        with _lock:
            self._closed = True
            self._leases.clear()
            self._empty()

    # -- time --

    def _now_ms(self) -> int:
        """ms since the engine's birth."""
        return round((self._clock() - self._birth) * 1000) if self._frozen is None else self._frozen

    def _now(self) -> int:
        """`_now_ms` of an open engine."""
        if self._closed:
            raise ShmCacheError(f"engine {self.engine_id!r}: an open engine wanted, a closed one found")
        return self._now_ms()

    def _set_clock(self, ms: int | None) -> None:
        """Freeze the clock at ms since the engine's birth; None = let it run again."""
        self._frozen = ms

    @staticmethod
    def _deadline(now: int, left: float | None) -> float:
        if left is None:
            return math.inf
        return now + math.ceil(left * 1000 - 1e-6)  # 1.1 * 1000 is 1100.0000000000002

    # -- the store, with the lock held --

    def _find(self, key: bytes, now: int, use: bool = False) -> _Item | None:
        """The live item; with `use`, counted and made the most recently used."""
        item = self._items.get(key)
        if item is not None and now >= item.soft:
            if now >= item.deadline:
                self._drop(key, "expired")
            item = None
        if use:
            self._counts["misses" if item is None else "hits"] += 1
            if item is not None and self._size is not None:
                self._items.move_to_end(key)
        return item

    def _drop(self, key: bytes, why: str) -> None:
        item = self._items.pop(key)
        self._bytes -= self._cost(key, item.data)
        self._counts[why] += 1

    @staticmethod
    def _cost(key: bytes, data: Any) -> int:
        return len(key) + (8 if isinstance(data, int) else len(data)) + _OVERHEAD

    def _write(self, key: bytes, flags: int, data: Any, deadline: float, soft: float, now: int) -> None:
        old, need = self._items.get(key), self._cost(key, data)
        if old is not None and now >= old.deadline:
            self._drop(key, "expired")
            old = None
        self._sweep(now, _SWEEP)
        more = need if old is None else need - self._cost(key, old.data)
        if self._size is not None and self._bytes + more > self._size:
            self._make_room(key, need, more, now)
        if old is not None:
            del self._items[key]
        self._token += 1
        self._items[key] = _Item(flags, data, deadline, soft, self._token)
        self._bytes += more
        self._schedule(key, deadline)

    def _schedule(self, key: bytes, deadline: float) -> None:
        if deadline < math.inf:
            heapq.heappush(self._due, (deadline, key))
            if len(self._due) > 2 * len(self._items) + 64:  # most entries are stale
                self._due = list(self._deadlines())
                heapq.heapify(self._due)

    def _deadlines(self) -> Iterator[tuple[float, bytes]]:
        return ((item.deadline, k) for k, item in self._items.items() if item.deadline < math.inf)

    def _make_room(self, key: bytes, need: int, more: int, now: int) -> None:
        assert self._size is not None
        self._sweep(now, None)
        while self._bytes + more > self._size:
            if need > self._size or not self._evict:
                raise NoSpace(f"size: {self._bytes + more} bytes wanted, {self._size} found")
            victim = next(iter(self._items))
            if victim == key:
                self._items.move_to_end(key)
            else:
                self._drop(victim, "evicted")

    def _sweep(self, now: int, limit: int | None) -> int:
        count = 0
        while self._due and self._due[0][0] <= now and (limit is None or count < limit):
            deadline, key = heapq.heappop(self._due)
            item = self._items.get(key)
            if item is not None and item.deadline == deadline:
                self._drop(key, "expired")
                count += 1
        return count

    def _pack(self, value: Any) -> tuple[int, Any]:
        flags, data = pack(value, self._codec)
        if self.max_value is not None and len(data) > self.max_value:
            raise ValueTooLarge(f"value: at most {self.max_value} bytes wanted, {len(data)} found")
        return (flags, value) if flags == INT else (flags, data)

    def _unpack(self, item: _Item) -> Any:
        return item.data if item.flags == INT else unpack(item.flags, item.data, self._codec)

    def _check_value(self, value: Any) -> None:
        self._pack(value)

    def _put(self, key: Key, value: Any, ttl: Ttl, expire_at: float | None, wanted: _Verdict) -> bool | None:
        """Store if `wanted(live item or None)`; its answer."""
        data, left = check_key(key), lifetime(ttl, expire_at, self.default_ttl)
        flags, packed = self._pack(value)
        with _lock:
            now = self._now()
            item = self._find(data, now)
            if not (answer := wanted(item)):
                return answer
            if left == 0.0:
                if data in self._items:
                    self._drop(data, "expired")
            else:
                deadline = self._deadline(now, left)
                self._write(data, flags, packed, deadline, deadline, now)
            self._counts["sets"] += 1
            return True

    # -- methods --

    def _read(self, key: Key, use: bool = True) -> _Item | None:
        data = check_key(key)
        with _lock:
            return self._find(data, self._now(), use)

    def get(self, key: Key, default: Any = None) -> Any:
        item = self._read(key)
        return default if item is None else self._unpack(item)

    def gets(self, key: Key, default: Any = None) -> Any:
        with _lock:
            item = self._read(key)
            if item is None:
                return default
            token, number = item.token, item.data  # a counter's change in place, both of them
        return (number if item.flags == INT else self._unpack(item)), token

    def _peek(self, key: Key) -> Any:
        item = self._read(key, use=False)
        return MISS if item is None else self._unpack(item)

    def set(self, key: Key, value: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        return bool(self._put(key, value, ttl, expire_at, lambda item: True))

    def add(self, key: Key, value: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        return bool(self._put(key, value, ttl, expire_at, lambda item: item is None))

    def replace(self, key: Key, value: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        return bool(self._put(key, value, ttl, expire_at, lambda item: item is not None))

    def cas(
        self, key: Key, value: Any, token: Any, ttl: Ttl = DEFAULT, *, expire_at: float | None = None
    ) -> bool | None:
        verdict: _Verdict = lambda item: None if item is None else item.token == token  # noqa: E731
        return self._put(key, value, ttl, expire_at, verdict)

    def delete(self, key: Key) -> bool:
        data = check_key(key)
        with _lock:
            live = self._find(data, self._now()) is not None
            if data in self._items:  # also past its soft deadline: get_or_set shall not bring it back
                self._drop(data, "deletes" if live else "expired")
            return live

    def pop(self, key: Key, default: Any = None) -> Any:
        data = check_key(key)
        with _lock:
            item = self._find(data, self._now(), use=True)
            if item is not None:
                self._drop(data, "deletes")
        return default if item is None else self._unpack(item)

    def touch(self, key: Key, ttl: Ttl = DEFAULT, *, expire_at: float | None = None) -> bool:
        return self._touch(key, ttl, expire_at) is not None

    def gat(
        self, key: Key, ttl: Ttl = DEFAULT, default: Any = None, *, expire_at: float | None = None
    ) -> Any:
        item = self._touch(key, ttl, expire_at, use=True)
        return default if item is None else self._unpack(item)

    def _touch(self, key: Key, ttl: Ttl, expire_at: float | None, use: bool = False) -> _Item | None:
        data, left = check_key(key), lifetime(ttl, expire_at, self.default_ttl)
        with _lock:
            now = self._now()
            item = self._find(data, now, use)
            if item is not None:
                item.deadline = item.soft = self._deadline(now, left)
                self._schedule(data, item.deadline)
                self._counts["touches"] += 1
            return item

    def ttl(self, key: Key) -> float | None:
        data = check_key(key)
        with _lock:
            now = self._now()
            item = self._find(data, now)
            return None if item is None else (item.soft - now) / 1000

    def incr(
        self,
        key: Key,
        delta: int = 1,
        *,
        initial: int | None = 0,
        ttl: Ttl = DEFAULT,
        expire_at: float | None = None,
    ) -> int | None:
        data, left = check_key(key), lifetime(ttl, expire_at, self.default_ttl)
        start = None if initial is None else check_number(initial, "initial")
        step = check_number(delta, "delta")
        with _lock:
            now = self._now()
            item = self._find(data, now)
            if item is not None:
                if item.flags == BIGINT:
                    raise CounterOverflow("incr: a value of 64 bits wanted, a longer int found")
                if item.flags != INT:
                    raise NotANumber(f"incr: int wanted, a value of flags 0x{item.flags:02x} found")
                start = item.data
            elif start is None:
                return None
            total = start + step
            if not -(2**63) <= total < 2**63:
                raise CounterOverflow("incr: a result of -2**63 to 2**63-1 wanted, one beyond found")
            if item is not None:
                self._token += 1
                item.data, item.token = total, self._token
            elif left != 0.0:
                deadline = self._deadline(now, left)
                self._write(data, INT, total, deadline, deadline, now)
            self._counts["incrs"] += 1
            return total

    def append(self, key: Key, data: str | bytes) -> bool:
        return self._join(key, data, lambda old, new: old + new)

    def prepend(self, key: Key, data: str | bytes) -> bool:
        return self._join(key, data, lambda old, new: new + old)

    def _join(self, key: Key, addition: str | bytes, join: Callable[[bytes, bytes], bytes]) -> bool:
        data = check_key(key)
        if type(addition) not in (str, bytes):
            raise TypeError(f"data: str or bytes wanted, {type(addition).__name__} found")
        flags, packed = pack(addition, self._codec)
        with _lock:
            now = self._now()
            item = self._find(data, now)
            if item is None:
                return False
            if item.flags != flags:
                found = {BYTES: "bytes", STR: "str"}.get(item.flags, "another type")
                raise TypeError(f"value: {type(addition).__name__} like the data wanted, {found} found")
            joined = join(item.data, packed)
            if self.max_value is not None and len(joined) > self.max_value:
                raise ValueTooLarge(f"value: at most {self.max_value} bytes wanted, {len(joined)} found")
            self._write(data, flags, joined, item.deadline, item.soft, now)
            self._counts["sets"] += 1
            return True

    def clear(self) -> None:
        with _lock:
            self._now()
            self._empty()

    def _empty(self) -> None:
        self._items.clear()
        self._due.clear()
        self._bytes = 0

    def clean(self, limit: int | None = None) -> int:
        with _lock:
            return self._sweep(self._now(), limit)

    def _scan_keys(self, group: int) -> list[Key]:
        with _lock:
            now = self._now()
            return [key_text(key) for key, item in self._items.items() if now < item.soft]

    def _stats(self) -> dict[str, Any]:
        with _lock:
            now = self._now()
            live = sum(now < item.soft for item in self._items.values())
            return {**self._counts, "items": live, "bytes": self._bytes, "leases": len(self._leases)}

    def _check(self) -> list[dict[str, Any]]:
        with _lock:
            self._now()
            total = sum(self._cost(key, item.data) for key, item in self._items.items())
            findings = [{"kind": "bytes", "wanted": total, "found": self._bytes}]
            lost = len(set(self._deadlines()) - set(self._due))
            findings.append({"kind": "unscheduled", "wanted": 0, "found": lost})
            return [finding for finding in findings if finding["wanted"] != finding["found"]]

    # -- grace and leases --

    def _get_grace(self, key: Key) -> tuple[Any, bool] | None:
        data = check_key(key)
        with _lock:
            now = self._now()
            item = self._items.get(data)
            fresh = self._find(data, now, use=True) is not None
            if item is None or now >= item.deadline:
                return None
        return self._unpack(item), fresh

    def _set_grace(self, key: Key, value: Any, ttl: float, grace: float) -> bool:
        data = check_key(key)
        flags, packed = self._pack(value)
        with _lock:
            now = self._now()
            self._write(data, flags, packed, self._deadline(now, ttl + grace), self._deadline(now, ttl), now)
            self._counts["sets"] += 1
            return True

    def _lease_take(
        self, name: bytes, lease: float, owners: list[int] | None = None
    ) -> tuple[int, int] | bool | None:
        with _lock:
            now = self._now()
            held = self._leases.get(name)
            if held is not None and now < held[1]:
                return False
            if held is None and len(self._leases) >= self._max_leases:
                self._leases = {n: (owner, end) for n, (owner, end) in self._leases.items() if now < end}
                if len(self._leases) >= self._max_leases:
                    return None
            self._fence += 1
            if owners is not None:
                owners.append(self._fence)
            self._leases[name] = self._fence, int(self._deadline(now, lease))
            return self._fence, self._fence

    def _lease_extend(self, name: bytes, owner: int, lease: float) -> bool:
        with _lock:
            now = self._now()
            held = self._leases.get(name)
            if held is None or held[0] != owner or now >= held[1]:
                return False
            self._leases[name] = owner, int(self._deadline(now, lease))
            return True

    def _lease_release(self, name: bytes, owner: int) -> bool:
        with _lock:
            held = self._leases.get(name)
            if held is None or held[0] != owner:
                return False
            del self._leases[name]
            return True

    def _lease_wait(self, name: bytes, timeout: float) -> None:
        end, step = time.monotonic() + timeout, 0.0005
        while (left := end - time.monotonic()) > 0:
            held = self._leases.get(name)
            if held is None or self._now() >= held[1]:
                return
            time.sleep(min(step, left))
            step = min(step * 2, 0.01)
