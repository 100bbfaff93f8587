"""Stand-in: the engine. A step every half millisecond gives each running sequence its next token."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor.request import LoRARequest
from tensorrt_llm.executor.result import IterationResult, Logprob, RequestOutput
from tensorrt_llm.executor.utils import RequestError
from tensorrt_llm.llmapi.llm_args import CacheTransceiverConfig, KvCacheConfig
from tensorrt_llm.llmapi.pool import Pool
from tensorrt_llm.sampling_params import SamplingParams
from tensorrt_llm.scheduling_params import SchedulingParams
from xxhash import xxh3_64_intdigest

from tests.support.tensorrt_llm_standin import OFFERED

STEP_SECONDS = 0.0005
TRANSFER_STEPS = 6
"""How long KV blocks are on their way to a decode leg."""
VOCABULARY = (1000, 4000)
"""Ids that it generates."""


class _Executor:
    """Has the marks of the real executor."""

    def __init__(self) -> None:
        self._fatal_error: BaseException | None = None
        self.stopped = False

    def is_shutdown(self) -> bool:
        return self.stopped

    def check_health(self) -> bool:
        return self._fatal_error is None and not self.stopped


class _Args:
    def __init__(self, max_seq_len: int | None):
        self.max_seq_len = max_seq_len


class _Running:
    def __init__(self, result: RequestOutput, ids: list[int], params: SamplingParams, legs: DisaggregatedParams | None):
        self.result, self.ids, self.params, self.legs = result, ids, params, legs
        self.prompt = len(ids)
        self.count = 0
        self.wait = TRANSFER_STEPS if legs is not None and legs.request_type == "generation_only" else 0
        self.aborted = False


class LLM:
    """See the module. What it is told to do wrong is set on the object: ``transfer_fails``, ``lose_events``."""

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any = None,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        *,
        pipeline_parallel_size: int = 1,
        enable_attention_dp: bool = False,
        enable_lora: bool = False,
        guided_decoding_backend: str | None = None,
        max_batch_size: int | None = 2048,
        max_num_tokens: int | None = 8192,
        max_seq_len: int | None = None,
        enable_chunked_prefill: bool = False,
        kv_cache_config: KvCacheConfig | None = None,
        cache_transceiver_config: CacheTransceiverConfig | None = None,
        enable_iter_perf_stats: bool = False,
    ):
        assert Path(model).is_dir()
        assert enable_iter_perf_stats
        self.args = _Args(max_seq_len)
        self._executor = _Executor()
        self._seats = max_batch_size or 2048
        self._pool = Pool(kv_cache_config or KvCacheConfig())
        self._transceiver = cache_transceiver_config
        self._running: dict[int, _Running] = {}
        self._waiting: list[_Running] = []
        self._last = 0
        self._stats: IterationResult | None = None
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.unsafe_aborts = 0
        self.transfer_fails = False
        self.requests: list[dict[str, Any]] = []

    def generate_async(
        self,
        inputs: list[int],
        sampling_params: SamplingParams | None = None,
        lora_request: LoRARequest | None = None,
        streaming: bool = False,
        disaggregated_params: DisaggregatedParams | None = None,
        scheduling_params: SchedulingParams | None = None,
        cache_salt: str | None = None,
        priority: float = 0.5,
    ) -> RequestOutput:
        """Queue a request. Must be called on a running loop, as the real one must."""
        if self._executor.is_shutdown():
            raise RuntimeError("LLM is shutting down")
        params = sampling_params or SamplingParams()
        if params.end_id is None:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        if not 0.0 <= priority <= 1.0:
            raise ValueError(f"priority must be a float in [0.0, 1.0], got {priority}")
        legs = disaggregated_params
        if legs is not None and legs.request_type != "context_and_generation" and self._transceiver is None:
            raise ValueError("a cache transceiver is needed")
        self.requests.append({"params": params, "legs": legs, "lora": lora_request, "salt": cache_salt,
                              "priority": priority, "scheduling": scheduling_params})  # fmt: skip
        self._wake()
        self._last += 1
        result = RequestOutput(self._last, self._abort)
        self._waiting.append(_Running(result, list(inputs), params, legs))
        return result

    def get_stats_async(self, timeout: float | None = 2) -> IterationResult:
        """Return the statistics."""
        assert self._stats is not None
        self._stats.set_timeout(timeout)
        return self._stats

    def get_kv_cache_events_async(self, timeout: float | None = 2) -> IterationResult:
        """Return the KV events."""
        assert self._pool.events is not None
        self._pool.events.set_timeout(timeout)
        return self._pool.events

    def shutdown(self) -> None:
        """Stop; called from any thread."""
        self._executor.stopped = True
        if self._task is not None and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._task.cancel)

    def _check_health(self) -> bool:
        return self._executor.check_health()

    def _abort(self, request_id: int) -> None:
        for one in [*self._running.values(), *self._waiting]:
            if one.result.request_id == request_id:
                self.unsafe_aborts += one.wait > 0
                one.aborted = True

    def _wake(self) -> None:
        """Like the real one: results of iterations exist from the first request on, and go on with each."""
        if self._stats is None:
            self._stats, self._pool.events = IterationResult(), IterationResult()
            self._pool.created()
        assert self._pool.events is not None
        self._stats.mark_undone()
        self._pool.events.mark_undone()
        self._loop = asyncio.get_running_loop()
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._run(), name="tensorrt-llm-stand-in")

    async def _run(self) -> None:
        while (self._running or self._waiting) and self._executor.check_health():
            await asyncio.sleep(STEP_SECONDS)
            if self._executor._fatal_error is not None:
                return  # streams hang, as they do
            try:
                self._step()
            except Exception as error:
                self._executor._fatal_error = error
                raise

    def _step(self) -> None:
        self._waiting = [one for one in self._waiting if not self._gone(one)]
        while self._waiting and len(self._running) < self._seats:
            most = self._waiting[0].prompt + self._waiting[0].params.max_tokens
            if not self._pool.admit(self._waiting[0].result.request_id, most):
                break
            one = self._waiting.pop(0)
            self._running[one.result.request_id] = one
        said = self._statistics()
        for number, one in list(self._running.items()):
            if self._gone(one) or self._advance(one):
                del self._running[number]
                self._pool.release(number)
        assert self._stats is not None
        self._stats.put(said)

    def _statistics(self) -> dict[str, Any]:
        return {
            "iter": self._last,
            "numActiveRequests": len(self._running),
            "numQueuedRequests": len(self._waiting),
            "kvCacheStats": {"usedNumBlocks": self._pool.used, "maxNumBlocks": self._pool.total},
        }

    def _gone(self, one: _Running) -> bool:
        if not one.aborted:
            return False
        one.result.put(_ending("cancelled"))
        return True

    def _advance(self, one: _Running) -> bool:
        """Do one step of a sequence; returns whether it has ended."""
        if one.wait:
            one.wait -= 1
            return one.wait == 0 and not self._arrived(one)
        if one.count == 0:
            cached = self._pool.compute(one.ids)
            one.result.put(lambda result: setattr(result, "cached_tokens", cached))
        token = _next_token(one)
        one.ids.append(token)
        one.count += 1
        if one.legs is not None and one.legs.request_type == "context_only":
            return self._hand_over(one, token)
        return self._say(one, token)

    def _arrived(self, one: _Running) -> bool:
        """The blocks are here: the first token is said again by this leg."""
        assert one.legs is not None
        assert one.legs.first_gen_tokens
        held = OFFERED.pop(one.legs.opaque_state or b"", None)
        if held != one.ids or self.transfer_fails:
            one.result.put(_failing("KV cache transfer failed"))
            return False
        token = one.legs.first_gen_tokens[0]
        one.ids.append(token)
        one.count += 1
        return not self._say(one, token)

    def _hand_over(self, one: _Running, token: int) -> bool:
        state = b"\x00state-%d" % one.result.request_id + bytes([id(self) % 251])
        OFFERED[state] = one.ids[:-1]
        given = DisaggregatedParams(
            request_type="context_only", first_gen_tokens=[token], ctx_request_id=one.result.request_id,
            opaque_state=state,
            first_gen_log_probs=[_logprobs(token, one.params.logprobs)] if one.params.logprobs else None,
        )  # fmt: skip

        def change(result: RequestOutput) -> None:
            result.outputs[0].token_ids.append(token)
            result.outputs[0].disaggregated_params = given
            _ending("length")(result)

        one.result.put(change)
        return True

    def _say(self, one: _Running, token: int) -> bool:
        params = one.params
        late = one.count >= (params.min_tokens or 0)
        end = not params.ignore_eos and token == params.end_id and late
        word = token in (params.stop_token_ids or ()) and late
        finish = "stop" if end or word else "length" if one.count >= params.max_tokens else None

        def change(result: RequestOutput) -> None:
            output = result.outputs[0]
            output.token_ids.append(token)
            if params.logprobs:
                output.logprobs.append(_logprobs(token, params.logprobs))
            if word and not end and not params.include_stop_str_in_output:
                del output.token_ids[-1]
            if finish is not None:
                _ending(finish)(result)

        one.result.put(change)
        return finish is not None


def _ending(reason: str) -> Any:
    def change(result: RequestOutput) -> None:
        result.outputs[0].finish_reason = reason
        result.finished = True

    return change


def _failing(message: str) -> Any:
    def change(result: RequestOutput) -> None:
        result.finished = True
        raise RequestError(message)

    return change


def _next_token(one: _Running) -> int:
    params = one.params
    drawn = "" if params.greedy else f"{params.seed} {params.temperature} {params.top_p} {params.top_k} {params.min_p}"
    shaped = f"{params.repetition_penalty} {params.presence_penalty} {params.frequency_penalty}"
    number = xxh3_64_intdigest(f"{drawn}|{shaped}|{one.ids}".encode())
    low, high = VOCABULARY
    if number % 11 == 0 and one.count >= (params.min_tokens or 0) - 1:
        return params.end_id if params.end_id is not None and params.end_id >= 0 else low
    return low + number % (high - low)


def _logprobs(token: int, count: int | None) -> dict[int, Logprob]:
    found = {token: Logprob(-0.25, 1)}
    for rank in range(2, (count or 1) + 1):
        found[5000 + rank] = Logprob(-0.25 - math.log(rank), rank)
    return found
