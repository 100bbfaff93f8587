"""TensorRT-LLM behind the engine contract: its ``LLM`` in this process, its ranks in processes of their own.

Token ids go in and come out. Outputs are cumulative and are cut into steps here. While KV blocks are on their way to a
decode leg it cannot be aborted safely, so a cancel waits for the first token (``cancel_until``: ``pre_handoff``).

Must never import the package before `TrtllmEngine.start` (`api` does), and never block the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

from holdfast.base.errors import (
    ContextLengthExceeded,
    EngineFailed,
    HoldfastError,
    InvalidRequest,
    UnsupportedFeature,
)
from holdfast.base.ids import SequenceKey
from holdfast.engines.attempt import Attempt, Output
from holdfast.engines.contract import EngineInfo, EngineLoad, LoadProgress
from holdfast.engines.driven import DrivenEngine
from holdfast.engines.orphans import Orphans
from holdfast.engines.trtllm import handover
from holdfast.engines.trtllm.adapters import Adapters
from holdfast.engines.trtllm.api import NEWEST, OLDEST, load_api
from holdfast.engines.trtllm.arguments import engine_arguments
from holdfast.engines.trtllm.config import TrtllmConfig
from holdfast.engines.trtllm.describe import describe, ranks_of
from holdfast.engines.trtllm.kv_events import EventReader
from holdfast.engines.trtllm.outputs import Reader, lost_or_failed
from holdfast.engines.trtllm.sampling import refuse, sampling_params
from holdfast.engines.trtllm.stats import RankStats, load_of, read_stats
from holdfast.kv.events import AllBlocksCleared, KvEvent
from holdfast.models.files import locate
from holdfast.models.hf import read_directory

log = logging.getLogger(__name__)

_WATCH_SECONDS = 0.25
"""How often the engine is asked whether it has failed for good."""
_POLL_SECONDS = 0.05
"""Pause between two looks at KV events and statistics."""
_QUEUE_SECONDS = 0.02
"""How long the engine waits for more of them."""
_HEALTH_SECONDS = 10.0
"""The longest that its health check may take."""
_WARM_SECONDS = 120.0
_SHUTDOWN_SECONDS = 10.0
_PRIORITIES = 64
"""Our priorities are integers, the engine's 0 to 1 with 0.5 as the usual: so many steps either way."""
KEPT_EVENTS = 100_000
"""KV events that are kept for the worker; with more the cache is told anew as empty."""


class TrtllmEngine(Adapters, DrivenEngine):
    """One TensorRT-LLM engine. See `TrtllmConfig` for what can be set."""

    def __init__(self, config: TrtllmConfig | None = None):
        self.config = config or TrtllmConfig()
        super().__init__(max_waiting=self.config.max_waiting)
        self.llm: Any = None
        self._results: dict[SequenceKey, Any] = {}
        self._stats: dict[int, RankStats] = {}
        self._reader = EventReader(self.config.block_size)
        self._events: list[KvEvent] = []
        self._orphans = Orphans()
        self._pids: tuple[int, ...] = ()

    # ---- start and end ----

    async def boot(self, on_load: LoadProgress) -> EngineInfo:
        """Load the model off the loop and generate one token; see `Engine.start`."""
        if not self.config.model:
            raise InvalidRequest("Which model? Name a directory with --model (DYN_TRTLLM_MODEL).", param="model")
        on_load("reading the model's files", 0.0)
        path = locate(self.config.model)
        directory = await asyncio.to_thread(read_directory, path)
        self.hidden_size = directory.hidden_size
        on_load("importing TensorRT-LLM", 0.05)
        self.api = await asyncio.to_thread(load_api)
        if not OLDEST <= self.api.release <= NEWEST:
            log.warning("TensorRT-LLM %s was never compared with this adapter; it knows %s to %s.",
                        self.api.version, ".".join(map(str, OLDEST)), ".".join(map(str, NEWEST)))  # fmt: skip
        self._orphans.guard()
        on_load("starting TensorRT-LLM's processes and loading the weights", 0.1)
        arguments = engine_arguments(self.api, self.config, model=str(path), role=self.role)
        self.llm = await asyncio.to_thread(self._load, arguments)
        on_load("warm-up", 0.9)
        await self._warm_up(directory.text.eos_token_ids)
        blocks = max((rank.total_blocks for rank in self._stats.values()), default=0)
        info = describe(self.api, self.llm, self.config, directory, role=self.role, blocks=blocks)
        self._pids = tuple(await asyncio.to_thread(self._orphans.pids))
        self.helper(self._watch(), "trtllm-watch")
        self.helper(self._poll_stats(), "trtllm-stats")
        if self.config.publish_kv_events:
            self.helper(self._poll_events(), "trtllm-kv-events")
        on_load("ready", 1.0)
        return info

    def _load(self, arguments: dict[str, Any]) -> Any:
        try:
            return self.api.LLM(**arguments)
        except (ValueError, TypeError) as error:
            raise InvalidRequest(f"TensorRT-LLM refuses its arguments: {_words(error)}") from error
        except Exception as error:
            raise EngineFailed(
                f"TensorRT-LLM did not start: {_words(error)}. Its processes say above why; most often GPU memory is "
                "short (DYN_TRTLLM_FREE_GPU_MEMORY_FRACTION, --max-batch-size, --max-seq-len)."
            ) from error

    async def _warm_up(self, eos: tuple[int, ...]) -> None:
        """Generate one token: it proves that the engine works, and only then it says how many blocks it has."""
        params = self.api.SamplingParams(end_id=eos[0] if eos else -1, max_tokens=1, top_k=1, detokenize=False)
        whole = None
        if self.role != "aggregated":
            whole = self.api.DisaggregatedParams(request_type="context_and_generation")
        try:
            async with asyncio.timeout(_WARM_SECONDS):
                result = self.llm.generate_async(
                    inputs=[1, 2], sampling_params=params, streaming=True, disaggregated_params=whole
                )
                async for _ in result:
                    pass
        except TimeoutError as error:
            raise EngineFailed(f"TensorRT-LLM generated nothing within {_WARM_SECONDS:.0f} s.") from error
        except Exception as error:
            raise EngineFailed(f"TensorRT-LLM failed on its first token: {_words(error)}.") from error
        async for stats in self.llm.get_stats_async(timeout=1.0):
            rank, said = read_stats(stats)
            self._stats[rank] = said
            if len(self._stats) >= ranks_of(self.config):
                break

    async def shut(self) -> None:
        """Stop the engine's processes; what does not leave by itself is killed. See `DrivenEngine.shut`."""
        llm, self.llm = self.llm, None
        if llm is not None and self.dead is None:  # it would wait for ranks that are dead
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SHUTDOWN_SECONDS):
                    await asyncio.to_thread(llm.shutdown)
        await asyncio.to_thread(self._orphans.end)

    # ---- sequences ----

    def prepare(self, attempt: Attempt) -> None:
        """Refuse what the engine cannot do; see `DrivenEngine.prepare`."""
        request = attempt.request
        refuse(attempt, self.info)
        self.adapter_request(request.lora)
        if request.leg == "prefill" and not self.info.capabilities.handoff:
            raise UnsupportedFeature("This worker hands no KV blocks over; it was not started as a prefill worker.")
        if request.handoff is not None:
            handover.unpack(self.api, request.handoff.params)
        if not self.config.chunked_prefill and len(attempt.ids) > self.config.max_num_tokens:
            raise ContextLengthExceeded(
                f"{len(attempt.ids)} tokens must be computed at once; this engine computes at most "
                f"{self.config.max_num_tokens} in a step and does not split prompts.",
                limit=self.config.max_num_tokens,
                actual=len(attempt.ids),
            )
        rank = request.extra.get("data_parallel_rank")
        if rank is not None and not (isinstance(rank, int) and 0 <= rank < self.info.data_parallel_size):
            raise InvalidRequest(f"Rank {rank} does not exist; this engine has {self.info.data_parallel_size}.")

    async def outputs(self, attempt: Attempt) -> AsyncGenerator[Output, None]:
        """Generate by ``LLM.generate_async``; see `DrivenEngine.outputs`."""
        result = self.llm.generate_async(inputs=attempt.ids, streaming=True, **self._arguments(attempt))
        self._results[attempt.key] = result
        reader = Reader(attempt, self.info.fingerprint)
        try:
            async for _ in result:
                said = reader.read(result)
                if said is not None:
                    yield said
        except self.api.RequestError as error:
            raise lost_or_failed(attempt, _words(error)) from error
        finally:
            self._results.pop(attempt.key, None)
            if not result.finished and self.dead is None:
                result.abort()

    def _arguments(self, attempt: Attempt) -> dict[str, Any]:
        request, api = attempt.request, self.api
        arguments: dict[str, Any] = {"sampling_params": sampling_params(api, attempt, self.info)}
        wish = request.extra.get("disaggregated_params")
        if request.leg == "prefill":
            arguments["disaggregated_params"] = api.DisaggregatedParams(request_type="context_only")
        elif request.handoff is not None:
            arguments["disaggregated_params"] = handover.unpack(api, request.handoff.params)
        elif isinstance(wish, dict) and wish.get("request_type") == "context_and_generation":  # the canary's
            arguments["disaggregated_params"] = api.DisaggregatedParams(request_type="context_and_generation")
        if request.lora is not None:
            arguments["lora_request"] = self.adapter_request(request.lora)
        if request.cache_salt is not None:
            arguments["cache_salt"] = request.cache_salt
        if request.priority and api.prioritises:
            arguments["priority"] = 0.5 + max(-_PRIORITIES, min(_PRIORITIES, request.priority)) / (2 * _PRIORITIES)
        rank = request.extra.get("data_parallel_rank")
        if rank is not None and self.info.data_parallel_size > 1:
            arguments["scheduling_params"] = api.SchedulingParams(attention_dp_rank=rank, attention_dp_relax=False)
        return arguments

    def abort(self, attempt: Attempt) -> bool:
        """Tell the engine; the outputs end by themselves. See `DrivenEngine.abort`."""
        result = self._results.get(attempt.key)
        if result is None:
            return False
        result.abort()
        return True

    def failure(self, error: Exception) -> HoldfastError:
        """Return what an exception of the engine means; see `DrivenEngine.failure`."""
        if isinstance(error, HoldfastError):
            return error
        if isinstance(error, ValueError | TypeError | NotImplementedError):
            return InvalidRequest(f"TensorRT-LLM refuses the request: {_words(error)}")
        fatal = self._fatal()
        if fatal is not None:
            return EngineFailed(f"TensorRT-LLM has failed for good: {_words(fatal)}", engine_died=True)
        return EngineFailed(f"TensorRT-LLM failed on the request: {type(error).__name__}: {_words(error)}")

    def is_death(self, error: Exception) -> bool:
        """Whether the engine is gone; see `DrivenEngine.is_death`."""
        if isinstance(error, HoldfastError | ValueError | TypeError | self.api.RequestError):
            return False
        return self._fatal() is not None or not self._healthy()

    # ---- what it says about itself ----

    def load(self) -> EngineLoad:
        """Return what its statistics said last; see `Engine.load`."""
        if not hasattr(self, "info"):
            return EngineLoad()
        attempts = self.attempts
        return load_of(
            self._stats,
            in_hand=len(attempts),
            begun=sum(attempt.begun for attempt in attempts),
            size=ranks_of(self.config),
            pending=sum(len(attempt.ids) for attempt in attempts if not attempt.begun),
        )

    def take_kv_events(self) -> list[KvEvent]:
        """Return and forget the KV events since the last call; see `Engine.take_kv_events`."""
        taken, self._events = self._events, []
        return taken

    def child_pids(self) -> tuple[int, ...]:
        """Return the processes of its ranks; see `Engine.child_pids`."""
        return self._pids

    async def check(self) -> None:
        """Raise EngineFailed when it says that it has failed; see `Engine.check`."""
        self.require()
        fatal = self._fatal()
        if fatal is not None:
            raise EngineFailed(f"TensorRT-LLM has failed for good: {_words(fatal)}", engine_died=True)

    def _fatal(self) -> BaseException | None:
        """Return the error after which the executor takes no more work."""
        found = getattr(getattr(self.llm, "_executor", None), "_fatal_error", None)
        return found if isinstance(found, BaseException) else None

    def _healthy(self) -> bool:
        check = getattr(self.llm, "_check_health", None)
        return check is None or bool(check())

    # ---- helpers that run beside the sequences ----

    @property
    def _on(self) -> bool:
        """Whether helpers go on; looked at in every round, because a queue's wait may swallow their cancel."""
        return self.dead is None and not self.closed

    async def _watch(self) -> None:
        """Notice the engine's death: its fatal error is only a mark, and streams would hang."""
        while self._on:
            await asyncio.sleep(_WATCH_SECONDS)
            fatal = self._fatal()
            if fatal is None and await self._answers():
                continue
            fatal = fatal or self._fatal()
            why = _words(fatal) if fatal is not None else "its health check says that it does not run"
            self.die(EngineFailed(f"TensorRT-LLM has failed for good: {why}", engine_died=True))

    async def _answers(self) -> bool:
        try:
            async with asyncio.timeout(_HEALTH_SECONDS):
                return await asyncio.to_thread(self._healthy)
        except TimeoutError:
            return False

    async def _poll_stats(self) -> None:
        while self._on:
            await asyncio.sleep(_POLL_SECONDS)
            if self._results:
                await self._take_stats()

    async def _take_stats(self) -> None:
        async for stats in _anew(self.llm.get_stats_async(timeout=_QUEUE_SECONDS)):
            rank, said = read_stats(stats)
            self._stats[rank] = said
            if self.closed:
                return

    async def _poll_events(self) -> None:
        while self._on:
            async for event in _anew(self.llm.get_kv_cache_events_async(timeout=_QUEUE_SECONDS)):
                self._events += self._reader.read(event)
                if not self._on:
                    return
            if len(self._events) > KEPT_EVENTS:
                log.warning("%d KV events were not fetched; the cache is told anew as empty", len(self._events))
                self._reader = EventReader(self.config.block_size)
                self._events = [AllBlocksCleared(dp_rank=rank) for rank in range(ranks_of(self.config))]
            await asyncio.sleep(_POLL_SECONDS)


def _anew(results: Any) -> Any:
    """Return a queue of iterations that is read again; left alone, one that was once empty ends until a new request."""
    mark = getattr(results, "mark_undone", None)
    if mark is not None:
        mark()
    return results


def _words(error: BaseException) -> str:
    """Return an error's message on one line, without the stack that some of them carry."""
    lines = [line.strip() for line in str(error).partition("Stack trace:")[0].splitlines() if line.strip()]
    return " ".join(lines[:4])[:600] or type(error).__name__
