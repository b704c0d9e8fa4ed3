"""Windows' handles by themselves: what they are, named pipes, and the calls that block.

What needs no port: each function is one call of ``_native/windows``, with its error code made an OSError.  Those
that block let other threads run meanwhile; they are for a thread of their own.
"""

from __future__ import annotations

from .binding import (
    ABORTED,
    BROKEN_PIPE,
    END_OF_FILE,
    MORE_DATA,
    NO_DATA,
    PIPE_BUSY,
    PIPE_NOT_CONNECTED,
    check,
    error_of,
    ffi,
    handle_of_file,
    lib,
)

__all__ = [
    "PIPE_BUSY",
    "available",
    "connect_pipe",
    "handle_of_file",
    "interrupt",
    "is_device",
    "is_regular_file",
    "is_synchronous",
    "read_blocking",
    "serve_pipe",
    "write_blocking",
]

_END = frozenset({END_OF_FILE, BROKEN_PIPE, PIPE_NOT_CONNECTED})


def available() -> bool:
    """Whether the native part is there, which all others need."""
    return lib is not None


def is_regular_file(handle: int) -> bool:
    """Whether it is a file on a disk."""
    return bool(lib.iocp_file_type(handle) == lib.IOCP_DISK)


def is_device(handle: int) -> bool:
    """Whether it is a console, the null device, a serial port."""
    return bool(lib.iocp_file_type(handle) == lib.IOCP_DEVICE)


def is_synchronous(handle: int) -> bool:
    """Whether it was opened without overlapped I/O, so that reading and writing block."""
    return bool(lib.iocp_is_synchronous(handle))


def serve_pipe(name: str, *, first: bool, buffer_size: int) -> int:
    """A new instance of the server's end of a named pipe: its handle, overlapped, in byte mode.

    `first`: PermissionError if there is a server of that name already.  `buffer_size` in bytes.
    """
    handle = ffi.new("uintptr_t *")
    check(lib.iocp_pipe_serve(name, first, buffer_size, handle))
    return int(handle[0])


def connect_pipe(name: str) -> int:
    """The client's end of a named pipe: its handle, overlapped.

    FileNotFoundError: nobody serves that name.  OSError with `winerror` PIPE_BUSY: no instance is free just now.
    """
    handle = ffi.new("uintptr_t *")
    check(lib.iocp_pipe_connect(name, handle))
    return int(handle[0])


def read_blocking(handle: int, size: int) -> bytes | None:
    """Wait for something to read; at most `size` bytes, empty at the end.

    None: nothing was got, and it is not the end; whoever still wants something asks again.
    """
    memory = bytearray(size)
    count = ffi.new("unsigned long *")
    code = lib.iocp_read_blocking(handle, ffi.from_buffer(memory, require_writable=True), size, count)
    if code in _END:
        return b""
    if code in (ABORTED, NO_DATA):  # interrupted, perhaps by Ctrl-C; or a pipe that does not wait has nothing
        return None
    if code not in (0, MORE_DATA):
        raise error_of(code)
    if count[0] == 0 and not is_device(handle):
        return None  # somebody has written nothing to the other end of a pipe
    return bytes(memory[: count[0]])


def write_blocking(handle: int, data: memoryview) -> int:
    """Write from `data`; how many bytes were taken, 0 if it was interrupted."""
    count = ffi.new("unsigned long *")
    code = lib.iocp_write_blocking(handle, ffi.from_buffer(data), data.nbytes, count)
    if code and code != ABORTED:
        raise error_of(code)
    return int(count[0])


def interrupt(thread: int) -> None:
    """Get the thread of that native number out of a call that blocks; nothing happens if it is in none."""
    lib.iocp_interrupt(thread)
