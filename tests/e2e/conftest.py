"""One cluster per module, left at rest by every test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.e2e.support import Cluster, cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Two mock workers with steps of 5 ms; a killed one comes back at once."""
    async with cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def mock(shared: Cluster) -> AsyncIterator[Cluster]:
    """The shared cluster: all workers usable before the test; nothing held and every stream ended once after it."""
    await shared.usable()
    yield shared
    await shared.usable()
    await shared.at_rest()
    broken, shared.wire.broken = shared.wire.broken, []
    assert not broken, broken
