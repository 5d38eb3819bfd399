"""shmcache.namespace: the conformance suite over a view, and what is a view's alone."""

import pytest

import shmcache
from shmcache import MISS, Capability, EngineDown, NotSupported
from shmcache.engines.memory import MemoryEngine
from shmcache.testing import EngineConformance


class TestView(EngineConformance):
    """A view inside a view keeps the contract, but for close() and for counting its reads of the
    generation."""

    @pytest.fixture
    def make_engine(self):
        def make(**options):
            view = MemoryEngine(**options).namespace("outer").namespace("inner")
            view.set("first", 1)
            view.delete("first")
            return view

        return make

    def freeze(self, engine):
        super().freeze(engine._parent._parent)
        return engine

    def advance(self, engine, seconds):
        super().advance(engine._parent._parent, seconds)

    def test_context_manager(self, engine):
        """Leaving `with` closes nothing."""
        with engine:
            engine.set("k", 1)
        assert engine.get("k") == 1

    def test_stats(self, engine):
        """stats are the parent's."""
        assert engine.stats() == engine._parent._parent.stats()

    def test_bad_key(self):
        """Checked without the parametrised limits: the longest key is shorter by the prefixes."""

    def test_odd_keys(self, engine):
        """Keys are compared byte by byte."""
        keys = [b"a", b"A", b"a ", b"\xff", b"\xffGinner", b"\xffNinner\xff", b"\0"]
        engine.set_many({key: i for i, key in enumerate(keys)})
        assert [engine.get(key) for key in keys] == list(range(len(keys)))

    def test_expired_is_absent(self, engine):
        """Expired items are absent from the view."""
        engine.set_many(dict.fromkeys("abc", 1), self.life)
        self.expire(engine)
        assert len(engine) == 0
        assert engine.get_many("abc") == {}
        assert engine.incr("a", initial=None) is None


@pytest.fixture
def cache():
    with MemoryEngine() as engine:
        engine._set_clock(0)
        yield engine


def test_namespace_is_an_engine(cache):
    """A view has the parent's capabilities but RAW; closing it, or leaving `with`, leaves the parent open."""
    with cache.namespace("a") as space:
        space["k"] = 1
    assert space["k"] == 1
    assert isinstance(space, shmcache.Engine)
    assert space.capabilities == cache.capabilities & ~Capability.RAW
    for call in (lambda: space.raw("x"), space.unlink, space.reattach):
        with pytest.raises(NotSupported):
            call()
    assert "'a'" in repr(space)
    assert space.check() == []
    cache.close()
    assert space._closed


def test_reads_make_no_generation(cache):
    """Reading an unused namespace stores nothing."""
    space = cache.namespace("a")
    assert space.get("k") is space.gets("k") is space.ttl("k") is space._get_grace("k") is None
    assert space.get_many(["k"]) == {}
    assert space.delete("k") is False
    assert space.delete_many(["k"]) == 0
    assert space.pop("k", 5) == 5
    assert len(space) == 0
    assert len(cache) == 0


def test_generation_never_expires():
    """The generation outlives default_ttl, which its items take."""
    with MemoryEngine(default_ttl=10) as cache:
        cache._set_clock(0)
        space = cache.namespace("a")
        space.set("short", 1)
        space.set("long", 1, 0)
        cache._set_clock(10_000)
        assert list(space) == ["long"]


def test_set_many_names_failures():
    """set_many of a namespace names the keys that were not stored as they were given."""
    with MemoryEngine(size=1000, max_value=1000, eviction="none") as cache:
        space = cache.namespace("a")
        assert space.set_many({"small": 1, b"large": b"x" * 800, "s2": 2}) == [b"large"]


def test_damaged_generation(cache):
    """A reserved key that holds something else makes the namespace empty, and is replaced on the next
    write."""
    space = cache.namespace("a")
    space["k"] = 1
    cache.set(b"\xffGa", 5)
    assert space.get("k", MISS) is MISS
    space["k"] = 2
    assert space["k"] == 2


def test_long_keys(cache):
    """A key too long together with its namespace is refused by its own error."""
    with pytest.raises(shmcache.KeyTooLong):
        cache.namespace("a").set("k" * 65_530, 1)


def test_namespace_of_a_dead_server(cache):
    """Where sets are answered False, reads miss, writes say False and clear raises EngineDown."""

    class Down(MemoryEngine):
        def get(self, key, default=None):
            return default

        def add(self, key, value, ttl=shmcache.DEFAULT, *, expire_at=None):
            return False

        set = add

    space = Down().namespace("a")
    assert space.get("k", 5) == 5
    assert space.set("k", 1) is False
    with pytest.raises(EngineDown):
        space.clear()


def test_generation_on_a_server_that_is_down(start_memcached, open_memcached):
    """With on_down=miss, and the server of the generation down alone, writes answer no, reads miss, counting raises,
    and get_or_set calls its factory."""
    servers = [start_memcached() for _ in range(2)]
    engine = open_memcached(",".join(map(str, servers)), on_down="miss", retry_interval=-1)
    space = engine.namespace("space")
    token = (space.set("k", "v"), space.gets("k"))[1][1]
    servers[engine._owner(b"\xffGspace")].kill()
    for no in (
        space.set("k", 1), space.add("a", 1), space.replace("k", 1), space.append("k", "x"), space.prepend("k", "x"),
        space.touch("k", 5), space.delete("k"), space._set_grace("k", 1, 5, 5),
    ):  # fmt: skip
        assert no is False
    assert space.set_many({"a": 1, "b": 2}) == ["a", "b"]
    assert (space.get("k"), space.gat("k", 5), space.pop("k"), space.get_many(["k"])) == (None, None, None, {})
    assert space.get_or_set("k", lambda: 7) == 7
    for call in (lambda: space.incr("n"), lambda: space.decr("n"), lambda: space.cas("k", 1, token), space.clear):
        with pytest.raises(EngineDown):
            call()
