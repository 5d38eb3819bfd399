/* check.c - read-only audit of a segment: every invariant that can be seen from outside.
 *
 * Takes no guard and writes nothing.  On a live segment a finding counts only if three passes over its shard make the same
 * one, word for word: what one pass sees may be a write half-way, and what changes from pass to pass is being written. */
#include "guard.h"
#include "heap.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ipc.h>
#include <sys/sem.h>

/* The findings of a pass, each as a hash of its words. */
typedef struct {
    u64 *hash;
    size_t n, room;
} findings_t;

typedef struct {
    sc_table_t *t;
    sc_shard_t *s;
    u32 shard;
    int no_memory, unsure; /* unsure: a lane was not walked to its end, so not every item's place is known */
    u64 n;                 /* findings of this pass that the one before it made too */
    u32 walked[SC_N_LANES]; /* pages of the chain of a lane, between the ends it had then */
    u64 ends[SC_N_LANES][2];
    sc_report_fn report;   /* NULL: count only */
    void *arg;
    u8 *starts; /* bit per 8 bytes of the shard's pages: an item begins there */
    u8 *keys;   /* two keys' worth */
    int first;  /* the first pass: there is none before it */
    findings_t now, before;
} audit_t;

static int by_hash(const void *a, const void *b)
{
    u64 x = *(const u64 *)a, y = *(const u64 *)b;
    return x < y ? -1 : x > y;
}

static int add_finding(findings_t *f, u64 hash)
{
    if (f->n == f->room) {
        size_t room = f->room ? 2 * f->room : 64;
        u64 *grown = (u64 *)realloc(f->hash, room * sizeof *grown);
        if (grown == NULL)
            return -1;
        f->hash = grown;
        f->room = room;
    }
    f->hash[f->n++] = hash;
    return 0;
}

__attribute__((format(printf, 3, 4))) static void found(audit_t *a, const char *code, const char *fmt, ...)
{
    char text[240];
    u64 hash = 0xCBF29CE484222325ull; /* FNV-1a */
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    for (const char *p = text; *p != 0; p++)
        hash = (hash ^ (u8)*p) * 0x100000001B3ull;
    if (!a->first && (a->before.n == 0 || bsearch(&hash, a->before.hash, a->before.n, sizeof hash, by_hash) == NULL))
        return;
    if (add_finding(&a->now, hash) != 0)
        a->no_memory = 1;
    a->n++;
    if (a->report != NULL)
        a->report(a->arg, code, a->shard, text);
}

static u64 bit_of(const audit_t *a, u32 page, u32 off) { return (((u64)page << a->t->page_shift) + off) >> 3; }

static u32 check_value_of(audit_t *a, const sc_item_t *it, u64 h, u32 *found_check, int *ok)
{
    sc_table_t *t = a->t;
    u64 hm = sc_header_mix(&t->secret, h, it->w0, it->soft);
    u32 place = sc_place_mix(&t->secret, SC_LD(&a->s->life[it->page]), it->page, it->off);
    *ok = 1;
    if (!t->check_len) {
        *found_check = SC_W0_HCHECK(it->w0);
        return ((u32)(hm >> 56) ^ place) & 0xFFu;
    }
    u8 *value = (u8 *)malloc(it->vlen + 1u);
    *ok = value != NULL && sc_item_gather(t, a->s, it, it->voff, value, it->vlen) &&
          sc_item_gather(t, a->s, it, it->total - 4, found_check, 4);
    u32 want = *ok ? sc_content_mix(&t->secret, hm, sc_value_hash(&t->secret, it->type, value, it->vlen)) ^ place : 0;
    free(value);
    return want;
}

#define LANE_WALKS 100
/* A finding of a lane, unless its head moved since the walk began: then pages it stands on may be another's by now. */
#define LANE_FOUND(...)                                  \
    do {                                                 \
        SC_FENCE_ACQ();                                  \
        if (SC_LD_ACQ(&s->hard->head[lane]) != head)     \
            return 1;                                    \
        found(a, __VA_ARGS__);                           \
        return 2;                                        \
    } while (0)

/* 0 walked to its end, 1 the head moved and nothing can be said, 2 a finding ended the walk. */
static int walk_lane(audit_t *a, u32 lane)
{
    sc_table_t *t = a->t;
    sc_shard_t *s = a->s;
    u64 tail = SC_LD_ACQ(&s->hard->tail[lane]), head = SC_LD_ACQ(&s->hard->head[lane]);
    u32 page = SC_POS_PAGE(head), off = SC_POS_OFF(head), tp = SC_POS_PAGE(tail), to = SC_POS_OFF(tail), crossed = 0;
    a->walked[lane] = 0;
    a->ends[lane][0] = head;
    a->ends[lane][1] = tail;
    if (tp == SC_NO_PAGE)
        return 0;
    if (tp >= t->n_pages || page >= t->n_pages || off > t->page_size || to > t->page_size || (off & 7) || (to & 7)) {
        LANE_FOUND("lane-ends", "lane %u: head %u+%u, tail %u+%u, but there are %u pages of %u bytes", lane, page, off, tp,
              to, t->n_pages, t->page_size);
    }
    u64 lh = SC_LD(&s->life[page]), lt = SC_LD(&s->life[tp]);
    if (SC_LIFE_LANE(lh) != lane || SC_LIFE_LANE(lt) != lane || SC_LIFE_SEQ(lh) > SC_LIFE_SEQ(lt) ||
        SC_LIFE_SEQ(lt) > SC_LD(&s->hard->seq)) {
        LANE_FOUND("lane-ends", "lane %u: head page life %u|%llu, tail page life %u|%llu, shard seq %llu", lane,
              SC_LIFE_LANE(lh), (unsigned long long)SC_LIFE_SEQ(lh), SC_LIFE_LANE(lt),
              (unsigned long long)SC_LIFE_SEQ(lt), (unsigned long long)SC_LD(&s->hard->seq));
    }
    a->walked[lane] = 1;
    while (page != tp || off < to) {
        u32 skip = t->page_size - off;
        if (off < t->page_size) {
            sc_item_t it;
            u64 w0 = SC_LD((u64 *)(void *)sc_at(t, s, page, off));
            if (SC_W0_KLEN(w0) != 0) {
                if (off + SC_ITEM_HEADER > t->page_size || !sc_item_load(t, s, page, off, &it)) {
                    LANE_FOUND("item-header", "lane %u page %u+%u: header word %016llx cannot be an item", lane, page, off,
                          (unsigned long long)w0);
                }
                u64 bit = bit_of(a, page, off);
                a->starts[bit >> 3] = (u8)(a->starts[bit >> 3] | (1u << (bit & 7)));
                skip = it.total;
            }
        }
        u64 pos = (u64)off + skip;
        while (pos >= t->page_size && page != tp) {
            u32 q = SC_LD(&s->next[page]);
            if (q >= t->n_pages || SC_LIFE_LANE(SC_LD(&s->life[q])) != lane ||
                SC_LIFE_SEQ(SC_LD(&s->life[q])) <= SC_LIFE_SEQ(SC_LD(&s->life[page])) || ++crossed > t->n_pages) {
                LANE_FOUND("lane-chain", "lane %u: page %u is followed by %u, which is not a later page of the lane", lane,
                      page, q);
            }
            page = q;
            a->walked[lane]++;
            pos -= t->page_size;
        }
        off = (u32)pos;
        if (page == tp && pos > to) {
            LANE_FOUND("lane-chain", "lane %u: an item ends at %u+%llu, beyond the tail %u+%u", lane, page,
                  (unsigned long long)pos, tp, to);
        }
    }
    return 0;
}

static int in_window(audit_t *a, u32 page)
{
    return !sc_page_is_free(a->t, a->s, page);
}

static void check_entry(audit_t *a, u32 b, u32 i)
{
    sc_table_t *t = a->t;
    sc_shard_t *s = a->s;
    u64 e = SC_LD_ACQ(&s->buckets[b].entry[i]);
    if (e == 0)
        return;
    u32 page = SC_ENTRY_PAGE(e), off = SC_ENTRY_OFF(e);
    if (!sc_place_ok(t, page, off)) {
        found(a, "entry-bounds", "bucket %u slot %u: points at page %u+%u, but there are %u pages of %u bytes", b, i, page,
              off, t->n_pages, t->page_size);
        return;
    }
    if (!in_window(a, page)) {
        found(a, "entry-free-page", "bucket %u slot %u: points at page %u, which is free", b, i, page);
        return;
    }
    u64 bit = bit_of(a, page, off);
    if (SC_LIFE_SEQ(SC_LD(&s->life[page])) <= SC_LD(&s->hard->flush_seq))
        return; /* cleared with the shard */
    if (!a->unsure && !(a->starts[bit >> 3] & (1u << (bit & 7)))) {
        found(a, "entry-place", "bucket %u slot %u: points at page %u+%u, where no item of the log begins", b, i, page, off);
        return;
    }
    sc_item_t it;
    if (!sc_item_load(t, s, page, off, &it)) {
        found(a, "item-header", "bucket %u slot %u: page %u+%u holds no item", b, i, page, off);
        return;
    }
    u32 skip = SC_ITEM_HEADER + ((it.flags & SC_IF_SOFT) ? 8u : 0u), got = 0;
    if (!sc_item_gather(t, s, &it, skip, a->keys, it.klen)) {
        found(a, "item-chain", "bucket %u slot %u: the pages of item %u+%u leave the segment", b, i, page, off);
        return;
    }
    u64 h = sc_hash(&t->secret, a->keys, it.klen, 0);
    u32 tag = sc_tag_of(h), home = sc_home_of(h, t->n_buckets), other = sc_other_of(home, tag, t->n_buckets);
    int ok;
    u32 want = check_value_of(a, &it, h, &got, &ok);
    if (!ok || want != got) {
        found(a, "item-check", "bucket %u slot %u: item at page %u+%u has check %08x, wanted %08x", b, i, page, off, got,
              want);
        return;
    }
    if (tag != SC_ENTRY_TAG(e) || sc_shard_of(h, t->n_shards) != a->shard || (b != home && b != other)) {
        found(a, "entry-key", "bucket %u slot %u: its key belongs to bucket %u or %u of shard %u with tag %04x", b, i, home,
              other, sc_shard_of(h, t->n_shards), tag);
        return;
    }
    if (SC_ENTRY_COARSE(e) == 0 && SC_W1_DEADLINE(it.w1) != 0 && SC_LD_ACQ(&s->buckets[b].entry[i]) == e)
        found(a, "entry-coarse", "bucket %u slot %u: its item has a lifetime, and the entry says it has none", b, i);
    for (u32 turn = 0, bb = home; turn < 2; turn++, bb = other) {
        for (u32 j = 0; j < SC_N_SLOTS; j++) {
            u64 x = SC_LD_ACQ(&s->buckets[bb].entry[j]);
            sc_item_t y;
            if ((bb == b && j == i) || SC_ENTRY_TAG(x) != tag || SC_ENTRY_PLACE(x) == SC_ENTRY_PLACE(e) ||
                sc_entry_dead(t, s, x) || !sc_place_ok(t, SC_ENTRY_PAGE(x), SC_ENTRY_OFF(x)) ||
                !sc_item_load(t, s, SC_ENTRY_PAGE(x), SC_ENTRY_OFF(x), &y) || y.klen != it.klen)
                continue;
            if (sc_item_key_is(t, s, &y, a->keys))
                found(a, "key-twice", "bucket %u slot %u and bucket %u slot %u hold the same key", b, i, bb, j);
        }
        if (other == home)
            break;
    }
}

#define LEASE_MOST_MS 315360000000ull /* ten years, as the longest lifetime */

/* Words that stand beside the log and the index. */
static void check_words(audit_t *a)
{
    sc_table_t *t = a->t;
    sc_shard_t *s = a->s;
    u64 flushed = SC_LD_ACQ(&s->hard->flush_seq), seq = SC_LD_ACQ(&s->hard->seq), now = sc_now(t), word = SC_LD(&t->control->successor);
    if (word != 0 && a->shard == 0)
        found(a, "successor", "successor word %016llx: removed or replaced, nobody can write", (unsigned long long)word);
    if (flushed > seq)
        found(a, "flush-seq", "cleared up to page life %llu, but the last one given is %llu", (unsigned long long)flushed,
              (unsigned long long)seq);
    for (u32 p = 0; p < t->n_pages; p++) {
        u64 m = SC_LD_ACQ(&s->life[p]);
        if (SC_LIFE_LANE(m) < SC_N_LANES && SC_LIFE_SEQ(m) > SC_LD_ACQ(&s->hard->seq))
            found(a, "page-life", "page %u: life %llu, but the last one given is %llu", p, (unsigned long long)SC_LIFE_SEQ(m),
                  (unsigned long long)seq);
    }
    u32 owner = SC_LD(&s->guard->owner), dirty = SC_LD(&s->guard->dirty);
    if (SC_OWNER_SLOT(owner) >= t->h.n_workers || SC_OWNER_SLOT(dirty) >= t->h.n_workers)
        found(a, "guard-owner", "owner word %08x, dirty word %08x, but there are %u worker slots", owner, dirty, t->h.n_workers);
    for (u32 i = 0; i < t->n_leases; i++) {
        const sc_lease_t *l = &s->leases[i];
        if (SC_LD(&l->owner) != 0 && SC_LEASE_UNTIL(SC_LD(&l->deadline)) > now + LEASE_MOST_MS)
            found(a, "lease-deadline", "lease %u: held until %llu ms, now is %llu", i,
                  (unsigned long long)SC_LEASE_UNTIL(SC_LD(&l->deadline)), (unsigned long long)now);
    }
    int value = t->sem_id < 0 ? 1 : semctl(t->sem_id, SC_SEM_GUARD(a->shard), GETVAL);
    if (value > 1)
        found(a, "guard-value", "guard semaphore %u: %d, but it is binary", a->shard, value);
}

int sc_check_lane(sc_table_t *t, u32 shard, u32 lane, u8 *starts, u32 *walked)
{
    audit_t a = {.t = t, .s = &t->shard[shard], .shard = shard, .starts = starts, .first = 1};
    int r = walk_lane(&a, lane);
    *walked = a.walked[lane];
    free(a.now.hash);
    return r == 0;
}

static u64 audit_shard(audit_t *a)
{
    sc_table_t *t = a->t;
    a->n = a->now.n = 0;
    check_words(a);
    a->unsure = 0;
    memset(a->starts, 0, ((u64)t->n_pages << t->page_shift) / 64u + 1u);
    for (u32 lane = 0; lane < SC_N_LANES; lane++) {
        int moved = 1;
        for (int walk = 0; moved == 1 && walk < LANE_WALKS; walk++)
            moved = walk_lane(a, lane);
        a->unsure |= moved;
    }
    for (u32 b = 0; b < t->n_buckets; b++)
        for (u32 i = 0; i < SC_N_SLOTS; i++)
            check_entry(a, b, i);
    u32 n_free = 0, held[SC_N_LANES] = {0};
    for (u32 p = 0; p < t->n_pages; p++) {
        u64 m = SC_LD(&a->s->life[p]);
        if (sc_page_is_free(t, a->s, p))
            n_free++;
        else
            held[SC_LIFE_LANE(m)]++;
    }
    SC_FENCE_ACQ();
    for (u32 lane = 0; lane < SC_N_LANES && !a->unsure; lane++)
        if (held[lane] != a->walked[lane] && SC_LD(&a->s->hard->head[lane]) == a->ends[lane][0] &&
            SC_LD(&a->s->hard->tail[lane]) == a->ends[lane][1])
            found(a, "page-lost", "lane %u: %u pages lie within its ends, its chain has %u", lane, held[lane], a->walked[lane]);
    if (n_free != a->s->soft->n_free && a->s->guard->owner == 0 && a->s->guard->dirty == 0)
        found(a, "free-count", "%u pages are free, the hint says %u", n_free, a->s->soft->n_free);
    if (a->now.n > 0)
        qsort(a->now.hash, a->now.n, sizeof *a->now.hash, by_hash);
    findings_t spare = a->before;
    a->before = a->now;
    a->now = spare;
    return a->n;
}

/* Reports every finding; returns their number, or UINT64_MAX when memory for the audit is missing. */
u64 sc_check(sc_table_t *t, sc_report_fn report, void *arg)
{
    audit_t a = {.t = t, .arg = arg};
    u64 sum = 0;
    a.starts = (u8 *)malloc(((u64)t->n_pages << t->page_shift) / 64u + 1u);
    a.keys = (u8 *)malloc(SC_MAX_KEY);
    a.no_memory = a.starts == NULL || a.keys == NULL;
    for (u32 shard = 0; shard < t->n_shards && !a.no_memory; shard++) {
        a.shard = shard;
        a.s = &t->shard[shard];
        a.report = NULL;
        a.first = 1;
        if (audit_shard(&a) == 0)
            continue;
        a.first = 0;
        if (audit_shard(&a) == 0)
            continue;
        a.report = report;
        sum += audit_shard(&a);
    }
    free(a.starts);
    free(a.keys);
    free(a.now.hash);
    free(a.before.hash);
    return a.no_memory ? UINT64_MAX : sum;
}
