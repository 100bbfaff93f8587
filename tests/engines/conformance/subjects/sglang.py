"""SGLang on the CPU, with stand-ins for the two binary modules that it imports and never calls there."""

from __future__ import annotations

import os
import signal

from holdfast.engines.contract import Engine
from holdfast.engines.sglang import SglangEngine
from tests.engines.conformance.subject import Subject
from tests.engines.sglang.harness import config, equip, prepare


def make() -> SglangEngine:
    equip()
    return SglangEngine(config())


def kill(engine: Engine) -> None:
    """Its scheduler is gone, as after a fault of the driver."""
    os.kill(engine.child_pids()[0], signal.SIGKILL)


SUBJECT = Subject(
    name="sglang",
    make=make,
    kill=kill,
    where="CPU (torch, float32), SmolLM2-135M",
    length=12,
    start_seconds=300.0,
    answer_seconds=60.0,
    in_flight=2,
    packages=("sglang", "torch"),
    prepare=prepare,
)
