/* resize.h - a segment copied into one of another size, item by item, and the moment of change. */
#ifndef SC_RESIZE_H
#define SC_RESIZE_H
#include "table.h"

typedef struct sc_resize sc_resize_t;

/* Stores an item with the version, lifetime, lane and use it had elsewhere. What sc_store returns. */
int sc_put_as(sc_table_t *t, const void *key, u32 klen, const void *value, const sc_found_t *f, u32 lane, u32 freq);

/* `to` is fresh, of the same secrets and the same birth, and nobody else's. NULL: out of memory. */
sc_resize_t *sc_resize_new(sc_table_t *from, sc_table_t *to);
/* Gives back every guard still held. */
void sc_resize_free(sc_resize_t *r);
/* Copies what changed in groups first..last-1 since they were last copied; *changed counts them. Takes no guard. */
int sc_resize_copy(sc_resize_t *r, u32 first, u32 last, u64 *changed);
/* Takes every guard, copies what changed, carries leases and counters over, and stores the successor word: COMMIT.  After
 * pause_ns without success every guard is free again, and SC_BUSY. */
int sc_resize_switch(sc_resize_t *r, u64 word, i64 pause_ns);
/* COPY becomes READY; anybody who finds the successor word may do it. 1 = it was, or is, READY. */
int sc_resize_publish(sc_header_t *h);

typedef struct {
    u64 items;    /* live items of the old segment at the change */
    u64 left_out; /* of those, what the new one had no room for, or evicted */
    u64 corrupt;  /* entries whose item does not pass its check: not copied */
    u64 pause_ns; /* how long writers were held up */
} sc_resized_t;
sc_resized_t sc_resize_result(const sc_resize_t *r);
#endif
