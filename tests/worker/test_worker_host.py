"""The host: accept or refuse once, one frame per step and caller, leases given back on every way out."""

import asyncio

import msgspec
import pytest

from holdfast.base.errors import (
    EngineFailed,
    HandoffMismatch,
    InvalidRequest,
    PoisonRequest,
    UnsupportedFeature,
)
from holdfast.base.restored import from_info
from holdfast.engines.contract import Capabilities, SequenceStep, TokenLogprob, pack_ids
from holdfast.engines.handoff import KvHandoff, digest_of
from holdfast.worker import host as host_module
from holdfast.worker.host import EngineHost
from tests.worker.doubles import FakeCall, FakeConnection, ScriptEngine, payload


async def started(**options):
    host = EngineHost(ScriptEngine(), **options)
    await host.start(lambda what, share: None)
    return host, host.engine


def call_into(host, connection=None, body=None, **headers):
    call = FakeCall(body or payload(), connection, **headers)
    host.generate(call)
    return call


def at_rest(host):
    return host.in_flight == 0 and not any(host.leases.sums().values())


async def test_accept_once_then_tokens_then_end():
    host, engine = await started()
    call = call_into(host)
    assert call.words == ["accept"]
    assert host.leases.held("stream") == host.in_flight == 1
    engine.step([engine.token(1, 0)])
    engine.step([engine.token(1, 1, finish="stop", cached_tokens=3)])
    assert call.said[1:] == [("end", "stop", None, 3)]
    assert [[(i.index, i.tokens) for i in b] for b in call.connection.batches] == [[(0, [7])], [(1, [7])]]
    assert at_rest(host)


async def test_one_batch_per_connection_and_step_before_any_end():
    host, engine = await started(limit=10)
    one, two = FakeConnection("one"), FakeConnection("two")
    calls = [call_into(host, c) for c in (one, two, one)]
    order = []
    one.send_items = lambda items: order.append([i.call for i in items])
    two.send_items = lambda items: order.append([i.call for i in items])
    calls[2].end = lambda *a: order.append("end")
    engine.step([engine.token(1, 0), engine.token(2, 0), engine.token(3, 0, finish="length")])
    assert order == [[calls[0], calls[2]], [calls[1]], "end"]


async def test_logprobs_cross_as_plain_tuples():
    host, engine = await started()
    call = call_into(host)
    engine.step([engine.token(1, 0, logprobs=[TokenLogprob(-0.5, ((7, -0.5), (8, -1.5)))])])
    assert call.connection.batches[0][0].logprobs == [(-0.5, [(7, -0.5), (8, -1.5)])]


@pytest.mark.parametrize(
    ("finish", "error", "expected"),
    [
        ("abort", None, "stream_incomplete"),
        ("error", EngineFailed("x"), "engine_failed"),
        ("error", None, "engine_failed"),
    ],
)
async def test_failed_sequences_end_with_a_typed_error(finish, error, expected):
    host, engine = await started()
    call = call_into(host)
    engine.step([SequenceStep(1, 0, [], finish=finish, error=error)])
    assert call.said[-1][1] == finish
    assert call.said[-1][2].code == expected
    assert call.connection.batches == []
    assert at_rest(host)


async def test_stop_cancels_in_the_engine_and_ends_once():
    host, engine = await started()
    call = call_into(host)
    stop = call.on_stop
    stop("client gone")
    assert engine.cancelled == [1]
    assert call.said[-1] == ("end", "cancelled", None, 0)
    stop("again")
    engine.step([engine.token(1, 0, finish="stop")])
    assert call.words == ["accept", "end"]
    assert at_rest(host)


async def test_tokens_after_a_cancel_are_counted_and_dropped():
    host, engine = await started()
    call = call_into(host)
    before = host.measure()[0].tokens_after_cancel
    call.on_stop("bye")
    engine.step([engine.token(1, 0), engine.token(99, 0)])
    assert host.measure()[0].tokens_after_cancel == before + 2
    assert call.connection.batches == []


@pytest.mark.parametrize("error", [InvalidRequest("no"), PoisonRequest("bad")])
async def test_refusals_of_the_engine_pass_through(error):
    host, engine = await started()
    engine.refuse_with = error
    call = call_into(host)
    assert call.said == [("refuse", error)]
    assert at_rest(host)


async def test_an_unexpected_error_of_the_engine_refuses():
    host, engine = await started()
    engine.refuse_with = ZeroDivisionError("oops")
    call = call_into(host)
    assert call.said[0][1].code == "engine_failed"
    assert at_rest(host)


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x80", payload()[:-3]])
async def test_broken_payloads_are_the_callers_fault(body):
    host, _ = await started()
    call = FakeCall(body)
    host.generate(call)
    assert call.said[0][1].code == "invalid_request"


async def test_other_models_are_refused():
    host, _ = await started()
    host.offer.base({"script-model", "alias"})
    assert call_into(host, body=payload("alias")).words == ["accept"]
    assert call_into(host, body=payload("other")).said[0][1].code == "model_not_found"


async def test_the_limit_names_knob_and_value():
    host, _ = await started()
    calls = [call_into(host) for _ in range(8)]
    assert host.state == "saturated"
    refused = call_into(host).said[0][1]
    assert refused.code == "worker_saturated"
    assert refused.retry == "elsewhere"
    assert refused.details["threshold"] == refused.details["actual"] == 8
    assert refused.details["knob"] == "DYN_ENGINE_REQUEST_LIMIT"
    calls[0].on_stop("x")
    assert host.state == "ready"
    assert call_into(host).words == ["accept"]


async def test_draining_refuses_new_calls_and_lets_old_ones_finish():
    host, engine = await started()
    old = call_into(host)
    host.drain()
    assert host.state == "draining"
    assert call_into(host).said[0][1].code == "worker_draining"
    assert not host._idle.is_set()
    engine.step([engine.token(1, 0, finish="stop")])
    async with asyncio.timeout(5):
        await host.idle()
    assert old.said[-1][1] == "stop"


async def test_what_is_left_is_sent_elsewhere():
    host, engine = await started()
    calls = [call_into(host) for _ in range(3)]
    host.drain()
    assert host.send_elsewhere("grace is over") == 3
    assert {c.said[-1][2].code for c in calls} == {"worker_draining"}
    assert sorted(engine.cancelled) == [1, 2, 3]
    assert at_rest(host)


async def test_engine_death_tells_every_stream_and_is_final():
    deaths = []
    host, engine = await started(on_dead=deaths.append)
    calls = [call_into(host) for _ in range(3)]
    engine.die(EngineFailed("gone"))
    engine.die(EngineFailed("again"))
    assert [c.said[-1][2].code for c in calls] == ["engine_failed"] * 3
    assert [d.message for d in deaths] == ["gone"]
    assert host.state == "failed"
    assert call_into(host).said[0][1].code == "engine_failed"
    assert at_rest(host)


async def test_a_broken_connection_costs_only_its_own_streams():
    host, engine = await started(limit=10)
    bad, good = FakeConnection("bad", fail=True), FakeConnection("good")
    lost, fine = call_into(host, bad), call_into(host, good)
    engine.step([engine.token(1, 0), engine.token(2, 0)])
    assert lost.said[-1][2].code == "stream_incomplete"
    assert len(good.batches) == 1
    assert fine.words == ["accept"]
    assert engine.cancelled == [1]


async def test_the_deadline_of_the_call_is_the_backstop(monkeypatch):
    monkeypatch.setattr(host_module, "DEADLINE_SLACK", 0.0)
    host, engine = await started()
    call = call_into(host, remaining_ms=20)
    async with asyncio.timeout(5):
        await host.idle()
    assert call.said[-1][2].code == "deadline_exceeded"
    assert engine.cancelled == [1]
    assert at_rest(host)


async def test_pong_carries_progress_load_and_state():
    host = EngineHost(ScriptEngine())
    assert host.state == "starting"
    host.engine.phase = "warming"
    assert host.state == "warming"
    assert call_into(host).said[0][1].code == "engine_failed"
    await host.start(lambda what, share: None)
    host.engine.phase = "decode"
    call_into(host)
    (progress, load), state = host.measure(), host.state
    assert (progress.steps, progress.tokens, progress.prefilled, progress.phase) == (3, 4, 5, "decode")
    assert (progress.in_flight, progress.tokens_after_cancel, progress.silent_step_seconds) == (1, 2, 0.5)
    assert (load.running, load.kv_total_blocks, load.prefill_tokens, state) == (1, 10, 7, "ready")


async def test_close_ends_everything():
    host, engine = await started()
    call = call_into(host)
    await host.close()
    assert call.said[-1][2].code == "worker_draining"
    assert engine.closed == 1
    assert host.state == "stopped"


async def test_a_call_that_cannot_be_accepted_leaves_nothing_behind():
    host, engine = await started()
    call = FakeCall(payload())
    call.accept = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        host.generate(call)
    assert engine.cancelled == [1]
    assert at_rest(host)


async def test_kv_events_go_to_whoever_wants_them_after_each_step():
    seen = []
    host, engine = await started(on_kv_events=seen.append)
    engine.take_kv_events = lambda: ["stored"]
    call_into(host)
    engine.step([engine.token(1, 0)])
    engine.take_kv_events = list
    engine.step([engine.token(1, 1)])
    assert seen == [["stored"]]


# -- prompts that are computed for others --------------------------------------------------------------

HANDOFF = KvHandoff("script", "after_prefill", tokens=3, digest=digest_of(pack_ids([1, 2, 3])), params={"where": 1})


async def prefills(role="prefill", **options):
    engine = ScriptEngine()
    engine.role = role
    engine.capabilities = Capabilities(handoff="script")
    host = EngineHost(engine, **options)
    host.instance = "a" * 16
    info = await host.start(lambda what, share: None)
    assert info.role == role
    return host, engine


def prompt_into(host, connection=None, **more):
    call = FakeCall(payload(leg="prefill", **more), connection)
    host.prefill(call)
    return call


async def test_a_prefill_leg_is_answered_with_its_hand_off_and_kept_until_the_caller_lets_go():
    host, engine = await prefills()
    call = prompt_into(host)
    engine.step([SequenceStep(1, 0, [], finish="stop", handoff=HANDOFF)])
    assert call.words == ["accept", "data"]
    told = msgspec.msgpack.decode(call.said[1][1], type=KvHandoff)
    assert (told.source, told.fingerprint, told.params) == ("a" * 16, "f", {"where": 1})
    assert (host.in_flight, host.held) == (0, 1)
    assert host.measure()[0].in_flight == 0, "an engine that only keeps blocks is not busy"
    assert engine.cancelled == []
    call.on_stop("taken")
    assert engine.cancelled == [1]
    assert call.said[-1][:2] == ("end", "stop")
    assert host.held == 0
    assert at_rest(host)


async def test_what_nobody_lets_go_is_kept_for_a_while_only():
    host, engine = await prefills(hold=0.05)
    call = prompt_into(host)
    engine.step([SequenceStep(1, 0, [], finish="stop", handoff=HANDOFF)])
    async with asyncio.timeout(5):
        await host.idle()
    assert engine.cancelled == [1]
    assert call.said[-1][2].code == "handoff_lost"


async def test_a_worker_that_leaves_waits_for_what_it_keeps():
    host, engine = await prefills()
    call = prompt_into(host)
    engine.step([SequenceStep(1, 0, [], finish="stop", handoff=HANDOFF)])
    host.drain()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await host.idle()
    assert host.send_elsewhere("leaving") == 1
    assert call.said[-1][2].code == "worker_draining"
    assert at_rest(host)


async def test_a_prefill_worker_takes_no_streams_and_others_no_prompts():
    host, _ = await prefills()
    refused = call_into(host).said[0][1]
    assert (refused.code, refused.retry) == ("worker_saturated", "elsewhere")
    ordinary, _ = await started()
    assert prompt_into(ordinary).words == ["accept"]
    wrong = FakeCall(payload(leg="prefill"))
    ordinary.generate(wrong)
    assert wrong.said[0][1].code == "invalid_request"


@pytest.mark.parametrize(
    "changes", [{"digest": 1}, {"tokens": 2}, {"protocol": "nixl"}], ids=["other tokens", "half of them", "protocol"]
)
async def test_a_hand_off_is_verified_before_the_engine_sees_it(changes):
    host, engine = await prefills("decode")
    good = FakeCall(payload(leg="decode", handoff=HANDOFF))
    host.generate(good)
    assert good.words == ["accept"]
    bad = FakeCall(payload(leg="decode", handoff=msgspec.structs.replace(HANDOFF, **changes)))
    host.generate(bad)
    error = bad.said[0][1]
    assert (error.code, error.fault, error.retry) == ("handoff_mismatch", "internal", "same")
    assert isinstance(from_info(error.info()), HandoffMismatch), "it survives the wire"
    assert list(engine.submitted) == [1]


async def test_an_engine_that_cannot_hand_over_cannot_have_a_part():
    engine = ScriptEngine()
    engine.role = "decode"
    with pytest.raises(UnsupportedFeature, match="DYN_DISAGGREGATION_MODE"):
        await EngineHost(engine).start(lambda what, share: None)
