"""Processes: forks, threads, deaths inside a guard, stopped holders, exec, sub-interpreters."""

import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import shmcache

from .shm_help import die_inside, in_child, reap, run_child, take_guard, wait_for

GUARDS = ["fast", "semaphore"]
URLS = ["posix:///{}", "sysv:///{}", "anon:{}://"]


@pytest.fixture(params=GUARDS)
def guard(request):
    return request.param


@pytest.fixture(params=URLS, ids=["posix", "sysv", "anon"])
def cache(request, guard, unique_name):
    engine = shmcache.open(request.param.format(unique_name()), size="2M", guard=guard, lock_timeout=20)
    yield engine
    assert engine.check() == []
    if not request.param.startswith("anon"):
        engine.unlink()
    engine.close()


@pytest.fixture
def posix(guard, unique_name):
    engine = shmcache.open(f"posix:///{unique_name()}", size="2M", guards=2, guard=guard)
    yield engine
    assert engine.check() == []
    engine.unlink()
    engine.close()


def test_four_processes_count_one_absent_counter(cache):
    """4 x 2,000 increments from nothing make 8,000."""
    reap(*[in_child(lambda: [cache.incr("n") for _ in range(2000)]) for _ in range(4)])
    assert cache["n"] == 8000


def test_a_handle_works_in_parent_child_and_grandchild(cache):
    """One handle, used before and after os.fork on every level."""
    cache.set("parent", 1)

    def child():
        cache.set("child", 2)
        run_child(lambda: cache.set("grandchild", 3))

    run_child(child)
    assert cache.get_many(["parent", "child", "grandchild"]) == {"parent": 1, "child": 2, "grandchild": 3}


def test_fork_from_a_thread_while_others_write(cache):
    """Children forked from a thread while another thread writes work and never hang."""
    stop = threading.Event()

    def write():
        for i in itertools.count():
            if stop.is_set():
                return
            cache.set(f"w{i % 50}", i)

    writer = threading.Thread(target=write)
    writer.start()
    pids: list[int] = []

    def forks():
        for i in range(20):
            pids.append(in_child(lambda i=i: [cache.set(f"c{i}", i), cache.incr("forks")]))

    forker = threading.Thread(target=forks)
    forker.start()
    forker.join()
    reap(*pids)
    stop.set()
    writer.join()
    assert cache["forks"] == 20
    assert cache.get_many([f"c{i}" for i in range(20)]) == {f"c{i}": i for i in range(20)}


def test_threads_share_a_handle(cache):
    """Eight threads of one process count, append and iterate through one handle."""

    def work():
        for _ in range(300):
            cache.incr("n")
            assert cache.counter("n") > 0
            list(cache.keys())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert cache["n"] == 2400


def test_a_killed_writer_leaves_everything_readable(posix):
    """A holder killed inside the guard: the next writer recovers the shard, nothing is lost, nobody waits long."""
    for i in range(500):
        posix.set(f"k{i}", i)
    die_inside(posix, range(2))
    assert [g["state"] for g in posix._guards()] == ["dead", "dead"]
    assert posix.get_many([f"k{i}" for i in range(500)]) == {f"k{i}": i for i in range(500)}
    for i in range(500):
        assert posix.set(f"k{i}", -i)
    assert posix.stats()["recoveries"] == 2
    assert [g["state"] for g in posix._guards()] == ["free", "free"]
    assert all(posix[f"k{i}"] == -i for i in range(500))


def test_only_the_damaged_shard_is_recovered(posix):
    """Death in one shard leaves the other's recovery count at 0."""
    for i in range(100):
        posix.set(f"k{i}", i)
    die_inside(posix, range(1))
    for i in range(100):
        posix.set(f"k{i}", i)
    assert [g["recoveries"] for g in posix._guards()] == [1, 0]


def test_a_stopped_holder_costs_writers_a_timeout_and_readers_nothing(posix):
    """SIGSTOP inside the guard: reads answer, writers raise LockTimeout, nobody steals; SIGCONT ends it."""
    posix.set("k", "v")
    told = os.pipe()

    def holder():
        posix.set("slot", 1)
        for shard in range(2):
            take_guard(posix, shard)
        os.write(told[1], b"1")
        signal.pause()

    pid = in_child(holder)
    try:
        os.read(told[0], 1)
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        assert posix["k"] == "v"
        assert sorted(posix.keys()) == ["k", "slot"]
        for write in (lambda: posix.set("k", 2), lambda: posix.incr("n"), lambda: posix.delete("k"), posix.clear):
            with pytest.raises(shmcache.LockTimeout, match="wanted"):
                write()
        assert posix.set_many({"a": 1, "b": 2}) == ["a", "b"]
        assert [g["state"] for g in posix._guards()] == ["held", "held"]
        assert {g["pid"] for g in posix._guards()} == {pid}
        assert posix["k"] == "v"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert posix.set("k", 2)
    assert posix.stats()["recoveries"] >= 1
    for end in told:
        os.close(end)


def test_a_signal_interrupts_the_wait_with_nothing_held(posix):
    """KeyboardInterrupt leaves a wait for a guard at once; the guard is not held afterwards."""
    waiting = shmcache.open(f"posix:w{os.getpid()}{posix._name}:///{posix._name}", lock_timeout=60)
    told = os.pipe()

    def holder():
        posix.set("slot", 1)
        for shard in range(2):
            take_guard(posix, shard)
        os.write(told[1], b"1")
        signal.pause()

    pid = in_child(holder)
    os.read(told[0], 1)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        waiting.set("k", 1)
    timer.join()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert waiting.set("k", 1)
    waiting.close()
    for end in told:
        os.close(end)


def test_locks_and_leases_die_with_their_holder(cache):
    """A lock whose holder was killed is free; a child does not release what its parent holds."""
    told = os.pipe()

    def holder():
        cache.lock("l", lease=1000).__enter__()
        os.write(told[1], b"1")
        signal.pause()

    pid = in_child(holder)
    os.read(told[0], 1)
    with pytest.raises(shmcache.LockTimeout), cache.lock("l", timeout=0.05):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with cache.lock("l", timeout=5) as held:

        def child():
            held.__exit__(None, None, None)
            os._exit(0)

        os.waitpid(in_child(child), 0)
        with pytest.raises(shmcache.LockTimeout), cache.lock("l", timeout=0.05):
            pass
    for end in told:
        os.close(end)


def test_eight_waiters_call_the_factory_once(cache):
    """get_or_set in eight processes at once calls the factory in one of them."""

    def waiter():
        def factory():
            cache.incr("calls")
            time.sleep(0.1)
            return "made"

        assert cache.get_or_set("cold", factory) == "made"

    reap(*[in_child(waiter) for _ in range(8)])
    assert cache["calls"] == 1


def test_a_dead_filler_is_replaced(cache):
    """A filler killed inside its factory: the next waiter fills."""

    def dies():
        cache.get_or_set("cold", lambda: os.kill(os.getpid(), signal.SIGKILL), lease=1000)

    os.waitpid(in_child(dies), 0)
    assert cache.get_or_set("cold", lambda: "second") == "second"


def test_worker_slots_are_given_back(cache):
    """A hundred short-lived writers use a handful of slots."""
    for _ in range(100):
        run_child(lambda: cache.incr("n"))
    assert cache["n"] == 100
    assert cache.stats()["slots_used"] <= 4


def test_an_exec_inside_a_guard_is_made_good(posix):
    """execve keeps semadj: the next image of the process gives back what the last one held."""
    code = textwrap.dedent(
        f"""
        import shmcache
        c = shmcache.open("posix:///{posix._name}", lock_timeout=5)
        for i in range(100):
            assert c.set(f"k{{i}}", i)
        """
    )

    def body():
        posix.set("slot", 1)
        for shard in range(2):
            take_guard(posix, shard)
        os.execv(sys.executable, [sys.executable, "-P", "-c", code])

    run_child(body)
    assert posix["k99"] == 99


SUBINTERPRETER = """
import shmcache
c = shmcache.open("posix:{group}:///{name}")
c.set("from {group}", 1)
assert c.get("k") == "v", c.get("k")
assert c.incr("n") > 0
try:
    c.incr("k")
except shmcache.NotANumber:
    pass
else:
    raise AssertionError("no NotANumber")
c.close()
"""


def test_two_sub_interpreters_of_one_process(posix):
    """The extension loads in two sub-interpreters beside the main one; all three share the segment."""
    xxsub = pytest.importorskip("_xxsubinterpreters")
    posix.set("k", "v")
    ids = [xxsub.create() for _ in range(2)]
    for n, interpreter in enumerate(ids):
        xxsub.run_string(interpreter, SUBINTERPRETER.format(group=f"s{n}", name=posix._name))
    for interpreter in ids:
        xxsub.destroy(interpreter)
    assert posix["n"] == 2
    assert posix.get_many(["from s0", "from s1"]) == {"from s0": 1, "from s1": 1}
    posix.set("still", 1)


@pytest.mark.parametrize("form", ["posix", "sysv"])
def test_random_kills_lose_nothing(form, guard, unique_name):
    """A worker is killed every few milliseconds; acknowledged versions are there, untorn, and nobody hangs."""
    cache = shmcache.open(f"{form}:///{unique_name()}", size="8M", guard=guard)
    ledger, n_keys = shmcache.open(f"anon:l{unique_name()}://", size="1M"), 40

    def worker(me):
        rng = random.Random(os.urandom(8))
        while True:
            i = rng.randrange(n_keys // 4) * 4 + me
            version = (ledger.get(f"{me}/{i}") or 0) + 1
            ledger.set(f"started {me}/{i}", version)
            cache.set(f"k{i}", [version, str(version) * rng.randrange(1, 400)])
            ledger.set(f"{me}/{i}", version)

    workers = {in_child(lambda me=me: worker(me)): me for me in range(4)}
    rng, kills = random.Random(1), 0
    try:
        while kills < 150:
            time.sleep(rng.uniform(0.001, 0.006))
            pid = rng.choice(list(workers))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            me = workers.pop(pid)
            workers[in_child(lambda me=me: worker(me))] = me
            kills += 1
            for i in rng.sample(range(n_keys), 5):
                acknowledged = ledger.get(f"{i % 4}/{i}") or 0
                found = cache.get(f"k{i}")
                if found is None:
                    assert acknowledged == 0
                else:
                    assert found[1] == str(found[0]) * (len(found[1]) // len(str(found[0])))
                    assert found[0] >= acknowledged
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    for i in range(n_keys):
        acknowledged, started = ledger.get(f"{i % 4}/{i}") or 0, ledger.get(f"started {i % 4}/{i}") or 0
        assert acknowledged <= (cache.get(f"k{i}") or [0])[0] <= started
        assert cache.set(f"k{i}", 0)
    assert cache.check() == []
    cache.unlink()
    cache.close()
    ledger.close()


def test_reads_make_no_system_call(unique_name):
    """strace sees no system call between two marks around ten thousand gets."""
    strace = next((p for p in ("/usr/bin/strace",) if Path(p).exists()), None)
    if strace is None:
        pytest.skip("strace is not installed")
    code = textwrap.dedent(
        f"""
        import os, shmcache
        c = shmcache.open("posix:///{unique_name()}", size="1M")
        c.set("k", b"v" * 100); c.set("t", 1, 100); c.get("k")
        get = c.get
        os.getppid()
        for _ in range(10000):
            get("k"); get("t"); get("absent")
        os.getppid()
        c.unlink()
        """
    )
    done = subprocess.run([strace, "-f", sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    if "ptrace" in done.stderr and "not permitted" in done.stderr:
        pytest.skip("ptrace is not permitted here")
    assert done.returncode == 0, done.stderr[-2000:]
    between = done.stderr.split("getppid()")
    assert len(between) == 3
    calls = [line for line in between[1].splitlines()[1:] if "(" in line and not line.startswith(("brk", "mmap", "munmap"))]
    assert calls == []
