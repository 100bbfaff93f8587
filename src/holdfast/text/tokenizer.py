"""The model's tokenizer: text to ids, ids to text, and what can be said without tokenizing.

A shell around the `tokenizers` library that keeps its pitfalls out of the rest: padding and truncation are
switched off, encoding releases the interpreter lock, large texts are encoded in pieces. Must never log or
put into an error what it encodes.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Sequence

import msgspec
from tokenizers import Tokenizer as HfTokenizer

from holdfast.base.errors import ContextLengthExceeded, InternalError, InvalidRequest, PayloadTooLarge
from holdfast.base.limits import UNSPLIT_TEXT_CHARS
from holdfast.text.chunked import PIECE_CHARS, pieces
from holdfast.text.detokenizer import Detokenizer, TableDetokenizer, WindowDetokenizer
from holdfast.text.segments import Segments
from holdfast.text.tables import BYTE_OF_CHAR, DetokTables, piece_bytes

_TABLE_VARIANTS = 8
"""Kept table sets; a variant is a choice of hidden special tokens."""

_SURROGATE = "The text is not valid Unicode: it contains a lone surrogate."
_COUNT_CHARS = 256 * 1024
"""Characters examined at a time when counting bytes."""

_LOCAL_STEPS = {"ByteLevel", "Split", "Digits", "Punctuation", "UnicodeScripts", "Sequence"}
_LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD"}


class _Step(msgspec.Struct):
    type: str = ""
    behavior: str = ""
    add_prefix_space: bool = False
    pretokenizers: list[_Step] = []
    decoders: list[_Step] = []
    normalizers: list[_Step] = []


class _Model(msgspec.Struct):
    type: str = "BPE"
    dropout: float | None = None


class _Added(msgspec.Struct):
    content: str
    id: int = -1
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True


class _Spec(msgspec.Struct):
    """The parts of tokenizer.json that say how far a token's surroundings reach."""

    model: _Model
    decoder: _Step | None = None
    pre_tokenizer: _Step | None = None
    normalizer: _Step | None = None
    added_tokens: list[_Added] = []


def _flat(step: _Step | None) -> list[_Step]:
    if step is None:
        return []
    nested = [*step.pretokenizers, *step.decoders, *step.normalizers]
    return [leaf for child in nested for leaf in _flat(child)] if nested else [step]


class Tokenizer:
    """One tokenizer.json, ready for use from any thread."""

    def __init__(self, tokenizer_json: bytes):
        """Load it.

        Args:
            tokenizer_json: a Hugging Face ``tokenizer.json``.

        Raises:
            InternalError: it is not one that the installed `tokenizers` library can read.
        """
        try:
            spec = msgspec.json.decode(tokenizer_json, type=_Spec)
            self._hf = HfTokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise InternalError(
                f"The model's tokenizer.json ({len(tokenizer_json)} bytes) cannot be loaded: {error}. "
                "It may need a newer version of the 'tokenizers' package."
            ) from error
        self._hf.no_truncation()
        self._hf.no_padding()
        self._pieces: dict[str, int] = self._hf.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._pieces.values(), default=-1) + 1
        """Largest id + 1."""
        self._piece_of: list[str | None] = [None] * self.vocab_size
        for piece, token in self._pieces.items():
            self._piece_of[token] = piece
        self._special = {token.content for token in self._hf.get_added_tokens_decoder().values() if token.special}
        self._byte_level = [step.type for step in _flat(spec.decoder)] == ["ByteLevel"]
        self._local = self._byte_level and _is_local(spec)
        marks = _marks(spec) if self._local else {}
        self._segments = Segments(self._ids, marks) if marks else None
        self._normalizes = bool(_flat(spec.normalizer))
        self._missing = bytes(byte for char, byte in BYTE_OF_CHAR.items() if char not in self._pieces)
        self._tables: dict[tuple[bool, frozenset[str]], DetokTables] = {}
        self._added_ends: tuple[list[int], list[int]] | None = None
        self.max_token_bytes = max((len(piece_bytes(piece)) for piece in self._pieces), default=1)
        """Most bytes that one token can stand for; meaningful for byte-level tokenizers."""

    @property
    def byte_level(self) -> bool:
        """Whether every token is a fixed run of bytes."""
        return self._byte_level

    def encode(
        self, text: str, *, add_special_tokens: bool = False, max_tokens: int | None = None, remember: bool = True
    ) -> array[int]:
        """Tokenize.

        Releases the interpreter lock for most of the work, so that a thread can do it beside the event loop;
        about 0.6 µs per token either way, 20 µs at least.

        Args:
            text: any size.
            add_special_tokens: whether the tokenizer's own begin/end tokens are added. Rendered chat templates
                contain theirs already.
            max_tokens: give up as soon as there are more.
            remember: whether what stands between special tokens may be kept, and may come from earlier texts
                (`segments`). That shows in the time it takes.

        Returns:
            The ids as ``array('I')``.

        Raises:
            InvalidRequest: the text is not valid Unicode (lone surrogates).
            ContextLengthExceeded: more than ``max_tokens``.
            PayloadTooLarge: more than `base.limits.UNSPLIT_TEXT_CHARS` that cannot be cut into pieces.
        """
        if max_tokens is not None and (bound := self.floor_tokens(text, max_tokens)) > max_tokens:
            raise too_long(bound, max_tokens, exact=False)
        if self._local and len(text) > 2 * PIECE_CHARS:
            return self._encode_large(text, add_special_tokens, max_tokens)
        if self._segments is not None and remember and not add_special_tokens:
            ids = self._segments.encode(text)
        else:
            ids = array("I", self._ids(text, add_special_tokens))
        if max_tokens is not None and len(ids) > max_tokens:
            raise too_long(len(ids), max_tokens, exact=True)
        return ids

    def _ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        if len(text) > UNSPLIT_TEXT_CHARS:
            raise PayloadTooLarge(
                f"The text has {len(text)} characters without a place where it can be cut for this tokenizer; "
                f"at most {UNSPLIT_TEXT_CHARS} are tokenized in one piece.",
                limit=UNSPLIT_TEXT_CHARS,
                actual=len(text),
            )
        try:
            # The batch call, unlike the single one, releases the interpreter lock; "fast" leaves out offsets.
            ids: list[int] = self._hf.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError as error:
            raise InvalidRequest(_SURROGATE) from error
        return ids

    def _encode_large(self, text: str, add_special_tokens: bool, max_tokens: int | None) -> array[int]:
        before, after = self._ends() if add_special_tokens else ([], [])
        ids = array("I", before)
        try:
            for piece in pieces(self._hf, self._ids, text):
                ids.extend(self._ids(piece))
                if max_tokens is not None and len(ids) + len(after) > max_tokens:
                    raise too_long(len(ids) + len(after), max_tokens, exact=False)
        except UnicodeEncodeError as error:
            raise InvalidRequest(_SURROGATE) from error
        ids.extend(after)
        return ids

    def _ends(self) -> tuple[list[int], list[int]]:
        """Return the special tokens that are put before and after a text."""
        if self._added_ends is None:
            bare = self._ids("a")
            full = self._ids("a", add_special_tokens=True)
            at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
            self._added_ends = full[:at], full[at + len(bare) :]
        return self._added_ends

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of all ids at once; ids without a piece are left out."""
        text: str = self._hf.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def at_least_tokens(self, text_bytes: int) -> int:
        """Return how many tokens any text of this many bytes has at the very least; 0 when nothing is known.

        A byte-level tokenizer with all 256 bytes in its vocabulary and no normalizer loses no byte, and no
        token is longer than `max_token_bytes`. Passing a number of characters gives a bound that holds too.
        """
        if self._missing or self._normalizes or not self._local:
            return 0
        return -(-text_bytes // self.max_token_bytes)

    def floor_tokens(self, text: str, enough: int) -> int:
        """Return how many tokens this text has at the very least; stops counting once that is over ``enough``.

        As `at_least_tokens`, and works for vocabularies that lack some bytes (those vanish from the ids), and for
        Unicode normalization, which takes away no ASCII character.
        """
        if not self._local or len(text) <= enough:
            return 0
        counted = 0
        for start in range(0, len(text), _COUNT_CHARS):
            piece = text[start : start + _COUNT_CHARS]
            data = piece.encode("ascii", "ignore") if self._normalizes else piece.encode(errors="replace")
            counted += len(data) - sum(data.count(byte) for byte in self._missing)
            if counted > enough * self.max_token_bytes:
                break
        return -(-counted // self.max_token_bytes)

    def id_to_piece(self, token: int) -> str | None:
        """Return the piece as the vocabulary spells it, or None."""
        return self._piece_of[token] if 0 <= token < self.vocab_size else None

    def piece_to_id(self, piece: str) -> int | None:
        """Return the id of exactly this piece, or None."""
        return self._pieces.get(piece)

    def is_special(self, token: int) -> bool:
        """Whether decoding leaves this token out by default."""
        return self.id_to_piece(token) in self._special

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for, special tokens included (for the API's ``bytes`` fields)."""
        piece = self.id_to_piece(token) or ""
        if self._byte_level:
            return piece_bytes(piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return piece.replace("\u2581", " ").encode()

    def token_text(self, token: int) -> str:
        """Return a token as the API's log probabilities show it; broken UTF-8 as U+FFFD."""
        return self.token_bytes(token).decode(errors="replace")

    def tables(self, skip_special: bool = True, keep: Iterable[str] = ()) -> DetokTables:
        """Return the (shared) detokenizing tables of a byte-level tokenizer; about 50 ms when first asked for.

        Args:
            skip_special: whether special tokens decode to nothing.
            keep: special pieces that are shown all the same (markers that a parser needs).
        """
        variant = (skip_special, frozenset(keep))
        found = self._tables.get(variant)
        if found is None:
            found = DetokTables(self._pieces, self.vocab_size, self._hidden(skip_special, keep))
            if len(self._tables) >= _TABLE_VARIANTS:
                self._tables.pop(next(iter(self._tables)))
            self._tables[variant] = found
        return found

    def _hidden(self, skip_special: bool, keep: Iterable[str]) -> Collection[str]:
        return self._special.difference(keep) if skip_special else ()

    def detokenizer(self, skip_special: bool = True, keep: Iterable[str] = ()) -> Detokenizer:
        """Return a fresh incremental detokenizer; arguments as for `tables`."""
        if self._byte_level:
            return TableDetokenizer(self.tables(skip_special, keep))
        hidden = frozenset(self._pieces[piece] for piece in self._hidden(skip_special, keep) if piece in self._pieces)
        return WindowDetokenizer(self._decode_all, hidden)

    def _decode_all(self, ids: Sequence[int]) -> str:
        return self.decode(ids, skip_special=False)


def too_long(tokens: int, limit: int, *, exact: bool) -> ContextLengthExceeded:
    """Return the error for a prompt of more tokens than there is room for."""
    count = f"{tokens}" if exact else f"at least {tokens}"
    return ContextLengthExceeded(
        f"The prompt has {count} tokens; at most {limit} fit.", param="prompt", limit=limit, actual=tokens
    )


def _marks(spec: _Spec) -> dict[str, int]:
    """Return the tokens at which every text is cut first, whatever is beside them; none when some look around."""
    cutting = [token for token in spec.added_tokens if not token.normalized and token.content]
    if any(token.single_word for token in cutting):
        return {}
    return {token.content: token.id for token in cutting}


def _is_local(spec: _Spec) -> bool:
    """Whether a token depends only on nearby text and every character ends up in some token."""
    if spec.model.type != "BPE" or spec.model.dropout or any(a.lstrip or a.rstrip for a in spec.added_tokens):
        return False
    steps = _flat(spec.pre_tokenizer)
    known = all(step.type in _LOCAL_STEPS for step in steps) and any(step.type == "ByteLevel" for step in steps)
    whole = all(step.behavior != "Removed" and not step.add_prefix_space for step in steps)
    return known and whole and all(step.type in _LOCAL_NORMALIZERS for step in _flat(spec.normalizer))
