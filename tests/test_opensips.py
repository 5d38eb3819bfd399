"""shmcache.opensips: functions and codes, the scripts of the OpenSIPS tutorials, and examples/billing.py."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import shmcache
from shmcache import opensips
from shmcache.engines.memory import MemoryEngine
from shmcache.opensips import (
    ERROR,
    NOT_A_NUMBER,
    NOT_FOUND,
    OK,
    cache_add,
    cache_counter_fetch,
    cache_fetch,
    cache_raw_query,
    cache_remove,
    cache_remove_chunk,
    cache_store,
    cache_sub,
)
from shmcache.testing import in_processes

_serial = itertools.count()
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(params=["memory", "redis", "tiered"])
def engine(request, clock):
    """An engine under an engine_id; those with a clock of ours have `clock`."""
    name = f"{os.getpid()}-{next(_serial)}"
    with shmcache.open(f"memory:{name}://", clock=clock) as memory:
        if request.param == "memory":
            yield memory
            return
        server = request.getfixturevalue("redis_server")
        with shmcache.open(f"redis:{name}://{server}/0", health="no", prefix=f"{name}:") as redis:
            if request.param == "redis":
                yield redis
            else:
                with shmcache.open(f"tiered:{name}://", l1=memory, l2=redis) as tiered:
                    yield tiered
            redis.clear()


@pytest.fixture
def eid(engine):
    return engine.engine_id


def test_codes():
    """1 ok, -2 not found, -3 not a number, -1 anything else."""
    assert (OK, NOT_FOUND, NOT_A_NUMBER, ERROR) == (1, -2, -3, -1)


@pytest.mark.parametrize(
    ("value", "kept", "fetched"),
    [
        ("text", "text", "text"), ("", "", ""), ("5", 5, "5"), ("-12", -12, "-12"), ("0", 0, "0"),
        (7, 7, "7"),
        ("9223372036854775807", 2**63 - 1, "9223372036854775807"), ("9223372036854775808",) * 3,
        ("-9223372036854775808", -(2**63), "-9223372036854775808"), ("007",) * 3, ("+5",) * 3, ("-0",) * 3,
        ("1.5",) * 3, (" 5",) * 3, ("5\n",) * 3, ("\u0665",) * 3, (b"5",) * 3, (b"\xff",) * 3,
        (2**70, 2**70, str(2**70)),
    ],
)  # fmt: skip
def test_store_and_fetch(engine, eid, value, kept, fetched):
    """Canonical decimal text within 64 bits is kept as an int, and all text comes back as it went in."""
    assert cache_store(eid, "attr", value) == 1
    found = engine.get("attr")
    assert (type(found), found) == (type(kept), kept)
    assert cache_fetch(eid, "attr") == (1, fetched)


def test_not_found(eid):
    """What is absent is -2, and fetching creates nothing."""
    assert cache_fetch(eid, "attr") == (-2, None)
    assert cache_counter_fetch(eid, "attr") == (-2, None)
    assert cache_fetch(eid, "attr") == (-2, None)
    assert cache_remove(eid, "attr") == 1


def test_counters(engine, eid):
    """add and sub start from 0, go below it, count what was stored as text, and give the new number."""
    assert cache_sub(eid, "credit", 5) == (1, -5)
    assert cache_add(eid, "credit", 105) == (1, 100)
    assert cache_counter_fetch(eid, "credit") == (1, 100)
    assert cache_fetch(eid, "credit") == (1, "100")
    assert cache_store(eid, "credit", "20") == 1
    assert cache_add(eid, "credit", "-30") == (1, -10)
    assert cache_store(eid, "credit", str(2**63 - 1)) == 1
    assert cache_add(eid, "credit", 1) == (-1, None)
    assert cache_fetch(eid, "credit") == (1, str(2**63 - 1))


@pytest.mark.parametrize("value", ["abc", "", "007", "1.5", b"5", str(2**63)])
def test_not_a_number(eid, value):
    """Counting what is no number is -3 and changes nothing."""
    assert cache_store(eid, "attr", value) == 1
    for count in (cache_add, cache_sub):
        assert count(eid, "attr", 1) == (-3, None)
    assert cache_counter_fetch(eid, "attr") == (-3, None)
    assert cache_fetch(eid, "attr") == (1, value)


def test_lifetimes(clock):
    """A timeout is seconds, also as text; 0 is for ever, whatever the default; a counter's counts once."""
    with shmcache.open("memory:osips-life://", clock=clock, default_ttl=5) as engine:
        eid = engine.engine_id
        assert (
            cache_store(eid, "a", "v", 10)
            == cache_store(eid, "b", "v", "10")
            == cache_store(eid, "c", "v")
            == 1
        )
        assert cache_add(eid, "n", 1, 10) == (1, 1)
        clock.now += 9
        assert cache_add(eid, "n", 1, 1000) == (1, 2)
        assert cache_fetch(eid, "a") == (1, "v")
        clock.now += 1
        assert [cache_fetch(eid, attr)[0] for attr in "abn"] == [-2] * 3
        assert cache_fetch(eid, "c") == (1, "v")
        assert engine.ttl("c") == float("inf")


def test_remove_chunk(eid):
    """remove_chunk removes what matches the glob, and is 1 when nothing does."""
    for attr in ("passwd_alice", "passwd_bob", "credit_bob"):
        cache_store(eid, attr, "x")
    assert cache_remove_chunk(eid, "passwd_*") == 1
    assert [cache_fetch(eid, f"{what}_bob")[0] for what in ("passwd", "credit")] == [-2, 1]
    assert cache_remove_chunk(eid, "passwd_*") == 1


def test_raw_query(redis_server):
    """A raw query gives rows; no answer is -2, a refused one -1."""
    with shmcache.open(f"redis:osips-raw://{redis_server}/5?health=no") as engine:
        eid = engine.engine_id
        assert cache_raw_query(eid, "RPUSH list 'a b' c") == (1, [[2]])
        assert cache_raw_query(eid, "LRANGE list 0 -1") == (1, [["a b"], ["c"]])
        assert cache_raw_query(eid, "HSET hash f 1") == (1, [[1]])
        assert cache_raw_query(eid, "HGETALL hash") == (1, [["f", "1"]])
        assert cache_raw_query(eid, "GET absent") == (-2, [])
        assert cache_raw_query(eid, "KEYS absent*") == (-2, [])
        for bad in ("", "GET 'x", "NOSUCH 1", "GET list"):
            assert cache_raw_query(eid, bad) == (-1, [])
        engine.raw("FLUSHDB")
    with shmcache.open("memory:osips-raw://"):
        assert cache_raw_query("memory:osips-raw", "anything") == (-1, [])


def test_raw_query_of_memcached(memcached_server):
    """An error line of memcached is -1, also behind a near tier; a value that looks like one is a value."""
    with (
        shmcache.open(f"memcached:osips-raw://{memcached_server}?health=no&prefix=raw:") as far,
        MemoryEngine() as near,
        shmcache.open("tiered:osips-raw://", l1=near, l2=far) as tiered,
    ):
        far.set("k", "ERROR")
        for engine in (far, tiered):
            eid = engine.engine_id
            assert cache_raw_query(eid, "get raw:k")[1][1:] == [["ERROR"], ["END"]]
            assert cache_raw_query(eid, "mg raw:k v")[1][1:] == [["ERROR"]]
            assert cache_raw_query(eid, "NOPE") == (-1, [])
            assert cache_raw_query(eid, "incr raw:k 1") == (-1, [])
            assert cache_raw_query(eid, f"get {'x' * 300}") == (-1, [])
        far.delete("k")


def test_nothing_raises(caplog):
    """An unknown engine, a bad argument, a value of another kind and a server that is down are -1 and one log
    line."""
    with (
        shmcache.open("memory:osips-bad://") as engine,
        shmcache.open("redis:osips-down://127.0.0.1:1/0?health=no&connect_timeout=0.2"),
    ):
        eid, down = engine.engine_id, "redis:osips-down"
        engine.set("list", [1])
        calls = [
            lambda: cache_store("memory:nobody", "a", "v"), lambda: cache_store(eid, "", "v"),
            lambda: cache_store(eid, 5, "v"), lambda: cache_store(eid, "a", None),
            lambda: cache_store(eid, "a", True), lambda: cache_store(eid, "a", "v", -1),
            lambda: cache_store(eid, "a", "v", "soon"), lambda: cache_store(eid, "a", "v", 10**10),
            lambda: cache_store(down, "a", "v"), lambda: cache_remove(down, "a"),
            lambda: cache_remove_chunk(down, "*"), lambda: cache_remove(None, "a"),
        ]  # fmt: skip
        pairs = [
            lambda: cache_fetch("nobody", "a"), lambda: cache_fetch(eid, "list"),
            lambda: cache_fetch(down, "a"), lambda: cache_counter_fetch(down, "a"),
            lambda: cache_add(eid, "a", 1.5), lambda: cache_add(eid, "a", "1.5"),
            lambda: cache_sub(eid, "a", None), lambda: cache_add(eid, "a", 2**63),
            lambda: cache_sub(down, "a", 1),
        ]  # fmt: skip
        for call, wanted in [*((c, -1) for c in calls), *((p, (-1, None)) for p in pairs)]:
            caplog.clear()
            assert call() == wanted
            lines = [r for r in caplog.records if r.levelno == logging.ERROR]
            assert len(lines) == 1
            assert "cache_" in lines[0].getMessage()
        assert cache_fetch(eid, "a") == (-2, None)


def test_all_is_public():
    """Every function of the contract's table is there under its name."""
    names = ["store", "fetch", "counter_fetch", "remove", "remove_chunk", "add", "sub", "raw_query"]
    assert {f"cache_{name}" for name in names} <= set(opensips.__all__)


# -- the tutorials' scripts ----------------------------------------------------------------------------------


class Phones:
    """What the scripts call: authentication against a database that counts its queries."""

    def __init__(self):
        self.passwords = {"alice": "wonderland", "4711": "12345"}
        self.queries = 0
        self.challenges = 0

    def www_authorize(self, user, password):
        """(authorized, the password of the database)."""
        self.queries += 1
        return password == self.passwords.get(user), self.passwords.get(user)

    def www_challenge(self):
        self.challenges += 1
        return False


def register(db, eid, tu, sent):
    """The password caching script: REGISTER of user `tu`, who proves to know the password `sent`."""
    code, stored = cache_fetch(eid, f"passwd_{tu}")
    if code == OK:
        if stored == sent:  # pv_www_authorize("")
            return True
        cache_remove(eid, f"passwd_{tu}")  # "force password re-fetching"
    authorized, password = db.www_authorize(tu, sent)
    if not authorized:
        return db.www_challenge()
    cache_store(eid, f"passwd_{tu}", password, 1200)
    return True


def test_password_caching(clock):
    """The tutorial's script asks the database once in 1200 s, and once more when a password does not fit."""
    with shmcache.open("memory:osips-passwords://", clock=clock) as engine:
        eid, db = engine.engine_id, Phones()
        for user, password in db.passwords.items():  # one is all digits: kept as an int, compared as text
            assert all(register(db, eid, user, password) for _ in range(5))
        assert db.queries == 2
        clock.now += 1199
        assert register(db, eid, "alice", "wonderland")
        assert db.queries == 2
        clock.now += 1
        assert register(db, eid, "alice", "wonderland")
        assert db.queries == 3
        db.passwords["alice"] = "changed"
        assert register(db, eid, "alice", "changed")
        assert db.queries == 4
        assert not register(db, eid, "alice", "wrong")
        assert not register(db, eid, "nobody", "x")
        assert (db.queries, db.challenges) == (6, 2)
        assert cache_fetch(eid, "passwd_nobody") == (-2, None)


def invite(eid, fu):
    """The billing script's first half: whether a call of user `fu` may begin, or is 403."""
    code, credit = cache_fetch(eid, fu)
    return code == OK and int(credit) > 1


def bye(eid, fu, seconds, cents=3):
    """Its second half: subtract what the call cost."""
    return cache_sub(eid, fu, seconds * cents)


def test_billing_script(engine, eid):
    """The tutorial's billing script rejects without credit, and bills each call of all processes once."""
    assert not invite(eid, "alice")
    assert cache_store(eid, "alice", "1000") == 1
    assert invite(eid, "alice")
    assert bye(eid, "alice", 100) == (1, 700)

    def work(i):
        return [bye(eid, "alice", 2)[0] for _ in range(50)]

    answers = in_processes(4, work)
    assert answers == [[1] * 50] * 4
    if isinstance(engine, MemoryEngine):  # each process had its own
        assert cache_counter_fetch(eid, "alice") == (1, 700)
    else:
        assert cache_counter_fetch(eid, "alice") == (1, 700 - 4 * 50 * 6)
        assert not invite(eid, "alice")


# -- examples/billing.py -------------------------------------------------------------------------------------


def billing(*args, **environment):
    return subprocess.run(
        [sys.executable, EXAMPLES / "billing.py", *args],
        env={**os.environ, **environment},
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_billing_example():
    """The example bills on a real cluster: no cent is lost by add and sub, nor by killing all servers."""
    done = billing("--json", "--workers", "4", "--calls", "40")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["workers"], shown["nodes"]) == (4, 3)
    atomic, separate = shown["results"]
    assert atomic["calls"] == separate["calls"] == 160
    assert atomic["lost"] == atomic["failed"] == 0
    assert shown["after_restart"] == atomic["found"] == 20_000 + atomic["paid"] - atomic["billed"]


def test_billing_example_without_redis(tmp_path):
    """Without redis-server the example says what is missing."""
    done = billing(PATH=str(tmp_path))
    assert done.returncode == 2
    assert "redis-server" in done.stderr
    assert "apt-get" in done.stderr
