"""Stand-ins for calls, connections and engines, so that the host can be tested without a socket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from holdfast.base.errors import HoldfastError
from holdfast.engines.contract import (
    Capabilities,
    Engine,
    EngineInfo,
    EngineLoad,
    EngineProgress,
    GenerateRequest,
    ModelFiles,
    Sampling,
    SequenceStep,
    StopRules,
    pack_ids,
)
from holdfast.runtime.streams import TokenItem
from holdfast.wire.frames import OpenHeaders


class FakeConnection:
    def __init__(self, caller: str = "caller", fail: bool = False):
        self.caller = caller
        self.batches: list[list[TokenItem]] = []
        self.fail = fail

    def send_items(self, items: Sequence[TokenItem]) -> None:
        if self.fail:
            raise RuntimeError("broken")
        self.batches.append(list(items))


class FakeCall:
    def __init__(self, payload: bytes, connection: FakeConnection | None = None, **headers: Any):
        self.connection = connection or FakeConnection()
        self.stream = 1
        self.endpoint = "generate"
        self.headers = OpenHeaders(**headers)
        self.payload = payload
        self.on_stop: Callable[[str], None] | None = None
        self.said: list[tuple[Any, ...]] = []

    def accept(self) -> None:
        self.said.append(("accept",))

    def refuse(self, error: HoldfastError) -> None:
        self.said.append(("refuse", error))

    def send_data(self, payload: bytes) -> None:
        self.said.append(("data", payload))

    def end(self, finish: str, error: HoldfastError | None = None, cached_tokens: int = 0, tokens: int = 0) -> None:
        self.said.append(("end", finish, error, cached_tokens))

    @property
    def words(self) -> list[str]:
        return [one[0] for one in self.said]


class ScriptEngine(Engine):
    """Does nothing by itself; the test calls `step` and `die`."""

    def __init__(self) -> None:
        self.capabilities = Capabilities()
        self.submitted: dict[int, GenerateRequest] = {}
        self.cancelled: list[int] = []
        self.refuse_with: Exception | None = None
        self.phase: Any = "idle"
        self.closed = 0

    async def start(self, sink, on_death, on_load) -> EngineInfo:
        self.step, self.die = sink, on_death
        on_load("weights", 1.0)
        return EngineInfo(
            engine="script",
            version="1",
            model="script-model",
            context_length=100,
            block_size=4,
            total_kv_blocks=10,
            max_num_seqs=2,
            max_num_batched_tokens=8,
            eos_token_ids=(1,),
            vocab_size=10,
            fingerprint="f",
            capabilities=self.capabilities,
            files=ModelFiles(b"{}", "template", generation_config={"temperature": 0.5, "eos": [1, 2]}),
        )

    def submit(self, key, request) -> None:
        if self.refuse_with is not None:
            raise self.refuse_with
        self.submitted[key] = request

    def cancel(self, key) -> None:
        self.cancelled.append(key)

    def load(self) -> EngineLoad:
        return EngineLoad(len(self.submitted), 0, 1, 10, 7)

    def progress(self) -> EngineProgress:
        return EngineProgress(3, 4, 5, self.phase, 0.5, 2)

    async def close(self) -> None:
        self.closed += 1

    def token(self, key: int, index: int, token: int = 7, **more: Any) -> SequenceStep:
        return SequenceStep(key, index, [token], **more)


def payload(model: str = "script-model", **more: Any) -> bytes:
    stop = more.pop("stop", StopRules(max_tokens=10))
    return msgspec.msgpack.encode(GenerateRequest("r", model, pack_ids([1, 2, 3]), Sampling(), stop, **more))
