"""What a stream of the mock engine must be, computed without the engine and without carried state.

Each token is worked out from scratch from the request and everything before it, so that an error in the
engine's incremental state cannot hide here. Quadratic, and meant for tests and demonstrations.

Must never use `tokens.TokenChain`.
"""

from __future__ import annotations

from xxhash import xxh3_64_intdigest

from holdfast.engines.contract import GenerateRequest, pack_ids, unpack_ids
from holdfast.engines.mock.directives import directives_of
from holdfast.engines.mock.tokens import Choice, header
from holdfast.engines.mock.vocabulary import vocabulary


def expected_tokens(request: GenerateRequest, n: int | None = None, *, eos_chance: float = 0.0) -> list[int]:
    """Return the generated ids of a request from output index 0, the terminating token included.

    Args:
        request: as submitted; ``generated_ids`` and ``attempt`` are ignored.
        n: at most this many tokens; None: until the end.
        eos_chance: as in the engine's configuration.
    """
    known = vocabulary()
    choice = Choice(request, known, eos_chance, directives_of(request, known))
    prefix = header(request) + request.prompt_ids
    stop = request.stop
    ends = set(stop.stop_token_ids)
    if not stop.ignore_eos or choice.plan is not None:
        ends |= set(known.eos_ids)
    limit = stop.max_tokens if n is None else min(n, stop.max_tokens)
    tokens: list[int] = []
    while len(tokens) < limit:
        tokens.append(choice.token(xxh3_64_intdigest(prefix + pack_ids(tokens)), len(tokens)))
        if tokens[-1] in ends:
            break
    return tokens


def first_difference(request: GenerateRequest, got: list[int], *, eos_chance: float = 0.0) -> int | None:
    """Return the output index at which these ids leave the true sequence, or None when they are a prefix of it."""
    true = expected_tokens(request, len(got), eos_chance=eos_chance)
    for index, token in enumerate(got):
        if index >= len(true) or token != true[index]:
            return index
    return None


def text_of(ids: bytes | list[int]) -> str:
    """Return the text of token ids, special tokens included."""
    return vocabulary().decode(unpack_ids(ids) if isinstance(ids, bytes) else ids)
