/* Wait completion packets, and a TransmitFile that is done at once, on a Wine that has neither.
 *
 * A packet (win32/devnotes/ntcreatewaitcompletionpacket and its siblings) ties a handle to a port: once the handle is
 * signalled, one entry comes out of the port.  Here a thread of the system's pool waits for the handle, and posts a
 * ticket: an entry with a key of its own, which the wait for the port below makes the entry that was asked for.  As in the
 * kernel,
 *
 *   - a packet that is associated can't be associated again, until its entry was reaped or it was cancelled;
 *   - to cancel one that waits is a success, and no entry comes; one whose entry is on the port, a success too if the
 *     entry is to be removed; STATUS_CANCELLED where there is nothing to cancel;
 *   - to close a packet is to cancel it, its entry too.
 *
 * IOCP_LOOP_EMULATE in the environment has words: "pending": to cancel a packet whose entry is on the port is
 * STATUS_PENDING, and the entry comes; "refuse": no handle but a timer can be associated; "slow": TransmitFile is Wine's.
 *
 * Tickets are not freed: the pool's thread may just be about to look at one. */

#define IOCP_LOOP_EMULATION_ITSELF
#include "shared.h"

#include <stdlib.h>
#include <string.h>

static const ULONG_PTR TICKET_KEY = 0x7469636b;

typedef struct packet packet;

typedef struct {
    packet *of; /* NULL: void, it is thrown away when it comes */
    HANDLE port, wait;
    ULONG_PTR key, information;
    void *context;
    NTSTATUS status;
} ticket;

struct packet {
    packet *next;
    HANDLE handle; /* an event, which lends its number */
    ticket *ticket; /* while it is associated */
    BOOL posted;    /* the ticket is on the port */
};

static SRWLOCK lock = SRWLOCK_INIT; /* held around everything below */
static packet *packets;

static BOOL asked_for(const char *word)
{
    char words[64] = ""; /* not by getenv: the tests change it, and this C runtime is another than Python's */
    GetEnvironmentVariableA("IOCP_LOOP_EMULATE", words, sizeof words);
    return strstr(words, word) != NULL;
}

static packet **find(HANDLE handle)
{
    packet **at = &packets;
    while (*at != NULL && (*at)->handle != handle)
        at = &(*at)->next;
    return at;
}

static NTSTATUS NTAPI create(HANDLE *handle, ACCESS_MASK access, OBJECT_ATTRIBUTES *attributes)
{
    packet *new = calloc(1, sizeof *new);
    (void)access, (void)attributes;
    if (new == NULL || (new->handle = CreateEventW(NULL, TRUE, FALSE, NULL)) == NULL) {
        free(new);
        return STATUS_NO_MEMORY;
    }
    *handle = new->handle;
    AcquireSRWLockExclusive(&lock);
    new->next = packets;
    packets = new;
    ReleaseSRWLockExclusive(&lock);
    return STATUS_SUCCESS;
}

static void post(ticket *t)
{
    t->of->posted = TRUE;
    PostQueuedCompletionStatus(t->port, 0, TICKET_KEY, (OVERLAPPED *)t);
}

static VOID CALLBACK signalled(void *context, BOOLEAN timed_out)
{
    ticket *t = context;
    (void)timed_out;
    AcquireSRWLockExclusive(&lock);
    if (t->of != NULL)
        post(t);
    ReleaseSRWLockExclusive(&lock);
}

static NTSTATUS associate_locked(packet *p, HANDLE handle, ticket *t, BOOLEAN *already)
{
    DWORD now = WaitForSingleObject(handle, 0); /* a timer's or an event's state is taken, as the kernel takes it */
    if (now == WAIT_FAILED)
        return STATUS_OBJECT_TYPE_MISMATCH;
    t->of = p;
    p->ticket = t;
    if (already != NULL)
        *already = now == WAIT_OBJECT_0;
    if (now == WAIT_OBJECT_0)
        post(t);
    else if (!RegisterWaitForSingleObject(&t->wait, handle, signalled, t, INFINITE,
                                          WT_EXECUTEONLYONCE | WT_EXECUTEINWAITTHREAD)) {
        p->ticket = NULL;
        return STATUS_ACCESS_DENIED;
    }
    return STATUS_SUCCESS;
}

static BOOL is_timer(HANDLE handle)
{
    static NTSTATUS(NTAPI * query)(HANDLE, int, void *, ULONG, ULONG *); /* NtQueryTimer, TimerBasicInformation */
    char information[16];
    if (query == NULL)
        query = (void *)GetProcAddress(GetModuleHandleW(L"ntdll.dll"), "NtQueryTimer");
    return query(handle, 0, information, sizeof information, NULL) == STATUS_SUCCESS;
}

static NTSTATUS NTAPI associate_handle(HANDLE which, HANDLE port, HANDLE handle, void *key, void *context,
                                       NTSTATUS status, ULONG_PTR information, BOOLEAN *already)
{
    ticket *t;
    packet *p;
    NTSTATUS result = STATUS_INVALID_HANDLE;
    if (asked_for("refuse") && !is_timer(handle))
        return STATUS_NOT_SUPPORTED;
    t = calloc(1, sizeof *t);
    if (t == NULL)
        return STATUS_NO_MEMORY;
    t->port = port;
    t->key = (ULONG_PTR)key;
    t->context = context;
    t->status = status;
    t->information = information;
    AcquireSRWLockExclusive(&lock);
    p = *find(which);
    if (p != NULL)
        result = p->ticket != NULL ? STATUS_INVALID_PARAMETER : associate_locked(p, handle, t, already);
    ReleaseSRWLockExclusive(&lock);
    return result;
}

/* The ticket of `p` is of no use any more. */
static void let_go(packet *p)
{
    if (p->ticket->wait != NULL)
        UnregisterWaitEx(p->ticket->wait, NULL); /* may run just now, and find it void */
    p->ticket->of = NULL;
    p->ticket = NULL;
    p->posted = FALSE;
}

static NTSTATUS NTAPI cancel(HANDLE which, BOOLEAN remove)
{
    NTSTATUS result = STATUS_SUCCESS;
    AcquireSRWLockExclusive(&lock);
    packet *p = *find(which);
    if (p == NULL)
        result = STATUS_INVALID_HANDLE;
    else if (p->ticket == NULL)
        result = STATUS_CANCELLED;
    else if (p->posted && (!remove || asked_for("pending")))
        result = STATUS_PENDING;
    else
        let_go(p);
    ReleaseSRWLockExclusive(&lock);
    return result;
}

BOOL emulated_close(HANDLE handle)
{
    AcquireSRWLockExclusive(&lock);
    packet **at = find(handle), *p = *at;
    if (p != NULL) {
        if (p->ticket != NULL)
            let_go(p);
        *at = p->next;
        free(p);
    }
    ReleaseSRWLockExclusive(&lock);
    return CloseHandle(handle);
}

/* Make a ticket what it stands for; FALSE if it is void. */
static BOOL redeem(OVERLAPPED_ENTRY *entry)
{
    ticket *t = (ticket *)entry->lpOverlapped;
    BOOL valid;
    AcquireSRWLockExclusive(&lock);
    valid = t->of != NULL;
    if (valid) {
        entry->lpCompletionKey = t->key;
        entry->lpOverlapped = t->context;
        entry->Internal = (ULONG_PTR)t->status;
        entry->dwNumberOfBytesTransferred = (DWORD)t->information;
        let_go(t->of);
    }
    ReleaseSRWLockExclusive(&lock);
    return valid;
}

BOOL emulated_wait(HANDLE port, OVERLAPPED_ENTRY *entries, ULONG most, ULONG *count, DWORD milliseconds, BOOL alertable)
{
    ULONGLONG until = GetTickCount64() + milliseconds;
    for (;;) {
        ULONGLONG now = GetTickCount64();
        DWORD left = milliseconds == INFINITE ? INFINITE : now < until ? (DWORD)(until - now) : 0;
        ULONG kept = 0;
        if (!GetQueuedCompletionStatusEx(port, entries, most, count, left, alertable))
            return FALSE;
        for (ULONG n = 0; n < *count; n++)
            if (entries[n].lpCompletionKey != TICKET_KEY || redeem(&entries[n]))
                entries[kept++] = entries[n];
        *count = kept;
        if (kept)
            return TRUE;
    }
}

/* Windows copies a small file that is in its cache, and is done; on a socket that skips, no entry tells of it. */
static LPFN_TRANSMITFILE really_transmit;

static BOOL PASCAL transmit(SOCKET s, HANDLE file, DWORD size, DWORD per_send, OVERLAPPED *overlapped,
                            LPTRANSMIT_FILE_BUFFERS buffers, DWORD flags)
{
    char piece[16384];
    OVERLAPPED place = {0};
    DWORD got = 0;
    int sent = -1;
    place.Offset = overlapped->Offset;
    place.OffsetHigh = overlapped->OffsetHigh;
    if (size <= sizeof piece && !((ULONG_PTR)overlapped->hEvent & 1) && !asked_for("slow")
        && ReadFile(file, piece, size, &got, &place))
        sent = send(s, piece, (int)got, 0);
    if (sent <= 0)
        return really_transmit(s, file, size, per_send, overlapped, buffers, flags);
    overlapped->Internal = STATUS_SUCCESS;
    overlapped->InternalHigh = (ULONG_PTR)sent;
    return TRUE;
}

int emulated_ioctl(SOCKET s, DWORD code, void *in, DWORD in_size, void *out, DWORD out_size, DWORD *bytes,
                   OVERLAPPED *overlapped, LPWSAOVERLAPPED_COMPLETION_ROUTINE routine)
{
    static const GUID id = WSAID_TRANSMITFILE;
    int failed = WSAIoctl(s, code, in, in_size, out, out_size, bytes, overlapped, routine);
    if (!failed && code == SIO_GET_EXTENSION_FUNCTION_POINTER && memcmp(in, &id, sizeof id) == 0) {
        really_transmit = *(LPFN_TRANSMITFILE *)out;
        *(LPFN_TRANSMITFILE *)out = transmit;
    }
    return failed;
}

FARPROC emulated_address(HMODULE module, const char *name)
{
    if (strcmp(name, "NtCreateWaitCompletionPacket") == 0)
        return (FARPROC)(void *)create;
    if (strcmp(name, "NtAssociateWaitCompletionPacket") == 0)
        return (FARPROC)(void *)associate_handle;
    if (strcmp(name, "NtCancelWaitCompletionPacket") == 0)
        return (FARPROC)(void *)cancel;
    return GetProcAddress(module, name);
}
