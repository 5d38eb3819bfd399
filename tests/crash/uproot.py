"""Segments and semaphores removed by an outsider while workers read and write (rm, ipcrm, systemd's RemoveIPC)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import shmcache
from shmcache import _core, catalog
from shmcache.engines.shm import ShmEngine
from shmcache.url import Url
from tests.crash.children import in_child
from tests.crash.storm import HUNG, Outcome

__all__ = ["removal_under_load"]

WORKERS: Final = 3


def _remove_segment(cache: ShmEngine) -> None:
    if cache.url.scheme == "posix":
        os.unlink(catalog.shm_path(cache._name))
    else:
        _core.shm_remove(cache._attachment.shm_id)


def _remove_semaphores(cache: ShmEngine) -> None:
    _core.sem_remove(cache._header()["sem_id"])


def _remove_user(cache: ShmEngine) -> None:
    """Everything of the segment's owner, as systemd does when the user's last session ends."""
    uid = cache._header()["owner_uid"]
    for kind, take in (("shm", _core.shm_remove), ("sem", _core.sem_remove)):
        for row in catalog.sysvipc(kind):
            if row["uid"] == uid:
                take(row["shmid" if kind == "shm" else "semid"])
    for path in Path("/dev/shm").iterdir():
        if path.lstat().st_uid == uid:
            path.unlink()


REMOVE: Final[dict[str, Callable[[ShmEngine], None]]] = {
    "segment": _remove_segment, "semaphores": _remove_semaphores, "user": _remove_user,
}  # fmt: skip


def _worker(cache: ShmEngine, index: int, write: int, pipe: int) -> None:
    """Writes and reads until GuardLost, reads on, attaches anew, writes again; ends the process."""
    key, text = f"w{index}", f"worker {index}: ended early"
    try:
        i = 0
        while True:
            i += 1
            try:
                cache.set(key, i)
            except shmcache.GuardLost:
                lost = time.monotonic()
                break
        if cache.get(key) != i - 1:
            raise AssertionError(f"{i - 1} readable after GuardLost wanted, {cache.get(key)!r} found")
        end = time.monotonic() + HUNG
        while True:
            try:
                cache.reattach()
                cache.incr("back")
                break
            except (shmcache.GuardLost, shmcache.SegmentInvalid):
                # the others of a segment whose semaphores are gone: its name still stands for it until somebody removes it
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
        for i in range(200):
            cache.set(f"{key}:{i}", i)
        if any(cache.get(f"{key}:{i}") != i for i in range(200)):
            raise AssertionError("what was written after reattach() readable wanted, misses found")
        text = f"back {lost}"
    except BaseException as error:
        text = f"worker {index}: {type(error).__name__}: {error}"
    finally:
        os.write(pipe, text.encode() + b"\n")
        os.read(write, 1)  # until the parent has looked
        os._exit(0)


def _one(what: str, form: str, guard: str, owner: int, lines: list[str]) -> float:
    """One removal; seconds until the last worker noticed it."""
    url = Url.parse(f"{form}:///crash-uproot-{os.getpid()}")
    options: dict[str, Any] = {"size": 1 << 20, "guard": guard, "lock_timeout": 20.0}
    if what == "user":
        options["owner"] = str(owner)
    cache = ShmEngine.from_url(url, **options)
    told, go = os.pipe(), os.pipe()
    pids = []
    for index in range(WORKERS):
        pid = os.fork()
        if pid == 0:
            os.close(go[1])
            if what == "user":
                os.setresgid(owner, owner, owner)
                os.setresuid(owner, owner, owner)
            _worker(cache, index, go[0], told[1])
        pids.append(pid)
    os.close(told[1])
    os.close(go[0])
    end = time.monotonic() + HUNG
    while not all(f"w{i}" in cache for i in range(WORKERS)) and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(0.05)
    removed = time.monotonic()
    REMOVE[what](cache)
    if what == "semaphores":
        time.sleep(1.2)  # all have noticed; then somebody takes the segment, which is of no use without them
        from shmcache.removal import remove

        for found in catalog.list_segments():
            if found.form == form and found.name == cache._name:
                remove(found)
    text = b""
    signal.alarm(60)
    with open(told[0], "rb", buffering=0) as answers:
        while text.count(b"\n") < WORKERS and (piece := answers.read(4096)):
            text += piece
    signal.alarm(0)
    answered = text.decode().splitlines()
    slowest = max([float(line.split()[1]) - removed for line in answered if line.startswith("back ")], default=0.0)
    lines += [f"{form} {guard}: {line}" for line in answered if not line.startswith("back ")]
    if len(answered) != WORKERS:
        lines.append(f"{form} {guard}: {WORKERS} answers wanted, {answered} found")

    def look(found: list[str]) -> None:
        if what == "user":  # who made the new segment may remove it; root without CAP_SYS_ADMIN may not
            os.setresgid(owner, owner, owner)
            os.setresuid(owner, owner, owner)
        with ShmEngine.from_url(url, mode="a") as new:
            if new.get("back") != WORKERS or new.check():
                found.append(f"{WORKERS} back in one new segment wanted, {new.get('back')!r} found; {new.check()[:2]}")
            new.unlink()

    lines += [f"{form} {guard}: {line}" for line in in_child(look)]
    cache.close()
    os.close(go[1])
    for pid in pids:
        os.waitpid(pid, 0)
    return slowest


def removal_under_load(what: str, combinations: Iterable[tuple[str, str]], seconds: float, owner: int) -> Outcome:
    """`what` is removed while three workers write, round after round: each notices, reads on, and all meet in a new segment."""
    lines: list[str] = []
    rounds, slowest, until = 0, 0.0, time.monotonic() + seconds
    while rounds == 0 or (time.monotonic() < until and not lines):
        for form, guard in combinations:
            slowest = max(slowest, _one(what, form, guard, owner, lines))
        rounds += 1
    return Outcome(f"namespaces removed-{what}", {"rounds": rounds, "slowest notice": f"{slowest:.2f} s"}, lines)
