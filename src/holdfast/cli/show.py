"""What local commands show while they run: relayed lines with a prefix, progress of starting slots, colours.

On a terminal progress is live (rich); elsewhere each change of state is one plain line. Colours follow
NO_COLOR and vanish when the output is no terminal.

Must never decide anything.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from holdfast.local.cluster import SlotView
from holdfast.telemetry.logs import LineWriter

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_COLOURS = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36", "dim": "2", "bold": "1"}
_ESCAPE = re.compile("\x1b\\[[0-9;]*m")
_STATE_COLOURS = {"ready": "green", "gave-up": "red", "failed": "red", "restarting": "yellow", "stalled": "yellow"}


def is_terminal(stream: TextIO) -> bool:
    """Whether a person is looking at this stream."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: TextIO = sys.stdout) -> str:
    """Return the text in a colour, where the stream can show it."""
    if not is_terminal(stream) or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows as aligned columns."""
    if not rows:
        return ""
    wide = [max(_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell + " " * (w - _width(cell)) for cell, w in zip(row, wide, strict=True)).rstrip() for row in rows
    )


def _width(cell: str) -> int:
    return len(_ESCAPE.sub("", cell))


class Relay:
    """Prefixes the lines of children and hands them to a writer that never blocks."""

    def __init__(self, writer: LineWriter, raw: bool):
        self._writer = writer
        self._raw = raw
        """JSON lines carry the process name themselves and go through unchanged."""

    def __call__(self, slot: str, line: str) -> None:
        """Show one line of a child."""
        if self._raw and line.startswith("{"):
            self._writer.put(line)
        else:
            self._writer.put(f"{paint(f'{slot:<10} |', 'cyan', sys.stderr)} {line}")


class StartProgress:
    """Shows how slots come up; a context manager, called with the views of `LocalCluster.until_ready`."""

    def __init__(self, stream: TextIO = sys.stderr):
        self._stream = stream
        self._begin = time.monotonic()
        self._shown: dict[str, str] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if is_terminal(self._stream):
            from rich.console import Console  # noqa: PLC0415  only where a person looks
            from rich.live import Live  # noqa: PLC0415

            self._live = Live(console=Console(file=self._stream), transient=True, refresh_per_second=12)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, views: list[SlotView]) -> None:
        """Show what has changed."""
        if self._live:
            self._live.update(self._rows(views))
        for view in views:
            if self._shown.get(view.slot) != view.state:
                self._shown[view.slot] = view.state
                if not self._live or view.ready:
                    self._line(view)

    def _line(self, view: SlotView) -> None:
        seconds = time.monotonic() - self._begin
        pid = f" (pid {view.pid})" if view.pid else ""
        mark = paint("✓", "green", self._stream) if view.ready else "·"
        text = f"{mark} {view.slot:<10} {view.state} after {seconds:.1f} s{pid}"
        if self._live:
            from rich.text import Text  # noqa: PLC0415

            self._live.console.print(Text.from_ansi(text))
        else:
            print(text, file=self._stream, flush=True)

    def _rows(self, views: list[SlotView]) -> RenderableType:
        from rich.console import Group  # noqa: PLC0415
        from rich.spinner import Spinner  # noqa: PLC0415

        seconds = time.monotonic() - self._begin
        waiting = [view for view in views if not view.ready]
        return Group(*(Spinner("dots", f"{v.slot:<10} {v.state} … {seconds:.1f} s") for v in waiting))


def state_colour(state: str) -> str:
    """Return the colour in which a state is shown."""
    return _STATE_COLOURS.get(state, "dim")
