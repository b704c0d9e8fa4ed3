/* Connecting a socket of the Internet to an address that is plain: what methods/sockets.py does, without its exceptions. */

#include "connecting.h"

#include "calls.h"

#ifdef __linux__

/* Connect, or ask what has become of it: 0, or the error. */
static int try_to_connect(descriptor fd, PyObject *structure)
{
    const struct sockaddr *address = (const struct sockaddr *)PyBytes_AS_STRING(structure);
    return connect(fd, address, (socklen_t)PyBytes_GET_SIZE(structure)) == 0 ? 0 : errno;
}

static int has_begun(int code) { return code == EINPROGRESS || code == EALREADY || code == EINTR; }

/* The first call begins.  The second tells what has become of it: the answer of the own machine comes within the first, but
 * after it was decided what that returns. */
static PyObject *connect_to(PyObject *sock, PyObject *address, PyObject *structure)
{
    if (PySys_Audit("socket.connect", "OO", sock, address) < 0)
        return NULL;
    int code = try_to_connect(socket_descriptor(sock), structure);
    if (code == 0)
        Py_RETURN_TRUE;
    if (!has_begun(code)) { /* EAGAIN as well: no port is left */
        errno = code;
        return raise_last_error();
    }
    code = try_to_connect(socket_descriptor(sock), structure);
    if (code == 0 || code == EISCONN)
        Py_RETURN_TRUE;
    if (has_begun(code) || code == EAGAIN)
        Py_RETURN_FALSE;
    return PyLong_FromLong(code);
}

PyObject *connect_now(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    struct hot *hot = hot_in(module);
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "connect() takes a socket and an address");
        return NULL;
    }
    int plain = is_socket(hot, args[0]) && is_internet_socket(args[0]) && is_nonblocking(args[0]) && PyTuple_CheckExact(args[1]);
    PyObject *structure = plain ? structure_of(hot, socket_family(args[0]), args[1]) : NULL;
    if (structure == NULL)
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    PyObject *done = connect_to(args[0], args[1], structure);
    Py_DECREF(structure);
    return done;
}

#endif
