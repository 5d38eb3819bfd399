/* pause.c - a reader stopped at every instruction while its item is overwritten and its memory recycled (R7).
 *
 *   pause [--seed N] [--seconds N] [--stride N] [--mutation NAME] [--label TEXT]
 *
 * The read runs single-stepped; at one instruction (in half of the schedules at a second one, too) a writer does one of the
 * MUTATIONS below, then the reader goes on at full speed.  What it returns must be a version that was current at some moment
 * of the read; a miss is right only where the item was absent at some moment. */
#include "scene.h"
#include "trace.h"
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum mutation {
    M_OVERWRITE, M_RESIZE, M_RECYCLE, M_DELETE, M_DELETE_SET, M_CLEAR, M_SAME_PLACE, M_DISPLACE, M_IN_PLACE, M_COMPACT, N_MUTATIONS
};
static const char *const mutation_names[] = {"overwrite", "resize", "recycle", "delete", "delete-set", "clear", "same-place",
                                             "displace", "in-place", "compact"};

static struct {
    scene_t *c;
    sc_table_t *writer;
    rig_rng_t rng;
    enum mutation mutation;
    u64 at, again, n, version, schedules, misses, hits_new, hits_old, retries, bad;
    int absent, done;
    u8 *wbuf;
    u32 length_of[4096];
    char label[64];
} w;

static void key_of(const sc_table_t *t, u64 id, sc_key_t *k, u8 *buf) { sc_key_init(t, k, buf, rig_key(buf, id, 24)); }

static int set_target(u32 len)
{
    u8 buf[64];
    sc_key_t k;
    key_of(w.writer, w.c->target, &k, buf);
    if (w.c->before.is_num)
        return rig_set_num(w.writer, &k, (i64)++w.version, 0, SC_SET);
    w.version++;
    w.length_of[w.version] = len;
    rig_fill(w.wbuf, len, w.c->target, w.version);
    return rig_set(w.writer, &k, w.wbuf, len, 0, 0, SC_SET);
}

/* Sets other keys until every page has had a new life; notes when the target was evicted on the way. */
static void recycle(void)
{
    u8 buf[64];
    sc_key_t k;
    rig_found_t f;
    u64 seq = w.writer->shard[0].hard->seq + w.writer->n_pages + 8;
    for (u32 i = 0; i < 3000 && w.writer->shard[0].hard->seq < seq; i++) {
        u32 id = 700 + rig_below(&w.rng, 60), len = 300 + rig_below(&w.rng, 3000);
        key_of(w.writer, id, &k, buf);
        rig_fill(w.wbuf, len, id, i);
        (void)rig_set(w.writer, &k, w.wbuf, len, 0, 0, SC_SET);
    }
    key_of(w.writer, w.c->target, &k, buf);
    if (rig_look(w.writer, &k, &f) != SC_HIT)
        w.absent = 1;
}

/* The outcome of a long chain of events at once: the page was given back and has a new life, and the key's new item begins where
 * the old one began, so that the entry is the very word the reader holds. */
static void same_place(const sc_key_t *k)
{
    rig_found_t f;
    sc_table_t *t = w.writer;
    sc_shard_t *s = &t->shard[0];
    if (rig_look(t, k, &f) != SC_HIT || w.c->before.is_num || !sc_item_flat(t, &f.raw.it))
        return;
    const sc_item_t *it = &f.raw.it;
    u64 *entry = &s->buckets[f.raw.bucket].entry[f.raw.slot], e = *entry, life = SC_LIFE(SC_LIFE_LANE(f.life), ++s->hard->seq);
    u8 *at = sc_at(t, s, it->page, it->off);
    SC_ST_REL(entry, 0);
    SC_ST_REL(&s->life[it->page], life);
    w.version++;
    w.length_of[w.version] = it->vlen;
    rig_fill(at + it->voff, it->vlen, w.c->target, w.version);
    u64 hm = sc_header_mix(&t->secret, k->h, it->w0, it->soft);
    u32 place = sc_place_mix(&t->secret, life, it->page, it->off);
    if (t->check_len) {
        u32 check = sc_content_mix(&t->secret, hm, sc_value_hash(&t->secret, it->type, at + it->voff, it->vlen)) ^ place;
        memcpy(at + it->total - 4, &check, 4);
    } else {
        u64 w0 = SC_W0_PLAIN(it->w0) | (u64)(((u32)(hm >> 56) ^ place) & 0xFFu) << 56;
        memcpy(at, &w0, 8);
    }
    SC_ST_REL(entry, e);
}

static void mutate(void)
{
    u8 buf[64];
    sc_key_t k;
    rig_found_t f;
    u32 len = w.c->before.vlen;
    i64 num = 0;
    key_of(w.writer, w.c->target, &k, buf);
    switch (w.mutation) {
    case M_OVERWRITE: (void)set_target(len); break;
    case M_RESIZE: (void)set_target(len > 5000 ? 30 : len + 4000); break;
    case M_RECYCLE:
        (void)set_target(len);
        recycle();
        break;
    case M_DELETE: case M_DELETE_SET:
        (void)sc_delete(w.writer, &k, NULL, NULL, RIG_WAIT);
        w.absent = 1;
        recycle();
        if (w.mutation == M_DELETE_SET)
            (void)set_target(len);
        break;
    case M_CLEAR:
        (void)sc_clear_shard(w.writer, 0, RIG_WAIT);
        w.absent = 1;
        recycle();
        break;
    case M_SAME_PLACE: same_place(&k); break;
    case M_DISPLACE: { /* the entry to its other bucket and back, by hand: what displace() does, twice */
        sc_shard_t *s = &w.writer->shard[0];
        for (int turn = 0; turn < 2; turn++) {
            if (rig_look(w.writer, &k, &f) != SC_HIT)
                break;
            u32 to = f.raw.bucket == k.b1 ? sc_key_b2(w.writer, &k) : k.b1;
            sc_bucket_t *bf = &s->buckets[f.raw.bucket], *bt = &s->buckets[to];
            for (u32 i = 0; i < SC_N_SLOTS; i++)
                if (sc_entry_dead(w.writer, s, bt->entry[i])) {
                    SC_ST_REL(&bt->entry[i], f.entry);
                    SC_ST_REL(&bf->moves, (u8)(bf->moves + 1));
                    SC_ST_REL(&bt->moves, (u8)(bt->moves + 1));
                    SC_ST_REL(&bf->entry[f.raw.slot], 0);
                    break;
                }
            if (rig_below(&w.rng, 2))
                break;
        }
        break;
    }
    case M_IN_PLACE:
        if (w.c->before.is_num && sc_incr(w.writer, &k, 1, 0, 0, 0, &num, RIG_WAIT) == SC_OK)
            w.version = (u64)num;
        (void)sc_touch(w.writer, &k, 0, NULL, RIG_WAIT);
        break;
    default: {
        u64 cursor = 0, n = 0;
        recycle();
        (void)sc_clean(w.writer, UINT64_MAX, &cursor, &n, RIG_WAIT);
    }
    }
}

static void on_step(u64 rip, ucontext_t *ctx)
{
    (void)rip;
    if (++w.n == w.at || (w.n > w.at && w.n == w.again)) {
        mutate();
        w.done++;
    }
    if (w.n >= w.at && (w.again == 0 || w.n >= w.again))
        trace_stop(ctx);
}

/* One schedule; 0 = the read ended before the instruction was reached. */
static int schedule(u64 at)
{
    scene_t *c = w.c;
    u8 buf[64];
    sc_key_t k;
    rig_found_t f;
    scene_reset(c);
    rig_mark_worker(w.writer);
    key_of(c->t, c->target, &k, buf);
    w.version = c->before.is_num ? (u64)c->before.num : c->before.version;
    u64 first = w.version;
    if (!c->before.is_num)
        w.length_of[w.version] = c->before.vlen;
    w.absent = w.done = 0;
    w.n = 0;
    w.at = at;
    w.again = rig_below(&w.rng, 2) ? at + 1 + rig_below(&w.rng, 60) : 0;
    memset(&f, 0, sizeof f);
    trace_on();
    int rc = rig_get(c->t, &k, c->work, &f);
    trace_off();
    if (w.done == 0)
        return 0;
    w.schedules++;
    w.retries += f.again;
    const char *why = NULL;
    if (rc == SC_MISS) {
        w.misses++;
        if (!w.absent)
            why = "a miss of a key that was there all the time";
    } else if (rc != SC_HIT)
        why = "neither hit nor miss";
    else if (c->before.is_num) {
        if ((u64)f.num < first || (u64)f.num > w.version)
            why = "a number that never stood there";
    } else {
        u64 v = first;
        for (; v <= w.version; v++)
            if (f.vlen == w.length_of[v] && rig_is(c->work, f.vlen, c->target, v))
                break;
        if (v > w.version)
            why = "a value that was never set: torn or foreign";
        else if (v == first)
            w.hits_old++;
        else
            w.hits_new++;
    }
    if (why != NULL && w.bad++ < 5)
        printf("VIOLATION %s %s value %u flags %u, stopped at instruction %llu and %llu: %s\n", w.label,
               mutation_names[w.mutation], c->want.vlen, c->want.flags, (unsigned long long)w.at, (unsigned long long)w.again, why);
    return 1;
}

static u64 ms_now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (u64)ts.tv_sec * 1000 + (u64)ts.tv_nsec / 1000000;
}

int main(int argc, char **argv)
{
    static const u32 sizes[] = {12, 100, 700, 4100, 12000, 8};
    static const u32 forms[][2] = {{0, 64}, {SC_F_HEADER_ONLY, 64}, {SC_F_SECURE, 64}, {0, 16}};
    const char *only = NULL;
    u64 seed = 1, seconds = 0, stride = 1;
    if (getenv("GLIBC_TUNABLES") == NULL) {
        setenv("GLIBC_TUNABLES", "glibc.cpu.x86_rep_movsb_threshold=1073741824:glibc.cpu.x86_rep_stosb_threshold=1073741824", 1);
        execv("/proc/self/exe", argv);
    }
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--seed"))
            seed = strtoull(argv[i + 1], NULL, 0);
        else if (!strcmp(argv[i], "--seconds"))
            seconds = strtoull(argv[i + 1], NULL, 0);
        else if (!strcmp(argv[i], "--stride"))
            stride = strtoull(argv[i + 1], NULL, 0);
        else if (!strcmp(argv[i], "--mutation"))
            only = argv[i + 1];
        else if (!strcmp(argv[i], "--label"))
            snprintf(w.label, sizeof w.label, "%s", argv[i + 1]);
        else
            return fprintf(stderr, "usage: pause [--seed N] [--seconds N] [--stride N]\n"), 2;
    }
    u64 until = seconds ? ms_now() + seconds * 1000 : UINT64_MAX;
    w.rng.x = seed * 97 + 3;
    w.wbuf = (u8 *)malloc(1u << 18);
    if (w.wbuf == NULL)
        return 3;
    trace_hook = on_step;
    trace_init();
    int over = 0;
    for (u64 round = 0; !over && w.bad < 5; round++)
        for (u32 n = 0; n < 4 * 6 * 2 && !over && w.bad < 5; n++) {
            u32 pick = seconds ? rig_below(&w.rng, 48) : n, form = pick / 12, size = pick / 2 % 6;
            scene_want_t want = {size == 5 ? OP_INCR : OP_OVERWRITE, pick % 2 ? FILL_FULL : FILL_HALF, sizes[size], SC_GUARD_FAST,
                                 forms[form][0], forms[form][1], seed * 100 + round};
            w.c = scene_new(&want);
            w.writer = rig_handle(w.c->rig, 1);
            w.writer->clock.frozen_ms = SCENE_NOW;
            for (u32 m = 0; m < N_MUTATIONS && !over; m++) {
                w.mutation = (enum mutation)m;
                if (only && strcmp(only, mutation_names[m]) != 0)
                    continue;
                u64 step = seconds && !only ? 1 + rig_below(&w.rng, 40) : stride;
                for (u64 at = seconds && !only ? 1 + rig_below(&w.rng, 40) : 1; w.bad < 5 && schedule(at); at += step)
                    if (ms_now() > until) {
                        over = 1;
                        break;
                    }
            }
            rig_handle_free(w.writer);
            scene_free(w.c);
            if (seconds == 0 && n == 47)
                over = 1;
        }
    printf("pause%s%s: %llu schedules (%llu old, %llu new, %llu rightly missed), %llu violations\n", w.label[0] ? " " : "",
           w.label, (unsigned long long)w.schedules, (unsigned long long)w.hits_old, (unsigned long long)w.hits_new,
           (unsigned long long)w.misses, (unsigned long long)w.bad);
    return w.bad != 0;
}
