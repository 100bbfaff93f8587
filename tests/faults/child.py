"""A real frontend or worker that also tells the harness what it does: ``python -m tests.faults.child worker …``.

The process runs production's own command line. Put in beside it, at the places where the simulation listens too
(`sim.watching`, `sim.engine`): the same observers, which post to the harness's socket what they would write into a
history. What was posted before a SIGKILL is not lost. Must never change what is done, except where an order says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from typing import Any

import msgspec

from tests.faults.bugs import BUGS

SOCKET, NAME, INCARNATION = "FAULTS_SOCKET", "FAULTS_NAME", "FAULTS_INCARNATION"
OLD, BUG = "FAULTS_OLD", "FAULTS_BUG"
_encode = msgspec.msgpack.Encoder().encode


class Journal:
    """The line to the harness."""

    def __init__(self) -> None:
        self.name, self.incarnation = os.environ[NAME], int(os.environ[INCARNATION])
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.connect(os.environ[SOCKET])
        self._decoder = msgspec.msgpack.Decoder(dict[str, float])
        self._rest = b""
        self.post("hello", (self.name, self.incarnation, os.getpid()))

    def post(self, kind: str, what: Any) -> None:
        """Tell the harness; when it is gone, nobody listens."""
        data = _encode((kind, what))
        with contextlib.suppress(OSError):
            self._sock.sendall(len(data).to_bytes(4, "big") + data)

    def obey(self, act: Any) -> None:
        """Pass orders to ``act``, from the running loop on."""
        asyncio.get_running_loop().add_reader(self._sock.fileno(), self._read, act)

    def _read(self, act: Any) -> None:
        data = self._sock.recv(65536)
        if not data:
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            return
        self._rest += data
        while len(self._rest) >= 4 and len(self._rest) >= 4 + (size := int.from_bytes(self._rest[:4], "big")):
            order, self._rest = self._rest[4 : 4 + size], self._rest[4 + size :]
            act(self._decoder.decode(order))


class Posting(list[Any]):
    """A list of a history whose entries are posted."""

    def __init__(self, journal: Journal, kind: str):
        super().__init__()
        self._journal, self._kind = journal, kind

    def append(self, item: Any) -> None:
        self._journal.post(self._kind, item)


class PostedHistory:
    """`sim.history.History`, as far as one process writes it."""

    def __init__(self, journal: Journal):
        self._journal = journal
        self.failures, self.endings = Posting(journal, "failed"), Posting(journal, "ended")
        self.verdicts = Posting(journal, "verdict")
        self.sequences: list[Any] = []

    def see(self, what: str, times: int = 1) -> None:
        self._journal.post("see", (what, times))

    def violate(self, promise: str, what: str, **evidence: Any) -> None:
        self._journal.post("violation", (promise, what, {k: str(v) for k, v in evidence.items()}))


class _Labels(dict[str, str]):
    """The client's names of requests; posted, and known to nobody here."""

    def __init__(self, journal: Journal):
        super().__init__()
        self._journal = journal

    def __setitem__(self, request_id: str, label: str) -> None:
        if request_id not in self:
            self._journal.post("label", (request_id, label))
            super().__setitem__(request_id, label)


class _Anybody(dict[str, str]):
    """A worker does not know the client's names: every request has one, until the harness says that it has none."""

    def get(self, key: str, default: Any = "") -> Any:
        return key


def _frontend(journal: Journal) -> None:
    from holdfast.frontend import process  # noqa: PLC0415
    from holdfast.frontend.assembly import Assembled  # noqa: PLC0415
    from holdfast.sim.versions import age_frontend  # noqa: PLC0415
    from holdfast.sim.watching import Watching  # noqa: PLC0415

    def assembled(*args: Any, **how: Any) -> Assembled:
        made = Assembled(*args, **how)
        services, pool = made.services, made.pool
        if os.environ.get(OLD):
            age_frontend(pool)
        watching = Watching(
            journal.name,
            PostedHistory(journal),  # type: ignore[arg-type]
            services.observer,
            labels=_Labels(journal),
            dispatched=lambda instance: journal.post("dispatched", instance),
            inhibition=pool.settings.inhibition,
            now=time.monotonic,
        )
        services.observer = watching
        pool.subscribe(watching.pool_event)

        def obey(order: dict[str, float]) -> None:
            if "look" in order:
                journal.post("known", _known(made))
            else:
                _clock_jumps(order)

        journal.obey(obey)
        return made

    process.Assembled = assembled  # type: ignore[misc,assignment]


def _known(frontend: Any) -> dict[str, Any]:
    """Return what a frontend thinks is in each worker's KV cache."""
    told = {}
    for worker in frontend.pool.all_workers():
        known = frontend.knowledge.known(worker.instance)
        if known is None or known.state != "exact":
            told[worker.instance] = ("unknown" if known is None else known.state, known.problem if known else "", 0, [])
            continue
        index, slots = known.space.index, known.space.slots.of_worker(worker.instance)
        ranks = [
            sorted({one for tier in index.snapshot(slots[rank]) for one in tier}) if rank in slots else []
            for rank in range(max(slots, default=-1) + 1)
        ]
        told[worker.instance] = ("exact", "", known.epoch, ranks)
    return told


def _worker(journal: Journal) -> None:
    from holdfast.engines.contract import GenerateRequest  # noqa: PLC0415
    from holdfast.engines.mock import misbehaviour  # noqa: PLC0415
    from holdfast.runtime.server import WorkerServer  # noqa: PLC0415
    from holdfast.sim.caches import CacheFaults  # noqa: PLC0415
    from holdfast.sim.engine import SimEngine  # noqa: PLC0415
    from holdfast.sim.history import Life, Sequence  # noqa: PLC0415
    from holdfast.sim.versions import age_worker  # noqa: PLC0415
    from holdfast.worker import hosted  # noqa: PLC0415
    from holdfast.worker.process import WorkerProcess  # noqa: PLC0415

    class PostingEngine(SimEngine):
        """Posts what the simulated one writes down."""

        def __init__(self, config: Any):
            history = PostedHistory(journal)
            super().__init__(
                config,
                history,  # type: ignore[arg-type]
                Life(journal.name, "worker", journal.incarnation, started=time.monotonic()),
                labels=_Anybody(),
                moment=lambda moment: journal.post("moment", moment),
                kill=lambda: (journal.post("prompt", "crash"), misbehaviour.kill_self()),  # type: ignore[arg-type,return-value]
                pause=lambda: (journal.post("prompt", "freeze"), misbehaviour.stop_self()),  # type: ignore[arg-type,return-value]
            )
            self._numbers: dict[int, int] = {}
            self._written = history.sequences
            self._count = 0
            journal.obey(self._order)

        def submit(self, key: Any, request: GenerateRequest) -> None:
            self._count += 1
            number = self._count
            journal.post("sequence", (number, Sequence(journal.name, journal.incarnation, "", request, _now())))
            try:
                super().submit(key, request)
            finally:
                sequence = self._written.pop()
                if sequence.ending:
                    journal.post("over", (number, sequence.ended, sequence.ending, 0))
                else:
                    self._numbers[id(sequence)] = number

        def _close(self, sequence: Sequence, ending: Any) -> None:
            super()._close(sequence, ending)
            number = self._numbers.pop(id(sequence), None)
            if number is not None:
                journal.post("over", (number, sequence.ended, ending, sequence.tokens))

        def _order(self, order: dict[str, float]) -> None:
            if "look" in order:
                truth = [sorted(rank) for rank in self.kv_truth]
                journal.post("truth", (processes[0].epoch, truth))
            elif how := next((word for word in ("lose", "repeat", "reorder") if word in order), None):
                caches = processes[0].caches
                (caches.engine if order["engine"] else caches.wire).order(how, int(order[how]))
            elif "shift" in order:
                self.miscount(int(order["shift"]), int(order["times"]))
            elif "hoard" in order:
                _hoard.append(bytearray(os.urandom(1 << 20) * int(order["hoard"])))  # MiB, every page touched
            else:
                _clock_jumps(order)

    def make_engine(_name: str, config: Any, *_role: str) -> Any:
        return PostingEngine(config)

    hosted.make_engine = make_engine
    processes: list[Any] = []
    make = WorkerProcess.__init__

    def made(self: Any, *args: Any, **how: Any) -> None:
        make(self, *args, **how)
        if os.environ.get(OLD):
            age_worker(self.server)
        self.caches = CacheFaults(self)
        processes.append(self)

    WorkerProcess.__init__ = made  # type: ignore[method-assign]
    drain, enter = WorkerServer.drain, WorkerProcess._enter

    def drained(self: Any, reason: str, remaining_ms: int) -> None:
        journal.post("draining", _now())
        drain(self, reason, remaining_ms)

    async def entered(self: Any, record: Any) -> None:
        await enter(self, record)
        journal.post("ready", _now())

    WorkerServer.drain, WorkerProcess._enter = drained, entered  # type: ignore[method-assign]


def _now() -> float:
    return asyncio.get_running_loop().time()


_hoard: list[bytearray] = []
_offset = 0.0
_time, _time_ns = time.time, time.time_ns


def _clock_jumps(order: dict[str, float]) -> None:
    """The calendar clock of this process jumps."""
    global _offset  # noqa: PLW0603
    _offset += order["wall"]


def main() -> None:
    """Run production's command line."""
    time.time = lambda: _time() + _offset
    time.time_ns = lambda: _time_ns() + int(_offset * 1e9)
    journal = Journal()
    if bug := os.environ.get(BUG):
        BUGS[bug][0]()
    (_frontend if sys.argv[1] == "frontend" else _worker)(journal)
    from holdfast.cli.main import main as production  # noqa: PLC0415

    production()


if __name__ == "__main__":
    main()
