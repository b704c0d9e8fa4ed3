/*
 * The wait and the dispatch of driver poll on Linux.  A class in Python inherits from EpollTurns first and from the driver
 * that is written in Python behind it; ports/poll/driver.py tells how it all works.
 *
 * Nothing here blocks but the wait: a receive on a ready, non-blocking socket is over before another thread could have
 * had the GIL.
 */

#include "epoll.h"

#ifdef __linux__

#include <errno.h>

#include "accepting.h"
#include "receiving.h"

/* ---------------------------------------------------------------------------------------------------------------------
 * Waiting
 * ------------------------------------------------------------------------------------------------------------------ */

long epoll_gather(Driver *driver, int64_t limit)
{
    EpollTurns *self = (EpollTurns *)driver;
    /* Rounded up, never early; but for the last nanosecond, which is that of the rounding to nanoseconds. */
    int64_t ms = limit < 0 ? -1 : (limit + 999998) / 1000000;
    int count = epoll_wait(self->fd, self->events, BATCH, ms < INT_MAX ? (int)ms : INT_MAX);
    return count < 0 ? -errno : count;
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
    if (self->next < self->count) /* an exception has ended the dispatch: it goes on first */
        return 1;
    return self->unarmed ? driver_call(&self->driver, self->driver.hot->names.arm_all, NULL) : 0;
}

int epoll_wait_for_events(Driver *driver, int64_t limit)
{
    EpollTurns *self = (EpollTurns *)driver;
    int begun = epoll_before_wait(self);
    long count;
    if (begun)
        return begun;
    self->next = self->count = self->looked_at = 0;
    if (wait_as_sleeper(driver, limit, &count) < 0)
        return -1;
    if (count == -EINTR)
        return 0;
    if (count < 0) {
        errno = (int)-count;
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    self->count = (int)count;
    if (self->fresh != NULL && PySet_Clear(self->fresh) < 0)
        return -1;
    return count > 0 || has_items(self->driver.ready);
}

/* The poller is being closed, and its descriptor will soon be something else. */
static PyObject *forget_poller(EpollTurns *self, PyObject *ignored)
{
    self->fd = self->quiet_waker = -1;
    self->next = self->count = self->looked_at = 0;
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Dispatching
 * ------------------------------------------------------------------------------------------------------------------ */

/* The last completion of a stream: a value or an error, of which one is None. */
static int end_stream(EpollTurns *self, PyObject *op, PyObject *value, PyObject *error)
{
    const struct hot *hot = self->driver.hot;
    int landed = land_alone(self, op);
    if (landed) {
        self->driver.completions++;
        return landed < 0 ? -1 : complete_operation(hot, op, value, error);
    }
    PyObject *done = PyObject_CallMethodObjArgs((PyObject *)self, hot->names.end_stream, op, value, error, NULL);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* Receive once for a stream, and deliver that at once.  1 if there may be more, 0, or -1. */
static int receive(EpollTurns *self, PyObject *op)
{
    struct hot *hot = self->driver.hot;
    PyObject *sock = SLOT(op, hot->operation.handle), *value; /* borrowed */
    struct piece piece;
    int failed = 0;
    if (sock == NULL || !is_socket(hot, sock))
        return driver_call(&self->driver, hot->names.receive_data, op);
    switch (receive_for_stream(hot, op, &self->expected, &piece)) {
    case NOTHING:
        return 0;
    case DATA:
        self->driver.delivered += (size_t)piece.size;
        failed = complete_operation(hot, op, piece.value, Py_None);
        break;
    case END:
        failed = end_stream(self, op, piece.value, Py_None);
        break;
    case FAILED:
        if (ends_the_loop())
            return -1;
        value = take_exception();
        failed = end_stream(self, op, Py_None, value);
        Py_DECREF(value);
        return failed;
    }
    Py_DECREF(piece.value);
    if (!failed && piece.size > 0 && self->received != NULL)
        failed = self->received(self, op, (size_t)piece.size);
    return failed ? -1 : piece.filled;
}

static int receive_some(EpollTurns *self, PyObject *op)
{
    const struct hot *hot = self->driver.hot;
    /* Several times only where nobody else is waiting for his turn. */
    int more = 1;
    for (int left = self->count == 1 ? RECEIVES_IN_A_TURN : 1; left > 0 && more > 0; left--) {
        more = receive(self, op);
        if (SLOT(op, hot->operation.paused) == Py_True || SLOT(op, hot->operation.state) != hot->states.in_flight)
            break;
    }
    return more < 0 ? -1 : 0;
}

/* Tell a ReadinessStream what holds, unless the event is that of an earlier file with the same number. */
static int tell(EpollTurns *self, PyObject *op, unsigned held)
{
    const struct hot *hot = self->driver.hot;
    /* A hang-up or an error counts as each of the two. */
    held = (held & ~(unsigned)EPOLLOUT ? EPOLLIN : 0) | (held & ~(unsigned)EPOLLIN ? EPOLLOUT : 0);
    unsigned events = held & (unsigned)PyLong_AsUnsignedLong(SLOT(op, hot->operation.events));
    int fresh = PySet_Contains(self->fresh, SLOT(op, hot->operation.fd));
    if (fresh || !events)
        return fresh < 0 ? -1 : 0;
    PyObject *value = PyLong_FromUnsignedLong(events);
    self->driver.completions++;
    int failed = value == NULL ? -1 : complete_operation(hot, op, value, Py_None);
    Py_XDECREF(value);
    return failed;
}

/* How many connections `op` may accept now: one, and twice as many in each turn that finds more left; what one process leaves,
 * others that share the listener may take.  It is noted for the next turn in one number, as the driver in Python does.  0 with
 * an exception. */
static int burst_of(EpollTurns *self, PyObject *op)
{
    enum { ACCEPTS_IN_A_TURN = 16 };
    const struct hot *hot = self->driver.hot;
    PyObject *before = SLOT(op, hot->operation.driver_data); /* borrowed */
    unsigned long long known = before == NULL || before == Py_None ? 0 : PyLong_AsUnsignedLongLong(before);
    int burst = known / 2 / ACCEPTS_IN_A_TURN == self->driver.waits ? (int)(known % (2 * ACCEPTS_IN_A_TURN)) : 1;
    unsigned long long more = 2 * burst < ACCEPTS_IN_A_TURN ? 2 * (unsigned)burst : ACCEPTS_IN_A_TURN;
    PyObject *next = PyErr_Occurred() ? NULL : PyLong_FromUnsignedLongLong((self->driver.waits + 1) * 2 * ACCEPTS_IN_A_TURN + more);
    if (next == NULL)
        return 0;
    put_reference(op, &SLOT(op, hot->operation.driver_data), next);
    return burst;
}

static int accept_some(EpollTurns *self, PyObject *op)
{
    struct hot *hot = self->driver.hot;
    PyObject *listener = SLOT(op, hot->operation.handle), *error; /* the first is borrowed */
    if (listener == NULL || !is_socket(hot, listener) || !is_stream_socket(listener))
        return driver_call(&self->driver, hot->names.accept_some, op);
    int burst = burst_of(self, op), failed = burst > 0 ? 0 : -1;
    for (; !failed && burst > 0 && SLOT(op, hot->operation.state) != hot->states.done; burst--)
        switch (accept_for_stream(hot, op)) {
        case NONE_LEFT:
            put_reference(op, &SLOT(op, hot->operation.driver_data), Py_NewRef(Py_None));
            return 0;
        case ABORTED:
            return 0;
        case UNHEARD:
            failed = driver_go_on(&self->driver);
        /* fall through */
        case ACCEPTED:
            self->driver.completions++;
            break;
        case NOT_ACCEPTED:
            if (ends_the_loop())
                return -1;
            error = take_exception();
            failed = end_stream(self, op, Py_None, error);
            Py_DECREF(error);
            return failed;
        }
    return failed;
}

static int deliver_to(EpollTurns *self, PyObject *watch, struct epoll_event event)
{
    const struct hot *hot = self->driver.hot;
    PyObject *stream = watch_stream_of(hot, watch), *alone;
    int failed;
    /* The end of a UNIX connection hangs up as well, that of TCP may: for who only receives, that is an end like any other. */
    if (stream != NULL && stream != Py_None
        && (event.events == EPOLLIN || (event.events & EPOLLIN && !has_items(SLOT(watch, hot->watch.writers))))) {
        self->driver.completions++;
        failed = receive_some(self, stream);
        Py_DECREF(stream);
        return failed;
    }
    Py_XDECREF(stream);
    alone = lone_operation(hot, watch);
    if (alone != NULL && (PyObject *)Py_TYPE(alone) == hot->kinds.readiness_stream)
        failed = tell(self, alone, event.events);
    else if (alone != NULL && (PyObject *)Py_TYPE(alone) == hot->kinds.accept_stream)
        failed = accept_some(self, alone);
    else
        failed = epoll_dispatch_other(self, watch, event);
    Py_XDECREF(alone);
    return failed;
}

static int deliver(EpollTurns *self, struct epoll_event event)
{
    int fd = event.data.fd, failed;
    if (fd == self->quiet_waker)
        return 0;
    PyObject *watch = watch_of(self, fd);
    if (watch != NULL) {
        failed = deliver_to(self, watch, event);
        Py_DECREF(watch);
        return failed;
    }
    if (PyErr_Occurred())
        return -1;
    return waits_know(self, fd) ? waits_receive(self, fd) : epoll_dispatch_other(self, Py_None, event);
}

int epoll_deliver(Driver *driver)
{
    EpollTurns *self = (EpollTurns *)driver;
    while (self->next < self->count && driver->delivered < DELIVER_MOST) {
        if (self->next >= self->looked_at && self->count > 1) /* one has nobody to be fetched beside */
            look_at_watches(self);
        if (deliver(self, self->events[self->next++]) < 0 && driver_go_on(driver) < 0)
            return -1;
    }
    return 0;
}

int epoll_is_behind(Driver *driver)
{
    EpollTurns *self = (EpollTurns *)driver;
    return self->next < self->count;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The type
 * ------------------------------------------------------------------------------------------------------------------ */

PyObject *epoll_new(PyTypeObject *type, const struct verbs *verbs)
{
    EpollTurns *self = (EpollTurns *)driver_new(type, verbs);
    if (self != NULL)
        self->fd = self->quiet_waker = -1;
    return (PyObject *)self;
}

static PyObject *epoll_turns_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const struct verbs verbs = {
        .wait = epoll_wait_for_events,
        .gather = epoll_gather,
        .deliver = epoll_deliver,
        .is_behind = epoll_is_behind,
        .submit_receive = epoll_submit_receive,
        .busy = epoll_busy,
        .look_costs = 1,
    };
    return epoll_new(type, &verbs);
}

int epoll_turns_traverse(EpollTurns *self, visitproc visit, void *arg)
{
    Py_VISIT(self->watches);
    Py_VISIT(self->fresh);
    for (int n = 0; n < self->sockets_room; n++)
        Py_VISIT(self->sockets[n].op);
    return driver_traverse(&self->driver, visit, arg);
}

int epoll_turns_clear(EpollTurns *self)
{
    Py_CLEAR(self->watches);
    Py_CLEAR(self->fresh);
    waits_clear(self);
    return driver_clear(&self->driver);
}

void epoll_turns_free(EpollTurns *self)
{
    epoll_turns_clear(self);
    PyMem_Free(self->sockets);
    driver_free(&self->driver);
}

static void epoll_turns_dealloc(EpollTurns *self)
{
    PyObject_GC_UnTrack(self);
    epoll_turns_free(self);
}

static PyMethodDef epoll_turns_methods[] = {
    {"busy", (PyCFunction)(void (*)(void))epoll_busy_method, METH_FASTCALL, NULL},
    {"receive_stream", (PyCFunction)(void (*)(void))epoll_receive_stream, METH_FASTCALL, NULL},
    {"readiness_stream", (PyCFunction)epoll_readiness_stream, METH_VARARGS, NULL},
    {"_cancel_alone", (PyCFunction)cancel_alone, METH_O, NULL},
    {"drop", (PyCFunction)drop_alone, METH_O, NULL},
    {"_take_socket_wait", (PyCFunction)take_socket_wait, METH_O, NULL},
    {"_socket_waits", (PyCFunction)socket_waits, METH_NOARGS, NULL},
    {"_forget_poller", (PyCFunction)forget_poller, METH_NOARGS, "The poller is being closed."},
    {"_forget_socket_waits", (PyCFunction)forget_socket_waits, METH_NOARGS, "The driver is closed."},
    {"_use_watch", use_watch, METH_O | METH_CLASS, "Look up the slots of what the driver keeps for a descriptor."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef epoll_turns_members[] = {
    {"_epoll_fd", T_INT, offsetof(EpollTurns, fd), 0, NULL},
    {"_quiet_waker", T_INT, offsetof(EpollTurns, quiet_waker), 0, NULL},
    {"_watches", T_OBJECT_EX, offsetof(EpollTurns, watches), 0, NULL},
    {"_new", T_OBJECT_EX, offsetof(EpollTurns, fresh), 0, NULL},
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
    {0, NULL},
};

static PyType_Spec epoll_turns_spec = {
    .name = "iocp_loop._hot.EpollTurns",
    .basicsize = sizeof(EpollTurns),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = epoll_turns_slots,
};

int add_epoll(struct hot *hot)
{
    hot->EpollTurns_type = add_type(hot, &epoll_turns_spec, hot->Driver_type);
    return hot->EpollTurns_type == NULL ? -1 : 0;
}

#endif
