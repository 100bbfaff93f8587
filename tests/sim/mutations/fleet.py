"""Bugs in who gets work: draining (P8), rollouts (P9), blame (P10), discovery (P12), return (P13), and what all that
is for: no request fails without a reason (kept), nobody waits in silence (noticed)."""

from __future__ import annotations

from holdfast.sim.plan import Shape
from tests.sim.mutations.bugs import Bug
from tests.sim.mutations.planting import change

BUGS = (
    Bug(
        name="accepts-after-draining",
        what="a draining worker says so and goes on accepting",
        origin="ai-dynamo/dynamo#13559 and #14279: the grace period is only a sleep",
        edits=(
            change(
                "wire.worker",
                """
-        if self.state == "draining":
+        if False:
             return WorkerDraining("this worker is draining and accepts nothing", worker=self._instance)
""",
            ),
            change(
                "worker.host",
                """
-        if stage == "draining":
+        if False:
""",
            ),
            change(
                "worker.host",
                """
-        if stage != "ready":
+        if stage not in ("ready", "draining"):
""",
            ),
        ),
        caught_by=("P8",),
        shape=Shape(faults=6, only=("delay", "terminate")),
    ),
    Bug(
        name="drain-cuts-frontends-requests",
        what="a frontend that is told to leave waits for nobody",
        origin="ai-dynamo/dynamo#13559: everything aborted a fixed time after SIGTERM",
        edits=(
            change(
                "frontend.drain",
                """
-        while self._frontend.generate.in_hand and loop.time() < began + self._grace:  # noqa: ASYNC110
-            await asyncio.sleep(_POLL)
+        return
""",
            ),
        ),
        caught_by=("kept", "P2"),
    ),
    Bug(
        name="drain-forgets-unaccepted",
        what="a stream that its worker had not accepted when it left is forgotten, and nothing reminds of it",
        origin="ai-dynamo/dynamo#732: requests that fail for seconds after a restart; production-stack#706",
        edits=(
            change(
                "requests.attempt",
                """
-        self.fail(error, died=is_death(error, whole_stream=True))
+        if self.accepted:
+            self.fail(error, died=is_death(error, whole_stream=True))
""",
            ),
            change(
                "requests.deadlines",
                """
+        if waited:
+            return
         hedged = 0 < bounds.accept_hedge < waited and self._placement.others(generation.need, attempt.placed.worker)
""",
            ),
        ),
        caught_by=("kept", "P13", "noticed", "P4"),
    ),
    Bug(
        name="grace-period-is-a-sleep",
        what="a worker that leaves tells nobody and goes on accepting until its time is over",
        origin="ai-dynamo/dynamo#14279: the grace period is only a sleep",
        edits=(
            change(
                "runtime.server",
                """
-            connection.core.drain(reason, remaining_ms)
+            pass
""",
            ),
            change(
                "worker.host",
                """
-            self._stage = "draining"
+            pass
""",
            ),
        ),
        caught_by=("P8",),
    ),
    Bug(
        name="drain-does-not-wait",
        what="a worker that is told to leave cuts its streams at once, without an end",
        origin="ai-dynamo/dynamo#13559",
        edits=(
            change(
                "worker.leaving",
                """
-        await self._patiently(self._finished())
         self._enter("migrating")
-        await self._hand_over()
""",
            ),
        ),
        caught_by=("P8",),
    ),
    Bug(
        name="rollout-waits-for-nobody",
        what="a rolling restart takes the next process down before the last one is back",
        origin="ai-dynamo/dynamo#13353: three quick updates and all are down",
        edits=(
            change(
                "local.rolling",
                """
-                while not await condition():
+                while not await condition() and False:
""",
            ),
        ),
        caught_by=("P9",),
    ),
    Bug(
        name="ready-is-the-workers-own-word",
        what="a rolling restart goes on when the new worker runs, whether a frontend uses it or not",
        origin="ai-dynamo/dynamo#13622: ready before any frontend had registered it",
        edits=(
            change(
                "local.rolling",
                """
-            return slot.pid not in (None, before) and await self._in_service(name)
+            return slot.pid not in (None, before)
""",
            ),
            change(
                "local.rolling",
                """
-        for other in others:
+        for other in ():
""",
            ),
        ),
        caught_by=("P9",),
    ),
    Bug(
        name="breaker-fed-by-4xx",
        what="a caller's mistake counts against the worker that refused it",
        origin="one bad client takes the fleet down: retry and breaker semantics, 16 threads",
        edits=(
            change(
                "runtime.inhibition",
                """
-        if error.fault not in ("worker", "transport") or isinstance(error, _KNOWN_OTHERWISE) or now < self.until:
+        if isinstance(error, _KNOWN_OTHERWISE) or now < self.until:
""",
            ),
        ),
        caught_by=("P10",),
    ),
    Bug(
        name="unknown-is-dead",
        what="when discovery cannot be reached, its workers are taken for gone",
        origin="seconds of etcd trouble restart everything: 9 threads",
        edits=(
            change(
                "runtime.pool",
                """
         if record is None:
+            for worker in self.all_workers() if event.kind == "unknown" else ():
+                self._forget(worker, purposeful=True)
             level, what = (logging.INFO, "reachable") if event.kind == "known" else (logging.WARNING, "unreachable")
""",
            ),
        ),
        caught_by=("P12",),
    ),
    Bug(
        name="vanished-is-dead",
        what="a worker that discovery does not list any more is cut off although it answers",
        edits=(
            change(
                "runtime.pool",
                """
-            worker.unlisted_until = self._clock() + self.settings.unlisted
+            self._forget(worker, purposeful=event.purposeful)
+            return
""",
            ),
        ),
        caught_by=("P12", "cause"),
        shape=Shape(only=("discovery-partial",), faults=5),
    ),
    Bug(
        name="old-epoch-on-a-new-link",
        what="after a restart the connection to the new process keeps the old process's epoch",
        edits=(
            change(
                "runtime.watch",
                """
-        worker.epoch = epoch
""",
            ),
        ),
        caught_by=("P13", "P9", "cause"),
        shape=Shape(profile="blind", faults=5),
    ),
    Bug(
        name="suspects-never-return",
        what="a worker that was silent once is never trusted again",
        origin="smg#2468: failed was terminal",
        edits=(
            change(
                "runtime.detector",
                """
-        if watched.good < self._needed(watched, at):
+        if watched.good < 10_000:
""",
            ),
        ),
        caught_by=("P13",),
    ),
    Bug(
        name="hung-workers-never-return",
        what="a worker that hung once is never tried again",
        edits=(
            change(
                "runtime.detector",
                """
-        if watched.state == "stalled" and not self._may_return(watched, at):
+        if watched.state == "stalled":
""",
            ),
        ),
        caught_by=("P13",),
        within=200,
    ),
    Bug(
        name="inhibition-never-ends",
        what="a worker that failed once is avoided for ever",
        edits=(
            change(
                "runtime.inhibition",
                """
-        return now < self.until
+        return self.failures > 0
""",
            ),
        ),
        caught_by=("P13",),
    ),
    Bug(
        name="connector-gives-up",
        what="a worker that could not be reached three times in a row is never tried again",
        origin="smg#2468: a restarted worker never returned",
        edits=(
            change(
                "runtime.connector",
                """
-                    wait = min(self._settings.retry_ceiling, wait * 2)
+                    wait = wait * 2
+                    if wait > self._settings.retry_first * 8:
+                        return
""",
            ),
        ),
        caught_by=("P13", "liveness"),
    ),
    Bug(
        name="lost-workers-are-not-reconnected",
        what="a connection that broke while discovery lists the worker is not made again",
        edits=(
            change(
                "runtime.watch",
                """
-        else:
-            self.connector.ensure(worker)
""",
            ),
        ),
        caught_by=("P13", "liveness", "kept"),
    ),
    Bug(
        name="nobody-wakes-the-waiting",
        what="streams that wait for a worker are not told that one has come",
        edits=(
            change(
                "requests.placement",
                """
-        if kind != "pong":
-            self.wake()
""",
            ),
            change(
                "requests.placement",
                """
-                await self._change(loop, trial.rank, min(LOOK_AGAIN, max(0.0, need.since + wait - loop.time())))
+                await self._change(loop, trial.rank, max(0.0, need.since + wait - loop.time()))
""",
            ),
        ),
        caught_by=("kept", "noticed", "P13"),
        shape=Shape(profile="exodus"),
    ),
    Bug(
        name="refused-by-one-is-refused-by-all",
        what="one full worker is enough to turn a request away",
        edits=(
            change(
                "routing.admission",
                """
-        if free or any(error is not None and error.fault != "capacity" for error in asked.values()) or not workers:
+        if any(error is not None and error.fault != "capacity" for error in asked.values()) or not workers:
""",
            ),
        ),
        caught_by=("kept",),
        within=200,
    ),
    Bug(
        name="hang-looks-busy",
        what="each pong counts as progress, so that a hung engine looks busy",
        origin="vllm#17972, #13778: Running: n reqs, 0.0 tok/s, /health 200",
        edits=(
            change(
                "runtime.progress",
                """
-        moved = self._counters is not None and counters != self._counters
+        moved = self._counters is not None
""",
            ),
        ),
        caught_by=("noticed",),
        within=200,
        shape=Shape(only=("engine-hang",), faults=1, more_faults=0),
    ),
    Bug(
        name="compiling-counts-as-hanging",
        what="the hang detector knows no long steps: one that the engine announces looks like a hang",
        origin="ai-dynamo/dynamo#8113: liveness kills loaded workers",
        edits=(
            change(
                "runtime.progress",
                """
-        return max(settings.floor, min(settings.ceiling, max(expected, habit)))
+        return settings.floor
""",
            ),
            change(
                "runtime.progress",
                """
-            return settings.start_ceiling
+            return settings.floor
""",
            ),
        ),
        caught_by=("cause",),
        shape=Shape(only=("engine-compile",)),
    ),
    Bug(
        name="silence-is-not-noticed",
        what="nobody judges silence: a frozen worker keeps its streams until it thaws",
        origin="ai-dynamo/dynamo#13095: SIGSTOP hangs the request",
        edits=(
            change(
                "runtime.detector",
                """
-        if not accused or at < self._verified_from or self._in_doubt(at):
+        if True:
""",
            ),
        ),
        caught_by=("noticed", "P13"),
        within=200,
        shape=Shape(only=("freeze",), faults=1, more_faults=0),
    ),
    Bug(
        name="dead-engine-is-kept-quiet",
        what="the engine dies and its process goes on answering",
        origin="vllm#39863: the engine core dies silently while its server stays alive",
        edits=(
            change(
                "worker.host",
                """
-        self._end_all(failed)
-        self._on_dead(error)
""",
            ),
        ),
        caught_by=("liveness", "P13"),
        within=200,
    ),
    Bug(
        name="wall-clock-for-deadlines",
        what="a deadline is measured with the calendar's clock",
        edits=(
            change(
                "requests.deadlines",
                """
     def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
-        now = loop.time()
+        import time
+
+        now = loop.time() + 0 * time.time()
""",
            ),
        ),
        caught_by=("Escape",),
    ),
    Bug(
        name="global-random",
        what="a request's seed comes from the process's own random source",
        edits=(
            change(
                "frontend.generate",
                """
+        import random
+
+        random.random()
         steering = headers.steer(spec.steering)
""",
            ),
        ),
        caught_by=("Escape",),
    ),
)
