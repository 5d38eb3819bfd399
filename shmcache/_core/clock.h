/* clock.h - the host's boot-time clock, in ms since a segment's birth.
 *
 * CLOCK_BOOTTIME survives suspend and does not see steps of the wall clock.  A time namespace shifts it; the shift is
 * subtracted, so that processes of different time namespaces agree. */
#ifndef SC_CLOCK_H
#define SC_CLOCK_H
#include "layout.h"
#include <time.h>

#define SC_CLOCK_REAL INT64_MIN /* no frozen time */

typedef struct {
    i64 base_ns;   /* boot-time clock of the initial time namespace at the segment's birth */
    i64 shift_ns;  /* this process's time-namespace offset */
    i64 frozen_ms; /* SC_CLOCK_REAL, or the time tests have set */
} sc_clock_t;

static inline i64 sc_clock_boot_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_BOOTTIME, &ts);
    return (i64)ts.tv_sec * 1000000000 + ts.tv_nsec;
}
/* Time that item deadlines are compared with: ms since birth plus one, never 0, because a deadline of 0 means never. */
static inline u64 sc_clock_now_ms(const sc_clock_t *c)
{
    i64 ms = c->frozen_ms;
    if (ms == SC_CLOCK_REAL)
        ms = (sc_clock_boot_ns() - c->shift_ns - c->base_ns) / 1000000;
    return ms < 0 ? 1u : (u64)ms + 1u;
}
/* A cheap clock that only paces background work: a few ms late, never sees suspend. */
static inline i64 sc_clock_coarse_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &ts);
    return (i64)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}
static inline i64 sc_clock_mono_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (i64)ts.tv_sec * 1000000000 + ts.tv_nsec;
}
#endif
