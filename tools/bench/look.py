"""What the commands that look cost on a large cache: time, and memory of their own at its peak.

    python -m tools.bench.look [--items 1000000] [--form sysv] [--only "dump;stats"]

A segment of `items` keys of 17 bytes with values of 100 is made, each command is run on it as a process of its own with its
output thrown away, and the segment is removed. Memory is the peak of RssAnon, read fifty times a second: what the process has
for itself; the pages of the segment that it looked at are everybody's and not counted.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import shmcache

COMMANDS = {
    "info": "info {}",
    "stats": "stats {}",
    "stats --lifetimes": "stats {} --lifetimes",
    "guards": "guards {}",
    "dump": "dump {}",
    "dump --json --values": "dump {} --json --values",
    "dump --sort -size --limit 20": "dump {} --sort -size --limit 20",
    "check": "check {}",
    "distribution": "distribution {}",
    "bigkeys": "bigkeys {}",
    "top, one frame": "top {} --count 1 --interval 0.1",
    "report": "report {} --interval 0 -o {work}/r.html",
    "report --sample all": "report {} --interval 0 --sample 1000000000 -o {work}/r.html",
    "save": "save {} {work}/s.snap",
}


def run(command: Sequence[str]) -> tuple[float, float, int]:
    """Seconds of the clock and of the processor, and the peak of private memory in bytes.

    Raises: RuntimeError where it does not end with 0.
    """
    start, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, cwd="/")
        while (ended := os.wait4(child.pid, os.WNOHANG))[0] == 0:
            status = Path(f"/proc/{child.pid}/status").read_text()
            peak = max([peak, *(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))])
            time.sleep(0.02)
        child.returncode, used = os.waitstatus_to_exitcode(ended[1]), ended[2]
        if child.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)}: exit code 0 wanted, {child.returncode} found: {said.read().decode()}")
    return time.monotonic() - start, used.ru_utime + used.ru_stime, peak


def fill(cache: shmcache.Engine, items: int) -> None:
    """Store the items: a third of them never expire, the others within a day."""
    draw = random.Random(1)
    for i in range(items):
        cache.set(f"passwd_user{i:06d}", draw.randbytes(100), None if i % 3 == 0 else 600 + i % 80_000)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; prints a table in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.look", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--form", choices=("posix", "sysv"), default="sysv")
    parser.add_argument("--only", help="separated by semicolons: " + ";".join(COMMANDS))
    args = parser.parse_args(argv)
    asked = args.only.split(";") if args.only else list(COMMANDS)
    unknown = [name for name in asked if name not in COMMANDS]
    if unknown:
        parser.error(f"only: some of {'; '.join(COMMANDS)} wanted, {'; '.join(unknown)} found")
    name = f"bench-look-{os.getpid()}"
    cache = shmcache.open(f"{args.form}:///{name}", size=max(args.items * 260, 4 << 20), item_size=160)
    try:
        fill(cache, args.items)
        found = cache.stats()
        print(f"{found['items']:,} items of 17 + 100 bytes in {found['size'] >> 20} MiB, {found['evicted']} evicted\n")
        print("| command | seconds | of the processor | memory of its own, MiB |\n|---|---|---|---|")
        with tempfile.TemporaryDirectory() as work:
            for what in asked:
                command = COMMANDS[what].format(f"{args.form}:{name}", work=work)
                seconds, busy, peak = run([sys.executable, "-m", "shmcache", *command.split()])
                print(f"| `{what}` | {seconds:.2f} | {busy:.2f} | {peak / (1 << 20):.0f} |", flush=True)
    finally:
        cache.unlink()
        cache.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
