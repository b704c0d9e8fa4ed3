/*
 * What read, readexactly, readline, readuntil and drain of the streams in readers.c return: awaitables that do, once they are
 * awaited and no earlier, what asyncio's coroutines do.  If the data are there it is done at once; if not, the waiter of the
 * reader is awaited as asyncio does it.  Whatever is unusual (an exception, the end, a limit, a paused transport, a second
 * reader) is left to asyncio's coroutine, which begins with what is in the reader then; from there on all goes to that one.
 */

#include "readers.h"

enum progress { NEW, RUNNING, WAITING, LEFT_TO_ASYNCIO, FINISHED }; /* RUNNING: in a step of it here */

struct call {
    PyObject_HEAD
    struct hot *hot;
    PyObject *owner;     /* the reader, or the writer */
    PyObject *waiter;    /* what is awaited */
    PyObject *coroutine; /* asyncio's */
    Py_ssize_t n, seen;  /* so many bytes are asked for; in so many there is no end of a line */
    enum call_kind kind;
    enum progress progress;
    char waited;
};

static const char *const method_names[] = {
    [READ] = "read", [READEXACTLY] = "readexactly", [READLINE] = "readline", [READUNTIL] = "readuntil", [DRAIN] = "drain"};

/* ---------------------------------------------------------------------------------------------------------------------
 * One step
 * ------------------------------------------------------------------------------------------------------------------ */

/* Go on with asyncio's coroutine.  What that calls may come back here, and is refused then: it may not free it meanwhile. */
static PySendResult send_to_coroutine(struct call *self, PyObject *value, PyObject **result)
{
    PySendResult what = PyIter_Send(self->coroutine, value, result);
    if (what == PYGEN_NEXT)
        WRITE(self->progress, LEFT_TO_ASYNCIO);
    return what;
}

/* Begin asyncio's coroutine after we have waited.  It looks for an exception before it waits, and not afterwards: so one
 * that came meanwhile is put aside.  What came before it, data or the end, has its turn first. */
static PySendResult begin_coroutine_late(struct call *self, PyObject **result)
{
    PyObject *owner = Py_NewRef(self->owner), **place = &((struct reader *)owner)->exception, *aside;
    aside = take_reference(owner, place);
    if (is_set(aside))
        put_reference(owner, place, Py_NewRef(Py_None));
    PySendResult what = send_to_coroutine(self, Py_None, result);
    if (is_set(aside) && !is_set(*place))
        put_reference(owner, place, Py_NewRef(aside));
    Py_XDECREF(aside);
    Py_DECREF(owner);
    return what;
}

/* PYGEN_NEXT: `result` is awaited; PYGEN_RETURN: it is the result; PYGEN_ERROR. */
static PySendResult leave_to_asyncio(struct call *self, PyObject **result)
{
    PyObject *class = (PyObject *)(self->kind == DRAIN ? self->hot->streams.writer : self->hot->streams.reader);
    const char *name = method_names[self->kind];
    if (self->kind == READ || self->kind == READEXACTLY)
        self->coroutine = PyObject_CallMethod(class, name, "On", self->owner, self->n);
    else
        self->coroutine = PyObject_CallMethod(class, name, "O", self->owner);
    if (self->coroutine == NULL)
        return PYGEN_ERROR;
    return self->waited ? begin_coroutine_late(self, result) : send_to_coroutine(self, Py_None, result);
}

/* Give up waiting: what asyncio's coroutine does at the end, however that comes. */
static void stop_waiting(struct call *self)
{
    struct reader *reader = (struct reader *)self->owner;
    if (reader != NULL)
        put_reference((PyObject *)reader, &reader->waiter, Py_NewRef(Py_None));
    put_reference((PyObject *)self, &self->waiter, NULL);
}

static PySendResult wait_for_data(struct call *self, PyObject **result)
{
    struct reader *reader = (struct reader *)self->owner;
    PyObject *loop;
    if (is_set(reader->waiter) || reader->paused || (loop = take_reference(self->owner, &reader->loop)) == NULL)
        return leave_to_asyncio(self, result);
    PyObject *waiter = PyObject_CallMethodNoArgs(loop, self->hot->names.create_future);
    Py_DECREF(loop);
    if (waiter == NULL)
        return PYGEN_ERROR;
    if (PyObject_SetAttr(waiter, self->hot->names.future_blocking, Py_True) < 0) {
        Py_DECREF(waiter);
        return PYGEN_ERROR;
    }
    put_reference(self->owner, &reader->waiter, Py_NewRef(waiter));
    *result = Py_NewRef(waiter);
    put_reference((PyObject *)self, &self->waiter, waiter);
    self->waited = 1;
    WRITE(self->progress, WAITING); /* from now on it may be another thread's, by mistake */
    return PYGEN_NEXT;
}

/* The first `n` bytes, taken out of the buffer; less if another thread has taken some, by mistake. */
static PySendResult take(struct call *self, PyObject *buffer, Py_ssize_t n, PyObject **result)
{
    struct reader *reader = (struct reader *)self->owner;
    PyObject *data, *done;
    Py_ssize_t size;
    Py_BEGIN_CRITICAL_SECTION(buffer);
    size = PyByteArray_GET_SIZE(buffer);
    n = n < size ? n : size;
    data = PyBytes_FromStringAndSize(PyByteArray_AS_STRING(buffer), n);
    Py_END_CRITICAL_SECTION();
    int failed = data == NULL;
    if (!failed && n > 0)
        failed = n == size ? PyByteArray_Resize(buffer, 0) < 0 : PySequence_DelSlice(buffer, 0, n) < 0;
    if (!failed && reader->paused) {
        done = PyObject_CallMethod(self->owner, "_maybe_resume_transport", NULL);
        Py_XDECREF(done);
        failed = done == NULL;
    }
    if (failed) {
        Py_XDECREF(data);
        return PYGEN_ERROR;
    }
    *result = data;
    return PYGEN_RETURN;
}

static Py_ssize_t as_limit(PyObject *number)
{
    if (PyLong_Check(number)) {
        Py_ssize_t limit = PyLong_AsSsize_t(number);
        if (limit != -1 || !PyErr_Occurred() || !PyErr_ExceptionMatches(PyExc_OverflowError))
            return limit;
        PyErr_Clear();
    }
    double limit = PyFloat_AsDouble(number);
    if (limit == -1.0 && PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_OverflowError))
        return -1;
    PyErr_Clear();
    return limit >= 0 && limit < (double)PY_SSIZE_T_MAX ? (Py_ssize_t)limit : PY_SSIZE_T_MAX;
}

Py_ssize_t limit_of(struct reader *reader)
{
    PyObject *number = take_reference((PyObject *)reader, &reader->limit);
    Py_ssize_t limit = number == NULL ? PY_SSIZE_T_MAX : as_limit(number);
    Py_XDECREF(number);
    return limit;
}

static PySendResult read_line(struct call *self, PyObject *buffer, PyObject **result)
{
    struct reader *reader = (struct reader *)self->owner;
    Py_ssize_t size, end = -1, limit = limit_of(reader);
    if (limit == -1 && PyErr_Occurred())
        return PYGEN_ERROR;
    Py_BEGIN_CRITICAL_SECTION(buffer);
    size = PyByteArray_GET_SIZE(buffer);
    const char *start = PyByteArray_AS_STRING(buffer);
    const char *found = self->seen < size ? memchr(start + self->seen, '\n', (size_t)(size - self->seen)) : NULL;
    if (found != NULL)
        end = found - start;
    Py_END_CRITICAL_SECTION();
    if (end >= 0 && end <= limit)
        return take(self, buffer, end + 1, result);
    self->seen = size;
    return end >= 0 || reader->eof || size > limit ? leave_to_asyncio(self, result) : wait_for_data(self, result);
}

static PySendResult read_some(struct call *self, PyObject **result)
{
    struct reader *reader = (struct reader *)self->owner;
    PyObject *buffer = take_reference(self->owner, &reader->buffer);
    PySendResult what;
    Py_ssize_t size = buffer != NULL && PyByteArray_CheckExact(buffer) ? PyByteArray_GET_SIZE(buffer) : -1;
    if (size < 0 || reader->limit == NULL || (!self->waited && is_set(reader->exception)))
        what = leave_to_asyncio(self, result);
    else if (self->kind == READLINE && Py_TYPE(reader) != self->hot->streams.plain_reader)
        what = leave_to_asyncio(self, result); /* asyncio's calls readuntil, which may be another */
    else if (self->kind == READLINE || self->kind == READUNTIL)
        what = read_line(self, buffer, result);
    else if (self->n <= 0)
        what = leave_to_asyncio(self, result);
    else if (self->kind == READ)
        what = size == 0 && !reader->eof && !self->waited ? wait_for_data(self, result)
                                                    : take(self, buffer, size < self->n ? size : self->n, result);
    else if (size >= self->n)
        what = take(self, buffer, self->n, result);
    else
        what = reader->eof ? leave_to_asyncio(self, result) : wait_for_data(self, result);
    Py_XDECREF(buffer);
    return what;
}

/* Whether drain has nothing to wait for and nothing to tell; -1 with an exception. */
static int may_write(struct call *self)
{
    struct writer *writer = (struct writer *)self->owner;
    const struct hot *hot = self->hot;
    PyObject *reader = take_reference(self->owner, &writer->reader);
    PyObject *protocol = take_reference(self->owner, &writer->protocol);
    PyObject *transport = take_reference(self->owner, &writer->transport);
    int answer = 0;
    if (transport != NULL && protocol != NULL && PyObject_TypeCheck(protocol, hot->streams.Protocol_type)
        && !((struct reader_protocol *)protocol)->paused && !((struct reader_protocol *)protocol)->connection_lost
        && (!is_set(reader)
            || (PyObject_TypeCheck(reader, hot->streams.Reader_type) && !is_set(((struct reader *)reader)->exception)))) {
        PyObject *closing = PyObject_CallMethodNoArgs(transport, hot->names.is_closing);
        int is_closing = closing == NULL ? -1 : PyObject_IsTrue(closing);
        Py_XDECREF(closing);
        answer = is_closing < 0 ? -1 : !is_closing;
    }
    Py_XDECREF(reader);
    Py_XDECREF(protocol);
    Py_XDECREF(transport);
    return answer;
}

static PySendResult begin(struct call *self, PyObject **result)
{
    if (self->kind != DRAIN)
        return read_some(self, result);
    int may = may_write(self);
    if (may < 0)
        return PYGEN_ERROR;
    if (!may)
        return leave_to_asyncio(self, result);
    *result = Py_NewRef(Py_None);
    return PYGEN_RETURN;
}

static PySendResult go_on(struct call *self, PyObject **result)
{
    PyObject *waiter = Py_NewRef(self->waiter), *done = PyObject_CallMethodNoArgs(waiter, self->hot->names.result), *error;
    if (done == NULL) {
        error = take_exception();
        int early = await_again(self->hot, waiter);
        if (early > 0) {
            Py_DECREF(error);
            *result = waiter;
            WRITE(self->progress, WAITING);
            return PYGEN_NEXT;
        }
        if (early == 0)
            PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    Py_DECREF(waiter);
    stop_waiting(self);
    if (done == NULL)
        return PYGEN_ERROR;
    Py_DECREF(done);
    return read_some(self, result);
}

static PySendResult finish(struct call *self, PySendResult what)
{
    if (what != PYGEN_NEXT) {
        put_reference((PyObject *)self, &self->coroutine, NULL);
        WRITE(self->progress, FINISHED);
    }
    return what;
}

/* Begin to do something with it: it is RUNNING then, and refused to all others.  How far it was; RUNNING or FINISHED if
 * nothing can be done with it now, with the exception that a coroutine raises. */
static enum progress claim(struct call *self)
{
    enum progress before;
    Py_BEGIN_CRITICAL_SECTION(self);
    before = READ(self->progress);
    if (before != FINISHED)
        WRITE(self->progress, RUNNING);
    Py_END_CRITICAL_SECTION();
    if (before == FINISHED)
        PyErr_SetString(PyExc_RuntimeError, "cannot reuse already awaited coroutine");
    else if (before == RUNNING)
        PyErr_SetString(PyExc_ValueError, "coroutine already executing");
    return before;
}

static PySendResult call_send(PyObject *object, PyObject *value, PyObject **result)
{
    struct call *self = (struct call *)object;
    PySendResult what = PYGEN_ERROR;
    *result = NULL;
    switch (claim(self)) {
    case LEFT_TO_ASYNCIO:
        what = send_to_coroutine(self, value, result);
        break;
    case NEW:
        if (value != Py_None) { /* it has not begun by that */
            PyErr_SetString(PyExc_TypeError, "can't send non-None value to a just-started coroutine");
            WRITE(self->progress, NEW);
            return PYGEN_ERROR;
        }
        what = begin(self, result);
        break;
    case WAITING:
        what = go_on(self, result);
        break;
    default: /* refused */
        return PYGEN_ERROR;
    }
    return finish(self, what);
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The methods of a coroutine
 * ------------------------------------------------------------------------------------------------------------------ */

/* As an iterator: the result is in a StopIteration. */
static PyObject *as_iterator(PySendResult what, PyObject *result)
{
    if (what != PYGEN_RETURN)
        return result;
    if (result != Py_None)
        PyErr_SetObject(PyExc_StopIteration, result);
    Py_DECREF(result);
    return NULL;
}

static PyObject *call_next(PyObject *self)
{
    PyObject *result;
    PySendResult what = call_send(self, Py_None, &result);
    return as_iterator(what, result);
}

static PyObject *call_await(PyObject *object)
{
    struct call *self = (struct call *)object;
    enum progress progress = READ(self->progress);
    if (progress == WAITING || progress == LEFT_TO_ASYNCIO) {
        PyErr_SetString(PyExc_RuntimeError, "coroutine is being awaited already");
        return NULL;
    }
    return Py_NewRef(object);
}

static PyObject *call_method_send(PyObject *self, PyObject *value)
{
    PyObject *result;
    PySendResult what = call_send(self, value, &result);
    if (what == PYGEN_RETURN && result == Py_None)
        PyErr_SetNone(PyExc_StopIteration);
    return as_iterator(what, result);
}

/* Raise what `throw` was given: an exception, or a class and perhaps a value and a traceback. */
static void raise_what_is_thrown(PyObject *args)
{
    PyObject *type, *value = NULL, *traceback = NULL;
    if (!PyArg_UnpackTuple(args, "throw", 1, 3, &type, &value, &traceback))
        return;
    if (PyExceptionInstance_Check(type)) {
        PyErr_SetObject((PyObject *)Py_TYPE(type), type);
        return;
    }
    if (!PyExceptionClass_Check(type)) {
        PyErr_SetString(PyExc_TypeError, "exceptions must be classes or instances deriving from BaseException");
        return;
    }
    PyErr_SetObject(type, value);
}

static PyObject *call_throw(PyObject *object, PyObject *args)
{
    struct call *self = (struct call *)object;
    enum progress before = claim(self);
    if (before == RUNNING || before == FINISHED)
        return NULL;
    if (before == LEFT_TO_ASYNCIO) {
        PyObject *throw = PyObject_GetAttrString(self->coroutine, "throw"), *result;
        result = throw == NULL ? NULL : PyObject_CallObject(throw, args);
        Py_XDECREF(throw);
        if (result == NULL)
            finish(self, PYGEN_ERROR);
        else
            WRITE(self->progress, LEFT_TO_ASYNCIO);
        return result;
    }
    raise_what_is_thrown(args);
    if (before == WAITING)
        stop_waiting(self);
    finish(self, PYGEN_ERROR);
    return NULL;
}

static PyObject *call_close(PyObject *object, PyObject *ignored)
{
    struct call *self = (struct call *)object;
    PyObject *done = NULL;
    enum progress before = claim(self);
    if (before == RUNNING)
        return NULL;
    if (before == FINISHED) {
        PyErr_Clear();
        Py_RETURN_NONE;
    }
    if (before == LEFT_TO_ASYNCIO) {
        done = PyObject_CallMethod(self->coroutine, "close", NULL);
    } else {
        if (before == WAITING)
            stop_waiting(self);
        done = Py_NewRef(Py_None);
    }
    finish(self, PYGEN_RETURN);
    return done;
}

static PyObject *call_name(PyObject *object, void *qualified)
{
    const struct call *self = (struct call *)object;
    const char *name = method_names[self->kind], *class = self->kind == DRAIN ? "StreamWriter" : "StreamReader";
    return qualified == NULL ? PyUnicode_FromString(name) : PyUnicode_FromFormat("%s.%s", class, name);
}

/* What is awaited, as a coroutine tells it: to asyncio's call graphs. */
static PyObject *call_awaits(PyObject *object, void *ignored)
{
    struct call *self = (struct call *)object;
    PyObject *what = take_reference(object, &self->waiter);
    if (what == NULL)
        what = take_reference(object, &self->coroutine);
    return what == NULL ? Py_NewRef(Py_None) : what;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The type
 * ------------------------------------------------------------------------------------------------------------------ */

PyObject *make_call(struct hot *hot, PyObject *owner, enum call_kind kind, Py_ssize_t n)
{
    struct call *self = PyObject_GC_New(struct call, hot->streams.Call_type);
    if (self == NULL)
        return NULL;
    self->hot = hot;
    Py_INCREF(hot->module);
    self->owner = Py_NewRef(owner);
    self->waiter = self->coroutine = NULL;
    self->n = n;
    self->seen = 0;
    self->waited = 0;
    self->kind = kind;
    self->progress = NEW;
    PyObject_GC_Track(self);
    return (PyObject *)self;
}

static void call_finalize(PyObject *object)
{
    struct call *self = (struct call *)object;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    enum progress before = self->progress;
    self->progress = FINISHED;
    if (before == WAITING)
        stop_waiting(self);
    else if (before == NEW
             && PyErr_WarnFormat(PyExc_RuntimeWarning, 1, "coroutine '%s.%s' was never awaited",
                                 self->kind == DRAIN ? "StreamWriter" : "StreamReader", method_names[self->kind])
                    < 0)
        PyErr_WriteUnraisable(object);
    PyErr_Restore(type, value, traceback); /* unlike PyErr_SetObject it leaves the context alone */
}

static int call_traverse(PyObject *object, visitproc visit, void *arg)
{
    struct call *self = (struct call *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->owner);
    Py_VISIT(self->waiter);
    Py_VISIT(self->coroutine);
    return visit_hot(self->hot, visit, arg);
}

static int call_clear(PyObject *object)
{
    struct call *self = (struct call *)object;
    self->progress = FINISHED;
    Py_CLEAR(self->owner);
    Py_CLEAR(self->waiter);
    Py_CLEAR(self->coroutine);
    return 0;
}

static void call_dealloc(PyObject *object)
{
    struct call *self = (struct call *)object;
    if (self->progress != FINISHED && PyObject_CallFinalizerFromDealloc(object) < 0)
        return;
    PyObject_GC_UnTrack(object);
    call_clear(object);
    free_with_hot(object, self->hot);
}

static PyMethodDef call_methods[] = {
    {"send", call_method_send, METH_O, "send($self, value, /)\n--\n\nGo on."},
    {"throw", call_throw, METH_VARARGS, "Raise an exception where it waits."},
    {"close", call_close, METH_NOARGS, "close($self, /)\n--\n\nGive up."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef call_getset[] = {
    {"__name__", call_name, NULL, NULL, NULL},
    {"__qualname__", call_name, NULL, NULL, (void *)method_names},
    {"cr_await", call_awaits, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

int add_stream_calls(struct hot *hot)
{
    PyType_Slot slots[] = {
        {Py_tp_dealloc, call_dealloc},
        {Py_tp_finalize, call_finalize},
        {Py_tp_traverse, call_traverse},
        {Py_tp_clear, call_clear},
        {Py_tp_iter, PyObject_SelfIter},
        {Py_tp_iternext, call_next},
        {Py_am_await, call_await},
        {Py_am_send, call_send},
        {Py_tp_methods, call_methods},
        {Py_tp_getset, call_getset},
        {0, NULL},
    };
    PyType_Spec spec = {
        .name = "iocp_loop._hot.StreamCall",
        .basicsize = sizeof(struct call),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
        .slots = slots,
    };
    hot->streams.Call_type = (PyTypeObject *)PyType_FromModuleAndSpec(hot->module, &spec, NULL);
    return hot->streams.Call_type == NULL ? -1 : 0;
}
