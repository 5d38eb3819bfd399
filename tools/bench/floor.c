/* floor.c - what the machine charges at the bottom: ns of a semop pair, of clocks, of a lock word, of copying.
 *
 * One JSON object goes to stdout; each figure is the least of several passes.  The semaphore set is private and gone at
 * the end. */
#include "guard.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/sem.h>

#define PASSES 9
#define AREA (48u << 20) /* beyond any second-level cache */

/* Processor time of this thread: other processes cannot lengthen it. */
static i64 used_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (i64)ts.tv_sec * 1000000000 + ts.tv_nsec;
}
static double best(i64 *passes, unsigned n)
{
    i64 least = passes[0];
    for (int i = 1; i < PASSES; i++)
        least = passes[i] < least ? passes[i] : least;
    return (double)least / n;
}
#define TIME(name, n, statement)                                              \
    do {                                                                      \
        i64 took[PASSES];                                                     \
        for (int pass = 0; pass < PASSES; pass++) {                           \
            i64 start = used_ns();                                            \
            for (unsigned i = 0; i < (n); i++)                                \
                statement;                                                    \
            took[pass] = used_ns() - start;                                   \
        }                                                                     \
        printf("%s\"%s\": %.2f", first ? "{" : ", ", name, best(took, (n)));  \
        first = 0;                                                            \
    } while (0)

static int pair(int id)
{
    return sc_sem_op(id, 0, -1, SEM_UNDO | IPC_NOWAIT, 0) | sc_sem_op(id, 0, 1, SEM_UNDO, 0);
}

int main(void)
{
    int first = 1, failed = 0, id = semget(IPC_PRIVATE, 1, IPC_CREAT | 0600);
    union sc_semun one = {.val = 1};
    u32 word = 0;
    volatile i64 sink = 0;
    u64 draw = 88172645463325252ull;
    u8 *area = (u8 *)mmap(NULL, AREA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0), small[128];
    if (id < 0 || semctl(id, 0, SETVAL, one) != 0 || area == MAP_FAILED) {
        perror("floor");
        if (id >= 0)
            semctl(id, 0, IPC_RMID);
        return 2;
    }
    TIME("semop pair with SEM_UNDO", 20000u, failed |= pair(id));
    semctl(id, 0, IPC_RMID);
    TIME("clock_gettime CLOCK_BOOTTIME", 200000u, sink += sc_clock_boot_ns());
    TIME("clock_gettime CLOCK_MONOTONIC_COARSE", 200000u, sink += sc_clock_coarse_ms());
    TIME("lock word taken and released", 200000u, {
        u32 none = 0;
        failed |= !__atomic_compare_exchange_n(&word, &none, 1u, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
        SC_ST_REL(&word, 0u);
        SC_BARRIER();
    });
    TIME("100 random bytes copied out of 48 MiB", 200000u, {
        draw ^= draw << 13;
        draw ^= draw >> 7;
        draw ^= draw << 17;
        memcpy(small, area + draw % (AREA - 128u), 100);
        sink += small[draw & 63u];
    });
    TIME("one cache-missing load, dependent", 200000u, {
        draw ^= draw << 13;
        draw ^= draw >> 7;
        draw ^= draw << 17;
        draw += area[draw % AREA] | 1u;
    });
    sink += (i64)draw;
    printf("}\n");
    return failed != 0;
}
