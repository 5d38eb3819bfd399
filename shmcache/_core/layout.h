/* layout.h - every byte of a segment.
 *
 * This file alone says where things lie and who may touch them.  It holds no code that changes a segment.
 *
 *   offset 0            sc_header_t      one page; checked and copied once at attach, constant once state is READY
 *   4096                sc_control_t     one page; successor word, sweep election
 *   8192                sc_worker_t[W]   two lines a worker: identity, statistics
 *   shard_off + s*size  shard s:
 *       sc_guard_word_t  one line       the binary semaphore word of the fast guard, the dirty word of the other
 *       sc_hard_t        two lines      the log: where each lane begins and ends
 *       sc_soft_t        eight lines    hints and statistics; wrong values cost performance, never correctness
 *       sc_lease_t[L]                   leases of lock() and get_or_set()
 *       u64 life[P]                     lane:8 | seq:56 of every page
 *       u32 next[P]                     following page of the same lane
 *       u32 birth[P]                    seconds since the segment's birth when the page was prepared (hint)
 *       u32 ghost[G]                    fingerprint:16 | time:16 of evicted keys (hint)
 *       sc_bucket_t[NB]                 the index, the only truth about what is stored
 *       u8 page[P][page_size]           item bytes
 *
 * Invariants
 *   I1  No pointer, no code reference, no lock with pointers, no floating point lies in a segment; integers are
 *       little-endian and of fixed width.
 *   I2  An item is stored if and only if a bucket entry points at it and its page's seq is above flush_seq.
 *   I3  Every commit is one aligned store: tail[lane] (log), entry (index), head[lane] (free), flush_seq (clear),
 *       the number of a counter, the deadline word of an item.
 *   I4  A page is free if and only if it lies outside the window life[head].seq..life[tail].seq of its lane.
 *   I5  No entry points at a free page: whoever moves a head past an item clears or moves its entries first.
 *   I6  An offset, length or page number read from a segment is loaded once into a local, checked, then used.
 */
#ifndef SC_LAYOUT_H
#define SC_LAYOUT_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int32_t i32;
typedef int64_t i64;

#define SC_MAGIC "SHMCACHE"
#define SC_LAYOUT_VERSION 1u
#define SC_BYTE_ORDER 0x01020304u
#define SC_LINE 64u
#define SC_HEADER_SIZE 4096u
#define SC_CONTROL_OFF 4096u
#define SC_WORKER_OFF 8192u

#define SC_N_LANES 6u          /* 0 probation, 1 probation of large items, 2..5 main by remaining lifetime */
#define SC_LANE_LARGE 1u
#define SC_LANE_MAIN 2u
#define SC_N_SLOTS 7u          /* entries of a bucket: 8 bytes of use bits and 7 entries fill one cache line */
#define SC_GROUP 256u          /* buckets of a group: both buckets of a key lie in one group */
#define SC_FREQ_MAX 3u
#define SC_NO_PAGE 0xFFFFFFu   /* in a tail word: the lane owns nothing */
#define SC_LEASE_PROBES 8u

#define SC_MIN_SIZE (256u * 1024u)
#define SC_MAX_SIZE (1ull << 46)
#define SC_MAX_KEY 65535u
#define SC_MAX_VALUE ((1u << 28) - 1u)
#define SC_MIN_BUCKETS 16u     /* a shard's smallest bucket count; below it two-choice placement stops working */
#define SC_MAX_SHARDS 1024u    /* one semaphore each; 1 + 1024 + 4096 stays far below SEMMSL (32,000) */
#define SC_MAX_WORKERS 4096u   /* 12 bits of the owner word */
#define SC_MIN_PAGE 4096u      /* smaller pages waste more on tails than they save in granularity of reclaim */
#define SC_MAX_PAGE 65536u     /* 16-bit offsets */

/* COPY: built by a resize; becomes READY once the segment it replaces names it as successor. */
enum { SC_STATE_INIT = 0x494E4954, SC_STATE_READY = 0x52454459, SC_STATE_COPY = 0x434F5059 };
enum { SC_FORM_POSIX = 1, SC_FORM_SYSV = 2, SC_FORM_ANON = 3, SC_FORM_FILE = 4 };
enum { SC_GUARD_SEMAPHORE = 1, SC_GUARD_FAST = 2 };
enum {
    SC_F_HEADER_ONLY = 1u,  /* integrity=header: an 8-bit check over header and key instead of 32 bits over all */
    SC_F_NO_EVICT = 2u,     /* eviction=none */
    SC_F_SECURE = 4u,       /* secure_delete=yes: bytes of dead copies are zeroed */
    SC_F_UNDO_WORKS = 8u    /* the probe at creation saw SEM_UNDO apply at process death */
};

typedef struct {
    char magic[8];
    u32 layout_version, byte_order;
    u64 size;
    u32 n_shards, n_buckets;        /* buckets per shard */
    u32 page_size, n_pages;         /* per shard */
    u32 n_workers, n_leases;        /* leases per shard */
    u32 n_ghosts, item_size;        /* ghosts per shard */
    u64 shard_off, shard_size, max_value;
    u32 guard_kind, flags;
    u64 clean_period_ms, default_ttl_ms; /* 0 = only lazily, 0 = never expires */
    u64 hash_key[2];
    u8 uuid[16], boot_id[16];
    u64 ipc_ns;                     /* inode of the creator's /proc/self/ns/ipc */
    i64 clock_base_ns;              /* CLOCK_BOOTTIME of the initial time namespace at birth */
    i64 created_ns;                 /* wall clock, display only */
    u32 creator_pid, creator_uid, owner_uid, owner_gid;
    u32 perms, form;
    i32 sem_key, sem_id;
    i64 sem_ctime;
    u32 n_sems;
    i32 shm_key;
    u64 lineage;                    /* first uuid word of the first of a chain of resizes; 0: never resized */
    u64 reserved0;
    char name[256];                 /* full name, NUL-terminated */
    u64 checksum;                   /* over every byte before it */
    u32 state;                      /* INIT until everything else is written; outside the checksum */
    u32 reserved;
} sc_header_t;
static_assert(offsetof(sc_header_t, name) == 240, "layout v1");
static_assert(offsetof(sc_header_t, checksum) == 496, "layout v1");
static_assert(sizeof(sc_header_t) == 512, "layout v1");

#define SC_SUCCESSOR_REMOVED 1u
typedef struct {
    u64 successor;    /* 0; REMOVED; or the first uuid word of the segment that replaces this one. Any writer reads it
                         under its guard; unlink() and resize write it once. */
    u64 pad0[7];
    u64 next_step;    /* ms since birth when the next sweep step is due; won by compare-and-swap without a guard */
    u64 sweep_done;   /* ms since birth up to which the sweep has paid; winner of next_step writes it */
    u64 sweep_bucket; /* global bucket number where the sweep goes on; winner of next_step writes it */
    u64 sweep_passes;
    u64 pad1[4];
} sc_control_t;
static_assert(sizeof(sc_control_t) == 128, "layout v1");

/* A worker slot belongs to whoever holds its beacon semaphore.  generation is written by the holder before any use. */
enum {
    SC_ST_HITS, SC_ST_MISSES, SC_ST_CORRUPT, SC_ST_CONTENDED, SC_ST_RETRIES, SC_ST_WAITS, SC_ST_TIMEOUTS,
    SC_ST_FULL_LEASES, SC_N_STATS
};
typedef struct {
    u64 generation;       /* low 19 bits stand in owner words; 0 only before the first use */
    u64 pid, start_time;  /* for display only */
    u64 pad[5];
    u64 stat[SC_N_STATS]; /* written by the holder only; a new holder counts on, so sums never fall */
} sc_worker_t;
static_assert(sizeof(sc_worker_t) == 128, "layout v1");

/* owner = slot:12 | generation:19 | waiters:1; 0 = free. */
#define SC_OWNER_WAITERS 1u
#define SC_OWNER_SLOT(o) ((o) >> 20)
#define SC_OWNER_GEN(o) (((o) >> 1) & 0x7FFFFu)
#define SC_OWNER_MAKE(slot, gen) (((u32)(slot) << 20) | (((u32)(gen) & 0x7FFFFu) << 1))
typedef struct {
    u32 owner;      /* fast guard: the semaphore itself */
    u32 dirty;      /* semaphore guard: owner word of who is inside; non-zero on entry means it died there */
    u32 lease_seq;  /* raised by every lease release; futex for lease waiters */
    u32 pad[13];
} sc_guard_word_t;
static_assert(sizeof(sc_guard_word_t) == 64, "layout v1");

/* A position in the log: page:24 << 32 | offset:32.  offset == page_size means the page is full. */
#define SC_POS(page, off) (((u64)(page) << 32) | (u64)(off))
#define SC_POS_PAGE(p) ((u32)((p) >> 32))
#define SC_POS_OFF(p) ((u32)(p))

/* Written under the shard's guard; flush_seq is also read by readers without it. */
typedef struct {
    u64 tail[SC_N_LANES];  /* COMMIT of the log; page SC_NO_PAGE: the lane owns nothing and head is meaningless */
    u64 head[SC_N_LANES];
    u64 seq;               /* page allocation counter, only grows */
    u64 version;           /* raised before use, never reset */
    u64 flush_seq;         /* pages of a life at or below it count as empty */
    u64 pad;
} sc_hard_t;
static_assert(sizeof(sc_hard_t) == 128, "layout v1");

enum {
    SC_SS_SETS, SC_SS_DELETES, SC_SS_EXPIRED, SC_SS_EVICTED, SC_SS_EVICTED_INDEX, SC_SS_RECOVERIES, SC_SS_RELOCATED,
    SC_SS_BYTES_SET, SC_SS_BYTES_MOVED, SC_SS_NO_SPACE, SC_SS_INCRS, SC_SS_TOUCHES, SC_SS_DISPLACED, SC_SS_REPAIRED,
    SC_SS_CLEARS, SC_SS_MAX_STEPS, SC_SS_MAX_MOVED, SC_SS_EVICTED_LIVE_TTL, SC_N_SHARD_STATS
};
typedef struct {
    i64 dead[SC_N_LANES];    /* bytes of items no entry points at */
    i64 live[SC_N_LANES];    /* bytes of items an entry points at */
    u32 n_pages[SC_N_LANES];
    u32 n_free, cursor;      /* free pages; where the scan for one goes on */
    u32 mean_log2;           /* running mean of log2(item bytes), 16.16 fixed point, clamped after every load */
    u32 most_pages;          /* pages the largest item stored takes; eviction=none keeps so many free to move it */
    u32 recount;             /* 1: hints may be off after a death, count again; 2: the sweep is counting */
    i64 n_items, live_bytes; /* live_bytes counts key + value bytes */
    i64 acc_items, acc_bytes, acc_live[SC_N_LANES]; /* what the counting sweep has seen so far */
    u64 stat[SC_N_SHARD_STATS];
    u32 acc_most, pad2;
    u64 pad1[17];
} sc_soft_t;
static_assert(sizeof(sc_soft_t) == 512, "layout v1");

/* Sums of hints wrap: what a segment holds may be rotten. */
static inline void sc_hint_add(i64 *hint, i64 n) { *hint = (i64)((u64)*hint + (u64)n); }

typedef struct {
    u64 hash;      /* hash of the lease's name */
    u64 owner;     /* slot:12 | generation:19 | nonce:33; 0 = free; written last: COMMIT */
    u64 deadline;  /* ms since birth; CARRIED: taken before a resize, over at its deadline and not at its holder's death */
} sc_lease_t;
#define SC_LEASE_CARRIED (1ull << 63)
#define SC_LEASE_UNTIL(d) ((d) & ~SC_LEASE_CARRIED)

/* entry = tag:16 (never 0) | page:24 | off:16 | coarse:8; 0 = empty.  Stored under the guard, loaded without. */
#define SC_ENTRY(tag, page, off, coarse) \
    (((u64)(tag) << 48) | ((u64)(page) << 24) | ((u64)(off) << 8) | (u64)(coarse))
#define SC_ENTRY_TAG(e) ((u32)((e) >> 48))
#define SC_ENTRY_PAGE(e) ((u32)((e) >> 24) & 0xFFFFFFu)
#define SC_ENTRY_OFF(e) ((u32)((e) >> 8) & 0xFFFFu)
#define SC_ENTRY_COARSE(e) ((u32)(e) & 0xFFu)
#define SC_ENTRY_PLACE(e) ((e) & 0x0000FFFFFFFFFF00ull)

typedef struct {
    u8 freq[SC_N_SLOTS];  /* use bits 0..3; readers raise them without a guard, a lost update is a lost hint */
    u8 moves;             /* raised between copy and clear of a displacement; readers that missed compare it */
    u64 entry[SC_N_SLOTS];
} sc_bucket_t;
static_assert(sizeof(sc_bucket_t) == 64, "one cache line");

#define SC_LIFE(lane, seq) (((u64)(lane) << 56) | (seq))
#define SC_LIFE_SEQ(m) ((m) & 0x00FFFFFFFFFFFFFFull)
#define SC_LIFE_LANE(m) ((u32)((m) >> 56))

/* item, 8-aligned:
 *   word0  vlen:28 | flags:4 | klen:16 | type:8 | hcheck:8     constant while the item lives
 *   word1  deadline:40 (ms since birth, 0 = never) | version:24  changed in place by touch, one store
 *   [u64 soft deadline]                                          flag SOFT
 *   key, value (a counter's 8 bytes are 8-aligned and changed in place by incr, one store)
 *   [u32 check in the last four bytes]                           integrity=full
 * A word0 with klen 0 is a pad: nothing follows on this page. */
#define SC_ITEM_HEADER 16u
enum { SC_IF_SOFT = 1u };
#define SC_W0(vlen, flags, klen, type, hcheck) \
    ((u64)(vlen) | ((u64)(flags) << 28) | ((u64)(klen) << 32) | ((u64)(type) << 48) | ((u64)(hcheck) << 56))
#define SC_W0_VLEN(w) ((u32)(w) & 0x0FFFFFFFu)
#define SC_W0_FLAGS(w) (((u32)(w) >> 28) & 0xFu)
#define SC_W0_KLEN(w) ((u32)((w) >> 32) & 0xFFFFu)
#define SC_W0_TYPE(w) ((u32)((w) >> 48) & 0xFFu)
#define SC_W0_HCHECK(w) ((u32)((w) >> 56))
/* Flags and key length alone: equal to SC_W0_KEYED(klen) if the item is not SOFT and its key has that length. */
#define SC_W0_SHAPE(w) ((w) & 0x0000FFFFF0000000ull)
#define SC_W0_KEYED(klen) ((u64)(klen) << 32)
#define SC_W0_PLAIN(w) ((w) & 0x00FFFFFFFFFFFFFFull)
#define SC_W1(deadline, version) (((u64)(deadline) << 24) | ((u64)(version) & 0xFFFFFFu))
#define SC_W1_DEADLINE(w) ((w) >> 24)
#define SC_W1_VERSION(w) ((u32)(w) & 0xFFFFFFu)
#define SC_MAX_DEADLINE ((1ull << 40) - 1)

/* Value types: low nibble; the high nibble of SC_T_CODEC says which codec.  One numbering with codec.py. */
enum { SC_T_BYTES, SC_T_STR, SC_T_INT, SC_T_FLOAT, SC_T_NONE, SC_T_FALSE, SC_T_TRUE, SC_T_BIGINT, SC_T_CODEC };
#define SC_TYPE(flags) ((flags) & 0xFu)

static inline u32 sc_item_voff(u32 klen, u32 flags, u32 type)
{
    u32 off = SC_ITEM_HEADER + ((flags & SC_IF_SOFT) ? 8u : 0u) + klen;
    return SC_TYPE(type) == SC_T_INT ? (off + 7u) & ~7u : off;
}
static inline u32 sc_item_total(u32 klen, u32 vlen, u32 flags, u32 type, u32 check_len)
{
    return (sc_item_voff(klen, flags, type) + vlen + check_len + 7u) & ~7u;
}

/* Semaphores of the set: [0] lifecycle (0 = free), [1..n] guards (1 = free), then beacons (0 = free). */
#define SC_SEM_LIFECYCLE 0
#define SC_SEM_GUARD(s) (1 + (int)(s))
#define SC_SEM_BEACON(n_shards, slot) (1 + (int)(n_shards) + (int)(slot))

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "segments are little-endian"
#endif
#endif
