"""What happened to each request of a replay, and the running figures over all of them.

Memory: one `Record` a request; everything that happens per token goes into histograms and sums per tick.

Must never decide what the figures mean; `report` does.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

from holdfast.replay.driver import Job, Outcome

TICKS = 10
"""Ticks of a second in which tokens are summed."""
_PER_OCTAVE = 70
"""Buckets to a factor of two: each is 1 % wide."""
_LOWEST = 1e-6
_BUCKETS = 40 * _PER_OCTAVE


class Histogram:
    """Durations in buckets of 1 %, from a microsecond to twelve days; mean and maximum are exact."""

    __slots__ = ("_counts", "count", "highest", "total")

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self.count = 0
        self.total = 0.0
        self.highest = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """Note a duration so many times."""
        at = int(math.log2(seconds / _LOWEST) * _PER_OCTAVE) if seconds > _LOWEST else 0
        self._counts[min(at, _BUCKETS - 1)] += count
        self.count += count
        self.total += seconds * count
        self.highest = max(self.highest, seconds)

    def quantile(self, share: float) -> float:
        """Return the duration below which that share lies (middle of its bucket); 0 when there are none."""
        wanted = max(1, math.ceil(share * self.count))
        seen = 0
        for at, count in enumerate(self._counts):
            seen += count
            if count and seen >= wanted:
                return min(_LOWEST * 2 ** ((at + 0.5) / _PER_OCTAVE), self.highest)
        return 0.0


class Record:
    """One request. Times are seconds since the start of the replay; None: it did not come to that."""

    __slots__ = (
        "arrived", "cached", "due", "end", "first", "generated", "index", "input_tokens", "last", "outcome",
        "output_tokens", "reason", "sent", "worker",
    )  # fmt: skip

    def __init__(self, job: Job, due: float, sent: float):
        self.index = job.index
        self.input_tokens = job.request.input_length
        self.output_tokens = job.request.output_length
        """As asked for."""
        self.due = due
        self.sent = sent
        self.first: float | None = None
        self.last: float | None = None
        self.end: float | None = None
        self.arrived = 0
        """Tokens as they were told one by one; a server that puts several into one event tells fewer than it made."""
        self.generated = 0
        """Tokens as the server counted them, or as they arrived where it does not count."""
        self.cached = 0
        self.worker = ""
        self.outcome: Outcome = "unfinished"
        self.reason = ""

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from sending to the first token."""
        return None if self.first is None else self.first - self.sent

    @property
    def time_per_token(self) -> float | None:
        """Mean seconds between tokens after the first."""
        if self.first is None or self.last is None or self.generated < 2:
            return None
        return (self.last - self.first) / (self.generated - 1)


class Recording:
    """All of a replay."""

    def __init__(self, clock: Callable[[], float]):
        """Start now.

        Args:
            clock: seconds from any beginning: the running loop's time, or a stopwatch where the loop counts in
                milliseconds only, as uvloop does.
        """
        self._clock = clock
        self._began = clock()
        self.records: list[Record] = []
        self.gaps = Histogram()
        """Between tokens of one request."""
        self.tokens: defaultdict[str, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))
        """Output tokens by worker and tick."""
        self.in_flight = 0

    def now(self) -> float:
        """Return the seconds since the start."""
        return self._clock() - self._began

    def open(self, job: Job, due: float | None = None) -> Note:
        """Begin the record of a request that is sent now; it was due then, or now."""
        now = self.now()
        record = Record(job, now if due is None else due, now)
        self.records.append(record)
        self.in_flight += 1
        return Note(self, record)


class Note:
    """Takes the events of one request (`driver.Events`)."""

    __slots__ = ("_recording", "record")

    def __init__(self, recording: Recording, record: Record):
        self._recording = recording
        self.record = record

    def worker(self, name: str) -> None:
        """See `driver.Events`."""
        self.record.worker = name

    def tokens(self, count: int = 1) -> None:
        """See `driver.Events`."""
        record, recording = self.record, self._recording
        now = recording.now()
        if record.last is None:
            record.first = now
        else:
            recording.gaps.add((now - record.last) / count, count)
        record.last = now
        record.arrived += count
        record.generated = record.arrived
        recording.tokens[record.worker][int(now * TICKS)] += count

    def usage(self, prompt: int, completion: int, cached: int) -> None:
        """See `driver.Events`."""
        self.record.input_tokens = prompt
        self.record.generated = completion
        self.record.cached = cached

    def ended(self, outcome: Outcome, reason: str = "") -> None:
        """See `driver.Events`."""
        record = self.record
        if record.end is None:
            record.end = self._recording.now()
            record.outcome, record.reason = outcome, reason
            self._recording.in_flight -= 1
