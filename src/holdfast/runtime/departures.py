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
        self._slots: dict[InstanceId, dict[str, MetaValue]] = {}
        self.supervised: dict[InstanceId, dict[str, str]] = {}
        """What each supervisor says about all of its slots, frontends included."""

    def left(self, cards: Iterable[ModelCard], *, purposeful: bool) -> None:
        """A worker with these cards left."""
        for card in cards:
            for name in (card.name, *card.aliases):
                self._purposeful.pop(name, None)
                self._purposeful[name] = purposeful
        while len(self._purposeful) > REMEMBERED_MODELS:
            del self._purposeful[next(iter(self._purposeful))]

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
        slots = [value for supervised in self._slots.values() for value in supervised.values()]
        if slots:
            return any(value != GAVE_UP for value in slots)
        return not self._purposeful.get(model, False)
