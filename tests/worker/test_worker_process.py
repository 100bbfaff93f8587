"""Real worker processes over real sockets: start, serve, misbehave, drain, die."""

import asyncio
import hashlib
import json
import random
import signal
import time
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer

from holdfast.base.errors import DeadlineExceeded, HoldfastError, InvalidRequest
from holdfast.base.settings import InvalidSetting, fields_of
from holdfast.engines.contract import unpack_ids
from holdfast.engines.mock import MockConfig, MockEngine
from holdfast.engines.mock.checker import expected_tokens
from holdfast.models.card import PromptFiles
from holdfast.runtime.discovery.mem import MemDiscovery, MemHub
from holdfast.runtime.shutdown import EXIT_CUT, EXIT_HANDED_OVER, EXIT_OVERRUN, ShutdownBudget
from holdfast.worker.config import WorkerConfig
from holdfast.worker.process import WorkerProcess
from tests.engines.mock.mockrun import request
from tests.worker.remote import call, generate, linked, pong, worker_child


async def test_tokens_are_exact_over_the_wire(tmp_path):
    async with worker_child(tmp_path) as (_, record), linked(record.address, instance=record.instance) as link:
        wanted = [request(f"prompt {i}", max_tokens=30) for i in range(16)]
        callers = [generate(link, one) for one in wanted]
        for one, caller in zip(wanted, callers, strict=True):
            await caller.ended()
            assert (caller.finish, caller.error) == ("length", None)
            assert caller.tokens == expected_tokens(one)
        whole = expected_tokens(wanted[3])
        again = generate(link, request("prompt 3", max_tokens=30, generated=whole[:11], attempt=2))
        await again.ended()
        assert (again.index, whole[:11] + again.tokens) == (11, whole)
        with_logprobs = await generate(link, request(logprobs=2, max_tokens=3)).ended()
        assert len(with_logprobs.tokens) == 3


async def test_the_card_leads_to_a_working_tokenizer_and_template(tmp_path):
    async with worker_child(tmp_path) as (_, record), linked(record.address) as link:
        card = record.cards[0]
        assert (card.name, card.engine, record.state, record.component) == ("mock", "mock", "ready", "backend")
        files = {}
        for artifact in (card.tokenizer, card.prompt_files):
            fetched = await call(link, "artifact", artifact.sha256.encode()).ended()
            assert (fetched.finish, fetched.error) == ("done", None)
            data = b"".join(fetched.data)
            assert (hashlib.sha256(data).hexdigest(), len(data)) == (artifact.sha256, artifact.size)
            files[artifact] = data
        tokenizer = Tokenizer.from_str(files[card.tokenizer].decode())
        ids = tokenizer.encode("Tell me about the river.", add_special_tokens=False).ids
        assert ids == unpack_ids(request().prompt_ids)
        prompt_files = msgspec.msgpack.decode(files[card.prompt_files], type=PromptFiles)
        assert "<|im_start|>" in prompt_files.chat_template
        missing = await call(link, "artifact", b"0" * 64).ended()
        assert missing.error.code == "not_found"


async def test_stop_reaches_the_engine_and_nothing_is_left(tmp_path):
    async with worker_child(tmp_path) as (_, record), linked(record.address) as link:
        caller = generate(link, request(max_tokens=10_000))
        await caller.until(lambda: len(caller.tokens) > 3)
        assert (await pong(link)).progress.in_flight == 1
        caller.handle.stop("client gone")
        await caller.ended()
        assert caller.finish == "cancelled"
        answer = await pong(link)
        assert (answer.progress.in_flight, answer.load.running, answer.progress.tokens_after_cancel) == (0, 0, 0)
        assert answer.state == "ready"


async def test_a_lost_caller_stops_its_streams_only(tmp_path):
    async with worker_child(tmp_path) as (_, record), linked(record.address) as kept:
        mine = generate(kept, request("mine", max_tokens=10_000))
        async with linked(record.address) as lost:
            theirs = generate(lost, request("theirs", max_tokens=10_000))
            await theirs.until(lambda: bool(theirs.tokens))
            assert (await pong(kept)).progress.in_flight == 2
        async with asyncio.timeout(5):
            while (await pong(kept)).progress.in_flight != 1:
                pass
        before = len(mine.tokens)
        await mine.until(lambda: len(mine.tokens) > before)


async def test_refusals_are_typed(tmp_path):
    async with worker_child(tmp_path, {"engine_request_limit": 1}) as (_, record), linked(record.address) as link:
        first = generate(link, request(max_tokens=10_000))
        await first.until(lambda: bool(first.tokens))
        second = await generate(link, request()).ended()
        assert (second.finish, second.error.code, second.error.retry) == ("refused", "worker_saturated", "elsewhere")
        assert (await pong(link)).state == "saturated"
        first.handle.kill()
        nonsense = await call(link, "generate", b"\xc1").ended()
        assert nonsense.error.code == "invalid_request"


@pytest.mark.parametrize(
    ("prompt", "finish", "code"),
    [
        ("[[mock:abort-after 3]]", "abort", "stream_incomplete"),
        ("[[mock:error-after 3]]", "error", "engine_failed"),
        ("[[mock:refuse]]", "refused", "worker_saturated"),
    ],
)
async def test_failures_of_a_sequence_are_migratable(tmp_path, prompt, finish, code):
    async with worker_child(tmp_path) as (_, record), linked(record.address) as link:
        caller = await generate(link, request(prompt)).ended()
        assert (caller.finish, caller.error.code, caller.error.retry) == (finish, code, "elsewhere")


async def test_a_crash_breaks_the_stream_after_exactly_the_tokens_before_it(tmp_path):
    async with worker_child(tmp_path) as (child, record), linked(record.address) as link:
        caller = await generate(link, request("[[mock:crash-after 5]]")).ended()
        assert (caller.finish, len(caller.tokens)) == ("broken", 5)
        assert await child.exit_code() == -signal.SIGKILL


async def test_engine_death_tells_the_streams_and_ends_the_process(tmp_path):
    async with worker_child(tmp_path) as (child, record), linked(record.address) as link:
        callers = [generate(link, request(max_tokens=10_000)) for _ in range(3)]
        await callers[-1].until(lambda: bool(callers[-1].tokens))
        await call(link, "control", b'{"do": "die"}').until(lambda: True)
        for caller in callers:
            await caller.ended()
            assert (caller.finish, caller.error.code) == ("error", "engine_failed")
        assert await child.exit_code() == 1


async def test_control_hangs_and_wakes_the_engine(tmp_path):
    async with worker_child(tmp_path) as (_, record), linked(record.address) as link:
        wanted = request(max_tokens=200)
        caller = generate(link, wanted)
        await caller.until(lambda: bool(caller.tokens))
        answer = await call(link, "control", b'{"do": "hang"}').ended()
        assert json.loads(answer.data[0])["hung"] is True
        first, second = await pong(link), await pong(link)
        assert first.progress == second.progress
        assert first.progress.in_flight == 1
        await call(link, "control", b'{"do": "unhang"}').ended()
        await caller.ended()
        assert caller.tokens == expected_tokens(wanted)


async def test_sigterm_lets_short_streams_finish_and_sends_long_ones_elsewhere(tmp_path):
    budget = {"shutdown": ShutdownBudget(shutdown_inflight_timeout=0.3)}
    async with worker_child(tmp_path, budget) as (child, record), linked(record.address) as link:
        long = generate(link, request("long", max_tokens=20_000))
        short = generate(link, request("short", max_tokens=40))
        await long.until(lambda: len(long.tokens) > 2)
        child.process.send_signal(signal.SIGTERM)
        await short.ended()
        assert short.finish == "length"
        assert link.draining is not None
        with pytest.raises(HoldfastError):
            generate(link, request())
        await long.ended()
        assert (long.finish, long.error.code) == ("error", "worker_draining")
        assert long.tokens == expected_tokens(request("long", max_tokens=20_000), len(long.tokens))
        assert await child.exit_code() == EXIT_HANDED_OVER


async def test_a_second_signal_hurries(tmp_path):
    async with worker_child(tmp_path) as (child, record), linked(record.address) as link:
        caller = generate(link, request(max_tokens=20_000))
        await caller.until(lambda: bool(caller.tokens))
        child.process.send_signal(signal.SIGINT)
        async with asyncio.timeout(5):
            while link.draining is None:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        child.process.send_signal(signal.SIGTERM)
        await caller.ended()
        assert caller.error.code == "worker_draining"
        assert await child.exit_code(5.0) == EXIT_HANDED_OVER


async def test_a_third_signal_ends_it_now(tmp_path):
    """The engine takes its time to close, and the budget would allow it."""
    code = SLOW_TO_CLOSE.format(root=str(tmp_path), close="await asyncio.sleep(600)", total=600.0)
    async with worker_child(tmp_path, argv=("-c", code)) as (child, record), linked(record.address) as link:
        child.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(5):
            while link.connected:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        child.process.send_signal(signal.SIGINT)
        child.process.send_signal(signal.SIGTERM)
        assert await child.exit_code(4.0) == EXIT_CUT


async def test_closing_that_hangs_ends_with_the_budget(tmp_path):
    """The event loop itself is stuck, so that only a thread can end the process."""
    code = SLOW_TO_CLOSE.format(root=str(tmp_path), close="time.sleep(600)", total=0.5)
    async with worker_child(tmp_path, argv=("-c", code)) as (child, _):
        child.process.send_signal(signal.SIGTERM)
        assert await child.exit_code(10.0) == EXIT_OVERRUN


SLOW_TO_CLOSE = """
import asyncio, sys, time
from holdfast.engines.mock import MockConfig, MockEngine
from holdfast.runtime.shutdown import ShutdownBudget
from holdfast.worker.config import WorkerConfig
from holdfast.worker.entry import run

class Slow(MockEngine):
    async def close(self):
        {close}

budget = ShutdownBudget(shutdown_total_timeout={total})
config = WorkerConfig(engine="mock", file_kv={root!r}, shutdown=budget)
sys.exit(run(config, lambda: Slow(MockConfig())))
"""


async def test_a_frozen_worker_goes_on_where_it_was(tmp_path):
    async with worker_child(tmp_path) as (child, record), linked(record.address) as link:
        wanted = request("[[mock:freeze-after 5]]", max_tokens=30)
        caller = generate(link, wanted)
        await caller.until(lambda: len(caller.tokens) == 5)
        await asyncio.to_thread(wait_stopped, child.process.pid)
        child.process.send_signal(signal.SIGCONT)
        await caller.ended()
        assert caller.tokens == expected_tokens(wanted)


def wait_stopped(pid):
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.002)


async def test_a_worker_of_ones_own_in_twenty_lines(tmp_path):
    example = Path(__file__).parents[2] / "examples" / "own_worker.py"
    async with worker_child(tmp_path, argv=(str(example),)) as (child, record), linked(record.address) as link:
        assert record.cards[0].name == "mirror"
        wanted = msgspec.structs.replace(request(max_tokens=4), model="mirror")
        caller = await generate(link, wanted).ended()
        assert caller.tokens == unpack_ids(wanted.prompt_ids)[::-1][:4]
        child.process.send_signal(signal.SIGTERM)
        assert await child.exit_code() == 0


# in this process, with discovery in memory


def a_worker(hub, engine=None, **config):
    worker = WorkerConfig(engine="mock", **config)
    engine = engine or MockEngine(MockConfig(step_ms=1.0))
    return WorkerProcess(worker, engine, MemDiscovery(hub), random.Random(5))


async def test_the_record_appears_when_ready_and_goes_on_purpose():
    hub = MemHub()
    watcher = MemDiscovery(hub)
    await watcher.start()
    events = []
    watcher.subscribe(events.append)
    worker = a_worker(hub, served_model_name="served", model_aliases=("also",), instance_id="00ff" * 4)
    running = asyncio.create_task(worker.run())
    async with asyncio.timeout(10):
        await worker.ready.wait()
    (record,) = watcher.snapshot()
    assert (record.instance, record.epoch, record.endpoints) == (
        "00ff" * 4,
        worker.epoch,
        ("generate", "artifact", "holdfast_canary", "kv_events", "control"),
    )
    async with linked(record.address) as link:
        other = await generate(link, request()).ended()
        assert other.error.code == "model_not_found"
        fine = await generate(link, msgspec.structs.replace(request(), model="also")).ended()
        assert fine.finish == "length"
    worker.stop()
    assert await asyncio.wait_for(running, 10) == 0
    assert [(e.kind, e.purposeful) for e in events] == [("added", False), ("removed", True)]
    await watcher.close()


@pytest.mark.parametrize("phase", ["starting", "warming"])
async def test_stopping_while_the_engine_starts(phase):
    hub = MemHub()
    worker = a_worker(hub, MockEngine(MockConfig(warmup_seconds=60.0)))
    running = asyncio.create_task(worker.run())
    async with asyncio.timeout(5):
        while worker.host.engine.progress().phase != phase:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        worker.stop()
        assert await running == 0
    assert not hub.records


async def test_an_engine_that_does_not_get_ready_is_given_up():
    worker = a_worker(MemHub(), MockEngine(MockConfig(warmup_seconds=60.0)), engine_start_timeout=0.05)
    with pytest.raises(DeadlineExceeded, match="DYN_ENGINE_START_TIMEOUT_SECS"):
        await worker.run()


async def test_off_loopback_needs_a_secret():
    with pytest.raises(InvalidRequest):
        await a_worker(MemHub(), rpc_host="0.0.0.0").run()


async def test_a_secret_is_asked_for():
    hub = MemHub()
    worker = a_worker(hub, secret="s3cret")
    running = asyncio.create_task(worker.run())
    async with asyncio.timeout(10):
        await worker.ready.wait()
    (record,) = hub.records.values()
    with pytest.raises(HoldfastError):
        async with linked(record.address):
            pass
    async with linked(record.address, secret=b"s3cret") as link:
        assert (await generate(link, request()).ended()).finish == "length"
    worker.stop()
    assert await asyncio.wait_for(running, 10) == 0


def test_instance_ids_are_checked():
    with pytest.raises(InvalidSetting):
        a_worker(MemHub(), instance_id="nonsense")


def test_every_setting_is_described():
    names = {field.name for field in fields_of(WorkerConfig)}
    assert {"engine", "namespace", "shutdown_total_timeout", "engine_request_limit", "rpc_port"} <= names
    assert len(fields_of(MockConfig)) == len(MockConfig.__struct_fields__)
