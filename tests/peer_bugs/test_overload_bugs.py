"""How comparable systems fail under overload; each test is named after its public issue, or after what a release did.

Measured on Dynamo 1.6.1: `reference/dynamo-behaviour.md`, 3d.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from holdfast.base.errors import CapacityExhausted
from holdfast.routing.config import AdmissionSettings
from holdfast.wire.frames import Load, Pong, Progress
from tests.e2e.support import Cluster, cluster
from tests.requests.fakes import Fleet, settle
from tests.support.virtual_time import virtual

ONE_SLOT = ("--engine", "mock", "--mock-step-ms", "10", "--max-num-seqs", "1", "--mock-num-blocks", "1024")
KNOB = "active_decode_blocks_threshold"
e2e = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Two workers of one slot, all settings as they are by default."""
    async with cluster(tmp_path_factory.mktemp("one_slot"), engine=ONE_SLOT) as running:
        yield running


def body(up: Cluster, tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": up.model, "max_tokens": tokens, "messages": [{"role": "user", "content": "hello"}], **more}


async def ask(up: Cluster, tokens: int = 3) -> httpx.Response:
    return await up.http.post("/v1/chat/completions", json=body(up, tokens))


async def put(up: Cluster, value: float | None) -> dict[str, Any]:
    return dict((await up.http.post("/busy_threshold", json={"model": up.model, KNOB: value})).json())


class TestMeasured:
    """What the release did when all workers were busy."""

    pytestmark = e2e

    async def test_a_hundred_streams_onto_two_slots_by_default(self, up: Cluster) -> None:
        """There: all 100 get 200 and sit, and a new request hangs for more than 40 s.

        Here workers take four times their seats by default; everybody else knows at once, and when to come again.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        refused_after: list[float] = []

        async def one() -> httpx.Response:
            answer = await ask(up, 20)
            if answer.status_code != 200:
                refused_after.append(loop.time() - began)
            return answer

        answers = await asyncio.gather(*(one() for _ in range(100)))
        served = [a for a in answers if a.status_code == 200]
        assert 8 <= len(served) <= 30
        assert {a.status_code for a in answers} == {200, 503}
        assert max(refused_after) < 5.0
        assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 503)
        await up.at_rest()

    async def test_overload_without_retry_after_and_without_a_reason(self, up: Cluster) -> None:
        """There: 529 {"message":"Service temporarily overloaded"}, no Retry-After; see also #9506 and #9547."""
        await put(up, 0.0)
        one, two = (asyncio.ensure_future(ask(up, 200)) for _ in range(2))
        await up.until(lambda: _held(up, 2), 5, every=0.005)
        answer = await ask(up)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        error = answer.json()["error"]
        assert f"DYN_{KNOB.upper()}" in error["message"]
        assert {"layer", "knob", "threshold", "measured"} <= set(error["details"])
        await asyncio.gather(one, two)
        await put(up, None)
        await up.at_rest()

    async def test_a_threshold_can_be_cleared(self, up: Cluster) -> None:
        """There: POST null is a read; only a restart clears a threshold."""
        assert (await put(up, 0.25))[KNOB] == 0.25
        assert (await put(up, None))[KNOB] is None
        assert (await put(up, None))[KNOB] is None

    async def test_bursts_slip_past_thresholds(self, up: Cluster) -> None:
        """There: 0 to 12 of 16 in the same instant are rejected, because only load events count."""
        await put(up, 0.0)
        answers = await asyncio.gather(*(ask(up, 200) for _ in range(16)))
        assert sorted(a.status_code for a in answers) == [200] * 2 + [503] * 14
        await put(up, None)
        await up.at_rest()

    async def test_a_threshold_is_in_force_with_the_very_next_request(self, up: Cluster) -> None:
        """There: at the next load or configuration event."""
        one, two = (asyncio.ensure_future(ask(up, 200)) for _ in range(2))
        await up.until(lambda: _held(up, 2), 5, every=0.005)
        await put(up, 0.0)
        assert (await ask(up)).status_code == 503
        await put(up, None)
        assert (await ask(up)).status_code == 200
        await asyncio.gather(one, two)
        await up.at_rest()


async def _held(up: Cluster, count: int) -> bool:
    return (await up.leases())["attempt"] == count


@virtual
async def test_issue_5796_load_metrics_that_are_always_zero() -> None:
    """ai-dynamo/dynamo#5796: workers report no load, so nobody is ever rejected. Own claims count all the same."""
    fleet = Fleet(1, settings={"admission": AdmissionSettings(active_prefill_tokens_threshold=8)})
    fleet.workers[0].pong = Pong(1, Progress(), Load(), 0)
    clients = [fleet.start() for _ in range(10)]
    await settle()
    rejected = [c for c in clients if c.sink.endings]
    assert len(rejected) == 7
    assert all(isinstance(c.ending.error, CapacityExhausted) for c in rejected)


@virtual
async def test_issue_9755_a_counter_and_a_log_with_knob_layer_threshold_and_measured() -> None:
    """ai-dynamo/dynamo#9755 (approved, not built): every rejection tells the observer which knob it was."""
    fleet = Fleet(1, settings={"admission": AdmissionSettings(active_prefill_tokens_threshold=0)})
    fleet.start()
    await settle()
    client = fleet.start()
    await settle()
    ended = fleet.seen.all("ended")
    assert [e.state for e in ended] == ["rejected"]
    assert ended[0].error is client.ending.error
    assert set(ended[0].error.details) >= {"knob", "layer", "threshold", "measured"}
