"""Real router, worker and frontend processes of one namespace, found through a directory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from holdfast.local.ports import free_port
from tests.patience import within

MOCK = ("--engine", "mock", "--mock-step-ms", "5")


class Processes:
    """What a test starts; everything is stopped at the end."""

    def __init__(self, root: Path):
        self.root = root
        self.env = {**os.environ, "DYN_FILE_KV": str(root / "discovery")}
        self._running: list[asyncio.subprocess.Process] = []

    async def start(self, *words: str) -> asyncio.subprocess.Process:
        """Start ``holdfast …``."""
        log = (self.root / f"{words[0]}-{len(self._running)}.log").open("wb")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "holdfast", *words, env=self.env, stderr=log, stdout=log
        )
        log.close()
        self._running.append(process)
        return process

    async def frontend(self, *words: str) -> tuple[asyncio.subprocess.Process, str]:
        """Start a frontend; returns it and its URL."""
        port = free_port()
        process = await self.start("frontend", "--http-port", str(port), *words)
        return process, f"http://127.0.0.1:{port}"

    async def router(self, *words: str) -> tuple[asyncio.subprocess.Process, str]:
        """Start a router; returns it and the URL of its status server."""
        port = free_port()
        process = await self.start("router", "--system-port", str(port), *words)
        return process, f"http://127.0.0.1:{port}"

    async def close(self) -> None:
        """Stop everything."""
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        for process in self._running:
            await process.wait()


@contextlib.asynccontextmanager
async def processes(root: Path) -> AsyncIterator[Processes]:
    """Run processes for the length of the block."""
    made = Processes(root)
    try:
        yield made
    finally:
        await made.close()


async def answers(url: str, status: int = 200) -> dict[str, Any]:
    """Wait until a URL answers with that status; returns its JSON."""
    async with httpx.AsyncClient() as http, asyncio.timeout(within(30)):
        while True:
            with contextlib.suppress(httpx.HTTPError):
                found = await http.get(url)
                if found.status_code == status:
                    return dict(found.json())
            await asyncio.sleep(0.02)


async def ask(url: str, name: str, **question: Any) -> httpx.Response:
    """POST a question."""
    async with httpx.AsyncClient() as http:
        return await http.post(f"{url}/{name}", json=question, timeout=within(5))


async def metric(url: str, name: str, **labels: str) -> float:
    """Return the sum of a metric over the series with these labels."""
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"{url}/metrics", timeout=within(5))).text
    lines = [line for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] == name]
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(one in line for one in wanted))
