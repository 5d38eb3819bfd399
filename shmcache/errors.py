"""Typed errors of every engine.

I1  Each error an engine raises about the cache derives from ShmCacheError; wrong arguments are plain
    TypeError or ValueError.
I2  A driver's exception never leaves an engine: it is the `__cause__` of one of these.
I3  Messages name the field with the wanted and the found value; they never contain a stored value or a
    password.
"""

from __future__ import annotations

__all__ = [
    "CounterOverflow",
    "EngineDown",
    "GuardLost",
    "KeyTooLong",
    "LayoutMismatch",
    "LockTimeout",
    "NoSpace",
    "NotANumber",
    "NotSupported",
    "SegmentInvalid",
    "SegmentNotOurs",
    "ShmCacheError",
    "TooManyWorkers",
    "ValueTooLarge",
]


class ShmCacheError(Exception):
    """Base of all errors of shmcache; raised itself for a closed engine and for a stored value that does not
    decode."""


class EngineDown(ShmCacheError):
    """The server behind the engine does not answer; says nothing about whether the key exists."""


class LockTimeout(ShmCacheError):
    """A guard, a lock or a lease was not granted in time; its holder is alive. Nothing was changed."""


class NotANumber(ShmCacheError, TypeError):
    """A counter call met a value that is not an int (bool and text included); the value is untouched."""


class CounterOverflow(ShmCacheError, OverflowError):
    """The result would leave signed 64 bits; the value is untouched."""


class ValueTooLarge(ShmCacheError, ValueError):
    """The encoded value is longer than the engine's `max_value`; the old value stays."""


class KeyTooLong(ShmCacheError, ValueError):
    """The key is longer than 65,535 bytes, prefixes included; nothing was touched."""


class NoSpace(ShmCacheError):
    """No room without removing live items (`eviction=none`), or no memory for a segment; the old value
    stays."""


class GuardLost(ShmCacheError):
    """Segment or semaphores were removed underneath; reads go on, writes need `reattach()`."""


class LayoutMismatch(ShmCacheError):
    """The segment's layout or geometry differs from the wanted one; the message names field, wanted,
    found."""


class TooManyWorkers(ShmCacheError):
    """All worker slots of the segment are taken by live processes; reads go on."""


class SegmentNotOurs(ShmCacheError):
    """Wrong owner or too open permissions; nothing was adopted."""


class SegmentInvalid(ShmCacheError):
    """What lies under the name is not a segment of this library, or is damaged beyond use."""


class NotSupported(ShmCacheError):
    """The engine cannot do this; see its `capabilities`."""
