"""The online driver against servers of every manner: what it sends, what it makes of the answers."""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from holdfast.base.errors import CannotConnect, InvalidRequest
from holdfast.engines.contract import unpack_ids
from holdfast.replay.arrivals import Arrivals
from holdfast.replay.client import HttpDriver
from holdfast.replay.prompts import Prompts
from holdfast.replay.record import Record
from holdfast.replay.run import replay
from holdfast.replay.trace import TraceRequest
from tests.patience import within

REQUEST = TraceRequest(0.0, 700, 4, (1, 2))
USAGE = {"prompt_tokens": 700, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 512}}


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def words(count: int) -> list[bytes]:
    return [event(choices=[{"index": 0, "text": f" word{n}", "finish_reason": None}]) for n in range(count)]


WHOLE = [
    *words(4),
    b": comment\n\n",
    event(choices=[{"index": 0, "text": "", "finish_reason": "length"}]),
    event(choices=[], usage=USAGE),
    b"data: [DONE]\n\n",
]


def stream(parts: list[bytes], *, pieces: int = 0, head: str = "") -> bytes:
    """Return a chunked answer; ``pieces``: cut the body into chunks of so many bytes, wherever that falls."""
    body = b"".join(parts)
    cuts = [body[at : at + pieces] for at in range(0, len(body), pieces)] if pieces else parts
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(cut), cut) for cut in cuts)
    start = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{head}transfer-encoding: chunked\r\n\r\n"
    return start.encode() + chunks + b"0\r\n\r\n"


def plain(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d No\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


class Server:
    """Answers each request with what ``answer`` returns for its number; None closes without a word."""

    def __init__(self, answer: Callable[[int], bytes | None]):
        self._answer = answer
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.connections = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.strip().split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                self.requests.append((first, headers, await reader.readexactly(int(headers["content-length"]))))
                answer = self._answer(len(self.requests) - 1)
                if answer is None:
                    break
                writer.write(answer)
                await writer.drain()
                if b"connection: close" in answer:
                    break
        writer.close()


@contextlib.asynccontextmanager
async def serving(answer: Callable[[int], bytes | None]) -> AsyncIterator[Server]:
    server = Server(answer)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()


async def ask(server: Server, times: int = 1, **more: Any) -> list[Record]:
    driver = HttpDriver(server.url, Prompts(), model="m", **more)
    try:
        async with asyncio.timeout(within(10.0)):
            recording = await replay([REQUEST] * times, driver, Arrivals(concurrency=1), random.Random(1))
    finally:
        await driver.close()
    return recording.records


async def test_what_is_sent_and_what_is_read():
    async with serving(lambda _: stream(WHOLE, head="x-holdfast-worker: w7\r\n")) as server:
        records = await ask(server, times=3, api_key="secret")
    assert server.connections == 1
    first, headers, body = server.requests[0]
    assert first == "POST /v1/completions HTTP/1.1"
    assert headers["authorization"] == "Bearer secret"
    sent = json.loads(body)
    assert sent["prompt"] == unpack_ids(Prompts().ids(REQUEST))
    assert (sent["model"], sent["max_tokens"], sent["stream"], sent["ignore_eos"]) == ("m", 4, True, True)
    assert sent["stream_options"] == {"include_usage": True}
    for record in records:
        assert (record.outcome, record.worker, record.generated, record.cached) == ("ok", "w7", 4, 512)
        assert record.first is not None
        assert record.end is not None
        assert record.sent <= record.first <= record.end


@pytest.mark.parametrize("pieces", [1, 2, 7, 64])
async def test_events_may_be_cut_anywhere(pieces: int):
    async with serving(lambda _: stream(WHOLE, pieces=pieces)) as server:
        (record,) = await ask(server)
    assert (record.outcome, record.generated, record.cached) == ("ok", 4, 512)


async def test_without_usage_tokens_are_the_events():
    async with serving(lambda _: stream([*words(3), b"data: [DONE]\n\n"])) as server:
        (record,) = await ask(server)
    assert (record.outcome, record.generated, record.worker) == ("ok", 3, "")


@pytest.mark.parametrize(
    ("answer", "outcome", "reason"),
    [
        (plain(503, b'{"error": {"code": "no_workers", "message": "m"}}'), "rejected", "no_workers"),
        (plain(429, b"slow down"), "rejected", "status_429"),
        (plain(400, b'{"error": {"type": "bad", "message": "m"}}'), "failed", "bad"),
        (stream(words(2)), "failed", "stream_incomplete"),
        (stream([*words(1), event(error={"code": "engine_failed"})]), "failed", "engine_failed"),
        (stream([b"data: {nonsense\n\n"]), "failed", "protocol_violation"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "failed", "protocol_violation"),
        (stream(words(3))[:-30] + b"", "timeout", "deadline_exceeded"),
        (None, "failed", "disconnected"),
    ],
)
async def test_what_is_not_a_whole_answer(answer: bytes | None, outcome: str, reason: str):
    async with serving(lambda _: answer) as server:
        driver = HttpDriver(server.url, Prompts(), model="m")
        recording = await replay([REQUEST], driver, Arrivals(), random.Random(1), patience=0.5)
        await driver.close()
    (record,) = recording.records
    assert (record.outcome, record.reason) == (outcome, reason)


async def test_a_connection_that_the_server_gave_up_is_replaced():
    answers = {0: stream(WHOLE), 1: None, 2: stream(WHOLE), 3: stream(WHOLE, head="connection: close\r\n")}
    async with serving(lambda n: answers.get(n, stream(WHOLE))) as server:
        records = await ask(server, times=4)
    assert [record.outcome for record in records] == ["ok"] * 4
    assert server.connections == 3


async def test_nobody_there_is_a_failure_of_the_request():
    driver = HttpDriver("http://127.0.0.1:9", Prompts(), model="m")
    recording = await replay([REQUEST], driver, Arrivals(), random.Random(1))
    assert recording.records[0].reason == "cannot_connect"


async def test_the_first_model_is_taken():
    listed = plain(200, b'{"data": [{"id": "llama"}, {"id": "other"}]}')
    async with serving(lambda n: listed if n == 0 else stream(WHOLE)) as server:
        driver = HttpDriver(server.url + "/v1", Prompts())
        assert await driver.find_model() == "llama"
        await driver.close()
    assert server.requests[0][0] == "GET /v1/models HTTP/1.1"
    async with serving(lambda _: plain(404, b"{}")) as server:
        with pytest.raises(InvalidRequest, match="lists no model"):
            await HttpDriver(server.url, Prompts()).find_model()
    with pytest.raises(CannotConnect, match="Nobody answers"):
        await HttpDriver("http://127.0.0.1:9", Prompts()).find_model()
    assert await HttpDriver("http://127.0.0.1:9", Prompts(), model="given").find_model() == "given"


@pytest.mark.parametrize("url", ["ftp://x", "http://", ""])
def test_addresses_are_checked(url: str):
    with pytest.raises(InvalidRequest, match="not an http"):
        HttpDriver(url, Prompts())
