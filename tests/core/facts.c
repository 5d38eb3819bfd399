/* facts.c - what the core promises about geometry, guards, workers and leases, one fact a function, with real processes. */
#include "rig.h"
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/sem.h>
#include <sys/wait.h>
#include <unistd.h>

static int bad, facts;
#define FACT(x) (facts++, (x) ? (void)0 : (bad++, RIG_PRINT("%s:%d: not so: %s", __FILE__, __LINE__, #x)))

static rig_t *new_rig(u32 guard_kind)
{
    rig_want_t w = {.size = SC_MIN_SIZE, .guards = 1, .guard_kind = guard_kind, .seed = 42};
    return rig_new(&w);
}
/* A handle as the product makes it: slots are claimed with the kernel's help. */
static sc_table_t *attach(rig_t *r)
{
    sc_table_t *t = sc_table_new(r->base, &r->h, 0);
    if (t == NULL)
        exit(3);
    t->sem_id = r->sem_id;
    t->proc = sc_proc_get(&t->h, t->sem_id);
    t->next_look = INT64_MAX;
    return t;
}
static u32 *shared_words(void)
{
    void *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        exit(3);
    return (u32 *)p;
}
static void until(const u32 *word, u32 value)
{
    while (SC_LD_ACQ(word) != value)
        usleep(200);
}
static void reap(pid_t pid)
{
    int st;
    while (waitpid(pid, &st, 0) < 0 && errno == EINTR)
        ;
}

/* The sum of a value as it is defined, a byte at a time: what every form of sc_sum, wide or narrow, must give. */
static u64 plain_sum(const sc_secret_t *sec, const u8 *p, u32 n)
{
    u64 lane[2] = {0, 0};
    for (u32 at = 0;; at += 128) {
        u32 rest = n - at, sixteens = rest > 128 ? 8 : (rest - 1) / 16;
        for (u32 i = 0; i < sixteens + (rest <= 128); i++) {
            const u8 *q = i < sixteens ? p + at + 16 * i : p + n - 16;
            u32 word[4], key = i < sixteens ? i : 7;
            for (u32 w = 0; w < 4; w++)
                word[w] = ((u32)q[4 * w] | (u32)q[4 * w + 1] << 8 | (u32)q[4 * w + 2] << 16 | (u32)q[4 * w + 3] << 24) +
                          sec->sum[4 * key + w];
            lane[0] += (u64)word[0] * word[1];
            lane[1] += (u64)word[2] * word[3];
        }
        if (rest <= 128)
            break;
        lane[0] *= SC_SUM_STEP;
        lane[1] *= SC_SUM_STEP;
    }
    return sc_fold(lane[0] ^ sec->s[4], lane[1] ^ (u64)n ^ sec->s[2]);
}
/* The sum is the same however wide the registers, with a copy and without, and every bit of the value counts. */
static void sums(void)
{
    static u8 value[2100], copy[2100];
    sc_secret_t sec;
    u64 key[2] = {7, 9}, x = 1;
    u32 wrong = 0, missed = 0;
    sc_secret_init(&sec, key);
    for (u32 i = 0; i < sizeof value; i++)
        value[i] = (u8)((x = x * 6364136223846793005ull + 1442695040888963407ull) >> 56);
    for (u32 n = 33; n < sizeof value; n++) {
        u64 want = plain_sum(&sec, value, n);
        memset(copy, 0, sizeof copy);
        wrong += sc_sum(&sec, NULL, value, n) != want;
        wrong += sc_sum(&sec, copy, value, n) != want || memcmp(copy, value, n) != 0 || (n < sizeof copy && copy[n] != 0);
        value[n * 7 % (n - 1)] ^= (u8)(1u << (n & 7));
        missed += sc_sum(&sec, NULL, value, n) == want;
    }
    for (u32 n = 40; n <= 1300; n += 630)
        for (u32 bit = 0; bit < 8 * n; bit++) {
            u64 want = sc_sum(&sec, NULL, value, n);
            value[bit / 8] ^= (u8)(1u << (bit & 7));
            missed += (u32)sc_sum(&sec, NULL, value, n) == (u32)want;
            value[bit / 8] ^= (u8)(1u << (bit & 7));
        }
    FACT(wrong == 0);
    FACT(missed == 0);
}

/* A header with any bit changed is refused; the name's last byte is never looked at, it counts as NUL. */
static void header_flips(void)
{
    rig_t *r = new_rig(SC_GUARD_FAST);
    sc_header_t out;
    char msg[256];
    int mismatch, n = 0;
    FACT(sc_header_check(r->base, r->size, &out, &mismatch, msg, sizeof msg) == NULL);
    for (u32 i = 0; i < offsetof(sc_header_t, reserved); i++) {
        if (i == offsetof(sc_header_t, name) + sizeof out.name - 1)
            continue;
        for (u32 bit = 0; bit < 8; bit++) {
            r->base[i] = (u8)(r->base[i] ^ (1u << bit));
            n += sc_header_check(r->base, r->size, &out, &mismatch, msg, sizeof msg) == NULL;
            r->base[i] = (u8)(r->base[i] ^ (1u << bit));
        }
    }
    FACT(n == 0);
    FACT(sc_header_check(r->base, 100, &out, &mismatch, msg, sizeof msg) != NULL);
    FACT(sc_header_check(r->base, r->size - 4096, &out, &mismatch, msg, sizeof msg) != NULL);
    rig_free(r);
}

/* Every geometry the planner agrees to formats, passes the header check and stores an item of max_value. */
static void geometries(void)
{
    rig_rng_t g = {7};
    int made = 0;
    for (int i = 0; i < 300; i++) {
        sc_want_t w = {.size = SC_MIN_SIZE + rig_below(&g, 8 << 20), .buckets = rig_below(&g, 3) ? 0 : rig_below(&g, 20000),
                       .item_size = rig_below(&g, 3) ? 0 : rig_below(&g, 5000), .guards = 1u << rig_below(&g, 6),
                       .workers = rig_below(&g, 2) ? 0 : rig_below(&g, 4096)};
        sc_header_t h, out;
        char msg[256];
        int mismatch;
        memset(&h, 0, sizeof h);
        h.guard_kind = SC_GUARD_FAST;
        if (sc_plan(&w, &h, msg, sizeof msg) != NULL)
            continue;
        made++;
        u8 *base = (u8 *)mmap(NULL, h.size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        sc_format(base, &h);
        const char *why = sc_header_check(base, h.size, &out, &mismatch, msg, sizeof msg);
        if (why != NULL)
            RIG_PRINT("%s", why);
        FACT(why == NULL);
        munmap(base, h.size);
    }
    FACT(made > 50);
}

/* As many workers as there are slots; the next is told, and a slot freed by a death is used again. */
static void worker_slots(void)
{
    rig_t *r = new_rig(SC_GUARD_FAST);
    u32 n = r->h.n_workers, *words = shared_words();
    pid_t *pids = (pid_t *)calloc(n, sizeof *pids);
    for (u32 i = 0; i < n; i++) {
        pids[i] = fork();
        if (pids[i] == 0) {
            int rc = 0;
            sc_table_t *t = attach(r);
            u32 me = sc_worker_claim(t, &rc);
            SC_ST_REL(&words[i], me ? me : 1u);
            for (;;)
                pause();
        }
    }
    u32 twice = 0;
    for (u32 i = 0; i < n; i++) {
        while (SC_LD_ACQ(&words[i]) == 0)
            usleep(200);
        FACT(words[i] != 1u);
        for (u32 j = 0; j < i; j++)
            twice += words[i] == words[j];
    }
    FACT(twice == 0);
    sc_table_t *t = attach(r);
    int rc = 0;
    FACT(sc_worker_claim(t, &rc) == 0 && rc == SC_WORKERS);
    kill(pids[3], SIGKILL);
    reap(pids[3]);
    u32 me = sc_worker_claim(t, &rc);
    FACT(me != 0 && SC_OWNER_SLOT(me) == SC_OWNER_SLOT(words[3]) && SC_OWNER_GEN(me) == SC_OWNER_GEN(words[3]) + 1);
    for (u32 i = 0; i < n; i++)
        if (i != 3) {
            kill(pids[i], SIGKILL);
            reap(pids[i]);
        }
    for (u32 i = 0; i < n; i++)
        FACT(sc_beacon_value(t, i) == (i == SC_OWNER_SLOT(me) ? 1 : 0));
    sc_table_free(t);
    FACT(semctl(r->sem_id, SC_SEM_BEACON(r->h.n_shards, SC_OWNER_SLOT(me)), GETVAL) == 0);
    free(pids);
    munmap(words, 4096);
    rig_free(r);
}

/* A holder killed inside is taken over from; one that is stopped is not; a child owns nothing of its parent's. */
static void guards(u32 kind)
{
    rig_t *r = new_rig(kind);
    u32 *words = shared_words();
    for (int round = 0; round < 20; round++) {
        SC_ST(&words[0], 0);
        pid_t pid = fork();
        if (pid == 0) {
            sc_table_t *t = attach(r);
            if (sc_enter(t, 0, RIG_WAIT) == SC_OK)
                SC_ST_REL(&words[0], 1u);
            for (;;)
                pause();
        }
        until(&words[0], 1u);
        sc_table_t *t = attach(r);
        u64 before = t->shard[0].soft->stat[SC_SS_RECOVERIES];
        kill(pid, SIGSTOP);
        FACT(sc_enter(t, 0, 3000000) == SC_BUSY);
        kill(pid, SIGKILL);
        FACT(sc_enter(t, 0, RIG_WAIT) == SC_OK);
        FACT(t->shard[0].soft->stat[SC_SS_RECOVERIES] == before + 1);
        sc_leave(t, 0);
        reap(pid);
        FACT(sc_enter(t, 0, 0) == SC_OK);
        pid_t child = fork();
        if (child == 0) { /* G4: the parent is inside; leaving and closing here changes nothing for it */
            sc_table_t *mine = attach(r);
            int busy = sc_enter(mine, 0, 3000000) == SC_BUSY && sc_enter(t, 0, 3000000) == SC_BUSY;
            sc_table_free(mine);
            sc_table_free(t);
            _exit(busy ? 0 : 1);
        }
        int st = 0;
        while (waitpid(child, &st, 0) < 0 && errno == EINTR)
            ;
        FACT(WIFEXITED(st) && WEXITSTATUS(st) == 0);
        pid = fork();
        if (pid == 0) {
            sc_table_t *mine = attach(r);
            _exit(sc_enter(mine, 0, 3000000) == SC_BUSY ? 0 : 1);
        }
        while (waitpid(pid, &st, 0) < 0 && errno == EINTR)
            ;
        FACT(WIFEXITED(st) && WEXITSTATUS(st) == 0); /* still held by the parent */
        sc_leave(t, 0);
        sc_table_free(t);
    }
    FACT(semctl(r->sem_id, SC_SEM_GUARD(0), GETVAL) == 1);
    munmap(words, 4096);
    rig_free(r);
}

/* G1: an owner word of an earlier life of a slot is dead even while the slot is held again. */
static void generations(u32 kind)
{
    rig_t *r = new_rig(kind);
    u32 *words = shared_words();
    pid_t pid = fork();
    if (pid == 0) {
        sc_table_t *t = attach(r);
        SC_ST_REL(&words[0], sc_enter(t, 0, RIG_WAIT) == SC_OK ? 1u : 2u);
        for (;;)
            pause();
    }
    while (SC_LD_ACQ(&words[0]) == 0)
        usleep(200);
    kill(pid, SIGKILL);
    reap(pid);
    pid = fork();
    if (pid == 0) { /* the same slot again, held and idle */
        int rc = 0;
        sc_table_t *t = attach(r);
        SC_ST_REL(&words[1], sc_worker_claim(t, &rc));
        for (;;)
            pause();
    }
    while (SC_LD_ACQ(&words[1]) == 0)
        usleep(200);
    FACT(SC_OWNER_SLOT(words[1]) == 0 && SC_OWNER_GEN(words[1]) == 2);
    sc_table_t *t = attach(r);
    FACT(sc_enter(t, 0, RIG_WAIT) == SC_OK && t->shard[0].soft->stat[SC_SS_RECOVERIES] == 1);
    sc_leave(t, 0);
    kill(pid, SIGKILL);
    reap(pid);
    sc_table_free(t);
    munmap(words, 4096);
    rig_free(r);
}

/* A worker that comes and goes leaves every semaphore as it was: undo stands on both operations or on none (G3). */
static void undo(u32 kind)
{
    rig_t *r = new_rig(kind);
    for (int i = 0; i < 20; i++) {
        pid_t pid = fork();
        if (pid == 0) {
            sc_table_t *t = attach(r);
            for (int n = 0; n <= i; n++)
                if (sc_enter(t, 0, RIG_WAIT) == SC_OK)
                    sc_leave(t, 0);
            _exit(0);
        }
        reap(pid);
        FACT(semctl(r->sem_id, SC_SEM_GUARD(0), GETVAL) == 1);
        FACT(semctl(r->sem_id, SC_SEM_BEACON(1, 0), GETVAL) == 0);
    }
    rig_free(r);
}

/* Leases: one holder; freed by release, deadline and death; the owner word decides; a full probe row says so. */
static void leases(u32 kind)
{
    rig_t *r = new_rig(kind);
    u32 *words = shared_words();
    sc_table_t *t = attach(r);
    u64 owner = 0, other = 0, fence = 0, fence2 = 0;
    t->clock.frozen_ms = 1000;
    FACT(sc_lease_take(t, 7, 500, &owner, &fence, RIG_WAIT) == SC_OK);
    FACT(sc_lease_take(t, 7, 500, &other, &fence2, RIG_WAIT) == SC_EXISTS);
    FACT(sc_lease_release(t, 7, owner + 1, RIG_WAIT) == SC_MISS);
    t->clock.frozen_ms = 1499;
    FACT(sc_lease_extend(t, 7, owner, 500, RIG_WAIT) == SC_OK);
    t->clock.frozen_ms = 1999;
    FACT(sc_lease_take(t, 7, 500, &other, &fence2, RIG_WAIT) == SC_OK && fence2 > fence);
    FACT(sc_lease_release(t, 7, owner, RIG_WAIT) == SC_MISS);
    FACT(sc_lease_extend(t, 7, owner, 500, RIG_WAIT) == SC_MISS);
    FACT(sc_lease_release(t, 7, other, RIG_WAIT) == SC_OK);
    pid_t pid = fork();
    if (pid == 0) {
        sc_table_t *mine = attach(r);
        mine->clock.frozen_ms = 2000;
        SC_ST_REL(&words[0], sc_lease_take(mine, 8, 1000000, &owner, &fence, RIG_WAIT) == SC_OK ? 1u : 2u);
        for (;;)
            pause();
    }
    while (SC_LD_ACQ(&words[0]) == 0)
        usleep(200);
    FACT(words[0] == 1u);
    FACT(sc_lease_take(t, 8, 500, &other, &fence2, RIG_WAIT) == SC_EXISTS);
    kill(pid, SIGKILL);
    reap(pid);
    FACT(sc_lease_take(t, 8, 500, &other, &fence2, RIG_WAIT) == SC_OK);
    FACT(sc_lease_release(t, 8, other, RIG_WAIT) == SC_OK);
    for (u64 i = 0; i < SC_LEASE_PROBES; i++) /* the same row: hashes that differ above the table's size */
        FACT(sc_lease_take(t, 3 + (i << 20), 500, &other, &fence2, RIG_WAIT) == SC_OK);
    FACT(sc_lease_take(t, 3 + (99ull << 20), 500, &other, &fence2, RIG_WAIT) == SC_LEASES_FULL);
    sc_table_free(t);
    munmap(words, 4096);
    rig_free(r);
}

/* unlink() is seen by the next write of every handle; reads go on. */
static void removal(void)
{
    rig_t *r = new_rig(SC_GUARD_SEMAPHORE);
    sc_table_t *t = attach(r);
    sc_key_t k;
    rig_found_t f;
    u8 buf[64];
    sc_key_init(t, &k, "key", 3);
    FACT(rig_set(t, &k, "value", 5, 0, 0, SC_SET) == SC_OK);
    SC_ST(&t->control->successor, SC_SUCCESSOR_REMOVED);
    FACT(rig_set(t, &k, "other", 5, 0, 0, SC_SET) == SC_LOST);
    FACT(rig_get(t, &k, buf, &f) == SC_HIT && f.vlen == 5 && memcmp(buf, "value", 5) == 0);
    SC_ST(&t->control->successor, 0);
    t->lost = 0;
    FACT(semctl(r->sem_id, 0, IPC_RMID) == 0);
    FACT(rig_set(t, &k, "other", 5, 0, 0, SC_SET) == SC_LOST && t->lost);
    FACT(rig_get(t, &k, buf, &f) == SC_HIT);
    sc_table_free(t);
    rig_free(r);
}

/* secure_delete: bytes of what was overwritten, deleted, moved or cleared are not in the segment any more. */
static void secure(void)
{
    rig_want_t w = {.size = SC_MIN_SIZE, .buckets = 16, .guards = 1, .guard_kind = SC_GUARD_FAST, .flags = SC_F_SECURE, .seed = 3};
    rig_t *r = rig_new(&w);
    sc_table_t *t = rig_handle(r, 0);
    u8 key[64], value[400];
    sc_key_t k;
    for (u64 i = 0; i < 3000; i++) {
        u32 n = rig_key(key, i % 180, 24);
        sc_key_init(t, &k, key, n);
        memset(value, 0, sizeof value);
        memcpy(value, "SECRET", 6);
        memcpy(value + 6, &i, 8);
        FACT(rig_set(t, &k, value, 16 + (u32)(i % 380), 0, 0, SC_SET) == SC_OK);
        if (i % 7 == 0)
            (void)sc_delete(t, &k, NULL, NULL, RIG_WAIT);
    }
    u32 stored = 0, found = 0;
    u64 cursor = 0, n = 0;
    (void)sc_clean(t, UINT64_MAX, &cursor, &n, RIG_WAIT);
    for (u32 b = 0; b < t->n_buckets; b++)
        for (u32 i = 0; i < SC_N_SLOTS; i++)
            stored += !sc_entry_dead(t, &t->shard[0], t->shard[0].buckets[b].entry[i]);
    for (u64 at = 0; at + 6 <= r->size; at++)
        found += memcmp(r->base + at, "SECRET", 6) == 0;
    FACT(found == stored);
    FACT(sc_clear_shard(t, 0, RIG_WAIT) == SC_OK);
    found = 0;
    for (u64 at = 0; at + 6 <= r->size; at++)
        found += memcmp(r->base + at, "SECRET", 6) == 0;
    FACT(found == 0);
    rig_handle_free(t);
    rig_free(r);
}

int main(void)
{
    alarm(240);
    sums();
    header_flips();
    geometries();
    worker_slots();
    guards(SC_GUARD_FAST);
    guards(SC_GUARD_SEMAPHORE);
    generations(SC_GUARD_FAST);
    generations(SC_GUARD_SEMAPHORE);
    undo(SC_GUARD_FAST);
    undo(SC_GUARD_SEMAPHORE);
    leases(SC_GUARD_FAST);
    leases(SC_GUARD_SEMAPHORE);
    removal();
    secure();
    printf("facts: %d looked at, %d not so\n", facts, bad);
    return bad != 0;
}
