/* What the files of the native tier share; hot.h tells what is where, and what each function does. */

#include "hot.h"

#include <errno.h>

#ifdef _WIN32
#include <winsock2.h>
#else
#include <netinet/in.h>
#include <sys/socket.h>
#endif

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

int find_slots(struct hot *hot, PyObject *type, const struct slot_place *places, size_t count)
{
    for (size_t n = 0; n < count; n++) {
        Py_ssize_t offset = slot_offset(type, places[n].name);
        if (offset < 0)
            return -1;
        *(Py_ssize_t *)((char *)hot + places[n].where) = offset;
    }
    return 0;
}

/* How many slots the classes have that instances of `class` take theirs from; -1 with an exception. */
static Py_ssize_t count_slots(PyTypeObject *class)
{
    PyObject *mro = class->tp_mro, *key, *value; /* borrowed */
    Py_ssize_t count = 0;
    for (Py_ssize_t n = 0; n < PyTuple_GET_SIZE(mro); n++) {
        PyObject *dict = PyObject_GetAttrString(PyTuple_GET_ITEM(mro, n), "__dict__"), *copy;
        copy = dict == NULL ? NULL : PyObject_CallMethod(dict, "copy", NULL);
        Py_XDECREF(dict);
        if (copy == NULL)
            return -1;
        for (Py_ssize_t at = 0; PyDict_Next(copy, &at, &key, &value);)
            count += Py_IS_TYPE(value, &PyMemberDescr_Type) && ((PyMemberDescrObject *)value)->d_member->type == T_OBJECT_EX;
        Py_DECREF(copy);
    }
    return count;
}

int check_slots(PyTypeObject *class)
{
    Py_ssize_t count = count_slots(class);
    if (count < 0)
        return -1;
    count += class->tp_weaklistoffset > 0;
    Py_ssize_t words = (class->tp_basicsize - (Py_ssize_t)sizeof(PyObject)) / (Py_ssize_t)sizeof(PyObject *);
    if (class->tp_dictoffset == 0 && words == count)
        return 0;
    PyErr_Format(PyExc_ImportError, "%R has more than slots", class);
    return -1;
}

int visit_slots(PyObject *self, const PyTypeObject *class, visitproc visit, void *arg)
{
    for (Py_ssize_t at = sizeof(PyObject); at < class->tp_basicsize; at += (Py_ssize_t)sizeof(PyObject *))
        if (at != class->tp_weaklistoffset)
            Py_VISIT(SLOT(self, at));
    return 0;
}

void clear_slots(PyObject *self, const PyTypeObject *class)
{
    for (Py_ssize_t at = sizeof(PyObject); at < class->tp_basicsize; at += (Py_ssize_t)sizeof(PyObject *))
        if (at != class->tp_weaklistoffset)
            Py_CLEAR(SLOT(self, at));
}

PyTypeObject *add_type(struct hot *hot, PyType_Spec *spec, PyTypeObject *base)
{
    PyObject *bases = base == NULL ? NULL : PyTuple_Pack(1, base);
    PyTypeObject *type = NULL;
    if (base == NULL || bases != NULL)
        type = (PyTypeObject *)PyType_FromModuleAndSpec(hot->module, spec, bases);
    Py_XDECREF(bases);
    if (type != NULL && PyModule_AddType(hot->module, type) < 0)
        Py_CLEAR(type);
    return type;
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

int was_cancelled(PyObject *error)
{
    if (!PyObject_TypeCheck(error, (PyTypeObject *)PyExc_OSError))
        return 0;
    PyObject *code = PyObject_GetAttrString(error, "errno");
    int cancelled = code != NULL && PyLong_Check(code) && PyLong_AsLong(code) == ECANCELED;
    Py_XDECREF(code);
    PyErr_Clear();
    return cancelled;
}

int fail(PyObject *self, const char *method, const char *message)
{
    if (ends_the_loop())
        return -1;
    PyObject *exception = take_exception(), *before = PyErr_GetHandledException();
    PyErr_SetHandledException(exception);
    PyObject *done = PyObject_CallMethod(self, method, "Os", exception, message);
    PyErr_SetHandledException(before);
    Py_XDECREF(before);
    Py_DECREF(exception);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

PyObject *new_operation(struct hot *hot, PyObject *kind, PyObject *handle, descriptor fd, PyObject *complete)
{
    PyTypeObject *type = (PyTypeObject *)kind;
    PyObject *op = type->tp_alloc(type, 0);
    if (op == NULL)
        return NULL;
    SLOT(op, hot->operation.handle) = Py_NewRef(handle);
    SLOT(op, hot->operation.fd) = PyLong_FromLongLong((long long)fd);
    SLOT(op, hot->operation.key) = Py_NewRef(Py_None);
    SLOT(op, hot->operation.state) = Py_NewRef(hot->states.new);
    SLOT(op, hot->operation.token) = PyLong_FromLong(0);
    SLOT(op, hot->operation.complete) = Py_NewRef(complete);
    SLOT(op, hot->operation.driver_data) = Py_NewRef(Py_None);
    if (SLOT(op, hot->operation.fd) == NULL || SLOT(op, hot->operation.token) == NULL)
        Py_CLEAR(op);
    return op;
}

int complete_operation(const struct hot *hot, PyObject *op, PyObject *value, PyObject *error)
{
    PyObject *complete = Py_XNewRef(SLOT(op, hot->operation.complete)), *args[] = {value, error};
    if (complete == NULL) {
        PyErr_SetString(PyExc_AttributeError, "complete");
        return -1;
    }
    PyObject *done = PyObject_Vectorcall(complete, args, 2, NULL);
    Py_DECREF(complete);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

int await_again(const struct hot *hot, PyObject *future)
{
    PyObject *done = PyObject_CallMethodNoArgs(future, hot->names.done);
    int is_done = done == NULL ? -1 : PyObject_IsTrue(done);
    Py_XDECREF(done);
    if (is_done == 0 && PyObject_SetAttr(future, hot->names.future_blocking, Py_True) < 0)
        return -1;
    return is_done < 0 ? -1 : !is_done;
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
    PyObject *run = PyObject_GetAttrString(context, "run");
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

int is_socket(const struct hot *hot, PyObject *object)
{
    return Py_IS_TYPE(object, hot->socket_class) || Py_IS_TYPE(object, hot->socket_type);
}

int is_stream_socket(PyObject *sock) { return ((struct socket_object *)sock)->type == SOCK_STREAM; }

int is_internet_socket(PyObject *sock)
{
    int family = ((struct socket_object *)sock)->family;
    return family == AF_INET || family == AF_INET6;
}

#ifdef _WIN32
int never_waits(const struct hot *hot, PyObject *sock)
{
    PyObject *timeout = PyObject_CallMethodNoArgs(sock, hot->names.gettimeout);
    int never = timeout != NULL && PyFloat_Check(timeout) && PyFloat_AS_DOUBLE(timeout) == 0;
    Py_XDECREF(timeout);
    PyErr_Clear();
    return never;
}
#endif

descriptor socket_descriptor(PyObject *sock) { return ((struct socket_object *)sock)->fd; }

int socket_family(PyObject *sock) { return ((struct socket_object *)sock)->family; }

int is_nonblocking(PyObject *sock) { return ((struct socket_object *)sock)->timeout == 0; }

int is_tcp_socket(PyObject *sock)
{
    const struct socket_object *read = (struct socket_object *)sock;
    return is_internet_socket(sock) && (read->proto == 0 || read->proto == IPPROTO_TCP);
}

/* What socket.close does, without its frames; while somebody has a file of the socket's (makefile), that is the last to close. */
int close_socket(const struct hot *hot, PyObject *sock)
{
    PyObject *done;
    if (!Py_IS_TYPE(sock, hot->socket_class) || hot->socket_closed < 0)
        done = PyObject_CallMethodNoArgs(sock, hot->names.close);
    else {
        put_reference(sock, &SLOT(sock, hot->socket_closed), Py_NewRef(Py_True));
        PyObject *references = SLOT(sock, hot->socket_references); /* borrowed */
        if (references != NULL && PyLong_Check(references) && PyLong_AsLong(references) > 0)
            return 0;
        done = PyObject_CallOneArg(hot->socket_close, sock);
    }
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

#ifdef HAS_ACCEPT
PyObject *make_stream_socket(struct hot *hot, PyObject *like, descriptor fd)
{
    PyTypeObject *class = hot->socket_class;
    const struct socket_object *model = (struct socket_object *)like;
    if (hot->socket_closed < 0) {
        PyObject *made = PyObject_CallFunction((PyObject *)class, "iiiK", model->family, SOCK_STREAM, model->proto,
                                               (unsigned long long)fd);
        PyObject *done = made == NULL ? NULL : PyObject_CallMethod(made, "settimeout", "i", 0);
        if (made != NULL && done == NULL) { /* the descriptor stays the caller's, who closes it */
            PyObject *error = take_exception();
            Py_XDECREF(PyObject_CallMethod(made, "detach", NULL));
            PyErr_Clear();
            PyErr_SetObject((PyObject *)Py_TYPE(error), error);
            Py_DECREF(error);
            Py_CLEAR(made);
        }
        Py_XDECREF(done);
        return made;
    }
    PyObject *none = PyTuple_New(0), *sock = none == NULL ? NULL : class->tp_new(class, none, NULL);
    Py_XDECREF(none);
    if (sock == NULL || PySys_Audit("socket.__new__", "Oiii", sock, model->family, SOCK_STREAM, model->proto) < 0) {
        Py_XDECREF(sock);
        return NULL;
    }
    SLOT(sock, hot->socket_references) = PyLong_FromLong(0);
    SLOT(sock, hot->socket_closed) = Py_NewRef(Py_False);
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
static void find_socket_slots(struct hot *hot, PyObject *sock)
{
    const struct socket_object *read = (struct socket_object *)sock;
    PyObject *done = PyObject_CallMethod(sock, "settimeout", "d", 1.5);
    int right = done != NULL && read->timeout == 1500000000 && read->proto == number_of(sock, "proto");
    Py_XDECREF(done);
    if (right) {
        hot->socket_references = slot_offset((PyObject *)Py_TYPE(sock), "_io_refs");
        hot->socket_closed = PyErr_Occurred() ? -1 : slot_offset((PyObject *)Py_TYPE(sock), "_closed");
    }
    PyErr_Clear();
}

/* Whether what we read of an open socket is what it says of itself, and that it is closed when it is. */
static int reads_right(struct hot *hot, PyObject *sock)
{
    const struct socket_object *read = (struct socket_object *)sock;
    PyObject *fd = PyObject_CallMethod(sock, "fileno", NULL), *closed;
    int right = fd != NULL && read->fd == (descriptor)PyLong_AsLongLong(fd) && read->family == number_of(sock, "family")
                && read->type == number_of(sock, "type");
    Py_XDECREF(fd);
    PyErr_Clear();
    find_socket_slots(hot, sock);
    closed = PyObject_CallMethod(sock, "close", NULL);
    Py_XDECREF(closed);
    return right && closed != NULL && read->fd == NO_DESCRIPTOR;
}

/* Make sure that a socket's descriptor is where we look for it.  If it is not, or no socket can be made here to try it,
 * no object passes for a socket, and everything goes by the methods of socket objects. */
int check_sockets(struct hot *hot)
{
    hot->socket_references = hot->socket_closed = -1;
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
        && ((PyTypeObject *)type)->tp_basicsize >= (Py_ssize_t)sizeof(struct socket_object) && reads_right(hot, sock)) {
        hot->socket_class = (PyTypeObject *)Py_NewRef(class);
        hot->socket_type = (PyTypeObject *)Py_NewRef(type);
        hot->socket_close = PyObject_GetAttr(type, hot->names.close);
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

#ifndef Py_GIL_DISABLED
/* One is enough for all threads of an interpreter: each copies out of it before another can have the GIL. */
#define MEMORY hot->scratch
static int free_at_exit(char *made) { return 0; } /* the module does */
#elif defined(_WIN32)
#define MEMORY memory
#ifdef _MSC_VER
static __declspec(thread) char *memory;
#else /* GCC ignores that word, with a warning at most: all threads would share the memory */
static _Thread_local char *memory;
#endif
static void NTAPI free_memory(void *made) { free(made); }
static int free_at_exit(char *made)
{
    static LONG key_made; /* index + 1, once there is one */
    if (key_made == 0) {
        DWORD key = FlsAlloc(free_memory);
        if (key == FLS_OUT_OF_INDEXES || InterlockedCompareExchange(&key_made, (LONG)key + 1, 0) != 0)
            FlsFree(key);
    }
    return key_made == 0 || !FlsSetValue((DWORD)key_made - 1, made) ? -1 : 0;
}
#else
#include <pthread.h>
#define MEMORY memory
static _Thread_local char *memory;
static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static void make_key(void) { pthread_key_create(&key, free); }
static int free_at_exit(char *made)
{
    pthread_once(&once, make_key);
    return pthread_setspecific(key, made) == 0 ? 0 : -1;
}
#endif

char *make_scratch(struct hot *hot)
{
    if (MEMORY == NULL) {
        char *made = malloc(SCRATCH_SIZE);
        if (made == NULL || free_at_exit(made) < 0) {
            free(made);
            PyErr_NoMemory();
            return NULL;
        }
        MEMORY = made;
    }
    return MEMORY;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * What of asyncio's was replaced
 * ------------------------------------------------------------------------------------------------------------------ */

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

int find_asyncio_methods(struct hot *hot)
{
    return find_method(&hot->handle_run_method, "asyncio.events", "Handle", "_run") < 0
                   || find_method(&hot->create_task_method, "asyncio.base_events", "BaseEventLoop", "create_task") < 0
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
    struct hot *hot = hot_in(module);
    PyObject *report_error, *run_by_method;
    if (!PyArg_ParseTuple(args, "OO", &report_error, &run_by_method))
        return NULL;
    Py_XSETREF(hot->helpers.report_error, Py_NewRef(report_error));
    Py_XSETREF(hot->helpers.run_by_method, Py_NewRef(run_by_method));
    Py_RETURN_NONE;
}

/* Where the classes of iocp_loop.operations have their slots, and what else that module has. */
static const struct {
    const char *type;
    struct slot_place place;
} operation_slots[] = {
    {"Operation", PLACE(operation, complete)},
    {"Operation", PLACE(operation, driver_data)},
    {"Operation", PLACE(operation, fd)},
    {"Operation", PLACE(operation, handle)},
    {"Operation", PLACE(operation, key)},
    {"Operation", PLACE(operation, state)},
    {"Operation", PLACE(operation, token)},
    {"ReceiveStream", PLACE(operation, get_buffer)},
    {"ReceiveStream", PLACE(operation, paused)},
    {"ReadinessStream", PLACE(operation, events)},
    {"Receive", PLACE(operation, size)},
    {"ReceiveFromStream", {"paused", offsetof(struct hot, operation.from_paused)}},
    {"ReceiveFromStream", {"size", offsetof(struct hot, operation.from_size)}},
    {"SendAll", {"buffers", offsetof(struct hot, operation.all_buffers)}},
    {"SendAll", {"sent", offsetof(struct hot, operation.all_sent)}},
    {"SendAll", {"size", offsetof(struct hot, operation.all_size)}},
};
static const struct slot_place operation_objects[] = {
    {"NEW", offsetof(struct hot, states.new)},
    {"IN_FLIGHT", offsetof(struct hot, states.in_flight)},
    {"CANCELLING", offsetof(struct hot, states.cancelling)},
    {"DONE", offsetof(struct hot, states.done)},
    {"ReceiveStream", offsetof(struct hot, kinds.receive_stream)},
    {"AcceptStream", offsetof(struct hot, kinds.accept_stream)},
    {"ReadinessStream", offsetof(struct hot, kinds.readiness_stream)},
    {"ReceiveFromStream", offsetof(struct hot, kinds.receive_from_stream)},
    {"SendAll", offsetof(struct hot, kinds.send_all)},
    {"Receive", offsetof(struct hot, kinds.receive)}, /* the last: that it is there tells that all are */
};

PyObject *use_operations(PyObject *module, PyObject *operations)
{
    struct hot *hot = hot_in(module);
    if (hot->kinds.receive != NULL)
        Py_RETURN_NONE;
    for (size_t n = 0; n < sizeof operation_slots / sizeof *operation_slots; n++) {
        PyObject *type = PyObject_GetAttrString(operations, operation_slots[n].type);
        int failed = type == NULL ? -1 : find_slots(hot, type, &operation_slots[n].place, 1);
        Py_XDECREF(type);
        if (failed)
            return NULL;
    }
    for (size_t n = 0; n < sizeof operation_objects / sizeof *operation_objects; n++) {
        PyObject *object = PyObject_GetAttrString(operations, operation_objects[n].name);
        if (object == NULL)
            return NULL;
        Py_XSETREF(SLOT(hot, operation_objects[n].where), object);
    }
    Py_RETURN_NONE;
}

int intern_names(struct hot *hot)
{
#define INTERN_NAME(name, text) \
    if ((hot->names.name = PyUnicode_InternFromString(text)) == NULL) \
        return -1;
    NAMES(INTERN_NAME)
    return 0;
}
