"""Every sampling parameter arrives; what the engine would ignore is refused; outputs are cut where they end."""

from __future__ import annotations

import json

import pytest

from holdfast.base.errors import EngineFailed, InvalidRequest, UnsupportedFeature
from holdfast.base.ids import SequenceKey
from holdfast.engines.attempt import admit
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
from holdfast.engines.trtllm import TrtllmConfig
from holdfast.engines.trtllm.api import load_api
from holdfast.engines.trtllm.arguments import engine_arguments
from holdfast.engines.trtllm.outputs import Reader
from holdfast.engines.trtllm.sampling import refuse, sampling_params
from holdfast.engines.trtllm.stats import load_of, read_stats
from tests.support.tensorrt_llm_standin import installed

EOS = (2, 7)


@pytest.fixture
def api():
    with installed():
        yield load_api()


def info(**can):
    capabilities = Capabilities(max_logprobs=20, guided=("json_object", "json_schema", "regex", "choice"), **can)
    return EngineInfo(
        engine="trtllm", version="1.3.0", model="m", context_length=100, block_size=4, total_kv_blocks=9,
        max_num_seqs=4, max_num_batched_tokens=64, eos_token_ids=EOS, vocab_size=1000, fingerprint="f",
        capabilities=capabilities, files=ModelFiles(b"{}", ""),
    )  # fmt: skip


def attempt(generated=(), stop=None, leg="aggregated", **sampling):
    request = GenerateRequest(
        request_id="a" * 32,
        model="m",
        prompt_ids=pack_ids([5, 6]),
        generated_ids=pack_ids(generated),
        sampling=Sampling(**sampling),
        stop=StopRules(**{"max_tokens": 10, **(stop or {})}),
        leg=leg,
    )
    return admit(SequenceKey(1), request, vocab_size=1000, context_length=100, eos=EOS, protocol="trtllm")


def test_a_plain_request_is_sampled_and_not_greedy(api):
    params = sampling_params(api, attempt(), info())
    assert not params.greedy
    assert (params.temperature, params.top_p, params.top_k) == (1.0, 1.0, 0)
    assert (params.end_id, params.stop_token_ids, params.include_stop_str_in_output) == (2, [7], True)
    assert (params.max_tokens, params.detokenize, params.add_special_tokens) == (10, False, False)
    assert params.logprobs is None


def test_temperature_zero_is_greedy_on_every_version(api):
    params = sampling_params(api, attempt(temperature=0.0), info())
    assert (params.top_k, params.temperature) == (1, None)


def test_everything_arrives(api):
    stop = {"min_tokens": 6, "stop_token_ids": (9,), "ignore_eos": True}
    made = attempt(
        [8, 8], stop, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.4, seed=2**63, logprobs=0,
    )  # fmt: skip
    params = sampling_params(api, made, info(penalties=True))
    assert (params.top_p, params.top_k, params.min_p) == (0.9, 40, 0.1)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.2, 0.3, 0.4)
    assert (params.ignore_eos, params.stop_token_ids) == (True, [9])
    assert (params.max_tokens, params.min_tokens) == (8, 4), "what is left after two tokens"
    assert params.logprobs == 1, "0 would be none at all on older versions"
    assert 0 <= params.seed < 2**64
    assert params.seed != 2**63, "the same numbers must not be drawn again"


def test_a_prefill_leg_cannot_end(api):
    params = sampling_params(api, attempt(stop={"stop_token_ids": (9,), "min_tokens": 3}, leg="prefill"), info())
    assert (params.max_tokens, params.ignore_eos, params.stop_token_ids, params.min_tokens) == (1, True, None, None)


@pytest.mark.parametrize(
    ("guided", "wanted"),
    [
        (Guided("json_object"), {"json_object": True}),
        (Guided("json_schema", "{}"), {"json": "{}"}),
        (Guided("regex", "a+"), {"regex": "a+"}),
        (Guided("choice", json.dumps(["a.b", "c"])), {"regex": "(a\\.b|c)"}),
    ],
)
def test_constraints(api, guided, wanted):
    made = attempt(guided=guided)
    refuse(made, info())
    found = sampling_params(api, made, info()).guided_decoding
    assert {name: getattr(found, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("sampling", "error"),
    [
        ({"guided": Guided("grammar", "x")}, UnsupportedFeature),
        ({"guided": Guided("choice", "[]")}, InvalidRequest),
        ({"guided": Guided("choice", "{")}, InvalidRequest),
        ({"presence_penalty": 0.5}, UnsupportedFeature),
        ({"logprobs": 21}, InvalidRequest),
        ({"temperature": -1.0}, InvalidRequest),
        ({"logit_bias": {5000: 1.0}}, InvalidRequest),
    ],
)
def test_refusals(sampling, error):
    with pytest.raises(error):
        refuse(attempt(**sampling), info())


def test_logit_bias_becomes_a_tensor(api, monkeypatch):
    class Torch:
        float32 = "f32"

        @staticmethod
        def zeros(size, dtype):
            return [0.0] * size

    monkeypatch.setitem(__import__("sys").modules, "torch", Torch)
    bias = sampling_params(api, attempt(logit_bias={3: 2.0}), info()).embedding_bias
    assert (len(bias), bias[3], sum(bias)) == (1000, 2.0, 2.0)


class Said:
    """A cumulative result that grows."""

    def __init__(self):
        self.outputs = [self]
        self.token_ids, self.logprobs = [], []
        self.finish_reason = self.error = self.disaggregated_params = None
        self.finished = False
        self.cached_tokens = 3


def test_cumulative_outputs_become_deltas_and_nothing_is_said_twice():
    said, reader = Said(), Reader(attempt(), "f")
    said.token_ids = [10, 11]
    assert reader.read(said).tokens == [10, 11]
    assert reader.read(said) is None
    said.token_ids = [10, 11, 12]
    said.finish_reason, said.finished = "length", True
    end = reader.read(said)
    assert (end.tokens, end.finish, end.cached_tokens) == ([12], "length", 3)


def test_nothing_behind_an_end_is_delivered_unless_min_tokens_held_it_back():
    said, reader = Said(), Reader(attempt(), "f")
    said.token_ids = [10, 7, 11]
    end = reader.read(said)
    assert (end.tokens, end.finish) == ([10, 7], "stop")
    held, reader = Said(), Reader(attempt(stop={"min_tokens": 5}), "f")
    held.token_ids = [10, 7, 11]
    assert (said_now := reader.read(held)).tokens == [10, 7, 11]
    assert said_now.finish is None


@pytest.mark.parametrize(
    ("reason", "finish"), [("cancelled", "abort"), ("timeout", "abort"), (None, "abort"), ("stop", "stop")]
)
def test_reasons(reason, finish):
    said, reader = Said(), Reader(attempt(), "f")
    said.finish_reason, said.finished = reason, True
    assert reader.read(said).finish == finish


def test_errors_that_are_said_and_prefill_legs_without_a_hand_off():
    said = Said()
    said.finished, said.error = True, "out of blocks"
    assert isinstance(Reader(attempt(), "f").read(said).error, EngineFailed)
    bare = Said()
    bare.finished, bare.finish_reason = True, "length"
    assert isinstance(Reader(attempt(leg="prefill"), "f").read(bare).error, EngineFailed)


def test_lost_log_probabilities_are_an_error():
    said, reader = Said(), Reader(attempt(logprobs=1), "f")
    said.token_ids, said.logprobs = [10, 11], [{10: -1.0}]
    with pytest.raises(EngineFailed, match="1 log probabilities for 2 tokens"):
        reader.read(said)


def test_engine_arguments(api):
    config = TrtllmConfig(
        model="x", context_length=64, guided_decoding_backend="xgrammar", enable_lora=True, chunked_prefill=False,
        override_engine_args='{"dtype": "float16", "kv_cache_config": {"max_tokens": 99}}',
    )  # fmt: skip
    found = engine_arguments(api, config, model="/m", role="decode")
    assert found["max_seq_len"] == 64
    assert (found["dtype"], found["guided_decoding_backend"], found["enable_lora"]) == ("float16", "xgrammar", True)
    assert found["skip_tokenizer_init"] is False
    assert found["cache_transceiver_config"].backend == "DEFAULT"
    cache = found["kv_cache_config"]
    assert (cache.max_tokens, cache.enable_partial_reuse, cache.tokens_per_block) == (99, False, 32)
    assert cache.event_buffer_max_size > 0
    plain = engine_arguments(api, TrtllmConfig(publish_kv_events=False), model="/m", role="aggregated")
    assert "cache_transceiver_config" not in plain
    assert plain["kv_cache_config"].event_buffer_max_size == 0
    with pytest.raises(InvalidRequest, match="not a JSON object"):
        engine_arguments(api, TrtllmConfig(override_engine_args="[1]"), model="/m", role="aggregated")


def test_statistics_are_believed_only_while_something_runs():
    rank, said = read_stats(
        {"numActiveRequests": 3, "numQueuedRequests": 1, "kvCacheStats": {"usedNumBlocks": 5, "maxNumBlocks": 9}}
    )
    busy = load_of({rank: said}, in_hand=4, begun=2, size=1, pending=7)
    assert (busy.running, busy.waiting, busy.kv_used_blocks, busy.kv_total_blocks, busy.prefill_tokens) == (
        3,
        1,
        5,
        9,
        7,
    )
    idle = load_of({rank: said}, in_hand=0, begun=0, size=1, pending=0)
    assert (idle.running, idle.kv_used_blocks, idle.kv_total_blocks) == (0, 0, 9)
    two = load_of({0: said, 1: said}, in_hand=8, begun=0, size=2, pending=0)
    assert [part.running for part in two.ranks] == [3, 3]
