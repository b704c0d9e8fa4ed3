/* Files and pipes: those with overlapped I/O, and those in which a thread blocks. */

#include "shared.h"

typedef char types_agree[IOCP_DISK == FILE_TYPE_DISK && IOCP_DEVICE == FILE_TYPE_CHAR && IOCP_PIPE == FILE_TYPE_PIPE
                             ? 1 : -1];

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

/* namedpipeapi/nf-namedpipeapi-createnamedpipew: one more instance of a server's end.  `first`: it must be the first of
 * its name.  It is read as bytes; but its type is that of messages, or clients that want to read those could not. */
long iocp_pipe_serve(const wchar_t *name, int first, unsigned long buffer_size, uintptr_t *handle)
{
    DWORD mode = PIPE_ACCESS_DUPLEX | FILE_FLAG_OVERLAPPED | (first ? FILE_FLAG_FIRST_PIPE_INSTANCE : 0);
    HANDLE pipe = CreateNamedPipeW(name, mode, PIPE_TYPE_MESSAGE | PIPE_READMODE_BYTE | PIPE_REJECT_REMOTE_CLIENTS,
                                   PIPE_UNLIMITED_INSTANCES, buffer_size, buffer_size, 0, NULL);
    if (pipe == INVALID_HANDLE_VALUE)
        return GetLastError();
    *handle = (uintptr_t)pipe;
    return 0;
}

/* namedpipeapi/nf-namedpipeapi-connectnamedpipe.  ERROR_PIPE_CONNECTED: a client was there first, and no entry tells of
 * it. */
long iocp_pipe_accept(uintptr_t handle, iocp_submission *sub)
{
    OVERLAPPED *overlapped = prepare(sub, handle);
    return file_result(ConnectNamedPipe((HANDLE)handle, overlapped));
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
