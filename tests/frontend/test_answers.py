"""What clients get."""

from __future__ import annotations

import pytest

from tests.frontend.support import CHAT, Stack, chat

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_chat(one: Stack) -> None:
    got = await one.post(CHAT, chat("[[mock:say hello]]"))
    assert got.status_code == 200, got.text
    assert got.json()["choices"][0]["message"]["content"] == "hello"
