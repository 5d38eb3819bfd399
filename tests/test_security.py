"""The security contract: squatted names, permissions, links, planted pickles, chosen keys, secrets in dumps and messages."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shmcache
import shmcache.recipes  # loaded before privileges are dropped: the library may lie where others cannot read
from shmcache import NotSupported, SegmentInvalid, SegmentNotOurs, ShmCacheError, _core, catalog, inspect
from shmcache.engines.shm import ShmEngine
from shmcache.making import IPC_CREAT, IPC_EXCL
from shmcache.url import Url
from shmcache.wish import Wish
from tests.crash.flood import attack_keys, ordinary_keys, places

from .shm_help import in_child, run_child

FORMS = ["posix", "sysv"]
ATTACKER, VICTIM = 65534, 65533
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: two users")
PROTECTED = Path("/proc/sys/fs/protected_regular")


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def as_user(uid: int, body: Callable[[], object]) -> None:
    def run() -> None:
        become(uid)
        body()

    run_child(run)


def opened(url: str, **options: object) -> ShmEngine:
    return ShmEngine.from_url(Url.parse(url), **{"size": 1 << 20, **options})


@pytest.fixture(params=["0", "1", "2"])
def protected_regular(request: pytest.FixtureRequest) -> Iterator[str]:
    """fs.protected_regular set to each of its values, and set back."""
    try:
        before = PROTECTED.read_text()
        PROTECTED.write_text(request.param)
    except OSError as error:
        pytest.skip(f"fs.protected_regular cannot be set here: {error}")
    try:
        yield request.param
    finally:
        PROTECTED.write_text(before)


# -- names ----------------------------------------------------------------------------------------------------


def plant_file(path: Path) -> None:
    path.write_bytes(b"planted")
    path.chmod(0o666)


def plant_private_file(path: Path) -> None:
    path.write_bytes(b"planted")
    path.chmod(0o600)


def plant_directory(path: Path) -> None:
    path.mkdir(mode=0o777)


def plant_fifo(path: Path) -> None:
    os.mkfifo(path, 0o666)


def plant_link(path: Path) -> None:
    path.symlink_to(f"/dev/shm/target-{path.name}")


def plant_dangling_link(path: Path) -> None:
    path.symlink_to(f"/dev/shm/nothing-{path.name}")


def plant_segment(path: Path) -> None:
    engine = opened(f"posix:///{path.name.removeprefix('shmcache.')}", perms=0o666)
    engine.set("k", "planted")
    os.chmod(path, 0o666)


PLANTS = [plant_file, plant_private_file, plant_directory, plant_fifo, plant_link, plant_dangling_link, plant_segment]


@root
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__.removeprefix("plant_"))
def test_a_squatted_posix_name_is_refused(plant, protected_regular, unique_name):
    """What another user put under the name is neither adopted, nor followed, nor changed, whatever fs.protected_regular is."""
    name = unique_name()
    path = Path(catalog.shm_path(name))
    target = Path(f"/dev/shm/target-{path.name}")
    target.write_bytes(b"the victim's own")
    os.chown(target, VICTIM, VICTIM)
    os.umask(old := os.umask(0))
    try:
        as_user(ATTACKER, lambda: plant(path))
        before = path.lstat()

        def victim() -> None:
            for mode in ("c", "a", "x"):
                with pytest.raises((SegmentNotOurs, SegmentInvalid), match=name):
                    opened(f"posix:///{name}", mode=mode)

        as_user(VICTIM, victim)
        if plant is not plant_private_file:
            with pytest.raises((SegmentNotOurs, SegmentInvalid), match=name):  # root is no exception
                opened(f"posix:///{name}")
        after = path.lstat()
        assert (after.st_ino, after.st_size, after.st_mode, after.st_mtime_ns) == (
            before.st_ino, before.st_size, before.st_mode, before.st_mtime_ns,
        )  # fmt: skip
        assert target.read_bytes() == b"the victim's own"
        assert not Path(f"/dev/shm/nothing-{path.name}").exists()
    finally:
        os.umask(old)
        target.unlink()

        def cleared() -> None:
            if plant is plant_segment:
                with opened(f"posix:///{name}", perms=0o666) as engine:
                    engine.unlink()
            elif path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()

        as_user(ATTACKER, cleared)


@root
@pytest.mark.parametrize("perms", [0o600, 0o666])
@pytest.mark.parametrize("form", FORMS)
def test_squatted_semaphores_are_not_used(form, perms, unique_name):
    """A semaphore set another user made under the name's key stays as it is; the segment gets one of its own."""
    name = unique_name()
    key, made = catalog.ipc_key(form, name), os.pipe()

    def squats() -> None:
        os.umask(0)
        os.write(made[1], b"%d" % _core.sem_get(key, 34, IPC_CREAT | IPC_EXCL | perms))

    as_user(ATTACKER, squats)
    squatted = int(os.read(made[0], 20))
    try:
        before = _core.sem_stat(squatted), _core.sem_values(squatted, 34)

        def victim() -> None:
            with opened(f"{form}:///{name}") as engine:
                assert engine._header()["sem_id"] != squatted
                engine.set("k", 1)
                engine.unlink()

        as_user(VICTIM, victim)
        assert (_core.sem_stat(squatted), _core.sem_values(squatted, 34)) == before
    finally:
        as_user(ATTACKER, lambda: _core.sem_remove(squatted))
        for end in made:
            os.close(end)


@root
@pytest.mark.parametrize("perms", [0o600, 0o666])
@pytest.mark.parametrize("what", ["zeros", "segment"])
def test_a_squatted_system_v_key_is_refused(what, perms, unique_name):
    """Memory that another user made under the name's key, with a forged segment in it or not, is not adopted."""
    name = unique_name()
    url, key = f"sysv:///{name}", catalog.ipc_key("sysv", name)

    def squats() -> None:
        if what == "segment":
            opened(url, perms=perms).set("k", "planted")
        else:
            _core.shm_get(key, 1 << 20, IPC_CREAT | IPC_EXCL | perms)

    def victim() -> None:
        for mode in ("c", "a", "x"):
            with pytest.raises(SegmentNotOurs, match=str(ATTACKER)):
                opened(url, mode=mode)

    def clears() -> None:
        shm_id = _core.shm_get(key, 0, 0)
        if what == "segment":
            with opened(url, perms=perms) as engine:
                engine.unlink()
        else:
            _core.shm_remove(shm_id)

    as_user(ATTACKER, squats)
    try:
        as_user(VICTIM, victim)
    finally:
        as_user(ATTACKER, clears)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777])
@pytest.mark.parametrize("perms", [None, 0o660])
@pytest.mark.parametrize("form", FORMS)
def test_permissions_are_those_asked_for_whatever_the_umask(form, perms, mask, unique_name):
    """Segment and semaphores are 0600, or `perms=`, under any umask."""
    name, wanted = unique_name(), perms or 0o600

    def body() -> None:
        os.umask(mask)
        with opened(f"{form}:///{name}", **({"perms": perms} if perms else {})) as engine:
            header = engine._header()
            if form == "posix":
                assert stat.S_IMODE(os.stat(catalog.shm_path(name)).st_mode) == wanted
            else:
                assert _core.shm_stat(engine._attachment.shm_id)["mode"] & 0o777 == wanted
            assert _core.sem_stat(header["sem_id"])["mode"] & 0o777 == wanted
            engine.unlink()

    run_child(body)


def test_attaching_creates_nothing(unique_name):
    """mode=a and mode=r of a name that is not there are FileNotFoundError and leave no file, memory or semaphores."""
    for form in FORMS:
        name = unique_name()
        for mode in ("a", "r"):
            with pytest.raises(FileNotFoundError):
                opened(f"{form}:///{name}", mode=mode)
        key = catalog.ipc_key(form, name)
        assert not [row for kind in ("shm", "sem") for row in catalog.sysvipc(kind) if row["key"] & 0xFFFFFFFF == key]
        assert not Path(catalog.shm_path(name)).exists()


@pytest.mark.parametrize("field", ["sem_key", "sem_ctime", "n_sems"])
def test_a_header_aims_at_no_other_semaphores(field, unique_name):
    """A header whose key, change time or size of the set is not that of the set it names is refused; the set stays as it is."""
    name = unique_name()
    path = Path(catalog.shm_path(name))
    wish = Wish("posix", name, {"size": 1 << 20})
    n_sems = wish.plan["n_sems"] + (field == "n_sems")
    theirs = _core.sem_get(0x53000000 | os.getpid() & 0xFFFF, n_sems, IPC_CREAT | IPC_EXCL | 0o600)
    try:
        fields = wish.fields(theirs, _core.sem_stat(theirs)["key"], 0, True)
        fields |= {"sem_key": {"sem_key": 7}, "sem_ctime": {"sem_ctime": 7}}.get(field, {})
        with path.open("w+b") as f:
            path.chmod(0o600)
            os.ftruncate(f.fileno(), wish.plan["size"])
            _core.format(f.fileno(), -1, fields)
        before = _core.sem_values(theirs, n_sems), _core.sem_stat(theirs)
        with pytest.raises(SegmentInvalid, match=r"wanted, \d+ found: the set was replaced"):
            opened(f"posix:///{name}")
        assert (_core.sem_values(theirs, n_sems), _core.sem_stat(theirs)) == before
    finally:
        _core.sem_remove(theirs)
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("key", [0x53000000, catalog.ANON_KEYS])
def test_a_forged_anonymous_segment_takes_no_other_semaphores_along(key, unique_name):
    """Whoever looks last at memory with a forged anonymous header removes a set only if key, time, size and owner are right."""
    wish = Wish("anon", unique_name(), {"size": 1 << 20})
    key |= os.getpid() & 0xFFFF
    theirs = _core.sem_get(key, wish.plan["n_sems"], IPC_CREAT | IPC_EXCL | 0o600)
    memory = _core.shm_get(0, wish.plan["size"], IPC_CREAT | 0o600)
    try:
        fields = wish.fields(theirs, key, 0, True)
        _core.format(-1, memory, fields | ({} if key < catalog.ANON_KEYS else {"sem_ctime": 7}))
        view = inspect.View(inspect.locate(f"@{memory}"))
        _core.shm_remove(memory)
        view.close()
        with pytest.raises(OSError, match="shmctl"):
            _core.shm_stat(memory)
        assert _core.sem_stat(theirs)["key"] == key
    finally:
        _core.sem_remove(theirs)


# -- pickles --------------------------------------------------------------------------------------------------


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", FORMS)
def test_a_planted_pickle_never_runs(form, unique_name, tmp_path):
    """A pickle in the segment is refused by an engine that did not ask for pickles, by every call that reads, and not loaded."""
    name, fuse = unique_name(), tmp_path / "exploded"
    with opened(f"{form}:///{name}", codec="pickle") as planter:
        planter.set("bomb", Bomb(fuse))
        victim = shmcache.open(f"{form}:v{name}:///{name}")
        calls: list[Callable[[], object]] = [
            lambda: victim.get("bomb"), lambda: victim.gets("bomb"), lambda: victim.get_many(["bomb"]),
            lambda: victim["bomb"], lambda: list(victim.items()), lambda: victim.gat("bomb", 5), lambda: victim.pop("bomb"),
            lambda: victim.get_or_set("bomb", lambda: 1),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(ShmCacheError, match="pickle"):
                call()
        planter.set("bomb", Bomb(fuse))
        shell = [sys.executable, "-P", "-m", "shmcache", "dump", f"{form}:{name}", "--values"]
        assert b"bomb" in subprocess.run(shell, capture_output=True, check=True, cwd="/").stdout
        assert not fuse.exists()
        planter.get("bomb")
        assert fuse.exists()  # the same bytes do explode where pickles were asked for
        victim.close()
        planter.unlink()


@pytest.mark.parametrize("perms", [0o660, 0o604, 0o666, 0o620])
@pytest.mark.parametrize("form", FORMS)
def test_pickles_are_refused_where_others_may_write_or_read(form, perms, unique_name):
    """codec=pickle is NotSupported on a segment that is not 0600, at creation and on attach."""
    name = unique_name()
    with pytest.raises(NotSupported, match="0600"):
        opened(f"{form}:///{name}", perms=perms, codec="pickle")
    with opened(f"{form}:///{name}", perms=perms) as shared:
        with pytest.raises(NotSupported, match="0600"):
            opened(f"{form}:///{name}", perms=perms, codec="pickle")
        shared.unlink()


def test_permissions_widened_afterwards_end_pickles(unique_name):
    """A private segment that somebody has made writable for others is not opened with codec=pickle."""
    name = unique_name()
    with opened(f"posix:///{name}") as cache:
        os.chmod(catalog.shm_path(name), 0o660)
        with pytest.raises((NotSupported, SegmentNotOurs), match="0600"):
            opened(f"posix:///{name}", codec="pickle")
        cache.unlink()


# -- chosen keys ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed: it compiles the search for colliding keys")
def test_keys_that_collide_in_an_unkeyed_hash_spread(unique_name):
    """2,000 keys made to collide under FNV-1a, xxh64 and this hash without its secret fill buckets as ordinary keys do."""
    def spread(keys: list[str]) -> tuple[int, int]:
        with opened(f"anon:{unique_name()}://", size=8 << 20, guards=1) as cache:
            for key in keys:
                assert cache.set(key, b"v")
            assert all(cache.get(key) == b"v" for key in keys)
            filled = Counter(places(cache).values())
            return len(filled), max(filled.values())

    usual, _ = spread(ordinary_keys(2000))
    for name, keys in attack_keys(2000).items():
        buckets, fullest = spread(keys)
        assert buckets > 0.9 * usual, name
        assert fullest <= 7, name


def test_each_segment_has_a_key_of_its_own(unique_name):
    """Two segments of one name and geometry place the same keys differently."""
    found = []
    for _ in range(2):
        with opened(f"anon:{unique_name()}://") as cache:
            for i in range(200):
                cache.set(f"k{i}", i)
            found.append(places(cache))
    assert found[0].keys() == found[1].keys() == {f"k{i}" for i in range(200)}
    assert sum(found[0][key] == found[1][key] for key in found[0]) < 50


# -- secrets --------------------------------------------------------------------------------------------------

SECRET = "hunter2" + "-swordfish"


@pytest.fixture(params=["posix", "sysv", "anon", "memory"])
def keeper(request, unique_name):
    """An engine of each scheme that holds the secret under several types."""
    name = unique_name()
    url = f"{request.param}:{name}://" if request.param in ("anon", "memory") else f"{request.param}:///{name}"
    engine = shmcache.open(url, size="1M")
    engine.set("text", SECRET)
    engine.set("bytes", SECRET.encode())
    engine.set("dict", {"password": SECRET})
    yield engine
    if request.param in FORMS:
        engine.unlink()
    engine.close()


def test_values_are_in_no_message(keeper, caplog):
    """Neither repr, nor an error or its causes, nor a log line, nor statistics hold a stored or passed value."""
    caplog.set_level(logging.DEBUG)

    class Opaque:
        def __repr__(self) -> str:
            return SECRET

    texts = [repr(keeper), str(keeper), repr(keeper.stats()), repr(keeper.namespace("n")), repr(keeper.lock("l"))]
    calls: list[Callable[[], object]] = [
        lambda: keeper.incr("text"), lambda: keeper.incr("bytes"), lambda: keeper.incr("dict"), lambda: keeper.counter("text"),
        lambda: keeper.set("k", Opaque()), lambda: keeper.set("k", {SECRET: Opaque()}), lambda: keeper.add("k", {Opaque()}),
        lambda: keeper.append("dict", SECRET), lambda: keeper.append("text", Opaque()), lambda: keeper.append("text", b"x"),
        lambda: keeper.set("k", SECRET * 100_000), lambda: keeper.set("k", SECRET + "\ud800"),
        lambda: keeper.cas("text", SECRET, SECRET), lambda: keeper.cas("text", SECRET, Opaque()),
        lambda: keeper.set_many({"a": SECRET, "b": Opaque()}), lambda: keeper.set("k", SECRET, -1),
        lambda: keeper.set("k", SECRET, ttl="soon"), lambda: keeper.set("", SECRET), lambda: keeper.set(5, SECRET),
        lambda: keeper.set("k" * 70_000, SECRET), lambda: keeper.get_or_set("k", lambda: Opaque()),
        lambda: keeper.set("k", SECRET, colour=SECRET), lambda: keeper.set("k", [SECRET] * 3, expire_at=-1),
    ]  # fmt: skip
    for call in calls:
        try:
            call()
        except Exception as error:
            texts += [repr(error), "".join(traceback.format_exception(error))]
    assert len(texts) > 2 * (len(calls) - 3)
    for text in (*texts, caplog.text):
        assert SECRET not in text


def test_bytes_that_do_not_decode_are_in_no_message(unique_name):
    """A stored payload that its codec refuses is an error that gives its length, not its content."""
    name = unique_name()
    with opened(f"posix:///{name}", codec="pickle") as writer:
        writer.set("k", (SECRET,))
        payload = pickle.dumps((SECRET,), 5)
        with open(catalog.shm_path(name), "r+b") as f:
            at = f.read().index(payload)
            f.seek(at)
            f.write(b"\xc1" + payload[1:])
        try:
            found = writer.get("k")
        except ShmCacheError as error:
            found = repr(error) + "".join(traceback.format_exception(error))
        assert SECRET not in repr(found)
        writer.unlink()


WORKER = """
import os, resource, sys
import shmcache
url, form = sys.argv[1], sys.argv[2]
cache = shmcache.open(url, mode="a")
open("/proc/self/coredump_filter", "w").write("0x7f")  # every kind of mapping
resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
mine = "".join(map(chr, (c + 1 for c in b"bnmsqnk,vnqc")))  # not written out, so that the dump has it from the heap
assert cache.add("worker", b"x") and "secret" in cache and not cache.check()
os.abort()
"""
CONTROL = b"control-word"


@pytest.mark.parametrize("form", FORMS)
def test_values_are_not_in_a_core_dump(form, unique_name, tmp_path):
    """A worker that aborts with every kind of mapping in its dump leaves a core with its own memory and without the segment's."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern.startswith(("|", "/")):
        pytest.skip(f"core dumps go elsewhere here: kernel.core_pattern is {pattern!r}")
    name = unique_name()
    with opened(f"{form}:///{name}") as cache:
        cache.set("secret", SECRET)
        shell = [sys.executable, "-P", "-c", WORKER, f"{form}:///{name}", form]
        done = subprocess.run(shell, cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == -signal.SIGABRT, done.stderr.decode()
        cores = list(tmp_path.iterdir())
        if not cores:
            pytest.skip("no core is written here: the hard limit of RLIMIT_CORE is 0, or the file system refuses it")
        dump = b"".join(path.read_bytes() for path in cores)
        for path in cores:
            path.unlink()
        assert CONTROL in dump
        assert SECRET.encode() not in dump
        assert cache.get("secret") == SECRET
        cache.unlink()


def test_a_forked_child_and_a_view_are_out_of_dumps_too(unique_name):
    """MADV_DONTDUMP holds in forked children and for the read-only mappings of mode=r."""
    name = unique_name()

    def marked() -> bool:
        smaps = Path("/proc/self/smaps").read_text()
        parts = smaps.split(f"shmcache.{name}\n")[1:]
        flags = [part[part.index("VmFlags:") :].splitlines()[0].split() for part in parts]
        return len(flags) > 0 and all("dd" in each for each in flags)

    with opened(f"posix:///{name}") as cache:

        def body() -> None:
            assert marked()
            with opened(f"posix:///{name}", mode="r"):
                assert marked()

        pid = in_child(body)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        cache.unlink()
