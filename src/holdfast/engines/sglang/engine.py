"""SGLang behind the engine contract.

Its front half (the tokenizer manager) runs on this event loop, its scheduler and the rest in processes of their own
(`launch`). Token ids go in and come out; one task per sequence reads what the front half says (`engines.driven`).

Disaggregation is by rendezvous: both legs get the same handle with host, port and room, and the decode leg hears its
first token when the blocks have come. Blocks that do not come are given up (`patience`): SGLang would wait for minutes.

Must never import SGLang before `SglangEngine.start`, and never block the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec

from holdfast.base.errors import (
    EngineFailed,
    HandoffLost,
    HoldfastError,
    InvalidRequest,
    ModelNotFound,
    NoWorkers,
    UnsupportedFeature,
)
from holdfast.base.settings import InvalidSetting
from holdfast.engines.attempt import Attempt, Output
from holdfast.engines.contract import EngineInfo, EngineLoad, EngineProgress, LoadProgress
from holdfast.engines.driven import DrivenEngine
from holdfast.engines.sglang import sampling
from holdfast.engines.sglang.abilities import Abilities
from holdfast.engines.sglang.arguments import command_line, free_port
from holdfast.engines.sglang.chunks import error_of, output_of
from holdfast.engines.sglang.config import SglangConfig
from holdfast.engines.sglang.describe import Facts, describe
from holdfast.engines.sglang.kv_events import Follower, KvInbox, follow, replay
from holdfast.engines.sglang.launch import Launch, Sockets
from holdfast.engines.sglang.load import BUSY_SECONDS, IDLE_SECONDS, Gauge
from holdfast.engines.sglang.patience import Patience
from holdfast.engines.sglang.rendezvous import Meeting, meeting_of
from holdfast.engines.vllm.replay import replayed
from holdfast.kv.events import KvEvent
from holdfast.models.files import locate
from holdfast.models.hf import read_directory

log = logging.getLogger(__name__)

_WARM_UP = {"max_new_tokens": 2, "temperature": 1.0, "top_p": 0.9, "min_p": 0.1, "top_k": 20, "ignore_eos": True}
_WARM_UP_PENALTIES = {"frequency_penalty": 0.1, "presence_penalty": 0.1, "repetition_penalty": 1.1}


class SglangEngine(Abilities, DrivenEngine):
    """One SGLang engine. See `SglangConfig` for what can be set."""

    def __init__(self, config: SglangConfig | None = None):
        self.config = config or SglangConfig()
        super().__init__(max_waiting=self.config.max_waiting)
        self.engine: Any = None
        self.manager: Any = None
        self.server_args: Any = None
        self.followers: list[Follower] = []
        self.patience = Patience(self.config.handoff_timeout)
        self._sockets: Sockets | None = None
        self._launch: Launch | None = None
        self._inbox = KvInbox(1)
        self._gauge: Gauge | None = None
        self._booting: asyncio.Task[Any] | None = None
        """Whoever starts this engine, until it is started."""
        self._can: sampling.Skills

    # ---- start and end ----

    async def boot(self, on_load: LoadProgress) -> EngineInfo:
        """Load SGLang in its own processes; see `Engine.start`."""
        if not self.config.model:
            raise InvalidSetting("No model is named; give --model DIRECTORY (or DYN_SGLANG_MODEL): a Hugging Face "
                                 "directory, or a name that is in the Hugging Face cache.")  # fmt: skip
        on_load("reading the model's files", 0.0)
        place = await asyncio.to_thread(locate, self.config.model)
        model = await asyncio.to_thread(read_directory, place)
        self.hidden_size = model.hidden_size
        sockets = self._sockets = Sockets()
        port = 0
        if self.role == "prefill":
            port = self.config.bootstrap_port or free_port(self.config.bootstrap_host)
        argv = command_line(
            self.config, str(place), self.role, events=sockets.events(), replay=sockets.replay(), port=port
        )
        on_load("starting SGLang's processes and loading the weights", 0.1)
        self._launch = Launch(argv, self._lost)
        booting = self._booting = asyncio.current_task()
        try:
            self.engine = await self._launch.start()
            facts = await self._meet()
            self._follow(facts.ranks)
            info = describe(
                facts,
                model.text,
                place.name if self.config.model == str(place) else self.config.model,
                self.role,
                guided=self.config.guided,
                rendezvous=f"{self.config.bootstrap_host}:{port}" if port else "",
            )
            self._can = sampling.Skills(info.vocab_size, tokenizer=self.config.guided, seeds=facts.seeds)
            if self.config.warm_up and self.role == "aggregated":
                on_load("warming up", 0.9)
                await self._warm_up(info)
        except BaseException as error:
            self._booting = None
            if self.dead is not None and booting is not None and isinstance(error, asyncio.CancelledError):
                booting.uncancel()
                error = self.dead
            await self._end_tasks()
            await self.shut()
            raise error from None
        self._booting = None
        on_load("ready", 1.0)
        return info

    def _lost(self, error: HoldfastError) -> None:
        """A process of SGLang is gone; while it starts, nobody else would end the waiting for its answers."""
        self.die(error)
        if self._booting is not None:
            self._booting.cancel()

    async def _meet(self) -> Facts:
        """Take over the front half: its messages are read by a task of ours, whose end is the engine's."""
        self.manager, self.server_args = self.engine.tokenizer_manager, self.engine.server_args
        self.manager.event_loop = self._loop  # or it would start a reader of its own, and take our signals
        self.helper(self._read(), "sglang-outputs")
        (state, *_) = await self.manager.get_internal_state()
        scheduler = self.engine._scheduler_init_result.scheduler_infos[0]  # noqa: SLF001  told nowhere else
        facts = Facts(self.server_args, state, scheduler, self.manager.model_config)
        total = int(scheduler["max_total_num_tokens"])
        gauge = self._gauge = Gauge(
            self.manager.load_snapshot_reader, int(self.server_args.page_size), facts.ranks, total
        )
        self.helper(self._watch_load(gauge), "sglang-load")
        return facts

    async def _read(self) -> None:
        try:
            await self.manager.handle_loop()
        except Exception as error:
            log.exception("SGLang's front half has failed")
            self.die(EngineFailed(f"SGLang's front half has failed: {type(error).__name__}: {error}"))

    async def _watch_load(self, gauge: Gauge) -> None:
        while True:
            await asyncio.sleep(BUSY_SECONDS if self._live else IDLE_SECONDS)
            await gauge.read()

    def _follow(self, ranks: int) -> None:
        sockets = self._sockets
        assert sockets is not None
        self._inbox = KvInbox(ranks)
        if self.server_args.disable_radix_cache:
            return
        for rank in range(ranks):
            asks = sockets.replay(rank)
            follower = Follower(rank, self._inbox.add, lambda start, asks=asks: replay(asks, start))
            self.followers.append(follower)
            self.helper(follow(sockets.events(rank), follower), f"sglang-kv-events-{rank}")

    async def _warm_up(self, info: EngineInfo) -> None:
        """Have compiled now what would stop everybody at its first use."""
        ids = [info.eos_token_ids[0]] * 4 if info.eos_token_ids else [1] * 4
        params = {**_WARM_UP, **_WARM_UP_PENALTIES, **({"sampling_seed": 1} if self._can.seeds else {})}
        stream = await self.engine.async_generate(input_ids=ids, sampling_params=params, stream=True)
        async with aclosing(stream):
            async for chunk in stream:
                output_of(chunk, wants_logprobs=False, waits=False)
        await self.manager.flush_cache()

    async def shut(self) -> None:
        """Kill SGLang's processes and wait for their end."""
        if self._launch is not None:
            await self._launch.end()
        for owner, name in ((self.manager, "send_to_scheduler"), (self.manager, "recv_from_detokenizer"),
                            (self.engine, "send_to_rpc")):  # fmt: skip
            if (socket := getattr(owner, name, None)) is not None:
                socket.close(linger=0)  # or this process waits at its exit for somebody to read what is left in it
        server = getattr(self.manager, "bootstrap_server", None)
        if server is not None:
            await asyncio.to_thread(server.close)
        if self._sockets is not None:
            self._sockets.close()
        self.engine = None

    def child_pids(self) -> tuple[int, ...]:
        """Return SGLang's schedulers and its detokenizer."""
        return self._launch.pids if self._launch is not None else ()

    # ---- one sequence ----

    def prepare(self, attempt: Attempt) -> None:
        """Refuse what SGLang cannot do, and what would end its scheduler."""
        request = attempt.request
        sampling.check(attempt, self._can)
        meeting = meeting_of(request)
        if self.role != "aggregated" and meeting is None:
            raise NoWorkers(
                f"This SGLang worker is a {self.role} worker and does one half of a request: a prefill worker and a "
                "decode worker get it together. Start the other one, or one without a role.",
                role=self.role,
            )
        if request.leg not in ("aggregated", self.role):
            raise UnsupportedFeature(f"This SGLang worker ({self.role}) does no {request.leg} legs.")
        if attempt.min_tokens and request.leg == "decode" and not self._can.tokenizer:
            raise UnsupportedFeature(
                "An SGLang decode worker without a tokenizer cannot hold back the end of a text (min_tokens); it can "
                "when it is started with --sglang-guided.",
                param="min_tokens",
            )
        if request.lora is not None and request.lora not in self.loaded:
            raise ModelNotFound(f"No adapter {request.lora!r} is loaded here.", param="model")
        rank = request.extra.get("data_parallel_rank")
        if rank is not None and (type(rank) is not int or not 0 <= rank < self.info.data_parallel_size):
            raise InvalidRequest(
                f"Rank {rank!r} was asked for; this engine has the ranks 0 to {self.info.data_parallel_size - 1}.",
                param="data_parallel_rank",
            )

    async def outputs(self, attempt: Attempt) -> AsyncGenerator[Output, None]:
        """Generate; closing it makes SGLang stop, whether it knows the sequence yet or not."""
        params = sampling.params_of(attempt, self._can)
        if sampling.begins_anew(attempt):
            prompt, existing = attempt.ids[: attempt.prompt_tokens], attempt.ids[attempt.prompt_tokens :]
            whole = self._run(attempt, prompt, params, "")
            rest = whole if attempt.request.leg == "prefill" else replayed(whole, existing)
        elif attempt.min_tokens and not self._can.tokenizer and attempt.request.leg != "prefill":
            first = sampling.forced(params, attempt)
            made: list[int] = []
            ended = False
            async with aclosing(self._run(attempt, attempt.ids, first, "-least")) as outputs:
                async for output in outputs:
                    made += output.tokens
                    ended = output.finish is not None and (
                        output.finish != "length" or attempt.first_index + len(made) >= attempt.limit
                    )
                    if not ended:
                        output.finish = None
                    yield output
            if ended:
                return
            params["max_new_tokens"] -= len(made)
            rest = self._run(attempt, attempt.ids + made, params, "")
        else:
            rest = self._run(attempt, attempt.ids, params, "")
        async with aclosing(rest) as outputs:
            async for output in outputs:
                yield output

    async def _run(
        self, attempt: Attempt, ids: list[int], params: dict[str, Any], suffix: str
    ) -> AsyncGenerator[Output, None]:
        """Yield what one run of SGLang says."""
        request = attempt.request
        # SGLang forgets stop ids where it is told to ignore the end of sequence
        cuts = frozenset(request.stop.stop_token_ids) if params["ignore_eos"] and not suffix else frozenset()
        meeting = meeting_of(request)
        stream = await self.engine.async_generate(
            input_ids=ids,
            sampling_params=params,
            stream=True,
            rid=attempt.engine_id + suffix,
            **self._more(attempt, meeting),
        )
        wants = request.sampling.logprobs is not None
        async with aclosing(stream):
            async for chunk in self._in_time(attempt, stream) if attempt.handoff_pending else stream:
                waits = attempt.handoff_pending or request.leg == "prefill"
                output = output_of(chunk, wants_logprobs=wants, waits=waits)
                if cuts and not cuts.isdisjoint(output.tokens):
                    yield _cut(output, cuts)
                    return
                yield output

    def _more(self, attempt: Attempt, meeting: Meeting | None) -> dict[str, Any]:
        """Return the arguments beside tokens and sampling."""
        request = attempt.request
        more: dict[str, Any] = {}
        if request.sampling.logprobs is not None:
            more = {"return_logprob": True, "top_logprobs_num": request.sampling.logprobs}
        if request.lora is not None:
            more["lora_path"] = request.lora
        if request.cache_salt is not None:
            more["cache_salt"] = request.cache_salt
        rank = request.extra.get("data_parallel_rank")
        if meeting is not None:
            more |= msgspec.structs.asdict(meeting)
            if request.leg == "prefill" and rank is None:
                rank = more["disagg_prefill_dp_rank"]
            if request.leg != "decode":
                del more["disagg_prefill_dp_rank"]
        if rank is not None and self.info.data_parallel_size > 1:
            more["routed_dp_rank"] = rank
        if self.server_args.enable_priority_scheduling:
            low_first = self.server_args.schedule_low_priority_values_first
            more["priority"] = -request.priority if low_first else request.priority
        return more

    async def _in_time(self, attempt: Attempt, stream: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        """Yield the chunks of a decode leg; the first one must come within what the legs in hand let expect.

        Raises:
            HandoffLost: it did not.
        """
        waiting = sum(len(other.ids) for other in self.attempts if other.handoff_pending)
        bound = self.patience.bound(waiting)
        begun = self._loop.time()
        try:
            async with asyncio.timeout(bound):
                first = await anext(stream)
        except TimeoutError:
            raise HandoffLost(
                f"The KV blocks of {len(attempt.ids)} tokens did not come within {bound:.1f} s "
                f"(DYN_SGLANG_HANDOFF_TIMEOUT_SECS is {self.config.handoff_timeout:g} s, the rest is for {waiting} "
                "tokens in hand); the prefill worker is gone or far behind.",
                threshold=bound,
            ) from None
        except StopAsyncIteration:
            return
        self.patience.came(waiting, self._loop.time() - begun)
        yield first
        async for chunk in stream:
            yield chunk

    def failure(self, error: Exception) -> HoldfastError:
        """Return what an exception of SGLang means."""
        return error_of(error) or super().failure(error)

    # ---- numbers ----

    def load(self) -> EngineLoad:
        """Return how full it is; what is in hand by our own count, memory by SGLang's."""
        attempts = self.attempts
        begun = sum(attempt.begun for attempt in attempts)
        ahead = sum(len(attempt.ids) for attempt in attempts if not attempt.begun)
        if self._gauge is None:
            return EngineLoad(running=begun, waiting=len(attempts) - begun, prefill_tokens=ahead)
        return self._gauge.load(begun, len(attempts) - begun, ahead)

    def progress(self) -> EngineProgress:
        """Return the counters; the chunks of a long prompt show in ``prefilled``."""
        prefilled = self._gauge.prefilled if self._gauge is not None else 0
        silent = self.silence(by_chunk=True)
        return EngineProgress(self.steps, self.tokens, prefilled, self.phase, silent, self.late_tokens)

    def take_kv_events(self) -> list[KvEvent]:
        """Return and forget what SGLang has said about its cache."""
        return self._inbox.take()


def _cut(output: Output, ends: frozenset[int]) -> Output:
    """Return an output up to its first end token, and finished."""
    count = next(at for at, token in enumerate(output.tokens) if token in ends) + 1
    logprobs = output.logprobs[:count] if output.logprobs is not None else None
    return Output(output.tokens[:count], finish="stop", logprobs=logprobs, cached_tokens=output.cached_tokens)
