"""What real processes told of themselves, put into a history: the harness's side of `child.Journal`.

One socket for all; each process that starts connects. Must never judge.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from holdfast.sim.faults import Moment
from holdfast.sim.history import Ended, Failed, Fired, History, Life, Sequence, Verdict

_ENVELOPE = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])
_KINDS: dict[str, Any] = {
    "hello": tuple[str, int, int],
    "sequence": tuple[int, Sequence],
    "over": tuple[int, float, str, int],
    "label": tuple[str, str],
    "dispatched": str,
    "moment": str,
    "failed": Failed,
    "ended": Ended,
    "verdict": Verdict,
    "see": tuple[str, int],
    "violation": tuple[str, str, dict[str, str]],
    "prompt": str,
    "truth": tuple[int, list[list[int]]],
    "known": dict[str, tuple[str, str, int, list[list[int]]]],
    "ready": float,
    "draining": float,
}
_DECODERS = {kind: msgspec.msgpack.Decoder(type_) for kind, type_ in _KINDS.items()}


class Ledger:
    """See the module.

    Args:
        path: of the socket.
    """

    def __init__(self, path: Path):
        self.path = path
        self.history = History()
        """Of the present round."""
        self.labels: dict[str, str] = {}
        """The client's name of each request, by request id."""
        self.lives: dict[tuple[str, int], Life] = {}
        self.open: dict[tuple[str, int, int], Sequence] = {}
        """Sequences that engines have in hand: name, incarnation, number."""
        self._truths: dict[str, tuple[int, list[list[int]]]] = {}
        """What each worker's engine has in its KV cache: epoch, and block hashes by rank."""
        self._known: dict[str, dict[str, tuple[str, str, int, list[list[int]]]]] = {}
        """What each frontend thinks of it, by instance: state, problem, epoch, and block hashes by rank."""
        self.on_moment: Callable[[str, Moment], None] = lambda _name, _moment: None
        self.on_prompt: Callable[[str, str], None] = lambda _name, _what: None
        self.name_of: Callable[[str], str] = lambda _instance: ""
        self._writers: dict[str, asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_unix_server(self._connected, self.path)

    async def close(self) -> None:
        """Stop listening."""
        assert self._server is not None
        self._server.close()
        for writer in self._writers.values():
            writer.close()

    def tell(self, name: str, **order: float) -> bool:
        """Give the present process of that name an order; returns whether there is one."""
        writer = self._writers.get(name)
        if writer is None or writer.is_closing():
            return False
        data = msgspec.msgpack.encode(order)
        writer.write(len(data).to_bytes(4, "big") + data)
        return True

    def live(self, name: str) -> int:
        """Return how many users' sequences a worker has in hand."""
        return sum(1 for key, s in self.open.items() if key[0] == name and s.request.request_id in self.labels)

    def over(self, name: str, incarnation: int) -> None:
        """A process is over, and what it had in hand with it."""
        for key in [key for key in self.open if key[:2] == (name, incarnation)]:
            del self.open[key]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name, incarnation = "", 0
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(4), "big")
                kind, raw = _ENVELOPE.decode(await reader.readexactly(size))
                what = _DECODERS[kind].decode(raw)
                if kind == "hello":
                    name, incarnation, _ = what
                    self._writers[name] = writer
                else:
                    self._take(name, incarnation, kind, what)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            if self._writers.get(name) is writer:
                del self._writers[name]
            writer.close()

    def _take(self, name: str, incarnation: int, kind: str, what: Any) -> None:
        history = self.history
        if kind == "sequence":
            number, sequence = what
            self.open[name, incarnation, number] = sequence
            history.sequences.append(sequence)
        elif kind == "over":
            number, ended, ending, tokens = what
            sequence = self.open.pop((name, incarnation, number), None)
            if sequence is not None:
                sequence.ended, sequence.ending, sequence.tokens = ended, ending, tokens
        elif kind == "label":
            self.labels[what[0]] = what[1]
        elif kind == "dispatched":
            self.on_moment(self.name_of(what), "dispatch")
        elif kind == "moment":
            self.on_moment(name, what)
        elif kind in ("failed", "ended", "verdict"):
            {"failed": history.failures, "ended": history.endings, "verdict": history.verdicts}[kind].append(what)
        elif kind == "see":
            history.see(*what)
        elif kind == "violation":
            history.violate(what[0], what[1], **what[2])
        elif kind == "truth":
            self._truths[name] = what
        elif kind == "known":
            self._known[name] = what
        elif kind == "prompt":
            self.on_prompt(name, what)
        else:
            life = self.lives[name, incarnation]
            if kind == "ready":
                life.ready = what
            elif not life.draining:
                life.draining = what

    def forget_caches(self) -> None:
        """Forget what was told of caches: it may be old."""
        self._truths.clear()
        self._known.clear()

    def cache_difference(self, frontend: str, worker: str, instance: str) -> str:
        """Return what a frontend gets wrong about a worker's cache, by what both told last; empty: nothing.

        The counterpart of `sim.caches.difference`.
        """
        known, truth = self._known.get(frontend), self._truths.get(worker)
        if known is None or truth is None:
            return "nobody has told yet"
        if instance not in known:
            return "unknown"
        state, problem, epoch, ranks = known[instance]
        if state != "exact":
            return f"{state}: {problem}"
        if epoch != truth[0]:
            return "it speaks of another start of the worker"
        for rank, (held, there) in enumerate(zip(ranks, truth[1], strict=False)):
            if set(held) != set(there):
                wrong, missing = len(set(held) - set(there)), len(set(there) - set(held))
                return f"rank {rank}: {wrong} blocks are not there, {missing} are missing"
        return ""

    def name_sequences(self) -> None:
        """Give the sequences of a round their clients' names, now that everybody has told everything."""
        for sequence in self.history.sequences:
            sequence.label = self.labels.get(sequence.request.request_id, "")

    def fired(self, at: float, until: float, kind: str, target: str, live: int, peer: str = "") -> None:
        """A fault was injected."""
        self.history.see(f"fault {kind}")
        if live:
            self.history.see(f"hit {kind}")
        self.history.fired.append(Fired(at, until, kind, target, live, peer))
