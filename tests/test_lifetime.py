"""Lifetimes and the clean period of the shared-memory engine, by an injected clock."""

import math
import random

import pytest

import shmcache


@pytest.fixture
def cache(unique_name):
    engine = shmcache.open(f"posix:///{unique_name()}", size="1M", clean_period=1800)
    engine._set_clock(1_000)
    yield engine
    assert engine.check() == []
    engine.unlink()
    engine.close()


def at(cache, seconds):
    cache._set_clock(1_000 + round(seconds * 1000))


def test_ten_oclock_for_1200_seconds_with_a_period_of_1800(cache):
    """Stored at 10:00 for 1200 s: readable to 10:19:59.999, never at 10:20 or 10:21; the memory is back by 10:50 plus a sweep."""
    cache.set("record", "x" * 1000, ttl=1200)
    at(cache, 1199.999)
    assert cache.get("record") == "x" * 1000
    at(cache, 1200)
    assert cache.get("record") is None
    at(cache, 1260)  # 10:21
    assert cache.get("record") is None
    assert "record" not in cache
    assert len(cache) == 0
    assert list(cache.keys()) == []
    assert cache.ttl("record") is None
    assert not cache.touch("record", 100)
    assert not cache.replace("record", 1)
    assert cache.append("record", "y") is False
    assert cache.gets("record") is None
    assert cache.cas("record", 1, b"x" * 16) is None
    for minute in range(21, 21 + 31):  # writers pass by once a minute for one clean period
        at(cache, minute * 60)
        cache.set("other", minute)
    stats = cache.stats()
    assert stats["expired"] == 1
    assert stats["items"] == 1
    assert stats["bytes"] < 100


def test_add_and_incr_treat_an_expired_item_as_absent(cache):
    """add stores, incr creates with the new lifetime, pop and delete find nothing."""
    for key in ("add", "incr", "pop", "delete"):
        cache.set(key, 7, ttl=10)
    at(cache, 10)
    assert cache.add("add", 1)
    assert cache.incr("incr", ttl=5) == 1
    assert cache.ttl("incr") == 5
    assert cache.pop("pop", "gone") == "gone"
    assert cache.delete("delete") is False


def test_a_lifetime_is_kept_by_incr_append_and_cas_gives_a_new_one(cache):
    """incr and append keep what is left; cas and set replace it."""
    cache.set("n", 1, ttl=100)
    cache.set("s", "a", ttl=100)
    at(cache, 40)
    cache.incr("n", ttl=1000)
    cache.append("s", "b")
    assert cache.ttl("n") == 60
    assert cache.ttl("s") == 60
    _, token = cache.gets("s")
    assert cache.cas("s", "c", token)
    assert cache.ttl("s") == math.inf


def test_one_millisecond(cache):
    """A lifetime of 1 ms is over 1 ms later."""
    cache.set("k", 1, ttl=0.001)
    assert cache.get("k") == 1
    cache._set_clock(1_001)
    assert cache.get("k") is None


def test_clean_by_hand_reclaims_at_most_limit(cache):
    """clean(limit) stops at limit; clean() takes the rest; nothing that lives is touched."""
    cache.set_many({f"e{i}": i for i in range(100)}, ttl=10)
    cache.set_many({f"l{i}": i for i in range(100)}, ttl=1000)
    at(cache, 20)
    assert cache.clean(limit=0) == 0
    assert cache.clean(limit=30) == 30
    assert cache.clean() == 70
    assert cache.clean() == 0
    assert len(cache) == 100


def test_clean_never_evicts(unique_name):
    """Compaction without pages to copy a live item to leaves it where it is: a clean by hand evicts nothing, however full."""
    for seed in range(30):
        draw = random.Random(seed)
        size, large = draw.choice(["256K", "384K", "512K"]), draw.choice([8000, 20000, 40000])
        with shmcache.open(f"anon:{unique_name}{seed}://", size=size, guards=1) as cache:
            for step in range(400):
                key, what = f"k{draw.randrange(60)}", draw.random()
                if what < 0.7:
                    cache.set(key, b"x" * draw.choice([100, 1000, large]))
                elif what < 0.9:
                    cache.delete(key)
                else:
                    cache.get(key)
                if step % 5 == 0:
                    evicted = cache.stats().evicted
                    cache.clean()
                    assert cache.stats().evicted == evicted, f"seed {seed}, step {step}"


def test_period_0_cleans_only_lazily(unique_name):
    """With clean_period=0 writers never sweep; clean() does."""
    with shmcache.open(f"posix:///{unique_name()}", size="1M", clean_period=0) as cache:
        cache._set_clock(1_000)
        cache.set("k", 1, ttl=1)
        for second in range(2, 5000, 100):
            cache._set_clock(second * 1000)
            cache.set("other", second)
        assert cache.stats()["expired"] == 0
        assert cache.clean() == 1
        cache.unlink()


def test_after_expiry_and_two_periods_refilling_evicts_nothing(unique_name):
    """Everything expired, two clean periods of traffic passed: refilling 85 % of the segment evicts nothing."""
    with shmcache.open(f"posix:///{unique_name()}", size="8M", clean_period=60, guards=1, item_size=140) as cache:
        cache._set_clock(1_000)
        n = 0
        while cache.stats()["evicted"] == 0:
            cache.set(f"first{n}", b"v" * 128, ttl=30)
            n += 1
        for step in range(200):
            cache._set_clock(40_000 + step * 700)
            cache.set("traffic", step)
        before = cache.stats()["evicted"]
        for i in range(int(n * 0.85)):
            cache.set(f"again{i}", b"v" * 128)
        assert cache.stats()["evicted"] == before
        cache.unlink()


def test_eviction_none_refuses_and_keeps(unique_name):
    """A full segment with eviction=none raises NoSpace; every item stays, and space comes back by delete and expiry."""
    with shmcache.open(f"posix:///{unique_name()}", size="1M", eviction="none", guards=1) as cache:
        cache._set_clock(1_000)
        n = 0

        def fill():
            nonlocal n
            while True:
                cache.set(f"k{n}", b"v" * 300, ttl=100)
                n += 1

        with pytest.raises(shmcache.NoSpace, match="old value stays"):
            fill()
        with pytest.raises(shmcache.NoSpace):
            cache.set("k0", b"w" * 40_000)
        assert cache.get_many([f"k{i}" for i in range(n)]) == {f"k{i}": b"v" * 300 for i in range(n)}
        assert n * 300 > 0.75 * 2**20
        for i in range(0, n, 2):
            assert cache.delete(f"k{i}")
        for i in range(n // 2 - 60):
            cache.set(f"new{i}", b"n" * 300)
        assert all(cache[f"k{i}"] == b"v" * 300 for i in range(1, n, 2))
        assert cache.check() == []
        at(cache, 200)
        for i in range(n // 2 - 60):
            cache.set(f"newer{i}", b"n" * 300)
        assert cache.stats()["evicted"] == 0
        assert cache.check() == []
        cache.unlink()


def test_a_failed_set_keeps_the_old_value(unique_name):
    """ValueTooLarge touches nothing; max_value itself is stored."""
    with shmcache.open(f"posix:///{unique_name()}", size="2M") as cache:
        most = cache._header()["max_value"]
        cache.set("k", "old", ttl=50)
        with pytest.raises(shmcache.ValueTooLarge, match=rf"max_value={most} .* {most + 1} found"):
            cache.set("k", b"x" * (most + 1))
        with pytest.raises(shmcache.ValueTooLarge):
            cache.set_many({"a": 1, "k": b"x" * (most + 1)})
        assert cache["k"] == "old"
        assert "a" not in cache
        assert cache.set("k", b"x" * most)
        assert cache["k"] == b"x" * most
        cache.unlink()


def test_a_mebibyte_fits_a_64_mebibyte_cache(unique_name):
    """The default segment takes values of 1 MiB, each readable after its set."""
    with shmcache.open(f"posix:///{unique_name()}") as cache:
        assert cache._header()["size"] == 64 << 20
        for i in range(20):
            assert cache.set(f"big{i}", bytes([i]) * (1 << 20))
            assert cache[f"big{i}"] == bytes([i]) * (1 << 20)
        assert len(cache) >= 8
        cache.unlink()


def test_large_and_small_values_in_one_small_shard(unique_name):
    """In 8 MB and one shard, values of 10 B to 1.8 MB come back whole with 2,000 sets of 300 B between them."""
    with shmcache.open(f"posix:///{unique_name()}", size="8M", guards=1) as cache:
        for size in (10, 5_000, 100_000, 700_000, 1_800_000):
            value = bytes([size % 251]) * size
            assert cache.set("value", value)
            for i in range(2000):
                cache.set(f"small{i}", b"s" * 300)
                if i % 100 == 0:
                    assert cache.get("value") == value
            assert cache.get("value") == value
        assert cache.check() == []
        cache.unlink()


def test_secure_delete_leaves_no_bytes(unique_name):
    """With secure_delete=yes neither an overwritten nor a deleted nor a cleared value is found in the segment."""
    name = unique_name()
    with shmcache.open(f"posix:///{name}", size="1M", secure_delete=True) as cache:

        def there(text):
            with open(f"/dev/shm/shmcache.{name}", "rb") as f:
                return text in f.read()

        cache.set("a", "first-secret")
        assert there(b"first-secret")
        cache.set("a", "second-secret")
        assert not there(b"first-secret")
        cache.delete("a")
        assert not there(b"second-secret")
        cache.set("b", "third-secret")
        cache.clear()
        assert not there(b"third-secret")
        cache.unlink()
