"""Look through the C for Windows as Microsoft's compiler would: clang as it is in zig, in its mode for MSVC, for ARM64.

The headers are MinGW's, which this mode does not fit everywhere; what it says of them is not counted.  Of our own files
every error and every warning is.  Whether the real compiler and its own headers agree, only that can tell.

::

    python3 tools/check_msvc.py [VERSION|auto]        # `make msvc`; wants the package ziglang
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

from windows_python import SetupError, WindowsPython, quiet, say

NATIVE = Path(__file__).resolve().parent.parent / "iocp_loop" / "_native"

#: Everything that an error can hide behind is looked at: the headers bring some of their own.
MODE = ["--target=aarch64-pc-windows-msvc", "-fmsc-version=1940", "-fsyntax-only", "-Wall", "-ferror-limit=0",
        "-nostdinc", "-D_WIN32_WINNT=0x0A00"]  # fmt: skip


def complaints(zig: Path, source: Path, *headers: Path) -> list[str]:
    """What is said of `source` and of our own headers."""
    folders = [zig / "lib" / "include", zig / "lib" / "libc" / "include" / "any-windows-any", *headers]
    beside = [f"-isystem{folder}" for folder in folders]
    said = quiet([zig / "zig", "clang", *MODE, *beside, f"-I{source.parent}", source]).stdout
    if ": error:" not in said:  # MinGW's headers have some: without them it has not been looked at
        raise SetupError(f"clang has not come as far as {source.name}:\n{said[-1000:]}")
    return [line for line in said.splitlines() if re.match(rf"{NATIVE}.*(error|warning):", line)]


def main() -> int:
    found = importlib.util.find_spec("ziglang")
    if found is None or not found.submodule_search_locations:
        say("left out: the package ziglang is missing")
        return 0
    zig = Path(found.submodule_search_locations[0])
    try:
        python = WindowsPython(sys.argv[1] if len(sys.argv) > 1 else "auto")
        python.build()
        sources = [*sorted((NATIVE / "windows").glob("*.c")), *sorted((NATIVE / "hot").glob("*.c"))]
        wrong = [line for source in sources for line in complaints(zig, source, python.include)]
    except SetupError as error:
        say(str(error))
        return 2
    print("\n".join(wrong) or f"{len(sources)} files: nothing that MSVC would not take")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
