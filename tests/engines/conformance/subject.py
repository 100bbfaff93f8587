"""Describes an engine to the conformance suite: how to make it, what to ask it, how to kill it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from holdfast.engines.contract import Engine

CHAT = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain how a car engine works.",
    "List three prime numbers.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
)


def chatml(text: str) -> str:
    """Return a question as SmolLM2 wants it."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


async def ready() -> None:
    """Do nothing: the engine needs no preparation."""


@dataclass(frozen=True)
class Subject:
    """One engine. Times in seconds, before `tests.patience` stretches them."""

    name: str
    make: Callable[[], Engine]
    """A new engine that has not been started; small: a context of 512 tokens or so, little KV memory."""
    kill: Callable[[Engine], object]
    """Break a running engine as it breaks in real life (kill its process, make its thread fail)."""
    where: str
    """What it ran on, for the support matrix: ``CPU, in-process`` …"""
    device: str = ""
    """An accelerator, by name; its record stands beside that of the CPU."""
    prompts: tuple[str, ...] = tuple(chatml(text) for text in CHAT)
    """Several, whose greedy answers differ and have at least `length` tokens when the end is ignored."""
    ending: str = chatml("What is the capital of France?")
    """A prompt whose greedy answer ends by itself within 40 tokens."""
    filler: str = "word "
    """Repeated, it makes a prompt of any length."""
    length: int = 24
    """Tokens in the answers that are compared."""
    start_seconds: float = 30.0
    answer_seconds: float = 15.0
    """The slowest that the whole of one check may be."""
    death_seconds: float = 1.0
    """From the kill to `on_death`."""
    in_flight: int = 1
    """Tokens that may still be computed for a cancelled sequence."""
    streams: int = 64
    repeatable: bool = True
    """Greedy answers are the same alone and beside others."""
    reports_kv: bool = True
    """`EngineLoad.kv_used_blocks` moves while something runs."""
    kv_per_seat: bool = False
    """KV memory is set aside whole for each seat, so that seats run out before memory does."""
    canary_checks: tuple[str, ...] = ()
    """Keys that the canary payload of its class must have, beside the common ones."""
    packages: tuple[str, ...] = ()
    """Distributions whose versions belong in the record."""
    stand_in: str = ""
    """Said in the record when this is not the engine itself but something in its place."""
    prepare: Callable[[], Awaitable[None]] = ready
    """Awaited once, before the first engine is made."""
    settle: Callable[[Engine], Awaitable[None]] = lambda engine: asyncio.sleep(0)
    """Awaited before load and counters are compared, for engines that report them late."""
