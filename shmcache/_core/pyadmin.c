/* pyadmin.c - the methods of _core.Table that are not hot: statistics, guards, leases, audit. */
#include "pycore.h"
#include "repair.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

typedef PyObject *const *args_t;

int dict_put(PyObject *d, const char *name, PyObject *value)
{
    int r = value == NULL ? -1 : PyDict_SetItemString(d, name, value);
    Py_XDECREF(value);
    return r;
}
#define PUT_U(d, name, v) dict_put(d, name, PyLong_FromUnsignedLongLong((unsigned long long)(v)))
#define PUT_I(d, name, v) dict_put(d, name, PyLong_FromLongLong((long long)(v)))

PyObject *key_object(const u8 *p, u32 len)
{
    PyObject *r = PyUnicode_DecodeUTF8((const char *)p, (Py_ssize_t)len, NULL);
    if (r == NULL && PyErr_ExceptionMatches(PyExc_UnicodeDecodeError)) {
        PyErr_Clear();
        r = PyBytes_FromStringAndSize((const char *)p, (Py_ssize_t)len);
    }
    return r;
}

/* _configure(codec, prefix, default_ttl, lock_timeout) */
static PyObject *table_configure(PyObject *o, args_t args, Py_ssize_t nargs)
{
    table_obj *self = (table_obj *)o;
    if (nargs != 4 || !PyBytes_Check(args[1]))
        return PyErr_Format(PyExc_TypeError, "_configure() takes (codec, prefix: bytes, default_ttl, lock_timeout)");
    double ttl = args[2] == Py_None ? 0 : PyFloat_AsDouble(args[2]), timeout = PyFloat_AsDouble(args[3]);
    if (PyErr_Occurred())
        return NULL;
    Py_ssize_t n = PyBytes_Size(args[1]);
    u8 *prefix = (u8 *)PyMem_Malloc((size_t)n + 1);
    if (prefix == NULL)
        return PyErr_NoMemory();
    memcpy(prefix, PyBytes_AsString(args[1]), (size_t)n);
    PyMem_Free(self->prefix);
    self->prefix = prefix;
    self->prefix_len = (u32)n;
    PyObject *old = self->codec;
    self->codec = Py_NewRef(args[0]);
    Py_XDECREF(old);
    self->asked_fast = 0;
    Py_CLEAR(self->pack);
    Py_CLEAR(self->unpack);
    self->default_ttl_ms = ttl > 0 ? (i64)(ttl * 1000.0 + 0.5) : -1;
    self->lock_timeout_ns = (i64)(timeout * 1e9);
    Py_RETURN_NONE;
}

/* ---- statistics, header, guards, shards ------------------------------------------------------------------------- */

static const char *const worker_names[SC_N_STATS] = {"hits",         "misses",      "corrupt",        "read_contended",
                                                     "read_retries", "guard_waits", "guard_timeouts", "leases_full"};

/* A line for each worker slot that was ever used: who has it, and what its holders counted. */
static PyObject *workers_held(table_obj *self, sc_table_t *t, PyObject *unused)
{
    (void)self;
    (void)unused;
    PyObject *list = PyList_New(0);
    for (u32 i = 0; list != NULL && i < t->h.n_workers; i++) {
        const sc_worker_t *w = &t->workers[i];
        u64 generation = SC_LD(&w->generation);
        if (generation == 0)
            continue;
        PyObject *d = PyDict_New();
        int bad = d == NULL;
        if (!bad) {
            bad |= PUT_U(d, "slot", i);
            bad |= PUT_U(d, "generation", generation);
            bad |= PUT_U(d, "pid", SC_LD(&w->pid));
            bad |= PUT_U(d, "start_time", SC_LD(&w->start_time));
            bad |= dict_put(d, "held", t->sem_id < 0 ? Py_NewRef(Py_None) : PyBool_FromLong(sc_beacon_value(t, i) != 0));
            for (u32 j = 0; !bad && j < SC_N_STATS; j++)
                bad |= PUT_U(d, worker_names[j], SC_LD(&w->stat[j]));
        }
        if (bad || PyList_Append(list, d) != 0)
            Py_CLEAR(list);
        Py_XDECREF(d);
    }
    return list;
}

static PyObject *stats_held(table_obj *self, sc_table_t *t, PyObject *unused)
{
    (void)self;
    (void)unused;
    static const char *const shard_names[SC_N_SHARD_STATS] = {
        "sets", "deletes", "expired", "evicted", "evicted_index", "recoveries", "relocated", "bytes_set", "bytes_moved",
        "no_space", "incrs", "touches", "displaced", "repaired", "clears", "max_steps", "max_moved", "evicted_before_ttl"};
    u64 w[SC_N_STATS] = {0}, s[SC_N_SHARD_STATS] = {0}, dead = 0, free_pages = 0, pages = 0, slots = 0;
    i64 items = 0, bytes = 0;
    for (u32 i = 0; i < t->h.n_workers; i++)
        for (u32 j = 0; j < SC_N_STATS; j++)
            w[j] += SC_LD(&t->workers[i].stat[j]);
    for (u32 i = 0; i < t->h.n_workers; i++)
        slots += SC_LD(&t->workers[i].generation) != 0;
    for (u32 i = 0; i < t->n_shards; i++) {
        const sc_soft_t *soft = t->shard[i].soft;
        for (u32 j = 0; j < SC_N_SHARD_STATS; j++) {
            u64 v = SC_LD(&soft->stat[j]);
            if (j == SC_SS_MAX_STEPS || j == SC_SS_MAX_MOVED)
                s[j] = v > s[j] ? v : s[j];
            else
                s[j] += v;
        }
        for (u32 lane = 0; lane < SC_N_LANES; lane++)
            dead += (u64)(SC_LD(&soft->dead[lane]) > 0 ? SC_LD(&soft->dead[lane]) : 0);
        free_pages += SC_LD(&soft->n_free);
        pages += t->n_pages;
        items += SC_LD(&soft->n_items);
        bytes += SC_LD(&soft->live_bytes);
    }
    PyObject *d = PyDict_New();
    int bad = d == NULL;
    for (u32 j = 0; !bad && j < SC_N_STATS; j++)
        bad |= PUT_U(d, worker_names[j], w[j]);
    for (u32 j = 0; !bad && j < SC_N_SHARD_STATS; j++)
        bad |= PUT_U(d, shard_names[j], s[j]);
    if (!bad) {
        bad |= PUT_I(d, "items", items > 0 ? items : 0);
        bad |= PUT_I(d, "bytes", bytes > 0 ? bytes : 0);
        bad |= PUT_U(d, "dead_bytes", dead);
        bad |= PUT_U(d, "size", t->size);
        bad |= PUT_U(d, "pages", pages);
        bad |= PUT_U(d, "pages_free", free_pages);
        bad |= PUT_U(d, "page_size", t->page_size);
        bad |= PUT_U(d, "slots_used", slots);
        bad |= PUT_U(d, "sweep_passes", SC_LD(&t->control->sweep_passes));
    }
    if (bad)
        Py_CLEAR(d);
    return d;
}

static PyObject *table_header(PyObject *o, PyObject *unused);
PyObject *header_dict(const sc_header_t *h)
{
    PyObject *d = PyDict_New();
    if (d == NULL)
        return NULL;
    int bad = 0;
#define U(field) bad |= PUT_U(d, #field, h->field)
#define I(field) bad |= PUT_I(d, #field, h->field)
    U(layout_version); U(size); U(n_shards); U(n_buckets); U(page_size); U(n_pages); U(n_workers); U(n_leases);
    U(n_ghosts); U(item_size); U(shard_off); U(shard_size); U(max_value); U(guard_kind); U(flags); U(clean_period_ms);
    U(default_ttl_ms); U(ipc_ns); I(clock_base_ns); I(created_ns); U(creator_pid); U(creator_uid); U(owner_uid);
    U(owner_gid); U(perms); U(form); U(lineage); I(sem_key); I(sem_id); I(sem_ctime); U(n_sems); I(shm_key);
    bad |= dict_put(d, "uuid", PyBytes_FromStringAndSize((const char *)h->uuid, 16));
    bad |= dict_put(d, "boot_id", PyBytes_FromStringAndSize((const char *)h->boot_id, 16));
    bad |= dict_put(d, "name", PyUnicode_DecodeUTF8(h->name, (Py_ssize_t)strnlen(h->name, sizeof h->name), "replace"));
    bad |= PUT_U(d, "state", h->state);
    if (bad)
        Py_CLEAR(d);
    return d;
}
static PyObject *table_header(PyObject *o, PyObject *unused)
{
    table_obj *self = (table_obj *)o;
    (void)unused;
    HERE(self);
    return header_dict(&self->map->t->h);
}

static PyObject *guards_held(table_obj *self, sc_table_t *t, PyObject *unused)
{
    (void)self;
    (void)unused;
    PyObject *list = PyList_New(0);
    for (u32 i = 0; list != NULL && i < t->n_shards; i++) {
        u32 word = t->h.guard_kind == SC_GUARD_FAST ? SC_LD(&t->shard[i].guard->owner) : SC_LD(&t->shard[i].guard->dirty);
        u32 slot = SC_OWNER_SLOT(word), gen = SC_OWNER_GEN(word);
        int lost = 0, dead = 0, known = word != 0 && slot < t->h.n_workers;
        if (word != 0 && t->sem_id >= 0) {
            if (t->proc != NULL)
                dead = sc_worker_dead(t, slot, gen, &lost);
            else if (!known || (SC_LD(&t->workers[slot].generation) & 0x7FFFFu) != gen)
                dead = 1;
            else
                dead = sc_beacon_value(t, slot) == 0;
        }
        PyObject *d = PyDict_New();
        int bad = d == NULL;
        if (!bad) {
            const sc_soft_t *soft = t->shard[i].soft;
            bad |= PUT_U(d, "shard", i);
            bad |= dict_put(d, "state", PyUnicode_FromString(word == 0 ? "free" : dead ? "dead" : "held"));
            bad |= PUT_U(d, "slot", slot);
            bad |= PUT_U(d, "generation", gen);
            bad |= PUT_U(d, "pid", known ? SC_LD(&t->workers[slot].pid) : 0);
            bad |= PUT_U(d, "start_time", known ? SC_LD(&t->workers[slot].start_time) : 0);
            bad |= dict_put(d, "waiters", PyBool_FromLong(word & SC_OWNER_WAITERS));
            bad |= PUT_U(d, "recoveries", SC_LD(&soft->stat[SC_SS_RECOVERIES]));
            bad |= PUT_U(d, "items", SC_LD(&soft->n_items) > 0 ? SC_LD(&soft->n_items) : 0);
            bad |= PUT_U(d, "pages_free", SC_LD(&soft->n_free));
            bad |= PUT_U(d, "version", SC_LD(&t->shard[i].hard->version));
            u32 leases = 0;
            for (u32 j = 0; j < t->n_leases; j++)
                leases += SC_LD(&t->shard[i].leases[j].owner) != 0 && SC_LEASE_UNTIL(SC_LD(&t->shard[i].leases[j].deadline)) > sc_now(t);
            bad |= PUT_U(d, "leases", leases);
        }
        if (bad || PyList_Append(list, d) != 0)
            Py_CLEAR(list);
        Py_XDECREF(d);
    }
    return list;
}

/* Lanes and pages of every shard: for memory maps and distributions. */
static PyObject *shards_held(table_obj *self, sc_table_t *t, PyObject *unused)
{
    (void)self;
    (void)unused;
    PyObject *list = PyList_New(0);
    for (u32 i = 0; list != NULL && i < t->n_shards; i++) {
        const sc_soft_t *soft = t->shard[i].soft;
        PyObject *d = PyDict_New(), *pages = PyList_New(0), *dead = PyList_New(0);
        int bad = d == NULL || pages == NULL || dead == NULL;
        for (u32 lane = 0; !bad && lane < SC_N_LANES; lane++) {
            PyObject *a = PyLong_FromUnsignedLong(SC_LD(&soft->n_pages[lane]));
            PyObject *b = PyLong_FromLongLong(SC_LD(&soft->dead[lane]));
            bad |= a == NULL || b == NULL || PyList_Append(pages, a) != 0 || PyList_Append(dead, b) != 0;
            Py_XDECREF(a);
            Py_XDECREF(b);
        }
        if (!bad) {
            bad |= PUT_U(d, "shard", i);
            bad |= PUT_U(d, "pages", t->n_pages);
            bad |= PUT_U(d, "pages_free", SC_LD(&soft->n_free));
            bad |= PUT_I(d, "items", SC_LD(&soft->n_items));
            bad |= PUT_I(d, "bytes", SC_LD(&soft->live_bytes));
            bad |= dict_put(d, "lane_pages", Py_NewRef(pages));
            bad |= dict_put(d, "lane_dead", Py_NewRef(dead));
        }
        if (bad || PyList_Append(list, d) != 0)
            Py_CLEAR(list);
        Py_XDECREF(d);
        Py_XDECREF(pages);
        Py_XDECREF(dead);
    }
    return list;
}

static void report_finding(void *arg, const char *code, u32 shard, const char *text)
{
    PyObject *list = *(PyObject **)arg;
    if (list == NULL)
        return;
    PyObject *d = Py_BuildValue("{s:s,s:I,s:s}", "code", code, "shard", shard, "text", text);
    if (d == NULL || PyList_Append(list, d) != 0)
        Py_CLEAR(*(PyObject **)arg);
    Py_XDECREF(d);
}
static PyObject *check_held(table_obj *self, sc_table_t *t, PyObject *unused)
{
    (void)self;
    (void)unused;
    PyObject *list = PyList_New(0);
    if (list != NULL && sc_check(t, report_finding, &list) == UINT64_MAX) {
        Py_XDECREF(list);
        return PyErr_NoMemory();
    }
    return list;
}

typedef struct line {
    struct line *next;
    const char *code;
    u32 shard;
    char text[240];
} line_t;
/* Said with a guard held: no Python. A line for which there is no memory is left out. */
static void keep_line(void *arg, const char *code, u32 shard, const char *text)
{
    line_t ***end = (line_t ***)arg, *l = (line_t *)malloc(sizeof *l);
    if (l == NULL)
        return;
    l->next = NULL;
    l->code = code;
    l->shard = shard;
    snprintf(l->text, sizeof l->text, "%s", text);
    **end = l;
    *end = &l->next;
}

/* _repair() -> (findings mended, entries lost, items stored anew), or the pid of a process that uses the segment. */
static PyObject *table_repair(PyObject *o, PyObject *unused)
{
    table_obj *self = (table_obj *)o;
    (void)unused;
    ATTACHED(self);
    map_t *held = map_hold(self->map);
    sc_table_t *t = held->t;
    sc_repaired_t done;
    PyObject *list = PyList_New(0), *r = NULL;
    line_t *lines = NULL, **end = &lines;
    int rc = t->proc == NULL ? SC_READONLY : SC_OK;
    if (rc == SC_OK) {
        Py_BEGIN_ALLOW_THREADS;
        rc = sc_repair(t, keep_line, &end, &done);
        Py_END_ALLOW_THREADS;
    }
    while (lines != NULL) {
        line_t *l = lines;
        lines = l->next;
        if (list != NULL)
            report_finding(&list, l->code, l->shard, l->text);
        free(l);
    }
    if (list != NULL && rc == SC_EXISTS)
        r = PyLong_FromUnsignedLongLong(SC_LD(&t->workers[done.live_slot].pid));
    else if (list != NULL && rc != SC_OK)
        raise_rc(self, t, rc, NULL);
    else if (list != NULL)
        r = Py_BuildValue("(OKK)", list, (unsigned long long)done.lost, (unsigned long long)done.moved);
    Py_XDECREF(list);
    map_drop(held);
    return r;
}

static PyObject *table_set_clock(PyObject *o, PyObject *arg)
{
    table_obj *self = (table_obj *)o;
    i64 ms = SC_CLOCK_REAL;
    if (arg != Py_None) {
        ms = PyLong_AsLongLong(arg);
        if (ms == -1 && PyErr_Occurred())
            return NULL;
    }
    ATTACHED(self);
    self->map->t->clock.frozen_ms = ms;
    Py_RETURN_NONE;
}
static PyObject *table_now_ms(PyObject *o, PyObject *unused)
{
    table_obj *self = (table_obj *)o;
    (void)unused;
    ATTACHED(self);
    return PyLong_FromUnsignedLongLong(sc_now(self->map->t) - 1); /* clock.h */
}

/* ---- clear, clean, leases ------------------------------------------------------------------------------------------ */

static PyObject *table_clear(PyObject *o, PyObject *unused)
{
    table_obj *self = (table_obj *)o;
    (void)unused;
    HERE(self);
    map_t *held = map_hold(self->map);
    u32 n = held->t->n_shards;
    PyObject *r = Py_NewRef(Py_None);
    for (u32 i = 0; r != NULL && i < n; i++) {
        int rc;
        const map_t *on = held;
        RUN_AS(self, held, NULL, rc, 0, sc_clear_shard(t, on == held ? i : 0, wait));
        if (on != held) { /* replaced meanwhile: all over again there */
            n = held->t->n_shards;
            i = 0;
        }
        if (rc == SC_OK)
            continue;
        Py_CLEAR(r);
        if (rc == SC_BUSY)
            PyErr_Format(self->st->LockTimeout, "clear: all %u shards cleared wanted, %u found cleared, shard %u busy", n, i, i);
        else
            raise_rc(self, held->t, rc, NULL);
    }
    map_drop(held);
    return r;
}

static PyObject *table_clean(PyObject *o, args_t args, Py_ssize_t nargs, PyObject *kwnames)
{
    static const char *const names[] = {"limit"};
    table_obj *self = (table_obj *)o;
    PyObject *a[1];
    if (args_parse("clean", args, nargs, kwnames, names, 1, 1, 0, a) != 0)
        return NULL;
    u64 limit = UINT64_MAX, cursor = 0, reclaimed = 0;
    if (a[0] != NULL && a[0] != Py_None) {
        long long v = PyLong_AsLongLong(a[0]);
        if (v == -1 && PyErr_Occurred())
            return NULL;
        if (v < 0)
            return PyErr_Format(PyExc_ValueError, "limit: 0 or more items wanted, %lld found", v);
        limit = (u64)v;
    }
    int rc;
    HERE(self);
    map_t *held = map_hold(self->map);
    const map_t *on = held;
    do {
        if (on != held) {
            on = held;
            cursor = 0;
        }
        RUN_AS(self, held, NULL, rc, 1, on == held ? sc_clean(t, limit, &cursor, &reclaimed, wait) : SC_AGAIN);
    } while (rc == SC_AGAIN);
    PyObject *r = rc == SC_OK ? PyLong_FromUnsignedLongLong(reclaimed) : raise_rc(self, held->t, rc, NULL);
    map_drop(held);
    return r;
}

static int lease_name(table_obj *self, PyObject *name, u64 *hash)
{
    *hash = 0;
    if (!PyBytes_Check(name)) {
        PyErr_Format(PyExc_TypeError, "name: bytes wanted, %R found", (PyObject *)Py_TYPE(name));
        return -1;
    }
    if (self->map != NULL && map_replaced(self->map) && table_follow(self, 0) < 0)
        return -1;
    if (self->map == NULL)
        return closed_error(self);
    *hash = sc_lease_hash(self->map->t, PyBytes_AsString(name), (u32)PyBytes_Size(name));
    return 0;
}
static int lease_ms(PyObject *seconds, u64 *ms)
{
    double s = PyFloat_AsDouble(seconds);
    if (s == -1.0 && PyErr_Occurred())
        return -1;
    if (!(s > 0 && s < 315360000.0)) {
        PyErr_Format(PyExc_ValueError, "lease: more than 0 and less than 315360000 seconds wanted, %R found", seconds);
        return -1;
    }
    *ms = (u64)(s * 1000.0);
    if (*ms == 0)
        *ms = 1;
    return 0;
}
static PyObject *table_lease_take(PyObject *o, args_t args, Py_ssize_t nargs)
{
    table_obj *self = (table_obj *)o;
    u64 hash, ms, owner = 0, fence = 0;
    if (nargs != 2 && nargs != 3)
        return PyErr_Format(PyExc_TypeError, "_lease_take() takes 2 or 3 arguments (%zd given)", nargs);
    PyObject *owners = nargs == 3 && args[2] != Py_None ? args[2] : NULL;
    if (owners != NULL && !PyList_Check(owners))
        return PyErr_Format(PyExc_TypeError, "owners: list wanted, %R found", (PyObject *)Py_TYPE(owners));
    if (lease_ms(args[1], &ms) != 0 || lease_name(self, args[0], &hash) != 0)
        return NULL;
    int rc;
    map_t *held = map_hold(self->map);
    RUN_AS(self, held, NULL, rc, 0, sc_lease_take(t, hash, ms, &owner, &fence, wait));
    PyObject *r;
    if (rc == SC_OK) {
        r = Py_BuildValue("(KK)", (unsigned long long)owner, (unsigned long long)fence);
        if (r != NULL && owners != NULL && PyList_Append(owners, PyTuple_GetItem(r, 0)) != 0) /* no signal comes between */
            Py_CLEAR(r);
    } else if (rc == SC_EXISTS) {
        r = Py_NewRef(Py_False);
    } else if (rc == SC_LEASES_FULL) {
        sc_count(held->t, SC_ST_FULL_LEASES, 1);
        r = Py_NewRef(Py_None);
    } else {
        r = raise_rc(self, held->t, rc, NULL);
    }
    map_drop(held);
    return r;
}
static PyObject *table_lease_extend(PyObject *o, args_t args, Py_ssize_t nargs)
{
    table_obj *self = (table_obj *)o;
    u64 hash, ms, owner;
    if (nargs != 3)
        return PyErr_Format(PyExc_TypeError, "_lease_extend() takes 3 arguments (%zd given)", nargs);
    owner = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred() || lease_ms(args[2], &ms) != 0 || lease_name(self, args[0], &hash) != 0)
        return NULL;
    int rc;
    map_t *held = map_hold(self->map);
    RUN_AS(self, held, NULL, rc, 0, sc_lease_extend(t, hash, owner, ms, wait));
    PyObject *r = rc == SC_OK || rc == SC_MISS ? PyBool_FromLong(rc == SC_OK) : raise_rc(self, held->t, rc, NULL);
    map_drop(held);
    return r;
}
static PyObject *table_lease_release(PyObject *o, args_t args, Py_ssize_t nargs)
{
    table_obj *self = (table_obj *)o;
    u64 hash, owner;
    if (nargs != 2)
        return PyErr_Format(PyExc_TypeError, "_lease_release() takes 2 arguments (%zd given)", nargs);
    owner = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred() || lease_name(self, args[0], &hash) != 0)
        return NULL;
    int rc;
    map_t *held = map_hold(self->map);
    RUN_AS(self, held, NULL, rc, 0, sc_lease_release(t, hash, owner, wait));
    PyObject *r = rc == SC_OK || rc == SC_MISS ? PyBool_FromLong(rc == SC_OK) : raise_rc(self, held->t, rc, NULL);
    map_drop(held);
    return r;
}
static PyObject *table_lease_wait(PyObject *o, args_t args, Py_ssize_t nargs)
{
    table_obj *self = (table_obj *)o;
    u64 hash;
    if (nargs != 2)
        return PyErr_Format(PyExc_TypeError, "_lease_wait() takes 2 arguments (%zd given)", nargs);
    double timeout = PyFloat_AsDouble(args[1]);
    if ((timeout == -1.0 && PyErr_Occurred()) || lease_name(self, args[0], &hash) != 0)
        return NULL;
    if (!(timeout > 0))
        Py_RETURN_NONE;
    i64 until = sc_clock_mono_ns() + (i64)((timeout > 3600 ? 3600 : timeout) * 1e9);
    for (;;) {
        i64 left = until - sc_clock_mono_ns();
        int held;
        if (left <= 0)
            break;
        HERE(self);
        map_t *m = map_hold(self->map);
        Py_BEGIN_ALLOW_THREADS;
        held = sc_lease_wait(m->t, hash, left);
        Py_END_ALLOW_THREADS;
        map_drop(m);
        if (PyErr_CheckSignals() != 0)
            return NULL;
        if (!held)
            break;
    }
    Py_RETURN_NONE;
}

/* Methods that make Python objects while they look at a segment hold it: a finalizer may close the engine meanwhile. */
#define HELD(name, AT)                                                \
    static PyObject *table_##name(PyObject *o, PyObject *arg)         \
    {                                                                 \
        table_obj *self = (table_obj *)o;                             \
        AT(self);                                                     \
        map_t *held = map_hold(self->map);                            \
        PyObject *r = name##_held(self, held->t, arg);                \
        map_drop(held);                                               \
        return r;                                                     \
    }
HELD(stats, HERE)
HELD(guards, HERE)
HELD(shards, HERE)
HELD(workers, HERE)
HELD(check, HERE)

#define M(name, flags) {"_" #name, (PyCFunction)(void (*)(void))table_##name, flags, NULL}
PyMethodDef table_admin_methods[] = {
    M(configure, METH_FASTCALL), M(scan_keys, METH_O), M(scan_meta, METH_FASTCALL), M(stats, METH_NOARGS),
    M(header, METH_NOARGS), M(guards, METH_NOARGS), M(shards, METH_NOARGS), M(workers, METH_NOARGS),
    M(check, METH_NOARGS), M(repair, METH_NOARGS), M(set_clock, METH_O), M(now_ms, METH_NOARGS), M(lease_take, METH_FASTCALL),
    M(lease_extend, METH_FASTCALL), M(lease_release, METH_FASTCALL), M(lease_wait, METH_FASTCALL),
    {"clear", (PyCFunction)table_clear, METH_NOARGS, NULL},
    {"clean", (PyCFunction)(void (*)(void))table_clean, METH_FASTCALL | METH_KEYWORDS, NULL},
    {NULL, NULL, 0, NULL},
};
#undef M
#undef U
#undef I
#undef HELD
