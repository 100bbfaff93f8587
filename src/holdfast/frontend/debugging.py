"""What a frontend tells about single requests, live and finished: the routes under /debug/requests.

Must never show what a request said, or its answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from holdfast.base.errors import InvalidRequest, NotFound
from holdfast.telemetry.explain import BEFORE, RequestFacts, story, summary

if TYPE_CHECKING:
    from holdfast.frontend.app import Frontend
    from holdfast.requests.generation import Generation

LISTED = 50
"""Finished requests in one answer, unless ``limit`` says otherwise."""
_SELECTORS = {"slow", "failed", "moved", "limit"}
_FALSE = {"", "0", "false", "no", "off"}


class Debugging:
    """Of one frontend."""

    def __init__(self, frontend: Frontend):
        self._frontend = frontend

    def requests(self, query: Mapping[str, str]) -> dict[str, Any]:
        """Return leases and live requests and, when the query selects some, finished ones.

        Args:
            query: ``slow`` (seconds), ``failed``, ``moved`` (switches), ``limit``.

        Raises:
            InvalidRequest: a value that is not what it should be.
        """
        now = asyncio.get_running_loop().time()
        content: dict[str, Any] = {
            "leases": self._frontend.services.leases.sums(),
            "requests": [
                {"id": r.id, "label": r.label, "model": r.model, "streams": [_stream(s, now) for s in r.streams]}
                for r in self._frontend.generate.active.values()
            ],
        }
        if _SELECTORS & set(query):
            slow = _number(query, "slow")
            limit = _number(query, "limit")
            found = self._frontend.stories.ring.select(
                slow=slow,
                failed=_switch(query, "failed"),
                moved=_switch(query, "moved"),
                limit=LISTED if limit is None else int(limit),
            )
            content["finished"] = [summary(facts, self._wall) for facts in found]
        return content

    def request(self, name: str) -> dict[str, Any]:
        """Return the story of one request, by our id or by the client's label; live ones come first.

        Raises:
            NotFound: neither live nor remembered.
        """
        ring = self._frontend.stories.ring
        facts = self._live(name) or ring.find(name)
        if facts is None:
            raise NotFound(
                f"No request '{name}' is running here or among the last "
                f"{self._frontend.config.explain_requests} finished ones (DYN_EXPLAIN_REQUESTS)."
            )
        since = facts.arrived - int(BEFORE * 1e9)
        changes = ring.changes(since, facts.arrived + int(facts.seconds * 1e9))
        return story(facts, changes, self._wall)

    def _live(self, name: str) -> RequestFacts | None:
        found = [s for s in self._frontend.generate.stories.values() if name in (s.id, s.label)]
        if not found:
            return None
        live = next((s for s in found if s.id == name), found[-1])
        for stream in live.request.streams if live.request is not None else ():
            self._frontend.metrics.progressed(stream)
        facts = live.facts()
        facts.code = "running"
        return facts

    def _wall(self, moment: int) -> str:
        ago = (self._frontend.stories.clock() - moment) / 1e9
        return datetime.fromtimestamp(self._frontend.wall() - ago, UTC).isoformat(timespec="milliseconds")


def _stream(stream: Generation, now: float) -> dict[str, Any]:
    return {
        "choice": stream.plan.choice,
        "state": stream.state,
        "worker": stream.worker,
        "seconds": round(now - stream.started_at, 3),
        "prompt_tokens": stream.plan.prompt_length,
        "tokens": stream.count,
        "delivered": stream.delivered,
        "blocked": stream.blocked_since is not None,
        "timeline": [{"at": round(at, 4), "event": event, "detail": detail} for at, event, detail in stream.timeline],
    }


def _number(query: Mapping[str, str], name: str) -> float | None:
    text = query.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise InvalidRequest(f"'{name}' must be a number of at least 0, not '{text[:40]}'.", param=name)
    return value


def _switch(query: Mapping[str, str], name: str) -> bool:
    return query.get(name, "").lower() not in _FALSE
