"""What a router can be asked, and its answers: the same over the wire (msgpack) and over HTTP (JSON).

Must never know workers.
"""

from __future__ import annotations

from array import array
from typing import Any

import msgspec

from holdfast.base.errors import InvalidRequest, PayloadTooLarge
from holdfast.requests.chain import Chain

BEST_WORKER, OVERLAP_SCORES = "best_worker_id", "get_overlap_scores"
PREFILL_COMPLETE, FREE = "mark_prefill_complete", "free"
MOST_TOKENS = 1 << 23
"""Of one prompt."""
_U32, _U64 = 4, 8


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt that somebody wants to place: by its tokens, or by the names of its blocks."""

    model: str
    token_ids: list[int] | bytes | None = None
    """Numbers, or little-endian u32."""
    block_hashes: list[int] | bytes | None = None
    """In place of tokens: sequence hashes of its complete blocks (`kv.hashes.block_hashes`), or little-endian u64."""
    block_size: int = 0
    """With ``block_hashes``: tokens per block; 0: the model's."""
    length: int = 0
    """With ``block_hashes``: tokens of the prompt; 0: those of its complete blocks."""
    cache_salt: str | None = None
    lora: str | None = None
    request_id: str = ""
    """Holds its share of the chosen worker until `FREE`."""
    reserve: bool = False
    """Holds it until the worker's own reports include the request: for callers that route it themselves at once."""
    worker_id: str | None = None
    """The only one that will do, while it can be used."""
    dp_rank: int | None = None
    router: dict[str, Any] = {}
    """As ``nvext.router``: weights, ``allowed_worker_ids``, ``routing_constraints``."""


class About(msgspec.Struct, frozen=True):
    """A question about a lease."""

    request_id: str


class Score(msgspec.Struct, frozen=True, omit_defaults=True):
    """One candidate. Blocks are KV blocks; in modes that do not ask caches there is only the load."""

    worker_id: str
    dp_rank: int
    device_blocks: int = 0
    host_blocks: int = 0
    disk_blocks: int = 0
    prefill_blocks: float = 0.0
    """To be computed there, with what it has in hand, less what is cached."""
    decode_blocks: int = 0
    """In use there, with this request."""
    requests: int = 0
    """In hand there."""
    cost: float | None = None
    """The least wins (docs/explanation/kv-routing.md); None: this mode does not compute one."""


class Best(msgspec.Struct, frozen=True):
    """The answer to `BEST_WORKER`."""

    worker_id: str
    dp_rank: int | None
    """None: the engine chooses."""
    overlap_blocks: int
    block_size: int
    total_blocks: int
    scores: list[Score]
    """Of all candidates, the chosen one first."""
    router_id: str = ""


class Overlap(msgspec.Struct, frozen=True):
    """How many leading blocks of a prompt one rank holds, by tier."""

    worker_id: str
    dp_rank: int
    device_blocks: int
    host_blocks: int
    disk_blocks: int


class Overlaps(msgspec.Struct, frozen=True):
    """The answer to `OVERLAP_SCORES`. Workers that hold nothing are not named."""

    block_size: int
    total_blocks: int
    scores: list[Overlap]
    states: dict[str, str]
    """How well each worker's cache is known: exact, resynchronising, approximate, none."""


class Done(msgspec.Struct, frozen=True):
    """The answer to `PREFILL_COMPLETE` and `FREE`."""

    found: bool
    """Whether there was such a lease."""


class GivenChain(Chain):
    """Names of blocks that were computed elsewhere."""

    __slots__ = ("_given", "_size")

    def __init__(self, hashes: array[int], block_size: int):
        super().__init__(b"")
        self._given, self._size = hashes, block_size

    def of(self, block_size: int, generated: bytes = b"") -> array[int]:  # noqa: ARG002  nothing is generated yet
        """Return them. Raises InvalidRequest for another block size than theirs."""
        if self._size and self._size != block_size:
            raise InvalidRequest(
                f"'block_hashes' are of blocks of {self._size} tokens; this model's have {block_size}.",
                param="block_size",
            )
        return self._given


def read(question: Any, kind: type[Ask]) -> Ask:
    """Return a question that came in.

    Raises:
        InvalidRequest: it cannot be read.
        PayloadTooLarge: the prompt is over `MOST_TOKENS`.
    """
    try:
        ask = msgspec.convert(question, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the question cannot be read: {error}") from None
    if (ask.token_ids is None) == (ask.block_hashes is None):
        raise InvalidRequest("a question has either 'token_ids' or 'block_hashes'", param="token_ids")
    return ask


def about(question: Any) -> str:
    """Return the id of the lease that is asked about. Raises InvalidRequest."""
    try:
        return msgspec.convert(question, About).request_id
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the question cannot be read: {error}", param="request_id") from None


def chain_of(ask: Ask, block_size: int) -> tuple[Chain, int]:
    """Return the names of a prompt's blocks, and its length in tokens.

    Args:
        ask: the question.
        block_size: tokens per block of its model.

    Raises:
        InvalidRequest: numbers that are none.
        PayloadTooLarge: over `MOST_TOKENS`.
    """
    if ask.block_hashes is not None:
        hashes = _numbers(ask.block_hashes, "Q", _U64, "block_hashes")
        length = ask.length or len(hashes) * (ask.block_size or block_size)
        chain: Chain = GivenChain(hashes, ask.block_size)
    else:
        ids = _numbers(ask.token_ids or [], "I", _U32, "token_ids")
        length, chain = len(ids), Chain(ids.tobytes(), ask.cache_salt, ask.lora)
    if length > MOST_TOKENS:
        raise PayloadTooLarge(
            f"the prompt has {length} tokens; at most {MOST_TOKENS} are placed",
            limit="MOST_TOKENS",
            threshold=MOST_TOKENS,
            actual=length,
        )
    if length < 1:
        raise InvalidRequest("the prompt is empty", param="token_ids")
    return chain, length


def _numbers(given: list[int] | bytes, code: str, size: int, param: str) -> array[int]:
    if isinstance(given, bytes) and len(given) % size:
        raise InvalidRequest(f"'{param}' has {len(given)} bytes, no multiple of {size}", param=param)
    try:
        return array(code, given)
    except (OverflowError, TypeError, ValueError):
        raise InvalidRequest(f"'{param}' holds a number outside of {size * 8} bits", param=param) from None
