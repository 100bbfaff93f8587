"""What a request asked for survives a migration: choices, stop strings, structure, tools, log probabilities, usage."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema
import pytest

from holdfast.engines.mock.checker import text_of
from holdfast.engines.mock.vocabulary import vocabulary
from tests.e2e.asking import exact, streaming, whole
from tests.e2e.support import Cluster
from tests.e2e.truth import Answer, Ask, check

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 4},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SLOW = "[[mock:slow 8]]"


async def interrupted(mock: Cluster, body: dict[str, Any], tokens: int = 4) -> tuple[Answer, Answer]:
    """Return the answers without and with the death of the worker after so many tokens. Content must be slow."""
    async with streaming(mock, body) as live:
        undisturbed = await live.done()
    async with streaming(mock, body) as live:

        async def far_enough() -> dict[str, Any] | None:
            request = await mock.live(live.label)
            return request["streams"][0] if request and request["streams"][0]["tokens"] >= tokens else None

        stream = await mock.until(far_enough, 10, every=0.002)
        mock.kill(stream["worker"])
        disturbed = await live.done()
    assert disturbed.causes == ["disconnected"]
    assert disturbed.moves[0]["at"] >= tokens
    return undisturbed, disturbed


def same(one: Answer, other: Answer) -> None:
    """Assert that two answers are equal in everything that a client may rely on."""
    assert other.text == one.text
    assert other.finish == one.finish
    assert other.calls == one.calls
    assert other.logprobs == one.logprobs
    assert other.usage.model_dump(exclude={"prompt_tokens_details"}) == one.usage.model_dump(
        exclude={"prompt_tokens_details"}
    )


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completions"])
async def test_choices_move_alone(mock: Cluster, chat: bool) -> None:
    ask = Ask(content="several", n=4, max_tokens=90, chat=chat)
    async with streaming(mock, ask) as live:
        await live.until_pieces(80)
        mock.kill(live.answer.worker)
        answer = await live.done()
    check(ask, answer)
    attempts = sorted(extension["attempts"] for extension in answer.holdfast.values())
    assert attempts == [1, 1, 2, 2], "two workers, four choices in turn: half of them move"


async def test_choices_of_a_whole_answer(mock: Cluster) -> None:
    answer = await whole(mock, Ask(content="[[mock:crash-after 12]] several", n=3))
    assert answer.moves


@pytest.mark.parametrize("stop_at", [20, 33, 61])
async def test_stop_string_across_every_split(mock: Cluster, stop_at: int) -> None:
    """The stream is cut before every token in and around the stop string; the string is found all the same."""

    def ask(cut: int) -> Ask:
        content = f"[[mock:abort-after {cut}]] stop somewhere"
        text, _, _ = Ask(content=content).expected()
        return Ask(content=content, stop=("never in it", text[stop_at : stop_at + 24]))

    counts = [ask(cut).expected()[2] for cut in range(1, 26)]
    answers = await asyncio.gather(*(exact(mock, ask(cut)) for cut in range(1, 26)))
    moved = sum(bool(answer.moves) for answer in answers)
    assert moved == sum(cut < count for cut, count in zip(range(1, 26), counts, strict=True))
    assert moved > 0


@pytest.mark.parametrize("split", [1, 2, 3])
async def test_stop_string_across_a_death(mock: Cluster, split: int) -> None:
    """The same with the death of the process inside of the stop string, streaming and not."""
    said = "the quick brown fox STOP HERE AND NOW over the lazy dog"
    plain = Ask(content=f"[[mock:say {said}]] say it", stop=("STOP HERE AND NOW",))
    first = next(i for i in range(1, 40) if "STOP" in _said(said, i))
    ask = Ask(content=f"[[mock:crash-after {first + split - 1}]]{plain.content}", stop=plain.stop)
    for how in (exact, whole):
        answer = await how(mock, ask)
        assert answer.text == {0: "the quick brown fox "}
        assert answer.causes == ["disconnected"]
        await mock.usable()


def _said(text: str, tokens: int) -> str:
    return text_of(vocabulary().encode(text)[:tokens])


async def test_json_mode(mock: Cluster) -> None:
    body = {"messages": [{"role": "user", "content": f"{SLOW} an object"}], "max_tokens": 200, "seed": 3}
    undisturbed, disturbed = await interrupted(mock, {**body, "response_format": {"type": "json_object"}})
    same(undisturbed, disturbed)
    assert isinstance(json.loads(disturbed.text[0]), dict)


async def test_json_schema(mock: Cluster) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    body = {"messages": [{"role": "user", "content": f"{SLOW} a person"}], "max_tokens": 300, "seed": 3}
    undisturbed, disturbed = await interrupted(mock, {**body, "response_format": form}, tokens=8)
    same(undisturbed, disturbed)
    jsonschema.validate(json.loads(disturbed.text[0]), SCHEMA)


async def test_tool_call(mock: Cluster) -> None:
    content = f'{SLOW}[[mock:call weather {{"city": "Old Harbour"}}]] how is it outside?'
    body = {"messages": [{"role": "user", "content": content}], "tools": [WEATHER], "max_tokens": 200}
    undisturbed, disturbed = await interrupted(mock, body, tokens=9)
    same(undisturbed, disturbed)
    assert disturbed.finish == {0: ["tool_calls"]}
    assert [(name, json.loads(arguments)) for name, arguments in disturbed.calls[0]] == [
        ("weather", {"city": "Old Harbour"})
    ]


async def test_forced_tool_call(mock: Cluster) -> None:
    body = {
        "messages": [{"role": "user", "content": f"{SLOW} how is it outside?"}],
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "max_tokens": 200,
        "seed": 3,
    }
    undisturbed, disturbed = await interrupted(mock, body, tokens=6)
    same(undisturbed, disturbed)
    assert disturbed.calls[0][0][0] == "weather"
    assert "city" in json.loads(disturbed.calls[0][0][1])


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completions"])
async def test_logprobs(mock: Cluster, chat: bool) -> None:
    wish = {"logprobs": True, "top_logprobs": 3} if chat else {"logprobs": 3}
    ask = Ask(content=f"{SLOW} likely", max_tokens=20, chat=chat, more=wish)
    async with streaming(mock, ask) as live:
        undisturbed = await live.done()
    async with streaming(mock, ask) as live:
        await live.until_pieces(7)
        mock.kill(live.answer.worker)
        disturbed = await live.done()
    check(ask, disturbed)
    assert disturbed.causes == ["disconnected"]
    same(undisturbed, disturbed)
    entries = disturbed.logprobs[0]
    tokens = [e.token for e in entries] if chat else [t for e in entries for t in e.tokens]
    assert len(tokens) == 20
    assert "".join(tokens) == disturbed.text[0]


async def test_penalties_min_tokens_and_truncation(mock: Cluster) -> None:
    more = {
        "presence_penalty": 0.5,
        "frequency_penalty": -0.25,
        "repetition_penalty": 1.3,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "min_tokens": 30,
    }
    ask = Ask(content="[[mock:crash-after 17]][[mock:eos-after 10]] penalised", more=more, seed=-7)
    answer = await exact(mock, ask)
    assert answer.finish == {0: ["stop"]}, "the end of sequence that was due at 10 came at 30"
    assert answer.moves


async def test_end_of_sequence_after_a_move(mock: Cluster) -> None:
    answer = await exact(mock, Ask(content="[[mock:crash-after 17]][[mock:eos-after 21]] short"))
    assert answer.finish == {0: ["stop"]}


async def test_a_seed_is_drawn_when_the_client_brings_none(mock: Cluster) -> None:
    """Without a seed the answer is random, yet its parts fit: the move is declared exact and nothing is repeated."""
    body = {"messages": [{"role": "user", "content": "any"}], "max_tokens": 60, "temperature": 1.0}
    async with streaming(mock, body) as live:
        await live.until_pieces(20)
        mock.kill(live.answer.worker)
        answer = await live.done()
    assert answer.holdfast[0]["join"] == "exact"
    assert answer.usage.completion_tokens == 60
