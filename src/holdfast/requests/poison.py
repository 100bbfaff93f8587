"""Telling a killer prompt from the innocent streams that die with it (explained in `docs/explanation/poison.md`).

When a worker's process is lost, every stream on it is a victim, and those that had not got a new token from it may
have been the cause. Only facts about deaths are kept here; who is tried where is `placement`'s business.

Must never look at a stream's content, choose a worker or wait.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakValueDictionary

from holdfast.base.errors import Disconnected, EngineFailed, HoldfastError, PeerSilent, WorkerStalled

POISON_DEATHS = 2
"""Workers that may be lost under one stream before it made progress on them."""
YOUNG = 8
"""New tokens from a lost worker below which a stream is young: it may kill so many tokens after every start, and must
bring so many before it is trusted with the next worker."""
TRUSTED = 2
"""New tokens after which any other stream that lost a worker is trusted with the next one. One would do, were it not
for tokens that a worker computed and could not send any more before it died."""


class Death:
    """The loss of one worker's process: one, however many streams it takes with it."""

    __slots__ = ("__weakref__", "begun", "explained", "settled", "suspects")

    def __init__(self) -> None:
        self.begun = False
        """It had accepted one of them: it was at work, and not a dead connection that a burst ran into."""
        self.explained = False
        """A convicted stream was on that worker: nobody else is suspected because of it."""
        self.settled = False
        self.suspects: list[Record] = []
        """Streams that had not made progress on that worker."""


class Record:
    """What one stream has to do with deaths; kept by the stream, written by the inquest."""

    __slots__ = ("_brought", "_young", "accepted", "convicted", "deaths", "moving", "unproven")

    def __init__(self) -> None:
        self.deaths: list[Death] = []
        """All that it was part of."""
        self.unproven: list[Death] = []
        """Those since its last proof: it may have caused them."""
        self.convicted = False
        self.moving = False
        """It lost a worker, and neither has another one nor waits for a trial."""
        self.accepted = False
        """The latest worker that it lost had accepted it."""
        self._brought: list[int] = []
        """New tokens in each of the unproven ones."""
        self._young: list[Death] = []
        """Those in which it had a few tokens only, but some."""

    @property
    def known(self) -> int:
        """How many deaths it was part of that nobody else is known to have caused."""
        return sum(not death.explained for death in self.deaths) if self.deaths else 0

    @property
    def blamed(self) -> int:
        """How many of them it may have caused."""
        return sum(not death.explained for death in self.unproven) if self.unproven else 0

    @property
    def suspect(self) -> bool:
        """Whether it must be tried alone: one death of a worker that was at work will do, else two."""
        blamed = [death for death in self.unproven if not death.explained]
        return len(blamed) >= POISON_DEATHS or any(death.begun for death in blamed)

    @property
    def rank(self) -> tuple[int, bool]:
        """Order of trials: the most suspected has the least."""
        return -self.blamed, not self.accepted

    @property
    def guilty_if_alone(self) -> bool:
        """Whether it is to blame when nobody else can be.

        Two deaths are enough when they look alike: both workers were at work, the second had accepted it, and both
        had brought as many tokens. One that met dead connections, was moved between two workers that were killed
        together, or brought something once and nothing the other time may merely have been unlucky: one death more.
        """
        blamed = [i for i, death in enumerate(self.unproven) if not death.explained]
        if len(blamed) != POISON_DEATHS or not self.accepted:
            return len(blamed) > POISON_DEATHS
        first, second = blamed
        alike = self.unproven[first].begun and self._brought[first] == self._brought[second]
        return alike or self.known > POISON_DEATHS

    @property
    def proof(self) -> int:
        """New tokens that prove its innocence: one if it never lost a worker, else `TRUSTED`, `YOUNG` for the young."""
        if not self.known:
            return 1
        return YOUNG if any(not death.explained for death in self._young) else TRUSTED

    @property
    def excused(self) -> int:
        """How many of its failures were another stream's doing."""
        return sum(death.explained for death in self.deaths)

    def proven(self) -> None:
        """Enough new tokens came: none of the deaths before was this stream's doing."""
        self.unproven.clear()
        self._brought.clear()

    def add(self, death: Death, *, tokens: int, progressed: bool, accepted: bool) -> None:
        """Remember a death, and let it remember this stream when it may be the cause."""
        self.deaths.append(death)
        self.accepted = accepted
        death.begun |= accepted
        if 0 < tokens < YOUNG:
            self._young.append(death)
        if progressed:
            self.proven()
            return
        self.unproven.append(death)
        self._brought.append(tokens)
        death.suspects.append(self)


class Inquest:
    """All deaths that streams of this process were part of, while any of them lives."""

    def __init__(self) -> None:
        self._deaths: WeakValueDictionary[tuple[str, int], Death] = WeakValueDictionary()
        self._moving = 0
        self.on_still: Callable[[], None] = lambda: None
        """Called when all victims have a worker again, or wait for their trial."""

    @property
    def moving(self) -> bool:
        """Whether victims are on their way to some worker: where they come to, they would blur a trial."""
        return self._moving > 0

    def died(self, worker: tuple[str, int], record: Record, *, tokens: int, progressed: bool, accepted: bool) -> None:
        """A stream lost its worker's process; called for all its streams before anybody judges.

        Args:
            worker: instance id and epoch.
            record: of the stream.
            tokens: new ones that the worker had brought it.
            progressed: whether these were enough to prove its innocence.
            accepted: whether the worker had accepted it.
        """
        death = self._deaths.get(worker)
        if death is None:
            death = self._deaths[worker] = Death()
        record.add(death, tokens=tokens, progressed=progressed, accepted=accepted)
        if not record.moving:
            record.moving = True
            self._moving += 1

    def still(self, record: Record) -> None:
        """A victim has a worker again, waits for its trial, or is over; harmless for anybody else."""
        if record.moving:
            record.moving = False
            self._moving -= 1
            if not self._moving:
                self.on_still()

    def settle(self, record: Record) -> bool:
        """Judge the latest death of a stream, once for all its victims.

        Returns:
            Whether a stream was convicted now, which clears others that may be waiting.
        """
        death = record.deaths[-1]
        if death.settled:
            return False
        death.settled = True
        candidates = [r for r in death.suspects if r.known >= POISON_DEATHS]
        if len(candidates) != 1 or not candidates[0].guilty_if_alone:
            return False
        killer = candidates[0]
        killer.convicted = True
        for explained in killer.deaths:
            explained.explained = True
        return True


def is_death(error: HoldfastError, *, whole_stream: bool) -> bool:
    """Return whether an attempt's failure means that the worker's process, or its engine, is lost to all streams.

    Args:
        error: how the attempt ended.
        whole_stream: the stream was broken from outside, not ended by the worker's own word.
    """
    if whole_stream:
        return isinstance(error, Disconnected | PeerSilent | WorkerStalled)
    return isinstance(error, EngineFailed) and bool(error.details.get("engine_died"))
