"""The states of a stream's life, as a table.

Must never hold anything but the table and its check; who moves a stream, and why, stands in `generation`.
"""

from __future__ import annotations

from typing import Literal

State = Literal[
    "received", "placing", "prefilling", "dispatched", "accepted", "streaming", "migrating", "done", "rejected",
    "cancelled", "failed", "expired",
]  # fmt: skip

TERMINAL: frozenset[State] = frozenset({"done", "rejected", "cancelled", "failed", "expired"})


def _states(*states: State) -> frozenset[State]:
    return frozenset(states)


_ANY_END: frozenset[State] = frozenset({"rejected", "cancelled", "failed", "expired"})
_LATE_END: frozenset[State] = frozenset({"done", "cancelled", "failed", "expired"})

NEXT: dict[State, frozenset[State]] = {
    "received": _states("placing") | _ANY_END,
    "placing": _states("prefilling", "dispatched") | _ANY_END,
    "prefilling": _states("dispatched", "rejected") | _LATE_END,
    "dispatched": _states("accepted", "migrating", "rejected") | _LATE_END,
    "accepted": _states("streaming", "migrating") | _LATE_END,
    "streaming": _states("migrating") | _LATE_END,
    "migrating": _states("prefilling", "dispatched", "rejected") | _LATE_END,
    "done": frozenset(),
    "rejected": frozenset(),
    "cancelled": frozenset(),
    "failed": frozenset(),
    "expired": frozenset(),
}
"""``placing`` is the first search for a worker, ``migrating`` every later one. ``prefilling``: a worker is found, and
another one computes the prompt for it. ``rejected`` is an answer to a stream that no worker ever accepted (promise
P6). A stream can be done while it is moved: a blocked client that
reads on may find its stop string in tokens of the attempt before."""


def check(current: State, following: State) -> None:
    """Raise AssertionError when the table has no such step: a fault in Holdfast, never in its input."""
    if following not in NEXT[current]:
        raise AssertionError(f"a stream went from {current} to {following}, which the table of states does not have")


def diagram() -> str:
    """Return the table as a Mermaid state diagram, for the documentation."""
    lines = ["stateDiagram-v2", "    [*] --> received"]
    lines += [f"    {a} --> {b}" for a, following in NEXT.items() for b in sorted(following)]
    lines += [f"    {end} --> [*]" for end in sorted(TERMINAL)]
    return "\n".join(lines)
