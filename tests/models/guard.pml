/*
 * guard.pml - the `fast` guard: an owner word in shared memory whose holder's life is vouched for by a beacon.
 *
 * N processes each want the guard ROUNDS times. A killer stops any of them at any point, DEATHS times in all,
 * either by death (the kernel applies SEM_UNDO some time later) or by execve (it does not; the next image posts
 * what its predecessor left). A stopped process comes back and takes the first free slot, often its old one.
 *
 * I1  At most one running process is between the taking and the giving back of the word.
 * I2  Nobody uses a shard whose last holder was stopped inside before a recovery of it has run to its end.
 * I3  A wake-up is never lost by the protocol itself: a giver-back who wakes nobody leaves no sleeper behind, unless
 *     somebody else is already on the way or was stopped on the way (the bounded step heals that one). LATE_WAKES
 *     gives this up, for a giver-back that stores where it should exchange: a lost wake-up then costs one step.
 * I4  No process waits for good: the model has no invalid end state; with LIVE it has no non-progress cycle.
 *
 * Not here: weak memory (read_protocol.cpp, scenario handover), several guards (shards share nothing), threads of
 * one process (the word is theirs: they wait as for any living holder), the wrap of the generation after 2^19 claims.
 *
 * A sleeper's bounded step ends whenever the re-check after it would find something new. Ends that would find nothing
 * lead back to the same state and are left out: so a wait for good is a deadlock that a safety run reports. LIVE
 * lets every step end.
 */
#ifndef N
#define N 3
#endif
#ifndef ROUNDS
#define ROUNDS 1
#endif
#ifndef FIRST_ROUNDS
#define FIRST_ROUNDS ROUNDS         /* the first process may come more often than the others */
#endif
#ifndef DEATHS
#define DEATHS 2
#endif
#ifndef QUITS
#define QUITS 1                     /* how many waits may end by their deadline or by a signal, in all */
#endif

#ifdef EXEC_POSTS_NOTHING           /* seeded: a new image leaves its predecessor's beacon alight */
#define SLOTS (N + DEATHS)
#define LOSE(p) image_lost[p] = true
#else
#define SLOTS N
#define LOSE(p) skip
#endif
#define WAITERS 1
#define WORD(s, g) (((s) << 4) | ((g) << 1))
#define SLOT(w) ((w) >> 4)
#define GEN(w) (((w) >> 1) & 7)

#ifdef NO_GENERATION                /* seeded: the owner word is the slot alone */
#define OUTLIVED(w) false
#else
#define OUTLIVED(w) (gen[SLOT(w)] != GEN(w))
#endif
#ifdef STEAL_BY_TIMEOUT             /* seeded: who waited long enough calls the owner dead */
#define DARK(w) true
#else
#define DARK(w) (beacon[SLOT(w)] == 0)
#endif
#ifdef LIVE
#define STEP_ENDS(w) true
#else
#define STEP_ENDS(w) (word != (w) || OUTLIVED(w) || DARK(w) || quits > 0)
#endif

#ifdef LATE_WAKES                   /* I3 is given up: a lost wake-up costs its sleeper one step, which I4 shows */
#define LATE_WAKES_ALLOWED true
#else
#define LATE_WAKES_ALLOWED false
#endif

#define RUNNING 1
#define STOPPED 2
#define ENDED 3

byte word;                          /* slot | generation | waiters; 0 = free */
byte gen[SLOTS];                        /* of each slot; 0 only before the first claim */
byte beacon[SLOTS];                     /* 0 = free, else 1 + the process whose semaphore adjustment holds it */
bool asleep[N];                     /* in the kernel's futex queue */

byte state[N];
bool image_lost[N];                 /* stopped by execve, not by death */
byte deaths = DEATHS;
byte quits = QUITS;

byte holders;                       /* ghosts: they decide nothing */
bool holds[N];
bool broken;                        /* a holder was stopped inside and no recovery has completed */
bool woken[N];                      /* was given a wake-up and has neither used nor passed it on */
bool waking[N];                     /* between giving the word back and waking */
bool excused;                       /* somebody was stopped with a wake-up in hand */

#define ENTER holders++; holds[id] = true; assert(holders == 1)

inline release_beacons(p) {
    if :: beacon[0] == p + 1 -> beacon[0] = 0 :: else fi;
    if :: beacon[1] == p + 1 -> beacon[1] = 0 :: else fi;
#if N > 2
    if :: beacon[2] == p + 1 -> beacon[2] = 0 :: else fi
#endif
}

inline wake_one() {
    if
    :: atomic { asleep[0] -> asleep[0] = false; woken[0] = true }
    :: atomic { asleep[1] -> asleep[1] = false; woken[1] = true }
#if N > 2
    :: atomic { asleep[2] -> asleep[2] = false; woken[2] = true }
#endif
    :: else
    fi
}

#if N > 2
#define NOBODY_ASLEEP (!asleep[0] && !asleep[1] && !asleep[2])
#define WAKE_IN_HAND (woken[0] || woken[1] || woken[2] || waking[0] || waking[1] || waking[2])
#else
#define NOBODY_ASLEEP (!asleep[0] && !asleep[1])
#define WAKE_IN_HAND (woken[0] || woken[1] || waking[0] || waking[1])
#endif

#define LEFT holds[id] = false; holders--; waking[id] = (old & WAITERS); \
    assert((old & WAITERS) || NOBODY_ASLEEP || WAKE_IN_HAND || excused || LATE_WAKES_ALLOWED)

proctype worker(byte id; byte rounds) {
    byte s, me, w, old;
    bool waited, after_death;

    me = WORD(id, 1);               /* init has claimed slot id for the first life */
    goto claimed;

life:
    {
        /* Claim a slot: win its beacon, then raise its generation, then use it. */
#ifdef RAISE_BEFORE_BEACON          /* seeded */
        do
        :: atomic { beacon[s] == 0 -> gen[s] = (gen[s] % 7) + 1; me = WORD(s, gen[s]) };
            if
            :: atomic { beacon[s] == 0 -> beacon[s] = id + 1; s = 0 }; break
            :: else
            fi
        :: atomic { beacon[s] != 0 -> s = (s + 1) % N }
        od;
#else
        atomic {
            do
            :: beacon[s] == 0 -> beacon[s] = id + 1; break
            :: else -> s++
            od
        };
#ifdef NO_GENERATION
        skip;
#elif defined(USE_BEFORE_RAISE)     /* seeded: the slot is used under the generation its last holder had */
        skip;
#else
        gen[s] = gen[s] + 1;
#endif
        atomic { me = WORD(s, gen[s]); s = 0 };
#endif
claimed:
        do
        :: rounds == 0 -> break
        :: rounds > 0 ->
            waited = false;
            after_death = false;
again:      w = word;
            if
            :: w == 0 ->
                atomic {
                    if
                    :: word == 0 ->
#ifdef FORGETS_IT_WAITED            /* seeded: who has waited takes the word without the waiters bit */
                        word = me;
                        woken[id] = false;
#else
                        word = me | waited;
                        if :: waited -> woken[id] = false :: else fi;
#endif
                        w = 0; ENTER; goto inside
                    :: else -> goto again
                    fi
                }
            :: else
            fi;
            if
            :: waited ->
                if
                :: OUTLIVED(w) -> goto take_over
                :: else ->
                    if
                    :: DARK(w) -> goto take_over
                    :: else
                    fi
                fi
            :: else
            fi;
            goto wait;

take_over:
#ifdef TAKE_OVER_BY_STORE           /* seeded: no compare-and-swap */
            atomic { word = me | WAITERS; woken[id] = false; after_death = true; w = 0; ENTER; goto inside };
#elif defined(TAKE_OVER_BY_FREEING) /* seeded: the dead owner's word is cleared, then taken like a free one */
            atomic { if :: word == w -> word = 0 :: else fi; goto again };
#else
            atomic {
                if
                :: word == w ->
#ifdef TAKE_OVER_DROPS_WAITERS      /* seeded */
                    word = me;
#elif defined(TAKE_OVER_KEEPS_ONLY) /* seeded: keeps the bit it finds, forgets that it is a waiter itself */
                    word = me | (w & WAITERS);
#else
                    word = me | WAITERS;
#endif
                    woken[id] = false; after_death = true; w = 0; ENTER; goto inside
                :: else -> goto again
                fi
            };
#endif

wait:
#ifdef QUITS_SILENTLY               /* seeded: gives up, and the wake-up it was given with it */
            if
            :: atomic { waited && quits > 0 -> quits--; woken[id] = false }; rounds--; goto next
            :: true
            fi;
#endif
            if
            :: w & WAITERS
            :: else ->
                atomic {
                    if
                    :: word == w -> w = w | WAITERS; word = w; woken[id] = false
                    :: else -> goto again
                    fi
                }
            fi;
            if                      /* the deadline is looked at after an attempt and with the bit set */
            :: atomic { waited && quits > 0 -> quits--; woken[id] = false }; rounds--; goto next
            :: true
            fi;
            atomic {                /* futex_wait: the kernel compares and queues in one step */
                if
                :: word == w -> asleep[id] = true; woken[id] = false
                :: else -> waited = true; goto again
                fi
            };
            waited = true;
            if
            :: !asleep[id]
#ifndef WAIT_WITHOUT_END            /* seeded: sleeps are not cut into steps */
            :: atomic { asleep[id] && STEP_ENDS(w) -> asleep[id] = false }
#endif
            fi;
            goto again;

inside:     if
            :: after_death ->
#ifndef NO_RECOVERY                 /* seeded */
                skip;               /* recovery under way: a death here leaves the shard broken */
                broken = false;
#endif
                after_death = false
            :: else
            fi;
progress:   assert(!broken);         /* a stop from here on leaves the hard state between two stores */

#ifdef GIVES_BACK_BY_STORE          /* seeded: load, then store, where an exchange is due */
            old = word;
            if
            :: old & WAITERS -> atomic { old = word; word = 0; LEFT }
            :: else -> atomic { word = 0; LEFT }
            fi;
#else
            atomic { old = word; word = 0; LEFT; assert((old & ~WAITERS) == me) };
#endif
            if
            :: old & WAITERS -> wake_one(); waking[id] = false
            :: else
            fi;
            old = 0;
            rounds--;
next:       w = 0; waited = false
        od;
        atomic { state[id] = ENDED; release_beacons(id); me = 0; s = 0 };
        goto done
    } unless { state[id] == STOPPED };

    /* A death: the kernel takes its time, then undoes. An execve: nothing is undone, the next image posts it. */
    atomic {
#ifdef EXEC_POSTS_NOTHING
        if :: image_lost[id] :: else -> release_beacons(id) fi;
#else
        release_beacons(id);
#endif
        s = 0; me = 0; w = 0; old = 0; waited = false; after_death = false; image_lost[id] = false;
        state[id] = RUNNING;
        goto life
    };
done:
    skip
}

inline stop(p) {
    deaths--;
    state[p] = STOPPED;
    if :: holds[p] -> holds[p] = false; holders--; broken = true :: else fi;
    if :: woken[p] || waking[p] -> excused = true :: else fi;
    woken[p] = false;
    waking[p] = false;
    asleep[p] = false
}

/* Each stop is a choice of its own, never the first branch of an `if` that always takes it. */
proctype killer() {
end:
    do
    :: atomic { deaths > 0 && state[0] == RUNNING -> stop(0); LOSE(0) }
#ifndef ONLY_FIRST_STOPS
    :: atomic { deaths > 0 && state[1] == RUNNING -> stop(1); LOSE(1) }
#endif
#if N > 2 && !defined(ONLY_FIRST_STOPS)
    :: atomic { deaths > 0 && state[2] == RUNNING -> stop(2); LOSE(2) }
#endif
    od
}

init {
    atomic {
        beacon[0] = 1; gen[0] = 1; state[0] = RUNNING; run worker(0, FIRST_ROUNDS);
        beacon[1] = 2; gen[1] = 1; state[1] = RUNNING; run worker(1, ROUNDS);
#if N > 2
        beacon[2] = 3; gen[2] = 1; state[2] = RUNNING; run worker(2, ROUNDS);
#endif
        run killer()
    }
}
