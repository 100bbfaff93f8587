"""Ten minutes of everything at once. ``python -m tests.proof.soak --help``.

``holdfast serve`` with two frontends on one port and three mock workers, as its own processes. Clients stream, ask
for whole answers, on kept connections and new ones, and leave in the middle. Meanwhile workers are killed, frozen,
drained and restarted one by one, and a frontend is drained. At the end nothing may be lost, wrong or held, and
memory and open files of what lived all the time must be flat. Prints a table and adds a row to
``docs/track-record.md``; exits with 1 when a bound is not kept.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import re
import signal
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

from holdfast.local import http
from tests.e2e.load import CHAT, Load
from tests.e2e.truth import Ask
from tests.proof import record

WORKERS, FRONTENDS = 3, 2
FAULTS = ("kill", "freeze", "drain", "cancel-storm", "frontend-drain", "rolling")
WEIGHTS = (4, 3, 3, 3, 1, 1)
FROZEN_SECONDS = (0.5, 4.0)
READY_SECONDS = 90.0
SAMPLE_SECONDS = 1.0
RSS_GROWTH, RSS_SLACK_MB, FILES_SLACK = 0.10, 12.0, 12
HELD = re.compile(r"inflight|active_requests|queued_requests|_leases|disconnected_clients|pool_active|waiting_sequences"
                  r"|running_sequences|stage_requests|active_tasks|prefill_tokens")  # fmt: skip
SETTINGS = {
    "DYN_WORKER_SHUTDOWN_INFLIGHT_TIMEOUT_SECS": "1",
    "DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": "20",
    "DYN_MIGRATION_LIMIT": "12",
    "DYN_SERVE_RESTART_INTENSITY": "100000",
    "DYN_LOG": "error",
}
"""A frontend's grace is longer than any answer, so that none may be lost; faults come faster than in real life."""


class Sample(NamedTuple):
    """One look at a process."""

    at: float
    rss_mb: float
    files: int


class Soak:
    """The cluster, what is done to it, and what is measured."""

    def __init__(self, serve: asyncio.subprocess.Process, ready: dict[str, Any], rng: random.Random):
        self.serve = serve
        self.url = str(ready["base_urls"][0]).removesuffix("/v1")
        self.frontends = [str(url) for url in ready["frontend_urls"]]
        self.rng = rng
        self.samples: dict[str, list[Sample]] = {"supervisor": [], "frontend": [], "worker": []}
        self.faults: Counter[str] = Counter()
        self.cancelled = 0
        slots = {slot["slot"]: slot["pid"] for slot in ready["slots"]}
        self._watched = {"supervisor": serve.pid, "frontend": slots["frontend-0"], "worker": slots["worker-0"]}
        """What nobody kills; the worker is frozen now and then."""
        self._doomed: set[int] = set()

    # who is there

    async def workers(self) -> list[int]:
        """Return the pids of workers that the first frontend uses."""
        with contextlib.suppress(Exception):
            instances = (await http.get(f"{self.frontends[0]}/health")).json()["instances"]
            used = [i["pid"] for i in instances if i["state"] == "usable" and not i["draining"]]
            return [pid for pid in used if pid not in self._doomed]
        return []

    async def whole(self) -> None:
        """Wait until every frontend uses all workers."""
        async with asyncio.timeout(READY_SECONDS):
            for url in self.frontends:
                while True:
                    with contextlib.suppress(Exception):
                        usable = (await http.get(f"{url}/health")).json()["models"]
                        if usable.get("mock") == WORKERS and len(await self.workers()) == WORKERS:
                            break
                    await asyncio.sleep(0.1)

    # what happens

    async def faults_until(self, until: float, every: float) -> None:
        """Do something every few seconds; two workers are always left."""
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            await asyncio.sleep(self.rng.uniform(0.5, 1.5) * every)
            kind = self.rng.choices(FAULTS, WEIGHTS)[0]
            there = await self.workers()
            if len(there) < WORKERS and kind in ("kill", "freeze", "drain", "rolling"):
                continue
            self.faults[kind] += 1
            await self._do(kind, there)

    async def _do(self, kind: str, there: list[int]) -> None:
        mortal = [pid for pid in there if pid != self._watched["worker"]]
        if kind == "kill":
            self._end(self.rng.choice(mortal), signal.SIGKILL)
        elif kind == "drain":
            self._end(self.rng.choice(mortal), signal.SIGTERM)
        elif kind == "freeze":
            await self._freeze(self.rng.choice(there))
        elif kind == "cancel-storm":
            await asyncio.gather(*(self._leave_early() for _ in range(10)))
        elif kind == "rolling":
            # the watched worker stays: one of the others makes room, then the next
            for pid in mortal:
                self._end(pid, signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    await self.whole()
        elif kind == "frontend-drain":
            await self._drain_frontend()

    def _end(self, pid: int, number: signal.Signals) -> None:
        self._doomed.add(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    async def _freeze(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(self.rng.uniform(*FROZEN_SECONDS))
            finally:
                os.kill(pid, signal.SIGCONT)

    async def _drain_frontend(self) -> None:
        """The second frontend makes room for a new one; the first one is watched."""
        for process in psutil.Process(self.serve.pid).children():
            with contextlib.suppress(psutil.Error):
                if "frontend" in process.cmdline() and process.pid != self._watched["frontend"]:
                    process.send_signal(signal.SIGTERM)

    async def _leave_early(self) -> None:
        """Ask for much and go away in the middle."""
        ask = Ask(content=f"leaving {self.rng.random()}", max_tokens=400)
        body = {**ask.body(), "model": "mock", "stream": True}
        pieces = self.rng.randint(0, 30)
        with contextlib.suppress(httpx.HTTPError):
            async with (
                httpx.AsyncClient(base_url=self.url, timeout=30) as client,
                client.stream("POST", CHAT, json=body) as answer,
            ):
                async for _ in answer.aiter_lines():
                    pieces -= 1
                    if pieces < 0:
                        break
        self.cancelled += 1

    # what is measured

    async def watch(self) -> None:
        """Look at memory and open files of what lives all the time; until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            for name, pid in self._watched.items():
                self.samples[name].append(_look(pid, loop.time()))
            await asyncio.sleep(SAMPLE_SECONDS)

    async def held(self) -> dict[str, float]:
        """Return every gauge of what is in flight, waiting or leased that is not zero, over all processes."""
        found: dict[str, float] = {}
        pages = {url: f"{url}/metrics" for url in self.frontends}
        for process in psutil.Process(self.serve.pid).children():
            if "worker" in process.cmdline():
                pages[f"worker {process.pid}"] = f"http://{await _status_address(process)}/metrics"
        assert len(pages) == FRONTENDS + WORKERS
        for who, page in pages.items():
            for line in (await http.get(page)).body.decode().splitlines():
                name = line.partition("{")[0].partition(" ")[0]
                if not line.startswith("#") and HELD.search(name) and not name.endswith(("_total", "_bucket", "_sum")):
                    number = float(line.rsplit(" ", 1)[1])
                    if number and not name.endswith(("_count", "_created", "_capacity")):
                        found[f"{who} {line.rsplit(' ', 1)[0]}"] = number
        return found

    async def at_rest(self, within: float = 20.0) -> dict[str, float]:
        """Wait until nothing is held; returns what still is after that time."""
        loop = asyncio.get_running_loop()
        until = loop.time() + within
        while (held := await self.held()) and loop.time() < until:  # noqa: ASYNC110  other processes have no event
            await asyncio.sleep(0.25)
        return held


async def _status_address(process: psutil.Process) -> str:
    """Return the address of the status server: the listening port of the process that answers /live."""
    for connection in process.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN:
            address = f"127.0.0.1:{connection.laddr.port}"
            with contextlib.suppress(Exception):
                if (await http.get(f"http://{address}/live", 1.0)).status == 200:
                    return address
    raise LookupError(f"worker {process.pid} has no status server")


def _look(pid: int, now: float) -> Sample:
    process = psutil.Process(pid)
    return Sample(now, process.memory_info().rss / 2**20, process.num_fds())


@contextlib.asynccontextmanager
async def serving(seed: int, step_ms: float) -> AsyncIterator[Soak]:
    """Run the cluster for the length of the block."""
    with tempfile.TemporaryDirectory(prefix="holdfast-soak-") as root:
        flags = ("--frontends", str(FRONTENDS), "--workers", str(WORKERS), "--mock-step-ms", str(step_ms))
        env = {k: v for k, v in os.environ.items() if not k.startswith("DYN_")}
        serve = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "holdfast", "serve", "--json", "--engine", "mock", "--http-port", "0", *flags),
            env={**env, **SETTINGS, "DYN_FILE_KV": str(Path(root) / "kv")},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=(Path(root) / "serve.log").open("wb"),
        )
        assert serve.stdout is not None
        try:
            async with asyncio.timeout(READY_SECONDS):
                ready = json.loads(await serve.stdout.readline())
            soak = Soak(serve, ready, random.Random(seed))
            await soak.whole()
            yield soak
        finally:
            if serve.returncode is None:
                serve.terminate()
            try:
                await asyncio.wait_for(serve.wait(), 60)
            except TimeoutError:
                serve.kill()


class Result(NamedTuple):
    """Everything that the table shows."""

    seconds: float
    answered: int
    moved: int
    failed: list[str]
    cancelled: int
    faults: Counter[str]
    held: dict[str, float]
    samples: dict[str, list[Sample]]
    exit_code: int | None

    def growth(self, name: str) -> tuple[float, float, int, int]:
        """Return RSS in MB and open files, of the second and the last fifth (medians); the first one warms up."""
        samples = self.samples[name]
        fifth = max(1, len(samples) // 5)
        early, late = samples[fifth : 2 * fifth] or samples, samples[-fifth:]
        return (
            statistics.median(s.rss_mb for s in early),
            statistics.median(s.rss_mb for s in late),
            int(statistics.median(s.files for s in early)),
            int(statistics.median(s.files for s in late)),
        )

    def problems(self) -> list[str]:
        """Return which bounds were not kept."""
        found = list(self.failed[:20])
        found += [f"held at rest: {name} = {value:g}" for name, value in self.held.items()]
        for name in self.samples:
            rss, rss_late, files, files_late = self.growth(name)
            if rss_late > rss * (1 + RSS_GROWTH) + RSS_SLACK_MB:
                found.append(f"memory of the {name} grew from {rss:.0f} to {rss_late:.0f} MB")
            if files_late > files + FILES_SLACK:
                found.append(f"open files of the {name} grew from {files} to {files_late}")
        if self.exit_code != 0:
            found.append(f"serve ended with {self.exit_code}")
        return found


async def run(seconds: float, seed: int, *, clients: int = 12, every: float = 3.0) -> Result:
    """Soak for so long; returns what was seen."""
    loop = asyncio.get_running_loop()
    async with serving(seed, step_ms=5.0) as soak:
        watching = asyncio.ensure_future(soak.watch())
        seen = Load(soak.url, (5, 20, 60, 150, 300), pause=0.02)
        began = loop.time()
        async with asyncio.TaskGroup() as tasks:
            for number in range(clients):
                tasks.create_task(seen.client(stream=number % 3 != 0, keep=number % 4 < 2))
            try:
                await soak.faults_until(began + seconds, every)
                await soak.whole()
            finally:
                seen.stop()
        took = loop.time() - began
        held = await soak.at_rest()
        watching.cancel()
        await asyncio.wait([watching])
        soak.serve.terminate()
        code = await asyncio.wait_for(soak.serve.wait(), 60)
    return Result(took, seen.answered, seen.moved, seen.failed, soak.cancelled, soak.faults, held, soak.samples, code)


def table(result: Result, seed: int) -> list[tuple[str, str]]:
    """Return the rows of the report."""
    rows = [
        ("commit", record.commit()),
        ("machine", record.machine()),
        ("seed", str(seed)),
        ("duration", f"{result.seconds:.0f} s"),
        ("answers, all exact", f"{result.answered}"),
        ("of them moved", f"{result.moved}"),
        ("lost or wrong", f"{len(result.failed)}"),
        ("left early by clients", f"{result.cancelled}"),
        ("faults", ", ".join(f"{count} {kind}" for kind, count in sorted(result.faults.items())) or "none"),
        ("gauges not zero at rest", f"{len(result.held)}"),
    ]
    for name in result.samples:
        rss, rss_late, files, files_late = result.growth(name)
        rows.append((f"{name}: memory, files", f"{rss:.0f} → {rss_late:.0f} MB, {files} → {files_late}"))
    return rows


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--every", type=float, default=3.0, help="mean seconds between two faults")
    parser.add_argument("--no-record", action="store_true", help="leave docs/track-record.md alone")
    args = parser.parse_args()
    result = asyncio.run(run(args.seconds, args.seed, clients=args.clients, every=args.every))
    rows = table(result, args.seed)
    problems = result.problems()
    for name, value in rows:
        print(f"{name:<28}{value}")
    for problem in problems:
        print(f"NOT KEPT  {problem}")
    if not args.no_record and not math.isnan(result.seconds):
        cells = [value for name, value in rows if name != "commit" and name != "machine"]
        record.append_soak([rows[0][1], rows[1][1], *cells, "no" if problems else "yes"])
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
