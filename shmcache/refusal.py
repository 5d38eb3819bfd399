"""What the system refused, as typed errors that name the call and the object; and the packages that make system calls.

I1  OSError stays inside the modules that make and remove segments: what leaves them is one of `errors`, with the OSError or the
    package's exception as its cause.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from types import ModuleType

from .errors import NoSpace, NotSupported, SegmentNotOurs, ShmCacheError

__all__ = ["calling", "no_memory", "package", "refused"]


def refused(what: str, error: OSError) -> ShmCacheError:
    """The typed error for a system call that failed: `what` is the object, the error's text begins with the call."""
    kind: type[ShmCacheError] = ShmCacheError
    if error.errno in (errno.EACCES, errno.EPERM):
        kind = SegmentNotOurs
    elif error.errno in (errno.ENOMEM, errno.ENOSPC):
        kind = NoSpace
    return kind(f"{what}: the system's consent wanted, {error.strerror} found")


@contextlib.contextmanager
def calling(call: str, driver: ModuleType | None = None) -> Iterator[None]:
    """Errors of what stands inside leave as OSError whose text begins with the name of the call."""
    known: tuple[type[Exception], ...] = (OSError, *((driver.Error, ValueError, MemoryError) if driver else ()))
    try:
        yield
    except known as error:
        number = error.errno if isinstance(error, OSError) and error.errno else 0
        if driver and not number:
            number = (
                errno.EACCES if isinstance(error, driver.PermissionsError)
                else errno.EEXIST if isinstance(error, driver.ExistentialError)
                else errno.ENOMEM if isinstance(error, MemoryError)
                else errno.EINVAL
            )  # fmt: skip
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OSError(number, text if text.startswith(call) else f"{call}: {text}") from error


def package(name: str) -> ModuleType:
    try:
        return __import__(name)
    except ImportError as error:
        raise NotSupported(
            f"create and unlink: the package {name} wanted, it cannot be imported here ({error}); attaching works without it"
        ) from error


def no_memory(name: str, size: int, error: OSError) -> NoSpace:
    return NoSpace(
        f"segment {name}: {size} bytes of address space wanted, refused found ({error.strerror}); see `ulimit -v`"
    )
