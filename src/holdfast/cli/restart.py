"""`holdfast restart`: replace the processes of a running `holdfast serve` one by one.

Asks the supervisor and watches. Must never stop a process itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import Annotated, Any

import msgspec
import typer

from holdfast.base.errors import NotFound
from holdfast.cli.app import parameter, takes_settings
from holdfast.cli.options import Flags, Process
from holdfast.cli.serve import RESTARTS
from holdfast.frontend.config import FrontendConfig
from holdfast.local.rolling import ROLES, Report, Role
from holdfast.runtime.discovery.contract import SUPERVISOR, Discovery, InstanceRecord
from holdfast.runtime.discovery.factory import open_discovery

_PROCESS = Process(("frontend",), lambda _: 0)
_WHAT = parameter("what", Annotated[str, typer.Argument(help="workers, frontends or all.")], "all")
_TIMEOUT = parameter(
    "timeout", Annotated[float, typer.Option("--timeout", help="Seconds to wait for the whole restart.")], 3600.0
)
_CHOICES: dict[str, tuple[Role, ...]] = {"workers": ("worker",), "frontends": ("frontend",), "all": ROLES}
_LOOK_SECONDS = 0.1
_FIND_SECONDS = 3.0


@takes_settings(_PROCESS, _WHAT, _TIMEOUT)
def command(flags: Flags, *, what: str, timeout: float) -> int:
    """Replace the processes of the `holdfast serve` of this machine and namespace, one by one.

    Each worker finishes what it can, hands the rest over to the others, and the next one is not touched before the
    new one is used by every frontend; frontends on one port likewise. No request fails, as long as streams end within
    a frontend's grace (--http-graceful-shutdown-timeout-secs of `serve`). Exits with 0 when everything was replaced,
    with 1 when it stopped on the way; what was not replaced yet still runs then.
    """
    if what not in _CHOICES:
        print(f"holdfast: restart what? One of {', '.join(_CHOICES)}, not {what!r}.", file=sys.stderr)
        return 2
    config = flags.load(FrontendConfig, "frontend").config
    discovery = open_discovery(config.discovery_backend, root=config.file_kv)
    try:
        return asyncio.run(_restart(discovery, config.namespace, _CHOICES[what], timeout))
    except TimeoutError:
        print(f"holdfast: the restart did not end within {timeout:g} s; it may still go on.", file=sys.stderr)
        return 1


async def _restart(discovery: Discovery, namespace: str, roles: tuple[Role, ...], timeout: float) -> int:  # noqa: ASYNC109
    async with asyncio.timeout(timeout):
        await discovery.start()
        try:
            record = await _supervisor(discovery, namespace)
            number = next(number for number, asked in RESTARTS.items() if asked == roles)
            before = _report(record).number
            os.kill(record.pid, number)
            reports = []
            for following in range(len(roles)):
                reports.append(await _ended(discovery, record.instance, before + 1 + following))
                if reports[-1].error:
                    break
        finally:
            await discovery.close()
    for report in reports:
        state = f"stopped: {report.error}" if report.error else "done"
        print(f"{report.role}s: {report.replaced} of {report.of} replaced, {state}")
    return 1 if any(report.error for report in reports) else 0


async def _supervisor(discovery: Discovery, namespace: str) -> InstanceRecord:
    """Return the record of the one supervisor. Raises NotFound when there is none, or several."""
    found: list[InstanceRecord] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_FIND_SECONDS):
            while not found:
                found = [r for r in discovery.snapshot() if r.component == SUPERVISOR and r.namespace == namespace]
                await asyncio.sleep(0 if found else _LOOK_SECONDS)
    if len(found) != 1:
        pids = ", ".join(str(r.pid) for r in found)
        raise NotFound(
            f"There is no 'holdfast serve' in namespace {namespace!r} here."
            if not found
            else f"There are several 'holdfast serve' (pids {pids}); send SIGHUP to the one you mean."
        )
    return found[0]


async def _ended(discovery: Discovery, instance: str, number: int) -> Report:
    """Wait until so many restarts have ended; prints what is under way."""
    shown = ""
    while True:
        record = next((r for r in discovery.snapshot() if r.instance == instance), None)
        if record is None:
            raise NotFound("The 'holdfast serve' that was restarting has gone.")
        if _report(record).number >= number:
            return _report(record)
        under_way = str(record.meta.get("rolling.under_way", ""))
        if under_way and under_way != shown:
            shown = under_way
            print(f"restarting {under_way} …", flush=True)
        await asyncio.sleep(_LOOK_SECONDS)


def _report(record: InstanceRecord) -> Report:
    facts: dict[str, Any] = {k.removeprefix("rolling."): v for k, v in record.meta.items() if k.startswith("rolling.")}
    return msgspec.convert(facts, Report)
