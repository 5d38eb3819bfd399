"""shmcache.url: the grammar of engine URLs and the typing of options."""

import math
from datetime import timedelta

import pytest

from shmcache import url as u
from shmcache.url import Host, Url, parse_options


def hosts(*pairs):
    return tuple(Host(name, port) for name, port in pairs)


GOOD = [
    # text, group, user, password, hosts, path, options
    ("redis:g://", "g", None, None, (), "", {}), ("memory://", None, None, None, (), "", {}),
    ("redis:g://10.1.2.3", "g", None, None, hosts(("10.1.2.3", None)), "", {}),
    ("redis:g://10.1.2.3:6379", "g", None, None, hosts(("10.1.2.3", 6379)), "", {}),
    ("redis:g://u@h:6379", "g", "u", None, hosts(("h", 6379)), "", {}),
    ("redis:g://:pwd@h:6379", "g", "", "pwd", hosts(("h", 6379)), "", {}),
    ("redis:g://u:@h:6379", "g", "u", "", hosts(("h", 6379)), "", {}),
    ("redis:g://:pwd@h:6379/", "g", "", "pwd", hosts(("h", 6379)), "", {}),
    ("redis:g://:pwd@h:1/d?x=1&q=2", "g", "", "pwd", hosts(("h", 1)), "d", {"x": "1", "q": "2"}),
    ("redis:g://h1,h2,h3", "g", None, None, hosts(("h1", None), ("h2", None), ("h3", None)), "", {}),
    ("redis:g://h1:1,h2:22,h3:333", "g", None, None, hosts(("h1", 1), ("h2", 22), ("h3", 333)), "", {}),
    ("redis:g://h1,h2:22,h3", "g", None, None, hosts(("h1", None), ("h2", 22), ("h3", None)), "", {}),
    ("redis:g://h1,h2:333/", "g", None, None, hosts(("h1", None), ("h2", 333)), "", {}),
    ("redis:g://u@h1,h2", "g", "u", None, hosts(("h1", None), ("h2", None)), "", {}),
    ("redis:g://u:pwd@h1,h2/db", "g", "u", "pwd", hosts(("h1", None), ("h2", None)), "db", {}),
    ("redis:g://u:,pwd,foo,@h1,h2:6379/d", "g", "u", ",pwd,foo,", hosts(("h1", None), ("h2", 6379)), "d", {}),
    ("redis:g://:,pwd,@h1,h2/d", "g", "", ",pwd,", hosts(("h1", None), ("h2", None)), "d", {}),
    ("redis://u:p@ss@h/0", None, "u", "p@ss", hosts(("h", None)), "0", {}),
    ("redis://u:a:b:c@h/0", None, "u", "a:b:c", hosts(("h", None)), "0", {}),
    ("redis://u:p#s+s@h/0", None, "u", "p#s+s", hosts(("h", None)), "0", {}),
    ("redis://u:%2F%3F%40%25@h/0", None, "u", "/?@%", hosts(("h", None)), "0", {}),
    ("redis://u:[x@h/0", None, "u", "[x", hosts(("h", None)), "0", {}),
    ("redis://[::1]:6379/0", None, None, None, hosts(("::1", 6379)), "0", {}),
    ("redis://u:p@[::1],[fe80::1%25eth0]:7", None, "u", "p",
     hosts(("::1", None), ("fe80::1%eth0", 7)), "", {}),
    ("memcached://[/run/a,b.sock],h:1/", None, None, None, hosts(("/run/a,b.sock", None), ("h", 1)), "", {}),
    ("memcached://%2Frun%2Fa.sock/", None, None, None, hosts(("/run/a.sock", None)), "", {}),
    ("redis+unix:///run/r.sock?db=1", None, None, None, (), "run/r.sock", {"db": "1"}),
    ("redis+unix://:p@/run/r.sock", None, "", "p", (), "run/r.sock", {}),
    ("posix:///sessions?size=256M&buckets=65536", None, None, None, (), "sessions",
     {"size": "256M", "buckets": "65536"}),
    ("POSIX:///S%20%C3%A9", None, None, None, (), "S \u00e9", {}),
    ("sysv:///0x53484d43", None, None, None, (), "0x53484d43", {}),
    ("anon://?size=64M", None, None, None, (), "", {"size": "64M"}),
    ("tiered:a://?l1=posix:s&l2=memcached:g", "a", None, None, (), "",
     {"l1": "posix:s", "l2": "memcached:g"}),
    ("x://h/?health=posix:///h?size=1M&a==&b=+", None, None, None, hosts(("h", None)), "",
     {"health": "posix:///h?size=1M", "a": "=", "b": "+"}),
    ("x://h/?a=1%26b%3D2&", None, None, None, hosts(("h", None)), "", {"a": "1&b=2"}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "group", "user", "password", "where", "path", "options"), GOOD)
def test_good(text, group, user, password, where, path, options):
    """Each part of a URL is found, OpenSIPS' corner cases included."""
    url = Url.parse(text)
    assert url.scheme == text.split(":")[0].lower()
    found = (url.group, url.user, url.password, url.hosts, url.path, url.options)
    assert found == (group, user, password, where, path, options)


@pytest.mark.parametrize("text", [row[0] for row in GOOD])
def test_unmasked_parses_back(text):
    """unmasked() is text that parses to an equal, equally hashed Url."""
    url = Url.parse(text)
    again = Url.parse(url.unmasked())
    assert again == url
    assert hash(again) == hash(url)


@pytest.mark.parametrize(
    "text",
    [
        "", "memory", "memory:", "memory:/", "posix:sessions", "://h", "1x://h", "d g://h", "d::///",
        "d:a:b://h", "d:a/b://h", "d:g://@", "d:g://u:@", "d:g://u:p", "d:g://u:p@", "d:g://u:p@h:",
        "d:g://h:", "d://h:0", "d://h:65536", "d://h:-1", "d://h:1a", "d://h:\u0661", "d://h:1:2", "d://::1",
        "d://a,,b", "d://a,", "d://,a", "d://[::1", "d://[::1]x", "d://[zz]", "d://[/a]:1", "d://a[b]",
        "d://a b", "d://h/\0", "d://h/%00", "d://h\n/", "d://h/%ff", "d://h?a", "d://h?=1", "d://h?a=1&a=2",
        "d:%00://h",
    ],
)  # fmt: skip
def test_bad(text):
    """A malformed URL is a ValueError that names the URL's part."""
    with pytest.raises(ValueError, match="url"):
        Url.parse(text)


@pytest.mark.parametrize("text", [None, b"memory://", 5])
def test_bad_type(text):
    """A URL is a str."""
    with pytest.raises(TypeError, match="url"):
        Url.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "r://u:s3cret@h/0",
        "r://:s3cret@h1,h2",
        "r://u:x@s3cret@h",
        "r://h?password=s3cret",
        "r://h?up=r://u:s3cret@h",
    ],
)
def test_password_is_hidden(text):
    """Neither str nor repr of a Url has a password in it."""
    url = Url.parse(text)
    assert "s3cret" in url.unmasked()
    for shown in (str(url), repr(url), f"{url}", repr([url])):
        assert "s3cret" not in shown


@pytest.mark.parametrize(
    "text",
    [
        "r://u:s3cret", "r://u:s3cret/x@h", "r://u:s3cret?x@h", "r://u:s3cret@h:x", "r://u:s3cret@h,,i",
        "r://u:s3cret@[x]", "r://u:s3cret@h?a", "u:s3cret@h", "r://u:s3cret@", "r://u:s3cret@h\n",
        "r:g/:s3cret@h", "r:g/://u:s3cret",
    ],
)  # fmt: skip
def test_password_is_not_in_errors(text):
    """An error about a URL does not show its password, wherever the URL is wrong."""
    with pytest.raises(ValueError, match="url") as caught:
        Url.parse(text)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "engine_id"),
    [
        ("memory://", "memory"),
        ("memory:a://", "memory:a"),
        ("posix:///sessions", "posix:sessions"),
        ("posix:grp:///sessions", "posix:grp"),
        ("sysv:///s?size=1M", "sysv:s"),
        ("memcached:cluster1://h", "memcached:cluster1"),
        ("redis://h/5", "redis"),
        ("anon://", "anon"),
    ],
)
def test_engine_id(text, engine_id):
    """engine_id is scheme:group; for posix and sysv the segment's name stands in for a missing group."""
    assert Url.parse(text).engine_id == engine_id


def test_segment_name():
    """A segment's name is the path."""
    assert Url.parse("posix:///a.b-c_\u00e9").segment_name() == "a.b-c_\u00e9"
    assert Url.parse("posix:///" + "n" * 200).segment_name() == "n" * 200


@pytest.mark.parametrize(
    "text",
    [
        "posix://", "posix:///", "posix://sessions", "posix://u@h/s", "posix:///a/b", "posix:////a",
        "posix:///a/", "posix:///.", "posix:///..", "posix:///../a", "posix:///a%2Fb", "posix:///a%0Ab",
        "posix:///" + "n" * 201, "posix:///" + "\u00e9" * 101,
    ],
)  # fmt: skip
def test_bad_segment_name(text):
    """A name with a slash or a control character, an empty, dotted or too long one, or a host is refused."""
    with pytest.raises(ValueError, match=r"segment|host"):
        Url.parse(text).segment_name()


def test_unix_path():
    """unix_path is the path of a URL without hosts."""
    assert Url.parse("redis+unix:///run/r.sock").unix_path == "/run/r.sock"
    assert Url.parse("redis://h/0").unix_path is None
    assert Url.parse("memory://").unix_path is None
    assert Url.parse("m://[/run/a.sock],h").hosts[0].is_unix
    assert not Url.parse("m://[/run/a.sock],h").hosts[1].is_unix


TABLE = {
    "size": u.size(1024),
    "count": u.integer(1, 100),
    "wait": u.seconds(),
    "flag": u.boolean,
    "kind": u.choice("a", "b"),
    "perms": u.permissions,
    "names": u.words,
    "call": u.keyword_only(u.function),
    "label": u.text,
}


@pytest.mark.parametrize(
    ("name", "value", "typed"),
    [
        ("size", "256M", 256 << 20), ("size", "64k", 65536), ("size", "1GiB", 1 << 30),
        ("size", "65536", 65536), ("size", "2KB", 2048), ("size", 4096, 4096), ("count", "100", 100),
        ("count", 1, 1), ("wait", "0.5", 0.5), ("wait", 3, 3.0), ("wait", timedelta(minutes=1), 60.0),
        ("flag", "YES", True), ("flag", "off", False), ("flag", 1, True), ("flag", False, False),
        ("kind", "b", "b"), ("perms", "0640", 0o640), ("perms", "0o600", 0o600), ("perms", 0o660, 0o660),
        ("names", "a, b", ("a", "b")), ("names", ["a", 5], ("a", "5")), ("names", 0, ("0",)),
        ("call", len, len), ("label", "x", "x"),
    ],
)  # fmt: skip
def test_options(name, value, typed):
    """Options are typed from text and from native values alike."""
    assert parse_options("x", TABLE, {}, {name: value}) == {name: typed}
    if isinstance(value, str):
        assert parse_options("x", TABLE, {name: value}, {}) == {name: typed}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("size", "12Q", ValueError), ("size", "", ValueError), ("size", "-1", ValueError),
        ("size", "1023", ValueError), ("size", "1.5M", ValueError), ("size", 2**63, ValueError),
        ("size", "9" * 5000, ValueError), ("size", True, TypeError), ("size", 1e6, TypeError),
        ("count", "0", ValueError), ("count", 101, ValueError), ("count", "x", ValueError),
        ("wait", "x", ValueError), ("wait", "nan", ValueError), ("wait", math.inf, ValueError),
        ("wait", -1, ValueError), ("wait", u.MAX_TTL + 1, ValueError), ("wait", 10**400, ValueError),
        ("wait", True, TypeError), ("wait", [1], TypeError), ("flag", "maybe", ValueError),
        ("flag", 2, ValueError), ("flag", None.__class__, TypeError), ("kind", "c", ValueError),
        ("kind", 5, TypeError), ("perms", "0999", ValueError), ("perms", 0o1777, ValueError),
        ("names", [b"a"], TypeError), ("call", 5, TypeError), ("label", b"x", TypeError),
    ],
)  # fmt: skip
def test_bad_options(name, value, error):
    """A bad value names the option."""
    with pytest.raises(error, match=name):
        parse_options("x", TABLE, {}, {name: value})


def test_unknown_option():
    """The error about an unknown option lists the known ones."""
    for written, keywords in (({"sise": "1M"}, {}), ({}, {"sise": "1M"})):
        with pytest.raises(ValueError, match=r"sise.*count, flag, kind"):
            parse_options("x", TABLE, written, keywords)


def test_option_given_twice():
    """An option in the URL and as keyword has to have one value, however it is written."""
    assert parse_options("x", TABLE, {"size": "1M"}, {"size": 1 << 20}) == {"size": 1 << 20}
    assert parse_options("x", TABLE, {"size": "1M"}, {"size": None}) == {"size": 1 << 20}
    with pytest.raises(ValueError, match=r"size.*1048576.*2097152"):
        parse_options("x", TABLE, {"size": "1M"}, {"size": "2M"})


def test_objects_are_keywords_only():
    """An option that is an object is refused in a URL."""
    with pytest.raises(ValueError, match="call"):
        parse_options("x", TABLE, {"call": "len"}, {})
