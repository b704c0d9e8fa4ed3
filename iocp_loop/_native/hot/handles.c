/*
 * Handle and TimerHandle: subclasses of asyncio's own, so that they work and print wherever and as those do.
 *
 * The C here fills their slots directly instead of running __init__, runs the callback without going through
 * Context.run, and keeps a few freed objects for the next.  Whoever calls _run() himself calls asyncio's, or what a tool
 * has put in its place.  A handle that is made from Python, as debug mode does to
 * note where that happened, is initialised by asyncio's code and then no different.
 *
 * The garbage collector.  Free-threaded Python's looks at every object, and a handle is one like any other there.  Else: nearly every handle is dropped by whoever made it, runs once and is gone, and to let the
 * collector look at each would cost more than to run it.  So a handle is not tracked while its loop has it: the loop,
 * when it is traversed, visits what its handles refer to as if the references were its own (handle_visit).  When the
 * loop is done with a handle that somebody else still holds, it is tracked from then on (handle_release): a timer that is
 * kept in an attribute of the object whose method it calls is a cycle.  So is one that comes from outside (handle_track),
 * which the loop may have twice, and its references would count twice.
 *
 * What this does not see: a pending handle does not keep its loop from the collector if nothing else does.  A loop that
 * runs or is to run is held by who runs it; one that was dropped without close() is collected with its handles, even if
 * somebody still holds one of these.
 */

#include "handles.h"

enum { SPARE_LIMIT = 1024 };

void timer_set_scheduled(const struct hot *hot, PyObject *timer, int scheduled)
{
    put_reference(timer, &SLOT(timer, hot->handle.scheduled), Py_NewRef(scheduled ? Py_True : Py_False));
}

int handle_is_cancelled(const struct hot *hot, PyObject *handle)
{
    return SLOT(handle, hot->handle.cancelled) == Py_True;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Making and freeing
 * ------------------------------------------------------------------------------------------------------------------ */

static PyObject *allocate(const struct hot *hot, PyTypeObject *type, struct spares *spares)
{
    PyObject *self = spares->first;
    if (self != NULL) {
        spares->count--;
        spares->first = SLOT(self, hot->handle.callback);
        SLOT(self, hot->handle.callback) = NULL;
        return PyObject_Init(self, type);
    }
    self = PyType_GenericAlloc(type, 0);
#ifndef Py_GIL_DISABLED
    if (self != NULL)
        PyObject_GC_UnTrack(self);
#endif
    return self;
}

/* The slots of asyncio's class beneath ours. */
static const PyTypeObject *slots_of(PyObject *self) { return Py_TYPE(self)->tp_base; }

/* What is left of a spare object is its memory: every slot is NULL. */
static int keep(PyObject *self)
{
#ifdef Py_GIL_DISABLED
    return 0;
#else
    PyTypeObject *type = Py_TYPE(self);
    PyObject *module = ((PyHeapTypeObject *)type)->ht_module; /* NULL if the garbage collector has cleared the type */
    if (module == NULL)
        return 0;
    struct hot *hot = hot_in(module);
    struct spares *spares = type == hot->TimerHandle_type ? &hot->spare_timers : &hot->spare_handles;
    if (spares->count == SPARE_LIMIT)
        return 0;
    spares->count++;
    SLOT(self, hot->handle.callback) = spares->first;
    spares->first = self;
    return 1;
#endif
}

static void free_spares(const struct hot *hot, struct spares *spares)
{
    while (spares->first != NULL) {
        PyObject *self = spares->first;
        spares->first = SLOT(self, hot->handle.callback);
        Py_TYPE(self)->tp_free(self);
    }
    spares->count = 0;
}

void free_spare_handles(struct hot *hot)
{
    free_spares(hot, &hot->spare_handles);
    free_spares(hot, &hot->spare_timers);
}

static void handle_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (SLOT(self, type->tp_weaklistoffset) != NULL)
        PyObject_ClearWeakRefs(self);
    clear_slots(self, slots_of(self));
    if (!keep(self))
        type->tp_free(self);
    Py_DECREF(type);
}

/* The arguments of an untracked handle are untracked too, unless they are the debug mode's.  If somebody else has the
 * tuple, what it refers to is not ours alone. */
static int visit_arguments(PyObject *args, visitproc visit, void *arg)
{
    if (args == NULL || !PyTuple_CheckExact(args) || PyObject_GC_IsTracked(args) || Py_REFCNT(args) > 1) {
        Py_VISIT(args);
        return 0;
    }
    for (Py_ssize_t n = 0; n < PyTuple_GET_SIZE(args); n++)
        Py_VISIT(PyTuple_GET_ITEM(args, n));
    return 0;
}

int handle_visit(const struct hot *hot, PyObject *self, visitproc visit, void *arg)
{
    if (!is_own_handle(hot, self) || PyObject_GC_IsTracked(self)) {
        Py_VISIT(self);
        return 0;
    }
    int stop = visit_arguments(SLOT(self, hot->handle.args), visit, arg);
    if (stop)
        return stop;
    Py_VISIT(SLOT(self, hot->handle.callback));
    Py_VISIT(SLOT(self, hot->handle.loop));
    Py_VISIT(SLOT(self, hot->handle.context));
    return 0;
}

void handle_track(const struct hot *hot, PyObject *self)
{
    if (!is_own_handle(hot, self) || PyObject_GC_IsTracked(self))
        return;
    PyObject *args = SLOT(self, hot->handle.args); /* borrowed */
    if (args != NULL && PyTuple_CheckExact(args) && PyTuple_GET_SIZE(args) > 0 && !PyObject_GC_IsTracked(args))
        PyObject_GC_Track(args);
    PyObject_GC_Track(self);
}

void handle_release(const struct hot *hot, PyObject *self)
{
    if (Py_REFCNT(self) > 1)
        handle_track(hot, self);
    Py_DECREF(self);
}

static int handle_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return visit_slots(self, slots_of(self), visit, arg);
}

static int handle_clear(PyObject *self)
{
    clear_slots(self, slots_of(self));
    return 0;
}

/* Fill the slots that both kinds have.  `context` NULL or None: a copy of the current one. */
static int fill(PyObject *self, struct loop_head *loop, PyObject *callback, PyObject *const *args, Py_ssize_t count,
                PyObject *context)
{
    const struct hot *hot = loop->hot;
    if (context == NULL || context == Py_None)
        context = PyContext_CopyCurrent();
    else
        Py_INCREF(context);
    if (context == NULL)
        return -1;
    SLOT(self, hot->handle.context) = context;
    PyObject *arguments = PyTuple_New(count);
    if (arguments == NULL)
        return -1;
    for (Py_ssize_t n = 0; n < count; n++)
        PyTuple_SET_ITEM(arguments, n, Py_NewRef(args[n]));
#ifndef Py_GIL_DISABLED
    if (count > 0)
        PyObject_GC_UnTrack(arguments);
#endif
    SLOT(self, hot->handle.args) = arguments;
    SLOT(self, hot->handle.callback) = Py_NewRef(callback);
    SLOT(self, hot->handle.loop) = Py_NewRef(loop);
    SLOT(self, hot->handle.cancelled) = Py_NewRef(Py_False);
    SLOT(self, hot->handle.repr) = Py_NewRef(Py_None);
    SLOT(self, hot->handle.source_traceback) = Py_NewRef(Py_None);
    return 0;
}

PyObject *handle_new(struct loop_head *loop, PyObject *callback, PyObject *const *args, Py_ssize_t count, PyObject *context)
{
    struct hot *hot = loop->hot;
    PyObject *self = allocate(hot, hot->Handle_type, &hot->spare_handles);
    if (self == NULL)
        return NULL;
    if (fill(self, loop, callback, args, count, context) < 0)
        Py_CLEAR(self);
    return self;
}

PyObject *timer_new(struct loop_head *loop, PyObject *when, PyObject *callback, PyObject *const *args, Py_ssize_t count,
                    PyObject *context)
{
    struct hot *hot = loop->hot;
    PyObject *self = allocate(hot, hot->TimerHandle_type, &hot->spare_timers);
    if (self == NULL)
        return NULL;
    SLOT(self, hot->handle.when) = Py_NewRef(when);
    SLOT(self, hot->handle.scheduled) = Py_NewRef(Py_False);
    *timer_place(hot, self) = NOWHERE;
    if (fill(self, loop, callback, args, count, context) < 0)
        Py_CLEAR(self);
    return self;
}

/* For timers that are made from Python, in debug mode: nowhere, until they are scheduled. */
static PyObject *timer_tp_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    const struct hot *hot = PyType_GetModuleState(type);
    PyObject *self = hot == NULL ? NULL : PyType_GenericNew(type, args, kwargs);
    if (self != NULL)
        *timer_place(hot, self) = NOWHERE;
    return self;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Running and cancelling
 * ------------------------------------------------------------------------------------------------------------------ */

/* As asyncio.Handle._run, unless it was cancelled: 0, or -1 with an exception that is to end the loop. */
int handle_run(const struct hot *hot, PyObject *handle)
{
    PyObject *callback, *args, *context, *result = NULL;
    int cancelled;
    Py_BEGIN_CRITICAL_SECTION(handle);
    cancelled = handle_is_cancelled(hot, handle);
    callback = Py_XNewRef(SLOT(handle, hot->handle.callback));
    args = Py_XNewRef(SLOT(handle, hot->handle.args));
    context = Py_XNewRef(SLOT(handle, hot->handle.context));
    Py_END_CRITICAL_SECTION();
    if (cancelled)
        result = Py_NewRef(Py_None);
    else if (callback == NULL || args == NULL || context == NULL || !PyTuple_Check(args))
        PyErr_SetString(PyExc_TypeError, "a handle that was not initialised cannot run");
    else
        result = call_in_context(context, callback, &PyTuple_GET_ITEM(args, 0), (size_t)PyTuple_GET_SIZE(args));
    Py_XDECREF(callback);
    Py_XDECREF(args);
    Py_XDECREF(context);
    if (result != NULL) {
        Py_DECREF(result);
        return 0;
    }
    if (ends_the_loop())
        return -1;
    PyObject *exception = take_exception();
    result = PyObject_CallFunctionObjArgs(hot->helpers.report_error, handle, exception, NULL);
    Py_XDECREF(exception);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

int loop_in_debug(const struct hot *hot, PyObject *loop)
{
    if (PyObject_TypeCheck(loop, hot->Turns_type))
        return ((struct loop_head *)loop)->debug;
    PyObject *answer = PyObject_CallMethod(loop, "get_debug", NULL);
    int debug = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    if (debug < 0)
        PyErr_Clear();
    return debug == 1;
}

void timer_leave(struct loop_head *loop, PyObject *timer)
{
    const struct hot *hot = loop->hot;
    struct timers *timers = &loop->timers;
    int found;
    Py_BEGIN_CRITICAL_SECTION(loop);
    size_t place = *timer_place(hot, timer);
    found = place < timers->count && timers->heap[place].handle == timer;
    if (found)
        timers_take(timers, place);
    Py_END_CRITICAL_SECTION();
    if (found) {
        timer_set_scheduled(hot, timer, 0);
        handle_release(hot, timer); /* the heap's; whoever cancels has another */
    }
}

static int leave_heap(const struct hot *hot, PyObject *timer, PyObject *loop)
{
    if (PyObject_TypeCheck(loop, hot->Turns_type)) {
        timer_leave((struct loop_head *)loop, timer);
        return 0;
    }
    PyObject *told = PyObject_CallMethodOneArg(loop, hot->names.timer_handle_cancelled, timer);
    Py_XDECREF(told);
    return told == NULL ? -1 : 0;
}

static PyObject *handle_cancel(PyObject *self, PyObject *ignored)
{
    const struct hot *hot = PyType_GetModuleState(Py_TYPE(self));
    PyObject *loop, *text = NULL;
    int cancelled, failed = 0;
    if (hot == NULL)
        return NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    cancelled = handle_is_cancelled(hot, self);
    loop = cancelled ? NULL : Py_XNewRef(SLOT(self, hot->handle.loop));
    Py_END_CRITICAL_SECTION();
    if (cancelled)
        Py_RETURN_NONE;
    if (Py_IS_TYPE(self, hot->TimerHandle_type) && loop != NULL)
        failed = leave_heap(hot, self, loop);
    if (!failed) {
        put_reference(self, &SLOT(self, hot->handle.cancelled), Py_NewRef(Py_True));
        if (loop != NULL && loop_in_debug(hot, loop)) {
            /* Before what it shows is gone: "Executing <Handle ...> took 2.5 seconds". */
            text = PyObject_Repr(self);
            failed = text == NULL;
        }
    }
    Py_XDECREF(loop);
    if (failed)
        return NULL;
    if (text != NULL)
        put_reference(self, &SLOT(self, hot->handle.repr), text);
    put_reference(self, &SLOT(self, hot->handle.callback), Py_NewRef(Py_None));
    put_reference(self, &SLOT(self, hot->handle.args), Py_NewRef(Py_None));
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The types
 * ------------------------------------------------------------------------------------------------------------------ */

static PyMethodDef handle_methods[] = {
    {"cancel", handle_cancel, METH_NOARGS, "Cancel the callback; nothing happens if that was done, or if it has run."},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject *make_type(struct hot *hot, PyObject *base, const char *name, Py_ssize_t more, newfunc make)
{
    PyType_Slot slots[] = {
        {Py_tp_dealloc, handle_dealloc},
        {Py_tp_traverse, handle_traverse},
        {Py_tp_clear, handle_clear},
        {Py_tp_methods, handle_methods},
        {Py_tp_doc, (char *)"asyncio's handle of a callback, made and run in C."},
        {make == NULL ? 0 : Py_tp_new, make},
        {0, NULL},
    };
    PyType_Spec spec = {
        .name = name,
        .basicsize = (int)(((PyTypeObject *)base)->tp_basicsize + more),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
        .slots = slots,
    };
    if (check_slots((PyTypeObject *)base) < 0)
        return NULL;
    return add_type(hot, &spec, (PyTypeObject *)base);
}

int add_handles(struct hot *hot)
{
    PyObject *asyncio = PyImport_ImportModule("asyncio.events");
    if (asyncio == NULL)
        return -1;
    PyObject *handle = PyObject_GetAttrString(asyncio, "Handle");
    PyObject *timer = PyObject_GetAttrString(asyncio, "TimerHandle");
    Py_DECREF(asyncio);
    if (handle != NULL && timer != NULL) {
        hot->handle.callback = slot_offset(handle, "_callback");
        hot->handle.args = slot_offset(handle, "_args");
        hot->handle.cancelled = slot_offset(handle, "_cancelled");
        hot->handle.loop = slot_offset(handle, "_loop");
        hot->handle.source_traceback = slot_offset(handle, "_source_traceback");
        hot->handle.repr = slot_offset(handle, "_repr");
        hot->handle.context = slot_offset(handle, "_context");
        hot->handle.scheduled = slot_offset(timer, "_scheduled");
        hot->handle.when = slot_offset(timer, "_when");
        hot->timer_place = ((PyTypeObject *)timer)->tp_basicsize;
    }
    if (!PyErr_Occurred()) {
        hot->Handle_type = make_type(hot, handle, "iocp_loop._hot.Handle", 0, NULL);
        hot->TimerHandle_type = make_type(hot, timer, "iocp_loop._hot.TimerHandle", sizeof(size_t), timer_tp_new);
    }
    Py_XDECREF(handle);
    Py_XDECREF(timer);
    return hot->Handle_type == NULL || hot->TimerHandle_type == NULL ? -1 : 0;
}
