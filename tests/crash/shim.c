/* shim.c - preloaded in front of the C library: the n-th call of a function fails with an errno, SEM_UNDO is hidden,
 * clocks are shifted.  Linux, glibc.
 *
 *   shim_arm(call, n, errno)    from here on count the calls; the n-th of `call` fails (n = 0: none does)
 *   shim_disarm()               every call goes through
 *   shim_seen(call)             calls counted since shim_arm
 *   shim_fired()                whether the armed failure took place
 *   shim_hide_undo(yes)         semop and semtimedop lose SEM_UNDO
 *   shim_shift(clock, seconds)  CLOCK_REALTIME or CLOCK_BOOTTIME: seconds to add, in this process and those forked from it
 *
 * Counted are the calls on segments and semaphores: open of names in /dev/shm; mmap and munmap from the extension and the
 * packages that make segments, not those of the interpreter's own memory.  Removals have names of their own, since what a
 * refused removal leaves behind is no fault of the caller. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define CALLS(X)                                                                                                        \
    X(open) X(shm_open) X(ftruncate) X(posix_fallocate) X(fchmod) X(fchown) X(mmap) X(renameat2) X(link) X(semget)      \
    X(semop) X(semctl) X(shmget) X(shmat) X(shmctl) X(munmap) X(shmdt) X(shm_unlink) X(semctl_rmid) X(shmctl_rmid)      \
    X(clone)
enum {
#define X(name) CALL_##name,
    CALLS(X)
#undef X
    N_CALLS
};
static const char *const names[] = {
#define X(name) #name,
    CALLS(X)
#undef X
};

static long seen[N_CALLS];
static int armed, victim = -1, error_given, fired, undo_hidden;
static long nth, *shift; /* shift: two words that forked processes share, real and boot */

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }
#define REAL(type, name) ((type)next(name))

static int fails(int call)
{
    if (!armed)
        return 0;
    if (++seen[call] != nth || call != victim)
        return 0;
    fired = 1;
    errno = error_given;
    return 1;
}

static int number(const char *call)
{
    for (int i = 0; i < N_CALLS; i++)
        if (strcmp(names[i], call) == 0)
            return i;
    return -1;
}
int shim_arm(const char *call, long n, int error)
{
    memset(seen, 0, sizeof seen);
    victim = number(call);
    nth = n;
    error_given = error;
    fired = 0;
    armed = 1;
    return victim >= 0 ? 0 : -1;
}
void shim_disarm(void) { armed = 0; }
long shim_seen(const char *call) { return seen[number(call)]; }
int shim_fired(void) { return fired; }
void shim_hide_undo(int yes) { undo_hidden = yes; }
void shim_shift(int clock, long seconds) { shift[clock == CLOCK_REALTIME ? 0 : 1] = seconds; }

__attribute__((constructor)) static void begin(void)
{
    shift = (long *)syscall(SYS_mmap, 0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

/* Whether the caller is the extension or a package that makes segments. */
static int ours(const void *caller)
{
    Dl_info info;
    return armed && dladdr(caller, &info) != 0 && info.dli_fname != NULL &&
           (strstr(info.dli_fname, "shmcache") != NULL || strstr(info.dli_fname, "posix_ipc") != NULL ||
            strstr(info.dli_fname, "sysv_ipc") != NULL);
}

/* ---- files and mappings -------------------------------------------------------------------------------------------- */

#define OPEN(name)                                                                                  \
    int name(const char *path, int flags, ...)                                                      \
    {                                                                                               \
        va_list args;                                                                               \
        va_start(args, flags);                                                                      \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(args, mode_t) : 0;              \
        va_end(args);                                                                               \
        if (strncmp(path, "/dev/shm/", 9) == 0 && fails(CALL_open))                                 \
            return -1;                                                                              \
        return REAL(int (*)(const char *, int, ...), #name)(path, flags, mode);                     \
    }
OPEN(open)
OPEN(open64)

int shm_open(const char *name, int flags, mode_t mode)
{
    return fails(CALL_shm_open) ? -1 : REAL(int (*)(const char *, int, mode_t), "shm_open")(name, flags, mode);
}
int shm_unlink(const char *name)
{
    return fails(CALL_shm_unlink) ? -1 : REAL(int (*)(const char *), "shm_unlink")(name);
}
#define FTRUNCATE(name) \
    int name(int fd, off_t size) { return fails(CALL_ftruncate) ? -1 : REAL(int (*)(int, off_t), #name)(fd, size); }
FTRUNCATE(ftruncate)
FTRUNCATE(ftruncate64)
#define FALLOCATE(name)                                                                             \
    int name(int fd, off_t from, off_t size)                                                        \
    {                                                                                               \
        return fails(CALL_posix_fallocate) ? errno : REAL(int (*)(int, off_t, off_t), #name)(fd, from, size); \
    }
FALLOCATE(posix_fallocate)
FALLOCATE(posix_fallocate64)
int fchmod(int fd, mode_t mode) { return fails(CALL_fchmod) ? -1 : REAL(int (*)(int, mode_t), "fchmod")(fd, mode); }
int fchown(int fd, uid_t uid, gid_t gid)
{
    return fails(CALL_fchown) ? -1 : REAL(int (*)(int, uid_t, gid_t), "fchown")(fd, uid, gid);
}
int link(const char *from, const char *to)
{
    return fails(CALL_link) ? -1 : REAL(int (*)(const char *, const char *), "link")(from, to);
}
#define MMAP(name)                                                                                  \
    void *name(void *at, size_t size, int prot, int flags, int fd, off_t from)                      \
    {                                                                                               \
        if (ours(__builtin_return_address(0)) && fails(CALL_mmap))                                  \
            return MAP_FAILED;                                                                      \
        return REAL(void *(*)(void *, size_t, int, int, int, off_t), #name)(at, size, prot, flags, fd, from); \
    }
MMAP(mmap)
MMAP(mmap64)
int munmap(void *at, size_t size)
{
    if (ours(__builtin_return_address(0)) && fails(CALL_munmap))
        return -1;
    return REAL(int (*)(void *, size_t), "munmap")(at, size);
}

/* ---- System V ------------------------------------------------------------------------------------------------------ */

int semget(key_t key, int n, int flags)
{
    return fails(CALL_semget) ? -1 : REAL(int (*)(key_t, int, int), "semget")(key, n, flags);
}
static size_t without_undo(struct sembuf *to, const struct sembuf *from, size_t n)
{
    for (size_t i = 0; i < n && i < 8; i++) {
        to[i] = from[i];
        if (undo_hidden)
            to[i].sem_flg = (short)(to[i].sem_flg & ~SEM_UNDO);
    }
    return n;
}
int semop(int id, struct sembuf *ops, size_t n)
{
    struct sembuf seen_ops[8];
    if (fails(CALL_semop))
        return -1;
    return REAL(int (*)(int, struct sembuf *, size_t), "semop")(id, seen_ops, without_undo(seen_ops, ops, n));
}
int semtimedop(int id, struct sembuf *ops, size_t n, const struct timespec *wait)
{
    struct sembuf seen_ops[8];
    if (fails(CALL_semop))
        return -1;
    return REAL(int (*)(int, struct sembuf *, size_t, const struct timespec *), "semtimedop")(
        id, seen_ops, without_undo(seen_ops, ops, n), wait);
}
int semctl(int id, int num, int command, ...)
{
    va_list args;
    va_start(args, command);
    unsigned long arg = va_arg(args, unsigned long);
    va_end(args);
    if (fails(command == IPC_RMID ? CALL_semctl_rmid : CALL_semctl))
        return -1;
    return REAL(int (*)(int, int, int, ...), "semctl")(id, num, command, arg);
}
int shmget(key_t key, size_t size, int flags)
{
    return fails(CALL_shmget) ? -1 : REAL(int (*)(key_t, size_t, int), "shmget")(key, size, flags);
}
void *shmat(int id, const void *at, int flags)
{
    return fails(CALL_shmat) ? (void *)-1 : REAL(void *(*)(int, const void *, int), "shmat")(id, at, flags);
}
int shmdt(const void *at) { return fails(CALL_shmdt) ? -1 : REAL(int (*)(const void *), "shmdt")(at); }
int shmctl(int id, int command, struct shmid_ds *ds)
{
    if (fails(command == IPC_RMID ? CALL_shmctl_rmid : CALL_shmctl))
        return -1;
    return REAL(int (*)(int, int, struct shmid_ds *), "shmctl")(id, command, ds);
}

/* ---- direct calls, processes, clocks -------------------------------------------------------------------------------- */

long syscall(long n, ...)
{
    static long (*real)(long, ...);
    struct sembuf ops[8];
    va_list args;
    va_start(args, n);
    long a[6];
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(args, long);
    va_end(args);
    if (real == NULL)
        real = REAL(long (*)(long, ...), "syscall");
    if (n == SYS_renameat2 && fails(CALL_renameat2))
        return -1;
    if (n == SYS_semtimedop) {
        a[2] = (long)without_undo(ops, (const struct sembuf *)a[1], (size_t)a[2]);
        a[1] = (long)ops;
    }
    return real(n, a[0], a[1], a[2], a[3], a[4], a[5]);
}
int clone(int (*body)(void *), void *stack, int flags, void *arg, ...)
{
    return fails(CALL_clone) ? -1 : REAL(int (*)(int (*)(void *), void *, int, void *, ...), "clone")(body, stack, flags, arg);
}
int clock_gettime(clockid_t clock, struct timespec *now)
{
    static int (*real)(clockid_t, struct timespec *);
    if (real == NULL)
        real = REAL(int (*)(clockid_t, struct timespec *), "clock_gettime");
    int r = real(clock, now);
    if (r == 0 && clock == CLOCK_REALTIME)
        now->tv_sec += shift != NULL ? shift[0] : 0;
    if (r == 0 && clock == CLOCK_BOOTTIME)
        now->tv_sec += shift != NULL ? shift[1] : 0;
    return r;
}
