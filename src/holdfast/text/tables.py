"""What each token id looks like as bytes, as text and as a fragment of a JSON string.

For tokenizers whose decoder is ByteLevel a token is a fixed run of bytes, so that detokenizing is a table
lookup; only tokens that hold part of a UTF-8 character need state. Must never hold any stream's state.

Source of the alphabet: GPT-2's byte encoder (printable Latin-1 characters stand for themselves, the other
68 bytes for U+0100 onwards, in order).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec

_encode = msgspec.json.Encoder().encode


def _alphabet() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


BYTE_OF_CHAR = _alphabet()
"""The byte that each character of a byte-level piece stands for."""

_TO_LATIN1 = str.maketrans({char: chr(byte) for char, byte in BYTE_OF_CHAR.items()})
_FOREIGN = {chr(code) for code in range(0x100) if chr(code) not in BYTE_OF_CHAR}


def piece_bytes(piece: str) -> bytes:
    """Return the bytes that a byte-level piece stands for.

    A piece with any character outside the alphabet (an added token) stands for its own UTF-8 bytes, as in
    the decoder of the `tokenizers` library.
    """
    if not _FOREIGN.isdisjoint(piece):
        return piece.encode()
    try:
        return piece.translate(_TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:
        return piece.encode()


def json_fragment(text: str) -> bytes:
    """Return ``text`` as the inside of a JSON string: escaped UTF-8 without the quotes.

    Escaping is per character, so fragments can be joined.
    """
    return _encode(text)[1:-1]


class DetokTables:
    """Per token id: text, JSON fragment, and bytes where those two are None.

    ``text[id]`` and ``fragment[id]`` are None exactly when the token is not valid UTF-8 by itself; then
    ``partial[id]`` has its bytes. Tokens that are left out (special ones, ids without a piece) are empty.
    """

    __slots__ = ("fragment", "partial", "text")

    def __init__(self, pieces: Mapping[str, int], size: int, hidden: Collection[str]):
        """Build the tables.

        Args:
            pieces: piece to id, added tokens included.
            size: number of ids (largest id + 1).
            hidden: pieces that decode to nothing.
        """
        self.text: list[str | None] = [""] * size
        self.fragment: list[bytes | None] = [b""] * size
        self.partial: dict[int, bytes] = {}
        self._fill((piece, token) for piece, token in pieces.items() if piece not in hidden)

    def _fill(self, items: Iterable[tuple[str, int]]) -> None:
        text, fragment, partial = self.text, self.fragment, self.partial
        for piece, token in items:
            raw = piece_bytes(piece)
            try:
                plain = raw.decode()
            except UnicodeDecodeError:
                text[token] = fragment[token] = None
                partial[token] = raw
            else:
                text[token] = plain
                escaped = _encode(plain)[1:-1]
                fragment[token] = raw if escaped == raw else escaped

    def raw(self, token: int) -> bytes:
        """Return the bytes of a token; empty for left-out and unknown ids."""
        if not 0 <= token < len(self.text):
            return b""
        plain = self.text[token]
        return self.partial[token] if plain is None else plain.encode()
