/*
 * How a stream transport is made, who knows of it (its server, the loop's table), and how it receives (connections.py).  Its
 * life from there on is in life.c; what is rare is left to the class in Python above it.
 */

#include "streams.h"

#include "calls.h"
#include "handles.h"

#ifndef _WIN32
#include <netinet/tcp.h>
#endif

/* The context of connection_made and connection_lost is before 3.15 that of whoever brings them about. */
#if PY_VERSION_HEX >= 0x030F0000
#define CONTEXT_OF_ENDS(stream) ((stream)->context)
#else
#define CONTEXT_OF_ENDS(stream) NULL
#endif

int call_end_soon(const struct hot *hot, PyObject *self, PyObject *name, PyObject *argument)
{
    PyObject *context = CONTEXT_OF_ENDS(stream_of(self)); /* borrowed */
    PyObject *loop = take_field(self, &SLOT(self, hot->flow.loop), "_loop"), *handle = NULL;
    PyObject *callback = loop == NULL ? NULL : PyObject_GetAttr(self, name);
    if (callback != NULL) {
        PyObject *args[] = {loop, callback, argument, context};
        handle = PyObject_VectorcallMethod(hot->names.call_soon, args, 3, context == NULL ? NULL : hot->life.of_context);
    }
    Py_XDECREF(callback);
    Py_XDECREF(loop);
    return done_with(handle);
}

/* The peer's name can't be asked for any more once the peer has reset the connection. */
static int keep_peername(const struct hot *hot, struct stream *stream)
{
    PyObject *name = stream->by_call ? raw_name(stream->sock, 1) : NULL;
    stream->name_is_raw = name != NULL;
    if (name == NULL)
        name = ask_for_name(hot, stream->sock, hot->names.getpeername);
    Py_XSETREF(stream->peername, name);
    return name == NULL ? -1 : 0;
}

PyObject *stream_peername(PyObject *self, void *ignored)
{
    struct stream *stream = stream_of(self);
    PyObject *name = take_field(self, &stream->peername, "_peername");
    if (name == NULL || !stream->name_is_raw)
        return name;
    Py_SETREF(name, name_object(name));
    if (name != NULL) {
        stream->name_is_raw = 0;
        put_reference(self, &stream->peername, Py_NewRef(name));
    }
    return name;
}

PyObject *stream_sockname(PyObject *self, void *ignored)
{
    const struct hot *hot = hot_of_stream(self);
    if (hot == NULL)
        return NULL;
    struct stream *stream = stream_of(self);
    PyObject *kept = take_reference(self, &stream->sockname), *sock, *name;
    if (kept != NULL) {
        Py_SETREF(kept, name_object(kept));
        return kept;
    }
    sock = take_field(self, &stream->sock, "_sock");
    if (sock == NULL)
        return NULL;
    name = ask_for_name(hot, sock, hot->names.getsockname);
    Py_DECREF(sock);
    return name;
}

/* The socket is about to be closed, and can't be asked for its name afterwards. */
static int keep_sockname(const struct hot *hot, PyObject *self, PyObject *sock)
{
    struct stream *stream = stream_of(self);
    if (stream->info != NULL && PyDict_Check(stream->info) && PyDict_GetItemWithError(stream->info, hot->names.sockname) != NULL)
        return 0;
    PyObject *raw = is_socket(hot, sock) ? raw_name(sock, 0) : NULL;
    put_reference(self, &stream->sockname, raw);
    if (raw != NULL || PyErr_Occurred())
        return raw == NULL ? -1 : 0;
    return done_with(PyObject_CallMethodOneArg(self, hot->names.get_extra_info, hot->names.sockname)); /* which keeps it */
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The server, and the loop's table of transports
 * ------------------------------------------------------------------------------------------------------------------ */

/* Tell a server of a new connection or of its end, in the way of the running Python. */
static int tell_server(const struct hot *hot, PyObject *server, PyObject *method, PyObject *self)
{
    return done_with(hot->servers_count ? PyObject_CallMethodNoArgs(server, method)
                                           : PyObject_CallMethodOneArg(server, method, self));
}

static PyObject *number_of_socket(const struct hot *hot, PyObject *sock)
{
    return is_socket(hot, sock) ? PyLong_FromLongLong((long long)socket_descriptor(sock))
                                : PyObject_CallMethodNoArgs(sock, hot->names.fileno);
}

/* weakref.KeyedRef(self, remove, number), without its frames. */
static PyObject *keyed_reference(const struct hot *hot, PyObject *self, PyObject *remove, PyObject *number)
{
    PyObject *args = PyTuple_Pack(2, self, remove);
    PyObject *reference = args == NULL ? NULL : _PyWeakref_RefType.tp_new((PyTypeObject *)hot->life.keyed_ref, args, NULL);
    Py_XDECREF(args);
    if (reference != NULL)
        Py_XSETREF(SLOT(reference, hot->flow.key), Py_NewRef(number));
    return reference;
}

/* loop._transports[the number of its socket] = self: a WeakValueDictionary, which would take several frames for it. */
static int enter_table(const struct hot *hot, PyObject *self, PyObject *sock, PyObject *loop)
{
    PyObject *number = number_of_socket(hot, sock);
    if (number == NULL)
        return -1;
    struct loop_head *head = own_loop(hot, loop);
    PyObject *reference = head == NULL || head->transport_refs == NULL || head->forget_transport == NULL
                              ? Py_NewRef(Py_None)
                              : keyed_reference(hot, self, head->forget_transport, number);
    int failed = reference == NULL ? -1 : reference == Py_None ? 0 : PyObject_SetItem(head->transport_refs, number, reference);
    Py_DECREF(number);
    Py_XDECREF(reference);
    return failed;
}

int leave_server(const struct hot *hot, PyObject *self)
{
    struct stream *stream = stream_of(self);
    PyObject *server = take_reference(self, &stream->server);
    put_reference(self, &stream->server, Py_NewRef(Py_None));
    int failed = is_none(server) ? 0 : tell_server(hot, server, hot->names.detach, self);
    Py_XDECREF(server);
    return failed;
}

int leave_table_and_close(const struct hot *hot, PyObject *self, PyObject *sock)
{
    if (keep_sockname(hot, self, sock) < 0)
        return -1;
    PyObject *loop = SLOT(self, hot->flow.loop), *number = number_of_socket(hot, sock), *known = NULL; /* the first is borrowed */
    struct loop_head *head = loop == NULL ? NULL : own_loop(hot, loop);
    PyObject *table = head == NULL ? NULL : head->transport_refs;
    PyObject *reference = number == NULL || table == NULL ? NULL : find(table, number);
    if (reference != NULL)
        known = PyObject_CallNoArgs(reference);
    if (known == self && PyDict_DelItem(table, number) < 0)
        PyErr_Clear(); /* it has left meanwhile */
    Py_XDECREF(known);
    Py_XDECREF(reference);
    Py_XDECREF(number);
    return PyErr_Occurred() ? -1 : close_socket(hot, sock);
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The beginning
 * ------------------------------------------------------------------------------------------------------------------ */

/* The arguments of __init__, borrowed. */
struct arguments {
    PyObject *loop, *proactor, *sock, *protocol, *waiter, *extra, *server, *context;
};

static int parse_arguments(PyObject *args, PyObject *kwargs, struct arguments *given)
{
    static char *const keywords[] = {"loop", "proactor", "sock", "protocol", "waiter", "extra", "server", "context", NULL};
    *given = (struct arguments){.waiter = Py_None, .extra = Py_None, .server = Py_None, .context = Py_None};
    if (kwargs == NULL)
        return PyArg_UnpackTuple(args, "__init__", 4, 8, &given->loop, &given->proactor, &given->sock, &given->protocol,
                                 &given->waiter, &given->extra, &given->server, &given->context);
    return PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|OOOO:__init__", (char **)keywords, &given->loop,
                                       &given->proactor, &given->sock, &given->protocol, &given->waiter, &given->extra,
                                       &given->server, &given->context);
}

/* Take what get_extra_info is to know, out of which comes the peer's name, or ask for that. */
static int take_extra(const struct hot *hot, struct stream *stream, PyObject *extra)
{
    if (PyBytes_CheckExact(extra) && is_name_known(extra)) { /* of a connection that was accepted here */
        stream->name_is_raw = 1;
        Py_XSETREF(stream->peername, Py_NewRef(extra));
        return 0;
    }
    if (!PyDict_Check(extra) || PyDict_GET_SIZE(extra) == 0)
        return keep_peername(hot, stream);
    PyObject *name = find(extra, hot->names.peername);
    if (name == NULL ? PyErr_Occurred() != NULL : PyDict_DelItem(extra, hot->names.peername) < 0) {
        Py_XDECREF(name);
        return -1;
    }
    stream->name_is_raw = 0;
    Py_XSETREF(stream->peername, name == NULL ? Py_NewRef(Py_None) : name);
    if (PyDict_GET_SIZE(extra) > 0)
        Py_XSETREF(stream->info, Py_NewRef(extra));
    return 0;
}

/* Receiving happens in one context, as it does in the handle that asyncio's own loops keep for a reader. */
static PyObject *context_for(const struct hot *hot, PyObject *loop, PyObject *context)
{
    if (loop_in_debug(hot, loop))
        return PyObject_CallFunction(hot->life.context_for, "OOi", loop, context, 1);
    return context == Py_None ? PyContext_CopyCurrent() : Py_NewRef(context);
}

static int set_up(const struct hot *hot, PyObject *self, const struct arguments *given)
{
    struct stream *stream = stream_of(self);
    stream->state = UNMADE;
    stream->by_call = stream->direct = stream->name_is_raw = 0; /* what goes now, of an earlier call, may look at it */
    for (size_t n = 0; n < STREAM_OBJECTS; n++)
        Py_XSETREF(stream->objects[n], Py_NewRef(Py_None));
    Py_SETREF(stream->sock, Py_NewRef(given->sock));
    Py_SETREF(stream->proactor, Py_NewRef(given->proactor));
    Py_SETREF(stream->server, Py_NewRef(given->server));
    Py_SETREF(stream->held, PyTuple_New(0));
    Py_CLEAR(stream->sockname);
    stream->by_call = (char)is_socket(hot, given->sock);
    stream->queued = stream->writes_after_loss = 0;
    stream->paused = stream->eof_asked = stream->at_eof = stream->buffered = 0;
    stream->direct = 1;
    Py_XSETREF(SLOT(self, hot->flow.loop), Py_NewRef(given->loop));
    Py_XSETREF(SLOT(self, hot->flow.protocol_paused), Py_NewRef(Py_False));
    Py_XSETREF(SLOT(self, hot->flow.high_water), Py_NewRef(hot->life.high));
    Py_XSETREF(SLOT(self, hot->flow.low_water), Py_NewRef(hot->life.low));
    if (stream->held == NULL || take_extra(hot, stream, given->extra) < 0)
        return -1;
    Py_SETREF(stream->context, context_for(hot, given->loop, given->context));
    return stream->context == NULL ? -1 : 0;
}

/* Set TCP_NODELAY, as asyncio does: a small write goes out before what is on its way is acknowledged. */
static int send_without_delay(const struct hot *hot, struct stream *stream)
{
    int on = 1;
    if (!stream->by_call)
        return done_with(PyObject_CallOneArg(hot->life.send_without_delay, stream->sock));
    if (is_tcp_socket(stream->sock)) /* it fails where the peer has reset the connection: receiving tells */
        setsockopt(socket_descriptor(stream->sock), IPPROTO_TCP, TCP_NODELAY, (const char *)&on, sizeof on);
    return 0;
}

/* The constructor fails with an exception: `server` knows of no connection then. */
static int take_back(const struct hot *hot, PyObject *self, PyObject *server)
{
    PyObject *error = take_exception();
    put_reference(self, &stream_of(self)->server, Py_NewRef(Py_None));
    if (server == Py_None || tell_server(hot, server, hot->names.detach, self) == 0)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_DECREF(error);
    return -1;
}

int stream_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    const struct hot *hot = hot_of_stream(self);
    if (hot == NULL)
        return -1;
    struct arguments given;
    struct stream *stream = stream_of(self);
    if (!parse_arguments(args, kwargs, &given))
        return -1;
    /* Before anything else: a server that has been closed meanwhile refuses. */
    if (given.server != Py_None && tell_server(hot, given.server, hot->names.attach, self) < 0)
        return -1;
    if (set_up(hot, self, &given) < 0)
        return take_back(hot, self, given.server);
    if (done_with(PyObject_CallMethodOneArg(self, hot->names.set_protocol, given.protocol)) < 0 || send_without_delay(hot, stream) < 0
        || call_end_soon(hot, self, hot->names.begin, given.waiter) < 0)
        return take_back(hot, self, given.server);
    stream->state = MADE; /* from now on the socket is ours */
    return enter_table(hot, self, given.sock, given.loop) < 0 ? take_back(hot, self, given.server) : 0;
}

/* Whether a protocol provides the memory to receive into; -1 with an exception. */
static int is_buffered(const struct hot *hot, PyObject *protocol)
{
    /* isinstance() asks an object for its __class__ before it says no; a Protocol needs not be asked. */
    int plain = PyObject_TypeCheck(protocol, (PyTypeObject *)hot->life.protocol)
                && !PyObject_TypeCheck(protocol, (PyTypeObject *)hot->life.buffered_protocol);
    int buffered = plain ? 0 : PyObject_IsInstance(protocol, hot->life.buffered_protocol);
    if (buffered <= 0)
        return buffered;
    int bytes = PyObject_IsInstance(protocol, hot->life.takes_bytes);
    return bytes < 0 ? -1 : !bytes;
}

PyObject *stream_set_protocol(PyObject *self, PyObject *protocol)
{
    const struct hot *hot = hot_of_stream(self);
    if (hot == NULL)
        return NULL;
    struct stream *stream = stream_of(self);
    int buffered = is_buffered(hot, protocol);
    if (buffered < 0)
        return NULL;
    put_reference(self, &stream->protocol, Py_NewRef(protocol));
    stream->buffered = (char)buffered;
    if (is_none(stream->receive))
        Py_RETURN_NONE;
    PyObject *get_buffer = stream->buffered ? PyObject_GetAttr(self, hot->names.get_buffer_of_protocol) : Py_NewRef(Py_None);
    PyObject *receive = take_reference(self, &stream->receive);
    int failed = get_buffer == NULL || receive == NULL ? -1 : PyObject_SetAttr(receive, hot->names.get_buffer, get_buffer);
    Py_XDECREF(get_buffer);
    Py_XDECREF(receive);
    return failed ? NULL : PyObject_CallMethodNoArgs(self, hot->names.choose_receiver);
}

int arm_receive(const struct hot *hot, PyObject *self)
{
    struct stream *stream = stream_of(self);
    int buffered = stream->buffered;
    PyObject *deliver = PyObject_GetAttr(self, buffered ? hot->names.received_into : hot->names.received);
    PyObject *get_buffer = buffered ? PyObject_GetAttr(self, hot->names.get_buffer_of_protocol) : NULL, *op = NULL;
    PyObject *proactor = NULL, *sock = NULL;
    if (deliver != NULL && (get_buffer != NULL || !buffered)
        && (proactor = take_field(self, &stream->proactor, "_proactor")) != NULL
        && (sock = take_field(self, &stream->sock, "_sock")) != NULL) {
        PyObject *args[] = {proactor, sock, deliver, get_buffer};
        op = PyObject_VectorcallMethod(hot->names.receive_stream, args, buffered ? 4 : 3, NULL);
    }
    Py_XDECREF(proactor);
    Py_XDECREF(sock);
    Py_XDECREF(deliver);
    Py_XDECREF(get_buffer);
    if (op == NULL)
        return -1;
    put_reference(self, &stream->receive, op);
    return 0;
}

PyObject *stream_arm_receive(PyObject *self, PyObject *ignored)
{
    const struct hot *hot = hot_of_stream(self);
    if (hot == NULL)
        return NULL;
    if (arm_receive(hot, self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The peer's end
 * ------------------------------------------------------------------------------------------------------------------ */

/* object.METHOD() in `context`, a real one or something else that has a `run`. */
static PyObject *call_method_in(const struct hot *hot, PyObject *context, PyObject *object, PyObject *method)
{
    int entered = enter_context(context);
    if (entered < 0)
        return NULL;
    PyObject *callable = entered ? NULL : PyObject_GetAttr(object, method), *result = NULL;
    if (entered)
        result = PyObject_CallMethodNoArgs(object, method);
    else if (callable != NULL)
        result = PyObject_CallMethodOneArg(context, hot->names.run, callable);
    if (entered && PyContext_Exit(context) < 0)
        Py_CLEAR(result);
    Py_XDECREF(callable);
    return result;
}

/* self.close() in a copy of the context, which connection_lost inherits. */
static int close_in_copy(const struct hot *hot, PyObject *self, PyObject *context)
{
    PyObject *copy = PyContext_CheckExact(context) ? PyContext_Copy(context) : PyObject_CallMethodNoArgs(context, hot->names.copy);
    int failed = copy == NULL ? -1 : done_with(call_method_in(hot, copy, self, hot->names.close));
    Py_XDECREF(copy);
    return failed;
}

static int end_of_stream(const struct hot *hot, PyObject *self)
{
    PyObject *context, *protocol, *answer;
    if (!find_protocol(self, stream_of(self), &context, &protocol))
        return fail(self, "_receiving_failed", "Fatal error: protocol.eof_received() call failed.");
    answer = call_method_in(hot, context, protocol, hot->names.eof_received);
    int keep_open = answer == NULL ? -1 : PyObject_IsTrue(answer), failed = 0;
    if (keep_open < 0)
        failed = fail(self, "_receiving_failed", "Fatal error: protocol.eof_received() call failed.");
    else if (!keep_open)
        failed = close_in_copy(hot, self, context);
    Py_DECREF(protocol);
    Py_DECREF(context);
    Py_XDECREF(answer);
    return failed;
}

PyObject *stream_receive_ended(PyObject *self, PyObject *error)
{
    const struct hot *hot = hot_of_stream(self);
    if (hot == NULL)
        return NULL;
    struct stream *stream = stream_of(self);
    put_reference(self, &stream->receive, Py_NewRef(Py_None));
    stream->at_eof = 1;
    if (error == Py_None) {
        if (end_of_stream(hot, self) < 0)
            return NULL;
        Py_RETURN_NONE;
    }
    if (was_cancelled(error)) /* that would be the loop closing under us */
        Py_RETURN_NONE;
    PyObject *text = PyUnicode_FromString("Fatal read error on socket transport"), *done;
    done = text == NULL ? NULL : PyObject_CallMethodObjArgs(self, hot->names.receiving_failed, error, text, NULL);
    Py_XDECREF(text);
    return done;
}
