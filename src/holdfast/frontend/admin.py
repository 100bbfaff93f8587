"""Everything that is not generation: models, health, metrics, debugging, the API's description.

Must never be on the token path.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from holdfast import __version__
from holdfast.base.errors import HoldfastError, InternalError, InvalidRequest, ModelNotFound, NotFound
from holdfast.frontend.busy import busy_routes
from holdfast.frontend.debugging import Debugging
from holdfast.openai.docs import docs_page
from holdfast.openai.encode import model_object, models_list
from holdfast.openai.errors import error_response
from holdfast.openai.schema import openapi

if TYPE_CHECKING:
    from holdfast.frontend.app import Frontend

_json = msgspec.json.Encoder(enc_hook=str).encode


def make_admin(frontend: Frontend) -> Starlette:
    """Return the application that serves all routes but the hot ones."""
    routes = _Routes(frontend)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", _Asgi(frontend.generate.chat), methods=["POST"]),
            Route("/v1/completions", _Asgi(frontend.generate.completion), methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/health", routes.health),
            Route("/live", routes.live),
            Route("/metrics", routes.metrics),
            Route("/openapi.json", routes.openapi),
            Route("/docs", routes.docs),
            *busy_routes(frontend),
            Route("/debug/requests", routes.requests),
            Route("/debug/requests/{name:path}", routes.request),
        ],
        exception_handlers={HTTPException: _http_error, HoldfastError: _holdfast_error, Exception: _fault},
    )


class _Asgi:
    """A hot route as Starlette knows routes: it gets here with a wrong method only."""

    def __init__(self, app: Callable[[Any, Any, Any], Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        await self._app(scope, receive, send)


class _Routes:
    def __init__(self, frontend: Frontend):
        self._frontend = frontend
        self._debugging = Debugging(frontend)
        self._since = int(frontend.wall())  # presentation only: OpenAI's `created`

    async def models(self, _request: Request) -> Response:
        cards = {m.card.name: m.card for m in self._frontend.registry.served().values()}
        return _body(models_list([(card, self._since) for card in cards.values()]))

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        served = self._frontend.registry.served().get(name)
        if served is None:
            raise ModelNotFound(f"The model '{name}' does not exist here.", param="model")
        return _body(model_object(served.card, self._since, name))

    async def health(self, _request: Request) -> Response:
        pool = self._frontend.pool
        records = [w.record for w in pool.all_workers()]
        usable = {name: len(pool.usable(name)) for name in pool.models()}
        endpoints = sorted({f"dyn://{r.namespace}.{r.component}.{e}" for r in records for e in r.endpoints})
        healthy = any(usable.values()) and not self._frontend.draining
        state = "healthy" if healthy else ("not_ready" if self._frontend.draining else "unhealthy")
        content = {
            "status": state,
            "message": _why(state),
            "stage": self._frontend.stage,
            "endpoints": endpoints,
            "instances": [
                {
                    "component": w.record.component,
                    "endpoint": "prefill" if w.role == "prefill" else "generate",
                    "namespace": w.record.namespace,
                    "instance_id": w.instance,
                    "transport": {"tcp": w.record.address},
                    "state": w.standing,
                    "lifecycle": w.lifecycle,
                    "draining": w.draining,
                    "role": w.role,
                    "problem": w.trouble,
                    "models": [card.name for card in w.record.cards],
                    "pid": w.record.pid,
                    "kv": msgspec.to_builtins(self._frontend.knowledge.status_of(w.instance)),
                }
                for w in pool.all_workers()
            ],
            "models": usable,
            "prefill": {name: len(pool.prefill(name)) for name in usable if pool.has_prefill(name)},
        }
        return _body(_json(content), 200 if healthy else 503)

    async def live(self, _request: Request) -> Response:
        if self._frontend.stage == "stopping":
            return _body(b'{"status":"shutting_down","message":"Service is shutting down"}', 503)
        return _body(b'{"status":"live","message":"Service is live"}')

    async def metrics(self, _request: Request) -> Response:
        return Response(self._frontend.gauges.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def openapi(self, _request: Request) -> Response:
        return _body(self._openapi())

    async def docs(self, _request: Request) -> Response:
        return HTMLResponse(docs_page(self._openapi()))

    def _openapi(self) -> bytes:
        return openapi(__version__, api_keys=bool(self._frontend.config.api_keys_file))

    async def requests(self, request: Request) -> Response:
        return _body(_json(self._debugging.requests(request.query_params)))

    async def request(self, request: Request) -> Response:
        return _body(_json(self._debugging.request(request.path_params["name"])))


def _why(state: str) -> str:
    if state == "healthy":
        return "at least one usable worker serves a model"
    if state == "not_ready":
        return "this frontend is draining"
    return "no usable worker serves any model; see 'instances' for who is known and in what state"


def _body(content: bytes, status: int = 200) -> Response:
    return Response(content, status, headers={"content-type": "application/json"})


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = {"content-type": "application/json"}
    if status == 405:
        allowed = dict(getattr(error, "headers", None) or {}).get("Allow", "")
        headers["allow"] = f"{allowed}, OPTIONS"
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"allow": headers["allow"]})
        wrong: HoldfastError = InvalidRequest(
            f"{request.method} is not what {request.url.path} is for; it takes {allowed}. See /docs."
        )
    else:
        wrong = NotFound(f"There is nothing at {request.url.path}; see /docs for what there is.")
    return Response(error_response(wrong).body, status, headers=headers)


async def _fault(_request: Request, _error: Exception) -> Response:
    """The server logs what happened."""
    answer = error_response(InternalError("The request failed because of a fault in Holdfast."))
    return Response(answer.body, answer.status, headers={"content-type": "application/json"})


async def _holdfast_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HoldfastError)
    answer = error_response(error)
    return Response(answer.body, answer.status, headers={"content-type": "application/json"})
