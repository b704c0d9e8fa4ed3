"""A chat room: every line that one member sends goes to all the others.

    python examples/chat.py [--port 8889] [--driver auto|iocp|uring|poll]

Join it with ``nc localhost 8889``, from several terminals.  It is plain asyncio; iocp_loop only runs it.
"""

from __future__ import annotations

import argparse
import asyncio

import iocp_loop

#: Bytes that may wait for a member who does not read; then the room goes on without that member.
PATIENCE = 1024 * 1024


class Room:
    """The members, and what is said."""

    def __init__(self) -> None:
        self.members: dict[asyncio.StreamWriter, str] = {}

    def say(self, text: str, sender: asyncio.StreamWriter | None = None) -> None:
        """Send a line to everybody but its sender.  Nobody is waited for."""
        line = f"{text}\n".encode()
        for writer in list(self.members):
            if writer is sender:
                continue
            writer.write(line)
            if writer.transport.get_write_buffer_size() > PATIENCE:
                writer.transport.abort()  # its own task sees the end, and says goodbye

    async def visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One member, from coming to leaving."""
        try:
            writer.write(b"Your name? ")
            name = (await reader.readline()).decode(errors="replace").strip() or "somebody"
            self.say(f"* {name} is here")
            self.members[writer] = name
            while line := await reader.readline():
                self.say(f"{name}: {line.decode(errors='replace').rstrip()}", writer)
        except (ConnectionError, ValueError, asyncio.CancelledError):
            pass  # the connection broke; a line was longer than the reader's limit of 64 KiB; the server ends
        finally:
            if self.members.pop(writer, None) is not None:
                self.say(f"* {name} has left")
            writer.close()


async def main(host: str, port: int) -> None:
    server = await asyncio.start_server(Room().visit, host, port)
    host, port = server.sockets[0].getsockname()[:2]
    print(f"listening on {host}:{port}", flush=True)
    try:
        await asyncio.Event().wait()  # until Ctrl-C
    finally:
        server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A chat room.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8889, help="0 takes a free one")
    parser.add_argument("--driver", help="auto, iocp, uring or poll (default: IOCP_LOOP_DRIVER, else auto)")
    options = parser.parse_args()
    try:
        iocp_loop.run(main(options.host, options.port), driver=options.driver)
    except KeyboardInterrupt:
        pass
