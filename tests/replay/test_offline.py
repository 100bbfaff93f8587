"""A trace on the virtual clock: through production frontends and routers, the same every time, however it is run."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from holdfast.base.errors import InvalidRequest
from holdfast.engines.mock.config import MockConfig
from holdfast.replay.arrivals import Arrivals
from holdfast.replay.offline import Run, mode_names, run_all, run_one
from holdfast.replay.prompts import FIRST_TOKEN
from holdfast.replay.report import Report
from holdfast.replay.simulated import Settings
from holdfast.replay.trace import BadTrace
from tests.replay.whatifs import SMALL

PROMPTS = 24


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Twelve prompts of three blocks, each sent twice: all that a prefix cache could know is the second time."""
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": n * 200, "input_length": 1100, "output_length": 20 + n % 5, "hash_ids": ids(n % 12)}
        for n in range(PROMPTS)
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def ids(prompt: int) -> list[int]:
    return [prompt * 3 + block for block in range(3)]


def run(trace: Path, settings: Settings = SMALL, **changes: object) -> Run:
    plain = Run(
        title="run",
        settings=msgspec.structs.replace(settings, engine=MockConfig(profile="reference")),
        arrivals=Arrivals(concurrency=4),
        trace=trace,
        block=512,
        limit=None,
        max_output=None,
        first_token=FIRST_TOKEN,
        salt="",
        seed=1,
    )
    return msgspec.structs.replace(plain, **changes)


def with_mode(mode: str, workers: int = 3) -> Settings:
    frontend = msgspec.structs.replace(SMALL.frontend, router_mode=mode)
    return msgspec.structs.replace(SMALL, frontend=frontend, workers=workers)


def test_everything_is_answered_with_the_lengths_of_the_trace(trace: Path) -> None:
    report, seconds = run_one(run(trace))
    assert report.ok == report.requests == PROMPTS
    assert report.input_tokens == PROMPTS * 1100
    assert report.output_tokens == sum(20 + n % 5 for n in range(PROMPTS))
    assert [line.worker for line in report.workers] == ["worker-0", "worker-1", "worker-2"]
    assert seconds > 0


def test_repeats_to_the_byte_also_in_another_process(trace: Path) -> None:
    runs = [run(trace, with_mode(mode)) for mode in ("random", "least-loaded")]
    alone = [msgspec.json.encode(report) for report, _ in run_all(runs)]
    beside = [msgspec.json.encode(report) for report, _ in run_all(runs, jobs=2)]
    assert alone == beside
    assert alone[0] != msgspec.json.encode(run_one(msgspec.structs.replace(runs[0], seed=2))[0])


def test_one_worker_finds_the_second_half_in_its_cache(trace: Path) -> None:
    report, _ = run_one(run(trace, with_mode("round-robin", workers=1)))
    blocks = 1100 // 64 * 64
    assert report.hit_rate == pytest.approx(blocks / 1100 / 2, abs=0.01)
    other, _ = run_one(run(trace, with_mode("round-robin", workers=1), salt="another"))
    assert other.cached_tokens == report.cached_tokens


def test_time_stamps_are_kept_to_and_limits_too(trace: Path) -> None:
    report, _ = run_one(run(trace, arrivals=Arrivals(speedup=2.0), limit=10, max_output=5))
    assert report.requests == 10
    assert report.output_tokens == 50
    assert 0.9 < report.seconds < 1.4
    assert report.late.max < 1e-6


def test_router_modes_are_taken_from_the_policy_and_matter(trace: Path) -> None:
    modes = mode_names("all")
    assert {"round-robin", "random", "power-of-two", "least-loaded", "kv"} <= set(modes)
    balance = {mode: run_one(run(trace, with_mode(mode)))[0].balance.requests for mode in ("round-robin", "random")}
    assert balance["round-robin"] == 1.0 < balance["random"]


def test_the_router_that_knows_caches_finds_more_in_them(trace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    alone = Arrivals(concurrency=1)
    found = {mode: run_one(run(trace, with_mode(mode), arrivals=alone))[0].hit_rate for mode in ("random", "kv")}
    assert found["random"] < 0.35
    assert found["kv"] > 0.4, "every prompt comes twice"
    assert capfd.readouterr().err == "", "nothing is said when the world is dropped"


def test_mistakes(trace: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="there is no 'psychic', but round-robin"):
        mode_names("random,psychic")
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}")
    with pytest.raises(BadTrace, match=r"bad\.jsonl, line 1"):
        run_one(run(bad))
    with pytest.raises(BadTrace, match="cannot be read"):
        run_all([run(tmp_path / "absent.jsonl")])


def test_a_report_reads_back(trace: Path) -> None:
    report, _ = run_one(run(trace))
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report
