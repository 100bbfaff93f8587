"""Bugs that are planted into real processes, to learn whether those who judge them would notice.

Each changes loaded production code of the process that plants it, by the name in ``FAULTS_BUG``. The simulation has a
long catalogue of its own; these few prove that the same oracles see as well through sockets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec


def _seed_lost() -> None:
    """A worker that goes on with a stream draws with another seed."""
    from holdfast.engines.mock.engine import MockEngine  # noqa: PLC0415

    submit = MockEngine.submit

    def lost(self: Any, key: Any, request: Any) -> None:
        if request.generated_ids and request.sampling.seed is not None:
            sampling = msgspec.structs.replace(request.sampling, seed=request.sampling.seed + 1)
            request = msgspec.structs.replace(request, sampling=sampling)
        submit(self, key, request)

    MockEngine.submit = lost  # type: ignore[method-assign]


def _cancel_ignored() -> None:
    """An engine goes on with what nobody wants any more."""
    from holdfast.worker.host import EngineHost  # noqa: PLC0415

    make = EngineHost.__init__

    def made(self: Any, engine: Any, *args: Any, **how: Any) -> None:
        engine.cancel = lambda _key: None
        make(self, engine, *args, **how)

    EngineHost.__init__ = made  # type: ignore[method-assign]


def _lease_leaked() -> None:
    """A frontend forgets to give back the attempts of streams that moved: every third one."""
    from holdfast.requests.leases import LeaseBook  # noqa: PLC0415

    returned = LeaseBook._returned
    count = 0

    def leaked(self: Any, lease: Any) -> None:
        nonlocal count
        count += lease.kind == "attempt"
        if lease.kind != "attempt" or count % 3:
            returned(self, lease)

    LeaseBook._returned = leaked  # type: ignore[method-assign]


BUGS: dict[str, tuple[Callable[[], None], str]] = {
    "seed-lost": (_seed_lost, "P1"),
    "cancel-ignored": (_cancel_ignored, "P11"),
    "lease-leaked": (_lease_leaked, "P4"),
}
"""What plants it, and the promise that it breaks."""
