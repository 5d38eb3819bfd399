/*
 * guard_sem.pml - the `semaphore` guard: a System V semaphore of value 1, every operation with SEM_UNDO, and a word
 * `dirty` in shared memory that outlives its writer.
 *
 *     take       semop(-1, SEM_UNDO); after_death = (dirty != 0)
 *     if so      recover, `dirty` left as it is
 *     work       dirty = me; ... hard state ...; dirty = 0
 *     give back  semop(+1, SEM_UNDO)
 *
 * N processes take the guard ROUNDS times each. A killer stops any of them at any point, DEATHS times in all, by death
 * (the kernel adds the process's adjustment to the semaphore some time later) or by execve (the adjustment stays, and
 * the first attach of the new image posts what is left over). Recovery itself may be killed.
 *
 * I1  At most one running process is between the taking and the giving back; the semaphore never exceeds 1.
 * I2  Nobody works on a shard whose last holder was stopped between two stores before a recovery has run to its end.
 * I3  No invalid end state: whoever can run gets the guard in the end.
 *
 * Not here: semtimedop's time-out and EINTR (nothing is held then), removal of the set (EIDRM ends in GuardLost).
 */
#ifndef N
#define N 3
#endif
#ifndef ROUNDS
#define ROUNDS 1
#endif
#ifndef DEATHS
#define DEATHS 2
#endif

#define RUNNING 1
#define STOPPED 2

byte sem = 1;
byte last_pid;                      /* GETPID: 1 + the process of the last operation, an undo included */
short adjust[N];                    /* semadj of each process */
byte dirty;

byte state[N];
bool kept[N];                       /* stopped by execve: the adjustment is still there */
byte deaths = DEATHS;

byte holders;                       /* ghosts: they decide nothing */
bool holds[N];
bool halfway[N];                    /* between the first and the last store to the hard state */
bool broken;

#ifdef UNDO_ON_LOCK_ONLY            /* seeded */
#define UNDO_OF_GIVE_BACK
#else
#define UNDO_OF_GIVE_BACK adjust[id]--
#endif
#ifdef UNDO_ON_UNLOCK_ONLY          /* seeded */
#define UNDO_OF_TAKE
#elif defined(NO_UNDO)              /* seeded */
#define UNDO_OF_TAKE
#undef UNDO_OF_GIVE_BACK
#define UNDO_OF_GIVE_BACK
#else
#define UNDO_OF_TAKE adjust[id]++
#endif

inline undo(p) {
    if
    :: adjust[p] != 0 ->
        if
        :: sem + adjust[p] < 0 -> sem = 0   /* the kernel clamps */
        :: else -> sem = sem + adjust[p]
        fi;
        adjust[p] = 0; last_pid = p + 1; assert(sem <= 1)
    :: else
    fi
}

#define GIVE_BACK atomic { \
    holds[id] = false; holders--; sem++; UNDO_OF_GIVE_BACK; last_pid = id + 1; assert(sem <= 1) }

proctype worker(byte id) {
    byte rounds = ROUNDS;
    bool after_death, zero, mine;

life:
    {
#ifdef SETVAL_AT_ATTACH             /* seeded: a process that attaches sets the value, which wipes everybody's undo */
        atomic { sem = 1; adjust[0] = 0; adjust[1] = 0; adjust[2] = 0 };
#endif
#if !defined(EXEC_POSTS_NOTHING) && !defined(NO_UNDO)   /* the first seeded; without undo nothing is left to post */
        /*
         * The first attach of a process image: a semaphore of value 0 whose last operation bears this pid is a leftover.
         * GETVAL first: nobody else can have come between the 0 and this pid. The other way round somebody can.
         */
#ifdef PID_BEFORE_VALUE             /* seeded */
        mine = (last_pid == id + 1);
        zero = (sem == 0);
#else
        zero = (sem == 0);
        mine = (last_pid == id + 1);
#endif
        if
        :: zero && mine -> atomic { sem++; adjust[id]--; last_pid = id + 1; assert(sem <= 1) }
        :: else
        fi;
        atomic { zero = false; mine = false };
#endif
        do
        :: rounds == 0 -> break
        :: rounds > 0 ->
            atomic {
                sem > 0 ->
                sem--; UNDO_OF_TAKE; last_pid = id + 1;
                holders++; holds[id] = true; assert(holders == 1)
            };
            after_death = (dirty != 0);
#ifdef DIRTY_CLEARED_FIRST          /* seeded: the mark goes before the repair is complete */
            dirty = 0;
#endif
            if
            :: after_death ->
#ifndef NO_RECOVERY                 /* seeded */
                skip;               /* recovery under way: a stop here leaves the shard as broken as it was */
                broken = false;
#endif
                after_death = false
            :: else
            fi;
#ifdef DIRTY_AFTER_FIRST_STORE      /* seeded: the first store to the hard state overtakes the mark */
            halfway[id] = true;
            dirty = id + 1;
#else
            dirty = id + 1;
            halfway[id] = true;
#endif
            assert(!broken);
#ifdef UNLOCK_BEFORE_CLEAR          /* seeded */
            halfway[id] = false;
            GIVE_BACK;
            dirty = 0;
#elif defined(CLEAR_BEFORE_LAST_STORE)  /* seeded: the mark goes before the last store to the hard state */
            dirty = 0;
            halfway[id] = false;
            GIVE_BACK;
#else
            halfway[id] = false;
            dirty = 0;
            GIVE_BACK;
#endif
            rounds--
        od;
        goto leave
    } unless { state[id] == STOPPED };

    atomic {
        if
        :: kept[id]
        :: else -> undo(id)
        fi;
        kept[id] = false; after_death = false; zero = false; mine = false; state[id] = RUNNING;
        goto life
    };

leave:
    atomic { state[id] = 0; undo(id) }  /* an exit is undone like a death */
}

inline stop(p) {
    deaths--;
    state[p] = STOPPED;
    if :: holds[p] -> holds[p] = false; holders-- :: else fi;
    if :: halfway[p] -> halfway[p] = false; broken = true :: else fi
}

proctype killer() {
end:
    do
    :: atomic { deaths > 0 && state[0] == RUNNING -> stop(0); if :: kept[0] = true :: true fi }
    :: atomic { deaths > 0 && state[1] == RUNNING -> stop(1); if :: kept[1] = true :: true fi }
    :: atomic { deaths > 0 && state[2] == RUNNING -> stop(2); if :: kept[2] = true :: true fi }
    od
}

#ifdef CHILD_GIVES_BACK             /* seeded: a child of fork gives back what its parent took */
proctype child() {
end:
    atomic { holds[0] -> sem++; last_pid = N + 1 }
}
#endif

init {
    atomic {
        state[0] = RUNNING; run worker(0);
        state[1] = RUNNING; run worker(1);
        state[2] = RUNNING; run worker(2);
#ifdef CHILD_GIVES_BACK
        run child();
#endif
        run killer()
    }
}
