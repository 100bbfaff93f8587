"""The two halves of a disaggregated request inside the mock engine.

A prefill leg's blocks are kept, under its key, until `let_go`. A decode leg waits here for its transfer, which takes as
long as its blocks need at the configured bandwidth; then it joins the queue as if its prompt had been computed. What
becomes of a transfer that fails is the configuration's choice: computed anew, an error, or silence.

The tokens of a decode leg come from the tokens that its hand-off stands for. If these are not its own, what it says is
somebody else's: verification is the worker's business, and its absence shows.

Must never schedule or produce tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from holdfast.base.ids import SequenceKey
from holdfast.engines.handoff import KvHandoff, digest_of
from holdfast.engines.mock.cache import BlockPool
from holdfast.engines.mock.config import MockConfig
from holdfast.engines.mock.misbehaviour import StandingOrders
from holdfast.engines.mock.rendezvous import Exchange
from holdfast.engines.mock.sequence import Sequence

PROTOCOL = "mock"
_GIGA = 1e9


class _Transfer:
    """One decode leg whose blocks are on their way."""

    __slots__ = ("cancel", "sequence", "wanted")

    def __init__(self, sequence: Sequence):
        self.sequence = sequence
        self.wanted = True
        """Nobody has cancelled it."""
        self.cancel: Callable[[], None] = _nothing


class Legs:
    """Of one engine.

    Args:
        config: of the engine.
        pool: its blocks.
        orders: what was commanded.
        arrived: called with a decode leg and whether its blocks have come.
    """

    def __init__(
        self,
        config: MockConfig,
        pool: BlockPool,
        orders: StandingOrders,
        arrived: Callable[[Sequence, bool], None],
    ):
        self._config, self._pool, self._orders, self._arrived = config, pool, orders, arrived
        self._kept: dict[SequenceKey, Sequence] = {}
        self._transfers: dict[SequenceKey, _Transfer] = {}
        self.exchange: Exchange | None = None

    @property
    def kept(self) -> int:
        """Hand-offs whose blocks are kept."""
        return len(self._kept)

    @property
    def on_their_way(self) -> int:
        """Decode legs that wait for their blocks."""
        return len(self._transfers)

    # the prefill leg

    def keep(self, sequence: Sequence) -> KvHandoff | None:
        """Keep the blocks of a computed prompt; returns the hand-off, or None in the style ``rendezvous``."""
        request = sequence.request
        if request.handoff is not None:
            room = request.handoff.params.get("bootstrap_room")
            if self.exchange is not None and type(room) is int and not self._orders.due("lose"):
                self.exchange.offer(room)
            sequence.drop_blocks(self._pool)  # the transfer has its own time; nothing is modelled of it here
            return None
        self._kept[sequence.key] = sequence
        swapped = self._orders.due("swap")
        tokens = len(sequence.ids)
        return KvHandoff(
            PROTOCOL,
            "after_prefill",
            tokens=tokens,
            digest=digest_of(request.prompt_ids, request.generated_ids) ^ int(swapped),
            params={"key": int(sequence.key), **({"lost": True} if self._orders.due("lose") else {})},
        )

    # the decode leg

    def receive(self, sequence: Sequence, handoff: KvHandoff) -> None:
        """Let the blocks of a decode leg come."""
        transfer = self._transfers[sequence.key] = _Transfer(sequence)
        lost = bool(handoff.params.get("lost")) or self._orders.due("lose")
        if handoff.phase == "after_prefill":
            self._travel(transfer, lost=lost)
            return
        address = f"{handoff.params.get('bootstrap_host')}:{handoff.params.get('bootstrap_port')}"
        room = handoff.params.get("bootstrap_room")
        if self.exchange is None or type(room) is not int or lost:
            self._travel(transfer, lost=True)
            return
        transfer.cancel = self.exchange.meet(address, room, lambda ready: self._travel(transfer, lost=not ready))

    def _travel(self, transfer: _Transfer, *, lost: bool) -> None:
        seconds = transfer_seconds(self._config, len(transfer.sequence.ids))
        loop = asyncio.get_running_loop()
        transfer.cancel = loop.call_later(seconds, self._over, transfer, not lost).cancel

    def _over(self, transfer: _Transfer, came: bool) -> None:
        sequence = transfer.sequence
        if not came and self._config.handoff_failure == "hang" and transfer.wanted:
            return  # nobody hears anything more of it, until somebody cancels it
        self._transfers.pop(sequence.key, None)
        if transfer.wanted:
            self._arrived(sequence, came)

    # both

    def let_go(self, key: SequenceKey) -> bool:
        """Forget a leg that is kept or on its way; returns False when there is none.

        With ``cancel_until`` other than ``anytime`` a transfer is not interrupted: what it brings is thrown away.
        """
        sequence = self._kept.pop(key, None)
        if sequence is not None:
            sequence.drop_blocks(self._pool)
            return True
        transfer = self._transfers.get(key)
        if transfer is None:
            return False
        transfer.wanted = False
        if self._config.cancel_until == "anytime":
            transfer.cancel()
            del self._transfers[key]
        return True

    def clear(self) -> None:
        """Everything is over."""
        for transfer in self._transfers.values():
            transfer.cancel()
        self._transfers.clear()
        for key in list(self._kept):
            self.let_go(key)


def transfer_seconds(config: MockConfig, tokens: int) -> float:
    """Return how long the KV blocks of so many tokens travel: bytes over bandwidth, in virtual seconds."""
    if not config.kv_transfer_bandwidth or not config.speedup_ratio:
        return 0.0
    return tokens * config.kv_bytes_per_token / (config.kv_transfer_bandwidth * _GIGA) / config.speedup_ratio


def _nothing() -> None:
    return
