"""Random lives of a connection: whatever its two sides do, calls come in order, bytes arrive, and nothing is left."""

from __future__ import annotations

import asyncio
import re
import socket
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import iocp_loop

from .support import WINE, Recorder, tcp_pair, turns, until

#: What a protocol may be called with, in which order (the data of several calls are joined).
ORDER = re.compile(r"connection_made( data_received| pause_writing| resume_writing)*( eof_received)?.*")


class Listening(Recorder):
    """Checks that it is not called with data while it rests."""

    resting = False

    def data_received(self, data: bytes) -> None:
        assert not self.resting
        assert data
        super().data_received(data)


class ListeningBuffered(asyncio.BufferedProtocol):
    """The same with a buffer of its own, of an odd size."""

    def __init__(self) -> None:
        self.recorder = Listening()
        self.buffer = bytearray(37)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.recorder.data_received(bytes(self.buffer[:nbytes]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.recorder, name)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.recorder.connection_made(transport)

    def eof_received(self) -> bool:
        return self.recorder.eof_received()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.recorder.connection_lost(exc)


class OneConnection(RuleBasedStateMachine):
    """A transport, and a peer that is a plain socket."""

    def __init__(self, loop: iocp_loop.IocpEventLoop, buffered: bool) -> None:
        super().__init__()
        self.loop = loop
        self.ours, self.peer = tcp_pair()
        self.peer.setblocking(False)
        protocol: Any = ListeningBuffered() if buffered else Listening()
        self.protocol: Listening = protocol.recorder if buffered else protocol
        loop.run_until_complete(loop.create_connection(lambda: protocol, sock=self.ours))
        self.transport = self.protocol.transport
        self.written = bytearray()
        self.sent = bytearray()  # by the peer
        self.got = bytearray()  # by the peer
        self.aborted = self.write_ended = self.peer_ended = False

    # -- our side ----------------------------------------------------------------------------------

    @precondition(lambda self: not self.transport.is_closing() and not self.write_ended)
    @rule(sizes=st.lists(st.sampled_from([0, 1, 10, 1000, 300_000, 5_000_000]), max_size=3), lines=st.booleans())
    def write(self, sizes: list[int], lines: bool) -> None:
        pieces = [bytes([65 + len(self.written) % 26]) * size for size in sizes]
        if lines:
            self.transport.writelines(pieces)
        else:
            for piece in pieces:
                self.transport.write(bytearray(piece))
        self.written += b"".join(pieces)

    @rule(rest=st.booleans())
    def pause_or_resume(self, rest: bool) -> None:
        (self.transport.pause_reading if rest else self.transport.resume_reading)()
        self.protocol.resting = not self.transport.is_reading()

    @rule()
    def write_eof(self) -> None:
        self.transport.write_eof()
        self.write_ended = True

    @rule(abort=st.booleans())
    def close(self, abort: bool) -> None:
        if abort:
            self.aborted = True
            self.transport.abort()
        else:
            self.transport.close()

    # -- the peer ----------------------------------------------------------------------------------

    @precondition(lambda self: not self.peer_ended)
    @rule(size=st.sampled_from([1, 10, 1000, 100_000]))
    def peer_sends(self, size: int) -> None:
        data = bytes([97 + len(self.sent) % 26]) * size
        try:
            count = self.peer.send(data)
        except BlockingIOError:
            return
        except ConnectionError:
            self.peer_ended = True
            return
        self.sent += data[:count]

    @precondition(lambda self: not self.peer_ended)
    @rule()
    def peer_ends(self) -> None:
        self.peer_ended = True
        try:
            self.peer.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it was reset

    @rule()
    def peer_receives(self) -> None:
        try:
            self.got += self.peer.recv(1 << 20)
        except BlockingIOError:
            pass
        except ConnectionError:
            self.aborted = True

    @rule(count=st.integers(1, 5))
    def turn(self, count: int) -> None:
        self.loop.run_until_complete(turns(count))

    # -- what always holds -------------------------------------------------------------------------

    @invariant()
    def calls_come_in_order(self) -> None:
        calls = self.protocol.calls
        assert ORDER.fullmatch(" ".join(calls))
        for name in ("connection_made", "eof_received", "connection_lost"):
            assert calls.count(name) <= 1
        assert 0 <= calls.count("pause_writing") - calls.count("resume_writing") <= 1
        if "connection_lost" in calls:
            assert calls[-1] == "connection_lost"

    @invariant()
    def bytes_come_in_order(self) -> None:
        assert self.sent.startswith(self.protocol.data)
        assert self.written.startswith(self.got)

    def teardown(self) -> None:
        try:
            reading = self.transport.is_reading()
            self.transport.resume_reading()
            self.protocol.resting = False
            if not self.transport.is_closing() and self.peer_ended:
                # Everything that the peer sent is on its way to the protocol, whatever it was told before.
                self.loop.run_until_complete(until(lambda: self.protocol.data == self.sent or self.protocol.finished))
                assert self.protocol.data == self.sent or not reading or self.protocol.lost
            self.transport.close()

            def drained() -> bool:
                self.peer_receives()
                return self.protocol.finished

            self.loop.run_until_complete(until(drained))
            self.loop.run_until_complete(until(lambda: not self.loop._proactor.in_flight))
            self.calls_come_in_order()
            if not self.aborted and self.protocol.lost is None:
                # Closed in order: unless unread data made our system reset the connection, all of it arrives.
                self.peer.settimeout(5)
                try:
                    while data := self.peer.recv(1 << 20):
                        self.got += data
                except ConnectionError:
                    assert self.protocol.data != self.sent
                else:
                    # Wine tells the peer of that reset as the end of the stream.
                    assert self.got == self.written or (WINE and self.protocol.data != self.sent)
            assert self.ours.fileno() == -1
        finally:
            self.transport.abort()
            self.peer.close()


def test_random_lives(loop: iocp_loop.IocpEventLoop) -> None:
    for buffered in (False, True):
        run_state_machine_as_test(
            lambda buffered=buffered: OneConnection(loop, buffered),  # type: ignore[arg-type]  # any maker will do
            settings=settings(
                max_examples=40,
                stateful_step_count=20,
                suppress_health_check=list(HealthCheck),  # a busy machine is no failure
            ),
        )
