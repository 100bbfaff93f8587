"""From TensorRT-LLM's cumulative outputs to what is new.

Each time it says something, it says everything so far; at a stop it may even say less than before, where it cuts what
it takes for a stop word. Must never deliver a token twice, nor one behind the end.
"""

from __future__ import annotations

from typing import Any

from holdfast.base.errors import EngineFailed, HandoffLost, HoldfastError
from holdfast.engines.attempt import Attempt, Output
from holdfast.engines.contract import Finish, TokenLogprob
from holdfast.engines.trtllm.handover import PROTOCOL, pack

_FINISH: dict[str | None, Finish] = {
    "stop": "stop",
    "length": "length",
    "cancelled": "abort",
    "timeout": "abort",
    "not_finished": "length",
    None: "abort",
}


def lost_or_failed(attempt: Attempt, why: str) -> HoldfastError:
    """Return what the failure of a request means: before a decode leg has said anything, its blocks did not come."""
    if attempt.handoff_pending:
        return HandoffLost(f"The KV blocks of the hand-off did not arrive: {why}")
    return EngineFailed(f"TensorRT-LLM failed on the request: {why}")


class Reader:
    """Reads the result of one attempt.

    Args:
        attempt: whose result it is.
        fingerprint: of the engine, for the hand-off of a prefill leg.
    """

    def __init__(self, attempt: Attempt, fingerprint: str):
        self._attempt = attempt
        self._fingerprint = fingerprint
        self._sent = 0

    def read(self, result: Any) -> Output | None:
        """Return what is new; None when there is nothing."""
        output = result.outputs[0]
        cached = int(getattr(result, "cached_tokens", 0) or 0)
        if result.finished and getattr(result, "error", None):  # newer versions say it instead of raising
            return Output([], finish="error", error=lost_or_failed(self._attempt, str(result.error)))
        if self._attempt.request.leg == "prefill":
            return self._handed_over(output, cached) if result.finished else None
        tokens = list(output.token_ids[self._sent :])
        finish = _FINISH.get(output.finish_reason, "stop") if result.finished else None
        end = self._end_in(tokens, finish)
        if end is not None:
            tokens, finish = tokens[: end + 1], "stop"
        if not tokens and finish is None:
            return None
        logprobs = self._logprobs(tokens, output.logprobs)
        self._sent += len(tokens)
        return Output(tokens, finish=finish, logprobs=logprobs, cached_tokens=cached)

    def _end_in(self, tokens: list[int], finish: Finish | None) -> int | None:
        """Return where a token ends the sequence; one that min_tokens holds back, the engine did not take for one."""
        attempt, first = self._attempt, self._sent
        for at, token in enumerate(tokens):
            due = first + at + 1 >= attempt.min_tokens or finish is not None
            if token in attempt.ends and due:
                return at
        return None

    def _logprobs(self, tokens: list[int], said: Any) -> list[TokenLogprob] | None:
        count = self._attempt.request.sampling.logprobs
        if count is None or not tokens:
            return None
        entries = list((said or [])[self._sent : self._sent + len(tokens)])
        if len(entries) != len(tokens):
            raise EngineFailed(f"TensorRT-LLM said {len(entries)} log probabilities for {len(tokens)} tokens.")
        return [_logprob(token, entry, count) for token, entry in zip(tokens, entries, strict=True)]

    def _handed_over(self, output: Any, cached: int) -> Output:
        if output.finish_reason in ("cancelled", "timeout"):
            return Output([], finish="abort", cached_tokens=cached)
        params = output.disaggregated_params
        if params is None or not params.first_gen_tokens:
            error = EngineFailed("TensorRT-LLM computed the prompt and gave no hand-off for its KV blocks.")
            return Output([], finish="error", error=error)
        return Output(
            [],
            finish="stop",
            cached_tokens=cached,
            handoff=self._attempt.offer(PROTOCOL, pack(params), self._fingerprint),
        )


def _logprob(token: int, entry: Any, count: int) -> TokenLogprob:
    """Return one token's log probability with the ``count`` most likely ones."""
    if not isinstance(entry, dict):
        return TokenLogprob(float(entry))
    values = {int(name): float(one.logprob) for name, one in entry.items()}
    top = sorted(values.items(), key=lambda item: -item[1])[:count]
    return TokenLogprob(values[token], tuple(top))
