"""What one planted bug is. The catalogue is in the modules beside this one, by what they break."""

from __future__ import annotations

from typing import Literal

import msgspec

from holdfast.sim.plan import Shape
from tests.sim.mutations.planting import Edit

WITHIN = 60
"""Universes in which a planted bug has to be noticed, unless it says otherwise."""
MOST = 200
"""Universes after which nobody looks any further."""

Oracle = Literal[
    "P1", "P2", "P3", "P4", "P5", "P6", "P7", "P8", "P9", "P10", "P11", "P12", "P13", "kept", "cause", "noticed",
    "liveness", "crash", "Escape",
]  # fmt: skip
"""Who may notice a bug; `Escape` is the guard around a universe."""


class Bug(msgspec.Struct, frozen=True, kw_only=True):
    """One bug that somebody could write, or has written."""

    name: str
    what: str
    """What is wrong, in a sentence."""
    origin: str = ""
    """The public issue that it was taken from, if there is one."""
    edits: tuple[Edit, ...]
    caught_by: tuple[Oracle, ...]
    """Oracles of which one has to notice it; the first is the promise that it breaks."""
    within: int = WITHIN
    """Universes, counted from seed 0, in which it must be noticed."""
    shape: Shape = Shape()
