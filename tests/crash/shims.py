"""System calls that fail, a kernel without SEM_UNDO, clocks that jump: a C library between Python and the system (shim.c).

The command compiles the shim and starts this module with it preloaded; there each case runs in a child of its own: the n-th
call of one function fails with one errno, anywhere between opening and removing a segment. Wanted: an answer that is right or a
typed error that names the object, nothing left behind, and a next opening that works.

`--seed` and `--share` choose the cases; a failure prints the case, which `--only form,guard,call,n,errno` runs again.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import shmcache
from shmcache import _core, catalog
from shmcache.engines.shm import ShmEngine
from shmcache.removal import remove
from shmcache.url import Url
from tests.crash.children import in_child
from tests.crash.storm import Outcome, storm

__all__ = ["add_commands", "build_shim", "shims"]

SOURCE: Final = Path(__file__).parent / "shim.c"
REMOVALS: Final = frozenset({"munmap", "shmdt", "shm_unlink", "semctl_rmid", "shmctl_rmid"})
"""Calls that take something away: what stays when the system refuses them is left for the next opener, or for gc."""
CALLS: Final = (
    "open", "shm_open", "ftruncate", "posix_fallocate", "fchmod", "fchown", "mmap", "renameat2", "link", "semget", "semop",
    "semctl", "shmget", "shmat", "shmctl", "clone", *sorted(REMOVALS),
)  # fmt: skip
ERRNOS: Final = tuple(
    getattr(errno, name)
    for name in (
        "ENOSPC", "EACCES", "EINTR", "ENOMEM", "EMFILE", "ENFILE", "EINVAL", "EIDRM", "EEXIST", "ENOENT", "EAGAIN", "ERANGE",
        "EPERM", "EFBIG",
    )
)  # fmt: skip
SHM_DEST: Final = 0o1000
ABSENT: Final = (errno.ENOENT, errno.EACCES, errno.EINVAL, errno.EIDRM)
"""What the system says of a name or key that is not there, or that is somebody else's."""
TEN_YEARS: Final = 315_360_000
RESIZED: Final = 512 << 10
SAID_AS: Final = {
    "semop": ("semtimedop",), "semctl_rmid": ("semctl",), "shmctl_rmid": ("shmctl",), "link": ("renameat2",),
    "shmget": ("key 0x",), "shmctl": ("key 0x",), "semctl": ("semaphores",), "semget": ("semaphores",),
}  # fmt: skip
"""How errors name a call, where not by its own name."""
MISSED: Final = "the armed failure did not take place"
"""Others' segments change how often some calls are made; so the last of a kind may not come."""


class Case(NamedTuple):
    """The n-th call of `call` fails with `number`."""

    form: str
    guard: str
    call: str
    n: int
    number: int

    def __str__(self) -> str:
        return f"{self.form},{self.guard},{self.call},{self.n},{errno.errorcode[self.number]}"


def build_shim(directory: Path) -> Path:
    """Compile shim.c into `directory`; returns the library."""
    path = directory / "shim.so"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, str(SOURCE), "-o", str(path), "-ldl"], check=True)
    return path


def shims(arguments: list[str]) -> int:
    """Run this module with the shim preloaded; its exit status."""
    with tempfile.TemporaryDirectory(prefix="shmcache-shims-") as directory:
        env = {**os.environ, "LD_PRELOAD": str(build_shim(Path(directory)))}
        return subprocess.run([sys.executable, "-m", "tests.crash.shims", *arguments], env=env, check=False).returncode


# -- inside: one case ------------------------------------------------------------------------------------------------------------


class Left:
    """What this process has made and the system still has."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sets: list[int] = []
        self.fds = self.open_files()
        usual = _core.sem_get

        def noting(key: int, n_sems: int, flags: int) -> int:
            made = usual(key, n_sems, flags)
            self.sets.append(made)
            return made

        _core.sem_get = noting

    @staticmethod
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    def __call__(self) -> list[str]:
        found = [f"file {path.name}" for path in Path("/dev/shm").iterdir() if path.name.endswith(self.name)]
        found += [
            f"memory {row['shmid']}" for row in catalog.sysvipc("shm")
            if row["cpid"] == os.getpid() and not row["perms"] & SHM_DEST  # sysv_ipc keeps some attached until the process ends
        ]  # fmt: skip
        there = {row["semid"] for row in catalog.sysvipc("sem")}
        found += [f"set {sem_id}" for sem_id in sorted(set(self.sets) & there)]
        if self.open_files() > self.fds:
            found.append(f"{self.open_files() - self.fds} descriptors")
        return found


def _use(cache: ShmEngine, found: list[str]) -> None:
    """A few operations whose answers are known."""
    cache.clear()
    cache.set("k", b"v" * 500)
    wrong = [
        ("get", cache.get("k"), b"v" * 500),
        ("add", cache.add("k", 1), False),
        ("append", cache.append("k", b"w"), True),
        ("incr", cache.incr("n"), 1),
        ("touch", cache.touch("k", 100), True),
        ("delete", (cache.delete("n"), cache.get("n")), (True, None)),
        ("keys", list(cache.keys()), ["k"]),
        ("set_many", [key for key in cache.set_many({"a": 1}) if cache.get(key)], []),  # the key is stored, or on the list
    ]
    found += [f"{what}: {wanted!r:.40} wanted, {got!r:.40} found" for what, got, wanted in wrong if got != wanted]
    with cache.lock("l", timeout=0.1):
        pass
    cache.delete("a")
    cache.clean()
    if cache.check():
        found.append(f"check: {cache.check()[:2]}")


def _resize(cache: ShmEngine, found: list[str]) -> None:
    """To RESIZED; where that fails the engine goes on with what it had."""
    try:
        cache.resize(size=RESIZED)
    except shmcache.ShmCacheError:
        if cache.get("kept") != b"k" * 99 or not cache.set("after", 1):
            found.append(f"resize: what was stored before readable after a failure wanted, {cache.get('kept')!r:.20} found")
        raise


def _life(url: Url, options: dict[str, Any], found: list[str]) -> str:
    """Open, use, resize, close, open again, use, remove. The phase that raised stands in the error's notes."""
    phase = "open"
    engines: list[ShmEngine] = []
    try:
        engines.append(ShmEngine.from_url(url, **options))
        phase = "use"
        _use(engines[0], found)
        if url.scheme != "anon":
            phase = "resize"
            engines[0].set("kept", b"k" * 99)
            _resize(engines[0], found)
            phase = "use resized"
            _use(engines[0], found)
            phase = "close"
            engines.pop().close()
            phase = "attach"
            engines.append(ShmEngine.from_url(url, **{**options, "size": RESIZED}, mode="a"))
            phase = "use again"
            _use(engines[0], found)
            phase = "unlink"
            engines[0].unlink()
    except BaseException as error:
        error.add_note(phase)
        raise
    finally:
        for engine in engines:
            engine.close()
    return phase


def _chain(error: BaseException | None) -> str:
    """The texts of an error and of its causes."""
    return f"{error}; {_chain(error.__cause__)}" if error else ""


def _judge(error: BaseException, case: Case, name: str, left: list[str], found: list[str]) -> None:
    phase = error.__notes__[-1]
    if isinstance(error, FileNotFoundError) and phase == "attach" and case.number in ABSENT:
        return  # mode a says it so, and so does the system
    if not isinstance(error, shmcache.ShmCacheError):
        found.append(f"{phase}: a typed error wanted, {type(error).__name__}: {error} found")
    elif f":{name}" not in str(error) and name not in str(error) and not str(error).startswith(("guard of", "lock")):
        found.append(f"{phase}: an error that names the segment wanted, {type(error).__name__}: {error} found")
    words = (case.call, *SAID_AS.get(case.call, ()))
    if phase in ("open", "attach", "unlink") and not any(word in _chain(error) for word in words):
        found.append(f"{phase}: an error that names {case.call} wanted, {type(error).__name__}: {_chain(error)} found")
    if phase == "open" and left and case.call not in REMOVALS:
        found.append(f"open: nothing left wanted, {', '.join(left)} found after {type(error).__name__}: {error}")


def _run_case(shim: ctypes.CDLL, case: Case, found: list[str]) -> None:
    name = f"crash-shim-{os.getpid()}"
    url = Url.parse(f"anon:{name}://" if case.form == "anon" else f"{case.form}:///{name}")
    options = {"size": 256 << 10, "guard": case.guard, "owner": f"{os.geteuid()}", "lock_timeout": 0.05}
    import msgpack
    import posix_ipc
    import sysv_ipc

    assert all((msgpack, posix_ipc, sysv_ipc))
    left = Left(name)
    shim.shim_arm(case.call.encode(), case.n, case.number)
    try:
        _life(url, options, found)
    except BaseException as error:
        shim.shim_disarm()
        _judge(error, case, name, left(), found)
        del error
    shim.shim_disarm()
    if not shim.shim_fired():
        found.append(MISSED)
    try:
        if case.form != "anon":  # what the first life left, of either size; as its error says, what has lost its semaphores
            with contextlib.suppress(FileNotFoundError, shmcache.SegmentInvalid), ShmEngine.from_url(url, mode="a") as rest:
                rest.unlink()
            if case.call in REMOVALS:
                for row in [row for row in catalog.list_segments() if row.name == name]:
                    remove(row)
        _life(url, options, found)
    except BaseException as error:
        found.append(f"next life, {getattr(error, '__notes__', ['attach'])[-1]}: {type(error).__name__}: {error}")
    swept = "\n".join(catalog.gc(-1, dry_run=True)) if case.form == "anon" and case.call in ("shmctl", "semctl") else ""
    there = [what for what in left() if f"{what} " not in swept.replace("semaphore set", "set")]
    if case.call not in REMOVALS and there:
        found.append(f"at the end: nothing left wanted, {', '.join(there)} found")
    for sem_id in left.sets:  # what a refused removal left
        with contextlib.suppress(OSError):
            _core.sem_remove(sem_id)
    for row in catalog.sysvipc("shm"):
        if row["cpid"] == os.getpid():
            with contextlib.suppress(OSError):
                _core.shm_remove(row["shmid"])
    for path in Path("/dev/shm").glob(f"*{name}"):
        path.unlink()


def _counts(shim: ctypes.CDLL, form: str, guard: str) -> dict[str, int]:
    """How often each call is made in an undisturbed life of a fresh process."""

    def body(found: list[str]) -> None:
        name = f"crash-shim-{os.getpid()}"
        url = Url.parse(f"anon:{name}://" if form == "anon" else f"{form}:///{name}")
        shim.shim_arm(b"open", 0, 0)
        _life(url, {"size": 256 << 10, "guard": guard, "owner": f"{os.geteuid()}"}, found)
        shim.shim_disarm()
        found[:] = found or [f"{call} {shim.shim_seen(call.encode())}" for call in CALLS]

    return {call: int(n) for call, n in (line.split() for line in in_child(body))}


def failures(shim: ctypes.CDLL, seed: int, share: float, only: str | None) -> Outcome:
    """Each call of a life fails once with each errno; `share` of the cases, drawn by `seed`."""
    rng, cases, sites = random.Random(seed), [], 0
    for form in ("posix", "sysv", "anon"):
        for guard in ("fast", "semaphore"):
            for call, n_calls in _counts(shim, form, guard).items():
                sites += n_calls
                cases += [Case(form, guard, call, n, number) for n in range(1, n_calls + 1) for number in ERRNOS]
    chosen = [case for case in cases if (str(case) == only if only else rng.random() < share)]
    bad: list[str] = []
    missed = 0
    for case in chosen:
        lines = in_child(lambda found, case=case: _run_case(shim, case, found))  # type: ignore[misc]
        missed += MISSED in lines
        bad += [f"{case}: {line}" for line in lines if line != MISSED]
    if missed * 20 > len(chosen):
        bad.append(f"failures that took place: 19 of 20 wanted, {len(chosen) - missed} of {len(chosen)} found")
    return Outcome("shims failures", {"calls": sites, "cases": len(chosen) - missed, "of": len(cases)}, bad)


# -- inside: SEM_UNDO, clocks ----------------------------------------------------------------------------------------------------


def no_undo(shim: ctypes.CDLL) -> Outcome:
    """On a system whose semop forgets SEM_UNDO no segment is made, by name of what is missing; elsewhere the same opens."""
    bad: list[str] = []

    def body(found: list[str], form: str, guard: str) -> None:
        name = f"crash-undo-{os.getpid()}"
        url = Url.parse(f"anon:{name}://" if form == "anon" else f"{form}:///{name}")
        left = Left(name)
        shim.shim_hide_undo(1)
        try:
            ShmEngine.from_url(url, size=1 << 20, guard=guard)
            found.append("open: NotSupported wanted, an engine found")
        except shmcache.NotSupported as error:
            if "SEM_UNDO" not in str(error):
                found.append(f"open: SEM_UNDO in the message wanted, {error} found")
        if left():
            found.append(f"open: nothing left wanted, {left()} found")
        shim.shim_hide_undo(0)
        _life(url, {"size": 1 << 20, "guard": guard}, found)

    for form in ("posix", "sysv", "anon"):
        for guard in ("auto", "fast", "semaphore"):
            lines = in_child(lambda found, form=form, guard=guard: body(found, form, guard))  # type: ignore[misc]
            bad += [f"{form} {guard}: {line}" for line in lines]
    return Outcome("shims no SEM_UNDO", {"openings": 9}, bad)


def clocks(shim: ctypes.CDLL) -> Outcome:
    """Steps of either clock by ten years, to and fro, while an engine is in use."""

    def body(found: list[str]) -> None:
        real, boot = time.CLOCK_REALTIME, time.CLOCK_BOOTTIME
        cache = ShmEngine.from_url(Url.parse(f"anon:crash-clock-{os.getpid()}://"), size=1 << 20)

        def look(what: str, wanted: set[str]) -> None:
            got = set(cache.get_many(["forever", "minute", "years", "wall"]))
            if got != wanted or not wanted >= set(cache.keys()) - {"n", "fresh"}:
                found.append(f"{what}: {sorted(wanted)} wanted, {sorted(got)} found; keys {sorted(map(str, cache.keys()))}")
            cache.set("fresh", b"x", 50)
            left = cache.ttl("fresh") or 0.0
            if not 45 < left <= 50:
                found.append(f"{what}: 50 s left wanted, {left} found")
            cache.delete("fresh")
            cache.incr("n")
            with cache.lock("l", timeout=1):
                pass
            cache.clean()
            if cache.check():
                found.append(f"{what}: check {cache.check()[:2]}")

        every = {"forever", "minute", "years", "wall"}
        cache.set("forever", 1)
        cache.set("minute", 1, 60)
        cache.set("years", 1, TEN_YEARS - 1)
        cache.set("wall", 1, expire_at=time.time() + 60)
        for step in (TEN_YEARS, -TEN_YEARS, 0):
            shim.shim_shift(real, step)
            look(f"wall clock {step:+d} s", every)
            cache.set("wall", 1, expire_at=time.time() + 60)
            left = cache.ttl("wall") or 0.0
            if not 50 < left <= 61:
                found.append(f"expire_at at {step:+d} s: 60 s left wanted, {left} found")
        shim.shim_shift(boot, -TEN_YEARS)
        look("boot clock back", every)
        shim.shim_shift(boot, 0)
        look("boot clock as it was", every)
        shim.shim_shift(boot, TEN_YEARS)
        look("boot clock ahead", {"forever"})
        shim.shim_shift(boot, 0)
        look("boot clock as it was again", {"forever"})
        cache.close()

    return Outcome("shims clocks", {"steps": 7}, in_child(body))


@contextlib.contextmanager
def _stepping(shim: ctypes.CDLL, seed: int, clock_ids: tuple[int, ...]) -> Iterator[None]:
    """Clocks of this process and its children jump by up to ten years, 20 times a second."""
    stop, rng = threading.Event(), random.Random(seed)

    def jump() -> None:
        while not stop.wait(0.05):
            for clock_id in clock_ids:
                shim.shim_shift(clock_id, rng.choice((0, TEN_YEARS, -TEN_YEARS, rng.randrange(TEN_YEARS))))

    thread = threading.Thread(target=jump)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for clock_id in clock_ids:
            shim.shim_shift(clock_id, 0)


def clock_storms(shim: ctypes.CDLL, seed: int, seconds: float) -> list[Outcome]:
    """Random kills while the wall clock jumps lose nothing; while the boot clock jumps, too, nothing is torn or hangs."""
    outcomes = []
    for form, guard, evict, clock_ids in (
        ("posix", "fast", False, (time.CLOCK_REALTIME,)),
        ("sysv", "semaphore", True, (time.CLOCK_REALTIME, time.CLOCK_BOOTTIME)),
    ):
        with _stepping(shim, seed, clock_ids):
            outcome = storm(form, guard, seconds=seconds, seed=seed, evict=evict)
        outcome.name = f"clocks jump, {outcome.name}"
        outcomes.append(outcome)
    return outcomes


def _inside(options: argparse.Namespace) -> int:
    shim = ctypes.CDLL(None)
    try:
        shim.shim_shift.argtypes = (ctypes.c_int, ctypes.c_long)
        shim.shim_arm.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int)
        shim.shim_seen.restype = ctypes.c_long
    except AttributeError:
        print("shims: the preloaded library wanted, none found; run `python -m tests.crash shims`")
        return 2
    os.environ.pop("LD_PRELOAD", None)
    outcomes = [failures(shim, options.seed, options.share, options.only)]
    if not options.only:
        outcomes += [no_undo(shim), clocks(shim), *clock_storms(shim, options.seed, options.seconds)]
    return max(outcome.report() for outcome in outcomes)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--share", type=float, default=1.0, help="share of the cases to run, 0 to 1")
    parser.add_argument("--only", metavar="CASE", help="one case as a failure printed it: form,guard,call,n,errno")


def add_commands(command: Callable[[str, str, float], argparse.ArgumentParser]) -> None:
    """The sub-commands of this module."""
    parser = command("shims", "system calls that fail, no SEM_UNDO, clocks that jump", 10.0)
    _arguments(parser)

    def run(options: argparse.Namespace) -> int:
        more = ["--only", options.only] if options.only else []
        return shims(
            ["--seed", str(options.seed), "--seconds", str(options.seconds), "--share", str(options.share), *more]
        )

    parser.set_defaults(run=run)


if __name__ == "__main__":
    inner = argparse.ArgumentParser(prog="python -m tests.crash.shims")
    inner.add_argument("--seed", type=int, default=1)
    inner.add_argument("--seconds", type=float, default=10.0)
    _arguments(inner)
    sys.exit(_inside(inner.parse_args()))
