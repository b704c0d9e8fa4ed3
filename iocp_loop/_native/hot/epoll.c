/*
 * The wait and the dispatch of driver poll on Linux, and its receive.  A class in Python inherits from EpollTurns first
 * and from the driver that is written in Python behind it; ports/poll/driver.py tells how it all works.
 *
 * Nothing here blocks but the wait: a receive on a ready, non-blocking socket is over before another thread could have
 * had the GIL.
 */

#include "epoll.h"

#ifdef __linux__

#include <errno.h>
#include <math.h>
#include <sys/socket.h>
#include <time.h>

PyTypeObject *EpollTurns_type;

/* The slots of the driver's _Watch. */
static struct {
    PyObject *type;
    Py_ssize_t events, readers, stream, writers;
} at;

static PyObject *use_watch(PyObject *ignored, PyObject *type)
{
    at.events = slot_offset(type, "events");
    at.readers = slot_offset(type, "readers");
    at.stream = slot_offset(type, "stream");
    at.writers = slot_offset(type, "writers");
    if (PyErr_Occurred())
        return NULL;
    Py_XSETREF(at.type, Py_NewRef(type));
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Waiting
 * ------------------------------------------------------------------------------------------------------------------ */

/* epoll_wait without the GIL; `limit` in ms, negative for ever. */
static int block(EpollTurns *self, int limit)
{
    int count;
    if (self->contended > 0) {
        self->contended--;
        int64_t until = clock_ns() + LOOK_NS;
        do {
            count = epoll_wait(self->fd, self->events, BATCH, 0);
            if (count != 0)
                return count;
        } while (clock_ns() < until);
    }
    int64_t returned;
    int code;
    Py_BEGIN_ALLOW_THREADS
    count = epoll_wait(self->fd, self->events, BATCH, limit);
    code = errno;
    returned = clock_ns();
    Py_END_ALLOW_THREADS
    errno = code;
    if (clock_ns() - returned > CONTENDED_NS)
        self->contended = CONTENDED_TURNS;
    return count;
}

int epoll_take(EpollTurns *self, int *more)
{
    int count = epoll_wait(self->fd, self->events, BATCH, 0);
    self->next = self->looked_at = 0;
    self->count = count < 0 ? 0 : count;
    *more = count < 0 || count == BATCH; /* who was interrupted knows nothing */
    Py_BEGIN_CRITICAL_SECTION(self);
    for (int n = 0; n < count && !*more; n++) {
        int fd = self->events[n].data.fd;
        *more = fd >= self->sockets_room || self->sockets[fd].op == NULL; /* what is ONESHOT is over */
    }
    Py_END_CRITICAL_SECTION();
    return count;
}

int epoll_before_wait(EpollTurns *self)
{
    self->waits++;
    if (self->next < self->count) /* an exception has ended the dispatch: it goes on first */
        return 1;
    if (self->unarmed) {
        PyObject *done = PyObject_CallMethodNoArgs((PyObject *)self, names.arm_all);
        if (done == NULL)
            return -1;
        Py_DECREF(done);
    }
    return 0;
}

int epoll_must_not_sleep(EpollTurns *self)
{
    if (has_items(self->ready))
        return 1;
    if (self->before_sleep == NULL || self->before_sleep == Py_None)
        return 0;
    PyObject *answer = PyObject_CallNoArgs(self->before_sleep);
    int work = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    return work;
}

/* Wait at most so many seconds; negative: for ever.  Whether there is something to dispatch. */
int epoll_turn_wait(PyObject *driver, double seconds)
{
    EpollTurns *self = (EpollTurns *)driver;
    int limit = -1, count, code, begun = epoll_before_wait(self);
    if (begun)
        return begun;
    if (!(seconds < 0)) {
        double ms = ceil(seconds * 1000); /* rounded up: never early */
        limit = ms <= INT_MAX ? (int)ms : INT_MAX;
    }
    self->next = self->count = self->looked_at = 0;
    WRITE(self->sleeping, 1);
    FENCE();
    int work = limit == 0 ? 1 : epoll_must_not_sleep(self);
    if (work < 0) {
        WRITE(self->sleeping, 0);
        return -1;
    }
    count = work ? epoll_wait(self->fd, self->events, BATCH, 0) : block(self, limit);
    code = errno;
    WRITE(self->sleeping, 0);
    if (count < 0) {
        if (code == EINTR)
            return 0;
        errno = code;
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    self->count = count;
    if (self->fresh != NULL && PySet_Clear(self->fresh) < 0)
        return -1;
    return count > 0 || has_items(self->ready);
}

PyObject *wait_with(PyObject *self, PyObject *timeout, int (*wait)(PyObject *, double))
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

static PyObject *epoll_turns_wait(PyObject *self, PyObject *timeout) { return wait_with(self, timeout, epoll_turn_wait); }

/* ---------------------------------------------------------------------------------------------------------------------
 * Receiving for a stream
 * ------------------------------------------------------------------------------------------------------------------ */

/* One receive of a stream, delivered at once. */
static int receive_once(EpollTurns *self, PyObject *op, int *filled)
{
    PyObject *sock = SLOT(op, operation_slots.handle), *done, *data;  /* `sock` is borrowed */
    PyObject *get_buffer = SLOT(op, operation_slots.get_buffer);      /* borrowed */
    if (sock == NULL || !is_socket(sock)) {
        done = PyObject_CallMethod((PyObject *)self, "_receive_data", "O", op);
        Py_XDECREF(done);
        return done == NULL ? -1 : 0;
    }
    ssize_t count;
    int lent = get_buffer != NULL && get_buffer != Py_None;
    if (lent)
        count = receive_into(op, filled);
    else
        count = receive_bytes(socket_descriptor(sock), SIZE_MAX, &self->expected, &data);
    if (count == NO_BUFFER && !PyErr_Occurred())
        return 0;
    if (count < 0) {
        if (count != NO_BUFFER && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
            return 0;
        if (count != NO_BUFFER)
            PyErr_SetFromErrno(PyExc_OSError);
        else if (ends_the_loop())
            return -1;
        PyObject *error = take_exception();
        done = PyObject_CallMethodObjArgs((PyObject *)self, names.end_stream, op, Py_None, error, NULL);
        Py_XDECREF(error);
        Py_XDECREF(done);
        return done == NULL ? -1 : 0;
    }
    if (lent || count == 0)
        data = lent ? PyLong_FromSsize_t(count) : PyBytes_FromStringAndSize(NULL, 0);
    if (data == NULL)
        return -1;
    int failed;
    if (count == 0) {
        done = PyObject_CallMethodObjArgs((PyObject *)self, names.end_stream, op, data, Py_None, NULL);
        failed = done == NULL ? -1 : 0;
        Py_XDECREF(done);
    } else {
        self->delivered += (size_t)count;
        failed = complete_operation(op, data, Py_None);
    }
    Py_DECREF(data);
    if (failed)
        return -1;
    return count > 0 && self->received != NULL ? self->received(self, op, (size_t)count) : 0;
}

static int receive(EpollTurns *self, PyObject *op)
{
    /* Several times only where nobody else is waiting for his turn. */
    for (int left = self->count == 1 ? RECEIVES_IN_A_TURN : 1; left > 0; left--) {
        int filled = 0;
        if (receive_once(self, op, &filled) < 0)
            return -1;
        if (!filled || SLOT(op, operation_slots.paused) == Py_True
            || SLOT(op, operation_slots.state) != operation_slots.in_flight)
            break;
    }
    return 0;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Receive operations of sock_recv (sockets.c)
 * ------------------------------------------------------------------------------------------------------------------ */

/* Make room for `fd` in the table. */
static int make_room(EpollTurns *self, int fd)
{
    if (fd >= self->sockets_room) {
        int room = self->sockets_room ? self->sockets_room : 64;
        while (room <= fd)
            room *= 2;
        struct socket_watch *sockets = self->sockets;
        PyMem_Resize(sockets, struct socket_watch, (size_t)room);
        if (sockets == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        for (int n = self->sockets_room; n < room; n++)
            sockets[n] = (struct socket_watch){NULL, 0};
        self->sockets = sockets;
        self->sockets_room = room;
    }
    return 0;
}

/* Let the poller tell once that `fd`, for which there is room, is readable. */
static int arm_once(EpollTurns *self, int fd)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT, .data.fd = fd};
    /* The kernel knows better than we do whether this very file is registered. */
    int known = self->sockets[fd].registered;
    if (epoll_ctl(self->fd, known ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event) < 0
        && ((errno != EEXIST && errno != ENOENT)
            || epoll_ctl(self->fd, known ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &event) < 0)) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    self->sockets[fd].registered = 1;
    return 0;
}

/* Wait for `op`, which is in flight, as the driver in Python does. */
static int wait_again(EpollTurns *self, PyObject *op)
{
    PyObject *done = PyObject_CallMethodOneArg((PyObject *)self, names.wait_again, op);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* The Receive that waits on `fd`, or NULL.  `take`: it does not wait there any more. */
static PyObject *waiting_on(EpollTurns *self, int fd, int take)
{
    PyObject *op = NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    if (fd >= 0 && fd < self->sockets_room) {
        op = self->sockets[fd].op;
        if (take)
            self->sockets[fd].op = NULL;
        else
            Py_XINCREF(op);
    }
    Py_END_CRITICAL_SECTION();
    if (op != NULL && SLOT(op, operation_slots.state) != operation_slots.in_flight)
        Py_CLEAR(op);
    return op;
}

/* The watch of a descriptor.  NULL where there is none, or with an exception. */
static PyObject *watch_of(EpollTurns *self, descriptor fd)
{
    PyObject *number = PyLong_FromLong(fd);
    PyObject *watch = number == NULL || self->watches == NULL ? NULL : find(self->watches, number);
    Py_XDECREF(number);
    return watch;
}

int epoll_busy(PyObject *driver, descriptor fd, int writing)
{
    EpollTurns *self = (EpollTurns *)driver;
    PyObject *op = writing ? NULL : waiting_on(self, fd, 0), *watch;
    if (op != NULL) {
        Py_DECREF(op);
        return 1;
    }
    watch = watch_of(self, fd);
    if (watch == NULL)
        return PyErr_Occurred() ? -1 : 0;
    PyObject *queue = take_reference(watch, &SLOT(watch, writing ? at.writers : at.readers));
    int busy = has_items(queue);
    Py_XDECREF(queue);
    Py_DECREF(watch);
    return busy;
}

static PyObject *epoll_turns_busy(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    long fd = count == 2 ? PyLong_AsLong(args[0]) : -1, direction = count == 2 ? PyLong_AsLong(args[1]) : -1;
    if (count != 2 && !PyErr_Occurred())
        PyErr_SetString(PyExc_TypeError, "busy() takes a descriptor and a direction");
    if (PyErr_Occurred())
        return NULL;
    int busy = epoll_busy(self, (descriptor)fd, direction != EPOLLIN);
    return busy < 0 ? NULL : PyBool_FromLong(busy);
}

int epoll_submit_receive(PyObject *driver, PyObject *op, descriptor fd, size_t size)
{
    EpollTurns *self = (EpollTurns *)driver;
    if (op == NULL) { /* where something else stands on the descriptor, the driver in Python sees to it */
        PyObject *watch = watch_of(self, fd);
        int free = watch == NULL && !PyErr_Occurred() && self->fd >= 0 && !self->unarmed;
        Py_XDECREF(watch);
        return free;
    }
    int busy = epoll_busy(driver, fd, 0), failed = busy < 0;
    Py_BEGIN_CRITICAL_SECTION(self);
    if (!busy)
        failed = make_room(self, fd) < 0 || arm_once(self, fd) < 0;
    Py_END_CRITICAL_SECTION();
    if (failed || launch(op, ++self->tokens, self->in_flight, self->submissions) < 0)
        return -1;
    if (busy) /* since the question: it waits behind */
        return wait_again(self, op) < 0 ? -1 : 1;
    PyObject *before;
    Py_BEGIN_CRITICAL_SECTION(self);
    before = self->sockets[fd].op;
    self->sockets[fd].op = Py_NewRef(op);
    Py_END_CRITICAL_SECTION();
    Py_XDECREF(before);
    return 1;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Beginning a stream
 * ------------------------------------------------------------------------------------------------------------------ */

/* Whether nothing waits on `fd`; 0 with an exception if that can't be told. */
static int is_free(EpollTurns *self, int fd)
{
    PyObject *watch = watch_of(self, fd);
    int free = fd >= 0 && watch == NULL && !PyErr_Occurred();
    Py_XDECREF(watch);
    Py_BEGIN_CRITICAL_SECTION(self);
    if (free && fd < self->sockets_room) {
        free = self->sockets[fd].op == NULL;
        if (free)
            self->sockets[fd].registered = 0; /* the registration is a stream's from here on, or that of nobody */
    }
    Py_END_CRITICAL_SECTION();
    return free;
}

PyObject *epoll_new_stream(EpollTurns *self, PyObject *const *args, Py_ssize_t count, int *fd)
{
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "receive_stream() takes a socket and two callables");
        return NULL;
    }
    *fd = is_socket(args[0]) && is_stream_socket(args[0]) ? socket_descriptor(args[0]) : NO_DESCRIPTOR;
    if (*fd == NO_DESCRIPTOR || !is_free(self, *fd))
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    PyObject *op = new_operation(operation_slots.receive_stream, args[0], *fd, args[1]);
    if (op != NULL) {
        SLOT(op, operation_slots.get_buffer) = Py_NewRef(args[2]);
        SLOT(op, operation_slots.paused) = Py_NewRef(Py_False);
    }
    return op;
}

/* The watch of a new stream, in the table. */
static int add_watch(EpollTurns *self, PyObject *op, PyObject *number, unsigned events)
{
    PyTypeObject *type = (PyTypeObject *)at.type;
    PyObject *watch = type->tp_alloc(type, 0);
    if (watch == NULL)
        return -1;
    int receives = (PyObject *)Py_TYPE(op) == operation_slots.receive_stream;
    SLOT(watch, at.events) = PyLong_FromUnsignedLong(events);
    SLOT(watch, at.readers) = events & EPOLLIN ? PyTuple_Pack(1, op) : PyTuple_New(0);
    SLOT(watch, at.writers) = events & EPOLLOUT ? PyTuple_Pack(1, op) : PyTuple_New(0);
    SLOT(watch, at.stream) = Py_NewRef(receives ? op : Py_None);
    int failed = SLOT(watch, at.events) == NULL || SLOT(watch, at.readers) == NULL || SLOT(watch, at.writers) == NULL
                 || PySet_Add(self->fresh, number) < 0 || PyDict_SetItem(self->watches, number, watch) < 0;
    Py_DECREF(watch);
    return failed ? -1 : 0;
}

/* Watch for a new stream, alone on its descriptor, and put it in flight.  Takes `op` over, and gives it back; or None, where
 * the way in Python tells what is wrong. */
static PyObject *watch_stream(EpollTurns *self, PyObject *op, int fd, unsigned events)
{
    struct epoll_event event = {.events = events, .data.fd = fd};
    if (epoll_ctl(self->fd, EPOLL_CTL_ADD, fd, &event) < 0
        && (errno != EEXIST || epoll_ctl(self->fd, EPOLL_CTL_MOD, fd, &event) < 0)) {
        Py_DECREF(op);
        Py_RETURN_NONE;
    }
    if (launch(op, ++self->tokens, self->in_flight, self->submissions) < 0
        || add_watch(self, op, SLOT(op, operation_slots.fd), events) < 0) {
        epoll_ctl(self->fd, EPOLL_CTL_DEL, fd, NULL);
        Py_CLEAR(op);
    }
    return op;
}

PyObject *epoll_receive_stream(EpollTurns *self, PyObject *const *args, Py_ssize_t count)
{
    int fd;
    if (self->fd < 0 || self->unarmed)
        Py_RETURN_NONE;
    PyObject *op = epoll_new_stream(self, args, count, &fd);
    return op == NULL || op == Py_None ? op : watch_stream(self, op, fd, EPOLLIN);
}

/* readiness_stream(handle, fd, events, deliver): submit a ReadinessStream, as receive_stream does its kind. */
static PyObject *readiness_stream(EpollTurns *self, PyObject *args)
{
    PyObject *handle, *deliver;
    int fd;
    unsigned events;
    if (!PyArg_ParseTuple(args, "OiIO", &handle, &fd, &events, &deliver))
        return NULL;
    if (self->fd < 0 || self->unarmed || !is_free(self, fd))
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    PyObject *op = new_operation(operation_slots.readiness_stream, handle, fd, deliver);
    if (op == NULL)
        return NULL;
    SLOT(op, operation_slots.events) = PyLong_FromUnsignedLong(events);
    if (SLOT(op, operation_slots.events) == NULL) {
        Py_DECREF(op);
        return NULL;
    }
    return watch_stream(self, op, fd, events);
}

/* The error of an operation that was cancelled. */
PyObject *cancelled_error(void)
{
    return PyObject_CallFunction(PyExc_OSError, "is", ECANCELED, strerror(ECANCELED));
}

/* Whether `op` is all that waits on a descriptor, in one direction or both. */
static int is_alone(PyObject *watch, PyObject *op)
{
    PyObject *queues[] = {SLOT(watch, at.readers), SLOT(watch, at.writers)}; /* borrowed */
    Py_ssize_t found = 0;
    for (int n = 0; n < 2; n++) {
        Py_ssize_t size = queues[n] == NULL ? 0 : PyTuple_GET_SIZE(queues[n]);
        if (size > 1 || (size == 1 && PyTuple_GET_ITEM(queues[n], 0) != op))
            return 0;
        found += size;
    }
    return found > 0;
}

/* _cancel_alone(op): end an operation that is in flight, where nothing else waits on its descriptor; whether that is done. */
static PyObject *cancel_alone(EpollTurns *self, PyObject *op)
{
    PyObject *number = SLOT(op, operation_slots.fd); /* borrowed, as `watch` is at first */
    PyObject *watch = number == NULL ? NULL : PyDict_GetItemWithError(self->watches, number);
    if (watch == NULL || self->fd < 0 || SLOT(op, operation_slots.state) != operation_slots.in_flight
        || !is_alone(watch, op))
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_False);
    PyObject *error = cancelled_error(), *completion, *done = NULL;
    completion = error == NULL ? NULL : PyTuple_Pack(3, op, Py_None, error);
    Py_XDECREF(error);
    if (completion == NULL)
        return NULL;
    Py_INCREF(watch);
    if (land(op, self->in_flight) == 0)
        done = PyObject_CallMethodOneArg(self->ready, names.append, completion);
    Py_DECREF(completion);
    /* Whoever is being served by this watch looks at it once more. */
    Py_XSETREF(SLOT(watch, at.readers), PyTuple_New(0));
    Py_XSETREF(SLOT(watch, at.writers), PyTuple_New(0));
    Py_XSETREF(SLOT(watch, at.events), PyLong_FromLong(0));
    Py_XSETREF(SLOT(watch, at.stream), Py_NewRef(Py_None));
    epoll_ctl(self->fd, EPOLL_CTL_DEL, (int)PyLong_AsLong(number), NULL); /* it fails where the file was closed */
    if (done != NULL && PyDict_DelItem(self->watches, number) < 0)
        Py_CLEAR(done);
    Py_DECREF(watch);
    if (done == NULL)
        return NULL;
    Py_DECREF(done);
    Py_RETURN_TRUE;
}

/* The socket behind `fd` is ready. */
static int receive_for_wait(EpollTurns *self, int fd)
{
    PyObject *op = waiting_on(self, fd, 1);
    if (op == NULL)
        return 0; /* nobody waits: the next who does looks first */
    PyObject *data = receive_for(op);
    if (data == Py_None) { /* somebody else was faster: wait again, as the driver waits for whatever is not plain */
        int failed = wait_again(self, op);
        Py_DECREF(data);
        Py_DECREF(op);
        return failed;
    }
    self->completions++;
    if (data != NULL)
        self->delivered += (size_t)PyBytes_GET_SIZE(data);
    int failed = deliver_received(op, self->in_flight, data);
    Py_XDECREF(data);
    Py_DECREF(op);
    return failed;
}

/* Whether the poller may know `fd` by such a wait. */
static int is_registered(EpollTurns *self, int fd)
{
    int registered;
    Py_BEGIN_CRITICAL_SECTION(self);
    registered = fd < self->sockets_room && self->sockets[fd].registered;
    Py_END_CRITICAL_SECTION();
    return registered;
}

/* _take_socket_wait(fd): the Receive that waits there, which the caller takes over, or None.  The registration is
 * forgotten too; the poller may still have it. */
static PyObject *take_socket_wait(EpollTurns *self, PyObject *number)
{
    int fd = (int)PyLong_AsLong(number);
    if (fd == -1 && PyErr_Occurred())
        return NULL;
    PyObject *op = waiting_on(self, fd, 1);
    Py_BEGIN_CRITICAL_SECTION(self);
    if (fd >= 0 && fd < self->sockets_room)
        self->sockets[fd].registered = 0;
    Py_END_CRITICAL_SECTION();
    return op == NULL ? Py_NewRef(Py_None) : op;
}

/* _socket_waits(): the descriptors on which one waits. */
static PyObject *socket_waits(EpollTurns *self, PyObject *ignored)
{
    PyObject *list = PyList_New(0);
    for (int fd = 0; list != NULL && fd < self->sockets_room; fd++) {
        PyObject *op = waiting_on(self, fd, 0), *number = op == NULL ? NULL : PyLong_FromLong(fd);
        if (op != NULL && (number == NULL || PyList_Append(list, number) < 0))
            Py_CLEAR(list);
        Py_XDECREF(number);
        Py_XDECREF(op);
    }
    return list;
}

static void forget_sockets(EpollTurns *self)
{
    for (int fd = 0; fd < self->sockets_room; fd++) {
        self->sockets[fd].registered = 0;
        put_reference((PyObject *)self, &self->sockets[fd].op, NULL);
    }
}

/* The poller is being closed, and its descriptor will soon be something else. */
static PyObject *forget_poller(EpollTurns *self, PyObject *ignored)
{
    self->fd = -1;
    self->next = self->count = self->looked_at = 0;
    Py_RETURN_NONE;
}

/* The driver is closed. */
static PyObject *forget_socket_waits(EpollTurns *self, PyObject *ignored)
{
    forget_sockets(self);
    Py_RETURN_NONE;
}

/* The operation that waits alone on a descriptor, in one direction; NULL if none does. */
static PyObject *lone_operation(PyObject *watch)
{
    PyObject *readers = SLOT(watch, at.readers), *writers = SLOT(watch, at.writers); /* borrowed */
    if (readers == NULL || writers == NULL || PyTuple_GET_SIZE(readers) + PyTuple_GET_SIZE(writers) != 1)
        return NULL;
    return Py_NewRef(PyTuple_GET_ITEM(PyTuple_GET_SIZE(readers) ? readers : writers, 0));
}

/* Tell a ReadinessStream what holds, unless the event is that of an earlier file with the same number. */
static int tell(EpollTurns *self, PyObject *op, unsigned held)
{
    /* A hang-up or an error counts as each of the two. */
    held = (held & ~(unsigned)EPOLLOUT ? EPOLLIN : 0) | (held & ~(unsigned)EPOLLIN ? EPOLLOUT : 0);
    unsigned events = held & (unsigned)PyLong_AsUnsignedLong(SLOT(op, operation_slots.events));
    int fresh = PySet_Contains(self->fresh, SLOT(op, operation_slots.fd));
    if (fresh || !events)
        return fresh < 0 ? -1 : 0;
    PyObject *value = PyLong_FromUnsignedLong(events);
    self->completions++;
    int failed = value == NULL ? -1 : complete_operation(op, value, Py_None);
    Py_XDECREF(value);
    return failed;
}

static int deliver(EpollTurns *self, struct epoll_event event)
{
    int fd = event.data.fd, failed;
    PyObject *watch = watch_of(self, fd), *stream, *done, *alone = NULL;
    if (watch == NULL && PyErr_Occurred())
        return -1;
    if (watch == NULL && is_registered(self, fd))
        return receive_for_wait(self, fd);
    if (watch == NULL)
        watch = Py_NewRef(Py_None);
    stream = watch == Py_None ? NULL : take_reference(watch, &SLOT(watch, at.stream));
    if (event.events == EPOLLIN && stream != NULL && stream != Py_None) {
        self->completions++;
        failed = receive(self, stream);
    } else if ((alone = watch == Py_None ? NULL : lone_operation(watch)) != NULL
               && (PyObject *)Py_TYPE(alone) == operation_slots.readiness_stream) {
        failed = tell(self, alone, event.events);
    } else if (alone != NULL && (PyObject *)Py_TYPE(alone) == operation_slots.accept_stream) {
        done = PyObject_CallMethodOneArg((PyObject *)self, names.accept_some, alone);
        Py_XDECREF(done);
        failed = done == NULL ? -1 : 0;
    } else {
        done = PyObject_CallMethod((PyObject *)self, "_dispatch_other", "iOI", fd, watch, (unsigned)event.events);
        Py_XDECREF(done);
        failed = done == NULL ? -1 : 0;
    }
    Py_XDECREF(alone);
    Py_XDECREF(stream);
    Py_DECREF(watch);
    return failed;
}

int epoll_drain_ready(EpollTurns *self)
{
    if (!has_items(self->ready))
        return 0;
    PyObject *done = PyObject_CallMethodNoArgs((PyObject *)self, names.drain_ready);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* Fetch what the next events will touch.  What is found here is not kept: they may change what stands on a descriptor. */
static void look(EpollTurns *self)
{
    PyObject *ops[AHEAD], *watches[AHEAD]; /* borrowed */
    int events = self->count - self->next < AHEAD ? self->count - self->next : AHEAD, found = 0, count = 0;
    for (int n = 0; n < events; n++) {
        PyObject *watch = watch_of(self, self->events[self->next + n].data.fd);
        if (watch == NULL)
            PyErr_Clear();
        else {
            watches[found++] = watch;
            fetch(watch, (size_t)at.stream + sizeof(PyObject *));
            Py_DECREF(watch); /* the table has it */
        }
    }
    for (int n = 0; n < found; n++) {
        PyObject *stream = SLOT(watches[n], at.stream);
        if (stream != NULL && stream != Py_None)
            ops[count++] = stream;
    }
    look_ahead(ops, count);
    self->looked_at = self->next + events;
}

int epoll_deliver(EpollTurns *self)
{
    while (self->next < self->count && self->delivered < DELIVER_MOST) {
        if (self->next >= self->looked_at)
            look(self);
        if (deliver(self, self->events[self->next++]) < 0 && fail((PyObject *)self, names.report, COMPLETE_FAILED) < 0)
            return -1;
    }
    return 0;
}

static int dispatch(PyObject *driver)
{
    EpollTurns *self = (EpollTurns *)driver;
    if (epoll_drain_ready(self) < 0)
        return -1;
    self->delivered = 0;
    if (epoll_deliver(self) < 0)
        return -1;
    return epoll_drain_ready(self);
}

static PyObject *epoll_turns_dispatch(PyObject *self, PyObject *ignored)
{
    if (dispatch(self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The type
 * ------------------------------------------------------------------------------------------------------------------ */

static PyObject *epoll_turns_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    EpollTurns *self = (EpollTurns *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->fd = -1;
    return (PyObject *)self;
}

int epoll_turns_traverse(EpollTurns *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->watches);
    Py_VISIT(self->fresh);
    Py_VISIT(self->in_flight);
    Py_VISIT(self->submissions);
    for (int n = 0; n < self->sockets_room; n++)
        Py_VISIT(self->sockets[n].op);
    Py_VISIT(self->ready);
    Py_VISIT(self->before_sleep);
    return 0;
}

int epoll_turns_clear(EpollTurns *self)
{
    Py_CLEAR(self->watches);
    Py_CLEAR(self->fresh);
    Py_CLEAR(self->in_flight);
    Py_CLEAR(self->submissions);
    forget_sockets(self);
    Py_CLEAR(self->ready);
    Py_CLEAR(self->before_sleep);
    return 0;
}

void epoll_turns_free(EpollTurns *self)
{
    PyTypeObject *type = Py_TYPE(self);
    epoll_turns_clear(self);
    PyMem_Free(self->sockets);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static void epoll_turns_dealloc(EpollTurns *self)
{
    PyObject_GC_UnTrack(self);
    epoll_turns_free(self);
}

static PyMethodDef epoll_turns_methods[] = {
    {"wait", epoll_turns_wait, METH_O, NULL},
    {"dispatch", epoll_turns_dispatch, METH_NOARGS, NULL},
    {"busy", (PyCFunction)(void (*)(void))epoll_turns_busy, METH_FASTCALL, NULL},
    {"receive_stream", (PyCFunction)(void (*)(void))epoll_receive_stream, METH_FASTCALL, NULL},
    {"readiness_stream", (PyCFunction)readiness_stream, METH_VARARGS, NULL},
    {"_cancel_alone", (PyCFunction)cancel_alone, METH_O, NULL},
    {"_take_socket_wait", (PyCFunction)take_socket_wait, METH_O, NULL},
    {"_socket_waits", (PyCFunction)socket_waits, METH_NOARGS, NULL},
    {"_forget_poller", (PyCFunction)forget_poller, METH_NOARGS, "The poller is being closed."},
    {"_forget_socket_waits", (PyCFunction)forget_socket_waits, METH_NOARGS, "The driver is closed."},
    {"_use_watch", use_watch, METH_O | METH_STATIC, "Look up the slots of what the driver keeps for a descriptor."},
    {NULL, NULL, 0, NULL},
};

/* Whether dispatch has something to deliver. */
static PyObject *get_gathered(EpollTurns *self, void *ignored)
{
    return PyBool_FromLong(self->next < self->count || has_items(self->ready));
}

/* Asked by whoever has put something into a queue; see the fences in hot.h. */
static PyObject *get_sleeping(EpollTurns *self, void *ignored)
{
    FENCE();
    return PyBool_FromLong(READ(self->sleeping));
}

static int set_sleeping(EpollTurns *self, PyObject *value, void *ignored)
{
    WRITE(self->sleeping, value == Py_True);
    return 0;
}

static PyGetSetDef epoll_turns_getset[] = {
    {"_sleeping", (getter)get_sleeping, (setter)set_sleeping, NULL, NULL},
    {"gathered", (getter)get_gathered, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef epoll_turns_members[] = {
    {"_epoll_fd", T_INT, offsetof(EpollTurns, fd), 0, NULL},
    {"_watches", T_OBJECT_EX, offsetof(EpollTurns, watches), 0, NULL},
    {"_new", T_OBJECT_EX, offsetof(EpollTurns, fresh), 0, NULL},
    {"in_flight", T_OBJECT_EX, offsetof(EpollTurns, in_flight), 0, NULL},
    {"submissions", T_OBJECT_EX, offsetof(EpollTurns, submissions), 0, NULL},
    {"_tokens", T_ULONGLONG, offsetof(EpollTurns, tokens), 0, NULL},
    {"ready", T_OBJECT_EX, offsetof(EpollTurns, ready), 0, NULL},
    {"before_sleep", T_OBJECT, offsetof(EpollTurns, before_sleep), 0, NULL},
    {"waits", T_ULONGLONG, offsetof(EpollTurns, waits), 0, NULL},
    {"completions", T_ULONGLONG, offsetof(EpollTurns, completions), 0, NULL},
    {"_unarmed_poller", T_BOOL, offsetof(EpollTurns, unarmed), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot epoll_turns_slots[] = {
    {Py_tp_doc, (char *)"The wait and the dispatch of driver poll, by epoll."},
    {Py_tp_new, epoll_turns_new},
    {Py_tp_dealloc, epoll_turns_dealloc},
    {Py_tp_traverse, epoll_turns_traverse},
    {Py_tp_clear, epoll_turns_clear},
    {Py_tp_methods, epoll_turns_methods},
    {Py_tp_members, epoll_turns_members},
    {Py_tp_getset, epoll_turns_getset},
    {0, NULL},
};

static PyType_Spec epoll_turns_spec = {
    .name = "iocp_loop._hot.EpollTurns",
    .basicsize = sizeof(EpollTurns),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = epoll_turns_slots,
};

int add_epoll(PyObject *module)
{
    EpollTurns_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &epoll_turns_spec, NULL);
    if (EpollTurns_type == NULL)
        return -1;
    static const struct native_driver driver = {&EpollTurns_type, epoll_turns_wait, epoll_turn_wait, dispatch, epoll_submit_receive,
                                                epoll_busy, 1};
    add_native_driver(&driver);
    return PyModule_AddObjectRef(module, "EpollTurns", (PyObject *)EpollTurns_type);
}

#endif
