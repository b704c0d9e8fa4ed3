/* Waits for handles, and sockets of other ports. */

#include "shared.h"

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
        if (status == STATUS_SUCCESS) {
            sub->port = 0; /* tells a packet from a registered wait */
            sub->wait = (uintptr_t)packet;
            return ERROR_IO_PENDING;
        }
    }
    long error = register_wait(port, sub, (HANDLE)handle, IOCP_KEY_HANDLE);
    return error ? error : ERROR_IO_PENDING;
}

/* End a watch.  1: its completion is on the port, or was taken from it.  0: none was made, and none will come.
 *
 * A packet that is on its way (STATUS_PENDING) is kept: to close it would be to take its entry back.  Whoever has reaped
 * that calls this again. */
int iocp_unwatch_handle(iocp_submission *sub)
{
    HANDLE wait = (HANDLE)sub->wait;
    if (wait == NULL)
        return 1;
    if (!sub->port) {
        NTSTATUS status = found.cancel_packet(wait, TRUE);
        if (status != STATUS_PENDING) {
            CloseHandle(wait);
            sub->wait = 0;
        }
        return status != STATUS_SUCCESS;
    }
    sub->wait = 0;
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
