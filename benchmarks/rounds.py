"""Interleaved rounds: what keeps a busy or throttled machine from favouring anybody.

A round takes every case once, and within a case every peer once, one right after the other; the order of the
peers is rotated from round to round.  So the runs that are compared with each other are seconds apart,
whatever the machine does in the course of minutes, and nobody always comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from .peers import Peer
from .processes import RunFailed

__all__ = ["Case", "Sample", "interleave", "order"]


class Case(Protocol):
    """One row of the grid."""

    @property
    def label(self) -> str:
        """What the tables call it; no two cases of a benchmark share one."""

    def takes(self, peer: Peer) -> bool:
        """Whether this can be asked of `peer`."""


@dataclass(frozen=True)
class Sample:
    """What one run gave: figures by name, or the reason that it gave none."""

    case: str
    peer: str
    round: int
    values: dict[str, float] = field(default_factory=dict)
    failure: str | None = None


C = TypeVar("C", bound=Case)


def order(cases: Sequence[C], peers: Sequence[Peer], rounds: int) -> Iterator[tuple[int, C, Peer]]:
    """Every run, in the order in which it is made: (round, case, peer)."""
    for number in range(rounds):
        turn = number % len(peers) if peers else 0
        for case in cases:
            for peer in (*peers[turn:], *peers[:turn]):
                if case.takes(peer):
                    yield number, case, peer


def interleave(
    cases: Sequence[C],
    peers: Sequence[Peer],
    rounds: int,
    run: Callable[[C, Peer], dict[str, float]],
    step: Callable[[str], None],
) -> list[Sample]:
    """Make all runs.  `step` is told what comes next.  Ctrl-C ends it early, with what there is."""
    samples: list[Sample] = []
    try:
        for number, case, peer in order(cases, peers, rounds):
            step(f"round {number + 1}  {case.label}  {peer.name}")
            try:
                samples.append(Sample(case.label, peer.name, number, run(case, peer)))
            except RunFailed as failure:
                samples.append(Sample(case.label, peer.name, number, failure=str(failure)))
    except KeyboardInterrupt:
        pass
    return samples
