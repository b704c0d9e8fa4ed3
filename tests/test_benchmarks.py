"""The benchmark's arithmetic: order of runs, ratios, tables.  Nothing is measured here."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from benchmarks.peers import PEERS, Absent, Peer
from benchmarks.processes import RunFailed
from benchmarks.report import Column, Report, table
from benchmarks.rounds import Sample, interleave, order
from benchmarks.summary import figure, ratio

UVLOOP, ASYNCIO, C_SERVER = PEERS["uvloop"], PEERS["asyncio"], PEERS["c-epoll"]


@dataclass(frozen=True)
class Case:
    label: str

    def takes(self, peer: Peer) -> bool:
        return peer is not C_SERVER or self.label == "one"


def sample(peer: str, number: int, cost: float, case: str = "one") -> Sample:
    return Sample(case, peer, number, {"cost": cost})


def test_each_round_begins_with_another_peer() -> None:
    runs = [(number, peer.name) for number, _, peer in order([Case("one")], [UVLOOP, ASYNCIO, C_SERVER], 2)]
    assert runs == [(0, "uvloop"), (0, "asyncio"), (0, "c-epoll"), (1, "asyncio"), (1, "c-epoll"), (1, "uvloop")]


def test_a_peer_is_left_out_of_cases_that_it_does_not_take() -> None:
    runs = [(case.label, peer.name) for _, case, peer in order([Case("one"), Case("two")], [UVLOOP, C_SERVER], 1)]
    assert runs == [("one", "uvloop"), ("one", "c-epoll"), ("two", "uvloop")]


def test_no_peers_no_runs() -> None:
    assert list(order([Case("one")], [], 3)) == []


def test_a_failed_run_is_noted_and_the_others_go_on() -> None:
    def run(case: Case, peer: Peer) -> dict[str, float]:
        if peer is UVLOOP:
            raise RunFailed("no echo for 10 seconds")
        return {"cost": 1.0}

    steps: list[str] = []
    samples = interleave([Case("one")], [UVLOOP, ASYNCIO], 1, run, steps.append)
    assert [(s.peer, s.values, s.failure) for s in samples] == [
        ("uvloop", {}, "no echo for 10 seconds"),
        ("asyncio", {"cost": 1.0}, None),
    ]
    assert steps == ["round 1  one  uvloop", "round 1  one  asyncio"]


def test_ctrl_c_keeps_what_was_measured() -> None:
    def run(case: Case, peer: Peer) -> dict[str, float]:
        if peer is ASYNCIO:
            raise KeyboardInterrupt
        return {"cost": 1.0}

    samples = interleave([Case("one")], [UVLOOP, ASYNCIO], 3, run, lambda _: None)
    assert [s.peer for s in samples] == ["uvloop"]


def test_figure_is_the_median_with_its_spread() -> None:
    samples = [sample("uvloop", number, cost) for number, cost in enumerate([5.0, 1.0, 2.0])]
    found = figure(samples, "one", "uvloop", "cost")
    assert found is not None
    assert (found.median, found.low, found.high) == (2.0, 1.0, 5.0)
    assert figure(samples, "one", "asyncio", "cost") is None


def test_ratios_are_taken_within_each_round() -> None:
    # The machine halves its speed in the second round: the medians of the costs would give another ratio.
    samples = [sample("uvloop", 0, 6.0), sample("asyncio", 0, 12.0)]
    samples += [sample("uvloop", 1, 12.0), sample("asyncio", 1, 24.0)]
    samples += [sample("asyncio", 2, 12.0)]
    assert ratio(samples, "one", "asyncio", "cost", "uvloop") == pytest.approx(0.5)
    assert ratio(samples, "one", "uvloop", "cost", "c-epoll") is None


COLUMNS = (
    Column("ms", "cost", scale=1000, digits=0),
    Column("min-max", "cost", show="spread"),
    Column("{baseline} / it", "cost", show="ratio"),
)


def test_table() -> None:
    samples = [sample("uvloop", 0, 1.0), sample("asyncio", 0, 2.0), sample("uvloop", 1, 1.5)]
    samples += [Sample("one", "c-epoll", 0, failure="it said nothing")]
    assert table(COLUMNS, samples, "uvloop") == [
        "| case | peer    |     ms | min-max | uvloop / it |",
        "|------|---------|-------:|--------:|------------:|",
        "| one  | uvloop  |  1,250 | 1.0-1.5 |        1.00 |",
        "| one  | asyncio |  2,000 | 2.0-2.0 |        0.50 |",
        "| one  | c-epoll | failed |       - |           - |",
    ]


def test_report_notes_failures_starved_connections_and_absent_peers() -> None:
    samples = [
        Sample("one", "asyncio", 0, {"cost": 1.0, "starved": 3.0}),
        Sample("one", "asyncio", 1, failure="it said nothing"),
    ]
    report = Report("Echo", ["Two rounds."], COLUMNS, "uvloop", [Absent(UVLOOP, "No module")], samples)
    assert report.markdown().splitlines()[-3:] == [
        "- uvloop is absent: No module",
        "- one, asyncio: 1 of 2 runs failed: it said nothing",
        "- one, asyncio: up to 3 connections were not served once in the window",
    ]
    assert '"absent": "No module"' in report.json()
