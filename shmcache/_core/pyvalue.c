/* pyvalue.c - arguments, keys, values and lifetimes on their way in, and the errors that a call ends with.
 *
 * What is wrong with an argument is worded by shmcache.arguments, so that every engine says it alike; the common case is
 * decided here without a Python frame. */
#include "pycore.h"
#include <math.h>
#include <stdio.h>
#include <unistd.h>

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
    if (SC_UNLIKELY(self->map == NULL) || (map_replaced(self->map) && (table_follow(self, 0) < 0 || self->map == NULL))) {
        PyMem_Free(out->heap);
        return PyErr_Occurred() ? -1 : closed_error(self);
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

PyObject *codec_decode(table_obj *self, u32 flags, PyObject *data)
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

int ms_after(table_obj *self, double seconds, u64 *out)
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
    default:
        return PyErr_Format(st->Error, "segment %s: a semaphore operation (semop, semctl) granted wanted, %s found", t->h.name,
                            strerror(t->sys_errno));
    }
}

