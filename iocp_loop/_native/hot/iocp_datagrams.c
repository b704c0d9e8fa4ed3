/* Receives of streams of datagrams on driver iocp.  Their counterpart in Python is ports/iocp/datagrams.py. */

#include "iocp.h"

#ifdef _WIN32

/* What `keep` is of a request for datagrams, a tuple: the memory, and the most bytes that a datagram may have. */
enum { KEPT_MEMORY = 0, KEPT_MOST = 2 };

/* DATAGRAMS_IN_A_TURN of ports/receiving.py. */
enum { DATAGRAMS_IN_A_TURN = 16 };

/* As _arm_datagrams of the driver, which does what is not plain. */
static int arm_datagrams(IocpTurns *self, PyObject *op, PyObject *sub)
{
    struct hot *hot = self->driver.hot;
    PyObject *sock = SLOT(op, hot->operation.handle), *number = SLOT(op, hot->operation.fd); /* borrowed */
    PyObject *association = SLOT(sub, hot->iocp.association), *keep = SLOT(sub, hot->iocp.keep);
    if (SLOT(sub, hot->iocp.op) != op || SLOT(op, hot->operation.state) != hot->states.in_flight
        || SLOT(op, hot->operation.from_paused) == Py_True || SLOT(sub, hot->iocp.armed) == Py_True)
        return 0;
    uintptr_t fd = number == NULL ? 0 : (uintptr_t)PyLong_AsVoidPtr(number);
    if (PyErr_Occurred() || SLOT(association, hot->iocp.emulated) != Py_False || socket_descriptor(sock) != fd) {
        PyErr_Clear();
        PyObject *done = PyObject_CallMethodOneArg((PyObject *)self, hot->names.arm_datagrams, op);
        Py_XDECREF(done);
        return done == NULL ? -1 : 0;
    }
    PyObject *address = SLOT(sub, hot->iocp.address), *memory = PyTuple_GET_ITEM(keep, KEPT_MEMORY);
    if (PyDict_SetItem(self->outstanding, address, sub) < 0)
        return -1;
    set_slot(sub, hot->iocp.armed, Py_True);
    long code = hot->iocp_functions.receive_from(fd, PyLong_AsVoidPtr(address), PyByteArray_AS_STRING(memory),
                                            (unsigned long)PyByteArray_GET_SIZE(memory));
    if (code == 0 || code == ERROR_IO_PENDING) /* these do not skip: an entry follows either way */
        return 0;
    /* There may be an entry all the same, see _submitted. */
    PyObject *done = PyDict_DelItem(self->outstanding, address) < 0
                         ? NULL
                         : PyObject_CallMethod((PyObject *)self, "_submitted", "Ol", sub, code);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* As _received_datagram of the driver, for a stream that is in flight. */
int iocp_receive_datagram(IocpTurns *self, PyObject *op, PyObject *sub, Py_ssize_t count)
{
    struct hot *hot = self->driver.hot;
    PyObject *keep = SLOT(sub, hot->iocp.keep); /* borrowed */
    const iocp_submission *native = PyLong_AsVoidPtr(SLOT(sub, hot->iocp.address));
    int at_once = native->bytes > 0, failed = 0;
    if (count > PyLong_AsSsize_t(PyTuple_GET_ITEM(keep, KEPT_MOST)))
        return NOT_PLAIN;
    PyObject *address = tuple_of(hot, (const struct sockaddr_storage *)native->area, native->address_length);
    if (address == NULL) {
        PyErr_Clear(); /* of a family that is not the Internet's */
        return NOT_PLAIN;
    }
    const char *memory = PyByteArray_AS_STRING(PyTuple_GET_ITEM(keep, KEPT_MEMORY));
    PyObject *value = Py_BuildValue("(y#N)", memory, count, address);
    if (value == NULL)
        return -1;
    if (iocp_complete(self, op, value) < 0 && driver_go_on(&self->driver) < 0)
        failed = -1;
    /* One that was there when it was asked for is one of many: a call for each of the others, in place of two. */
    if (!failed && at_once) {
        int more = receive_datagrams_for(hot, (PyObject *)self, op, DATAGRAMS_IN_A_TURN);
        if (more > 0)
            self->driver.completions += (unsigned long long)more;
        failed = more == -1;
        if (failed && !ends_the_loop() && SLOT(sub, hot->iocp.op) == op)
            return iocp_end_stream(self, sub, NULL);
    }
    if (!failed)
        return arm_datagrams(self, op, sub);
    PyObject *exception = take_exception(); /* it ends the loop's run: another run may follow */
    if (arm_datagrams(self, op, sub) < 0)
        PyErr_Clear();
    PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
    Py_DECREF(exception);
    return -1;
}

/* Whether `op` is a stream of datagrams that can be received for here. */
int iocp_receives_datagrams(const struct hot *hot, PyObject *op, PyObject *sub)
{
    PyObject *keep = SLOT(sub, hot->iocp.keep); /* borrowed */
    return (PyObject *)Py_TYPE(op) == hot->kinds.receive_from_stream
           && SLOT(op, hot->operation.state) == hot->states.in_flight && SLOT(op, hot->operation.handle) != NULL
           && is_socket(hot, SLOT(op, hot->operation.handle)) && PyTuple_CheckExact(keep) && is_plain(hot, sub);
}

#endif
