"""The oracles can fail: bugs are planted into the running product, and each must be found.

The bugs come in through a ``sitecustomize`` on the frontend's path, so that nothing in the product knows of them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.e2e.asking import exact, streaming
from tests.e2e.oracles import check_events
from tests.e2e.support import Cluster, cluster
from tests.e2e.truth import Ask, check

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="function")]

FORGETS_A_TOKEN = """
from holdfast.requests.generation import Generation
real = Generation.generated_bytes
Generation.generated_bytes = lambda self: real(self)[4:]
"""
LOSES_A_TOKEN = """
from array import array
from holdfast.requests import express
from holdfast.requests.attempt import Attempt
real = Attempt.on_tokens
def on_tokens(self, index, tokens, logprobs):
    real(self, index, [tokens[0] + 1] if index == 25 else tokens, logprobs)
Attempt.on_tokens = on_tokens
if express.native is not None:
    compiled = express.native.take
    def take(touched, table, streams, indices, tokens):
        places = zip(array("I", indices), array("I", tokens), strict=True)
        changed = array("I", [token + (index == 25) for index, token in places])
        return compiled(touched, table, streams, indices, changed.tobytes())
    express.native.take = take
"""
"""On the way of tokens in Python, and on the short one in C where there is one."""
MERGES_THE_PROMPT = """
from holdfast.requests import attempt
class Merged(attempt.GenerateRequest):
    def __post_init__(self):
        pass
def request(**fields):
    fields["prompt_ids"] += fields.pop("generated_ids")
    return real(**fields)
real, attempt.GenerateRequest = attempt.GenerateRequest, request
"""
ENDS_TWICE = """
from holdfast.frontend import answers
answers.DONE = answers.DONE * 2
"""
NEVER_ENDS = """
from holdfast.frontend import answers
answers.DONE = b""
"""
LEAKS_A_LEASE = """
from holdfast.requests.leases import Lease
real = Lease.release
Lease.release = lambda self: None if self.kind == "attempt" else real(self)
"""


@contextlib.asynccontextmanager
async def planted(tmp_path: Path, bug: str) -> AsyncIterator[Cluster]:
    """A cluster whose frontend has a bug."""
    path = tmp_path / "bug"
    path.mkdir()
    guard = 'import sys\nif "frontend" in sys.orig_argv:\n'
    indented = "".join(f"    {line}\n" for line in bug.strip().splitlines())
    (path / "sitecustomize.py").write_text(guard + indented)
    paths = os.pathsep.join((str(path), *filter(None, [os.environ.get("PYTHONPATH")])))
    async with cluster(tmp_path, env={"PYTHONPATH": paths}) as up:
        yield up


@pytest.mark.parametrize("bug", [FORGETS_A_TOKEN, LOSES_A_TOKEN, MERGES_THE_PROMPT])
async def test_exactness(tmp_path: Path, bug: str) -> None:
    async with planted(tmp_path, bug) as up:
        ask = Ask(content="planted", max_tokens=60)
        async with streaming(up, ask) as live:
            await live.until_pieces(30)
            up.kill(live.answer.worker)
            answer = await live.done()
        with pytest.raises(AssertionError, match="texts part"):
            check(ask, answer)


@pytest.mark.parametrize("bug", [ENDS_TWICE, NEVER_ENDS])
async def test_one_terminal_event(tmp_path: Path, bug: str) -> None:
    async with planted(tmp_path, bug) as up:
        await exact(up, Ask(content="planted", max_tokens=5))
        assert len(up.wire.broken) == 1


async def test_leases(tmp_path: Path) -> None:
    async with planted(tmp_path, LEAKS_A_LEASE) as up:
        await exact(up, Ask(content="planted", max_tokens=5))
        with pytest.raises(TimeoutError):
            await up.at_rest(0.5)


OK = b'data: {"choices":[{"index":0,"finish_reason":null}]}\n\n'
END = b'data: {"choices":[{"index":0,"finish_reason":"stop"}]}\n\n'
ERROR = b'data: {"error":{"message":"x"}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        OK + DONE,
        OK + END,
        OK + END + END + DONE,
        OK + END + OK + DONE,
        OK + END + DONE + OK,
        OK + END + ERROR + DONE,
        OK + ERROR + ERROR + DONE,
        OK + ERROR + OK + DONE,
    ],
)
async def test_streams_that_end_wrong(raw: bytes) -> None:
    with pytest.raises(AssertionError):
        check_events(raw)


@pytest.mark.parametrize("raw", [OK + END + DONE, OK + ERROR + DONE, ERROR + DONE])
async def test_streams_that_end_right(raw: bytes) -> None:
    check_events(raw)
