"""Sleep and waking: in what order vLLM is told, and what is refused.

Needs no vLLM; `test_real_gpu` does it for real.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from holdfast.base.errors import Conflict, UnsupportedFeature
from holdfast.engines.vllm.config import VllmConfig
from holdfast.engines.vllm.engine import VllmEngine


class Told:
    """Stands for ``AsyncLLM`` and writes down what it is told."""

    def __init__(self, *, sleeps: bool = True, adapters: object = None):
        self.model_config = SimpleNamespace(enable_sleep_mode=sleeps)
        self.vllm_config = SimpleNamespace(lora_config=adapters)
        self.said: list[Any] = []

    async def sleep(self, level: int) -> None:
        self.said.append(level)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        self.said.append(tags)

    async def collective_rpc(self, method: str) -> None:
        self.said.append(method)


def engine_with(llm: Told) -> VllmEngine:
    engine = VllmEngine(VllmConfig(model="m"))
    engine.llm = llm
    return engine


async def test_weights_that_were_given_back_are_read_again_before_anything_runs() -> None:
    engine = engine_with(llm := Told())
    await engine.sleep(2)
    await engine.wake_up()
    assert llm.said == [2, ["weights"], "reload_weights", ["kv_cache"]]
    llm.said.clear()
    await engine.sleep(1)
    await engine.sleep(2)  # it sleeps already: vLLM ignores this one
    await engine.wake_up()
    assert llm.said == [1, 2, None]


async def test_a_waking_that_failed_is_begun_anew() -> None:
    engine = engine_with(llm := Told())
    await engine.sleep(2)

    async def fails(_: str) -> None:
        raise OSError

    works, llm.collective_rpc = llm.collective_rpc, fails  # type: ignore[method-assign]
    with pytest.raises(OSError):  # noqa: PT011
        await engine.wake_up()
    llm.collective_rpc = works  # type: ignore[method-assign]
    llm.said.clear()
    await engine.wake_up()
    assert "reload_weights" in llm.said


async def test_what_would_lose_something_is_refused() -> None:
    with pytest.raises(UnsupportedFeature, match="--enable-sleep-mode"):
        await engine_with(Told(sleeps=False)).sleep(1)
    adapters = engine_with(Told(adapters=object()))
    with pytest.raises(UnsupportedFeature, match="level 2"):
        await adapters.sleep(2)
    await adapters.sleep(1)
    busy = engine_with(Told())
    busy._live[1] = object()  # type: ignore[index,assignment]
    with pytest.raises(Conflict):
        await busy.sleep(1)
