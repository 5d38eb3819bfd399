/* repair.c - mends what check.c finds, in a segment that nobody uses.
 *
 *   F1  Nobody uses it: every worker slot is taken first, by its beacon, so that no process lives that has one and none can get
 *       one.  What readers without a slot see meanwhile is what they may see of any writer.
 *   F2  An item is kept if its place, key and check agree (sc_see, sc_see_content): what lies around it does not matter.
 *   F3  A log that cannot be walked, or that does not hold an item that is kept, is given up as a whole: its items are copied to
 *       private memory, its lane is emptied, and they are stored anew.  A kill in between loses what was not stored yet; copy
 *       the segment first if that matters.
 *   F4  Order within a shard: guard, counters of lives, lanes, entries, counts, leases, items stored anew. */
#include "repair.h"
#include "guard.h"
#include "heap.h"
#include "resize.h"
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ipc.h>
#include <sys/sem.h>

typedef struct kept {
    struct kept *next;
    sc_found_t f;
    u32 lane, freq;
    u8 bytes[]; /* key, value */
} kept_t;

typedef struct {
    sc_table_t *t;
    sc_shard_t *s;
    u32 shard, me;
    sc_report_fn say;
    void *arg;
    sc_repaired_t *out;
    u8 *starts; /* bit per 8 bytes of pages: an item of a sound lane begins there */
    u8 *used;   /* the same: an entry points there */
    u8 *good;   /* byte per slot of the index: 1 its item is kept */
    u8 *key, *other, *value;
    size_t room;
    int bad[SC_N_LANES];
    kept_t *kept;
} repair_t;

__attribute__((format(printf, 3, 4))) static void did(repair_t *r, const char *code, const char *fmt, ...)
{
    char text[240];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    r->out->lines++;
    if (r->say != NULL)
        r->say(r->arg, code, r->shard, text);
}

static u64 place_bit(const repair_t *r, u32 page, u32 off) { return (((u64)page << r->t->page_shift) + off) >> 3; }
static int bit(const u8 *map, u64 at) { return map[at >> 3] >> (at & 7) & 1; }
static void set_bit(u8 *map, u64 at) { map[at >> 3] = (u8)(map[at >> 3] | (1u << (at & 7))); }

/* ---- worker slots --------------------------------------------------------------------------------------------------- */

static void slots_give(repair_t *r, u32 n)
{
    for (u32 slot = 0; slot < n; slot++)
        if (slot != SC_OWNER_SLOT(r->me))
            (void)sc_sem_op(r->t->sem_id, SC_SEM_BEACON(r->t->n_shards, slot), -1, SEM_UNDO | IPC_NOWAIT, 0);
}

static int slots_take(repair_t *r)
{
    sc_table_t *t = r->t;
    int rc = SC_WORKERS;
    r->me = sc_worker_me(t);
    if (r->me == 0 && (r->me = sc_worker_claim(t, &rc)) == 0)
        return rc == SC_WORKERS ? SC_EXISTS : rc;
    for (u32 slot = 0; slot < t->h.n_workers; slot++) {
        if (slot == SC_OWNER_SLOT(r->me))
            continue;
        int err = sc_sem_op(t->sem_id, SC_SEM_BEACON(t->n_shards, slot), +1, SEM_UNDO | IPC_NOWAIT | 0x10000, 0);
        if (err == 0)
            continue;
        slots_give(r, slot);
        r->out->live_slot = slot;
        t->sys_errno = err;
        return err == EAGAIN ? SC_EXISTS : SC_SYSTEM;
    }
    return SC_OK;
}

/* ---- items ---------------------------------------------------------------------------------------------------------- */

/* Whether the item behind an entry is to be kept: NULL, or why not. Its key lies in r->key, its value in r->value. */
static const char *unsound(repair_t *r, u32 b, u32 i, u64 e, sc_seen_t *seen)
{
    sc_table_t *t = r->t;
    u32 group = r->shard * ((t->n_buckets + SC_GROUP - 1) / SC_GROUP) + b / SC_GROUP;
    if (!sc_place_ok(t, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e)))
        return "points outside the pages";
    int state = sc_see(t, group, b << 3 | i, e, seen, r->key);
    if (state != SC_HIT && state != SC_MISS)
        return "leads to no item of its key";
    if (SC_LIFE_LANE(seen->life) >= SC_N_LANES)
        return "lies on a page of no lane";
    u32 need = seen->f.it.vlen < 8 ? 8u : seen->f.it.vlen;
    if (need > r->room) {
        u8 *more = (u8 *)realloc(r->value, need);
        if (more == NULL)
            return "is too large for the memory there is";
        r->value = more;
        r->room = need;
    }
    if (!sc_item_gather(t, r->s, &seen->f.it, seen->f.it.voff, r->value, seen->f.it.vlen) ||
        sc_see_content(t, seen, r->key, r->value) != SC_HIT)
        return "has an item that fails its check";
    if (SC_TYPE(seen->f.it.type) == SC_T_INT)
        memcpy(&seen->f.num, r->value, 8);
    return NULL;
}

/* An entry that clear() emptied; a page without a life is none that clear() met. */
static int flushed(const repair_t *r, u64 e)
{
    u32 page = SC_ENTRY_PAGE(e);
    u64 m = page < r->t->n_pages ? SC_LD(&r->s->life[page]) : 0;
    return m != 0 && SC_LIFE_SEQ(m) <= SC_LD(&r->s->hard->flush_seq);
}

static void drop(repair_t *r, u32 b, u32 i, const char *why)
{
    SC_ST_REL(&r->s->buckets[b].entry[i], 0);
    r->good[b * SC_N_SLOTS + i] = 0;
    did(r, "entry", "bucket %u slot %u: cleared, it %s", b, i, why);
    r->out->lost++;
}

/* Of two entries of one key the newer item stays. */
static void drop_twins(repair_t *r, u32 b, u32 i)
{
    sc_table_t *t = r->t;
    sc_seen_t mine, theirs;
    u64 e = SC_LD(&r->s->buckets[b].entry[i]);
    u32 tag = SC_ENTRY_TAG(e), bb = b;
    if (unsound(r, b, i, e, &mine) != NULL)
        return;
    memcpy(r->other, r->key, mine.f.it.klen);
    for (int turn = 0; turn < 2; turn++, bb = sc_other_of(b, tag, t->n_buckets)) {
        for (u32 j = 0; j < SC_N_SLOTS; j++) {
            u64 x = SC_LD(&r->s->buckets[bb].entry[j]);
            if ((bb == b && j == i) || !r->good[bb * SC_N_SLOTS + j] || SC_ENTRY_TAG(x) != tag ||
                unsound(r, bb, j, x, &theirs) != NULL || theirs.f.it.klen != mine.f.it.klen ||
                memcmp(r->key, r->other, mine.f.it.klen) != 0)
                continue;
            u32 ahead = (SC_W1_VERSION(theirs.f.it.w1) - SC_W1_VERSION(mine.f.it.w1)) & 0xFFFFFFu;
            int newer = ahead != 0 && ahead < 0x800000u;
            SC_ST_REL(&r->s->buckets[newer ? b : bb].entry[newer ? i : j], 0);
            r->good[newer ? b * SC_N_SLOTS + i : bb * SC_N_SLOTS + j] = 0;
            did(r, "entry", "bucket %u slot %u: cleared, bucket %u slot %u holds the same key", newer ? b : bb, newer ? i : j,
                newer ? bb : b, newer ? j : i);
            if (newer)
                return;
        }
        if (sc_other_of(b, tag, t->n_buckets) == b)
            break;
    }
}

/* ---- a shard -------------------------------------------------------------------------------------------------------- */

static int guard_free(repair_t *r)
{
    sc_table_t *t = r->t;
    sc_guard_word_t *g = r->s->guard;
    int num = SC_SEM_GUARD(r->shard), value = semctl(t->sem_id, num, GETVAL);
    if (SC_LD(&g->owner) != 0 || SC_LD(&g->dirty) != 0) {
        did(r, "guard", "owner word %08x and dirty word %08x released: no process lives that could hold it", SC_LD(&g->owner),
            SC_LD(&g->dirty));
        SC_ST_REL(&g->owner, 0);
        SC_ST_REL(&g->dirty, 0);
    }
    if (value != 1) { /* by an operation: SETVAL would change the set's ctime, by which the header knows it */
        int err = value < 0 ? errno : sc_sem_op(t->sem_id, num, 1 - value, IPC_NOWAIT, 0);
        t->sys_errno = err;
        if (err != 0)
            return SC_SYSTEM;
        did(r, "guard", "its semaphore brought from %d to 1", value);
    }
    return sc_guard_lock(t, r->shard, r->me, 1000000000);
}

/* Which slots have an item to keep; the counter of lives is no lower than theirs, and no page has a life above it. */
static void judge(repair_t *r)
{
    sc_table_t *t = r->t;
    sc_shard_t *s = r->s;
    u64 seq = SC_LD(&s->hard->seq);
    for (u32 b = 0; b < t->n_buckets; b++)
        for (u32 i = 0; i < SC_N_SLOTS; i++) {
            u64 e = SC_LD(&s->buckets[b].entry[i]);
            sc_seen_t seen;
            r->good[b * SC_N_SLOTS + i] = e != 0 && unsound(r, b, i, e, &seen) == NULL;
            if (r->good[b * SC_N_SLOTS + i] && SC_LIFE_SEQ(seen.life) > seq)
                seq = SC_LIFE_SEQ(seen.life);
        }
    if (seq != SC_LD(&s->hard->seq)) {
        did(r, "lives", "counter of page lives raised from %llu to %llu", (unsigned long long)SC_LD(&s->hard->seq),
            (unsigned long long)seq);
        SC_ST(&s->hard->seq, seq);
    }
    for (u32 p = 0; p < t->n_pages; p++) {
        u64 m = SC_LD(&s->life[p]);
        if (m != 0 && (SC_LIFE_LANE(m) >= SC_N_LANES || SC_LIFE_SEQ(m) > seq)) {
            did(r, "page", "page %u: life %016llx taken, no shard of this one gave it", p, (unsigned long long)m);
            SC_ST_REL(&s->life[p], 0);
        }
    }
    if (SC_LD(&s->hard->flush_seq) > seq) {
        did(r, "lives", "cleared up to %llu, set to %llu: what was cleared cannot be told, so everything is",
            (unsigned long long)SC_LD(&s->hard->flush_seq), (unsigned long long)seq);
        SC_ST(&s->hard->flush_seq, seq);
        for (u32 b = 0; b < t->n_buckets; b++)
            for (u32 i = 0; i < SC_N_SLOTS; i++)
                if (SC_LD(&s->buckets[b].entry[i]) != 0) {
                    SC_ST_REL(&s->buckets[b].entry[i], 0);
                    r->out->lost++;
                }
    }
}

/* Lanes that cannot be walked, or that do not hold a kept item of theirs. */
static void judge_lanes(repair_t *r)
{
    sc_table_t *t = r->t;
    sc_shard_t *s = r->s;
    u32 held[SC_N_LANES] = {0}, walked;
    for (u32 p = 0; p < t->n_pages; p++)
        if (!sc_page_is_free(t, s, p))
            held[SC_LIFE_LANE(SC_LD(&s->life[p]))]++;
    for (u32 lane = 0; lane < SC_N_LANES; lane++)
        r->bad[lane] = !sc_check_lane(t, r->shard, lane, r->starts, &walked) || walked != held[lane];
    for (u32 b = 0; b < t->n_buckets; b++)
        for (u32 i = 0; i < SC_N_SLOTS; i++) {
            u64 e = SC_LD(&s->buckets[b].entry[i]);
            if (!r->good[b * SC_N_SLOTS + i])
                continue;
            u32 page = SC_ENTRY_PAGE(e);
            if (sc_page_is_free(t, s, page) || !bit(r->starts, place_bit(r, page, SC_ENTRY_OFF(e))))
                r->bad[SC_LIFE_LANE(SC_LD(&s->life[page]))] = 1;
        }
}

static int keep_bad_lanes(repair_t *r)
{
    sc_table_t *t = r->t;
    sc_shard_t *s = r->s;
    for (u32 b = 0; b < t->n_buckets; b++)
        for (u32 i = 0; i < SC_N_SLOTS; i++) {
            u64 e = SC_LD(&s->buckets[b].entry[i]);
            sc_seen_t seen;
            if (!r->good[b * SC_N_SLOTS + i] || !r->bad[SC_LIFE_LANE(SC_LD(&s->life[SC_ENTRY_PAGE(e)]))] ||
                unsound(r, b, i, e, &seen) != NULL)
                continue;
            kept_t *k = (kept_t *)malloc(sizeof *k + seen.f.it.klen + seen.f.it.vlen);
            if (k == NULL) {
                t->sys_errno = ENOMEM;
                return SC_SYSTEM; /* nothing of these lanes was touched */
            }
            k->f = seen.f;
            k->lane = seen.lane;
            k->freq = seen.freq;
            memcpy(k->bytes, r->key, seen.f.it.klen);
            memcpy(k->bytes + seen.f.it.klen, r->value, seen.f.it.vlen);
            k->next = r->kept;
            r->kept = k;
        }
    for (u32 b = 0; b < t->n_buckets; b++)
        for (u32 i = 0; i < SC_N_SLOTS; i++) {
            u32 page = SC_ENTRY_PAGE(SC_LD(&s->buckets[b].entry[i]));
            u32 lane = page < t->n_pages ? SC_LIFE_LANE(SC_LD(&s->life[page])) : SC_N_LANES;
            if (r->good[b * SC_N_SLOTS + i] && lane < SC_N_LANES && r->bad[lane]) {
                SC_ST_REL(&s->buckets[b].entry[i], 0);
                r->good[b * SC_N_SLOTS + i] = 0;
            }
        }
    for (u32 lane = 0; lane < SC_N_LANES; lane++)
        if (r->bad[lane]) {
            SC_ST_REL(&s->hard->tail[lane], SC_POS(SC_NO_PAGE, 0));
            did(r, "lane", "lane %u: emptied, its log is damaged; the items it holds are stored anew", lane);
        }
    return SC_OK;
}

static void count_again(repair_t *r)
{
    sc_table_t *t = r->t;
    sc_shard_t *s = r->s;
    sc_soft_t was = *s->soft, *soft = s->soft;
    soft->n_items = soft->live_bytes = 0;
    soft->most_pages = soft->recount = 0;
    memset(soft->live, 0, sizeof soft->live);
    memset(soft->dead, 0, sizeof soft->dead);
    if (soft->cursor >= t->n_pages)
        soft->cursor = 0;
    for (u32 b = 0; b < t->n_buckets; b++)
        for (u32 i = 0; i < SC_N_SLOTS; i++) {
            u64 e = SC_LD(&s->buckets[b].entry[i]);
            sc_item_t it;
            if (!r->good[b * SC_N_SLOTS + i] || !sc_item_load(t, s, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e), &it))
                continue;
            set_bit(r->used, place_bit(r, it.page, it.off));
            soft->n_items++;
            soft->live_bytes += (i64)it.klen + it.vlen;
            soft->live[SC_LIFE_LANE(SC_LD(&s->life[it.page]))] += it.total;
            if (soft->most_pages < (it.total >> t->page_shift) + 2u)
                soft->most_pages = (it.total >> t->page_shift) + 2u;
        }
    for (u32 page = 0; page < t->n_pages; page++) {
        u32 lane = SC_LIFE_LANE(SC_LD(&s->life[page]));
        for (u32 off = 0; off < t->page_size && lane < SC_N_LANES && !r->bad[lane]; off += 8) {
            u64 at = place_bit(r, page, off);
            sc_item_t it;
            if (bit(r->starts, at) && !bit(r->used, at) && sc_item_load(t, s, page, off, &it))
                soft->dead[lane] += it.total;
        }
    }
    sc_heap_recount_guarded(t, s);
    if (was.n_items != soft->n_items || was.live_bytes != soft->live_bytes || was.n_free != soft->n_free ||
        memcmp(was.live, soft->live, sizeof was.live) != 0 || memcmp(was.dead, soft->dead, sizeof was.dead) != 0)
        did(r, "counts", "%lld items, %lld bytes, %u free pages counted, were %lld, %lld, %u", (long long)soft->n_items,
            (long long)soft->live_bytes, soft->n_free, (long long)was.n_items, (long long)was.live_bytes, was.n_free);
}

static void free_leases(repair_t *r)
{
    u32 n = 0;
    for (u32 i = 0; i < r->t->n_leases; i++) {
        sc_lease_t *l = &r->s->leases[i];
        if (SC_LD(&l->owner) == 0)
            continue;
        n += SC_LEASE_UNTIL(SC_LD(&l->deadline)) > sc_now(r->t);
        SC_ST_REL(&l->owner, 0);
    }
    if (n > 0)
        did(r, "leases", "%u freed, whose holders are gone", n);
}

static int repair_guarded(repair_t *r)
{
    sc_table_t *t = r->t;
    sc_shard_t *s = r->s;
    judge(r);
    judge_lanes(r);
    for (u32 b = 0; b < t->n_buckets; b++)
        for (u32 i = 0; i < SC_N_SLOTS; i++) {
            u64 e = SC_LD(&s->buckets[b].entry[i]);
            sc_seen_t seen;
            u8 freq = SC_LD(&s->buckets[b].freq[i]);
            if (freq > SC_FREQ_MAX)
                SC_ST(&s->buckets[b].freq[i], SC_FREQ_MAX);
            if (e != 0 && !r->good[b * SC_N_SLOTS + i] && flushed(r, e)) {
                SC_ST_REL(&s->buckets[b].entry[i], 0); /* empty already, for whoever looks */
                continue;
            }
            if (e == 0)
                continue;
            const char *why = unsound(r, b, i, e, &seen);
            if (why != NULL) {
                drop(r, b, i, why);
            } else if (SC_ENTRY_COARSE(e) == 0 && SC_W1_DEADLINE(seen.f.it.w1) != 0) {
                SC_ST_REL(&s->buckets[b].entry[i], (e & ~0xFFull) | sc_coarse_of(t, SC_W1_DEADLINE(seen.f.it.w1)));
                did(r, "entry", "bucket %u slot %u: told that its item has a lifetime", b, i);
            }
        }
    for (u32 b = 0; b < t->n_buckets; b++)
        for (u32 i = 0; i < SC_N_SLOTS; i++)
            if (r->good[b * SC_N_SLOTS + i])
                drop_twins(r, b, i);
    int rc = keep_bad_lanes(r);
    if (rc != SC_OK)
        return rc;
    count_again(r);
    free_leases(r);
    return SC_OK;
}

static int repair_shard(repair_t *r)
{
    u64 bits = ((u64)r->t->n_pages << r->t->page_shift) / 64u + 1u;
    memset(r->starts, 0, bits);
    memset(r->used, 0, bits);
    int rc = guard_free(r);
    if (rc != SC_OK && rc != SC_AFTER_DEATH)
        return rc == SC_BUSY ? SC_EXISTS : rc;
    rc = repair_guarded(r);
    sc_guard_unlock(r->t, r->shard);
    while (r->kept != NULL) {
        kept_t *k = r->kept;
        r->kept = k->next;
        if (rc == SC_OK) {
            int stored = sc_put_as(r->t, k->bytes, k->f.it.klen, k->bytes + k->f.it.klen, &k->f, k->lane, k->freq);
            r->out->moved += stored == SC_OK;
            r->out->lost += stored != SC_OK;
        }
        free(k);
    }
    return rc;
}

static void repair_control(repair_t *r)
{
    sc_control_t *c = r->t->control;
    u64 now = sc_now(r->t), period = r->t->h.clean_period_ms, word = SC_LD(&c->successor);
    if (word != 0) {
        did(r, "successor", "word %016llx cleared: it leads to no segment", (unsigned long long)word);
        SC_ST_REL(&c->successor, 0);
        r->t->lost = 0;
    }
    if (SC_LD(&c->next_step) > now + period || SC_LD(&c->sweep_done) > now ||
        SC_LD(&c->sweep_bucket) >= (u64)r->t->n_shards * r->t->n_buckets) {
        did(r, "sweep", "election begun anew: step due at %llu, done to %llu, bucket %llu, now is %llu",
            (unsigned long long)SC_LD(&c->next_step), (unsigned long long)SC_LD(&c->sweep_done),
            (unsigned long long)SC_LD(&c->sweep_bucket), (unsigned long long)now);
        SC_ST(&c->next_step, 0);
        SC_ST(&c->sweep_done, 0);
        SC_ST(&c->sweep_bucket, 0);
    }
}

int sc_repair(sc_table_t *t, sc_report_fn say, void *arg, sc_repaired_t *out)
{
    repair_t r = {.t = t, .say = say, .arg = arg, .out = out};
    size_t bits = ((size_t)t->n_pages << t->page_shift) / 64u + 1u;
    memset(out, 0, sizeof *out);
    r.starts = (u8 *)malloc(bits);
    r.used = (u8 *)malloc(bits);
    r.good = (u8 *)malloc((size_t)t->n_buckets * SC_N_SLOTS);
    r.key = (u8 *)malloc(SC_MAX_KEY);
    r.other = (u8 *)malloc(SC_MAX_KEY);
    int rc = SC_SYSTEM;
    t->sys_errno = ENOMEM;
    if (r.starts != NULL && r.used != NULL && r.good != NULL && r.key != NULL && r.other != NULL &&
        (rc = slots_take(&r)) == SC_OK) {
        repair_control(&r);
        for (r.shard = 0; r.shard < t->n_shards && rc == SC_OK; r.shard++) {
            r.s = &t->shard[r.shard];
            rc = repair_shard(&r);
        }
        slots_give(&r, t->h.n_workers);
    }
    free(r.starts);
    free(r.used);
    free(r.good);
    free(r.key);
    free(r.other);
    free(r.value);
    return rc;
}
