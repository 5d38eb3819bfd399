"""Crash points: nothing of them in a product build, and a short leg of what is done with them."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import shmcache
from tests.core.build import CORE
from tests.crash.points_build import MACRO, compile_extension, ordinary_object, run_points_build
from tests.crash.silent import NUMBERS, forbid_system_calls

seccomp = pytest.mark.skipif(platform.machine() not in NUMBERS, reason=f"system calls are numbered for {', '.join(NUMBERS)} only")


def test_nothing_is_left_in_a_product_build(tmp_path: Path) -> None:
    """The extension's object code is the same byte by byte with the lines of the points taken out."""
    bare = tmp_path / "core"
    shutil.copytree(CORE, bare)
    taken = 0
    for file in [*bare.glob("*.c"), *bare.glob("*.h")]:
        if file.name == "atomics.h":  # defines them
            continue
        text, n = MACRO.subn("", file.read_text())
        file.write_text(text)
        taken += n
        assert "SC_CRASH" not in text, file.name
    assert taken > 50
    assert ordinary_object(bare, tmp_path / "bare.o") == ordinary_object(CORE, tmp_path / "core.o")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_extension(tmp_path_factory.mktemp("points"), flags=("-O0",))


@pytest.mark.parametrize(("form", "guard", "leg"), [("posix", "fast", "crowded"), ("sysv", "semaphore", "full")])
def test_points(build: Path, form: str, guard: str, leg: str) -> None:
    """Workers killed at crash points, and repairers killed while repairing, lose nothing that was acknowledged."""
    assert run_points_build(build, ["points", "--form", form, "--guard", guard, "--leg", leg, "--seconds", "4"]) == 0


@seccomp
@pytest.mark.parametrize(("form", "guard"), [("posix", "fast"), ("sysv", "semaphore")])
def test_stopped(build: Path, form: str, guard: str) -> None:
    """While a holder is stopped reads make no system call and no repeated pass, and writers of its shard get LockTimeout."""
    assert run_points_build(build, ["stopped", "--form", form, "--guard", guard, "--seconds", "3"]) == 0


@pytest.mark.parametrize("guard", ["fast", "semaphore"])
def test_recoveries_are_timed(build: Path, guard: str) -> None:
    """Each death inside a guard is recovered once, by the next writer, whether it came later or was waiting."""
    assert run_points_build(build, ["recovery", "--guard", guard, "--size", "8M", "--deaths", "10"]) == 0


def test_a_wrong_point_is_refused(build: Path) -> None:
    """A SHMCACHE_CRASH that names no point ends the program with 64 and what was found."""
    environment = {**os.environ, "PYTHONPATH": str(build), "SHMCACHE_CRASH": "set:nowhere:1"}
    command = [sys.executable, "-c", "import shmcache._core"]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (64, "SHMCACHE_CRASH: operation:point:nth[:STOP] wanted, set:nowhere:1 found\n")


@seccomp
def test_a_system_call_is_noticed() -> None:
    """A process that forbade itself system calls is ended by the first one."""
    pid = os.fork()
    if pid == 0:
        forbid_system_calls()
        os.getppid()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGSYS


def test_a_point_is_armed_from_the_environment(build: Path, unique_name: Callable[[], str]) -> None:
    """SHMCACHE_CRASH=set:before_publish:3 kills a process in its third set, which leaves the old value."""
    url = f"posix:///{unique_name()}"
    program = f"import shmcache\ncache = shmcache.open({url!r}, mode='a')\nfor i in range(9): cache.set('k', i)"
    environment = {**os.environ, "PYTHONPATH": str(build), "SHMCACHE_CRASH": "set:before_publish:3"}
    with shmcache.open(url, size="1M") as cache:
        done = subprocess.run([sys.executable, "-c", program], env=environment, cwd="/", check=False)
        assert done.returncode == -signal.SIGKILL
        assert cache.get("k") == 1
        assert cache.set("k", "on")
        assert cache.stats()["recoveries"] == 1
        cache.unlink()
