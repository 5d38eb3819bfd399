"""The report of one segment, served live to a browser of this machine: what `shmcache web` runs.

I1  It listens on 127.0.0.1 only and answers who knows the token, under its own name only: the Host header must be the address
    it listens on, so that a page elsewhere whose name was made to point here (DNS rebinding) gets nothing.
I2  It looks only, as `report` does, and a request carries nothing in: GET and HEAD, one page, no script, no other resource.
I3  However many ask, a page is made at most once in `refresh` seconds, and counters are read once a second.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from . import report_html
from .catalog import Found
from .errors import ShmCacheError
from .inspect import View, locate
from .report import assemble, warnings

__all__ = ["Live", "Server"]

HOST: Final = "127.0.0.1"
HISTORY: Final = 121
"""Readings of the counters that are kept, one a second: two minutes of traffic."""
CHECK_EVERY: Final = 30.0
"""Seconds between two audits; one takes about a second for a million items."""
MOST_THREADS: Final = 32
"""Requests in progress; one more is closed unanswered."""


class Live:
    """The page of a segment, made anew when it is asked for and the last is too old. One thread at a time makes it.

    Args: target: what `inspect.locate` takes. refresh: seconds. sample: items surveyed, about.
    A segment that is removed and made again under its name is followed; until then the page is of the old one.
    """

    def __init__(self, target: str, refresh: float, sample: int | None) -> None:
        self.target, self.refresh, self.sample = target, refresh, sample
        self._lock, self._view, self._page = threading.Lock(), _view(target), ""
        self._history: deque[tuple[float, dict[str, int]]] = deque(maxlen=HISTORY)
        self._made = self._checked = -1e9
        self._gone = False
        self._findings: list[dict[str, Any]] = []
        self.watch()

    def watch(self) -> None:
        """Read the counters once; a segment that took the place of the one looked at is attached in its stead."""
        with self._lock:
            if self._history:
                try:
                    self._follow()
                except (ShmCacheError, OSError, ValueError):  # what is mapped goes on being shown
                    self._gone = True
            self._history.append((time.monotonic(), self._view.stats()))

    def _follow(self) -> None:
        found = locate(self.target)
        self._gone = not (isinstance(found, Found) and found.header)
        if isinstance(found, Found) and found.header and found.header["uuid"] != self._view.header["uuid"]:
            fresh = View(found)
            self._view.close()
            self._view, self._checked = fresh, -1e9
            self._history.clear()

    def page(self) -> str:
        """The page as text, at most `refresh` seconds old."""
        with self._lock:
            now = time.monotonic()
            if now - self._made >= self.refresh:
                if now - self._checked >= CHECK_EVERY:
                    self._findings, self._checked = self._view.check(), now
                found = assemble(self._view, list(self._history), sample=self.sample, findings=self._findings)
                if self._gone and found.status == "ok":  # an outsider's rm marks nothing
                    found.status = "removed"
                    found.warnings = warnings(found)
                self._page, self._made = report_html.page(found), now
            return self._page

    def close(self) -> None:
        """Detach, once nobody makes a page."""
        with self._lock:
            self._view.close()


def _view(target: str) -> View:
    found = locate(target)
    if not isinstance(found, Found):
        raise ValueError(f"web: a segment or a copy of one wanted, an engine of scheme {found.scheme!r} found")
    return View(found)


class Server(ThreadingHTTPServer):
    """Serves one Live. `url` is what to open, the token in it.

    Args: port: 0 = any that is free. Raises: OSError where the port is taken.
    """

    daemon_threads = True

    def __init__(self, live: Live, port: int = 0) -> None:
        self.live, self.token = live, secrets.token_urlsafe(24)
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise OSError(f"port: one that is free wanted, {port} found: {error.strerror}") from error
        self.hosts = {f"{HOST}:{self.server_port}", f"localhost:{self.server_port}"}
        self.url = f"http://{HOST}:{self.server_port}/?token={self.token}"
        self._watch = time.monotonic() + 1

    def server_bind(self) -> None:
        """Bind without asking the resolver for a name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if threading.active_count() > MOST_THREADS:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Called by serve_forever after every poll."""
        if time.monotonic() >= self._watch:
            self.live.watch()
            self._watch = time.monotonic() + 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a browser that went away is no event."""


class Handler(BaseHTTPRequestHandler):
    """One request. Who has no token, or asks under another host name, learns nothing but 403."""

    server: Server
    server_version, sys_version, protocol_version = "shmcache", "", "HTTP/1.1"
    timeout = 10  # seconds a browser may take to send a request, or to say the next

    def _answer(self, status: HTTPStatus, body: str, kind: str = "text/plain", **extra: str) -> None:
        data = body.encode("utf-8", "backslashreplace")
        self.send_response(status)
        extra |= {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(data))}
        for name, value in (HEADERS | extra).items():
            self.send_header(name, value)
        if status != HTTPStatus.OK:  # what is left of a request that was refused is not read
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _allowed(self) -> bool:
        given = parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        named = self.headers.get_all("Host") or []
        return len(named) == 1 and named[0].lower() in self.server.hosts and secrets.compare_digest(
            given.encode(), self.server.token.encode()
        )  # fmt: skip

    def do_GET(self) -> None:
        if not self._allowed():
            self._answer(HTTPStatus.FORBIDDEN, "403: the URL that `shmcache web` printed wanted\n")
        elif urlsplit(self.path).path != "/":
            self._answer(HTTPStatus.NOT_FOUND, "404: there is one page, /\n")
        else:
            page = self.server.live.page()
            self._answer(HTTPStatus.OK, page, "text/html", Refresh=f"{self.server.live.refresh:g}")

    do_HEAD = do_GET

    def _refuse(self) -> None:
        if self._allowed():
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "405: GET or HEAD wanted\n", Allow="GET, HEAD")
        else:
            self._answer(HTTPStatus.FORBIDDEN, "403: the URL that `shmcache web` printed wanted\n")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """A request that is not HTTP, or of no known method: the number, and nothing of what was sent."""
        self._answer(HTTPStatus(code), f"{code}\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the URL holds the token."""


HEADERS: Final = {
    "Content-Security-Policy": report_html.POLICY + "; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Sent with every answer."""
