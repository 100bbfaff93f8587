"""What happened in one run: the same record for a simulated universe and for real processes.

Clients, workers, frontends and the nemesis write here; oracles read. Times are seconds on one clock (the universe's,
or the harness's own). What a real process can't tell is simply missing: an oracle then says nothing about it.

Must never judge.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import msgspec

from holdfast.engines.contract import GenerateRequest
from holdfast.wire.frames import VERSION

Surface = Literal["chat", "completions"]
CallEnding = Literal["", "complete", "broken", "left", "unreachable"]
"""How a client's exchange ended: not yet; the response was complete; the connection broke; the client left; nobody
listened."""
Phase = Literal["before accept", "before first token", "mid-stream", "at the end"]
"""How far an attempt was when it failed."""
SequenceEnding = Literal["", "finished", "cancelled", "died", "refused"]


class Call(msgspec.Struct):
    """One request, as its client saw it."""

    name: str
    """The client's ``x-request-id``, unique in the run."""
    frontend: str
    surface: Surface
    body: dict[str, Any]
    valid: bool = True
    """Whether the request makes sense; otherwise it has to be refused."""
    probe: bool = False
    """Sent after all faults, to see whether everything serves again."""
    headers: dict[str, str] = {}
    sent: float = 0.0
    """When its first byte reached the frontend."""
    status: int = 0
    answered: float = 0.0
    """When the head of the answer came; 0: it did not."""
    pieces: list[tuple[float, bytes]] = []
    """When which bytes of the body came."""
    ended: float = 0.0
    """0: not yet."""
    ending: CallEnding = ""
    slow: bool = False
    """The client reads slowly, or not at all for a while."""

    @property
    def data(self) -> bytes:
        """The whole body as far as it came."""
        return b"".join([piece for _, piece in self.pieces])


class Sequence(msgspec.Struct):
    """One attempt at one choice, as an engine saw it."""

    worker: str
    incarnation: int
    label: str
    """The client's name of the request."""
    request: GenerateRequest
    received: float
    ended: float = 0.0
    ending: SequenceEnding = ""
    tokens: int = 0
    """Generated here."""
    error: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the engine took it."""
        return self.ending != "refused"


class Failed(msgspec.Struct, frozen=True):
    """One attempt that failed, as its frontend saw it."""

    at: float
    frontend: str
    label: str
    choice: int
    attempt: int
    worker: str
    code: str
    fault: str
    phase: Phase
    orderly: bool
    """Nobody's fault: the worker was draining or full, or the attempt was hedged."""


class Ended(msgspec.Struct, frozen=True):
    """One choice's terminal event inside its frontend."""

    at: float
    frontend: str
    label: str
    choice: int
    state: str
    finish: str
    code: str
    fault: str
    knob: str
    tokens: int
    attempts: int


class Verdict(msgspec.Struct, frozen=True):
    """A frontend changed its mind about a worker."""

    at: float
    frontend: str
    worker: str
    state: str
    cause: str


class Life(msgspec.Struct):
    """One process, from start to end."""

    name: str
    role: Literal["frontend", "worker"]
    incarnation: int
    started: float
    ready: float = 0.0
    draining: float = 0.0
    """When it said that it accepts nothing any more; 0: never."""
    ended: float = 0.0
    how: Literal["", "exited", "crashed", "failed"] = ""
    code: int = 0
    version: int = VERSION
    """Of the wire protocol: the newest that it speaks."""


class Fired(msgspec.Struct, frozen=True):
    """A fault that was injected."""

    at: float
    until: float
    """When it was over; the same as ``at`` for those without duration."""
    kind: str
    target: str
    live: int
    """Streams that it could hurt."""
    peer: str = ""


class Violation(msgspec.Struct, frozen=True):
    """A promise that was broken."""

    promise: str
    what: str
    evidence: dict[str, Any] = {}

    def __str__(self) -> str:
        facts = ", ".join(f"{name}={value}" for name, value in self.evidence.items())
        return f"{self.promise}: {self.what}" + (f" ({facts})" if facts else "")


class Residue(msgspec.Struct, frozen=True):
    """What one living process still held when everything was over."""

    name: str
    leases: dict[str, int]
    gauges: dict[str, float]
    """What its metrics say is going on."""
    in_hand: int
    """Requests in hand at a frontend; streams in flight at a worker."""
    engine: int = 0
    """Sequences in a worker's engine."""
    streams: int = 0
    """Open streams on connections."""


class View(msgspec.Struct, frozen=True):
    """What one frontend thought of one worker when everything was over, and what was true."""

    frontend: str
    worker: str
    alive: bool
    """The worker runs."""
    known: bool
    """The frontend knows it."""
    eligible: bool
    """The frontend would send it new work."""
    current: bool
    """The frontend has the right start of it."""
    served: bool
    """It got one of this frontend's probes."""
    state: str = ""
    cache: str = ""
    """What the frontend gets wrong about the blocks in its KV cache; empty: nothing, or nobody tells."""


class Routable(msgspec.Struct, frozen=True):
    """How many workers a frontend could use at one moment of a rolling restart."""

    at: float
    frontend: str
    ready: float
    """When this frontend came into service."""
    usable: int


class History(msgspec.Struct):
    """See the module."""

    calls: list[Call] = []
    sequences: list[Sequence] = []
    failures: list[Failed] = []
    legs: list[Failed] = []
    """Prefill legs that failed; ``attempt`` is the one that they were for."""
    endings: list[Ended] = []
    verdicts: list[Verdict] = []
    lives: list[Life] = []
    fired: list[Fired] = []
    violations: list[Violation] = []
    """Seen while it happened."""
    residues: list[Residue] = []
    views: list[View] = []
    routable: list[Routable] = []
    rollouts: list[tuple[float, float]] = []
    """When rolling restarts began and ended."""
    began: float = 0.0
    healed: float = 0.0
    """When the last fault was over."""
    answered: float = 0.0
    """When the last request had ended; 0: some never did."""
    converged: float = 0.0
    """When every frontend had every worker in use again; 0: never."""
    finished: float = 0.0
    seen: Counter[str] = msgspec.field(default_factory=Counter)
    """How often something that must happen now and then did."""

    def violate(self, promise: str, what: str, **evidence: Any) -> None:
        """Note a broken promise."""
        self.violations.append(Violation(promise, what, evidence))

    def see(self, what: str, times: int = 1) -> None:
        """Count something that a campaign must have met."""
        self.seen[what] += times
