"""The frames of the wire protocol, version 2.

A frame is a little-endian u32 length and that many bytes of msgpack: an array whose first element
is the frame's tag. Receivers ignore trailing elements that they do not know, so a later version may append
fields with defaults; nothing is ever removed or reordered. Deadlines travel as remaining milliseconds.

Version 1 lacks `Pong.state`, `Items.logprobs`, `Data.more`, `End.tokens` and `Welcome.version_max`; both versions are
spoken.

Caller → worker: hello, auth, part, open, stop, kill, credit, ping.
Worker → caller: challenge, welcome, accept, refuse, items, data, end, draining, pong.

Must never do I/O or hold state.
"""

from __future__ import annotations

import msgspec

from holdfast.base.errors import ErrorInfo

VERSION = 2
OLDEST_VERSION = 1

LOGPROBS_SINCE = 2
"""The first version whose `Items` carry log probabilities."""

FRAGMENTS_SINCE = 2
"""The first version whose `Data` may be one fragment of a longer message."""


class OpenHeaders(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known about a call besides its payload."""

    request_id: str = ""
    label: str = ""
    """The client's own `x-request-id`, sanitised."""
    attempt: int = 1
    choice: int = 0
    leg: str = "aggregated"
    traceparent: str = ""
    remaining_ms: int = 0
    """Time left for the whole request; 0: no bound."""
    priority: int = 0
    tracestate: str = ""
    """W3C Trace Context: what other systems keep in the trace, passed on as it came; over
    `limits.TRACESTATE_CHARS` it is dropped. Peers that do not know it skip it, as any field of this map."""


class Progress(msgspec.Struct, array_like=True, frozen=True):
    """Progress counters as in `engines.contract.EngineProgress`, plus work in flight."""

    steps: int = 0
    tokens: int = 0
    prefilled: int = 0
    phase: str = "idle"
    silent_step_seconds: float = 0.0
    in_flight: int = 0
    """Sequences the worker has accepted and not ended, over all callers."""
    tokens_after_cancel: int = 0


class Load(msgspec.Struct, array_like=True, frozen=True):
    """Load as in `engines.contract.EngineLoad`."""

    running: int = 0
    waiting: int = 0
    kv_used_blocks: int = 0
    kv_total_blocks: int = 0
    prefill_tokens: int = 0
    ranks: tuple[Load, ...] = ()
    """The same per data-parallel rank, in their order; empty: one rank, or an engine that does not tell them apart."""


class Hello(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """First frame of a connection. ``instance`` empty: any; ``epoch`` 0: any."""

    version_min: int
    version_max: int
    caller: str
    """Random id of the calling process; its two connections carry the same."""
    channel: str
    """``control`` or ``bulk``."""
    instance: str = ""
    epoch: int = 0
    features: tuple[str, ...] = ()
    nonce: bytes = b""
    """16 random bytes when the caller has a secret."""


class Auth(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """Answer to a challenge; the formula of ``mac`` is in `wire.handshake`."""

    mac: bytes


class Part(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """A piece of an upload on the bulk connection; pieces of one upload come in order."""

    upload: int
    total: int
    data: bytes


class Open(msgspec.Struct, tag=4, array_like=True, frozen=True):
    """Start a stream. The payload is inline, or the finished (or still arriving) upload of that number."""

    stream: int
    endpoint: str
    headers: OpenHeaders
    payload: bytes = b""
    upload: int = 0
    credit: int = 0
    """Tokens (or `Data` frames) the worker may send before it needs `Credit`; 0: `limits.INITIAL_CREDIT_TOKENS`."""


class Stop(msgspec.Struct, tag=5, array_like=True, frozen=True):
    """Stop a stream in order: the worker sends no further items and answers with `End`."""

    stream: int
    reason: str = "cancelled"


class Kill(msgspec.Struct, tag=6, array_like=True, frozen=True):
    """Forget a stream at once: nothing more is sent for it."""

    stream: int
    reason: str = "cancelled"


class Credit(msgspec.Struct, tag=7, array_like=True, frozen=True):
    """Allow more tokens on a stream."""

    stream: int
    tokens: int


class Ping(msgspec.Struct, tag=8, array_like=True, frozen=True):
    """Are you there? ``sequence`` rises by one."""

    sequence: int


class Challenge(msgspec.Struct, tag=16, array_like=True, frozen=True):
    """Prove that you know the secret."""

    nonce: bytes


class Welcome(msgspec.Struct, tag=17, array_like=True, frozen=True):
    """The connection is usable; which version, and who is here."""

    version: int
    instance: str
    epoch: int
    features: tuple[str, ...] = ()
    mac: bytes = b""
    """Proof that the worker knows the secret too, when one is in use; the formula is in `wire.handshake`."""
    version_max: int = 0
    """The newest version that the worker speaks; 0: ``version``."""


class Accept(msgspec.Struct, tag=18, array_like=True, frozen=True):
    """The worker owns this stream now."""

    stream: int


class Refuse(msgspec.Struct, tag=19, array_like=True, frozen=True):
    """The worker did not and will not start this stream (or this connection: stream 0)."""

    stream: int
    error: ErrorInfo


class Items(msgspec.Struct, tag=20, array_like=True, frozen=True):
    """The new tokens of one engine step, over all streams of this connection, as columns.

    Entry i belongs to ``streams[i]`` (u32), has its first token at output index ``indices[i]`` (u32) and
    ``counts[i]`` tokens (u32; the column is empty when every count is 1). ``tokens``: u32, concatenated.
    ``logprobs``: (entry number, one [logprob, [[id, logprob], …]] per token) for the entries that have them.
    All u32 little-endian.
    """

    streams: bytes
    indices: bytes
    counts: bytes
    tokens: bytes
    logprobs: tuple[tuple[int, list[tuple[float, list[tuple[int, float]]]]], ...] = ()


class Data(msgspec.Struct, tag=21, array_like=True, frozen=True):
    """One message, or a fragment of one, of a stream that carries messages instead of tokens.

    Costs one credit; receivers give it back for a fragment at once, so that credit counts messages.
    """

    stream: int
    index: int
    """Number of the message, counted from 0; all its fragments carry it."""
    payload: bytes
    more: bool = False
    """Another fragment of the same message follows."""


class End(msgspec.Struct, tag=22, array_like=True, frozen=True):
    """The last frame of an accepted stream. ``finish``: as in `engines.contract.Finish`, or ``done``, ``cancelled``."""

    stream: int
    finish: str
    error: ErrorInfo | None = None
    cached_tokens: int = 0
    tokens: int = 0
    """How many the worker sent on this stream, so that a lost one shows even behind the last index; 0: not said."""


class Draining(msgspec.Struct, tag=23, array_like=True, frozen=True):
    """Accepts nothing from now on; running streams go on for ``remaining_ms``, then end `elsewhere`."""

    reason: str = "shutdown"
    remaining_ms: int = 0


class Pong(msgspec.Struct, tag=24, array_like=True, frozen=True):
    """Answer to the ping of that number. ``last_open``: the newest stream of this caller that the load includes."""

    sequence: int
    progress: Progress
    load: Load
    last_open: int = 0
    state: str = "ready"


CallerFrame = Hello | Auth | Part | Open | Stop | Kill | Credit | Ping
WorkerFrame = Challenge | Welcome | Accept | Refuse | Items | Data | End | Draining | Pong
