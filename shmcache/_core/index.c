/* index.c - buckets: finding, placing and displacing entries under the guard.
 *
 * An entry is the only truth about what is stored.  A displacement copies an entry to its other bucket, raises `moves` of
 * both, then clears the old one; a kill in between leaves two equal entries, which every later set, delete and step
 * clears (W2): both point at the same item, so either may go. */
#include "heap.h"

/* An entry that counts as an empty slot: none, or of a page flushed by clear(). */
int sc_entry_dead(const sc_table_t *t, const sc_shard_t *s, u64 e)
{
    if (e == 0)
        return 1;
    u32 page = SC_ENTRY_PAGE(e);
    return page >= t->n_pages || SC_LIFE_SEQ(SC_LD(&s->life[page])) <= SC_LD(&s->hard->flush_seq);
}

/* Coarse code of a deadline: 0 never, else 1 + (deadline / unit) mod 255; unit = max(1 s, clean_period / 64). */
static u64 coarse_unit(const sc_table_t *t)
{
    u64 unit = t->h.clean_period_ms / 64u;
    return unit < 1000u ? 1000u : unit;
}
u32 sc_coarse_of(const sc_table_t *t, u64 deadline)
{
    return deadline == 0 ? 0u : 1u + (u32)((deadline / coarse_unit(t)) % 255u);
}
/* 1 = the deadline behind the code may have passed; half of the circle counts as past. */
int sc_coarse_due(const sc_table_t *t, u32 coarse, u64 now)
{
    if (coarse == 0)
        return 0;
    u32 at = (u32)((now / coarse_unit(t)) % 255u);
    return (at + 255u - (coarse - 1u)) % 255u < 128u;
}

/* R3: the displacement that was killed may not have raised `moves`; a reader between its two looks must see a change. */
static void clear_twin(sc_shard_t *s, u64 *p, u32 b1, u32 b2)
{
    SC_ST_REL(&s->buckets[b1].moves, (u8)(SC_LD(&s->buckets[b1].moves) + 1u));
    SC_ST_REL(&s->buckets[b2].moves, (u8)(SC_LD(&s->buckets[b2].moves) + 1u));
    SC_CRASHPOINT(twin_moves);
    SC_ST_REL(p, 0);
    SC_CRASHPOINT(twin_cleared);
}

/* The entry that points at (page, off) in the buckets of hash h; a second equal one is cleared. */
u64 *sc_index_place_guarded(sc_op_t *op, u64 h, u32 page, u32 off, u32 *bucket, u32 *slot)
{
    sc_table_t *t = op->t;
    u64 place = SC_ENTRY(0, page, off, 0), *found = NULL;
    u32 tag = sc_tag_of(h), b = sc_home_of(h, t->n_buckets), b2 = sc_other_of(b, tag, t->n_buckets);
    for (int turn = 0; turn < 2; turn++, b = b2) {
        for (u32 match = sc_bucket_match(&op->s->buckets[b], tag); match != 0; match &= match - 1) {
            u32 i = sc_match_slot(match);
            u64 *p = &op->s->buckets[b].entry[i];
            if (SC_ENTRY_PLACE(SC_LD(p)) != place)
                continue;
            if (found != NULL) {
                clear_twin(op->s, p, sc_home_of(h, t->n_buckets), b2);
                continue;
            }
            found = p;
            *bucket = b;
            *slot = i;
        }
        if (b2 == b)
            break;
    }
    return found;
}

/* The entry of a key, dead and flushed ones left aside; duplicates are cleared. it describes the item found. */
u64 *sc_index_find_guarded(sc_op_t *op, const sc_key_t *k, sc_item_t *it, u32 *bucket, u32 *slot)
{
    sc_table_t *t = op->t;
    sc_shard_t *s = op->s;
    u64 *found = NULL;
    u32 b = k->b1, b2 = sc_key_b2(t, k);
    for (int turn = 0; turn < 2; turn++, b = b2) {
        for (u32 match = sc_bucket_match(&s->buckets[b], k->tag); match != 0; match &= match - 1) {
            u32 i = sc_match_slot(match);
            u64 *p = &s->buckets[b].entry[i];
            u64 e = SC_LD(p);
            if (sc_entry_dead(t, s, e))
                continue;
            sc_item_t here;
            u32 page = SC_ENTRY_PAGE(e), off = SC_ENTRY_OFF(e);
            int placed = sc_place_ok(t, page, off);
            const u64 *at = (const u64 *)(const void *)sc_at(t, s, page, off);
            if (SC_LIKELY(placed && sc_item_plain(t, at, k->len, page, off, &here))) {
                if (!sc_same(at + 2, k->p, k->len))
                    continue;
            } else if (!placed || !sc_item_load(t, s, page, off, &here)) {
                SC_ST_REL(p, 0); /* rot: an entry that cannot be an item */
                s->soft->stat[SC_SS_REPAIRED]++;
                continue;
            } else if (here.klen != k->len || !sc_item_key_is(t, s, &here, k->p)) {
                continue;
            }
            if (found != NULL) {
                clear_twin(s, p, k->b1, b2);
                continue;
            }
            found = p;
            *it = here;
            *bucket = b;
            *slot = i;
        }
        if (b2 == k->b1)
            break;
    }
    return found;
}

/* W2 for an entry about to be dropped or overwritten: an equal one in the other bucket of its key is cleared first.
 * 1 = p is the only one; 0 = p was the one cleared, its slot is empty and the item stays. */
int sc_index_only_guarded(sc_op_t *op, u64 *p, const sc_item_t *it)
{
    u64 h;
    u32 b, i;
    if (sc_item_keyhash(op->t, op->s, it, &h) > 0)
        (void)sc_index_place_guarded(op, h, it->page, it->off, &b, &i);
    return SC_LD(p) != 0;
}

static int free_slot(const sc_table_t *t, sc_shard_t *s, u32 b)
{
    for (u32 i = 0; i < SC_N_SLOTS; i++)
        if (sc_entry_dead(t, s, SC_LD(&s->buckets[b].entry[i])))
            return (int)i;
    return -1;
}

/* Moves one entry of bucket b to its other bucket if that has room; the freed slot, or -1. */
static int displace(sc_op_t *op, u32 b)
{
    sc_table_t *t = op->t;
    sc_shard_t *s = op->s;
    for (u32 i = 0; i < SC_N_SLOTS; i++) {
        sc_bucket_t *from = &s->buckets[b];
        u64 e = SC_LD(&from->entry[i]);
        u32 to_b = sc_other_of(b, SC_ENTRY_TAG(e), t->n_buckets);
        if (to_b == b)
            continue;
        int j = free_slot(t, s, to_b);
        if (j < 0)
            continue;
        sc_bucket_t *to = &s->buckets[to_b];
        to->freq[j] = SC_LD(&from->freq[i]);
        SC_ST_REL(&to->entry[j], e);
        SC_CRASHPOINT(displaced_copy);
        /* R3: a reader that saw neither copy compares moves of its first bucket; raised between copy and clear */
        SC_ST_REL(&from->moves, (u8)(SC_LD(&from->moves) + 1u));
        SC_ST_REL(&to->moves, (u8)(SC_LD(&to->moves) + 1u));
        SC_CRASHPOINT(displaced_moves);
        SC_ST_REL(&from->entry[i], 0);
        SC_BARRIER();
        SC_CRASHPOINT(displaced);
        if (op->protect == &from->entry[i])
            op->protect = &to->entry[j];
        s->soft->stat[SC_SS_DISPLACED]++;
        return (int)i;
    }
    return -1;
}

/* A slot for a new key: free in the first bucket, in the second, by one displacement, else the least used of the
 * fourteen, expired ones first, whose entry the caller overwrites in one store.  NULL: eviction=none and nothing free. */
u64 *sc_index_slot_guarded(sc_op_t *op, const sc_key_t *k, u32 *bucket, u32 *slot)
{
    sc_table_t *t = op->t;
    sc_shard_t *s = op->s;
    int i;
    u32 b = k->b1, b2 = sc_key_b2(t, k);
    if ((i = free_slot(t, s, b)) >= 0)
        goto out;
    if (b2 != k->b1) {
        b = b2;
        if ((i = free_slot(t, s, b)) >= 0)
            goto out;
        b = k->b1;
        if ((i = displace(op, b)) >= 0)
            goto out;
        b = b2;
        if ((i = displace(op, b)) >= 0)
            goto out;
    }
    u32 best_b = 0, best_i = SC_N_SLOTS, best_score = UINT32_MAX;
    b = k->b1;
    for (int turn = 0; turn < 2; turn++, b = b2) {
        for (u32 j = 0; j < SC_N_SLOTS; j++) {
            u64 *p = &s->buckets[b].entry[j];
            u64 e = SC_LD(p);
            sc_item_t it;
            if (!sc_place_ok(t, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e)) ||
                !sc_item_load(t, s, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e), &it)) {
                SC_ST_REL(p, 0);
                i = (int)j;
                goto out;
            }
            if (sc_expired(op, it.w1)) {
                if (sc_index_only_guarded(op, p, &it)) {
                    sc_drop_guarded(op, p, &it);
                    s->soft->stat[SC_SS_EXPIRED]++;
                }
                i = (int)j;
                goto out;
            }
            u32 lane = SC_LIFE_LANE(SC_LD(&s->life[SC_ENTRY_PAGE(e)]));
            u32 score = (u32)SC_LD(&s->buckets[b].freq[j]) * 2u + (lane >= SC_LANE_MAIN ? 1u : 0u);
            if (score < best_score) {
                best_score = score;
                best_b = b;
                best_i = j;
            }
        }
        if (b2 == k->b1)
            break;
    }
    if ((t->h.flags & SC_F_NO_EVICT) || best_i == SC_N_SLOTS)
        return NULL;
    b = best_b;
    i = (int)best_i;
    u64 *victim = &s->buckets[b].entry[i];
    sc_item_t it;
    if (sc_item_load(t, s, SC_ENTRY_PAGE(SC_LD(victim)), SC_ENTRY_OFF(SC_LD(victim)), &it))
        (void)sc_index_only_guarded(op, victim, &it);
out:
    *bucket = b;
    *slot = (u32)i;
    return &s->buckets[b].entry[i];
}

/* Takes an item out of the index: delete, expiry, eviction. COMMIT is the store of 0; it describes the item. */
void sc_drop_guarded(sc_op_t *op, u64 *entry, const sc_item_t *it)
{
    SC_ST_REL(entry, 0);
    SC_BARRIER();
    SC_CRASHPOINT(dropped);
    sc_account_dead_guarded(op, it->page, it);
    if (op->t->h.flags & SC_F_SECURE)
        sc_item_wipe_guarded(op, it->page, it->off);
}
