"""Replays a trace on the virtual clock, through production frontends, routers and workers with mock engines.

Must never touch a real clock or socket.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from holdfast.replay.arrivals import Arrivals
from holdfast.replay.inprocess import SimDriver
from holdfast.replay.prompts import Prompts
from holdfast.replay.record import Recording
from holdfast.replay.run import REQUEST_SECONDS, replay
from holdfast.replay.simulated import ReplayCluster, Settings, new_world, run_world
from holdfast.replay.trace import TraceRequest


def replay_offline(
    requests: Iterable[TraceRequest],
    settings: Settings,
    arrivals: Arrivals,
    prompts: Prompts,
    *,
    seed: int = 1,
    patience: float = REQUEST_SECONDS,
) -> Recording:
    """Start a simulated cluster, send it all requests, and return what happened when the last one is over.

    Args:
        requests: read one at a time.
        settings: of the cluster.
        arrivals: when they are sent.
        prompts: makes the prompts.
        seed: the same one gives the same result.
        patience: virtual seconds that one request may take.

    Raises:
        BadTrace: a bad line.
    """

    async def main() -> Recording:
        cluster.start()
        await cluster.until_in_use()
        driver = SimDriver(cluster, prompts)
        rng = random.Random(seed)
        clients = cluster.clients
        work = replay(requests, driver, arrivals, rng, patience=patience)
        return await clients.spawn(work, "replay")

    with new_world(seed) as world:
        cluster = ReplayCluster(world, settings)
        return run_world(world, main(), "replay")
