/* Connecting (connecting.c). */
#ifndef IOCP_LOOP_HOT_CONNECTING_H
#define IOCP_LOOP_HOT_CONNECTING_H

#include "hot.h"

#ifdef __linux__
/* connect(sock, address): True if `sock` is connected, as it is on the own machine; False if that has begun; the number of the
 * error that ended it after it had begun; None if socket or address are not plain, for the way in Python.  OSError if the system
 * refuses it outright. */
PyObject *connect_now(PyObject *module, PyObject *const *args, Py_ssize_t count);
#endif

#endif
