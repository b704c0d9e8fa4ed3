/*
 * The submissions of driver iocp, for its native turn: what is known of their classes, the slots that they borrow, how they are
 * given back, and how an operation is told.  Their counterpart in Python is ports/iocp/requests.py.
 */

#include "iocp.h"

#ifdef _WIN32

/* _use_requests(Submission, Association, SlotPool, nobody, size of a slot, addresses of the functions) */
PyObject *iocp_use_requests(PyObject *turns, PyObject *args)
{
    static const struct slot_place of_submission[] = {PLACE(iocp, address), PLACE(iocp, armed), PLACE(iocp, association),
                                                      PLACE(iocp, finish), PLACE(iocp, keep), PLACE(iocp, op),
                                                      PLACE(iocp, slot)};
    static const struct slot_place of_association[] = {PLACE(iocp, emulated), PLACE(iocp, handle), PLACE(iocp, reading),
                                                       PLACE(iocp, skips), PLACE(iocp, small), PLACE(iocp, writing)};
    static const struct slot_place of_pool[] = {PLACE(iocp, free)};
    struct hot *hot = driver_hot((PyTypeObject *)turns);
    PyObject *submission, *association, *pool, *nobody;
    unsigned long long functions[3];
    if (!PyArg_ParseTuple(args, "OOOOn(KKK)", &submission, &association, &pool, &nobody, &hot->iocp.slot_size,
                          &functions[0], &functions[1], &functions[2]))
        return NULL;
    hot->iocp_functions.wait = (long (*)(iocp_port *, long long))(uintptr_t)functions[0];
    hot->iocp_functions.receive = (request_function)(uintptr_t)functions[1];
    hot->iocp_functions.receive_from = (request_function)(uintptr_t)functions[2];
    if (FIND_SLOTS(hot, submission, of_submission) < 0 || FIND_SLOTS(hot, association, of_association) < 0
        || FIND_SLOTS(hot, pool, of_pool) < 0)
        return NULL;
    Py_XSETREF(hot->kinds.submission, Py_NewRef(submission));
    Py_XSETREF(hot->nobody, Py_NewRef(nobody));
    Py_RETURN_NONE;
}

/* self._at_once.append((sub, count, code)): for the next dispatch. */
int iocp_add_at_once(IocpTurns *self, PyObject *sub, unsigned long count, long code)
{
    struct hot *hot = self->driver.hot;
    PyObject *entry = Py_BuildValue("(Okl)", sub, count, code);
    PyObject *done = entry == NULL ? NULL : PyObject_CallMethodOneArg(self->at_once, hot->names.append, entry);
    Py_XDECREF(entry);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* A slot of the pool, or None if all are lent. */
PyObject *iocp_take_slot(IocpTurns *self)
{
    struct hot *hot = self->driver.hot;
    PyObject *list = SLOT(self->slots, hot->iocp.free); /* borrowed */
    Py_ssize_t count = list == NULL ? 0 : PyList_GET_SIZE(list);
    if (count == 0) /* the pool may make some more */
        return PyObject_CallMethodNoArgs(self->slots, hot->names.take);
    PyObject *slot = Py_NewRef(PyList_GET_ITEM(list, count - 1));
    if (PyList_SetSlice(list, count - 1, count, NULL) < 0)
        Py_CLEAR(slot);
    return slot;
}

/* The slot of `sub` may be lent again.  Back in the list before it leaves the submission: it always has an owner. */
int iocp_give_slot_back(IocpTurns *self, PyObject *sub)
{
    struct hot *hot = self->driver.hot;
    if (PyList_Append(SLOT(self->slots, hot->iocp.free), SLOT(sub, hot->iocp.slot)) < 0)
        return -1;
    set_slot(sub, hot->iocp.slot, Py_None);
    return 0;
}

/* The `count` bytes in the slot of `sub`, which is given back. */
PyObject *iocp_take_from_slot(IocpTurns *self, PyObject *sub, Py_ssize_t count)
{
    struct hot *hot = self->driver.hot;
    PyObject *data = PyBytes_FromStringAndSize(address_of_slot(SLOT(sub, hot->iocp.slot)), count);
    if (data == NULL || iocp_give_slot_back(self, sub) < 0)
        Py_CLEAR(data);
    else
        expect(hot, sub, count);
    return data;
}

/* As _give_back of the driver, for a submission without a slot, an event or a wait. */
int iocp_give_back(IocpTurns *self, PyObject *sub)
{
    struct hot *hot = self->driver.hot;
    set_slot(sub, hot->iocp.op, Py_None);
    set_slot(sub, hot->iocp.association, Py_None);
    set_slot(sub, hot->iocp.keep, Py_None);
    set_slot(sub, hot->iocp.finish, hot->nobody);
    return PyList_Append(self->spare, sub);
}

/* op.complete(value, None).  Takes `value` over, which may be NULL with an exception. */
int iocp_complete(IocpTurns *self, PyObject *op, PyObject *value)
{
    int failed = value == NULL ? -1 : complete_operation(self->driver.hot, op, value, Py_None);
    self->driver.completions++;
    Py_XDECREF(value);
    return failed;
}

/* self._end_with(sub, value, None); with NULL, with the exception that is set. */
int iocp_end_stream(IocpTurns *self, PyObject *sub, PyObject *value)
{
    struct hot *hot = self->driver.hot;
    PyObject *error = value == NULL ? take_exception() : Py_NewRef(Py_None);
    PyObject *done = PyObject_CallMethodObjArgs((PyObject *)self, hot->names.end_with, sub, value == NULL ? Py_None : value,
                                                error, NULL);
    Py_XDECREF(error);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

#endif
