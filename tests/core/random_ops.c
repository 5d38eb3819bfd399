/* random_ops.c - random operations on one segment against a model that is an array.
 *
 *   random_ops [--seed N] [--rounds N] [--ops N] [--only NAME] [--quiet]
 *
 * Every round draws a geometry, flags and a key population, runs the operations with a clock the test sets, and audits the
 * segment as it goes.  Under eviction=none every answer must be the model's; with eviction a stored item may be gone, but
 * what is returned is what was last set.  A failure prints seed, round and operation; the same seed replays it. */
#include "rig.h"
#include <stdlib.h>

typedef struct {
    int present, is_num;
    u64 version, deadline, soft;
    u32 vlen;
    i64 num;
    sc_token_t token; /* last token handed out, and the edition it belongs to */
    u64 edition, token_edition;
} model_t;

typedef struct {
    const char *name;
    u64 size, buckets, guards, max_value;
    u32 flags, guard_kind, keys, klen, vlen;
    u64 clean_period_ms;
} shape_t;

static const shape_t shapes[] = {
    {"small", 256 << 10, 0, 1, 0, 0, SC_GUARD_FAST, 300, 24, 300, 60000},
    {"crowded-index", 256 << 10, 16, 1, 0, 0, SC_GUARD_FAST, 200, 24, 40, 60000},
    {"page-pressure", 256 << 10, 64, 1, 0, 0, SC_GUARD_SEMAPHORE, 120, 24, 3000, 60000},
    {"big-values", 512 << 10, 64, 1, 0, 0, SC_GUARD_FAST, 24, 24, 0, 60000},
    {"long-keys", 2 << 20, 256, 1, 0, 0, SC_GUARD_FAST, 40, 65535, 2000, 60000},
    {"four-shards", 2 << 20, 512, 4, 0, 0, SC_GUARD_SEMAPHORE, 4000, 24, 200, 1000},
    {"none", 256 << 10, 64, 1, 0, SC_F_NO_EVICT, SC_GUARD_FAST, 150, 24, 1200, 60000},
    {"none-big", 512 << 10, 64, 1, 0, SC_F_NO_EVICT, SC_GUARD_FAST, 30, 24, 0, 60000},
    {"none-crowded", 256 << 10, 16, 1, 0, SC_F_NO_EVICT, SC_GUARD_FAST, 130, 24, 40, 60000},
    {"header", 256 << 10, 64, 1, 0, SC_F_HEADER_ONLY, SC_GUARD_FAST, 250, 64, 800, 60000},
    {"header-none", 256 << 10, 64, 1, 0, SC_F_HEADER_ONLY | SC_F_NO_EVICT, SC_GUARD_FAST, 120, 64, 1500, 60000},
    {"secure", 256 << 10, 64, 1, 0, SC_F_SECURE, SC_GUARD_FAST, 250, 64, 2000, 60000},
    {"secure-crowded", 256 << 10, 16, 1, 0, SC_F_SECURE, SC_GUARD_FAST, 250, 24, 300, 60000},
    {"secure-none", 512 << 10, 32, 1, 0, SC_F_SECURE | SC_F_NO_EVICT, SC_GUARD_SEMAPHORE, 100, 64, 3000, 60000},
    {"never-swept", 256 << 10, 64, 1, 0, 0, SC_GUARD_FAST, 300, 24, 500, 1},
};
/* eviction=none: free pages of which the biggest item needs its own to be moved, and pages that end half used, are what a
 * shard with items of a quarter of its size cannot give away. */
#define LEAST_LIVE 400u
#define N_SHAPES (sizeof shapes / sizeof shapes[0])

static struct {
    rig_t *rig;
    sc_table_t *t;
    const shape_t *shape;
    model_t *model;
    rig_rng_t rng;
    u64 now, version, edition, op;
    u8 *value, *key, *copy;
    u64 no_space, least_live, sets, hits, audits, evicted;
    int failed, quiet;
    char trail[64][48];
} w;

static void fail(const char *fmt, u64 id, u64 a, u64 b)
{
    w.failed = 1;
    fprintf(stderr, "%s: op %llu key %llu: ", w.shape->name, (unsigned long long)w.op, (unsigned long long)id);
    fprintf(stderr, fmt, (unsigned long long)a, (unsigned long long)b);
    fputc('\n', stderr);
    for (u64 i = w.op > 12 ? w.op - 12 : 0; i <= w.op; i++)
        RIG_PRINT("    %llu: %s", (unsigned long long)i, w.trail[i % 64]);
}
static void trail(const char *what, u64 id, u64 arg)
{
    snprintf(w.trail[w.op % 64], 48, "%s key %llu %llu", what, (unsigned long long)id, (unsigned long long)arg);
}
static int exact(void) { return (w.shape->flags & SC_F_NO_EVICT) != 0; }

static void key_of(u64 id, sc_key_t *k)
{
    u32 n = rig_key(w.key, id, w.shape->klen);
    sc_key_init(w.t, k, w.key, n);
}
/* Expired: absent for everything.  Soft-expired: absent for everything but reads with grace. */
static int live(const model_t *m)
{
    return m->present && (m->deadline == 0 || m->deadline > w.now) && (m->soft == 0 || m->soft > w.now);
}
static int readable(const model_t *m) { return m->present && (m->deadline == 0 || m->deadline > w.now); }

static u32 draw_len(void)
{
    u64 most = w.t->h.max_value;
    u32 top = w.shape->vlen ? w.shape->vlen : (u32)most;
    u32 r = rig_below(&w.rng, 16);
    if (r == 0)
        return 0;
    if (r == 1)
        return rig_below(&w.rng, 16);
    if (r == 2)
        return (u32)(most / 2 + rig_below(&w.rng, (u32)(most / 2) + 1));
    return rig_below(&w.rng, top + 1);
}
static u64 draw_deadline(void)
{
    switch (rig_below(&w.rng, 6)) {
    case 0: return w.now + 1 + rig_below(&w.rng, 2000);
    case 1: return w.now + 1 + rig_below(&w.rng, 400000);
    case 2: return w.now + 1 + rig_below(&w.rng, 200000000);
    default: return 0;
    }
}

/* Bytes of items the model holds: NoSpace is wrong while they are a small part of the shard. */
static u64 live_share(void)
{
    u64 sum = 0, all = ((u64)w.t->n_pages * w.t->n_shards) << w.t->page_shift;
    for (u32 i = 0; i < w.shape->keys; i++) {
        model_t *m = &w.model[i];
        if (readable(m))
            sum += sc_item_total(rig_key(w.copy, i, w.shape->klen), m->is_num ? 8 : m->vlen, m->soft ? 1 : 0,
                                 m->is_num ? SC_T_INT : SC_T_BYTES, w.t->check_len);
    }
    return sum * 1000 / all;
}
static void no_space(u64 id, u32 len)
{
    w.no_space++;
    if (!exact()) {
        fail("NoSpace for %llu bytes although eviction is on", id, len, 0);
        return;
    }
    u64 share = live_share() + (u64)len * 1000 / (((u64)w.t->n_pages * w.t->n_shards) << w.t->page_shift);
    if (w.shape->buckets > 16 && share < w.least_live)
        w.least_live = share;
    if (w.shape->buckets > 16 && share < LEAST_LIVE)
        fail("NoSpace with %llu of 1000 parts live or asked for; at least %llu wanted", id, share, LEAST_LIVE);
}

/* The model learns what eviction took: asked before an operation whose answer depends on presence. */
static void settle(u64 id, sc_key_t *k)
{
    model_t *m = &w.model[id];
    rig_found_t f;
    if (exact() || !m->present)
        return;
    if (rig_get(w.t, k, w.value, &f) != SC_HIT) {
        if (readable(m))
            w.evicted++;
        m->present = 0;
    }
}

static void check_read(u64 id, int rc, const rig_found_t *f)
{
    model_t *m = &w.model[id];
    if (rc == SC_HIT) {
        w.hits++;
        if (!readable(m))
            fail("a hit for an absent or expired key (deadline %llu, now %llu)", id, f->deadline, w.now);
        else if (m->is_num ? f->num != m->num || SC_TYPE(f->type) != SC_T_INT
                           : f->vlen != m->vlen || !rig_is(w.value, f->vlen, id, m->version))
            fail("value is not version %llu (length %llu)", id, m->version, f->vlen);
        else if (f->deadline != m->deadline)
            fail("deadline %llu, wanted %llu", id, f->deadline, m->deadline);
        else if (f->soft != m->soft)
            fail("soft deadline %llu, wanted %llu", id, f->soft, m->soft);
    } else if (rc != SC_MISS) {
        fail("read answers %llu", id, (u64)rc, 0);
    } else if (readable(m)) {
        if (exact())
            fail("lost: version %llu, length %llu", id, m->version, m->vlen);
        m->present = 0;
        w.evicted++;
    }
}

static void do_get(u64 id)
{
    sc_key_t k;
    rig_found_t f;
    key_of(id, &k);
    trail("get", id, 0);
    int rc = rig_get(w.t, &k, w.value, &f);
    check_read(id, rc, &f);
    if (rc == SC_HIT) {
        w.model[id].token = sc_token_of(w.t, &k, &f.raw, w.value);
        w.model[id].token_edition = w.model[id].edition;
    }
}

static void do_store(u64 id, enum sc_mode mode)
{
    static const char *names[] = {"set", "add", "replace", "cas", "same"};
    sc_key_t k;
    model_t *m = &w.model[id];
    key_of(id, &k);
    settle(id, &k);
    int is_num = rig_below(&w.rng, 10) == 0, was = live(m);
    u32 len = is_num ? 8 : draw_len();
    u64 version = ++w.version, deadline = draw_deadline(), soft = 0;
    if (deadline > w.now + 2 && rig_below(&w.rng, 4) == 0)
        soft = w.now + 1 + rig_below(&w.rng, (u32)(deadline - w.now - 1));
    i64 num = (i64)rig_next(&w.rng);
    trail(names[mode], id, len);
    rig_fill(w.value, len, id, version);
    sc_value_t v = {w.value, num, len, is_num ? SC_T_INT : SC_T_BYTES, deadline, soft};
    sc_cond_t c = {.mode = mode, .token = m->token};
    u64 steps = 0;
    int rc = sc_store(w.t, &k, &v, &c, RIG_WAIT), want = SC_OK;
    (void)steps;
    if (mode == SC_ADD && was)
        want = SC_EXISTS;
    else if (mode == SC_REPLACE && !was)
        want = SC_MISS;
    else if (mode == SC_CAS)
        want = !was ? SC_MISS : m->token_edition == m->edition ? SC_OK : SC_CHANGED;
    if (rc == SC_NO_SPACE && want == SC_OK) {
        no_space(id, len);
        return;
    }
    if (rc == SC_TOO_LARGE && (u64)k.len + len + 64 > ((u64)(w.t->n_pages - w.t->reserve) << w.t->page_shift) / 2)
        return;
    if (rc != want) {
        fail("store answers %llu, wanted %llu", id, (u64)rc, (u64)want);
        return;
    }
    if (rc != SC_OK)
        return;
    w.sets++;
    *m = (model_t){.present = 1, .is_num = is_num, .version = version, .deadline = deadline, .soft = soft, .vlen = len,
                   .num = num, .token = m->token, .edition = ++w.edition, .token_edition = m->token_edition};
    if (deadline != 0 && deadline <= w.now)
        m->present = 0;
    rig_found_t f;
    rc = rig_get(w.t, &k, w.copy, &f);
    if (readable(m) && rc != SC_HIT)
        fail("what was set a moment ago is a miss (answer %llu)", id, (u64)rc, 0);
}

/* append as the Python layer does it: read, then store if the very item still stands. */
static void do_append(u64 id)
{
    sc_key_t k;
    rig_found_t f;
    model_t *m = &w.model[id];
    key_of(id, &k);
    settle(id, &k);
    trail("append", id, 0);
    if (!live(m) || m->is_num || rig_get(w.t, &k, w.value, &f) != SC_HIT)
        return;
    u32 len = draw_len();
    u64 version = ++w.version;
    rig_fill(w.value, len, id, version);
    sc_value_t v = {w.value, 0, len, SC_T_BYTES, 0, 0};
    sc_cond_t c = {.mode = SC_IF_SAME, .same_entry = f.entry, .same_life = f.life, .keep_lifetime = 1};
    int rc = sc_store(w.t, &k, &v, &c, RIG_WAIT);
    if (rc == SC_NO_SPACE) {
        no_space(id, len);
        return;
    }
    if (rc == SC_TOO_LARGE)
        return;
    if (rc != SC_OK) {
        fail("append answers %llu", id, (u64)rc, 0);
        return;
    }
    m->version = version;
    m->vlen = len;
    m->edition = ++w.edition;
}

static void do_delete(u64 id)
{
    sc_key_t k;
    model_t *m = &w.model[id];
    key_of(id, &k);
    settle(id, &k);
    trail("delete", id, 0);
    i64 num = 0;
    int rc = sc_delete(w.t, &k, NULL, &num, RIG_WAIT), want = live(m) ? SC_OK : SC_MISS;
    if (rc != want)
        fail("delete answers %llu, wanted %llu", id, (u64)rc, (u64)want);
    else if (rc == SC_OK && m->is_num && num != m->num)
        fail("delete hands out %llu, wanted %llu", id, (u64)num, (u64)m->num);
    m->present = 0; /* a soft-expired item goes as well */
}

static void do_incr(u64 id)
{
    sc_key_t k;
    model_t *m = &w.model[id];
    key_of(id, &k);
    settle(id, &k);
    int create = rig_below(&w.rng, 2) == 0, was = live(m);
    i64 delta = (i64)rig_next(&w.rng) >> rig_below(&w.rng, 60), sum = 0, got = 0;
    u64 deadline = draw_deadline();
    trail("incr", id, (u64)delta);
    int rc = sc_incr(w.t, &k, delta, create, 0, deadline, &got, RIG_WAIT), want = SC_OK;
    if (was)
        want = !m->is_num ? SC_NOT_NUMBER : __builtin_add_overflow(m->num, delta, &sum) ? SC_OVERFLOW : SC_OK;
    else if (!create)
        want = SC_MISS;
    else
        sum = delta;
    if (rc == SC_NO_SPACE && want == SC_OK) {
        no_space(id, 8);
        return;
    }
    if (rc != want) {
        fail("incr answers %llu, wanted %llu", id, (u64)rc, (u64)want);
        return;
    }
    if (rc != SC_OK)
        return;
    if (got != sum)
        fail("incr gives %llu, wanted %llu", id, (u64)got, (u64)sum);
    if (!was)
        *m = (model_t){.present = 1, .is_num = 1, .deadline = deadline, .token = m->token, .token_edition = m->token_edition};
    m->num = sum;
    m->vlen = 8;
    if (!was || delta != 0)
        m->edition = ++w.edition;
}

static void do_touch(u64 id)
{
    sc_key_t k;
    model_t *m = &w.model[id];
    key_of(id, &k);
    settle(id, &k);
    u64 deadline = draw_deadline();
    trail("touch", id, deadline);
    int rc = sc_touch(w.t, &k, deadline, NULL, RIG_WAIT), want = !live(m) ? SC_MISS : m->soft ? SC_AGAIN : SC_OK;
    if (rc != want)
        fail("touch answers %llu, wanted %llu", id, (u64)rc, (u64)want);
    if (rc == SC_OK)
        m->deadline = deadline;
}

static void do_clear(void)
{
    trail("clear", 0, 0);
    for (u32 s = 0; s < w.t->n_shards; s++)
        if (sc_clear_shard(w.t, s, RIG_WAIT) != SC_OK)
            fail("clear of shard %llu refused", 0, s, 0);
    for (u32 i = 0; i < w.shape->keys; i++)
        w.model[i].present = 0;
}

static void do_clean(void)
{
    u64 cursor = 0, n = 0;
    trail("clean", 0, 0);
    if (rig_below(&w.rng, 2) == 0) {
        sc_tick(w.t);
        return;
    }
    if (sc_clean(w.t, UINT64_MAX, &cursor, &n, RIG_WAIT) != SC_OK)
        fail("clean stopped at bucket %llu after %llu", 0, cursor, n);
    if (w.shape->clean_period_ms > 1) /* nothing expired is left in the index */
        for (u32 s = 0; s < w.t->n_shards; s++)
            for (u32 b = 0; b < w.t->n_buckets; b++)
                for (u32 i = 0; i < SC_N_SLOTS; i++) {
                    u64 e = w.t->shard[s].buckets[b].entry[i];
                    sc_item_t it;
                    if (sc_entry_dead(w.t, &w.t->shard[s], e) ||
                        !sc_item_load(w.t, &w.t->shard[s], SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e), &it))
                        continue;
                    if (SC_W1_DEADLINE(it.w1) != 0 && SC_W1_DEADLINE(it.w1) <= w.now)
                        fail("clean left an item that expired at %llu, now %llu", 0, SC_W1_DEADLINE(it.w1), w.now);
                }
}

/* Everything stored is reachable by a walk, each key once. */
static void do_walk(void)
{
    static u64 entries[SC_GROUP * SC_N_SLOTS];
    static u32 where[SC_GROUP * SC_N_SLOTS];
    static u8 moves[SC_GROUP], keybuf[SC_MAX_KEY];
    u32 seen = 0, wanted = 0;
    trail("walk", 0, 0);
    for (u32 g = 0; g < sc_n_groups(w.t); g++) {
        u32 n = sc_group_entries(w.t, g, entries, where, moves);
        for (u32 i = 0; i < n; i++) {
            sc_seen_t s;
            int rc = sc_see(w.t, g, where[i], entries[i], &s, keybuf);
            if (rc == SC_HIT)
                seen++;
            else if (rc == SC_CHANGED)
                fail("walk: group %llu entry %llu cannot be an item", 0, g, i);
        }
    }
    for (u32 i = 0; i < w.shape->keys; i++) {
        sc_key_t k;
        key_of(i, &k);
        settle(i, &k);
        wanted += (u32)live(&w.model[i]);
    }
    if (seen != wanted)
        fail("walk: %llu items seen, wanted %llu", 0, seen, wanted);
}

static void audit(void)
{
    w.audits++;
    if (rig_audit(w.t, 0) != 0)
        fail("audit after %llu operations", 0, w.op, 0);
    if (rig_counts(w.t, 0) != 0)
        fail("page counts after %llu operations", 0, w.op, 0);
}

static void round_of(const shape_t *shape, u64 seed, u64 ops)
{
    rig_want_t want = {.size = shape->size, .buckets = shape->buckets, .guards = shape->guards, .max_value = shape->max_value,
                       .guard_kind = shape->guard_kind, .flags = shape->flags,
                       .clean_period_ms = shape->clean_period_ms, .seed = seed};
    w.rig = rig_new(&want);
    w.t = rig_handle(w.rig, 0);
    w.shape = shape;
    w.rng.x = seed * 2654435761u + 99;
    w.model = (model_t *)calloc(shape->keys, sizeof(model_t));
    w.value = (u8 *)malloc(w.t->h.max_value + 8);
    w.copy = (u8 *)malloc((w.t->h.max_value > SC_MAX_KEY ? w.t->h.max_value : SC_MAX_KEY) + 8);
    w.key = (u8 *)malloc(SC_MAX_KEY + 64);
    w.now = 1000;
    for (w.op = 0; w.op < ops && !w.failed; w.op++) {
        if (rig_below(&w.rng, 20) == 0)
            w.now += rig_below(&w.rng, rig_below(&w.rng, 10) == 0 ? 100000 : 500);
        w.t->clock.frozen_ms = (i64)w.now - 1; /* the clock counts from 1 */
        u32 id = rig_below(&w.rng, shape->keys);
        if (rig_below(&w.rng, 3) == 0)
            id /= 8; /* some keys are asked for more often */
        u32 r = rig_below(&w.rng, 1000);
        if (r < 330)
            do_get(id);
        else if (r < 640)
            do_store(id, SC_SET);
        else if (r < 680)
            do_store(id, SC_ADD);
        else if (r < 720)
            do_store(id, SC_REPLACE);
        else if (r < 770) {
            do_get(id);
            do_store(id, SC_CAS);
        } else if (r < 820)
            do_append(id);
        else if (r < 890)
            do_delete(id);
        else if (r < 950)
            do_incr(id);
        else if (r < 990)
            do_touch(id);
        else if (r < 996)
            do_clean();
        else if (r < 999)
            do_walk();
        else if (rig_below(&w.rng, 8) == 0)
            do_clear();
        if (w.op % 64 == 0)
            audit();
    }
    if (!w.failed) {
        audit();
        for (u32 i = 0; i < shape->keys && !w.failed; i++)
            do_get(i);
    }
    free(w.model);
    free(w.value);
    free(w.copy);
    free(w.key);
    rig_handle_free(w.t);
    rig_free(w.rig);
}

int main(int argc, char **argv)
{
    u64 seed = 1, rounds = 2, ops = 4000;
    const char *only = NULL;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--seed") && i + 1 < argc)
            seed = strtoull(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--rounds") && i + 1 < argc)
            rounds = strtoull(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--ops") && i + 1 < argc)
            ops = strtoull(argv[++i], NULL, 0);
        else if (!strcmp(argv[i], "--only") && i + 1 < argc)
            only = argv[++i];
        else if (!strcmp(argv[i], "--quiet"))
            w.quiet = 1;
        else {
            fprintf(stderr, "usage: random_ops [--seed N] [--rounds N] [--ops N] [--only NAME]\n");
            return 2;
        }
    }
    int bad = 0;

    for (size_t i = 0; i < N_SHAPES; i++) {
        if (only && strcmp(only, shapes[i].name) != 0)
            continue;
        w.least_live = 1000;
        w.no_space = w.sets = w.hits = w.audits = w.evicted = 0;
        for (u64 r = 0; r < rounds && !w.failed; r++) {
            round_of(&shapes[i], seed + r, ops);
            if (w.failed)
                fprintf(stderr, "replay: random_ops --only %s --seed %llu --rounds 1 --ops %llu\n", shapes[i].name,
                        (unsigned long long)(seed + r), (unsigned long long)ops);
        }
        if (!w.quiet || w.failed)
            printf("%-16s %s: %llu sets, %llu hits, %llu evicted, %llu NoSpace (at least %llu/1000 live), %llu audits\n",
                   shapes[i].name, w.failed ? "FAILED" : "ok", (unsigned long long)w.sets, (unsigned long long)w.hits,
                   (unsigned long long)w.evicted, (unsigned long long)w.no_space, (unsigned long long)w.least_live,
                   (unsigned long long)w.audits);
        fflush(stdout);
        bad |= w.failed;
        w.failed = 0;
    }
    return bad;
}
