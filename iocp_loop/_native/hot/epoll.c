/*
 * The wait and the dispatch of driver poll on Linux, and its receive.  A class in Python inherits from EpollTurns first
 * and from the driver that is written in Python behind it; ports/poll.py tells how it all works.
 *
 * Nothing here blocks but the wait: a receive on a ready, non-blocking socket is over before another thread could have
 * had the GIL.
 */

#include "hot.h"

#ifdef __linux__

#include <errno.h>
#include <math.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>

enum { BATCH = 1024, SCRATCH_SIZE = 256 * 1024 };

typedef struct {
    PyObject_HEAD
    int fd; /* of the epoll instance */
    PyObject *watches, *fresh, *ready, *before_sleep;
    unsigned long long waits, completions;
    Py_ssize_t stream_slot; /* of a watch */
    int next, count;
    char sleeping;
    int contended;
    char *scratch;
    struct epoll_event events[BATCH];
} EpollTurns;

/* See uring.c: what another busy thread makes of a wait, and what helps. */
static const int64_t CONTENDED_NS = 500000;
enum { CONTENDED_TURNS = 200, LOOK_NS = 60000 };

static int64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static int is_true(PyObject *object) { return object == NULL ? 0 : PyObject_IsTrue(object); }

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

static PyObject *epoll_turns_wait(EpollTurns *self, PyObject *timeout)
{
    int limit = -1, count, work, code;
    self->waits++;
    if (timeout != Py_None) {
        double seconds = PyFloat_AsDouble(timeout);
        if (seconds == -1.0 && PyErr_Occurred())
            return NULL;
        double ms = ceil(seconds * 1000); /* rounded up: never early */
        limit = ms <= 0 ? 0 : ms > INT_MAX ? INT_MAX : (int)ms;
    }
    /* What a dispatch that an exception ended has left is told again: the poller is level-triggered. */
    self->next = self->count = 0;
    self->sleeping = 1;
    work = limit == 0 ? 1 : is_true(self->ready);
    if (work == 0 && self->before_sleep != NULL && self->before_sleep != Py_None) {
        PyObject *answer = PyObject_CallNoArgs(self->before_sleep);
        work = answer == NULL ? -1 : PyObject_IsTrue(answer);
        Py_XDECREF(answer);
    }
    if (work < 0) {
        self->sleeping = 0;
        return NULL;
    }
    count = work ? epoll_wait(self->fd, self->events, BATCH, 0) : block(self, limit);
    code = errno;
    self->sleeping = 0;
    if (count < 0) {
        errno = code;
        return code == EINTR ? Py_NewRef(Py_None) : PyErr_SetFromErrno(PyExc_OSError);
    }
    self->count = count;
    if (self->fresh != NULL && PySet_Clear(self->fresh) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* One receive of a stream, delivered at once. */
static int receive(EpollTurns *self, PyObject *op)
{
    PyObject *sock = SLOT(op, operation_slots.handle), *done, *data, *complete; /* `sock` is borrowed */
    PyObject *get_buffer = SLOT(op, operation_slots.get_buffer); /* borrowed */
    if ((get_buffer != NULL && get_buffer != Py_None) || sock == NULL || !is_socket(sock)) {
        done = PyObject_CallMethod((PyObject *)self, "_receive_data", "O", op);
        Py_XDECREF(done);
        return done == NULL ? -1 : 0;
    }
    ssize_t count = recv(socket_descriptor(sock), self->scratch, SCRATCH_SIZE, MSG_DONTWAIT);
    if (count < 0) {
        if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)
            return 0;
        PyErr_SetFromErrno(PyExc_OSError);
        PyObject *error = take_exception();
        done = PyObject_CallMethodObjArgs((PyObject *)self, names.end_stream, op, Py_None, error, NULL);
        Py_XDECREF(error);
        Py_XDECREF(done);
        return done == NULL ? -1 : 0;
    }
    data = PyBytes_FromStringAndSize(self->scratch, count);
    if (data == NULL)
        return -1;
    if (count == 0)
        done = PyObject_CallMethodObjArgs((PyObject *)self, names.end_stream, op, data, Py_None, NULL);
    else {
        PyObject *args[] = {data, Py_None};
        complete = Py_XNewRef(SLOT(op, operation_slots.complete));
        done = complete == NULL ? NULL : PyObject_Vectorcall(complete, args, 2, NULL);
        Py_XDECREF(complete);
    }
    Py_DECREF(data);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

static int deliver(EpollTurns *self, struct epoll_event event)
{
    PyObject *fd = PyLong_FromLong(event.data.fd), *watch, *stream, *done;
    int failed;
    if (fd == NULL)
        return -1;
    watch = PyDict_GetItemWithError(self->watches, fd);
    if (watch == NULL && PyErr_Occurred()) {
        Py_DECREF(fd);
        return -1;
    }
    watch = Py_NewRef(watch == NULL ? Py_None : watch);
    if (watch != Py_None && self->stream_slot == 0)
        self->stream_slot = slot_offset((PyObject *)Py_TYPE(watch), "stream");
    stream = watch == Py_None || self->stream_slot <= 0 ? NULL : SLOT(watch, self->stream_slot);
    if (event.events == EPOLLIN && stream != NULL && stream != Py_None) {
        self->completions++;
        Py_INCREF(stream);
        failed = receive(self, stream);
        Py_DECREF(stream);
    } else {
        done = PyObject_CallMethod((PyObject *)self, "_dispatch_other", "OOI", fd, watch, (unsigned)event.events);
        Py_XDECREF(done);
        failed = done == NULL ? -1 : 0;
    }
    Py_DECREF(watch);
    Py_DECREF(fd);
    return failed;
}

static int drain_ready(EpollTurns *self)
{
    int some = is_true(self->ready);
    if (some <= 0)
        return some;
    PyObject *done = PyObject_CallMethodNoArgs((PyObject *)self, names.drain_ready);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

static PyObject *epoll_turns_dispatch(EpollTurns *self, PyObject *ignored)
{
    if (drain_ready(self) < 0)
        return NULL;
    while (self->next < self->count)
        if (deliver(self, self->events[self->next++]) < 0)
            return NULL;
    if (drain_ready(self) < 0)
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
    self->scratch = PyMem_Malloc(SCRATCH_SIZE);
    if (self->scratch == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static int epoll_turns_traverse(EpollTurns *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->watches);
    Py_VISIT(self->fresh);
    Py_VISIT(self->ready);
    Py_VISIT(self->before_sleep);
    return 0;
}

static int epoll_turns_clear(EpollTurns *self)
{
    Py_CLEAR(self->watches);
    Py_CLEAR(self->fresh);
    Py_CLEAR(self->ready);
    Py_CLEAR(self->before_sleep);
    return 0;
}

static void epoll_turns_dealloc(EpollTurns *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    epoll_turns_clear(self);
    PyMem_Free(self->scratch);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyMethodDef epoll_turns_methods[] = {
    {"wait", (PyCFunction)epoll_turns_wait, METH_O, NULL},
    {"dispatch", (PyCFunction)epoll_turns_dispatch, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef epoll_turns_members[] = {
    {"_epoll_fd", T_INT, offsetof(EpollTurns, fd), 0, NULL},
    {"_watches", T_OBJECT_EX, offsetof(EpollTurns, watches), 0, NULL},
    {"_new", T_OBJECT_EX, offsetof(EpollTurns, fresh), 0, NULL},
    {"ready", T_OBJECT_EX, offsetof(EpollTurns, ready), 0, NULL},
    {"before_sleep", T_OBJECT, offsetof(EpollTurns, before_sleep), 0, NULL},
    {"waits", T_ULONGLONG, offsetof(EpollTurns, waits), 0, NULL},
    {"completions", T_ULONGLONG, offsetof(EpollTurns, completions), 0, NULL},
    {"_sleeping", T_BOOL, offsetof(EpollTurns, sleeping), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot epoll_turns_slots[] = {
    {Py_tp_doc, (char *)PyDoc_STR("The wait and the dispatch of driver poll, by epoll.")},
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

int add_epoll(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &epoll_turns_spec, NULL);
    if (type == NULL)
        return -1;
    int failed = PyModule_AddObjectRef(module, "EpollTurns", type);
    Py_DECREF(type);
    return failed;
}

#endif
