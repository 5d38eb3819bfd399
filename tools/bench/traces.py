"""Request traces: the formats read, and the flat file the replay driver takes.

SCT1, little endian, no padding::

    char magic[4] = "SCT1"; u32 nkeys; u64 n;
    u32 t[n]     seconds since start, non-decreasing        u32 ttl[n]   seconds, 0 = no expiry
    u32 key[n]   0..nkeys-1                                 u8  op[n]    0 GET 1 SET 2 DELETE 3 INCR
    u32 size[n]  bytes of the value read or written         u8  klen[n]  bytes of the key

as it is (`.sct`) or xz-compressed (`.sct.xz`); or CSV with the columns `key,size,ttl,op` and, optionally, `t`, named by a
first line or in that order. op is a name or a number; a missing ttl is 0. Without `t`, time goes on by a fixed rate.
"""

from __future__ import annotations

import csv
import lzma
import shutil
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["OPS", "Requests", "find", "flatten", "name_of", "read_csv"]

OPS = ("GET", "SET", "DELETE", "INCR")
_COLUMNS = ("key", "size", "ttl", "op", "t")


def name_of(path: Path) -> str:
    """`scarab` for `…/scarab.sct.xz`."""
    return path.name.split(".")[0]


def find(where: Path) -> list[Path]:
    """The trace files of a directory in order of their names, or the file itself."""
    if where.is_dir():
        found = sorted(p for p in where.iterdir() if p.name.endswith((".sct", ".sct.xz", ".csv")))
        if not found:
            raise FileNotFoundError(f"{where}: files named *.sct, *.sct.xz or *.csv wanted, none found")
        return found
    if not where.exists():
        raise FileNotFoundError(f"{where}: a trace or a directory of traces wanted, nothing found")
    return [where]


def _column(code: str) -> array[int]:
    return array(code)


@dataclass
class Requests:
    """A trace in memory, for those made here; the columns of SCT1."""

    t: array[int] = field(default_factory=lambda: _column("I"))
    key: array[int] = field(default_factory=lambda: _column("I"))
    size: array[int] = field(default_factory=lambda: _column("I"))
    ttl: array[int] = field(default_factory=lambda: _column("I"))
    op: array[int] = field(default_factory=lambda: _column("B"))
    klen: array[int] = field(default_factory=lambda: _column("B"))

    def add(self, t: int, key: int, size: int, ttl: int = 0, op: int = 0, klen: int = 17) -> None:
        """Append one request; the units are those of the columns."""
        self.t.append(t)
        self.key.append(key)
        self.size.append(size)
        self.ttl.append(ttl)
        self.op.append(op)
        self.klen.append(klen)

    def write(self, path: Path) -> None:
        """Write the flat form."""
        n_keys = max(self.key, default=-1) + 1
        with path.open("wb") as f:
            f.write(b"SCT1" + struct.pack("<IQ", n_keys, len(self.t)))
            for column in (self.t, self.key, self.size, self.ttl, self.op, self.klen):
                if sys.byteorder != "little":
                    column = column[:]
                    column.byteswap()
                column.tofile(f)


def _rows(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    names: list[str] = list(_COLUMNS)
    for number, row in enumerate(csv.reader(lines), 1):
        if not row or row[0].startswith("#"):
            continue
        if number == 1 and "key" in (cell.strip().lower() for cell in row):
            names = [cell.strip().lower() for cell in row]
            missing = [name for name in ("key", "size", "op") if name not in names]
            if missing:
                raise ValueError(f"csv columns: key,size,op and optionally ttl,t wanted, {','.join(names)} found")
            continue
        yield number, dict(zip(names, (cell.strip() for cell in row), strict=False))


def read_csv(lines: Iterable[str], rate: float = 1000.0) -> Requests:
    """Requests of a CSV file; keys are numbered by first appearance.

    Args:
        rate: requests a second of trace time where the file has no column `t`.

    Raises: ValueError naming line and field.
    """
    made, ids = Requests(), dict[str, int]()
    last = 0
    for number, row in _rows(lines):
        try:
            op = row["op"].upper()
            code = int(op) if op.isdigit() else OPS.index(op)
            t = int(float(row["t"])) if row.get("t") else int(len(made.t) / rate)
            size, ttl = int(row["size"]), int(row.get("ttl") or 0)
        except (KeyError, ValueError) as e:
            raise ValueError(f"csv line {number}: key,size,ttl,op (op one of {', '.join(OPS)}) wanted, {row} found") from e
        if not (0 <= code < len(OPS) and 0 <= size < 1 << 28 and 0 <= ttl < 1 << 32 and last <= t < 1 << 32):
            raise ValueError(
                f"csv line {number}: op 0..3, size below 2**28, ttl and t below 2**32, t not before {last} wanted, {row} found"
            )
        last = t
        made.add(t, ids.setdefault(row["key"], len(ids)), size, ttl, code, min(len(row["key"].encode()), 255))
    return made


def flatten(source: Path, target: Path, rate: float = 1000.0) -> None:
    """Write any of the formats read as a flat SCT1 file. Raises: ValueError when it is none of them."""
    if source.name.endswith(".csv"):
        with source.open(newline="") as text:
            read_csv(text, rate).write(target)
        return
    with source.open("rb") as probe:
        magic = probe.read(6)
    with lzma.open(source) if magic == b"\xfd7zXZ\0" else source.open("rb") as data, target.open("wb") as out:
        head = data.read(4)
        if head != b"SCT1":
            raise ValueError(f"{source}: magic b'SCT1' wanted, {head!r} found")
        out.write(head)
        shutil.copyfileobj(data, out, 1 << 20)
