"""shmcache.engines.redis: what lies in the server, what is sent, what other clients do to it. Opening is in
test_redis_open.py, faults are in test_redis_faults.py."""

from __future__ import annotations

import itertools
import math
import os
import pickle
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import fake

import shmcache
from shmcache import (
    MISS,
    Capability,
    CounterOverflow,
    NoSpace,
    NotANumber,
    NotSupported,
    ShmCacheError,
    ValueTooLarge,
)
from shmcache.codec import get_codec
from shmcache.engines import redis_wire as wire
from shmcache.testing import in_processes, in_threads

_serial = itertools.count()


@pytest.fixture
def open_redis(redis_server):
    """Opens engines on the session's server, each under a prefix of its own unless one is given."""
    engines = []

    def open_engine(address=None, **options):
        number = next(_serial)
        options = {"health": "no", "prefix": f"{os.getpid()}.{number}:"} | options
        url = f"redis:{os.getpid()}-{number}://{address or redis_server}/0"
        engines.append(shmcache.open(url, **options))
        return engines[-1]

    yield open_engine
    for engine in engines:
        if not engine._closed:
            if engine._keys.prefix and not engine._miss:
                engine.clear()
            engine.close()


@pytest.fixture
def engine(open_redis):
    return open_redis()


@pytest.fixture
def cluster(redis_cluster_server):
    number = next(_serial)
    url = f"redis+cluster:{os.getpid()}-{number}://{redis_cluster_server}/"
    with shmcache.open(url, health="no", prefix=f"{number}:") as engine:
        yield engine
        engine.clear()


def stored(engine, key):
    return engine.raw("GET", engine._keys.name(key.encode() if isinstance(key, str) else key))


# -- what lies there -----------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.binary() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(VALUES)
def test_encoding_is_unambiguous(value):
    """What was encoded decodes to the same value and type, and only an int looks like a number."""
    codec = get_codec()
    data = wire.encode(value, codec)
    found = wire.decode(data, codec)
    assert found == value
    assert type(found) is type(value)
    assert (data[:1] in b"-0123456789") is (type(value) is int)


@given(st.binary())
def test_other_clients_values(data):
    """Bytes that are neither tagged, graced nor a canonical number are read as the bytes they are."""
    found = wire.decode(data, get_codec()) if data[:1] not in (b"\x0e", b"\x0f") else data
    assert found == (int(data) if type(found) is int else data)
    assert type(found) is not int or str(found).encode() == data


@given(st.binary(min_size=1), st.text())
def test_names_are_undone(key, prefix):
    """Every key comes back from its name, and no name is one of a lease."""
    keys = wire.Keys(prefix)
    assert keys.key(keys.name(key)) in (key, key.decode(errors="ignore"))
    assert not keys.name(key).startswith(keys.leases)
    assert all(name.startswith(keys.leases) for name in keys.lease(key))


def test_counters_are_plain(engine):
    """A counter is decimal text with which another client counts on."""
    engine.incr("k", 41)
    assert stored(engine, "k") == b"41"
    assert engine.raw("INCRBY", engine._keys.name(b"k"), 1) == 42
    assert engine.incr("k") == 43
    engine.set("set", -5)
    assert stored(engine, "set") == b"-5"
    engine.raw("SET", engine._keys.name(b"theirs"), "7")
    assert engine.get("theirs") == 7
    assert engine.decr("theirs", 8) == -1


def test_number_like_text_is_no_number(engine):
    """Text of another client that is no canonical number is bytes, and does not count."""
    for text in (b"007", b"+5", b"-0", b"1.5", b" 5", b"5 apples", b"-", b"", b"1e3"):
        engine.raw("SET", engine._keys.name(b"k"), text)
        assert engine.get("k") == text
        with pytest.raises(NotANumber):
            engine.incr("k")
        with pytest.raises(NotANumber):
            engine.counter("k")
        assert stored(engine, "k") == text


def test_gets_tags_an_int(engine):
    """gets gives an int a nonce, under which it counts as before; the next write makes it plain again."""
    for write in (
        lambda token: engine.incr("k"),
        lambda token: engine.set("k", 6),
        lambda token: engine.cas("k", 6, token),
    ):
        engine.set("k", 5, 100)
        value, token = engine.gets("k")
        assert value == engine.get("k") == engine.counter("k") == 5
        assert stored(engine, "k")[:2] == b"\x0e\x02"
        assert engine.gets("k") == (5, token)
        assert write(token)
        assert stored(engine, "k") == b"6"
    for large in (10**5000, 2**63 - 1):
        engine.set("k", large, 100)
        assert engine.gets("k")[0] == engine.get("k") == large
    token = engine.gets("k")[1]
    with pytest.raises(CounterOverflow):
        engine.incr("k")
    assert engine.cas("k", 0, token)


def test_joins_are_changes(engine):
    """append and prepend of nothing end a token, too."""
    for join in (engine.append, engine.prepend):
        engine.set("k", "text")
        token = engine.gets("k")[1]
        assert join("k", "") is True
        assert engine.cas("k", "other", token) is False
        assert engine.get("k") == "text"


def test_cas_of_another_clients_value(engine):
    """A token of a value that another client wrote stands for its bytes."""
    name = engine._keys.name(b"k")
    engine.raw("SET", name, "theirs")
    value, token = engine.gets("k")
    assert value == b"theirs"
    assert stored(engine, "k") == b"theirs"
    engine.raw("SET", name, "theirs, longer")
    assert engine.cas("k", 1, token) is False
    engine.raw("SET", name, "theirs")
    assert engine.cas("k", 1, token) is True


def test_other_types(engine):
    """A list under a key is an error for get, no number, no match for cas, not listed, and can be removed."""
    name = engine._keys.name(b"k")
    engine.raw("RPUSH", name, "a")
    with pytest.raises(ShmCacheError, match="WRONGTYPE") as caught:
        engine.get("k")
    assert type(caught.value) is ShmCacheError
    assert caught.value.__cause__ is not None
    with pytest.raises(NotANumber):
        engine.incr("k")
    with pytest.raises(TypeError):
        engine.append("k", b"x")
    assert engine.cas("k", 1, b"\x0e\x00aaaaaaaa") is False
    assert engine.get_many(["k"]) == {}
    assert engine.add("k", 1) is False
    assert list(engine) == []
    assert engine.delete("k") is True
    engine.raw("RPUSH", name, "a")
    engine.clear()
    assert engine.raw("EXISTS", name) == 0


def test_reserved_keys(engine):
    """A key that begins like a lease is a key like any other."""
    keys = [b"\xffL", b"\xffL\x00x", b"\xffL\x01x", b"\xffLx", b"\xff"]
    with engine.lock("name"), engine.lock("other"):
        for i, key in enumerate(keys):
            engine.set(key, i)
        assert engine.get_many(keys) == {key: i for i, key in enumerate(keys)}
        assert sorted(engine.keys()) == sorted(keys)
        assert len(engine) == engine.stats().items == 5


def test_prefix(open_redis):
    """Prefixes, of glob characters too, keep engines on one database apart, clear() included."""
    prefixes = ["", "a*", "ab", "a[b]", "a?", "a\\", "a^-"]
    engines = [open_redis(prefix=f"px{os.getpid()}{prefix}:") for prefix in prefixes]
    for i, one in enumerate(engines):
        one.set_many({"k": i, f"only{i}": i})
    for i, one in enumerate(engines):
        assert dict(one.items()) == {"k": i, f"only{i}": i}
    engines[1].clear()
    assert [len(one) for one in engines] == [2, 0, 2, 2, 2, 2, 2]
    assert engines[3].delete_match("*") == 2
    assert [len(one) for one in engines] == [2, 0, 2, 0, 2, 2, 2]


def test_pickle_is_not_decoded(open_redis):
    """A pickle in the server is decoded only where codec=pickle was asked for."""
    plain = open_redis(prefix=f"pickle{os.getpid()}:")
    plain.raw("SET", plain._keys.name(b"k"), b"\x0e\x18" + b"n" * 8 + pickle.dumps({1, 2}))
    with pytest.raises(NotSupported, match="pickle"):
        plain.get("k")
    with pytest.raises(NotSupported, match="pickle"):
        plain.get_many(["k"])
    with pytest.raises(TypeError):
        plain.set("k", {1, 2})
    assert open_redis(prefix=f"pickle{os.getpid()}:", codec="pickle").get("k") == {1, 2}


# -- what is sent --------------------------------------------------------------------------------------------


OPERATIONS = {
    "get": lambda e: e.get("k"), "gets": lambda e: e.gets("k"), "set": lambda e: e.set("k", "v", 50),
    "add": lambda e: e.add("k", "v", 50), "replace": lambda e: e.replace("k", "v", 50),
    "cas": lambda e: e.cas("k", "v", b"\x0e\x00aaaaaaaa", 50), "append": lambda e: e.append("k", "v"),
    "prepend": lambda e: e.prepend("k", "v"), "delete": lambda e: e.delete("k"), "pop": lambda e: e.pop("k"),
    "touch": lambda e: e.touch("k", 5), "gat": lambda e: e.gat("k", 5), "ttl": lambda e: e.ttl("k"),
    "incr": lambda e: e.incr("n", ttl=50), "decr": lambda e: e.decr("n", ttl=50),
    "counter": lambda e: e.counter("n"), "in": lambda e: "k" in e,
    "get_many": lambda e: e.get_many(map(str, range(400))),
    "set_many": lambda e: e.set_many({str(i): i for i in range(20)}, 50),
    "delete_many": lambda e: e.delete_many(map(str, range(20))), "lock": lambda e: e._lease_take(b"x", 1.0),
    "set_grace": lambda e: e._set_grace("k", "v", 5, 5), "get_grace": lambda e: e._get_grace("k"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_message(open_redis, redis_server, name):
    """Each operation is one message to the server, whether the item is there or not."""
    with fake.Proxy(redis_server.host, redis_server.port) as proxy:
        engine = open_redis(proxy, prefix="one:")
        operation = OPERATIONS[name]
        for _ in range(2):  # scripts are known to the server afterwards
            operation(engine)
            engine.set("k", "text")
        sent = []
        proxy.filter = lambda request: sent.append(request) or True
        for present in (False, True):
            engine.clear()
            if present:
                engine.set("k", "text")
            sent.clear()
            operation(engine)
            assert len(sent) == 1
        engine.clear()
        engine.close()


def test_scripts_are_forgotten(engine, cluster):
    """A server that lost its scripts gets the text with the next call, also of several keys at once."""
    for one in (engine, cluster):
        assert one.incr("n") == 1
        for at in one._nodes():
            one._client().execute_command("SCRIPT FLUSH", **at)
        assert one.incr("n") == 2
        one.set_many(dict.fromkeys("abc", 1))
        for at in one._nodes():
            one._client().execute_command("SCRIPT FLUSH", **at)
        assert one.delete_many("abcd") == 3


def test_fork(engine):
    """A forked child opens a connection of its own, and the parent's goes on."""
    mine = engine.raw("CLIENT ID")
    theirs = in_processes(3, lambda i: engine.raw("CLIENT ID"))
    assert len({mine, *theirs}) == 4
    assert engine.raw("CLIENT ID") == mine


# -- lifetimes -----------------------------------------------------------------------------------------------


def graced(engine, value, soft=0.05):
    engine._set_grace("k", value, soft, 100)
    return engine


def test_grace_before_its_soft_deadline(engine):
    """An item with a soft deadline is an item like others before it, and writes keep both deadlines."""
    assert graced(engine, 5, 50).get("k") == 5
    assert engine.incr("k") == 6
    assert engine.gets("k")[0] == 6
    assert engine.incr("k") == 7
    assert engine.ttl("k") == pytest.approx(50, abs=2)
    assert engine.raw("PTTL", engine._keys.name(b"k")) > 140_000
    assert engine._get_grace("k") == (7, True)
    assert graced(engine, "b", 50).append("k", "c")
    assert engine.prepend("k", "a")
    assert engine.get_many(["k"]) == {"k": "abc"}
    assert dict(engine.items()) == {"k": "abc"}
    value, token = engine.gets("k")
    assert (value, engine._get_grace("k")) == ("abc", ("abc", True))
    assert engine.cas("k", "d", token) is True
    assert engine.ttl("k") == math.inf
    assert graced(engine, "x", 50).touch("k", 10)
    assert engine.raw("PTTL", engine._keys.name(b"k")) <= 10_000
    assert graced(engine, "x", 50).gat("k", 0) == "x"
    assert engine.raw("PTTL", engine._keys.name(b"k")) == -1


def test_grace_after_its_soft_deadline(engine):
    """After the soft deadline it is absent for everything but get_or_set."""
    absent = {
        "get": lambda: engine.get("k"), "gets": lambda: engine.gets("k"), "in": lambda: "k" in engine,
        "many": lambda: engine.get_many(["k"]), "left": lambda: engine._get_left("k"),
        "lefts": lambda: engine._get_left_many(["k"]), "ttl": lambda: engine.ttl("k"),
        "touch": lambda: engine.touch("k", 5), "gat": lambda: engine.gat("k", 5),
        "list": lambda: list(engine), "len": lambda: len(engine), "items": lambda: engine.stats().items,
        "append": lambda: engine.append("k", "x"), "incr": lambda: engine.incr("k", initial=None),
        "replace": lambda: engine.replace("k", 1), "cas": lambda: engine.cas("k", 1, b"t"),
    }  # fmt: skip
    graced(engine, "old")
    time.sleep(0.06)
    assert {name: call() for name, call in absent.items() if call()} == {}
    assert engine._get_grace("k") == ("old", False)
    for end in (lambda: engine.delete("k"), lambda: engine.pop("k"), lambda: engine.delete_many(["k"])):
        graced(engine, "old")
        time.sleep(0.06)
        assert not end()
        assert engine._get_grace("k") is None
    graced(engine, "old")
    time.sleep(0.06)
    assert engine.incr("k", ttl=100) == 1
    assert engine.ttl("k") == pytest.approx(100, abs=2)
    graced(engine, "old")
    time.sleep(0.06)
    assert engine.add("k", 2) is True


def test_milliseconds(engine):
    """Lifetimes are kept to the ms."""
    engine.set("k", 1, 0.08)
    assert engine.raw("PTTL", engine._keys.name(b"k")) in range(40, 81)
    assert engine.get("k") == 1
    time.sleep(0.09)
    assert engine.get("k", MISS) is MISS


def test_fence_after_losing_everything(open_redis, start_redis):
    """Fencing tokens grow also after the server lost all its data; clear() frees no lock."""
    engine = open_redis(start_redis(), prefix="")
    with engine.lock("name") as lock:
        first = lock.token
        engine.set("k", 1)
        engine.clear()
        assert len(engine) == 0
        with pytest.raises(shmcache.LockTimeout), engine.lock("name", timeout=0):
            pass
        engine.raw("FLUSHALL")
        with engine.lock("name", timeout=0) as second:
            assert second.token > first


# -- room ----------------------------------------------------------------------------------------------------


def test_no_space(open_redis, start_redis):
    """A server at its maxmemory that evicts nothing is NoSpace; the old value stays, and reads go on."""
    engine = open_redis(start_redis(), prefix="")
    engine.set("k", "old")
    engine.set("n", 5)
    engine.raw("CONFIG SET", "maxmemory", "500kb")  # less than it uses when empty
    for write in (
        lambda: engine.set("k", "new"),
        lambda: engine.add("new", 1),
        lambda: engine.append("k", "x"),
        lambda: engine.incr("n"),
        lambda: engine.incr("absent"),
    ):
        with pytest.raises(NoSpace):
            write()
    assert engine.set_many({"k": "new", "other": 1}) == ["k", "other"]
    assert engine.get_many(["k", "n", "absent", "other"]) == {"k": "old", "n": 5}
    assert engine.delete("k") is True


def test_joined_too_large(open_redis):
    """append and prepend count the whole value against max_value, and not the bytes before it."""
    engine = open_redis(max_value=10)
    engine.set("k", b"12345")
    assert engine.append("k", b"12345")
    for join in (engine.append, engine.prepend):
        with pytest.raises(ValueTooLarge, match="10 bytes wanted, 11 found"):
            join("k", b"x")
    engine.set("n", 10**9)
    with pytest.raises(ValueTooLarge):
        engine.set("n", 10**10)


# -- the rest ------------------------------------------------------------------------------------------------


def test_capabilities(engine):
    """Redis keeps every line."""
    assert engine.capabilities == ~Capability(0)


def test_raw(engine, cluster):
    """raw gives the driver's answer, and what the server refuses is a ShmCacheError."""
    for one in (engine, cluster):
        assert one.raw("SET", "raw:k", "v")
        assert one.raw("GET raw:k") == b"v"
        assert one.raw("DEL", "raw:k") == 1
        with pytest.raises(ShmCacheError, match="error") as caught:
            one.raw("NOSUCHCOMMAND", "secret")
        assert type(caught.value) is ShmCacheError
        assert "secret" not in str(caught.value)
        with pytest.raises(ShmCacheError, match="ERR"):
            one.raw("GET", "a", "b")
        with pytest.raises(ValueError, match="command"):
            one.raw(" ")
        with pytest.raises(TypeError, match="command"):
            one.raw(b"GET")


def test_threads_share_an_engine(cluster):
    """Threads on one engine get answers to their own questions."""

    def work(i):
        for j in range(50):
            cluster.set(f"{i}:{j}", [i, j])
            assert cluster.get(f"{i}:{j}") == [i, j]

    in_threads(6, work)
