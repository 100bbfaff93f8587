"""What the answer to a request must be, worked out without an engine: tokens, log probabilities, text, end.

Each token is computed from scratch from the request and the tokens before it (as `engines.mock.checker` does), and the
text by the plainest reading of stop strings. Must never use the code that it judges: no token chain, no incremental
detokenizer, no stop matcher.
"""

from __future__ import annotations

import msgspec
from xxhash import xxh3_64_intdigest

from holdfast.engines.contract import GenerateRequest, pack_ids
from holdfast.engines.mock.directives import directives_of
from holdfast.engines.mock.tokens import Choice, header, logprob_of
from holdfast.engines.mock.vocabulary import vocabulary


class Truth(msgspec.Struct):
    """Of one choice."""

    request: GenerateRequest
    """Its first attempt."""
    tokens: list[int]
    """All of them, the terminating one included, as far as the engine goes."""
    logprobs: list[float]
    text: str
    """What the client sees in the end."""
    used: int
    """Tokens that count: up to the one that completed a stop string."""
    finish: str


def truth_of(request: GenerateRequest, stops: list[str]) -> Truth:
    """Return the truth of a request.

    Args:
        request: its first attempt; ``generated_ids`` and ``attempt`` are ignored.
        stops: the client's stop strings.
    """
    tokens, logprobs, ended = _tokens(request)
    shown = tokens[:-1] if ended else tokens
    text, used = _stopped(shown, stops, request.stop.min_tokens)
    if used:
        return Truth(request, tokens, logprobs, text, used, "stop")
    return Truth(request, tokens, logprobs, text, len(tokens), "stop" if ended else "length")


def _tokens(request: GenerateRequest) -> tuple[list[int], list[float], bool]:
    """Return tokens, log probabilities, and whether the last one is a terminating token."""
    known = vocabulary()
    choice = Choice(request, known, 0.0, directives_of(request, known))
    prefix = header(request) + request.prompt_ids
    ends = set(request.stop.stop_token_ids)
    if not request.stop.ignore_eos or choice.plan is not None:
        ends |= set(known.eos_ids)
    tokens: list[int] = []
    logprobs: list[float] = []
    so_far = bytearray(prefix)
    while len(tokens) < request.stop.max_tokens:
        digest = xxh3_64_intdigest(so_far)
        token = choice.token(digest, len(tokens))
        if request.sampling.logprobs is not None:
            logprobs.append(logprob_of(digest, token, 0, choice.words).logprob)
        tokens.append(token)
        so_far += pack_ids([token])
        if token in ends:
            return tokens, logprobs, True
    return tokens, logprobs, False


def _stopped(tokens: list[int], stops: list[str], unwatched: int) -> tuple[str, int]:
    """Return the text up to a stop string, and how many tokens count (0: none was found)."""
    decode = vocabulary().decode
    text = decode(tokens)
    if not stops:
        return text, 0
    for count in range(unwatched + 1, len(tokens) + 1):
        free = decode(tokens[:unwatched])
        watched = decode(tokens[:count])[len(free) :]
        ends = [(watched.index(stop) + len(stop), -len(stop)) for stop in stops if stop in watched]
        if ends:
            end, negative = min(ends)
            return free + watched[: end + negative], count
    return text, 0
