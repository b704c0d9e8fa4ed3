/* The waits of sock_recv, as the driver that carries them out sees them (sockets.c). */
#ifndef IOCP_LOOP_SOCKETS_H
#define IOCP_LOOP_SOCKETS_H

#include "driver.h"

/* What there is to receive for `op`, a Receive that waits: bytes, or None if there is nothing just now. */
PyObject *receive_for(struct hot *hot, PyObject *op);
/* What receive_for has brought for `op`, as its completion: data, or the exception that is set, which is taken over
 * unless it ends the loop. */
int deliver_received(Driver *driver, PyObject *op, PyObject *data);
PyObject *make_socket_calls(PyObject *module, PyObject *args);
int add_sockets(struct hot *hot);

#endif
