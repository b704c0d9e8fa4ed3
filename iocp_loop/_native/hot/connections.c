/*
 * Making connections: accepting one (ports/driver.py).
 */

#define _GNU_SOURCE /* accept4 */
#include "calls.h"

#ifdef HAS_ACCEPT

#include <stddef.h>

#ifdef _WIN32

static void close_descriptor(descriptor fd) { closesocket(fd); }

static int make_nonblocking(descriptor fd)
{
    u_long yes = 1;
    return ioctlsocket(fd, FIONBIO, &yes);
}

/* A connection that waits, non-blocking and not for child processes; NO_DESCRIPTOR with the system's error. */
static descriptor accept_one(descriptor listener, struct sockaddr_storage *address, socklen_t *length)
{
    descriptor fd = accept(listener, (struct sockaddr *)address, length);
    if (fd == NO_DESCRIPTOR)
        return fd;
    if (SetHandleInformation((HANDLE)fd, HANDLE_FLAG_INHERIT, 0) && make_nonblocking(fd) == 0)
        return fd;
    int error = last_error(); /* of either: Winsock's errors are the thread's last error too */
    close_descriptor(fd);
    set_last_error(error);
    return NO_DESCRIPTOR;
}

static int is_unnamed(const struct sockaddr_storage *address, socklen_t length) { return 0; }

#else

#include <sys/un.h>
#include <unistd.h>

static void close_descriptor(descriptor fd) { close(fd); }

static descriptor accept_one(descriptor listener, struct sockaddr_storage *address, socklen_t *length)
{
    return accept4(listener, (struct sockaddr *)address, length, SOCK_NONBLOCK | SOCK_CLOEXEC);
}

static int is_unnamed(const struct sockaddr_storage *address, socklen_t length)
{
    return address->ss_family == AF_UNIX && length <= offsetof(struct sockaddr_un, sun_path);
}

#endif

/* The address that came with the connection, as the socket module puts it; of the rare ones `sock` is asked. */
static PyObject *name_of_peer(PyObject *sock, const struct sockaddr_storage *address, socklen_t length)
{
    if (is_unnamed(address, length))
        return PyUnicode_New(0, 0);
    PyObject *name = make_tuple(address);
    return name == NULL && !PyErr_Occurred() ? PyObject_CallMethod(sock, "getpeername", NULL) : name;
}

/* accept(listener): as its method accept, and the socket is non-blocking; None if the listener is not a plain one, for the
 * way in Python. */
PyObject *accept_connection(PyObject *module, PyObject *listener)
{
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    if (!is_socket(listener) || !is_stream_socket(listener) || !never_waits(listener))
        Py_RETURN_NONE;
    descriptor fd = accept_one(socket_descriptor(listener), &address, &length);
    if (fd == NO_DESCRIPTOR)
        return would_wait() ? raise_would_wait() : raise_last_error();
    PyObject *sock = make_stream_socket(listener, fd);
    if (sock == NULL) {
        close_descriptor(fd);
        return NULL;
    }
    PyObject *name = name_of_peer(sock, &address, length);
    if (name == NULL) {
        Py_DECREF(sock);
        return NULL;
    }
    return Py_BuildValue("NN", sock, name);
}

#ifdef _WIN32

/* adopt(listener, descriptor): the object for a connection that the kernel has accepted, non-blocking from now on; None if
 * the listener is not a plain one. */
PyObject *adopt_connection(PyObject *module, PyObject *args)
{
    PyObject *listener;
    unsigned long long fd;
    if (!PyArg_ParseTuple(args, "OK", &listener, &fd))
        return NULL;
    if (!is_socket(listener) || !is_stream_socket(listener))
        Py_RETURN_NONE;
    return make_nonblocking((descriptor)fd) == 0 ? make_stream_socket(listener, (descriptor)fd) : raise_last_error();
}

#endif

#endif
