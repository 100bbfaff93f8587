"""Makes prompts for hash ids: equal ids give equal tokens, different ids different ones in every piece of the block.

The tokens of a block are the bytes of SHAKE-128 of its id, each shifted into a range of 256 token ids that are
ordinary text in practically every vocabulary. Any 16 of them carry 128 bits, so blocks of any engine's size differ
where the trace says so, and a prompt can be made again from its line alone.

What a model answers is never part of a later prompt: a trace says which prompts share which blocks, and that is kept.

Must never depend on the order in which prompts are made.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import msgspec

from holdfast.base.errors import InvalidRequest
from holdfast.replay.trace import TRACE_BLOCK, TraceRequest

FIRST_TOKEN = 1000
"""Lowest token id that prompts are made of."""
_SPREAD = 256
_ID_BYTES = 4


class Prompts:
    """Makes prompts, and remembers the blocks that were asked for lately."""

    def __init__(
        self, *, block: int = TRACE_BLOCK, first_token: int = FIRST_TOKEN, salt: str = "", remembered: int = 4096
    ):
        """Prepare.

        Args:
            block: tokens for which one hash id stands.
            first_token: prompts consist of this token id and the 255 after it.
            salt: another one makes other tokens of the same ids, so that a warm cache does not know them.
            remembered: blocks kept in memory, oldest out first; ``4 * block`` bytes each, and for `json` a little more.
        """
        if not 0 <= first_token < 1 << 24:
            raise InvalidRequest(f"Prompts cannot be made of token ids from {first_token} on.")
        self._block = block
        self._salt = salt.encode()
        self._remembered = remembered
        self._packed: OrderedDict[int, bytes] = OrderedDict()
        self._written: OrderedDict[int, bytes] = OrderedDict()
        ids = range(first_token, first_token + _SPREAD)
        self._planes = [bytes(number >> 8 * plane & 0xFF for number in ids) for plane in range(_ID_BYTES)]
        self._words = [str(number).encode() for number in ids]

    def ids(self, request: TraceRequest) -> bytes:
        """Return the prompt as little-endian u32 token ids, exactly ``input_length`` of them."""
        data = b"".join([self._ids_of(number) for number in request.hash_ids])
        return data[: request.input_length * _ID_BYTES]

    def json(self, request: TraceRequest) -> msgspec.Raw:
        """Return the prompt as a JSON array of token ids, put together from remembered pieces."""
        *whole, last = request.hash_ids
        parts = [self._json_of(number) for number in whole]
        rest = request.input_length - len(whole) * self._block
        parts.append(b",".join(self._json_of(last).split(b",", rest)[:rest]))
        return msgspec.Raw(b"[" + b",".join(parts) + b"]")

    def _ids_of(self, number: int) -> bytes:
        found = self._packed.get(number)
        if found is None:
            digest = self._digest(number)
            packed = bytearray(self._block * _ID_BYTES)
            for plane, table in enumerate(self._planes):
                packed[plane::_ID_BYTES] = digest.translate(table)
            found = self._keep(self._packed, number, bytes(packed))
        return found

    def _json_of(self, number: int) -> bytes:
        found = self._written.get(number)
        if found is None:
            words = self._words
            found = self._keep(self._written, number, b",".join([words[byte] for byte in self._digest(number)]))
        return found

    def _digest(self, number: int) -> bytes:
        return hashlib.shake_128(b"%d|%b" % (number, self._salt)).digest(self._block)

    def _keep(self, where: OrderedDict[int, bytes], number: int, made: bytes) -> bytes:
        where[number] = made
        if len(where) > self._remembered:
            where.popitem(last=False)
        return made
