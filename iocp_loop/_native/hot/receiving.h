/* Receiving from stream sockets: what one receive has come to, on which drivers and calls act (receiving.c). */
#ifndef IOCP_LOOP_RECEIVING_H
#define IOCP_LOOP_RECEIVING_H

#include "hot.h"

enum outcome {
    DATA,    /* `value` is bytes, or their number if they are in the memory that the owner of the stream has provided */
    END,     /* the peer has sent all: `value` is empty, or 0 */
    NOTHING, /* just now, or there is no memory to receive into */
    FAILED,  /* with an exception, which is to end the stream unless it ends the loop */
};
struct piece {
    PyObject *value; /* the caller's */
    Py_ssize_t size; /* bytes */
    int filled;      /* the memory that was provided is full, so that there may be more */
};
/* Receive once, without blocking, for the stream `op`, which the caller holds and whose handle is a plain socket.  `expected`,
 * bytes in a piece, begins with 0 and is kept between calls. */
enum outcome receive_for_stream(struct hot *hot, PyObject *op, size_t *expected, struct piece *piece);

/* As long as its buffers come back full, a stream may receive so often in one turn: the others are not to starve. */
enum { RECEIVES_IN_A_TURN = 8 };

/* Receive at most `size` bytes: bytes, or None if there is nothing just now. */
PyObject *receive_now(struct hot *hot, descriptor fd, size_t size, size_t *expected);

#endif
