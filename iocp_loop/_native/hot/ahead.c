/*
 * Looking ahead: fetching into the processor's caches what the next messages will touch.
 *
 * With thousands of busy connections nothing of a connection is in the caches any more when its turn comes, and a message
 * touches some ten of its objects, each found through the one before: the operation, what that is to call, the transport,
 * the socket, the protocol, the context.  To wait for one after the other would take longer than all else that is done for
 * a message outside the kernel.  So a driver hands over a few operations that it is about to complete, and the way is
 * gone for all of them at once, a step at a time: the processor fetches side by side what it would fetch in a row.
 *
 * Nothing is changed or kept here, and no Python runs: an object that was reached stays until look_ahead is over.  Where
 * the way leads to something else than a stream transport's own method, it ends.
 */

#include "streams.h"

#ifdef __linux__

/* The transport whose method this `complete` is, or NULL; borrowed. */
static PyObject *transport_behind(PyObject *complete)
{
    if (complete == NULL || !PyCFunction_CheckExact(complete))
        return NULL;
    PyObject *self = PyCFunction_GET_SELF(complete);
    return self != NULL && is_stream(self) ? self : NULL;
}

void look_ahead(const struct hot *hot, PyObject *const *ops, int count)
{
    PyObject *transports[AHEAD]; /* borrowed */
    size_t size = (size_t)((PyTypeObject *)hot->kinds.receive_stream)->tp_basicsize;
    for (int n = 0; n < count; n++)
        fetch(ops[n], size);
    for (int n = 0; n < count; n++)
        if (SLOT(ops[n], hot->operation.complete) != NULL)
            fetch(SLOT(ops[n], hot->operation.complete), sizeof(PyCFunctionObject));
    for (int n = 0; n < count; n++) {
        PyObject *complete = SLOT(ops[n], hot->operation.complete);
        if (complete != NULL && PyCFunction_CheckExact(complete) && PyCFunction_GET_SELF(complete) != NULL)
            fetch_stream(hot, PyCFunction_GET_SELF(complete));
    }
    for (int n = 0; n < count; n++) {
        transports[n] = transport_behind(SLOT(ops[n], hot->operation.complete));
        if (transports[n] != NULL)
            fetch_stream_parts(hot, transports[n]);
    }
}

#endif
