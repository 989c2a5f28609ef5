/* The protocol of the bounded and lock-free update modes, for exhaustive search with spin, before the code: how the
 * computing thread hands over gradients, how updating threads claim spans and publish parameter pages, how a commit cuts
 * through both, and the gate of bounded mode.
 *
 * Every statement, `atomic` and `d_step` is one indivisible operation of the code; between any two of them everything
 * else may happen. What an accumulator or a page holds is told by a count of gradients; a page has two halves, written
 * one after the other, so that who reads a page in the making sees halves that differ.
 *
 * Checked: no gradient is lost or applied twice, no page is torn or reused while it is read, staleness is at most
 * BOUND, a commit has each gradient up to its cut once, and (by spin itself) nobody waits for ever.
 *
 *     spin -a -DBOUND=1 -DSTEPS=2 protocol.pml && cc -O2 -DSAFETY -DCOLLAPSE -o pan pan.c && ./pan -m200000
 *
 * That is some 20 million states, 1.1 GB and half a minute. Without the `atomic` around the exchange of a box it ends in
 * a wait for a gradient that was lost.
 */

#ifndef SPANS
#define SPANS 2
#endif
#ifndef WORKERS
#define WORKERS 2
#endif
#ifndef STEPS
#define STEPS 3
#endif
#ifndef BOUND
#define BOUND 1 /* STEPS: no gate, as in lock-free mode */
#endif
#ifndef CUT
#define CUT 1 /* the step after which a commit is made; 0: none */
#endif

/* What the plan counts: a page and a former one that the step reads, for each span, and one in the making per worker. */
#define FRAMES (2 * SPANS + WORKERS)
#define NONE 255

/* Boxes of accumulators, one atomic pointer each. NONE: there is none, or somebody has taken it out. */
byte box[SPANS];
byte produced[SPANS];  /* gradients handed over: by the computing thread */
byte published[SPANS]; /* gradients that the published page has in it */
byte applied[SPANS];   /* the states: gradients that they have in them */

/* The updater's mutex guards `claimed` and `asleep`, nothing else. */
bit mutex;
bit claimed[SPANS];
bit asleep[WORKERS];
bit stopping;

/* A page's word is frame and version, in one atomic. */
byte frame_of[SPANS];
byte version_of[SPANS];
byte references[FRAMES];
bit unused[FRAMES];  /* in the pool */
bit retired[FRAMES]; /* former content: unused as soon as nobody reads it */
byte low[FRAMES];
byte high[FRAMES];

byte cut[SPANS];     /* gradients handed over when the commit began */
bit saved[SPANS];    /* the commit has the span */
bit committing;

inline lock() { atomic { mutex == 0 -> mutex = 1 } }
inline unlock() { mutex = 0 }

inline wake_workers()
{
    lock();
    d_step {
        asleep[0] = 0;
#if WORKERS > 1
        asleep[1] = 0;
#endif
    }
    unlock()
}

/* A frame for the next content: from the pool, or a retired one without readers. Publishers share a lock for it. */
inline take_spare(out)
{
    d_step {
        out = NONE;
        f = 0;
        do
        :: f < FRAMES && out == NONE && (unused[f] || (retired[f] && references[f] == 0)) ->
            out = f;
            unused[f] = 0;
            retired[f] = 0;
            f++
        :: f < FRAMES && !(out == NONE && (unused[f] || (retired[f] && references[f] == 0))) -> f++
        :: f == FRAMES -> break
        od;
        f = 0
    };
    assert(out != NONE);
    assert(out != frame_of[0]);
#if SPANS > 1
    assert(out != frame_of[1]);
#endif
}

proctype Updater(byte me)
{
    byte span, taken, mine, former, f;
    bit found;

sweep:
    lock();
    found = 0;
    span = 0;
    do
    :: span < SPANS ->
        if
        :: !claimed[span] && box[span] != NONE -> /* one read of the box; it may be empty by the next */
            if
            :: found = 1; break /* any order of the sweep */
            :: span++
            fi
        :: else -> span++
        fi
    :: span == SPANS -> break
    od;
    if
    :: found -> claimed[span] = 1; unlock()
    :: !found ->
        /* Nothing, unless it was passed over: then once more. */
        d_step {
            span = 0;
            do
            :: span < SPANS && !found -> found = (!claimed[span] && box[span] != NONE); span++
            :: else -> break
            od
        };
        if
        :: found -> unlock(); goto sweep
        :: else
        fi;
        if
        :: stopping -> unlock(); goto end
        :: else -> atomic { asleep[me] = 1; mutex = 0 }
        fi;
        asleep[me] == 0; /* a condition variable */
        goto sweep
    fi;

    atomic { taken = box[span]; box[span] = NONE };
    if
    :: taken == NONE -> skip
    :: else ->
        applied[span] = applied[span] + taken; /* reads, computes, writes: nobody else has the span */
        take_spare(mine);
        low[mine] = applied[span];
        high[mine] = applied[span];
        atomic { former = frame_of[span]; frame_of[span] = mine; version_of[span] = applied[span] };
        retired[former] = 1;
        published[span] = applied[span]
    fi;
    lock();
    claimed[span] = 0;
    /* Others may have passed the span over meanwhile, and the commit may wait for it. */
    d_step {
        asleep[0] = 0;
#if WORKERS > 1
        asleep[1] = 0;
#endif
    }
    unlock();
    goto sweep;
end:
    skip
}

proctype Commit()
{
    byte span, kept;
    span = 0;
    do
    :: span < SPANS ->
        /* Its update is over and no other begins. */
        do
        :: lock();
            if
            :: !claimed[span] -> claimed[span] = 1; unlock(); break
            :: else -> unlock(); !claimed[span]
            fi
        od;
        atomic { kept = box[span]; box[span] = NONE };
        /* States by reference, the accumulator by a copy. */
        if
        :: kept == NONE -> assert(applied[span] == cut[span])
        :: else -> assert(applied[span] + kept == cut[span]); box[span] = kept
        fi;
        saved[span] = 1;
        lock();
        claimed[span] = 0;
        unlock();
        wake_workers();
        span++
    :: span == SPANS -> break
    od;
    committing = 0
}

proctype Computing()
{
    byte step, span, held[SPANS], version[SPANS], mine;
    step = 1;
    do
    :: step > STEPS -> break
    :: else ->
        /* forward */
        span = 0;
        do
        :: span == SPANS -> break
        :: else ->
            produced[span] - published[span] <= BOUND; /* the gate */
            do
            :: atomic { held[span] = frame_of[span]; version[span] = version_of[span] };
                references[held[span]]++;
                if
                :: atomic { frame_of[span] == held[span] && version_of[span] == version[span] -> break }
                :: else -> references[held[span]]--
                fi
            od;
            assert(low[held[span]] == version[span]);
            assert(high[held[span]] == version[span]);
            assert(produced[span] - version[span] <= BOUND);
            span++
        od;
        /* backward */
        do
        :: span == 0 -> break
        :: else ->
            span--;
            assert(low[held[span]] == version[span]); /* the same content as in forward */
            assert(high[held[span]] == version[span]);
            references[held[span]]--;
            !committing || saved[span]; /* the cut has it */
            atomic { mine = box[span]; box[span] = NONE };
            if
            :: mine == NONE -> mine = 0
            :: else
            fi;
            mine++; /* adds the gradient */
            produced[span]++;
            assert(box[span] == NONE);
            box[span] = mine;
            wake_workers()
        od;
        if
        :: step == CUT ->
            d_step {
                cut[0] = produced[0];
#if SPANS > 1
                cut[1] = produced[1];
#endif
                committing = 1
            };
            run Commit()
        :: else
        fi;
        step++
    od;
    /* drain */
    !committing;
    span = 0;
    do
    :: span == SPANS -> break
    :: else ->
        published[span] == produced[span];
        assert(produced[span] == STEPS);
        assert(applied[span] == STEPS);
        assert(box[span] == NONE);
        span++
    od;
    stopping = 1;
    wake_workers()
}

init
{
    byte i;
    d_step {
        i = 0;
        do
        :: i < SPANS -> box[i] = NONE; frame_of[i] = i; i++
        :: else -> break
        od;
        do
        :: i < FRAMES -> unused[i] = 1; i++
        :: else -> break
        od
    };
    atomic {
        run Computing();
        run Updater(0);
#if WORKERS > 1
        run Updater(1)
#endif
    }
}
