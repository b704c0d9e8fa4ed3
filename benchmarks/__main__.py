"""The command line: ``python -m benchmarks [NAME] ...``; ``--help`` tells the names."""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import client, echo, http, idle, latency, life, many, micro, parallel, syscalls
from .benchmark import Plan
from .native import BuildFailed
from .peers import DEFAULT, PEERS, Absent, Present, probe
from .progress import progress
from .publish import PublishFailed, publish, redraw
from .report import Report
from .rounds import interleave, order

_HERE = Path(__file__).resolve().parent
_RESULTS = _HERE / ".results"
_PAGE = _HERE.parent / "docs" / "performance.md"

#: In the order in which they are run and shown.
_BENCHMARKS = (
    echo.ECHO,
    client.CLIENT,
    http.HTTP,
    micro.MICRO,
    life.LIFE,
    latency.LATENCY,
    many.MANY,
    idle.IDLE,
    syscalls.SYSCALLS,
    parallel.PARALLEL,  # not in `all`: it says something on a free-threaded Python only
)


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


# ---------------------------------------------------------------------------------------------------------------------
# Plans: from the command line to cases
# ---------------------------------------------------------------------------------------------------------------------


def _rounds(options: argparse.Namespace, what: str) -> list[str]:
    if options.rounds == 1:
        return [f"One round{what}: no more than a look."]
    return [f"{options.rounds} interleaved rounds{what}; medians over the rounds."]


def _available(transports: Sequence[str]) -> tuple[list[str], list[str]]:
    """The transports that can be measured here, and what to say of the others."""
    reasons = {transport: echo.missing(transport) for transport in transports}
    notes = [f"{transport} is absent: {reason}" for transport, reason in reasons.items() if reason is not None]
    return [transport for transport, reason in reasons.items() if reason is None], notes


def _echo(options: argparse.Namespace) -> Plan[echo.Cell]:
    transports, notes = _available(options.transport)
    cells = echo.grid(options.mode, transports, options.size, options.connections)
    setting = _rounds(options, f" of {options.seconds:g} s, server and client on a core each")
    run = functools.partial(echo.measure, seconds=options.seconds)
    return Plan(echo.ECHO, setting, cells, run, notes)


def _client(options: argparse.Namespace) -> Plan[client.Asking]:
    cells = echo.grid(options.mode, options.transport, options.size, options.connections)
    setting = _rounds(options, f" of {options.seconds:g} s, server and client on a core each")
    cases = [client.Asking(cell) for cell in cells]
    return Plan(client.CLIENT, setting, cases, functools.partial(client.run, seconds=options.seconds))


def _http(options: argparse.Namespace) -> Plan[http.Site]:
    reasons = {name: http.missing(name) for name in options.application}
    present = [name for name, reason in reasons.items() if reason is None]
    notes = [f"{name} is absent: {reason}" for name, reason in reasons.items() if reason is not None]
    sites = [http.Site(name, size, count) for name in present for size in options.size for count in options.connections]
    what = f" of {options.seconds:g} s, server and client on a core each; {http.versions(present)}"
    run = functools.partial(http.run, seconds=options.seconds)
    return Plan(http.HTTP, _rounds(options, what), sites, run, notes)


def _micro(options: argparse.Namespace) -> Plan[micro.Workload]:
    return Plan(micro.MICRO, _rounds(options, ", each in a fresh process"), micro.workloads(), micro.run)


def _life(options: argparse.Namespace) -> Plan[micro.Workload]:
    return Plan(life.LIFE, _rounds(options, ", each in a fresh process"), life.workloads(), life.run)


def _latency(options: argparse.Namespace) -> Plan[latency.Neighbour]:
    cases = [
        latency.Neighbour(mode, busy, cores)
        for mode in options.mode
        for busy in options.busy
        for cores in (options.cores if busy else ["one"])
    ]
    setting = _rounds(options, f" of {options.seconds:g} s, the client on a core")
    return Plan(latency.LATENCY, setting, cases, functools.partial(latency.run, seconds=options.seconds))


def _parallel(options: argparse.Namespace) -> Plan[parallel.Crew]:
    crews = [
        parallel.Crew(mode, threads, size, count)
        for mode in options.mode
        for threads in options.threads
        for size in options.size
        for count in options.connections
    ]
    gil = "on" if getattr(sys, "_is_gil_enabled", lambda: True)() else "off"
    setting = _rounds(options, f" of {options.seconds:g} s, each in a fresh process on all cores; the GIL is {gil}")
    return Plan(parallel.PARALLEL, setting, crews, functools.partial(parallel.run, seconds=options.seconds))


def _many(options: argparse.Namespace) -> Plan[many.Growth]:
    reasons = {count: many.missing(count) for count in options.connections}
    cases = [
        many.Growth(echo.Cell(mode, "tcp", size, count), options.few)
        for mode in options.mode
        for size in options.size
        for count in options.connections
        if reasons[count] is None
    ]
    notes = [f"{count} connections are left out: {reason}" for count, reason in reasons.items() if reason is not None]
    setting = _rounds(options, f" of {options.seconds:g} s, server and client on a core each")
    return Plan(many.MANY, setting, cases, functools.partial(many.run, seconds=options.seconds), notes)


def _idle(options: argparse.Namespace) -> Plan[idle.Crowd]:
    transports, notes = _available(options.transport)
    crowds = [
        idle.Crowd(mode, transport, count, size)
        for transport in transports
        for mode in options.mode
        for count in options.connections
        for size in options.size
    ]
    return Plan(idle.IDLE, _rounds(options, ", each with a fresh server"), crowds, idle.run, notes)


def _syscalls(options: argparse.Namespace) -> Plan[syscalls.Traced]:
    transports, notes = _available(options.transport)
    cells = echo.grid(options.mode, transports, options.size, options.connections)
    reasons = {tracer: syscalls.missing(tracer) for tracer in options.tracer}
    tracers = [tracer for tracer, reason in reasons.items() if reason is None]
    if not tracers:
        cells, notes = [], ["nothing was counted: " + "; ".join(filter(None, reasons.values()))]
    setting = _rounds(options, f" of {options.messages:,} messages, counted by {(*tracers, 'nobody')[0]}")
    run = functools.partial(syscalls.run, messages=options.messages, tracer=tracers[0] if tracers else "")
    return Plan(syscalls.SYSCALLS, setting, [syscalls.Traced(cell) for cell in cells], run, notes)


#: What `all` runs: the grid of each benchmark, and how much of it is left with --quick.
_GRIDS: dict[str, tuple[list[str], list[str]]] = {
    "echo": (
        ["--mode", *echo.MODES, "--transport", *echo.TRANSPORTS, "--connections", "1", "3", "100", "1000"],
        ["--transport", *echo.TRANSPORTS, "--size", "1k", "--connections", "100", "--seconds", "0.3", "--rounds", "1"],
    ),
    "client": (
        ["--mode", *client.MODES, "--transport", *client.TRANSPORTS],
        ["--size", "1k", "--connections", "100", "--seconds", "0.3", "--rounds", "1"],
    ),
    "http": ([], ["--size", "14", "--seconds", "0.3", "--rounds", "1"]),
    "micro": ([], ["--rounds", "1"]),
    "life": ([], ["--rounds", "1"]),
    "latency": ([], ["--mode", "protocol", "--seconds", "1", "--rounds", "1"]),
    "many": ([], ["--seconds", "1", "--rounds", "1"]),
    "idle": ([], ["--rounds", "1"]),
    "syscalls": ([], ["--connections", "100", "--messages", "2000", "--rounds", "1"]),
}


def _all(options: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The options of every benchmark in turn."""
    common = ["--peers", *options.peers, "--baseline", options.baseline, "--output", str(options.output)]
    for name, (full, quick) in _GRIDS.items():
        chosen = _parser().parse_args([name, *common, *(quick if options.quick else full)])
        for given in ("rounds", "seconds"):
            if getattr(options, given) is not None and hasattr(chosen, given):
                setattr(chosen, given, getattr(options, given))
        yield chosen


# ---------------------------------------------------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------------------------------------------------


def _command(arguments: Sequence[str]) -> str:
    """How these figures are made again: the command line without the place that the results went to."""
    kept = list(arguments)
    if "--output" in kept:
        at = kept.index("--output")
        del kept[at : at + 2]
    return shlex.join(["python", "-m", "benchmarks", *kept])


def _measure(chosen: Sequence[argparse.Namespace], command: str) -> int:
    """Probe the peers, make the rounds of each benchmark, print and write its report.  0, or 1 if a run failed."""
    found = {name: probe(PEERS[name]) for name in chosen[0].peers}
    present = [peer.peer for peer in found.values() if isinstance(peer, Present)]
    for peer in found.values():
        if isinstance(peer, Absent):
            print(f"{peer.peer.name} is absent: {peer.reason}", file=sys.stderr)
    plans: list[tuple[argparse.Namespace, Plan[Any]]] = [(options, options.plan(options)) for options in chosen]
    totals = [sum(1 for _ in order(plan.cases, present, options.rounds)) for options, plan in plans]
    failed = False
    with progress(sum(totals)) as step:
        for (options, plan), total in zip(plans, totals, strict=True):
            samples = interleave(plan.cases, present, options.rounds, plan.run, _named(plan.benchmark.name, step))
            report = Report(
                plan.benchmark, plan.setting, options.baseline, list(found.values()), samples, plan.notes, command
            )
            paths = report.write(options.output)
            print(report.markdown(), flush=True)
            print(f"written to {' and '.join(map(str, paths))}", file=sys.stderr)
            failed = failed or any(sample.failure for sample in samples)
            if len(samples) < total:
                print(f"stopped after {len(samples)} of {total} runs of {plan.benchmark.name}", file=sys.stderr)
                break
    return 1 if failed else 0


def _named(name: str, step: Callable[[str], None]) -> Callable[[str], None]:
    return lambda what: step(f"{name}  {what}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="What the loop costs, beside other loops and servers in C.  Without a name: echo.",
    )
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--output", type=Path, default=_RESULTS, metavar="DIRECTORY",
                       help="where tables and samples go, or are (default: benchmarks/.results)")  # fmt: skip
    who = argparse.ArgumentParser(add_help=False, parents=[place])
    who.add_argument("--peers", nargs="+", choices=PEERS, default=list(DEFAULT), metavar="PEER",
                     help=f"who is measured, of {', '.join(PEERS)} (default: {' '.join(DEFAULT)})")  # fmt: skip
    who.add_argument("--baseline", choices=PEERS, default="uvloop", metavar="PEER",
                     help="whom the ratios compare with (default: uvloop)")  # fmt: skip
    common = argparse.ArgumentParser(add_help=False, parents=[who])
    common.add_argument("--rounds", type=_count, default=5, help="how often each run is made (default: 5)")

    commands = parser.add_subparsers(dest="benchmark", required=True)

    def add(plan: Callable[[argparse.Namespace], Plan[Any]], name: str, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[common], help=summary)
        sub.set_defaults(plan=plan)
        return sub

    def window(sub: argparse.ArgumentParser, seconds: float) -> None:
        sub.add_argument("--seconds", type=_seconds, default=seconds,
                         help=f"the measured window of each run (default: {seconds:g})")  # fmt: skip

    def cells(sub: argparse.ArgumentParser, modes: list[str], sizes: list[int], connections: list[int]) -> None:
        sub.add_argument("--mode", nargs="+", choices=echo.MODES, default=modes)
        sub.add_argument("--size", nargs="+", type=_bytes, default=sizes, help="message sizes, such as 1k or 100")
        sub.add_argument("--connections", nargs="+", type=_count, default=connections)

    sub = commands.add_parser("all", parents=[who], help="every benchmark over its whole grid (an hour and more)")
    sub.add_argument("--quick", action="store_true", help="a little of each, in about two minutes")
    sub.add_argument("--rounds", type=_count, help="how often each run is made (default: 5, --quick: 1)")
    sub.add_argument("--seconds", type=_seconds, help="the measured window of each run (default: each benchmark's own)")

    sub = add(_echo, "echo", "CPU, throughput and latency per echo")
    cells(sub, ["protocol", "streams", "sock"], [1024, 10 * 1024, 100 * 1024], [1, 100])
    sub.add_argument("--transport", nargs="+", choices=echo.TRANSPORTS, default=["tcp"])
    window(sub, 1.0)
    sub.add_argument("--quick", action="store_true", help="a small grid in about two minutes; overrides the rest of it")

    sub = add(_client, "client", "CPU per echo, the client's side")
    cells(sub, ["protocol", "streams", "sock"], [1024, 10 * 1024, 100 * 1024], [1, 100])
    sub.add_argument("--transport", nargs="+", choices=client.TRANSPORTS, default=["tcp"])
    window(sub, 1.0)

    sub = add(_http, "http", "CPU per request of aiohttp and uvicorn")
    sub.add_argument("--application", nargs="+", choices=http.APPLICATIONS, default=list(http.APPLICATIONS))
    sub.add_argument("--size", nargs="+", type=_bytes, default=list(http.BODIES), help="bytes of a body, such as 10k")
    sub.add_argument("--connections", nargs="+", type=_count, default=[100])
    window(sub, 1.0)

    add(_micro, "micro", "callbacks, timers, tasks, wake-ups and children")
    add(_life, "life", "connections that are made and end, and the small things that are made and dropped")

    sub = add(_latency, "latency", "latency beside a busy thread")
    sub.add_argument("--mode", nargs="+", choices=echo.MODES, default=["protocol", "streams"])
    sub.add_argument("--busy", nargs="+", type=int, default=[0, 1], help="threads that compute (default: 0 1)")
    sub.add_argument("--cores", nargs="+", choices=latency.CORES, default=["all"],
                     help="those of a server with busy threads: all, or one for it all (default: all)")  # fmt: skip
    window(sub, 2.0)

    sub = add(_parallel, "parallel", "loops in threads of one process, beside one")
    sub.add_argument(
        "--mode", nargs="+", choices=parallel.MODES, default=["protocol", "streams", "named-streams", "raw"]
    )
    sub.add_argument("--threads", nargs="+", type=_count, default=[2], help="beside one (default: 2)")
    sub.add_argument("--size", nargs="+", type=_bytes, default=[1024], help="message sizes, such as 1k or 100")
    sub.add_argument("--connections", nargs="+", type=_count, default=[50], help="for each thread (default: 50)")
    window(sub, 1.0)

    sub = add(_many, "many", "CPU per echo with ten thousand connections")
    cells(sub, ["protocol"], [1024], [10_000])
    sub.add_argument("--few", type=_count, default=100, help="connections to compare with (default: 100)")
    window(sub, 2.0)

    sub = add(_idle, "idle", "memory per idle connection")
    cells(sub, ["protocol"], [1024], [1000])
    sub.add_argument("--transport", nargs="+", choices=idle.TRANSPORTS, default=list(idle.TRANSPORTS))

    sub = add(_syscalls, "syscalls", "system calls per message")
    cells(sub, ["protocol", "streams", "sock"], [1024], [1, 100])
    sub.add_argument("--transport", nargs="+", choices=echo.TRANSPORTS, default=["tcp"])
    sub.add_argument("--tracer", nargs="+", choices=syscalls.TRACERS, default=list(syscalls.TRACERS),
                     help="who counts: the first of these that can (default: perf strace)")  # fmt: skip
    sub.add_argument("--messages", type=_count, default=20_000, help="how many each run sends (default: 20000)")

    sub = commands.add_parser("publish", parents=[place], help="put the last results into the documentation")
    sub.add_argument("--page", type=Path, default=_PAGE, help="the Markdown file (default: docs/performance.md)")
    sub = commands.add_parser("plots", help="draw the plots anew from the tables of the documentation")
    sub.add_argument("--page", type=Path, default=_PAGE, help="the Markdown file (default: docs/performance.md)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run a benchmark; the exit status: 0, 1 if a run failed, 2 if it could not begin."""
    names = ("all", "publish", "plots", *(benchmark.name for benchmark in _BENCHMARKS), "-h", "--help")
    if not arguments or arguments[0] not in names:
        arguments = ["echo", *arguments]
    options = _parser().parse_args(arguments)
    try:
        if options.benchmark in ("publish", "plots"):
            page = options.page
            paths = (
                publish(options.output, page, _BENCHMARKS)
                if options.benchmark == "publish"
                else redraw(page, page.parent)
            )
            for path in paths:
                print(f"written to {path}", file=sys.stderr)
            return 0
        if sys.platform != "linux":
            print("benchmarks: only on Linux (they pin processes and read their CPU clocks)", file=sys.stderr)
            return 2
        if options.benchmark == "all":
            return _measure(list(_all(options)), _command(arguments))
        if getattr(options, "quick", False):
            options.size, options.connections, options.rounds, options.seconds = [1024, 100 * 1024], [100], 3, 0.5
        return _measure([options], _command(arguments))
    except (BuildFailed, PublishFailed) as failure:
        print(f"benchmarks: {failure}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
