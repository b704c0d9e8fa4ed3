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

static inline void set_slot(PyObject *object, Py_ssize_t offset, PyObject *value)
{
    Py_XSETREF(SLOT(object, offset), Py_NewRef(value));
}

/* iocp_sockets.c.  A class method: what comes from ports/iocp/. */
PyObject *iocp_use_requests(PyObject *turns, PyObject *args);
/* Finish the request of `sub` for the operation `op`, which has brought `count` bytes: 0, -1, or NOT_PLAIN
 * for the `finish` in Python. */
int iocp_finish(IocpTurns *self, PyObject *op, PyObject *sub, Py_ssize_t count);
/* For sockets.c, see struct verbs. */
int iocp_busy(Driver *driver, descriptor fd, int writing);
int iocp_takes_receive(Driver *driver, PyObject *op, descriptor fd, size_t size);
PyObject *iocp_receive_for(Driver *driver, PyObject *op, descriptor fd, size_t size, size_t *expected);

int add_iocp(struct hot *hot);

#endif
#endif
