/* pycore.h - what the files that speak Python share. Limited API 3.11. */
#ifndef SC_PYCORE_H
#define SC_PYCORE_H
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "guard.h"
#include "heap.h"
#include "table.h"

#define RC_PYERR (-100) /* a Python error is set */
#define MAX_TTL_S 315360000 /* ten years; beyond it arguments.lifetime words the error */
#define BIG 32768u          /* bytes from which copying drops the GIL: about 2 us of memcpy against 44 ns of hand-over */
#define READ_TRIES 1000     /* times a read, or a write that follows one, begins anew when the item changed meanwhile */

typedef struct {
    Py_ssize_t bytes_off; /* of a bytes object's data, measured once: the accessor is a call, and this is the hot path */
    PyObject *table_type, *miss, *dflt, *check_key, *lifetime, *check_number, *str_encode, *str_decode, *str_fast;
    PyObject *Error, *KeyTooLong, *ValueTooLarge, *NoSpace, *LockTimeout, *GuardLost, *TooManyWorkers, *SegmentNotOurs,
        *NotANumber, *CounterOverflow, *NotSupported, *LayoutMismatch, *SegmentInvalid;
} core_state;

/* One mapping; kept until the last section that runs without the GIL has left it. Changed under the GIL only. */
typedef struct {
    sc_table_t *t;
    u8 *base;
    size_t size;
    int by_shmat, refs;
} map_t;

typedef struct {
    PyObject_HEAD
    core_state *st;
    PyObject *module; /* keeps st alive: a derived class has no module state */
    map_t *map;       /* NULL: not attached, or closed */
    PyObject *codec, *pack, *unpack; /* pack, unpack: the codec's fast pair, NULL until asked or without one */
    int asked_fast;
    u8 *prefix;
    u32 prefix_len;
    i64 default_ttl_ms; /* -1: none */
    i64 lock_timeout_ns;
} table_obj;

/* A key in the shape the core wants; it holds the mapping, which may be closed meanwhile, until key_done. */
typedef struct {
    sc_key_t k;
    map_t *m;
    u8 small[128];
    u8 *heap;
} pykey;
typedef struct {
    sc_value_t v;
    PyObject *owner;
    double d;
} pyvalue;

map_t *map_hold(map_t *m);
void map_drop(map_t *m);

int key_init(table_obj *self, PyObject *key, pykey *out);
static inline void key_done(pykey *k)
{
    if (k->heap != NULL)
        PyMem_Free(k->heap);
    map_drop(k->m);
}
int value_init(table_obj *self, PyObject *value, pyvalue *out);
static inline void value_done(pyvalue *v) { Py_XDECREF(v->owner); }
int deadline_of(table_obj *self, PyObject *ttl, PyObject *expire_at, u64 *out);
PyObject *codec_decode(table_obj *self, u32 flags, PyObject *data);
int ms_after(table_obj *self, double seconds, u64 *out);
PyObject *raise_rc(table_obj *self, sc_table_t *t, int rc, const pykey *k);
PyObject *read_value(table_obj *self, pykey *k, sc_found_t *f, int count, int grace, sc_token_t *token);
int closed_error(table_obj *self);
void moved_error(table_obj *self);
int args_parse(const char *fn, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames, const char *const *names,
               int n_pos, int n_names, int n_required, PyObject **out);
PyObject *key_object(const u8 *p, u32 len);
PyObject *os_error(const char *call);
int dict_put(PyObject *d, const char *name, PyObject *value); /* takes the reference; 0, or -1 */

#define ATTACHED(self)                                  \
    if (SC_UNLIKELY((self)->map == NULL))               \
        return closed_error(self), NULL

/* Runs CALL (which uses `t` and `wait`) on a mapping the caller holds, first as a try with the GIL held, then waiting
 * without it, until it is not SC_BUSY or lock_timeout is over.  Signals are served between the waits, with nothing held.
 * big: let the GIL go at once. */
#define RUN(self, held, rc, big, CALL)                                                                \
    do {                                                                                             \
        sc_table_t *t = (held)->t;                                                                   \
        i64 wait = 0, until_ = 0;                                                                    \
        for (;;) {                                                                                   \
            if (SC_UNLIKELY((self)->map != (held))) { /* closed or attached anew meanwhile */         \
                moved_error(self);                                                                   \
                rc = RC_PYERR;                                                                       \
                break;                                                                               \
            }                                                                                        \
            if (wait == 0 && !(big)) {                                                               \
                rc = (CALL);                                                                         \
            } else {                                                                                 \
                Py_BEGIN_ALLOW_THREADS;                                                              \
                rc = (CALL);                                                                         \
                Py_END_ALLOW_THREADS;                                                                \
            }                                                                                        \
            if (SC_LIKELY(rc != SC_BUSY))                                                            \
                break;                                                                               \
            if (PyErr_CheckSignals() != 0) {                                                         \
                rc = RC_PYERR;                                                                       \
                break;                                                                               \
            }                                                                                        \
            i64 now_ = sc_clock_mono_ns();                                                           \
            if (until_ == 0) {                                                                       \
                until_ = now_ + (self)->lock_timeout_ns;                                             \
                sc_count(t, SC_ST_WAITS, 1);                                                         \
            } else if (now_ >= until_) {                                                             \
                sc_count(t, SC_ST_TIMEOUTS, 1);                                                      \
                break;                                                                               \
            }                                                                                        \
            wait = until_ - now_ < 50000000 ? (until_ - now_ > 0 ? until_ - now_ : 1) : 50000000;    \
        }                                                                                            \
    } while (0)

/* The end of a read: its hit or miss counted; the default for an absent value. */
static inline PyObject *counted(const pykey *k, PyObject *value)
{
    if (SC_LIKELY(value != NULL) || !PyErr_Occurred())
        sc_count(k->m->t, value != NULL ? SC_ST_HITS : SC_ST_MISSES, 1);
    return value;
}
static inline PyObject *or_default(PyObject *value, PyObject *dflt)
{
    if (value != NULL || PyErr_Occurred())
        return value;
    return Py_NewRef(dflt == NULL ? Py_None : dflt);
}

/* A method of one argument, from name_one(self, argument). */
#define TABLE_ONE(name, arg)                                                                            \
    static PyObject *table_##name(PyObject *o, args_t args, Py_ssize_t nargs, PyObject *kwnames) \
    {                                                                                            \
        static const char *const names[] = {#arg};                                               \
        PyObject *a[1];                                                                          \
        if (SC_LIKELY(kwnames == NULL && nargs == 1))                                            \
            return name##_one(o, args[0]);                                                       \
        return args_parse(#name, args, nargs, kwnames, names, 1, 1, 1, a) != 0 ? NULL            \
                                                                               : name##_one(o, a[0]); \
    }
#define TABLE_METHOD(name)                                                                            \
    {#name, (PyCFunction)(void (*)(void))table_##name, METH_FASTCALL | METH_KEYWORDS, NULL}

extern PyMethodDef table_read_methods[], table_write_methods[], table_admin_methods[], core_functions[];
PyObject *table_subscript(PyObject *self, PyObject *key);
int table_ass_subscript(PyObject *self, PyObject *key, PyObject *value);
int table_contains(PyObject *self, PyObject *key);
Py_ssize_t table_length(PyObject *self);
PyObject *table_scan_keys(PyObject *self, PyObject *group);
PyObject *table_scan_meta(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
#endif
