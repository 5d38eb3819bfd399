"""A socket on which an answer has to be complete in time, and what makes it speak TLS. No driver is imported here.

The driver's own timeout is one of silence: a server that sends a byte now and then holds a caller for as long
as it likes. Here all that is received after a send ends at one moment.
"""

from __future__ import annotations

import time
from typing import Any, Final

__all__ = ["LAST_LOOK", "TimedSocket", "timed", "tls_arguments"]

LAST_LOOK: Final = 0.05
"""Seconds, once after a send, for who finds the time over before waiting: a process that was stopped, or not
scheduled, would otherwise take a server that answered in time for one that did not."""


class TimedSocket:
    """Stands for a connected socket; what it receives after a `sendall` it receives within `seconds` of it. Where these
    passed while this process did not run, LAST_LOOK more is left for what has come meanwhile.

    A timeout of 0, which the driver sets to look whether anything has come, stays one of 0.
    """

    def __init__(self, sock: Any, seconds: float) -> None:
        self._sock = sock
        self._seconds = seconds
        self._limit: float | None = seconds
        self._end = time.monotonic() + seconds
        self._looked = False

    def sendall(self, data: Any, *flags: Any) -> None:
        self._end, self._looked = time.monotonic() + self._seconds, False
        self._sock.settimeout(self._seconds)  # for all of it
        self._sock.sendall(data, *flags)

    def recv(self, *args: Any) -> Any:
        self._arm()
        return self._sock.recv(*args)

    def recv_into(self, *args: Any) -> Any:
        self._arm()
        return self._sock.recv_into(*args)

    def _arm(self) -> None:
        if self._limit != 0:
            left = self._end - time.monotonic()
            if left <= 0 and not self._looked:
                self._looked, self._end, left = True, time.monotonic() + LAST_LOOK, LAST_LOOK
            if left <= 0:
                raise TimeoutError("timed out")
            self._sock.settimeout(left)

    def settimeout(self, value: float | None) -> None:
        self._limit = value
        self._sock.settimeout(value)

    def gettimeout(self) -> float | None:
        return self._limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def timed(connection: Any, seconds: float, connected: bool) -> None:
    """Put a TimedSocket into a connection of the driver, as its hook for new connections.

    Args: connected: whether the driver has exchanged its greetings already; if not, it does so here.
    """
    connection._sock = TimedSocket(connection._sock, seconds)
    if connected:
        connection._parser.on_connect(connection)  # which reads from the connection's socket
    else:
        connection.on_connect()


def tls_arguments(wanted: bool, tls: dict[str, Any]) -> dict[str, Any]:
    """The driver's arguments for the engine's options `tls_*`; ValueError for any of these where TLS is not wanted."""
    if not wanted:
        if tls:
            raise ValueError(f"option {min(tls)!r}: rediss:// or tls=yes wanted with it, neither found")
        return {}
    verify = tls.get("tls_verify", True)
    return {
        "ssl": True,
        "ssl_ca_certs": tls.get("tls_ca"),
        "ssl_certfile": tls.get("tls_cert"),
        "ssl_keyfile": tls.get("tls_key"),
        "ssl_cert_reqs": "required" if verify else "none",
        "ssl_check_hostname": verify,
    }
