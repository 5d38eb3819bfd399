"""Fixtures over all engines.

Forms: each row of FORMS is one engine in one configuration. A form that cannot run here is skipped with the
reason; with SHMCACHE_REQUIRE_ALL=1 in the environment that is a failure. A server form asks for the fixture
`<scheme>_server`, which tests/servers/fixtures.py provides: its value is what stands in the URL between `://`
and the path.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import re
import runpy
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("shmcache.testing")

import shmcache  # noqa: E402
from shmcache import registry  # noqa: E402

from . import contract_table  # noqa: E402
from .clock_help import Clock  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background; tests send it

_servers = Path(__file__).parent / "servers" / "fixtures.py"
if _servers.exists():  # its fixtures become ours
    globals().update({k: v for k, v in runpy.run_path(str(_servers)).items() if not k.startswith("_")})


@dataclass(frozen=True)
class Form:
    """One engine in one configuration."""

    id: str
    url: str  # {name}: unique per engine; {server}: from the server's fixture; {l1}, {l2}: ids of `tiers`
    options: dict[str, Any] = field(default_factory=dict)
    tiers: tuple[str, ...] = ()  # URLs like `url`, opened before it
    server: str = ""
    frozen: bool = True
    life: float = 10.0
    slack: float = 0.0
    small_option: str = "max_value"

    def __str__(self) -> str:
        return self.id


CHECKED = ("posix", "sysv", "anon", "memory")
SMALL = {"size": "4M"}
ON_MEMCACHED: dict[str, Any] = {"server": "memcached_server", "frozen": False, "life": 2.0, "slack": 1.1}
ON_REDIS: dict[str, Any] = {"server": "redis_server", "frozen": False, "life": 1.0, "slack": 0.05}
PATIENT = "?health=no&timeout=10&connect_timeout=10"
MEMCACHED = "memcached:{name}://{server}/" + PATIENT
REDIS = "redis:{name}://{server}/0" + PATIENT
NEAR = "posix:///{name}?size=1M"
TIERED = "tiered:{name}://?l1={l1}&l2={l2}"
FORMS = [
    Form("memory", "memory:{name}://"),
    *(
        Form(f"{scheme}-{guard}", url, {**SMALL, "guard": guard})
        for scheme, url in (("posix", "posix:///{name}"), ("sysv", "sysv:///{name}"), ("anon", "anon:{name}://"))
        for guard in ("fast", "semaphore")
    ),
    Form("memcached", MEMCACHED, small_option="max_item", **ON_MEMCACHED),
    Form("redis", REDIS, **ON_REDIS),
    Form("redis+cluster", "redis+cluster:{name}://{server}/" + PATIENT + "&prefix={name}*%5B",
         **{**ON_REDIS, "server": "redis_cluster_server"}),
    Form("tiered", TIERED, tiers=("memory:{name}-l1://", "memory:{name}-l2://")),
    Form("tiered:memcached", TIERED, tiers=(NEAR, MEMCACHED), **ON_MEMCACHED),
    Form("tiered:redis", TIERED + "&l1_ttl=2", tiers=(NEAR, REDIS + "&prefix={name}:"), **ON_REDIS),
]  # fmt: skip

_serial = itertools.count()


def unavailable(reason: str) -> None:
    if os.environ.get("SHMCACHE_REQUIRE_ALL"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def new_name() -> str:
    """A name that no other test, worker or run uses."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    return f"t{os.getpid()}-{worker}-{next(_serial)}"


@pytest.fixture
def unique_name() -> Callable[[], str]:
    return new_name


@pytest.fixture
def clock() -> Clock:
    """Seconds for an engine that takes a clock."""
    return Clock()


@pytest.fixture(params=FORMS, ids=str)
def form(request: pytest.FixtureRequest) -> Form:
    """The engine and configuration under test."""
    chosen: Form = request.param
    module, _, attribute = registry.BUILT_IN[chosen.url.partition(":")[0]].partition(":")
    try:
        if attribute == "ShmEngine" and not getattr(
            importlib.import_module("shmcache._core"), "__file__", None
        ):
            unavailable(f"{chosen.id}: shmcache._core is not built")
        getattr(importlib.import_module(module), attribute)
    except ImportError as error:  # not built, or its driver is not installed
        unavailable(f"{chosen.id}: {error}")
    return chosen


@pytest.fixture
def make_engine(form: Form, request: pytest.FixtureRequest) -> Iterator[Callable[..., shmcache.Engine]]:
    """Opens new, empty engines of the form; checks and removes them after the test."""
    server = ""
    if form.server:
        try:
            server = str(request.getfixturevalue(form.server))
        except pytest.FixtureLookupError:
            unavailable(f"{form.id}: no fixture {form.server}")
    engines: list[shmcache.Engine] = []

    def make(**options: Any) -> shmcache.Engine:
        name = new_name()
        tiers = {}
        for tier, url in zip(("l1", "l2"), form.tiers, strict=False):
            engines.append(shmcache.open(url.format(name=name, server=server)))
            tiers[tier] = engines[-1].engine_id
        engine = shmcache.open(
            form.url.format(name=name, server=server, **tiers), **{**form.options, **options}
        )
        engines.append(engine)
        if form.server:
            engine.clear()
        return engine

    yield make
    findings = []
    for engine in reversed(engines):
        scheme = engine.url.scheme
        if engine._closed:
            if scheme not in ("posix", "sysv"):
                continue
            engine = shmcache.open(engine.url, **{**form.options, "mode": "a"})
        if scheme in CHECKED:
            findings += engine._check()
        if scheme in ("posix", "sysv"):
            engine.unlink()
        engine.close()
    assert findings == []


@pytest.fixture
def engine(make_engine: Callable[..., shmcache.Engine]) -> shmcache.Engine:
    """A new, empty engine of the form, with default options."""
    return make_engine()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--contract-table", action="store_true", help="write the README's table of engines and contract lines"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(contract_table.Plugin(config), "contract-table")


LEFT, SEEN = pytest.StashKey[set[str]](), pytest.StashKey[set[str]]()


def _ours_or_nobodys(pid: int) -> bool:
    return pid == os.getpid() or not Path(f"/proc/{pid}").exists()


ANON_LOG = "SHMCACHE_TEST_ANON_LOG"
"""Environment variable with the path of the session's file of `semaphore key, test` lines."""


def _name_anonymous_sets() -> None:
    """Each anonymous segment that a process of the tests makes is noted with the test that runs, so that a set that is
    left can be laid at its door; forked children note theirs, too."""
    from shmcache import segment

    usual = segment._open_anon

    def noting(wish: Any) -> segment.Attachment:
        made = usual(wish)
        line = f"{made.header['sem_key']:08x} {os.environ.get('PYTEST_CURRENT_TEST', 'no test')} (process {os.getpid()})\n"
        with contextlib.suppress(KeyError, OSError), open(os.environ[ANON_LOG], "a") as log:
            log.write(line)
        return made

    segment._open_anon = noting


def _maker_of(key: int) -> str:
    with contextlib.suppress(KeyError, OSError), open(os.environ[ANON_LOG]) as log:
        for line in log:
            if line.startswith(f"{key:08x} "):
                return line[9:].strip()
    return "none of this session's test processes: a program that a test started, or somebody else's"


def _segments() -> set[str]:
    """Segments and semaphore sets made by this process or by one that has ended.

    Semaphore sets have no creator's pid, so they count where all engines are required: on a machine of one's
    own.
    """
    found = set()
    for path in Path("/dev/shm").glob("shmcache.t*-*"):
        pid = re.match(r"shmcache\.t([0-9]+)-", path.name)
        if pid and _ours_or_nobodys(int(pid[1])):
            found.add(str(path))
    for kind in ("shm", "sem") if os.environ.get("SHMCACHE_REQUIRE_ALL") else ("shm",):
        table = Path("/proc/sysvipc", kind)
        rows = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
        for row in rows[1:]:
            entry = dict(zip(rows[0], row, strict=False))
            if int(entry["uid"]) == os.getuid() and (kind == "sem" or _ours_or_nobodys(int(entry["cpid"]))):
                found.add(f"{kind} id {row[1]}, key 0x{int(entry['key']) & 0xFFFFFFFF:08x}{_size(kind, entry)}")
    return found


def _size(kind: str, entry: dict[str, str]) -> str:
    return f", {entry['size']} bytes" if kind == "shm" else f", {entry['nsems']} semaphores"


HEALTH = Path(f"/dev/shm/shmcache.health-{os.geteuid()}")
"""The default health store of this user's networked engines: programs that tests start may make it."""
HAD_HEALTH = pytest.StashKey[bool]()


def pytest_sessionstart(session: pytest.Session) -> None:
    with contextlib.suppress(ImportError):  # not built: no segments either
        _name_anonymous_sets()
    if not hasattr(session.config, "workerinput"):
        descriptor, os.environ[ANON_LOG] = tempfile.mkstemp(prefix="shmcache-anon-")
        os.close(descriptor)
        session.config.stash[HAD_HEALTH] = HEALTH.exists()
        session.config.stash[SEEN] = _segments()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """The session fails if a segment or semaphore set made during it is left; seen once, when all workers
    have ended."""
    if SEEN in session.config.stash:
        if HEALTH.exists() and not session.config.stash[HAD_HEALTH]:
            with shmcache.open(f"posix:///{HEALTH.name.removeprefix('shmcache.')}", mode="a") as made:
                made.unlink()
        session.config.stash[LEFT] = left = _segments() - session.config.stash[SEEN]
        if left:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for name in sorted(config.stash.get(LEFT, set())):
        key = re.search("key 0x([0-9a-f]{8})", name)
        maker = f", made by {_maker_of(int(key[1], 16))}" if key else ""
        terminalreporter.write_line(f"LEAKED: {name}{maker}", red=True)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    if SEEN in config.stash:
        with contextlib.suppress(KeyError, OSError):
            os.unlink(os.environ.pop(ANON_LOG))


def _descriptors() -> Counter[str]:
    """Open file descriptors by what they lead to, digits left out."""
    found: Counter[str] = Counter()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found[re.sub("[0-9]+", "", os.readlink(path))] += 1
    return found


@pytest.fixture(scope="session", autouse=True)
def _health_of_this_session() -> Iterator[None]:
    """Engines that share their servers' health by default do so in a segment of this session, removed at its end."""
    from shmcache import health

    name, usual = new_name(), health.default_url
    health.default_url = lambda: f"posix:///{name}?size=1M&item_size=512"
    yield
    health.default_url = usual
    with contextlib.suppress(FileNotFoundError), shmcache.open(f"posix:last{name}:///{name}", mode="a") as left:
        left.unlink()


@pytest.fixture(scope="session", autouse=True)
def _no_descriptor_leaks() -> Iterator[None]:
    """The session ends with the file descriptors it began with."""
    before = _descriptors()
    yield
    assert _descriptors() - before == Counter()
