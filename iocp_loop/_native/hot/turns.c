/*
 * Turns: the ready queue, the timers, and one turn of the loop.
 *
 * A class in Python inherits from Turns first and from asyncio.BaseEventLoop behind it.  So the methods here stand in
 * for BaseEventLoop's of the same names, and the attributes here (_debug, _closed, _stopping, ...) catch what
 * BaseEventLoop's other methods assign to them; everything else stays BaseEventLoop's.
 *
 * The ready queue is a ring of handles.  One of them stands for the completions that the wait of this turn has gathered
 * (methods/turns.py has its class): what was ready before them is to run before them.
 *
 * Tools run turns of their own on what they find in _ready, _scheduled and _process_events (nest_asyncio does).  So these
 * are there as BaseEventLoop has them, but for _scheduled, which is a copy.
 */

#include "turns.h"

#include <math.h>

/* The longest wait, as in asyncio: select() takes no more on some systems.  Seconds. */
static const double LONGEST_WAIT = 24 * 3600;

/* When the earliest timer is due, in `*when`; 0 if there is none. */
static int next_timer(Turns *self, double *when)
{
    int found;
    Py_BEGIN_CRITICAL_SECTION(self);
    found = self->head.timers.count > 0;
    if (found)
        *when = self->head.timers.heap[0].when;
    Py_END_CRITICAL_SECTION();
    return found;
}

/* Take the earliest timer out if it is due before `end`; the last of the heap, whenever it is due, with `any`.  NULL: there
 * is none. */
static PyObject *take_timer(Turns *self, double end, int any)
{
    PyObject *handle = NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    if (self->head.timers.count > 0 && (any || self->head.timers.heap[0].when < end))
        handle = timers_take(&self->head.timers, any ? self->head.timers.count - 1 : 0);
    Py_END_CRITICAL_SECTION();
    if (handle != NULL)
        timer_set_scheduled(self->head.hot, handle, 0);
    return handle;
}

static void turns_forget_everything(Turns *self)
{
    PyObject *handle;
    while ((handle = ready_pop(self)) != NULL)
        handle_release(self->head.hot, handle);
    while ((handle = take_timer(self, 0, 1)) != NULL)
        handle_release(self->head.hot, handle);
}

/* BaseEventLoop counts cancelled timers, to sweep them out some day; ours have left already. */
static PyObject *turns_timer_handle_cancelled(Turns *self, PyObject *handle) { Py_RETURN_NONE; }

/* ---------------------------------------------------------------------------------------------------------------------
 * One turn
 * ------------------------------------------------------------------------------------------------------------------ */

/* Timers that fire within so long a time, seconds, are woken for together if there are several: waking for each is
 * most of the cost of a short timer.  It is what epoll counts in, so that no other loop is more exact. */
static const double TOGETHER = 1e-3;

/* A busy loop, which has callbacks to run in turn after turn, need not ask the system in each of them where that takes a
 * system call.  Once it has asked in vain so often, it asks every 50 us: what has come waits by so much longer at most. */
enum { PATIENCE = 16, LOOK_EVERY_NS = 50000 };

static int crowded(Turns *self, double end)
{
    int answer;
    Py_BEGIN_CRITICAL_SECTION(self);
    answer = timers_crowded(&self->head.timers, end);
    Py_END_CRITICAL_SECTION();
    return answer;
}

static int look(Turns *self)
{
#ifdef __linux__
    if (!self->native->verbs->look_costs || self->stopping)
        return driver_wait(self->native, 0);
    int64_t time = 0;
    if (self->fruitless >= PATIENCE) {
        time = clock_ns();
        if (time - self->looked_at < LOOK_EVERY_NS)
            return 0;
    }
    int found = driver_wait(self->native, 0);
    self->fruitless = found == 0 ? self->fruitless + (self->fruitless < PATIENCE) : 0;
    self->looked_at = time;
    return found;
#else
    return driver_wait(self->native, 0);
#endif
}

static int wait(Turns *self)
{
    double seconds = -1; /* for ever */
    PyObject *timeout, *done;
    if (self->waited) /* by loop.poll(), see methods/embedding.py */
        return 0;
    if (READ(self->count) > 0 || self->stopping) {
        if (self->native != NULL && self->select == NULL)
            return look(self);
        seconds = 0;
    }
    else if (self->head.timers.count > 0) {
        double time = turns_now(self), when;
        if (time == -1.0 && PyErr_Occurred())
            return -1;
        if (next_timer(self, &when)) { /* still: who overrides time() may do anything in it */
            seconds = when - time;
            seconds = seconds < 0 ? 0 : seconds > LONGEST_WAIT ? LONGEST_WAIT : seconds;
            if (seconds > 0 && seconds < TOGETHER && crowded(self, time + TOGETHER))
                seconds = TOGETHER;
        }
    }
    self->fruitless = 0;
    if (self->native != NULL && self->select == NULL)
        return driver_wait(self->native, seconds);
    timeout = seconds < 0 ? Py_NewRef(Py_None) : PyFloat_FromDouble(seconds);
    if (timeout == NULL)
        return -1;
    PyObject *call = Py_NewRef(self->select == NULL ? self->wait : self->select);
    done = PyObject_CallOneArg(call, timeout);
    Py_DECREF(call);
    Py_DECREF(timeout);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

static int dispatch(Turns *self)
{
    if (self->native != NULL)
        return driver_dispatch(self->native);
    PyObject *done = PyObject_CallNoArgs(self->dispatch);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* Move the timers that are due to the ready queue. */
static int ripen(Turns *self)
{
    double end = turns_now(self);
    if (end == -1.0 && PyErr_Occurred())
        return -1;
    end += self->resolution;
    PyObject *handle;
    while ((handle = take_timer(self, end, 0)) != NULL)
        if (ready_push(self, handle) < 0)
            return -1;
    return 0;
}

/* Run one entry of the ready queue; takes over its reference.  `by_method`: by its method _run, which may not be ours. */
static int run(Turns *self, PyObject *handle, int by_method)
{
    const struct hot *hot = self->head.hot;
    int failed = 0;
    if (handle == self->completions)
        failed = dispatch(self);
    else if (!is_own_handle(hot, handle) || by_method || self->head.debug) {
        PyObject *done = PyObject_CallFunctionObjArgs(hot->helpers.run_by_method, self, handle, NULL);
        failed = done == NULL ? -1 : 0;
        Py_XDECREF(done);
    } else
        failed = handle_run(hot, handle);
    handle_release(hot, handle);
    return failed;
}

static int run_once(Turns *self)
{
    if (wait(self) < 0)
        return -1;
    if (READ(self->count) > 0) {
        if (ready_push(self, Py_NewRef(self->completions)) < 0)
            return -1;
    } else if (dispatch(self) < 0)
        return -1;
    if (self->head.timers.count > 0 && ripen(self) < 0)
        return -1;
    /* What they schedule runs in the next turn, after another look at the port. */
    int by_method = is_replaced(&self->head.hot->handle_run_method);
    PyObject *handle;
    for (size_t left = READ(self->count); left > 0 && (handle = ready_pop(self)) != NULL; left--)
        if (run(self, handle, by_method) < 0)
            return -1;
    return 0;
}

/* run_once, for one thread at a time.  A turn within a turn is one of the same thread. */
static int run_once_alone(Turns *self)
{
#ifdef Py_GIL_DISABLED
    unsigned long here = PyThread_get_thread_ident(), before = 0;
    if (!__atomic_compare_exchange_n(&self->runner, &before, here, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
        if (before == here)
            return run_once(self);
        PyErr_SetString(PyExc_RuntimeError, "the loop is running in another thread");
        return -1;
    }
    int failed = run_once(self);
    __atomic_store_n(&self->runner, 0, __ATOMIC_RELEASE);
    return failed;
#else
    return run_once(self);
#endif
}

static PyObject *turns_run_once(Turns *self, PyObject *ignored)
{
    if (self->wait == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "the loop has no driver");
        return NULL;
    }
    if (run_once_alone(self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* What BaseEventLoop calls after the wait.  Only a turn that is not ours comes here, and it has looked at the timers: the
 * completions, which may set some, stand in the queue. */
static PyObject *turns_process_events(Turns *self, PyObject *ignored)
{
    if (self->completions != NULL && ready_push(self, Py_NewRef(self->completions)) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *turns_use(Turns *self, PyObject *args)
{
    PyObject *driver, *completions; /* borrowed */
    if (!PyArg_ParseTuple(args, "OO", &driver, &completions))
        return NULL;
    PyObject *wait = PyObject_GetAttrString(driver, "wait");
    PyObject *dispatch = wait == NULL ? NULL : PyObject_GetAttrString(driver, "dispatch");
    PyObject *has_work = dispatch == NULL ? NULL : PyObject_GetAttrString((PyObject *)self, "_has_work");
    int failed = has_work == NULL || PyObject_SetAttrString(driver, "before_sleep", has_work) < 0;
    Py_XDECREF(has_work);
    if (failed) {
        Py_XDECREF(wait);
        Py_XDECREF(dispatch);
        return NULL;
    }
    self->native = native_driver(self->head.hot, driver);
    Py_XSETREF(self->driver, Py_NewRef(driver));
    Py_XSETREF(self->wait, wait);
    Py_XSETREF(self->dispatch, dispatch);
    Py_XSETREF(self->completions, Py_NewRef(completions));
    Py_RETURN_NONE;
}

static PyObject *turns_get_debug(Turns *self, PyObject *ignored) { return PyBool_FromLong(self->head.debug); }

/* Asked before the wait sleeps: see the fences in hot.h. */
static PyObject *turns_has_work(Turns *self, PyObject *ignored) { return PyBool_FromLong(READ(self->count) > 0); }

static PyObject *turns_next_timer(Turns *self, PyObject *ignored)
{
    double when;
    return next_timer(self, &when) ? PyFloat_FromDouble(when) : Py_NewRef(Py_None);
}

static PyObject *turns_forget(Turns *self, PyObject *ignored)
{
    turns_forget_everything(self);
    Py_RETURN_NONE;
}

/* A copy, in order, which is what heapq wants too: what is taken from it and put into the ready queue leaves the timers. */
static PyObject *get_scheduled(Turns *self, void *ignored) 
{
    return timers_list((PyObject *)self, &self->head.timers);
}

/* BaseEventLoop's constructor brings a queue and a list of its own. */
static int ignore(Turns *self, PyObject *value, void *ignored) { return 0; }

static PyObject *get_stopping(Turns *self, void *ignored) { return PyBool_FromLong(self->stopping); }

/* Assigned when a run begins or ends, or is to end: each looks for completions anew. */
static int set_stopping(Turns *self, PyObject *value, void *ignored)
{
    int stopping = value == NULL ? 0 : PyObject_IsTrue(value);
    if (stopping < 0)
        return -1;
    self->stopping = (char)stopping;
    self->fruitless = 0;
    return 0;
}

static PyObject *get_debug(Turns *self, void *ignored) { return PyBool_FromLong(self->head.debug); }

static int set_debug(Turns *self, PyObject *value, void *ignored)
{
    int debug = value == NULL ? 0 : PyObject_IsTrue(value);
    if (debug < 0)
        return -1;
    self->head.debug = (char)debug;
    return 0;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The type
 * ------------------------------------------------------------------------------------------------------------------ */

static void turns_dealloc(Turns *self);

static PyObject *turns_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    struct hot *hot = hot_of(type, (destructor)turns_dealloc);
    Turns *self = hot == NULL ? NULL : (Turns *)PyType_GenericNew(type, args, kwargs);
    if (self != NULL) {
        self->head.hot = hot;
        Py_INCREF(hot->module);
        self->head.timers.place_offset = hot->timer_place;
    }
    return (PyObject *)self;
}

static int turns_traverse(Turns *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->driver);
    Py_VISIT(self->wait);
    Py_VISIT(self->dispatch);
    Py_VISIT(self->completions);
    Py_VISIT(self->select);
    Py_VISIT(self->task_factory);
    Py_VISIT(self->head.transport_refs);
    Py_VISIT(self->head.forget_transport);
    int stop = visit_hot(self->head.hot, visit, arg);
    for (size_t n = 0; !stop && n < self->count; n++)
        stop = handle_visit(self->head.hot, self->ring[(self->first + n) & (self->room - 1)], visit, arg);
    for (size_t n = 0; !stop && n < self->head.timers.count; n++)
        stop = handle_visit(self->head.hot, self->head.timers.heap[n].handle, visit, arg);
    return stop;
}

static int turns_clear(Turns *self)
{
    self->native = NULL;
    Py_CLEAR(self->driver);
    Py_CLEAR(self->wait);
    Py_CLEAR(self->dispatch);
    Py_CLEAR(self->task_factory);
    Py_CLEAR(self->head.transport_refs);
    Py_CLEAR(self->head.forget_transport);
    turns_forget_everything(self);
    Py_CLEAR(self->completions);
    Py_CLEAR(self->select);
    return 0;
}

static void turns_dealloc(Turns *self)
{
    PyObject_GC_UnTrack(self);
    turns_clear(self);
    PyMem_Free(self->ring);
    PyMem_Free(self->head.timers.heap);
    free_with_hot((PyObject *)self, self->head.hot);
}

static PyMethodDef turns_methods[] = {
    {"call_soon", (PyCFunction)(void (*)(void))turns_call_soon, METH_FASTCALL | METH_KEYWORDS,
     "call_soon($self, callback, *args, context=None)\n--\n\nCall ``callback(*args)`` in the next turn."},
    {"call_soon_threadsafe", (PyCFunction)(void (*)(void))turns_call_soon_threadsafe, METH_FASTCALL | METH_KEYWORDS,
     "call_soon_threadsafe($self, callback, *args, context=None)\n--\n\n"
               "As call_soon(), from any thread: wakes the loop."},
    {"call_later", (PyCFunction)(void (*)(void))turns_call_later, METH_FASTCALL | METH_KEYWORDS,
     "call_later($self, delay, callback, *args, context=None)\n--\n\n"
               "Call ``callback(*args)`` after `delay` seconds."},
    {"call_at", (PyCFunction)(void (*)(void))turns_call_at, METH_FASTCALL | METH_KEYWORDS,
     "call_at($self, when, callback, *args, context=None)\n--\n\n"
               "Call ``callback(*args)`` when time() has come to `when`, seconds."},
    {"time", (PyCFunction)turns_time, METH_NOARGS,
     "time($self)\n--\n\nThe loop's clock, time.monotonic(), in seconds."},
    {"_add_callback", (PyCFunction)turns_add_callback, METH_O, NULL},
    {"_timer_handle_cancelled", (PyCFunction)turns_timer_handle_cancelled, METH_O, NULL},
    {"_run_once", (PyCFunction)turns_run_once, METH_NOARGS, NULL},
    {"create_future", (PyCFunction)turns_create_future, METH_NOARGS,
     "create_future($self)\n--\n\nA Future of this loop."},
    {"get_debug", (PyCFunction)turns_get_debug, METH_NOARGS,
     "get_debug($self)\n--\n\nWhether debug mode is on."},
    {"_process_events", (PyCFunction)turns_process_events, METH_O, NULL},
    {"_use", (PyCFunction)turns_use, METH_VARARGS,
     "Wait for and deliver the completions of a driver, for which a handle stands in the queue, from now on."},
    {"_has_work", (PyCFunction)turns_has_work, METH_NOARGS, "Whether a callback is ready to run."},
    {"_next_timer", (PyCFunction)turns_next_timer, METH_NOARGS, "When the earliest timer is due; None if there is none."},
    {"_forget_callbacks", (PyCFunction)turns_forget, METH_NOARGS, "Drop what is ready and every timer."},
    {NULL, NULL, 0, NULL}, /* and create_task, see tasks.c */
};

static PyMemberDef turns_members[] = {
    {"_closed", T_BOOL, offsetof(Turns, closed), 0, NULL},
    {"_waited", T_BOOL, offsetof(Turns, waited), 0, NULL},
    {"_select", T_OBJECT, offsetof(Turns, select), 0, NULL},
    {"_transport_refs", T_OBJECT_EX, offsetof(Turns, head.transport_refs), 0, NULL},
    {"_forget_transport", T_OBJECT_EX, offsetof(Turns, head.forget_transport), 0, NULL},
    {"_task_factory", T_OBJECT, offsetof(Turns, task_factory), 0, NULL},
    {"_clock_resolution", T_DOUBLE, offsetof(Turns, resolution), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef turns_getset[] = {
    {"_ready", (getter)ready_get, (setter)ignore, NULL, NULL},
    {"_scheduled", (getter)get_scheduled, (setter)ignore, NULL, NULL},
    {"_debug", (getter)get_debug, (setter)set_debug, NULL, NULL},
    {"_stopping", (getter)get_stopping, (setter)set_stopping, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot turns_slots[] = {
    {Py_tp_doc, (char *)"The ready queue, the timers and the turn of an event loop."},
    {Py_tp_new, turns_new},
    {Py_tp_dealloc, turns_dealloc},
    {Py_tp_traverse, turns_traverse},
    {Py_tp_clear, turns_clear},
    {Py_tp_methods, turns_methods},
    {Py_tp_members, turns_members},
    {Py_tp_getset, turns_getset},
    {0, NULL},
};

static PyType_Spec turns_spec = {
    .name = "iocp_loop._hot.Turns",
    .basicsize = sizeof(Turns),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = turns_slots,
};

int add_turns(struct hot *hot)
{
    hot->Turns_type = (PyTypeObject *)PyType_FromModuleAndSpec(hot->module, &turns_spec, NULL);
    if (hot->Turns_type == NULL || add_ready(hot) < 0 || add_schedule(hot) < 0 || add_tasks(hot) < 0)
        return -1;
    return PyModule_AddObjectRef(hot->module, "Turns", (PyObject *)hot->Turns_type);
}
