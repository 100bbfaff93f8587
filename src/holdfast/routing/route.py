"""What one request says about its own routing: a worker, a rank, a session, other weights, conditions.

From headers and ``nvext`` (``backend_instance_id``, ``session_control``, ``router``); the reference's names, its older
``router_config_override`` inside included. Must never look at a worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from holdfast.base.errors import InvalidRequest
from holdfast.routing.cost import Weights

_SCALES = {name: name for name in Weights.__struct_fields__} | {
    "kv_overlap_score_weight": "overlap_score_weight",
    "overlap_weight": "overlap_score_weight",
    "temperature": "router_temperature",
}
"""Keys of an override, with those that it had earlier."""
_PARAM = "nvext.router"


class Route(msgspec.Struct, frozen=True):
    """Wishes and conditions of one request."""

    worker: str = ""
    """Instance id that should serve it; a stream that has begun moves wherever it must."""
    rank: int | None = None
    session: str = ""
    weights: Mapping[str, float] = {}
    """Parameters of the cost that differ for it."""
    allowed: frozenset[str] = frozenset()
    """Instance ids; empty: any."""
    required: frozenset[str] = frozenset()
    """Taints that its worker must have, as ``key=value``."""
    preferred: Mapping[str, float] = {}
    """Taints that are welcome, with weights; negative ones are unwelcome."""
    expected_output: int = 0
    """Tokens that its client expects of the whole answer (``agent_hints.osl``); 0: it did not say."""
    prefill: str = ""
    """Instance id of the prefill worker that should compute its prompt; another one does it where that one cannot."""
    policy_class: str = ""
    """Family or class that it names (`policy_classes`)."""
    advised: str = ""
    """Instance id that a router named for it: taken while nothing speaks against it."""

    def weighed(self, base: Weights) -> Weights | None:
        """Return the weights for it; None: those of the settings."""
        return msgspec.structs.replace(base, **self.weights) if self.weights else None

    def admits(self, instance: str, taints: frozenset[str]) -> bool:
        """Return whether a worker meets the conditions."""
        return (not self.allowed or instance in self.allowed) and self.required <= taints

    def preference(self, taints: frozenset[str]) -> float:
        """Return the sum of the weights of the welcome taints that a worker has."""
        return sum(weight for taint, weight in self.preferred.items() if taint in taints)


ANYWHERE = Route()


def route_of(
    worker: str | None,
    rank: int | None,
    session: str | None,
    router: Mapping[str, Any],
    expected_output: int | None = None,
    *,
    prefill: str | None = None,
    policy_class: str | None = None,
) -> Route:
    """Return what a request wishes.

    Args:
        worker: instance id from a header or ``nvext.backend_instance_id``.
        rank: data-parallel rank.
        session: its name.
        router: ``nvext.router``; keys that are not known are left alone.
        expected_output: tokens of its answer, as its client expects.
        policy_class: family or class of its waiting, from a header.
        prefill: instance id of a prefill worker, from a header or ``nvext.prefill_worker_id``.

    Raises:
        InvalidRequest: a known key with a value that it cannot take.
    """
    if not (worker or session or router or prefill or rank is not None or expected_output or policy_class):
        return ANYWHERE
    inner = router.get("router_config_override")
    flat = {**router, **inner} if isinstance(inner, Mapping) else router
    weights = {}
    for key, name in _SCALES.items():
        if flat.get(key) is not None:
            weights[name] = _number(key, flat[key])
    constraints = flat.get("routing_constraints") or {}
    if not isinstance(constraints, Mapping):
        raise _wrong("routing_constraints", "an object")
    preferred = constraints.get("preferred") or {}
    if not isinstance(preferred, Mapping):
        raise _wrong("routing_constraints.preferred", "an object of weights")
    return Route(
        worker or "",
        rank,
        session or "",
        weights,
        frozenset(_instance(one) for one in _strings("allowed_worker_ids", flat.get("allowed_worker_ids"))),
        frozenset(_strings("routing_constraints.required", constraints.get("required"))),
        {
            str(taint): _number("routing_constraints.preferred", weight, least=None)
            for taint, weight in preferred.items()
        },
        expected_output or 0,
        prefill or "",
        policy_class or "",
    )


def _number(key: str, value: object, least: float | None = 0.0) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or (least is not None and value < least):
        raise _wrong(key, "a number" if least is None else f"a number of at least {least:g}")
    return float(value)


def _strings(key: str, value: object) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str | int) for one in value):
        raise _wrong(key, "a list of names")
    return [one if isinstance(one, str) else f"{one:016x}" for one in value]


def _instance(text: str) -> str:
    """Decimal numbers become hexadecimal, as in the headers."""
    return f"{int(text):016x}" if text.isdecimal() and len(text) != 16 else text


def _wrong(key: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"'{_PARAM}.{key}' must be {what}.", param=f"{_PARAM}.{key}")
