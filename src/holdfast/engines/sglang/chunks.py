"""What SGLang says about a sequence, in the contract's words: tokens, log probabilities, ends and their causes.

An end by abort repeats the last token in some paths of SGLang and invents one in others: tokens that come with it are
never passed on. Success without a token is none.

Must never import SGLang.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.base.errors import (
    ContextLengthExceeded,
    EngineFailed,
    HandoffLost,
    HoldfastError,
    InvalidRequest,
    WorkerSaturated,
)
from holdfast.engines.attempt import Output
from holdfast.engines.contract import TokenLogprob

Chunk = Mapping[str, Any]
"""``output_ids``: only the new ones (``incremental_streaming_output``); ``meta_info``."""

_BAD_REQUEST, _TOO_MANY, _INTERNAL, _UNAVAILABLE = 400, 429, 500, 503
_NOT_A_NUMBER = "NaN happened"
"""What SGLang calls the end of a sequence whose logits were no numbers (``Req._check_vocab_boundary_finish``)."""


def output_of(chunk: Chunk, *, wants_logprobs: bool, waits: bool) -> Output:
    """Return what a chunk means.

    Args:
        chunk: as SGLang gave it.
        wants_logprobs: the request asked for log probabilities.
        waits: KV blocks are to come from another worker, or to go there, and have not yet.
    """
    meta = chunk["meta_info"]
    tokens: list[int] = chunk["output_ids"]
    reason = meta.get("finish_reason")
    cached = meta.get("cached_tokens") or 0
    if reason is None:
        return Output(tokens, logprobs=_logprobs(meta, len(tokens)) if wants_logprobs else None, cached_tokens=cached)
    kind = reason.get("type")
    if kind == "abort":
        error = _error(reason, waits)
        return Output([], finish="abort" if error is None else "error", error=error, cached_tokens=cached)
    if reason.get("matched") == _NOT_A_NUMBER:
        return _failed("SGLang's logits were not numbers; look at its log, and check the weights.", cached)
    if not tokens and not meta.get("completion_tokens"):
        return _failed("SGLang called the sequence finished without a single token.", cached)
    logprobs = _logprobs(meta, len(tokens)) if wants_logprobs else None
    return Output(tokens, finish="length" if kind == "length" else "stop", logprobs=logprobs, cached_tokens=cached)


def error_of(error: Exception) -> HoldfastError | None:
    """Return what an exception of SGLang's front half means; None: nothing that is known."""
    if isinstance(error, HoldfastError):
        return error
    if isinstance(error, ValueError):  # its way to refuse a request, before any work
        text = str(error)
        if "context length" in text:
            return ContextLengthExceeded(text, param="prompt")
        return InvalidRequest(f"SGLang refuses the request: {text}")
    return None


def _failed(message: str, cached: int) -> Output:
    return Output([], finish="error", error=EngineFailed(message), cached_tokens=cached)


def _error(reason: Mapping[str, Any], waits: bool) -> HoldfastError | None:
    """Return why a sequence was aborted; None: for no reason of its own, so that it can go on elsewhere."""
    status = reason.get("status_code")
    message = str(reason.get("message") or "no reason given")
    if status is None:
        return None
    code = int(status)
    if code == _BAD_REQUEST:
        return InvalidRequest(f"SGLang refuses the request: {message}")
    if waits and code >= _INTERNAL:
        return HandoffLost(f"The KV blocks did not pass between the SGLang workers: {message}")
    if code in (_TOO_MANY, _UNAVAILABLE):
        return WorkerSaturated(f"SGLang has no room for the sequence: {message}", layer="engine")
    return EngineFailed(f"SGLang gave the sequence up ({code}): {message}")


def _logprobs(meta: Mapping[str, Any], count: int) -> list[TokenLogprob] | None:
    """Return one entry per token of a chunk; None when SGLang sent another number of them."""
    own = meta.get("output_token_logprobs") or ()
    if len(own) != count:
        return None
    tops = meta.get("output_top_logprobs") or ()
    best = tops if len(tops) == count else (None,) * count
    return [
        TokenLogprob(one[0], tuple((other[1], other[0]) for other in top or ()))
        for one, top in zip(own, best, strict=True)
    ]
