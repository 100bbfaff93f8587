"""Hosts one engine behind the endpoint ``generate``: calls come in, each engine step goes out once per caller.

For every accepted sequence there is one lease, and it is given back on every way out: the engine finished,
the caller stopped or is gone, the deadline passed, the worker drained, the engine died.

A prefill worker is called at the endpoint ``prefill``. Its answer is one message, the hand-off; the call stays open as
long as the caller wants the blocks kept, and ends with the caller, its connection or `hold` seconds, whichever comes
first: nobody's blocks are kept for nobody. What a decode leg brings is verified before the engine sees it.

Must never await on the token path, never know an engine's or a socket's details, and never let one
connection's fault reach another's streams.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

import msgspec

from holdfast.base.errors import (
    DeadlineExceeded,
    EngineFailed,
    HandoffLost,
    HoldfastError,
    InvalidRequest,
    StreamIncomplete,
    UnsupportedFeature,
    WorkerDraining,
)
from holdfast.base.ids import SequenceKey
from holdfast.engines.contract import Engine, EngineInfo, GenerateRequest, LoadProgress, SequenceStep
from holdfast.engines.handoff import KvHandoff, verify
from holdfast.kv.events import KvEvent
from holdfast.requests.leases import LeaseBook
from holdfast.runtime.discovery.contract import InstanceState
from holdfast.runtime.streams import IncomingCall, ServerConnection, TokenItem
from holdfast.wire.frames import Load, Progress
from holdfast.worker.calls import Calls, CallStory
from holdfast.worker.offer import Offer
from holdfast.worker.sequence import Sequence, check_room, load_frame
from holdfast.worker.steps import by_caller, error_of

log = logging.getLogger(__name__)

SEATS_FACTOR = 4
"""Sequences accepted at once per seat of the engine (of all its ranks), unless the setting says otherwise."""
DEADLINE_SLACK = 1.0
"""Seconds that a caller gets to notice its own deadline first; the worker's is the backstop."""
_IN_SERVICE = ("ready", "saturated")
_REQUEST = msgspec.msgpack.Decoder(GenerateRequest)
_encode = msgspec.msgpack.Encoder().encode
HOLD = 60.0
"""Seconds for which the blocks of a hand-off are kept, unless the setting says otherwise."""


class EngineHost:
    """One engine and the calls that it works on.

    Args:
        engine: not started yet.
        limit: sequences accepted at once; 0: `SEATS_FACTOR` times the engine's seats.
        on_dead: called once when the engine can no longer work, after all streams were told.
        on_kv_events: receives KV events after each step; None: nobody wants them.
        calls: counts and traces; None: for nobody to see.
        hold: seconds for which the blocks of a hand-off are kept at most.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        limit: int = 0,
        on_dead: Callable[[HoldfastError], None] = lambda _: None,
        on_kv_events: Callable[[list[KvEvent]], None] | None = None,
        calls: Calls | None = None,
        hold: float = HOLD,
    ):
        self.engine = engine
        self.calls = calls or Calls({"namespace": "", "component": "", "instance_id": ""})
        self.limit = limit
        self.hold = hold
        self.instance = ""
        """Of this worker, for those who are handed something."""
        self._protocol = ""
        """Of hand-offs."""
        self._fingerprint = ""
        self.leases = LeaseBook()
        """What callers have in hand; canaries are counted apart."""
        self.deliveries = 0
        """Rises with every step that brought tokens for a caller."""
        self._canary_leases = LeaseBook()
        self._canaries: set[str] = set()
        """Request ids of the canaries under way."""
        self.offer = Offer()
        """What is taken: names of models and adapters."""
        self.death: HoldfastError | None = None
        self._on_dead = on_dead
        self._on_kv_events = on_kv_events
        self._sequences: dict[SequenceKey, Sequence] = {}
        self._adapted: dict[SequenceKey, str] = {}
        """Adapters of those that use one."""
        self._next_key = 1
        self._stage: InstanceState = "starting"
        self._late_tokens = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop: asyncio.AbstractEventLoop

    async def start(self, on_load: LoadProgress) -> EngineInfo:
        """Start the engine; afterwards calls are accepted. Raises what the engine raises.

        Raises:
            UnsupportedFeature: the engine cannot hand over what this worker's role needs.
        """
        self._loop = asyncio.get_running_loop()
        role = self.engine.role
        info = await self.engine.start(self._on_steps, self._on_death, on_load)
        self._protocol, self._fingerprint = info.capabilities.handoff, info.fingerprint
        if role != "aggregated" and not self._protocol:
            raise UnsupportedFeature(
                f"Engine {info.engine} cannot pass its KV cache on, so that this worker cannot be a {role} worker "
                "(DYN_DISAGGREGATION_MODE); leave it at agg."
            )
        info = msgspec.structs.replace(info, role=role)
        if self.limit == 0:
            self.limit = info.max_num_seqs * info.data_parallel_size * SEATS_FACTOR
        if self.death is None:
            self._stage = "ready"
        return info

    @property
    def state(self) -> InstanceState:
        """The worker's state as callers see it."""
        if self._stage == "starting" and self.engine.progress().phase == "warming":
            return "warming"
        if self._stage == "ready" and self.in_flight + self.held >= self.limit:
            return "saturated"
        return self._stage

    @property
    def in_service(self) -> bool:
        """Whether the engine is there to be used: started, alive, not leaving."""
        return self._stage == "ready"

    @property
    def in_flight(self) -> int:
        """Sequences accepted and not over, canaries aside; nor those whose prompt is computed and handed over."""
        return self.leases.held("stream")

    @property
    def held(self) -> int:
        """Hand-offs whose blocks are kept for a decode worker."""
        return self.leases.held("held")

    def measure(self) -> tuple[Progress, Load]:
        """Return the engine's counters and load, as a pong shows them."""
        p, q = self.engine.progress(), self.engine.load()
        progress = Progress(
            p.steps,
            p.tokens,
            p.prefilled,
            p.phase,
            p.silent_step_seconds,
            self.in_flight,
            p.tokens_after_cancel + self._late_tokens,
        )
        return progress, load_frame(q)

    def announce_canary(self, request_id: str, begins: bool) -> None:
        """Tell which request is the worker's own (a `health.probe.Announce`): it is no user's and needs no seat."""
        if begins:
            self._canaries.add(request_id)
        else:
            self._canaries.discard(request_id)

    # calls

    def generate(self, call: IncomingCall) -> None:
        """Serve one call of endpoint ``generate`` (a `CallHandler`)."""
        self._serve(call, prefills=False)

    def prefill(self, call: IncomingCall) -> None:
        """Serve one call of endpoint ``prefill`` (a `CallHandler`): see the module."""
        self._serve(call, prefills=True)

    def _serve(self, call: IncomingCall, *, prefills: bool) -> None:
        story = self.calls.begin(call, canary=call.headers.request_id in self._canaries)
        try:
            key = self._submit(call, prefills=prefills)
        except HoldfastError as error:
            self._refuse(call, story, error)
            return
        except Exception as error:
            log.exception("the engine could not take request %s", call.headers.request_id)
            why = f"The engine could not take the request: {type(error).__name__}: {error}"
            self._refuse(call, story, EngineFailed(why))
            return
        self._accept(key, call, story, prefills=prefills)

    def _refuse(self, call: IncomingCall, story: CallStory, error: HoldfastError) -> None:
        self.calls.refused(story, error)
        call.refuse(error)

    def _submit(self, call: IncomingCall, *, prefills: bool) -> SequenceKey:
        self._check_open()
        if call.headers.request_id not in self._canaries:
            check_room(self.engine.role, self.in_flight + self.held, self.limit, prefills=prefills)
        try:
            request = _REQUEST.decode(call.payload)
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"The payload is not a generate request: {error}.") from error
        request = self.offer.admit(request, canary=call.headers.request_id in self._canaries)
        if prefills is not (request.leg == "prefill"):
            raise InvalidRequest(f"A request of leg {request.leg!r} came to the wrong endpoint.")
        if request.handoff is not None:
            verify(request.handoff, request.prompt_ids, request.generated_ids, protocol=self._protocol)
        key = SequenceKey(self._next_key)
        self._next_key += 1
        self.engine.submit(key, request)
        if request.lora is not None:
            self._adapted[key] = request.lora
        return key

    def _check_open(self) -> None:
        """Raise unless new sequences are welcome."""
        stage = self._stage
        if stage == "draining":
            raise WorkerDraining("This worker is draining and accepts nothing.")
        if self.death is not None:
            raise EngineFailed(f"The engine of this worker is dead: {self.death.message}")
        if stage != "ready":
            raise EngineFailed(f"The engine of this worker is not ready but {self.state}.")

    def _accept(self, key: SequenceKey, call: IncomingCall, story: CallStory, *, prefills: bool) -> None:
        canary = call.headers.request_id in self._canaries
        book = self._canary_leases if canary else self.leases
        sequence = Sequence(key, call, book.take("stream"), story, prefills=prefills)
        self._sequences[key] = sequence
        if not canary:
            self._idle.clear()
        call.on_stop = partial(self._stopped, sequence)
        remaining = call.headers.remaining_ms
        if remaining > 0:
            sequence.deadline = self._loop.call_later(remaining / 1e3 + DEADLINE_SLACK, self._expire, sequence)
        self.calls.accepted(story)
        try:
            call.accept()
        except Exception as error:
            self._forget(sequence)
            self.engine.cancel(key)
            self.calls.ended(story, "error", StreamIncomplete(f"The accept could not be sent: {error}"))
            raise

    # what ends a sequence

    def _forget(self, sequence: Sequence) -> bool:
        """Give everything back; returns False when that was done before."""
        if self._sequences.pop(sequence.key, None) is None:
            return False
        self._adapted.pop(sequence.key, None)
        sequence.lease.release()
        sequence.call.on_stop = None  # also breaks the reference cycle, so that the call is freed at once
        if sequence.deadline is not None:
            sequence.deadline.cancel()
        if not (self.in_flight or self.held):
            self._idle.set()
        return True

    def _stopped(self, sequence: Sequence, reason: str) -> None:
        """The caller stopped, killed or is lost; or it does not need what was kept for it any more."""
        if self._forget(sequence):
            self.engine.cancel(sequence.key)
            finish = "stop" if sequence.held else "cancelled"
            sequence.call.end(finish)
            self.calls.ended(sequence.story, finish, None, reason)

    def _expire(self, sequence: Sequence) -> None:
        bound = sequence.call.headers.remaining_ms / 1e3
        error = DeadlineExceeded(
            f"The time left for the request when it came here, {bound:g} s, is over.", stage="total", threshold=bound
        )
        self._break_off(sequence, error)

    def _break_off(self, sequence: Sequence, error: HoldfastError) -> None:
        """End a sequence from our side."""
        if self._forget(sequence):
            self.engine.cancel(sequence.key)
            sequence.call.end("error", error)
            self.calls.ended(sequence.story, "error", error)

    # what the engine says

    def _on_steps(self, steps: list[SequenceStep]) -> None:
        batches, finished, late = by_caller(steps, self._sequences, self.calls.clock)
        self._late_tokens += late
        for connection, batch in batches.items():
            self._send(connection, batch)
        if batches and self.in_flight:
            self.deliveries += 1
        for sequence, step in finished:
            self._finish(sequence, step)
        events = self.engine.take_kv_events()  # always: an engine may keep them until they are taken
        if events and self._on_kv_events is not None:
            self._on_kv_events(events)

    def _send(self, connection: ServerConnection, batch: list[TokenItem]) -> None:
        try:
            connection.send_items(batch)
        except Exception as error:  # contained: the other callers' streams go on
            log.exception("tokens for caller %s could not be sent; its %d streams end", connection.caller, len(batch))
            broken = StreamIncomplete(f"The worker could not send tokens: {type(error).__name__}: {error}")
            calls = {id(item.call) for item in batch}
            for sequence in [s for s in self._sequences.values() if id(s.call) in calls]:
                self._break_off(sequence, broken)

    def _finish(self, sequence: Sequence, step: SequenceStep) -> None:
        if sequence.prefills and step.handoff is not None and step.finish == "stop":
            self._hand_over(sequence, step.handoff)
            return
        if not self._forget(sequence):
            return
        error = error_of(step)
        sequence.call.end(step.finish or "stop", error, step.cached_tokens, sequence.story.tokens)
        self.calls.ended(sequence.story, step.finish or "stop", error)

    def _hand_over(self, sequence: Sequence, handoff: KvHandoff) -> None:
        """Tell the caller where the blocks are, and let the engine keep them while it wants them."""
        if sequence.held or sequence.key not in self._sequences:
            return
        sequence.held = True
        sequence.lease.release()
        sequence.lease = self.leases.take("held")
        if sequence.deadline is not None:
            sequence.deadline.cancel()
        sequence.deadline = self._loop.call_later(self.hold, self._let_go, sequence)
        told = msgspec.structs.replace(handoff, source=self.instance, fingerprint=self._fingerprint)
        try:
            sequence.call.send_data(_encode(told))
        except HoldfastError as error:
            self._break_off(sequence, error)

    def _let_go(self, sequence: Sequence) -> None:
        why = f"The blocks of a hand-off were kept for {self.hold:g} s (DYN_PREFILL_HOLD_SECS) and nobody let them go."
        self._break_off(sequence, HandoffLost(why, knob="DYN_PREFILL_HOLD_SECS", threshold=self.hold))

    def die(self, error: HoldfastError) -> None:
        """Somebody else found out that the engine is dead."""
        self._on_death(error)

    def _on_death(self, error: HoldfastError) -> None:
        if self.death is not None:
            return
        self.death = error
        self._stage = "failed"
        log.error("the engine died with %d sequences in flight: %s", self.in_flight, error.message)
        failed = EngineFailed(f"The engine died: {error.message}", engine_died=True)
        self._end_all(failed)
        self._on_dead(error)

    # leaving

    def drain(self) -> None:
        """Accept nothing from now on."""
        if self._stage in _IN_SERVICE or self._stage == "starting":
            self._stage = "draining"

    async def idle(self) -> None:
        """Wait until nothing is in flight; whoever calls this has a deadline."""
        await self._idle.wait()

    def send_elsewhere(self, why: str) -> int:
        """End what is in flight so that its callers continue it on other workers; returns how many."""
        count = self.in_flight + self.held
        self._end_all(WorkerDraining(why))
        return count

    def streams_of(self, adapter: str) -> int:
        """Return how many sequences use an adapter."""
        return sum(one == adapter for one in self._adapted.values())

    def send_adapter_elsewhere(self, adapter: str, why: str) -> int:
        """End what uses an adapter, as `send_elsewhere` does; returns how many."""
        keys = [key for key, one in self._adapted.items() if one == adapter]
        for key in keys:
            self._break_off(self._sequences[key], WorkerDraining(why))
        return len(keys)

    def _end_all(self, error: HoldfastError) -> None:
        for sequence in list(self._sequences.values()):
            self._break_off(sequence, error)

    async def close(self) -> None:
        """End what is left and close the engine. Idempotent."""
        self.send_elsewhere("This worker is closing.")
        if self.death is None:
            self._stage = "stopped"
        await self.engine.close()
