/* For the tests alone: what Windows has and Wine lacks, in user space; emulation.c tells what and how.
 *
 * _native/windows/shared.h includes this file where IOCP_LOOP_EMULATION names it, behind all of Windows' own headers:
 * the calls below lead here then.  Only tools/test_windows.py --emulate compiles so. */

#ifndef IOCP_LOOP_EMULATION_H
#define IOCP_LOOP_EMULATION_H

FARPROC emulated_address(HMODULE module, const char *name);
BOOL emulated_wait(HANDLE port, OVERLAPPED_ENTRY *entries, ULONG most, ULONG *count, DWORD milliseconds, BOOL alertable);
BOOL emulated_close(HANDLE handle);
int emulated_ioctl(SOCKET s, DWORD code, void *in, DWORD in_size, void *out, DWORD out_size, DWORD *bytes,
                   OVERLAPPED *overlapped, LPWSAOVERLAPPED_COMPLETION_ROUTINE routine);

#ifndef IOCP_LOOP_EMULATION_ITSELF
#define GetProcAddress emulated_address
#define GetQueuedCompletionStatusEx emulated_wait
#define CloseHandle emulated_close
#define WSAIoctl emulated_ioctl
#endif

#endif
