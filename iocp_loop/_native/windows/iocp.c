/* I/O completion ports for iocp_loop: one C function per request, each of them one call for Python.  This file has the
 * port itself; iocp.h tells where the requests are.
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

#include "shared.h"

typedef char overlapped_fits[sizeof(OVERLAPPED) == sizeof(((iocp_submission *)0)->overlapped) ? 1 : -1];

/* ---------------------------------------------------------------------------------------------------------------------
 * What older headers lack, and what is found at run time
 * ------------------------------------------------------------------------------------------------------------------ */

#ifndef CREATE_WAITABLE_TIMER_HIGH_RESOLUTION /* api/synchapi/nf-synchapi-createwaitabletimerexw, Windows 10 1803 */
#define CREATE_WAITABLE_TIMER_HIGH_RESOLUTION 0x00000002
#endif

/* drivers/ddi/ntifs/nf-ntifs-ntqueryinformationfile: FileModeInformation */
#define FILE_MODE_INFORMATION_CLASS 16

typedef void (*any_function)(void); /* through which C casts one type of function to another without a complaint */

struct found found;

/* Successes and informational statuses (0x0... and 0x4...) are no errors. */
DWORD error_of_status(NTSTATUS status)
{
    if (status == STATUS_PENDING)
        return ERROR_IO_PENDING;
    return status >= 0 ? 0 : RtlNtStatusToDosError(status);
}

/* What Winsock says for a status.  RtlNtStatusToDosError speaks of files and network drives instead: it has
 * ERROR_BAD_NETPATH, which Python makes FileNotFoundError, where the network can't be reached.  Of what stands in neither
 * table nobody has heard that a socket gets it. */
static const struct {
    NTSTATUS status;
    DWORD error;
} socket_errors[] = {
    {STATUS_CANCELLED, ERROR_OPERATION_ABORTED},
    {STATUS_REQUEST_ABORTED, ERROR_OPERATION_ABORTED},
    /* the connection */
    {STATUS_CONNECTION_RESET, WSAECONNRESET},
    {STATUS_CONNECTION_DISCONNECTED, WSAECONNRESET},
    {STATUS_REMOTE_DISCONNECT, WSAECONNRESET},
    {STATUS_LINK_FAILED, WSAECONNRESET},
    {STATUS_PORT_UNREACHABLE, WSAECONNRESET},
    {STATUS_HOPLIMIT_EXCEEDED, WSAENETRESET},
    {STATUS_LOCAL_DISCONNECT, WSAECONNABORTED},
    {STATUS_CONNECTION_ABORTED, WSAECONNABORTED},
    {STATUS_TRANSACTION_ABORTED, WSAECONNABORTED},
    {STATUS_CONNECTION_REFUSED, WSAECONNREFUSED},
    {STATUS_REMOTE_NOT_LISTENING, WSAECONNREFUSED},
    {STATUS_LINK_TIMEOUT, WSAETIMEDOUT},
    {STATUS_IO_TIMEOUT, WSAETIMEDOUT},
    {STATUS_TIMEOUT, WSAETIMEDOUT},
    {STATUS_GRACEFUL_DISCONNECT, WSAEDISCON},
    {STATUS_PIPE_DISCONNECTED, WSAESHUTDOWN},
    {STATUS_INVALID_CONNECTION, WSAENOTCONN},
    {STATUS_CONNECTION_INVALID, WSAENOTCONN},
    {STATUS_CONNECTION_ACTIVE, WSAEISCONN},
    /* the way there */
    {STATUS_NETWORK_UNREACHABLE, WSAENETUNREACH},
    {STATUS_PROTOCOL_UNREACHABLE, WSAENETUNREACH},
    {STATUS_BAD_NETWORK_PATH, WSAENETUNREACH},
    {STATUS_HOST_UNREACHABLE, WSAEHOSTUNREACH},
    {STATUS_NETWORK_BUSY, WSAENETDOWN},
    {STATUS_INVALID_NETWORK_RESPONSE, WSAENETDOWN},
    {STATUS_UNEXPECTED_NETWORK_ERROR, WSAENETDOWN},
    {STATUS_NO_SUCH_DEVICE, WSAENETDOWN},
    {STATUS_OBJECT_NAME_NOT_FOUND, WSAENETDOWN},
    /* addresses */
    {STATUS_ADDRESS_ALREADY_EXISTS, WSAEADDRINUSE},
    {STATUS_TOO_MANY_ADDRESSES, WSAEADDRINUSE},
    {STATUS_SHARING_VIOLATION, WSAEADDRINUSE},
    {STATUS_CONFLICTING_ADDRESSES, WSAEADDRNOTAVAIL},
    {STATUS_INVALID_ADDRESS, WSAEADDRNOTAVAIL},
    {STATUS_INVALID_ADDRESS_COMPONENT, WSAEADDRNOTAVAIL},
    {STATUS_ACCESS_DENIED, WSAEACCES},
    /* memory and arguments */
    {STATUS_INSUFFICIENT_RESOURCES, WSAENOBUFS},
    {STATUS_REMOTE_RESOURCES, WSAENOBUFS},
    {STATUS_PAGEFILE_QUOTA, WSAENOBUFS},
    {STATUS_QUOTA_EXCEEDED, WSAENOBUFS},
    {STATUS_WORKING_SET_QUOTA, WSAENOBUFS},
    {STATUS_COMMITMENT_LIMIT, WSAENOBUFS},
    {STATUS_NO_MEMORY, WSAENOBUFS},
    {STATUS_BUFFER_OVERFLOW, WSAEMSGSIZE}, /* a datagram larger than the buffer */
    {STATUS_INVALID_BUFFER_SIZE, WSAEMSGSIZE},
    {STATUS_BUFFER_TOO_SMALL, WSAEFAULT},
    {STATUS_ACCESS_VIOLATION, WSAEFAULT},
    {STATUS_DEVICE_NOT_READY, WSAEWOULDBLOCK},
    {STATUS_REQUEST_NOT_ACCEPTED, WSAEWOULDBLOCK},
    {STATUS_NOT_SUPPORTED, WSAEOPNOTSUPP},
    {STATUS_NOT_IMPLEMENTED, WSAEOPNOTSUPP},
    {STATUS_INVALID_PARAMETER, WSAEINVAL},
    {STATUS_INVALID_HANDLE, WSAENOTSOCK},
    {STATUS_OBJECT_TYPE_MISMATCH, WSAENOTSOCK},
};

DWORD socket_error_of_status(NTSTATUS status)
{
    if (status != STATUS_SUCCESS)
        for (size_t n = 0; n < sizeof socket_errors / sizeof *socket_errors; n++)
            if (socket_errors[n].status == status)
                return socket_errors[n].error;
    return error_of_status(status);
}

/* For the tests. */
unsigned long iocp_error_of_status(unsigned long status, int socket)
{
    return socket ? socket_error_of_status((NTSTATUS)status) : error_of_status((NTSTATUS)status);
}

static DWORD extension(SOCKET s, GUID id, void *function)
{
    DWORD bytes = 0;
    /* winsock/winsock-ioctls, SIO_GET_EXTENSION_FUNCTION_POINTER */
    if (WSAIoctl(s, SIO_GET_EXTENSION_FUNCTION_POINTER, &id, sizeof id, function, sizeof(void *), &bytes, NULL, NULL))
        return WSAGetLastError();
    return 0;
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
            error = extension(s, (GUID)WSAID_TRANSMITFILE, &found.transmit_file);
        if (s != INVALID_SOCKET)
            closesocket(s);
        found.query_information = (query_information_file)(any_function)GetProcAddress(ntdll, "NtQueryInformationFile");
        found.create_packet = (create_wait_packet)(any_function)GetProcAddress(ntdll, "NtCreateWaitCompletionPacket");
        found.associate_packet = (associate_wait_packet)(any_function)GetProcAddress(ntdll, "NtAssociateWaitCompletionPacket");
        found.cancel_packet = (cancel_wait_packet)(any_function)GetProcAddress(ntdll, "NtCancelWaitCompletionPacket");
        if (!found.associate_packet || !found.cancel_packet)
            found.create_packet = NULL;
        if (!error)
            start_console();
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
    long error;
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
    error = add_console_port(handle);
    if (error)
        iocp_port_close(port);
    return error;
}

void iocp_port_close(iocp_port *port)
{
    remove_console_port((HANDLE)port->handle);
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
    timeout_ns = limit_after_console_event(timeout_ns);
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

long associate(iocp_port *port, HANDLE handle, ULONG_PTR key)
{
    return CreateIoCompletionPort(handle, (HANDLE)port->handle, key, 0) != NULL ? 0 : GetLastError();
}

/* Bytes moved at once need no entry then; and no event on the handle is set, which nobody waits for. */
static int let_skip(HANDLE handle)
{
    return SetFileCompletionNotificationModes(handle, FILE_SKIP_COMPLETION_PORT_ON_SUCCESS
                                                          | FILE_SKIP_SET_EVENT_ON_HANDLE);
}

/* ERROR_INVALID_PARAMETER: the socket belongs to a port already.  `facts` are three: whether "done at once" is final, the
 * address family and the type. */
long iocp_associate_socket(iocp_port *port, uintptr_t socket, int *facts)
{
    WSAPROTOCOL_INFOW info;
    int size = sizeof info;
    long error;
    ZeroMemory(&info, sizeof info);
    if (getsockopt(socket, SOL_SOCKET, SO_PROTOCOL_INFOW, (char *)&info, &size) != 0)
        return WSAGetLastError();
    facts[0] = 0;
    facts[1] = info.iAddressFamily;
    facts[2] = info.iSocketType;
    error = associate(port, (HANDLE)socket, IOCP_KEY_SOCKET);
    if (!error && (info.dwServiceFlags1 & XP1_IFS_HANDLES) && info.iSocketType == SOCK_STREAM)
        /* Streams only: a WSARecvFrom that fails at once is not always reported as it should be. */
        facts[0] = let_skip((HANDLE)socket);
    return error;
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
