"""A client's bytes, read as an OpenAI client reads them: choices, ends, usage, errors, and what is wrong with the form.

Works on what came so far, also when the connection broke in the middle. Must never know what should have come.
"""

from __future__ import annotations

from typing import Any

import msgspec

from holdfast.sim.history import Call

_decode = msgspec.json.Decoder().decode


class _Delta(msgspec.Struct):
    content: str | None = None


class _Piece(msgspec.Struct):
    index: int
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class _Event(msgspec.Struct):
    """What a client reads of an event; other fields are not its business."""

    choices: list[_Piece] | None = None
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


_decode_event = msgspec.json.Decoder(_Event).decode


class Choice(msgspec.Struct):
    """One choice, as far as it came."""

    text: str = ""
    finish: str = ""
    finishes: int = 0
    logprobs: list[float] = []
    tokens: list[str] = []
    """Names of the tokens with log probabilities."""
    after_finish: int = 0
    """Events with content after its end."""


class Answer(msgspec.Struct):
    """One response."""

    choices: dict[int, Choice] = {}
    usage: dict[str, Any] | None = None
    errors: list[dict[str, Any]] = []
    done: int = 0
    """How often ``[DONE]`` came."""
    after_done: int = 0
    """Events after it."""
    malformed: list[str] = []

    def choice(self, index: int) -> Choice:
        """Return a choice, made when it is new."""
        return self.choices.setdefault(index, Choice())


def read(call: Call) -> Answer:
    """Return what a call's bytes say."""
    answer = Answer()
    data = call.data
    if not data:
        return answer
    if call.body.get("stream") and call.status == 200:
        _read_stream(answer, data)
    elif call.ending == "complete":
        _read_whole(answer, data)
    return answer


def _read_stream(answer: Answer, data: bytes) -> None:
    *blocks, _rest = data.split(b"\n\n")
    for block in blocks:
        if block.startswith(b":"):
            continue
        if not block.startswith(b"data: "):
            answer.malformed.append(block[:80].decode("utf-8", "replace"))
            continue
        if answer.done:
            answer.after_done += 1
        payload = block[6:]
        if payload == b"[DONE]":
            answer.done += 1
            continue
        try:
            _take_event(answer, _decode_event(payload))
        except (msgspec.DecodeError, KeyError, TypeError) as error:
            answer.malformed.append(f"{type(error).__name__}: {payload[:80].decode('utf-8', 'replace')}")


def _take_event(answer: Answer, event: _Event) -> None:
    if event.error is not None:
        answer.errors.append(event.error)
        return
    if event.usage:
        answer.usage = event.usage
    if event.choices is None:
        raise KeyError("choices")
    for piece in event.choices:
        choice = answer.choices.get(piece.index)
        if choice is None:
            choice = answer.choice(piece.index)
        text = (piece.delta.content if piece.delta is not None else piece.text) or ""
        if choice.finishes and (text or piece.logprobs):
            choice.after_finish += 1
        choice.text += text
        if piece.logprobs:
            _take_logprobs(choice, piece.logprobs)
        if piece.finish_reason:
            choice.finish = piece.finish_reason
            choice.finishes += 1


def _take_logprobs(choice: Choice, logprobs: dict[str, Any]) -> None:
    if "content" in logprobs:
        choice.logprobs += [entry["logprob"] for entry in logprobs["content"]]
        choice.tokens += [entry["token"] for entry in logprobs["content"]]
    else:
        told = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
        known = [(token, logprob) for token, logprob in told if logprob is not None]
        choice.tokens += [token for token, _ in known]
        choice.logprobs += [logprob for _, logprob in known]


def _read_whole(answer: Answer, data: bytes) -> None:
    try:
        body = _decode(data)
        if "error" in body:
            answer.errors.append(body["error"])
            return
        answer.usage = body.get("usage")
        for piece in body["choices"]:
            choice = answer.choice(piece["index"])
            message = piece.get("message")
            choice.text = (message["content"] if message is not None else piece["text"]) or ""
            choice.finish = piece["finish_reason"]
            choice.finishes += 1
            if piece.get("logprobs"):
                _take_logprobs(choice, piece["logprobs"])
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        answer.malformed.append(f"{type(error).__name__}: {data[:80].decode('utf-8', 'replace')}")


def first_error(call: Call) -> dict[str, Any] | None:
    """Return the error that a client was told, if it was told one."""
    if call.status == 200 and b'"error"' not in call.data:
        return None
    errors = read(call).errors
    return errors[0] if errors else None
