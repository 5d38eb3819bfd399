/* table.h - the handle of one attached segment and what can be done with it.
 *
 * A handle is private memory of one process: pointers into the mapping, a copy of the checked geometry, the hash
 * secrets.  Everything here builds and runs without Python.
 *
 * Functions that need the shard's guard held end in _guarded; only table.c, sweep.c and lease.c take guards, one at a
 * time.  Functions that may wait take wait_ns: 0 means try, and SC_BUSY asks the caller to come again. */
#ifndef SC_TABLE_H
#define SC_TABLE_H
#include "atomics.h"
#include "clock.h"
#include "hash.h"
#include "layout.h"

enum sc_rc {
    SC_OK = 0,
    SC_HIT = 1,          /* read: found */
    SC_MISS = 2,         /* absent or expired */
    SC_EXISTS = 3,       /* add: present */
    SC_CHANGED = 4,      /* cas or conditional store: another value stands there */
    SC_AGAIN = 5,        /* read: the item changed meanwhile, begin anew */
    SC_AFTER_DEATH = 6,  /* guard: granted, its last owner died inside */
    SC_BUSY = -1,        /* guard not granted in the time given, or a signal arrived */
    SC_LOST = -2,        /* segment or semaphores removed or replaced */
    SC_WORKERS = -3,     /* no free worker slot */
    SC_ACCESS = -4,      /* the kernel refuses us the semaphores */
    SC_SYSTEM = -5,      /* another errno, in t->sys_errno */
    SC_TOO_LARGE = -6,
    SC_NO_SPACE = -7,
    SC_NOT_NUMBER = -8,
    SC_OVERFLOW = -9,
    SC_READONLY = -10,
    SC_LEASES_FULL = -11
};

typedef struct {
    sc_guard_word_t *guard;
    sc_hard_t *hard;
    sc_soft_t *soft;
    sc_lease_t *leases;
    u64 *life;
    u32 *next, *birth, *ghost;
    sc_bucket_t *buckets;
    u8 *pages;
} sc_shard_t;

struct sc_proc;

typedef struct sc_table {
    u8 *base;
    u64 size;
    sc_header_t h; /* private copy, checked at attach */
    sc_secret_t secret;
    sc_clock_t clock;
    sc_control_t *control;
    sc_worker_t *workers;
    struct sc_proc *proc; /* NULL: read-only, no worker slot */
    int readonly, lost;
    u32 check_len; /* bytes of an item's check: 4 with integrity=full, else 0 */
    int sys_errno;
    u32 n_shards, n_buckets, n_pages, page_size, page_shift, reserve, n_ghosts, n_leases;
    int sem_id, shm_id, fd_form;
    u64 dev, ino; /* POSIX: what the name stood for at attach */
    char path[280];
    i64 next_look;           /* coarse ms when the write path looks again whether the segment still has its name */
    i64 next_clean;          /* coarse ms when the write path looks at the sweep election again */
    void (*on_wait)(void *); /* tests */
    sc_shard_t shard[];
} sc_table_t;

/* ---- keys, values, results -------------------------------------------------------------------------------------- */
typedef struct {
    const u8 *p;
    u32 len;
    u32 shard, tag, b1;
    u64 h;
} sc_key_t;

typedef struct {
    const void *p;   /* value bytes; a counter passes num instead */
    i64 num;
    u32 len;
    u8 type;
    u64 deadline, soft; /* ms since birth; 0 = never, none */
} sc_value_t;

/* An item as a guard holder, or a reader before validation, sees it. */
typedef struct {
    u64 w0, w1, soft;
    u32 page, off, klen, vlen, flags, type, voff, total;
} sc_item_t;

/* One item as found by a reader: where it stands in the index and its header, from one validated pass. */
typedef struct {
    sc_item_t it;
    u64 entry, life;
    const u8 *at;       /* the item's first byte */
    sc_bucket_t *place; /* the bucket that held the entry */
    i64 num;            /* type INT: the number at the time of the pass */
    u32 bucket, slot;
} sc_found_t;

typedef struct {
    u64 lo, hi; /* opaque CAS token */
} sc_token_t;

enum sc_mode { SC_SET, SC_ADD, SC_REPLACE, SC_CAS, SC_IF_SAME };

typedef struct {
    enum sc_mode mode;
    sc_token_t token;       /* SC_CAS */
    u64 same_entry, same_life; /* SC_IF_SAME: place and life of the item that was read */
    int keep_lifetime;         /* SC_IF_SAME: deadlines of the present item, not of the value */
} sc_cond_t;

/* ---- table.c: reads (no guard, no system call) and writes --------------------------------------------------------- */
static inline void sc_key_init(const sc_table_t *t, sc_key_t *k, const void *p, u32 len)
{
    k->p = (const u8 *)p;
    k->len = len;
    k->h = sc_hash(&t->secret, p, len, 0);
    k->shard = sc_shard_of(k->h, t->n_shards);
    k->tag = sc_tag_of(k->h);
    k->b1 = sc_home_of(k->h, t->n_buckets);
}
/* The key's second bucket; b1 again in a table of one bucket a group. */
static inline u32 sc_key_b2(const sc_table_t *t, const sc_key_t *k) { return sc_other_of(k->b1, k->tag, t->n_buckets); }
int sc_get_begin(sc_table_t *t, const sc_key_t *k, sc_found_t *f); /* sc_get_finish validates */
int sc_look(sc_table_t *t, const sc_key_t *k, sc_found_t *f);      /* validated: presence, header, lifetime */
int sc_get_finish(sc_table_t *t, const sc_key_t *k, sc_found_t *f, void *value, int count);
sc_token_t sc_token_of(const sc_table_t *t, const sc_key_t *k, const sc_found_t *f, const void *value);

int sc_store(sc_table_t *t, const sc_key_t *k, const sc_value_t *v, const sc_cond_t *cond, i64 wait_ns);
int sc_delete(sc_table_t *t, const sc_key_t *k, const sc_cond_t *cond, i64 *num, i64 wait_ns);
int sc_touch(sc_table_t *t, const sc_key_t *k, u64 deadline, const sc_cond_t *cond, i64 wait_ns);
int sc_incr(sc_table_t *t, const sc_key_t *k, i64 delta, int create, i64 initial, u64 deadline, i64 *result,
            i64 wait_ns);
int sc_clear_shard(sc_table_t *t, u32 shard, i64 wait_ns);
u64 sc_now(sc_table_t *t);

/* ---- sweep.c: cleaning and walking -------------------------------------------------------------------------------- */
void sc_tick(sc_table_t *t);
int sc_clean(sc_table_t *t, u64 limit, u64 *cursor, u64 *reclaimed, i64 wait_ns);
u32 sc_n_groups(const sc_table_t *t);
typedef struct {
    u32 shard, bucket, slot, freq, lane, page, off, birth_s;
    u32 probes; /* buckets a read of the key looks at: 1 its home, 2 */
    u64 life;
    sc_found_t f;
} sc_seen_t;
/* Copies the entries of a group: returns how many; *moves_sum tells whether a displacement ran meanwhile. */
u32 sc_group_entries(sc_table_t *t, u32 group, u64 *entries, u32 *where, u8 *moves);
int sc_group_moved(sc_table_t *t, u32 group, const u8 *moves);
int sc_see(sc_table_t *t, u32 group, u32 where, u64 entry, sc_seen_t *out, u8 *keybuf);
int sc_see_content(sc_table_t *t, const sc_seen_t *seen, const u8 *key, u8 *value);

/* ---- lease.c ------------------------------------------------------------------------------------------------------ */
int sc_lease_take(sc_table_t *t, u64 hash, u64 lease_ms, u64 *owner, u64 *fence, i64 wait_ns);
int sc_lease_extend(sc_table_t *t, u64 hash, u64 owner, u64 lease_ms, i64 wait_ns);
int sc_lease_release(sc_table_t *t, u64 hash, u64 owner, i64 wait_ns);
int sc_lease_wait(sc_table_t *t, u64 hash, i64 wait_ns);
int sc_lease_carry(sc_table_t *from, sc_table_t *to);
u64 sc_lease_hash(const sc_table_t *t, const void *name, u32 len);

/* ---- format.c: geometry, formatting, attaching -------------------------------------------------------------------- */
typedef struct {
    u64 size, buckets, item_size, guards, max_value, workers; /* 0 = choose */
} sc_want_t;
/* Fills the geometry fields of h; NULL, or a message in msg, which names field, found value and limit. */
const char *sc_plan(const sc_want_t *want, sc_header_t *h, char *msg, size_t msg_len);
void sc_format(u8 *base, const sc_header_t *h);
/* NULL, or why this is no segment of ours: message in msg; *mismatch set when it is one of another layout. out->state is
 * READY or COPY. */
const char *sc_header_check(const u8 *base, u64 size, sc_header_t *out, int *mismatch, char *msg, size_t msg_len);
u64 sc_header_sum(const sc_header_t *h);
sc_table_t *sc_table_new(u8 *base, const sc_header_t *h, int readonly);
void sc_table_free(sc_table_t *t);

/* ---- check.c: read-only audit ------------------------------------------------------------------------------------- */
typedef void (*sc_report_fn)(void *arg, const char *code, u32 shard, const char *text);
u64 sc_check(sc_table_t *t, sc_report_fn report, void *arg);
/* 1 = the lane can be walked to its end: starts has a bit per 8 bytes of the shard's pages, set where an item begins. */
int sc_check_lane(sc_table_t *t, u32 shard, u32 lane, u8 *starts, u32 *walked);
#endif
