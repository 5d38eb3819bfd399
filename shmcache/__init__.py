"""A cache shared by processes: shared memory, memcached, redis, or one process, behind one set of methods."""

from .engine import DEFAULT, MISS, Capability, Engine, Stats
from .errors import (
    CounterOverflow,
    EngineDown,
    GuardLost,
    KeyTooLong,
    LayoutMismatch,
    LockTimeout,
    NoSpace,
    NotANumber,
    NotSupported,
    SegmentInvalid,
    SegmentNotOurs,
    ShmCacheError,
    TooManyWorkers,
    ValueTooLarge,
)
from .registry import engine, open
from .url import Url

__version__ = "0.1.0"

__all__ = [
    "DEFAULT",
    "MISS",
    "Capability",
    "CounterOverflow",
    "Engine",
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
    "Stats",
    "TooManyWorkers",
    "Url",
    "ValueTooLarge",
    "engine",
    "open",
]
