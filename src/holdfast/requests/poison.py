"""Telling a killer prompt from the innocent streams that die with it (explained in `docs/explanation/poison.md`).

When a worker's process is lost, every stream on it is a victim, and those that had not got a new token from it may
have been the cause. Only facts about deaths are kept here; who is tried where is `placement`'s business.

Must never look at a stream's content, choose a worker or wait.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

from holdfast.base.errors import Disconnected, EngineFailed, HoldfastError, PeerSilent, WorkerStalled

POISON_DEATHS = 2
"""Workers that may be lost under one stream before it made progress on them."""
PROOF_TOKENS = 8
"""New tokens after which a stream that has lost a worker before is trusted with the next one: some kill a few
tokens after they were continued."""


class Death:
    """The loss of one worker's process: one, however many streams it takes with it."""

    __slots__ = ("__weakref__", "explained", "settled", "suspects")

    def __init__(self) -> None:
        self.explained = False
        """A convicted stream was on that worker: nobody else is suspected because of it."""
        self.settled = False
        self.suspects: list[Record] = []
        """Streams that had not made progress on that worker."""


class Record:
    """What one stream has to do with deaths; kept by the stream, written by the inquest."""

    __slots__ = ("_accepted", "convicted", "deaths", "unproven")

    def __init__(self) -> None:
        self.deaths: list[Death] = []
        """All that it was part of."""
        self.unproven: list[Death] = []
        """Those since its last proof: it may have caused them."""
        self.convicted = False
        self._accepted = False
        """The worker had accepted it in one of the unproven ones."""

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
        """Whether it must be tried alone: one death will do if its worker had accepted it, else two."""
        return bool(self.unproven) and self.blamed >= (1 if self._accepted else POISON_DEATHS)

    @property
    def guilty_if_alone(self) -> bool:
        """Whether it is to blame when nobody else can be: one death more is needed when no worker ever accepted it.

        A request that meets two dead connections in a row has merely been unlucky.
        """
        return self.blamed >= (POISON_DEATHS if self._accepted else POISON_DEATHS + 1)

    @property
    def proof(self) -> int:
        """New tokens that prove its innocence: one after a first death at the very beginning, else `PROOF_TOKENS`."""
        known = self.known
        return 1 if known == 0 or (known == 1 and self.blamed == 1) else PROOF_TOKENS

    @property
    def excused(self) -> int:
        """How many of its failures were another stream's doing."""
        return sum(death.explained for death in self.deaths)

    def proven(self) -> None:
        """Enough new tokens came: none of the deaths before was this stream's doing."""
        self.unproven.clear()
        self._accepted = False

    def add(self, death: Death, *, progressed: bool, accepted: bool) -> None:
        """Remember a death, and let it remember this stream when it may be the cause."""
        self.deaths.append(death)
        if progressed:
            self.proven()
            return
        self.unproven.append(death)
        self._accepted |= accepted
        death.suspects.append(self)


class Inquest:
    """All deaths that streams of this process were part of, while any of them lives."""

    def __init__(self) -> None:
        self._deaths: WeakValueDictionary[tuple[str, int], Death] = WeakValueDictionary()

    def died(self, worker: tuple[str, int], record: Record, *, progressed: bool, accepted: bool) -> None:
        """A stream lost its worker's process; called for all its streams before anybody judges.

        Args:
            worker: instance id and epoch.
            record: of the stream.
            progressed: whether the worker had brought it enough new tokens to prove its innocence.
            accepted: whether the worker had accepted it.
        """
        death = self._deaths.get(worker)
        if death is None:
            death = self._deaths[worker] = Death()
        record.add(death, progressed=progressed, accepted=accepted)

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
