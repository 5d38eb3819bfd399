/* pytable.c - the hot methods of _core.Table: reads and writes.
 *
 * Values are encoded before a guard is asked for and decoded after it is gone; between sc_enter and sc_leave runs no Python.
 * A read builds its result object straight from the segment: small values are copied once. */
#include "pycore.h"
#include <math.h>

#define BIG 32768u         /* bytes from which copying drops the GIL: about 2 us of memcpy against 44 ns of hand-over */
#define BATCH 32           /* keys whose lines get_many prefetches together: more than a core's outstanding misses */

typedef PyObject *const *args_t;

/* ---- reads ------------------------------------------------------------------------------------------------------ */

static PyObject *corrupt_as_miss(sc_table_t *t)
{
    sc_count(t, SC_ST_CORRUPT, 1);
    return NULL;
}

/* New reference; NULL without an error: miss. grace: an item past its soft deadline counts. */
PyObject *read_value(table_obj *self, pykey *k, sc_found_t *f, int count, int grace, sc_token_t *token)
{
    sc_table_t *t = k->m->t;
    for (int tries = 0; tries < READ_TRIES; tries++) {
        if (sc_get_begin(t, &k->k, f) != SC_HIT)
            return NULL;
        if (SC_UNLIKELY(f->it.soft != 0) && !grace && f->it.soft <= sc_now(t)) {
            if (sc_look(t, &k->k, f) != SC_HIT || (f->it.soft != 0 && f->it.soft <= sc_now(t)))
                return NULL;
        }
        u32 type = SC_TYPE(f->it.type);
        u8 stack[1024];
        u8 *buf = stack;
        PyObject *bytes = NULL;
        if (type == SC_T_BYTES || type >= SC_T_BIGINT) {
            if ((bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)f->it.vlen)) == NULL)
                return NULL;
            buf = (u8 *)bytes + self->st->bytes_off;
        } else if (f->it.vlen > sizeof stack && (buf = (u8 *)PyMem_Malloc(f->it.vlen)) == NULL) {
            return PyErr_NoMemory();
        }
        int rc;
        if (SC_UNLIKELY(f->it.vlen >= BIG)) {
            Py_BEGIN_ALLOW_THREADS;
            rc = sc_get_finish(t, &k->k, f, buf, count);
            Py_END_ALLOW_THREADS;
        } else {
            rc = sc_get_finish(t, &k->k, f, buf, count);
        }
        PyObject *value = NULL;
        if (SC_LIKELY(rc == SC_HIT)) {
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
        if (rc != SC_AGAIN)
            return value;
    }
    sc_count(t, SC_ST_CONTENDED, 1);
    return NULL;
}

static PyObject *counted(const pykey *k, PyObject *value)
{
    if (value != NULL || !PyErr_Occurred())
        sc_count(k->m->t, value != NULL ? SC_ST_HITS : SC_ST_MISSES, 1);
    return value;
}
static PyObject *or_default(PyObject *value, PyObject *dflt)
{
    if (value != NULL || PyErr_Occurred())
        return value;
    return Py_NewRef(dflt == NULL ? Py_None : dflt);
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
    sc_found_t f;
    if (key_init(self, a[0], &k) != 0)
        return NULL;
    PyObject *v = counted(&k, read_value(self, &k, &f, 1, 0, NULL));
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
                SC_PREFETCH(&s->buckets[batch[i].k.b2]);
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

/* ---- writes ----------------------------------------------------------------------------------------------------- */

static int store(table_obj *self, pykey *k, pyvalue *v, const sc_cond_t *cond)
{
    int rc;
    RUN(self, k->m, rc, v->v.len >= BIG, sc_store(t, &k->k, &v->v, cond, wait));
    sc_tick(k->m->t);
    return rc;
}

static PyObject *store_as(table_obj *self, const char *fn, enum sc_mode mode, args_t args, Py_ssize_t nargs,
                          PyObject *kwnames)
{
    static const char *const plain[] = {"key", "value", "ttl", "expire_at"};
    static const char *const with_token[] = {"key", "value", "token", "ttl", "expire_at"};
    PyObject *a[5] = {NULL, NULL, NULL, NULL, NULL};
    sc_cond_t cond;
    memset(&cond, 0, sizeof cond);
    cond.mode = mode;
    if (mode == SC_CAS) {
        if (args_parse(fn, args, nargs, kwnames, with_token, 4, 5, 3, a) != 0)
            return NULL;
        if (!PyBytes_CheckExact(a[2]) || PyBytes_Size(a[2]) != 16)
            return PyErr_Format(PyExc_TypeError, "token: one that gets() of this engine gave wanted, %R found",
                                (PyObject *)Py_TYPE(a[2]));
        memcpy(&cond.token.lo, PyBytes_AsString(a[2]), 8);
        memcpy(&cond.token.hi, PyBytes_AsString(a[2]) + 8, 8);
        a[2] = a[3];
        a[3] = a[4];
    } else if (SC_LIKELY(kwnames == NULL && nargs == 2)) {
        a[0] = args[0];
        a[1] = args[1];
    } else if (args_parse(fn, args, nargs, kwnames, plain, 3, 4, 2, a) != 0) {
        return NULL;
    }
    pykey k;
    pyvalue v;
    u64 deadline;
    if (deadline_of(self, a[2], a[3], &deadline) != 0 || key_init(self, a[0], &k) != 0)
        return NULL;
    if (value_init(self, a[1], &v) != 0) {
        key_done(&k);
        return NULL;
    }
    v.v.deadline = deadline;
    int rc = store(self, &k, &v, &cond);
    value_done(&v);
    PyObject *r;
    if (rc == SC_OK)
        r = Py_NewRef(Py_True);
    else if (rc == SC_EXISTS || rc == SC_CHANGED)
        r = Py_NewRef(Py_False);
    else if (rc == SC_MISS)
        r = Py_NewRef(mode == SC_CAS ? Py_None : Py_False);
    else
        r = raise_rc(self, k.m->t, rc, &k);
    key_done(&k);
    return r;
}

#define STORE(name, mode)                                                                            \
    static PyObject *table_##name(PyObject *o, args_t args, Py_ssize_t nargs, PyObject *kwnames)     \
    {                                                                                                \
        return store_as((table_obj *)o, #name, mode, args, nargs, kwnames);                          \
    }
STORE(set, SC_SET)
STORE(add, SC_ADD)
STORE(replace, SC_REPLACE)
STORE(cas, SC_CAS)

static PyObject *table_set_grace(PyObject *o, args_t args, Py_ssize_t nargs)
{
    table_obj *self = (table_obj *)o;
    ATTACHED(self);
    if (nargs != 4)
        return PyErr_Format(PyExc_TypeError, "_set_grace() takes 4 arguments (%zd given)", nargs);
    double ttl = PyFloat_AsDouble(args[2]), grace = ttl == -1.0 && PyErr_Occurred() ? -1.0 : PyFloat_AsDouble(args[3]);
    if (PyErr_Occurred())
        return NULL;
    if (!(ttl > 0 && grace >= 0 && ttl <= MAX_TTL_S && grace <= MAX_TTL_S))
        return PyErr_Format(PyExc_ValueError, "ttl, grace: 0 to %d seconds wanted, %R and %R found", MAX_TTL_S, args[2],
                            args[3]);
    pykey k;
    pyvalue v;
    sc_cond_t cond;
    memset(&cond, 0, sizeof cond);
    if (key_init(self, args[0], &k) != 0)
        return NULL;
    PyObject *r = NULL;
    if (value_init(self, args[1], &v) == 0) {
        if (ms_after(self, ttl, &v.v.soft) == 0 && ms_after(self, ttl + grace, &v.v.deadline) == 0) {
            int rc = store(self, &k, &v, &cond);
            r = rc == SC_OK ? Py_NewRef(Py_True) : raise_rc(self, k.m->t, rc, &k);
        }
        value_done(&v);
    }
    key_done(&k);
    return r;
}

/* append and prepend: read, join, store if the very same item still stands there, else again. */
static PyObject *join(table_obj *self, const char *fn, args_t args, Py_ssize_t nargs, PyObject *kwnames, int front)
{
    static const char *const names[] = {"key", "data"};
    PyObject *a[2];
    if (args_parse(fn, args, nargs, kwnames, names, 2, 2, 2, a) != 0)
        return NULL;
    if (!PyBytes_Check(a[1]) && !PyUnicode_Check(a[1]))
        return PyErr_Format(PyExc_TypeError, "data: bytes or str wanted, %R found", (PyObject *)Py_TYPE(a[1]));
    pykey k;
    if (key_init(self, a[0], &k) != 0)
        return NULL;
    PyObject *r = NULL;
    for (int tries = 0;; tries++) {
        sc_found_t f;
        if (tries == READ_TRIES) {
            raise_rc(self, k.m->t, SC_CHANGED, &k);
            break;
        }
        PyObject *old = read_value(self, &k, &f, 1, 0, NULL);
        if (old == NULL) {
            r = PyErr_Occurred() ? NULL : Py_NewRef(Py_False);
            break;
        }
        int text = PyUnicode_Check(old), binary = PyBytes_Check(old);
        if ((!text && !binary) || text != PyUnicode_Check(a[1])) {
            PyErr_Format(PyExc_TypeError, "%s: a stored bytes or str and data of its type wanted, %R and %R found", fn,
                         (PyObject *)Py_TYPE(old), (PyObject *)Py_TYPE(a[1]));
            Py_DECREF(old);
            break;
        }
        PyObject *first = front ? a[1] : old, *second = front ? old : a[1], *joined;
        if (text) {
            joined = PyUnicode_Concat(first, second);
        } else {
            joined = Py_NewRef(first);
            PyBytes_Concat(&joined, second);
        }
        Py_DECREF(old);
        if (joined == NULL)
            break;
        pyvalue v;
        int rc = RC_PYERR;
        if (value_init(self, joined, &v) == 0) {
            sc_cond_t cond = {SC_IF_SAME, {0, 0}, f.entry, f.life, 1};
            rc = store(self, &k, &v, &cond);
            value_done(&v);
        }
        Py_DECREF(joined);
        if (rc == SC_CHANGED || rc == SC_MISS)
            continue;
        r = rc == SC_OK ? Py_NewRef(Py_True) : raise_rc(self, k.m->t, rc, &k);
        break;
    }
    key_done(&k);
    return r;
}
static PyObject *table_append(PyObject *o, args_t args, Py_ssize_t nargs, PyObject *kwnames)
{
    return join((table_obj *)o, "append", args, nargs, kwnames, 0);
}
static PyObject *table_prepend(PyObject *o, args_t args, Py_ssize_t nargs, PyObject *kwnames)
{
    return join((table_obj *)o, "prepend", args, nargs, kwnames, 1);
}

static int delete_key(table_obj *self, pykey *k, const sc_cond_t *cond, i64 *num)
{
    int rc;
    RUN(self, k->m, rc, 0, sc_delete(t, &k->k, cond, num, wait));
    sc_tick(k->m->t);
    return rc;
}

static PyObject *delete_one(PyObject *o, PyObject *key)
{
    table_obj *self = (table_obj *)o;
    pykey k;
    if (key_init(self, key, &k) != 0)
        return NULL;
    int rc = delete_key(self, &k, NULL, NULL);
    PyObject *r = rc == SC_OK ? Py_NewRef(Py_True) : rc == SC_MISS ? Py_NewRef(Py_False) : raise_rc(self, k.m->t, rc, &k);
    key_done(&k);
    return r;
}

int table_ass_subscript(PyObject *o, PyObject *key, PyObject *value)
{
    PyObject *r = value == NULL ? delete_one(o, key) : table_set(o, (PyObject *const[]){key, value}, 2, NULL);
    if (r == NULL)
        return -1;
    int absent = r == Py_False;
    Py_DECREF(r);
    if (value == NULL && absent) {
        PyErr_SetObject(PyExc_KeyError, key);
        return -1;
    }
    return 0;
}

static PyObject *delete_many_one(PyObject *o, PyObject *keys)
{
    table_obj *self = (table_obj *)o;
    ATTACHED(self);
    PyObject *list = PySequence_List(keys);
    if (list == NULL)
        return NULL;
    Py_ssize_t n = PyList_Size(list), gone = 0;
    pykey k;
    int ok = 1;
    for (Py_ssize_t i = 0; ok && i < n; i++) { /* every key is checked before anything is touched */
        ok = key_init(self, PyList_GetItem(list, i), &k) == 0;
        if (ok)
            key_done(&k);
    }
    for (Py_ssize_t i = 0; ok && i < n; i++) {
        if (key_init(self, PyList_GetItem(list, i), &k) != 0) {
            ok = 0;
            break;
        }
        int rc = delete_key(self, &k, NULL, NULL);
        if (rc == SC_OK)
            gone++;
        else if (rc != SC_MISS) {
            raise_rc(self, k.m->t, rc, &k);
            ok = 0;
        }
        key_done(&k);
    }
    Py_DECREF(list);
    return ok ? PyLong_FromSsize_t(gone) : NULL;
}

static PyObject *table_pop(PyObject *o, args_t args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = {"key", "default"};
    table_obj *self = (table_obj *)o;
    PyObject *a[2];
    if (args_parse("pop", args, nargs, kwnames, names, 2, 2, 1, a) != 0)
        return NULL;
    pykey k;
    if (key_init(self, a[0], &k) != 0)
        return NULL;
    PyObject *r = NULL;
    for (int tries = 0;; tries++) {
        sc_found_t f;
        if (tries == READ_TRIES) {
            raise_rc(self, k.m->t, SC_CHANGED, &k);
            break;
        }
        PyObject *v = read_value(self, &k, &f, 0, 0, NULL);
        if (v == NULL) {
            r = or_default(counted(&k, NULL), a[1]);
            break;
        }
        i64 num = f.num;
        sc_cond_t cond = {SC_IF_SAME, {0, 0}, f.entry, f.life, 0};
        int rc = delete_key(self, &k, &cond, &num);
        if (rc == SC_CHANGED || rc == SC_MISS) {
            Py_DECREF(v);
            continue;
        }
        if (rc != SC_OK) {
            Py_DECREF(v);
            r = raise_rc(self, k.m->t, rc, &k);
            break;
        }
        if (SC_TYPE(f.it.type) == SC_T_INT && num != f.num) { /* an incr came between read and delete */
            Py_DECREF(v);
            v = PyLong_FromLongLong(num);
        }
        r = counted(&k, v);
        break;
    }
    key_done(&k);
    return r;
}

/* A new lifetime for the very item that was read, or for whatever stands there (cond NULL). */
static int touch_key(table_obj *self, pykey *k, u64 deadline, const sc_cond_t *cond)
{
    int rc;
    RUN(self, k->m, rc, 0, sc_touch(t, &k->k, deadline, cond, wait));
    sc_tick(k->m->t);
    while (rc == SC_AGAIN) { /* it has a soft deadline: stored anew without one */
        sc_found_t f;
        PyObject *old = read_value(self, k, &f, 0, 0, NULL);
        if (old == NULL)
            return PyErr_Occurred() ? RC_PYERR : SC_MISS;
        pyvalue v;
        rc = RC_PYERR;
        if (value_init(self, old, &v) == 0) {
            sc_cond_t same = {SC_IF_SAME, {0, 0}, f.entry, f.life, 0};
            v.v.deadline = deadline;
            rc = store(self, k, &v, &same);
            value_done(&v);
        }
        Py_DECREF(old);
        if (rc == SC_CHANGED)
            rc = cond != NULL ? SC_CHANGED : SC_AGAIN;
        if (rc == SC_CHANGED)
            break;
    }
    return rc;
}

static PyObject *table_touch(PyObject *o, args_t args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = {"key", "ttl", "expire_at"};
    table_obj *self = (table_obj *)o;
    PyObject *a[3];
    u64 deadline;
    pykey k;
    if (args_parse("touch", args, nargs, kwnames, names, 2, 3, 1, a) != 0 || deadline_of(self, a[1], a[2], &deadline) != 0 ||
        key_init(self, a[0], &k) != 0)
        return NULL;
    int rc = touch_key(self, &k, deadline, NULL);
    PyObject *r = rc == SC_OK ? Py_NewRef(Py_True) : rc == SC_MISS ? Py_NewRef(Py_False) : raise_rc(self, k.m->t, rc, &k);
    key_done(&k);
    return r;
}

static PyObject *table_gat(PyObject *o, args_t args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = {"key", "ttl", "default", "expire_at"};
    table_obj *self = (table_obj *)o;
    PyObject *a[4];
    u64 deadline;
    pykey k;
    if (args_parse("gat", args, nargs, kwnames, names, 3, 4, 1, a) != 0 || deadline_of(self, a[1], a[3], &deadline) != 0 ||
        key_init(self, a[0], &k) != 0)
        return NULL;
    PyObject *r = NULL;
    for (int tries = 0;; tries++) {
        sc_found_t f;
        if (tries == READ_TRIES) {
            raise_rc(self, k.m->t, SC_CHANGED, &k);
            break;
        }
        PyObject *v = read_value(self, &k, &f, 1, 0, NULL);
        if (v == NULL) {
            r = or_default(counted(&k, NULL), a[2]);
            break;
        }
        sc_cond_t cond = {SC_IF_SAME, {0, 0}, f.entry, f.life, 0};
        int rc = touch_key(self, &k, deadline, &cond);
        if (rc == SC_OK) {
            r = counted(&k, v);
            break;
        }
        Py_DECREF(v);
        if (rc != SC_CHANGED && rc != SC_MISS) {
            r = raise_rc(self, k.m->t, rc, &k);
            break;
        }
    }
    key_done(&k);
    return r;
}

static int number_of(table_obj *self, PyObject *value, const char *name, i64 dflt, i64 *out)
{
    int overflow = 1;
    *out = dflt;
    if (value == NULL)
        return 0;
    if (PyLong_CheckExact(value))
        *out = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow == 0)
        return 0;
    PyObject *text = PyUnicode_FromString(name);
    PyObject *r = text ? PyObject_CallFunctionObjArgs(self->st->check_number, value, text, NULL) : NULL;
    Py_XDECREF(text);
    Py_XDECREF(r);
    if (r != NULL)
        PyErr_Format(PyExc_TypeError, "%s: int wanted, %R found", name, (PyObject *)Py_TYPE(value));
    return -1;
}

static PyObject *add_to(table_obj *self, const char *fn, args_t args, Py_ssize_t nargs, PyObject *kwnames, int minus)
{
    static const char *const names[] = {"key", "delta", "initial", "ttl", "expire_at"};
    PyObject *a[5] = {NULL, NULL, NULL, NULL, NULL};
    if (SC_LIKELY(kwnames == NULL && nargs >= 1 && nargs <= 2)) {
        a[0] = args[0];
        if (nargs == 2)
            a[1] = args[1];
    } else if (args_parse(fn, args, nargs, kwnames, names, 2, 5, 1, a) != 0) {
        return NULL;
    }
    i64 delta, initial = 0, result = 0;
    int create = a[2] != Py_None;
    u64 deadline;
    if (number_of(self, a[1], "delta", 1, &delta) != 0 || (create && number_of(self, a[2], "initial", 0, &initial) != 0))
        return NULL;
    if (minus) {
        if (delta == INT64_MIN)
            return PyErr_Format(self->st->CounterOverflow, "delta: at most 2**63-1 after negation wanted, -2**63 found");
        delta = -delta;
    }
    pykey k;
    if (deadline_of(self, a[3], a[4], &deadline) != 0 || key_init(self, a[0], &k) != 0)
        return NULL;
    int rc;
    RUN(self, k.m, rc, 0, sc_incr(t, &k.k, delta, create, initial, deadline, &result, wait));
    sc_tick(k.m->t);
    PyObject *r = rc == SC_OK ? PyLong_FromLongLong(result) : rc == SC_MISS ? Py_NewRef(Py_None) : raise_rc(self, k.m->t, rc, &k);
    key_done(&k);
    return r;
}
static PyObject *table_incr(PyObject *o, args_t args, Py_ssize_t nargs, PyObject *kwnames)
{
    return add_to((table_obj *)o, "incr", args, nargs, kwnames, 0);
}
static PyObject *table_decr(PyObject *o, args_t args, Py_ssize_t nargs, PyObject *kwnames)
{
    return add_to((table_obj *)o, "decr", args, nargs, kwnames, 1);
}

/* The pairs of a mapping as a list of 2-tuples nobody else holds. */
static PyObject *own_pairs(PyObject *mapping)
{
    PyObject *items = PyMapping_Items(mapping), *own = items ? PyList_New(0) : NULL;
    for (Py_ssize_t i = 0; own != NULL && i < PyList_Size(items); i++) {
        PyObject *pair = PySequence_Tuple(PyList_GetItem(items, i));
        if (pair != NULL && PyTuple_Size(pair) != 2)
            PyErr_Format(PyExc_ValueError, "mapping: items of 2 elements wanted, one of %zd found", PyTuple_Size(pair));
        if (pair == NULL || PyErr_Occurred() || PyList_Append(own, pair) != 0)
            Py_CLEAR(own);
        Py_XDECREF(pair);
    }
    Py_XDECREF(items);
    return own;
}

/* Every key and value is checked and encoded before anything is stored. */
static PyObject *table_set_many(PyObject *o, args_t args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = {"mapping", "ttl", "expire_at"};
    table_obj *self = (table_obj *)o;
    PyObject *a[3];
    u64 deadline;
    if (args_parse("set_many", args, nargs, kwnames, names, 2, 3, 1, a) != 0 ||
        deadline_of(self, a[1], a[2], &deadline) != 0)
        return NULL;
    PyObject *items = own_pairs(a[0]), *failed = items ? PyList_New(0) : NULL;
    Py_ssize_t n = items ? PyList_Size(items) : 0, made = 0;
    pyvalue *values = failed ? (pyvalue *)PyMem_Malloc((size_t)(n + 1) * sizeof *values) : NULL;
    int ok = values != NULL;
    if (failed != NULL && values == NULL)
        PyErr_NoMemory();
    sc_cond_t cond;
    memset(&cond, 0, sizeof cond);
    pykey k;
    for (; ok && made < n; made++) {
        PyObject *pair = PyList_GetItem(items, made);
        if (key_init(self, PyTuple_GetItem(pair, 0), &k) != 0) {
            ok = 0;
            break;
        }
        int too_large = (u64)k.k.len + 64u > ((u64)k.m->t->n_pages << k.m->t->page_shift) / 4u;
        if (too_large)
            raise_rc(self, k.m->t, SC_TOO_LARGE, &k);
        key_done(&k);
        if (too_large || value_init(self, PyTuple_GetItem(pair, 1), &values[made]) != 0) {
            ok = 0;
            break;
        }
        values[made].v.deadline = deadline;
    }
    for (Py_ssize_t i = 0; ok && i < n; i++) {
        PyObject *key = PyTuple_GetItem(PyList_GetItem(items, i), 0);
        if (key_init(self, key, &k) != 0) {
            ok = 0;
            break;
        }
        int rc = store(self, &k, &values[i], &cond);
        if (rc == SC_NO_SPACE || rc == SC_BUSY)
            ok = PyList_Append(failed, key) == 0;
        else if (rc != SC_OK) {
            raise_rc(self, k.m->t, rc, &k);
            ok = 0;
        }
        key_done(&k);
    }
    for (Py_ssize_t i = 0; i < made; i++)
        value_done(&values[i]);
    PyMem_Free(values);
    Py_XDECREF(items);
    if (!ok)
        Py_CLEAR(failed);
    return failed;
}

#define ONE(name, arg)                                                                            \
    static PyObject *table_##name(PyObject *o, args_t args, Py_ssize_t nargs, PyObject *kwnames) \
    {                                                                                            \
        static const char *const names[] = {#arg};                                               \
        PyObject *a[1];                                                                          \
        if (SC_LIKELY(kwnames == NULL && nargs == 1))                                            \
            return name##_one(o, args[0]);                                                       \
        return args_parse(#name, args, nargs, kwnames, names, 1, 1, 1, a) != 0 ? NULL            \
                                                                               : name##_one(o, a[0]); \
    }
ONE(ttl, key)
ONE(counter, key)
ONE(delete, key)
ONE(get_many, keys)
ONE(delete_many, keys)

#define KW (METH_FASTCALL | METH_KEYWORDS)
#define M(name, flags) {#name, (PyCFunction)(void (*)(void))table_##name, flags, NULL}
PyMethodDef table_hot_methods[] = {
    M(get, KW), M(gets, KW), M(set, KW), M(add, KW), M(replace, KW), M(cas, KW), M(append, KW), M(prepend, KW),
    M(delete, KW), M(pop, KW), M(touch, KW), M(gat, KW), M(ttl, KW), M(incr, KW), M(decr, KW),
    M(counter, KW), M(get_many, KW), M(set_many, KW), M(delete_many, KW),
    {"_peek", (PyCFunction)table_peek, METH_O, NULL},
    {"_get_grace", (PyCFunction)table_get_grace, METH_O, NULL},
    {"_set_grace", (PyCFunction)(void (*)(void))table_set_grace, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
#undef M
#undef KW
#undef ONE
#undef STORE
