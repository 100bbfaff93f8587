"""Router mode kv through HTTP: requests with a common prefix meet, say so when asked, and are counted and explained."""

from __future__ import annotations

from typing import Any

from tests.frontend.support import events_of, stack, until


def body(words: int, **more: Any) -> dict[str, Any]:
    prompt = [1000 + number % 500 for number in range(words)]
    return {"model": "mock", "prompt": prompt, "max_tokens": 4, "ignore_eos": True, **more}


async def test_a_prefix_is_found_again_told_counted_and_explained() -> None:
    async with stack(3, router_mode="kv") as built:
        asked = {"nvext": {"extra_fields": ["worker_id"]}}
        first = (await built.post("/v1/completions", body(320, **asked))).json()["nvext"]["worker_id"]
        for length in (330, 400, 480):
            answer = await built.post("/v1/completions", body(length, **asked), x_request_id=f"l{length}")
            told = answer.json()["nvext"]["worker_id"]
            assert told["decode_worker_id"] == first["decode_worker_id"]
            assert told["overlap_blocks"] >= 20
        streamed = await built.post("/v1/completions", body(330, stream=True, **asked))
        assert events_of(streamed.content)[-2]["nvext"]["worker_id"]["decode_worker_id"] == first["decode_worker_id"]
        plain = (await built.post("/v1/completions", body(330))).json()
        assert "nvext" not in plain
        await built.at_rest()
        assert built.count("dynamo_component_router_requests_total", model="mock") == 6
        assert built.count("dynamo_component_router_kv_hit_rate_count") == 6
        assert built.count("dynamo_component_router_kv_selected_cached_prefix_tokens_total") >= 4 * 320
        assert built.count("dynamo_router_overhead_total_ms_count") == 6
        story = (await built.http.get("/debug/requests/l400")).json()
        chosen = next(one for one in story["choices"][0]["attempts"][0]["considered"] if one["chosen"])
        assert chosen["worker"] == first["decode_worker_id"]
        assert chosen["overlap_blocks"] >= 20
        assert chosen["score"] > 0


async def test_a_wrong_override_is_the_clients_mistake() -> None:
    async with stack(1, router_mode="kv") as built:
        answer = await built.post("/v1/completions", body(40, nvext={"router": {"router_temperature": "hot"}}))
        assert answer.status_code == 400
        assert "nvext.router.router_temperature" in answer.json()["error"]["message"]
        fine = await built.post(
            "/v1/completions",
            body(
                40, nvext={"router": {"router_config_override": {"overlap_score_weight": 2, "router_temperature": 0.5}}}
            ),
        )
        assert fine.status_code == 200


async def test_direct_takes_the_header() -> None:
    async with stack(2, router_mode="direct") as built:
        name = built.pool.all_workers()[1].instance
        for _ in range(2):
            answer = await built.post("/v1/completions", body(40), x_worker_instance_id=name)
            assert answer.headers["x-holdfast-worker"] == name
        nobody = await built.post("/v1/completions", body(40))
        assert nobody.status_code == 400
        assert "x-worker-instance-id" in nobody.json()["error"]["message"]


async def test_prefixes_of_an_adapter_are_found_again_and_never_those_of_its_base() -> None:
    async with stack(2, router_mode="kv") as built:
        for process, _ in built.workers.values():
            assert process.adapters is not None
            await process.adapters.load("shy", "")
        await built.served("shy")
        await until(lambda: len(built.pool.usable("shy")) == 2)
        asked = {"nvext": {"extra_fields": ["worker_id"]}}

        async def overlap(model: str, length: int) -> int:
            got = await built.post("/v1/completions", body(length, **asked) | {"model": model})
            return int(got.json()["nvext"]["worker_id"]["overlap_blocks"])

        assert await overlap("mock", 320) == 0
        assert await overlap("mock", 330) >= 20
        assert await overlap("shy", 330) == 0, "the base model's blocks are not its own"
        assert await overlap("shy", 340) >= 20
        assert await overlap("mock", 340) >= 20
