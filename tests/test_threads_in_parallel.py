"""Loops in several threads at once, and threads that meet at one loop: every byte, every call, nothing mixed up.

On a free-threaded Python this is the stress that the native tier has to stand (``make test-free-threaded``); with a GIL
it is short.  IOCP_LOOP_STRESS multiplies what each test does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

import iocp_loop
from iocp_loop import CompletionPort, run_threads
from iocp_loop.operations import Receive, Send

from .support import LIMIT, WINDOWS, run_python

pytestmark = pytest.mark.usefixtures("no_leak")

THREADS = 3
ROUNDS = 20 * int(os.environ.get("IOCP_LOOP_STRESS", "1"))
SIZE = 20_000  # bytes of a message: more than a small piece, less than a large one


def run_all(main: Callable[[int], Any], driver: str) -> list[Any]:
    async def limited(index: int) -> Any:
        return await asyncio.wait_for(main(index), 6 * LIMIT)

    return run_threads(limited, threads=THREADS, driver=driver)


def letter(index: int) -> bytes:
    return b"abcdefgh"[index : index + 1]


# -- bytes -----------------------------------------------------------------------------------------


class Echo(asyncio.Protocol):
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class BufferedEcho(asyncio.BufferedProtocol):
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.buffer = bytearray(8192)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.transport.write(bytes(self.buffer[:nbytes]))


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> None:
    for n in range(ROUNDS):
        piece = data * (SIZE >> n % 5)
        writer.write(piece)
        assert await reader.readexactly(len(piece)) == piece
    writer.close()
    with contextlib.suppress(ssl.SSLError):
        await writer.wait_closed()


@pytest.mark.parametrize("protocol", [Echo, BufferedEcho])
def test_tcp(driver: str, protocol: Callable[[], asyncio.BaseProtocol]) -> None:
    async def main(index: int) -> None:
        server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        await asyncio.gather(*[talk(*await asyncio.open_connection(*address), letter(index)) for _ in range(4)])
        server.close()

    run_all(main, driver)


def test_streams_by_name(driver: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line + await reader.readexactly(len(line)))
            await writer.drain()
        writer.close()

    async def main(index: int) -> None:
        server = await iocp_loop.start_server(serve, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()

        async def one() -> None:
            reader, writer = await iocp_loop.open_connection(*address)
            line = letter(index) * 5000 + b"\n"
            for _ in range(ROUNDS):
                writer.write(line)
                writer.write(line)
                await writer.drain()
                assert await reader.readuntil() == line
                assert await reader.readexactly(len(line)) == line
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()

        await asyncio.gather(*[one() for _ in range(4)])
        server.close()

    run_all(main, driver)


@pytest.mark.skipif(WINDOWS, reason="Windows has no UNIX sockets for asyncio")
def test_unix(driver: str, tmp_path: Path) -> None:
    async def main(index: int) -> None:
        path = str(tmp_path / str(index))
        server = await asyncio.get_running_loop().create_unix_server(Echo, path)
        await asyncio.gather(*[talk(*await asyncio.open_unix_connection(path), letter(index)) for _ in range(4)])
        server.close()

    run_all(main, driver)


def test_tls(driver: str) -> None:
    authority = trustme.CA()
    server_side, client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server_side)
    authority.configure_trust(client_side)

    async def main(index: int) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Echo, "127.0.0.1", 0, ssl=server_side)
        address = server.sockets[0].getsockname()

        async def one() -> None:
            await talk(
                *await asyncio.open_connection(*address, ssl=client_side, server_hostname="localhost"), letter(index)
            )

        await asyncio.gather(*[one() for _ in range(3)])
        server.close()

    run_all(main, driver)


def test_datagrams(driver: str) -> None:
    async def main(index: int) -> None:
        loop, mine = asyncio.get_running_loop(), letter(index)
        done = loop.create_future()
        count = 0

        class Ball(asyncio.DatagramProtocol):
            def connection_made(self, transport: Any) -> None:
                self.transport = transport

            def datagram_received(self, data: bytes, address: Any) -> None:
                nonlocal count
                count += 1
                if data != mine * 4000 or address not in addresses:
                    done.set_exception(AssertionError(f"{data[:10]!r}, {len(data)} bytes from {address}"))
                elif count < 50 * ROUNDS:
                    self.transport.sendto(data, address)
                elif not done.done():
                    done.set_result(None)

        ends = [await loop.create_datagram_endpoint(Ball, local_addr=("127.0.0.1", 0)) for _ in range(2)]
        addresses = [transport.get_extra_info("sockname") for transport, _ in ends]
        for _ in range(4):
            ends[0][0].sendto(mine * 4000, addresses[1])
        await done
        for transport, _ in ends:
            transport.close()
        await asyncio.sleep(0)

    run_all(main, driver)


def test_sockets(driver: str) -> None:
    async def main(index: int) -> None:
        loop, data = asyncio.get_running_loop(), letter(index) * SIZE

        async def one() -> None:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                ours.setblocking(False)
                theirs.setblocking(False)
                for _ in range(ROUNDS):
                    sending = asyncio.ensure_future(loop.sock_sendall(ours, data))
                    left = len(data)
                    while left:
                        got = await loop.sock_recv(theirs, left)
                        assert got == data[: len(got)]
                        left -= len(got)
                    await sending

        await asyncio.gather(*[one() for _ in range(4)])

    run_all(main, driver)


@pytest.mark.skipif(WINDOWS, reason="takes too long to start so many there")
def test_subprocesses(driver: str) -> None:
    async def main(index: int) -> None:
        for n in range(3):
            child = await asyncio.create_subprocess_exec(
                "cat", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
            data = letter(index) * (SIZE << n)
            out, _ = await child.communicate(data)
            assert out == data
            assert child.returncode == 0

    run_all(main, driver)


# -- calls from one loop to another ----------------------------------------------------------------


def test_calls_from_other_threads_come_in_order_and_none_is_lost(driver: str) -> None:
    """Each thread calls into every loop, while they are busy and while they are about to sleep."""
    inboxes: dict[int, Callable[[int, int], object]] = {}
    together = threading.Barrier(THREADS)
    count = 50 * ROUNDS

    async def main(index: int) -> None:
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        got: list[list[int]] = [[] for _ in range(THREADS)]

        def note(sender: int, number: int) -> None:
            got[sender].append(number)
            if sum(map(len, got)) == THREADS * count:
                done.set()

        inboxes[index] = lambda *arguments: loop.call_soon_threadsafe(note, *arguments)
        await loop.run_in_executor(None, together.wait, LIMIT)
        for number in range(count):
            for inbox in inboxes.values():
                inbox(index, number)
            if number % 100 == 0:
                await asyncio.sleep(0.001)
            elif number % 7 == 0:
                await asyncio.sleep(0)
        await done.wait()
        assert got == [list(range(count))] * THREADS
        await loop.run_in_executor(None, together.wait, LIMIT)  # nobody's loop closes while another calls into it

    run_all(main, driver)


def test_a_loop_that_is_about_to_sleep_is_woken(driver: str) -> None:
    """One call at a time, each to a loop that has nothing else to do: a lost wake would leave it asleep."""

    async def main(index: int) -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        over = False
        ring = threading.Event()

        def answer() -> None:
            while True:
                ring.wait()
                ring.clear()
                if over:
                    return
                loop.call_soon_threadsafe(future.set_result, None)

        thread = threading.Thread(target=answer)
        thread.start()
        for _ in range(20 * ROUNDS):
            future = loop.create_future()
            ring.set()
            await asyncio.wait_for(future, LIMIT)
        over = True
        ring.set()
        await loop.run_in_executor(None, thread.join)

    run_all(main, driver)


def test_handles_that_another_thread_cancels(driver: str) -> None:
    """asyncio does not promise that it helps, but it must do no harm."""

    async def main(index: int) -> None:
        loop = asyncio.get_running_loop()
        handles: list[asyncio.Handle] = []
        over = False

        def cancel() -> None:
            while not over:
                for handle in handles[-200:]:
                    handle.cancel()
                    repr(handle)

        thread = threading.Thread(target=cancel)
        thread.start()
        ran = 0

        def run(*arguments: object) -> None:
            nonlocal ran
            ran += 1
            assert arguments == (1, "two", handles)

        for n in range(30 * ROUNDS):
            handles += [
                loop.call_soon(run, 1, "two", handles),
                loop.call_later(0.0001 * (n % 5), run, 1, "two", handles),
                loop.call_later(1000, run, 1, "two", handles),
            ]
            if n % 10 == 0:
                await asyncio.sleep(0)
        over = True
        await loop.run_in_executor(None, thread.join)
        for handle in handles:
            handle.cancel()
        assert ran <= 60 * ROUNDS

    run_all(main, driver)


def test_what_is_the_loops_own_is_called_from_other_threads_and_nothing_breaks(driver: str) -> None:
    """Mistakes, all of them: what becomes of such a call is open, but the process must live, and other loops too."""
    program = """
        import asyncio, contextlib, os, sys, threading
        import iocp_loop

        async def main(index):
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda *_: None)
            server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
            address = server.sockets[0].getsockname()
            transports = []
            over = False

            def disturb():
                while not over:
                    with contextlib.suppress(Exception):
                        loop.call_soon(int)
                        loop.call_later(0.001, int).cancel()
                        for transport in list(transports):
                            transport.write(b"x" * 100)
                            transport.pause_reading()
                            transport.resume_reading()
                        loop._ready, list(loop._ready), loop._scheduled
                        loop.run_until_complete(asyncio.sleep(0))

            threads = [threading.Thread(target=disturb, daemon=True) for _ in range(2)]
            for thread in threads:
                thread.start()
            for _ in range(int(sys.argv[2])):
                transport, _ = await loop.create_connection(asyncio.Protocol, *address)
                transports.append(transport)
                await asyncio.sleep(0.001)
                transport.abort()
                transports.remove(transport)
                await asyncio.sleep(0)
            over = True
            await loop.run_in_executor(None, lambda: [thread.join() for thread in threads])
            server.close()

        with contextlib.suppress(Exception):  # such a mistake may end its own loop
            iocp_loop.run_threads(main, threads=2, driver=sys.argv[1])
        print("alive", flush=True)
        os._exit(0)  # whoever disturbs may go on
    """
    done = run_python(program, driver, str(ROUNDS))
    assert done.stdout == "alive\n"


def test_streams_that_other_threads_read_too_break_nothing(driver: str) -> None:
    """As above, with the readers and writers by name, and with one awaitable that several threads go on with."""
    program = """
        import asyncio, contextlib, os, sys, threading
        import iocp_loop

        async def main(index):
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda *_: None)
            over = False
            shared = []  # a reader, a writer, what their methods return

            async def serve(reader, writer):
                while not over:
                    writer.write(b"some\\n" * 100)
                    await writer.drain()
                    await asyncio.sleep(0)

            def disturb():
                while not over:
                    for reader, writer, *calls in shared[:]:
                        with contextlib.suppress(BaseException):
                            reader.feed_data(b"x\\n" * 1000)
                            reader._limit = 2**16 + len(calls)
                        for call in calls:
                            for step in (lambda: call.send(None), lambda: call.cr_await, call.close):
                                with contextlib.suppress(BaseException):
                                    step()
                        for make in (reader.readline, lambda: reader.read(7), writer.drain):
                            with contextlib.suppress(BaseException):
                                make().send(None)

            server = await iocp_loop.start_server(serve, "127.0.0.1", 0)
            address = server.sockets[0].getsockname()
            threads = [threading.Thread(target=disturb, daemon=True) for _ in range(2)]
            for thread in threads:
                thread.start()
            for _ in range(int(sys.argv[2])):
                reader, writer = await iocp_loop.open_connection(*address)
                calls = reader.readline(), reader.read(10), reader.readexactly(10), writer.drain()
                shared[:] = [(reader, writer, *calls)]
                for _ in range(20):
                    with contextlib.suppress(Exception):
                        await asyncio.wait_for(reader.readline(), 0.001)
                shared.clear()
                writer.close()
            over = True
            await loop.run_in_executor(None, lambda: [thread.join() for thread in threads])
            server.close()

        with contextlib.suppress(Exception):
            iocp_loop.run_threads(main, threads=2, driver=sys.argv[1])
        print("alive", flush=True)
        os._exit(0)
    """
    done = run_python(program, driver, str(ROUNDS))
    assert done.stdout == "alive\n"


# -- threads at one completion port ----------------------------------------------------------------


def test_threads_at_one_port(driver: str) -> None:
    """Each submits, posts, cancels and takes what comes next, whoever's that is; every completion comes once."""
    with CompletionPort(driver=driver) as port, contextlib.ExitStack() as stack:
        count = 30 * ROUNDS
        taken: list[list[Any]] = [[] for _ in range(THREADS)]
        failures: list[BaseException] = []
        pairs = [socket.socketpair() for _ in range(THREADS)]
        for pair in pairs:
            for sock in pair:
                stack.enter_context(sock)
                port.register(sock, pair)

        def work(index: int) -> None:
            ours, theirs = pairs[index]
            try:
                for n in range(count):
                    port.submit(Receive(theirs, 100))
                    port.submit(Send(ours, letter(index) * 100))
                    port.post((index, n))
                    operation = Receive(ours, 1)  # nothing will come
                    port.submit(operation)
                    port.cancel(operation)
                    for _ in range(4):
                        completion = port.get(LIMIT)
                        assert completion is not None
                        taken[index].append(completion)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(6 * LIMIT)
        assert not failures
        everything = [completion for each in taken for completion in each]
        posted = sorted(completion.value for completion in everything if completion.operation is None)
        assert posted == [(index, n) for index in range(THREADS) for n in range(count)]
        for kind, expected in ((Send, 1), (Receive, 2)):
            operations = [done.operation for done in everything if type(done.operation) is kind]
            assert len(set(map(id, operations))) == len(operations) == expected * THREADS * count
        for completion in everything:
            if type(completion.operation) is Receive and completion.error is None:
                assert completion.value == letter(pairs.index(completion.key)) * len(completion.value)
        assert port.in_flight == 0


def test_a_port_is_closed_under_threads_that_use_it(driver: str) -> None:
    """Each of them gets ValueError, or its completion."""

    def work(port: CompletionPort, strange: list[BaseException]) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            try:
                port.register(theirs)
                while True:
                    operation = Receive(theirs, 10)
                    port.submit(operation)
                    port.post()
                    port.cancel(operation)
                    port.get(LIMIT)
            except ValueError:
                pass
            except BaseException as error:
                strange.append(error)

    for _ in range(max(ROUNDS // 4, 1)):
        port = CompletionPort(driver=driver)
        strange: list[BaseException] = []
        threads = [threading.Thread(target=work, args=(port, strange)) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        time.sleep(0.005)
        port.close()
        for thread in threads:
            thread.join(LIMIT)
            assert not thread.is_alive()
        assert not strange


# -- what is process-wide --------------------------------------------------------------------------


def test_loops_that_are_made_and_closed_all_at_once(driver: str) -> None:
    def make() -> None:
        for _ in range(ROUNDS):
            loop = iocp_loop.new_event_loop(driver)
            try:
                assert loop.run_until_complete(asyncio.sleep(0, "done")) == "done"
            finally:
                loop.close()

    threads = [threading.Thread(target=make) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
