"""What is read off the frontend's state when somebody scrapes: so that no gauge can drift from the truth.

Must never be called on the token path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from holdfast.frontend.kv_gauges import KvGauges
from holdfast.frontend.metrics import shown_state
from holdfast.frontend.router_metrics import RouterMetrics
from holdfast.frontend.standing import Standing
from holdfast.models.card import ModelCard
from holdfast.runtime.pool import Worker
from holdfast.telemetry.traffic import TRAFFIC

if TYPE_CHECKING:
    from holdfast.frontend.app import Frontend

STATES = ("unknown", "probing", "usable", "suspect", "ejected", "draining")
_STAGES = {
    "received": "route", "placing": "route", "migrating": "route", "prefilling": "prefill", "dispatched": "dispatch",
}  # fmt: skip
_CARD_FIELDS = {
    "model_total_kv_blocks": "total_kv_blocks",
    "model_max_num_seqs": "max_num_seqs",
    "model_max_num_batched_tokens": "max_num_batched_tokens",
    "model_context_length": "context_length",
    "model_kv_cache_block_size": "block_size",
}


class Gauges:
    """Created once per frontend; `refresh` before every scrape."""

    def __init__(self, frontend: Frontend):
        self._frontend = frontend
        r = frontend.metrics.source
        front = "dynamo_frontend_"
        self._active = r.gauge(f"{front}active_requests")
        self._queued = r.gauge(f"{front}queued_requests")
        self._stages = r.gauge(f"{front}stage_requests")
        self._leases = r.gauge("holdfast_frontend_leases")
        self._ready = r.gauge(f"{front}model_ready")
        self._usable = r.gauge("holdfast_frontend_model_usable_workers")
        self._prefilling = r.gauge("holdfast_frontend_model_prefill_workers")
        self._limit = r.gauge(f"{front}model_migration_limit")
        self._cards = {field: r.gauge(f"{front}{name}") for name, field in _CARD_FIELDS.items()}
        self._workers = r.gauge("holdfast_frontend_workers")
        self._state = r.gauge("holdfast_frontend_worker_state")
        self._blocks = r.gauge(f"{front}worker_active_decode_blocks")
        self._prefill = r.gauge(f"{front}worker_active_prefill_tokens")
        self._waiting = r.gauge(f"{front}worker_waiting_requests")
        self._last_first = r.gauge(f"{front}worker_last_time_to_first_token_seconds")
        self._last_prompt = r.gauge(f"{front}worker_last_input_sequence_tokens")
        self._last_inter = r.gauge(f"{front}worker_last_inter_token_latency_seconds")
        self._after_cancel = r.gauge("holdfast_worker_tokens_after_cancel")
        self._reachable = r.gauge("holdfast_frontend_discovery_reachable").labels()
        self._plane = tuple(
            r.gauge(f"dynamo_request_plane_{name}").labels() for name in ("inflight", "inflight_requests")
        )
        self._sent = r.counter("dynamo_transport_tcp_bytes_sent_total").labels()
        self._received = r.counter("dynamo_transport_tcp_bytes_received_total").labels()
        self._errors = r.counter("dynamo_transport_tcp_errors_total").labels()
        self._pool_active = r.gauge("dynamo_transport_tcp_pool_active").labels()
        self._pool_idle = r.gauge("dynamo_transport_tcp_pool_idle").labels()
        self._told = (0, 0, 0)
        self._seen_models: set[str] = set()
        self._standing = Standing(frontend)
        self._kv = KvGauges(r, frontend.knowledge, frontend.pool)
        frontend.services.router.on_decision = RouterMetrics(r, frontend.metrics.label).decided
        r.watch_process()

    def render(self) -> bytes:
        """Return all metrics of the frontend as they are now, in Prometheus' text format."""
        self.refresh()
        return self._frontend.metrics.source.render()

    def refresh(self) -> None:
        """Read everything."""
        frontend = self._frontend
        workers = frontend.pool.all_workers()
        self._models()
        self._streams()
        self._each_worker(workers)
        self._standing.refresh()
        self._kv.refresh()
        for kind, held in frontend.services.leases.sums().items():
            self._leases.labels(kind).set(held)
        for gauge in self._plane:
            gauge.set(frontend.services.leases.held("attempt"))
        self._reachable.set(frontend.pool.discovery_reachable)
        connected = [w for w in workers if w.link is not None and w.link.connected]
        busy = sum(w.in_flight > 0 for w in connected)
        self._pool_active.set(busy)
        self._pool_idle.set(len(connected) - busy)
        self._traffic()

    def _streams(self) -> None:
        metrics = self._frontend.metrics
        active, queued, stages = Counter[str](), Counter[str](), Counter[str]()
        for request in self._frontend.generate.active.values():
            model = metrics.label(request.model)
            active[model] += 1
            queued[model] += not any(stream.delivered for stream in request.streams)
            for stream in request.streams:
                stages[_STAGES.get(stream.state, "")] += 1
                metrics.progressed(stream)
        self._seen_models |= set(active)
        for model in self._seen_models:
            self._active.labels(model).set(active[model])
            self._queued.labels(model).set(queued[model])
        self._stages.labels("preprocess", "").set(metrics.preprocessing)
        for stage in ("route", "dispatch"):
            self._stages.labels(stage, "aggregated").set(stages[stage])
        self._stages.labels("dispatch", "prefill").set(stages["prefill"])

    def _models(self) -> None:
        pool = self._frontend.pool
        cards = pool.models()
        primary = {name: found for name, found in cards.items() if found[0].name == name}
        known = {m.card.name for m in self._frontend.registry.served().values()} | set(primary)
        for gauge in (self._ready, self._usable, self._prefilling, self._limit, *self._cards.values()):
            gauge.clear()
        for model in sorted(known):
            self._frontend.metrics.expect(model)
            label = self._frontend.metrics.label(model)
            self._seen_models.add(label)
            usable = len(pool.usable(model))
            self._ready.labels(label).set(usable > 0)
            self._usable.labels(label).set(usable)
            self._prefilling.labels(label).set(len(pool.prefill(model)))
            self._limit.labels(label).set(self._frontend.services.settings.migration_limit)
            self._card(label, primary.get(model, ()))

    def _card(self, label: str, cards: Sequence[ModelCard]) -> None:
        for field, gauge in self._cards.items():
            if cards:
                gauge.labels(label).set(min(getattr(card, field) for card in cards))

    def _each_worker(self, workers: Sequence[Worker]) -> None:
        states = Counter(shown_state(worker) for worker in workers)
        for state in STATES:
            self._workers.labels(state).set(states[state])
        gauges = (self._blocks, self._prefill, self._waiting, self._last_first, self._last_prompt, self._last_inter)
        for gauge in (*gauges, self._after_cancel, self._state):
            gauge.clear()
        for worker in workers:
            where = (worker.instance, "0", worker.role)
            load = worker.load
            self._blocks.labels(*where).set(load.kv_used_blocks)
            self._prefill.labels(*where).set(load.prefill_tokens)
            self._waiting.labels(*where).set(load.waiting)
            shown = shown_state(worker)
            for state in STATES:
                self._state.labels(worker.instance, state).set(state == shown)
            self._after_cancel.labels(worker.instance).set(worker.progress.tokens_after_cancel)
            last = self._frontend.metrics.last_seen.get(worker.instance)
            if last is not None:
                self._last_first.labels(*where).set(last.first_token)
                self._last_prompt.labels(*where).set(last.prompt_tokens)
                self._last_inter.labels(*where).set(last.inter_token)

    def _traffic(self) -> None:
        """Counters take increments: what came since the last scrape."""
        now = (TRAFFIC.sent, TRAFFIC.received, TRAFFIC.errors)
        for counter, total, told in zip((self._sent, self._received, self._errors), now, self._told, strict=True):
            counter.inc(total - told)
        self._told = now
