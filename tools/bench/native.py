"""Compiles the C drivers of this directory against the core's sources, without Python and without an installed package.

A program is built once for each content of its sources and flags, into a directory of this user under the temporary
directory, and found there again.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import tempfile
from pathlib import Path

__all__ = ["CORE", "CORE_SOURCES", "HERE", "CompilerMissing", "build", "cache_dir"]

HERE = Path(__file__).resolve().parent
CORE = HERE.parent.parent / "shmcache" / "_core"
CORE_SOURCES = ("check", "evict", "format", "guard", "heap", "index", "ipc", "lease", "sweep", "table")


class CompilerMissing(RuntimeError):
    """No C compiler answered."""


def cache_dir() -> Path:
    """This user's directory for built programs; made 0700, refused if somebody else owns it."""
    path = Path(tempfile.gettempdir()) / f"shmcache-bench-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise RuntimeError(
            f"{path}: a directory of uid {os.getuid()} that nobody else may write wanted, "
            f"uid {info.st_uid} mode 0{info.st_mode:o} found"
        )
    return path


def build(program: str, flags: tuple[str, ...] = ("-O2",), cc: str = "") -> Path:
    """Compile `program`.c of this directory with the core; the path of the executable.

    Args:
        program: file name without `.c`.
        flags: compiler flags beside `-std=c11 -D_GNU_SOURCE`.
        cc: compiler; $CC, else gcc.

    Raises: CompilerMissing when the compiler cannot be started; RuntimeError with its output when it fails.
    """
    cc = cc or os.environ.get("CC", "gcc")
    sources = [HERE / f"{program}.c", *(CORE / f"{name}.c" for name in CORE_SOURCES)]
    try:
        version = subprocess.run([cc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as e:
        raise CompilerMissing(f"compiler: {cc} to answer --version wanted, {e} found") from e
    digest = hashlib.sha256(repr((version, flags)).encode())
    for path in (*sources, *sorted(CORE.glob("*.h")), *sorted(HERE.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    target = cache_dir() / f"{program}-{digest.hexdigest()[:20]}"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=cache_dir()) as work:
        made = Path(work) / program
        command = [cc, "-std=c11", "-D_GNU_SOURCE", *flags, f"-I{CORE}", *map(str, sources), "-lm", "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{program}: exit status 0 of {cc} wanted, {done.returncode} found:\n{done.stderr}")
        os.replace(made, target)
    return target
