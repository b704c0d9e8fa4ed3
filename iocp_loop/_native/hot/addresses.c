/* The names of sockets, as the system gives them and as Python knows them; streams.h tells what each function does. */

#include "streams.h"

#include "calls.h"

#ifndef _WIN32
#include <sys/un.h>
#endif

PyObject *name_object(PyObject *raw)
{
    struct sockaddr_storage address = {0};
    size_t length = (size_t)PyBytes_GET_SIZE(raw);
    memcpy(&address, PyBytes_AS_STRING(raw), length);
#ifdef __linux__
    if (address.ss_family == AF_UNIX) {
        const char *path = ((struct sockaddr_un *)&address)->sun_path;
        size_t before = offsetof(struct sockaddr_un, sun_path);
        if (length > before && path[0] == 0) /* abstract */
            return PyBytes_FromStringAndSize(path, (Py_ssize_t)(length - before));
        return PyUnicode_DecodeFSDefault(length > before ? path : "");
    }
#endif
    return make_tuple(&address);
}

int is_name_known(PyObject *raw)
{
    struct sockaddr_storage address = {0};
    size_t length = (size_t)PyBytes_GET_SIZE(raw);
    if (length >= sizeof address)
        return 0;
    memcpy(&address, PyBytes_AS_STRING(raw), length);
#ifdef __linux__
    if (address.ss_family == AF_UNIX)
        return 1;
#endif
    return address.ss_family == AF_INET || address.ss_family == AF_INET6;
}

/* The name of the peer of a plain socket, or its own, as the system gives it: bytes; NULL if it gives none, or one that
 * name_object knows nothing of. */
PyObject *raw_name(PyObject *sock, int of_peer)
{
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    struct sockaddr *place = (struct sockaddr *)&address;
    descriptor fd = socket_descriptor(sock);
    if ((of_peer ? getpeername(fd, place, &length) : getsockname(fd, place, &length)) != 0 || length > sizeof address)
        return NULL;
    PyObject *raw = PyBytes_FromStringAndSize((char *)&address, (Py_ssize_t)length);
    if (raw != NULL && !is_name_known(raw))
        Py_CLEAR(raw);
    PyErr_Clear();
    return raw;
}

/* sock.METHOD(), getpeername or getsockname; None where it says nothing. */
PyObject *ask_for_name(const struct hot *hot, PyObject *sock, PyObject *method)
{
    PyObject *name = PyObject_CallMethodNoArgs(sock, method);
    if (name != NULL || !PyErr_ExceptionMatches(PyExc_OSError))
        return name;
    PyErr_Clear();
    Py_RETURN_NONE;
}
