"""Whose turn it is among classes that wait: deficit round robin, by the tokens that are to be computed.

In each round every class that waits earns its quantum; it is served when it has earned what its first request costs,
and pays that. So classes get room in proportion to their quanta, whatever their requests are like, and each gets its
turn after as many rounds as its first request costs quanta: nobody starves. Rounds are counted, not walked through.

Must never know a request, or who may be served now: of those that may, the first in `order` should be.
"""

from __future__ import annotations

from collections.abc import Mapping


class Rounds:
    """Of one model.

    Args:
        quanta: tokens per round by class, in the order of the ring.
    """

    __slots__ = ("_cursor", "_deficits", "_places", "_quanta")

    def __init__(self, quanta: Mapping[str, int]):
        self._quanta = dict(quanta)
        self._places = {name: place for place, name in enumerate(quanta)}
        self._deficits = dict.fromkeys(quanta, 0)
        """Earned, and not spent yet."""
        self._cursor = 0
        """Place in the ring at which a round begins."""

    def order(self, heads: Mapping[str, int]) -> list[str]:
        """Return the classes that wait, the next one first.

        Args:
            heads: what the first request of each costs, in tokens.
        """
        return sorted(heads, key=lambda name: (self._rounds(name, heads[name]), self._behind(name)))

    def served(self, name: str, heads: Mapping[str, int]) -> None:
        """A class was served: the rounds that this took have passed for all that wait.

        Args:
            name: the class.
            heads: what the first request of each class cost that waited, the served one included.
        """
        rounds, place = self._rounds(name, heads[name]), self._behind(name)
        for other, quantum in self._quanta.items():
            if other not in heads:
                self._deficits[other] = 0
                continue
            earned = quantum * (rounds if self._behind(other) <= place else max(0, rounds - 1))
            most = heads[other] + quantum  # who may not be served for another reason saves no more than this
            self._deficits[other] = min(self._deficits[other] + earned, max(most, self._deficits[other]))
        self._deficits[name] = max(0, self._deficits[name] - heads[name])
        self._cursor = (self._places[name] + 1) % len(self._places)

    def _rounds(self, name: str, cost: int) -> int:
        return max(0, -((self._deficits[name] - cost) // self._quanta[name]))

    def _behind(self, name: str) -> int:
        """Return how far behind the cursor a class stands."""
        return (self._places[name] - self._cursor) % len(self._places)
