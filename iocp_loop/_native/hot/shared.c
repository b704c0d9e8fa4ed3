/* What the files of the native tier share; hot.h tells what is where, and what each function does. */

#include "hot.h"

#ifdef _WIN32
#include <winsock2.h>
#else
#include <sys/socket.h>
#endif

struct names names;
struct helpers helpers;
struct operation_slots operation_slots;

/* socket.socket, and _socket.socket beneath it; NULL where a socket's descriptor can't be read in place. */
static PyTypeObject *socket_class, *socket_type;

Py_ssize_t slot_offset(PyObject *type, const char *name)
{
    PyObject *member = PyObject_GetAttrString(type, name);
    if (member == NULL)
        return -1;
    if (!Py_IS_TYPE(member, &PyMemberDescr_Type)) {
        PyErr_Format(PyExc_ImportError, "%R has no slot %s", type, name);
        Py_DECREF(member);
        return -1;
    }
    Py_ssize_t offset = ((PyMemberDescrObject *)member)->d_member->offset;
    Py_DECREF(member);
    return offset;
}

PyObject *attribute_of(const char *module, const char *name)
{
    PyObject *from = PyImport_ImportModule(module);
    PyObject *found = from == NULL ? NULL : PyObject_GetAttrString(from, name);
    Py_XDECREF(from);
    return found;
}

PyObject *take_exception(void)
{
#if PY_VERSION_HEX >= 0x030C0000
    return PyErr_GetRaisedException();
#else
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback != NULL)
        PyException_SetTraceback(value, traceback);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    return value;
#endif
}

int ends_the_loop(void)
{
    return PyErr_ExceptionMatches(PyExc_SystemExit) || PyErr_ExceptionMatches(PyExc_KeyboardInterrupt);
}

int fail(PyObject *self, PyObject *method, const char *message)
{
    if (ends_the_loop())
        return -1;
    PyObject *exception = take_exception(), *before = PyErr_GetHandledException();
    PyObject *text = PyUnicode_FromString(message);
    PyErr_SetHandledException(exception);
    PyObject *done =
        text == NULL ? NULL : PyObject_CallMethodObjArgs(self, method, exception, text, NULL);
    PyErr_SetHandledException(before);
    Py_XDECREF(before);
    Py_XDECREF(text);
    Py_DECREF(exception);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

PyObject *new_operation(PyObject *kind, PyObject *handle, descriptor fd, PyObject *complete)
{
    PyTypeObject *type = (PyTypeObject *)kind;
    PyObject *op = type->tp_alloc(type, 0);
    if (op == NULL)
        return NULL;
    SLOT(op, operation_slots.handle) = Py_NewRef(handle);
    SLOT(op, operation_slots.fd) = PyLong_FromLongLong((long long)fd);
    SLOT(op, operation_slots.key) = Py_NewRef(Py_None);
    SLOT(op, operation_slots.state) = Py_NewRef(operation_slots.new);
    SLOT(op, operation_slots.token) = PyLong_FromLong(0);
    SLOT(op, operation_slots.complete) = Py_NewRef(complete);
    SLOT(op, operation_slots.driver_data) = Py_NewRef(Py_None);
    if (SLOT(op, operation_slots.fd) == NULL || SLOT(op, operation_slots.token) == NULL)
        Py_CLEAR(op);
    return op;
}

int complete_operation(PyObject *op, PyObject *value, PyObject *error)
{
    PyObject *complete = Py_XNewRef(SLOT(op, operation_slots.complete)), *args[] = {value, error};
    if (complete == NULL) {
        PyErr_SetString(PyExc_AttributeError, "complete");
        return -1;
    }
    PyObject *done = PyObject_Vectorcall(complete, args, 2, NULL);
    Py_DECREF(complete);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

int enter_context(PyObject *context)
{
    if (!PyContext_CheckExact(context))
        return 0;
    return PyContext_Enter(context) < 0 ? -1 : 1;
}

PyObject *call_in_context(PyObject *context, PyObject *callable, PyObject *const *args, size_t count)
{
    PyObject *result;
    int entered = enter_context(context);
    if (entered < 0)
        return NULL;
    if (entered) {
        result = PyObject_Vectorcall(callable, args, count, NULL);
        if (PyContext_Exit(context) < 0)
            Py_CLEAR(result);
        return result;
    }
    PyObject *run = PyObject_GetAttr(context, names.run);
    if (run == NULL)
        return NULL;
    PyObject **more = PyMem_Malloc((count + 1) * sizeof(PyObject *));
    if (more == NULL) {
        Py_DECREF(run);
        return PyErr_NoMemory();
    }
    more[0] = callable;
    for (size_t n = 0; n < count; n++)
        more[n + 1] = args[n];
    result = PyObject_Vectorcall(run, more, count + 1, NULL);
    PyMem_Free(more);
    Py_DECREF(run);
    return result;
}

/* How CPython's socket objects begin.  Looked at once, when the module is made: see check_sockets. */
struct socket_object {
    PyObject_HEAD
    descriptor fd;
    int family, type, proto;
    PyObject *(*errorhandler)(void);
    int64_t timeout; /* ns; negative for ever */
};

/* The slots of socket.socket; -1 where objects are made by its constructor. */
static Py_ssize_t socket_references = -1, socket_closed = -1;

int is_socket(PyObject *object)
{
    return socket_type != NULL && (Py_IS_TYPE(object, socket_class) || Py_IS_TYPE(object, socket_type));
}

int is_stream_socket(PyObject *sock) { return ((struct socket_object *)sock)->type == SOCK_STREAM; }

int is_internet_socket(PyObject *sock)
{
    int family = ((struct socket_object *)sock)->family;
    return family == AF_INET || family == AF_INET6;
}

#ifdef _WIN32
int never_waits(PyObject *sock)
{
    PyObject *timeout = PyObject_CallMethodNoArgs(sock, names.gettimeout);
    int never = timeout != NULL && PyFloat_Check(timeout) && PyFloat_AS_DOUBLE(timeout) == 0;
    Py_XDECREF(timeout);
    PyErr_Clear();
    return never;
}
#endif

descriptor socket_descriptor(PyObject *sock) { return ((struct socket_object *)sock)->fd; }

#ifdef HAS_ACCEPT
PyObject *make_stream_socket(PyObject *like, descriptor fd)
{
    const struct socket_object *model = (struct socket_object *)like;
    if (socket_closed < 0) {
        PyObject *made = PyObject_CallFunction((PyObject *)socket_class, "iiiK", model->family, SOCK_STREAM, model->proto,
                                               (unsigned long long)fd);
        PyObject *done = made == NULL ? NULL : PyObject_CallMethod(made, "settimeout", "i", 0);
        if (done == NULL)
            Py_CLEAR(made);
        Py_XDECREF(done);
        return made;
    }
    PyObject *none = PyTuple_New(0), *sock = none == NULL ? NULL : socket_class->tp_new(socket_class, none, NULL);
    Py_XDECREF(none);
    if (sock == NULL || PySys_Audit("socket.__new__", "Oiii", sock, model->family, SOCK_STREAM, model->proto) < 0) {
        Py_XDECREF(sock);
        return NULL;
    }
    SLOT(sock, socket_references) = PyLong_FromLong(0);
    SLOT(sock, socket_closed) = Py_NewRef(Py_False);
    struct socket_object *made = (struct socket_object *)sock;
    made->family = model->family;
    made->type = SOCK_STREAM;
    made->proto = model->proto;
    made->timeout = 0;
    made->fd = fd;
    return sock;
}
#endif

/* object.name as a C integer; -1 with an exception. */
static long long number_of(PyObject *object, const char *name)
{
    PyObject *value = PyObject_GetAttrString(object, name);
    long long number = value == NULL ? -1 : PyLong_AsLongLong(value);
    Py_XDECREF(value);
    return number;
}

/* Where the slots of socket.socket are, if all else that make_stream_socket writes is where it is thought to be. */
static void find_socket_slots(PyObject *sock)
{
    const struct socket_object *read = (struct socket_object *)sock;
    PyObject *done = PyObject_CallMethod(sock, "settimeout", "d", 1.5);
    int right = done != NULL && read->timeout == 1500000000 && read->proto == number_of(sock, "proto");
    Py_XDECREF(done);
    if (right) {
        socket_references = slot_offset((PyObject *)Py_TYPE(sock), "_io_refs");
        socket_closed = PyErr_Occurred() ? -1 : slot_offset((PyObject *)Py_TYPE(sock), "_closed");
    }
    PyErr_Clear();
}

/* Whether what we read of an open socket is what it says of itself, and that it is closed when it is. */
static int reads_right(PyObject *sock)
{
    const struct socket_object *read = (struct socket_object *)sock;
    PyObject *fd = PyObject_CallMethod(sock, "fileno", NULL), *closed;
    int right = fd != NULL && read->fd == (descriptor)PyLong_AsLongLong(fd) && read->family == number_of(sock, "family")
                && read->type == number_of(sock, "type");
    Py_XDECREF(fd);
    PyErr_Clear();
    find_socket_slots(sock);
    closed = PyObject_CallMethod(sock, "close", NULL);
    Py_XDECREF(closed);
    return right && closed != NULL && read->fd == NO_DESCRIPTOR;
}

/* Make sure that a socket's descriptor is where we look for it.  If it is not, or no socket can be made here to try it,
 * no object passes for a socket, and everything goes by the methods of socket objects. */
int check_sockets(void)
{
    PyObject *module = PyImport_ImportModule("socket"), *beneath = PyImport_ImportModule("_socket");
    PyObject *class = module == NULL ? NULL : PyObject_GetAttrString(module, "socket");
    PyObject *type = beneath == NULL ? NULL : PyObject_GetAttrString(beneath, "socket");
    Py_XDECREF(module);
    Py_XDECREF(beneath);
    if (class == NULL || type == NULL) {
        Py_XDECREF(class);
        Py_XDECREF(type);
        return -1;
    }
    PyObject *sock = PyObject_CallNoArgs(class);
    if (sock != NULL && PyType_Check(type) && PyObject_TypeCheck(sock, (PyTypeObject *)type)
        && ((PyTypeObject *)type)->tp_basicsize >= (Py_ssize_t)sizeof(struct socket_object) && reads_right(sock)) {
        socket_class = (PyTypeObject *)Py_NewRef(class);
        socket_type = (PyTypeObject *)Py_NewRef(type);
    }
    PyErr_Clear();
    Py_XDECREF(sock);
    Py_DECREF(class);
    Py_DECREF(type);
    return 0;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * What is received into
 * ------------------------------------------------------------------------------------------------------------------ */

/* With a GIL one is enough for all threads: each copies out of it before another can have the GIL. */
#ifndef Py_GIL_DISABLED
#define OF_THREAD
static int free_at_exit(char *memory) { return 0; }
#elif defined(_WIN32)
#define OF_THREAD __declspec(thread)
static void NTAPI free_memory(void *memory) { free(memory); }
static int free_at_exit(char *memory)
{
    static LONG key_made; /* index + 1, once there is one */
    if (key_made == 0) {
        DWORD key = FlsAlloc(free_memory);
        if (key == FLS_OUT_OF_INDEXES || InterlockedCompareExchange(&key_made, (LONG)key + 1, 0) != 0)
            FlsFree(key);
    }
    return key_made == 0 || !FlsSetValue((DWORD)key_made - 1, memory) ? -1 : 0;
}
#else
#include <pthread.h>
#define OF_THREAD _Thread_local
static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static void make_key(void) { pthread_key_create(&key, free); }
static int free_at_exit(char *memory)
{
    pthread_once(&once, make_key);
    return pthread_setspecific(key, memory) == 0 ? 0 : -1;
}
#endif

char *scratch(void)
{
    static OF_THREAD char *memory;
    if (memory == NULL) {
        char *made = malloc(SCRATCH_SIZE);
        if (made == NULL || free_at_exit(made) < 0) {
            free(made);
            PyErr_NoMemory();
            return NULL;
        }
        memory = made;
    }
    return memory;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * What of asyncio's was replaced
 * ------------------------------------------------------------------------------------------------------------------ */

struct asyncio_method handle_run_method, create_task_method;

static int find_method(struct asyncio_method *self, const char *module, const char *type, const char *name)
{
    PyObject *from = PyImport_ImportModule(module);
    PyObject *class = from == NULL ? NULL : PyObject_GetAttrString(from, type);
    if (class != NULL) {
        self->type = (PyTypeObject *)class;
        self->name = PyUnicode_InternFromString(name);
        self->globals = Py_NewRef(PyModule_GetDict(from));
    }
    Py_XDECREF(from);
    return class == NULL || self->name == NULL ? -1 : 0;
}

int find_asyncio_methods(void)
{
    return find_method(&handle_run_method, "asyncio.events", "Handle", "_run") < 0
                   || find_method(&create_task_method, "asyncio.base_events", "BaseEventLoop", "create_task") < 0
               ? -1
               : 0;
}

int look_at_method(struct asyncio_method *self)
{
    uint64_t version = 0;
    int replaced;
    do { /* again if it was changed meanwhile */
        version = READ(self->type->tp_version_tag);
        PyObject *method = PyObject_GetAttr((PyObject *)self->type, self->name); /* gives the type a version again */
        replaced = method == NULL || !PyFunction_Check(method) || PyFunction_GET_GLOBALS(method) != self->globals;
        Py_XDECREF(method);
        PyErr_Clear();
    } while (version != READ(self->type->tp_version_tag));
    WRITE(self->seen, 2 * version + (uint64_t)replaced);
    return replaced;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * What comes from Python
 * ------------------------------------------------------------------------------------------------------------------ */

PyObject *set_helpers(PyObject *module, PyObject *args)
{
    PyObject *report_error, *run_by_method;
    if (!PyArg_ParseTuple(args, "OO", &report_error, &run_by_method))
        return NULL;
    Py_XSETREF(helpers.report_error, Py_NewRef(report_error));
    Py_XSETREF(helpers.run_by_method, Py_NewRef(run_by_method));
    Py_RETURN_NONE;
}

/* use_operations(operations): where its classes have their slots. */
PyObject *use_operations(PyObject *module, PyObject *operations)
{
    static const struct {
        const char *type, *slot;
        size_t where;
    } table[] = {
        {"Operation", "complete", offsetof(struct operation_slots, complete)},
        {"Operation", "driver_data", offsetof(struct operation_slots, driver_data)},
        {"Operation", "fd", offsetof(struct operation_slots, fd)},
        {"Operation", "handle", offsetof(struct operation_slots, handle)},
        {"Operation", "key", offsetof(struct operation_slots, key)},
        {"Operation", "state", offsetof(struct operation_slots, state)},
        {"Operation", "token", offsetof(struct operation_slots, token)},
        {"ReceiveStream", "get_buffer", offsetof(struct operation_slots, get_buffer)},
        {"ReceiveStream", "paused", offsetof(struct operation_slots, paused)},
        {"ReadinessStream", "events", offsetof(struct operation_slots, events)},
        {"Receive", "size", offsetof(struct operation_slots, size)},
        {"ReceiveFromStream", "paused", offsetof(struct operation_slots, from_paused)},
        {"ReceiveFromStream", "size", offsetof(struct operation_slots, from_size)},
        {"SendAll", "buffers", offsetof(struct operation_slots, all_buffers)},
        {"SendAll", "sent", offsetof(struct operation_slots, all_sent)},
        {"SendAll", "size", offsetof(struct operation_slots, all_size)},
    };
    static const struct {
        PyObject **where;
        const char *name;
    } objects[] = {
        {&operation_slots.new, "NEW"},
        {&operation_slots.in_flight, "IN_FLIGHT"},
        {&operation_slots.cancelling, "CANCELLING"},
        {&operation_slots.done, "DONE"},
        {&operation_slots.receive_stream, "ReceiveStream"},
        {&operation_slots.accept_stream, "AcceptStream"},
        {&operation_slots.readiness_stream, "ReadinessStream"},
        {&operation_slots.receive_from_stream, "ReceiveFromStream"},
        {&operation_slots.send_all, "SendAll"},
        {&operation_slots.receive, "Receive"}, /* the last: that it is there tells that all are */
    };
    if (operation_slots.receive != NULL)
        Py_RETURN_NONE;
    for (size_t n = 0; n < sizeof table / sizeof *table; n++) {
        PyObject *type = PyObject_GetAttrString(operations, table[n].type);
        Py_ssize_t offset = type == NULL ? -1 : slot_offset(type, table[n].slot);
        Py_XDECREF(type);
        if (offset < 0)
            return NULL;
        *(Py_ssize_t *)((char *)&operation_slots + table[n].where) = offset;
    }
    for (size_t n = 0; n < sizeof objects / sizeof *objects; n++) {
        PyObject *object = PyObject_GetAttrString(operations, objects[n].name);
        if (object == NULL)
            return NULL;
        Py_XSETREF(*objects[n].where, object);
    }
    Py_RETURN_NONE;
}

int intern_names(void)
{
    static const struct {
        PyObject **where;
        const char *text;
    } table[] = {
        {&names.abandon, "abandon"},
        {&names.accept_some, "_accept_some"},
        {&names.append, "append"},
        {&names.arm, "_arm"},
        {&names.arm_all, "_arm_all"},
        {&names.arm_datagrams, "_arm_datagrams"},
        {&names.buffer_updated, "buffer_updated"},
        {&names.call_eof_received, "_call_eof_received"},
        {&names.callback, "callback"},
        {&names.check_callback, "_check_callback"},
        {&names.check_closed, "_check_closed"},
        {&names.check_thread, "_check_thread"},
        {&names.context, "context"},
        {&names.control_app_writing, "_control_app_writing"},
        {&names.control_ssl_reading, "_control_ssl_reading"},
        {&names.create_future, "create_future"},
        {&names.data_received, "data_received"},
        {&names.delay, "delay"},
        {&names.do_write, "_do_write"},
        {&names.done, "done"},
        {&names.drain_ready, "_drain_ready"},
        {&names.end, "_end"},
        {&names.end_stream, "_end_stream"},
        {&names.end_with, "_end_with"},
        {&names.fatal_error, "_fatal_error"},
        {&names.future_blocking, "_asyncio_future_blocking"},
        {&names.get_buffer, "get_buffer"},
        {&names.gettimeout, "gettimeout"},
        {&names.go_on, "_go_on"},
        {&names.hand_over, "_hand_over"},
        {&names.keep_value, "keep_value"},
        {&names.leave_line, "_leave_line"},
        {&names.open_ring, "_open_ring"},
        {&names.pending, "pending"},
        {&names.popleft, "popleft"},
        {&names.queue_leftovers, "_queue_leftovers"},
        {&names.read, "read"},
        {&names.reap, "_reap"},
        {&names.receive_by_ring, "_receive_by_ring"},
        {&names.receive_data, "_receive_data"},
        {&names.receive_ended, "_receive_ended"},
        {&names.receive_once, "_receive_once"},
        {&names.receiving_failed, "_receiving_failed"},
        {&names.report, "report"},
        {&names.run, "run"},
        {&names.set_result, "set_result"},
        {&names.ssl_protocol, "_ssl_protocol"},
        {&names.start_shutdown, "_start_shutdown"},
        {&names.take, "take"},
        {&names.time, "time"},
        {&names.timer_handle_cancelled, "_timer_handle_cancelled"},
        {&names.wait_again, "_wait_again"},
        {&names.when, "when"},
        {&names.write, "write"},
        {&names.write_otherwise, "_write_otherwise"},
        {&names.write_to_self, "_write_to_self"},
    };
    for (size_t n = 0; n < sizeof(table) / sizeof(*table); n++) {
        *table[n].where = PyUnicode_InternFromString(table[n].text);
        if (*table[n].where == NULL)
            return -1;
    }
    return 0;
}
