"""One item from the shell: get, ttl, set, delete, incr, touch."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Annotated, Any

import typer

from ..arguments import MISS, key_text
from ..inspect import View
from .app import Escaped, Json, KeyArg, Look, Target, command, key_of, lifetime_of, output, readable, seconds_left, writable
from .output import Code, json_key, json_value, plain, shown

Ttl = Annotated[
    str | None,
    typer.Option("--ttl", metavar="SECONDS", help="Lifetime: seconds, or with ms s m h d; 0 or never; default: the cache's."),
]
ExpireAt = Annotated[float | None, typer.Option("--expire-at", metavar="UNIXTIME", help="End of the lifetime.")]


def _shown(key: bytes) -> str:
    return plain(key_text(key))


@command("get", epilog="  shmcache get sessions user:7\n  shmcache get sessions photo --raw > photo.jpg")
def get(
    target: Look,
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="One key or several.")],
    raw: Annotated[bool, typer.Option("--raw", help="The bytes of str and bytes values as they are, nothing added.")] = False,
    escaped: Escaped = False,
    as_json: Json = False,
) -> int:
    """Print values; of several keys, each with its key before it. 1 when one is absent.

    Looks without counting as a use. Text and bytes are escaped unless --raw; containers are printed as Python writes them,
    with --json as JSON (bytes as {"base64": ...}).
    """
    code, out = Code.OK, output(as_json)
    names = [key_of(key, escaped) for key in keys]
    with readable(target) as cache:
        for name in names:
            value = cache.value(key_text(name)) if isinstance(cache, View) else cache.get(name, MISS)
            if value is MISS:
                code = Code.ABSENT
            elif as_json:
                out.json({**json_key(key_text(name)), "type": type(value).__name__, "value": json_value(value)})
            elif raw:
                sys.stdout.flush()
                data = value.encode() if isinstance(value, str) else value if isinstance(value, bytes) else repr(value).encode()
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            else:
                out.line(shown(value) if len(names) == 1 else f"{_shown(name)}\t{shown(value)}")
    return code


@command("ttl", epilog="  shmcache ttl sessions user:7")
def ttl(target: Look, key: KeyArg, escaped: Escaped = False, as_json: Json = False) -> int:
    """Print the seconds left, inf (with --json: null) for an item that never expires. 1 when it is absent."""
    name = key_of(key, escaped)
    with readable(target) as cache:
        left = cache.ttl(key_text(name))
    if left is None:
        return Code.ABSENT
    out = output(as_json)
    if as_json:
        out.json({**json_key(key_text(name)), "ttl": seconds_left(left)})
    else:
        out.line("inf" if math.isinf(left) else f"{left:.3f}")
    return Code.OK


def _boolean(text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return words[text.lower()]


_TYPES: dict[str, Any] = {
    "str": str, "int": int, "float": float, "bool": _boolean, "bytes": os.fsencode, "json": json.loads,
    "none": lambda text: None,
}  # fmt: skip


def _value(kind: str, text: str) -> Any:
    """The value written as `text`; what is wrong with it is told without it: it may be a password."""
    try:
        return _TYPES[kind](text)
    except (ValueError, KeyError):
        raise ValueError(f"value: {_WORDS.get(kind, kind)} wanted, other text found") from None


_WORDS = {"json": "JSON", "bool": "true or false", "int": "a whole number", "float": "a number"}


@command("set", numbers=True, epilog=(
    "  shmcache set sessions user:7 ann --ttl 20m\n"
    "  shmcache set sessions limits '{\"a\": 1}' --type json\n"
    "  shmcache set sessions photo - --type bytes < photo.jpg"
))  # fmt: skip
def set_(
    target: Target,
    key: KeyArg,
    value: Annotated[str, typer.Argument(metavar="VALUE", help="The value; - reads it from stdin.")],
    kind: Annotated[str, typer.Option("--type", "-t", metavar="TYPE", help=f"{', '.join(_TYPES)}.")] = "str",
    ttl: Ttl = None,
    expire_at: ExpireAt = None,
    add: Annotated[bool, typer.Option("--add", help="Only if absent.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Only if present.")] = False,
    escaped: Escaped = False,
    as_json: Json = False,
) -> int:
    """Store a value, a text unless --type says otherwise. 1 when --add or --replace did not store.

    A segment must exist; a URL with mode=c creates it: `shmcache set 'posix:///s?mode=c&size=8M' k v`.
    """
    if kind not in _TYPES:
        raise ValueError(f"type: one of {', '.join(_TYPES)} wanted, {kind!r} found")
    if add and replace:
        raise ValueError("add, replace: one of the two wanted, both found")
    name, seconds = key_of(key, escaped), lifetime_of(ttl)
    if value == "-":
        data = sys.stdin.buffer.read()
        content = data if kind == "bytes" else _value(kind, data.decode())
    else:
        content = _value(kind, value)
    with writable(target) as cache:
        store = cache.add if add else cache.replace if replace else cache.set
        stored = store(name, content, seconds, expire_at=expire_at)
    if as_json:
        output(True).json({**json_key(key_text(name)), "stored": stored})
    return Code.OK if stored else Code.ABSENT


@command("delete", epilog="  shmcache delete sessions user:7 user:8\n  shmcache delete sessions --match 'user:*'")
def delete(
    target: Target,
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY...]", help="Keys to remove.")] = None,
    match: Annotated[str | None, typer.Option("--match", "-m", metavar="GLOB", help="Remove what matches.")] = None,
    escaped: Escaped = False,
    as_json: Json = False,
) -> int:
    """Remove items and print how many there were. 1 when there was none."""
    names = [key_of(key, escaped) for key in keys or ()]
    if not names and match is None:
        raise ValueError("delete: a key or --match wanted, none found")
    with writable(target) as cache:
        n = cache.delete_many(names) if names else 0
        n += cache.delete_match(match) if match is not None else 0
    out = output(as_json)
    if as_json:
        out.json({"deleted": n})
    else:
        out.line(str(n))
    return Code.OK if n else Code.ABSENT


@command("incr", numbers=True, epilog="  shmcache incr sessions calls\n  shmcache incr sessions calls -5 --initial 100 --ttl 1h")
def incr(
    target: Target,
    key: KeyArg,
    delta: Annotated[int, typer.Argument(metavar="[DELTA]", help="What to add; may be negative.")] = 1,
    initial: Annotated[int, typer.Option("--initial", metavar="N", help="What an absent counter starts from.")] = 0,
    existing: Annotated[bool, typer.Option("--existing", help="Do not create an absent counter; end with 1.")] = False,
    ttl: Ttl = None,
    escaped: Escaped = False,
    as_json: Json = False,
) -> int:
    """Add to a 64-bit counter and print the new number. The lifetime counts only when it creates."""
    name, seconds = key_of(key, escaped), lifetime_of(ttl)
    with writable(target) as cache:
        new = cache.incr(name, delta, initial=None if existing else initial, ttl=seconds)
    if new is None:
        return Code.ABSENT
    out = output(as_json)
    if as_json:
        out.json({**json_key(key_text(name)), "value": new})
    else:
        out.line(str(new))
    return Code.OK


@command("touch", epilog="  shmcache touch sessions user:7 20m\n  shmcache touch sessions user:7 never")
def touch(
    target: Target,
    key: KeyArg,
    ttl: Annotated[str | None, typer.Argument(metavar="[SECONDS]", help="As --ttl of set; default: the cache's.")] = None,
    expire_at: ExpireAt = None,
    escaped: Escaped = False,
    as_json: Json = False,
) -> int:
    """Give an item a new lifetime. 1 when it is absent."""
    name, seconds = key_of(key, escaped), lifetime_of(ttl)
    with writable(target) as cache:
        touched = cache.touch(name, seconds, expire_at=expire_at)
    if as_json:
        output(True).json({**json_key(key_text(name)), "touched": touched})
    return Code.OK if touched else Code.ABSENT
