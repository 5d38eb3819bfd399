"""How items lie in memcached: keys, client flags, lifetimes, and the meta commands that move them.

On the wire a key is prefix + key, if that is at most 250 bytes without blanks and control characters. Other
keys go as prefix 0xFF `D` and 64 hex digits of BLAKE2b, and the true key stands before the value (two bytes
of length, big-endian, then the key), to be compared on read. Under 0xFF `L` name lies a lease, under 0xFF `M`
digest one with a long name, under 0xFF `F` the fence counter, under 0xFF `C` the clock item; namespaces have
0xFF `N` and 0xFF `G`. A key of the user's that starts like one of ours is digested.

Client flags, 32 bits:   0-7    flags byte of codec.py; an int is decimal text, so that the server can count
                         8      the true key stands before the value
                         9      the value is bytes, whatever bits 0-7 say
                         10-31  grace: seconds = bits 10-26 << bits 27-31; 0 = none
Grace is the last part of the server's lifetime: with so many seconds left, or fewer, the item is stale. So
the soft deadline runs by the server's clock, and is part of what the server's own touch moves. Without flags,
as other clients store text, the value is bytes; with kamailio=yes it is an int if it is a decimal number, and
bytes of our own have bit 9.

Lifetimes are whole seconds of the server, which counts them at the ticks of its clock: T<n> lives between
n-1 and n seconds. An item never lives shorter than asked: n is the lifetime rounded up, plus 1.

I1  Nothing here touches a socket, and no driver is imported.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from ..codec import BYTES, INT
from ..errors import KeyTooLong

__all__ = [
    "FOREVER",
    "Item",
    "Keys",
    "Reply",
    "clock_item",
    "expiry",
    "grace_bits",
    "pack_flags",
    "parse_item",
    "read_flags",
    "seconds_left",
]

MAX_WIRE_KEY: Final = 250
KAMAILIO_KEY: Final = 250
"""Bytes from which Kamailio's memcached module takes the MD5 for the key."""
MAX_PREFIX: Final = 180
"""Bytes of a prefix: 250 less the 66 of a digest, and some."""
MONTH: Final = 30 * 86_400
"""A larger number is a Unix time to the server."""
OVERHEAD: Final = 64
"""Bytes the server adds to key and value of an item: 63 measured with 1.6.18 and flags."""
FOREVER: Final = -1
"""What the server reports as seconds left of an item that never expires."""

WITH_KEY: Final = 0x100
PLAIN_BYTES: Final = 0x200

_PLAIN = re.compile(rb"[!-~\x80-\xff]+")
_DECIMAL = re.compile(rb"(?:0|-?[1-9][0-9]{0,18}) *")


class Reply(NamedTuple):
    """One answer to a meta command, or an error line."""

    code: bytes  # two letters; b"SE", b"CE", b"ER" for SERVER_ERROR, CLIENT_ERROR, ERROR
    flags: list[bytes]  # the rest of the line, in words
    data: bytes = b""


class Item(NamedTuple):
    """An item as read."""

    flags: int  # the codec's
    data: bytes
    grace: int  # seconds
    left: int  # seconds of the server, FOREVER
    cas: int
    ours: bool  # False: a digest's clash, another key's item
    size: int  # bytes of the value, whether read or not

    @property
    def stale(self) -> bool:
        return self.grace > 0 and FOREVER != self.left <= self.grace

    @property
    def live(self) -> bool:
        return self.ours and not self.stale


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=32).hexdigest().encode()


class Keys:
    """Keys to wire keys.

    Args: prefix: stands before every key; at most 180 bytes without blanks, control characters and 0xFF at
    the start. long_keys: "hash", or "raise" for KeyTooLong where a digest would be needed. kamailio: a key of
    250 bytes or more goes as its MD5, without the true key, as Kamailio's memcached module does it.
    """

    def __init__(
        self,
        prefix: str = "",
        long_keys: str = "hash",
        kamailio: bool = False,
        digest: Callable[[bytes], bytes] = _digest,
    ) -> None:
        self.prefix = prefix.encode()
        if self.prefix and (not _PLAIN.fullmatch(self.prefix) or len(self.prefix) > MAX_PREFIX):
            raise ValueError(
                f"prefix: up to {MAX_PREFIX} bytes without blanks and control characters wanted,"
                f" {prefix[:40]!r} of {len(self.prefix)} bytes found"
            )
        self._room = MAX_WIRE_KEY - len(self.prefix)
        self._raise = long_keys == "raise"
        self._kamailio = kamailio
        self._digest = digest

    def wire(self, key: bytes) -> tuple[bytes, bool]:
        """The wire key, and whether the true key has to stand before the value."""
        if self._kamailio and len(key) >= KAMAILIO_KEY:
            return self.prefix + hashlib.md5(key, usedforsecurity=False).hexdigest().encode(), False
        if len(key) > self._room or not _PLAIN.fullmatch(key):
            if self._raise:
                raise KeyTooLong(
                    f"key: at most {self._room} bytes without blanks and control characters wanted"
                    f" (long_keys=raise), {len(key)} bytes found: {key[:40]!r}"
                )
        elif key[0] != 0xFF or key[1:2] in (b"N", b"G"):
            return self.prefix + key, False
        return self.prefix + b"\xffD" + self._digest(key), True

    def lease(self, name: bytes) -> bytes:
        """The wire key of a lease."""
        wire = self.prefix + b"\xffL" + name
        if len(wire) <= MAX_WIRE_KEY and _PLAIN.fullmatch(name):
            return wire
        return self.prefix + b"\xffM" + _digest(name)

    @property
    def fence(self) -> bytes:
        return self.prefix + b"\xffF"

    def clock(self, end: int) -> bytes:
        return self.prefix + b"\xffC%d" % end

    def true(self, wire: bytes) -> bytes | None:
        """The key of a wire key that stands for itself; None for a digest, and for what is not a key."""
        key = wire[len(self.prefix) :]
        if not wire.startswith(self.prefix) or not key or (key[0] == 0xFF and key[1:2] not in (b"N", b"G")):
            return None
        return key

    def digested(self, wire: bytes) -> bool:
        return wire.startswith(self.prefix + b"\xffD")


def envelope(key: bytes, data: bytes) -> bytes:
    """The value of an item under a digest."""
    return len(key).to_bytes(2, "big") + key + data


def open_envelope(data: bytes) -> tuple[bytes, bytes]:
    """Key and value; an empty key if this is no envelope."""
    end = 2 + int.from_bytes(data[:2], "big")
    return (data[2:end], data[end:]) if 2 < end <= len(data) else (b"", b"")


def grace_bits(grace: float) -> int:
    """Client flags of a grace in seconds, rounded up: by less than 1 s up to 36 hours, then by at most 1 in
    65,536."""
    seconds, shift = math.ceil(grace), 0
    while seconds >= 1 << 17:
        seconds, shift = (seconds + 1) >> 1, shift + 1
    return seconds << 10 | shift << 27


def read_flags(flags: int) -> tuple[int, bool, int]:
    """The codec's flags, whether the true key stands in the value, and the grace in seconds."""
    kind = BYTES if flags & PLAIN_BYTES else flags & 0xFF
    return kind, bool(flags & WITH_KEY), (flags >> 10 & 0x1FFFF) << (flags >> 27 & 0x1F)


def pack_flags(codec_flags: int, with_key: bool, grace: int = 0, kamailio: bool = False) -> bytes:
    """Client flags as decimal text; `grace` as grace_bits gives it."""
    plain = PLAIN_BYTES if kamailio and codec_flags == BYTES else 0
    return b"%d" % (codec_flags | plain | (WITH_KEY if with_key else 0) | grace)


def parse_item(reply: Reply, key: bytes, with_key: bool, kamailio: bool) -> Item:
    """Read the answer to `mg key f t [v|s] [c]`, in any order. ValueError for one that is no such answer."""
    flags = left = cas = size = 0
    for word in reply.flags:
        kind = word[:1]
        if kind == b"f":
            flags = int(word[1:])
        elif kind == b"t":
            left = int(word[1:])
        elif kind == b"c":
            cas = int(word[1:])
        elif kind == b"s":
            size = int(word[1:])
    codec_flags, enclosed, grace = read_flags(flags)
    data, ours = reply.data, True
    if with_key:
        found, data = open_envelope(data) if enclosed else (b"", b"")
        ours = found == key
    if kamailio and flags == 0 and _DECIMAL.fullmatch(data):
        codec_flags = INT
    return Item(codec_flags, data, grace, left, cas, ours, len(data) or size)


def expiry(left: float | None, grace: int = 0) -> bytes:
    """The token after T: None = never, 0.0 = at once (the write removes), else seconds, plus a grace."""
    if left is None:
        return b"0"
    if left == 0.0:
        return b"-1"
    count = math.ceil(left) + 1 + grace
    return b"%d" % (count if count <= MONTH else int(time.time()) + count)


def seconds_left(item: Item, last: float = 0.5) -> float:
    """Seconds an item surely has left before its (soft) deadline: what the server says less the tick it is in;
    `last` in the last one, in which nothing is sure."""
    return math.inf if item.left == FOREVER else max(item.left - item.grace - 1.0, last)


def clock_item(now: float) -> int:
    """Unix time at which a clock item made now expires: a round one 4 to 9 years ahead, so that all clients of
    a server name the same one."""
    return ((int(now) >> 27) + 2) << 27
