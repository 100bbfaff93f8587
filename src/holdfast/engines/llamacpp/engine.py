"""The embedded engine: llama.cpp behind the engine contract.

This side lives on the event loop: it validates, hands over, delivers and counts; `core` computes in a thread of
its own. Numpy and the engine library are first touched by `LlamaCppEngine.start`.

Must never block the event loop, and never log prompt or generated text.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import TYPE_CHECKING

from holdfast.base.errors import (
    Conflict,
    EngineFailed,
    HoldfastError,
    UnsupportedFeature,
    WorkerSaturated,
)
from holdfast.base.ids import SequenceKey
from holdfast.base.limits import TOP_LOGPROBS
from holdfast.engines.contract import (
    CacheCounts,
    Capabilities,
    DeathSink,
    Engine,
    EngineInfo,
    EngineLoad,
    EngineProgress,
    GenerateRequest,
    LoadProgress,
    Sampling,
    SequenceStep,
    StepSink,
    unpack_ids,
)
from holdfast.engines.files import model_files
from holdfast.engines.llamacpp.checks import check_sampling, check_tokens
from holdfast.engines.llamacpp.config import CHUNK_TOKENS, LlamaCppConfig
from holdfast.engines.llamacpp.grammar import constraint_to_gbnf
from holdfast.engines.llamacpp.library import INSTALL_HINT, find_library, load_library
from holdfast.engines.llamacpp.sequence import Sequence
from holdfast.engines.llamacpp.weights import fingerprint, locate_model
from holdfast.kv.events import KvEvent
from holdfast.models.gguf import read_text_files

if TYPE_CHECKING:
    from holdfast.engines.llamacpp.core import Core
    from holdfast.engines.llamacpp.guided import GrammarState

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0
"""How long `close` waits for the step under way."""
STUCK_SECONDS = 10.0
"""`check` calls a step stuck after this long, or 20 times what steps usually take if that is more."""

CAPABILITIES = Capabilities(
    continuation="exact",
    progress="step",
    position_keyed_seed=True,
    max_logprobs=TOP_LOGPROBS,
    guided=("json_object", "json_schema", "grammar", "regex", "choice"),
    logit_bias=True,
    penalties=True,
    prefix_cache=True,
    kv_events=True,
    kv_hashes="sequence",
)


class LlamaCppEngine(Engine):
    """One model, one context, one thread. See `LlamaCppConfig` for what can be set."""

    def __init__(self, config: LlamaCppConfig | None = None):
        self._config = config or LlamaCppConfig()
        self._live: dict[SequenceKey, Sequence] = {}
        self._core: Core | None = None
        self._thread: threading.Thread | None = None
        self._dead: HoldfastError | None = None
        self._closed = False

    async def start(self, sink: StepSink, on_death: DeathSink, on_load: LoadProgress) -> EngineInfo:
        """Load in the engine thread and start computing there. See `Engine.start`."""
        if self._thread is not None:
            raise EngineFailed("This engine was started before; make a new one.")
        self._sink, self._on_death = sink, on_death
        self._loop = asyncio.get_running_loop()
        started: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._run, args=(started, on_load), name="holdfast-llamacpp", daemon=True
        )
        self._thread.start()
        return await started

    def submit(self, key: SequenceKey, request: GenerateRequest) -> None:
        """Validate and queue. See `Engine.submit`."""
        core = self._require_core()
        if key in self._live:
            raise Conflict(f"Sequence {key} is already running.")
        if request.lora is not None:
            raise UnsupportedFeature("The embedded engine serves no LoRA adapters.", param="model")
        prompt, generated = unpack_ids(request.prompt_ids), unpack_ids(request.generated_ids)
        check_tokens(prompt, generated, vocab_size=core.model.vocab_size, context_length=core.context_length)
        check_sampling(request.sampling, request.stop, core.model.vocab_size)
        self._check_room()
        sequence = Sequence(
            key,
            prompt,
            generated,
            request.sampling,
            request.stop,
            end_ids=core.end_ids,
            scope=request.cache_salt,
            grammar=self._compile(core, request.sampling),
        )
        self._live[key] = sequence
        core.inbox.put(sequence)

    def cancel(self, key: SequenceKey) -> None:
        """Mark the sequence; the thread drops it before its next step. See `Engine.cancel`."""
        sequence = self._live.pop(key, None)
        if sequence is not None and self._core is not None:
            sequence.cancelled = True
            self._core.inbox.put(None)

    def load(self) -> EngineLoad:
        """Return the present load; parked KV blocks count as free."""
        core = self._core
        if core is None:
            return EngineLoad()
        running = sum(1 for s in self._live.values() if s.slot is not None)
        return EngineLoad(
            running=running,
            waiting=len(self._live) - running,
            kv_used_blocks=core.cache.used_blocks,
            kv_total_blocks=core.total_blocks,
            prefill_tokens=sum(s.pending for s in self._live.values() if s.pending > 1),
        )

    def progress(self) -> EngineProgress:
        """Return the counters; reads plain attributes, so it answers while the thread hangs."""
        core = self._core
        if core is None:
            return EngineProgress(phase="starting")
        phase = core.phase
        return EngineProgress(
            steps=core.steps,
            tokens=core.tokens,
            prefilled=core.prefilled,
            phase=phase,
            silent_step_seconds=core.expected.get(phase, 0.0),
            tokens_after_cancel=core.tokens_after_cancel,
        )

    def cache_counts(self) -> CacheCounts:
        """Return what its slots were asked and had; see `Engine.cache_counts`."""
        core = self._core
        return CacheCounts(core.looked_up, core.found) if core is not None else CacheCounts()

    def take_kv_events(self) -> list[KvEvent]:
        """Return and forget the KV events since the last call."""
        return self._core.cache.take_events() if self._core is not None else []

    async def check(self) -> None:
        """Raise EngineFailed when the thread is gone or its step takes absurdly long."""
        core = self._require_core()
        if self._thread is None or not self._thread.is_alive():
            raise EngineFailed("The engine thread has ended; restart this worker.")
        silent = time.monotonic() - core.beat
        bound = max(STUCK_SECONDS, 20 * core.expected.get(core.phase, 0.0))
        if self._live and silent > bound:
            raise EngineFailed(
                f"The engine's step has run for {silent:.1f} s (bound {bound:.1f} s); restart this worker."
            )

    async def close(self) -> None:
        """End the thread, which frees the memory. Idempotent."""
        self._closed = True
        self._live.clear()
        if self._core is not None:
            self._core.stopping = True
            self._core.inbox.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._join, self._thread)

    def _join(self, thread: threading.Thread) -> None:
        thread.join(CLOSE_SECONDS)
        if thread.is_alive():
            logger.warning("The engine thread did not end within %.0f s; its memory stays until exit.", CLOSE_SECONDS)
            return
        core, self._core = self._core, None
        if core is not None:
            core.close()

    def _require_core(self) -> Core:
        if self._dead is not None:
            raise EngineFailed(f"The engine has failed: {self._dead.message}")
        if self._core is None or self._closed:
            raise EngineFailed("The engine is not running.")
        return self._core

    def _check_room(self) -> None:
        limit = self._config.max_num_seqs + self._config.max_waiting
        if len(self._live) >= limit:
            raise WorkerSaturated(
                f"This worker holds {len(self._live)} sequences; its limit is {limit} "
                f"(max_num_seqs {self._config.max_num_seqs} + max_waiting {self._config.max_waiting}).",
                knob="max_waiting",
                threshold=limit,
                actual=len(self._live),
            )

    @staticmethod
    def _compile(core: Core, sampling: Sampling) -> GrammarState | None:
        if sampling.guided is None:
            return None
        from holdfast.engines.llamacpp.guided import GrammarState  # noqa: PLC0415 - numpy is loaded by `start`

        return GrammarState(core.model, constraint_to_gbnf(sampling.guided))

    # ---- engine thread ----

    def _run(self, started: asyncio.Future[EngineInfo], on_load: LoadProgress) -> None:
        try:
            core, info = self._build(lambda what, done: self._call(on_load, what, done))
            self._core = core
            core.stopping = self._closed
            self._call(_resolve, started, info)
            core.run(lambda steps: self._call(self._deliver, steps))
        except BaseException as error:  # whatever it was, the loop must hear of it
            self._call(self._die, error if isinstance(error, HoldfastError) else _as_failure(error), started)

    def _build(self, on_load: LoadProgress) -> tuple[Core, EngineInfo]:
        on_load("reading the model's metadata", 0.0)
        path, name = locate_model(self._config)
        text = read_text_files(path)
        library = load_library(find_library(self._config.library_path))
        try:
            from holdfast.engines.llamacpp.core import Core  # noqa: PLC0415 - numpy is optional until here
        except ImportError as error:
            raise EngineFailed(f"The embedded engine needs numpy: {error}. {INSTALL_HINT}") from error
        core = Core(library, path, self._config, on_load)
        info = EngineInfo(
            engine="llamacpp",
            version=library.version,
            model=name,
            context_length=core.context_length,
            block_size=self._config.block_size,
            total_kv_blocks=core.total_blocks,
            max_num_seqs=self._config.max_num_seqs,
            max_num_batched_tokens=CHUNK_TOKENS,
            eos_token_ids=core.end_ids,
            vocab_size=core.model.vocab_size,
            fingerprint=fingerprint(library.path, library.version, path),
            capabilities=CAPABILITIES,
            files=model_files(text),
        )
        on_load("ready", 1.0)
        return core, info

    def _call(self, function: object, *arguments: object) -> None:
        """Run something on the event loop; without effect once the loop is closed."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)  # type: ignore[arg-type]
        except RuntimeError:
            if self._core is not None:
                self._core.stopping = True

    # ---- event loop ----

    def _deliver(self, steps: list[SequenceStep]) -> None:
        if self._closed:
            return
        live = self._live
        current = [step for step in steps if step.key in live]
        for step in current:
            if step.finish is not None:
                del live[step.key]
        if current:
            self._sink(current)

    def _die(self, error: HoldfastError, started: asyncio.Future[EngineInfo]) -> None:
        self._dead = error
        self._live.clear()
        if not started.done():
            started.set_exception(error)
        elif not self._closed:
            logger.error("The llamacpp engine has failed: %s", error.message)
            self._on_death(error)


def _resolve(started: asyncio.Future[EngineInfo], info: EngineInfo) -> None:
    if not started.done():
        started.set_result(info)


def _as_failure(error: BaseException) -> EngineFailed:
    logger.error("The llamacpp engine thread raised", exc_info=error)
    return EngineFailed(f"The llamacpp engine thread raised {type(error).__name__}: {error}")
