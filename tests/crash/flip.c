/* flip.c - hostile and rotten segments: mutated images read, written and checked (R8).
 *
 *   flip [--seed N] [--from N] [--images N | --seconds N] [--label TEXT]        mutated images
 *   flip --live SECONDS [--seed N]                                              a mutator beside two readers and a writer
 *
 * An image is a sound segment with 1 to 8 places changed: bits, bytes, words, boundary values, words copied from elsewhere,
 * mostly where structure lies (lane ends, page lives, chains, index, item headers).  Nothing may crash, hang, or give a value
 * that was never set for its key.  Counted apart, because they change in place or are sound bytes of the same page life: a
 * counter's number, deadlines, superseded copies.  A crash or hang prints seed and image; `--from` replays it. */
#include "image.h"
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void on_signal(int sig)
{
    say(sig == SIGALRM ? "hang" : "crash");
    _exit(9);
}

static void one_image(void)
{
    sc_table_t *t = w.t;
    u8 *base = w.c->rig->base;
    memcpy(base, w.c->image, w.c->rig->size);
    rig_mark_worker(t);
    t->lost = 0;
    t->next_clean = 0;
    for (u32 n = 1 + below(8); n > 0; n--)
        mutate(t, base);
    for (u32 turn = 0; turn < 3; turn++) {
        for (u32 i = 0; i < 8; i++) {
            w.where = 1;
            read_one(t, below(4) ? below(w.c->n_items) : below(620));
        }
        if (turn == 2)
            break;
        write_one(t, below(2) ? below(w.c->n_items) : 600 + below(20));
    }
    w.where = 2;
    if (w.image % 4 == 0)
        walk(t);
    w.where = 3;
    if (w.image % 16 == 0)
        (void)rig_audit(t, 1);
}

static u64 ms_now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (u64)ts.tv_sec * 1000 + (u64)ts.tv_nsec / 1000000;
}

static void images(u64 from, u64 count, u64 seconds)
{
    static const u32 flags[] = {0, 0, SC_F_NO_EVICT, SC_F_SECURE, SC_F_HEADER_ONLY, 0};
    u64 until = seconds ? ms_now() + seconds * 1000 : UINT64_MAX, batch = 2000;
    for (u64 first = from / batch * batch; first < from + count && ms_now() < until && w.bad < 5; first += batch) {
        u64 n = first / batch; /* a batch shares one sound segment; its seed is the batch's */
        scene_want_t want = {n % 3 ? OP_OVERWRITE : OP_INCR, n % 2 ? FILL_FULL : FILL_HALF, 700, n % 5 ? SC_GUARD_FAST : SC_GUARD_SEMAPHORE,
                             flags[n % 6], n % 4 ? 64 : 16, w.seed * 1000003u + n};
        w.c = scene_new(&want);
        w.t = rig_handle(w.c->rig, 1);
        w.t->clock.frozen_ms = SCENE_NOW;
        for (u64 i = first; i < first + batch && i < from + count && w.bad < 5; i++) {
            w.image = i;
            w.rng.x = (w.seed + 1) * 0x9E3779B97F4A7C15ull ^ (i + 1) * 0xD6E8FEB86659FD93ull;
            if (i % 256 == 0) {
                alarm(60);
                if (ms_now() > until) {
                    batch = i - first;
                    break;
                }
            }
            if (i >= from)
                one_image();
        }
        rig_handle_free(w.t);
        scene_free(w.c);
        if (first + batch >= from + count || ms_now() >= until || w.bad >= 5)
            w.image = first + batch < from + count ? first + batch : from + count;
    }
    alarm(0);
    printf("flip%s%s: %llu images, %llu reads, %llu hits, %llu superseded copies, %llu numbers, %llu guards not granted, %llu violations\n",
           w.label[0] ? " " : "", w.label, (unsigned long long)(w.image - from), (unsigned long long)w.reads,
           (unsigned long long)w.hits, (unsigned long long)w.superseded, (unsigned long long)w.numbers, (unsigned long long)w.busy,
           (unsigned long long)w.bad);
}

/* Readers, a writer and a mutator as processes over one segment. */
static void live(u64 seconds)
{
    scene_want_t want = {OP_OVERWRITE, FILL_HALF, 700, SC_GUARD_FAST, 0, 64, w.seed};
    u64 *beats = (u64 *)mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), rebuilt = 0;
    if (beats == MAP_FAILED)
        exit(3);
    w.c = scene_new(&want);
    pid_t pids[4];
    for (u32 i = 0; i < 4; i++) {
        pids[i] = fork();
        if (pids[i] == 0) {
            w.rng.x = w.seed * 77 + i + 1;
            w.t = rig_handle(w.c->rig, 1 + i);
            w.t->clock.frozen_ms = SCENE_NOW;
            for (u64 n = 1;; n++) {
                SC_ST(&beats[i * 8], n);
                SC_ST(&beats[i * 8 + 1], w.bad);
                w.image = n;
                if (i == 0) {
                    if (n % 512 == 0) { /* sound again, under the others' feet */
                        memcpy(w.c->rig->base + 4096, w.c->image + 4096, w.c->rig->size - 4096);
                        for (u32 s = 0; s < 5; s++)
                            w.t->workers[s].generation = 1;
                        SC_ST(&beats[2], beats[2] + 1);
                    }
                    mutate(w.t, w.c->rig->base);
                    usleep(20);
                } else if (i == 1) {
                    w.t->lost = 0;
                    write_one(w.t, below(620));
                } else if (n % 64 == 0) {
                    w.where = 2;
                    walk(w.t);
                    w.where = 3;
                    if (n % 4096 == 0)
                        (void)rig_audit(w.t, 1);
                } else {
                    w.where = 1;
                    read_one(w.t, below(620));
                }
            }
        }
    }
    u64 until = ms_now() + seconds * 1000, seen[4] = {0}, since[4];
    for (u32 i = 0; i < 4; i++)
        since[i] = ms_now();
    while (ms_now() < until && w.bad < 5) {
        usleep(50000);
        for (u32 i = 0; i < 4; i++) {
            int st;
            if (waitpid(pids[i], &st, WNOHANG) == pids[i]) {
                printf("VIOLATION live: process %u ended with status %x\n", i, (unsigned)st);
                w.bad += 5;
            }
            if (beats[i * 8] != seen[i]) {
                seen[i] = beats[i * 8];
                since[i] = ms_now();
            } else if (ms_now() - since[i] > 20000) {
                printf("VIOLATION live: process %u made no progress in 20 s\n", i);
                w.bad += 5;
            }
            if (i >= 2 && beats[i * 8 + 1] > 0)
                w.bad += beats[i * 8 + 1];
        }
    }
    rebuilt = beats[2];
    for (u32 i = 0; i < 4; i++) {
        kill(pids[i], SIGKILL);
        while (waitpid(pids[i], NULL, 0) < 0 && errno == EINTR)
            ;
    }
    printf("flip live: %llu mutations, %llu writes, %llu and %llu reads, %llu times made sound again, %llu violations\n",
           (unsigned long long)seen[0], (unsigned long long)seen[1], (unsigned long long)seen[2], (unsigned long long)seen[3],
           (unsigned long long)rebuilt, (unsigned long long)w.bad);
    scene_free(w.c);
    munmap(beats, 4096);
}

int main(int argc, char **argv)
{
    u64 from = 0, count = 200000, seconds = 0, live_for = 0;
    w.seed = 1;
    for (int i = 1; i + 1 < argc; i += 2) {
        u64 v = strtoull(argv[i + 1], NULL, 0);
        if (!strcmp(argv[i], "--seed"))
            w.seed = v;
        else if (!strcmp(argv[i], "--from"))
            from = v;
        else if (!strcmp(argv[i], "--images"))
            count = v;
        else if (!strcmp(argv[i], "--seconds"))
            seconds = v, count = UINT64_MAX / 2;
        else if (!strcmp(argv[i], "--live"))
            live_for = v;
        else if (!strcmp(argv[i], "--label"))
            snprintf(w.label, sizeof w.label, "%s", argv[i + 1]);
        else
            return fprintf(stderr, "usage: flip [--seed N] [--from N] [--images N | --seconds N] [--live SECONDS]\n"), 2;
    }
    image_init();
    signal(SIGALRM, on_signal);
#ifndef __SANITIZE_ADDRESS__
    signal(SIGSEGV, on_signal);
    signal(SIGBUS, on_signal);
    signal(SIGFPE, on_signal);
#endif
    if (live_for > 0)
        live(live_for);
    else
        images(from, count, seconds);
    return w.bad != 0;
}
