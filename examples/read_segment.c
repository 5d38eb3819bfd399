/* read_segment.c - lists the live items of a shmcache segment from a C program.
 *
 *     cc -std=c11 -O2 -Wall -I shmcache/_core examples/read_segment.c -o read_segment
 *     ./read_segment /dev/shm/shmcache.sessions      a POSIX segment, or a copy of a segment
 *     ./read_segment @32769                          a System V segment by its id, as ipcs -m shows it
 *
 * Prints a line for each item: key, type, bytes, milliseconds left (- for ever); bytes that are not printable ASCII as \xNN.
 * Ends with 0, with 1 when the segment cannot be read, with 2 for wrong arguments.
 *
 * It maps read-only and takes no guard, so it works on a segment whose writers are stopped or dead, and disturbs nobody.  All
 * it needs is layout.h, which owns the bytes.  What it shows of the rules for readers:
 *
 *   1  Believe the header as a whole before anything else: magic, byte order, layout version, state, geometry.
 *   2  An entry is the only truth.  Load it (acquire), then its page's life word; copy what is wanted; fence; load both again.
 *      Both unchanged: the copy is of one item.  Otherwise a writer was there: look again.
 *   3  Every number from the segment is loaded once, checked against the header's copy, and then used.
 *   4  A page whose life is at or below flush_seq was cleared; an item whose deadline has come is absent.
 *
 * It does not verify the checks against rot (they are keyed hashes, see hash.h), does not follow displacements of entries within
 * a bucket group, so a key moved meanwhile may be missed or seen twice, and takes no account of time namespaces. */
#define _GNU_SOURCE
#include "layout.h"
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define ACQUIRE(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define RELAXED(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define TRIES 1000 /* looks at one entry before it is given up: a writer would have to store as often in between */

typedef struct {
    const u8 *base;
    u64 size;
    sc_header_t h; /* private copy, checked */
} segment_t;

typedef struct {
    const sc_hard_t *hard;
    const u64 *life;
    const u32 *next;
    const sc_bucket_t *buckets;
    const u8 *pages;
} shard_t;

static u64 round_up(u64 v, u64 to) { return (v + to - 1) / to * to; }

/* Where the parts of a shard lie, in the order of layout.h; the sum is what a shard needs. */
static u64 place(const segment_t *seg, u32 number, shard_t *s)
{
    const sc_header_t *h = &seg->h;
    u64 at = sizeof(sc_guard_word_t), hard = at;
    at += sizeof(sc_hard_t) + sizeof(sc_soft_t) + (u64)h->n_leases * sizeof(sc_lease_t);
    u64 life = at;
    at += (u64)h->n_pages * 8;
    u64 next = at;
    at += (u64)h->n_pages * 4 * 2; /* next, birth */
    u64 buckets = round_up(at + (u64)h->n_ghosts * 4, SC_LINE);
    u64 pages = buckets + (u64)h->n_buckets * sizeof(sc_bucket_t);
    if (s != NULL) {
        const u8 *base = seg->base + h->shard_off + (u64)number * h->shard_size;
        s->hard = (const sc_hard_t *)(const void *)(base + hard);
        s->life = (const u64 *)(const void *)(base + life);
        s->next = (const u32 *)(const void *)(base + next);
        s->buckets = (const sc_bucket_t *)(const void *)(base + buckets);
        s->pages = base + pages;
    }
    return pages + (u64)h->n_pages * h->page_size;
}

/* Rule 1. NULL, or what is wrong. */
static const char *believe(segment_t *seg)
{
    sc_header_t *h = &seg->h;
    if (seg->size < SC_HEADER_SIZE)
        return "it is shorter than a header";
    u32 state = ACQUIRE(&((const sc_header_t *)(const void *)seg->base)->state);
    memcpy(h, seg->base, sizeof *h);
    if (memcmp(h->magic, SC_MAGIC, 8) != 0)
        return "it does not begin with \"" SC_MAGIC "\"";
    if (h->byte_order != SC_BYTE_ORDER || h->layout_version != SC_LAYOUT_VERSION)
        return "its byte order or layout version is another";
    if (state != SC_STATE_READY)
        return "its creator has not finished";
    int sound = h->n_shards >= 1 && h->n_shards <= SC_MAX_SHARDS && h->page_size >= SC_MIN_PAGE && h->page_size <= SC_MAX_PAGE &&
                (h->page_size & (h->page_size - 1)) == 0 && h->n_pages >= 1 && h->n_pages < SC_NO_PAGE && h->n_buckets >= 1 &&
                h->n_buckets < (1u << 28) && h->n_leases <= 65536 && h->n_ghosts <= h->n_buckets * 64ull && h->size <= seg->size &&
                h->shard_off <= h->size && h->shard_off % 64 == 0 && h->shard_size <= h->size && h->shard_size % 64 == 0 &&
                h->shard_off + (u64)h->n_shards * h->shard_size <= h->size;
    return sound && place(seg, 0, NULL) <= h->shard_size ? NULL : "its geometry does not fit its size";
}

/* Copies n bytes that begin skip bytes behind an item's start, over its pages. 0: the chain leaves the segment. */
static int gather(const segment_t *seg, const shard_t *s, u32 page, u64 at, u8 *out, u32 n)
{
    u32 size = seg->h.page_size;
    for (;;) {
        for (; at >= size; at -= size)
            if ((page = RELAXED(&s->next[page])) >= seg->h.n_pages)
                return 0;
        if (n == 0)
            return 1;
        u32 step = n < size - (u32)at ? n : size - (u32)at;
        memcpy(out, s->pages + (u64)page * size + at, step);
        out += step;
        n -= step;
        at += step;
        if (n == 0)
            return 1;
    }
}

typedef struct {
    u32 klen, vlen, type;
    u64 deadline; /* ms since the segment's birth, 0 = never */
} item_t;

/* Rule 2. 1: item and key are copies of one item; 0: there is none. */
static int look(const segment_t *seg, const shard_t *s, const u64 *entry, item_t *it, u8 *key)
{
    for (int i = 0; i < TRIES; i++) {
        u64 e = ACQUIRE(entry), head[3] = {0};
        u32 page = SC_ENTRY_PAGE(e), off = SC_ENTRY_OFF(e);
        if (e == 0 || page >= seg->h.n_pages || off % 8 != 0 || off + SC_ITEM_HEADER > seg->h.page_size)
            return 0;
        u64 life = ACQUIRE(&s->life[page]);
        if (SC_LIFE_SEQ(life) <= RELAXED(&s->hard->flush_seq))
            return 0;
        int sound = gather(seg, s, page, off, (u8 *)head, SC_ITEM_HEADER);
        int soft = SC_W0_FLAGS(head[0]) & SC_IF_SOFT;
        it->klen = SC_W0_KLEN(head[0]);
        it->vlen = SC_W0_VLEN(head[0]);
        it->type = SC_W0_TYPE(head[0]);
        it->deadline = SC_W1_DEADLINE(head[1]);
        if (sound && soft) { /* absent after the soft deadline, for all but get_or_set */
            sound = gather(seg, s, page, (u64)off + SC_ITEM_HEADER, (u8 *)&head[2], 8);
            it->deadline = head[2];
        }
        sound = sound && it->klen > 0 && gather(seg, s, page, (u64)off + SC_ITEM_HEADER + (soft ? 8u : 0u), key, it->klen);
        atomic_thread_fence(memory_order_acquire);
        if (ACQUIRE(entry) == e && RELAXED(&s->life[page]) == life)
            return sound;
    }
    return 0;
}

static void print_key(const u8 *key, u32 n)
{
    for (u32 i = 0; i < n; i++)
        if (key[i] < 32 || key[i] >= 127 || key[i] == '\\')
            printf("\\x%02x", key[i]);
        else
            putchar(key[i]);
}

static void list(const segment_t *seg)
{
    static const char *const types[] = {"bytes", "str", "int", "float", "none", "false", "true", "bigint"};
    static u8 key[SC_MAX_KEY];
    struct timespec ts;
    clock_gettime(CLOCK_BOOTTIME, &ts);
    i64 ms = ((i64)ts.tv_sec * 1000000000 + ts.tv_nsec - seg->h.clock_base_ns) / 1000000;
    u64 now = ms < 0 ? 1u : (u64)ms + 1u; /* never 0: a deadline of 0 means never */
    for (u32 i = 0; i < seg->h.n_shards; i++) {
        shard_t s;
        place(seg, i, &s);
        for (u64 b = 0; b < seg->h.n_buckets; b++)
            for (u32 j = 0; j < SC_N_SLOTS; j++) {
                item_t it;
                if (!look(seg, &s, &s.buckets[b].entry[j], &it, key) || (it.deadline != 0 && it.deadline <= now))
                    continue;
                print_key(key, it.klen);
                printf("\t%s\t%u\t", SC_TYPE(it.type) < SC_T_CODEC ? types[SC_TYPE(it.type)] : "codec", it.vlen);
                if (it.deadline == 0)
                    puts("-");
                else
                    printf("%llu\n", (unsigned long long)(it.deadline - now));
            }
    }
}

/* Maps by path or @id, read-only. NULL on success, else what failed; errno says why. */
static const char *attach(const char *what, segment_t *seg)
{
    if (what[0] == '@') {
        int id = atoi(what + 1);
        struct shmid_ds ds;
        void *at = shmctl(id, IPC_STAT, &ds) == 0 ? shmat(id, NULL, SHM_RDONLY) : (void *)-1;
        if (at == (void *)-1)
            return "shmat";
        seg->base = (const u8 *)at;
        seg->size = ds.shm_segsz;
        return NULL;
    }
    struct stat st;
    int fd = open(what, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) != 0)
        return "open";
    void *at = st.st_size > 0 ? mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0) : MAP_FAILED;
    close(fd);
    if (at == MAP_FAILED)
        return "mmap";
    seg->base = (const u8 *)at;
    seg->size = (u64)st.st_size;
    return NULL;
}

int main(int argc, char **argv)
{
    segment_t seg;
    if (argc != 2) {
        fprintf(stderr, "usage: read_segment /dev/shm/shmcache.NAME | @SHMID\n");
        return 2;
    }
    const char *why = attach(argv[1], &seg);
    if (why != NULL) {
        perror(why);
        return 1;
    }
    why = believe(&seg);
    if (why != NULL) {
        fprintf(stderr, "read_segment: %s is no segment to read: %s\n", argv[1], why);
        return 1;
    }
    list(&seg);
    return fflush(stdout) == 0 ? 0 : 1;
}
