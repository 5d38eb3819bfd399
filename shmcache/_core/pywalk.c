/* pywalk.c - walking a segment group by group: keys, what an item is without its value, how many there are. */
#include "pycore.h"

#define WALKS 64 /* times a group is walked again while displacements run; each walk adds what it newly sees */

typedef PyObject *const *args_t;

static int in_prefix(const table_obj *self, const u8 *key, u32 len)
{
    return len > self->prefix_len && (self->prefix_len == 0 || memcmp(key, self->prefix, self->prefix_len) == 0);
}

/* Returns 0, -1 with an exception set, or 1: replaced or moved under the look. */
typedef int (*visit_fn)(table_obj *self, sc_seen_t *seen, int state, const u8 *key, void *arg);

/* Visits what a group holds; walks again while displacements run or an entry changed under the look, so that an item
 * present throughout is seen.  The visitor leaves out a key it has had; an entry that was visited and stands unchanged is
 * not looked at again.  What changed under every look is visited in the last walk, with SC_AGAIN. */
static int walk_group(table_obj *self, sc_table_t *t, u32 group, u32 walks, visit_fn visit, void *arg)
{
    const size_t n_slots = SC_GROUP * SC_N_SLOTS;
    u64 *entries = (u64 *)PyMem_Calloc(1, n_slots * (2 * sizeof(u64) + sizeof(u32)) + SC_MAX_KEY);
    if (entries == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    u64 *had = entries + n_slots;
    u32 *where = (u32 *)(void *)(had + n_slots);
    u8 *key = (u8 *)(where + n_slots), moves[SC_GROUP];
    int again = 1, r = 0;
    for (u32 walk = 1; r == 0 && again && walk <= walks; walk++) {
        u32 n = sc_group_entries(t, group, entries, where, moves);
        again = 0;
        for (u32 i = 0; r == 0 && i < n; i++) {
            u32 at = (where[i] >> 3) % SC_GROUP * SC_N_SLOTS + (where[i] & 7u);
            sc_seen_t seen;
            if (had[at] == entries[i])
                continue;
            int state = sc_see(t, group, where[i], entries[i], &seen, key);
            if (state != SC_AGAIN) {
                r = visit(self, &seen, state, key, arg);
            } else {
                u64 m = SC_LD(&t->shard[seen.shard].life[SC_ENTRY_PAGE(entries[i])]);
                r = SC_LIFE_SEQ(m) > SC_LD(&t->shard[seen.shard].hard->flush_seq);
                if (r == 0) /* flushed: nothing is stored there */
                    continue;
            }
            if (r == 0)
                had[at] = entries[i];
            if (r > 0) {
                again = 1;
                r = walk == walks && had[at] == 0 ? visit(self, &seen, SC_AGAIN, key, arg) : 0;
            }
        }
        if (r == 0 && sc_group_moved(t, group, moves))
            again = 1;
    }
    PyMem_Free(entries);
    return r;
}

static int group_arg(sc_table_t *t, PyObject *arg, u32 *group)
{
    unsigned long g = PyLong_AsUnsignedLong(arg);
    if (PyErr_Occurred())
        return -1;
    if (g >= sc_n_groups(t)) {
        PyErr_Format(PyExc_IndexError, "group: below %u wanted, %lu found", sc_n_groups(t), g);
        return -1;
    }
    *group = (u32)g;
    return 0;
}

static int visit_key(table_obj *self, sc_seen_t *seen, int state, const u8 *key, void *arg)
{
    if (state != SC_HIT || !in_prefix(self, key, seen->f.it.klen))
        return 0;
    PyObject *k = key_object(key + self->prefix_len, seen->f.it.klen - self->prefix_len);
    int r = k == NULL ? -1 : PyDict_SetItem((PyObject *)arg, k, Py_None);
    Py_XDECREF(k);
    return r;
}
PyObject *table_scan_keys(PyObject *o, PyObject *arg)
{
    table_obj *self = (table_obj *)o;
    ATTACHED(self);
    map_t *held = map_hold(self->map); /* a finalizer may close the engine meanwhile */
    u32 group;
    PyObject *seen = group_arg(held->t, arg, &group) == 0 ? PyDict_New() : NULL, *r = NULL;
    if (seen != NULL && walk_group(self, held->t, group, WALKS, visit_key, seen) == 0)
        r = PyDict_Keys(seen);
    Py_XDECREF(seen);
    map_drop(held);
    return r;
}

typedef struct {
    sc_table_t *t;
    PyObject *rows; /* by key, or by place where no key is known */
    u8 *value;      /* scratch, NULL: contents are not compared */
    size_t room;
} meta_t;

/* (key, type, size, deadline_ms, soft_ms, version, shard, bucket, slot, lane, page, off, use, birth_s, state,
 *  probes) */
static int visit_meta(table_obj *self, sc_seen_t *seen, int state, const u8 *key, void *arg)
{
    (void)self;
    meta_t *to = (meta_t *)arg;
    const sc_item_t *it = &seen->f.it;
    int keyed = state == SC_HIT || state == SC_MISS || (state == SC_AGAIN && seen->life != 0);
    if (to->value != NULL && (state == SC_HIT || state == SC_MISS)) {
        if (it->vlen > to->room) {
            u8 *value = (u8 *)PyMem_Realloc(to->value, it->vlen);
            if (value == NULL) {
                PyErr_NoMemory();
                return -1;
            }
            to->value = value;
            to->room = it->vlen;
        }
        int content = sc_see_content(to->t, seen, key, to->value);
        if (content == SC_AGAIN)
            return 1;
        state = content == SC_HIT ? state : content;
    }
    const char *name = state == SC_HIT ? "live" : state == SC_MISS ? "expired" : state == SC_AGAIN ? "torn" : "corrupt";
    u64 deadline = keyed ? SC_W1_DEADLINE(it->w1) : 0, soft = keyed ? it->soft : 0;
    PyObject *place = Py_BuildValue("(III)", seen->shard, seen->bucket, seen->slot), *k, *row;
    if (place == NULL)
        return -1;
    k = keyed ? key_object(key, it->klen) : Py_NewRef(Py_None);
    row = k == NULL ? NULL
                    : Py_BuildValue("(NIIKKIIIIIIIIIsI)", k, keyed ? it->type : 0u, keyed ? it->vlen : 0u,
                                    (unsigned long long)(deadline ? deadline - 1 : 0), (unsigned long long)(soft ? soft - 1 : 0),
                                    keyed ? SC_W1_VERSION(it->w1) : 0u, seen->shard, seen->bucket, seen->slot, seen->lane,
                                    seen->page, seen->off, seen->freq, seen->birth_s, name,
                                    keyed ? seen->probes : 0u);
    int r = row == NULL ? -1 : 0;
    if (r == 0 && state == SC_AGAIN && keyed && PyDict_GetItem(to->rows, PyTuple_GetItem(row, 0)) != NULL)
        ; /* an earlier walk saw the key whole */
    else if (r == 0)
        r = PyDict_SetItem(to->rows, keyed ? PyTuple_GetItem(row, 0) : place, row);
    Py_XDECREF(row);
    Py_DECREF(place);
    return r;
}
/* _scan_meta(group, content, walks): content: compare the check of every value too. */
static PyObject *scan_meta_held(table_obj *self, sc_table_t *t, args_t args, Py_ssize_t nargs)
{
    u32 group;
    if (nargs != 3)
        return PyErr_Format(PyExc_TypeError, "_scan_meta() takes 3 arguments (%zd given)", nargs);
    if (group_arg(t, args[0], &group) != 0)
        return NULL;
    int content = PyObject_IsTrue(args[1]);
    unsigned long walks = args[2] == Py_None ? WALKS : PyLong_AsUnsignedLong(args[2]);
    if (PyErr_Occurred())
        return NULL;
    meta_t to = {.t = t, .rows = PyDict_New(), .room = 4096};
    PyObject *r = NULL;
    if (content && (to.value = (u8 *)PyMem_Malloc(to.room)) == NULL)
        PyErr_NoMemory();
    else if (to.rows != NULL && walk_group(self, t, group, (u32)walks, visit_meta, &to) == 0)
        r = PyDict_Values(to.rows);
    PyMem_Free(to.value);
    Py_XDECREF(to.rows);
    return r;
}
PyObject *table_scan_meta(PyObject *o, args_t args, Py_ssize_t nargs)
{
    table_obj *self = (table_obj *)o;
    ATTACHED(self);
    map_t *held = map_hold(self->map);
    PyObject *r = scan_meta_held(self, held->t, args, nargs);
    map_drop(held);
    return r;
}

static int visit_count(table_obj *self, sc_seen_t *seen, int state, const u8 *key, void *arg)
{
    if (state == SC_HIT && in_prefix(self, key, seen->f.it.klen))
        ++*(Py_ssize_t *)arg;
    return 0;
}
/* Exact when nobody writes: a group walked again while others write may count twice. */
Py_ssize_t table_length(PyObject *o)
{
    table_obj *self = (table_obj *)o;
    Py_ssize_t n = 0;
    if (self->map != NULL && map_replaced(self->map) && table_follow(self, 0) < 0)
        return -1;
    if (self->map == NULL)
        return closed_error(self);
    map_t *held = map_hold(self->map);
    sc_table_t *t = held->t;
    for (u32 g = 0; g < sc_n_groups(t); g++) {
        Py_ssize_t before = n;
        u8 moves[SC_GROUP];
        for (int tries = 0; tries < 8; tries++) { /* unlike a walk, a count begins the group anew */
            n = before;
            u64 *entries = (u64 *)PyMem_Malloc(SC_GROUP * SC_N_SLOTS * (sizeof(u64) + sizeof(u32)) + SC_MAX_KEY);
            if (entries == NULL) {
                map_drop(held);
                PyErr_NoMemory();
                return -1;
            }
            u32 *where = (u32 *)(void *)(entries + SC_GROUP * SC_N_SLOTS);
            u8 *key = (u8 *)(where + SC_GROUP * SC_N_SLOTS);
            u32 found = sc_group_entries(t, g, entries, where, moves);
            for (u32 i = 0; i < found; i++) {
                sc_seen_t seen;
                int state = sc_see(t, g, where[i], entries[i], &seen, key);
                (void)visit_count(self, &seen, state, key, &n);
            }
            PyMem_Free(entries);
            if (!sc_group_moved(t, g, moves))
                break;
        }
    }
    map_drop(held);
    return n;
}
