"""What counts as back in service; the course of a rolling restart is proven in `tests/sim` and `tests/e2e`."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.local.rolling import pid_in_use

WELL = {"state": "usable", "draining": False, "pid": 7}


@pytest.mark.parametrize(
    ("changed", "pid"),
    [
        ({}, 7),
        ({"state": "starting"}, 0),
        ({"draining": True}, 0),
        ({"state": "suspect"}, 0),
        ({"pid": None}, 0),
    ],
)
def test_a_worker_is_in_use_when_new_work_goes_there(changed: dict[str, Any], pid: int) -> None:
    assert pid_in_use({**WELL, **changed}) == pid
