"""The adapter against a front half that says what a test wants: ends, minima, cancels and blocks that do not come."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from holdfast.base.errors import (
    Conflict,
    EngineFailed,
    HandoffLost,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    NoWorkers,
    UnsupportedFeature,
)
from holdfast.engines.abilities import Adapter
from holdfast.engines.contract import (
    Capabilities,
    EngineInfo,
    GenerateRequest,
    Guided,
    ModelFiles,
    Sampling,
    StopRules,
    pack_ids,
)
from holdfast.engines.handoff import KvHandoff, digest_of
from holdfast.engines.sglang import SglangConfig, SglangEngine
from holdfast.engines.sglang.sampling import FORBIDDEN, Skills
from tests.patience import within

EOS = 2
PROMPT = pack_ids([3, 4, 5])


class FrontHalf:
    """SGLang's `Engine`, as far as the adapter generates with it: counts upwards from the last id."""

    def __init__(self):
        self.calls, self.closed = [], []
        self.called, self.over = asyncio.Event(), asyncio.Event()
        self.silent = False

    async def async_generate(self, *, rid, input_ids, sampling_params, stream, **more):
        assert stream
        self.calls.append((rid, list(input_ids), sampling_params, more))
        self.called.set()
        return self._say(rid, input_ids[-1], sampling_params)

    async def _say(self, rid, last, params):
        try:
            if self.silent:
                await asyncio.Event().wait()
            for at in range(params["max_new_tokens"]):
                await asyncio.sleep(0)
                token = (last + at + 1) % 10
                ends = set() if params["ignore_eos"] else set(params.get("stop_token_ids", ()))
                while params.get("logit_bias", {}).get(str(token)) == FORBIDDEN:
                    token += 10
                over = at + 1 == params["max_new_tokens"]
                reason = {"type": "stop", "matched": token} if token in ends else {"type": "length"} if over else None
                yield {
                    "output_ids": [token],
                    "meta_info": {"finish_reason": reason, "completion_tokens": at + 1, "cached_tokens": 0},
                }
                if reason:
                    return
        finally:
            self.closed.append(rid)
            self.over.set()


class Staged(SglangEngine):
    async def boot(self, on_load):
        self.engine = FrontHalf()
        self.server_args = SimpleNamespace(enable_priority_scheduling=False, enable_lora=False)
        self._can = Skills(100, tokenizer=False, seeds=False)
        handoff = "" if self.role == "aggregated" else "sglang"
        return EngineInfo(
            engine="sglang", version="0", model="m", context_length=64, block_size=16, total_kv_blocks=8,
            max_num_seqs=4, max_num_batched_tokens=64, eos_token_ids=(EOS,), vocab_size=100, fingerprint="f",
            capabilities=Capabilities(handoff=handoff), files=ModelFiles(b"{}", ""), role=self.role,
        )  # fmt: skip

    async def shut(self):
        pass


class Stage:
    def __init__(self, engine):
        self.engine, self.steps = engine, []
        self.news = asyncio.Event()

    def sink(self, steps):
        self.steps += steps
        self.news.set()

    async def ends(self):
        async with asyncio.timeout(within(5.0)):
            while not (self.steps and self.steps[-1].finish):
                self.news.clear()
                await self.news.wait()
        return [token for step in self.steps for token in step.tokens], self.steps[-1]


@pytest.fixture
async def stage(request):
    role, settings = getattr(request, "param", ("aggregated", {}))
    engine = Staged(SglangConfig(**settings))
    engine.role = role
    found = Stage(engine)
    await engine.start(found.sink, lambda error: None, lambda what, share: None)
    yield found
    await engine.close()


def ask(stop=None, sampling=None, generated=(), **more):
    return GenerateRequest(
        request_id="r", model="m", prompt_ids=PROMPT, sampling=sampling or Sampling(temperature=0.0),
        stop=stop or StopRules(4, ignore_eos=True), generated_ids=pack_ids(generated), **more,
    )  # fmt: skip


def meeting(room=7):
    params = {"bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": room, "prefill_rank": 0}
    return KvHandoff("sglang", "rendezvous", tokens=3, digest=digest_of(PROMPT), params=params)


async def test_tokens_come_with_their_index_and_end(stage):
    stage.engine.submit(1, ask(generated=[6]))
    tokens, last = await stage.ends()
    assert tokens == [7, 8, 9]
    assert stage.steps[0].index == 1
    assert last.finish == "length"
    assert stage.engine.engine.calls[0][1] == [3, 4, 5, 6]


async def test_stop_ids_hold_even_when_the_end_of_sequence_is_ignored(stage):
    stage.engine.submit(1, ask(StopRules(20, ignore_eos=True, stop_token_ids=(8,))))
    tokens, last = await stage.ends()
    assert tokens == [6, 7, 8]
    assert last.finish == "stop"
    assert stage.engine.engine.closed, "SGLang was not told to stop"


async def test_least_tokens_are_a_run_that_cannot_end_and_one_that_can(stage):
    stage.engine.submit(1, ask(StopRules(30, min_tokens=9), generated=[6]))
    tokens, last = await stage.ends()
    first, second = stage.engine.engine.calls
    assert first[2]["max_new_tokens"] == 8
    assert second[1] == [3, 4, 5, 6, *tokens[:8]]
    assert second[2]["max_new_tokens"] == 29 - 8
    assert EOS not in tokens[:8]
    assert tokens[-1] == EOS
    assert last.finish == "stop"
    assert [step.index for step in stage.steps] == list(range(1, 1 + len(tokens)))


async def test_least_tokens_that_fill_the_budget_end_with_length(stage):
    stage.engine.submit(1, ask(StopRules(5, min_tokens=5)))
    tokens, last = await stage.ends()
    assert len(tokens) == 5
    assert last.finish == "length"
    assert len(stage.engine.engine.calls) == 1


async def test_a_grammar_is_generated_once_more_unheard(stage):
    stage.engine._can = Skills(100, tokenizer=True, seeds=False)
    constrained = Sampling(temperature=0.0, guided=Guided("regex", "."))
    stage.engine.submit(1, ask(StopRules(4, ignore_eos=True), constrained, generated=[6, 7]))
    tokens, last = await stage.ends()
    assert (tokens, last.finish, stage.steps[0].index) == ([8, 9], "length", 2)
    assert stage.engine.engine.calls[0][1] == [3, 4, 5]


async def test_a_grammar_that_would_go_on_from_another_text_ends_with_an_error(stage):
    stage.engine._can = Skills(100, tokenizer=True, seeds=False)
    constrained = Sampling(temperature=0.0, guided=Guided("regex", "."))
    stage.engine.submit(1, ask(StopRules(4, ignore_eos=True), constrained, generated=[6, 9]))
    tokens, last = await stage.ends()
    assert tokens == []
    assert isinstance(last.error, EngineFailed)


async def test_a_cancel_closes_the_stream_begun_or_not(stage):
    stage.engine.engine.silent = True
    stage.engine.submit(1, ask())
    stage.engine.cancel(1)
    stage.engine.submit(2, ask())
    async with asyncio.timeout(within(5.0)):
        await stage.engine.engine.called.wait()
        await asyncio.sleep(0)
        stage.engine.cancel(2)
        await stage.engine.engine.over.wait()
    assert [call[0] for call in stage.engine.engine.calls] == ["r-2"]
    assert stage.steps == []


async def test_unknown_adapters_and_ranks_are_refused(stage):
    with pytest.raises(ModelNotFound):
        stage.engine.submit(1, ask(lora="nobody"))
    for rank in (1, -1, "0", True):
        with pytest.raises(InvalidRequest):
            stage.engine.submit(1, ask(extra={"data_parallel_rank": rank}))
    with pytest.raises(UnsupportedFeature):
        stage.engine.submit(1, ask(leg="prefill"))


class Manager:
    """SGLang's tokenizer manager, as far as adapters, pauses, memory and the cache go; notes what it is asked."""

    def __init__(self):
        self.asked = []
        self.answer = SimpleNamespace(success=True, error_message="", message="")

    def __getattr__(self, name):
        async def ask(request=None):
            self.asked.append((name, vars(request) if request is not None else {}))
            return self.answer

        return ask


@pytest.fixture
def manager(stage, monkeypatch):
    names = (
        "LoadLoRAAdapterReqInput", "UnloadLoRAAdapterReqInput", "PauseGenerationReqInput", "ContinueGenerationReqInput",
        "ReleaseMemoryOccupationReqInput", "ResumeMemoryOccupationReqInput",
    )  # fmt: skip
    module = SimpleNamespace(**dict.fromkeys(names, SimpleNamespace))
    for name in ("sglang", "sglang.srt", "sglang.srt.managers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.io_struct", module)
    monkeypatch.setattr("holdfast.engines.sglang.abilities.locate", lambda path, what: Path(path))
    monkeypatch.setattr("holdfast.engines.sglang.abilities.read_adapter", lambda path, **bounds: None)
    engine = stage.engine
    engine.manager, engine.hidden_size = Manager(), 8
    engine.server_args.enable_lora = engine.server_args.enable_memory_saver = True
    engine.server_args.max_lora_rank = 16
    return engine.manager


async def test_adapters_come_are_used_and_go(stage, manager):
    engine, cat = stage.engine, Adapter("cat", "/cat")
    await engine.load_adapter(cat)
    assert engine.adapters() == (cat,)
    with pytest.raises(Conflict):
        await engine.load_adapter(cat)
    engine.submit(1, ask(lora="cat"))
    await stage.ends()
    assert engine.engine.calls[0][3]["lora_path"] == "cat"
    await engine.unload_adapter("cat")
    assert engine.adapters() == ()
    assert manager.asked == [
        ("load_lora_adapter", {"lora_name": "cat", "lora_path": "/cat", "pinned": False}),
        ("unload_lora_adapter", {"lora_name": "cat"}),
    ]


async def test_what_sglang_does_not_take_is_said_and_changes_nothing(stage, manager):
    manager.answer = SimpleNamespace(success=False, error_message="rank 64 of 16", message="busy")
    with pytest.raises(InvalidRequest, match="rank 64 of 16"):
        await stage.engine.load_adapter(Adapter("cat", "/cat"))
    assert stage.engine.adapters() == ()
    with pytest.raises(NotFound):
        await stage.engine.unload_adapter("cat")
    with pytest.raises(EngineFailed, match="busy"):
        await stage.engine.clear_cache()


async def test_pauses_and_memory(stage, manager):
    engine = stage.engine
    await engine.pause_generation("keep")
    await engine.pause_generation("abort")
    await engine.resume_generation()
    await engine.wake_up()  # it does not sleep: nothing happens
    await engine.sleep(2)
    await engine.wake_up()
    assert manager.asked == [
        ("pause_generation", {"mode": "in_place"}),
        ("pause_generation", {"mode": "abort"}),
        ("continue_generation", {}),
        ("release_memory_occupation", {"tags": ["kv_cache", "weights"]}),
        ("resume_memory_occupation", {"tags": ["kv_cache", "weights"]}),
    ]
    engine.engine.silent = True
    engine.submit(1, ask())
    with pytest.raises(Conflict):
        await engine.sleep()


DECODE = pytest.mark.parametrize("stage", [("decode", {"handoff_timeout": 0.05})], indirect=True)
PREFILL = pytest.mark.parametrize("stage", [("prefill", {})], indirect=True)


@DECODE
async def test_blocks_that_do_not_come_are_given_up(stage):
    stage.engine.engine.silent = True
    stage.engine.submit(1, ask(leg="decode", handoff=meeting()))
    tokens, last = await stage.ends()
    assert tokens == []
    assert isinstance(last.error, HandoffLost)
    assert "DYN_SGLANG_HANDOFF_TIMEOUT_SECS" in last.error.message
    assert stage.engine.engine.closed == ["r-1"], "SGLang still waits"


@DECODE
async def test_a_decode_leg_delivers_every_token(stage):
    stage.engine.submit(1, ask(leg="decode", handoff=meeting(room=9)))
    tokens, last = await stage.ends()
    assert (tokens, last.finish) == ([6, 7, 8, 9], "length")
    more = stage.engine.engine.calls[0][3]
    assert (more["bootstrap_host"], more["bootstrap_port"], more["bootstrap_room"]) == ("h", 1, 9)
    assert more["disagg_prefill_dp_rank"] == 0


@DECODE
async def test_a_decode_worker_computes_no_prompts_and_says_who_does(stage):
    with pytest.raises(NoWorkers, match="prefill worker"):
        stage.engine.submit(1, ask())


@PREFILL
async def test_a_prefill_leg_ends_without_a_token(stage):
    stage.engine.submit(1, ask(leg="prefill", handoff=meeting()))
    tokens, last = await stage.ends()
    assert (tokens, last.finish, last.error) == ([], "stop", None)
    _, _, params, more = stage.engine.engine.calls[0]
    assert params["max_new_tokens"] == 1
    assert more["bootstrap_room"] == 7
    assert "disagg_prefill_dp_rank" not in more


@DECODE
async def test_least_tokens_on_a_decode_worker_without_a_tokenizer_are_refused(stage):
    with pytest.raises(UnsupportedFeature, match="min_tokens"):
        stage.engine.submit(1, ask(StopRules(9, min_tokens=4), leg="decode", handoff=meeting()))


@PREFILL
async def test_a_prefill_leg_knows_no_least_tokens(stage):
    stage.engine.submit(1, ask(StopRules(9, min_tokens=4), leg="prefill", handoff=meeting()))
    await stage.ends()
    assert stage.engine.engine.calls[0][2]["max_new_tokens"] == 1


@PREFILL
async def test_the_canary_meets_nobody(stage):
    nobody = {"bootstrap_host": "2.2.2.2", "bootstrap_port": 0, "bootstrap_room": 0}
    stage.engine.submit(1, ask(StopRules(1), extra={"bootstrap_info": nobody}))
    tokens, last = await stage.ends()
    assert len(tokens) == 1
    assert last.finish == "length"
