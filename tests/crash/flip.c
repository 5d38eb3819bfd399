/* flip.c - hostile and rotten segments: mutated images read, written and checked (R8).
 *
 *   flip [--seed N] [--from N] [--images N | --seconds N] [--label TEXT]        mutated images
 *   flip --live SECONDS [--seed N]                                              a mutator beside two readers and a writer
 *
 * An image is a sound segment with 1 to 8 places changed: bits, bytes, words, boundary values, words copied from elsewhere,
 * mostly where structure lies (lane ends, page lives, chains, index, item headers).  Nothing may crash, hang, or give a value
 * that was never set for its key.  Counted apart, because they change in place or are sound bytes of the same page life: a
 * counter's number, deadlines, superseded copies.  A crash or hang prints seed and image; `--from` replays it. */
#include "scene.h"
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define TRY 200000ll /* ns a forged guard owner may cost one operation */

static struct {
    scene_t *c;
    sc_table_t *t;
    rig_rng_t rng;
    volatile u64 image;
    u64 seed, reads, hits, superseded, numbers, busy, bad;
    u8 *buf, *keybuf;
    volatile int where;
    char label[64];
} w;

static void say(const char *what)
{
    char line[200];
    int n = snprintf(line, sizeof line, "VIOLATION %s %s at seed %llu image %llu, operation %d\n", w.label, what,
                     (unsigned long long)w.seed, (unsigned long long)w.image, w.where);
    if (write(1, line, (size_t)n) < 0)
        _exit(8);
}
static void on_signal(int sig)
{
    say(sig == SIGALRM ? "hang" : "crash");
    _exit(9);
}

static u64 any_word(const u8 *base, u64 size)
{
    u64 v;
    memcpy(&v, base + (rig_next(&w.rng) % (size / 8)) * 8, 8);
    return v;
}

/* Changes one place; the header page is left out, every handle has its own checked copy of it. */
static void mutate(const sc_table_t *t, u8 *base)
{
    const sc_shard_t *s = &t->shard[rig_below(&w.rng, t->n_shards)];
    u64 at, n = t->size - SC_HEADER_SIZE;
    switch (rig_below(&w.rng, 14)) {
    case 0: case 1: at = (u64)((u8 *)s->hard - base) + rig_below(&w.rng, sizeof(sc_hard_t)); break;
    case 2: case 3: at = (u64)((u8 *)s->life - base) + rig_below(&w.rng, t->n_pages * 8); break;
    case 4: case 5: at = (u64)((u8 *)s->next - base) + rig_below(&w.rng, t->n_pages * 4); break;
    case 6: at = (u64)((u8 *)s->buckets - base) + rig_below(&w.rng, t->n_buckets * 64); break;
    case 7: case 8: case 9: { /* an item that an entry points at: header, key, value, check */
        u64 e = s->buckets[rig_below(&w.rng, t->n_buckets)].entry[rig_below(&w.rng, SC_N_SLOTS)];
        if (e == 0 || !sc_place_ok(t, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e))) {
            at = (u64)((u8 *)s->buckets - base) + rig_below(&w.rng, t->n_buckets * 64);
            break;
        }
        at = (u64)(sc_at(t, s, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e)) - base) + rig_below(&w.rng, rig_below(&w.rng, 3) ? 16 : 200);
        break;
    }
    case 10: at = (u64)((u8 *)s->soft - base) + rig_below(&w.rng, sizeof(sc_soft_t)); break;
    case 11: at = (u64)((u8 *)s->guard - base) + rig_below(&w.rng, 12); break;
    case 12: at = SC_CONTROL_OFF + 64 + rig_below(&w.rng, 8192); break; /* sweep election, worker table */
    default: at = SC_HEADER_SIZE + 64 + rig_next(&w.rng) % (n - 64); break;
    }
    if (at >= t->size - 8)
        at = t->size - 8;
    static const u64 edges[] = {0, 1, 7, 8, 0xFF, 0xFFFF, 0x10000, 0xFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, ~0ull, 4096, 4095, 16};
    u64 v;
    switch (rig_below(&w.rng, 6)) {
    case 0: base[at] = (u8)(base[at] ^ (1u << rig_below(&w.rng, 8))); break;
    case 1: base[at] = (u8)rig_next(&w.rng); break;
    case 2: v = rig_next(&w.rng); memcpy(base + (at & ~7ull), &v, 8); break;
    case 3: v = edges[rig_below(&w.rng, 14)]; memcpy(base + (at & ~7ull), &v, 8); break;
    case 4: v = any_word(base, t->size); memcpy(base + (at & ~7ull), &v, 8); break;
    default: v = edges[rig_below(&w.rng, 14)]; memcpy(base + (at & ~3ull), &v, 4); break;
    }
}

/* Whether these bytes were ever set for the key by the scene or by this harness. */
static void judge(u64 id, const rig_found_t *f, const u8 *p)
{
    const scene_item_t *m = id < SCENE_ITEMS ? &w.c->item[id] : NULL;
    w.hits++;
    if (SC_TYPE(f->type) == SC_T_INT) {
        if (id >= SCENE_ITEMS || m->is_num || id == 0)
            w.numbers++;
        else if (w.bad++ < 5)
            say("a number for a key that never held one");
        return;
    }
    for (u64 v = 0; v <= 40 && f->type == SC_T_BYTES; v++)
        if (rig_is(p, f->vlen, id, v) && (f->vlen > 0 || id == 0 || id >= 600 || (m != NULL && m->vlen == 0))) {
            if (m != NULL && v != m->version)
                w.superseded++;
            return;
        }
    if (w.c->want.flags & SC_F_HEADER_ONLY)
        return; /* integrity=header promises 8 bits over header and key, nothing over the value */
    if (w.bad++ < 5) {
        say("a value that was never set for its key");
        fprintf(stderr, "    key %llu, length %u, type %u\n", (unsigned long long)id, f->vlen, f->type);
    }
}

static void key_of(const sc_table_t *t, u64 id, sc_key_t *k, u8 *buf) { sc_key_init(t, k, buf, rig_key(buf, id, 24)); }

static void read_one(sc_table_t *t, u64 id)
{
    u8 buf[64];
    sc_key_t k;
    rig_found_t f;
    key_of(t, id, &k, buf);
    w.reads++;
    if (rig_get(t, &k, w.buf, &f) == SC_HIT)
        judge(id, &f, w.buf);
}

static void walk(sc_table_t *t)
{
    static u64 entries[SC_GROUP * SC_N_SLOTS];
    static u32 where[SC_GROUP * SC_N_SLOTS];
    static u8 moves[SC_GROUP];
    u32 g = rig_below(&w.rng, sc_n_groups(t)), n = sc_group_entries(t, g, entries, where, moves);
    for (u32 i = 0; i < n; i++) {
        sc_seen_t s;
        (void)sc_see(t, g, where[i], entries[i], &s, w.keybuf);
    }
    (void)sc_group_moved(t, g, moves);
}

static void write_one(sc_table_t *t, u64 id)
{
    static const u32 sizes[] = {0, 10, 100, 900, 3000, 9000, 20000};
    u8 buf[64];
    sc_key_t k;
    i64 num;
    u64 owner = 0, fence, cursor = 0, n = 0;
    key_of(t, id, &k, buf);
    int outside = id >= 600; /* keys of the scene never get an empty value or a number */
    u32 len = sizes[outside ? rig_below(&w.rng, 7) : 1 + rig_below(&w.rng, 6)];
    sc_value_t v = {w.buf, 5, len, SC_T_BYTES, rig_below(&w.rng, 3) ? 0 : SCENE_NOW + 50000, 0};
    sc_cond_t c = {.mode = SC_SET};
    int rc = SC_OK;
    w.where = (int)(100 + rig_below(&w.rng, 12));
    switch (w.where - 100) {
    case 0: rc = sc_delete(t, &k, NULL, &num, TRY); break;
    case 1:
        if (outside)
            rc = sc_incr(t, &k, 3, 1, 0, 0, &num, TRY);
        break;
    case 2: rc = sc_touch(t, &k, SCENE_NOW + 777, NULL, TRY); break;
    case 3: rc = sc_clear_shard(t, k.shard, TRY); break;
    case 4: rc = sc_clean(t, UINT64_MAX, &cursor, &n, TRY); break;
    case 5: rc = sc_lease_take(t, id + 1, 1000, &owner, &fence, TRY); break;
    case 6: sc_tick(t); break;
    case 7: c.mode = SC_ADD; /* fall through */
    default:
        rig_fill(w.buf, len, id, 3 + rig_below(&w.rng, 30));
        rc = sc_store(t, &k, &v, &c, TRY);
    }
    w.busy += rc == SC_BUSY;
}

static void one_image(void)
{
    sc_table_t *t = w.t;
    u8 *base = w.c->rig->base;
    memcpy(base, w.c->image, w.c->rig->size);
    rig_mark_worker(t);
    t->lost = 0;
    t->next_clean = 0;
    for (u32 n = 1 + rig_below(&w.rng, 8); n > 0; n--)
        mutate(t, base);
    for (u32 turn = 0; turn < 3; turn++) {
        for (u32 i = 0; i < 8; i++) {
            w.where = 1;
            read_one(t, rig_below(&w.rng, 4) ? rig_below(&w.rng, w.c->n_items) : rig_below(&w.rng, 620));
        }
        if (turn == 2)
            break;
        write_one(t, rig_below(&w.rng, 2) ? rig_below(&w.rng, w.c->n_items) : 600 + rig_below(&w.rng, 20));
    }
    w.where = 2;
    if (w.image % 4 == 0)
        walk(t);
    w.where = 3;
    if (w.image % 16 == 0)
        (void)rig_audit(t, 1);
}

static u64 ms_now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (u64)ts.tv_sec * 1000 + (u64)ts.tv_nsec / 1000000;
}

static void images(u64 from, u64 count, u64 seconds)
{
    static const u32 flags[] = {0, 0, SC_F_NO_EVICT, SC_F_SECURE, SC_F_HEADER_ONLY, 0};
    u64 until = seconds ? ms_now() + seconds * 1000 : UINT64_MAX, batch = 2000;
    for (u64 first = from / batch * batch; first < from + count && ms_now() < until && w.bad < 5; first += batch) {
        u64 n = first / batch; /* a batch shares one sound segment; its seed is the batch's */
        scene_want_t want = {n % 3 ? OP_OVERWRITE : OP_INCR, n % 2 ? FILL_FULL : FILL_HALF, 700, n % 5 ? SC_GUARD_FAST : SC_GUARD_SEMAPHORE,
                             flags[n % 6], n % 4 ? 64 : 16, w.seed * 1000003u + n};
        w.c = scene_new(&want);
        w.t = rig_handle(w.c->rig, 1);
        w.t->clock.frozen_ms = SCENE_NOW;
        for (u64 i = first; i < first + batch && i < from + count && w.bad < 5; i++) {
            w.image = i;
            w.rng.x = (w.seed + 1) * 0x9E3779B97F4A7C15ull ^ (i + 1) * 0xD6E8FEB86659FD93ull;
            if (i % 256 == 0) {
                alarm(60);
                if (ms_now() > until) {
                    batch = i - first;
                    break;
                }
            }
            if (i >= from)
                one_image();
        }
        rig_handle_free(w.t);
        scene_free(w.c);
        if (first + batch >= from + count || ms_now() >= until || w.bad >= 5)
            w.image = first + batch < from + count ? first + batch : from + count;
    }
    alarm(0);
    printf("flip%s%s: %llu images, %llu reads, %llu hits, %llu superseded copies, %llu numbers, %llu guards not granted, %llu violations\n",
           w.label[0] ? " " : "", w.label, (unsigned long long)(w.image - from), (unsigned long long)w.reads,
           (unsigned long long)w.hits, (unsigned long long)w.superseded, (unsigned long long)w.numbers, (unsigned long long)w.busy,
           (unsigned long long)w.bad);
}

/* Readers, a writer and a mutator as processes over one segment. */
static void live(u64 seconds)
{
    scene_want_t want = {OP_OVERWRITE, FILL_HALF, 700, SC_GUARD_FAST, 0, 64, w.seed};
    u64 *beats = (u64 *)mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), rebuilt = 0;
    if (beats == MAP_FAILED)
        exit(3);
    w.c = scene_new(&want);
    pid_t pids[4];
    for (u32 i = 0; i < 4; i++) {
        pids[i] = fork();
        if (pids[i] == 0) {
            w.rng.x = w.seed * 77 + i + 1;
            w.t = rig_handle(w.c->rig, 1 + i);
            w.t->clock.frozen_ms = SCENE_NOW;
            for (u64 n = 1;; n++) {
                SC_ST(&beats[i * 8], n);
                SC_ST(&beats[i * 8 + 1], w.bad);
                w.image = n;
                if (i == 0) {
                    if (n % 512 == 0) { /* sound again, under the others' feet */
                        memcpy(w.c->rig->base + 4096, w.c->image + 4096, w.c->rig->size - 4096);
                        for (u32 s = 0; s < 5; s++)
                            w.t->workers[s].generation = 1;
                        SC_ST(&beats[2], beats[2] + 1);
                    }
                    mutate(w.t, w.c->rig->base);
                    usleep(20);
                } else if (i == 1) {
                    w.t->lost = 0;
                    write_one(w.t, rig_below(&w.rng, 620));
                } else if (n % 64 == 0) {
                    w.where = 2;
                    walk(w.t);
                    w.where = 3;
                    if (n % 4096 == 0)
                        (void)rig_audit(w.t, 1);
                } else {
                    w.where = 1;
                    read_one(w.t, rig_below(&w.rng, 620));
                }
            }
        }
    }
    u64 until = ms_now() + seconds * 1000, seen[4] = {0}, since[4];
    for (u32 i = 0; i < 4; i++)
        since[i] = ms_now();
    while (ms_now() < until && w.bad < 5) {
        usleep(50000);
        for (u32 i = 0; i < 4; i++) {
            int st;
            if (waitpid(pids[i], &st, WNOHANG) == pids[i]) {
                printf("VIOLATION live: process %u ended with status %x\n", i, (unsigned)st);
                w.bad += 5;
            }
            if (beats[i * 8] != seen[i]) {
                seen[i] = beats[i * 8];
                since[i] = ms_now();
            } else if (ms_now() - since[i] > 20000) {
                printf("VIOLATION live: process %u made no progress in 20 s\n", i);
                w.bad += 5;
            }
            if (i >= 2 && beats[i * 8 + 1] > 0)
                w.bad += beats[i * 8 + 1];
        }
    }
    rebuilt = beats[2];
    for (u32 i = 0; i < 4; i++) {
        kill(pids[i], SIGKILL);
        while (waitpid(pids[i], NULL, 0) < 0 && errno == EINTR)
            ;
    }
    printf("flip live: %llu mutations, %llu writes, %llu and %llu reads, %llu times made sound again, %llu violations\n",
           (unsigned long long)seen[0], (unsigned long long)seen[1], (unsigned long long)seen[2], (unsigned long long)seen[3],
           (unsigned long long)rebuilt, (unsigned long long)w.bad);
    scene_free(w.c);
    munmap(beats, 4096);
}

int main(int argc, char **argv)
{
    u64 from = 0, count = 200000, seconds = 0, live_for = 0;
    w.seed = 1;
    for (int i = 1; i + 1 < argc; i += 2) {
        u64 v = strtoull(argv[i + 1], NULL, 0);
        if (!strcmp(argv[i], "--seed"))
            w.seed = v;
        else if (!strcmp(argv[i], "--from"))
            from = v;
        else if (!strcmp(argv[i], "--images"))
            count = v;
        else if (!strcmp(argv[i], "--seconds"))
            seconds = v, count = UINT64_MAX / 2;
        else if (!strcmp(argv[i], "--live"))
            live_for = v;
        else if (!strcmp(argv[i], "--label"))
            snprintf(w.label, sizeof w.label, "%s", argv[i + 1]);
        else
            return fprintf(stderr, "usage: flip [--seed N] [--from N] [--images N | --seconds N] [--live SECONDS]\n"), 2;
    }
    w.buf = (u8 *)malloc(1u << 20);
    w.keybuf = (u8 *)malloc(SC_MAX_KEY + 8);
    if (w.buf == NULL || w.keybuf == NULL)
        return 3;
    signal(SIGALRM, on_signal);
#ifndef __SANITIZE_ADDRESS__
    signal(SIGSEGV, on_signal);
    signal(SIGBUS, on_signal);
    signal(SIGFPE, on_signal);
#endif
    if (live_for > 0)
        live(live_for);
    else
        images(from, count, seconds);
    return w.bad != 0;
}
