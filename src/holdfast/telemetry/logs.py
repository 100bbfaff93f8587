"""Logs: one line per event on stderr, for a person at 3 a.m. or, as JSON lines, for a machine.

Every process calls `setup_logging` once. Lines are written by a thread of their own behind a bounded
queue, so that a reader that has stopped reading (a frozen supervisor, a full terminal) never stops the
event loop; what does not fit is dropped and counted in the next line that gets through.

Variables follow the reference: ``DYN_LOG`` (``level`` or ``level,module=level,…``), ``DYN_LOGGING_JSONL``,
``DYN_LOGGING_CONSOLE_FORMAT``, ``DYN_LOG_USE_LOCAL_TZ``.

Must never format prompt or generated text; callers pass facts as ``extra={…}``.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import queue
import sys
import threading
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TextIO

import msgspec

from holdfast.base.settings import InvalidSetting, setting

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
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class LogConfig(msgspec.Struct, frozen=True):
    """Settings of the logs."""

    log: Annotated[str, setting("DYN_LOG", "Log level, or 'level,module=level,…'.", flag="log-level")] = "info"
    log_jsonl: Annotated[bool, setting("DYN_LOGGING_JSONL", "Write log lines as JSON objects.")] = False
    log_format: Annotated[
        Literal["readable", "jsonl"] | None,
        setting("DYN_LOGGING_CONSOLE_FORMAT", "Format of log lines; takes precedence over --log-jsonl."),
    ] = None
    log_local_time: Annotated[bool, setting("DYN_LOG_USE_LOCAL_TZ", "Local time in log lines instead of UTC.")] = False

    @property
    def as_json(self) -> bool:
        """Whether lines are JSON objects."""
        return self.log_format == "jsonl" if self.log_format else self.log_jsonl


class Readable(logging.Formatter):
    """``12:00:01.234 INFO    worker-0: message key=value`` with the logger's name for warnings and worse."""

    def __init__(self, role: str, local_time: bool = False):
        super().__init__()
        self._role = role
        self._local = local_time

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, plus a traceback when the record carries one."""
        facts = "".join(f" {key}={_fact(value)}" for key, value in _facts(record).items())
        where = f" [{record.name}]" if record.levelno >= logging.WARNING else ""
        role = f" {self._role}:" if self._role else ""
        stamp = _when(record, self._local).strftime("%H:%M:%S.%f")[:-3]
        line = f"{stamp} {record.levelname:<7}{role} {_one_line(record.getMessage())}{facts}{where}"
        return line + _trace(self, record, "\n")


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
    levels = parse_levels(config.log)
    writer = writer or LineWriter(sys.stderr)
    handler = BackgroundHandler(writer)
    handler.setFormatter(JsonLines(role) if config.as_json else Readable(role, config.log_local_time))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name, level in levels.items():
        logging.getLogger(name or None).setLevel(level)
    atexit.register(writer.close)
    return writer


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
