"""What clients say and are told is in no log line, no metric and no story, unless somebody has asked for it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest

from holdfast.engines.mock.config import MockConfig
from holdfast.telemetry.content import CHARACTERS, CONTENT, shown
from holdfast.telemetry.logs import BackgroundHandler, JsonLines, LineWriter, LogConfig, Readable, setup_logging
from tests.frontend.support import CHAT, TEXT, Stack, chat, stack, text

SECRET = "harbourmaster"


class Kept(logging.Handler):
    """Formats every line as it would be written, where the request's ids are known."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.formats = (JsonLines("frontend"), Readable("frontend"))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += [one.format(record) for one in self.formats]


@pytest.fixture
def kept() -> Iterator[Kept]:
    """Every line of Holdfast, down to debug."""
    handler, logger = Kept(), logging.getLogger("holdfast")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.setLevel(before)
    logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def _off_again() -> Iterator[None]:
    yield
    CONTENT.on = False


async def talk(built: Stack) -> list[str]:
    """Have answers, failures, moves and a client that leaves; returns what was answered."""
    asked = [
        (CHAT, chat(f"{SECRET} one", max_tokens=12)),
        (CHAT, chat(f"[[mock:abort-after 4]] {SECRET} two", max_tokens=12)),
        (TEXT, text([f"{SECRET} three", f"{SECRET} four"], n=2, max_tokens=8)),
    ]
    said = []
    for path, body in asked:
        answer = await built.post(path, body)
        assert answer.status_code == 200
        choices = answer.json()["choices"]
        said += [c["message"]["content"] if path == CHAT else c["text"] for c in choices]
    await built.post(CHAT, {**chat(SECRET), "temperature": SECRET})
    await built.post(CHAT, {**chat(SECRET), "model": "nothing"})
    await built.post(CHAT, chat(f"[[mock:error-after 2]] {SECRET}", stop=[SECRET], metadata={"x": SECRET}))
    body = chat(f"[[mock:slow 20]] {SECRET} five", stream=True, max_tokens=900)
    async with built.http.stream("POST", CHAT, json=body) as streamed:
        await anext(streamed.aiter_raw())
    await built.at_rest()
    assert len(said) == 6
    assert all(len(one.split()) > 3 for one in said), said
    return said


async def test_nothing_is_written_unless_asked_for(kept: Kept) -> None:
    async with stack(2, MockConfig(step_ms=1)) as built:
        said = await talk(built)
        pages = [
            (await built.http.get(path)).text for path in ("/metrics", "/debug/requests?failed=1", "/debug/requests")
        ]
        listed = (await built.http.get("/debug/requests?limit=50")).json()["finished"]
        pages += [(await built.http.get(f"/debug/requests/{one['id']}")).text for one in listed]
    assert len(kept.lines) > 20, "there is something to look through"
    assert len(listed) >= 4
    everything = "\n".join([*kept.lines, *pages])
    assert SECRET not in everything
    for answer in said:
        assert " ".join(answer.split()[:3]) not in everything, answer


async def test_what_is_asked_for_is_written_with_the_requests_ids(kept: Kept) -> None:
    CONTENT.on = True
    async with stack(2, MockConfig(step_ms=1)) as built:
        said = await talk(built)
    lines = [json.loads(line) for line in kept.lines if line.startswith("{")]
    told = [line for line in lines if line["message"].startswith("content of choice")]
    assert {line["answer"].strip() for line in told} >= {answer.strip() for answer in said}
    assert all(SECRET in line["prompt"] for line in told)
    assert all(len(line["x_dynamo_request_id"]) == 32 for line in told)
    assert {line["choice"] for line in told} == {0, 1, 2, 3}


async def test_a_prompt_of_ids_is_written_as_text(kept: Kept) -> None:
    CONTENT.on = True
    async with stack(1) as built:
        ids = list(built.frontend.registry.served()["mock"].text.tokenizer.encode(f"{SECRET} in ids"))
        assert (await built.post(TEXT, text(ids))).status_code == 200
    assert any(SECRET in line for line in kept.lines)


def test_the_setting_switches_it_and_warns() -> None:
    for wanted in (True, False):
        out = io.StringIO()
        writer = LineWriter(out)
        root, level = logging.getLogger(), logging.getLogger().level
        before = root.handlers[:]
        try:
            setup_logging(LogConfig(log_content=wanted), "frontend", writer)
        finally:
            for handler in [h for h in root.handlers if isinstance(h, BackgroundHandler)]:
                root.removeHandler(handler)
            root.handlers[:] = before
            root.setLevel(level)
            writer.close()
        assert wanted is CONTENT.on
        assert ("--log-content is on" in out.getvalue()) is wanted
        assert (" WARNING " in out.getvalue()) is wanted


def test_long_texts_lose_their_beginning() -> None:
    long = "a" * 100 + "b" * CHARACTERS
    assert shown(long) == f"(100 characters left out) {'b' * CHARACTERS}"
    assert shown("short") == "short"
    assert not CONTENT.on


async def test_content_never_holds_up_the_end_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that cannot say what it was given: the request is over all the same, and counted."""
    CONTENT.on = True
    async with stack(1) as built:
        tokenizer = built.frontend.registry.served()["mock"].text.tokenizer
        monkeypatch.setattr(type(tokenizer), "decode", _broken)
        assert (await built.post(CHAT, chat("x"))).status_code == 200
        await built.at_rest()
        await asyncio.sleep(0)
        assert built.count("dynamo_frontend_requests_total", status="success") == 1


def _broken(*_: object, **__: object) -> str:
    raise ValueError("no such id")
