"""Records a real `holdfast demo` and writes it as an animated SVG: ``python tools/record.py docs/images/demo.svg``.

The demo runs with its output on a pseudo-terminal; every piece of text is kept with the moment at which it
came, and the picture plays them in real time, in a loop. Viewers who prefer reduced motion see the end.
"""

from __future__ import annotations

import html
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

COLUMNS = 92
LINE = 19.0
CHARACTER = 8.43
"""Width of a character of the 14 px monospaced font."""
MARGIN = 18.0
HOLD_SECONDS = 7.0
"""How long the end stays before the loop begins again."""
STYLES = {
    "": "#c9d1d9",
    "1": "#f0f6fc",
    "2": "#8b949e",
    "31": "#ff7b72",
    "32": "#7ee787",
    "33": "#d29922",
    "36": "#79c0ff",
}
ESCAPE = re.compile(r"\x1b\[([0-9;]*)([A-Za-z])")


class Chunk(NamedTuple):
    """Text of one style in one place, and when it appeared."""

    at: float
    row: int
    column: int
    text: str
    style: str


def record(command: list[str]) -> list[tuple[float, str]]:
    """Run a command; return its output in pieces with seconds since the start. Standard error joins it, as lines."""
    master, slave = pty.openpty()
    env = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    begin = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=slave, stderr=subprocess.PIPE, env=env)
    os.close(slave)
    assert process.stderr is not None
    sources = {master, process.stderr.fileno()}
    pieces = []
    while sources:
        for source in select.select(list(sources), [], [])[0]:
            try:
                data = os.read(source, 65536)
            except OSError:
                data = b""
            if not data:
                sources.discard(source)
                continue
            pieces.append((time.monotonic() - begin, data.decode("utf-8", "replace")))
    if process.wait() != 0:
        sys.exit(f"the demo failed with {process.returncode}; nothing is written")
    return pieces


def layout(pieces: list[tuple[float, str]]) -> Iterator[Chunk]:
    """Place pieces on rows and columns, wrapping between words, following colours."""
    row = column = 0
    style = ""
    for at, piece in pieces:
        for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|\r?\n|\r|[ ]+|[^\s\x1b]+", piece):
            escape = ESCAPE.fullmatch(token)
            if escape:
                style = "" if escape.group(1) in ("", "0") else escape.group(1)
            elif token.endswith("\n"):
                row, column = row + 1, 0
            elif token == "\r":
                column = 0
            else:
                if column + len(token) > COLUMNS:
                    row, column = row + 1, 0
                    token = token.lstrip()  # noqa: PLW2901  a wrapped line does not begin with a space
                if token.strip():
                    yield Chunk(at, row, column, token, style)
                column += len(token)


def picture(chunks: list[Chunk], title: str) -> str:
    """Return the SVG."""
    total = chunks[-1].at + HOLD_SECONDS
    moments = sorted({round(chunk.at, 3) for chunk in chunks})
    names = {moment: f"k{i}" for i, moment in enumerate(moments)}
    width = 2 * MARGIN + COLUMNS * CHARACTER
    height = 2 * MARGIN + 34 + (max(chunk.row for chunk in chunks) + 1) * LINE
    frames = "".join(
        f"@keyframes {name}{{0%,{100 * at / total:.3f}%{{opacity:0}}{100 * at / total + 0.001:.3f}%,100%{{opacity:1}}}}"
        f".{name}{{animation-name:{name}}}"
        for at, name in names.items()
    )
    texts = "\n".join(_text(chunk, names[round(chunk.at, 3)]) for chunk in chunks)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img"'
    return f"""{head} aria-label="{title}">
<style>
text{{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre;
animation-duration:{total:.2f}s;animation-timing-function:step-end;animation-iteration-count:infinite}}
{frames}
@media (prefers-reduced-motion: reduce){{text{{animation:none!important}}}}
</style>
<rect width="100%" height="100%" rx="10" fill="#0d1117" stroke="#30363d"/>
<circle cx="20" cy="20" r="6" fill="#ff5f57"/><circle cx="40" cy="20" r="6" fill="#febc2e"/>
<circle cx="60" cy="20" r="6" fill="#28c840"/>
{texts}
</svg>
"""


def _text(chunk: Chunk, name: str) -> str:
    weight = ' font-weight="600"' if chunk.style == "1" else ""
    place = f'x="{MARGIN + chunk.column * CHARACTER:.1f}" y="{MARGIN + 46 + chunk.row * LINE:.1f}"'
    length = f'textLength="{len(chunk.text) * CHARACTER:.1f}"'
    fill = STYLES.get(chunk.style, STYLES[""])
    return f'<text class="{name}" {place} {length} fill="{fill}"{weight}>{html.escape(chunk.text)}</text>'


def main() -> None:
    """Record and write."""
    target = Path(sys.argv[1])
    command = ["holdfast", "demo", *sys.argv[2:]]
    pieces = record([sys.executable, "-m", *command])
    shown = [(0.0, "\x1b[1m$ make demo\x1b[0m\n"), *((at + 0.4, text) for at, text in pieces)]
    chunks = list(layout(shown))
    target.write_text(picture(chunks, "A worker is killed in mid-sentence and the sentence goes on"), encoding="utf-8")
    print(f"{target}: {len(chunks)} pieces over {chunks[-1].at:.1f} s, {target.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
