/*
 * The native halves of iocp_loop.StreamReader, StreamReaderProtocol and StreamWriter (iocp_loop/readers.py).  Each class there
 * derives from one of these and from asyncio's class.  What both look at has its place here, under asyncio's names: as a
 * member of the type comes before an entry of the instance's __dict__, "self._eof = True" over there sets `eof` here.  So
 * what is rare is left to asyncio's methods.
 */

#include "readers.h"

/* ---------------------------------------------------------------------------------------------------------------------
 * The reader
 * ------------------------------------------------------------------------------------------------------------------ */

static void reader_dealloc(PyObject *self);
static void protocol_dealloc(PyObject *self);
static void writer_dealloc(PyObject *self);

/* Wake who waits for data.  -1: error. */
static int wake(const struct hot *hot, struct reader *reader)
{
    PyObject *waiter = take_reference((PyObject *)reader, &reader->waiter), *done;
    if (!is_set(waiter)) {
        Py_XDECREF(waiter);
        return 0;
    }
    put_reference((PyObject *)reader, &reader->waiter, Py_NewRef(Py_None));
    done = PyObject_CallMethodNoArgs(waiter, hot->names.cancelled);
    int cancelled = done == NULL ? -1 : PyObject_IsTrue(done);
    if (cancelled == 0)
        Py_SETREF(done, PyObject_CallMethodOneArg(waiter, hot->names.set_result, Py_None));
    Py_XDECREF(done);
    Py_DECREF(waiter);
    return done == NULL || cancelled < 0 ? -1 : 0;
}

/* Let the transport pause, now that there is too much. */
static int pause_transport(struct reader *reader)
{
    PyObject *transport = take_reference((PyObject *)reader, &reader->transport), *done;
    done = transport == NULL ? Py_NewRef(Py_None) : PyObject_CallMethod(transport, "pause_reading", NULL);
    Py_XDECREF(transport);
    if (done != NULL) {
        Py_DECREF(done);
        reader->paused = 1;
        return 0;
    }
    if (!PyErr_ExceptionMatches(PyExc_NotImplementedError))
        return -1;
    PyErr_Clear(); /* then all has to be kept, and nobody is asked again */
    put_reference((PyObject *)reader, &reader->transport, Py_NewRef(Py_None));
    return 0;
}

static PyObject *feed(const struct hot *hot, struct reader *reader, PyObject *data)
{
    if (reader->eof) {
        PyErr_SetString(PyExc_AssertionError, "feed_data after feed_eof");
        return NULL;
    }
    int some = PyObject_IsTrue(data);
    if (some <= 0)
        return some < 0 ? NULL : Py_NewRef(Py_None);
    PyObject *buffer = take_reference((PyObject *)reader, &reader->buffer), *grown;
    if (buffer == NULL || !PyByteArray_Check(buffer)) {
        Py_XDECREF(buffer);
        PyErr_SetString(PyExc_TypeError, "the buffer of a StreamReader is a bytearray");
        return NULL;
    }
    grown = PySequence_InPlaceConcat(buffer, data);
    Py_ssize_t size = PyByteArray_GET_SIZE(buffer);
    Py_DECREF(buffer);
    if (grown == NULL)
        return NULL;
    Py_DECREF(grown);
    if (wake(hot, reader) < 0)
        return NULL;
    if (is_set(reader->transport) && !reader->paused) {
        Py_ssize_t limit = reader->limit == NULL ? -1 : limit_of(reader);
        if (limit == -1 && PyErr_Occurred())
            return NULL;
        if (size / 2 + size % 2 > limit && pause_transport(reader) < 0)
            return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *reader_feed_data(PyObject *self, PyObject *data)
{
    struct hot *hot = hot_of(Py_TYPE(self), reader_dealloc);
    return hot == NULL ? NULL : feed(hot, (struct reader *)self, data);
}

/* The one argument of a method, by place or by `name`; NULL, perhaps with an exception, if there is none. */
static PyObject *argument(PyObject *const *args, Py_ssize_t count, PyObject *kwnames, const char *name)
{
    Py_ssize_t named = kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames);
    if (count + named > 1)
        PyErr_Format(PyExc_TypeError, "at most one argument is expected, %s", name);
    else if (named == 1 && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(kwnames, 0), name) != 0)
        PyErr_Format(PyExc_TypeError, "got an unexpected keyword argument %R", PyTuple_GET_ITEM(kwnames, 0));
    else if (count + named == 1)
        return args[0]; /* borrowed */
    return NULL;
}

static PyObject *call_with_size(PyObject *self, enum call_kind kind, PyObject *number)
{
    struct hot *hot = hot_of(Py_TYPE(self), reader_dealloc);
    if (hot == NULL || PyErr_Occurred())
        return NULL;
    Py_ssize_t n = number == NULL ? -1 : PyLong_Check(number) ? PyLong_AsSsize_t(number) : -2;
    if (n >= -1 && !PyErr_Occurred())
        return make_call(hot, self, kind, n);
    PyErr_Clear(); /* too large, or less, or something else: asyncio's coroutine tells */
    return PyObject_CallMethod((PyObject *)hot->streams.reader, kind == READ ? "read" : "readexactly", "OO", self, number);
}

static PyObject *reader_read(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames)
{
    return call_with_size(self, READ, argument(args, count, kwnames, "n"));
}

static PyObject *reader_readexactly(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames)
{
    PyObject *n = argument(args, count, kwnames, "n"); /* borrowed */
    if (n == NULL && !PyErr_Occurred())
        PyErr_SetString(PyExc_TypeError, "readexactly() missing 1 required positional argument: 'n'");
    return n == NULL ? NULL : call_with_size(self, READEXACTLY, n);
}

static PyObject *reader_readline(PyObject *self, PyObject *ignored) { return call_with_size(self, READLINE, NULL); }

/* Only until the end of a line; other separators are asyncio's. */
static PyObject *reader_readuntil(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames)
{
    struct hot *hot = hot_of(Py_TYPE(self), reader_dealloc);
    PyObject *separator = argument(args, count, kwnames, "separator"); /* borrowed */
    if (hot == NULL || PyErr_Occurred())
        return NULL;
    if (separator == NULL
        || (PyBytes_CheckExact(separator) && PyBytes_GET_SIZE(separator) == 1 && *PyBytes_AS_STRING(separator) == '\n'))
        return make_call(hot, self, READUNTIL, -1);
    return PyObject_CallMethod((PyObject *)hot->streams.reader, "readuntil", "OO", self, separator);
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The protocol and the writer
 * ------------------------------------------------------------------------------------------------------------------ */

static PyObject *protocol_data_received(PyObject *self, PyObject *data)
{
    struct hot *hot = hot_of(Py_TYPE(self), protocol_dealloc);
    PyObject *weak = take_reference(self, &((struct reader_protocol *)self)->reader), *reader, *done;
    reader = hot != NULL && is_set(weak) ? PyObject_CallNoArgs(weak) : NULL;
    Py_XDECREF(weak);
    if (hot == NULL || PyErr_Occurred())
        return NULL;
    if (!is_set(reader)) {
        Py_XDECREF(reader);
        Py_RETURN_NONE;
    }
    if (Py_TYPE(reader) == hot->streams.plain_reader) /* not of a class that may have another feed_data */
        done = feed(hot, (struct reader *)reader, data);
    else
        done = PyObject_CallMethodOneArg(reader, hot->names.feed_data, data);
    Py_DECREF(reader);
    return done;
}

static PyObject *writer_write(PyObject *self, PyObject *data)
{
    struct hot *hot = hot_of(Py_TYPE(self), writer_dealloc);
    PyObject *transport = take_reference(self, &((struct writer *)self)->transport), *done = NULL;
    if (hot != NULL && transport == NULL)
        PyErr_SetString(PyExc_AttributeError, "_transport");
    else if (hot != NULL)
        done = PyObject_CallMethodOneArg(transport, hot->names.write, data);
    Py_XDECREF(transport);
    if (done == NULL)
        return NULL;
    Py_DECREF(done);
    Py_RETURN_NONE;
}

static PyObject *writer_drain(PyObject *self, PyObject *ignored)
{
    struct hot *hot = hot_of(Py_TYPE(self), writer_dealloc);
    return hot == NULL ? NULL : make_call(hot, self, DRAIN, -1);
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The types
 * ------------------------------------------------------------------------------------------------------------------ */

#define REFERENCES(TYPE, FIRST, LAST) \
    static int TYPE##_traverse(PyObject *self, visitproc visit, void *arg) \
    { \
        for (PyObject **place = &((struct TYPE *)self)->FIRST; place <= &((struct TYPE *)self)->LAST; place++) \
            Py_VISIT(*place); \
        Py_VISIT(Py_TYPE(self)); \
        return 0; \
    } \
    static int TYPE##_clear(PyObject *self) \
    { \
        for (PyObject **place = &((struct TYPE *)self)->FIRST; place <= &((struct TYPE *)self)->LAST; place++) \
            Py_CLEAR(*place); \
        return 0; \
    } \
    static void TYPE##_free(PyObject *self) \
    { \
        PyObject_GC_UnTrack(self); \
        TYPE##_clear(self); \
        free_object(self); \
    }
REFERENCES(reader, buffer, limit)
REFERENCES(reader_protocol, reader, reader)
REFERENCES(writer, transport, reader)
static void reader_dealloc(PyObject *self) { reader_free(self); }
static void protocol_dealloc(PyObject *self) { reader_protocol_free(self); }
static void writer_dealloc(PyObject *self) { writer_free(self); }

static PyMemberDef reader_members[] = {
    {"_buffer", T_OBJECT_EX, offsetof(struct reader, buffer), 0, NULL},
    {"_waiter", T_OBJECT, offsetof(struct reader, waiter), 0, NULL},
    {"_exception", T_OBJECT, offsetof(struct reader, exception), 0, NULL},
    {"_transport", T_OBJECT, offsetof(struct reader, transport), 0, NULL},
    {"_loop", T_OBJECT_EX, offsetof(struct reader, loop), 0, NULL},
    {"_limit", T_OBJECT_EX, offsetof(struct reader, limit), 0, NULL},
    {"_eof", T_BOOL, offsetof(struct reader, eof), 0, NULL},
    {"_paused", T_BOOL, offsetof(struct reader, paused), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};
static PyMemberDef protocol_members[] = {
    {"_stream_reader_wr", T_OBJECT, offsetof(struct reader_protocol, reader), 0, NULL},
    {"_paused", T_BOOL, offsetof(struct reader_protocol, paused), 0, NULL},
    {"_connection_lost", T_BOOL, offsetof(struct reader_protocol, connection_lost), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};
static PyMemberDef writer_members[] = {
    {"_transport", T_OBJECT_EX, offsetof(struct writer, transport), 0, NULL},
    {"_protocol", T_OBJECT_EX, offsetof(struct writer, protocol), 0, NULL},
    {"_reader", T_OBJECT, offsetof(struct writer, reader), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};
#define WITH_KEYWORDS(function) (PyCFunction)(void (*)(void))function, METH_FASTCALL | METH_KEYWORDS
static PyMethodDef reader_methods[] = {
    {"feed_data", reader_feed_data, METH_O, "feed_data($self, data)\n--\n\nSome bytes for whoever reads."},
    {"read", WITH_KEYWORDS(reader_read),
     "read($self, n=-1)\n--\n\nAwait up to `n` bytes, at least one unless the stream ends; all until the end if `n` is negative."},
    {"readexactly", WITH_KEYWORDS(reader_readexactly),
     "readexactly($self, n)\n--\n\nAwait exactly `n` bytes.  Raises IncompleteReadError if the stream ends before."},
    {"readline", reader_readline, METH_NOARGS,
     "readline($self)\n--\n\nAwait a line with its end.  Raises ValueError if it is longer than the limit."},
    {"readuntil", WITH_KEYWORDS(reader_readuntil),
     "readuntil($self, separator=b'\\n')\n--\n\nAwait what comes until `separator`, which is included."},
    {NULL, NULL, 0, NULL},
};
static PyMethodDef protocol_methods[] = {
    {"data_received", protocol_data_received, METH_O, "data_received($self, data)\n--\n\nSome bytes for the reader."},
    {NULL, NULL, 0, NULL},
};
static PyMethodDef writer_methods[] = {
    {"write", writer_write, METH_O, "write($self, data)\n--\n\nSend `data` without blocking; the rest is queued."},
    {"drain", writer_drain, METH_NOARGS, "drain($self)\n--\n\nAwait that more may be written."},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject *make_type(struct hot *hot, const char *name, size_t size, PyType_Slot *slots)
{
    PyType_Spec spec = {
        .name = name,
        .basicsize = (int)size,
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
        .slots = slots,
    };
    return add_type(hot, &spec, NULL);
}

#define SLOTS(prefix, references) \
    {Py_tp_dealloc, prefix##_dealloc}, {Py_tp_traverse, references##_traverse}, {Py_tp_clear, references##_clear}, \
        {Py_tp_methods, prefix##_methods}, {Py_tp_members, prefix##_members}, {0, NULL}

int add_readers(struct hot *hot)
{
    PyType_Slot of_reader[] = {SLOTS(reader, reader)}, of_protocol[] = {SLOTS(protocol, reader_protocol)},
                of_writer[] = {SLOTS(writer, writer)};
    hot->streams.Reader_type = make_type(hot, "iocp_loop._hot.Reader", sizeof(struct reader), of_reader);
    hot->streams.Protocol_type =
        make_type(hot, "iocp_loop._hot.ReaderProtocol", sizeof(struct reader_protocol), of_protocol);
    hot->streams.Writer_type = make_type(hot, "iocp_loop._hot.Writer", sizeof(struct writer), of_writer);
    hot->streams.reader = (PyTypeObject *)attribute_of("asyncio.streams", "StreamReader");
    hot->streams.writer = (PyTypeObject *)attribute_of("asyncio.streams", "StreamWriter");
    return hot->streams.Reader_type == NULL || hot->streams.Protocol_type == NULL || hot->streams.Writer_type == NULL
                   || hot->streams.reader == NULL || hot->streams.writer == NULL || add_stream_calls(hot) < 0
               ? -1
               : 0;
}

/* use_reader(class): the class in Python above Reader, which has feed_data from there. */
PyObject *use_reader(PyObject *module, PyObject *class)
{
    Py_XSETREF(hot_in(module)->streams.plain_reader, (PyTypeObject *)Py_NewRef(class));
    Py_RETURN_NONE;
}
