"""The command line as a person or a script meets it: help, config, status, start-up time, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.patience import within

from holdfast.cli.catalogue import sections
from holdfast.cli.main import COMMANDS
from holdfast.kv.choice import implementation
from holdfast.local.backoff import EXIT_CONFIGURATION
from holdfast.local.ports import free_port


def holdfast(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("DYN_")}
    return subprocess.run(
        [sys.executable, "-m", "holdfast", *argv],
        env={**clean, "COLUMNS": "100", **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_names_every_command_and_comes_quickly() -> None:
    took = []
    for _ in range(3):
        begin = time.perf_counter()
        done = holdfast("--help")
        took.append(time.perf_counter() - begin)
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)
    assert min(took) < within(0.4), f"{min(took):.2f} s"


@pytest.mark.parametrize(
    ("command", "names"), [("frontend", ["frontend", "log"]), ("worker", ["worker", "mock", "log"])]
)
def test_help_shows_every_setting_as_flag_and_variable(command: str, names: list[str]) -> None:
    text = holdfast(command, "--help").stdout
    for part in sections(names):
        for field in part.fields:
            assert field.env in text
            assert f"--[no-]{field.flag}" in text if field.is_bool else f"--{field.flag} " in text


def test_starting_a_process_loads_neither_typer_nor_rich() -> None:
    code = (
        "import sys\n"
        "from holdfast.cli import main, options\n"
        "[main.load_command(name) for name in main.PROCESSES]\n"
        "print(sorted({'typer', 'rich', 'click', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_config_shows_values_origins_and_masks_secrets(tmp_path: Path) -> None:
    file = tmp_path / "holdfast.toml"
    file.write_text("workers = 3\n[frontend]\nhttp-host = '127.0.0.2'\n")
    env = {"DYN_HTTP_PORT": "9000", "DYN_WIRE_SECRET": "hush-hush", "DYN_MIGRATON_LIMIT": "1"}
    done = holdfast("config", "--json", "--config-file", str(file), "--router-mode", "random", env=env)
    assert done.returncode == 0
    assert "hush" not in done.stdout
    report = json.loads(done.stdout)
    rows = {(row["section"], row["name"]): row for row in report["settings"]}
    assert (rows["frontend", "http_port"]["value"], rows["frontend", "http_port"]["from"]) == (9000, "DYN_HTTP_PORT")
    assert (rows["serve", "workers"]["value"], rows["serve", "workers"]["origin"]) == (3, "file")
    assert (rows["frontend", "router_mode"]["value"], rows["frontend", "router_mode"]["origin"]) == ("random", "flag")
    assert rows["frontend", "http_host"]["value"] == "127.0.0.2"
    assert rows["worker", "engine"]["origin"] == "default"
    assert report["kv_index"] == implementation()
    assert report["warnings"] == ["DYN_MIGRATON_LIMIT: did you mean DYN_MIGRATION_LIMIT?"]
    assert "did you mean DYN_MIGRATION_LIMIT?" in done.stderr


def test_config_in_words_shows_only_changes_when_asked() -> None:
    done = holdfast("config", "--changed", env={"DYN_HTTP_PORT": "9000"})
    assert done.stdout.split() == ["Frontend:", "--http-port", "9000", "environment", "DYN_HTTP_PORT"]


def test_status_without_anybody_says_so_and_fails(tmp_path: Path) -> None:
    where = ("--file-kv", str(tmp_path / "kv"), "--http-port", str(free_port()))
    done = holdfast("status", *where)
    assert done.returncode == 1
    assert "unreachable" in done.stdout
    assert "no workers in discovery" in done.stdout
    status = json.loads(holdfast("status", "--json", *where).stdout)
    assert (status["workers"], status["frontends"][0]["status"]) == ([], "unreachable")


@pytest.mark.parametrize("command", ["frontend", "worker", "serve"])
def test_a_wrong_setting_ends_with_a_sentence_and_its_own_code(command: str) -> None:
    done = holdfast(command, env={"DYN_LOG": "loud", "DYN_HTTP_PORT": "0"})
    assert done.returncode == EXIT_CONFIGURATION
    assert "DYN_LOG='loud'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_flag_names_the_near_one() -> None:
    done = holdfast("worker", "--enigne", "mock")
    assert done.returncode == 2
    assert "Did you mean --engine?" in done.stderr


def test_keys_of_the_file_that_nobody_reads_are_named(tmp_path: Path) -> None:
    file = tmp_path / "holdfast.toml"
    file.write_text("worker_count = 3\n[frontend]\nhttp-prot = 1\n[log]\nlog = 'info'\n")
    done = holdfast("config", "--changed", "--config-file", str(file))
    assert f"{file}: no setting reads frontend.http-prot; did you mean http_port?" in done.stderr
    assert f"{file}: no setting reads worker_count" in done.stderr
    assert "[log]" not in done.stderr
