/* ipc.c - semaphore operations and what is done with them while a segment is created.
 *
 * Semaphore 0 stands inverted: 0 is free, so a set that was just made needs no initialisation and elects the creator of
 * set and segment alike: wait-for-zero and +1 are one call. */
#include "guard.h"
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ipc.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define WAIT_ZERO_FIRST 0x10000

/* One call, one semaphore; flag 0x10000 prepends wait-for-zero. wait_ns > 0 bounds the wait. 0 or errno. */
int sc_sem_op(int sem_id, int num, int delta, int flags, i64 wait_ns)
{
    struct sembuf ops[2];
    size_t n = 0;
    short flg = (short)(flags & 0xFFFF);
    if (flags & WAIT_ZERO_FIRST) {
        ops[n].sem_num = (unsigned short)num;
        ops[n].sem_op = 0;
        ops[n++].sem_flg = (short)(flg & ~SEM_UNDO);
    }
    ops[n].sem_num = (unsigned short)num;
    ops[n].sem_op = (short)delta;
    ops[n++].sem_flg = flg;
    struct timespec ts = {wait_ns / 1000000000, wait_ns % 1000000000};
    int saved = errno, r = wait_ns > 0 ? semtimedop(sem_id, ops, n, &ts) : semop(sem_id, ops, n);
    int err = r == 0 ? 0 : errno;
    errno = saved;
    return err;
}

int sc_lifecycle_enter(int sem_id, i64 wait_ns)
{
    return sc_sem_op(sem_id, SC_SEM_LIFECYCLE, +1,
                     WAIT_ZERO_FIRST | SEM_UNDO | (wait_ns <= 0 ? IPC_NOWAIT : 0), wait_ns);
}
int sc_lifecycle_leave(int sem_id) { return sc_sem_op(sem_id, SC_SEM_LIFECYCLE, -1, SEM_UNDO | IPC_NOWAIT, 0); }

/* Guards to 1, beacons to 0, one by one: SETALL would wipe the undo of the lifecycle semaphore. Before READY only. */
int sc_sem_set_guards(int sem_id, u32 n_shards, u32 n_sems)
{
    union sc_semun arg;
    unsigned short *found = (unsigned short *)calloc(n_sems, sizeof *found);
    int err = found == NULL ? ENOMEM : 0;
    arg.array = found;
    if (err == 0 && semctl(sem_id, 0, GETALL, arg) != 0)
        err = errno;
    for (u32 i = 1; err == 0 && i < n_sems; i++) {
        arg.val = i <= n_shards ? 1 : 0;
        if (found[i] != arg.val && semctl(sem_id, (int)i, SETVAL, arg) != 0)
            err = errno;
    }
    free(found);
    return err;
}

struct probe {
    int sem_id, num;
};
static int probe_child(void *arg)
{
    struct probe *p = (struct probe *)arg;
    struct sembuf op = {(unsigned short)p->num, 1, SEM_UNDO | IPC_NOWAIT};
    long r = syscall(SYS_semtimedop, p->sem_id, &op, 1, NULL);
    syscall(SYS_exit_group, r == 0 ? 0 : 1);
    return 0;
}

/* Whether the kernel applies SEM_UNDO at process death.  The child shares memory, sends no SIGCHLD and is collected with
 * __WCLONE, so a server's waitpid(-1) never sees it. 1 yes, 0 no, -1 could not ask. */
int sc_undo_probe(int sem_id, int num)
{
    size_t size = 65536;
    char *stack = (char *)malloc(size);
    if (stack == NULL)
        return -1;
    struct probe arg = {sem_id, num};
    union sc_semun zero = {0};
    int saved = errno, status = 0, result = -1;
    pid_t pid = clone(probe_child, (void *)(((uintptr_t)stack + size) & ~(uintptr_t)15), CLONE_VM | CLONE_VFORK, &arg);
    if (pid > 0) {
        pid_t r;
        do
            r = waitpid(pid, &status, (int)__WCLONE);
        while (r < 0 && errno == EINTR);
        if (r == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0) {
            int v = semctl(sem_id, num, GETVAL);
            result = v == 0 ? 1 : v > 0 ? 0 : -1;
            if (v > 0)
                (void)semctl(sem_id, num, SETVAL, zero);
        }
    }
    free(stack);
    errno = saved;
    return result;
}

/* Detaches a System V segment.  Whoever lets go of an anonymous one last takes its semaphores along: first detach, then
 * ask, since two that count users before they leave both see the other.  A look at the header of somebody's segment is a
 * user, too.  The set must be the one the header names and belong to whom the segment does: a forged header aims at
 * nobody else's.  A user that is killed, or leaves without this, leaves the set to gc. */
void sc_shm_detach(const void *base, int shm_id, const sc_header_t *h)
{
    struct shmid_ds shm, after;
    int anon = h != NULL && h->form == SC_FORM_ANON && ((u32)h->sem_key & 0xFF000000u) == SC_ANON_KEYS &&
               shmctl(shm_id, IPC_STAT, &shm) == 0;
    if (shmdt(base) != 0 || !anon)
        return;
    if (shmctl(shm_id, IPC_STAT, &after) == 0 || (errno != EINVAL && errno != EIDRM))
        return;
    struct semid_ds sem;
    union sc_semun arg = {.buf = &sem};
    if (semctl(h->sem_id, 0, IPC_STAT, arg) == 0 && sem.sem_perm.__key == h->sem_key && sem.sem_ctime == h->sem_ctime &&
        sem.sem_nsems == h->n_sems && sem.sem_perm.uid == shm.shm_perm.uid && sem.sem_perm.cuid == shm.shm_perm.cuid)
        (void)semctl(h->sem_id, 0, IPC_RMID);
}

/* Offset of this process's boot-time clock against the initial time namespace. */
i64 sc_time_shift_ns(void)
{
    FILE *f = fopen("/proc/self/timens_offsets", "re");
    char name[32];
    long long sec, ns;
    i64 shift = 0;
    if (f == NULL)
        return 0;
    while (fscanf(f, "%31s %lld %lld", name, &sec, &ns) == 3)
        if (strcmp(name, "boottime") == 0 || strcmp(name, "7") == 0)
            shift = (i64)sec * 1000000000 + ns;
    fclose(f);
    return shift;
}
