"""Bugs that lose count of work: leases (P4), deadlines (P5), refusals (P6), retries (P7), cancels (P11)."""

from __future__ import annotations

from holdfast.sim.plan import Shape
from tests.sim.mutations.bugs import Bug
from tests.sim.mutations.planting import change

BUGS = (
    Bug(
        name="seat-leaks-on-cancel",
        what="a worker gives the seat of a cancelled stream never back",
        origin="vllm-project/router#215: about 400 leaked counts per worker and day",
        edits=(
            change(
                "worker.host",
                """
-        if self._forget(sequence):
+        if self._sequences.pop(sequence.key, None) is not None:
             self.engine.cancel(sequence.key)
             finish = "stop" if sequence.held else "cancelled"
""",
            ),
        ),
        caught_by=("P4",),
    ),
    Bug(
        name="unaccepted-attempts-leak",
        what="an attempt that nobody accepted keeps its claim on the worker",
        origin="production-stack#1001: in-flight 121 to 264 in six hours while the load was flat",
        edits=(
            change(
                "requests.driver",
                """
-            placement.release(self.need, placed, worked=attempt is not None and attempt.accepted)
+            if attempt is not None and attempt.accepted:
+                placement.release(self.need, placed, worked=True)
""",
            ),
        ),
        caught_by=("P4",),
    ),
    Bug(
        name="waiting-leaks-on-cancel",
        what="a client that leaves while its stream waits for a worker is counted as waiting for ever",
        origin="production-stack#1072: a router killed for its memory 14 times in 12 days",
        edits=(
            change(
                "requests.placement",
                """
                 if placed is not None:
+                    lease.release()
                     return placed
         finally:
-            lease.release()
+            pass
""",
            ),
        ),
        caught_by=("P4",),
    ),
    Bug(
        name="queue-place-leaks",
        what="whoever is turned away from the queue is still counted as queued",
        edits=(
            change(
                "requests.line",
                """
         try:
             yield place
+            lease.release()
         finally:
             need.party.calls.remove(call.call)
-            lease.release()
""",
            ),
        ),
        caught_by=("P4",),
        within=200,
    ),
    Bug(
        name="cancel-and-end-both-release",
        what="a stream's end and its driver both give the attempt's lease back",
        origin="vllm-project/router#211: a decrement on the way of streaming retries that another one repeated",
        edits=(
            change(
                "requests.leases",
                """
-        self._book = None
         book._returned(self)  # noqa: SLF001 - the book and its leases are one mechanism
""",
            ),
            change(
                "requests.attempt",
                """
+        self.placed.lease.release()
         if not self.result.done():
             self.result.set_result(None)
""",
            ),
        ),
        caught_by=("P4", "crash", "kept"),
    ),
    Bug(
        name="disconnected-gauge-leaks",
        what="the gauge of clients that left goes up and not down again",
        edits=(
            change(
                "frontend.generate",
                """
-            if answer.lost:
+            if answer.lost and answer.reply.started:
                 self._metrics.disconnected.dec()
""",
            ),
        ),
        caught_by=("P4",),
    ),
    Bug(
        name="deadline-not-armed",
        what="nobody looks whether the time for the whole request is over",
        origin="ai-dynamo/dynamo#13088: requests hang until their client disconnects",
        edits=(
            change(
                "requests.deadlines",
                """
-        if generation.expires and now > generation.expires:
+        if False:
""",
            ),
            change(
                "worker.host",
                """
-        if remaining > 0:
+        if False:
""",
            ),
        ),
        caught_by=("P5",),
    ),
    Bug(
        name="deadline-starts-anew-on-migration",
        what="each attempt has the whole time again",
        edits=(
            change(
                "requests.driver",
                """
         self.history.attempts += 1
+        if generation.expires:
+            generation.expires = now + generation.plan.deadlines.total
""",
            ),
        ),
        caught_by=("P5",),
        within=200,
    ),
    Bug(
        name="clients-deadline-ignored",
        what="the bound that a client sets in its header is read and not used",
        edits=(
            change(
                "frontend.generate",
                """
-            total=_seconds(headers.total_ms),
+            total=None,
""",
            ),
        ),
        caught_by=("P5",),
    ),
    Bug(
        name="room-checked-after-submitting",
        what="a worker hands the sequence to its engine first, and then refuses it for lack of room",
        edits=(
            change(
                "worker.host",
                """
-        if call.headers.request_id not in self._canaries:
-            check_room(self.engine.role, self.in_flight + self.held, self.limit, prefills=prefills)
         try:
""",
            ),
            change(
                "worker.host",
                """
         self.engine.submit(key, request)
+        if call.headers.request_id not in self._canaries:
+            check_room(self.engine.role, self.in_flight + self.held, self.limit, prefills=prefills)
""",
            ),
        ),
        caught_by=("P6", "P11"),
    ),
    Bug(
        name="callers-mistake-is-retried",
        what="a request that a worker refuses as invalid is tried at the next worker",
        origin="a fallback that is fed by 4xx",
        edits=(
            change(
                "requests.migration",
                """
-    if error.retry not in ("elsewhere", "same") and error.fault != "capacity":
-        return Verdict(error)
""",
            ),
        ),
        caught_by=("P6", "P7"),
    ),
    Bug(
        name="accepted-and-turned-away",
        what="a request whose worker accepts it late is told that there was no room, while the worker computes it",
        edits=(
            change(
                "requests.deadlines",
                """
+        if waited > 0.004:
+            generation.finish_with(CapacityExhausted('planted', retry_after=1.0))
+            return
         hedged = 0 < bounds.accept_hedge < waited and self._placement.others(generation.need, attempt.placed.worker)
""",
            ),
            change(
                "requests.deadlines",
                """
+        from holdfast.base.errors import CapacityExhausted
+
         bounds = generation.plan.deadlines
         allowance = generation.plan.prompt_length * UPLOAD_SECONDS_PER_TOKEN
""",
            ),
        ),
        caught_by=("P6", "kept"),
    ),
    Bug(
        name="migration-limit-ignored",
        what="a stream moves as often as its attempts fail",
        edits=(
            change(
                "requests.migration",
                """
-    if failures > limit:
+    if failures > limit + 1000:
         return _exhausted(error, "migrations", limit)
""",
            ),
        ),
        caught_by=("P7",),
    ),
    Bug(
        name="workers-fault-is-final",
        what="an attempt that fails is not tried elsewhere",
        origin="fallback configured and not wired: litellm, AISIX",
        edits=(
            change(
                "requests.migration",
                """
-    if limit == 0:
+    if True:
""",
            ),
        ),
        caught_by=("kept", "P7"),
    ),
    Bug(
        name="budget-refuses-first-moves",
        what="the first move of a stream after its worker's death has to be paid for, and the budget is empty",
        edits=(
            change(
                "requests.migration",
                """
-    return Verdict(refusal, free=promised)
+    return Verdict(refusal, free=False)
""",
            ),
            change(
                "requests.budget",
                """
-        if self._saved < 1.0:
-            return False
-        self._saved -= 1.0
-        return True
+        return False
""",
            ),
            change(
                "requests.budget",
                """
-        return max(0.0, (1.0 - self._saved) / self._floor)
+        return 1e6
""",
            ),
        ),
        caught_by=("P7", "kept"),
    ),
    Bug(
        name="killer-prompt-is-not-convicted",
        what="a prompt that kills its workers is handed on from worker to worker",
        edits=(
            change(
                "requests.poison",
                """
-        killer.convicted = True
""",
            ),
        ),
        caught_by=("P7", "kept"),
    ),
    Bug(
        name="cancel-does-not-reach-the-engine",
        what="a worker forgets a cancelled stream, and its engine goes on",
        origin="production-stack#634: requests that nobody waits for run to their end",
        edits=(
            change(
                "worker.host",
                """
-            self.engine.cancel(sequence.key)
             finish = "stop" if sequence.held else "cancelled"
""",
            ),
        ),
        caught_by=("P11",),
    ),
    Bug(
        name="abandoned-attempts-go-on",
        what="a stream that ends or moves does not tell its worker",
        edits=(
            change(
                "requests.attempt",
                """
-            handle.kill(reason)
+            pass
""",
            ),
        ),
        caught_by=("P11", "P4"),
    ),
    Bug(
        name="leaving-client-is-not-noticed",
        what="a client's disconnect is counted, and its streams go on to their end",
        origin="ai-dynamo/dynamo#13691: prefill goes on after the client has left",
        edits=(
            change(
                "frontend.generate",
                """
-            request.cancel("client_disconnected")
+            pass
""",
            ),
        ),
        caught_by=("P11",),
    ),
    Bug(
        name="cancelled-while-waiting-starts",
        what="a stream that is cancelled while it looks for a worker still starts on one",
        edits=(
            change(
                "requests.generation",
                """
         else:
-            driver.interrupt()
+            pass
""",
            ),
            change(
                "requests.generation",
                """
-            check(self.state, state)
+            pass
""",
            ),
        ),
        caught_by=("P11", "P13", "P4"),
    ),
    Bug(
        name="lost-callers-streams-are-kept",
        what="a worker whose caller is gone goes on with that caller's streams",
        edits=(
            change(
                "wire.worker",
                """
             self._remove(stream)
-            self._tell_stopped(stream, reason)
""",
            ),
        ),
        caught_by=("P11", "P4"),
    ),
    Bug(
        name="silent-callers-are-kept",
        what="a worker waits for ever for a caller that fell silent",
        origin="TCP liveness taken for the caller's: a machine that lost its power sends no end",
        edits=(
            change(
                "runtime.server",
                """
-        session.control.abort()


 def _too_many(limit: str, threshold: int, actual: int) -> CapacityExhausted:
""",
            ),
        ),
        caught_by=("P11", "P4"),
        within=200,
        shape=Shape(faults=5, longest=300, only=("power-loss",)),
    ),
    Bug(
        name="credit-is-not-given-back",
        what="a client that has taken its tokens is never allowed more of them (in a window of 16)",
        edits=(
            change(
                "requests.attempt",
                """
-            self.handle.credit(self.window)
""",
            ),
            change(
                "requests.attempt",
                """
-    return max(LEAST_CREDIT, INITIAL_CREDIT_TOKENS // (1 + alternatives))
+    return 16
""",
            ),
        ),
        caught_by=("kept", "P13"),
        within=200,
    ),
    Bug(
        name="credit-is-not-heeded-again",
        what="a worker that has run out of credit does not go on when more of it comes (in a window of 16)",
        edits=(
            change(
                "requests.attempt",
                """
-    return max(LEAST_CREDIT, INITIAL_CREDIT_TOKENS // (1 + alternatives))
+    return 16
""",
            ),
            change(
                "wire.worker",
                """
             stream.grant(frame.tokens)
-            if stream.waiting:
+            if not stream.waiting:
                 credited[stream.id] = stream
""",
            ),
        ),
        caught_by=("kept", "cause"),
        within=200,
    ),
)
