/*
 * Making connections: accepting one (ports/poll/driver.py).
 */

#define _GNU_SOURCE /* accept4 */
#include "hot.h"

#ifdef __linux__

#include <errno.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* The address that accept4 gave, as the socket module puts it; of the rare ones `sock`, the connection, is asked. */
static PyObject *name_of_peer(PyObject *sock, const struct sockaddr_storage *address, socklen_t length)
{
    if (address->ss_family == AF_UNIX && length <= offsetof(struct sockaddr_un, sun_path))
        return PyUnicode_New(0, 0);
    PyObject *name = address->ss_family == AF_UNIX ? NULL : make_tuple(address);
    return name == NULL && !PyErr_Occurred() ? PyObject_CallMethod(sock, "getpeername", NULL) : name;
}

/* accept(listener): as its method accept, by accept4, and the socket is non-blocking; None if the listener is not a
 * plain one, for the way in Python. */
PyObject *accept_connection(PyObject *module, PyObject *listener)
{
    struct hot *hot = hot_in(module);
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    if (!is_socket(hot, listener) || !is_stream_socket(listener))
        Py_RETURN_NONE;
    int fd = accept4(socket_descriptor(listener), (struct sockaddr *)&address, &length, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    PyObject *sock = make_stream_socket(hot, listener, fd);
    if (sock == NULL) {
        close(fd);
        return NULL;
    }
    PyObject *name = name_of_peer(sock, &address, length);
    if (name == NULL) {
        Py_DECREF(sock);
        return NULL;
    }
    return Py_BuildValue("NN", sock, name);
}

#endif
