/*
 * The turn of driver poll on Linux (epoll.c), as driver uring builds on it (uring.c): what both keep, and the parts of a
 * turn that are the same.
 */
#ifndef IOCP_LOOP_EPOLL_H
#define IOCP_LOOP_EPOLL_H

#include "driver.h"

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
    Driver driver;
    int fd; /* of the epoll instance */
    int quiet_waker; /* the descriptor of the waker, where nobody has to read what was written to it; or -1 */
    PyObject *watches, *fresh;
    struct socket_watch *sockets; /* by descriptor */
    int sockets_room;
    int next, count, looked_at; /* of the events: the next, how many, and how far ahead we have looked */
    char unarmed;    /* the poller is new, as in a forked child: it knows none of the watches */
    size_t expected; /* bytes in a piece, see receive_bytes */
    /* Called after a stream has received so many bytes; NULL where nobody listens.  -1: error. */
    int (*received)(struct EpollTurns *self, PyObject *op, size_t count);
    struct epoll_event events[BATCH];
} EpollTurns;

/* epoll.c.  Take the events that there are, without waiting; the number, or -1 with errno.  `more`: some may hold still when
 * they have been dispatched. */
int epoll_take(EpollTurns *self, int *more);
/* What a wait does first: -1 with an exception; 1: it must not block, or 0. */
int epoll_before_wait(EpollTurns *self);
/* Verbs, which driver uring has too while it has no ring. */
int epoll_wait_for_events(Driver *driver, int64_t limit);
long epoll_gather(Driver *driver, int64_t limit);
int epoll_deliver(Driver *driver);
int epoll_is_behind(Driver *driver);
/* For a subtype's own. */
PyObject *epoll_new(PyTypeObject *type, const struct verbs *verbs);
int epoll_turns_traverse(EpollTurns *self, visitproc visit, void *arg);
int epoll_turns_clear(EpollTurns *self);
void epoll_turns_free(EpollTurns *self);
int add_epoll(struct hot *hot);

/* epoll_watches.c.  The watch of a descriptor, NULL where there is none, or with an exception; and what it has. */
PyObject *watch_of(EpollTurns *self, descriptor fd);
/* The one stream that receives there, or None; the operation that waits there alone, in one direction, or NULL. */
PyObject *watch_stream_of(const struct hot *hot, PyObject *watch);
PyObject *lone_operation(const struct hot *hot, PyObject *watch);
void look_at_watches(EpollTurns *self); /* fetch what the next events will touch */
/* Whatever is not done here: self._dispatch_other(fd, watch, events). */
int epoll_dispatch_other(EpollTurns *self, PyObject *watch, struct epoll_event event);
/* receive_stream(sock, deliver, get_buffer): submit a ReceiveStream on a plain socket on which nothing else waits; None for
 * all else, which is for the way in Python.  The first part makes the operation, which is not in flight yet. */
PyObject *epoll_new_stream(EpollTurns *self, PyObject *const *args, Py_ssize_t count, int *fd);
PyObject *epoll_receive_stream(EpollTurns *self, PyObject *const *args, Py_ssize_t count);
PyObject *epoll_readiness_stream(EpollTurns *self, PyObject *args);
PyObject *cancelled_error(void);
/* Take `op` off the in-flight table and its descriptor out of the poller.  1: done; 0: it is not in flight, or something else
 * waits on that descriptor, which is for the way in Python; -1: error. */
int land_alone(EpollTurns *self, PyObject *op);
PyObject *cancel_alone(EpollTurns *self, PyObject *op);
PyObject *drop_alone(EpollTurns *self, PyObject *op);
PyObject *epoll_busy_method(EpollTurns *self, PyObject *const *args, Py_ssize_t count);
PyObject *use_watch(PyObject *ignored, PyObject *type);
/* Verbs. */
int epoll_submit_receive(Driver *driver, PyObject *op, descriptor fd, size_t size);
int epoll_busy(Driver *driver, descriptor fd, int writing);

/* epoll_waits.c.  Let `op`, a Receive, wait on `fd`, and put it in flight. */
int waits_add(EpollTurns *self, PyObject *op, int fd);
/* The Receive that waits on `fd`, or NULL.  `take`: it does not wait there any more. */
PyObject *waiting_on(EpollTurns *self, int fd, int take);
/* Whether the poller may know `fd` by such a wait. */
int waits_know(EpollTurns *self, int fd);
/* The socket behind `fd` is ready: receive for who waits there. */
int waits_receive(EpollTurns *self, int fd);
void waits_clear(EpollTurns *self);
PyObject *take_socket_wait(EpollTurns *self, PyObject *number);
PyObject *socket_waits(EpollTurns *self, PyObject *ignored);
PyObject *forget_socket_waits(EpollTurns *self, PyObject *ignored);

/* uring.c */
int add_uring(struct hot *hot);

#endif
#endif
