/* heap.c - pages, lanes and items of one shard: a log that grows at tails and is reclaimed at heads.
 *
 * Invariants (numbers of layout.h): I3 tail is stored once per item, after all its bytes and pages (W4).  I4 there is no
 * free list; a page is free when it lies outside its lane's window.  A killed append leaves prepared pages whose seq lies
 * above the tail's, which makes them free again, and bytes beyond the tail that nobody reads.
 *
 * I7 A page that was prepared and not committed has its life taken before the next append of its lane: a later tail
 * would enclose its seq and the page would be neither free nor in the chain until the head passes.
 *
 * What lies in a segment may be rotten: every position is checked before use, and a lane whose ends make no sense is
 * given up (its entries are cleared), never followed. */
#include "heap.h"
#include <stdlib.h>

#define FLAT_SHARE 16u /* items up to this part of a page never straddle two: at most 3 % of memory is lost to tails */

int sc_item_gather(const sc_table_t *t, const sc_shard_t *s, const sc_item_t *it, u32 skip, void *dst, u32 n)
{
    u8 *out = (u8 *)dst;
    u32 page = it->page;
    u64 pos = (u64)it->off + skip;
    for (; pos >= t->page_size; pos -= t->page_size) {
        page = SC_LD(&s->next[page]);
        if (page >= t->n_pages)
            return 0;
    }
    while (n > 0) {
        u32 off = (u32)pos, room = t->page_size - off, step = n < room ? n : room;
        sc_copy(out, sc_at(t, s, page, off), step);
        out += step;
        n -= step;
        pos = 0;
        if (n > 0) {
            page = SC_LD(&s->next[page]);
            if (page >= t->n_pages)
                return 0;
        }
    }
    return 1;
}

int sc_item_key_is_slow(const sc_table_t *t, const sc_shard_t *s, const sc_item_t *it, const u8 *key)
{
    u32 skip = SC_ITEM_HEADER + ((it->flags & SC_IF_SOFT) ? 8u : 0u);
    u32 page = it->page, n = it->klen;
    u64 pos = (u64)it->off + skip;
    while (n > 0) {
        if (pos >= t->page_size) {
            page = SC_LD(&s->next[page]);
            if (page >= t->n_pages)
                return 0;
            pos -= t->page_size;
            continue;
        }
        u32 room = t->page_size - (u32)pos, step = n < room ? n : room;
        if (!sc_same(sc_at(t, s, page, (u32)pos), key, step))
            return 0;
        key += step;
        n -= step;
        pos += step;
    }
    return 1;
}

u64 *sc_item_word(const sc_table_t *t, const sc_shard_t *s, const sc_item_t *it, u32 skip)
{
    u32 page = it->page;
    u64 pos = (u64)it->off + skip;
    for (; pos >= t->page_size; pos -= t->page_size) {
        page = SC_LD(&s->next[page]);
        if (page >= t->n_pages)
            return NULL;
    }
    return (u64 *)(void *)sc_at(t, s, page, (u32)pos);
}

/* Hash of an item's key: 1 = *h set; 0 = its pages make no sense; -1 = no memory for a key that does not lie flat. */
int sc_item_keyhash(const sc_table_t *t, const sc_shard_t *s, const sc_item_t *it, u64 *h)
{
    u32 skip = SC_ITEM_HEADER + ((it->flags & SC_IF_SOFT) ? 8u : 0u);
    if (SC_LIKELY(it->off + skip + it->klen <= t->page_size)) {
        *h = sc_hash(&t->secret, sc_at(t, s, it->page, it->off + skip), it->klen, 0);
        return 1;
    }
    u8 *buf = (u8 *)malloc(it->klen);
    if (buf == NULL)
        return -1;
    int ok = sc_item_gather(t, s, it, skip, buf, it->klen);
    if (ok)
        *h = sc_hash(&t->secret, buf, it->klen, 0);
    free(buf);
    return ok;
}

/* ---- pages ------------------------------------------------------------------------------------------------------ */

/* I4. The caller holds the guard; lanes are few, so the window is read anew each time. */
int sc_page_is_free(const sc_table_t *t, const sc_shard_t *s, u32 page)
{
    u64 m = SC_LD(&s->life[page]);
    u32 lane = SC_LIFE_LANE(m);
    if (lane >= SC_N_LANES)
        return 1;
    u32 tail = SC_POS_PAGE(SC_LD(&s->hard->tail[lane])), head = SC_POS_PAGE(SC_LD(&s->hard->head[lane]));
    if (tail >= t->n_pages || head >= t->n_pages)
        return 1;
    u64 seq = SC_LIFE_SEQ(m);
    return seq < SC_LIFE_SEQ(SC_LD(&s->life[head])) || seq > SC_LIFE_SEQ(SC_LD(&s->life[tail]));
}

static int prepared_for_nothing(const sc_table_t *t, const sc_shard_t *s, u64 life)
{
    u32 tail = SC_POS_PAGE(SC_LD(&s->hard->tail[SC_LIFE_LANE(life)]));
    return tail < t->n_pages && SC_LIFE_SEQ(life) > SC_LIFE_SEQ(SC_LD(&s->life[tail]));
}

/* Counts pages anew, and takes the life of pages that an append prepared and never committed. Never called between
 * reserve and commit, whose pages look just so. */
void sc_heap_recount_guarded(sc_table_t *t, sc_shard_t *s)
{
    u32 n_free = 0, n[SC_N_LANES] = {0};
    for (u32 p = 0; p < t->n_pages; p++) {
        u64 m = SC_LD(&s->life[p]);
        if (!sc_page_is_free(t, s, p)) {
            n[SC_LIFE_LANE(m)]++;
            continue;
        }
        n_free++;
        /* I7: prepared, but no tail ever owned it; left as it is, the next page of its lane would enclose it */
        if (SC_LIFE_LANE(m) >= SC_N_LANES || prepared_for_nothing(t, s, m))
            SC_ST_REL(&s->life[p], 0);
        SC_CRASHPOINT(recount_free);
    }
    s->soft->n_free = n_free;
    for (u32 lane = 0; lane < SC_N_LANES; lane++) {
        s->soft->n_pages[lane] = n[lane];
        i64 most = (i64)n[lane] << t->page_shift;
        if (s->soft->dead[lane] < 0 || s->soft->dead[lane] > most)
            s->soft->dead[lane] = s->soft->dead[lane] < 0 ? 0 : most;
    }
}

/* A lane whose ends make no sense: only rot or a scribbler can do that. Entries go first (I5), then the pages. */
static void lane_reset_guarded(sc_table_t *t, sc_shard_t *s, u32 lane)
{
    for (u32 b = 0; b < t->n_buckets; b++)
        for (u32 i = 0; i < SC_N_SLOTS; i++) {
            u64 e = SC_LD(&s->buckets[b].entry[i]);
            if (e == 0)
                continue;
            u32 page = SC_ENTRY_PAGE(e);
            if (page >= t->n_pages || SC_LIFE_LANE(SC_LD(&s->life[page])) == lane)
                SC_ST_REL(&s->buckets[b].entry[i], 0);
        }
    SC_ST_REL(&s->hard->tail[lane], SC_POS(SC_NO_PAGE, 0));
    s->soft->stat[SC_SS_REPAIRED]++;
    s->soft->dead[lane] = s->soft->live[lane] = 0;
    s->soft->recount = 1;
    sc_heap_recount_guarded(t, s);
}

static int pos_ok(const sc_table_t *t, u64 pos)
{
    return SC_POS_PAGE(pos) < t->n_pages && SC_POS_OFF(pos) <= t->page_size && (SC_POS_OFF(pos) & 7u) == 0;
}

/* 1 = the lane owns pages and both ends are sound: *l is what was checked, and all that may be used. */
int sc_lane_ok_guarded(sc_table_t *t, sc_shard_t *s, u32 lane, sc_lane_t *l)
{
    u64 tail = SC_LD(&s->hard->tail[lane]), head = SC_LD(&s->hard->head[lane]);
    if (SC_POS_PAGE(tail) == SC_NO_PAGE)
        return 0;
    if (pos_ok(t, tail) && pos_ok(t, head)) {
        l->page = SC_POS_PAGE(head);
        l->off = SC_POS_OFF(head);
        l->tail_page = SC_POS_PAGE(tail);
        l->tail_off = SC_POS_OFF(tail);
        u64 lt = SC_LD(&s->life[l->tail_page]), lh = SC_LD(&s->life[l->page]);
        l->seq = SC_LIFE_SEQ(lh);
        l->tail_seq = SC_LIFE_SEQ(lt);
        if (SC_LIFE_LANE(lt) == lane && SC_LIFE_LANE(lh) == lane && l->seq <= l->tail_seq &&
            l->tail_seq <= SC_LD(&s->hard->seq))
            return 1;
    }
    lane_reset_guarded(t, s, lane);
    return 0;
}

/* After a death inside the guard: nothing committed needs repair; the counts of pages do. */
void sc_recover_guarded(sc_table_t *t, u32 shard)
{
    sc_shard_t *s = &t->shard[shard];
    SC_CRASHPOINT(recover_begin);
    sc_lane_t ends;
    for (u32 lane = 0; lane < SC_N_LANES; lane++)
        (void)sc_lane_ok_guarded(t, s, lane, &ends);
    SC_CRASHPOINT(recover_lanes);
    sc_heap_recount_guarded(t, s);
    if (s->soft->cursor >= t->n_pages)
        s->soft->cursor = 0;
    s->soft->recount = 1;
    s->soft->stat[SC_SS_RECOVERIES]++;
    SC_CRASHPOINT(recover_end);
}

/* Takes a free page for lane and gives it a new life; SC_NO_PAGE when there is none.  Its old bytes may still be read by
 * somebody who loaded the old life: the new life is visible before the first byte changes (fence; partner: the acquire
 * load of life after the copy in table.c). */
static u32 page_prepare_guarded(sc_op_t *op, u32 lane)
{
    sc_table_t *t = op->t;
    sc_shard_t *s = op->s;
    u32 p = s->soft->cursor, n = t->n_pages;
    if (p >= n)
        p = 0;
    for (u32 i = 0; i < n; i++, p = p + 1 == n ? 0 : p + 1) {
        u64 m = SC_LD(&s->life[p]);
        if ((SC_LIFE_SEQ(m) > op->seq0 && SC_LIFE_SEQ(m) <= s->hard->seq) || !sc_page_is_free(t, s, p))
            continue; /* W1: a page prepared by this very operation still looks free */
        u64 seq = SC_LIFE_SEQ(s->hard->seq + 1);
        s->hard->seq = seq; /* a kill here loses a number, nothing else */
        SC_CRASHPOINT(seq_raised);
        SC_ST_REL(&s->life[p], SC_LIFE(lane, seq));
        SC_CRASHPOINT(life_given);
        SC_FENCE();
        SC_ST(&s->next[p], SC_NO_PAGE);
        SC_ST(&s->birth[p], (u32)(sc_op_now(op) / 1000u));
        s->soft->cursor = p + 1 == n ? 0 : p + 1;
        SC_CRASHPOINT(page_prepared);
        return p;
    }
    sc_heap_recount_guarded(t, s); /* the count promised a page that is not there */
    return SC_NO_PAGE;
}

/* Pages an append of total bytes would take from the free ones. */
u32 sc_heap_need(const sc_table_t *t, const sc_shard_t *s, u32 lane, u32 total)
{
    u32 rem = 0;
    u64 tail = SC_LD(&s->hard->tail[lane]);
    if (SC_POS_PAGE(tail) < t->n_pages && SC_POS_OFF(tail) <= t->page_size &&
        SC_LIFE_SEQ(SC_LD(&s->life[SC_POS_PAGE(tail)])) > SC_LD(&s->hard->flush_seq))
        rem = t->page_size - SC_POS_OFF(tail);
    if (rem >= total)
        return 0;
    if (total <= t->page_size / FLAT_SHARE || rem < 64)
        rem = 0;
    return (total - rem + t->page_size - 1) >> t->page_shift;
}

int sc_heap_reserve_guarded(sc_op_t *op, u32 lane, u32 total, sc_room_t *r)
{
    sc_table_t *t = op->t;
    sc_shard_t *s = op->s;
    op->seq0 = s->hard->seq;
    u32 pg = t->page_size;
    u32 page = SC_NO_PAGE, off = 0, rem = 0;
    sc_lane_t ends;
    r->fresh = !sc_lane_ok_guarded(t, s, lane, &ends);
    if (!r->fresh) {
        page = ends.tail_page;
        off = ends.tail_off;
        /* C0: what follows on a flushed page would count as flushed too */
        int flushed = ends.tail_seq <= SC_LD(&s->hard->flush_seq);
        rem = pg - off;
        if (flushed || (rem < total && (total <= pg / FLAT_SHARE || rem < 64))) {
            if (rem > 0) /* beyond the tail: read only once the tail has passed it */
                SC_ST((u64 *)(void *)sc_at(t, s, page, off), 0);
            rem = 0;
        }
    }
    if (rem == 0) {
        u32 q = page_prepare_guarded(op, lane);
        if (q == SC_NO_PAGE)
            return 0;
        if (page != SC_NO_PAGE)
            SC_ST(&s->next[page], q);
        SC_CRASHPOINT(tail_chained);
        page = q;
        off = 0;
        rem = pg;
    }
    r->page = r->cur_page = r->end_page = page;
    r->off = r->cur_off = off;
    u32 left = total;
    while (left > rem) {
        u32 q = page_prepare_guarded(op, lane);
        if (q == SC_NO_PAGE)
            return 0;
        SC_ST(&s->next[r->end_page], q);
        SC_CRASHPOINT(page_chained);
        left -= rem;
        rem = pg;
        r->end_page = q;
        off = 0;
    }
    r->end_off = off + left;
    return 1;
}

void sc_heap_write_guarded(sc_op_t *op, sc_room_t *r, const void *src, u32 n)
{
    const u8 *p = (const u8 *)src;
    while (n > 0) {
        if (r->cur_off == op->t->page_size) {
            u32 page = SC_LD(&op->s->next[r->cur_page]);
            if (page >= op->t->n_pages)
                return; /* somebody scribbled over the chain made a moment ago; the check will not match */
            r->cur_page = page;
            r->cur_off = 0;
        }
        u32 room = op->t->page_size - r->cur_off, step = n < room ? n : room;
        sc_move(sc_at(op->t, op->s, r->cur_page, r->cur_off), p, step);
        SC_CRASHPOINT(bytes_written);
        p += step;
        n -= step;
        r->cur_off += step;
    }
}

/* COMMIT 1: the item is in the log, visible to nobody yet.  A kill after it leaves a dead item, passed by the head. */
void sc_heap_commit_guarded(sc_op_t *op, u32 lane, const sc_room_t *r)
{
    sc_hard_t *h = op->s->hard;
    if (r->fresh)
        h->head[lane] = SC_POS(r->page, r->off); /* means nothing until the tail owns a page */
    SC_CRASHPOINT(before_tail);
    SC_ST_REL(&h->tail[lane], SC_POS(r->end_page, r->end_off));
    SC_BARRIER();
    SC_CRASHPOINT(after_tail);
    /* pages taken: those between the item's first and last, and the first if it is a new one */
    u32 n = 0, p = r->page;
    if (r->off == 0)
        n++;
    for (; p != r->end_page && p < op->t->n_pages && n <= op->t->n_pages; p = SC_LD(&op->s->next[p]))
        n++;
    sc_soft_t *soft = op->s->soft;
    soft->n_pages[lane] += n;
    soft->n_free = soft->n_free > n ? soft->n_free - n : 0;
    SC_CRASHPOINT(tail_counted);
}

/* secure_delete: key and value bytes of a copy no entry points at; the header stays so that the log can be walked. */
void sc_item_wipe_guarded(sc_op_t *op, u32 page, u32 off)
{
    static const u8 zero[256];
    sc_item_t it;
    if (!sc_place_ok(op->t, page, off) || !sc_item_load(op->t, op->s, page, off, &it))
        return;
    SC_FENCE(); /* the COMMIT that made it dead is visible first */
    u32 skip = SC_ITEM_HEADER + ((it.flags & SC_IF_SOFT) ? 8u : 0u);
    u64 pos = (u64)off + skip;
    u32 n = it.total - skip;
    while (n > 0) {
        if (pos >= op->t->page_size) {
            page = SC_LD(&op->s->next[page]);
            if (page >= op->t->n_pages)
                return;
            pos -= op->t->page_size;
            continue;
        }
        u32 room = op->t->page_size - (u32)pos, step = n < room ? n : room;
        if (step > sizeof zero)
            step = sizeof zero;
        sc_copy(sc_at(op->t, op->s, page, (u32)pos), zero, step);
        SC_CRASHPOINT(wiping);
        n -= step;
        pos += step;
    }
}

/* Copies a live item to the tail of lane, its check adjusted to the new place; the entry is the caller's. */
int sc_item_copy_guarded(sc_op_t *op, const sc_item_t *it, u32 lane, u32 *page, u32 *off)
{
    sc_table_t *t = op->t;
    sc_shard_t *s = op->s;
    sc_room_t r;
    if (!sc_heap_reserve_guarded(op, lane, it->total, &r))
        return 0;
    u32 mix = sc_place_mix(&t->secret, SC_LD(&s->life[it->page]), it->page, it->off) ^
              sc_place_mix(&t->secret, SC_LD(&s->life[r.page]), r.page, r.off);
    u64 w0 = it->w0;
    u32 tail_bytes = 0, check = 0;
    if (t->check_len)
        tail_bytes = 4;
    else
        w0 ^= (u64)(mix & 0xFFu) << 56;
    sc_heap_write_guarded(op, &r, &w0, 8);
    u32 from = it->page, skip = 8, left = it->total - 8 - tail_bytes;
    u64 pos = (u64)it->off + skip;
    while (left > 0) {
        if (pos >= t->page_size) {
            from = SC_LD(&s->next[from]);
            if (from >= t->n_pages) {
                sc_heap_recount_guarded(t, s);
                return 0;
            }
            pos -= t->page_size;
            continue;
        }
        u32 room = t->page_size - (u32)pos, step = left < room ? left : room;
        sc_heap_write_guarded(op, &r, sc_at(t, s, from, (u32)pos), step);
        left -= step;
        pos += step;
    }
    if (t->check_len) {
        if (!sc_item_gather(t, s, it, it->total - 4, &check, 4)) {
            sc_heap_recount_guarded(t, s);
            return 0;
        }
        check ^= mix;
        sc_heap_write_guarded(op, &r, &check, 4);
    }
    sc_heap_commit_guarded(op, lane, &r);
    *page = r.page;
    *off = r.off;
    return 1;
}
