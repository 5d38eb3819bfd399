/* guard.h - who is alive, and who may write a shard. */
#ifndef SC_GUARD_H
#define SC_GUARD_H
#include "table.h"

union sc_semun { /* the fourth argument of semctl, which no header declares */
    int val;
    struct semid_ds *buf;
    unsigned short *array;
};

/* Per (process, segment): which worker slot this process holds.  The words lie on a page that the kernel empties in a
 * forked child, so one load tells a child that it has no slot of its own yet. */
#define SC_N_FORMER 4 /* resizes within the life of one lease */
typedef struct {
    u32 me;      /* owner word without waiters bit; 0 = no slot claimed by this very process */
    u32 lock;    /* spin lock of the claim; emptied by fork, so a child never waits for a thread it does not have */
    u32 denied;  /* 1: no slot was free; reads go on uncounted, the next write asks again */
    u32 former[SC_N_FORMER]; /* what me was in the segments this one replaced: whose leases were carried over */
} sc_wipe_t;
typedef struct sc_proc {
    sc_wipe_t *wipe;
    struct sc_proc *next;
    u8 uuid[16];
    int refs, sem_id, lost;
    u32 n_shards, n_workers;
} sc_proc_t;

sc_proc_t *sc_proc_get(const sc_header_t *h, int sem_id);
void sc_proc_put(sc_proc_t *p);
u32 sc_worker_claim(sc_table_t *t, int *rc);
int sc_beacon_value(sc_table_t *t, u32 slot);
int sc_worker_dead(sc_table_t *t, u32 slot, u32 gen, int *lost);
/* What this process held in a segment that `to` replaces stays its own there. */
void sc_worker_inherit(sc_table_t *to, const sc_table_t *from);
static inline u32 sc_worker_me(const sc_table_t *t) { return SC_LD(&t->proc->wipe->me); }
void sc_count_first(sc_table_t *t, int stat, u64 n);
/* Adds to this worker's own statistics line; nothing on a read-only handle. */
SC_INLINE void sc_count(sc_table_t *t, int stat, u64 n)
{
    u32 me = SC_LIKELY(t->proc != NULL) ? sc_worker_me(t) : 0;
    if (SC_UNLIKELY(me == 0)) {
        sc_count_first(t, stat, n);
        return;
    }
    u64 *p = &t->workers[SC_OWNER_SLOT(me)].stat[stat];
    SC_ST(p, SC_LD(p) + n);
}

int sc_guard_lock(sc_table_t *t, u32 shard, u32 me, i64 wait_ns);
void sc_guard_unlock(sc_table_t *t, u32 shard);
/* Worker slot, guard, recovery if the last owner died, successor word: everything between a caller and writing. */
int sc_enter(sc_table_t *t, u32 shard, i64 wait_ns);
void sc_leave(sc_table_t *t, u32 shard);
int sc_segment_gone(sc_table_t *t);

int sc_futex_wait(u32 *word, u32 seen, i64 ns);
void sc_futex_wake(u32 *word, int n);

#define SC_ANON_KEYS 0x5C000000u /* semaphore keys of anonymous segments: this and 24 random bits, so that gc can tell them */

/* ipc.c: kernel objects at creation time and at the end */
void sc_shm_detach(const void *base, int shm_id, const sc_header_t *h);
int sc_sem_op(int sem_id, int num, int delta, int flags, i64 wait_ns);
int sc_undo_probe(int sem_id, int num);
int sc_lifecycle_enter(int sem_id, i64 wait_ns);
int sc_lifecycle_leave(int sem_id);
int sc_sem_set_guards(int sem_id, u32 n_shards, u32 n_sems);
i64 sc_time_shift_ns(void);
#endif
