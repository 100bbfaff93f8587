"""Workers that refuse, give up early or report errors, without dying.

In a file of its own: such faults count against a worker, which keeps new work away from it for a while.
"""

from __future__ import annotations

import pytest

from tests.e2e.asking import exact, whole
from tests.e2e.support import Cluster
from tests.e2e.truth import Ask

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]


@pytest.mark.parametrize(
    ("directive", "cause", "at"),
    [
        ("refuse", "worker_saturated", 0),
        ("abort-after 0", "stream_incomplete", 0),
        ("abort-after 7", "stream_incomplete", 7),
        ("error-after 0", "engine_failed", 0),
        ("error-after 7", "engine_failed", 7),
        ("die-after 7", "engine_failed", 7),
        ("crash-after 7", "disconnected", 7),
    ],
)
@pytest.mark.parametrize("how", [exact, whole], ids=["stream", "whole"])
async def test_refusals_early_ends_and_engine_errors(mock: Cluster, how, directive: str, cause: str, at: int) -> None:  # type: ignore[no-untyped-def]
    answer = await how(mock, Ask(content=f"[[mock:{directive}]] go on", n=1))
    assert answer.causes == [cause]
    assert answer.moves[0]["at"] == at
