"""A request that names its prefill worker, over HTTP: an unknown one is an error before any work."""

from __future__ import annotations

import pytest

from tests.frontend.support import chat, stack


@pytest.mark.parametrize("how", ["header", "body", "number"])
async def test_an_unknown_prefill_worker_is_answered_with_what_is_wrong(how: str) -> None:
    async with stack(1) as built:
        headers = {"x_prefill_instance_id": "p9"} if how == "header" else {}
        more = {"body": {"nvext": {"prefill_worker_id": "p9"}}, "number": {"nvext": {"prefill_worker_id": 10}}}
        refused = await built.post("/v1/chat/completions", chat("hello", **more.get(how, {})), **headers)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        error = refused.json()["error"]
        assert error["code"] == "no_workers"
        name = "000000000000000a" if how == "number" else "p9"
        assert f"Prefill worker {name}, which the request names" in error["message"]
        (worker, _) = next(iter(built.workers.values()))
        assert worker.host.in_flight == 0
        assert (await built.post("/v1/chat/completions", chat("hello"))).status_code == 200
