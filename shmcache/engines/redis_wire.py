"""How items lie in Redis, and the scripts that know it. No driver is imported here.

A value is one Redis string:

    canonical decimal text            an int of any size: `0`, or an optional `-`, then digits without leading
                                      zero. What INCRBY and other clients read and write.
    0x0E flags nonce payload          anything else; flags as in codec.py, nonce 8 random bytes of the write
    0x0F grace value                  either of the above with a soft deadline: grace is 12 decimal digits,
                                      the ms before the key's own expiry at which it is absent for all but
                                      get_or_set
    other bytes                       another client's: read as bytes

I1  A CAS token is flags and nonce, so a write of an equal value is a change. An int has no room for a nonce:
    `gets` puts it into the tagged form (flags 2), and the next write of ours makes it plain again. Between
    the two, other clients see the tagged form.
I2  A script reads and writes one key (a lease also its fence), so that a cluster can run it, and is all of
    its operation: nothing is left half done by a client that dies.
I3  Lifetimes are the server's: PTTL decides about soft deadlines, no client's clock is asked.

Keys: prefix and key. What begins with 0xFF `L` after the prefix is reserved: 0xFF `L` 0x00 is a lease or a
fence, 0xFF `L` 0x01 stands for a key that itself begins with 0xFF `L`. A str key never does.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Callable
from typing import Any, Final

from ..arguments import Key, key_text
from ..codec import BIGINT, INT, Codec, pack, unpack

__all__ = ["HEADER", "Keys", "Script", "decode", "encode", "grace_head", "is_graced", "is_text", "token"]

TAGGED: Final = 0x0E
GRACED: Final = 0x0F
HEADER: Final = 10
"""Bytes before the payload of a tagged value: marker, flags, nonce."""
GRACE_HEADER: Final = 13
N_FENCES: Final = 64
"""Fence counters, each with the leases that hash to it in one cluster slot: 64 spread over any cluster's
nodes, and are 64 small keys at most."""

_DECIMAL = re.compile(rb"0|-?[1-9][0-9]*")
_RESERVED = b"\xffL"


def encode(value: Any, codec: Codec) -> bytes:
    """The stored form. TypeError for a value that the codec cannot take."""
    flags, data = pack(value, codec, wire=True)
    if flags in (INT, BIGINT):
        return data
    return bytes((TAGGED, flags)) + os.urandom(8) + data


def decode(stored: bytes, codec: Codec) -> Any:
    """The value of a stored form without soft deadline.

    Raises: ShmCacheError for bytes that do not decode, NotSupported for the payload of another codec.
    """
    if stored[:1] == b"\x0e" and len(stored) >= HEADER:
        flags = BIGINT if stored[1] == INT else stored[1]  # `gets` tags ints of any size alike
        return unpack(flags, stored[HEADER:], codec, wire=True)
    if _DECIMAL.fullmatch(stored):
        return unpack(BIGINT, stored, codec)
    return stored


def token(stored: bytes) -> bytes:
    """What `cas` compares: marker, flags and nonce; of another client's value all of it."""
    return stored[:HEADER] if stored[:1] == b"\x0e" else stored


def grace_head(seconds: float) -> bytes:
    """What stands before a value whose soft deadline is `seconds` before its hard one."""
    return b"\x0f%012d" % round(seconds * 1000)


def is_graced(stored: bytes) -> bool:
    """Whether it has a soft deadline, passed or not."""
    return stored[:1] == b"\x0f" and len(stored) >= GRACE_HEADER


class Keys:
    """Names of keys, leases and fences in the server, under one prefix."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix.encode()
        self.pattern = re.sub(rb"([*?\[\]\\^-])", rb"\\\1", self.prefix) + b"*"
        self.leases = self.prefix + _RESERVED + b"\0"

    def name(self, key: bytes) -> bytes:
        if key.startswith(_RESERVED):
            return self.prefix + _RESERVED + b"\1" + key[2:]
        return self.prefix + key

    def key(self, name: bytes) -> Key:
        """The key of a stored name; `name` undone."""
        key = name[len(self.prefix) :]
        if key.startswith(_RESERVED):
            key = _RESERVED + key[3:]
        return key_text(key)

    def lease(self, name: bytes) -> tuple[bytes, bytes]:
        """The names of a lease and of its fence: one hash tag, so one slot."""
        fence = self.leases + b"{%02x}" % (zlib.crc32(name) % N_FENCES)
        return fence + name, fence


def is_text(reply: Any) -> bool:
    return reply is None or type(reply) is bytes


def is_number(reply: Any) -> bool:
    return type(reply) is int


def is_text_or_number(reply: Any) -> bool:
    return reply is None or type(reply) in (bytes, int)


def is_pair(reply: Any) -> bool:
    return reply is None or (type(reply) is list and list(map(type, reply)) == [bytes, int])


def is_page(reply: Any) -> bool:
    """Of a scan: the cursor, then pairs of name and size."""
    if type(reply) is not list or list(map(type, reply)) != [bytes] + [bytes, int] * (len(reply) // 2):
        return False
    return bool(reply[0].isdigit())


class Script:
    """A Lua script and the SHA-1 by which EVALSHA knows it; KEYS[1] is the item, or the lease. takes: whether
    a reply is of the form that the script gives."""

    def __init__(self, takes: Callable[[Any], bool], text: str) -> None:
        self.takes = takes
        self.text = _COMMON + text
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


# px is a lifetime in ms, '' for ever, '0' over.
_COMMON = r"""
local key = KEYS[1]
local function peek(key)
  -- ms left (-1: for ever) and what stands before the value; nothing if absent
  local left = redis.call('PTTL', key)
  if left == -2 then return end
  local head = redis.pcall('GETRANGE', key, 0, 12)
  if type(head) ~= 'string' then return left, '', true end
  if string.byte(head) ~= 15 or #head < 13 then return left, '' end
  if left == -1 then return left, head end
  left = left - tonumber(string.sub(head, 2))
  if left > 0 then return left, head end
end
local function store(value, px)
  if px == '' then redis.call('SET', key, value)
  elseif px == '0' then redis.call('DEL', key)
  else redis.call('SET', key, value, 'PX', px) end
end
local function decimal(value)
  return value == '0' or string.find(value, '^%-?[1-9]%d*$') ~= nil
end
"""

READ = Script(
    is_pair,
    r"""
local left, head = peek(key)
if not left then return false end
return {string.sub(redis.call('GET', key), #head + 1), left}
""",
)
"""{value, ms left}, or nil."""

GRACE = Script(
    is_pair,
    r"""
local value = redis.call('GET', key)
if not value then return false end
if string.byte(value) ~= 15 or #value < 13 then return {value, 1} end
return {string.sub(value, 14), peek(key) and 1 or 0}
""",
)
"""{value, 1 before or 0 after the soft deadline}, or nil."""

GETS = Script(
    is_text,
    r"""
local left, head = peek(key)
if not left then return false end
local value = string.sub(redis.call('GET', key), #head + 1)
if decimal(value) then
  value = '\14\2' .. ARGV[1] .. value
  redis.call('SET', key, head .. value, 'KEEPTTL')
end
return value
""",
)
"""nonce -> value, or nil."""

TTL = Script(is_number, "local left = peek(key)\nreturn left or -2")
"""ms left, -1 for ever, -2 absent."""

PUT = Script(
    is_number,
    r"""
if (peek(key) ~= nil) ~= (ARGV[1] == '1') then return 0 end
store(ARGV[2], ARGV[3])
return 1
""",
)
"""1 if it must be there or 0 if not, value, px -> stored or not."""

CAS = Script(
    is_number,
    r"""
local left, head, other = peek(key)
if not left then return -1 end
if other then return 0 end
local last = ARGV[2] == '1' and -1 or #head + #ARGV[1] - 1
if redis.call('GETRANGE', key, #head, last) ~= ARGV[1] then return 0 end
store(ARGV[3], ARGV[4])
return 1
""",
)
"""token, 1 if it is the whole value, value, px -> 1 stored, 0 changed, -1 absent."""

DELETE = Script(
    is_number,
    r"""
local live = peek(key)
redis.call('UNLINK', key)
return live and 1 or 0
""",
)

POP = Script(
    is_text,
    r"""
local left, head = peek(key)
local value = left and string.sub(redis.call('GET', key), #head + 1)
redis.call('UNLINK', key)
return value
""",
)

TOUCH = Script(
    is_text_or_number,
    r"""
local left, head = peek(key)
if not left then return false end
local value = (head ~= '' or ARGV[2] == '1') and string.sub(redis.call('GET', key), #head + 1)
if head ~= '' then store(value, ARGV[1])
elseif ARGV[1] == '' then redis.call('PERSIST', key)
elseif ARGV[1] == '0' then redis.call('UNLINK', key)
else redis.call('PEXPIRE', key, ARGV[1]) end
return value or 1
""",
)
"""px, 1 if the value is wanted -> the value or 1, nil if absent. Ends a grace: one deadline is left."""

INCR = Script(
    is_text,
    r"""
local left, head, other = peek(key)
if not left then
  if ARGV[2] == '' then return false end
  if ARGV[2] ~= 'over' then store(ARGV[2], ARGV[3]) end
  return ARGV[2]
end
if other then return 'nan' end
local old = redis.call('GET', key)
local plain = string.sub(old, #head + 1)
if string.sub(plain, 1, 2) == '\14\2' then plain = string.sub(plain, 11) end
if not decimal(plain) then return 'nan' end
if plain ~= old then redis.call('SET', key, plain, 'KEEPTTL') end
local done = redis.pcall('INCRBY', key, ARGV[1])
if type(done) == 'table' then
  if plain ~= old then redis.call('SET', key, old, 'KEEPTTL') end
  if string.find(done.err, 'overflow') or string.find(done.err, 'not an integer') then return 'over' end
  return done
end
local new = redis.call('GET', key)
if head ~= '' then redis.call('SET', key, head .. new, 'KEEPTTL') end
return new
""",
)
"""delta, what to create with ('' nothing, 'over' cannot), px -> text of the new number, 'nan', 'over', nil.
The number is read back as text: Lua's are doubles."""

JOIN = Script(
    is_number,
    r"""
local left, head, other = peek(key)
if not left then return 0 end
if other or redis.call('GETRANGE', key, #head, #head + 1) ~= '\14' .. ARGV[2] then return -1 end
local length = redis.call('STRLEN', key) - #head - 10 + #ARGV[3]
if length > tonumber(ARGV[5]) then return -2 - length end
if ARGV[1] == 'append' then
  redis.call('APPEND', key, ARGV[3])
  redis.call('SETRANGE', key, #head + 2, ARGV[4])
else
  local payload = redis.call('GETRANGE', key, #head + 10, -1)
  redis.call('SET', key, head .. '\14' .. ARGV[2] .. ARGV[4] .. ARGV[3] .. payload, 'KEEPTTL')
end
return 1
""",
)
"""append or prepend, flags, data, nonce, longest payload -> 1, 0 absent, -1 another type, -2 - length."""

SCAN = Script(
    is_page,
    r"""
local page = redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', ARGV[3])
local out = {page[1]}
for _, name in ipairs(page[2]) do
  -- an error here: a key of a slot that is being moved to or from this node
  if type(redis.pcall('PTTL', name)) == 'number' and string.sub(name, 1, #ARGV[4]) ~= ARGV[4] then
    local left, head, other = peek(name)
    if left and not other then
      out[#out + 1] = name
      out[#out + 1] = redis.call('STRLEN', name) - #head
    end
  end
end
return out
""",
)
"""cursor, pattern, count, prefix of leases -> {next cursor, name, bytes, name, bytes, ...}. No KEYS: the
script looks at what the node it runs on has, which lies in several slots."""

WIPE = Script(
    is_page,
    r"""
local page = redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', ARGV[3])
for _, name in ipairs(page[2]) do
  if string.sub(name, 1, #ARGV[4]) ~= ARGV[4] then redis.pcall('UNLINK', name) end
end
return {page[1]}
""",
)
"""As SCAN, and removes, whatever the type."""

LEASE_TAKE = Script(
    is_text,
    r"""
if not redis.call('SET', key, ARGV[1], 'NX', 'PX', ARGV[2]) then return false end
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local fence = redis.call('INCR', KEYS[2])
if fence < now then
  fence = now
  redis.call('SET', KEYS[2], string.format('%.0f', fence))
end
return string.format('%.0f', fence)
""",
)
"""owner, ms -> fence, or nil if held. A fence is at least the server's time in us: it grows also after the
counter was lost."""

LEASE_EXTEND = Script(
    is_number,
    r"""
if redis.call('GET', key) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', key, ARGV[2])
""",
)

LEASE_RELEASE = Script(
    is_number,
    r"""
if redis.call('GET', key) ~= ARGV[1] then return 0 end
return redis.call('DEL', key)
""",
)

BY_SHA: Final = {thing.sha: thing for thing in list(globals().values()) if isinstance(thing, Script)}
