"""Bugs that spoil what a client reads: its tokens (P1), its one end (P2), its counts (P3)."""

from __future__ import annotations

from tests.sim.mutations.bugs import Bug
from tests.sim.mutations.planting import change

BUGS = (
    Bug(
        name="seed-lost-on-migration",
        what="the second attempt samples with another seed than the first",
        origin="a continuation that is prompted with partial text, as LiteLLM's and AISIX's, keeps no seed either",
        edits=(
            change(
                "requests.attempt",
                """
-            sampling=plan.sampling,
+            sampling=plan.sampling if self.number == 1 else msgspec.structs.replace(plan.sampling, seed=0),
""",
            ),
        ),
        caught_by=("P1",),
    ),
    Bug(
        name="thawed-worker-writes-on",
        what="an attempt that was given up still writes into the live stream when its worker thaws",
        origin="the first probe of this method: found only where freezes are as long as the streams",
        edits=(
            change(
                "requests.attempt",
                """
+        at = generation.count
         if generation.attempt is not self:
-            return
-        at = generation.count
+            index = at
""",
            ),
            change(
                "requests.driver",
                """
-                attempt.kill("superseded")
+                pass
""",
            ),
            change(
                "wire.caller",
                """
-            stream.kill("abandoned")
""",
            ),
        ),
        caught_by=("P1",),
    ),
    Bug(
        name="stop-string-split-across-attempts",
        what="the stop matcher starts afresh with the next worker, so a stop string that spans the move is missed",
        edits=(
            change(
                "requests.generation",
                """
         first = self.driver.was_accepted()
+        if not first and self._output.assembler._matcher is not None:
+            for pattern in self._output.assembler._matcher._patterns:
+                pattern.matched = 0
""",
            ),
        ),
        caught_by=("P1",),
        within=200,
    ),
    Bug(
        name="unfinished-character-lost",
        what="the detokenizer starts afresh with the next worker, and the first bytes of a character are gone",
        edits=(
            change(
                "requests.generation",
                """
         first = self.driver.was_accepted()
+        if not first:
+            self._output.assembler._detokenizer.finish()
""",
            ),
        ),
        caught_by=("P1",),
        within=200,
    ),
    Bug(
        name="sampling-index-starts-anew",
        what="an engine numbers the tokens of a continuation from 0, as those of a new request",
        edits=(
            change(
                "engines.mock.sequence",
                """
-        self.index = len(self.ids) - prompt
+        self.index = 0
""",
            ),
        ),
        caught_by=("P1", "P3", "kept"),
    ),
    Bug(
        name="logprobs-dropped-after-move",
        what="log probabilities are not asked for again when a stream moves",
        edits=(
            change(
                "requests.attempt",
                """
-        if logprobs is not None:
+        if logprobs is not None and self.number == 1:
             generation.pending_logprobs.extend(logprobs)
""",
            ),
        ),
        caught_by=("P1",),
    ),
    Bug(
        name="gap-is-not-noticed",
        what="tokens are taken at whatever index they come, so a lost one leaves a hole in the text",
        edits=(
            change(
                "wire.caller",
                """
         if known < 0:
+            stream.expected = index
+            known = 0
+        if known < 0:
""",
            ),
            change(
                "requests.attempt",
                """
+            skip = max(0, skip)
             if skip < 0:
""",
            ),
        ),
        caught_by=("P1",),
        within=200,
    ),
    Bug(
        name="repeated-tokens-are-kept",
        what="a continuation is asked to repeat one token, and what comes a second time is appended a second time",
        edits=(
            change(
                "wire.caller",
                """
-            self._guard_alive(stream, stream.on_tokens, first, tokens[known:], logprobs and logprobs[known:])
+            self._guard_alive(stream, stream.on_tokens, index, tokens, logprobs)
""",
            ),
            change(
                "wire.caller",
                """
-        elif known < len(tokens):
+        else:
""",
            ),
            change(
                "requests.attempt",
                """
-            generated_ids=generation.generated_bytes(),
+            generated_ids=generation.generated_bytes()[:-4],
""",
            ),
            change(
                "requests.attempt",
                """
-            tokens = tokens[skip:]
+            skip = 0
""",
            ),
        ),
        caught_by=("P1",),
        within=200,
    ),
    Bug(
        name="choices-share-seeds",
        what="the third choice of a request gets the seed of the first",
        edits=(
            change(
                "frontend.generate",
                """
-                        spec.sampling_for(seeds.mix(seed, choice)),
+                        spec.sampling_for(seeds.mix(seed, choice % 2)),
""",
            ),
        ),
        caught_by=("P1",),
    ),
    Bug(
        name="choices-swap-on-migration",
        what="a choice that moves goes on as if it were choice 0",
        edits=(
            change(
                "requests.attempt",
                """
-            choice=plan.choice,
+            choice=plan.choice if self.number == 1 else 0,
             attempt=self.number,
             priority=plan.priority,
""",
            ),
        ),
        caught_by=("P1", "P3"),
    ),
    Bug(
        name="last-tokens-lost",
        what="a worker's end overtakes the tokens that came with it",
        edits=(
            change(
                "requests.generation",
                """
-        if not self.dirty:
-            self.dirty = True
-            self.flusher.streams.append(self)
+        self._finish(finish)

     # ends
""",
            ),
        ),
        caught_by=("P1",),
    ),
    Bug(
        name="lost-connection-is-an-end",
        what="a stream whose connection broke is closed as if it were complete",
        origin="SSE through a proxy: end of file is taken for the end of the answer",
        edits=(
            change(
                "requests.attempt",
                """
-        self.fail(error, died=is_death(error, whole_stream=True))
+        self.generation.worker_ended("stop", 0)
""",
            ),
        ),
        caught_by=("P1",),
    ),
    Bug(
        name="abort-is-an-end",
        what="an engine that ends a sequence early without a reason counts as having finished it",
        origin="vLLM's finish reason abort, passed on as a success",
        edits=(
            change(
                "worker.steps",
                """
-        return StreamIncomplete("The engine ended the sequence early without a reason.")
+        step.finish = "stop"
""",
            ),
        ),
        caught_by=("P1",),
    ),
    Bug(
        name="early-length-is-believed",
        what="'length' before max_tokens is taken for the end",
        edits=(
            change(
                "engines.mock.sequence",
                """
-        self.limit = min(request.stop.max_tokens, room - prompt)
+        self.limit = min(request.stop.max_tokens - 3 * (request.attempt > 1), room - prompt)
""",
            ),
            change(
                "requests.generation",
                """
         if finish == "length":
+            return None
             left = self.plan.context_length - self.plan.prompt_length - self.count
""",
            ),
        ),
        caught_by=("P1",),
    ),
    Bug(
        name="error-after-the-ends",
        what="a failing stream first says that it finished, and then that it failed",
        edits=(
            change(
                "frontend.answers",
                """
+            for choice in self.choices:
+                if choice.ending is not None:
+                    choice.close(choice.ending)
             self.reply.write(error_event(error) + DONE)
""",
            ),
        ),
        caught_by=("P2",),
    ),
    Bug(
        name="done-missing-after-an-error",
        what="a stream that fails has no [DONE], and clients wait for it",
        origin="litellm#26015: a stream that broke in the middle hung its reader",
        edits=(
            change(
                "frontend.answers",
                """
-            self.reply.write(error_event(error) + DONE)
+            self.reply.write(error_event(error))
""",
            ),
        ),
        caught_by=("P2",),
    ),
    Bug(
        name="second-choice-ends-the-answer-again",
        what="each choice that ends writes the end of the whole answer",
        edits=(
            change(
                "frontend.answers",
                """
-        if self._open == 0:
+        if self._open <= 1:
""",
            ),
        ),
        caught_by=("P2",),
    ),
    Bug(
        name="blocked-client-is-not-resumed",
        what="a client that takes bytes again is not given those that waited",
        edits=(
            change(
                "frontend.reply",
                """
-                self.on_unblocked()
+                pass
""",
            ),
            change(
                "frontend.reply",
                """
                 log.exception("a client takes bytes again, and its streams could not go on")
-            self.push()
""",
            ),
        ),
        caught_by=("P2", "kept", "P13", "P1"),
    ),
    Bug(
        name="preparation-fails-without-an-answer",
        what="a request that is refused while it is prepared gets no answer",
        origin="mini-sglang's scheduler: a request that is too long is logged and dropped",
        edits=(
            change(
                "frontend.generate",
                """
-                await self._refuse(send, error, headers_label(scope) or request_id, story.trace_id)
+                pass
""",
            ),
        ),
        caught_by=("P2",),
    ),
    Bug(
        name="room-counted-twice-after-a-move",
        what="the bound on tokens is shortened by what came before, by frontend and engine both",
        edits=(
            change(
                "requests.attempt",
                """
-            stop=plan.stop,
+            stop=msgspec.structs.replace(plan.stop, max_tokens=max(1, plan.stop.max_tokens - generation.count)),
""",
            ),
        ),
        caught_by=("P1", "kept"),
    ),
    Bug(
        name="one-token-too-many-after-a-move",
        what="a continuation may make one token more than max_tokens, and the client gets it",
        edits=(
            change(
                "engines.mock.sequence",
                """
-        self.limit = min(request.stop.max_tokens, room - prompt)
+        self.limit = min(request.stop.max_tokens + (request.attempt > 1), room - prompt)
""",
            ),
            change(
                "requests.generation",
                """
-            if self.count > self.longest:
+            if self.count > self.longest + 1:
""",
            ),
        ),
        caught_by=("P3", "P1"),
    ),
    Bug(
        name="generated-tokens-billed-as-prompt",
        what="after a move the tokens generated before it count as prompt tokens too",
        origin="a continuation sent as a longer prompt reports that prompt's length",
        edits=(
            change(
                "frontend.answers",
                """
-            sum(len(p.ids) for p in self.prepared.prompts),
+            sum(len(p.ids) for p in self.prepared.prompts) + sum(m.at for e in endings for m in e.moves),
""",
            ),
        ),
        caught_by=("P3",),
    ),
    Bug(
        name="tokens-behind-a-stop-string-billed",
        what="tokens that came in one run with the end of a stop string, behind it, are counted",
        edits=(
            change(
                "requests.generation",
                """
-                self.delivered = delivered + used - number
""",
            ),
        ),
        caught_by=("P3",),
        within=200,
    ),
    Bug(
        name="usage-of-one-choice",
        what="usage counts the tokens of the first choice alone",
        edits=(
            change(
                "frontend.answers",
                """
-            sum(e.completion_tokens for e in endings),
+            sum(e.completion_tokens for e in endings[:1]),
""",
            ),
        ),
        caught_by=("P3",),
    ),
)
