/* What the files of the Windows binding share; iocp.c tells how it works. */

#ifndef IOCP_LOOP_WINDOWS_SHARED_H
#define IOCP_LOOP_WINDOWS_SHARED_H

#define WIN32_NO_STATUS
#include <winsock2.h>
#include <mswsock.h>
#include <ws2tcpip.h>
#include <windows.h>
#include <winternl.h>
#undef WIN32_NO_STATUS
#include <ntstatus.h>

#include "iocp.h"

/* drivers/ddi/ntifs/nf-ntifs-ntqueryinformationfile */
typedef NTSTATUS(NTAPI *query_information_file)(HANDLE, IO_STATUS_BLOCK *, void *, ULONG, int);

/* win32/devnotes/nt*waitcompletionpacket (Windows 8): a wait for a handle that ends in an entry of a port. */
typedef NTSTATUS(NTAPI *create_wait_packet)(HANDLE *, ACCESS_MASK, OBJECT_ATTRIBUTES *);
typedef NTSTATUS(NTAPI *associate_wait_packet)(HANDLE, HANDLE, HANDLE, void *, void *, NTSTATUS, ULONG_PTR, BOOLEAN *);
typedef NTSTATUS(NTAPI *cancel_wait_packet)(HANDLE, BOOLEAN);

/* What iocp_start has found. */
extern struct found {
    LPFN_ACCEPTEX accept_ex;
    LPFN_GETACCEPTEXSOCKADDRS accept_addresses;
    LPFN_CONNECTEX connect_ex;
    LPFN_TRANSMITFILE transmit_file;
    query_information_file query_information;
    create_wait_packet create_packet; /* the three packet functions are all there or all NULL */
    associate_wait_packet associate_packet;
    cancel_wait_packet cancel_packet;
} found;

static inline OVERLAPPED *overlapped_of(iocp_submission *sub) { return (void *)sub->overlapped; }

static inline void *area_of(iocp_submission *sub) { return sub->area; }

/* Ready the submission for its next request, keeping the event of an emulated one (see iocp_emulate). */
static inline OVERLAPPED *prepare(iocp_submission *sub, uintptr_t handle)
{
    OVERLAPPED *overlapped = overlapped_of(sub);
    ZeroMemory(overlapped, sizeof *overlapped);
    overlapped->hEvent = (HANDLE)(sub->event ? sub->event | 1 : 0);
    sub->handle = handle;
    sub->bytes = 0;
    return overlapped;
}

static inline long socket_result(int failed) { return failed ? WSAGetLastError() : 0; }

static inline long file_result(BOOL done) { return done ? 0 : GetLastError(); }

/* Windows' error code for a status: as Win32 has it, and as Winsock has it. */
DWORD error_of_status(NTSTATUS status);
DWORD socket_error_of_status(NTSTATUS status);

/* Associate `handle` with the port. */
long associate(iocp_port *port, HANDLE handle, ULONG_PTR key);

/* console.c: the handler of console events, which has to wake every port; and how long a wait may be just now. */
void start_console(void);
long add_console_port(HANDLE port);
void remove_console_port(HANDLE port);
long long limit_after_console_event(long long timeout_ns);

#ifdef IOCP_LOOP_EMULATION /* for tests: see tools/windows_emulation */
#include IOCP_LOOP_EMULATION
#endif

#endif
