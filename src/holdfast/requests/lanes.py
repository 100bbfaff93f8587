"""The lanes in front of one model's workers, one for each policy class: who stands where, and which lane is next.

Without classes every model has one lane, and this does nothing. With them a request's class is looked up once, when it
is placed for the first time, and what it would cost then is what it pays (`routing.rounds`) and what it counts towards
the limits of its class.

Must never wait, or order requests within a lane (`routing.queue`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from holdfast.requests.need import Need
from holdfast.routing.policy_classes import PolicyClass, PolicyClasses
from holdfast.routing.rounds import Rounds

_SEPARATOR = "\0"
LIMITS = (
    "request_queue_limit_per_worker",
    "raw_isl_token_queue_limit_per_worker",
    "cached_token_queue_limit_per_worker",
)
"""In the order in which they are checked."""


class Spot(NamedTuple):
    """Where a request with a class stands."""

    lane: str
    policy_class: PolicyClass
    length: int
    """Tokens of its prompt."""
    uncached: int
    """Those that would have to be computed for it."""

    @property
    def cost(self) -> int:
        """What it pays."""
        return max(1, self.uncached)

    @property
    def weights(self) -> tuple[int, int, int]:
        """What it counts towards each of `LIMITS`."""
        return 1, self.length, self.length - self.uncached


class Excess(NamedTuple):
    """A limit of a class that is reached."""

    limit: str
    current: int
    bound: int


class Lanes:
    """Of all models of one process.

    Args:
        classes: by model; None: there are none.
    """

    def __init__(self, classes: PolicyClasses | None):
        self._classes = classes
        self._rounds: dict[str, Rounds] = {}
        self._held: dict[str, tuple[int, int, int]] = {}
        """What waits in a lane, by `LIMITS`."""

    @property
    def any(self) -> bool:
        """Whether there are classes at all."""
        return self._classes is not None

    def spot(self, need: Need, uncached: int) -> Spot | None:
        """Return where a request stands; None: its model has no classes.

        Args:
            need: of the request.
            uncached: tokens that would have to be computed for it.
        """
        profile = self._classes.of(need.model) if self._classes is not None else None
        if profile is None:
            return None
        chosen = profile.classify(need.route.policy_class, uncached)
        lane = f"{need.model}{_SEPARATOR}{chosen.name}"
        return Spot(lane, chosen, need.tokens, min(uncached, need.tokens))

    def of(self, model: str) -> list[str]:
        """Return all lanes of a model; the first is for those without a class, and goes before the others."""
        profile = self._classes.of(model) if self._classes is not None else None
        if profile is None:
            return [model]
        return [model, *(f"{model}{_SEPARATOR}{one.name}" for one in profile.policy_classes)]

    def order(self, model: str, heads: Mapping[str, int]) -> list[str]:
        """Return those lanes of a model in which somebody waits, the next one first.

        Args:
            model: whose.
            heads: by lane: what its first request costs.
        """
        first = [lane for lane in heads if lane == model]
        return first + self._of(model).order({lane: cost for lane, cost in heads.items() if lane != model})

    def served(self, model: str, lane: str, heads: Mapping[str, int]) -> None:
        """The first request of a lane has got a place; ``heads`` as before that."""
        self._of(model).served(lane, {one: cost for one, cost in heads.items() if one != model})

    def full(self, spot: Spot, workers: int) -> Excess | None:
        """Return the limit of its class that keeps a request from waiting. One that crosses a limit is still let in."""
        for name, current in zip(LIMITS, self._held.get(spot.lane, (0, 0, 0)), strict=True):
            limit: int | None = getattr(spot.policy_class, name)
            if limit is not None and current >= limit * workers:
                return Excess(name, current, limit * workers)
        return None

    def joined(self, spot: Spot) -> None:
        """A request waits."""
        a, b, c = self._held.get(spot.lane, (0, 0, 0))
        x, y, z = spot.weights
        self._held[spot.lane] = (a + x, b + y, c + z)

    def left(self, spot: Spot) -> None:
        """It waits no more, whatever the reason."""
        a, b, c = self._held[spot.lane]
        x, y, z = spot.weights
        self._held[spot.lane] = (a - x, b - y, c - z)

    def _of(self, model: str) -> Rounds:
        found = self._rounds.get(model)
        if found is None:
            profile = self._classes.of(model) if self._classes is not None else None
            classes = profile.policy_classes if profile is not None else ()
            found = self._rounds[model] = Rounds({f"{model}{_SEPARATOR}{one.name}": one.quantum for one in classes})
        return found


def model_of(lane: str) -> str:
    """Return the model that a lane belongs to."""
    return lane.partition(_SEPARATOR)[0]
