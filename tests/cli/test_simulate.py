"""`holdfast simulate` as a person or a script meets it: tables, JSON, pictures, mistakes, the same bytes every time."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.dom.minidom
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from holdfast.cli.app import build_app
from holdfast.local.backoff import EXIT_CONFIGURATION
from holdfast.replay.effects import Account

SMALL = ("--workers", "3", "--rate", "6", "--duration", "3s", "--output-length", "40", "--input-length", "64")


def simulate(*args: str, hashes: str = "0") -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("DYN_")}
    env = {**clean, "PYTHONHASHSEED": hashes, "COLUMNS": "140"}
    command = [sys.executable, "-m", "holdfast", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


class Runs(msgspec.Struct, forbid_unknown_fields=True):
    runs: list[Account]


def test_a_run_is_told_and_repeats_in_any_process(tmp_path: Path) -> None:
    wanted = ("simulate", *SMALL, "--fault", "kill-worker@1s", "--fault", "freeze-worker@2s:2s", "--seed", "3")
    texts, pictures = [], []
    for hashes in ("0", "random"):
        plot, found = tmp_path / f"{hashes}.svg", tmp_path / f"{hashes}.json"
        done = simulate(*wanted, "--plot", str(plot), "--json", str(found), hashes=hashes)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
        pictures.append(plot.read_bytes() + found.read_bytes())
    assert texts[0] == texts[1]
    assert pictures[0] == pictures[1]
    for word in ("time line", "faults", "kill-worker", "worker-1", "streams moved / lost", "time to first token"):
        assert word in texts[0]
    xml.dom.minidom.parse(str(tmp_path / "0.svg"))
    (account,) = msgspec.json.decode((tmp_path / "0.json").read_bytes(), type=Runs).runs
    assert account.streams_lost == 0
    assert [effect.kind for effect in account.effects] == ["kill-worker", "freeze-worker"]


def test_the_keys_of_the_json_are_these() -> None:
    """Scripts read them: a change is a decision."""
    done = simulate("simulate", *SMALL, "--fault", "kill-worker@1s", "--json", "-")
    (run,) = msgspec.json.decode(done.stdout)["runs"]
    assert list(run) == [
        "title", "seed", "workers", "frontends", "profile", "router_mode", "load", "digest", "migrations",
        "streams_lost", "longest_gap", "report", "capacity", "effects", "slices",
    ]  # fmt: skip
    assert list(run["effects"][0]) == ["kind", "target", "at", "until", "hit", "moved", "lost", "longest_gap"]
    assert list(run["slices"][0]) == [
        "at", "requests", "finished", "tokens_per_second", "first_p50", "first_p99", "longest_gap", "migrations",
        "rejected", "failed", "usable_workers", "waiting",
    ]  # fmt: skip
    assert list(run["capacity"]) == [
        "seats", "running_mean", "running_peak", "waiting_peak", "waiting_share", "kv_peak", "best_tokens_per_second",
    ]  # fmt: skip


def test_settings_are_compared_side_by_side(tmp_path: Path) -> None:
    plot = tmp_path / "compared.svg"
    done = simulate(
        "simulate", *SMALL, "--fault", "kill-worker@1s", "--compare", "migration-limit=0,3", "--plot", str(plot),
        "--json", "-",
    )  # fmt: skip
    runs = msgspec.json.decode(done.stdout, type=Runs).runs
    assert [run.title for run in runs] == ["migration-limit 0", "migration-limit 3"]
    assert runs[0].streams_lost > 0 == runs[1].streams_lost
    assert "migration-limit 0" in plot.read_text()


def test_a_variable_sets_a_setting_too() -> None:
    env = {**os.environ, "DYN_MIGRATION_LIMIT": "0", "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", "holdfast", "simulate", *SMALL, "--fault", "kill-worker@1s", "--json", "-"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert msgspec.json.decode(done.stdout, type=Runs).runs[0].streams_lost > 0


def test_the_faults_there_are_can_be_listed() -> None:
    done = simulate("simulate", "--fault", "list")
    assert done.returncode == 0
    for kind in ("kill-worker", "discovery-outage", "rolling-restart", "burst"):
        assert f"  {kind} " in done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--fault", "kil-worker@3s"), "Did you mean kill-worker?"),
        (("--compare", "router=3"), "expected a setting and its values"),
        (("--compare", "rate=fast"), "not a number"),
        (("--router-mode", "psychic"), "--router-mode='psychic': expected one of round-robin"),
        (("--profile", "abacus"), "there is default, reference"),
        (("--duration", "soon"), "expected a time"),
        (("--output-length", "0"), "--output-length 0: expected tokens"),
        (("--workers", "0"), "expected 1 to 256"),
        (("--window", "9s-3s"), "--window 9s-3s: expected two times"),
        (("--speedup", "2"), "--speedup needs a --trace"),
        (("--rate", "0"), "The rate must be positive"),
        (("--trace", "/nowhere.jsonl"), "/nowhere.jsonl cannot be read"),
    ],
)
def test_mistakes_say_what_is_wrong(flags: tuple[str, ...], said: str) -> None:
    done = simulate("simulate", *flags)
    assert done.returncode == EXIT_CONFIGURATION, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_replay_without_an_endpoint_compares_modes_and_loads(tmp_path: Path) -> None:
    trace, plot = tmp_path / "trace.jsonl", tmp_path / "curves.svg"
    line = '{"timestamp": %d, "input_length": 100, "output_length": 8, "hash_ids": [%d]}\n'
    trace.write_text("".join(line % (n, n) for n in range(12)))
    flags = ("--workers", "2", "--router", "random,least-loaded", "--concurrency", "2,4", "--plot", str(plot))
    done = simulate("replay", str(trace), *flags, "--json", "-", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    reports = msgspec.json.decode(done.stdout)
    assert [(r["title"], r["load"], r["ok"]) for r in reports] == [
        ("random", "2 at once", 12), ("least-loaded", "2 at once", 12),
        ("random", "4 at once", 12), ("least-loaded", "4 at once", 12),
    ]  # fmt: skip
    assert ">2 at once<" in plot.read_text()
    table = simulate("replay", str(trace), "--workers", "2").stdout
    assert "worker-1" in table
    assert "time stamps at 1x" in table


def test_interrupting_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("holdfast.cli.simulate.what_if", interrupted)
    monkeypatch.setattr("holdfast.cli.simulate.ensure_repeatable", lambda: None)
    done = CliRunner().invoke(build_app(["simulate"]), ["simulate", *SMALL])
    assert done.exit_code == 130
    assert "interrupted" in done.output
