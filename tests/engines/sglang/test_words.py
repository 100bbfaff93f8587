"""What the adapter says to SGLang and understands of it, without SGLang."""

from __future__ import annotations

import json

import msgspec
import pytest

from holdfast.base.errors import (
    ContextLengthExceeded,
    EngineFailed,
    HandoffLost,
    InvalidRequest,
    UnsupportedFeature,
    WorkerSaturated,
)
from holdfast.base.ids import SequenceKey
from holdfast.base.settings import InvalidSetting
from holdfast.engines.attempt import Attempt
from holdfast.engines.contract import GenerateRequest, Guided, Sampling, StopRules, TokenLogprob, pack_ids
from holdfast.engines.handoff import KvHandoff
from holdfast.engines.sglang.arguments import command_line
from holdfast.engines.sglang.chunks import error_of, output_of
from holdfast.engines.sglang.config import SglangConfig
from holdfast.engines.sglang.patience import Patience
from holdfast.engines.sglang.rendezvous import Meeting, meeting_of
from holdfast.engines.sglang.sampling import FORBIDDEN, Skills, begins_anew, check, forced, params_of

BARE = Skills(vocab_size=100, tokenizer=False, seeds=False)
FULL = Skills(vocab_size=100, tokenizer=True, seeds=True)


def attempt(sampling=None, stop=None, generated=(), **more):
    request = GenerateRequest(
        request_id="r",
        model="m",
        prompt_ids=pack_ids([3, 4, 5]),
        sampling=sampling or Sampling(temperature=0.0),
        stop=stop or StopRules(max_tokens=10),
        generated_ids=pack_ids(generated),
        **more,
    )
    return Attempt(SequenceKey(1), request, [3, 4, 5], list(generated), context_length=50, eos=(2,))


# ---- sampling ----


def test_neutral_values_and_what_is_left_of_the_budget():
    params = params_of(attempt(generated=[7, 8]), BARE)
    assert params["max_new_tokens"] == 8
    assert params["top_k"] == -1
    assert params["stop_token_ids"] == [2]
    assert "logit_bias" not in params
    assert "sampling_seed" not in params
    assert "min_new_tokens" not in params


def test_everything_is_mapped():
    sampling = Sampling(
        temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=-0.4, logit_bias={9: -3.0}, seed=2**64 - 1,
    )  # fmt: skip
    params = params_of(attempt(sampling, StopRules(10, min_tokens=4, stop_token_ids=(11,)), generated=[7]), FULL)
    assert params["temperature"] == 0.7
    assert (params["top_p"], params["top_k"], params["min_p"]) == (0.9, 5, 0.1)
    penalties = [params[f"{name}_penalty"] for name in ("repetition", "presence", "frequency")]
    assert penalties == [1.2, 0.3, -0.4]
    assert params["logit_bias"] == {"9": -3.0, "7": pytest.approx(0.1)}
    assert params["stop_token_ids"] == [2, 11]
    assert params["min_new_tokens"] == 3
    assert params["sampling_seed"] == 2**63 - 1, "SGLang takes 63 bits and a sign"


def test_a_grammar_begins_anew_with_the_whole_budget_and_nothing_carried_over():
    sampling = Sampling(guided=Guided("regex", "a"), frequency_penalty=0.5)
    one = attempt(sampling, StopRules(10, min_tokens=4), generated=[7, 8])
    assert begins_anew(one)
    params = params_of(one, FULL)
    assert (params["max_new_tokens"], params["min_new_tokens"]) == (10, 4)
    assert "logit_bias" not in params
    assert not begins_anew(attempt(sampling))


def test_penalties_of_earlier_attempts_are_carried_over():
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.25, logit_bias={7: 1.0})
    params = params_of(attempt(sampling, generated=[7, 8, 7]), BARE)
    assert params["logit_bias"] == {"7": 1.0 - 1.0 - 0.25, "8": -0.75}
    assert "logit_bias" not in params_of(attempt(Sampling(frequency_penalty=0.5)), BARE)


def test_a_prefill_leg_makes_one_token():
    assert params_of(attempt(leg="prefill"), BARE)["max_new_tokens"] == 1


def test_least_tokens_without_a_tokenizer_are_a_run_that_cannot_end():
    one = attempt(Sampling(logit_bias={5: 1.0}), StopRules(10, min_tokens=4, stop_token_ids=(11,)), generated=[7])
    first = forced(params_of(one, BARE), one)
    assert first["max_new_tokens"] == 3
    assert first["ignore_eos"]
    assert first["logit_bias"] == {"5": 1.0, "2": FORBIDDEN, "11": FORBIDDEN}
    assert "stop_token_ids" not in first


@pytest.mark.parametrize(
    ("guided", "words"),
    [
        (Guided("json_object"), {"json_schema": '{"type":"object"}'}),
        (Guided("json_schema", '{"type":"integer"}'), {"json_schema": '{"type":"integer"}'}),
        (Guided("regex", "[0-9]+"), {"regex": "[0-9]+"}),
        (Guided("grammar", 'root ::= "a"'), {"ebnf": 'root ::= "a"'}),
        (Guided("choice", '["yes", "n.o"]'), {"regex": "(yes|n\\.o)"}),
    ],
)
def test_constraints(guided, words):
    params = params_of(attempt(Sampling(guided=guided)), FULL)
    assert {name: params[name] for name in words} == words


@pytest.mark.parametrize(
    ("sampling", "stop", "error"),
    [
        (Sampling(logit_bias={100: 1.0}), None, InvalidRequest),
        (Sampling(), StopRules(5, stop_token_ids=(100,)), InvalidRequest),
        (Sampling(repetition_penalty=2.5), None, InvalidRequest),
        (Sampling(presence_penalty=-3.0), None, InvalidRequest),
        (Sampling(temperature=-1.0), None, InvalidRequest),
        (Sampling(temperature=float("nan")), None, InvalidRequest),
        (Sampling(top_p=0.0), None, InvalidRequest),
        (Sampling(min_p=1.5), None, InvalidRequest),
        (Sampling(logprobs=10_000), None, InvalidRequest),
        (Sampling(guided=Guided("regex", "a")), None, UnsupportedFeature),
        (Sampling(presence_penalty=1.0), StopRules(5, min_tokens=2), UnsupportedFeature),
    ],
)
def test_what_cannot_be_done_is_refused_before_sglang_hears_of_it(sampling, stop, error):
    with pytest.raises(error):
        check(attempt(sampling, stop), BARE)


# ---- chunks ----


def chunk(ids, finish=None, **meta):
    return {"output_ids": ids, "meta_info": {"finish_reason": finish, "completion_tokens": len(ids), **meta}}


def read(one, *, wants_logprobs=False, waits=False):
    return output_of(one, wants_logprobs=wants_logprobs, waits=waits)


def test_tokens_and_ends():
    assert read(chunk([5, 6])).tokens == [5, 6]
    assert read(chunk([5], {"type": "length", "length": 9})).finish == "length"
    stopped = read(chunk([2], {"type": "stop", "matched": 2}, cached_tokens=16))
    assert (stopped.tokens, stopped.finish, stopped.cached_tokens) == ([2], "stop", 16)


def test_log_probabilities_belong_to_the_tokens_of_their_chunk():
    meta = {"output_token_logprobs": [(-0.5, 7, None)], "output_top_logprobs": [[(-0.5, 7, None), (-1.5, 8, None)]]}
    assert read(chunk([7], **meta), wants_logprobs=True).logprobs == [TokenLogprob(-0.5, ((7, -0.5), (8, -1.5)))]
    assert read(chunk([7, 8], **meta), wants_logprobs=True).logprobs is None
    assert read(chunk([7], **meta)).logprobs is None


@pytest.mark.parametrize(
    ("status", "waits", "error"),
    [
        (400, False, InvalidRequest),
        (500, False, EngineFailed),
        (500, True, HandoffLost),
        (503, False, WorkerSaturated),
        (503, True, HandoffLost),
        (429, False, WorkerSaturated),
    ],
)
def test_aborts_with_a_status_are_typed_and_their_tokens_nobodys(status, waits, error):
    output = read(chunk([29], {"type": "abort", "status_code": status, "message": "why"}), waits=waits)
    assert output.tokens == []
    assert output.finish == "error"
    assert type(output.error) is error
    assert "why" in output.error.message


def test_an_abort_without_a_status_can_go_on_elsewhere():
    output = read(chunk([7], {"type": "abort", "status_code": None, "message": "Aborted"}))
    assert (output.tokens, output.finish, output.error) == ([], "abort", None)


def test_success_without_a_token_and_logits_that_are_no_numbers_are_errors():
    nothing = read(chunk([], {"type": "length", "length": 0}))
    assert isinstance(nothing.error, EngineFailed)
    broken = read(chunk([0], {"type": "stop", "matched": "NaN happened"}))
    assert isinstance(broken.error, EngineFailed)
    assert broken.tokens == []


def test_refusals_of_the_front_half():
    assert type(error_of(ValueError("The input is longer than the model's context length"))) is ContextLengthExceeded
    assert type(error_of(ValueError("no"))) is InvalidRequest
    assert error_of(RuntimeError("?")) is None


# ---- flags ----


def words(role="aggregated", port=0, **settings):
    return command_line(SglangConfig(**settings), "/m", role, events="ipc://e", replay="ipc://r", port=port)


def test_the_operators_flags_stand_between_our_wishes_and_our_needs():
    argv = words(args="--page-size 32 --grammar-backend 'none'", page_size=16)
    assert argv.index("32") > argv.index("16")
    assert argv.index("--skip-tokenizer-init") > argv.index("none")
    events = json.loads(argv[argv.index("--kv-events-config") + 1])
    assert events["bind"] is True
    assert (events["endpoint"], events["format"]) == ("ipc://e", "dynamo")


def test_roles_and_guided_decoding_have_flags_of_their_own():
    assert "--skip-tokenizer-init" not in words(guided=True)
    assert "--disaggregation-mode" not in words()
    prefill = words("prefill", 8998, bootstrap_host="10.0.0.1")
    assert prefill[prefill.index("--disaggregation-mode") + 1] == "prefill"
    assert prefill[prefill.index("--disaggregation-bootstrap-port") + 1] == "8998"
    assert prefill[prefill.index("--host") + 1] == "10.0.0.1"
    assert "--disaggregation-bootstrap-port" not in words("decode")


def test_flags_that_cannot_be_split_are_said():
    with pytest.raises(InvalidSetting, match="DYN_SGLANG_ARGS"):
        words(args="--x 'open")


# ---- meeting ----


def test_where_legs_meet():
    params = {"bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": 2, "prefill_rank": 3}
    handoff = KvHandoff("sglang", "rendezvous", tokens=3, digest=0, params=params)
    assert meeting_of(attempt(handoff=handoff).request) == Meeting("h", 1, 2, 3)
    assert meeting_of(attempt().request) is None
    canary = {"bootstrap_info": {"bootstrap_host": "2.2.2.2", "bootstrap_port": 0, "bootstrap_room": 0}}
    assert meeting_of(attempt(extra=canary).request) == Meeting("2.2.2.2", 0, 0)


def test_a_hand_off_that_does_not_say_where_is_refused():
    handoff = KvHandoff("sglang", "rendezvous", tokens=3, digest=0, params={"bootstrap_host": "h"})
    with pytest.raises(InvalidRequest, match="bootstrap_port"):
        meeting_of(attempt(handoff=handoff).request)


# ---- patience ----


def test_patience_grows_with_the_tokens_in_hand_and_learns_the_pace():
    patience = Patience(5.0)
    short = patience.bound(100)
    assert 5.0 < short < 6.0
    assert patience.bound(100_000) > 100 * (short - 5.0)
    for _ in range(40):
        patience.came(1000, 0.1)
    assert patience.bound(100_000) < 100
    for _ in range(40):
        patience.came(1000, 20.0)
    assert patience.bound(1000) > 40, "a slow fleet is not taken for a dead one"
    patience.came(0, 1.0)


def test_settings_read_as_they_are_documented():
    assert msgspec.structs.asdict(SglangConfig())["handoff_timeout"] == 5.0
