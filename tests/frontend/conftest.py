"""Production's event loop, and one shared stack per module, left at rest by every test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
import uvloop

from tests.frontend.support import Stack, stack


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Transports of uvloop differ from asyncio's in when they write and how they close."""
    return {"uvloop": uvloop.new_event_loop}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Stack]:
    """One instant mock worker."""
    async with stack() as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def one(shared: Stack) -> AsyncIterator[Stack]:
    """The shared stack; nothing is held after the test."""
    yield shared
    await shared.at_rest()
