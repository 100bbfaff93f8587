"""One SGLang with a tokenizer: guided decoding, pause, cache, and KV events as routers need them.

Its adapters need pinned memory and kernels for GPUs: they are tested against a stand-in (`test_staged`).
"""

from __future__ import annotations

import asyncio
import json

import pytest
import pytest_asyncio

from holdfast.base.errors import NotFound, UnsupportedFeature
from holdfast.engines.abilities import Adaptable, Adapter, Clearable, Pausable, Sleepable
from holdfast.engines.contract import Guided
from holdfast.engines.sglang import SglangEngine
from holdfast.kv.events import AllBlocksCleared
from holdfast.kv.hashes import block_hashes
from holdfast.kv.tiers import Tier
from holdfast.worker.kv_log import KvLog
from tests.engines.conformance.recorder import started
from tests.engines.conformance.subject import Subject
from tests.engines.sglang.harness import NEEDS_SGLANG, config, prepare
from tests.patience import within

pytestmark = [NEEDS_SGLANG, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(1200)]


def make() -> SglangEngine:
    return SglangEngine(config("--grammar-backend", "xgrammar", guided=True))


SUBJECT = Subject("sglang", make, lambda engine: None, "CPU", start_seconds=300.0, answer_seconds=60.0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def run():
    await prepare()
    async with started(SUBJECT) as recorder:
        yield recorder


async def test_it_can_what_it_says(run) -> None:
    engine = run.engine
    assert all(isinstance(engine, one) for one in (Adaptable, Pausable, Clearable, Sleepable))
    can = run.info.capabilities
    assert not can.lora
    with pytest.raises(UnsupportedFeature, match="enable-lora"):
        await engine.load_adapter(Adapter("cat", "/nowhere"))
    with pytest.raises(NotFound):
        await engine.unload_adapter("cat")
    assert "json_schema" in can.guided
    assert can.continuation == "greedy"
    with pytest.raises(UnsupportedFeature, match="enable-memory-saver"):
        await engine.sleep()


@pytest.mark.parametrize(
    ("guided", "fits"),
    [
        (Guided("choice", '["yes", "no"]'), lambda text: text in ("yes", "no")),
        (Guided("regex", "[0-9]{3}-[0-9]{2}"), lambda text: text.replace("-", "").isdigit() and len(text) == 6),
        (Guided("json_object"), lambda text: isinstance(json.loads(text), dict)),
        (
            Guided("json_schema", '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}'),
            lambda text: isinstance(json.loads(text)["a"], int),
        ),
    ],
)
async def test_guided_output_keeps_to_its_constraint_and_continues_inside_of_it(run, guided, fits) -> None:
    ask = {"guided": guided, "ignore_eos": False}
    whole = await run.one(run.subject.prompts[0], 48, **ask)
    text = run.tokenizer.decode([token for token in whole if token not in run.info.eos_token_ids])
    if run.sequences[max(run.sequences)].finish == "stop":  # small models fill an object with blanks
        assert fits(text), text
    if len(whole) > 2:
        (rest,) = await run.generate(run.request(run.subject.prompts[0], 48, generated=whole[:2], attempt=2, **ask))
        assert rest == whole[2:]


async def test_least_tokens_and_penalties_go_together_with_a_tokenizer(run) -> None:
    tokens = await run.one(run.subject.ending, 40, ignore_eos=False, min_tokens=30, presence_penalty=0.5)
    assert len(tokens) >= 30


async def test_a_pause_keeps_what_runs_and_loses_no_token(run) -> None:
    engine, prompt = run.engine, run.subject.prompts[2]
    whole = await run.one(prompt, 24)
    key = run.submit(run.request(prompt, 24))
    await run.until("three tokens", lambda: len(run.sequences[key].tokens) >= 3)
    await engine.pause_generation("keep")
    await asyncio.sleep(within(0.25))  # what was on its way comes
    heard = len(run.sequences[key].tokens)
    await asyncio.sleep(within(0.25))
    assert len(run.sequences[key].tokens) == heard < 24
    await engine.resume_generation()
    assert await run.finish(key) == [whole]


async def test_a_pause_can_end_what_runs_so_that_it_goes_on_elsewhere(run) -> None:
    key = run.submit(run.request(run.subject.prompts[2], 200))
    await run.until("three tokens", lambda: len(run.sequences[key].tokens) >= 3)
    await run.engine.pause_generation("abort")
    await run.finish(key)
    assert run.sequences[key].finish == "abort"
    await run.engine.resume_generation()
    assert len(await run.one(run.subject.prompts[0], 2)) == 2


async def test_routers_know_prompts_by_our_hashes_until_the_cache_is_cleared(run) -> None:
    engine, size = run.engine, run.info.block_size
    await run.idle()
    engine.take_kv_events()
    log = KvLog(1, size, native=False)
    prompt = run.filled(4 * size + 3, salt=4711)
    for _ in range(2):
        await run.generate(*[run.request(prompt, 4) for _ in range(3)])

    wanted = block_hashes(prompt, size)

    def known() -> bool:
        log.take(engine.take_kv_events())
        return log.index.lookup(wanted).of(0)[Tier.DEVICE] == len(wanted)

    await run.until("the prompt's blocks are known", known)
    await run.idle()
    await engine.clear_cache()
    events: list[object] = []

    def cleared() -> bool:
        events.extend(engine.take_kv_events())
        return any(isinstance(event, AllBlocksCleared) for event in events)

    await run.until("the cache is told to be empty", cleared)
    key = run.submit(run.request(prompt, 2))
    await run.finish(key)
    assert run.sequences[key].end.cached_tokens == 0
    run.blame()
