"""What the memcached engine does with counters, grace and leases.

A counter is an int item: decimal text, counted by the server's own arithmetic while it is not negative, else
put in its place by cas. A lease is an item with a random number, made by add and removed by cas on that
number. The fence is a counter of the server's that starts at Unix microseconds, so that it still grows after
it was lost.

Limits: a lease is not freed by the death of its holder, only by its end, which the server may delay by up to
2 s. A server that evicts, restarts or moves its keys (failover=yes) loses leases: two may then hold one; the
fence tells them apart. Fences are comparable between leases on one server.

I1  No update is lost, the one that creates included, and none doubled: add, cas or the server's arithmetic
    with cas decide.
I2  A counter that is changed keeps its deadline to the tick of the server's clock, whatever its sign.
"""

from __future__ import annotations

import secrets
import time
from typing import Any, Final

from ..arguments import DEFAULT, Key, Ttl, check_key, check_number, lifetime
from ..codec import BIGINT, INT
from ..errors import CounterOverflow, EngineDown, NotANumber
from . import memcached_wire as wire
from .memcached_items import MemcachedItems
from .memcached_wire import Item

__all__ = ["MemcachedCounters"]

INT_MIN: Final = -(2**63)
INT_MAX: Final = 2**63 - 1
NONCE_BITS: Final = 62
"""Of a lease's random owner: two alive at once are equal once in 2**62."""


class MemcachedCounters(MemcachedItems):
    """See memcached.MemcachedEngine."""

    # -- counters --

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
        self._fits(data, 20)
        for _ in self._attempts("incr", data):
            item = self._load(data, use=True)
            if item is None or not item.live:
                if start is None:
                    return None
                total = self._total(key, start, step)
                if left == 0.0 or self._create(data, item, b"%d" % total, wire.expiry(left)):
                    return total
                continue
            if item.flags == BIGINT:
                raise CounterOverflow(f"incr {key!r:.80}: a value of 64 bits wanted, a longer int found")
            if item.flags != INT:
                raise NotANumber(f"incr {key!r:.80}: int wanted, a value of flags 0x{item.flags:02x} found")
            total = self._total(key, check_number(self._value(item), "value"), step)
            if self._count_on(data, item, total):
                return total
        return None

    @staticmethod
    def _total(key: Key, start: int, step: int) -> int:
        total = start + step
        if not INT_MIN <= total <= INT_MAX:
            raise CounterOverflow(
                f"incr {key!r:.80}: a result of -2**63 to 2**63-1 wanted, one beyond it found"
            )
        return total

    def _create(self, key: bytes, item: Item | None, data: bytes, expiry: bytes) -> bool:
        if item is not None:
            return self._swap(key, item, INT, data, expiry)
        return self._send(key, self._store(key, INT, data, expiry, b" ME"), b"HD", b"NS") == b"HD"

    def _count_on(self, key: bytes, item: Item, total: int) -> bool:
        """Let the counter `item` be `total`: by the server's own arithmetic where it can, which knows no sign."""
        name, with_key = self._keys.wire(key)
        old = self._value(item)
        if old >= 0 and total >= 0 and not with_key:
            mode = b"MI" if total >= old else b"MD"
            request = b"ma %b %b D%d%b" % (name, mode, abs(total - old), self._condition(item))
            return self._send(key, request, b"HD", b"NF", b"EX", b"NS") == b"HD"
        expiry = b"0"
        if item.left != wire.FOREVER:
            again, expiry = self._load_exactly(key)
            if again is None or again.cas != item.cas:
                return False
        return self._swap(key, item, INT, b"%d" % total, expiry, wire.grace_bits(item.grace))

    # -- grace --

    def _get_grace(self, key: Key) -> tuple[Any, bool] | None:
        try:
            item = self._load(check_key(key), use=True)
        except EngineDown as error:
            self._missed(error, None)
            return None
        self._count("hits" if item is not None and item.live else "misses")
        return None if item is None or not item.ours else (self._value(item), item.live)

    def _set_grace(self, key: Key, value: Any, ttl: float, grace: float) -> bool:
        data = check_key(key)
        flags, packed = self._pack(data, value)
        bits = wire.grace_bits(grace)
        request = self._store(data, flags, packed, wire.expiry(ttl, wire.read_flags(bits)[2]), grace=bits)
        try:
            self._send(data, request, b"HD")
        except EngineDown as error:
            return bool(self._missed(error, False))
        self._count("sets")
        return True

    # -- leases --

    def _lease_take(
        self, name: bytes, lease: float, owners: list[int] | None = None
    ) -> tuple[int, int] | bool | None:
        key = self._keys.lease(name)
        owner = secrets.randbits(NONCE_BITS) + 1
        if owners is not None:
            owners.append(owner)
        text = b"%d" % owner
        added, fence, seen = self._ask(
            key,
            b"ms %b %d F%d T%b ME\r\n%b" % (key, len(text), INT, wire.expiry(lease), text),
            b"ma %b N0 J%d v" % (self._keys.fence, time.time_ns() // 1000),
            b"mg %b v u" % key,
        )
        self._answer(added, b"HD", b"NS")
        self._answer(fence, b"VA")
        if added.code == b"NS" or seen.data != text:  # the latter: it ended before the fence was drawn
            return False
        return owner, int(fence.data)

    def _lease(self, key: bytes, owner: int) -> Item | None:
        """The lease's item if it is `owner`'s."""
        item = self._item(self._ask(key, b"mg %b v f t c u" % key, again=True)[0], b"", False)
        return item if item is not None and item.data == b"%d" % owner else None

    def _lease_extend(self, name: bytes, owner: int, lease: float) -> bool:
        key = self._keys.lease(name)
        item = self._lease(key, owner)
        if item is None:
            return False
        words = b"F%d T%b%b" % (INT, wire.expiry(lease), self._condition(item))
        reply = self._ask(key, b"ms %b %d %b\r\n%b" % (key, len(item.data), words, item.data))[0]
        return self._answer(reply, b"HD", b"EX", b"NF") == b"HD"

    def _lease_release(self, name: bytes, owner: int) -> bool:
        key = self._keys.lease(name)
        item = self._lease(key, owner)
        if item is None:
            return False
        reply = self._ask(key, b"md %b%b" % (key, self._condition(item)))[0]
        return self._answer(reply, b"HD", b"EX", b"NF") == b"HD"

    def _lease_wait(self, name: bytes, timeout: float) -> None:
        """Ask every 1 to 25 ms, less often the longer it takes."""
        key, end, step = self._keys.lease(name), time.monotonic() + timeout, 0.001
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(step, left))
            step = min(step * 2, 0.025)
            if self._answer(self._ask(key, b"mg " + key, again=True)[0], b"HD", b"EN") == b"EN":
                return
