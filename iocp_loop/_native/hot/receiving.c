/*
 * Receiving from stream sockets, once for all who do it: a driver for its streams (epoll.c), sock_recv (sockets.c).
 */

#include "receiving.h"

#include "calls.h"

/* Small pieces are received into a buffer that stays in the cache, and copied out of it.  Where large ones are to be
 * expected, copying costs more than to receive into memory for the bytes object itself, cut to size afterwards.  Not more
 * at once than malloc takes from its heap: beyond (mallopt(3), M_MMAP_THRESHOLD) each would be mapped anew. */
enum { DIRECT_FROM = 4 * 1024, DIRECT_MOST = 128 * 1024 - 64 };

/* What recv has not brought, beside -1 with errno: no memory, or none now. */
enum { NO_BUFFER = -2 };

/* recv at most `most` bytes, as many as are to be expected after those before; the number, 0 at the end, -1 with errno,
 * or NO_BUFFER with an exception.  `data` is set if there are some. */
static Py_ssize_t receive_bytes(struct hot *hot, descriptor fd, size_t most, size_t *expected, PyObject **data)
{
    Py_ssize_t count;
    *data = NULL;
    if (*expected < DIRECT_FROM) {
        char *memory = scratch(hot);
        if (memory == NULL)
            return NO_BUFFER;
        count = recv(fd, memory, CALL_SIZE(most < SCRATCH_SIZE ? most : SCRATCH_SIZE), MSG_DONTWAIT);
        if (count <= 0)
            return count;
        *data = PyBytes_FromStringAndSize(memory, count);
        if (count >= DIRECT_FROM)
            *expected = count < DIRECT_MOST ? (size_t)count : DIRECT_MOST;
    } else {
        size_t room = most < *expected ? most : *expected;
        PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)room);
        if (bytes == NULL)
            return NO_BUFFER;
        count = recv(fd, PyBytes_AS_STRING(bytes), CALL_SIZE(room), MSG_DONTWAIT);
        if (count <= 0) {
            int code = last_error();
            Py_DECREF(bytes);
            set_last_error(code);
            return count;
        }
        if ((size_t)count != room)
            _PyBytes_Resize(&bytes, count); /* NULL if that fails */
        /* Compared with what was expected and not with what was asked for: who asks for little gets small pieces. */
        if ((size_t)count == *expected)
            *expected = 2 * *expected < DIRECT_MOST ? 2 * *expected : DIRECT_MOST;
        else if ((size_t)count < *expected / 4)
            *expected /= 2;
        *data = bytes;
    }
    return *data == NULL ? NO_BUFFER : count;
}

PyObject *receive_now(struct hot *hot, descriptor fd, size_t size, size_t *expected)
{
    PyObject *data;
    Py_ssize_t count;
    do
        count = receive_bytes(hot, fd, size, expected, &data);
    while (count == -1 && was_interrupted());
    if (count > 0)
        return data;
    if (count == 0)
        return PyBytes_FromStringAndSize(NULL, 0);
    if (count == NO_BUFFER)
        return NULL;
    return would_wait() ? Py_NewRef(Py_None) : raise_last_error();
}

/* recv for the stream `op` into what its owner provides, who may do anything when asked: end the stream, close its socket.
 * -1 with errno; NO_BUFFER if nothing is to be received now, with an exception or without.  `filled`: the buffer is full. */
static Py_ssize_t receive_into(const struct hot *hot, PyObject *op, int *filled)
{
    PyObject *sock = Py_NewRef(SLOT(op, hot->operation.handle));
    PyObject *get_buffer = Py_NewRef(SLOT(op, hot->operation.get_buffer)), *buffer = PyObject_CallNoArgs(get_buffer);
    Py_buffer view;
    Py_ssize_t count = NO_BUFFER;
    int code = 0;
    *filled = 0;
    if (buffer != NULL && buffer != Py_None && PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE) == 0) {
        if (SLOT(op, hot->operation.state) == hot->states.in_flight) {
            count = recv(socket_descriptor(sock), view.buf, CALL_SIZE((size_t)view.len), MSG_DONTWAIT);
            code = last_error();
            *filled = count > 0 && count == view.len;
        }
        PyBuffer_Release(&view);
    }
    Py_XDECREF(buffer);
    Py_DECREF(get_buffer);
    Py_DECREF(sock);
    set_last_error(code);
    return count;
}

enum outcome receive_for_stream(struct hot *hot, PyObject *op, size_t *expected, struct piece *piece)
{
    PyObject *get_buffer = SLOT(op, hot->operation.get_buffer); /* borrowed */
    int lent = get_buffer != NULL && get_buffer != Py_None;
    piece->filled = 0;
    piece->value = NULL;
    if (lent)
        piece->size = receive_into(hot, op, &piece->filled);
    else
        piece->size = receive_bytes(hot, socket_descriptor(SLOT(op, hot->operation.handle)), SIZE_MAX, expected,
                                    &piece->value);
    if (piece->size == -1) {
        if (would_wait())
            return NOTHING;
        raise_last_error();
        return FAILED;
    }
    if (piece->size == NO_BUFFER)
        return PyErr_Occurred() ? FAILED : NOTHING;
    if (lent)
        piece->value = PyLong_FromSsize_t(piece->size);
    else if (piece->size == 0)
        piece->value = PyBytes_FromStringAndSize(NULL, 0);
    if (piece->value == NULL)
        return FAILED;
    return piece->size > 0 ? DATA : END;
}
