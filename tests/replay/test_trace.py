"""Traces are read line by line, and what is wrong with a line is said."""

import itertools
import tracemalloc
from pathlib import Path

import pytest

from holdfast.replay.trace import BadTrace, TraceRequest, parse_trace, read_trace

GOOD = b'{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}'


def test_lines_become_requests(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    later = GOOD.replace(b'"timestamp": 0', b'"timestamp": 12.5, "session_id": "x"')
    file.write_bytes(GOOD + b"\n\n" + later + b"\n")
    assert list(read_trace(file)) == [TraceRequest(0, 600, 5, (1, 2)), TraceRequest(12.5, 600, 5, (1, 2))]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "JSON"),
        (b"[]", "object"),
        (b"\xff\xfe", "line 2"),
        (GOOD.replace(b"[1, 2]", b"[1]"), "input_length 600 needs 2 hash_ids at 512 tokens each, 1 are given"),
        (GOOD.replace(b"600", b"0"), "input_length"),
        (GOOD.replace(b"5,", b"-5,"), "output_length"),
        (GOOD.replace(b"600", b"99999999999"), "input_length"),
        (GOOD.replace(b'"output_length": 5, ', b""), "output_length"),
        (GOOD.replace(b'"timestamp": 0', b'"timestamp": -1'), "timestamp"),
        (GOOD.replace(b"[1, 2]", b'["a", "b"]'), "hash_ids"),
        (b" " * (4 * 1024 * 1024 + 1), "longer than"),
    ],
)
def test_a_bad_line_is_named(line: bytes, said: str) -> None:
    with pytest.raises(BadTrace) as caught:
        list(parse_trace([GOOD + b"\n", line + b"\n"], name="day.jsonl"))
    assert "day.jsonl, line 2" in caught.value.message
    assert said in caught.value.message


def test_time_goes_forward() -> None:
    lines = [GOOD.replace(b'"timestamp": 0', b'"timestamp": 9'), GOOD]
    with pytest.raises(BadTrace, match="timestamp 0 is before the line above it"):
        list(parse_trace(lines))


def test_other_block_sizes() -> None:
    assert len(list(parse_trace([GOOD], block=300))) == 1
    with pytest.raises(BadTrace, match="needs 10 hash_ids"):
        list(parse_trace([GOOD], block=64))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(BadTrace, match="No such file"):
        list(read_trace(tmp_path / "none"))


def test_a_long_trace_is_not_held(tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    file.write_bytes((GOOD + b"\n") * 50_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_trace(file)) == 50_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_an_endless_line_is_not_held(tmp_path: Path) -> None:
    file = tmp_path / "endless.jsonl"
    with file.open("wb") as out:
        for _ in range(8):
            out.write(b"x" * 4_000_000)
    with pytest.raises(BadTrace, match="longer than"):
        next(itertools.islice(read_trace(file), 1))
