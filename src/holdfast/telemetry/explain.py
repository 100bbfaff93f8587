"""What became of a request: the facts kept of finished ones, and the story told from them.

While a request runs, its streams note a handful of moments; when it ends those notes move here, packed into one
object. Words, durations and attempts are worked out when somebody asks. Requests that went wrong are kept
apart, so that a thousand good ones do not wash them out.

Must never hold prompt or generated text, nor anything that keeps a stream alive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec

from holdfast.telemetry.series import TICKS_PER_SECOND

KEPT = 1024
"""Finished requests that are remembered."""
KEPT_NOTABLE = 256
"""Of them that failed or moved, remembered beside the others."""
KEPT_CHANGES = 512
"""Changes of workers' states that are remembered."""
BEFORE = 5.0
"""Seconds before a request in which workers' changes belong to its story."""

Weighed = tuple[int, int, float, int, float]
"""Rank, blocks of the prompt that it holds, blocks to compute, blocks in use, cost."""
Considered = tuple[int, tuple[tuple[str, int, int, Weighed | None], ...]]
"""How many workers could have got an attempt, and of some of them (instance, streams of ours, queued there); where
caches were asked also how each of their ranks was weighed, the chosen worker first."""
Timeline = Sequence[tuple[float, str, str]]


class StreamFacts(msgspec.Struct, array_like=True, kw_only=True):
    """One choice. Times in seconds since its birth unless said otherwise."""

    choice: int
    state: str
    finish: str
    error: str
    join: str
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    timeline: Timeline
    considered: Sequence[Any]
    """Of `Considered`, a union of tuples, which a decoder does not tell apart."""
    offset: float
    """Seconds from the request's arrival to the birth of the stream."""
    ticks: tuple[int, int]
    """Of the first and of the last delivery."""
    longest: Sequence[tuple[int, int]]


class RequestFacts(msgspec.Struct, array_like=True, kw_only=True):
    """One request. ``arrived`` in nanoseconds of the process' stopwatch."""

    request_id: str
    label: str
    model: str
    surface: str
    kind: str
    trace_id: str
    arrived: int
    prepared: float
    seconds: float
    code: str
    fault: str
    error: str
    streams: Sequence[StreamFacts]

    @property
    def id(self) -> str:
        """Ours."""
        return self.request_id

    @property
    def attempts(self) -> int:
        """Attempts of all choices."""
        return sum([len(stream.considered) for stream in self.streams])

    @property
    def notable(self) -> bool:
        """Whether somebody may ask for it later: it failed, or it was moved."""
        return bool(self.code) or self.attempts > len(self.streams)


class WorkerChange:
    """One change of a worker's state as this process saw it. ``at`` in nanoseconds of the stopwatch."""

    __slots__ = ("at", "cause", "evidence", "state", "worker")

    def __init__(self, at: int, worker: str, state: str, cause: str, evidence: str):
        self.at, self.worker, self.state, self.cause, self.evidence = at, worker, state, cause, evidence


_pack = msgspec.msgpack.Encoder().encode
"""Facts as one object. Kept as they are, a thousand requests would be forty thousand small objects, each of them out of
the processor's caches when its turn to go comes."""
_unpack = msgspec.msgpack.Decoder(RequestFacts).decode


class Ring:
    """The latest finished requests, and what happened to workers meanwhile."""

    def __init__(self, kept: int = KEPT, notable: int = KEPT_NOTABLE):
        self._latest: deque[bytes] = deque(maxlen=max(0, kept))
        self._notable: deque[bytes] = deque(maxlen=max(0, min(kept, notable)))
        self._changes: deque[WorkerChange] = deque(maxlen=KEPT_CHANGES)

    def add(self, facts: RequestFacts) -> None:
        """Remember a finished request."""
        if not self._latest.maxlen:
            return
        packed = _pack(facts)
        self._latest.append(packed)
        if facts.notable:
            self._notable.append(packed)

    def changed(self, change: WorkerChange) -> None:
        """Remember a worker's change."""
        self._changes.append(change)

    def find(self, name: str) -> RequestFacts | None:
        """Return the latest request with this id, or with this client's label."""
        known = list(self._all())
        return next((f for f in known if f.id == name), None) or next((f for f in known if f.label == name), None)

    def select(
        self, *, slow: float | None = None, failed: bool = False, moved: bool = False, limit: int = 50
    ) -> list[RequestFacts]:
        """Return finished requests, newest first.

        Args:
            slow: only those that took at least so many seconds.
            failed: only those that failed.
            moved: only those with more attempts than choices.
            limit: how many at most.
        """
        found: list[RequestFacts] = []
        for facts in self._all():
            if len(found) >= limit:
                break
            wanted = (slow is None or facts.seconds >= slow) and (not failed or facts.code)
            if wanted and (not moved or facts.attempts > len(facts.streams)):
                found.append(facts)
        return found

    def changes(self, since: int, until: int) -> list[WorkerChange]:
        """Return workers' changes between two moments, in order."""
        return [change for change in self._changes if since <= change.at <= until]

    def _all(self) -> Iterator[RequestFacts]:
        """Yield everything once, newest first."""
        seen = set()
        for packed in reversed(self._latest):
            seen.add(id(packed))
            yield _unpack(packed)
        yield from (_unpack(packed) for packed in reversed(self._notable) if id(packed) not in seen)


def summary(facts: RequestFacts, wall: Callable[[int], str]) -> dict[str, Any]:
    """Return one line of a list of requests; ``wall`` turns the stopwatch into calendar time."""
    return {
        "id": facts.id,
        "label": facts.label,
        "model": facts.model,
        "endpoint": facts.surface,
        "arrived": wall(facts.arrived),
        "seconds": round(facts.seconds, 4),
        "outcome": facts.code or "success",
        "tokens": sum(stream.tokens for stream in facts.streams),
        "attempts": facts.attempts,
    }


def story(facts: RequestFacts, changes: Iterable[WorkerChange], wall: Callable[[int], str]) -> dict[str, Any]:
    """Return everything that is known about a request. Times in seconds since its arrival."""
    return {
        **summary(facts, wall),
        "request_type": facts.kind,
        "trace_id": facts.trace_id,
        "error": {"code": facts.code, "fault": facts.fault, "message": facts.error} if facts.code else None,
        "stages": list(_stages(facts)),
        "choices": [_choice(stream) for stream in facts.streams],
        "workers": [
            {
                "at": round((change.at - facts.arrived) / 1e9, 4),
                "worker": change.worker,
                "state": change.state,
                "cause": change.cause,
                "evidence": change.evidence,
            }
            for change in changes
        ],
    }


_STAGES = (("prefill", "remote prefill"), ("attempt", "dispatch"), ("accepted", "prefill"), ("first token", "stream"))
"""Events of a stream with which stages begin, in their usual order."""


def _stages(facts: RequestFacts) -> Iterator[dict[str, Any]]:
    """Yield the stages of the first choice; together they are the whole time."""
    moments = [("preprocess", 0.0)]
    if facts.streams:
        stream = facts.streams[0]
        moments.append(("route", facts.prepared or stream.offset))
        found = [
            (next((at for at, name, _ in stream.timeline if name == event), None), stage) for event, stage in _STAGES
        ]
        moments += sorted(
            [(stage, stream.offset + at) for at, stage in found if at is not None], key=lambda one: one[1]
        )
        moments.append(("finish", stream.offset + (stream.timeline[-1][0] if stream.timeline else 0.0)))
    for (name, begin), (_, end) in zip(moments, [*moments[1:], ("", facts.seconds)], strict=True):
        yield {"stage": name, "at": round(begin, 4), "seconds": round(max(0.0, end - begin), 4)}


def _choice(stream: StreamFacts) -> dict[str, Any]:
    return {
        "choice": stream.choice,
        "state": stream.state,
        "finish": stream.finish,
        "error": stream.error,
        "join": stream.join,
        "prompt_tokens": stream.prompt_tokens,
        "cached_tokens": stream.cached_tokens,
        "tokens": stream.tokens,
        "attempts": list(_attempts(stream)),
        "timeline": [
            {"at": round(stream.offset + at, 4), "event": event, "detail": detail}
            for at, event, detail in stream.timeline
        ],
        "rhythm": _rhythm(stream),
    }


def _attempts(stream: StreamFacts) -> Iterator[dict[str, Any]]:
    """Yield one entry per attempt, from the notes between it and the next one."""
    starts = [i for i, (_, event, _) in enumerate(stream.timeline) if event == "attempt"]
    ends = [*starts[1:], len(stream.timeline)][: len(starts)]  # none while the first attempt is still to come
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        at, _, worker = stream.timeline[start]
        notes = {event: (when, detail) for when, event, detail in reversed(stream.timeline[start + 1 : end])}
        total, shown = stream.considered[number] if number < len(stream.considered) else (0, ())
        entry = {
            "attempt": number + 1,
            "worker": worker,
            "at": round(stream.offset + at, 4),
            "candidates": total,
            "considered": [_considered(one, worker) for one in shown],
        }
        for event, name in (("accepted", "accepted_after"), ("first token", "first_token_after")):
            if event in notes:
                entry[name] = round(notes[event][0] - at, 4)
        if "failed" in notes:
            entry["failed_after"], entry["failure"] = round(notes["failed"][0] - at, 4), notes["failed"][1]
        yield entry


def _considered(one: Sequence[Any], chosen: str) -> dict[str, Any]:
    name, ours, queued, weighed = one
    entry = {"worker": name, "in_flight": ours, "queued": queued, "score": ours + queued, "chosen": name == chosen}
    if weighed is not None:
        rank, overlap, prefill, decode, cost = weighed
        entry |= {"rank": rank, "overlap_blocks": overlap, "prefill_blocks": round(prefill, 2)}
        entry |= {"decode_blocks": decode, "score": round(cost, 2)}
    return entry


def _rhythm(stream: StreamFacts) -> dict[str, Any] | None:
    """Return when tokens came; None before the first."""
    first = next((at for at, event, _ in stream.timeline if event == "first token"), None)
    if first is None:
        return None
    first_tick, last_tick = stream.ticks
    seconds = (last_tick - first_tick) / TICKS_PER_SECOND
    more = stream.tokens - 1
    return {
        "first_token_at": round(stream.offset + first, 4),
        "last_token_at": round(stream.offset + first + seconds, 4),
        "tokens_per_second": round(more / seconds, 2) if seconds and more > 0 else None,
        "mean_gap_seconds": round(seconds / more, 5) if more > 0 else None,
        "longest_gaps": [
            {"seconds": round(gap / TICKS_PER_SECOND, 4), "before_token": index} for gap, index in stream.longest
        ],
    }
