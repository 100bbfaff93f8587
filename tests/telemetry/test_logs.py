"""Logs: formats, levels, one line per event, and a stalled reader that must not stop the process."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.base.settings import InvalidSetting
from holdfast.telemetry.logs import LineWriter, LogConfig, Readable, parse_levels, setup_logging, wants_colour


@pytest.fixture(autouse=True)
def restored_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def written(config: LogConfig, role: str = "worker-0") -> tuple[logging.Logger, io.StringIO, LineWriter]:
    stream = io.StringIO()
    return logging.getLogger("holdfast.test"), stream, setup_logging(config, role, LineWriter(stream))


def test_a_readable_line_carries_role_message_and_facts() -> None:
    log, stream, writer = written(LogConfig())
    log.info("moved a request", extra={"request": "abc", "gap_ms": 12.3456, "why": "worker gone"})
    writer.close()
    line = stream.getvalue()
    assert 'INFO    worker-0: moved a request request=abc gap_ms=12.35 why="worker gone"\n' in line


def test_a_message_cannot_forge_a_second_line() -> None:
    log, stream, writer = written(LogConfig())
    log.warning("label %s", "a\n12:00:00 ERROR forged\x1b[31m")
    writer.close()
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()


def test_json_lines_carry_the_reference_fields_and_tracebacks() -> None:
    log, stream, writer = written(LogConfig(log_jsonl=True))
    try:
        int("broken")
    except ValueError:
        log.exception("it failed", extra={"x_request_id": "r1"})
    writer.close()
    entry = json.loads(stream.getvalue())
    assert entry["time"].endswith("Z")
    assert (entry["level"], entry["target"], entry["message"]) == ("ERROR", "holdfast.test", "it failed")
    assert (entry["process"], entry["x_request_id"]) == ("worker-0", "r1")
    assert "ValueError: invalid literal" in entry["exception"]


def test_the_format_setting_beats_the_json_switch() -> None:
    assert LogConfig(log_jsonl=True, log_format="readable").as_json is False
    assert LogConfig(log_format="jsonl").as_json is True


def test_levels_per_module() -> None:
    levels = parse_levels("warn,holdfast.wire=debug,dynamo::x=off")
    assert levels == {"": logging.WARNING, "holdfast.wire": logging.DEBUG, "dynamo.x": logging.CRITICAL + 1}
    with pytest.raises(InvalidSetting, match="'holdfast=loud' is not a level"):
        parse_levels("info,holdfast=loud")


class Stuck(io.StringIO):
    """A stream whose reader does not read until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()
        self.entered = threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        assert self.release.wait(10)
        return super().write(text)


def test_a_stalled_reader_never_blocks_and_losses_are_counted() -> None:
    stream = Stuck()
    writer = LineWriter(stream, capacity=2)
    writer.put("first")
    assert stream.entered.wait(10)
    for number in range(5):
        writer.put(f"line {number}")  # 2 wait, 3 are dropped, none blocks
    assert writer.dropped == 3
    stream.release.set()
    writer.close()
    assert (
        stream.getvalue() == "first\n(3 lines were dropped: the reader of this output was too slow)\nline 0\nline 1\n"
    )


def test_levels_come_from_a_file_unless_the_variable_says_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "logging.toml"
    file.write_text('log_level = "warn"\n[log_filters]\n"holdfast.wire" = "debug"\n', encoding="utf-8")
    written(LogConfig(log_config_path=str(file)))
    assert logging.getLogger().level == logging.WARNING
    assert logging.getLogger("holdfast.wire").level == logging.DEBUG
    written(LogConfig(log="error,holdfast.wire=error", log_config_path=str(file)))
    assert logging.getLogger().level == logging.ERROR
    assert logging.getLogger("holdfast.wire").level == logging.ERROR
    logging.getLogger("holdfast.wire").setLevel(logging.NOTSET)
    with pytest.raises(InvalidSetting, match="cannot be read"):
        written(LogConfig(log_config_path=str(tmp_path / "none.toml")))


@pytest.mark.parametrize(
    ("terminal", "env", "colour"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (True, {"DYN_SDK_DISABLE_ANSI_LOGGING": "true"}, False),
        (True, {"DYN_SDK_DISABLE_ANSI_LOGGING": "0"}, True),
    ],
)
def test_colour_is_for_people_at_a_terminal(terminal: bool, env: dict[str, str], colour: bool) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    assert wants_colour(Stream(), env) is colour
    record = logging.makeLogRecord({"name": "x", "levelno": 40, "levelname": "ERROR", "msg": "m"})
    assert ("\x1b[31mERROR" in Readable("", colour=colour).format(record)) is colour
