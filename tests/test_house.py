"""House rules that no linter knows: determinism, size, docstrings, nothing unfinished, nothing of one machine.

An exception names the file and its reason here, so that adding one is a visible decision.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src" / "holdfast").rglob("*.py"))
LONG = 400
LONGEST = 450
LONG_FILES = 2
"""Files are around 200 lines and rarely over 400: so many may be, and none over 450."""

CLOCKS = {"time.time", "time.monotonic", "time.perf_counter", "time.time_ns", "time.monotonic_ns", "time.sleep"}
CLOCKS |= {"datetime.now", "datetime.utcnow", "datetime.datetime.now"}
STARTS_TASK = re.compile(r"(?<!^tasks)(?<!^group)\.(create_task|ensure_future)$")
"""Any way of starting a task but a TaskGroup's, which is called ``tasks`` or ``group`` here."""

CLOCKS_ALLOWED = {
    "local/sentinel.py": "a script of its own, without an event loop",
    "cli/": "shows elapsed time to people",
    "engines/": "engines compute in threads of their own",
    "runtime/discovery/file.py": "leases are kept by a thread of their own, so that a busy loop does not lose them",
    "sim/campaign.py": "says how much of a processor's time each universe took; no universe sees it",
    "sim/shrink.py": "gives up after so much real time, between universes",
    "health/listener.py": "probes are answered by a thread of their own, so that a hung loop shows",
    "health/status.py": "the same thread reports how long the process has been up",
    "telemetry/otlp.py": "spans carry calendar time",
}
TASKS_ALLOWED = {
    "cli/serve.py": "one wait that is raced against the supervisor's task, awaited or cancelled in place",
    "engines/driven.py": "a task per sequence and the adapter's helpers, held until their end and cancelled by close",
    "engines/mock/rendezvous.py": "a connection per leg that waits, held until its end and cancelled by close",
    "engines/simple.py": "a generator per sequence, held until its end and cancelled by close",
    "local/cluster.py": "the supervisor's task lives as long as an async context manager, which awaits it",
    "runtime/api.py": "the program's main is raced against a signal, both are awaited or cancelled in place",
    "runtime/connector.py": "links that close are held, their failures logged, and close waits for them",
    "runtime/link.py": "the bulk connection's task is held by the link and cancelled by its close",
    "runtime/pool.py": "the pool's own task, from start to close",
    "runtime/serving.py": "one task per incoming call, held with its context until it has ended",
    "sim/hosts.py": "a simulated process's main task lives as long as its host",
    "sim/rollout.py": "a restart that runs beside the looks at it; its result is taken in place",
    "sim/universe.py": "the universe's own main task, which the loop runs to its end",
    "sim/world.py": "the harness's own tasks live as long as their universe",
    "worker/process.py": "the watches over the engine, cancelled and awaited in place by `run`",
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT / "src" / "holdfast").as_posix()


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def found(path: Path, names: set[str], allowed: dict[str, str]) -> list[str]:
    if any(relative(path).startswith(place) for place in allowed):
        return []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [f"{relative(path)}:{line}: {name}" for line, name in calls(tree) if name in names]


def test_time_comes_from_the_running_loop() -> None:
    assert [hit for path in SOURCES for hit in found(path, CLOCKS, CLOCKS_ALLOWED)] == []


def test_no_task_is_left_to_itself() -> None:
    hits = []
    for path in SOURCES:
        if relative(path) not in TASKS_ALLOWED:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            hits += [f"{relative(path)}:{line}: {name}" for line, name in calls(tree) if STARTS_TASK.search(name)]
    assert hits == []


def test_randomness_is_injected() -> None:
    hits = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, name in calls(tree):
            bare = name.startswith("random.") and name not in {"random.Random", "random.SystemRandom"}
            if bare or name in {"uuid4", "uuid.uuid4", "uuid1", "uuid.uuid1", "os.urandom"}:
                hits.append(f"{relative(path)}:{line}: {name}")
    assert hits == []


ADDRESSED = re.compile(r"\bset\[(asyncio\.(Event|Future|Condition)|Callable)\b")
"""Sets of these are in the order of addresses: whoever goes through one does it differently in every run."""


def test_nothing_is_done_in_the_order_of_addresses() -> None:
    hits = []
    for path in SOURCES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if ADDRESSED.search(line):
                hits.append(f"{relative(path)}:{number}: {line.strip()}; a dict keeps the order of coming")
    assert hits == []


def test_files_stay_readable_in_one_sitting() -> None:
    lengths = {relative(p): len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCES}
    long = {name: n for name, n in lengths.items() if n > LONG}
    assert len(long) <= LONG_FILES, long
    assert {name: n for name, n in long.items() if n > LONGEST} == {}


def test_every_module_says_what_it_is_for() -> None:
    silent = []
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        if source.strip() and not ast.get_docstring(ast.parse(source)):
            silent.append(relative(path))
    assert silent == []


def tracked() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: there is no list of files to look at")
    names = [name for name in listed.stdout.decode().split("\0") if name]
    return [ROOT / name for name in names if (ROOT / name).is_file() and ROOT / name != Path(__file__)]


UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX)\b")
ONE_MACHINE = re.compile(
    r"(?<![\w.])/((work|root|home/\w+)/|tmp/\w*venv)|--(extra-)?index-url\s+\S+|pypi\.\w+\.\w+/simple"
)


@pytest.mark.parametrize(("pattern", "what"), [(UNFINISHED, "unfinished"), (ONE_MACHINE, "of one machine")])
def test_nothing_unfinished_and_nothing_of_one_machine(pattern: re.Pattern[str], what: str) -> None:
    hits = []
    for path in tracked():
        if path.suffix not in {".py", ".md", ".toml", ".lock", ".in", ".sh", ".yaml", ".yml", ".svg", ""}:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                hits.append(f"{path.relative_to(ROOT)}:{number}: {what}: {line.strip()[:100]}")
    assert hits == []
