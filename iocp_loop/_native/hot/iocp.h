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

/* What a slot of the pool is, a tuple: where its address stands in it. */
enum { SLOT_ADDRESS = 3 };

static inline char *address_of_slot(PyObject *slot)
{
    return (char *)PyLong_AsVoidPtr(PyTuple_GET_ITEM(slot, SLOT_ADDRESS));
}

/* Note whether the next piece that is received for `sub` will fit into a slot. */
static inline void expect(const struct hot *hot, PyObject *sub, Py_ssize_t count)
{
    set_slot(SLOT(sub, hot->iocp.association), hot->iocp.small, count < hot->iocp.slot_size ? Py_True : Py_False);
}

/* Whether `sub` needs no more to be given back than to be put down: it has no event and no wait. */
static inline int is_plain(const struct hot *hot, PyObject *sub)
{
    const iocp_submission *native = PyLong_AsVoidPtr(SLOT(sub, hot->iocp.address));
    return !native->event && !native->wait;
}

/* iocp_submissions.c, which tells what each does.  A class method first: what comes from ports/iocp/. */
PyObject *iocp_use_requests(PyObject *turns, PyObject *args);
int iocp_add_at_once(IocpTurns *self, PyObject *sub, unsigned long count, long code);
PyObject *iocp_take_slot(IocpTurns *self);
int iocp_give_slot_back(IocpTurns *self, PyObject *sub);
PyObject *iocp_take_from_slot(IocpTurns *self, PyObject *sub, Py_ssize_t count);
int iocp_give_back(IocpTurns *self, PyObject *sub);
int iocp_complete(IocpTurns *self, PyObject *op, PyObject *value);
int iocp_end_stream(IocpTurns *self, PyObject *sub, PyObject *value);

/* iocp_once.c and iocp_datagrams.c: whether a request is theirs, and its end. */
int iocp_receives_once(const struct hot *hot, PyObject *op, PyObject *sub);
int iocp_receive_once(IocpTurns *self, PyObject *op, PyObject *sub, Py_ssize_t count);
int iocp_receives_datagrams(const struct hot *hot, PyObject *op, PyObject *sub);
int iocp_receive_datagram(IocpTurns *self, PyObject *op, PyObject *sub, Py_ssize_t count);
/* iocp_once.c.  For sockets.c, see struct verbs. */
int iocp_busy(Driver *driver, descriptor fd, int writing);
int iocp_takes_receive(Driver *driver, PyObject *op, descriptor fd, size_t size);
PyObject *iocp_receive_for(Driver *driver, PyObject *op, descriptor fd, size_t size, size_t *expected);

/* iocp_sockets.c.  Finish the request of `sub` for the operation `op`, which has brought `count` bytes: 0, -1, or NOT_PLAIN
 * for the `finish` in Python. */
int iocp_finish(IocpTurns *self, PyObject *op, PyObject *sub, Py_ssize_t count);

int add_iocp(struct hot *hot);

#endif
#endif
