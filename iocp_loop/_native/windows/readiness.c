/* Readiness.  \Device\Afd is the kernel's side of Winsock; its poll request is what select() itself is made of, but
 * overlapped: it completes on the port when one of the events holds.  It is not documented, and has not changed since
 * Windows Vista: libuv, wepoll and Rust's mio rest on it. */

#include "shared.h"

#ifndef SIO_BASE_HANDLE /* winsock/winsock-ioctls */
#define SIO_BASE_HANDLE 0x48000022
#endif
#ifndef SIO_BSP_HANDLE_POLL
#define SIO_BSP_HANDLE_POLL 0x4800001D
#endif

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
