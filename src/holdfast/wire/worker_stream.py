"""One stream on the worker's end of a connection, with what waits for its caller's credit.

States::

    opened     accept → accepted · refuse → closed
    accepted   items, data · end → ending while something waits for credit, else closed
    ending     the end follows the last waiting token → closed
    closed     whatever the endpoint still says goes nowhere

A stop from the caller in any state before ``closed`` drops what waits and mutes the stream: only its end is
still owed. Must never do I/O, and never decide when to send.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from typing import Literal

from holdfast.base.limits import INITIAL_CREDIT_TOKENS
from holdfast.wire.columns import Entry, Logprobs
from holdfast.wire.frames import Data, End, Open

WorkerStreamState = Literal["opened", "accepted", "ending", "closed"]

LOGPROBS_WEIGHT = 32
"""A waiting token with log probabilities counts as this many without."""

_RUN_TOKENS = 4_096
_MOST_CREDIT = 2**40


def weight_of(entry: Entry) -> int:
    """Return what an entry counts against the limits of unsent tokens."""
    return len(entry[2]) * (1 if entry[3] is None else LOGPROBS_WEIGHT)


class Run:
    """Waiting tokens that follow each other."""

    __slots__ = ("index", "logprobs", "tokens")

    def __init__(self, index: int, tokens: Sequence[int], logprobs: Logprobs | None):
        self.index = index
        self.tokens = array("I", tokens)
        self.logprobs = logprobs

    def joins(self, index: int, logprobs: Logprobs | None) -> bool:
        """Whether tokens from ``index`` on may be appended."""
        size = len(self.tokens)
        return logprobs is None and self.logprobs is None and self.index + size == index and size < _RUN_TOKENS

    def split(self, count: int) -> tuple[int, Sequence[int], Logprobs | None]:
        """Take the first ``count`` tokens away."""
        taken = (self.index, self.tokens[:count], None if self.logprobs is None else self.logprobs[:count])
        self.index += count
        self.tokens = self.tokens[count:]
        if self.logprobs is not None:
            self.logprobs = self.logprobs[count:]
        return taken

    @property
    def weight(self) -> int:
        """What it counts against the limits of unsent tokens."""
        return len(self.tokens) * (1 if self.logprobs is None else LOGPROBS_WEIGHT)


class WorkerStream:
    """One call as the connection keeps it; the endpoint's side of it is `runtime.call.Call`."""

    __slots__ = (
        "credit",
        "flowing",
        "held_bytes",
        "held_weight",
        "id",
        "messages",
        "opened_by",
        "pending_end",
        "state",
        "stop_reason",
        "waiting",
    )

    def __init__(self, frame: Open):
        self.id = frame.stream
        self.opened_by = frame
        self.state: WorkerStreamState = "opened"
        self.credit = frame.credit if frame.credit > 0 else INITIAL_CREDIT_TOKENS
        self.flowing = False
        """Accepted, nothing waits, not stopped: tokens within the credit may go straight out."""
        self.messages = 0
        self.waiting: deque[Run | Data] = deque()
        self.held_weight = 0
        self.held_bytes = 0
        self.pending_end: End | None = None
        self.stop_reason: str | None = None

    @property
    def over(self) -> bool:
        """Nothing can be sent any more."""
        return self.state == "closed"

    def hold_tokens(self, index: int, tokens: Sequence[int], logprobs: Logprobs | None) -> int:
        """Keep tokens until credit comes; returns the added weight. Raises OverflowError for ids outside u32."""
        self.flowing = False
        last = self.waiting[-1] if self.waiting else None
        if isinstance(last, Run) and last.joins(index, logprobs):
            last.tokens.extend(tokens)
            weight = len(tokens)
        else:
            run = Run(index, tokens, logprobs)
            self.waiting.append(run)
            weight = run.weight
        self.held_weight += weight
        return weight

    def hold_data(self, frame: Data) -> int:
        """Keep a message until credit comes; returns the added bytes."""
        self.flowing = False
        self.waiting.append(frame)
        self.held_bytes += len(frame.payload)
        return len(frame.payload)

    def grant(self, tokens: int) -> None:
        """The caller allows more."""
        self.credit = min(self.credit + tokens, _MOST_CREDIT)

    def release(self, budget: int) -> Entry | Data | None:
        """Take the next thing that credit (and ``budget``, in tokens) lets go; None when nothing may."""
        allowed = min(self.credit, budget)
        if not self.waiting or allowed <= 0:
            return None
        head = self.waiting[0]
        if isinstance(head, Data):
            self.waiting.popleft()
            self.held_bytes -= len(head.payload)
            self.credit -= 1
            return head
        index, tokens, logprobs = head.split(allowed)
        if not head.tokens:
            self.waiting.popleft()
        entry = (self.id, index, tokens, logprobs)
        self.held_weight -= weight_of(entry)
        self.credit -= len(tokens)
        return entry

    def flow_changed(self) -> None:
        """Called when nothing waits any more, or when the stream is stopped or over; for subclasses."""

    def drop_waiting(self) -> None:
        """Forget what waits."""
        self.flowing = False
        self.waiting.clear()
        self.held_weight = 0
        self.held_bytes = 0
