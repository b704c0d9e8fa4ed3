/* Accepting: one connection from a listener, and what becomes of it (accepting.c). */
#ifndef IOCP_LOOP_ACCEPTING_H
#define IOCP_LOOP_ACCEPTING_H

#include "hot.h"

#ifdef __linux__
/* accept(listener): as its method accept, by accept4, and the socket is non-blocking; None if the listener is not a
 * plain one, for the way in Python. */
PyObject *accept_connection(PyObject *module, PyObject *listener);

/* Accept once for the AcceptStream `op`, whose listener is a plain socket, and deliver the connection at once. */
enum accepted {
    ACCEPTED,
    NONE_LEFT,  /* just now */
    ABORTED,    /* it was gone before it was accepted */
    UNHEARD,    /* with an exception: of who was told of the connection */
    NOT_ACCEPTED /* with an exception: of accepting */
};
enum accepted accept_for_stream(struct hot *hot, PyObject *op);
#endif

int add_accepting(struct hot *hot);

#endif
