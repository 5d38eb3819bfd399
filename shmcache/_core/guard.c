/* guard.c - worker slots and the two kinds of guard.
 *
 * Liveness is the kernel's word: a worker holds the beacon semaphore of its slot with SEM_UNDO, so the kernel lowers it
 * when the process ends, whatever ended it.  Never a pid (reuse, zombies, namespaces), never a timeout (SIGSTOP, swap).
 *
 *   G1  A slot is used only after its beacon is won and its generation raised, in that order: an owner word with an older
 *       generation is dead even if its slot lives again.
 *   G2  owner / dirty stay set until recovery is complete: a repairer killed at it is repaired by the next.
 *   G3  SEM_UNDO on both operations of a semaphore, or on none.
 *   G4  A child never releases what its parent took: slots, guards and leases are compared with the slot of this very
 *       process, which a fork forgets.
 *   G5  At most one guard is held by a thread at a time, and nothing of Python is called meanwhile. */
#include "guard.h"
#include "heap.h"
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <stdio.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif

#define SPIN 200          /* pauses before a futex wait: about one critical section (200 to 500 ns) and a half */
#define WAIT_FIRST 50000  /* ns; the first look whether the owner is dead: longer than any section of an owner that runs,
                             short against the 1 ms a death would cost otherwise; each later step is twice the one before */
#define WAIT_STEP 1000000 /* ns, the longest step; a waker killed between unlock and wake costs its waiters this much */
#define SEM_STEP 50000000

int sc_futex_wait(u32 *word, u32 seen, i64 ns)
{
    struct timespec ts = {ns / 1000000000, ns % 1000000000};
    return (int)syscall(SYS_futex, word, FUTEX_WAIT, seen, &ts, NULL, 0);
}
void sc_futex_wake(u32 *word, int n) { (void)syscall(SYS_futex, word, FUTEX_WAKE, n, NULL, NULL, 0); }

/* ---- the processes of this image ---------------------------------------------------------------------------------- */

static sc_proc_t *proc_list; /* the only process global; shared by all interpreters and handles */
static u32 *proc_list_lock;  /* on a page of its own that fork empties */

static void *wipe_page(int *advised)
{
    void *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    *advised = madvise(p, 4096, MADV_WIPEONFORK) == 0;
    return p;
}
static void wipe_after_fork(void)
{
    if (proc_list_lock)
        *proc_list_lock = 0;
    for (sc_proc_t *p = proc_list; p != NULL; p = p->next)
        memset(p->wipe, 0, sizeof *p->wipe);
}

static void spin_lock(u32 *w)
{
    while (__atomic_exchange_n(w, 1u, __ATOMIC_ACQUIRE) != 0)
        sched_yield();
}
static void spin_unlock(u32 *w) { SC_ST_REL(w, 0); }

static int list_lock(void)
{
    u32 *w = __atomic_load_n(&proc_list_lock, __ATOMIC_ACQUIRE);
    if (w == NULL) {
        int advised = 0;
        u32 *fresh = (u32 *)wipe_page(&advised), *none = NULL;
        if (fresh == NULL)
            return 0;
        if (!__atomic_compare_exchange_n(&proc_list_lock, &none, fresh, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
            munmap(fresh, 4096);
        else if (!advised)
            pthread_atfork(NULL, NULL, wipe_after_fork);
        w = __atomic_load_n(&proc_list_lock, __ATOMIC_ACQUIRE);
    }
    spin_lock(w);
    return 1;
}

/* execve keeps semadj: what an earlier image of this process took and never gave back is given back here.  A guard is
 * posted with its dirty word left as it is, so that its next owner recovers; a beacon is lowered, which makes the old
 * image's fast guards dead. */
static void give_back_leftovers(const sc_header_t *h, int sem_id)
{
    u32 n = h->n_sems;
    union sc_semun arg;
    arg.array = (unsigned short *)calloc(n, sizeof(unsigned short));
    if (arg.array == NULL)
        return;
    if (semctl(sem_id, 0, GETALL, arg) == 0) {
        pid_t self = getpid();
        for (u32 i = 1; i < n; i++) {
            int guard = i <= h->n_shards;
            if (arg.array[i] != (guard ? 0 : 1) || semctl(sem_id, (int)i, GETPID) != self)
                continue;
            (void)sc_sem_op(sem_id, (int)i, guard ? 1 : -1, SEM_UNDO | IPC_NOWAIT, 0);
        }
    }
    free(arg.array);
}

sc_proc_t *sc_proc_get(const sc_header_t *h, int sem_id)
{
    sc_proc_t *p;
    if (!list_lock())
        return NULL;
    for (p = proc_list; p != NULL; p = p->next)
        if (p->sem_id == sem_id && memcmp(p->uuid, h->uuid, 16) == 0)
            break;
    if (p == NULL)
        for (p = proc_list; p != NULL; p = p->next) /* records are reused, never freed: a fork may see the list */
            if (p->refs == 0)
                break;
    if (p == NULL) {
        int advised = 0;
        p = (sc_proc_t *)calloc(1, sizeof *p);
        if (p != NULL && (p->wipe = (sc_wipe_t *)wipe_page(&advised)) == NULL) {
            free(p);
            p = NULL;
        }
        if (p != NULL) {
            p->next = proc_list;
            SC_ST_REL(&proc_list, p);
        }
    }
    if (p != NULL && p->refs++ == 0) {
        memcpy(p->uuid, h->uuid, 16);
        p->sem_id = sem_id;
        p->n_shards = h->n_shards;
        p->n_workers = h->n_workers;
        p->lost = 0;
        memset(p->wipe, 0, sizeof *p->wipe);
        give_back_leftovers(h, sem_id);
    }
    spin_unlock(proc_list_lock);
    return p;
}

void sc_proc_put(sc_proc_t *p)
{
    if (p == NULL || !list_lock())
        return;
    if (--p->refs == 0) {
        u32 me = SC_LD(&p->wipe->me);
        SC_ST(&p->wipe->me, 0);
        if (me != 0) /* this very process claimed it (G4) */
            (void)sc_sem_op(p->sem_id, SC_SEM_BEACON(p->n_shards, SC_OWNER_SLOT(me)), -1, SEM_UNDO | IPC_NOWAIT, 0);
        p->sem_id = -1;
    }
    spin_unlock(proc_list_lock);
}

static u64 start_time_of_self(void)
{
    char buf[1024];
    FILE *f = fopen("/proc/self/stat", "re");
    if (f == NULL)
        return 0;
    size_t n = fread(buf, 1, sizeof buf - 1, f);
    fclose(f);
    buf[n] = 0;
    char *p = strrchr(buf, ')');
    unsigned long long ticks = 0;
    if (p == NULL || sscanf(p + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
                            &ticks) != 1)
        return 0;
    return ticks;
}

static int sem_error(sc_table_t *t, int err)
{
    t->sys_errno = err;
    if (err == EIDRM || err == EINVAL) {
        t->lost = 1;
        return SC_LOST;
    }
    return err == EACCES || err == EPERM ? SC_ACCESS : SC_SYSTEM;
}

/* Wins a beacon, raises the generation, then uses the slot (G1). The owner word, or 0 with *rc set. */
u32 sc_worker_claim(sc_table_t *t, int *rc)
{
    sc_wipe_t *w = t->proc->wipe;
    u32 me;
    spin_lock(&w->lock);
    me = SC_LD(&w->me);
    if (me != 0)
        goto out;
    union sc_semun arg;
    arg.array = (unsigned short *)calloc(t->h.n_sems, sizeof(unsigned short));
    if (arg.array == NULL) {
        t->sys_errno = ENOMEM;
        *rc = SC_SYSTEM;
        goto out;
    }
    if (semctl(t->sem_id, 0, GETALL, arg) != 0) {
        *rc = sem_error(t, errno);
        free(arg.array);
        goto out;
    }
    *rc = SC_WORKERS;
    for (u32 slot = 0; slot < t->h.n_workers; slot++) {
        int num = SC_SEM_BEACON(t->n_shards, slot);
        if (arg.array[num] != 0)
            continue;
        int err = sc_sem_op(t->sem_id, num, +1, SEM_UNDO | IPC_NOWAIT | 0x10000, 0);
        if (err == EAGAIN)
            continue;
        if (err != 0) {
            *rc = sem_error(t, err);
            break;
        }
        SC_CRASHPOINT(beacon_won);
        sc_worker_t *worker = &t->workers[slot];
        u64 gen = SC_LD(&worker->generation) + 1;
        if ((gen & 0x7FFFFu) == 0)
            gen++;
        SC_ST(&worker->pid, (u64)getpid());
        SC_ST(&worker->start_time, start_time_of_self());
        SC_ST_REL(&worker->generation, gen);
        SC_CRASHPOINT(generation_raised);
        me = SC_OWNER_MAKE(slot, gen);
        SC_ST_REL(&w->me, me);
        break;
    }
    free(arg.array);
    if (me == 0 && *rc == SC_WORKERS)
        SC_ST(&w->denied, 1);
out:
    spin_unlock(&w->lock);
    return me;
}

void sc_worker_inherit(sc_table_t *to, const sc_table_t *from)
{
    sc_wipe_t *w = to->proc->wipe, *old = from->proc->wipe;
    u32 all[SC_N_FORMER] = {SC_LD(&old->me)};
    for (u32 i = 1; i < SC_N_FORMER; i++)
        all[i] = SC_LD(&old->former[i - 1]);
    if (w == old)
        return;
    spin_lock(&w->lock);
    if (all[0] == 0) /* it held none there: only what came from before */
        memmove(all, all + 1, sizeof all - sizeof all[0]);
    for (u32 i = 0; i < SC_N_FORMER; i++)
        SC_ST(&w->former[i], all[i]);
    spin_unlock(&w->lock);
}

/* 1 while a live process holds the slot, 0 when nobody does, -1 with errno. */
int sc_beacon_value(sc_table_t *t, u32 slot)
{
    return semctl(t->sem_id, SC_SEM_BEACON(t->n_shards, slot), GETVAL);
}

/* Asked only after a failed attempt and a wait. */
int sc_worker_dead(sc_table_t *t, u32 slot, u32 gen, int *lost)
{
    u32 me = t->proc != NULL ? sc_worker_me(t) : 0;
    if (me != 0 && slot == SC_OWNER_SLOT(me))
        return gen != SC_OWNER_GEN(me); /* a thread of this process is alive; an older life of the slot is not */
    if (slot >= t->h.n_workers || (SC_LD_ACQ(&t->workers[slot].generation) & 0x7FFFFu) != gen)
        return 1;
    int v = sc_beacon_value(t, slot);
    if (v < 0) {
        *lost = sem_error(t, errno);
        return 0;
    }
    return v == 0;
}

/* ---- guards ------------------------------------------------------------------------------------------------------- */

static int cas_owner(u32 *w, u32 from, u32 to)
{
    return __atomic_compare_exchange_n(w, &from, to, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

static int fast_wait(sc_table_t *t, u32 *w, u32 me, i64 wait_ns)
{
    i64 until = sc_clock_mono_ns() + wait_ns, step = WAIT_FIRST;
    for (;;) {
        u32 cur = SC_LD(w);
        if (cur == 0) { /* whoever has waited takes the word with the waiters bit: others may wait still */
            if (cas_owner(w, 0, me | SC_OWNER_WAITERS))
                return SC_OK;
            continue;
        }
        if (!(cur & SC_OWNER_WAITERS)) {
            if (!cas_owner(w, cur, cur | SC_OWNER_WAITERS))
                continue;
            cur |= SC_OWNER_WAITERS;
        }
        i64 left = until - sc_clock_mono_ns();
        int interrupted = 0;
        if (left > 0)
            interrupted = sc_futex_wait(w, cur, left < step ? left : step) != 0 && errno == EINTR;
        step = step < WAIT_STEP / 2 ? step * 2 : WAIT_STEP;
        u32 now = SC_LD(w);
        if (now != 0 && ((now ^ cur) & ~SC_OWNER_WAITERS) == 0) {
            int lost = 0;
            if (sc_worker_dead(t, SC_OWNER_SLOT(now), SC_OWNER_GEN(now), &lost)) {
                if (cas_owner(w, now, me | SC_OWNER_WAITERS))
                    return SC_AFTER_DEATH;
                continue;
            }
            if (lost)
                return lost;
        }
        if (interrupted || left <= 0)
            return SC_BUSY;
    }
}

static int fast_lock(sc_table_t *t, u32 *w, u32 me, i64 wait_ns)
{
    if (SC_LIKELY(cas_owner(w, 0, me)))
        return SC_OK;
    for (int i = 0; i < SPIN; i++) {
        SC_PAUSE();
        if (SC_LD(w) == 0 && cas_owner(w, 0, me))
            return SC_OK;
    }
    if (wait_ns <= 0)
        return SC_BUSY;
    return fast_wait(t, w, me, wait_ns);
}

static int semaphore_lock(sc_table_t *t, u32 shard, u32 me, i64 wait_ns)
{
    int err = sc_sem_op(t->sem_id, SC_SEM_GUARD(shard), -1, SEM_UNDO | IPC_NOWAIT, 0);
    if (err == EAGAIN && wait_ns > 0)
        err = sc_sem_op(t->sem_id, SC_SEM_GUARD(shard), -1, SEM_UNDO, wait_ns);
    if (err == EAGAIN || err == EINTR)
        return SC_BUSY;
    if (err != 0)
        return sem_error(t, err);
    SC_CRASHPOINT(semaphore_taken);
    u32 *dirty = &t->shard[shard].guard->dirty, was = SC_LD(dirty);
    SC_ST(dirty, me);
    SC_FENCE_REL();
    SC_BARRIER();
    return was != 0 ? SC_AFTER_DEATH : SC_OK;
}

int sc_guard_lock(sc_table_t *t, u32 shard, u32 me, i64 wait_ns)
{
    if (t->h.guard_kind == SC_GUARD_FAST)
        return fast_lock(t, &t->shard[shard].guard->owner, me, wait_ns);
    return semaphore_lock(t, shard, me, wait_ns);
}

void sc_guard_unlock(sc_table_t *t, u32 shard)
{
    sc_guard_word_t *g = t->shard[shard].guard;
    if (t->h.guard_kind == SC_GUARD_FAST) {
        /* A plain store in place of an exchange saves a third of the unlock's cost: it need not wait for the store
         * buffer.  A waiter that sets its bit between load and store loses its wake and comes back after WAIT_STEP. */
        if (SC_UNLIKELY(SC_LD(&g->owner) & SC_OWNER_WAITERS)) {
            __atomic_exchange_n(&g->owner, 0, __ATOMIC_RELEASE);
            SC_CRASHPOINT(before_wake);
            sc_futex_wake(&g->owner, 1);
        } else {
            SC_ST_REL(&g->owner, 0);
        }
        return;
    }
    SC_ST_REL(&g->dirty, 0);
    SC_BARRIER();
    SC_CRASHPOINT(dirty_cleared);
    (void)sc_sem_op(t->sem_id, SC_SEM_GUARD(shard), +1, SEM_UNDO, 0);
}

/* Whether an outsider removed the segment: its name stands for another file, its id is marked for removal, or the
 * semaphores are gone.  Asked by the write path once a second. */
int sc_segment_gone(sc_table_t *t)
{
    u32 me = sc_worker_me(t);
    if (SC_LD(&t->control->successor) != 0)
        return 1;
    if (semctl(t->sem_id, me ? SC_SEM_BEACON(t->n_shards, SC_OWNER_SLOT(me)) : 0, GETVAL) < 0 &&
        (errno == EIDRM || errno == EINVAL))
        return 1;
    if (t->path[0] != 0) {
        struct stat st;
        if (stat(t->path, &st) != 0)
            return errno == ENOENT;
        return st.st_dev != t->dev || st.st_ino != t->ino;
    }
    if (t->shm_id >= 0 && t->h.form == SC_FORM_SYSV) {
        struct shmid_ds ds;
        if (shmctl(t->shm_id, IPC_STAT, &ds) != 0)
            return errno == EIDRM || errno == EINVAL;
        return (ds.shm_perm.mode & SHM_DEST) != 0;
    }
    return 0;
}

int sc_enter(sc_table_t *t, u32 shard, i64 wait_ns)
{
    if (SC_UNLIKELY(t->readonly))
        return SC_READONLY;
    if (SC_UNLIKELY(t->lost))
        return SC_LOST;
    u32 me = sc_worker_me(t);
    if (SC_UNLIKELY(me == 0)) {
        int rc = SC_WORKERS;
        me = sc_worker_claim(t, &rc);
        if (me == 0)
            return rc;
    }
    int rc = sc_guard_lock(t, shard, me, wait_ns);
    if (SC_UNLIKELY(rc != SC_OK)) {
        if (rc != SC_AFTER_DEATH)
            return rc;
        SC_CRASHPOINT(guard_inherited);
        sc_recover_guarded(t, shard);
    }
    SC_CRASHPOINT(guard_taken);
    if (SC_UNLIKELY(SC_LD(&t->control->successor) != 0)) {
        t->lost = 1;
        sc_guard_unlock(t, shard);
        return SC_LOST;
    }
    return SC_OK;
}

void sc_leave(sc_table_t *t, u32 shard)
{
    SC_CRASHPOINT(before_unlock);
    sc_guard_unlock(t, shard);
    SC_CRASHPOINT(after_unlock);
}
