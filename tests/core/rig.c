/* rig.c - see rig.h. */
#include "rig.h"
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/sem.h>
#include <unistd.h>


static int keeper_fd = -1;

static void need(int ok, const char *what)
{
    if (ok)
        return;
    fprintf(stderr, "rig: %s: %s\n", what, strerror(errno));
    exit(3);
}

/* A process that removes the sets it is told of once nobody holds the other end of its pipe. */
static void keeper_start(void)
{
    int fd[2];
    need(pipe(fd) == 0, "pipe");
    pid_t pid = fork();
    need(pid >= 0, "fork");
    if (pid == 0) {
        int id;
        int ids[4096];
        size_t n = 0;
        setsid();
        close(fd[1]);
        for (int i = 0; i < 3; i++) /* whoever reads our output must see its end */
            close(i);
        signal(SIGINT, SIG_IGN);
        signal(SIGTERM, SIG_IGN);
        while (read(fd[0], &id, sizeof id) == (ssize_t)sizeof id)
            if (n < 4096)
                ids[n++] = id;
        while (n > 0)
            (void)semctl(ids[--n], 0, IPC_RMID);
        _exit(0);
    }
    close(fd[0]);
    keeper_fd = fd[1];
}

static int new_set(u32 n_shards, u32 n_sems)
{
    if (keeper_fd < 0)
        keeper_start();
    int id = semget(IPC_PRIVATE, (int)n_sems, 0600);
    need(id >= 0, "semget");
    need(write(keeper_fd, &id, sizeof id) == (ssize_t)sizeof id, "keeper");
    need(sc_sem_set_guards(id, n_shards, n_sems) == 0, "semctl");
    return id;
}

rig_t *rig_new(const rig_want_t *want)
{
    char msg[256];
    rig_t *r = (rig_t *)calloc(1, sizeof *r);
    need(r != NULL, "calloc");
    sc_want_t plan = {want->size, want->buckets, want->item_size, want->guards, want->max_value, 32};
    const char *why = sc_plan(&plan, &r->h, msg, sizeof msg);
    if (why != NULL) {
        fprintf(stderr, "rig: %s\n", why);
        exit(3);
    }
    sc_header_t *h = &r->h;
    h->guard_kind = want->guard_kind;
    h->flags = want->flags | SC_F_UNDO_WORKS;
    h->clean_period_ms = want->clean_period_ms ? want->clean_period_ms : 600000;
    h->hash_key[0] = want->seed * 0x9E3779B97F4A7C15ull + 1;
    h->hash_key[1] = want->seed ^ 0xD1B54A32D192ED03ull;
    memcpy(h->uuid, h->hash_key, 16);
    h->form = SC_FORM_ANON;
    snprintf(h->name, sizeof h->name, "rig");
    r->size = h->size;
    r->base = (u8 *)mmap(NULL, r->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    need(r->base != MAP_FAILED, "mmap");
    sc_format(r->base, h);
    r->sem_id = new_set(h->n_shards, h->n_sems);
    return r;
}

rig_t *rig_twin(const rig_t *of)
{
    rig_t *r = (rig_t *)calloc(1, sizeof *r);
    need(r != NULL, "calloc");
    *r = *of;
    r->base = (u8 *)mmap(NULL, r->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    need(r->base != MAP_FAILED, "mmap");
    memcpy(r->base, of->base, r->size);
    r->sem_id = new_set(r->h.n_shards, r->h.n_sems);
    return r;
}

void rig_free(rig_t *r)
{
    if (r == NULL)
        return;
    (void)semctl(r->sem_id, 0, IPC_RMID);
    munmap(r->base, r->size);
    free(r);
}

void rig_mark_worker(sc_table_t *t)
{
    u32 me = t->proc->wipe->me;
    t->workers[SC_OWNER_SLOT(me)].generation = SC_OWNER_GEN(me);
}

sc_table_t *rig_handle(rig_t *r, u32 slot)
{
    sc_table_t *t = sc_table_new(r->base, &r->h, 0);
    need(t != NULL, "sc_table_new");
    t->sem_id = r->sem_id;
    t->next_look = INT64_MAX; /* there is no name to look at */
    t->proc = (sc_proc_t *)calloc(1, sizeof(sc_proc_t));
    need(t->proc != NULL, "calloc");
    t->proc->wipe = (sc_wipe_t *)calloc(1, sizeof(sc_wipe_t));
    need(t->proc->wipe != NULL, "calloc");
    t->proc->sem_id = r->sem_id;
    t->proc->n_shards = r->h.n_shards;
    t->proc->n_workers = r->h.n_workers;
    t->proc->wipe->me = SC_OWNER_MAKE(slot, 1);
    rig_mark_worker(t);
    rig_worker(r, slot, 1);
    return t;
}

void rig_handle_free(sc_table_t *t)
{
    if (t == NULL)
        return;
    free(t->proc->wipe);
    free(t->proc);
    free(t);
}

void rig_worker(rig_t *r, u32 slot, int alive)
{
    union sc_semun arg = {.val = alive};
    need(semctl(r->sem_id, SC_SEM_BEACON(r->h.n_shards, slot), SETVAL, arg) == 0, "semctl beacon");
}

void rig_guard_value(rig_t *r, int value)
{
    union sc_semun arg = {.val = value};
    for (u32 s = 0; s < r->h.n_shards; s++)
        need(semctl(r->sem_id, SC_SEM_GUARD(s), SETVAL, arg) == 0, "semctl guard");
}

u64 rig_next(rig_rng_t *g)
{
    u64 x = g->x ? g->x : 0x2545F4914F6CDD1Dull;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    g->x = x;
    return x * 0x2545F4914F6CDD1Dull;
}
u32 rig_below(rig_rng_t *g, u32 n) { return n == 0 ? 0 : (u32)((rig_next(g) >> 32) * n >> 32); }

static u64 mix(u64 a, u64 b)
{
    u64 x = a * 0x9E3779B97F4A7C15ull ^ (b + 0x632BE59BD9B4E019ull) * 0xD6E8FEB86659FD93ull;
    x ^= x >> 29;
    x *= 0xBF58476D1CE4E5B9ull;
    return x ^ x >> 32;
}

/* The first word is the version masked by the key, the rest a stream from both. */
void rig_fill(u8 *p, u32 len, u64 key, u64 version)
{
    for (u32 i = 0; i < len; i += 8) {
        u64 w = i == 0 ? version ^ mix(key, 1) : mix(key * 1000003u + version, i);
        u32 n = len - i < 8 ? len - i : 8;
        memcpy(p + i, &w, n);
    }
}
int rig_is(const u8 *p, u32 len, u64 key, u64 version)
{
    for (u32 i = 0; i < len; i += 8) {
        u64 w = i == 0 ? version ^ mix(key, 1) : mix(key * 1000003u + version, i);
        u32 n = len - i < 8 ? len - i : 8;
        if (memcmp(p + i, &w, n) != 0)
            return 0;
    }
    return 1;
}
u64 rig_version_of(const u8 *p, u32 len, u64 key)
{
    u64 w;
    if (len < 16)
        return 0;
    memcpy(&w, p, 8);
    w ^= mix(key, 1);
    return rig_is(p, len, key, w) ? w : 0;
}

u32 rig_key(u8 *buf, u64 id, u32 klen_most)
{
    u64 r = mix(id, 77);
    int n = snprintf((char *)buf, 24, "k%04llu", (unsigned long long)id);
    u32 len = (u32)n;
    if (klen_most > 40 && r % 8 == 0) /* an eighth of the keys is long */
        len = 24 + (u32)((r >> 8) % (klen_most - 24));
    else if (klen_most > 24)
        len = (u32)n + (u32)(r >> 8) % 16;
    for (u32 i = (u32)n; i < len; i++)
        buf[i] = (u8)('a' + (r + i) % 26);
    return len;
}

static void describe(rig_found_t *f)
{
    const sc_found_t *r = &f->raw;
    f->entry = r->entry;
    f->life = r->life;
    f->deadline = SC_W1_DEADLINE(r->it.w1);
    f->soft = r->it.soft;
    f->vlen = r->it.vlen;
    f->type = r->it.type;
    f->num = r->num;
}
int rig_get(sc_table_t *t, const sc_key_t *k, u8 *buf, rig_found_t *f)
{
    memset(f, 0, sizeof *f);
    for (;; f->again++) {
        int rc = sc_get_begin(t, k, &f->raw);
        if (rc != SC_HIT)
            return rc;
        rc = sc_get_finish(t, k, &f->raw, buf, 1);
        if (rc == SC_AGAIN)
            continue;
        describe(f);
        return rc;
    }
}
int rig_look(sc_table_t *t, const sc_key_t *k, rig_found_t *f)
{
    memset(f, 0, sizeof *f);
    int rc = sc_look(t, k, &f->raw);
    describe(f);
    return rc;
}

int rig_set(sc_table_t *t, const sc_key_t *k, const void *p, u32 len, u64 deadline, u64 soft, enum sc_mode mode)
{
    sc_value_t v = {p, 0, len, SC_T_BYTES, deadline, soft};
    sc_cond_t c = {.mode = mode};
    return sc_store(t, k, &v, &c, RIG_WAIT);
}
int rig_set_num(sc_table_t *t, const sc_key_t *k, i64 num, u64 deadline, enum sc_mode mode)
{
    sc_value_t v = {NULL, num, 8, SC_T_INT, deadline, 0};
    sc_cond_t c = {.mode = mode};
    return sc_store(t, k, &v, &c, RIG_WAIT);
}

static void print_finding(void *arg, const char *code, u32 shard, const char *text)
{
    int *n = (int *)arg;
    if ((*n)++ < 10)
        RIG_PRINT("    check: shard %u %s: %s", shard, code, text);
}
u64 rig_audit(sc_table_t *t, int quiet)
{
    int n = 0;
    return sc_check(t, quiet ? NULL : print_finding, &n);
}

int rig_counts(sc_table_t *t, int quiet)
{
    int bad = 0;
    for (u32 i = 0; i < t->n_shards; i++) {
        sc_shard_t *s = &t->shard[i];
        u32 n_free = 0, n[SC_N_LANES] = {0};
        for (u32 p = 0; p < t->n_pages; p++)
            if (sc_page_is_free(t, s, p))
                n_free++;
            else
                n[SC_LIFE_LANE(s->life[p])]++;
        if (n_free != s->soft->n_free)
            bad = 1;
        for (u32 lane = 0; lane < SC_N_LANES; lane++)
            if (n[lane] != s->soft->n_pages[lane])
                bad = 1;
        if (bad && !quiet)
            RIG_PRINT("    shard %u: free %u (hint %u), lanes %u/%u %u/%u %u/%u %u/%u %u/%u %u/%u (found/hint)", i, n_free,
                      s->soft->n_free, n[0], s->soft->n_pages[0], n[1], s->soft->n_pages[1], n[2], s->soft->n_pages[2], n[3],
                      s->soft->n_pages[3], n[4], s->soft->n_pages[4], n[5], s->soft->n_pages[5]);
    }
    return bad;
}
