/* pytable.c - the hot methods of _core.Table: keys and values in and out, reads, writes.
 *
 * Values are encoded before a guard is asked for and decoded after it is gone; between sc_enter and sc_leave runs no Python.
 * A read builds its result object straight from the segment: small values are copied once. */
#include "pycore.h"
#include <math.h>
#include <stdio.h>
#include <unistd.h>

#define BIG 32768u         /* bytes from which copying drops the GIL: about 2 us of memcpy against 44 ns of hand-over */
#define BATCH 32           /* keys whose lines get_many prefetches together: more than a core's outstanding misses */
#define MAX_TTL_S 315360000 /* ten years; beyond it arguments.lifetime words the error */
#define READ_TRIES 1000

typedef PyObject *const *args_t;

/* ---- arguments ---------------------------------------------------------------------------------------------------- */

int args_parse(const char *fn, args_t args, Py_ssize_t nargs, PyObject *kwnames, const char *const *names, int n_pos,
               int n_names, int n_required, PyObject **out)
{
    Py_ssize_t n_kw = kwnames == NULL ? 0 : PyTuple_Size(kwnames);
    if (nargs > n_pos) {
        PyErr_Format(PyExc_TypeError, "%s() takes at most %d positional arguments (%zd given)", fn, n_pos, nargs);
        return -1;
    }
    for (int i = 0; i < n_names; i++)
        out[i] = i < nargs ? args[i] : NULL;
    for (Py_ssize_t k = 0; k < n_kw; k++) {
        PyObject *name = PyTuple_GetItem(kwnames, k);
        int i = 0;
        while (i < n_names && PyUnicode_CompareWithASCIIString(name, names[i]) != 0)
            i++;
        if (i == n_names) {
            PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument %R", fn, name);
            return -1;
        }
        if (out[i] != NULL) {
            PyErr_Format(PyExc_TypeError, "%s() got multiple values for argument %R", fn, name);
            return -1;
        }
        out[i] = args[nargs + k];
    }
    for (int i = 0; i < n_required; i++)
        if (out[i] == NULL) {
            PyErr_Format(PyExc_TypeError, "%s() missing required argument '%s'", fn, names[i]);
            return -1;
        }
    return 0;
}

int closed_error(table_obj *self)
{
    PyErr_SetString(self->st->Error, "engine: an open one wanted, a closed one found");
    return -1;
}

/* The mapping a call began on is not the engine's any more. */
void moved_error(table_obj *self)
{
    if (self->map == NULL)
        closed_error(self);
    else
        PyErr_SetString(self->st->GuardLost, "segment: the one the call began on wanted, another one found after reattach(); "
                                             "nothing was stored");
}

/* The bytes of a key, prefix included; they live as long as the key object, or in out. */
int key_init(table_obj *self, PyObject *key, pykey *out)
{
    const char *p = NULL;
    Py_ssize_t n = 0;
    PyObject *made = NULL;
    out->heap = NULL;
    if (SC_LIKELY(PyUnicode_CheckExact(key))) {
        p = PyUnicode_AsUTF8AndSize(key, &n);
        if (p == NULL)
            PyErr_Clear();
    } else if (PyBytes_CheckExact(key)) {
        p = PyBytes_AsString(key);
        n = PyBytes_Size(key);
    }
    if (SC_UNLIKELY(p == NULL || n == 0 || n + self->prefix_len > SC_MAX_KEY)) {
        made = PyObject_CallFunctionObjArgs(self->st->check_key, key, NULL); /* words the error */
        if (made == NULL)
            return -1;
        p = PyBytes_AsString(made);
        n = PyBytes_Size(made);
        if (n + self->prefix_len > SC_MAX_KEY) {
            PyErr_Format(self->st->KeyTooLong, "key: 1 to %u bytes with its prefix of %u wanted, %zd found", SC_MAX_KEY,
                         self->prefix_len, n + self->prefix_len);
            Py_DECREF(made);
            return -1;
        }
    }
    const u8 *bytes = (const u8 *)p;
    u32 len = (u32)n + self->prefix_len;
    if (self->prefix_len != 0 || made != NULL) {
        u8 *buf = out->small;
        if (len > sizeof out->small && (buf = out->heap = (u8 *)PyMem_Malloc(len)) == NULL) {
            Py_XDECREF(made);
            PyErr_NoMemory();
            return -1;
        }
        if (self->prefix_len != 0)
            memcpy(buf, self->prefix, self->prefix_len);
        memcpy(buf + self->prefix_len, p, (size_t)n);
        bytes = buf;
        Py_XDECREF(made);
    }
    if (self->map == NULL) {
        PyMem_Free(out->heap);
        return closed_error(self);
    }
    out->m = map_hold(self->map);
    sc_key_init(out->m->t, &out->k, bytes, len);
    return 0;
}

/* A codec may offer a pair of callables that do its common case; asked once, at the first value that needs it. */
static void ask_fast(table_obj *self)
{
    self->asked_fast = 1;
    PyObject *pair = PyObject_CallMethodObjArgs(self->codec, self->st->str_fast, NULL);
    if (pair == NULL) {
        PyErr_Clear();
        return;
    }
    if (PyTuple_Check(pair) && PyTuple_Size(pair) == 2) {
        self->pack = Py_NewRef(PyTuple_GetItem(pair, 0));
        self->unpack = Py_NewRef(PyTuple_GetItem(pair, 1));
    }
    Py_DECREF(pair);
}

static PyObject *decode(table_obj *self, u32 flags, PyObject *data)
{
    if (!self->asked_fast)
        ask_fast(self);
    if (self->unpack != NULL && flags == SC_T_CODEC) {
        PyObject *value = PyObject_CallFunctionObjArgs(self->unpack, data, NULL);
        if (value != NULL)
            return value;
        PyErr_Clear(); /* decode() does it another way, or words the error */
    }
    PyObject *number = PyLong_FromLong((long)flags);
    PyObject *value = number ? PyObject_CallMethodObjArgs(self->codec, self->st->str_decode, number, data, NULL) : NULL;
    Py_XDECREF(number);
    return value;
}

int value_init(table_obj *self, PyObject *value, pyvalue *out)
{
    sc_value_t *v = &out->v;
    Py_ssize_t n = 0;
    memset(v, 0, sizeof *v);
    out->owner = NULL;
    if (PyBytes_CheckExact(value)) {
        v->type = SC_T_BYTES;
        v->p = PyBytes_AsString(value);
        n = PyBytes_Size(value);
    } else if (PyUnicode_CheckExact(value) && (v->p = PyUnicode_AsUTF8AndSize(value, &n)) != NULL) {
        v->type = SC_T_STR;
    } else if (value == Py_None) {
        v->type = SC_T_NONE;
    } else if (value == Py_True || value == Py_False) {
        v->type = value == Py_True ? SC_T_TRUE : SC_T_FALSE;
    } else if (PyFloat_CheckExact(value)) {
        v->type = SC_T_FLOAT;
        out->d = PyFloat_AsDouble(value);
        v->p = &out->d;
        n = 8;
    } else {
        int overflow = 1;
        PyErr_Clear(); /* a str with lone surrogates: the codec words the error */
        if (PyLong_CheckExact(value))
            v->num = PyLong_AsLongLongAndOverflow(value, &overflow);
        PyObject *packed = NULL;
        if (overflow && !PyLong_CheckExact(value) && !PyUnicode_CheckExact(value)) {
            if (!self->asked_fast)
                ask_fast(self);
            if (self->pack != NULL && (packed = PyObject_CallFunctionObjArgs(self->pack, value, NULL)) == NULL) {
                if (!PyErr_ExceptionMatches(PyExc_Exception))
                    return -1;
                PyErr_Clear(); /* encode() words the error */
            }
        }
        if (!overflow) {
            v->type = SC_T_INT;
            n = 8;
        } else if (packed != NULL && PyBytes_CheckExact(packed)) {
            v->type = SC_T_CODEC;
            out->owner = packed;
            v->p = PyBytes_AsString(packed);
            n = PyBytes_Size(packed);
        } else {
            Py_XDECREF(packed);
            PyObject *pair = PyObject_CallMethodObjArgs(self->codec, self->st->str_encode, value, NULL);
            if (pair == NULL)
                return -1;
            PyObject *data = PyTuple_Check(pair) && PyTuple_Size(pair) == 2 ? PyTuple_GetItem(pair, 1) : NULL;
            long flags = data != NULL ? PyLong_AsLong(PyTuple_GetItem(pair, 0)) : -1;
            if (data == NULL || !PyBytes_Check(data) || flags < 0 || flags > 255 || (flags & 15) < SC_T_BIGINT) {
                if (!PyErr_Occurred())
                    PyErr_Format(PyExc_TypeError, "codec: encode() wanted to return (flags 0x07 or 0x.8, bytes), %R found",
                                 data == NULL ? pair : (PyObject *)Py_TYPE(data));
                Py_DECREF(pair);
                return -1;
            }
            v->type = (u8)flags;
            out->owner = Py_NewRef(data);
            Py_DECREF(pair);
            v->p = PyBytes_AsString(data);
            n = PyBytes_Size(data);
        }
    }
    if (SC_UNLIKELY(self->map == NULL)) {
        value_done(out);
        return closed_error(self);
    }
    if (SC_UNLIKELY((u64)n > self->map->t->h.max_value)) {
        PyErr_Format(self->st->ValueTooLarge, "value: at most max_value=%llu bytes wanted, %zd found",
                     (unsigned long long)self->map->t->h.max_value, n);
        value_done(out);
        return -1;
    }
    v->len = (u32)n;
    return 0;
}

static int ms_after(table_obj *self, double seconds, u64 *out)
{
    u64 now = sc_now(self->map->t), ms = seconds <= 0 ? 0 : (u64)ceil(seconds * 1000.0 - 1e-6);
    if (now + ms > SC_MAX_DEADLINE) {
        PyErr_Format(PyExc_ValueError, "ttl: a deadline of at most %llu ms after the segment's birth wanted, %llu found",
                     SC_MAX_DEADLINE, (unsigned long long)(now + ms));
        return -1;
    }
    *out = now + ms;
    return 0;
}

/* ttl and expire_at (NULL: not given) to ms since birth; 0 = never. */
int deadline_of(table_obj *self, PyObject *ttl, PyObject *expire_at, u64 *out)
{
    if (SC_UNLIKELY(self->map == NULL))
        return closed_error(self);
    if (expire_at == NULL || expire_at == Py_None) {
        if (ttl == NULL || ttl == self->st->dflt) {
            *out = 0;
            if (self->default_ttl_ms >= 0)
                return ms_after(self, (double)self->default_ttl_ms / 1000.0, out);
            return 0;
        }
        if (ttl == Py_None) {
            *out = 0;
            return 0;
        }
        if (PyLong_CheckExact(ttl)) {
            int overflow;
            long v = PyLong_AsLongAndOverflow(ttl, &overflow);
            if (overflow == 0 && v >= 0 && v <= MAX_TTL_S) {
                *out = 0;
                return v == 0 ? 0 : ms_after(self, (double)v, out);
            }
        }
    }
    PyObject *none = Py_None, *r;
    r = PyObject_CallFunctionObjArgs(self->st->lifetime, ttl == NULL ? self->st->dflt : ttl,
                                     expire_at == NULL ? none : expire_at, none, NULL);
    if (r == NULL)
        return -1;
    if (r == Py_None) {
        Py_DECREF(r);
        *out = 0;
        return 0;
    }
    double s = PyFloat_AsDouble(r);
    Py_DECREF(r);
    if (s == -1.0 && PyErr_Occurred())
        return -1;
    if (self->map == NULL)
        return closed_error(self);
    return ms_after(self, s, out);
}

PyObject *raise_rc(table_obj *self, sc_table_t *t, int rc, const pykey *k)
{
    core_state *st = self->st;
    u32 shard = k ? k->k.shard : 0;
    if (rc == RC_PYERR)
        return NULL;
    switch (rc) {
    case SC_BUSY: {
        u32 word = t->h.guard_kind == SC_GUARD_FAST ? SC_LD(&t->shard[shard].guard->owner)
                                                    : SC_LD(&t->shard[shard].guard->dirty);
        u32 slot = SC_OWNER_SLOT(word);
        unsigned long long pid = slot < t->h.n_workers ? SC_LD(&t->workers[slot].pid) : 0;
        char wanted[32];
        snprintf(wanted, sizeof wanted, "%.3f", (double)self->lock_timeout_ns / 1e9);
        return PyErr_Format(st->LockTimeout,
                            "guard of shard %u: granted within lock_timeout=%s s wanted, still held by worker %u (pid %llu) "
                            "found",
                            shard, wanted, slot, pid);
    }
    case SC_LOST:
        return PyErr_Format(st->GuardLost,
                            "segment %s: the one attached wanted, it or its semaphores were removed or replaced; "
                            "reads go on, reattach() for writes",
                            t->h.name);
    case SC_WORKERS:
        return PyErr_Format(st->TooManyWorkers, "worker slots of segment %s: a free one wanted, all %u found taken",
                            t->h.name, t->h.n_workers);
    case SC_ACCESS:
        return PyErr_Format(st->SegmentNotOurs,
                            "segment %s: semaphores that uid %u may change wanted, refused by the kernel (errno %d); a server "
                            "that drops privileges opens with owner=user",
                            t->h.name, (unsigned)geteuid(), t->sys_errno);
    case SC_TOO_LARGE:
        return PyErr_Format(st->ValueTooLarge,
                            "item: a value of at most max_value=%llu bytes and a key that fits half a shard wanted, a key of "
                            "%u bytes found",
                            (unsigned long long)t->h.max_value, k ? k->k.len : 0);
    case SC_NO_SPACE:
        return PyErr_Format(st->NoSpace,
                            "shard %u of segment %s: room for the item wanted, %u free pages of %u bytes found (eviction=%s); "
                            "the old value stays",
                            shard, t->h.name, t->shard[shard].soft->n_free, t->page_size,
                            t->h.flags & SC_F_NO_EVICT ? "none" : "auto");
    case SC_NOT_NUMBER:
        return PyErr_Format(st->NotANumber, "counter: int wanted, another type found");
    case SC_OVERFLOW:
        return PyErr_Format(st->CounterOverflow, "counter: -2**63 to 2**63-1 wanted, a result beyond found");
    case SC_CHANGED:
        return PyErr_Format(st->LockTimeout, "item: unchanged between read and write once in %d tries wanted, changed by others "
                                             "each time found",
                            READ_TRIES);
    case SC_READONLY:
        return PyErr_Format(st->NotSupported, "segment %s: attached for writing wanted, mode=\"r\" found", t->h.name);
    default: {
        PyObject *r = PyErr_Format(PyExc_OSError, "segment %s: semaphore operation refused (errno %d: %s)", t->h.name,
                                   t->sys_errno, strerror(t->sys_errno));
        return r;
    }
    }
}

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
                value = decode(self, f->it.type, bytes);
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
