/* pymap.c - the mapping of a _core.Table: attaching, detaching, and following a resize from one segment to the next.
 *
 * A call holds the mapping it began on; a resize seen meanwhile moves the call to the engine's new one, where it begins anew.
 * Mappings change under the GIL only, and go when the last call has left them. */
#include "pycore.h"
#include <errno.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/stat.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#define FOLLOW_MS 1000 /* how often a read tries to follow when it cannot */

typedef PyObject *const *args_t;

map_t *map_hold(map_t *m)
{
    m->refs++;
    return m;
}
void map_drop(map_t *m)
{
    if (m == NULL || --m->refs > 0)
        return;
    int shm_id = m->t->shm_id;
    sc_header_t h = m->t->h;
    sc_table_free(m->t);
    if (m->by_shmat)
        sc_shm_detach(m->base, shm_id, &h);
    else
        munmap(m->base, m->size);
    PyMem_Free(m);
}

/* (fd, shm_id, size, sem_id, readonly, path, hugepages, prefault): maps fd, or attaches shm_id (then fd is -1), checks the
 * header, makes the handle.  sem_id -1: none (a file, or mode "r" without rights to the semaphores). */
static map_t *map_new(table_obj *self, const char *fn, args_t args, Py_ssize_t nargs)
{
    if (nargs != 8) {
        PyErr_Format(PyExc_TypeError, "%s() takes 8 arguments (%zd given)", fn, nargs);
        return NULL;
    }
    int fd = (int)PyLong_AsLong(args[0]), shm_id = (int)PyLong_AsLong(args[1]);
    unsigned long long size = PyLong_AsUnsignedLongLong(args[2]);
    int sem_id = (int)PyLong_AsLong(args[3]), readonly = PyObject_IsTrue(args[4]);
    const char *path = args[5] == Py_None ? "" : PyUnicode_AsUTF8AndSize(args[5], NULL);
    int huge = PyObject_IsTrue(args[6]), prefault = PyObject_IsTrue(args[7]);
    if (PyErr_Occurred() || path == NULL)
        return NULL;
    u8 *base = fd >= 0 ? (u8 *)mmap(NULL, (size_t)size, readonly ? PROT_READ : PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
                       : (u8 *)shmat(shm_id, NULL, readonly ? SHM_RDONLY : 0);
    if (base == MAP_FAILED) { /* what shmat gives as well */
        os_error(fd >= 0 ? "mmap" : "shmat");
        return NULL;
    }
    (void)madvise(base, (size_t)size, MADV_DONTDUMP); /* values are secrets, and a dump in progress holds guards */
    if (huge)
        (void)madvise(base, (size_t)size, MADV_HUGEPAGE);
    char msg[400];
    int mismatch = 0;
    sc_header_t h;
    const char *why = sc_header_check(base, size, &h, &mismatch, msg, sizeof msg);
    map_t *m = why == NULL ? (map_t *)PyMem_Calloc(1, sizeof *m) : NULL;
    sc_table_t *t = m != NULL ? sc_table_new(base, &h, readonly) : NULL;
    struct stat st;
    if (t != NULL && !readonly && sem_id >= 0 && (t->proc = sc_proc_get(&h, sem_id)) == NULL) {
        sc_table_free(t);
        t = NULL;
    }
    if (t == NULL) {
        PyMem_Free(m);
        if (fd >= 0)
            munmap(base, (size_t)size);
        else
            shmdt(base);
        if (why != NULL)
            PyErr_Format(mismatch ? self->st->LayoutMismatch : self->st->SegmentInvalid, "segment %s%s%s",
                         path[0] ? path : "", path[0] ? ": " : "", why);
        else {
            errno = ENOMEM;
            os_error("mmap, malloc");
        }
        return NULL;
    }
    if (prefault && !readonly && madvise(base, (size_t)size, MADV_POPULATE_WRITE) != 0)
        for (size_t at = 0; at < size; at += 4096)
            (void)SC_LD((volatile u8 *)(base + at));
    t->sem_id = sem_id;
    t->shm_id = shm_id;
    if (fd >= 0 && path[0] != 0 && strlen(path) < sizeof t->path && fstat(fd, &st) == 0) {
        memcpy(t->path, path, strlen(path) + 1);
        t->dev = st.st_dev;
        t->ino = st.st_ino;
    }
    if (t->proc == NULL)
        t->readonly = 1;
    m->t = t;
    m->base = base;
    m->size = (size_t)size;
    m->by_shmat = fd < 0;
    m->refs = 1;
    return m;
}

/* _attach(...): map_new's arguments. */
static PyObject *table_attach(PyObject *o, args_t args, Py_ssize_t nargs)
{
    table_obj *self = (table_obj *)o;
    if (self->map != NULL)
        return PyErr_Format(self->st->Error, "engine: a closed one wanted for attaching, an open one found");
    self->map = map_new(self, "_attach", args, nargs);
    return self->map == NULL ? NULL : Py_NewRef(Py_None);
}

/* _succeed(...): attaches what replaced the engine's segment, in its place; True, or False when another thread has done it.
 * The old mapping stays until the last call that began on it has left it. */
static PyObject *table_succeed(PyObject *o, args_t args, Py_ssize_t nargs)
{
    table_obj *self = (table_obj *)o;
    ATTACHED(self);
    map_t *m = map_new(self, "_succeed", args, nargs), *old = self->map;
    if (m == NULL)
        return NULL;
    if (old == NULL || memcmp(old->t->h.uuid, m->t->h.uuid, 16) == 0) {
        map_drop(m);
        return old == NULL ? (closed_error(self), NULL) : Py_NewRef(Py_False);
    }
    m->t->clock.frozen_ms = old->t->clock.frozen_ms;
    if (m->t->proc != NULL && old->t->proc != NULL)
        sc_worker_inherit(m->t, old->t);
    old->followed = 1;
    self->map = m;
    map_drop(old);
    Py_RETURN_TRUE;
}

/* _follow(): what an engine does to attach the segment that replaced its own; a bare table stays where it is. */
static PyObject *table_no_follow(PyObject *o, PyObject *unused)
{
    (void)o;
    (void)unused;
    Py_RETURN_NONE;
}

/* The error that is set becomes the cause of a GuardLost. */
static void guard_lost_by(table_obj *self)
{
    PyObject *type, *why, *trace;
    PyErr_Fetch(&type, &why, &trace);
    PyErr_NormalizeException(&type, &why, &trace);
    if (self->map != NULL)
        raise_rc(self, self->map->t, SC_LOST, NULL);
    else
        closed_error(self);
    PyObject *lost_type, *lost, *lost_trace;
    PyErr_Fetch(&lost_type, &lost, &lost_trace);
    PyErr_NormalizeException(&lost_type, &lost, &lost_trace);
    if (lost != NULL && why != NULL)
        PyException_SetCause(lost, Py_NewRef(why));
    Py_XDECREF(type);
    Py_XDECREF(why);
    Py_XDECREF(trace);
    PyErr_Restore(lost_type, lost, lost_trace);
}

int table_follow(table_obj *self, int must)
{
    map_t *m = self->map;
    i64 now = sc_clock_coarse_ms();
    if (m == NULL || (!must && now < m->next_follow))
        return 0;
    m->next_follow = now + FOLLOW_MS;
    map_hold(m);
    PyObject *r = PyObject_CallMethodObjArgs((PyObject *)self, self->st->str_follow, NULL);
    Py_XDECREF(r);
    int moved = self->map != m;
    map_drop(m);
    if (r == NULL) {
        if (moved || !must) {
            if (!PyErr_ExceptionMatches(PyExc_Exception))
                return -1;
            PyErr_Clear(); /* reads go on where they are */
            return moved;
        }
        if (PyErr_ExceptionMatches(PyExc_Exception))
            guard_lost_by(self);
        return -1;
    }
    return moved;
}

int call_moved(table_obj *self, map_t **held, pykey *k)
{
    if (self->map == NULL || !(*held)->followed) {
        moved_error(self);
        return -1;
    }
    map_t *old = *held;
    *held = map_hold(self->map);
    map_drop(old);
    if (k != NULL)
        sc_key_init((*held)->t, &k->k, k->k.p, k->k.len);
    return 1;
}

int call_lost(table_obj *self, map_t **held, pykey *k)
{
    if (!map_replaced(*held))
        return 0;
    int moved = self->map != *held ? 1 : table_follow(self, 1);
    return moved > 0 ? call_moved(self, held, k) : moved;
}

static PyObject *table_detach(PyObject *o, PyObject *unused)
{
    table_obj *self = (table_obj *)o;
    (void)unused;
    map_t *m = self->map;
    self->map = NULL;
    map_drop(m);
    Py_RETURN_NONE;
}

/* _mark_removed(): every writer sees it at its next write. False: a resize was faster, and the engine is where it led. */
static PyObject *table_mark_removed(PyObject *o, PyObject *unused)
{
    table_obj *self = (table_obj *)o;
    (void)unused;
    ATTACHED(self);
    map_t *m = self->map;
    if (m->t->readonly)
        return raise_rc(self, m->t, SC_READONLY, NULL);
    u64 was = 0;
    if (!__atomic_compare_exchange_n(&m->t->control->successor, &was, SC_SUCCESSOR_REMOVED, 0, __ATOMIC_RELEASE,
                                     __ATOMIC_RELAXED) &&
        was != SC_SUCCESSOR_REMOVED) {
        int moved = table_follow(self, 1);
        if (moved < 0)
            return NULL;
        if (moved > 0)
            Py_RETURN_FALSE;
        SC_ST_REL(&m->t->control->successor, SC_SUCCESSOR_REMOVED); /* it leads nowhere: rot */
    }
    m->t->lost = 1;
    Py_RETURN_TRUE;
}

/* _view(): a bare table over the same mapping, which stays on it: what a walk goes through. */
static PyObject *table_view(PyObject *o, PyObject *unused)
{
    table_obj *self = (table_obj *)o;
    (void)unused;
    HERE(self);
    table_obj *view = (table_obj *)PyObject_CallNoArgs(self->st->table_type);
    if (view == NULL)
        return NULL;
    view->prefix = (u8 *)PyMem_Malloc(self->prefix_len + 1u);
    if (view->prefix == NULL || self->map == NULL) {
        Py_DECREF(view);
        return self->map == NULL ? (closed_error(self), NULL) : PyErr_NoMemory();
    }
    if (self->prefix_len != 0)
        memcpy(view->prefix, self->prefix, self->prefix_len);
    view->prefix_len = self->prefix_len;
    view->map = map_hold(self->map);
    return (PyObject *)view;
}

#define M(name, flags) {"_" #name, (PyCFunction)(void (*)(void))table_##name, flags, NULL}
PyMethodDef table_map_methods[] = {
    M(attach, METH_FASTCALL), M(succeed, METH_FASTCALL), M(detach, METH_NOARGS), M(view, METH_NOARGS),
    M(mark_removed, METH_NOARGS), {"_follow", table_no_follow, METH_NOARGS, NULL}, {NULL, NULL, 0, NULL},
};
#undef M
