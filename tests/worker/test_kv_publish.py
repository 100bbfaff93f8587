"""The endpoint ``kv_events`` refuses what it cannot serve, and its figures are shown."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.base.errors import InvalidRequest
from holdfast.kv.events import BlockStored
from holdfast.kv.feed import Subscribe
from holdfast.runtime.context import Context
from holdfast.worker.calls import Calls
from holdfast.worker.kv_config import KvPublishConfig
from holdfast.worker.kv_gauges import KvGauges
from holdfast.worker.kv_publish import KvPublisher
from tests.support.kv_world import Cache, info
from tests.support.virtual_time import virtual

QUICK = KvPublishConfig(kv_events_batch_ms=0.0)


def a_publisher(config: KvPublishConfig = QUICK, **how: Any) -> KvPublisher:
    publisher = KvPublisher(Cache(), 7, config)  # type: ignore[arg-type]
    publisher.begin(info(**how))
    return publisher


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({"not": "one"}, "no subscription"),
        (["1", 2, 3], "no subscription"),
        ([0, 0, 0], "version"),
    ],
)
@virtual
async def test_what_is_no_subscription_is_refused(request_: Any, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        await anext(a_publisher().serve(request_, Context("c")))


@virtual
async def test_without_events_there_is_no_endpoint():
    silent = KvPublisher(Cache(), 7, KvPublishConfig(publish_kv_events=False))  # type: ignore[arg-type]
    assert silent.begin(info()) is None
    silent.take([BlockStored((1,), None, (), 4)])
    silent.compare()
    with pytest.raises(InvalidRequest, match="tells nothing"):
        await anext(silent.serve(Subscribe(), Context("c")))


@virtual
async def test_figures_are_shown():
    publisher = a_publisher()
    calls = Calls({"namespace": "n", "component": "c", "instance_id": "i"})
    gauges = KvGauges(calls, publisher)
    publisher.take([BlockStored((1, 2), None, (), 4), BlockStored((3,), None, (), 4, medium="EXTERNAL")])
    messages = publisher.serve([1, 0, 0], Context("c"))
    await anext(messages)
    for _ in range(2):
        gauges.refresh()
    text = calls.registry.render().decode()
    await messages.aclose()
    gauges.refresh()

    def shown(name: str, text: str, *labels: str) -> list[float]:
        lines = [line for line in text.splitlines() if line.startswith(name) and all(x in line for x in labels)]
        return [float(line.rsplit(" ", 1)[1]) for line in lines]

    assert shown("holdfast_worker_kv_cached_blocks{", text) == [2]
    assert shown("holdfast_worker_kv_event_batches_total{", text) == [1]
    assert shown("holdfast_worker_kv_event_subscribers{", text) == [1]
    assert shown("holdfast_worker_kv_events_total{", text, 'status="not_indexed"') == [1]
    assert shown("holdfast_worker_kv_event_subscribers{", calls.registry.render().decode()) == [0]
