"""A whole frontend in this process: real HTTP over real sockets, real workers with the mock engine behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

import httpx
import msgspec

from holdfast.engines.mock import MockConfig, MockEngine
from holdfast.engines.mock.adapters import AbleMock
from holdfast.frontend.app import Frontend
from holdfast.frontend.config import FrontendConfig
from holdfast.frontend.metrics import FrontendMetrics
from holdfast.frontend.registry import ModelRegistry
from holdfast.frontend.server import Server, listen, make_server
from holdfast.models.store import ArtifactStore
from holdfast.requests.flusher import Flusher
from holdfast.requests.service import Services
from holdfast.routing.knowledge import PrefixKnowledge
from holdfast.runtime.discovery.mem import MemDiscovery, MemHub
from holdfast.runtime.pool import WorkerPool
from holdfast.runtime.shutdown import ShutdownBudget
from holdfast.runtime.transport import TcpTransport
from holdfast.worker.config import WorkerConfig
from holdfast.worker.process import WorkerProcess

T = TypeVar("T")
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


async def until(condition: Callable[[], T | Awaitable[T]], within: float = 10.0, every: float = 0.005) -> T:
    """Wait for a condition with a deadline; returns its first true value."""
    async with asyncio.timeout(within):
        while True:
            value: Any = condition()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return value
            await asyncio.sleep(every)


class Stack:
    """A frontend and its workers."""

    def __init__(self, config: FrontendConfig, mock: MockConfig):
        self.config = config
        self.mock = mock
        self.hub = MemHub()
        self.rng = random.Random(7)
        self.workers: dict[str, tuple[WorkerProcess, MockEngine]] = {}
        self.tasks: asyncio.TaskGroup
        self.frontend: Frontend
        self.pool: WorkerPool
        self.server: Server
        self.port = 0
        self.http: httpx.AsyncClient

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def add_worker(self, mock: MockConfig | None = None, **config: Any) -> WorkerProcess:
        """Start a worker in this process and wait until it is ready."""
        engine = AbleMock(mock or self.mock)
        settings = WorkerConfig(engine="mock", **{"shutdown": ShutdownBudget(shutdown_inflight_timeout=1.0), **config})
        worker = WorkerProcess(settings, engine, MemDiscovery(self.hub), self.rng)
        self.workers[worker.instance] = (worker, engine)
        self.tasks.create_task(worker.run())
        await worker.ready.wait()
        return worker

    async def remove_worker(self, worker: WorkerProcess) -> None:
        """Let a worker leave on purpose."""
        worker.stop()
        del self.workers[worker.instance]
        await until(lambda: self.pool.worker(worker.instance) is None)

    async def served(self, model: str = "mock") -> None:
        """Wait until the model can be used at once."""
        await until(lambda: model in self.frontend.registry.served() and self.pool.usable(model))

    async def at_rest(self) -> None:
        """Wait until nothing is held."""
        await until(
            lambda: not any(self.frontend.services.leases.sums().values()) and not self.frontend.generate.active
        )

    def count(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over all series with these labels."""
        total = 0.0
        for family in self.frontend.metrics.registry.collect():
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    total += sample.value
        return total

    def client(self, **options: Any) -> Client:
        return Client(self.port, **options)

    async def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        return await self.http.post(path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})


def fast() -> MockConfig:
    """Return a mock engine that steps as fast as the loop turns."""
    return MockConfig(step_ms=0.0)


@contextlib.asynccontextmanager
async def stack(workers: int = 1, mock: MockConfig | None = None, **config: Any) -> AsyncIterator[Stack]:
    """Run a frontend on a free port with so many workers."""
    built = Stack(FrontendConfig(**{"http_port": 0, "discovery_backend": "mem", **config}), mock or fast())
    async with asyncio.TaskGroup() as tasks:
        built.tasks = tasks
        sock = listen(built.config.http_host, built.config.http_port)
        built.port = sock.getsockname()[1]
        discovery = MemDiscovery(built.hub)
        await discovery.start()
        flusher = Flusher(time.monotonic_ns)
        pool = built.pool = WorkerPool(
            discovery, TcpTransport(), caller="test", rng=built.rng, namespace="dynamo", on_read_done=flusher.flush
        )
        metrics = FrontendMetrics(built.config.metrics)
        knowledge = PrefixKnowledge(built.config.knowledge)
        pool.subscribe(lambda kind, worker: knowledge.attach(worker) if kind == "added" else None)
        services = Services(
            built.config.requests,
            pool,
            flusher,
            metrics,
            rng=built.rng,
            mode=built.config.router_mode,
            knowledge=knowledge,
        )
        registry = ModelRegistry(pool, ArtifactStore())
        frontend = built.frontend = Frontend(built.config, services, pool, registry, metrics, knowledge=knowledge)
        server = built.server = make_server(frontend, built.config)
        await pool.start()
        loading = tasks.create_task(registry.run())
        serving = tasks.create_task(server.serve(sockets=[sock]))
        await until(lambda: server.started)
        built.http = httpx.AsyncClient(base_url=built.url, timeout=30)
        try:
            for _ in range(workers):
                await built.add_worker()
            if workers:
                await built.served()
            yield built
        finally:
            await built.http.aclose()
            frontend.end_all()
            server.should_exit = True
            await serving
            loading.cancel()
            for worker, _ in built.workers.values():
                worker.stop()
                worker.stop()
            services.close()
            await frontend.close()
            await pool.close()
            await discovery.close()


class Answer(NamedTuple):
    """One HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """Return the OpenAI error object."""
        return dict(self.json()["error"])

    @property
    def events(self) -> list[Any]:
        """Return the data events, ``[DONE]`` as None."""
        return events_of(self.body)


def events_of(body: bytes) -> list[Any]:
    found: list[Any] = []
    for block in body.split(b"\n\n"):
        if block.startswith(b"data: "):
            data = block.removeprefix(b"data: ")
            found.append(None if data == b"[DONE]" else json.loads(data))
        elif block:
            assert block.startswith(b":"), block
    return found


class Client:
    """A client that can be as rude as the test wants."""

    def __init__(self, port: int, *, receive_buffer: int = 0):
        self._port = port
        self._receive_buffer = receive_buffer
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def __aenter__(self) -> Client:
        sock = socket.socket()
        if self._receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
        limit = self._receive_buffer or 2**16
        self.reader, self.writer = await asyncio.open_connection(sock=sock, limit=limit)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def request(self, method: str = "GET", path: str = "/live", body: Any = None, **headers: str) -> None:
        """Send a whole request."""
        self.send(request_bytes(method, path, body, **headers))

    async def answer(self, within: float = 20.0, *, head: bool = False) -> Answer:
        """Read one response."""
        async with asyncio.timeout(within):
            status, headers = await self.head()
            if head or status in (204, 304):
                return Answer(status, headers, b"")
            return Answer(status, headers, await self.body(headers))

    async def head(self) -> tuple[int, dict[str, str]]:
        raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1"
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(": ")
            assert name == name.lower()
            assert name not in headers
            headers[name] = value
        return int(status), headers

    async def body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") == "chunked":
            assert "content-length" not in headers
            return b"".join([chunk async for chunk in self.chunks()])
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        assert headers.get("connection") == "close"
        return await self.reader.read()

    async def chunks(self) -> AsyncIterator[bytes]:
        while True:
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(size + 2)
            assert data.endswith(b"\r\n")
            if not size:
                return
            yield data[:-2]

    async def closed(self, within: float = 10.0) -> bytes:
        """Wait until the server has closed the connection; returns what it sent before."""
        async with asyncio.timeout(within):
            with contextlib.suppress(ConnectionResetError):
                return await self.reader.read()
            return b""

    def reset(self) -> None:
        """Drop the connection with a RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.writer.transport.abort()


def request_bytes(method: str, path: str, body: Any = None, *, version: str = "1.1", **headers: str) -> bytes:
    """Return a whole request; names of headers with underscores instead of dashes."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/{version}", "host: test"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body is not None:
        lines += ["content-type: application/json", f"content-length: {len(data)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def chat(content: str = "hi", **more: Any) -> dict[str, Any]:
    """Return the body of a chat request."""
    return {"model": "mock", "messages": [{"role": "user", "content": content}], "max_tokens": 8, "seed": 1, **more}


def text(prompt: Any = "hi", **more: Any) -> dict[str, Any]:
    """Return the body of a completion request."""
    return {"model": "mock", "prompt": prompt, "max_tokens": 8, "seed": 1, **more}


def config(**changes: Any) -> FrontendConfig:
    return msgspec.structs.replace(FrontendConfig(), **changes)
