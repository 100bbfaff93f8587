"""What it costs to send a request to a worker's rank, in KV blocks, and the pick among costs. Pure functions.

The two forms of the reference (runtime notes, 3.5) are one here::

    prefill = max((tokens in hand + prompt) / block - credits, 0)
    credits = c * device + host_weight * host + disk_weight * disk
    c       = credit / (1 + decay * excess / prompt blocks)
    again   = recompute_weight * (the largest credits of any candidate - credits)
    load    = blocks in use + request_weight * requests
    cost    = overlap_score_weight * prefill_scale * (prefill + again) + decode_scale * load

With decode_scale 1, recompute_weight 0 and everything but `overlap_score_weight` at its default this is the older one.
``excess``: prefill blocks in hand above the least loaded candidate.
Ours are the decode_scale (`DECODE_LOAD_SCALE`) and what is computed again (`RECOMPUTE_WEIGHT`). Wanted taints multiply
the cost by ``exp(-tanh(sum of their weights))``.

Must never know a worker.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import msgspec

DECODE_LOAD_SCALE = 1 / 16
"""What a block in use counts beside one to be computed. The reference counts them alike, which sends conversations away
from their caches whenever workers differ by a few running requests. But a request brings its blocks wherever it goes,
and what is in use there already costs it little: on a chat trace the smaller weight gives more hits, shorter waits and
more throughput at every load (docs/performance.md)."""


RECOMPUTE_WEIGHT = 8.0
"""What a block counts on top that some candidate holds and this one would compute again. Waiting behind a queue costs
only the request that waits. Computing what is there already costs everybody on that worker, whose steps it prolongs,
and later requests as well, whose blocks the second copy evicts. Without it a conversation leaves its cache as soon as
the queue there is longer than its own prefix, the more often the busier the fleet: hits fell from 94 % of the possible
ones to 80 % between 16 and 256 requests at once; with it they stay at 95 % and above, for no longer waits and more
throughput (docs/performance.md)."""


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of the cost, under the reference's names."""

    overlap_score_weight: float = 1.0
    """Scales the whole prefill part; 0: only decode blocks count."""
    overlap_score_credit: float = 1.0
    """Share of the device blocks that counts as not to be computed; 0: caches do not matter."""
    overlap_score_credit_decay: float = 0.0
    """How much faster credit fades on workers that have more prefill in hand than the least loaded one."""
    prefill_load_scale: float = 1.0
    decode_load_scale: float = DECODE_LOAD_SCALE
    decode_active_request_weight: float = 0.0
    """Blocks that each request in hand costs on top."""
    host_cache_hit_weight: float = 0.75
    disk_cache_hit_weight: float = 0.25
    recompute_weight: float = RECOMPUTE_WEIGHT
    """Blocks that each credited block counts which another candidate holds and this one does not; 0: the reference's
    cost."""
    router_temperature: float = 0.0
    """0: the least cost; above: by chance, the more evenly the higher (`pick`)."""


class Terms(msgspec.Struct, frozen=True):
    """What speaks for and against one rank, in blocks."""

    instance: str
    rank: int
    device: int
    """Leading blocks of the prompt that it holds on the device; then in host memory; then on disk."""
    host: int
    disk: int
    prefill: float
    """To be computed, with what it has in hand, less credits."""
    decode: int
    """In use, with this request."""
    requests: int
    cost: float
    credited: int = 0
    """Those of its blocks that speak for it."""

    @property
    def overlap(self) -> int:
        """Blocks in all tiers."""
        return self.device + self.host + self.disk


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """One rank before it is weighed."""

    instance: str
    rank: int
    tiers: tuple[int, int, int]
    """Blocks that it holds, by tier."""
    credited: tuple[int, int, int]
    """Those of them that count: without the part that is a template."""
    tokens: int
    """Prompt tokens in hand."""
    blocks: int
    """KV blocks in use with this request."""
    requests: int
    preference: float = 0.0
    """Sum of the weights of those taints that are wanted and there."""


def credit_of(one: Candidate, length: int, weights: Weights, least_tokens: int) -> float:
    """Return how many blocks count as not to be computed on one rank; arguments as in `weigh`."""
    credit = weights.overlap_score_credit
    if weights.overlap_score_credit_decay:
        excess = (one.tokens - least_tokens) / max(length, 1)
        credit /= 1.0 + weights.overlap_score_credit_decay * excess
    device, host, disk = one.credited
    return credit * device + weights.host_cache_hit_weight * host + weights.disk_cache_hit_weight * disk


def weigh(
    one: Candidate, length: int, block_size: int, weights: Weights, least_tokens: int, *, most_credit: float = 0.0
) -> Terms:
    """Return the cost of one rank.

    Args:
        one: the rank.
        length: tokens of the request that must be there before it can go on.
        block_size: tokens per block.
        weights: parameters.
        least_tokens: prompt tokens that the least loaded candidate has in hand.
        most_credit: the largest `credit_of` of any candidate.
    """
    credit = credit_of(one, length, weights, least_tokens)
    prefill = max((one.tokens + length) / block_size - credit, 0.0)
    again = weights.recompute_weight * max(most_credit - credit, 0.0)
    cost = weights.overlap_score_weight * weights.prefill_load_scale * (prefill + again)
    cost += weights.decode_load_scale * (one.blocks + weights.decode_active_request_weight * one.requests)
    if one.preference:
        cost *= math.exp(-math.tanh(one.preference))
    return Terms(one.instance, one.rank, *one.tiers, prefill, one.blocks, one.requests, cost, sum(one.credited))


def pick(terms: Sequence[Terms], temperature: float, rng: random.Random, recent: Callable[[Terms], float]) -> Terms:
    """Return one of the candidates.

    Without temperature the least cost; among equals who has the most to reuse, as that is the least work in all; among
    those who got the least work lately; then one by chance. With temperature t by chance, with odds
    ``exp(-cost / ((greatest - least cost) * t))``.

    Args:
        terms: at least one.
        temperature: 0 or above.
        rng: chance.
        recent: how much work a candidate got lately, asked only when there are equals.
    """
    if len(terms) == 1:
        return terms[0]
    costs = [one.cost for one in terms]
    least = min(costs)
    if temperature > 0:
        span = (max(costs) - least) * temperature
        if span > 0:
            return rng.choices(terms, [math.exp(-(cost - least) / span) for cost in costs])[0]
    best = [one for one in terms if one.cost <= least]
    if len(best) > 1:
        most = max(one.credited for one in best)
        best = [one for one in best if one.credited >= most]
    if len(best) > 1:
        works = [recent(one) for one in best]
        lazy = min(works)
        best = [one for one, work in zip(best, works, strict=True) if work <= lazy]
    return best[0] if len(best) == 1 else rng.choice(best)
