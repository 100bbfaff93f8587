"""Whether somebody who left will be replaced: what is known about departures and supervisors.

Must never know who is here.
"""

from __future__ import annotations

from collections.abc import Iterable

from holdfast.base.ids import InstanceId
from holdfast.models.card import ModelCard
from holdfast.runtime.discovery.contract import InstanceRecord, MetaValue

REMEMBERED_MODELS = 1_024
GAVE_UP = "gave-up"
FRONTEND_SLOTS = "frontend"
"""Supervisors name their slots after what runs there; slots of frontends replace no worker."""
FACT = "."
"""A name in a supervisor's ``meta`` that holds one is a fact beside the slots, such as ``pid.worker-0``."""


class Departures:
    """Remembers, per model, how its last worker left, and what supervisors say about their slots."""

    def __init__(self) -> None:
        self._purposeful: dict[str, bool] = {}
        self._unloaded: set[str] = set()
        """Names of adapters that were taken from a worker that has stayed, and have not come back."""
        self._had: dict[InstanceId, frozenset[str]] = {}
        """Adapters of workers that were lost, until their slots start again."""
        self._slots: dict[InstanceId, dict[str, MetaValue]] = {}
        self.supervised: dict[InstanceId, dict[str, str]] = {}
        """What each supervisor says about all of its slots, frontends included."""

    def left(self, cards: Iterable[ModelCard], *, purposeful: bool, instance: InstanceId | None = None) -> None:
        """A worker with these cards left; a restart of its slot will have the same id."""
        for card in cards:
            if card.role == "prefill":
                continue  # its model is served by others
            if card.base_model is not None:
                self._unloaded.discard(card.name)
                if instance is not None:
                    self._remember(instance, card.name)
            for name in (card.name, *card.aliases):
                self._purposeful.pop(name, None)
                self._purposeful[name] = purposeful
        while len(self._purposeful) > REMEMBERED_MODELS:
            del self._purposeful[next(iter(self._purposeful))]

    def _remember(self, instance: InstanceId, adapter: str) -> None:
        self._had[instance] = self._had.pop(instance, frozenset()) | {adapter}
        while len(self._had) > REMEMBERED_MODELS:
            del self._had[next(iter(self._had))]

    def offers(self, record: InstanceRecord, before: Iterable[ModelCard] = ()) -> None:
        """A worker offers these cards; adapters that it, or the last start of its slot, had beside them are unloaded.

        No restart brings them back, only whoever loads them again.
        """
        kept = {name for card in record.cards for name in (card.name, *card.aliases)}
        had = self._had.pop(record.instance, frozenset()) | {c.name for c in before if c.base_model is not None}
        self._unloaded = (self._unloaded | had) - kept

    def supervisor(self, record: InstanceRecord) -> None:
        """A supervisor published the state of its slots."""
        slots = {name: value for name, value in record.meta.items() if FACT not in name}
        self.supervised[record.instance] = {name: str(value) for name, value in slots.items()}
        self._slots[record.instance] = {n: value for n, value in slots.items() if not n.startswith(FRONTEND_SLOTS)}

    def supervisor_left(self, record: InstanceRecord) -> None:
        """A supervisor is gone; nobody restarts its slots."""
        self._slots.pop(record.instance, None)
        self.supervised.pop(record.instance, None)

    def replacement_expected(self, model: str) -> bool:
        """Say whether a worker of this model may come, when none is here.

        A supervisor with a slot that it has not given up on will bring one, even if the last one left on purpose
        (a rolling restart). Without supervisors only a purposeful departure says that none will come.
        """
        if model in self._unloaded:
            return False
        slots = [value for supervised in self._slots.values() for value in supervised.values()]
        if slots:
            return any(value != GAVE_UP for value in slots)
        return not self._purposeful.get(model, False)
