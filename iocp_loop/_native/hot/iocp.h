/* What the files of driver iocp's native turn share; iocp.c tells how it works. */
#ifndef IOCP_LOOP_HOT_IOCP_H
#define IOCP_LOOP_HOT_IOCP_H

#include "driver.h"

#ifdef _WIN32

#include "calls.h"

#include "../windows/iocp.h"

typedef struct {
    Driver driver;
    PyObject *port_object; /* what cffi knows it by */
    iocp_port *port;
    PyObject *associations, *outstanding, *at_once, *spare, *slots;
    size_t expected; /* bytes in a piece of a stream, see receive_for_stream */
    long next; /* what of the port's batch is dispatched next */
    long code; /* what iocp_wait has returned */
} IocpTurns;

/* The functions of the binding that are called here. */
typedef long (*request_function)(uintptr_t socket, iocp_submission *sub, void *buffer, unsigned long size);
extern struct iocp_functions {
    long (*wait)(iocp_port *port, long long timeout_ns);
    request_function receive, receive_from;
} iocp_functions;

/* The slots of the classes of ports/iocp/, and what else comes from there. */
extern struct iocp_slots {
    PyObject *submission, *nobody;
    Py_ssize_t address, armed, association, finish, keep, op, slot; /* of a Submission */
    Py_ssize_t emulated, handle, reading, skips, small, writing;    /* of an Association */
    Py_ssize_t free;                                                /* of a SlotPool */
    Py_ssize_t slot_size;
} iocp_slots;

static inline void set_slot(PyObject *object, Py_ssize_t offset, PyObject *value)
{
    Py_XSETREF(SLOT(object, offset), Py_NewRef(value));
}

/* iocp_sockets.c.  Its method that fills in both. */
PyObject *iocp_use_requests(PyObject *ignored, PyObject *args);
/* Finish the request of `sub` for the operation `op`, which has brought `count` bytes: 0, -1, or NOT_PLAIN
 * for the `finish` in Python. */
int iocp_finish(IocpTurns *self, PyObject *op, PyObject *sub, Py_ssize_t count);
/* For sockets.c, see struct verbs. */
int iocp_busy(Driver *driver, descriptor fd, int writing);
int iocp_takes_receive(Driver *driver, PyObject *op, descriptor fd, size_t size);
PyObject *iocp_receive_for(Driver *driver, PyObject *op, descriptor fd, size_t size, size_t *expected);

int add_iocp(PyObject *module);

#endif
#endif
