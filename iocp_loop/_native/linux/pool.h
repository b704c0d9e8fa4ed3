/* The pool of buffers that the kernel receives into: setup.c lends them, and uring.c lends them again. */
#ifndef IOCP_LOOP_POOL_H
#define IOCP_LOOP_POOL_H

#include "kernel.h"
#include "uring.h"

#define POOL_GROUP 0

/* Lend buffer `index` of the pool to the kernel; pool_publish makes it known. */
static inline void pool_lend(uring *ring, unsigned index)
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

static inline void pool_publish(struct uring_pool *pool)
{
    STORE(&pool->ring[0].tail, pool->tail);
}

#endif
