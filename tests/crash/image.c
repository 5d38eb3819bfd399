/* image.c - see image.h. */
#include "image.h"
#include <stdlib.h>
#include <unistd.h>

#define TRY 200000ll /* ns a forged guard owner may cost one operation */

image_world_t w;

void say(const char *what)
{
    char line[200];
    int n = snprintf(line, sizeof line, "VIOLATION %s %s at seed %llu image %llu, operation %d\n", w.label, what,
                     (unsigned long long)w.seed, (unsigned long long)w.image, w.where);
    if (write(1, line, (size_t)n) < 0)
        _exit(8);
}

u64 draw(void)
{
    u64 v = 0;
    if (w.tape == NULL)
        return rig_next(&w.rng);
    for (u32 i = 0; i < 8 && w.tape < w.tape_end; i++)
        v = v << 8 | *w.tape++;
    return v;
}
u32 below(u32 n)
{
    u32 v = 0;
    if (w.tape == NULL)
        return rig_below(&w.rng, n);
    for (u32 most = n - 1; most > 0 && w.tape < w.tape_end; most >>= 8)
        v = v << 8 | *w.tape++;
    return v % n;
}
int tape_over(void) { return w.tape == w.tape_end; }

void image_init(void)
{
    w.buf = (u8 *)malloc(1u << 20);
    w.keybuf = (u8 *)malloc(SC_MAX_KEY + 8);
    if (w.buf == NULL || w.keybuf == NULL)
        exit(3);
}

static u64 any_word(const u8 *base, u64 size)
{
    u64 v;
    memcpy(&v, base + (draw() % (size / 8)) * 8, 8);
    return v;
}

void mutate(const sc_table_t *t, u8 *base)
{
    const sc_shard_t *s = &t->shard[below(t->n_shards)];
    u64 at, n = t->size - SC_HEADER_SIZE;
    switch (below(14)) {
    case 0: case 1: at = (u64)((u8 *)s->hard - base) + below(sizeof(sc_hard_t)); break;
    case 2: case 3: at = (u64)((u8 *)s->life - base) + below(t->n_pages * 8); break;
    case 4: case 5: at = (u64)((u8 *)s->next - base) + below(t->n_pages * 4); break;
    case 6: at = (u64)((u8 *)s->buckets - base) + below(t->n_buckets * 64); break;
    case 7: case 8: case 9: { /* an item that an entry points at: header, key, value, check */
        u64 e = s->buckets[below(t->n_buckets)].entry[below(SC_N_SLOTS)];
        if (e == 0 || !sc_place_ok(t, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e))) {
            at = (u64)((u8 *)s->buckets - base) + below(t->n_buckets * 64);
            break;
        }
        at = (u64)(sc_at(t, s, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e)) - base) + below(below(3) ? 16 : 200);
        break;
    }
    case 10: at = (u64)((u8 *)s->soft - base) + below(sizeof(sc_soft_t)); break;
    case 11: at = (u64)((u8 *)s->guard - base) + below(12); break;
    case 12: at = SC_CONTROL_OFF + 64 + below(8192); break; /* sweep election, worker table */
    default: at = SC_HEADER_SIZE + 64 + draw() % (n - 64); break;
    }
    if (at >= t->size - 8)
        at = t->size - 8;
    static const u64 edges[] = {0, 1, 7, 8, 0xFF, 0xFFFF, 0x10000, 0xFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, ~0ull, 4096, 4095, 16};
    u64 v;
    switch (below(6)) {
    case 0: base[at] = (u8)(base[at] ^ (1u << below(8))); break;
    case 1: base[at] = (u8)draw(); break;
    case 2: v = draw(); memcpy(base + (at & ~7ull), &v, 8); break;
    case 3: v = edges[below(14)]; memcpy(base + (at & ~7ull), &v, 8); break;
    case 4: v = any_word(base, t->size); memcpy(base + (at & ~7ull), &v, 8); break;
    default: v = edges[below(14)]; memcpy(base + (at & ~3ull), &v, 4); break;
    }
}

/* Whether these bytes were ever set for the key by the scene or by this harness. */
static void judge(u64 id, const rig_found_t *f, const u8 *p)
{
    const scene_item_t *m = id < SCENE_ITEMS ? &w.c->item[id] : NULL;
    w.hits++;
    if (SC_TYPE(f->type) == SC_T_INT) {
        if (id >= SCENE_ITEMS || m->is_num || id == 0)
            w.numbers++;
        else if (w.bad++ < 5)
            say("a number for a key that never held one");
        return;
    }
    for (u64 v = 0; v <= 40 && f->type == SC_T_BYTES; v++)
        if (rig_is(p, f->vlen, id, v) && (f->vlen > 0 || id == 0 || id >= 600 || (m != NULL && m->vlen == 0))) {
            if (m != NULL && v != m->version)
                w.superseded++;
            return;
        }
    if (w.c->want.flags & SC_F_HEADER_ONLY)
        return; /* integrity=header promises 8 bits over header and key, nothing over the value */
    if (w.bad++ < 5) {
        say("a value that was never set for its key");
        fprintf(stderr, "    key %llu, length %u, type %u\n", (unsigned long long)id, f->vlen, f->type);
    }
}

static void key_of(const sc_table_t *t, u64 id, sc_key_t *k, u8 *buf) { sc_key_init(t, k, buf, rig_key(buf, id, 24)); }

void read_one(sc_table_t *t, u64 id)
{
    u8 buf[64];
    sc_key_t k;
    rig_found_t f;
    key_of(t, id, &k, buf);
    w.reads++;
    if (rig_get(t, &k, w.buf, &f) == SC_HIT)
        judge(id, &f, w.buf);
}

void walk(sc_table_t *t)
{
    static u64 entries[SC_GROUP * SC_N_SLOTS];
    static u32 where[SC_GROUP * SC_N_SLOTS];
    static u8 moves[SC_GROUP];
    u32 g = below(sc_n_groups(t)), n = sc_group_entries(t, g, entries, where, moves);
    for (u32 i = 0; i < n; i++) {
        sc_seen_t s;
        (void)sc_see(t, g, where[i], entries[i], &s, w.keybuf);
    }
    (void)sc_group_moved(t, g, moves);
}

void write_one(sc_table_t *t, u64 id)
{
    static const u32 sizes[] = {0, 10, 100, 900, 3000, 9000, 20000};
    u8 buf[64];
    sc_key_t k;
    i64 num;
    u64 owner = 0, fence, cursor = 0, n = 0;
    key_of(t, id, &k, buf);
    int outside = id >= 600; /* keys of the scene never get an empty value or a number */
    u32 len = sizes[outside ? below(7) : 1 + below(6)];
    sc_value_t v = {w.buf, 5, len, SC_T_BYTES, below(3) ? 0 : SCENE_NOW + 50000, 0};
    sc_cond_t c = {.mode = SC_SET};
    int rc = SC_OK;
    w.where = (int)(100 + below(12));
    switch (w.where - 100) {
    case 0: rc = sc_delete(t, &k, NULL, &num, TRY); break;
    case 1:
        if (outside)
            rc = sc_incr(t, &k, 3, 1, 0, 0, &num, TRY);
        break;
    case 2: rc = sc_touch(t, &k, SCENE_NOW + 777, NULL, TRY); break;
    case 3: rc = sc_clear_shard(t, k.shard, TRY); break;
    case 4: rc = sc_clean(t, UINT64_MAX, &cursor, &n, TRY); break;
    case 5: rc = sc_lease_take(t, id + 1, 1000, &owner, &fence, TRY); break;
    case 6: sc_tick(t); break;
    case 7: c.mode = SC_ADD; /* fall through */
    default:
        rig_fill(w.buf, len, id, 3 + below(30));
        rc = sc_store(t, &k, &v, &c, TRY);
    }
    w.busy += rc == SC_BUSY;
}
