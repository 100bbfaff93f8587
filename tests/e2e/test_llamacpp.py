"""The same promises with the embedded engine and its real weights: text byte-equal to the undisturbed run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import pytest
import pytest_asyncio

from tests.e2e.asking import Live, streaming
from tests.e2e.support import LLAMA, Cluster, cluster
from tests.e2e.test_shapes import SCHEMA, same
from tests.e2e.truth import Answer
from tests.patience import within

pytestmark = [pytest.mark.e2e, pytest.mark.llamacpp, pytest.mark.asyncio(loop_scope="module")]

PROMPT = "Write a short story about a lighthouse keeper and the storm."
GREEDY = {"temperature": 0.0}
SAMPLED = {
    "temperature": 0.9,
    "top_p": 0.95,
    "seed": 42,
    "presence_penalty": 0.6,
    "frequency_penalty": 0.4,
    "extra_body": {"top_k": 40, "min_p": 0.02, "repetition_penalty": 1.1},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Two workers with the embedded model and a grace of a third of a second."""
    env = {"DYN_WORKER_SHUTDOWN_INFLIGHT_TIMEOUT_SECS": "0.3"}
    async with cluster(tmp_path_factory.mktemp("llamacpp"), engine=LLAMA, env=env) as running:
        yield running


def chat(content: str = PROMPT, tokens: int = 48, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, **more}


async def undisturbed(mock: Cluster, body: dict[str, Any], **how: Any) -> Answer:
    async with streaming(mock, body, **how) as live:
        return await live.done()


async def killed(mock: Cluster, body: dict[str, Any], pieces: int, **how: Any) -> Answer:
    """Return the answer of a stream whose worker dies after so many pieces of text."""
    async with streaming(mock, body, **how) as live:
        await live.until_pieces(pieces)
        mock.kill(live.answer.worker)
        answer = await live.done()
    assert set(answer.causes) == {"disconnected"}
    assert all(extension["join"] in ("exact", "none") for extension in answer.holdfast.values())
    return answer


@pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("is_chat", [True, False], ids=["chat", "completions"])
async def test_killed_in_mid_stream(mock: Cluster, how: dict[str, Any], is_chat: bool) -> None:
    body = {**chat(), **how} if is_chat else {"prompt": "The storm came", "max_tokens": 48, **how}
    same(await undisturbed(mock, body, chat=is_chat), await killed(mock, body, 12, chat=is_chat))


async def test_killed_before_the_first_token(mock: Cluster) -> None:
    """A prompt that nobody has seen, so that no cache makes its prefill short."""
    body = {**chat("word " * 700 + PROMPT, 12), **SAMPLED}
    async with streaming(mock, body) as live:
        await live.until_open()
        mock.kill(live.answer.worker)
        answer = await live.done()
    assert answer.causes == ["disconnected"]
    same(await undisturbed(mock, body), answer)


async def test_killed_before_accept(mock: Cluster) -> None:
    body = {**chat(tokens=16), **SAMPLED}
    expected = await undisturbed(mock, body)
    victim = next(iter(await mock.instances()))
    async with mock.frozen(victim), streaming(mock, body) as one, streaming(mock, body) as two:

        async def dispatched() -> bool:
            streams = [r["streams"][0] for x in (one, two) if (r := await mock.live(x.label))]
            return any(s["worker"] == victim and s["state"] == "dispatched" for s in streams)

        await mock.until(dispatched, 5, every=0.001)
        mock.kill(victim)
        for live in (one, two):
            same(expected, await live.done())


async def test_choices(mock: Cluster) -> None:
    body = {**chat(tokens=40), **SAMPLED, "n": 3}
    expected = await undisturbed(mock, body)
    assert len(set(expected.text.values())) == 3
    same(expected, await killed(mock, body, 30))


async def test_logprobs(mock: Cluster) -> None:
    body = {**chat(tokens=24), **SAMPLED, "logprobs": True, "top_logprobs": 4}
    same(await undisturbed(mock, body), await killed(mock, body, 8))


async def test_json_schema(mock: Cluster) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    body = {**chat("Describe a person as JSON.", 200), **SAMPLED, "response_format": form}
    expected = await undisturbed(mock, body)
    answer = await killed(mock, body, 5)
    same(expected, answer)
    if answer.finish[0] == ["stop"]:
        jsonschema.validate(json.loads(answer.text[0]), SCHEMA)


async def test_stop_string_across_the_death(mock: Cluster) -> None:
    body = {**chat(tokens=32), **SAMPLED}
    text = (await undisturbed(mock, body)).text[0]
    middle = len(text) // 2
    stop = text[middle : middle + 15]
    if text.find(stop) != middle:
        pytest.skip("the model repeats itself just there")
    body["stop"] = [stop]
    before = len((await undisturbed(mock, body)).times)
    for pieces in (max(1, before - 2), before):
        answer = await killed_if_it_lasts(mock, body, pieces)
        assert answer.text[0] == text[:middle]
        assert answer.finish == {0: ["stop"]}
        await mock.usable()


async def killed_if_it_lasts(mock: Cluster, body: dict[str, Any], pieces: int) -> Answer:
    async with streaming(mock, body) as live:
        await live.until_pieces(pieces)
        mock.kill(live.answer.worker)
        return await live.done()


async def test_frozen_worker(mock: Cluster) -> None:
    body = {**chat(tokens=120), **SAMPLED, "extra_body": {**SAMPLED["extra_body"], "ignore_eos": True}}
    expected = await undisturbed(mock, body)
    async with streaming(mock, body) as live:
        await live.until_pieces(10)
        async with mock.frozen(live.answer.worker):
            answer = await live.done()
    same(expected, answer)
    assert answer.causes == ["peer_silent"]
    assert answer.gap < within(3.0)


async def test_sigterm_with_long_streams(mock: Cluster) -> None:
    body = {**chat(tokens=90), **SAMPLED, "extra_body": {**SAMPLED["extra_body"], "ignore_eos": True}}
    expected = await undisturbed(mock, body)
    async with contextlib.AsyncExitStack() as stack:
        lives: list[Live] = [await stack.enter_async_context(streaming(mock, body)) for _ in range(3)]
        for live in lives:
            await live.until_pieces(3)
        mock.kill(lives[0].answer.worker, signal.SIGTERM)
        answers = [await live.done() for live in lives]
    for answer in answers:
        same(expected, answer)
    assert {cause for answer in answers for cause in answer.causes} == {"worker_draining"}


async def test_cancel_stops_the_engine(mock: Cluster) -> None:
    """In mid-stream, during prefill and without streaming."""
    long = chat("word " * 1500, 300)
    for body, pieces in ((chat(tokens=400), 3), (long, 0)):
        async with streaming(mock, body) as live:
            await live.until_open()
            await live.until_pieces(pieces)
            async with mock.peer(live.answer.worker) as peer:
                await live.leave()
                await peer.idle(5.0)
                assert (await peer.pong()).progress.tokens_after_cancel <= 1
    task = asyncio.ensure_future(mock.client.chat.completions.create(model=mock.model, **chat(tokens=400)))

    async def busy() -> bool:
        return (await mock.leases())["attempt"] == 1

    await mock.until(busy, 5)
    task.cancel()
    await asyncio.wait([task])
    await mock.at_rest(5.0)


async def test_only_one_worker_left_and_it_comes_back(mock: Cluster) -> None:
    """Both are killed at once: the stream waits for a replacement, which has to load the model first."""
    body = {**chat(tokens=60), **SAMPLED}
    expected = await undisturbed(mock, body)
    async with streaming(mock, body) as live:
        await live.until_pieces(10)
        for instance in await mock.instances():
            mock.kill(instance)
        answer = await live.done()
    same(expected, answer)
