/*
 * Accepting connections (ports/accepting.py), and making protocol and transport for each (endpoints/listener.py).
 */

#define _GNU_SOURCE /* accept4 */
#include "accepting.h"

#include "calls.h"
#include "streams.h"

#ifdef __linux__
#include <unistd.h>
#endif

/* What Listener inherits from. */
typedef struct {
    PyObject_HEAD
    PyObject *loop, *proactor, *sock, *welcome, *context;
    PyObject *serves; /* (protocol factory, server, type of the transport) of a plain server, or None */
    char stopped, in_shortage;
} Accepting;

static void accepting_dealloc(Accepting *self);

/* The name of a peer: an object, or bytes as the system gave it. */
struct name {
    PyObject *name; /* borrowed */
    int raw;
};

/* ---------------------------------------------------------------------------------------------------------------------
 * Welcoming a connection
 * ------------------------------------------------------------------------------------------------------------------ */

static PyObject *not_complete(void)
{
    PyErr_SetString(PyExc_RuntimeError, "the listener is not complete");
    return NULL;
}

/* Make protocol and transport for a connection of a plain server. */
static PyObject *serve(const struct hot *hot, Accepting *self, PyObject *sock, struct name peer)
{
    PyObject *factory, *server, *type, *extra, *transport = NULL; /* the first three are borrowed: `serves` has them */
    if (self->loop == NULL || self->proactor == NULL)
        return not_complete();
    PyObject *loop = Py_NewRef(self->loop), *proactor = Py_NewRef(self->proactor), *serves = Py_NewRef(self->serves);
    PyObject *protocol = PyArg_UnpackTuple(serves, "serves", 3, 3, &factory, &server, &type) ? PyObject_CallNoArgs(factory) : NULL;
    extra = peer.raw || protocol == NULL ? Py_NewRef(peer.name) : Py_BuildValue("{OO}", hot->names.peername, peer.name);
    if (protocol != NULL && extra != NULL) {
        PyObject *args[] = {loop, proactor, sock, protocol, Py_None, extra, server};
        transport = PyObject_Vectorcall(type, args, 7, NULL);
    }
    Py_XDECREF(protocol);
    Py_XDECREF(extra);
    Py_DECREF(loop);
    Py_DECREF(proactor);
    Py_DECREF(serves);
    return transport;
}

/* self._welcome(sock, address) in `context`. */
static PyObject *welcome_otherwise(Accepting *self, PyObject *context, PyObject *sock, struct name peer)
{
    PyObject *address = peer.raw ? name_object(peer.name) : Py_NewRef(peer.name), *done = NULL;
    if (address != NULL) {
        PyObject *args[] = {sock, address};
        done = call_in_context(context, self->welcome, args, 2);
        Py_DECREF(address);
    }
    return done;
}

static PyObject *welcome_in(const struct hot *hot, Accepting *self, PyObject *context, PyObject *sock, struct name peer)
{
    if (self->serves == NULL || !PyTuple_Check(self->serves) || !PyContext_CheckExact(context))
        return welcome_otherwise(self, context, sock, peer);
    if (PyContext_Enter(context) < 0)
        return NULL;
    PyObject *done = serve(hot, self, sock, peer);
    if (PyContext_Exit(context) < 0)
        Py_CLEAR(done);
    return done;
}

/* Close a connection that could not be welcomed, with the exception that tells why. */
static int turn_away(const struct hot *hot, Accepting *self, PyObject *sock)
{
    PyObject *error = take_exception();
    int failed = close_socket(hot, sock);
    if (!failed) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        failed = fail((PyObject *)self, "_report", "Error on transport creation for incoming connection");
    }
    Py_DECREF(error);
    return failed;
}

/* If it raises, the connection is closed, the error is reported, and accepting goes on. */
static int welcome(const struct hot *hot, Accepting *self, PyObject *sock, struct name peer)
{
    if (self->stopped)
        return close_socket(hot, sock);
    self->in_shortage = 0;
    PyObject *context = self->context, *copy; /* the first is borrowed */
    if (context == NULL || self->welcome == NULL) {
        not_complete();
        return -1;
    }
    copy = PyContext_CheckExact(context) ? PyContext_Copy(context) : PyObject_CallMethodNoArgs(context, hot->names.copy);
    PyObject *done = copy == NULL ? NULL : welcome_in(hot, self, copy, sock, peer);
    Py_XDECREF(copy);
    Py_XDECREF(done);
    return done == NULL ? turn_away(hot, self, sock) : 0;
}

/* _accepted(value, error): a completion of the accept stream. */
static PyObject *accepting_accepted(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    const struct hot *hot = hot_of(Py_TYPE(self), (destructor)accepting_dealloc);
    if (hot == NULL)
        return NULL;
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "_accepted() takes a value and an error");
        return NULL;
    }
    if (args[1] != Py_None)
        return PyObject_CallMethodOneArg(self, hot->names.ended, args[1]);
    if (!PyTuple_Check(args[0]) || PyTuple_GET_SIZE(args[0]) != 2) {
        PyErr_SetString(PyExc_TypeError, "a completion of an accept stream is a pair: the connection and its address");
        return NULL;
    }
    PyObject *sock = PyTuple_GET_ITEM(args[0], 0), *address = PyTuple_GET_ITEM(args[0], 1); /* borrowed */
    if (welcome(hot, (Accepting *)self, sock, (struct name){address, 0}) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Accepting
 * ------------------------------------------------------------------------------------------------------------------ */

#ifdef HAS_ACCEPT
#ifdef _WIN32

static void close_descriptor(descriptor fd) { closesocket(fd); }

static int make_nonblocking(descriptor fd)
{
    u_long yes = 1;
    return ioctlsocket(fd, FIONBIO, &yes);
}

/* A connection that waits, non-blocking and not for child processes; NO_DESCRIPTOR with the system's error. */
static descriptor accept_one(descriptor listener, struct sockaddr *address, socklen_t *length)
{
    descriptor fd = accept(listener, address, length);
    if (fd == NO_DESCRIPTOR)
        return fd;
    if (SetHandleInformation((HANDLE)fd, HANDLE_FLAG_INHERIT, 0) && make_nonblocking(fd) == 0)
        return fd;
    int error = last_error(); /* of either: Winsock's errors are the thread's last error too */
    close_descriptor(fd);
    set_last_error(error);
    return NO_DESCRIPTOR;
}

#else

static void close_descriptor(descriptor fd) { close(fd); }

static descriptor accept_one(descriptor listener, struct sockaddr *address, socklen_t *length)
{
    return accept4(listener, address, length, SOCK_NONBLOCK | SOCK_CLOEXEC);
}

#endif

/* Accept a connection: its descriptor, or NO_DESCRIPTOR with the system's error, and its name as the system gives it. */
static descriptor accept_plain(PyObject *listener, PyObject **name)
{
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    descriptor fd = accept_one(socket_descriptor(listener), (struct sockaddr *)&address, &length);
    *name = fd == NO_DESCRIPTOR ? NULL : PyBytes_FromStringAndSize((char *)&address, (Py_ssize_t)length);
    return fd;
}

/* The socket object for `fd`, which it takes over, and the name in a form that is known here; takes over `*name` and gives it
 * back.  NULL with an exception. */
static PyObject *adopt(struct hot *hot, PyObject *listener, descriptor fd, PyObject **name, int *raw)
{
    PyObject *sock = *name == NULL ? NULL : make_stream_socket(hot, listener, fd);
    if (sock == NULL)
        close_descriptor(fd);
    *raw = sock != NULL && is_name_known(*name);
    if (sock != NULL && !*raw) {
        Py_SETREF(*name, PyObject_CallMethodNoArgs(sock, hot->names.getpeername));
        if (*name == NULL)
            Py_CLEAR(sock);
    }
    if (sock == NULL)
        Py_CLEAR(*name);
    return sock;
}

PyObject *accept_connection(PyObject *module, PyObject *listener)
{
    struct hot *hot = hot_in(module);
    PyObject *name;
    int raw;
    if (!is_socket(hot, listener) || !is_stream_socket(listener) || !never_waits(hot, listener))
        Py_RETURN_NONE;
    descriptor fd = accept_plain(listener, &name);
    if (fd == NO_DESCRIPTOR)
        return would_wait() ? raise_would_wait() : raise_last_error();
    PyObject *sock = adopt(hot, listener, fd, &name, &raw);
    if (sock != NULL && raw)
        Py_SETREF(name, name_object(name));
    if (sock == NULL || name == NULL) {
        Py_XDECREF(sock);
        return NULL;
    }
    return Py_BuildValue("NN", sock, name);
}
#endif

#ifdef _WIN32
PyObject *adopt_connection(PyObject *module, PyObject *args)
{
    struct hot *hot = hot_in(module);
    PyObject *listener;
    unsigned long long fd;
    if (!PyArg_ParseTuple(args, "OK", &listener, &fd))
        return NULL;
    if (!is_socket(hot, listener) || !is_stream_socket(listener))
        Py_RETURN_NONE;
    return make_nonblocking((descriptor)fd) == 0 ? make_stream_socket(hot, listener, (descriptor)fd) : raise_last_error();
}
#endif

#ifdef __linux__
/* The listener whose own `_accepted` this is, or NULL; borrowed. */
static Accepting *listener_behind(PyObject *complete)
{
    if (complete == NULL || !PyCFunction_CheckExact(complete)
        || PyCFunction_GET_FUNCTION(complete) != (PyCFunction)(void (*)(void))accepting_accepted)
        return NULL;
    return (Accepting *)PyCFunction_GET_SELF(complete);
}

static int deliver(const struct hot *hot, PyObject *op, PyObject *sock, PyObject *name, int raw)
{
    Accepting *listener = listener_behind(SLOT(op, hot->operation.complete));
    if (listener != NULL) {
        Py_INCREF(listener);
        int failed = welcome(hot, listener, sock, (struct name){name, raw});
        Py_DECREF(listener);
        return failed;
    }
    PyObject *address = raw ? name_object(name) : Py_NewRef(name);
    PyObject *value = address == NULL ? NULL : PyTuple_Pack(2, sock, address);
    int failed = value == NULL ? -1 : complete_operation(hot, op, value, Py_None);
    Py_XDECREF(address);
    Py_XDECREF(value);
    return failed;
}

enum accepted accept_for_stream(struct hot *hot, PyObject *op)
{
    PyObject *listener = Py_NewRef(SLOT(op, hot->operation.handle)), *name;
    int raw, fd = accept_plain(listener, &name);
    if (fd < 0) {
        Py_DECREF(listener);
        if (would_wait())
            return NONE_LEFT;
        if (errno == ECONNABORTED)
            return ABORTED;
        PyErr_SetFromErrno(PyExc_OSError);
        return NOT_ACCEPTED;
    }
    PyObject *sock = adopt(hot, listener, fd, &name, &raw);
    Py_DECREF(listener);
    if (sock == NULL)
        return NOT_ACCEPTED;
    int failed = deliver(hot, op, sock, name, raw);
    Py_DECREF(sock);
    Py_DECREF(name);
    return failed ? UNHEARD : ACCEPTED;
}
#endif

/* ---------------------------------------------------------------------------------------------------------------------
 * The type
 * ------------------------------------------------------------------------------------------------------------------ */

#define OWNED(DO) DO(self->loop); DO(self->proactor); DO(self->sock); DO(self->welcome); DO(self->context); \
    DO(self->serves)

static int accepting_traverse(Accepting *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    OWNED(Py_VISIT);
    return 0;
}

static int accepting_clear(Accepting *self)
{
    OWNED(Py_CLEAR);
    return 0;
}

static void accepting_dealloc(Accepting *self)
{
    PyObject_GC_UnTrack(self);
    accepting_clear(self);
    free_object((PyObject *)self);
}

static PyMethodDef accepting_methods[] = {
    {"_accepted", (PyCFunction)(void (*)(void))accepting_accepted, METH_FASTCALL, "A completion of the accept stream."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef accepting_members[] = {
    {"_loop", T_OBJECT_EX, offsetof(Accepting, loop), 0, NULL},
    {"_proactor", T_OBJECT_EX, offsetof(Accepting, proactor), 0, NULL},
    {"_sock", T_OBJECT_EX, offsetof(Accepting, sock), 0, NULL},
    {"_welcome", T_OBJECT_EX, offsetof(Accepting, welcome), 0, NULL},
    {"_context", T_OBJECT_EX, offsetof(Accepting, context), 0, NULL},
    {"_serves", T_OBJECT_EX, offsetof(Accepting, serves), 0, NULL},
    {"_stopped", T_BOOL, offsetof(Accepting, stopped), 0, NULL},
    {"_in_shortage", T_BOOL, offsetof(Accepting, in_shortage), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot accepting_slots[] = {
    {Py_tp_doc, (char *)"What a listener does with the connections that it accepts."},
    {Py_tp_dealloc, accepting_dealloc},
    {Py_tp_traverse, accepting_traverse},
    {Py_tp_clear, accepting_clear},
    {Py_tp_methods, accepting_methods},
    {Py_tp_members, accepting_members},
    {0, NULL},
};

static PyType_Spec accepting_spec = {
    .name = "iocp_loop._hot.Accepting",
    .basicsize = sizeof(Accepting),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = accepting_slots,
};

int add_accepting(struct hot *hot)
{
    PyTypeObject *type = add_type(hot, &accepting_spec, NULL);
    Py_XDECREF(type); /* the module has it */
    return type == NULL ? -1 : 0;
}
