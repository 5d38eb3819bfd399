/* drive.h - a segment on private memory for the drivers of this directory: fixed hash key, frozen clock, no neighbours.
 *
 * The semaphore set is removed right after the worker slot is claimed, so a killed driver leaves nothing behind; the fast
 * guard asks the kernel for it only when somebody waits, and nobody does. */
#ifndef SC_DRIVE_H
#define SC_DRIVE_H
#include "guard.h"
#include "heap.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/sem.h>

#define BIRTH_MS 1000u        /* the clock begins above 0, which means "never" in a deadline */
#define WAIT_NS 1000000000ll  /* nobody else takes a guard; a wait is a defect */

static inline void die(const char *what, const char *why)
{
    fprintf(stderr, "%s: %s\n", what, why);
    exit(2);
}

static inline u64 number(const char *s)
{
    char *end;
    errno = 0;
    u64 v = strtoull(s, &end, 10);
    if (errno != 0 || *end != 0 || end == s)
        die(s, "a decimal number wanted");
    return v;
}

static inline sc_table_t *open_table(u64 size, u64 item_size, u64 guards, u64 seed, u64 clean_ms, u32 flags)
{
    sc_want_t want = {size, 0, item_size, guards, 0, 0};
    sc_header_t h;
    char msg[400];
    int mismatch;
    memset(&h, 0, sizeof h);
    if (sc_plan(&want, &h, msg, sizeof msg) != NULL)
        die("plan", msg);
    h.guard_kind = SC_GUARD_FAST;
    h.flags = flags;
    h.clean_period_ms = clean_ms;
    h.hash_key[0] = 0x9E3779B97F4A7C15ull ^ seed;
    h.hash_key[1] = 0xC2B2AE3D27D4EB4Full + seed;
    h.form = SC_FORM_ANON;
    u8 *base = (u8 *)mmap(NULL, (size_t)h.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED)
        die("segment", strerror(errno));
    sc_format(base, &h);
    if (sc_header_check(base, h.size, &h, &mismatch, msg, sizeof msg) != NULL)
        die("header", msg);
    sc_table_t *t = sc_table_new(base, &h, 0);
    int id = semget(IPC_PRIVATE, (int)h.n_sems, IPC_CREAT | 0600), rc = SC_OK;
    if (t == NULL || id < 0)
        die("semaphores", strerror(errno));
    u32 me = 0;
    t->sem_id = id;
    t->proc = sc_proc_get(&h, id);
    if (t->proc != NULL && sc_sem_set_guards(id, h.n_shards, h.n_sems) == 0)
        me = sc_worker_claim(t, &rc);
    semctl(id, 0, IPC_RMID);
    if (me == 0)
        die("worker", "no slot");
    t->next_look = INT64_MAX;
    t->clock.frozen_ms = BIRTH_MS;
    return t;
}
#endif
