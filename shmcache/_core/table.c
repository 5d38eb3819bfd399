/* table.c - reads without a guard (how: read.h) and writes under one.
 *
 * Write rules
 *   W2  Duplicates left by a killed displacement are cleared by every set, delete and step before anything else.
 *   W4  The tail is stored once per item, after all its pages and bytes.
 *   K1  cas compares version and number of a counter under the guard that incr holds, so it never overwrites an incr.
 *   The key's own item is never a victim of its own set; a failed or killed set leaves the old value. */
#include "guard.h"
#include "heap.h"
#include "read.h"
#include <stdlib.h>

#define AHEAD_LINES 16u /* lines of an item's second page asked for as soon as its key matches */

u64 sc_now(sc_table_t *t) { return sc_clock_now_ms(&t->clock); }

/* The first count of a process claims its slot; a reader that finds none free goes on uncounted. */
void sc_count_first(sc_table_t *t, int stat, u64 n)
{
    int rc;
    if (t->proc != NULL && !SC_LD(&t->proc->wipe->denied) && !t->lost && sc_worker_claim(t, &rc) != 0)
        sc_count(t, stat, n);
}

/* ---- reads ------------------------------------------------------------------------------------------------------ */

/* Any item against a key: long ones, counters, soft deadlines, other lengths of key. */
int sc_compare_any(const sc_table_t *t, const sc_key_t *k, u32 page, u32 off, sc_found_t *f)
{
    const sc_shard_t *s = &t->shard[k->shard];
    sc_item_t *it = &f->it;
    if (!sc_item_load(t, s, page, off, it))
        return SC_IS_ROT;
    if (it->klen != k->len || !sc_item_key_is(t, s, it, k->p))
        return SC_IS_OTHER;
    if (SC_TYPE(it->type) == SC_T_INT) {
        const u64 *word = sc_item_word(t, s, it, it->voff);
        f->num = word != NULL ? (i64)SC_LD(word) : 0;
    }
    if (!sc_item_flat(t, it)) { /* the processor's own prefetching ends at a page; the caller makes an object meanwhile */
        u32 next = SC_LD(&s->next[page]);
        for (u32 i = 0; next < t->n_pages && i < AHEAD_LINES; i++)
            SC_PREFETCH(sc_at(t, s, next, i * SC_LINE));
    }
    return SC_IS_KEY;
}

/* Finds a key; value bytes are copied by sc_get_finish, which validates. */
int sc_get_begin(sc_table_t *t, const sc_key_t *k, sc_found_t *f) { return sc_read_begin(t, k, f, 0); }
int sc_look(sc_table_t *t, const sc_key_t *k, sc_found_t *f) { return sc_read_begin(t, k, f, 1); }
int sc_get_finish(sc_table_t *t, const sc_key_t *k, sc_found_t *f, void *value, int count)
{
    return sc_read_finish(t, k, f, value, count);
}

/* Opaque: version and content; of a counter, version and number. Place is left out, so relocation changes no token. */
sc_token_t sc_token_of(const sc_table_t *t, const sc_key_t *k, const sc_found_t *f, const void *value)
{
    sc_token_t tok;
    u64 hm = sc_header_mix(&t->secret, k->h, f->it.w0, f->it.soft);
    tok.hi = ((u64)SC_W1_VERSION(f->it.w1) << 8) | f->it.type;
    tok.lo = SC_TYPE(f->it.type) == SC_T_INT ? (u64)f->num
                                          : sc_content_mix(&t->secret, hm,
                                                           sc_value_hash(&t->secret, f->it.type, value, f->it.vlen));
    return tok;
}

/* ---- writes ----------------------------------------------------------------------------------------------------- */

/* 1 = the item counts as present for everything but its replacement. */
static int alive(sc_op_t *op, const sc_item_t *it)
{
    if (sc_expired(op, it->w1))
        return 0;
    return it->soft == 0 || it->soft > sc_op_now(op);
}

static int token_matches(sc_op_t *op, const sc_key_t *k, const sc_item_t *it, const sc_token_t *tok)
{
    sc_table_t *t = op->t;
    if (tok->hi != (((u64)SC_W1_VERSION(it->w1) << 8) | it->type))
        return 0;
    if (SC_TYPE(it->type) == SC_T_INT) {
        const u64 *word = sc_item_word(t, op->s, it, it->voff);
        return word != NULL && SC_LD(word) == tok->lo;
    }
    u32 mix;
    if (t->check_len) {
        if (!sc_item_gather(t, op->s, it, it->total - 4, &mix, 4))
            return 0;
        mix ^= sc_place_mix(&t->secret, SC_LD(&op->s->life[it->page]), it->page, it->off);
    } else {
        u8 *copy = (u8 *)malloc(it->vlen + 1u);
        int ok = copy != NULL && sc_item_gather(t, op->s, it, it->voff, copy, it->vlen);
        mix = ok ? sc_content_mix(&t->secret, sc_header_mix(&t->secret, k->h, it->w0, it->soft),
                                  sc_value_hash(&t->secret, it->type, copy, it->vlen))
                 : (u32)~tok->lo;
        free(copy);
    }
    return mix == (u32)tok->lo;
}

/* Whether the item under entry e is the very one the caller has read. */
static int same_item(const sc_op_t *op, u64 e, const sc_cond_t *cond)
{
    return SC_ENTRY_PLACE(e) == SC_ENTRY_PLACE(cond->same_entry) &&
           SC_LD(&op->s->life[SC_ENTRY_PAGE(e)]) == cond->same_life;
}

/* Writes the item at the place reserved and returns its check-bearing first word; nothing is visible yet. */
static void write_item(sc_op_t *op, const sc_key_t *k, const sc_value_t *v, sc_room_t *r, u32 total)
{
    sc_table_t *t = op->t;
    static const u8 pad[8];
    u32 flags = v->soft ? SC_IF_SOFT : 0, is_int = SC_TYPE(v->type) == SC_T_INT, vlen = is_int ? 8u : v->len;
    u64 version = op->s->hard->version + 1;
    op->s->hard->version = version; /* raised before use */
    SC_CRASHPOINT(version_raised);
    u64 w0 = SC_W0(vlen, flags, k->len, v->type, 0), w1 = SC_W1(v->deadline, version);
    u64 hm = sc_header_mix(&t->secret, k->h, w0, v->soft);
    u32 place = sc_place_mix(&t->secret, SC_LD(&op->s->life[r->page]), r->page, r->off);
    if (!t->check_len)
        w0 |= (u64)(((u32)(hm >> 56) ^ place) & 0xFFu) << 56;
    u64 head[3] = {w0, w1, v->soft};
    if (SC_LIKELY(r->page == r->end_page)) { /* it lies flat: no walk over pages */
        u8 *at = sc_at(t, op->s, r->page, r->off);
        u32 voff = sc_item_voff(k->len, flags, v->type), klen_off = v->soft ? 24u : 16u;
        const void *p = is_int ? (const void *)&v->num : v->p;
        SC_BARRIER();
        memcpy(at, head, klen_off);
        SC_CRASHPOINT(header_written);
        memcpy(at + klen_off, k->p, k->len);
        if (voff > klen_off + k->len)
            memset(at + klen_off + k->len, 0, voff - klen_off - k->len);
        if (t->check_len) {
            u32 check = sc_content_mix(&t->secret, hm, sc_value_copy(&t->secret, v->type, at + voff, p, vlen)) ^ place;
            SC_CRASHPOINT(value_written);
            memset(at + voff + vlen, 0, total - voff - vlen - 4);
            memcpy(at + total - 4, &check, 4);
        } else {
            if (vlen > 0)
                memcpy(at + voff, p, vlen);
            memset(at + voff + vlen, 0, total - voff - vlen);
        }
        SC_BARRIER();
        return;
    }
    sc_heap_write_guarded(op, r, head, v->soft ? 24 : 16);
    sc_heap_write_guarded(op, r, k->p, k->len);
    u32 voff = sc_item_voff(k->len, flags, v->type), begun = (v->soft ? 24u : 16u) + k->len;
    if (voff > begun)
        sc_heap_write_guarded(op, r, pad, voff - begun);
    const void *p = is_int ? (const void *)&v->num : v->p;
    sc_heap_write_guarded(op, r, p, vlen);
    if (t->check_len) {
        u32 check = sc_content_mix(&t->secret, hm, sc_value_hash(&t->secret, v->type, p, vlen)) ^ place;
        u32 gap = total - voff - vlen - 4;
        if (gap > 0)
            sc_heap_write_guarded(op, r, pad, gap);
        sc_heap_write_guarded(op, r, &check, 4);
    }
}

/* Stores under the guard. entry and old describe the key's present item, entry NULL: none. */
static int store_guarded(sc_op_t *op, const sc_key_t *k, const sc_value_t *v, u64 *entry, sc_item_t *old, u32 bucket,
                         u32 slot)
{
    sc_table_t *t = op->t;
    sc_shard_t *s = op->s;
    u32 flags = v->soft ? SC_IF_SOFT : 0, vlen = SC_TYPE(v->type) == SC_T_INT ? 8u : v->len;
    u32 total = sc_item_total(k->len, vlen, flags, v->type, t->check_len);
    u32 old_lane = 0, old_freq = 0;
    int had = entry != NULL;
    if (had) {
        old_lane = SC_LIFE_LANE(SC_LD(&s->life[old->page]));
        old_freq = SC_LD(&s->buckets[bucket].freq[slot]);
        if (sc_expired(op, old->w1))
            s->soft->stat[SC_SS_EXPIRED]++;
    }
    u32 lane = sc_lane_of_new(op, k, v->deadline, total, old_lane, old_freq, had);
    op->protect = entry;
    int rc = sc_room_guarded(op, lane, total);
    if (rc != SC_OK) {
        s->soft->stat[SC_SS_NO_SPACE]++;
        return rc;
    }
    if (had && op->steps > 0) /* steps may have moved it, or passed it expired */
        had = (entry = sc_index_find_guarded(op, k, old, &bucket, &slot)) != NULL;
    if (!had && (entry = sc_index_slot_guarded(op, k, &bucket, &slot)) == NULL) {
        s->soft->stat[SC_SS_NO_SPACE]++;
        return SC_NO_SPACE;
    }
    sc_room_t r;
    if (!sc_heap_reserve_guarded(op, lane, total, &r)) {
        s->soft->stat[SC_SS_NO_SPACE]++;
        return SC_NO_SPACE;
    }
    write_item(op, k, v, &r, total);
    sc_heap_commit_guarded(op, lane, &r); /* COMMIT 1 */
    u64 victim = had ? 0 : SC_LD(entry);
    SC_CRASHPOINT(before_publish);
    SC_ST_REL(entry, SC_ENTRY(k->tag, r.page, r.off, sc_coarse_of(t, v->deadline))); /* COMMIT 2: old to new */
    SC_BARRIER();
    SC_CRASHPOINT(after_publish);
    if (had) {
        sc_account_dead_guarded(op, old->page, old);
        if (t->h.flags & SC_F_SECURE)
            sc_item_wipe_guarded(op, old->page, old->off);
    } else {
        SC_ST(&s->buckets[bucket].freq[slot], 0);
        sc_item_t it;
        if (!sc_entry_dead(t, s, victim) && sc_place_ok(t, SC_ENTRY_PAGE(victim), SC_ENTRY_OFF(victim)) &&
            sc_item_load(t, s, SC_ENTRY_PAGE(victim), SC_ENTRY_OFF(victim), &it)) {
            sc_account_dead_guarded(op, it.page, &it);
            s->soft->stat[SC_SS_EVICTED]++;
            s->soft->stat[SC_SS_EVICTED_INDEX]++;
            if (t->h.flags & SC_F_SECURE)
                sc_item_wipe_guarded(op, it.page, it.off);
        }
    }
    sc_mean_add(op, total);
    sc_hint_add(&s->soft->live[lane], total);
    if (s->soft->most_pages < (total >> t->page_shift) + 2u)
        s->soft->most_pages = (total >> t->page_shift) + 2u;
    sc_hint_add(&s->soft->n_items, 1);
    sc_hint_add(&s->soft->live_bytes, (i64)k->len + vlen);
    s->soft->stat[SC_SS_BYTES_SET] += total;
    SC_CRASHPOINT(store_counted);
    return SC_OK;
}

static int fits(const sc_table_t *t, const sc_key_t *k, const sc_value_t *v)
{
    u64 most = (u64)(t->n_pages - t->reserve) << t->page_shift;
    return v->len <= t->h.max_value && (u64)k->len + v->len + 64u <= most / 2u;
}

int sc_store(sc_table_t *t, const sc_key_t *k, const sc_value_t *v, const sc_cond_t *cond, i64 wait_ns)
{
    if (!fits(t, k, v))
        return SC_TOO_LARGE;
    SC_CRASH_OP(((const char *const[]){"set", "add", "replace", "cas", "append"})[cond->mode]);
    SC_PREFETCH(&t->shard[k->shard].buckets[k->b1]); /* while the guard is taken */
    int rc = sc_enter(t, k->shard, wait_ns);
    if (rc != SC_OK)
        return rc;
    sc_op_t op;
    sc_item_t old;
    u32 bucket = 0, slot = 0;
    sc_op_begin(&op, t, k->shard);
    u64 *entry = sc_index_find_guarded(&op, k, &old, &bucket, &slot);
    if (cond->mode != SC_SET) {
        int live = entry != NULL && alive(&op, &old);
        rc = SC_OK;
        if (cond->mode == SC_ADD)
            rc = live ? SC_EXISTS : SC_OK;
        else if (!live)
            rc = SC_MISS;
        else if (cond->mode == SC_CAS && !token_matches(&op, k, &old, &cond->token))
            rc = SC_CHANGED;
        else if (cond->mode == SC_IF_SAME && !same_item(&op, SC_LD(entry), cond))
            rc = SC_CHANGED;
    }
    if (rc == SC_OK) {
        sc_value_t kept = *v;
        if (cond->keep_lifetime) { /* a touch since the read is not lost */
            kept.deadline = SC_W1_DEADLINE(old.w1);
            kept.soft = old.soft;
        }
        rc = store_guarded(&op, k, &kept, entry, &old, bucket, slot);
    }
    if (rc == SC_OK)
        op.s->soft->stat[SC_SS_SETS]++;
    sc_leave(t, k->shard);
    return rc;
}

/* num: the number of a deleted counter, which pop must hand out as it was at that moment. */
int sc_delete(sc_table_t *t, const sc_key_t *k, const sc_cond_t *cond, i64 *num, i64 wait_ns)
{
    SC_CRASH_OP("delete");
    int rc = sc_enter(t, k->shard, wait_ns);
    if (rc != SC_OK)
        return rc;
    sc_op_t op;
    sc_item_t old;
    u32 bucket, slot;
    sc_op_begin(&op, t, k->shard);
    u64 *entry = sc_index_find_guarded(&op, k, &old, &bucket, &slot);
    rc = SC_MISS;
    if (entry != NULL) {
        if (!alive(&op, &old)) {
            sc_drop_guarded(&op, entry, &old);
            op.s->soft->stat[SC_SS_EXPIRED]++;
        } else if (cond != NULL && cond->mode == SC_IF_SAME && !same_item(&op, SC_LD(entry), cond)) {
            rc = SC_CHANGED;
        } else {
            if (num != NULL && SC_TYPE(old.type) == SC_T_INT) {
                const u64 *word = sc_item_word(t, op.s, &old, old.voff);
                if (word != NULL)
                    *num = (i64)SC_LD(word);
            }
            sc_drop_guarded(&op, entry, &old);
            op.s->soft->stat[SC_SS_DELETES]++;
            rc = SC_OK;
        }
    }
    sc_leave(t, k->shard);
    return rc;
}

/* SC_AGAIN: the item has a soft deadline, which its check covers: the caller stores it anew. */
int sc_touch(sc_table_t *t, const sc_key_t *k, u64 deadline, const sc_cond_t *cond, i64 wait_ns)
{
    SC_CRASH_OP("touch");
    int rc = sc_enter(t, k->shard, wait_ns);
    if (rc != SC_OK)
        return rc;
    sc_op_t op;
    sc_item_t old;
    u32 bucket, slot;
    sc_op_begin(&op, t, k->shard);
    u64 *entry = sc_index_find_guarded(&op, k, &old, &bucket, &slot);
    rc = SC_MISS;
    if (entry != NULL && alive(&op, &old)) {
        u64 e = SC_LD(entry);
        if (cond != NULL && cond->mode == SC_IF_SAME && !same_item(&op, e, cond)) {
            rc = SC_CHANGED;
        } else if (old.flags & SC_IF_SOFT) {
            rc = SC_AGAIN;
        } else {
            u64 *w1 = (u64 *)(void *)sc_at(t, op.s, old.page, old.off) + 1;
            /* The coarse code may name too early a time, never none: else a kill in between hides the item from the sweep. */
            u64 marked = (e & ~0xFFull) | sc_coarse_of(t, deadline);
            if (deadline != 0)
                SC_ST_REL(entry, marked);
            SC_CRASHPOINT(touch_marked);
            SC_ST_REL(w1, SC_W1(deadline, SC_W1_VERSION(old.w1))); /* COMMIT */
            SC_CRASHPOINT(touched);
            SC_ST_REL(entry, marked);
            SC_BARRIER();
            SC_CRASHPOINT(touch_coarse);
            op.s->soft->stat[SC_SS_TOUCHES]++;
            rc = SC_OK;
        }
    }
    sc_leave(t, k->shard);
    return rc;
}

int sc_incr(sc_table_t *t, const sc_key_t *k, i64 delta, int create, i64 initial, u64 deadline, i64 *result,
            i64 wait_ns)
{
    SC_CRASH_OP("incr");
    sc_value_t v = {NULL, 0, 8, SC_T_INT, deadline, 0};
    if (!fits(t, k, &v))
        return SC_TOO_LARGE;
    int rc = sc_enter(t, k->shard, wait_ns);
    if (rc != SC_OK)
        return rc;
    sc_op_t op;
    sc_item_t old;
    u32 bucket = 0, slot = 0;
    sc_op_begin(&op, t, k->shard);
    u64 *entry = sc_index_find_guarded(&op, k, &old, &bucket, &slot);
    if (entry != NULL && alive(&op, &old)) {
        u64 *word;
        i64 now;
        if (SC_TYPE(old.type) != SC_T_INT)
            rc = SC_TYPE(old.type) == SC_T_BIGINT ? SC_OVERFLOW : SC_NOT_NUMBER;
        else if ((word = sc_item_word(t, op.s, &old, old.voff)) == NULL)
            rc = SC_NOT_NUMBER;
        else if (__builtin_add_overflow((i64)SC_LD(word), delta, &now))
            rc = SC_OVERFLOW;
        else {
            SC_CRASHPOINT(before_number);
            SC_ST_REL(word, (u64)now); /* COMMIT */
            SC_BARRIER();
            SC_CRASHPOINT(after_number);
            *result = now;
            u8 *freq = &op.s->buckets[bucket].freq[slot];
            if (SC_LD(freq) < SC_FREQ_MAX)
                SC_ST(freq, (u8)(SC_LD(freq) + 1));
        }
    } else if (!create) {
        rc = SC_MISS;
    } else if (__builtin_add_overflow(initial, delta, &v.num)) {
        rc = SC_OVERFLOW;
    } else {
        rc = store_guarded(&op, k, &v, entry, &old, bucket, slot);
        *result = v.num;
    }
    if (rc == SC_OK)
        op.s->soft->stat[SC_SS_INCRS]++;
    sc_leave(t, k->shard);
    return rc;
}

/* One store empties a shard.  C0: an append never continues on a flushed page (sc_heap_reserve_guarded). */
int sc_clear_shard(sc_table_t *t, u32 shard, i64 wait_ns)
{
    SC_CRASH_OP("clear");
    int rc = sc_enter(t, shard, wait_ns);
    if (rc != SC_OK)
        return rc;
    sc_shard_t *s = &t->shard[shard];
    SC_CRASHPOINT(before_flush);
    SC_ST_REL(&s->hard->flush_seq, s->hard->seq); /* COMMIT */
    SC_BARRIER();
    SC_CRASHPOINT(flushed);
    s->soft->n_items = 0;
    s->soft->live_bytes = 0;
    for (u32 lane = 0; lane < SC_N_LANES; lane++) {
        sc_hint_add(&s->soft->dead[lane], s->soft->live[lane]);
        s->soft->live[lane] = 0;
    }
    s->soft->stat[SC_SS_CLEARS]++;
    SC_CRASHPOINT(flush_counted);
    if (t->h.flags & SC_F_SECURE) {
        sc_op_t op;
        sc_op_begin(&op, t, shard);
        for (u32 b = 0; b < t->n_buckets; b++)
            for (u32 i = 0; i < SC_N_SLOTS; i++) {
                u64 e = SC_LD(&s->buckets[b].entry[i]);
                if (e != 0 && SC_ENTRY_PAGE(e) < t->n_pages &&
                    SC_LIFE_SEQ(SC_LD(&s->life[SC_ENTRY_PAGE(e)])) <= s->hard->flush_seq) {
                    SC_ST_REL(&s->buckets[b].entry[i], 0);
                    sc_item_wipe_guarded(&op, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e));
                }
            }
    }
    sc_leave(t, shard);
    return SC_OK;
}
