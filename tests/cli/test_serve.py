"""`holdfast serve` and `holdfast demo` as whole process families: ready, restarted, stopped, killed, nothing left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.local import http
from holdfast.local.ports import free_port

pytestmark = pytest.mark.e2e
DEADLINE = 60.0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found += [int(entry.name), *descendants(int(entry.name))]
    return found


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


class Serving:
    """A running `holdfast serve`."""

    def __init__(self, process: asyncio.subprocess.Process, ready: dict[str, Any]):
        self.process = process
        self.ready = ready
        self.family = [process.pid, *descendants(process.pid)]

    @property
    def url(self) -> str:
        return str(self.ready["base_urls"][0]).removesuffix("/v1")


@contextlib.asynccontextmanager
async def started(directory: Path, *argv: str) -> AsyncIterator[asyncio.subprocess.Process]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("DYN_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "holdfast", *argv),
        env={**env, "DYN_FILE_KV": str(directory / "kv")},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def serving(directory: Path, *flags: str) -> AsyncIterator[Serving]:
    argv = ("serve", "--json", "--engine", "mock", "--http-port", "0", *flags)
    async with started(directory, *argv) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        reading = asyncio.create_task(process.stderr.read())  # or its pipe would fill
        async with asyncio.timeout(DEADLINE):
            line = await process.stdout.readline()
        if not line:
            pytest.fail((await reading).decode())
        yield Serving(process, json.loads(line))
        await asyncio.wait({reading}, timeout=DEADLINE)


async def test_sigterm_stops_everything_in_order(tmp_path: Path) -> None:
    async with serving(tmp_path) as cluster:
        assert {slot["slot"] for slot in cluster.ready["slots"]} == {"frontend-0", "worker-0", "worker-1"}
        assert len(cluster.family) == 5, "serve, one frontend, two workers, the sentinel"
        models = (await http.get(f"{cluster.url}/v1/models")).json()
        assert [model["id"] for model in models["data"]] == ["mock"]
        cluster.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(cluster.process.wait(), DEADLINE) == 0
        assert not [pid for pid in cluster.family if alive(pid)]
    assert not list((tmp_path / "kv").glob("*.json")), "nothing is left in discovery"


async def test_after_sigkill_of_serve_no_process_is_left(tmp_path: Path) -> None:
    async with serving(tmp_path, "--workers", "3") as cluster:
        assert len(cluster.family) == 6
        cluster.process.kill()
        await cluster.process.wait()
        await until(lambda: not [pid for pid in cluster.family if alive(pid)])


async def test_a_killed_frontend_comes_back_at_its_address(tmp_path: Path) -> None:
    async with serving(tmp_path, "--workers", "1") as cluster:
        pid = next(slot["pid"] for slot in cluster.ready["slots"] if slot["slot"] == "frontend-0")
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not alive(pid))
        async with asyncio.timeout(DEADLINE):
            while True:
                with contextlib.suppress(Exception):
                    if (await http.get(f"{cluster.url}/health", 1.0)).status == 200:
                        break
                await asyncio.sleep(0.05)
        cluster.process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(cluster.process.wait(), DEADLINE) == 0


async def test_two_frontends_have_an_address_each(tmp_path: Path) -> None:
    async with serving(tmp_path, "--workers", "1", "--frontends", "2", "--frontend-ports", "successive") as cluster:
        assert len(set(cluster.ready["base_urls"])) == 2
        for url in cluster.ready["base_urls"]:
            assert (await http.get(f"{url}/models")).json()["data"]
        cluster.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(cluster.process.wait(), DEADLINE) == 0


async def test_two_frontends_share_a_port_that_outlives_them(tmp_path: Path) -> None:
    """Killed or frozen, neither of them has connections refused: the other one, or the next process, takes them."""
    async with serving(tmp_path, "--workers", "1", "--frontends", "2") as cluster:
        assert len(cluster.ready["base_urls"]) == 1
        assert len(set(cluster.ready["frontend_urls"])) == 2
        pids = [slot["pid"] for slot in cluster.ready["slots"] if slot["slot"].startswith("frontend")]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for _ in range(20):
            assert (await http.get(f"{cluster.url}/live", DEADLINE)).status == 200
        assert not any(alive(pid) for pid in pids)
        cluster.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(cluster.process.wait(), DEADLINE) == 0


async def test_restart_replaces_every_process(tmp_path: Path) -> None:
    async with serving(tmp_path, "--frontends", "2") as cluster:
        before = {slot["slot"]: slot["pid"] for slot in cluster.ready["slots"]}
        async with started(tmp_path, "restart") as asked:
            out, err = await asyncio.wait_for(asked.communicate(), DEADLINE)
        assert asked.returncode == 0, err.decode()
        assert "workers: 2 of 2 replaced, done" in out.decode()
        assert "frontends: 2 of 2 replaced, done" in out.decode()
        assert not any(alive(pid) for pid in before.values())
        assert (await http.get(f"{cluster.url}/health")).json()["models"] == {"mock": 2}
        cluster.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(cluster.process.wait(), DEADLINE) == 0


async def test_on_ctrl_c_a_running_stream_finishes_before_anything_ends(tmp_path: Path) -> None:
    """Frontends drain first, so that workers are still there for what they have in hand."""
    async with serving(tmp_path, "--mock-step-ms", "5") as cluster:
        body = {"model": "mock", "stream": True, "max_tokens": 300, "messages": [{"role": "user", "content": "go on"}]}
        url = f"{cluster.url}/v1/chat/completions"
        events: list[dict[str, Any]] = []
        async with asyncio.timeout(DEADLINE), http.exchange("POST", url, body) as (status, head, reader):
            assert status == 200
            async for data in http.events(head, reader):
                if data == b"[DONE]":
                    break
                events.append(json.loads(data))
                if len(events) == 10:
                    cluster.process.send_signal(signal.SIGINT)
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert len(events) > 290
        assert await asyncio.wait_for(cluster.process.wait(), DEADLINE) == 0


async def test_restart_without_a_serve_says_so(tmp_path: Path) -> None:
    async with started(tmp_path, "restart", "workers") as asked:
        _, err = await asyncio.wait_for(asked.communicate(), DEADLINE)
    assert asked.returncode != 0
    assert "no 'holdfast serve'" in err.decode()


async def test_status_sees_the_cluster(tmp_path: Path) -> None:
    port = free_port()
    async with serving(tmp_path, "--http-port", str(port)) as cluster:
        async with started(tmp_path, "status", "--json", "--http-port", str(port)) as asked:
            out, _ = await asyncio.wait_for(asked.communicate(), DEADLINE)
        status = json.loads(out)
        assert asked.returncode == 0
        assert status["frontends"][0]["models"] == {"mock": 2}
        assert {worker["pid"] for worker in status["workers"]} == {
            slot["pid"] for slot in cluster.ready["slots"] if slot["slot"].startswith("worker")
        }
        slots = {name: state for name, state in status["supervisors"][0]["meta"].items() if "." not in name}
        assert slots == dict.fromkeys(("frontend-0", "worker-0", "worker-1"), "running")
        cluster.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(cluster.process.wait(), DEADLINE)


async def test_a_taken_port_names_its_owner(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        async with started(tmp_path, "serve", "--engine", "mock", "--http-port", str(port)) as process:
            _, err = await asyncio.wait_for(process.communicate(), DEADLINE)
    assert process.returncode == 1
    assert f"Port {port} on 127.0.0.1 is taken by pid {os.getpid()}" in err.decode()


async def test_a_model_that_does_not_exist_ends_serve_with_the_workers_own_words(tmp_path: Path) -> None:
    argv = ("serve", "--http-port", "0", "--engine", "llamacpp", "--model", str(tmp_path / "none.gguf"))
    async with started(tmp_path, *argv) as process:
        _, err = await asyncio.wait_for(process.communicate(), DEADLINE)
    text = err.decode()
    assert process.returncode == 1
    assert "could not be started" in text
    assert "none.gguf" in text
    assert text.count("Traceback") == 0


async def test_the_demo_proves_equality_and_leaves_nothing(tmp_path: Path) -> None:
    argv = ("demo", "--json", "--engine", "mock", "--mock-step-ms", "4", "--rounds", "2", "--seed", "5")
    async with started(tmp_path, *argv) as process:
        assert process.stdout is not None
        out, err = await asyncio.wait_for(process.communicate(), DEADLINE)
    assert process.returncode == 0, err.decode()
    report = json.loads(out)
    assert (report["exact"], len(report["rounds"]), report["seed"]) == (2, 2, 5)
    for one in report["rounds"]:
        assert one["sha256"] == one["expected_sha256"]
        assert one["attempts"] == 2
        assert one["gap_ms"] > 0
        assert not alive(one["killed_pid"])
