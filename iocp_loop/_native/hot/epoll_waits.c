/*
 * The receives of sock_recv (sockets.c) that wait on driver poll: a table by descriptor, beside the watches of the driver in
 * Python, which has none of them.  Where anything else is begun on the descriptor, that driver takes the receive over.
 */

#include "epoll.h"
#include "sockets.h"

#ifdef __linux__

#include <errno.h>

/* Make room for `fd` in the table. */
static int make_room(EpollTurns *self, int fd)
{
    if (fd >= self->sockets_room) {
        int room = self->sockets_room ? self->sockets_room : 64;
        while (room <= fd)
            room *= 2;
        struct socket_watch *sockets = self->sockets;
        PyMem_Resize(sockets, struct socket_watch, (size_t)room);
        if (sockets == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        for (int n = self->sockets_room; n < room; n++)
            sockets[n] = (struct socket_watch){NULL, 0};
        self->sockets = sockets;
        self->sockets_room = room;
    }
    return 0;
}

/* Let the poller tell once that `fd`, for which there is room, is readable. */
static int arm_once(EpollTurns *self, int fd)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT, .data.fd = fd};
    /* The kernel knows better than we do whether this very file is registered. */
    int known = self->sockets[fd].registered;
    if (epoll_ctl(self->fd, known ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event) < 0
        && ((errno != EEXIST && errno != ENOENT)
            || epoll_ctl(self->fd, known ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &event) < 0)) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    self->sockets[fd].registered = 1;
    return 0;
}

PyObject *waiting_on(EpollTurns *self, int fd, int take)
{
    const struct hot *hot = self->driver.hot;
    PyObject *op = NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    if (fd >= 0 && fd < self->sockets_room) {
        op = self->sockets[fd].op;
        if (take)
            self->sockets[fd].op = NULL;
        else
            Py_XINCREF(op);
    }
    Py_END_CRITICAL_SECTION();
    if (op != NULL && SLOT(op, hot->operation.state) != hot->states.in_flight)
        Py_CLEAR(op);
    return op;
}

int waits_add(EpollTurns *self, PyObject *op, int fd)
{
    int failed;
    Py_BEGIN_CRITICAL_SECTION(self);
    failed = make_room(self, fd) < 0 || arm_once(self, fd) < 0;
    Py_END_CRITICAL_SECTION();
    if (failed || launch(&self->driver, op) < 0)
        return -1;
    put_reference((PyObject *)self, &self->sockets[fd].op, Py_NewRef(op));
    return 0;
}

int waits_receive(EpollTurns *self, int fd)
{
    PyObject *op = waiting_on(self, fd, 1);
    if (op == NULL)
        return 0; /* nobody waits: the next who does looks first */
    PyObject *data = receive_for(self->driver.hot, op);
    if (data == Py_None) { /* somebody else was faster: wait again, as the driver waits for whatever is not plain */
        int failed = driver_call(&self->driver, self->driver.hot->names.wait_again, op);
        Py_DECREF(data);
        Py_DECREF(op);
        return failed;
    }
    self->driver.completions++;
    if (data != NULL)
        self->driver.delivered += (size_t)PyBytes_GET_SIZE(data);
    int failed = deliver_received(&self->driver, op, data);
    Py_XDECREF(data);
    Py_DECREF(op);
    return failed;
}

int waits_know(EpollTurns *self, int fd)
{
    int registered;
    Py_BEGIN_CRITICAL_SECTION(self);
    registered = fd < self->sockets_room && self->sockets[fd].registered;
    Py_END_CRITICAL_SECTION();
    return registered;
}

/* _take_socket_wait(fd): the Receive that waits there, which the caller takes over, or None.  The registration is
 * forgotten too; the poller may still have it. */
PyObject *take_socket_wait(EpollTurns *self, PyObject *number)
{
    int fd = (int)PyLong_AsLong(number);
    if (fd == -1 && PyErr_Occurred())
        return NULL;
    PyObject *op = waiting_on(self, fd, 1);
    Py_BEGIN_CRITICAL_SECTION(self);
    if (fd >= 0 && fd < self->sockets_room)
        self->sockets[fd].registered = 0;
    Py_END_CRITICAL_SECTION();
    return op == NULL ? Py_NewRef(Py_None) : op;
}

/* _socket_waits(): the descriptors on which one waits. */
PyObject *socket_waits(EpollTurns *self, PyObject *ignored)
{
    PyObject *list = PyList_New(0);
    for (int fd = 0; list != NULL && fd < self->sockets_room; fd++) {
        PyObject *op = waiting_on(self, fd, 0), *number = op == NULL ? NULL : PyLong_FromLong(fd);
        if (op != NULL && (number == NULL || PyList_Append(list, number) < 0))
            Py_CLEAR(list);
        Py_XDECREF(number);
        Py_XDECREF(op);
    }
    return list;
}

void waits_clear(EpollTurns *self)
{
    for (int fd = 0; fd < self->sockets_room; fd++) {
        self->sockets[fd].registered = 0;
        put_reference((PyObject *)self, &self->sockets[fd].op, NULL);
    }
}

/* The driver is closed. */
PyObject *forget_socket_waits(EpollTurns *self, PyObject *ignored)
{
    waits_clear(self);
    Py_RETURN_NONE;
}

#endif
