/*
 * The native tier of iocp_loop: the few functions that run for every callback and every message, as C types that the
 * classes in Python inherit from.  What each does, its counterpart in Python does too; that one is the reference, and
 * is used wherever this module was not built (see iocp_loop/native.py).
 *
 *   handles.c   Handle and TimerHandle: asyncio's own classes, made and run without a frame of Python
 *   timers.c    the heap of a loop's timers                                      (asyncio's heapq)
 *   ready.c     its ready queue                                                  (asyncio's deque)
 *   schedule.c  call_soon and its kin                                            (asyncio's)
 *   tasks.c     create_future and create_task                                    (asyncio's)
 *   turns.c     Turns: one turn of the loop                                      (methods/turns.py)
 *   streams.c   the write and the receive of a stream transport                  (streams.py)
 *   sockets.c   sock_recv and sock_sendall                                       (methods/sockets.py)
 *   tls.c       the same through TLS                                             (endpoints/tls.py)
 *   connections.c accepting                                                      (ports/driver.py)
 *   datagrams.c receiving and sending datagrams           (ports/receiving.py, endpoints/datagrams.py, methods/sockets.py)
 *   receiving.c one receive from a stream socket                             (ports/receiving.py)
 *   driver.c    what the turns of all drivers share; each brings a table of its own verbs (driver.h)
 *   uring.c     the wait and the dispatch of driver uring                        (ports/uring/driver.py)
 *   epoll.c     the wait and the dispatch of driver poll, on Linux               (ports/poll/driver.py)
 *   epoll_watches.c, epoll_waits.c  what stands on its descriptors; receives of sock_recv that wait there
 *   calls.h     the system's calls on sockets, the same on each system
 *   iocp.c      the wait and the dispatch of driver iocp, on Windows             (ports/iocp/driver.py)
 *   iocp_sockets.c  its receives, datagrams and sends                  (ports/iocp/receiving.py, datagrams.py)
 *   ahead.c     fetching what the next messages will touch       (nothing in Python)
 *   shared.c    what all of them need                                            (native.py)
 *   module.c    puts them together; no other file knows of it
 *
 * Ownership.  A PyObject pointer in a struct owns its reference; one in a local variable owns it too unless the comment
 * beside it says "borrowed".  Functions return new references, or 0 and -1, as those of CPython do.
 *
 * Threads.  Where there is a GIL it guards everything but the system call that waits.  Free-threaded Python has none, and
 * there this holds:
 *
 *   - A loop, its driver and its transports belong to the thread that runs the loop; those of a CompletionPort to the thread
 *     that holds its lock.  Only that thread waits and dispatches: a second one that enters a turn is refused (turns.c).
 *   - Any thread may call call_soon_threadsafe, wake the loop, and cancel a handle.  So the ready queue and the timers are
 *     used under the critical section of the loop, and the slots of a handle that cancel() empties under that of the handle.
 *   - Whoever is about to sleep says so (`sleeping`) before he looks at the queues for the last time; whoever fills a queue
 *     looks afterwards whether somebody sleeps.  Between the two stands a FENCE on either side, so that one sees the other.
 *   - What other threads may only do by mistake (write to a transport, sock_recv, call_later) may go wrong for that call and
 *     for that connection, but must not touch what has been freed: what is read out of a struct and used further is taken
 *     with a reference, under the critical section of its object.
 *   - What is static is written when a module is imported, and only read afterwards.  The exceptions: the buffer to receive
 *     into is one for each thread (scratch), the tables of addresses are dicts, which have a lock of their own and from which
 *     everything is taken with a reference, and what is known of asyncio's methods is one word (struct asyncio_method).
 *
 * A critical section here holds a few assignments.  Nothing that may run Python is called in one, least of all a DECREF of
 * what may be the last reference: it would be given up meanwhile.
 *
 * Docstrings are plain strings and not PyDoc_STR, which may leave them out: inspect finds the signatures in them.
 *
 * Only CPython's public interface is used.  The slots of classes that are written in Python (asyncio.Handle,
 * Operation) are read where their member descriptors say that they are.
 */
#ifndef IOCP_LOOP_HOT_H
#define IOCP_LOOP_HOT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <structmember.h>

/* Before Python 3.13 there is a GIL, and nothing to be done; nor is there in newer ones that have one. */
#if PY_VERSION_HEX < 0x030D0000
#define Py_BEGIN_CRITICAL_SECTION(object) {
#define Py_END_CRITICAL_SECTION() }
#endif
#if defined(Py_GIL_DISABLED) && !defined(_MSC_VER)
#define READ(field) __atomic_load_n(&(field), __ATOMIC_RELAXED)
#define WRITE(field, value) __atomic_store_n(&(field), value, __ATOMIC_RELAXED)
#define FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#elif defined(Py_GIL_DISABLED)
#define READ(field) (field)
#define WRITE(field, value) ((field) = (value))
#define FENCE() MemoryBarrier()
#else
#define READ(field) (field)
#define WRITE(field, value) ((field) = (value))
#define FENCE() ((void)0)
#endif

/* A new reference to what is in `*place`, a field of `owner` that another thread may be changing; NULL if that is. */
static inline PyObject *take_reference(PyObject *owner, PyObject **place)
{
    PyObject *object;
    Py_BEGIN_CRITICAL_SECTION(owner);
    object = Py_XNewRef(*place);
    Py_END_CRITICAL_SECTION();
    return object;
}

/* Put `value`, whose reference is taken over, into `*place`. */
static inline void put_reference(PyObject *owner, PyObject **place, PyObject *value)
{
    PyObject *before;
    Py_BEGIN_CRITICAL_SECTION(owner);
    before = *place;
    *place = value;
    Py_END_CRITICAL_SECTION();
    Py_XDECREF(before);
}

/* table[key]; NULL if it is not there, or with an exception. */
static inline PyObject *find(PyObject *table, PyObject *key)
{
#if PY_VERSION_HEX >= 0x030D0000
    PyObject *value;
    PyDict_GetItemRef(table, key, &value);
    return value;
#else
    return Py_XNewRef(PyDict_GetItemWithError(table, key));
#endif
}

/* What this thread receives into; copied out before anything else can happen.  NULL with an exception. */
enum { SCRATCH_SIZE = 256 * 1024 };
char *scratch(void);

/* The object in a slot of a class written in Python; NULL where it was deleted or never set. */
#define SLOT(object, offset) (*(PyObject **)((char *)(object) + (offset)))

/* Where the slot `name` of `type` is, in bytes from the start of an instance; -1 with an exception. */
Py_ssize_t slot_offset(PyObject *type, const char *name);

/* The names that are looked up again and again, made once. */
extern struct names {
    PyObject *append, *arm, *arm_datagrams, *end_with, *leave_line, *popleft, *receive_once, *take; /* of iocp.c */
    PyObject *abandon, *accept_some, *arm_all, *buffer_updated, *call_eof_received, *callback, *check_callback, *check_closed,
        *check_thread, *context, *control_app_writing, *control_ssl_reading, *create_future, *data_received,
        *delay, *do_write, *done, *drain_ready, *end, *end_stream, *fatal_error, *future_blocking, *get_buffer, *gettimeout,
        *go_on, *hand_over, *keep_value, *open_ring, *pending, *queue_leftovers, *read, *reap, *receive_by_ring, *receive_data, *receive_ended,
        *receiving_failed, *report, *run, *set_result, *ssl_protocol, *start_shutdown, *time, *timer_handle_cancelled,
        *wait_again, *when, *write, *write_otherwise, *write_to_self;
} names;

/* What native.py has set: functions in Python for what is rare. */
extern struct helpers {
    PyObject *report_error; /* (handle, exception): what a callback has raised */
    PyObject *run_by_method; /* (loop, handle): run it by its method, and in debug mode tell if it was slow */
} helpers;

/* Where the slots of iocp_loop.operations.Operation are. */
extern struct operation_slots {
    Py_ssize_t complete, driver_data, fd, handle, key, state, token;
    PyObject *receive_stream; /* the type ReceiveStream, and its slots */
    Py_ssize_t get_buffer, paused;
    PyObject *accept_stream; /* the type AcceptStream */
    PyObject *readiness_stream; /* the type ReadinessStream, and its slot */
    Py_ssize_t events;
    PyObject *receive; /* the type Receive, and its slot */
    Py_ssize_t size;
    PyObject *receive_from_stream; /* the type ReceiveFromStream, and its slot */
    Py_ssize_t from_paused, from_size;
    PyObject *send_all; /* the type SendAll, and its slots */
    Py_ssize_t all_buffers, all_sent, all_size;
    PyObject *new, *in_flight, *cancelling, *done; /* values of `state` */
} operation_slots;

/* A method of one of asyncio's classes that the C here stands in for, and that tools replace by one of their own (by
 * assignment to the class): Handle._run to measure callbacks, BaseEventLoop.create_task to follow tasks. */
struct asyncio_method {
    PyTypeObject *type;
    PyObject *name, *globals; /* its name, and the globals of asyncio's own function */
    uint64_t seen; /* twice the version of the type that was looked at last (0 is none), and 1 if it is replaced */
};
extern struct asyncio_method handle_run_method, create_task_method;
int find_asyncio_methods(void);
int look_at_method(struct asyncio_method *self);
/* Whether it is not asyncio's own any more. */
static inline int is_replaced(struct asyncio_method *self)
{
    uint64_t seen = READ(self->seen);
    return seen > 1 && READ(self->type->tp_version_tag) == seen >> 1 ? (int)(seen & 1) : look_at_method(self);
}

/* module.NAME, a new reference. */
PyObject *attribute_of(const char *module, const char *name);

/* The exception that is set, taken away, as one object with its traceback. */
PyObject *take_exception(void);

/* 1 if the exception that is set is one that ends the loop: SystemExit or KeyboardInterrupt. */
int ends_the_loop(void);

/* self.METHOD(exception, message) with the exception that is set, which counts as being handled meanwhile, as in an
 * except clause: the log of debug mode shows it.  -1 if that fails, or if the exception is one that ends the loop. */
int fail(PyObject *self, PyObject *method, const char *message);

/* What a driver reports of an exception that comes out of a `complete` (Driver.report in Python). */
#define COMPLETE_FAILED "Exception in the completion of an operation"

/* context.run(callable, *args), by the short way for a real Context. */
PyObject *call_in_context(PyObject *context, PyObject *callable, PyObject *const *args, size_t count);

/* Enter or leave `context` if it is a real one.  1: it is; 0: it is something else, with a `run`; -1: error. */
int enter_context(PyObject *context);

/* Whether `object` is a socket, and not of a subclass, whose methods may do something else.  Only for such: its
 * descriptor, read in place (-1 if it is closed), whether it is of type SOCK_STREAM, and of IPv4 or IPv6. */
int is_socket(PyObject *object);
int is_stream_socket(PyObject *sock);
int is_internet_socket(PyObject *sock);
#ifdef _WIN32
typedef uintptr_t descriptor; /* a SOCKET */
#define NO_DESCRIPTOR ((descriptor)-1)
#else
typedef int descriptor;
#define NO_DESCRIPTOR (-1)
#endif
descriptor socket_descriptor(PyObject *sock);
#if defined(__linux__) || defined(_WIN32)
#define HAS_ACCEPT
/* A socket object for `fd`, which it takes over: a non-blocking stream socket of the family and protocol of `like`.  What the
 * constructor does, without asking the system for what is known. */
PyObject *make_stream_socket(PyObject *like, descriptor fd);
/* connections.c */
PyObject *accept_connection(PyObject *module, PyObject *listener);
PyObject *adopt_connection(PyObject *module, PyObject *args);
#endif

/* A new operation of `kind`; what is particular to that the caller fills in. */
PyObject *new_operation(PyObject *kind, PyObject *handle, descriptor fd, PyObject *complete);

/* op.complete(value, error), of which one is None. */
int complete_operation(PyObject *op, PyObject *value, PyObject *error);

/* datagrams.c */
struct sockaddr_storage;
PyObject *make_tuple(const struct sockaddr_storage *address);
/* The same by way of a table; of an address without length, that of a connection: None. */
PyObject *tuple_of(const struct sockaddr_storage *address, Py_ssize_t length);
/* Receive for the ReceiveFromStream `op` what there is, up to `most` datagrams, and deliver each.  Their number; -1 with an
 * exception; NOT_PLAIN for the way in Python. */
int receive_datagrams_for(PyObject *driver, PyObject *op, int most);
enum { NOT_PLAIN = -2 };
PyObject *receive_datagrams(PyObject *module, PyObject *args);
PyObject *receive_datagram_now(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *send_datagram(PyObject *module, PyObject *const *args, Py_ssize_t count);
int add_datagrams(PyObject *module);

/* Whether a list or a deque has anything in it; both keep their size where var-sized objects do. */
static inline int has_items(PyObject *object) { return object != NULL && Py_SIZE(object) > 0; }

PyObject *set_helpers(PyObject *module, PyObject *args);
PyObject *use_operations(PyObject *module, PyObject *operations);
int intern_names(void);
int check_sockets(void);

PyObject *make_stream_type(PyObject *module, PyObject *base);
PyObject *make_tls_types(PyObject *module, PyObject *args);
#ifdef __linux__
#include <time.h>

/* Once so many bytes have been delivered, the rest of a batch waits for the next turn: what callbacks and tasks make of
 * them comes first, while they are still in the cache.  A wait in between returns at once. */
enum { DELIVER_MOST = 256 * 1024 };

/* ahead.c.  `ops` (borrowed, AHEAD at most) will be completed next: fetch what that will touch. */
enum { AHEAD = 16 };
void look_ahead(PyObject *const *ops, int count);
/* Fetch so many bytes, about to be used, into the caches; any address will do. */
enum { CACHE_LINE = 64 };
static inline void fetch(const void *where, size_t size)
{
    for (size_t n = 0; n < size; n += CACHE_LINE)
        __builtin_prefetch((const char *)where + n, 1);
    __builtin_prefetch((const char *)where + size - 1, 1); /* it may lie across one line more */
}
/* streams.c: whether `self` is a stream transport; fetch one, or what would be one; then, from one, what it refers to. */
int is_stream(PyObject *self);
void fetch_stream(PyObject *self);
void fetch_stream_parts(PyObject *self);

static inline int64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

#endif

#endif
