"""Run the project's tests on Windows CPython under Wine, on driver iocp.

Copies the package and its tests into a staging folder, compiles the binding for Windows there, and runs pytest.
The source tree is not touched.  Use it through ``tools/test_windows.sh``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from windows_python import SetupError, WindowsPython, end_cleanly, say, windows_path

ROOT = Path(__file__).resolve().parent.parent

EMULATION = ROOT / "tools" / "windows_emulation"

#: What the tests need of the project.
STAGED = ("iocp_loop", "tests", "examples", "benchmarks", "docs", "conftest.py", "pyproject.toml", "setup.py",
          "README.md", "CHANGELOG.md")  # fmt: skip
NOT_STAGED = ("__pycache__", "*.so", "*.pyd", "*.o", "_build", "_uring.c", "_iocp.c", ".*_cache")

#: Libraries that pip cannot install from here: they need one that has no wheel.
NOT_INSTALLABLE = ("blockbuster",)

#: Libraries that have no wheel for Windows without the GIL.
NOT_FREE_THREADED = ("psycopg",)

#: Once in many thousand times Wine fails to start a process: the child ends before its server knows of it, and
#: CreateProcess says ERROR_INTERNAL_ERROR.  A test that shows this runs again, and no other; the log tells of it.
RERUN = ("--reruns=2", "--only-rerun=WinError 1359", "-raR")

#: The libraries of tests/apps that have wheels for Windows and need no server from elsewhere.  What they want there
#: beside is named too, since pip judges markers by the Python that runs it.
APPS = (
    "aiodns", "aiofastnet", "aiohttp", "aioquic", "aiosmtpd", "aiosmtplib", "aiosqlite", "anyio", "asyncssh", "debugpy",
    "distributed", "fastapi", "granian", "grpcio", "h2", "httptools", "httpx", "hypercorn", "nest_asyncio",
    "opentelemetry-sdk", "pyzmq", "tornado", "trustme", "twisted", "uvicorn",
    "websockets",
)  # fmt: skip


def requirements(python: WindowsPython) -> list[str]:
    """What the tests need, as pyproject.toml names it; requirements with an environment marker are not for here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["libraries"]]
    left_out = re.compile("|".join(("iocp_loop", *NOT_INSTALLABLE, *(NOT_FREE_THREADED if python.threads else ()))))
    return [each for each in wanted if ";" not in each and not left_out.match(each)]


@contextlib.contextmanager
def stage(python: WindowsPython, without: Sequence[str] = ()) -> Iterator[Path]:
    """A fresh copy of what is to be tested, for this run alone."""
    stages = python.home / "stage"
    for old in stages.glob("*-*"):
        if not Path("/proc", old.name.rpartition("-")[2]).exists():  # of a run that was killed
            shutil.rmtree(old, ignore_errors=True)
    folder = stages / f"{python.version}-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        for name in (each for each in STAGED if each not in without):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(*NOT_STAGED))
            elif source.exists():
                shutil.copy2(source, folder / name)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compile_binding(python: WindowsPython, folder: Path, *, emulate: bool = False) -> None:
    """Build _iocp.pyd and _hot.pyd: cffi writes the one's C inside Windows Python, mingw-w64 compiles both here.

    `emulate`: what Wine lacks comes from ``windows_emulation/``.
    """
    package = folder / "iocp_loop"
    build = folder / "build"
    build.mkdir()
    if python.run([str(package / "_cffi_build.py"), str(build / "_iocp.c")], timeout=120) != 0:
        raise SetupError("cffi could not write the C of iocp_loop._iocp")
    native = package / "_native" / "windows"
    hot = package / "_native" / "hot"
    # Other compilers know no extensions of GNU's.
    python.check_c11([*sorted(native.glob("*.c")), *sorted(hot.glob("*.c"))])
    python.compile(
        [build / "_iocp.c", *sorted(native.glob("*.c")), *(EMULATION.glob("*.c") if emulate else ())],
        package / "_iocp.pyd",
        includes=[native],
        libraries=["ws2_32", "mswsock", "ntdll", "kernel32"],
        flags=[f'-DIOCP_LOOP_EMULATION="{EMULATION / "emulation.h"}"'] if emulate else (),
    )
    python.compile(sorted(hot.glob("*.c")), package / "_hot.pyd", includes=[hot], libraries=["ws2_32"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Run the tests on Windows CPython under Wine.",
        epilog="Arguments that are not named here go to pytest.",
    )
    parser.add_argument("version", help="X.Y, or auto: what this machine has")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that pytest may take")
    parser.add_argument("--run", action="store_true", help="run python.exe with the arguments instead of pytest")
    parser.add_argument("--wheel", type=Path, help="test this wheel, installed, instead of compiling")
    parser.add_argument("--apps", type=Path, metavar="FILE", help="run tests/apps instead; the results go into FILE")
    parser.add_argument("--emulate", action="store_true", help="compile in what Wine lacks (tools/windows_emulation)")
    # Only the first argument can be the version: later words belong to pytest's own options.
    argv = sys.argv[1:]
    if not argv or not re.fullmatch(r"auto|\d+\.\d+t?", argv[0]):
        argv.insert(0, "auto")
    options, arguments = parser.parse_known_args(argv)
    end_cleanly()
    try:
        python = WindowsPython(options.version)
        python.build(requirements(python))
        sources = ("iocp_loop", "setup.py") if options.wheel else ()
        with python.wine.session(), stage(python, without=sources) as folder:
            if options.wheel:
                python.pip("install", "--no-deps", "--target", folder, options.wheel.absolute())
            else:
                compile_binding(python, folder, emulate=options.emulate)
            emulated = ", with what Wine lacks emulated" if options.emulate else ""
            say(f"testing on Windows Python {python.version}, {python.wine.version()}{emulated}")
            if options.apps:
                site = python.home / f"apps-{python.version}"
                python.install(site, sorted(APPS))
                python.wine.environment["PYTHONPATH"] = windows_path(site)
                arguments[:0] = ["-m", "tests.apps", "--results", windows_path(options.apps.absolute())]
            elif not options.run:
                # poll is available here too (by select), but is tested where it is used; --driver poll runs it.
                if not any(argument.startswith("--driver") for argument in arguments):
                    arguments[:0] = ["--driver", "iocp"]
                # Beside an installed wheel there are no sources to read.
                no_sources = ["--ignore=tests/test_architecture.py"] if options.wheel else []
                arguments[:0] = ["-m", "pytest", "-p", "no:cacheprovider", *RERUN, *no_sources]
            return python.run(arguments, cwd=folder, timeout=options.timeout)
    except SetupError as exc:
        say(str(exc))
        return 2


if __name__ == "__main__":
    sys.exit(main())
