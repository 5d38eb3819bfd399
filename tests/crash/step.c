/* step.c - a writer killed at every instruction (R1), and its repairer killed at every instruction (R2).
 *
 *   step [--seed N] [--seconds N] [--first N] [--every N] [--most N] [--double N] [--op NAME] [--fill NAME] [--list] [--label TEXT]
 *
 * The operation runs single-stepped.  After each instruction that changed the segment, a copy of it is what a kill at this
 * point leaves: the kernel has lowered the dead worker's beacon and given back its guard semaphore, which is the state of a
 * fresh semaphore set.  On the copy
 *   - readers, before any repair, see the old or the new value of the key and every other item unharmed, in one pass
 *   - once the new value was seen, later instructions show it as well
 *   - the next writer repairs; check finds nothing; page counts add up; readers see what they saw before the repair
 *   - further operations work and harm nothing
 * With --double N, at every N-th of these states the repairer is single-stepped in turn, and its copies are judged likewise.
 * Instructions that change nothing leave a state already judged; they are counted as states, not judged again. */
#include "scene.h"
#include "trace.h"
#include <stdlib.h>
#include <sys/sem.h>
#include <time.h>
#include <unistd.h>

typedef struct {
    rig_t *rig;
    sc_table_t *t;
    u8 *prev; /* the state judged last */
} copy_t;

static struct {
    scene_t *c;
    copy_t one, two;
    u64 states, judged, doubles, judged_doubles, ops, bad, every_double, most, until, changed, changed_in_op, in_op, rip0;
    int depth, stepping, seen_new, seen_new_two, quick_two;
    char what[160], label[64];
} w;

static u64 ms_now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (u64)ts.tv_sec * 1000 + (u64)ts.tv_nsec / 1000000;
}

static void violation(u64 rip, const char *when, const char *text)
{
    if (w.bad++ >= 5)
        return;
    printf("VIOLATION %s %s, instruction %llu at +0x%llx%s: %s: %s\n", w.label, w.what, (unsigned long long)w.in_op,
           (unsigned long long)(rip - w.rip0), w.depth ? " (inside the repair)" : "", when, text);
    fflush(stdout);
}

static void copy_new(copy_t *p, const rig_t *of, u32 slot)
{
    p->rig = rig_twin(of);
    p->t = rig_handle(p->rig, slot);
    p->t->clock.frozen_ms = SCENE_NOW;
    p->prev = (u8 *)malloc(of->size);
    if (p->prev == NULL)
        exit(3);
}
static void copy_free(copy_t *p)
{
    rig_handle_free(p->t);
    rig_free(p->rig);
    free(p->prev);
}

/* Takes over a dead writer's segment: everything the next operation does before its own work. */
static int repair(sc_table_t *t)
{
    int rc = SC_OK;
    for (u32 s = 0; s < t->n_shards && rc == SC_OK; s++)
        if ((rc = sc_enter(t, s, RIG_WAIT)) == SC_OK)
            sc_leave(t, s);
    return rc;
}

static void judge(copy_t *p, const u8 *state, u64 rip, int *seen_new, void (*step_repair)(void))
{
    scene_t *c = w.c;
    char msg[240];
    int saw = 0, saw_after = 0, allow = c->may_evict ? SCENE_OTHERS_MAY_GO : 0;
    const char *why;
    memcpy(p->rig->base, state, c->rig->size);
    rig_mark_worker(p->t);
    p->t->lost = 0;
    if ((why = scene_verify(c, p->t, allow, &saw, msg, sizeof msg)) != NULL)
        violation(rip, "before repair", why);
    if (*seen_new && !saw)
        violation(rip, "before repair", "the new value was visible and is not any more");
    *seen_new |= saw;
    if (rig_audit(p->t, 1) != 0) {
        violation(rip, "before repair", "check has findings");
        (void)rig_audit(p->t, 0);
    }
    if (step_repair != NULL)
        step_repair();
    else {
        int rc = repair(p->t);
        if (rc != SC_OK) {
            violation(rip, "repair", rc == SC_BUSY ? "hung: the dead owner's guard is not granted" : "refused");
            return;
        }
    }
    if (rig_audit(p->t, 1) != 0) {
        violation(rip, "after repair", "check has findings");
        (void)rig_audit(p->t, 0);
    }
    if (rig_counts(p->t, 1) != 0) {
        violation(rip, "after repair", "page counts do not add up");
        (void)rig_counts(p->t, 0);
    }
    if ((why = scene_verify(c, p->t, allow, &saw_after, msg, sizeof msg)) != NULL)
        violation(rip, "after repair", why);
    else if (saw_after != saw)
        violation(rip, "after repair", "the repair changed what readers see");
    if ((why = scene_go_on(c, p->t, msg, sizeof msg)) != NULL)
        violation(rip, "going on", why);
    if (rig_audit(p->t, 1) != 0) {
        violation(rip, "going on", "check has findings");
        (void)rig_audit(p->t, 0);
    }
    if (rig_counts(p->t, 1) != 0) {
        violation(rip, "going on", "page counts do not add up");
        (void)rig_counts(p->t, 0);
    }
    allow |= SCENE_TARGET_MAY_GO | (c->want.buckets == 16 ? SCENE_OTHERS_MAY_GO : 0);
    if ((why = scene_verify(c, p->t, allow, &saw_after, msg, sizeof msg)) != NULL)
        violation(rip, "after going on", why);
}

static void step_repair(void)
{
    memcpy(w.two.prev, w.one.rig->base, w.c->rig->size);
    w.depth = 1;
    w.seen_new_two = 0;
    trace_on();
    int rc = repair(w.one.t);
    trace_off();
    w.depth = 0;
    if (rc != SC_OK)
        violation(w.rip0, "stepped repair", "refused");
}

static void on_step(u64 rip, ucontext_t *ctx)
{
    scene_t *c = w.c;
    if (ms_now() > w.until) { /* the time is over: the rest runs unjudged */
        trace_stop(ctx);
        return;
    }
    if (w.depth == 0) {
        w.states++;
        w.in_op++;
        /* whoever gets a free semaphore must find the dirty word cleared: a later clear would be taken for his own */
        if (c->want.guard_kind == SC_GUARD_SEMAPHORE && c->t->shard[0].guard->dirty != 0 &&
            semctl(c->rig->sem_id, SC_SEM_GUARD(0), GETVAL) != 0)
            violation(rip, "guard", "the semaphore is free while the dirty word says somebody is inside");
        if (memcmp(c->rig->base, w.one.prev, c->rig->size) == 0)
            return;
        memcpy(w.one.prev, c->rig->base, c->rig->size);
        w.changed++;
        /* past --most, long runs of like states (bytes copied, items passed) are sampled */
        u64 n = ++w.changed_in_op;
        if (w.most != 0 && n > w.most && n % (n > 8 * w.most ? 64 : 8) != 0)
            return;
        w.judged++;
        int dbl = w.every_double != 0 && w.judged % w.every_double == 0;
        judge(&w.one, w.one.prev, rip, &w.seen_new, dbl ? step_repair : NULL);
    } else if (w.depth == 1) {
        w.doubles++;
        if (memcmp(w.one.rig->base, w.two.prev, c->rig->size) == 0)
            return;
        memcpy(w.two.prev, w.one.rig->base, c->rig->size);
        w.judged_doubles++;
        w.depth = 2; /* the next repair is not stepped */
        judge(&w.two, w.two.prev, rip, &w.seen_new_two, NULL);
        w.depth = 1;
    }
}

static void run(const scene_want_t *want)
{
    scene_t *c = scene_new(want);
    char msg[240];
    int saw = 0;
    snprintf(w.what, sizeof w.what, "%s %s value %u guard %s flags %u buckets %u seed %llu", scene_op_name(want->op),
             scene_fill_name(want->fill), want->vlen, want->guard_kind == SC_GUARD_FAST ? "fast" : "semaphore", want->flags,
             want->buckets, (unsigned long long)want->seed);
    w.c = c;
    copy_new(&w.one, c->rig, 1);
    copy_new(&w.two, c->rig, 2);
    scene_reset(c);
    memcpy(w.one.prev, c->rig->base, c->rig->size);
    w.seen_new = 0;
    w.in_op = w.changed_in_op = 0;
    w.depth = 0;
    w.ops++;
    const char *why = scene_verify(c, c->t, 0, &saw, msg, sizeof msg);
    memcpy(c->rig->base, c->image, c->rig->size); /* use bits back */
    if (why != NULL || rig_audit(c->t, 0) != 0)
        violation(w.rip0, "the scene itself", why ? why : "check has findings");
    else {
        trace_on();
        scene_perform(c);
        trace_off();
        if (c->rc == SC_OK && want->op != OP_CLEAN && want->op != OP_TICK && want->op != OP_LEASE) {
            w.seen_new = 0;
            judge(&w.one, c->rig->base, w.rip0, &w.seen_new, NULL);
            if (!w.seen_new && (c->distinct || want->op == OP_CLEAR))
                violation(w.rip0, "done", "the operation answered ok and its result is not there");
        } else if (c->rc != SC_OK && !(c->rc == SC_NO_SPACE && (want->flags & SC_F_NO_EVICT)) &&
                   !(c->rc == SC_MISS && !c->before.present)) {
            snprintf(msg, sizeof msg, "the operation answered %d", c->rc);
            violation(w.rip0, "done", msg);
        }
    }
    copy_free(&w.one);
    copy_free(&w.two);
    scene_free(c);
}

static u32 combos(scene_want_t *out, u64 seed)
{
    static const u32 sizes[] = {0, 12, 100, 700, 4100, 12000};
    static const u32 guards[] = {SC_GUARD_FAST, SC_GUARD_SEMAPHORE};
    /* flags and bucket counts: the product's default, and each other form of items or index */
    static const u32 forms[][2] = {{0, 64}, {0, 16}, {SC_F_NO_EVICT, 64}, {SC_F_SECURE, 64}, {SC_F_HEADER_ONLY, 64},
                                   {SC_F_SECURE, 16}};
    u32 n = 0;
    for (u32 form = 0; form < 6; form++)
        for (u32 op = 0; op < N_OPS; op++)
            for (u32 size = 0; size < 6; size++)
                for (u32 f = 0; f < N_FILLS; f++)
                    for (u32 g = 0; g < 2; g++) {
                        if (form > 0 && f == FILL_EMPTY)
                            continue;
                        if (size > 0 && (op == OP_INCR || op == OP_CLEAN || op == OP_LEASE || op == OP_TICK))
                            continue;
                        out[n] = (scene_want_t){(enum scene_op)op, (enum scene_fill)f, sizes[size], guards[g],
                                                  forms[form][0], forms[form][1], seed + n};
                        n++;
                    }
    return n;
}

int main(int argc, char **argv)
{
    static scene_want_t all[4096];
    u64 seed = 1, seconds = 0, first = 0, every = 1;
    u32 buckets = 0, flags = UINT32_MAX, value = UINT32_MAX;
    const char *op = NULL, *fill = NULL;
    if (getenv("GLIBC_TUNABLES") == NULL) { /* copies by vector instructions: one byte a step is not what a CPU does */
        setenv("GLIBC_TUNABLES", "glibc.cpu.x86_rep_movsb_threshold=1073741824:glibc.cpu.x86_rep_stosb_threshold=1073741824", 1);
        execv("/proc/self/exe", argv);
    }
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i], *v = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(a, "--seed"))
            seed = strtoull(v, NULL, 0), i++;
        else if (!strcmp(a, "--seconds"))
            seconds = strtoull(v, NULL, 0), i++;
        else if (!strcmp(a, "--first"))
            first = strtoull(v, NULL, 0), i++;
        else if (!strcmp(a, "--every"))
            every = strtoull(v, NULL, 0), i++;
        else if (!strcmp(a, "--double"))
            w.every_double = strtoull(v, NULL, 0), i++;
        else if (!strcmp(a, "--most"))
            w.most = strtoull(v, NULL, 0), i++;
        else if (!strcmp(a, "--op"))
            op = v, i++;
        else if (!strcmp(a, "--fill"))
            fill = v, i++;
        else if (!strcmp(a, "--value"))
            value = (u32)strtoul(v, NULL, 0), i++;
        else if (!strcmp(a, "--buckets"))
            buckets = (u32)strtoul(v, NULL, 0), i++;
        else if (!strcmp(a, "--flags"))
            flags = (u32)strtoul(v, NULL, 0), i++;
        else if (!strcmp(a, "--label"))
            snprintf(w.label, sizeof w.label, "%s", v), i++;
        else {
            fprintf(stderr, "usage: step [--seed N] [--seconds N] [--first N] [--every N] [--most N] [--double N] [--op NAME] [--fill NAME]\n");
            return 2;
        }
    }
    extern char __executable_start;
    w.rip0 = (u64)(uintptr_t)&__executable_start;
    trace_hook = on_step;
    trace_init();
    u32 n = combos(all, seed);
    u64 done = 0;
    w.until = seconds ? ms_now() + seconds * 1000 : UINT64_MAX;
    rig_rng_t g = {seed * 31 + 7};
    for (u32 i = n; seconds != 0 && i > 1; i--) { /* a time budget looks at a sample of all */
        u32 j = rig_below(&g, i);
        scene_want_t x = all[j];
        all[j] = all[i - 1];
        all[i - 1] = x;
    }
    for (u32 i = (u32)first; i < n && ms_now() < w.until && w.bad < 5; i += (u32)every) {
        if ((op && strcmp(op, scene_op_name(all[i].op)) != 0) || (fill && strcmp(fill, scene_fill_name(all[i].fill)) != 0) ||
            (buckets && buckets != all[i].buckets) || (flags != UINT32_MAX && flags != all[i].flags) ||
            (value != UINT32_MAX && value != all[i].vlen))
            continue;
        run(&all[i]);
        done++;
    }
    printf("step%s%s: %llu of %u operations, %llu crash states (%llu changed the segment, %llu of these were repaired), %llu "
           "double-crash states (%llu repaired), %llu violations\n",
           w.label[0] ? " " : "", w.label, (unsigned long long)done, n, (unsigned long long)w.states,
           (unsigned long long)w.changed, (unsigned long long)w.judged, (unsigned long long)w.doubles, (unsigned long long)w.judged_doubles,
           (unsigned long long)w.bad);
    return w.bad != 0;
}
