"""A real fleet, scraped by a real Prometheus, whose alerts a real Alertmanager brings to a webhook."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from holdfast.local.backoff import RestartPolicy
from tests.e2e.support import Cluster, cluster
from tests.observability.binaries import HERE, ROOT, binary
from tests.observability.stack import Stack, running
from tests.support.promtool import complaints

sys.path.insert(0, str(ROOT / "tools"))
import dashboards

pytestmark = [pytest.mark.operations, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

AWAY = RestartPolicy(first_delay=8.0, next_delay=8.0, factor=1.0, intensity=1000)
"""A killed worker stays away long enough to be missed."""
CANARIES = {"DYN_HEALTH_CHECK_ENABLED": "true", "DYN_CANARY_WAIT_TIME": "1", "DYN_HEALTH_CHECK_REQUEST_TIMEOUT": "2"}
ALL = {"instance": ".*", "model": ".*", "worker": ".*", "__rate_interval": "1m"}


class Fleet(NamedTuple):
    cluster: Cluster
    stack: Stack


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """Two mock workers and a frontend, found through discovery by targets.py, watched by the committed rules."""
    root = tmp_path_factory.mktemp("operations")
    home = tmp_path_factory.mktemp("fleet")
    async with running(root) as stack, cluster(home, restart=AWAY, env=CANARIES) as found:
        with followed(found, root):
            await until(lambda: scraped(stack), "every target is scraped")
            yield Fleet(found, stack)


@contextlib.contextmanager
def followed(found: Cluster, root: Path) -> Any:
    """Run targets.py, so that Prometheus learns of workers as they come and go."""
    store = found.local.plan.env["DYN_FILE_KV"]
    argv = [sys.executable, str(HERE / "targets.py"), "--frontend", f"127.0.0.1:{found.port}"]
    argv += ["--write", str(root / "targets"), "--every", "0.5", "--file-kv", store]
    with (root / "targets.log").open("w") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env=os.environ)
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(10)


async def until(condition: Callable[[], Awaitable[Any]], what: str, within: float = 60.0) -> Any:
    """Wait for a condition of other processes; returns its first true value."""
    try:
        async with asyncio.timeout(within):
            while not (value := await condition()):  # noqa: ASYNC110  other processes have no event to wait for
                await asyncio.sleep(0.2)
            return value
    except TimeoutError:
        raise AssertionError(f"not within {within:g} s: {what}") from None


async def scraped(stack: Stack) -> bool:
    return await stack.value('sum(up{job=~"holdfast-.*"})') == 3


async def ask(fleet: Fleet, tokens: int = 60, **more: Any) -> str:
    """Stream one answer to its end; returns its text."""
    stream = await fleet.cluster.client.completions.create(
        model=fleet.cluster.model, prompt="tell me", max_tokens=tokens, stream=True, **more
    )
    return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])


async def leave_early(fleet: Fleet) -> None:
    """Ask for a long answer and hang up after the first tokens."""
    stream = await fleet.cluster.client.completions.create(
        model=fleet.cluster.model, prompt="tell me", max_tokens=4000, stream=True
    )
    async for _ in stream:
        break
    await stream.close()


async def busiest(found: Cluster) -> str:
    """Return the instance that most streams are at."""
    requests = (await found.get("/debug/requests"))["requests"]
    workers = [s["worker"] for r in requests for s in r["streams"] if s["delivered"]]
    return max(set(workers), key=workers.count) if workers else ""


def queries() -> list[tuple[str, bool, str]]:
    """Return (dashboard: panel, may be empty, PromQL) of every target of every committed dashboard."""
    sparse = {(b.title, p.title): p.sparse for b in dashboards.DASHBOARDS for row in b.rows.values() for p in row}
    found = []
    for path in sorted((HERE / "grafana").glob("*.json")):
        board = json.loads(path.read_text(encoding="utf-8"))
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                expr = re.sub(r"\$\{?(\w+)\}?", lambda m: ALL[m.group(1)], target["expr"])
                found.append((f"{board['title']}: {panel['title']}", sparse[board["title"], panel["title"]], expr))
    return found


async def test_a_healthy_fleet_is_quiet(fleet: Fleet) -> None:
    """Although every ``for:`` is a second here. A late event loop is left out: the machine may be that busy."""
    await asyncio.gather(*(ask(fleet) for _ in range(4)))

    async def quiet() -> bool:
        seen = await fleet.stack.value("sum(dynamo_frontend_requests_total)") == 4
        firing = await fleet.stack.query(
            'count by (alertname) (ALERTS{alertname!~"HoldfastFrontendSlow|HoldfastJudgingLate"})'
        )
        return seen and [one["metric"]["alertname"] for one in firing] == ["HoldfastWatchdog"]

    await until(quiet, "only the watchdog fires")


async def test_metrics_are_well_formed_after_traffic_and_a_move(fleet: Fleet) -> None:
    """Also brings about what the dashboards have to show: answers, a client that left, a worker that died."""
    await asyncio.gather(*(ask(fleet) for _ in range(6)), leave_early(fleet))
    asking = [asyncio.ensure_future(ask(fleet, 400)) for _ in range(4)]
    victim = await until(lambda: busiest(fleet.cluster), "a stream has begun", 10)
    fleet.cluster.kill(victim)
    assert all(await asyncio.gather(*asking))
    await fleet.cluster.usable()
    await asyncio.gather(*(ask(fleet) for _ in range(4)))
    for job in ("holdfast-frontend", "holdfast-worker"):
        targets = await until(lambda job=job: fleet.stack.query(f'up{{job="{job}"}} == 1'), f"{job} is up")
        for target in targets:
            answer = await fleet.cluster.http.get(f"http://{target['metric']['instance']}/metrics")
            assert answer.content.strip(), f"{job} shows no metrics"
            assert complaints(answer.content, binary("promtool")) == []


async def test_every_rule_can_be_evaluated(fleet: Fleet) -> None:
    async def evaluated() -> list[dict[str, Any]]:
        rules = await fleet.stack.rules()
        return rules if all(rule["health"] != "unknown" for rule in rules) else []

    rules = await until(evaluated, "all rules were evaluated")
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []


async def test_every_panel_has_something_to_show(fleet: Fleet) -> None:
    async def shown() -> bool:
        moved = await fleet.stack.query("sum(rate(dynamo_frontend_model_migration_total[1m]))")
        budget = await fleet.stack.query("holdfast:slo_budget_left:ratio == holdfast:slo_budget_left:ratio")
        return bool(moved) and len(budget) == 3

    await until(shown, "the move and the objectives have reached Prometheus")
    empty = []
    for panel, sparse, expr in queries():
        result = await fleet.stack.query(expr)
        if not result and not sparse:
            empty.append((panel, expr))
        await fleet.stack.over_time(expr, time.time() - 60, time.time())
    assert empty == []


async def test_a_frozen_worker_becomes_a_ticket(fleet: Fleet) -> None:
    await fleet.cluster.usable()
    victim = next(iter(await fleet.cluster.instances()))
    async with fleet.cluster.frozen(victim):
        alert = await until(lambda: told(fleet, "/ticket", "firing", "HoldfastWorkerOut"), "a frozen worker is noticed")
    assert alert["labels"]["severity"] == "warning"
    assert (ROOT / alert["annotations"]["runbook"]).is_file()
    await fleet.cluster.usable()
    await until(lambda: told(fleet, "/ticket", "resolved", "HoldfastWorkerOut"), "its return is told")


async def test_an_engine_that_hangs_while_idle_becomes_a_ticket(fleet: Fleet) -> None:
    await fleet.cluster.usable()
    victim = next(iter(await fleet.cluster.instances()))
    async with fleet.cluster.peer(victim) as worker:
        await worker.tell("hang")
        alert = await until(lambda: told(fleet, "/ticket", "firing", "HoldfastCanaryFailing"), "its canaries fail")
        await worker.tell("unhang")
    assert alert["labels"]["worker_id"] == victim
    await until(lambda: told(fleet, "/ticket", "resolved", "HoldfastCanaryFailing"), "its return is told")


async def test_killing_all_workers_calls_the_pager_and_their_return_is_told(fleet: Fleet) -> None:
    await fleet.cluster.usable()
    assert not await told(fleet, "/page", "firing", "HoldfastNoUsableWorker")
    for instance in await fleet.cluster.instances():
        fleet.cluster.kill(instance)
    alert = await until(lambda: told(fleet, "/page", "firing", "HoldfastNoUsableWorker"), "the pager is called")
    assert alert["labels"]["severity"] == "critical"
    assert alert["labels"]["instance"] == f"127.0.0.1:{fleet.cluster.port}"
    assert "no usable worker" in alert["annotations"]["summary"]
    assert (ROOT / alert["annotations"]["runbook"]).is_file()
    await fleet.cluster.usable()
    await until(lambda: told(fleet, "/page", "resolved", "HoldfastNoUsableWorker"), "the return is told")


async def test_the_dead_mans_switch_is_fed(fleet: Fleet) -> None:
    await until(lambda: told(fleet, "/alive", "firing", "HoldfastWatchdog"), "the watchdog arrives")


async def told(fleet: Fleet, path: str, status: str, name: str) -> dict[str, Any] | None:
    return fleet.stack.webhook.alerts(path, status).get(name)
