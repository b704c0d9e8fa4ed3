/*
 * The wait and the dispatch of driver uring.  A class in Python inherits from UringTurns first and from the driver that
 * is written in Python behind it; ports/uring.py tells how it all works.
 *
 * The ring is opened and closed in Python, through cffi; what is called here is the one function of a turn, uring_wait,
 * whose address comes from there.  The batch that it gathers stays in the ring's arrays until the next wait, so that a
 * dispatch which an exception ended goes on where it was.
 */

#include "hot.h"

#ifdef __linux__

#include <errno.h>
#include <math.h>
#include <poll.h>
#include <time.h>

#include "../linux/uring.h"

typedef int (*wait_function)(uring *ring, int64_t timeout_ns, uint64_t taken);
typedef int (*receive_function)(uring *ring, int fd, uint64_t token, uint32_t size);
typedef int (*poll_function)(uring *ring, int fd, uint64_t token, uint32_t events);

typedef struct {
    PyObject_HEAD
    PyObject *ring_object; /* what cffi knows it by; None while there is no ring */
    uring *ring;
    wait_function call;
    receive_function prepare_receive;
    poll_function prepare_poll;
    PyObject *in_flight, *submissions, *ready, *unarmed, *uncancelled, *before_sleep;
    unsigned long long waits, completions, taken, tokens;
    int next, count; /* of the batch: what is dispatched next, and how many there are */
    PyObject *ops[AHEAD]; /* of the completions from `next` on: from `taken_up` to `looked_up`, see look_up */
    int taken_up, looked_up;
    size_t expected; /* bytes in a piece, see receive_bytes */
    size_t delivered; /* bytes in this dispatch */
    char sleeping, shared;
    int contended; /* turns in which other threads are to be reckoned with, see block */
} UringTurns;

static PyTypeObject *UringTurns_type;

/* The longest timeout that is handed to the kernel, ns: about 100 years. */
static const double LONGEST_NS = 3e18;

/* The shortest that is not 0: to wake once for the timers of so long a time is cheaper than to wake for each.  It is a
 * fifth of the millisecond in which epoll, and so most other loops, count. */
enum { SHORTEST_NS = 200000 };

/* ---------------------------------------------------------------------------------------------------------------------
 * Waiting
 * ------------------------------------------------------------------------------------------------------------------ */

/* uring_wait without the GIL; `limit` in ns, negative for ever. */
static int block(UringTurns *self, int64_t limit)
{
    int count;
    uring *ring = self->ring;
    if (self->contended > 0) {
        self->contended--;
        int64_t until = clock_ns() + (limit >= 0 && limit < LOOK_NS ? limit : LOOK_NS);
        do {
            count = self->call(ring, 0, ring->serial);
            if (count != 0)
                return count;
        } while (clock_ns() < until);
    }
    int64_t returned;
    Py_BEGIN_ALLOW_THREADS
    count = self->call(ring, limit, ring->serial);
    returned = clock_ns();
    Py_END_ALLOW_THREADS
    if (clock_ns() - returned > CONTENDED_NS)
        self->contended = CONTENDED_TURNS;
    return count;
}

/* Whether a wait must not block, for there is something to do; -1 with an exception. */
static int busy(UringTurns *self)
{
    int answer = has_items(self->ready) || has_items(self->unarmed) || has_items(self->uncancelled);
    if (!answer && self->before_sleep != NULL && self->before_sleep != Py_None) {
        PyObject *work = PyObject_CallNoArgs(self->before_sleep);
        answer = work == NULL ? -1 : PyObject_IsTrue(work);
        Py_XDECREF(work);
    }
    return answer;
}

static int open_ring(UringTurns *self)
{
    PyObject *done = PyObject_CallMethodNoArgs((PyObject *)self, names.open_ring);
    Py_XDECREF(done);
    if (done != NULL && self->ring == NULL)
        PyErr_SetString(PyExc_RuntimeError, "no ring was opened");
    return done == NULL || self->ring == NULL ? -1 : 0;
}

/* Wait at most so many seconds; negative: for ever. */
static int wait(PyObject *driver, double seconds)
{
    UringTurns *self = (UringTurns *)driver;
    int64_t limit = -1;
    int count;
    self->waits++;
    if (self->next < self->count)
        return 0;
    if (!(seconds < 0)) {
        double ns = ceil(seconds * 1e9);
        limit = ns == 0 ? 0 : ns < SHORTEST_NS ? SHORTEST_NS : ns <= LONGEST_NS ? (int64_t)ns : (int64_t)LONGEST_NS;
    }
    if (self->ring == NULL && open_ring(self) < 0)
        return -1;
    if (limit != 0) {
        self->sleeping = 1;
        int work = busy(self);
        if (work < 0) {
            self->sleeping = 0;
            return -1;
        }
        count = work ? self->call(self->ring, 0, self->ring->serial) : block(self, limit);
        self->sleeping = 0;
    } else
        count = self->call(self->ring, 0, self->ring->serial);
    if (count == -EEXIST) {
        /* The ring belongs to another thread: to one that ran this loop before. */
        if (open_ring(self) < 0)
            return -1;
        count = self->call(self->ring, 0, self->ring->serial);
    }
    if (count < 0) {
        errno = -count;
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    self->next = 0;
    self->count = count;
    self->taken = self->ring->serial;
    self->completions += (unsigned long long)count;
    return 0;
}

static PyObject *uring_turns_wait(PyObject *self, PyObject *timeout)
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
 * Dispatching
 * ------------------------------------------------------------------------------------------------------------------ */

static int call(UringTurns *self, PyObject *method)
{
    PyObject *done = PyObject_CallMethodNoArgs((PyObject *)self, method);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

static int drain_ready(UringTurns *self)
{
    return has_items(self->ready) ? call(self, names.drain_ready) : 0;
}

/* self._reap(op, result, flags, start) */
static PyObject *reap(UringTurns *self, PyObject *op, int64_t result, uint32_t flags, int64_t start)
{
    PyObject *args[] = {(PyObject *)self, op, PyLong_FromLongLong(result), PyLong_FromUnsignedLong(flags),
                        PyLong_FromLongLong(start)};
    PyObject *done = NULL;
    if (args[2] != NULL && args[3] != NULL && args[4] != NULL)
        done = PyObject_VectorcallMethod(names.reap, args, 5, NULL);
    for (int n = 2; n < 5; n++)
        Py_XDECREF(args[n]);
    return done;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Receive operations of sock_recv (sockets.c)
 * ------------------------------------------------------------------------------------------------------------------ */

/* Large pieces are not received by the kernel into its pool, where they would be cut, but by recv, once a poll tells that
 * they have come.  Neither are pieces that could come to more sockets at once than the pool has buffers: a request that
 * finds none left comes back with nothing, and is made again.
 *
 * The pool's buffers, and how many there are (SINGLE_SIZE and SINGLE_COUNT in ../linux/uring.c). */
enum { POOL_PIECE = 32 * 1024, POOL_COUNT = 128 };

/* Whether `op` waits that way: nobody but submit_receive puts True there. */
static int by_poll(PyObject *op)
{
    return SLOT(op, operation_slots.driver_data) == Py_True;
}

static int submit_receive(PyObject *driver, PyObject *op, descriptor fd, size_t size)
{
    UringTurns *self = (UringTurns *)driver;
    if (self->ring == NULL || self->shared)
        return 0;
    if (op == NULL)
        return 1;
    if (launch(op, ++self->tokens, self->in_flight, self->submissions) < 0)
        return -1;
    int code;
    if (pieces_are_large(op) || PyDict_GET_SIZE(self->in_flight) > POOL_COUNT) {
        Py_XSETREF(SLOT(op, operation_slots.driver_data), Py_NewRef(Py_True));
        code = self->prepare_poll(self->ring, fd, self->tokens, POLLIN);
    } else
        code = self->prepare_receive(self->ring, fd, self->tokens, size > POOL_PIECE ? POOL_PIECE : (uint32_t)size);
    if (code < 0 && PyList_Append(self->unarmed, op) < 0)
        return -1;
    return 1;
}

/* The request of a sock_recv has completed: with data, or by a poll. */
static int end_socket_wait(UringTurns *self, PyObject *op, int64_t result, uint32_t flags, int64_t start)
{
    PyObject *sock = SLOT(op, operation_slots.handle), *data; /* `sock` is borrowed */
    if (flags & URING_DATA) {
        data = PyBytes_FromStringAndSize(self->ring->memory + start, (Py_ssize_t)(result - start));
        note_piece(op, (size_t)(result - start));
    } else {
        data = receive_for(op);
        if (data == Py_None && SLOT(op, operation_slots.state) == operation_slots.in_flight) {
            Py_DECREF(data); /* somebody else was faster */
            unsigned long long token = PyLong_AsUnsignedLongLong(SLOT(op, operation_slots.token));
            if (self->prepare_poll(self->ring, socket_descriptor(sock), token, POLLIN) < 0)
                return PyList_Append(self->unarmed, op);
            return 0;
        }
        if (data == Py_None) { /* being cancelled: let the driver say so */
            Py_DECREF(data);
            PyObject *done = reap(self, op, -ECANCELED, 0, 0);
            Py_XDECREF(done);
            return done == NULL ? -1 : 0;
        }
    }
    if (data != NULL && !(flags & URING_DATA))
        self->delivered += (size_t)PyBytes_GET_SIZE(data);
    int failed = deliver_received(op, self->in_flight, data);
    Py_XDECREF(data);
    return failed;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Streams that receive in bulk: by a poll, and recv into one hot buffer
 * ------------------------------------------------------------------------------------------------------------------ */

/* The slots of the driver's _Stream, and the limits that ports/uring.py explains. */
static struct {
    PyObject *type;
    Py_ssize_t armed, bulk, polling, stopping, streak;
} at;

enum { BULK_SIZE = 2 * 1024, BULK_UNTIL = 4 };

static PyObject *use_stream(PyObject *ignored, PyObject *type)
{
    at.armed = slot_offset(type, "armed");
    at.bulk = slot_offset(type, "bulk");
    at.polling = slot_offset(type, "polling");
    at.stopping = slot_offset(type, "stopping");
    at.streak = slot_offset(type, "streak");
    if (PyErr_Occurred())
        return NULL;
    Py_XSETREF(at.type, Py_NewRef(type));
    Py_RETURN_NONE;
}

static int receives_bulk(PyObject *op)
{
    PyObject *stream = SLOT(op, operation_slots.driver_data); /* borrowed */
    return at.type != NULL && (PyObject *)Py_TYPE(op) == operation_slots.receive_stream && stream != NULL
           && (PyObject *)Py_TYPE(stream) == at.type && SLOT(stream, at.polling) == Py_True
           && SLOT(op, operation_slots.handle) != NULL && is_socket(SLOT(op, operation_slots.handle))
           && SLOT(op, operation_slots.paused) != Py_True
           && SLOT(op, operation_slots.state) == operation_slots.in_flight;
}

/* Arm the stream again: another poll, or whatever the driver thinks is right now. */
static int go_on(UringTurns *self, PyObject *op, PyObject *stream)
{
    if (SLOT(stream, at.bulk) == Py_True && SLOT(stream, at.armed) == Py_False && self->ring != NULL
        && SLOT(op, operation_slots.paused) != Py_True
        && SLOT(op, operation_slots.state) == operation_slots.in_flight) {
        unsigned long long token = PyLong_AsUnsignedLongLong(SLOT(op, operation_slots.token));
        long fd = PyLong_AsLong(SLOT(op, operation_slots.fd));
        if (self->prepare_poll(self->ring, (int)fd, token, POLLIN) >= 0) {
            Py_XSETREF(SLOT(stream, at.armed), Py_NewRef(Py_True));
            Py_XSETREF(SLOT(stream, at.stopping), Py_NewRef(Py_False));
            return 0;
        }
    }
    PyObject *done = PyObject_CallMethodOneArg((PyObject *)self, names.go_on, op);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* As go_on, with an exception on its way up: the stream goes on all the same.  -1. */
static int go_on_failing(UringTurns *self, PyObject *op, PyObject *stream)
{
    PyObject *exception = take_exception();
    go_on(self, op, stream);
    PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
    Py_DECREF(exception);
    return -1;
}

/* The stream has ended: with `value` that says so, or with the error in errno. */
static int end_bulk(UringTurns *self, PyObject *op, PyObject *value)
{
    PyObject *error = NULL, *done;
    if (value == NULL) {
        PyErr_SetFromErrno(PyExc_OSError);
        error = take_exception();
    }
    done = PyObject_CallMethodObjArgs((PyObject *)self, names.end, op, value == NULL ? Py_None : value,
                                      error == NULL ? Py_None : error, NULL);
    Py_XDECREF(error);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* As _receive_bulk of the driver: the socket is readable. */
static int receive_bulk_once(UringTurns *self, PyObject *op, int *again)
{
    PyObject *sock = SLOT(op, operation_slots.handle), *get_buffer = SLOT(op, operation_slots.get_buffer); /* borrowed */
    PyObject *stream = Py_NewRef(SLOT(op, operation_slots.driver_data)), *value = NULL, *done;
    ssize_t count;
    int lent = get_buffer != NULL && get_buffer != Py_None, failed = 0, filled = 0;
    Py_XSETREF(SLOT(stream, at.armed), Py_NewRef(Py_False));
    if (lent)
        count = receive_into(sock, get_buffer, &filled);
    else
        count = receive_bytes(socket_descriptor(sock), SIZE_MAX, &self->expected, &value);
    if (count == NO_BUFFER)
        failed = PyErr_Occurred() ? go_on_failing(self, op, stream) : go_on(self, op, stream);
    else if (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
        failed = go_on(self, op, stream);
    else if (count < 0)
        failed = end_bulk(self, op, NULL);
    else {
        if (lent || count == 0)
            value = lent ? PyLong_FromSsize_t(count) : PyBytes_FromStringAndSize(NULL, 0);
        if (value == NULL)
            failed = go_on_failing(self, op, stream);
        else if (count == 0)
            failed = end_bulk(self, op, value);
        else {
            self->delivered += (size_t)count;
            long streak = count < BULK_SIZE ? PyLong_AsLong(SLOT(stream, at.streak)) + 1 : 0;
            if (streak >= BULK_UNTIL) {
                Py_XSETREF(SLOT(stream, at.bulk), Py_NewRef(Py_False));
                streak = 0;
            }
            Py_XSETREF(SLOT(stream, at.streak), PyLong_FromLong(streak));
            PyObject *complete = Py_XNewRef(SLOT(op, operation_slots.complete)), *args[] = {value, Py_None};
            done = complete == NULL ? NULL : PyObject_Vectorcall(complete, args, 2, NULL);
            Py_XDECREF(complete);
            Py_XDECREF(done);
            if (done == NULL)
                failed = go_on_failing(self, op, stream);
            else if (filled && *again && self->ring != NULL && SLOT(op, operation_slots.paused) != Py_True
                     && SLOT(stream, at.armed) == Py_False
                     && SLOT(op, operation_slots.state) == operation_slots.in_flight)
                goto done; /* there may be more */
            else
                failed = go_on(self, op, stream);
        }
    }
    *again = 0;
done:
    Py_XDECREF(value);
    Py_DECREF(stream);
    return failed;
}

static int receive_bulk(UringTurns *self, PyObject *op)
{
    int again;
    for (int left = RECEIVES_IN_A_TURN; left > 0; left--) {
        again = left > 1;
        int failed = receive_bulk_once(self, op, &again);
        if (failed || !again)
            return failed;
    }
    return 0;
}

/* One completion: to the receiver of a stream at once, or else to _reap. */
static int deliver(UringTurns *self, PyObject *op, int64_t result, uint32_t flags, int64_t start)
{
    PyObject *done;
    if (flags & URING_DATA)
        self->delivered += (size_t)(result - start);
    if (flags == (URING_MORE | URING_DATA)) {
        PyObject *data = PyBytes_FromStringAndSize(self->ring->memory + start, (Py_ssize_t)(result - start));
        PyObject *complete = Py_XNewRef(SLOT(op, operation_slots.complete));
        PyObject *args[] = {data, Py_None};
        done = data == NULL || complete == NULL ? NULL : PyObject_Vectorcall(complete, args, 2, NULL);
        Py_XDECREF(complete);
        Py_XDECREF(data);
    } else if (result >= 0 && !(flags & URING_DATA) && receives_bulk(op)) {
        return receive_bulk(self, op);
    } else if ((result >= 0 && !(flags & URING_DATA) && by_poll(op))
               || (flags & URING_DATA && SLOT(op, operation_slots.complete) != NULL
                   && Py_IS_TYPE(SLOT(op, operation_slots.complete), SocketWait_type))) {
        return end_socket_wait(self, op, result, flags, start);
    } else
        done = reap(self, op, result, flags, start);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* Look up the operations of the next completions, and fetch what those will touch.  They may be looked up so early, as
 * none can leave the in-flight table before the last of its completions. */
static int look_up(UringTurns *self, const uring *ring)
{
    int count = self->count - self->next < AHEAD ? self->count - self->next : AHEAD;
    self->looked_up = self->taken_up = 0;
    while (self->looked_up < count) {
        PyObject *number = PyLong_FromUnsignedLongLong(ring->token[self->next + self->looked_up]);
        PyObject *op = number == NULL ? NULL : PyDict_GetItemWithError(self->in_flight, number); /* borrowed */
        if (op == NULL && !PyErr_Occurred())
            PyErr_SetObject(PyExc_KeyError, number);
        Py_XDECREF(number);
        if (op == NULL)
            break;
        self->ops[self->looked_up++] = Py_NewRef(op);
    }
    if (self->looked_up == 0) {
        self->next++;
        return -1;
    }
    PyErr_Clear(); /* it is time to complain when those before have been delivered */
    look_ahead(self->ops, self->looked_up);
    return 0;
}

/* What was looked up will not be delivered from here. */
static void forget_looked_up(UringTurns *self)
{
    while (self->taken_up < self->looked_up)
        Py_DECREF(self->ops[--self->looked_up]);
}

static int dispatch(PyObject *driver)
{
    UringTurns *self = (UringTurns *)driver;
    if (drain_ready(self) < 0)
        return -1;
    self->delivered = 0;
    while (self->next < self->count && self->delivered < DELIVER_MOST) {
        /* Looked up each time: what is called may close the port. */
        uring *ring = self->ring;
        if (ring == NULL)
            break;
        if (self->taken_up == self->looked_up && look_up(self, ring) < 0)
            return -1;
        PyObject *op = self->ops[self->taken_up++];
        int n = self->next++, failed = deliver(self, op, ring->result[n], ring->flags[n], ring->start[n]);
        Py_DECREF(op);
        if (failed)
            return -1;
    }
    if ((has_items(self->unarmed) || has_items(self->uncancelled)) && call(self, names.queue_leftovers) < 0)
        return -1;
    if (drain_ready(self) < 0)
        return -1;
    if (self->shared && self->ring != NULL && call(self, names.hand_over) < 0)
        return -1;
    return 0;
}

static PyObject *uring_turns_dispatch(PyObject *self, PyObject *ignored)
{
    if (dispatch(self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * What the driver in Python reads and writes
 * ------------------------------------------------------------------------------------------------------------------ */

static PyObject *get_ring(UringTurns *self, void *ignored)
{
    return Py_NewRef(self->ring_object == NULL ? Py_None : self->ring_object);
}

/* cffi's pointer to a ring, or None.  `_addresses` tells where it is, and where the functions are that we call. */
static int set_ring(UringTurns *self, PyObject *value, void *ignored)
{
    if (value == NULL || value == Py_None) {
        self->ring = NULL;
        self->next = self->count = 0;
        forget_looked_up(self);
        Py_CLEAR(self->ring_object);
        return 0;
    }
    PyObject *addresses = PyObject_CallMethod((PyObject *)self, "_addresses", "O", value);
    unsigned long long ring, wait, receive, poll;
    if (addresses == NULL)
        return -1;
    int parsed = PyArg_ParseTuple(addresses, "KKKK", &ring, &wait, &receive, &poll);
    Py_DECREF(addresses);
    if (!parsed)
        return -1;
    self->ring = (uring *)(uintptr_t)ring;
    self->call = (wait_function)(uintptr_t)wait;
    self->prepare_receive = (receive_function)(uintptr_t)receive;
    self->prepare_poll = (poll_function)(uintptr_t)poll;
    self->next = self->count = 0;
    forget_looked_up(self);
    Py_XSETREF(self->ring_object, Py_NewRef(value));
    return 0;
}

/* What of the batch is left, as the driver in Python would have it. */
static PyObject *get_batch(UringTurns *self, void *ignored)
{
    PyObject *list = PyList_New(0);
    for (int n = self->next; list != NULL && self->ring != NULL && n < self->count; n++) {
        uring *ring = self->ring;
        PyObject *entry = Py_BuildValue("KLIL", (unsigned long long)ring->token[n], (long long)ring->result[n],
                                        (unsigned)ring->flags[n], (long long)ring->start[n]);
        if (entry == NULL || PyList_Append(list, entry) < 0)
            Py_CLEAR(list);
        Py_XDECREF(entry);
    }
    return list;
}

static int set_batch(UringTurns *self, PyObject *value, void *ignored)
{
    forget_looked_up(self);
    self->next = self->count; /* an empty one is what the constructor brings */
    return 0;
}

static PyObject *get_undispatched(UringTurns *self, void *ignored)
{
    return PyBool_FromLong(self->next < self->count);
}

static int uring_turns_traverse(UringTurns *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->ring_object);
    Py_VISIT(self->in_flight);
    Py_VISIT(self->submissions);
    Py_VISIT(self->ready);
    Py_VISIT(self->unarmed);
    Py_VISIT(self->uncancelled);
    Py_VISIT(self->before_sleep);
    for (int n = self->taken_up; n < self->looked_up; n++)
        Py_VISIT(self->ops[n]);
    return 0;
}

static int uring_turns_clear(UringTurns *self)
{
    Py_CLEAR(self->ring_object);
    Py_CLEAR(self->in_flight);
    Py_CLEAR(self->submissions);
    Py_CLEAR(self->ready);
    Py_CLEAR(self->unarmed);
    Py_CLEAR(self->uncancelled);
    Py_CLEAR(self->before_sleep);
    forget_looked_up(self);
    return 0;
}

static void uring_turns_dealloc(UringTurns *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    uring_turns_clear(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyMethodDef uring_turns_methods[] = {
    {"wait", uring_turns_wait, METH_O, NULL},
    {"dispatch", uring_turns_dispatch, METH_NOARGS, NULL},
    {"_use_stream", use_stream, METH_O | METH_STATIC, "Look up the slots of what the driver keeps for a stream."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef uring_turns_members[] = {
    {"in_flight", T_OBJECT_EX, offsetof(UringTurns, in_flight), 0, NULL},
    {"submissions", T_OBJECT_EX, offsetof(UringTurns, submissions), 0, NULL},
    {"ready", T_OBJECT_EX, offsetof(UringTurns, ready), 0, NULL},
    {"_unarmed", T_OBJECT_EX, offsetof(UringTurns, unarmed), 0, NULL},
    {"_uncancelled", T_OBJECT_EX, offsetof(UringTurns, uncancelled), 0, NULL},
    {"before_sleep", T_OBJECT, offsetof(UringTurns, before_sleep), 0, NULL},
    {"waits", T_ULONGLONG, offsetof(UringTurns, waits), 0, NULL},
    {"completions", T_ULONGLONG, offsetof(UringTurns, completions), 0, NULL},
    {"_tokens", T_ULONGLONG, offsetof(UringTurns, tokens), 0, NULL},
    {"_taken", T_ULONGLONG, offsetof(UringTurns, taken), 0, NULL},
    {"_sleeping", T_BOOL, offsetof(UringTurns, sleeping), 0, NULL},
    {"_shared", T_BOOL, offsetof(UringTurns, shared), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef uring_turns_getset[] = {
    {"_ring", (getter)get_ring, (setter)set_ring, NULL, NULL},
    {"_batch", (getter)get_batch, (setter)set_batch, NULL, NULL},
    {"_undispatched", (getter)get_undispatched, (setter)set_batch, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot uring_turns_slots[] = {
    {Py_tp_doc, (char *)"The wait and the dispatch of driver uring."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_dealloc, uring_turns_dealloc},
    {Py_tp_traverse, uring_turns_traverse},
    {Py_tp_clear, uring_turns_clear},
    {Py_tp_methods, uring_turns_methods},
    {Py_tp_members, uring_turns_members},
    {Py_tp_getset, uring_turns_getset},
    {0, NULL},
};

static PyType_Spec uring_turns_spec = {
    .name = "iocp_loop._hot.UringTurns",
    .basicsize = sizeof(UringTurns),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = uring_turns_slots,
};

int add_uring(PyObject *module)
{
    UringTurns_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &uring_turns_spec, NULL);
    if (UringTurns_type == NULL)
        return -1;
    static const struct native_driver driver = {&UringTurns_type, uring_turns_wait, wait, dispatch, submit_receive};
    add_native_driver(&driver);
    return PyModule_AddObjectRef(module, "UringTurns", (PyObject *)UringTurns_type);
}

#endif
