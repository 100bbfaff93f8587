"""A cluster of a real engine for the proofs: its client, its processes, and what can be done to them.

Must never judge an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
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
from tests.proof.engine_kinds import KINDS, SHORT_TOKENS, Arrangement, Fault, Kind
from tests.support.hf_model import model_directory

START_SECONDS = 900.0
"""A start of three engines on two cores that somebody else uses as well."""
ANSWER_SECONDS = 300.0
ORPHAN_SECONDS = 20.0
"""What a killed process leaves may take so long to be gone."""
TOKENS, LONGER = 48, 96
CONTEXT = "The sea was calm that day and every boat stayed in the harbour. " * 18
"""Makes prompts long enough for a prefill leg to be hurt."""
SUBJECTS = (
    "a lighthouse keeper", "the harbour at night", "an old map", "rain on a tin roof", "two ferry captains",
    "a robot who cooks", "the price of bread", "a long train journey",
)  # fmt: skip


class Answer(msgspec.Struct):
    """One answer as its client saw it."""

    streamed: bool
    long: bool = False
    """Its prompt is one that a prefill worker computes."""
    text: str = ""
    finish: str = ""
    tokens: int = 0
    worker: str = ""
    times: list[float] = []
    facts: dict[str, Any] = {}
    error: str = ""
    over: bool = False


class World:
    """A frontend, workers, and the client."""

    def __init__(self, local: LocalCluster, model: str, kind: Kind, arrangement: Arrangement, root: str):
        self.local, self.model, self.kind, self.root = local, model, kind, root
        self.arrangement = arrangement
        self.doomed = 0
        """A process that nobody may take for a usable worker any more."""
        self.client = AsyncOpenAI(
            base_url=f"{local.base_urls[0]}/v1", api_key="none", max_retries=0, timeout=ANSWER_SECONDS
        )
        self.truths: dict[str, tuple[str, str, int]] = {}
        self.salt = ""
        """Keeps a round's prompts from being found in caches: then there is something to compute, and to hurt."""

    def is_long(self, subject: str) -> bool:
        """Whether the prompt about a subject is computed apart."""
        mixed = self.arrangement == "mixed" and SUBJECTS.index(subject) % 2 == 0
        return self.arrangement == "split" or mixed

    def question(self, subject: str) -> dict[str, Any]:
        """Return the request about a subject. Beside long prompts, short ones have long answers: they meet."""
        long = self.is_long(subject)
        text = f"{CONTEXT if long else ''}Tell me a story about {subject}."
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": LONGER if self.arrangement == "mixed" and not long else TOKENS,
            "temperature": 0.0,
            **({"extra_body": {"nvext": {"cache_salt": self.salt}}} if self.salt else {}),
        }

    async def ask(self, subject: str, answer: Answer) -> Answer:
        """Ask into ``answer``; an error is kept in it."""
        answer.long = self.is_long(subject)
        try:
            await (self._stream if answer.streamed else self._whole)(self.question(subject), answer)
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

    async def learn(self) -> None:
        """Ask about every subject, and keep text, finish and tokens of these undisturbed runs."""
        answers = await asyncio.gather(*(self.ask(subject, Answer(streamed=True)) for subject in SUBJECTS))
        for subject, seen in zip(SUBJECTS, answers, strict=True):
            if seen.error or seen.facts.get("migrations"):
                raise RuntimeError(f"the undisturbed run was disturbed: {seen.error or seen.facts}")
            self.truths[subject] = (seen.text, seen.finish, seen.tokens)

    def worker_pid(self, instance: str) -> int:
        """Return the process of the worker with that instance id."""
        slots = self.local.supervisor.slots.values()
        slot = next(slot for slot in slots if slot.spec.env.get("DYN_INSTANCE_ID") == instance)
        assert slot.pid is not None
        return slot.pid

    def hurt(self, fault: Fault, instance: str) -> Callable[[], None]:
        """Do it; returns what ends it."""
        pid = self.worker_pid(instance)
        victim = next(iter(processes(self.kind.core, parent=pid))) if fault.endswith("core") else pid
        os.kill(victim, {"stop": signal.SIGSTOP, "term": signal.SIGTERM}.get(fault, signal.SIGKILL))
        self.doomed = 0 if fault == "stop" else pid
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

    async def a_leg(self) -> None:
        """Wait until a prompt is with a prefill worker, or for a while."""
        async with asyncio.timeout(ANSWER_SECONDS):
            for _ in range(1_000):
                said = (await http.get(f"{self.local.base_urls[0]}/debug/requests")).json()
                if said["leases"]["prefill"]:
                    return
                await asyncio.sleep(0.005)

    async def ready_for(self, fault: Fault) -> None:
        """Wait until the frontend uses all workers, none of them the doomed one. Raises TimeoutError.

        In the arrangement ``mixed`` whoever computes prompts can be hurt when there is one worker beside it.
        """
        early = self.arrangement == "mixed" and fault.startswith("prefill")
        async with asyncio.timeout(START_SECONDS):
            while True:
                with contextlib.suppress(Exception):
                    health = (await http.get(f"{self.local.base_urls[0]}/health")).json()
                    usable = [i for i in health["instances"] if i["state"] == "usable" and i["pid"] != self.doomed]
                    prefills = [i for i in usable if i["role"] == "prefill"]
                    if len(usable) == self.local.plan.workers or (early and prefills and len(usable) > 1):
                        return
                await asyncio.sleep(0.2)

    async def orphans(self) -> int:
        """Return how many of this cluster's engine processes have lost their worker and do not go."""
        async with asyncio.timeout(ORPHAN_SECONDS + 5):
            for _ in range(int(ORPHAN_SECONDS / 0.25)):
                if not self._orphans():
                    return 0
                await asyncio.sleep(0.25)
        return len(self._orphans())

    def _orphans(self) -> list[int]:
        workers = {slot.pid for slot in self.local.supervisor.slots.values()}
        ours = [pid for pid in processes(self.kind.family) if _environment_has(pid, self.root)]
        return [pid for pid in ours if workers.isdisjoint(_ancestors(pid))]


def processes(name: bytes, parent: int = 0) -> list[int]:
    """Return the processes whose command line begins like this; of one parent, if it is named."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(name):
                found.append(int(entry.name))
    return [pid for pid in found if not parent or _parent_of(pid) == parent]


def _parent_of(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    return 0


def _ancestors(pid: int) -> list[int]:
    found: list[int] = []
    while (pid := _parent_of(pid)) > 1:
        found.append(pid)
    return found


def _environment_has(pid: int, text: str) -> bool:
    with contextlib.suppress(OSError):
        return text.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    return False


@contextlib.asynccontextmanager
async def world(engine: str, arrangement: Arrangement, lines: Path) -> AsyncIterator[World]:
    """Run the cluster for the length of the block; what its processes say goes into a file."""
    kind = KINDS[engine]
    flags = kind.workers[arrangement]
    short = ("--max-local-prefill-length", str(SHORT_TOKENS)) if arrangement == "mixed" else ()
    model = await asyncio.to_thread(model_directory, kind.dtype)
    with tempfile.TemporaryDirectory(prefix="holdfast-proof-") as root, lines.open("a") as log:
        plan = ClusterPlan(
            http_ports=(free_port(),),
            workers=len(flags),
            prefill_workers=int(arrangement != "aggregated"),
            worker_flags=("--engine", engine, "--model", str(model), *kind.flags),
            flags_by_worker=flags,
            frontend_flags=short,
            env={**kind.env, "DYN_FILE_KV": str(Path(root) / "discovery")},
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
            yield World(local, models[0]["id"], kind, arrangement, root)
