"""Bytes to and from one memcached connection: deadlines, and answers cut out of the stream.

I1  All that is sent and received for one question ends at one moment, however slowly it trickles. Where that
    moment passed while this process did not run, LAST_LOOK more is left for what has come meanwhile.
I2  Exactly the answers to the questions are read; a byte more or less, or one that is no answer, is BadAnswer,
    and the stream is of no use any more.

No driver is imported here; what connects and closes is memcached.Link.
"""

from __future__ import annotations

import math
import re
import select
import socket
import time
from typing import Final

from .memcached_wire import Reply

__all__ = ["LAST_LOOK", "BadAnswer", "Stream"]

LINE: Final = 2048
"""Bytes of a line without an end that are taken for garbage; the longest one of memcached's has 800."""
RECEIVE: Final = 65_536
LAST_LOOK: Final = 0.05
"""Seconds, once per question, for who finds the time over before waiting: a process that was stopped, or not
scheduled, would otherwise take a server that answered in time for one that did not."""

_ANSWER = re.compile(rb"(?:HD|EN|NF|NS|EX|MN|VA ([0-9]{1,10}))(?: [a-zA-Z](?:-?[0-9]{1,20})?)*")
_ERRORS = {b"SERVER_ERROR": b"SE", b"CLIENT_ERROR": b"CE", b"ERROR": b"ER"}


class BadAnswer(ConnectionError):
    """The server's bytes are no answer to what it was asked, or ended in the middle."""


class Stream:
    """A connected socket whose calls end at `end`, a moment of time.monotonic(). Has what pymemcache's Client
    asks of a socket."""

    def __init__(self, plain: socket.socket) -> None:
        self._plain = plain
        self.end = math.inf
        self.patience = math.inf
        """Seconds without a byte after which a call ends, before `end`."""
        self.looked = False
        """LAST_LOOK was used up for this question."""
        self.tainted = False
        """An error line came: the connection is not to be used for another question."""
        plain.setblocking(False)
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(plain, select.POLLIN)
        self._writable.register(plain, select.POLLOUT)

    def _wait(self, poll: select.poll) -> None:
        now = time.monotonic()
        if self.end <= now and not self.looked:
            self.looked, self.end = True, now + LAST_LOOK
        left = min(self.end - now, self.patience)
        wait = None if left == math.inf else math.ceil(left * 1000)
        if left <= 0 or not (poll.poll(wait) or poll.poll(0)):  # a signal's handler may have outlasted the first
            raise TimeoutError("timed out")

    def sendall(self, data: bytes) -> None:
        sent = 0
        while sent < len(data):
            try:
                sent += self._plain.send(memoryview(data)[sent:] if sent else data)
            except BlockingIOError:
                self._wait(self._writable)

    def recv(self, size: int) -> bytes:
        while True:
            self._wait(self._readable)
            try:
                return self._plain.recv(size)
            except BlockingIOError:  # woken for nothing
                continue

    def close(self) -> None:
        self._plain.close()

    def quiet(self) -> bool:
        """Whether nothing came unasked, the end neither."""
        return not self._readable.poll(0)

    def _more(self) -> bytes:
        data = self.recv(RECEIVE)
        if not data:
            raise BadAnswer("the rest of the answer wanted, the end of the connection found")
        return data

    def exchange(self, requests: bytes, count: int) -> list[Reply]:
        """Send meta commands and read their answers, one each; an error line is one."""
        self.sendall(requests)
        replies: list[Reply] = []
        buffer, at = b"", 0
        while len(replies) < count:
            end = buffer.find(b"\r\n", at)
            if end < 0:
                if len(buffer) - at > LINE:
                    raise BadAnswer(f"a line of {LINE} bytes at most wanted, a longer one found")
                buffer, at = buffer[at:] + self._more(), 0
                continue
            line, at = buffer[at:end], end + 2
            answer = _ANSWER.fullmatch(line)
            if answer is None:
                replies.append(self._error(line))
                continue
            words = line.split(b" ")
            if answer[1] is None:
                replies.append(Reply(words[0], words[1:]))
                continue
            size = int(answer[1]) + 2
            if len(buffer) - at < size:
                buffer, at = self._fill(buffer[at:], size), 0
            if buffer[at + size - 2 : at + size] != b"\r\n":
                raise BadAnswer("an end of line after the value wanted, other bytes found")
            replies.append(Reply(words[0], words[2:], buffer[at : at + size - 2]))
            at += size
        if at != len(buffer):
            raise BadAnswer(f"{count} answers wanted, {len(buffer) - at} bytes more found")
        return replies

    def _error(self, line: bytes) -> Reply:
        word, _, text = line.partition(b" ")
        code = _ERRORS.get(word)
        if code is None:
            raise BadAnswer(f"an answer of memcached wanted, {line[:32]!r} found")
        self.tainted = True
        return Reply(code, [text])

    def _fill(self, start: bytes, size: int) -> bytes:
        parts, length = [start], len(start)
        while length < size:
            parts.append(self._more())
            length += len(parts[-1])
        return b"".join(parts)

    def lines(self, command: bytes, last: bytes = b"MN") -> list[bytes]:
        """The lines of the answer to any command without data, before the line `last`. MN answers a no-op that
        is sent after the command. With another `last`, the lines before it start with `key=`; an error line, or
        BUSY, ends the answer as well and is in it."""
        self.sendall(command + (b"\r\nmn\r\n" if last == b"MN" else b"\r\n"))
        lines: list[bytes] = []
        rest = b""
        while not lines or lines[-1] != last:
            *more, rest = (rest + self._more()).split(b"\n")
            lines += [line.removesuffix(b"\r") for line in more]
            if last != b"MN" and lines and not lines[-1].startswith(b"key=") and lines[-1] != last:
                if lines[-1].split(b" ")[0] not in (*_ERRORS, b"BUSY"):
                    raise BadAnswer(f"a list of keys wanted, {lines[-1][:32]!r} found")
                self.tainted = True
                return lines
        if rest:
            raise BadAnswer(f"the end after {last!r} wanted, {len(rest)} bytes more found")
        return lines[:-1]
