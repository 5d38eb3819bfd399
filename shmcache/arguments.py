"""What arguments mean: keys, lifetimes, counters, globs, and the sentinels MISS and DEFAULT.

I1  Each check raises before its caller has touched anything, naming the field with the wanted and the found
    value.
"""

from __future__ import annotations

import fnmatch
import math
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, TypeAlias, final

from .errors import CounterOverflow, KeyTooLong, NotANumber
from .url import MAX_TTL

__all__ = [
    "DEFAULT",
    "MAX_KEY",
    "MAX_TTL",
    "MISS",
    "Key",
    "Sentinel",
    "Ttl",
    "check_key",
    "check_number",
    "compile_glob",
    "key_text",
    "lifetime",
]

MAX_KEY: Final = 65_535
"""Bytes of a key, prefixes included: the width of the item's key length."""


@final
class Sentinel:
    """A named object that is equal to itself only, also after copy and pickle."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return f"shmcache.{self._name}"

    def __reduce__(self) -> str:
        return self._name


MISS: Final = Sentinel("MISS")
"""Default for `get` that no stored value equals."""
DEFAULT: Final = Sentinel("DEFAULT")
"""The `ttl` that means the engine's `default_ttl`."""

Key: TypeAlias = str | bytes
Ttl: TypeAlias = float | timedelta | Sentinel | None


def check_key(key: Key) -> bytes:
    """The key's bytes.

    Raises: TypeError for something else than str or bytes, ValueError for an empty key or lone surrogates,
    KeyTooLong.
    """
    if isinstance(key, str):
        try:
            data = key.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"key: str that UTF-8 takes wanted, lone surrogates found in {key!a:.80}"
            ) from None
    elif isinstance(key, bytes):
        data = bytes(key)
    else:
        raise TypeError(f"key: str or bytes wanted, {type(key).__name__} found")
    if not data:
        raise ValueError("key: 1 to 65535 bytes wanted, 0 found")
    if len(data) > MAX_KEY:
        raise KeyTooLong(f"key: 1 to {MAX_KEY} bytes wanted, {len(data)} found")
    return data


def key_text(key: bytes) -> Key:
    """The key as iteration gives it: str where the bytes are valid UTF-8, else bytes."""
    try:
        return key.decode()
    except UnicodeDecodeError:
        return key


def lifetime(ttl: Ttl, expire_at: float | None = None, default: float | None = None) -> float | None:
    """Seconds an item shall live; None = for ever; 0.0 = it is over (an `expire_at` that has passed: the
    write removes).

    Args: ttl: seconds as int, float or timedelta; None or 0 = for ever; DEFAULT = `default`. expire_at: Unix
    time in seconds, in place of ttl. default: the engine's default_ttl in seconds, None = for ever.
    Raises: TypeError for another type, bool included; ValueError for a negative, NaN or infinite value, one
    over ten years (MAX_TTL) ahead, and for ttl and expire_at given together.
    """
    if expire_at is not None:
        if ttl is not DEFAULT:
            raise ValueError(f"ttl, expire_at: one of the two wanted, both found ({ttl!r}, {expire_at!r})")
        moment = _number("expire_at", expire_at)
        if math.isnan(moment) or moment < 0:
            raise ValueError(f"expire_at: a Unix time of 0 or more wanted, {expire_at!r} found")
        left = moment - time.time()
        if left > MAX_TTL:
            raise ValueError(f"expire_at: at most {MAX_TTL:.0f} seconds ahead wanted, {left:.0f} found")
        return max(left, 0.0)
    if ttl is DEFAULT:
        return default
    if ttl is None:
        return None
    seconds = _number("ttl", ttl)
    if not 0 <= seconds <= MAX_TTL:
        hint = "; a Unix time goes to expire_at=" if seconds > MAX_TTL else ""
        raise ValueError(f"ttl: 0 to {MAX_TTL:.0f} seconds wanted, {ttl!r} found{hint}")
    return seconds or None


def _number(name: str, value: Any) -> float:
    if isinstance(value, timedelta):
        if name == "ttl":
            return value.total_seconds()
    elif isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        pass
    else:
        try:
            return float(value)
        except OverflowError:
            return math.inf
    raise TypeError(f"{name}: seconds as a number wanted, {type(value).__name__} found")


def check_number(value: Any, name: str) -> int:
    """`value` as a signed 64-bit int: the typed read of counters.

    Raises: NotANumber for another type (bool and text included), CounterOverflow beyond 64 bits.
    """
    if type(value) is not int:
        raise NotANumber(f"{name}: int wanted, {type(value).__name__} found")
    if not -(2**63) <= value < 2**63:
        raise CounterOverflow(f"{name}: -2**63 to 2**63-1 wanted, an int of {value.bit_length()} bits found")
    return value


def compile_glob(match: Key) -> Callable[[Key], bool]:
    """A predicate over keys as iteration gives them: fnmatch.fnmatchcase, translated once.

    Keys and globs that are bytes are read as UTF-8 with surrogateescape, so that `?` stands for one
    character, or for one byte that belongs to none. Raises: TypeError for a glob that is neither str nor
    bytes.
    """
    if isinstance(match, bytes):
        match = match.decode("utf-8", "surrogateescape")
    if not isinstance(match, str):
        raise TypeError(f"match: a glob as str or bytes wanted, {type(match).__name__} found")
    if not match.strip("*"):
        return (lambda key: True) if match else (lambda key: False)
    found = re.compile(fnmatch.translate(match)).match

    def matches(key: Key) -> bool:
        return found(key if isinstance(key, str) else key.decode("utf-8", "surrogateescape")) is not None

    return matches
