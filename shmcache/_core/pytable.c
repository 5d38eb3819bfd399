/* pytable.c - the methods of _core.Table that write.
 *
 * Values are encoded before a guard is asked for and decoded after it is gone; between sc_enter and sc_leave runs no Python. */
#include "pycore.h"
#include <math.h>

typedef PyObject *const *args_t;

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

TABLE_ONE(delete, key)
TABLE_ONE(delete_many, keys)

PyMethodDef table_write_methods[] = {
    TABLE_METHOD(set), TABLE_METHOD(add), TABLE_METHOD(replace), TABLE_METHOD(cas), TABLE_METHOD(append),
    TABLE_METHOD(prepend), TABLE_METHOD(delete), TABLE_METHOD(pop), TABLE_METHOD(touch), TABLE_METHOD(gat),
    TABLE_METHOD(incr), TABLE_METHOD(decr), TABLE_METHOD(set_many), TABLE_METHOD(delete_many),
    {"_set_grace", (PyCFunction)(void (*)(void))table_set_grace, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
#undef STORE
