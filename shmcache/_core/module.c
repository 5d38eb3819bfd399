/* module.c - the extension module: its state, its types, and the functions segment.py creates segments with.
 *
 * Limited API 3.11, multi-phase init, heap types, no state outside the module but the process records of guard.c.  A
 * class derived from Table has no module state, so an object carries a pointer to it and a reference to the module. */
#include "pycore.h"
#include "resize.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef PyObject *const *args_t;

/* ---- the type ----------------------------------------------------------------------------------------------------- */

static PyModuleDef core_def, core_def_multi;

static PyObject *table_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    (void)args;
    (void)kwargs;
    PyTypeObject *base = type;
    PyObject *module = NULL;
    for (; base != NULL; base = (PyTypeObject *)PyType_GetSlot(base, Py_tp_base)) {
        module = PyType_GetModule(base);
        if (module != NULL) {
            PyModuleDef *def = PyModule_GetDef(module);
            if (def == &core_def || def == &core_def_multi)
                break;
            module = NULL;
        }
        PyErr_Clear();
        if (!(PyType_GetFlags(base) & Py_TPFLAGS_HEAPTYPE))
            break;
    }
    if (module == NULL)
        return PyErr_Format(PyExc_TypeError, "type: a class derived from Table wanted, %R found", (PyObject *)type);
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    table_obj *self = (table_obj *)alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->st = (core_state *)PyModule_GetState(module);
    self->module = Py_NewRef(module);
    self->codec = Py_NewRef(Py_None);
    self->default_ttl_ms = -1;
    self->lock_timeout_ns = 100000000;
    return (PyObject *)self;
}
static int table_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    (void)self;
    (void)args;
    (void)kwargs;
    return 0;
}
static int table_traverse(PyObject *o, visitproc visit, void *arg)
{
    table_obj *self = (table_obj *)o;
    Py_VISIT(self->codec);
    Py_VISIT(self->pack);
    Py_VISIT(self->unpack);
    Py_VISIT(self->module);
    Py_VISIT(Py_TYPE(o));
    return 0;
}
static int table_tp_clear(PyObject *o)
{
    Py_CLEAR(((table_obj *)o)->codec);
    Py_CLEAR(((table_obj *)o)->pack);
    Py_CLEAR(((table_obj *)o)->unpack);
    return 0;
}
static void table_dealloc(PyObject *o)
{
    table_obj *self = (table_obj *)o;
    PyTypeObject *type = Py_TYPE(o);
    PyObject_GC_UnTrack(o);
    map_drop(self->map);
    PyMem_Free(self->prefix);
    Py_XDECREF(self->codec);
    Py_XDECREF(self->pack);
    Py_XDECREF(self->unpack);
    Py_XDECREF(self->module);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(o);
    Py_DECREF(type);
}

static PyObject *get_attached(PyObject *o, void *unused)
{
    (void)unused;
    return PyBool_FromLong(((table_obj *)o)->map != NULL);
}
static PyObject *get_readonly(PyObject *o, void *unused)
{
    (void)unused;
    map_t *m = ((table_obj *)o)->map;
    return PyBool_FromLong(m != NULL && m->t->readonly);
}
static PyObject *get_lost(PyObject *o, void *unused)
{
    (void)unused;
    map_t *m = ((table_obj *)o)->map;
    return PyBool_FromLong(m != NULL && (m->t->lost || SC_LD(&m->t->control->successor) != 0));
}
static PyObject *get_successor(PyObject *o, void *unused)
{
    (void)unused;
    map_t *m = ((table_obj *)o)->map;
    return PyLong_FromUnsignedLongLong(m == NULL ? 0 : SC_LD_ACQ(&m->t->control->successor));
}
static PyObject *get_n_groups(PyObject *o, void *unused)
{
    (void)unused;
    table_obj *self = (table_obj *)o;
    if (self->map == NULL)
        return closed_error(self), NULL;
    return PyLong_FromUnsignedLong(sc_n_groups(self->map->t));
}
static PyGetSetDef table_getset[] = {
    {"_attached", get_attached, NULL, NULL, NULL},
    {"_readonly", get_readonly, NULL, NULL, NULL},
    {"_lost", get_lost, NULL, NULL, NULL},
    {"_successor", get_successor, NULL, NULL, NULL},
    {"_n_groups", get_n_groups, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static int put_ll(PyObject *d, const char *name, unsigned long v)
{
    return dict_put(d, name, PyLong_FromUnsignedLong(v));
}

/* OSError that names the call, from errno. */
PyObject *os_error(const char *call)
{
    int err = errno;
    PyObject *text = PyUnicode_FromFormat("%s: %s", call, strerror(err)), *args = NULL;
    if (text != NULL && (args = Py_BuildValue("(iN)", err, text)) != NULL)
        PyErr_SetObject(PyExc_OSError, args);
    Py_XDECREF(args);
    return NULL;
}

/* ---- functions for segment.py ------------------------------------------------------------------------------------- */

static int take_u64(PyObject *d, const char *name, u64 *out)
{
    PyObject *v = PyDict_GetItemString(d, name);
    if (v == NULL || v == Py_None)
        return 0;
    if (!PyLong_Check(v)) {
        PyErr_Format(PyExc_TypeError, "%s: int wanted, %R found", name, (PyObject *)Py_TYPE(v));
        return -1;
    }
    unsigned long long u = PyLong_AsUnsignedLongLong(v);
    if (u == (unsigned long long)-1 && PyErr_Occurred()) {
        PyErr_Format(PyExc_ValueError, "%s: 0 to 2**64-1 wanted, %R found", name, v);
        return -1;
    }
    *out = u;
    return 0;
}
static int take_i64(PyObject *d, const char *name, i64 *out)
{
    PyObject *v = PyDict_GetItemString(d, name);
    if (v == NULL || v == Py_None)
        return 0;
    *out = PyLong_AsLongLong(v);
    return *out == -1 && PyErr_Occurred() ? -1 : 0;
}
static int take_bytes(PyObject *d, const char *name, void *out, Py_ssize_t n)
{
    PyObject *v = PyDict_GetItemString(d, name);
    if (v == NULL)
        return 0;
    if (!PyBytes_Check(v) || PyBytes_Size(v) != n) {
        PyErr_Format(PyExc_ValueError, "%s: %zd bytes wanted, %R found", name, n, v);
        return -1;
    }
    memcpy(out, PyBytes_AsString(v), (size_t)n);
    return 0;
}

static int plan_from(PyObject *options, sc_header_t *h)
{
    sc_want_t want = {0, 0, 0, 0, 0, 0};
    char msg[300];
    memset(h, 0, sizeof *h);
    if (take_u64(options, "size", &want.size) != 0 || take_u64(options, "buckets", &want.buckets) != 0 ||
        take_u64(options, "item_size", &want.item_size) != 0 || take_u64(options, "guards", &want.guards) != 0 ||
        take_u64(options, "max_value", &want.max_value) != 0 || take_u64(options, "workers", &want.workers) != 0)
        return -1;
    if (sc_plan(&want, h, msg, sizeof msg) != NULL) {
        PyErr_SetString(PyExc_ValueError, msg);
        return -1;
    }
    return 0;
}

/* plan(options) -> the geometry a segment of these options has; ValueError names what cannot be. */
static PyObject *core_plan(PyObject *module, PyObject *options)
{
    sc_header_t h;
    (void)module;
    if (!PyDict_Check(options))
        return PyErr_Format(PyExc_TypeError, "options: dict wanted, %R found", (PyObject *)Py_TYPE(options));
    return plan_from(options, &h) != 0 ? NULL : header_dict(&h);
}

/* (fd, shm_id, fields): lays a fresh, zeroed segment out. like: one that it will replace, whose secrets and birth it takes;
 * it stands in state COPY then, else it is READY. */
PyObject *format_segment(args_t args, Py_ssize_t nargs, const sc_header_t *like)
{
    if (nargs != 3 || !PyDict_Check(args[2]))
        return PyErr_Format(PyExc_TypeError, "format() takes (fd, shm_id, dict)");
    int fd = (int)PyLong_AsLong(args[0]), shm_id = (int)PyLong_AsLong(args[1]);
    PyObject *d = args[2];
    sc_header_t h;
    u64 u[14] = {0};
    i64 i[6] = {0};
    static const char *const un[14] = {"guard_kind", "flags", "clean_period_ms", "default_ttl_ms", "ipc_ns", "creator_pid",
                                       "creator_uid", "owner_uid", "owner_gid", "perms", "form", "n_sems", NULL, NULL};
    static const char *const in[6] = {"clock_base_ns", "created_ns", "sem_key", "sem_id", "sem_ctime", "shm_key"};
    if (PyErr_Occurred() || plan_from(d, &h) != 0)
        return NULL;
    for (int j = 0; un[j] != NULL; j++)
        if (take_u64(d, un[j], &u[j]) != 0)
            return NULL;
    for (int j = 0; j < 6; j++)
        if (take_i64(d, in[j], &i[j]) != 0)
            return NULL;
    PyObject *name = PyDict_GetItemString(d, "name");
    Py_ssize_t n = 0;
    const char *text = name == NULL ? "" : PyUnicode_AsUTF8AndSize(name, &n);
    if (text == NULL || take_bytes(d, "hash_key", h.hash_key, 16) != 0 || take_bytes(d, "uuid", h.uuid, 16) != 0 ||
        take_bytes(d, "boot_id", h.boot_id, 16) != 0)
        return NULL;
    if ((size_t)n >= sizeof h.name)
        return PyErr_Format(PyExc_ValueError, "name: at most %zu bytes wanted, %zd found", sizeof h.name - 1, n);
    memcpy(h.name, text, (size_t)n);
    h.guard_kind = (u32)u[0];
    h.flags = (u32)u[1];
    h.clean_period_ms = u[2];
    h.default_ttl_ms = u[3];
    h.ipc_ns = u[4];
    h.creator_pid = (u32)u[5];
    h.creator_uid = (u32)u[6];
    h.owner_uid = (u32)u[7];
    h.owner_gid = (u32)u[8];
    h.perms = (u32)u[9];
    h.form = (u32)u[10];
    h.clock_base_ns = i[0] != 0 ? i[0] : sc_clock_boot_ns() - sc_time_shift_ns();
    h.created_ns = i[1];
    h.sem_key = (i32)i[2];
    h.sem_id = (i32)i[3];
    h.sem_ctime = i[4];
    h.shm_key = (i32)i[5];
    if (like != NULL) {
        u64 word;
        memcpy(h.hash_key, like->hash_key, sizeof h.hash_key);
        h.clock_base_ns = like->clock_base_ns;
        h.created_ns = like->created_ns;
        memcpy(&word, like->uuid, sizeof word);
        h.lineage = like->lineage != 0 ? like->lineage : word;
        h.state = SC_STATE_COPY;
    }
    if (h.guard_kind != SC_GUARD_FAST && h.guard_kind != SC_GUARD_SEMAPHORE)
        return PyErr_Format(PyExc_ValueError, "guard_kind: 1 or 2 wanted, %u found", h.guard_kind);
    u8 *base = fd >= 0 ? (u8 *)mmap(NULL, (size_t)h.size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
                       : (u8 *)shmat(shm_id, NULL, 0);
    if (base == MAP_FAILED)
        return os_error(fd >= 0 ? "mmap" : "shmat");
    sc_format(base, &h);
    if (fd >= 0)
        munmap(base, (size_t)h.size);
    else
        shmdt(base);
    return header_dict(&h);
}

static PyObject *core_format(PyObject *module, args_t args, Py_ssize_t nargs)
{
    (void)module;
    return format_segment(args, nargs, NULL);
}

/* read_header(fd, shm_id, size, unborn=False) -> dict, with the successor word of the moment; SegmentInvalid or LayoutMismatch say what is wrong.  unborn: one that a
 * resize builds will do. */
static PyObject *core_read_header(PyObject *module, args_t args, Py_ssize_t nargs)
{
    core_state *st = (core_state *)PyModule_GetState(module);
    if (nargs != 3 && nargs != 4)
        return PyErr_Format(PyExc_TypeError, "read_header() takes 3 or 4 arguments (%zd given)", nargs);
    int unborn = nargs == 4 && PyObject_IsTrue(args[3]) == 1;
    int fd = (int)PyLong_AsLong(args[0]), shm_id = (int)PyLong_AsLong(args[1]);
    unsigned long long size = PyLong_AsUnsignedLongLong(args[2]);
    if (PyErr_Occurred())
        return NULL;
    u8 page[SC_HEADER_SIZE + sizeof(u64)]; /* the successor word follows the header's page */
    static_assert(SC_CONTROL_OFF == SC_HEADER_SIZE && offsetof(sc_control_t, successor) == 0, "layout v1");
    char msg[400];
    int mismatch;
    sc_header_t h;
    memset(page, 0, sizeof page);
    if (fd >= 0) {
        ssize_t n = pread(fd, page, sizeof page, 0);
        if (n < 0)
            return os_error("pread");
    } else {
        u8 *base = (u8 *)shmat(shm_id, NULL, SHM_RDONLY);
        if (base == (u8 *)-1)
            return os_error("shmat");
        sc_copy(page, base, size < sizeof page ? (size_t)size : sizeof page);
        sc_shm_detach(base, shm_id, sc_header_check(page, size, &h, &mismatch, msg, sizeof msg) == NULL ? &h : NULL);
    }
    if (sc_header_check(page, size, &h, &mismatch, msg, sizeof msg) != NULL) {
        PyErr_SetString(mismatch ? st->LayoutMismatch : st->SegmentInvalid, msg);
        return NULL;
    }
    if (h.state == SC_STATE_COPY && !unborn)
        return PyErr_Format(st->SegmentInvalid, "state: READY (0x%08x) wanted, COPY (0x%08x) found: a resize that has not got "
                                                "through", SC_STATE_READY, SC_STATE_COPY);
    u64 successor;
    memcpy(&successor, page + SC_CONTROL_OFF, sizeof successor);
    PyObject *d = header_dict(&h);
    if (d != NULL && dict_put(d, "successor", PyLong_FromUnsignedLongLong(successor)) != 0)
        Py_CLEAR(d);
    return d;
}

/* publish(fd, shm_id): COPY becomes READY; False: it is neither. */
static PyObject *core_publish(PyObject *m, args_t args, Py_ssize_t nargs)
{
    (void)m;
    if (nargs != 2)
        return PyErr_Format(PyExc_TypeError, "publish() takes 2 arguments (%zd given)", nargs);
    int fd = (int)PyLong_AsLong(args[0]), shm_id = (int)PyLong_AsLong(args[1]);
    if (PyErr_Occurred())
        return NULL;
    u8 *base = fd >= 0 ? (u8 *)mmap(NULL, SC_HEADER_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
                       : (u8 *)shmat(shm_id, NULL, 0);
    if (base == MAP_FAILED)
        return os_error(fd >= 0 ? "mmap" : "shmat");
    int ok = sc_resize_publish((sc_header_t *)(void *)base);
    if (fd >= 0)
        munmap(base, SC_HEADER_SIZE);
    else
        shmdt(base);
    return PyBool_FromLong(ok);
}

static int ints(const char *fn, args_t args, Py_ssize_t nargs, int n, long long *out)
{
    if (nargs != n) {
        PyErr_Format(PyExc_TypeError, "%s() takes %d arguments (%zd given)", fn, n, nargs);
        return -1;
    }
    for (int i = 0; i < n; i++) {
        out[i] = PyLong_AsLongLong(args[i]);
        if (out[i] == -1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}
static PyObject *answer(const char *call, int r) { return r < 0 ? os_error(call) : PyLong_FromLong(r); }
static PyObject *answer_errno(const char *call, int err)
{
    errno = err;
    return err != 0 ? os_error(call) : Py_NewRef(Py_None);
}

/* sem_get(key, n_sems, flags) -> id of a set; OSError as semget gives it. */
static PyObject *core_sem_get(PyObject *m, args_t args, Py_ssize_t nargs)
{
    long long a[3];
    (void)m;
    return ints("sem_get", args, nargs, 3, a) ? NULL : answer("semget", semget((key_t)a[0], (int)a[1], (int)a[2]));
}
static PyObject *core_shm_get(PyObject *m, args_t args, Py_ssize_t nargs)
{
    long long a[3];
    (void)m;
    return ints("shm_get", args, nargs, 3, a) ? NULL : answer("shmget", shmget((key_t)a[0], (size_t)a[1], (int)a[2]));
}
static PyObject *perm_dict(const struct ipc_perm *p)
{
    return Py_BuildValue("{s:l,s:k,s:k,s:k,s:k,s:k}", "key", (long)p->__key, "uid", (unsigned long)p->uid, "gid",
                         (unsigned long)p->gid, "cuid", (unsigned long)p->cuid, "cgid", (unsigned long)p->cgid, "mode",
                         (unsigned long)p->mode);
}
static PyObject *core_sem_stat(PyObject *m, PyObject *arg)
{
    struct semid_ds ds;
    union sc_semun u = {.buf = &ds};
    long id = PyLong_AsLong(arg);
    (void)m;
    if (id == -1 && PyErr_Occurred())
        return NULL;
    if (semctl((int)id, 0, IPC_STAT, u) < 0)
        return os_error("semctl IPC_STAT");
    PyObject *d = perm_dict(&ds.sem_perm);
    if (d != NULL && (put_ll(d, "n_sems", (unsigned long)ds.sem_nsems) | put_ll(d, "ctime", (unsigned long)ds.sem_ctime)) != 0)
        Py_CLEAR(d);
    return d;
}
static PyObject *core_shm_stat(PyObject *m, PyObject *arg)
{
    struct shmid_ds ds;
    long id = PyLong_AsLong(arg);
    (void)m;
    if (id == -1 && PyErr_Occurred())
        return NULL;
    if (shmctl((int)id, IPC_STAT, &ds) < 0)
        return os_error("shmctl IPC_STAT");
    PyObject *d = perm_dict(&ds.shm_perm);
    if (d != NULL && (put_ll(d, "size", ds.shm_segsz) | put_ll(d, "nattch", ds.shm_nattch) | put_ll(d, "ctime", (unsigned long)ds.shm_ctime) |
                      put_ll(d, "cpid", (unsigned long)ds.shm_cpid)) != 0)
        Py_CLEAR(d);
    return d;
}
/* sem_owner(id, uid, gid, mode), shm_owner(id, uid, gid, mode): IPC_SET */
static PyObject *core_sem_owner(PyObject *m, args_t args, Py_ssize_t nargs)
{
    long long a[4];
    struct semid_ds ds;
    union sc_semun u = {.buf = &ds};
    (void)m;
    if (ints("sem_owner", args, nargs, 4, a) != 0)
        return NULL;
    if (semctl((int)a[0], 0, IPC_STAT, u) < 0)
        return os_error("semctl IPC_STAT");
    ds.sem_perm.uid = (uid_t)a[1];
    ds.sem_perm.gid = (gid_t)a[2];
    ds.sem_perm.mode = (unsigned short)a[3];
    return answer("semctl IPC_SET", semctl((int)a[0], 0, IPC_SET, u));
}
static PyObject *core_shm_owner(PyObject *m, args_t args, Py_ssize_t nargs)
{
    long long a[4];
    struct shmid_ds ds;
    (void)m;
    if (ints("shm_owner", args, nargs, 4, a) != 0)
        return NULL;
    if (shmctl((int)a[0], IPC_STAT, &ds) < 0)
        return os_error("shmctl IPC_STAT");
    ds.shm_perm.uid = (uid_t)a[1];
    ds.shm_perm.gid = (gid_t)a[2];
    ds.shm_perm.mode = (unsigned short)a[3];
    return answer("shmctl IPC_SET", shmctl((int)a[0], IPC_SET, &ds));
}
static PyObject *core_sem_remove(PyObject *m, PyObject *arg)
{
    long id = PyLong_AsLong(arg);
    (void)m;
    return id == -1 && PyErr_Occurred() ? NULL : answer("semctl IPC_RMID", semctl((int)id, 0, IPC_RMID));
}
static PyObject *core_shm_remove(PyObject *m, PyObject *arg)
{
    long id = PyLong_AsLong(arg);
    (void)m;
    return id == -1 && PyErr_Occurred() ? NULL : answer("shmctl IPC_RMID", shmctl((int)id, IPC_RMID, NULL));
}
static PyObject *core_sem_prepare(PyObject *m, args_t args, Py_ssize_t nargs)
{
    long long a[3];
    (void)m;
    return ints("sem_prepare", args, nargs, 3, a) ? NULL : answer_errno("semctl SETVAL", sc_sem_set_guards((int)a[0], (u32)a[1], (u32)a[2]));
}
static PyObject *core_undo_probe(PyObject *m, args_t args, Py_ssize_t nargs)
{
    long long a[2];
    (void)m;
    if (ints("undo_probe", args, nargs, 2, a) != 0)
        return NULL;
    int r = sc_undo_probe((int)a[0], (int)a[1]);
    return r < 0 ? Py_NewRef(Py_None) : PyBool_FromLong(r);
}
/* lifecycle_enter(sem_id, seconds) -> True, or False when it was not free in time; OSError (EIDRM: start over). */
static PyObject *core_lifecycle_enter(PyObject *m, args_t args, Py_ssize_t nargs)
{
    (void)m;
    if (nargs != 2)
        return PyErr_Format(PyExc_TypeError, "lifecycle_enter() takes 2 arguments (%zd given)", nargs);
    long id = PyLong_AsLong(args[0]);
    double s = PyFloat_AsDouble(args[1]);
    if (PyErr_Occurred())
        return NULL;
    int err;
    Py_BEGIN_ALLOW_THREADS;
    err = sc_lifecycle_enter((int)id, (i64)(s * 1e9));
    Py_END_ALLOW_THREADS;
    if (err == EAGAIN || err == EINTR) {
        if (PyErr_CheckSignals() != 0)
            return NULL;
        Py_RETURN_FALSE;
    }
    if (err != 0)
        return answer_errno("semtimedop", err);
    Py_RETURN_TRUE;
}
static PyObject *core_lifecycle_leave(PyObject *m, PyObject *arg)
{
    long id = PyLong_AsLong(arg);
    (void)m;
    return id == -1 && PyErr_Occurred() ? NULL : answer_errno("semop", sc_lifecycle_leave((int)id));
}
static PyObject *core_sem_values(PyObject *m, args_t args, Py_ssize_t nargs)
{
    long long a[2];
    (void)m;
    if (ints("sem_values", args, nargs, 2, a) != 0)
        return NULL;
    if (a[1] < 1 || a[1] > 32000)
        return PyErr_Format(PyExc_ValueError, "n_sems: 1 to 32000 wanted, %lld found", a[1]);
    unsigned short *v = (unsigned short *)PyMem_Calloc((size_t)a[1], sizeof *v);
    if (v == NULL)
        return PyErr_NoMemory();
    union sc_semun u = {.array = v};
    PyObject *list = semctl((int)a[0], 0, GETALL, u) < 0 ? os_error("semctl GETALL") : PyList_New(0);
    for (long long i = 0; list != NULL && i < a[1]; i++) {
        PyObject *n = PyLong_FromLong(v[i]);
        if (n == NULL || PyList_Append(list, n) != 0)
            Py_CLEAR(list);
        Py_XDECREF(n);
    }
    PyMem_Free(v);
    return list;
}

/* rename_noreplace(old, new): publishes a finished file under its name; FileExistsError if somebody was first. */
static PyObject *core_rename_noreplace(PyObject *m, args_t args, Py_ssize_t nargs)
{
    (void)m;
    if (nargs != 2)
        return PyErr_Format(PyExc_TypeError, "rename_noreplace() takes 2 arguments (%zd given)", nargs);
    const char *from = PyUnicode_AsUTF8AndSize(args[0], NULL), *to = from ? PyUnicode_AsUTF8AndSize(args[1], NULL) : NULL;
    if (to == NULL)
        return NULL;
    long r = syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 1u /* RENAME_NOREPLACE */);
    if (r != 0 && (errno == ENOSYS || errno == EINVAL)) /* an old kernel or file system: link is as exclusive */
        r = link(from, to) != 0 ? -1 : unlink(from);
    return r != 0 ? os_error("renameat2") : Py_NewRef(Py_None);
}

#define F(name, flags) {#name, (PyCFunction)(void (*)(void))core_##name, flags, NULL}
PyMethodDef core_functions[] = {
    F(plan, METH_O), F(format, METH_FASTCALL), F(read_header, METH_FASTCALL), F(publish, METH_FASTCALL), F(sem_get, METH_FASTCALL),
    F(shm_get, METH_FASTCALL), F(sem_stat, METH_O), F(shm_stat, METH_O), F(sem_owner, METH_FASTCALL),
    F(shm_owner, METH_FASTCALL), F(sem_remove, METH_O), F(shm_remove, METH_O), F(sem_prepare, METH_FASTCALL),
    F(undo_probe, METH_FASTCALL), F(lifecycle_enter, METH_FASTCALL), F(lifecycle_leave, METH_O),
    F(sem_values, METH_FASTCALL), F(rename_noreplace, METH_FASTCALL), {NULL, NULL, 0, NULL},
};

/* ---- the module ----------------------------------------------------------------------------------------------------- */

static int import_all(core_state *st)
{
    struct {
        const char *module, *name;
        PyObject **to;
    } want[] = {
        {"shmcache.arguments", "MISS", &st->miss},
        {"shmcache.arguments", "DEFAULT", &st->dflt},
        {"shmcache.arguments", "check_key", &st->check_key},
        {"shmcache.arguments", "lifetime", &st->lifetime},
        {"shmcache.arguments", "check_number", &st->check_number},
        {"shmcache.errors", "ShmCacheError", &st->Error},
        {"shmcache.errors", "KeyTooLong", &st->KeyTooLong},
        {"shmcache.errors", "ValueTooLarge", &st->ValueTooLarge},
        {"shmcache.errors", "NoSpace", &st->NoSpace},
        {"shmcache.errors", "LockTimeout", &st->LockTimeout},
        {"shmcache.errors", "GuardLost", &st->GuardLost},
        {"shmcache.errors", "TooManyWorkers", &st->TooManyWorkers},
        {"shmcache.errors", "SegmentNotOurs", &st->SegmentNotOurs},
        {"shmcache.errors", "NotANumber", &st->NotANumber},
        {"shmcache.errors", "CounterOverflow", &st->CounterOverflow},
        {"shmcache.errors", "NotSupported", &st->NotSupported},
        {"shmcache.errors", "LayoutMismatch", &st->LayoutMismatch},
        {"shmcache.errors", "SegmentInvalid", &st->SegmentInvalid},
    };
    for (size_t i = 0; i < sizeof want / sizeof want[0]; i++) {
        PyObject *m = PyImport_ImportModule(want[i].module);
        if (m == NULL)
            return -1;
        *want[i].to = PyObject_GetAttrString(m, want[i].name);
        Py_DECREF(m);
        if (*want[i].to == NULL)
            return -1;
    }
    st->str_encode = PyUnicode_InternFromString("encode");
    st->str_decode = PyUnicode_InternFromString("decode");
    st->str_fast = PyUnicode_InternFromString("fast");
    st->str_follow = PyUnicode_InternFromString("_follow");
    return !st->str_encode || !st->str_decode || !st->str_fast || !st->str_follow ? -1 : 0;
}

static PyMethodDef table_methods[80];

static int core_exec(PyObject *module)
{
    core_state *st = (core_state *)PyModule_GetState(module);
    if (import_all(st) != 0)
        return -1;
    PyObject *probe = PyBytes_FromStringAndSize("probe", 5);
    if (probe == NULL)
        return -1;
    st->bytes_off = PyBytes_AsString(probe) - (char *)probe;
    Py_DECREF(probe);
    PyType_Slot slots[] = {
        {Py_tp_doc, (void *)"One attached segment; every public method is one atomic operation. See shmcache.engine."},
        {Py_tp_new, (void *)table_new},
        {Py_tp_init, (void *)table_init},
        {Py_tp_dealloc, (void *)table_dealloc},
        {Py_tp_traverse, (void *)table_traverse},
        {Py_tp_clear, (void *)table_tp_clear},
        {Py_tp_methods, (void *)table_methods},
        {Py_tp_getset, (void *)table_getset},
        {Py_mp_subscript, (void *)table_subscript},
        {Py_mp_ass_subscript, (void *)table_ass_subscript},
        {Py_mp_length, (void *)table_length},
        {Py_sq_contains, (void *)table_contains},
        {0, NULL},
    };
    PyType_Spec spec = {"shmcache._core.Table", sizeof(table_obj), 0,
                        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, slots};
    st->table_type = PyType_FromModuleAndSpec(module, &spec, NULL);
    if (st->table_type == NULL || PyModule_AddObjectRef(module, "Table", st->table_type) != 0)
        return -1;
#define CONSTANT(name, v) if (PyModule_AddIntConstant(module, name, (long)(v)) != 0) return -1
    CONSTANT("LAYOUT_VERSION", SC_LAYOUT_VERSION);
    CONSTANT("FORM_POSIX", SC_FORM_POSIX);
    CONSTANT("FORM_SYSV", SC_FORM_SYSV);
    CONSTANT("FORM_ANON", SC_FORM_ANON);
    CONSTANT("GUARD_SEMAPHORE", SC_GUARD_SEMAPHORE);
    CONSTANT("GUARD_FAST", SC_GUARD_FAST);
    CONSTANT("FLAG_HEADER_ONLY", SC_F_HEADER_ONLY);
    CONSTANT("FLAG_NO_EVICT", SC_F_NO_EVICT);
    CONSTANT("FLAG_SECURE", SC_F_SECURE);
    CONSTANT("FLAG_UNDO_WORKS", SC_F_UNDO_WORKS);
    CONSTANT("SUCCESSOR_REMOVED", SC_SUCCESSOR_REMOVED);
    CONSTANT("STATE_COPY", SC_STATE_COPY);
    CONSTANT("MIN_SIZE", SC_MIN_SIZE);
    CONSTANT("ANON_KEYS", SC_ANON_KEYS);
    return 0;
}
static int core_traverse(PyObject *module, visitproc visit, void *arg)
{
    core_state *st = (core_state *)PyModule_GetState(module);
    PyObject **p = st == NULL ? NULL : &st->table_type;
    for (size_t i = 0; st != NULL && i < (sizeof *st - offsetof(core_state, table_type)) / sizeof *p; i++)
        Py_VISIT(p[i]);
    return 0;
}
static int core_clear(PyObject *module)
{
    core_state *st = (core_state *)PyModule_GetState(module);
    PyObject **p = st == NULL ? NULL : &st->table_type;
    for (size_t i = 0; st != NULL && i < (sizeof *st - offsetof(core_state, table_type)) / sizeof *p; i++)
        Py_CLEAR(p[i]);
    return 0;
}
static void core_free(void *module) { (void)core_clear((PyObject *)module); }

/* The slot for interpreters with a GIL of their own is unknown to 3.11, and an unknown slot is a SystemError there. */
#define SLOT_MULTIPLE_INTERPRETERS 3
static PyModuleDef_Slot core_slots[] = {{Py_mod_exec, (void *)core_exec}, {0, NULL}};
static PyModuleDef_Slot core_slots_multi[] = {
    {Py_mod_exec, (void *)core_exec}, {SLOT_MULTIPLE_INTERPRETERS, (void *)2}, {0, NULL}};
#define DEF(slots)                                                                                                       \
    {                                                                                                                    \
        PyModuleDef_HEAD_INIT, "shmcache._core", "Shared-memory table; used by shmcache.engines.shm.", sizeof(core_state), \
            core_functions, slots, core_traverse, core_clear, core_free                                                  \
    }
static PyModuleDef core_def = DEF(core_slots);
static PyModuleDef core_def_multi = DEF(core_slots_multi);

PyMODINIT_FUNC PyInit__core(void);
PyMODINIT_FUNC PyInit__core(void)
{
    if (table_methods[0].ml_name == NULL) { /* the same values whoever writes them */
        PyMethodDef *const parts[] = {table_read_methods, table_write_methods, table_admin_methods, table_map_methods,
                                      table_resize_methods};
        size_t n = 0, at;
        for (size_t p = 0; p < 5; p++)
            for (PyMethodDef *m = parts[p]; m->ml_name != NULL; m++)
                n++;
        at = n;
        for (size_t p = 5; p-- > 0;) { /* the first one last: it tells that the rest is there */
            size_t k = 0;
            while (parts[p][k].ml_name != NULL)
                k++;
            while (k-- > 0)
                table_methods[--at] = parts[p][k];
        }
    }
    return PyModuleDef_Init(Py_Version >= 0x030c0000 ? &core_def_multi : &core_def);
}
#undef F
#undef CONSTANT
#undef DEF
