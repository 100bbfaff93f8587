"""One SGLang engine in a process of its own, driven by JSON lines: two of them cannot live in one process.

``{"args": […], "role": …, "settings": {…}}`` on the command line; then on stdin ``{"do": "submit", "key": …, …}``,
``{"do": "cancel", "key": …}`` or the end; on stdout ``{"ready": …}`` and one line per step.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import msgspec

from holdfast.base.errors import HoldfastError
from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import GenerateRequest, Sampling, SequenceStep, StopRules, pack_ids
from holdfast.engines.handoff import KvHandoff, digest_of
from holdfast.engines.sglang import SglangEngine
from tests.engines.sglang.harness import config, equip


class Driver:
    def __init__(self, told: dict[str, Any], out: Any):
        self.engine = SglangEngine(config(*told.get("args", ()), **told.get("settings", {})))
        self.engine.role = told["role"]
        self.out = out

    def say(self, **what: Any) -> None:
        self.out.write(json.dumps(what) + "\n")
        self.out.flush()

    def sink(self, steps: list[SequenceStep]) -> None:
        for step in steps:
            error = step.error.code if step.error else None
            self.say(key=step.key, index=step.index, tokens=step.tokens, finish=step.finish, error=error,
                     message=step.error.message if step.error else "", cached=step.cached_tokens)  # fmt: skip

    async def run(self) -> None:
        info = await self.engine.start(self.sink, lambda error: self.say(death=error.message), lambda *_: None)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        self.say(
            ready=msgspec.to_builtins(info.capabilities), rendezvous=info.rendezvous, pids=self.engine.child_pids()
        )
        while line := await reader.readline():
            told = json.loads(line)
            try:
                self.obey(told)
            except HoldfastError as error:
                self.say(key=told["key"], refused=error.code, message=error.message)
        await self.engine.close()

    def obey(self, told: dict[str, Any]) -> None:
        key = SequenceKey(told["key"])
        if told["do"] == "cancel":
            self.engine.cancel(key)
            return
        prompt = pack_ids(told["prompt"])
        generated = pack_ids(told.get("generated", []))
        handoff = None
        if "meeting" in told:
            count = len(told["prompt"]) + len(told.get("generated", []))
            digest = digest_of(prompt, generated)
            handoff = KvHandoff("sglang", "rendezvous", tokens=count, digest=digest, params=told["meeting"])
        stop = StopRules(told["max_tokens"], ignore_eos=True)
        self.engine.submit(
            key,
            GenerateRequest(
                "d" * 32, "m", prompt, Sampling(temperature=0.0), stop, generated,
                leg=told["leg"], handoff=handoff, extra=told.get("extra", {}),
            ),
        )  # fmt: skip


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints elsewhere
    equip()
    asyncio.run(Driver(json.loads(sys.argv[1]), out).run())


if __name__ == "__main__":
    main()
