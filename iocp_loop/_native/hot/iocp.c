/*
 * The wait and the dispatch of driver iocp; iocp_sockets.c has its receives and its sends.  A class in Python inherits
 * from IocpTurns first and from the driver that is written in Python behind it; ports/iocp/driver.py tells how it all
 * works.
 *
 * The port is opened and closed in Python, through cffi; what is called here are a few functions of the binding, whose
 * addresses come from there.  A turn is one iocp_wait, without the GIL if it may
 * block.  The batch that it gathers stays in the port until it is dispatched, so that a dispatch which an exception
 * ended goes on where it was.
 *
 * Done here is what every message goes through: a receive that has brought data, and the last of a SendAll.  Whatever is not
 * that (errors, ends, cancels, requests that their thread left undone, handles of other ports) is for
 * the `finish` of the submission, in Python.
 *
 * Who owns what.  A submission (class Submission, binding.py) belongs to the table `_outstanding` while the kernel
 * has its request: the table's reference keeps the OVERLAPPED and, by the slot in it, the memory.  So it is entered
 * before the request is made, and taken out once the entry was reaped or the request turned out to be over at once.  An
 * OVERLAPPED is never touched between the two.  Slots move between the list of the pool and the submission; only a
 * submission that is not armed has none.  What is called from here may do anything: cancel the operation, whose
 * submission may serve another before we look again.  Hence the order of questions in go_on.
 *
 * Requests are made in the thread that dispatches, as in Python: the kernel ties them to it.
 */

#include "iocp.h"

#ifdef _WIN32

static PyTypeObject *IocpTurns_type;

/* The longest timeout that is handed to iocp_wait, ns. */
static const double LONGEST_NS = 4e18;

struct iocp_functions iocp_functions;
struct iocp_slots iocp_slots;

/* _use_requests(Submission, Association, SlotPool, nobody, size of a slot, addresses of the functions) */
static PyObject *use_requests(PyObject *ignored, PyObject *args)
{
    PyObject *submission, *association, *pool, *nobody;
    unsigned long long functions[3];
    if (!PyArg_ParseTuple(args, "OOOOn(KKK)", &submission, &association, &pool, &nobody, &iocp_slots.slot_size,
                          &functions[0], &functions[1], &functions[2]))
        return NULL;
    iocp_functions.wait = (long (*)(iocp_port *, long long))(uintptr_t)functions[0];
    iocp_functions.receive = (request_function)(uintptr_t)functions[1];
    iocp_functions.receive_from = (request_function)(uintptr_t)functions[2];
    iocp_slots.address = slot_offset(submission, "address");
    iocp_slots.armed = slot_offset(submission, "armed");
    iocp_slots.association = slot_offset(submission, "association");
    iocp_slots.finish = slot_offset(submission, "finish");
    iocp_slots.keep = slot_offset(submission, "keep");
    iocp_slots.op = slot_offset(submission, "op");
    iocp_slots.slot = slot_offset(submission, "slot");
    iocp_slots.emulated = slot_offset(association, "emulated");
    iocp_slots.handle = slot_offset(association, "handle");
    iocp_slots.reading = slot_offset(association, "reading");
    iocp_slots.skips = slot_offset(association, "skips");
    iocp_slots.small = slot_offset(association, "small");
    iocp_slots.writing = slot_offset(association, "writing");
    iocp_slots.free = slot_offset(pool, "free");
    if (PyErr_Occurred())
        return NULL;
    Py_XSETREF(iocp_slots.submission, Py_NewRef(submission));
    Py_XSETREF(iocp_slots.nobody, Py_NewRef(nobody));
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Waiting
 * ------------------------------------------------------------------------------------------------------------------ */

/* Whether a wait must not block, for there is something to do; -1 with an exception. */
static int busy(IocpTurns *self)
{
    int answer = has_items(self->ready) || has_items(self->at_once);
    if (!answer && self->before_sleep != NULL && self->before_sleep != Py_None) {
        PyObject *work = PyObject_CallNoArgs(self->before_sleep);
        answer = work == NULL ? -1 : PyObject_IsTrue(work);
        Py_XDECREF(work);
    }
    return answer;
}

/* iocp_wait without the GIL. */
static long block(IocpTurns *self, long long limit)
{
    iocp_port *port = self->port;
    long code;
    Py_BEGIN_ALLOW_THREADS
    code = iocp_functions.wait(port, limit);
    Py_END_ALLOW_THREADS
    return code;
}

/* Wait at most so many seconds; negative: for ever. */
static int wait(PyObject *driver, double seconds)
{
    IocpTurns *self = (IocpTurns *)driver;
    long long limit = -1;
    long code;
    self->waits++;
    if (self->port == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "the driver has no port");
        return -1;
    }
    if (self->next < self->port->count) /* an exception has ended the dispatch: it goes on first */
        return 0;
    if (!(seconds < 0)) {
        double ns = seconds * 1e9;
        limit = ns < LONGEST_NS ? (long long)ns : (long long)LONGEST_NS;
    }
    self->next = self->port->count = 0;
    WRITE(self->sleeping, 1);
    FENCE();
    int work = limit == 0 ? 1 : busy(self);
    if (work < 0) {
        WRITE(self->sleeping, 0);
        return -1;
    }
    code = work ? iocp_functions.wait(self->port, 0) : block(self, limit);
    WRITE(self->sleeping, 0);
    if (code) {
        PyErr_SetExcFromWindowsErr(PyExc_OSError, (int)code);
        return -1;
    }
    return 0;
}

static PyObject *iocp_turns_wait(PyObject *self, PyObject *timeout)
{
    double seconds = -1;
    if (timeout != Py_None) {
        seconds = PyFloat_AsDouble(timeout);
        if (seconds == -1.0 && PyErr_Occurred())
            return NULL;
        if (seconds < 0)
            seconds = 0;
    }
    if (wait(self, seconds) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* One completion, of a request or of what has waited for this dispatch without one. */
static int finish(IocpTurns *self, PyObject *sub, unsigned long count, long code)
{
    PyObject *op = Py_XNewRef(SLOT(sub, iocp_slots.op));
    set_slot(sub, iocp_slots.armed, Py_False);
    int failed = op == NULL || code ? NOT_PLAIN : iocp_finish(self, op, sub, (Py_ssize_t)count);
    if (failed == NOT_PLAIN) {
        PyObject *callable = Py_NewRef(SLOT(sub, iocp_slots.finish));
        PyObject *args[] = {sub, PyLong_FromUnsignedLong(count), PyLong_FromLong(code)};
        PyObject *done = args[1] == NULL || args[2] == NULL ? NULL : PyObject_Vectorcall(callable, args, 3, NULL);
        Py_XDECREF(args[1]);
        Py_XDECREF(args[2]);
        Py_DECREF(callable);
        Py_XDECREF(done);
        failed = done == NULL ? -1 : 0;
    }
    Py_XDECREF(op);
    return failed;
}

/* The entry of the port for the submission at `address`. */
static int deliver(IocpTurns *self, uintptr_t address, unsigned long count, long code)
{
    PyObject *number = PyLong_FromVoidPtr((void *)address);
    PyObject *sub = number == NULL ? NULL : PyDict_GetItemWithError(self->outstanding, number);
    int failed = PyErr_Occurred() ? -1 : 0; /* one that is not known had failed at once, see _spoiled in Python */
    Py_XINCREF(sub);
    if (sub != NULL)
        failed = PyDict_DelItem(self->outstanding, number) < 0 ? -1 : finish(self, sub, count, code);
    Py_XDECREF(sub);
    Py_XDECREF(number);
    return failed;
}

/* What was done without an entry, and stands in the queue now; what is added meanwhile waits for the next dispatch. */
static int deliver_at_once(IocpTurns *self)
{
    for (Py_ssize_t left = Py_SIZE(self->at_once); left > 0 && has_items(self->at_once); left--) {
        PyObject *entry = PyObject_CallMethodNoArgs(self->at_once, names.popleft), *sub;
        unsigned long count;
        long code;
        int failed = entry == NULL || !PyArg_ParseTuple(entry, "Okl", &sub, &count, &code) ? -1 : 0;
        if (!failed) {
            Py_INCREF(sub);
            failed = finish(self, sub, count, code);
            Py_DECREF(sub);
        }
        Py_XDECREF(entry);
        if (failed && fail((PyObject *)self, names.report, COMPLETE_FAILED) < 0)
            return -1;
    }
    return 0;
}

static int drain_ready(IocpTurns *self)
{
    if (!has_items(self->ready))
        return 0;
    PyObject *done = PyObject_CallMethodNoArgs((PyObject *)self, names.drain_ready);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

static int dispatch(PyObject *driver)
{
    IocpTurns *self = (IocpTurns *)driver;
    if (drain_ready(self) < 0 || (has_items(self->at_once) && deliver_at_once(self) < 0))
        return -1;
    /* The port is looked at each time: what is called may close it. */
    while (self->port != NULL && self->next < self->port->count) {
        const uintptr_t *entry = &self->port->batch[3 * self->next++];
        if (deliver(self, entry[0], (unsigned long)entry[1], (long)entry[2]) < 0
            && fail(driver, names.report, COMPLETE_FAILED) < 0)
            return -1;
    }
    if (self->port != NULL)
        self->next = self->port->count = 0;
    return drain_ready(self);
}

static PyObject *iocp_turns_dispatch(PyObject *self, PyObject *ignored)
{
    if (dispatch(self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* _take_reaped(): take what was reaped and not dispatched away: the addresses of the submissions. */
static PyObject *take_reaped(IocpTurns *self, PyObject *ignored)
{
    PyObject *list = PyList_New(0);
    for (long n = self->next; list != NULL && self->port != NULL && n < self->port->count; n++) {
        PyObject *address = PyLong_FromVoidPtr((void *)self->port->batch[3 * n]);
        if (address == NULL || PyList_Append(list, address) < 0)
            Py_CLEAR(list);
        Py_XDECREF(address);
    }
    if (list != NULL && self->port != NULL)
        self->next = self->port->count = 0;
    return list;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * What the driver in Python reads and writes
 * ------------------------------------------------------------------------------------------------------------------ */

static PyObject *get_port(IocpTurns *self, void *ignored)
{
    if (self->port_object == NULL) {
        PyErr_SetString(PyExc_AttributeError, "_port");
        return NULL;
    }
    return Py_NewRef(self->port_object);
}

/* cffi's pointer to a port.  `_address` tells where it is. */
static int set_port(IocpTurns *self, PyObject *value, void *ignored)
{
    if (value == NULL) {
        PyErr_SetString(PyExc_AttributeError, "_port");
        return -1;
    }
    PyObject *address = PyObject_CallMethod((PyObject *)self, "_address", "O", value);
    iocp_port *port = address == NULL ? NULL : PyLong_AsVoidPtr(address);
    Py_XDECREF(address);
    if (port == NULL && PyErr_Occurred())
        return -1;
    self->port = port;
    self->next = 0;
    Py_XSETREF(self->port_object, Py_NewRef(value));
    return 0;
}

/* Whether dispatch has something to deliver. */
static PyObject *get_gathered(IocpTurns *self, void *ignored)
{
    int reaped = self->port != NULL && self->next < self->port->count;
    return PyBool_FromLong(reaped || has_items(self->ready) || has_items(self->at_once));
}

static int iocp_turns_traverse(IocpTurns *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->port_object);
    Py_VISIT(self->associations);
    Py_VISIT(self->outstanding);
    Py_VISIT(self->at_once);
    Py_VISIT(self->spare);
    Py_VISIT(self->slots);
    Py_VISIT(self->in_flight);
    Py_VISIT(self->submissions);
    Py_VISIT(self->ready);
    Py_VISIT(self->before_sleep);
    return 0;
}

static int iocp_turns_clear(IocpTurns *self)
{
    self->port = NULL;
    Py_CLEAR(self->port_object);
    Py_CLEAR(self->associations);
    Py_CLEAR(self->outstanding);
    Py_CLEAR(self->at_once);
    Py_CLEAR(self->spare);
    Py_CLEAR(self->slots);
    Py_CLEAR(self->in_flight);
    Py_CLEAR(self->submissions);
    Py_CLEAR(self->ready);
    Py_CLEAR(self->before_sleep);
    return 0;
}

static void iocp_turns_dealloc(IocpTurns *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    iocp_turns_clear(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyMethodDef iocp_turns_methods[] = {
    {"wait", iocp_turns_wait, METH_O, NULL},
    {"dispatch", iocp_turns_dispatch, METH_NOARGS, NULL},
    {"_take_reaped", (PyCFunction)take_reaped, METH_NOARGS, NULL},
    {"_use_requests", use_requests, METH_VARARGS | METH_STATIC, "Look up the slots of what the driver keeps."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef iocp_turns_members[] = {
    {"_associations", T_OBJECT_EX, offsetof(IocpTurns, associations), 0, NULL},
    {"_outstanding", T_OBJECT_EX, offsetof(IocpTurns, outstanding), 0, NULL},
    {"_at_once", T_OBJECT_EX, offsetof(IocpTurns, at_once), 0, NULL},
    {"_spare", T_OBJECT_EX, offsetof(IocpTurns, spare), 0, NULL},
    {"_slots", T_OBJECT_EX, offsetof(IocpTurns, slots), 0, NULL},
    {"in_flight", T_OBJECT_EX, offsetof(IocpTurns, in_flight), 0, NULL},
    {"submissions", T_OBJECT_EX, offsetof(IocpTurns, submissions), 0, NULL},
    {"ready", T_OBJECT_EX, offsetof(IocpTurns, ready), 0, NULL},
    {"before_sleep", T_OBJECT, offsetof(IocpTurns, before_sleep), 0, NULL},
    {"waits", T_ULONGLONG, offsetof(IocpTurns, waits), 0, NULL},
    {"completions", T_ULONGLONG, offsetof(IocpTurns, completions), 0, NULL},
    {"_tokens", T_ULONGLONG, offsetof(IocpTurns, tokens), 0, NULL},
    {"_sleeping", T_BOOL, offsetof(IocpTurns, sleeping), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef iocp_turns_getset[] = {
    {"_port", (getter)get_port, (setter)set_port, NULL, NULL},
    {"gathered", (getter)get_gathered, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot iocp_turns_slots[] = {
    {Py_tp_doc, (char *)"The wait and the dispatch of driver iocp."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_dealloc, iocp_turns_dealloc},
    {Py_tp_traverse, iocp_turns_traverse},
    {Py_tp_clear, iocp_turns_clear},
    {Py_tp_methods, iocp_turns_methods},
    {Py_tp_members, iocp_turns_members},
    {Py_tp_getset, iocp_turns_getset},
    {0, NULL},
};

static PyType_Spec iocp_turns_spec = {
    .name = "iocp_loop._hot.IocpTurns",
    .basicsize = sizeof(IocpTurns),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = iocp_turns_slots,
};

int add_iocp(PyObject *module)
{
    IocpTurns_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &iocp_turns_spec, NULL);
    if (IocpTurns_type == NULL)
        return -1;
    static const struct native_driver driver = {
        .type = &IocpTurns_type,
        .wait_method = iocp_turns_wait,
        .wait = wait,
        .dispatch = dispatch,
        .busy = iocp_busy,
        .receive = iocp_receive_for,
    };
    add_native_driver(&driver);
    return PyModule_AddObjectRef(module, "IocpTurns", (PyObject *)IocpTurns_type);
}

#endif
