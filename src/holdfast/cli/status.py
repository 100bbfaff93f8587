"""`holdfast status`: who is there, in what state. Must never change anything, and never wait long."""

from __future__ import annotations

import asyncio
import ssl
from typing import Annotated, Any

import msgspec
import typer

from holdfast.base.errors import HoldfastError
from holdfast.cli.app import parameter, takes_settings
from holdfast.cli.options import Flags, Process
from holdfast.cli.show import paint, state_colour, table
from holdfast.frontend.config import FrontendConfig
from holdfast.frontend.https import own_client_context
from holdfast.local import http
from holdfast.runtime.discovery.contract import SUPERVISOR, Discovery, InstanceRecord
from holdfast.runtime.discovery.factory import open_discovery

ANSWER_SECONDS = 3.0


class FrontendStatus(msgspec.Struct, frozen=True):
    """What one frontend says of itself. ``status``: as in its /health, or ``unreachable``."""

    url: str
    status: str
    detail: str = ""
    models: dict[str, int] = {}
    """Usable workers by model."""
    instances: list[dict[str, Any]] = []
    """Workers as this frontend sees them."""
    prefill: dict[str, int] = {}
    """Usable workers that compute prompts only, by model."""


class Status(msgspec.Struct, frozen=True):
    """What ``--json`` prints."""

    discovery_reachable: bool
    frontends: list[FrontendStatus]
    workers: list[InstanceRecord]
    supervisors: list[InstanceRecord]


_PROCESS = Process(("frontend",), lambda _: 0)
_URL = parameter(
    "url",
    Annotated[list[str] | None, typer.Option("--url", help="Frontend to ask, http://host:port; may be repeated.")],
    None,
)
_JSON = parameter("as_json", Annotated[bool, typer.Option("--json", help="JSON, for machines.")], False)


@takes_settings(_PROCESS, _URL, _JSON)
def command(flags: Flags, *, url: list[str] | None, as_json: bool) -> int:
    """Show who is there, and in what state.

    Reads discovery and asks the frontend at --http-host and --http-port (or those given by --url) how it sees the
    workers. Exits with 0 when at least one frontend can serve a model, otherwise with 1.
    """
    config = flags.load(FrontendConfig, "frontend").config
    urls = url or [f"{config.https.scheme}://{config.http_host}:{config.http_port}"]
    tls = None if url else own_client_context(config.https)
    discovery = open_discovery(config.discovery_backend, root=config.file_kv)
    status = asyncio.run(_look(discovery, config.namespace, urls, tls))
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(status), indent=2).decode())
    else:
        _print(status)
    return 0 if any(any(f.models.values()) for f in status.frontends) else 1


async def _look(discovery: Discovery, namespace: str, urls: list[str], tls: ssl.SSLContext | None) -> Status:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            await discovery.start()
        records = [r for r in discovery.snapshot() if r.namespace == namespace]
        reachable = discovery.reachable
    except TimeoutError:
        records, reachable = [], False
    finally:
        await discovery.close()
    frontends = await asyncio.gather(*(_ask(url.rstrip("/"), tls) for url in urls))
    workers = [r for r in records if r.component != SUPERVISOR and r.endpoints]
    return Status(reachable, frontends, workers, [r for r in records if r.component == SUPERVISOR])


async def _ask(url: str, tls: ssl.SSLContext | None) -> FrontendStatus:
    try:
        answer = await http.get(f"{url}/health", ANSWER_SECONDS, tls)
        health = answer.json()
    except HoldfastError as error:
        return FrontendStatus(url, "unreachable", error.message)
    except TimeoutError:
        return FrontendStatus(url, "unreachable", f"no answer within {ANSWER_SECONDS:g} s")
    except msgspec.DecodeError:
        return FrontendStatus(url, "unreachable", f"what answers there is no Holdfast frontend (HTTP {answer.status})")
    return FrontendStatus(
        url,
        health.get("status", "?"),
        health.get("message", ""),
        health.get("models", {}),
        health.get("instances", []),
        health.get("prefill", {}),
    )


def _print(status: Status) -> None:
    for frontend in status.frontends:
        colour = "green" if frontend.status == "healthy" else "red"
        print(f"frontend {frontend.url}: {paint(frontend.status, colour)}  {frontend.detail}".rstrip())
        for model, usable in frontend.models.items():
            apart = f", {frontend.prefill[model]} for prompts" if model in frontend.prefill else ""
            print(f"  model {model}: {usable} usable worker{'s' if usable != 1 else ''}{apart}")
    for record in status.supervisors:
        slots = "  ".join(
            f"{slot} {paint(str(state), _slot_colour(str(state)))}"
            for slot, state in record.meta.items()
            if "." not in slot
        )
        under_way = record.meta.get("rolling.under_way")
        slots += f"  (restarting {under_way})" if under_way else ""
        print(f"supervisor: {slots}")
    if not status.discovery_reachable:
        print(paint("discovery cannot be reached: what follows is the last view", "yellow"))
    if status.workers:
        print(
            table(
                [
                    (
                        "WORKER",
                        "STATE",
                        "AS SEEN BY FRONTENDS",
                        "KV CACHE",
                        "ROLE",
                        "PID",
                        "ADDRESS",
                        "ENGINE",
                        "MODELS",
                    ),
                    *_rows(status),
                ]
            )
        )
        for worker, problem in _problems(status):
            print(f"worker {worker}: {paint(problem, 'yellow')}")
    else:
        print("no workers in discovery")


def _problems(status: Status) -> list[tuple[str, str]]:
    """Return why workers are not used, each reason once."""
    found = {
        (str(instance.get("instance_id")), str(instance["problem"])): None
        for frontend in status.frontends
        for instance in frontend.instances
        if instance.get("problem")
    }
    return list(found)


def _rows(status: Status) -> list[tuple[str, ...]]:
    seen: dict[str, set[str]] = {}
    known: dict[str, set[str]] = {}
    for frontend in status.frontends:
        for instance in frontend.instances:
            seen.setdefault(str(instance.get("instance_id")), set()).add(str(instance.get("state")))
            known.setdefault(str(instance.get("instance_id")), set()).add(_cache(instance.get("kv") or {}))
    return [
        (
            record.instance,
            paint(record.state, state_colour(record.state)),
            ", ".join(sorted(seen.get(record.instance, {"-"}))),
            ", ".join(sorted(known.get(record.instance, {"-"}))),
            ", ".join(sorted({card.role for card in record.cards})) or "-",
            str(record.pid or "-"),
            record.address,
            ", ".join(sorted({card.engine for card in record.cards})) or "-",
            ", ".join(card.name for card in record.cards) or "-",
        )
        for record in status.workers
    ]


def _cache(known: dict[str, Any]) -> str:
    """Return how well a frontend knows a worker's KV cache, and how many blocks are in it."""
    state = str(known.get("state", "none"))
    return f"{state} ({known.get('blocks', 0)} blocks)" if state in ("exact", "resynchronising") else state


def _slot_colour(state: str) -> str:
    return {"running": "green", "restarting": "yellow"}.get(state, "red")
