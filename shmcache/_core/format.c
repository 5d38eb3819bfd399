/* format.c - geometry: planning it, writing it, believing it.
 *
 * A header is believed only as a whole: magic, byte order, layout version, checksum, then every derived offset is computed
 * anew and must fit the size of the mapping.  Handles use their private copy from then on. */
#include "guard.h"
#include "heap.h"
#include <stdio.h>
#include <stdlib.h>

#define MIN_SHARD (128u * 1024u) /* 24 pages of 4 KiB and their tables: six lanes, a reserve, and room to move */
#define MIN_PAGES 24u
#define GHOSTS_PER_BUCKET 3u     /* 12 bytes a bucket: history of about 60 % of the items kept; 4 and 2 miss as often */
#define LOAD_PERCENT 70u         /* index load if all items were of item_size; those kept are smaller than those set, and
                                    above 80 % full buckets drop items that memory had room for */
#define RESERVE_SHARE 128u       /* one page in so many is kept free: 0.8 % of memory; 64 costs 0.8 % more for no gain */

static u64 round_up(u64 v, u64 to) { return (v + to - 1) / to * to; }
static u64 pow2_floor(u64 v) { return v == 0 ? 0 : 1ull << (63 - __builtin_clzll(v)); }
static u64 clamp64(u64 v, u64 lo, u64 hi) { return v < lo ? lo : v > hi ? hi : v; }
static u64 pow2_near(u64 v)
{
    u64 lo = pow2_floor(v);
    return lo == 0 ? 1 : v - lo > 2 * lo - v ? 2 * lo : lo;
}
static u32 bucket_round(u64 n)
{
    if (n < SC_GROUP) {
        u64 p = pow2_floor(n);
        return (u32)clamp64(p == n ? p : p * 2, SC_MIN_BUCKETS, SC_GROUP);
    }
    return (u32)round_up(n, SC_GROUP);
}

typedef struct {
    u64 guard, hard, soft, leases, life, next, birth, ghost, buckets, pages, end;
} places_t;
static void places(const sc_header_t *h, places_t *p)
{
    u64 np = h->n_pages;
    p->guard = 0;
    p->hard = p->guard + sizeof(sc_guard_word_t);
    p->soft = p->hard + sizeof(sc_hard_t);
    p->leases = p->soft + sizeof(sc_soft_t);
    p->life = p->leases + (u64)h->n_leases * sizeof(sc_lease_t);
    p->next = p->life + np * 8;
    p->birth = p->next + np * 4;
    p->ghost = p->birth + np * 4;
    p->buckets = round_up(p->ghost + (u64)h->n_ghosts * 4, SC_LINE);
    p->pages = p->buckets + (u64)h->n_buckets * sizeof(sc_bucket_t);
    p->end = p->pages + np * h->page_size;
}

const char *sc_plan(const sc_want_t *want, sc_header_t *h, char *msg, size_t len)
{
    u64 size = want->size / 4096u * 4096u;
#define REFUSE(...) return snprintf(msg, len, __VA_ARGS__), msg
    if (want->size < SC_MIN_SIZE)
        REFUSE("size: %llu bytes, but a segment needs at least %u", (unsigned long long)want->size, SC_MIN_SIZE);
    if (want->size > SC_MAX_SIZE)
        REFUSE("size: %llu bytes, but a segment holds at most %llu", (unsigned long long)want->size, SC_MAX_SIZE);
    u64 item = want->item_size ? want->item_size : 256u;
    if (item > SC_MAX_VALUE)
        REFUSE("item_size: %llu bytes, but an item holds at most %u", (unsigned long long)item, SC_MAX_VALUE);
    u64 shards = want->guards ? want->guards : clamp64(pow2_floor(size >> 23), 1, 64);
    if ((shards & (shards - 1)) != 0)
        REFUSE("guards: %llu, but their number must be a power of two", (unsigned long long)shards);
    if (shards > SC_MAX_SHARDS)
        REFUSE("guards: %llu, but there can be at most %u", (unsigned long long)shards, SC_MAX_SHARDS);
    if (want->buckets && shards > want->buckets)
        REFUSE("guards: %llu, but there are only %llu buckets", (unsigned long long)shards,
               (unsigned long long)want->buckets);
    u64 workers = want->workers ? want->workers : clamp64(size >> 16, 32, SC_MAX_WORKERS);
    if (workers > SC_MAX_WORKERS)
        REFUSE("workers: %llu, but there can be at most %u", (unsigned long long)workers, SC_MAX_WORKERS);
    u64 shard_off = round_up(SC_WORKER_OFF + workers * sizeof(sc_worker_t), 4096);
    u64 shard = shard_off >= size ? 0 : (size - shard_off) / shards / SC_LINE * SC_LINE;
    if (shard < MIN_SHARD)
        REFUSE("guards: %llu in a segment of %llu bytes leave %llu bytes a shard, but a shard needs at least %u",
               (unsigned long long)shards, (unsigned long long)size, (unsigned long long)shard, MIN_SHARD);
    u64 page = clamp64(pow2_near(shard / 2048u), SC_MIN_PAGE, SC_MAX_PAGE);
    u64 leases = clamp64(pow2_floor(shard >> 16), 64, 1024);
    u64 nb;
    if (want->buckets) {
        u64 each = (want->buckets + shards - 1) / shards;
        if (each > shard / sizeof(sc_bucket_t))
            REFUSE("buckets: %llu need %llu bytes, but the segment has %llu", (unsigned long long)want->buckets,
                   (unsigned long long)(each * shards * sizeof(sc_bucket_t)), (unsigned long long)size);
        nb = bucket_round(each);
    } else {
        u64 stored = round_up(item + SC_ITEM_HEADER + 4u, 8);
        u64 per_bucket = sizeof(sc_bucket_t) + 4u * GHOSTS_PER_BUCKET + SC_N_SLOTS * LOAD_PERCENT * stored / 100u;
        nb = shard / per_bucket;
        nb = nb < SC_GROUP ? bucket_round(nb) : (nb + SC_GROUP / 2) / SC_GROUP * SC_GROUP;
    }
    h->size = size;
    h->n_shards = (u32)shards;
    h->n_workers = (u32)workers;
    h->n_leases = (u32)leases;
    h->n_buckets = (u32)nb;
    h->n_ghosts = (u32)nb * GHOSTS_PER_BUCKET;
    h->item_size = (u32)item;
    h->page_size = (u32)page;
    h->n_pages = 0;
    h->shard_off = shard_off;
    h->shard_size = shard;
    h->n_sems = 1 + h->n_shards + h->n_workers;
    places_t p;
    places(h, &p);
    if (p.pages + SC_LINE > shard || (h->n_pages = (u32)((shard - p.pages - SC_LINE) / (page + 16u))) < MIN_PAGES)
        REFUSE("buckets: %llu leave %u pages of %llu bytes a shard for items, but %u are needed",
               (unsigned long long)(nb * shards), h->n_pages, (unsigned long long)page, MIN_PAGES);
    u64 most = (u64)h->n_pages * page / 4u;
    if (most > SC_MAX_VALUE)
        most = SC_MAX_VALUE;
    if (want->max_value > most)
        REFUSE("max_value: %llu bytes, but a quarter of a shard, the most one value may take, is %llu",
               (unsigned long long)want->max_value, (unsigned long long)most);
    h->max_value = want->max_value ? want->max_value : most;
    return NULL;
#undef REFUSE
}

u64 sc_header_sum(const sc_header_t *h)
{
    static const u64 fixed[2] = {0x736863616368656Bull, 0x6865616465727331ull};
    sc_secret_t sec;
    sc_secret_init(&sec, fixed);
    return sc_hash(&sec, h, offsetof(sc_header_t, checksum), 0);
}

/* Lays a fresh, zeroed mapping out; the state word is stored last: COPY if that is wanted, else READY. */
void sc_format(u8 *base, const sc_header_t *wanted)
{
    sc_header_t h = *wanted;
    memcpy(h.magic, SC_MAGIC, 8);
    h.layout_version = SC_LAYOUT_VERSION;
    h.byte_order = SC_BYTE_ORDER;
    h.state = SC_STATE_INIT;
    h.checksum = sc_header_sum(&h);
    memcpy(base, &h, sizeof h);
    places_t p;
    places(&h, &p);
    for (u32 i = 0; i < h.n_shards; i++) {
        u8 *shard = base + h.shard_off + (u64)i * h.shard_size;
        sc_hard_t *hard = (sc_hard_t *)(void *)(shard + p.hard);
        sc_soft_t *soft = (sc_soft_t *)(void *)(shard + p.soft);
        for (u32 lane = 0; lane < SC_N_LANES; lane++)
            hard->tail[lane] = SC_POS(SC_NO_PAGE, 0);
        soft->n_free = h.n_pages;
        u32 stored = (u32)round_up((u64)h.item_size + SC_ITEM_HEADER + 4u, 8);
        soft->mean_log2 = (31u - (u32)__builtin_clz(stored)) << 16;
    }
    SC_ST_REL(&((sc_header_t *)(void *)base)->state, wanted->state == SC_STATE_COPY ? SC_STATE_COPY : SC_STATE_READY);
}

const char *sc_header_check(const u8 *base, u64 size, sc_header_t *out, int *mismatch, char *msg, size_t len)
{
    sc_header_t h;
    *mismatch = 0;
#define REFUSE(...) return snprintf(msg, len, __VA_ARGS__), msg
    if (size < SC_HEADER_SIZE)
        REFUSE("size: %llu bytes, but a header takes %u", (unsigned long long)size, SC_HEADER_SIZE);
    u32 state = SC_LD_ACQ(&((const sc_header_t *)(const void *)base)->state);
    sc_copy(&h, base, sizeof h);
    h.name[sizeof h.name - 1] = 0;
    if (memcmp(h.magic, SC_MAGIC, 8) != 0)
        REFUSE("magic: found %02x%02x%02x%02x%02x%02x%02x%02x, wanted \"%s\"", (u8)h.magic[0], (u8)h.magic[1],
               (u8)h.magic[2], (u8)h.magic[3], (u8)h.magic[4], (u8)h.magic[5], (u8)h.magic[6], (u8)h.magic[7], SC_MAGIC);
    if (h.byte_order != SC_BYTE_ORDER) {
        *mismatch = 1;
        REFUSE("byte order: found 0x%08x, wanted 0x%08x", h.byte_order, SC_BYTE_ORDER);
    }
    if (h.layout_version != SC_LAYOUT_VERSION) {
        *mismatch = 1;
        REFUSE("layout version: found %u, wanted %u", h.layout_version, SC_LAYOUT_VERSION);
    }
    if (state != SC_STATE_READY && state != SC_STATE_COPY)
        REFUSE("state: found 0x%08x, wanted READY (0x%08x): its creator has not finished", state, SC_STATE_READY);
    u64 sum = sc_header_sum(&h);
    if (sum != h.checksum)
        REFUSE("header checksum: found %016llx, wanted %016llx", (unsigned long long)h.checksum,
               (unsigned long long)sum);
    if (h.size > size) {
        *mismatch = 1;
        REFUSE("size: the header says %llu bytes, the segment has %llu", (unsigned long long)h.size,
               (unsigned long long)size);
    }
    int ok = h.n_shards >= 1 && h.n_shards <= SC_MAX_SHARDS && (h.n_shards & (h.n_shards - 1)) == 0 &&
             h.n_workers >= 1 && h.n_workers <= SC_MAX_WORKERS && h.page_size >= SC_MIN_PAGE &&
             h.page_size <= SC_MAX_PAGE && (h.page_size & (h.page_size - 1)) == 0 && h.n_pages >= MIN_PAGES &&
             h.n_pages < SC_NO_PAGE && h.n_buckets >= SC_MIN_BUCKETS && h.n_buckets < (1u << 28) &&
             (h.n_buckets % SC_GROUP == 0 || (h.n_buckets < SC_GROUP && (h.n_buckets & (h.n_buckets - 1)) == 0)) &&
             h.n_leases >= 1 && h.n_leases <= 65536 && h.n_ghosts <= h.n_buckets * 64ull &&
             h.max_value <= SC_MAX_VALUE && h.n_sems == 1 + h.n_shards + h.n_workers &&
             (h.guard_kind == SC_GUARD_FAST || h.guard_kind == SC_GUARD_SEMAPHORE) &&
             h.shard_off >= SC_WORKER_OFF + (u64)h.n_workers * sizeof(sc_worker_t) && h.shard_off % 64 == 0 &&
             h.shard_size % 64 == 0 && h.shard_off <= h.size && h.shard_size <= h.size &&
             h.shard_off + (u64)h.n_shards * h.shard_size <= h.size;
    places_t p;
    places(&h, &p);
    if (!ok || p.end > h.shard_size)
        REFUSE("geometry: %u shards of %llu bytes with %u buckets and %u pages of %u bytes do not fit %llu bytes",
               h.n_shards, (unsigned long long)h.shard_size, h.n_buckets, h.n_pages, h.page_size,
               (unsigned long long)h.size);
    *out = h;
    out->state = state;
    return NULL;
#undef REFUSE
}

/* base stays the caller's. NULL: out of memory. */
sc_table_t *sc_table_new(u8 *base, const sc_header_t *h, int readonly)
{
    sc_table_t *t = (sc_table_t *)calloc(1, sizeof(sc_table_t) + h->n_shards * sizeof(sc_shard_t));
    if (t == NULL)
        return NULL;
    t->base = base;
    t->size = h->size;
    t->h = *h;
    t->readonly = readonly;
    t->check_len = (h->flags & SC_F_HEADER_ONLY) ? 0 : 4;
    t->n_shards = h->n_shards;
    t->n_buckets = h->n_buckets;
    t->n_pages = h->n_pages;
    t->page_size = h->page_size;
    t->page_shift = 31u - (u32)__builtin_clz(h->page_size);
    t->reserve = h->n_pages / RESERVE_SHARE < 3u ? 3u : h->n_pages / RESERVE_SHARE;
    t->n_ghosts = h->n_ghosts;
    t->n_leases = h->n_leases;
    t->sem_id = t->shm_id = -1;
    t->control = (sc_control_t *)(void *)(base + SC_CONTROL_OFF);
    t->workers = (sc_worker_t *)(void *)(base + SC_WORKER_OFF);
    t->clock.base_ns = h->clock_base_ns;
    t->clock.shift_ns = sc_time_shift_ns();
    t->clock.frozen_ms = SC_CLOCK_REAL;
    sc_secret_init(&t->secret, h->hash_key);
    places_t p;
    places(h, &p);
    for (u32 i = 0; i < h->n_shards; i++) {
        u8 *at = base + h->shard_off + (u64)i * h->shard_size;
        sc_shard_t *s = &t->shard[i];
        s->guard = (sc_guard_word_t *)(void *)(at + p.guard);
        s->hard = (sc_hard_t *)(void *)(at + p.hard);
        s->soft = (sc_soft_t *)(void *)(at + p.soft);
        s->leases = (sc_lease_t *)(void *)(at + p.leases);
        s->life = (u64 *)(void *)(at + p.life);
        s->next = (u32 *)(void *)(at + p.next);
        s->birth = (u32 *)(void *)(at + p.birth);
        s->ghost = (u32 *)(void *)(at + p.ghost);
        s->buckets = (sc_bucket_t *)(void *)(at + p.buckets);
        s->pages = at + p.pages;
    }
    return t;
}

void sc_table_free(sc_table_t *t)
{
    if (t == NULL)
        return;
    sc_proc_put(t->proc);
    free(t);
}
