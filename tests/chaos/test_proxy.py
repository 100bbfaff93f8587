"""The proxy is as bad a network as it was told to be, and otherwise none at all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator

import pytest_asyncio

from holdfast.chaos.owners import owner_of
from holdfast.chaos.proxy import HELD_BYTES, Proxy
from tests.patience import within

SOON = within(1.0)


class Echo:
    """A server behind a proxy whose connections all belong to the peer ``a``, unless they are renamed."""

    def __init__(self) -> None:
        self.peer = "a"
        self.heard = asyncio.Event()
        self.ended = asyncio.Event()
        self.broken = asyncio.Event()

    async def start(self) -> None:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        target = self.server.sockets[0].getsockname()[:2]
        self.proxy = Proxy(target, lambda _address: self.peer, random.Random(1))
        self.host, _, port = (await self.proxy.start()).rpartition(":")
        self.port = int(port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                self.heard.set()
                writer.write(data)
                await writer.drain()
            self.ended.set()
        except OSError:
            self.broken.set()
        finally:
            writer.close()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port)

    async def close(self) -> None:
        await self.proxy.close()
        self.server.close()


@pytest_asyncio.fixture
async def echo() -> AsyncIterator[Echo]:
    made = Echo()
    await made.start()
    yield made
    await made.close()


async def said(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
    writer.write(data)
    async with asyncio.timeout(SOON):
        return await reader.readexactly(len(data))


async def test_passes_everything_in_order(echo: Echo) -> None:
    reader, writer = await echo.connect()
    data = random.Random(2).randbytes(3_000_000)
    sending = asyncio.ensure_future(asyncio.wait_for(writer.drain(), SOON))
    writer.write(data)
    async with asyncio.timeout(within(5.0)):
        assert await reader.readexactly(len(data)) == data
    await sending
    writer.write_eof()
    async with asyncio.timeout(SOON):
        await echo.ended.wait()
        assert await reader.read() == b""
    writer.close()


async def test_delay_is_added_both_ways_and_ends(echo: Echo) -> None:
    loop = asyncio.get_running_loop()
    reader, writer = await echo.connect()
    echo.proxy.delay("a", 0.1, jitter=0.02)
    began = loop.time()
    await said(reader, writer, b"slow")
    assert loop.time() - began >= 0.2
    echo.proxy.delay("a", 0.0)
    began = loop.time()
    await said(reader, writer, b"fast")
    assert loop.time() - began < within(0.1)
    writer.close()


async def test_bandwidth(echo: Echo) -> None:
    loop = asyncio.get_running_loop()
    reader, writer = await echo.connect()
    echo.proxy.line("a", "in").rate = 100_000
    began = loop.time()
    await said(reader, writer, b"x" * 20_000)
    await said(reader, writer, b"y")
    assert loop.time() - began >= 0.2
    writer.close()


async def test_a_partition_holds_bytes_until_it_is_healed(echo: Echo) -> None:
    reader, writer = await echo.connect()
    await said(reader, writer, b"before")
    echo.proxy.partition("a")
    echo.heard.clear()
    writer.write(b"held")
    reading = asyncio.ensure_future(reader.readexactly(4))
    done, _ = await asyncio.wait([reading], timeout=0.2)
    assert not done
    assert not echo.heard.is_set()
    echo.proxy.heal("a")
    assert await asyncio.wait_for(reading, SOON) == b"held"
    writer.close()


async def test_one_way(echo: Echo) -> None:
    """What goes to the worker arrives; what it says does not."""
    reader, writer = await echo.connect()
    await said(reader, writer, b"before")
    echo.proxy.partition("a", ("out",))
    echo.heard.clear()
    writer.write(b"held")
    await asyncio.wait_for(echo.heard.wait(), SOON)
    reading = asyncio.ensure_future(reader.readexactly(4))
    done, _ = await asyncio.wait([reading], timeout=0.2)
    assert not done
    echo.proxy.heal("a", ("out",))
    assert await asyncio.wait_for(reading, SOON) == b"held"
    writer.close()


async def test_a_partition_holds_the_end_of_a_connection_too(echo: Echo) -> None:
    reader, writer = await echo.connect()
    await said(reader, writer, b"before")
    echo.proxy.partition("a")
    writer.close()
    waiting = asyncio.ensure_future(echo.ended.wait())
    done, _ = await asyncio.wait([waiting], timeout=0.2)
    assert not done
    echo.proxy.heal("a")
    await asyncio.wait_for(waiting, SOON)


async def test_other_peers_go_on(echo: Echo) -> None:
    first = await echo.connect()
    await said(*first, b"a")
    echo.peer = "b"
    second = await echo.connect()
    await said(*second, b"b")
    echo.proxy.partition("a")
    await said(*second, b"still")
    assert echo.proxy.connections("a") == echo.proxy.connections("b") == 1
    for _, writer in (first, second):
        writer.close()


async def test_new_connections_wait_during_a_partition(echo: Echo) -> None:
    echo.proxy.partition("a")
    reader, writer = await echo.connect()
    writer.write(b"hello")
    reading = asyncio.ensure_future(reader.readexactly(5))
    done, _ = await asyncio.wait([reading], timeout=0.2)
    assert not done
    echo.proxy.heal("a")
    assert await asyncio.wait_for(reading, SOON) == b"hello"
    writer.close()


async def test_reset_reaches_both_sides(echo: Echo) -> None:
    reader, writer = await echo.connect()
    await said(reader, writer, b"before")
    assert echo.proxy.reset("b") == 0
    assert echo.proxy.reset("a") == 1
    async with asyncio.timeout(SOON):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        await echo.broken.wait()
    writer.close()


async def test_a_reset_of_the_worker_reaches_the_caller(echo: Echo) -> None:
    """As when the worker is killed: its kernel resets, and the proxy passes that on."""
    echo.server.close()
    reader, writer = await echo.connect()
    async with asyncio.timeout(SOON):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    writer.close()


async def test_deaf_and_listening_again(echo: Echo) -> None:
    echo.proxy.deafen()
    try:
        await echo.connect()
    except ConnectionRefusedError:
        pass
    else:
        raise AssertionError("a deaf proxy accepted")
    await echo.proxy.listen()
    reader, writer = await echo.connect()
    assert await said(reader, writer, b"again") == b"again"
    writer.close()


async def test_what_is_held_is_bounded(echo: Echo) -> None:
    """The sender has to wait when nothing passes; nothing is lost."""
    reader, writer = await echo.connect()
    await said(reader, writer, b"before")
    echo.proxy.partition("a", ("in",))
    size = 4 * HELD_BYTES
    writer.write(b"z" * size)
    draining = asyncio.ensure_future(writer.drain())
    done, _ = await asyncio.wait([draining], timeout=0.3)
    assert not done
    echo.proxy.heal("a", ("in",))
    async with asyncio.timeout(within(10.0)):
        assert len(await reader.readexactly(size)) == size
        await draining
    writer.close()


async def test_owner_of_a_connection(echo: Echo) -> None:
    reader, writer = await echo.connect()
    await said(reader, writer, b"mine")
    port = writer.get_extra_info("sockname")[1]
    assert owner_of(port, echo.port, {"other": os.getppid(), "me": os.getpid()}) == "me"
    assert owner_of(port, echo.port, {"other": os.getppid()}) == ""
    assert owner_of(port, 1, {"me": os.getpid()}) == ""
    writer.close()
