/* resize.c - copying a live segment into another one, and the moment of change.
 *
 * The copy walks the index group by group with the readers' protocol and remembers, for each slot, whose key it copied and in
 * which state.  It is repeated; each round copies only what differs from what is remembered, so that the last one, which runs
 * with every guard held, is short.
 *
 *   Z1  The one COMMIT is the store of control->successor in the old segment, by compare-and-swap from 0, with every guard of
 *       it held and the copy complete.  A kill before it leaves the old segment as it was, guards for the next owner to
 *       recover; after it the new segment is complete, and who finds the word does what is left (catalog.py).
 *   Z2  A remembered slot vouches for the new segment: that key was stored there in that state, or there was no room for it.
 *       Whatever cannot be read leaves the slot unremembered, so the next round looks again.
 *   Z3  Both buckets of a key lie in one group, so a key that is gone is known gone when its group has been walked.
 *   Z4  Lives of pages in the new segment lie above every life of the old one: "the very item I read" is never true of an
 *       item of the other segment.  Versions go on from the old ones: a token still means the item it was given for.
 *
 * Takes several guards at once, alone in that; no writer waits for a guard while it holds one, so it cannot deadlock.  The
 * lifecycle semaphore, held by the caller, admits one resize at a time. */
#include "resize.h"
#include "guard.h"
#include "heap.h"
#include <stdlib.h>

#define GROUP_SLOTS (SC_GROUP * SC_N_SLOTS)
#define SET_SIZE 4096u                  /* over twice GROUP_SLOTS */
#define LIFE_DISTANCE (1ull << 40)      /* pages the old segment may prepare while it is copied */
#define LIFE_MASK ((1ull << 55) - 1u)
#define GUARD_STEP 50000000             /* ns of one wait for a guard */

typedef struct {
    u64 hash, print; /* 0, 0: nothing remembered. Bit 0 of print: the item changes in place */
} seen_t;

struct sc_resize {
    sc_table_t *from, *to;
    seen_t *seen; /* one per slot of the old segment */
    u64 *set;     /* hashes of one group, open addressing */
    u64 *gone;    /* hashes that a group no longer has where they were */
    u8 *key, *value;
    u32 value_size, n_held; /* guards of shards 0..n_held-1 are held */
    u32 me;                 /* by this worker */
    sc_resized_t result;
};

static u32 groups_of_shard(const sc_table_t *t) { return (t->n_buckets + SC_GROUP - 1) / SC_GROUP; }

sc_resize_t *sc_resize_new(sc_table_t *from, sc_table_t *to)
{
    sc_resize_t *r = (sc_resize_t *)calloc(1, sizeof *r);
    if (r == NULL)
        return NULL;
    r->from = from;
    r->to = to;
    r->seen = (seen_t *)calloc((size_t)from->n_shards * from->n_buckets * SC_N_SLOTS, sizeof(seen_t));
    r->set = (u64 *)malloc(SET_SIZE * sizeof(u64));
    r->gone = (u64 *)malloc(GROUP_SLOTS * sizeof(u64));
    r->key = (u8 *)malloc(SC_MAX_KEY);
    if (r->seen == NULL || r->set == NULL || r->gone == NULL || r->key == NULL) {
        sc_resize_free(r);
        return NULL;
    }
    u64 seq = 0;
    for (u32 i = 0; i < from->n_shards; i++) {
        u64 s = SC_LD(&from->shard[i].hard->seq);
        seq = s > seq ? s : seq;
    }
    for (u32 i = 0; i < to->n_shards; i++)
        SC_ST(&to->shard[i].hard->seq, (seq + LIFE_DISTANCE) & LIFE_MASK); /* a rotten seq costs the distance, no more */
    return r;
}

static void give_guards_back(sc_resize_t *r)
{
    if (r->n_held > 0 && sc_worker_me(r->from) != r->me)
        return; /* a child, forked from another thread: they are its parent's (G4) */
    while (r->n_held > 0)
        sc_leave(r->from, --r->n_held);
}

void sc_resize_free(sc_resize_t *r)
{
    if (r == NULL)
        return;
    give_guards_back(r);
    free(r->seen);
    free(r->set);
    free(r->gone);
    free(r->key);
    free(r->value);
    free(r);
}

sc_resized_t sc_resize_result(const sc_resize_t *r) { return r->result; }

/* ---- what is remembered ------------------------------------------------------------------------------------------- */

static u64 print_of(const sc_table_t *t, u64 e, u64 life) { return sc_fold(e ^ t->secret.s[1], life ^ t->secret.s[2]) & ~1ull; }
static u64 volatile_print(const sc_table_t *t, u64 print, u64 w1, i64 num)
{
    return (print ^ sc_fold(w1 ^ t->secret.s[3], (u64)num ^ t->secret.s[4])) | 1u;
}

static u64 *set_place(u64 *set, u64 hash)
{
    u32 i = (u32)(hash >> 20) % SET_SIZE;
    while (set[i] != 0 && set[i] != hash)
        i = (i + 1) % SET_SIZE;
    return &set[i];
}

/* The state of an item that changes in place, as it stands there; 0 if it cannot be read. */
static u64 look_again(const sc_table_t *t, const sc_shard_t *s, u64 e, u64 print)
{
    sc_item_t it;
    i64 num = 0;
    if (!sc_item_load(t, s, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e), &it))
        return 0;
    if (SC_TYPE(it.type) == SC_T_INT) {
        const u64 *word = sc_item_word(t, s, &it, it.voff);
        if (word == NULL)
            return 0;
        num = (i64)SC_LD(word);
    }
    return volatile_print(t, print, it.w1, num);
}

/* ---- one item ----------------------------------------------------------------------------------------------------- */

/* Removes the key of this hash from the new segment. */
static int forget(sc_resize_t *r, u64 hash)
{
    sc_table_t *t = r->to;
    sc_shard_t *s = &t->shard[sc_shard_of(hash, t->n_shards)];
    u32 tag = sc_tag_of(hash), b = sc_home_of(hash, t->n_buckets), b2 = sc_other_of(b, tag, t->n_buckets);
    for (u32 turn = 0; turn < 2; turn++, b = b2) {
        for (u32 i = 0; i < SC_N_SLOTS; i++) {
            u64 e = SC_LD(&s->buckets[b].entry[i]), h;
            sc_item_t it;
            if (SC_ENTRY_TAG(e) != tag || !sc_place_ok(t, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e)) ||
                !sc_item_load(t, s, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e), &it) || sc_item_keyhash(t, s, &it, &h) <= 0 || h != hash)
                continue;
            u32 skip = SC_ITEM_HEADER + ((it.flags & SC_IF_SOFT) ? 8u : 0u), klen = it.klen;
            if (!sc_item_gather(t, s, &it, skip, r->key, klen))
                continue;
            sc_key_t k;
            sc_key_init(t, &k, r->key, klen);
            int rc = sc_delete(t, &k, NULL, NULL, GUARD_STEP);
            if (rc < 0)
                return rc;
        }
        if (b2 == b)
            break;
    }
    return SC_OK;
}

int sc_put_as(sc_table_t *t, const void *key, u32 klen, const void *value, const sc_found_t *f, u32 lane, u32 freq)
{
    sc_key_t k;
    sc_key_init(t, &k, key, klen);
    sc_value_t v = {value, f->num, f->it.vlen, (u8)f->it.type, SC_W1_DEADLINE(f->it.w1), f->it.soft};
    sc_cond_t cond;
    memset(&cond, 0, sizeof cond);
    if (lane >= SC_LANE_MAIN && lane < SC_N_LANES) { /* a proven item: its ghost sends it to main */
        sc_op_t op;
        sc_op_begin(&op, t, k.shard);
        sc_ghost_add(&op, k.h);
    }
    int rc = sc_store(t, &k, &v, &cond, GUARD_STEP);
    sc_found_t there;
    if (rc == SC_OK && sc_look(t, &k, &there) == SC_HIT) {
        sc_shard_t *s = &t->shard[k.shard];
        u64 *w1 = (u64 *)(void *)sc_at(t, s, there.it.page, there.it.off) + 1;
        SC_ST(w1, SC_W1(SC_W1_DEADLINE(f->it.w1), SC_W1_VERSION(f->it.w1)));
        SC_ST(&s->buckets[there.bucket].freq[there.slot], (u8)(freq < SC_FREQ_MAX ? freq : SC_FREQ_MAX));
    }
    return rc;
}

/* Stores the item that f describes, whose value lies in r. */
static int put(sc_resize_t *r, const sc_key_t *k, const sc_seen_t *seen, const sc_found_t *f)
{
    sc_table_t *t = r->to;
    int rc = sc_put_as(t, k->p, k->len, r->value, f, seen->lane, seen->freq);
    if ((rc != SC_NO_SPACE && rc != SC_TOO_LARGE) || (t->h.flags & SC_F_NO_EVICT))
        return rc;
    sc_key_t old;
    sc_key_init(t, &old, k->p, k->len);
    rc = sc_delete(t, &old, NULL, NULL, GUARD_STEP); /* left out: an older state of it goes as well */
    return rc < 0 ? rc : SC_MISS;
}

/* Copies the item under one slot. *mem becomes what is remembered of it; nothing when there is no item or it changed. */
static int copy_slot(sc_resize_t *r, u32 group, u32 where, u64 e, seen_t *mem)
{
    sc_table_t *t = r->from;
    sc_seen_t seen;
    mem->hash = mem->print = 0;
    int state = sc_see(t, group, where, e, &seen, r->key);
    if (state == SC_AGAIN)
        return SC_AGAIN;
    if (state == SC_CHANGED) {
        r->result.corrupt++;
        return SC_MISS;
    }
    u64 deadline = SC_W1_DEADLINE(seen.f.it.w1);
    if (deadline != 0 && deadline <= sc_now(t))
        return SC_MISS;
    sc_found_t *f = &seen.f;
    sc_shard_t *s = &t->shard[seen.shard];
    f->place = &s->buckets[seen.bucket];
    f->at = sc_at(t, s, seen.page, seen.off);
    u32 need = f->it.vlen < 8 ? 8u : f->it.vlen;
    if (need > r->value_size) {
        u8 *more = (u8 *)realloc(r->value, need);
        if (more == NULL) {
            t->sys_errno = 12; /* ENOMEM */
            return SC_SYSTEM;
        }
        r->value = more;
        r->value_size = need;
    }
    sc_key_t k;
    sc_key_init(t, &k, r->key, f->it.klen);
    int rc = sc_get_finish(t, &k, f, r->value, 0);
    if (rc == SC_AGAIN)
        return SC_AGAIN;
    if (rc != SC_HIT) {
        r->result.corrupt++;
        return SC_MISS;
    }
    rc = put(r, &k, &seen, f);
    if (rc < 0)
        return rc;
    u64 print = print_of(t, f->entry, f->life);
    int is_int = SC_TYPE(f->it.type) == SC_T_INT;
    mem->hash = k.h;
    mem->print = is_int || deadline != 0 ? volatile_print(t, print, f->it.w1, is_int ? f->num : 0) : print;
    return SC_HIT;
}

/* ---- a group ------------------------------------------------------------------------------------------------------ */

static int copy_group(sc_resize_t *r, u32 group, u64 *changed)
{
    sc_table_t *t = r->from;
    u32 per = groups_of_shard(t), shard = group / per, first = group % per * SC_GROUP, n_gone = 0;
    u32 last = first + SC_GROUP < t->n_buckets ? first + SC_GROUP : t->n_buckets;
    sc_shard_t *s = &t->shard[shard];
    seen_t *mem = r->seen + ((size_t)shard * t->n_buckets + first) * SC_N_SLOTS;
    u64 flushed = SC_LD_ACQ(&s->hard->flush_seq);
    for (u32 b = first; b < last; b++) /* every line that the loop below waits for */
        for (u32 i = 0; i < SC_N_SLOTS; i++) {
            u64 e = SC_LD(&s->buckets[b].entry[i]);
            u32 page = SC_ENTRY_PAGE(e), off = SC_ENTRY_OFF(e);
            const seen_t *m = &mem[(b - first) * SC_N_SLOTS + i];
            if (e != 0 && sc_place_ok(t, page, off) && (m->print == 0 || (m->print & 1u)))
                SC_PREFETCH(sc_at(t, s, page, off));
        }
    for (u32 b = first; b < last; b++)
        for (u32 i = 0; i < SC_N_SLOTS; i++) {
            seen_t *m = &mem[(b - first) * SC_N_SLOTS + i], was = *m;
            u64 e = SC_LD_ACQ(&s->buckets[b].entry[i]);
            if (e == 0 && was.hash == 0)
                continue;
            m->hash = m->print = 0;
            if (e != 0) {
                if (was.print != 0 && sc_place_ok(t, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e))) {
                    u64 life = SC_LD_ACQ(&s->life[SC_ENTRY_PAGE(e)]), print = print_of(t, e, life);
                    if ((was.print & 1u) && SC_LIFE_SEQ(life) > flushed)
                        print = look_again(t, s, e, print);
                    if (print == was.print && SC_LIFE_SEQ(life) > flushed) {
                        *m = was;
                        continue;
                    }
                }
                int rc = copy_slot(r, group, b << 3 | i, e, m);
                if (rc < 0)
                    return rc;
                *changed += rc == SC_HIT;
            }
            if (was.hash != 0 && was.hash != m->hash)
                r->gone[n_gone++] = was.hash;
        }
    if (n_gone == 0)
        return SC_OK;
    memset(r->set, 0, SET_SIZE * sizeof(u64));
    for (u32 i = 0; i < (last - first) * SC_N_SLOTS; i++)
        if (mem[i].hash != 0)
            *set_place(r->set, mem[i].hash) = mem[i].hash;
    for (u32 i = 0; i < n_gone; i++) {
        if (*set_place(r->set, r->gone[i]) == r->gone[i])
            continue;
        int rc = forget(r, r->gone[i]);
        if (rc < 0)
            return rc;
        ++*changed;
    }
    return SC_OK;
}

int sc_resize_copy(sc_resize_t *r, u32 first, u32 last, u64 *changed)
{
    *changed = 0;
    for (u32 group = first; group < last && group < sc_n_groups(r->from); group++) {
        int rc = copy_group(r, group, changed);
        if (rc != SC_OK)
            return rc;
    }
    return SC_OK;
}

/* ---- the change --------------------------------------------------------------------------------------------------- */

/* Items remembered; twins of a killed displacement lie in one group and count once. */
static u64 count_remembered(sc_resize_t *r)
{
    u64 n = 0, slots = (u64)r->from->n_shards * r->from->n_buckets * SC_N_SLOTS;
    u64 step = (SC_GROUP < r->from->n_buckets ? SC_GROUP : r->from->n_buckets) * SC_N_SLOTS;
    for (u64 at = 0; at < slots; at += step) { /* n_buckets is a multiple of SC_GROUP, or below it */
        memset(r->set, 0, SET_SIZE * sizeof(u64));
        for (u64 i = at; i < at + step && i < slots; i++) {
            u64 hash = r->seen[i].hash, *place = hash != 0 ? set_place(r->set, hash) : NULL;
            if (place == NULL || *place == hash)
                continue;
            *place = hash;
            n++;
        }
    }
    return n;
}

static u64 count_items(const sc_table_t *t)
{
    u64 n = 0;
    for (u32 i = 0; i < t->n_shards; i++)
        for (u32 b = 0; b < t->n_buckets; b++)
            for (u32 j = 0; j < SC_N_SLOTS; j++)
                n += !sc_entry_dead(t, &t->shard[i], SC_LD(&t->shard[i].buckets[b].entry[j]));
    return n;
}

/* Counters go on from where they were; what the copying itself counted is left out. */
static void carry_counters(const sc_table_t *from, sc_table_t *to)
{
    u64 version = 0, s[SC_N_SHARD_STATS] = {0};
    for (u32 i = 0; i < from->n_shards; i++) {
        u64 v = SC_LD(&from->shard[i].hard->version);
        version = v > version ? v : version;
        for (u32 j = 0; j < SC_N_SHARD_STATS; j++) {
            u64 one = SC_LD(&from->shard[i].soft->stat[j]);
            if (j == SC_SS_MAX_STEPS || j == SC_SS_MAX_MOVED)
                s[j] = one > s[j] ? one : s[j];
            else
                s[j] += one;
        }
    }
    for (u32 i = 0; i < to->n_shards; i++) {
        sc_shard_t *shard = &to->shard[i];
        if (shard->hard->version < version)
            shard->hard->version = version; /* Z4 */
        memset(shard->soft->stat, 0, sizeof shard->soft->stat);
    }
    memcpy(to->shard[0].soft->stat, s, sizeof s);
    for (u32 j = 0; j < SC_N_STATS; j++) {
        u64 sum = 0;
        for (u32 i = 0; i < from->h.n_workers; i++)
            sum += SC_LD(&from->workers[i].stat[j]);
        SC_ST(&to->workers[0].stat[j], sum);
    }
}

int sc_resize_publish(sc_header_t *h)
{
    u32 was = SC_STATE_COPY;
    return __atomic_compare_exchange_n(&h->state, &was, SC_STATE_READY, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED) ||
           was == SC_STATE_READY;
}

static int take_and_copy(sc_resize_t *r, i64 until)
{
    sc_table_t *t = r->from;
    u32 per = groups_of_shard(t);
    while (r->n_held < t->n_shards) {
        int rc;
        do
            rc = sc_enter(t, r->n_held, GUARD_STEP);
        while (rc == SC_BUSY && sc_clock_mono_ns() < until);
        if (rc != SC_OK)
            return rc;
        r->me = sc_worker_me(t);
        u32 shard = r->n_held++;
        for (u32 g = shard * per; g < (shard + 1) * per; g++) {
            u64 changed = 0;
            rc = copy_group(r, g, &changed);
            if (rc != SC_OK)
                return rc;
            if (sc_clock_mono_ns() > until)
                return SC_BUSY;
        }
    }
    return SC_OK;
}

int sc_resize_switch(sc_resize_t *r, u64 word, i64 pause_ns)
{
    sc_table_t *t = r->from;
    i64 begun = sc_clock_mono_ns();
    r->result.corrupt = 0;
    int rc = take_and_copy(r, begun + pause_ns);
    if (rc == SC_OK)
        rc = sc_lease_carry(t, r->to);
    if (rc == SC_OK && sc_segment_gone(t)) {
        t->lost = 1;
        rc = SC_LOST;
    }
    u64 none = 0, there = 0;
    if (rc == SC_OK) {
        there = count_items(r->to);
        carry_counters(t, r->to);
        SC_CRASHPOINT(resize_complete);
        if (!__atomic_compare_exchange_n(&t->control->successor, &none, word, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
            rc = SC_LOST; /* unlink() was faster */
        else
            t->lost = 1;
        SC_CRASHPOINT(resize_committed);
    }
    give_guards_back(r);
    r->result.pause_ns = (u64)(sc_clock_mono_ns() - begun);
    if (rc == SC_OK) {
        r->result.items = count_remembered(r);
        r->result.left_out = r->result.items > there ? r->result.items - there : 0;
    }
    return rc;
}
