"""The tape of choices: every decision that a universe leaves to chance is drawn here, and nowhere else.

A tape has named streams (schedule, network, plan, workload …), so that editing one does not shift the others.
Every stream records what it gave; the record can be replayed, edited and shrunk. The value 0 always means *plain*:
first in line, no fault, smallest delay. A scripted stream that has come to its end, or whose value does not
fit, goes on with 0. Must never look at a clock or at any other source of randomness.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

RESOLUTION = 2**32
"""Steps in which a share between 0 and 1 is recorded."""
STREAMS = ("schedule", "network", "discovery", "plan", "workload")
"""The streams that the simulation itself uses; others come into being when they are asked for."""


class Stream:
    """One row of choices.

    Args:
        name: what it decides.
        seed: of the universe.
        script: values to give instead of random ones; None: random.
    """

    __slots__ = ("_at", "_random", "_script", "given", "labels", "name")

    def __init__(self, name: str, seed: int, script: Sequence[int] | None = None):
        self.name = name
        self.given: array[int] = array("Q")
        """What was given, in order."""
        self.labels: list[str] | None = None
        """What each value decided, when the tape was asked to explain."""
        self._random = random.Random(f"{seed}/{name}").random
        self._script = None if script is None else tuple(script)
        self._at = 0

    def choose(self, n: int, what: str = "") -> int:
        """Return one of 0 … n-1. ``what`` says for people what is decided."""
        if self._script is None:
            value = int(self._random() * n)
        else:
            value = self._scripted(n)
        self.given.append(value)
        if self.labels is not None:
            self.labels.append(what)
        return value

    def _scripted(self, n: int) -> int:
        at, script = self._at, self._script
        assert script is not None
        self._at = at + 1
        value = script[at] if at < len(script) else 0
        return value if 0 <= value < n else 0

    def chance(self, p: float, what: str = "") -> bool:
        """Return True with probability ``p``. Recorded as 0 for no and 1 for yes."""
        value = int(self._random() < p) if self._script is None else self._scripted(2)
        self.given.append(value)
        if self.labels is not None:
            self.labels.append(what)
        return value == 1

    def uniform(self, low: float, high: float, what: str = "") -> float:
        """Return a number from ``low`` (plain) to ``high``."""
        return low + (high - low) * (self.choose(RESOLUTION, what) / RESOLUTION)

    def log_uniform(self, low: float, high: float, what: str = "") -> float:
        """Return a number from ``low`` (plain) to ``high``, each order of magnitude as likely as the next.

        Args:
            low: over 0.
            high: at least ``low``.
            what: for people.
        """
        return low * math.exp(math.log(high / low) * (self.choose(RESOLUTION, what) / RESOLUTION))

    def pick(self, options: Sequence[T], what: str = "") -> T:
        """Return one of the options; the first is the plain one."""
        return options[self.choose(len(options), what)]


class Tape(Stream):
    """All choices of one universe. Used as a stream itself it is the stream ``plan``.

    Args:
        seed: of the universe.
        script: what to give instead, by stream; a stream that is not named is random. A bare sequence is the plan's.
        explain: keep for people what each choice decided (slower).
    """

    __slots__ = ("_explain", "_scripts", "_streams", "discovery", "network", "plan", "schedule", "seed", "workload")

    def __init__(
        self,
        seed: int,
        script: Mapping[str, Sequence[int]] | Sequence[int] | None = None,
        *,
        explain: bool = False,
    ):
        scripts = script if isinstance(script, Mapping) else {} if script is None else {"plan": script}
        super().__init__("plan", seed, scripts.get("plan"))
        self.seed = seed
        self.labels = [] if explain else None
        self._explain = explain
        self._scripts = scripts
        self.plan: Stream = self
        self._streams: dict[str, Stream] = {"plan": self}
        self.schedule = self.stream("schedule")
        self.network = self.stream("network")
        self.discovery = self.stream("discovery")
        self.workload = self.stream("workload")

    def stream(self, name: str) -> Stream:
        """Return the stream of this name."""
        known = self._streams.get(name)
        if known is None:
            known = self._streams[name] = Stream(name, self.seed, self._scripts.get(name))
            known.labels = [] if self._explain else None
        return known

    @property
    def choices(self) -> dict[str, array[int]]:
        """What was given so far, by stream: a script that replays this universe."""
        return {name: stream.given for name, stream in self._streams.items() if stream.given}

    def rng(self, name: str) -> random.Random:
        """Return a generator for production code; it follows from seed and name and is not recorded."""
        return random.Random(f"{self.seed}/rng/{name}")
