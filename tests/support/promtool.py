"""What Prometheus itself says about a page of metrics."""

from __future__ import annotations

import re
import subprocess

GIVEN = re.compile(r"dynamo_router_overhead_\w+_ms metric names should not contain abbreviated units")
"""The reference's names, which its users' dashboards have."""


def complaints(text: str | bytes, promtool: str = "promtool", within: float = 120.0) -> list[str]:
    """Return what ``promtool check metrics`` objects to, without the names that the reference gives us."""
    data = text.encode() if isinstance(text, str) else text
    done = subprocess.run([promtool, "check", "metrics"], input=data, capture_output=True, check=False, timeout=within)
    said = (done.stdout + done.stderr).decode(errors="replace").splitlines()
    wrong = [line for line in said if line and not GIVEN.match(line)]
    return wrong or ([] if done.returncode == 0 or said else [f"promtool exited with {done.returncode}"])
