/*
 * What the native turns of all drivers share: how each begins, its counters, the wait as somebody whom others can wake, the
 * dispatch, and what its types have for the garbage collector and for Python.  A driver brings its own verbs.
 */
#ifndef IOCP_LOOP_DRIVER_H
#define IOCP_LOOP_DRIVER_H

#include "hot.h"

typedef struct driver Driver;

/* What each driver does in its own way. */
struct verbs {
    /* A turn's wait: at most `limit` ns, negative for ever.  0; 1 if something is known to have been gathered; -1. */
    int (*wait)(Driver *self, int64_t limit);
    /* Its one system call, as wait_as_sleeper makes it: without the GIL unless `limit` is 0.  How much was gathered, 0 if
     * there is nothing, or negative if it has failed. */
    long (*gather)(Driver *self, int64_t limit);
    /* Whether there is something to do that a wait must not sleep over, beside what all drivers look at. */
    int (*has_work)(Driver *self);
    /* Deliver what was gathered, or as much of it as a dispatch takes. */
    int (*deliver)(Driver *self);
    /* What a dispatch ends with; NULL: nothing. */
    int (*hand_over)(Driver *self);
    /* Whether something that was gathered has not been delivered. */
    int (*is_behind)(Driver *self);
    /* Submit a Receive operation.  1: it is in flight; 0: the driver can't take it this way, which with `op` NULL is only
     * asked; -1: error. */
    int (*submit_receive)(Driver *self, PyObject *op, descriptor fd, size_t size);
    /* Whether an earlier operation of that direction waits on `fd`, which is to be served first; -1: error. */
    int (*busy)(Driver *self, descriptor fd, int writing);
    /* Where the request is the attempt, submit_receive is only asked, and this receives for the new Receive `op`.  Bytes;
     * None if it is in flight now; NULL without an exception if the driver can't take it this way. */
    PyObject *(*receive)(Driver *self, PyObject *op, descriptor fd, size_t size, size_t *expected);
    int look_costs; /* a wait of 0 s is a system call even if there is nothing; then the loop asks less often */
};

struct driver {
    PyObject_HEAD
    const struct verbs *verbs;
    struct hot *hot;
    PyObject *in_flight, *submissions, *ready, *before_sleep;
    unsigned long long waits, completions, tokens;
    size_t delivered; /* bytes in this dispatch */
    int contended;    /* remaining iterations with GIL contention, see block */
    char sleeping;
};

/* `driver` if its turn is in C, and its method `wait` is ours: an object that has another in its place is not for the short
 * way.  Borrowed; NULL if not. */
Driver *native_driver(const struct hot *hot, PyObject *driver);

/* The turn, by way of the verbs.  Seconds; negative: for ever. */
int driver_wait(Driver *self, double seconds);
int driver_dispatch(Driver *self);

/* For the verb `wait`: gather at most `limit` ns, as somebody whom others can wake.  `*result` is what `gather` says. */
int wait_as_sleeper(Driver *self, int64_t limit, long *result);

/* For the verb `deliver`: what was called for one completion has raised.  -1 if that ends the loop; else it is reported, and
 * reaches nobody else. */
int driver_go_on(Driver *self);

/* The bookkeeping of a submission and of the last completion, as Driver._launch and _land do it in Python. */
int launch(Driver *self, PyObject *op);
int land(Driver *self, PyObject *op);

/* self.METHOD(op), or without `op`, whatever it returns. */
int driver_call(Driver *self, PyObject *method, PyObject *op);

/* For the types of the drivers.  First, what `type`, one of them or a class in Python above it, belongs to. */
struct hot *driver_hot(PyTypeObject *type);
PyObject *driver_new(PyTypeObject *type, const struct verbs *verbs);
int driver_traverse(Driver *self, visitproc visit, void *arg);
int driver_clear(Driver *self);
/* The end of a dealloc. */
void driver_free(Driver *self);
int add_driver(struct hot *hot);

#endif
