"""Requests in vLLM's words, flags, memory, and what is generated anew. Needs no vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from holdfast.base.errors import EngineFailed, InvalidRequest, UnsupportedFeature
from holdfast.base.ids import SequenceKey
from holdfast.base.settings import InvalidSetting
from holdfast.cli.catalogue import section
from holdfast.cli.options import parse_flags
from holdfast.cli.worker import _joined, narrow
from holdfast.engines.attempt import Attempt, Output, admit
from holdfast.engines.contract import CacheCounts, EngineLoad, Guided, Sampling, TokenLogprob
from holdfast.engines.handoff import KvHandoff, digest_of
from holdfast.engines.vllm.arguments import prepare_environment, transfers, words_of
from holdfast.engines.vllm.config import VllmConfig
from holdfast.engines.vllm.describe import continuation
from holdfast.engines.vllm.engine import VllmEngine
from holdfast.engines.vllm.memory import Device, until_free
from holdfast.engines.vllm.replay import replayed
from holdfast.engines.vllm.sampling import (
    carried_bias,
    check,
    continued_seed,
    guided_arguments,
    logprobs_of,
    parameters,
)
from holdfast.engines.vllm.stats import Statistics
from tests.engines.test_driven import ask


def attempt(**request: Any) -> Attempt:
    return admit(
        SequenceKey(1), ask(**request), vocab_size=1000, context_length=64, eos=(2,), protocol="nixl"
    )  # fmt: skip


def test_every_parameter_arrives() -> None:
    one = attempt(generated=(8, 9), max_tokens=10, min_tokens=5, stop_token_ids=(7,))
    sampling = Sampling(0.5, 0.9, 40, 0.1, 1.1, 0.2, 0.3, {4: 1.5}, 77, 3)
    one.request = type(one.request)(**{
        **{name: getattr(one.request, name) for name in one.request.__struct_fields__}, "sampling": sampling,
    })  # fmt: skip
    said = parameters(one)
    assert said["temperature"] == 0.5
    assert (said["top_p"], said["top_k"], said["min_p"]) == (0.9, 40, 0.1)
    assert (said["repetition_penalty"], said["presence_penalty"], said["frequency_penalty"]) == (1.1, 0.2, 0.3)
    assert (said["max_tokens"], said["min_tokens"], said["logprobs"]) == (8, 3, 3)
    assert (said["stop_token_ids"], said["ignore_eos"]) == ([2, 7], False)
    assert said["logit_bias"] == pytest.approx({4: 1.5, 8: -0.5, 9: -0.5})
    assert said["seed"] == continued_seed(77, 2) != 77
    again = parameters(one, replayed=True)
    assert (again["max_tokens"], again["min_tokens"], again["seed"]) == (10, 5, 77)
    assert again["logit_bias"] == {4: 1.5}


def test_greedy_requests_have_no_seed_and_the_first_attempt_has_its_own() -> None:
    assert "seed" not in parameters(attempt())
    assert continued_seed(5, 0) == 5
    assert all(0 <= continued_seed(seed, index) < 1 << 63 for seed in (-1, (1 << 64) - 1) for index in range(50))
    assert len({continued_seed(5, index) for index in range(100)}) == 100


def test_a_prefill_leg_asks_for_one_token_and_for_its_blocks_to_be_kept() -> None:
    said = parameters(attempt(leg="prefill", max_tokens=30, stop_token_ids=(7,)))
    assert (said["max_tokens"], said["ignore_eos"], said["temperature"]) == (1, True, 0.0)
    assert said["extra_args"]["kv_transfer_params"]["do_remote_decode"] is True


def test_a_decode_leg_names_the_blocks_unless_it_begins_anew() -> None:
    prompt = bytes([5, 0, 0, 0, 6, 0, 0, 0, 7, 0, 0, 0])
    handoff = KvHandoff("nixl", "after_prefill", 3, digest_of(prompt), params={"remote_port": 1})
    one = attempt(leg="decode", handoff=handoff)
    assert parameters(one)["extra_args"] == {"kv_transfer_params": {"remote_port": 1}}
    assert "extra_args" not in parameters(one, replayed=True)


def test_penalties_of_what_exists_become_bias() -> None:
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.25, logit_bias={9: 1.0})
    assert carried_bias(sampling, [8, 8, 9]) == {8: -1.25, 9: 0.25}
    assert carried_bias(Sampling(), [8, 8]) == {}


def test_what_vllm_cannot_do_is_refused() -> None:
    for wrong in (
        Sampling(temperature=-1.0), Sampling(top_p=0.0), Sampling(top_k=-2), Sampling(min_p=2.0),
        Sampling(presence_penalty=3.0), Sampling(logit_bias={5000: 1.0}), Sampling(temperature=float("nan")),
    ):  # fmt: skip
        with pytest.raises(InvalidRequest):
            check(wrong, max_logprobs=20, vocab_size=1000)
    with pytest.raises(UnsupportedFeature):
        check(Sampling(logprobs=21), max_logprobs=20, vocab_size=1000)
    check(Sampling(logprobs=20, logit_bias={999: 1.0}), max_logprobs=20, vocab_size=1000)


def test_constraints_by_kind() -> None:
    assert guided_arguments(Guided("json_object")) == {"json_object": True}
    assert guided_arguments(Guided("json_schema", "{}")) == {"json": "{}"}
    assert guided_arguments(Guided("choice", '["a"]')) == {"choice": ["a"]}
    assert guided_arguments(Guided("regex", "a+")) == {"regex": "a+"}
    assert guided_arguments(Guided("grammar", "root ::= 'a'")) == {"grammar": "root ::= 'a'"}
    with pytest.raises(InvalidRequest):
        guided_arguments(Guided("choice", "a, b"))


def test_log_probabilities_by_rank_with_the_sampled_one_apart() -> None:
    entry = {
        7: SimpleNamespace(rank=5, logprob=-4.0),
        3: SimpleNamespace(rank=2, logprob=-1.0),
        4: SimpleNamespace(rank=1, logprob=-0.5),
    }
    assert logprobs_of([7], [entry], 2) == [TokenLogprob(-4.0, ((4, -0.5), (3, -1.0)))]
    assert logprobs_of([7], [entry], 0) == [TokenLogprob(-4.0, ())]


async def said(*outputs: Output) -> AsyncGenerator[Output, None]:
    for output in outputs:
        yield output


async def test_what_exists_is_passed_over_and_must_be_the_same() -> None:
    outputs = [
        Output([1]),
        Output([2, 3], logprobs=[TokenLogprob(-1.0), TokenLogprob(-2.0)]),
        Output([4], finish="stop"),
    ]
    heard = [output async for output in replayed(said(*outputs), [1, 2])]
    assert [(output.tokens, output.finish) for output in heard] == [([3], None), ([4], "stop")]
    assert heard[0].logprobs == [TokenLogprob(-2.0)]
    for wrong in ([Output([1, 9])], [Output([1], finish="stop")]):
        with pytest.raises(EngineFailed, match="faithfully"):
            [output async for output in replayed(said(*wrong), [1, 2])]
    ended = [output async for output in replayed(said(Output([1], finish="abort")), [1, 2])]
    assert [(output.tokens, output.finish) for output in ended] == [([], "abort")]


def test_which_continuations_begin_anew() -> None:
    def begins_anew(mode: Any, **sampling: Any) -> bool:
        one = attempt(generated=(8,))
        fields = {name: getattr(one.request, name) for name in one.request.__struct_fields__}
        one.request = type(one.request)(**{**fields, "sampling": Sampling(**{"temperature": 0.0, **sampling})})
        return VllmEngine(VllmConfig(model="m", replay=mode))._replays(one)

    grammar = Guided("json_object")
    assert begins_anew("guided", guided=grammar)
    assert not begins_anew("guided", temperature=1.0)
    assert begins_anew("always", temperature=1.0)
    assert begins_anew("always", frequency_penalty=1.0)
    assert not begins_anew("always")
    assert not begins_anew("never", guided=grammar)


def test_greedy_continuations_are_claimed_where_they_were_measured() -> None:
    assert (continuation("float32"), continuation("bfloat16")) == ("greedy", "none")
    assert continuation("float32", on_cpu=False) == "none"


def test_unknown_flags_go_to_vllm_in_their_order() -> None:
    argv = ["--engine", "vllm", "--model", "/m", "--max-model-len", "512", "--enforce-eager", "--block-size=32",
            "--namespace", "n", "-tp", "2", "--override", "-1", "--no-enable-prefix-caching"]  # fmt: skip
    names = narrow(argv)
    assert names == ("worker", "vllm", "log")
    fields = [field for name in names for field in section(name).fields]
    flags = parse_flags(argv, fields, keep=True)
    assert flags.values == {"engine": "vllm", "model": "/m", "namespace": "n"}
    assert flags.rest == (
        "--max-model-len", "512", "--enforce-eager", "--block-size=32", "-tp", "2", "--override", "-1",
        "--no-enable-prefix-caching",
    )  # fmt: skip
    config = VllmConfig(model="/m", args="--dtype float32")
    assert _joined(config, flags.rest).startswith("--dtype float32 --max-model-len 512")
    assert narrow(["--engine", "mock"]) == ()


def test_the_engine_may_be_named_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_ENGINE", "vllm")
    assert narrow([]) == ("worker", "vllm", "log")
    assert narrow(["--engine=mock"]) == ()


def test_words_and_environment() -> None:
    assert words_of(VllmConfig(model="a b", args="--x 'c d'")) == ["--model", "a b", "--x", "c d"]
    for wrong in (VllmConfig(), VllmConfig(model="m", args="'")):
        with pytest.raises(InvalidSetting):
            words_of(wrong)
    environ = {"VLLM_CPU_OMP_THREADS_BIND": "0-3"}
    prepare_environment(VllmConfig(model="m"), "aggregated", environ)
    assert environ == {
        "VLLM_CPU_OMP_THREADS_BIND": "0-3",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    prepare_environment(VllmConfig(model="m"), "prefill", environ)
    assert environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "127.0.0.1"
    assert int(environ["VLLM_NIXL_SIDE_CHANNEL_PORT"]) > 0
    assert not transfers(VllmConfig(model="m", kv_transfer="none"), "prefill")
    assert transfers(VllmConfig(model="m", kv_transfer="nixl"), "aggregated")


async def test_a_start_waits_for_memory_and_goes_on_in_the_end() -> None:
    left = [1, 1, 5]

    def read() -> list[Device]:
        return [Device("host memory", left.pop(0) if len(left) > 1 else left[0], 4)]

    assert await until_free(read, 30.0)
    assert left == [5]
    assert not await until_free(lambda: [Device("GPU 0", 1, 2)], 0.0)
    assert await until_free(list, 0.0)


def test_loads_by_rank_and_none_when_nothing_is_in_hand() -> None:
    steps: list[int] = []
    statistics = Statistics(lambda: steps.append(1))
    prefix = SimpleNamespace(hits=3, queries=9)

    def record(rank: int, running: int, waiting: int, usage: float) -> None:
        stats = SimpleNamespace(
            num_running_reqs=running, num_waiting_reqs=waiting, kv_cache_usage=usage, prefix_cache_stats=prefix
        )
        statistics.record(stats, rank)

    record(0, 2, 1, 0.5)
    statistics.record(None, 0)
    assert len(steps) == 2
    assert statistics.load(ranks=1, blocks=10, live=4, prefill_tokens=7) == EngineLoad(2, 2, 5, 10, 7)
    assert statistics.load(ranks=1, blocks=10, live=0, prefill_tokens=0) == EngineLoad(kv_total_blocks=10)
    record(1, 1, 0, 0.2)
    both = statistics.load(ranks=2, blocks=10, live=4, prefill_tokens=0)
    assert (both.running, both.waiting, both.kv_used_blocks, both.kv_total_blocks) == (3, 1, 7, 20)
    assert [rank.kv_used_blocks for rank in both.ranks] == [5, 2]
    assert (statistics.cached, statistics.queried) == (6, 18)
    engine = VllmEngine(VllmConfig(model="m"))
    engine.statistics = statistics
    assert engine.cache_counts() == CacheCounts(queried=18, hits=6)


def test_errors_of_vllm_by_what_they_mean() -> None:
    engine = VllmEngine(VllmConfig(model="m"))

    def raised(name: str, *bases: type[Exception]) -> Exception:
        return type(name, bases or (Exception,), {})("why\n  stack")

    assert isinstance(engine.failure(ValueError("top_p")), InvalidRequest)
    assert isinstance(engine.failure(raised("VLLMClientError")), InvalidRequest)
    assert isinstance(engine.failure(raised("Odd")), EngineFailed)
    dead = raised("EngineDeadError")
    assert engine.is_death(dead)
    assert engine.failure(dead).details.get("engine_died") is True
    wrapped = raised("EngineGenerateError")
    wrapped.__cause__ = ValueError("bad grammar")
    assert isinstance(engine.failure(wrapped), InvalidRequest)
    assert not engine.is_death(wrapped)


async def test_a_model_that_is_not_named_is_said_at_once() -> None:
    engine = VllmEngine(VllmConfig())
    with pytest.raises(InvalidSetting, match="--model"):
        await engine.start(lambda _: None, lambda _: None, lambda *_: None)
    await engine.close()
    await asyncio.sleep(0)
