/* sweep.c - the cooperative cleaning step, cleaning by hand, and walks over groups of buckets.
 *
 * No thread: threads do not survive fork.  A writer that finds the next step due wins it by one compare-and-swap and
 * walks a share of the buckets, taking guards only where an item has expired and only if they are free.  Readers never
 * clean.  With no writes nobody needs the memory. */
#include "guard.h"
#include "heap.h"

#define STEP_BUCKETS 4096u /* most buckets of one step: about 8 us at 2 ns each */
#define STEP_WISH 512u     /* buckets a step should be worth */
#define STEP_RECLAIM 64u   /* head items passed after a step */
#define STEP_GAP_MS 10u
#define STEP_GAP_MOST_MS 1000u
#define LOOK_MS 1000       /* how often the write path looks whether an outsider removed the segment */

static u64 total_buckets(const sc_table_t *t) { return (u64)t->n_shards * t->n_buckets; }

/* Drops what has expired in one bucket; guard held. Returns how many. */
static u32 expire_bucket_guarded(sc_op_t *op, u32 b, u64 limit)
{
    sc_table_t *t = op->t;
    u32 n = 0;
    for (u32 i = 0; i < SC_N_SLOTS && n < limit; i++) {
        u64 *p = &op->s->buckets[b].entry[i];
        u64 e = SC_LD(p);
        sc_item_t it;
        if (e == 0 || SC_ENTRY_COARSE(e) == 0 || !sc_place_ok(t, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e)) ||
            sc_entry_dead(t, op->s, e) || !sc_item_load(t, op->s, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e), &it) ||
            !sc_expired(op, it.w1))
            continue;
        if (!sc_index_only_guarded(op, p, &it))
            continue; /* its twin is met in the other bucket, or in the next sweep */
        sc_drop_guarded(op, p, &it);
        op->s->soft->stat[SC_SS_EXPIRED]++;
        n++;
    }
    return n;
}

/* A bucket with an item that may have expired, by coarse codes alone (exact: any item with a lifetime). */
static int bucket_due(sc_table_t *t, const sc_bucket_t *b, u64 now, int exact)
{
    for (u32 i = 0; i < SC_N_SLOTS; i++) {
        u64 e = SC_LD(&b->entry[i]);
        if (e != 0 && SC_ENTRY_COARSE(e) != 0 && (exact || sc_coarse_due(t, SC_ENTRY_COARSE(e), now)))
            return 1;
    }
    return 0;
}

/* Counting again after a death: what the sweep walks over is added up and installed at the end of the shard. */
static void recount_bucket(sc_table_t *t, sc_shard_t *s, u32 b)
{
    sc_soft_t *soft = s->soft;
    if (b == 0) {
        if (soft->recount == 0)
            return;
        soft->recount = 2;
        soft->acc_items = soft->acc_bytes = 0;
        soft->acc_most = 0;
        memset(soft->acc_live, 0, sizeof soft->acc_live);
    }
    if (soft->recount != 2)
        return;
    for (u32 i = 0; i < SC_N_SLOTS; i++) {
        u64 e = SC_LD(&s->buckets[b].entry[i]);
        sc_item_t it;
        if (sc_entry_dead(t, s, e) || !sc_place_ok(t, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e)) ||
            !sc_item_load(t, s, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e), &it))
            continue;
        u32 lane = SC_LIFE_LANE(SC_LD(&s->life[it.page]));
        sc_hint_add(&soft->acc_items, 1);
        sc_hint_add(&soft->acc_bytes, (i64)it.klen + it.vlen);
        if (lane < SC_N_LANES)
            sc_hint_add(&soft->acc_live[lane], it.total);
        if (soft->acc_most < (it.total >> t->page_shift) + 2u)
            soft->acc_most = (it.total >> t->page_shift) + 2u;
    }
    if (b + 1 < t->n_buckets)
        return;
    soft->recount = 0;
    SC_CRASHPOINT(recount_done);
    soft->n_items = soft->acc_items;
    soft->live_bytes = soft->acc_bytes;
    soft->most_pages = soft->acc_most;
    for (u32 lane = 0; lane < SC_N_LANES; lane++) {
        i64 most = (i64)(((u64)soft->n_pages[lane] << t->page_shift) - (u64)soft->acc_live[lane]);
        soft->live[lane] = soft->acc_live[lane];
        if (soft->dead[lane] > most)
            soft->dead[lane] = most > 0 ? most : 0;
    }
}

static void reclaim(sc_table_t *t, u32 shard, i64 wait_ns)
{
    if (sc_enter(t, shard, wait_ns) != SC_OK)
        return;
    sc_op_t op;
    sc_op_begin(&op, t, shard);
    (void)sc_reclaim_guarded(&op, STEP_RECLAIM);
    sc_leave(t, shard);
}

/* Walks buckets from *at; stops early at a guard somebody else holds, so that nothing is skipped. */
static u64 sweep(sc_table_t *t, u64 *at, u64 n, u64 now, int exact, i64 wait_ns, u64 limit, u64 *dropped, int *stop)
{
    u64 all = total_buckets(t), done = 0;
    *stop = SC_OK;
    while (done < n && *dropped < limit) {
        u32 shard = (u32)(*at / t->n_buckets), b = (u32)(*at % t->n_buckets);
        sc_shard_t *s = &t->shard[shard];
        if (b % 32u == 0 && b + 32u < t->n_buckets)
            SC_PREFETCH(&s->buckets[b + 32u]);
        int due = bucket_due(t, &s->buckets[b], now, exact), count = s->soft->recount != 0 && (b == 0 || s->soft->recount == 2);
        if (due || count) {
            int rc = sc_enter(t, shard, wait_ns);
            if (rc != SC_OK) {
                *stop = rc;
                break;
            }
            sc_op_t op;
            sc_op_begin(&op, t, shard);
            op.now = now;
            if (due)
                *dropped += expire_bucket_guarded(&op, b, limit - *dropped);
            if (count)
                recount_bucket(t, s, b);
            sc_leave(t, shard);
        }
        done++;
        *at = *at + 1 == all ? 0 : *at + 1;
    }
    return done;
}

/* The background share of a writer, called after it released its guard: pays for the sweep and looks whether the segment
 * still exists. */
void sc_tick(sc_table_t *t)
{
    if (SC_UNLIKELY(t->readonly))
        return;
    i64 coarse = sc_clock_coarse_ms();
    if (SC_UNLIKELY(coarse >= t->next_look)) {
        t->next_look = coarse + LOOK_MS;
        if (sc_segment_gone(t))
            t->lost = 1;
    }
    if (SC_LIKELY(coarse < t->next_clean && t->clock.frozen_ms == SC_CLOCK_REAL))
        return;
    SC_CRASH_OP("tick");
    u64 period = t->h.clean_period_ms, now = sc_now(t);
    t->next_clean = coarse + (i64)STEP_GAP_MS;
    if (period == 0)
        return;
    u64 due = SC_LD(&t->control->next_step);
    if (now < due && due <= now + period) /* a step further ahead than a period is rot, and due */
        return;
    u64 all = total_buckets(t), gap = period * STEP_WISH / all;
    gap = gap < STEP_GAP_MS ? STEP_GAP_MS : gap > STEP_GAP_MOST_MS ? STEP_GAP_MOST_MS : gap;
    if (gap > period)
        gap = period;
    if (!__atomic_compare_exchange_n(&t->control->next_step, &due, now + gap, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
        return;
    SC_CRASHPOINT(step_won);
    u64 done_ms = SC_LD(&t->control->sweep_done), at = SC_LD(&t->control->sweep_bucket);
    if (done_ms > now || now - done_ms > period)
        done_ms = now > period ? now - period : 0;
    if (at >= all)
        at = 0;
    u64 n = (now - done_ms) * all / period, dropped = 0;
    if (n > STEP_BUCKETS)
        n = STEP_BUCKETS;
    u32 shard = (u32)(at / t->n_buckets);
    int stop;
    u64 walked = sweep(t, &at, n, now, 0, 0, UINT64_MAX, &dropped, &stop);
    SC_ST(&t->control->sweep_bucket, at);
    SC_CRASHPOINT(step_half_noted);
    SC_ST(&t->control->sweep_done, done_ms + walked * period / all);
    if (n == STEP_BUCKETS && stop == SC_OK) /* behind: the next writer goes on at once */
        SC_ST(&t->control->next_step, now + 1);
    if (dropped > 0)
        reclaim(t, shard, 0);
}

/* clean(): one whole sweep by hand.  *cursor starts at 0 and is where the sweep goes on after SC_BUSY. */
int sc_clean(sc_table_t *t, u64 limit, u64 *cursor, u64 *reclaimed, i64 wait_ns)
{
    SC_CRASH_OP("clean");
    u64 all = total_buckets(t), now = sc_now(t);
    while (*cursor < all && *reclaimed < limit) {
        u32 shard = (u32)(*cursor / t->n_buckets);
        u64 end = (u64)(shard + 1) * t->n_buckets, at = *cursor;
        int stop;
        u64 step = end - at < SC_GROUP ? end - at : SC_GROUP;
        u64 walked = sweep(t, &at, step, now, 1, wait_ns, limit, reclaimed, &stop);
        *cursor += walked;
        if (stop != SC_OK)
            return stop;
        if (walked < step)
            break;
        if (*cursor == end)
            reclaim(t, shard, wait_ns);
    }
    return SC_OK;
}

/* ---- walks -------------------------------------------------------------------------------------------------------- */

u32 sc_n_groups(const sc_table_t *t)
{
    u32 per = (t->n_buckets + SC_GROUP - 1) / SC_GROUP;
    return per * t->n_shards;
}
static void group_range(const sc_table_t *t, u32 group, u32 *shard, u32 *from, u32 *to)
{
    u32 per = (t->n_buckets + SC_GROUP - 1) / SC_GROUP;
    *shard = group / per;
    *from = group % per * SC_GROUP;
    *to = *from + SC_GROUP < t->n_buckets ? *from + SC_GROUP : t->n_buckets;
}

/* entries and where hold 256*7 elements, moves 256. where = bucket << 3 | slot. */
u32 sc_group_entries(sc_table_t *t, u32 group, u64 *entries, u32 *where, u8 *moves)
{
    u32 shard, from, to, n = 0;
    group_range(t, group, &shard, &from, &to);
    sc_shard_t *s = &t->shard[shard];
    for (u32 b = from; b < to; b++)
        moves[b - from] = SC_LD_ACQ(&s->buckets[b].moves);
    for (u32 b = from; b < to; b++)
        for (u32 i = 0; i < SC_N_SLOTS; i++) {
            u64 e = SC_LD_ACQ(&s->buckets[b].entry[i]);
            if (e == 0)
                continue;
            entries[n] = e;
            where[n++] = b << 3 | i;
        }
    return n;
}

/* 1 = a displacement ran since sc_group_entries: the group is walked again, keys already given left out. */
int sc_group_moved(sc_table_t *t, u32 group, const u8 *moves)
{
    u32 shard, from, to;
    group_range(t, group, &shard, &from, &to);
    sc_shard_t *s = &t->shard[shard];
    SC_FENCE_ACQ();
    for (u32 b = from; b < to; b++)
        if (SC_LD(&s->buckets[b].moves) != moves[b - from])
            return 1;
    return 0;
}

/* Reads the item behind one entry of a group by the read protocol; keybuf holds SC_MAX_KEY bytes.
 * SC_HIT live, SC_MISS expired, SC_AGAIN replaced or moved meanwhile, SC_CHANGED cannot be an item. */
int sc_see(sc_table_t *t, u32 group, u32 where, u64 e, sc_seen_t *out, u8 *keybuf)
{
    u32 shard, from, to;
    group_range(t, group, &shard, &from, &to);
    sc_shard_t *s = &t->shard[shard];
    u32 b = where >> 3, i = where & 7u, page = SC_ENTRY_PAGE(e), off = SC_ENTRY_OFF(e);
    u64 *entry = &s->buckets[b].entry[i];
    memset(out, 0, sizeof *out);
    out->shard = shard;
    out->bucket = b;
    out->slot = i;
    out->page = page;
    out->off = off;
    out->freq = SC_LD(&s->buckets[b].freq[i]);
    if (!sc_place_ok(t, page, off))
        return SC_CHANGED;
    u64 m = SC_LD_ACQ(&s->life[page]);
    if (SC_LD_ACQ(entry) != e || SC_LIFE_SEQ(m) <= SC_LD(&s->hard->flush_seq))
        return SC_AGAIN;
    sc_item_t it;
    u32 skip, check = 0;
    int sound = sc_item_load(t, s, page, off, &it);
    if (sound) {
        skip = SC_ITEM_HEADER + ((it.flags & SC_IF_SOFT) ? 8u : 0u);
        sound = sc_item_gather(t, s, &it, skip, keybuf, it.klen);
        if (sound && t->check_len)
            sound = sc_item_gather(t, s, &it, it.total - 4, &check, 4);
    }
    SC_FENCE_ACQ();
    if (SC_LD_ACQ(entry) != e || SC_LD(&s->life[page]) != m)
        return SC_AGAIN;
    if (!sound)
        return SC_CHANGED;
    out->life = m;
    out->lane = SC_LIFE_LANE(m);
    out->birth_s = SC_LD(&s->birth[page]);
    out->f.it = it;
    out->f.bucket = b;
    out->f.slot = i;
    out->f.entry = e;
    out->f.life = m;
    u64 h = sc_hash(&t->secret, keybuf, it.klen, 0);
    u32 home = sc_home_of(h, t->n_buckets), tag = sc_tag_of(h);
    if (tag != SC_ENTRY_TAG(e) || sc_shard_of(h, t->n_shards) != shard ||
        (home != b && sc_other_of(home, tag, t->n_buckets) != b))
        return SC_CHANGED; /* the key does not belong here: rot */
    out->probes = home == b ? 1 : 2;
    u64 hm = sc_header_mix(&t->secret, h, it.w0, it.soft);
    if (!t->check_len && SC_W0_HCHECK(it.w0) != (((u32)(hm >> 56) ^ sc_place_mix(&t->secret, m, page, off)) & 0xFFu))
        return SC_CHANGED;
    u64 deadline = SC_W1_DEADLINE(it.w1), now;
    if (deadline != 0 || it.soft != 0) {
        now = sc_now(t);
        if ((deadline != 0 && deadline <= now) || (it.soft != 0 && it.soft <= now))
            return SC_MISS;
    }
    return SC_HIT;
}

/* The bytes behind an item that sc_see found whole; value holds it.vlen bytes.
 * SC_HIT what was stored, SC_AGAIN replaced or moved meanwhile, SC_CHANGED the check fails. */
int sc_see_content(sc_table_t *t, const sc_seen_t *seen, const u8 *key, u8 *value)
{
    sc_shard_t *s = &t->shard[seen->shard];
    const sc_item_t *it = &seen->f.it;
    if (!t->check_len)
        return SC_HIT; /* all there is was compared by sc_see */
    u32 check = 0;
    int sound = sc_item_gather(t, s, it, it->voff, value, it->vlen) && sc_item_gather(t, s, it, it->total - 4, &check, 4);
    SC_FENCE_ACQ();
    if (SC_LD_ACQ(&s->buckets[seen->bucket].entry[seen->slot]) != seen->f.entry || SC_LD(&s->life[seen->page]) != seen->life)
        return SC_AGAIN; /* R1 */
    u64 hm = sc_header_mix(&t->secret, sc_hash(&t->secret, key, it->klen, 0), it->w0, it->soft);
    u32 want = sc_content_mix(&t->secret, hm, sc_value_hash(&t->secret, it->type, value, it->vlen));
    return sound && check == (want ^ sc_place_mix(&t->secret, seen->life, seen->page, seen->off)) ? SC_HIT : SC_CHANGED;
}
