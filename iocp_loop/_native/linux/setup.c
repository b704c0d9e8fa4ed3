/* Opening and closing a ring; see uring.h for the interface. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "pool.h"

#include <stdlib.h>
#include <sys/mman.h>

#define SQ_ENTRIES 256
#define CQ_ENTRIES 4096 /* multishot requests complete more often than they are submitted */

/* Few large buffers where the kernel fills them bit by bit, many small ones where it spends one per receive. */
#define POOL_COUNT_INCREMENTAL 16
#define POOL_COUNT 256
#define POOL_MEMORY (1U << 20)
#define POOL_MAPPED (POOL_MEMORY + POOL_COUNT * sizeof(struct uring_buffer)) /* with the queue that lends them */

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
    ring->memory = map_private(POOL_MAPPED);
    if (ring->memory != NULL)
        pool->ring = (struct uring_buffer *)(ring->memory + POOL_MEMORY); /* whole pages lie before it */
    ring->spent = calloc(POOL_COUNT, sizeof(uint16_t));
    pool->filled = calloc(POOL_COUNT_INCREMENTAL, sizeof(uint32_t));
    if (ring->memory == NULL || ring->spent == NULL || pool->filled == NULL)
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

static int set_up(uring *ring, int check, int *step)
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
    if (check && has_opcodes(ring->fd) < 0)
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
    if (set_up(ring, flags & URING_CHECK, step) < 0) {
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
    if (!keep_memory && ring->memory != NULL)
        munmap(ring->memory, POOL_MAPPED);
    free_structure(ring);
}

void uring_abandon(uring *ring)
{
    free_structure(ring);
}
