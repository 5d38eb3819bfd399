"""One short SIGKILL storm over shmcache and over other stores with a Python face, values and ledger as in `storm` (`rivals`).

Each store runs in namespaces of its own where the kernel grants them (its files, segments, semaphores and processes go with it),
else in a process group that is killed. Three workers set their own keys to rising versions and read everybody's; one is killed
every few tens of milliseconds and succeeded. Counted: reads that miss a committed key, give an older or an uncommitted version or
bytes nobody wrote; calls that raise; and the moment from which no worker makes progress for PATIENCE seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from tests.core.build import ROOT
from tests.crash.ledger import make, parse
from tests.crash.rival_stores import STORES, Store, StoreInfo, version_of

__all__ = ["add_commands", "work"]

WORKERS: Final = 3
N_OWN: Final = 10
PATIENCE: Final = 5.0
KEYS: Final = [f"rival:{worker}:{i}" for worker in range(WORKERS) for i in range(N_OWN)]
COUNTS: Final = ("reads", "sets", "misses", "stale", "torn", "failed reads", "failed sets")
CALLS: Final = ("reads", "sets", "failed reads", "failed sets")
"""Calls that came back."""

_ROW: Final = 16
_UNSHARE: Final = ("unshare", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")


class _Words:
    """Shared by supervisor and workers: begun and acknowledged version of a key; pid and COUNTS of a worker; an error's text."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self.map = mmap.mmap(file.fileno(), 0)
        self.words = memoryview(self.map).cast("Q")
        self.rows = 2 * len(KEYS)

    def at(self, worker: int, n: int) -> int:
        return self.rows + worker * _ROW + n

    def count(self, worker: int, name: str) -> None:
        self.words[self.at(worker, 1 + COUNTS.index(name))] += 1

    def total(self, name: str) -> int:
        return sum(self.words[self.at(worker, 1 + COUNTS.index(name))] for worker in range(WORKERS))

    def complain(self, error: BaseException) -> None:
        if not any(self.map[-100:]):
            text = f"{type(error).__name__}: {error}".encode()[:60]
            self.map[-100 : len(self.map) - 100 + len(text)] = text

    def text(self) -> str:
        return bytes(self.map[-100:]).rstrip(b"\0").decode("utf-8", "replace")


def _judge(words: _Words, worker: int, n: int, value: Any, low: int, high: int) -> None:
    if value is None:
        if low:
            words.count(worker, "misses")
        return
    version = parse(KEYS[n], value)
    if version < 0:
        words.count(worker, "torn")
    elif not low <= version <= high:
        words.count(worker, "stale")


def work(store: Store, path: str, worker: int) -> None:
    """What a worker does until it is killed; begins with what its predecessor left in the air."""
    words = _Words(path)
    ledger, rng = words.words, random.Random(os.getpid())
    ledger[words.at(worker, 0)] = os.getpid()
    settled = False
    while True:
        try:
            if not settled:
                for n in range(worker * N_OWN, worker * N_OWN + N_OWN):
                    value = store.get(KEYS[n]) if ledger[2 * n] != ledger[2 * n + 1] else None
                    if value is not None:
                        ledger[2 * n + 1] = max(ledger[2 * n + 1], parse(KEYS[n], value))
                settled = True
            for _ in range(3):
                n = rng.randrange(len(KEYS))
                low = ledger[2 * n + 1]
                value = store.get(KEYS[n])
                words.count(worker, "reads")
                _judge(words, worker, n, value, low, ledger[2 * n])
        except Exception as error:
            words.count(worker, "failed reads")
            words.complain(error)
            continue
        n = worker * N_OWN + rng.randrange(N_OWN)
        version = ledger[2 * n] + 1
        ledger[2 * n] = version
        try:
            if store.set(KEYS[n], make(KEYS[n], version)) is False:
                raise RuntimeError("set answers False")
            words.count(worker, "sets")
            ledger[2 * n + 1] = version
        except Exception as error:
            words.count(worker, "failed sets")
            words.complain(error)


# -- the supervisor of one store, inside its namespaces -----------------------------------------------------------------------


def _forked(info: StoreInfo, path: str, directory: str) -> tuple[Callable[[int], int], Callable[[int, int], None]]:
    attach = info.prepare(directory, KEYS)

    def spawn(worker: int) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                sys.stderr = open(os.devnull, "w")  # noqa: SIM115
                work(attach(), path, worker)
            finally:
                os._exit(1)
        return pid

    def kill(worker: int, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    return spawn, kill


_MULE: Final = """
import sys
sys.path.insert(0, {root!r})
import uwsgi
from tests.crash.rivals import work

class Store:
    def set(self, key, value):
        return bool(uwsgi.cache_update(key, value, 0, "rival"))
    def get(self, key):
        return uwsgi.cache_get(key, "rival")

work(Store(), {path!r}, uwsgi.mule_id() - 1)
"""


def _uwsgi(info: StoreInfo, words: _Words, path: str, directory: str) -> tuple[Callable[[int], int], Callable[[int, int], None]]:
    mule = Path(directory, "mule.py")
    mule.write_text(_MULE.format(root=str(ROOT), path=path))
    program = Path(sys.executable).parent / "uwsgi"
    command = [
        str(program), "--master", "--need-app=0", "--socket", f"{directory}/socket", "--logto", f"{directory}/log",
        "--processes", "1", "--cache2", "name=rival,items=200,blocksize=32768", "--home", sys.prefix,
        *([f"--mule={mule}"] * WORKERS),
    ]  # fmt: skip
    if "ipcsem" in info.name:
        command += ["--lock-engine", "ipcsem"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)

    def spawn(worker: int) -> int:
        """The master respawns a mule by itself; wait until it has said its pid."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            pid = words.words[words.at(worker, 0)]
            if pid:
                return int(pid)
            time.sleep(0.005)
        return 0

    def kill(worker: int, pid: int) -> None:
        words.words[words.at(worker, 0)] = 0
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    return spawn, kill


def _inside(index: int, seconds: float, seed: int, directory: str) -> dict[str, Any]:
    """The storm over one store; what was counted."""
    info, path = STORES[index], f"{directory}/words"
    Path(path).write_bytes(bytes(8192))
    words, rng = _Words(path), random.Random(seed)
    os.mkdir(f"{directory}/store")
    spawn, kill = (
        _uwsgi(info, words, path, directory) if info.prepare is None else _forked(info, path, f"{directory}/store")
    )  # fmt: skip
    pids = [spawn(worker) for worker in range(WORKERS)]
    begun = beaten = time.monotonic()
    answered, kills, hang = 0, 0, 0.0
    due = begun + 0.5
    while time.monotonic() < begun + seconds:
        time.sleep(0.005)
        now = time.monotonic()
        calls = sum(words.total(name) for name in CALLS)
        if calls != answered:
            answered, beaten = calls, now
        elif now - beaten > PATIENCE:
            hang = beaten - begun
            break
        if now >= due and now - beaten < 0.5:
            due = now + rng.uniform(0.005, 0.03)
            worker = rng.randrange(WORKERS)
            kill(worker, pids[worker])
            kills += 1
            pids[worker] = spawn(worker)
    for worker, pid in enumerate(pids):
        kill(worker, pid)
    return {
        "kills": kills, "seconds": time.monotonic() - begun, "hang": hang, "error": words.text(),
        **{name: words.total(name) for name in COUNTS},
    }  # fmt: skip


# -- the command ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _group(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own; the group is killed at the end whatever happens."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT, env=environment
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _namespaces() -> list[str]:
    """The prefix that gives a command its own namespaces; nothing where that is not granted."""
    if shutil.which("unshare") and subprocess.run([*_UNSHARE, "true"], capture_output=True, check=False).returncode == 0:
        return list(_UNSHARE)
    return []


def _run(index: int, seconds: float, seed: int, prefix: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="shmcache-rival-") as directory:
        command = [
            *prefix, sys.executable, "-m", "tests.crash", "rivals", "--inside", str(index), "--seconds", str(seconds),
            "--seed", str(seed), "--directory", directory, *(["--own-shm"] if prefix else []),
        ]  # fmt: skip
        with _group(command, dict(os.environ)) as process:
            try:
                out, errors = process.communicate(timeout=seconds + 60)
            except subprocess.TimeoutExpired:
                return {"error": f"no end within {seconds + 60:g} s"}
        for line in out.splitlines():
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        return {"error": ((errors or out).strip().splitlines() or ["no answer"])[-1]}


def _verdict(r: dict[str, Any]) -> str:
    if "kills" not in r:
        return f"did not run: {r['error']}"
    parts = []
    if r["hang"]:
        parts.append(f"all workers hang after {r['hang']:.1f} s")
    for name, what in (
        ("torn", "values nobody wrote"), ("stale", "stale or uncommitted versions"), ("misses", "misses of committed keys"),
        ("failed sets", "failed sets"), ("failed reads", "failed reads"),
    ):  # fmt: skip
        if r[name]:
            parts.append(f"{r[name]:,} {what}")
    if r["error"]:
        parts.append(f"first error {r['error']}")
    return ", ".join(parts) or "clean"


def _rivals(options: argparse.Namespace) -> int:
    if options.inside is not None:
        if options.own_shm:
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)
        print(json.dumps(_inside(options.inside, options.seconds, options.seed, options.directory)), flush=True)
        os._exit(0)  # what hangs is killed with the group
    prefix, ours = _namespaces(), 0
    if not prefix:
        print("namespaces: not granted here; segments that a store leaves in /dev/shm stay")
    print("| store | version | SIGKILLs | sets | result |\n|---|---|---|---|---|")
    for index, info in enumerate(STORES):
        if options.only and options.only not in info.name:
            continue
        version = version_of(info.package)
        if version is None:
            print(f"| {info.name} | - | - | - | {info.package} is not installed |")
            continue
        result = _run(index, options.seconds, options.seed, prefix)
        if info.package == "shmcache" and _verdict(result) != "clean":
            ours += 1
        kills, sets = result.get("kills", "-"), f"{result.get('sets', 0):,}"
        print(f"| {info.name} | {version} | {kills} | {sets} | {_verdict(result)} |", flush=True)
    return ours


def add_commands(command: Callable[[str, str, float], argparse.ArgumentParser]) -> None:
    """The sub-command of this module."""
    sub = command("rivals", "the same short SIGKILL storm over other stores that are installed", 15.0)
    sub.add_argument("--only", help="stores whose name has this in it")
    sub.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    sub.add_argument("--directory", help=argparse.SUPPRESS)
    sub.add_argument("--own-shm", action="store_true", help=argparse.SUPPRESS)
    sub.set_defaults(run=_rivals)
