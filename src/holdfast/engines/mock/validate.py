"""What the mock engine refuses at submit, before any work. Pure functions."""

from __future__ import annotations

from holdfast.base.errors import ContextLengthExceeded, InvalidRequest, UnsupportedFeature
from holdfast.base.limits import TOP_LOGPROBS
from holdfast.engines.contract import GenerateRequest


def check_request(request: GenerateRequest, *, room: int, vocabulary_size: int) -> None:
    """Raise the typed error that says why this request can't be served, if so.

    Args:
        request: as submitted.
        room: the most tokens, prompt and output together, that a sequence can have.
        vocabulary_size: ids from here on do not exist.
    """
    if len(request.prompt_ids) % 4 or len(request.generated_ids) % 4:
        raise InvalidRequest("Token ids must come as whole little-endian u32 values.", param="prompt")
    prompt, generated = len(request.prompt_ids) // 4, len(request.generated_ids) // 4
    if not prompt:
        raise InvalidRequest("The prompt is empty.", param="prompt")
    if request.stop.max_tokens <= generated:
        raise InvalidRequest(
            f"Nothing is left to generate: max_tokens is {request.stop.max_tokens}, {generated} exist already.",
            param="max_tokens",
        )
    if prompt + generated >= room:
        raise ContextLengthExceeded(
            f"{prompt + generated} tokens are given; this engine takes at most {room - 1} and one to generate.",
            limit=room,
            actual=prompt + generated,
        )
    logprobs = request.sampling.logprobs
    if logprobs is not None and not 0 <= logprobs <= TOP_LOGPROBS:
        raise UnsupportedFeature(
            f"{logprobs} alternatives were asked for; this engine reports 0 to {TOP_LOGPROBS}.", param="logprobs"
        )
    for name, data in (("prompt", request.prompt_ids), ("generated", request.generated_ids)):
        if _surely_below(data, vocabulary_size):
            continue
        highest = max(memoryview(data).cast("I"), default=0)
        if highest >= vocabulary_size:
            raise InvalidRequest(
                f"Token id {highest} in the {name} ids is outside of the vocabulary of {vocabulary_size}.",
                param="prompt",
            )


def _surely_below(data: bytes, limit: int) -> bool:
    """Whether no id reaches ``limit``, as far as the upper bytes tell: they are compared in C, ids one by one."""
    high = limit >> 8
    if high > 255 or data[2::4].strip(b"\0") or data[3::4].strip(b"\0"):
        return False
    return not data[1::4].translate(None, bytes(range(high)))
