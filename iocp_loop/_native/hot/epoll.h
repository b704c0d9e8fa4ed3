/*
 * The turn of driver poll on Linux (epoll.c), as driver uring builds on it (uring.c): what both keep, and the parts of a
 * turn that are the same.
 */
#ifndef IOCP_LOOP_EPOLL_H
#define IOCP_LOOP_EPOLL_H

#include "hot.h"

#ifdef __linux__

#include <sys/epoll.h>

enum { BATCH = 1024 };

/* A socket that sock_recv waits for.  It is registered EPOLLONESHOT: what comes while nobody waits is told to nobody, even
 * where the registration can't be taken back (a socket that was closed here stays registered while another process has
 * it).  Each wait arms it again, which fails where the number means another file by now. */
struct socket_watch {
    PyObject *op; /* the Receive that waits, or NULL */
    char registered;
};

typedef struct EpollTurns {
    PyObject_HEAD
    int fd; /* of the epoll instance */
    PyObject *watches, *fresh, *in_flight, *submissions, *ready, *before_sleep;
    struct socket_watch *sockets; /* by descriptor */
    int sockets_room;
    unsigned long long waits, completions, tokens;
    int next, count, looked_at; /* of the events: the next, how many, and how far ahead we have looked */
    char sleeping;
    char unarmed;    /* the poller is new, as in a forked child: it knows none of the watches */
    int contended;   /* remaining iterations with GIL contention, see block */
    size_t expected; /* bytes in a piece, see receive_bytes */
    size_t delivered; /* bytes in this dispatch */
    /* Called after a stream has received so many bytes; NULL where nobody listens.  -1: error. */
    int (*received)(struct EpollTurns *self, PyObject *op, size_t count);
    struct epoll_event events[BATCH];
} EpollTurns;

extern PyTypeObject *EpollTurns_type;

/* Take the events that there are, without waiting; the number, or -1 with errno.  `more`: some may hold still when they
 * have been dispatched. */
int epoll_take(EpollTurns *self, int *more);
/* The wait of driver poll. */
int epoll_turn_wait(PyObject *driver, double seconds);
/* What a wait does first: -1 with an exception; 1: it must not block, or 0. */
int epoll_before_wait(EpollTurns *self);
int epoll_must_not_sleep(EpollTurns *self);
/* Deliver the events that were taken, up to DELIVER_MOST bytes in this dispatch. */
int epoll_deliver(EpollTurns *self);
int epoll_drain_ready(EpollTurns *self);
/* receive_stream(sock, deliver, get_buffer): submit a ReceiveStream on a plain socket on which nothing else waits; None for all
 * else, which is for the way in Python.  The first part makes the operation, which is not in flight yet. */
PyObject *epoll_new_stream(EpollTurns *self, PyObject *const *args, Py_ssize_t count, int *fd);
PyObject *cancelled_error(void);
PyObject *epoll_receive_stream(EpollTurns *self, PyObject *const *args, Py_ssize_t count);
/* For the table of native drivers. */
int epoll_submit_receive(PyObject *driver, PyObject *op, descriptor fd, size_t size);
int epoll_busy(PyObject *driver, descriptor fd, int writing);
/* For a subtype's own. */
int epoll_turns_traverse(EpollTurns *self, visitproc visit, void *arg);
int epoll_turns_clear(EpollTurns *self);
void epoll_turns_free(EpollTurns *self);
PyObject *wait_with(PyObject *self, PyObject *timeout, int (*wait)(PyObject *, double));

#endif
#endif
