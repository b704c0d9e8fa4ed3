/*
 * One io_uring instance, for the driver in ports/uring/driver.py.
 *
 * The functions return 0 or a count, or a negative errno; they never touch Python.  setup.c opens and closes
 * a ring, uring.c submits and waits.
 */
#ifndef IOCP_LOOP_URING_H
#define IOCP_LOOP_URING_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

/* At most so many completions come out of one uring_wait. */
#define URING_BATCH 1024

/* What `flags` of a completion says. */
#define URING_MORE 1 /* the request goes on: more completions will follow */
#define URING_DATA 2 /* received bytes lie in `memory` from `start` to `result` */
#define URING_BIG 4  /* with URING_DATA: so many bytes that copying out of the pool is the slow way */

/* A piece below so many bytes is a small one.  After so many in a row of them, or of big ones, a stream changes its way
 * of receiving; ports/uring/driver.py tells. */
#define URING_SMALL 2048
#define URING_IN_A_ROW 4

/* The shortest wait that is not 0, ns: to wake once for the timers of so long a time is cheaper than to wake for each.  It
 * is a fifth of the millisecond in which epoll, and so most other loops, count. */
#define URING_SHORTEST_NS 200000

/* The tokens that operations can't have.  Their completions are consumed here. */
#define URING_TOKEN_NONE 0
#define URING_TOKEN_WAKE UINT64_MAX
#define URING_TOKEN_EVENTS (UINT64_MAX - 1)

/* What uring_open is asked for. */
#define URING_SHARED 1 /* any thread may use the ring; see uring_open */
#define URING_PLAIN 2  /* no incremental buffers, as before Linux 6.12 */
#define URING_CHECK 4  /* see whether the kernel has all operations; once in a process is enough */

/* Where uring_open stopped. */
enum uring_step {
    URING_STEP_SETUP,    /* io_uring_setup refused */
    URING_STEP_FEATURES, /* it worked, but the kernel lacks a feature */
    URING_STEP_OPCODES,  /* ... or an operation, or io_uring_register refused to tell */
    URING_STEP_MEMORY,   /* malloc or mmap failed */
    URING_STEP_BUFFERS,  /* the provided buffers were refused */
};

/* A set of buffers lent to the kernel, which picks one when data come. */
struct uring_pool {
    struct uring_buffer *ring; /* shared with the kernel */
    unsigned count;                 /* a power of two */
    unsigned size;                  /* bytes in each */
    uint16_t tail;                  /* what was last stored in the shared tail */
    int incremental;                /* the kernel fills a buffer in several receives */
    uint32_t *filled;               /* if so: how far each is filled, bytes */
};

typedef struct uring {
    int fd;

    /* The batch that uring_wait gathered: parallel arrays. */
    uint64_t token[URING_BATCH];
    int64_t result[URING_BATCH]; /* as the kernel gives it; with URING_DATA the end of the data in `memory` */
    int64_t start[URING_BATCH];  /* with URING_DATA the start of the data in `memory`, else 0 */
    uint32_t flags[URING_BATCH];
    int count;       /* how many */
    uint64_t serial; /* the number of the batch; it grows with each that is not empty */

    char *memory; /* where received bytes lie */
    size_t memory_size;
    int incremental; /* 1 where the kernel has incremental buffers (Linux 6.12) */

    int events_hold; /* the epoll instance may have events to tell; whoever takes them says whether some are left */

    /* private */

    int shared; /* several threads submit: `lock` guards the submission queue */
    pthread_mutex_t lock;

    int wake_fd;
    int wake_armed;
    int epoll_fd; /* an epoll instance, whose events end a wait too; -1: none */
    int epoll_armed;

    /* The mapped queues; see io_uring(7). */
    void *rings;
    size_t rings_size;
    struct uring_sqe *sqes;
    size_t sqes_size;
    unsigned *sq_head, *sq_tail, *sq_flags;
    unsigned sq_entries, sq_mask;
    unsigned tail; /* of the submission queue, not yet shown to the kernel */
    unsigned *cq_head, *cq_tail;
    unsigned cq_mask;
    struct uring_cqe *cqes;

    struct uring_pool pool;
    uint16_t *spent; /* numbers of the buffers in the batch that go back to the kernel with the next wait */
    unsigned spent_count;
} uring;

/*
 * Make a ring.  It is bound to the calling thread (io_uring_enter from another gives EEXIST), which makes it much
 * cheaper; with URING_SHARED every thread can use it.  `wake_fd` is an eventfd; writing to it ends a uring_wait.  So does
 * an event of the epoll instance `epoll_fd`.  Either may be -1.  NULL on failure, with errno set and *step telling where.
 */
uring *uring_open(int flags, int wake_fd, int epoll_fd, int *step);

/* Free the ring.  The kernel then cancels what is in flight, in its own time; `keep_memory` leaves `memory` mapped. */
void uring_close(uring *ring, int keep_memory);

/* In a forked child, where the ring's memory is not mapped: close the descriptor, free the structure. */
void uring_abandon(uring *ring);

/*
 * The one call of a turn.  Gives the spent buffers of the last batch back, submits what is queued, waits until there is
 * a completion (at most `timeout_ns`; 0 not at all; negative without limit) and gathers a batch.  Returns its size,
 * which may be 0; -EEXIST in a thread that the ring does not belong to, once there is nothing left to gather.
 *
 * `taken` is the serial of the last batch that the caller took.  If a batch got lost on the way (a signal's exception
 * struck the caller just after the call), the same batch comes again.
 *
 * `events_hold` is set when the epoll instance has news.  It tells of changes only: whoever finds events there asks again
 * before the next wait that blocks, until there are none.
 */
int uring_wait(uring *ring, int64_t timeout_ns, uint64_t taken);

/* Submit what is queued, without waiting. */
int uring_submit(uring *ring);

/*
 * Submit what is queued and let the kernel see to it, deferred work included: a request that is cancelled by it lets go
 * of its file.  The completions stay in the ring for the next wait.  Not for a shared ring.
 */
int uring_settle(uring *ring);

/*
 * Queue a request; if the queue is full, submit first.  0 or a negative errno (then nothing was queued).
 * What a pointer points to must live until the last completion with this token.
 */
int uring_prep_receive_stream(uring *ring, int fd, uint64_t token);
int uring_prep_read(uring *ring, int fd, uint64_t token, void *data, uint32_t size, int64_t offset);
int uring_prep_write(uring *ring, int fd, uint64_t token, const void *data, uint32_t size, int64_t offset);

/*
 * Ask for the end of the request with this token.  1: it had not been submitted, and never will be; no completion will
 * come.  0: the kernel will be asked.
 */
int uring_cancel(uring *ring, uint64_t token);

/* Ask for the end of everything. */
int uring_cancel_all(uring *ring);

/* What tells a socket from every other one since the system was started (SO_COOKIE); a negative errno if there is none. */
int64_t uring_cookie(int fd);

#endif
