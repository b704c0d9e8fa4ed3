/* The Windows binding of iocp_loop; iocp.c tells how it works.
 *
 *   iocp.c       the port: waiting, associating handles; what errors are called
 *   console.c    Ctrl-C and the other events of a console
 *   sockets.c    receiving, sending, accepting, connecting; addresses
 *   files.c      files and pipes
 *   readiness.c  polls
 *   waits.c      waits for handles, and sockets of other ports
 *
 * No Windows header is included here: Python.h may bring in windows.h in an order that winsock2.h does not bear, and
 * the file that cffi writes includes both.  Handles and sockets are uintptr_t therefore, DWORDs unsigned long, and
 * the OVERLAPPED is four words, whose size iocp.c checks.
 */

#ifndef IOCP_LOOP_IOCP_H
#define IOCP_LOOP_IOCP_H

#if defined(_WIN32) && !defined(_WIN64)
#error "iocp_loop wants a 64-bit Python: what the kernel writes to is laid out for 64 bits"
#endif

#include <stddef.h>
#include <stdint.h>

/* Completion keys: what kind of handle a completion belongs to, hence how its status is translated. */
enum {
    IOCP_KEY_WAKE = 0,   /* posted by hand; no submission */
    IOCP_KEY_SOCKET = 1,
    IOCP_KEY_FILE = 2,
    IOCP_KEY_POLL = 3,   /* an AFD poll */
    IOCP_KEY_HANDLE = 4  /* a wait for a handle */
};

enum {
    IOCP_BATCH_SIZE = 256,    /* completions taken by one call */
    IOCP_GATHER_LIMIT = 64,   /* buffers sent by one call */
    IOCP_AREA_SIZE = 288,     /* two socket addresses, each with the 16 bytes more that AcceptEx wants */
    IOCP_HOST_SIZE = 72
};

/* Events of a poll, the bits of operations.READABLE and WRITABLE and two more. */
enum { IOCP_READABLE = 0x001, IOCP_WRITABLE = 0x004, IOCP_FAILED = 0x008, IOCP_CLOSED = 0x020 };

/* What a handle can be the handle of, see iocp_file_type. */
enum { IOCP_DISK = 1, IOCP_DEVICE = 2, IOCP_PIPE = 3 };

/* One request in the kernel's hands.  The OVERLAPPED comes first, so that the address which comes back with the
 * completion is the address of the submission.  It must stay where it is until then. */
typedef struct iocp_submission {
    uintptr_t overlapped[4];
    uintptr_t handle;        /* where the request went, for iocp_cancel */
    uintptr_t accepted;      /* AcceptEx: the socket that the connection will have */
    uintptr_t port;          /* where a registered wait posts to */
    uintptr_t wait;          /* the registered wait, or the wait completion packet */
    uintptr_t event;         /* see iocp_emulate */
    long wait_key;
    volatile long posted;    /* the registered wait has posted its completion */
    unsigned long bytes;     /* transferred, when the request was done at once */
    unsigned long flags;     /* WSARecv writes here until it completes */
    int address_length;      /* WSARecvFrom too */
    uint64_t area[IOCP_AREA_SIZE / 8]; /* a socket address, AcceptEx's two, or a poll request */
} iocp_submission;

typedef struct iocp_port {
    uintptr_t handle;
    uintptr_t timer;         /* 0 where Windows has no high-resolution timer or can't tie it to a port */
    uintptr_t timer_packet;
    long count;              /* how many completions the last iocp_wait has left in `batch` */
    uintptr_t batch[IOCP_BATCH_SIZE * 3]; /* of each: address of the submission, bytes, error code */
} iocp_port;

long iocp_start(void);
void iocp_set_closing_signal(int number);
void iocp_set_service(int yes); /* for tests */
unsigned long iocp_error_of_status(unsigned long status, int socket);
int iocp_has_wait_packets(void);
long iocp_port_open(iocp_port *port, unsigned long concurrency);
void iocp_port_close(iocp_port *port);
long iocp_wait(iocp_port *port, long long timeout_ns);
long iocp_post(iocp_port *port);

long iocp_associate_socket(iocp_port *port, uintptr_t socket, int *facts);
long iocp_associate_file(iocp_port *port, uintptr_t handle, int *skips);
int iocp_is_synchronous(uintptr_t handle);
long iocp_cancel(iocp_submission *sub);
long iocp_close_socket(uintptr_t socket);
long iocp_close_handle(uintptr_t handle);

long iocp_receive(uintptr_t socket, iocp_submission *sub, void *buffer, unsigned long size);
long iocp_send(uintptr_t socket, iocp_submission *sub, const void *buffer, unsigned long size);
long iocp_send_gathered(uintptr_t socket, iocp_submission *sub, int count, void **buffers, unsigned long *sizes);
long iocp_receive_from(uintptr_t socket, iocp_submission *sub, void *buffer, unsigned long size);
long iocp_send_to(uintptr_t socket, iocp_submission *sub, const void *buffer, unsigned long size);
long iocp_accept(uintptr_t listener, iocp_submission *sub, int family, int type, int protocol);
long iocp_accept_finish(uintptr_t listener, iocp_submission *sub);
long iocp_connect(uintptr_t socket, iocp_submission *sub);
long iocp_connect_finish(uintptr_t socket);
long iocp_transmit_file(uintptr_t socket, iocp_submission *sub, uintptr_t file, unsigned long long offset,
                        unsigned long count);

long iocp_set_address(iocp_submission *sub, int family, const char *host, int port, unsigned long flow,
                      unsigned long scope);
long iocp_get_address(iocp_submission *sub, char *host, unsigned long *numbers);

long iocp_read(uintptr_t handle, iocp_submission *sub, void *buffer, unsigned long size, unsigned long long offset);
long iocp_write(uintptr_t handle, iocp_submission *sub, const void *buffer, unsigned long size,
                unsigned long long offset);
long iocp_pipe_serve(const wchar_t *name, int first, unsigned long buffer_size, uintptr_t *handle);
long iocp_pipe_accept(uintptr_t handle, iocp_submission *sub);
long iocp_pipe_connect(const wchar_t *name, uintptr_t *handle);

unsigned long iocp_file_type(uintptr_t handle);
long iocp_read_blocking(uintptr_t handle, void *buffer, unsigned long size, unsigned long *count);
long iocp_write_blocking(uintptr_t handle, const void *buffer, unsigned long size, unsigned long *count);
long iocp_interrupt(unsigned long thread);

long iocp_poll_open(iocp_port *port, uintptr_t *device);
long iocp_base_socket(uintptr_t socket, uintptr_t *base);
long iocp_poll(uintptr_t device, iocp_submission *sub, uintptr_t base, unsigned long events);
unsigned long iocp_polled(iocp_submission *sub);

long iocp_watch_handle(iocp_port *port, iocp_submission *sub, uintptr_t handle);
int iocp_unwatch_handle(iocp_submission *sub);
long iocp_emulate(iocp_submission *sub);
long iocp_emulate_watch(iocp_port *port, iocp_submission *sub, long key);
void iocp_emulate_finish(iocp_submission *sub);

#endif
