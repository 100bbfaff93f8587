"""A real haproxy, with the configuration that is shipped, in front of two frontends that are restarted one by one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from holdfast.local.ports import free_port
from tests.e2e.load import load
from tests.e2e.support import cluster
from tests.patience import within

pytestmark = [pytest.mark.operations, pytest.mark.e2e]

CONFIG = Path(__file__).resolve().parents[2] / "deploy" / "haproxy" / "haproxy.cfg"
ROUNDS = 3


def haproxy() -> str:
    """Return the program; without it, fail in CI and skip elsewhere."""
    found = shutil.which("haproxy") or next((p for p in ("/usr/sbin/haproxy",) if Path(p).exists()), None)
    if found is None:
        why = "haproxy is not installed; run tools/install_operations.sh"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(why)
        pytest.skip(why)
    return found


async def run(*argv: str, env: dict[str, str], log: Path) -> asyncio.subprocess.Process:
    with log.open("a") as file:
        return await asyncio.create_subprocess_exec(*argv, env={**os.environ, **env}, stdout=file, stderr=file)


@contextlib.asynccontextmanager
async def balanced(root: Path, ports: list[int]) -> AsyncIterator[str]:
    """haproxy in front of these ports; yields its address."""
    port = free_port()
    env = {"HOLDFAST_BIND": f"127.0.0.1:{port}"}
    env |= {f"HOLDFAST_FRONTEND_{i}": f"127.0.0.1:{one}" for i, one in enumerate(ports, 1)}
    process = await run(haproxy(), "-db", "-f", str(CONFIG), env=env, log=root / "haproxy.log")
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), within(5))


async def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        async with httpx.AsyncClient(timeout=5) as http:
            return (await http.get(f"{url}/health")).status_code == 200
    return False


async def until_healthy(url: str) -> None:
    async with asyncio.timeout(within(20)):
        while not await answers(url):  # noqa: ASYNC110  another process has no event to wait for
            await asyncio.sleep(0.05)


async def test_the_configuration_is_valid() -> None:
    process = await asyncio.create_subprocess_exec(haproxy(), "-c", "-f", str(CONFIG), stderr=asyncio.subprocess.PIPE)
    _, err = await asyncio.wait_for(process.communicate(), within(10))
    assert process.returncode == 0, err.decode()
    assert b"[WARNING]" not in err, err.decode()


async def test_rolling_restarts_of_two_frontends_fail_no_request(tmp_path: Path) -> None:
    """Whole answers and streams shorter than the grace, on kept connections and on new ones."""
    ports = [free_port(), free_port()]
    async with cluster(tmp_path, workers=2) as up:

        async def start(port: int) -> asyncio.subprocess.Process:
            argv = (sys.executable, "-m", "holdfast", "frontend", "--http-port", str(port))
            env = {**up.local.plan.env, "DYN_HTTP_DRAIN_NOTICE_SECS": "2"}
            return await run(*argv, env=env, log=tmp_path / f"frontend-{port}.log")

        running = {port: await start(port) for port in ports}
        try:
            for port in ports:
                await until_healthy(f"http://127.0.0.1:{port}")
            async with balanced(tmp_path, ports) as url:
                await until_healthy(url)
                async with load(url, clients=8, tokens=(10, 40, 120)) as seen:
                    for port in ports * ROUNDS:
                        running[port].send_signal(signal.SIGTERM)
                        assert await asyncio.wait_for(running[port].wait(), within(15)) == 0, "nothing was cut"
                        running[port] = await start(port)
                        await until_healthy(f"http://127.0.0.1:{port}")
                        await asyncio.sleep(1.0)  # haproxy's own check (inter, rise) has no event either
            print(f"{ROUNDS * 2} restarts: {seen.answered} answers, {len(seen.failed)} failed")
            assert seen.failed == []
            assert seen.answered > 50 * ROUNDS
        finally:
            for process in running.values():
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                await asyncio.wait_for(process.wait(), within(15))


async def test_a_killed_frontend_costs_only_the_answers_that_had_begun(tmp_path: Path) -> None:
    """kill -9: what was not answered yet is asked of the other one; requests afterwards do not notice."""
    ports = [free_port(), free_port()]
    async with cluster(tmp_path, workers=2) as up:
        argv = (sys.executable, "-m", "holdfast", "frontend", "--http-port")
        env = up.local.plan.env
        both = [await run(*argv, str(port), env=env, log=tmp_path / "frontends.log") for port in ports]
        try:
            for port in ports:
                await until_healthy(f"http://127.0.0.1:{port}")
            async with balanced(tmp_path, ports) as url:
                await until_healthy(url)
                both[0].kill()
                await both[0].wait()
                async with load(url, clients=4, tokens=(10,)) as seen:
                    await asyncio.sleep(3.0)
            assert seen.failed == []
            assert seen.answered > 20
        finally:
            for process in both:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                await asyncio.wait_for(process.wait(), within(15))
