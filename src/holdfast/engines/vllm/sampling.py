"""Holdfast's sampling parameters in vLLM's words, and vLLM's log probabilities in ours.

vLLM counts penalties, grammars and its random generator from where a request begins. What a continuation can carry over
is put into the request: the penalties of what exists go into the logit bias, and its seed is another than the first
attempt's, so that the same numbers are not drawn twice.

Must never import vLLM at module level, and never refuse after work has begun.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.base.errors import InvalidRequest, UnsupportedFeature
from holdfast.engines.attempt import Attempt
from holdfast.engines.contract import Guided, Sampling, TokenLogprob

_MASK = (1 << 64) - 1
_SEED_BITS = (1 << 63) - 1
"""What vLLM keeps of a seed on GPUs is a signed 64-bit number; a larger one kills its engine process (0.26)."""
_GOLDEN = 0x9E3779B97F4A7C15
REMOTE_DECODE: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""What a prefill leg says: somebody else will decode, keep the blocks."""


def check(sampling: Sampling, *, max_logprobs: int, vocab_size: int) -> None:
    """Refuse what vLLM cannot do, before any work.

    Raises:
        InvalidRequest: a value without a meaning.
        UnsupportedFeature: more alternatives than the engine was started for.
    """
    s = sampling
    ranges = (
        ("temperature", s.temperature, 0.0 <= s.temperature < float("inf"), "at least 0"),
        ("top_p", s.top_p, 0.0 < s.top_p <= 1.0, "above 0 and at most 1"),
        ("top_k", s.top_k, s.top_k >= -1, "-1 or 0 (off), or at least 1"),
        ("min_p", s.min_p, 0.0 <= s.min_p <= 1.0, "0 to 1"),
        ("repetition_penalty", s.repetition_penalty, 0.0 < s.repetition_penalty < float("inf"), "above 0"),
        ("presence_penalty", s.presence_penalty, -2.0 <= s.presence_penalty <= 2.0, "-2 to 2"),
        ("frequency_penalty", s.frequency_penalty, -2.0 <= s.frequency_penalty <= 2.0, "-2 to 2"),
    )
    for name, value, good, allowed in ranges:
        if not good:
            raise InvalidRequest(f"{name} is {value}; it must be {allowed}.", param=name)
    if any(not 0 <= token < vocab_size for token in s.logit_bias):
        raise InvalidRequest(
            f"logit_bias names a token outside the vocabulary of {vocab_size} tokens.", param="logit_bias"
        )
    if s.logprobs is not None and not 0 <= s.logprobs <= max_logprobs:
        raise UnsupportedFeature(
            f"{s.logprobs} alternatives were asked for; this engine reports 0 to {max_logprobs} (--max-logprobs).",
            param="logprobs",
        )


def parameters(attempt: Attempt, *, replayed: bool = False) -> dict[str, Any]:
    """Return the arguments of ``vllm.SamplingParams`` but for the kind of output.

    Args:
        attempt: what is asked of the engine.
        replayed: what exists is generated anew, so that nothing has to be carried over.
    """
    request, s = attempt.request, attempt.request.sampling
    if request.leg == "prefill":
        return {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True, "extra_args": _transfer(REMOTE_DECODE)}
    existing = [] if replayed else attempt.ids[attempt.prompt_tokens :]
    arguments: dict[str, Any] = {
        "temperature": s.temperature,
        "top_p": s.top_p,
        "top_k": max(0, s.top_k),
        "min_p": s.min_p,
        "repetition_penalty": s.repetition_penalty,
        "presence_penalty": s.presence_penalty,
        "frequency_penalty": s.frequency_penalty,
        "max_tokens": attempt.limit if replayed else attempt.max_tokens,
        "min_tokens": min(request.stop.min_tokens, attempt.limit) if replayed else attempt.min_tokens,
        "stop_token_ids": sorted(attempt.ends),
        "ignore_eos": request.stop.ignore_eos,
        "logprobs": s.logprobs,
        "logit_bias": carried_bias(s, existing) or None,
    }
    if s.temperature > 0:
        arguments["seed"] = continued_seed(s.seed, len(existing))
    if request.handoff is not None and not replayed:
        arguments["extra_args"] = _transfer(request.handoff.params)
    return arguments


def _transfer(params: Mapping[str, Any]) -> dict[str, Any]:
    return {"kv_transfer_params": dict(params)}


def carried_bias(sampling: Sampling, existing: Sequence[int]) -> dict[int, float]:
    """Return the logit bias with the penalties of tokens that exist already.

    vLLM subtracts ``frequency * count + presence`` (OpenAI's definition) for what it has generated itself. The
    frequencies add up exactly; a token that comes again pays its presence twice, which is stated in the capabilities.
    """
    bias = dict(sampling.logit_bias)
    if sampling.frequency_penalty or sampling.presence_penalty:
        for token, count in Counter(existing).items():
            penalty = sampling.frequency_penalty * count + sampling.presence_penalty
            bias[token] = bias.get(token, 0.0) - penalty
    return bias


def continued_seed(seed: int, index: int) -> int:
    """Return the seed of an attempt that begins at an output index, 63 bits: the request's own at 0."""
    if index == 0:
        return seed & _SEED_BITS
    z = (seed + index * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    return (z ^ (z >> 31)) & _SEED_BITS


def guided_arguments(guided: Guided) -> dict[str, Any]:
    """Return the arguments of ``vllm.sampling_params.StructuredOutputsParams``. Raises InvalidRequest."""
    if guided.kind == "json_object":
        return {"json_object": True}
    if guided.kind == "json_schema":
        return {"json": guided.value}
    if guided.kind == "choice":
        try:
            choices = json.loads(guided.value)
        except ValueError as error:
            raise InvalidRequest(f"The choices are no JSON list: {error}.", param="structured_outputs") from error
        return {"choice": choices}
    return {guided.kind: guided.value}


def logprobs_of(tokens: Sequence[int], entries: Sequence[Mapping[int, Any]], top: int) -> list[TokenLogprob]:
    """Return the log probabilities of some tokens.

    Args:
        tokens: that were sampled.
        entries: for each of them, vLLM's ``Logprob`` by token id: of the sampled one and the most likely ones.
        top: how many of the most likely ones were asked for.
    """
    found = []
    for token, entry in zip(tokens, entries, strict=False):
        best = sorted((one.rank, other, one.logprob) for other, one in entry.items() if one.rank and one.rank <= top)
        found.append(TokenLogprob(entry[token].logprob, tuple((other, logprob) for _, other, logprob in best[:top])))
    return found
