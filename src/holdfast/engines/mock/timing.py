"""How long one step of the simulated engine takes. Pure functions.

Two models. The polynomials are the published defaults of the mock engine of the system whose behaviour we measure
ourselves against (reference: runtime notes, section 4.3): a step that computes a prompt costs a prefill and, when
sequences decode beside it, a decode step more. The `StepModel` of a named profile knows what a step really does:
it reads the weights once, whoever is in it, and each sequence's keys and values.

Must never look at a clock.
"""

from __future__ import annotations

import msgspec

from holdfast.engines.mock.config import MockConfig


def prefill_ms(new_tokens: int) -> float:
    """Return the milliseconds that computing ``new_tokens`` prompt tokens in one batch takes."""
    return 4.209989e-07 * new_tokens * new_tokens + 1.518344e-02 * new_tokens + 16.50142


def decode_ms(kv_share: float) -> float:
    """Return the milliseconds of one decode step; ``kv_share`` = active / all KV blocks, 0..1. At least 1 ms."""
    return max(1.0, -25.74 * kv_share * kv_share + 54.01 * kv_share + 5.74)


class Experts(msgspec.Struct, frozen=True):
    """The sparse part of a model: each token reads ``chosen`` of ``count`` experts; reading all takes ``all_ms``."""

    count: int
    chosen: int
    all_ms: float

    def ms(self, tokens: int) -> float:
        """Return the milliseconds for the experts that so many tokens reach between them, if each picks at random."""
        return self.all_ms * (1.0 - (1.0 - self.chosen / self.count) ** tokens)


class StepModel(msgspec.Struct, frozen=True):
    """The cost of a step as a sum of what it reads and computes."""

    base_ms: float
    """Every step: launching it, and reading the weights that every token needs."""
    sequence_ms: float
    """For each sequence that decodes: sampling and bookkeeping."""
    context_ns: float
    """For each token of context of a sequence that decodes: reading its keys and values."""
    prefill_us: float
    """For each prompt token: the matrix products."""
    pair_ns: float
    """For each pair of a prompt token and a token before it: attention."""
    experts: Experts | None = None

    def ms(self, prefill_tokens: int, decoding: int, context: int, pairs: float) -> float:
        """Return the milliseconds of a step; nothing to do takes none. Arguments as in `step_seconds`."""
        tokens = prefill_tokens + decoding
        if not tokens:
            return 0.0
        total = self.base_ms + self.sequence_ms * decoding + self.context_ns * 1e-6 * context
        total += self.prefill_us * 1e-3 * prefill_tokens + self.pair_ns * 1e-6 * pairs
        return total + self.experts.ms(tokens) if self.experts else total


def step_seconds(
    config: MockConfig,
    prefill_tokens: int,
    decoding: int,
    kv_share: float,
    *,
    model: StepModel | None = None,
    context: int = 0,
    pairs: float = 0.0,
) -> float:
    """Return the seconds of a step.

    Args:
        config: fixed step time and speed-ups.
        prefill_tokens: prompt tokens computed in this step.
        decoding: sequences that decode one token each.
        kv_share: active / all KV blocks, 0..1.
        model: of the profile; None: the polynomials.
        context: tokens of context of the sequences that decode, all together.
        pairs: (prompt token, token before it) pairs of the prompts in this step, all together.
    """
    if config.step_ms is not None:
        return config.step_ms / 1e3
    if config.speedup_ratio == 0:
        return 0.0
    if model is None:
        prefill = prefill_ms(prefill_tokens) if prefill_tokens else 0.0
        decode = decode_ms(kv_share) if decoding else 0.0
    else:
        prefill = model.ms(prefill_tokens, 0, 0, pairs)
        decode = model.ms(prefill_tokens, decoding, context, pairs) - prefill
    total = prefill / config.speedup_ratio
    if decoding and config.decode_speedup_ratio:
        total += decode / (config.speedup_ratio * config.decode_speedup_ratio)
    return total / 1e3
