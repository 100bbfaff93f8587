"""Each proof's row goes to its own part of the track record, whatever stands behind it."""

from __future__ import annotations

from pathlib import Path

from tests.proof import record


def test_rows_go_to_their_parts(tmp_path: Path) -> None:
    path = tmp_path / "track-record.md"
    record.append(["kills one"], path)
    record.append_soak(["soak one"], path)
    record.append_universes(["universes one"], path)
    path.write_text(path.read_text() + "\n## What was found\n\nProse.\n")
    record.append_universes(["universes two"], path)
    record.append_soak(["soak two"], path)
    record.append(["kills two"], path)
    text = path.read_text()
    order = [
        *("# Track record", "kills one", "kills two", "## Soak", "soak one", "soak two"),
        *("## Universes", "universes one", "universes two", "## What was found", "Prose."),
    ]
    places = [text.index(one) for one in order]
    assert places == sorted(places)
    assert text.count("## Soak") == 1
    rows = [line for line in text.splitlines() if line.endswith(("one |", "two |"))]
    assert all(line.startswith("| 20") for line in rows)
    assert "\n\n\n" not in text


def test_the_present_track_record_takes_rows(tmp_path: Path) -> None:
    path = tmp_path / "track-record.md"
    before = record.TRACK_RECORD.read_text()
    path.write_text(before)
    record.append(["kills"], path)
    record.append_soak(["soak"], path)
    after = [line for line in path.read_text().splitlines() if not line.endswith(("| kills |", "| soak |"))]
    assert after == before.splitlines()
