"""Misuse of the shared-memory engine: codecs and threads that close it, odd mappings, small stacks."""

import signal
import threading
import time

import pytest

import shmcache

from .shm_help import in_child, take_guard


@pytest.fixture
def cache(unique_name):
    engine = shmcache.open(f"anon:{unique_name()}://", size="1M")
    yield engine
    engine.close()


@pytest.mark.parametrize("pairs", [[["k", "v"]], [("k", "v")]])
def test_set_many_takes_pairs_of_any_sequence(cache, pairs):
    """A mapping whose items are lists of two is stored like one whose items are tuples."""

    class Odd:
        def items(self):
            return pairs

    assert cache.set_many(Odd()) == []
    assert cache["k"] == "v"


@pytest.mark.parametrize("pairs", [[["k"]], [()], ["abc"], [1]])
def test_set_many_refuses_what_is_no_pair(cache, pairs):
    """Items that are not pairs are a ValueError or TypeError; nothing is stored."""

    class Odd:
        def items(self):
            return pairs

    with pytest.raises((TypeError, ValueError)):
        cache.set_many(Odd())
    assert len(cache) == 0


@pytest.mark.parametrize("call", ["get", "get_many", "gets", "pop", "gat", "items"])
def test_a_codec_that_closes_the_engine(unique_name, call):
    """decode() may close the engine it works for: the call ends with a value or a typed error, never a crash."""

    class Codec:
        def encode(self, value):
            return 0x28, b"x"

        def decode(self, flags, data):
            engine.close()
            return 5

    engine = shmcache.open(f"anon:{unique_name()}://", size="1M", codec=Codec())
    engine.set_many({"a": {}, "b": {}})
    try:
        if call == "get_many":
            engine.get_many(["a", "b"])
        elif call == "items":
            list(engine.items())
        else:
            getattr(engine, call)("a")
    except shmcache.ShmCacheError:
        pass
    with pytest.raises(shmcache.ShmCacheError, match="closed"):
        engine.get("a")


@pytest.mark.parametrize("how", ["thread", "signal"])
def test_close_while_a_writer_waits(unique_name, how):
    """close() from a thread or a signal handler while a set waits for a guard: a typed error, nothing freed too early."""
    engine = shmcache.open(f"posix:///{unique_name()}", size="1M", lock_timeout=30)
    engine.set("k", 1)
    other = shmcache.open(f"posix:keep{engine._name}:///{engine._name}")
    pid = in_child(lambda: (other.set("slot", 1), take_guard(other, 0), signal.pause()))
    while other._guards()[0]["state"] == "free":
        time.sleep(0.01)
    try:
        if how == "thread":
            closer = threading.Timer(0.3, engine.close)
            closer.start()
        else:
            old = signal.signal(signal.SIGALRM, lambda *_: engine.close())
            signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(shmcache.ShmCacheError):
            engine.set("k", 2)
        if how == "thread":
            closer.join()
        else:
            signal.signal(signal.SIGALRM, old)
    finally:
        import os

        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert other.set("k", 3)
    other.unlink()
    other.close()


def test_threads_with_small_stacks(cache):
    """A thread with a stack of 128 KiB evicts, expires and walks."""
    failures = []

    def work():
        try:
            for i in range(20_000):
                cache.set(f"k{i}", b"x" * 300, 5 if i % 2 else None)
            list(cache.keys())
            cache.clean()
        except BaseException as error:
            failures.append(error)

    old = threading.stack_size(131072)
    try:
        thread = threading.Thread(target=work)
        thread.start()
    finally:
        threading.stack_size(old)
    thread.join()
    assert failures == []
    assert cache.check() == []


def test_a_live_scribbler_costs_misses_not_processes(unique_name):
    """Random bytes over the live segment: readers and writers meet misses and typed errors; no process dies."""
    import mmap
    import os
    import random

    name = unique_name()
    engine = shmcache.open(f"posix:///{name}", size="512K", lock_timeout=0.01)
    for i in range(500):
        engine.set(f"k{i}", b"v" * 200)
    header = engine._header()

    def scribble():
        rng = random.Random(7)
        with open(f"/dev/shm/shmcache.{name}", "r+b") as f, mmap.mmap(f.fileno(), 0) as m:
            while True:
                m[rng.randrange(header["shard_off"] + 64, header["size"])] = rng.randrange(256)

    def use(seed):
        rng, until = random.Random(seed), time.monotonic() + 4
        while time.monotonic() < until:
            key = f"k{rng.randrange(500)}"
            try:
                value = engine.get(key)
                assert value is None or value == b"v" * 200
                engine.set(key, b"v" * 200, rng.choice([None, 1]))
                engine.delete(f"k{rng.randrange(500)}")
                if rng.random() < 0.01:
                    list(engine.keys())
                    engine.check()
            except shmcache.ShmCacheError:
                pass

    scribbler = in_child(scribble)
    users = [in_child(lambda seed=seed: use(seed)) for seed in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in users]
    os.kill(scribbler, signal.SIGKILL)
    os.waitpid(scribbler, 0)
    assert codes == [0, 0]
    engine.unlink()
    engine.close()


def test_a_factory_that_asks_for_its_own_key(cache):
    """It meets a typed error at once, and the key can be filled afterwards."""

    def factory():
        return cache.get_or_set("r", factory)

    with pytest.raises(shmcache.ShmCacheError, match="own"):
        cache.get_or_set("r", factory)
    assert cache.get_or_set("r", lambda: 1) == 1


@pytest.mark.parametrize("call", ["pop", "gat"])
def test_a_codec_that_rewrites_what_it_decodes(unique_name, call):
    """pop and gat give up after 1,000 tries when the item changes under each of them."""

    class Codec:
        def encode(self, value):
            return 0x28, b"x"

        def decode(self, flags, data):
            engine.set("a", {})
            return 5

    engine = shmcache.open(f"anon:{unique_name()}://", size="1M", codec=Codec())
    engine.set("a", {})
    with pytest.raises(shmcache.LockTimeout, match="1000"):
        getattr(engine, call)("a")
    engine.close()
