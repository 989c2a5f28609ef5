/* The protocol of the bounded and lock-free update modes, as csrc/update and csrc/pages have it, for exhaustive search
 * with spin: the boxes of gradients, workers that claim spans, take and publish, parameters that are held while new
 * ones come, the gate of bounded mode, a commit and the drain. Functions and variables are named after the code's.
 *
 * A statement, `atomic` or `d_step` is one indivisible operation of the code, with what only its own thread touches
 * just then; between any two of them everything else may happen. Where a mutex is taken or let go of, that goes with
 * the access next to it; all atomics are sequentially consistent, there as here. What accumulators, states and pages
 * hold is told by the set of the gradients in it, one bit for each step, of which there are 7 at most. Each worker has
 * a ring of one span, and each span is a unit of its own. Errors and put_back are left out.
 *
 * Checked: no gradient is lost or applied twice; no page is torn or written to while it is read; forward and backward
 * compute with the same content, which lacks at most BOUND gradients; a commit holds exactly the gradients up to its
 * cut; a publisher never waits for a reader; and (by spin itself) nobody waits for ever.
 *
 *     spin -a protocol.pml && cc -O2 -DSAFETY -DCOLLAPSE -o pan pan.c && ./pan -w24
 *
 * That is 6.6 million states, 0.4 GB and half a minute. Larger: -DBOUND=2 (8.6 million), or
 * -DWORKERS=1 -DSTEPS=4 -DBOUND=1 (17.3 million), or -DSTEPS=3 -DBOUND=1 -DCUT=0 (17.7 million, 0.9 GB, a minute and a
 * half). Smaller ones, and every BREAK, are searched by tests/update/test_protocol.py.
 */

#ifndef SPANS
#define SPANS 2
#endif
#ifndef WORKERS
#define WORKERS 2 /* 1 or 2 */
#endif
#ifndef STEPS
#define STEPS 2
#endif
#ifndef BOUND
#define BOUND 0 /* STEPS: no gate, as in lock-free mode */
#endif
#ifndef CUT
#define CUT 1 /* the step after which a commit is made; 0: none */
#endif
#ifndef OPEN_EMPTY
#define OPEN_EMPTY 0 /* 1: a box is opened when no gradient is left in it, as outside engine.backward */
#endif

/* One deliberate fault, which the search has to find:
 *  1  a worker reads an accumulator and then clears it, without having the box
 *  2  a publisher reuses the former frame without a look at its readers
 *  3  a reader does not look at the page's word again after it has counted itself
 *  4  a gradient is counted as produced when it can be taken already
 *  5  the gate holds a frame first and then reads what is published
 *  6  the updater's threads are notified without its mutex
 *  7  the computing thread opens a box without having captured the span for the commit
 *  8  those who wait for progress are notified without the sweep's mutex
 *  9  there is no spare frame for parameters that are read while new ones come
 * 10  the computing thread waits for a span's updates while it has the box
 * 11  a worker claims a span that another one has
 * 12  an update is counted as published before it is
 * 13  an update is counted as applied before its states are written
 * 14  a publisher looks at the readers before it changes the page's word, and not after */
#ifndef BREAK
#define BREAK 0
#endif

/* What the plan counts: the pages' own, one in the making for each ring slot, and as many spare ones as are read. */
#if BREAK == 9
#define SPARE 0
#else
#define SPARE SPANS
#endif
#define FRAMES (SPANS + WORKERS + SPARE)
#define NONE 255
#define FIRST(count) ((1 << (count)) - 1) /* the gradients of so many steps */

/* Accumulators: a box for each span. */
mtype = { EMPTY, FULL, HELD, BEING_TAKEN };
mtype state[SPANS] = EMPTY;
byte sum[SPANS]; /* what lies in the GRAD pages */
byte gradients[SPANS];

/* Sweep: a tally for each span, and those who wait for progress: the computing thread and the commit's. */
byte produced[SPANS];
byte published[SPANS];
byte applied[SPANS];
bit sweep_mutex;
bit waits[2];

/* Updater: the mutex guards what follows it. A span is claimed from when it has a holder until it is open no more. */
bit mutex;
bit claimed[SPANS];
bit asleep[WORKERS];
bit stopping;
byte states[SPANS];

/* PageTable and HostPool: a page's word is frame and version, which says here what the content should be. */
byte frame[SPANS];
byte version[SPANS];
byte readers[FRAMES];
bit unused[FRAMES];  /* of a ring slot that computes nothing now */
bit retired[FRAMES]; /* former parameters, perhaps still read */
byte low[FRAMES];    /* content: two halves, written one after the other; NONE: may be written to any time */
byte high[FRAMES];

bit committing;
bit saved[SPANS]; /* the commit has the span */

/* Through the mutex: a thread that has seen nothing to do and has it goes to sleep first, and is woken. */
inline on_gradients()
{
    d_step {
#if BREAK != 6
        mutex == 0;
#endif
        notify_workers()
    }
}

inline notify_workers()
{
    asleep[0] = 0;
    asleep[WORKERS - 1] = 0
}

inline progressed()
{
    d_step {
#if BREAK != 8
        sweep_mutex == 0;
#endif
        waits[0] = 0;
        waits[1] = 0
    }
}

/* Sweep::wait. To see that it is not `done` and to go to sleep are two operations under the mutex. */
inline wait(me, done)
{
    do
    :: atomic { sweep_mutex == 0 && (done) -> break }
    :: d_step { sweep_mutex == 0 && !(done) -> sweep_mutex = 1 };
        d_step { waits[me] = 1; sweep_mutex = 0 };
        waits[me] == 0
    od
}

/* `own` becomes a frame that nobody reads: with as many spare ones as there may be readers there always is one. What
 * the code waits for is a reader that goes from one frame to another while these are looked at one by one. */
inline unread()
{
    if
    :: BREAK == 2 || looked || readers[own] == 0 -> looked = 0
    :: else ->
        retired[own] = 1;
        own = 0;
        do
        :: own < FRAMES && !(retired[own] && readers[own] == 0) -> own++
        :: else -> break
        od;
        assert(own < FRAMES);
        retired[own] = 0
    fi
}

#define IS_FREE(span) (!claimed[span] || BREAK == 11)

proctype Worker(byte me)
{
    byte span = NONE, left, has, taken, count, own;
    bit looked; /* BREAK 14: no readers, too early */

take_work:
    if
    :: atomic { mutex == 0 && stopping -> goto end }
    :: atomic { mutex == 0 && !stopping && span != NONE && state[span] == FULL -> goto compute_one }
    :: d_step { mutex == 0 && !stopping && span != NONE && state[span] != FULL -> mutex = 1 };
        if
        :: goto wait_arrived /* the span is expected, and stays */
        :: d_step { claimed[span] = 0; span = NONE; has = 0 } /* drop_ahead */
        fi
    :: d_step { mutex == 0 && !stopping && span == NONE -> mutex = 1 }
    fi;
    /* Sweep::next: in any order, one box after the other. */
    atomic { left = SPANS; select(span : 0 .. SPANS - 1) };
    do
    :: atomic {
            left > 0 && state[span] == FULL && IS_FREE(span) ->
            claimed[span] = 1;
            left = 0;
            has = states[span]; /* start: nobody writes to them meanwhile */
            mutex = 0;
            goto compute_one
        }
    :: d_step { left > 0 && !(state[span] == FULL && IS_FREE(span)) -> left--; span = (span + 1) % SPANS }
    :: atomic { left == 0 -> span = NONE; break }
    od;
wait_arrived:
    atomic { asleep[me] = 1; mutex = 0 };
    atomic { asleep[me] == 0 -> goto take_work };

compute_one:
    /* Accumulators::take. */
#if BREAK == 1
    if
    :: d_step { state[span] == FULL -> taken = sum[span]; count = gradients[span] }
    :: atomic { state[span] != FULL -> goto take_work }
    fi;
    d_step { state[span] == FULL -> sum[span] = 0; gradients[span] = 0; state[span] = EMPTY };
#else
    if
    :: d_step {
            state[span] == FULL ->
            state[span] = BEING_TAKEN;
            taken = sum[span];
            sum[span] = 0;
            count = gradients[span];
            gradients[span] = 0
        }
    :: atomic { state[span] != FULL -> goto take_work }
    fi;
    state[span] = EMPTY;
#endif
    progressed(); /* sooner for who waits for an empty box, whom what follows would wake too */
    /* compute, into a frame of its own: any, since it is all the same whose slot of a ring it belongs to. */
    d_step {
        assert((has & taken) == 0);
        has = has | taken;
        taken = 0;
        do
        :: !unused[own] -> own++
        :: else -> break
        od;
        unused[own] = 0;
        low[own] = has
    };
    high[own] = has;
#if BREAK == 12
    published[span] = published[span] + count;
#endif
#if BREAK == 14
    looked = (readers[frame[span]] == 0);
#endif
    /* Sweep::publish; from here on `own` is the former frame. */
    d_step {
        left = frame[span];
        frame[span] = own;
        version[span] = has;
        own = left;
        left = 0
    };
#if BREAK != 12
    published[span] = published[span] + count;
#endif
    progressed();
    d_step {
        assert(published[span] <= produced[span]);
        unread();
        unused[own] = 1;
        low[own] = NONE;
        high[own] = NONE;
        own = 0
    };
#if BREAK == 13
    applied[span] = applied[span] + count;
    progressed();
#endif
    d_step { mutex == 0 -> states[span] = has; claimed[span] = 0; has = 0 }; /* write, and finish */
#if BREAK != 13
    applied[span] = applied[span] + count;
    progressed();
#endif
    atomic { count = 0; span = NONE; notify_workers(); goto take_work };
end:
    skip
}

/* Whoever comes first has the commit's lock. */
inline capture(me)
{
    wait(me, applied[span] >= CUT);
    atomic {
        assert(saved[span] || states[span] == FIRST(CUT));
        assert(saved[span] || (low[frame[span]] == FIRST(CUT) && high[frame[span]] == FIRST(CUT)));
        saved[span] = 1
    }
}

proctype Commit()
{
    byte span;

    do
    :: span < SPANS -> capture(1); span++
    :: else -> break
    od;
    committing = 0
}

inline hold()
{
    do
    :: d_step { held[span] = frame[span]; content[span] = version[span] };
        readers[held[span]]++;
        if
        :: BREAK == 3 || (frame[span] == held[span] && version[span] == content[span]) -> break
        :: else -> release()
        fi
    od
}

inline release() { d_step { readers[held[span]]--; held[span] = 0; content[span] = 0 } }

inline open()
{
#if OPEN_EMPTY
    wait(0, state[span] == EMPTY);
    state[span] = HELD
#else
    atomic { state[span] == EMPTY || state[span] == FULL -> state[span] = HELD }
#endif
}

proctype Computing()
{
    byte step = 1, span, seen;
    byte held[SPANS], content[SPANS]; /* HeldFrame: frame and version */

    do
    :: step > STEPS -> break
    :: else ->
        /* Forward. */
        do
        :: span < SPANS ->
#if BREAK == 5
            hold();
            seen = published[span];
#else
            seen = published[span];
            hold();
#endif
            if
            :: produced[span] - seen <= BOUND
            :: else ->
                wait(0, produced[span] - published[span] <= BOUND); /* it still holds the former ones */
                release();
                hold()
            fi;
            seen = 0;
            atomic {
                assert(low[held[span]] == content[span] && high[held[span]] == content[span]);
                assert(((FIRST(produced[span]) >> BOUND) & ~content[span]) == 0);
                span++
            }
        :: else -> break
        od;
        /* Backward, in the other direction. */
        do
        :: span > 0 ->
            span--;
            assert(low[held[span]] == content[span] && high[held[span]] == content[span]);
            release();
#if BREAK == 10
            open();
#endif
#if CUT && BREAK != 7
            if
            :: step == CUT + 1 -> capture(0)
            :: else
            fi;
#endif
#if BREAK != 10
            open();
#endif
            /* The gradient goes to the pages, and Sweep::hand_over follows. */
            sum[span] = sum[span] | (1 << (step - 1));
#if BREAK != 4
            produced[span]++;
#endif
            d_step { gradients[span]++; state[span] = FULL };
#if BREAK == 4
            produced[span]++;
#endif
            on_gradients()
        :: else -> break
        od;
#if CUT
        if
        :: step == CUT -> committing = 1; run Commit()
        :: else
        fi;
#endif
        step++
    od;
    /* The drain. */
    do
    :: span < SPANS ->
        wait(0, applied[span] == produced[span]);
        assert(states[span] == FIRST(STEPS) && state[span] == EMPTY);
        span++
    :: else -> break
    od;
    committing == 0;
    d_step { mutex == 0 -> stopping = 1; notify_workers() }
}

init
{
    byte i;

    d_step {
        do
        :: i < FRAMES ->
            if
            :: i < SPANS -> frame[i] = i
            :: else ->
                unused[i] = (i < SPANS + WORKERS);
                retired[i] = !unused[i];
                low[i] = NONE;
                high[i] = NONE
            fi;
            i++
        :: else -> break
        od;
        i = 0
    };
    atomic {
        run Computing();
        run Worker(0);
#if WORKERS > 1
        run Worker(1)
#endif
    }
}
