"""The native half of the driver ``uring`` as Python sees it: is it there, does it work here, and opening a ring.

``_native/linux/uring.h`` tells what its functions do.
"""

from __future__ import annotations

import errno
import os
import sys
from types import SimpleNamespace
from typing import Any

from ...built import why_missing

if sys.platform != "linux":
    raise ImportError("io_uring exists on Linux only")

ffi: Any
lib: Any
try:
    from ..._uring import ffi as cffi_ffi
    from ..._uring import lib as cffi_lib

    ffi = cffi_ffi
    # The same functions and constants, in a plain object: looking one up in cffi's own takes as long as a call.
    lib = SimpleNamespace(library=cffi_lib, **{name: getattr(cffi_lib, name) for name in dir(cffi_lib)})
except ImportError as error:
    ffi = lib = None
    _NOT_BUILT = why_missing("iocp_loop._uring", error)

__all__ = ["ffi", "forget_probe", "lib", "new_bytes", "open_ring", "probe", "why_enter_failed"]


_works = False


def probe() -> str | None:
    """Why this driver can't work here, with the way out; None if it can.

    Opens a ring and closes it again.  Features are asked for, never guessed from the version of the kernel.
    """
    global _works
    if _works:
        return None
    if lib is None:
        return _NOT_BUILT
    if not hasattr(os, "eventfd"):
        return "this Python was built without os.eventfd, by which the ring is woken; take one that has it"
    try:
        ring = open_ring(-1, -1, shared=False, check=True)
    except OSError as error:
        return error.strerror
    code = lib.uring_wait(ring, 0, 0)
    lib.uring_close(ring, 0)
    if code < 0:
        return why_enter_failed(-code)
    _works = True
    return None


def forget_probe() -> None:
    """What worked does so no more: the next to ask is to look again."""
    global _works
    _works = False


def why_enter_failed(code: int) -> str:
    """What it means that an existing ring is refused with errno `code`."""
    return _why_open_failed(lib.URING_STEP_SETUP, code)


def open_ring(wake_fd: int, epoll_fd: int, *, shared: bool, check: bool = False) -> Any:
    """A new ring (``uring *``), for this thread or, if `shared`, for any.  OSError says why there is none.

    Writing to the eventfd `wake_fd` ends a wait in the ring, and so does an event of the epoll instance `epoll_fd`.
    `check`: look whether the kernel has all operations, which `probe` does for all later rings.
    """
    step = ffi.new("int *")
    flags = (lib.URING_SHARED if shared else 0) | (lib.URING_CHECK if check else 0)
    ring = lib.uring_open(flags, wake_fd, epoll_fd, step)
    if ring == ffi.NULL:
        code = ffi.errno
        raise OSError(code, _why_open_failed(step[0], code))
    return ring


def _why_open_failed(step: int, code: int) -> str:
    """What a failure of uring_open at `step` with errno `code` means, and what can be done about it."""
    told = f"{errno.errorcode.get(code, code)}: {os.strerror(code)}"
    if code in (errno.EPERM, errno.EACCES):
        setting = _io_uring_disabled()
        if setting == "2":
            return f"kernel.io_uring_disabled=2 forbids io_uring to everybody ({told}); set it to 0 with sysctl"
        if setting == "1":
            return (
                f"kernel.io_uring_disabled=1 forbids io_uring to users outside kernel.io_uring_group ({told}); "
                "join that group, or set it to 0 with sysctl"
            )
        return (
            f"a security policy forbids io_uring ({told}): a seccomp filter as containers have it by default, or "
            "SELinux; allow the system calls io_uring_setup, io_uring_enter and io_uring_register"
        )
    if code == errno.ENOSYS:
        return f"this kernel, or the sandbox around it, has no io_uring ({told}); Linux 6.1 or newer has it"
    if code in (errno.EMFILE, errno.ENFILE):
        return f"no descriptor is left for a ring ({told}); raise RLIMIT_NOFILE (ulimit -n)"
    if code == errno.ENOMEM:
        return f"too little memory for a ring ({told}); raise RLIMIT_MEMLOCK (ulimit -l) or the container's limit"
    if step in (lib.URING_STEP_SETUP, lib.URING_STEP_FEATURES, lib.URING_STEP_OPCODES):
        return f"the kernel's io_uring lacks what Linux 6.1 has ({told}); use a newer kernel"
    return f"the kernel refused the memory of a ring ({told})"


def _io_uring_disabled() -> str:
    """The sysctl of Linux 6.6; empty where the kernel has none."""
    try:
        with open("/proc/sys/kernel/io_uring_disabled", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def new_bytes(size: int) -> Any:
    """Memory for the kernel to write to (``char[]``); what is in it before is undefined."""
    return _allocate("char[]", size)


_allocate: Any = None if ffi is None else ffi.new_allocator(should_clear_after_alloc=False)
