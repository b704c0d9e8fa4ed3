/*
 * The native tier of iocp_loop: the few functions that run for every callback and every message, as C types that the
 * classes in Python inherit from.  What each does, its counterpart in Python does too; that one is the reference, and
 * is used wherever this module was not built (see iocp_loop/native.py).
 *
 *   handles.c   Handle and TimerHandle: asyncio's own classes, made and run without a frame of Python
 *   turns.c     Turns: the ready queue, the timers and one turn of the loop      (turns.py)
 *   streams.c   the write and the receive of a stream transport                  (transports.py)
 *   uring.c     the wait and the dispatch of driver uring                        (ports/uring.py)
 *   epoll.c     the wait and the dispatch of driver poll, on Linux               (ports/poll.py)
 *   module.c    puts them together
 *
 * Ownership.  Everything here runs under the GIL but the system call that waits.  A PyObject pointer in a struct owns
 * its reference; one in a local variable owns it too unless the comment beside it says "borrowed".  Functions return
 * new references, or 0 and -1, as those of CPython do.
 *
 * Only CPython's public interface is used.  The slots of classes that are written in Python (asyncio.Handle,
 * Operation) are read where their member descriptors say that they are.
 */
#ifndef IOCP_LOOP_HOT_H
#define IOCP_LOOP_HOT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <structmember.h>

/* The object in a slot of a class written in Python; NULL where it was deleted or never set. */
#define SLOT(object, offset) (*(PyObject **)((char *)(object) + (offset)))

/* Where the slot `name` of `type` is, in bytes from the start of an instance; -1 with an exception. */
Py_ssize_t slot_offset(PyObject *type, const char *name);

/* The names that are looked up again and again, made once. */
extern struct names {
    PyObject *buffer_updated, *call_exception_handler, *check_callback, *check_closed, *check_thread, *context,
        *data_received, *dispatch_other, *drain_ready, *end_stream, *fatal_error, *open_ring, *queue_leftovers, *reap,
        *receive_ended, *receive_into_buffer, *run, *time, *timer_handle_cancelled, *write_otherwise, *write_to_self,
        *hand_over;
} names;

/* What native.py has set: functions in Python for what is rare. */
extern struct helpers {
    PyObject *report_error; /* (handle, exception): what a callback has raised */
    PyObject *run_in_debug; /* (loop, handle): run it, and tell if it was slow */
} helpers;

/* Where the slots of iocp_loop.operations.Operation are. */
extern struct operation_slots {
    Py_ssize_t complete, handle, state;
    PyObject *receive_stream;   /* the type ReceiveStream */
    Py_ssize_t get_buffer, paused; /* its slots */
} operation_slots;

/* The exception that is set, taken away, as one object with its traceback. */
PyObject *take_exception(void);

/* 1 if the exception that is set is one that ends the loop: SystemExit or KeyboardInterrupt. */
int ends_the_loop(void);

/* context.run(callable, *args), by the short way for a real Context. */
PyObject *call_in_context(PyObject *context, PyObject *callable, PyObject *const *args, size_t count);

/* Enter or leave `context` if it is a real one.  1: it is; 0: it is something else, with a `run`; -1: error. */
int enter_context(PyObject *context);

/* The descriptor of a socket object, read in place; -1 if it is closed.  Only for what is_socket says yes to. */
int is_socket(PyObject *object);
#ifdef _WIN32
typedef uintptr_t descriptor; /* a SOCKET */
#define NO_DESCRIPTOR ((descriptor)-1)
#else
typedef int descriptor;
#define NO_DESCRIPTOR (-1)
#endif
descriptor socket_descriptor(PyObject *sock);

/* handles.c */
extern PyTypeObject *Handle_type, *TimerHandle_type;
PyObject *handle_new(PyObject *loop, PyObject *callback, PyObject *const *args, Py_ssize_t count, PyObject *context);
PyObject *timer_new(PyObject *loop, PyObject *when, PyObject *callback, PyObject *const *args, Py_ssize_t count,
                    PyObject *context);
int handle_is_cancelled(PyObject *handle);
int handle_run(PyObject *handle);
size_t *timer_place(PyObject *timer); /* where it stands in the heap of its loop */
void timer_set_scheduled(PyObject *timer, int scheduled);
#define NOWHERE SIZE_MAX

/* turns.c */
extern PyTypeObject *Turns_type;
int turns_forget_timer(PyObject *loop, PyObject *timer);
int turns_in_debug(PyObject *loop);

int add_handles(PyObject *module);
int add_turns(PyObject *module);
PyObject *make_stream_type(PyObject *module, PyObject *base);
#ifdef __linux__
int add_uring(PyObject *module);
int add_epoll(PyObject *module);
#endif

#endif
