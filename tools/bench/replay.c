/* replay.c - replays a request trace through the core on private memory with a clock of its own.
 *
 *   replay TRACE SIZE ITEM_SIZE GUARDS SEED CLEAN_PERIOD_MS FLAGS
 *
 * TRACE is a flat SCT1 file (format: tools/bench/traces.py); ITEM_SIZE 0 takes the mean payload of the trace's keys at
 * their first appearance; GUARDS 0 takes the core's own choice; FLAGS are those of the segment header.  One JSON object
 * goes to stdout.
 *
 *   I1  The replay is deterministic: fixed hash key, no wall clock, one thread.  Equal arguments give equal counts.
 *   I2  Within one second of the trace the clock advances evenly over its requests, as it would for a live server, but
 *       deadlines count from the whole second: an item with ttl n is gone from second t+n on, as the replay rule says.
 *   I3  A hit must return the bytes stored last for that key; anything else ends the replay with exit status 3.
 *
 * Not here: the Python layer, processes, contention. */
#include "drive.h"
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

enum { GET, SET, DELETE, INCR };

typedef struct {
    u64 n;
    u32 nkeys;
    const u32 *t, *key, *size, *ttl;
    const u8 *op, *klen;
} trace_t;

static trace_t load(const char *path)
{
    trace_t tr;
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) != 0)
        die(path, strerror(errno));
    if (st.st_size < 16)
        die(path, "SCT1: at least 16 bytes wanted");
    const u8 *p = (const u8 *)mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED)
        die(path, strerror(errno));
    close(fd);
    memcpy(&tr.nkeys, p + 4, 4);
    memcpy(&tr.n, p + 8, 8);
    if (memcmp(p, "SCT1", 4) != 0 || tr.n > (1ull << 40) || 16 + tr.n * 18 != (u64)st.st_size)
        die(path, "SCT1: magic and 16 + 18 bytes a request wanted");
    tr.t = (const u32 *)(const void *)(p + 16);
    tr.key = tr.t + tr.n;
    tr.size = tr.key + tr.n;
    tr.ttl = tr.size + tr.n;
    tr.op = (const u8 *)(tr.ttl + tr.n);
    tr.klen = tr.op + tr.n;
    for (u64 i = 0; i < tr.n; i++)
        if (tr.key[i] >= tr.nkeys || tr.op[i] > INCR || tr.size[i] > SC_MAX_VALUE || (i > 0 && tr.t[i] < tr.t[i - 1]))
            die(path, "SCT1: key below nkeys, op 0..3, size below 2**28 and time not falling wanted");
    return tr;
}

/* ---- keys and values ---------------------------------------------------------------------------------------------- */

static u32 make_key(u8 *buf, u32 id, u32 klen, u32 nkeys)
{
    u32 least = nkeys <= 256 ? 1 : nkeys <= 65536 ? 2 : nkeys <= 16777216 ? 3 : 4;
    if (klen < least)
        klen = least;
    memset(buf, 'k', klen);
    for (u32 i = 0; i < least; i++)
        buf[i] = (u8)(id >> (8 * i));
    return klen;
}
/* The first up to eight bytes of a value say whose it is and which. */
static u64 stamp(u32 id, u32 version) { return ((u64)id << 32 | version) * 0x9E3779B97F4A7C15ull | 1u; }

typedef struct {
    u64 hits, misses, refused, no_space, sets, over;
} count_t;

static void store(sc_table_t *t, const sc_key_t *k, u8 *pool, u32 size, u64 deadline, u64 mark, count_t *c)
{
    sc_cond_t cond;
    memset(&cond, 0, sizeof cond);
    memcpy(pool, &mark, 8);
    sc_value_t v = {pool, 0, size, SC_T_BYTES, deadline, 0};
    const u64 *moved = &t->shard[k->shard].soft->stat[SC_SS_BYTES_MOVED];
    u64 before = *moved;
    int rc = sc_store(t, k, &v, &cond, WAIT_NS);
    u64 allowed = 65536u + 2u * (u64)sc_item_total(k->len, size, 0, SC_T_BYTES, t->check_len), did = *moved - before;
    if (did > allowed && did - allowed > c->over)
        c->over = did - allowed;
    if (rc == SC_TOO_LARGE)
        c->refused++;
    else if (rc == SC_NO_SPACE)
        c->no_space++;
    else if (rc != SC_OK)
        die("set", "a guard or its segment was lost");
    else
        c->sets++;
    sc_tick(t);
}

static int fetch(sc_table_t *t, const sc_key_t *k, u8 *buf, u32 room, u64 mark, u32 size)
{
    sc_found_t f;
    for (;;) {
        if (sc_get_begin(t, k, &f) != SC_HIT)
            return 0;
        if (f.it.vlen > room || f.it.vlen != size)
            exit(3);
        int rc = sc_get_finish(t, k, &f, buf, 1);
        if (rc == SC_AGAIN)
            continue;
        if (rc != SC_HIT)
            return 0;
        if (memcmp(buf, &mark, f.it.vlen < 8 ? f.it.vlen : 8) != 0)
            exit(3);
        return 1;
    }
}

static void live(sc_table_t *t, u64 *items, u64 *bytes)
{
    u32 groups = sc_n_groups(t), *where = (u32 *)malloc(SC_GROUP * SC_N_SLOTS * sizeof(u32));
    u64 *entries = (u64 *)malloc(SC_GROUP * SC_N_SLOTS * sizeof(u64));
    u8 moves[SC_GROUP], keybuf[SC_MAX_KEY];
    *items = *bytes = 0;
    for (u32 g = 0; entries != NULL && where != NULL && g < groups; g++) {
        u32 n = sc_group_entries(t, g, entries, where, moves);
        for (u32 i = 0; i < n; i++) {
            sc_seen_t seen;
            if (sc_see(t, g, where[i], entries[i], &seen, keybuf) != SC_HIT)
                continue;
            (*items)++;
            *bytes += (u64)seen.f.it.klen + seen.f.it.vlen;
        }
    }
    free(entries);
    free(where);
}

int main(int argc, char **argv)
{
    if (argc != 8)
        die("usage", "TRACE SIZE ITEM_SIZE GUARDS SEED CLEAN_PERIOD_MS FLAGS");
    trace_t tr = load(argv[1]);
    u64 item_size = number(argv[3]), payload = 0, distinct = 0;
    u32 *version = (u32 *)calloc(tr.nkeys + 1ull, 4), *stored = (u32 *)calloc(tr.nkeys + 1ull, 4), largest = 64;
    u8 *seen = (u8 *)calloc(tr.nkeys + 1ull, 1), *length = (u8 *)calloc(tr.nkeys + 1ull, 1);
    if (version == NULL || stored == NULL || seen == NULL || length == NULL)
        die("memory", "not enough");
    for (u64 i = 0; i < tr.n; i++) {
        u32 size = tr.op[i] == INCR ? 8u : tr.size[i];
        if (size > largest)
            largest = size;
        if (seen[tr.key[i]]++ != 0)
            seen[tr.key[i]] = 1;
        else {
            length[tr.key[i]] = tr.klen[i];
            payload += size + (u64)tr.klen[i];
            distinct++;
        }
    }
    u64 mean = distinct ? (payload + distinct / 2) / distinct : 256;
    sc_table_t *t = open_table(number(argv[2]), item_size ? item_size : mean, number(argv[4]), number(argv[5]),
                               number(argv[6]), (u32)number(argv[7]));
    u8 *pool = (u8 *)malloc(largest + 64ull), *buf = (u8 *)malloc(largest + 64ull), keybuf[256];
    if (pool == NULL || buf == NULL)
        die("memory", "not enough");
    for (u32 i = 0; i < largest + 64u; i++)
        pool[i] = (u8)(i * 2654435761u >> 24);

    count_t c;
    memset(&c, 0, sizeof c);
    u64 asked = 0, begin = 0, end = 0;
    i64 started = sc_clock_mono_ns();
    for (u64 i = 0; i < tr.n; i++) {
        u32 id = tr.key[i], size = tr.size[i];
        if (i == end) /* the next second: requests begin..end-1 */
            for (begin = i; end < tr.n && tr.t[end] == tr.t[i]; end++)
                ;
        t->clock.frozen_ms = (i64)(BIRTH_MS + tr.t[i] * 1000ull + (i - begin) * 1000ull / (end - begin)); /* I2 */
        u64 deadline = tr.ttl[i] ? BIRTH_MS + ((u64)tr.t[i] + tr.ttl[i]) * 1000u : 0;
        if (deadline > SC_MAX_DEADLINE)
            deadline = SC_MAX_DEADLINE;
        sc_key_t k;
        sc_key_init(t, &k, keybuf, make_key(keybuf, id, length[id], tr.nkeys));
        if (tr.op[i] == GET || tr.op[i] == SET) {
            if (tr.op[i] == GET) {
                asked++;
                if (fetch(t, &k, buf, largest, stamp(id, version[id]), stored[id])) {
                    c.hits++;
                    continue;
                }
                c.misses++;
            }
            u64 sets = c.sets;
            store(t, &k, pool, size, deadline, stamp(id, version[id] + 1), &c);
            if (c.sets > sets) {
                version[id]++;
                stored[id] = size;
            } else if (tr.op[i] == SET) {
                (void)sc_delete(t, &k, NULL, NULL, WAIT_NS); /* refused: what stands there is outdated */
            }
        } else if (tr.op[i] == DELETE) {
            if (sc_delete(t, &k, NULL, NULL, WAIT_NS) == SC_OK)
                sc_tick(t);
        } else {
            i64 result = 0;
            int rc = sc_incr(t, &k, 1, 1, 0, deadline, &result, WAIT_NS);
            asked++;
            if (rc == SC_OK && result != 1)
                c.hits++;
            else {
                c.misses++;
                c.refused += rc == SC_TOO_LARGE;
                c.no_space += rc == SC_NO_SPACE;
            }
            sc_tick(t);
        }
    }
    double seconds = (double)(sc_clock_mono_ns() - started) / 1e9;

    u64 items, bytes, sum[SC_N_SHARD_STATS] = {0}, most[SC_N_SHARD_STATS] = {0};
    live(t, &items, &bytes);
    for (u32 s = 0; s < t->n_shards; s++)
        for (u32 j = 0; j < SC_N_SHARD_STATS; j++) {
            u64 v = t->shard[s].soft->stat[j];
            sum[j] += v;
            if (v > most[j])
                most[j] = v;
        }
    printf("{\"requests\": %llu, \"keys\": %llu, \"asked\": %llu, \"hits\": %llu, \"misses\": %llu, \"mean_payload\": %llu, "
           "\"item_size\": %u, \"guards\": %u, \"buckets\": %llu, \"page_size\": %u, \"pages\": %llu, \"size\": %llu, "
           "\"max_value\": %llu, \"refused\": %llu, \"no_space\": %llu, ",
           (unsigned long long)tr.n, (unsigned long long)distinct, (unsigned long long)asked, (unsigned long long)c.hits,
           (unsigned long long)c.misses, (unsigned long long)mean, t->h.item_size, t->n_shards,
           (unsigned long long)t->n_shards * t->n_buckets, t->page_size, (unsigned long long)t->n_shards * t->n_pages,
           (unsigned long long)t->size, (unsigned long long)t->h.max_value, (unsigned long long)c.refused,
           (unsigned long long)c.no_space);
    printf("\"live_items\": %llu, \"live_bytes\": %llu, \"bytes_set\": %llu, \"bytes_moved\": %llu, \"evicted\": %llu, "
           "\"evicted_index\": %llu, \"expired\": %llu, \"repaired\": %llu, \"max_steps\": %llu, \"max_moved\": %llu, "
           "\"moved_over\": %llu, \"largest\": %u, \"seconds\": %.3f}\n",
           (unsigned long long)items, (unsigned long long)bytes, (unsigned long long)sum[SC_SS_BYTES_SET],
           (unsigned long long)sum[SC_SS_BYTES_MOVED], (unsigned long long)sum[SC_SS_EVICTED],
           (unsigned long long)sum[SC_SS_EVICTED_INDEX], (unsigned long long)sum[SC_SS_EXPIRED],
           (unsigned long long)sum[SC_SS_REPAIRED], (unsigned long long)most[SC_SS_MAX_STEPS],
           (unsigned long long)most[SC_SS_MAX_MOVED], (unsigned long long)c.over, largest, seconds);
    sc_table_free(t);
    return 0;
}
