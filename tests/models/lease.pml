/*
 * lease.pml - the fixed table of leases behind lock() and get_or_set().
 *
 *     take       under the guard: look through all slots of the name; held by a living owner and not over: wait.
 *                Else in one that is free, over or its owner dead:  owner = 0;  deadline, hash;  owner = me (COMMIT)
 *     release    under the guard: where the whole owner word is mine: owner = 0
 *     extend     under the guard: where the whole owner word is mine and the lease is not over: deadline = later
 *
 * Workers 0 and 1 are threads of process 0, worker 2 is process 1. PLAN NESTED: each takes FIRST and, inside, SECOND.
 * APART: 0 and 1 take FIRST, 2 takes SECOND. HUNG: all take FIRST and 0 never gives it back. A process is stopped at
 * any point, DEATHS times in all, its guard with it; a lease runs out at any point, ENDS times in all (in HUNG only
 * worker 0's does). Stopped processes come back, in the same slot with the next generation.
 *
 * I1  A name has at most one holder whose process runs and whose lease is not over.
 * I2  A release or an extend touches the caller's own acquisition only.
 * I3  No invalid end state: a death never blocks a name, whether or not the lease runs out, and a nested lock of
 *     another name never waits for its own holder.
 *
 * Not here: the guard itself (guard.pml, guard_sem.pml: here it is free the moment its holder dies), more names than
 * slots (lock() waits, get_or_set() goes without), the waiting by futex.
 */
#ifndef DEATHS
#define DEATHS 1
#endif
#ifndef ENDS
#define ENDS 1
#endif

#define NESTED 1
#define APART 2
#define HUNG 3
#ifndef PLAN
#define PLAN NESTED
#endif
#if PLAN == HUNG
#define MAY_END(i) (taker[i] == 1)
#else
#define MAY_END(i) true
#endif

#define WORKERS 3
#define PROCESS(id) ((id) / 2)
#define FIRST 1
#define SECOND 2
#define RUNNING 1
#define STOPPED 2

#ifdef NAMES_COLLIDE                /* seeded: the slot is found by a hash of few bits, the name is not compared */
#define HASH(name) 1
#else
#define HASH(name) (name)
#endif

/* process:1 | generation:3 | nonce:4, and never 0 */
#ifdef NO_NONCE                     /* seeded: the owner word is the process alone */
#define WORD(p, g, n) (128 | ((p) << 6) | ((g) << 4))
#else
#define WORD(p, g, n) (128 | ((p) << 6) | ((g) << 4) | (n))
#endif
#ifdef NO_GENERATION                /* seeded */
#define DEAD(w) false
#else
#define DEAD(w) (gen[((w) >> 6) & 1] != (((w) >> 4) & 3))
#endif
#ifdef END_IGNORED                  /* seeded: a lease that is over still counts */
#define HELD(i) (owner[i] != 0 && !DEAD(owner[i]))
#else
#define HELD(i) (owner[i] != 0 && !DEAD(owner[i]) && !over[i])
#endif
#define HELD_AS(i, h) (HELD(i) && hash[i] == (h))

byte owner[2];
byte hash[2];
bool over[2];                       /* now >= deadline */
byte guard;                         /* 0 = free, else 1 + worker */
byte gen[2];
byte nonce;
byte state[WORKERS];
byte deaths = DEATHS;
byte ends = ENDS;

byte holder[3];                     /* ghosts, by name: 1 + worker with a lease that is not over */
byte taker[2];                      /* by slot: 1 + worker that committed there */

#define LOCK atomic { guard == 0 -> guard = id + 1 }
#define UNLOCK guard = 0

inline take(name, mine) {
    do
    :: LOCK;
        i = 2;
        if
        :: HELD_AS(0, HASH(name)) || HELD_AS(1, HASH(name)) ->
#ifdef FIRST_FREE_SLOT              /* seeded: takes the first free slot without looking through the rest */
            if :: !HELD(0) -> i = 0 :: else fi
#else
            skip
#endif
        :: else ->
            if
            :: !HELD(0) -> i = 0
            :: HELD(0) && !HELD(1) -> i = 1
            :: else
            fi
        fi;
        if
        :: i < 2 ->
#ifndef OLD_OWNER_LEFT              /* seeded: the former owner stands beside the new deadline and hash for a while */
            owner[i] = 0;
#endif
            over[i] = false;
            hash[i] = HASH(name);
            atomic {
                nonce = (nonce + 1) & 15;
                mine = WORD(PROCESS(id), gen[PROCESS(id)], nonce);
                owner[i] = mine; taker[i] = id + 1;
                assert(holder[name] == 0); holder[name] = id + 1
            };
            UNLOCK;
            break
        :: else ->
            UNLOCK;
            !HELD_AS(0, HASH(name)) && !HELD_AS(1, HASH(name)) && !(HELD(0) && HELD(1))
        fi
    od;
    i = 0
}

#ifdef RELEASE_BY_NAME              /* seeded: whoever holds the name is released */
#define MINE(i, name, word) (hash[i] == HASH(name))
#else
#define MINE(i, name, word) (owner[i] == (word) && hash[i] == HASH(name))
#endif

inline release(name, mine) {
    LOCK;
    i = 0;
    do
    :: i == 2 -> break
    :: i < 2 && owner[i] != 0 && MINE(i, name, mine) ->
        atomic {
            assert(taker[i] == id + 1);
            owner[i] = 0;
            if :: holder[name] == id + 1 -> holder[name] = 0 :: else fi
        };
        break
    :: else -> i++
    od;
    atomic { UNLOCK; i = 0; mine = 0 }
}

#ifdef EXTEND_AFTER_END             /* seeded: a lease that is over comes back, though its name may have a new holder */
#define MAY_EXTEND(i) true
#else
#define MAY_EXTEND(i) (!over[i])
#endif

inline extend(name, mine) {
    LOCK;
    i = 0;
    do
    :: i == 2 -> break
    :: i < 2 && owner[i] != 0 && MINE(i, name, mine) && MAY_EXTEND(i) ->
        atomic {
            assert(taker[i] == id + 1);
            assert(holder[name] == 0 || holder[name] == id + 1);
            over[i] = false;
            holder[name] = id + 1
        };
        break
    :: else -> i++
    od;
    atomic { UNLOCK; i = 0 }
}

proctype worker(byte id) {
    byte i, outer, inner;

life:
    {
#if PLAN == NESTED
        take(FIRST, outer);
        take(SECOND, inner);
        release(SECOND, inner);
        if
        :: extend(FIRST, outer)
        :: true
        fi;
        release(FIRST, outer);
#elif PLAN == APART
        if
        :: id < 2 ->
            take(FIRST, outer);
            if
            :: extend(FIRST, outer)
            :: true
            fi;
            release(FIRST, outer)
        :: else ->
            take(SECOND, outer);
            release(SECOND, outer)
        fi;
#else
        take(FIRST, outer);
        if
        :: id == 0 -> 
end_hung:   false
        :: else
        fi;
        release(FIRST, outer);
#endif
        goto done
    } unless { state[id] == STOPPED };
    atomic { i = 0; outer = 0; inner = 0; state[id] = RUNNING; goto life };
done:
    state[id] = 0
}

#define FORGET(name, id) if :: holder[name] == id + 1 -> holder[name] = 0 :: else fi
#define STOP(id) \
    if :: state[id] == RUNNING -> state[id] = STOPPED :: else fi; \
    if :: guard == id + 1 -> guard = 0 :: else fi; \
    FORGET(FIRST, id); FORGET(SECOND, id)

proctype world() {
end:
    do
    :: atomic { deaths > 0 && state[0] == RUNNING && state[1] == RUNNING ->
                deaths--; gen[0] = (gen[0] + 1) & 3; STOP(0); STOP(1) }
    :: atomic { deaths > 0 && state[2] == RUNNING -> deaths--; gen[1] = (gen[1] + 1) & 3; STOP(2) }
    :: atomic { ends > 0 && owner[0] != 0 && !over[0] && guard == 0 && MAY_END(0) -> 
                ends--; over[0] = true; holder[hash[0]] = 0 }
    :: atomic { ends > 0 && owner[1] != 0 && !over[1] && guard == 0 && MAY_END(1) -> 
                ends--; over[1] = true; holder[hash[1]] = 0 }
    od
}

init {
    atomic {
        gen[0] = 1; gen[1] = 1;
        state[0] = RUNNING; run worker(0);
        state[1] = RUNNING; run worker(1);
        state[2] = RUNNING; run worker(2);
        run world()
    }
}
