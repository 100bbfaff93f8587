"""Every engine keeps the contract, check by check; what was seen is put on record."""

from __future__ import annotations

import pytest

from tests.engines.conformance.checks import NotApplicable
from tests.engines.conformance.recorder import started

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

SLOW_START = 30.0
"""Seconds: an engine that may take longer is not started for its first lone check, which gets the shared one."""


async def judge(check, run, record):
    try:
        facts = await check(run)
    except NotApplicable as reason:
        record.say(check.name, "not applicable", reason=str(reason))
    except BaseException:
        record.say(check.name, "failed")
        run.faults.clear()
        raise
    else:
        record.say(check.name, "passed", facts)


async def test_shared(run, shared_check, record):
    await judge(shared_check, run, record)


async def test_alone(described, lone_check, record):
    shared, record.shared = record.shared, None
    if shared is not None and described.start_seconds > SLOW_START:
        await judge(lone_check, shared, record)  # nobody else needs it any more
        return
    if shared is not None:
        await shared.engine.close()  # two engines at once may be more than the memory
    async with started(described) as run:
        await judge(lone_check, run, record)
