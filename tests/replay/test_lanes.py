"""Pictures of what-ifs: valid SVG within its bounds, every worker's colour, faults named, moves visible."""

from __future__ import annotations

import re
import xml.dom.minidom

import pytest

from holdfast.replay.effects import Account
from holdfast.replay.lanes import MOST_STREAMS, Window, comparison, drawing, window_of
from holdfast.replay.svg import COLOURS, WIDTH
from holdfast.replay.whatif import Happened
from holdfast.requests.config import RequestSettings
from tests.replay.whatifs import happen, with_frontend


@pytest.fixture(scope="module")
def killed() -> tuple[Happened, Account]:
    return happen("kill-worker@2s", "freeze-worker@2.2s:3s", "kill-frontend@3s", rate=12.0)


def paths(svg: str, colour: str) -> list[str]:
    document = xml.dom.minidom.parseString(svg)
    return [
        path.getAttribute("d")
        for path in document.getElementsByTagName("path")
        if path.getAttribute("stroke") == colour and path.getAttribute("stroke-width") == "4"
    ]


def test_it_is_valid_and_within_its_bounds(killed: tuple[Happened, Account]) -> None:
    svg = drawing(*killed)
    document = xml.dom.minidom.parseString(svg)
    _, _, width, height = map(float, document.documentElement.getAttribute("viewBox").split())
    assert width == WIDTH
    for path in document.getElementsByTagName("path"):
        for piece in path.getAttribute("d").split("M")[1:]:
            x, y = map(float, re.split("[HVhlL]", piece)[0].split())
            assert 0 <= x <= width
            assert 0 <= y <= height


def test_faults_are_named_and_every_worker_has_its_colour(killed: tuple[Happened, Account]) -> None:
    svg = drawing(*killed)
    for name in ("kill-worker worker-0", "freeze-worker worker-1", "kill-frontend frontend-0"):
        assert f">{name}<" in svg
    for colour in COLOURS[:3]:
        assert paths(svg, colour)
    assert 'stroke="#c22" stroke-width="1.6"' in svg, "a cross for streams that were lost with their frontend"


def test_a_moved_stream_changes_its_colour_on_its_line(killed: tuple[Happened, Account]) -> None:
    happened, _ = killed
    svg = drawing(*killed)
    height_of = [
        {piece.split()[1].split("H")[0] for d in paths(svg, c) for piece in d.split("M")[1:]} for c in COLOURS[:3]
    ]
    shared = (height_of[0] & height_of[1]) | (height_of[0] & height_of[2]) | (height_of[1] & height_of[2])
    assert shared
    assert len(shared) <= len({move.label for move in happened.moves})


def test_the_window_is_around_the_faults_and_can_be_chosen(killed: tuple[Happened, Account]) -> None:
    _, account = killed
    assert window_of(account).begin == 0.0
    narrow = drawing(*killed, Window(1.0, 2.0))
    assert ">1.0 s<" in narrow
    assert ">2.0 s<" in narrow
    assert "freeze-worker" not in narrow
    assert len(narrow) < len(drawing(*killed))


def test_there_are_never_too_many_streams() -> None:
    happened, account = happen(rate=40.0)
    svg = drawing(happened, account)
    assert len(happened.streams) > MOST_STREAMS
    assert svg.count('stroke-width="4"') <= MOST_STREAMS * 3
    assert window_of(account) == Window(0.0, account.report.seconds)


def test_runs_are_drawn_over_each_other(killed: tuple[Happened, Account]) -> None:
    _, other = happen("kill-worker@2s", settings=with_frontend(requests=RequestSettings(migration_limit=0)))
    svg = comparison([killed[1], other])
    assert len(xml.dom.minidom.parseString(svg).getElementsByTagName("path")) == 4 * (3 + 2)


def test_the_picture_follows_from_the_seed(killed: tuple[Happened, Account]) -> None:
    again = happen("kill-worker@2s", "freeze-worker@2.2s:3s", "kill-frontend@3s", rate=12.0)
    assert drawing(*again) == drawing(*killed)
