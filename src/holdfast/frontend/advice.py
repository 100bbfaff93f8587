"""Asks a stand-alone router where a request should go, and goes on without it when it does not answer.

The advice is a wish: the frontend's own admission, health and conditions come first, and a stream that has begun moves
by what the frontend knows itself. So a router that dies, hangs or errs costs a request `timeout` at most, once, and no
stream: tokens never pass through it. The routers of a component are asked in one order by all frontends, so that one of
them sees the requests of all; whoever fails is left out for a while (`runtime.inhibition`).

Must never fail a request, and never wait longer than the bound.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any, Literal, get_args

import msgspec

from holdfast.base.errors import DeadlineExceeded, HoldfastError, WorkerStalled
from holdfast.requests.chain import Chain
from holdfast.requests.plan import Plan
from holdfast.runtime.client import Client
from holdfast.runtime.pool import Worker, WorkerPool
from holdfast.telemetry.metric import Registry

ENDPOINT = "best_worker_id"
Outcome = Literal["taken", "nobody", "late", "refused", "failed"]
"""``taken``: it named a worker; ``nobody``: no router is there; ``refused``: it knows no worker for this."""


class _Best(msgspec.Struct, frozen=True):
    """What is wanted of the answer."""

    worker_id: str
    dp_rank: int | None = None


class Advisor:
    """See the module.

    Args:
        pool: routers and workers.
        path: namespace and component of the routers.
        rng: for request ids.
        timeout: seconds that a request may wait for advice, all routers together.
        registry: where outcomes are counted.
    """

    def __init__(
        self, pool: WorkerPool, path: tuple[str, str], rng: random.Random, *, timeout: float, registry: Registry
    ):
        self._pool, self._path, self._timeout = pool, path, timeout
        self._client = Client(pool, (*path, ENDPOINT), rng, accept_timeout=timeout)
        asked = registry.counter("holdfast_frontend_router_advice_total")
        self._outcomes = {outcome: asked.labels(outcome) for outcome in get_args(Outcome)}

    async def advise(self, plans: list[Plan]) -> list[Plan]:
        """Return the plans of a request with what a router says about them; choices of one prompt go together."""
        advised: dict[bytes, Plan] = {}
        for plan in plans:
            if plan.prompt_ids not in advised:
                advised[plan.prompt_ids] = await self._advise(plan)
        return [_like(plan, advised[plan.prompt_ids]) for plan in plans]

    async def _advise(self, plan: Plan) -> Plan:
        route = plan.route
        if route.worker or route.session:  # it knows where it wants to go
            return plan
        card = next((c for w in self._pool.workers(plan.model) if (c := w.card(plan.model)) is not None), None)
        if card is None or card.block_size < 1:
            return plan
        best, outcome = await self._ask(_question(plan, card.block_size))
        self._outcomes[outcome].inc()
        if best is None:
            return plan
        rank = best.dp_rank if route.rank is None and card.data_parallel_size > 1 else route.rank
        return msgspec.structs.replace(plan, route=msgspec.structs.replace(route, advised=best.worker_id, rank=rank))

    async def _ask(self, question: dict[str, Any]) -> tuple[_Best | None, Outcome]:
        """Ask one router after the other, within the bound."""
        routers = self._routers()
        outcome: Outcome = "nobody"
        asked: Worker | None = None
        try:
            async with asyncio.timeout(self._timeout):
                for asked in routers:
                    try:
                        return await self._answer(asked, question), "taken"
                    except HoldfastError as error:
                        outcome = "refused" if error.fault in ("capacity", "request", "caller") else "failed"
                        asked.report_failure(error)
        except TimeoutError:
            outcome = "late"
            if asked is not None:
                bound = f"{self._timeout * 1e3:g} ms (DYN_ROUTER_ASK_TIMEOUT_MS)"
                late = WorkerStalled(f"router {asked.instance} did not answer within {bound}", worker=asked.instance)
                asked.report_failure(late)
        return None, outcome

    def _routers(self) -> list[Worker]:
        """Return those that may be asked, in an order that all frontends share."""
        namespace, component = self._path
        found = [
            worker
            for worker in self._pool.all_workers()
            if worker.record.component == component
            and worker.record.namespace == namespace
            and ENDPOINT in worker.record.endpoints
            and worker.eligible
            and not worker.inhibited
        ]
        return sorted(found, key=lambda worker: worker.instance)

    async def _answer(self, router: Worker, question: dict[str, Any]) -> _Best:
        async with await self._client.direct(question, router.instance) as answers:
            async for answer in answers:
                router.report_success()
                return msgspec.convert(answer, _Best)
        raise DeadlineExceeded(f"router {router.instance} ended without an answer", stage="advice")


def _question(plan: Plan, block_size: int) -> dict[str, Any]:
    """Ask by the names of the blocks: a sixteenth of the tokens' bytes or less, and no tokens leave this process."""
    route = plan.route
    hashes = Chain(plan.prompt_ids, plan.cache_salt, plan.lora).of(block_size)
    constraints = {"required": sorted(route.required), "preferred": dict(route.preferred)}
    return {
        "model": plan.model,
        "block_hashes": hashes.tobytes(),
        "block_size": block_size,
        "length": plan.prompt_length,
        "reserve": True,
        "dp_rank": route.rank,
        "router": {
            **route.weights,
            "allowed_worker_ids": sorted(route.allowed),
            "routing_constraints": constraints,
        },
    }


def _like(plan: Plan, advised: Plan) -> Plan:
    return plan if plan.route is advised.route else msgspec.structs.replace(plan, route=advised.route)
