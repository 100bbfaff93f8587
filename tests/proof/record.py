"""Where proofs leave their results: a state file that a broken-off run goes on from, and the track record.

Must never run anything but git, to name the commit.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import msgspec

Done = TypeVar("Done", bound=msgspec.Struct)
ROOT = Path(__file__).resolve().parents[2]
TRACK_RECORD = ROOT / "docs" / "track-record.md"
_HEAD = """\
# Track record

What was proven, when, on which machine and at which commit. `make proof-kills` appends here: workers are killed
with SIGKILL under running streams, and every text is compared with the one true answer (mock engine) or with the
undisturbed run (llamacpp). A gap is the longest silence that a client of an interrupted stream saw from the last
text before the kill on, so it contains a usual step (10 ms with the mock engine).

| when (UTC) | commit | machine | engine | seed | kills | interrupted streams | exact | gap median | gap p99 | gap max |
|---|---|---|---|---|---|---|---|---|---|---|
"""


class Kill(msgspec.Struct, frozen=True):
    """One kill: the gaps of the streams that it interrupted, and what went wrong."""

    number: int
    gaps_ms: list[float]
    streams: int
    """All streams that were running."""
    wrong: list[str]


def commit() -> str:
    """Return the present commit, with a mark when the tree was changed since."""
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        return name + ("+changes" if _git("status", "--porcelain", "--", "src") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*args: str) -> str:
    return subprocess.run(("git", "-C", str(ROOT), *args), check=True, capture_output=True, text=True).stdout.strip()


def machine() -> str:
    """Return the processor, its cores and how busy the machine is."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def state_file(engine: str, seed: int) -> Path:
    """Return where a run keeps what it has done: one file per engine, seed and commit."""
    return Path(tempfile.gettempdir()) / f"holdfast-kills-{engine}-{seed}-{commit()}.jsonl"


def load(path: Path, kind: type[Done] = Kill) -> list[Done]:  # type: ignore[assignment]
    """Return what an earlier run has done; a last line that was cut off is dropped."""
    kills = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            kills.append(msgspec.json.decode(line, type=kind))
        except msgspec.DecodeError:
            break
    return kills


def save(path: Path, kill: msgspec.Struct) -> None:
    """Add one kill, or round, on the disk before the next one begins."""
    with path.open("ab") as file:
        file.write(msgspec.json.encode(kill) + b"\n")
        file.flush()
        os.fsync(file.fileno())


_SOAK_COLUMNS = (
    *("when (UTC)", "commit", "machine", "seed", "duration", "answers", "moved", "lost or wrong", "left early"),
    *("faults", "gauges not zero", "supervisor", "frontend", "worker", "kept"),
)
_SOAK_HEAD = f"""
## Soak

`make proof-soak` appends here: clients ask, workers are killed, frozen and drained, a frontend is
drained, for the whole time. "Kept": every answer exact, none lost, nothing held at rest, memory and open files flat
(medians of the second and the last fifth of the time).

| {" | ".join(_SOAK_COLUMNS)} |
|{"---|" * len(_SOAK_COLUMNS)}
"""


_UNIVERSE_COLUMNS = (
    *("when (UTC)", "commit", "machine", "seeds", "universes", "count", "virtual time", "requests", "tokens"),
    *("faults (live)", "migrations", "violations", "processor", "callbacks/s", "virtual s/s"),
)
_UNIVERSE_HEAD = f"""
## Universes

`make sim-long` appends here: whole clusters in [simulation](explanation/simulation.md), each with its own faults, each
judged by an oracle per promise. "Count": with at least 2 frontends, 3 workers, 20 requests and 2 faults that hit live
work. Callbacks and virtual seconds are per second of one core. The same seeds with the same commit are the same
universes: `holdfast sim --seeds A..B`.

| {" | ".join(_UNIVERSE_COLUMNS)} |
|{"---|" * len(_UNIVERSE_COLUMNS)}
"""


def append_soak(row: list[str], path: Path = TRACK_RECORD) -> None:
    """Add a row to the soaks."""
    _insert(row, "## Soak", _SOAK_HEAD, path)


def append_universes(row: list[str], path: Path = TRACK_RECORD) -> None:
    """Add a row to the universes."""
    _insert(row, "## Universes", _UNIVERSE_HEAD, path)


_FAULTS_COLUMNS = (
    *("when (UTC)", "commit", "machine", "seeds", "plans", "requests", "faults", "of them hit live work", "moves"),
    *("kinds that never struck", "violations"),
)
_FAULTS_HEAD = f"""
## Faults in real processes

`make proof-faults` appends here: plans as the simulation draws them, carried out against real processes on loopback
(signals, a proxy that is a bad network, engines that misbehave, views of discovery that are wrong), and judged by the
simulation's oracles for all that can be observed from outside and by the processes' own words.

| {" | ".join(_FAULTS_COLUMNS)} |
|{"---|" * len(_FAULTS_COLUMNS)}
"""


def append_faults(row: list[str], path: Path = TRACK_RECORD) -> None:
    """Add a row to the part of the track record that is about faults in real processes."""
    _insert(row, "## Faults in real processes", _FAULTS_HEAD, path)


_ENGINES_COLUMNS = (
    *("when (UTC)", "commit", "machine", "engine", "fault", "times", "moved: streamed + whole", "exact"),
    *("gap median", "gap max", "processes left behind", "prompts handed over"),
)
_ENGINES_HEAD = f"""
## Engines

`make proof-engines` appends here: two workers of a real engine (SmolLM2-135M, float32, CPU), four streamed and four
whole answers at once by the `openai` client, and one worker hurt at a random token of a stream. *Split*
(`ARGS=--split`) means two decode workers and one that computes prompts, their blocks going over NIXL; a prefill leg
is hurt while it computes. Every text, finish reason and token count is compared with the undisturbed run's. A gap is
the longest silence of a stream that moved; it contains the prefill on the other worker and, for a stopped worker, the
time until that is noticed.

| {" | ".join(_ENGINES_COLUMNS)} |
|{"---|" * len(_ENGINES_COLUMNS)}
"""


def append_engines(row: list[str], path: Path = TRACK_RECORD) -> None:
    """Add a row to the engines."""
    _insert(row, "## Engines", _ENGINES_HEAD, path)


def append(row: list[str], path: Path = TRACK_RECORD) -> None:
    """Add a row to the kills."""
    _insert(row, "# Track record", _HEAD, path)


def _insert(row: list[str], heading: str, head: str, path: Path) -> None:
    """Add a row, with the present time, behind the last one of its part; a part that is not there yet is begun."""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    text = path.read_text() if path.exists() else ""
    if not re.search(rf"^{heading}$", text, re.MULTILINE):
        text += head
    before, mark, part = text.partition(f"{heading}\n")
    table, following, after = part.partition("\n## ")
    path.write_text(f"{before}{mark}{table.rstrip()}\n| {' | '.join([now, *row])} |\n{following}{after}")
