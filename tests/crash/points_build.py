"""The extension with crash points: built beside a copy of the package, put first on the path of a process of its own."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from tests.core.build import CORE, ROOT

__all__ = ["MACRO", "Points", "compile_extension", "in_points_build", "ordinary_object", "run_points_build"]

MACRO: Final = re.compile(r"^ *SC_CRASH(?:POINT|_OP)\(.*\);$\n", re.MULTILINE)
"""A line of the core that is nothing in a product build."""

_MARK: Final = "SHMCACHE_CRASH_BUILD"
_FLAGS: Final = (
    "-std=c11", "-D_GNU_SOURCE", "-DPy_LIMITED_API=0x030b0000", "-fPIC", "-fvisibility=hidden",
    "-isystem", sysconfig.get_paths()["include"],
)  # fmt: skip


def compile_extension(directory: Path, *, flags: Sequence[str] = ("-O2",), core: Path = CORE) -> Path:
    """A copy of the package in `directory`, its extension built with the points from the core at `core`; returns `directory`."""
    package = directory / "shmcache"
    shutil.copytree(ROOT / "shmcache", package, ignore=shutil.ignore_patterns("_core", "__pycache__", "*.so"))
    subprocess.run(
        ["gcc", *_FLAGS, *flags, "-DSC_CRASH_POINTS", "-shared", str(core / "core.c"), str(Path(__file__).parent / "points.c"),
         "-o", str(package / "_core.abi3.so")],
        check=True,
    )  # fmt: skip
    return directory


def ordinary_object(core: Path, out: Path, *, flags: Sequence[str] = ("-O0",)) -> bytes:
    """The object code of the core at `core`; unoptimized, a single statement more would show."""
    subprocess.run(["gcc", *_FLAGS, *flags, "-c", "core.c", "-o", str(out)], check=True, cwd=core)
    return out.read_bytes()


def run_points_build(directory: Path, arguments: Sequence[str], **options: Any) -> int:
    """`python -m tests.crash ARGUMENTS` with the package in `directory`; its exit code. `options` are those of subprocess.run."""
    path = os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, _MARK: "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "tests.crash", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False, **options).returncode


def in_points_build(arguments: Sequence[str]) -> int | None:
    """None in a process that runs with the points; elsewhere builds them and runs the command so: its exit code."""
    if os.environ.get(_MARK):
        return None
    with tempfile.TemporaryDirectory(prefix="shmcache-points-") as name:
        return run_points_build(compile_extension(Path(name)), arguments)


class Points:
    """The points of the extension loaded in this process; passes are counted in memory that forked processes share."""

    _kept: ClassVar[list[Any]] = []
    """The extension goes on counting in what it was given."""

    def __init__(self) -> None:
        from shmcache import _core

        self._library: Any = ctypes.CDLL(_core.__file__)
        self._library.sc_crash_name.restype = ctypes.c_char_p
        self._library.sc_crash_share.restype = None
        self.operations, self.points = self._names(1), self._names(0)
        n = len(self.operations) * len(self.points)
        self._counts = (ctypes.c_uint64 * n).from_buffer(mmap.mmap(-1, n * 8))
        self._kept.append(self._counts)
        self._library.sc_crash_share(self._counts)

    def _names(self, of_operation: int) -> list[str]:
        names: list[str] = []
        while (name := self._library.sc_crash_name(of_operation, len(names))) is not None:
            names.append(name.decode())
        return names

    def arm(self, text: str | None) -> None:
        """This process ends (or stops) at `operation:point:nth[:STOP]`; None: it does not. ValueError for another text."""
        if self._library.sc_crash_arm(text.encode() if text else None) != 0:
            raise ValueError(f"SHMCACHE_CRASH: operation:point:nth[:STOP] wanted, {text} found")

    def passes(self) -> dict[tuple[str, str], int]:
        """How often each point was passed in each operation, by all processes; those never passed are left out."""
        n = len(self.points)
        return {
            (operation, point): int(self._counts[o * n + p])
            for o, operation in enumerate(self.operations)
            for p, point in enumerate(self.points)
            if self._counts[o * n + p]
        }

    def reset(self) -> None:
        """All counts to 0."""
        ctypes.memset(self._counts, 0, ctypes.sizeof(self._counts))
