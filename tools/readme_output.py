"""What the README shows of the command line, printed by the command line.

    python -m tools.readme_output

For each ```console block of README.md runs the commands of its lines that begin with `$ shmcache` on a plain terminal of 80
columns, on a segment named `sessions` that is made for it, and writes what they print below them. Of `ls` the rows of
other segments are left out.
"""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import shmcache

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
SHOWN = "sessions"


def fill(name: str) -> None:
    """Make the segment that the README looks at."""
    with shmcache.open(f"posix:///{name}", size="64M", guards=2) as cache:
        for i in range(2000):
            cache.set(f"passwd_user{i:06}", f"{i:032x}", ttl=1200)
        for i in range(300):
            cache.set(f"session:{i:04}", {"user": f"user{i}", "since": 1.5, "roles": ["caller"] * (i % 7)}, ttl=7200)
        cache.set("report", "x" * 70_000)
        cache.set(b"key\xff\x00", b"\x01\x02")
        for _ in range(5):
            cache.incr("calls")
        for i in range(2500):
            cache.get(f"passwd_user{i:06}")
        for _ in range(3):
            cache.get("report")


def printed(command: str, name: str) -> str:
    """What a command line prints on a terminal, with the segment's real name put in and taken out again."""
    master, slave = pty.openpty()
    try:
        env = {**os.environ, "COLUMNS": "80", "TERM": "dumb"}
        words = [name if word == SHOWN else word for word in shlex.split(command)]
        shell = [sys.executable, "-m", "shmcache", *words[1:]]
        subprocess.run(shell, stdout=slave, stderr=slave, stdin=subprocess.DEVNULL, env=env, cwd="/", check=False)
        os.close(slave)
        slave, data = -1, b""
        with suppress(OSError):  # EIO: all read
            while part := os.read(master, 65536):
                data += part
    finally:
        os.close(master)
        if slave >= 0:
            os.close(slave)
    lines = data.decode().replace("\r\n", "\n").splitlines()
    if words[1] == "ls":
        lines = [line for i, line in enumerate(lines) if i < 2 or name in line.split()]
    return "\n".join(line.replace(name, SHOWN).rstrip() for line in lines)


def remade(text: str, show: Callable[[str], str]) -> str:
    """The text with what `show` gives for each command in place of what stands below it."""

    def block(match: re.Match[str]) -> str:
        commands = [line[2:] for line in match[1].splitlines() if line.startswith("$ shmcache")]
        return "```console\n" + "\n".join(f"$ {command}\n{show(command)}".rstrip() for command in commands) + "\n```"

    return BLOCK.sub(block, text)


def shape(text: str) -> set[tuple[str, ...]]:
    """The kinds of lines: their words, with every number, size, time and share the same, and rules and bars of one length."""
    plain = re.sub(r"([─█])+", r"\1", text)
    return {tuple(re.sub(r"[0-9][0-9a-zA-Z.,:%]*", "#", line).split()) for line in plain.splitlines()}


def main() -> int:
    """Rewrite the README."""
    name = SHOWN
    fill(name)
    try:
        README.write_text(remade(README.read_text(), lambda command: printed(command, name)))
    finally:
        with shmcache.open(f"posix:///{name}", mode="a") as cache:
            cache.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
