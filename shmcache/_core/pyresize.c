/* pyresize.c - resizing as resize.py sees it: an object that holds both mappings while one is copied into the other. */
#include "pycore.h"
#include "resize.h"

typedef PyObject *const *args_t;
PyObject *format_segment(args_t args, Py_ssize_t nargs, const sc_header_t *like);

#define JOB "shmcache._core.resize"
typedef struct {
    sc_resize_t *r;
    map_t *from, *to;
} job_t;

static void job_free(PyObject *capsule)
{
    job_t *job = (job_t *)PyCapsule_GetPointer(capsule, JOB);
    if (job == NULL)
        return;
    sc_resize_free(job->r);
    map_drop(job->from);
    map_drop(job->to);
    PyMem_Free(job);
}

/* _format_successor(fd, shm_id, fields): format() with the secrets and the birth of this segment, in state COPY. */
static PyObject *table_format_successor(PyObject *o, args_t args, Py_ssize_t nargs)
{
    table_obj *self = (table_obj *)o;
    ATTACHED(self);
    return format_segment(args, nargs, &self->map->t->h);
}

/* _resize(to) -> a job for _resize_copy and _resize_switch; to: a table over a segment that _format_successor made. */
static PyObject *table_resize(PyObject *o, PyObject *arg)
{
    table_obj *self = (table_obj *)o, *other = (table_obj *)arg;
    if (!PyObject_TypeCheck(arg, (PyTypeObject *)self->st->table_type))
        return PyErr_Format(PyExc_TypeError, "to: a table wanted, %R found", (PyObject *)Py_TYPE(arg));
    ATTACHED(self);
    ATTACHED(other);
    sc_table_t *from = self->map->t, *to = other->map->t;
    if (from->proc == NULL || to->proc == NULL || to->h.state != SC_STATE_COPY ||
        memcmp(from->h.hash_key, to->h.hash_key, sizeof to->h.hash_key) != 0 || from->h.clock_base_ns != to->h.clock_base_ns)
        return PyErr_Format(PyExc_ValueError, "to: a segment made by _format_successor of this one wanted, another found");
    job_t *job = (job_t *)PyMem_Calloc(1, sizeof *job);
    if (job == NULL)
        return PyErr_NoMemory();
    to->clock.frozen_ms = from->clock.frozen_ms;
    PyObject *capsule = NULL;
    if ((job->r = sc_resize_new(from, to)) == NULL || (capsule = PyCapsule_New(job, JOB, job_free)) == NULL) {
        sc_resize_free(job->r);
        PyMem_Free(job);
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    }
    job->from = map_hold(self->map);
    job->to = map_hold(other->map);
    return capsule;
}

static PyObject *refused(table_obj *self, job_t *job, int rc)
{
    sc_table_t *from = job->from->t, *to = job->to->t;
    switch (rc) {
    case SC_NO_SPACE:
    case SC_TOO_LARGE:
        return PyErr_Format(self->st->NoSpace,
                            "resize: room for every item of segment %s in %llu bytes wanted (eviction=none), less found; "
                            "nothing was changed",
                            from->h.name, (unsigned long long)to->size);
    case SC_LEASES_FULL:
        return PyErr_Format(self->st->LockTimeout,
                            "resize: a place for every lock held in segment %s wanted, %u places a shard found too few; "
                            "nothing was changed",
                            from->h.name, to->n_leases);
    case SC_BUSY:
        return PyErr_Format(self->st->LockTimeout,
                            "resize: every guard of segment %s and a copy within the time allowed wanted, not had in it "
                            "found; nothing was changed",
                            from->h.name);
    default:
        return raise_rc(self, from, rc, NULL);
    }
}

/* _resize_copy(job, first, last) -> how many items of the groups first..last-1 changed since their last copy. */
static PyObject *table_resize_copy(PyObject *o, args_t args, Py_ssize_t nargs)
{
    table_obj *self = (table_obj *)o;
    if (nargs != 3)
        return PyErr_Format(PyExc_TypeError, "_resize_copy() takes 3 arguments (%zd given)", nargs);
    job_t *job = (job_t *)PyCapsule_GetPointer(args[0], JOB);
    unsigned long first = PyLong_AsUnsignedLong(args[1]), last = PyLong_AsUnsignedLong(args[2]);
    if (PyErr_Occurred())
        return NULL;
    u64 changed = 0;
    int rc;
    Py_BEGIN_ALLOW_THREADS;
    rc = sc_resize_copy(job->r, (u32)first, (u32)last, &changed);
    Py_END_ALLOW_THREADS;
    return rc == SC_OK ? PyLong_FromUnsignedLongLong(changed) : refused(self, job, rc);
}

/* _resize_switch(job, word, seconds) -> dict of what was done. From its return on the old segment has a successor. */
static PyObject *table_resize_switch(PyObject *o, args_t args, Py_ssize_t nargs)
{
    table_obj *self = (table_obj *)o;
    if (nargs != 3)
        return PyErr_Format(PyExc_TypeError, "_resize_switch() takes 3 arguments (%zd given)", nargs);
    job_t *job = (job_t *)PyCapsule_GetPointer(args[0], JOB);
    unsigned long long word = PyLong_AsUnsignedLongLong(args[1]);
    double seconds = PyFloat_AsDouble(args[2]);
    if (PyErr_Occurred())
        return NULL;
    int rc;
    Py_BEGIN_ALLOW_THREADS;
    rc = sc_resize_switch(job->r, word, (i64)(seconds * 1e9));
    Py_END_ALLOW_THREADS;
    if (rc != SC_OK)
        return refused(self, job, rc);
    sc_resized_t done = sc_resize_result(job->r);
    return Py_BuildValue("{s:K,s:K,s:K,s:d}", "items", (unsigned long long)done.items, "left_out",
                         (unsigned long long)done.left_out, "corrupt", (unsigned long long)done.corrupt, "pause",
                         (double)done.pause_ns / 1e9);
}

#define M(name, flags) {"_" #name, (PyCFunction)(void (*)(void))table_##name, flags, NULL}
PyMethodDef table_resize_methods[] = {
    M(format_successor, METH_FASTCALL), M(resize, METH_O), M(resize_copy, METH_FASTCALL), M(resize_switch, METH_FASTCALL),
    {NULL, NULL, 0, NULL},
};
#undef M
#undef JOB
