"""Telling a killer prompt from the innocent streams that die with it (explained in `docs/explanation/poison.md`).

When a worker's process is lost, every stream on it is a victim, and those that had not got a new token from it (or only
a few, where operators want that) may have been the cause. Only facts about deaths are kept here; who is tried where is
`placement`'s business.

Must never look at a stream's content, choose a worker or wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from weakref import WeakValueDictionary

from holdfast.base.errors import Disconnected, EngineFailed, HoldfastError, PeerSilent, WorkerStalled

POISON_DEATHS = 2
"""Workers that may be lost under one stream before it made progress on them."""
YOUNG = 8
"""New tokens from a lost worker below which a stream may be one that kills so many tokens after every start: it must
bring more than that before it is trusted with the next worker."""
TRUSTED = 2
"""New tokens after which any other stream that lost a worker is trusted with the next one. One would do, were it not
for tokens that a worker computed and could not send any more before it died."""
OTHERWISE = 60.0
"""Seconds for which a death that no stream can have caused tells that workers die of something else as well."""
_REMEMBERED = 64
"""Deaths that are remembered for that at most."""


class Death:
    """The loss of one worker's process: one, however many streams it takes with it."""

    __slots__ = ("__weakref__", "at", "begun", "explained", "settled", "suspects")

    def __init__(self, at: float = 0.0) -> None:
        self.at = at
        """When it was noticed, on the loop's clock."""
        self.begun = False
        """It had accepted one of them: it was at work, and not a dead connection that a burst ran into."""
        self.explained = False
        """A convicted stream was on that worker: nobody else is suspected because of it."""
        self.settled = False
        self.suspects: list[Record] = []
        """Streams that had not made progress on that worker."""

    @property
    def nobodys(self) -> bool:
        """Whether a worker at work was lost and all of its streams are known to be innocent."""
        return self.begun and not self.explained and not any(self in record.unproven for record in self.suspects)


class Record:
    """What one stream has to do with deaths; kept by the stream, written by the inquest.

    Args:
        since: when the stream began, on the loop's clock.
        first: new tokens after which it is innocent of the first death that it is part of.
    """

    __slots__ = ("_first", "_places", "_young", "accepted", "convicted", "deaths", "moving", "since", "unproven")

    def __init__(self, *, since: float = 0.0, first: int = 1) -> None:
        self.deaths: list[Death] = []
        """All that it was part of."""
        self.unproven: list[Death] = []
        """Those since its last proof: it may have caused them."""
        self.convicted = False
        self.moving = False
        """It lost a worker, and neither has another one nor waits for a trial."""
        self.accepted = False
        """The latest worker that it lost had accepted it."""
        self.since = since
        """When the stream began."""
        self._first = first
        self._places: list[tuple[int, int]] = []
        """New tokens, and the output index, at each of the unproven ones."""
        self._young: list[tuple[Death, int]] = []
        """Those in which it had a few new tokens only, but some, and how many."""

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
    def rank(self) -> tuple[int, bool, int]:
        """Order of trials: the most suspected has the least, then who was accepted, then who had begun last."""
        return -self.blamed, not self.accepted, self._places[-1][0] if self._places else 0

    def guilty_if_alone(self, *, otherwise: bool = False) -> bool:
        """Return whether it is to blame when nobody else can be.

        Two deaths are enough when they look alike: both workers were at work, the second had accepted it, and it was
        at the same output index both times, or had got as many tokens from the one as from the other. One that met
        dead connections, was moved between two workers that were killed together, or brought something once and
        nothing the other time may merely have been unlucky: one death more.

        Args:
            otherwise: workers die of something else as well: two are not enough then.
        """
        blamed = [i for i, death in enumerate(self.unproven) if not death.explained]
        if len(blamed) != POISON_DEATHS or not self.accepted:
            return len(blamed) > POISON_DEATHS
        if self.known > POISON_DEATHS:
            return True
        first, second = blamed
        (brought, index), (brought_again, index_again) = self._places[first], self._places[second]
        alike = index == index_again or brought == brought_again
        return self.unproven[first].begun and alike and not otherwise

    @property
    def proof(self) -> int:
        """New tokens that prove its innocence: later `TRUSTED`, and as many more as it had of a worker while young."""
        if not self.known:
            return self._first
        return TRUSTED + max((tokens for death, tokens in self._young if not death.explained), default=0)

    @property
    def excused(self) -> int:
        """How many of its failures were another stream's doing."""
        return sum(death.explained for death in self.deaths)

    def proven(self) -> None:
        """Enough new tokens came: none of the deaths before was this stream's doing."""
        self.unproven.clear()
        self._places.clear()

    def add(self, death: Death, *, tokens: int, index: int, progressed: bool, accepted: bool) -> None:
        """Remember a death, and let it remember this stream when it may be the cause."""
        self.deaths.append(death)
        self.accepted = accepted
        death.begun |= accepted
        if 0 < tokens < YOUNG:
            self._young.append((death, tokens))
        if progressed:
            self.proven()
            return
        self.unproven.append(death)
        self._places.append((tokens, index))
        death.suspects.append(self)


class Inquest:
    """All deaths that streams of this process were part of, while any of them lives, and a little longer.

    Args:
        trial_tokens: a stream that never lost a worker before is suspected if it had got fewer new tokens than this.
    """

    def __init__(self, trial_tokens: int = 1) -> None:
        self._trial_tokens = trial_tokens
        self._deaths: WeakValueDictionary[tuple[str, int], Death] = WeakValueDictionary()
        self._latest: deque[Death] = deque(maxlen=_REMEMBERED)
        self._moving = 0
        self.on_still: Callable[[], None] = lambda: None
        """Called when all victims have a worker again, or wait for their trial."""

    @property
    def moving(self) -> bool:
        """Whether victims are on their way to some worker: where they come to, they would blur a trial."""
        return self._moving > 0

    def open(self, since: float) -> Record:
        """Return the record of a stream that begins now."""
        return Record(since=since, first=self._trial_tokens)

    def died(
        self,
        worker: tuple[str, int],
        record: Record,
        *,
        tokens: int,
        index: int,
        progressed: bool,
        accepted: bool,
        now: float,
    ) -> None:
        """A stream lost its worker's process; called for all its streams before anybody judges.

        Args:
            worker: instance id and epoch.
            record: of the stream.
            tokens: new ones that the worker had brought it.
            index: all output tokens that the stream has.
            progressed: whether the new ones were enough to prove its innocence.
            accepted: whether the worker had accepted it.
            now: the loop's time.
        """
        death = self._deaths.get(worker)
        if death is None:
            death = self._deaths[worker] = Death(now)
            while self._latest and now - self._latest[0].at > OTHERWISE:
                self._latest.popleft()
            self._latest.append(death)
        record.add(death, tokens=tokens, index=index, progressed=progressed, accepted=accepted)
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
        if len(candidates) != 1:
            return False
        killer = candidates[0]
        if not killer.guilty_if_alone(otherwise=self._otherwise(killer, death.at)):
            return False
        killer.convicted = True
        for explained in killer.deaths:
            explained.explained = True
        return True

    def _otherwise(self, record: Record, now: float) -> bool:
        """Return whether a worker has died lately, in that stream's life, without being killed by any stream."""
        since = max(record.since, now - OTHERWISE)
        return any(d.at >= since and d.nobodys and d not in record.deaths for d in self._latest)


def is_death(error: HoldfastError, *, whole_stream: bool) -> bool:
    """Return whether an attempt's failure means that the worker's process, or its engine, is lost to all streams.

    Args:
        error: how the attempt ended.
        whole_stream: the stream was broken from outside, not ended by the worker's own word.
    """
    if whole_stream:
        return isinstance(error, Disconnected | PeerSilent | WorkerStalled)
    return isinstance(error, EngineFailed) and bool(error.details.get("engine_died"))
