"""Prefill and decode on two SGLang engines over NIXL in host memory: the same tokens; either half lost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import pytest_asyncio

from tests.engines.sglang.harness import ENVIRONMENT, NEEDS_SGLANG, gone, search_path
from tests.patience import within

pytestmark = [NEEDS_SGLANG, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

START_SECONDS = 200.0
NIXL = ("--disaggregation-transfer-backend", "nixl")
HALF_LOST = 3.0
"""Seconds that the decode engine grants."""
ROOT = Path(__file__).resolve().parents[3]


class Half:
    """One engine in its process."""

    def __init__(self, process: asyncio.subprocess.Process):
        self.process = process
        self.lines: list[dict] = []
        self.news = asyncio.Event()
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.lines.append(json.loads(line))
            self.news.set()
        self.lines.append({"gone": True})
        self.news.set()

    def tell(self, **what) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what).encode() + b"\n")

    async def until(self, wanted, seconds: float) -> dict:
        async with asyncio.timeout(within(seconds)):
            while True:
                for line in self.lines:
                    if wanted(line):
                        return line
                assert "gone" not in (self.lines[-1] if self.lines else {}), "the engine's process ended"
                self.news.clear()
                await self.news.wait()

    async def end_of(self, key: int, seconds: float = 60.0) -> tuple[list[int], dict]:
        end = await self.until(lambda line: line.get("key") == key and ("refused" in line or line["finish"]), seconds)
        tokens = [token for line in self.lines if line.get("key") == key for token in line.get("tokens", ())]
        return tokens, end

    async def close(self) -> None:
        if self.process.returncode is None:
            assert self.process.stdin is not None
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            try:
                async with asyncio.timeout(within(10.0)):
                    await self.process.wait()
            except TimeoutError:
                self.process.kill()
                await self.process.wait()
        self.reading.cancel()


async def half(role: str, log: Path, *args: str, **settings) -> Half:
    told = json.dumps({"role": role, "args": [*NIXL, *args], "settings": settings})
    with log.open("w") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.engines.sglang.driver", told,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors, cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join((search_path(), str(ROOT)))},
        )  # fmt: skip
    return Half(process)


class Pair:
    """Both halves, and numbers that nobody has had."""

    def __init__(self, prefill: Half, decode: Half, where: str):
        self.prefill, self.decode = prefill, decode
        host, port = where.rsplit(":", 1)
        self._meeting = {"bootstrap_host": host, "bootstrap_port": int(port), "prefill_rank": 0}
        self._numbers = itertools.count(1)

    def ask(self, prompt, max_tokens=8, generated=(), *, both=True) -> int:
        number = next(self._numbers)
        meeting = {**self._meeting, "bootstrap_room": 1000 + number}
        common = {"key": number, "prompt": prompt, "generated": list(generated), "max_tokens": max_tokens}
        self.decode.tell(do="submit", leg="decode", meeting=meeting, **common)
        if both:
            self.prefill.tell(do="submit", leg="prefill", meeting=meeting, **common)
        return number


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("halves")
    prefill = await half("prefill", root / "prefill.log")
    decode = await half(
        "decode", root / "decode.log", "--disaggregation-decode-retraction-backup", "cpu_tensor",
        handoff_timeout=HALF_LOST,
    )  # fmt: skip
    try:
        ready = await prefill.until(lambda line: "ready" in line, START_SECONDS)
        await decode.until(lambda line: "ready" in line, START_SECONDS)
        yield Pair(prefill, decode, ready["rendezvous"])
    finally:
        await asyncio.gather(prefill.close(), decode.close())


PROMPT = [(at * 7919) % 40_000 + 100 for at in range(70)]


async def test_the_card_says_how_they_meet(pair: Pair) -> None:
    for one in (pair.prefill, pair.decode):
        can = (await one.until(lambda line: "ready" in line, 1.0))["ready"]
        assert (can["handoff"], can["handoff_phase"]) == ("sglang", "rendezvous")


async def test_the_canary_needs_no_other_half(pair: Pair) -> None:
    nobody = {"bootstrap_info": {"bootstrap_host": "2.2.2.2", "bootstrap_port": 0, "bootstrap_room": 0}}
    for one in (pair.prefill, pair.decode):
        one.tell(do="submit", key=900, prompt=[1], max_tokens=1, leg="aggregated", extra=nobody)
        tokens, end = await one.end_of(900)
        assert end["finish"] == "length", end
        assert len(tokens) == 1


async def test_both_halves_give_the_same_tokens_as_ever(pair: Pair) -> None:
    first = pair.ask(PROMPT)
    tokens, end = await pair.decode.end_of(first)
    assert (len(tokens), end["finish"]) == (8, "length"), end
    nothing, over = await pair.prefill.end_of(first)
    assert (nothing, over["finish"]) == ([], "stop"), over
    keys = [pair.ask(PROMPT), pair.ask(PROMPT, 8, tokens[:3]), pair.ask(PROMPT[::-1])]
    again, rest, other = [await pair.decode.end_of(key) for key in keys]
    assert again[0] == tokens
    assert rest[0] == tokens[3:], "a continuation from generated ids is another"
    assert other[0] != tokens


async def test_a_decode_leg_alone_is_given_up(pair: Pair) -> None:
    clock = asyncio.get_running_loop().time
    begun = clock()
    tokens, end = await pair.decode.end_of(pair.ask(PROMPT, both=False), HALF_LOST + 5.0)
    assert (tokens, end["error"]) == ([], "handoff_lost"), end
    assert clock() - begun >= HALF_LOST
    tokens, _ = await pair.decode.end_of(pair.ask(PROMPT))
    assert len(tokens) == 8, "the decode engine works on"


async def test_a_request_without_its_other_half_is_refused(pair: Pair) -> None:
    pair.decode.tell(do="submit", key=901, prompt=PROMPT, max_tokens=4, leg="aggregated")
    _, end = await pair.decode.end_of(901)
    assert end["refused"] == "no_workers"


async def test_a_killed_prefill_engine_costs_its_leg_and_nothing_else(pair: Pair) -> None:
    """The last test: the pair is no pair afterwards."""
    key = pair.ask(PROMPT[5:], both=False)
    below = (await pair.prefill.until(lambda line: "pids" in line, 1.0))["pids"]
    os.kill(pair.prefill.process.pid, signal.SIGKILL)
    tokens, end = await pair.decode.end_of(key, HALF_LOST + 5.0)
    assert (tokens, end["error"]) == ([], "handoff_lost"), end
    later, end = await pair.decode.end_of(pair.ask(PROMPT, both=False), HALF_LOST + 15.0)
    assert (later, end["error"]) == ([], "handoff_lost"), end
    await gone(*below)
    assert pair.decode.process.returncode is None
