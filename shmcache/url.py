"""Engine URLs and the options in them:
`scheme[:group]://[user[:password]@]host[:port][,...]/[name-or-database][?options]`.

I1  Parsing touches nothing outside its arguments: no file, no name resolution, no import of an engine.
I2  A password is in `Url.password` and `Url.unmasked()` only: never in str, repr, or an error message.
I3  Absent and empty differ: no user is None, `:pwd@` has the user "".

The authority ends at the first `/` or `?` outside brackets; the last `@` in it ends the password, the first
`:` before that starts it. So `,` `@` `:` `#` may stand in a password as they are, while `/` and `?` are
written %2F and %3F. Unix sockets: `%2Frun%2Fa.sock` or `[/run/a.sock]` as a host, or `scheme:///run/a.sock`
(see `Url.unix_path`). There are no fragments, and `+` is a plus sign. Source: the URL tests of OpenSIPS
(cachedb), whose answers these are, apart from typed errors and %-escapes.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from urllib.parse import quote, unquote

__all__ = ["MAX_TTL", "Host", "Parser", "Url", "parse_options"]

MAX_TTL = 315_576_000.0
"""Ten years of 365.25 days in seconds: the longest lifetime. More is taken for a Unix time passed by
mistake."""

NAMED_SCHEMES = frozenset({"posix", "sysv"})
"""Schemes whose segment name stands in for a missing group in the engine_id."""

MAX_NAME = 200
"""Bytes of a segment name: NAME_MAX (255) less `shmcache.` and the suffix of a segment under construction."""

_HEAD = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)(:[^/?@,]*)?://(.*)", re.DOTALL)
_SIZE = re.compile(r"([0-9]+)\s*(?:([KMGT])(?:i?B)?|B)?", re.IGNORECASE)
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_BOOLEANS = {
    "yes": True,
    "true": True,
    "on": True,
    "1": True,
    "no": False,
    "false": False,
    "off": False,
    "0": False,
}

Parser = Callable[[str, Any], Any]
"""(field, value as written: str from a URL, anything from a keyword) -> typed value; ValueError or TypeError
naming the field."""


@dataclass(frozen=True, slots=True)
class Host:
    """One server: host name, address or socket path (starts with `/`), and port (None: the engine's
    default)."""

    name: str
    port: int | None = None

    @property
    def is_unix(self) -> bool:
        return self.name.startswith("/")

    def __str__(self) -> str:
        name = quote(self.name, safe="/:")
        name = f"[{name}]" if ":" in name or self.is_unix else name
        return name if self.port is None else f"{name}:{self.port}"


@dataclass(frozen=True, slots=True, repr=False)
class Url:
    """A parsed engine URL. Equal URLs name the same engine; `parse` is the usual way to get one.

    `path` is what follows the slash after the hosts, unescaped and without that slash: a segment name or a
    database. `options` holds the options as written (unescaped text); `parse_options` types them.
    """

    scheme: str
    group: str | None = None
    user: str | None = None
    password: str | None = None
    hosts: tuple[Host, ...] = ()
    path: str = ""
    options: Mapping[str, str] = field(default_factory=dict, hash=False)

    @classmethod
    def parse(cls, text: str) -> Url:
        """Parse a URL.

        Raises: TypeError for something else than str; ValueError naming the wrong part. Nothing is touched.
        """
        if not isinstance(text, str):
            raise TypeError(f"url: str wanted, {type(text).__name__} found")
        head = _HEAD.fullmatch(text)
        if head is None:
            raise ValueError(
                f"url: scheme[:group]://... wanted, {_public(text.split('://')[0])!r} found"
                " (an engine_id goes to shmcache.engine())"
            )
        scheme, group, rest = head[1].lower(), head[2], head[3]
        where = f"{scheme}{group or ''}://..."
        if any(ord(c) < 32 or ord(c) == 127 for c in text):
            raise ValueError(f"url {where}: printable characters wanted, a control character or NUL found")
        if group is not None:
            group = _unescape(where, "group", group[1:])
            if not group or ":" in group or "/" in group or not group.isprintable():
                raise ValueError(f"url {where}: group without ':' and '/' wanted, {group!r} found")
        end = _authority_end(rest, where)
        authority, tail = rest[:end], rest[end:]
        path, mark, query = tail.partition("?")
        path = _unescape(where, "name", path[1:])
        userinfo, at, servers = authority.rpartition("@")
        user = password = None
        if at:
            user, colon, secret = userinfo.partition(":")
            user = _unescape(where, "user", user)
            password = _unescape(where, "password", secret) if colon else None
            if not servers and not path:
                raise ValueError(f"url {where}: a host after '@' wanted, none found")
        hosts = tuple(_parse_host(where, part) for part in _split_hosts(servers)) if servers else ()
        return cls(scheme, group, user, password, hosts, path, _parse_query(where, query) if mark else {})

    @property
    def engine_id(self) -> str:
        """`scheme:group`, or `scheme`; the segment's name stands in for a missing group of posix and sysv."""
        group = self.group
        if group is None and self.scheme in NAMED_SCHEMES:
            group = self.path or None
        return self.scheme if group is None else f"{self.scheme}:{group}"

    @property
    def unix_path(self) -> str | None:
        """The socket path of `scheme:///run/a.sock` (no hosts, a path), else None. For schemes without a
        database there."""
        return None if self.hosts or not self.path else "/" + self.path

    def segment_name(self) -> str:
        """The path as the name of a shared-memory segment.

        Raises: ValueError for a host (`posix://name` lacks a slash), user or password, for an empty name,
        `.`, `..`, one with a slash, NUL or control character, and one over 200 bytes.
        """
        name = self.path
        if self.hosts or self.user is not None:
            raise ValueError(
                f"url {self.scheme}: no host wanted, {', '.join(map(str, self.hosts))!r} found"
                f" (a segment is {self.scheme}:///name, with three slashes)"
            )
        if not name or name in (".", ".."):
            raise ValueError(f"segment name: {self.scheme}:///name wanted, {name!r} found")
        bad = next((c for c in name if c == "/" or not c.isprintable()), None)
        if bad is not None:
            raise ValueError(
                f"segment name: no slash, NUL or control character wanted, {bad!r} found in {name!r}"
            )
        if (length := len(name.encode())) > MAX_NAME:
            raise ValueError(f"segment name: 1 to {MAX_NAME} bytes wanted, {length} found")
        return name

    def without_options(self) -> Url:
        return replace(self, options={})

    def unmasked(self) -> str:
        """The URL as text with the password in it, parsing to an equal Url. For drivers, not for logs."""
        return self._text(
            None if self.password is None else quote(self.password, safe=",:~!$'()*;="), mask=False
        )

    def __str__(self) -> str:
        return self._text(None if self.password is None else "***", mask=True)

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    def _text(self, password: str | None, mask: bool) -> str:
        group = "" if self.group is None else ":" + quote(self.group, safe=" !$&'()*+;=")
        user = "" if self.user is None else quote(self.user, safe="")
        info = "" if self.user is None else user + ("" if password is None else ":" + password) + "@"
        path = quote(self.path, safe="/:@,+=&;!$'()*")
        text = f"{self.scheme}{group}://{info}{','.join(map(str, self.hosts))}"
        if path or self.options:
            text += "/" + path
        pairs = []
        for name, value in self.options.items():
            if mask:
                value = "***" if "password" in name else _public(value)
            pairs.append(f"{quote(name, safe='')}={quote(value, safe='/:@,+?=*[]')}")
        return text + ("?" + "&".join(pairs) if pairs else "")


def _public(text: str) -> str:
    """`text` with everything between `://` and its last `@` hidden: for messages about what may hold a
    password."""
    return re.sub(r"(?s)(://|^).*@", r"\1***@", text)


def _unescape(where: str, name: str, text: str) -> str:
    try:
        plain = unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError(f"url {where}: {name} with %-escapes of UTF-8 wanted, other bytes found") from None
    if "\0" in plain:
        raise ValueError(f"url {where}: {name} without NUL wanted, %00 found")
    return plain


def _authority_end(rest: str, where: str) -> int:
    """Where the authority ends: the first '/' or '?' outside a bracketed host (one at the start, or after '@'
    or ',')."""
    i = 0
    while i < len(rest) and rest[i] not in "/?":
        if rest[i] == "[" and (i == 0 or rest[i - 1] in "@,"):
            close = rest.find("]", i)
            if close < 0:
                raise ValueError(f"url {where}: ']' after '[' wanted, none found")
            i = close
        i += 1
    return i


def _split_hosts(servers: str) -> list[str]:
    return re.split(r",(?![^\[]*\])", servers)  # at commas that no closing bracket follows


def _parse_host(where: str, text: str) -> Host:
    bracket = re.fullmatch(r"\[([^\]]*)\](?::(.*))?", text)
    port: str | None
    if bracket:
        name, port = _unescape(where, "host", bracket[1]), bracket[2]
        if not name.startswith("/"):
            try:
                ipaddress.IPv6Address(name)
            except ValueError:
                raise ValueError(
                    f"url {where}: IPv6 address or /socket in brackets wanted, {name!r} found"
                ) from None
    else:
        name, colon, port_text = text.partition(":")
        port = port_text if colon else None
        name = _unescape(where, "host", name)
        if port is not None and ":" in port:
            raise ValueError(
                f"url {where}: host[:port] wanted, several ':' found (an IPv6 address stands in brackets)"
            )
        if not name or not name.isprintable() or re.search(r"[\s\[\]@]", name):
            raise ValueError(f"url {where}: host[:port] wanted, {name!r} found as host")
    if port is None:
        return Host(name)
    if name.startswith("/"):
        raise ValueError(f"url {where}: no port after a socket path wanted, one found")
    if not re.fullmatch(r"[0-9]{1,5}", port):
        # The text is not shown: in `scheme://user:secret`, with the host forgotten, it is the password.
        raise ValueError(
            f"url {where}: port 1 to 65535 wanted, {len(port)} characters found that are none"
            " ('/' and '?' in a password are written %2F and %3F)"
        )
    if not 1 <= int(port) <= 65535:
        raise ValueError(f"url {where}: port 1 to 65535 wanted, {int(port)} found")
    return Host(name, int(port))


def _parse_query(where: str, query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for pair in filter(None, query.split("&")):
        name, equals, value = pair.partition("=")
        name, value = _unescape(where, "option", name), _unescape(where, "option", value)
        if not name or not equals:
            raise ValueError(f"url {where}: option name=value wanted, {_public(name)!r} found")
        if options.setdefault(name, value) != value:
            raise ValueError(f"url {where}: one value of option {name!r} wanted, two different ones found")
    return options


def parse_options(
    scheme: str, table: Mapping[str, Parser], written: Mapping[str, str], keywords: Mapping[str, Any]
) -> dict[str, Any]:
    """Type the options of one engine.

    Args: table: option name -> parser, as in `Engine.OPTIONS`. written: `Url.options`. keywords: options
    given as keywords, of any type the parser takes; None means not given.
    Returns: the options that were given, typed.
    Raises: ValueError for an unknown option (the message lists the known ones), a bad value, or a keyword
    that differs from the option in the URL; TypeError for a keyword of a wrong type.
    """
    parsed: dict[str, Any] = {}
    for source in (written, keywords):
        for name, value in source.items():
            if value is None:
                continue
            parser = table.get(name)
            if parser is None:
                known = ", ".join(sorted(table)) or "none"
                raise ValueError(f"option {name!r} of scheme {scheme!r} is unknown; known are: {known}")
            if source is written and getattr(parser, "keyword_only", False):
                raise ValueError(
                    f"option {name!r}: an object as keyword argument wanted, text in the URL found"
                )
            typed = parser(name, value)
            if name in parsed and parsed[name] != typed:
                raise ValueError(
                    f"option {name!r}: one value wanted,"
                    f" {parsed[name]!r} in the URL and {typed!r} as keyword found"
                )
            parsed[name] = typed
    return parsed


def text(name: str, value: Any) -> str:
    """A string as it is."""
    if not isinstance(value, str):
        raise TypeError(f"option {name!r}: str wanted, {type(value).__name__} found")
    return value


def size(minimum: int = 0, maximum: int = 2**63 - 1) -> Parser:
    """Bytes or a count: int, or text of digits with K, M, G, T for powers of 1024 (`256M`, `64KiB`,
    `65536`)."""

    def parse(name: str, value: Any) -> int:
        if isinstance(value, str):
            match = _SIZE.fullmatch(value.strip())
            if match is None or len(match[1]) > 20:
                raise ValueError(f"option {name!r}: digits with K, M, G or T wanted, {value[:40]!r} found")
            value = int(match[1]) << _UNITS[(match[2] or "").upper()]
        number = _integer(name, value)
        if not minimum <= number <= maximum:
            raise ValueError(f"option {name!r}: {minimum} to {maximum} wanted, {number} found")
        return number

    return parse


def integer(minimum: int | None = None, maximum: int | None = None) -> Parser:
    """A decimal int within bounds (both included)."""

    def parse(name: str, value: Any) -> int:
        if isinstance(value, str):
            if not re.fullmatch(r"[+-]?[0-9]{1,20}", value.strip()):
                raise ValueError(f"option {name!r}: a decimal number wanted, {value[:40]!r} found")
            value = int(value)
        number = _integer(name, value)
        if (minimum is not None and number < minimum) or (maximum is not None and number > maximum):
            raise ValueError(f"option {name!r}: {minimum} to {maximum} wanted, {number} found")
        return number

    return parse


def seconds(minimum: float = 0.0, maximum: float = MAX_TTL) -> Parser:
    """Seconds as int, float, timedelta or decimal text, within bounds (both included); never NaN."""

    def parse(name: str, value: Any) -> float:
        if isinstance(value, timedelta):
            value = value.total_seconds()
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError(f"option {name!r}: seconds as a number wanted, {type(value).__name__} found")
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise ValueError(
                f"option {name!r}: seconds as a number wanted, {str(value)[:40]!r} found"
            ) from None
        if math.isnan(number) or not minimum <= number <= maximum:
            raise ValueError(f"option {name!r}: {minimum:g} to {maximum:g} seconds wanted, {number!r} found")
        return number

    return parse


def boolean(name: str, value: Any) -> bool:
    """yes/no, true/false, on/off, 1/0 in any case, or a bool."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, (str, int)):
        raise TypeError(f"option {name!r}: bool wanted, {type(value).__name__} found")
    known = _BOOLEANS.get(str(value).strip().lower())
    if known is None:
        raise ValueError(f"option {name!r}: yes or no wanted, {str(value)[:40]!r} found")
    return known


def choice(*known: str) -> Parser:
    """One of the given words."""

    def parse(name: str, value: Any) -> str:
        word = text(name, value)
        if word not in known:
            raise ValueError(f"option {name!r}: one of {', '.join(known)} wanted, {word[:40]!r} found")
        return word

    return parse


def permissions(name: str, value: Any) -> int:
    """File permissions: octal text (`0600`, `0o600`) or an int, 0 to 0o777."""
    if isinstance(value, str):
        if not re.fullmatch(r"(?:0o?)?[0-7]{1,4}", value):
            raise ValueError(f"option {name!r}: octal digits wanted, {value[:40]!r} found")
        value = int(value.removeprefix("0o"), 8)
    number = _integer(name, value)
    if not 0 <= number <= 0o777:
        raise ValueError(f"option {name!r}: 0 to 0777 wanted, 0{number:o} found")
    return number


def words(name: str, value: Any) -> tuple[str, ...]:
    """Comma-separated text, or an iterable of str and int, as a tuple of str."""
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else list(value)
    return tuple(text(name, str(part) if isinstance(part, int) else part).strip() for part in parts)


def keyword_only(parser: Parser) -> Parser:
    """`parser` for an option that is an object (a callable, a codec): refused in a URL."""

    def parse(name: str, value: Any) -> Any:
        return parser(name, value)

    parse.keyword_only = True  # type: ignore[attr-defined]
    return parse


def function(name: str, value: Any) -> Callable[..., Any]:
    """A callable."""
    if not callable(value):
        raise TypeError(f"option {name!r}: a callable wanted, {type(value).__name__} found")
    return value  # type: ignore[no-any-return]


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"option {name!r}: int wanted, {type(value).__name__} found")
    return value
