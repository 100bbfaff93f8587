"""Every engine keeps the contract, check by check; what was seen is put on record."""

from __future__ import annotations

import pytest

from tests.engines.conformance.checks import NotApplicable
from tests.engines.conformance.recorder import started

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]


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
    if record.shared is not None:
        await record.shared.engine.close()  # two engines at once may be more than the memory
    async with started(described) as run:
        await judge(lone_check, run, record)
