"""Children that report what they found wrong, and what a check needs of the system and does not have."""

from __future__ import annotations

import ctypes
import os
import signal
import traceback
from collections.abc import Callable
from typing import Final

__all__ = ["LIMIT", "NEWIPC", "NEWNS", "NEWPID", "NEWTIME", "Missing", "in_child", "unshare"]

LIMIT: Final = 60
"""Seconds after which a child counts as hung; openers that meet only retryable errors give up after 10."""
NEWNS: Final = 0x00020000
NEWIPC: Final = 0x08000000
NEWPID: Final = 0x20000000
NEWTIME: Final = 0x00000080
_SKIP: Final = "missing: "

_libc = ctypes.CDLL(None, use_errno=True)


class Missing(Exception):
    """A right or a feature of the system that a check needs and that is not there; the text is the reason to skip it."""


def unshare(flag: int) -> None:
    """Put this process (for pid and time: its next children) into a namespace of its own. Raises Missing."""
    if _libc.unshare(flag) != 0:
        name = {NEWNS: "NEWNS", NEWIPC: "NEWIPC", NEWPID: "NEWPID", NEWTIME: "NEWTIME"}[flag]
        raise Missing(f"unshare(CLONE_{name}): {os.strerror(ctypes.get_errno())}")


def in_child(body: Callable[[list[str]], None], limit: int = LIMIT) -> list[str]:
    """What `body` found wrong, run in a forked child that may take `limit` seconds. Raises Missing where it did."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        found: list[str] = []
        try:
            os.close(read)
            signal.alarm(limit)
            body(found)
        except Missing as error:
            found = [f"{_SKIP}{error}"]
        except BaseException as error:
            found.append(f"{type(error).__name__}: {error}; {traceback.format_exc().splitlines()[-3:-1]}")
        finally:
            os.write(write, "\n".join(found)[:60000].encode())
            os._exit(0)
    os.close(write)
    with open(read, "rb") as text:
        lines = text.read().decode("utf-8", "replace").splitlines()
    status = os.waitpid(pid, 0)[1]
    if lines and lines[0].startswith(_SKIP):
        raise Missing(lines[0].removeprefix(_SKIP))
    return [*lines, *([f"no end within {limit} s, status {status}"] if status else [])]
