"""Logs: one line per event on stderr, for a person at 3 a.m. or, as JSON lines, for a machine.

Every process calls `setup_logging` once. Lines are written by a thread of their own behind a bounded
queue, so that a reader that has stopped reading (a frozen supervisor, a full terminal) never stops the
event loop; what does not fit is dropped and counted in the next line that gets through.

Every line of code that works for a request carries that request's ids (`context`). Variables follow the reference:
``DYN_LOG`` (``level`` or ``level,module=level,…``), ``DYN_LOGGING_JSONL``, ``DYN_LOGGING_CONSOLE_FORMAT``,
``DYN_LOGGING_SPAN_EVENTS``, ``DYN_LOG_USE_LOCAL_TZ``, ``DYN_LOGGING_CONFIG_PATH``; colour only on a terminal, and
neither with ``NO_COLOR`` nor with ``DYN_SDK_DISABLE_ANSI_LOGGING``.

Must never format prompt or generated text unless ``DYN_LOG_CONTENT`` says so (`content`); callers pass facts as
``extra={…}``.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import queue
import sys
import threading
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import msgspec

from holdfast.base.settings import InvalidSetting, setting
from holdfast.telemetry import context
from holdfast.telemetry.content import CONTENT

log = logging.getLogger(__name__)

QUEUE_LINES = 10_000
"""Lines that may wait for a reader before lines are dropped."""
_FLUSH_SECONDS = 2.0
_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL + 1,
}
_NOISY = ("asyncio", "httpx", "httpcore", "uvicorn", "hpack", "urllib3")
_COLOURS = {
    logging.DEBUG: "\x1b[2m",
    logging.INFO: "\x1b[32m",
    logging.WARNING: "\x1b[33m",
    logging.ERROR: "\x1b[31m",
    logging.CRITICAL: "\x1b[1;31m",
}
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class LogConfig(msgspec.Struct, frozen=True):
    """Settings of the logs."""

    log: Annotated[str, setting("DYN_LOG", "Log level, or 'level,module=level,…'.", flag="log-level")] = "info"
    log_jsonl: Annotated[bool, setting("DYN_LOGGING_JSONL", "Write log lines as JSON objects.")] = False
    log_format: Annotated[
        Literal["readable", "jsonl"] | None,
        setting("DYN_LOGGING_CONSOLE_FORMAT", "Format of log lines; takes precedence over --log-jsonl."),
    ] = None
    log_span_events: Annotated[
        bool, setting("DYN_LOGGING_SPAN_EVENTS", "Log the beginning and the end of every request and attempt.")
    ] = False
    log_content: Annotated[
        bool,
        setting(
            "DYN_LOG_CONTENT",
            "Write prompts and answers to the frontends' logs; they are in no log, trace or story otherwise.",
        ),
    ] = False
    log_config_path: Annotated[
        str, setting("DYN_LOGGING_CONFIG_PATH", "TOML file with log_level and the table log_filters; DYN_LOG wins.")
    ] = ""
    log_local_time: Annotated[bool, setting("DYN_LOG_USE_LOCAL_TZ", "Local time in log lines instead of UTC.")] = False

    @property
    def as_json(self) -> bool:
        """Whether lines are JSON objects."""
        return self.log_format == "jsonl" if self.log_format else self.log_jsonl


class Readable(logging.Formatter):
    """``12:00:01.234 INFO    worker-0: message key=value`` with the logger's name for warnings and worse."""

    def __init__(self, role: str, local_time: bool = False, *, colour: bool = False):
        super().__init__()
        self._role = role
        self._local = local_time
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, plus a traceback when the record carries one."""
        request = context.current()
        named = {**_facts(record), **request.brief()} if request is not None else _facts(record)
        facts = "".join(f" {key}={_fact(value)}" for key, value in named.items())
        where = f" [{record.name}]" if record.levelno >= logging.WARNING else ""
        role = f" {self._role}:" if self._role else ""
        stamp = _when(record, self._local).strftime("%H:%M:%S.%f")[:-3]
        level, message = f"{record.levelname:<7}", _one_line(record.getMessage())
        if self._colour:
            level = f"{_COLOURS.get(record.levelno, '')}{level}{_PLAIN}"
            stamp, facts = f"{_DIM}{stamp}{_PLAIN}", f"{_DIM}{facts}{_PLAIN}" if facts else ""
        return f"{stamp} {level}{role} {message}{facts}{where}" + _trace(self, record, "\n")


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, target, message, file, line, process role and the record's facts."""

    def __init__(self, role: str):
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """Return the JSON text."""
        entry: dict[str, Any] = {
            "time": _when(record, local=False).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "target": record.name,
            "message": record.getMessage(),
            "file": record.pathname,
            "line": record.lineno,
        }
        if self._role:
            entry["process"] = self._role
        request = context.current()
        if request is not None:
            entry.update(request.fields())
        entry.update(_facts(record))
        trace = _trace(self, record, "")
        if trace:
            entry["exception"] = trace
        return json.dumps(entry, default=str, ensure_ascii=False)


class LineWriter:
    """Writes lines to a stream from a thread of its own; drops and counts when too many are waiting."""

    def __init__(self, stream: TextIO, capacity: int = QUEUE_LINES):
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(capacity)
        self.dropped = 0
        self._thread = threading.Thread(target=self._write, name="line-writer", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Queue one line (without its line feed); never blocks."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what is queued, for at most two seconds. Idempotent."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._lines.put(None, timeout=_FLUSH_SECONDS)
                self._thread.join(_FLUSH_SECONDS)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            lost, self.dropped = self.dropped, 0
            note = f"({lost} lines were dropped: the reader of this output was too slow)\n" if lost else ""
            try:
                self._stream.write(f"{note}{line}\n")
                if self._lines.empty():
                    self._stream.flush()
            except (OSError, ValueError):
                return  # nobody reads any more


class BackgroundHandler(logging.Handler):
    """Hands formatted records to a `LineWriter`."""

    def __init__(self, writer: LineWriter):
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Queue one line; never blocks."""
        try:
            self._writer.put(self.format(record))
        except Exception:  # a broken log call must not break its caller
            self.handleError(record)

    def close(self) -> None:
        """Write what is queued, for at most two seconds."""
        self._writer.close()
        super().close()


def setup_logging(config: LogConfig, role: str = "", writer: LineWriter | None = None) -> LineWriter:
    """Direct all logging of this process to one stream.

    Args:
        config: level and format.
        role: name of this process in every line, such as ``worker``; empty under a supervisor that prefixes.
        writer: where lines go; standard error when None.

    Returns:
        The writer; it is closed at interpreter exit.

    Raises:
        InvalidSetting: a level that does not exist.
    """
    of_file, said = _levels_of_file(config.log_config_path), parse_levels(config.log)
    levels = {**said, **of_file} if config.log == LogConfig().log else {**of_file, **said}
    colour = writer is None and wants_colour(sys.stderr, os.environ)
    writer = writer or LineWriter(sys.stderr)
    handler = BackgroundHandler(writer)
    readable = Readable(role, config.log_local_time, colour=colour)
    handler.setFormatter(JsonLines(role) if config.as_json else readable)
    context.SPAN_EVENTS.on = config.log_span_events
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name, level in levels.items():
        logging.getLogger(name or None).setLevel(level)
    atexit.register(writer.close)
    CONTENT.on = config.log_content
    if config.log_content:
        log.warning(
            "--log-content is on: frontends write what clients ask and are answered to their logs; switch it off, and "
            "delete these logs, once you have found what you are looking for"
        )
    return writer


def wants_colour(stream: TextIO, env: Mapping[str, str]) -> bool:
    """Return whether a person looks at this stream and has not said that colours are unwanted."""
    off = env.get("NO_COLOR") or env.get("DYN_SDK_DISABLE_ANSI_LOGGING", "").lower() in ("1", "true", "yes", "on")
    return not off and env.get("TERM") != "dumb" and stream.isatty()


def _levels_of_file(path: str) -> dict[str, int]:
    """Return the levels of a configuration file; none without one.

    Raises:
        InvalidSetting: it cannot be read, or has a level that does not exist.
    """
    if not path:
        return {}
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidSetting(f"DYN_LOGGING_CONFIG_PATH={path}: cannot be read ({error})") from None
    filters = content.get("log_filters", {})
    parts = [str(content.get("log_level", "info")), *(f"{name}={level}" for name, level in dict(filters).items())]
    return parse_levels(",".join(parts))


def parse_levels(text: str) -> dict[str, int]:
    """Return levels by logger name; the empty name is the root.

    Raises:
        InvalidSetting: naming the part that is wrong.
    """
    levels = {"": logging.INFO}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, word = part.rpartition("=")
        level = _LEVELS.get(word.strip().lower())
        if level is None:
            raise InvalidSetting(f"DYN_LOG={text!r}: {part!r} is not a level; expected one of {', '.join(_LEVELS)}")
        levels[name.strip().replace("::", ".")] = level
    return levels


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    return {k: v for k, v in vars(record).items() if k not in _STANDARD and not k.startswith("_")}


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = _one_line(str(value))
    return f'"{text}"' if " " in text else text


def _one_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _when(record: logging.LogRecord, local: bool) -> datetime:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.astimezone() if local else moment


def _trace(formatter: logging.Formatter, record: logging.LogRecord, lead: str) -> str:
    if record.exc_info and record.exc_info[0] is not None:
        return lead + formatter.formatException(record.exc_info)
    return ""
