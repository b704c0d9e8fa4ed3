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

#include "hot.h"

#include <math.h>

typedef struct {
    PyObject_HEAD
    PyObject **ring;
    size_t first, count, room; /* room is a power of two, or 0 */
    struct timers timers;
    double resolution; /* of the clock, seconds: a timer that is due within it is due */
    PyObject *driver, *wait, *dispatch;
    PyObject *completions; /* the handle that stands for them */
    PyObject *select;      /* a replacement of the wait, or NULL */
    const struct native_driver *native; /* NULL: call the methods of the driver */
    PyObject *task_factory;
    char debug, closed, stopping, waited;
    unsigned long runner; /* the thread that is in a turn, where there is no GIL; 0: none */
    int fruitless;    /* looks for completions in a row, in turns that had something to run, that found none */
    int64_t looked_at; /* when the last of them was, ns */
} Turns;

PyTypeObject *Turns_type;
static PyTypeObject *Queue_type;
static PyObject *monotonic; /* time.monotonic */

/* The longest wait, as in asyncio: select() takes no more on some systems.  Seconds. */
static const double LONGEST_WAIT = 24 * 3600;

int turns_in_debug(PyObject *loop)
{
    if (PyObject_TypeCheck(loop, Turns_type))
        return ((Turns *)loop)->debug;
    PyObject *answer = PyObject_CallMethod(loop, "get_debug", NULL);
    int debug = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    if (debug < 0)
        PyErr_Clear();
    return debug == 1;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The ready queue
 * ------------------------------------------------------------------------------------------------------------------ */

static int grow(Turns *self)
{
    size_t room = self->room ? 2 * self->room : 64;
    PyObject **ring = PyMem_New(PyObject *, room);
    if (ring == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t n = 0; n < self->count; n++)
        ring[n] = self->ring[(self->first + n) & (self->room - 1)];
    PyMem_Free(self->ring);
    self->ring = ring;
    self->room = room;
    self->first = 0;
    return 0;
}

/* Takes over the reference to `handle`, also when it fails. */
static int push(Turns *self, PyObject *handle)
{
    int failed;
    Py_BEGIN_CRITICAL_SECTION(self);
    failed = self->count == self->room && grow(self) < 0;
    if (!failed) {
        self->ring[(self->first + self->count) & (self->room - 1)] = handle;
        WRITE(self->count, self->count + 1);
    }
    Py_END_CRITICAL_SECTION();
    if (failed)
        Py_DECREF(handle);
    return failed ? -1 : 0;
}

/* NULL if nothing is ready. */
static PyObject *pop(Turns *self)
{
    PyObject *handle = NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    if (self->count > 0) {
        handle = self->ring[self->first];
        self->first = (self->first + 1) & (self->room - 1);
        WRITE(self->count, self->count - 1);
    }
    Py_END_CRITICAL_SECTION();
    return handle;
}

/* When the earliest timer is due, in `*when`; 0 if there is none. */
static int next_timer(Turns *self, double *when)
{
    int found;
    Py_BEGIN_CRITICAL_SECTION(self);
    found = self->timers.count > 0;
    if (found)
        *when = self->timers.heap[0].when;
    Py_END_CRITICAL_SECTION();
    return found;
}

/* A timer is being cancelled: let it leave the heap, if it is there. */
void turns_forget_timer(PyObject *loop, PyObject *timer)
{
    Turns *self = (Turns *)loop;
    int found;
    Py_BEGIN_CRITICAL_SECTION(self);
    size_t place = *timer_place(timer);
    found = place < self->timers.count && self->timers.heap[place].handle == timer;
    if (found)
        timers_take(&self->timers, place);
    Py_END_CRITICAL_SECTION();
    if (found) {
        timer_set_scheduled(timer, 0);
        handle_release(timer); /* the heap's; whoever cancels has another */
    }
}

/* Take the earliest timer out if it is due before `end`; the last of the heap, whenever it is due, with `any`.  NULL: there
 * is none. */
static PyObject *take_timer(Turns *self, double end, int any)
{
    PyObject *handle = NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    if (self->timers.count > 0 && (any || self->timers.heap[0].when < end))
        handle = timers_take(&self->timers, any ? self->timers.count - 1 : 0);
    Py_END_CRITICAL_SECTION();
    if (handle != NULL)
        timer_set_scheduled(handle, 0);
    return handle;
}

static void forget_everything(Turns *self)
{
    PyObject *handle;
    while ((handle = pop(self)) != NULL)
        handle_release(handle);
    while ((handle = take_timer(self, 0, 1)) != NULL)
        handle_release(handle);
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Scheduling callbacks
 * ------------------------------------------------------------------------------------------------------------------ */

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
static int parse_call(const char *function, PyObject *const *wanted, Py_ssize_t most, PyObject *const *args,
                      Py_ssize_t count, PyObject *kwnames, struct call *call)
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
        if (is_name(name, names.context)) {
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
    PyObject *done;
    if (self->closed) {
        done = PyObject_CallMethodNoArgs((PyObject *)self, names.check_closed);
        if (done == NULL)
            return -1;
        Py_DECREF(done);
    }
    if (!self->debug)
        return 0;
    if (!any_thread) {
        done = PyObject_CallMethodNoArgs((PyObject *)self, names.check_thread);
        if (done == NULL)
            return -1;
        Py_DECREF(done);
    }
    PyObject *name = PyUnicode_FromString(method);
    done = name == NULL
               ? NULL
               : PyObject_CallMethodObjArgs((PyObject *)self, names.check_callback, callback, name, NULL);
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
static PyObject *threadsafe_type; /* NULL before */

static PyObject *make_threadsafe(Turns *self, const struct call *call)
{
    PyObject *handle =
        make_by_asyncio(self, threadsafe_type, NULL, call->named[0], call->args, call->count, call->context);
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
    PyObject *handle;
    struct call call;
    if (parse_call(method, &names.callback, 1, args, count, kwnames, &call) < 0
        || check(self, call.named[0], method, any_thread) < 0)
        return NULL;
    if (any_thread && threadsafe_type != NULL)
        handle = make_threadsafe(self, &call);
    else if (self->debug)
        handle = make_by_asyncio(self, (PyObject *)Handle_type, NULL, call.named[0], call.args, call.count,
                                 call.context);
    else
        handle = handle_new((PyObject *)self, call.named[0], call.args, call.count, call.context);
    if (handle != NULL && push(self, Py_NewRef(handle)) < 0)
        Py_CLEAR(handle);
    return handle;
}

static PyObject *turns_call_soon(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames)
{
    return schedule_soon(self, args, count, kwnames, "call_soon", 0);
}

static PyObject *turns_call_soon_threadsafe(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames)
{
    PyObject *handle = schedule_soon(self, args, count, kwnames, "call_soon_threadsafe", 1);
    if (handle != NULL) {
        PyObject *woken = PyObject_CallMethodNoArgs((PyObject *)self, names.write_to_self);
        if (woken == NULL)
            Py_CLEAR(handle);
        Py_XDECREF(woken);
    }
    return handle;
}

static PyObject *schedule_at(Turns *self, PyObject *when, const struct call *call, const char *method)
{
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
    if (self->debug)
        handle = make_by_asyncio(self, (PyObject *)TimerHandle_type, when, callback, call->args, call->count,
                                 call->context);
    else
        handle = timer_new((PyObject *)self, when, callback, call->args, call->count, call->context);
    if (handle == NULL)
        return NULL;
    timer_set_scheduled(handle, 1);
    int failed;
    Py_BEGIN_CRITICAL_SECTION(self);
    failed = timers_add(&self->timers, handle, seconds);
    Py_END_CRITICAL_SECTION();
    if (failed)
        Py_CLEAR(handle);
    return handle;
}

static PyObject *turns_call_at(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames)
{
    PyObject *const wanted[] = {names.when, names.callback};
    struct call call;
    if (parse_call("call_at", wanted, 2, args, count, kwnames, &call) < 0)
        return NULL;
    if (call.named[0] == Py_None) {
        PyErr_SetString(PyExc_TypeError, "when cannot be None");
        return NULL;
    }
    return schedule_at(self, call.named[0], &call, "call_at");
}

/* loop.time() as a double; -1 with an exception. */
static double now(Turns *self)
{
    PyObject *time = PyObject_CallMethodNoArgs((PyObject *)self, names.time);
    double seconds = time == NULL ? -1.0 : PyFloat_AsDouble(time);
    Py_XDECREF(time);
    return seconds;
}

static PyObject *turns_call_later(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames)
{
    PyObject *const wanted[] = {names.delay, names.callback};
    struct call call;
    if (parse_call("call_later", wanted, 2, args, count, kwnames, &call) < 0)
        return NULL;
    if (call.named[0] == Py_None) {
        PyErr_SetString(PyExc_TypeError, "delay must not be None");
        return NULL;
    }
    PyObject *time = PyObject_CallMethodNoArgs((PyObject *)self, names.time), *when, *handle;
    if (time == NULL)
        return NULL;
    when = PyNumber_Add(time, call.named[0]);
    Py_DECREF(time);
    if (when == NULL)
        return NULL;
    handle = schedule_at(self, when, &call, self->debug ? "call_at" : "call_later");
    Py_DECREF(when);
    return handle;
}

static PyObject *turns_time(Turns *self, PyObject *ignored) { return PyObject_CallNoArgs(monotonic); }

static PyObject *turns_add_callback(Turns *self, PyObject *handle)
{
    if (is_own_handle(handle)) {
        if (handle_is_cancelled(handle))
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
    handle_track(handle);
    if (push(self, Py_NewRef(handle)) < 0)
        return NULL;
    Py_RETURN_NONE;
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
    answer = timers_crowded(&self->timers, end);
    Py_END_CRITICAL_SECTION();
    return answer;
}

static int look(Turns *self)
{
#ifdef __linux__
    if (!self->native->look_costs || self->stopping)
        return self->native->wait(self->driver, 0);
    int64_t time = 0;
    if (self->fruitless >= PATIENCE) {
        time = clock_ns();
        if (time - self->looked_at < LOOK_EVERY_NS)
            return 0;
    }
    int found = self->native->wait(self->driver, 0);
    self->fruitless = found == 0 ? self->fruitless + (self->fruitless < PATIENCE) : 0;
    self->looked_at = time;
    return found;
#else
    return self->native->wait(self->driver, 0);
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
    else if (self->timers.count > 0) {
        double time = now(self), when;
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
        return self->native->wait(self->driver, seconds);
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
        return self->native->dispatch(self->driver);
    PyObject *done = PyObject_CallNoArgs(self->dispatch);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* Move the timers that are due to the ready queue. */
static int ripen(Turns *self)
{
    double end = now(self);
    if (end == -1.0 && PyErr_Occurred())
        return -1;
    end += self->resolution;
    PyObject *handle;
    while ((handle = take_timer(self, end, 0)) != NULL)
        if (push(self, handle) < 0)
            return -1;
    return 0;
}

/* Run one entry of the ready queue; takes over its reference.  `by_method`: by its method _run, which may not be ours. */
static int run(Turns *self, PyObject *handle, int by_method)
{
    int failed = 0;
    if (handle == self->completions)
        failed = dispatch(self);
    else if (!is_own_handle(handle) || by_method || self->debug) {
        PyObject *done = PyObject_CallFunctionObjArgs(helpers.run_by_method, self, handle, NULL);
        failed = done == NULL ? -1 : 0;
        Py_XDECREF(done);
    } else
        failed = handle_run(handle);
    handle_release(handle);
    return failed;
}

static int run_once(Turns *self)
{
    if (wait(self) < 0)
        return -1;
    if (READ(self->count) > 0) {
        if (push(self, Py_NewRef(self->completions)) < 0)
            return -1;
    } else if (dispatch(self) < 0)
        return -1;
    if (self->timers.count > 0 && ripen(self) < 0)
        return -1;
    /* What they schedule runs in the next turn, after another look at the port. */
    int by_method = is_replaced(&handle_run_method);
    PyObject *handle;
    for (size_t left = READ(self->count); left > 0 && (handle = pop(self)) != NULL; left--)
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
    if (self->completions != NULL && push(self, Py_NewRef(self->completions)) < 0)
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
    const struct native_driver *native = native_driver_of(driver);
    if (native != NULL
        && (!PyCFunction_Check(wait) || PyCFunction_GET_SELF(wait) != driver
            || PyCFunction_GET_FUNCTION(wait) != native->wait_method))
        native = NULL;
    self->native = native;
    Py_XSETREF(self->driver, Py_NewRef(driver));
    Py_XSETREF(self->wait, wait);
    Py_XSETREF(self->dispatch, dispatch);
    Py_XSETREF(self->completions, Py_NewRef(completions));
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Futures and tasks: what is asked for with every request of a server
 * ------------------------------------------------------------------------------------------------------------------ */

static PyObject *futures, *tasks;                   /* the modules, whose Future and Task may be replaced too */
static PyObject *future_name, *task_name;           /* "Future" and "Task" */
static PyObject *loop_keyword, *loop_name_keywords; /* ("loop",) and ("loop", "name") */

static PyObject *call_type(PyObject *module, PyObject *name, PyObject *const *args, size_t count, PyObject *kwnames)
{
    PyObject *type = Py_XNewRef(PyDict_GetItemWithError(PyModule_GetDict(module), name)), *made;
    if (type == NULL && !PyErr_Occurred())
        PyErr_SetObject(PyExc_AttributeError, name);
    made = type == NULL ? NULL : PyObject_Vectorcall(type, args, count, kwnames);
    Py_XDECREF(type);
    return made;
}

static PyObject *turns_create_future(Turns *self, PyObject *ignored)
{
    PyObject *args[] = {(PyObject *)self};
    return call_type(futures, future_name, args, 0, loop_keyword);
}

/* BaseEventLoop's way for all that is not plain: a task factory, debug mode, keywords that a later Python brings; or what
 * somebody has put in its place. */
static PyObject *create_task_slowly(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames)
{
    Py_ssize_t all = count + (kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames));
    PyObject **more = PyMem_New(PyObject *, all + 1), *method, *task;
    if (more == NULL)
        return PyErr_NoMemory();
    more[0] = (PyObject *)self;
    for (Py_ssize_t n = 0; n < all; n++)
        more[n + 1] = args[n];
    method = PyObject_GetAttr((PyObject *)create_task_method.type, create_task_method.name);
    task = method == NULL ? NULL : PyObject_Vectorcall(method, more, (size_t)count + 1, kwnames);
    Py_XDECREF(method);
    PyMem_Free(more);
    return task;
}

static PyObject *turns_create_task(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames)
{
    if (self->debug || self->closed || (self->task_factory != NULL && self->task_factory != Py_None) || count != 1
        || is_replaced(&create_task_method))
        return create_task_slowly(self, args, count, kwnames);
    if (kwnames == NULL) {
        PyObject *plain[] = {args[0], (PyObject *)self};
        return call_type(tasks, task_name, plain, 1, loop_keyword);
    }
    /* asyncio.create_task always brings a name. */
    if (PyTuple_GET_SIZE(kwnames) == 1 && PyTuple_GET_ITEM(kwnames, 0) == PyTuple_GET_ITEM(loop_name_keywords, 1)) {
        PyObject *named[] = {args[0], (PyObject *)self, args[1]};
        return call_type(tasks, task_name, named, 1, loop_name_keywords);
    }
    return create_task_slowly(self, args, count, kwnames);
}

static PyObject *turns_get_debug(Turns *self, PyObject *ignored) { return PyBool_FromLong(self->debug); }

/* Asked before the wait sleeps: see the fences in hot.h. */
static PyObject *turns_has_work(Turns *self, PyObject *ignored) { return PyBool_FromLong(READ(self->count) > 0); }

static PyObject *turns_next_timer(Turns *self, PyObject *ignored)
{
    double when;
    return next_timer(self, &when) ? PyFloat_FromDouble(when) : Py_NewRef(Py_None);
}

static PyObject *turns_forget(Turns *self, PyObject *ignored)
{
    forget_everything(self);
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The ready queue as Python sees it: loop._ready, for BaseEventLoop's own methods and for the curious
 * ------------------------------------------------------------------------------------------------------------------ */

typedef struct {
    PyObject_HEAD
    Turns *loop;
} Queue;

static Py_ssize_t queue_length(Queue *self) { return (Py_ssize_t)self->loop->count; }

/* A timer that somebody puts here, because it is due, is none any more. */
static PyObject *queue_append(Queue *self, PyObject *handle)
{
    if (Py_IS_TYPE(handle, TimerHandle_type))
        turns_forget_timer((PyObject *)self->loop, handle);
    handle_track(handle);
    if (push(self->loop, Py_NewRef(handle)) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *queue_popleft(Queue *self, PyObject *ignored)
{
    PyObject *handle = pop(self->loop);
    if (handle == NULL) {
        PyErr_SetString(PyExc_IndexError, "nothing is ready");
        return NULL;
    }
    handle_release(Py_NewRef(handle));
    return handle;
}

static PyObject *queue_clear(Queue *self, PyObject *ignored)
{
    PyObject *handle;
    while ((handle = pop(self->loop)) != NULL)
        handle_release(handle);
    Py_RETURN_NONE;
}

static PyObject *queue_item(Queue *self, Py_ssize_t index)
{
    Turns *loop = self->loop;
    PyObject *handle = NULL;
    Py_BEGIN_CRITICAL_SECTION(loop);
    if (index >= 0 && (size_t)index < loop->count)
        handle = Py_NewRef(loop->ring[(loop->first + (size_t)index) & (loop->room - 1)]);
    Py_END_CRITICAL_SECTION();
    if (handle == NULL)
        PyErr_SetString(PyExc_IndexError, "nothing is ready there");
    return handle;
}

static PyObject *queue_iterate(Queue *self)
{
    PyObject *list = PyList_New(0), *iterator, *handle;
    for (Py_ssize_t n = 0; list != NULL && (handle = queue_item(self, n)) != NULL; n++) {
        if (PyList_Append(list, handle) < 0)
            Py_CLEAR(list);
        Py_DECREF(handle);
    }
    if (list != NULL)
        PyErr_Clear(); /* an IndexError: these were all */
    if (list == NULL)
        return NULL;
    iterator = PyObject_GetIter(list);
    Py_DECREF(list);
    return iterator;
}

static int queue_traverse(Queue *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->loop);
    return 0;
}

static void queue_dealloc(Queue *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Py_DECREF(self->loop);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyMethodDef queue_methods[] = {
    {"append", (PyCFunction)queue_append, METH_O, NULL},
    {"popleft", (PyCFunction)queue_popleft, METH_NOARGS, NULL},
    {"clear", (PyCFunction)queue_clear, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot queue_slots[] = {
    {Py_tp_dealloc, queue_dealloc},
    {Py_tp_traverse, queue_traverse}, /* and no clear: whoever refers to this has one, the loop first */
    {Py_tp_methods, queue_methods},
    {Py_tp_iter, queue_iterate},
    {Py_sq_length, queue_length},
    {Py_sq_item, queue_item},
    {0, NULL},
};

static PyType_Spec queue_spec = {
    .name = "iocp_loop._hot.ReadyQueue",
    .basicsize = sizeof(Queue),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = queue_slots,
};

static PyObject *get_ready(Turns *self, void *ignored)
{
    Queue *queue = PyObject_GC_New(Queue, Queue_type);
    if (queue == NULL)
        return NULL;
    queue->loop = (Turns *)Py_NewRef(self);
    PyObject_GC_Track(queue);
    return (PyObject *)queue;
}

/* A copy, in order, which is what heapq wants too: what is taken from it and put into the ready queue leaves the timers. */
static PyObject *get_scheduled(Turns *self, void *ignored) 
{
    return timers_list((PyObject *)self, &self->timers);
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

static PyObject *get_debug(Turns *self, void *ignored) { return PyBool_FromLong(self->debug); }

static int set_debug(Turns *self, PyObject *value, void *ignored)
{
    int debug = value == NULL ? 0 : PyObject_IsTrue(value);
    if (debug < 0)
        return -1;
    self->debug = (char)debug;
    return 0;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The type
 * ------------------------------------------------------------------------------------------------------------------ */

static int turns_traverse(Turns *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->driver);
    Py_VISIT(self->wait);
    Py_VISIT(self->dispatch);
    Py_VISIT(self->completions);
    Py_VISIT(self->select);
    Py_VISIT(self->task_factory);
    int stop = 0;
    for (size_t n = 0; !stop && n < self->count; n++)
        stop = handle_visit(self->ring[(self->first + n) & (self->room - 1)], visit, arg);
    for (size_t n = 0; !stop && n < self->timers.count; n++)
        stop = handle_visit(self->timers.heap[n].handle, visit, arg);
    return stop;
}

static int turns_clear(Turns *self)
{
    self->native = NULL;
    Py_CLEAR(self->driver);
    Py_CLEAR(self->wait);
    Py_CLEAR(self->dispatch);
    Py_CLEAR(self->task_factory);
    forget_everything(self);
    Py_CLEAR(self->completions);
    Py_CLEAR(self->select);
    return 0;
}

static void turns_dealloc(Turns *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    turns_clear(self);
    PyMem_Free(self->ring);
    PyMem_Free(self->timers.heap);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static char create_task_doc[400];

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
    /* The signature is that of the running Python; see add_turns. */
    {"create_task", (PyCFunction)(void (*)(void))turns_create_task, METH_FASTCALL | METH_KEYWORDS, create_task_doc},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef turns_members[] = {
    {"_closed", T_BOOL, offsetof(Turns, closed), 0, NULL},
    {"_waited", T_BOOL, offsetof(Turns, waited), 0, NULL},
    {"_select", T_OBJECT, offsetof(Turns, select), 0, NULL},
    {"_task_factory", T_OBJECT, offsetof(Turns, task_factory), 0, NULL},
    {"_clock_resolution", T_DOUBLE, offsetof(Turns, resolution), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef turns_getset[] = {
    {"_ready", (getter)get_ready, (setter)ignore, NULL, NULL},
    {"_scheduled", (getter)get_scheduled, (setter)ignore, NULL, NULL},
    {"_debug", (getter)get_debug, (setter)set_debug, NULL, NULL},
    {"_stopping", (getter)get_stopping, (setter)set_stopping, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot turns_slots[] = {
    {Py_tp_doc, (char *)"The ready queue, the timers and the turn of an event loop."},
    {Py_tp_new, PyType_GenericNew},
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

static PyObject *attribute(const char *module, const char *name)
{
    PyObject *from = PyImport_ImportModule(module);
    PyObject *found = from == NULL ? NULL : PyObject_GetAttrString(from, name);
    Py_XDECREF(from);
    return found;
}

/* Write the signature of BaseEventLoop.create_task, which has changed over the versions, where inspect looks for ours. */
static int describe_create_task(void)
{
    static const char start[] = "(self", text[] = "\n--\n\nRun a coroutine as a Task of this loop.";
    PyObject *function = attribute("inspect", "signature");
    PyObject *method = PyObject_GetAttr((PyObject *)create_task_method.type, create_task_method.name);
    PyObject *signature = method == NULL || function == NULL ? NULL : PyObject_CallOneArg(function, method);
    PyObject *written = signature == NULL ? NULL : PyObject_Str(signature);
    const char *parameters = written == NULL ? NULL : PyUnicode_AsUTF8(written);
    if (parameters != NULL && strncmp(parameters, start, sizeof start - 1) == 0)
        snprintf(create_task_doc, sizeof create_task_doc, "create_task($self%s%s", parameters + sizeof start - 1, text);
    Py_XDECREF(method);
    Py_XDECREF(function);
    Py_XDECREF(signature);
    Py_XDECREF(written);
    return parameters == NULL ? -1 : 0;
}

int add_turns(PyObject *module)
{
    futures = PyImport_ImportModule("asyncio.futures");
    tasks = PyImport_ImportModule("asyncio.tasks");
    future_name = PyUnicode_InternFromString("Future");
    task_name = PyUnicode_InternFromString("Task");
    PyObject *loop = PyUnicode_InternFromString("loop"), *name = PyUnicode_InternFromString("name");
    loop_keyword = Py_BuildValue("(O)", loop);
    loop_name_keywords = Py_BuildValue("(NN)", loop, name);
    if (futures == NULL || tasks == NULL || future_name == NULL || task_name == NULL || loop_keyword == NULL
        || loop_name_keywords == NULL || describe_create_task() < 0)
        return -1;
    threadsafe_type = attribute("asyncio.events", "_ThreadSafeHandle");
    PyErr_Clear();
    PyObject *time = PyImport_ImportModule("time");
    if (time == NULL)
        return -1;
    monotonic = PyObject_GetAttrString(time, "monotonic");
    Py_DECREF(time);
    Queue_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &queue_spec, NULL);
    Turns_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &turns_spec, NULL);
    if (monotonic == NULL || Queue_type == NULL || Turns_type == NULL)
        return -1;
    return PyModule_AddObjectRef(module, "Turns", (PyObject *)Turns_type);
}
