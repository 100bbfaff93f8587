"""Small simulated clusters for tests: three workers, two frontends, a few seconds of load."""

from __future__ import annotations

import random

import msgspec

from holdfast.engines.mock.config import MockConfig
from holdfast.frontend.config import FrontendConfig
from holdfast.replay.effects import Account, account
from holdfast.replay.loads import Lengths, MadeUp, MadeUpLoad
from holdfast.replay.simulated import Settings
from holdfast.replay.troubles import read_troubles
from holdfast.replay.whatif import Happened, Scenario, what_if

SMALL = Settings(
    workers=3,
    frontends=2,
    frontend=FrontendConfig(hang_floor_secs=1.0),
    engine=MockConfig(step_ms=25.0, num_blocks=512),
)


def scenario(
    *faults: str, seed: int = 1, seconds: float = 4.0, rate: float = 6.0, settings: Settings = SMALL
) -> Scenario:
    makes = MadeUp(Lengths(32, 64), Lengths(40, 60), random.Random(seed))
    troubles = read_troubles(faults, settings.workers, settings.frontends)
    load = MadeUpLoad(makes, seconds, rate, None)
    return Scenario(settings=settings, load=load, troubles=troubles, seed=seed)


def happen(*faults: str, **more: object) -> tuple[Happened, Account]:
    happened = what_if(scenario(*faults, **more))  # type: ignore[arg-type]
    return happened, account(happened, "test")


def with_frontend(**changes: object) -> Settings:
    return msgspec.structs.replace(SMALL, frontend=msgspec.structs.replace(SMALL.frontend, **changes))
