/*
 * Datagrams of the Internet: receiving a few at a time for a stream, and sending one.
 *
 * Half of what a datagram costs in Python is its address: made from the system's structure when it comes, parsed into it
 * when it goes.  The peers of an endpoint are few beside their datagrams, so both are looked up in a table instead.
 */

#include "calls.h"

/* The tables, hot->tuples and hot->structures: what the system writes -> the tuple, and back.  Emptied when they have grown
 * to this, perhaps by another thread, so that what is found in them is taken with a reference. */
enum { MOST_ADDRESSES = 4096 };

enum { LARGEST = 64 * 1024 }; /* no datagram of the Internet is larger */

static int put(PyObject *table, PyObject *key, PyObject *value)
{
    if (PyDict_GET_SIZE(table) >= MOST_ADDRESSES)
        PyDict_Clear(table);
    return PyDict_SetItem(table, key, value);
}

/* The address as the socket module puts it; NULL without an exception for a family that is not the Internet's. */
PyObject *make_tuple(const struct sockaddr_storage *address)
{
    char host[INET6_ADDRSTRLEN];
    if (address->ss_family == AF_INET) {
        const struct sockaddr_in *four = (const struct sockaddr_in *)address;
        const unsigned char *part = (const unsigned char *)&four->sin_addr;
        snprintf(host, sizeof host, "%u.%u.%u.%u", part[0], part[1], part[2], part[3]);
        part = (const unsigned char *)&four->sin_port; /* by hand: functions for this are calls into Windows */
        return Py_BuildValue("si", host, part[0] << 8 | part[1]);
    }
    if (address->ss_family == AF_INET6) {
        const struct sockaddr_in6 *six = (const struct sockaddr_in6 *)address;
        inet_ntop(AF_INET6, &six->sin6_addr, host, sizeof host);
        return Py_BuildValue("siII", host, ntohs(six->sin6_port), (unsigned)ntohl(six->sin6_flowinfo),
                             (unsigned)six->sin6_scope_id);
    }
    return NULL;
}

PyObject *tuple_of(struct hot *hot, const struct sockaddr_storage *address, Py_ssize_t length)
{
    if (length == 0) /* it came over a connection */
        Py_RETURN_NONE;
    PyObject *key = PyBytes_FromStringAndSize((const char *)address, length);
    PyObject *tuple = key == NULL ? NULL : find(hot->tuples, key);
    if (tuple == NULL && key != NULL && !PyErr_Occurred()) {
        tuple = make_tuple(address);
        if (tuple != NULL && put(hot->tuples, key, tuple) < 0)
            Py_CLEAR(tuple);
        else if (tuple == NULL && !PyErr_Occurred())
            PyErr_Format(PyExc_OSError, "a datagram came from an address of family %d", address->ss_family);
    }
    Py_XDECREF(key);
    return tuple;
}

/* Parse (host, port) or (host, port, flow information, scope) with a numeric host into what the system takes: a bytes
 * object, or NULL without an exception if it is not that plain. */
static PyObject *make_structure(int family, PyObject *tuple)
{
    struct sockaddr_storage address;
    Py_ssize_t count = PyTuple_GET_SIZE(tuple);
    long long numbers[3] = {0, 0, 0};
    if (count < 2 || count > (family == AF_INET ? 2 : 4) || !PyUnicode_CheckExact(PyTuple_GET_ITEM(tuple, 0)))
        return NULL;
    for (Py_ssize_t n = 1; n < count; n++) {
        if (!PyLong_CheckExact(PyTuple_GET_ITEM(tuple, n)))
            return NULL;
        numbers[n - 1] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, n));
        if (numbers[n - 1] < 0 || numbers[n - 1] > (n == 1 ? 0xFFFFLL : n == 2 ? 0xFFFFFLL : 0xFFFFFFFFLL)) {
            PyErr_Clear();
            return NULL;
        }
    }
    Py_ssize_t length;
    const char *host = PyUnicode_AsUTF8AndSize(PyTuple_GET_ITEM(tuple, 0), &length);
    if (host == NULL || strlen(host) != (size_t)length) {
        PyErr_Clear();
        return NULL;
    }
    memset(&address, 0, sizeof address);
    ((struct sockaddr *)&address)->sa_family = (unsigned short)family;
    if (family == AF_INET) {
        struct sockaddr_in *four = (struct sockaddr_in *)&address;
        four->sin_port = htons((uint16_t)numbers[0]);
        if (inet_pton(AF_INET, host, &four->sin_addr) != 1)
            return NULL;
        return PyBytes_FromStringAndSize((char *)&address, sizeof *four);
    }
    struct sockaddr_in6 *six = (struct sockaddr_in6 *)&address;
    six->sin6_port = htons((uint16_t)numbers[0]);
    six->sin6_flowinfo = htonl((uint32_t)numbers[1]);
    six->sin6_scope_id = (uint32_t)numbers[2];
    if (inet_pton(AF_INET6, host, &six->sin6_addr) != 1)
        return NULL;
    return PyBytes_FromStringAndSize((char *)&address, sizeof *six);
}

/* Whether what is equal to `tuple` is the same address: 80.0 and True are equal to ports too, and none. */
static int is_literal(PyObject *tuple)
{
    for (Py_ssize_t n = 0; n < PyTuple_GET_SIZE(tuple); n++)
        if (!PyUnicode_CheckExact(PyTuple_GET_ITEM(tuple, n)) && !PyLong_CheckExact(PyTuple_GET_ITEM(tuple, n)))
            return 0;
    return 1;
}

/* As make_structure, by way of the table. */
PyObject *structure_of(struct hot *hot, int family, PyObject *tuple)
{
    if (!is_literal(tuple))
        return NULL;
    PyObject *structure = find(hot->structures, tuple);
    if (structure != NULL && ((const struct sockaddr *)PyBytes_AS_STRING(structure))->sa_family == family)
        return structure;
    if (structure == NULL && PyErr_Occurred())
        return NULL;
    Py_XSETREF(structure, make_structure(family, tuple));
    if (structure != NULL && put(hot->structures, tuple, structure) < 0)
        Py_CLEAR(structure);
    return structure;
}

/* How much of a datagram `op` takes, as far as there is room; -1 if its size is not plain. */
static Py_ssize_t size_wanted(const struct hot *hot, PyObject *op)
{
    PyObject *size = SLOT(op, hot->operation.from_size); /* borrowed */
    Py_ssize_t wanted = size != NULL && PyLong_CheckExact(size) ? PyLong_AsSsize_t(size) : -1;
    if (wanted < 0)
        PyErr_Clear();
    return wanted < LARGEST ? wanted : LARGEST;
}

/* One datagram, (bytes, address).  None if there is none just now. */
static PyObject *receive_one(struct hot *hot, PyObject *sock, size_t wanted)
{
    struct sockaddr_storage from;
    socklen_t length = sizeof from;
    char *memory = scratch(hot);
    if (memory == NULL)
        return NULL;
    Py_ssize_t size = recvfrom(socket_descriptor(sock), memory, CALL_SIZE(wanted), MSG_DONTWAIT, (struct sockaddr *)&from,
                               &length);
    if (size < 0)
        return would_wait() ? Py_NewRef(Py_None) : raise_last_error();
    PyObject *data = PyBytes_FromStringAndSize(memory, size);
    PyObject *address = data == NULL ? NULL : tuple_of(hot, &from, (Py_ssize_t)length);
    PyObject *value = address == NULL ? NULL : PyTuple_Pack(2, data, address);
    Py_XDECREF(data);
    Py_XDECREF(address);
    return value;
}

int receive_datagrams_for(struct hot *hot, PyObject *driver, PyObject *op, int most)
{
    int count = 0;
    for (; count < most && SLOT(op, hot->operation.from_paused) != Py_True
           && SLOT(op, hot->operation.state) == hot->states.in_flight;
         count++) {
        PyObject *sock = SLOT(op, hot->operation.handle); /* borrowed */
        Py_ssize_t wanted = size_wanted(hot, op);
        if (sock == NULL || !is_socket(hot, sock) || !never_waits(hot, sock) || wanted < 0)
            return NOT_PLAIN;
        PyObject *value = receive_one(hot, sock, (size_t)wanted);
        int failed = value == NULL
                     || (value != Py_None && complete_operation(hot, op, value, Py_None) < 0
                         && fail(driver, "report", COMPLETE_FAILED) < 0);
        int none = value == Py_None;
        Py_XDECREF(value);
        if (failed)
            return -1;
        if (none)
            break;
    }
    return count;
}

/* receive_datagrams(driver, op, most): receive for a ReceiveFromStream what there is, up to `most` datagrams, and deliver each.
 * The number of them; None if its socket or size is not a plain one, for the way in Python.  OSError if receiving fails. */
PyObject *receive_datagrams(PyObject *module, PyObject *args)
{
    struct hot *hot = hot_in(module);
    PyObject *driver, *op;
    int most;
    if (!PyArg_ParseTuple(args, "OOi", &driver, &op, &most))
        return NULL;
    if ((PyObject *)Py_TYPE(op) != hot->kinds.receive_from_stream) {
        PyErr_SetString(PyExc_TypeError, "receive_datagrams() takes a ReceiveFromStream");
        return NULL;
    }
    int count = receive_datagrams_for(hot, driver, op, most);
    if (count == NOT_PLAIN)
        Py_RETURN_NONE;
    return count < 0 ? NULL : PyLong_FromLong(count);
}

/* receive_datagram(sock, size): (bytes, address), or False if there is nothing just now, None if the socket or the size is not
 * plain, for the way in Python.  OSError if receiving fails. */
PyObject *receive_datagram_now(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "receive_datagram() takes a socket and a size");
        return NULL;
    }
    struct hot *hot = hot_in(module);
    Py_ssize_t wanted = PyLong_CheckExact(args[1]) ? PyLong_AsSsize_t(args[1]) : -1;
    if (wanted < 0 || !is_socket(hot, args[0]) || !is_internet_socket(args[0]) || !never_waits(hot, args[0])) {
        PyErr_Clear();
        Py_RETURN_NONE;
    }
    PyObject *value = receive_one(hot, args[0], (size_t)(wanted < LARGEST ? wanted : LARGEST));
    if (value != Py_None)
        return value;
    Py_DECREF(value);
    Py_RETURN_FALSE;
}

/* send_datagram(sock, family, data, address): True if it was sent, False if there is no room just now, None if this is not
 * plain enough, for the way in Python.  `address` None: to where the socket is connected.  OSError if sending fails. */
PyObject *send_datagram(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "send_datagram() takes a socket, its family, data and an address");
        return NULL;
    }
    struct hot *hot = hot_in(module);
    PyObject *data = args[2], *address = args[3], *structure = NULL;
    if (!is_socket(hot, args[0]) || !never_waits(hot, args[0]) || !PyBytes_CheckExact(data))
        Py_RETURN_NONE;
    if (address != Py_None) {
        long family = PyLong_AsLong(args[1]);
        if ((family != AF_INET && family != AF_INET6) || !PyTuple_CheckExact(address)) {
            PyErr_Clear();
            Py_RETURN_NONE;
        }
        structure = structure_of(hot, (int)family, address);
        if (structure == NULL) {
            if (PyErr_Occurred())
                return NULL;
            Py_RETURN_NONE;
        }
    }
    Py_ssize_t sent = sendto(socket_descriptor(args[0]), PyBytes_AS_STRING(data), CALL_SIZE((size_t)PyBytes_GET_SIZE(data)),
                             MSG_DONTWAIT | MSG_NOSIGNAL,
                             structure == NULL ? NULL : (const struct sockaddr *)PyBytes_AS_STRING(structure),
                             structure == NULL ? 0 : (socklen_t)PyBytes_GET_SIZE(structure));
    PyObject *answer = sent >= 0 ? Py_NewRef(Py_True) : would_wait() ? Py_NewRef(Py_False) : raise_last_error();
    Py_XDECREF(structure);
    return answer;
}

int add_datagrams(struct hot *hot)
{
    hot->tuples = PyDict_New();
    hot->structures = PyDict_New();
    return hot->tuples == NULL || hot->structures == NULL ? -1 : 0;
}
