"""Restart from (prompt, generated ids): how exact it is, and that no more is claimed than that."""

from __future__ import annotations

import json
from typing import Any

from holdfast.engines.contract import Guided
from tests.engines.conformance.accounting import LONGEST_GUIDED, SCHEMA
from tests.engines.conformance.recorder import Recorder
from tests.engines.conformance.registry import NotApplicable, check

LEVELS = ("none", "greedy", "exact")
PENALISED = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.5}
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 2**40 + 7}


async def resumed(run: Recorder, prompts: tuple[str, ...], cuts: tuple[int, ...], **how: Any) -> tuple[int, int]:
    """Return how many continuations equal the undisturbed run, of how many. They run side by side."""
    wholes = await run.generate(*[run.request(prompt, **how) for prompt in prompts])
    cases = [(p, whole, cut) for p, whole in zip(prompts, wholes, strict=True) for cut in cuts if cut < len(whole)]
    rests = await run.generate(
        *[run.request(prompt, generated=whole[:cut], attempt=2, **how) for prompt, whole, cut in cases]
    )
    equal = sum(rest == whole[cut:] for (_, whole, cut), rest in zip(cases, rests, strict=True))
    return equal, len(cases)


def _cuts(run: Recorder) -> tuple[int, ...]:
    return (1, run.subject.length // 3, run.subject.length - 2)


@check("restart from ids: the exactness that is claimed is the one that is measured")
async def exactness(run: Recorder) -> dict[str, Any]:
    prompts, cuts = run.subject.prompts[1:3], _cuts(run)
    greedy = await resumed(run, prompts, cuts)
    seeded = await resumed(run, prompts, cuts, **SAMPLED)
    measured = "none" if greedy[0] < greedy[1] else "greedy" if seeded[0] < seeded[1] else "exact"
    claimed = run.info.capabilities.continuation
    facts = {"claimed": claimed, "measured": measured, "greedy": _of(greedy), "seeded": _of(seeded)}
    assert LEVELS.index(claimed) <= LEVELS.index(measured), f"claims more than it keeps: {facts}"
    assert claimed != "exact" or "seed" not in run.info.capabilities.not_restored, "exact, and seeds start anew?"
    if claimed != measured:
        facts["note"] = f"could claim {measured}"
    return facts


def _of(counts: tuple[int, int]) -> str:
    return f"{counts[0]} of {counts[1]}"


def _judge(run: Recorder, what: str, counts: tuple[int, int]) -> dict[str, Any]:
    """Compare with `Capabilities.not_restored`: what is not excepted there must be restored."""
    excepted = what in run.info.capabilities.not_restored
    equal = counts[0] == counts[1]
    promised = run.info.capabilities.continuation != "none" and not excepted
    facts: dict[str, Any] = {"continued equally": _of(counts), "claimed restored": promised}
    assert equal or not promised, f"{what}: claimed to be restored, but {facts}"
    if equal and excepted:
        facts["note"] = "restored in this measurement although excepted"
    return facts


@check("restart with penalties: restored, or excepted in the capabilities")
async def restores_penalties(run: Recorder) -> dict[str, Any]:
    if not run.info.capabilities.penalties:
        raise NotApplicable("no penalties")
    prompts = run.subject.prompts[1:2]
    plain = await run.generate(*[run.request(prompt) for prompt in prompts])
    shaped = await run.generate(*[run.request(prompt, **PENALISED) for prompt in prompts])
    assert plain != shaped, "penalties are claimed and change nothing"
    return _judge(run, "penalties", await resumed(run, prompts, _cuts(run), **PENALISED))


@check("restart of guided output: restored, or excepted in the capabilities")
async def restores_guided(run: Recorder) -> dict[str, Any]:
    if "json_schema" not in run.info.capabilities.guided:
        raise NotApplicable("no JSON schemas")
    how = {"guided": Guided("json_schema", json.dumps(SCHEMA)), "ignore_eos": False, "max_tokens": LONGEST_GUIDED}
    return _judge(run, "guided", await resumed(run, run.subject.prompts[:1], (1, 4), **how))


@check("restart with min_tokens: they count over all attempts, or that is excepted")
async def restores_min_tokens(run: Recorder) -> dict[str, Any]:
    plain = await run.one(run.subject.ending, 60, ignore_eos=False)
    least = len(plain) + 4
    how = {"ignore_eos": False, "min_tokens": least, "max_tokens": least + 20}
    return _judge(run, "min_tokens", await resumed(run, (run.subject.ending,), (2, max(3, len(plain) - 2)), **how))


@check("the same request twice gives the same greedy text, alone and beside others")
async def repeats(run: Recorder) -> dict[str, Any]:
    prompts = run.subject.prompts
    alone = [await run.one(prompt) for prompt in prompts[:3]]
    beside = await run.generate(*[run.request(prompt) for prompt in prompts])
    equal = sum(a == b for a, b in zip(alone, beside, strict=False))
    assert equal == 3 or not run.subject.repeatable, f"{equal} of 3 equal"
    assert len({tuple(tokens) for tokens in beside}) == len(prompts), "different prompts give the same text"
    return {"equal": f"{equal} of 3"}
