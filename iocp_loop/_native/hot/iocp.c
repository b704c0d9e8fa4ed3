/*
 * The wait and the dispatch of driver iocp; iocp_sockets.c and the files beside it have its receives and its sends.  A class
 * in Python inherits from IocpTurns first and from the driver that is written in Python behind it; ports/iocp/driver.py
 * tells how it all works.
 *
 * The port is opened and closed in Python, through cffi; what is called here are a few functions of the binding, whose
 * addresses come from there.  A turn is one iocp_wait, without the GIL if it may block.  The batch that it gathers stays
 * in the port until it is dispatched, so that a dispatch which an exception ended goes on where it was.
 *
 * Done in C is what every message goes through: a receive that has brought data, and the last of a SendAll.  Whatever is
 * not that (errors, ends, cancels, requests that their thread left undone, handles of other ports) is for the `finish` of
 * the submission, in Python.
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

/* ---------------------------------------------------------------------------------------------------------------------
 * Waiting
 * ------------------------------------------------------------------------------------------------------------------ */

static long gather(Driver *driver, int64_t limit)
{
    IocpTurns *self = (IocpTurns *)driver;
    self->code = driver->hot->iocp_functions.wait(self->port, limit);
    return 0;
}

static int has_work(Driver *driver) { return has_items(((IocpTurns *)driver)->at_once); }

static int wait(Driver *driver, int64_t limit)
{
    IocpTurns *self = (IocpTurns *)driver;
    long ignored;
    if (self->port == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "the driver has no port");
        return -1;
    }
    if (self->next < self->port->count) /* an exception has ended the dispatch: it goes on first */
        return 0;
    self->next = self->port->count = self->code = 0;
    if (wait_as_sleeper(driver, limit, &ignored) < 0)
        return -1;
    if (self->code) {
        PyErr_SetExcFromWindowsErr(PyExc_OSError, (int)self->code);
        return -1;
    }
    return 0;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Completions
 * ------------------------------------------------------------------------------------------------------------------ */

/* One completion, of a request or of what has waited for this dispatch without one. */
static int finish(IocpTurns *self, PyObject *sub, unsigned long count, long code)
{
    const struct hot *hot = self->driver.hot;
    PyObject *op = Py_XNewRef(SLOT(sub, hot->iocp.op));
    set_slot(sub, hot->iocp.armed, Py_False);
    int failed = op == NULL || code ? NOT_PLAIN : iocp_finish(self, op, sub, (Py_ssize_t)count);
    if (failed == NOT_PLAIN) {
        PyObject *callable = Py_NewRef(SLOT(sub, hot->iocp.finish));
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
static int deliver_one(IocpTurns *self, uintptr_t address, unsigned long count, long code)
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
        PyObject *entry = PyObject_CallMethodNoArgs(self->at_once, self->driver.hot->names.popleft), *sub;
        unsigned long count;
        long code;
        int failed = entry == NULL || !PyArg_ParseTuple(entry, "Okl", &sub, &count, &code) ? -1 : 0;
        if (!failed) {
            Py_INCREF(sub);
            failed = finish(self, sub, count, code);
            Py_DECREF(sub);
        }
        Py_XDECREF(entry);
        if (failed && driver_go_on(&self->driver) < 0)
            return -1;
    }
    return 0;
}

static int deliver(Driver *driver)
{
    IocpTurns *self = (IocpTurns *)driver;
    if (has_items(self->at_once) && deliver_at_once(self) < 0)
        return -1;
    /* The port is looked at each time: what is called may close it. */
    while (self->port != NULL && self->next < self->port->count) {
        const uintptr_t *entry = &self->port->batch[3 * self->next++];
        if (deliver_one(self, entry[0], (unsigned long)entry[1], (long)entry[2]) < 0
            && driver_go_on(driver) < 0)
            return -1;
    }
    if (self->port != NULL)
        self->next = self->port->count = 0;
    return 0;
}

static int is_behind(Driver *driver)
{
    IocpTurns *self = (IocpTurns *)driver;
    return (self->port != NULL && self->next < self->port->count) || has_items(self->at_once);
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

static PyObject *iocp_turns_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static const struct verbs verbs = {
        .wait = wait,
        .gather = gather,
        .has_work = has_work,
        .deliver = deliver,
        .is_behind = is_behind,
        .busy = iocp_busy,
        .submit_receive = iocp_takes_receive,
        .receive = iocp_receive_for,
    };
    return driver_new(type, &verbs);
}

#define OWNED(DO) DO(self->port_object); DO(self->associations); DO(self->outstanding); DO(self->at_once); \
    DO(self->spare); DO(self->slots)

static int iocp_turns_traverse(IocpTurns *self, visitproc visit, void *arg)
{
    OWNED(Py_VISIT);
    return driver_traverse(&self->driver, visit, arg);
}

static int iocp_turns_clear(IocpTurns *self)
{
    self->port = NULL;
    OWNED(Py_CLEAR);
    return driver_clear(&self->driver);
}

static void iocp_turns_dealloc(IocpTurns *self)
{
    PyObject_GC_UnTrack(self);
    iocp_turns_clear(self);
    driver_free(&self->driver);
}

static PyMethodDef iocp_turns_methods[] = {
    {"_take_reaped", (PyCFunction)take_reaped, METH_NOARGS, NULL},
    {"_use_requests", iocp_use_requests, METH_VARARGS | METH_CLASS, "Look up the slots of what the driver keeps."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef iocp_turns_members[] = {
    {"_associations", T_OBJECT_EX, offsetof(IocpTurns, associations), 0, NULL},
    {"_outstanding", T_OBJECT_EX, offsetof(IocpTurns, outstanding), 0, NULL},
    {"_at_once", T_OBJECT_EX, offsetof(IocpTurns, at_once), 0, NULL},
    {"_spare", T_OBJECT_EX, offsetof(IocpTurns, spare), 0, NULL},
    {"_slots", T_OBJECT_EX, offsetof(IocpTurns, slots), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef iocp_turns_getset[] = {
    {"_port", (getter)get_port, (setter)set_port, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot iocp_turns_slots[] = {
    {Py_tp_doc, (char *)"The wait and the dispatch of driver iocp."},
    {Py_tp_new, iocp_turns_new},
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

int add_iocp(struct hot *hot)
{
    PyTypeObject *type = add_type(hot, &iocp_turns_spec, hot->Driver_type);
    Py_XDECREF(type); /* the module has it */
    return type == NULL ? -1 : 0;
}

#endif
