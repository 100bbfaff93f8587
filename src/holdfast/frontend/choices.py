"""One choice's way from token ids to its place in the answer.

The fast path joins precomputed JSON fragments; stop strings, tools, reasoning and log probabilities take the slow
one, through the text assembler. Must never know about HTTP beyond the reply it writes to.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

from holdfast.openai.encode import (
    UNDISTURBED,
    ChatChoice,
    ChatStreamEncoder,
    CompletionStreamEncoder,
    TextChoice,
    escape,
)
from holdfast.openai.logprobs import LegacyLogprobs, TokenNames
from holdfast.openai.responses import Continuity, FinishReason, Migration, ToolCall, ToolCallFunction
from holdfast.requests import express
from holdfast.requests.attempt import Attempt
from holdfast.requests.generation import GO_ON, Generation
from holdfast.requests.plan import Ending
from holdfast.runtime.streams import Logprobs
from holdfast.text.deltas import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from holdfast.text.pipeline import TextAssembler

if TYPE_CHECKING:
    from holdfast.frontend.answers import Answer


class Choice(abc.ABC):
    """An `Output` of the request lifecycle; ``stream`` is set before anything is called."""

    def __init__(self, answer: Answer[Any], index: int, names: TokenNames):
        prepared = answer.prepared
        spec = prepared.spec
        self.answer = answer
        self.reply = self.client = answer.reply
        self.index = index
        self.stream: Generation | None = None
        self.ending: Ending | None = None
        self.chat = prepared.surface == "chat_completions"
        prompt = prepared.prompts[index // spec.n]
        text = prepared.served.text
        self.assembler: TextAssembler = text.assembler(
            prompt=prompt.text,
            stops=spec.stop,
            include_stop=spec.include_stop,
            min_tokens=spec.min_tokens,
            skip_special=spec.skip_special_tokens,
            tool_format=prepared.tool_format,
            new_call_id=prepared.new_call_id,
            stream_arguments=spec.stream,
            reasoning=self.chat and prepared.split_reasoning,
        )
        self.parallel_calls = spec.tools.parallel
        self.shows_ends = bool(spec.stop_token_ids) or not spec.skip_special_tokens
        """Whether a terminating token would show in the text unless it is told apart."""
        self.reasoning_tokens = 0
        """Generated tokens that were reasoning."""
        self.echo = prompt.text if spec.echo else ""
        self.names = names
        self.legacy = None
        if spec.sampling.logprobs is not None and not self.chat:
            self.legacy = LegacyLogprobs(names, offset=len(self.echo), alternatives=spec.sampling.logprobs > 0)

    def accepted(self, worker: str) -> None:
        """A worker owns the stream."""
        self.answer.accepted(worker)

    @abc.abstractmethod
    def deliver(self, tokens: list[int], logprobs: Logprobs | None) -> int:
        """See `Output.deliver`."""

    def ended(self, ending: Ending) -> None:
        """See `Output.ended`."""
        self.ending = ending
        self.answer.ended(self, ending)

    @abc.abstractmethod
    def open(self) -> None:
        """The response begins."""

    @abc.abstractmethod
    def close(self, ending: Ending) -> None:
        """The stream has ended well: bring out what is still held back."""

    def extension(self) -> dict[str, Any] | None:
        """Return what the client has asked to be told in ``nvext`` (``extra_fields``); None: nothing.

        Where no prefill worker had a part in the latest attempt, both names are those of its worker.
        """
        stream = self.stream
        if stream is None or "worker_id" not in self.answer.prepared.spec.extra_fields:
            return None
        driver = stream.driver
        prefill, rank = driver.prefilled_by or (stream.worker, driver.rank)
        told: dict[str, Any] = {
            "prefill_worker_id": prefill,
            "decode_worker_id": stream.worker,
            "prefill_dp_rank": max(0, rank),
            "decode_dp_rank": max(0, driver.rank),
        }
        if driver.overlap is not None:
            told["overlap_blocks"] = driver.overlap
        return {"worker_id": told}

    def finish_reason(self, ending: Ending) -> FinishReason:
        """Return the reason in OpenAI's words."""
        reason = self.assembler.finish_reason("length" if ending.finish == "length" else "stop")
        return "tool_calls" if reason == "tool_calls" else "length" if reason == "length" else "stop"

    def push(self, tokens: list[int]) -> tuple[list[Delta], int]:
        """Return what the tokens bring, and `GO_ON` or how many of them count because a stop string matched."""
        assembler = self.assembler
        stream = self.stream
        terminal = stream is not None and bool(tokens) and tokens[-1] in stream.plan.terminal_ids
        deltas = assembler.push(tokens, terminal=terminal)
        if not self.parallel_calls:
            deltas = [d for d in deltas if not isinstance(d, ToolCallDelta) or d.index == 0]
        if deltas and isinstance(deltas[-1], ReasoningDelta):
            self.reasoning_tokens += len(tokens)
        return deltas, GO_ON if assembler.stop is None else assembler.stop_index + 1


def continuity(ending: Ending) -> Continuity:
    """Return how the choice came about, for the extension field."""
    if ending.attempts <= 1 and not ending.moves:
        return UNDISTURBED
    return Continuity(
        ending.attempts,
        ending.join,
        tuple(Migration(m.cause, m.at, round(m.gap_seconds * 1000)) for m in ending.moves),
    )


class StreamedChoice(Choice):
    """Writes events."""

    def __init__(
        self, answer: Answer[Any], index: int, encoder: ChatStreamEncoder | CompletionStreamEncoder, names: TokenNames
    ):
        super().__init__(answer, index, names)
        self.encoder = encoder
        self._prefix = encoder.content_prefix
        self._suffix = encoder.content_suffix
        self._fast = self.assembler.fast and answer.prepared.spec.sampling.logprobs is None and not self.shows_ends
        self._fragment = self.assembler.fragment
        self._table = self.assembler.table
        self._size = len(self._prefix) + len(self._suffix)
        self._write = answer.reply.write
        self._later = answer.reply.later
        self._alone = len(answer.prepared.prompts) * answer.prepared.spec.n == 1

    def open(self) -> None:
        """Say who speaks, or repeat the prompt."""
        if isinstance(self.encoder, ChatStreamEncoder):
            self._write(self.encoder.role())
        elif self.echo:
            self._write(self.encoder.content(escape(self.echo)))
        if self._fast and self._alone and self._table is not None and self.stream is not None:
            self.stream.express = self._track

    def _track(self, attempt: Attempt) -> express.Track | None:
        """Return the short way of the next tokens; None: this client cannot be reached by it."""
        stream, table, socket = self.stream, self._table, self.reply.socket
        if stream is None or table is None or socket is None:
            return None
        fd, transport = socket
        return express.native.Track(
            stream, attempt, self.reply, table, table.fragments, self._prefix, self._suffix,
            stream.rhythm.ticks, stream.rhythm.burst, transport, fd, 0,
        )  # fmt: skip

    def deliver(self, tokens: list[int], logprobs: Logprobs | None) -> int:
        """See `Output.deliver`; hot path.

        An event that the end follows at once waits for it, so that both leave in one write.
        """
        if self._fast:
            table = self._table
            fragment = None
            if table is not None and len(tokens) == 1 and not table.open and tokens[0] < len(table.fragments):
                fragment = table.fragments[tokens[0]]
            if fragment is None:
                fragment = self._fragment(tokens)
            if fragment:
                direct = self.reply.direct
                if direct is None or not self._alone or self.stream is None or self.stream.closing:
                    self._write(b"%b%b%b" % (self._prefix, fragment, self._suffix))
                else:
                    self.reply.idle_ticks = 0
                    size = self._size + len(fragment)
                    self._later((direct, b"%x\r\n%b%b%b\r\n" % (size, self._prefix, fragment, self._suffix)))
            return GO_ON
        deltas, used = self.push(tokens)
        if logprobs is not None:
            if used >= 0:
                tokens, logprobs = tokens[:used], logprobs[:used]
            self._with_logprobs(deltas, tokens, logprobs)
        else:
            for delta in deltas:
                self._event(delta)
        return used

    def close(self, ending: Ending) -> None:
        """Bring out held text and tool calls, then the last event."""
        for delta in self.assembler.finish():
            self._event(delta)
        self._write(self.encoder.finish(self.finish_reason(ending), continuity(ending), self.extension()))

    def _event(self, delta: Delta) -> None:
        encoder = self.encoder
        if isinstance(delta, ContentDelta):
            self._write(encoder.content(escape(delta.text)))
        elif not isinstance(encoder, ChatStreamEncoder):
            return
        elif isinstance(delta, ReasoningDelta):
            self._write(encoder.reasoning(escape(delta.text)))
        elif delta.id is not None:
            self._write(encoder.tool_call(delta.index, delta.id, delta.name or "", escape(delta.arguments)))
        else:
            self._write(encoder.tool_arguments(delta.index, escape(delta.arguments)))

    def _with_logprobs(self, deltas: list[Delta], tokens: list[int], logprobs: Logprobs) -> None:
        text = "".join(d.text for d in deltas if isinstance(d, ContentDelta))
        for delta in deltas:
            if not isinstance(delta, ContentDelta):
                self._event(delta)
        if not tokens and not text:
            return
        if isinstance(self.encoder, ChatStreamEncoder):
            entries = self.names.chat_entries(tokens, logprobs)
        elif self.legacy is not None:
            entries = self.legacy.piece(tokens, logprobs)
        self._write(self.encoder.content_logprobs(escape(text), entries))


class WholeChoice(Choice):
    """Collects, and is written at the end."""

    def __init__(self, answer: Answer[Any], index: int, names: TokenNames):
        super().__init__(answer, index, names)
        self._lazy = self.assembler.fast
        """Nobody needs the text before the end: it is decoded in one go."""
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, list[str]] = {}
        self._tokens: list[int] = []
        self._logprobs: Logprobs = []

    def open(self) -> None:
        """Nothing goes out before the end."""

    def deliver(self, tokens: list[int], logprobs: Logprobs | None) -> int:
        """See `Output.deliver`."""
        if self._lazy:
            used = GO_ON
        else:
            deltas, used = self.push(tokens)
            self._collect(deltas)
            if used >= 0 and logprobs is not None:
                tokens, logprobs = tokens[:used], logprobs[:used]
        if logprobs is not None:
            self._logprobs += logprobs
            self._tokens += tokens
        return used

    def close(self, ending: Ending) -> None:  # noqa: ARG002 - the body is written later
        """Bring out what is held back."""
        if self._lazy and self.stream is not None:
            deltas, _ = self.push(self.stream.generated.tolist())
            self._collect(deltas)
        self._collect(self.assembler.finish())

    def finished(self) -> ChatChoice | TextChoice:
        """Return the choice for the body."""
        ending = self.ending
        assert ending is not None
        text = "".join(self._text)
        reason = self.finish_reason(ending)
        wanted = self.answer.prepared.spec.sampling.logprobs is not None
        if not self.chat:
            piece = self.legacy.piece(self._tokens, self._logprobs) if wanted and self.legacy is not None else None
            return TextChoice(self.index, self.echo + text, reason, piece, continuity(ending))
        return ChatChoice(
            index=self.index,
            text=text,
            finish_reason=reason,
            reasoning="".join(self._reasoning) or None,
            tool_calls=tuple(
                ToolCall(call[0], ToolCallFunction(call[1], "".join(call[2:]))) for call in self._calls.values()
            ),
            logprobs=self.names.chat_entries(self._tokens, self._logprobs) if wanted else None,
            continuity=continuity(ending),
        )

    def _collect(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                self._text.append(delta.text)
            elif isinstance(delta, ReasoningDelta):
                self._reasoning.append(delta.text)
            elif delta.id is not None:
                self._calls[delta.index] = [delta.id, delta.name or "", delta.arguments]
            else:
                self._calls[delta.index].append(delta.arguments)
