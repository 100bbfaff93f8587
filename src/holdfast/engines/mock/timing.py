"""How long one step of the simulated engine takes. Pure functions.

The polynomials are the published defaults of the mock engine of the system whose behaviour we measure
ourselves against (reference: runtime notes, section 4.3), in milliseconds.
"""

from __future__ import annotations

from holdfast.engines.mock.config import MockConfig


def prefill_ms(new_tokens: int) -> float:
    """Return the milliseconds that computing ``new_tokens`` prompt tokens in one batch takes."""
    return 4.209989e-07 * new_tokens * new_tokens + 1.518344e-02 * new_tokens + 16.50142


def decode_ms(kv_share: float) -> float:
    """Return the milliseconds of one decode step; ``kv_share`` = active / all KV blocks, 0..1. At least 1 ms."""
    return max(1.0, -25.74 * kv_share * kv_share + 54.01 * kv_share + 5.74)


def step_seconds(config: MockConfig, prefill_tokens: int, decoding: int, kv_share: float) -> float:
    """Return the seconds of a step that computes these prompt tokens and decodes that many sequences."""
    if config.step_ms is not None:
        return config.step_ms / 1e3
    if config.speedup_ratio == 0:
        return 0.0
    total = prefill_ms(prefill_tokens) / config.speedup_ratio if prefill_tokens else 0.0
    if decoding and config.decode_speedup_ratio:
        total += decode_ms(kv_share) / (config.speedup_ratio * config.decode_speedup_ratio)
    return total / 1e3
