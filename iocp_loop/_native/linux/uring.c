/*
 * Submitting to io_uring, and waiting in it, by raw system calls; see uring.h for the interface and ports/uring/driver.py for
 * the whole picture.
 *
 * The two queues are rings in memory shared with the kernel.  We write submissions (SQEs) and advance the submission
 * queue's tail; the kernel advances its head.  The kernel writes completions (CQEs) and advances the completion queue's
 * tail; we advance its head.  Whoever advances an index stores it with release order, whoever reads the other's loads it
 * with acquire order.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "pool.h"

#include <poll.h>
#include <sys/socket.h>

/* From here on recv into one hot buffer is no dearer than a walk through the pool, measured with 100 connections.  With a
 * thousand, a batch of larger pieces empties the pool, and what found no buffer is asked for again. */
#define BIG_RECEIVE (4 << 10)

/* How often a wait goes back to the kernel for work that it deferred: a busy ring must not keep the loop from turning. */
#define MORE_ENTERS 8

/* ---------------------------------------------------------------------------------------------------------------------
 * Submitting
 * ------------------------------------------------------------------------------------------------------------------ */

static void lock(uring *ring)
{
    if (ring->shared)
        pthread_mutex_lock(&ring->lock);
}

static void unlock(uring *ring)
{
    if (ring->shared)
        pthread_mutex_unlock(&ring->lock);
}

/* How many submissions the kernel has not taken yet; shows it all of them. */
static unsigned show_queued(uring *ring)
{
    STORE(ring->sq_tail, ring->tail);
    return ring->tail - LOAD(ring->sq_head);
}

static int submit_locked(uring *ring)
{
    unsigned queued = show_queued(ring);
    if (queued == 0)
        return 0;
    int count = sys_enter(ring->fd, queued, 0, 0, NULL, 0);
    return count < 0 ? count : 0;
}

int uring_submit(uring *ring)
{
    lock(ring);
    int result = submit_locked(ring);
    unlock(ring);
    return result;
}

int uring_settle(uring *ring)
{
    int result = sys_enter(ring->fd, show_queued(ring), 0, ENTER_GETEVENTS, NULL, 0);
    for (int more = 0; result >= 0 && more < MORE_ENTERS && LOAD(ring->sq_flags) & SQ_TASKRUN; more++)
        result = sys_enter(ring->fd, 0, 0, ENTER_GETEVENTS, NULL, 0);
    return result < 0 ? result : 0;
}

/* Append a submission.  Where the queue is full, the kernel takes it in first. */
static int push_locked(uring *ring, const struct uring_sqe *sqe)
{
    if (ring->tail - LOAD(ring->sq_head) >= ring->sq_entries) {
        int result = submit_locked(ring);
        if (result < 0)
            return result;
        if (ring->tail - LOAD(ring->sq_head) >= ring->sq_entries)
            return -EBUSY;
    }
    ring->sqes[ring->tail & ring->sq_mask] = *sqe;
    ring->tail++;
    return 0;
}

static int push(uring *ring, const struct uring_sqe *sqe)
{
    lock(ring);
    int result = push_locked(ring, sqe);
    unlock(ring);
    return result;
}

static uint64_t address_of(const void *pointer)
{
    return (uint64_t)(uintptr_t)pointer;
}

/* The field for poll events is 32 bits wide; its halves stand in the order that little-endian machines have. */
static uint32_t poll_bits(uint32_t events)
{
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return events << 16 | events >> 16;
#else
    return events;
#endif
}

int uring_prep_receive_stream(uring *ring, int fd, uint64_t token)
{
    struct uring_sqe sqe = {
        .opcode = OP_RECV,
        .flags = SQE_BUFFER_SELECT,
        .ioprio = RECV_MULTISHOT,
        .fd = fd,
        .user_data = token,
        .buffer_group = POOL_GROUP,
    };
    return push(ring, &sqe);
}

static int prep_file(uring *ring, uint8_t opcode, int fd, uint64_t token, const void *data, uint32_t size, int64_t offset)
{
    struct uring_sqe sqe = {
        .opcode = opcode,
        .fd = fd,
        .offset = (uint64_t)offset,
        .addr = address_of(data),
        .len = size,
        .user_data = token,
    };
    return push(ring, &sqe);
}

int uring_prep_read(uring *ring, int fd, uint64_t token, void *data, uint32_t size, int64_t offset)
{
    return prep_file(ring, OP_READ, fd, token, data, size, offset);
}

int uring_prep_write(uring *ring, int fd, uint64_t token, const void *data, uint32_t size, int64_t offset)
{
    return prep_file(ring, OP_WRITE, fd, token, data, size, offset);
}

int uring_cancel(uring *ring, uint64_t token)
{
    struct uring_sqe sqe = {
        .opcode = OP_ASYNC_CANCEL,
        .flags = SQE_CQE_SKIP_SUCCESS,
        .fd = -1,
        .addr = token,
        .user_data = URING_TOKEN_NONE,
    };
    int result = 0;
    lock(ring);
    for (unsigned i = LOAD(ring->sq_head); i != ring->tail; i++) {
        struct uring_sqe *queued = &ring->sqes[i & ring->sq_mask];
        if (queued->user_data == token) {
            /* Its descriptor may be closed, and its number taken again, before the kernel looks: let it do nothing. */
            *queued = (struct uring_sqe){.opcode = OP_NOP, .flags = SQE_CQE_SKIP_SUCCESS, .fd = -1};
            result = 1;
            break;
        }
    }
    if (result == 0)
        result = push_locked(ring, &sqe);
    unlock(ring);
    return result;
}

int uring_cancel_all(uring *ring)
{
    struct uring_sqe sqe = {
        .opcode = OP_ASYNC_CANCEL, .fd = -1, .op_flags = CANCEL_ALL | CANCEL_ANY, .user_data = URING_TOKEN_NONE};
    return push(ring, &sqe);
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Waiting
 * ------------------------------------------------------------------------------------------------------------------ */

/* Give back the buffers of the last batch: their bytes have been copied by now. */
static void recycle(uring *ring)
{
    if (ring->spent_count == 0)
        return;
    for (unsigned i = 0; i < ring->spent_count; i++)
        pool_lend(ring, ring->spent[i]);
    ring->spent_count = 0;
    pool_publish(&ring->pool);
}

/* Note that a completion used the buffer `id`; returns where in `memory` its bytes begin. */
static size_t take_buffer(uring *ring, unsigned id, size_t size, uint32_t flags)
{
    struct uring_pool *pool = &ring->pool;
    size_t start = (size_t)id * pool->size;

    if (pool->incremental) {
        /* The kernel does not say where in the buffer it wrote: right behind what it wrote before. */
        start += pool->filled[id];
        pool->filled[id] += (uint32_t)size;
        if (flags & CQE_BUFFER_MORE)
            return start;
    }
    ring->spent[ring->spent_count++] = (uint16_t)id;
    return start;
}

/* Move completions from the queue to the batch. */
static int gather(uring *ring)
{
    unsigned head = *ring->cq_head, tail = LOAD(ring->cq_tail);
    int count = 0;

    for (; head != tail && count < URING_BATCH; head++) {
        struct uring_cqe cqe = ring->cqes[head & ring->cq_mask];
        if (cqe.user_data == URING_TOKEN_NONE)
            continue;
        if (cqe.user_data == URING_TOKEN_WAKE) {
            if (!(cqe.flags & CQE_MORE))
                ring->wake_armed = 0;
            continue;
        }
        if (cqe.user_data == URING_TOKEN_EVENTS) {
            if (!(cqe.flags & CQE_MORE))
                ring->epoll_armed = 0;
            ring->events_hold = 1;
            continue;
        }
        uint32_t flags = cqe.flags & CQE_MORE ? URING_MORE : 0;
        int64_t result = cqe.res, start = 0;
        if (cqe.flags & CQE_BUFFER) {
            unsigned id = cqe.flags >> CQE_BUFFER_SHIFT;
            if (result > 0) {
                flags |= URING_DATA | (result >= BIG_RECEIVE ? URING_BIG : 0);
                start = (int64_t)take_buffer(ring, id, (size_t)result, cqe.flags);
                result += start;
            } else if (!ring->pool.incremental) {
                take_buffer(ring, id, 0, cqe.flags);
            }
        }
        ring->token[count] = cqe.user_data;
        ring->result[count] = result;
        ring->start[count] = start;
        ring->flags[count] = flags;
        count++;
    }
    STORE(ring->cq_head, head);
    ring->count = count;
    if (count > 0)
        ring->serial++;
    return count;
}

/* Ask for a completion each time that `fd` becomes readable; whether that is queued.  Nobody reads the eventfd: the poll
 * tells of each write, whatever the count. */
static int arm_poll(uring *ring, int fd, uint64_t token)
{
    struct uring_sqe sqe = {
        .opcode = OP_POLL_ADD,
        .fd = fd,
        .len = POLL_ADD_MULTI,
        .op_flags = poll_bits(POLLIN),
        .user_data = token,
    };
    return push_locked(ring, &sqe) == 0;
}

int uring_wait(uring *ring, int64_t timeout_ns, uint64_t taken)
{
    if (taken != ring->serial)
        return ring->count;
    recycle(ring);

    int result = 0;
    lock(ring);
    if (!ring->wake_armed && ring->wake_fd >= 0)
        ring->wake_armed = arm_poll(ring, ring->wake_fd, URING_TOKEN_WAKE);
    if (!ring->epoll_armed && ring->epoll_fd >= 0)
        ring->epoll_armed = arm_poll(ring, ring->epoll_fd, URING_TOKEN_EVENTS);
    unsigned queued = show_queued(ring);
    if (ring->shared && queued > 0) {
        /* Others may submit while we sleep, so this is not done together with the sleep. */
        result = sys_enter(ring->fd, queued, 0, 0, NULL, 0);
        queued = 0;
    }
    unlock(ring);

    int empty = *ring->cq_head == LOAD(ring->cq_tail);
    int block = empty && timeout_ns != 0;
    int pending = (LOAD(ring->sq_flags) & (SQ_TASKRUN | SQ_CQ_OVERFLOW)) != 0;
    if (queued > 0 || block || pending) {
        struct kernel_timespec limit = {.seconds = timeout_ns / 1000000000, .nanoseconds = timeout_ns % 1000000000};
        struct enter_argument argument = {.timespec = timeout_ns > 0 ? address_of(&limit) : 0};
        result = sys_enter(ring->fd, queued, block ? 1 : 0, ENTER_GETEVENTS | ENTER_EXT_ARG, &argument,
                           sizeof(argument));
        /* One enter runs some 20 pieces of deferred work and no more.  Another call is cheap beside another turn of the
         * loop, so fetch the rest. */
        for (int more = 0; result >= 0 && more < MORE_ENTERS && LOAD(ring->sq_flags) & SQ_TASKRUN; more++)
            sys_enter(ring->fd, 0, 0, ENTER_GETEVENTS, NULL, 0);
    }
    int count = gather(ring);
    if (count > 0 || result >= 0)
        return count;
    switch (-result) {
    case ETIME:  /* the time is up */
    case EINTR:  /* a signal: the caller runs its handlers */
    case EAGAIN: /* short of memory for requests: they stay queued */
    case EBUSY:  /* too many completions: they have been gathered now */
        return 0;
    default:
        return result;
    }
}

int64_t uring_cookie(int fd)
{
    uint64_t cookie;
    socklen_t size = sizeof(cookie);
    return getsockopt(fd, SOL_SOCKET, SO_COOKIE, &cookie, &size) < 0 ? -errno : (int64_t)cookie;
}
