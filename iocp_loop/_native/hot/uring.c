/*
 * The wait and the dispatch of driver uring: those of driver poll (epoll.c) with a ring in them.  A class in Python
 * inherits from UringTurns first and from the driver that is written in Python behind it; ports/uring/driver.py tells how it all
 * works.
 *
 * The ring is opened and closed in Python, through cffi; what is called here are the one function of a turn, uring_wait, and
 * those that begin a stream, whose addresses come from there.  The batch that it gathers stays in the ring's arrays until the next wait, so that a
 * dispatch which an exception ended goes on where it was.
 */

#include "epoll.h"

#ifdef __linux__

#include <errno.h>

#include "../linux/uring.h"

typedef int (*wait_function)(uring *ring, int64_t timeout_ns, uint64_t taken);
typedef int (*prepare_function)(uring *ring, int fd, uint64_t token);
typedef int64_t (*cookie_function)(int fd);

typedef struct {
    EpollTurns epoll;
    PyObject *ring_object; /* what cffi knows it by; None while there is no ring */
    uring *ring;
    wait_function call;
    prepare_function prepare; /* uring_prep_receive_stream */
    cookie_function cookie;   /* uring_cookie */
    PyObject *unsubmitted, *uncancelled;
    unsigned long long taken;
    int next, count;      /* of the batch: what is dispatched next, and how many there are */
    PyObject *ops[AHEAD]; /* of the completions from `next` on: from `taken_up` to `looked_up`, see look_up */
    int taken_up, looked_up;
    int reaped; /* what uring_wait has returned */
    char shared, without_ring; /* the driver has none any more: it is driver poll */
} UringTurns;

/* ---------------------------------------------------------------------------------------------------------------------
 * Waiting
 * ------------------------------------------------------------------------------------------------------------------ */

static long gather(Driver *driver, int64_t limit)
{
    UringTurns *self = (UringTurns *)driver;
    uring *ring = self->ring;
    if (self->without_ring)
        return epoll_gather(driver, limit);
    if (ring == NULL) /* closed by what the wait has called, which looks at it once more */
        return 0;
    self->reaped = self->call(ring, limit, ring->serial);
    return self->reaped == 0 ? ring->events_hold : self->reaped;
}

static int has_work(Driver *driver)
{
    UringTurns *self = (UringTurns *)driver;
    return has_items(self->unsubmitted) || has_items(self->uncancelled);
}

static int open_ring(UringTurns *self)
{
    if (driver_call(&self->epoll.driver, self->epoll.driver.hot->names.open_ring, NULL) < 0)
        return -1;
    if (self->ring == NULL && !self->without_ring) {
        PyErr_SetString(PyExc_RuntimeError, "no ring was opened");
        return -1;
    }
    return 0;
}

/* Take the epoll instance's events, if it may have some. */
static int take_events(UringTurns *self)
{
    int count = 0;
    if (self->ring->events_hold) {
        count = epoll_take(&self->epoll, &self->ring->events_hold);
        if (count < 0 && errno != EINTR) {
            PyErr_SetFromErrno(PyExc_OSError);
            return -1;
        }
    }
    return count > 0;
}

/* The ring's part of a wait: at most `limit` ns, negative for ever.  How many completions, or -1. */
static int wait_in_ring(UringTurns *self, int64_t limit)
{
    long ignored;
    self->reaped = 0;
    if (wait_as_sleeper(&self->epoll.driver, limit, &ignored) < 0)
        return -1;
    if (self->ring == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "the port was closed while it began to wait");
        return -1;
    }
    if (self->reaped == -EEXIST) {
        /* The ring belongs to another thread: to one that ran this loop before. */
        if (open_ring(self) < 0)
            return -1;
        self->reaped = 0;
        if (self->ring != NULL)
            gather(&self->epoll.driver, 0);
    }
    if (self->reaped < 0) {
        PyObject *done = PyObject_CallMethod((PyObject *)self, "_ring_failed", "i", -self->reaped);
        Py_XDECREF(done);
        return done == NULL ? -1 : 0;
    }
    return self->reaped;
}

static int wait(Driver *driver, int64_t limit)
{
    UringTurns *self = (UringTurns *)driver;
    if (self->without_ring)
        return epoll_wait_for_events(driver, limit);
    int begun = epoll_before_wait(&self->epoll);
    if (begun || self->next < self->count)
        return begun < 0 ? -1 : 1;
    if (self->ring == NULL && limit == 0 && PyDict_GET_SIZE(driver->in_flight) == 0)
        return has_items(driver->ready); /* a loop that has neither slept nor begun anything needs no ring */
    if (self->ring == NULL && open_ring(self) < 0)
        return -1;
    if (self->ring == NULL)
        return epoll_wait_for_events(driver, limit);
    if (limit > 0 && limit < URING_SHORTEST_NS)
        limit = URING_SHORTEST_NS;
    /* What has been ready stays ready until somebody looks: the ring tells of changes only. */
    self->epoll.next = self->epoll.count = 0;
    if (self->epoll.fresh != NULL && PySet_Clear(self->epoll.fresh) < 0)
        return -1;
    int events = take_events(self);
    if (events < 0)
        return -1;
    int count = wait_in_ring(self, events ? 0 : limit);
    if (count < 0)
        return -1;
    if (self->ring == NULL)
        return epoll_wait_for_events(driver, limit);
    self->next = 0;
    self->count = count;
    self->taken = self->ring->serial;
    self->epoll.driver.completions += (unsigned long long)count;
    if (!events)
        events = take_events(self);
    return events < 0 ? -1 : events || count > 0 || has_items(self->epoll.driver.ready);
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Dispatching
 * ------------------------------------------------------------------------------------------------------------------ */

/* self._reap(op, result, flags, start) */
static int reap(UringTurns *self, PyObject *op, int64_t result, uint32_t flags, int64_t start)
{
    PyObject *args[] = {(PyObject *)self, op, PyLong_FromLongLong(result), PyLong_FromUnsignedLong(flags),
                        PyLong_FromLongLong(start)};
    PyObject *done = NULL;
    if (args[2] != NULL && args[3] != NULL && args[4] != NULL)
        done = PyObject_VectorcallMethod(self->epoll.driver.hot->names.reap, args, 5, NULL);
    for (int n = 2; n < 5; n++)
        Py_XDECREF(args[n]);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* Whether `result` is the plain end of a stream: the peer has sent all, or it was cancelled as we asked. */
static int is_end(const struct hot *hot, PyObject *op, int64_t result, uint32_t flags)
{
    if ((PyObject *)Py_TYPE(op) != hot->kinds.receive_stream || flags & (URING_MORE | URING_DATA))
        return 0;
    PyObject *state = SLOT(op, hot->operation.state); /* borrowed */
    if (state == hot->states.in_flight)
        return result == 0;
    return state == hot->states.cancelling && result == -ECANCELED;
}

static int end_stream(UringTurns *self, PyObject *op, int64_t result)
{
    if (land(&self->epoll.driver, op) < 0)
        return -1;
    PyObject *nothing = result == 0 ? PyBytes_FromStringAndSize(NULL, 0) : Py_NewRef(Py_None);
    PyObject *error = result == 0 ? Py_NewRef(Py_None)
                                  : cancelled_error();
    int failed = nothing == NULL || error == NULL ? -1 : complete_operation(self->epoll.driver.hot, op, nothing, error);
    Py_XDECREF(nothing);
    Py_XDECREF(error);
    return failed;
}

/* One completion: the data of a stream that goes on to its receiver, all else to _reap. */
static int deliver_one(UringTurns *self, PyObject *op, int64_t result, uint32_t flags, int64_t start)
{
    if (flags & URING_DATA)
        self->epoll.driver.delivered += (size_t)(result - start);
    if (is_end(self->epoll.driver.hot, op, result, flags))
        return end_stream(self, op, result);
    if (flags != (URING_MORE | URING_DATA))
        return reap(self, op, result, flags, start);
    PyObject *data = PyBytes_FromStringAndSize(self->ring->memory + start, (Py_ssize_t)(result - start));
    int failed = data == NULL ? -1 : complete_operation(self->epoll.driver.hot, op, data, Py_None);
    Py_XDECREF(data);
    return failed;
}

/* Look up the operations of the next completions, and fetch what those will touch.  They may be looked up so early, as
 * none can leave the in-flight table before the last of its completions. */
static int look_up(UringTurns *self, const uring *ring)
{
    int count = self->count - self->next < AHEAD ? self->count - self->next : AHEAD;
    self->looked_up = self->taken_up = 0;
    while (self->looked_up < count) {
        PyObject *number = PyLong_FromUnsignedLongLong(ring->token[self->next + self->looked_up]);
        PyObject *op = number == NULL ? NULL : find(self->epoll.driver.in_flight, number);
        if (op == NULL && !PyErr_Occurred())
            PyErr_SetObject(PyExc_KeyError, number);
        Py_XDECREF(number);
        if (op == NULL)
            break;
        self->ops[self->looked_up++] = op;
    }
    if (self->looked_up == 0) {
        self->next++;
        return -1;
    }
    PyErr_Clear(); /* it is time to complain when those before have been delivered */
    look_ahead(self->epoll.driver.hot, self->ops, self->looked_up);
    return 0;
}

/* What was looked up will not be delivered from here. */
static void forget_looked_up(UringTurns *self)
{
    while (self->taken_up < self->looked_up)
        Py_DECREF(self->ops[--self->looked_up]);
}

static int deliver_batch(UringTurns *self)
{
    while (self->next < self->count && self->epoll.driver.delivered < DELIVER_MOST) {
        /* Looked up each time: what is called may close the port. */
        uring *ring = self->ring;
        if (ring == NULL)
            break;
        if (self->taken_up == self->looked_up && look_up(self, ring) < 0)
            return -1;
        PyObject *op = self->ops[self->taken_up++];
        int n = self->next++, failed = deliver_one(self, op, ring->result[n], ring->flags[n], ring->start[n]);
        Py_DECREF(op);
        if (failed && driver_go_on(&self->epoll.driver) < 0)
            return -1;
    }
    return 0;
}

static int deliver(Driver *driver)
{
    UringTurns *self = (UringTurns *)driver;
    if (deliver_batch(self) < 0 || epoll_deliver(driver) < 0)
        return -1;
    return has_work(driver) ? driver_call(driver, driver->hot->names.queue_leftovers, NULL) : 0;
}

static int hand_over(Driver *driver)
{
    UringTurns *self = (UringTurns *)driver;
    return self->shared && self->ring != NULL ? driver_call(driver, driver->hot->names.hand_over, NULL) : 0;
}

static int is_behind(Driver *driver)
{
    UringTurns *self = (UringTurns *)driver;
    return self->next < self->count || epoll_is_behind(driver);
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Streams that are watched, because they receive large pieces
 * ------------------------------------------------------------------------------------------------------------------ */

/* A class method: where the slots of the driver's _Stream are. */
static PyObject *use_stream(PyObject *turns, PyObject *kind)
{
    static const struct slot_place places[] = {PLACE(stream, armed), PLACE(stream, cookie), PLACE(stream, large),
                                               PLACE(stream, stopping), PLACE(stream, streak), PLACE(stream, watched)};
    struct hot *hot = driver_hot((PyTypeObject *)turns);
    if (FIND_SLOTS(hot, kind, places) < 0)
        return NULL;
    Py_XSETREF(hot->kinds.uring_stream, Py_NewRef(kind)); /* when the driver is imported, and never again */
    Py_RETURN_NONE;
}

/* What the driver keeps for a stream that is being armed. */
static PyObject *new_stream(UringTurns *self, int fd)
{
    const struct hot *hot = self->epoll.driver.hot;
    PyTypeObject *type = (PyTypeObject *)hot->kinds.uring_stream;
    PyObject *stream = type->tp_alloc(type, 0);
    if (stream == NULL)
        return NULL;
    SLOT(stream, hot->stream.armed) = Py_NewRef(Py_True);
    SLOT(stream, hot->stream.stopping) = Py_NewRef(Py_False);
    SLOT(stream, hot->stream.large) = Py_NewRef(Py_False);
    SLOT(stream, hot->stream.watched) = Py_NewRef(Py_False);
    SLOT(stream, hot->stream.streak) = PyLong_FromLong(0);
    SLOT(stream, hot->stream.cookie) = PyLong_FromLongLong(self->cookie(fd));
    if (SLOT(stream, hot->stream.streak) == NULL || SLOT(stream, hot->stream.cookie) == NULL)
        Py_CLEAR(stream);
    return stream;
}

static PyObject *uring_receive_stream(UringTurns *self, PyObject *const *args, Py_ssize_t count)
{
    int fd;
    if (self->without_ring)
        return epoll_receive_stream(&self->epoll, args, count);
    if (self->ring == NULL || self->shared)
        Py_RETURN_NONE;
    PyObject *op = epoll_new_stream(&self->epoll, args, count, &fd);
    if (op == NULL || op == Py_None)
        return op;
    PyObject *stream = new_stream(self, fd);
    if (stream == NULL || launch(&self->epoll.driver, op) < 0) {
        Py_XDECREF(stream);
        Py_DECREF(op);
        return NULL;
    }
    Py_XSETREF(SLOT(op, self->epoll.driver.hot->operation.driver_data), stream);
    if (self->prepare(self->ring, fd, self->epoll.driver.tokens) < 0 && PyList_Append(self->unsubmitted, op) < 0)
        Py_CLEAR(op);
    return op;
}

/* A watched stream has received so much: count the small pieces in a row, and let the driver know of the last. */
static int received(EpollTurns *self, PyObject *op, size_t count)
{
    const struct hot *hot = self->driver.hot;
    PyObject *stream = SLOT(op, hot->operation.driver_data); /* borrowed */
    if (stream == NULL || (PyObject *)Py_TYPE(stream) != hot->kinds.uring_stream)
        return 0;
    long streak = count < URING_SMALL ? PyLong_AsLong(SLOT(stream, hot->stream.streak)) + 1 : 0;
    if (streak < URING_IN_A_ROW) {
        Py_XSETREF(SLOT(stream, hot->stream.streak), PyLong_FromLong(streak));
        return SLOT(stream, hot->stream.streak) == NULL ? -1 : 0;
    }
    return driver_call(&self->driver, hot->names.receive_by_ring, op);
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
    unsigned long long ring = 0, wait = 0, prepare = 0, cookie = 0;
    if (value != NULL && value != Py_None) {
        PyObject *addresses = PyObject_CallMethod((PyObject *)self, "_addresses", "O", value);
        if (addresses == NULL)
            return -1;
        int parsed = PyArg_ParseTuple(addresses, "KKKK", &ring, &wait, &prepare, &cookie);
        Py_DECREF(addresses);
        if (!parsed)
            return -1;
    }
    self->ring = (uring *)(uintptr_t)ring;
    self->call = (wait_function)(uintptr_t)wait;
    self->prepare = (prepare_function)(uintptr_t)prepare;
    self->cookie = (cookie_function)(uintptr_t)cookie;
    self->next = self->count = 0;
    forget_looked_up(self);
    Py_XSETREF(self->ring_object, Py_XNewRef(value));
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

static PyObject *uring_turns_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const struct verbs verbs = {
        .wait = wait,
        .gather = gather,
        .has_work = has_work,
        .deliver = deliver,
        .hand_over = hand_over,
        .is_behind = is_behind,
        .submit_receive = epoll_submit_receive,
        .busy = epoll_busy,
    };
    PyObject *self = epoll_new(type, &verbs);
    if (self != NULL)
        ((UringTurns *)self)->epoll.received = received;
    return self;
}

static int uring_turns_traverse(UringTurns *self, visitproc visit, void *arg)
{
    Py_VISIT(self->ring_object);
    Py_VISIT(self->unsubmitted);
    Py_VISIT(self->uncancelled);
    for (int n = self->taken_up; n < self->looked_up; n++)
        Py_VISIT(self->ops[n]);
    return epoll_turns_traverse(&self->epoll, visit, arg);
}

static int uring_turns_clear(UringTurns *self)
{
    Py_CLEAR(self->ring_object);
    Py_CLEAR(self->unsubmitted);
    Py_CLEAR(self->uncancelled);
    forget_looked_up(self);
    return epoll_turns_clear(&self->epoll);
}

static void uring_turns_dealloc(UringTurns *self)
{
    PyObject_GC_UnTrack(self);
    uring_turns_clear(self);
    epoll_turns_free(&self->epoll);
}

static PyMethodDef uring_turns_methods[] = {
    {"receive_stream", (PyCFunction)(void (*)(void))uring_receive_stream, METH_FASTCALL, NULL},
    {"_use_stream", use_stream, METH_O | METH_CLASS, "Look up the slots of what the driver keeps for a stream."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef uring_turns_members[] = {
    {"_unsubmitted", T_OBJECT_EX, offsetof(UringTurns, unsubmitted), 0, NULL},
    {"_uncancelled", T_OBJECT_EX, offsetof(UringTurns, uncancelled), 0, NULL},
    {"_taken", T_ULONGLONG, offsetof(UringTurns, taken), 0, NULL},
    {"_shared", T_BOOL, offsetof(UringTurns, shared), 0, NULL},
    {"_without_ring", T_BOOL, offsetof(UringTurns, without_ring), 0, NULL},
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
    {Py_tp_new, uring_turns_new},
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

int add_uring(struct hot *hot)
{
    PyTypeObject *type = add_type(hot, &uring_turns_spec, hot->EpollTurns_type);
    Py_XDECREF(type); /* the module has it */
    return type == NULL ? -1 : 0;
}

#endif
