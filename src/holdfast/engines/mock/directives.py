r"""What a prompt can tell the mock engine to do, for tests and demonstrations.

Grammar: ``[[mock:WORD]]`` or ``[[mock:WORD ARGUMENT]]`` anywhere in the last user turn (in a prompt without
turns: anywhere), or the inner part (``WORD ARGUMENT``) as an item of the list ``extra["mock"]``. In an
argument ``\]`` is ``]``, ``\n`` a newline and ``\\`` a backslash; the first ``]]`` ends it.

=================  ==========================================================================================
say TEXT           the output is exactly TEXT, then end of sequence
call NAME JSON     the output is one Hermes-style tool call with these arguments
eos-after N        end of sequence as output token N (unless ignore_eos)
crash              SIGKILL to its own process once the prompt is computed, in every attempt (poison)
crash-at N         SIGKILL instead of output token N, in every attempt (poison that waits)
crash-after N      SIGKILL instead of output token N
freeze-after N     SIGSTOP to its own process instead of output token N
hang-after N       the engine (all sequences) stands still instead of output token N, the loop lives
die-after N        the engine reports its own death instead of output token N
error-after N      this sequence ends with an error instead of output token N
abort-after N      this sequence ends early without a reason instead of output token N
refuse [N]         refuse at submit while the attempt is at most N (1 if left out)
slow K             a token in every K-th step only
prefill S          the first step of the prompt takes S seconds longer
compile S          a silent step of S seconds in phase ``compiling`` before the prompt
=================  ==========================================================================================

Output tokens count from 0 over all attempts. ``…-after N`` fires in attempts that began below N (N = 0: in
the first attempt only), so that the continuation of a stream that failed there goes through.

Must never look outside the last user turn, and never touch an engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Literal, get_args

import msgspec

from holdfast.base.errors import InvalidRequest
from holdfast.engines.contract import GenerateRequest, pack_ids, unpack_ids
from holdfast.engines.mock.vocabulary import Vocabulary

FaultKind = Literal["crash", "freeze", "hang", "die", "error", "abort"]
_DIRECTIVE = re.compile(r"\[\[mock:((?:\\.|(?!\]\]).)*)\]\]", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_AFTER = re.compile(r"([a-z]+)-after")


class Directives(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one request asked for. Defaults mean: behave."""

    text: str | None = None
    """The exact output."""
    eos_after: int | None = None
    fault: FaultKind | None = None
    fault_at: int = -1
    """Output index in place of which the fault happens."""
    refuse_attempts: int = 0
    slow: int = 1
    prefill_seconds: float = 0.0
    compile_seconds: float = 0.0


NONE = Directives()


def directives_of(request: GenerateRequest, vocabulary: Vocabulary) -> Directives:
    """Return what the request tells the engine to do.

    Raises:
        InvalidRequest: an unknown directive or a bad argument, naming it.
    """
    bodies = [*_in_prompt(request.prompt_ids, vocabulary), *request.extra.get("mock", ())]
    if not bodies:
        return NONE
    found: dict[str, object] = {}
    generated = len(request.generated_ids) // 4
    for body in bodies:
        found.update(_read(body, generated, request.attempt))
    return msgspec.convert(found, Directives)


def _in_prompt(prompt_ids: bytes, vocabulary: Vocabulary) -> Iterable[str]:
    start = max(0, _last_aligned(prompt_ids, pack_ids(vocabulary.user_turn_ids)))
    mark = pack_ids([vocabulary.mark_id])
    at = prompt_ids.find(mark, start)
    while at >= 0 and at % 4:
        at = prompt_ids.find(mark, at + 1)
    if at < 0:
        return []
    text = vocabulary.decode(unpack_ids(prompt_ids[at:]))
    return [match.group(1) for match in _DIRECTIVE.finditer(text)]


def _last_aligned(data: bytes, wanted: bytes) -> int:
    at = data.rfind(wanted)
    while at >= 0 and at % 4:
        at = data.rfind(wanted, 0, at + len(wanted) - 1)
    return at


def _read(body: str, generated: int, attempt: int) -> dict[str, object]:
    word, _, raw = body.partition(" ")
    argument = _ESCAPE.sub(lambda m: "\n" if m.group(1) == "n" else m.group(1), raw)
    try:
        return _one(word, argument, generated, attempt)
    except ValueError as error:
        raise InvalidRequest(f"The mock directive {word!r} cannot be obeyed: {error}.", directive=word) from error


def _one(word: str, argument: str, generated: int, attempt: int) -> dict[str, object]:
    if word == "crash":
        return {"fault": "crash", "fault_at": generated}
    if word == "crash-at":
        return {"fault": "crash", "fault_at": int(argument)}
    if word in _PLAIN:
        return _PLAIN[word](argument)
    after = _AFTER.fullmatch(word)
    if after is None or after.group(1) not in get_args(FaultKind):
        raise ValueError("no such directive; engines/mock/directives.py lists them")
    at = int(argument)
    fires = generated < at or (at == 0 and attempt == 1)
    return {"fault": after.group(1), "fault_at": at} if fires else {}


def _call(argument: str) -> dict[str, object]:
    name, _, arguments = argument.partition(" ")
    payload = json.dumps({"name": name, "arguments": json.loads(arguments or "{}")})
    return {"text": f"<tool_call>\n{payload}\n</tool_call>"}


_PLAIN: dict[str, Callable[[str], dict[str, object]]] = {
    "say": lambda argument: {"text": argument},
    "call": _call,
    "eos-after": lambda argument: {"eos_after": int(argument)},
    "refuse": lambda argument: {"refuse_attempts": int(argument or 1)},
    "slow": lambda argument: {"slow": max(1, int(argument))},
    "prefill": lambda argument: {"prefill_seconds": float(argument)},
    "compile": lambda argument: {"compile_seconds": float(argument)},
}
