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
 *   connections.c  how it is made                                                (connections.py)
 *   life.c      the rest of its life, a table                                    (life.py)
 *   transports.c   its type
 *   addresses.c  the names of sockets
 *   proactor.c  what a transport asks of its proactor                          (proactor.py)
 *   readers.c   iocp_loop's StreamReader, its protocol and its writer            (readers.py)
 *   stream_calls.c what their read, readline, drain and so on return             (asyncio's)
 *   sockets.c   sock_recv and sock_sendall                                       (methods/sockets.py)
 *   tls.c       the same through TLS                                             (endpoints/tls.py)
 *   accepting.c accepting, and what becomes of it                 (ports/accepting.py, endpoints/listener.py)
 *   datagrams.c receiving and sending datagrams           (ports/receiving.py, endpoints/datagrams.py, methods/sockets.py)
 *   receiving.c one receive from a stream socket                             (ports/receiving.py)
 *   driver.c    what the turns of all drivers share; each brings a table of its own verbs (driver.h)
 *   uring.c     the wait and the dispatch of driver uring                        (ports/uring/driver.py)
 *   epoll.c     the wait and the dispatch of driver poll, on Linux               (ports/poll/driver.py)
 *   epoll_watches.c, epoll_waits.c  what stands on its descriptors; receives of sock_recv that wait there
 *   calls.h     the system's calls on sockets, the same on each system
 *   iocp.c      the wait and the dispatch of driver iocp, on Windows             (ports/iocp/driver.py)
 *   iocp_submissions.c  its requests: the slots that they borrow, and how they end       (ports/iocp/requests.py)
 *   iocp_sockets.c, iocp_once.c, iocp_datagrams.c  of streams, of sock_recv, of datagrams (ports/iocp/receiving.py, datagrams.py)
 *   ahead.c     fetching what the next messages will touch       (nothing in Python)
 *   shared.c    what all of them need                                            (native.py)
 *   module.c    puts them together; no other file knows of it
 *
 * State.  What is kept beside the objects belongs to the module, in a `struct hot`: interned names, our types, what is known
 * of the classes in Python, tables.  So each interpreter has its own, with the types of its own asyncio, and several run side
 * by side, each with its own GIL.
 *
 *   - Loops, drivers, the calls of sock_recv and TLS connections point to it (`hot`), and own a reference to the module that
 *     they give back last of all.  So it is there as long as they are, even when the garbage collector has cleared the types.
 *     For the same reason the module has no m_clear: types and classes break the cycles.
 *   - Handles and stream transports are many: they ask their type for it (hot_of).  A type that the garbage collector has
 *     cleared does not know any more: what it takes to free such an object is found without.
 *   - What is static is constant, or a table that only CPython reads (tests/test_architecture.py looks).  Of the process is
 *     only, where there is no GIL, the memory to receive into, one for each thread, and the key that frees it (make_scratch).
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
 *   - The state is written when the module and the drivers are imported, and only read afterwards.  The exceptions: the
 *     tables of addresses are dicts, which have a lock of their own and from which everything is taken with a reference; what
 *     is known of asyncio's methods is one word (struct asyncio_method); and there are no spare handles without a GIL.
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

/* The object in a slot of a class written in Python; NULL where it was deleted or never set. */
#define SLOT(object, offset) (*(PyObject **)((char *)(object) + (offset)))

/* Where the slot `name` of `type` is, in bytes from the start of an instance; -1 with an exception. */
Py_ssize_t slot_offset(PyObject *type, const char *name);

/* The same for several, each of which has its place in `struct hot`: PLACE(watch, events) is that of the slot `events` in
 * hot->watch.events.  0 or -1. */
struct slot_place {
    const char *name;
    size_t where;
};
#define PLACE(group, slot) {#slot, offsetof(struct hot, group.slot)}
#define FIND_SLOTS(hot, type, places) find_slots(hot, type, places, sizeof(places) / sizeof *(places))
struct hot;
int find_slots(struct hot *hot, PyObject *type, const struct slot_place *places, size_t count);

/* The slots of a class written in Python, and of those above it, as traverse and clear of a type of ours that derives from
 * it see them.  -1 with an ImportError if an instance has anything else. */
int check_slots(PyTypeObject *class);
int visit_slots(PyObject *self, const PyTypeObject *class, visitproc visit, void *arg);
void clear_slots(PyObject *self, const PyTypeObject *class);

/* The names that are looked up again and again, made once: how they are called here, and what they are. */
#define NAMES(NAME) \
    NAME(abandon, "abandon") \
    NAME(accept_some, "_accept_some") \
    NAME(append, "append") \
    NAME(arm, "_arm") \
    NAME(arm_all, "_arm_all") \
    NAME(arm_datagrams, "_arm_datagrams") \
    NAME(attach, "_attach") \
    NAME(begin, "_begin") \
    NAME(buffer_updated, "buffer_updated") \
    NAME(call_connection_lost, "_call_connection_lost") \
    NAME(call_eof_received, "_call_eof_received") \
    NAME(call_soon, "call_soon") \
    NAME(callback, "callback") \
    NAME(cancel, "cancel") \
    NAME(cancelled, "cancelled") \
    NAME(check_callback, "_check_callback") \
    NAME(check_closed, "_check_closed") \
    NAME(check_thread, "_check_thread") \
    NAME(choose_receiver, "_choose_receiver") \
    NAME(close, "close") \
    NAME(connection_lost, "connection_lost") \
    NAME(connection_made, "connection_made") \
    NAME(context, "context") \
    NAME(control_app_writing, "_control_app_writing") \
    NAME(control_ssl_reading, "_control_ssl_reading") \
    NAME(copy, "copy") \
    NAME(create_future, "create_future") \
    NAME(data_received, "data_received") \
    NAME(delay, "delay") \
    NAME(deliver_unclaimed, "_deliver_unclaimed") \
    NAME(detach, "_detach") \
    NAME(do_write, "_do_write") \
    NAME(done, "done") \
    NAME(drain_ready, "_drain_ready") \
    NAME(drop, "drop") \
    NAME(end_stream, "_end_stream") \
    NAME(end_unclosed, "_end_unclosed") \
    NAME(end_with, "_end_with") \
    NAME(ended, "_ended") \
    NAME(eof_received, "eof_received") \
    NAME(fail_file, "_fail_file") \
    NAME(fileno, "fileno") \
    NAME(feed_data, "feed_data") \
    NAME(future_blocking, "_asyncio_future_blocking") \
    NAME(get_buffer, "get_buffer") \
    NAME(get_buffer_of_protocol, "_get_buffer_of_protocol") \
    NAME(get_extra_info, "get_extra_info") \
    NAME(getpeername, "getpeername") \
    NAME(getsockname, "getsockname") \
    NAME(gettimeout, "gettimeout") \
    NAME(go_on, "_go_on") \
    NAME(hand_over, "_hand_over") \
    NAME(in_flight, "in_flight") \
    NAME(is_closing, "is_closing") \
    NAME(keep_value, "keep_value") \
    NAME(leave_line, "_leave_line") \
    NAME(let_go, "let_go") \
    NAME(open_ring, "_open_ring") \
    NAME(peername, "peername") \
    NAME(pending, "pending") \
    NAME(popleft, "popleft") \
    NAME(queue_leftovers, "_queue_leftovers") \
    NAME(read, "read") \
    NAME(reap, "_reap") \
    NAME(receive_by_ring, "_receive_by_ring") \
    NAME(receive_data, "_receive_data") \
    NAME(receive_ended, "_receive_ended") \
    NAME(receive_once, "_receive_once") \
    NAME(receive_otherwise, "_receive_otherwise") \
    NAME(receive_stream, "receive_stream") \
    NAME(receiving_failed, "_receiving_failed") \
    NAME(received, "_received") \
    NAME(received_into, "_received_into") \
    NAME(run, "run") \
    NAME(set_exception, "set_exception") \
    NAME(set_protocol, "set_protocol") \
    NAME(result, "result") \
    NAME(set_result, "set_result") \
    NAME(sockname, "sockname") \
    NAME(ssl_protocol, "_ssl_protocol") \
    NAME(start_shutdown, "_start_shutdown") \
    NAME(take, "take") \
    NAME(time, "time") \
    NAME(timer_handle_cancelled, "_timer_handle_cancelled") \
    NAME(wait_again, "_wait_again") \
    NAME(when, "when") \
    NAME(write, "write") \
    NAME(write_otherwise, "_write_otherwise") \
    NAME(write_to_self, "_write_to_self")
#define DECLARE_NAME(name, text) PyObject *name;

/* A method of one of asyncio's classes that the C here stands in for, and that tools replace by one of their own (by
 * assignment to the class): Handle._run to measure callbacks, BaseEventLoop.create_task to follow tasks. */
struct asyncio_method {
    PyTypeObject *type;
    PyObject *name, *globals; /* its name, and the globals of asyncio's own function */
    uint64_t seen; /* twice the version of the type that was looked at last (0 is none), and 1 if it is replaced */
};

#ifdef _WIN32
struct iocp_port;
struct iocp_submission;
typedef long (*request_function)(uintptr_t socket, struct iocp_submission *sub, void *buffer, unsigned long size);
#endif

/* What the module has. */
struct hot {
    PyObject *module; /* borrowed: it is the module's */

    /* Owned references, to the last before `last`; NULL until they are known. */
    struct names {
        NAMES(DECLARE_NAME)
    } names;
    PyTypeObject *Driver_type, *EpollTurns_type, *Turns_type, *Queue_type, *Handle_type, *TimerHandle_type, *SocketWait_type,
        *Calls_type, *Stream_type, *Tls_type, *TlsTransport_type;
    struct { /* what native.py has set: functions in Python for what is rare */
        PyObject *report_error; /* (handle, exception): what a callback has raised */
        PyObject *run_by_method; /* (loop, handle): run it by its method, and in debug mode tell if it was slow */
    } helpers;
    struct { /* classes in Python: of iocp_loop.operations; and what the drivers keep */
        PyObject *accept_stream, *readiness_stream, *receive, *receive_from_stream, *receive_stream, *send_all;
        PyObject *watch, *uring_stream, *submission;
    } kinds;
    struct { /* values of an operation's `state` */
        PyObject *new, *in_flight, *cancelling, *done;
    } states;
    PyTypeObject *socket_class, *socket_type; /* socket.socket, and _socket.socket beneath it: see is_socket */
    PyObject *monotonic;       /* time.monotonic */
    PyObject *threadsafe_type; /* asyncio's handle for callbacks from other threads; NULL before Python 3.14 */
    struct { /* of tasks.c */
        PyObject *futures, *tasks;          /* the modules, whose Future and Task may be replaced too */
        PyObject *future, *task;            /* "Future" and "Task" */
        PyObject *of_loop, *of_loop_by_name; /* keywords: ("loop",) and ("loop", "name") */
    } tasks;
    struct { /* of tls.c: states; the errors that mean "not now"; ssl.SSLObject, and the class of what it wraps */
        PyObject *wrapped, *flushing, *again, *sslobject_class, *wrapped_class;
    } tls;
    struct { /* of readers.c: asyncio's classes; the class in Python above Reader; our types */
        PyTypeObject *reader, *writer, *plain_reader, *Reader_type, *Protocol_type, *Writer_type, *Call_type;
    } streams;
    PyObject *tuples, *structures; /* addresses, see datagrams.c */
    PyObject *socket_close;        /* _socket.socket.close */
    struct { /* of connections.c */
        PyObject *protocol, *buffered_protocol, *takes_bytes; /* classes of protocols */
        PyObject *context_for, *send_without_delay;           /* functions in Python for what is rare */
        PyObject *high, *low;                                 /* the limits of flow control of a new transport */
        PyObject *keyed_ref;                                  /* weakref.KeyedRef */
        PyObject *of_context;                                 /* the keyword: ("context",) */
    } life;
    PyObject *nobody;              /* the `finish` of a Submission that nobody has */
    PyObject *last;

    /* Where slots are. */
    struct { /* of the classes of iocp_loop.operations */
        Py_ssize_t complete, driver_data, fd, handle, key, state, token;
        Py_ssize_t get_buffer, paused;           /* of a ReceiveStream */
        Py_ssize_t events;                       /* of a ReadinessStream */
        Py_ssize_t size;                         /* of a Receive */
        Py_ssize_t from_paused, from_size;       /* of a ReceiveFromStream */
        Py_ssize_t all_buffers, all_sent, all_size; /* of a SendAll */
    } operation;
    struct { /* of asyncio.Handle; of asyncio.TimerHandle the last two */
        Py_ssize_t callback, args, cancelled, loop, source_traceback, repr, context, scheduled, when;
    } handle;
    Py_ssize_t timer_place;                        /* of our own field in a TimerHandle, behind asyncio's slots */
    Py_ssize_t socket_references, socket_closed;   /* of socket.socket; -1 where objects are made by its constructor */
    Py_ssize_t stream_offset;                      /* of a Stream's own fields */
    struct { /* of flow control, beneath them; and of weakref.KeyedRef */
        Py_ssize_t loop, protocol_paused, high_water, low_water, key;
    } flow;
    size_t most_at_once; /* MOST_AT_ONCE of streams.py */
    int servers_count; /* a server counts its connections, and does not know them */
    struct { /* of the _Watch of driver poll */
        Py_ssize_t events, readers, stream, writers;
    } watch;
    struct { /* of the _Stream of driver uring */
        Py_ssize_t armed, cookie, large, stopping, streak, watched;
    } stream;
#ifdef _WIN32
    struct { /* of the classes of ports/iocp/, and what else comes from there */
        Py_ssize_t address, armed, association, finish, keep, op, slot; /* of a Submission */
        Py_ssize_t emulated, handle, reading, skips, small, writing;    /* of an Association */
        Py_ssize_t free;                                                /* of a SlotPool */
        Py_ssize_t slot_size;
    } iocp;
    struct { /* the functions of the binding that are called here */
        long (*wait)(struct iocp_port *port, long long timeout_ns);
        request_function receive, receive_from;
    } iocp_functions;
#endif

    struct asyncio_method handle_run_method, create_task_method;
    struct spares { /* freed handles, by way of their `_callback` */
        PyObject *first;
        int count;
    } spare_handles, spare_timers;
    PyMethodDef create_task;   /* its signature is that of the running Python */
    char create_task_doc[400];
    char *scratch; /* what is received into; NULL until it is needed, and without a GIL, where each thread has one */
};

static inline struct hot *hot_in(PyObject *module) { return PyModule_GetState(module); }

/* That of the module which made `type`; NULL with an exception if the garbage collector has cleared the type. */
static inline struct hot *hot_behind(PyTypeObject *type)
{
    PyObject *module = ((PyHeapTypeObject *)type)->ht_module;
    return module == NULL ? PyType_GetModuleState(type) : PyModule_GetState(module);
}

/* The same for the type with this tp_dealloc, which is `type` or stands beneath it: classes in Python have their own. */
static inline struct hot *hot_of(PyTypeObject *type, destructor dealloc)
{
    while (type->tp_dealloc != dealloc)
        type = type->tp_base;
    return hot_behind(type);
}

/* To traverse an object that points to `hot`. */
static inline int visit_hot(struct hot *hot, visitproc visit, void *arg)
{
    if (hot != NULL)
        Py_VISIT(hot->module);
    return 0;
}

/* The end of a dealloc. */
static inline void free_object(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* The same for an object that points to `hot`. */
static inline void free_with_hot(PyObject *self, struct hot *hot)
{
    free_object(self);
    if (hot != NULL)
        Py_DECREF(hot->module);
}

/* What this thread receives into; copied out before anything else can happen.  NULL with an exception. */
enum { SCRATCH_SIZE = 256 * 1024 };
char *make_scratch(struct hot *hot);
static inline char *scratch(struct hot *hot) { return hot->scratch == NULL ? make_scratch(hot) : hot->scratch; }

int find_asyncio_methods(struct hot *hot);
int look_at_method(struct asyncio_method *self);
/* Whether it is not asyncio's own any more. */
static inline int is_replaced(struct asyncio_method *self)
{
    uint64_t seen = READ(self->seen);
    return seen > 1 && READ(self->type->tp_version_tag) == seen >> 1 ? (int)(seen & 1) : look_at_method(self);
}

/* A type of `spec`, above `base` if that is not NULL, which the module shows. */
PyTypeObject *add_type(struct hot *hot, PyType_Spec *spec, PyTypeObject *base);

/* module.NAME, a new reference. */
PyObject *attribute_of(const char *module, const char *name);

/* The exception that is set, taken away, as one object with its traceback. */
PyObject *take_exception(void);

/* 1 if the exception that is set is one that ends the loop: SystemExit or KeyboardInterrupt. */
int ends_the_loop(void);

/* Whether `error`, of an operation, tells of a cancel (operations.py has the same). */
int was_cancelled(PyObject *error);

/* self.METHOD(exception, message) with the exception that is set, which counts as being handled meanwhile, as in an
 * except clause: the log of debug mode shows it.  -1 if that fails, or if the exception is one that ends the loop. */
int fail(PyObject *self, const char *method, const char *message);

/* What a driver reports of an exception that comes out of a `complete` (Driver.report in Python). */
#define COMPLETE_FAILED "Exception in the completion of an operation"

/* context.run(callable, *args), by the short way for a real Context. */
PyObject *call_in_context(PyObject *context, PyObject *callable, PyObject *const *args, size_t count);

/* Whether `future`, which is awaited, is not done: whoever goes on is too early, and is given it once more.  -1 with an
 * exception. */
int await_again(const struct hot *hot, PyObject *future);

/* Enter or leave `context` if it is a real one.  1: it is; 0: it is something else, with a `run`; -1: error. */
int enter_context(PyObject *context);

/* Whether `object` is a socket, and not of a subclass, whose methods may do something else.  Only for such: its
 * descriptor, read in place (-1 if it is closed), whether it is of type SOCK_STREAM, and of IPv4 or IPv6. */
int is_socket(const struct hot *hot, PyObject *object);
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
int socket_family(PyObject *sock);
/* Whether Python's own calls on it don't wait either. */
int is_nonblocking(PyObject *sock);
/* Whether it is one of TCP. */
int is_tcp_socket(PyObject *sock);
/* sock.close(), for a socket of any kind. */
int close_socket(const struct hot *hot, PyObject *sock);
#if defined(__linux__) || defined(_WIN32)
#define HAS_ACCEPT
/* A socket object for `fd`, which it takes over: a non-blocking stream socket of the family and protocol of `like`.  What the
 * constructor does, without asking the system for what is known. */
PyObject *make_stream_socket(struct hot *hot, PyObject *like, descriptor fd);
#endif

/* A new operation of `kind`; what is particular to that the caller fills in. */
PyObject *new_operation(struct hot *hot, PyObject *kind, PyObject *handle, descriptor fd, PyObject *complete);

/* op.complete(value, error), of which one is None. */
int complete_operation(const struct hot *hot, PyObject *op, PyObject *value, PyObject *error);

/* datagrams.c */
struct sockaddr_storage;
PyObject *make_tuple(const struct sockaddr_storage *address);
/* The same by way of a table; of an address without length, that of a connection: None. */
PyObject *tuple_of(struct hot *hot, const struct sockaddr_storage *address, Py_ssize_t length);
/* And back, of a literal address (host, port, ...): what the system takes, in bytes; NULL, perhaps without an exception. */
PyObject *structure_of(struct hot *hot, int family, PyObject *tuple);
/* Receive for the ReceiveFromStream `op` what there is, up to `most` datagrams, and deliver each.  Their number; -1 with an
 * exception; NOT_PLAIN for the way in Python. */
int receive_datagrams_for(struct hot *hot, PyObject *driver, PyObject *op, int most);
enum { NOT_PLAIN = -2 };
PyObject *receive_datagrams(PyObject *module, PyObject *args);
PyObject *receive_datagram_now(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *send_datagram(PyObject *module, PyObject *const *args, Py_ssize_t count);
int add_datagrams(struct hot *hot);

/* Whether a list or a deque has anything in it; both keep their size where var-sized objects do. */
static inline int has_items(PyObject *object) { return object != NULL && Py_SIZE(object) > 0; }

PyObject *set_helpers(PyObject *module, PyObject *args);
PyObject *use_operations(PyObject *module, PyObject *operations);
int intern_names(struct hot *hot);
int check_sockets(struct hot *hot);

int add_requests(struct hot *hot); /* proactor.c */
PyObject *life_steps(PyObject *module, PyObject *ignored); /* life.c */
PyObject *make_stream_type(PyObject *module, PyObject *args);
PyObject *set_most_at_once(PyObject *module, PyObject *size); /* streams.c */
int add_readers(struct hot *hot);
PyObject *use_reader(PyObject *module, PyObject *class);
PyObject *make_tls_types(PyObject *module, PyObject *args);
#ifdef __linux__
#include <time.h>

/* Once so many bytes have been delivered, the rest of a batch waits for the next turn: what callbacks and tasks make of
 * them comes first, while they are still in the cache.  A wait in between returns at once. */
enum { DELIVER_MOST = 256 * 1024 };

/* ahead.c.  `ops` (borrowed, AHEAD at most) will be completed next: fetch what that will touch. */
enum { AHEAD = 16 };
void look_ahead(const struct hot *hot, PyObject *const *ops, int count);
/* Fetch so many bytes, about to be used, into the caches; any address will do. */
enum { CACHE_LINE = 64 };
static inline void fetch(const void *where, size_t size)
{
    for (size_t n = 0; n < size; n += CACHE_LINE)
        __builtin_prefetch((const char *)where + n, 1);
    __builtin_prefetch((const char *)where + size - 1, 1); /* it may lie across one line more */
}
/* streams.c: fetch a stream transport, or what would be one; then, from one, what it refers to. */
void fetch_stream(const struct hot *hot, PyObject *self);
void fetch_stream_parts(const struct hot *hot, PyObject *self);

static inline int64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

#endif

#endif
