"""The models that this frontend can serve: their cards, tokenizers and templates.

Follows the pool: when a worker with a new model becomes usable, its files are fetched over the wire, verified
by content hash and loaded in the background, so that the first request does not wait. A model stays known after
its last worker has left: requests then wait for a replacement instead of being told that it never existed.

Must never choose workers for requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from holdfast.base.errors import HoldfastError, ModelNotFound, NoWorkers, TransportFault
from holdfast.models.card import Artifact, ModelCard
from holdfast.models.store import ArtifactStore
from holdfast.runtime.pool import Worker, WorkerPool
from holdfast.runtime.streams import Logprobs, StreamHandle
from holdfast.text.model import TextModel, load_text, missing
from holdfast.wire.frames import OpenHeaders

log = logging.getLogger(__name__)

FETCH_TIMEOUT = 20.0
"""Seconds for one file from one worker."""


class ServedModel:
    """A model with everything a frontend needs to speak it."""

    __slots__ = ("card", "defaults", "text")

    def __init__(self, card: ModelCard, text: TextModel, defaults: dict[str, Any]):
        self.card = card
        self.text = text
        self.defaults = defaults
        """The model's generation config."""


class _Fetch:
    """Collects one file; a `StreamHandler`."""

    def __init__(self) -> None:
        self.done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._parts: list[bytes] = []

    def on_accept(self) -> None:
        """See `StreamHandler`."""

    def on_tokens(self, index: int, tokens: Sequence[int], logprobs: Logprobs | None) -> None:
        """See `StreamHandler`."""

    def on_data(self, index: int, payload: bytes) -> None:  # noqa: ARG002 - the protocol's signature
        """See `StreamHandler`."""
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


class ModelRegistry:
    """Call `run` in a task of its own; it loads models as they appear."""

    def __init__(self, pool: WorkerPool, store: ArtifactStore):
        self._pool = pool
        self._store = store
        self._served: dict[str, ServedModel] = {}
        self._problems: dict[str, str] = {}
        self._changed = asyncio.Event()
        self._loaded = asyncio.Event()

    async def run(self) -> None:
        """Load models until cancelled."""
        unsubscribe = self._pool.subscribe(lambda _kind, _worker: self._changed.set())
        try:
            while True:
                self._changed.clear()
                for name in self._missing():
                    await self._load(name)
                try:
                    await asyncio.wait_for(self._changed.wait(), 1.0 if self._missing() else None)
                except TimeoutError:
                    continue
        finally:
            unsubscribe()

    async def get(self, name: str, wait: float = 10.0) -> ServedModel:
        """Return a model by name or alias.

        Args:
            name: as the client wrote it.
            wait: seconds to wait while its files are still being fetched.

        Raises:
            ModelNotFound: no worker has offered that model since this frontend started.
            NoWorkers: it is known, yet its files could not be fetched in time.
        """
        served = self._served.get(name)
        if served is not None:
            return served
        if name not in self._pool.models():
            known = ", ".join(sorted(self._served)) or "none yet"
            raise ModelNotFound(f"The model '{name}' does not exist here; known models: {known}.", param="model")
        deadline = asyncio.get_running_loop().time() + wait
        while (served := self._served.get(name)) is None:
            left = deadline - asyncio.get_running_loop().time()
            self._loaded.clear()
            try:
                await asyncio.wait_for(self._loaded.wait(), max(0.0, left))
            except TimeoutError:
                why = self._problems.get(name, "still fetching them")
                raise NoWorkers(
                    f"The files of model '{name}' could not be had within {wait:g} s: {why}.", retry_after=2.0
                ) from None
        return served

    def served(self) -> dict[str, ServedModel]:
        """Return the loaded models by name, aliases included."""
        return self._served

    def file(self, artifact: Artifact) -> bytes:
        """Return a file of a served model.

        Raises:
            NoWorkers: it has left the cache.
        """
        data = self._store.get(artifact)
        if data is None:
            raise NoWorkers("The model's files have left the cache.", retry_after=1.0)
        return data

    def _missing(self) -> list[str]:
        return [name for name in self._pool.models() if name not in self._served]

    async def _load(self, name: str) -> None:
        try:
            workers = self._pool.usable(name)
            card = next((c for w in workers if (c := w.card(name)) is not None), None)
            if card is None:
                return
            for artifact in missing(card, self._store):
                await self._fetch(artifact, workers)
            text = await asyncio.get_running_loop().run_in_executor(None, self._read, card)
        except HoldfastError as error:
            self._problem(name, error.message)
        except Exception as error:
            log.exception("model %s could not be loaded", name)
            self._problem(name, f"{type(error).__name__}: {error}")
        else:
            self._problems.pop(name, None)
            self._served[name] = ServedModel(card, text, dict(text.generation_config))
            self._loaded.set()
            log.info("model %s can be served (context %d tokens, %s)", name, card.context_length, card.engine)

    def _problem(self, name: str, message: str) -> None:
        if self._problems.get(name) != message:
            log.warning("model %s cannot be served yet: %s; trying again every second", name, message)
        self._problems[name] = message

    def _read(self, card: ModelCard) -> TextModel:
        like = next((m.text for m in self._served.values() if m.card.tokenizer == card.tokenizer), None)
        text = load_text(card, self._store, like=like, now=lambda: datetime.now().astimezone())
        if text is None:
            raise NoWorkers("its files vanished from the cache; they are fetched again")
        text.warm()
        return text

    async def _fetch(self, artifact: Artifact, workers: Sequence[Worker]) -> None:
        problem: HoldfastError = NoWorkers("no usable worker has it")
        for worker in workers:
            fetch = _Fetch()
            handle: StreamHandle | None = None
            try:
                async with asyncio.timeout(FETCH_TIMEOUT):
                    headers = OpenHeaders(request_id="artifact")
                    handle = await worker.open_bulk("artifact", headers, artifact.sha256.encode(), fetch)
                    data = await fetch.done
                if self._store.accept(artifact, data):
                    return
                problem = TransportFault(f"worker {worker.instance} sent something else than {artifact.sha256[:12]}")
            except TimeoutError:
                problem = TransportFault(f"worker {worker.instance} did not send it within {FETCH_TIMEOUT:g} s")
            except HoldfastError as error:
                problem = error
            finally:
                if handle is not None:
                    handle.kill("done")
        raise problem
