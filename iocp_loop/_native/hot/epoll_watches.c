/*
 * The watches of driver poll, as the native tier sees them: what stands on a descriptor (class Watch of ports/poll/driver.py),
 * the streams that begin there, and the end of an operation that stands there alone.
 */

#include "epoll.h"

#ifdef __linux__

#include <errno.h>
#include <sys/socket.h>

PyObject *use_watch(PyObject *turns, PyObject *kind)
{
    static const struct slot_place places[] = {PLACE(watch, events), PLACE(watch, readers), PLACE(watch, stream),
                                               PLACE(watch, writers)};
    struct hot *hot = driver_hot((PyTypeObject *)turns);
    if (FIND_SLOTS(hot, kind, places) < 0)
        return NULL;
    Py_XSETREF(hot->kinds.watch, Py_NewRef(kind));
    Py_RETURN_NONE;
}

PyObject *watch_of(EpollTurns *self, descriptor fd)
{
    PyObject *number = PyLong_FromLong(fd);
    PyObject *watch = number == NULL || self->watches == NULL ? NULL : find(self->watches, number);
    Py_XDECREF(number);
    return watch;
}

PyObject *lone_operation(const struct hot *hot, PyObject *watch)
{
    PyObject *readers = SLOT(watch, hot->watch.readers), *writers = SLOT(watch, hot->watch.writers); /* borrowed */
    if (readers == NULL || writers == NULL || PyTuple_GET_SIZE(readers) + PyTuple_GET_SIZE(writers) != 1)
        return NULL;
    return Py_NewRef(PyTuple_GET_ITEM(PyTuple_GET_SIZE(readers) ? readers : writers, 0));
}

PyObject *watch_stream_of(const struct hot *hot, PyObject *watch)
{
    return take_reference(watch, &SLOT(watch, hot->watch.stream));
}

int epoll_busy(Driver *driver, descriptor fd, int writing)
{
    EpollTurns *self = (EpollTurns *)driver;
    const struct hot *hot = driver->hot;
    PyObject *op = writing ? NULL : waiting_on(self, fd, 0), *watch;
    if (op != NULL) {
        Py_DECREF(op);
        return 1;
    }
    watch = watch_of(self, fd);
    if (watch == NULL)
        return PyErr_Occurred() ? -1 : 0;
    PyObject *queue = take_reference(watch, &SLOT(watch, writing ? hot->watch.writers : hot->watch.readers));
    int busy = has_items(queue);
    Py_XDECREF(queue);
    Py_DECREF(watch);
    return busy;
}

PyObject *epoll_busy_method(EpollTurns *self, PyObject *const *args, Py_ssize_t count)
{
    long fd = count == 2 ? PyLong_AsLong(args[0]) : -1, direction = count == 2 ? PyLong_AsLong(args[1]) : -1;
    if (count != 2 && !PyErr_Occurred())
        PyErr_SetString(PyExc_TypeError, "busy() takes a descriptor and a direction");
    if (PyErr_Occurred())
        return NULL;
    int busy = epoll_busy(&self->driver, (descriptor)fd, direction != EPOLLIN);
    return busy < 0 ? NULL : PyBool_FromLong(busy);
}

int epoll_dispatch_other(EpollTurns *self, PyObject *watch, struct epoll_event event)
{
    PyObject *done = PyObject_CallMethod((PyObject *)self, "_dispatch_other", "iOI", event.data.fd, watch,
                                         (unsigned)event.events);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

int epoll_submit_receive(Driver *driver, PyObject *op, descriptor fd, size_t size)
{
    EpollTurns *self = (EpollTurns *)driver;
    if (op == NULL) { /* where something else stands on the descriptor, the driver in Python sees to it */
        PyObject *watch = watch_of(self, fd);
        int free = watch == NULL && !PyErr_Occurred() && self->fd >= 0 && !self->unarmed;
        Py_XDECREF(watch);
        return free;
    }
    int busy = epoll_busy(driver, fd, 0);
    if (busy > 0) /* since the question: it waits behind */
        return launch(driver, op) < 0 || driver_call(driver, driver->hot->names.wait_again, op) < 0 ? -1 : 1;
    return busy < 0 || waits_add(self, op, fd) < 0 ? -1 : 1;
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
    struct hot *hot = self->driver.hot;
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "receive_stream() takes a socket and two callables");
        return NULL;
    }
    *fd = is_socket(hot, args[0]) && is_stream_socket(args[0]) ? socket_descriptor(args[0]) : NO_DESCRIPTOR;
    if (*fd == NO_DESCRIPTOR || !is_free(self, *fd))
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    PyObject *op = new_operation(hot, hot->kinds.receive_stream, args[0], *fd, args[1]);
    if (op != NULL) {
        SLOT(op, hot->operation.get_buffer) = Py_NewRef(args[2]);
        SLOT(op, hot->operation.paused) = Py_NewRef(Py_False);
    }
    return op;
}

/* The watch of a new stream, in the table. */
static int add_watch(EpollTurns *self, PyObject *op, PyObject *number, unsigned events)
{
    const struct hot *hot = self->driver.hot;
    PyTypeObject *type = (PyTypeObject *)hot->kinds.watch;
    PyObject *watch = type->tp_alloc(type, 0);
    if (watch == NULL)
        return -1;
    int receives = (PyObject *)Py_TYPE(op) == hot->kinds.receive_stream;
    SLOT(watch, hot->watch.events) = PyLong_FromUnsignedLong(events);
    SLOT(watch, hot->watch.readers) = events & EPOLLIN ? PyTuple_Pack(1, op) : PyTuple_New(0);
    SLOT(watch, hot->watch.writers) = events & EPOLLOUT ? PyTuple_Pack(1, op) : PyTuple_New(0);
    SLOT(watch, hot->watch.stream) = Py_NewRef(receives ? op : Py_None);
    int failed = SLOT(watch, hot->watch.events) == NULL || SLOT(watch, hot->watch.readers) == NULL
                 || SLOT(watch, hot->watch.writers) == NULL || PySet_Add(self->fresh, number) < 0 || PyDict_SetItem(self->watches, number, watch) < 0;
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
    if (launch(&self->driver, op) < 0
        || add_watch(self, op, SLOT(op, self->driver.hot->operation.fd), events) < 0) {
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
PyObject *epoll_readiness_stream(EpollTurns *self, PyObject *args)
{
    struct hot *hot = self->driver.hot;
    PyObject *handle, *deliver;
    int fd;
    unsigned events;
    if (!PyArg_ParseTuple(args, "OiIO", &handle, &fd, &events, &deliver))
        return NULL;
    if (self->fd < 0 || self->unarmed || !is_free(self, fd))
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    PyObject *op = new_operation(hot, hot->kinds.readiness_stream, handle, fd, deliver);
    if (op == NULL)
        return NULL;
    SLOT(op, hot->operation.events) = PyLong_FromUnsignedLong(events);
    if (SLOT(op, hot->operation.events) == NULL) {
        Py_DECREF(op);
        return NULL;
    }
    return watch_stream(self, op, fd, events);
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Cancelling
 * ------------------------------------------------------------------------------------------------------------------ */

/* The error of an operation that was cancelled. */
PyObject *cancelled_error(void)
{
    return PyObject_CallFunction(PyExc_OSError, "is", ECANCELED, strerror(ECANCELED));
}

/* Whether `op` is all that waits on a descriptor, in one direction or both. */
static int is_alone(const struct hot *hot, PyObject *watch, PyObject *op)
{
    PyObject *queues[] = {SLOT(watch, hot->watch.readers), SLOT(watch, hot->watch.writers)}; /* borrowed */
    Py_ssize_t found = 0;
    for (int n = 0; n < 2; n++) {
        Py_ssize_t size = queues[n] == NULL ? 0 : PyTuple_GET_SIZE(queues[n]);
        if (size > 1 || (size == 1 && PyTuple_GET_ITEM(queues[n], 0) != op))
            return 0;
        found += size;
    }
    return found > 0;
}

int land_alone(EpollTurns *self, PyObject *op)
{
    const struct hot *hot = self->driver.hot;
    PyTypeObject *operation = ((PyTypeObject *)hot->kinds.receive_stream)->tp_base;
    if (!PyObject_TypeCheck(op, operation)) {
        PyErr_Format(PyExc_TypeError, "an operation is expected, not %R", op);
        return -1;
    }
    PyObject *number = SLOT(op, hot->operation.fd); /* borrowed */
    PyObject *watch = number == NULL || self->fd < 0 ? NULL : watch_of(self, (descriptor)PyLong_AsLong(number));
    if (watch == NULL || SLOT(op, hot->operation.state) != hot->states.in_flight || !is_alone(hot, watch, op)) {
        Py_XDECREF(watch);
        return PyErr_Occurred() ? -1 : 0;
    }
    int failed = land(&self->driver, op);
    /* Whoever is being served by this watch looks at it once more. */
    Py_XSETREF(SLOT(watch, hot->watch.readers), PyTuple_New(0));
    Py_XSETREF(SLOT(watch, hot->watch.writers), PyTuple_New(0));
    Py_XSETREF(SLOT(watch, hot->watch.events), PyLong_FromLong(0));
    Py_XSETREF(SLOT(watch, hot->watch.stream), Py_NewRef(Py_None));
    Py_DECREF(watch);
    epoll_ctl(self->fd, EPOLL_CTL_DEL, (int)PyLong_AsLong(number), NULL); /* it fails where the file was closed */
    return failed < 0 || PyDict_DelItem(self->watches, number) < 0 ? -1 : 1;
}

/* _cancel_alone(op): end an operation that is in flight, where nothing else waits on its descriptor; whether that is done. */
PyObject *cancel_alone(EpollTurns *self, PyObject *op)
{
    PyObject *error = cancelled_error(), *done = NULL;
    PyObject *completion = error == NULL ? NULL : PyTuple_Pack(3, op, Py_None, error);
    Py_XDECREF(error);
    int landed = completion == NULL ? -1 : land_alone(self, op);
    if (landed > 0)
        done = PyObject_CallMethodOneArg(self->driver.ready, self->driver.hot->names.append, completion);
    Py_XDECREF(completion);
    if (landed < 0 || (landed && done == NULL))
        return NULL;
    Py_XDECREF(done);
    return PyBool_FromLong(landed);
}

/* drop(op): the same, where nobody needs to be told of it.  What stands on the ready queue may be for `op`. */
PyObject *drop_alone(EpollTurns *self, PyObject *op)
{
    if (has_items(self->driver.ready))
        Py_RETURN_FALSE;
    int landed = land_alone(self, op);
    self->driver.completions += landed > 0;
    return landed < 0 ? NULL : PyBool_FromLong(landed);
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Looking ahead
 * ------------------------------------------------------------------------------------------------------------------ */

/* Fetch what the next events will touch.  What is found here is not kept: they may change what stands on a descriptor. */
void look_at_watches(EpollTurns *self)
{
    const struct hot *hot = self->driver.hot;
    PyObject *ops[AHEAD], *watches[AHEAD]; /* borrowed */
    int events = self->count - self->next < AHEAD ? self->count - self->next : AHEAD, found = 0, count = 0;
    for (int n = 0; n < events; n++) {
        PyObject *watch = watch_of(self, self->events[self->next + n].data.fd);
        if (watch == NULL)
            PyErr_Clear();
        else {
            watches[found++] = watch;
            fetch(watch, (size_t)hot->watch.stream + sizeof(PyObject *));
            Py_DECREF(watch); /* the table has it */
        }
    }
    for (int n = 0; n < found; n++) {
        PyObject *stream = SLOT(watches[n], hot->watch.stream);
        if (stream != NULL && stream != Py_None)
            ops[count++] = stream;
    }
    look_ahead(hot, ops, count);
    self->looked_at = self->next + events;
}

#endif
