/*
 * The two functions that every message goes through, for a stream transport: _received, which gives the protocol what
 * has come, and write, which tries to send at once.  All that is rare (an error, a full socket) is left to the
 * class in Python above it, by calling a method of that; the end is for connections.c.
 */

#include "streams.h"

#ifdef _WIN32
#include <winsock2.h>
#else
#include <errno.h>
#include <sys/socket.h>
#endif

/* ---------------------------------------------------------------------------------------------------------------------
 * What the system says
 * ------------------------------------------------------------------------------------------------------------------ */

PyObject *set_most_at_once(PyObject *module, PyObject *size)
{
    hot_in(module)->most_at_once = PyLong_AsSize_t(size);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

/* Try to send; the number of bytes, 0 if there is no room just now, or -1 with an OSError set. */
static Py_ssize_t try_to_send(PyObject *self, descriptor fd, const char *data, size_t size)
{
#ifdef _WIN32
    const struct hot *hot = hot_of_stream(self);
    if (hot == NULL)
        return -1;
    int count = send((SOCKET)fd, data, (int)(size < hot->most_at_once ? size : hot->most_at_once), 0);
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
    const struct hot *hot = hot_of_stream(self);
    return hot == NULL ? NULL : PyObject_CallMethodOneArg(self, hot->names.write_otherwise, data);
}

PyObject *stream_write(PyObject *self, PyObject *data)
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
    Py_ssize_t sent = try_to_send(self, socket_descriptor(sock), PyBytes_AS_STRING(data), (size_t)size);
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

PyObject *stream_received(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "_received() takes data and an error");
        return NULL;
    }
    PyTypeObject *type = stream_type_of(self); /* asked once: this runs for every message */
    struct stream *stream = (struct stream *)((char *)self + type->tp_base->tp_basicsize);
    const struct hot *hot = hot_behind(type);
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
    int wanted = stream->state < CLOSING && stream->protocol == protocol;
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
PyObject *stream_get_buffer(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    const struct hot *hot = hot_of_stream(self);
    struct stream *stream = stream_of(self);
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
    if (stream->paused || stream->state >= CLOSING || stream->context == NULL || stream->protocol == NULL)
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

PyObject *stream_received_into(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    const struct hot *hot = hot_of_stream(self);
    struct stream *stream = stream_of(self);
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
