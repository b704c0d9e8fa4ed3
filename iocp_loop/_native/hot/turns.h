/*
 * A loop: what its ready queue (ready.c), the scheduling of callbacks (schedule.c), its futures and tasks (tasks.c) and its
 * turn (turns.c) share.
 */
#ifndef IOCP_LOOP_TURNS_H
#define IOCP_LOOP_TURNS_H

#include "driver.h"
#include "handles.h"

typedef struct {
    struct loop_head head;
    PyObject **ring;
    size_t first, count, room; /* room is a power of two, or 0 */
    double resolution; /* of the clock, seconds: a timer that is due within it is due */
    PyObject *driver, *wait, *dispatch;
    PyObject *completions; /* the handle that stands for them */
    PyObject *select;      /* a replacement of the wait, or NULL */
    Driver *native; /* `driver`, or NULL: call its methods */
    PyObject *task_factory;
    char closed, stopping, waited;
    unsigned long runner; /* the thread that is in a turn, where there is no GIL; 0: none */
    int fruitless;    /* looks for completions in a row, in turns that had something to run, that found none */
    int64_t looked_at; /* when the last of them was, ns */
} Turns;

/* ready.c.  Put a handle at the end, taking over its reference, also when it fails; take the first, NULL if there is none. */
int ready_push(Turns *self, PyObject *handle);
PyObject *ready_pop(Turns *self);
PyObject *ready_get(Turns *self, void *ignored); /* loop._ready */
int add_ready(struct hot *hot);

/* schedule.c */
double turns_now(Turns *self); /* loop.time(); -1 with an exception */
PyObject *turns_call_soon(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames);
PyObject *turns_call_soon_threadsafe(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames);
PyObject *turns_call_at(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames);
PyObject *turns_call_later(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames);
PyObject *turns_time(Turns *self, PyObject *ignored);
PyObject *turns_add_callback(Turns *self, PyObject *handle);
int add_schedule(struct hot *hot);

/* tasks.c */
PyObject *turns_create_future(Turns *self, PyObject *ignored);
PyObject *turns_create_task(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames);
int add_tasks(struct hot *hot);

/* turns.c */
int add_turns(struct hot *hot);

#endif
