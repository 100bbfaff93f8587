"""Which tokens the next step computes: first come, first served, prompts in chunks beside running generations.

Every running generation gets its one token; what is left of the step's budget goes to prompts in order of
arrival. The budget is the exactness recipe's bound on one ``llama_decode`` (`config.CHUNK_TOKENS`).

Must never touch the engine library or change a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from holdfast.engines.llamacpp.sequence import Sequence


class Chunk(NamedTuple):
    """``size`` tokens of a sequence from its first uncomputed one on; ``last``: sample after them."""

    sequence: Sequence
    size: int
    last: bool


def plan_step(running: Iterable[Sequence], budget: int) -> list[Chunk]:
    """Return the chunks of the next step, at most ``budget`` tokens.

    Args:
        running: sequences that hold a slot, oldest first; fewer than ``budget``.
        budget: tokens in one step.
    """
    chunks: list[Chunk] = []
    prefilling: list[Sequence] = []
    for sequence in running:
        if sequence.pending == 1:
            chunks.append(Chunk(sequence, 1, last=True))
        else:
            prefilling.append(sequence)
    left = budget - len(chunks)
    for sequence in prefilling:
        if left <= 0:
            break
        count = min(left, sequence.pending)
        chunks.append(Chunk(sequence, count, last=count == sequence.pending))
        left -= count
    return chunks
