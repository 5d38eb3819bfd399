"""Instructions of a get, a miss, a set and an incr, counted under callgrind: a guard that other people's load cannot fool.

    python -m tools.bench.instructions [--record]

`core` counts the C core alone, in a driver compiled here; `extension` counts the methods of the installed Python extension
with what they call inside the interpreter. Each figure must lie within 3 % of the one recorded in instructions.json;
--record writes the figures found there. They hold for one compiler and one interpreter, whose names are recorded too:
with another, the comparison is not made.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import native

__all__ = ["RECORD", "TOLERANCE", "compare", "core", "extension", "main", "setting"]

RECORD = native.HERE / "instructions.json"
CORE = {"counted_get": "get", "counted_miss": "miss", "counted_set": "set", "counted_incr": "incr"}
EXTENSION = {"table_get": "get", "table_set": "set", "table_incr": "incr"}
TOLERANCE = 0.03
CALLS = 10_000

_SCRIPT = f"""
import shmcache
cache = shmcache.open("anon:instructions://", size="8M", guard="fast", guards=1)
cache._set_clock(1000)
keys = [f"passwd_user{{i:06d}}" for i in range({CALLS})]
value = bytes(100)
for turn in range(6):
    for key in keys:
        cache[key] = value
cache["counter"] = 0
get, put, incr = cache.get, cache.set, cache.incr
for key in keys: get(key)
for key in keys: put(key, value)
for key in keys: incr("counter")
cache.close()
"""


def setting() -> dict[str, str]:
    """Compiler and interpreter: what the figures depend on beside the source."""
    cc = os.environ.get("CC", "gcc")
    try:
        version = subprocess.run([cc, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        version = ""
    return {
        "machine": platform.machine(),
        "compiler": version,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def _counted(command: list[str], functions: dict[str, str]) -> dict[str, float]:
    """Instructions within each function, what it calls included, over CALLS."""
    for program in ("valgrind", "callgrind_annotate"):
        if shutil.which(program) is None:
            raise FileNotFoundError(f"{program}: on the PATH wanted, not found")
    with tempfile.TemporaryDirectory(dir=native.cache_dir()) as directory:
        out = Path(directory) / "out"
        done = subprocess.run(
            ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}.%p", "--collect-atstart=no",
             *(f"--toggle-collect={function}" for function in functions), *command],
            capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "1"}, cwd=directory,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"callgrind: exit status 0 wanted, {done.returncode} found:\n{done.stderr}")
        largest = max(Path(directory).glob("out.*"), key=lambda path: path.stat().st_size)  # creating a segment clones one
        table = subprocess.run(
            ["callgrind_annotate", "--inclusive=yes", "--threshold=100", "--auto=no", "--show-percs=no", str(largest)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    found = {}
    for function, name in functions.items():
        counts = [int(m.replace(",", "")) for m in re.findall(rf"^ *([\d,]+) .*:{function}(?: |$)", table, re.MULTILINE)]
        if not counts:
            raise RuntimeError(f"callgrind: a count of {function} wanted, found:\n{table[:2000]}")
        found[name] = round(max(counts) / CALLS, 1)
    return found


def core() -> dict[str, float]:
    """Instructions a call of the C core.

    Raises: FileNotFoundError without valgrind, native.CompilerMissing, RuntimeError.
    """
    return _counted([str(native.build("instructions", ("-O2", "-g"))), str(CALLS)], CORE)


def extension() -> dict[str, float]:
    """Instructions a call of the installed extension's methods. Raises: as core; RuntimeError when shmcache is missing."""
    if importlib.util.find_spec("shmcache") is None:
        raise RuntimeError("Python package shmcache: installed wanted, not found")
    with tempfile.NamedTemporaryFile("w", suffix=".py", dir=native.cache_dir()) as f:
        f.write(_SCRIPT)
        f.flush()
        return _counted([sys.executable, f.name], EXTENSION)


def compare(recorded: dict[str, float], found: dict[str, float]) -> list[str]:
    """A line for each figure outside the tolerance."""
    beyond = []
    for name, was in recorded.items():
        now = found[name]
        if abs(now - was) > TOLERANCE * was:
            beyond.append(
                f"{name}: {was} instructions within {TOLERANCE:.0%} wanted, {now} found ({(now - was) / max(was, 1):+.1%}); "
                f"if meant, record anew: python -m tools.bench.instructions --record"
            )
    return beyond


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 when every figure is within the tolerance, 1 when not, 2 when nothing can be counted."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.instructions", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args(argv)
    try:
        found: dict[str, Any] = {
            "setting": setting(),
            "core": core(),
            "extension": extension(),
        }
    except (FileNotFoundError, native.CompilerMissing, RuntimeError) as e:
        print(e, file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1))
    if args.record:
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    recorded = json.loads(Path(RECORD).read_text())
    if recorded["setting"] != found["setting"]:
        print(f"setting: {recorded['setting']} wanted, {found['setting']} found: not compared", file=sys.stderr)
        return 2
    beyond = [f"{part} {line}" for part in ("core", "extension") for line in compare(recorded[part], found[part])]
    print("\n".join(beyond) or "every figure within the tolerance", file=sys.stderr)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
