"""SIP messages (RFC 3261, 3581) and digest authentication (RFC 2617, 7616, 8760) for a registrar.

I1  `parse` raises ValueError for what is no SIP message; a damaged one has a `Message.fault`, for a 400.
I2  No header field is changed by parsing: a response copies the sender's text, unfolded.
I3  Every pattern takes time linear in the datagram's length.

Not here: TCP framing, multipart bodies, URIs other than sip: and sips:, qop=auth-int, userhash.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

Address = tuple[str, int]

COMPACT: Final = {
    "b": "referred-by", "c": "content-type", "e": "content-encoding", "f": "from", "i": "call-id",
    "k": "supported", "l": "content-length", "m": "contact", "o": "event", "r": "refer-to", "s": "subject",
    "t": "to", "u": "allow-events", "v": "via", "x": "session-expires",
}  # fmt: skip
"""RFC 3261 section 7.3.3 and the registry of header fields."""

REASONS: Final = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 407: "Proxy Authentication Required", 505: "Version Not Supported",
}  # fmt: skip

_QUOTED: Final = r'"(?:[^"\\]|\\.)*"'
_TOKEN: Final = r"[A-Za-z0-9.!%*_+`'~-]+"
_REQUEST: Final = re.compile(rf"({_TOKEN}) (\S+) SIP/(\d+\.\d+)", re.IGNORECASE)
_RESPONSE: Final = re.compile(r"SIP/2\.0 ([1-6]\d\d) ?(.*)", re.IGNORECASE)
_FIELD: Final = re.compile(rf"({_TOKEN})[ \t]*:(.*)", re.DOTALL)
_ADDRESS: Final = re.compile(rf"(?:(?:{_QUOTED}\s*|[^<\"]*)<([^<>]*)>|([^;<>\s]+))\s*(;.*)?", re.DOTALL)
_URI: Final = re.compile(
    r"(sips?):(?:([^@]*)@)?(\[[0-9A-Fa-f:.]+\]|[^:;?@\[\]\s]+)(?::([0-9]{1,5}))?(?:[;?].*)?", re.IGNORECASE
)
_VIA: Final = re.compile(
    r"SIP\s*/\s*2\.0\s*/\s*(\w+)\s+(\[[0-9A-Fa-f:.]+\]|[^\s:;]+)\s*(?::\s*([0-9]{1,5})\s*)?(;.*)?",
    re.IGNORECASE | re.DOTALL,
)
_PARAMETER: Final = re.compile(rf";\s*([^=;\s\"]+)\s*(?:=\s*({_QUOTED}|[^;\"]*))?")
_RPORT: Final = re.compile(r";\s*rport\s*(?==|;|$)(?:=[^;]*)?", re.IGNORECASE)
_AUTH: Final = re.compile(rf"\s*([A-Za-z0-9_-]+)\s*=\s*({_QUOTED}|[^\s,\"]+)\s*(?:,|$)")


def _unquote(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL) if text.startswith('"') else text


def quote(text: str) -> str:
    """A quoted-string of the grammar."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def parameters(text: str) -> dict[str, str]:
    """`;name=value;flag` as a dict, names in lower case, values unquoted, flags as "". Raises: ValueError."""
    found: dict[str, str] = {}
    position, text = 0, text.rstrip()
    while position < len(text):
        match = _PARAMETER.match(text, position)
        if match is None:
            raise ValueError(f"parameters: ;name=value wanted, {text[position : position + 40]!r} found")
        found.setdefault(match[1].lower(), _unquote((match[2] or "").strip()))
        position = match.end()
    return found


def split_list(value: str) -> list[str]:
    """The elements of a comma-separated field; commas in quotes and angle brackets separate nothing."""
    parts, start, quoted, angle, escaped = [], 0, False, False, False
    for position, char in enumerate(value):
        if quoted:
            quoted, escaped = escaped or char != '"', char == "\\" and not escaped
        elif char == '"':
            quoted = True
        elif char in "<>":
            angle = char == "<"
        elif char == "," and not angle:
            parts.append(value[start:position].strip())
            start = position + 1
    return [part for part in (*parts, value[start:].strip()) if part]


@dataclass(frozen=True, slots=True)
class Uri:
    """A sip: or sips: URI: user unescaped ("" if absent), host in lower case."""

    user: str
    host: str

    @classmethod
    def parse(cls, text: str) -> Uri:
        """Raises: ValueError for another scheme, a broken escape, or no host."""
        match = _URI.fullmatch(text)
        if match is None:
            raise ValueError(f"URI: sip:user@host wanted, {text[:80]!r} found")
        user = (match[2] or "").partition(":")[0]  # a password in a URI is part of no identity
        user = re.sub(
            r"(?:%[0-9A-Fa-f]{2})+", lambda run: bytes.fromhex(run[0].replace("%", "")).decode(), user
        )
        return cls(user, match[3].lower())


@dataclass(frozen=True, slots=True)
class NameAddress:
    """The value of From, To or Contact: URI and the field's parameters (`tag`)."""

    uri: str
    parameters: Mapping[str, str]

    @classmethod
    def parse(cls, value: str) -> NameAddress:
        """Raises: ValueError."""
        match = _ADDRESS.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"address: <uri>;parameters wanted, {value[:80]!r} found")
        return cls((match[1] if match[1] is not None else match[2]).strip(), parameters(match[3] or ""))


@dataclass(frozen=True, slots=True)
class Via:
    """One Via element: transport in upper case, sent-by host and port (None: the default), parameters."""

    text: str
    transport: str
    host: str
    port: int | None
    parameters: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> Via:
        """Raises: ValueError."""
        match = _VIA.fullmatch(text)
        if match is None:
            raise ValueError(f"Via: SIP/2.0/transport host wanted, {text[:80]!r} found")
        port = int(match[3]) if match[3] else None
        return cls(text, match[1].upper(), match[2], port, parameters(match[4] or ""))

    def received(self, source: Address) -> str:
        """The element in a response to `source`, with `received` (RFC 3261, 18.2.1), `rport` (RFC 3581)."""
        text = self.text
        if "rport" in self.parameters:
            text = _RPORT.sub(f";rport={source[1]}", text, count=1)
        elif self.host == source[0]:
            return text
        return f"{text};received={source[0]}"


@dataclass(frozen=True, slots=True)
class Message:
    """A request (status 0) or a response (method ""); header names in lower case, long form, as they came."""

    method: str
    uri: str
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    fault: str | None = None

    def all(self, name: str) -> list[str]:
        """Every value of a header field, unsplit."""
        return [value for found, value in self.headers if found == name]

    def get(self, name: str) -> str | None:
        """The first value of a header field."""
        return next((value for found, value in self.headers if found == name), None)

    def vias(self) -> list[Via]:
        """Every Via element, topmost first. Raises: ValueError."""
        return [Via.parse(text) for value in self.all("via") for text in split_list(value)]

    def reply(
        self, status: int, source: Address, tag: str, extra: Iterable[tuple[str, str]] = (), reason: str = ""
    ) -> bytes | None:
        """The response to this request (RFC 3261, 8.2.6; RFC 3581).

        Args: source: where the request came from. tag: for a To without one. extra: header fields after the
        copied ones. reason: in place of the usual phrase.
        Returns: None where the request lacks the fields a response copies.
        """
        copied = {name: self.get(name) for name in ("from", "to", "call-id", "cseq")}
        try:
            top, *others = self.vias()
            to_tag = "tag" in NameAddress.parse(copied["to"] or "").parameters
        except ValueError:
            return None
        if None in copied.values():
            return None
        lines = [f"SIP/2.0 {status} {reason or REASONS[status]}", f"Via: {top.received(source)}"]
        lines += [f"Via: {via.text}" for via in others]
        lines += [f"From: {copied['from']}", f"To: {copied['to']}" + ("" if to_tag else f";tag={tag}")]
        lines += [f"Call-ID: {copied['call-id']}", f"CSeq: {copied['cseq']}"]
        lines += [f"{name}: {value}" for name, value in extra]
        lines += ["Content-Length: 0", "", ""]
        return "\r\n".join(lines).encode("utf-8", "surrogateescape")

    def target(self, source: Address) -> Address:
        """Where the response to this request goes (RFC 3261, 18.2.2; RFC 3581). Raises: ValueError."""
        top = self.vias()[0]
        return source[0], source[1] if "rport" in top.parameters else top.port or 5060


def parse(datagram: bytes) -> Message:
    """Parse one datagram; see I1 for faults. Raises: ValueError for what is no SIP message."""
    head, separator, body = datagram.lstrip(b"\r\n").partition(b"\r\n\r\n")
    text = head.decode("utf-8", "surrogateescape")
    start, *lines = text.split("\r\n")
    if (request := _REQUEST.fullmatch(start)) is None and (response := _RESPONSE.fullmatch(start)) is None:
        raise ValueError(f"start line: METHOD uri SIP/2.0 wanted, {start[:80]!r} found")
    if re.search(r"[\r\n\0]", text.replace("\r\n", "")):
        raise ValueError("header: lines ended by CRLF wanted, a lone CR, LF or NUL found")
    fault = None if separator else "no empty line after the header"
    unfolded: list[list[str]] = []
    for line in lines:
        if line[:1] in (" ", "\t") and unfolded:
            unfolded[-1].append(line.strip())
        else:
            unfolded.append([line])
    headers = []
    for parts in unfolded:
        if match := _FIELD.fullmatch(" ".join(parts)):
            name = match[1].lower()
            headers.append((COMPACT.get(name, name), match[2].strip()))
        else:
            fault = fault or "header line without a name"
    if any("\udc80" <= char <= "\udcff" for char in text):
        fault = fault or "header is not UTF-8"
    length = next((value for name, value in headers if name == "content-length"), str(len(body)))
    if not re.fullmatch(r"[0-9]{1,9}", length) or int(length) > len(body):
        fault = fault or "Content-Length over the body's length"
    else:
        body = body[: int(length)]
    if request is None:
        assert response is not None
        return Message("", "", int(response[1]), tuple(headers), body, fault)
    if request[3] != "2.0":
        fault = fault or "version"
    message = Message(request[1], request[2], 0, tuple(headers), body, fault)
    return message if fault else Message(request[1], request[2], 0, tuple(headers), body, _missing(message))


def _missing(request: Message) -> str | None:
    for name in ("to", "from", "call-id", "cseq"):
        if len(request.all(name)) != 1:
            return f"{name}: 1 wanted, {len(request.all(name))} found"
    number, method = [*(request.get("cseq") or "").split(None, 1), "", ""][:2]
    if not re.fullmatch(r"[0-9]{1,10}", number) or int(number) >= 2**31 or method != request.method:
        return f"cseq: number and {request.method} wanted"
    try:
        if not request.vias():
            return "via: 1 wanted, 0 found"
        for name in ("to", "from"):
            NameAddress.parse(request.get(name) or "")
    except ValueError:
        return "via, to or from: not parsable"
    return None


# -- digest --------------------------------------------------------------------------------------------------


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


ALGORITHMS: Final[Mapping[str, Callable[[bytes], str]]] = {"SHA-256": _sha256, "MD5": _md5}
"""In the order a server offers them: most preferred first (RFC 8760, section 2.4)."""


def ha1(algorithm: str, user: str, realm: str, password: str) -> str:
    """H(user:realm:password) in lower-case hex: what a subscriber table stores in place of the password."""
    return ALGORITHMS[algorithm](f"{user}:{realm}:{password}".encode())


@dataclass(frozen=True, slots=True)
class Digest:
    """The fields of an Authorization or Proxy-Authorization value; `qop` "": the form of RFC 2069."""

    username: str
    realm: str
    nonce: str
    uri: str
    response: str = ""
    algorithm: str = "MD5"
    qop: str = "auth"
    nc: str = "00000001"
    cnonce: str = ""

    @classmethod
    def parse(cls, value: str) -> Digest:
        """Raises: ValueError for another scheme, algorithm or qop, a field missing or twice, a bad nc."""
        found = authentication(value)
        wanted = ("username", "realm", "nonce", "uri", "response")
        if missing := [name for name in wanted if name not in found]:
            raise ValueError(f"Digest: {', '.join(wanted)} wanted, {', '.join(missing)} not found")
        algorithm, qop = found.get("algorithm", "MD5").upper(), found.get("qop", "").lower()
        if algorithm not in ALGORITHMS:
            raise ValueError(
                f"Digest algorithm: one of {', '.join(ALGORITHMS)} wanted, {algorithm[:20]!r} found"
            )
        nc, cnonce = found.get("nc", ""), found.get("cnonce", "")
        if qop not in ("", "auth") or (qop and not (re.fullmatch("[0-9A-Fa-f]{8}", nc) and cnonce)):
            raise ValueError(
                f"Digest qop, nc, cnonce: auth, 8 hex digits, text wanted, {qop[:20]!r}, {nc[:20]!r} found"
            )
        username, realm, nonce, uri, response = (found[name] for name in wanted)
        return cls(username, realm, nonce, uri, response, algorithm, qop, nc, cnonce)

    def expected(self, hashed: str, method: str) -> str:
        """The response that proves knowledge of `hashed`, the HA1 of this algorithm (RFC 7616, 3.4.1)."""
        digest = ALGORITHMS[self.algorithm]
        ha2 = digest(f"{method}:{self.uri}".encode("utf-8", "surrogateescape"))
        middle = f"{self.nc}:{self.cnonce}:{self.qop}:" if self.qop else ""
        return digest(f"{hashed}:{self.nonce}:{middle}{ha2}".encode("utf-8", "surrogateescape"))

    def matches(self, hashed: str, method: str) -> bool:
        """Whether `response` is the expected one; the time taken does not depend on where they differ."""
        return hmac.compare_digest(
            self.expected(hashed, method).encode(), self.response.lower().encode("utf-8", "replace")
        )

    def signed(self, hashed: str, method: str) -> Digest:
        """The same with its `response`: what a client sends."""
        return replace(self, response=self.expected(hashed, method))

    def header(self) -> str:
        """The header field's value."""
        quoted = [
            f"{name}={quote(getattr(self, name))}"
            for name in ("username", "realm", "nonce", "uri", "response")
        ]
        plain = [f"algorithm={self.algorithm}"]
        plain += [f"qop={self.qop}", f"nc={self.nc}", f"cnonce={quote(self.cnonce)}"] if self.qop else []
        return "Digest " + ", ".join(quoted + plain)


def authentication(value: str) -> dict[str, str]:
    """The fields of a `Digest` header value, names in lower case, values unquoted. Raises: ValueError."""
    scheme, _, rest = value.strip().partition(" ")
    if scheme.lower() != "digest":
        raise ValueError(f"authentication scheme: Digest wanted, {scheme[:20]!r} found")
    found: dict[str, str] = {}
    position, rest = 0, rest.strip()
    while position < len(rest):
        match = _AUTH.match(rest, position)
        if match is None or match[1].lower() in found:
            raise ValueError(f"Digest: name=value once each wanted, {rest[position : position + 40]!r} found")
        found[match[1].lower()] = _unquote(match[2])
        position = match.end()
    return found


def challenge(realm: str, nonce: str, algorithm: str, stale: bool = False) -> str:
    """The value of a WWW-Authenticate or Proxy-Authenticate header field."""
    value = f'Digest realm={quote(realm)}, nonce="{nonce}", algorithm={algorithm}, qop="auth"'
    return value + ", stale=true" if stale else value


class NonceState(enum.Enum):
    """What a server knows about a nonce."""

    GOOD = enum.auto()
    STALE = enum.auto()  #: ours, but too old: the client may sign again without asking for the password
    FORGED = enum.auto()  #: not made with our key


class Nonces:
    """Nonces that carry their own proof: time and 64 random bits, signed by HMAC-SHA-256 cut to 128 bits.

    Any process with the key can judge any nonce. Nothing is stored: a nonce count used twice goes unnoticed,
    and the lifetime bounds the replay (RFC 7616, 5.5).
    Args: key: the secret, 32 bytes. lifetime_s: seconds until a nonce is stale. Times: Unix times in seconds.
    """

    def __init__(self, key: bytes, lifetime_s: float) -> None:
        self._key = key
        self._lifetime_ms = int(lifetime_s * 1000)

    def make(self, now: float) -> str:
        body = struct.pack(">Q", int(now * 1000)) + os.urandom(8)
        return (body + self._sign(body)).hex()

    def judge(self, nonce: str, now: float) -> NonceState:
        if not re.fullmatch("[0-9a-f]{64}", nonce):
            return NonceState.FORGED
        raw = bytes.fromhex(nonce)
        if not hmac.compare_digest(self._sign(raw[:16]), raw[16:]):
            return NonceState.FORGED
        age = int(now * 1000) - int(struct.unpack_from(">Q", raw)[0])
        return NonceState.GOOD if 0 <= age < self._lifetime_ms else NonceState.STALE

    def _sign(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, "sha256")[:16]
