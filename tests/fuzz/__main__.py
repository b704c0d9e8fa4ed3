"""The fuzzers' command line: ``python -m tests.fuzz [options] [FAMILY ...]``; ``--help`` tells the options.

Plays each program on each loop and tier, tells what it found with the one command that repeats it, and exits with 1 if
there was anything.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pprint import pformat

from ..support import ROOT, child_environment
from . import FAMILIES, Family, faults
from .program import Source
from .runner import Report, Setting
from .stage import WITHOUT

#: Programs that one worker plays.
_BATCH = 10

#: The environment of each tier.
_TIERS: dict[str, dict[str, str]] = {
    "native": {"IOCP_LOOP_NATIVE": "1"},
    "python": {"IOCP_LOOP_NATIVE": "0"},
    "auto": {},
}

#: How often what was found is played again.  A difference between loops counts only if it comes every time: a program's
#: timing may vary.
_TRIES = 3


@dataclass(frozen=True)
class Lane:
    """A loop and a tier on which programs are played."""

    loop: str
    tier: str

    def __str__(self) -> str:
        return self.loop if self.loop == "stock" else f"{self.loop}/{self.tier}"


class Fuzzer:
    """Plays programs in workers, several at a time."""

    def __init__(self, options: argparse.Namespace, pool: ThreadPoolExecutor) -> None:
        self.lanes = [
            Lane(loop, tier)
            for loop in options.loops.split(",")
            for tier in (("auto",) if loop == "stock" else options.tier.split(","))
        ]
        self.limit: float = options.limit
        self.verbose: bool = options.verbose
        self.without: str = options.without
        self.found = 0
        self._pool = pool

    def play(self, families: Iterable[Family], seeds: range) -> None:
        """Play `seeds` of each of `families`, and tell what was found."""
        batches = [seeds[at : at + _BATCH] for at in range(0, len(seeds), _BATCH)]
        jobs = [(family, batch, self._begin(family, batch)) for family in families for batch in batches]
        for family, batch, running in jobs:
            before = self.found
            of_lanes = [future.result() for future in running.values()]
            for reports in zip(*of_lanes, strict=True):
                self._judge(family, dict(zip(running, reports, strict=True)))
            verdict = "ok" if self.found == before else f"{self.found - before} FOUND"
            seeds_played = f"seeds {batch[0]}-{batch[-1]}" if len(batch) > 1 else f"seed {batch[0]}"
            print(f"{family.name:<10}  {seeds_played}  {' '.join(map(str, running))}  {verdict}", flush=True)

    def _begin(self, family: Family, seeds: range) -> dict[Lane, Future[list[Report]]]:
        return {
            lane: self._pool.submit(self._run, lane, family, seeds)
            for lane in self.lanes
            if family.stock or lane.loop != "stock"
        }

    def _run(self, lane: Lane, family: Family, seeds: Sequence[int]) -> list[Report]:
        """A report for each of `seeds`."""
        environment = child_environment(**{WITHOUT: self.without}, **_TIERS[lane.tier])
        if family.preload:
            environment |= faults.preloaded(environment)
        command = [sys.executable, "-X", "faulthandler", "-m", f"{__package__}.worker"]
        arguments = [lane.loop, str(self.limit), family.name, *map(str, seeds)]
        worker = subprocess.run(
            [*command, *arguments], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        reports = list(map(Report.from_json, worker.stdout.splitlines()))
        lost = f"the worker exited with {worker.returncode}\n{worker.stderr}"
        return reports + [Report(family.name, seed, [lost]) for seed in seeds[len(reports) :]]

    # -- verdicts ----------------------------------------------------------------------------------

    def _judge(self, family: Family, reports: dict[Lane, Report]) -> None:
        for lane, report in reports.items():
            if report.problems and lane.loop != "stock":
                again = sum(bool(other.problems) for other in self._run(lane, family, [report.seed] * _TRIES))
                self._tell(report, [lane], report.problems, f"comes again {again} of {_TRIES} times")
            elif report.problems and self.verbose:
                print(f"(asyncio's own loop, {family.name} seed {report.seed}: {report.problems})")
        # Only sound lives are compared.  asyncio's own loop, where it is there, is what the others are compared with.
        sound = sorted((lane for lane in reports if not reports[lane].problems), key=lambda lane: lane.loop != "stock")
        for lane in sound[1:]:
            if reports[sound[0]].trace != reports[lane].trace:
                self._compare(family, reports[lane].seed, sound[0], lane)

    def _compare(self, family: Family, seed: int, *lanes: Lane) -> None:
        """Two loops have seen something else: a finding if they do so every time."""
        played = [self._run(lane, family, [seed] * _TRIES) for lane in lanes]
        pairs = list(zip(*played, strict=True))
        if all(one.trace != other.trace and not one.problems and not other.problems for one, other in pairs):
            one, other = pairs[-1]
            self._tell(one, list(lanes), [_difference(one.trace, other.trace, *lanes)], "comes every time")

    def _tell(self, report: Report, lanes: list[Lane], problems: list[str], how_often: str) -> None:
        self.found += 1
        loops = ",".join(dict.fromkeys(lane.loop for lane in lanes))
        tiers = ",".join(dict.fromkeys(lane.tier for lane in lanes if lane.loop != "stock"))
        print(f"FOUND: {report.family} seed {report.seed} on {' and '.join(map(str, lanes))} ({how_often})")
        for problem in problems:
            print("    " + problem.replace("\n", "\n    "))
        options = [f"--loops {loops}", f"--tier {tiers or 'auto'}", f"--seed {report.seed} --count 1"]
        if self.without:
            options.append(f"--without {self.without}")
        print(f"    repeat: python -m {__package__} {' '.join(options)} {report.family}")


def _difference(one: dict[str, list[str]], other: dict[str, list[str]], *lanes: Lane) -> str:
    """Where two traces part."""
    for actor in sorted(one.keys() | other.keys()):
        left, right = one.get(actor, []), other.get(actor, [])
        if left == right:
            continue
        same = next(
            (at for at, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]),
            min(len(left), len(right)),
        )
        lines = [f"{actor} sees something else:", *(f"  {note}" for note in left[max(0, same - 4) : same])]
        for lane, notes in zip(lanes, (left, right), strict=True):
            lines += [f"  {lane}: {note}" for note in notes[same : same + 3] or ["(nothing more)"]]
        return "\n".join(lines)
    return "no difference"


def _show(families: Iterable[Family], seeds: range) -> None:
    for family in families:
        for seed in seeds:
            source = Source(family.name, seed)
            print(f"{family.name} seed {seed}: {Setting.make(source.sub('setting'), family)}")
            print(pformat(family.make(source.sub("program")), width=120))


def _rounds(options: argparse.Namespace) -> Iterator[range]:
    """The seeds of each round."""
    seed = options.seed
    if options.minutes is None:
        yield range(seed, seed + options.count)
        return
    deadline = time.monotonic() + 60 * options.minutes
    while time.monotonic() < deadline:
        yield range(seed, seed + _BATCH)
        seed += _BATCH


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 if anything was found."""
    names = [family.name for family in FAMILIES]
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(names)}")
    parser.add_argument("--loops", default="uring,poll,stock", help="drivers, stock, module:function (%(default)s)")
    parser.add_argument("--tier", default="native,python", help="native, python, auto (%(default)s)")
    parser.add_argument("--seed", type=int, help="the first seed (a new one)")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--count", type=int, default=10, help="seeds of each family (%(default)s)")
    amount.add_argument("--minutes", type=float, help="go on for so long, ten seeds of each family at a time")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a program may take (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="programs at a time (%(default)s)")
    parser.add_argument(
        "--without", default="", metavar="ACTIONS", help="leave these out, to look behind a known fault"
    )
    parser.add_argument("--show", action="store_true", help="show the programs, play nothing")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell what asyncio's own loop does wrong, too")
    options = parser.parse_args(arguments)
    if unknown := set(options.families) - set(names):
        parser.error(f"no such family: {', '.join(sorted(unknown))}")
    if options.seed is None:
        options.seed = int.from_bytes(os.urandom(3), "big")
    families = [family for family in FAMILIES if not options.families or family.name in options.families]
    why_not = faults.why_not()
    if why_not and any(family.preload for family in families):
        print(f"faults: skipped, {why_not}")
        families = [family for family in families if not family.preload]
    if options.show:
        _show(families, range(options.seed, options.seed + options.count))
        return 0
    print(f"first seed {options.seed}, Python {sys.version.partition(' ')[0]}", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        fuzzer = Fuzzer(options, pool)
        for seeds in _rounds(options):
            fuzzer.play(families, seeds)
    print(f"{fuzzer.found} found" if fuzzer.found else "nothing found")
    return 1 if fuzzer.found else 0


if __name__ == "__main__":
    sys.exit(main())
