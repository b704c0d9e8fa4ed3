"""The echo server: ``python -m iocp_loop.echo``.  It sends back whatever it receives.

The server itself is an ordinary asyncio program, twice: `Service.echo` for ``asyncio.start_server`` (``--mode
streams``) and `EchoProtocol` for ``loop.create_server`` (``--mode protocol``), in service.py.  Nothing there knows this
package.  What makes a program of it stands beside it: options, errors in one line, signals, counting, several
threads or processes, and an end that is clean.

It prints ``listening on HOST:PORT driver=NAME`` when it accepts and a summary when it ends.  Exit codes: 0 after
Ctrl-C or SIGTERM; 2 if it could not begin as it was told to; 1 if all its workers died.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import signal
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

from ..loop import IocpEventLoop, new_event_loop
from ..ports import DriverUnavailable
from ..threads import run_threads
from .options import UsageError, listen, parse, raise_descriptor_limit, tls_context
from .output import announce, complain, say, statistics_if_wanted, summary
from .service import Service, serve, welcomer
from .supervisor import Orders, Supervisor, WorkersFailed, listeners, report, stop_signals

__all__ = ["main"]

#: Seconds between two reports of a worker to its supervisor.
REPORT_INTERVAL = 0.5


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
