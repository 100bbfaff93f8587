"""Killers that wait, where streams with few tokens are tried one at a time: two workers, one stream."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.e2e.killers import SLOW, innocent, poisoned
from tests.e2e.support import Cluster, cluster
from tests.e2e.truth import Ask

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Three mock workers with steps of 5 ms; who had fewer than 32 tokens is tried alone.

    With two the trials of fifty streams would take longer than anybody waits for one when the machine is very busy.
    """
    trials = ("--migration-trial-tokens", "32")
    async with cluster(tmp_path_factory.mktemp("cluster"), workers=3, frontend=trials) as running:
        yield running


@pytest.mark.parametrize("at", [1, 20])
@pytest.mark.parametrize("established", [True, False], ids=["established", "all at once"])
async def test_poison_at_a_later_token_costs_two_workers_and_one_stream(
    mock: Cluster, established: bool, at: int
) -> None:
    killer = Ask(content=f"[[mock:crash-at {at}]] {SLOW} poison", max_tokens=50)
    lost = await poisoned(mock, killer, innocent(90 if established else 40), early=99 if established else 0)
    assert lost <= 2, await mock.story("poison")
