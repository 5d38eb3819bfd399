"""Processes that see the system differently: namespaces, users, limits, objects removed underneath, other images (R9, R13).

Each check is a function of CHECKS, runs by name (`--only NAME`), and says why where it cannot run here. Storms are those of
storm.py with workers begun another way.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import pwd
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import shmcache
import shmcache.recipes  # loaded before privileges are dropped: the library may lie where others cannot read
from shmcache import _core, catalog
from shmcache.engines.shm import ShmEngine
from shmcache.removal import remove
from shmcache.url import Url
from tests.crash.children import NEWIPC, NEWNS, NEWPID, NEWTIME, Missing, in_child, unshare
from tests.crash.storm import HUNG, Outcome, Storm, live_beacons, segment, storm
from tests.crash.uproot import removal_under_load

__all__ = ["CHECKS", "add_commands", "run_check"]

COMBINATIONS: Final = (("posix", "fast"), ("sysv", "semaphore"), ("posix", "semaphore"), ("sysv", "fast"))
NOBODY: Final = 65534
OTHER: Final = 65533
TEN_YEARS: Final = 315_360_000

_libc = ctypes.CDLL(None, use_errno=True)
Check = Callable[[int, float], Outcome]


def _open(url: str, **options: Any) -> ShmEngine:
    return ShmEngine.from_url(Url.parse(url), **options)


def _expect(found: list[str], kind: type[BaseException], word: str, call: Callable[[], object]) -> None:
    """`call` raises `kind` with `word` in its message, or `found` says what it did."""
    try:
        answer = call()
    except kind as error:
        if word not in str(error):
            found.append(f"{word!r} in the message wanted, {error} found")
    except BaseException as error:
        found.append(f"{kind.__name__} wanted, {type(error).__name__}: {error} found")
    else:
        found.append(f"{kind.__name__} wanted, {answer!r:.60} found")


def _need_root() -> None:
    if os.geteuid() != 0:
        raise Missing(f"root: uid 0 wanted, {os.geteuid()} found")


def _combinations(seconds: float) -> tuple[tuple[str, str], ...]:
    """Forms and guards; a quick leg takes each form and each guard once."""
    return COMBINATIONS if seconds >= 1 else COMBINATIONS[:2]


def _become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


# -- namespaces ------------------------------------------------------------------------------------------------------------------


def small_tmpfs(seed: int, seconds: float) -> Outcome:
    """On a /dev/shm of 1 MiB too large a segment is NoSpace before a page is touched, and a storm in one that fits is clean."""

    def body(found: list[str]) -> None:
        unshare(NEWNS)
        for arguments in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "size=1M", "tmpfs", "/dev/shm"]):
            if subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode:
                raise Missing(f"mount {' '.join(arguments)}: refused")
        _expect(found, shmcache.NoSpace, "4194304 bytes", lambda: _open("posix:///crash-tiny", size=4 << 20))
        if os.listdir("/dev/shm"):
            found.append(f"an empty /dev/shm wanted, {os.listdir('/dev/shm')} found")
        found += storm("posix", "fast", seconds=seconds, seed=seed, evict=True, workers=2).violations

    return Outcome("namespaces small-tmpfs", {}, in_child(body))


def other_ipc(seed: int, seconds: float) -> Outcome:
    """A process of another IPC namespace is refused by name, may read, and meets GuardLost through an inherited engine."""

    def body(found: list[str], cache: Any, url: str) -> None:
        unshare(NEWIPC)
        _expect(found, shmcache.SegmentInvalid, "IPC namespace", lambda: _open(url))
        with _open(url, mode="r") as reader:
            if reader.get("k") != "v":
                found.append(f"mode r: 'v' wanted, {reader.get('k')!r} found")
        _expect(found, shmcache.GuardLost, "reattach", lambda: cache.set("k", "other"))
        if cache.get("k") != "v":
            found.append(f"inherited: 'v' wanted, {cache.get('k')!r} found")

    lines = []
    for guard in ("fast", "semaphore"):
        with segment("posix", guard, "ipc") as (cache, url):
            cache.set("k", "v")
            lines += in_child(lambda found, cache=cache, url=url: body(found, cache, url))  # type: ignore[misc]
            if not cache.set("k", "again"):
                lines.append("the first namespace's engine: True wanted, False found")
    return Outcome("namespaces other-ipc", {"guards": 2}, lines)


class PidStorm(Storm):
    """Each worker is process 1 and thread 1 of a PID namespace of its own."""

    def fork(self) -> int:
        unshare(NEWPID)
        try:
            return os.fork()
        finally:
            with open("/proc/self/ns/pid") as mine:
                _libc.setns(mine.fileno(), NEWPID)

    def pid_in_segment(self, pid: int) -> int:
        return 1


def equal_pids(seed: int, seconds: float) -> Outcome:
    """Workers with equal process and thread numbers: the death of one is not hidden by the life of another."""

    def body(found: list[str]) -> None:
        for form, guard in _combinations(seconds):
            outcome = storm(form, guard, seconds=seconds, seed=seed, evict=False, kind=PidStorm)
            found += [f"{form} {guard}: {line}" for line in outcome.violations]

    def probe(found: list[str]) -> None:
        unshare(NEWPID)

    in_child(probe)
    return Outcome("namespaces equal-pids", {"storms": len(_combinations(seconds))}, in_child(body, round(4 * seconds) + 120))


def other_time(seed: int, seconds: float) -> Outcome:
    """Processes whose boot clocks differ by ten years agree on what is left of a lifetime, whoever stored the item."""

    def inside(found: list[str], url: str, offset: int) -> None:
        unshare(NEWTIME)
        with open("/proc/self/timens_offsets", "w") as f:
            f.write(f"boottime {offset} 0\nmonotonic {offset} 0\n")
        before = time.clock_gettime(time.CLOCK_BOOTTIME)

        def child(mine: list[str]) -> None:
            shift = time.clock_gettime(time.CLOCK_BOOTTIME) - before
            if abs(shift - offset) > 60:
                raise Missing(f"a time namespace: a shift of {offset} s wanted, {shift:.0f} found")
            with _open(url) as cache:
                left = cache.ttl("outside") or 0.0
                if not 900 < left <= 1000:
                    mine.append(f"offset {offset}: outside's item: 1000 s left wanted, {left} found")
                cache.set(f"inside {offset}", 1, 1000)
                with cache.lock("l", timeout=5):
                    pass

        found += in_child(child)

    lines: list[str] = []
    offsets = (TEN_YEARS, -int(time.clock_gettime(time.CLOCK_BOOTTIME) * 0.9))
    for form, guard in COMBINATIONS:
        with segment(form, guard, "time") as (cache, url):
            cache.set("outside", 1, 1000)
            for offset in offsets:
                lines += in_child(lambda found, url=url, offset=offset: inside(found, url, offset))  # type: ignore[misc]
                left = cache.ttl(f"inside {offset}") or 0.0
                if not 900 < left <= 1000:
                    lines.append(f"{form} offset {offset}: inside's item: 1000 s left wanted, {left} found")
    with segment("posix", "fast", "born", size="1M") as (_, gone):  # made inside, read outside
        pass

    def born(found: list[str]) -> None:
        unshare(NEWTIME)
        with open("/proc/self/timens_offsets", "w") as f:
            f.write(f"boottime {TEN_YEARS} 0\n")

        def child(mine: list[str]) -> None:
            _open(gone, size=1 << 20).set("k", 1, 1000)

        found += in_child(child)

    lines += in_child(born)
    with _open(gone) as cache:
        left = cache.ttl("k") or 0.0
        if not 900 < left <= 1000:
            lines.append(f"a segment of another time namespace: 1000 s left wanted, {left} found")
        cache.unlink()
    return Outcome("namespaces other-time", {"offsets": len(offsets)}, lines)


# -- users and limits ------------------------------------------------------------------------------------------------------------


def two_users(seed: int, seconds: float) -> Outcome:
    """Another's segment is refused by name and untouched, adopted only by owners=, and root looks at it read-only."""
    _need_root()
    lines: list[str] = []
    for form, guard in COMBINATIONS:
        url = f"{form}:///crash-users-{os.getpid()}"

        def makes(found: list[str], url: str = url, guard: str = guard) -> None:
            _become(NOBODY)
            _open(url, size=1 << 20, guard=guard).set("k", "theirs")

        def others(found: list[str], url: str = url) -> None:
            _become(OTHER)
            for options in ({}, {"owners": (NOBODY,)}, {"mode": "a"}, {"mode": "r"}):
                _expect(found, shmcache.SegmentNotOurs, f"uid {OTHER}", lambda options=options: _open(url, **options))  # type: ignore[misc]

        lines += in_child(makes) + in_child(others)
        _expect(lines, shmcache.SegmentNotOurs, f"{NOBODY} found", lambda url=url: _open(url))  # type: ignore[misc]
        with _open(url, mode="r") as looks:
            if looks.get("k") != "theirs" or looks._header()["owner_uid"] != NOBODY:
                lines.append(f"{form}: 'theirs' of uid {NOBODY} wanted, {looks.get('k')!r} found")
        with _open(url, owners=(NOBODY,)) as trusts:
            trusts.set("k", "ours")

        def removes(found: list[str], url: str = url) -> None:
            _become(NOBODY)
            with _open(url) as cache:
                if cache.get("k") != "ours":
                    found.append(f"'ours' of whom it trusts wanted, {cache.get('k')!r} found")
                cache.unlink()

        lines += in_child(removes)
    return Outcome("namespaces two-users", {"forms": len(COMBINATIONS)}, lines)


def limits(seed: int, seconds: float) -> Outcome:
    """Under each ulimit an opening works or is a typed error that names the segment, leaves nothing, and works afterwards."""
    import posix_ipc
    import sysv_ipc

    assert all((posix_ipc, sysv_ipc))
    kinds = {
        "FSIZE": (resource.RLIMIT_FSIZE, 1 << 20, ("posix",)),
        "NOFILE": (resource.RLIMIT_NOFILE, 3, ("posix",)),
        "AS": (resource.RLIMIT_AS, 0, ("posix", "sysv", "anon")),
        "MEMLOCK": (resource.RLIMIT_MEMLOCK, 0, ()),
        "NPROC": (resource.RLIMIT_NPROC, 0, ()),
    }
    lines: list[str] = []

    def body(found: list[str], form: str, name: str) -> None:
        what, most, refused = kinds[name]
        url = f"anon:crash-limit-{os.getpid()}://" if form == "anon" else f"{form}:///crash-limit-{os.getpid()}"
        if os.geteuid() == 0 and name in ("MEMLOCK", "NPROC"):
            _become(NOBODY)  # root is above these two
        if name == "AS":
            most = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + (2 << 20)
        old = resource.getrlimit(what)
        resource.setrlimit(what, (most, old[1]))
        if form in refused:
            _expect(found, shmcache.ShmCacheError, "crash-limit", lambda: _open(url, size=4 << 20))
        else:
            with _open(url, size=4 << 20) as cache:
                cache.set("k", b"v" * 3000)
                cache.unlink()
        resource.setrlimit(what, old)
        there = [f.name for f in catalog.list_segments() if "crash-limit" in f.name]
        private = [p.name for p in Path("/dev/shm").glob(f"{catalog.PRIVATE}*crash-limit*")]
        keys = {catalog.ipc_key(form, f"crash-limit-{os.getpid()}")}
        sets = [row["semid"] for row in catalog.sysvipc("sem") if row["key"] & 0xFFFFFFFF in keys]
        if there or private or sets:
            found.append(f"nothing left wanted, {there} {private} {sets} found")
        with _open(url, size=4 << 20) as cache:
            cache.set("k", 1)
            cache.unlink()

    for name in kinds:
        for form in ("posix", "sysv", "anon"):
            lines += [f"{name} {form}: {line}" for line in in_child(lambda found, f=form, n=name: body(found, f, n))]  # type: ignore[misc]
    return Outcome("namespaces limits", {"limits": len(kinds)}, lines)


class DroppedStorm(Storm):
    """The parent is root and has opened with owner=; each worker drops to that user before it does anything."""

    def enter(self) -> None:
        _become(NOBODY)


def root_drops(seed: int, seconds: float) -> Outcome:
    """Workers of a root parent that dropped to the segment's owner write, attach anew, die and are repaired (R13)."""
    _need_root()
    owner = pwd.getpwuid(NOBODY).pw_name
    lines: list[str] = []
    for form, guard in _combinations(seconds):
        outcome = storm(form, guard, seconds=seconds, seed=seed, evict=False, kind=DroppedStorm, owner=owner)
        lines += [f"{form} {guard}: {line}" for line in outcome.violations]
    return Outcome("namespaces root-drops", {"storms": len(_combinations(seconds))}, lines)


# -- other images ----------------------------------------------------------------------------------------------------------------

EXEC_WORKER: Final = """
import os, random, sys, threading, time
import shmcache
url, name, until = sys.argv[1], sys.argv[2], float(sys.argv[3])
cache = shmcache.open(url, mode="a", lock_timeout=30.0)
def write(n):
    while True:
        cache.set(f"{name}:{n}", f"{name}:{n}|".encode() * 50000)
        cache.incr("written")
for n in range(2):
    threading.Thread(target=write, args=(n,), daemon=True).start()
time.sleep(random.Random(os.urandom(8)).uniform(0, 0.03))
if time.monotonic() > until:
    os._exit(0)
os.execv(sys.executable, [sys.executable, *open("/proc/self/cmdline").read().rstrip(chr(0)).split(chr(0))[1:]])
"""


def execs(seed: int, seconds: float) -> Outcome:
    """Workers replace their image while their threads write, inside a guard too: nobody waits for good, nothing tears (R13)."""
    lines: list[str] = []
    figures: dict[str, Any] = {"recoveries": 0, "rounds": 0}
    for form, guard in _combinations(seconds):
        with segment(form, guard, f"exec-{seed}", size="4M", lock_timeout=HUNG) as (cache, url):
            until = time.monotonic() + seconds
            names = ("a", "b")
            shell = [sys.executable, "-P", "-c", EXEC_WORKER, url]
            workers = [subprocess.Popen([*shell, name, str(until)], cwd="/") for name in names]
            slowest = 0.0
            try:
                while time.monotonic() < until:
                    begun = time.monotonic()
                    cache.set("parent", b"p" * 3000)
                    slowest = max(slowest, time.monotonic() - begun)
                    for name in names:
                        for n in range(2):
                            value = cache.get(f"{name}:{n}")
                            if value not in (None, f"{name}:{n}|".encode() * 50000):
                                lines.append(f"{form} {guard}: torn: {value[:40]!r}")
            except shmcache.LockTimeout as error:
                lines.append(f"{form} {guard}: {error}")
            finally:
                for worker in workers:
                    try:
                        status = worker.wait(60)
                    except subprocess.TimeoutExpired:
                        worker.kill()
                        status = worker.wait()
                    if status != 0:
                        lines.append(f"{form} {guard}: worker ended with {status}")
            cache.set("parent", b"p")
            if live_beacons(cache) != 1:
                lines.append(f"{form} {guard}: 1 worker slot held wanted, {live_beacons(cache)} found")
            lines += [f"{form} {guard}: check: {finding}" for finding in cache.check()[:3]]
            figures["recoveries"] += cache._stats()["recoveries"]
            figures["slowest write ms"] = max(figures.get("slowest write ms", 0), round(slowest * 1e3))
            figures["rounds"] += 1
    return Outcome("namespaces execs", figures, lines)


def daemons(seed: int, seconds: float) -> Outcome:
    """A parent that opens anon:// and ends at once leaves it to its children; the last takes the semaphores along (R13)."""
    lines: list[str] = []
    rounds, until = 0, time.monotonic() + seconds
    while time.monotonic() < until or rounds < 4:
        guard, polite = ("fast", "semaphore")[rounds % 2], rounds % 4 < 2
        read, write = os.pipe()
        parent = os.fork()
        if parent == 0:
            os.close(read)
            mine = os.getpid()
            cache = _open(f"anon:crash-daemon-{os.getpid()}://", size=1 << 20, guard=guard)
            os.write(write, f"set {cache._header()['sem_id']}\n".encode())
            for index in range(3):
                if os.fork() == 0:
                    _daemon(cache, index, write, parent=mine)
            if polite:
                cache.close()
            os._exit(0)
        os.close(write)
        with open(read) as text:
            told = text.read().splitlines()
        os.waitpid(parent, 0)
        sem_id = int(told[0].split()[1])
        if sorted(told[1:]) != ["done 0", "done 1", "done 2"]:
            lines.append(f"round {rounds}: three done wanted, {told[1:]} found")
        end = time.monotonic() + HUNG
        while (there := _exists(sem_id)) and time.monotonic() < end:  # a pipe is closed a moment before its process has ended
            time.sleep(0.001)
        if there:
            lines.append(f"round {rounds}: set {sem_id} gone wanted, still there found")
        rounds += 1
    return Outcome("namespaces daemons", {"rounds": rounds}, lines)


def _exists(sem_id: int) -> bool:
    try:
        _core.sem_stat(sem_id)
    except OSError as error:
        return error.errno not in (errno.EINVAL, errno.EIDRM)
    return True


def _daemon(cache: ShmEngine, index: int, write: int, parent: int) -> None:
    """What a child does that outlives its parent; ends the process."""
    text = b"failed"
    try:
        os.setsid()
        signal.alarm(30)
        for i in range(200):
            cache.set(f"{index}:{i}", b"d" * (i % 50))
            cache.incr("n")
        if cache[f"{index}:199"] == b"d" * 49 and cache["n"] >= 200 and not cache.check():
            text = f"done {index}".encode()
        while os.getppid() == parent:
            time.sleep(0.001)
        cache.close()
    finally:
        os.write(write, text + b"\n")
        os._exit(0)


def _uproots(what: str) -> Check:
    def check(seed: int, seconds: float) -> Outcome:
        if what == "user":
            _need_root()
        owner = 200_000 + os.getpid()  # a user that has nothing else to lose
        return removal_under_load(what, _combinations(seconds), seconds, owner)

    return check


CHECKS: Final[dict[str, Check]] = {
    "small-tmpfs": small_tmpfs,
    "other-ipc": other_ipc,
    "equal-pids": equal_pids,
    "other-time": other_time,
    "two-users": two_users,
    "limits": limits,
    "root-drops": root_drops,
    "execs": execs,
    "daemons": daemons,
    "removed-segment": _uproots("segment"),
    "removed-semaphores": _uproots("semaphores"),
    "removed-user": _uproots("user"),
}


def run_check(name: str, seed: int, seconds: float) -> Outcome:
    """One check; what it made under a fixed name is taken away if it failed half-way. Raises Missing."""
    try:
        return CHECKS[name](seed, seconds)
    finally:
        for found in catalog.list_segments():
            if found.name.startswith("crash-") and found.name.endswith(f"-{os.getpid()}"):
                remove(found)


def _run(options: argparse.Namespace) -> int:
    bad = 0
    for name in [options.only] if options.only else CHECKS:
        try:
            bad += run_check(name, options.seed, options.seconds).report()
        except Missing as error:
            print(f"namespaces {name}: skipped: {error}", flush=True)
    return bad


def add_commands(command: Callable[[str, str, float], argparse.ArgumentParser]) -> None:
    """The sub-commands of this module."""
    parser = command("namespaces", "namespaces, users, limits, removal underneath, other images (R9, R13)", 5.0)
    parser.add_argument("--only", choices=list(CHECKS))
    parser.set_defaults(run=_run)
