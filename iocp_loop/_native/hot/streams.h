/*
 * A stream transport in the native tier: the way of one message (streams.c), how it is made (connections.c), its life
 * (life.c), its type (transports.c).
 *
 * The base of the type is a class in Python, which brings flow control and its slots; ours come behind them.
 */
#ifndef IOCP_LOOP_STREAMS_H
#define IOCP_LOOP_STREAMS_H

#include "hot.h"

/* How far its life has come, as in life.py, whose State this is; UNMADE: its constructor has not run, or has failed. */
enum life_state { UNMADE, MADE, OPEN, CLOSING, LOST, OVER, CLOSED, STATES };

enum { STREAM_OBJECTS = 12 };
struct stream {
    union {
        PyObject *objects[STREAM_OBJECTS]; /* NULL before __init__, and once the garbage collector has cleared them */
        struct {
            PyObject *sock, *protocol, *context, *proactor, *server, *receive, *sending, *file, *queue, *held, *info;
            PyObject *peername; /* the object, or bytes: the name as the system gave it, see name_is_raw */
        };
    };
    PyObject *sockname; /* as the system gave it, once the socket is closed; else NULL */
    Py_ssize_t queued;
    int writes_after_loss;
    char state;   /* an enum life_state; what stands below moves independently of it, see transports.py */
    char direct;  /* write may send at once: nothing is queued, nothing has ended */
    char paused, eof_asked, at_eof, buffered;
    char by_call;     /* `sock` is a plain socket, so that its descriptor can be used */
    char name_is_raw; /* of the peer */
};

void stream_dealloc(PyObject *self); /* transports.c */

/* Our type, of which the type of `self` is a class in Python; beneath it stands the class that brings flow control. */
static inline PyTypeObject *stream_type_of(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    while (type->tp_dealloc != stream_dealloc)
        type = type->tp_base;
    return type;
}

/* Whether `self`, anything, is a stream transport. */
static inline int is_stream(PyObject *self)
{
    const PyTypeObject *type = Py_TYPE(self);
    while (type != NULL && type->tp_dealloc != stream_dealloc)
        type = type->tp_base;
    return type != NULL;
}

static inline struct stream *stream_of(PyObject *self)
{
    return (struct stream *)((char *)self + stream_type_of(self)->tp_base->tp_basicsize);
}

static inline int is_none(PyObject *object) { return object == NULL || object == Py_None; }

/* Done with what a call returned: 0, or -1 with the exception. */
static inline int done_with(PyObject *result)
{
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* A new reference to what is in `*place`, a field of `self`; AttributeError if `self` was not made by its constructor. */
static inline PyObject *take_field(PyObject *self, PyObject **place, const char *name)
{
    PyObject *object = take_reference(self, place);
    if (object == NULL)
        PyErr_SetString(PyExc_AttributeError, name);
    return object;
}

/* NULL with an exception once the garbage collector has cleared the type. */
static inline struct hot *hot_of_stream(PyObject *self) { return hot_of(Py_TYPE(self), stream_dealloc); }

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

/* streams.c */
PyObject *stream_write(PyObject *self, PyObject *data);
PyObject *stream_received(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *stream_received_into(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *stream_get_buffer(PyObject *self, PyObject *const *args, Py_ssize_t count);

/* addresses.c.  A name of a socket, bytes as the system gave it: whether name_object knows its family, and what the socket
 * module makes of it. */
int is_name_known(PyObject *raw);
PyObject *name_object(PyObject *raw);
/* The name of the peer of a plain socket, or its own, so; NULL if the system gives none, or one that is not known. */
PyObject *raw_name(PyObject *sock, int of_peer);
/* sock.METHOD(), getpeername or getsockname; None where it says nothing. */
PyObject *ask_for_name(const struct hot *hot, PyObject *sock, PyObject *method);

/* connections.c */
int stream_init(PyObject *self, PyObject *args, PyObject *kwargs);
/* loop.call_soon(self.NAME, argument), for what tells the protocol of its beginning and its end. */
int call_end_soon(const struct hot *hot, PyObject *self, PyObject *name, PyObject *argument);
/* The server, if it has one, forgets it. */
int leave_server(const struct hot *hot, PyObject *self);
/* Close the socket, which is not to be found by its number any more. */
int leave_table_and_close(const struct hot *hot, PyObject *self, PyObject *sock);
/* Neither paused nor closing, and nothing is held: see SocketTransport._choose_receiver. */
int arm_receive(const struct hot *hot, PyObject *self);
PyObject *stream_arm_receive(PyObject *self, PyObject *ignored);
PyObject *stream_set_protocol(PyObject *self, PyObject *protocol);
PyObject *stream_receive_ended(PyObject *self, PyObject *error);
PyObject *stream_peername(PyObject *self, void *ignored);
PyObject *stream_sockname(PyObject *self, void *ignored);

/* life.c */
void stream_finalize(PyObject *self);
PyObject *stream_begin(PyObject *self, PyObject *waiter);
PyObject *stream_close(PyObject *self, PyObject *ignored);
PyObject *stream_stop_receiving(PyObject *self, PyObject *ignored);
PyObject *stream_lose_connection(PyObject *self, PyObject *exception);
PyObject *stream_call_connection_lost(PyObject *self, PyObject *exception);
PyObject *stream_release(PyObject *self, PyObject *ignored);

#endif
