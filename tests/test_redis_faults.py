"""shmcache.engines.redis when servers hang, break off, answer garbage, die, move their keys, come back."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import logging
import os
import socket
import time
from itertools import chain, count

import pytest
import redis
from servers import fake

import shmcache
from shmcache import MISS, EngineDown, ShmCacheError
from shmcache.engines import redis as redis_engine
from shmcache.engines.memory import MemoryEngine
from shmcache.engines.redis_link import TimedSocket
from shmcache.health import DOWN, UP
from shmcache.testing import in_processes, in_threads, interrupted
from shmcache.url import Host

_serial = itertools.count()
FAST = {"timeout": 0.2, "connect_timeout": 0.5, "retry_interval": 0.0}
MODES = ("hang", "deaf", "drop", "reset", "half", "stall", "trickle", "garbage", "refuse")


@pytest.fixture
def open_redis():
    """Opens engines that give up after 0.2 s and probe at every call."""
    engines = []

    def open_engine(address, scheme="redis", **options):
        url = f"{scheme}:f{os.getpid()}-{next(_serial)}://{address}/"
        engines.append(shmcache.open(url, **({"health": "no"} | FAST | options)))
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.close()
    engines.clear()
    gc.collect()  # a failed connect leaves the driver's objects in a cycle, with their sockets


@pytest.fixture
def proxy(redis_server):
    with fake.Proxy(redis_server.host, redis_server.port) as proxy:
        yield proxy


def until(done, seconds=60.0):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "a change wanted, none found"
        time.sleep(0.05)


# -- one server ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_faults(open_redis, proxy, mode):
    """Whatever a server does instead of answering is EngineDown with its name; afterwards all is well."""
    engine = open_redis(proxy, prefix=f"{mode}:")
    engine.set("k", "v")
    for call in (
        lambda: engine.get("k"),
        lambda: engine.set("k", "v"),
        lambda: engine.get_many("ab"),
        lambda: engine.delete_many("ab"),
        lambda: engine.cas("k", 1, b"t"),
        lambda: len(engine),
        engine.clear,
        lambda: engine.raw("GET", "k"),
    ):
        proxy.mode = mode
        if mode == "refuse":
            proxy.drop_all()
        with pytest.raises(EngineDown, match=str(proxy)) as caught:
            call()
        assert caught.value.__cause__ is not None
        proxy.mode = "pass"
        assert engine.set("k", "v")
    proxy.mode = mode
    if mode == "refuse":
        proxy.drop_all()
    assert engine.set_many({"a": 1, "b": 2}) == ["a", "b"]
    assert engine.stats().items == 0
    assert engine.stats().down > 8
    proxy.mode = "pass"
    engine.clear()


GARBAGE = [
    b"$abc\r\n", b":x\r\n", b"*1000000\r\n", b"$99999999\r\nx", b"\xff\xfe\r\n", b"HTTP/1.1 400 Bad\r\n\r\n",
    b":5\r\n", b"*2\r\n:1\r\n:2\r\n", b"*-5\r\n", b"%1\r\n+a\r\n+b\r\n", b"\r\n\r\n", b"-LOADING later\r\n",
    b"-READONLY no\r\n", b"-BUSY a script\r\n", b"-SERVER_ERROR out of memory\r\n",
]  # fmt: skip
CALLS = {
    "get": lambda engine: engine.get("k"),
    "incr": lambda engine: engine.incr("k"),
    "gets": lambda engine: engine.gets("k"),
    "get_many": lambda engine: engine.get_many("ab"),
    "delete_many": lambda engine: engine.delete_many("ab"),
    "list": list,
    "left": lambda engine: engine._get_left_many("ab"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("answer", GARBAGE)
def test_answers_of_no_redis(open_redis, answer, call):
    """What is no answer to the call is a ShmCacheError; the next answer is read from its beginning."""

    def script(request):
        work = any(word in request for word in (b"GET", b"EVAL", b"SHA"))
        return answer if work else b"+OK\r\n" * (request.count(b"\n*") + 1)

    with fake.Fake(script) as server:
        engine = open_redis(server)
        if answer[:1] == b":" and answer[1:2] != b"x" and call == "delete_many":
            answer = b"$-1\r\n"  # a number is its answer
        with pytest.raises(ShmCacheError):
            CALLS[call](engine)
        server.script = lambda request: b"$1\r\n7\r\n" if b"GET" in request else b"+OK\r\n"
        assert engine.get("k") == 7


def test_refused(open_redis):
    """A port where nobody listens is EngineDown."""
    with fake.Fake() as server:
        address = str(server)
    with pytest.raises(EngineDown, match=address):
        open_redis(address).get("k")


def test_connect_hangs(open_redis):
    """A connect that hangs ends after connect_timeout."""
    with fake.FullBacklog() as server, pytest.raises(EngineDown, match=server.address):
        open_redis(server.address, connect_timeout=0.2).get("k")


@pytest.mark.parametrize("mode", ["drop", "hang"])
def test_nothing_is_sent_twice(open_redis, proxy, mode):
    """A counter whose answer got lost was counted once."""
    engine = open_redis(proxy, prefix=f"twice-{mode}:")
    engine.delete("n")
    engine.incr("n")
    proxy.mode = mode
    with pytest.raises(EngineDown):
        engine.incr("n")
    proxy.mode = "pass"
    assert engine.counter("n") == 2


def test_policy_miss(open_redis, proxy):
    """With on_down=miss reads miss, writes that can say no say it, and the rest raises."""
    engine = open_redis(proxy, prefix="miss:", on_down="miss")
    engine.set("k", "v")
    token = engine.gets("k")[1]
    proxy.mode = "drop"
    answers = {
        "get": engine.get("k", MISS), "gets": engine.gets("k", MISS), "in": "k" in engine,
        "ttl": engine.ttl("k"), "get_many": engine.get_many("ka"), "counter": engine.counter("k"),
        "pop": engine.pop("k", MISS),
        "gat": engine.gat("k", 5, MISS), "peek": engine._peek("k"), "left": engine._get_left("k"),
        "grace": engine._get_grace("k"),
    }  # fmt: skip
    assert answers == dict.fromkeys(answers) | dict.fromkeys(("get", "gets", "pop", "gat", "peek"), MISS) | {
        "in": False,
        "get_many": {},
    }
    for no in (
        engine.set("k", 1), engine.add("k", 1), engine.replace("k", 1), engine.append("k", "x"),
        engine.prepend("k", "x"), engine.delete("k"), engine.touch("k", 5),
    ):  # fmt: skip
        assert no is False
    assert engine.set_many({"a": 1, "b": 2}) == ["a", "b"]
    assert engine.delete_many("ab") == 0
    for call in (
        lambda: engine.incr("k"), lambda: engine.cas("k", 1, token), lambda: engine.lock("k").__enter__(),
        engine.clear, lambda: list(engine.keys()), lambda: len(engine), lambda: engine.delete_match("*"),
        lambda: engine.raw("PING"),
    ):  # fmt: skip
        with pytest.raises(EngineDown):
            call()
    proxy.mode = "pass"
    assert engine.get("k") == "v"
    engine.clear()


def test_stopped_while_the_answer_came():
    """Who finds the time over, because it did not run, reads the answer that lies there; where none does, the time is
    over."""
    near, far = socket.socketpair()
    with near, far:
        link = TimedSocket(near, 0.2)
        for _ in range(2):
            link.sendall(b"GET k\r\n")
            link._end -= 1
            far.sendall(b"$1\r\n7\r\n")
            assert link.recv(7) == b"$1\r\n7\r\n"
        link.sendall(b"GET k\r\n")
        link._end -= 1
        with pytest.raises(TimeoutError):
            link.recv(4)
        far.sendall(b"late")
        link._end -= 1
        with pytest.raises(TimeoutError):
            link.recv(4)


def test_told_once(open_redis, proxy, caplog):
    """A change of state is one log line and one call of on_change, however many calls meet it."""
    changes = []
    engine = open_redis(proxy, prefix="told:", on_change=lambda *change: changes.append(change[:4]))
    caplog.set_level(logging.INFO, "shmcache")
    engine.get("k")
    proxy.mode = "drop"
    for _ in range(5):
        with pytest.raises(EngineDown):
            engine.get("k")
    proxy.mode = "pass"
    for _ in range(5):
        engine.get("k")
    assert changes == [(proxy.host, proxy.port, UP, DOWN), (proxy.host, proxy.port, DOWN, UP)]
    assert len(caplog.records) == 2
    assert all(str(proxy) in record.getMessage() for record in caplog.records)


def test_health_is_shared(open_redis, proxy):
    """What one engine found out keeps the other from asking; an operator takes a server out for both."""
    store = MemoryEngine()
    first, second = (open_redis(proxy, health=store, retry_interval=1000, prefix="shared:") for _ in range(2))
    first.get("k")
    proxy.mode = "drop"
    with pytest.raises(EngineDown):
        first.get("k")
    before = proxy.accepted
    for _ in range(5):
        with pytest.raises(EngineDown, match="next probe"):
            second.get("k")
    assert proxy.accepted == before
    proxy.mode = "pass"
    assert second.set_server(str(proxy), True)
    assert first.set("k", 1)
    assert second.set_server(str(proxy), False)
    with pytest.raises(EngineDown, match="turned off"):
        first.get("k")
    with pytest.raises(ValueError, match="other:1"):
        first.set_server("other:1", False)


@pytest.mark.skipif(
    not getattr(importlib.util.find_spec("shmcache._core"), "has_location", False),
    reason="shmcache._core is not built",
)
def test_health_of_forked_workers(open_redis, redis_server, unique_name):
    """Of four workers, one probes a dead server per interval; none of the others asks it."""
    with fake.Proxy(redis_server.host, redis_server.port) as proxy:
        health = shmcache.open(f"posix:///{unique_name()}?size=1M")
        engine = open_redis(proxy, health=health, retry_interval=0.4, timeout=0.1)

        def work(i):
            end, downs = time.monotonic() + 1.5, 0
            while time.monotonic() < end:
                try:
                    engine.get("k")
                except EngineDown:
                    downs += 1
                time.sleep(0.005)
            return downs

        proxy.mode = "deaf"
        assert min(in_processes(4, work)) > 10
        record = engine.health.status(Host(proxy.host, proxy.port))
        assert (record.status, record.downs) == (DOWN, 1)
        assert 2 <= record.probes <= 4
        assert proxy.accepted <= 4 + record.probes
        health.unlink()
        health.close()


def test_restart(open_redis, start_redis):
    """A server that was restarted between two calls costs no error."""
    server = start_redis()
    engine = open_redis(server)
    in_threads(4, lambda i: engine.set("k", 1))
    server.restart()
    assert engine.get("k") is None
    assert engine.set("k", 2)


def test_closed(open_redis, proxy):
    """A closed engine raises and opens no connection."""
    engine = open_redis(proxy)
    engine.get("k")
    engine.close()
    before = proxy.accepted
    for call in (lambda: engine.get("k"), lambda: engine.get_many("k"), lambda: engine.raw("PING")):
        with pytest.raises(ShmCacheError, match="closed"):
            call()
    assert proxy.accepted == before


@pytest.mark.parametrize(("scheme", "kind", "cold", "step"), [
    ("redis", "redis_server", True, 2), ("redis", "redis_server", False, 2), ("redis+cluster", "redis_cluster_server", False, 29),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")  # the driver's
def test_interrupted(open_redis, request, scheme, kind, cold, step):
    """A call interrupted at some line, of the driver too, connecting or connected, leaves no connection that the next
    one could stumble over."""
    engine = open_redis(request.getfixturevalue(kind), scheme, prefix="int:", timeout=10, connect_timeout=10)
    engine.set_many({"{k}a": "mine", "{k}b": "not mine"})
    files = (os.path.dirname(redis.__file__), redis_engine.__file__.removesuffix(".py"))
    for at in count(1, step):
        if cold:
            engine._client().connection_pool.disconnect()
        if not interrupted(lambda: engine.get("{k}b"), at, files):
            break
        assert engine.get("{k}a") == "mine"
    assert at > 100
    assert engine.get_many(["{k}a", "{k}b"]) == {"{k}a": "mine", "{k}b": "not mine"}
    assert engine.health.snapshot()[0]["changes"] == 0
    engine.clear()


# -- a cluster -----------------------------------------------------------------------------------------------


def node_of(engine, key):
    client = engine._client()
    return client.nodes_manager.get_node_from_slot(client.keyslot(key))


def keys_by_port(engine, count=60):
    found = {}
    for i in range(count):
        found.setdefault(node_of(engine, f"k{i}").port, []).append(f"k{i}")
    return found


def test_one_node_down(open_redis, start_redis_cluster):
    """With one node dead its keys are EngineDown with its name, the others' go on."""
    cluster = start_redis_cluster()
    args = {"scheme": "redis+cluster"}
    engine, miss = open_redis(cluster, **args), open_redis(cluster, on_down="miss", **args)
    keys = keys_by_port(engine)
    everything = dict.fromkeys(chain(*keys.values()), 1)
    assert engine.set_many(everything) == []
    assert miss.get_many(everything) == everything
    dead = cluster.servers[1]
    dead.kill()
    for server in (cluster.servers[0], cluster.servers[2]):
        until(lambda server=server: b"+OK" in server.ask(b"CONFIG SET cluster-require-full-coverage no\r\n"))
    gone = keys.pop(dead.port)
    for key in gone[:3]:
        with pytest.raises(EngineDown, match=str(dead.port)):
            engine.get(key)
    for key in chain(*keys.values()):
        assert engine.get(key) == 1
    assert miss.get_many(everything) == dict.fromkeys(chain(*keys.values()), 1)
    assert set(miss.set_many(everything)) == set(gone)
    with pytest.raises(EngineDown):
        engine.get_many(everything)
    with pytest.raises(EngineDown):
        len(engine)


def test_failover(open_redis, start_redis_cluster, start_redis):
    """When a replica takes over, its keys come back without a new engine."""
    cluster = start_redis_cluster()
    replica = start_redis(cluster=True)
    for server in (*cluster.servers, replica):
        assert server.ask(b"CONFIG SET cluster-node-timeout 500\r\n") == b"+OK\r\n"
    master = cluster.servers[0]
    bus = master.command[master.command.index("--cluster-port") + 1]
    identity = master.ask(b"CLUSTER MYID\r\n").split(b"\r\n")[1].decode()
    assert replica.ask(f"CLUSTER MEET {master.host} {master.port} {bus}\r\n".encode()) == b"+OK\r\n"
    until(lambda: replica.ask(f"CLUSTER REPLICATE {identity}\r\n".encode()) == b"+OK\r\n")
    until(lambda: b"master_link_status:up" in replica.ask(b"INFO replication\r\n"))
    engine = open_redis(cluster, scheme="redis+cluster", retry_interval=30.0)
    key = keys_by_port(engine)[master.port][0]
    engine.set(key, "v")
    assert master.ask(b"WAIT 1 2000\r\n") == b":1\r\n"
    master.kill()
    with pytest.raises(EngineDown, match=str(master.port)):
        engine.get(key)

    def back():
        try:
            return engine.get(key) == "v"
        except EngineDown:
            return False

    until(back)
    assert engine.set_many({key: "w"}) == []
    assert node_of(engine, key).port == replica.port


def test_slots_move(open_redis, start_redis_cluster):
    """Calls for keys of a slot that moves, or is being moved, are answered as if it stayed."""
    cluster = start_redis_cluster()
    engine = open_redis(cluster, scheme="redis+cluster", timeout=1.0)
    keys = [f"{{tag}}{i}" for i in range(5)]
    source = next(s for s in cluster.servers if s.port == node_of(engine, keys[0]).port)
    target = next(s for s in cluster.servers if s is not source)
    slot = engine._client().keyslot(keys[0])
    names = {s: s.ask(b"CLUSTER MYID\r\n").split(b"\r\n")[1].decode() for s in (source, target)}

    def tell(server, text):
        assert server.ask(text.encode() + b"\r\n") in (b"+OK\r\n", b"+NOKEY\r\n")

    engine.set_many(dict.fromkeys(keys[:2], "old"))
    tell(target, f"CLUSTER SETSLOT {slot} IMPORTING {names[source]}")
    tell(source, f"CLUSTER SETSLOT {slot} MIGRATING {names[target]}")
    assert engine.get(keys[0]) == "old"
    assert engine.incr(keys[2]) == 1  # absent here, so asked for there
    assert engine.incr(keys[2]) == 2
    assert engine.set_many({keys[3]: "new"}) == []
    assert engine.get_many(keys) == {keys[0]: "old", keys[1]: "old", keys[2]: 2, keys[3]: "new"}
    for key in keys[:2]:
        tell(source, f"MIGRATE {target.host} {target.port} {key} 0 1000")
    for server in (target, source):
        tell(server, f"CLUSTER SETSLOT {slot} NODE {names[target]}")
    assert engine.get_many(keys) == {keys[0]: "old", keys[1]: "old", keys[2]: 2, keys[3]: "new"}
    assert engine.incr(keys[2]) == 3
    assert engine.delete_many(keys) == 4
    assert len(engine) == 0


def test_nothing_is_sent_twice_in_a_cluster(open_redis):
    """A cluster's client sends a call once, too."""

    def script(request):
        if b"SLOTS" in request:
            node = f"*3\r\n$9\r\n127.0.0.1\r\n:{server.port}\r\n$40\r\n{'a' * 40}\r\n"
            return f"*1\r\n*3\r\n:0\r\n:16383\r\n{node}".encode()
        if b"COMMAND" in request:  # where the key is, which some drivers ask
            command = "*6\r\n$3\r\n{}\r\n:-2\r\n*1\r\n+fast\r\n:1\r\n:1\r\n:1\r\n"
            return ("*2\r\n" + command.format("get") + command.format("set")).encode()
        work = any(word in request for word in (b"EVAL", b"GET", b"$3\r\nSET\r\n"))
        return fake.DROP if work else b"+OK\r\n" * (request.count(b"\n*") + 1)

    with fake.Fake(script) as server:
        engine = open_redis(server, scheme="redis+cluster")
        for call in (lambda: engine.incr("k"), lambda: engine.get("k")):
            with pytest.raises(EngineDown):
                call()
        assert engine.set_many({"k": 1}) == ["k"]
        sent = b"".join(server.requests)
        for word in (b"$7\r\nEVALSHA\r\n", b"$3\r\nGET\r\n", b"$3\r\nSET\r\n"):
            assert sent.count(word) == 1


def test_seeds(open_redis, redis_cluster_server, redis_server):
    """One seed that lives is enough; none, or a server that is no cluster, is EngineDown."""
    with fake.Fake() as server:
        dead = str(server)
    live = str(redis_cluster_server.servers[2])
    assert open_redis(f"{dead},{live}", scheme="redis+cluster").set("seed", 1)
    for address in (dead, str(redis_server)):
        with pytest.raises(EngineDown, match=address):
            open_redis(address, scheme="redis+cluster").get("k")
