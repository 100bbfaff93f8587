"""vLLM behind the engine contract: its ``AsyncLLM`` in this process, its engine core in processes of its own.

Token ids go in and come out; vLLM's text side is not used. What vLLM does not restore in a continuation is stated in
the capabilities, or generated anew (`replay`).

Must never import vLLM before `VllmEngine.start`, and never block the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from holdfast.base.errors import (
    EngineFailed,
    HoldfastError,
    InvalidRequest,
    ModelNotFound,
    UnsupportedFeature,
    WorkerSaturated,
)
from holdfast.engines.attempt import Attempt, Output
from holdfast.engines.contract import CacheCounts, EngineInfo, EngineLoad, Finish, LoadProgress
from holdfast.engines.driven import DrivenEngine
from holdfast.engines.orphans import Orphans
from holdfast.engines.vllm import arguments as flags
from holdfast.engines.vllm.adapters import Adapters
from holdfast.engines.vllm.config import VllmConfig
from holdfast.engines.vllm.controls import Controls
from holdfast.engines.vllm.describe import describe, memory_reader
from holdfast.engines.vllm.events import Follower
from holdfast.engines.vllm.memory import until_free
from holdfast.engines.vllm.replay import replayed
from holdfast.engines.vllm.sampling import check, guided_arguments, logprobs_of, parameters
from holdfast.engines.vllm.stats import Statistics, logger_class
from holdfast.kv.events import KvEvent

log = logging.getLogger(__name__)
T = TypeVar("T")

PROTOCOL = "nixl"
_FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "abort", "error": "error"}
_SHUTDOWN_SECONDS = 3.0
"""How long vLLM's processes get to leave by themselves."""


class VllmEngine(Adapters, Controls, DrivenEngine):
    """One vLLM engine. See `VllmConfig` for what can be set."""

    counts_steps = True

    def __init__(self, config: VllmConfig | None = None):
        self.config = config or VllmConfig()
        super().__init__(max_waiting=self.config.max_waiting)
        self.llm: Any = None
        self.statistics = Statistics(self._stepped)
        self._events: list[KvEvent] = []
        self.followers: list[Follower] = []
        self._orphans = Orphans()
        self._place = ""
        self._pids: tuple[int, ...] = ()
        self._kinds: Any = None

    # ---- start and end ----

    async def boot(self, on_load: LoadProgress) -> EngineInfo:
        """Load vLLM in a thread of its own; see `Engine.start`."""
        flags.words_of(self.config)  # what cannot work is said before anything is loaded
        on_load("importing vLLM", 0.0)
        self._place = tempfile.mkdtemp(prefix="holdfast-vllm-")
        # vLLM makes one name per rank of such a name, and of no other that is a file
        endpoints = (f"ipc://{self._place}/inproc-events", f"ipc://{self._place}/inproc-replay")
        self._orphans.guard(self._place)
        flags.set_environment(self.config, self.role)
        settled = await _in_thread(lambda: self._settle(endpoints))
        if self.config.memory_wait:
            on_load("waiting for memory", 0.1)
            await until_free(memory_reader(settled), self.config.memory_wait)
        on_load("starting vLLM's processes and loading the weights", 0.2)
        self.llm = await _in_thread(lambda: self._load(settled))
        info = await _in_thread(lambda: describe(self.llm, self.config, self.role))
        self._follow(endpoints, info)
        self._pids = tuple(await asyncio.to_thread(self._orphans.pids))
        on_load("ready", 1.0)
        return info

    def _settle(self, endpoints: tuple[str, str]) -> Any:
        try:
            from vllm import SamplingParams  # noqa: PLC0415
            from vllm.inputs import tokens_input  # noqa: PLC0415
            from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams  # noqa: PLC0415
        except ImportError as error:
            raise EngineFailed(f"vLLM cannot be loaded: {error}. {flags.INSTALL_HINT}") from error
        self._kinds = (SamplingParams, RequestOutputKind.DELTA, StructuredOutputsParams, tokens_input)
        settled = flags.engine_arguments(self.config, self.role, endpoints)
        try:
            return settled.create_engine_config()
        except (ValueError, TypeError, OSError) as error:
            raise InvalidRequest(f"vLLM refuses its configuration: {_first_words(error)}") from error

    def _load(self, settled: Any) -> Any:
        from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

        try:
            return AsyncLLM.from_vllm_config(
                settled, stat_loggers=[logger_class(self.statistics)], disable_log_stats=True
            )
        except Exception as error:
            raise EngineFailed(
                f"vLLM did not start: {_first_words(error)}. Its processes say above why; most often the memory is "
                "short: lower --max-model-len, --max-num-seqs or --gpu-memory-utilization (VLLM_CPU_KVCACHE_SPACE)."
            ) from error

    def _follow(self, endpoints: tuple[str, str], info: EngineInfo) -> None:
        if not info.capabilities.kv_events:
            return
        for rank in range(info.data_parallel_size):
            suffix = f"_dp{rank}" if rank else ""
            publish, replay = (f"{endpoint}{suffix}" for endpoint in endpoints)
            follower = Follower(rank, publish, replay, flags.TOPIC, self._events.extend)
            self.followers.append(follower)
            self.helper(follower.run(), f"vllm-kv-events-{rank}")

    async def shut(self) -> None:
        """Stop vLLM's processes; what does not leave by itself is killed."""
        llm, self.llm = self.llm, None
        if llm is not None:
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # or it reports the end of the processes as a failure
            # one that has died is not waited for: a new start waits for its memory
            seconds = 0.0 if self.dead is not None or llm.errored else _SHUTDOWN_SECONDS
            if not seconds:
                await asyncio.to_thread(self._orphans.end)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SHUTDOWN_SECONDS + 1):
                    await asyncio.to_thread(_shutdown, llm, seconds)
        await asyncio.to_thread(self._orphans.end)
        if self._place:
            await asyncio.to_thread(shutil.rmtree, self._place, True)

    # ---- sequences ----

    def prepare(self, attempt: Attempt) -> None:
        """Refuse what vLLM cannot do; see `DrivenEngine.prepare`."""
        request = attempt.request
        info = self.info
        check(request.sampling, max_logprobs=info.capabilities.max_logprobs, vocab_size=info.vocab_size)
        if request.lora is not None and request.lora not in self.loaded:
            raise ModelNotFound(f"The adapter {request.lora!r} is not loaded here.", param="model")
        if request.leg == "prefill" and not info.capabilities.handoff:
            raise UnsupportedFeature("This vLLM hands no KV blocks over; start it with --disaggregation-mode prefill.")
        if request.sampling.guided is not None:
            guided_arguments(request.sampling.guided)
            if attempt.first_index and self.config.replay == "never":
                raise UnsupportedFeature(
                    "vLLM cannot go on inside of a grammar, and DYN_VLLM_REPLAY forbids to begin anew.",
                    param="response_format",
                )
        rank = request.extra.get("data_parallel_rank")
        if rank is not None and not (isinstance(rank, int) and 0 <= rank < info.data_parallel_size):
            raise InvalidRequest(f"Rank {rank} does not exist; this engine has {info.data_parallel_size}.")

    async def outputs(self, attempt: Attempt) -> AsyncGenerator[Output, None]:
        """Generate by ``AsyncLLM.generate``; see `DrivenEngine.outputs`."""
        if not self._replays(attempt):
            async for said in self._generate(attempt, attempt.ids, parameters(attempt)):
                yield said
            return
        prompt = attempt.ids[: attempt.prompt_tokens]
        existing = attempt.ids[attempt.prompt_tokens :]
        async for said in replayed(self._generate(attempt, prompt, parameters(attempt, replayed=True)), existing):
            yield said

    def _replays(self, attempt: Attempt) -> bool:
        """Whether what exists is generated anew, because vLLM can go on in no other way."""
        if not attempt.first_index or attempt.request.leg == "prefill":
            return False
        s, mode = attempt.request.sampling, self.config.replay
        if mode == "always":
            changes = s.presence_penalty or s.frequency_penalty or s.temperature > 0
            return s.guided is not None or bool(changes)
        return mode == "guided" and s.guided is not None

    async def _generate(
        self, attempt: Attempt, ids: list[int], arguments: dict[str, Any]
    ) -> AsyncGenerator[Output, None]:
        request = attempt.request
        params_of, delta, structured, tokens_input = self._kinds
        if request.sampling.guided is not None and request.leg != "prefill":
            arguments["structured_outputs"] = structured(**guided_arguments(request.sampling.guided))
        params = params_of(output_kind=delta, detokenize=False, skip_clone=True, **arguments)
        outputs = self.llm.generate(
            tokens_input(ids, cache_salt=request.cache_salt),
            params,
            attempt.engine_id,
            lora_request=self.loaded.get(request.lora) if request.lora else None,
            priority=-request.priority,  # the lower goes first
            data_parallel_rank=request.extra.get("data_parallel_rank"),
        )
        async with contextlib.aclosing(outputs):
            async for said in outputs:
                yield self._output(attempt, said)

    def _output(self, attempt: Attempt, said: Any) -> Output:
        one = said.outputs[0]
        tokens = one.token_ids if type(one.token_ids) is list else list(one.token_ids)
        logprobs = None
        top = attempt.request.sampling.logprobs
        if top is not None and one.logprobs is not None:
            logprobs = logprobs_of(tokens, one.logprobs, top)
        if one.finish_reason is None:
            return Output(tokens, logprobs=logprobs, cached_tokens=said.num_cached_tokens or 0)
        finish = _FINISH.get(one.finish_reason, "stop")
        error = EngineFailed("vLLM ended the request with an error; its log says why.") if finish == "error" else None
        handoff = None
        if attempt.request.leg == "prefill" and said.kv_transfer_params:
            handoff = attempt.offer(PROTOCOL, dict(said.kv_transfer_params), self.info.fingerprint)
        return Output(
            tokens,
            finish=finish,
            logprobs=logprobs,
            cached_tokens=said.num_cached_tokens or 0,
            handoff=handoff,
            error=error,
        )

    def failure(self, error: Exception) -> HoldfastError:
        """Return what an exception of vLLM means; see `DrivenEngine.failure`."""
        if isinstance(error, HoldfastError):
            return error
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "EngineDeadError" in kinds:
            return EngineFailed("vLLM's engine process has died.", engine_died=True)
        if kinds & {"QueueOverflowError", "MaxQueuedTokensError"}:
            return WorkerSaturated("vLLM's own queue is full (--max-num-queued-reqs).", layer="engine")
        cause = error.__cause__ if "EngineGenerateError" in kinds and isinstance(error.__cause__, Exception) else error
        if "VLLMClientError" in kinds or isinstance(cause, (ValueError, TypeError)):
            return InvalidRequest(f"vLLM refuses the request: {_first_words(cause)}")
        return EngineFailed(f"vLLM failed on the request: {type(cause).__name__}: {_first_words(cause)}")

    def is_death(self, error: Exception) -> bool:
        """Whether vLLM's processes are gone; see `DrivenEngine.is_death`."""
        return type(error).__name__ == "EngineDeadError" or (self.llm is not None and bool(self.llm.errored))

    # ---- what it says about itself ----

    def load(self) -> EngineLoad:
        """Return what the scheduler said last; see `Engine.load`."""
        if not hasattr(self, "info"):
            return EngineLoad()
        waiting = sum(len(attempt.ids) for attempt in self.attempts if not attempt.begun)
        return self.statistics.load(
            ranks=self.info.data_parallel_size,
            blocks=self.info.total_kv_blocks,
            live=len(self.attempts),
            prefill_tokens=waiting,
        )

    def cache_counts(self) -> CacheCounts:
        """Return what vLLM's own statistics say, those of requests that were given up included."""
        return CacheCounts(self.statistics.queried, self.statistics.cached)

    def _stepped(self) -> None:
        self.steps += 1

    def take_kv_events(self) -> list[KvEvent]:
        """Return and forget what the publishers said; see `Engine.take_kv_events`."""
        if not self._events:
            return []
        taken = self._events[:]
        self._events.clear()
        return taken

    def child_pids(self) -> tuple[int, ...]:
        """Return vLLM's processes; see `Engine.child_pids`."""
        return self._pids

    async def check(self) -> None:
        """Raise EngineFailed when vLLM says that it is dead. It does not notice a hang; progress and canaries do."""
        self.require()
        if self.llm is not None and self.llm.errored:
            raise EngineFailed("vLLM says that its engine process has died.", engine_died=True)


def _shutdown(llm: Any, seconds: float) -> None:
    llm.shutdown(timeout=seconds)


def _first_words(error: BaseException) -> str:
    """Return an error's message without its stack, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])[:600] or type(error).__name__


async def _in_thread(work: Callable[[], T]) -> T:
    """Run something that takes long in a thread that nobody waits for when the caller is cancelled."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if result.done():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        try:
            value, error = work(), None
        except BaseException as raised:  # whatever it was, the loop must hear of it
            value, error = None, raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name="holdfast-vllm-start", daemon=True).start()
    return await result
