/*
 * io_uring by raw system calls; see uring.h for the interface and ports/uring/driver.py for the whole picture.
 *
 * The kernel's structures and constants are declared here under our own names, so that this builds with any kernel
 * headers, or none.  They are the kernel's binary interface, as the manual pages io_uring_setup(2), io_uring_enter(2),
 * io_uring_register(2), io_uring_register_buf_ring(3), io_uring_setup_buf_ring(3) and io_uring_prep_recv_multishot(3)
 * describe it (https://man7.org/linux/man-pages/man7/io_uring.7.html).
 *
 * The two queues are rings in memory shared with the kernel.  We write submissions (SQEs) and advance the submission
 * queue's tail; the kernel advances its head.  The kernel writes completions (CQEs) and advances the completion queue's
 * tail; we advance its head.  Whoever advances an index stores it with release order, whoever reads the other's loads it
 * with acquire order.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "uring.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The same numbers on every architecture but Alpha, whose headers have them. */
#ifndef SYS_io_uring_setup
#define SYS_io_uring_setup 425
#endif
#ifndef SYS_io_uring_enter
#define SYS_io_uring_enter 426
#endif
#ifndef SYS_io_uring_register
#define SYS_io_uring_register 427
#endif

/* ---------------------------------------------------------------------------------------------------------------------
 * The kernel's interface
 * ------------------------------------------------------------------------------------------------------------------ */

/* A submission.  Names that the manuals use for one operation only stand in the comments. */
struct uring_sqe {
    uint8_t opcode;
    uint8_t flags; /* SQE_* */
    uint16_t ioprio; /* multishot flag of receive */
    int32_t fd;
    uint64_t offset; /* addr2: the length of connect's address */
    uint64_t addr;
    uint32_t len;
    uint32_t op_flags; /* msg_flags, poll32_events, cancel_flags */
    uint64_t user_data;
    uint16_t buffer_group;
    uint16_t personality;
    int32_t file_index;
    uint64_t addr3;
    uint64_t reserved;
};

/* A completion. */
struct uring_cqe {
    uint64_t user_data;
    int32_t res;
    uint32_t flags; /* CQE_*; the upper half is the number of the picked buffer */
};

struct sq_offsets {
    uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved;
    uint64_t user_addr;
};

struct cq_offsets {
    uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved;
    uint64_t user_addr;
};

struct setup_params {
    uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, reserved[3];
    struct sq_offsets sq_off;
    struct cq_offsets cq_off;
};

/* One entry of a ring of provided buffers; the ring's tail is kept in `tail` of the first. */
struct uring_buffer {
    uint64_t addr;
    uint32_t len;
    uint16_t id;
    uint16_t tail;
};

struct buffer_registration {
    uint64_t ring_addr;
    uint32_t ring_entries;
    uint16_t group;
    uint16_t flags;
    uint64_t reserved[3];
};

struct enter_argument {
    uint64_t sigmask;
    uint32_t sigmask_size;
    uint32_t min_wait_us;
    uint64_t timespec;
};

struct kernel_timespec {
    int64_t seconds;
    int64_t nanoseconds;
};

struct probe_entry {
    uint8_t opcode;
    uint8_t reserved;
    uint16_t flags;
    uint32_t reserved2;
};

#define PROBE_ENTRIES 256

struct probe {
    uint8_t last_opcode;
    uint8_t entries_count;
    uint16_t reserved;
    uint32_t reserved2[3];
    struct probe_entry entries[PROBE_ENTRIES];
};

_Static_assert(sizeof(struct uring_sqe) == 64, "the kernel's size of a submission");
_Static_assert(sizeof(struct uring_cqe) == 16, "the kernel's size of a completion");
_Static_assert(sizeof(struct setup_params) == 120, "the kernel's size of io_uring_params");
_Static_assert(sizeof(struct uring_buffer) == 16, "the kernel's size of io_uring_buf");
_Static_assert(sizeof(struct buffer_registration) == 40, "the kernel's size of io_uring_buf_reg");
_Static_assert(sizeof(struct enter_argument) == 24, "the kernel's size of io_uring_getevents_arg");

enum {
    OP_NOP = 0,
    OP_POLL_ADD = 6,
    OP_ASYNC_CANCEL = 14,
    OP_READ = 22,
    OP_WRITE = 23,
    OP_RECV = 27,
};

/* io_uring_setup(2) */
#define SETUP_CQSIZE (1U << 3)
#define SETUP_CLAMP (1U << 4)
#define SETUP_SUBMIT_ALL (1U << 7)
#define SETUP_TASKRUN_FLAG (1U << 9)
#define SETUP_SINGLE_ISSUER (1U << 12) /* Linux 6.0 */
#define SETUP_DEFER_TASKRUN (1U << 13) /* Linux 6.1 */

#define FEATURE_SINGLE_MMAP (1U << 0)
#define FEATURE_NODROP (1U << 1)
#define FEATURE_RW_CUR_POS (1U << 3)
#define FEATURE_FAST_POLL (1U << 5)
#define FEATURE_EXT_ARG (1U << 8)
#define FEATURE_CQE_SKIP (1U << 11)
#define FEATURES_NEEDED                                                                                               \
    (FEATURE_SINGLE_MMAP | FEATURE_NODROP | FEATURE_RW_CUR_POS | FEATURE_FAST_POLL | FEATURE_EXT_ARG |               \
     FEATURE_CQE_SKIP)

#define MMAP_RINGS 0ULL
#define MMAP_SQES 0x10000000ULL

/* io_uring_enter(2) */
#define ENTER_GETEVENTS (1U << 0)
#define ENTER_EXT_ARG (1U << 3)

#define SQ_CQ_OVERFLOW (1U << 1)
#define SQ_TASKRUN (1U << 2)

#define SQE_BUFFER_SELECT (1U << 5)
#define SQE_CQE_SKIP_SUCCESS (1U << 6)

#define RECV_MULTISHOT (1U << 1)
#define POLL_ADD_MULTI (1U << 0)
#define CANCEL_ALL (1U << 0)
#define CANCEL_ANY (1U << 2)

#define CQE_BUFFER (1U << 0)
#define CQE_MORE (1U << 1)
#define CQE_BUFFER_MORE (1U << 4) /* Linux 6.12 */
#define CQE_BUFFER_SHIFT 16

/* io_uring_register(2) */
#define REGISTER_PROBE 8
#define REGISTER_BUFFER_RING 22
#define BUFFER_RING_INCREMENTAL 2 /* Linux 6.12 */
#define PROBE_SUPPORTED (1U << 0)

static int sys_setup(unsigned entries, struct setup_params *params)
{
    return (int)syscall(SYS_io_uring_setup, entries, params);
}

static int sys_enter(int fd, unsigned submit, unsigned wait, unsigned flags, void *argument, size_t size)
{
    int count = (int)syscall(SYS_io_uring_enter, fd, submit, wait, flags, argument, size);
    return count < 0 ? -errno : count;
}

static int sys_register(int fd, unsigned opcode, void *argument, unsigned count)
{
    return (int)syscall(SYS_io_uring_register, fd, opcode, argument, count);
}

#define LOAD(pointer) __atomic_load_n((pointer), __ATOMIC_ACQUIRE)
#define STORE(pointer, value) __atomic_store_n((pointer), (value), __ATOMIC_RELEASE)

/* ---------------------------------------------------------------------------------------------------------------------
 * Sizes
 * ------------------------------------------------------------------------------------------------------------------ */

#define SQ_ENTRIES 256
#define CQ_ENTRIES 4096 /* multishot requests complete more often than they are submitted */

/* Few large buffers where the kernel fills them bit by bit, many small ones where it spends one per receive. */
#define POOL_GROUP 0
#define POOL_COUNT_INCREMENTAL 16
#define POOL_COUNT 256
#define POOL_MEMORY (1U << 20)

/* From here on recv into one hot buffer is no dearer than a walk through the pool, measured with 100 connections.  With a
 * thousand, a batch of larger pieces empties the pool, and what found no buffer is asked for again. */
#define BIG_RECEIVE (4 << 10)

/* How often a wait goes back to the kernel for work that it deferred: a busy ring must not keep the loop from turning. */
#define MORE_ENTERS 8

/* ---------------------------------------------------------------------------------------------------------------------
 * Opening and closing
 * ------------------------------------------------------------------------------------------------------------------ */

static void *map_private(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    /* A child must not see memory that the kernel writes to on behalf of the parent. */
    madvise(memory, size, MADV_DONTFORK);
    return memory;
}

static void *map_ring(int fd, size_t size, uint64_t offset)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, (off_t)offset);
    if (memory == MAP_FAILED)
        return NULL;
    madvise(memory, size, MADV_DONTFORK);
    return memory;
}

static int map_queues(uring *ring, const struct setup_params *params)
{
    size_t sq_size = params->sq_off.array + params->sq_entries * sizeof(uint32_t);
    size_t cq_size = params->cq_off.cqes + params->cq_entries * sizeof(struct uring_cqe);

    ring->rings_size = sq_size > cq_size ? sq_size : cq_size;
    ring->rings = map_ring(ring->fd, ring->rings_size, MMAP_RINGS);
    ring->sqes_size = params->sq_entries * sizeof(struct uring_sqe);
    ring->sqes = map_ring(ring->fd, ring->sqes_size, MMAP_SQES);
    if (ring->rings == NULL || ring->sqes == NULL)
        return -1;

    char *base = ring->rings;
    ring->sq_head = (unsigned *)(base + params->sq_off.head);
    ring->sq_tail = (unsigned *)(base + params->sq_off.tail);
    ring->sq_flags = (unsigned *)(base + params->sq_off.flags);
    ring->sq_entries = params->sq_entries;
    ring->sq_mask = params->sq_entries - 1;
    ring->tail = *ring->sq_tail;
    ring->cq_head = (unsigned *)(base + params->cq_off.head);
    ring->cq_tail = (unsigned *)(base + params->cq_off.tail);
    ring->cq_mask = params->cq_entries - 1;
    ring->cqes = (struct uring_cqe *)(base + params->cq_off.cqes);

    /* The queue holds indices of submissions.  Ours are always in order, so that this is said once and for all. */
    unsigned *array = (unsigned *)(base + params->sq_off.array);
    for (unsigned i = 0; i < params->sq_entries; i++)
        array[i] = i;
    return 0;
}

static int has_opcodes(int fd)
{
    static const uint8_t needed[] = {OP_NOP, OP_POLL_ADD, OP_ASYNC_CANCEL, OP_READ, OP_WRITE, OP_RECV};
    struct probe *probe = calloc(1, sizeof(struct probe));
    if (probe == NULL)
        return -1;
    int result = sys_register(fd, REGISTER_PROBE, probe, PROBE_ENTRIES);
    for (size_t i = 0; result == 0 && i < sizeof(needed); i++) {
        if (needed[i] > probe->last_opcode || !(probe->entries[needed[i]].flags & PROBE_SUPPORTED)) {
            errno = EOPNOTSUPP;
            result = -1;
        }
    }
    free(probe);
    return result;
}

/* Lend buffer `index` of the pool to the kernel; pool_publish makes it known. */
static void pool_lend(uring *ring, unsigned index)
{
    struct uring_pool *pool = &ring->pool;
    struct uring_buffer *entry = &pool->ring[pool->tail & (pool->count - 1)];
    entry->addr = (uint64_t)(uintptr_t)(ring->memory + (size_t)index * pool->size);
    entry->len = pool->size;
    entry->id = (uint16_t)index;
    pool->tail++;
    if (pool->incremental)
        pool->filled[index] = 0;
}

static void pool_publish(struct uring_pool *pool)
{
    STORE(&pool->ring[0].tail, pool->tail);
}

static int pool_register(uring *ring, unsigned count, int incremental)
{
    struct uring_pool *pool = &ring->pool;
    pool->count = count;
    pool->size = POOL_MEMORY / count;
    pool->incremental = incremental;
    struct buffer_registration registration = {
        .ring_addr = (uint64_t)(uintptr_t)pool->ring,
        .ring_entries = count,
        .group = POOL_GROUP,
        .flags = incremental ? BUFFER_RING_INCREMENTAL : 0,
    };
    if (sys_register(ring->fd, REGISTER_BUFFER_RING, &registration, 1) < 0)
        return -1;
    for (unsigned index = 0; index < count; index++)
        pool_lend(ring, index);
    pool_publish(pool);
    return 0;
}

static int lend_memory(uring *ring, int *step)
{
    struct uring_pool *pool = &ring->pool;

    *step = URING_STEP_MEMORY;
    ring->memory_size = POOL_MEMORY;
    ring->memory = map_private(ring->memory_size);
    ring->pool_ring_size = POOL_COUNT * sizeof(struct uring_buffer);
    pool->ring = map_private(ring->pool_ring_size);
    ring->spent = calloc(POOL_COUNT, sizeof(uint16_t));
    pool->filled = calloc(POOL_COUNT_INCREMENTAL, sizeof(uint32_t));
    if (ring->memory == NULL || pool->ring == NULL || ring->spent == NULL || pool->filled == NULL)
        return -1;

    *step = URING_STEP_BUFFERS;
    if (ring->incremental) {
        if (pool_register(ring, POOL_COUNT_INCREMENTAL, 1) == 0)
            return 0;
        if (errno != EINVAL)
            return -1;
        ring->incremental = 0; /* the flag is unknown */
    }
    return pool_register(ring, POOL_COUNT, 0);
}

static int set_up(uring *ring, int *step)
{
    struct setup_params params = {
        .cq_entries = CQ_ENTRIES,
        .flags = SETUP_CQSIZE | SETUP_CLAMP | SETUP_SUBMIT_ALL,
    };
    if (!ring->shared)
        params.flags |= SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN | SETUP_TASKRUN_FLAG;

    *step = URING_STEP_SETUP;
    ring->fd = sys_setup(SQ_ENTRIES, &params); /* close-on-exec by nature */
    if (ring->fd < 0)
        return -1;
    *step = URING_STEP_FEATURES;
    if ((params.features & FEATURES_NEEDED) != FEATURES_NEEDED) {
        errno = EOPNOTSUPP;
        return -1;
    }
    *step = URING_STEP_OPCODES;
    if (has_opcodes(ring->fd) < 0)
        return -1;
    *step = URING_STEP_MEMORY;
    if (map_queues(ring, &params) < 0)
        return -1;
    return lend_memory(ring, step);
}

uring *uring_open(int flags, int wake_fd, int epoll_fd, int *step)
{
    *step = URING_STEP_MEMORY;
    uring *ring = calloc(1, sizeof(*ring));
    if (ring == NULL)
        return NULL;
    ring->fd = -1;
    ring->shared = (flags & URING_SHARED) != 0;
    ring->incremental = !(flags & URING_PLAIN);
    ring->wake_fd = wake_fd;
    ring->epoll_fd = epoll_fd;
    pthread_mutex_init(&ring->lock, NULL);
    if (set_up(ring, step) < 0) {
        int error = errno;
        uring_close(ring, 0);
        errno = error;
        return NULL;
    }
    return ring;
}

static void free_structure(uring *ring)
{
    if (ring->fd >= 0)
        close(ring->fd);
    pthread_mutex_destroy(&ring->lock);
    free(ring->spent);
    free(ring->pool.filled);
    free(ring);
}

void uring_close(uring *ring, int keep_memory)
{
    if (ring->sqes != NULL)
        munmap(ring->sqes, ring->sqes_size);
    if (ring->rings != NULL)
        munmap(ring->rings, ring->rings_size);
    if (!keep_memory) {
        if (ring->pool.ring != NULL)
            munmap(ring->pool.ring, ring->pool_ring_size);
        if (ring->memory != NULL)
            munmap(ring->memory, ring->memory_size);
    }
    free_structure(ring);
}

void uring_abandon(uring *ring)
{
    free_structure(ring);
}

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

int uring_prep_read(uring *ring, int fd, uint64_t token, void *data, uint32_t size, int64_t offset)
{
    struct uring_sqe sqe = {
        .opcode = OP_READ,
        .fd = fd,
        .offset = (uint64_t)offset,
        .addr = address_of(data),
        .len = size,
        .user_data = token,
    };
    return push(ring, &sqe);
}

int uring_prep_write(uring *ring, int fd, uint64_t token, const void *data, uint32_t size, int64_t offset)
{
    struct uring_sqe sqe = {
        .opcode = OP_WRITE,
        .fd = fd,
        .offset = (uint64_t)offset,
        .addr = address_of(data),
        .len = size,
        .user_data = token,
    };
    return push(ring, &sqe);
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
