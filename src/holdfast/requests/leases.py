"""Leases: the only way to count something that must be given back.

One `Lease` owns one counted unit and gives it back exactly once, whichever way its holder ends, so that
the sum of leases equals the gauges at every moment and is zero at rest (promise P4).

Must never decide whether something may be counted; that is admission's business.
"""

from __future__ import annotations

from typing import Literal, get_args

LeaseKind = Literal["request", "stream", "attempt", "waiting", "queued", "trial", "probation", "prefill", "held"]
"""``prefill``: prefill legs of a frontend; ``held``: hand-offs that a prefill worker keeps blocks for."""
KINDS: tuple[LeaseKind, ...] = get_args(LeaseKind)


class Lease:
    """One unit of one kind, optionally on behalf of an owner (a worker's instance id)."""

    __slots__ = ("_book", "kind", "owner")

    def __init__(self, book: LeaseBook, kind: LeaseKind, owner: str):
        self._book: LeaseBook | None = book
        self.kind: LeaseKind = kind
        self.owner = owner

    def release(self) -> None:
        """Give the unit back; only the first call counts."""
        book = self._book
        if book is None:
            return
        self._book = None
        book._returned(self)  # noqa: SLF001 - the book and its leases are one mechanism


class LeaseBook:
    """All leases of one process, summed by kind and by (kind, owner)."""

    def __init__(self) -> None:
        self._sums: dict[LeaseKind, int] = dict.fromkeys(KINDS, 0)
        self._owners: dict[tuple[LeaseKind, str], int] = {}

    def take(self, kind: LeaseKind, owner: str = "") -> Lease:
        """Count one unit and return what gives it back."""
        self._sums[kind] += 1
        if owner:
            key = (kind, owner)
            self._owners[key] = self._owners.get(key, 0) + 1
        return Lease(self, kind, owner)

    def held(self, kind: LeaseKind, owner: str = "") -> int:
        """Return how many units of this kind are out (for one owner, when given)."""
        return self._owners.get((kind, owner), 0) if owner else self._sums[kind]

    def sums(self) -> dict[str, int]:
        """Return all sums by kind."""
        return {str(kind): held for kind, held in self._sums.items()}

    def _returned(self, lease: Lease) -> None:
        self._sums[lease.kind] -= 1
        if lease.owner:
            key = (lease.kind, lease.owner)
            left = self._owners[key] - 1
            if left:
                self._owners[key] = left
            else:
                del self._owners[key]
