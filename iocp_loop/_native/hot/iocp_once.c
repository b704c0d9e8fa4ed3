/*
 * Receives of sock_recv on driver iocp: a request is made for each, which has a slot of the pool if the next piece is expected
 * to fit.  Their counterpart in Python is ports/iocp/receiving.py.
 */

#include "iocp.h"

#ifdef _WIN32

#include "receiving.h"
#include "sockets.h"

/* What is known of `fd`; NULL if that is nothing, or with an exception. */
static PyObject *association_of(IocpTurns *self, descriptor fd)
{
    PyObject *number = PyLong_FromUnsignedLongLong((unsigned long long)fd);
    PyObject *association = number == NULL || self->associations == NULL ? NULL : find(self->associations, number);
    Py_XDECREF(number);
    return association;
}

int iocp_busy(Driver *driver, descriptor fd, int writing)
{
    struct hot *hot = driver->hot;
    PyObject *association = association_of((IocpTurns *)driver, fd);
    if (association == NULL)
        return PyErr_Occurred() ? -1 : 0;
    int busy = has_items(SLOT(association, writing ? hot->iocp.writing : hot->iocp.reading));
    Py_DECREF(association);
    return busy;
}

/* Whether requests can be made here for `fd`, a stream's, and nobody waits to receive; -1: error. */
static int takes_requests(const struct hot *hot, PyObject *association, descriptor fd)
{
    PyObject *sock = PyObject_CallNoArgs(SLOT(association, hot->iocp.handle));
    if (sock == NULL)
        return -1;
    int takes = is_socket(hot, sock) && socket_descriptor(sock) == fd && SLOT(association, hot->iocp.emulated) == Py_False
                && SLOT(association, hot->iocp.skips) == Py_True && !has_items(SLOT(association, hot->iocp.reading));
    Py_DECREF(sock);
    return takes;
}

int iocp_takes_receive(Driver *driver, PyObject *op, descriptor fd, size_t size)
{
    IocpTurns *self = (IocpTurns *)driver;
    PyObject *association = association_of(self, fd);
    int takes = association == NULL || self->port == NULL ? 0 : takes_requests(driver->hot, association, fd) > 0;
    Py_XDECREF(association);
    return takes;
}

/* A submission for the new operation `op`, with a slot if there is one and the next piece is expected to fit.  Making these
 * may run anything. */
static PyObject *take_submission(IocpTurns *self, PyObject *op, PyObject *association)
{
    struct hot *hot = self->driver.hot;
    Py_ssize_t spare = PyList_GET_SIZE(self->spare);
    PyObject *sub = spare ? Py_NewRef(PyList_GET_ITEM(self->spare, spare - 1)) : PyObject_CallNoArgs(hot->kinds.submission);
    if (sub != NULL && spare && PyList_SetSlice(self->spare, spare - 1, spare, NULL) < 0)
        Py_CLEAR(sub);
    PyObject *finish = sub == NULL ? NULL : PyObject_GetAttr((PyObject *)self, hot->names.receive_once);
    if (finish == NULL) {
        Py_XDECREF(sub);
        return NULL;
    }
    Py_XSETREF(SLOT(sub, hot->iocp.finish), finish);
    set_slot(sub, hot->iocp.op, op);
    set_slot(sub, hot->iocp.association, association);
    if (SLOT(association, hot->iocp.small) == Py_True) {
        PyObject *slot = iocp_take_slot(self);
        if (slot == NULL)
            Py_CLEAR(sub);
        else
            Py_XSETREF(SLOT(sub, hot->iocp.slot), slot);
    }
    return sub;
}

/* Put `sub` down, with whatever it has.  NULL, as there is nothing to return. */
static PyObject *put_down(IocpTurns *self, PyObject *sub)
{
    struct hot *hot = self->driver.hot;
    PyObject *exception = PyErr_Occurred() ? take_exception() : NULL;
    if ((SLOT(sub, hot->iocp.slot) != Py_None && iocp_give_slot_back(self, sub) < 0) || iocp_give_back(self, sub) < 0)
        PyErr_Clear(); /* it is lost to the pool */
    if (exception != NULL) {
        PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
        Py_DECREF(exception);
    }
    return NULL;
}

/* Put the operation of `sub`, whose request the kernel has or which waits for the next dispatch, in flight: None. */
static PyObject *enter(IocpTurns *self, PyObject *op, PyObject *sub)
{
    struct hot *hot = self->driver.hot;
    set_slot(sub, hot->iocp.armed, Py_True);
    set_slot(op, hot->operation.driver_data, sub);
    if (launch(&self->driver, op) < 0
        || PyList_Append(SLOT(SLOT(sub, hot->iocp.association), hot->iocp.reading), op) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* Ask the kernel for `size` bytes, or for none where there is no slot: bytes, None if the operation is in flight, NULL with
 * an exception. */
static PyObject *request(IocpTurns *self, PyObject *op, PyObject *sub, descriptor fd, size_t size)
{
    struct hot *hot = self->driver.hot;
    PyObject *address = SLOT(sub, hot->iocp.address), *slot = SLOT(sub, hot->iocp.slot); /* borrowed */
    iocp_submission *native = PyLong_AsVoidPtr(address);
    size_t room = size < (size_t)hot->iocp.slot_size ? size : (size_t)hot->iocp.slot_size;
    if (PyDict_SetItem(self->outstanding, address, sub) < 0)
        return put_down(self, sub);
    long code = slot == Py_None ? hot->iocp_functions.receive(fd, native, NULL, 0)
                                : hot->iocp_functions.receive(fd, native, address_of_slot(slot), (unsigned long)room);
    if (code == ERROR_IO_PENDING)
        return enter(self, op, sub);
    if (PyDict_DelItem(self->outstanding, address) < 0)
        return NULL;
    if (code) {
        PyErr_SetExcFromWindowsErr(PyExc_OSError, (int)code);
        return put_down(self, sub);
    }
    if (slot == Py_None) /* something has come since recv was tried */
        return iocp_add_at_once(self, sub, 0, 0) < 0 ? NULL : enter(self, op, sub);
    PyObject *data = iocp_take_from_slot(self, sub, (Py_ssize_t)native->bytes);
    if (iocp_give_back(self, sub) < 0)
        Py_CLEAR(data);
    return data;
}

PyObject *iocp_receive_for(Driver *driver, PyObject *op, descriptor fd, size_t size, size_t *expected)
{
    struct hot *hot = driver->hot;
    IocpTurns *self = (IocpTurns *)driver;
    PyObject *association = association_of(self, fd), *answer = NULL, *sub;
    int takes = association == NULL || self->port == NULL ? 0 : takes_requests(hot, association, fd);
    if (takes > 0 && SLOT(association, hot->iocp.small) != Py_True) {
        answer = receive_now(hot, fd, size, expected);
        if (answer != NULL && answer != Py_None)
            set_slot(association, hot->iocp.small,
                     PyBytes_GET_SIZE(answer) < hot->iocp.slot_size ? Py_True : Py_False);
        takes = answer == Py_None;
    }
    if (takes > 0) {
        Py_CLEAR(answer);
        sub = take_submission(self, op, association);
        takes = sub == NULL || self->port == NULL ? 0 : takes_requests(hot, association, fd);
        if (takes > 0)
            answer = request(self, op, sub, fd, size);
        else if (sub != NULL)
            put_down(self, sub);
        Py_XDECREF(sub);
    }
    Py_XDECREF(association);
    return answer;
}

/* As _leave_line of the driver, for an operation that reads. */
static int leave_line(IocpTurns *self, PyObject *op, PyObject *association)
{
    struct hot *hot = self->driver.hot;
    PyObject *line = SLOT(association, hot->iocp.reading); /* borrowed */
    if (PyList_GET_SIZE(line) == 1 && PyList_GET_ITEM(line, 0) == op)
        return PyList_SetSlice(line, 0, 1, NULL);
    PyObject *done = PyObject_CallMethodObjArgs((PyObject *)self, hot->names.leave_line, association, op, NULL);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* As _receive_once of the driver, for a request that has brought data. */
int iocp_receive_once(IocpTurns *self, PyObject *op, PyObject *sub, Py_ssize_t count)
{
    struct hot *hot = self->driver.hot;
    PyObject *data;
    if (SLOT(sub, hot->iocp.slot) != Py_None)
        data = iocp_take_from_slot(self, sub, count);
    else {
        data = receive_for(hot, op);
        if (data == Py_None) {
            Py_DECREF(data);
            return NOT_PLAIN; /* somebody else was faster */
        }
        if (data != NULL)
            expect(hot, sub, PyBytes_GET_SIZE(data));
    }
    if (data == NULL)
        return ends_the_loop() ? -1 : iocp_end_stream(self, sub, NULL);
    PyObject *association = Py_NewRef(SLOT(sub, hot->iocp.association));
    int failed = iocp_give_back(self, sub) < 0 || leave_line(self, op, association) < 0;
    self->driver.completions++;
    if (!failed)
        failed = deliver_received(&self->driver, op, data);
    Py_DECREF(association);
    Py_DECREF(data);
    return failed ? -1 : 0;
}

/* Whether `sub` is that of a Receive on a stream; one for a message has memory in `keep`. */
int iocp_receives_once(const struct hot *hot, PyObject *op, PyObject *sub)
{
    PyObject *state = SLOT(op, hot->operation.state), *sock = SLOT(op, hot->operation.handle); /* borrowed */
    return (PyObject *)Py_TYPE(op) == hot->kinds.receive && SLOT(sub, hot->iocp.keep) == Py_None
           && (state == hot->states.in_flight || state == hot->states.cancelling) && is_plain(hot, sub)
           && (SLOT(sub, hot->iocp.slot) != Py_None || (sock != NULL && is_socket(hot, sock) && never_waits(hot, sock)));
}

#endif
