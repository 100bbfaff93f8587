"""The suite would notice: an engine with a planted fault fails the check that is there for it."""

from __future__ import annotations

import pytest

from holdfast.base.errors import HoldfastError
from tests.engines.conformance.checks import CHECKS, NotApplicable, named
from tests.engines.conformance.planted import PLANTED, Wrapped, quick
from tests.engines.conformance.recorder import started


@pytest.mark.parametrize(("what", "made", "check"), PLANTED, ids=[what for what, _, _ in PLANTED])
async def test_a_planted_fault_is_noticed(what, made, check):
    async with started(quick(made)) as run:
        with pytest.raises((AssertionError, HoldfastError, pytest.fail.Exception)):
            await named(check)(run)


async def test_the_wrapper_itself_is_innocent():
    async with started(quick(Wrapped)) as run:
        for one in [one for one in CHECKS if not one.alone]:
            try:
                await one(run)
            except NotApplicable:
                continue


def test_every_kind_of_check_has_a_planted_fault():
    planted = {check for _, _, check in PLANTED}
    assert planted <= {one.name for one in CHECKS}
    assert len(planted) >= 15
