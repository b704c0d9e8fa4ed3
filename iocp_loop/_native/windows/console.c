/* Console control events (console/handlerroutine).  A thread that waits on a port does not hear of Ctrl-C, so each
 * event wakes every port.  Windows calls the newest handler first: ours comes before the C runtime's, through which
 * Python learns of the event, perhaps much later.  So whoever was woken must look again: for a while after an event
 * no wait is long (limit_after_console_event).
 *
 * When the console is closed, the user logs off or Windows shuts down, the process is ended as soon as a handler has
 * dealt with the event, the C runtime's too.  So if a signal stands for that (iocp_set_closing_signal), we send it
 * ourselves and keep this thread: what is left of the time that Windows grants (5 s for a closed console) is the
 * program's.  If it ends earlier by itself, all the better. */

#include "shared.h"

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
void replace_console_port(HANDLE old, HANDLE new)
{
    AcquireSRWLockExclusive(&console_lock);
    for (int n = 0; n < MAX_CONSOLE_PORTS; n++)
        if (console_ports[n] == old) {
            console_ports[n] = new;
            break;
        }
    ReleaseSRWLockExclusive(&console_lock);
}

void start_console(void) { SetConsoleCtrlHandler(on_console_event, TRUE); }

/* For a while after an event no wait is long. */
long long limit_after_console_event(long long timeout_ns)
{
    if (timeout_ns && (LONG64)GetTickCount64() - console_event_at < AFTER_EVENT_MS
        && (timeout_ns < 0 || timeout_ns > SHORT_WAIT_MS * 1000000LL))
        return SHORT_WAIT_MS * 1000000LL;
    return timeout_ns;
}
