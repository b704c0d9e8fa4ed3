"""The echo server: ``python -m iocp_loop.echo``.  It sends back whatever it receives.

The server itself is an ordinary asyncio program, twice: `Service.echo` for ``asyncio.start_server`` (``--mode
streams``) and `EchoProtocol` for ``loop.create_server`` (``--mode protocol``).  Nothing in them knows this package.
The rest of the module is what makes a program of it: options, errors in one line, signals, counting, several
threads or processes, and an end that is clean.

It prints ``listening on HOST:PORT driver=NAME`` when it accepts and a summary when it ends.  Exit codes: 0 after
Ctrl-C or SIGTERM; 2 if it could not begin as it was told to; 1 if all its workers died.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import itertools
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

from ..loop import IocpEventLoop, new_event_loop
from ..ports import DRIVERS, DriverUnavailable
from ..threads import run_threads
from .supervisor import Orders, Supervisor, WorkersFailed, listeners, report, stop_signals

__all__ = ["Counts", "EchoProtocol", "Service", "main"]

#: Bytes that one read of a stream asks for.
CHUNK = 64 * 1024

#: Connections that may wait to be accepted.
BACKLOG = 1024

#: Seconds in which clients may fetch what is still queued for them when the server ends.
GRACE = 2.0

#: Descriptors that the server asks the system for.
MAX_DESCRIPTORS = 65536

#: Most processes that ``--workers`` takes, and threads that ``--threads`` takes.
MAX_WORKERS = 256

#: Seconds between two reports of a worker to its supervisor.
REPORT_INTERVAL = 0.5


class UsageError(Exception):
    """The server cannot do what it was told; the message is one line for whoever told it."""


# ----------------------------------------------------------------------------------------------------------------------
# The server
# ----------------------------------------------------------------------------------------------------------------------


class Counts:
    """What has been served: connections in all, and now; bytes and messages (reads) sent back."""

    __slots__ = ("bytes", "connections", "messages", "open")

    def __init__(self) -> None:
        self.connections = 0
        self.open = 0
        self.bytes = 0
        self.messages = 0

    def as_counter(self) -> Counter[str]:
        """The counts by name."""
        return Counter({name: getattr(self, name) for name in self.__slots__})


class Service:
    """The server's connections: both ways to serve one, the counts, and how to end them all."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._open: set[asyncio.WriteTransport] = set()
        self._all_gone = asyncio.Event()

    async def echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection with streams; for ``asyncio.start_server``."""
        counts = self.counts
        self.came(writer.transport)
        try:
            while data := await reader.read(CHUNK):
                writer.write(data)
                counts.bytes += len(data)
                counts.messages += 1
                await writer.drain()  # waits, and so does not read, while the client is slow to read
            writer.close()
            await writer.wait_closed()
        except OSError:
            pass  # the client has reset the connection, or the network has lost it
        finally:
            writer.close()
            self.left(writer.transport)

    def protocol(self) -> EchoProtocol:
        """Serve one connection with a protocol; for ``loop.create_server``."""
        return EchoProtocol(self)

    def came(self, transport: asyncio.WriteTransport) -> None:
        """Count a new connection."""
        self._open.add(transport)
        self.counts.connections += 1
        self.counts.open += 1
        self._all_gone.clear()

    def left(self, transport: asyncio.WriteTransport) -> None:
        """Count a connection that is over."""
        self._open.discard(transport)
        self.counts.open = len(self._open)
        if not self._open:
            self._all_gone.set()

    async def close(self) -> None:
        """End all connections; those that do not take what is queued for them within `GRACE` seconds are cut."""
        for transport in list(self._open):
            transport.close()
        await self._wait_until_all_gone()
        for transport in list(self._open):
            transport.abort()
        await self._wait_until_all_gone()

    async def _wait_until_all_gone(self) -> None:
        if self._open:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_gone.wait(), GRACE)


class EchoProtocol(asyncio.Protocol):
    """One connection, served with callbacks."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._counts = service.counts

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._service.came(self._transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)
        counts = self._counts
        counts.bytes += len(data)
        counts.messages += 1

    # A client that does not read is not read from either, so what waits for it stays small.
    def pause_writing(self) -> None:
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._service.left(self._transport)


async def serve(service: Service, listener: socket.socket, mode: str, tls: ssl.SSLContext | None) -> asyncio.Server:
    """Serve the connections that come to `listener`."""
    if mode == "streams":
        return await asyncio.start_server(service.echo, sock=listener, ssl=tls, backlog=BACKLOG)
    loop = asyncio.get_running_loop()
    return await loop.create_server(service.protocol, sock=listener, ssl=tls, backlog=BACKLOG)


async def serve_one(service: Service, conn: socket.socket, mode: str, tls: ssl.SSLContext | None) -> None:
    """Serve one connection that somebody else has accepted."""
    loop = asyncio.get_running_loop()

    def factory() -> asyncio.Protocol:
        if mode == "protocol":
            return service.protocol()
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(), service.echo)  # as start_server does it

    try:
        await loop.connect_accepted_socket(factory, conn, ssl=tls)
    except OSError:
        conn.close()  # it broke before it began, or it speaks no TLS


def welcomer(
    loop: asyncio.AbstractEventLoop, service: Service, mode: str, tls: ssl.SSLContext | None
) -> Callable[[socket.socket], None]:
    """A function that serves a connection which somebody else has accepted; to be called in the loop."""
    tasks: set[asyncio.Task[None]] = set()

    def welcome(conn: socket.socket) -> None:
        task = loop.create_task(serve_one(service, conn, mode, tls))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    return welcome


# ----------------------------------------------------------------------------------------------------------------------
# One process, with one thread or several; or one of several
# ----------------------------------------------------------------------------------------------------------------------


def run_alone(options: argparse.Namespace, listener: socket.socket, tls: ssl.SSLContext | None) -> Counter[str]:
    """Serve in this process until a signal comes; the counts."""
    loop = _new_loop(options.driver)

    async def main() -> Counter[str]:
        service, stop = Service(), asyncio.Event()
        for number in stop_signals():
            loop.add_signal_handler(number, stop.set)
        server = await serve(service, listener, options.mode, tls)
        announce(listener, loop.driver)
        with statistics_if_wanted(options, service.counts.as_counter) as statistics:
            reporter = asyncio.create_task(every(options.stats, statistics.show)) if statistics else None
            await stop.wait()
            server.close()
            await service.close()
            if reporter is not None:
                reporter.cancel()
        return service.counts.as_counter()

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main())


def run_in_threads(options: argparse.Namespace, listener: socket.socket, tls: ssl.SSLContext | None) -> Counter[str]:
    """Serve with a loop in each of several threads until a signal comes; the counts of all of them."""
    services = [Service() for _ in range(options.threads)]
    sockets = listeners(listener, options.threads)
    welcomes: list[Callable[[socket.socket], object]] = []  # of the threads that are ready
    lock = threading.Lock()

    def counts() -> Counter[str]:
        return sum((service.counts.as_counter() for service in services), Counter())

    async def main(index: int) -> None:
        loop = cast("IocpEventLoop", asyncio.get_running_loop())
        service = services[index]
        sock = sockets[index]
        if sock is listener and index > 0:  # each closes its own
            sock = listener.dup()
        server = None if sock is None else await serve(service, sock, options.mode, tls)
        with lock:
            welcome = welcomer(loop, service, options.mode, tls)
            welcomes.append(lambda conn: loop.call_soon_threadsafe(welcome, conn))
            if len(welcomes) == options.threads:
                if server is None:
                    threading.Thread(target=hand_out, args=(listener, welcomes), name="accept", daemon=True).start()
                announce(listener, loop.driver)
        try:
            with statistics_if_wanted(options, counts) if index == 0 else contextlib.nullcontext() as statistics:
                await (every(options.stats, statistics.show) if statistics else loop.create_future())
        finally:
            if server is not None:
                server.close()
            await service.close()

    for number in stop_signals():
        signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        run_threads(main, threads=options.threads, driver=options.driver)
    return counts()


def hand_out(listener: socket.socket, welcomes: Sequence[Callable[[socket.socket], object]]) -> None:
    """Windows, where a socket belongs to one completion port: accept for all threads, and give each its share."""
    for welcome in itertools.cycle(welcomes):
        try:
            conn, _ = listener.accept()
        except OSError:
            if listener.fileno() < 0:
                return
            time.sleep(0.1)  # the client was gone already, or there are no handles left
            continue
        try:
            welcome(conn)
        except RuntimeError:  # its loop is closed: the program ends
            conn.close()


def run_workers(options: argparse.Namespace, listener: socket.socket) -> Counter[str]:
    """Serve in several processes until a signal comes; the counts of all of them."""
    settings = {name: getattr(options, name) for name in ("driver", "mode", "cert", "key")}
    command = [sys.executable, "-m", "iocp_loop.echo", "--worker"]
    try:
        supervisor = Supervisor(command, options.workers, listener, settings, gauges=["open"], say=complain)
        with contextlib.closing(supervisor):
            driver = supervisor.start()
            if driver is not None:
                announce(listener, driver)
                with statistics_if_wanted(options, lambda: supervisor.totals) as statistics:
                    supervisor.run(options.stats, statistics.show if statistics else None)
    except OSError as error:
        raise WorkersFailed(f"cannot start the workers: {error}") from error
    return supervisor.totals


def run_as_worker() -> None:
    """Serve as one of several processes, as the supervisor orders."""
    try:
        orders = Orders()
    except EOFError as error:
        raise UsageError(str(error)) from error
    settings = orders.settings
    mode, tls = settings["mode"], tls_context(settings["cert"], settings["key"])
    loop = _new_loop(settings["driver"])

    async def main() -> None:
        service, stop = Service(), asyncio.Event()

        def tell() -> None:
            report(counts=service.counts.as_counter())

        orders.follow(loop, welcomer(loop, service, mode, tls), stop.set)
        server = None if orders.listener is None else await serve(service, orders.listener, mode, tls)
        report(ready=loop.driver)
        reporter = asyncio.create_task(every(REPORT_INTERVAL, tell))
        await stop.wait()
        if server is not None:
            server.close()
        await service.close()
        reporter.cancel()
        tell()

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main())


def _new_loop(driver: str | None) -> IocpEventLoop:
    try:
        return new_event_loop(driver)
    except (ValueError, DriverUnavailable) as error:
        raise UsageError(str(error)) from error


async def every(interval: float, action: Callable[[], object]) -> None:
    """Call `action` every `interval` seconds, until cancelled."""
    while True:
        await asyncio.sleep(interval)
        action()


# ----------------------------------------------------------------------------------------------------------------------
# What it prints
# ----------------------------------------------------------------------------------------------------------------------


def announce(listener: socket.socket, driver: str) -> None:
    """Say that the server accepts, and where."""
    host, port = listener.getsockname()[:2]
    say(f"listening on {format_address(host, port)} driver={driver}")


def format_address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def statistics_if_wanted(
    options: argparse.Namespace, counts: Callable[[], Counter[str]]
) -> contextlib.AbstractContextManager[Statistics | None]:
    """The statistics that ``--stats`` asks for; None without it."""
    return Statistics(counts) if options.stats else contextlib.nullcontext()


class Statistics:
    """What ``--stats`` shows on stderr: the counts and how fast they grow, whenever they have changed; a summary last.

    On a terminal it is one table that is kept up to date, if rich is installed; else a line for each change.  To be
    used in a ``with`` block, whose end prints the summary.
    """

    def __init__(self, counts: Callable[[], Counter[str]]) -> None:
        self._counts = counts
        self._before = counts()
        self._began = self._then = time.monotonic()
        self._most_open = 0
        self._idle = True
        self._live = _live_display()

    def __enter__(self) -> Statistics:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.show()
        if self._live is not None:
            self._live.stop()
        counts, elapsed = self._before, max(self._then - self._began, 1e-9)
        self._print(
            f"in {elapsed:.1f} s: {counts['connections']} connections, {self._most_open} open at most; "
            f"{counts['bytes']} bytes, {counts['messages']} messages; "
            f"{counts['bytes'] / elapsed / 1e6:.1f} MB/s, {counts['messages'] / elapsed:.0f} messages/s on average"
        )

    def show(self) -> None:
        """Show what has changed since the last call, if anything has."""
        counts, now = self._counts(), time.monotonic()
        elapsed = max(now - self._then, 1e-9)
        grown = {name: (counts[name] - self._before[name]) / elapsed for name in ("bytes", "messages")}
        changed, self._before, self._then = counts != self._before, counts, now
        self._most_open = max(self._most_open, counts["open"])
        megabytes, messages = f"{grown['bytes'] / 1e6:.1f}", f"{grown['messages']:.0f}"
        if self._live is not None:
            if changed or not self._idle:  # a table would go on showing the last speed
                self._live.update(_table(counts, megabytes, messages), refresh=True)
        elif changed:
            self._print(
                f"{counts['connections']} connections, {counts['open']} open; "
                f"{counts['bytes']} bytes, {counts['messages']} messages; "
                f"now {megabytes} MB/s, {messages} messages/s"
            )
        self._idle = not changed

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _live_display() -> Any:
    """rich's live display on stderr, or None where stderr is no terminal or rich is not installed."""
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        return None
    return Live(console=Console(stderr=True), auto_refresh=False, redirect_stdout=False, redirect_stderr=False)


def _table(counts: Counter[str], megabytes: str, messages: str) -> Any:
    from rich.table import Table

    table = Table()
    for name in ("connections", "open", "bytes", "messages", "MB/s", "messages/s"):
        table.add_column(name, justify="right", min_width=10)
    table.add_row(*(f"{counts[name]:,}" for name in ("connections", "open", "bytes", "messages")), megabytes, messages)
    return table


def summary(counts: Counter[str]) -> str:
    """The last line of the program."""
    return f"served {counts['connections']} connections, {counts['bytes']} bytes, {counts['messages']} messages"


def say(line: str) -> None:
    """Print a line at once.  If nobody reads stdout any more, that is no reason to stop serving."""
    try:
        print(line, flush=True)
    except OSError:
        # Else the interpreter would try to flush it again at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(line: str) -> None:
    """Print a line on stderr, with the program's name."""
    print(f"iocp_loop.echo: {line}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# What it is told
# ----------------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Complains in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help tells more)")


def _whole_number(what: str, low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{what} is a whole number from {low} to {high}, not {text!r}")
        return number

    return parse


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.01 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"seconds from 0.01 to 86400, not {text!r}")
    return seconds


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options.  Raises UsageError; exits after --help."""
    parser = _Parser(prog="python -m iocp_loop.echo", description="An echo server on a completion port.")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address or name to listen on (default: %(default)s); '0.0.0.0' is every IPv4 address, "
        "'::' every address where the system can do both with one socket",
    )
    parser.add_argument(
        "--port", type=_whole_number("a port", 0, 65535), default=8888, help="default: %(default)s; 0 takes a free one"
    )
    parser.add_argument(
        "--driver",
        choices=["auto", *DRIVERS],
        help="what carries the I/O out (default: what IOCP_LOOP_DRIVER says, else auto: the best that works here)",
    )
    parser.add_argument(
        "--mode", choices=["streams", "protocol"], default="streams", help="how the server is written inside"
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=_whole_number("the number of workers", 1, MAX_WORKERS),
        default=1,
        help="processes that share the port (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=_whole_number("the number of threads", 1, MAX_WORKERS),
        default=1,
        help="threads of this process that share the port, a loop in each; side by side on a free-threaded Python, "
        "else by turns (default: %(default)s)",
    )
    parser.add_argument("--cert", metavar="FILE", help="serve TLS with this certificate chain (PEM)")
    parser.add_argument("--key", metavar="FILE", help="its private key (PEM), if that is not in the same file")
    parser.add_argument(
        "--stats",
        metavar="SECONDS",
        nargs="?",
        type=_interval,
        const=1.0,
        help="show statistics on stderr when they change, looking every so many seconds (default: 1): "
        "a live table on a terminal if rich is installed, else lines",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # a supervisor starts us
    return parser.parse_args(arguments)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.  Of the addresses that a name has, the first that exists here is taken."""
    failure: Exception | None = None
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            sock = socket.socket(family, kind, protocol)
            try:
                _bind(sock, address)
                sock.listen(BACKLOG)
                return sock
            except OSError as error:
                sock.close()
                failure = failure or error
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    break
    except (OSError, ValueError) as error:  # no such name, or none that could be looked up
        failure = error
    why = getattr(failure, "strerror", None) or failure
    raise UsageError(f"cannot listen on {format_address(host, port)}: {why}")


def _bind(sock: socket.socket, address: Any) -> None:
    if sys.platform == "win32":
        # SO_REUSEADDR would let us take a port that another server listens on.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
    else:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sock.family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6():
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(address)


def tls_context(cert: str | None, key: str | None) -> ssl.SSLContext | None:
    """The TLS context for ``--cert`` and ``--key``; None without them."""
    if cert is None:
        if key is not None:
            raise UsageError("--key needs --cert")
        return None

    def no_password() -> str:
        raise ValueError("the key is encrypted; give it without a password")

    try:
        for name in filter(None, (cert, key)):
            with open(name, "rb"):
                pass  # an OSError of load_cert_chain does not tell which file it means
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key, no_password)
    except ssl.SSLError as error:
        files = cert if key is None else f"{cert} and {key}"
        if error.reason == "KEY_VALUES_MISMATCH":
            why = "the key does not belong to the certificate"
        elif "pem lib" in str(error).lower():
            why = "no certificate and private key in PEM form"
        else:
            why = str(error)
        raise UsageError(f"cannot use {files} for TLS: {why}") from error
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"cannot use {key or cert} for TLS: {error}") from error
    return context


def raise_descriptor_limit() -> None:
    """Allow as many open connections as the system lets us; the usual limit is 1024 descriptors."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(OSError, ValueError):  # macOS has a lower limit that it does not tell
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(arguments: list[str] | None = None) -> int:
    """The program; its exit code."""
    try:
        options = parse(arguments)
        raise_descriptor_limit()
        if options.worker:
            run_as_worker()
            return 0
        if options.workers > 1 and options.threads > 1:
            raise UsageError("--workers and --threads don't go together")
        tls = tls_context(options.cert, options.key)
        _new_loop(options.driver).close()  # if the driver cannot work, say so before the port is taken
        with listen(options.host, options.port) as listener:
            if options.threads > 1:
                counts = run_in_threads(options, listener, tls)
            elif options.workers == 1:
                counts = run_alone(options, listener, tls)
            else:
                counts = run_workers(options, listener)
    except UsageError as error:
        complain(f"error: {error}")
        return 2
    except WorkersFailed as error:
        complain(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130  # Ctrl-C before anything was served
    say(summary(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
