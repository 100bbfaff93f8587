"""What many rounds covered: how often each kind struck, which streams moved and why, how requests ended, what broke."""

from __future__ import annotations

from collections import Counter

import msgspec

from holdfast.sim.faults import kinds
from tests.faults.rounds import Result

SHOWN = 12


class Covered(msgspec.Struct, frozen=True):
    """What became of one round, small enough to be kept."""

    seed: int
    setting: str
    seconds: float
    requests: int
    hits: int
    seen: dict[str, int]
    moves: dict[str, int]
    broken: list[str]


def covered(result: Result, setting: str) -> Covered:
    """Return the essence of a result."""
    history = result.history
    return Covered(
        result.seed,
        setting,
        round(result.seconds, 1),
        len(history.calls),
        result.hits,
        dict(sorted(history.seen.items())),
        dict(Counter(f"{failed.code} {failed.phase}" for failed in history.failures)),
        _few([str(violation) for violation in result.violations]),
    )


def _few(broken: list[str]) -> list[str]:
    """Return the first ones, and how many more there are: one cause can break hundreds."""
    return broken if len(broken) <= SHOWN else [*broken[:SHOWN], f"… and {len(broken) - SHOWN} more"]


class Tally:
    """The sum of many."""

    def __init__(self) -> None:
        self.rounds: list[Covered] = []
        self.seen: Counter[str] = Counter()
        self.moves: Counter[str] = Counter()

    def add(self, one: Covered) -> None:
        self.rounds.append(one)
        self.seen.update(one.seen)
        self.moves.update(one.moves)

    @property
    def broken(self) -> list[str]:
        return [f"seed {one.seed} ({one.setting}): {what}" for one in self.rounds for what in one.broken]

    @property
    def struck(self) -> int:
        return sum(number for what, number in self.seen.items() if what.startswith("fault "))

    @property
    def missing(self) -> list[str]:
        """Kinds that never struck."""
        return [kind for kind in kinds() if not self.seen[f"fault {kind}"]]

    def table(self) -> str:
        """Return it for people."""
        lines = [f"{'fault':<20}{'struck':>8}{'hit live work':>15}"]
        lines += [f"{kind:<20}{self.seen[f'fault {kind}']:>8}{self.seen[f'hit {kind}']:>15}" for kind in kinds()]
        lines += [f"{kind:<20}{self.seen[kind]:>8}" for kind in ("client-leaves", "client-slow", "client-stalls")]
        lines += ["", f"{'moved because':<45}{'times':>6}"]
        lines += [f"{why:<45}{number:>6}" for why, number in sorted(self.moves.items())]
        lines += ["", f"{'ended':<45}{'times':>6}"]
        ends = {k: n for k, n in sorted(self.seen.items()) if k.startswith(("ended ", "told ", "unprovoked "))}
        lines += [f"{what:<45}{number:>6}" for what, number in ends.items()]
        requests, seconds = sum(one.requests for one in self.rounds), sum(one.seconds for one in self.rounds)
        lines += ["", f"{len(self.rounds)} rounds, {requests} requests, {self.struck} faults in {seconds:.0f} s"]
        lines += [f"violations: {len(self.broken)}", *self.broken]
        return "\n".join(lines)
