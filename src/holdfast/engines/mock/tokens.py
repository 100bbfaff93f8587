"""Which token comes next: a chained pure function, so that any stream can be checked without a reference run.

The token at output index i is decided by ``XXH3-64(header + prompt ids + generated ids 0..i-1)``, ids as
little-endian u32. The header holds everything else that real sampling depends on (`header`). A token that
was dropped, repeated, changed or merged into the prompt therefore changes every later one.

Must never keep state that cannot be rebuilt from a request, and never read a clock or a random source.
"""

from __future__ import annotations

import math
import struct

import msgspec
from xxhash import xxh3_64

from holdfast.base.errors import InvalidRequest
from holdfast.engines.contract import GenerateRequest, TokenLogprob, unpack_ids
from holdfast.engines.mock.directives import NONE, Directives
from holdfast.engines.mock.structured import Draws, guided_text
from holdfast.engines.mock.vocabulary import Vocabulary

_U32 = struct.Struct("<I").pack
FORCE = 100.0
"""A logit bias of at least this restricts the choice to the tokens that have it; at most minus this bans."""


def header(request: GenerateRequest) -> bytes:
    """Return what a token depends on besides token ids, as bytes.

    At temperature 0 neither seed nor truncation (top_p, top_k, min_p) matter; penalties and biases always do.
    Log probabilities, stop rules, priority and attempt never do.
    """
    s = request.sampling
    drawn = (0.0,) if s.temperature == 0 else (s.temperature, s.top_p, s.top_k, s.min_p, s.seed)
    shaped = (s.repetition_penalty, s.presence_penalty, s.frequency_penalty, sorted(s.logit_bias.items()))
    guided = (s.guided.kind, s.guided.value) if s.guided else None
    return msgspec.msgpack.encode((request.model, request.lora or "", drawn, shaped, guided, len(request.prompt_ids)))


class Choice:
    """How one digest becomes a token, for one request."""

    __slots__ = ("_banned", "_early", "_eos_after", "_eos_below", "_forced", "_plain", "eos", "plan", "words")

    def __init__(self, request: GenerateRequest, vocabulary: Vocabulary, eos_chance: float, wish: Directives = NONE):
        bias = request.sampling.logit_bias
        stop = request.stop
        self.eos = vocabulary.eos_id
        self.words = vocabulary.words
        self._forced = tuple(sorted(t for t, b in bias.items() if b >= FORCE))
        self._banned = frozenset(t for t, b in bias.items() if b <= -FORCE)
        self._early = (stop.min_tokens, self._banned | set(vocabulary.eos_ids) | set(stop.stop_token_ids))
        self._eos_below = 0 if stop.ignore_eos else int(eos_chance * 0xFFFF_FFFF)
        self._eos_after = None if stop.ignore_eos else wish.eos_after
        self._plain = not (bias or stop.min_tokens or self._eos_below or self._eos_after is not None)
        self.plan = self._planned(request, vocabulary, wish)
        """The whole output when it is decided beforehand (structured output, ``say``), without the end token."""

    def token(self, digest: int, index: int) -> int:
        """Return the token at that output index."""
        if self.plan is not None:
            return self.plan[index] if index < len(self.plan) else self.eos
        if self._plain:
            return self.words[digest % len(self.words)]
        return self._careful(digest, index)

    def check_continues(self, generated: list[int]) -> None:
        """Raise InvalidRequest when these ids are not how a decided output begins."""
        if self.plan is not None and generated != self.plan[: len(generated)]:
            raise InvalidRequest(
                "The ids generated so far are not the beginning of this constrained output; a token was lost or "
                "changed on the way.",
                generated=len(generated),
            )

    def _careful(self, digest: int, index: int) -> int:
        minimum, early = self._early
        banned = early if index < minimum else self._banned
        if self.eos not in banned:
            due = self._eos_after is not None and index >= self._eos_after
            if due or digest >> 32 < self._eos_below:
                return self.eos
        pool = self._forced or self.words
        at = digest % len(pool)
        for step in range(len(pool)):
            token = pool[(at + step) % len(pool)]
            if token not in banned:
                return token
        return self.eos

    @staticmethod
    def _planned(request: GenerateRequest, vocabulary: Vocabulary, wish: Directives) -> list[int] | None:
        if wish.text is not None:
            return vocabulary.encode(wish.text)
        guided = request.sampling.guided
        if guided is None:
            return None
        key = xxh3_64(header(request) + request.prompt_ids).intdigest()
        words = vocabulary.words
        text = guided_text(guided, Draws(key), lambda n: vocabulary.decode([words[n % len(words)]]).strip())
        return vocabulary.encode(text)


class TokenChain:
    """The generator state of one sequence, advanced token by token."""

    __slots__ = ("_choice", "_hash", "_tops")

    def __init__(self, request: GenerateRequest, choice: Choice):
        self._choice = choice
        self._tops = request.sampling.logprobs
        self._hash = xxh3_64(header(request))
        self._hash.update(request.prompt_ids)
        if request.generated_ids:
            choice.check_continues(unpack_ids(request.generated_ids))
            self._hash.update(request.generated_ids)

    def next_token(self, index: int) -> int:
        """Return the token at that output index, which must be the next one."""
        token = self._choice.token(self._hash.intdigest(), index)
        self._hash.update(_U32(token))
        return token

    def next_with_logprob(self, index: int) -> tuple[int, TokenLogprob]:
        """Return the next token with its log probability and the alternatives that were asked for."""
        digest = self._hash.intdigest()
        token = self.next_token(index)
        return token, logprob_of(digest, token, self._tops or 0, self._choice.words)


def logprob_of(digest: int, token: int, tops: int, words: tuple[int, ...]) -> TokenLogprob:
    """Return made-up log probabilities: the token has 0.5 to 0.95, each alternative half of what is left.

    Args:
        digest: decides the numbers.
        token: the token that was taken; always the likeliest.
        tops: how many alternatives to list, the token included.
        words: where alternatives come from.
    """
    share = 0.5 + 0.45 * (digest >> 16 & 0xFFFF) / 0xFFFF
    listed = [(token, math.log(share))]
    at = digest >> 32
    while len(listed) < tops:
        share = (1.0 - share) / 2 if len(listed) == 1 else share / 2
        at += 1
        other = words[at % len(words)]
        if other == token:
            at += 1
            other = words[at % len(words)]
        listed.append((other, math.log(share)))
    return TokenLogprob(listed[0][1], tuple(listed[:tops]))
