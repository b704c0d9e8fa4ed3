/*
 * The wait and the dispatch of driver iocp, and its receive.  A class in Python inherits from IocpTurns first and from
 * the driver that is written in Python behind it; ports/iocp/driver.py tells how it all works.
 *
 * The port is opened and closed in Python, through cffi; what is called here are two functions of the binding,
 * iocp_wait and iocp_receive, whose addresses come from there.  A turn is one iocp_wait, without the GIL if it may
 * block.  The batch that it gathers stays in the port until it is dispatched, so that a dispatch which an exception
 * ended goes on where it was.
 *
 * Done here is what every message goes through: a receive of a stream that has brought data, and the last of a SendAll.
 * Whatever is not that (errors, ends, cancels, requests that their thread left undone, handles of other ports) is for
 * the `finish` of the submission, in Python.
 *
 * Who owns what.  A submission (class Submission, binding.py) belongs to the table `_outstanding` while the kernel
 * has its request: the table's reference keeps the OVERLAPPED and, by the slot in it, the memory.  So it is entered
 * before the request is made, and taken out once the entry was reaped or the request turned out to be over at once.  An
 * OVERLAPPED is never touched between the two.  Slots move between the list of the pool and the submission; only a
 * submission that is not armed has none.  What is called from here may do anything: cancel the operation, whose
 * submission may serve another before we look again.  Hence the order of questions in go_on.
 *
 * Requests are made in the thread that dispatches, as in Python: the kernel ties them to it.
 */

#include "hot.h"

#ifdef _WIN32

#include <winsock2.h>

#include "../windows/iocp.h"

typedef long (*wait_function)(iocp_port *port, long long timeout_ns);
typedef long (*receive_function)(uintptr_t socket, iocp_submission *sub, void *buffer, unsigned long size);

typedef struct {
    PyObject_HEAD
    PyObject *port_object; /* what cffi knows it by */
    iocp_port *port;
    wait_function call;
    receive_function receive;
    PyObject *outstanding, *at_once, *spare, *slots, *in_flight, *submissions, *ready, *before_sleep;
    unsigned long long waits, completions, tokens;
    long next; /* what of the port's batch is dispatched next */
    char sleeping;
} IocpTurns;

static PyTypeObject *IocpTurns_type;

/* The longest timeout that is handed to iocp_wait, ns. */
static const double LONGEST_NS = 4e18;

/* The slots of the classes of ports/iocp_*.py, and what else comes from there. */
static struct {
    PyObject *nobody;
    Py_ssize_t address, armed, association, finish, keep, op, slot, small; /* of a Submission */
    Py_ssize_t emulated, skips, writing;                                   /* of an Association */
    Py_ssize_t free;                                                       /* of a SlotPool */
    Py_ssize_t slot_size;
} at;

/* What a slot of the pool is, a tuple: where its address stands in it. */
enum { SLOT_ADDRESS = 3 };

/* _use_requests(Submission, Association, SlotPool, nobody, size of a slot) */
static PyObject *use_requests(PyObject *ignored, PyObject *args)
{
    PyObject *submission, *association, *pool, *nobody;
    if (!PyArg_ParseTuple(args, "OOOOn", &submission, &association, &pool, &nobody, &at.slot_size))
        return NULL;
    at.address = slot_offset(submission, "address");
    at.armed = slot_offset(submission, "armed");
    at.association = slot_offset(submission, "association");
    at.finish = slot_offset(submission, "finish");
    at.keep = slot_offset(submission, "keep");
    at.op = slot_offset(submission, "op");
    at.slot = slot_offset(submission, "slot");
    at.small = slot_offset(submission, "small");
    at.emulated = slot_offset(association, "emulated");
    at.skips = slot_offset(association, "skips");
    at.writing = slot_offset(association, "writing");
    at.free = slot_offset(pool, "free");
    if (PyErr_Occurred())
        return NULL;
    Py_XSETREF(at.nobody, Py_NewRef(nobody));
    Py_RETURN_NONE;
}

static void set_slot(PyObject *object, Py_ssize_t offset, PyObject *value)
{
    Py_XSETREF(SLOT(object, offset), Py_NewRef(value));
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Waiting
 * ------------------------------------------------------------------------------------------------------------------ */

/* Whether a wait must not block, for there is something to do; -1 with an exception. */
static int busy(IocpTurns *self)
{
    int answer = has_items(self->ready) || has_items(self->at_once);
    if (!answer && self->before_sleep != NULL && self->before_sleep != Py_None) {
        PyObject *work = PyObject_CallNoArgs(self->before_sleep);
        answer = work == NULL ? -1 : PyObject_IsTrue(work);
        Py_XDECREF(work);
    }
    return answer;
}

/* iocp_wait without the GIL. */
static long block(IocpTurns *self, long long limit)
{
    iocp_port *port = self->port;
    long code;
    Py_BEGIN_ALLOW_THREADS
    code = self->call(port, limit);
    Py_END_ALLOW_THREADS
    return code;
}

/* Wait at most so many seconds; negative: for ever. */
static int wait(PyObject *driver, double seconds)
{
    IocpTurns *self = (IocpTurns *)driver;
    long long limit = -1;
    long code;
    self->waits++;
    if (self->port == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "the driver has no port");
        return -1;
    }
    if (self->next < self->port->count) /* an exception has ended the dispatch: it goes on first */
        return 0;
    if (!(seconds < 0)) {
        double ns = seconds * 1e9;
        limit = ns < LONGEST_NS ? (long long)ns : (long long)LONGEST_NS;
    }
    self->next = self->port->count = 0;
    WRITE(self->sleeping, 1);
    FENCE();
    int work = limit == 0 ? 1 : busy(self);
    if (work < 0) {
        WRITE(self->sleeping, 0);
        return -1;
    }
    code = work ? self->call(self->port, 0) : block(self, limit);
    WRITE(self->sleeping, 0);
    if (code) {
        PyErr_SetExcFromWindowsErr(PyExc_OSError, (int)code);
        return -1;
    }
    return 0;
}

static PyObject *iocp_turns_wait(PyObject *self, PyObject *timeout)
{
    double seconds = -1;
    if (timeout != Py_None) {
        seconds = PyFloat_AsDouble(timeout);
        if (seconds == -1.0 && PyErr_Occurred())
            return NULL;
        if (seconds < 0)
            seconds = 0;
    }
    if (wait(self, seconds) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Submissions
 * ------------------------------------------------------------------------------------------------------------------ */

/* self._at_once.append((sub, count, code)): for the next dispatch. */
static int add_at_once(IocpTurns *self, PyObject *sub, unsigned long count, long code)
{
    PyObject *entry = Py_BuildValue("(Okl)", sub, count, code);
    PyObject *done = entry == NULL ? NULL : PyObject_CallMethodOneArg(self->at_once, names.append, entry);
    Py_XDECREF(entry);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* A slot of the pool, or None if all are lent. */
static PyObject *take_slot(IocpTurns *self)
{
    PyObject *list = SLOT(self->slots, at.free); /* borrowed */
    Py_ssize_t count = list == NULL ? 0 : PyList_GET_SIZE(list);
    if (count == 0) /* the pool may make some more */
        return PyObject_CallMethodNoArgs(self->slots, names.take);
    PyObject *slot = Py_NewRef(PyList_GET_ITEM(list, count - 1));
    if (PyList_SetSlice(list, count - 1, count, NULL) < 0)
        Py_CLEAR(slot);
    return slot;
}

/* The slot of `sub` may be lent again.  Back in the list before it leaves the submission: it always has an owner. */
static int give_slot_back(IocpTurns *self, PyObject *sub)
{
    if (PyList_Append(SLOT(self->slots, at.free), SLOT(sub, at.slot)) < 0)
        return -1;
    set_slot(sub, at.slot, Py_None);
    return 0;
}

static char *address_of_slot(PyObject *slot)
{
    return (char *)PyLong_AsVoidPtr(PyTuple_GET_ITEM(slot, SLOT_ADDRESS));
}

/* Whether the stream `op` is to be armed.  In this order: once it is over, its submission may serve another. */
static int wants_arming(PyObject *op, PyObject *sub)
{
    return SLOT(op, operation_slots.state) == operation_slots.in_flight && SLOT(op, operation_slots.paused) != Py_True
           && SLOT(sub, at.armed) != Py_True;
}

/* As _arm of the driver, for a stream that is in flight and neither armed nor paused: receive again.  That its socket
 * has been closed, so that its number may be another's, is for the driver in Python too. */
static int arm(IocpTurns *self, PyObject *op, PyObject *sub)
{
    PyObject *association = SLOT(sub, at.association), *sock = SLOT(op, operation_slots.handle); /* borrowed */
    PyObject *number = SLOT(op, operation_slots.fd), *address = SLOT(sub, at.address), *slot, *done; /* as these are */
    char *memory = NULL;
    uintptr_t fd = number == NULL ? 0 : (uintptr_t)PyLong_AsVoidPtr(number);
    int is_number = !PyErr_Occurred();
    PyErr_Clear();
    if (!is_number || association == Py_None || SLOT(association, at.emulated) != Py_False || sock == NULL
        || !is_socket(sock) || socket_descriptor(sock) != fd) {
        done = PyObject_CallMethodOneArg((PyObject *)self, names.arm, op);
        Py_XDECREF(done);
        return done == NULL ? -1 : 0;
    }
    int skips = SLOT(association, at.skips) == Py_True;
    iocp_submission *native = PyLong_AsVoidPtr(address);
    if (SLOT(sub, at.small) == Py_True) {
        slot = take_slot(self);
        if (slot == NULL)
            return -1;
        if (slot != Py_None && !wants_arming(op, sub)) {
            /* Making slots ran the garbage collector, and a finalizer has ended the stream. */
            int failed = PyList_Append(SLOT(self->slots, at.free), slot);
            Py_DECREF(slot);
            return failed;
        }
        if (slot != Py_None)
            memory = address_of_slot(slot);
        Py_XSETREF(SLOT(sub, at.slot), slot);
    }
    if (PyDict_SetItem(self->outstanding, address, sub) < 0)
        return -1;
    set_slot(sub, at.armed, Py_True);
    long code = self->receive(fd, native, memory, memory == NULL ? 0 : (unsigned long)at.slot_size);
    if (code == ERROR_IO_PENDING || (code == 0 && !skips))
        return 0;
    if (PyDict_DelItem(self->outstanding, address) < 0)
        return -1;
    return add_at_once(self, sub, code == 0 ? native->bytes : 0, code);
}

/* After a receive of the stream `op` has been delivered.  `more`: its buffer was full, there may be more. */
static int go_on(IocpTurns *self, PyObject *op, PyObject *sub, int more)
{
    if (!wants_arming(op, sub))
        return 0;
    if (!more)
        return arm(self, op, sub);
    set_slot(sub, at.armed, Py_True);
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
    int failed = value == NULL ? -1 : complete_operation(op, value, Py_None);
    self->completions++;
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

/* self._end_with(sub, value, None), or with the error `code`, or with the exception that is set; `value` may be NULL then. */
static int end_stream(IocpTurns *self, PyObject *sub, PyObject *value, int code)
{
    PyObject *error = Py_NewRef(Py_None);
    if (code)
        PyErr_SetExcFromWindowsErr(PyExc_OSError, code);
    if (PyErr_Occurred())
        Py_SETREF(error, take_exception());
    PyObject *done = PyObject_CallMethodObjArgs((PyObject *)self, names.end_with, sub, value == NULL ? Py_None : value,
                                                error, NULL);
    Py_XDECREF(error);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* As _receive_from_slot of the driver, for a stream that is in flight: `count` bytes are here already. */
static int receive_from_slot(IocpTurns *self, PyObject *op, PyObject *sub, Py_ssize_t count)
{
    int full = count == at.slot_size;
    PyObject *data = PyBytes_FromStringAndSize(address_of_slot(SLOT(sub, at.slot)), count);
    if (data == NULL || give_slot_back(self, sub) < 0) {
        Py_XDECREF(data);
        return -1;
    }
    set_slot(sub, at.small, full ? Py_False : Py_True);
    return deliver_some(self, op, sub, data, full);
}

/* recv into what op.get_buffer() provides; the value to complete with, NULL if there is none.  `count` is what recv
 * says, or NOTHING if it was not called. */
enum { NOTHING = -2 };

static PyObject *receive_into(PyObject *op, PyObject *sock, int *count)
{
    PyObject *get_buffer = Py_NewRef(SLOT(op, operation_slots.get_buffer)), *buffer = PyObject_CallNoArgs(get_buffer);
    Py_buffer view;
    int code = 0;
    *count = NOTHING;
    Py_DECREF(get_buffer);
    /* Asking for it may have ended the stream; what there is stays in the socket then. */
    if (buffer != NULL && buffer != Py_None && SLOT(op, operation_slots.state) == operation_slots.in_flight
        && PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE) == 0) {
        *count = recv((SOCKET)socket_descriptor(sock), view.buf, view.len > INT_MAX ? INT_MAX : (int)view.len, 0);
        code = WSAGetLastError();
        PyBuffer_Release(&view);
    }
    Py_XDECREF(buffer);
    WSASetLastError(code); /* for whom SOCKET_ERROR makes ask for it */
    return *count > 0 ? PyLong_FromLong(*count) : NULL;
}

/* As _receive_some of the driver, for a stream that is in flight and not paused: its socket has something. */
static int receive_from_socket(IocpTurns *self, PyObject *op, PyObject *sub)
{
    PyObject *sock = Py_NewRef(SLOT(op, operation_slots.handle)), *value = NULL;
    PyObject *get_buffer = SLOT(op, operation_slots.get_buffer); /* borrowed */
    int lent = get_buffer != NULL && get_buffer != Py_None, count, code = 0, failed;
    if (lent)
        value = receive_into(op, sock, &count);
    else {
        char *memory = scratch();
        count = memory == NULL ? NOTHING : recv((SOCKET)socket_descriptor(sock), memory, SCRATCH_SIZE, 0);
        if (count > 0) {
            set_slot(sub, at.small, count < at.slot_size ? Py_True : Py_False);
            value = PyBytes_FromStringAndSize(memory, count);
        }
    }
    if (count == SOCKET_ERROR)
        code = WSAGetLastError();
    if (PyErr_Occurred())
        failed = ends_the_loop() || SLOT(op, operation_slots.state) != operation_slots.in_flight
                     ? go_on_failing(self, op, sub, 0)
                     : end_stream(self, sub, NULL, 0);
    else if (count > 0)
        failed = deliver_some(self, op, sub, Py_NewRef(value), !lent && count == SCRATCH_SIZE);
    else if (count == NOTHING || code == WSAEWOULDBLOCK || code == WSAEINTR)
        failed = go_on(self, op, sub, 0);
    else {
        value = code ? Py_NewRef(Py_None) : lent ? PyLong_FromLong(0) : PyBytes_FromStringAndSize(NULL, 0);
        failed = end_stream(self, sub, value, code);
    }
    Py_XDECREF(value);
    Py_DECREF(sock);
    return failed;
}

/* As _sent_some of the driver, when all is sent: the last completion of a SendAll. */
static int end_send(IocpTurns *self, PyObject *op, PyObject *sub)
{
    PyObject *buffers = Py_NewRef(SLOT(op, operation_slots.all_buffers));
    PyObject *size = Py_NewRef(SLOT(op, operation_slots.all_size));
    /* Out of its line first: what is freed below may run code that submits another. */
    int failed = PyList_SetSlice(SLOT(SLOT(sub, at.association), at.writing), 0, 1, NULL);
    set_slot(op, operation_slots.all_sent, size);
    if (!failed)
        failed = PyList_SetSlice(buffers, 0, PyList_GET_SIZE(buffers), NULL);
    Py_DECREF(buffers);
    if (!failed) {
        set_slot(sub, at.op, Py_None);
        set_slot(sub, at.association, Py_None);
        set_slot(sub, at.keep, Py_None);
        set_slot(sub, at.finish, at.nobody);
        failed = PyList_Append(self->spare, sub) < 0 || land(op, self->in_flight) < 0
                         || complete(self, op, Py_NewRef(size)) < 0
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
static int sends_the_rest(PyObject *op, PyObject *sub, Py_ssize_t count)
{
    const iocp_submission *native = PyLong_AsVoidPtr(SLOT(sub, at.address));
    if ((PyObject *)Py_TYPE(op) != operation_slots.send_all || native->event || native->wait
        || SLOT(sub, at.slot) != Py_None || Py_SIZE(SLOT(SLOT(sub, at.association), at.writing)) != 1)
        return 0;
    PyObject *buffers = SLOT(op, operation_slots.all_buffers); /* borrowed */
    Py_ssize_t sent = number_in(op, operation_slots.all_sent);
    return buffers != NULL && PyList_CheckExact(buffers) && sent >= 0
           && sent + count == number_in(op, operation_slots.all_size);
}

/* Whether `op` is a stream that can be received for here. */
static int receives(PyObject *op)
{
    return (PyObject *)Py_TYPE(op) == operation_slots.receive_stream
           && SLOT(op, operation_slots.state) == operation_slots.in_flight
           && SLOT(op, operation_slots.handle) != NULL && is_socket(SLOT(op, operation_slots.handle));
}

/* One completion, of a request or of what has waited for this dispatch without one. */
static int finish(IocpTurns *self, PyObject *sub, unsigned long count, long code)
{
    PyObject *op = Py_XNewRef(SLOT(sub, at.op)), *done;
    int failed;
    set_slot(sub, at.armed, Py_False);
    if (op != NULL && code == 0 && receives(op) && (SLOT(sub, at.slot) == Py_None || count > 0)) {
        if (SLOT(sub, at.slot) != Py_None)
            failed = receive_from_slot(self, op, sub, (Py_ssize_t)count);
        else if (SLOT(op, operation_slots.paused) == Py_True)
            failed = 0; /* what there is stays in the socket; resume() asks again */
        else
            failed = receive_from_socket(self, op, sub);
    } else if (op != NULL && code == 0 && sends_the_rest(op, sub, (Py_ssize_t)count))
        failed = end_send(self, op, sub);
    else {
        PyObject *callable = Py_NewRef(SLOT(sub, at.finish));
        PyObject *args[] = {sub, PyLong_FromUnsignedLong(count), PyLong_FromLong(code)};
        done = args[1] == NULL || args[2] == NULL ? NULL : PyObject_Vectorcall(callable, args, 3, NULL);
        Py_XDECREF(args[1]);
        Py_XDECREF(args[2]);
        Py_DECREF(callable);
        Py_XDECREF(done);
        failed = done == NULL ? -1 : 0;
    }
    Py_XDECREF(op);
    return failed;
}

/* The entry of the port for the submission at `address`. */
static int deliver(IocpTurns *self, uintptr_t address, unsigned long count, long code)
{
    PyObject *number = PyLong_FromVoidPtr((void *)address);
    PyObject *sub = number == NULL ? NULL : PyDict_GetItemWithError(self->outstanding, number);
    int failed = PyErr_Occurred() ? -1 : 0; /* one that is not known had failed at once, see _spoiled in Python */
    Py_XINCREF(sub);
    if (sub != NULL)
        failed = PyDict_DelItem(self->outstanding, number) < 0 ? -1 : finish(self, sub, count, code);
    Py_XDECREF(sub);
    Py_XDECREF(number);
    return failed;
}

/* What was done without an entry, and stands in the queue now; what is added meanwhile waits for the next dispatch. */
static int deliver_at_once(IocpTurns *self)
{
    for (Py_ssize_t left = Py_SIZE(self->at_once); left > 0 && has_items(self->at_once); left--) {
        PyObject *entry = PyObject_CallMethodNoArgs(self->at_once, names.popleft), *sub;
        unsigned long count;
        long code;
        int failed = entry == NULL || !PyArg_ParseTuple(entry, "Okl", &sub, &count, &code) ? -1 : 0;
        if (!failed) {
            Py_INCREF(sub);
            failed = finish(self, sub, count, code);
            Py_DECREF(sub);
        }
        Py_XDECREF(entry);
        if (failed && fail((PyObject *)self, names.report, COMPLETE_FAILED) < 0)
            return -1;
    }
    return 0;
}

static int drain_ready(IocpTurns *self)
{
    if (!has_items(self->ready))
        return 0;
    PyObject *done = PyObject_CallMethodNoArgs((PyObject *)self, names.drain_ready);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

static int dispatch(PyObject *driver)
{
    IocpTurns *self = (IocpTurns *)driver;
    if (drain_ready(self) < 0 || (has_items(self->at_once) && deliver_at_once(self) < 0))
        return -1;
    /* The port is looked at each time: what is called may close it. */
    while (self->port != NULL && self->next < self->port->count) {
        const uintptr_t *entry = &self->port->batch[3 * self->next++];
        if (deliver(self, entry[0], (unsigned long)entry[1], (long)entry[2]) < 0
            && fail(driver, names.report, COMPLETE_FAILED) < 0)
            return -1;
    }
    if (self->port != NULL)
        self->next = self->port->count = 0;
    return drain_ready(self);
}

static PyObject *iocp_turns_dispatch(PyObject *self, PyObject *ignored)
{
    if (dispatch(self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* _take_reaped(): take what was reaped and not dispatched away: the addresses of the submissions. */
static PyObject *take_reaped(IocpTurns *self, PyObject *ignored)
{
    PyObject *list = PyList_New(0);
    for (long n = self->next; list != NULL && self->port != NULL && n < self->port->count; n++) {
        PyObject *address = PyLong_FromVoidPtr((void *)self->port->batch[3 * n]);
        if (address == NULL || PyList_Append(list, address) < 0)
            Py_CLEAR(list);
        Py_XDECREF(address);
    }
    if (list != NULL && self->port != NULL)
        self->next = self->port->count = 0;
    return list;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * What the driver in Python reads and writes
 * ------------------------------------------------------------------------------------------------------------------ */

static PyObject *get_port(IocpTurns *self, void *ignored)
{
    if (self->port_object == NULL) {
        PyErr_SetString(PyExc_AttributeError, "_port");
        return NULL;
    }
    return Py_NewRef(self->port_object);
}

/* cffi's pointer to a port.  `_addresses` tells where it is, and where the functions are that we call. */
static int set_port(IocpTurns *self, PyObject *value, void *ignored)
{
    unsigned long long port, wait, receive;
    if (value == NULL) {
        PyErr_SetString(PyExc_AttributeError, "_port");
        return -1;
    }
    PyObject *addresses = PyObject_CallMethod((PyObject *)self, "_addresses", "O", value);
    if (addresses == NULL)
        return -1;
    int parsed = PyArg_ParseTuple(addresses, "KKK", &port, &wait, &receive);
    Py_DECREF(addresses);
    if (!parsed)
        return -1;
    self->port = (iocp_port *)(uintptr_t)port;
    self->call = (wait_function)(uintptr_t)wait;
    self->receive = (receive_function)(uintptr_t)receive;
    self->next = 0;
    Py_XSETREF(self->port_object, Py_NewRef(value));
    return 0;
}

/* Whether dispatch has something to deliver. */
static PyObject *get_gathered(IocpTurns *self, void *ignored)
{
    int reaped = self->port != NULL && self->next < self->port->count;
    return PyBool_FromLong(reaped || has_items(self->ready) || has_items(self->at_once));
}

static int iocp_turns_traverse(IocpTurns *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->port_object);
    Py_VISIT(self->outstanding);
    Py_VISIT(self->at_once);
    Py_VISIT(self->spare);
    Py_VISIT(self->slots);
    Py_VISIT(self->in_flight);
    Py_VISIT(self->submissions);
    Py_VISIT(self->ready);
    Py_VISIT(self->before_sleep);
    return 0;
}

static int iocp_turns_clear(IocpTurns *self)
{
    self->port = NULL;
    Py_CLEAR(self->port_object);
    Py_CLEAR(self->outstanding);
    Py_CLEAR(self->at_once);
    Py_CLEAR(self->spare);
    Py_CLEAR(self->slots);
    Py_CLEAR(self->in_flight);
    Py_CLEAR(self->submissions);
    Py_CLEAR(self->ready);
    Py_CLEAR(self->before_sleep);
    return 0;
}

static void iocp_turns_dealloc(IocpTurns *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    iocp_turns_clear(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyMethodDef iocp_turns_methods[] = {
    {"wait", iocp_turns_wait, METH_O, NULL},
    {"dispatch", iocp_turns_dispatch, METH_NOARGS, NULL},
    {"_take_reaped", (PyCFunction)take_reaped, METH_NOARGS, NULL},
    {"_use_requests", use_requests, METH_VARARGS | METH_STATIC, "Look up the slots of what the driver keeps."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef iocp_turns_members[] = {
    {"_outstanding", T_OBJECT_EX, offsetof(IocpTurns, outstanding), 0, NULL},
    {"_at_once", T_OBJECT_EX, offsetof(IocpTurns, at_once), 0, NULL},
    {"_spare", T_OBJECT_EX, offsetof(IocpTurns, spare), 0, NULL},
    {"_slots", T_OBJECT_EX, offsetof(IocpTurns, slots), 0, NULL},
    {"in_flight", T_OBJECT_EX, offsetof(IocpTurns, in_flight), 0, NULL},
    {"submissions", T_OBJECT_EX, offsetof(IocpTurns, submissions), 0, NULL},
    {"ready", T_OBJECT_EX, offsetof(IocpTurns, ready), 0, NULL},
    {"before_sleep", T_OBJECT, offsetof(IocpTurns, before_sleep), 0, NULL},
    {"waits", T_ULONGLONG, offsetof(IocpTurns, waits), 0, NULL},
    {"completions", T_ULONGLONG, offsetof(IocpTurns, completions), 0, NULL},
    {"_tokens", T_ULONGLONG, offsetof(IocpTurns, tokens), 0, NULL},
    {"_sleeping", T_BOOL, offsetof(IocpTurns, sleeping), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef iocp_turns_getset[] = {
    {"_port", (getter)get_port, (setter)set_port, NULL, NULL},
    {"gathered", (getter)get_gathered, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot iocp_turns_slots[] = {
    {Py_tp_doc, (char *)"The wait and the dispatch of driver iocp."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_dealloc, iocp_turns_dealloc},
    {Py_tp_traverse, iocp_turns_traverse},
    {Py_tp_clear, iocp_turns_clear},
    {Py_tp_methods, iocp_turns_methods},
    {Py_tp_members, iocp_turns_members},
    {Py_tp_getset, iocp_turns_getset},
    {0, NULL},
};

static PyType_Spec iocp_turns_spec = {
    .name = "iocp_loop._hot.IocpTurns",
    .basicsize = sizeof(IocpTurns),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = iocp_turns_slots,
};

int add_iocp(PyObject *module)
{
    IocpTurns_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &iocp_turns_spec, NULL);
    if (IocpTurns_type == NULL)
        return -1;
    static const struct native_driver driver = {&IocpTurns_type, iocp_turns_wait, wait, dispatch, NULL};
    add_native_driver(&driver);
    return PyModule_AddObjectRef(module, "IocpTurns", (PyObject *)IocpTurns_type);
}

#endif
