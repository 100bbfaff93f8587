"""How much more time than promised a test grants before it calls a promise broken.

The promises about time (`docs/guarantees.md`) are measured by `make bench` and the proofs on a quiet machine. Tests run
beside each other on machines of which nothing is known, so they only tell "soon" from "never": a bound is stretched
by `FACTOR`. Set ``HOLDFAST_TIMING_FACTOR=1`` to hold a quiet machine to the letter.
"""

from __future__ import annotations

import os

FACTOR = float(os.environ.get("HOLDFAST_TIMING_FACTOR", "4"))


def within(seconds: float) -> float:
    """Return a bound on real time, stretched."""
    return seconds * FACTOR
