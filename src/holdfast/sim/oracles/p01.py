"""P1: a client sees a prefix of one true token sequence; no gap, no repeat, no foreign token.

For every choice of every answer the true tokens are computed from the first attempt's request (`truth`). Asserted:

* the text that came is a prefix of the true text, and all of it when the choice ended with a finish reason;
* the finish reason is the true one;
* the log probabilities that came are the true ones, token by token (relative tolerance 1e-9: they are the same floats
  after a trip through JSON), and none is missing but those of tokens that came by a protocol version without them;
* every attempt carried the same prompt, sampling and stop rules as the first, and as generated ids a prefix of the
  true tokens: a continuation from anything else would be foreign even where the text happens to agree;
* what the first attempt asked for is what the client asked for: its seed (mixed per choice) and its token bound.

No tolerance in text. Not judged: choices that no engine ever saw, and clients' mistakes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import msgspec

from holdfast.engines.contract import unpack_ids
from holdfast.requests.seeds import mix
from holdfast.sim.history import Call, Sequence, Violation
from holdfast.sim.oracles.answers import Choice
from holdfast.sim.oracles.facts import Facts
from holdfast.sim.oracles.truth import Truth, truth_of
from holdfast.wire.frames import LOGPROBS_SINCE


def check(facts: Facts) -> Iterator[Violation]:
    """Return the breaches."""
    attempts: dict[tuple[str, int], list[Sequence]] = defaultdict(list)
    for sequence in facts.sequences:
        attempts[sequence.label, sequence.request.choice].append(sequence)
    for call in facts.history.calls:
        if not call.valid:
            continue
        for choice in range(facts.choices(call)):
            seen = attempts.get((call.name, choice))
            if not seen:
                continue
            first = msgspec.structs.replace(
                seen[0].request, generated_ids=b"", attempt=1, leg="aggregated", handoff=None
            )
            truth = facts.truths[call.name, choice] = truth_of(first, _stops(call))
            yield from _attempts(call, choice, truth, seen)
            yield from _asked(call, choice, truth)
            found = facts.answer(call).choices.get(choice)
            if found is not None:
                yield from _seen(
                    call,
                    choice,
                    truth,
                    found,
                    _told(facts, call, truth, [one for one in seen if one.request.leg != "prefill"]),
                )


def _stops(call: Call) -> list[str]:
    stops = call.body.get("stop") or []
    return [stops] if isinstance(stops, str) else list(stops)


def _attempts(call: Call, choice: int, truth: Truth, seen: list[Sequence]) -> Iterator[Violation]:
    first = truth.request
    for sequence in seen:
        request = sequence.request
        same = (request.prompt_ids, request.sampling, request.stop, request.model) == (
            first.prompt_ids,
            first.sampling,
            first.stop,
            first.model,
        )
        carried = unpack_ids(request.generated_ids)
        where = {"call": call.name, "choice": choice, "attempt": request.attempt, "worker": sequence.worker}
        if not same:
            yield Violation("P1", "an attempt asked for something else than the first one", where)
        if carried != truth.tokens[: len(carried)]:
            at = next((i for i, (a, b) in enumerate(zip(carried, truth.tokens, strict=False)) if a != b), -1)
            yield Violation("P1", "an attempt went on from tokens that are not true", {**where, "first at": at})


def _asked(call: Call, choice: int, truth: Truth) -> Iterator[Violation]:
    where = {"call": call.name, "choice": choice}
    seed, bound = call.body.get("seed"), call.body.get("max_tokens")
    if seed is not None and truth.request.sampling.seed != mix(seed, choice):
        yield Violation("P1", "the engine was not given the client's seed", where)
    if bound is not None and truth.request.stop.max_tokens != bound:
        yield Violation("P3", "the engine was not given the client's bound on tokens", where)


def _told(facts: Facts, call: Call, truth: Truth, seen: list[Sequence]) -> list[float]:
    """Return the log probabilities that the client must get: version 1 of the protocol has none."""
    if not call.body.get("logprobs") or not seen:
        return []
    attempts = sorted(seen, key=lambda sequence: sequence.request.attempt)
    starts = [len(sequence.request.generated_ids) // 4 for sequence in attempts]
    told: list[float] = []
    for sequence, start, end in zip(attempts, starts, [*starts[1:], truth.used], strict=True):
        if facts.version(call, sequence) >= LOGPROBS_SINCE:
            told += truth.logprobs[start : min(end, truth.used)]  # what is behind a stop string is nobody's
    return told


def _seen(call: Call, choice: int, truth: Truth, found: Choice, told: list[float]) -> Iterator[Violation]:
    where = {"call": call.name, "choice": choice, "tokens": truth.used}
    if not truth.text.startswith(found.text):
        at = next((i for i, (a, b) in enumerate(zip(found.text, truth.text, strict=False)) if a != b), len(truth.text))
        evidence = {**where, "differs at character": at, "got": len(found.text), "true": len(truth.text)}
        yield Violation("P1", "the text is not the true one", evidence)
    elif found.finishes and found.text != truth.text:
        evidence = {**where, "got": len(found.text), "true": len(truth.text), "finish": found.finish}
        yield Violation("P1", "the text ended before its end", evidence)
    if found.finishes and found.finish != truth.finish:
        yield Violation("P1", "the finish reason is not the true one", {**where, "got": found.finish})
    if not _close(found.logprobs, told[: len(found.logprobs)]):
        yield Violation("P1", "log probabilities are not the true ones", where)
    if found.finishes and len(found.logprobs) != len(told):
        yield Violation("P1", "log probabilities are missing", {**where, "got": len(found.logprobs)})


def _close(got: list[float], true: list[float]) -> bool:
    return len(got) == len(true) and all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(got, true, strict=True))
