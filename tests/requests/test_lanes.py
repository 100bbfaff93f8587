"""Policy classes in front of full workers: lanes beside each other, shares, limits, thresholds, promises; no leaks."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from holdfast.base.errors import CapacityExhausted
from holdfast.routing.config import AdmissionSettings
from holdfast.routing.route import Route
from holdfast.routing.router_config import RouterSettings
from holdfast.wire.frames import Load, Pong, Progress
from tests.requests.fakes import Client, Fleet, settle
from tests.support.virtual_time import virtual

PROMPT = 4


def classes(tmp_path: Path, **by_name: dict[str, Any]) -> str:
    """A file with one class for each family."""
    content = {
        "default_policy_family": next(iter(by_name)),
        "uncached_isl_buckets": [{"min_tokens": 0, "bucket": "all"}],
        "policy_classes": [
            {"name": f"{name}_all", "policy_family": name, "cache_bucket": "all", "quantum": PROMPT, **more}
            for name, more in by_name.items()
        ],
    }
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(content))
    return str(path)


def fleet(path: str, workers: int = 1, **admission: Any) -> Fleet:
    wanted = {"admission": AdmissionSettings(**admission), "router": RouterSettings(router_policy_config=path)}
    return Fleet(workers, settings=wanted)


def come(up: Fleet, family: str, prompt: int = PROMPT) -> Client:
    return up.start(prompt=list(range(prompt)), route=Route(policy_class=family))


async def serve(up: Fleet) -> None:
    """Finish the request that a worker has."""
    stream = next(s for s in up.attempts if not s.over)
    if not stream.accepted:
        stream.accept()
    stream.emit(10).end("length")
    await settle()


@virtual
async def test_classes_share_room_by_their_quanta(tmp_path: Path) -> None:
    busy = {"prefill_busy_threshold": 0}
    up = fleet(classes(tmp_path, chat={**busy, "quantum": 3 * PROMPT}, batch=busy))
    first = come(up, "batch")
    await settle()
    waiting = [("batch", come(up, "batch")) for _ in range(12)] + [("chat", come(up, "chat")) for _ in range(12)]
    await settle()
    assert len(up.attempts) == 1
    served: list[str] = []
    for _ in range(24):
        before = {id(client) for _, client in waiting if client.sink.endings}
        await serve(up)
        served += [name for name, client in waiting if client.sink.endings and id(client) not in before]
    assert first.sink.endings
    assert 8 <= served[:12].count("chat") <= 10, "three of four, though the others came first"
    await serve(up)
    assert all(client.sink.endings for _, client in waiting)
    assert up.leases() == {}


@virtual
async def test_each_class_has_its_own_threshold_and_none_stands_behind_another(tmp_path: Path) -> None:
    up = fleet(classes(tmp_path, urgent={"prefill_busy_threshold": 100}, batch={"prefill_busy_threshold": 0}))
    come(up, "batch")
    await settle()
    behind = come(up, "batch")
    await settle()
    assert len(up.attempts) == 1
    come(up, "urgent")
    await settle()
    assert len(up.attempts) == 2, "its workers are not busy for it"
    assert not behind.sink.endings
    for stream in up.attempts:
        stream.accept().emit(10).end("length")
    await settle()
    assert len(up.attempts) == 3
    await serve(up)
    assert up.leases() == {}


@virtual
@pytest.mark.parametrize(
    ("limit", "bound"),
    [
        ("request_queue_limit_per_worker", 2),
        ("raw_isl_token_queue_limit_per_worker", 2 * PROMPT),
    ],
)
async def test_a_class_that_is_full_turns_its_own_away_and_no_others(tmp_path: Path, limit: str, bound: int) -> None:
    """Two workers: the limit of each counts twice, and one that crosses it is let in."""
    small = {"prefill_busy_threshold": 0, limit: bound // 2}
    up = fleet(classes(tmp_path, batch=small, chat={"prefill_busy_threshold": 0}), workers=2)
    for _ in range(2):
        come(up, "batch")
    await settle()
    waiting = [come(up, "batch") for _ in range(2)]
    await settle()
    assert not any(client.sink.endings for client in waiting)
    turned_away = come(up, "batch")
    other = come(up, "chat")
    await settle()
    error = turned_away.ending.error
    assert isinstance(error, CapacityExhausted)
    assert (error.details["knob"], error.details["threshold"]) == (limit, bound)
    assert error.details["policy_class"] == "batch_all"
    assert "batch_all" in error.message
    assert not other.sink.endings
    for _ in range(6):
        if any(not stream.over for stream in up.attempts):
            await serve(up)
    assert up.leases() == {}
    again = [come(up, "batch") for _ in range(4)]
    await settle()
    assert not any(client.sink.endings for client in again), "who has left counts no more"


@virtual
async def test_who_gives_up_or_is_overdue_leaves_nothing_behind(tmp_path: Path) -> None:
    path = classes(tmp_path, batch={"prefill_busy_threshold": 0, "request_queue_limit_per_worker": 1})
    up = fleet(path, admission_queue_timeout=5.0)
    come(up, "batch")
    await settle()
    up.attempts[0].accept()
    for _ in range(3):
        late = come(up, "batch")
        await asyncio.sleep(5.2)
        assert isinstance(late.ending.error, CapacityExhausted)
        assert late.ending.error.details["knob"] == "DYN_ADMISSION_QUEUE_TIMEOUT_SECS"
    assert up.services.placement.line.waiting("m") == 0
    assert up.services.placement.line.models() == []


@virtual
async def test_a_stream_that_moves_goes_before_all_classes(tmp_path: Path) -> None:
    up = fleet(classes(tmp_path, batch={"prefill_busy_threshold": 0}), workers=2, active_prefill_tokens_threshold=0)
    moving = come(up, "batch")
    await settle()
    up.attempts[0].accept().emit(2)
    other = come(up, "batch")
    await settle()
    up.attempts[1].accept()
    first = up.attempts[0].worker
    first.pong = Pong(1, Progress(), Load(kv_total_blocks=100, prefill_tokens=50), len(first.opened))
    up.tell("pong", first)
    waiting = come(up, "batch")
    await settle()
    assert len(up.attempts) == 2
    first.die()
    await settle()
    await asyncio.sleep(0.5)
    assert len(up.attempts) == 2
    up.attempts[1].emit(10).end("length")
    await settle()
    assert other.sink.endings
    assert len(up.attempts) == 3
    assert up.attempts[2].request.generated_ids, "the one that was served already"
    assert not waiting.sink.endings
    assert not moving.sink.endings
