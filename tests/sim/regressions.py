"""What universes have found: the seed that showed it, what was wrong, since when, which oracle saw it.

``python -m tests.sim.regressions`` writes the list into ``docs/track-record.md``. The seeds are replayed by
`test_regressions`; what makes each defect come back is there too, as a plan that does not depend on seeds.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field

from holdfast.sim.plan import Shape
from tests.proof.record import TRACK_RECORD

HEADING = "## Found in simulation"


@dataclass(frozen=True)
class Found:
    """One defect."""

    seed: int
    promise: str
    """Whose oracle saw it."""
    what: str
    since: str
    """For how long it had been there."""
    fixed: str
    """Commit; empty: it is a limit that is known and kept."""
    shape: Shape = field(default_factory=Shape)


FOUND: tuple[Found, ...] = (
    Found(
        91,
        "P13",
        "A worker stayed ejected until its process restarted: its old connection broke while a new one was being made, "
        "and the answer on the new one found a worker that was not being tried",
        "3 hours: since the pool was written (ea4e43a)",
        "504e681",
    ),
    Found(
        16,
        "P9",
        "A late word that a worker's old start had been withdrawn retired the connection to its new start, for 15 to "
        "200 ms",
        "3 hours: since the pool was written (ea4e43a)",
        "ee2b61f",
        Shape(profile="rollout"),
    ),
    Found(
        577,
        "P3",
        "A worker that repeats an output index on the step that ends a stream loses the end-of-sequence token "
        "unnoticed: the text is exact, `completion_tokens` one short",
        "since the wire protocol was written",
        "ff43574",
    ),
    Found(
        1325,
        "kept",
        "A request with log probabilities failed as an internal error when its stream moved from a worker of protocol "
        "version 1, which has none, to one of version 2 while its client took nothing: the batch had more tokens than "
        "log probabilities",
        "6 hours: since version 2 was written",
        "42d9c85",
    ),
    Found(
        177,
        "P6",
        "With prefill and decode legs that begin together (rendezvous), a decode worker that was full was asked again "
        "at once, two thousand times in a second, and that the prefill worker had called the request a mistake was not "
        "heard",
        "2 hours: since prefill legs were written",
        "0edbc0e, and for good by the decode worker's word coming first",
    ),
    Found(
        3751,
        "kept",
        "Under overload a prefill worker took the prompt of a request that every decode worker refused (rendezvous): "
        "it could not be turned away any more, and failed after 222 attempts and 20 s instead of at once",
        "2 hours: since prefill legs were written",
        "58e79fc",
    ),
    Found(
        15895,
        "P5",
        "A frontend that starts while the only worker with its model's files dies lets requests wait for the files; "
        "neither did their own bound end that wait nor did it count afterwards: a request with 318 ms was served after "
        "a second",
        "12 hours: since the frontend's registry was written (c3f32a6)",
        "0ba3504",
    ),
)


def page() -> str:
    """Return the part of the track record."""
    rows = [
        f"| {f.seed}{', ' + f.shape.profile if f.shape.profile else ''} | {f.promise} | {f.what} | {f.since} | "
        f"{f.fixed or 'a known limit'} |"
        for f in FOUND
    ]
    head = (
        f"{HEADING}\n\nDefects that [universes](explanation/simulation.md) have shown, before anybody had met them. "
        "Seeds are of the tree at that time; `tests/sim/test_regressions.py` keeps what makes each come back.\n\n"
        "| seed | oracle | what was wrong | it had been there | fixed by |\n|---|---|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


def written(text: str) -> str:
    """Return a track record with the present list."""
    part = re.compile(rf"^{HEADING}\n.*?(?=^## |^<!-- |\Z)", re.MULTILINE | re.DOTALL)
    if not part.search(text):
        return f"{text.rstrip()}\n\n{page()}"
    return part.sub(lambda found: page() + ("\n" if text[found.end() :] else ""), text)


if __name__ == "__main__":
    TRACK_RECORD.write_text(written(TRACK_RECORD.read_text()))
    print(f"written: {len(FOUND)} defects", file=sys.stderr)
