"""``python -m iocp_loop.echo``, as a program: spoken to by plain sockets, stopped by signals, told wrong things."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from iocp_loop.echo import output
from iocp_loop.echo.output import Statistics
from iocp_loop.ports import DRIVERS, availability

from .programs import Server, ask, run_to_end
from .support import LIMIT, WINDOWS, fill, read_exactly, reset

ECHO = "iocp_loop.echo"

#: SIGKILL, for which Windows has no name.
KILL = 9

posix_signals = pytest.mark.skipif(WINDOWS, reason="only POSIX sends signals to processes")
linux_processes = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")


@pytest.fixture(params=["streams", "protocol"])
def mode(request: pytest.FixtureRequest) -> str:
    """How the server is written inside."""
    name: str = request.param
    return name


@pytest.fixture
def server(driver: str, mode: str) -> Iterator[Server]:
    """One server on each driver, in each mode."""
    with Server(ECHO, "--port", "0", "--driver", driver, "--mode", mode) as server:
        yield server


def exchange(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    assert read_exactly(sock, len(data)) == data


# -- serving ---------------------------------------------------------------------------------------


def test_it_says_where_it_listens_and_what_it_has_served(server: Server, driver: str) -> None:
    assert server.line == f"listening on 127.0.0.1:{server.port} driver={driver}"
    for _ in range(3):
        with server.connect() as sock:
            exchange(sock, b"hello")
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
    assert server.stop_cleanly() == "served 3 connections, 15 bytes, 3 messages\n"


@pytest.mark.parametrize("size", [0, 1, 1024, 2**20, 2**23])
def test_a_client_that_half_closes_gets_all_its_bytes_back_first(server: Server, size: int) -> None:
    data = os.urandom(size)
    with server.connect() as sock:
        assert ask(sock, data) == data
    assert f"served 1 connections, {size} bytes" in server.stop_cleanly()


def test_a_hundred_connections_at_once(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(server.connect()) for _ in range(100)]
        for number, sock in enumerate(socks):
            sock.sendall(b"%04d" % number * 300)
        for number, sock in enumerate(socks):
            assert read_exactly(sock, 1200) == b"%04d" % number * 300
    server.stop_cleanly()


def test_a_stock_asyncio_client(server: Server) -> None:
    async def client() -> None:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(b"x" * 100_000)
        assert await reader.readexactly(100_000) == b"x" * 100_000
        writer.close()
        await writer.wait_closed()

    async def main() -> None:
        await asyncio.gather(*(client() for _ in range(10)))

    asyncio.run(main())
    server.stop_cleanly()


def test_a_client_that_resets_disturbs_nobody(server: Server) -> None:
    with server.connect() as other:
        exchange(other, b"before")
        for _ in range(5):
            sock = server.connect()
            exchange(sock, b"x")
            sock.sendall(b"y" * 100_000)
            reset(sock)
        exchange(other, b"after")
    assert "served 6 connections" in server.stop_cleanly()


def test_a_client_that_does_not_read_is_not_read_from_either(server: Server) -> None:
    with server.connect() as sock, server.connect() as other:
        sock.setblocking(False)
        sent = fill(sock)  # the buffers of two sockets, and what the server may queue: then it must stop
        assert sent < 2**26
        exchange(other, b"not disturbed")
        sock.settimeout(LIMIT)
        assert len(read_exactly(sock, sent)) == sent
        exchange(sock, b"and on it goes")
    server.stop_cleanly()


# -- ending ----------------------------------------------------------------------------------------


def test_connections_are_closed_when_the_server_ends(server: Server) -> None:
    with server.connect() as sock:
        exchange(sock, b"hello")
        server.stop_cleanly()
        assert sock.recv(1) == b""


def test_a_client_that_does_not_read_delays_the_end_only_a_little(server: Server) -> None:
    with server.connect() as sock:
        sock.setblocking(False)
        fill(sock)
        began = time.monotonic()
        server.stop_cleanly()
        assert time.monotonic() - began < LIMIT


@posix_signals
def test_sigterm_ends_it_as_ctrl_c_does(server: Server) -> None:
    with server.connect() as sock:
        exchange(sock, b"hello")
    assert server.stop_cleanly(signal.SIGTERM) == "served 1 connections, 5 bytes, 1 messages\n"


# -- options ---------------------------------------------------------------------------------------


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_an_ipv6_address_stands_in_brackets(driver: str) -> None:
    with Server(ECHO, "--host", "::1", "--port", "0", "--driver", driver) as server:
        assert server.line.startswith("listening on [::1]:")
        with server.connect() as sock:
            exchange(sock, b"hello")
        server.stop_cleanly()


def test_the_environment_chooses_the_driver_where_no_option_does(driver: str) -> None:
    with Server(ECHO, "--port", "0", IOCP_LOOP_DRIVER=driver) as server:
        assert server.driver == driver
        server.stop_cleanly()


def test_auto_takes_the_best_driver_whatever_the_environment_says() -> None:
    best = next(name for name in DRIVERS if availability(name).available)
    with Server(ECHO, "--port", "0", "--driver", "auto", IOCP_LOOP_DRIVER="poll") as server:
        assert server.driver == best
        server.stop_cleanly()


def test_statistics_come_in_lines_on_stderr(driver: str) -> None:
    with Server(ECHO, "--port", "0", "--driver", driver, "--stats", "0.05") as server:
        assert server.process.stderr is not None
        with server.connect() as sock:
            exchange(sock, b"hello")
            seen = ""
            while "5 bytes" not in seen:
                seen = server.process.stderr.readline()
        pattern = r"1 connections, 1 open; 5 bytes, 1 messages; now \d+\.\d MB/s, \d+ messages/s\n"
        assert re.fullmatch(pattern, seen)
        _, err = server.stop()
        assert server.process.returncode == 0
        summary = r"in \d+\.\d s: 1 connections, 1 open at most; 5 bytes, 1 messages; .* on average"
        assert re.fullmatch(summary, err.splitlines()[-1])


def test_statistics_say_nothing_while_nothing_changes(capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counter(connections=0, open=0, bytes=0, messages=0)
    with Statistics(counts.copy) as statistics:
        statistics.show()
        assert capsys.readouterr().err == ""
        counts.update(connections=1, open=1)
        statistics.show()
        assert capsys.readouterr().err.startswith("1 connections, 1 open; 0 bytes")
        statistics.show()
        statistics.show()
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err.count("\n") == 1


def test_on_a_terminal_statistics_are_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    rich_console = pytest.importorskip("rich.console", reason="rich is not installed")
    rich_live = pytest.importorskip("rich.live")
    screen = io.StringIO()
    live = rich_live.Live(console=rich_console.Console(file=screen, force_terminal=True, width=90), auto_refresh=False)
    monkeypatch.setattr(output, "_live_display", lambda: live)
    counts = Counter(connections=0, open=0, bytes=0, messages=0)

    def shown(statistics: Statistics) -> str:
        screen.seek(0)
        screen.truncate()
        statistics.show()
        return screen.getvalue()

    with Statistics(counts.copy) as statistics:
        assert shown(statistics) == ""
        counts.update(connections=1, open=1, bytes=5_000_000, messages=7)
        assert "5,000,000" in shown(statistics)
        assert "0.0" in shown(statistics)  # the speed of a moment ago is not that of now
        assert shown(statistics) == ""


# -- TLS -------------------------------------------------------------------------------------------


class Certificate:
    """A certificate for localhost in files, and a client's context that trusts it."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        issued = authority.issue_cert("localhost")
        self.cert, self.key, self.both = folder / "cert.pem", folder / "key.pem", folder / "both.pem"
        self.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        self.key.write_bytes(issued.private_key_pem.bytes())
        self.both.write_bytes(issued.private_key_and_cert_chain_pem.bytes())
        self.client = ssl.create_default_context()
        authority.configure_trust(self.client)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate(tmp_path_factory.mktemp("certificate"))


def test_tls(driver: str, mode: str, certificate: Certificate) -> None:
    files = ("--cert", str(certificate.cert), "--key", str(certificate.key))
    with Server(ECHO, "--port", "0", "--driver", driver, "--mode", mode, *files) as server:
        for _ in range(2):
            with certificate.client.wrap_socket(server.connect(), server_hostname="localhost") as sock:
                exchange(sock, b"secret")
                exchange(sock, os.urandom(100_000))
        assert "served 2 connections, 200012 bytes" in server.stop_cleanly()


def test_a_client_that_speaks_no_tls_disturbs_nobody(driver: str, mode: str, certificate: Certificate) -> None:
    files = ("--cert", str(certificate.both))
    with Server(ECHO, "--port", "0", "--driver", driver, "--mode", mode, *files) as server:
        with server.connect() as plain:
            plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                while plain.recv(1000):
                    pass
        with certificate.client.wrap_socket(server.connect(), server_hostname="localhost") as sock:
            exchange(sock, b"secret")
        server.stop_cleanly()


# -- what it refuses -------------------------------------------------------------------------------


def refusal(*arguments: str, **environment: str) -> str:
    """The one line that a server says which cannot begin."""
    done = run_to_end(ECHO, *arguments, **environment)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("iocp_loop.echo: error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--port", "65536"], "a port is a whole number from 0 to 65535, not '65536'"),
        (["--port", "-1"], "a port is a whole number"),
        (["--port", "http"], "not 'http'"),
        (["--workers", "0"], "the number of workers is a whole number from 1 to"),
        (["--workers", "1000000"], "the number of workers"),
        (["--workers", "two"], "not 'two'"),
        (["--driver", "epoll"], "invalid choice: 'epoll'"),
        (["--mode", "telepathy"], "invalid choice: 'telepathy'"),
        (["--stats", "0"], "not '0'"),
        (["--port", "0", "--host", "256.256.256.256.invalid"], "cannot listen on 256.256.256.256.invalid:0: "),
        (["--port", "0", "--host", "a..b"], "cannot listen on a..b:0: "),
        (["--key", "key.pem"], "--key needs --cert"),
        (["--cert", "there-is-no-such-file"], "cannot read there-is-no-such-file: "),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_options_get_one_line(arguments: list[str], reason: str) -> None:
    assert reason in refusal(*arguments)


def test_a_driver_that_cannot_work_here_gets_one_line_with_the_cause() -> None:
    name = "uring" if WINDOWS else "iocp"
    cause = availability(name).reason
    assert cause in refusal("--driver", name)
    assert cause in refusal(IOCP_LOOP_DRIVER=name)
    assert cause in refusal("--workers", "2", IOCP_LOOP_DRIVER=name)


def test_an_unknown_driver_in_the_environment_gets_one_line() -> None:
    assert "unknown driver 'epoll'" in refusal("--port", "0", IOCP_LOOP_DRIVER="epoll")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_taken_port_gets_one_line(workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}: " in refusal("--port", str(port), "--workers", workers)


def test_threads_and_workers_do_not_go_together() -> None:
    assert "--workers and --threads don't go together" in refusal("--workers", "2", "--threads", "2")


def test_two_servers_with_workers_do_not_share_a_port() -> None:
    with Server(ECHO, "--port", "0", "--workers", "2") as server:
        assert "cannot listen on" in refusal("--port", str(server.port), "--workers", "2")
        server.stop_cleanly()


def test_certificates_that_cannot_be_used_get_one_line(certificate: Certificate, tmp_path: Path) -> None:
    other = Certificate(tmp_path)
    cert, key = str(certificate.cert), str(certificate.key)
    assert "does not belong to the certificate" in refusal("--cert", cert, "--key", str(other.key))
    assert "no certificate and private key" in refusal("--cert", cert)
    assert "no certificate and private key" in refusal("--cert", cert, "--key", cert)
    assert "no certificate and private key" in refusal("--cert", key, "--key", key)


def test_a_key_with_a_password_gets_one_line_and_no_prompt(certificate: Certificate, tmp_path: Path) -> None:
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    key = serialization.load_pem_private_key(certificate.key.read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    assert "the key is encrypted" in refusal("--cert", str(certificate.cert), "--key", str(locked))


# -- several processes -----------------------------------------------------------------------------


@pytest.fixture
def three(driver: str, mode: str) -> Iterator[Server]:
    """A server with three workers."""
    with Server(ECHO, "--port", "0", "--driver", driver, "--mode", mode, "--workers", "3") as server:
        yield server


def children(pid: int) -> list[int]:
    """The children of a process, those included that have ended and not been waited for."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "it has not happened in time"
        time.sleep(0.01)


def test_workers_serve_one_port_and_add_up(three: Server, driver: str) -> None:
    assert three.driver == driver
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(three.connect()) for _ in range(30)]
        for sock in socks:
            exchange(sock, b"hello")
        for sock in socks:
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
    assert three.stop_cleanly() == "served 30 connections, 150 bytes, 30 messages\n"


def test_threads_serve_one_port_and_add_up(driver: str, mode: str) -> None:
    with Server(ECHO, "--port", "0", "--driver", driver, "--mode", mode, "--threads", "3") as server:
        assert server.line == f"listening on 127.0.0.1:{server.port} driver={driver}"
        for _ in range(3):
            with contextlib.ExitStack() as stack:
                for sock in [stack.enter_context(server.connect()) for _ in range(20)]:
                    exchange(sock, b"hello")
        with server.connect() as sock:
            exchange(sock, b"last")  # what its thread has not seen of the others
            assert server.stop_cleanly() == "served 61 connections, 304 bytes, 61 messages\n"


def test_threads_show_statistics_of_all(driver: str) -> None:
    with Server(ECHO, "--port", "0", "--driver", driver, "--threads", "2", "--stats", "0.05") as server:
        for _ in range(10):
            with server.connect() as sock:
                exchange(sock, b"hello")
        out, err = server.stop()
    assert (server.process.returncode, out) == (0, "served 10 connections, 50 bytes, 10 messages\n")
    assert ": 10 connections, " in err.splitlines()[-1]


def test_workers_serve_tls(driver: str, certificate: Certificate) -> None:
    files = ("--cert", str(certificate.both))
    with Server(ECHO, "--port", "0", "--driver", driver, "--workers", "2", *files) as server:
        for _ in range(4):
            with certificate.client.wrap_socket(server.connect(), server_hostname="localhost") as sock:
                exchange(sock, b"secret")
        assert "served 4 connections" in server.stop_cleanly()


@linux_processes
def test_every_worker_gets_connections(three: Server) -> None:
    def descriptors() -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in workers]

    workers = children(three.process.pid)
    before = descriptors()
    with contextlib.ExitStack() as stack:
        for _ in range(90):
            exchange(stack.enter_context(three.connect()), b"x")
        got = [now - then for now, then in zip(descriptors(), before, strict=True)]
    assert min(got) >= 5, got
    three.stop_cleanly()


@pytest.fixture
def echo_with_minimum_life(tmp_path: Path) -> Path:
    """The program with another `MINIMUM_LIFE`, which comes before its arguments: the tests' answer to chance."""
    program = tmp_path / "echo.py"
    program.write_text(
        "import sys, iocp_loop.echo.__main__, iocp_loop.echo.supervisor\n"
        "iocp_loop.echo.supervisor.MINIMUM_LIFE = float(sys.argv.pop(1))\n"
        "sys.exit(iocp_loop.echo.__main__.main())\n"
    )
    return program


@linux_processes
def test_a_worker_that_dies_is_reported_and_replaced_while_the_rest_go_on(
    driver: str, echo_with_minimum_life: Path
) -> None:
    with Server(echo_with_minimum_life, "0", "--port", "0", "--driver", driver, "--workers", "3") as three:
        first = children(three.process.pid)
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(three.connect()) for _ in range(30)]
            for sock in socks:
                exchange(sock, b"x")
            os.kill(first[0], KILL)
            alive = 0
            for sock in socks:
                with contextlib.suppress(ConnectionError):
                    sock.sendall(b"y")
                    alive += sock.recv(1) == b"y"
            assert 0 < alive < 30
        wait_until(lambda: len(set(children(three.process.pid)) - set(first)) == 1)
        assert first[0] not in children(three.process.pid)
        for _ in range(30):
            with three.connect() as sock:
                exchange(sock, b"z")
        out, err = three.stop()
        assert three.process.returncode == 0
        assert re.fullmatch(rf"iocp_loop.echo: worker 1 \(pid {first[0]}\) was ended by SIGKILL, another .*\n", err)
        # What the dead worker had counted since its last report is lost, what the others served is not.
        assert 30 + alive <= int(out.split()[1]) <= 60


@linux_processes
def test_when_all_workers_die_young_so_does_the_server(driver: str, echo_with_minimum_life: Path) -> None:
    with Server(echo_with_minimum_life, "1000", "--port", "0", "--driver", driver, "--workers", "2") as server:
        workers = children(server.process.pid)
        for pid in workers:
            os.kill(pid, KILL)
        out, err = server.process.communicate(timeout=LIMIT)
        assert server.process.returncode == 1
        assert out == ""
        lines = err.splitlines()
        assert len(lines) == 3
        assert all("it is not replaced" in line for line in lines[:2])
        assert lines[2] == "iocp_loop.echo: error: no worker is left"


@linux_processes
def test_workers_end_with_their_supervisor(three: Server) -> None:
    workers = children(three.process.pid)
    three.process.kill()
    three.process.wait()

    def gone(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    wait_until(lambda: all(map(gone, workers)))


@posix_signals
def test_ctrl_c_in_a_terminal_reaches_the_supervisor_alone(driver: str) -> None:
    """A terminal signals the whole process group: the workers must not be in it."""
    with Server(ECHO, "--port", "0", "--driver", driver, "--workers", "2") as server:
        if sys.platform == "linux":
            assert all(os.getpgid(pid) != os.getpgid(server.process.pid) for pid in children(server.process.pid))
        assert server.stop_cleanly() == "served 0 connections, 0 bytes, 0 messages\n"


def test_a_worker_without_a_supervisor_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", ECHO, "--worker"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "started by its supervisor" in done.stderr
