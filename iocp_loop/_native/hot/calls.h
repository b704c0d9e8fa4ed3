/* The system's calls on plain sockets, as sockets.c and datagrams.c make them: none of them waits, raises a signal, or gives
 * the GIL away.  Where a call can't be told not to wait, the socket has to be non-blocking: see never_waits. */
#ifndef IOCP_LOOP_HOT_CALLS_H
#define IOCP_LOOP_HOT_CALLS_H

#include "hot.h"

#ifdef _WIN32

#include <winsock2.h>
#include <ws2tcpip.h>

#define MSG_DONTWAIT 0
#define MSG_NOSIGNAL 0
#define CALL_SIZE(size) ((int)((size) < INT_MAX ? (size) : INT_MAX))

/* Whether a call on `sock` does not wait: one that can be told not to, or of a non-blocking socket. */
int never_waits(const struct hot *hot, PyObject *sock);
static inline int last_error(void) { return WSAGetLastError(); }
static inline void set_last_error(int code) { WSASetLastError(code); }
static inline int was_interrupted(void) { return WSAGetLastError() == WSAEINTR; }
static inline int would_wait(void) { return WSAGetLastError() == WSAEWOULDBLOCK || was_interrupted(); }
static inline PyObject *raise_last_error(void) { return PyErr_SetExcFromWindowsErr(PyExc_OSError, WSAGetLastError()); }

#else

#include <errno.h>
#include <netinet/in.h>
#include <arpa/inet.h>
#include <sys/socket.h>

#define CALL_SIZE(size) (size)

static inline int never_waits(const struct hot *hot, PyObject *sock) { return 1; }
static inline int last_error(void) { return errno; }
static inline void set_last_error(int code) { errno = code; }
static inline int was_interrupted(void) { return errno == EINTR; }
static inline int would_wait(void) { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }
static inline PyObject *raise_last_error(void) { return PyErr_SetFromErrno(PyExc_OSError); }

#endif

/* The same without a text, which nobody reads and which Windows is asked for. */
static inline PyObject *raise_would_wait(void)
{
    PyErr_SetNone(PyExc_BlockingIOError);
    return NULL;
}

#endif
