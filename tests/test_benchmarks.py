"""The benchmark's arithmetic: order of runs, ratios, tables, what the documentation gets.

Nothing is measured here; that runs give figures at all is the subject of test_benchmarks_runs.py.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import callbacks, client, echo, idle, latency, parallel
from benchmarks.__main__ import _command, _parser
from benchmarks.benchmark import Benchmark, Column, Place
from benchmarks.peers import DEFAULT, OURS, PEERS, Absent, Peer, Present
from benchmarks.processes import RunFailed
from benchmarks.publish import BEGIN, END, PublishFailed, publish, redraw
from benchmarks.report import Report, pivot, table
from benchmarks.rounds import Sample, interleave, order
from benchmarks.summary import figure, ratio
from benchmarks.syscalls import perf_counts, strace_counts

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


BENCHMARK = Benchmark(
    "trial", "Trial", "What it costs.", COLUMNS, COLUMNS[0], lambda label: Place(*label.split(maxsplit=2))
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
    samples += [Sample("two", "asyncio", number, {"cost": 1.0, "lost": 2.0}) for number in range(2)]
    report = Report(
        BENCHMARK, ["Two rounds."], "uvloop", [Absent(UVLOOP, "No module")], samples, ["tls is absent: why"]
    )
    assert report.markdown().splitlines()[-5:] == [
        "- uvloop is absent: No module",
        "- tls is absent: why",
        "- one, asyncio: 1 of 2 runs failed: it said nothing",
        "- one, asyncio: up to 3 connections were not served once in the window",
        "- two, asyncio: 4 datagrams were lost and sent again",
    ]
    assert '"absent": "No module"' in report.json()


# ---------------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------------


def test_the_grid_has_no_cells_that_can_not_be() -> None:
    cells = echo.grid(echo.MODES, echo.TRANSPORTS, [1024, 102_400], [1])
    found = {(cell.transport, cell.mode) for cell in cells}
    assert {mode for transport, mode in found if transport == "tls"} == {
        "protocol",
        "buffered",
        "streams",
        "named-streams",
    }
    assert {mode for transport, mode in found if transport == "udp"} == {"protocol"}
    assert [cell.label for cell in cells if cell.transport == "udp"] == ["protocol udp 1 KiB x 1"]
    assert len(cells) == 10 + 10 + 8 + 1
    assert len({cell.label for cell in cells}) == len(cells)


def test_a_server_in_c_takes_protocol_cells_of_its_transports() -> None:
    def takes(peer: str) -> set[tuple[str, str]]:
        cells = echo.grid(echo.MODES, echo.TRANSPORTS, [1024], [1])
        return {(cell.transport, cell.mode) for cell in cells if cell.takes(PEERS[peer])}

    assert takes("c-epoll") == {("tcp", "protocol"), ("unix", "protocol"), ("udp", "protocol")}
    assert takes("c-uring") == {("tcp", "protocol"), ("unix", "protocol")}


def test_streams_by_name_are_for_our_loops() -> None:
    for case in (
        echo.Cell("named-streams", "tcp", 1024, 1),
        client.Asking(echo.Cell("named-streams", "tcp", 1024, 1)),
        parallel.Crew("named-streams", 2, 1024, 1),
        latency.Neighbour("named-streams", 0, "all"),
        idle.Crowd("named-streams", "tcp", 1, 1024),
    ):
        assert [name for name, peer in PEERS.items() if case.takes(peer)] == list(OURS)


def test_a_label_tells_its_place() -> None:
    cell = echo.Cell("streams", "unix", 10 * 1024, 3)
    assert echo.ECHO.place(cell.label) == Place("unix", "streams", "10 KiB x 3")


def test_our_peers_and_the_defaults() -> None:
    assert set(OURS) == {name for name in PEERS if name.startswith("iocp_loop-")}
    assert set(DEFAULT) <= set(PEERS)
    assert dict(PEERS["iocp_loop-uring-python"].environment) == {"IOCP_LOOP_NATIVE": "0"}
    assert not PEERS["iocp_loop-uring"].environment


def test_every_benchmark_has_a_plan() -> None:
    for name in ("echo", "client", "http", "micro", "life", "latency", "many", "idle", "syscalls", "parallel"):
        options = _parser().parse_args([name, "--rounds", "1"])
        assert callable(options.plan), name


def test_the_command_names_no_place_of_this_machine() -> None:
    command = _command(["all", "--output", "/somewhere/here", "--rounds", "3"])
    assert command == "python -m benchmarks all --rounds 3"


SMALL_WORKLOADS = [name for name in callbacks.WORKLOADS if name != "subprocess"]


@pytest.mark.parametrize("name", SMALL_WORKLOADS)
def test_a_workload_comes_to_its_end(name: str) -> None:
    async def work() -> None:
        await asyncio.wait_for(callbacks.WORKLOADS[name].run(1000), 30.0)

    asyncio.run(work())


STRACE = """\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.000300           1       200           sendto
 40.00    0.000200           1       201         1 recvfrom
------ ----------- ----------- --------- --------- ----------------
100.00    0.000500           1       401         1 total
"""

PERF = """\
# started on Tue Nov 24 15:17:13 2026

402,,raw_syscalls:sys_enter,7008116,100.00,,
200,,syscalls:sys_enter_sendto,7008116,100.00,,
0,,syscalls:sys_enter_select,7008116,100.00,,
<not counted>,,syscalls:sys_enter_poll,0,100.00,,
"""


def test_what_the_tracers_leave_behind() -> None:
    assert strace_counts(STRACE) == {"sendto": 200, "recvfrom": 201}
    assert perf_counts(PERF) == {"": 402, "sendto": 200}


# ---------------------------------------------------------------------------------------------------------------------
# The documentation
# ---------------------------------------------------------------------------------------------------------------------


def test_pivot_has_the_peers_side_by_side() -> None:
    samples = [sample("uvloop", 0, 1.0), sample("iocp_loop-poll", 0, 0.5), Sample("one", "c-epoll", 0, failure="no")]
    samples += [sample("uvloop", 0, 2.0, "two")]
    assert pivot(COLUMNS[0], {"one": "first", "two": "second"}, samples, "uvloop") == [
        "| ms     | uvloop | iocp_loop-poll | c-epoll |",
        "|--------|-------:|---------------:|--------:|",
        "| first  |  1,000 |     500 (2.00) |  failed |",
        "| second |  2,000 |              - |       - |",
    ]


def a_report() -> Report:
    samples = [sample(peer, 0, cost, case) for case in ("tcp p one", "udp p two")
               for peer, cost in (("uvloop", 1.0), ("iocp_loop-poll", 0.5), ("asyncio", 4.0))]  # fmt: skip
    peers: list[Present | Absent] = [
        Present(UVLOOP, "9.9"),
        Present(PEERS["iocp_loop-poll"], "0.1"),
        Absent(PEERS["rloop"], "No module"),
    ]
    return Report(BENCHMARK, ["One round."], "uvloop", peers, samples, ["tls is absent: why"], "python -m benchmarks")


def test_a_report_comes_back_from_its_json() -> None:
    report = a_report()
    assert Report.load(report.json(), BENCHMARK) == report


def test_a_report_of_another_benchmark_is_refused() -> None:
    with pytest.raises(ValueError, match="samples of trial, not of echo"):
        Report.load(a_report().json(), echo.ECHO)


PAGE = f"# Performance\n\nBy hand.\n\n{BEGIN}\nold\n{END}\n\nAlso by hand.\n"


def test_publish_replaces_the_block_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "performance.md"
    page.parent.mkdir()
    page.write_text(PAGE)
    a_report().write(tmp_path)
    written = publish(tmp_path, page, [echo.ECHO, BENCHMARK])
    text = page.read_text()
    assert text.startswith(f"# Performance\n\nBy hand.\n\n{BEGIN}\nMeasured ")
    assert text.endswith(f"\n{END}\n\nAlso by hand.\n")
    assert "old" not in text
    assert "## Trial" in text
    assert "### Trial, udp" in text
    assert "Absent: rloop (No module)." in text
    assert "| p one |" in text
    assert "- tls is absent: why" in text
    figures = [page.parent / "figures" / f"trial-{table}.svg" for table in ("tcp", "udp")]
    assert written == [page, *figures]
    assert all("<svg" in figure.read_text() for figure in figures)
    before = [path.read_text() for path in written]
    publish(tmp_path, page, [BENCHMARK])
    assert [path.read_text() for path in written] == before


def test_publish_needs_results_and_a_block(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text("# Performance\n")
    with pytest.raises(PublishFailed, match="run a benchmark first"):
        publish(tmp_path, page, [BENCHMARK])
    a_report().write(tmp_path)
    with pytest.raises(PublishFailed, match="no block for the figures"):
        publish(tmp_path, page, [BENCHMARK])
    (tmp_path / "trial.json").write_text("{}")
    with pytest.raises(PublishFailed, match="no samples of this version"):
        publish(tmp_path, page, [BENCHMARK])
    assert page.read_text() == "# Performance\n"


def test_the_page_of_the_documentation_has_the_block() -> None:
    text = (Path(__file__).parent.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.index(BEGIN) < text.index(END)


def test_the_plots_of_the_documentation_are_drawn_from_its_tables(tmp_path: Path) -> None:
    """`python -m benchmarks plots` draws them anew; by hand nobody changes either."""
    docs = Path(__file__).parent.parent / "docs"
    drawn = redraw(docs / "performance.md", tmp_path)
    assert {path.name for path in drawn} == {path.name for path in (docs / "figures").glob("*.svg")}
    for path in drawn:
        text = path.read_text(encoding="utf-8")
        assert text == (docs / "figures" / path.name).read_text(encoding="utf-8"), path.name
        assert len(text) < 16_000, f"{path.name}: a plot has a few kilobytes"
