"""Read-only views of a segment: which it is, who uses it, what lies in it, and whether it is sound.

I1  A View takes no guard, writes no byte, claims no worker slot and counts nothing; it works on a segment whose writers are
    stopped or dead, whose semaphores are gone, and on a file that is a copy of a segment.
I2  Walking needs memory for one bucket group, whatever the segment's size.
I3  A payload of pickle is never decoded here.

`locate` turns what a user writes (URL, `form:name`, bare name, `@shmid`, path of a copy) into a segment or another engine's URL.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

from . import _core, catalog
from .arguments import Key
from .catalog import Found
from .codec import get_codec
from .errors import LayoutMismatch, SegmentInvalid, SegmentNotOurs
from .processes import boot_time, process
from .url import Url

__all__ = [
    "LANES",
    "TYPES",
    "Guard",
    "Item",
    "View",
    "Worker",
    "boot_id",
    "created_at",
    "invalid",
    "locate",
    "permissions",
    "settings",
    "status",
]

LANES: Final = ("probation", "large", "main-5m", "main-85m", "main-1d", "main-long")
"""Names of the lanes by number: new small items, new large ones, then proven ones by remaining lifetime."""
_NATIVE: Final = ("bytes", "str", "int", "float", "none", "bool", "bool", "int")
_PAYLOADS: Final = {0: "msgpack", 1: "pickle", 2: "codec"}
_FORMS: Final = ("posix", "sysv", "anon")


class Item(NamedTuple):
    """One entry of the index. `ttl` is seconds left, None = never expires; `age` is that of the item's page, in seconds."""

    key: Key | None  #: None where the entry leads to no item, or to one that never stood still
    type: str
    size: int  #: bytes of the encoded value
    age: int
    ttl: float | None
    use: int  #: use bits, 0 to 3
    cas: int  #: version, 24 bits
    lane: str
    shard: int
    bucket: int
    state: str  #: live, expired, torn (rewritten under every look) or corrupt (its check fails, or no item lies there)
    slot: int
    page: int
    off: int
    grace: float  #: seconds an expired item may still be given out by get_or_set
    probes: int  #: buckets a read of the key looks at: 1 (its home) or 2; 0 without a key


class Guard(NamedTuple):
    """One shard's binary semaphore. `state`: free, held, stopped (its live owner is stopped), dead (recovery is due)."""

    shard: int
    state: str
    pid: int  #: owner, 0 = none
    alive: bool | None  #: None: no owner, or nobody can tell
    started: float | None  #: Unix time the owner started
    command: str
    waiters: bool
    recoveries: int
    leases: int
    items: int
    pages_free: int
    version: int


class Worker(NamedTuple):
    """One worker slot: who took it last, and what its holders counted since the segment's creation."""

    slot: int
    pid: int
    held: bool | None  #: the process lives and has the segment open; None: no semaphores to tell by
    started: float  #: Unix time the process started
    command: str  #: "" where the process has ended
    hits: int
    misses: int
    guard_waits: int
    guard_timeouts: int
    read_retries: int
    read_contended: int
    corrupt: int


# -- finding -------------------------------------------------------------------------------------------------------------------


def locate(text: str) -> Found | Url:
    """The segment, the copy of one, or the other engine's URL that `text` means.

    Args: text: an engine URL; `posix:name`, `sysv:name`, `anon:name`; a bare name (posix before sysv before anon); `@ID` (a
    System V shared-memory id); a path with a slash in it, or the name of a file here where no segment has that name.
    Returns: Found (its `problem` says why it cannot be attached) or, for schemes without a segment, the parsed Url.
    Raises: FileNotFoundError for no such segment; ValueError for a URL that does not parse, an `anon://` URL, and a name that
    several anonymous segments have.
    """
    if "://" in text:
        url = Url.parse(text)
        if url.scheme == "anon":
            raise ValueError(f"target: a segment that others can attach wanted, {text!r} found; `@shmid` names an anonymous one")
        if url.scheme not in ("posix", "sysv"):
            return url
        return _by_name(text, url.segment_name(), (url.scheme,))
    if re.fullmatch(r"@[0-9]{1,10}", text):
        return _by_id(text, int(text[1:]))
    form, colon, name = text.partition(":")
    if colon and form in _FORMS and name and "/" not in name:
        return _by_name(text, name, (form,))
    if "/" in text:
        return _copy(text)
    try:
        return _by_name(text, text, _FORMS)
    except FileNotFoundError:
        if os.path.isfile(text):
            return _copy(text)
        raise


def _by_name(text: str, name: str, forms: tuple[str, ...]) -> Found:
    for form in forms:
        if form == "posix" and "/" not in name and (found := _posix_row(name)) is not None:
            return found
        if form != "posix":
            rows = [f for f in catalog.list_segments() if f.form == form and f.name == name and f.header]
            if form == "anon" and len(rows) > 1:
                ids = " ".join(f"@{f.shm_id}" for f in rows)
                raise ValueError(f"target: one anonymous segment named {name!r} wanted, {len(rows)} found: {ids}")
            if rows:
                return rows[0]
            if form == "sysv" and (found := _sysv_row(name)) is not None:
                return found
    raise FileNotFoundError(f"segment: {text!r} wanted, none of that name found ({' or '.join(forms)}); `shmcache ls` lists them")


def _posix_row(name: str) -> Found | None:
    try:
        st = os.stat(catalog.shm_path(name), follow_symlinks=False)
    except OSError:
        return None
    row = Found("posix", name, st.st_uid, st.st_mode & 0o7777, st.st_size)
    if not stat.S_ISREG(st.st_mode):
        row.problem = f"a regular file wanted, {_KINDS.get(stat.S_IFMT(st.st_mode), 'another kind')} found"
        return row
    _read_header(row, catalog.shm_path(name))
    return row


def _sysv_row(name: str) -> Found | None:
    """A segment under the name's key whose header does not say so: damaged, of another layout, or another program's."""
    key = catalog.explicit_key(name)
    key = catalog.ipc_key("sysv", name) if key is None else key
    try:
        shm_id = _core.shm_get(key, 0, 0)
        found = _core.shm_stat(shm_id)
    except PermissionError:
        return _not_ours(name, "key", key & 0xFFFFFFFF)
    except OSError:
        return None
    row = Found("sysv", name, found["uid"], found["mode"] & 0o777, found["size"], {}, shm_id, found["key"] & 0xFFFFFFFF)
    row.nattch = found["nattch"]
    _read_header(row, None)
    return row


def _not_ours(name: str, field: str, number: int) -> Found:
    """What everybody may know of a System V segment that this user may not look at."""
    for line in catalog.sysvipc("shm"):
        if line[field] & 0xFFFFFFFF == number:
            row = Found("sysv", name, line["uid"], line["perms"] & 0o777, line["size"], {}, line["shmid"])
            row.shm_key, row.nattch, row.problem = line["key"] & 0xFFFFFFFF, line["nattch"], os.strerror(errno.EACCES)
            return row
    raise SegmentNotOurs(f"segment sysv:{name}: one that uid {os.geteuid()} may look at wanted, refused found")


def _by_id(text: str, shm_id: int) -> Found:
    for row in catalog.list_segments():
        if row.shm_id == shm_id:
            return row
    try:
        found = _core.shm_stat(shm_id)
    except PermissionError:
        return _not_ours(text, "shmid", shm_id)
    except OSError:
        raise FileNotFoundError(f"segment: shared-memory id {text[1:]} wanted, none found; `shmcache ls` lists them") from None
    row = Found("sysv", text, found["uid"], found["mode"] & 0o777, found["size"], {}, shm_id, found["key"] & 0xFFFFFFFF)
    row.nattch = found["nattch"]
    _read_header(row, None)
    return row


_KINDS: Final = {
    stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device", stat.S_IFLNK: "a symbolic link",
}  # fmt: skip


def _copy(path: str) -> Found:
    st = os.stat(path)
    if not stat.S_ISREG(st.st_mode):
        kind = _KINDS.get(stat.S_IFMT(st.st_mode), "another kind")
        raise ValueError(f"target: a regular file wanted, {kind} found at {path!r}")
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(4) == b"\x7fELF":
            raise ValueError(
                f"target: a copy of a segment wanted, an ELF file found at {path!r}; core files hold no segments, which are kept"
                " out of them with the secrets in them: copy /dev/shm/shmcache.NAME"
            )
    row = Found("file", path, st.st_uid, st.st_mode & 0o7777, st.st_size)
    _read_header(row, path)
    return row


def _read_header(row: Found, path: str | None) -> None:
    fd = -1
    try:
        if path is not None:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        row.header = _core.read_header(fd, row.shm_id, row.size)
    except (SegmentInvalid, LayoutMismatch) as error:
        row.problem = str(error)
    except OSError as error:
        row.problem = error.strerror
    finally:
        if fd >= 0:
            os.close(fd)


# -- the view ------------------------------------------------------------------------------------------------------------------


def _semaphores(header: dict[str, Any]) -> tuple[int, str | None]:
    """(id of the set the header names, None), or (-1, why it is not that set)."""
    sem_id = header["sem_id"]
    try:
        found = _core.sem_stat(sem_id)
    except PermissionError:
        return -1, f"set {sem_id} may not be looked at by uid {os.geteuid()}"
    except OSError:
        return -1, f"set {sem_id} is gone"
    for field, wanted in (("n_sems", header["n_sems"]), ("ctime", header["sem_ctime"])):
        if found[field] != wanted:
            return -1, f"set {sem_id} is another: {field} {wanted} wanted, {found[field]} found"
    return sem_id, None


class View:
    """One segment, attached read-only. A context manager; `close` detaches.

    Raises: SegmentInvalid or LayoutMismatch when the header is not one of this library and layout, OSError where the user may
    not read it. Concurrency: numbers are of the moment each is read, not of one moment.
    """

    def __init__(self, found: Found) -> None:
        self.found = found
        self.sem_id, self.sem_problem = -1, "none: a copy" if found.form == "file" else None
        self.table = _core.Table()
        if found.size < 4096:
            raise invalid(found)
        if found.shm_id >= 0:
            self.table._attach(-1, found.shm_id, found.size, self._find_semaphores(), True, None, False, False)
        else:
            path = found.name if found.form == "file" else catalog.shm_path(found.name)
            no_link = 0 if found.form == "file" else os.O_NOFOLLOW
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | no_link)
            try:
                self.table._attach(fd, -1, os.fstat(fd).st_size, self._find_semaphores(), True, path, False, False)
                if found.form == "file":
                    self._stop_clock(os.fstat(fd).st_mtime_ns)
            finally:
                os.close(fd)
        self.table._configure(get_codec(), b"", None, 0.1)
        self.header = self.table._header()

    def _find_semaphores(self) -> int:
        if self.found.form != "file" and self.found.header:
            self.sem_id, self.sem_problem = _semaphores(self.found.header)
        return self.sem_id

    def _stop_clock(self, mtime_ns: int) -> None:
        """A copy is read as of its last change, so that what was alive then is."""
        ms = (mtime_ns - self.table._header()["created_ns"]) // 1_000_000
        if ms >= 0:
            self.table._set_clock(ms)

    def close(self) -> None:
        self.table._detach()

    def __enter__(self) -> View:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def removed(self) -> bool:
        """Whether the segment was unlinked or replaced; who has it mapped may go on reading."""
        return self.table._lost

    @property
    def n_groups(self) -> int:
        """How many bucket groups there are; a key's two buckets lie in one."""
        return self.table._n_groups

    def stats(self) -> dict[str, int]:
        """Counters summed over workers and shards; see `shmcache stats --help` for the names."""
        return self.table._stats()

    def shards(self) -> list[dict[str, Any]]:
        """Pages, free pages, items, bytes of each shard, and pages and dead bytes of its lanes."""
        return self.table._shards()

    def check(self) -> list[dict[str, Any]]:
        """The audit's findings: code, shard, text. A finding counts only if three passes over its shard see one."""
        return self.table._check()

    def guards(self) -> list[Guard]:
        """The state of every shard's guard, with what /proc says of its owner."""
        rows, boot, tick = [], boot_time(), os.sysconf("SC_CLK_TCK")
        for g in self.table._guards():
            state, pid, alive, started, command = g["state"], g["pid"], None, None, ""
            if state != "free":
                started = boot + g["start_time"] / tick if g["start_time"] else None
                seen = process(pid) if pid and self.found.form != "file" else None
                same = seen is not None and seen.start == g["start_time"]
                if seen is not None and same:
                    command = seen.command
                if self.sem_id >= 0:
                    alive = state == "held"
                elif self.found.form != "file" and pid:
                    alive = same and seen is not None and seen.state not in "ZX"
                    state = state if alive else "dead"
                if state == "held" and same and seen is not None and seen.state in "Tt":
                    state = "stopped"
            rows.append(Guard(
                g["shard"], state, pid, alive, started, command, g["waiters"], g["recoveries"], g["leases"], g["items"],
                g["pages_free"], g["version"],
            ))  # fmt: skip
        return rows

    def workers(self) -> list[Worker]:
        """Every process that ever took a worker slot and whose slot no other took since; a slot's counters go on from holder to
        holder."""
        rows, boot, tick = [], boot_time(), os.sysconf("SC_CLK_TCK")
        for w in self.table._workers():
            pid, held = w["pid"], w["held"]
            seen = process(pid) if pid and self.found.form != "file" else None
            same = seen is not None and seen.start == w["start_time"]
            command = seen.command if seen is not None and same else ""
            counts = {name: w[name] for name in Worker._fields[5:]}
            rows.append(Worker(w["slot"], pid, held, boot + w["start_time"] / tick, command, **counts))
        return rows

    def items(
        self, matches: Callable[[Key], bool] | None = None, *, expired: bool = False, groups: Iterable[int] | None = None,
        content: bool = True,
    ) -> Iterator[Item]:  # fmt: skip
        """The items, group by group: live, torn, corrupt, and with `expired` also those whose lifetime is over.

        Args: matches: see `arguments.compile_glob`; entries without a key are left out then. groups: numbers of bucket groups,
        each below `n_groups`; all of them if not given. content: compare the check over each value, which reads all its bytes;
        without it only an entry that leads to no item is corrupt.
        An item present throughout is seen, once unless it is rewritten meanwhile; one rewritten under 64 looks in a row is torn.
        """
        table = self.table
        for group in range(table._n_groups) if groups is None else groups:
            rows = table._scan_meta(group, content, None)
            now = table._now_ms()
            for row in rows:
                state, key = row[14], row[0]
                if (expired or state != "expired") and (matches is None or (key is not None and matches(key))):
                    yield _item(row, now)

    def value(self, key: Key) -> Any:
        """The value, or MISS if it is absent, expired or fails its check. ShmCacheError when it does not decode here."""
        return self.table._peek(key)

    def ttl(self, key: Key) -> float | None:
        """Seconds left, math.inf if it never expires, None if absent."""
        return self.table.ttl(key)


def _type_name(kind: int) -> str:
    if kind & 0x0F < 8:
        return _NATIVE[kind & 0x0F]
    number = (kind >> 4) & 7
    return _PAYLOADS.get(number, f"codec-{number}") + ("+zlib" if kind & 0x80 else "")


TYPES: Final = tuple(map(_type_name, range(256)))
"""Names of value types by the flags they are stored with."""
_LANES: Final = LANES + tuple(map(str, range(len(LANES), 256)))


def _item(row: tuple[Any, ...], now_ms: int) -> Item:
    key, kind, size, deadline, soft, version, shard, bucket, slot, lane, page, off, use, birth, state, probes = row
    if key is None:
        return Item(None, "", 0, 0, None, use, 0, "", shard, bucket, state, slot, page, off, 0.0, 0)
    ends = soft or deadline
    return Item(
        key, TYPES[kind], size, max(now_ms // 1000 - birth, 0), (ends - now_ms) / 1000 if ends else None, use, version,
        _LANES[lane], shard, bucket, state, slot, page, off, (deadline - soft) / 1000 if soft and deadline else 0.0, probes,
    )  # fmt: skip


# -- what a header says, in words ------------------------------------------------------------------------------------------------


def settings(header: dict[str, Any]) -> dict[str, Any]:
    """The options the segment was made with, under the names of a URL; lifetimes in seconds, default_ttl None = never."""
    flags = header["flags"]
    return {
        "size": header["size"],
        "buckets": header["n_buckets"] * header["n_shards"],
        "item_size": header["item_size"],
        "guards": header["n_shards"],
        "guard": "fast" if header["guard_kind"] == _core.GUARD_FAST else "semaphore",
        "workers": header["n_workers"],
        "max_value": header["max_value"],
        "clean_period": header["clean_period_ms"] / 1000,
        "default_ttl": header["default_ttl_ms"] / 1000 or None,
        "eviction": "none" if flags & _core.FLAG_NO_EVICT else "auto",
        "integrity": "header" if flags & _core.FLAG_HEADER_ONLY else "full",
        "secure_delete": bool(flags & _core.FLAG_SECURE),
        "perms": header["perms"],
    }


def permissions(found: Found) -> int:
    """The permission bits as the system holds them."""
    if found.shm_id >= 0:
        with contextlib.suppress(OSError):
            return _core.shm_stat(found.shm_id)["mode"] & 0o777
    return found.mode & 0o777


def boot_id() -> bytes:
    """The id of this boot, as segments carry the one they were made in; zeros where the system has none."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return bytes.fromhex(f.read().strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


def invalid(found: Found, hint: str = "") -> SegmentInvalid:
    """The error for a segment that cannot be attached, with what is wrong with it."""
    return SegmentInvalid(f"segment {found.form}:{found.name}: {found.problem or 'a sound header wanted, none found'}{hint}")


def created_at(header: dict[str, Any]) -> float:
    """Unix time of the segment's creation."""
    return float(header["created_ns"]) / 1e9


def status(found: Found, view: View | None) -> str:
    """One word: ok, removed, no-semaphores, unreadable, unfinished, other-layout, invalid, or copy."""
    if view is None:
        problem = found.problem or ""
        for word, name in (("denied", "unreadable"), ("state:", "unfinished"), ("layout version", "other-layout"),
                           ("byte order", "other-layout")):  # fmt: skip
            if word in problem:
                return name
        return "invalid"
    if found.form == "file":
        return "copy"
    if found.form == "sysv" and found.shm_key == 0:  # the kernel clears the key of a segment marked for removal
        return "removed"
    return "removed" if view.removed else "ok" if view.sem_problem is None else "no-semaphores"
