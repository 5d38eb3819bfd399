/*
 * read_protocol.cpp - the lock-free read against one writer, and the guard's hand-over, on weak memory (Relacy).
 *
 * One writer at a time changes a shard (the guards' models prove that), so a scenario is one writer thread and one
 * reader thread; `handover` has three threads. Relacy runs a scenario many times; each run takes a random interleaving,
 * and each load a random value out of the last three stored ones that happens-before and coherence leave open to it.
 *
 * I1  A validated read returns one committed value of its key: never words of two items, never a foreign one, never
 *     bytes that were not yet, or no longer, published.
 * I2  A key that stays stored is never missed, however often it is displaced during one pass, repaired or not, and
 *     however close to its old deadline it is touched.
 * I3  After clear() returned nothing older than it is read; what was set after it is.
 * I4  Whoever takes the guard, free or from a dead owner, sees every store of the owner before.
 *
 * Every value and entry is one word, a page is two words; page 0 continues on the page its `next` names. Entries are
 * reused bit by bit (same page, offset and tag), which is what real entries do at worst. Not here: the bounds of
 * hostile numbers, the check (it is a second net: the protocol has to hold without it).
 *
 * Usage: read_protocol SCENARIO ITERATIONS [SEED]      Prints one line: result, runs, runs until the error.
 * Exit status: 0 no error found, 1 error found, 2 usage. A SEED switches one deliberate error on. With MODEL_HISTORY in
 * the environment the run that failed is told step by step on the error output.
 */
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <streambuf>
#include <string>

#include <relacy/base.hpp>

/*
 * Relacy's generator keeps 32 bits and lets a choice of two depend on the low 17 of them: after 131,072 runs a scenario
 * of two threads only repeats itself. This one (SplitMix64: Steele, Lea, Flood 2014) takes the place of relacy/random.hpp.
 */
#define RL_RANDOM_HPP
namespace rl {
struct random_generator {
    unsigned long long state;

    void seed(iteration_t run) { state = static_cast<unsigned long long>(run) * 0xD1342543DE82EF95ULL; }

    unsigned rand()
    {
        unsigned long long z = (state += 0x9E3779B97F4A7C15ULL);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
        return static_cast<unsigned>((z ^ (z >> 31)) >> 33);
    }
};
} // namespace rl

#include <relacy/relacy.hpp>

namespace {

using rl::mo_acq_rel;
using rl::mo_acquire;
using rl::mo_relaxed;
using rl::mo_release;
using rl::mo_seq_cst;
typedef rl::atomic<unsigned> word_t;

std::string seed; /* the error switched on in this process, or empty */

bool seeded(char const *name) { return seed == name; }

rl::memory_order unless(char const *name, rl::memory_order order) { return seeded(name) ? mo_relaxed : order; }

#define LOAD(var, order) (var)($).load(order)
#define STORE(var, value, order) (var)($).store(value, order)
#define FENCE(order) rl::atomic_thread_fence(order, $)

enum { PASSES = 3, MISS = 0, AGAIN = 1000 };

/* A shard with one slot for the key in each of its two buckets, and three pages. */
struct shard_t {
    word_t entry[2]; /* by bucket: 0 = empty, else 1 + page */
    word_t moves[2];
    word_t life[3];
    word_t next[3];
    word_t bytes[3][2];
    word_t flush_seq;
    unsigned seq;  /* the writer's alone */
    unsigned tail;

    void reset()
    {
        for (unsigned i = 0; i != 2; ++i) {
            STORE(entry[i], 0, mo_relaxed);
            STORE(moves[i], 0, mo_relaxed);
        }
        for (unsigned p = 0; p != 3; ++p) {
            STORE(life[p], p + 1, mo_relaxed);
            STORE(next[p], 0, mo_relaxed);
            STORE(bytes[p][0], 0, mo_relaxed);
            STORE(bytes[p][1], 0, mo_relaxed);
        }
        STORE(flush_seq, 0, mo_relaxed);
        seq = 3;
        tail = 0;
    }

    /* Writer: a page begins a new life. Partner: the reader's fence between the copy and the validation. */
    void prepare(unsigned page)
    {
        seq += 1;
        STORE(life[page], seq, unless("LIFE_STORE_RELAXED", mo_release));
        if (!seeded("NO_FENCE_AFTER_LIFE"))
            FENCE(mo_seq_cst);
    }

    /* Writer: the COMMIT. Partner: the reader's acquire loads of the entry. */
    void publish(unsigned bucket, unsigned e) { STORE(entry[bucket], e, unless("COMMIT_RELAXED", mo_release)); }

    /* Writer: one displacement, in the order of the protocol. */
    void displace(unsigned from, unsigned to)
    {
        unsigned const e = LOAD(entry[from], mo_relaxed);
        if (seeded("BUMP_BEFORE_COPY"))
            bump(from, to);
        if (seeded("CLEAR_BEFORE_COPY"))
            STORE(entry[from], 0, mo_release);
        STORE(entry[to], e, unless("COPY_RELAXED", mo_release));
        if (!seeded("BUMP_BEFORE_COPY") && !seeded("BUMP_AFTER_CLEAR"))
            bump(from, to);
        STORE(entry[from], 0, unless("CLEAR_RELAXED", mo_release));
        if (seeded("BUMP_AFTER_CLEAR"))
            bump(from, to);
    }

    void bump(unsigned from, unsigned to)
    {
        rl::memory_order const order = unless("BUMP_RELAXED", mo_release);
        unsigned const width = seeded("MOVES_ONE_BIT") ? 1 : 255;
        STORE(moves[from], (LOAD(moves[from], mo_relaxed) + 1) & width, order);
        if (!seeded("BUMP_SOURCE_ONLY"))
            STORE(moves[to], (LOAD(moves[to], mo_relaxed) + 1) & width, order);
    }

    /* Reader: one look at one slot; the value, MISS or AGAIN. */
    unsigned look(unsigned bucket, bool chained)
    {
        unsigned const e = LOAD(entry[bucket], unless("NO_ORDER_BEFORE_MOVES", mo_acquire));
        if (e == 0)
            return MISS;
        unsigned const page = e - 1;
        unsigned const m = LOAD(life[page], unless("LIFE_LOAD_RELAXED", mo_acquire));
        if (!seeded("NO_SECOND_LOOK") && LOAD(entry[bucket], unless("SECOND_LOOK_RELAXED", mo_acquire)) != e)
            return AGAIN;
        if (!seeded("FLUSH_IGNORED") && m <= LOAD(flush_seq, mo_relaxed))
            return MISS;
        unsigned const head = LOAD(bytes[page][0], mo_relaxed);
        unsigned const rest_page = chained ? LOAD(next[page], mo_relaxed) : page;
        unsigned const rest = LOAD(bytes[rest_page][1], mo_relaxed);
        if (!seeded("NO_FENCE_AFTER_COPY"))
            FENCE(mo_acquire);
        rl::memory_order const last = unless("LAST_LOOK_RELAXED", mo_acquire);
        if (seeded("LIFE_BEFORE_ENTRY")) {
            if (LOAD(life[page], mo_acquire) != m || LOAD(entry[bucket], last) != e)
                return AGAIN;
        } else {
            if (!seeded("LIFE_ONLY") && LOAD(entry[bucket], last) != e)
                return AGAIN;
            if (!seeded("ENTRY_ONLY") && LOAD(life[page], mo_relaxed) != m)
                return AGAIN;
        }
        RL_ASSERT(head == rest); /* I1: torn */
        RL_ASSERT(head != 0);    /* I1: unpublished or wiped */
        RL_ASSERT(head < 100);   /* I1: foreign */
        return head;
    }

    /* Reader: one pass over both buckets. */
    unsigned pass(bool chained)
    {
        unsigned v = 0;
        if (!seeded("MOVES_LOADED_LATE"))
            v = LOAD(moves[0], unless("MOVES_LOAD_RELAXED", mo_acquire));
        for (unsigned bucket = 0; bucket != 2; ++bucket) {
            unsigned const found = look(bucket, chained);
            if (found != MISS)
                return found;
            if (bucket == 0 && seeded("MOVES_LOADED_LATE"))
                v = LOAD(moves[0], mo_acquire);
        }
        if (!seeded("NO_ORDER_BEFORE_MOVES"))
            FENCE(mo_acquire);
        if (!seeded("NO_MOVES") && LOAD(moves[0], mo_relaxed) != v)
            return AGAIN;
        return MISS;
    }

    unsigned get(bool chained = false, unsigned passes = PASSES)
    {
        unsigned found = AGAIN;
        for (unsigned i = 0; i != passes && found == AGAIN; ++i)
            found = pass(chained);
        return found;
    }
};

/* The page of an item is reclaimed and, at the same place, holds a new value of the same key: the same entry. */
struct recycle : rl::test_suite<recycle, 2> {
    shard_t shard;

    void before()
    {
        shard.reset();
        STORE(shard.bytes[0][0], 1, mo_relaxed);
        STORE(shard.bytes[0][1], 1, mo_relaxed);
        STORE(shard.entry[0], 1, mo_relaxed);
    }

    void thread(unsigned index)
    {
        if (index == 1) {
            shard.get();
            return;
        }
        STORE(shard.entry[0], 0, mo_release);
        if (!seeded("LIFE_AFTER_BYTES"))
            shard.prepare(0);
        if (seeded("PUBLISH_EARLY"))
            shard.publish(0, 1);
        STORE(shard.bytes[0][0], 2, mo_relaxed);
        STORE(shard.bytes[0][1], 2, mo_relaxed);
        if (seeded("LIFE_AFTER_BYTES"))
            shard.prepare(0);
        if (!seeded("PUBLISH_EARLY"))
            shard.publish(0, 1);
    }
};

/* An item on pages 0 and 1 is reclaimed; page 1 is reused first, by another key, then page 0 by the same key. */
struct chain : rl::test_suite<chain, 2> {
    shard_t shard;

    void before()
    {
        shard.reset();
        STORE(shard.bytes[0][0], 1, mo_relaxed);
        STORE(shard.next[0], 1, mo_relaxed);
        STORE(shard.bytes[1][1], 1, mo_relaxed);
        STORE(shard.entry[0], 1, mo_relaxed);
    }

    void thread(unsigned index)
    {
        if (index == 1) {
            shard.get(true);
            return;
        }
        STORE(shard.entry[0], 0, mo_release);
        shard.prepare(1);
        STORE(shard.bytes[1][1], 100, mo_relaxed);
        shard.prepare(2);
        STORE(shard.bytes[2][1], 2, mo_relaxed);
        shard.prepare(0);
        STORE(shard.bytes[0][0], 2, mo_relaxed);
        STORE(shard.next[0], 2, mo_relaxed);
        shard.publish(0, 1);
    }
};

/* A key is stored in its second bucket, then displaced three times. */
struct displace : rl::test_suite<displace, 2> {
    shard_t shard;
    word_t ready;

    void before()
    {
        shard.reset();
        STORE(ready, 0, mo_relaxed);
    }

    void thread(unsigned index)
    {
        if (index == 1) {
            bool const stored = LOAD(ready, mo_acquire) != 0;
            unsigned const found = shard.get(false, 12);
            RL_ASSERT(found != AGAIN);
            RL_ASSERT(!stored || found != MISS); /* I2 */
            return;
        }
        STORE(shard.bytes[0][0], 1, mo_relaxed);
        STORE(shard.bytes[0][1], 1, mo_relaxed);
        shard.publish(1, 1);
        STORE(ready, 1, mo_release);
        shard.displace(1, 0);
        shard.displace(0, 1);
        shard.displace(1, 0);
    }
};

/* The writer dies in a displacement between copy and bump; the next one clears the duplicate. */
struct repair : rl::test_suite<repair, 2> {
    shard_t shard;

    void before()
    {
        shard.reset();
        STORE(shard.bytes[0][0], 1, mo_relaxed);
        STORE(shard.bytes[0][1], 1, mo_relaxed);
        STORE(shard.entry[1], 1, mo_relaxed);
    }

    void thread(unsigned index)
    {
        if (index == 1) {
            unsigned const found = shard.get();
            RL_ASSERT(found != AGAIN && found != MISS); /* I2 */
            return;
        }
        STORE(shard.entry[0], 1, mo_release); /* the copy; then death */
        if (!seeded("REPAIR_WITHOUT_BUMP"))
            shard.bump(1, 0);
        STORE(shard.entry[1], 0, mo_release);
    }
};

/* A duplicate left by a death: the value is replaced. Whatever copy a read meets, it never goes back in time. */
struct duplicate : rl::test_suite<duplicate, 2> {
    shard_t shard;
    word_t done;

    void before()
    {
        shard.reset();
        STORE(shard.bytes[0][0], 1, mo_relaxed);
        STORE(shard.bytes[0][1], 1, mo_relaxed);
        STORE(shard.entry[0], 1, mo_relaxed);
        STORE(shard.entry[1], 1, mo_relaxed);
        STORE(done, 0, mo_relaxed);
    }

    void thread(unsigned index)
    {
        if (index == 1) {
            bool const replaced = LOAD(done, mo_acquire) != 0;
            unsigned const first = shard.get();
            unsigned const second = shard.get();
            RL_ASSERT(first != MISS && second != MISS);     /* I2 */
            RL_ASSERT(!replaced || first != 1);             /* I1: stale */
            RL_ASSERT(first == AGAIN || second >= first);   /* I1: back in time */
            return;
        }
        unsigned const kept = rl::rand(2);
        unsigned const other = 1 - kept;
        shard.prepare(1);
        STORE(shard.bytes[1][0], 2, mo_relaxed);
        STORE(shard.bytes[1][1], 2, mo_relaxed);
        if (!seeded("COPY_FORGOTTEN")) {
            shard.bump(other, kept);
            STORE(shard.entry[other], 0, mo_release);
        }
        shard.publish(kept, 2);
        STORE(done, 1, mo_release);
    }
};

/* A value is replaced by one store; then the page of the old one is reclaimed and holds another key. */
struct overwrite : rl::test_suite<overwrite, 2> {
    shard_t shard;

    void before()
    {
        shard.reset();
        STORE(shard.bytes[0][0], 1, mo_relaxed);
        STORE(shard.bytes[0][1], 1, mo_relaxed);
        STORE(shard.entry[0], 1, mo_relaxed);
    }

    void thread(unsigned index)
    {
        if (index == 1) {
            unsigned const first = shard.get();
            unsigned const second = shard.get();
            RL_ASSERT(first != MISS && second != MISS);   /* I2 */
            RL_ASSERT(first == AGAIN || second >= first); /* I1: back in time */
            return;
        }
        shard.prepare(1);
        STORE(shard.bytes[1][0], 2, mo_relaxed);
        STORE(shard.bytes[1][1], 2, mo_relaxed);
        if (seeded("DELETE_THEN_SET"))
            STORE(shard.entry[0], 0, mo_release);
        shard.publish(0, 2);
        shard.prepare(0);
        STORE(shard.bytes[0][0], 100, mo_relaxed);
        STORE(shard.bytes[0][1], 100, mo_relaxed);
    }
};

/* clear(), then a set of the same key. */
struct clear : rl::test_suite<clear, 2> {
    shard_t shard;
    word_t cleared, stored;

    void before()
    {
        shard.reset();
        STORE(shard.bytes[0][0], 1, mo_relaxed);
        STORE(shard.entry[0], 1, mo_relaxed);
        STORE(shard.bytes[0][1], 1, mo_relaxed);
        STORE(cleared, 0, mo_relaxed);
        STORE(stored, 0, mo_relaxed);
    }

    void thread(unsigned index)
    {
        if (index == 1) {
            bool const after_set = LOAD(stored, mo_acquire) != 0;
            bool const after_clear = LOAD(cleared, mo_acquire) != 0;
            unsigned const found = shard.get();
            RL_ASSERT(!after_clear || found != 1);                  /* I3 */
            RL_ASSERT(!after_set || found == 2);                    /* I3 */
            return;
        }
        unsigned const old_seq = shard.seq;
        if (!seeded("CLEAR_KEEPS_TAIL")) {
            shard.prepare(1);
            shard.tail = 1;
        }
        STORE(shard.flush_seq, old_seq, mo_release);
        STORE(cleared, 1, mo_release);
        unsigned const page = shard.tail == 1 ? 1 : 2; /* page 2 stands for the rest of an old tail page */
        STORE(shard.bytes[page][0], 2, mo_relaxed);
        STORE(shard.bytes[page][1], 2, mo_relaxed);
        shard.publish(0, page + 1);
        STORE(stored, 1, mo_release);
    }
};

/* secure_delete: the bytes of a dead copy are wiped in place, the life of the page goes on. */
struct wipe : rl::test_suite<wipe, 2> {
    shard_t shard;

    void before()
    {
        shard.reset();
        STORE(shard.bytes[0][0], 1, mo_relaxed);
        STORE(shard.bytes[0][1], 1, mo_relaxed);
        STORE(shard.entry[0], 1, mo_relaxed);
    }

    void thread(unsigned index)
    {
        if (index == 1) {
            shard.get();
            return;
        }
        STORE(shard.entry[0], 0, mo_release);
        if (!seeded("NO_FENCE_BEFORE_WIPE"))
            FENCE(mo_seq_cst);
        STORE(shard.bytes[0][0], 0, mo_relaxed);
        STORE(shard.bytes[0][1], 0, mo_relaxed);
    }
};

/*
 * An item that expires at 10 is touched at 5, then it gets 15 o'clock. `now` is the clock: who reads 15 off it reads
 * after the touch.
 */
struct touch : rl::test_suite<touch, 2> {
    word_t deadline, now;

    void before()
    {
        STORE(deadline, 10, mo_relaxed);
        STORE(now, 5, mo_relaxed);
    }

    void thread(unsigned index)
    {
        if (index == 0) {
            STORE(deadline, 20, mo_release);
            STORE(now, 15, mo_release);
            return;
        }
        for (unsigned i = 0; i != PASSES; ++i) {
            unsigned const d = LOAD(deadline, mo_relaxed);
            if (d > LOAD(now, mo_acquire))
                return;
            if (seeded("EXPIRED_UNCHECKED") || LOAD(deadline, mo_relaxed) == d)
                RL_ASSERT(!"I2: an item touched in time is missed");
        }
    }
};

/*
 * Thread 0 owns the word and dies; its beacon goes out. Thread 1 wins the beacon, raises the generation, then wants
 * the guard. Thread 2 has waited and asks whether the owner is dead. `hard` is what the guard protects: Relacy reports
 * any two accesses to it that are not ordered.
 */
struct handover : rl::test_suite<handover, 3> {
    enum { DEAD = 1, NEXT = 2, WAITER = 3 };
    word_t owner, generation, beacon;
    rl::var<unsigned> hard;

    void before()
    {
        STORE(owner, DEAD, mo_relaxed);
        STORE(generation, 1, mo_relaxed);
        STORE(beacon, 1, mo_relaxed);
        hard($) = 0;
    }

    void inside()
    {
        hard($) = hard($) + 1;
        owner($).exchange(0, unless("GIVE_BACK_RELAXED", mo_release));
    }

    void thread(unsigned index)
    {
        if (index == 0) {
            hard($) = 1;
            STORE(beacon, 0, mo_release); /* the kernel's undo, under its lock */
        } else if (index == 1) {
            unsigned free_ = 0;
            if (!beacon($).compare_exchange_strong(free_, 1, mo_acq_rel, mo_relaxed)) /* semop */
                return;
            STORE(generation, 2, unless("GENERATION_STORE_RELAXED", mo_release));
            unsigned expected = 0;
            if (owner($).compare_exchange_strong(expected, NEXT, unless("TAKE_RELAXED", mo_acquire), mo_relaxed))
                inside();
        } else {
            unsigned expected = LOAD(owner, mo_relaxed);
            bool dead = false;
            if (expected == DEAD) {
                dead = LOAD(generation, unless("GENERATION_LOAD_RELAXED", mo_acquire)) != 1;
                if (!dead)
                    dead = LOAD(beacon, mo_acquire) == 0; /* semctl, under the kernel's lock */
            }
            if ((dead || expected == 0) &&
                owner($).compare_exchange_strong(expected, WAITER, mo_acquire, mo_relaxed))
                inside();
        }
    }
};

/* Relacy replaces operator new, so its log must not allocate through the standard library. */
struct nowhere_t : std::streambuf {
    int overflow(int c) { return c; }
};

template <typename test_t> int run(unsigned long iterations)
{
    nowhere_t nowhere;
    std::ostream silent(&nowhere);
    std::ostream *const log = std::getenv("MODEL_HISTORY") ? &std::cerr : &silent;
    rl::test_params params;
    params.iteration_count = static_cast<rl::iteration_t>(iterations);
    params.search_type = rl::sched_random;
    params.output_stream = log;
    params.progress_stream = &silent;
    rl::simulate<test_t>(params);
    bool const failed = params.test_result != rl::test_result_success;
    std::cout << rl::test_result_str(params.test_result) << " runs " << params.stop_iteration << std::endl;
    return failed ? 1 : 0;
}

} // namespace

int main(int argc, char **argv)
{
    if (argc < 3) {
        std::cerr << "usage: read_protocol SCENARIO ITERATIONS [SEED]" << std::endl;
        return 2;
    }
    std::string const scenario = argv[1];
    unsigned long const iterations = std::strtoul(argv[2], 0, 10);
    if (argc > 3)
        seed = argv[3];
    if (scenario == "recycle")
        return run<recycle>(iterations);
    if (scenario == "chain")
        return run<chain>(iterations);
    if (scenario == "displace")
        return run<displace>(iterations);
    if (scenario == "repair")
        return run<repair>(iterations);
    if (scenario == "duplicate")
        return run<duplicate>(iterations);
    if (scenario == "overwrite")
        return run<overwrite>(iterations);
    if (scenario == "clear")
        return run<clear>(iterations);
    if (scenario == "wipe")
        return run<wipe>(iterations);
    if (scenario == "touch")
        return run<touch>(iterations);
    if (scenario == "handover")
        return run<handover>(iterations);
    std::cerr << "unknown scenario '" << scenario << "'" << std::endl;
    return 2;
}
