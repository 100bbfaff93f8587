"""Log probabilities as the two APIs write them: ``content`` entries in chat, parallel lists in completions.

Tokens are known by their bytes (the text tables have them), because a token need not be a whole character.
A value that JSON can't hold (minus infinity of a masked token) becomes -9999.0, as OpenAI documents.
Must never detokenize a sequence.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Sequence

import msgspec

from holdfast.runtime.streams import NO_LOGPROB, Logprobs

UNLIKELY = -9999.0
_encode = msgspec.json.Encoder().encode


class TokenNames:
    """How the tokens of one vocabulary are written. Keep one per model: it remembers what it has encoded.

    Args:
        raw: the bytes of a token id; may raise IndexError or KeyError for ids that have none.
        as_ids: write ``token_id:<id>`` instead of the token's text.
    """

    __slots__ = ("_as_ids", "_cache", "_raw")

    def __init__(self, raw: Callable[[int], bytes], *, as_ids: bool = False):
        self._raw = raw
        self._as_ids = as_ids
        self._cache: dict[int, tuple[bytes, bytes]] = {}

    def raw(self, token: int) -> bytes:
        """Return the bytes of a token; none for an id outside the vocabulary."""
        try:
            return self._raw(token)
        except LookupError:
            return b""

    def text(self, token: int) -> str:
        """Return a name that tells tokens apart in the legacy form: text, or ``bytes:\\xe2\\x80``."""
        if self._as_ids:
            return f"token_id:{token}"
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def chat_entries(self, tokens: Sequence[int], logprobs: Logprobs) -> bytes:
        """Return the entries of ``logprobs.content`` for these tokens as JSON, joined by commas.

        Tokens whose worker does not tell are left out: the form has no word for them.
        """
        pairs = zip(tokens, logprobs, strict=True)
        return b",".join([self._entry(token, *values) for token, values in pairs if values is not NO_LOGPROB])

    def _entry(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> bytes:
        alternatives = b",".join([b"%b}" % self._one(other, value) for other, value in top])
        return b'%b,"top_logprobs":[%b]}' % (self._one(token, logprob), alternatives)

    def _one(self, token: int, logprob: float) -> bytes:
        """Return an entry without its closing brace."""
        known = self._cache.get(token)
        if known is None:
            known = self._cache[token] = self._encoded(token)
        return b"%b%b%b" % (known[0], repr(finite(logprob)).encode(), known[1])

    def _encoded(self, token: int) -> tuple[bytes, bytes]:
        raw = self.raw(token)
        name = f"token_id:{token}" if self._as_ids else raw.decode(errors="replace")
        return b'{"token":%b,"logprob":' % _encode(name), b',"bytes":%b' % _encode(list(raw))


class LegacyLogprobs:
    """Writes the completions form piece by piece, keeping count of the text offset.

    Args:
        names: of the model's tokens.
        offset: characters of text before the first token (the prompt's when it is echoed).
        alternatives: whether ``top_logprobs`` was asked for (``logprobs`` over 0).
    """

    __slots__ = ("_alternatives", "_decoder", "_names", "_offset")

    def __init__(self, names: TokenNames, *, offset: int = 0, alternatives: bool = True):
        self._names = names
        self._offset = offset
        self._alternatives = alternatives
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def piece(self, tokens: Sequence[int], logprobs: Logprobs) -> bytes:
        """Return the ``logprobs`` object of the next tokens as JSON; null stands for what a worker does not tell."""
        offsets: list[int] = []
        tops: list[dict[str, float] | None] = []
        names = [self._names.text(token) for token in tokens]
        for token, name, known in zip(tokens, names, logprobs, strict=True):
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._names.raw(token)))
            if self._alternatives:
                tops.append(self._top(name, *known) if known is not NO_LOGPROB else None)
        return _encode(
            {
                "tokens": names,
                "token_logprobs": [finite(known[0]) if known is not NO_LOGPROB else None for known in logprobs],
                "top_logprobs": tops if self._alternatives else None,
                "text_offset": offsets,
            }
        )

    def _top(self, name: str, logprob: float, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        best = {self._names.text(other): finite(value) for other, value in top}
        best.setdefault(name, finite(logprob))
        return best


def finite(logprob: float) -> float:
    """Return a log probability that JSON can hold."""
    return logprob if math.isfinite(logprob) else UNLIKELY
