"""web: the live report, asked by real requests on the loopback."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import shmcache
from shmcache.report_html import STYLE
from shmcache.web import HEADERS, Live

if importlib.util.find_spec("typer") is None or importlib.util.find_spec("rich") is None:
    pytest.skip("typer and rich are not installed", allow_module_level=True)

from shmcache.cli.output import Code

from .browser_help import picture
from .cli_help import run
from .shm_help import wait_for


class Asked:
    """An answer: status, headers, text."""

    def __init__(self, url: str, method: str = "GET", path: str | None = None, **headers: str) -> None:
        parts = urlsplit(url)
        with closing(HTTPConnection(parts.hostname or "", parts.port, timeout=30)) as connection:
            connection.putrequest(method, path or f"{parts.path}?{parts.query}", skip_host=True)
            for name, value in {"Host": parts.netloc, **headers}.items():
                if value:
                    connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            self.status, self.headers, self.text = answer.status, answer.headers, answer.read().decode()


def start(*args: str) -> tuple[subprocess.Popen[str], str]:
    """A server process, and the URL it printed."""
    shell = [sys.executable, "-m", "shmcache", "web", *args]
    child = subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")
    assert child.stdout is not None
    return child, child.stdout.readline().strip()


def end(child: subprocess.Popen[str], number: int = signal.SIGTERM) -> tuple[int, str, str]:
    os.kill(child.pid, number)
    out, err = child.communicate(timeout=30)
    return child.returncode, out, err


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, str]]:
    """(segment name, URL) of a server on a segment of some items."""
    name = f"t{os.getpid()}-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}-web"
    engine = shmcache.open(f"posix:///{name}", size="1M")
    engine.set("user:1", "secret", ttl=100)
    engine.set("<b>\x1b", "secret")
    child, url = start(name, "--refresh", "1")
    try:
        yield name, url
    finally:
        assert end(child) == (0, "", "")
        engine.unlink()
        engine.close()


def test_the_page(served: tuple[str, str]) -> None:
    """The printed URL gives the report, without values, renewing itself, and allowed to load nothing but its own style."""
    name, url = served
    assert re.fullmatch(r"http://127\.0\.0\.1:[0-9]+/\?token=[\w-]{32}", url)
    answer = Asked(url)
    assert answer.status == 200
    assert {"user:1", "&lt;b&gt;\\x1b", name} <= set(re.findall(r"[^<>]+", answer.text))
    assert "secret" not in answer.text
    assert answer.headers["Refresh"] == "1"
    assert {n: answer.headers[n] for n in HEADERS} == HEADERS
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert f"<style>{STYLE}</style>" in answer.text
    assert not re.search(r"\bstyle=|\bsrc=|\bhref=|<script|url\(|@import", answer.text)


def test_in_a_browser(served: tuple[str, str], tmp_path: Path) -> None:
    """A browser shows the served page in its colours: what the headers forbid, the page does not need."""
    ground = re.search(r"--ground:(#[0-9a-f]{6})", STYLE)
    assert ground is not None
    assert picture(served[1], tmp_path).corner == ground[1]


def test_a_page_follows_the_segment(served: tuple[str, str]) -> None:
    """A page asked for later shows what was stored meanwhile."""
    name, url = served
    assert shmcache.engine(f"posix:{name}").set("x" * 30, "v" * 9000)
    wait_for(lambda: "x" * 30 in Asked(url).text)


@pytest.mark.parametrize(("path", "status"), [
    ("/", 403), ("/?token=", 403), ("/?token=wrong", 403), ("/?token=%ff%00", 403), ("/?token={}x", 403), ("/other", 403),
    ("/other?token={}", 404), ("/../etc/passwd?token={}", 404), ("/?token={}", 200),
    ("/?token=x&token={}", 403),
])  # fmt: skip
def test_only_the_token_opens(path: str, status: int, served: tuple[str, str]) -> None:
    """Without the token, or with another, everything is 403; with it there is one page."""
    _, url = served
    assert Asked(url, path=path.format(url.partition("token=")[2])).status == status


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{}", "127.0.0.1", "127.0.0.1:1", "[::1]:{}", ""])
def test_only_its_own_name(host: str, served: tuple[str, str]) -> None:
    """A request under another host name, as after DNS rebinding, is 403 though it knows the token."""
    _, url = served
    assert Asked(url, Host=host.format(urlsplit(url).port)).status == 403


def test_localhost_is_its_name_too(served: tuple[str, str]) -> None:
    """localhost with the right port is answered."""
    _, url = served
    assert Asked(url, Host=f"localhost:{urlsplit(url).port}").status == 200


@pytest.mark.parametrize(("method", "status"), [
    ("HEAD", 200), ("POST", 405), ("PUT", 405), ("DELETE", 405), ("PATCH", 405), ("OPTIONS", 405), ("TRACE", 405), ("FOO", 501),
])  # fmt: skip
def test_it_only_reads(method: str, status: int, served: tuple[str, str]) -> None:
    """HEAD has the headers of GET and no body; other methods are refused."""
    _, url = served
    answer = Asked(url, method)
    assert answer.status == status
    assert method != "HEAD" or (answer.text == "" and int(answer.headers["Content-Length"]) > 5000)
    assert Asked(url, method, path="/").status in (403, 501)


def test_it_listens_on_the_loopback_only(served: tuple[str, str]) -> None:
    """The socket is bound to 127.0.0.1, not to every address."""
    port = urlsplit(served[1]).port or 0
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
    assert not any(f":{port:04X} " in line for line in Path("/proc/net/tcp6").read_text().splitlines())


def test_no_http_is_no_page(served: tuple[str, str]) -> None:
    """Bytes that are no request get a number and nothing back of what they said."""
    with socket.create_connection(("127.0.0.1", urlsplit(served[1]).port or 0), timeout=30) as raw:
        raw.sendall(b"<script>hello</script> x y z\r\n\r\n")
        answer = raw.makefile("rb").read()
    assert b"400" in answer
    assert b"script" not in answer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_quietly(number: int, unique_name: Callable[[], str]) -> None:
    """SIGINT and SIGTERM end the server with 0 and no message, and its port is free again."""
    with shmcache.open(f"sysv:///{unique_name()}", size="1M") as engine:
        child, url = start(f"sysv:{engine.url.path}", "--refresh", "60")
        assert Asked(url).headers["Refresh"] == "60"
        port = urlsplit(url).port or 0
        assert run("web", f"sysv:{engine.url.path}", "--port", str(port)).code == Code.OTHER
        assert end(child, number) == (0, "", "")
        child, url = start(f"sysv:{engine.url.path}", "--port", str(port))
        assert urlsplit(url).port == port
        assert end(child, number) == (0, "", "")
        engine.unlink()


def test_a_new_segment_of_the_name_is_followed(unique_name: Callable[[], str]) -> None:
    """The page of a segment that was removed says so; once another has its name, the page is of that."""
    name = unique_name()
    with shmcache.open(f"posix:///{name}", size="1M") as engine:
        engine.set("old", 1)
        live = Live(name, 0.0, None)
        engine.unlink()
        live.watch()
        assert "The segment was removed" in live.page()
    with shmcache.open(f"posix:///{name}", size="1M") as engine:
        engine.set("new", 1)
        live.watch()
        page = live.page()
        live.close()
        engine.unlink()
    assert "removed" not in page
    assert ">new<" in page
    assert ">old<" not in page


def test_a_segment_removed_by_an_outsider(unique_name: Callable[[], str]) -> None:
    """The page of a segment whose file somebody removed says so."""
    name = unique_name()
    with shmcache.open(f"posix:///{name}", size="1M") as engine:
        engine.set("old", 1)
        live = Live(name, 0.0, None)
        assert "The segment was removed" not in live.page()
        os.rename(f"/dev/shm/shmcache.{name}", f"/dev/shm/shmcache.{name}-away")
        live.watch()
        assert "The segment was removed" in live.page()
        os.rename(f"/dev/shm/shmcache.{name}-away", f"/dev/shm/shmcache.{name}")
        live.watch()
        assert "The segment was removed" not in live.page()
        live.close()
        engine.unlink()


def test_what_cannot_be_served() -> None:
    """An absent segment ends with 3, another engine with 4, before anything listens."""
    assert run("web", "posix:none-such").code == Code.NO_SEGMENT
    assert run("web", "memory:web://").code == Code.REFUSED
