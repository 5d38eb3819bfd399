"""Servers of a run: each on a unix socket in the run's own directory, without persistence, ended with the run."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Server", "start"]


@dataclass
class Server:
    """A running server."""

    name: str
    socket: str
    version: str
    settings: str
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        """End it and wait."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _answer(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout or done.stderr).strip().splitlines()[0] if done.returncode == 0 else ""


def _memcached(where: Path) -> tuple[list[str], str, str]:
    path = str(where / "memcached.sock")
    command = ["memcached", "-s", path, "-m", "1024", "-I", "4m", "-t", "1"]
    if os.getuid() == 0:
        command += ["-u", "root"]
    return command, path, "-m 1024 -I 4m -t 1, unix socket"


def _redis(where: Path) -> tuple[list[str], str, str]:
    path = str(where / "redis.sock")
    command = ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no", "--dir", str(where)]
    return command, path, "no persistence, unix socket"


_KNOWN: dict[str, tuple[Callable[[Path], tuple[list[str], str, str]], list[str]]] = {
    "memcached": (_memcached, ["memcached", "-V"]),
    "redis": (_redis, ["redis-server", "--version"]),
}


def start(name: str, where: Path) -> Server:
    """Start memcached or redis and wait until it answers on its socket.

    Raises: FileNotFoundError where it is not installed; RuntimeError when it ends or does not answer within 10 s.
    """
    make, ask = _KNOWN[name]
    if shutil.which(ask[0]) is None:
        raise FileNotFoundError(f"{ask[0]}: on the PATH wanted, not found")
    command, path, settings = make(where)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 10
    while time.monotonic() < until and process.poll() is None:
        with socket.socket(socket.AF_UNIX) as s:
            try:
                s.connect(path)
            except OSError:
                time.sleep(0.02)
                continue
        return Server(name, path, _answer(ask), settings, process)
    process.kill()
    process.wait()
    raise RuntimeError(f"{name}: an answer on {path} within 10 s wanted, exit status {process.returncode} found")
