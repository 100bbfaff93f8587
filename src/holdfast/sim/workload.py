"""What clients ask for: every shape of request that the mock engine can answer, and mistakes. Drawn from the tape.

The value 0 of every choice is the plain one (a streamed chat of a few tokens at once from a patient client), so that
a shrunk tape is a short story. Requests always bring a seed when they sample, so that an oracle can tell what the
answer must be.

Must never look at what happened.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from holdfast.sim.history import Surface
from holdfast.sim.tape import Stream

MODEL = "mock"
Reading = Literal["at once", "slowly", "stalls"]
Leaving = Literal["", "time", "tokens"]

_WORDS = ("river", "stone", "lamp", "cloud", "paper", "engine", "harbour", "winter")
_STOPS = (["e t"], [" s"], ["ar", "zz"], ["q"], ["the a", " in"], ["e c", "e s", "t m", "r p", "n a", "d o", "y i"])
"""Most of them span two tokens, so that a move may come between their halves."""
_LETTERS = "漢字かな交じり, Ωμέγα, 🦊🌲 and naïve façades, that is all"
"""Characters of several tokens each."""
_NUMBERS = "one two three four five six seven eight nine ten"
_SPAN = "two three four five six seven eight"
"""A stop string of many tokens: the move comes in the middle of it."""
_AGAIN_AND_AGAIN = "]] [[mock:".join(f"error-after {at}" for at in range(16, 0, -2))
"""Each attempt brings two tokens and fails, until the migration limit ends it."""


class Manner(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a client behaves."""

    reading: Reading = "at once"
    rate: float = 0.0
    """Bytes a second of one that reads slowly."""
    buffer: int = 65_536
    """Bytes that may be on their way to it before its frontend is told to wait."""
    pause: float = 0.0
    """Seconds for which one that stalls takes nothing, from its first byte on."""
    leaves: Leaving = ""
    after: float = 0.0
    """It leaves after so many seconds, or pieces of the answer."""


class Wish(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request and its client."""

    name: str
    at: float
    """Seconds since the run began."""
    frontend: int
    surface: Surface = "chat"
    body: dict[str, Any] = {}
    headers: dict[str, str] = {}
    valid: bool = True
    manner: Manner = Manner()
    probe: bool = False


class Workload:
    """Draws requests.

    Args:
        tape: the stream of choices.
        frontends: how many there are.
        longest: tokens of the longest answers.
    """

    def __init__(self, tape: Stream, frontends: int, longest: int = 40):
        self._tape, self._frontends, self._longest = tape, frontends, longest
        self._drawn = 0

    def draw(self, at: float) -> Wish:
        """Return a request that arrives then."""
        tape = self._tape
        self._drawn += 1
        name = f"r{self._drawn:03d}"
        frontend = tape.choose(self._frontends, "frontend")
        if tape.chance(0.08, "mistake"):
            return self._mistake(name, at, frontend)
        surface: Surface = "completions" if tape.chance(0.35, "completions") else "chat"
        body = self._prompt(surface)
        self._sampling(body)
        self._shape(body, surface)
        return Wish(name, at, frontend, surface, body, self._headers(), manner=self._manner(body))

    def skip(self, number: int) -> None:
        """So many requests were drawn elsewhere: go on with the names after them."""
        self._drawn += number

    def probe(self, at: float, frontend: int) -> Wish:
        """Return a plain request that looks whether everything serves."""
        self._drawn += 1
        body = {"model": MODEL, "messages": [_user(f"probe {self._drawn}")], "max_tokens": 2, "seed": self._drawn}
        return Wish(f"p{self._drawn:03d}", at, frontend, "chat", {**body, "stream": True}, probe=True)

    def killer(self) -> Wish:
        """Return a request that kills whoever computes its prompt."""
        self._drawn += 1
        body = {"model": MODEL, "messages": [_user("so long [[mock:crash]]")], "max_tokens": 4, "seed": self._drawn}
        frontend = self._tape.choose(self._frontends, "frontend")
        return Wish(f"k{self._drawn:03d}", 0.0, frontend, "chat", {**body, "stream": True})

    def _prompt(self, surface: Surface) -> dict[str, Any]:
        tape = self._tape
        words = [_WORDS[tape.choose(len(_WORDS), "word")] for _ in range(2 + tape.choose(6, "prompt words"))]
        text = " ".join(words) + self._directive()
        if surface == "chat":
            return {"model": MODEL, "messages": [_user(text)]}
        if tape.chance(0.2, "token ids"):
            return {"model": MODEL, "prompt": [100 + tape.choose(4000, "id") for _ in range(8)]}
        return {"model": MODEL, "prompt": text}

    def _directive(self) -> str:
        """Return what makes this one request special to the mock engine."""
        tape = self._tape
        number = tape.choose(24, "directive")
        k = tape.choose(12, "directive at")
        found = {
            1: f"eos-after {1 + k}",
            2: f"error-after {k}" if k < 9 else _AGAIN_AND_AGAIN,
            3: f"abort-after {k}",
            4: f"refuse {1 + k % 2}",
            5: f"prefill {0.1 + k / 10:.1f}",
            6: f"slow {2 + k % 3}",
            7: f"say {_NUMBERS if k % 2 else _LETTERS}]] [[mock:error-after {k}",
            8: f"{('crash', 'freeze')[k % 2]}-after {k}" if tape.chance(0.2, "deadly") else "",
        }.get(number)
        return f" [[mock:{found}]]" if found else ""

    def _sampling(self, body: dict[str, Any]) -> None:
        tape = self._tape
        body["max_tokens"] = 1 + int(tape.log_uniform(4, self._longest, "max tokens"))
        kind = tape.choose(4, "sampling")
        body["seed"] = 1 + tape.choose(1 << 30, "seed")
        if kind == 1:
            body["temperature"] = 0
        elif kind == 2:
            body |= {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5}
        elif kind == 3:
            body |= {"frequency_penalty": 0.3, "min_tokens": 3, "logit_bias": {"300": -100}}

    def _shape(self, body: dict[str, Any], surface: Surface) -> None:
        tape = self._tape
        if not tape.chance(0.2, "whole answer"):
            body["stream"] = True
            if not tape.chance(0.2, "no usage"):
                body["stream_options"] = {"include_usage": True}
        if tape.chance(0.12, "several choices"):
            body["n"] = 2 + tape.choose(2, "choices")
        if tape.chance(0.15, "stop strings"):
            body["stop"] = tape.pick(_STOPS, "stops")
        if _NUMBERS in str(body):
            body["stop"] = [_SPAN]
        if tape.chance(0.12, "log probabilities"):
            body |= {"logprobs": True, "top_logprobs": 2} if surface == "chat" else {"logprobs": 2}
        elif surface == "chat" and tape.chance(0.06, "structured"):
            body["response_format"] = {"type": "json_object"}

    def _headers(self) -> dict[str, str]:
        tape = self._tape
        headers = {}
        if tape.chance(0.12, "deadline"):
            headers["x-holdfast-timeout-ms"] = str(int(1000 * tape.log_uniform(0.3, 8.0, "deadline")))
        if tape.chance(0.06, "stage deadline"):
            headers["x-holdfast-inter-token-timeout-ms"] = str(300 + 200 * tape.choose(8, "stage deadline"))
        if tape.chance(0.1, "priority"):
            headers["x-dynamo-request-priority"] = str(tape.choose(5, "priority"))
        return headers

    def _manner(self, body: dict[str, Any]) -> Manner:
        tape = self._tape
        kind = tape.choose(16, "manner")
        if kind == 1:
            return Manner(leaves="time", after=tape.log_uniform(0.003, 1.5, "leaves after"))
        if kind == 2 and body.get("stream"):
            return Manner(leaves="tokens", after=1 + tape.choose(body["max_tokens"], "leaves at"))
        if kind == 3:
            return Manner(reading="slowly", rate=tape.log_uniform(1_500, 20_000, "rate"), buffer=512)
        if kind == 4:
            return Manner(reading="stalls", pause=tape.log_uniform(0.2, 6.0, "pause"), buffer=256)
        return Manner()

    def _mistake(self, name: str, at: float, frontend: int) -> Wish:
        tape = self._tape
        body: dict[str, Any] = {"model": MODEL, "messages": [_user("a mistake")], "max_tokens": 8, "seed": 1}
        headers: dict[str, str] = {}
        kind = tape.choose(7, "which mistake")
        if kind == 0:
            body["temperature"] = 7
        elif kind == 1:
            body["model"] = "nobody-has-this"
        elif kind == 2:
            body["messages"] = []
        elif kind == 3:
            body["messages"] = [_user("[[mock:nonsense 3]]")]  # only the engine notices
        elif kind == 4:
            headers["x-holdfast-timeout-ms"] = "soon"
        elif kind == 5:
            body = {"model": MODEL, "prompt": [4_000_000], "max_tokens": 4}
            return Wish(name, at, frontend, "completions", body, valid=False)
        else:
            body["messages"] = [_user("long " * 5_000)]  # over the model's context
        return Wish(name, at, frontend, "chat", body, headers, valid=False)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
