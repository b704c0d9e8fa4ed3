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

PyTypeObject *Handle_type, *TimerHandle_type, *Turns_type;

/* Where the slots of asyncio.Handle are; of asyncio.TimerHandle the last two. */
static struct {
    Py_ssize_t callback, args, cancelled, loop, source_traceback, repr, context, scheduled, when;
} at;

Py_ssize_t timer_place_offset; /* of our own field in a TimerHandle, behind asyncio's slots */

enum { SPARE_LIMIT = 1024 };

struct spares {
    PyObject *objects[SPARE_LIMIT];
    int count;
};

static struct spares spare_handles, spare_timers;

void timer_set_scheduled(PyObject *timer, int scheduled)
{
    put_reference(timer, &SLOT(timer, at.scheduled), Py_NewRef(scheduled ? Py_True : Py_False));
}

int handle_is_cancelled(PyObject *handle) { return SLOT(handle, at.cancelled) == Py_True; }

/* ---------------------------------------------------------------------------------------------------------------------
 * Making and freeing
 * ------------------------------------------------------------------------------------------------------------------ */

static PyObject *allocate(PyTypeObject *type, struct spares *spares)
{
    if (spares->count > 0)
        return PyObject_Init(spares->objects[--spares->count], type);
    PyObject *self = PyType_GenericAlloc(type, 0);
#ifndef Py_GIL_DISABLED
    if (self != NULL)
        PyObject_GC_UnTrack(self);
#endif
    return self;
}

/* What is left of a spare object is its memory: every slot is NULL. */
static int keep(PyObject *self, struct spares *spares)
{
#ifdef Py_GIL_DISABLED
    return 0;
#else
    if (spares->count == SPARE_LIMIT)
        return 0;
    spares->objects[spares->count++] = self;
    return 1;
#endif
}

static void clear_slots(PyObject *self, int timed)
{
    Py_CLEAR(SLOT(self, at.callback));
    Py_CLEAR(SLOT(self, at.args));
    Py_CLEAR(SLOT(self, at.cancelled));
    Py_CLEAR(SLOT(self, at.loop));
    Py_CLEAR(SLOT(self, at.source_traceback));
    Py_CLEAR(SLOT(self, at.repr));
    Py_CLEAR(SLOT(self, at.context));
    if (timed) {
        Py_CLEAR(SLOT(self, at.scheduled));
        Py_CLEAR(SLOT(self, at.when));
    }
}

static void handle_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    int timed = type == TimerHandle_type;
    PyObject_GC_UnTrack(self);
    if (SLOT(self, type->tp_weaklistoffset) != NULL)
        PyObject_ClearWeakRefs(self);
    clear_slots(self, timed);
    if (!keep(self, timed ? &spare_timers : &spare_handles))
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

int handle_visit(PyObject *self, visitproc visit, void *arg)
{
    if (!is_own_handle(self) || PyObject_GC_IsTracked(self)) {
        Py_VISIT(self);
        return 0;
    }
    int stop = visit_arguments(SLOT(self, at.args), visit, arg);
    if (stop)
        return stop;
    Py_VISIT(SLOT(self, at.callback));
    Py_VISIT(SLOT(self, at.loop));
    Py_VISIT(SLOT(self, at.context));
    return 0;
}

void handle_track(PyObject *self)
{
    if (!is_own_handle(self) || PyObject_GC_IsTracked(self))
        return;
    PyObject *args = SLOT(self, at.args); /* borrowed */
    if (args != NULL && PyTuple_CheckExact(args) && PyTuple_GET_SIZE(args) > 0 && !PyObject_GC_IsTracked(args))
        PyObject_GC_Track(args);
    PyObject_GC_Track(self);
}

void handle_release(PyObject *self)
{
    if (Py_REFCNT(self) > 1)
        handle_track(self);
    Py_DECREF(self);
}

static int handle_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(SLOT(self, at.callback));
    Py_VISIT(SLOT(self, at.args));
    Py_VISIT(SLOT(self, at.loop));
    Py_VISIT(SLOT(self, at.source_traceback));
    Py_VISIT(SLOT(self, at.context));
    if (Py_IS_TYPE(self, TimerHandle_type))
        Py_VISIT(SLOT(self, at.when)); /* any number */
    return 0;
}

static int handle_clear(PyObject *self)
{
    clear_slots(self, Py_IS_TYPE(self, TimerHandle_type));
    return 0;
}

/* Fill the slots that both kinds have.  `context` NULL or None: a copy of the current one. */
static int fill(PyObject *self, PyObject *loop, PyObject *callback, PyObject *const *args, Py_ssize_t count,
                PyObject *context)
{
    if (context == NULL || context == Py_None)
        context = PyContext_CopyCurrent();
    else
        Py_INCREF(context);
    if (context == NULL)
        return -1;
    SLOT(self, at.context) = context;
    PyObject *arguments = PyTuple_New(count);
    if (arguments == NULL)
        return -1;
    for (Py_ssize_t n = 0; n < count; n++)
        PyTuple_SET_ITEM(arguments, n, Py_NewRef(args[n]));
#ifndef Py_GIL_DISABLED
    if (count > 0)
        PyObject_GC_UnTrack(arguments);
#endif
    SLOT(self, at.args) = arguments;
    SLOT(self, at.callback) = Py_NewRef(callback);
    SLOT(self, at.loop) = Py_NewRef(loop);
    SLOT(self, at.cancelled) = Py_NewRef(Py_False);
    SLOT(self, at.repr) = Py_NewRef(Py_None);
    SLOT(self, at.source_traceback) = Py_NewRef(Py_None);
    return 0;
}

PyObject *handle_new(PyObject *loop, PyObject *callback, PyObject *const *args, Py_ssize_t count, PyObject *context)
{
    PyObject *self = allocate(Handle_type, &spare_handles);
    if (self == NULL)
        return NULL;
    if (fill(self, loop, callback, args, count, context) < 0)
        Py_CLEAR(self);
    return self;
}

PyObject *timer_new(PyObject *loop, PyObject *when, PyObject *callback, PyObject *const *args, Py_ssize_t count,
                    PyObject *context)
{
    PyObject *self = allocate(TimerHandle_type, &spare_timers);
    if (self == NULL)
        return NULL;
    SLOT(self, at.when) = Py_NewRef(when);
    SLOT(self, at.scheduled) = Py_NewRef(Py_False);
    *timer_place(self) = NOWHERE;
    if (fill(self, loop, callback, args, count, context) < 0)
        Py_CLEAR(self);
    return self;
}

/* For timers that are made from Python, in debug mode: nowhere, until they are scheduled. */
static PyObject *timer_tp_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *self = PyType_GenericNew(type, args, kwargs);
    if (self != NULL)
        *timer_place(self) = NOWHERE;
    return self;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Running and cancelling
 * ------------------------------------------------------------------------------------------------------------------ */

/* As asyncio.Handle._run, unless it was cancelled: 0, or -1 with an exception that is to end the loop. */
int handle_run(PyObject *handle)
{
    PyObject *callback, *args, *context, *result = NULL;
    int cancelled;
    Py_BEGIN_CRITICAL_SECTION(handle);
    cancelled = handle_is_cancelled(handle);
    callback = Py_XNewRef(SLOT(handle, at.callback));
    args = Py_XNewRef(SLOT(handle, at.args));
    context = Py_XNewRef(SLOT(handle, at.context));
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
    result = PyObject_CallFunctionObjArgs(helpers.report_error, handle, exception, NULL);
    Py_XDECREF(exception);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

int loop_in_debug(PyObject *loop)
{
    if (PyObject_TypeCheck(loop, Turns_type))
        return ((struct loop_head *)loop)->debug;
    PyObject *answer = PyObject_CallMethod(loop, "get_debug", NULL);
    int debug = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    if (debug < 0)
        PyErr_Clear();
    return debug == 1;
}

void timer_leave(PyObject *loop, PyObject *timer)
{
    struct timers *timers = &((struct loop_head *)loop)->timers;
    int found;
    Py_BEGIN_CRITICAL_SECTION(loop);
    size_t place = *timer_place(timer);
    found = place < timers->count && timers->heap[place].handle == timer;
    if (found)
        timers_take(timers, place);
    Py_END_CRITICAL_SECTION();
    if (found) {
        timer_set_scheduled(timer, 0);
        handle_release(timer); /* the heap's; whoever cancels has another */
    }
}

static int leave_heap(PyObject *timer, PyObject *loop)
{
    if (PyObject_TypeCheck(loop, Turns_type)) {
        timer_leave(loop, timer);
        return 0;
    }
    PyObject *told = PyObject_CallMethodOneArg(loop, names.timer_handle_cancelled, timer);
    Py_XDECREF(told);
    return told == NULL ? -1 : 0;
}

static PyObject *handle_cancel(PyObject *self, PyObject *ignored)
{
    PyObject *loop, *text = NULL;
    int cancelled, failed = 0;
    Py_BEGIN_CRITICAL_SECTION(self);
    cancelled = handle_is_cancelled(self);
    loop = cancelled ? NULL : Py_XNewRef(SLOT(self, at.loop));
    Py_END_CRITICAL_SECTION();
    if (cancelled)
        Py_RETURN_NONE;
    if (Py_IS_TYPE(self, TimerHandle_type) && loop != NULL)
        failed = leave_heap(self, loop);
    if (!failed) {
        put_reference(self, &SLOT(self, at.cancelled), Py_NewRef(Py_True));
        if (loop != NULL && loop_in_debug(loop)) {
            /* Before what it shows is gone: "Executing <Handle ...> took 2.5 seconds". */
            text = PyObject_Repr(self);
            failed = text == NULL;
        }
    }
    Py_XDECREF(loop);
    if (failed)
        return NULL;
    if (text != NULL)
        put_reference(self, &SLOT(self, at.repr), text);
    put_reference(self, &SLOT(self, at.callback), Py_NewRef(Py_None));
    put_reference(self, &SLOT(self, at.args), Py_NewRef(Py_None));
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The types
 * ------------------------------------------------------------------------------------------------------------------ */

static PyMethodDef handle_methods[] = {
    {"cancel", handle_cancel, METH_NOARGS, "Cancel the callback; nothing happens if that was done, or if it has run."},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject *make_type(PyObject *module, PyObject *base, const char *name, Py_ssize_t more, newfunc make)
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
    PyObject *bases = PyTuple_Pack(1, base);
    PyObject *type = bases == NULL ? NULL : PyType_FromModuleAndSpec(module, &spec, bases);
    Py_XDECREF(bases);
    return (PyTypeObject *)type;
}

int add_handles(PyObject *module)
{
    PyObject *asyncio = PyImport_ImportModule("asyncio.events");
    if (asyncio == NULL)
        return -1;
    PyObject *handle = PyObject_GetAttrString(asyncio, "Handle");
    PyObject *timer = PyObject_GetAttrString(asyncio, "TimerHandle");
    Py_DECREF(asyncio);
    if (handle != NULL && timer != NULL) {
        at.callback = slot_offset(handle, "_callback");
        at.args = slot_offset(handle, "_args");
        at.cancelled = slot_offset(handle, "_cancelled");
        at.loop = slot_offset(handle, "_loop");
        at.source_traceback = slot_offset(handle, "_source_traceback");
        at.repr = slot_offset(handle, "_repr");
        at.context = slot_offset(handle, "_context");
        at.scheduled = slot_offset(timer, "_scheduled");
        at.when = slot_offset(timer, "_when");
        timer_place_offset = ((PyTypeObject *)timer)->tp_basicsize;
    }
    if (!PyErr_Occurred()) {
        Handle_type = make_type(module, handle, "iocp_loop._hot.Handle", 0, NULL);
        TimerHandle_type = make_type(module, timer, "iocp_loop._hot.TimerHandle", sizeof(size_t), timer_tp_new);
    }
    Py_XDECREF(handle);
    Py_XDECREF(timer);
    if (Handle_type == NULL || TimerHandle_type == NULL)
        return -1;
    return PyModule_AddObjectRef(module, "Handle", (PyObject *)Handle_type) < 0
                   || PyModule_AddObjectRef(module, "TimerHandle", (PyObject *)TimerHandle_type) < 0
               ? -1
               : 0;
}
