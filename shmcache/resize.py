"""Replace a segment by one of another size while it is in use.

The new segment is built beside the old one, in state COPY, under a private name or a free key; resize.c copies the items, at
first while others write, then what has changed since with every guard held. The store of the old segment's successor word is
the moment of change. What follows (READY, the name, removal of the old one) is catalog's `complete` and `gc`, done here, or by
whoever comes by if this process is killed.

I1  The lifecycle semaphore of the old segment is held throughout: one resize at a time.
I2  That of the new one is held until it has its place, so that gc leaves it alone.
I3  Until the change nothing of the old segment is touched but its guards; a failure removes the new one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from . import _core, catalog
from .errors import LockTimeout, NotSupported, SegmentInvalid, SegmentNotOurs
from .making import fresh_file, make_set, make_shm, prepare_set
from .refusal import refused
from .segment import Attachment, require_packages, sysv_keys
from .wish import Wish, options_of

__all__ = ["GEOMETRY", "Resized", "resize"]

GEOMETRY: Final = ("size", "buckets", "guards", "item_size", "max_value", "workers")
"""Options that a resize changes: an engine that followed takes them from the segment."""
PASSES: Final = 6
"""Copies without guards at most; each copies what changed during the one before."""
SETTLED: Final = 1000
"""Changes of one pass that are few enough for the last one: about a millisecond of work."""
STEP: Final = 8
"""Bucket groups a call: a few milliseconds, so that signals and progress are served."""


@dataclass(frozen=True, slots=True)
class Resized:
    """What a resize did."""

    items: int  #: live items at the change
    left_out: int  #: of those, what the new segment had no room for
    corrupt: int  #: entries whose item does not pass its check, left behind
    pause: float  #: seconds that writers were held up
    size: int  #: bytes of the new segment
    old_size: int


def resize(
    old: _core.Table,
    att: Attachment,
    options: dict[str, Any],
    *,
    timeout: float = 5.0,
    progress: Callable[[int, int], None] | None = None,
) -> Resized | None:
    """See `ShmEngine.resize`. None: another resize was faster, and `old` has its successor already.

    Args: old: a table that does not follow, attached for writing by `att`. options: of GEOMETRY, typed.
    """
    if att.form == "anon" or (att.form == "sysv" and catalog.explicit_key(att.name) is not None):
        raise NotSupported(
            f"resize: a segment found by name wanted, {att.form}:{att.name} found; an anonymous one has no name, and an explicit "
            "key cannot pass from one segment to another: save, rm, load"
        )
    require_packages(att.form)
    try:
        free = _core.lifecycle_enter(att.sem_id, 0)
    except OSError as error:
        if catalog.replaced({"successor": old._successor}):
            return None
        raise refused(f"resize of segment {att.form}:{att.name}", error) from error
    if not free:
        raise LockTimeout(f"resize: segment {att.form}:{att.name} left alone wanted, another resize of it at work found")
    try:
        if old._lost:
            return None
        _clear_away(att)
        return _replace(old, att, _wish(att, options), timeout, progress)
    except OSError as error:
        raise refused(f"resize of segment {att.form}:{att.name}", error) from error
    finally:
        with contextlib.suppress(OSError):  # removed with the old segment
            _core.lifecycle_leave(att.sem_id)


def _clear_away(att: Attachment) -> None:
    """Remove what killed resizers of this name left: the lifecycle semaphore is ours, so nobody is at work on it."""
    uid, used = os.geteuid(), {found.header["sem_id"] for found in catalog.list_segments() if found.header} | {att.sem_id}
    for key in catalog.probe_keys(att.form, att.name):
        with contextlib.suppress(OSError):
            sem_id = _core.sem_get(key, 0, 0)
            if sem_id not in used and _core.sem_stat(sem_id)["uid"] == uid:
                _core.sem_remove(sem_id)
    if att.form == "posix":
        for entry in list(os.scandir(catalog.SHM_DIR)):
            with contextlib.suppress(OSError):
                if catalog.built_for(entry.name, att.name) and entry.stat(follow_symlinks=False).st_uid == uid:
                    os.unlink(entry.path)
        return
    for key in sysv_keys(att.name):
        with contextlib.suppress(OSError):
            shm_id = _core.shm_get(key, 0, 0)
            found = _core.shm_stat(shm_id)
            if shm_id != att.shm_id and found["uid"] == uid and _left_over(shm_id, found["size"], att):
                _core.shm_remove(shm_id)


def _left_over(shm_id: int, size: int, att: Attachment) -> bool:
    """Whether it was built to replace a segment of this lineage, was replaced in it, or never got a header."""
    try:
        header = _core.read_header(-1, shm_id, size, True)
    except SegmentInvalid as error:
        return catalog.unborn(error)
    return catalog.lineage_of(header) == catalog.lineage_of(att.header)


def _wish(att: Attachment, options: dict[str, Any]) -> Wish:
    """The new segment: owner, permissions and settings of the old one, geometry as asked, the rest of it in proportion."""
    if att.form == "posix":
        st = os.stat(catalog.shm_path(att.name))
        uid, gid, mode = st.st_uid, st.st_gid, st.st_mode
    else:
        found = _core.shm_stat(att.shm_id)
        uid, gid, mode = found["uid"], found["gid"], found["mode"]
    euid = os.geteuid()
    if euid not in (0, uid):
        raise SegmentNotOurs(f"resize: uid {uid} (the owner of segment {att.form}:{att.name}) or root wanted, {euid} found")
    old = options_of(att.header)
    size = options.get("size", old["size"])
    given = {key: value for key, value in old.items() if key not in GEOMETRY} | {"item_size": old["item_size"], "size": size}
    plain = {"size": old["size"], "item_size": old["item_size"]}
    for key in ("guards", "workers", "buckets", "max_value"):  # what of these was given once; each follows from those before
        plan = _core.plan(plain)
        usual = {"guards": plan["n_shards"], "workers": plan["n_workers"], "buckets": plan["n_buckets"] * plan["n_shards"],
                 "max_value": plan["max_value"]}[key]  # fmt: skip
        if old[key] != usual:
            plain[key] = old[key]
            given[key] = old[key] * size // old["size"] if key == "buckets" else old[key]
    if "item_size" in options:
        given.pop("buckets", None)
    asked: dict[str, Any] = {"perms": mode & 0o777, "owners": (uid,)}
    if (uid, gid) != (euid, os.getegid()):
        asked["owner"] = f"{uid}:{gid}"
    return Wish(att.form, att.name, given | options | asked)


def _replace(
    old: _core.Table, att: Attachment, wish: Wish, timeout: float, progress: Callable[[int, int], None] | None
) -> Resized:
    sem_id, fields, word = _semaphores(wish)
    try:
        made = _built(old, wish, fields, word, att.header["shm_key"])
    except BaseException:
        _core.sem_remove(sem_id)
        raise
    place = {**att.header, "successor": word}
    new = _core.Table()
    try:
        new._attach(made.fd, made.shm_id, made.size, sem_id, False, None, False, False)
        done = _copied(old, new, word, timeout, progress)
        return Resized(done["items"], done["left_out"], done["corrupt"], done["pause"], made.size, att.size)
    finally:
        if old._successor == word:
            with contextlib.suppress(OSError):
                if catalog.complete(att.form, att.name, place):
                    _remove(att)
                _core.lifecycle_leave(sem_id)
            new._detach()
        else:
            new._detach()
            _remove(made)
        made.close()


def _semaphores(wish: Wish) -> tuple[int, dict[str, Any], int]:
    """A set of its own, its lifecycle semaphore held; the header's fields; the uuid word that will lead to the segment."""
    sem_id = key = -1
    for key in catalog.probe_keys(wish.form, wish.name):
        with contextlib.suppress(FileExistsError):
            sem_id = make_set(wish, key)
            break
    if sem_id < 0:
        raise SegmentNotOurs(f"resize: a free key for semaphores of segment {wish.name} wanted, all found taken")
    try:
        _core.lifecycle_enter(sem_id, 0)  # first of all: gc leaves alone what somebody is making
        undo = prepare_set(wish, sem_id)
        while True:
            fields = wish.fields(sem_id, key, 0, undo)
            if (word := catalog.word_of(fields)) > _core.SUCCESSOR_REMOVED:
                return sem_id, fields, word
    except BaseException:
        _core.sem_remove(sem_id)
        raise


def _built(old: _core.Table, wish: Wish, fields: dict[str, Any], word: int, here: int) -> Attachment:
    """The new segment, empty, in state COPY. here: the System V key of the old one."""
    if wish.form == "posix":
        path = catalog.private_path(wish.name, word)
        with fresh_file(wish, path) as fd:
            header = old._format_successor(fd, -1, fields)
            return Attachment("posix", wish.name, header["size"], fields["sem_id"], header, fd=os.dup(fd), path=path)
    keys = sysv_keys(wish.name)
    at = keys.index(here) + 1 if here in keys else 0
    for key in keys[at:] + keys[:at]:  # the order in which segment.py looks
        try:
            _core.shm_get(key, 0, 0)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                shm_id = make_shm(wish, key)
                try:
                    header = old._format_successor(-1, shm_id, {**fields, "shm_key": key})
                except BaseException:
                    _core.shm_remove(shm_id)
                    raise
                return Attachment("sysv", wish.name, header["size"], fields["sem_id"], header, shm_id=shm_id)
        except PermissionError:
            continue
    raise SegmentNotOurs(f"resize: a free key for segment sysv:{wish.name} wanted, all found taken")


def _copied(
    old: _core.Table, new: _core.Table, word: int, timeout: float, progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    job, groups, before = old._resize(new), old._n_groups, 0
    for number in range(PASSES):
        changed = 0
        for first in range(0, groups, STEP):
            last = min(first + STEP, groups)
            changed += old._resize_copy(job, first, last)
            if progress is not None and number == 0:
                progress(last, groups)
        if number > 0 and (changed <= SETTLED or changed > before // 2):
            break  # few left, or others write as fast as this copies
        before = changed
    return old._resize_switch(job, word, timeout)


def _remove(att: Attachment) -> None:
    """The kernel objects of a segment nobody needs: the old one, or a new one that came to nothing."""
    with contextlib.suppress(OSError):
        if att.shm_id >= 0:
            _core.shm_remove(att.shm_id)
        elif att.path is not None and os.path.basename(att.path).startswith(catalog.PRIVATE):
            os.unlink(att.path)  # the old one lost its name to the new one
    with contextlib.suppress(OSError):
        _core.sem_remove(att.sem_id)
