"""Refuses requests that cannot be served, before any work is done for them.

Must never change a value: what is out of range is an error, not something to be corrected silently.
"""

from __future__ import annotations

import math

from holdfast.base.errors import ContextLengthExceeded, InvalidRequest
from holdfast.base.limits import LOGIT_BIAS_ENTRIES, TOP_LOGPROBS
from holdfast.engines.contract import Sampling, StopRules


def check_tokens(prompt: list[int], generated: list[int], *, vocab_size: int, context_length: int) -> None:
    """Refuse ids that the model does not have, and sequences longer than its context.

    Raises:
        InvalidRequest: no prompt, or an unknown token id.
        ContextLengthExceeded: no room for at least one more token.
    """
    if not prompt:
        raise InvalidRequest("The prompt has no tokens.", param="prompt")
    largest = max(max(ids, default=0) for ids in (prompt, generated))
    if largest >= vocab_size:
        raise InvalidRequest(f"Token id {largest} is outside the vocabulary of {vocab_size} tokens.", param="prompt")

    _check_length(len(prompt), len(generated), context_length)


def _check_length(prompt: int, generated: int, limit: int) -> None:
    if prompt >= limit:
        raise ContextLengthExceeded(
            f"The prompt has {prompt} tokens; this model's context is {limit} tokens including the answer.",
            param="prompt",
            limit=limit,
            actual=prompt,
        )
    if prompt + generated > limit:
        raise ContextLengthExceeded(
            f"Prompt ({prompt}) and generated tokens ({generated}) exceed this worker's context of {limit} tokens.",
            param="prompt",
            limit=limit,
            actual=prompt + generated,
        )


def check_sampling(s: Sampling, stop: StopRules, vocab_size: int) -> None:
    """Refuse values that have no meaning. Raises InvalidRequest with parameter, value and range."""
    finite = float("inf")
    ranges = (
        ("max_tokens", stop.max_tokens, stop.max_tokens >= 1, "at least 1"),
        ("temperature", s.temperature, 0.0 <= s.temperature < finite, "at least 0"),
        ("top_p", s.top_p, 0.0 < s.top_p <= 1.0, "above 0 and at most 1"),
        ("top_k", s.top_k, s.top_k >= -1, "-1 or 0 (off), or at least 1"),
        ("min_p", s.min_p, 0.0 <= s.min_p <= 1.0, "0 to 1"),
        ("repetition_penalty", s.repetition_penalty, 0.0 < s.repetition_penalty < finite, "above 0"),
        ("presence_penalty", s.presence_penalty, abs(s.presence_penalty) < finite, "a number"),
        ("frequency_penalty", s.frequency_penalty, abs(s.frequency_penalty) < finite, "a number"),
        ("logprobs", s.logprobs, s.logprobs is None or 0 <= s.logprobs <= TOP_LOGPROBS, f"0 to {TOP_LOGPROBS}"),
        ("logit_bias", len(s.logit_bias), len(s.logit_bias) <= LOGIT_BIAS_ENTRIES, f"{LOGIT_BIAS_ENTRIES} entries"),
    )
    for name, value, good, allowed in ranges:
        if not good:
            raise InvalidRequest(f"{name} is {value}; it must be {allowed}.", param=name)
    for token, bias in s.logit_bias.items():
        if not 0 <= token < vocab_size or not math.isfinite(bias):
            raise InvalidRequest(f"logit_bias has the unusable entry {token}: {bias}.", param="logit_bias")
