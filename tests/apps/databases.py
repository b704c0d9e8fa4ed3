"""Databases, with the real servers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from . import LIMIT, case, daemon, free_port, load, program


@contextlib.asynccontextmanager
async def postgres(folder: Path) -> AsyncIterator[int]:
    """A PostgreSQL with a database ``postgres`` and a user ``postgres``; it refuses to be run by root."""
    options: dict[str, Any] = {}
    if os.geteuid() == 0:
        import pwd  # not on Windows

        user = pwd.getpwnam("postgres")
        for each in (folder, *folder.parents[:1]):
            os.chown(each, user.pw_uid, user.pw_gid)
        options = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    data = folder / "data"
    initdb = [str(program("initdb")), "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync"]

    def make() -> None:  # in a thread: uvloop's subprocesses know no `user`
        subprocess.run(initdb, cwd=folder, stdout=subprocess.DEVNULL, check=True, **options)

    await asyncio.to_thread(make)
    port = free_port()
    command = ["postgres", "-D", str(data), "-p", str(port), "-k", str(folder), "-h", "127.0.0.1", "-F"]
    async with daemon(command, port, folder, **options):
        for _ in range(100):
            with contextlib.suppress(Exception):
                connection = await load("asyncpg").connect(f"postgresql://postgres@127.0.0.1:{port}/postgres")
                await connection.close()
                break
            await asyncio.sleep(0.1)
        yield port


@case(
    "asyncpg",
    "10,000 rows by COPY, 20 queries at once, LISTEN and NOTIFY, a query cancelled",
    programs=["postgres", "initdb"],
)
async def asyncpg(folder: Path) -> None:
    library = load("asyncpg")
    async with (
        postgres(folder) as port,
        library.create_pool(f"postgresql://postgres@127.0.0.1:{port}/postgres", min_size=5, max_size=5) as pool,
    ):
        await pool.execute("CREATE TABLE items (id int, name text)")
        async with pool.acquire() as one:
            await one.copy_records_to_table("items", records=[(n, f"item {n}") for n in range(10_000)])
            assert await one.fetchval("SELECT sum(id) FROM items") == sum(range(10_000))
            heard = asyncio.get_running_loop().create_future()
            await one.add_listener("news", lambda *arguments: heard.set_result(arguments[3]))
            await pool.execute("NOTIFY news, 'hello'")
            assert await asyncio.wait_for(heard, LIMIT) == "hello"
        assert await asyncio.gather(*[pool.fetchval("SELECT $1::int", n) for n in range(20)]) == list(range(20))
        with contextlib.suppress(asyncio.TimeoutError):
            await pool.fetchval("SELECT pg_sleep(60)", timeout=0.2)
        assert await pool.fetchval("SELECT 1") == 1


@case("psycopg", "COPY, a pipeline, NOTIFY, 20 connections at once", programs=["postgres", "initdb"])
async def psycopg(folder: Path) -> None:
    library = load("psycopg")
    async with postgres(folder) as port:
        url = f"postgresql://postgres@127.0.0.1:{port}/postgres"

        async def one(n: int) -> int:
            async with await library.AsyncConnection.connect(url) as connection:
                row = await (await connection.execute("SELECT %s + 1", [n])).fetchone()
                return int(row[0])

        assert await asyncio.gather(*map(one, range(20))) == list(range(1, 21))
        async with await library.AsyncConnection.connect(url, autocommit=True) as connection:
            await connection.execute("CREATE TABLE items (id int)")
            async with connection.cursor() as cursor:
                async with cursor.copy("COPY items FROM STDIN") as copy:
                    for n in range(10_000):
                        await copy.write_row((n,))
                async with connection.pipeline():
                    for _ in range(100):
                        await cursor.execute("SELECT count(*) FROM items")
                await cursor.execute("SELECT count(*) FROM items")
                assert (await cursor.fetchone())[0] == 10_000
            await connection.execute("LISTEN news")
            await connection.execute("NOTIFY news, 'hello'")
            async for notice in connection.notifies(timeout=LIMIT, stop_after=1):
                assert notice.payload == "hello"


@case(
    "sqlalchemy asyncpg aiosqlite",
    "the same on asyncpg and on aiosqlite",
    modules=["sqlalchemy", "asyncpg", "aiosqlite"],
    programs=["postgres", "initdb"],
)
async def sqlalchemy(folder: Path) -> None:
    text = load("sqlalchemy").text
    create = load("sqlalchemy.ext.asyncio").create_async_engine
    async with postgres(folder) as port:
        for url in (
            f"postgresql+asyncpg://postgres@127.0.0.1:{port}/postgres",
            f"sqlite+aiosqlite:///{folder}/items.db",
        ):
            engine = create(url)
            async with engine.begin() as connection:
                await connection.execute(text("CREATE TABLE items (id int)"))
                await connection.execute(text("INSERT INTO items VALUES (:n)"), [{"n": n} for n in range(1000)])
            async with engine.connect() as connection:
                assert (await connection.execute(text("SELECT sum(id) FROM items"))).scalar() == sum(range(1000))
            await engine.dispose()


@case("aiosqlite", "10,000 rows in a file, 20 queries at once")
async def aiosqlite(folder: Path) -> None:
    async with load("aiosqlite").connect(folder / "items.db") as database:
        await database.execute("CREATE TABLE items (id int)")
        await database.executemany("INSERT INTO items VALUES (?)", [(n,) for n in range(10_000)])
        await database.commit()

        async def total() -> int:
            async with database.execute("SELECT sum(id) FROM items") as cursor:
                return int((await cursor.fetchone())[0])

        assert await asyncio.gather(*[total() for _ in range(20)]) == [sum(range(10_000))] * 20


@case(
    "redis",
    "a pipeline of 1,000, 100 commands at once, publish and subscribe, a blocking pop",
    programs=["redis-server"],
)
async def redis(folder: Path) -> None:
    library = load("redis.asyncio")
    port = free_port()
    arguments = ["--port", str(port), "--save", "", "--dir", str(folder)]
    async with daemon(["redis-server", *arguments], port, folder), library.Redis(port=port) as client:
        async with client.pipeline() as pipe:
            for n in range(1000):
                pipe.set(f"key {n}", n)
            assert all(await pipe.execute())
        values = await asyncio.gather(*[client.get(f"key {n}") for n in range(100)])
        assert values == [b"%d" % n for n in range(100)]
        async with client.pubsub() as subscription:
            await subscription.subscribe("news")
            assert (await subscription.get_message(timeout=LIMIT))["type"] == "subscribe"
            await client.publish("news", "hello")
            assert (await subscription.get_message(timeout=LIMIT))["data"] == b"hello"
        waiting = asyncio.create_task(client.blpop("queue", timeout=int(LIMIT)))
        await asyncio.sleep(0.05)
        await client.rpush("queue", "job")
        assert await waiting == (b"queue", b"job")
