"""Values to flags and bytes and back.

`pack` and `unpack` hold the native types and are what engines in Python call; the C core does the same for
types 0 to 6 itself and calls `codec.encode` and `codec.decode` for the rest.

flags, one byte:   low nibble   0 bytes  1 str (UTF-8)  2 int (signed 64)  3 float  4 None  5 False  6 True
                                7 int beyond 64 bits (decimal ASCII)  8 what a codec made
                   high nibble  for type 8: 0 msgpack  1 pickle  2 a third party's;  0x80 = zlib-compressed
An int is 8 bytes little-endian in shared memory and decimal ASCII on the wire (`wire=True`), where servers
count in it. A float is 8 bytes little-endian IEEE 754 in both.

I1  Exact types only: an int or str subclass, bytearray, tuple and so on go through the codec.
I2  A payload of pickle is decoded by `codec="pickle"` alone, whatever the flags say.
I3  Messages name types, never values.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol, runtime_checkable

from .errors import NotSupported, ShmCacheError

__all__ = ["Codec", "MsgpackCodec", "PickleCodec", "get_codec", "pack", "unpack"]

BYTES: Final = 0
STR: Final = 1
INT: Final = 2
FLOAT: Final = 3
NONE: Final = 4
FALSE: Final = 5
TRUE: Final = 6
BIGINT: Final = 7
PAYLOAD: Final = 8
MSGPACK: Final = 0x00
PICKLE: Final = 0x10
FOREIGN: Final = 0x20
COMPRESSED: Final = 0x80

INT_MIN: Final = -(2**63)
INT_MAX: Final = 2**63 - 1

_I64 = struct.Struct("<q")
_F64 = struct.Struct("<d")
_KINDS = {MSGPACK: "msgpack", PICKLE: "pickle", FOREIGN: "a third party's codec"}
_log = logging.getLogger("shmcache")


@runtime_checkable
class Codec(Protocol):
    """Encodes what has no native tag. A third party's returns 0x28 (payload, third party) as flags, plus 0x80
    at will."""

    def encode(self, value: Any) -> tuple[int, bytes]:
        """`(flags, data)`; TypeError for a value it cannot take."""

    def decode(self, flags: int, data: bytes) -> Any:
        """The value; any exception means that `data` is not what this codec made."""


class MsgpackCodec:
    """msgpack: tuples come back as lists (as a dict's keys: as tuples), bytearray and memoryview as bytes,
    subclasses as their base; ints of any size.

    Args: compress_min: payloads of at least so many bytes are stored zlib-compressed when that is smaller;
    None = never. Timezone-aware datetimes come back in UTC. The package is imported with the first value that
    needs it.
    """

    kind = MSGPACK

    def __init__(self, compress_min: int | None = None) -> None:
        self.compress_min = compress_min

    def encode(self, value: Any) -> tuple[int, bytes]:
        """Encode any value; native types get their native flags. TypeError when msgpack cannot take it."""
        native = _pack_native(value, False)
        if native is not None:
            return native
        return self._compress(self._dump(value))

    def decode(self, flags: int, data: bytes) -> Any:
        """Decode what `encode` made. NotSupported for another codec's payload, ShmCacheError when it does not
        decode."""
        if flags & 0x0F != PAYLOAD:
            return _unpack_native(flags, data, False)
        if flags & 0x70 != self.kind:
            found = _KINDS.get(flags & 0x70, f"flags 0x{flags:02x}")
            raise NotSupported(f"codec: a payload of {_KINDS[self.kind]} wanted, one of {found} found")
        try:
            return self._load(zlib.decompress(data) if flags & COMPRESSED else data)
        except Exception as error:
            raise ShmCacheError(
                f"codec: a payload of {_KINDS[self.kind]} wanted, {len(data)} other bytes found"
            ) from error

    def fast(self) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]] | None:
        """`(pack, unpack)` that the C core calls without a Python frame, None where encode and decode do more.

        Either may fail where `encode` or `decode` succeeds or words the error: the caller then asks those.
        """
        if type(self) is not MsgpackCodec or self.compress_min is not None:
            return None
        _msgpack()
        return _direct

    def _compress(self, data: bytes) -> tuple[int, bytes]:
        flags = PAYLOAD | self.kind
        if self.compress_min is not None and len(data) >= self.compress_min:
            smaller = zlib.compress(data, 1)
            if len(smaller) < len(data):
                return flags | COMPRESSED, smaller
        return flags, data

    def _dump(self, value: Any) -> bytes:
        try:
            return _msgpack()[0](value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            reason = str(error)
            if isinstance(error, UnicodeEncodeError):
                reason = "a str with lone surrogates inside"
            elif isinstance(error, (ValueError, RecursionError)):
                reason = "nested too deeply, or inside itself"
            raise TypeError(
                f"value: something msgpack takes wanted, {type(value).__name__} found ({reason})"
            ) from None

    def _load(self, data: bytes) -> Any:
        return _msgpack()[1](data)


class PickleCodec(MsgpackCodec):
    """pickle, protocol 5: whatever pickle takes, with its types. For private segments only: a payload can run
    code.

    Also reads what MsgpackCodec wrote.
    """

    kind = PICKLE

    def decode(self, flags: int, data: bytes) -> Any:
        if flags & 0x7F == PAYLOAD | MSGPACK:
            return _PLAIN.decode(flags, data)
        return super().decode(flags, data)

    def _dump(self, value: Any) -> bytes:
        import pickle

        try:
            return pickle.dumps(value, 5)
        except Exception as error:
            raise TypeError(f"value: something pickle takes wanted, {type(value).__name__} found") from error

    def _load(self, data: bytes) -> Any:
        import pickle

        return pickle.loads(data)


_PLAIN = MsgpackCodec()
_PICKLE = PickleCodec()


def get_codec(spec: object = "msgpack") -> Codec:
    """The codec for an option's value: "msgpack", "pickle", or an object with encode and decode.

    Raises: ValueError for another word, TypeError for an object without the two methods.
    """
    if isinstance(spec, str):
        if spec == "msgpack":
            return _PLAIN
        if spec == "pickle":
            return _PICKLE
        raise ValueError(f"option 'codec': msgpack, pickle or an object wanted, {spec[:40]!r} found")
    if isinstance(spec, type) or not isinstance(spec, Codec):
        raise TypeError(
            f"option 'codec': an object with encode and decode wanted, {type(spec).__name__} found"
        )
    return spec


def codec_option(name: str, value: Any) -> Codec:
    """`get_codec` as an option parser (see url.Parser); the same word gives the same object."""
    return get_codec(value)


def pack(value: Any, codec: Codec, *, wire: bool = False) -> tuple[int, bytes]:
    """Encode one value: natively where its exact type has a tag, else by the codec.

    Raises: TypeError for a value the codec cannot take, a str with lone surrogates included.
    """
    return _pack_native(value, wire) or codec.encode(value)


def unpack(flags: int, data: bytes, codec: Codec, *, wire: bool = False) -> Any:
    """Decode what `pack` made with the same `wire`.

    Raises: ShmCacheError for bytes that do not decode, NotSupported for the payload of another codec.
    """
    if flags & 0x0F != PAYLOAD:
        return _unpack_native(flags, data, wire)
    try:
        return codec.decode(flags, data)
    except ShmCacheError:
        raise
    except Exception as error:
        raise ShmCacheError(
            f"codec: a payload of {type(codec).__name__} wanted, {len(data)} other bytes found"
        ) from error


def _pack_native(value: Any, wire: bool) -> tuple[int, bytes] | None:
    kind = type(value)
    if kind is bytes:
        return BYTES, value
    if kind is str:
        try:
            return STR, value.encode()
        except UnicodeEncodeError:
            raise TypeError("value: str that UTF-8 takes wanted, lone surrogates found") from None
    if kind is int:
        if INT_MIN <= value <= INT_MAX:
            return INT, b"%d" % value if wire else _I64.pack(value)
        return BIGINT, _decimal(value)
    if kind is float:
        return FLOAT, _F64.pack(value)
    if value is None:
        return NONE, b""
    if kind is bool:
        return (TRUE if value else FALSE), b""
    return None


def _unpack_native(flags: int, data: bytes, wire: bool) -> Any:
    kind = flags & 0x0F
    try:
        if kind == BYTES:
            return bytes(data)
        if kind == STR:
            return str(data, "utf-8")
        if kind == INT:
            return int(data) if wire else _I64.unpack(data)[0]
        if kind == FLOAT:
            return _F64.unpack(data)[0]
        if kind == NONE:
            return None
        if kind in (FALSE, TRUE):
            return kind == TRUE
        if kind == BIGINT:
            return _from_decimal(data)
    except (ValueError, struct.error) as error:
        raise ShmCacheError(
            f"value: data of flags 0x{flags:02x} wanted, {len(data)} other bytes found"
        ) from error
    raise ShmCacheError(f"value: flags 0x00 to 0x08 wanted, 0x{flags:02x} found")


_CHUNK = 4000  # digits; CPython refuses int <-> str beyond sys.get_int_max_str_digits(), 4,300 by default


def _decimal(value: int) -> bytes:
    """Decimal ASCII of any int, independent of the interpreter's digit limit."""
    if value.bit_length() < 13_000:
        return b"%d" % value
    sign, value, base, parts = b"-" if value < 0 else b"", abs(value), 10**_CHUNK, []
    while value:
        value, low = divmod(value, base)
        parts.append(b"%0*d" % (_CHUNK, low))
    return sign + b"".join(reversed(parts)).lstrip(b"0")


def _from_decimal(data: bytes) -> int:
    if len(data) <= _CHUNK:
        return int(data)
    digits, value = bytes(data).lstrip(b"-"), 0
    head = len(digits) % _CHUNK
    for start in range(head - _CHUNK if head else 0, len(digits), _CHUNK):
        value = value * 10**_CHUNK + int(digits[max(start, 0) : start + _CHUNK])
    return -value if data[:1] == b"-" else value


def _frozen(key: Any) -> Any:
    return tuple(map(_frozen, key)) if isinstance(key, list) else key


_functions: tuple[Callable[[Any], bytes], Callable[[bytes], Any]] | None = None
_direct: tuple[Callable[[Any], bytes], Callable[[bytes], Any]] | None = None


def _msgpack() -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    """(pack, unpack) of msgpack, imported on first use."""
    global _functions, _direct
    if _functions is None:
        import msgpack  # type: ignore[import-untyped]

        if msgpack.Packer.__module__.endswith("fallback"):
            # Its C module loads once a process; other sub-interpreters get the Python one, 17 times slower.
            _log.warning("msgpack runs without its C module in this interpreter")
        ext_type = msgpack.ExtType

        def default(value: Any) -> Any:
            if isinstance(value, int):  # beyond 64 bits: application type 1, decimal ASCII
                return ext_type(1, _decimal(value))
            raise TypeError(f"{type(value).__name__} inside")

        def ext_hook(code: int, data: bytes) -> Any:
            if code == 1:
                return _from_decimal(data)
            return ext_type(code, data)

        def dump(value: Any) -> bytes:
            return msgpack.packb(value, default=default, datetime=True)  # type: ignore[no-any-return]

        def hashable(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
            return {_frozen(key): value for key, value in pairs}

        def load(data: bytes) -> Any:
            options: dict[str, Any] = {"ext_hook": ext_hook, "strict_map_key": False, "timestamp": 3}
            try:
                return msgpack.unpackb(data, **options)
            except TypeError:  # a tuple as a dict's key came back as a list
                return msgpack.unpackb(data, object_pairs_hook=hashable, **options)

        _direct = (
            partial(msgpack.packb, default=default, datetime=True),
            partial(msgpack.unpackb, ext_hook=ext_hook, strict_map_key=False, timestamp=3),
        )
        _functions = dump, load
    return _functions
