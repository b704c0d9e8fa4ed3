"""Is this installation whole?  ``python smoke.py uring,poll``: the native tier, and the drivers that are named.

``no-child`` behind it leaves out what starts a process.  It needs nothing but the package and the standard library, and
says in one line what it tried.
"""

import asyncio
import platform
import sys

import iocp_loop
from iocp_loop import native


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


class Peer(asyncio.DatagramProtocol):
    """Sends back what comes, or hands it to a future."""

    def __init__(self, answer: "asyncio.Future[bytes] | None" = None) -> None:
        self.answer = answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, address: object) -> None:
        if self.answer is not None:
            self.answer.set_result(data)
        else:
            self.transport.sendto(data[::-1], address)  # type: ignore[attr-defined]  # a DatagramTransport


async def exercise() -> None:
    """Streams, datagrams, a timer, a thread and a child process."""
    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    reader, writer = await asyncio.open_connection(*address)
    for size in (1, 1000, 1_000_000):
        data = bytes(range(251)) * (size // 251 + 1)
        writer.write(data)
        assert await reader.readexactly(len(data)) == data
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()

    answer = loop.create_future()
    far, _ = await loop.create_datagram_endpoint(Peer, local_addr=("127.0.0.1", 0))
    near, _ = await loop.create_datagram_endpoint(lambda: Peer(answer), remote_addr=far.get_extra_info("sockname"))
    near.sendto(b"abc")
    assert await asyncio.wait_for(answer, 20) == b"cba"
    near.close()
    far.close()

    begin = loop.time()
    await asyncio.sleep(0.02)
    assert loop.time() - begin >= 0.02
    assert await asyncio.to_thread(sum, (1, 2)) == 3
    if "no-child" in sys.argv:  # an emulator's programs cannot start others
        return
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "print(input().upper())", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await child.communicate(b"hello\n")
    assert out.split() == [b"HELLO"], out


def main() -> None:
    assert native.hot is not None, native.why_not
    drivers = sys.argv[1].split(",")
    for driver in drivers:
        iocp_loop.run(exercise(), driver=driver, debug=True)
        iocp_loop.run(exercise(), driver=driver)
    print(
        f"native tier and driver {' and '.join(drivers)} on {platform.python_implementation()} "
        f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    )


main()
