"""The columns of an `Items` frame: packing entries into them and checking what a peer packed.

Columns of u32 are little-endian. Must never know what a stream is; this is the hot path of both sides.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from holdfast.base.errors import PayloadTooLarge, ProtocolViolation
from holdfast.wire.codec import encode
from holdfast.wire.frames import Items

Logprobs = list[tuple[float, list[tuple[int, float]]]]
"""Per token: (natural-log probability, [(token id, log probability) of the most likely ones])."""

Entry = tuple[int, int, Sequence[int], Logprobs | None]
"""(stream, output index of the first token, tokens, log probabilities or None)."""


def unpack_u32(column: bytes) -> list[int]:
    """Return the numbers of a column. Raises TypeError when its length is no multiple of 4."""
    return memoryview(column).cast("I").tolist()


def read_columns(frame: Items) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return streams, indices, counts and tokens of a frame whose columns fit each other.

    Raises:
        ProtocolViolation: they do not; the message has the lengths.
    """
    try:
        ids, indices, tokens = unpack_u32(frame.streams), unpack_u32(frame.indices), unpack_u32(frame.tokens)
        counts = unpack_u32(frame.counts) if frame.counts else [1] * len(ids)
    except TypeError:
        raise ProtocolViolation("an items frame has a column that is no sequence of u32", frame="items") from None
    fits = len(ids) == len(indices) == len(counts) and sum(counts) == len(tokens)
    if not fits or any(not 0 <= entry[0] < len(ids) for entry in frame.logprobs):
        raise ProtocolViolation(
            f"an items frame has {len(ids)} streams, {len(indices)} indices, {len(counts)} counts for "
            f"{sum(counts)} tokens, {len(tokens)} tokens and {len(frame.logprobs)} entries with log probabilities",
            frame="items",
        )
    return ids, indices, counts, tokens


def _pack(entries: Sequence[Entry]) -> Items:
    tokens = array("I")
    for entry in entries:
        tokens.extend(entry[2])
    counts = b"" if len(tokens) == len(entries) else array("I", [len(entry[2]) for entry in entries]).tobytes()
    return Items(
        array("I", [entry[0] for entry in entries]).tobytes(),
        array("I", [entry[1] for entry in entries]).tobytes(),
        counts,
        tokens.tobytes(),
        tuple((number, entry[3]) for number, entry in enumerate(entries) if entry[3] is not None),
    )


def encode_items(entries: Sequence[Entry]) -> list[bytearray]:
    """Return the entries as one `Items` frame, or as several when one would be over the frame limit.

    Entries must not be empty: an empty `counts` column means that every entry has one token.

    Raises:
        PayloadTooLarge: the log probabilities of a single token do not fit a frame.
    """
    try:
        return [encode(_pack(entries))]
    except PayloadTooLarge:
        first, second = _halves(entries)
        return encode_items(first) + encode_items(second)


def _halves(entries: Sequence[Entry]) -> tuple[Sequence[Entry], Sequence[Entry]]:
    if len(entries) > 1:
        middle = len(entries) // 2
        return entries[:middle], entries[middle:]
    stream, index, tokens, logprobs = entries[0]
    middle = len(tokens) // 2
    if middle == 0:
        raise PayloadTooLarge("the log probabilities of one token do not fit a frame", limit="FRAME_BYTES")
    return (
        [(stream, index, tokens[:middle], None if logprobs is None else logprobs[:middle])],
        [(stream, index + middle, tokens[middle:], None if logprobs is None else logprobs[middle:])],
    )
