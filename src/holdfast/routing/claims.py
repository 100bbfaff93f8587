"""What this process has sent to workers on top of what they last said of themselves.

A pong is up to a ping interval old, so that a burst of requests would slip past every threshold if only pongs
counted. Each attempt therefore holds a `Claim` from the moment its worker is chosen; a pong that includes its stream
(`Pong.last_open`) takes over from it. What ends between two pongs is taken off again.

Must never decide anything.
"""

from __future__ import annotations

from typing import Protocol

from holdfast.routing.saturation import RankLoad
from holdfast.wire.frames import Load, Pong


class Reporting(Protocol):
    """A worker whose pongs are known."""

    @property
    def instance(self) -> str:
        """Its id."""

    @property
    def epoch(self) -> int:
        """Of the running process."""

    @property
    def pong(self) -> Pong | None:
        """The last one."""


class _Account:
    """All claims on one process of a worker."""

    __slots__ = ("blocks", "ended_blocks", "ended_tokens", "held", "pong", "tokens", "unseen", "worker")

    def __init__(self, worker: Reporting):
        self.worker = worker
        self.pong = worker.pong
        self.held = 0
        self.unseen: dict[Claim, None] = {}
        """Claims that the last pong does not include, with their sums."""
        self.blocks = 0
        self.tokens = 0
        self.ended_blocks = 0
        """Of claims that the last pong includes and that are over since."""
        self.ended_tokens = 0

    def look(self) -> None:
        """Take note of a new pong."""
        pong = self.worker.pong
        if pong is self.pong or pong is None:
            return
        self.pong = pong
        self.ended_blocks = self.ended_tokens = 0
        for claim in [c for c in self.unseen if 0 < c.stream <= pong.last_open]:
            self.forget(claim)

    def forget(self, claim: Claim) -> None:
        """From now on the pong speaks for it."""
        del self.unseen[claim]
        self.blocks -= claim.blocks
        self.tokens -= claim.tokens


class Claim:
    """One attempt's share of its worker. `sent` when its stream is open, `release` when it is over."""

    __slots__ = ("_account", "_block_size", "blocks", "stream", "tokens")

    def __init__(self, account: _Account, block_size: int, tokens: int):
        self._account: _Account | None = account
        self._block_size = block_size
        self.blocks = _blocks(tokens, block_size)
        self.tokens = tokens
        """Prompt tokens that the worker still has to compute for it."""
        self.stream = 0
        """Its stream's number on the connection to the worker; 0: not sent."""

    def sent(self, stream: int) -> None:
        """The stream was opened under that number."""
        self.stream = stream

    def computed(self) -> None:
        """The first token has come: the prompt is done with."""
        account = self._account
        if account is None or not self.tokens:
            return
        account.look()
        if self in account.unseen:
            account.tokens -= self.tokens
        else:
            account.ended_tokens += self.tokens
        self.tokens = 0

    def release(self, length: int = 0) -> None:
        """Give it back; only the first call counts.

        Args:
            length: tokens of the sequence at its end, so that the blocks into which it has grown, the one for its next
                token included, are taken off.
        """
        account = self._account
        if account is None:
            return
        self.computed()
        account.look()
        self._account = None
        account.held -= 1
        if self in account.unseen:
            account.forget(self)
        else:
            account.ended_blocks += max(self.blocks, _blocks(length + 1, self._block_size))


class Ledger:
    """The claims of one process on all workers."""

    def __init__(self) -> None:
        self._accounts: dict[tuple[str, int], _Account] = {}

    def take(self, worker: Reporting, tokens: int, block_size: int) -> Claim:
        """Claim room on a worker.

        Args:
            worker: that was chosen.
            tokens: prompt and already generated tokens, all of which it has to compute.
            block_size: tokens per KV block; 0: unknown, no blocks are claimed.
        """
        account = self._account(worker)
        account.look()
        claim = Claim(account, block_size, tokens)
        account.held += 1
        account.unseen[claim] = None
        account.blocks += claim.blocks
        account.tokens += tokens
        return claim

    def held(self) -> int:
        """Return how many claims are out."""
        return sum(account.held for account in self._accounts.values())

    def loads(self, worker: Reporting, block_size: int, total_blocks: int, ranks: int) -> list[RankLoad | None]:
        """Return what a worker has in hand, per rank.

        Claims that no pong includes yet are spread evenly over the ranks: which of them the engine will choose is
        its own business.

        Args:
            worker: who.
            block_size: tokens per KV block.
            total_blocks: as its card says, for pongs that say nothing.
            ranks: how many its card declares.
        """
        account = self._accounts.get((worker.instance, worker.epoch))
        if account is not None:
            account.look()
        pong = worker.pong
        if pong is None and account is None:
            return [None] * ranks
        load = pong.load if pong is not None else Load()
        said = load.ranks or (load,)
        observed: list[RankLoad | None] = [
            _load(load, account, block_size, total_blocks, max(1, ranks)) for load in said[:ranks]
        ]
        return observed + [None] * (ranks - len(observed))

    def _account(self, worker: Reporting) -> _Account:
        key = (worker.instance, worker.epoch)
        account = self._accounts.get(key)
        if account is None:
            self._accounts = {k: a for k, a in self._accounts.items() if a.held}
            account = self._accounts[key] = _Account(worker)
        return account


def _load(load: Load, account: _Account | None, block_size: int, total_blocks: int, ranks: int) -> RankLoad:
    blocks = load.kv_used_blocks + _blocks(load.prefill_tokens, block_size)
    tokens = load.prefill_tokens
    if account is not None:
        blocks = max(0, blocks - _share(account.ended_blocks, ranks)) + _share(account.blocks, ranks)
        tokens = max(0, tokens - _share(account.ended_tokens, ranks)) + _share(account.tokens, ranks)
    return RankLoad(blocks, load.kv_total_blocks or total_blocks, tokens)


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size) if block_size > 0 else 0


def _share(amount: int, ranks: int) -> int:
    return -(-amount // ranks)
