/*
 * What driver iocp's native turn does with sockets: the receives of streams and those of sock_recv, datagrams, and the end of
 * a SendAll.  Their counterparts in Python are ports/iocp/receiving.py, datagrams.py and sockets.py; iocp.c tells who owns
 * what.
 */

#include "iocp.h"

#ifdef _WIN32

#include "receiving.h"
#include "sockets.h"

/* _use_requests(Submission, Association, SlotPool, nobody, size of a slot, addresses of the functions) */
PyObject *iocp_use_requests(PyObject *turns, PyObject *args)
{
    struct hot *hot = driver_hot((PyTypeObject *)turns);
    PyObject *submission, *association, *pool, *nobody;
    unsigned long long functions[3];
    if (!PyArg_ParseTuple(args, "OOOOn(KKK)", &submission, &association, &pool, &nobody, &hot->iocp.slot_size,
                          &functions[0], &functions[1], &functions[2]))
        return NULL;
    hot->iocp_functions.wait = (long (*)(iocp_port *, long long))(uintptr_t)functions[0];
    hot->iocp_functions.receive = (request_function)(uintptr_t)functions[1];
    hot->iocp_functions.receive_from = (request_function)(uintptr_t)functions[2];
    hot->iocp.address = slot_offset(submission, "address");
    hot->iocp.armed = slot_offset(submission, "armed");
    hot->iocp.association = slot_offset(submission, "association");
    hot->iocp.finish = slot_offset(submission, "finish");
    hot->iocp.keep = slot_offset(submission, "keep");
    hot->iocp.op = slot_offset(submission, "op");
    hot->iocp.slot = slot_offset(submission, "slot");
    hot->iocp.emulated = slot_offset(association, "emulated");
    hot->iocp.handle = slot_offset(association, "handle");
    hot->iocp.reading = slot_offset(association, "reading");
    hot->iocp.skips = slot_offset(association, "skips");
    hot->iocp.small = slot_offset(association, "small");
    hot->iocp.writing = slot_offset(association, "writing");
    hot->iocp.free = slot_offset(pool, "free");
    if (PyErr_Occurred())
        return NULL;
    Py_XSETREF(hot->kinds.submission, Py_NewRef(submission));
    Py_XSETREF(hot->nobody, Py_NewRef(nobody));
    Py_RETURN_NONE;
}

/* What a slot of the pool is, a tuple: where its address stands in it. */
enum { SLOT_ADDRESS = 3 };

/* ---------------------------------------------------------------------------------------------------------------------
 * Submissions
 * ------------------------------------------------------------------------------------------------------------------ */

/* self._at_once.append((sub, count, code)): for the next dispatch. */
static int add_at_once(IocpTurns *self, PyObject *sub, unsigned long count, long code)
{
    struct hot *hot = self->driver.hot;
    PyObject *entry = Py_BuildValue("(Okl)", sub, count, code);
    PyObject *done = entry == NULL ? NULL : PyObject_CallMethodOneArg(self->at_once, hot->names.append, entry);
    Py_XDECREF(entry);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* A slot of the pool, or None if all are lent. */
static PyObject *take_slot(IocpTurns *self)
{
    struct hot *hot = self->driver.hot;
    PyObject *list = SLOT(self->slots, hot->iocp.free); /* borrowed */
    Py_ssize_t count = list == NULL ? 0 : PyList_GET_SIZE(list);
    if (count == 0) /* the pool may make some more */
        return PyObject_CallMethodNoArgs(self->slots, hot->names.take);
    PyObject *slot = Py_NewRef(PyList_GET_ITEM(list, count - 1));
    if (PyList_SetSlice(list, count - 1, count, NULL) < 0)
        Py_CLEAR(slot);
    return slot;
}

/* The slot of `sub` may be lent again.  Back in the list before it leaves the submission: it always has an owner. */
static int give_slot_back(IocpTurns *self, PyObject *sub)
{
    struct hot *hot = self->driver.hot;
    if (PyList_Append(SLOT(self->slots, hot->iocp.free), SLOT(sub, hot->iocp.slot)) < 0)
        return -1;
    set_slot(sub, hot->iocp.slot, Py_None);
    return 0;
}

static char *address_of_slot(PyObject *slot)
{
    return (char *)PyLong_AsVoidPtr(PyTuple_GET_ITEM(slot, SLOT_ADDRESS));
}

/* Note whether the next piece that is received for `sub` will fit into a slot. */
static void expect(const struct hot *hot, PyObject *sub, Py_ssize_t count)
{
    set_slot(SLOT(sub, hot->iocp.association), hot->iocp.small, count < hot->iocp.slot_size ? Py_True : Py_False);
}

/* The `count` bytes in the slot of `sub`, which is given back. */
static PyObject *take_from_slot(IocpTurns *self, PyObject *sub, Py_ssize_t count)
{
    struct hot *hot = self->driver.hot;
    PyObject *data = PyBytes_FromStringAndSize(address_of_slot(SLOT(sub, hot->iocp.slot)), count);
    if (data == NULL || give_slot_back(self, sub) < 0)
        Py_CLEAR(data);
    else
        expect(hot, sub, count);
    return data;
}

/* As _give_back of the driver, for a submission without a slot, an event or a wait. */
static int give_back(IocpTurns *self, PyObject *sub)
{
    struct hot *hot = self->driver.hot;
    set_slot(sub, hot->iocp.op, Py_None);
    set_slot(sub, hot->iocp.association, Py_None);
    set_slot(sub, hot->iocp.keep, Py_None);
    set_slot(sub, hot->iocp.finish, hot->nobody);
    return PyList_Append(self->spare, sub);
}

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
        slot = take_slot(self);
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
    return add_at_once(self, sub, code == 0 ? native->bytes : 0, code);
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
    return add_at_once(self, sub, 0, 0);
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

/* op.complete(value, None).  Takes `value` over, which may be NULL with an exception. */
static int complete(IocpTurns *self, PyObject *op, PyObject *value)
{
    int failed = value == NULL ? -1 : complete_operation(self->driver.hot, op, value, Py_None);
    self->driver.completions++;
    Py_XDECREF(value);
    return failed;
}

/* What a stream has got, and on with it.  Takes `value` over. */
static int deliver_some(IocpTurns *self, PyObject *op, PyObject *sub, PyObject *value, int more)
{
    if (complete(self, op, value) < 0)
        return go_on_failing(self, op, sub, more);
    return go_on(self, op, sub, more);
}

/* self._end_with(sub, value, None); with NULL, with the exception that is set. */
static int end_stream(IocpTurns *self, PyObject *sub, PyObject *value)
{
    struct hot *hot = self->driver.hot;
    PyObject *error = value == NULL ? take_exception() : Py_NewRef(Py_None);
    PyObject *done = PyObject_CallMethodObjArgs((PyObject *)self, hot->names.end_with, sub, value == NULL ? Py_None : value,
                                                error, NULL);
    Py_XDECREF(error);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* As _receive_from_slot of the driver, for a stream that is in flight: `count` bytes are here already. */
static int receive_from_slot(IocpTurns *self, PyObject *op, PyObject *sub, Py_ssize_t count)
{
    struct hot *hot = self->driver.hot;
    int full = count == hot->iocp.slot_size;
    PyObject *data = take_from_slot(self, sub, count);
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
        failed = end_stream(self, sub, piece.value);
        Py_DECREF(piece.value);
        return failed;
    case NOTHING:
        return go_on(self, op, sub, 0);
    default:
        return ends_the_loop() || SLOT(op, hot->operation.state) != hot->states.in_flight
                   ? go_on_failing(self, op, sub, 0)
                   : end_stream(self, sub, NULL);
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
        failed = give_back(self, sub) < 0 || land(&self->driver, op) < 0 || complete(self, op, Py_NewRef(size)) < 0
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

/* Whether `sub` needs no more to be given back than to be put down: it has no event and no wait. */
static int is_plain(const struct hot *hot, PyObject *sub)
{
    const iocp_submission *native = PyLong_AsVoidPtr(SLOT(sub, hot->iocp.address));
    return !native->event && !native->wait;
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

/* ---------------------------------------------------------------------------------------------------------------------
 * Receiving once
 * ------------------------------------------------------------------------------------------------------------------ */

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
        PyObject *slot = take_slot(self);
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
    if ((SLOT(sub, hot->iocp.slot) != Py_None && give_slot_back(self, sub) < 0) || give_back(self, sub) < 0)
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
        return add_at_once(self, sub, 0, 0) < 0 ? NULL : enter(self, op, sub);
    PyObject *data = take_from_slot(self, sub, (Py_ssize_t)native->bytes);
    if (give_back(self, sub) < 0)
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
static int receive_once(IocpTurns *self, PyObject *op, PyObject *sub, Py_ssize_t count)
{
    struct hot *hot = self->driver.hot;
    PyObject *data;
    if (SLOT(sub, hot->iocp.slot) != Py_None)
        data = take_from_slot(self, sub, count);
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
        return ends_the_loop() ? -1 : end_stream(self, sub, NULL);
    PyObject *association = Py_NewRef(SLOT(sub, hot->iocp.association));
    int failed = give_back(self, sub) < 0 || leave_line(self, op, association) < 0;
    self->driver.completions++;
    if (!failed)
        failed = deliver_received(&self->driver, op, data);
    Py_DECREF(association);
    Py_DECREF(data);
    return failed ? -1 : 0;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Datagrams
 * ------------------------------------------------------------------------------------------------------------------ */

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
static int receive_datagram(IocpTurns *self, PyObject *op, PyObject *sub, Py_ssize_t count)
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
    if (complete(self, op, value) < 0 && driver_go_on(&self->driver) < 0)
        failed = -1;
    /* One that was there when it was asked for is one of many: a call for each of the others, in place of two. */
    if (!failed && at_once) {
        int more = receive_datagrams_for(hot, (PyObject *)self, op, DATAGRAMS_IN_A_TURN);
        if (more > 0)
            self->driver.completions += (unsigned long long)more;
        failed = more == -1;
        if (failed && !ends_the_loop() && SLOT(sub, hot->iocp.op) == op)
            return end_stream(self, sub, NULL);
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

/* ---------------------------------------------------------------------------------------------------------------------
 * The end of a request
 * ------------------------------------------------------------------------------------------------------------------ */

/* Whether `sub` is that of a Receive on a stream; one for a message has memory in `keep`. */
static int receives_once(const struct hot *hot, PyObject *op, PyObject *sub)
{
    PyObject *state = SLOT(op, hot->operation.state), *sock = SLOT(op, hot->operation.handle); /* borrowed */
    return (PyObject *)Py_TYPE(op) == hot->kinds.receive && SLOT(sub, hot->iocp.keep) == Py_None
           && (state == hot->states.in_flight || state == hot->states.cancelling) && is_plain(hot, sub)
           && (SLOT(sub, hot->iocp.slot) != Py_None || (sock != NULL && is_socket(hot, sock) && never_waits(hot, sock)));
}

/* Whether `op` is a stream of datagrams that can be received for here. */
static int receives_datagrams(const struct hot *hot, PyObject *op, PyObject *sub)
{
    PyObject *keep = SLOT(sub, hot->iocp.keep); /* borrowed */
    return (PyObject *)Py_TYPE(op) == hot->kinds.receive_from_stream
           && SLOT(op, hot->operation.state) == hot->states.in_flight && SLOT(op, hot->operation.handle) != NULL
           && is_socket(hot, SLOT(op, hot->operation.handle)) && PyTuple_CheckExact(keep) && is_plain(hot, sub);
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
    if (receives_once(hot, op, sub))
        return receive_once(self, op, sub, count);
    if (receives_datagrams(hot, op, sub))
        return receive_datagram(self, op, sub, count);
    return sends_the_rest(hot, op, sub, count) ? end_send(self, op, sub) : NOT_PLAIN;
}

#endif
