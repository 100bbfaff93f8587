"""Which models are served, by whom, and whether those who serve one agree about it.

The worker that came first speaks for a model name; others whose card contradicts it in a field of
`models.card.AGREED_FIELDS` are refused for that name, and the field is named. A model whose workers are all
away is remembered for a while, because requests for it wait for a replacement.

Workers that compute prompts only are kept apart: they serve no model by themselves, speak for a name only while nobody
else does, and are told when no decode worker can take over from them (`models.pairing`).

Must never look at health.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from holdfast.models.card import ModelCard, disagreement
from holdfast.models.pairing import explain, mismatch
from holdfast.runtime.member import Worker

log = logging.getLogger(__name__)

REMEMBERED_MODELS = 1_024
_NOBODY: list[Worker] = []


class Catalogue:
    """Rebuilt on every change of membership or of a record; cheap to ask."""

    def __init__(self) -> None:
        self._workers: dict[str, list[Worker]] = {}
        self._prefill: dict[str, list[Worker]] = {}
        """Only names that have some."""
        self._dependent: frozenset[str] = frozenset()
        """Names that somebody serves who computes no prompts."""
        self._last: dict[str, ModelCard] = {}

    def rebuild(self, workers: Iterable[Worker]) -> None:
        """Work out the agreed cards of all workers.

        Args:
            workers: in order of arrival; those that leave speak for no name as long as another does.
        """
        ordered = sorted(workers, key=lambda w: (w.draining or w.leaving, _prefills(w), w.arrival))
        spokesmen: dict[str, tuple[Worker, ModelCard]] = {}
        offered: list[tuple[str, Worker, ModelCard]] = []
        for alias in (False, True):
            for worker in ordered:
                for card in worker.record.cards:
                    names = card.aliases if alias else (card.name,)
                    for name in names:
                        spokesmen.setdefault(name, (worker, card))
                        offered.append((name, worker, card))
        self._workers = {name: [] for name in spokesmen}
        self._prefill = {}
        cards: dict[Worker, dict[str, ModelCard]] = {worker: {} for worker in ordered}
        problems: dict[Worker, str] = dict.fromkeys(ordered, "")
        fields: dict[Worker, str] = {}
        for name, worker, card in offered:
            speaker, known = spokesmen[name]
            field = disagreement(known, card)
            if field is not None:
                fields.setdefault(worker, field)
                problems[worker] = problems[worker] or _contradiction(name, field, speaker, known, card)
            elif card.state == "ready" and name not in cards[worker]:
                cards[worker][name] = card
                if card.role == "prefill":
                    self._prefill.setdefault(name, []).append(worker)
                else:
                    self._workers[name].append(worker)
                    self._remember(name, card)
        self._dependent = frozenset(
            name for worker in ordered for name, card in cards[worker].items() if not _computes(card)
        )
        self._pair(cards, problems, fields)
        for worker in ordered:
            worker.cards = cards[worker]
            if problems[worker] and problems[worker] != worker.problem:
                log.error("worker %s at %s: %s", worker.instance, worker.record.address, problems[worker])
            worker.problem, worker.refused_for = problems[worker], fields.get(worker, "")

    def _pair(
        self, cards: dict[Worker, dict[str, ModelCard]], problems: dict[Worker, str], fields: dict[Worker, str]
    ) -> None:
        """Note which prefill workers nobody can take over from."""
        for name, prefill in self._prefill.items():
            for worker, (field, why) in _unpaired(name, prefill, self._workers[name], cards).items():
                fields.setdefault(worker, field)
                problems[worker] = problems[worker] or why

    def _remember(self, name: str, card: ModelCard) -> None:
        self._last.pop(name, None)
        self._last[name] = card
        while len(self._last) > REMEMBERED_MODELS:
            del self._last[next(iter(self._last))]

    def workers(self, model: str) -> list[Worker]:
        """Return those that serve a model by name or alias, whatever their state; not those for prompts only."""
        return self._workers.get(model, [])

    def prefill(self, model: str) -> list[Worker]:
        """Return those that compute prompts of a model and nothing else, whatever their state."""
        return self._prefill.get(model, _NOBODY)

    def needs_prefill(self, model: str) -> bool:
        """Return whether somebody who serves a model computes no prompts of it, whatever their state."""
        return model in self._dependent

    def card(self, model: str) -> ModelCard | None:
        """Return the card of a model, also when nobody serves it at the moment."""
        return self._last.get(model)

    def names(self) -> list[str]:
        """Return all names and aliases, those remembered included."""
        return list(self._last)


def _computes(card: ModelCard) -> bool:
    return card.local_prefill or card.role == "prefill"


def _prefills(worker: Worker) -> bool:
    return any(card.role == "prefill" for card in worker.record.cards)


def _unpaired(
    name: str, prefill: list[Worker], decode: list[Worker], cards: dict[Worker, dict[str, ModelCard]]
) -> dict[Worker, tuple[str, str]]:
    """Return the prefill workers that none of the decode workers can take over from, with the field and the reason."""
    found = {}
    for worker in prefill if decode else ():
        mine = cards[worker][name]
        fields = [mismatch(mine, cards[other][name]) for other in decode]
        if fields[0] is not None and None not in fields:
            found[worker] = (fields[0], explain(fields[0], mine, cards[decode[0]][name], decode[0].instance))
    return found


def _contradiction(name: str, field: str, speaker: Worker, known: ModelCard, card: ModelCard) -> str:
    return (
        f"refused for model {name!r}: its {field} ({_brief(getattr(card, field))}) is not that of worker "
        f"{speaker.instance} ({_brief(getattr(known, field))}); restart one of them with the same model files"
    )


def _brief(value: object) -> str:
    text = str(getattr(value, "sha256", value))
    return text if len(text) <= 40 else text[:37] + "…"
