"""Streams on the bulk connection while the worker is lost."""

from __future__ import annotations

import asyncio
import random

import pytest

from holdfast.base.errors import HoldfastError
from holdfast.runtime.link import Link
from holdfast.runtime.server import WorkerServer
from holdfast.wire.frames import OpenHeaders
from tests.runtime.memory_network import MemoryNetwork
from tests.support.virtual_time import virtual
from tests.wire.pairs import Sink


@virtual
async def test_a_worker_that_is_lost_while_bulk_connects_is_an_error_not_a_cancellation():
    rng = random.Random(1)
    network = MemoryNetwork(1)
    server = WorkerServer("w1", 1, rng=rng, transport=network)
    link = Link(network, await server.start(), caller="c", rng=rng)
    await link.connect(2.0)
    opening = asyncio.ensure_future(link.open_bulk("files", OpenHeaders(), b"", Sink()))
    await asyncio.sleep(0)
    await server.close()
    with pytest.raises(HoldfastError):
        await opening
    await link.close()


@virtual
async def test_what_goes_over_bulk_is_no_work():
    rng = random.Random(1)
    network = MemoryNetwork(1)
    server = WorkerServer("w1", 1, rng=rng, transport=network)
    server.register("hold", lambda call: call.accept())
    link = Link(network, await server.start(), caller="c", rng=rng)
    await link.connect(2.0)
    await link.open_bulk("hold", OpenHeaders(), b"", Sink())
    await asyncio.sleep(0.1)
    assert (link.streams, server.open_streams) == (0, 0)
    link.open("hold", OpenHeaders(), b"", Sink())
    await asyncio.sleep(0.1)
    assert (link.streams, server.open_streams) == (1, 1)
    await link.close()
    await server.close()
