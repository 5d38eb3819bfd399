/* scene.c - see scene.h. */
#include "scene.h"
#include <stdlib.h>

#define EXPIRED_AT (SCENE_NOW - 500u)
#define LATER (SCENE_NOW + 300000u)

const char *scene_op_name(enum scene_op op)
{
    static const char *const names[] = {"insert", "overwrite", "delete", "incr", "touch", "cas", "append", "clean", "clear",
                                        "add", "retype", "lease", "tick"};
    return op < N_OPS ? names[op] : "?";
}
const char *scene_fill_name(enum scene_fill fill)
{
    static const char *const names[] = {"empty", "half", "full"};
    return fill < N_FILLS ? names[fill] : "?";
}

static void key_of(const sc_table_t *t, u64 id, sc_key_t *k, u8 *buf)
{
    u32 n = rig_key(buf, id, 24);
    sc_key_init(t, k, buf, n);
}

/* The target stands before a carry into its upper half: a number stored in two steps would show. */
static i64 number_of(const scene_t *c, u32 id) { return id == c->target ? 0xFFFFFFFFll : (i64)id * 1000; }

static int put(scene_t *c, u32 id, u32 vlen, int is_num, u64 deadline, u64 version)
{
    u8 buf[64];
    sc_key_t k;
    key_of(c->t, id, &k, buf);
    scene_item_t *m = &c->item[id];
    int rc;
    if (is_num)
        rc = rig_set_num(c->t, &k, number_of(c, id), deadline, SC_SET);
    else {
        rig_fill(c->value, vlen, id, version);
        rc = rig_set(c->t, &k, c->value, vlen, deadline, 0, SC_SET);
    }
    if (rc == SC_OK)
        *m = (scene_item_t){1, is_num, deadline == EXPIRED_AT, version, deadline, is_num ? 8 : vlen, is_num ? number_of(c, id) : 0};
    return rc;
}

/* Fills until half of the pages are used, or until items go (or NoSpace). */
static void fill(scene_t *c)
{
    rig_rng_t g = {c->want.seed * 77 + 5};
    u32 id = 1, most = c->want.fill == FILL_EMPTY ? 4 : SCENE_ITEMS - 8;
    sc_soft_t *soft = c->t->shard[0].soft;
    c->t->clock.frozen_ms = SCENE_NOW - 10000;
    for (; id < most; id++) {
        if (c->want.fill == FILL_HALF && soft->n_free <= c->t->n_pages / 2)
            break;
        if (c->want.fill == FILL_FULL && soft->stat[SC_SS_EVICTED] > 12)
            break;
        u32 kind = rig_below(&g, 12), vlen = 20 + rig_below(&g, 900);
        if (rig_below(&g, 12) == 0)
            vlen = 4000 + rig_below(&g, 8000);
        u64 deadline = kind == 3 ? LATER : kind == 4 ? EXPIRED_AT : kind == 5 ? SCENE_NOW + 20000000 : 0;
        if (put(c, id, vlen, kind == 1, deadline, 1) != SC_OK)
            break;
        if (rig_below(&g, 4) == 0) { /* a dead copy, a read, a delete now and then */
            u32 other = 1 + rig_below(&g, id);
            u8 buf[64];
            sc_key_t k;
            rig_found_t f;
            key_of(c->t, other, &k, buf);
            if (rig_below(&g, 3) == 0 && other != c->target) {
                (void)sc_delete(c->t, &k, NULL, NULL, RIG_WAIT);
                c->item[other].present = 0;
            } else if (c->item[other].present && !c->item[other].is_num) {
                (void)rig_get(c->t, &k, c->work, &f);
                (void)put(c, other, c->item[other].vlen, 0, c->item[other].deadline, 2);
            }
        }
    }
    /* to the brink: the operation itself has to make room */
    for (; c->want.fill == FILL_FULL && id < SCENE_ITEMS - 8 && soft->n_free > c->t->reserve; id++)
        if (put(c, id, 200 + rig_below(&g, 400), 0, 0, 1) != SC_OK)
            break;
    c->n_items = id;
    c->t->clock.frozen_ms = SCENE_NOW;
}

static void forget_evicted(scene_t *c)
{
    for (u32 i = 0; i < SCENE_ITEMS; i++) {
        u8 buf[64];
        sc_key_t k;
        rig_found_t f;
        key_of(c->t, i, &k, buf);
        if (!c->item[i].present || c->item[i].expired)
            continue;
        if (rig_get(c->t, &k, c->work, &f) != SC_HIT)
            c->item[i].present = 0;
    }
}

scene_t *scene_new(const scene_want_t *want)
{
    scene_t *c = (scene_t *)calloc(1, sizeof *c);
    rig_want_t rw = {.size = SC_MIN_SIZE, .buckets = want->buckets ? want->buckets : 64, .guards = 1,
                     .guard_kind = want->guard_kind, .flags = want->flags, .clean_period_ms = 60000, .seed = want->seed};
    if (c == NULL)
        exit(3);
    c->want = *want;
    c->rig = rig_new(&rw);
    c->t = rig_handle(c->rig, 0);
    c->value = (u8 *)malloc(1u << 18);
    c->work = (u8 *)malloc(1u << 18);
    c->image = (u8 *)malloc(c->rig->size);
    c->target = 0;
    fill(c);
    /* the target last, so that it was not evicted; long enough in the table to have been read where that matters */
    int is_num = want->op == OP_INCR, absent = want->op == OP_INSERT || want->op == OP_ADD || want->op == OP_LEASE;
    u64 deadline = want->op == OP_TOUCH ? LATER : 0;
    if (!absent && put(c, c->target, want->vlen, is_num, deadline, 1) != SC_OK)
        c->item[c->target].present = 0;
    if (want->fill == FILL_HALF && !absent) /* and not the last of the log */
        for (u32 i = 0; i < 3; i++)
            (void)put(c, SCENE_ITEMS - 8 + i, 200, 0, 0, 1);
    forget_evicted(c);
    c->before = c->item[c->target];
    u8 buf[64];
    sc_key_t k;
    rig_found_t f;
    key_of(c->t, c->target, &k, buf);
    if (c->before.present && rig_get(c->t, &k, c->work, &f) == SC_HIT) {
        c->token = sc_token_of(c->t, &k, &f.raw, c->work);
        c->entry = f.entry;
        c->life = f.life;
    }
    c->after = c->before;
    switch (want->op) {
    case OP_INSERT: case OP_ADD: case OP_OVERWRITE: case OP_CAS: case OP_APPEND:
        c->after = (scene_item_t){1, 0, 0, 2, 0, want->vlen + (want->op == OP_APPEND ? 10u : 0u), 0};
        break;
    case OP_RETYPE: c->after = (scene_item_t){1, 1, 0, 0, LATER, 8, 4711}; break;
    case OP_DELETE: case OP_CLEAR: c->after.present = 0; break;
    case OP_INCR: c->after.num += 1; break;
    case OP_TOUCH: c->after.deadline = SCENE_NOW + 90000000u; break;
    default: break;
    }
    if ((want->op == OP_CAS || want->op == OP_APPEND || want->op == OP_TOUCH || want->op == OP_INCR) && !c->before.present)
        c->after = c->before;
    c->distinct = c->before.present != c->after.present || c->before.is_num != c->after.is_num || c->before.vlen != c->after.vlen ||
                  c->before.deadline != c->after.deadline || c->before.num != c->after.num ||
                  (c->before.version != c->after.version && c->after.vlen > 0);
    c->may_evict = !(want->flags & SC_F_NO_EVICT) && (want->fill == FILL_FULL || want->buckets == 16);
    memcpy(c->image, c->rig->base, c->rig->size);
    return c;
}

void scene_free(scene_t *c)
{
    rig_handle_free(c->t);
    rig_free(c->rig);
    free(c->value);
    free(c->work);
    free(c->image);
    free(c);
}

void scene_reset(scene_t *c)
{
    memcpy(c->rig->base, c->image, c->rig->size);
    rig_guard_value(c->rig, 1);
    if (c->after.present && !c->after.is_num)
        rig_fill(c->value, c->after.vlen, c->target, c->after.version);
    c->t->next_clean = 0;
    c->t->lost = 0;
}

void scene_perform(scene_t *c)
{
    u8 buf[64];
    sc_key_t k;
    u64 cursor = 0, n = 0, fence = 0;
    i64 num = 0;
    key_of(c->t, c->target, &k, buf);
    sc_value_t v = {c->value, 4711, c->after.vlen, SC_T_BYTES, c->after.deadline, 0};
    sc_cond_t cond = {.mode = SC_SET, .token = c->token, .same_entry = c->entry, .same_life = c->life, .keep_lifetime = 0};
    switch (c->want.op) {
    case OP_RETYPE: v.type = SC_T_INT; /* fall through */
    case OP_INSERT: case OP_OVERWRITE: break;
    case OP_ADD: cond.mode = SC_ADD; break;
    case OP_CAS: cond.mode = SC_CAS; break;
    case OP_APPEND:
        cond.mode = SC_IF_SAME;
        cond.keep_lifetime = 1;
        break;
    case OP_DELETE: c->rc = sc_delete(c->t, &k, NULL, NULL, RIG_WAIT); return;
    case OP_INCR: c->rc = sc_incr(c->t, &k, 1, 0, 0, 0, &num, RIG_WAIT); return;
    case OP_TOUCH: c->rc = sc_touch(c->t, &k, c->after.deadline, NULL, RIG_WAIT); return;
    case OP_CLEAN: c->rc = sc_clean(c->t, UINT64_MAX, &cursor, &n, RIG_WAIT); return;
    case OP_CLEAR: c->rc = sc_clear_shard(c->t, 0, RIG_WAIT); return;
    case OP_TICK:
        sc_tick(c->t);
        c->rc = SC_OK;
        return;
    case OP_LEASE:
        c->rc = sc_lease_take(c->t, 12345, 60000, &c->lease_owner, &fence, RIG_WAIT);
        if (c->rc == SC_OK)
            c->rc = sc_lease_extend(c->t, 12345, c->lease_owner, 70000, RIG_WAIT);
        if (c->rc == SC_OK)
            c->rc = sc_lease_release(c->t, 12345, c->lease_owner, RIG_WAIT);
        return;
    default: c->rc = SC_MISS; return;
    }
    if (c->want.op == OP_CAS && !c->before.present) {
        c->rc = SC_MISS;
        return;
    }
    c->rc = sc_store(c->t, &k, &v, &cond, RIG_WAIT);
}

static int same(scene_t *c, const scene_item_t *m, u32 id, int rc, const rig_found_t *f)
{
    if (rc != SC_HIT)
        return !m->present || m->expired;
    if (!m->present || m->expired || f->deadline != m->deadline)
        return 0;
    if (m->is_num)
        return SC_TYPE(f->type) == SC_T_INT && f->num == m->num;
    return SC_TYPE(f->type) == SC_T_BYTES && f->vlen == m->vlen && rig_is(c->work, f->vlen, id, m->version);
}

const char *scene_verify(scene_t *c, sc_table_t *t, int allow, int *saw_new, char *msg, size_t len)
{
    int clear = c->want.op == OP_CLEAR, gone = 0, there = 0;
    *saw_new = 0;
    for (u32 id = 0; id < SCENE_ITEMS; id++) {
        scene_item_t *m = id == c->target ? &c->before : &c->item[id];
        u8 buf[64];
        sc_key_t k;
        rig_found_t f;
        if (!m->present && id != c->target && (id % 16 != 0 || id > c->n_items))
            continue; /* some absent keys are asked for, too */
        memset(&f, 0, sizeof f);
        key_of(t, id, &k, buf);
        int rc = rig_get(t, &k, c->work, &f);
        if (rc != SC_HIT && rc != SC_MISS)
            return snprintf(msg, len, "key %u: read answers %d", id, rc), msg;
        if (rc == SC_HIT && f.again > 0)
            return snprintf(msg, len, "key %u: read took %u more passes", id, f.again), msg;
        if (m->present && !m->expired) {
            gone += rc != SC_HIT;
            there += rc == SC_HIT;
        }
        if (id == c->target) {
            int is_new = same(c, &c->after, id, rc, &f), is_old = same(c, &c->before, id, rc, &f);
            if (clear)
                continue;
            if (!is_new && !is_old && !((allow & SCENE_TARGET_MAY_GO) && rc == SC_MISS))
                return snprintf(msg, len, "target: neither old nor new (answer %d, length %u, deadline %llu, number %lld)", rc,
                                f.vlen, (unsigned long long)f.deadline, (long long)f.num), msg;
            *saw_new = is_new && !is_old;
            continue;
        }
        if (same(c, m, id, rc, &f) || (rc == SC_MISS && ((allow & SCENE_OTHERS_MAY_GO) || clear)))
            continue;
        return snprintf(msg, len, "key %u: %s (wanted version %llu, length %u, present %d)", id,
                        rc == SC_HIT ? "wrong value" : "lost", (unsigned long long)m->version, m->vlen, m->present), msg;
    }
    if (clear) {
        if (gone > 0 && there > 0 && allow == 0)
            return snprintf(msg, len, "clear: %d items there, %d gone", there, gone), msg;
        *saw_new = gone > 0;
    }
    return NULL;
}

const char *scene_go_on(scene_t *c, sc_table_t *t, char *msg, size_t len)
{
    /* ids outside the scene: nobody else's keys are touched; six pages at once find pages that were lost */
    static const u32 sizes[] = {300, 20, 9000, 1, 2500, 9000};
    u8 buf[64];
    sc_key_t k;
    rig_found_t f;
    int strict = c->want.fill != FILL_FULL && c->want.buckets != 16;
    for (u32 i = 0; i < 6; i++) {
        u32 id = 600 + i % 5;
        key_of(t, id, &k, buf);
        rig_fill(c->work, sizes[i], id, 9 + i);
        int rc = rig_set(t, &k, c->work, sizes[i], i == 3 ? LATER : 0, 0, SC_SET);
        if (rc == SC_NO_SPACE && (c->want.flags & SC_F_NO_EVICT) && !strict)
            continue;
        if (rc != SC_OK)
            return snprintf(msg, len, "going on: set of %u bytes answers %d", sizes[i], rc), msg;
        if (rig_get(t, &k, c->work, &f) != SC_HIT || f.vlen != sizes[i] || !rig_is(c->work, f.vlen, id, 9 + i))
            return snprintf(msg, len, "going on: what was set cannot be read"), msg;
    }
    key_of(t, 601, &k, buf);
    i64 num = 0;
    int rc = sc_delete(t, &k, NULL, NULL, RIG_WAIT);
    if (strict && rc != SC_OK)
        return snprintf(msg, len, "going on: delete answers %d", rc), msg;
    rc = sc_incr(t, &k, 5, 1, 0, 0, &num, RIG_WAIT);
    if (strict && (rc != SC_OK || num != 5))
        return snprintf(msg, len, "going on: incr answers %d with %lld", rc, (long long)num), msg;
    /* a twin left by a killed displacement would bring a deleted key back */
    for (u32 id = 0; id < (c->want.buckets == 16 ? SCENE_ITEMS : 1); id++) {
        if (id != c->target && !c->item[id].present)
            continue;
        key_of(t, id, &k, buf);
        rc = sc_delete(t, &k, NULL, NULL, RIG_WAIT);
        if (rc != SC_OK && rc != SC_MISS)
            return snprintf(msg, len, "going on: delete of key %u answers %d", id, rc), msg;
        rc = rig_get(t, &k, c->work, &f);
        if (rc != SC_MISS)
            return snprintf(msg, len, "going on: key %u is back after its delete (answer %d)", id, rc), msg;
    }
    return NULL;
}
