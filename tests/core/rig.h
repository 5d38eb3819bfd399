/* rig.h - segments, handles and self-describing values for C tests of the core, without Python.
 *
 * A rig is one segment in shared anonymous memory with its own private System V semaphore set.  Handles are made by hand: a
 * test says which worker slot a handle holds and whether that worker is alive, so a death can be played in one process.
 * Sets are removed by rig_free, and by a keeper process if the test dies of anything. */
#ifndef RIG_H
#define RIG_H
#include "guard.h"
#include "heap.h"
#include <stdio.h>

typedef struct {
    u64 size, buckets, guards, max_value, item_size;
    u32 guard_kind, flags;
    u64 clean_period_ms, seed;
} rig_want_t;

typedef struct {
    u8 *base;
    u64 size;
    int sem_id;
    sc_header_t h;
} rig_t;

rig_t *rig_new(const rig_want_t *want);
/* The same geometry, hash key and uuid over fresh memory and a fresh semaphore set: what a copy of the segment looks like
 * once the kernel has given back everything its dead owner held. */
rig_t *rig_twin(const rig_t *of);
void rig_free(rig_t *r);

/* A handle that holds worker slot `slot` in its first life; alive until rig_worker says otherwise. */
sc_table_t *rig_handle(rig_t *r, u32 slot);
void rig_handle_free(sc_table_t *t);
/* Writes what a claim of the slot writes, for images copied over the segment. */
void rig_mark_worker(sc_table_t *t);
void rig_worker(rig_t *r, u32 slot, int alive);
void rig_guard_value(rig_t *r, int value); /* every guard semaphore */

/* Random numbers: xorshift64*. */
typedef struct {
    u64 x;
} rig_rng_t;
u64 rig_next(rig_rng_t *g);
u32 rig_below(rig_rng_t *g, u32 n);

/* Values: bytes that follow from (key, version, length). */
void rig_fill(u8 *p, u32 len, u64 key, u64 version);
int rig_is(const u8 *p, u32 len, u64 key, u64 version);
/* The version a value was made from if it was made for this key; values shorter than 16 bytes cannot tell: 0. */
u64 rig_version_of(const u8 *p, u32 len, u64 key);

/* Keys: text that follows from the number; lengths between 5 bytes and klen_most. */
u32 rig_key(u8 *buf, u64 id, u32 klen_most);

/* What a read found, in the words of the tests. */
typedef struct {
    sc_found_t raw;
    u64 entry, life, deadline, soft;
    u32 vlen, type, again; /* again: passes thrown away because the item changed meanwhile */
    i64 num;
} rig_found_t;

/* A whole read as the Python layer does it. buf holds max_value bytes. SC_HIT, or SC_MISS. */
int rig_get(sc_table_t *t, const sc_key_t *k, u8 *buf, rig_found_t *f);
/* Whether a key is there, without its value. SC_HIT, or SC_MISS. */
int rig_look(sc_table_t *t, const sc_key_t *k, rig_found_t *f);
int rig_set(sc_table_t *t, const sc_key_t *k, const void *p, u32 len, u64 deadline, u64 soft, enum sc_mode mode);
int rig_set_num(sc_table_t *t, const sc_key_t *k, i64 num, u64 deadline, enum sc_mode mode);

/* sc_check with the findings printed to stderr, at most ten. */
u64 rig_audit(sc_table_t *t, int quiet);
/* Pages of each lane's window and free ones against the hints; 0 = they add up. */
int rig_counts(sc_table_t *t, int quiet);

#define RIG_WAIT 2000000000ll /* ns; longer means hung */
#define RIG_PRINT(...) (fprintf(stderr, __VA_ARGS__), fputc('\n', stderr))
#endif
