"""Signs of life while a client waits: comments in event streams, and none in an answer that is one JSON body."""

from __future__ import annotations

import pytest

from tests.frontend.support import CHAT, chat, stack

pytestmark = pytest.mark.asyncio(loop_scope="module")

SLOW = "[[mock:prefill 0.4]] [[mock:say late]]"
"""Four intervals of silence, then one word."""


async def test_a_silent_stream_gets_comments() -> None:
    async with stack(http_sse_keep_alive_interval_ms=100) as one:
        got = await one.post(CHAT, chat(SLOW, stream=True))
        assert got.status_code == 200
        assert got.text.count(": keep-alive\n\n") >= 2
        assert '"content":"late"' in got.text


async def test_a_whole_answer_that_takes_longer_than_the_interval_is_only_json() -> None:
    async with stack(http_sse_keep_alive_interval_ms=100) as one:
        got = await one.post(CHAT, chat(SLOW))
        assert got.status_code == 200, got.text
        assert got.json()["choices"][0]["message"]["content"] == "late"


async def test_a_late_error_of_a_whole_answer_keeps_its_status() -> None:
    async with stack(http_sse_keep_alive_interval_ms=100) as one:
        got = await one.post(CHAT, chat(SLOW), x_holdfast_timeout_ms="300")
        assert got.status_code == 504, got.text
        assert got.json()["error"]["code"] == "deadline_exceeded"
