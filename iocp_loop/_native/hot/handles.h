/*
 * The handles of callbacks (handles.c), the heap of those that are timers (timers.c), and what both must see of their loop.
 */
#ifndef IOCP_LOOP_HANDLES_H
#define IOCP_LOOP_HANDLES_H

#include "hot.h"

/* timers.c: the heap of a loop, which owns the references in it.  Zeroed but for `place_offset`, it is empty. */
struct timer {
    double when;
    uint64_t serial; /* of their making */
    PyObject *handle;
};
struct timers {
    struct timer *heap; /* the earliest first */
    size_t count, room;
    uint64_t serial;
    Py_ssize_t place_offset; /* where a handle keeps its place in the heap, see timer_place */
};
#define NOWHERE SIZE_MAX
int timers_add(struct timers *self, PyObject *handle, double when);
/* Take out the one at `place`; its reference goes to the caller. */
PyObject *timers_take(struct timers *self, size_t place);
/* A new list of those of `loop`, the earliest first. */
PyObject *timers_list(PyObject *loop, const struct timers *self);
/* Whether at least two beside the first are due before `end`; may return false negatives. */
int timers_crowded(const struct timers *self, double end);

/* How a loop of ours begins (turns.h). */
struct loop_head {
    PyObject_HEAD
    struct hot *hot;
    struct timers timers;
    PyObject *transport_refs, *forget_transport; /* what is in loop._transports, and what its references call */
    char debug;
};
/* `loop`, borrowed, if it is one of ours; else NULL. */
static inline struct loop_head *own_loop(const struct hot *hot, PyObject *loop)
{
    return PyObject_TypeCheck(loop, hot->Turns_type) ? (struct loop_head *)loop : NULL;
}
/* Whether `loop`, of whatever type, is in debug mode. */
int loop_in_debug(const struct hot *hot, PyObject *loop);

PyObject *handle_new(struct loop_head *loop, PyObject *callback, PyObject *const *args, Py_ssize_t count, PyObject *context);
PyObject *timer_new(struct loop_head *loop, PyObject *when, PyObject *callback, PyObject *const *args, Py_ssize_t count,
                    PyObject *context);
/* For the traverse of the loop that has `handle`; and the end of its having it: gives the reference back. */
int handle_visit(const struct hot *hot, PyObject *handle, visitproc visit, void *arg);
void handle_release(const struct hot *hot, PyObject *handle);
/* Let the garbage collector see `handle` from now on, of whatever type it is. */
void handle_track(const struct hot *hot, PyObject *handle);
int handle_is_cancelled(const struct hot *hot, PyObject *handle);
int handle_run(const struct hot *hot, PyObject *handle);
/* Where it stands in the heap of its loop. */
static inline size_t *timer_place(const struct hot *hot, PyObject *timer)
{
    return (size_t *)((char *)timer + hot->timer_place);
}
void timer_set_scheduled(const struct hot *hot, PyObject *timer, int scheduled);
/* `timer` is being cancelled, or has come into the ready queue: let it leave the heap of `loop`, if it is there. */
void timer_leave(struct loop_head *loop, PyObject *timer);

/* Whether `object` was made by handles.c, whose types have no subclasses. */
static inline int is_own_handle(const struct hot *hot, PyObject *object)
{
    return Py_IS_TYPE(object, hot->Handle_type) || Py_IS_TYPE(object, hot->TimerHandle_type);
}

int add_handles(struct hot *hot);
void free_spare_handles(struct hot *hot);

#endif
