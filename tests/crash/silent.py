"""A process that may make no system call: the kernel ends it at the first one (seccomp), exit_group excepted."""

from __future__ import annotations

import ctypes
import platform
import struct
from typing import Final

__all__ = ["NUMBERS", "forbid_system_calls", "keep_memory"]

NUMBERS: Final = {"x86_64": 231, "aarch64": 94}
"""exit_group by machine; a machine that is not listed cannot forbid."""

_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38, 22, 2
_KILL, _ALLOW = 0x80000000, 0x7FFF0000
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_memory() -> None:
    """From here on malloc takes no memory from the kernel but in steps of 16 MiB, and gives none back."""
    libc = ctypes.CDLL(None)
    for option, value in ((_TRIM_THRESHOLD, 1 << 30), (_TOP_PAD, 1 << 24), (_MMAP_THRESHOLD, 1 << 25)):
        libc.mallopt(option, value)


def forbid_system_calls() -> None:
    """The calling process (one thread) dies of SIGSYS at its next system call. OSError where seccomp is not to be had."""
    code = (
        (0x20, 0, 0, 0),  # load the number of the call
        (0x15, 0, 1, NUMBERS[platform.machine()]),
        (0x06, 0, 0, _ALLOW),
        (0x06, 0, 0, _KILL),
    )
    rules = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *row) for row in code))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(rules)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_SET_SECCOMP, _FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")
