"""Segments: who creates, who attaches, what is refused, what is left behind."""

import ctypes
import gc
import os
import pwd
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sysv_ipc

import shmcache
import shmcache.recipes  # loaded before privileges are dropped: the library may lie where others cannot read
from shmcache import LayoutMismatch, NoSpace, SegmentInvalid, SegmentNotOurs, _core, catalog, inspect, segment
from shmcache.engines.shm import ShmEngine
from shmcache.making import IPC_CREAT, IPC_EXCL
from shmcache.url import Url

from .shm_help import in_child, reap, run_child

FORMS = ["posix", "sysv"]
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: another user's segment")


def left(name: str) -> list[str]:
    rows = [f.name for f in catalog.list_segments() if f.name == name]
    keys = {catalog.ipc_key(form, name) for form in FORMS}
    sets = [line["semid"] for line in catalog.sysvipc("sem") if line["key"] & 0xFFFFFFFF in keys]
    return rows + [f"set {i}" for i in sets]


@pytest.fixture(params=FORMS)
def url(request, unique_name):
    name = unique_name()
    yield f"{request.param}:///{name}"
    for found in catalog.list_segments():
        if found.name == name:
            from shmcache.segment import remove

            remove(found)
    assert left(name) == []


def name_of(url):
    return url.rpartition("/")[2]


def test_first_creates_others_attach(url):
    """The second opener of a name sees what the first stored."""
    with shmcache.open(url, size="1M") as cache:
        cache.set("k", "v")

        def other():
            assert shmcache.open(url.replace(":///", ":other:///")).get("k") == "v"

        run_child(other)


def test_many_openers_at_once_make_one_segment(url):
    """Twelve processes that open one name at the same moment share one table."""
    ready = os.pipe()

    def opener():
        os.close(ready[1])
        os.read(ready[0], 1)
        shmcache.open(url, size="1M").incr("openers")

    pids = [in_child(opener) for _ in range(12)]
    os.close(ready[1])
    reap(*pids)
    os.close(ready[0])
    with shmcache.open(url, mode="a") as cache:
        assert cache.counter("openers") == 12


def test_an_unrelated_program_attaches_by_name(url):
    """A program that shares nothing but the name reads and writes the same items."""
    with shmcache.open(url, size="1M") as cache:
        cache.set("from", "here")
        code = f"import shmcache; c = shmcache.open({url!r}); assert c['from'] == 'here'; c['back'] = [1, 2]"
        subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
        assert cache["back"] == [1, 2]


def test_a_creator_killed_half_way_blocks_nobody(url):
    """A set without a segment, its lifecycle semaphore given back by death, is taken over, whatever its size."""
    form, name = url.split(":")[0], name_of(url)

    def creator():
        sem_id = _core.sem_get(catalog.ipc_key(form, name), 7, IPC_CREAT | IPC_EXCL | 0o600)
        assert _core.lifecycle_enter(sem_id, 1.0)
        if form == "sysv":
            _core.shm_get(catalog.ipc_key(form, name), 1 << 20, IPC_CREAT | IPC_EXCL | 0o600)
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(in_child(creator), 0)
    with shmcache.open(url, size="1M") as cache:
        assert cache.set("k", 1)
        assert cache.check() == []


def test_openers_wait_for_a_living_creator(url):
    """An opener that meets a creator at work waits and attaches."""
    form, name = url.split(":")[0], name_of(url)
    sem_id = _core.sem_get(catalog.ipc_key(form, name), _core.plan({"size": 1 << 20})["n_sems"], IPC_CREAT | IPC_EXCL | 0o600)
    assert _core.lifecycle_enter(sem_id, 1.0)
    pid = in_child(lambda: shmcache.open(url, size="1M").set("k", 1))
    time.sleep(0.3)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    _core.lifecycle_leave(sem_id)
    reap(pid)
    with shmcache.open(url, mode="a") as cache:
        assert cache["k"] == 1


def test_modes(url):
    """a and r demand a segment, x demands none."""
    for mode in "ar":
        with pytest.raises(FileNotFoundError):
            shmcache.open(url, mode=mode)
    with shmcache.open(url, mode="x", size="1M") as cache:
        cache.set("k", 1)
    with pytest.raises(FileExistsError):
        shmcache.open(url, mode="x", size="1M")
    with shmcache.open(url, mode="a") as cache:
        assert cache["k"] == 1


def test_read_only_does_every_read_and_no_write(url):
    """mode=r maps read-only: reads answer, writes raise NotSupported, no worker slot is taken."""
    with shmcache.open(url, size="1M") as cache:
        cache.set_many({"a": 1, "b": [2], "c": "x"}, ttl=100)
        before = cache.stats()
    with shmcache.open(url, mode="r") as reader:
        assert reader.get("a") == 1
        assert reader.get_many(["a", "b", "z"]) == {"a": 1, "b": [2]}
        assert sorted(reader.keys()) == ["a", "b", "c"]
        assert len(reader) == 3
        assert 99 < reader.ttl("c") <= 100
        assert reader.counter("a") == 1
        assert reader.gets("c")[0] == "x"
        assert "a" in reader
        assert reader.check() == []
        for write in (
            lambda: reader.set("a", 2),
            lambda: reader.incr("a"),
            lambda: reader.delete("a"),
            lambda: reader.touch("a", 1),
            lambda: reader.append("c", "y"),
            lambda: reader.pop("a"),
            reader.clear,
            reader.unlink,
            lambda: reader.get_or_set("z", lambda: 1),
            lambda: reader.lock("l").__enter__(),
        ):
            with pytest.raises(shmcache.NotSupported):
                write()
        assert reader.stats()["hits"] == before["hits"]
        assert reader.stats()["slots_used"] == before["slots_used"]


def test_created_0600_whatever_the_umask(url):
    """Neither umask 0 nor umask 0777 changes the permissions."""
    for mask in (0, 0o777):
        old = os.umask(mask)
        try:
            cache = shmcache.open(url, size="1M")
        finally:
            os.umask(old)
        found = next(f for f in catalog.list_segments() if f.name == name_of(url))
        assert found.mode == 0o600
        assert _core.sem_stat(cache._header()["sem_id"])["mode"] & 0o777 == 0o600
        cache.unlink()
        cache.close()


def test_perms_and_group_as_asked(url):
    """perms= and group= are given to segment and semaphores alike."""
    cache = shmcache.open(url, size="1M", perms="0660", group=str(os.getegid()))
    found = next(f for f in catalog.list_segments() if f.name == name_of(url))
    assert found.mode == 0o660
    stat = _core.sem_stat(cache._header()["sem_id"])
    assert (stat["mode"] & 0o777, stat["gid"]) == (0o660, os.getegid())
    cache.close()


@pytest.mark.parametrize(
    ("option", "wanted", "other"),
    [
        ("size", "1M", "2M"),
        ("buckets", 512, 4096),
        ("guards", 1, 2),
        ("clean_period", 600, 60),
        ("integrity", "full", "header"),
        ("eviction", "auto", "none"),
        ("max_value", 10_000, 20_000),
        ("guard", "fast", "semaphore"),
    ],
)
def test_another_geometry_is_refused_by_name(url, option, wanted, other):
    """LayoutMismatch names the option, the wanted and the found value; equal ones and absent ones attach."""
    base = {"size": "1M", option: wanted}
    with shmcache.open(url, **base) as cache:
        cache.set("k", 1)
    with pytest.raises(LayoutMismatch, match=option) as caught:
        shmcache.open(url, **{**base, option: other})
    numbers = [str(caught.value)]
    assert all(("wanted" in n and "found" in n) for n in numbers)
    with shmcache.open(url, **base) as cache:
        assert cache["k"] == 1
    with shmcache.open(url) as cache:
        assert cache["k"] == 1


def test_geometry_is_compared_after_rounding(url):
    """A bucket count that rounds to the segment's is the segment's."""
    with shmcache.open(url, size="1M", buckets=300):
        pass
    with shmcache.open(url, size=(1 << 20) + 100, buckets=290):
        pass


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"size": 1000}, "size"),
        ({"size": 2**63}, "size"),
        ({"size": 2**63 - 1}, "size"),
        ({"size": -1}, "size"),
        ({"size": "12Q"}, "size"),
        ({"buckets": 0}, "buckets"),
        ({"size": "1M", "buckets": 10**9}, "buckets"),
        ({"size": "1M", "guards": 3}, "guards"),
        ({"size": "1M", "guards": 2**20}, "guards"),
        ({"size": "1M", "guards": 64}, "guards"),
        ({"size": "64M", "guards": 64, "buckets": 32}, "guards"),
        ({"size": "1M", "max_value": "1G"}, "max_value"),
        ({"size": "1M", "item_size": 2**40}, "item_size"),
        ({"size": "1M", "guard": "mutex"}, "guard"),
        ({"size": "1M", "clean_period": -1}, "clean_period"),
        ({"size": "1M", "perms": "0999"}, "perms"),
        ({"size": "1M", "owner": "no-such-user-here"}, "owner"),
        ({"size": "1M", "colour": "red"}, "colour.*buckets.*size"),
    ],
)
def test_impossible_options_leave_nothing(url, options, field):
    """A typed error names the field before anything is made."""
    with pytest.raises(ValueError, match=field):
        shmcache.open(url, **options)
    assert left(name_of(url)) == []


@pytest.mark.parametrize("name", ["a/b", "a%00b", "", "..", "x" * 201, "a%0Ab"])
@pytest.mark.parametrize("form", FORMS)
def test_bad_names(form, name):
    """A name with a slash, a NUL, a control character, none, or too many bytes is a ValueError."""
    with pytest.raises(ValueError, match=r"name|NUL|control"):
        shmcache.open(f"{form}:///{name}")


def test_an_explicit_key(unique_name):
    """sysv:///0x... takes the number as the System V key."""
    key = 0x53000000 | (os.getpid() & 0xFFFF)
    cache = shmcache.open(f"sysv:///0x{key:x}", size="1M")
    found = next(f for f in catalog.list_segments() if f.shm_key == key)
    assert found.form == "sysv"
    cache.unlink()
    cache.close()


def test_an_absurd_size_is_no_space_with_the_remedy():
    """More than /dev/shm holds: NoSpace names the sizes and what to do; nothing is left."""
    name = f"t{os.getpid()}-huge"
    with pytest.raises(NoSpace, match=r"(?s)bytes in /dev/shm wanted, .* found free .*size="):
        shmcache.open(f"posix:///{name}", size="60T")
    assert left(name) == []
    assert not list(Path("/dev/shm").glob(".shmcache-new*" + name))


def test_files_that_are_no_segments_are_refused(unique_name):
    """Garbage, a short file, a symbolic link and a directory under the name: typed errors, file untouched."""
    path = Path(catalog.shm_path(name := unique_name()))
    try:
        path.write_bytes(b"x" * 8192)
        path.chmod(0o600)
        with pytest.raises(SegmentInvalid, match=r"magic.*found.*wanted"):
            shmcache.open(f"posix:///{name}")
        path.write_bytes(b"SHM")
        with pytest.raises(SegmentInvalid):
            shmcache.open(f"posix:///{name}")
        assert path.read_bytes() == b"SHM"
        path.unlink()
        path.symlink_to("/etc/passwd")
        with pytest.raises(SegmentNotOurs):
            shmcache.open(f"posix:///{name}")
        path.unlink()
        path.mkdir()
        with pytest.raises(SegmentNotOurs):
            shmcache.open(f"posix:///{name}")
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


@pytest.mark.parametrize(("offset", "size", "field"), [(8, 4, "layout version"), (12, 4, "byte order"), (40, 4, "checksum")])
def test_another_layout_is_refused_by_name(unique_name, offset, size, field):
    """A header of another version, byte order or content is refused, naming what was found and wanted."""
    name = unique_name()
    cache = shmcache.open(f"posix:///{name}", size="1M")
    with open(catalog.shm_path(name), "r+b") as f:
        f.seek(offset)
        old = f.read(size)
        f.seek(offset)
        f.write(b"\x77" * size)
    other = f"posix:second{name}:///{name}"
    with pytest.raises((LayoutMismatch, SegmentInvalid), match=rf"{field}: found \S+, wanted \S+"):
        shmcache.open(other)
    with open(catalog.shm_path(name), "r+b") as f:
        f.seek(offset)
        f.write(old)
    shmcache.open(other).close()
    cache.unlink()
    cache.close()


def test_world_writable_is_refused(unique_name):
    """A segment anybody may write is not adopted."""
    name = unique_name()
    with shmcache.open(f"posix:///{name}", size="1M") as cache:
        os.chmod(catalog.shm_path(name), 0o666)
        with pytest.raises(SegmentNotOurs, match="permissions"):
            shmcache.open(f"posix:b{name}:///{name}")
        cache.unlink()


@root
def test_anothers_segment_is_refused_but_may_be_looked_at(url):
    """uid 0 adopts no segment of uid 65534, but mode=r reads it and says whose it is."""

    def nobody():
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        shmcache.open(url, size="1M").set("k", "theirs")

    run_child(nobody)
    with pytest.raises(SegmentNotOurs, match=r"owner uid 0 wanted, 65534 found"):
        shmcache.open(url)
    with shmcache.open(url, mode="r") as reader:
        assert reader["k"] == "theirs"
        assert reader.raw("info")["owner_uid"] == 65534
    with shmcache.open(url, owners="65534") as trusting:
        assert trusting["k"] == "theirs"


@root
@pytest.mark.parametrize("guard", ["fast", "semaphore"])
def test_root_opens_forks_and_drops_privileges(url, guard):
    """With owner=, children that dropped to that user write, lock and remove; without it they learn the remedy."""
    user = pwd.getpwuid(65534).pw_name
    cache = shmcache.open(url, size="1M", owner=user, guard=guard)
    cache.set("by", "root")

    def worker():
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        assert cache["by"].startswith("root")
        for _ in range(200):
            cache.incr("n")
        with cache.lock("l", timeout=5):
            cache.append("by", "+")
        other = shmcache.open(url.replace(":///", ":again:///"))
        other.incr("n")
        other.close()

    reap(*[in_child(worker) for _ in range(3)])
    assert cache["n"] == 603
    assert cache["by"] == "root+++"
    cache.unlink()
    cache.close()
    alone = shmcache.open(url, size="1M", guard=guard)

    def stranger():
        os.setresuid(65534, 65534, 65534)
        with pytest.raises(SegmentNotOurs, match="owner="):
            alone.set("k", 1)

    run_child(stranger)
    alone.close()


def test_unlink_removes_a_segment_whose_header_was_scribbled_over(url):
    """Who has it attached knows which segment it is without its header; nothing is left."""
    cache = shmcache.open(url, size="1M")
    if cache._attachment.shm_id < 0:
        with open(catalog.shm_path(name_of(url)), "r+b") as file:
            file.write(b"\xa5" * 512)
    else:
        memory = sysv_ipc.attach(cache._attachment.shm_id)
        memory.write(b"\xa5" * 512, 0)
        memory.detach()
    cache.unlink()
    cache.close()
    assert not os.path.exists(catalog.shm_path(name_of(url)))
    assert left(name_of(url)) == []
    assert not [line for line in catalog.sysvipc("shm") if line["shmid"] == cache._attachment.shm_id]


def test_unlink_is_seen_by_every_writer_at_once(url):
    """After unlink() each attached writer raises GuardLost, readers go on, reattach() starts anew."""
    cache = shmcache.open(url, size="1M")
    cache.set("k", "old")
    told, go = os.pipe(), os.pipe()

    def other():
        mine = shmcache.open(url.replace(":///", ":other:///"))
        assert mine.set("x", 1)
        os.write(told[1], b"1")
        os.read(go[0], 1)
        with pytest.raises(shmcache.GuardLost, match="reattach"):
            mine.set("x", 2)
        assert mine.get("k") == "old"
        mine.reattach()
        assert mine.get("k") is None
        assert mine.set("k", "new")

    pid = in_child(other)
    os.read(told[0], 1)
    cache.unlink()
    with pytest.raises(shmcache.GuardLost):
        cache.set("k", 1)
    os.write(go[1], b"1")
    reap(pid)
    cache.reattach()
    assert cache["k"] == "new"
    cache.close()
    for end in (*told, *go):
        os.close(end)


@pytest.mark.parametrize("with_semaphores", [True, False])
def test_a_removal_that_died_half_way_is_finished_by_the_next_opener(url, with_semaphores):
    """A segment marked as removed that is still there is taken away and made anew; mode=a says that there is none."""
    cache = shmcache.open(url, size="1M")
    cache.set("k", "old")
    cache._mark_removed()
    if not with_semaphores:
        _core.sem_remove(cache._header()["sem_id"])
    with shmcache.open(url.replace(":///", ":next:///"), size="1M") as following:
        assert following.set("k", "new")
        assert cache["k"] == "old"
        following._mark_removed()
    cache.close()
    with pytest.raises(FileNotFoundError):
        shmcache.open(url.replace(":///", ":third:///"), mode="a")
    assert left(name_of(url)) == []


def test_openers_that_find_a_half_removed_segment_share_one_new_one(url):
    """Twelve processes that find a segment marked as removed at the same moment end with one new table."""
    cache = shmcache.open(url, size="1M")
    cache._mark_removed()
    cache.close()
    ready = os.pipe()

    def opener():
        os.close(ready[1])
        os.read(ready[0], 1)
        shmcache.open(url, size="1M").incr("openers")

    pids = [in_child(opener) for _ in range(12)]
    os.close(ready[1])
    os.close(ready[0])
    reap(*pids)
    with shmcache.open(url) as last:
        assert last["openers"] == 12
        last.unlink()


@pytest.mark.parametrize("what", ["segment", "semaphores"])
def test_removal_by_an_outsider_is_noticed(url, what):
    """rm or ipcrm underneath: within a second of writing the engine raises GuardLost; it never makes a new segment."""
    cache = shmcache.open(url, size="1M", guard="fast")
    cache.set("k", 1)
    header = cache._header()
    found = next(f for f in catalog.list_segments() if f.name == name_of(url))
    if what == "semaphores":
        _core.sem_remove(header["sem_id"])
    elif found.form == "posix":
        os.unlink(catalog.shm_path(found.name))
    else:
        _core.shm_remove(found.shm_id)

    def writes():
        for _ in range(100):
            cache.set("k", 2)
            time.sleep(0.05)

    with pytest.raises(shmcache.GuardLost):
        writes()
    assert cache.get("k") == 2
    with pytest.raises(shmcache.GuardLost):
        cache.incr("n")
    if what == "segment":
        _core.sem_remove(header["sem_id"])
    cache.close()


@pytest.mark.parametrize("guard", ["fast", "semaphore"])
def test_a_name_made_anew_shares_no_semaphores_with_what_was_removed(unique_name, guard):
    """After an outsider's rm the next creator makes semaphores of its own: who still holds an old guard cannot give it twice."""
    name = unique_name()
    old = shmcache.open(f"posix:///{name}", size="1M", guard=guard)
    old.set("k", 1)
    os.unlink(catalog.shm_path(name))
    with shmcache.open(f"posix:new{name}:///{name}", size="1M", guard=guard) as new:
        assert new._header()["sem_id"] != old._header()["sem_id"]
        assert new.set("k", 2)
        assert new._guards()[0]["state"] == "free"
        assert old["k"] == 1
        new.unlink()
    old.close()
    assert left(name) == []


def test_anonymous_segments_leave_nothing():
    """Closing the last user of anon:// removes its semaphores; the kernel frees the memory."""
    before = {line["semid"] for line in catalog.sysvipc("sem")}
    cache = shmcache.open(f"anon:t{os.getpid()}://", size="1M")
    run_child(lambda: cache.set("child", 1))
    assert cache["child"] == 1
    header = cache._header()
    cache.close()
    assert header["sem_id"] not in {line["semid"] for line in catalog.sysvipc("sem")} - before
    with pytest.raises(OSError, match=r"(?i)invalid|removed"):
        _core.sem_stat(header["sem_id"])


def anon_sets() -> set[int]:
    return {line["semid"] for line in catalog.sysvipc("sem") if line["key"] & 0xFF000000 == catalog.ANON_KEYS}


def sets_of(caches) -> list[int]:
    return [cache._header()["sem_id"] for cache in caches]


@pytest.mark.parametrize("guard", ["fast", "semaphore"])
def test_an_anonymous_segment_closed_by_all_at_once_leaves_nothing(guard):
    """Four processes that close one anonymous segment at the same moment leave no semaphores."""
    caches = [shmcache.open(f"anon:t{os.getpid()}-{i}://", size="256K", guard=guard) for i in range(40)]
    made, gate = sets_of(caches), os.pipe()

    def user():
        os.close(gate[1])
        os.read(gate[0], 1)
        for cache in caches:
            cache.close()

    pids = [in_child(user) for _ in range(3)]
    os.close(gate[0])
    os.close(gate[1])
    for cache in caches:
        cache.close()
    reap(*pids)
    assert anon_sets().isdisjoint(made)


def test_looking_at_an_anonymous_segment_while_it_is_closed_leaves_nothing():
    """A process that lists segments counts as a user of each; a close meanwhile leaves no semaphores."""
    told, parent = os.pipe(), os.getpid()

    def lists():
        os.write(told[1], b"1")
        while os.getppid() == parent:
            catalog.list_segments()

    pid = in_child(lists)
    made = []
    try:
        os.read(told[0], 1)
        for i in range(300):
            cache = shmcache.open(f"anon:t{os.getpid()}-{i}://", size="256K")
            made.append(cache._header()["sem_id"])
            cache.close()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for end in told:
            os.close(end)
    assert len(anon_sets().intersection(made)) < 4  # a lister that was killed, here or elsewhere, may have been the last user
    for sem_id in anon_sets().intersection(made):
        _core.sem_remove(sem_id)


def test_the_last_look_at_an_anonymous_segment_takes_its_semaphores():
    """A view that outlives the engine reads on; its end removes the semaphores."""
    cache = shmcache.open(f"anon:t{os.getpid()}://", size="256K")
    cache.set("k", 1)
    (made,) = sets_of([cache])
    with inspect.View(inspect.locate(f"@{cache._attachment.shm_id}")) as view:
        cache.close()
        assert [item.key for item in view.items()] == ["k"]
        assert made in anon_sets()
    assert made not in anon_sets()


def test_an_anonymous_engine_that_is_forgotten_takes_its_semaphores():
    """An engine that goes out of use without close() leaves no semaphores."""
    made = sets_of([ShmEngine.from_url(Url.parse(f"anon:t{os.getpid()}://"), size=1 << 20)])
    gc.collect()
    assert anon_sets().isdisjoint(made)


def test_gc_takes_what_dead_creators_left(unique_name):
    """A private file and an orphaned anonymous set are removed once they are old enough; nothing younger is."""
    path = Path("/dev/shm", f".shmcache-new.1.{unique_name()}")
    path.write_bytes(b"")
    sem_id = _core.sem_get(catalog.ANON_KEYS | (os.getpid() & 0xFFFF) << 4, 3, IPC_CREAT | 0o600)
    mine = (str(path), f"set {sem_id} ")

    def ours(lines):
        return [line for line in lines if any(m in line for m in mine)]

    assert ours(catalog.gc(grace=3600)) == []
    assert len(ours(catalog.gc(grace=-1, dry_run=True))) == 2
    assert path.exists()
    path.unlink()
    _core.sem_remove(sem_id)


def test_gc_takes_an_anonymous_segment_whose_creator_died_before_it_was_marked(unique_name, monkeypatch, tmp_path):
    """Memory of a creator that was killed between attaching and marking goes with its semaphores; younger memory stays."""
    name = unique_name()

    def dies():
        segment.forget_anon = lambda att: os.kill(os.getpid(), signal.SIGKILL)
        shmcache.open(f"anon:{name}://", size="1M")

    os.waitpid(in_child(dies), 0)
    rows, sets = catalog.list_segments, catalog.sysvipc
    (mine,) = [row for row in rows() if row.name == name]
    memory, sem_id = mine.shm_id, mine.header["sem_id"]
    monkeypatch.setattr(catalog, "SHM_DIR", str(tmp_path))
    monkeypatch.setattr(catalog, "list_segments", lambda: [row for row in rows() if row.name == name])
    monkeypatch.setattr(catalog, "sysvipc", lambda kind: [row for row in sets(kind) if row.get("semid", sem_id) == sem_id])
    assert catalog.gc(grace=3600) == []
    assert [line.split(":")[0].split(" (")[0] for line in catalog.gc(grace=-1)] == [f"memory {memory}", f"semaphore set {sem_id}"]
    for gone in (lambda: _core.shm_stat(memory), lambda: _core.sem_stat(sem_id)):
        with pytest.raises(OSError, match="IPC_STAT"):
            gone()


def test_values_are_left_out_of_core_dumps(unique_name):
    """The mapping is marked MADV_DONTDUMP: `dd` stands in its VmFlags."""
    with shmcache.open(f"posix:///{unique_name()}", size="1M") as cache:
        smaps = Path("/proc/self/smaps").read_text()
        entry = smaps[smaps.index(f"shmcache.{cache._name}") :]
        flags = entry[entry.index("VmFlags:") :].splitlines()[0].split()
        assert "dd" in flags
        cache.unlink()


def test_pickle_only_on_private_segments(url):
    """codec=pickle is refused where others may write."""
    with pytest.raises(shmcache.NotSupported, match="0600"):
        shmcache.open(url, size="1M", perms="0660", codec="pickle")
    with shmcache.open(url.replace(":///", ":p:///") + "p", size="1M", codec="pickle") as cache:
        cache["k"] = (1, {2})
        assert cache["k"] == (1, {2})
        cache.unlink()


def test_import_touches_nothing():
    """Importing shmcache loads no optional package and no driver, starts no thread and makes no IPC object."""
    code = (
        "import sys, threading; before = set(open('/proc/sysvipc/sem')); import shmcache; "
        "bad = {'msgpack', 'posix_ipc', 'sysv_ipc', 'redis', 'pymemcache', 'rich', 'typer'} & set(sys.modules); "
        "assert not bad, bad; assert threading.active_count() == 1; assert 'multiprocessing.shared_memory' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_too_many_workers_is_typed_and_reads_go_on(unique_name):
    """With all worker slots taken a writer raises TooManyWorkers naming the number; reads answer."""
    cache = shmcache.open(f"posix:///{unique_name()}", size="1M", workers=2)
    cache.set("k", 1)
    told, go = os.pipe(), os.pipe()

    def second():
        cache.set("k", 2)
        os.write(told[1], b"1")
        os.read(go[0], 1)

    def third():
        assert cache["k"] == 2
        with pytest.raises(shmcache.TooManyWorkers, match="2"):
            cache.set("k", 3)

    pid = in_child(second)
    os.read(told[0], 1)
    run_child(third)
    os.write(go[1], b"1")
    reap(pid)
    run_child(lambda: cache.set("k", 4))
    assert cache["k"] == 4
    cache.unlink()
    cache.close()
    for end in (*told, *go):
        os.close(end)


def test_small_tmpfs_never_gives_sigbus():
    """On a 1 MiB tmpfs a 4 MiB segment is NoSpace, and one that fits is reserved in full."""
    unshare = ctypes.CDLL(None, use_errno=True).unshare

    def body():
        if unshare(0x00020000) != 0:  # CLONE_NEWNS
            os._exit(77)
        done = subprocess.run(["mount", "--make-rprivate", "/"], check=False)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", "/dev/shm"], check=False)
        if done.returncode != 0:
            os._exit(77)
        with pytest.raises(NoSpace, match="4194304 bytes"):
            shmcache.open("posix:///tiny", size="4M")
        with shmcache.open("posix:///tiny", size="512K") as cache:
            for i in range(20_000):
                cache.set(f"k{i}", b"v" * 100)
            cache.unlink()

    pid = in_child(body)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 77:
        pytest.skip("needs the right to make a mount namespace")
    assert code == 0


@pytest.mark.parametrize("form", ["posix", "sysv", "anon"])
def test_a_refused_mapping_leaves_nothing(form):
    """Under ulimit -v a segment that cannot be mapped is NoSpace with its size; neither memory nor semaphores are left."""
    name = f"t{os.getpid()}-vm"
    url = f"{form}:///{name}" if form != "anon" else f"anon:{name}://"

    def body():
        import resource

        import posix_ipc
        import sysv_ipc

        assert posix_ipc
        assert sysv_ipc
        made, usual = [], _core.sem_get

        def noting(key, n_sems, flags):
            made.append(usual(key, n_sems, flags))
            return made[-1]

        _core.sem_get = noting
        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), used + (100 << 20)))
        with pytest.raises(NoSpace, match="419430400"):
            shmcache.open(url, size="400M")
        assert made
        assert not {line["semid"] for line in catalog.sysvipc("sem")}.intersection(made)

    run_child(body)
    assert left(name) == []
    assert not [f for f in catalog.sysvipc("shm") if f["size"] == 419430400]


def test_refused_pickle_creates_nothing(unique_name):
    """codec=pickle with wide permissions is refused before the segment is made."""
    name = unique_name()
    with pytest.raises(shmcache.NotSupported, match="0666"):
        shmcache.open(f"posix:///{name}", size="1M", perms="0666", codec="pickle")
    assert left(name) == []
