"""shmcache.codec: values to flags and bytes and back."""

import enum
import math
import struct
import subprocess
import sys
from collections import namedtuple
from datetime import datetime, timedelta, timezone

import pytest

from shmcache import NotSupported, ShmCacheError
from shmcache.codec import Codec, MsgpackCodec, get_codec, pack, unpack

MSGPACK, PICKLE = get_codec("msgpack"), get_codec("pickle")


@pytest.mark.parametrize(
    ("value", "flags", "data"),
    [
        (b"\xff", 0, b"\xff"),
        ("\u00e9", 1, b"\xc3\xa9"),
        (5, 2, struct.pack("<q", 5)),
        (-(2**63), 2, struct.pack("<q", -(2**63))),
        (1.5, 3, struct.pack("<d", 1.5)),
        (None, 4, b""),
        (False, 5, b""),
        (True, 6, b""),
        (2**63, 7, b"9223372036854775808"),
        (-(2**63) - 1, 7, b"-9223372036854775809"),
        ([1], 8, b"\x91\x01"),
    ],
)
def test_flags(value, flags, data):
    """Each type has its flags and bytes; the codec alone says the same."""
    assert pack(value, MSGPACK) == (flags, data)
    assert MSGPACK.encode(value) == (flags, data)
    assert unpack(flags, data, MSGPACK) == value
    assert MSGPACK.decode(flags, data) == value


def test_wire():
    """On the wire an int is decimal text, and nothing else differs."""
    assert pack(-42, MSGPACK, wire=True) == (2, b"-42")
    assert unpack(2, b"-42", MSGPACK, wire=True) == -42
    for value in (b"x", "x", 1.5, None, True, 2**70, [1]):
        assert pack(value, MSGPACK, wire=True) == pack(value, MSGPACK)


@pytest.mark.parametrize("digits", [1, 18, 19, 20, 3999, 4000, 4001, 4300, 4301, 8000, 12_345])
def test_ints_of_any_size(digits):
    """Ints of any size come back, beyond the interpreter's limit of digits too, alone and inside
    containers."""
    for value in (10**digits - 1, 10**digits, -(10**digits), 7 * 10**digits + 10 ** (digits // 2)):
        assert unpack(*pack(value, MSGPACK), MSGPACK) == value
        assert unpack(*pack([value], MSGPACK), MSGPACK) == [value]


@pytest.mark.parametrize("value", [math.nan, -0.0, math.inf, 5e-324])
def test_floats(value):
    """Floats come back bit by bit."""
    assert struct.pack("<d", unpack(*pack(value, MSGPACK), MSGPACK)) == struct.pack("<d", value)


class Colour(enum.IntEnum):
    RED = 3


class Name(str):
    __slots__ = ()


Point = namedtuple("Point", "x y")
MOMENT = datetime(2024, 5, 6, 7, 8, 9, 123456, timezone(timedelta(hours=2)))


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ((1, (2,)), [1, [2]]),
        (bytearray(b"x"), b"x"),
        (memoryview(b"x"), b"x"),
        (Colour.RED, 3),
        (Name("n"), "n"),
        (Point(1, 2), [1, 2]),
        ({1: "a", None: b"b", 2.5: [True]}, {1: "a", None: b"b", 2.5: [True]}),
        ({(1, (2,)): [{(3,): 4}]}, {(1, (2,)): [{(3,): 4}]}),
        (MOMENT, MOMENT),
    ],
)
def test_msgpack(value, plain):
    """msgpack keeps containers and times and turns subclasses and buffers into their plain types."""
    found = unpack(*pack(value, MSGPACK), MSGPACK)
    assert found == plain
    assert type(found) is type(plain)


@pytest.mark.parametrize("value", [(1, (2,)), Colour.RED, Point(1, 2), {1, 2}, 1j, MOMENT, bytearray(b"x")])
def test_pickle(value):
    """pickle keeps types."""
    flags, data = pack(value, PICKLE)
    assert flags == 0x18
    found = unpack(flags, data, PICKLE)
    assert found == value
    assert type(found) is type(value)


def cycle():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "value", [object(), {1}, 1j, cycle(), "\ud800", ["\ud800"], MOMENT.replace(tzinfo=None), [lambda: 0]]
)
def test_bad_values(value):
    """What msgpack cannot take is a TypeError."""
    with pytest.raises(TypeError, match="value"):
        pack(value, MSGPACK)


def test_bad_values_are_not_shown():
    """The TypeError about a value names types only."""
    for value in (["s3cret", object()], "s3cret\ud800", {"s3cret": {1}}):
        with pytest.raises(TypeError) as caught:
            pack(value, MSGPACK)
        assert "s3cret" not in str(caught.value)
        assert caught.value.__cause__ is None
    with pytest.raises(TypeError):
        pack(lambda: 0, PICKLE)


def test_no_pickle_unless_asked():
    """A pickle payload is decoded by the pickle codec alone; msgpack's is read by both."""
    flags, data = pack({1, 2}, PICKLE)
    with pytest.raises(NotSupported, match="pickle"):
        unpack(flags, data, MSGPACK)
    assert unpack(*pack([1], MSGPACK), PICKLE) == [1]
    with pytest.raises(NotSupported):
        unpack(0x28, b"", MSGPACK)


@pytest.mark.parametrize(
    ("flags", "data"),
    [
        (1, b"\xff"), (2, b"123"), (3, b""), (7, b"x"), (8, b"\xc1"), (8, b""), (8, b"\x01\x02"),
        (0x88, b"no"), (9, b""), (15, b""),
    ],
)  # fmt: skip
def test_undecodable(flags, data):
    """Bytes that do not decode are a ShmCacheError."""
    with pytest.raises(ShmCacheError):
        unpack(flags, data, MSGPACK)


def test_compression():
    """A payload of compress_min bytes or more is compressed if that is smaller; any msgpack codec reads
    it."""
    codec = MsgpackCodec(compress_min=100)
    flags, data = pack(["x" * 1000], codec)
    assert flags == 0x88
    assert len(data) < 100
    assert unpack(flags, data, MSGPACK) == ["x" * 1000]
    assert pack(["x"], codec)[0] == 8


class Reverse:
    def encode(self, value):
        return 0x28, repr(value).encode()[::-1]

    def decode(self, flags, data):
        return data[::-1].decode()


def test_third_party():
    """A third party's codec is asked for what has no native tag, and its errors become ShmCacheError."""
    codec = get_codec(Reverse())
    assert isinstance(codec, Codec)
    assert pack(5, codec)[0] == 2
    assert unpack(*pack((1,), codec), codec) == "(1,)"
    with pytest.raises(ShmCacheError):
        unpack(0x28, b"\xff", codec)


def test_get_codec():
    """A codec is msgpack, pickle or an object with encode and decode."""
    assert get_codec() is get_codec("msgpack")
    assert get_codec("pickle") is PICKLE
    with pytest.raises(ValueError, match=r"codec.*json"):
        get_codec("json")
    for wrong in (5, object(), Reverse):
        with pytest.raises(TypeError, match="codec"):
            get_codec(wrong)


def test_lazy_import():
    """Importing shmcache and storing native types loads neither msgpack nor pickle, threads or drivers."""
    code = (
        "import sys, shmcache; c = shmcache.open('memory://'); c.set('a', 'x'); c.incr('b'); c.get('a');"
        "optional = {'msgpack', 'posix_ipc', 'sysv_ipc', 'redis', 'pymemcache', 'typer', 'pytest'};"
        "wrong = optional & set(sys.modules);"
        "import threading; assert not wrong, wrong; assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
