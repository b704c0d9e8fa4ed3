/*
 * The two functions that every message goes through, for a stream transport: _received, which gives the protocol what
 * has come, and write, which tries to send at once.  All that is rare (an error, the end, a full socket) is left to the
 * class in Python above it, by calling a method of that.
 *
 * The base of the type is a class in Python, which brings flow control and its slots; ours come behind them.
 */

#include "hot.h"

#ifdef _WIN32
#include <winsock2.h>
#else
#include <errno.h>
#include <sys/socket.h>
#endif

struct stream {
    PyObject *sock, *protocol, *context;
    char direct;  /* write may send at once: nothing is queued, nothing has ended */
    char paused, closing;
    char by_call; /* `sock` is a plain socket, so that its descriptor can be used */
};

static void stream_dealloc(PyObject *self);

/* Our type, of which the type of `self` is a class in Python; beneath it stands the class that brings flow control. */
static PyTypeObject *stream_type_of(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    while (type->tp_dealloc != stream_dealloc)
        type = type->tp_base;
    return type;
}

static struct stream *stream_of(PyObject *self)
{
    return (struct stream *)((char *)self + stream_type_of(self)->tp_base->tp_basicsize);
}

/* Both at once.  NULL with an exception once the garbage collector has cleared the type. */
static struct hot *hot_of_stream(PyObject *self, struct stream **stream)
{
    PyTypeObject *type = stream_type_of(self);
    *stream = (struct stream *)((char *)self + type->tp_base->tp_basicsize);
    return hot_behind(type);
}

/* ---------------------------------------------------------------------------------------------------------------------
 * What the system says
 * ------------------------------------------------------------------------------------------------------------------ */

#ifdef _WIN32
/* As in streams.py. */
enum { MOST_AT_ONCE = 256 * 1024 };
#endif

/* Try to send; the number of bytes, 0 if there is no room just now, or -1 with an OSError set. */
static Py_ssize_t try_to_send(descriptor fd, const char *data, size_t size)
{
#ifdef _WIN32
    int count = send((SOCKET)fd, data, size > MOST_AT_ONCE ? MOST_AT_ONCE : (int)size, 0);
    if (count != SOCKET_ERROR)
        return count;
    int code = WSAGetLastError();
    if (code == WSAEWOULDBLOCK || code == WSAEINTR)
        return 0;
    PyErr_SetExcFromWindowsErr(PyExc_OSError, code);
    return -1;
#else
    ssize_t count = send(fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (count >= 0)
        return count;
    if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)
        return 0;
    PyErr_SetFromErrno(PyExc_OSError);
    return -1;
#endif
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The methods
 * ------------------------------------------------------------------------------------------------------------------ */

static PyObject *write_otherwise(PyObject *self, PyObject *data)
{
    struct stream *stream;
    const struct hot *hot = hot_of_stream(self, &stream);
    return hot == NULL ? NULL : PyObject_CallMethodOneArg(self, hot->names.write_otherwise, data);
}

static PyObject *stream_write(PyObject *self, PyObject *data)
{
    struct stream *stream = stream_of(self);
    if (!stream->direct || !PyBytes_CheckExact(data))
        return write_otherwise(self, data);
    PyObject *sock = take_reference(self, &stream->sock);
    if (sock == NULL || !stream->by_call) {
        Py_XDECREF(sock);
        return write_otherwise(self, data);
    }
    Py_ssize_t size = PyBytes_GET_SIZE(data);
    Py_ssize_t sent = try_to_send(socket_descriptor(sock), PyBytes_AS_STRING(data), (size_t)size);
    Py_DECREF(sock);
    if (sent == size)
        Py_RETURN_NONE;
    if (sent < 0) {
        if (fail(self, "_fatal_error", "Fatal write error on socket transport") < 0)
            return NULL;
        Py_RETURN_NONE;
    }
    PyObject *view = PyMemoryView_FromObject(data), *rest, *done;
    rest = view == NULL ? NULL : PySequence_GetSlice(view, sent, size);
    Py_XDECREF(view);
    if (rest == NULL)
        return NULL;
    done = PyObject_CallMethod(self, "_enqueue", "((N))", rest);
    if (done == NULL)
        return NULL;
    Py_DECREF(done);
    Py_RETURN_NONE;
}

/* The protocol, and the context of the connection; 0 with an exception if there are none any more. */
static inline int find_protocol(PyObject *self, struct stream *stream, PyObject **context, PyObject **protocol)
{
    Py_BEGIN_CRITICAL_SECTION(self);
    *context = Py_XNewRef(stream->context);
    *protocol = Py_XNewRef(stream->protocol);
    Py_END_CRITICAL_SECTION();
    if (*context != NULL && *protocol != NULL)
        return 1;
    Py_XDECREF(*context);
    Py_XDECREF(*protocol);
    PyErr_SetString(PyExc_RuntimeError, "the transport has no protocol");
    return 0;
}

/* protocol.data_received(data) in the context of the connection. */
static PyObject *give(const struct hot *hot, PyObject *context, PyObject *protocol, PyObject *data)
{
    PyObject *result = NULL;
    int entered = enter_context(context);
    if (entered > 0) {
        result = PyObject_CallMethodOneArg(protocol, hot->names.data_received, data);
        if (PyContext_Exit(context) < 0)
            Py_CLEAR(result);
    } else if (entered == 0) {
        PyObject *method = PyObject_GetAttr(protocol, hot->names.data_received);
        if (method != NULL)
            result = call_in_context(context, method, &data, 1);
        Py_XDECREF(method);
    }
    return result;
}

static PyObject *stream_received(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "_received() takes data and an error");
        return NULL;
    }
    struct stream *stream;
    const struct hot *hot = hot_of_stream(self, &stream);
    if (hot == NULL)
        return NULL;
    int some = PyBytes_CheckExact(args[0]) ? PyBytes_GET_SIZE(args[0]) > 0 : PyObject_IsTrue(args[0]);
    if (some < 0)
        return NULL;
    if (!some)
        return PyObject_CallMethodOneArg(self, hot->names.receive_ended, args[1]);
    PyObject *context, *protocol;
    if (!find_protocol(self, stream, &context, &protocol))
        return NULL;
    PyObject *result = give(hot, context, protocol, args[0]);
    Py_DECREF(protocol);
    Py_DECREF(context);
    if (result != NULL)
        Py_DECREF(result);
    else if (fail(self, "_receiving_failed", "Fatal error: protocol.data_received() call failed.") < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The same for a BufferedProtocol
 * ------------------------------------------------------------------------------------------------------------------ */

/* protocol.method(argument) in the context of the connection. */
static PyObject *ask(PyObject *self, PyObject *method, PyObject *argument)
{
    PyObject *context, *protocol, *result = NULL;
    if (!find_protocol(self, stream_of(self), &context, &protocol))
        return NULL;
    PyObject *callable = PyObject_GetAttr(protocol, method);
    if (callable != NULL)
        result = call_in_context(context, callable, &argument, 1);
    Py_XDECREF(callable);
    Py_DECREF(protocol);
    Py_DECREF(context);
    return result;
}

/* Get a buffer of the protocol for `hint` bytes.  1: here it is, `view` of `buffer`, both to be released; 0: there is none,
 * as the protocol has closed or been replaced meanwhile, or has failed to give one, and was told; -1: error. */
static int get_buffer(const struct hot *hot, PyObject *self, Py_ssize_t hint, PyObject **buffer, Py_buffer *view)
{
    struct stream *stream = stream_of(self);
    PyObject *size = PyLong_FromSsize_t(hint), *protocol = take_reference(self, &stream->protocol);
    *buffer = size == NULL ? NULL : ask(self, hot->names.get_buffer, size);
    int wanted = !stream->closing && stream->protocol == protocol;
    Py_XDECREF(size);
    Py_XDECREF(protocol);
    if (*buffer != NULL && !wanted) {
        Py_CLEAR(*buffer);
        return 0;
    }
    int failed = *buffer == NULL || PyObject_GetBuffer(*buffer, view, PyBUF_SIMPLE) < 0;
    if (!failed && (view->readonly || view->len == 0)) {
        if (view->readonly)
            PyErr_SetString(PyExc_TypeError, "a writable buffer is needed, this one is read-only");
        else
            PyErr_SetString(PyExc_RuntimeError, "get_buffer() returned an empty buffer");
        PyBuffer_Release(view);
        failed = 1;
    }
    if (!failed)
        return 1;
    Py_CLEAR(*buffer);
    return fail(self, "_receiving_failed", "Fatal error: protocol.get_buffer() call failed.");
}

/* A buffer to receive into; None if there must be none now, or the protocol failed to give one. */
static PyObject *stream_get_buffer(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    struct stream *stream;
    const struct hot *hot = hot_of_stream(self, &stream);
    Py_ssize_t hint = -1;
    PyObject *buffer;
    Py_buffer view;
    if (hot == NULL)
        return NULL;
    if (count > 0) {
        hint = PyLong_AsSsize_t(args[0]);
        if (hint == -1 && PyErr_Occurred())
            return NULL;
    }
    if (stream->paused || stream->closing || stream->context == NULL || stream->protocol == NULL)
        Py_RETURN_NONE;
    int got = get_buffer(hot, self, hint, &buffer, &view);
    if (got < 0)
        return NULL;
    if (got == 0)
        Py_RETURN_NONE;
    PyBuffer_Release(&view);
    PyObject *memory = PyMemoryView_FromObject(buffer);
    Py_DECREF(buffer);
    if (memory != NULL) {
        const Py_buffer *plain = PyMemoryView_GET_BUFFER(memory);
        if (plain->ndim != 1 || strcmp(plain->format, "B") != 0)
            Py_SETREF(memory, PyObject_CallMethod(memory, "cast", "s", "B"));
    }
    if (memory == NULL) {
        if (fail(self, "_receiving_failed", "Fatal error: protocol.get_buffer() call failed.") < 0)
            return NULL;
        Py_RETURN_NONE;
    }
    return memory;
}

static int buffer_updated(const struct hot *hot, PyObject *self, Py_ssize_t count)
{
    PyObject *number = PyLong_FromSsize_t(count);
    PyObject *done = number == NULL ? NULL : ask(self, hot->names.buffer_updated, number);
    Py_XDECREF(number);
    Py_XDECREF(done);
    return done == NULL ? fail(self, "_receiving_failed", "Fatal error: protocol.buffer_updated() call failed.") : 0;
}

/* What is left of `data` from `count` on: to be given bit by bit, or, with an exception on its way that ends the loop's run,
 * to be held. */
static int go_on_with_rest(PyObject *self, PyObject *data, Py_ssize_t count)
{
    PyObject *exception = PyErr_Occurred() ? take_exception() : NULL;
    PyObject *whole = PyMemoryView_FromObject(data), *rest, *done;
    rest = whole == NULL ? NULL : PySequence_GetSlice(whole, count, PyBytes_GET_SIZE(data));
    done = rest == NULL ? NULL : PyObject_CallMethod(self, exception == NULL ? "_copy_to_protocol" : "_hold", "O", rest);
    Py_XDECREF(whole);
    Py_XDECREF(rest);
    Py_XDECREF(done);
    if (exception != NULL) {
        PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
        Py_DECREF(exception);
        return -1;
    }
    return done == NULL ? -1 : 0;
}

/* Copy what has come into the protocol's buffer; what does not fit in, or is not taken now, goes the slower way. */
static int copy_to_protocol(const struct hot *hot, PyObject *self, PyObject *data)
{
    PyObject *buffer;
    Py_buffer view;
    Py_ssize_t size = PyBytes_GET_SIZE(data), count = 0;
    int got = get_buffer(hot, self, size, &buffer, &view), failed = got < 0 ? -1 : 0;
    if (got > 0) {
        count = size < view.len ? size : view.len;
        memcpy(view.buf, PyBytes_AS_STRING(data), (size_t)count);
        PyBuffer_Release(&view);
        Py_DECREF(buffer);
        failed = buffer_updated(hot, self, count);
    }
    return count < size ? go_on_with_rest(self, data, count) : failed;
}

static PyObject *stream_received_into(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    struct stream *stream;
    const struct hot *hot = hot_of_stream(self, &stream);
    if (hot == NULL)
        return NULL;
    if (count != 2 || stream->context == NULL || stream->protocol == NULL) {
        PyErr_SetString(PyExc_TypeError, "_received_into() takes a value and an error");
        return NULL;
    }
    int some = args[0] == Py_None ? 0 : PyObject_IsTrue(args[0]), failed;
    if (some < 0)
        return NULL;
    if (!some)
        return PyObject_CallMethodOneArg(self, hot->names.receive_ended, args[1]);
    if (PyLong_Check(args[0])) {
        Py_ssize_t size = PyLong_AsSsize_t(args[0]);
        failed = size == -1 && PyErr_Occurred() ? -1 : buffer_updated(hot, self, size);
    }
    else if (PyBytes_CheckExact(args[0]))
        failed = copy_to_protocol(hot, self, args[0]);
    else {
        PyErr_SetString(PyExc_TypeError, "a completion of a stream is bytes or their number");
        failed = -1;
    }
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Looking ahead, see ahead.c
 * ------------------------------------------------------------------------------------------------------------------ */

#ifdef __linux__
int is_stream(PyObject *self)
{
    const PyTypeObject *type = Py_TYPE(self);
    while (type != NULL && type->tp_dealloc != stream_dealloc)
        type = type->tp_base;
    return type != NULL;
}

static struct stream *stream_at(const struct hot *hot, PyObject *self)
{
    return (struct stream *)((char *)self + hot->stream_offset);
}

void fetch_stream(const struct hot *hot, PyObject *self)
{
    fetch(self, sizeof(PyObject));
    fetch(stream_at(hot, self), sizeof(struct stream));
}

/* Sizes are guesses: what is used of a socket is its descriptor, of a context what PyContext_Enter uses, and of a protocol
 * the way to its attributes, which CPython up to 3.12 keeps before the object. */
void fetch_stream_parts(const struct hot *hot, PyObject *self)
{
    const struct stream *stream = stream_at(hot, self);
    if (stream->protocol != NULL)
        fetch((const char *)stream->protocol - 32, 32 + sizeof(PyObject));
    if (stream->context != NULL)
        fetch(stream->context, 64);
    if (stream->sock != NULL)
        fetch(stream->sock, 32);
}
#endif

/* ---------------------------------------------------------------------------------------------------------------------
 * The type
 * ------------------------------------------------------------------------------------------------------------------ */

static PyObject *get_sock(PyObject *self, void *ignored)
{
    PyObject *sock = take_reference(self, &stream_of(self)->sock);
    if (sock == NULL)
        PyErr_SetString(PyExc_AttributeError, "_sock");
    return sock;
}

static int set_sock(PyObject *self, PyObject *value, void *ignored)
{
    struct stream *stream;
    const struct hot *hot = hot_of_stream(self, &stream);
    if (hot == NULL)
        return -1;
    stream->by_call = value != NULL && is_socket(hot, value);
    put_reference(self, &stream->sock, Py_XNewRef(value));
    return 0;
}

static int stream_clear(PyObject *self)
{
    struct stream *stream = stream_of(self);
    stream->direct = stream->by_call = 0;
    Py_CLEAR(stream->sock);
    Py_CLEAR(stream->protocol);
    Py_CLEAR(stream->context);
    clear_slots(self, stream_type_of(self)->tp_base);
    return 0;
}

static int stream_traverse(PyObject *self, visitproc visit, void *arg)
{
    struct stream *stream = stream_of(self);
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(stream->sock);
    Py_VISIT(stream->protocol);
    Py_VISIT(stream->context);
    return visit_slots(self, stream_type_of(self)->tp_base, visit, arg);
}

static void stream_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    stream_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *stream_is_closing(PyObject *self, PyObject *ignored)
{
    return PyBool_FromLong(stream_of(self)->closing);
}

static PyMethodDef stream_methods[] = {
    {"is_closing", stream_is_closing, METH_NOARGS,
     "is_closing($self)\n--\n\nTrue once ``close`` or ``abort`` was called, or the connection was lost."},
    {"write", stream_write, METH_O,
     "write($self, data)\n--\n\n"
               "Send `data` (bytes, bytearray or memoryview) without blocking; the rest is queued."},
    {"_received", (PyCFunction)(void (*)(void))stream_received, METH_FASTCALL,
     "A completion for a Protocol: data, the end (empty), or an error."},
    {"_received_into", (PyCFunction)(void (*)(void))stream_received_into, METH_FASTCALL,
     "A completion for a BufferedProtocol: so many bytes are in its buffer already, or here they are."},
    {"_get_buffer_of_protocol", (PyCFunction)(void (*)(void))stream_get_buffer, METH_FASTCALL,
     "A buffer to receive into; None if there must be none now, or the protocol failed to give one."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef stream_getset[] = {
    {"_sock", get_sock, set_sock, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyObject *make_stream_type(PyObject *module, PyObject *base)
{
    struct hot *hot = hot_in(module);
    if (hot->Stream_type != NULL)
        return Py_NewRef(hot->Stream_type);
    if (!PyType_Check(base) || !PyType_IS_GC((PyTypeObject *)base) || ((PyTypeObject *)base)->tp_weaklistoffset) {
        PyErr_SetString(PyExc_TypeError, "the base must be a class with nothing but slots");
        return NULL;
    }
    if (check_slots((PyTypeObject *)base) < 0)
        return NULL;
    Py_ssize_t offset = ((PyTypeObject *)base)->tp_basicsize;
    PyMemberDef members[] = {
        {"_protocol", T_OBJECT_EX, offset + (Py_ssize_t)offsetof(struct stream, protocol), 0, NULL},
        {"_context", T_OBJECT_EX, offset + (Py_ssize_t)offsetof(struct stream, context), 0, NULL},
        {"_direct", T_BOOL, offset + (Py_ssize_t)offsetof(struct stream, direct), 0, NULL},
        {"_paused", T_BOOL, offset + (Py_ssize_t)offsetof(struct stream, paused), 0, NULL},
        {"_closing", T_BOOL, offset + (Py_ssize_t)offsetof(struct stream, closing), 0, NULL},
        {NULL, 0, 0, 0, NULL},
    };
    PyType_Slot slots[] = {
        {Py_tp_dealloc, stream_dealloc},
        {Py_tp_traverse, stream_traverse},
        {Py_tp_clear, stream_clear},
        {Py_tp_methods, stream_methods},
        {Py_tp_members, members},
        {Py_tp_getset, stream_getset},
        {Py_tp_doc, (char *)"A stream transport's way of one message in and out."},
        {0, NULL},
    };
    PyType_Spec spec = {
        .name = "iocp_loop._hot.Stream",
        .basicsize = (int)(offset + (Py_ssize_t)sizeof(struct stream)),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
        .slots = slots,
    };
    PyObject *bases = PyTuple_Pack(1, base);
    hot->stream_offset = offset;
    hot->Stream_type = bases == NULL ? NULL : (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, bases);
    Py_XDECREF(bases);
    return Py_XNewRef(hot->Stream_type);
}
