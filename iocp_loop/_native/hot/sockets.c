/*
 * sock_recv and sock_sendall, as far as they are quick: for plain sockets (to receive, of streams), outside debug mode.
 *
 * SocketCalls.receive tries at once.  If there is nothing to receive, it returns a SocketWait, which a coroutine awaits: it
 * submits a Receive operation that it fills in itself, and yields a Future to wait with.  The operation is one like any
 * other: it stands in the in-flight table, may be cancelled, moves with the loop to another thread.  Whatever is not the
 * plain case is answered with None, and the caller goes the way in Python (methods/sockets.py, proactor.py), which is the
 * reference.
 *
 * What a wait has got when nobody awaits it any more is not lost: the proactor keeps it (Proactor.abandon, keep_value).
 */

#include "sockets.h"

#include "calls.h"
#include "handles.h"
#include "receiving.h"

typedef struct {
    PyObject_HEAD
    struct hot *hot;
    PyObject *loop, *proactor;
    Driver *driver;
    PyObject *unclaimed, *lines, *transports; /* dicts; a socket in one of them is not for the quick way */
    size_t expected; /* bytes in a piece, see receive_bytes */
} SocketCalls;

typedef struct {
    PyObject_HEAD
    struct hot *hot;
    SocketCalls *calls;
    PyObject *sock, *op, *future, *value, *error;
    size_t size;
    char begun;
} SocketWait;

/* ---------------------------------------------------------------------------------------------------------------------
 * Receiving
 * ------------------------------------------------------------------------------------------------------------------ */

/* What `op` counts with: its loop's; NULL once nobody awaits it any more. */
static size_t *expected_by(const struct hot *hot, PyObject *op)
{
    PyObject *complete = SLOT(op, hot->operation.complete); /* borrowed */
    if (complete == NULL || !Py_IS_TYPE(complete, hot->SocketWait_type) || ((SocketWait *)complete)->calls == NULL)
        return NULL;
    return &((SocketWait *)complete)->calls->expected;
}

/* The slots of an operation are open to everybody, so they are looked at again. */
PyObject *receive_for(struct hot *hot, PyObject *op)
{
    size_t unknown = 0, *expected = expected_by(hot, op);
    PyObject *sock = SLOT(op, hot->operation.handle), *size; /* both are borrowed */
    size = (PyObject *)Py_TYPE(op) == hot->kinds.receive ? SLOT(op, hot->operation.size) : NULL;
    if (sock == NULL || !is_socket(hot, sock) || size == NULL || !PyLong_CheckExact(size)) {
        PyErr_SetString(PyExc_TypeError, "the socket or the size of a receive in flight has been replaced");
        return NULL;
    }
    size_t most = PyLong_AsSize_t(size);
    if (most == (size_t)-1 && PyErr_Occurred())
        return NULL;
    return receive_now(hot, socket_descriptor(sock), most, expected == NULL ? &unknown : expected);
}

/* Whether `sock` can be served quickly: its descriptor, or NO_DESCRIPTOR. */
static descriptor plain_descriptor(const SocketCalls *self, PyObject *sock)
{
    if (!is_socket(self->hot, sock) || loop_in_debug(self->hot, self->loop) || !never_waits(self->hot, sock))
        return NO_DESCRIPTOR;
    return socket_descriptor(sock);
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The wait
 * ------------------------------------------------------------------------------------------------------------------ */

/* A new wait for `sock`. */
static SocketWait *new_wait(SocketCalls *calls, PyObject *sock, size_t size)
{
    SocketWait *self = PyObject_GC_New(SocketWait, calls->hot->SocketWait_type);
    if (self == NULL)
        return NULL;
    self->hot = calls->hot;
    Py_INCREF(self->hot->module);
    self->calls = (SocketCalls *)Py_NewRef(calls);
    self->sock = Py_NewRef(sock);
    self->op = self->future = self->value = self->error = NULL;
    self->size = size;
    self->begun = 0;
    PyObject_GC_Track(self);
    return self;
}

/* Its operation, not submitted yet. */
static PyObject *make_receive(SocketWait *self, descriptor fd)
{
    struct hot *hot = self->hot;
    PyObject *op = new_operation(hot, hot->kinds.receive, self->sock, fd, (PyObject *)self);
    if (op != NULL && (SLOT(op, hot->operation.size) = PyLong_FromSize_t(self->size)) == NULL)
        Py_CLEAR(op);
    return op;
}

/* Submit the operation.  1: it is in flight; 2: it was done at once, see `value`; 0: not here and now; -1: error. */
static int submit(SocketWait *self, SocketCalls *calls)
{
    descriptor fd = socket_descriptor(self->sock);
    PyObject *op = make_receive(self, fd);
    if (op == NULL)
        return -1;
    int done;
    if (calls->driver->verbs->receive == NULL)
        done = calls->driver->verbs->submit_receive(calls->driver, op, fd, self->size);
    else { /* the request is the attempt */
        PyObject *data = calls->driver->verbs->receive(calls->driver, op, fd, self->size, &calls->expected);
        done = data == NULL ? (PyErr_Occurred() ? -1 : 0) : data == Py_None ? 1 : 2;
        if (done == 2)
            Py_XSETREF(self->value, data);
        else
            Py_XDECREF(data);
    }
    if (done == 1)
        Py_XSETREF(self->op, op);
    else
        Py_DECREF(op);
    return done;
}

/* What `op` has got is for the next who asks. */
static int keep_value(SocketWait *self, PyObject *op, PyObject *value)
{
    if (self->calls == NULL || self->calls->proactor == NULL || op == NULL)
        return 0; /* the garbage collector has been here: nobody will ask */
    PyObject *done = PyObject_CallMethodObjArgs(self->calls->proactor, self->hot->names.keep_value, op, value, NULL);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* Until the task has run, what comes later on that socket has to wait: the operation stands in the proactor's lines. */
static int stand_in_line(SocketWait *self)
{
    if (self->calls == NULL || self->calls->lines == NULL || self->sock == NULL)
        return 0;
    return PyDict_SetDefault(self->calls->lines, self->sock, (PyObject *)self) == NULL ? -1 : 0;
}

/* The task has run, or is gone. */
static int leave_line(SocketWait *self)
{
    PyObject *lines = self->calls == NULL ? NULL : self->calls->lines;
    if (lines == NULL || self->sock == NULL || PyDict_GET_SIZE(lines) == 0)
        return 0;
    PyObject *first = PyDict_GetItemWithError(lines, self->sock); /* borrowed */
    if (first != (PyObject *)self)
        return PyErr_Occurred() ? -1 : 0;
    return PyDict_DelItem(lines, self->sock);
}

/* The operation has ended: `value` or `error`, the other None. */
static int end_wait(SocketWait *self, PyObject *value, PyObject *error)
{
    const struct hot *hot = self->hot;
    /* Both may leave `self` while something is called. */
    PyObject *op = Py_XNewRef(self->op), *future = Py_XNewRef(self->future), *done = NULL;
    int cancelled = 0, failed = 0;
    if (op != NULL) /* part the two, which refer to each other */
        Py_XSETREF(SLOT(op, hot->operation.complete), Py_NewRef(Py_None));
    if (future != NULL) {
        done = PyObject_CallMethodNoArgs(future, hot->names.done);
        cancelled = done == NULL ? -1 : PyObject_IsTrue(done); /* and its task has not run yet */
        Py_CLEAR(done);
    }
    if (cancelled < 0)
        failed = -1;
    else if (cancelled)
        failed = error == Py_None ? keep_value(self, op, value) : 0;
    else if (future != NULL && error != Py_None && was_cancelled(error)) { /* by nobody who awaits it */
        done = PyObject_CallMethodNoArgs(future, hot->names.cancel);
        failed = done == NULL ? -1 : 0;
        Py_XDECREF(done);
    } else {
        Py_XSETREF(self->value, error == Py_None ? Py_NewRef(value) : NULL);
        Py_XSETREF(self->error, error == Py_None ? NULL : Py_NewRef(error));
        if (future != NULL) {
            done = PyObject_CallMethodOneArg(future, hot->names.set_result, Py_None);
            failed = done == NULL || (error == Py_None && stand_in_line(self) < 0) ? -1 : 0;
            Py_XDECREF(done);
        }
    }
    Py_XDECREF(future);
    Py_XDECREF(op);
    return failed;
}

/* As the `complete` of its operation, when that is called from Python. */
static PyObject *wait_call(PyObject *self, PyObject *args, PyObject *kwargs)
{
    PyObject *value, *error;
    if (!PyArg_ParseTuple(args, "OO", &value, &error) || end_wait((SocketWait *)self, value, error) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static int complete_receive(const struct hot *hot, PyObject *op, PyObject *value, PyObject *error)
{
    PyObject *complete = SLOT(op, hot->operation.complete); /* borrowed */
    if (complete == NULL || !Py_IS_TYPE(complete, hot->SocketWait_type))
        return complete_operation(hot, op, value, error);
    Py_INCREF(complete);
    int failed = end_wait((SocketWait *)complete, value, error);
    Py_DECREF(complete);
    return failed;
}

int deliver_received(Driver *driver, PyObject *op, PyObject *data)
{
    PyObject *error = NULL;
    if (data == NULL) {
        if (ends_the_loop())
            return -1;
        error = take_exception();
    }
    int failed = land(driver, op);
    if (!failed)
        failed = complete_receive(driver->hot, op, data == NULL ? Py_None : data, error == NULL ? Py_None : error);
    Py_XDECREF(error);
    return failed;
}

/* The answer of an operation that has ended. */
static PySendResult answer(SocketWait *self, PyObject **result)
{
    Py_CLEAR(self->future);
    *result = NULL;
    if (leave_line(self) < 0)
        return PYGEN_ERROR;
    if (self->error == NULL) {
        *result = self->value;
        self->value = NULL;
        if (*result == NULL)
            PyErr_SetString(PyExc_RuntimeError, "the wait for a socket went on before it had ended");
        return *result == NULL ? PYGEN_ERROR : PYGEN_RETURN;
    }
    PyErr_SetObject((PyObject *)Py_TYPE(self->error), self->error);
    Py_CLEAR(self->error);
    *result = NULL;
    return PYGEN_ERROR;
}

/* Nobody awaits any more: what the operation has got, or will get, is for the next who asks. */
static int abandon(SocketWait *self)
{
    PyObject *op = self->op, *value = self->value;
    int failed = leave_line(self);
    self->op = self->value = NULL;
    if (failed)
        ;
    else if (value != NULL)
        failed = keep_value(self, op, value);
    else if (op != NULL && SLOT(op, self->hot->operation.complete) == (PyObject *)self && self->calls != NULL
             && self->calls->proactor != NULL) {
        PyObject *done = PyObject_CallMethodOneArg(self->calls->proactor, self->hot->names.abandon, op);
        failed = done == NULL ? -1 : 0;
        Py_XDECREF(done);
    }
    Py_XDECREF(value);
    Py_XDECREF(op);
    Py_CLEAR(self->future);
    return failed;
}

/* The same with an exception on its way up. */
static void abandon_failing(SocketWait *self)
{
    PyObject *exception = take_exception();
    if (abandon(self) < 0)
        PyErr_Clear();
    PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
    Py_DECREF(exception);
}

static PySendResult wait_send(SocketWait *self, PyObject *ignored, PyObject **result)
{
    const struct hot *hot = self->hot;
    *result = NULL;
    if (self->begun) {
        int early = self->value != NULL || self->error != NULL || self->future == NULL ? 0 : await_again(hot, self->future);
        if (early > 0)
            *result = Py_NewRef(self->future);
        return early > 0 ? PYGEN_NEXT : early < 0 ? PYGEN_ERROR : answer(self, result);
    }
    self->begun = 1;
    SocketCalls *calls = (SocketCalls *)Py_XNewRef(self->calls);
    PyObject *future = NULL;
    int done = -1;
    if (calls == NULL || calls->loop == NULL)
        PyErr_SetString(PyExc_RuntimeError, "the loop is gone");
    else
        done = submit(self, calls);
    if (done == 0)
        PyErr_SetString(PyExc_RuntimeError, "the driver refused what it has accepted before");
    else if (done == 1) {
        future = PyObject_CallMethodNoArgs(calls->loop, hot->names.create_future);
        Py_XSETREF(self->future, Py_XNewRef(future));
        /* What a Future does when it is awaited: its task asks for this. */
        if (future == NULL || PyObject_SetAttr(future, hot->names.future_blocking, Py_True) < 0) {
            abandon_failing(self);
            done = -1;
        }
    }
    Py_XDECREF(calls);
    if (done == 2)
        return answer(self, result);
    if (done == 1)
        *result = future;
    else
        Py_XDECREF(future);
    return done == 1 ? PYGEN_NEXT : PYGEN_ERROR;
}

static PyObject *wait_next(SocketWait *self)
{
    PyObject *result;
    switch (wait_send(self, Py_None, &result)) {
    case PYGEN_NEXT:
        return result;
    case PYGEN_RETURN: {
        PyObject *stop = PyObject_CallOneArg(PyExc_StopIteration, result);
        Py_DECREF(result);
        if (stop != NULL)
            PyErr_SetObject(PyExc_StopIteration, stop);
        Py_XDECREF(stop);
        return NULL;
    }
    default:
        return NULL;
    }
}

static PyObject *wait_send_method(SocketWait *self, PyObject *value) { return wait_next(self); }

static PyObject *wait_throw(SocketWait *self, PyObject *args)
{
    PyObject *type, *value = NULL, *traceback = NULL;
    if (!PyArg_ParseTuple(args, "O|OO", &type, &value, &traceback) || abandon(self) < 0)
        return NULL;
    if (PyExceptionInstance_Check(type))
        PyErr_SetObject((PyObject *)Py_TYPE(type), type);
    else
        PyErr_SetObject(type, value == Py_None ? NULL : value);
    return NULL;
}

static PyObject *wait_close(SocketWait *self, PyObject *ignored)
{
    if (abandon(self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *itself(PyObject *self) { return Py_NewRef(self); }

#define OWNED_BY_WAIT(DO) DO(self->calls); DO(self->sock); DO(self->op); DO(self->future); DO(self->value); \
    DO(self->error)

static int wait_traverse(SocketWait *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    OWNED_BY_WAIT(Py_VISIT);
    return visit_hot(self->hot, visit, arg);
}

static int wait_clear(SocketWait *self)
{
    OWNED_BY_WAIT(Py_CLEAR);
    return 0;
}

static void wait_dealloc(SocketWait *self)
{
    PyObject_GC_UnTrack(self);
    wait_clear(self);
    free_with_hot((PyObject *)self, self->hot);
}

static PyMethodDef wait_methods[] = {
    {"send", (PyCFunction)wait_send_method, METH_O, NULL},
    {"throw", (PyCFunction)wait_throw, METH_VARARGS, NULL},
    {"close", (PyCFunction)wait_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef wait_members[] = {
    {"op", T_OBJECT, offsetof(SocketWait, op), READONLY, "The operation; None if there is none."},
    {"future", T_OBJECT, offsetof(SocketWait, future), READONLY, "With what it is awaited; None if it is not."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot wait_slots[] = {
    {Py_tp_doc, (char *)"A coroutine's wait for a socket."},
    {Py_tp_dealloc, wait_dealloc},
    {Py_tp_traverse, wait_traverse},
    {Py_tp_clear, wait_clear},
    {Py_tp_call, wait_call},
    {Py_tp_methods, wait_methods},
    {Py_tp_members, wait_members},
    {Py_tp_iter, itself},
    {Py_tp_iternext, wait_next},
    {Py_am_await, itself},
    {Py_am_send, wait_send},
    {0, NULL},
};

static PyType_Spec wait_spec = {
    .name = "iocp_loop._hot.SocketWait",
    .basicsize = sizeof(SocketWait),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = wait_slots,
};

/* ---------------------------------------------------------------------------------------------------------------------
 * The calls
 * ------------------------------------------------------------------------------------------------------------------ */

/* Whether a transport of the loop has `fd`; -1: error. */
static int is_owned(SocketCalls *self, descriptor fd)
{
    PyObject *number = PyLong_FromLongLong((long long)fd);
    int owned = number == NULL ? -1 : PyDict_Contains(self->transports, number);
    Py_XDECREF(number);
    return owned;
}

/* receive(sock, n): bytes; or a SocketWait to await; or None, for the way in Python. */
static PyObject *calls_receive(SocketCalls *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "receive() takes a socket and a size");
        return NULL;
    }
    PyObject *sock = args[0];
    if (self->loop == NULL) /* the garbage collector has been here */
        Py_RETURN_NONE;
    descriptor fd = plain_descriptor(self, sock);
    /* What is not a stream has messages, which must not be cut to what receive_bytes expects. */
    if (fd == NO_DESCRIPTOR || !is_stream_socket(sock) || !PyLong_CheckExact(args[1])
        || PyDict_GET_SIZE(self->unclaimed) > 0)
        Py_RETURN_NONE;
    int in_line = PyDict_GET_SIZE(self->lines) > 0 ? PyDict_Contains(self->lines, sock) : 0;
    if (in_line < 0)
        return NULL;
    if (in_line)
        Py_RETURN_NONE;
    Py_ssize_t size = PyLong_AsSsize_t(args[1]);
    if (size <= 0) {
        PyErr_Clear(); /* too large; Python's way says what it thinks of that */
        Py_RETURN_NONE;
    }
    const struct verbs *verbs = self->driver->verbs;
    int busy = verbs->busy(self->driver, fd, 0);
    if (busy) /* first come, first served */
        return busy < 0 ? NULL : Py_NewRef(Py_None);
    if (verbs->receive == NULL) {
        PyObject *data = receive_now(self->hot, fd, (size_t)size, &self->expected);
        if (data != Py_None)
            return data;
        Py_DECREF(data);
    }
    int owned = is_owned(self, fd);
    if (owned < 0)
        return NULL;
    if (owned || !verbs->submit_receive(self->driver, NULL, fd, 0))
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    return (PyObject *)new_wait(self, sock, (size_t)size);
}

/* send(sock, data): how many bytes the system has taken, perhaps 0; or None, for the way in Python. */
static PyObject *calls_send(SocketCalls *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "send() takes a socket and data");
        return NULL;
    }
    descriptor fd = self->loop == NULL ? NO_DESCRIPTOR : plain_descriptor(self, args[0]);
    if (fd == NO_DESCRIPTOR || !PyBytes_CheckExact(args[1]))
        Py_RETURN_NONE;
    int busy = self->driver->verbs->busy(self->driver, fd, 1);
    if (busy < 0)
        return NULL;
    if (busy)
        return PyLong_FromLong(0); /* it waits in line */
    Py_ssize_t sent = send(fd, PyBytes_AS_STRING(args[1]), CALL_SIZE((size_t)PyBytes_GET_SIZE(args[1])),
                           MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent >= 0)
        return PyLong_FromSsize_t(sent);
    return would_wait() ? PyLong_FromLong(0) : raise_last_error();
}

#define OWNED_BY_CALLS(DO) DO(self->loop); DO(self->proactor); DO(self->driver); DO(self->unclaimed); \
    DO(self->lines); DO(self->transports)

static int calls_traverse(SocketCalls *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    OWNED_BY_CALLS(Py_VISIT);
    return visit_hot(self->hot, visit, arg);
}

static int calls_clear(SocketCalls *self)
{
    OWNED_BY_CALLS(Py_CLEAR);
    return 0;
}

static void calls_dealloc(SocketCalls *self)
{
    PyObject_GC_UnTrack(self);
    calls_clear(self);
    free_with_hot((PyObject *)self, self->hot);
}

static PyMethodDef calls_methods[] = {
    {"receive", (PyCFunction)(void (*)(void))calls_receive, METH_FASTCALL, NULL},
    {"send", (PyCFunction)(void (*)(void))calls_send, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef calls_members[] = {
    {"expected", T_PYSSIZET, offsetof(SocketCalls, expected), READONLY, "Bytes in a piece, as far as is known."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot calls_slots[] = {
    {Py_tp_doc, (char *)"The quick part of a loop's calls on sockets."},
    {Py_tp_dealloc, calls_dealloc},
    {Py_tp_traverse, calls_traverse},
    {Py_tp_clear, calls_clear},
    {Py_tp_methods, calls_methods},
    {Py_tp_members, calls_members},
    {0, NULL},
};

static PyType_Spec calls_spec = {
    .name = "iocp_loop._hot.SocketCalls",
    .basicsize = sizeof(SocketCalls),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = calls_slots,
};

/* socket_calls(loop, proactor, driver, unclaimed, lines, transports), the last three dicts; None if the driver has no
 * quick way. */
PyObject *make_socket_calls(PyObject *module, PyObject *args)
{
    struct hot *hot = hot_in(module);
    PyObject *loop, *proactor, *driver, *unclaimed, *lines, *transports;
    if (!PyArg_ParseTuple(args, "OOOO!O!O!", &loop, &proactor, &driver, &PyDict_Type, &unclaimed, &PyDict_Type, &lines,
                          &PyDict_Type, &transports))
        return NULL;
    Driver *native = native_driver(hot, driver);
    if (native == NULL || hot->kinds.receive == NULL)
        Py_RETURN_NONE;
    SocketCalls *self = PyObject_GC_New(SocketCalls, hot->Calls_type);
    if (self == NULL)
        return NULL;
    self->hot = hot;
    Py_INCREF(module);
    self->loop = Py_NewRef(loop);
    self->proactor = Py_NewRef(proactor);
    self->driver = (Driver *)Py_NewRef(driver);
    self->unclaimed = Py_NewRef(unclaimed);
    self->lines = Py_NewRef(lines);
    self->transports = Py_NewRef(transports);
    self->expected = 0;
    PyObject_GC_Track(self);
    return (PyObject *)self;
}

int add_sockets(struct hot *hot)
{
    /* glibc's malloc gives the top of its heap back to the system when 128 KiB of it are free, and a loop that makes and
     * drops large messages would have it give and take with each.  Its limits grow with the largest block that was ever
     * mapped and freed (mallopt(3), M_MMAP_THRESHOLD): after this it keeps up to 2 MiB. */
    PyMem_RawFree(PyMem_RawMalloc(1 << 20));
    hot->SocketWait_type = (PyTypeObject *)PyType_FromModuleAndSpec(hot->module, &wait_spec, NULL);
    hot->Calls_type = (PyTypeObject *)PyType_FromModuleAndSpec(hot->module, &calls_spec, NULL);
    return hot->SocketWait_type == NULL || hot->Calls_type == NULL ? -1 : 0;
}
