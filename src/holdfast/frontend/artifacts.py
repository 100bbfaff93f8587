"""Fetching a model's files from whichever worker has them, verified by content hash.

Must never trust a worker: not its size, not its bytes, not that it answers at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from holdfast.base.errors import HoldfastError, NoWorkers, TransportFault
from holdfast.models.card import Artifact
from holdfast.models.store import ArtifactStore
from holdfast.runtime.pool import Worker
from holdfast.runtime.streams import Logprobs, StreamHandle
from holdfast.wire.frames import OpenHeaders

FETCH_TIMEOUT = 20.0
"""Seconds for one file from one worker."""
SILENT_TIMEOUT = 3.0
"""Seconds without a byte after which the next worker is asked."""


async def fetch_into(store: ArtifactStore, artifact: Artifact, workers: Sequence[Worker]) -> None:
    """Fetch one file into the store, from the first worker that sends it whole and right.

    Raises:
        HoldfastError: none did; the last reason.
    """
    problem: HoldfastError = NoWorkers("no usable worker has it")
    for worker in workers:
        try:
            data = await _fetch(worker, artifact)
        except HoldfastError as error:
            problem = error
            continue
        if store.accept(artifact, data):
            return
        problem = TransportFault(f"worker {worker.instance} sent something else than {artifact.sha256[:12]}")
    raise problem


async def _fetch(worker: Worker, artifact: Artifact) -> bytes:
    """Return what one worker sends, as long as it does not pause and does not send too much."""
    transfer = _Transfer(artifact.size)
    handle: StreamHandle | None = None
    try:
        async with asyncio.timeout(FETCH_TIMEOUT):
            headers = OpenHeaders(request_id="artifact")
            handle = await worker.open_bulk("artifact", headers, artifact.sha256.encode(), transfer)
            seen = -1
            while not transfer.done.done() and transfer.size != seen:
                seen = transfer.size
                await asyncio.wait([transfer.done], timeout=SILENT_TIMEOUT)
            if transfer.done.done():
                return transfer.done.result()
    except TimeoutError:
        pass
    finally:
        transfer.done.cancel()
        if handle is not None:
            handle.kill("done")
    raise TransportFault(
        f"worker {worker.instance} sent {transfer.size} of {artifact.size} bytes of {artifact.sha256[:12]} and stopped"
    )


class _Transfer:
    """Collects one file; a `StreamHandler`."""

    def __init__(self, expected: int) -> None:
        self.done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.size = 0
        self._expected = expected
        self._parts: list[bytes] = []

    def on_accept(self) -> None:
        """See `StreamHandler`."""

    def on_tokens(self, index: int, tokens: Sequence[int], logprobs: Logprobs | None) -> None:
        """See `StreamHandler`."""

    def on_data(self, index: int, payload: bytes) -> None:  # noqa: ARG002 - the protocol's signature
        """See `StreamHandler`."""
        self.size += len(payload)
        if self.size > self._expected:
            self._parts.clear()
            self._fail(TransportFault(f"a worker sent over {self._expected} bytes for a file of that size"))
        else:
            self._parts.append(bytes(payload))

    def on_refuse(self, error: HoldfastError) -> None:
        """See `StreamHandler`."""
        self._fail(error)

    def on_end(self, finish: str, error: HoldfastError | None, cached_tokens: int) -> None:  # noqa: ARG002 - as above
        """See `StreamHandler`."""
        if error is not None:
            self._fail(error)
        elif not self.done.done():
            self.done.set_result(b"".join(self._parts))

    def on_broken(self, error: HoldfastError) -> None:
        """See `StreamHandler`."""
        self._fail(error)

    def _fail(self, error: HoldfastError) -> None:
        if not self.done.done():
            self.done.set_exception(error)
