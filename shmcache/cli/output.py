"""What the commands print and how they end: escaping, tables, JSON lines, exit codes.

I1  Data goes to stdout, messages to stderr. No byte of a key or value reaches the terminal unescaped: control characters, and
    bytes that are no UTF-8, are written as escapes that `unescape` reads back.
I2  Rows are printed as they come; memory is that of one screenful, whatever their number.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import enum
import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from ..errors import (
    CounterOverflow,
    EngineDown,
    GuardLost,
    LayoutMismatch,
    LockTimeout,
    NoSpace,
    NotANumber,
    NotSupported,
    SegmentInvalid,
    SegmentNotOurs,
    ShmCacheError,
    TooManyWorkers,
    ValueTooLarge,
)
from ..snapshot import SnapshotDamaged

CHUNK: Final = 200
"""Rows of a table laid out at once: a screenful or two; column widths only grow from one to the next."""


class Code(enum.IntEnum):
    """Exit codes; their text is part of --help."""

    OK = 0
    ABSENT = 1
    USAGE = 2
    NO_SEGMENT = 3
    REFUSED = 4
    DAMAGED = 5
    TIMEOUT = 6
    NO_ROOM = 7
    GONE = 8
    OTHER = 9
    INTERRUPTED = 130
    PIPE = 141


EXIT_CODES: Final = {
    Code.OK: "done, or yes",
    Code.ABSENT: "absent, not stored, or nothing to do",
    Code.USAGE: "wrong command, option or argument",
    Code.NO_SEGMENT: "no such segment or file",
    Code.REFUSED: "refused: another user's segment, no permission, not a number, or not supported by the engine",
    Code.DAMAGED: "damaged, of another layout or geometry, a damaged snapshot, or findings of check",
    Code.TIMEOUT: "timeout: a guard's holder did not let go (`shmcache guards` says who)",
    Code.NO_ROOM: "no room: no space, value too large, or too many workers",
    Code.GONE: "gone: server down, or segment removed meanwhile",
    Code.OTHER: "any other error",
    Code.INTERRUPTED: "interrupted",
    Code.PIPE: "the reader of the output went away",
}

_ERRORS: Final[tuple[tuple[type[BaseException], Code], ...]] = (
    (FileNotFoundError, Code.NO_SEGMENT),
    (IsADirectoryError, Code.USAGE),
    (NotADirectoryError, Code.USAGE),
    (PermissionError, Code.REFUSED),
    (SegmentNotOurs, Code.REFUSED),
    (NotSupported, Code.REFUSED),
    (NotANumber, Code.REFUSED),
    (CounterOverflow, Code.REFUSED),
    (SegmentInvalid, Code.DAMAGED),
    (LayoutMismatch, Code.DAMAGED),
    (SnapshotDamaged, Code.DAMAGED),
    (LockTimeout, Code.TIMEOUT),
    (NoSpace, Code.NO_ROOM),
    (ValueTooLarge, Code.NO_ROOM),
    (TooManyWorkers, Code.NO_ROOM),
    (EngineDown, Code.GONE),
    (GuardLost, Code.GONE),
    (ValueError, Code.USAGE),
    (TypeError, Code.USAGE),
    (ShmCacheError, Code.OTHER),
    (OSError, Code.OTHER),
)
EXPECTED: Final = tuple(kind for kind, _ in _ERRORS)


def code_of(error: BaseException) -> Code:
    """The exit code an exception ends with."""
    return next((code for kind, code in _ERRORS if isinstance(error, kind)), Code.OTHER)


class Format(enum.StrEnum):
    TABLE = "table"
    TSV = "tsv"
    JSON = "json"
    CSV = "csv"
    MSGPACK = "msgpack"


# -- text ----------------------------------------------------------------------------------------------------------------------


class Escaped(str):
    """Text that `escape` has been through; printing leaves it as it is."""

    __slots__ = ()


def escape(value: str | bytes) -> str:
    r"""Printable text: control and other unprintable characters as \xNN, \uNNNN or \UNNNNNNNN, backslash as \\.

    Bytes that are valid UTF-8 are shown as that text, others byte by byte, so that \xNN always stands for one byte.
    """
    if isinstance(value, Escaped):
        return value
    if isinstance(value, bytes):
        data = value
        try:
            value = data.decode()
        except UnicodeDecodeError:
            return "".join(r"\\" if b == 92 else chr(b) if 32 <= b < 127 else f"\\x{b:02x}" for b in data)
    if value.isprintable() and "\\" not in value:
        return value
    return "".join(map(_escaped, value))


def _escaped(c: str) -> str:
    if c == "\\":
        return r"\\"
    if c.isprintable():
        return c
    n = ord(c)
    return f"\\x{n:02x}" if n < 128 else f"\\u{n:04x}" if n < 0x10000 else f"\\U{n:08x}"


_ESCAPES = re.compile(rb"\\(\\|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.|$)", re.DOTALL)


def unescape(text: str) -> bytes:
    r"""What `escape` wrote, as bytes. ValueError for a backslash that begins none of its escapes."""

    def one(match: re.Match[bytes]) -> bytes:
        found = match[1]
        if found == b"\\":
            return found
        if len(found) < 3:
            raise ValueError(rf"escape: \\, \xNN, \uNNNN or \UNNNNNNNN wanted, {match[0].decode('utf-8', 'replace')!r} found")
        number = int(found[1:], 16)
        return bytes([number]) if found[:1] == b"x" else chr(number).encode()

    return _ESCAPES.sub(one, os.fsencode(text))


def shown(value: Any) -> Escaped:
    """A stored value as one line of text: str and bytes escaped, the rest as Python writes it."""
    return Escaped(escape(value if isinstance(value, (str, bytes)) else repr(value)))


def json_value(value: Any) -> Any:
    """`value` as JSON can say it: bytes as {"base64": ...}, NaN and infinities as text, what has no form as its repr."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, (bytes, bytearray)):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        return {k if isinstance(k, str) else shown(k): json_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [json_value(v) for v in value]
    return repr(value)


def json_key(key: str | bytes) -> dict[str, Any]:
    """The fields that name a key: `key` as text, and `key_base64` where it is no UTF-8."""
    if isinstance(key, str):
        return {"key": key}
    return {"key": escape(key), "key_base64": base64.b64encode(key).decode()}


def human_bytes(n: Any) -> str:
    if n is None:
        return "-"
    size = float(n)
    for unit in ("", "K", "M", "G"):
        if abs(size) < 1024:
            return f"{size:.0f}" if not unit else f"{size:.1f}{unit}"
        size /= 1024
    return f"{size:.1f}T"


def human_seconds(s: Any) -> str:
    if s is None:
        return "never"
    if s < 0:
        return "-" + human_seconds(-s)
    if s < 60:
        return f"{s:.1f}s" if s != int(s) else f"{int(s)}s"
    minutes, seconds = divmod(int(s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def human_time(t: Any) -> str:
    return "-" if t is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t))


def human_share(x: Any) -> str:
    return "-" if x is None else f"{100 * x:.1f}%"


def human_plain(x: Any) -> str:
    if x is None or x == "":
        return "-"
    if isinstance(x, bool):
        return "yes" if x else "no"
    return escape(x) if isinstance(x, (str, bytes)) else str(x)


def plain(x: Any) -> str:
    """A field of TSV or CSV: raw numbers, None empty, text escaped."""
    kind = type(x)
    if kind is int:
        return str(x)
    if kind is str:
        return x if x.isprintable() and "\\" not in x else escape(x)
    if x is None:
        return ""
    if kind is float:
        return f"{x:.3f}".rstrip("0").rstrip(".") if math.isfinite(x) else repr(x)
    if kind is bool:
        return "yes" if x else "no"
    return escape(x) if isinstance(x, (str, bytes)) else str(x)


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its name, how a terminal shows it, whether it stands to the right, its style.

    A terminal too narrow for all leaves out columns with `drop`, the highest first.
    """

    name: str
    human: Callable[[Any], str] = human_plain
    right: bool = False
    style: Callable[[Any], str] | None = None
    drop: int = 0


# -- printing ------------------------------------------------------------------------------------------------------------------


class Output:
    """Prints rows and records in one format; table on a terminal and TSV elsewhere unless told."""

    def __init__(self, fmt: Format | None = None, *, header: bool = True) -> None:
        self.terminal = sys.stdout.isatty()
        self.format = fmt or (Format.TABLE if self.terminal else Format.TSV)
        self.header = header
        self.chunk, self.least = CHUNK, 0
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")

    def rows(self, columns: list[Column], rows: Iterable[tuple[Any, ...]], *, live: bool = False) -> int:
        """Print rows as they come; how many. A key in the first column is `key` for JSON.

        Args: live: each row is to be seen before the next is asked for, also by who reads a pipe.
        """
        counter = _Counter(_flushed(rows) if live else rows)
        self.chunk, self.least = (1, 5) if live else (CHUNK, 0)
        getattr(self, f"_{self.format.value}")(columns, counter)
        return counter.n

    def record(self, pairs: Mapping[str, Any], human: Mapping[str, Callable[[Any], str]] | None = None) -> None:
        """Print one record: a JSON object, or a line for each field."""
        if self.format is Format.JSON:
            self.json(pairs)
        elif self.format is Format.TABLE:
            width = max(map(len, pairs))
            for name, value in pairs.items():
                text = (human or {}).get(name, human_plain)(value)
                self.line(f"{name:<{width}}  {text}")
        else:
            for name, value in pairs.items():
                self.line(f"{name}\t{plain(value)}")

    def json(self, record: Mapping[str, Any]) -> None:
        sys.stdout.write(_encode(record) + "\n")

    def line(self, text: str) -> None:
        sys.stdout.write(text + "\n")

    def _json(self, columns: list[Column], rows: Iterable[tuple[Any, ...]]) -> None:
        names, write = [c.name for c in columns], sys.stdout.write
        for row in rows:
            write(_encode(_record(names, row)) + "\n")

    def _msgpack(self, columns: list[Column], rows: Iterable[tuple[Any, ...]]) -> None:
        from ..codec import get_codec

        names, encode = [c.name for c in columns], get_codec().encode
        sys.stdout.flush()
        out = sys.stdout.buffer
        for row in rows:
            out.write(encode(dict(zip(names, row, strict=True)))[1])
        out.flush()

    def _csv(self, columns: list[Column], rows: Iterable[tuple[Any, ...]]) -> None:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        if self.header:
            writer.writerow([c.name for c in columns])
        for row in rows:
            writer.writerow(map(plain, row))

    def _tsv(self, columns: list[Column], rows: Iterable[tuple[Any, ...]]) -> None:
        write = sys.stdout.write
        if self.header:
            write("\t".join(c.name for c in columns) + "\n")
        for row in rows:
            write("\t".join(map(plain, row)) + "\n")

    def _table(self, columns: list[Column], rows: Iterable[tuple[Any, ...]]) -> None:
        console, write = Console(file=sys.stdout), sys.stdout.write
        widths, chosen, it = [max(len(c.name), self.least) for c in columns], list(range(len(columns))), iter(rows)
        paint = functools.cache(functools.partial(_painted, console))
        first = True
        while (chunk := list(islice(it, self.chunk))) or first:
            cells = [[c.human(v) for c, v in zip(columns, row, strict=True)] for row in chunk]
            widths = [max([w, *(cell_len(row[i]) for row in cells)]) for i, w in enumerate(widths)]
            if first:
                chosen = _chosen(columns, widths, console.width)
            fitted = _fitted([widths[i] for i in chosen], console.width)
            places = [(i, w, columns[i].right, columns[i].style) for i, w in zip(chosen, fitted, strict=True)]
            if first and self.header:
                begin, end = paint("bold")
                names = "  ".join(_padded(columns[i].name, w, right) for i, w, right, _ in places)
                write(f"{begin}{names.rstrip()}{end}\n{'─' * min(sum(fitted) + 2 * (len(fitted) - 1), console.width)}\n")
            for row, texts in zip(chunk, cells, strict=True):
                out = []
                for i, width, right, style in places:
                    text = _padded(texts[i], width, right)
                    if style is not None and (said := style(row[i])):
                        begin, end = paint(said)
                        text = f"{begin}{text}{end}"
                    out.append(text)
                write("  ".join(out).rstrip() + "\n")
            first = False


def _painted(console: Console, style: str) -> tuple[str, str]:
    """What the terminal wants to hear before and after a text of this style; nothing where it shows none."""
    if not console.is_terminal or console.is_dumb_terminal:
        return "", ""
    with console.capture() as seen:
        console.print(Text("x", style=style), end="")
    begin, _, end = seen.get().partition("x")
    return begin, end


def _padded(text: str, width: int, right: bool) -> str:
    if (n := cell_len(text)) > width:
        text, n = set_cell_size(text, width - 1) + "…", width
    return " " * (width - n) + text if right else text + " " * (width - n)


def _chosen(columns: list[Column], widths: list[int], total: int) -> list[int]:
    """Indices of the columns that fit; text columns may be cut to 24 characters before one is left out."""
    chosen = list(range(len(columns)))
    while sum(min(widths[i], 24) for i in chosen) + 2 * (len(chosen) - 1) > total:
        worst = max(chosen, key=lambda i: columns[i].drop)
        if columns[worst].drop == 0:
            break
        chosen.remove(worst)
    return chosen


def _fitted(widths: list[int], total: int) -> list[int]:
    """Widths that fit the console: the widest columns give way, down to 6."""
    widths, room = list(widths), total - 2 * (len(widths) - 1)
    while sum(widths) > room and max(widths) > 6:
        i = widths.index(max(widths))
        second = max([6, *(w for w in widths if w < widths[i])])
        widths[i] = max(second if widths.count(widths[i]) == 1 else widths[i] - 1, widths[i] - (sum(widths) - room))
    return widths


def _flushed(rows: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    for row in rows:
        yield row
        sys.stdout.flush()


class _Counter:
    def __init__(self, rows: Iterable[tuple[Any, ...]]) -> None:
        self._rows, self.n = rows, 0

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for row in self._rows:
            self.n += 1
            yield row


_encode = json.JSONEncoder(default=json_value, allow_nan=False).encode
_AS_IS = frozenset({int, str, bool, type(None)})


def _record(names: list[str], row: tuple[Any, ...]) -> dict[str, Any]:
    record = {n: v if type(v) in _AS_IS else json_value(v) for n, v in zip(names, row, strict=True)}
    if names[0] == "key" and isinstance(row[0], bytes):
        return json_key(row[0]) | {n: record[n] for n in names[1:]}
    return record


@contextlib.contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """A progress bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=max(total, 1))
        yield lambda done: progress.update(task, completed=done)


def message(text: str) -> None:
    """One line to stderr."""
    sys.stderr.write(f"shmcache: {escape(text) if not text.isprintable() else text}\n")


def told(error: BaseException) -> str:
    """An exception as one line for a person: of a system call the file and what is wrong with it, without the number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__
