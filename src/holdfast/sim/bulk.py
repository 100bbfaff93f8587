"""Requests that do not go the short way: prompts that travel as uploads over a connection of their own, and answers
that outlast the credit that a stream is given at first. Drawn from the tape.

Must never look at what happened.
"""

from __future__ import annotations

from typing import Any

from holdfast.base.limits import INITIAL_CREDIT_TOKENS, INLINE_PAYLOAD_BYTES
from holdfast.sim.links import NetworkSettings
from holdfast.sim.tape import Stream
from holdfast.sim.workload import MODEL, Manner, Wish

ID_BYTES = 4
PROMPT = INLINE_PAYLOAD_BYTES // ID_BYTES
"""Tokens of the longest prompt that still travels inline."""
ANSWER = INITIAL_CREDIT_TOKENS // 2
"""Tokens after which a stream asks for more credit."""
BLOCKS = 2_048
"""KV blocks of an engine that can hold a few of these."""
STEP_MS = 3.0
NARROW = NetworkSettings(window=8_192, high_water=2_048, low_water=512, bandwidth=5e6)
"""A network in which whoever does not read soon lets others wait."""
_IDS = 4_000


def bulk_wish(tape: Stream, number: int, at: float, frontends: int) -> Wish:
    """Return a request that arrives then."""
    frontend = tape.choose(frontends, "frontend")
    uploaded = tape.chance(0.6, "long prompt")
    length = PROMPT + tape.choose(PROMPT // 2, "prompt tokens") if uploaded else 8
    first, stride = tape.choose(_IDS, "first id"), 1 + tape.choose(97, "stride")
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": [100 + (first + i * stride) % _IDS for i in range(length)],
        "max_tokens": 4 + tape.choose(30, "max tokens") if uploaded else ANSWER + tape.choose(ANSWER, "max tokens"),
        "seed": 1 + tape.choose(1 << 30, "seed"),
        "ignore_eos": True,
    }
    if not tape.chance(0.2, "whole answer"):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return Wish(f"b{number:03d}", at, frontend, "completions", body, manner=_manner(tape))


def _manner(tape: Stream) -> Manner:
    kind = tape.choose(8, "manner")
    if kind == 1:
        return Manner(leaves="time", after=tape.log_uniform(0.003, 1.5, "leaves after"))
    if kind == 2:
        return Manner(reading="slowly", rate=tape.log_uniform(20_000, 200_000, "rate"), buffer=2_048)
    if kind == 3:
        return Manner(reading="stalls", pause=tape.log_uniform(0.2, 6.0, "pause"), buffer=1_024)
    return Manner()
