"""What this process has sent to workers on top of what they last said of themselves, per data-parallel rank.

A pong is up to a ping interval old, so that a burst of requests would slip past every threshold if only pongs
counted. Each attempt therefore holds a `Claim` from the moment its worker is chosen; a pong that includes its stream
(`Pong.last_open`) takes over from it. What ends between two pongs is taken off again. So a worker's load is

    what it reported in all - what of that is ours + what we hold now,

and frontends that do not know each other agree within one ping interval. What is ours in a report is known from
``last_open``, without the worker's telling.

Blocks are counted once however many of our streams hold them (`prefixes`), if the hashes of their prompts are known.
What streams have grown by since the last pong is counted only for those whose `Output` is followed.
Must never decide anything.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from holdfast.routing.prefixes import Prefixes
from holdfast.routing.saturation import RankLoad
from holdfast.wire.frames import Load, Pong

ANY_RANK = -1
"""The engine will choose."""
ELSEWHERE = -1
"""In place of a stream's number: not sent by this process."""
_NO_HASHES: array[int] = array("Q")


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


class Estimate(NamedTuple):
    """What one rank has in hand, everybody's work together."""

    blocks: int
    """KV blocks in use, or promised to prompts that it has taken or been sent."""
    tokens: int
    """Prompt tokens to be computed."""
    requests: int


class Sums(NamedTuple):
    """What our claims on one rank hold."""

    blocks: int
    tokens: int
    requests: int


class Output(NamedTuple):
    """What a stream generates, looked at when its load is asked for (`router_track_output_blocks`)."""

    generated: Callable[[], int]
    """Tokens after its prompt, by now."""
    before: int
    """Those that were there when it claimed its room."""
    expected: int = 0
    """As its client says, of the whole answer; 0: unknown."""

    @property
    def left(self) -> float:
        """The share of the answer that is still to come; 1 where nobody said how long it will be."""
        return max(0.0, 1.0 - self.generated() / self.expected) if self.expected else 1.0


class _Rank:
    """All claims on one rank of a process: what they hold, and how that differs from what the pong includes."""

    __slots__ = (
        "ended_blocks", "ended_requests", "ended_tokens", "fresh_blocks", "fresh_requests", "fresh_tokens", "prefixes",
        "private", "requests", "tokens",
    )  # fmt: skip

    def __init__(self) -> None:
        self.prefixes = Prefixes()
        self.private = 0
        """Blocks that one stream alone has: the last of its prompt, its output, all when its hashes are not known."""
        self.tokens = 0
        self.requests = 0
        self.fresh_blocks = self.fresh_tokens = self.fresh_requests = 0
        """Not in the pong yet."""
        self.ended_blocks = self.ended_tokens = self.ended_requests = 0
        """In the pong, and over since."""

    @property
    def blocks(self) -> int:
        return self.prefixes.blocks + self.private

    def take(self, claim: Claim) -> None:
        new = private = claim.blocks
        if claim.hashes:
            before = self.prefixes.blocks
            claim.held = self.prefixes.add(claim.hashes)
            new += self.prefixes.blocks - before - len(claim.hashes)
            private -= len(claim.hashes)
        tokens = claim.tokens
        self.private += private
        self.fresh_blocks += new
        self.tokens += tokens
        self.fresh_tokens += tokens
        self.requests += 1
        self.fresh_requests += 1

    def computed(self, tokens: int, *, fresh: bool) -> None:
        self.tokens -= tokens
        if fresh:
            self.fresh_tokens -= tokens
        else:
            self.ended_tokens += tokens

    def drop(self, claim: Claim, grown: int, *, fresh: bool) -> None:
        """``grown``: blocks that it had at its end beyond those that were claimed."""
        less = private = claim.blocks
        if claim.hashes:
            before = self.prefixes.blocks
            self.prefixes.remove(claim.held)
            less += before - self.prefixes.blocks - len(claim.hashes)
            private -= len(claim.hashes)
        self.private -= private
        self.requests -= 1
        if fresh:  # blocks that an ended stream had brought and this one has kept are in the pong
            own = min(less, self.fresh_blocks)
            self.fresh_blocks -= own
            self.ended_blocks += less - own
            self.fresh_requests -= 1
        else:
            self.ended_blocks += less + grown
            self.ended_requests += 1

    def seen(self, unseen: Sequence[Claim]) -> None:
        """A new pong: only those claims are not in it."""
        self.ended_blocks = self.ended_tokens = self.ended_requests = 0
        self.fresh_tokens = sum(claim.tokens for claim in unseen)
        self.fresh_requests = len(unseen)
        before = self.prefixes.blocks
        for claim in unseen:
            self.prefixes.remove(claim.held)
        private = sum(claim.blocks - len(claim.hashes) for claim in unseen)
        self.fresh_blocks = before - self.prefixes.blocks + private
        for claim in unseen:
            claim.held = self.prefixes.add(claim.hashes)


class _Account:
    """All claims on one process of a worker."""

    __slots__ = ("growing", "held", "pong", "ranks", "unseen", "worker")

    def __init__(self, worker: Reporting):
        self.worker = worker
        self.pong = worker.pong
        self.held = 0
        self.ranks: dict[int, _Rank] = {}
        self.unseen: dict[Claim, None] = {}
        """Claims that the last pong does not include."""
        self.growing: dict[Claim, int] = {}
        """Those whose output is followed, with the blocks of theirs that the last pong includes, or were claimed."""

    def rank(self, number: int) -> _Rank:
        found = self.ranks.get(number)
        if found is None:
            found = self.ranks[number] = _Rank()
        return found

    def look(self) -> None:
        """Take note of a new pong."""
        pong = self.worker.pong
        if pong is self.pong or pong is None:
            return
        self.pong = pong
        if self.unseen:
            self.unseen = {
                c: None for c in self.unseen if not (c.stream == ELSEWHERE or 0 < c.stream <= pong.last_open)
            }
        for number, rank in self.ranks.items():
            rank.seen([c for c in self.unseen if c.rank == number])
        if self.growing:
            self.growing = {c: n if c in self.unseen else c.blocks_now() for c, n in self.growing.items()}

    def grown(self, number: int) -> int:
        """Return the blocks by which the followed claims on a rank have grown since the last pong."""
        return sum(max(0, c.blocks_now() - n) for c, n in self.growing.items() if c.rank == number)

    def outgrown(self, number: int) -> int:
        """Return the blocks by which they have grown since they were claimed."""
        return sum(c.blocks_now() - c.blocks for c in self.growing if c.rank == number)

    def ending(self, number: int) -> int:
        """Return how many of the blocks that only one followed claim on a rank needs are as good as free again."""
        return round(sum((1.0 - c.output.left) * c.own_blocks() for c in self.growing if c.rank == number and c.output))


class Claim:
    """One attempt's share of its worker. `sent` when its stream is open, `release` when it is over."""

    __slots__ = (
        "_account", "_block_size", "_length", "_part", "blocks", "hashes", "held", "output", "rank", "stream", "tokens",
    )  # fmt: skip

    def __init__(self, account: _Account, block_size: int, length: int, *, cached: int, rank: int, hashes: array[int]):
        self._account: _Account | None = account
        self._block_size = block_size
        self._length = length
        self.hashes = hashes
        blocks = _blocks(length, block_size)
        self.blocks = max(blocks, len(hashes)) if hashes else blocks
        """Blocks of the whole sequence, shared or not."""
        self.tokens = length - cached if length > cached else 0
        """Prompt tokens that the worker still has to compute for it."""
        self.rank = rank
        self.stream = 0
        """Its stream's number on the connection to the worker; 0: not sent, or `ELSEWHERE`."""
        self.output: Output | None = None
        """If it is followed."""
        self._part = part = account.rank(rank)
        self.held = part.prefixes.root
        part.take(self)

    def follow(self, output: Output) -> None:
        """Count what it grows by between two pongs, too."""
        if self._account is not None:
            self.output = output
            self._account.growing[self] = self.blocks

    def blocks_now(self) -> int:
        """Return the blocks of the whole sequence with its output, the one for its next token included."""
        output = self.output
        more = output.generated() - output.before if output is not None else 0
        return max(self.blocks, _blocks(self._length + more + 1, self._block_size)) if more > 0 else self.blocks

    def own_blocks(self) -> int:
        """Return those of `blocks_now` that no other of our streams there shares."""
        node, own = self.held, self.blocks_now() - len(self.hashes)
        while node.parent is not None and node.refs == 1:
            own += node.end - node.start
            node = node.parent
        return own

    def sent(self, stream: int) -> None:
        """The stream was opened under that number."""
        self.stream = stream

    def sent_elsewhere(self) -> None:
        """Somebody else has sent it to the worker by now: whatever that says from now on includes it."""
        if not self.stream:
            self.stream = ELSEWHERE

    def computed(self) -> None:
        """The first token has come: the prompt is done with."""
        account = self._account
        if account is None or not self.tokens:
            return
        account.look()
        self._part.computed(self.tokens, fresh=self in account.unseen)
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
        account.look()
        if self.tokens:
            self.computed()
        self._account = None
        account.held -= 1
        fresh = self in account.unseen
        if fresh:
            del account.unseen[self]
        grown = 0 if fresh else max(0, _blocks(length + 1, self._block_size) - self.blocks)
        if self.output is not None:
            grown, self.output = account.growing.pop(self) - self.blocks, None
        self._part.drop(self, grown, fresh=fresh)


class Ledger:
    """The claims of one process on all workers."""

    def __init__(self) -> None:
        self._accounts: dict[tuple[str, int], _Account] = {}

    def take(
        self,
        worker: Reporting,
        tokens: int,
        block_size: int,
        *,
        rank: int = ANY_RANK,
        cached: int = 0,
        hashes: array[int] = _NO_HASHES,
    ) -> Claim:
        """Claim room on a worker.

        Args:
            worker: that was chosen.
            tokens: prompt and already generated tokens, which it has to compute.
            block_size: tokens per KV block; 0: unknown, no blocks are claimed.
            rank: that was chosen, or `ANY_RANK`.
            cached: of the tokens, those that its cache should have.
            hashes: of the complete blocks of these tokens; blocks that our streams share count once then.
        """
        account = self._account(worker)
        account.look()
        claim = Claim(account, block_size, tokens, cached=cached, rank=rank, hashes=hashes)
        account.held += 1
        account.unseen[claim] = None
        return claim

    def held(self) -> int:
        """Return how many claims are out."""
        return sum(account.held for account in self._accounts.values())

    def sums(self, worker: Reporting, rank: int = ANY_RANK) -> Sums:
        """Return what our claims on a rank of a worker's present process hold."""
        account = self._accounts.get((worker.instance, worker.epoch))
        part = account.ranks.get(rank) if account is not None else None
        return Sums(part.blocks, part.tokens, part.requests) if part is not None else Sums(0, 0, 0)

    def shared(self, worker: Reporting, rank: int, hashes: array[int]) -> int:
        """Return how many leading blocks of a prompt our streams on a rank hold."""
        account = self._accounts.get((worker.instance, worker.epoch))
        part = account.ranks.get(rank) if account is not None else None
        return part.prefixes.match(hashes) if part is not None else 0

    def loads(self, worker: Reporting, block_size: int, total_blocks: int, ranks: int) -> list[RankLoad | None]:
        """Return what a worker has in hand, per rank.

        Claims for whichever rank the engine chooses are spread evenly until a pong includes them.

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
        load = pong.load if pong is not None else _NO_LOAD
        said = load.ranks or (load,)
        observed: list[RankLoad | None] = []
        for number, one in enumerate(said[:ranks]):
            blocks, tokens, _ = _estimate(one, account, number, block_size, max(1, ranks))
            if account is not None and account.growing:
                blocks += account.grown(number) + _share(account.grown(ANY_RANK), max(1, ranks))
            observed.append(RankLoad(blocks, one.kv_total_blocks or total_blocks, tokens))
        return observed + [None] * (ranks - len(observed))

    def estimate(self, worker: Reporting, rank: int, block_size: int, ranks: int) -> Estimate:
        """Return what one rank has in hand. At least what we hold there counts, also when the worker reports nothing.

        Args:
            worker: who.
            rank: of its `ranks`.
            block_size: tokens per KV block.
            ranks: how many its card declares.
        """
        account = self._accounts.get((worker.instance, worker.epoch))
        if account is not None:
            account.look()
        pong = worker.pong
        load = pong.load if pong is not None else _NO_LOAD
        if load.ranks:
            load = load.ranks[rank] if rank < len(load.ranks) else _NO_LOAD
        blocks, tokens, requests = _estimate(load, account, rank, block_size, ranks)
        if account is None:
            return Estimate(blocks, tokens, requests)
        if account.growing:
            blocks += account.grown(rank) + _share(account.grown(ANY_RANK), ranks)
        own = account.ranks.get(rank)
        if own is not None:
            if not load.kv_total_blocks:
                tokens = max(tokens, own.tokens)
            blocks = max(blocks, own.blocks + (account.outgrown(rank) if account.growing else 0))
            requests = max(requests, own.requests)
        if account.growing:
            blocks = max(0, blocks - account.ending(rank) - _share(account.ending(ANY_RANK), ranks))
        return Estimate(blocks, tokens, requests)

    def _account(self, worker: Reporting) -> _Account:
        key = (worker.instance, worker.epoch)
        account = self._accounts.get(key)
        if account is None:
            self._accounts = {k: a for k, a in self._accounts.items() if a.held}
            account = self._accounts[key] = _Account(worker)
        return account


_NO_LOAD = Load()


def _estimate(load: Load, account: _Account | None, rank: int, block_size: int, ranks: int) -> tuple[int, int, int]:
    """Return blocks, prompt tokens and requests: as reported, less what has ended, and what is new."""
    blocks = load.kv_used_blocks + _blocks(load.prefill_tokens, block_size)
    tokens = load.prefill_tokens
    requests = load.running + load.waiting
    if account is None:
        return blocks, tokens, requests
    for number, share in ((rank, 1), (ANY_RANK, ranks)):
        part = account.ranks.get(number)
        if part is not None:
            blocks = max(0, blocks - _share(part.ended_blocks, share)) + _share(part.fresh_blocks, share)
            tokens = max(0, tokens - _share(part.ended_tokens, share)) + _share(part.fresh_tokens, share)
            requests = max(0, requests - _share(part.ended_requests, share)) + _share(part.fresh_requests, share)
    return blocks, tokens, requests


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size) if block_size > 0 else 0


def _share(amount: int, ranks: int) -> int:
    return -(-amount // ranks)
