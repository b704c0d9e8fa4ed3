/*
 * What driver iocp's native turn does with sockets: the receives of streams, the end of a SendAll, and whose request a
 * completion belongs to (iocp_once.c, iocp_datagrams.c have the others).  Their counterparts in Python are
 * ports/iocp/receiving.py and sockets.py; iocp.c tells who owns what.
 */

#include "iocp.h"

#ifdef _WIN32

#include "receiving.h"

/* ---------------------------------------------------------------------------------------------------------------------
 * Receiving for a stream
 * ------------------------------------------------------------------------------------------------------------------ */

/* Whether the stream `op` is to be armed.  In this order: once it is over, its submission may serve another. */
static int wants_arming(const struct hot *hot, PyObject *op, PyObject *sub)
{
    return SLOT(op, hot->operation.state) == hot->states.in_flight && SLOT(op, hot->operation.paused) != Py_True
           && SLOT(sub, hot->iocp.armed) != Py_True;
}

/* As _arm of the driver, for a stream that is in flight and neither armed nor paused: receive again.  That its socket
 * has been closed, so that its number may be another's, is for the driver in Python too. */
static int arm(IocpTurns *self, PyObject *op, PyObject *sub)
{
    struct hot *hot = self->driver.hot;
    PyObject *association = SLOT(sub, hot->iocp.association), *sock = SLOT(op, hot->operation.handle); /* borrowed */
    PyObject *number = SLOT(op, hot->operation.fd), *address = SLOT(sub, hot->iocp.address), *slot, *done; /* as these are */
    char *memory = NULL;
    uintptr_t fd = number == NULL ? 0 : (uintptr_t)PyLong_AsVoidPtr(number);
    int is_number = !PyErr_Occurred();
    PyErr_Clear();
    if (!is_number || association == Py_None || SLOT(association, hot->iocp.emulated) != Py_False || sock == NULL
        || !is_socket(hot, sock) || socket_descriptor(sock) != fd) {
        done = PyObject_CallMethodOneArg((PyObject *)self, hot->names.arm, op);
        Py_XDECREF(done);
        return done == NULL ? -1 : 0;
    }
    int skips = SLOT(association, hot->iocp.skips) == Py_True;
    iocp_submission *native = PyLong_AsVoidPtr(address);
    if (SLOT(association, hot->iocp.small) == Py_True && SLOT(op, hot->operation.get_buffer) == Py_None) {
        slot = iocp_take_slot(self);
        if (slot == NULL)
            return -1;
        if (slot != Py_None && !wants_arming(hot, op, sub)) {
            /* Making slots ran the garbage collector, and a finalizer has ended the stream. */
            int failed = PyList_Append(SLOT(self->slots, hot->iocp.free), slot);
            Py_DECREF(slot);
            return failed;
        }
        if (slot != Py_None)
            memory = address_of_slot(slot);
        Py_XSETREF(SLOT(sub, hot->iocp.slot), slot);
    }
    if (PyDict_SetItem(self->outstanding, address, sub) < 0)
        return -1;
    set_slot(sub, hot->iocp.armed, Py_True);
    long code = hot->iocp_functions.receive(fd, native, memory, memory == NULL ? 0 : (unsigned long)hot->iocp.slot_size);
    if (code == ERROR_IO_PENDING || (code == 0 && !skips))
        return 0;
    if (PyDict_DelItem(self->outstanding, address) < 0)
        return -1;
    return iocp_add_at_once(self, sub, code == 0 ? native->bytes : 0, code);
}

/* After a receive of the stream `op` has been delivered.  `more`: its buffer was full, there may be more. */
static int go_on(IocpTurns *self, PyObject *op, PyObject *sub, int more)
{
    struct hot *hot = self->driver.hot;
    if (!wants_arming(hot, op, sub))
        return 0;
    if (!more)
        return arm(self, op, sub);
    set_slot(sub, hot->iocp.armed, Py_True);
    return iocp_add_at_once(self, sub, 0, 0);
}

/* As go_on, with an exception on its way up that ends the loop's run: another run may follow.  -1. */
static int go_on_failing(IocpTurns *self, PyObject *op, PyObject *sub, int more)
{
    PyObject *exception = take_exception();
    if (go_on(self, op, sub, more) < 0)
        PyErr_Clear();
    PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
    Py_DECREF(exception);
    return -1;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Completions
 * ------------------------------------------------------------------------------------------------------------------ */

/* What a stream has got, and on with it.  Takes `value` over. */
static int deliver_some(IocpTurns *self, PyObject *op, PyObject *sub, PyObject *value, int more)
{
    if (iocp_complete(self, op, value) < 0)
        return go_on_failing(self, op, sub, more);
    return go_on(self, op, sub, more);
}

/* As _receive_from_slot of the driver, for a stream that is in flight: `count` bytes are here already. */
static int receive_from_slot(IocpTurns *self, PyObject *op, PyObject *sub, Py_ssize_t count)
{
    struct hot *hot = self->driver.hot;
    int full = count == hot->iocp.slot_size;
    PyObject *data = iocp_take_from_slot(self, sub, count);
    if (data == NULL)
        return -1;
    return deliver_some(self, op, sub, data, full);
}

/* As _receive_some of the driver, for a stream that is in flight and not paused: its socket has something. */
static int receive_from_socket(IocpTurns *self, PyObject *op, PyObject *sub)
{
    struct hot *hot = self->driver.hot;
    int lent = SLOT(op, hot->operation.get_buffer) != Py_None, failed;
    size_t before = self->expected;
    struct piece piece;
    switch (receive_for_stream(hot, op, &self->expected, &piece)) {
    case DATA:
        if (!lent)
            expect(hot, sub, piece.size);
        return deliver_some(self, op, sub, piece.value,
                            !lent && ((size_t)piece.size == before || piece.size == SCRATCH_SIZE));
    case END:
        failed = iocp_end_stream(self, sub, piece.value);
        Py_DECREF(piece.value);
        return failed;
    case NOTHING:
        return go_on(self, op, sub, 0);
    default:
        return ends_the_loop() || SLOT(op, hot->operation.state) != hot->states.in_flight
                   ? go_on_failing(self, op, sub, 0)
                   : iocp_end_stream(self, sub, NULL);
    }
}

/* As _sent_some of the driver, when all is sent: the last completion of a SendAll. */
static int end_send(IocpTurns *self, PyObject *op, PyObject *sub)
{
    struct hot *hot = self->driver.hot;
    PyObject *buffers = Py_NewRef(SLOT(op, hot->operation.all_buffers));
    PyObject *size = Py_NewRef(SLOT(op, hot->operation.all_size));
    /* Out of its line first: what is freed below may run code that submits another. */
    int failed = PyList_SetSlice(SLOT(SLOT(sub, hot->iocp.association), hot->iocp.writing), 0, 1, NULL);
    set_slot(op, hot->operation.all_sent, size);
    if (!failed)
        failed = PyList_SetSlice(buffers, 0, PyList_GET_SIZE(buffers), NULL);
    Py_DECREF(buffers);
    if (!failed) {
        failed = iocp_give_back(self, sub) < 0 || land(&self->driver, op) < 0 || iocp_complete(self, op, Py_NewRef(size)) < 0
                     ? -1
                     : 0;
    }
    Py_DECREF(size);
    return failed;
}

/* The number in a slot of an operation, which is open to everybody; -1 if there is none. */
static Py_ssize_t number_in(PyObject *op, Py_ssize_t offset)
{
    PyObject *value = SLOT(op, offset);
    Py_ssize_t number = value != NULL && PyLong_CheckExact(value) ? PyLong_AsSsize_t(value) : -1;
    if (number < 0)
        PyErr_Clear();
    return number;
}

/* Whether `count` bytes are all that is left to send; of a submission that needs no more to be given back, and of the
 * only operation in its line. */
static int sends_the_rest(const struct hot *hot, PyObject *op, PyObject *sub, Py_ssize_t count)
{
    if ((PyObject *)Py_TYPE(op) != hot->kinds.send_all || !is_plain(hot, sub)
        || SLOT(sub, hot->iocp.slot) != Py_None || Py_SIZE(SLOT(SLOT(sub, hot->iocp.association), hot->iocp.writing)) != 1)
        return 0;
    PyObject *buffers = SLOT(op, hot->operation.all_buffers); /* borrowed */
    Py_ssize_t sent = number_in(op, hot->operation.all_sent);
    return buffers != NULL && PyList_CheckExact(buffers) && sent >= 0
           && sent + count == number_in(op, hot->operation.all_size);
}

/* Whether `op` is a stream that can be received for here. */
static int receives(const struct hot *hot, PyObject *op)
{
    return (PyObject *)Py_TYPE(op) == hot->kinds.receive_stream
           && SLOT(op, hot->operation.state) == hot->states.in_flight
           && SLOT(op, hot->operation.handle) != NULL && is_socket(hot, SLOT(op, hot->operation.handle));
}

int iocp_finish(IocpTurns *self, PyObject *op, PyObject *sub, Py_ssize_t count)
{
    struct hot *hot = self->driver.hot;
    int has_slot = SLOT(sub, hot->iocp.slot) != Py_None;
    if (receives(hot, op) && (!has_slot || count > 0)) {
        if (has_slot)
            return receive_from_slot(self, op, sub, count);
        if (SLOT(op, hot->operation.paused) == Py_True)
            return 0; /* what there is stays in the socket; resume() asks again */
        return receive_from_socket(self, op, sub);
    }
    if (iocp_receives_once(hot, op, sub))
        return iocp_receive_once(self, op, sub, count);
    if (iocp_receives_datagrams(hot, op, sub))
        return iocp_receive_datagram(self, op, sub, count);
    return sends_the_rest(hot, op, sub, count) ? end_send(self, op, sub) : NOT_PLAIN;
}

#endif
