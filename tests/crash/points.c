/* points.c - what the macros SC_CRASHPOINT and SC_CRASH_OP of atomics.h call in a build with -DSC_CRASH_POINTS.
 *
 *   SHMCACHE_CRASH=OPERATION:POINT:NTH[:SIGNAL]     e.g. set:before_publish:1000 or set:27:1000, *:recover_begin:1:STOP
 *
 * The process sends itself SIGKILL (SIGSTOP with :STOP) when it reaches POINT for the NTH time within OPERATION (* = any).
 * Passes are counted per operation and point, in memory that a harness may place where all processes see it. */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PUBLIC __attribute__((visibility("default")))

/* A point's number is its place here, from 1; the order is that of a life: slot, guard, recovery, append, index, ... */
static const char *const points[] = {
    "", "beacon_won", "generation_raised",
    "semaphore_taken", "guard_inherited", "recover_begin", "recover_lanes", "recount_free", "recover_end", "guard_taken",
    "seq_raised", "life_given", "page_prepared", "tail_chained", "page_chained", "version_raised", "header_written",
    "value_written", "bytes_written", "before_tail", "after_tail", "tail_counted",
    "displaced_copy", "displaced_moves", "displaced", "twin_moves", "twin_cleared",
    "before_relocate", "after_relocate", "before_head", "after_head", "lane_emptied", "dropped", "wiping",
    "before_publish", "after_publish", "store_counted",
    "before_number", "after_number", "touch_marked", "touched", "touch_coarse",
    "before_flush", "flushed", "flush_counted",
    "step_won", "step_half_noted", "recount_done",
    "lease_freed", "lease_half", "lease_taken", "lease_released", "lease_before_wake",
    "before_unlock", "dirty_cleared", "before_wake", "after_unlock",
    "read_begun", "read_copied", "read_valid", "read_again",
};
static const char *const operations[] = {"", "get", "set", "add", "replace", "cas", "append", "delete", "touch", "incr", "clear",
                                         "clean", "tick", "lease", "extend", "release"};
#define N_POINTS (sizeof points / sizeof *points)
#define N_OPERATIONS (sizeof operations / sizeof *operations)

static uint64_t own_counts[N_OPERATIONS * N_POINTS];
static uint64_t *counts = own_counts;
static int armed_operation = -1, armed_point = -1, armed_signal = SIGKILL; /* -1: nothing; operation 0: any */
static uint64_t armed_left;
static _Thread_local int operation;

static int find(const char *const *names, size_t n, const char *name, size_t len)
{
    for (size_t i = 1; i < n; i++)
        if (strlen(names[i]) == len && memcmp(names[i], name, len) == 0)
            return (int)i;
    char *end;
    long number = strtol(name, &end, 10);
    return len > 0 && end == name + len && number > 0 && (size_t)number < n ? (int)number : -1;
}

PUBLIC const char *sc_crash_name(int of_operation, int number)
{
    size_t n = of_operation ? N_OPERATIONS : N_POINTS;
    return number < 0 || (size_t)number >= n ? NULL : of_operation ? operations[number] : points[number];
}

/* Passes go to `shared` from here on: N_OPERATIONS rows of N_POINTS. */
PUBLIC void sc_crash_share(uint64_t *shared) { counts = shared; }

/* 0, or -1 when the text is not as above. NULL disarms. */
PUBLIC int sc_crash_arm(const char *text)
{
    armed_point = -1;
    if (text == NULL)
        return 0;
    const char *colon = strchr(text, ':'), *second = colon ? strchr(colon + 1, ':') : NULL;
    if (second == NULL)
        return -1;
    int op = text[0] == '*' && colon == text + 1 ? 0 : find(operations, N_OPERATIONS, text, (size_t)(colon - text));
    int point = find(points, N_POINTS, colon + 1, (size_t)(second - colon - 1));
    char *end;
    unsigned long long nth = strtoull(second + 1, &end, 10);
    if (op < 0 || point < 0 || nth == 0 || (*end != 0 && strcmp(end, ":STOP") != 0 && strcmp(end, ":KILL") != 0))
        return -1;
    armed_signal = strcmp(end, ":STOP") == 0 ? SIGSTOP : SIGKILL;
    armed_operation = op;
    armed_left = nth;
    armed_point = point;
    return 0;
}

__attribute__((constructor)) static void from_environment(void)
{
    const char *text = getenv("SHMCACHE_CRASH");
    if (text != NULL && sc_crash_arm(text) != 0) {
        fprintf(stderr, "SHMCACHE_CRASH: operation:point:nth[:STOP] wanted, %s found\n", text);
        _exit(64);
    }
}

void sc_crash_operation(const char *name);
void sc_crash_operation(const char *name)
{
    int n = find(operations, N_OPERATIONS, name, strlen(name));
    if (n < 0)
        abort(); /* an operation that is not listed above */
    operation = n;
}

void sc_crashpoint(int *number, const char *name);
void sc_crashpoint(int *number, const char *name)
{
    int n = __atomic_load_n(number, __ATOMIC_RELAXED);
    if (n == 0) {
        if ((n = find(points, N_POINTS, name, strlen(name))) < 0)
            abort(); /* a point that is not listed above */
        __atomic_store_n(number, n, __ATOMIC_RELAXED);
    }
    __atomic_fetch_add(&counts[(size_t)operation * N_POINTS + (size_t)n], 1, __ATOMIC_RELAXED);
    if (n != armed_point || (armed_operation != 0 && armed_operation != operation))
        return;
    if (__atomic_fetch_sub(&armed_left, 1, __ATOMIC_RELAXED) == 1) {
        armed_point = -1;
        (void)kill(getpid(), armed_signal);
    }
}
