r"""A server and a client on a named pipe (Windows): ``python examples/named_pipe.py serve``, then ``... say hello``.

The streams of asyncio work over a named pipe as they do over a socket; only the two calls that make them are the
loop's.  Programs of one machine talk so without a port number, and Windows can say who may connect.
"""

import asyncio
import sys

import iocp_loop

ADDRESS = r"\\.\pipe\iocp_loop-example"


async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async for line in reader:
        writer.write(line.upper())
        await writer.drain()  # waits while the client is slow to read
    writer.close()


async def serve(address: str = ADDRESS) -> None:
    loop = asyncio.get_running_loop()
    [server] = await loop.start_serving_pipe(  # type: ignore[attr-defined]  # it is there on Windows
        lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader(), shout), address
    )
    print(f"serving {address}", flush=True)
    try:
        await asyncio.Event().wait()  # until Ctrl-C
    finally:
        server.close()


async def say(words: str, address: str = ADDRESS) -> str:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, protocol = await loop.create_pipe_connection(  # type: ignore[attr-defined]  # it is there on Windows
        lambda: asyncio.StreamReaderProtocol(reader), address
    )
    writer = asyncio.StreamWriter(transport, protocol, reader, loop)
    writer.write(words.encode() + b"\n")
    answer = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return answer.decode().rstrip()


async def main(arguments: list[str]) -> None:
    match arguments:
        case ["serve"]:
            await serve()
        case ["say", *words]:
            print(await say(" ".join(words)))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    if sys.platform != "win32":
        raise SystemExit("named pipes of this kind exist on Windows only; UNIX sockets do the same on other systems")
    try:
        iocp_loop.run(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped")
