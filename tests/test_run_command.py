"""``iocp-loop run``: a program runs as python runs it, but on this loop; and its children too, where that is wanted."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest

import iocp_loop
from iocp_loop import launch
from iocp_loop.ports import availability

from .support import LIMIT, WINDOWS, child_environment

#: Prints the class of the loop that asyncio makes here, and its driver.
WHICH = """
import asyncio

async def which():
    loop = asyncio.get_running_loop()
    return type(loop).__name__ + " " + str(getattr(loop, "driver", None))
"""

#: Where the native part was not built, debug mode says so: not here.
QUIET = {"IOCP_LOOP_NATIVE": "0"}

PRINT_WHICH = WHICH + "print(asyncio.run(which()))\n"


def run(
    *arguments: str,
    code: int = 0,
    flags: Sequence[str] = ("-W", "error"),
    text: str = "",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess[str]:
    """``python -m iocp_loop run`` with these arguments; it must exit with `code`."""
    done = subprocess.run(
        [sys.executable, *flags, "-m", "iocp_loop", "run", *arguments],
        env=child_environment(**environment),
        input=text,
        capture_output=True,
        text=True,
        timeout=3 * LIMIT,
        check=False,
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def output(*arguments: str, **environment: str) -> str:
    """What a program prints that has nothing to complain of."""
    done = run(*arguments, environment=environment)
    assert done.stderr == ""
    return done.stdout


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


# -- which loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "making",
    [
        "asyncio.run(which())",
        "in_runner()",
        "in_runner(loop_factory=asyncio.SelectorEventLoop)",
        "in_runner(loop_factory=asyncio.new_event_loop)",
        "in_runner(loop_factory=lambda: asyncio.SelectorEventLoop())",
    ],
)
def test_whoever_asks_asyncio_for_a_loop_gets_this_one(driver: str, making: str) -> None:
    in_runner = """
def in_runner(**options):
    with asyncio.Runner(**options) as runner:
        return runner.run(which())
"""
    printed = output("--driver", driver, "-c", f"{WHICH}{in_runner}print({making})")
    assert printed.split() == ["IocpEventLoop", driver]


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="get_event_loop() makes no loop since Python 3.14")
def test_get_event_loop_makes_this_one(driver: str) -> None:
    code = "import asyncio, warnings\nwarnings.simplefilter('ignore')\nprint(asyncio.get_event_loop().driver)"
    assert output("--driver", driver, "-c", code) == f"{driver}\n"


@pytest.mark.skipif(sys.version_info >= (3, 16), reason="there are no policies since Python 3.16")
def test_the_loops_of_the_default_policy_are_this_one() -> None:
    code = """
        import asyncio, warnings
        warnings.simplefilter("ignore")
        loop = asyncio.get_event_loop_policy().new_event_loop()
        print(type(loop).__name__)
        loop.close()
    """
    assert output("-c", textwrap.dedent(code)) == "IocpEventLoop\n"


def test_a_program_that_names_another_kind_of_loop_gets_it() -> None:
    code = """
        import asyncio, selectors
        class Own(asyncio.SelectorEventLoop):
            def __init__(self, word="default"):
                super().__init__()
                self.word = word
        Stock = asyncio.SelectorEventLoop
        for loop in Own(), Own("given"), Own(word="named"), Stock(selectors.SelectSelector()):
            print(type(loop).__name__.lstrip("_"), getattr(loop, "word", ""), isinstance(loop, Stock))
            loop.close()
    """
    own, given, named, stock = output("-c", textwrap.dedent(code)).splitlines()
    assert (own, given, named) == ("Own default True", "Own given True", "Own named True")
    assert stock.endswith("SelectorEventLoop  True")


def test_no_warning_comes_of_it() -> None:
    """Not even where Python deprecates policies: every warning is an error here, and nothing is printed on stderr."""
    done = run("-X", "dev", "-W", "error", "-c", PRINT_WHICH, environment=QUIET)
    assert done.stderr == ""


# -- as python does it -----------------------------------------------------------------------------

TELL = "import os, sys; print(sys.argv, __name__, sys.path[0], os.environ.get('PYTHONPATH'))\n"


def as_python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=child_environment(), capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("form", ["script", "folder", "module", "code", "options"])
def test_arguments_and_paths_are_as_with_python(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(TELL)
    (tmp_path / "module.py").write_text(TELL)
    program = {
        "script": ["module.py", "a b", "--driver", "none", "-m"],
        "folder": ["package", "--stats"],
        "module": ["-m", "module", "-c", "--children"],
        "code": ["-c", TELL, "-x", "y"],
        "options": ["-u", "-X", "utf8", "-Wdefault", "-m", "module", "-I"],
    }[form]
    monkeypatch.chdir(tmp_path)
    assert output(*program) == as_python(*program, cwd=tmp_path)


def test_a_program_on_standard_input() -> None:
    assert run("-", "argument", text="import sys\nprint(sys.argv)\n").stdout == "['-', 'argument']\n"


def test_after_two_dashes_come_pythons_own_options() -> None:
    assert run("--", "--version").stdout == f"Python {sys.version.split()[0]}\n"


def test_the_interpreters_own_flags_go_on() -> None:
    code = "import sys; print(sys.flags.optimize, sys.flags.dev_mode, sys.warnoptions)"
    assert run("-c", code, flags=["-OO", "-X", "dev", "-W", "error"]).stdout == "2 True ['default', 'error']\n"


@pytest.mark.parametrize(("code", "exits"), [("raise SystemExit(7)", 7), ("1 / 0", 1), ("raise SystemExit('no')", 1)])
def test_exit_codes_and_tracebacks_are_pythons(code: str, exits: int, script: Path) -> None:
    script.write_text(code)
    done = run(str(script), code=exits)
    python = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (python.stdout, python.stderr)


@pytest.mark.skipif(WINDOWS, reason="on Windows a Ctrl-C goes to everything in the console, these tests too")
def test_ctrl_c_is_the_programs() -> None:
    code = """
        import asyncio
        async def main():
            print("ready", flush=True)
            try:
                await asyncio.sleep(60)
            finally:
                print("cleaned up", flush=True)
        asyncio.run(main())
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "iocp_loop", "run", "-c", textwrap.dedent(code)],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT)
    assert out == "cleaned up\n"
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT


def test_the_sitecustomize_that_was_there_is_imported_too(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.seen = __file__\n")
    paths = os.pathsep.join([str(tmp_path), child_environment()["PYTHONPATH"]])
    code = "import sitecustomize; print(seen, sitecustomize.__file__)\n" + PRINT_WHICH
    seen, which = output("-c", code, PYTHONPATH=paths).splitlines()
    assert seen == " ".join([str(tmp_path / "sitecustomize.py")] * 2)
    assert which.startswith("IocpEventLoop ")


# -- options ---------------------------------------------------------------------------------------


def test_debug_is_asyncios_debug_mode() -> None:
    code = "import asyncio\nasync def main(): print(asyncio.get_running_loop().get_debug())\nasyncio.run(main())"
    assert output("-c", code) == "False\n"
    assert output("--debug", "-c", code, **QUIET) == "True\n"


def test_the_environment_names_the_driver(driver: str) -> None:
    assert output("-c", PRINT_WHICH, IOCP_LOOP_DRIVER=driver).split() == ["IocpEventLoop", driver]


def test_stats_are_summed_up_at_the_exit(driver: str) -> None:
    code = """
        import asyncio, socket
        async def main():
            loop = asyncio.get_running_loop()
            ours, theirs = socket.socketpair()
            for sock in ours, theirs:
                sock.setblocking(False)
            receiving = asyncio.create_task(loop.sock_recv(ours, 100))
            await asyncio.sleep(0)
            await loop.sock_sendall(theirs, b"hello")
            print(await receiving)
            ours.close()
            theirs.close()
        asyncio.run(main())
        asyncio.run(main())
    """
    done = run("--stats", f"--driver={driver}", "-c", textwrap.dedent(code))
    assert done.stdout == "b'hello'\n" * 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"iocp_loop: 2 loops on driver {driver}: ")
    assert "Receive" in line.partition("operations: ")[2]


def test_stats_tell_if_there_was_no_loop() -> None:
    assert run("--stats", "-c", "pass").stderr == "iocp_loop: no loop of asyncio's was made here\n"


# -- children --------------------------------------------------------------------------------------

CHILDREN = (
    WHICH
    + """
import multiprocessing, subprocess, sys

def in_child(connection):
    connection.send(asyncio.run(which()))

def by_multiprocessing(method):
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=in_child, args=(theirs,))
    process.start()
    print(ours.recv())
    process.join()

def by_subprocess(depth=2):
    if depth:
        subprocess.run([sys.executable, __file__, str(depth - 1)], check=True)
    else:
        print(asyncio.run(which()))

if __name__ == "__main__":
    if sys.argv[1] in ("spawn", "fork", "forkserver"):
        by_multiprocessing(sys.argv[1])
    else:
        by_subprocess(int(sys.argv[1]))
"""
)

# Forking is refused with a warning where there are threads; there are none.
METHODS = ["2", "spawn"] if WINDOWS else ["2", "spawn", "forkserver", "fork"]


@pytest.mark.parametrize("method", METHODS)
def test_children_run_on_it_too(method: str, script: Path, driver: str) -> None:
    script.write_text(CHILDREN)
    assert output("--children", "--driver", driver, str(script), method).split() == ["IocpEventLoop", driver]


@pytest.mark.parametrize("method", METHODS)
def test_without_children_they_are_what_they_were(method: str, script: Path) -> None:
    script.write_text(CHILDREN)
    forked = method == "fork"  # a copy of its parent, whatever that is
    assert output(str(script), method).startswith("IocpEventLoop" if forked else "_Unix" if not WINDOWS else "Proactor")


def test_children_that_do_not_know_this_package_are_left_alone() -> None:
    """Another Python, say: here one without paths beyond the standard library and the hook."""
    code = """
        import os, subprocess, sys
        hook = os.environ["PYTHONPATH"].split(os.pathsep)[0]
        environment = dict(os.environ, PYTHONPATH=hook)
        find = "import importlib.util; print(importlib.util.find_spec('iocp_loop'))"
        subprocess.run([sys._base_executable, "-P", "-s", "-c", find], env=environment, check=True)
    """
    done = run("--children", "-c", textwrap.dedent(code))
    if "ModuleSpec" in done.stdout:
        pytest.skip("this Python is no virtual environment, or its base has this package too")
    assert (done.stdout, done.stderr) == ("None\n", "")


# -- what it refuses -------------------------------------------------------------------------------


def refusal(*arguments: str, **environment: str) -> str:
    done = run(*arguments, code=2, environment=environment)
    assert done.stdout == ""
    return done.stderr


def test_nothing_to_run_is_a_mistake() -> None:
    assert "what is to be run?" in refusal()
    assert "what is to be run?" in refusal("--stats")


def test_unknown_options_before_the_program_are_mistakes() -> None:
    assert "unrecognized arguments: --speed" in refusal("--speed", "script.py")


def test_a_driver_that_cannot_work_is_refused_before_the_program_begins() -> None:
    impossible = "uring" if WINDOWS else "iocp"
    assert availability(impossible).reason in refusal("--driver", impossible, "-c", "print('begun')")
    assert availability(impossible).reason in refusal("-c", "print('begun')", IOCP_LOOP_DRIVER=impossible)
    assert "unknown driver 'epoll'" in refusal("--driver=epoll", "-c", "print('begun')")


@pytest.mark.parametrize("words", [["-I"], ["-bE"], ["-X", "dev", "-S"], ["-Wx", "-uIc"], ["-W", "x", "-E", "-m"]])
def test_an_isolated_python_is_refused(words: list[str]) -> None:
    assert "leave no way in" in refusal(*words, "print('begun')")


def test_letters_behind_the_program_are_its_own() -> None:
    for program in (["-c", "pass", "-I"], ["-mthis", "-E"], ["-W", "I", "-c", "pass"], ["-XI", "-c", "E"], ["-", "-S"]):
        assert not set("IES").intersection(launch._option_letters(program))


def test_an_isolated_launcher_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", "import sys; sys.path[:0] = eval(sys.argv.pop(1)); sys.argv[0] = 'iocp-loop'\n"
         "from iocp_loop.__main__ import main; sys.exit(main())", repr(sys.path), "run", "-c", "print('begun')"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "leave no way in" in done.stderr


def test_a_python_that_does_not_find_the_package_says_so() -> None:
    """Never another loop in silence."""
    hidden = (
        "import importlib.util, os, runpy\n"
        "importlib.util.find_spec = lambda name: None\n"
        "os.environ['IOCP_LOOP_RUN'] = 'first'\n"
        f"runpy.run_path({str(launch._STARTUP / 'sitecustomize.py')!r})\n"
        "print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"iocp_loop is not installed for {sys.executable}\n"


# -- the command itself ----------------------------------------------------------------------------


def test_the_console_script_is_the_same_program() -> None:
    try:
        scripts = importlib.metadata.distribution("iocp_loop").entry_points.select(group="console_scripts")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed, only found")
    (script,) = scripts
    assert (script.name, script.value) == ("iocp-loop", "iocp_loop.__main__:main")


def test_importing_the_package_imports_no_asyncio() -> None:
    """Else the launcher, and every run of pytest beside this package, would pay for it."""
    code = "import sys, iocp_loop, iocp_loop.launch, iocp_loop.pytest_plugin as p; print('asyncio' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, pytest; before = 'asyncio' in sys.modules\n{code}; print(before)"],
        env=child_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    after, before = done.stdout.split()
    assert after == before


def test_every_name_of_the_package_can_be_had() -> None:
    for name in (*iocp_loop.__all__, "operations", "ports", "IocpPolicy"):
        assert getattr(iocp_loop, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        iocp_loop.nonsense  # noqa: B018 - that is the point
