"""The soak, for half a minute: the same bounds, but for growth, which takes longer to show."""

from __future__ import annotations

import pytest

from tests.proof import soak

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(240)]


async def test_half_a_minute_of_everything() -> None:
    result = await soak.run(30.0, seed=3, clients=8, every=2.0)
    for name, value in soak.table(result, 3):
        print(f"{name:<28}{value}")
    assert result.problems() == []
    assert result.answered > 50
    assert sum(result.faults.values()) >= 5
