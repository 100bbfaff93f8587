"""One sequence of an engine that is driven through asyncio: what is asked of it now, and how far it is.

The contract counts from output index 0 over all attempts, such engines count from where this attempt begins. The
translation is here, once for all of them, together with what may be refused before any work.

Must never know an engine or a task.
"""

from __future__ import annotations

from holdfast.base.errors import ContextLengthExceeded, HoldfastError, InvalidRequest
from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import Finish, GenerateRequest, SequenceStep, TokenLogprob, unpack_ids
from holdfast.engines.handoff import KvHandoff, digest_of, verify


class Output:
    """What an engine said about one sequence at one time: new tokens, or its end, or both."""

    __slots__ = ("cached_tokens", "error", "finish", "handoff", "logprobs", "tokens")

    def __init__(
        self,
        tokens: list[int],
        *,
        finish: Finish | None = None,
        logprobs: list[TokenLogprob] | None = None,
        cached_tokens: int = 0,
        handoff: KvHandoff | None = None,
        error: HoldfastError | None = None,
    ):
        self.tokens = tokens
        """Only those that are new."""
        self.finish = finish
        self.logprobs = logprobs
        self.cached_tokens = cached_tokens
        self.handoff = handoff
        self.error = error


class Attempt:
    """See the module.

    Args:
        key: by which the worker knows it.
        request: as it came.
        prompt: token ids of the prompt.
        generated: token ids that earlier attempts have generated.
        context_length: the most tokens that prompt and output may have together.
        eos: ids that end a sequence, unless the request says to ignore them.
    """

    __slots__ = (
        "begun", "cancelled", "deferred", "ends", "first_index", "handoff_pending", "ids", "index", "key", "limit",
        "min_tokens", "over", "prompt_tokens", "request", "unsaid",
    )  # fmt: skip

    def __init__(
        self,
        key: SequenceKey,
        request: GenerateRequest,
        prompt: list[int],
        generated: list[int],
        *,
        context_length: int,
        eos: tuple[int, ...],
    ):
        self.key = key
        self.request = request
        self.ids = prompt + generated
        """What the engine has to compute before the first new token."""
        self.prompt_tokens = len(prompt)
        self.first_index = self.index = len(generated)
        self.limit = min(request.stop.max_tokens, context_length - len(prompt))
        """Output index at which it ends."""
        self.min_tokens = max(0, min(request.stop.min_tokens, self.limit) - len(generated))
        """What is left of the least number of tokens."""
        self.ends = frozenset((*request.stop.stop_token_ids, *(() if request.stop.ignore_eos else eos)))
        self.begun = False
        """Whether the engine has said anything about it."""
        self.cancelled = self.over = False
        self.deferred = False
        """Its cancel waits for blocks that are on their way."""
        self.unsaid: SequenceStep | None = None
        """What the worker has not been told yet in this turn of the loop."""
        self.handoff_pending = self.received
        """Blocks are on their way to this engine, until its first word."""

    @property
    def received(self) -> bool:
        """Whether its blocks come from another worker: what its engine calls cached was not found in its cache."""
        return self.request.handoff is not None and self.request.leg != "prefill"

    @property
    def engine_id(self) -> str:
        """A name for it that is unique in this process, for the engine."""
        return f"{self.request.request_id}-{self.key}"

    @property
    def max_tokens(self) -> int:
        """How many more tokens may be generated; 1 for a prefill leg, whose token is nobody's."""
        return 1 if self.request.leg == "prefill" else self.limit - self.first_index

    def step(self, output: Output) -> SequenceStep:
        """Return what an output means, cut where the sequence ends whatever the engine thinks."""
        tokens, logprobs, finish = output.tokens, output.logprobs, output.finish
        if self.request.leg == "prefill":
            tokens, logprobs, finish = [], None, _end_of_prefill(finish)
        elif self.index + len(tokens) >= self.limit:
            tokens = tokens[: self.limit - self.index]
            logprobs = logprobs[: len(tokens)] if logprobs is not None else None
            if finish not in ("error", "abort") or len(output.tokens) > len(tokens):
                finish = "stop" if tokens and tokens[-1] in self.ends else "length"
        first, self.index = self.index, self.index + len(tokens)
        return SequenceStep(
            self.key,
            first,
            tokens,
            logprobs=logprobs,
            finish=finish,
            error=output.error,
            cached_tokens=output.cached_tokens,
            handoff=output.handoff,
        )

    def offer(self, protocol: str, params: dict[str, object], fingerprint: str = "") -> KvHandoff:
        """Return the handle for the blocks of this prefill leg (style ``after_prefill``)."""
        request = self.request
        return KvHandoff(
            protocol=protocol,
            phase="after_prefill",
            tokens=len(self.ids),
            digest=digest_of(request.prompt_ids, request.generated_ids),
            fingerprint=fingerprint,
            params=params,
        )


def _end_of_prefill(finish: Finish | None) -> Finish | None:
    """The one token of a prefill leg is its end, whatever the engine calls it."""
    return "stop" if finish == "length" else finish


def admit(
    key: SequenceKey,
    request: GenerateRequest,
    *,
    vocab_size: int,
    context_length: int,
    eos: tuple[int, ...],
    protocol: str,
) -> Attempt:
    """Return the attempt at a request.

    Args:
        key: by which the worker knows it.
        request: as it came.
        vocab_size: ids from here on do not exist.
        context_length: the most tokens that prompt and output may have together.
        eos: ids that end a sequence.
        protocol: of KV hand-offs that this engine understands; empty: none.

    Raises:
        ContextLengthExceeded: no room for one more token.
        HandoffMismatch: blocks of other tokens, or of another protocol.
        InvalidRequest: broken, empty or unknown token ids, or nothing is left to generate.
    """
    try:
        prompt, generated = unpack_ids(request.prompt_ids), unpack_ids(request.generated_ids)
    except ValueError as error:
        raise InvalidRequest("Token ids must come as whole little-endian u32 values.", param="prompt") from error
    if not prompt:
        raise InvalidRequest("The prompt has no tokens.", param="prompt")
    largest = max(max(ids, default=0) for ids in (prompt, generated))
    if largest >= vocab_size:
        raise InvalidRequest(f"Token id {largest} is outside the vocabulary of {vocab_size} tokens.", param="prompt")
    total = len(prompt) + len(generated)
    if total >= context_length:
        raise ContextLengthExceeded(
            f"{len(prompt)} prompt and {len(generated)} generated tokens leave no room in this worker's context of "
            f"{context_length} tokens.",
            param="prompt",
            limit=context_length,
            actual=total,
        )
    attempt = Attempt(key, request, prompt, generated, context_length=context_length, eos=eos)
    if attempt.limit <= attempt.index:
        raise InvalidRequest(
            f"Nothing is left to generate: max_tokens is {request.stop.max_tokens}, {attempt.index} exist already.",
            param="max_tokens",
        )
    if request.handoff is not None:
        verify(request.handoff, request.prompt_ids, request.generated_ids, protocol=protocol)
    return attempt
