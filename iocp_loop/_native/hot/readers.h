/* The native halves of iocp_loop.StreamReader, StreamReaderProtocol and StreamWriter (readers.c), and what their coroutines
 * are (stream_calls.c). */
#ifndef IOCP_LOOP_READERS_H
#define IOCP_LOOP_READERS_H

#include "hot.h"

/* What asyncio's methods, which are the way for all that is rare, know as _buffer, _waiter and so on. */
struct reader {
    PyObject_HEAD
    PyObject *buffer, *waiter, *exception, *transport, *loop, *limit;
    char eof, paused;
};
struct reader_protocol {
    PyObject_HEAD
    PyObject *reader; /* a weak reference */
    char paused, connection_lost;
};
struct writer {
    PyObject_HEAD
    PyObject *transport, *protocol, *reader;
};

/* What a call does, and by which name asyncio has it. */
enum call_kind { READ, READEXACTLY, READLINE, READUNTIL, DRAIN };

/* The awaitable of a call; `n` is for READ and READEXACTLY. */
PyObject *make_call(struct hot *hot, PyObject *owner, enum call_kind kind, Py_ssize_t n);
int add_stream_calls(struct hot *hot);
/* The limit of a reader, which has one; it may be larger than any size, or math.inf.  -1 with an exception. */
Py_ssize_t limit_of(struct reader *reader);

static inline int is_set(PyObject *field) { return field != NULL && field != Py_None; }

#endif
