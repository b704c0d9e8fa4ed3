"""The cffi (API mode) binding: Win32 on Windows, io_uring by raw system calls on Linux.

setup.py names this file as a cffi module.  The declarations are those of the header in ``_native/<system>``, beside the
C in .c files, so that editors, compilers and sanitizers see C as C.  Where there is nothing to bind (macOS, the
BSDs) `ffibuilder` is None and the package runs on the ``poll`` driver.

Set ``IOCP_LOOP_TARGET=windows`` to write the Windows module's C on another system, for a cross compiler::

    IOCP_LOOP_TARGET=windows python iocp_loop/_cffi_build.py OUT.c
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import cffi


class Binding(NamedTuple):
    """One extension module: its name, and the stem of its files in ``_native/``."""

    module: str
    stem: str
    libraries: tuple[str, ...] = ()


BINDINGS = {
    "linux": Binding("iocp_loop._uring", "linux/uring"),
    "windows": Binding("iocp_loop._iocp", "windows/iocp", ("ws2_32", "mswsock", "ntdll", "kernel32")),
}


def make_ffi(target: str) -> Any:
    """The cffi builder for `target` (a key of BINDINGS), or None where there is nothing to build."""
    binding = BINDINGS.get(target)
    if binding is None:
        return None
    native = Path(__file__).resolve().parent / "_native"
    stem = native / binding.stem
    # setuptools wants source paths relative to setup.py, which is where it runs.
    root = Path(__file__).resolve().parent.parent
    sources = [path.relative_to(root).as_posix() for path in sorted(stem.parent.glob("*.c"))]
    ffi = cffi.FFI()
    ffi.cdef(declarations(stem.with_suffix(".h").read_text(encoding="utf-8")))
    ffi.set_source(
        binding.module,
        f'#include "{stem.name}.h"',
        sources=sources,
        include_dirs=[str(stem.parent)],
        libraries=list(binding.libraries),
    )
    return ffi


def declarations(header: str) -> str:
    """What cffi can read of a C header: all but its directives, and the part of a struct behind ``/* private */``.

    Of the directives, a ``#define`` of a number stays.
    """
    header = re.sub(r"/\* private \*/.*?\n}", "...;\n}", header, flags=re.DOTALL)
    header = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    return re.sub(r"^#(?!define \w+ \d+ *$).*\n", "", header, flags=re.MULTILINE)


def this_system() -> str:
    """The key of BINDINGS for the machine that is built for."""
    chosen = os.environ.get("IOCP_LOOP_TARGET")
    if chosen:
        return chosen
    return {"win32": "windows"}.get(sys.platform, sys.platform)


ffibuilder = make_ffi(this_system())

if __name__ == "__main__":
    if ffibuilder is None:
        sys.exit(f"nothing to build for {this_system()}")
    if len(sys.argv) != 2:
        sys.exit("usage: _cffi_build.py OUT.c")
    ffibuilder.emit_c_code(sys.argv[1])
