"""The compiled prefix index and hashing, where they could be built; `UNAVAILABLE` says why not.

The work is done in ``native/``; this gives it the types of `holdfast.kv.index`. Must never fall back by itself: that is
`holdfast.kv.choice`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

from holdfast.kv.index import Buffer, Counts, Overlap, Snapshot
from holdfast.kv.tiers import Tier

VERSION = 2
"""Of the compiled module's interface; an older one that was left in a checkout is not used."""

UNAVAILABLE: str = ""
"""Why there is no kernel, for people; empty when there is one."""

native: ModuleType | None
if TYPE_CHECKING:
    from holdfast.kv import _kernel

    Base = _kernel.Index
else:
    try:
        from holdfast.kv import _kernel

        native, Base = _kernel, _kernel.Index
        if _kernel.VERSION != VERSION:
            UNAVAILABLE = f"the kernel was compiled for interface {_kernel.VERSION}, this is {VERSION}: install again"
    except ImportError as error:
        built = find_spec("holdfast.kv._kernel") is not None
        UNAVAILABLE = f"it cannot be loaded: {error}" if built else "there was no C compiler when it was installed"
    if UNAVAILABLE:
        native, Base = None, object


class KernelIndex(Base):
    """`holdfast.kv.index.PrefixIndex`, compiled. Use only where `UNAVAILABLE` is empty."""

    __slots__ = ()

    def __new__(cls, *, limit: int = 0) -> KernelIndex:
        """Return an empty index; ``limit``: most distinct blocks (at least 2), 0 for no limit."""
        if limit < 0 or limit == 1:
            raise ValueError(f"limit is {limit}; it must be 0 (none) or at least 2")
        return super().__new__(cls, limit)

    def lookup(self, hashes: Buffer, /, *, anywhere: bool = False) -> Overlap:
        """See `PrefixIndex.lookup`."""
        return Overlap(array("I", self.find_anywhere(hashes) if anywhere else self.find_run(hashes)))

    def snapshot(self, slot: int, /) -> Snapshot:
        """See `PrefixIndex.snapshot`."""
        return (
            array("Q", self.dump(slot, Tier.DEVICE)),
            array("Q", self.dump(slot, Tier.HOST)),
            array("Q", self.dump(slot, Tier.DISK)),
        )

    def slices(self, slot: int, tier: int, budget: int, /) -> Iterator[array[int]]:
        """See `PrefixIndex.slices`."""
        at = 0
        while at >= 0:
            found, at = self.scan(slot, tier, at, budget)
            yield array("Q", found)

    def load(self, slot: int, snapshot: Snapshot, /) -> None:
        """See `PrefixIndex.load`."""
        self.clear(slot)
        for tier, hashes in zip(Tier, snapshot, strict=True):
            self.apply_stored(slot, tier, hashes)

    def remove_worker(self, slot: int, /) -> None:
        """See `PrefixIndex.remove_worker`."""
        self.clear(slot)

    def counts(self, slot: int, /) -> Counts:
        """See `PrefixIndex.counts`."""
        return Counts(*self.tally(slot))

    def sweep(self, budget: int | None = None, /) -> bool:
        """See `PrefixIndex.sweep`."""
        return super().sweep(budget)
