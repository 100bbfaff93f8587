"""`holdfast explain`: what became of a request. Must never change anything, and never wait long."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import msgspec
import typer

from holdfast.base.errors import HoldfastError
from holdfast.cli.app import parameter, takes_settings
from holdfast.cli.options import Flags, Process
from holdfast.cli.show import paint, table
from holdfast.frontend.config import FrontendConfig
from holdfast.frontend.https import own_client_context
from holdfast.local import http

ANSWER_SECONDS = 3.0
EXIT_UNKNOWN = 1

_PROCESS = Process(("frontend",), lambda _: 0)
_ID = parameter("request_id", Annotated[str, typer.Argument(help="Request id, or the client's x-request-id.")], "")
_URL = parameter(
    "url",
    Annotated[list[str] | None, typer.Option("--url", help="Frontend to ask, http://host:port; may be repeated.")],
    None,
)
_SLOW = parameter(
    "slow", Annotated[float | None, typer.Option("--slow", help="List requests that took so many seconds.")], None
)
_FAILED = parameter("failed", Annotated[bool, typer.Option("--failed", help="List requests that failed.")], False)
_MOVED = parameter("moved", Annotated[bool, typer.Option("--moved", help="List requests that were moved.")], False)
_JSON = parameter("as_json", Annotated[bool, typer.Option("--json", help="JSON, for machines.")], False)


@takes_settings(_PROCESS, _ID, _URL, _SLOW, _FAILED, _MOVED, _JSON)
def command(
    flags: Flags,
    *,
    request_id: str,
    url: list[str] | None,
    slow: float | None,
    failed: bool,
    moved: bool,
    as_json: bool,
) -> int:
    """Tell what became of a request: stages, attempts, workers considered and suspected, when its tokens came.

    Asks the frontend at --http-host and --http-port (or those given by --url), which remembers its latest requests
    (DYN_EXPLAIN_REQUESTS). Without a request id it lists them, newest first; --slow, --failed and --moved select.
    Exits with 0 when it found what was asked for, otherwise with 1.
    """
    config = flags.load(FrontendConfig, "frontend").config
    urls = [one.rstrip("/") for one in url or [f"{config.https.scheme}://{config.http_host}:{config.http_port}"]]
    tls = None if url else own_client_context(config.https)
    wanted = {"slow": slow, "failed": int(failed) or None, "moved": int(moved) or None, "limit": 50}
    query = urlencode({name: value for name, value in wanted.items() if value is not None})
    path = f"/debug/requests/{quote(request_id, safe='')}" if request_id else f"/debug/requests?{query}"
    answers = asyncio.run(_ask_all([one + path for one in urls], tls))
    found = [content for status, content in answers if status == 200]
    if not found:
        for where, (_, content) in zip(urls, answers, strict=True):
            typer.echo(f"{where}: {_why(content)}", err=True)
        return EXIT_UNKNOWN
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found[0] if len(found) == 1 else found), indent=2).decode())
    else:
        for content in found:
            print("\n".join(told(content) if request_id else listed(content.get("finished", []))))
    return 0


async def _ask_all(urls: list[str], tls: ssl.SSLContext | None) -> list[tuple[int, dict[str, Any]]]:
    return await asyncio.gather(*(_ask(url, tls) for url in urls))


async def _ask(url: str, tls: ssl.SSLContext | None) -> tuple[int, dict[str, Any]]:
    try:
        answer = await http.get(url, ANSWER_SECONDS, tls)
        return answer.status, answer.json()
    except HoldfastError as error:
        return 0, {"error": {"message": error.message}}
    except TimeoutError:
        return 0, {"error": {"message": f"no answer within {ANSWER_SECONDS:g} s"}}
    except msgspec.DecodeError:
        return 0, {"error": {"message": "what answers there is no Holdfast frontend"}}


def _why(content: dict[str, Any]) -> str:
    return str(content.get("error", {}).get("message", "no such request"))


def listed(requests: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a list of requests."""
    if not requests:
        yield "no such requests"
        return
    rows = [
        (
            request["id"],
            request["label"] or "-",
            request["arrived"],
            f"{request['seconds']:.3f} s",
            _outcome(request["outcome"]),
            str(request["tokens"]),
            str(request["attempts"]),
        )
        for request in requests
    ]
    yield table([("REQUEST", "LABEL", "ARRIVED", "TOOK", "OUTCOME", "TOKENS", "ATTEMPTS"), *rows])


def told(story: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of one request's story."""
    label = f" (client's label {story['label']})" if story["label"] else ""
    yield f"request {story['id']}{label}"
    yield f"  {story['endpoint']}, {story['request_type']}, model {story['model'] or '-'}, arrived {story['arrived']}"
    yield f"  trace {story['trace_id']}"
    yield f"  {_outcome(story['outcome'])} after {story['seconds']:.3f} s, {story['tokens']} tokens"
    if story["error"]:
        yield f"  {story['error']['message']}"
    yield ""
    yield "stages (of the first choice)"
    for stage in story["stages"]:
        yield f"  {stage['at']:9.4f} s  {stage['stage']:<12} {stage['seconds'] * 1000:10.1f} ms"
    for choice in story["choices"]:
        yield ""
        yield from _choice(choice)
    if story["workers"]:
        yield ""
        yield "what happened to workers meanwhile"
    for change in story["workers"]:
        why = f": {change['cause']}: {change['evidence']}" if change["cause"] else ""
        yield f"  {change['at']:9.4f} s  {change['worker']} became {change['state']}{why}"


def _choice(choice: dict[str, Any]) -> Iterator[str]:
    yield (
        f"choice {choice['choice']}: {choice['state']}{' (' + choice['finish'] + ')' if choice['finish'] else ''}, "
        f"{choice['prompt_tokens']} prompt tokens ({choice['cached_tokens']} cached), {choice['tokens']} generated"
        f"{', join ' + choice['join'] if choice['join'] != 'none' else ''}"
    )
    for attempt in choice["attempts"]:
        yield from _attempt(attempt)
    rhythm = choice["rhythm"]
    if rhythm is None:
        yield "  no token came"
        return
    rate = f", {rhythm['tokens_per_second']:g} tokens/s" if rhythm["tokens_per_second"] else ""
    yield f"  tokens from {rhythm['first_token_at']:.4f} s to {rhythm['last_token_at']:.4f} s{rate}"
    gaps = ", ".join(f"{g['seconds'] * 1000:.1f} ms before token {g['before_token']}" for g in rhythm["longest_gaps"])
    if gaps:
        yield f"  longest gaps: {gaps}"


def _attempt(attempt: dict[str, Any]) -> Iterator[str]:
    times = "".join(
        f", {word} after {attempt[key] * 1000:.1f} ms"
        for key, word in (("accepted_after", "accepted"), ("first_token_after", "first token"))
        if key in attempt
    )
    yield f"  {attempt['at']:9.4f} s  attempt {attempt['attempt']} on worker {attempt['worker']}{times}"
    if attempt["candidates"] > 1:
        names = ", ".join(
            f"{one['worker']}{'*' if one['chosen'] else ''} score {one['score']} ({_reasons(one)})"
            for one in attempt["considered"]
        )
        more = attempt["candidates"] - len(attempt["considered"])
        yield f"              among {attempt['candidates']}: {names}{f' and {more} more' if more else ''}"
    if "failure" in attempt:
        after = f"after {attempt['failed_after'] * 1000:.1f} ms"
        yield f"              {paint('failed', 'red')} {after}: {attempt['failure']}"


def _reasons(one: dict[str, Any]) -> str:
    """What a candidate's score is made of: blocks where caches were asked, requests otherwise."""
    if "overlap_blocks" not in one:
        return f"{one['in_flight']} here + {one['queued']} queued"
    return (
        f"rank {one['rank']}: {one['overlap_blocks']} blocks cached, {one['prefill_blocks']} to compute, "
        f"{one['decode_blocks']} in use"
    )


def _outcome(code: str) -> str:
    return paint(code, "green" if code in ("success", "running") else "red")
