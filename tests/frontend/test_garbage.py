"""A finished request leaves nothing to the garbage collector: what only it can find costs more than it took to make."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest

from tests.frontend.support import CHAT, TEXT, Stack, chat, text

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(stream=True)),
        (CHAT, chat()),
        (CHAT, chat(n=2, stream=True)),
        (CHAT, chat(stop=["zzz"], stream=True)),
        (TEXT, text(stream=True, stream_options={"include_usage": True})),
        (TEXT, text(n=2)),
    ],
    ids=["chat-streamed", "chat-whole", "chat-two", "chat-stop", "text-streamed", "text-two"],
)
async def test_a_finished_request_leaves_no_cycles(one: Stack, path: str, body: dict[str, Any]) -> None:
    assert (await one.post(path, body)).status_code == 200
    await one.at_rest()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(5):
            assert (await one.post(path, body)).status_code == 200
        await one.at_rest()
        gc.collect()
        left = Counter(type(found).__qualname__ for found in gc.garbage if _ours(found))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left


def _ours(found: object) -> bool:
    """Say whether it belongs to the frontend; the engine and the client run in this process too."""
    rooms = ("holdfast.frontend", "holdfast.requests", "holdfast.text", "holdfast.openai", "jinja2")
    return type(found).__module__.startswith(rooms)
