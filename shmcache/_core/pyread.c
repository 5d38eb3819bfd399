/* pyread.c - the methods of _core.Table that store nothing but a use bit.
 *
 * A read builds its result object straight from the segment: small values are copied once. */
#include "pycore.h"
#include "read.h"
#include <math.h>

#define BATCH 32 /* keys whose lines get_many prefetches together: more than a core's outstanding misses */

typedef PyObject *const *args_t;

static PyObject *corrupt_as_miss(sc_table_t *t)
{
    sc_count(t, SC_ST_CORRUPT, 1);
    return NULL;
}

/* The value of a found item. *rc is what sc_get_finish said; NULL without an error unless that is a hit. */
static PyObject *read_found(table_obj *self, const pykey *k, sc_found_t *f, int count,
                                                    sc_token_t *token, int *rc)
{
    sc_table_t *t = k->m->t;
    u32 type = SC_TYPE(f->it.type);
    u8 stack[1024];
    u8 *buf = stack;
    PyObject *bytes = NULL, *value = NULL;
    *rc = SC_MISS;
    if (type == SC_T_BYTES || type >= SC_T_BIGINT) {
        if ((bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)f->it.vlen)) == NULL)
            return NULL;
        buf = (u8 *)bytes + self->st->bytes_off;
    } else if (f->it.vlen > sizeof stack && (buf = (u8 *)PyMem_Malloc(f->it.vlen)) == NULL) {
        return PyErr_NoMemory();
    }
    if (SC_UNLIKELY(f->it.vlen >= BIG)) {
        Py_BEGIN_ALLOW_THREADS;
        *rc = sc_get_finish(t, &k->k, f, buf, count);
        Py_END_ALLOW_THREADS;
    } else {
        *rc = sc_get_finish(t, &k->k, f, buf, count);
    }
    if (SC_LIKELY(*rc == SC_HIT)) {
        if (token != NULL)
            *token = sc_token_of(t, &k->k, f, buf);
        double d;
        switch (type) {
        case SC_T_BYTES:
            return bytes;
        case SC_T_STR:
            value = PyUnicode_DecodeUTF8((const char *)buf, (Py_ssize_t)f->it.vlen, NULL);
            if (value == NULL && PyErr_ExceptionMatches(PyExc_UnicodeDecodeError)) {
                PyErr_Clear();
                value = corrupt_as_miss(t);
            }
            break;
        case SC_T_INT:
            value = PyLong_FromLongLong(f->num);
            break;
        case SC_T_FLOAT:
            if (f->it.vlen != 8) {
                corrupt_as_miss(t);
                break;
            }
            memcpy(&d, buf, 8);
            value = PyFloat_FromDouble(d);
            break;
        case SC_T_NONE:
            value = Py_NewRef(Py_None);
            break;
        case SC_T_FALSE:
            value = Py_NewRef(Py_False);
            break;
        case SC_T_TRUE:
            value = Py_NewRef(Py_True);
            break;
        default:
            value = codec_decode(self, f->it.type, bytes);
        }
    }
    Py_XDECREF(bytes);
    if (buf != stack && bytes == NULL)
        PyMem_Free(buf);
    return value;
}

/* New reference; NULL without an error: miss. found: f is what sc_get_begin gave. grace: an item past its soft deadline
 * counts. */
static __attribute__((noinline)) PyObject *read_on(table_obj *self, const pykey *k, sc_found_t *f, int found, int count,
                                                   int grace, sc_token_t *token)
{
    sc_table_t *t = k->m->t;
    for (int tries = 0; tries < READ_TRIES; tries++, found = 0) {
        if (!found && sc_get_begin(t, &k->k, f) != SC_HIT)
            return NULL;
        if (SC_UNLIKELY(f->it.soft != 0) && !grace && f->it.soft <= sc_now(t)) {
            if (sc_look(t, &k->k, f) != SC_HIT || (f->it.soft != 0 && f->it.soft <= sc_now(t)))
                return NULL;
        }
        int rc;
        PyObject *value = read_found(self, k, f, count, token, &rc);
        if (SC_LIKELY(rc != SC_AGAIN))
            return value;
    }
    sc_count(t, SC_ST_CONTENDED, 1);
    return NULL;
}
PyObject *read_value(table_obj *self, pykey *k, sc_found_t *f, int count, int grace, sc_token_t *token)
{
    return read_on(self, k, f, 0, count, grace, token);
}

static PyObject *table_get(PyObject *o, args_t args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = {"key", "default"};
    table_obj *self = (table_obj *)o;
    PyObject *a[2] = {NULL, NULL};
    if (SC_LIKELY(kwnames == NULL && nargs >= 1 && nargs <= 2)) {
        a[0] = args[0];
        if (nargs == 2)
            a[1] = args[1];
    } else if (args_parse("get", args, nargs, kwnames, names, 2, 2, 1, a) != 0) {
        return NULL;
    }
    pykey k;
    sc_found_t found;
    int begun = 0;
    Py_ssize_t n;
    const char *p;
    if (SC_LIKELY(PyUnicode_CheckExact(a[0])) && SC_LIKELY(self->prefix_len == 0) && SC_LIKELY(self->map != NULL) &&
        SC_LIKELY(!map_replaced(self->map)) &&
        SC_LIKELY((p = PyUnicode_AsUTF8AndSize(a[0], &n)) != NULL) && SC_LIKELY(n - 1 < (Py_ssize_t)SC_MAX_KEY) && SC_LIKELY(n > 0)) {
        /* Nothing in here runs Python or lets the GIL go, so the mapping need not be held. */
        sc_table_t *t = self->map->t;
        sc_key_t key;
        sc_found_t f;
        sc_key_init(t, &key, p, (u32)n);
        int rc = sc_read_begin(t, &key, &f, 0);
        if (rc == SC_HIT && SC_LIKELY(SC_TYPE(f.it.type) == SC_T_BYTES) && SC_LIKELY(f.it.soft == 0) &&
            SC_LIKELY(f.it.vlen < BIG)) {
            PyObject *value = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)f.it.vlen);
            if (SC_UNLIKELY(value == NULL))
                return NULL;
            rc = sc_read_finish(t, &key, &f, (u8 *)value + self->st->bytes_off, 1);
            if (SC_LIKELY(rc == SC_HIT)) {
                sc_count(t, SC_ST_HITS, 1);
                return value;
            }
            Py_DECREF(value);
        } else {
            begun = rc == SC_HIT;
        }
        if (rc == SC_MISS) {
            sc_count(t, SC_ST_MISSES, 1);
            return or_default(NULL, a[1]);
        }
        k.k = key;
        k.heap = NULL;
        k.m = map_hold(self->map);
        found = f;
    } else {
        PyErr_Clear(); /* key_init words it */
        if (key_init(self, a[0], &k) != 0)
            return NULL;
    }
    PyObject *v = counted(&k, read_on(self, &k, &found, begun, 1, 0, NULL));
    key_done(&k);
    return or_default(v, a[1]);
}

static PyObject *table_peek(PyObject *o, PyObject *key)
{
    table_obj *self = (table_obj *)o;
    pykey k;
    sc_found_t f;
    if (key_init(self, key, &k) != 0)
        return NULL;
    PyObject *v = read_value(self, &k, &f, 0, 0, NULL);
    key_done(&k);
    return or_default(v, self->st->miss);
}

static PyObject *token_object(const sc_token_t *tok)
{
    char raw[16];
    memcpy(raw, &tok->lo, 8);
    memcpy(raw + 8, &tok->hi, 8);
    return PyBytes_FromStringAndSize(raw, 16);
}

static PyObject *table_gets(PyObject *o, args_t args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = {"key", "default"};
    table_obj *self = (table_obj *)o;
    PyObject *a[2];
    if (args_parse("gets", args, nargs, kwnames, names, 2, 2, 1, a) != 0)
        return NULL;
    pykey k;
    sc_found_t f;
    sc_token_t tok;
    if (key_init(self, a[0], &k) != 0)
        return NULL;
    PyObject *v = counted(&k, read_value(self, &k, &f, 1, 0, &tok));
    key_done(&k);
    if (v == NULL)
        return or_default(v, a[1]);
    PyObject *token = token_object(&tok), *pair = token ? PyTuple_Pack(2, v, token) : NULL;
    Py_DECREF(v);
    Py_XDECREF(token);
    return pair;
}

static PyObject *table_get_grace(PyObject *o, PyObject *key)
{
    table_obj *self = (table_obj *)o;
    pykey k;
    sc_found_t f;
    if (key_init(self, key, &k) != 0)
        return NULL;
    PyObject *v = counted(&k, read_value(self, &k, &f, 1, 1, NULL));
    int fresh = v != NULL && (f.it.soft == 0 || f.it.soft > sc_now(k.m->t));
    key_done(&k);
    if (v == NULL)
        return or_default(v, NULL);
    PyObject *pair = PyTuple_Pack(2, v, fresh ? Py_True : Py_False);
    Py_DECREF(v);
    return pair;
}

/* Found and not past its soft deadline: 1, 0, or -1 with an error. *left_ms: what is left, 0 = for ever. */
static int look(table_obj *self, PyObject *key, u64 *left_ms)
{
    pykey k;
    sc_found_t f;
    if (key_init(self, key, &k) != 0)
        return -1;
    sc_table_t *t = k.m->t;
    int there = sc_look(t, &k.k, &f) == SC_HIT;
    u64 deadline = !there ? 0 : f.it.soft != 0 ? f.it.soft : SC_W1_DEADLINE(f.it.w1), now = deadline ? sc_now(t) : 0;
    key_done(&k);
    *left_ms = deadline > now ? deadline - now : 0;
    return there && (deadline == 0 || deadline > now);
}

static PyObject *ttl_one(PyObject *o, PyObject *key)
{
    u64 left;
    int r = look((table_obj *)o, key, &left);
    if (r <= 0)
        return r < 0 ? NULL : Py_NewRef(Py_None);
    return PyFloat_FromDouble(left == 0 ? HUGE_VAL : (double)left / 1000.0);
}

int table_contains(PyObject *o, PyObject *key)
{
    u64 left;
    return look((table_obj *)o, key, &left);
}

static PyObject *counter_one(PyObject *o, PyObject *key)
{
    table_obj *self = (table_obj *)o;
    pykey k;
    sc_found_t f;
    if (key_init(self, key, &k) != 0)
        return NULL;
    sc_table_t *t = k.m->t;
    for (int tries = 0; tries < READ_TRIES; tries++) {
        int rc = sc_look(t, &k.k, &f);
        if (rc == SC_HIT && f.it.soft != 0 && f.it.soft <= sc_now(t))
            rc = SC_MISS;
        if (rc == SC_HIT && SC_TYPE(f.it.type) != SC_T_INT) {
            raise_rc(self, t, SC_TYPE(f.it.type) == SC_T_BIGINT ? SC_OVERFLOW : SC_NOT_NUMBER, NULL);
            key_done(&k);
            return NULL;
        }
        u64 num;
        if (rc == SC_HIT && (rc = sc_get_finish(t, &k.k, &f, &num, 1)) == SC_AGAIN)
            continue;
        sc_count(t, rc == SC_HIT ? SC_ST_HITS : SC_ST_MISSES, 1);
        key_done(&k);
        return rc == SC_HIT ? PyLong_FromLongLong(f.num) : Py_NewRef(Py_None);
    }
    key_done(&k);
    return Py_NewRef(Py_None);
}

PyObject *table_subscript(PyObject *o, PyObject *key)
{
    PyObject *v = table_get(o, (PyObject *const[]){key, ((table_obj *)o)->st->miss}, 2, NULL);
    if (v == ((table_obj *)o)->st->miss) {
        Py_DECREF(v);
        PyErr_SetObject(PyExc_KeyError, key);
        return NULL;
    }
    return v;
}

/* Hashes a batch, asks for its bucket lines, then for the life word and first line of each item, then reads. */
static PyObject *get_many_one(PyObject *o, PyObject *keys)
{
    table_obj *self = (table_obj *)o;
    ATTACHED(self);
    PyObject *list = PySequence_List(keys), *result = list ? PyDict_New() : NULL;
    Py_ssize_t n = list ? PyList_Size(list) : 0;
    pykey batch[BATCH];
    map_t *held = map_hold(self->map);
    for (Py_ssize_t from = 0; result != NULL && from < n; from += BATCH) {
        Py_ssize_t m = n - from < BATCH ? n - from : BATCH, made = 0;
        u64 hits = 0, misses = 0;
        for (; made < m; made++) {
            if (key_init(self, PyList_GetItem(list, from + made), &batch[made]) != 0)
                break;
            SC_PREFETCH(&batch[made].m->t->shard[batch[made].k.shard].buckets[batch[made].k.b1]);
        }
        int ok = made == m;
        for (Py_ssize_t i = 0; ok && i < m; i++) {
            sc_table_t *t = batch[i].m->t;
            sc_shard_t *s = &t->shard[batch[i].k.shard];
            sc_bucket_t *b = &s->buckets[batch[i].k.b1];
            u64 e = 0;
            for (u32 j = 0; j < SC_N_SLOTS && e == 0; j++)
                if (SC_ENTRY_TAG(SC_LD(&b->entry[j])) == batch[i].k.tag)
                    e = SC_LD(&b->entry[j]);
            if (e == 0) {
                SC_PREFETCH(&s->buckets[sc_key_b2(t, &batch[i].k)]);
            } else if (sc_place_ok(t, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e))) {
                SC_PREFETCH(&s->life[SC_ENTRY_PAGE(e)]);
                u8 *p = sc_at(t, s, SC_ENTRY_PAGE(e), SC_ENTRY_OFF(e));
                SC_PREFETCH(p);
                SC_PREFETCH(p + 64);
            }
        }
        for (Py_ssize_t i = 0; ok && i < m; i++) {
            sc_found_t f;
            PyObject *v = read_value(self, &batch[i], &f, 1, 0, NULL);
            if (v == NULL) {
                ok = !PyErr_Occurred();
                misses++;
                continue;
            }
            hits++;
            ok = PyDict_SetItem(result, PyList_GetItem(list, from + i), v) == 0;
            Py_DECREF(v);
        }
        for (Py_ssize_t i = 0; i < made; i++)
            key_done(&batch[i]);
        if (!ok) {
            Py_CLEAR(result);
            break;
        }
        if (hits)
            sc_count(held->t, SC_ST_HITS, hits);
        if (misses)
            sc_count(held->t, SC_ST_MISSES, misses);
    }
    map_drop(held);
    Py_XDECREF(list);
    return result;
}

TABLE_ONE(ttl, key)
TABLE_ONE(counter, key)
TABLE_ONE(get_many, keys)

PyMethodDef table_read_methods[] = {
    TABLE_METHOD(get), TABLE_METHOD(gets), TABLE_METHOD(ttl), TABLE_METHOD(counter), TABLE_METHOD(get_many),
    {"_peek", (PyCFunction)table_peek, METH_O, NULL},
    {"_get_grace", (PyCFunction)table_get_grace, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};
