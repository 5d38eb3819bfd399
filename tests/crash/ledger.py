"""The ledger of acknowledged versions, in memory shared by workers that may be killed at any instruction.

L1  A word is written by one worker index at a time and by one aligned 8-byte store.
L2  A worker raises `begun` before an operation and `acked` after its answer, so at any time the cache must show a version
    between the `acked` read before a look and the `begun` read after it.
L3  What a killed worker left between the two is settled by its successor: it reads the cache and acknowledges what stands.
"""

from __future__ import annotations

import mmap
import zlib
from typing import Final

__all__ = ["Ledger", "is_delete", "make", "parse", "size_of"]

DELETE_EVERY: Final = 7


class Ledger:
    """Rows of pairs (begun, acked), and single words beside them, all zero at first."""

    def __init__(self, n_pairs: int, n_words: int) -> None:
        self._map = mmap.mmap(-1, 16 * n_pairs + 8 * n_words + 16)
        self._words = memoryview(self._map).cast("Q")
        self._after = 2 * n_pairs

    def begun(self, pair: int) -> int:
        """Highest version an operation was begun with."""
        return self._words[2 * pair]

    def acked(self, pair: int) -> int:
        """Highest version whose operation was answered."""
        return self._words[2 * pair + 1]

    def begin(self, pair: int, version: int) -> None:
        """Before the operation."""
        self._words[2 * pair] = version

    def ack(self, pair: int, version: int) -> None:
        """After its answer."""
        self._words[2 * pair + 1] = version

    def word(self, n: int) -> int:
        """A single word."""
        return self._words[self._after + n]

    def put(self, n: int, value: int) -> None:
        """Store a single word."""
        self._words[self._after + n] = value


def is_delete(version: int) -> bool:
    """Whether the operation of this version deletes its key."""
    return version % DELETE_EVERY == 0


def size_of(key: str, version: int) -> int:
    """Length of the padding of a value: mostly short, some of several pages."""
    r = zlib.crc32(f"{key}/{version}".encode())
    kind = r % 16
    if kind == 0:
        return 9000 + (r >> 8) % 9000
    return (r >> 8) % (3000 if kind < 4 else 200)


def make(key: str, version: int) -> bytes:
    """A value that says which key and version it is of, with a checksum over all of it."""
    head = f"{key}|{version}|".encode()
    n = size_of(key, version)
    body = head + (head * (n // len(head) + 1))[:n]
    return body + b"|%08x" % zlib.crc32(body)


def parse(key: str, value: object) -> int:
    """The version of a value of this key; -1 if it is torn, foreign or of another type."""
    if not isinstance(value, bytes) or len(value) < 12:
        return -1
    body, check = value[:-9], value[-8:]
    parts = body.split(b"|", 2)
    try:
        if len(parts) != 3 or int(check, 16) != zlib.crc32(body) or parts[0] != key.encode():
            return -1
        return int(parts[1])
    except ValueError:
        return -1
