"""Prometheus' own programs: found, or the test says how to get them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "deploy" / "observability"
ALERTMANAGER = ("prometheus-alertmanager", "alertmanager")
"""Debian's name first, so that both kinds of installation will do."""


def binary(*names: str) -> str:
    """Return the path of the first program found; without any, fail in CI and skip elsewhere."""
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        why = f"{names[0]} is not installed; run tools/install_operations.sh"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(why)
        pytest.skip(why)
    return found


def check(*command: str, stdin: bytes | None = None, cwd: Path = HERE, within: float = 120.0) -> str:
    """Run a checker that must agree; returns what it said."""
    argv = (binary(command[0]), *command[1:])
    done = subprocess.run(argv, input=stdin, capture_output=True, cwd=cwd, check=False, timeout=within)
    said = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}:\n{said}"
    return said
