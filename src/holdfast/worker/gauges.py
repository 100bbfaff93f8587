"""What is read off a worker when somebody scrapes: so that no gauge can drift from the truth.

Reading is the event loop's; what was read may be rendered in any thread. Must never ask the engine to do anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from holdfast.health.probe import Kind
from holdfast.runtime.shutdown import Shutdown
from holdfast.worker.calls import Calls
from holdfast.worker.host import EngineHost
from holdfast.worker.kv_gauges import KvGauges
from holdfast.worker.kv_publish import KvPublisher

_STATES = ("starting", "warming", "ready", "saturated", "stalled", "draining", "stopped", "failed")
_RESULTS: tuple[Kind, ...] = ("good", "bad", "unclear")


class WorkerGauges:
    """Of one worker.

    Args:
        calls: whose registry it is.
        host: read for load, progress, limit and leases.
        state: the worker's state.
        shutdown: how far it is with leaving.
        canaries: how many ended which way, since the start.
        kv: what is told about the KV cache.
    """

    def __init__(
        self,
        calls: Calls,
        host: EngineHost,
        state: Callable[[], str],
        shutdown: Callable[[], Shutdown],
        canaries: Callable[[], Mapping[Kind, int]],
        *,
        kv: KvPublisher,
    ):
        self._kv = KvGauges(calls, kv)
        self._calls, self._host, self._state, self._shutdown, self._tested = calls, host, state, shutdown, canaries
        self._where = where = calls.hosted
        r = calls.registry
        self._born = 0
        self._uptime = r.gauge("dynamo_component_uptime_seconds").labels(*where)
        self._blocks = r.gauge("dynamo_component_total_blocks").labels(*where)
        self._usage = r.gauge("dynamo_component_gpu_cache_usage_percent").labels(*where)
        self._load_time = r.gauge("dynamo_component_model_load_time_seconds").labels(*where)
        self._capacity = r.gauge("dynamo_work_handler_pool_capacity").labels()
        self._used = r.gauge("holdfast_worker_kv_used_blocks").labels(*where)
        self._running = r.gauge("holdfast_worker_running_sequences").labels(*where)
        self._waiting = r.gauge("holdfast_worker_waiting_sequences").labels(*where)
        self._prefill = r.gauge("holdfast_worker_prefill_tokens").labels(*where)
        self._states = r.gauge("holdfast_worker_state")
        self._held = r.gauge("holdfast_worker_leases")
        self._stages = r.gauge("dynamo_component_shutdown_stage_seconds")
        self._left = r.gauge("dynamo_component_shutdown_remaining_seconds").labels(*where)
        self._leaving = r.gauge("dynamo_component_shutdown_inflight_requests").labels(*where)
        self._counters = [
            r.counter(f"holdfast_worker_{name}_total").labels(*where)
            for name in (
                *("engine_steps", "generated_tokens", "prefilled_tokens", "late_tokens"),
                *("prefix_cache_queried_tokens", "prefix_cache_hit_tokens"),
            )
        ]
        self._told: tuple[int, ...] = (0,) * len(self._counters)
        canary_counter = r.counter("holdfast_worker_canaries_total")
        self._canaries = {result: canary_counter.labels(*where, result) for result in _RESULTS}
        calls.foresee()
        r.watch_process()

    def start(self) -> None:
        """The process begins; on the event loop."""
        self._born = self._calls.clock()

    def loaded(self) -> None:
        """The engine is ready."""
        self._load_time.set((self._calls.clock() - self._born) / 1e9)

    def render(self) -> bytes:
        """Return all metrics of the worker as they are now, in Prometheus' text format; on the event loop."""
        self.refresh()
        return self._calls.registry.render()

    def refresh(self) -> None:
        """Read everything off the engine; on the event loop, which owns what is read."""
        progress, load = self._host.measure()
        self._uptime.set((self._calls.clock() - self._born) / 1e9)
        self._blocks.set(load.kv_total_blocks)
        self._used.set(load.kv_used_blocks)
        self._usage.set(load.kv_used_blocks / load.kv_total_blocks if load.kv_total_blocks else 0.0)
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._prefill.set(load.prefill_tokens)
        self._capacity.set(self._host.limit)
        state = self._state()
        for name in _STATES:
            self._states.labels(*self._where, name).set(name == state)
        for kind, held in self._host.leases.sums().items():
            self._held.labels(*self._where, kind).set(held)
        self._show_leaving()
        for result, count in self._tested().items():
            self._canaries[result].set(count)
        self._kv.refresh()
        cache = self._host.engine.cache_counts()
        now = (
            *(progress.steps, progress.tokens, progress.prefilled, progress.tokens_after_cancel),
            *(cache.queried, cache.hits),
        )
        for counter, total, told in zip(self._counters, now, self._told, strict=True):
            counter.inc(max(0, total - told))
        self._told = now

    def _show_leaving(self) -> None:
        shutdown, now = self._shutdown(), asyncio.get_running_loop().time()
        self._left.set(shutdown.remaining(now))
        self._leaving.set(0 if shutdown.stage == "serving" else self._host.in_flight)
        reason = "signal" if self._host.death is None else "engine_dead"
        for stage, seconds in shutdown.durations(now).items():
            self._stages.labels(*self._where, stage, reason).set(seconds)
