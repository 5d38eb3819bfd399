"""Snapshots: a portable file of items, from any engine that iterates into any engine.

    file    = msgpack map (header) · block* · trailer
    header  = {"format": "shmcache-snapshot", "version": 1, "saved_at": Unix time, "source": engine_id}
    block   = msgpack array [number of records, CRC-32 of payload, payload]; payload = records, one after the other
    record  = msgpack array [key: bin, flags: int, data: bin, expire_at: Unix time or nil]
    trailer = msgpack array ["end", number of records, CRC-32 over the header and the blocks' CRC-32s as little-endian u32]

flags and data are those of codec.py (an int as 8 bytes little-endian); payloads of a codec go from segment to segment as they
are, without being decoded.

I1  A file is written under another name in the same directory, flushed to disk, and renamed: a save that fails leaves what was
    there. Its permissions are 0600.
I2  `load` stores nothing before the whole file was checked, unless `partial`.
I3  Lifetimes are absolute in the file; `remaining` shifts them by the time between save and load.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import time as unix_time
from typing import Any, BinaryIO, Final, NamedTuple

from .arguments import MISS, Key, check_key, compile_glob
from .codec import MSGPACK, PAYLOAD, get_codec, pack, unpack
from .engine import Engine
from .errors import NoSpace, NotSupported, ShmCacheError, ValueTooLarge
from .inspect import View

__all__ = ["RawCodec", "SnapshotDamaged", "Summary", "load", "replacing", "save", "verify"]

FORMAT: Final = "shmcache-snapshot"
VERSION: Final = 1
BLOCK: Final = 64 * 1024
"""Bytes of records after which a block is closed: what one damaged byte costs at most, besides what lies behind it."""
MAX_BLOCK: Final = 1 << 29
"""The largest block read: one record of the largest value, 256 MiB, and its key."""

Progress = Callable[[int], None]
"""Called now and then with the number of items (save) or bytes (load) so far."""


class SnapshotDamaged(ShmCacheError):
    """The file is no snapshot, was cut short, or holds bytes that were changed; what is said where and what was found."""


@dataclass(slots=True)
class Summary:
    """What happened to the items of a save or a load."""

    items: int = 0  #: written to the file, or stored
    expired: int = 0  #: left out: their lifetime was over
    skipped: int = 0  #: left out: already present (`add`), gone meanwhile, or not decodable for the engine
    refused: int = 0  #: not stored: too large, no space
    damaged: str = ""  #: with `partial`: what is wrong with the file


class _Raw(NamedTuple):
    flags: int
    data: bytes


class RawCodec:
    """Hands payloads through undecoded, so that nothing of them is run, lost or changed."""

    def encode(self, value: Any) -> tuple[int, bytes]:
        return (value.flags, value.data) if isinstance(value, _Raw) else get_codec().encode(value)

    def decode(self, flags: int, data: bytes) -> Any:
        return _Raw(flags, bytes(data))


# -- saving --------------------------------------------------------------------------------------------------------------------


def save(source: View | Engine, path: str | BinaryIO, *, match: Key = "*", progress: Progress | None = None) -> Summary:
    """Write the live items to a file (or an open binary file, in place).

    Args: match: glob over keys. Items written while it runs may be in it or not; nothing is held meanwhile.
    Raises: NotSupported where the engine cannot iterate; OSError from writing, the old file is left then.
    """
    if not isinstance(path, str):
        return _write(source, path, match, progress)
    with replacing(path) as file:
        return _write(source, file, match, progress)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A new file, mode 0600, that takes the name `path` when the block ends without an exception, and is gone otherwise.

    Raises: OSError with `path` as its filename.
    """
    made = ""
    try:
        if os.path.isdir(path) or not path:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        fd, made = tempfile.mkstemp(prefix=f".{os.path.basename(path)[:200]}.", dir=os.path.dirname(os.path.abspath(path)))
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.rename(made, path)
    except BaseException as error:
        if made:
            with contextlib.suppress(OSError):
                os.unlink(made)
        if isinstance(error, OSError) and error.errno is not None and (not made or error.filename in (None, made)):
            error.filename = path
            error.filename2 = None
        raise


def _write(source: View | Engine, file: BinaryIO, match: Key, progress: Progress | None) -> Summary:
    import msgpack  # type: ignore[import-untyped]

    packb: Callable[[Any], bytes] = msgpack.Packer().pack
    summary = Summary()
    name = source.header["name"] if isinstance(source, View) else source.engine_id
    header = packb({"format": FORMAT, "version": VERSION, "saved_at": unix_time(), "source": name})
    total = zlib.crc32(header)
    file.write(header)
    block, in_block = bytearray(), 0
    for record in _records(source, match, summary):
        block += packb(record)
        in_block += 1
        if len(block) >= BLOCK:
            total = _flush(file, packb, block, in_block, total)
            summary.items += in_block
            block, in_block = bytearray(), 0
            if progress is not None:
                progress(summary.items)
    if in_block:
        total = _flush(file, packb, block, in_block, total)
        summary.items += in_block
    file.write(packb(["end", summary.items, total]))
    if progress is not None:
        progress(summary.items)
    return summary


def _flush(file: BinaryIO, packb: Callable[[Any], bytes], block: bytearray, n: int, total: int) -> int:
    crc = zlib.crc32(block)
    file.write(packb([n, crc, bytes(block)]))
    return zlib.crc32(crc.to_bytes(4, "little"), total)


def _records(source: View | Engine, match: Key, summary: Summary) -> Iterator[list[Any]]:
    codec = get_codec()
    if isinstance(source, View):
        raw = RawCodec()
        source.table._configure(raw, b"", None, 0.1)
        try:
            for item in source.items(None if match == "*" else compile_glob(match), content=False):
                value = source.value(item.key) if item.key is not None else MISS
                left = source.ttl(item.key) if item.key is not None else None
                if value is MISS or left is None:
                    summary.skipped += 1
                    continue
                flags, data = pack(value, raw)
                yield [check_key(item.key or b""), flags, data, None if left == float("inf") else unix_time() + left]
        finally:
            source.table._configure(codec, b"", None, 0.1)
        return
    for key, value in source.items(match):
        left = source.ttl(key)
        if left is None:
            summary.skipped += 1
            continue
        flags, data = pack(value, codec)
        yield [check_key(key), flags, data, None if left == float("inf") else unix_time() + left]


# -- loading -------------------------------------------------------------------------------------------------------------------


def verify(file: BinaryIO, progress: Progress | None = None) -> dict[str, Any]:
    """Read the whole file from its start and check it: the header, with `items` added.

    Raises: SnapshotDamaged, saying what is wrong and how many items came before it.
    """
    header: dict[str, Any] = {}
    n = 0
    for part in _blocks(file):
        if isinstance(part, dict):
            header = part
        else:
            n += len(part)
        if progress is not None:
            progress(file.tell())
    return {**header, "items": n}


def load(
    file: BinaryIO, engine: Engine, *, remaining: bool = False, partial: bool = False, add: bool = False,
    progress: Progress | None = None,
) -> Summary:  # fmt: skip
    """Store a snapshot's items.

    Args: file: seekable, open for reading. remaining: an item gets the lifetime it had left when it was saved, not its old end.
    partial: store what comes before the damage of a damaged file, and the sound blocks behind a changed one, and say so in the
    summary. add: keep items that are already present, so that a load can be run again. progress: called with bytes read.
    Returns: Summary. Items too large, or without space under eviction=none, are counted and left out.
    Raises: SnapshotDamaged before anything is stored, unless `partial`; EngineDown, LockTimeout, GuardLost from storing: what was
    stored stays, and running again mends it.
    """
    file.seek(0)
    if not partial:
        verify(file)
        file.seek(0)
    summary, shift, store = Summary(), 0.0, engine.add if add else engine.set
    decode = _decoder(engine)
    try:
        for part in _blocks(file, partial, summary):
            if isinstance(part, dict):
                shift = unix_time() - part["saved_at"] if remaining else 0.0
                continue
            for key, flags, data, expire_at in part:
                _store(summary, store, decode, key, flags, data, None if expire_at is None else expire_at + shift)
            if progress is not None:
                progress(file.tell())
    except SnapshotDamaged as error:
        if not partial:
            raise
        summary.damaged = summary.damaged or str(error)
    return summary


def _store(
    summary: Summary,
    store: Any,
    decode: Callable[[int, bytes], Any],
    key: bytes,
    flags: int,
    data: bytes,
    expire_at: float | None,
) -> None:
    if expire_at is not None and expire_at <= unix_time():
        summary.expired += 1
        return
    try:
        value = decode(flags, data)
    except ShmCacheError:
        summary.skipped += 1
        return
    try:
        stored = store(key, value, None) if expire_at is None else store(key, value, expire_at=expire_at)
    except (NoSpace, ValueTooLarge):
        summary.refused += 1
        return
    summary.items += stored
    summary.skipped += not stored


def _decoder(engine: Engine) -> Callable[[int, bytes], Any]:
    """How a record's value is handed to the engine: payloads as they are where its codec is RawCodec."""
    codec = get_codec()
    raw = getattr(engine, "_options", {}).get("codec")
    if isinstance(raw, RawCodec):
        header: dict[str, Any] = getattr(engine, "_header", dict)()
        private = header.get("perms", 0) & 0o077 == 0

        def hand(flags: int, data: bytes) -> Any:
            if flags & 0x0F == PAYLOAD:
                if flags & 0x70 != MSGPACK and not private:
                    raise NotSupported(f"snapshot: a payload of msgpack wanted for a shared segment, flags 0x{flags:02x} found")
                return _Raw(flags, data)
            return unpack(flags, data, codec)

        return hand
    return lambda flags, data: unpack(flags, data, codec)


def _blocks(file: BinaryIO, partial: bool = False, summary: Summary | None = None) -> Iterator[dict[str, Any] | list[list[Any]]]:
    """The header, then the records of each sound block. SnapshotDamaged for anything else than a whole snapshot."""
    import msgpack

    unpacker = msgpack.Unpacker(file, raw=False, max_buffer_size=MAX_BLOCK, strict_map_key=False)
    seen, total, bad = 0, 0, ""
    try:
        header = _next(unpacker, seen)
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise SnapshotDamaged(f"snapshot: format {FORMAT!r} wanted, {_kind(header)} found")
        if header.get("version") != VERSION:
            raise SnapshotDamaged(f"snapshot: version {VERSION} wanted, {header.get('version')!r} found")
        if not isinstance(header.get("saved_at"), float):
            raise SnapshotDamaged(f"snapshot: saved_at as a Unix time wanted, {_kind(header.get('saved_at'))} found")
        total = zlib.crc32(msgpack.packb(header))
        yield header
        while True:
            part = _next(unpacker, seen)
            if not isinstance(part, list) or len(part) != 3:
                raise SnapshotDamaged(f"snapshot: a block wanted after {seen} items, {_kind(part)} found")
            if part[0] == "end":
                break
            n, crc, payload = part
            if not isinstance(payload, bytes) or zlib.crc32(payload) != crc:
                bad = f"snapshot: a block whose checksum holds wanted after {seen} items, another found"
                if not partial:
                    raise SnapshotDamaged(bad)
                if summary is not None:
                    summary.damaged = summary.damaged or bad
                continue
            total = zlib.crc32(int(crc).to_bytes(4, "little"), total)
            records = list(_unpacked(payload))
            if len(records) != n:
                raise SnapshotDamaged(f"snapshot: {n} records in a block wanted after {seen} items, {len(records)} found")
            seen += n
            yield records
        if not bad and (part[1] != seen or part[2] != total):
            raise SnapshotDamaged(f"snapshot: {part[1]!r} items with checksum {part[2]!r} wanted, {seen} with {total} found")
        if unpacker.read_bytes(1):
            raise SnapshotDamaged(f"snapshot: the end of the file wanted after the trailer of {seen} items, more bytes found")
    except (msgpack.exceptions.UnpackException, ValueError) as error:
        raise SnapshotDamaged(f"snapshot: msgpack wanted after {seen} items, other bytes found ({error})") from error


def _unpacked(payload: bytes) -> Iterator[list[Any]]:
    import msgpack

    unpacker = msgpack.Unpacker(raw=False, max_buffer_size=MAX_BLOCK)
    unpacker.feed(payload)
    for record in unpacker:
        if not (isinstance(record, list) and len(record) == 4 and isinstance(record[0], bytes) and isinstance(record[2], bytes)):
            raise SnapshotDamaged(f"snapshot: a record [key, flags, data, expire_at] wanted, {_kind(record)} found")
        yield record


def _next(unpacker: Any, seen: int) -> Any:
    try:
        return unpacker.unpack()
    except Exception as error:
        if type(error).__name__ == "OutOfData":
            raise SnapshotDamaged(f"snapshot: the trailer wanted, the end of the file found after {seen} items") from None
        raise


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
