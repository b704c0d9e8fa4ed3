"""Counts the instructions that one operation of ``python -m benchmarks life`` takes, with valgrind.

    python tools/count_life.py "client, streams tcp" "read pipe" [--loops poll uvloop asyncio] [--operations N]

Two runs of each, of 100 operations and of so many more: what lies between them is that of the operations alone.  Of the
processes only the one with the loop counts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.connections import WORKLOADS  # noqa: E402 - from the tree that this file is in
from benchmarks.peers import PEERS, new_event_loop  # noqa: E402 - as above

FEW = 100
LOOPS = {"poll": "iocp_loop-poll", "uvloop": "uvloop", "asyncio": "asyncio"}


def run(name: str, loop_name: str, operations: int) -> None:
    """The part under valgrind."""
    loop = new_event_loop(PEERS[LOOPS[loop_name]])
    asyncio.set_event_loop(loop)
    loop.run_until_complete(WORKLOADS[name].run(operations))


def counted(name: str, loop_name: str, operations: int) -> int:
    """The instructions of a whole process."""
    command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={os.devnull}", sys.executable, __file__]
    command += ["--run", name, loop_name, str(operations)]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        _, said = process.communicate(timeout=600)
    found = re.search(rf"=={process.pid}== Collected : (\d+)", said)
    if process.returncode or found is None:
        raise SystemExit(f"{name} on {loop_name} failed\n{said}")
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="; ".join(WORKLOADS))
    parser.add_argument("--loops", nargs="+", default=["poll", "uvloop"], choices=LOOPS)
    parser.add_argument("--operations", type=int, default=500, metavar="N")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        name, loop_name, operations = options.run
        run(name, loop_name, int(operations))
        return
    for name in options.names or WORKLOADS:
        if name not in WORKLOADS:
            parser.error(f"no workload {name!r}")
        for loop_name in options.loops:
            more = options.operations
            spent = counted(name, loop_name, FEW + more) - counted(name, loop_name, FEW)
            print(f"{name} on {loop_name}: {spent / more:,.0f} instructions", flush=True)


if __name__ == "__main__":
    main()
