"""A real Prometheus and a real Alertmanager on free loopback ports, with a webhook that remembers what it was told.

The configuration is the committed one. What differs, so that a test needs seconds: intervals, ``for:``, and where
Alertmanager and the webhook listen.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Any

import httpx

from holdfast.local.ports import free_port
from tests.observability.binaries import ALERTMANAGER, HERE, binary

SECOND = "1s"
HOST = "127.0.0.1"


class Webhook:
    """Receives Alertmanager's notifications."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        """(path, notification), oldest first."""
        self.port = free_port(HOST)
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._answer, HOST, self.port)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    def alerts(self, path: str, status: str) -> dict[str, dict[str, Any]]:
        """Return the alerts that came to a receiver with this status, by name."""
        found = [a for at, call in self.calls if at == path for a in call["alerts"] if a["status"] == status]
        return {alert["labels"]["alertname"]: alert for alert in found}

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = int(re.search(r"(?im)^content-length: (\d+)", head).group(1))  # type: ignore[union-attr]
            body = json.loads(await reader.readexactly(length))
            self.calls.append((head.split(" ")[1], body))
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            await writer.drain()
        writer.close()


class Stack:
    """The two servers, and how to ask them."""

    def __init__(self, root: Path, webhook: Webhook):
        self.root = root
        self.webhook = webhook
        self.port, self.alert_port = free_port(HOST), free_port(HOST)
        self.http = httpx.AsyncClient(base_url=f"http://{HOST}:{self.port}", timeout=30)

    async def query(self, expr: str) -> list[dict[str, Any]]:
        """Return the result of an instant query; an error of Prometheus fails the test."""
        return await self._ask("/api/v1/query", {"query": expr})

    async def over_time(self, expr: str, start: float, end: float) -> list[dict[str, Any]]:
        """Return the result of a range query in steps of a second, as a dashboard asks."""
        return await self._ask("/api/v1/query_range", {"query": expr, "start": start, "end": end, "step": 1})

    async def value(self, expr: str) -> float | None:
        """Return the only number that a query yields, or None."""
        result = await self.query(expr)
        return float(result[0]["value"][1]) if len(result) == 1 else None

    async def rules(self) -> list[dict[str, Any]]:
        """Return all rules with their health."""
        answer = (await self.http.get("/api/v1/rules")).json()
        return [rule for group in answer["data"]["groups"] for rule in group["rules"]]

    async def _ask(self, path: str, form: dict[str, Any]) -> list[dict[str, Any]]:
        answer = (await self.http.post(path, data=form)).json()
        assert answer["status"] == "success", f"{form['query']}\n{answer.get('error')}"
        return list(answer["data"]["result"])


def hurried(text: str) -> str:
    """Return a configuration with all waiting times of a second, or less."""
    text = re.sub(r"(?m)^(\s+)for: \S+$", rf"\1for: {SECOND}", text)
    text = re.sub(r"(scrape_interval|scrape_timeout|evaluation_interval|refresh_interval): \S+", rf"\1: {SECOND}", text)
    text = re.sub(r"(?m)^(\s+)interval: \S+$", rf"\1interval: {SECOND}", text)
    return re.sub(r"group_(wait|interval): \S+", rf"group_\1: {SECOND}", text)


def configure(stack: Stack) -> None:
    """Write the committed configuration with this stack's ports into its directory."""
    shutil.copytree(HERE / "rules", stack.root / "rules")
    for path in (stack.root / "rules").iterdir():
        path.write_text(hurried(path.read_text(encoding="utf-8")), encoding="utf-8")
    main = hurried((HERE / "prometheus.yml").read_text(encoding="utf-8"))
    main = main.replace(f"{HOST}:9093", f"{HOST}:{stack.alert_port}").replace(f"{HOST}:9090", f"{HOST}:{stack.port}")
    (stack.root / "prometheus.yml").write_text(main, encoding="utf-8")
    alerts = hurried((HERE / "alertmanager.yml").read_text(encoding="utf-8"))
    alerts = alerts.replace(f"{HOST}:9911", f"{HOST}:{stack.webhook.port}")
    (stack.root / "alertmanager.yml").write_text(alerts, encoding="utf-8")


@contextlib.asynccontextmanager
async def running(root: Path) -> AsyncIterator[Stack]:
    """Run both servers and the webhook for the length of the block; targets come from ``root/targets``."""
    webhook = Webhook()
    stack = Stack(root, webhook)
    configure(stack)
    await webhook.start()
    with (root / "stack.log").open("w") as log:
        started = _start(stack, log)
        try:
            await _ready(stack, started)
            yield stack
        finally:
            await stack.http.aclose()
            webhook.close()
            await asyncio.to_thread(_stop, started)


def _start(stack: Stack, log: IO[str]) -> list[subprocess.Popen[bytes]]:
    root = stack.root
    prometheus = (
        binary("prometheus"),
        f"--config.file={root}/prometheus.yml",
        f"--storage.tsdb.path={root}/data",
        f"--web.listen-address={HOST}:{stack.port}",
        "--rules.alert.resend-delay=2s",  # Alertmanager may be the last to be ready
        "--log.level=warn",
    )
    alertmanager = (
        binary(*ALERTMANAGER),
        f"--config.file={root}/alertmanager.yml",
        f"--storage.path={root}/alerts",
        f"--web.listen-address={HOST}:{stack.alert_port}",
        "--cluster.listen-address=",
        "--log.level=warn",
    )
    return [subprocess.Popen(argv, stdout=log, stderr=log, cwd=root) for argv in (prometheus, alertmanager)]


async def _ready(stack: Stack, started: list[subprocess.Popen[bytes]]) -> None:
    urls = [f"http://{HOST}:{port}/-/ready" for port in (stack.port, stack.alert_port)]
    async with asyncio.timeout(60):
        for url in urls:
            while not await _answers(stack.http, url):
                ended = [p.args for p in started if p.poll() is not None]
                assert not ended, f"{ended} ended:\n{(stack.root / 'stack.log').read_text()[-3000:]}"
                await asyncio.sleep(0.1)


async def _answers(http: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await http.get(url)).status_code == 200
    except httpx.HTTPError:
        return False


def _stop(started: list[subprocess.Popen[bytes]]) -> None:
    for process in started:
        process.send_signal(signal.SIGTERM)
    for process in started:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)
