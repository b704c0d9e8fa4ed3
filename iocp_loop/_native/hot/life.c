/*
 * The life of a stream transport as a table, and its steps (life.py).  The table is the same as LIFE there, entry by entry:
 * tests/test_life.py compares them.  It is asked when something happens to a transport, never for a message.
 *
 * The steps call each other, and no method of a class in Python above: SocketTransport refuses subclasses that replace them.
 */

#include "streams.h"

/* In this state, at this event: the next state, and what is done then. */
#define STEPS(STEP) \
    STEP(MADE, BEGIN, OPEN, tell_of_connection) \
    STEP(CLOSING, BEGIN, CLOSING, tell_of_connection) \
    STEP(LOST, BEGIN, LOST, tell_of_connection) \
    STEP(MADE, CLOSE, CLOSING, stop_receiving) \
    STEP(OPEN, CLOSE, CLOSING, stop_receiving) \
    STEP(MADE, LOSE, LOST, schedule_loss) \
    STEP(OPEN, LOSE, LOST, schedule_loss) \
    STEP(CLOSING, LOSE, LOST, schedule_loss) \
    STEP(LOST, TOLD, OVER, release) \
    STEP(OVER, LET_GO, CLOSED, close_handle)

enum event { BEGIN, CLOSE, LOSE, TOLD, LET_GO, EVENTS };

/* 0, or -1 with an exception.  The last argument is what the event brings, or NULL. */
static int tell_of_connection(const struct hot *hot, PyObject *self, PyObject *waiter);
static int stop_receiving(const struct hot *hot, PyObject *self, PyObject *ignored);
static int schedule_loss(const struct hot *hot, PyObject *self, PyObject *exception);
static int release(const struct hot *hot, PyObject *self, PyObject *ignored);
static int close_handle(const struct hot *hot, PyObject *self, PyObject *ignored);

struct step {
    enum life_state next;
    int (*act)(const struct hot *hot, PyObject *self, PyObject *argument); /* NULL: nothing changes */
};

#define ENTRY(state, event, next, act) [state][event] = {next, act},
static const struct step life[STATES][EVENTS] = {STEPS(ENTRY)};

#define NAMES_OF(state, event, next, act) {#state, #event, #next, "_" #act},
static const char *const names_of_steps[][4] = {STEPS(NAMES_OF)};

PyObject *life_steps(PyObject *module, PyObject *ignored)
{
    size_t count = sizeof names_of_steps / sizeof *names_of_steps;
    PyObject *steps = PyList_New((Py_ssize_t)count);
    for (size_t n = 0; steps != NULL && n < count; n++) {
        const char *const *names = names_of_steps[n];
        PyObject *step = Py_BuildValue("(ssss)", names[0], names[1], names[2], names[3]);
        if (step == NULL)
            Py_CLEAR(steps);
        else
            PyList_SET_ITEM(steps, (Py_ssize_t)n, step);
    }
    return steps;
}

/* Take the step of the table: 1 if there is one, 0 if not; -1 with an exception. */
static int happens(const struct hot *hot, PyObject *self, enum event event, PyObject *argument)
{
    struct stream *stream = stream_of(self);
    const struct step *step = &life[(int)stream->state][event];
    if (step->act == NULL)
        return 0;
    stream->state = (char)step->next;
    return step->act(hot, self, argument) < 0 ? -1 : 1;
}

/* NULL with an exception also if there is no life. */
static const struct hot *hot_of_life(PyObject *self)
{
    if (stream_of(self)->state != UNMADE)
        return hot_of_stream(self);
    PyErr_SetString(PyExc_AttributeError, "_state");
    return NULL;
}

/* `happens`, for a method of the type. */
static PyObject *let_happen(PyObject *self, enum event event, PyObject *argument)
{
    const struct hot *hot = hot_of_life(self);
    if (hot == NULL || happens(hot, self, event, argument) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* self._proactor.METHOD(argument), or without `argument`. */
static PyObject *ask_proactor(PyObject *self, PyObject *method, PyObject *argument)
{
    PyObject *proactor = take_field(self, &stream_of(self)->proactor, "_proactor"), *done;
    if (proactor == NULL)
        return NULL;
    done = argument == NULL ? PyObject_CallMethodNoArgs(proactor, method) : PyObject_CallMethodOneArg(proactor, method, argument);
    Py_DECREF(proactor);
    return done;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The beginning
 * ------------------------------------------------------------------------------------------------------------------ */

/* waiter.METHOD(value), unless there is none or it is done. */
static int tell_waiter(const struct hot *hot, PyObject *waiter, PyObject *method, PyObject *value)
{
    if (waiter == Py_None)
        return 0;
    PyObject *done = PyObject_CallMethodNoArgs(waiter, hot->names.done);
    int is_done = done == NULL ? -1 : PyObject_IsTrue(done);
    Py_XDECREF(done);
    return is_done ? (is_done < 0 ? -1 : 0) : done_with(PyObject_CallMethodOneArg(waiter, method, value));
}

static int start(const struct hot *hot, PyObject *self)
{
    const struct stream *stream = stream_of(self);
    return is_none(stream->receive) && stream->state < CLOSING && !stream->paused ? arm_receive(hot, self) : 0;
}

static int tell_of_connection(const struct hot *hot, PyObject *self, PyObject *waiter)
{
    PyObject *protocol = take_field(self, &stream_of(self)->protocol, "_protocol"), *error;
    int failed = protocol == NULL ? -1 : done_with(PyObject_CallMethodOneArg(protocol, hot->names.connection_made, self));
    Py_XDECREF(protocol);
    if (!failed && !start(hot, self))
        return tell_waiter(hot, waiter, hot->names.set_result, Py_None);
    if (ends_the_loop())
        return -1;
    error = take_exception();
    PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    failed = fail(self, "_fatal_error", "Fatal error: protocol.connection_made() call failed.");
    if (!failed)
        failed = tell_waiter(hot, waiter, hot->names.set_exception, error);
    Py_DECREF(error);
    return failed;
}

PyObject *stream_begin(PyObject *self, PyObject *waiter) { return let_happen(self, BEGIN, waiter); }

/* ---------------------------------------------------------------------------------------------------------------------
 * The end
 * ------------------------------------------------------------------------------------------------------------------ */

/* Whether `op`, a receive, has been asked to end. */
static int is_cancelling(const struct hot *hot, PyObject *op)
{
    return (PyObject *)Py_TYPE(op) == hot->kinds.receive_stream && SLOT(op, hot->operation.state) == hot->states.cancelling;
}

static int stop_receiving(const struct hot *hot, PyObject *self, PyObject *ignored)
{
    struct stream *stream = stream_of(self);
    put_reference(self, &stream->held, PyTuple_New(0));
    if (is_none(stream->receive) || is_cancelling(hot, stream->receive))
        return 0;
    PyObject *receive = take_field(self, &stream->receive, "_receive");
    PyObject *done = receive == NULL ? NULL : ask_proactor(self, hot->names.drop, receive);
    if (done == Py_True)
        put_reference(self, &stream->receive, Py_NewRef(Py_None));
    else if (done != NULL) {
        Py_SETREF(done, PyObject_CallMethodNoArgs(self, hot->names.choose_receiver));
        if (done != NULL)
            Py_SETREF(done, ask_proactor(self, hot->names.cancel, receive));
    }
    Py_XDECREF(receive);
    return done_with(done);
}

PyObject *stream_stop_receiving(PyObject *self, PyObject *ignored)
{
    const struct hot *hot = hot_of_stream(self);
    if (hot == NULL || stop_receiving(hot, self, NULL) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* Drop what is queued, and ask for the end of all that is in flight. */
static int stop(const struct hot *hot, PyObject *self)
{
    struct stream *stream = stream_of(self);
    stream->direct = 0;
    stream->queued = 0;
    if (!is_none(stream->queue))
        put_reference(self, &stream->queue, Py_NewRef(Py_None));
    if (!is_none(stream->sending)) {
        PyObject *sending = take_field(self, &stream->sending, "_sending");
        int failed = sending == NULL ? -1 : done_with(ask_proactor(self, hot->names.cancel, sending));
        Py_XDECREF(sending);
        if (failed)
            return -1;
    }
    if (stop_receiving(hot, self, NULL) < 0)
        return -1;
    return is_none(stream->file) ? 0 : done_with(PyObject_CallMethodNoArgs(self, hot->names.fail_file));
}

/* Steps that are taken all, whichever fails.  The exception that is on its way after one, which follows upon `error`, that of
 * an earlier one (taken over), or NULL. */
static PyObject *error_after(PyObject *error, int failed)
{
    if (!failed)
        return error;
    PyObject *later = take_exception();
    if (error != NULL)
        PyException_SetContext(later, error);
    return later;
}

/* After the last of them: 0, or -1 with `error`, which is taken over. */
static int raise_error(PyObject *error)
{
    if (error == NULL)
        return 0;
    PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_DECREF(error);
    return -1;
}

static int schedule_loss(const struct hot *hot, PyObject *self, PyObject *exception)
{
    PyObject *error = error_after(NULL, stop(hot, self) < 0);
    return raise_error(error_after(error, call_end_soon(hot, self, hot->names.call_connection_lost, exception) < 0));
}

PyObject *stream_lose_connection(PyObject *self, PyObject *exception) { return let_happen(self, LOSE, exception); }

PyObject *stream_close(PyObject *self, PyObject *ignored)
{
    const struct hot *hot = hot_of_life(self);
    if (hot == NULL)
        return NULL;
    int taken = happens(hot, self, CLOSE, NULL);
    if (taken > 0 && is_none(stream_of(self)->sending))
        taken = happens(hot, self, LOSE, Py_None);
    if (taken < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* Whether an operation, or None, is in flight; -1 with an exception. */
static int is_in_flight(const struct hot *hot, PyObject *op)
{
    if (is_none(op))
        return 0;
    PyObject *kind = (PyObject *)Py_TYPE(op);
    if (kind == hot->kinds.receive_stream || kind == hot->kinds.send_all) {
        PyObject *state = SLOT(op, hot->operation.state);
        return state == hot->states.in_flight || state == hot->states.cancelling;
    }
    PyObject *answer = PyObject_GetAttr(op, hot->names.in_flight);
    int in_flight = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    return in_flight;
}

/* After `stop`: whether nothing is in flight any more, or it has to be let go of; -1 with an exception. */
static int may_be_closed(const struct hot *hot, PyObject *self)
{
    const struct stream *stream = stream_of(self);
    int receiving = is_in_flight(hot, stream->receive), sending = receiving < 0 ? -1 : is_in_flight(hot, stream->sending);
    if (sending < 0 || (!receiving && !sending))
        return sending < 0 ? -1 : 1;
    PyObject *gone = ask_proactor(self, hot->names.let_go, NULL);
    int let_go = gone == NULL ? -1 : PyObject_IsTrue(gone);
    Py_XDECREF(gone);
    return let_go;
}

static int release(const struct hot *hot, PyObject *self, PyObject *ignored)
{
    if (stream_of(self)->state != OVER)
        return 0;
    int may = may_be_closed(hot, self);
    return may > 0 ? happens(hot, self, LET_GO, NULL) : may;
}

PyObject *stream_release(PyObject *self, PyObject *ignored)
{
    const struct hot *hot = hot_of_life(self);
    if (hot == NULL || release(hot, self, NULL) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static int close_handle(const struct hot *hot, PyObject *self, PyObject *ignored)
{
    PyObject *sock = take_field(self, &stream_of(self)->sock, "_sock");
    int failed = sock == NULL ? -1 : leave_table_and_close(hot, self, sock);
    Py_XDECREF(sock);
    return failed;
}

PyObject *stream_call_connection_lost(PyObject *self, PyObject *exception)
{
    const struct hot *hot = hot_of_stream(self);
    if (hot == NULL)
        return NULL;
    struct stream *stream = stream_of(self);
    PyObject *protocol = take_field(self, &stream->protocol, "_protocol"), *error;
    error = error_after(NULL, protocol == NULL
                                  || done_with(PyObject_CallMethodOneArg(protocol, hot->names.connection_lost, exception)) < 0);
    Py_XDECREF(protocol);
    /* It may keep the transport, and then only the collector would free the two. */
    put_reference(self, &stream->protocol, Py_NewRef(Py_None));
    error = error_after(error, happens(hot, self, TOLD, NULL) < 0);
    error = error_after(error, leave_server(hot, self) < 0);
    if (raise_error(error) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* Before it is freed: nobody has closed it. */
void stream_finalize(PyObject *self)
{
    if (stream_of(self)->state == UNMADE || stream_of(self)->state >= OVER)
        return;
    PyObject *error = PyErr_Occurred() ? take_exception() : NULL;
    if (done_with(PyObject_CallMethod(self, "_end_unclosed", NULL)) < 0)
        PyErr_WriteUnraisable(self);
    if (error != NULL) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
}
