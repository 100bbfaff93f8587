"""docs/reference/wire.md lists every frame with its tag, and the present version."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from holdfast.wire import caller, worker
from holdfast.wire.frames import VERSION, CallerFrame, WorkerFrame

TEXT = (Path(__file__).parents[2] / "docs" / "reference" / "wire.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("frame", get_args(CallerFrame) + get_args(WorkerFrame), ids=lambda f: f.__name__)
def test_every_frame_is_listed(frame: Any) -> None:
    assert f"| {frame.__struct_config__.tag} | `{frame.__name__.lower()}` |" in TEXT


def test_nothing_else_is_listed_and_the_versions_are() -> None:
    listed = re.findall(r"^\| \d+ \| `[a-z]+` \|", TEXT, re.MULTILINE)
    assert len(listed) == len(get_args(CallerFrame) + get_args(WorkerFrame))
    assert f"| {VERSION} |" in TEXT


def test_every_frame_is_legal_somewhere() -> None:
    for legal, union in ((caller.LEGAL, WorkerFrame), (worker.LEGAL, CallerFrame)):
        assert set().union(*legal.values()) == set(get_args(union))
