"""Servers that misbehave on purpose: a scripted one, and one that stands in front of a real server.

I1  Each listens on a free port of 127.0.0.1; `close` ends its threads and sockets.
I2  Nothing here knows a protocol: a request is what one recv returned.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

__all__ = ["DROP", "HANG", "RESET", "Action", "Fake", "FullBacklog", "Proxy", "delay", "half"]


class Action:
    """What a fake does with a request, besides bytes to answer."""

    def __init__(self, name: str, seconds: float = 0.0) -> None:
        self.name, self.seconds = name, seconds

    def __repr__(self) -> str:
        return f"<{self.name} {self.seconds}>" if self.seconds else f"<{self.name}>"


HANG: Final = Action("hang")
"""Answer nothing and keep the connection open."""
DROP: Final = Action("drop")
"""Close the connection in order."""
RESET: Final = Action("reset")
"""Close it with a RST."""


def delay(seconds: float) -> Action:
    """Wait so long, then go on with the script."""
    return Action("delay", seconds)


def half(answer: bytes) -> list[bytes | Action]:
    """The first half of an answer, then the end of the connection."""
    return [answer[: len(answer) // 2], DROP]


Step: TypeAlias = bytes | Action
Script: TypeAlias = Callable[[bytes], "Step | Iterable[Step]"]


class _Listener:
    """A listening socket with a thread; `accepted` counts the connections."""

    def __init__(self) -> None:
        self.accepted = 0
        self._links: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.host = "127.0.0.1"
        self.port: int = self._socket.getsockname()[1]
        self._spawn(self._accept)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return self.address

    def _spawn(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                link, _ = self._socket.accept()
            except OSError:
                return
            with self._lock:
                self.accepted += 1
                self._links.add(link)
            self._spawn(self._serve, link)

    def _serve(self, link: socket.socket) -> None:
        raise NotImplementedError

    def _end(self, link: socket.socket, reset: bool = False) -> None:
        with self._lock:
            self._links.discard(link)
        with contextlib.suppress(OSError):
            if reset:
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                link.shutdown(socket.SHUT_RDWR)
        link.close()

    def drop_all(self) -> None:
        """End every connection there is."""
        with self._lock:
            links = list(self._links)
        for link in links:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Refuse new connections, end those there are, and wait for the threads."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.drop_all()
        for thread in self._threads:
            thread.join(10)

    def __enter__(self) -> _Listener:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Fake(_Listener):
    """Answers each request by a script.

    Args: script: a function of the request, or steps given for every request: bytes are sent, actions done, in
    order. `requests` holds what came in, `accepted` counts the connections. Assign `script` to change it.
    """

    def __init__(self, script: Script | Step | Iterable[Step] = HANG) -> None:
        self.script: Script | Step | Iterable[Step] = script
        self.requests: list[bytes] = []
        super().__init__()

    def __enter__(self) -> Fake:
        return self

    def _serve(self, link: socket.socket) -> None:
        try:
            while data := link.recv(1 << 20):
                self.requests.append(data)
                if not self._answer(link, data):
                    return
        except OSError:
            pass
        finally:
            self._end(link)

    def _answer(self, link: socket.socket, data: bytes) -> bool:
        steps = self.script(data) if callable(self.script) else self.script
        for step in [steps] if isinstance(steps, (bytes, Action)) else list(steps):
            if isinstance(step, bytes):
                link.sendall(step)
            elif step.name == "delay":
                self._closed.wait(step.seconds)
            elif step.name == "hang":
                while not self._closed.is_set() and link.recv(1 << 20):
                    pass
                return False
            else:
                self._end(link, reset=step is RESET)
                return False
        return True


class Proxy(_Listener):
    """Stands in front of a real server and spoils what comes back, by `mode`.

    mode: "pass"; "hang" (the request goes through, the answer does not come); "deaf" (not even the request
    goes through); "drop" and "reset" (the request goes through, the connection ends in place of the answer);
    "half" (half the answer, then the end); "stall" (half the answer, then nothing); "trickle" (the answer, one
    byte every 0.1 seconds); "garbage" (other bytes for the answer); "refuse" (connections end as soon as
    accepted). Assign it at any time; it holds for answers from then on. With a `filter`, a function of the
    request, answers to requests for which it is false pass.
    """

    def __init__(self, host: str, port: int, mode: str = "pass") -> None:
        self.target = host, port
        self.mode = mode
        self.garbage = b"\x00\xff garbage \r\n"
        self.filter: Callable[[bytes], bool] = lambda request: True
        super().__init__()

    def __enter__(self) -> Proxy:
        return self

    def _serve(self, link: socket.socket) -> None:
        if self.mode == "refuse":
            self._end(link, reset=True)
            return
        try:
            with socket.create_connection(self.target, 5) as far, selectors.DefaultSelector() as both:
                both.register(link, selectors.EVENT_READ)
                both.register(far, selectors.EVENT_READ)
                self._pump(link, far, both)
        except OSError:
            pass
        finally:
            self._end(link, reset=self.mode == "reset")

    def _pump(self, link: socket.socket, far: socket.socket, both: selectors.BaseSelector) -> None:
        mode = "pass"
        while not self._closed.is_set():
            for key, _ in both.select(0.2):
                data = key.fileobj.recv(1 << 20)  # type: ignore[union-attr]
                if not data:
                    return
                if key.fileobj is link:
                    mode = self.mode if self.filter(data) else "pass"
                    if mode != "deaf":
                        far.sendall(data)
                elif not self._give(link, data, mode):
                    return

    def _give(self, link: socket.socket, data: bytes, mode: str) -> bool:
        """Hand on an answer; False to end the connection."""
        if mode in ("drop", "reset"):
            return False
        if mode in ("half", "stall"):
            link.sendall(data[: max(len(data) // 2, 1)])
            return mode == "stall"
        if mode == "garbage":
            link.sendall(self.garbage)
        elif mode == "trickle":
            for i in range(len(data)):
                link.sendall(data[i : i + 1])
                if self._closed.wait(0.1):
                    return False
        elif mode == "pass":
            link.sendall(data)
        return True


class FullBacklog:
    """A port whose listener accepts nothing and whose backlog is full: a connect to it hangs."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.host = "127.0.0.1"
        self.port: int = self._socket.getsockname()[1]
        self._fill: list[socket.socket] = []
        while len(self._fill) < 8:
            link = socket.socket()
            link.setblocking(False)
            link.connect_ex((self.host, self.port))
            self._fill.append(link)
        time.sleep(0.05)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def close(self) -> None:
        for link in [*self._fill, self._socket]:
            link.close()

    def __enter__(self) -> FullBacklog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
