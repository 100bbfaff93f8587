"""Made-up load: requests of given lengths, all prompts different, at a rate or one after the other for a while.

Must never send anything.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator

import msgspec

from holdfast.base.errors import InvalidRequest
from holdfast.replay.arrivals import Arrivals
from holdfast.replay.trace import TRACE_BLOCK, TraceRequest

_LENGTHS = re.compile(r"(\d+)(?:-(\d+))?")
_MOST = 1_000_000
_FIRST_ID = 1 << 40
"""Far from the ids of any trace."""


class Lengths(msgspec.Struct, frozen=True):
    """How long prompts or answers are, in tokens: all values in between are equally likely."""

    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        """Return one of them."""
        return self.low if self.low == self.high else rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low}-{self.high}"


def read_lengths(text: str, flag: str) -> Lengths:
    """Return what ``1024`` or ``512-2048`` stands for.

    Args:
        text: the value.
        flag: whose value it is, for the message.

    Raises:
        InvalidRequest: neither.
    """
    found = _LENGTHS.fullmatch(text.replace(",", ""))
    low = int(found[1]) if found else 0
    high = int(found[2]) if found and found[2] else low
    if not 1 <= low <= high <= _MOST:
        raise InvalidRequest(f"--{flag} {text}: expected tokens, as in 1024 or 512-2048 (up to {_MOST:,}).")
    return Lengths(low, high)


class MadeUp:
    """Makes requests without anything in common.

    Args:
        prompt: lengths of the prompts.
        output: lengths of the answers.
        rng: draws them, and the times between arrivals.
    """

    def __init__(self, prompt: Lengths, output: Lengths, rng: random.Random):
        self._prompt, self._output, self._rng = prompt, output, rng
        self._ids = itertools.count(_FIRST_ID)
        self.described = f"{prompt} tokens in, {output} out"

    def one(self, timestamp: float = 0.0) -> TraceRequest:
        """Return a request; the time stamp is in milliseconds."""
        length = self._prompt.draw(self._rng)
        ids = tuple(next(self._ids) for _ in range(-(-length // TRACE_BLOCK)))
        return TraceRequest(timestamp, length, self._output.draw(self._rng), ids)

    def at_rate(self, rate: float, seconds: float) -> Iterator[TraceRequest]:
        """Yield requests with Poisson time stamps for so long; ``rate`` a second."""
        at = self._rng.expovariate(rate)
        while at < seconds:
            yield self.one(at * 1e3)
            at += self._rng.expovariate(rate)


class MadeUpLoad:
    """A `whatif.Load` of made-up requests, at a rate or so many at once, for a while.

    Args:
        makes: the requests.
        seconds: for which they come.
        rate: a second, at random; None: as fast as seats allow.
        concurrency: requests under way at most.
    """

    def __init__(self, makes: MadeUp, seconds: float, rate: float | None, concurrency: int | None):
        self._makes, self._seconds, self._rate = makes, seconds, rate
        paced = Arrivals(rate=rate, concurrency=concurrency)  # says what is wrong with the numbers
        self.arrivals = Arrivals(speedup=1.0, concurrency=concurrency) if rate else paced
        self.described = f"{paced.described}, {makes.described}"

    def requests(self, elapsed: Callable[[], float]) -> Iterator[TraceRequest]:
        """See `whatif.Load`."""
        if self._rate:
            yield from self._makes.at_rate(self._rate, self._seconds)
            return
        while elapsed() < self._seconds:
            yield self._makes.one()

    def extra(self) -> TraceRequest:
        """See `whatif.Load`."""
        return self._makes.one()


class TraceLoad:
    """A `whatif.Load` from a trace.

    Args:
        read: begins to read it.
        arrivals: its pace.
        extra: makes the requests of bursts.
    """

    def __init__(self, read: Callable[[], Iterator[TraceRequest]], arrivals: Arrivals, extra: MadeUp):
        self._read, self._extra = read, extra
        self.arrivals = arrivals
        self.described = arrivals.described

    def requests(self, elapsed: Callable[[], float]) -> Iterator[TraceRequest]:
        """See `whatif.Load`."""
        del elapsed
        return self._read()

    def extra(self) -> TraceRequest:
        """See `whatif.Load`."""
        return self._extra.one()
