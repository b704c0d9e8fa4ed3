/* uring_server: the same echo server as epoll_server, on io_uring: what a completion port can cost at the least.
 *
 * One thread, one ring, raw system calls.  The listener has one multishot accept in flight, each connection one
 * multishot receive; what arrives is put by the kernel into a ring of provided buffers that all connections share.  An
 * answer is sent from that very buffer.  Small ones are queued, so that all answers of a turn go in with the one
 * system call that also waits for the next completions; one of EAGER bytes or more is tried at once, as the copy is
 * then what costs.
 *
 * Who owns what: a connection has at most one send in flight, and a queue of segments behind it, in the order of
 * arrival.  A provided buffer goes back to the kernel when the kernel has no more use for it (Linux 6.12 fills one
 * buffer from many receives) and no segment points into it.  A receive that found no buffer ends with ENOBUFS and
 * loses nothing; it is armed again when a buffer has gone back.  A connection is freed when neither its receive nor
 * a send is in flight.
 *
 * Needs Linux 6.1.  See io_uring_setup(2), io_uring_enter(2), io_uring_register(2), io_uring_setup_buf_ring(3),
 * io_uring_prep_recv_multishot(3), https://man7.org/linux/man-pages/man7/io_uring.7.html.
 *
 * It prints "listening PORT" (or PATH) when it accepts, and serves until a signal ends it.  With --check it only makes
 * the rings, and tells by its exit status whether it could.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/io_uring.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "listen.h"

/* Newer than the headers of many systems: see io_uring_setup_buf_ring(3) and the kernel's linux/io_uring.h. */
#define BUFFER_RING_INCREMENTAL 2
#define CQE_BUFFER_MORE (1u << 4)

struct buffer_registration {
    uint64_t ring_addr;
    uint32_t ring_entries;
    uint16_t group, flags;
    uint64_t reserved[3];
};

#define ENTRIES 4096
#define COMPLETIONS 65536
#define GROUP 1
#define EAGER (32 * 1024)

enum kind { RECEIVE, SEND, ACCEPT, KINDS_MASK = 3 }; /* the low bits of user_data; the rest is the connection */

struct segment {
    const char *bytes;
    size_t length;
    unsigned buffer;
    struct segment *next;
};

struct connection {
    int fd;
    bool receiving, sending, lost;
    struct segment *first, **last;
    struct connection *next_starved;
};

static int ring_fd, listener;
static unsigned *sq_head, *sq_tail, sq_mask, *cq_head, *cq_tail, cq_mask, sq_local, unsubmitted;
static struct io_uring_sqe *sqes;
static struct io_uring_cqe *cqes;

/* With incremental buffers few large ones, as the ring is a queue and all of it passes through the cache. */
static unsigned buffer_count = 16, buffer_size = 256 * 1024;
static bool incremental = true;
static struct io_uring_buf_ring *buffers;
static char *memory;
static struct {
    unsigned filled;   /* bytes that the kernel has put in */
    unsigned segments; /* that point into it */
    bool kernels;      /* the kernel may put in more */
} *states;
static unsigned with_kernel; /* buffers that it may fill */
static struct connection *starved;
static struct segment *spare;

static void fail(const char *what)
{
    fprintf(stderr, "uring_server: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* ---- the ring ------------------------------------------------------------------------------------------------- */

static void give_buffer(unsigned number)
{
    unsigned short tail = buffers->tail;
    struct io_uring_buf *entry = &buffers->bufs[tail & (buffer_count - 1)];
    entry->addr = (uintptr_t)(memory + (size_t)number * buffer_size);
    entry->len = buffer_size;
    entry->bid = (unsigned short)number;
    states[number].filled = 0;
    states[number].kernels = true;
    with_kernel++;
    __atomic_store_n(&buffers->tail, (unsigned short)(tail + 1), __ATOMIC_RELEASE);
}

static void *map(size_t size, int flags, int fd, off_t offset)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, offset);
    if (memory == MAP_FAILED)
        fail("mmap");
    return memory;
}

static int register_buffers(void)
{
    struct buffer_registration registration = {
        .ring_addr = (uintptr_t)buffers,
        .ring_entries = buffer_count,
        .group = GROUP,
        .flags = incremental ? BUFFER_RING_INCREMENTAL : 0,
    };
    return (int)syscall(SYS_io_uring_register, ring_fd, IORING_REGISTER_PBUF_RING, &registration, 1);
}

static void make_ring(void)
{
    struct io_uring_params params = {
        .flags = IORING_SETUP_CQSIZE | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
        .cq_entries = COMPLETIONS,
    };
    ring_fd = (int)syscall(SYS_io_uring_setup, ENTRIES, &params);
    if (ring_fd < 0)
        fail("io_uring_setup");
    size_t sq_size = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    size_t cq_size = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    char *rings = map(sq_size > cq_size ? sq_size : cq_size, MAP_SHARED | MAP_POPULATE, ring_fd, IORING_OFF_SQ_RING);
    sqes = map(params.sq_entries * sizeof *sqes, MAP_SHARED | MAP_POPULATE, ring_fd, (off_t)IORING_OFF_SQES);
    sq_head = (unsigned *)(rings + params.sq_off.head);
    sq_tail = (unsigned *)(rings + params.sq_off.tail);
    sq_mask = params.sq_entries - 1;
    cq_head = (unsigned *)(rings + params.cq_off.head);
    cq_tail = (unsigned *)(rings + params.cq_off.tail);
    cq_mask = params.cq_entries - 1;
    cqes = (struct io_uring_cqe *)(rings + params.cq_off.cqes);
    for (unsigned i = 0; i < params.sq_entries; i++)
        ((unsigned *)(rings + params.sq_off.array))[i] = i;

    buffers = map(1024 * sizeof(struct io_uring_buf), MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (register_buffers()) {
        incremental = false;
        buffer_count = 512;
        buffer_size = 16 * 1024;
        if (register_buffers())
            fail("a ring of provided buffers");
    }
    memory = map((size_t)buffer_count * buffer_size, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    states = calloc(buffer_count, sizeof *states);
    if (!states)
        fail("memory");
    for (unsigned i = 0; i < buffer_count; i++)
        give_buffer(i);
}

/* Hand over what was queued, and wait for so many completions. */
static void enter(unsigned wait)
{
    __atomic_store_n(sq_tail, sq_local, __ATOMIC_RELEASE);
    long submitted = syscall(SYS_io_uring_enter, ring_fd, unsubmitted, wait, IORING_ENTER_GETEVENTS, NULL, 0);
    if (submitted >= 0)
        unsubmitted -= (unsigned)submitted;
    else if (errno != EINTR && errno != EBUSY && errno != EAGAIN)
        fail("io_uring_enter");
}

static struct io_uring_sqe *submission(int opcode, int fd, struct connection *connection, enum kind kind)
{
    while (sq_local - __atomic_load_n(sq_head, __ATOMIC_ACQUIRE) > sq_mask)
        enter(0);
    struct io_uring_sqe *sqe = &sqes[sq_local++ & sq_mask];
    unsubmitted++;
    *sqe = (struct io_uring_sqe){.opcode = (uint8_t)opcode, .fd = fd, .user_data = (uintptr_t)connection | kind};
    return sqe;
}

/* ---- connections ---------------------------------------------------------------------------------------------- */

static void receive(struct connection *connection)
{
    struct io_uring_sqe *sqe = submission(IORING_OP_RECV, connection->fd, connection, RECEIVE);
    sqe->ioprio = IORING_RECV_MULTISHOT;
    sqe->flags = IOSQE_BUFFER_SELECT;
    sqe->buf_group = GROUP;
    connection->receiving = true;
}

static void release_if_unused(unsigned number)
{
    if (states[number].kernels || states[number].segments)
        return;
    give_buffer(number);
    while (starved) { /* each will take what it finds, and line up again if it finds nothing */
        struct connection *connection = starved;
        starved = connection->next_starved;
        receive(connection);
    }
}

static void pop(struct connection *connection)
{
    struct segment *segment = connection->first;
    connection->first = segment->next;
    if (!connection->first)
        connection->last = &connection->first;
    states[segment->buffer].segments--;
    release_if_unused(segment->buffer);
    segment->next = spare;
    spare = segment;
}

static void free_if_over(struct connection *connection)
{
    if (connection->receiving || connection->sending || !connection->lost)
        return;
    while (connection->first)
        pop(connection);
    close(connection->fd);
    free(connection);
}

static void send_first(struct connection *connection)
{
    struct segment *segment = connection->first;
    struct io_uring_sqe *sqe = submission(IORING_OP_SEND, connection->fd, connection, SEND);
    sqe->addr = (uintptr_t)segment->bytes;
    sqe->len = (unsigned)segment->length;
    sqe->msg_flags = MSG_NOSIGNAL | MSG_WAITALL;
    connection->sending = true;
}

/* Answer with what has arrived in a provided buffer. */
static void answer(struct connection *connection, unsigned number, const char *bytes, size_t length)
{
    if (length >= EAGER && !connection->first) {
        ssize_t sent = send(connection->fd, bytes, length, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent > 0) {
            bytes += sent;
            length -= (size_t)sent;
        }
        if (!length)
            return;
    }
    struct segment *segment = spare;
    if (segment)
        spare = segment->next;
    else if (!(segment = malloc(sizeof *segment)))
        fail("memory");
    *segment = (struct segment){.bytes = bytes, .length = length, .buffer = number};
    states[number].segments++;
    *connection->last = segment;
    connection->last = &segment->next;
    if (!connection->sending)
        send_first(connection);
}

static void on_received(struct connection *connection, int result, unsigned flags)
{
    if (flags & IORING_CQE_F_BUFFER) {
        unsigned number = flags >> IORING_CQE_BUFFER_SHIFT;
        const char *bytes = memory + (size_t)number * buffer_size + states[number].filled;
        if (!(incremental && flags & CQE_BUFFER_MORE)) {
            states[number].kernels = false;
            with_kernel--;
        }
        if (result > 0) {
            states[number].filled += (unsigned)result;
            answer(connection, number, bytes, (size_t)result);
        }
        release_if_unused(number);
    }
    if (flags & IORING_CQE_F_MORE)
        return;
    connection->receiving = false;
    if (result == -ENOBUFS && !with_kernel) {
        connection->receiving = true; /* as good as: it is in the list of those that wait for a buffer */
        connection->next_starved = starved;
        starved = connection;
    } else if (result > 0 || result == -ENOBUFS) {
        receive(connection);
    } else {
        connection->lost = true;
        free_if_over(connection);
    }
}

static void on_sent(struct connection *connection, int result)
{
    struct segment *segment = connection->first;
    connection->sending = false;
    if (result <= 0) {
        connection->lost = true;
        shutdown(connection->fd, SHUT_RDWR); /* its receive ends by this */
        free_if_over(connection);
        return;
    }
    segment->bytes += result;
    segment->length -= (size_t)result;
    if (!segment->length)
        pop(connection);
    if (connection->first && !connection->lost)
        send_first(connection);
    free_if_over(connection);
}

static void accept_on(void)
{
    submission(IORING_OP_ACCEPT, listener, NULL, ACCEPT)->ioprio = IORING_ACCEPT_MULTISHOT;
}

static void on_accepted(int fd, unsigned flags)
{
    int on = 1;
    if (!(flags & IORING_CQE_F_MORE))
        accept_on();
    if (fd < 0)
        return;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); /* refused, and without need, on a UNIX socket */
    struct connection *connection = calloc(1, sizeof *connection);
    if (!connection) {
        close(fd);
        return;
    }
    connection->fd = fd;
    connection->last = &connection->first;
    receive(connection);
}

int main(int argc, char **argv)
{
    struct listening where = parse(argc, argv, "uring_server", false);
    make_ring();
    if (where.check)
        return 0;
    listener = start_listening(&where, 0); /* blocking: an accept of the ring waits either way */
    if (listener < 0)
        fail("listen");
    accept_on();
    for (;;) {
        enter(1);
        unsigned head = *cq_head, tail = __atomic_load_n(cq_tail, __ATOMIC_ACQUIRE);
        for (; head != tail; head++) {
            struct io_uring_cqe cqe = cqes[head & cq_mask];
            struct connection *connection = (struct connection *)(uintptr_t)(cqe.user_data & ~(uint64_t)KINDS_MASK);
            switch ((enum kind)(cqe.user_data & KINDS_MASK)) {
            case RECEIVE: on_received(connection, cqe.res, cqe.flags); break;
            case SEND: on_sent(connection, cqe.res); break;
            default: on_accepted(cqe.res, cqe.flags);
            }
        }
        __atomic_store_n(cq_head, head, __ATOMIC_RELEASE);
    }
}
