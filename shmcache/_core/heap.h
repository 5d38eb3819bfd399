/* heap.h - the log of a shard: pages, lanes, items.  All of it under the shard's guard, except the loaders. */
#ifndef SC_HEAP_H
#define SC_HEAP_H
#include "table.h"

/* One write operation on one shard, guard held. */
typedef struct {
    sc_table_t *t;
    sc_shard_t *s;
    u64 now;      /* ms since birth; 0 = not asked yet */
    u64 seq0;     /* page counter when the running reserve began: pages above it are its own and are not free (W1) */
    u64 *protect; /* entry of the key being set: never a victim of its own set */
    u32 steps, moved_items;
    u64 moved_bytes, passed_bytes;
    u32 blocked;                   /* bit per lane whose head item can neither go nor stay */
    u32 cramped;                   /* bit per lane whose head item found no pages to be compacted to */
    u64 head_seen[SC_N_LANES];     /* head position + 1 that head_dead and head_hash speak of */
    u64 head_hash[SC_N_LANES];     /* hash of the key at that head, 0 = not asked */
    u8 head_dead[SC_N_LANES];
} sc_op_t;

static inline void sc_op_begin(sc_op_t *op, sc_table_t *t, u32 shard)
{
    memset(op, 0, sizeof *op);
    op->t = t;
    op->s = &t->shard[shard];
    op->seq0 = op->s->hard->seq;
}
static inline u64 sc_op_now(sc_op_t *op)
{
    if (op->now == 0)
        op->now = sc_clock_now_ms(&op->t->clock);
    return op->now;
}
static inline int sc_expired(sc_op_t *op, u64 w1)
{
    u64 deadline = SC_W1_DEADLINE(w1);
    return deadline != 0 && deadline <= sc_op_now(op);
}
static inline u8 *sc_at(const sc_table_t *t, const sc_shard_t *s, u32 page, u32 off)
{
    return s->pages + ((u64)page << t->page_shift) + off;
}
static inline int sc_lane_owns(const sc_hard_t *h, u32 lane) { return SC_POS_PAGE(SC_LD(&h->tail[lane])) != SC_NO_PAGE; }

/* Bounds of an entry's place: 1 = may be looked at. */
static inline int sc_place_ok(const sc_table_t *t, u32 page, u32 off)
{
    return page < t->n_pages && off <= t->page_size - SC_ITEM_HEADER && (off & 7u) == 0;
}
/* The usual item, which lies on one page and has no more than key, value and check, is known by its first word alone.
 * 1 = one with a key of klen bytes, it filled; 0 = sc_item_load tells. */
SC_INLINE int sc_item_plain(const sc_table_t *t, const u64 *p, u32 klen, u32 page, u32 off, sc_item_t *it)
{
    u64 w0 = SC_LD(p);
    u32 vlen = SC_W0_VLEN(w0), type = SC_W0_TYPE(w0), voff = SC_ITEM_HEADER + klen;
    u32 total = (voff + vlen + t->check_len + 7u) & ~7u;
    if (SC_UNLIKELY(SC_W0_SHAPE(w0) != SC_W0_KEYED(klen)) || SC_UNLIKELY(SC_TYPE(type) == SC_T_INT) ||
        SC_UNLIKELY(vlen > t->h.max_value) || SC_UNLIKELY(total > t->page_size - off))
        return 0;
    *it = (sc_item_t){w0, SC_LD(p + 1), 0, page, off, klen, vlen, 0, type, voff, total};
    return 1;
}
/* 1 = header within bounds, it filled; 0 = cannot be an item. Follows no chain. */
static inline int sc_item_load(const sc_table_t *t, const sc_shard_t *s, u32 page, u32 off, sc_item_t *it)
{
    const u64 *p = (const u64 *)(const void *)sc_at(t, s, page, off);
    u64 w0 = SC_LD(p), w1 = SC_LD(p + 1);
    it->w0 = w0;
    it->w1 = w1;
    it->page = page;
    it->off = off;
    it->klen = SC_W0_KLEN(w0);
    it->vlen = SC_W0_VLEN(w0);
    it->flags = SC_W0_FLAGS(w0);
    it->type = SC_W0_TYPE(w0);
    it->soft = 0;
    it->voff = sc_item_voff(it->klen, it->flags, it->type);
    it->total = sc_item_total(it->klen, it->vlen, it->flags, it->type, t->check_len);
    if (SC_UNLIKELY(it->klen == 0 || it->vlen > t->h.max_value || it->flags > SC_IF_SOFT ||
                    (SC_TYPE(it->type) == SC_T_INT && it->vlen != 8)))
        return 0;
    if (it->flags & SC_IF_SOFT) {
        if (off + SC_ITEM_HEADER + 8u > t->page_size)
            return 0;
        it->soft = SC_LD(p + 2);
    }
    return 1;
}
static inline int sc_item_flat(const sc_table_t *t, const sc_item_t *it) { return it->off + it->total <= t->page_size; }

/* Copies n bytes that begin skip bytes into the item; 0 if the chain leaves the segment. Safe on racing pages. */
int sc_item_gather(const sc_table_t *t, const sc_shard_t *s, const sc_item_t *it, u32 skip, void *dst, u32 n);
int sc_item_key_is_slow(const sc_table_t *t, const sc_shard_t *s, const sc_item_t *it, const u8 *key);
static inline int sc_item_key_is(const sc_table_t *t, const sc_shard_t *s, const sc_item_t *it, const u8 *key)
{
    u32 skip = SC_ITEM_HEADER + ((it->flags & SC_IF_SOFT) ? 8u : 0u);
    if (SC_LIKELY(sc_item_flat(t, it)))
        return sc_same(sc_at(t, s, it->page, it->off + skip), key, it->klen);
    return sc_item_key_is_slow(t, s, it, key);
}
/* Word at byte skip (8-aligned) of an item, or NULL. */
u64 *sc_item_word(const sc_table_t *t, const sc_shard_t *s, const sc_item_t *it, u32 skip);

/* Both ends of a lane as loaded once and checked (I6). */
typedef struct {
    u32 page, off, tail_page, tail_off;
    u64 seq, tail_seq;
} sc_lane_t;
int sc_lane_ok_guarded(sc_table_t *t, sc_shard_t *s, u32 lane, sc_lane_t *l);
int sc_page_is_free(const sc_table_t *t, const sc_shard_t *s, u32 page);
void sc_heap_recount_guarded(sc_table_t *t, sc_shard_t *s);
void sc_recover_guarded(sc_table_t *t, u32 shard);
u32 sc_heap_need(const sc_table_t *t, const sc_shard_t *s, u32 lane, u32 total);

typedef struct {
    u32 page, off;           /* where the item begins */
    u32 cur_page, cur_off;   /* where the next byte goes */
    u32 end_page, end_off;
    int fresh;               /* the lane owned nothing */
} sc_room_t;
int sc_heap_reserve_guarded(sc_op_t *op, u32 lane, u32 total, sc_room_t *r);
void sc_heap_write_guarded(sc_op_t *op, sc_room_t *r, const void *src, u32 n);
void sc_heap_commit_guarded(sc_op_t *op, u32 lane, const sc_room_t *r);
void sc_item_wipe_guarded(sc_op_t *op, u32 page, u32 off);
int sc_item_copy_guarded(sc_op_t *op, const sc_item_t *it, u32 lane, u32 *page, u32 *off);
int sc_item_keyhash(const sc_table_t *t, const sc_shard_t *s, const sc_item_t *it, u64 *h);

/* A bit for each entry of the bucket that bears the tag, taken apart by sc_match_slot. Only a first look: who acts on an
 * entry loads it again. */
static inline u32 sc_bucket_match(const sc_bucket_t *b, u32 tag)
{
#ifdef SC_SSE2
    const __m128i want = _mm_set1_epi16((short)tag);
    const __m128i *p = (const __m128i *)(const void *)b;
    SC_BARRIER();
    __m128i low = _mm_packs_epi16(_mm_cmpeq_epi16(_mm_load_si128(p), want), _mm_cmpeq_epi16(_mm_load_si128(p + 1), want));
    __m128i high =
        _mm_packs_epi16(_mm_cmpeq_epi16(_mm_load_si128(p + 2), want), _mm_cmpeq_epi16(_mm_load_si128(p + 3), want));
    SC_BARRIER();
    /* four bits a word of the bucket, the highest for its tag; word 0 holds use bits */
    return ((u32)_mm_movemask_epi8(low) | (u32)_mm_movemask_epi8(high) << 16) & 0x88888880u;
#else
    u32 m = 0;
    for (u32 i = 0; i < SC_N_SLOTS; i++)
        m |= (u32)(SC_ENTRY_TAG(SC_LD(&b->entry[i])) == tag) << (4 * i + 7);
    return m;
#endif
}
static inline u32 sc_match_slot(u32 match) { return (u32)(__builtin_ctz(match) >> 2) - 1u; }

/* evict.c */
int sc_room_guarded(sc_op_t *op, u32 lane, u32 total);
u32 sc_reclaim_guarded(sc_op_t *op, u32 max_steps);
u32 sc_main_lane(u64 now, u64 deadline);
u32 sc_lane_of_new(sc_op_t *op, const sc_key_t *k, u64 deadline, u32 total, u32 old_lane, u32 old_freq, int had_old);
void sc_mean_add(sc_op_t *op, u32 total);
void sc_ghost_add(sc_op_t *op, u64 h);
void sc_account_dead_guarded(sc_op_t *op, u32 page, const sc_item_t *it);

/* index.c */
u64 *sc_index_place_guarded(sc_op_t *op, u64 h, u32 page, u32 off, u32 *bucket, u32 *slot);
int sc_index_only_guarded(sc_op_t *op, u64 *p, const sc_item_t *it);
u64 *sc_index_find_guarded(sc_op_t *op, const sc_key_t *k, sc_item_t *it, u32 *bucket, u32 *slot);
u64 *sc_index_slot_guarded(sc_op_t *op, const sc_key_t *k, u32 *bucket, u32 *slot);
int sc_entry_dead(const sc_table_t *t, const sc_shard_t *s, u64 e);
u32 sc_coarse_of(const sc_table_t *t, u64 deadline);
int sc_coarse_due(const sc_table_t *t, u32 coarse, u64 now);
void sc_drop_guarded(sc_op_t *op, u64 *entry, const sc_item_t *it);
#endif
