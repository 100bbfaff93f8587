"""Bodies are read within their limits, and what was counted is given back."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.base.errors import Cancelled, CapacityExhausted, PayloadTooLarge
from holdfast.frontend import body as module
from holdfast.frontend.body import Bodies, LargeBody, Receive


def receive(*parts: bytes | None) -> Receive:
    """Return an ASGI receive of these parts; None: the client leaves."""
    left = list(parts)

    async def receive() -> Any:
        part = left.pop(0)
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": bool(left)}

    return receive


async def test_one_part_costs_nothing() -> None:
    bodies = Bodies(10)
    assert await bodies.read(receive(b"0123456789"), None) == b"0123456789"
    assert bodies.held == 0


async def test_parts_are_counted_until_released() -> None:
    bodies = Bodies(10)
    body = await bodies.read(receive(b"01", b"", b"234"), 5)
    assert isinstance(body, LargeBody)
    assert bodies.held == body.size == 5
    assert body.join() == b"01234"
    bodies.release(body)
    bodies.release(body)
    assert bodies.held == 0


@pytest.mark.parametrize(
    ("parts", "declared", "error"),
    [
        ((b"0" * 11,), None, PayloadTooLarge),
        ((b"0" * 6, b"0" * 5), None, PayloadTooLarge),
        ((), 11, PayloadTooLarge),
        ((None,), None, Cancelled),
        ((b"0", None), None, Cancelled),
        ((b"0", b"0", None), 10, Cancelled),
    ],
)
async def test_refused_bodies_are_given_back(parts: tuple[Any, ...], declared: int | None, error: type) -> None:
    bodies = Bodies(10)
    with pytest.raises(error):
        await bodies.read(receive(*parts), declared)
    assert bodies.held == 0


async def test_all_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ALL_BODIES_BYTES", 25)
    bodies = Bodies(10)
    held = [await bodies.read(receive(b"01234", b"56789"), None) for _ in range(2)]
    with pytest.raises(CapacityExhausted) as caught:
        await bodies.read(receive(b"01234", b"56789"), None)
    assert caught.value.retry_after
    assert caught.value.details["measured"] == 30
    assert bodies.held == 20
    for body in held:
        bodies.release(body)
    assert bodies.held == 0
