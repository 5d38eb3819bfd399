"""What an opener asks of a segment: options, geometry, whose it may be; for creating one and for comparing a found one.

Nothing here touches a segment. A refusal names the field with the wanted and the found value.
"""

from __future__ import annotations

import grp
import os
import pwd
import secrets
import time
from typing import Any, Final

from . import _core
from .catalog import full_name
from .errors import LayoutMismatch, NotSupported, SegmentInvalid, SegmentNotOurs

__all__ = ["Wish", "options_of", "user_ids"]

FORMS: Final = {"posix": _core.FORM_POSIX, "sysv": _core.FORM_SYSV, "anon": _core.FORM_ANON}
GUARDS: Final = {"semaphore": _core.GUARD_SEMAPHORE, "fast": _core.GUARD_FAST}


def user_ids(owner: str | None, group: str | None) -> tuple[int, int]:
    """(uid, gid) of `owner=user[:group]` and `group=`, names or numbers; -1 where not given. ValueError for unknown ones."""
    uid = gid = -1
    user, _, group_part = (owner or "").partition(":")
    try:
        if user:
            entry = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
            uid, gid = entry.pw_uid, entry.pw_gid
    except KeyError:
        if not user.isdigit():
            raise ValueError(f"owner: a known user wanted, {user!r} found") from None
        uid = gid = int(user)
    for part in filter(None, (group_part, group)):
        try:
            gid = int(part) if part.isdigit() else grp.getgrnam(part).gr_gid
        except KeyError:
            raise ValueError(f"group: a known group wanted, {part!r} found") from None
    return uid, gid


def _ipc_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/ipc").st_ino
    except OSError:
        return 0


def _boot_id() -> bytes:
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return bytes.fromhex(f.read().strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


def options_of(header: dict[str, Any]) -> dict[str, Any]:
    """The options that make a segment like this one."""
    flags = header["flags"]
    return {
        "size": header["size"],
        "buckets": header["n_buckets"] * header["n_shards"],
        "item_size": header["item_size"],
        "guards": header["n_shards"],
        "workers": header["n_workers"],
        "max_value": header["max_value"],
        "guard": "fast" if header["guard_kind"] == _core.GUARD_FAST else "semaphore",
        "clean_period": header["clean_period_ms"] / 1000,
        "default_ttl": header["default_ttl_ms"] / 1000,
        "integrity": "header" if flags & _core.FLAG_HEADER_ONLY else "full",
        "eviction": "none" if flags & _core.FLAG_NO_EVICT else "auto",
        "secure_delete": bool(flags & _core.FLAG_SECURE),
    }


class Wish:
    """The options of one open call, with what they mean for creating and for comparing."""

    def __init__(self, form: str, name: str, options: dict[str, Any], like: dict[str, Any] | None = None) -> None:
        self.form, self.name, self.options = form, name, options
        self.making = {**(options_of(like) if like else {}), **options}
        self.mode: str = options.get("mode", "c")
        self.perms: int = options.get("perms", 0o600)
        self.uid, self.gid = user_ids(options.get("owner"), options.get("group"))
        euid = os.geteuid()
        if euid != 0 and self.uid not in (-1, euid):
            raise ValueError(f"owner: {euid} (only root gives a segment away) wanted, {self.uid} found")
        self.owners = {euid} | set(options.get("owners", ())) | ({self.uid} if self.uid >= 0 else set())
        self.plan = _core.plan({**self._geometry(self.making), "size": self.making.get("size", 64 << 20)})

    @staticmethod
    def _geometry(options: dict[str, Any]) -> dict[str, int]:
        return {k: options[k] for k in ("buckets", "item_size", "guards", "max_value", "workers") if k in options}

    def fields(self, sem_id: int, sem_key: int, shm_key: int, undo: bool) -> dict[str, Any]:
        """What the header says of a new segment."""
        o = self.making
        guard = o.get("guard", "auto")
        if guard == "auto":
            guard = "fast" if undo else "semaphore"
        if not undo:
            raise NotSupported("guard: SEM_UNDO that the kernel applies at process death wanted, none found on this system")
        flags = _core.FLAG_UNDO_WORKS
        flags |= _core.FLAG_HEADER_ONLY if o.get("integrity", "full") == "header" else 0
        flags |= _core.FLAG_NO_EVICT if o.get("eviction", "auto") == "none" else 0
        flags |= _core.FLAG_SECURE if o.get("secure_delete", False) else 0
        euid, egid = os.geteuid(), os.getegid()
        return {
            **self._geometry(o),
            "size": o.get("size", 64 << 20),
            "guard_kind": GUARDS[guard],
            "flags": flags,
            "clean_period_ms": round(o.get("clean_period", 600.0) * 1000),
            "default_ttl_ms": round((o.get("default_ttl") or 0) * 1000),
            "hash_key": secrets.token_bytes(16),
            "uuid": secrets.token_bytes(16),
            "boot_id": _boot_id(),
            "ipc_ns": _ipc_namespace(),
            "created_ns": time.time_ns(),
            "creator_pid": os.getpid(),
            "creator_uid": euid,
            "owner_uid": self.uid if self.uid >= 0 else euid,
            "owner_gid": self.gid if self.gid >= 0 else egid,
            "perms": self.perms,
            "form": FORMS[self.form],
            "sem_key": sem_key,
            "sem_id": sem_id,
            "sem_ctime": _core.sem_stat(sem_id)["ctime"],
            "shm_key": shm_key,
            "name": full_name(self.form, self.name),
        }

    def compare(self, header: dict[str, Any]) -> None:
        """LayoutMismatch where an option that was given differs from the segment. Geometry is compared after rounding."""
        o, flags = self.options, header["flags"]
        rounded = _core.plan({**self._geometry(o), "size": header["size"], "guards": o.get("guards", header["n_shards"])})
        seconds = header["clean_period_ms"] / 1000
        pairs: list[tuple[str, object, object]] = [
            ("size", self.plan["size"], header["size"]),
            ("guards", o.get("guards"), header["n_shards"]),
            ("buckets", rounded["n_buckets"] * rounded["n_shards"], header["n_buckets"] * header["n_shards"]),
            ("item_size", o.get("item_size"), header["item_size"]),
            ("max_value", o.get("max_value"), header["max_value"]),
            ("workers", o.get("workers"), header["n_workers"]),
            ("clean_period", o.get("clean_period"), seconds),
            ("integrity", o.get("integrity"), "header" if flags & _core.FLAG_HEADER_ONLY else "full"),
            ("eviction", o.get("eviction"), "none" if flags & _core.FLAG_NO_EVICT else "auto"),
            ("secure_delete", o.get("secure_delete"), bool(flags & _core.FLAG_SECURE)),
        ]
        if o.get("guard", "auto") != "auto":
            pairs.append(("guard", o["guard"], "fast" if header["guard_kind"] == _core.GUARD_FAST else "semaphore"))
        for what, wanted, found in pairs:
            if what in o and wanted != found:
                raise LayoutMismatch(
                    f"segment {header['name']}: {what}={wanted} wanted, {found} found (options not given are taken from the "
                    "segment; to change one, unlink the segment first)"
                )


def refuse_owner(what: str, uid: int, wish: Wish, creator: int | None = None) -> None:
    if wish.mode == "r":
        return
    if uid not in wish.owners:
        raise SegmentNotOurs(
            f"{what}: owner uid {' or '.join(map(str, sorted(wish.owners)))} wanted, {uid} found; a server that drops "
            "privileges opens with owner=user, others name trusted users with owners=, mode=r looks only"
        )
    if creator is not None and creator not in wish.owners | {0}:
        raise SegmentNotOurs(f"{what}: creator uid 0 or an owner wanted, {creator} found")


def refuse_mode(what: str, mode: int, wish: Wish) -> None:
    if mode & 0o002 and wish.mode != "r" and not ("perms" in wish.options and wish.perms & 0o002):
        raise SegmentNotOurs(f"{what}: permissions without write for all (0{wish.perms:o}) wanted, 0{mode & 0o777:o} found")


def check_header(header: dict[str, Any], wish: Wish) -> None:
    """That the header is of the segment asked for, of this boot and this IPC namespace."""
    name = full_name(wish.form, wish.name)
    if header["name"] != name:
        raise SegmentInvalid(f"segment {name}: name {name!r} in its header wanted, {header['name']!r} found")
    if wish.mode == "r":
        return
    here, boot = _ipc_namespace(), _boot_id()
    if header["ipc_ns"] and here and header["ipc_ns"] != here:
        raise SegmentInvalid(f"segment {name}: IPC namespace {here} wanted, {header['ipc_ns']} found; its semaphores are there")
    if header["boot_id"] != boot:
        raise SegmentInvalid(f"segment {name}: boot id {boot.hex()} wanted, {header['boot_id'].hex()} found")
    wish.compare(header)
