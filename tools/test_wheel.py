"""The tests on an installed wheel, without a compiler: ``make test-wheel``.

Makes an environment, lets pip install the wheel and what the tests need, and runs pytest in a folder that has the tests
and no sources of the package.  On PATH is everything but compilers.

    python tools/test_wheel.py [WHEEL] [pytest arguments]

Without WHEEL: the one in dist/ for this Python and machine; ``make wheels ARGS="--version X.Y --platform
manylinux2014_x86_64"`` makes it.  Wheels for Windows are tried by ``tools/test_windows.py --wheel``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from test_windows import NOT_STAGED

ROOT = Path(__file__).resolve().parent.parent

#: Whatever compiles, links or preprocesses, under any prefix and with any version.
COMPILER = re.compile(r"(.*-)?(gcc|g\+\+|cc|c\+\+|c89|c99|cpp|clang(\+\+)?|tcc|zig|ld|as)(-[\d.]+(-\w+)?)?")

#: What the tests need of the project.
STAGED = ("tests", "examples", "benchmarks", "docs", "tools", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md",
          "CONTRIBUTING.md")  # fmt: skip

#: It reads the sources of the package, which a wheel does not have.
OF_SOURCES = "tests/test_architecture.py"


def say(text: str) -> None:
    print(f"wheel: {text}", flush=True)


def find_wheel() -> Path:
    """The wheel of dist/ for this Python."""
    number = f"{sys.version_info.major}{sys.version_info.minor}"
    found = sorted((ROOT / "dist").glob(f"iocp_loop-*-cp{number}-cp{number}-manylinux*_{os.uname().machine}.whl"))
    if not found:
        sys.exit(
            f"no wheel for cp{number} in dist/: make wheels ARGS='--version {sys.version[:4]} --platform manylinux'"
        )
    return found[-1]


def path_without_compilers(folder: Path) -> str:
    """A folder with links to all programs on PATH that are no compilers."""
    folder.mkdir()
    for place in os.get_exec_path():
        for program in Path(place).glob("*"):
            if not COMPILER.fullmatch(program.name) and not (folder / program.name).exists():
                (folder / program.name).symlink_to(program)
    return str(folder)


def main() -> int:
    arguments = sys.argv[1:]
    wheel = Path(arguments.pop(0)) if arguments and arguments[0].endswith(".whl") else find_wheel()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    with tempfile.TemporaryDirectory(prefix="iocp_loop-wheel-") as name:
        tmp = Path(name)
        stage = tmp / "stage"
        for each in STAGED:
            source = ROOT / each
            if source.is_dir():
                shutil.copytree(source, stage / each, ignore=shutil.ignore_patterns(*NOT_STAGED))
            else:
                shutil.copy2(source, stage / each)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CC"))},
            "PATH": path_without_compilers(tmp / "bin"),
        }
        for compiler in ("cc", "gcc", "clang"):
            assert shutil.which(compiler, path=environment["PATH"]) is None
        subprocess.run([sys.executable, "-m", "venv", tmp / "venv"], check=True)
        python = tmp / "venv/bin/python"
        install = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--only-binary", ":all:"]
        subprocess.run([*install, wheel.resolve(), *extras["test"]], check=True, env=environment)
        say(f"testing {wheel.name}")
        environment["PATH"] = os.pathsep.join([str(python.parent), environment["PATH"]])
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", f"--ignore={OF_SOURCES}", *arguments]
        return subprocess.run(command, cwd=stage, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
