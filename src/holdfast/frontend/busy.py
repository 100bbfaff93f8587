"""GET and POST /busy_threshold: the thresholds in force, per model, changed while the fleet runs.

Shapes and error texts are those of the reference (fault tolerance, 1.3), with what it lacks: an explicit null clears a
threshold, a field that does not exist is an error, and a change is in force at once and reaches all frontends.

Must never decide who is turned away.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from holdfast.routing.saturation import THRESHOLD_NAMES, ThresholdName
from holdfast.routing.thresholds import Value

if TYPE_CHECKING:
    from holdfast.frontend.app import Frontend

log = logging.getLogger(__name__)

BODY_BYTES = 64 * 1024


class _Change(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a POST; a field that is absent stays as it is."""

    model: str
    active_decode_blocks_threshold: float | msgspec.UnsetType | None = msgspec.UNSET
    active_prefill_tokens_threshold: int | msgspec.UnsetType | None = msgspec.UNSET
    active_prefill_tokens_threshold_frac: float | msgspec.UnsetType | None = msgspec.UNSET


class _Refused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
        self.message = message


def busy_routes(frontend: Frontend) -> list[Route]:
    """Return the routes; none when the admin API is switched off (`DYN_DISABLE_FRONTEND_ADMIN_API`)."""
    if frontend.config.disable_admin_api:
        return []
    return [Route("/busy_threshold", _BusyThreshold(frontend).serve, methods=["GET", "POST"])]


class _BusyThreshold:
    def __init__(self, frontend: Frontend):
        self._frontend = frontend
        self._book = frontend.services.thresholds

    async def serve(self, request: Request) -> Response:
        """Answer one request."""
        if request.method != "POST":
            return _answer(200, {"thresholds": [self._shown(name) for name in sorted(set(self._names().values()))]})
        try:
            change = _decode(request.headers.get("content-type", ""), await self._body(request))
            name = self._name(change.model)
            self._set(name, _changes(change))
        except _Refused as refused:
            return _answer(refused.status, {"error": refused.message})
        return _answer(200, {**self._shown(name), "model": change.model})

    def _names(self) -> dict[str, str]:
        """Return the models' own names by every name that clients may use."""
        return {name: cards[0].name for name, cards in self._frontend.pool.models().items()}

    def _name(self, wanted: str) -> str:
        name = self._names().get(wanted)
        if name is None:
            raise _Refused(404, f"Model '{wanted}' not found. Thresholds can only be set for discovered models.")
        return name

    def _shown(self, name: str) -> dict[str, Any]:
        return {"model": name, **msgspec.structs.asdict(self._book.of(name))}

    async def _body(self, request: Request) -> bytes:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > BODY_BYTES:
                raise _Refused(413, f"The body is over {BODY_BYTES} bytes.")
        return body

    def _set(self, name: str, changes: dict[ThresholdName, Value]) -> None:
        if not changes:
            return
        before = self._book.of(name)
        self._book.set(name, changes)
        self._frontend.thresholds_changed()
        log.info("thresholds of model %s: %s -> %s", name, _plain(before), _plain(self._book.of(name)))
        if changes.get("active_decode_blocks_threshold") is not None:
            self._warn_of_blind(name)

    def _warn_of_blind(self, name: str) -> None:
        """A threshold on a signal that never moves protects nobody: say so."""
        for worker in self._frontend.pool.workers(name):
            card = worker.card(name)
            if worker.pong is not None and not worker.load.kv_total_blocks and not (card and card.total_kv_blocks):
                log.warning(
                    "worker %s reports no KV blocks: active_decode_blocks_threshold can never stop work for it",
                    worker.instance,
                )


def _decode(content_type: str, body: bytes) -> _Change:
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise _Refused(415, "Expected request with `Content-Type: application/json`")
    try:
        return msgspec.json.decode(body, type=_Change)
    except msgspec.ValidationError as error:
        raise _Refused(422, f"Failed to deserialize the JSON body into the target type: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _Refused(400, f"Failed to parse the request body as JSON: {error}") from error


def _changes(change: _Change) -> dict[ThresholdName, Value]:
    found: dict[ThresholdName, Value] = {}
    for name in THRESHOLD_NAMES:
        value = getattr(change, name)
        if value is not msgspec.UNSET:
            _check(name, value)
            found[name] = value
    return found


def _check(name: ThresholdName, value: Value) -> None:
    if value is None:
        return
    if name == "active_decode_blocks_threshold" and not 0.0 <= value <= 1.0:
        raise _Refused(400, f"{name} must be between 0.0 and 1.0, got {value}")
    if value < 0:
        raise _Refused(422 if isinstance(value, int) else 400, f"{name} must be non-negative, got {value}")


def _plain(thresholds: Any) -> str:
    return ", ".join(
        f"{key.removeprefix('active_')}={value}" for key, value in msgspec.structs.asdict(thresholds).items()
    )


def _answer(status: int, content: Any) -> Response:
    return Response(msgspec.json.encode(content), status, headers={"content-type": "application/json"})
