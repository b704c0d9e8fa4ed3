"""The native half of the driver ``iocp`` as Python sees it: is it there, its errors, its submissions.

``_native/windows/iocp.c`` tells how it works; each function stands in the file of its subject beside that.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ..driver import cancelled_error

ffi: Any = None
lib: Any = None
_missing: ImportError | None = None
try:
    from ... import _iocp
except ImportError as _error:
    _missing = _error
else:
    ffi = _iocp.ffi  # type: ignore[attr-defined]  # a compiled module, which mypy does not see
    _lib: Any = _iocp.lib  # type: ignore[attr-defined]  # as above
    # The same functions and constants, in a plain object: looking one up in cffi's own takes as long as a call.
    lib = SimpleNamespace(library=_lib, **{name: getattr(_lib, name) for name in dir(_lib)})

__all__ = ["SlotPool", "Submission", "error_of", "ffi", "lib", "pointer_to", "probe"]

# Windows' error codes (debug/system-error-codes, winsock/windows-sockets-error-codes-2).
INVALID_HANDLE = 6
END_OF_FILE = 38
INVALID_PARAMETER = 87
BROKEN_PIPE = 109
PIPE_BUSY = 231
NO_DATA = 232
PIPE_NOT_CONNECTED = 233
MORE_DATA = 234
PIPE_CONNECTED = 535
ABORTED = 995
PENDING = 997
RETRY = 1237
WSA_INVALID = 10022
WSA_MESSAGE_SIZE = 10040


def probe() -> str | None:
    """None if the driver works here, else why not, with the way out."""
    if sys.platform != "win32":
        return "I/O completion ports exist on Windows only"
    if _missing is not None:
        return f"the extension module iocp_loop._iocp is missing ({_missing}); reinstall with a C compiler at hand"
    code = lib.iocp_start()
    return f"Winsock's extension functions are not available: {error_of(code)}" if code else None


def error_of(code: int) -> OSError:
    """The exception for a Windows error code: of the subclass that fits, with `winerror` set."""
    if code == ABORTED:
        return cancelled_error()
    return OSError(0, ffi.getwinerror(code)[1], None, code)


def check(code: int) -> None:
    """Raise the OSError of `code`, unless that is 0."""
    if code:
        raise error_of(code)


#: A piece of memory to receive into: its address as cffi has it, the block that it is part of, where in the block it
#: begins, and its address as a number.
Slot = tuple[Any, Any, int, int]


class SlotPool:
    """Lends memory to receives: slots of `size` bytes, at most `limit` of them, made in blocks as they are needed.

    The native tier takes from `free`, and gives back to it, by itself.
    """

    PER_BLOCK = 32

    __slots__ = ("_unmade", "free", "size")

    def __init__(self, size: int, limit: int) -> None:
        self.size = size
        self._unmade = limit
        self.free: list[Slot] = []

    def take(self) -> Slot | None:
        """A slot, or None if all are lent."""
        if not self.free:
            if self._unmade < self.PER_BLOCK:
                return None
            self._unmade -= self.PER_BLOCK
            memory = ffi.new("char[]", self.PER_BLOCK * self.size)  # the block's view keeps it
            block = ffi.buffer(memory)
            address = int(ffi.cast("uintptr_t", memory))
            starts = range(0, len(block), self.size)
            self.free.extend((memory + start, block, start, address + start) for start in starts)
        return self.free.pop()

    def give_back(self, slot: Slot) -> None:
        """The slot may be lent again: no request has it any more."""
        self.free.append(slot)


class Submission:
    """One request in the kernel's hands, and who takes its completion: ``finish(submission, bytes, error code)``.

    `association` is that of the handle, None where the request goes to another.  `armed` is True while a completion is
    to be expected.  `keep` is what the kernel may read or write meanwhile: a buffer or views of our own, whatever
    becomes of the operation's attributes; a request has a `pointer_to` it.  `slot` is the piece of the pool that it
    receives into, if any.
    """

    __slots__ = ("address", "armed", "association", "finish", "keep", "native", "op", "slot")

    def __init__(self) -> None:
        self.renew()
        self.armed = False
        self.op: Any = None
        self.association: Any = None
        self.finish: Callable[[Submission, int, int], None] = nobody
        self.keep: Any = None
        self.slot: Slot | None = None

    def renew(self) -> None:
        """Have other memory from now on."""
        self.native = ffi.new("iocp_submission *")
        self.address = int(ffi.cast("uintptr_t", self.native))

    def set_address(self, family: int, address: Any) -> int:
        """Write a socket address, whose host is numeric, for the request to come.  0, or an error code."""
        host, port, flow, scope = (*address, 0, 0)[:4]
        if not isinstance(host, str):
            raise TypeError(f"the host of an address must be a str, not {type(host).__name__}")
        if not 0 <= port <= 65535:
            raise OverflowError("a port must be from 0 to 65535")
        if host == "":
            host = "::" if family == socket.AF_INET6 else "0.0.0.0"
        elif host == "<broadcast>":
            host = "255.255.255.255"
        code: int = lib.iocp_set_address(self.native, family, host.encode(), port, flow, scope)
        return code

    def get_address(self) -> Any:
        """The socket address that the kernel has written, as the socket module puts it; None for other families."""
        text, numbers = ffi.new("char[]", lib.IOCP_HOST_SIZE), ffi.new("unsigned long[3]")
        if lib.iocp_get_address(self.native, text, numbers):
            return None
        host = ffi.string(text).decode("ascii")
        if ":" in host:
            return host, numbers[0], numbers[1], numbers[2]
        return host, numbers[0]


def pointer_to(memory: Any, *, writable: bool = False) -> Any:
    """Where the memory of a buffer is, for the kernel; whoever calls keeps the buffer.

    A ``from_buffer`` that lived on, if only in the traceback of an error, would lock a view, and Python's collector
    does not survive clearing a locked view.  BufferError if the memory is to be `writable` and is not.
    """
    with ffi.from_buffer(memory, require_writable=writable) as array:
        return ffi.cast("char *", array)


def nobody(sub: Submission, count: int, code: int) -> None:
    """The `finish` of a submission that is not in use."""


def handle_of_file(descriptor: int) -> int:
    """The HANDLE behind a descriptor of the C runtime."""
    if sys.platform != "win32":
        raise NotImplementedError("handles exist on Windows only")
    import msvcrt

    return msvcrt.get_osfhandle(descriptor)
