/* repair.h - mending a segment that nobody uses. */
#ifndef SC_REPAIR_H
#define SC_REPAIR_H
#include "table.h"

typedef struct {
    u64 lines; /* things mended */
    u64 lost;  /* entries whose item could not be kept */
    u64 moved; /* items stored anew, because the log around them was damaged */
    u32 live_slot; /* SC_EXISTS: the worker slot that a live process holds */
} sc_repaired_t;

/* SC_OK; SC_EXISTS: somebody uses the segment, nothing was changed; SC_SYSTEM: t->sys_errno. say is told each thing mended. */
int sc_repair(sc_table_t *t, sc_report_fn say, void *arg, sc_repaired_t *out);
#endif
