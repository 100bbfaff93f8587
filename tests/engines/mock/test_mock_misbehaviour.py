"""Everything the mock engine can be told to do wrong, and directives in prompts."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from holdfast.base.errors import EngineFailed, InvalidRequest, UnsupportedFeature, WorkerSaturated
from holdfast.engines.mock.checker import expected_tokens, text_of
from holdfast.engines.mock.vocabulary import vocabulary
from tests.engines.mock.mockrun import request, running
from tests.support.virtual_time import virtual


async def text_from(prompt, **config):
    async with running(**config) as run:
        key = run.submit(request(prompt, max_tokens=200))
        tokens = await run.finish(key)
        assert run.ends[key].finish == "stop"
        assert tokens[-1] == vocabulary().eos_id
        return text_of(tokens[:-1])


@pytest.mark.parametrize(
    ("prompt", "output"),
    [
        ("[[mock:say Hello, world!]]", "Hello, world!"),
        ("x [[mock:say naïve 🙂 水]] y", "naïve 🙂 水"),
        (r"[[mock:say a\]\]b\nc\\d]]", "a]]b\nc\\d"),
        ('[[mock:call f {"a": "b"}]]', '<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>'),
        ("<|im_start|>user\n[[mock:say old]]<|im_end|>\n<|im_start|>user\n[[mock:say new]]<|im_end|>", "new"),
    ],
)  # fmt: skip
async def test_say(prompt, output):
    assert await text_from(prompt) == output


async def test_directives_of_earlier_turns_are_history():
    prompt = "<|im_start|>user\n[[mock:say old]]<|im_end|>\n<|im_start|>user\nplain<|im_end|>"
    async with running() as run:
        wanted = request(prompt, max_tokens=5)
        assert await run.finish(run.submit(wanted)) == expected_tokens(wanted)
        assert "old" not in text_of(run.tokens[1])


async def test_directives_can_be_switched_off_and_come_by_extra():
    async with running(directives=False) as run:
        key = run.submit(request("[[mock:say hi]]", max_tokens=5))
        await run.finish(key)
        assert run.ends[key].finish == "length"
    async with running() as run:
        key = run.submit(request(extra={"mock": ["eos-after 3"]}))
        assert len(await run.finish(key)) == 4
        assert run.ends[key].finish == "stop"


@pytest.mark.parametrize(
    "bad", ["[[mock:dance]]", "[[mock:eos-after x]]", "[[mock:call f {]]", "[[mock:jump-after 3]]"]
)
async def test_unknown_directives_are_named(bad):
    async with running() as run:
        with pytest.raises(InvalidRequest, match="mock directive"):
            run.submit(request(bad))


@pytest.mark.parametrize(("kind", "finish"), [("error", "error"), ("abort", "abort")])
async def test_early_ends_happen_once_and_the_continuation_goes_through(kind, finish):
    wanted = request(f"[[mock:{kind}-after 4]]", max_tokens=10)
    async with running() as run:
        key = run.submit(wanted)
        got = await run.finish(key)
        assert run.ends[key].finish == finish
        assert (run.ends[key].error is not None) == (kind == "error")
        assert len(got) == 4
        again = run.submit(request(f"[[mock:{kind}-after 4]]", max_tokens=10, generated=got, attempt=2))
        assert got + await run.finish(again) == expected_tokens(wanted)
        assert run.ends[again].finish == "length"


async def test_refuse_directive_refuses_early_attempts_only():
    async with running() as run:
        for attempt in (1, 2):
            with pytest.raises(WorkerSaturated):
                run.submit(request("[[mock:refuse 2]]", attempt=attempt))
        await run.finish(run.submit(request("[[mock:refuse 2]]", attempt=3)))


@pytest.mark.parametrize("kind", ["error", "abort"])
async def test_ordered_ends_hit_that_many_sequences(kind):
    async with running(step_ms=1.0) as run:
        keys = [run.submit(request(f"p {i}", max_tokens=20)) for i in range(4)]
        await run.until(lambda: len(run.tokens[keys[0]]) == 3)
        run.engine.misbehave(kind, times=2)
        await run.until(lambda: len(run.ends) == 4)
        assert sorted(e.finish for e in run.ends.values()) == [kind, kind, "length", "length"]


async def test_ordered_refusals():
    async with running() as run:
        run.engine.misbehave("refuse", times=2)
        for _ in range(2):
            with pytest.raises(WorkerSaturated):
                run.submit(request())
        await run.finish(run.submit(request()))


async def test_a_hang_stops_the_counters_while_busy_and_loses_nothing():
    async with running(step_ms=1.0) as run:
        wanted = request(max_tokens=30)
        key = run.submit(wanted)
        await run.until(lambda: len(run.tokens[key]) >= 5)
        run.engine.misbehave("hang")
        before = run.engine.progress()
        late = run.submit(request("late", max_tokens=2))
        await asyncio.sleep(0.03)
        assert run.engine.progress() == before
        assert run.engine.load().running + run.engine.load().waiting == 2
        run.engine.misbehave("unhang")
        assert await run.finish(key) == expected_tokens(wanted)
        await run.finish(late)


async def test_a_hang_can_end_by_itself_and_be_idle():
    async with running() as run:
        run.engine.misbehave("hang", seconds=0.02)
        key = run.submit(request())
        await run.finish(key)


async def test_hang_after_delivers_exactly_so_many():
    async with running(step_ms=1.0) as run:
        wanted = request("[[mock:hang-after 6]]", max_tokens=10)
        key = run.submit(wanted)
        await run.until(lambda: len(run.tokens[key]) == 6)
        await asyncio.sleep(0.02)
        assert len(run.tokens[key]) == 6
        run.engine.misbehave("unhang")
        assert await run.finish(key) == expected_tokens(wanted)


@virtual
async def test_slow_stretches_steps():
    async with running(step_ms=2.0) as run:
        run.engine.misbehave("slow", factor=10.0)
        key = run.submit(request(max_tokens=4))
        await run.until(lambda: bool(run.steps))
        assert run.engine.progress().silent_step_seconds == pytest.approx(0.02)
        await run.finish(key)
        assert run.times[-1] - run.times[0] >= 0.055
        run.engine.misbehave("slow")
        again = run.submit(request(max_tokens=4))
        await run.until(lambda: bool(run.tokens[again]))
        assert run.engine.progress().silent_step_seconds == pytest.approx(0.002)


async def test_a_slow_sequence_does_not_slow_the_others():
    async with running(step_ms=1.0) as run:
        slow = run.submit(request("[[mock:slow 5]]", max_tokens=50))
        fast = run.submit(request(max_tokens=50))
        await run.finish(fast)
        assert 5 <= len(run.tokens[slow]) <= 12


async def test_compiling_is_one_silent_step():
    async with running() as run:
        key = run.submit(request("[[mock:compile 0.05]]", max_tokens=2))
        await asyncio.sleep(0.01)
        progress = run.engine.progress()
        assert (progress.phase, progress.silent_step_seconds, progress.steps) == ("compiling", 0.05, 0)
        await run.finish(key)


async def test_a_long_prefill_takes_its_time_and_can_be_cancelled():
    async with running() as run:
        key = run.submit(request("[[mock:prefill 30]]"))
        await asyncio.sleep(0.01)
        assert run.engine.progress().phase == "prefill"
        assert run.engine.progress().silent_step_seconds == 30
        run.engine.cancel(key)
        assert run.engine.load().kv_used_blocks == 0
        async with asyncio.timeout(5):
            await run.finish(run.submit(request(max_tokens=2)))


async def test_death_is_reported_once_and_final():
    async with running(step_ms=1.0) as run:
        run.submit(request(max_tokens=100))
        await run.until(lambda: bool(run.steps))
        run.engine.misbehave("die")
        run.engine.misbehave("die")
        assert len(run.deaths) == 1
        with pytest.raises(EngineFailed):
            run.submit(request())
        with pytest.raises(EngineFailed):
            await run.engine.check()


async def test_a_fault_of_the_engine_is_its_death_not_silence(monkeypatch):
    async with running(step_ms=1.0) as run:
        monkeypatch.setattr(run.engine, "_token", lambda sequence: 1 / 0)
        run.submit(request())
        await run.until(lambda: bool(run.deaths))
        assert "ZeroDivisionError" in run.deaths[0].message


async def test_commands_are_checked_and_can_be_forbidden():
    async with running() as run:
        with pytest.raises(InvalidRequest, match="crash"):
            run.engine.control({"do": "sing"})
        assert run.engine.control({"do": "slow", "factor": 2})["ok"] is True
    async with running(control=False) as run:
        with pytest.raises(UnsupportedFeature):
            run.engine.misbehave("slow", factor=2.0)


CHILD = """
import asyncio, sys
sys.path.insert(0, {folder!r})
from tests.engines.mock.mockrun import request, running
async def main():
    async with running(step_ms=1.0) as run:
        key = run.submit(request({prompt!r}, max_tokens=10))
        await run.until(lambda: len(run.tokens[key]) == {tokens})
        print("reached", flush=True)
        await run.finish(key)
        print("finished", flush=True)
asyncio.run(main())
"""


def child(prompt, tokens):
    code = CHILD.format(folder=str(Path(__file__).parents[3]), prompt=prompt, tokens=tokens)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("prompt", "tokens"), [("[[mock:crash]]", 0), ("[[mock:crash-after 3]]", 3), ("[[mock:crash-at 3]]", 3)]
)
def test_crash_is_a_sigkill_at_the_right_token(prompt, tokens):
    with child(prompt, tokens) as process:
        out, _ = process.communicate(timeout=20)
        assert process.returncode == -signal.SIGKILL
        assert out == "reached\n"


def test_freeze_is_a_sigstop():
    with child("[[mock:freeze-after 3]]", 3) as process:
        assert process.stdout.readline() == "reached\n"
        deadline = time.monotonic() + 10
        while True:
            pid, status = os.waitpid(process.pid, os.WUNTRACED | os.WNOHANG)
            if pid and os.WIFSTOPPED(status):
                break
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGCONT)
        out, _ = process.communicate(timeout=20)
        assert out == "finished\n"
