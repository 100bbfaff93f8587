"""The models that this frontend can serve: their cards, tokenizers and templates.

Follows the pool: when a worker with a new model becomes usable, its files are fetched over the wire, verified
by content hash and loaded in the background, so that the first request does not wait. A model stays known after
its last worker has left: requests then wait for a replacement instead of being told that it never existed. One that
comes back with other files is loaded anew, and not spoken with the old ones for a moment.

An adapter has its base model's files, so that it can be served as soon as it is seen; one that was unloaded on purpose
does not exist any more.

Must never choose workers for requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Protocol

from holdfast.base.errors import HoldfastError, ModelNotFound, NoWorkers
from holdfast.frontend.artifacts import fetch_into
from holdfast.models.card import Artifact, ModelCard, disagreement
from holdfast.models.store import ArtifactStore
from holdfast.openai.specs import Specs
from holdfast.runtime.notices import PoolEvent
from holdfast.runtime.pool import Worker, WorkerPool
from holdfast.text.model import TextModel, load_text, missing

log = logging.getLogger(__name__)

FILES_WAIT = 10.0
"""Seconds for which a request waits, at most, for files of its model that are still being fetched."""
RETRY = 1.0
"""Seconds between attempts to load a model."""


class ReadText(Protocol):
    """Makes a model's text machinery; see `text.model.load_text`, which is the one that reads files."""

    def __call__(
        self,
        card: ModelCard,
        store: ArtifactStore,
        *,
        like: TextModel | None = None,
        now: Callable[[], datetime] | None = None,
    ) -> TextModel | None:
        """Return it, or None when a file is not in the store."""


class ServedModel:
    """A model with everything a frontend needs to speak it."""

    __slots__ = ("card", "defaults", "specs", "terminal_ids", "text")

    def __init__(self, card: ModelCard, text: TextModel, defaults: dict[str, Any]):
        self.card = card
        self.text = text
        self.terminal_ids = frozenset(card.eos_token_ids)
        """Token ids that end a sequence."""
        self.specs = Specs(card, defaults)
        self.defaults = defaults
        """The model's generation config."""


class ModelRegistry:
    """Call `run` in a task of its own; it loads models as they appear.

    Args:
        pool: the workers.
        store: the cache of model files.
        wall: calendar time in seconds since 1970, for templates that print the date.
        read_text: makes a model's text machinery; runs in the loop's executor.
    """

    def __init__(
        self,
        pool: WorkerPool,
        store: ArtifactStore,
        *,
        wall: Callable[[], float] = time.time,
        read_text: ReadText = load_text,
    ):
        self._pool = pool
        self._store = store
        self._wall = wall
        self._read_text = read_text
        self._served: dict[str, ServedModel] = {}
        self._loading: set[str] = set()
        self._problems: dict[str, str] = {}
        self._changed = asyncio.Event()
        self._loaded = asyncio.Event()

    async def run(self) -> None:
        """Load models until cancelled."""
        unsubscribe = self._pool.subscribe(self._on_event)
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    self._changed.clear()
                    self._compare()
                    wanted = self._missing()
                    for name in wanted:
                        if name not in self._loading:
                            self._loading.add(name)
                            tasks.create_task(self._load(name))
                    try:
                        await asyncio.wait_for(self._changed.wait(), RETRY if wanted else None)
                    except TimeoutError:
                        continue
        finally:
            unsubscribe()

    def _on_event(self, event: PoolEvent, _worker: Worker) -> None:
        if event != "pong":
            self._compare()
            self._changed.set()

    def _compare(self) -> None:
        """Take over what workers say anew about themselves; a model with other files is not served before they came."""
        known = self._pool.models()
        self._drop_adapters(known)
        for name, cards in known.items():
            served = self._served.get(name)
            if served is None:
                self._adopt(name, cards[0])
                continue
            if served.card == cards[0]:
                continue
            field = disagreement(served.card, cards[0])
            if field is None:
                self._served[name] = ServedModel(cards[0], served.text, served.defaults)
            else:
                log.warning("model %s came back with another %s; loading it anew", name, field)
                del self._served[name]

    def _adopt(self, name: str, card: ModelCard) -> None:
        """Serve an adapter at once, if its base model is."""
        base = self._served.get(card.base_model) if card.base_model is not None else None
        if base is None or (base.card.tokenizer, base.card.prompt_files) != (card.tokenizer, card.prompt_files):
            return
        self._served[name] = ServedModel(card, base.text, base.defaults)
        self._loaded.set()
        log.info("adapter %s of model %s can be served", name, card.base_model)

    def _drop_adapters(self, known: Mapping[str, object]) -> None:
        """Forget adapters that nobody has any more and nobody will bring back."""
        gone = [name for name, one in self._served.items() if one.card.base_model is not None and name not in known]
        for name in gone:
            del self._served[name]
            log.info("adapter %s was unloaded everywhere", name)

    def ready(self, name: str) -> ServedModel | None:
        """Return a model by name or alias if it is loaded."""
        return self._served.get(name)

    async def get(self, name: str, wait: float = FILES_WAIT) -> ServedModel:
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
        """Return the loaded models by name, aliases included; those removed on purpose are not among them."""
        known = self._pool.models()
        return {name: model for name, model in self._served.items() if name in known}

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
                await fetch_into(self._store, artifact, workers)
            text = await asyncio.get_running_loop().run_in_executor(None, self._read, card)
        except HoldfastError as error:
            self._problem(name, error.message)
        except Exception as error:
            log.exception("model %s could not be loaded", name)
            self._problem(name, f"{type(error).__name__}: {error}")
        else:
            self._problems.pop(name, None)
            self._served[name] = ServedModel(card, text, dict(text.generation_config))
            self._compare()
            self._loaded.set()
            log.info("model %s can be served (context %d tokens, %s)", name, card.context_length, card.engine)
        finally:
            self._loading.discard(name)

    def _problem(self, name: str, message: str) -> None:
        if self._problems.get(name) != message:
            log.warning("model %s cannot be served yet: %s; trying again every second", name, message)
        self._problems[name] = message

    def _read(self, card: ModelCard) -> TextModel:
        like = next((m.text for m in self._served.values() if m.card.tokenizer == card.tokenizer), None)
        text = self._read_text(card, self._store, like=like, now=self._today)
        if text is None:
            raise NoWorkers("its files vanished from the cache; they are fetched again")
        text.warm()
        return text

    def _today(self) -> datetime:
        return datetime.fromtimestamp(self._wall()).astimezone()
