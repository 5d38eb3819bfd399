"""Builds C test programs together with the core, without Python.

A program is named by its C files; the core's own files are added. Nothing is kept: the caller gives the directory.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["CORE", "HERE", "LEGS", "ROOT", "BuildError", "Leg", "build"]

ROOT: Final = Path(__file__).resolve().parents[2]
CORE: Final = ROOT / "shmcache" / "_core"
HERE: Final = Path(__file__).resolve().parent
NEEDS_PYTHON: Final = (
    "core.c", "module.c", "pyadmin.c", "pymap.c", "pyread.c", "pyresize.c", "pytable.c", "pyvalue.c", "pywalk.c",
)  # fmt: skip
SANITIZE: Final = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


class BuildError(RuntimeError):
    """The compiler refused; its messages are the text."""


@dataclass(frozen=True, slots=True)
class Leg:
    """A compiler with its flags."""

    name: str
    compiler: str
    flags: tuple[str, ...]

    @property
    def missing(self) -> bool:
        """Whether the compiler is not installed."""
        return shutil.which(self.compiler) is None


LEGS: Final = (
    Leg("gcc -O0", "gcc", ("-O0",)),
    Leg("gcc -O2", "gcc", ("-O2",)),
    Leg("gcc -O3", "gcc", ("-O3",)),
    Leg("clang -O2", "clang", ("-O2",)),
    Leg("gcc -O2 scalar", "gcc", ("-O2", "-DSC_SCALAR")),
    Leg("gcc sanitizers", "gcc", ("-O1", *SANITIZE)),
    Leg("clang sanitizers", "clang", ("-O1", *SANITIZE)),
)


def core_sources(core: Path) -> list[Path]:
    """The C files of the core that need no Python.h."""
    return [p for p in sorted(core.glob("*.c")) if p.name not in NEEDS_PYTHON and "Python.h" not in p.read_text()]


def build(out: Path, leg: Leg, sources: Sequence[Path], *, core: Path = CORE, defines: Sequence[str] = ()) -> Path:
    """Compile `sources` with the core at `core` into the program `out`; returns `out`. Raises BuildError."""
    command = [
        leg.compiler, "-std=c11", "-D_GNU_SOURCE", "-g", "-Wall", "-Wextra", "-Wconversion", "-Werror", *leg.flags,
        *(f"-D{name}" for name in defines), f"-I{core}", f"-I{HERE}", f"-I{ROOT / 'tests' / 'crash'}",
        *map(str, core_sources(core)), *map(str, sources), "-o", str(out), "-lpthread",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{leg.name}: {' '.join(command)}\n{done.stderr}")
    return out
