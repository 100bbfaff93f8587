"""`holdfast replay` as a process of its own, against a real frontend and real workers."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import xml.dom.minidom
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.support import Cluster, cluster
from tests.patience import within

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

FAST = ("--engine", "mock", "--mock-profile", "reference", "--mock-speedup-ratio", "50")
PROMPTS = 6
REPEATS = 5
LENGTH = 1500
"""Two whole blocks of the trace and a part of a third; 23 whole blocks of the engine."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def profiled(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Two workers that are fifty times as fast as the reference's mock engine."""
    async with cluster(tmp_path_factory.mktemp("replay"), engine=FAST) as running:
        yield running


def write_trace(path: Path, *, repeats: int = REPEATS, output: int = 8, gap_ms: int = 10) -> Path:
    lines = [
        {
            "timestamp": gap_ms * (PROMPTS * again + number),
            "input_length": LENGTH,
            "output_length": output,
            "hash_ids": [0, 2 * number + 1, 2 * number + 2],
        }
        for again in range(repeats)
        for number in range(PROMPTS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


async def replayed(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "holdfast", "replay", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def finished(process: asyncio.subprocess.Process, code: int = 0) -> tuple[str, str]:
    async with asyncio.timeout(within(60.0)):
        out, err = await process.communicate()
    assert process.returncode == code, (process.returncode, out.decode(), err.decode())
    return out.decode(), err.decode()


async def report_of(*arguments: str) -> dict[str, Any]:
    out, _ = await finished(await replayed(*arguments, "--json", "-"))
    return dict(json.loads(out))


@pytest.mark.parametrize("pace", [("--concurrency", "4"), ("--speedup", "2"), ("--rate", "60")])
async def test_a_trace_is_answered_in_full(profiled: Cluster, tmp_path: Path, pace: tuple[str, str]) -> None:
    trace = write_trace(tmp_path / "trace.jsonl")
    report = await report_of(str(trace), "--url", profiled.url, "--salt", pace[0], *pace)
    count = PROMPTS * REPEATS
    assert (report["requests"], report["ok"], report["errors"]) == (count, count, {})
    assert report["output_tokens"] == count * 8
    assert report["input_tokens"] == count * LENGTH
    assert {line["worker"] for line in report["workers"]} == set(await profiled.instances())
    # each worker computes each prompt at most once, the shared block at most once more for each of them
    assert report["cached_tokens"] >= (count - 2 * PROMPTS - 8) * (LENGTH // 64 * 64)
    assert report["time_to_first_token"]["count"] == count
    if pace[0] != "--concurrency":
        assert report["seconds"] >= 0.1


async def test_the_picture_and_the_table(profiled: Cluster, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl")
    plot, saved = tmp_path / "run.svg", tmp_path / "run.json"
    process = await replayed(
        str(trace), "--url", profiled.url, "--concurrency", "3", "--limit", "12", "--max-output", "3",
        "--plot", str(plot), "--json", str(saved), "--title", "the run",
    )  # fmt: skip
    out, _ = await finished(process)
    for word in ("the run", "3 at once", "12 / 0 / 0", "time to first token"):
        assert word in out
    xml.dom.minidom.parseString(plot.read_text())
    assert json.loads(saved.read_text())["output_tokens"] == 36


async def test_an_interrupted_run_reports_what_there_is(profiled: Cluster, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", repeats=200, gap_ms=50)
    before = await profiled.metric("dynamo_frontend_requests_total")
    process = await replayed(str(trace), "--url", profiled.url, "--salt", "interrupted", "--json", "-")

    async def some_answered() -> bool:
        return await profiled.metric("dynamo_frontend_requests_total") > before + 5

    await profiled.until(some_answered, within(30.0))
    process.send_signal(signal.SIGINT)
    out, _ = await finished(process, 130)
    report = json.loads(out)
    assert 0 < report["ok"] < PROMPTS * 200


async def test_what_cannot_work_says_why(profiled: Cluster, tmp_path: Path) -> None:
    trace = tmp_path / "bad.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}\n')
    _, err = await finished(await replayed(str(trace), "--url", profiled.url), 78)
    assert "bad.jsonl, line 1: input_length 600 needs 2 hash_ids" in err
    _, err = await finished(await replayed(str(trace), "--url", "http://127.0.0.1:9"), 1)
    assert "Nobody answers at 127.0.0.1:9" in err
    _, err = await finished(await replayed(str(trace)), 78)
    assert "bad.jsonl, line 1" in err, "simulated as well"
    _, err = await finished(await replayed(str(trace), "--url", profiled.url, "--router", "random"), 78)
    assert "--router is for simulated clusters" in err
    _, err = await finished(await replayed(str(trace), "--url", profiled.url, "--concurrency", "4,8"), 78)
    assert "--concurrency 4,8: expected a number" in err
    _, err = await finished(await replayed(str(trace), "--router", "psychic"), 78)
    assert "there is no 'psychic', but round-robin" in err
