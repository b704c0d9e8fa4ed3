"""The benchmarks with tiny windows: that every kind of run gives figures, and fails where it has to.

Nothing is said about the figures themselves.
"""

from __future__ import annotations

import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import client, echo, http, latency, life, many, native, parallel, syscalls
from benchmarks.native import BuildFailed, build
from benchmarks.peers import PEERS, Absent, Present, probe
from benchmarks.processes import CLIENT_CORE, RunFailed, run_pinned

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks pin processes, on Linux only"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: the client can't be built"),
]

ASYNCIO = PEERS["asyncio"]
SECONDS = 0.2


@pytest.fixture
def c_uring() -> None:
    found = probe(PEERS["c-uring"])
    if isinstance(found, Absent):
        pytest.skip(f"c-uring is absent: {found.reason}")


def check(values: dict[str, float]) -> None:
    assert values["messages"] > 0
    assert values["cpu_us"] > 0
    assert values["mean_us"] > 0
    assert 0 < values["p50_us"] <= values["p99_us"]


@pytest.mark.usefixtures("c_uring")
@pytest.mark.parametrize("size", [1024, 102_400])
@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_c_uring(transport: str, size: int) -> None:
    check(echo.measure(echo.Cell("protocol", transport, size, 20), PEERS["c-uring"], SECONDS, warmup=0.1))


@pytest.mark.parametrize("transport", ["tcp", "unix", "udp"])
def test_c_epoll(transport: str) -> None:
    check(echo.measure(echo.Cell("protocol", transport, 10_240, 20), PEERS["c-epoll"], SECONDS, warmup=0.1))


@pytest.mark.parametrize("name", ["server, protocol tcp", "client, streams unix", "loop made, run, closed"])
def test_life(name: str) -> None:
    (workload,) = (workload for workload in life.workloads() if workload.label == name)
    assert life.run(workload, ASYNCIO)["cpu_ns"] > 0


def test_udp() -> None:
    check(echo.measure(echo.Cell("protocol", "udp", 1024, 3), ASYNCIO, SECONDS, warmup=SECONDS))


@pytest.mark.parametrize("mode", ["protocol", "buffered", "streams"])
def test_tls(mode: str) -> None:
    reason = echo.missing("tls")
    if reason is not None:
        pytest.skip(f"tls is absent: {reason}")
    check(echo.measure(echo.Cell(mode, "tls", 102_400, 3), ASYNCIO, SECONDS, warmup=SECONDS))


@pytest.mark.parametrize("mode", client.MODES)
@pytest.mark.parametrize("transport", client.TRANSPORTS)
def test_the_side_of_the_client(mode: str, transport: str) -> None:
    peer = PEERS["iocp_loop-poll"] if mode == "named-streams" else ASYNCIO
    values = client.run(client.Asking(echo.Cell(mode, transport, 1024, 3)), peer, SECONDS, warmup=SECONDS)
    assert values["messages"] > 0
    assert values["cpu_us"] > 0


def test_latency_beside_a_busy_thread() -> None:
    check(latency.run(latency.Neighbour("protocol", 1, "all"), ASYNCIO, 0.5))


def test_many() -> None:
    case = many.Growth(echo.Cell("protocol", "tcp", 1024, 20), few=2)
    values = many.run(case, PEERS["c-epoll"], SECONDS)
    check(values)
    assert values["growth"] == pytest.approx(values["cpu_us"] / values["cpu_us_few"])


@pytest.mark.parametrize(
    ("mode", "name"), [("protocol", "asyncio"), ("named-streams", "iocp_loop-poll"), ("raw", "iocp_loop-poll")]
)
def test_threads_of_one_process(mode: str, name: str) -> None:
    values = parallel.run(parallel.Crew(mode, threads=2, size=1024, connections=20), PEERS[name], SECONDS)
    assert values["cpu_us"] > 0
    assert values["gain"] > 0
    assert 0 < values["busy"] <= 1


@pytest.mark.parametrize("tracer", syscalls.TRACERS)
def test_system_calls_of_an_echo(tracer: str) -> None:
    reason = syscalls.missing(tracer)
    if reason is not None:
        pytest.skip(reason)
    case = syscalls.Traced(echo.Cell("protocol", "tcp", 1024, 1))
    values = syscalls.run(case, PEERS["c-epoll"], 200, tracer)
    # One wait, one receive and one send for each message; a few more for those under way as tracing ends.
    assert values["messages"] >= 200
    assert values["calls"] == pytest.approx(3, abs=0.2)
    assert values["receives"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("application", http.APPLICATIONS)
def test_http(application: str) -> None:
    reason = http.missing(application)
    if reason is not None:
        pytest.skip(f"{application}: {reason}")
    for body in (14, 1024 * 1024):
        check(http.run(http.Site(application, body, 3), ASYNCIO, SECONDS))


# ---------------------------------------------------------------------------------------------------------------------
# The client, against servers that do as they are told
# ---------------------------------------------------------------------------------------------------------------------

Serve = Callable[[Callable[[socket.socket], None]], int]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Give a function that serves one connection in a thread, and returns the port."""
    threads: list[threading.Thread] = []

    def start(handle: Callable[[socket.socket], None]) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(10.0)

        def run() -> None:
            with listener, listener.accept()[0] as sock:
                sock.settimeout(10.0)
                handle(sock)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return int(listener.getsockname()[1])

    yield start
    for thread in threads:
        thread.join()


def load(port: int, *more: str) -> str:
    command = [str(build("echo_client")), "--port", str(port), "--connections", "1", "--warmup", "0.05", *more]
    return run_pinned(command, CLIENT_CORE, timeout_s=20)


def test_a_response_in_pieces_is_one_message(serve: Serve) -> None:
    pieces = [b"HTTP/1.1 200 OK\r\nConTent-Length: ", b"5\r\n\r", b"\nHel", b"lo"]

    def handle(sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while sock.recv(4096):
                for piece in pieces:
                    sock.sendall(piece)
        except ConnectionError:
            pass  # the client has seen enough

    assert '"starved": 0' in load(serve(handle), "--http", "--messages", "50")


@pytest.mark.parametrize(
    ("response", "complaint"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "the server answered HTTP/1.1 404"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "a response has no Content-Length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab", "more came back than one response"),
        (b"", "the server closed a connection"),
    ],
)
def test_a_wrong_response_fails_the_run(serve: Serve, response: bytes, complaint: str) -> None:
    def handle(sock: socket.socket) -> None:
        sock.recv(4096)
        sock.sendall(response)

    with pytest.raises(RunFailed, match=complaint):
        load(serve(handle), "--http")


def test_a_changed_byte_fails_the_run(serve: Serve) -> None:
    def handle(sock: socket.socket) -> None:
        message = bytearray(sock.recv(4096))
        message[-1] ^= 1
        sock.sendall(message)

    with pytest.raises(RunFailed, match="other bytes came back than were sent"):
        load(serve(handle), "--size", "100")


def test_a_lost_datagram_is_sent_again() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(2.0)
        seen: list[bytes] = []

        def handle() -> None:
            try:
                while True:
                    datagram, address = sock.recvfrom(4096)
                    seen.append(datagram)
                    if len(seen) != 2:  # the second is dropped, and comes again
                        sock.sendto(datagram, address)
            except TimeoutError:
                pass

        thread = threading.Thread(target=handle)
        thread.start()
        load(sock.getsockname()[1], "--udp", "--size", "100", "--messages", "20")
        thread.join()
    assert seen[1] == seen[2]
    assert seen[0] != seen[1]


def test_the_environment_of_a_peer_reaches_its_process() -> None:
    command = [sys.executable, "-c", "import os; print(os.environ['IOCP_LOOP_NATIVE'])"]
    environment = dict(PEERS["iocp_loop-poll-python"].environment)
    assert run_pinned(command, CLIENT_CORE, timeout_s=10, environment=environment) == "0\n"


def test_a_peer_that_is_not_there_is_absent_with_the_reason() -> None:
    found = probe(PEERS["winloop"])
    assert isinstance(found, Absent)
    assert "winloop" in found.reason
    assert isinstance(probe(ASYNCIO), Present)


def test_without_a_compiler_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_BUILD", tmp_path)
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(BuildFailed, match="no C compiler: no-such-compiler is not there"):
        build("epoll_server")
    found = probe(PEERS["c-epoll"])
    assert isinstance(found, Absent)
    assert "no-such-compiler" in found.reason
