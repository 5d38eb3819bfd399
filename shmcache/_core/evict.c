/* evict.c - which memory is given back: head steps, room for an append, the policy behind both.
 *
 * Everything a policy remembers is a hint.  What a step does is crash-safe by order: an item leaves the index or gets its
 * new place (one store) before the head passes it (one store), so a kill in between leaves a dead copy at the head.
 *
 * Constants were chosen by replaying traces (tools/bench/hitratio.py); miss ratios are flat around them. */
#include "heap.h"

enum { STEP_EVICT, STEP_COMPACT, STEP_FORCE };

#define MAX_STEPS 512u        /* head items looked at by one set beside those that lay in the pages it takes itself */
#define MOVE_ITEMS 32u        /* relocations a compaction may do for one set, plus one per 512 bytes of its item */
#define MOVE_BYTES 65536u     /* and bytes, plus twice the item */
#define HARD_RESERVE 2u       /* pages below which evicting does not stop: a relocation needs one */
#define PROBATION_SHARE 15u   /* percent of pages the probation lane may own before it pays */
#define LARGE_SHARE 3u        /* the same for large items */
#define LARGE_FACTOR 2u       /* a new item is large above this many geometric means */
#define KEEP_FACTOR 2u        /* a use keeps an item of up to so many means: frequency per byte */
#define RETURN_FACTOR (KEEP_FACTOR * SC_FREQ_MAX) /* a larger one goes through probation again when it comes back: main
                                                     could not keep it however often it is used */
#define MEAN_SHIFT 9u         /* the mean follows the last ~512 items */

/* ---- sizes ------------------------------------------------------------------------------------------------------ */

static u32 log2_fixed(u32 v)
{
    u32 n = 31u - (u32)__builtin_clz(v | 1u);
    u32 frac = n >= 16 ? (v >> (n - 16)) & 0xFFFFu : (v << (16 - n)) & 0xFFFFu;
    return (n << 16) | frac;
}
static u32 exp2_fixed(u32 x)
{
    u32 n = x >> 16;
    u64 m = 0x10000u | (x & 0xFFFFu);
    return (u32)(n >= 16 ? m << (n - 16) : m >> (16 - n));
}
static u32 mean_of(const sc_shard_t *s)
{
    u32 x = s->soft->mean_log2;
    return x < (4u << 16) ? 4u << 16 : x > (28u << 16) ? 28u << 16 : x;
}
void sc_mean_add(sc_op_t *op, u32 total)
{
    i64 m = mean_of(op->s), x = log2_fixed(total);
    op->s->soft->mean_log2 = (u32)(m + (x - m) / (1 << MEAN_SHIFT));
}

/* ---- ghosts: fingerprints of evicted keys; a key that comes back soon goes to main at once ------------------------ */

static u32 ghost_time(const sc_op_t *op)
{
    u32 shift = 0;
    while ((op->t->n_pages >> shift) > 16384u)
        shift++;
    return (u32)(op->s->hard->seq >> shift) & 0xFFFFu;
}
static u32 *ghost_set(const sc_op_t *op, u64 h, u32 *fp)
{
    u64 g = sc_fold(h, op->t->secret.s[4]);
    *fp = (u32)(g >> 48) | 1u;
    return &op->s->ghost[((g & 0xFFFFFFFFull) * (op->t->n_ghosts / 4u) >> 32) * 4u];
}
void sc_ghost_add(sc_op_t *op, u64 h)
{
    u32 fp, now = ghost_time(op), worst = 0, age = 0;
    if (op->t->n_ghosts < 4u)
        return;
    u32 *set = ghost_set(op, h, &fp);
    for (u32 i = 0; i < 4; i++) {
        u32 g = SC_LD(&set[i]), a = g == 0 ? 0x10000u : ((now - g) & 0xFFFFu);
        if (a >= age) {
            age = a;
            worst = i;
        }
    }
    SC_ST(&set[worst], (fp << 16) | now);
}
static int ghost_hit(sc_op_t *op, u64 h)
{
    u32 fp, now = ghost_time(op), shift = 0;
    if (op->t->n_ghosts < 4u)
        return 0;
    while ((op->t->n_pages >> shift) > 16384u)
        shift++;
    u32 *set = ghost_set(op, h, &fp);
    for (u32 i = 0; i < 4; i++) {
        u32 g = SC_LD(&set[i]);
        if (g >> 16 == fp && ((now - g) & 0xFFFFu) <= (op->t->n_pages >> shift)) {
            SC_ST(&set[i], 0);
            return 1;
        }
    }
    return 0;
}

/* ---- lanes ------------------------------------------------------------------------------------------------------ */

/* Main lane of an item: items that die together lie together, so that whole pages die. */
u32 sc_main_lane(u64 now, u64 deadline)
{
    if (deadline == 0)
        return SC_LANE_MAIN + 3;
    u64 left = deadline > now ? deadline - now : 0;
    if (left <= 5u * 60000u)
        return SC_LANE_MAIN;
    if (left <= 85u * 60000u)
        return SC_LANE_MAIN + 1;
    return left <= 86400000u ? SC_LANE_MAIN + 2 : SC_LANE_MAIN + 3;
}
static u32 main_lane(sc_op_t *op, u64 deadline)
{
    return deadline == 0 ? SC_LANE_MAIN + 3 : sc_main_lane(sc_op_now(op), deadline);
}

u32 sc_lane_of_new(sc_op_t *op, const sc_key_t *k, u64 deadline, u32 total, u32 old_lane, u32 old_freq, int had_old)
{
    if (had_old && (old_lane >= SC_LANE_MAIN || old_freq > 0))
        return main_lane(op, deadline);
    u32 means = total / exp2_fixed(mean_of(op->s));
    if (!had_old && ghost_hit(op, k->h) && means < RETURN_FACTOR)
        return main_lane(op, deadline);
    return means >= LARGE_FACTOR ? SC_LANE_LARGE : 0;
}

void sc_account_dead_guarded(sc_op_t *op, u32 page, const sc_item_t *it)
{
    sc_soft_t *soft = op->s->soft;
    u32 lane = SC_LIFE_LANE(SC_LD(&op->s->life[page]));
    if (lane < SC_N_LANES) {
        sc_hint_add(&soft->dead[lane], it->total);
        sc_hint_add(&soft->live[lane], -(i64)it->total);
    }
    sc_hint_add(&soft->n_items, -1);
    sc_hint_add(&soft->live_bytes, -((i64)it->klen + it->vlen));
}

/* ---- one step of a head ----------------------------------------------------------------------------------------- */

/* A header at the head that cannot be an item: rot.  The index knows where the next item of the lane begins. */
static void resync_guarded(sc_op_t *op, u32 lane, const sc_lane_t *l)
{
    sc_table_t *t = op->t;
    sc_shard_t *s = op->s;
    u64 seq0 = l->seq, seq1 = l->tail_seq, best_seq = seq1, best = SC_POS(l->tail_page, l->tail_off);
    for (u32 b = 0; b < t->n_buckets; b++)
        for (u32 i = 0; i < SC_N_SLOTS; i++) {
            u64 e = SC_LD(&s->buckets[b].entry[i]);
            u32 page = SC_ENTRY_PAGE(e), off = SC_ENTRY_OFF(e);
            if (e == 0 || page >= t->n_pages)
                continue;
            u64 m = SC_LD(&s->life[page]), seq = SC_LIFE_SEQ(m);
            if (SC_LIFE_LANE(m) != lane || seq < seq0 || seq > seq1)
                continue;
            if (seq == seq0 && off <= l->off) {
                SC_ST_REL(&s->buckets[b].entry[i], 0); /* the rotten item itself, or one before the head (I5) */
                continue;
            }
            if (seq < best_seq || (seq == best_seq && off < SC_POS_OFF(best))) {
                best_seq = seq;
                best = SC_POS(page, off);
            }
        }
    SC_ST_REL(&s->hard->head[lane], best);
    s->soft->stat[SC_SS_REPAIRED]++;
    s->soft->recount = 1;
    sc_heap_recount_guarded(t, s);
}

/* Moves the head of a lane past n bytes; 0 if the chain of pages makes no sense. */
static int head_pass(sc_op_t *op, u32 lane, const sc_lane_t *l, u32 n)
{
    sc_table_t *t = op->t;
    sc_shard_t *s = op->s;
    u32 page = l->page, crossed = 0;
    u64 pos = (u64)l->off + n, seq = l->seq;
    while (pos >= t->page_size && page != l->tail_page) {
        u32 q = SC_LD(&s->next[page]);
        if (q >= t->n_pages)
            return 0;
        u64 m = SC_LD(&s->life[q]);
        if (SC_LIFE_LANE(m) != lane || SC_LIFE_SEQ(m) <= seq || SC_LIFE_SEQ(m) > l->tail_seq)
            return 0;
        seq = SC_LIFE_SEQ(m);
        page = q;
        pos -= t->page_size;
        crossed++;
    }
    if (page == l->tail_page && pos > l->tail_off)
        return 0;
    SC_CRASHPOINT(before_head);
    SC_ST_REL(&s->hard->head[lane], SC_POS(page, (u32)pos)); /* COMMIT: every page left behind is free */
    SC_BARRIER();
    SC_CRASHPOINT(after_head);
    s->soft->n_free += crossed;
    s->soft->n_pages[lane] -= crossed < s->soft->n_pages[lane] ? crossed : s->soft->n_pages[lane];
    op->passed_bytes += n;
    return 1;
}

static void passed_dead(sc_op_t *op, u32 lane, u32 total)
{
    i64 *dead = &op->s->soft->dead[lane];
    *dead = *dead > (i64)total ? *dead - (i64)total : 0;
}

/* The item at the head of a lane; 1 item, 0 nothing (the lane was empty, a pad, or rot: dealt with), -1 no lane. */
static int head_item(sc_op_t *op, u32 lane, sc_lane_t *l, sc_item_t *it)
{
    sc_table_t *t = op->t;
    sc_shard_t *s = op->s;
    if (!sc_lane_ok_guarded(t, s, lane, l))
        return -1;
    if (l->page == l->tail_page && l->off == l->tail_off) { /* empty: its last page goes back */
        SC_ST_REL(&s->hard->tail[lane], SC_POS(SC_NO_PAGE, 0));
        SC_BARRIER();
        SC_CRASHPOINT(lane_emptied);
        s->soft->n_free += s->soft->n_pages[lane];
        s->soft->n_pages[lane] = 0;
        s->soft->dead[lane] = s->soft->live[lane] = 0;
        return 0;
    }
    if (l->off < t->page_size) {
        u64 w0 = SC_LD((u64 *)(void *)sc_at(t, s, l->page, l->off));
        if (SC_W0_KLEN(w0) != 0) {
            if (l->off + SC_ITEM_HEADER <= t->page_size && sc_item_load(t, s, l->page, l->off, it))
                return 1;
            resync_guarded(op, lane, l);
            return 0;
        }
    }
    if (!head_pass(op, lane, l, t->page_size - l->off))
        resync_guarded(op, lane, l);
    return 0;
}

/* Looks at the head of a lane and passes it. 1 = went on, 0 = cannot. */
static int step_guarded(sc_op_t *op, u32 lane, int mode)
{
    sc_table_t *t = op->t;
    sc_shard_t *s = op->s;
    sc_item_t it;
    sc_lane_t ends;
    op->steps++;
    int kind = head_item(op, lane, &ends, &it);
    if (kind <= 0)
        return kind == 0;
    u64 h = op->head_seen[lane] == SC_POS(it.page, it.off) + 1 ? op->head_hash[lane] : 0;
    if (h == 0 && sc_item_keyhash(t, s, &it, &h) < 0) {
        op->blocked |= 1u << lane;
        return 0;
    }
    u32 b = 0, i = 0;
    u64 *p = sc_shard_of(h, t->n_shards) == (u32)(s - t->shard) ? sc_index_place_guarded(op, h, it.page, it.off, &b, &i)
                                                                 : NULL;
    u64 life = SC_LD(&s->life[it.page]);
    if (p != NULL && SC_LIFE_SEQ(life) <= SC_LD(&s->hard->flush_seq)) {
        SC_ST_REL(p, 0);
        p = NULL;
    }
    if (p == NULL) {
        passed_dead(op, lane, it.total);
        goto pass;
    }
    if (sc_expired(op, it.w1)) {
        sc_drop_guarded(op, p, &it);
        passed_dead(op, lane, it.total);
        s->soft->stat[SC_SS_EXPIRED]++;
        goto pass;
    }
    sc_bucket_t *bucket = &s->buckets[b];
    u32 freq = SC_LD(&bucket->freq[i]);
    if (freq > SC_FREQ_MAX)
        freq = SC_FREQ_MAX;
    int mine = p == op->protect, keep = mine || mode == STEP_COMPACT;
    if (mode == STEP_EVICT && freq > 0 && (u64)freq * KEEP_FACTOR * exp2_fixed(mean_of(s)) >= it.total)
        keep = 1;
    if (keep) {
        u32 to = mode == STEP_COMPACT && lane < SC_LANE_MAIN ? lane : main_lane(op, SC_W1_DEADLINE(it.w1));
        u32 page, off, need = sc_heap_need(t, s, to, it.total);
        if (s->soft->n_free >= need && sc_item_copy_guarded(op, &it, to, &page, &off)) {
            u64 e = SC_LD(p);
            SC_CRASHPOINT(before_relocate);
            SC_ST_REL(p, SC_ENTRY(SC_ENTRY_TAG(e), page, off, SC_ENTRY_COARSE(e))); /* COMMIT: same item, new place */
            SC_BARRIER();
            SC_CRASHPOINT(after_relocate);
            if (mode != STEP_COMPACT && freq > 0)
                SC_ST(&bucket->freq[i], (u8)(freq - 1));
            if (t->h.flags & SC_F_SECURE)
                sc_item_wipe_guarded(op, it.page, it.off);
            op->moved_items++;
            op->moved_bytes += it.total;
            sc_hint_add(&s->soft->live[lane], -(i64)it.total);
            sc_hint_add(&s->soft->live[to], it.total);
            s->soft->stat[SC_SS_RELOCATED]++;
            s->soft->stat[SC_SS_BYTES_MOVED] += it.total;
            goto pass;
        }
        if (mine || (t->h.flags & SC_F_NO_EVICT)) {
            op->blocked |= 1u << lane;
            return 0;
        }
        if (mode == STEP_COMPACT) { /* nothing live is dropped to compact; the lane may still pay by evicting */
            op->cramped |= 1u << lane;
            return 0;
        }
    }
    if (lane < SC_LANE_MAIN)
        sc_ghost_add(op, h);
    if (SC_W1_DEADLINE(it.w1) != 0)
        s->soft->stat[SC_SS_EVICTED_LIVE_TTL]++;
    sc_drop_guarded(op, p, &it);
    passed_dead(op, lane, it.total);
    s->soft->stat[SC_SS_EVICTED]++;
pass:
    if (!head_pass(op, lane, &ends, it.total))
        resync_guarded(op, lane, &ends);
    return 1;
}

/* Whether the head of a lane can be passed for nothing: a pad, a dead or an expired item. */
static int head_is_dead(sc_op_t *op, u32 lane)
{
    sc_table_t *t = op->t;
    sc_shard_t *s = op->s;
    u64 head = SC_LD(&s->hard->head[lane]);
    if (!sc_lane_owns(s->hard, lane))
        return 0;
    if (op->head_seen[lane] == head + 1)
        return op->head_dead[lane];
    int dead = 1;
    u64 h = 0;
    u32 page = SC_POS_PAGE(head), off = SC_POS_OFF(head);
    sc_item_t it;
    if (head == s->hard->tail[lane])
        dead = s->soft->n_pages[lane] > 0 && SC_POS_OFF(head) > t->page_size / 2; /* an empty lane keeps a fresh page */
    else if (sc_place_ok(t, page, off) && sc_item_load(t, s, page, off, &it)) {
        u32 b, i;
        if (SC_LIFE_SEQ(SC_LD(&s->life[page])) > SC_LD(&s->hard->flush_seq) && !sc_expired(op, it.w1))
            dead = s->soft->dead[lane] > 0 && sc_item_keyhash(t, s, &it, &h) > 0 &&
                   sc_index_place_guarded(op, h, page, off, &b, &i) == NULL;
    }
    op->head_seen[lane] = head + 1;
    op->head_hash[lane] = h;
    op->head_dead[lane] = (u8)dead;
    return dead;
}

static u32 lane_most_dead(const sc_op_t *op, u32 percent)
{
    u32 best = SC_N_LANES;
    u64 best_share = 0;
    for (u32 lane = 0; lane < SC_N_LANES; lane++) {
        u32 n = op->s->soft->n_pages[lane];
        i64 dead = op->s->soft->dead[lane];
        if (n < 2 || dead <= 0 || ((op->blocked | op->cramped) & (1u << lane)))
            continue;
        u64 share = (u64)dead * 1000u / ((u64)n << op->t->page_shift);
        if (share > percent * 10u && share > best_share) {
            best_share = share;
            best = lane;
        }
    }
    return best;
}

/* Pages a probation lane owns beyond its share; 0 if it cannot pay. */
static u32 over_share(const sc_op_t *op, u32 lane, u32 percent)
{
    u32 owns = op->s->soft->n_pages[lane], most = (u32)((u64)op->t->n_pages * percent / 100u);
    return owns > most && !(op->blocked & (1u << lane)) && sc_lane_owns(op->s->hard, lane) ? owns - most : 0;
}

/* Whether the head item of the lane of large items is the only one there: that one stays whatever its size. */
static int only_large(const sc_op_t *op)
{
    sc_item_t it;
    u64 head = SC_LD(&op->s->hard->head[SC_LANE_LARGE]);
    u32 page = SC_POS_PAGE(head), off = SC_POS_OFF(head);
    return !sc_place_ok(op->t, page, off) || !sc_item_load(op->t, op->s, page, off, &it) ||
           op->s->soft->live[SC_LANE_LARGE] <= (i64)it.total;
}

/* Which lane pays next, by the order of DESIGN.md: dead heads, compaction, probation over budget, oldest main page.
 * Of the two probation lanes the one further over its share pays: the first to be asked would pay alone for as long as
 * its own new items keep it over, and the other would hold on to what it took (2.4 of 8 MB on zipf09). */
static u32 choose_lane(sc_op_t *op, int may_compact, int *mode)
{
    sc_shard_t *s = op->s;
    *mode = STEP_EVICT;
    for (u32 lane = 0; lane < SC_N_LANES; lane++)
        if (!(op->blocked & (1u << lane)) && head_is_dead(op, lane))
            return lane;
    if (may_compact) {
        u32 lane = lane_most_dead(op, 25);
        if (lane < SC_N_LANES) {
            *mode = STEP_COMPACT;
            return lane;
        }
    }
    u32 small = over_share(op, 0, PROBATION_SHARE), large = over_share(op, SC_LANE_LARGE, LARGE_SHARE);
    if (large > small && !only_large(op))
        return SC_LANE_LARGE;
    if (small > 0)
        return 0;
    u32 best = SC_N_LANES;
    u64 best_seq = UINT64_MAX;
    for (u32 turn = 0; turn < 2 && best == SC_N_LANES; turn++)
        for (u32 lane = turn ? 0 : SC_LANE_MAIN; lane < SC_N_LANES; lane++) {
            u32 page = SC_POS_PAGE(SC_LD(&s->hard->head[lane]));
            if ((op->blocked & (1u << lane)) || !sc_lane_owns(s->hard, lane) || page >= op->t->n_pages ||
                s->hard->head[lane] == s->hard->tail[lane])
                continue;
            u64 seq = SC_LIFE_SEQ(SC_LD(&s->life[page]));
            if (seq < best_seq) {
                best_seq = seq;
                best = lane;
            }
        }
    return best;
}

/* Drops the entries of expired items of the whole shard; eviction=none asks before it says NoSpace. */
static u64 expire_all_guarded(sc_op_t *op)
{
    u64 n = 0;
    sc_table_t *t = op->t;
    for (u32 b = 0; b < t->n_buckets; b++)
        for (u32 i = 0; i < SC_N_SLOTS; i++) {
            u64 *p = &op->s->buckets[b].entry[i];
            u64 e = SC_LD(p);
            sc_item_t it;
            if (e == 0 || SC_ENTRY_COARSE(e) == 0 || sc_entry_dead(t, op->s, e) || p == op->protect ||
                !sc_place_ok(t, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e)) ||
                !sc_item_load(t, op->s, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e), &it) || !sc_expired(op, it.w1))
                continue;
            if (!sc_index_only_guarded(op, p, &it))
                continue; /* its twin is met in the other bucket */
            sc_drop_guarded(op, p, &it);
            op->s->soft->stat[SC_SS_EXPIRED]++;
            n++;
        }
    return n;
}

static int room_without_eviction(sc_op_t *op, u32 lane, u32 total)
{
    sc_table_t *t = op->t;
    sc_soft_t *soft = op->s->soft;
    u64 most_bytes = 2ull * t->n_pages << t->page_shift;
    int swept = 0;
    for (;;) {
        u32 need = sc_heap_need(t, op->s, lane, total);
        u32 most = (total >> t->page_shift) + 2u, keep = t->reserve;
        if (most < soft->most_pages)
            most = soft->most_pages;
        if (keep < most && most < t->n_pages / 2u)
            keep = most; /* else the largest item at a head could never be moved, and all behind it never reclaimed */
        if (soft->n_free >= need + keep)
            return SC_OK;
        int mode = STEP_COMPACT;
        u32 from = SC_N_LANES;
        for (u32 l = 0; l < SC_N_LANES && from == SC_N_LANES; l++)
            if (!(op->blocked & (1u << l)) && head_is_dead(op, l))
                from = l;
        if (from == SC_N_LANES)
            from = lane_most_dead(op, 0);
        if (from < SC_N_LANES && op->passed_bytes <= most_bytes) {
            (void)step_guarded(op, from, mode);
            continue;
        }
        if (!swept && expire_all_guarded(op) > 0) {
            swept = 1;
            op->blocked = 0;
            memset(op->head_seen, 0, sizeof op->head_seen);
            continue;
        }
        return SC_NO_SPACE;
    }
}

/* Makes room for an append of total bytes to lane and pays as it goes: every set passes about twice its own size of head
 * bytes while the shard is full, so that no set meets a bill run up by others. */
int sc_room_guarded(sc_op_t *op, u32 lane, u32 total)
{
    sc_table_t *t = op->t;
    sc_soft_t *soft = op->s->soft;
    if (t->h.flags & SC_F_NO_EVICT)
        return room_without_eviction(op, lane, total);
    u64 pay = 2ull * total + 64u;
    u32 budget = MOVE_ITEMS + total / 512u;
    u64 budget_bytes = MOVE_BYTES + 2ull * total;
    int recounted = 0;
    for (;;) {
        u32 need = sc_heap_need(t, op->s, lane, total), target = need + t->reserve, have = soft->n_free;
        if (have > target && op->steps == 0)
            break;
        if (have >= target && (op->passed_bytes >= pay || op->steps >= MAX_STEPS))
            break;
        if (op->steps >= MAX_STEPS && have >= need + HARD_RESERVE)
            break;
        int spent = op->moved_items >= budget || op->moved_bytes >= budget_bytes, mode;
        u32 from = choose_lane(op, !spent, &mode);
        if (from == SC_N_LANES) {
            if (have >= need)
                break;
            if (recounted++ > 1)
                return SC_NO_SPACE;
            op->blocked = 0;
            if (recounted == 1)
                sc_heap_recount_guarded(t, op->s);
            else /* everything lies behind the key's own item, which no free pages can take */
                op->protect = NULL;
            continue;
        }
        if (mode == STEP_EVICT && spent)
            mode = STEP_FORCE;
        (void)step_guarded(op, from, mode);
        if (op->steps > 64u * t->n_pages + 4096u)
            return SC_NO_SPACE; /* a rotten shard that gives nothing back */
    }
    if (op->steps > soft->stat[SC_SS_MAX_STEPS])
        soft->stat[SC_SS_MAX_STEPS] = op->steps;
    if (op->moved_bytes > soft->stat[SC_SS_MAX_MOVED])
        soft->stat[SC_SS_MAX_MOVED] = op->moved_bytes;
    return SC_OK;
}

/* Gives dead memory back without evicting anything: dead heads, then lanes with over 25 % dead. Returns steps done. */
u32 sc_reclaim_guarded(sc_op_t *op, u32 max_steps)
{
    while (op->steps < max_steps && op->moved_bytes < MOVE_BYTES) {
        int mode = STEP_COMPACT;
        u32 from = SC_N_LANES;
        for (u32 lane = 0; lane < SC_N_LANES && from == SC_N_LANES; lane++)
            if (!(op->blocked & (1u << lane)) && head_is_dead(op, lane))
                from = lane;
        if (from == SC_N_LANES)
            from = lane_most_dead(op, 25);
        if (from == SC_N_LANES || !step_guarded(op, from, mode))
            break;
    }
    return op->steps;
}
