/*
 * The life of a stream transport: how it is made, how it begins, how it ends (connections.py).  What is rare in a life is
 * left to the class in Python above it.
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

static int is_none(PyObject *object) { return object == NULL || object == Py_None; }

/* Done with what a call returned: 0, or -1 with the exception. */
static int done_with(PyObject *result)
{
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* A new reference to what is in `*place`, a field of `self`; AttributeError if `self` was not made by its constructor. */
static PyObject *take_field(PyObject *self, PyObject **place, const char *name)
{
    PyObject *object = take_reference(self, place);
    if (object == NULL)
        PyErr_SetString(PyExc_AttributeError, name);
    return object;
}

/* self._proactor.METHOD(argument), or without `argument`. */
static PyObject *ask_proactor(PyObject *self, PyObject *method, PyObject *argument)
{
    PyObject *proactor = take_field(self, &stream_of(self)->proactor, "_proactor"), *done;
    if (proactor == NULL)
        return NULL;
    done = argument == NULL ? PyObject_CallMethodNoArgs(proactor, method) : PyObject_CallMethodOneArg(proactor, method, argument);
    Py_DECREF(proactor);
    return done;
}

/* loop.call_soon(self.NAME, argument), in `context` if that is not NULL. */
static int call_soon(const struct hot *hot, PyObject *self, PyObject *name, PyObject *argument, PyObject *context)
{
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

/* Close the socket, which is not to be found by its number any more. */
static int leave_table_and_close(const struct hot *hot, PyObject *self, PyObject *sock)
{
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
    stream->paused = stream->closing = stream->lost = stream->eof_asked = stream->at_eof = stream->buffered = 0;
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
    stream->alive = 1;
    if (done_with(PyObject_CallMethodOneArg(self, hot->names.set_protocol, given.protocol)) < 0 || send_without_delay(hot, stream) < 0
        || call_soon(hot, self, hot->names.begin, given.waiter, CONTEXT_OF_ENDS(stream)) < 0
        || enter_table(hot, self, given.sock, given.loop) < 0)
        return take_back(hot, self, given.server);
    return 0;
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

/* Neither paused nor closing, and nothing is held: see SocketTransport._choose_receiver. */
static int arm_receive(const struct hot *hot, PyObject *self)
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

/* waiter.METHOD(value), unless there is none or it was cancelled. */
static int tell_waiter(const struct hot *hot, PyObject *waiter, PyObject *method, PyObject *value)
{
    if (waiter == Py_None)
        return 0;
    PyObject *cancelled = PyObject_CallMethodNoArgs(waiter, hot->names.cancelled);
    int is_cancelled = cancelled == NULL ? -1 : PyObject_IsTrue(cancelled);
    Py_XDECREF(cancelled);
    return is_cancelled ? (is_cancelled < 0 ? -1 : 0) : done_with(PyObject_CallMethodOneArg(waiter, method, value));
}

PyObject *stream_begin(PyObject *self, PyObject *waiter)
{
    const struct hot *hot = hot_of_stream(self);
    if (hot == NULL)
        return NULL;
    struct stream *stream = stream_of(self);
    PyObject *protocol = take_field(self, &stream->protocol, "_protocol"), *error = NULL;
    int failed = protocol == NULL ? -1 : done_with(PyObject_CallMethodOneArg(protocol, hot->names.connection_made, self));
    Py_XDECREF(protocol);
    if (!failed && is_none(stream->receive) && !stream->closing && !stream->paused)
        failed = arm_receive(hot, self);
    if (failed) {
        if (ends_the_loop())
            return NULL;
        error = take_exception();
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        failed = fail(self, "_fatal_error", "Fatal error: protocol.connection_made() call failed.");
    }
    if (!failed)
        failed = tell_waiter(hot, waiter, error == NULL ? hot->names.set_result : hot->names.set_exception, error == NULL ? Py_None : error);
    Py_XDECREF(error);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The end
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

/* Whether `error`, of an operation, tells of a cancel. */
static int was_cancelled(PyObject *error)
{
    if (!PyObject_TypeCheck(error, (PyTypeObject *)PyExc_OSError))
        return 0;
    PyObject *code = PyObject_GetAttrString(error, "errno");
    int cancelled = code != NULL && PyLong_Check(code) && PyLong_AsLong(code) == ECANCELED;
    Py_XDECREF(code);
    PyErr_Clear();
    return cancelled;
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

PyObject *stream_stop_receiving(PyObject *self, PyObject *ignored)
{
    const struct hot *hot = hot_of_stream(self);
    if (hot == NULL)
        return NULL;
    struct stream *stream = stream_of(self);
    put_reference(self, &stream->held, PyTuple_New(0));
    if (is_none(stream->receive))
        Py_RETURN_NONE;
    PyObject *receive = take_field(self, &stream->receive, "_receive");
    PyObject *done = receive == NULL ? NULL : ask_proactor(self, hot->names.drop, receive);
    if (done == Py_True)
        put_reference(self, &stream->receive, Py_NewRef(Py_None));
    else if (done != NULL) {
        Py_SETREF(done, PyObject_CallMethodNoArgs(self, hot->names.choose_receiver));
        if (done != NULL)
            Py_SETREF(done, ask_proactor(self, hot->names.cancel, receive));
    }
    Py_XDECREF(receive);
    return done;
}

static int lose_connection(const struct hot *hot, PyObject *self, PyObject *exception)
{
    struct stream *stream = stream_of(self);
    if (stream->lost)
        return 0;
    stream->lost = 1;
    stream->direct = 0;
    if (!is_none(stream->file) && done_with(PyObject_CallMethodNoArgs(self, hot->names.fail_file)) < 0)
        return -1;
    return call_soon(hot, self, hot->names.call_connection_lost, exception, CONTEXT_OF_ENDS(stream));
}

PyObject *stream_lose_connection(PyObject *self, PyObject *exception)
{
    const struct hot *hot = hot_of_stream(self);
    if (hot == NULL)
        return NULL;
    if (lose_connection(hot, self, exception) < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyObject *stream_close(PyObject *self, PyObject *ignored)
{
    const struct hot *hot = hot_of_stream(self);
    if (hot == NULL)
        return NULL;
    struct stream *stream = stream_of(self);
    if (stream->closing)
        Py_RETURN_NONE;
    stream->closing = 1;
    if (done_with(stream_stop_receiving(self, NULL)) < 0 || (is_none(stream->sending) && lose_connection(hot, self, Py_None) < 0))
        return NULL;
    Py_RETURN_NONE;
}

/* Whether an operation, or None, is in flight; -1 with an exception. */
static int is_in_flight(const struct hot *hot, PyObject *op)
{
    if (is_none(op))
        return 0;
    PyObject *kind = (PyObject *)Py_TYPE(op);
    if (kind == hot->kinds.receive_stream || kind == hot->kinds.send_all) {
        PyObject *state = SLOT(op, hot->operation.state);
        return state == hot->states.in_flight || state == hot->states.cancelling;
    }
    PyObject *answer = PyObject_GetAttr(op, hot->names.in_flight);
    int in_flight = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    return in_flight;
}

/* Whether a socket of any kind is open; -1 with an exception. */
static int is_open(const struct hot *hot, PyObject *sock)
{
    if (is_socket(hot, sock))
        return socket_descriptor(sock) != NO_DESCRIPTOR;
    PyObject *number = number_of_socket(hot, sock);
    long long descriptor = number == NULL ? -1 : PyLong_AsLongLong(number);
    Py_XDECREF(number);
    return PyErr_Occurred() ? -1 : descriptor >= 0;
}

/* Close the socket when the protocol is done with it and the kernel too. */
static int release_socket(const struct hot *hot, PyObject *self)
{
    struct stream *stream = stream_of(self);
    PyObject *sock = stream->alive ? NULL : take_reference(self, &stream->sock);
    int open = sock == NULL ? 0 : is_open(hot, sock);
    if (open <= 0) {
        Py_XDECREF(sock);
        return open;
    }
    int receiving = is_in_flight(hot, stream->receive), sending = is_in_flight(hot, stream->sending), failed = 0;
    int free = !receiving && !sending;
    if (!free && receiving >= 0 && sending >= 0) {
        PyObject *gone = ask_proactor(self, hot->names.let_go, NULL);
        free = gone == NULL ? -1 : PyObject_IsTrue(gone);
        Py_XDECREF(gone);
    }
    if (PyErr_Occurred())
        failed = -1;
    else if (free)
        failed = keep_sockname(hot, self, sock) < 0 || leave_table_and_close(hot, self, sock) < 0 ? -1 : 0;
    Py_DECREF(sock);
    return failed;
}

PyObject *stream_release_socket(PyObject *self, PyObject *ignored)
{
    const struct hot *hot = hot_of_stream(self);
    if (hot == NULL)
        return NULL;
    if (release_socket(hot, self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyObject *stream_call_connection_lost(PyObject *self, PyObject *exception)
{
    const struct hot *hot = hot_of_stream(self);
    if (hot == NULL)
        return NULL;
    struct stream *stream = stream_of(self);
    PyObject *protocol = take_field(self, &stream->protocol, "_protocol"), *server, *error = NULL;
    if (protocol == NULL || done_with(PyObject_CallMethodOneArg(protocol, hot->names.connection_lost, exception)) < 0)
        error = take_exception();
    Py_XDECREF(protocol);
    stream->alive = 0;
    /* It may keep the transport, and then only the collector would free the two. */
    put_reference(self, &stream->protocol, Py_NewRef(Py_None));
    int failed = release_socket(hot, self);
    server = take_reference(self, &stream->server);
    put_reference(self, &stream->server, Py_NewRef(Py_None));
    if (!failed && !is_none(server))
        failed = tell_server(hot, server, hot->names.detach, self);
    Py_XDECREF(server);
    if (error != NULL && !failed)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(error);
    if (failed || PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

/* Before it is freed: nobody has closed it. */
void stream_finalize(PyObject *self)
{
    if (!stream_of(self)->alive)
        return;
    PyObject *error = PyErr_Occurred() ? take_exception() : NULL;
    if (done_with(PyObject_CallMethod(self, "_end_unclosed", NULL)) < 0)
        PyErr_WriteUnraisable(self);
    if (error != NULL) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
}
