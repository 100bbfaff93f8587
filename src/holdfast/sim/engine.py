"""The mock engine of a simulated worker: it writes down what it was asked and did, and can be told to lie.

Must never change what the mock engine answers, except where a fault says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from holdfast.base.errors import HoldfastError
from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import DeathSink, EngineInfo, GenerateRequest, LoadProgress, SequenceStep, StepSink
from holdfast.engines.mock.config import MockConfig
from holdfast.engines.mock.engine import MockEngine
from holdfast.sim.faults import Moment
from holdfast.sim.history import History, Life, Sequence, SequenceEnding


class SimEngine(MockEngine):
    """See the module.

    Args:
        config: size and speed.
        history: where sequences are written down.
        life: of its process.
        labels: the client's name of a request, by request id; unknown ids are canaries.
        moment: told about every moment at which a fault may strike.
        kill: what a crash on command does.
        pause: what a freeze on command does.
    """

    def __init__(
        self,
        config: MockConfig,
        history: History,
        life: Life,
        *,
        labels: dict[str, str],
        moment: Callable[[Moment], None],
        kill: Callable[[], None],
        pause: Callable[[], None],
    ):
        super().__init__(config)
        self.kill, self.pause = kill, pause
        self._history, self._life, self._labels, self._moment = history, life, labels, moment
        self.open: dict[SequenceKey, Sequence] = {}
        """What it has in hand."""
        self._shift = 0
        self._shifts_left = 0
        self._lied: set[SequenceKey] = set()
        """Sequences whose count was falsified: once each, for a second lie may hide the first."""

    async def start(self, sink: StepSink, on_death: DeathSink, on_load: LoadProgress) -> EngineInfo:
        """See `MockEngine.start`."""

        note = self._note

        def watched(steps: list[SequenceStep]) -> None:
            for step in steps:
                note(step)
            sink(steps)

        return await super().start(watched, on_death, on_load)

    def submit(self, key: SequenceKey, request: GenerateRequest) -> None:
        """See `MockEngine.submit`."""
        life = self._life
        label = self._labels.get(request.request_id, "")
        sequence = Sequence(life.name, life.incarnation, label, request, asyncio.get_running_loop().time())
        self._history.sequences.append(sequence)
        try:
            super().submit(key, request)
        except HoldfastError as error:
            self._close(sequence, "refused")
            sequence.error = error.code
            raise
        self.open[key] = sequence
        if label:
            self._moment("accept")

    def cancel(self, key: SequenceKey) -> None:
        """See `MockEngine.cancel`."""
        super().cancel(key)
        sequence = self.open.pop(key, None)
        if sequence is not None:
            self._close(sequence, "cancelled")

    def miscount(self, shift: int, times: int) -> None:
        """Let the next ``times`` steps of sequences carry an output index that is off, at most one of each sequence."""
        self._shift, self._shifts_left = shift, times

    def _lie(self, step: SequenceStep) -> None:
        if step.index + self._shift >= 0 and step.key not in self._lied:
            self._lied.add(step.key)
            self._shifts_left -= 1
            step.index += self._shift

    def _close(self, sequence: Sequence, ending: SequenceEnding) -> None:
        sequence.ended, sequence.ending = asyncio.get_running_loop().time(), ending

    def _note(self, step: SequenceStep) -> None:
        sequence = self.open.get(step.key)
        if sequence is None:
            return
        made = sequence.tokens
        sequence.tokens = made + len(step.tokens)
        if step.finish is not None:
            del self.open[step.key]
            self._close(sequence, "finished")
            sequence.error = step.error.code if step.error is not None else ""
        if not sequence.label:
            return
        if self._shifts_left and step.tokens:
            self._lie(step)
        self._moment("end" if step.finish is not None else "stream" if made else "first")
