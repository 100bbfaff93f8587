"""The frontend's counters, under the names that Dynamo's users know, and the observer that feeds them.

Names, labels and units stand in `telemetry.catalogue`. Nothing here runs per token; what happens per token is a
number in the stream's `Rhythm`, added up when the stream ends, every some thousand tokens, and when somebody
scrapes. What can be read off the frontend's state is read then (`gauges`). Must never decide anything.
"""

from __future__ import annotations

from holdfast.base.errors import HoldfastError
from holdfast.frontend.foreseen import foresee, foresee_model
from holdfast.frontend.prefill_metrics import PrefillMetrics
from holdfast.requests.disagg import Reason
from holdfast.requests.generation import Generation
from holdfast.requests.plan import Ending
from holdfast.requests.prefill_leg import PrefillLeg
from holdfast.requests.request import Request
from holdfast.runtime.notices import PoolEvent
from holdfast.runtime.pool import Worker
from holdfast.telemetry.catalogue import CATALOGUE
from holdfast.telemetry.metric import UNKNOWN, LabelValues, MetricSettings, Registry
from holdfast.telemetry.outcomes import error_type
from holdfast.telemetry.series import TICKS_PER_SECOND, Buckets, Cell

KNOBS_SHOWN = 64
"""Different layers and knobs of rejections; more of them share a name."""
FOLD_EVERY = 256
"""Requests of a model after which the values that were noted for histograms are counted."""
_LEFT = frozenset({"cancelled", "client_stalled"})
"""Ends that are the client's doing."""
_OUTCOMES = {"cancelled": "cancelled", "failed": "failure", "expired": "failure", "rejected": "failure"}


class LastSeen:
    """The latest stream on one worker."""

    __slots__ = ("first_token", "inter_token", "prompt_tokens")

    def __init__(self) -> None:
        self.first_token = 0.0
        self.inter_token = 0.0
        self.prompt_tokens = 0


class _Model:
    """The series of one model, looked up once."""

    __slots__ = (
        "cached", "duration", "first_tokens", "gaps", "inflight", "input_lengths", "input_tokens", "name",
        "output_lengths", "output_tokens", "started", "succeeded",
    )  # fmt: skip

    def __init__(self, metrics: FrontendMetrics, name: str):
        self.name = name
        self.started: dict[tuple[str, str], Cell] = {}
        """By surface and kind."""
        self.succeeded: dict[tuple[str, str], Cell] = {}
        self.inflight = metrics.inflight.labels(name)
        self.duration = metrics.duration.labels(name)
        self.first_tokens = metrics.first_tokens.labels(name)
        self.gaps = metrics.gaps.labels(name)
        self.input_lengths = metrics.input_lengths.labels(name)
        self.input_tokens = metrics.input_tokens.labels(name)
        self.output_lengths = metrics.output_lengths.labels(name)
        self.output_tokens = metrics.output_tokens.labels(name)
        self.cached = metrics.cached.labels(name)

    def noted(self) -> tuple[Buckets, ...]:
        """Return the histograms whose values are noted first and counted later."""
        return self.duration, self.first_tokens, self.input_lengths, self.output_lengths, self.cached


class FrontendMetrics:
    """All metrics of one frontend in a registry of their own; an `Observer` of the request lifecycle."""

    def __init__(self, settings: MetricSettings | None = None) -> None:
        self.source = r = Registry(CATALOGUE, "frontend", settings)
        self.registry = r.registry
        self.requests = r.counter("dynamo_frontend_requests_total")
        self.started = r.counter("dynamo_frontend_requests_started_total")
        self.inflight = r.gauge("dynamo_frontend_inflight_requests")
        self.disconnected = r.gauge("dynamo_frontend_disconnected_clients").labels()
        self.disconnects = r.counter("holdfast_frontend_client_disconnects_total")
        self.stages = r.histogram("dynamo_frontend_stage_duration_seconds")
        self.duration = r.histogram("dynamo_frontend_request_duration_seconds")
        self.first_tokens = r.histogram("dynamo_frontend_time_to_first_token_seconds")
        self.gaps = r.histogram("dynamo_frontend_inter_token_latency_seconds")
        self.input_lengths = r.histogram("dynamo_frontend_input_sequence_tokens")
        self.output_lengths = r.histogram("dynamo_frontend_output_sequence_tokens")
        self.cached = r.histogram("dynamo_frontend_cached_tokens")
        self.output_tokens = r.counter("dynamo_frontend_output_tokens_total")
        self.input_tokens = r.counter("dynamo_frontend_input_tokens_total")
        self.failures = r.counter("dynamo_frontend_failures_total")
        self.migrations = r.counter("dynamo_frontend_model_migration_total")
        self.migration_duration = r.histogram("dynamo_frontend_model_migration_duration_seconds")
        self.migration_gap = r.histogram("holdfast_frontend_migration_gap_seconds")
        self.migration_too_long = r.counter("dynamo_frontend_model_migration_max_seq_len_exceeded_total")
        self.cancellations = r.counter("dynamo_frontend_model_cancellation_total")
        self.rejections = r.counter("dynamo_frontend_model_rejection_total")
        self.rejections_by_knob = r.counter("holdfast_frontend_rejection_total")
        self.attempt_failures = r.counter("holdfast_frontend_attempt_failures_total")
        self.joins = r.counter("holdfast_frontend_joins_total")
        self.transitions = r.counter("holdfast_frontend_worker_transitions_total")
        self.prefill = PrefillMetrics(r)
        self.queue_waits = r.histogram("holdfast_frontend_queue_wait_seconds")
        self.template_time = r.histogram("dynamo_frontend_template_seconds").labels()
        self.tokenize_time = r.histogram("dynamo_frontend_tokenize_seconds").labels()
        self.queue_time = r.histogram("dynamo_request_plane_queue_seconds").labels()
        self.send_time = r.histogram("dynamo_request_plane_send_seconds").labels()
        self.roundtrip = r.histogram("dynamo_request_plane_roundtrip_ttft_seconds").labels()
        self.loop_delay = r.histogram("dynamo_frontend_event_loop_delay_seconds").labels()
        self.loop_stalls = r.counter("dynamo_frontend_event_loop_stall_total").labels()
        self.last_seen: dict[str, LastSeen] = {}
        """By worker; forgotten with it."""
        self.preprocessing = 0
        """Requests that are being read, rendered and tokenized."""
        self._names = LabelValues()
        self._knobs = LabelValues(KNOBS_SHOWN)
        self._models: dict[str, _Model] = {}
        self._states: dict[str, str] = {}
        self._stage_route, self._stage_roundtrip = map(self.stages.labels, ("route", "transport_roundtrip"))
        self._stage_preprocess = self.stages.labels("preprocess")
        self._stage_postprocess = self.stages.labels("postprocess")
        self._noted = (
            self._stage_route, self._stage_roundtrip, self._stage_preprocess, self._stage_postprocess, self.queue_time,
            self.send_time, self.roundtrip, self.template_time, self.tokenize_time,
        )  # fmt: skip
        self._foreseen: set[str] = set()
        foresee(self)

    # the HTTP side

    def prepared(self, seconds: float) -> None:
        """A request has been read, rendered and tokenized."""
        self._stage_preprocess.note(seconds)

    def begun(self, model: str, surface: str, kind: str) -> None:
        """A request has been taken in. ``model`` empty: it names none of ours."""
        if not model:
            self.started.labels(UNKNOWN, surface, kind).inc()
            return
        of = self._models.get(model) or self.of(model)
        cell = of.started.get((surface, kind))
        if cell is None:
            cell = of.started[(surface, kind)] = self.started.labels(of.name, surface, kind)
        cell.inc()

    def finished(self, name: str, surface: str, kind: str, error: HoldfastError | None, seconds: float) -> None:
        """A request that `begun` was told of has ended, well or with this error."""
        if error is None:
            self._succeeded(self._models.get(name) or self.of(name), surface, kind, seconds)
            return
        model = self.label(name)
        word = error_type(error)
        self.requests.labels(model, surface, kind, "error", word).inc()
        self.failures.labels(error.fault, error.code).inc()
        if word in _LEFT:
            self.cancellations.labels(model, surface, kind).inc()
        elif error.fault == "capacity":
            self.rejections.labels(model, surface).inc()
            self._turned_away(model, error)
        if name:
            self._took(self.of(name), seconds)

    def _succeeded(self, of: _Model, surface: str, kind: str, seconds: float) -> None:
        cell = of.succeeded.get((surface, kind))
        if cell is None:
            cell = of.succeeded[(surface, kind)] = self.requests.labels(of.name, surface, kind, "success", "")
        cell.inc()
        self._took(of, seconds)

    def _took(self, of: _Model, seconds: float) -> None:
        """Note the time of a whole request, after which nothing more comes of it; now and then count what was noted."""
        of.duration.note(seconds)
        if len(of.duration.fresh) >= FOLD_EVERY:
            for buckets in (*of.noted(), *self._noted):
                buckets.fold()

    def answered(self, request: Request) -> None:
        """The client has taken the answer of all streams, or is gone."""
        last = request.streams[-1]
        if last.ended is not None and last.ended.state == "done":
            self._stage_postprocess.note(max(0.0, _now(last) - last.timeline[-1][0]))

    def turned_away(self, error: HoldfastError) -> None:
        """A connection was closed before anything was read from it."""
        self._turned_away(UNKNOWN, error)

    def _turned_away(self, model: str, error: HoldfastError) -> None:
        """Count by layer and knob, of which workers may name their own."""
        layer = self._knobs.bounded(str(error.details.get("layer", "fleet")))
        knob = self._knobs.bounded(str(error.details.get("knob", "workers")))
        self.rejections_by_knob.labels(model, layer, knob).inc()

    def waited(self, model: str, outcome: str, seconds: float) -> None:
        """A new request has waited for room (`requests.line`)."""
        self.queue_waits.labels(self.label(model), outcome).observe(seconds)

    def expect(self, model: str) -> None:
        """Let the counters of a model that is served here begin at nought; off the path of requests."""
        label = self.label(model)
        if label not in self._foreseen:
            self._foreseen.add(label)
            self.of(model)
            foresee_model(self, label)

    def label(self, model: str) -> str:
        """Return the model as a label."""
        return self._names.bounded(model) if model else UNKNOWN

    def of(self, model: str) -> _Model:
        """Return the series of a model."""
        found = self._models.get(model)
        if found is None:
            found = _Model(self, self.label(model))
            if found.name == model:  # those that share a label are too many to be kept
                self._models[model] = found
        return found

    # the observer

    def attempt_started(self, generation: Generation) -> None:
        """See `Observer`."""
        if generation.driver.history.attempts == 1:
            waited = generation.timeline[-1][0]  # when it was noted
            self.queue_time.note(waited)
            self._stage_route.note(waited)
            plan = generation.plan
            if not plan.choice:
                of = self._models.get(plan.model) or self.of(plan.model)
                of.input_tokens.inc(plan.prompt_length)
                of.input_lengths.note(plan.prompt_length)

    def attempt_sent(self, seconds: float) -> None:
        """See `Observer`."""
        self.send_time.note(seconds)

    def accepted(self, generation: Generation, first: bool) -> None:
        """See `Observer`."""
        if first:
            self._stage_roundtrip.note(_since_attempt(generation))

    def first_token(self, generation: Generation) -> None:
        """See `Observer`."""
        plan = generation.plan
        waited = generation.timeline[-1][0] + plan.prepared_seconds
        self.roundtrip.note(_since_attempt(generation))
        if not plan.choice:
            of = self._models.get(plan.model) or self.of(plan.model)
            of.first_tokens.note(waited)
        last = self.last_seen.get(generation.worker)
        if last is None:
            last = self.last_seen[generation.worker] = LastSeen()
        last.first_token, last.prompt_tokens = waited, plan.prompt_length

    def progressed(self, generation: Generation) -> None:
        """Add up what came since the last time; see `Observer`."""
        self._add_up(self.of(generation.plan.model), generation)

    def _add_up(self, of: _Model, generation: Generation) -> None:
        rhythm = generation.rhythm
        counts = rhythm.fold()
        if counts:
            of.gaps.add_ticks(counts)
        fresh = generation.delivered - rhythm.reported
        if fresh > 0:
            rhythm.reported = generation.delivered
            of.output_tokens.inc(fresh)

    def migration_started(self, generation: Generation, error: HoldfastError) -> None:
        """See `Observer`."""
        model = self.label(generation.plan.model)
        self.attempt_failures.labels(model, error.code).inc()
        self.migrations.labels(model, generation.migration_type).inc()

    def migrated(self, generation: Generation, gap_seconds: float) -> None:
        """See `Observer`."""
        model = self.label(generation.plan.model)
        self.migration_gap.labels(model).observe(gap_seconds)
        self.migration_duration.labels(model, generation.migration_type, "success").observe(gap_seconds)

    def prefill_decided(self, generation: Generation, reason: Reason) -> None:
        """See `Observer`."""
        self.prefill.decided(self.label(generation.plan.model), reason)

    def prefill_started(self, generation: Generation, leg: PrefillLeg) -> None:
        """See `Observer`."""

    def prefill_ended(
        self,
        generation: Generation,
        leg: PrefillLeg,  # noqa: ARG002 - the protocol's signature
        error: HoldfastError | None,
        seconds: float,
    ) -> None:
        """See `Observer`."""
        self.prefill.ended(self.label(generation.plan.model), error, seconds)

    def ended(self, generation: Generation, ending: Ending) -> None:
        """See `Observer`."""
        model = generation.plan.model
        of = self._models.get(model) or self.of(model)
        self._add_up(of, generation)
        of.output_lengths.note(ending.completion_tokens)
        if ending.state == "done":
            of.cached.note(ending.cached_tokens)
        rhythm = generation.rhythm
        last = self.last_seen.get(generation.worker)
        if last is not None and rhythm.tokens > 1:
            last.inter_token = (rhythm.last - rhythm.first) / TICKS_PER_SECOND / (rhythm.tokens - 1)
        if ending.moves:
            self._ended_after_moves(generation, ending, of.name)
        if ending.error is not None and "sequence_length" in ending.error.details:
            self.migration_too_long.labels(of.name).inc()

    def _ended_after_moves(self, generation: Generation, ending: Ending, model: str) -> None:
        if ending.join != "none":
            self.joins.labels(model, ending.join).inc()
        outcome = _OUTCOMES.get(ending.state)
        if outcome is not None and not ending.moves[-1].gap_seconds:
            seconds = max(0.0, _now(generation) - _at(generation, "failed"))
            self.migration_duration.labels(model, generation.migration_type, outcome).observe(seconds)

    # the pool

    def pool_event(self, event: PoolEvent, worker: Worker) -> None:
        """Count changes of state (`WorkerPool.subscribe`)."""
        if event == "pong":
            return
        if event == "removed":
            self._states.pop(worker.instance, None)
            self.last_seen.pop(worker.instance, None)
            return
        state = shown_state(worker)
        if self._states.get(worker.instance) != state:
            self._states[worker.instance] = state
            bad = state in ("suspect", "ejected") and worker.last_error is not None
            self.transitions.labels(state, worker.last_error.code if bad and worker.last_error else "").inc()


def shown_state(worker: Worker) -> str:
    """Return a worker's state as metrics and explanations name it: draining is one of its own."""
    return "draining" if worker.draining and worker.state == "usable" else worker.state


def _now(generation: Generation) -> float:
    """Return the seconds since the stream began."""
    return (generation.flusher.clock() - generation.born) / 1e9


def _at(generation: Generation, event: str) -> float:
    """Return when an event was noted last."""
    for at, name, _ in reversed(generation.timeline):
        if name == event:
            return at
    return 0.0


def _since_attempt(generation: Generation) -> float:
    """Return the seconds from the beginning of the latest attempt to the latest note of all."""
    return max(0.0, generation.timeline[-1][0] - _at(generation, "attempt"))
