"""The unmodified openai client reads our bytes: answers, streams, keep-alives and errors."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import openai
from holdfast.base.errors import (
    CapacityExhausted,
    ContextLengthExceeded,
    HoldfastError,
    ModelNotFound,
    PoisonRequest,
    StreamIncomplete,
    Unauthenticated,
)
from holdfast.openai import encode
from holdfast.openai.encode import ChatChoice, ChatStreamEncoder, CompletionStreamEncoder
from holdfast.openai.errors import error_event, error_response
from holdfast.openai.responses import Continuity, Migration
from openai import OpenAI

MESSAGES = [{"role": "user", "content": "hi"}]


@contextmanager
def serving(
    status: int, headers: list[tuple[bytes, bytes]], body: bytes, retries: int = 0
) -> Iterator[tuple[OpenAI, list[str]]]:
    """Serve one fixed answer; yields a client and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            asked.append(self.path)
            self.send_response(status)
            for name, value in headers:
                self.send_header(name.decode(), value.decode())
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with OpenAI(
            api_key="k", base_url=f"http://127.0.0.1:{server.server_address[1]}/v1", max_retries=retries, timeout=10
        ) as client:
            yield client, asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def stream(*events: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    return 200, [(b"content-type", b"text/event-stream; charset=utf-8")], b"".join(events)


def test_chat_stream_with_keep_alives_usage_and_extension() -> None:
    enc = ChatStreamEncoder("r", 1, "m", include_usage=True)
    moved = Continuity(2, "declared", (Migration("peer_silent", 1, 900),))
    events = (
        encode.KEEP_ALIVE, enc.role(), encode.KEEP_ALIVE, enc.content(b"Hel"), enc.content(b"lo"),
        enc.finish("stop", moved), enc.usage(encode.usage(3, 2)), encode.DONE,
    )  # fmt: skip
    with serving(*stream(*events)) as (client, _):
        chunks = list(
            client.chat.completions.create(
                model="m",
                messages=MESSAGES,
                stream=True,
                stream_options={"include_usage": True},  # type: ignore[arg-type]
            )
        )
    assert len(chunks) == 5
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello"
    assert chunks[3].choices[0].finish_reason == "stop"
    assert (chunks[3].model_extra or {})["holdfast"]["join"] == "declared"
    assert chunks[4].usage
    assert chunks[4].usage.total_tokens == 5


def test_accumulating_helper_understands_the_stream() -> None:
    """The client's own accumulator, which is the pickiest reader, rebuilds the answer."""
    enc = ChatStreamEncoder("r", 1, "m")
    events = (
        enc.role(), enc.content(b"Let me see."), enc.tool_call(0, "call_1", "f"), enc.tool_arguments(0, b'{\\"a\\":'),
        enc.tool_arguments(0, b" 1}"), enc.tool_call(1, "call_2", "g", b"{}"), enc.finish("tool_calls"), encode.DONE,
    )  # fmt: skip
    with (
        serving(*stream(*events)) as (client, _),
        client.chat.completions.stream(model="m", messages=MESSAGES) as helper,  # type: ignore[arg-type]
    ):
        answer = helper.get_final_completion()
    message = answer.choices[0].message
    assert message.content == "Let me see."
    calls = message.tool_calls or []
    assert [(c.id, c.function.name, c.function.arguments) for c in calls] == [
        ("call_1", "f", '{"a": 1}'), ("call_2", "g", "{}"),
    ]  # fmt: skip


def test_completion_stream() -> None:
    enc = CompletionStreamEncoder("r", 1, "m")
    with serving(*stream(enc.content(b"a"), enc.content(b"b"), enc.finish("length"), encode.DONE)) as (client, _):
        chunks = list(client.completions.create(model="m", prompt="x", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "ab"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_error_in_mid_stream_raises() -> None:
    enc = ChatStreamEncoder("r", 1, "m")
    error = StreamIncomplete("The worker's answer broke off after 7 tokens.")
    with serving(*stream(enc.content(b"a"), error_event(error), encode.DONE)) as (client, _):
        chunks = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)  # type: ignore[call-overload]
        assert next(iter(chunks)).choices[0].delta.content == "a"
        with pytest.raises(openai.APIError, match="broke off after 7 tokens") as caught:
            list(chunks)
    assert caught.value.code == "stream_incomplete"


def test_whole_answer() -> None:
    body = encode.chat_completion("r", 1, "m", [ChatChoice(0, "Hello", "stop")], encode.usage(1, 1))
    with serving(200, [(b"content-type", b"application/json")], body) as (client, _):
        answer = client.chat.completions.create(model="m", messages=MESSAGES)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "Hello"


@pytest.mark.parametrize(
    ("error", "kind", "tries"),
    [
        (ContextLengthExceeded("Too long.", param="messages"), openai.BadRequestError, 1),
        (Unauthenticated("No key."), openai.AuthenticationError, 1),
        (ModelNotFound("No model 'x'."), openai.NotFoundError, 1),
        (CapacityExhausted("Full.", retry_after=0.1), openai.InternalServerError, 2),
        (PoisonRequest("It killed two workers."), openai.InternalServerError, 1),
    ],
)
def test_errors_raise_the_clients_own_class_and_are_repeated_only_where_it_helps(
    error: HoldfastError, kind: type[openai.APIStatusError], tries: int
) -> None:
    response = error_response(error, "label")
    with (
        serving(response.status, response.headers, response.body, retries=1) as (client, asked),
        pytest.raises(kind, match=error.message) as caught,
    ):
        client.chat.completions.create(model="m", messages=MESSAGES)  # type: ignore[arg-type]
    assert caught.value.code == error.code
    assert caught.value.param == error.param
    assert caught.value.request_id == "label"
    assert len(asked) == tries
