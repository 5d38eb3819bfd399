"""The shared-memory engine: posix, sysv and anon.

The hot methods are those of the C type _core.Table, one atomic operation each; this class adds opening, options and what is
not hot. Drivers: the C extension; posix_ipc and sysv_ipc for creating and removing.
"""

from __future__ import annotations

import atexit
import errno
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from .. import _core, catalog, refusal, segment, url, wish
from .. import resize as resizing
from ..arguments import Key
from ..codec import Codec, PickleCodec, codec_option, get_codec
from ..engine import Capability, Engine
from ..errors import GuardLost, NotSupported
from ..url import Parser, Url

__all__ = ["ShmEngine"]


def _uids(name: str, value: Any) -> tuple[int, ...]:
    """User names or numbers, `,`-separated or as an iterable."""
    parts = value.split(",") if isinstance(value, str) else list(value)
    return tuple(wish.user_ids(str(part), None)[0] for part in parts if str(part))


_COUNT = url.size(1)
OPTIONS: dict[str, Parser] = {
    "size": url.size(),
    "buckets": _COUNT,
    "item_size": _COUNT,
    "guards": _COUNT,
    "workers": _COUNT,
    "max_value": _COUNT,
    "guard": url.choice("auto", "semaphore", "fast"),
    "clean_period": url.seconds(),
    "default_ttl": url.seconds(),
    "eviction": url.choice("auto", "none"),
    "integrity": url.choice("full", "header"),
    "perms": url.permissions,
    "owner": url.text,
    "group": url.text,
    "owners": _uids,
    "secure_delete": url.boolean,
    "hugepages": url.choice("no", "try"),
    "prefault": url.boolean,
    "prefix": url.text,
    "codec": codec_option,
    "lock_timeout": url.seconds(0.0, 86400.0),
    "mode": url.choice("c", "a", "x", "r"),
}

_REMOVED = (errno.EINVAL, errno.EIDRM)
RETRIES = 16
"""Attempts at a System V segment that a resize removes between look-up and attaching."""
_anonymous: weakref.WeakSet[ShmEngine] = weakref.WeakSet()


@atexit.register
def _close_anonymous() -> None:
    """An anonymous segment's semaphores go with its last user; a process that leaves without this leaves them to gc."""
    for engine in list(_anonymous):
        engine.close()


class ShmEngine(_core.Table, Engine):
    """A cache in one shared-memory segment; open it with `shmcache.open("posix:///name")`, sysv:///name or anon://.

    One object works in the process that opened it and in every process forked from it, in threads and in sub-interpreters
    (each opens its own). Reads take no guard and make no system call. A process killed inside a write leaves every committed
    item readable; the next writer of the shard repairs its page count.
    """

    OPTIONS: ClassVar[Mapping[str, Parser]] = OPTIONS
    capabilities = (
        Capability.EXPIRE | Capability.SUBSECOND | Capability.COUNTER | Capability.ATOMIC_CREATE | Capability.CAS
        | Capability.TTL | Capability.TOUCH | Capability.APPEND | Capability.ITERATE | Capability.LOCK | Capability.GRACE
        | Capability.SHARED | Capability.RAW
    )  # fmt: skip

    _form: str
    _name: str
    _options: dict[str, Any]
    _attachment: segment.Attachment

    @classmethod
    def from_url(cls, url: Url, **options: Any) -> Self:
        """Create or attach; see `segment.open_segment` for modes and errors, `OPTIONS` for options."""
        self = cls()
        self.url, self.engine_id = url, url.engine_id
        self._form = url.scheme
        if self._form != "anon":
            self.capabilities |= Capability.PERSIST
        if self._form == "anon":
            if url.hosts or url.path:
                raise ValueError(f"url anon: no host and no name wanted, {url} found")
            if options.get("mode", "c") not in ("c", "x"):
                raise ValueError(f"mode: c or x for an anonymous segment wanted, {options['mode']!r} found")
            self._name = url.group or ""
        else:
            self._name = url.segment_name()
        self._options = options
        self._open()
        return self

    def _open(self, like: dict[str, Any] | None = None, tries: int = 1) -> None:
        options = self._options
        codec = get_codec(options.get("codec", "msgpack"))
        self._refuse_pickle(codec, options.get("perms", 0o600))
        att = segment.open_segment(self._form, self._name, options, like)
        try:
            self._refuse_pickle(codec, att.header["perms"] | att.mode)
            self._attach(
                att.fd, att.shm_id, att.size, att.sem_id, options.get("mode") == "r", att.path,
                options.get("hugepages") == "try", bool(options.get("prefault")),
            )  # fmt: skip
        except BaseException as error:
            if att.created:  # nothing of a failed opening is left
                segment.unlink(self._form, self._name, att.header)
            if isinstance(error, OSError):
                if error.errno in _REMOVED and self._form == "sysv" and tries < RETRIES:
                    self._open(like, tries + 1)
                    return
                if error.errno == errno.ENOMEM:
                    raise refusal.no_memory(self._name, att.size, error) from error
                raise refusal.refused(f"segment {self._form}:{self._name}", error) from error
            raise
        finally:
            att.close()
            if att.form == "anon":
                segment.forget_anon(att)
        self._attachment = att
        self.default_ttl = options["default_ttl"] or None if "default_ttl" in options else (
            att.header["default_ttl_ms"] / 1000 or None
        )  # fmt: skip
        self._configure(codec, options.get("prefix", "").encode(), self.default_ttl, options.get("lock_timeout", 0.1))
        self._closed = False
        if self._form == "anon":
            _anonymous.add(self)

    @staticmethod
    def _refuse_pickle(codec: Codec, perms: int) -> None:
        if isinstance(codec, PickleCodec) and perms & 0o077:
            raise NotSupported(f"codec=pickle: a private segment (perms 0600) wanted, 0{perms:o} found")

    def close(self) -> None:
        """Detach; nobody else notices. The last user of an anonymous segment takes its semaphores along."""
        if self._attached:
            self._detach()
            self._closed = True

    def unlink(self) -> None:
        """Remove segment and semaphores. Every writer attached meets GuardLost at its next write; reads go on.

        Raises: NotSupported for mode="r", and where posix_ipc or sysv_ipc cannot be imported; nothing is removed then.
        """
        if self._readonly:
            raise NotSupported(f"unlink: segment {self._name} attached for writing wanted, mode='r' found")
        segment.require_packages(self._form)
        while not self._mark_removed():  # a resize was faster: what is removed is what replaced it
            pass
        segment.unlink(self._form, self._name, self._header(), self._attachment)

    def reattach(self) -> None:
        """Attach again, to whatever has the name now, created like the old one if nothing has (mode c); after GuardLost.

        The old mapping is let go first. Raises: as opening does; the engine is closed then.
        """
        if self._form == "anon":
            raise GuardLost("reattach: a segment with a name wanted, an anonymous one found")
        like = self._attachment.header
        self._detach()
        self._closed = True
        self._open(like)

    def resize(
        self,
        size: int | str | None = None,
        *,
        buckets: int | None = None,
        guards: int | None = None,
        item_size: int | None = None,
        max_value: int | str | None = None,
        workers: int | None = None,
        timeout: float = 5.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> resizing.Resized:
        """Replace the segment by one of another size with the same items; every process that has it attached follows.

        Args: size and the rest: as when opening; what is not given scales with the size, or stays where it was given to the
        segment. timeout: seconds that writers may be held up, at the end of the copy. progress: called with bucket groups
        copied and their number, during the first pass.
        Returns: what was done. Every item is there with its value, lifetime, version and use, except those that a smaller
        segment has no room for (`left_out`; least used first, never with eviction=none). Locks held stay held; over the change
        they are freed by release or the end of the lease, no more by the death of their holder.
        Raises: NoSpace for the memory, or for an item with eviction=none; ValueError for impossible geometry; LockTimeout when
        another resize is at work, a guard's holder is stopped, or the copy took longer than `timeout`; SegmentNotOurs unless
        run by the owner or root; NotSupported for anon://, mode=r and System V segments with an explicit key. The old segment
        is as it was then.
        Concurrency: others read and write all the while; writers wait while the last changes are copied. A process killed in
        here leaves the old segment, or the new one complete.
        """
        if self._readonly:
            raise NotSupported(f"resize: segment {self._name} attached for writing wanted, mode='r' found")
        options = {"size": size, "buckets": buckets, "guards": guards, "item_size": item_size, "max_value": max_value,
                   "workers": workers}  # fmt: skip
        given = {key: OPTIONS[key](key, str(value)) for key, value in options.items() if value is not None}
        done = None
        while done is None:
            view = self._view()
            done = resizing.resize(view, self._attachment, given, timeout=timeout, progress=progress)
            view._detach()
            self._header()  # follows
        return done

    def _follow(self) -> None:
        """Attach to the segment that a resize put in the place of this one; nothing if none of its lineage has the name."""
        mode = "r" if self._options.get("mode") == "r" else "a"
        kept = {key: value for key, value in self._options.items() if key not in resizing.GEOMETRY}
        for tries in range(1, RETRIES + 1):
            att = segment.open_segment(self._form, self._name, {**kept, "mode": mode})
            try:
                if catalog.lineage_of(att.header) != catalog.lineage_of(self._attachment.header):
                    return
                self._succeed(
                    att.fd, att.shm_id, att.size, att.sem_id, mode == "r", att.path, self._options.get("hugepages") == "try",
                    bool(self._options.get("prefault")),
                )  # fmt: skip
                self._attachment, self._options = att, kept
                return
            except OSError as error:
                if error.errno not in _REMOVED or tries == RETRIES:
                    raise
            finally:
                att.close()

    def _walk(self) -> tuple[range, Callable[[int], list[Key]]]:
        view = self._view()
        return range(view._n_groups), view._scan_keys

    def raw(self, command: str, *args: Any) -> Any:
        """`info` (the header), `guards`, `shards`, `keys GLOB`: this segment's own answers."""
        if command == "info":
            return self._header()
        if command == "guards":
            return self._guards()
        if command == "shards":
            return self._shards()
        if command == "keys":
            return list(self.keys(*args))
        raise NotSupported(f"raw: info, guards, shards or keys wanted, {command!r} found")

    def __reduce__(self) -> Any:
        raise TypeError(f"pickle: the engine's URL {self.url} wanted, the engine found; it works across fork as it is")
