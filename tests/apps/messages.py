"""Messages, names, mail and shells."""

from __future__ import annotations

import asyncio
import sys
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from . import LIMIT, case, daemon, free_port, load


@case("pyzmq", "requests and replies, publish and subscribe, 1,000 messages each", modules=["zmq"])
async def pyzmq(folder: Path) -> None:
    zmq = load("zmq")
    context = load("zmq.asyncio").Context()
    replying, asking = context.socket(zmq.REP), context.socket(zmq.REQ)
    publishing, subscribing = context.socket(zmq.PUB), context.socket(zmq.SUB)
    for socket in (publishing, subscribing):
        socket.set_hwm(0)  # else it drops the 1,001st message when its thread has not run meanwhile
    asking.connect(f"tcp://127.0.0.1:{replying.bind_to_random_port('tcp://127.0.0.1')}")
    subscribing.connect(f"tcp://127.0.0.1:{publishing.bind_to_random_port('tcp://127.0.0.1')}")
    subscribing.subscribe(b"")

    async def reply() -> None:
        for _ in range(1000):
            await replying.send((await replying.recv())[::-1])

    task = asyncio.create_task(reply())
    for n in range(1000):
        await asking.send(b"<%d" % n)
        assert await asking.recv() == (b"<%d" % n)[::-1]
    await task
    while not await subscribing.poll(50):
        await publishing.send(b"anybody there?")

    async def count() -> int:
        got = 0
        while got < 1000:
            got += (await subscribing.recv()).isdigit()
        return got

    counting = asyncio.create_task(count())
    for n in range(1000):
        await publishing.send(b"%d" % n)
        await asyncio.sleep(0)
    assert await asyncio.wait_for(counting, LIMIT) == 1000
    context.destroy(linger=0)


@case("aiodns", "100 names asked at once of a server on this loop")
async def aiodns(folder: Path) -> None:
    loop = asyncio.get_running_loop()

    class Names(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, address: Any) -> None:
            end = data.index(b"\0", 12) + 5  # the question
            answer = b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\x7f\x00\x00\x07"
            self.transport.sendto(data[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + data[12:end] + answer, address)

    transport, _ = await loop.create_datagram_endpoint(Names, local_addr=("127.0.0.1", 0))
    port = transport.get_extra_info("sockname")[1]
    resolver = load("aiodns").DNSResolver(nameservers=["127.0.0.1"], udp_port=port, tcp_port=port, timeout=LIMIT)
    query = getattr(resolver, "query_dns", None) or resolver.query
    answers = await asyncio.gather(*[query(f"host{n}.example.org", "A") for n in range(100)])
    assert len(answers) == 100
    assert all("127.0.0.7" in repr(answer) for answer in answers)
    await resolver.close()
    transport.close()


@case("grpcio", "100 calls at once, a stream of 1,000 messages each way", modules=["grpc"])
async def grpc(folder: Path) -> None:
    library = load("grpc")
    aio = load("grpc.aio")

    async def unary(request: bytes, context: Any) -> bytes:
        return request[::-1]

    async def stream(requests: Any, context: Any) -> Any:
        async for request in requests:
            yield request * 2

    handler = library.method_handlers_generic_handler("test", {
        "unary": library.unary_unary_rpc_method_handler(unary),
        "stream": library.stream_stream_rpc_method_handler(stream),
    })  # fmt: skip
    server = aio.server()
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/test/unary")
        assert await asyncio.gather(*[call(b"<%d" % n) for n in range(100)]) == [(b"<%d" % n)[::-1] for n in range(100)]

        async def requests() -> Any:
            for n in range(1000):
                yield b"%d," % n

        got = [answer async for answer in channel.stream_stream("/test/stream")(requests())]
        assert got == [b"%d," % n * 2 for n in range(1000)]
    await server.stop(None)


@case("asyncssh", "a server and a client: exec, 1 MB by SFTP, a forwarded port")
async def asyncssh(folder: Path) -> None:
    library = load("asyncssh")
    key = library.generate_private_key("ssh-ed25519")

    class Server(library.SSHServer):  # type: ignore[misc,name-defined]  # loaded untyped
        def begin_auth(self, username: str) -> bool:
            return False

        def connection_requested(self, *_: Any) -> bool:
            return True

    async def run(process: Any) -> None:
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", process.command, stdout=-1)
        out, _ = await child.communicate()
        process.stdout.write(out.decode())
        process.exit(child.returncode)

    async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello through the tunnel")
        writer.close()

    server = await library.create_server(
        Server, "127.0.0.1", 0, server_host_keys=[key], process_factory=run, sftp_factory=True
    )
    port = server.sockets[0].getsockname()[1]
    plain = await asyncio.start_server(hello, "127.0.0.1", 0)
    async with library.connect("127.0.0.1", port, known_hosts=None, username="me", client_keys=None) as client:
        done = await client.run("print(6 * 7); raise SystemExit(3)")
        assert (done.stdout, done.exit_status) == ("42\n", 3)
        (folder / "there").write_bytes(bytes(range(256)) * 4096)
        async with client.start_sftp_client() as sftp:
            await sftp.get(str(folder / "there"), str(folder / "here"))
        assert (folder / "here").read_bytes() == (folder / "there").read_bytes()
        tunnel = await client.forward_local_port("", 0, "127.0.0.1", plain.sockets[0].getsockname()[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", tunnel.get_port())
        assert await reader.read() == b"hello through the tunnel"
        writer.close()
        tunnel.close()
    plain.close()
    server.close()


@case("aiomqtt", "500 messages through mosquitto, QoS 1", programs=["mosquitto"])
async def aiomqtt(folder: Path) -> None:
    client = load("aiomqtt").Client
    port = free_port()
    (folder / "mosquitto.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    async with (
        daemon(["mosquitto", "-c", str(folder / "mosquitto.conf")], port, folder),
        client("127.0.0.1", port) as receiver,
        client("127.0.0.1", port) as sender,
    ):
        await receiver.subscribe("news/#", qos=1)

        async def receive() -> list[bytes]:
            got = []
            async for message in receiver.messages:
                got.append(message.payload)
                if len(got) == 500:
                    break
            return got

        receiving = asyncio.create_task(receive())
        for n in range(500):
            await sender.publish(f"news/{n % 7}", b"%d" % n, qos=1)
        assert sorted(map(int, await asyncio.wait_for(receiving, LIMIT))) == list(range(500))


@case(
    "nats-py",
    "1,000 messages to three of a group, 100 requests at once",
    modules=["nats"],
    programs=["nats-server"],
)
async def nats(folder: Path) -> None:
    port = free_port()
    async with daemon(["nats-server", "--addr", "127.0.0.1", "--port", str(port)], port, folder):
        client = await load("nats").connect(f"nats://127.0.0.1:{port}")
        got: list[bytes] = []
        complete = asyncio.Event()

        async def take(message: Any) -> None:
            got.append(message.data)
            if len(got) == 1000:
                complete.set()

        async def answer(message: Any) -> None:
            await message.respond(message.data[::-1])

        for _ in range(3):
            await client.subscribe("jobs", queue="workers", cb=take)
        await client.subscribe("questions", cb=answer)
        await client.flush()
        for n in range(1000):
            await client.publish("jobs", b"%d" % n)
        await asyncio.wait_for(complete.wait(), LIMIT)
        assert sorted(map(int, got)) == list(range(1000))
        asked = [client.request("questions", b"<%d" % n, timeout=LIMIT) for n in range(100)]
        assert [each.data for each in await asyncio.gather(*asked)] == [(b"<%d" % n)[::-1] for n in range(100)]
        await client.drain()


@case("aiosmtplib aiosmtpd", "50 mails at once, STARTTLS", modules=["aiosmtplib", "aiosmtpd"])
async def aiosmtplib(folder: Path) -> None:
    from . import certificates

    library = load("aiosmtplib")
    server_tls, client_tls = certificates(folder)
    got = []

    class Handler:
        async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
            got.append(envelope.content)
            return "250 OK"

    smtp = load("aiosmtpd.smtp").SMTP
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: smtp(Handler(), hostname="localhost", tls_context=server_tls, loop=loop), "127.0.0.1", 0
    )
    port = server.sockets[0].getsockname()[1]

    async def send(n: int) -> None:
        mail = EmailMessage()
        mail["From"], mail["To"], mail["Subject"] = "me@example.org", "you@example.org", f"mail {n}"
        mail.set_content("hello\n" * 1000)
        await library.send(mail, hostname="localhost", port=port, start_tls=True, tls_context=client_tls)

    await asyncio.gather(*map(send, range(50)))
    assert len(got) == 50
    assert all(content.count(b"hello") == 1000 for content in got)
    server.close()
    await server.wait_closed()
