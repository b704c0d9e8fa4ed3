"""``iocp-loop run``, also ``python -m iocp_loop run``: a program that knows nothing of this loop, run on it.

The program is run by ``python`` itself, with the very arguments: so ``sys.argv``, ``__main__``, ``sys.path``, exit
codes, signals and tracebacks are what they always are.  All that is added is a sitecustomize (``_startup/``), which
Python imports at its start and which takes over asyncio's loops (takeover.py).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["main"]

_STARTUP = Path(__file__).resolve().parent / "_startup"

_DESCRIPTION = """\
Run a Python program on iocp_loop, unchanged: asyncio.run(), asyncio.Runner and asyncio.new_event_loop() make this loop.
PROGRAM is what python takes: script.py, -m module, -c code, its options before them, arguments behind them.
"""


def main(arguments: list[str]) -> int:
    """Run what the command line says; returns on Windows only, with the exit code, elsewhere Python takes over."""
    own, program = _split(arguments)
    parser = argparse.ArgumentParser(
        prog="iocp-loop run",
        usage="iocp-loop run [--driver NAME] [--debug] [--stats] [--children] PROGRAM ...",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--driver", metavar="NAME", help="auto, iocp, uring or poll (as IOCP_LOOP_DRIVER)")
    parser.add_argument("--debug", action="store_true", help="asyncio's debug mode (as PYTHONASYNCIODEBUG=1)")
    parser.add_argument("--stats", action="store_true", help="print what the loops did, on stderr, at the exit")
    parser.add_argument("--children", action="store_true", help="Python processes that it starts run on it too")
    options = parser.parse_args(own)
    if not program:
        parser.error("what is to be run? script.py, -m module, -c code, or - for standard input")
    _refuse_isolation(parser, program)
    environment = dict(os.environ)
    if options.driver is not None:
        environment["IOCP_LOOP_DRIVER"] = options.driver
    _refuse_impossible_driver(parser, environment.get("IOCP_LOOP_DRIVER"))
    if options.debug:
        environment["PYTHONASYNCIODEBUG"] = "1"
    words = ["first", *(word for word in ("children", "stats") if getattr(options, word))]
    environment["IOCP_LOOP_RUN"] = ",".join(words)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_STARTUP), environment.get("PYTHONPATH")]))
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # not in typeshed
    return _become([sys.executable, *flags, *program], environment)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our options, which are long and come first, and python's command line."""
    end = 0
    while end < len(arguments) and arguments[end].startswith("--"):
        if arguments[end] == "--":
            return arguments[:end], arguments[end + 1 :]
        end += 2 if arguments[end] == "--driver" else 1
    return arguments[:end], arguments[end:]


def _refuse_isolation(parser: argparse.ArgumentParser, program: list[str]) -> None:
    """Python without its environment, or without site, would not see us: the program would run on another loop."""
    if sys.flags.ignore_environment or sys.flags.no_site or set("IES").intersection(_option_letters(program)):
        parser.error("python's options -I, -E and -S leave no way in")


def _option_letters(program: list[str]) -> Iterator[str]:
    """The letters of python's options that stand in front of the program."""
    words = iter(program)
    for word in words:
        if not word.startswith("-") or word == "-":
            return
        if word.startswith("--"):
            continue
        for position, letter in enumerate(word[1:], 2):
            yield letter
            if letter in "cm":
                return
            if letter in "WX":  # the rest of the word, or the next one, is its argument
                if position == len(word):
                    next(words, None)
                break


def _refuse_impossible_driver(parser: argparse.ArgumentParser, name: str | None) -> None:
    if name in (None, "", "auto"):
        return
    from .ports import DriverUnavailable, make_driver

    try:
        make_driver(name).close()
    except (ValueError, DriverUnavailable) as error:
        parser.error(str(error))


def _become(command: list[str], environment: dict[str, str]) -> int:
    if sys.platform != "win32":
        sys.stdout.flush()
        os.execve(command[0], command, environment)
    # Windows cannot replace a program.  Ctrl-C reaches both of us, and is for the child.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = subprocess.call(command, env=environment)
    return code - 2**32 if code >= 2**31 else code  # sys.exit takes a C int
