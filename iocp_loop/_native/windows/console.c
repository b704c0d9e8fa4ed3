/* Console control events (console/handlerroutine).  A thread that waits on a port does not hear of Ctrl-C, so each
 * event wakes every port.  Windows calls the newest handler first: ours comes before the C runtime's, through which
 * Python learns of the event, perhaps much later.  So whoever was woken must look again: for a while after an event
 * no wait is long (limit_after_console_event).
 *
 * When the console is closed, the user logs off or Windows shuts down, the process is ended as soon as a handler has
 * dealt with the event, the C runtime's too.  So if a signal stands for that (iocp_set_closing_signal), we send it
 * ourselves and keep this thread: what is left of the time that Windows grants (5 s for a closed console) is the
 * program's.  If it ends earlier by itself, all the better.
 *
 * Services hear of everybody's log-off, and are to live on: there that one event goes no further, or the C runtime would
 * end the process.  Services run in session 0, where nobody logs on. */

#include "shared.h"

#include <stdlib.h>

enum { AFTER_EVENT_MS = 1000, SHORT_WAIT_MS = 10, CLOSING_MS = 30000 };

int PyErr_SetInterruptEx(int signum); /* c-api/exceptions: from any thread, without the GIL */

static SRWLOCK console_lock = SRWLOCK_INIT;
static HANDLE *console_ports; /* `console_room` of them, NULL where there is none */
static int console_room;
static volatile LONG64 console_event_at = -AFTER_EVENT_MS; /* as long as there was none */

static volatile LONG closing_signal = 0, is_service = 0;

static BOOL WINAPI on_console_event(DWORD event)
{
    if (event == CTRL_LOGOFF_EVENT && is_service)
        return TRUE;
    /* The others (Ctrl-C, Ctrl-Break) reach Python through the C runtime. */
    BOOL closing = closing_signal
                   && (event == CTRL_CLOSE_EVENT || event == CTRL_LOGOFF_EVENT || event == CTRL_SHUTDOWN_EVENT);
    if (closing)
        PyErr_SetInterruptEx(closing_signal);
    InterlockedExchange64(&console_event_at, (LONG64)GetTickCount64());
    AcquireSRWLockShared(&console_lock);
    for (int n = 0; n < console_room; n++)
        if (console_ports[n] != NULL)
            PostQueuedCompletionStatus(console_ports[n], 0, IOCP_KEY_WAKE, NULL);
    ReleaseSRWLockShared(&console_lock);
    if (closing)
        Sleep(CLOSING_MS); /* longer than Windows waits */
    return closing;        /* FALSE, not handled: on to the C runtime and Python */
}

/* Which signal of Python a closed console, a log-off and a shutdown are; 0: none, they end the process. */
void iocp_set_closing_signal(int number) { InterlockedExchange(&closing_signal, number); }

/* For tests, which run in no service: take this process for one, or no longer. */
void iocp_set_service(int yes) { InterlockedExchange(&is_service, yes); }

/* Let console events wake `port`, or no longer.  ERROR_NOT_ENOUGH_MEMORY where there is no room to note it. */
long add_console_port(HANDLE port)
{
    long error = 0;
    int n = 0;
    AcquireSRWLockExclusive(&console_lock);
    while (n < console_room && console_ports[n] != NULL)
        n++;
    if (n == console_room) {
        int room = console_room ? 2 * console_room : 16;
        HANDLE *more = realloc(console_ports, room * sizeof *more);
        if (more == NULL)
            error = ERROR_NOT_ENOUGH_MEMORY;
        else {
            ZeroMemory(more + n, (room - n) * sizeof *more);
            console_ports = more;
            console_room = room;
        }
    }
    if (!error)
        console_ports[n] = port;
    ReleaseSRWLockExclusive(&console_lock);
    return error;
}

void remove_console_port(HANDLE port)
{
    AcquireSRWLockExclusive(&console_lock);
    for (int n = 0; n < console_room; n++)
        if (console_ports[n] == port)
            console_ports[n] = NULL;
    ReleaseSRWLockExclusive(&console_lock);
}

void start_console(void)
{
    DWORD session = 1;
    is_service = ProcessIdToSessionId(GetCurrentProcessId(), &session) && session == 0;
    SetConsoleCtrlHandler(on_console_event, TRUE);
}

/* For a while after an event no wait is long. */
long long limit_after_console_event(long long timeout_ns)
{
    if (timeout_ns && console_event_at >= 0 && (LONG64)GetTickCount64() - console_event_at < AFTER_EVENT_MS
        && (timeout_ns < 0 || timeout_ns > SHORT_WAIT_MS * 1000000LL))
        return SHORT_WAIT_MS * 1000000LL;
    return timeout_ns;
}
