/*
 * System calls that fail now and then: a library to be preloaded under a Python that plays fuzzing programs (faults.py).
 *
 * Nothing fails until faults_arm() is called, and only calls on descriptors that do not block ever do.  What is injected
 * is what a kernel may answer: less than was asked for, "interrupted", "try again", or, of the hard kinds, that something
 * has run out or that a connection is gone.  A call that is made to fail is not made.
 *
 * io_uring's own requests do not come through here; only the call that hands them over does (syscall()).
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef SYS_io_uring_enter
#define SYS_io_uring_enter 426
#endif

/* The kinds of faults; faults.py has the same numbers. */
enum {
    SHORT = 1,        /* less is taken or given than was asked for */
    INTERRUPTED = 2,  /* EINTR */
    AGAIN = 4,        /* EAGAIN, and of io_uring_enter EBUSY */
    ABORTED = 8,      /* accept: ECONNABORTED */
    LOST = 16,        /* hard: ECONNRESET, EPIPE, ETIMEDOUT; of accept EPROTO, EPERM, EHOSTUNREACH */
    RUN_OUT = 32,     /* hard: ENOBUFS, ENOMEM, EMFILE, ENFILE, ENOSPC */
};

static unsigned armed_kinds;
static unsigned armed_per_mille;
static uint64_t armed_seed;
static uint64_t calls;
static uint64_t injected;

void faults_arm(unsigned kinds, unsigned per_mille, unsigned seed)
{
    armed_per_mille = per_mille;
    armed_seed = seed;
    __atomic_store_n(&armed_kinds, kinds, __ATOMIC_RELEASE);
}

/* How many faults there were. */
unsigned long faults_disarm(void)
{
    __atomic_store_n(&armed_kinds, 0, __ATOMIC_RELEASE);
    return (unsigned long)__atomic_exchange_n(&injected, 0, __ATOMIC_RELAXED);
}

/* A number that looks random, the same for the same number of the call (splitmix64). */
static uint64_t chance(void)
{
    uint64_t z = armed_seed + __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED) * 0x9e3779b97f4a7c15ULL;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
}

/* One of the armed kinds among `possible`, if this call is to fail; else 0. */
static unsigned fault(unsigned possible)
{
    unsigned kinds = __atomic_load_n(&armed_kinds, __ATOMIC_ACQUIRE) & possible;
    if (kinds == 0 || chance() % 1000 >= armed_per_mille)
        return 0;
    __atomic_add_fetch(&injected, 1, __ATOMIC_RELAXED);
    unsigned which = (unsigned)(chance() % (unsigned)__builtin_popcount(kinds));
    while (which--)
        kinds &= kinds - 1;
    return kinds & -kinds;
}

static int does_not_block(int fd)
{
    int saved = errno;
    int flags = fcntl(fd, F_GETFL);
    errno = saved;
    return flags >= 0 && (flags & O_NONBLOCK);
}

/* Whether a part of what is asked for will do: not for a message, whose rest would be lost, nor for an eventfd. */
static int is_stream(int fd)
{
    int saved = errno, type = 0;
    socklen_t size = sizeof type;
    struct stat status;
    int stream = getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0
                     ? type == SOCK_STREAM
                     : fstat(fd, &status) == 0 && S_ISFIFO(status.st_mode);
    errno = saved;
    return stream;
}

/* Whoever makes a server that cannot be watched is left with its socket, in asyncio too. */
static int is_listening(int fd)
{
    int saved = errno, listening = 0;
    socklen_t size = sizeof listening;
    getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size);
    errno = saved;
    return listening;
}

static int fail(int error)
{
    errno = error;
    return -1;
}

static int one_of(const int *errors, size_t count)
{
    return errors[chance() % count];
}

#define ONE_OF(...) one_of((const int[]){__VA_ARGS__}, sizeof((const int[]){__VA_ARGS__}) / sizeof(int))

#define NEXT(name) ((__typeof__(&name))next_function(&next_##name, #name))
#define DECLARE_NEXT(name) static void *next_##name

static void *next_function(void **known, const char *name)
{
    void *function = __atomic_load_n(known, __ATOMIC_ACQUIRE);
    if (function == NULL) {
        function = dlsym(RTLD_NEXT, name);
        __atomic_store_n(known, function, __ATOMIC_RELEASE);
    }
    return function;
}

/* The fault of a transfer on `fd`: the error, or 0 with `size` made shorter perhaps. */
static int transfer(int fd, size_t *size, int sends)
{
    if (__atomic_load_n(&armed_kinds, __ATOMIC_RELAXED) == 0 || !does_not_block(fd))
        return 0;
    switch (fault(SHORT | INTERRUPTED | AGAIN | LOST | RUN_OUT)) {
    case SHORT:
        if (*size > 1 && is_stream(fd))
            *size = 1 + chance() % (*size > 5000 ? 5000 : *size - 1);
        return 0;
    case INTERRUPTED:
        return EINTR;
    case AGAIN:
        return EAGAIN;
    case LOST:
        return sends ? ONE_OF(EPIPE, ECONNRESET, ETIMEDOUT) : ONE_OF(ECONNRESET, ETIMEDOUT);
    case RUN_OUT:
        return ONE_OF(ENOBUFS, ENOMEM);
    default:
        return 0;
    }
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Transfers
 * ------------------------------------------------------------------------------------------------------------------ */

DECLARE_NEXT(recv);
ssize_t recv(int fd, void *buffer, size_t size, int flags)
{
    int error = transfer(fd, &size, 0);
    return error ? fail(error) : NEXT(recv)(fd, buffer, size, flags);
}

DECLARE_NEXT(recvfrom);
ssize_t recvfrom(int fd, void *buffer, size_t size, int flags, __SOCKADDR_ARG address, socklen_t *length)
{
    int error = transfer(fd, &size, 0);
    return error ? fail(error) : NEXT(recvfrom)(fd, buffer, size, flags, address, length);
}

DECLARE_NEXT(send);
ssize_t send(int fd, const void *data, size_t size, int flags)
{
    int error = transfer(fd, &size, 1);
    return error ? fail(error) : NEXT(send)(fd, data, size, flags);
}

DECLARE_NEXT(sendto);
ssize_t sendto(int fd, const void *data, size_t size, int flags, __CONST_SOCKADDR_ARG address, socklen_t length)
{
    int error = transfer(fd, &size, 1);
    return error ? fail(error) : NEXT(sendto)(fd, data, size, flags, address, length);
}

DECLARE_NEXT(sendmsg);
ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    size_t size = message->msg_iovlen ? message->msg_iov[0].iov_len : 0;
    size_t shorter = size;
    int error = transfer(fd, &shorter, 1);
    if (error)
        return fail(error);
    if (shorter == size)
        return NEXT(sendmsg)(fd, message, flags);
    struct iovec part = {message->msg_iov[0].iov_base, shorter};
    struct msghdr first = *message;
    first.msg_iov = &part;
    first.msg_iovlen = 1;
    return NEXT(sendmsg)(fd, &first, flags);
}

DECLARE_NEXT(read);
ssize_t read(int fd, void *buffer, size_t size)
{
    int error = is_stream(fd) ? transfer(fd, &size, 0) : 0;
    return error ? fail(error) : NEXT(read)(fd, buffer, size);
}

DECLARE_NEXT(write);
ssize_t write(int fd, const void *data, size_t size)
{
    int error = is_stream(fd) ? transfer(fd, &size, 1) : 0;
    return error ? fail(error) : NEXT(write)(fd, data, size);
}

DECLARE_NEXT(sendfile);
ssize_t sendfile(int to, int from, off_t *offset, size_t size)
{
    int error = transfer(to, &size, 1);
    return error ? fail(error) : NEXT(sendfile)(to, from, offset, size);
}

DECLARE_NEXT(sendfile64);
ssize_t sendfile64(int to, int from, off64_t *offset, size_t size)
{
    int error = transfer(to, &size, 1);
    return error ? fail(error) : NEXT(sendfile64)(to, from, offset, size);
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Accepting, waiting, and io_uring
 * ------------------------------------------------------------------------------------------------------------------ */

DECLARE_NEXT(accept4);
int accept4(int fd, __SOCKADDR_ARG address, socklen_t *length, int flags)
{
    switch (does_not_block(fd) ? fault(INTERRUPTED | AGAIN | ABORTED | LOST | RUN_OUT) : 0) {
    case INTERRUPTED:
        return fail(EINTR);
    case AGAIN:
        return fail(EAGAIN);
    case ABORTED:
        return fail(ECONNABORTED);
    case LOST:
        return fail(ONE_OF(EPROTO, EPERM, EHOSTUNREACH));
    case RUN_OUT:
        return fail(ONE_OF(EMFILE, ENFILE, ENOBUFS, ENOMEM));
    default:
        return NEXT(accept4)(fd, address, length, flags);
    }
}

DECLARE_NEXT(epoll_wait);
int epoll_wait(int fd, struct epoll_event *events, int most, int timeout)
{
    /* A call that does not sleep is not interrupted, and tells of all there is. */
    switch (timeout != 0 ? fault(SHORT | INTERRUPTED) : 0) {
    case SHORT:
        most = 1;
        break;
    case INTERRUPTED:
        return fail(EINTR);
    }
    return NEXT(epoll_wait)(fd, events, most, timeout);
}

DECLARE_NEXT(epoll_ctl);
int epoll_ctl(int epoll, int what, int fd, struct epoll_event *event)
{
    if (what == EPOLL_CTL_ADD && !is_listening(fd) && fault(RUN_OUT))
        return fail(ONE_OF(ENOMEM, ENOSPC));
    return NEXT(epoll_ctl)(epoll, what, fd, event);
}

DECLARE_NEXT(syscall);
long syscall(long number, ...)
{
    long arguments[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++)
        arguments[i] = va_arg(list, long);
    va_end(list);

    if (number == SYS_io_uring_enter)
        switch (fault(SHORT | INTERRUPTED | AGAIN)) {
        case SHORT: /* of several submissions the first only */
            if ((unsigned)arguments[1] > 1)
                arguments[1] = 1;
            break;
        case INTERRUPTED:
            return fail(EINTR);
        case AGAIN:
            return fail(ONE_OF(EAGAIN, EBUSY));
        }
    return NEXT(syscall)(number, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]);
}
