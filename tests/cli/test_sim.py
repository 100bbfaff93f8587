"""`holdfast sim`: one universe told, many summed up, scripts replayed, mistakes explained."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from tests.patience import within


def sim(*args: str, hashes: str = "0") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONHASHSEED": hashes, "NO_COLOR": "1"}
    command = [sys.executable, "-m", "holdfast", "sim", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_one_universe_repeats_in_any_process_and_from_its_script(tmp_path: Path) -> None:
    script = tmp_path / "script.json"
    first = sim("--seed", "5", "--json", "--verify", "--out", str(script), hashes="random")
    assert first.returncode == 0, first.stderr
    facts = msgspec.json.decode(first.stdout)
    assert facts["repeats"] is True
    assert facts["broken"] == []
    replayed = sim("--script", str(script), "--story", hashes="1")
    assert replayed.returncode == 0, replayed.stderr
    assert facts["digest"] in replayed.stdout
    assert "every promise was kept" in replayed.stdout
    assert "asks frontend-" in replayed.stdout


def test_many_universes_are_summed_up() -> None:
    done = sim("--seeds", "7..9", "--jobs", "2", "--only", "crash,freeze", "--requests", "5")
    assert done.returncode == 0, done.stderr
    assert "universes" in done.stdout
    assert "violations" in done.stdout
    facts = msgspec.json.decode(sim("--seed", "7", "--count", "2", "--json", "--verify").stdout)
    assert facts["universes"] == 2
    assert facts["differing"] == []


def test_too_few_universes_that_count_are_a_failure() -> None:
    done = sim("--count", "1", "--faults", "0", "--at-least", "5")
    assert done.returncode == 1
    assert "universes count, 5 were asked for" in done.stderr


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        ((), "--seed N for one"),
        (("--seeds", "9..3"), "A..B"),
        (("--seed", "1", "--only", "flood"), "no fault 'flood'"),
        (("--seed", "1", "--profile", "calm"), "no profile 'calm'"),
        (("--seed", "1", "--workers", "0"), "at least one worker"),
        (("--script", "nowhere.json"), "no file nowhere.json"),
    ],
)
def test_mistakes_are_explained(args: tuple[str, ...], hint: str) -> None:
    done = sim(*args)
    assert done.returncode != 0
    assert hint in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_sums_up_what_there_is(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    command = [sys.executable, "-m", "holdfast", "sim", "--count", "5000", "--jobs", "2", "--log", str(log)]
    env = {**os.environ, "PYTHONHASHSEED": "0", "NO_COLOR": "1"}
    running = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + within(60.0)
        while not (log.exists() and log.read_bytes().count(b"\n") >= 2):
            assert time.monotonic() < until, "no universe was over in time"
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=within(60.0))
    finally:
        running.kill()
    assert running.returncode == 130, err
    assert "violations" in out
    assert "Traceback" not in err
