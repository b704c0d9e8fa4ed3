"""Where io_uring is not available: the reason that is told."""

from __future__ import annotations

import errno
import importlib
import sys
from typing import Any

import pytest

from iocp_loop.ports import DriverUnavailable

if sys.platform != "linux":
    pytest.skip("io_uring exists on Linux only", allow_module_level=True)

uring: Any = importlib.import_module("iocp_loop.ports.uring.driver")
uring_turns: Any = importlib.import_module("iocp_loop.ports.uring.turns")
binding: Any = importlib.import_module("iocp_loop.ports.uring.binding")


@pytest.mark.parametrize(
    ("code", "setting", "told"),
    [
        (errno.EPERM, "2", "kernel.io_uring_disabled=2"),
        (errno.EPERM, "1", "kernel.io_uring_group"),
        (errno.EPERM, "0", "seccomp"),
        (errno.EACCES, "", "SELinux"),
        (errno.ENOSYS, "", "has no io_uring"),
        (errno.EINVAL, "", "use a newer kernel"),
        (errno.ENOMEM, "", "RLIMIT_MEMLOCK"),
        (errno.EMFILE, "", "RLIMIT_NOFILE"),
    ],
)
def test_the_reason_names_the_cause_and_the_way_out(
    monkeypatch: pytest.MonkeyPatch, code: int, setting: str, told: str
) -> None:
    if binding.lib is None:
        pytest.skip("the native module is not built")

    class Refusing:
        NULL = binding.ffi.NULL
        errno = code
        new = binding.ffi.new

    monkeypatch.setattr(binding, "_works", False)
    monkeypatch.setattr(binding, "ffi", Refusing)
    monkeypatch.setattr(binding, "lib", _RefusingLibrary(binding.lib))
    monkeypatch.setattr(binding, "_io_uring_disabled", lambda: setting)
    reason = binding.probe()
    assert reason is not None
    assert told in reason
    assert errno.errorcode[code] in reason
    with pytest.raises(DriverUnavailable, match=told):
        uring.UringDriver()


class _RefusingLibrary:
    def __init__(self, lib: Any) -> None:
        self._lib = lib

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, name)

    def uring_open(self, flags: int, wake_fd: int, epoll_fd: int, step: Any) -> Any:
        return binding.ffi.NULL


def test_without_the_native_module_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "_works", False)
    monkeypatch.setattr(binding, "lib", None)
    monkeypatch.setattr(binding, "_NOT_BUILT", "not built", raising=False)
    assert binding.probe() == "not built"
