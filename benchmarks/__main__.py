"""The command line: ``python -m benchmarks [echo|micro|idle] ...``."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from . import echo, idle, micro
from .native import BuildFailed
from .peers import PEERS, Absent, Peer, Present, probe
from .progress import progress
from .report import Column, Report
from .rounds import Case, interleave, order

_RESULTS = Path(__file__).resolve().parent / ".results"

C = TypeVar("C", bound=Case)


def _bytes(text: str) -> int:
    """A size on the command line: ``100``, ``1k`` (1,024 bytes), ``1M``."""
    units = {"k": 1024, "m": 1024 * 1024}
    factor = units.get(text[-1:].lower(), 1)
    try:
        size = int(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (such as 100, 1k, 1M)")
    return size


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"not a positive number: {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"not a positive number of seconds: {text!r}")
    return seconds


def _measure(
    options: argparse.Namespace,
    title: str,
    setting: Sequence[str],
    cases: Sequence[C],
    columns: Sequence[Column],
    run: Callable[[C, Peer], dict[str, float]],
) -> int:
    """Probe the peers, make the rounds, print and write the report.  0, or 1 if a run failed."""
    probed = [probe(PEERS[name]) for name in options.peers]
    present = [found.peer for found in probed if isinstance(found, Present)]
    for found in probed:
        if isinstance(found, Absent):
            print(f"{found.peer.name} is absent: {found.reason}", file=sys.stderr)
    total = sum(1 for _ in order(cases, present, options.rounds))
    with progress(total) as step:
        samples = interleave(cases, present, options.rounds, run, step)
    if len(samples) < total:
        print(f"stopped after {len(samples)} of {total} runs", file=sys.stderr)
    report = Report(title, setting, columns, options.baseline, probed, samples)
    print(report.markdown())
    for path in report.write(options.output, options.benchmark):
        print(f"written to {path}", file=sys.stderr)
    return 1 if any(sample.failure for sample in samples) else 0


def _echo(options: argparse.Namespace) -> int:
    cells = echo.grid(options.mode, options.transport, options.size, options.connections)
    setting = [
        f"{options.rounds} interleaved rounds of {options.seconds:g} s; server and client on a core each;"
        " CPU is user and system time of the server process; medians over the rounds."
    ]
    run = functools.partial(echo.run, seconds=options.seconds)
    return _measure(options, "Echo", setting, cells, echo.COLUMNS, run)


def _micro(options: argparse.Namespace) -> int:
    setting = [f"{options.rounds} interleaved rounds; CPU is user and system time; medians over the rounds."]
    return _measure(options, "Callbacks, timers, tasks", setting, micro.workloads(), micro.COLUMNS, micro.run)


def _idle(options: argparse.Namespace) -> int:
    crowds = [
        idle.Crowd(mode, count, size) for mode in options.mode for count in options.connections for size in options.size
    ]
    setting = [f"{options.rounds} interleaved rounds; what the server process grows by; medians over the rounds."]
    return _measure(options, "Memory per idle connection", setting, crowds, idle.COLUMNS, idle.run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="What the loop costs, beside other loops and a server in C.  Without a name: echo.",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER",
                        help=f"who is measured (default: all of {', '.join(PEERS)})")  # fmt: skip
    common.add_argument("--baseline", choices=PEERS, default="uvloop", metavar="PEER",
                        help="whom the ratios compare with (default: uvloop)")  # fmt: skip
    common.add_argument("--rounds", type=_count, default=5, help="how often each run is made (default: 5)")
    common.add_argument("--output", type=Path, default=_RESULTS, metavar="DIRECTORY",
                        help="where the table and the samples go (default: benchmarks/.results)")  # fmt: skip

    commands = parser.add_subparsers(dest="benchmark", required=True)
    sub = commands.add_parser("echo", parents=[common], help="CPU, throughput and latency per echo")
    sub.add_argument("--mode", nargs="+", choices=echo.MODES, default=["protocol", "streams", "sock"])
    sub.add_argument("--transport", nargs="+", choices=echo.TRANSPORTS, default=["tcp"])
    sub.add_argument("--size", nargs="+", type=_bytes, default=[1024, 10 * 1024, 100 * 1024],
                     help="message sizes, such as 1k (default: 1k 10k 100k)")  # fmt: skip
    sub.add_argument("--connections", nargs="+", type=_count, default=[1, 100])
    sub.add_argument("--seconds", type=_seconds, default=1.0, help="the measured window of each run (default: 1)")
    sub.add_argument("--quick", action="store_true", help="a small grid in about two minutes; overrides the rest of it")
    sub.set_defaults(run=_echo)

    sub = commands.add_parser("micro", parents=[common], help="callbacks, timers and tasks")
    sub.set_defaults(run=_micro)

    sub = commands.add_parser("idle", parents=[common], help="memory per idle connection")
    sub.add_argument("--mode", nargs="+", choices=echo.MODES, default=["protocol"])
    sub.add_argument("--connections", nargs="+", type=_count, default=[1000])
    sub.add_argument("--size", nargs="+", type=_bytes, default=[1024], help="what each connection sends once")
    sub.set_defaults(run=_idle)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run a benchmark; the exit status: 0, 1 if a run failed, 2 if it could not begin."""
    if sys.platform != "linux":
        print("benchmarks: only on Linux (they pin processes and read their CPU clocks)", file=sys.stderr)
        return 2
    names = ("echo", "micro", "idle", "-h", "--help")
    options = _parser().parse_args(arguments if arguments and arguments[0] in names else ["echo", *arguments])
    if getattr(options, "quick", False):
        options.size, options.connections, options.rounds, options.seconds = [1024, 100 * 1024], [100], 3, 0.5
    try:
        status: int = options.run(options)
    except BuildFailed as failure:
        print(f"benchmarks: {failure}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
