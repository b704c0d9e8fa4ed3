/* What the native turns of all drivers share; driver.h tells what each function does. */

#include "driver.h"

#include <math.h>

/* The longest timeout that is handed to the kernel, ns: about 100 years. */
static const double LONGEST_NS = 3e18;

/* ---------------------------------------------------------------------------------------------------------------------
 * Waiting
 * ------------------------------------------------------------------------------------------------------------------ */

int driver_wait(Driver *self, double seconds)
{
    int64_t limit = -1;
    if (!(seconds < 0)) {
        double ns = ceil(seconds * 1e9); /* rounded up: never early */
        limit = ns <= LONGEST_NS ? (int64_t)ns : (int64_t)LONGEST_NS;
    }
    self->waits++;
    return self->verbs->wait(self, limit);
}

static PyObject *wait_method(PyObject *self, PyObject *timeout)
{
    double seconds = -1;
    if (timeout != Py_None) {
        seconds = PyFloat_AsDouble(timeout);
        if (seconds == -1.0 && PyErr_Occurred())
            return NULL;
        if (seconds < 0)
            seconds = 0;
    }
    if (driver_wait((Driver *)self, seconds) < 0)
        return NULL;
    Py_RETURN_NONE;
}

#ifdef __linux__
/* Getting the GIL back took longer than this: another thread runs Python code all the time. */
#ifdef Py_GIL_DISABLED
#define CONTENDED_NS INT64_MAX /* it does not keep us from it */
#else
enum { CONTENDED_NS = 500000 };
#endif

/* For so many turns after that, look for completions with the GIL in hand, for so long, before giving it away: who
 * gives it away gets it back one switch interval later (sys.setswitchinterval), 5 ms. */
enum { CONTENDED_TURNS = 200, LOOK_NS = 60000 };

static long look(Driver *self, int64_t limit)
{
    long result;
    int64_t until = clock_ns() + (limit >= 0 && limit < LOOK_NS ? limit : LOOK_NS);
    do
        result = self->verbs->gather(self, 0);
    while (result == 0 && clock_ns() < until);
    return result;
}
#endif

/* Gather without the GIL. */
static long block(Driver *self, int64_t limit)
{
    long result;
#ifdef __linux__
    if (self->contended > 0) {
        self->contended--;
        result = look(self, limit);
        if (result != 0)
            return result;
    }
    int64_t returned;
    Py_BEGIN_ALLOW_THREADS
    result = self->verbs->gather(self, limit);
    returned = clock_ns();
    Py_END_ALLOW_THREADS
    if (clock_ns() - returned > CONTENDED_NS)
        self->contended = CONTENDED_TURNS;
#else
    Py_BEGIN_ALLOW_THREADS
    result = self->verbs->gather(self, limit);
    Py_END_ALLOW_THREADS
#endif
    return result;
}

/* Whether a wait must not sleep, for there is something to do; -1 with an exception. */
static int has_work(Driver *self)
{
    if (has_items(self->ready) || (self->verbs->has_work != NULL && self->verbs->has_work(self)))
        return 1;
    if (self->before_sleep == NULL || self->before_sleep == Py_None)
        return 0;
    PyObject *answer = PyObject_CallNoArgs(self->before_sleep);
    int work = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    return work;
}

int wait_as_sleeper(Driver *self, int64_t limit, long *result)
{
    if (limit == 0) {
        *result = self->verbs->gather(self, 0);
        return 0;
    }
    WRITE(self->sleeping, 1);
    FENCE();
    int work = has_work(self);
    if (work >= 0)
        *result = work ? self->verbs->gather(self, 0) : block(self, limit);
    WRITE(self->sleeping, 0);
    return work < 0 ? -1 : 0;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Dispatching
 * ------------------------------------------------------------------------------------------------------------------ */

int driver_call(Driver *self, PyObject *method, PyObject *op)
{
    PyObject *done = op == NULL ? PyObject_CallMethodNoArgs((PyObject *)self, method)
                                : PyObject_CallMethodOneArg((PyObject *)self, method, op);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

static int drain_ready(Driver *self)
{
    return has_items(self->ready) ? driver_call(self, self->hot->names.drain_ready, NULL) : 0;
}

int driver_go_on(Driver *self)
{
    return fail((PyObject *)self, "report", COMPLETE_FAILED);
}

int driver_dispatch(Driver *self)
{
    if (drain_ready(self) < 0)
        return -1;
    self->delivered = 0;
    if (self->verbs->deliver(self) < 0 || drain_ready(self) < 0)
        return -1;
    return self->verbs->hand_over == NULL ? 0 : self->verbs->hand_over(self);
}

static PyObject *dispatch_method(PyObject *self, PyObject *ignored)
{
    if (driver_dispatch((Driver *)self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Operations in flight
 * ------------------------------------------------------------------------------------------------------------------ */

int launch(Driver *self, PyObject *op)
{
    const struct hot *hot = self->hot;
    PyObject *kind = (PyObject *)Py_TYPE(op), *before = PyDict_GetItemWithError(self->submissions, kind); /* borrowed */
    long long earlier = before == NULL ? 0 : PyLong_AsLongLong(before);
    if (PyErr_Occurred())
        return -1;
    PyObject *number = PyLong_FromUnsignedLongLong(++self->tokens);
    PyObject *count = PyLong_FromLongLong(earlier + 1);
    int failed = number == NULL || count == NULL || PyDict_SetItem(self->submissions, kind, count) < 0
                         || PyDict_SetItem(self->in_flight, number, op) < 0
                     ? -1
                     : 0;
    Py_XDECREF(count);
    if (failed) { /* nothing is in flight then */
        Py_XDECREF(number);
        return -1;
    }
    Py_XSETREF(SLOT(op, hot->operation.token), number);
    Py_XSETREF(SLOT(op, hot->operation.state), Py_NewRef(hot->states.in_flight));
    return 0;
}

int land(Driver *self, PyObject *op)
{
    const struct hot *hot = self->hot;
    PyObject *token = Py_XNewRef(SLOT(op, hot->operation.token));
    if (token == NULL) {
        PyErr_SetString(PyExc_AttributeError, "token");
        return -1;
    }
    Py_XSETREF(SLOT(op, hot->operation.state), Py_NewRef(hot->states.done));
    int failed = PyDict_DelItem(self->in_flight, token);
    Py_DECREF(token);
    return failed;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The type
 * ------------------------------------------------------------------------------------------------------------------ */

Driver *native_driver(const struct hot *hot, PyObject *driver)
{
    if (!PyObject_TypeCheck(driver, hot->Driver_type))
        return NULL;
    PyObject *wait = PyObject_GetAttrString(driver, "wait");
    int ours = wait != NULL && PyCFunction_Check(wait) && PyCFunction_GET_SELF(wait) == driver
               && PyCFunction_GET_FUNCTION(wait) == wait_method;
    Py_XDECREF(wait);
    PyErr_Clear();
    return ours ? (Driver *)driver : NULL;
}

static void driver_dealloc(Driver *self);

struct hot *driver_hot(PyTypeObject *type) { return hot_of(type, (destructor)driver_dealloc); }

PyObject *driver_new(PyTypeObject *type, const struct verbs *verbs)
{
    struct hot *hot = driver_hot(type);
    Driver *self = hot == NULL ? NULL : (Driver *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->verbs = verbs;
        self->hot = hot;
        Py_INCREF(hot->module);
    }
    return (PyObject *)self;
}

#define OWNED(DO) DO(self->in_flight); DO(self->submissions); DO(self->ready); DO(self->before_sleep)

int driver_traverse(Driver *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    OWNED(Py_VISIT);
    return visit_hot(self->hot, visit, arg);
}

int driver_clear(Driver *self)
{
    OWNED(Py_CLEAR);
    return 0;
}

void driver_free(Driver *self)
{
    driver_clear(self);
    free_with_hot((PyObject *)self, self->hot);
}

static void driver_dealloc(Driver *self)
{
    PyObject_GC_UnTrack(self);
    driver_free(self);
}

/* Whether dispatch has something to deliver. */
static PyObject *get_gathered(Driver *self, void *ignored)
{
    return PyBool_FromLong(has_items(self->ready) || self->verbs->is_behind(self));
}

/* Asked by whoever has put something into a queue; see the fences in hot.h. */
static PyObject *get_sleeping(Driver *self, void *ignored)
{
    FENCE();
    return PyBool_FromLong(READ(self->sleeping));
}

static int set_sleeping(Driver *self, PyObject *value, void *ignored)
{
    WRITE(self->sleeping, value == Py_True);
    return 0;
}

static PyMethodDef driver_methods[] = {
    {"wait", wait_method, METH_O, NULL},
    {"dispatch", dispatch_method, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef driver_members[] = {
    {"in_flight", T_OBJECT_EX, offsetof(Driver, in_flight), 0, NULL},
    {"submissions", T_OBJECT_EX, offsetof(Driver, submissions), 0, NULL},
    {"ready", T_OBJECT_EX, offsetof(Driver, ready), 0, NULL},
    {"before_sleep", T_OBJECT, offsetof(Driver, before_sleep), 0, NULL},
    {"waits", T_ULONGLONG, offsetof(Driver, waits), 0, NULL},
    {"completions", T_ULONGLONG, offsetof(Driver, completions), 0, NULL},
    {"_tokens", T_ULONGLONG, offsetof(Driver, tokens), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef driver_getset[] = {
    {"_sleeping", (getter)get_sleeping, (setter)set_sleeping, NULL, NULL},
    {"gathered", (getter)get_gathered, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot driver_slots[] = {
    {Py_tp_doc, (char *)"What the native turns of all drivers share."},
    {Py_tp_dealloc, driver_dealloc},
    {Py_tp_traverse, driver_traverse},
    {Py_tp_clear, driver_clear},
    {Py_tp_methods, driver_methods},
    {Py_tp_members, driver_members},
    {Py_tp_getset, driver_getset},
    {0, NULL},
};

static PyType_Spec driver_spec = {
    .name = "iocp_loop._hot.Driver",
    .basicsize = sizeof(Driver),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = driver_slots,
};

int add_driver(struct hot *hot)
{
    hot->Driver_type = (PyTypeObject *)PyType_FromModuleAndSpec(hot->module, &driver_spec, NULL);
    return hot->Driver_type == NULL ? -1 : 0;
}
