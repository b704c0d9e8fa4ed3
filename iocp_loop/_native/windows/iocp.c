/* I/O completion ports for iocp_loop: one C function per request, each of them one call for Python.
 *
 * How it works.  A completion port is a queue in the kernel.  A handle is associated with it once; from then on every
 * overlapped request on that handle ends in an entry of the queue, with the address of the OVERLAPPED that the request
 * was made with.  Python keeps a table from that address to what it stands for.
 *
 * What the functions return.  0: done, at once.  ERROR_IO_PENDING: the kernel has it.  Anything else: a Windows error
 * code, and the kernel has nothing.  The code comes from GetLastError or WSAGetLastError right here, in the same thread
 * and before anything else can run; Python never asks for it afterwards.
 *
 * "Done at once" means two things.  On a handle that skips (SetFileCompletionNotificationModes with
 * FILE_SKIP_COMPLETION_PORT_ON_SUCCESS) no entry follows and `bytes` has the result.  On others an entry follows all
 * the same, and Python must wait for it.  Only providers whose sockets are real file handles (IFS) may skip: layered
 * ones post entries that the kernel does not know of.
 *
 * Who owns what.  A submission and the buffers it names belong to the kernel from the call until the entry is taken
 * off the queue.  The arrays of WSABUFs and sockaddrs do not: Winsock copies the first at the call, and the second
 * stand in the submission.
 *
 * Statuses.  An entry carries an NTSTATUS (in OVERLAPPED.Internal).  For sockets it is translated to what Winsock's
 * own functions would have said (WSAECONNRESET, where the general translation says ERROR_NETNAME_DELETED).
 *
 * A request that its thread left behind.  Windows carries a request on when the thread that made it ends, if the handle
 * has a port.  Wine has the thread itself write the result; if it ends just then, the entry comes with the status still
 * pending.  Such a request is given back as ERROR_RETRY: it has not been carried out to the end, and can be made again.
 *
 * Manuals (https://learn.microsoft.com/windows/win32/...): fileio/i-o-completion-ports, winsock/overlapped-i-o-and-
 * event-objects-2, api/mswsock/nf-mswsock-acceptex, api/mswsock/nc-mswsock-lpfn_connectex, ipc/named-pipes.
 */

#define WIN32_NO_STATUS
#include <winsock2.h>
#include <mswsock.h>
#include <ws2tcpip.h>
#include <windows.h>
#include <winternl.h>
#undef WIN32_NO_STATUS
#include <ntstatus.h>

#include "iocp.h"

static OVERLAPPED *overlapped_of(iocp_submission *sub) { return (void *)sub->overlapped; }

static void *area_of(iocp_submission *sub) { return sub->area; }

typedef char types_agree[IOCP_DISK == FILE_TYPE_DISK && IOCP_DEVICE == FILE_TYPE_CHAR && IOCP_PIPE == FILE_TYPE_PIPE
                             ? 1 : -1];
typedef char overlapped_fits[sizeof(OVERLAPPED) == sizeof(((iocp_submission *)0)->overlapped) ? 1 : -1];
typedef char accept_fits[2 * (sizeof(SOCKADDR_STORAGE) + 16) <= IOCP_AREA_SIZE ? 1 : -1];
typedef char host_fits[INET6_ADDRSTRLEN <= IOCP_HOST_SIZE ? 1 : -1];

/* ---------------------------------------------------------------------------------------------------------------------
 * What older headers lack, and what is found at run time
 * ------------------------------------------------------------------------------------------------------------------ */

#ifndef CREATE_WAITABLE_TIMER_HIGH_RESOLUTION /* api/synchapi/nf-synchapi-createwaitabletimerexw, Windows 10 1803 */
#define CREATE_WAITABLE_TIMER_HIGH_RESOLUTION 0x00000002
#endif
#ifndef SIO_BASE_HANDLE /* winsock/winsock-ioctls */
#define SIO_BASE_HANDLE 0x48000022
#endif
#ifndef SIO_BSP_HANDLE_POLL
#define SIO_BSP_HANDLE_POLL 0x4800001D
#endif

/* drivers/ddi/ntifs/nf-ntifs-ntqueryinformationfile: FileModeInformation */
#define FILE_MODE_INFORMATION_CLASS 16

typedef NTSTATUS(NTAPI *query_information_file)(HANDLE, IO_STATUS_BLOCK *, void *, ULONG, int);

/* win32/devnotes/nt*waitcompletionpacket (Windows 8): a wait for a handle that ends in an entry of a port. */
typedef NTSTATUS(NTAPI *create_wait_packet)(HANDLE *, ACCESS_MASK, OBJECT_ATTRIBUTES *);
typedef NTSTATUS(NTAPI *associate_wait_packet)(HANDLE, HANDLE, HANDLE, void *, void *, NTSTATUS, ULONG_PTR, BOOLEAN *);
typedef NTSTATUS(NTAPI *cancel_wait_packet)(HANDLE, BOOLEAN);

static struct {
    LPFN_ACCEPTEX accept_ex;
    LPFN_GETACCEPTEXSOCKADDRS accept_addresses;
    LPFN_CONNECTEX connect_ex;
    LPFN_DISCONNECTEX disconnect_ex;
    LPFN_TRANSMITFILE transmit_file;
    query_information_file query_information;
    create_wait_packet create_packet; /* the three packet functions are all there or all NULL */
    associate_wait_packet associate_packet;
    cancel_wait_packet cancel_packet;
} found;

static DWORD error_of_status(NTSTATUS status)
{
    return status == STATUS_PENDING ? ERROR_IO_PENDING : RtlNtStatusToDosError(status);
}

/* What Winsock says for a status.  RtlNtStatusToDosError speaks of files and network drives instead. */
static DWORD socket_error_of_status(NTSTATUS status)
{
    if (status == STATUS_SUCCESS)
        return 0;
    switch (status) {
    case STATUS_CANCELLED:
        return ERROR_OPERATION_ABORTED;
    case STATUS_BUFFER_OVERFLOW: /* a datagram larger than the buffer */
        return WSAEMSGSIZE;
    case STATUS_CONNECTION_RESET:
    case STATUS_CONNECTION_DISCONNECTED:
    case STATUS_REMOTE_DISCONNECT:
    case STATUS_PORT_UNREACHABLE:
        return WSAECONNRESET;
    case STATUS_LOCAL_DISCONNECT:
    case STATUS_CONNECTION_ABORTED:
    case STATUS_TRANSACTION_ABORTED:
        return WSAECONNABORTED;
    case STATUS_CONNECTION_REFUSED:
        return WSAECONNREFUSED;
    case STATUS_LINK_TIMEOUT:
    case STATUS_IO_TIMEOUT:
        return WSAETIMEDOUT;
    case STATUS_NETWORK_UNREACHABLE:
    case STATUS_PROTOCOL_UNREACHABLE:
        return WSAENETUNREACH;
    case STATUS_HOST_UNREACHABLE:
        return WSAEHOSTUNREACH;
    case STATUS_GRACEFUL_DISCONNECT:
        return WSAEDISCON;
    case STATUS_INVALID_CONNECTION:
    case STATUS_CONNECTION_INVALID:
        return WSAENOTCONN;
    case STATUS_ADDRESS_ALREADY_EXISTS:
        return WSAEADDRINUSE;
    case STATUS_INVALID_ADDRESS_COMPONENT:
        return WSAEADDRNOTAVAIL;
    case STATUS_INSUFFICIENT_RESOURCES:
    case STATUS_REMOTE_RESOURCES:
    case STATUS_PAGEFILE_QUOTA:
        return WSAENOBUFS;
    case STATUS_INVALID_HANDLE:
    case STATUS_OBJECT_TYPE_MISMATCH:
        return WSAENOTSOCK;
    default:
        return error_of_status(status);
    }
}

static DWORD extension(SOCKET s, GUID id, void *function)
{
    DWORD bytes = 0;
    /* winsock/winsock-ioctls, SIO_GET_EXTENSION_FUNCTION_POINTER */
    if (WSAIoctl(s, SIO_GET_EXTENSION_FUNCTION_POINTER, &id, sizeof id, function, sizeof(void *), &bytes, NULL, NULL))
        return WSAGetLastError();
    return 0;
}

/* Console control events (console/handlerroutine).  A thread that waits on a port does not hear of Ctrl-C, so each
 * event wakes every port.  Windows calls the newest handler first: ours comes before the C runtime's, through which
 * Python learns of the event, perhaps much later.  So whoever was woken must look again: for a while after an event
 * no wait is long (see iocp_wait).
 *
 * When the console is closed, the user logs off or Windows shuts down, the process is ended as soon as a handler has
 * dealt with the event, the C runtime's too.  So if a signal stands for that (iocp_set_closing_signal), we send it
 * ourselves and keep this thread: what is left of the time that Windows grants (5 s for a closed console) is the
 * program's.  If it ends earlier by itself, all the better. */

enum { MAX_CONSOLE_PORTS = 64, AFTER_EVENT_MS = 1000, SHORT_WAIT_MS = 10, CLOSING_MS = 30000 };

int PyErr_SetInterruptEx(int signum); /* c-api/exceptions: from any thread, without the GIL */

static SRWLOCK console_lock = SRWLOCK_INIT;
static HANDLE console_ports[MAX_CONSOLE_PORTS];
static volatile LONG64 console_event_at = -AFTER_EVENT_MS;

static volatile LONG closing_signal = 0;

static BOOL WINAPI on_console_event(DWORD event)
{
    /* The others (Ctrl-C, Ctrl-Break) reach Python through the C runtime. */
    BOOL closing = closing_signal
                   && (event == CTRL_CLOSE_EVENT || event == CTRL_LOGOFF_EVENT || event == CTRL_SHUTDOWN_EVENT);
    if (closing)
        PyErr_SetInterruptEx(closing_signal);
    InterlockedExchange64(&console_event_at, (LONG64)GetTickCount64());
    AcquireSRWLockShared(&console_lock);
    for (int n = 0; n < MAX_CONSOLE_PORTS; n++)
        if (console_ports[n] != NULL)
            PostQueuedCompletionStatus(console_ports[n], 0, IOCP_KEY_WAKE, NULL);
    ReleaseSRWLockShared(&console_lock);
    if (closing)
        Sleep(CLOSING_MS); /* longer than Windows waits */
    return closing;        /* FALSE, not handled: on to the C runtime and Python */
}

/* Which signal of Python a closed console, a log-off and a shutdown are; 0: none, they end the process. */
void iocp_set_closing_signal(int number) { InterlockedExchange(&closing_signal, number); }

/* Put `new` where `old` stands. */
static void replace_console_port(HANDLE old, HANDLE new)
{
    AcquireSRWLockExclusive(&console_lock);
    for (int n = 0; n < MAX_CONSOLE_PORTS; n++)
        if (console_ports[n] == old) {
            console_ports[n] = new;
            break;
        }
    ReleaseSRWLockExclusive(&console_lock);
}

/* Find everything that must be looked up at run time.  Once per process; 0 or an error code. */
long iocp_start(void)
{
    static SRWLOCK lock = SRWLOCK_INIT;
    static BOOL started = FALSE;
    DWORD error = 0;

    AcquireSRWLockExclusive(&lock);
    if (!started) {
        SOCKET s = WSASocketW(AF_INET, SOCK_STREAM, IPPROTO_TCP, NULL, 0, WSA_FLAG_OVERLAPPED);
        HMODULE ntdll = GetModuleHandleW(L"ntdll.dll");
        if (s == INVALID_SOCKET)
            error = WSAGetLastError();
        if (!error)
            error = extension(s, (GUID)WSAID_ACCEPTEX, &found.accept_ex);
        if (!error)
            error = extension(s, (GUID)WSAID_GETACCEPTEXSOCKADDRS, &found.accept_addresses);
        if (!error)
            error = extension(s, (GUID)WSAID_CONNECTEX, &found.connect_ex);
        if (!error)
            error = extension(s, (GUID)WSAID_DISCONNECTEX, &found.disconnect_ex);
        if (!error)
            error = extension(s, (GUID)WSAID_TRANSMITFILE, &found.transmit_file);
        if (s != INVALID_SOCKET)
            closesocket(s);
        found.query_information = (query_information_file)(void *)GetProcAddress(ntdll, "NtQueryInformationFile");
        found.create_packet = (create_wait_packet)(void *)GetProcAddress(ntdll, "NtCreateWaitCompletionPacket");
        found.associate_packet = (associate_wait_packet)(void *)GetProcAddress(ntdll, "NtAssociateWaitCompletionPacket");
        found.cancel_packet = (cancel_wait_packet)(void *)GetProcAddress(ntdll, "NtCancelWaitCompletionPacket");
        if (!found.associate_packet || !found.cancel_packet)
            found.create_packet = NULL;
        if (!error)
            SetConsoleCtrlHandler(on_console_event, TRUE);
        started = !error;
    }
    ReleaseSRWLockExclusive(&lock);
    return error;
}

/* Whether waits for handles need no thread of the pool: 1 from Windows 8 on. */
int iocp_has_wait_packets(void) { return found.create_packet != NULL; }

/* ---------------------------------------------------------------------------------------------------------------------
 * The port
 * ------------------------------------------------------------------------------------------------------------------ */

/* fileio/createiocompletionport.  `concurrency`: threads that run at once; 0: as many as there are processors. */
long iocp_port_open(iocp_port *port, unsigned long concurrency)
{
    HANDLE handle = CreateIoCompletionPort(INVALID_HANDLE_VALUE, NULL, 0, concurrency);
    if (handle == NULL)
        return GetLastError();
    port->handle = (uintptr_t)handle;
    port->count = 0;
    port->timer = port->timer_packet = 0;
    if (found.create_packet != NULL) {
        HANDLE packet = NULL;
        HANDLE timer = CreateWaitableTimerExW(NULL, NULL, CREATE_WAITABLE_TIMER_HIGH_RESOLUTION, TIMER_ALL_ACCESS);
        if (timer != NULL && found.create_packet(&packet, GENERIC_ALL, NULL) == STATUS_SUCCESS) {
            port->timer = (uintptr_t)timer;
            port->timer_packet = (uintptr_t)packet;
        } else if (timer != NULL)
            CloseHandle(timer);
    }
    replace_console_port(NULL, handle);
    return 0;
}

void iocp_port_close(iocp_port *port)
{
    replace_console_port((HANDLE)port->handle, NULL);
    if (port->timer_packet) {
        CloseHandle((HANDLE)port->timer_packet);
        CloseHandle((HANDLE)port->timer);
    }
    CloseHandle((HANDLE)port->handle);
    port->handle = port->timer = port->timer_packet = 0;
}

/* Let an entry without a submission come out of the port in `timeout_ns`.  GetQueuedCompletionStatusEx counts in
 * ticks of the system's clock, up to 15.6 ms long; the high-resolution timer keeps to half a millisecond. */
static BOOL start_timer(iocp_port *port, long long timeout_ns)
{
    LARGE_INTEGER due;
    BOOLEAN signalled = FALSE;
    due.QuadPart = -((timeout_ns + 99) / 100); /* relative, in units of 100 ns, rounded up: never early */
    if (!SetWaitableTimerEx((HANDLE)port->timer, &due, 0, NULL, NULL, NULL, 0))
        return FALSE;
    return found.associate_packet((HANDLE)port->timer_packet, (HANDLE)port->handle, (HANDLE)port->timer,
                                  (void *)IOCP_KEY_WAKE, NULL, STATUS_SUCCESS, 0, &signalled) == STATUS_SUCCESS;
}

/* Wait at most `timeout_ns` nanoseconds (negative: without limit) and take up to IOCP_BATCH_SIZE completions off the
 * port into port->batch.  0, or an error code; a wait that ran out is no error.  What the last wait left in the batch
 * and nobody took (port->count is not 0) comes first: then the kernel is not asked. */
long iocp_wait(iocp_port *port, long long timeout_ns)
{
    OVERLAPPED_ENTRY entries[IOCP_BATCH_SIZE];
    ULONG count = 0;
    DWORD timeout_ms, error = 0;
    BOOL timed = FALSE;
    uintptr_t *out = port->batch;

    if (port->count)
        return 0;
    if (timeout_ns && (LONG64)GetTickCount64() - console_event_at < AFTER_EVENT_MS
        && (timeout_ns < 0 || timeout_ns > SHORT_WAIT_MS * 1000000LL))
        timeout_ns = SHORT_WAIT_MS * 1000000LL;
    if (timeout_ns < 0)
        timeout_ms = INFINITE;
    else if (timeout_ns > 0x7FFFFFFFLL * 1000000LL)
        timeout_ms = 0x7FFFFFFF;
    else
        timeout_ms = (DWORD)((timeout_ns + 999999) / 1000000);
    if (port->timer && timeout_ns > 0 && timeout_ns < 32000000LL) {
        timed = start_timer(port, timeout_ns);
        if (timed)
            timeout_ms = INFINITE;
    }
    if (!GetQueuedCompletionStatusEx((HANDLE)port->handle, entries, IOCP_BATCH_SIZE, &count, timeout_ms, FALSE)) {
        error = GetLastError();
        count = 0;
        if (error == WAIT_TIMEOUT)
            error = 0;
    }
    if (timed)
        found.cancel_packet((HANDLE)port->timer_packet, TRUE);
    for (ULONG n = 0; n < count; n++) {
        const OVERLAPPED *overlapped = entries[n].lpOverlapped;
        if (overlapped == NULL)
            continue; /* it has done its work: the wait is over */
        out[0] = (uintptr_t)overlapped;
        out[1] = entries[n].dwNumberOfBytesTransferred;
        if (overlapped->Internal == (ULONG_PTR)STATUS_PENDING)
            out[2] = ERROR_RETRY;
        else if (entries[n].lpCompletionKey == IOCP_KEY_SOCKET)
            out[2] = socket_error_of_status((NTSTATUS)overlapped->Internal);
        else
            out[2] = error_of_status((NTSTATUS)overlapped->Internal);
        out += 3;
    }
    port->count = (long)(out - port->batch) / 3;
    return error;
}

/* fileio/postqueuedcompletionstatus: end a wait.  From any thread. */
long iocp_post(iocp_port *port)
{
    return PostQueuedCompletionStatus((HANDLE)port->handle, 0, IOCP_KEY_WAKE, NULL) ? 0 : GetLastError();
}

static long associate(iocp_port *port, HANDLE handle, ULONG_PTR key)
{
    return CreateIoCompletionPort(handle, (HANDLE)port->handle, key, 0) != NULL ? 0 : GetLastError();
}

/* Bytes moved at once need no entry then; and no event on the handle is set, which nobody waits for. */
static int let_skip(HANDLE handle)
{
    return SetFileCompletionNotificationModes(handle, FILE_SKIP_COMPLETION_PORT_ON_SUCCESS
                                                          | FILE_SKIP_SET_EVENT_ON_HANDLE);
}

/* ERROR_INVALID_PARAMETER: the socket belongs to a port already.  `skips` tells whether "done at once" is final. */
long iocp_associate_socket(iocp_port *port, uintptr_t socket, int *skips)
{
    WSAPROTOCOL_INFOW info;
    int size = sizeof info;
    long error = associate(port, (HANDLE)socket, IOCP_KEY_SOCKET);
    *skips = 0;
    if (error)
        return error;
    if (getsockopt(socket, SOL_SOCKET, SO_PROTOCOL_INFOW, (char *)&info, &size) == 0
        && (info.dwServiceFlags1 & XP1_IFS_HANDLES) && info.iSocketType == SOCK_STREAM)
        /* Streams only: a WSARecvFrom that fails at once is not always reported as it should be. */
        *skips = let_skip((HANDLE)socket);
    return 0;
}

/* ERROR_INVALID_PARAMETER: it belongs to a port already, or has no overlapped I/O (see iocp_is_synchronous).
 *
 * A pipe that is read by messages does not skip: a message longer than the buffer is neither a success nor an error
 * (ERROR_MORE_DATA, see iocp_read), and only without skipping is it sure that an entry follows. */
long iocp_associate_file(iocp_port *port, uintptr_t handle, int *skips)
{
    DWORD mode = 0;
    long error = associate(port, (HANDLE)handle, IOCP_KEY_FILE);
    *skips = 0;
    if (error)
        return error;
    if (!GetNamedPipeHandleStateW((HANDLE)handle, &mode, NULL, NULL, NULL, NULL, 0) || !(mode & PIPE_READMODE_MESSAGE))
        *skips = let_skip((HANDLE)handle);
    return 0;
}

/* 1 if the handle was opened without FILE_FLAG_OVERLAPPED: its requests block, and no port can have it.
 *
 * Wine does not tell the mode of pipes and consoles.  There the second question answers: a handle without overlapped
 * I/O has no notification modes, and to add none to those of another changes nothing. */
int iocp_is_synchronous(uintptr_t handle)
{
    IO_STATUS_BLOCK status = {0};
    ULONG mode = 0;
    if (found.query_information != NULL
        && found.query_information((HANDLE)handle, &status, &mode, sizeof mode, FILE_MODE_INFORMATION_CLASS) >= 0)
        return (mode & (FILE_SYNCHRONOUS_IO_ALERT | FILE_SYNCHRONOUS_IO_NONALERT)) != 0;
    return !SetFileCompletionNotificationModes((HANDLE)handle, 0) && GetLastError() == ERROR_INVALID_PARAMETER;
}

/* fileio/cancelioex.  A request: the completion still comes.  ERROR_NOT_FOUND: it is on the port already. */
long iocp_cancel(iocp_submission *sub)
{
    return CancelIoEx((HANDLE)sub->handle, overlapped_of(sub)) ? 0 : GetLastError();
}

long iocp_close_socket(uintptr_t socket) { return closesocket(socket) == 0 ? 0 : WSAGetLastError(); }

long iocp_close_handle(uintptr_t handle) { return CloseHandle((HANDLE)handle) ? 0 : GetLastError(); }

/* ---------------------------------------------------------------------------------------------------------------------
 * Sockets
 * ------------------------------------------------------------------------------------------------------------------ */

/* Ready the submission for its next request, keeping the event of an emulated one (see iocp_emulate). */
static OVERLAPPED *prepare(iocp_submission *sub, uintptr_t handle)
{
    OVERLAPPED *overlapped = overlapped_of(sub);
    ZeroMemory(overlapped, sizeof *overlapped);
    overlapped->hEvent = (HANDLE)(sub->event ? sub->event | 1 : 0);
    sub->handle = handle;
    sub->bytes = 0;
    return overlapped;
}

static long socket_result(int failed) { return failed ? WSAGetLastError() : 0; }

static long file_result(BOOL done) { return done ? 0 : GetLastError(); }

/* winsock2/nf-winsock2-wsarecv.  With size 0 it waits until something can be received, and receives nothing. */
long iocp_receive(uintptr_t socket, iocp_submission *sub, void *buffer, unsigned long size)
{
    OVERLAPPED *overlapped = prepare(sub, socket);
    WSABUF piece = {size, buffer};
    sub->flags = 0;
    return socket_result(WSARecv(socket, &piece, 1, &sub->bytes, &sub->flags, overlapped, NULL));
}

/* winsock2/nf-winsock2-wsasend */
long iocp_send(uintptr_t socket, iocp_submission *sub, const void *buffer, unsigned long size)
{
    OVERLAPPED *overlapped = prepare(sub, socket);
    WSABUF piece = {size, (char *)buffer};
    return socket_result(WSASend(socket, &piece, 1, &sub->bytes, 0, overlapped, NULL));
}

long iocp_send_gathered(uintptr_t socket, iocp_submission *sub, int count, void **buffers, unsigned long *sizes)
{
    OVERLAPPED *overlapped = prepare(sub, socket);
    WSABUF pieces[IOCP_GATHER_LIMIT];
    if (count > IOCP_GATHER_LIMIT)
        return WSAEINVAL;
    for (int n = 0; n < count; n++) {
        pieces[n].buf = buffers[n];
        pieces[n].len = sizes[n];
    }
    return socket_result(WSASend(socket, pieces, count, &sub->bytes, 0, overlapped, NULL));
}

/* winsock2/nf-winsock2-wsarecvfrom.  The sender's address is in the submission then. */
long iocp_receive_from(uintptr_t socket, iocp_submission *sub, void *buffer, unsigned long size)
{
    OVERLAPPED *overlapped = prepare(sub, socket);
    WSABUF piece = {size, buffer};
    sub->flags = 0;
    sub->address_length = IOCP_AREA_SIZE;
    return socket_result(WSARecvFrom(socket, &piece, 1, &sub->bytes, &sub->flags, area_of(sub),
                                     &sub->address_length, overlapped, NULL));
}

/* winsock2/nf-winsock2-wsasendto, to the address in the submission (iocp_set_address). */
long iocp_send_to(uintptr_t socket, iocp_submission *sub, const void *buffer, unsigned long size)
{
    OVERLAPPED *overlapped = prepare(sub, socket);
    WSABUF piece = {size, (char *)buffer};
    return socket_result(WSASendTo(socket, &piece, 1, &sub->bytes, 0, area_of(sub), sub->address_length,
                                   overlapped, NULL));
}

enum { ADDRESS_ROOM = sizeof(SOCKADDR_STORAGE) + 16 };

/* mswsock/nf-mswsock-acceptex.  The socket for the connection is made here, not inherited by child processes; it is
 * in sub->accepted, and the caller's to close unless the connection is taken over. */
long iocp_accept(uintptr_t listener, iocp_submission *sub, int family, int type, int protocol)
{
    OVERLAPPED *overlapped = prepare(sub, listener);
    SOCKET s = WSASocketW(family, type, protocol, NULL, 0, WSA_FLAG_OVERLAPPED | WSA_FLAG_NO_HANDLE_INHERIT);
    long error;
    sub->accepted = 0;
    if (s == INVALID_SOCKET)
        return WSAGetLastError();
    ZeroMemory(sub->area, sizeof sub->area); /* no address, should the entry come without one */
    error = socket_result(!found.accept_ex(listener, s, sub->area, 0, ADDRESS_ROOM, ADDRESS_ROOM, &sub->bytes,
                                           overlapped));
    if (error && error != ERROR_IO_PENDING)
        closesocket(s);
    else
        sub->accepted = s;
    return error;
}

/* Make the accepted socket one that knows its listener (SO_UPDATE_ACCEPT_CONTEXT: getpeername, shutdown and the rest
 * fail without it), and leave the peer's address in the submission. */
long iocp_accept_finish(uintptr_t listener, iocp_submission *sub)
{
    SOCKADDR *local = NULL, *remote = NULL;
    int local_length = 0, remote_length = 0;
    SOCKET parent = listener;
    if (setsockopt(sub->accepted, SOL_SOCKET, SO_UPDATE_ACCEPT_CONTEXT, (char *)&parent, sizeof parent))
        return WSAGetLastError();
    found.accept_addresses(sub->area, 0, ADDRESS_ROOM, ADDRESS_ROOM, &local, &local_length, &remote, &remote_length);
    MoveMemory(sub->area, remote, remote_length);
    sub->address_length = remote_length;
    return 0;
}

/* mswsock/nc-mswsock-lpfn_connectex, to the address in the submission.  ConnectEx wants a bound socket; one that is
 * not yet gets any address and port. */
long iocp_connect(uintptr_t socket, iocp_submission *sub)
{
    OVERLAPPED *overlapped = prepare(sub, socket);
    const SOCKADDR *address = area_of(sub);
    SOCKADDR_STORAGE own;
    int length = sizeof own;
    if (getsockname(socket, (SOCKADDR *)&own, &length) != 0) {
        if (WSAGetLastError() != WSAEINVAL)
            return WSAGetLastError();
        ZeroMemory(&own, sizeof own);
        own.ss_family = address->sa_family;
        if (bind(socket, (SOCKADDR *)&own, sub->address_length) != 0)
            return WSAGetLastError();
    }
    return socket_result(
        !found.connect_ex(socket, address, sub->address_length, NULL, 0, &sub->bytes, overlapped));
}

/* SO_UPDATE_CONNECT_CONTEXT: without it the connected socket knows neither its peer nor shutdown. */
long iocp_connect_finish(uintptr_t socket)
{
    return socket_result(setsockopt(socket, SOL_SOCKET, SO_UPDATE_CONNECT_CONTEXT, NULL, 0));
}

/* mswsock/nc-mswsock-lpfn_disconnectex */
long iocp_disconnect(uintptr_t socket, iocp_submission *sub)
{
    OVERLAPPED *overlapped = prepare(sub, socket);
    return socket_result(!found.disconnect_ex(socket, overlapped, 0, 0));
}

/* mswsock/nf-mswsock-transmitfile: `count` bytes (at most 2 GiB - 1) of `file` from `offset` on. */
long iocp_transmit_file(uintptr_t socket, iocp_submission *sub, uintptr_t file, unsigned long long offset,
                        unsigned long count)
{
    OVERLAPPED *overlapped = prepare(sub, socket);
    overlapped->Offset = (DWORD)offset;
    overlapped->OffsetHigh = (DWORD)(offset >> 32);
    return socket_result(!found.transmit_file(socket, (HANDLE)file, count, 0, overlapped, NULL, 0));
}

/* Put a numeric address (an IPv6 one perhaps with %scope) into the submission. */
long iocp_set_address(iocp_submission *sub, int family, const char *host, int port, unsigned long flow,
                      unsigned long scope)
{
    ADDRINFOA hints, *info = NULL;
    int error;
    ZeroMemory(&hints, sizeof hints);
    hints.ai_family = family;
    hints.ai_flags = AI_NUMERICHOST;
    error = getaddrinfo(host, NULL, &hints, &info);
    if (error)
        return error;
    CopyMemory(sub->area, info->ai_addr, info->ai_addrlen);
    sub->address_length = (int)info->ai_addrlen;
    freeaddrinfo(info);
    if (family == AF_INET6) {
        SOCKADDR_IN6 *six = area_of(sub);
        six->sin6_port = htons((u_short)port);
        six->sin6_flowinfo = htonl(flow);
        if (scope)
            six->sin6_scope_id = scope;
    } else {
        SOCKADDR_IN *four = area_of(sub);
        four->sin_port = htons((u_short)port);
    }
    return 0;
}

/* Read the address in the submission: its text, and port, flow label and scope.  WSAEAFNOSUPPORT for a family that
 * has other addresses. */
long iocp_get_address(iocp_submission *sub, char *host, unsigned long *numbers)
{
    const SOCKADDR *address = area_of(sub);
    numbers[0] = numbers[1] = numbers[2] = 0;
    if (sub->address_length >= (int)sizeof(SOCKADDR_IN) && address->sa_family == AF_INET) {
        SOCKADDR_IN *four = (SOCKADDR_IN *)address;
        numbers[0] = ntohs(four->sin_port);
        return inet_ntop(AF_INET, &four->sin_addr, host, IOCP_HOST_SIZE) ? 0 : WSAGetLastError();
    }
    if (sub->address_length >= (int)sizeof(SOCKADDR_IN6) && address->sa_family == AF_INET6) {
        SOCKADDR_IN6 *six = (SOCKADDR_IN6 *)address;
        numbers[0] = ntohs(six->sin6_port);
        numbers[1] = ntohl(six->sin6_flowinfo);
        numbers[2] = six->sin6_scope_id;
        return inet_ntop(AF_INET6, &six->sin6_addr, host, IOCP_HOST_SIZE) ? 0 : WSAGetLastError();
    }
    return WSAEAFNOSUPPORT;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Files and pipes
 * ------------------------------------------------------------------------------------------------------------------ */

/* fileapi/nf-fileapi-readfile.  Pipes ignore the offset.  Of a message longer than the buffer (ERROR_MORE_DATA) the
 * rest stays in the pipe; its entry follows. */
long iocp_read(uintptr_t handle, iocp_submission *sub, void *buffer, unsigned long size, unsigned long long offset)
{
    OVERLAPPED *overlapped = prepare(sub, handle);
    long error;
    overlapped->Offset = (DWORD)offset;
    overlapped->OffsetHigh = (DWORD)(offset >> 32);
    error = file_result(ReadFile((HANDLE)handle, buffer, size, &sub->bytes, overlapped));
    return error == ERROR_MORE_DATA ? ERROR_IO_PENDING : error;
}

/* fileapi/nf-fileapi-writefile */
long iocp_write(uintptr_t handle, iocp_submission *sub, const void *buffer, unsigned long size,
                unsigned long long offset)
{
    OVERLAPPED *overlapped = prepare(sub, handle);
    overlapped->Offset = (DWORD)offset;
    overlapped->OffsetHigh = (DWORD)(offset >> 32);
    return file_result(WriteFile((HANDLE)handle, buffer, size, &sub->bytes, overlapped));
}

/* namedpipeapi/nf-namedpipeapi-createnamedpipew: one more instance of a server's end, in byte mode.  `first`: it must
 * be the first of its name. */
long iocp_pipe_serve(const wchar_t *name, int first, unsigned long buffer_size, uintptr_t *handle)
{
    DWORD mode = PIPE_ACCESS_DUPLEX | FILE_FLAG_OVERLAPPED | (first ? FILE_FLAG_FIRST_PIPE_INSTANCE : 0);
    HANDLE pipe = CreateNamedPipeW(name, mode, PIPE_TYPE_BYTE | PIPE_READMODE_BYTE | PIPE_REJECT_REMOTE_CLIENTS,
                                   PIPE_UNLIMITED_INSTANCES, buffer_size, buffer_size, 0, NULL);
    if (pipe == INVALID_HANDLE_VALUE)
        return GetLastError();
    *handle = (uintptr_t)pipe;
    return 0;
}

/* namedpipeapi/nf-namedpipeapi-connectnamedpipe.  A client that was there first is a success like any other, but one
 * that puts no entry on the port: `bytes` is 1 then. */
long iocp_pipe_accept(uintptr_t handle, iocp_submission *sub)
{
    OVERLAPPED *overlapped = prepare(sub, handle);
    long error = file_result(ConnectNamedPipe((HANDLE)handle, overlapped));
    if (error == ERROR_PIPE_CONNECTED) {
        sub->bytes = 1;
        return 0;
    }
    return error;
}

/* fileapi/nf-fileapi-createfilew: a client's end.  ERROR_PIPE_BUSY: no instance is free just now. */
long iocp_pipe_connect(const wchar_t *name, uintptr_t *handle)
{
    HANDLE pipe = CreateFileW(name, GENERIC_READ | GENERIC_WRITE, 0, NULL, OPEN_EXISTING,
                              FILE_FLAG_OVERLAPPED | SECURITY_SQOS_PRESENT | SECURITY_IDENTIFICATION, NULL);
    if (pipe == INVALID_HANDLE_VALUE)
        return GetLastError();
    *handle = (uintptr_t)pipe;
    return 0;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Handles without overlapped I/O: a thread calls these, and blocks in them
 * ------------------------------------------------------------------------------------------------------------------ */

/* fileapi/nf-fileapi-getfiletype: IOCP_DISK, IOCP_DEVICE, IOCP_PIPE, or 0 where the system does not tell. */
unsigned long iocp_file_type(uintptr_t handle) { return GetFileType((HANDLE)handle); }

/* Read once.  ERROR_OPERATION_ABORTED: somebody called iocp_interrupt, or Ctrl-C was pressed while a console was read;
 * that one is a success of 0 bytes to ReadFile, which only the last error tells from the end of the input. */
long iocp_read_blocking(uintptr_t handle, void *buffer, unsigned long size, unsigned long *count)
{
    DWORD bytes = 0, error = 0;
    SetLastError(0);
    if (!ReadFile((HANDLE)handle, buffer, size, &bytes, NULL))
        error = GetLastError();
    else if (bytes == 0 && GetLastError() == ERROR_OPERATION_ABORTED)
        error = ERROR_OPERATION_ABORTED;
    *count = bytes;
    return error;
}

/* Write once. */
long iocp_write_blocking(uintptr_t handle, const void *buffer, unsigned long size, unsigned long *count)
{
    DWORD bytes = 0;
    long error = file_result(WriteFile((HANDLE)handle, buffer, size, &bytes, NULL));
    *count = bytes;
    return error;
}

/* fileio/cancelsynchronousio-func: get a thread out of the request that it blocks in.  ERROR_NOT_FOUND: it blocks in
 * none just now. */
long iocp_interrupt(unsigned long thread)
{
    HANDLE handle = OpenThread(THREAD_TERMINATE, FALSE, thread);
    long error = 0;
    if (handle == NULL)
        return GetLastError();
    if (!CancelSynchronousIo(handle))
        error = GetLastError();
    CloseHandle(handle);
    return error;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Readiness.  \Device\Afd is the kernel's side of Winsock; its poll request is what select() itself is made of, but
 * overlapped: it completes on the port when one of the events holds.  It is not documented, and has not changed since
 * Windows Vista: libuv, wepoll and Rust's mio rest on it.
 * ------------------------------------------------------------------------------------------------------------------ */

enum {
    AFD_RECEIVE = 0x0001,
    AFD_SEND = 0x0004,
    AFD_DISCONNECT = 0x0008, /* the peer has sent its last byte */
    AFD_ABORT = 0x0010,
    AFD_LOCAL_CLOSE = 0x0020,
    AFD_ACCEPT = 0x0080,
    AFD_CONNECT_FAIL = 0x0100,
    IOCTL_AFD_POLL = 0x00012024
};

typedef struct {
    LARGE_INTEGER timeout;
    ULONG count;
    ULONG exclusive;
    HANDLE socket;
    ULONG events;
    NTSTATUS status;
} poll_request;

typedef char poll_fits[sizeof(poll_request) <= IOCP_AREA_SIZE ? 1 : -1];

/* Open a handle for poll requests and associate it with the port. */
long iocp_poll_open(iocp_port *port, uintptr_t *device)
{
    static const WCHAR name[] = L"\\Device\\Afd\\iocp_loop";
    UNICODE_STRING path = {sizeof name - sizeof *name, sizeof name, (WCHAR *)name};
    OBJECT_ATTRIBUTES attributes;
    IO_STATUS_BLOCK status = {0};
    HANDLE handle = NULL;
    long error;
    InitializeObjectAttributes(&attributes, &path, 0, NULL, NULL);
    error = error_of_status(NtCreateFile(&handle, SYNCHRONIZE, &attributes, &status, NULL, 0,
                                         FILE_SHARE_READ | FILE_SHARE_WRITE, FILE_OPEN, 0, NULL, 0));
    if (error)
        return error;
    error = associate(port, handle, IOCP_KEY_POLL);
    if (error) {
        CloseHandle(handle);
        return error;
    }
    *device = (uintptr_t)handle;
    return 0;
}

/* The provider's own socket beneath a layered one: AFD knows no other. */
long iocp_base_socket(uintptr_t socket, uintptr_t *base)
{
    SOCKET found_socket = INVALID_SOCKET;
    DWORD bytes = 0;
    if (WSAIoctl(socket, SIO_BASE_HANDLE, NULL, 0, &found_socket, sizeof found_socket, &bytes, NULL, NULL) != 0) {
        int error = WSAGetLastError();
        if (error == WSAENOTSOCK)
            return error;
        /* Some layers hide the base handle but answer this one, which winsock/winsock-ioctls lists beside it. */
        if (WSAIoctl(socket, SIO_BSP_HANDLE_POLL, NULL, 0, &found_socket, sizeof found_socket, &bytes, NULL, NULL) != 0)
            return error;
    }
    *base = found_socket;
    return 0;
}

/* Wait for IOCP_READABLE, IOCP_WRITABLE or both.  An entry always follows, unless this returns an error. */
long iocp_poll(uintptr_t device, iocp_submission *sub, uintptr_t base, unsigned long events)
{
    OVERLAPPED *overlapped = prepare(sub, device);
    poll_request *request = area_of(sub);
    NTSTATUS status;
    request->timeout.QuadPart = INT64_MAX;
    request->count = 1;
    request->exclusive = FALSE;
    request->socket = (HANDLE)base;
    request->status = 0;
    request->events = AFD_ABORT | AFD_LOCAL_CLOSE | AFD_CONNECT_FAIL;
    if (events & IOCP_READABLE)
        request->events |= AFD_RECEIVE | AFD_DISCONNECT | AFD_ACCEPT;
    if (events & IOCP_WRITABLE)
        request->events |= AFD_SEND;
    overlapped->Internal = (ULONG_PTR)STATUS_PENDING;
    /* The status block is the first two words of an OVERLAPPED, as for every request of Win32. */
    status = NtDeviceIoControlFile((HANDLE)device, NULL, NULL, overlapped, (IO_STATUS_BLOCK *)overlapped,
                                   IOCTL_AFD_POLL, request, sizeof *request, request, sizeof *request);
    return status == STATUS_SUCCESS ? ERROR_IO_PENDING : (long)error_of_status(status);
}

/* What a poll that completed has seen: IOCP_READABLE, IOCP_WRITABLE, IOCP_FAILED, IOCP_CLOSED. */
unsigned long iocp_polled(iocp_submission *sub)
{
    const poll_request *request = area_of(sub);
    unsigned long events = 0;
    if (request->count == 0)
        return 0;
    if (request->events & (AFD_RECEIVE | AFD_DISCONNECT | AFD_ACCEPT))
        events |= IOCP_READABLE;
    if (request->events & AFD_SEND)
        events |= IOCP_WRITABLE;
    if (request->events & (AFD_ABORT | AFD_CONNECT_FAIL))
        events |= IOCP_FAILED;
    if (request->events & AFD_LOCAL_CLOSE)
        events |= IOCP_CLOSED;
    return events;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * Waits for handles, and sockets of other ports
 * ------------------------------------------------------------------------------------------------------------------ */

static VOID CALLBACK post_submission(PVOID context, BOOLEAN timed_out)
{
    iocp_submission *sub = context;
    const OVERLAPPED *overlapped = overlapped_of(sub);
    DWORD bytes = sub->event ? (DWORD)overlapped->InternalHigh : 0;
    HANDLE port = (HANDLE)sub->port;
    ULONG_PTR key = (ULONG_PTR)sub->wait_key;
    (void)timed_out;
    InterlockedExchange(&sub->posted, 1);
    PostQueuedCompletionStatus(port, bytes, key, overlapped_of(sub));
}

/* winbase/nf-winbase-registerwaitforsingleobject: a thread of the system's pool waits and posts. */
static long register_wait(iocp_port *port, iocp_submission *sub, HANDLE handle, long key)
{
    HANDLE wait = NULL;
    sub->port = port->handle;
    sub->wait_key = key;
    sub->posted = 0;
    if (!RegisterWaitForSingleObject(&wait, handle, post_submission, sub, INFINITE,
                                     WT_EXECUTEONLYONCE | WT_EXECUTEINWAITTHREAD))
        return GetLastError();
    sub->wait = (uintptr_t)wait;
    return 0;
}

/* Let a completion come when `handle` (a process, an event, ...) is signalled.  The completion stays to be expected
 * until iocp_unwatch_handle says otherwise; that function must be called in the end, completed or not. */
long iocp_watch_handle(iocp_port *port, iocp_submission *sub, uintptr_t handle)
{
    DWORD flags;
    prepare(sub, handle);
    sub->wait = 0;
    if (!GetHandleInformation((HANDLE)handle, &flags)) /* the pool's thread would have nobody to tell */
        return GetLastError();
    if (found.create_packet != NULL) {
        HANDLE packet = NULL;
        BOOLEAN signalled = FALSE;
        NTSTATUS status = found.create_packet(&packet, GENERIC_ALL, NULL);
        if (status == STATUS_SUCCESS) {
            status = found.associate_packet(packet, (HANDLE)port->handle, (HANDLE)handle, (void *)IOCP_KEY_HANDLE,
                                            overlapped_of(sub), STATUS_SUCCESS, 0, &signalled);
            if (status != STATUS_SUCCESS)
                CloseHandle(packet);
        }
        if (status != STATUS_SUCCESS)
            return error_of_status(status);
        sub->port = 0; /* tells a packet from a registered wait */
        sub->wait = (uintptr_t)packet;
        return ERROR_IO_PENDING;
    }
    long error = register_wait(port, sub, (HANDLE)handle, IOCP_KEY_HANDLE);
    return error ? error : ERROR_IO_PENDING;
}

/* End a watch.  1: its completion is on the port, or was taken from it.  0: none was made, and none will come. */
int iocp_unwatch_handle(iocp_submission *sub)
{
    HANDLE wait = (HANDLE)sub->wait;
    sub->wait = 0;
    if (wait == NULL)
        return 1;
    if (!sub->port) {
        NTSTATUS status = found.cancel_packet(wait, TRUE);
        CloseHandle(wait);
        return status != STATUS_SUCCESS;
    }
    /* Waits for the callback to end if it runs just now; it only posts, so that is at once. */
    UnregisterWaitEx(wait, INVALID_HANDLE_VALUE);
    return sub->posted;
}

/* A handle whose entries go to another port can be used all the same: give the OVERLAPPED an event with its lowest bit
 * set, which keeps the kernel from queueing (fileio/getqueuedcompletionstatus, remarks), and let a registered wait for
 * the event post to ours.  Call this once per submission, before its request. */
long iocp_emulate(iocp_submission *sub)
{
    HANDLE event = CreateEventW(NULL, TRUE, FALSE, NULL);
    if (event == NULL)
        return GetLastError();
    sub->event = (uintptr_t)event;
    sub->wait = 0;
    return 0;
}

/* ... this when the request is pending, with the completion key that it would have had ... */
long iocp_emulate_watch(iocp_port *port, iocp_submission *sub, long key)
{
    return register_wait(port, sub, (HANDLE)sub->event, key);
}

/* ... and this when it is over. */
void iocp_emulate_finish(iocp_submission *sub)
{
    if (sub->wait)
        UnregisterWaitEx((HANDLE)sub->wait, INVALID_HANDLE_VALUE);
    CloseHandle((HANDLE)sub->event);
    sub->event = sub->wait = 0;
}
