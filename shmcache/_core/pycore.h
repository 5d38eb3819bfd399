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
    PyObject *table_type, *miss, *dflt, *check_key, *lifetime, *check_number, *str_encode, *str_decode, *str_fast, *str_follow;
    PyObject *Error, *KeyTooLong, *ValueTooLarge, *NoSpace, *LockTimeout, *GuardLost, *TooManyWorkers, *SegmentNotOurs,
        *NotANumber, *CounterOverflow, *NotSupported, *LayoutMismatch, *SegmentInvalid;
} core_state;

/* One mapping; kept until the last section that runs without the GIL has left it. Changed under the GIL only. */
typedef struct {
    sc_table_t *t;
    u8 *base;
    size_t size;
    int by_shmat, refs;
    int followed;    /* the engine attached the segment that replaced this one: calls begun here go on there */
    i64 next_follow; /* coarse ms when a read may try again to follow */
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

/* Whether a resize put another segment in the place of this one. One load of a line that nobody writes meanwhile. */
static inline int map_replaced(const map_t *m)
{
    return SC_UNLIKELY(SC_LD(&m->t->control->successor) > SC_SUCCESSOR_REMOVED) != 0;
}
/* Attaches the engine to the segment that replaced its own: 1 done (by whomever), 0 it stays where it is, -1 an error that no
 * cache call swallows is set.  A read (must 0) tries at most once a second. */
int table_follow(table_obj *self, int must);

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

/* The call on held met SC_LOST, or held is not the engine's any more. 1: held, and k if it is a key, are those of the engine's
 * segment, which replaced held's; 0: nothing replaced it; -1: an error is set. */
int call_lost(table_obj *self, map_t **held, pykey *k);
int call_moved(table_obj *self, map_t **held, pykey *k);

#define ATTACHED(self)                                  \
    if (SC_UNLIKELY((self)->map == NULL))               \
        return closed_error(self), NULL

/* ATTACHED, to the segment that replaced another one if there is such. */
#define HERE(self)                                                                                \
    do {                                                                                          \
        if ((self)->map != NULL && map_replaced((self)->map) && table_follow((self), 0) < 0)      \
            return NULL;                                                                          \
        ATTACHED(self);                                                                           \
    } while (0)

/* Runs CALL (which uses `t` and `wait`) on a mapping the caller holds, first as a try with the GIL held, then waiting
 * without it, until it is not SC_BUSY or lock_timeout is over.  Signals are served between the waits, with nothing held.
 * big: let the GIL go at once.  A segment that a resize replaced is followed and the call made anew there; RUN is for calls on
 * a key, whose m is held, RUN_AS for those on the whole. */
#define RUN(self, held, rc, big, CALL) \
    RUN_AS(self, held, (pykey *)(void *)((char *)&(held) - offsetof(pykey, m)), rc, big, CALL)
#define RUN_AS(self, held, key, rc, big, CALL)                                                       \
    do {                                                                                             \
        sc_table_t *t = (held)->t;                                                                   \
        i64 wait = 0, until_ = 0;                                                                    \
        for (;;) {                                                                                   \
            if (SC_UNLIKELY((self)->map != (held))) { /* closed or attached anew meanwhile */         \
                if (call_moved(self, &(held), key) < 0) {                                            \
                    rc = RC_PYERR;                                                                   \
                    break;                                                                           \
                }                                                                                    \
                t = (held)->t;                                                                       \
            }                                                                                        \
            if (wait == 0 && !(big)) {                                                               \
                rc = (CALL);                                                                         \
            } else {                                                                                 \
                Py_BEGIN_ALLOW_THREADS;                                                              \
                rc = (CALL);                                                                         \
                Py_END_ALLOW_THREADS;                                                                \
            }                                                                                        \
            if (SC_UNLIKELY(rc == SC_LOST)) {                                                        \
                int moved_ = call_lost(self, &(held), key);                                          \
                if (moved_ > 0) {                                                                    \
                    t = (held)->t;                                                                   \
                    wait = 0;                                                                        \
                    continue;                                                                        \
                }                                                                                    \
                rc = moved_ < 0 ? RC_PYERR : rc;                                                     \
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

extern PyMethodDef table_read_methods[], table_write_methods[], table_admin_methods[], table_map_methods[],
    table_resize_methods[], core_functions[];
PyObject *header_dict(const sc_header_t *h);
PyObject *table_subscript(PyObject *self, PyObject *key);
int table_ass_subscript(PyObject *self, PyObject *key, PyObject *value);
int table_contains(PyObject *self, PyObject *key);
Py_ssize_t table_length(PyObject *self);
PyObject *table_scan_keys(PyObject *self, PyObject *group);
PyObject *table_scan_meta(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
#endif
