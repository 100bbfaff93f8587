"""The answer to one request: where its choices come together, and where its one HTTP response is decided.

Until a worker has accepted, an error is an HTTP error; afterwards it is an event of the stream. An error of one
choice ends the whole request, as OpenAI's clients expect. Must never know about workers beyond their name.
"""

from __future__ import annotations

import abc
from typing import Generic, TypeVar

from holdfast.base.errors import ClientStalled, HoldfastError
from holdfast.frontend.choices import Choice, StreamedChoice, WholeChoice
from holdfast.frontend.client_wire import head_of
from holdfast.frontend.prepare import Prepared
from holdfast.frontend.reply import Reply
from holdfast.openai.encode import (
    DONE,
    ChatChoice,
    ChatStreamEncoder,
    CompletionStreamEncoder,
    TextChoice,
    chat_completion,
    completion,
    usage,
)
from holdfast.openai.errors import error_event, error_response
from holdfast.openai.logprobs import TokenNames
from holdfast.openai.responses import CompletionUsage
from holdfast.requests.plan import Ending
from holdfast.requests.request import Request

_EVENTS = head_of(
    200,
    (
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ),
)
_JSON = head_of(200, ((b"content-type", b"application/json"),))

ChoiceT = TypeVar("ChoiceT", bound=Choice)


class Answer(abc.ABC, Generic[ChoiceT]):
    """Shared by both kinds of answers. ``choices`` are the outputs of the request's streams, in order."""

    def __init__(self, reply: Reply, request_id: str, label: str, created: int, prepared: Prepared):
        self.reply = reply
        self.request_id = request_id
        self.label = label
        self.created = created
        self.prepared = prepared
        self.done = False
        """The response is complete as far as this side is concerned."""
        self.lost = False
        """The client left before that."""
        self.error: HoldfastError | None = None
        """What it ended with, when not all went well."""
        self.trace_id = ""
        """Of the client's trace, or of the one that began here."""
        self.overload_status = 503
        """HTTP status of an answer that says that there is no room."""
        self.choices: list[ChoiceT] = self._make_choices()
        self._request: Request | None = None
        self._worker = ""
        self._open = len(self.choices)
        reply.on_unblocked = self._resume

    def begin(self, request: Request) -> None:
        """Tie the choices to their streams."""
        self._request = request
        for choice, stream in zip(self.choices, request.streams, strict=True):
            choice.stream = stream

    def refuse(self, error: HoldfastError) -> None:
        """Answer with an error; nothing has been sent yet."""
        answer = error_response(error, self.label, overload_status=self.overload_status, trace_id=self.trace_id)
        self.error = error
        self.done = True
        headers = [header for header in answer.headers if header[0] != b"content-length"]
        self.reply.hold(head_of(answer.status, headers), len(answer.body))
        self.reply.write(answer.body)
        self.reply.finish()
        self.reply.push()

    def accepted(self, worker: str) -> None:
        """A worker owns one of the choices."""
        self._worker = self._worker or worker

    def ended(self, choice: Choice, ending: Ending) -> None:
        """One choice has had its terminal event."""
        self._open -= 1
        if self.done:
            return
        if ending.error is not None:
            self._fail(ending.error)
            return
        choice.close(ending)
        if self._open == 0:
            self.done = True
            self._complete()
            self.reply.finish()
            self.reply.push()

    def dissolve(self) -> None:
        """Nothing more comes or goes: let go of what leads back here, so that a request leaves no cycle behind.

        What is garbage only to the collector costs more to find than to make.
        """
        self.reply.on_unblocked = _nothing
        self._request = None
        for choice in self.choices:
            choice.stream = None
        self.choices = []

    def head(self, common: bytes) -> bytes:
        """Return the response's head: what such answers have in common, and what is this one's own."""
        label = self.label.encode("latin-1", "replace")
        return b"%bx-request-id: %b\r\nx-trace-id: %b\r\n%b" % (
            common, label, self.trace_id.encode(), self.served_by(),
        )  # fmt: skip

    def served_by(self) -> bytes:
        """Return the header that names the first worker; empty before that."""
        return b"x-holdfast-worker: %b\r\n" % self._worker.encode() if self._worker else b""

    def counts(self) -> CompletionUsage:
        """Return the usage of the whole request: each prompt once, all choices."""
        endings = [c.ending for c in self.choices if c.ending is not None]
        cached = sum(c.ending.cached_tokens for c in self.choices[:: self.prepared.spec.n] if c.ending is not None)
        return usage(
            sum(len(p.ids) for p in self.prepared.prompts),
            sum(e.completion_tokens for e in endings),
            cached,
            sum(c.reasoning_tokens for c in self.choices),
        )

    def _fail(self, error: HoldfastError) -> None:
        if isinstance(error, ClientStalled):
            self.error, self.done = error, True
            self.reply.abort()
        elif not self.reply.started:
            self.refuse(error)
        else:
            self.error, self.done = error, True
            self.reply.write(error_event(error) + DONE)
            self.reply.finish()
            self.reply.push()
        if self._request is not None:
            self._request.cancel("another choice failed")

    def _resume(self) -> None:
        if self._request is not None:
            flusher = self._request.streams[0].flusher
            flusher.look()
            flusher.deliver(self._request.streams)

    @abc.abstractmethod
    def _make_choices(self) -> list[ChoiceT]:
        """Return the outputs, in order."""

    @abc.abstractmethod
    def _complete(self) -> None:
        """Write what comes after the last choice's end."""


class StreamedAnswer(Answer[StreamedChoice]):
    """Server-sent events."""

    _head = b""
    """Of a response that begins before any worker has accepted."""

    def begin(self, request: Request) -> None:
        """Tie the choices to their streams; a comment may start the response early."""
        super().begin(request)
        self._head = self.head(_EVENTS)
        self.reply.hold(self._head)

    def accepted(self, worker: str) -> None:
        """The first accept lets the head and the first events go, with what else the present read brings."""
        if self._worker:
            return
        super().accepted(worker)
        if not self.reply.started:
            self.reply.hold(self._head + self.served_by())
            self.reply.start()
        for choice in self.choices:
            choice.open()

    def _make_choices(self) -> list[StreamedChoice]:
        spec = self.prepared.spec
        cls = ChatStreamEncoder if self.prepared.surface == "chat_completions" else CompletionStreamEncoder
        encoder = cls(
            self.request_id,
            self.created,
            self.prepared.model,
            fingerprint=self.prepared.served.card.fingerprint,
            include_usage=spec.include_usage,
        )
        names = TokenNames(self.prepared.served.text.tokenizer.token_bytes, as_ids=spec.tokens_as_ids)
        total = len(self.prepared.prompts) * spec.n
        return [StreamedChoice(self, i, encoder if i == 0 else encoder.choice(i), names) for i in range(total)]

    def _complete(self) -> None:
        if self.prepared.spec.include_usage:
            encoder = self.choices[0].encoder
            self.reply.write(encoder.usage(self.counts()) + DONE)
        else:
            self.reply.write(DONE)


class WholeAnswer(Answer[WholeChoice]):
    """One JSON body at the end."""

    def _make_choices(self) -> list[WholeChoice]:
        names = TokenNames(self.prepared.served.text.tokenizer.token_bytes, as_ids=self.prepared.spec.tokens_as_ids)
        return [WholeChoice(self, i, names) for i in range(len(self.prepared.prompts) * self.prepared.spec.n)]

    def _complete(self) -> None:
        finished = [choice.finished() for choice in self.choices]
        told = self.choices[0].extension()
        fingerprint = self.prepared.served.card.fingerprint
        args = (self.request_id, self.created, self.prepared.model)
        if self.prepared.surface == "chat_completions":
            chat = [c for c in finished if isinstance(c, ChatChoice)]
            body = chat_completion(*args, chat, self.counts(), fingerprint=fingerprint, nvext=told)
        else:
            text = [c for c in finished if isinstance(c, TextChoice)]
            body = completion(*args, text, self.counts(), fingerprint=fingerprint, nvext=told)
        self.reply.hold(self.head(_JSON), len(body))
        self.reply.write(body)


def _nothing() -> None:
    return
