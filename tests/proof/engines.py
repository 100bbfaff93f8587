"""Hurt real engines under running streams and compare every text. ``python -m tests.proof.engines --help``.

A frontend and two workers of one engine; four streamed and four whole answers at once, by the ``openai`` client. At a
random token of a stream its worker is hurt: its engine's core gets SIGKILL, or the worker itself does, or it is stopped
(SIGSTOP), or asked to leave (SIGTERM). Every text is compared with the undisturbed run's (greedy, float32). A run that
was broken off goes on where it was; a table goes into ``docs/track-record.md``; one wrong text makes it exit with 1.
With ``--split`` prompts are computed by a third worker (NIXL in host memory), and either leg is hurt: the decode leg
at a random token of a stream, the prefill leg while it computes.

Runs in the engine's own environment: ``make proof-engines``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import shlex
import signal
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from holdfast.local import http
from holdfast.local.backoff import RestartPolicy
from holdfast.local.cluster import ClusterPlan, LocalCluster
from holdfast.local.ports import free_port
from holdfast.runtime.discovery.factory import open_discovery
from openai import AsyncOpenAI
from tests.proof import record
from tests.support.hf_model import model_directory

START_SECONDS = 900.0
"""A start of two vLLM workers on two cores that somebody else uses as well."""
ANSWER_SECONDS = 300.0
TOKENS = int(os.environ.get("HOLDFAST_PROOF_TOKENS", "48"))
"""In an answer; more of them on a machine where 48 are over before anything can happen to them."""
STREAMED, WHOLE = 4, 4
FAULTS = ("core", "worker", "stop", "term")
SPLIT_FAULTS = ("core", "worker", "prefill-core", "prefill-worker")
WORDS = {
    "core": "SIGKILL to the engine's core",
    "worker": "SIGKILL to the worker",
    "stop": "SIGSTOP to the worker",
    "term": "SIGTERM to the worker",
    "prefill-core": "SIGKILL to the prefill engine's core",
    "prefill-worker": "SIGKILL to the prefill worker",
}
FLAGS = {
    "vllm": (
        *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16", "--block-size", "32"),
        *("--num-gpu-blocks-override", "96", "--enforce-eager"),
        *shlex.split(os.environ.get("HOLDFAST_VLLM_FLAGS", "")),
    )
}
"""On a GPU the variable shares it: ``--gpu-memory-utilization 0.1``."""
CONTEXT = "The sea was calm that day and every boat stayed in the harbour. " * 18
"""Makes prompts long enough for a prefill leg to be hurt."""
PREFILL_SECONDS = (0.1, 2.5)
"""A prefill leg is hurt within this after the questions were asked."""
CORES = {"vllm": b"VLLM::EngineCore"}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "DYN_VLLM_MEMORY_WAIT_SECS": "20",
    "DYN_WORKER_SHUTDOWN_INFLIGHT_TIMEOUT_SECS": "0.5",  # or everything would finish where it is
}
SUBJECTS = (
    "a lighthouse keeper", "the harbour at night", "an old map", "rain on a tin roof", "two ferry captains",
    "a robot who cooks", "the price of bread", "a long train journey",
)  # fmt: skip


class Answer(msgspec.Struct):
    """One answer as its client saw it."""

    streamed: bool
    text: str = ""
    finish: str = ""
    tokens: int = 0
    worker: str = ""
    times: list[float] = []
    facts: dict[str, Any] = {}
    error: str = ""
    over: bool = False


class Round(msgspec.Struct, frozen=True):
    """One fault: what it hit and what went wrong."""

    fault: str
    number: int
    streams_hit: int
    whole_hit: int
    gaps: list[float]
    """Longest silence of each stream that moved, seconds."""
    answers: int
    wrong: list[str]
    legs: int = 0
    """Prompts that were handed over."""
    legs_failed: int = 0
    orphans: int = 0
    """Engine processes whose worker is gone, when everything was whole again."""


class World:
    """A frontend, two workers (and one for prompts), and the client."""

    def __init__(self, local: LocalCluster, model: str, engine: str, root: str):
        self.local, self.model, self.engine, self.root = local, model, engine, root
        self.split = local.plan.prefill_workers > 0
        self.client = AsyncOpenAI(
            base_url=f"{local.base_urls[0]}/v1", api_key="none", max_retries=0, timeout=ANSWER_SECONDS
        )
        self._truths: dict[str, tuple[str, str, int]] = {}

    async def ask(self, subject: str, answer: Answer) -> Answer:
        """Ask into ``answer``; an error is kept in it."""
        try:
            await (self._stream if answer.streamed else self._whole)(
                question(self.model, subject, CONTEXT if self.split else ""), answer
            )
        except Exception as error:
            answer.error = f"{type(error).__name__}: {error}"
        answer.over = True
        return answer

    async def _stream(self, body: dict[str, Any], answer: Answer) -> None:
        raw = await self.client.chat.completions.with_raw_response.create(
            **body, stream=True, stream_options={"include_usage": True}
        )
        answer.worker = raw.headers.get("x-holdfast-worker", "")
        loop = asyncio.get_running_loop()
        async for chunk in raw.parse():
            if chunk.usage is not None:
                answer.tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                if choice.delta.content:
                    answer.text += choice.delta.content
                    answer.times.append(loop.time())
                if choice.finish_reason:
                    answer.finish = choice.finish_reason
                    answer.facts = (chunk.model_extra or {}).get("holdfast") or {}

    async def _whole(self, body: dict[str, Any], answer: Answer) -> None:
        said = await self.client.chat.completions.create(**body)
        answer.text = said.choices[0].message.content or ""
        answer.finish = said.choices[0].finish_reason
        answer.tokens = said.usage.completion_tokens if said.usage else -1
        answer.facts = (said.model_extra or {}).get("holdfast") or {}

    async def truth(self, subject: str) -> tuple[str, str, int]:
        """Return text, finish and tokens of the undisturbed run."""
        if subject not in self._truths:
            seen = await self.ask(subject, Answer(streamed=True))
            if seen.error or seen.facts.get("migrations"):
                raise RuntimeError(f"the undisturbed run was disturbed: {seen.error or seen.facts}")
            self._truths[subject] = (seen.text, seen.finish, seen.tokens)
        return self._truths[subject]

    def worker_pid(self, instance: str) -> int:
        """Return the process of the worker with that instance id."""
        slots = self.local.supervisor.slots.values()
        slot = next(slot for slot in slots if slot.spec.env.get("DYN_INSTANCE_ID") == instance)
        assert slot.pid is not None
        return slot.pid

    def hurt(self, fault: str, instance: str) -> Callable[[], None]:
        """Do it; returns what ends it."""
        pid = self.worker_pid(instance)
        victim = next(iter(cores(CORES[self.engine], parent=pid))) if fault.endswith("core") else pid
        os.kill(victim, {"stop": signal.SIGSTOP, "term": signal.SIGTERM}.get(fault, signal.SIGKILL))
        return (lambda: os.kill(pid, signal.SIGCONT)) if fault == "stop" else (lambda: None)

    def prefill_instance(self) -> str:
        """Return the instance id of the worker that computes prompts: the last one."""
        return self.local.supervisor.slots[f"worker-{self.local.plan.workers - 1}"].spec.env["DYN_INSTANCE_ID"]

    async def legs(self) -> tuple[int, int]:
        """Return how many prompts were handed over, and how many prefill legs failed, since the frontend's start."""
        text = (await http.get(f"{self.local.base_urls[0]}/metrics")).body.decode()
        lines = [line for line in text.splitlines() if line.startswith("holdfast_frontend_prefill_legs_total")]
        good = sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if "handed_over" in line)
        return good, sum(int(float(line.rsplit(" ", 1)[1])) for line in lines) - good

    async def whole(self, doomed: int) -> None:
        """Wait until the frontend uses two workers that live, none of them the doomed one. Raises TimeoutError."""
        async with asyncio.timeout(START_SECONDS):
            while True:
                with contextlib.suppress(Exception):
                    health = (await http.get(f"{self.local.base_urls[0]}/health")).json()
                    usable = {i["pid"] for i in health["instances"] if i["state"] == "usable"} - {doomed}
                    if len(usable) == self.local.plan.workers:
                        return
                await asyncio.sleep(0.2)

    def orphans(self) -> int:
        """Return how many engine cores of this cluster have lost their worker."""
        workers = {slot.pid for slot in self.local.supervisor.slots.values()}
        ours = [pid for pid in cores(CORES[self.engine]) if _environment_has(pid, self.root)]
        return sum(parent_of(pid) not in workers for pid in ours)


def question(model: str, subject: str, context: str = "") -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": f"{context}Tell me a story about {subject}."}],
        "max_tokens": TOKENS,
        "temperature": 0.0,
    }


def cores(name: bytes, parent: int = 0) -> list[int]:
    """Return the processes with that name; of one parent, if it is named."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(name):
                found.append(int(entry.name))
    return [pid for pid in found if not parent or parent_of(pid) == parent]


def parent_of(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    return 0


def _environment_has(pid: int, text: str) -> bool:
    with contextlib.suppress(OSError):
        return text.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    return False


async def one_round(world: World, fault: str, seed: int, number: int) -> Round:
    """Ask eight questions, hurt one stream's worker at a random token, and judge all answers."""
    rng = random.Random(f"{seed}/{fault}/{number}")
    subjects = rng.sample(SUBJECTS, k=STREAMED + WHOLE)
    true = {subject: await world.truth(subject) for subject in subjects}
    answers = [Answer(streamed=i < STREAMED) for i in range(len(subjects))]
    tasks = [asyncio.ensure_future(world.ask(s, a)) for s, a in zip(subjects, answers, strict=True)]
    before = await world.legs()
    if fault.startswith("prefill"):
        await asyncio.sleep(rng.uniform(*PREFILL_SECONDS))
        instance = world.prefill_instance()
    else:
        instance = await _at_a_token(answers[rng.randrange(STREAMED)], rng.randint(3, TOKENS // 2))
    pid = world.worker_pid(instance)
    end = world.hurt(fault, instance)
    now = asyncio.get_running_loop().time()
    await asyncio.gather(*tasks)
    end()
    after = await world.legs()
    await world.whole(0 if fault == "stop" else (0 if fault.endswith("core") and alive(pid) else pid))
    moved = [a for a in answers if a.facts.get("migrations")]
    return Round(
        fault,
        number,
        sum(a.streamed for a in moved),
        sum(not a.streamed for a in moved),
        [gap_of(a, now) for a in moved if a.streamed],
        len(answers),
        [w for s, a in zip(subjects, answers, strict=True) if (w := wrong_in(a, true[s]))],
        legs=after[0] - before[0],
        legs_failed=after[1] - before[1],
        orphans=world.orphans(),
    )


async def _at_a_token(victim: Answer, pieces: int) -> str:
    """Wait until a stream is so far; returns the instance id of its worker."""
    async with asyncio.timeout(ANSWER_SECONDS):
        while len(victim.times) < pieces and not victim.over:  # noqa: ASYNC110  as close as possible
            await asyncio.sleep(0.002)
    if victim.error:
        raise RuntimeError(f"a stream failed before it was hurt: {victim.error}")
    return victim.worker


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def gap_of(answer: Answer, since: float) -> float:
    pairs = zip(answer.times, answer.times[1:], strict=False)
    return max((b - a for a, b in pairs if b > since), default=0.0)


def wrong_in(answer: Answer, true: tuple[str, str, int]) -> str:
    kind = "stream" if answer.streamed else "whole"
    if answer.error:
        return f"{kind}: {answer.error}"
    if (answer.text, answer.finish, answer.tokens) != true:
        text = "same" if answer.text == true[0] else "differs"
        return f"{kind}: {answer.tokens} tokens, finish {answer.finish}, text {text}"
    return f"{kind}: join declared inexact" if answer.facts.get("join") == "declared" else ""


@contextlib.asynccontextmanager
async def world(engine: str, lines: Path, split: bool) -> AsyncIterator[World]:
    """Run the cluster for the length of the block; what its processes say goes into a file."""
    with tempfile.TemporaryDirectory(prefix="holdfast-proof-") as root, lines.open("a") as log:
        roles = ("--disaggregation-mode=decode",) * 2 + ("--disaggregation-mode=prefill",)
        plan = ClusterPlan(
            http_ports=(free_port(),),
            workers=3 if split else 2,
            prefill_workers=1 if split else 0,
            worker_flags=("--engine", engine, "--model", str(model_directory()), *FLAGS[engine]),
            flags_by_worker=tuple((role,) for role in roles) if split else (),
            env={**ENVIRONMENT, "DYN_FILE_KV": str(Path(root) / "discovery")},
            restart=RestartPolicy(next_delay=0.0, intensity=1_000),
            stop_grace=20.0,
        )
        discovery = open_discovery("file", root=Path(root) / "discovery")

        def relay(*words: Any) -> None:
            print(*words, file=log, flush=True)

        local = LocalCluster(plan, discovery, random.Random(1), dict(os.environ), relay)
        async with local.running():
            await local.until_ready(START_SECONDS)
            models = (await http.get(f"{local.base_urls[0]}/v1/models")).json()["data"]
            yield World(local, models[0]["id"], engine, root)


def state_file(engine: str, seed: int, split: bool) -> Path:
    """Return where a run keeps what it has done."""
    kind = f"{engine}-split" if split else engine
    return Path(tempfile.gettempdir()) / f"holdfast-engines-{kind}-{seed}-{record.commit()}.jsonl"


async def run(engine: str, times: int, seed: int, faults: tuple[str, ...], split: bool) -> list[Round]:
    """Hurt until each fault has struck so often; returns all rounds. One that hit no stream does not count."""
    path = state_file(engine, seed, split)
    done = record.load(path, Round)
    missing = [fault for n in range(times) for fault in faults if sum(has_struck(r, fault) for r in done) <= n]
    if not missing:
        return done
    lines = path.with_suffix(".log")
    print(f"{len(missing)} rounds to go; the processes' lines: {lines}", flush=True)
    async with world(engine, lines, split) as up:
        print("ready", flush=True)
        number = len(done)
        while missing:
            result = await one_round(up, missing[0], seed, number)
            number += 1
            record.save(path, result)
            done.append(result)
            print(json.dumps(msgspec.to_builtins(result)), flush=True)
            if has_struck(result, missing[0]) or result.wrong:
                missing.pop(0)
    return done


def has_struck(one: Round, fault: str) -> bool:
    """Whether a fault has struck; a worker that leaves in order may have finished everything."""
    hit = one.legs_failed if fault.startswith("prefill") else one.streams_hit + one.whole_hit
    return one.fault == fault and (fault == "term" or hit > 0)


def report(engine: str, rounds: list[Round], faults: tuple[str, ...], *, track: bool, split: bool) -> bool:
    """Print the result by fault and put it on record; returns whether everything was exact."""
    good = True
    for fault in faults:
        mine = [one for one in rounds if one.fault == fault]
        gaps = [gap for one in mine for gap in one.gaps]
        wrong = [w for one in mine for w in one.wrong]
        answers = sum(one.answers for one in mine)
        orphans = sum(one.orphans for one in mine)
        good &= not wrong and not orphans and bool(mine)
        row = [
            record.commit(), record.machine(), f"{engine}, split" if split else engine, WORDS[fault], str(len(mine)),
            f"{sum(one.streams_hit for one in mine)} + {sum(one.whole_hit for one in mine)}",
            f"{answers - len(wrong)} of {answers}",
            f"{statistics.median(gaps):.2f} s" if gaps else "none",
            f"{max(gaps):.2f} s" if gaps else "none",
            str(orphans),
            f"{sum(one.legs for one in mine)}, {sum(one.legs_failed for one in mine)} failed" if split else "none",
        ]  # fmt: skip
        print(" | ".join(row), *wrong[:5], sep="\n  " if wrong else "")
        if track:
            record.append_engines(row)
    return good


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=[*FLAGS], default="vllm")
    parser.add_argument("--times", type=int, default=3, help="how often each fault must strike")
    parser.add_argument("--split", action="store_true", help="prompts are computed by a worker of their own")
    parser.add_argument("--fault", choices=WORDS, action="append", help="only these")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-record", action="store_true", help="leave docs/track-record.md alone")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has done")
    args = parser.parse_args()
    logging.getLogger("holdfast").setLevel(logging.CRITICAL)  # the supervisor warns of every kill
    faults = tuple(args.fault or (SPLIT_FAULTS if args.split else FAULTS))
    if args.fresh:
        state_file(args.engine, args.seed, args.split).unlink(missing_ok=True)
    rounds = asyncio.run(run(args.engine, args.times, args.seed, faults, args.split))
    return 0 if report(args.engine, rounds, faults, track=not args.no_record, split=args.split) else 1


if __name__ == "__main__":
    sys.exit(main())
