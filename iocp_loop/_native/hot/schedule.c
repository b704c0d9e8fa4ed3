/*
 * Scheduling callbacks: call_soon and its kin, which make a handle and put it into the ready queue or among the timers.
 */

#include "turns.h"

#include <math.h>

/* The arguments of a call like call_later(delay, callback, *args, context=None), all borrowed. */
struct call {
    PyObject *named[2]; /* those before *args, which may come as keywords too */
    PyObject *const *args;
    Py_ssize_t count;
    PyObject *context; /* NULL: not given */
};

static int is_name(PyObject *given, PyObject *name)
{
    return given == name || PyUnicode_Compare(given, name) == 0;
}

/* Sort the arguments of a vectorcall.  `wanted` are the names of those before *args, `most` of them. */
static int parse_call(const struct hot *hot, const char *function, PyObject *const *wanted, Py_ssize_t most,
                      PyObject *const *args, Py_ssize_t count, PyObject *kwnames, struct call *call)
{
    Py_ssize_t placed = count < most ? count : most;
    for (Py_ssize_t n = 0; n < most; n++)
        call->named[n] = n < placed ? args[n] : NULL;
    call->args = args + placed;
    call->count = count - placed;
    call->context = NULL;
    for (Py_ssize_t n = 0; kwnames != NULL && n < PyTuple_GET_SIZE(kwnames); n++) {
        PyObject *name = PyTuple_GET_ITEM(kwnames, n), *value = args[count + n];
        Py_ssize_t which = 0;
        if (is_name(name, hot->names.context)) {
            call->context = value;
            continue;
        }
        while (which < most && !is_name(name, wanted[which]))
            which++;
        if (which == most || call->named[which] != NULL) {
            PyErr_Format(PyExc_TypeError,
                         which == most ? "%s() got an unexpected keyword argument %R"
                                       : "%s() got multiple values for argument %R",
                         function, name);
            return -1;
        }
        call->named[which] = value;
    }
    for (Py_ssize_t n = 0; n < most; n++)
        if (call->named[n] == NULL) {
            PyErr_Format(PyExc_TypeError, "%s() missing 1 required positional argument: %R", function, wanted[n]);
            return -1;
        }
    return 0;
}

/* What BaseEventLoop looks at before it takes a callback. */
static int check(Turns *self, PyObject *callback, const char *method, int any_thread)
{
    const struct hot *hot = self->head.hot;
    PyObject *done;
    if (self->closed) {
        done = PyObject_CallMethodNoArgs((PyObject *)self, hot->names.check_closed);
        if (done == NULL)
            return -1;
        Py_DECREF(done);
    }
    if (!self->head.debug)
        return 0;
    if (!any_thread) {
        done = PyObject_CallMethodNoArgs((PyObject *)self, hot->names.check_thread);
        if (done == NULL)
            return -1;
        Py_DECREF(done);
    }
    PyObject *name = PyUnicode_FromString(method);
    done = name == NULL
               ? NULL
               : PyObject_CallMethodObjArgs((PyObject *)self, hot->names.check_callback, callback, name, NULL);
    Py_XDECREF(name);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* Make a handle of `type` by asyncio's __init__, which in debug mode notes where that is.  `when` is for timers only. */
static PyObject *make_by_asyncio(Turns *self, PyObject *type, PyObject *when, PyObject *callback,
                                 PyObject *const *args, Py_ssize_t count, PyObject *context)
{
    PyObject *arguments = PyTuple_New(count), *handle;
    if (arguments == NULL)
        return NULL;
    for (Py_ssize_t n = 0; n < count; n++)
        PyTuple_SET_ITEM(arguments, n, Py_NewRef(args[n]));
    if (context == NULL)
        context = Py_None;
    if (when == NULL)
        handle = PyObject_CallFunctionObjArgs(type, callback, arguments, self, context, NULL);
    else
        handle = PyObject_CallFunctionObjArgs(type, when, callback, arguments, self, context, NULL);
    Py_DECREF(arguments);
    return handle;
}

/* Since Python 3.14 asyncio has a handle of its own for callbacks from other threads: its cancel() waits while it runs.  It
 * is written in Python, and one in ours would do nothing else. */
static PyObject *make_threadsafe(Turns *self, const struct call *call)
{
    PyObject *handle =
        make_by_asyncio(self, self->head.hot->threadsafe_type, NULL, call->named[0], call->args, call->count, call->context);
    PyObject *stack = handle == NULL ? NULL : PyObject_GetAttrString(handle, "_source_traceback");
    /* Its last line is that of the constructor, which is of no interest. */
    if (stack != NULL && PyList_Check(stack) && PyList_GET_SIZE(stack) > 0) {
        Py_ssize_t size = PyList_GET_SIZE(stack);
        if (PyList_SetSlice(stack, size - 1, size, NULL) < 0)
            Py_CLEAR(handle);
    }
    if (stack == NULL)
        Py_CLEAR(handle);
    Py_XDECREF(stack);
    return handle;
}

static PyObject *schedule_soon(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames,
                               const char *method, int any_thread)
{
    const struct hot *hot = self->head.hot;
    PyObject *handle;
    struct call call;
    if (parse_call(hot, method, &hot->names.callback, 1, args, count, kwnames, &call) < 0
        || check(self, call.named[0], method, any_thread) < 0)
        return NULL;
    if (any_thread && hot->threadsafe_type != NULL)
        handle = make_threadsafe(self, &call);
    else if (self->head.debug)
        handle = make_by_asyncio(self, (PyObject *)hot->Handle_type, NULL, call.named[0], call.args, call.count,
                                 call.context);
    else
        handle = handle_new(&self->head, call.named[0], call.args, call.count, call.context);
    if (handle != NULL && ready_push(self, Py_NewRef(handle)) < 0)
        Py_CLEAR(handle);
    return handle;
}

PyObject *turns_call_soon(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames)
{
    return schedule_soon(self, args, count, kwnames, "call_soon", 0);
}

PyObject *turns_call_soon_threadsafe(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames)
{
    PyObject *handle = schedule_soon(self, args, count, kwnames, "call_soon_threadsafe", 1);
    if (handle != NULL) {
        PyObject *woken = PyObject_CallMethodNoArgs((PyObject *)self, self->head.hot->names.write_to_self);
        if (woken == NULL)
            Py_CLEAR(handle);
        Py_XDECREF(woken);
    }
    return handle;
}

static PyObject *schedule_at(Turns *self, PyObject *when, const struct call *call, const char *method)
{
    const struct hot *hot = self->head.hot;
    PyObject *handle, *callback = call->named[1];
    double seconds = PyFloat_AsDouble(when);
    if (seconds == -1.0 && PyErr_Occurred())
        return NULL;
    if (isnan(seconds)) { /* neither earlier nor later than anything: the heap would lose its order */
        PyErr_SetString(PyExc_ValueError, "the time of a timer must be a number, not NaN");
        return NULL;
    }
    if (check(self, callback, method, 0) < 0)
        return NULL;
    if (self->head.debug)
        handle = make_by_asyncio(self, (PyObject *)hot->TimerHandle_type, when, callback, call->args, call->count,
                                 call->context);
    else
        handle = timer_new(&self->head, when, callback, call->args, call->count, call->context);
    if (handle == NULL)
        return NULL;
    timer_set_scheduled(hot, handle, 1);
    int failed;
    Py_BEGIN_CRITICAL_SECTION(self);
    failed = timers_add(&self->head.timers, handle, seconds);
    Py_END_CRITICAL_SECTION();
    if (failed)
        Py_CLEAR(handle);
    return handle;
}

PyObject *turns_call_at(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames)
{
    const struct hot *hot = self->head.hot;
    PyObject *const wanted[] = {hot->names.when, hot->names.callback};
    struct call call;
    if (parse_call(hot, "call_at", wanted, 2, args, count, kwnames, &call) < 0)
        return NULL;
    if (call.named[0] == Py_None) {
        PyErr_SetString(PyExc_TypeError, "when cannot be None");
        return NULL;
    }
    return schedule_at(self, call.named[0], &call, "call_at");
}

/* loop.time() as a double; -1 with an exception. */
double turns_now(Turns *self)
{
    PyObject *time = PyObject_CallMethodNoArgs((PyObject *)self, self->head.hot->names.time);
    double seconds = time == NULL ? -1.0 : PyFloat_AsDouble(time);
    Py_XDECREF(time);
    return seconds;
}

PyObject *turns_call_later(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames)
{
    const struct hot *hot = self->head.hot;
    PyObject *const wanted[] = {hot->names.delay, hot->names.callback};
    struct call call;
    if (parse_call(hot, "call_later", wanted, 2, args, count, kwnames, &call) < 0)
        return NULL;
    if (call.named[0] == Py_None) {
        PyErr_SetString(PyExc_TypeError, "delay must not be None");
        return NULL;
    }
    PyObject *time = PyObject_CallMethodNoArgs((PyObject *)self, hot->names.time), *when, *handle;
    if (time == NULL)
        return NULL;
    when = PyNumber_Add(time, call.named[0]);
    Py_DECREF(time);
    if (when == NULL)
        return NULL;
    handle = schedule_at(self, when, &call, self->head.debug ? "call_at" : "call_later");
    Py_DECREF(when);
    return handle;
}

PyObject *turns_time(Turns *self, PyObject *ignored) { return PyObject_CallNoArgs(self->head.hot->monotonic); }

PyObject *turns_add_callback(Turns *self, PyObject *handle)
{
    const struct hot *hot = self->head.hot;
    if (is_own_handle(hot, handle)) {
        if (handle_is_cancelled(hot, handle))
            Py_RETURN_NONE;
    } else {
        PyObject *cancelled = PyObject_GetAttrString(handle, "_cancelled");
        int skip = cancelled == NULL ? -1 : PyObject_IsTrue(cancelled);
        Py_XDECREF(cancelled);
        if (skip < 0)
            return NULL;
        if (skip)
            Py_RETURN_NONE;
    }
    handle_track(hot, handle);
    if (ready_push(self, Py_NewRef(handle)) < 0)
        return NULL;
    Py_RETURN_NONE;
}

int add_schedule(struct hot *hot)
{
    hot->threadsafe_type = attribute_of("asyncio.events", "_ThreadSafeHandle");
    PyErr_Clear();
    hot->monotonic = attribute_of("time", "monotonic");
    return hot->monotonic == NULL ? -1 : 0;
}
