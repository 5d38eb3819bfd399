/* read.h - a read: no guard, no system call, at most one byte stored.  Inline, because the calls between its parts would
 * be a fifth of it; table.c gives the same as functions.
 *
 * Read rules
 *   R1  After copying, the entry is compared again, then the life of the item's first page, both in this order, the entry
 *       by an acquire load.  An entry unchanged over an unchanged life means the item was stored all the while, so none of
 *       its pages was given a new life.
 *   R2  A reader stores nothing but a use bit in a bucket line, never into a page.
 *   R3  A reader that found nothing compares `moves` of the first bucket: a key displaced during the pass is no miss.
 */
#ifndef SC_READ_H
#define SC_READ_H
#include "guard.h"
#include "heap.h"
#include <sched.h>

#define SC_PASSES_QUICK 64u  /* passes before the reader yields the processor between them */
#define SC_PASSES_MOST 1000u /* then it answers miss, counted as read_contended */

enum { SC_IS_KEY, SC_IS_OTHER, SC_IS_ROT };
__attribute__((noinline)) int sc_compare_any(const sc_table_t *t, const sc_key_t *k, u32 page, u32 off, sc_found_t *f);
/* Through a copy, so that the caller's f need not lie in memory. */
SC_INLINE int sc_compare_any_of(const sc_table_t *t, const sc_key_t *k, u32 page, u32 off, sc_found_t *f)
{
    sc_found_t found = *f;
    sc_key_t key = *k;
    int is = sc_compare_any(t, &key, page, off, &found);
    *f = found;
    return is;
}

/* The item at a place against a key; f->it is filled unless rotten. */
SC_INLINE int sc_compare(const sc_table_t *t, const sc_shard_t *s, const sc_key_t *k, u32 page, u32 off, sc_found_t *f)
{
    const u64 *p = (const u64 *)(const void *)sc_at(t, s, page, off);
    if (SC_UNLIKELY(!sc_item_plain(t, p, k->len, page, off, &f->it)))
        return sc_compare_any_of(t, k, page, off, f);
    return SC_LIKELY(sc_same(p + 2, k->p, k->len)) ? SC_IS_KEY : SC_IS_OTHER;
}

/* Finds a key in one pass over its two buckets.  f is what was found; value bytes are copied by sc_get_finish, which
 * validates (R1); a caller that does not call it asks for `validated`.  A miss is always validated. */
SC_INLINE int sc_read_begin(sc_table_t *t, const sc_key_t *k, sc_found_t *f, int validated)
{
    SC_CRASH_OP("get");
    sc_shard_t *s = &t->shard[k->shard];
    for (u32 pass = 0; pass < SC_PASSES_MOST; pass++) {
        if (SC_UNLIKELY(pass >= SC_PASSES_QUICK))
            sched_yield();
        sc_bucket_t *first = &s->buckets[k->b1], *bucket = first;
        u8 moves = SC_LD_ACQ(&first->moves);
        u32 b = k->b1;
        for (int turn = 0;; turn++) {
            for (u32 match = sc_bucket_match(bucket, k->tag); match != 0; match &= match - 1) {
                u32 i = sc_match_slot(match);
                u64 e = SC_LD_ACQ(&bucket->entry[i]);
                if (SC_UNLIKELY(SC_ENTRY_TAG(e) != k->tag))
                    goto again;
                u32 page = SC_ENTRY_PAGE(e), off = SC_ENTRY_OFF(e);
                if (SC_UNLIKELY(!sc_place_ok(t, page, off)))
                    continue; /* rot: no item can lie there */
                const u8 *at = sc_at(t, s, page, off);
                SC_PREFETCH(at);
                SC_PREFETCH(at + SC_LINE);
                SC_PREFETCH(at + 2 * SC_LINE);
                u64 m = SC_LD_ACQ(&s->life[page]);
                SC_CRASHPOINT(read_begun);
                if (SC_UNLIKELY(SC_LD_ACQ(&bucket->entry[i]) != e)) /* acquire: equal bits of a later item bring its bytes */
                    goto again;
                if (SC_UNLIKELY(SC_LIFE_SEQ(m) <= SC_LD(&s->hard->flush_seq)))
                    continue;
                int is = sc_compare(t, s, k, page, off, f);
                int expired = 0;
                if (is == SC_IS_KEY && SC_W1_DEADLINE(f->it.w1) != 0)
                    expired = SC_W1_DEADLINE(f->it.w1) <= sc_clock_now_ms(&t->clock);
                if (validated || SC_UNLIKELY(is != SC_IS_KEY) || SC_UNLIKELY(expired)) {
                    SC_FENCE_ACQ();
                    if (SC_UNLIKELY(SC_LD_ACQ(&bucket->entry[i]) != e || SC_LD(&s->life[page]) != m))
                        goto again; /* R1 */
                    if (expired && SC_LD((const u64 *)(const void *)at + 1) != f->it.w1)
                        goto again; /* touched before the clock was read */
                    if (SC_UNLIKELY(is == SC_IS_ROT))
                        sc_count(t, SC_ST_CORRUPT, 1);
                    if (is != SC_IS_KEY)
                        continue;
                    if (expired)
                        return SC_MISS;
                }
                f->at = at;
                f->place = bucket;
                f->bucket = b;
                f->slot = i;
                f->entry = e;
                f->life = m;
                return SC_HIT;
            }
            if (turn == 1)
                break;
            b = sc_key_b2(t, k);
            bucket = &s->buckets[b];
        }
        SC_FENCE_ACQ();
        if (SC_LIKELY(SC_LD(&first->moves) == moves))
            return SC_MISS; /* R3 */
    again:;
        SC_CRASHPOINT(read_again);
    }
    sc_count(t, SC_ST_CONTENDED, 1);
    return SC_MISS;
}

/* Copies the value (f->it.vlen bytes, or 8 for a counter) to private memory, then validates place and content.
 * SC_AGAIN: begin anew.  SC_MISS: the check does not match.  count: raise the use bit. */
SC_INLINE int sc_read_finish(sc_table_t *t, const sc_key_t *k, sc_found_t *f, void *value, int count)
{
    sc_shard_t *s = &t->shard[k->shard];
    sc_bucket_t *bucket = f->place;
    const sc_item_t *it = &f->it;
    u32 check = 0, len = it->vlen;
    u64 hash = 0;
    int whole = 1;
    if (SC_LIKELY(it->off + it->total <= t->page_size)) {
        const u8 *p = f->at;
        SC_BARRIER();
        if (SC_LIKELY(t->check_len != 0)) {
            hash = sc_value_copy(&t->secret, it->type, value, p + it->voff, len);
            check = SC_LD((const u32 *)(const void *)(p + it->total - 4));
        } else {
            memcpy(value, p + it->voff, len);
        }
        SC_BARRIER();
    } else {
        sc_item_t far = *it;
        whole = sc_item_gather(t, s, &far, far.voff, value, len) &&
                (t->check_len == 0 || sc_item_gather(t, s, &far, far.total - 4, &check, 4));
        hash = whole && t->check_len != 0 ? sc_value_hash(&t->secret, far.type, value, len) : 0;
    } /* not whole: a chain that leaves the segment, torn or rot; the comparison tells which */
    SC_CRASHPOINT(read_copied);
    SC_FENCE_ACQ();
    if (SC_UNLIKELY(SC_LD_ACQ(&bucket->entry[f->slot]) != f->entry || SC_LD(&s->life[it->page]) != f->life))
        return SC_AGAIN; /* R1 */
    SC_CRASHPOINT(read_valid);
    u64 hm = sc_header_mix(&t->secret, k->h, it->w0, it->soft);
    u32 place = sc_place_mix(&t->secret, f->life, it->page, it->off);
    int ok = SC_LIKELY(t->check_len != 0) ? check == (sc_content_mix(&t->secret, hm, hash) ^ place)
                                          : SC_W0_HCHECK(it->w0) == (((u32)(hm >> 56) ^ place) & 0xFFu);
    if (SC_UNLIKELY(!ok || !whole)) {
        sc_count(t, SC_ST_CORRUPT, 1);
        return SC_MISS;
    }
    if (SC_TYPE(it->type) == SC_T_INT)
        memcpy(&f->num, value, 8);
    if (count && !t->readonly) {
        u8 freq = SC_LD(&bucket->freq[f->slot]);
        if (freq < SC_FREQ_MAX)
            SC_ST(&bucket->freq[f->slot], (u8)(freq + 1)); /* R2 */
    }
    return SC_HIT;
}
#endif
