"""The smallest echo server: plain asyncio, run by iocp_loop.  Try it with ``nc localhost 8888``."""

import asyncio

import iocp_loop


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()  # waits while the client is slow to read
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(echo, "127.0.0.1", 8888)
    await server.serve_forever()


if __name__ == "__main__":
    iocp_loop.run(main())  # the only line that differs from stock asyncio
