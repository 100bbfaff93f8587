"""How much is run against real processes: ``--faults-count``, ``--faults-seconds``, or the variables of that name."""

from __future__ import annotations

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults", "faults in real processes")
    group.addoption("--faults-count", type=int, help="plans to draw beside the sweep (FAULTS_COUNT)")
    group.addoption("--faults-seconds", type=float, help="stop drawing after so long (FAULTS_SECONDS)")


@pytest.fixture
def faults_count(request: pytest.FixtureRequest) -> int:
    """How many drawn plans to run."""
    given = request.config.getoption("--faults-count", None)
    return int(os.environ.get("FAULTS_COUNT", "3")) if given is None else int(given)


@pytest.fixture
def faults_seconds(request: pytest.FixtureRequest) -> float:
    """No plan begins after so many seconds."""
    given = request.config.getoption("--faults-seconds", None)
    return float(os.environ.get("FAULTS_SECONDS", "60")) if given is None else float(given)
