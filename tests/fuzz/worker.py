"""A process that plays programs of one family on one loop, each in a forked child: ``python -m tests.fuzz.worker``.

A child that crashes or hangs is a finding like any other, and the next program begins in a clean one.  For each program
one line of JSON goes to the standard output.  `__main__.py` starts these; which tier there is and what is preloaded is
settled by their environment.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from typing import IO, NoReturn

from . import Family, family_named
from .runner import Report, play

#: Characters of a child's standard error that go into a report, from its end.
_LAST_WORDS = 6000


def main(loop_name: str, limit: float, family: Family, seeds: list[int]) -> None:
    """Play `seeds` of `family`; each may take `limit` seconds."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    family.make  # noqa: B018 - imports what the children need, once for all of them
    import iocp_loop  # noqa: F401 - as above

    for seed in seeds:
        print(_play_apart(family, seed, loop_name, limit).to_json(), flush=True)


def _play_apart(family: Family, seed: int, loop_name: str, limit: float) -> Report:
    with tempfile.TemporaryFile() as result, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            _child(family, seed, loop_name, result, errors)
        status = _status(child, limit)
        if status is None:
            end = f"has not ended within {limit:g} s"
            os.kill(child, signal.SIGABRT)  # faulthandler shows the stacks
            if _status(child, 2) is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        else:
            code = os.waitstatus_to_exitcode(status)
            end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it had started itself
        if status == 0:
            result.seek(0)
            return Report.from_json(result.read().decode())
        errors.seek(0)
        last_words = errors.read().decode(errors="replace")[-_LAST_WORDS:]
        return Report(family.name, seed, [f"the process {end}\n{last_words}".rstrip()])


def _status(child: int, limit: float) -> int | None:
    """The status with which `child` has ended; None if it has not within `limit` seconds."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.002)
    return None


def _child(family: Family, seed: int, loop_name: str, result: IO[bytes], errors: IO[bytes]) -> NoReturn:
    """Play, write the report and be gone, without the parent's clean-up."""
    os.setsid()
    os.dup2(errors.fileno(), 2)
    try:
        report = play(family, seed, loop_name)
    except BaseException:
        report = Report(family.name, seed, [f"the fuzzer itself failed:\n{traceback.format_exc()}"])
    result.write(report.to_json().encode())
    result.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), family_named(sys.argv[3]), list(map(int, sys.argv[4:])))
