"""Windows CPython on a Debian or Ubuntu machine: build it from packages, run it under Wine.

Nothing here needs a Windows machine, and nothing is fetched but apt packages and PyPI wheels:

======================================  ===============================================================
python3XX.dll and the extension modules  python.org's own build, which panda3d's win_amd64 wheel carries
the standard library and C headers       a CPython of the same minor version on this machine, else the packages of
                                         Debian testing, unpacked and not installed
python.exe and python3.dll               a few lines each, made here with mingw-w64
packages                                 win_amd64 wheels, by pip
======================================  ===============================================================

Everything stands in one folder, the home: ``$IOCP_LOOP_WINDOWS``, else ``~/.cache/iocp_loop-windows``.  Each step
looks first whether its result is there, and puts it in place by a rename, so that a broken run repairs itself.

::

    python3 tools/windows_python.py [--version X.Y] build [REQUIREMENT...]
    python3 tools/windows_python.py [--version X.Y] run ARGUMENT...
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from debian_packages import NotToBeHad, unpack

PANDA3D = "1.10.16"
VERSIONS = ("3.11", "3.12", "3.13", "3.14", "3.14t")  # what that wheel is made for; t: without the GIL
MINGW = "x86_64-w64-mingw32-"
WINE_FOLDERS = ("/usr/lib/wine", "/opt/wine-stable/bin")

#: Parts of the wheel's runtime that need the rest of panda3d, that Wine brings itself, or that Wine 8 aborts in
#: (_wmi; platform.uname() does without it).
LEFT_OUT = ("api-ms-", "tcl", "tk", "_tkinter", "winsound", "_msi", "_wmi")

#: Parts of the standard library that are of no use here.
NOT_COPIED = ("__pycache__", "site-packages", "dist-packages", "lib-dynload", "config-*", "idlelib", "tkinter",
              "turtledemo", "lib2to3", "sitecustomize.py", "*.a", "*.so")  # fmt: skip

#: What CPython's headers ask of pyconfig.h for 64-bit Windows with mingw-w64.
SIZES = {"SHORT": 2, "INT": 4, "LONG": 4, "FLOAT": 4, "WCHAR_T": 2, "OFF_T": 4, "FPOS_T": 8, "PID_T": 4,
         "LONG_LONG": 8, "DOUBLE": 8, "VOID_P": 8, "SIZE_T": 8, "TIME_T": 8}  # fmt: skip
PYCONFIG_FLAGS = ("MS_WINDOWS", "MS_WIN32", "MS_WIN64", "NT_THREADS", "WITH_THREAD", "Py_ENABLE_SHARED",
                  "HAVE_DECLSPEC_DLL", "HAVE_ERRNO_H", "HAVE_STDARG_PROTOTYPES", "HAVE_STDDEF_H",
                  "HAVE_SYS_STAT_H", "HAVE_SYS_TYPES_H", "HAVE_WCHAR_H")  # fmt: skip

LAUNCHER = r"""
#include <wchar.h>
__declspec(dllimport) int Py_Main(int argc, wchar_t **argv);
int wmain(int argc, wchar_t **argv) { return Py_Main(argc, argv); }
"""

#: Says that python.exe knows Windows 10; without it Windows reports itself as version 6.2.
MANIFEST = """<?xml version="1.0" encoding="UTF-8" standalone="yes"?>
<assembly xmlns="urn:schemas-microsoft-com:asm.v1" manifestVersion="1.0">
  <compatibility xmlns="urn:schemas-microsoft-com:compatibility.v1">
    <application><supportedOS Id="{8e0f7a12-bfb3-4fe8-b9a5-48fd50a15a9a}"/></application>
  </compatibility>
</assembly>
"""


class SetupError(Exception):
    """Something that this machine lacks; the message says what to do."""


def say(text: str) -> None:
    print(f"windows-python: {text}", file=sys.stderr, flush=True)


def default_home() -> Path:
    return Path(os.environ.get("IOCP_LOOP_WINDOWS") or Path.home() / ".cache" / "iocp_loop-windows")


# ---------------------------------------------------------------------------------------------------------------------
# The machine: apt packages and host Pythons
# ---------------------------------------------------------------------------------------------------------------------


def apt_install(packages: Sequence[str]) -> None:
    """Install `packages`, as root or through sudo; SetupError names them where that can't be done."""
    wanted = " ".join(packages)
    become_root: list[str] = []
    if os.geteuid() != 0:
        become_root = ["sudo", "-n"]
    if not shutil.which("apt-get") or (become_root and not shutil.which("sudo")):
        raise SetupError(f"missing packages, and no apt-get or root rights to install them: {wanted}")
    command = [*become_root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-y"]
    say(f"apt-get install {wanted}")
    install = [*command, "install", "--no-install-recommends", *packages]
    if quiet(install).returncode != 0:  # perhaps the lists are missing or stale
        quiet([*command, "update"])
        done = quiet(install)
        if done.returncode != 0:
            raise SetupError(f"apt-get could not install {wanted}:\n{done.stdout[-2000:]}")


def quiet(command: Sequence[str | Path], timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """Run to the end with stdout and stderr kept together."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
    )


def must(command: Sequence[str | Path]) -> str:
    done = quiet(command)
    if done.returncode != 0:
        raise SetupError(f"failed: {' '.join(map(str, command))}\n{done.stdout[-2000:]}")
    return done.stdout


def windows_path(path: Path) -> str:
    """How a program under Wine names a file of this machine."""
    return "Z:" + str(path).replace("/", "\\")


def wine_tool(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), *WINE_FOLDERS)))


def find_wine() -> str | None:
    return wine_tool("wine64") or wine_tool("wine")


def need_tools() -> None:
    missing = []
    if not find_wine():
        missing.append("wine64")
    if not shutil.which(MINGW + "gcc"):
        missing.append("gcc-mingw-w64-x86-64-win32")
    if missing:
        apt_install(missing)


class HostPython(NamedTuple):
    """A CPython of this machine: the source of a standard library and of headers."""

    version: str
    executable: str
    stdlib: str
    include: str


INQUIRY = (
    "import json, sys, sysconfig as s;"
    "print(json.dumps(['%d.%d' % sys.version_info[:2], sys.executable, s.get_path('stdlib'), s.get_path('include')]))"
)


def host_pythons(version: str) -> Iterator[HostPython]:
    """Every CPython `version` that can be found, this one first; ``auto`` stands for any of VERSIONS."""
    versions = VERSIONS if version == "auto" else (version,)
    candidates = [sys.executable]
    for each in versions:
        candidates += filter(None, [os.environ.get("HOST_PYTHON"), shutil.which(f"python{each}")])
        pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
        candidates += map(str, sorted(pyenv.glob(f"versions/{each}.*/bin/python3"), reverse=True))
    candidates.append("/usr/bin/python3")
    for candidate in dict.fromkeys(candidates):
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
            answer = subprocess.run([candidate, "-c", INQUIRY], capture_output=True, text=True, timeout=60)
            host = HostPython(*json.loads(answer.stdout))
            if host.version in versions and Path(host.stdlib, "os.py").exists():
                yield host


def choose_host(version: str, home: Path) -> HostPython:
    """A host Python of `version` with headers, from apt if need be."""
    found = list(host_pythons(version))
    if version != "auto" and not found:
        return unpacked_host(version, home)
    for host in found:
        if Path(host.include, "Python.h").exists():
            return host
    if version == "auto" and not found:
        raise SetupError(f"no CPython {', '.join(VERSIONS)} on this machine")
    chosen = found[0].version
    apt_install([f"libpython{chosen}-dev", f"python{chosen}"])
    for host in host_pythons(chosen):
        if Path(host.include, "Python.h").exists():
            return host
    raise SetupError(f"no CPython {chosen} with headers on this machine")


def unpacked_host(version: str, home: Path) -> HostPython:
    """The same from packages of Debian testing, for a version that this machine has not; its executable is not run."""
    root = home / f"debian-{version}"
    names = [f"libpython{version}-{part}" for part in ("minimal", "stdlib", "testsuite", "dev")]
    if not root.exists():
        say(f"unpacking {', '.join(names)} of Debian testing")
        try:
            unpack(names, root)
        except NotToBeHad as error:
            raise SetupError(f"no CPython {version} on this machine: {error}") from error
    stdlib, include = root / "usr/lib" / f"python{version}", root / "usr/include" / f"python{version}"
    return HostPython(version, "", str(stdlib), str(include))


def windows_headers(folder: Path, *, free_threaded: bool = False) -> None:
    """Make headers of a Linux Python, in `folder`, those of a Windows one: only pyconfig.h differs."""
    lines = [f"#define {flag} 1" for flag in (*PYCONFIG_FLAGS, *(["Py_GIL_DISABLED"] if free_threaded else []))]
    lines += [f"#define SIZEOF_{name} {size}" for name, size in SIZES.items()]
    lines += ["#define ALIGNOF_SIZE_T 8", "#define ALIGNOF_MAX_ALIGN_T 8", '#define PLATLIBDIR "DLLs"']
    config = "\n".join(["#ifndef Py_PYCONFIG_H", "#define Py_PYCONFIG_H", *lines, "#endif", ""])
    (folder / "pyconfig.h").unlink(missing_ok=True)
    (folder / "pyconfig.h").write_text(config)


def find_pip() -> list[str]:
    """A command that runs pip; installed from apt where the machine has none."""
    for python in (sys.executable, "/usr/bin/python3"):
        command = [python, "-m", "pip", "--disable-pip-version-check"]
        if quiet([*command, "--version"]).returncode == 0:
            return command
    apt_install(["python3-pip"])
    return ["/usr/bin/python3", "-m", "pip", "--disable-pip-version-check"]


#: What gcc says of a PyType_Slot.
SLOT_OF_A_TYPE = re.compile(r"ISO C forbids initialization between function pointer and .void \*.")


# ---------------------------------------------------------------------------------------------------------------------
# One Windows Python
# ---------------------------------------------------------------------------------------------------------------------


class WindowsPython:
    """Windows CPython `version` in `home`; ``auto`` takes what this machine has a standard library for."""

    def __init__(self, version: str = "auto", home: Path | None = None) -> None:
        self.home = (home or default_home()).absolute()
        if version != "auto" and version not in VERSIONS:
            raise SetupError(f"no Windows build of Python {version} is known here, only of {', '.join(VERSIONS)}")
        #: What free-threaded Python differs by: its library, its ABI, its headers.
        self.threads = "t" if version.endswith("t") else ""
        self.host = choose_host(version.removesuffix("t"), self.home)
        self.version = self.host.version + self.threads
        self.root = self.home / self.version
        self.dll = "python" + self.version.replace(".", "")
        self.include = self.root / "include"
        self.exe = self.root / "python.exe"
        self.wine = Wine(self.home)

    def build(self, requirements: Iterable[str] = ()) -> None:
        """Make whatever of it is missing."""
        need_tools()
        self.root.mkdir(parents=True, exist_ok=True)
        with locked(self.home / ".build-lock"):
            self._runtime()
            self._standard_library()
            self._headers()
            self._programs()
            self.install(self.root / "Lib" / "site-packages", sorted(requirements))
            self.wine.make_prefix()

    def _runtime(self) -> None:
        if (self.root / f"{self.dll}.dll").exists():
            return
        say(f"fetching the Windows runtime of Python {self.version} (65 MB)")
        with scratch(self.home) as tmp:
            self.pip("download", "--no-deps", "--dest", tmp, f"panda3d=={PANDA3D}")
            (self.root / "DLLs").mkdir(exist_ok=True)
            with zipfile.ZipFile(next(tmp.glob("*.whl"))) as wheel:
                members = [m for m in wheel.namelist() if m.startswith("deploy_libs/")]
                members.sort(key=lambda m: self.dll in m)  # the file that is looked for comes last
                for member in members:
                    name = member.rpartition("/")[2]
                    if not name or name.lower().startswith(LEFT_OUT):
                        continue
                    beside_exe = name.lower().startswith(("python", "vcruntime"))
                    target = self.root / ("" if beside_exe else "DLLs") / name
                    target.write_bytes(wheel.read(member))

    def _standard_library(self) -> None:
        lib = self.root / "Lib"
        if lib.exists():
            return
        say(f"standard library from {self.host.stdlib}")
        with scratch(self.home) as tmp:
            shutil.copytree(
                self.host.stdlib, tmp / "Lib", ignore=shutil.ignore_patterns(*NOT_COPIED), ignore_dangling_symlinks=True
            )
            (tmp / "Lib" / "site-packages").mkdir()
            (tmp / "Lib").rename(lib)

    def _headers(self) -> None:
        if self.include.exists():
            return
        with scratch(self.home) as tmp:
            shutil.copytree(self.host.include, tmp / "include")
            windows_headers(tmp / "include", free_threaded=bool(self.threads))
            (tmp / "include").rename(self.include)

    def _programs(self) -> None:
        """python.exe; python3.dll, which hands the stable ABI on; what Rust's runtime looks for and Wine 8 lacks."""
        if self.exe.exists():
            return
        with scratch(self.home) as tmp:
            python = self.root / f"{self.dll}.dll"
            names = exported_names(python.read_bytes())
            self._forwarder(tmp, "python3.dll", {name: f"{self.dll}.{name}" for name in names})
            self._forwarder(tmp, "bcryptprimitives.dll", {"ProcessPrng": "advapi32.SystemFunction036"})
            (tmp / "python.c").write_text(LAUNCHER)
            (tmp / "python.manifest").write_text(MANIFEST)
            (tmp / "python.rc").write_text(f'1 24 "{(tmp / "python.manifest").as_posix()}"\n')
            must([MINGW + "windres", tmp / "python.rc", tmp / "manifest.o"])
            must([MINGW + "gcc", "-O1", "-s", "-municode", "-o", tmp / "python.exe",
                  tmp / "python.c", tmp / "manifest.o", python])  # fmt: skip
            (tmp / "python.exe").rename(self.exe)

    def _forwarder(self, tmp: Path, name: str, forwards: dict[str, str]) -> None:
        """A library of nothing but exports that lead to other libraries."""
        definition = tmp / f"{name}.def"
        lines = [f"  {export} = {target}" for export, target in forwards.items()]
        definition.write_text("\n".join([f'LIBRARY "{name}"', "EXPORTS", *lines, ""]))
        must([MINGW + "gcc", "-shared", "-nostdlib", "-s", "-Wl,--entry=0", "-o", tmp / name, definition])
        (tmp / name).rename(self.root / name)

    def install(self, folder: Path, requirements: list[str]) -> None:
        """Let pip install `requirements` for Windows into `folder`, unless it has them."""
        stamp = folder / ".requirements"
        wanted = "\n".join(requirements)
        if not requirements or (stamp.exists() and stamp.read_text() == wanted):
            return
        say(f"packages: {', '.join(requirements)}")
        # pip judges environment markers by the Python that runs it, so what pytest and psycopg want on Windows is here.
        also = ["colorama", "tzdata"]
        self.pip("install", "--upgrade", "--no-compile", "--target", stamp.parent, *also, *requirements)
        stamp.write_text(wanted)

    def pip(self, verb: str, *arguments: str | Path) -> None:
        """pip of this machine, told that it is on Windows."""
        abi = ["--abi", f"cp{self.version.replace('.', '')}"] if self.threads else []  # else pip knows several
        must([*find_pip(), verb, "--quiet", "--platform", "win_amd64", "--python-version", self.host.version, *abi,
              "--implementation", "cp", "--only-binary", ":all:", *arguments])  # fmt: skip

    def compile(
        self,
        sources: Sequence[Path],
        output: Path,
        includes: Sequence[Path],
        libraries: Sequence[str],
        flags: Sequence[str] = (),
    ) -> None:
        """Cross-compile an extension module; it is linked against the DLL itself, so no import library is needed."""
        output.parent.mkdir(parents=True, exist_ok=True)
        include_flags = [f"-I{folder}" for folder in (self.include, *includes)]
        library_flags = [f"-l{name}" for name in libraries]
        # How CPython reads its thread's number there: gcc takes an address in a segment for one in no array.
        more_flags = ["-Wno-array-bounds"] if self.threads else []
        must([MINGW + "gcc", "-O2", "-g", "-Wall", "-Werror", "-Wno-unused-function", "-shared", "-static-libgcc",
              "-D_WIN32_WINNT=0x0A00", *flags, *more_flags, *include_flags, "-o", output, *sources,
              self.root / f"{self.dll}.dll", self.root / "python3.dll", *library_flags])  # fmt: skip

    def check_c11(self, sources: Sequence[Path]) -> None:
        """SetupError if one of `sources` is not plain C11.

        In a PyType_Slot of Python's a function stands as a void pointer, which every compiler for Windows takes.
        """
        checked = quiet([MINGW + "gcc", "-std=c11", "-Wall", "-Wpedantic", "-D_WIN32_WINNT=0x0A00", "-fsyntax-only",
                         "-isystem", self.include, *sources])  # fmt: skip
        complaints = [line for line in checked.stdout.splitlines() if re.search(r"(error|warning):", line)]
        wrong = [line for line in complaints if not SLOT_OF_A_TYPE.search(line)]
        if checked.returncode or wrong:
            raise SetupError("\n".join(["this is not plain C11:", *wrong]))

    def run(self, arguments: Sequence[str], *, cwd: Path | None = None, timeout: float = 3600) -> int:
        """Run python.exe with `arguments`; its output goes to this process's stdout.  Returns the exit code."""
        return self.wine.run([str(self.exe), *arguments], cwd=cwd, timeout=timeout)


def exported_names(image: bytes) -> list[str]:
    """The names that a 64-bit DLL exports (the PE format, "The .edata Section").

    https://learn.microsoft.com/windows/win32/debug/pe-format
    """

    def u32(position: int) -> int:
        return int(struct.unpack_from("<I", image, position)[0])

    header = u32(0x3C)
    section_count, optional_size = struct.unpack_from("<H12xH", image, header + 6)
    table = header + 24 + optional_size
    sections = [struct.unpack_from("<III", image, table + 40 * n + 12) for n in range(section_count)]

    def where(address: int) -> int:
        for start, size, position in sections:
            if start <= address < start + size:
                return int(position + address - start)
        raise ValueError(f"address {address:#x} is in no section")

    exports = where(u32(header + 24 + 112))
    first = where(u32(exports + 32))
    names = []
    for n in range(u32(exports + 24)):
        start = where(u32(first + 4 * n))
        names.append(image[start : image.index(b"\0", start)].decode("ascii"))
    return names


@contextlib.contextmanager
def scratch(home: Path) -> Iterator[Path]:
    """A temporary folder on the same file system as `home`, so that results can be renamed into place."""
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=home) as name:
        yield Path(name)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Wine
# ---------------------------------------------------------------------------------------------------------------------


class Wine:
    """A Wine prefix of our own, and programs run in it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.prefix = home / "prefix"
        self.environment = {
            **os.environ,
            "WINEPREFIX": str(self.prefix),
            "WINEDEBUG": os.environ.get("WINEDEBUG", "-all"),
            "WINEDLLOVERRIDES": "mscoree,mshtml,winemenubuilder.exe=",  # or it asks for Mono and Gecko
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUTF8": "1",
            "PYTHONPATH": "",
        }

    def version(self) -> str:
        """As it names itself: ``wine-8.0 (...)``."""
        return must([find_wine() or "wine64", "--version"]).strip()

    def _start(self, program: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [find_wine() or "wine64", *program],
            env=self.environment,
            start_new_session=True,
            **options,  # type: ignore[call-overload]  # the options of Popen, passed through
        )

    def make_prefix(self) -> None:
        ready = self.prefix / ".ready"
        if ready.exists():
            return
        say("making the Wine prefix")
        null = subprocess.DEVNULL
        # Debian's Wine calls itself Windows 7 unless told otherwise.
        for program in (["wineboot", "--init"], ["winecfg", "/v", "win10"]):
            if self._start(program, stdin=null, stdout=null, stderr=null).wait(timeout=300) != 0:
                raise SetupError(f"{program[0]} failed; WINEDEBUG=err+all in the environment shows why")
        self._server("-w")
        ready.touch()

    def _server(self, flag: str) -> None:
        server = wine_tool("wineserver64") or wine_tool("wineserver") or "wineserver"
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([server, flag], env=self.environment, timeout=60, check=False)

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Keep Wine up inside the block; stop this prefix's processes at its end unless another session runs.

        Wine boots with its first program and ends with its last, and its own services inherit the first one's
        output.  So an anchor goes first: it waits for the end of its input, which comes at the latest with ours.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / ".session-lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            pipe, null = subprocess.PIPE, subprocess.DEVNULL
            anchor = self._start(["cmd.exe", "/c", "echo up& pause"], stdin=pipe, stdout=pipe, stderr=null)
            assert anchor.stdin is not None
            assert anchor.stdout is not None
            anchor.stdout.readline()
            try:
                yield
            finally:
                anchor.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    anchor.wait(timeout=10)
                anchor.stdout.close()
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._server("-k")
                if anchor.poll() is None:
                    anchor.kill()
                    anchor.wait()

    def run(self, program: Sequence[str], *, cwd: Path | None = None, timeout: float = 3600) -> int:
        """Run `program` and copy its output to stdout until it ends.  124 when `timeout` seconds were not enough.

        Its output is a pipe: with a regular file as stdout, Python does not start under Wine.  The copying ends with
        the program, not with the end of the pipe, which leftover children may hold open.
        """
        process = self._start(
            program, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        descriptor = process.stdout.fileno()

        def copy() -> None:
            with contextlib.suppress(OSError, ValueError):
                while data := os.read(descriptor, 65536):
                    sys.stdout.buffer.write(data.replace(b"\r\n", b"\n"))
                    sys.stdout.flush()

        copier = threading.Thread(target=copy, daemon=True)
        copier.start()
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            say(f"still running after {timeout:g} s: stopped")
            code = 124
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        copier.join(timeout=2)
        return code


def end_cleanly() -> None:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that no Windows program is left running."""

    def end(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)


def main() -> int:
    parser = argparse.ArgumentParser(description="Windows CPython under Wine, built from apt packages and PyPI.")
    parser.add_argument("--version", default="auto", help=f"one of {', '.join(VERSIONS)}; default: what is at hand")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that `run` may take")
    parser.add_argument("command", choices=("build", "run"))
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    end_cleanly()
    try:
        python = WindowsPython(options.version)
        started = time.monotonic()
        python.build(options.arguments if options.command == "build" else ())
        if options.command == "build":
            say(f"Python {python.version} is ready in {python.root} ({time.monotonic() - started:.0f} s)")
            return 0
        with python.wine.session():
            return python.run(options.arguments, timeout=options.timeout)
    except SetupError as exc:
        say(str(exc))
        return 2


if __name__ == "__main__":
    sys.exit(main())
