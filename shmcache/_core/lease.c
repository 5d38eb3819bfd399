/* lease.c - leases of lock() and of the one filler of get_or_set(): a fixed table per shard, never evicted.
 *
 * A lease changes under the shard's guard only; its owner word is stored last (COMMIT).  It is free when the word is 0, when
 * its deadline has passed, or when its owner's slot is dead.  A release compares the whole word with its nonce, drawn per
 * acquisition, and its slot with the slot of this very process, so neither a child nor a later holder is robbed (G4, L1). */
#include "guard.h"
#include "heap.h"
#include <errno.h>

#define LEASE_STEP 50000000 /* ns: a holder killed without a wake costs its waiters this much */
#define OWNER(me, nonce) (((u64)((me) >> 1) << 33) | ((nonce) & 0x1FFFFFFFFull))

u64 sc_lease_hash(const sc_table_t *t, const void *name, u32 len)
{
    u64 h = sc_hash(&t->secret, name, len, 0x1EA5E);
    return h ? h : 1;
}
static u32 shard_of(const sc_table_t *t, u64 hash) { return sc_shard_of(hash, t->n_shards); }
static sc_lease_t *probe(const sc_table_t *t, u64 hash, u32 i)
{
    return &t->shard[shard_of(t, hash)].leases[((u32)hash + i) % t->n_leases];
}
/* 1 = nobody holds it any more. */
static int lapsed(sc_table_t *t, const sc_lease_t *l, u64 now)
{
    u64 owner = SC_LD(&l->owner);
    u64 deadline = SC_LD(&l->deadline);
    if (owner == 0 || SC_LEASE_UNTIL(deadline) <= now)
        return 1;
    if (deadline & SC_LEASE_CARRIED) /* its slot is one of the segment that was replaced */
        return 0;
    int lost = 0;
    return sc_worker_dead(t, (u32)(owner >> 52), (u32)(owner >> 33) & 0x7FFFFu, &lost);
}

/* SC_OK: taken, owner and fencing number set. SC_EXISTS: a live one holds it. SC_LEASES_FULL: no room to probe. */
int sc_lease_take(sc_table_t *t, u64 hash, u64 lease_ms, u64 *owner, u64 *fence, i64 wait_ns)
{
    SC_CRASH_OP("lease");
    u32 shard = shard_of(t, hash);
    int rc = sc_enter(t, shard, wait_ns);
    if (rc != SC_OK)
        return rc;
    u64 now = sc_now(t);
    sc_lease_t *free_one = NULL;
    rc = SC_OK;
    for (u32 i = 0; i < SC_LEASE_PROBES; i++) {
        sc_lease_t *l = probe(t, hash, i);
        int gone = lapsed(t, l, now);
        if (SC_LD(&l->hash) == hash && !gone) {
            rc = SC_EXISTS;
            break;
        }
        if (gone && free_one == NULL)
            free_one = l;
    }
    if (rc == SC_OK && free_one == NULL)
        rc = SC_LEASES_FULL;
    if (rc == SC_OK) {
        sc_hard_t *hard = t->shard[shard].hard;
        u64 version = hard->version + 1;
        hard->version = version;
        *fence = version;
        *owner = OWNER(sc_worker_me(t), version);
        SC_ST_REL(&free_one->owner, 0); /* a kill below leaves a free lease, never another one's name */
        SC_BARRIER();
        SC_CRASHPOINT(lease_freed);
        SC_ST(&free_one->deadline, now + lease_ms);
        SC_ST(&free_one->hash, hash);
        SC_CRASHPOINT(lease_half);
        SC_ST_REL(&free_one->owner, *owner); /* COMMIT */
        SC_CRASHPOINT(lease_taken);
    }
    sc_leave(t, shard);
    return rc;
}

static sc_lease_t *mine(sc_table_t *t, u64 hash, u64 owner)
{
    u32 me = sc_worker_me(t), own = me != 0 && (owner >> 33) == (u64)(me >> 1);
    for (u32 i = 0; i < SC_N_FORMER; i++) {
        u32 was = SC_LD(&t->proc->wipe->former[i]);
        own |= was != 0 && (owner >> 33) == (u64)(was >> 1);
    }
    if (!own)
        return NULL;
    for (u32 i = 0; i < SC_LEASE_PROBES; i++) {
        sc_lease_t *l = probe(t, hash, i);
        if (SC_LD(&l->owner) == owner && SC_LD(&l->hash) == hash)
            return l;
    }
    return NULL;
}

int sc_lease_extend(sc_table_t *t, u64 hash, u64 owner, u64 lease_ms, i64 wait_ns)
{
    SC_CRASH_OP("extend");
    u32 shard = shard_of(t, hash);
    int rc = sc_enter(t, shard, wait_ns);
    if (rc != SC_OK)
        return rc;
    u64 now = sc_now(t);
    sc_lease_t *l = mine(t, hash, owner);
    if (l == NULL || SC_LEASE_UNTIL(SC_LD(&l->deadline)) <= now)
        rc = SC_MISS;
    else
        SC_ST_REL(&l->deadline, (now + lease_ms) | (SC_LD(&l->deadline) & SC_LEASE_CARRIED));
    sc_leave(t, shard);
    return rc;
}

int sc_lease_release(sc_table_t *t, u64 hash, u64 owner, i64 wait_ns)
{
    SC_CRASH_OP("release");
    u32 shard = shard_of(t, hash);
    int rc = sc_enter(t, shard, wait_ns);
    if (rc != SC_OK)
        return rc;
    sc_lease_t *l = mine(t, hash, owner);
    if (l == NULL)
        rc = SC_MISS;
    else {
        rc = SC_LEASE_UNTIL(SC_LD(&l->deadline)) <= sc_now(t) ? SC_MISS : SC_OK;
        SC_ST_REL(&l->owner, 0);
    }
    SC_CRASHPOINT(lease_released);
    sc_leave(t, shard);
    SC_CRASHPOINT(lease_before_wake);
    u32 *seq = &t->shard[shard].guard->lease_seq;
    __atomic_fetch_add(seq, 1u, __ATOMIC_RELEASE);
    sc_futex_wake(seq, INT32_MAX);
    return rc;
}

/* Leases of live holders go over to a segment that replaces this one; every guard of `from` is held, `to` is nobody else's.
 * Their owner words stay as they are: a holder knows them, and by sc_worker_inherit its former slot. */
int sc_lease_carry(sc_table_t *from, sc_table_t *to)
{
    u64 now = sc_now(from);
    for (u32 shard = 0; shard < from->n_shards; shard++)
        for (u32 i = 0; i < from->n_leases; i++) {
            const sc_lease_t *l = &from->shard[shard].leases[i];
            u64 hash = SC_LD(&l->hash);
            if (lapsed(from, l, now))
                continue;
            u32 j = 0;
            while (j < SC_LEASE_PROBES && SC_LD(&probe(to, hash, j)->owner) != 0)
                j++;
            if (j == SC_LEASE_PROBES)
                return SC_LEASES_FULL;
            sc_lease_t *free_one = probe(to, hash, j);
            SC_ST(&free_one->hash, hash);
            SC_ST(&free_one->deadline, SC_LD(&l->deadline) | SC_LEASE_CARRIED);
            SC_ST_REL(&free_one->owner, SC_LD(&l->owner));
        }
    return SC_OK;
}

/* Waits at most one step, or until some lease of the shard was released; the caller tries again either way. */
int sc_lease_wait(sc_table_t *t, u64 hash, i64 wait_ns)
{
    u32 *seq = &t->shard[shard_of(t, hash)].guard->lease_seq;
    u32 seen = SC_LD_ACQ(seq);
    u64 now = sc_now(t);
    int held = 0;
    for (u32 i = 0; i < SC_LEASE_PROBES && !held; i++) {
        sc_lease_t *l = probe(t, hash, i);
        held = SC_LD(&l->hash) == hash && !lapsed(t, l, now);
    }
    if (held && wait_ns > 0)
        (void)sc_futex_wait(seq, seen, wait_ns < LEASE_STEP ? wait_ns : LEASE_STEP);
    return held;
}
