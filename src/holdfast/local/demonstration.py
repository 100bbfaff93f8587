"""The kill-a-worker demonstration: an answer whose worker is killed, the same answer undisturbed, compared.

Drives a `LocalCluster` over HTTP like any client. The worker that serves is the one that the stream itself
names; it gets SIGKILL after a random number of tokens.

Must never print, and never look at anything but what a client gets.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
import ssl
import statistics
from collections.abc import Callable
from typing import Any

import msgspec

from holdfast.base.errors import HoldfastError
from holdfast.local import http
from holdfast.local.cluster import ClusterFailed, LocalCluster

REQUEST_SECONDS = 120.0
RECOVERY_SECONDS = 60.0
_EARLIEST, _LATEST = 0.15, 0.85
"""The kill comes at a random moment between these shares of the answer."""
_TRIES = 3


class Piece(msgspec.Struct, frozen=True):
    """Text of one event, and when it came (the loop's time)."""

    text: str
    at: float


class Transcript(msgspec.Struct):
    """What a client saw of one answer."""

    pieces: list[Piece] = []
    workers: list[str] = []
    """Instances that served it, in order."""
    finish: str = ""
    usage: dict[str, Any] = {}
    extension: dict[str, Any] = {}
    """The field ``holdfast`` of the last event."""

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(piece.text for piece in self.pieces)


class Round(msgspec.Struct, frozen=True):
    """The outcome of one kill. Times in milliseconds."""

    killed: str
    """Slot of the killed worker."""
    killed_pid: int
    after_pieces: int
    """Events with text that had arrived when the worker was killed."""
    gap_ms: float
    """The longest silence from the last text before the kill on."""
    usual_gap_ms: float
    """Median time between two events of the undisturbed answer."""
    pieces: int
    equal: bool
    usage_equal: bool
    sha256: str
    """Of the disturbed answer."""
    expected_sha256: str
    attempts: int
    prompt_tokens: int
    completion_tokens: int


OnPiece = Callable[[str], None]
OnKill = Callable[[str, int], None]


def _ignore(*_: object) -> None:
    """Nobody watches."""


class Question(msgspec.Struct, frozen=True):
    """What is asked. Sampling is seeded, so that equality proves more than greedy decoding would."""

    prompt: str
    max_tokens: int = 160
    temperature: float = 0.8
    seed: int = 7
    model: str = ""

    def body(self) -> dict[str, Any]:
        """Return the body of the chat request."""
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": self.prompt}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


class Demonstration:
    """Asks questions of a cluster, with and without killing who answers.

    The disturbed answer comes first, so that no worker has the undisturbed one in its cache: the gap is what a
    client would really see, the new worker's prefill included.
    """

    def __init__(self, cluster: LocalCluster, rng: random.Random):
        self._cluster = cluster
        self._rng = rng

    async def round(
        self,
        question: Question,
        on_piece: OnPiece = _ignore,
        on_kill: OnKill = _ignore,
        on_answered: Callable[[], None] = _ignore,
    ) -> Round:
        """Ask, kill the worker that answers at a random moment, ask again undisturbed, compare.

        Args:
            question: what to ask both times.
            on_piece: called with each piece of text of the disturbed answer.
            on_kill: called with slot and pid right after the kill.
            on_answered: called when the disturbed answer is complete.

        Raises:
            HoldfastError: a request failed, or every answer was over before the kill.
            TimeoutError: an answer took longer than `REQUEST_SECONDS`.
        """
        share = self._rng.uniform(_EARLIEST, _LATEST)
        length = question.max_tokens
        for _ in range(_TRIES):
            after = max(1, int(length * share))
            seen, kill = await self._disturbed(question, after, on_piece, on_kill)
            if kill is not None:
                on_answered()
                await self._cluster.until_ready(RECOVERY_SECONDS)
                return _compare(await self.undisturbed(question), seen, kill, after)
            length = len(seen.pieces)  # the model ended its answer early, as it will do again
        raise ClusterFailed("Each answer was over before its worker could be killed; ask for more text.")

    async def undisturbed(self, question: Question) -> Transcript:
        """Return the answer of a run that nobody disturbs. Raises as `round`."""
        transcript = Transcript()
        async with asyncio.timeout(REQUEST_SECONDS):
            await self._ask(question, transcript, _ignore)
        return transcript

    async def _disturbed(
        self, question: Question, after: int, on_piece: OnPiece, on_kill: OnKill
    ) -> tuple[Transcript, tuple[str, int] | None]:
        """Return what a client saw, and (slot, pid) of the killed worker; None: the answer was too short."""
        seen = Transcript()
        killed: list[tuple[str, int]] = []

        def arrived(piece: Piece) -> None:
            on_piece(piece.text)
            if not killed and len(seen.pieces) >= after:
                slot = self._cluster.slot_of(seen.workers[-1]) if seen.workers else None
                if slot is None:
                    raise ClusterFailed("The stream does not say which worker serves it.")
                killed.append((slot, self._cluster.kill(slot)))
                on_kill(*killed[0])

        async with asyncio.timeout(REQUEST_SECONDS):
            await self._ask(question, seen, arrived)
        return seen, killed[0] if killed else None

    async def _ask(self, question: Question, transcript: Transcript, on_piece: Callable[[Piece], None]) -> None:
        loop = asyncio.get_running_loop()
        url = f"{self._cluster.base_urls[0]}/v1/chat/completions"
        marked = {"x-holdfast-trace": "1"}
        asked = http.exchange("POST", url, question.body(), marked, tls=self._cluster.tls)
        async with asked as (status, head, body):
            if status != 200:
                text = b"".join([part async for part in http.body(head, body)])
                raise ClusterFailed(f"The frontend answered {status}: {text[:300].decode('utf-8', 'replace')}")
            _note_worker(transcript, head.get("x-holdfast-worker", ""))
            async for data in http.events(head, body):
                if data == b"[DONE]":
                    return
                piece = _note(transcript, msgspec.json.decode(data), loop.time())
                if piece is not None:
                    on_piece(piece)
        raise ClusterFailed("The stream ended without its [DONE].")


async def first_model(base_url: str, tls: ssl.SSLContext | None = None) -> str:
    """Return the first model that a frontend lists. Raises HoldfastError."""
    models = (await http.get(f"{base_url}/v1/models", tls=tls)).json()["data"]
    if not models:
        raise ClusterFailed("The frontend lists no model.")
    return str(models[0]["id"])


def _note(transcript: Transcript, event: dict[str, Any], now: float) -> Piece | None:
    """Record one event; return its piece of text, if it has one."""
    if "error" in event:
        raise HoldfastError(f"The stream ended with an error: {event['error'].get('message')}")
    extension = event.get("holdfast") or {}
    _note_worker(transcript, str(extension.get("worker", "")))
    transcript.extension = {**transcript.extension, **extension}
    transcript.usage = event.get("usage") or transcript.usage
    for choice in event.get("choices", []):
        transcript.finish = choice.get("finish_reason") or transcript.finish
        text = choice.get("delta", {}).get("content")
        if text:
            transcript.pieces.append(Piece(text, now))
            return transcript.pieces[-1]
    return None


def _note_worker(transcript: Transcript, worker: str) -> None:
    if worker and worker not in transcript.workers[-1:]:
        transcript.workers.append(worker)


def _compare(expected: Transcript, seen: Transcript, killed: tuple[str, int], after: int) -> Round:
    slot, pid = killed
    silences = _intervals(seen.pieces[after - 1 :])
    usual = _intervals(expected.pieces)
    return Round(
        killed=slot,
        killed_pid=pid,
        after_pieces=after,
        gap_ms=max(silences, default=0.0) * 1e3,
        usual_gap_ms=statistics.median(usual) * 1e3 if usual else 0.0,
        pieces=len(seen.pieces),
        equal=seen.text == expected.text and seen.finish == expected.finish,
        usage_equal=_counts(seen.usage) == _counts(expected.usage),
        sha256=_digest(seen.text),
        expected_sha256=_digest(expected.text),
        attempts=int(seen.extension.get("attempts", 1)),
        prompt_tokens=int(seen.usage.get("prompt_tokens", 0)),
        completion_tokens=int(seen.usage.get("completion_tokens", 0)),
    )


def _counts(usage: dict[str, Any]) -> list[Any]:
    """Return what must not change; how much of a prompt came from a cache may."""
    return [usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")]


def _intervals(pieces: list[Piece]) -> list[float]:
    return [later.at - earlier.at for earlier, later in itertools.pairwise(pieces)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
