"""Spans as a real OTLP receiver gets them: the client's trace goes on, attempts are linked, workers hang under them."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from holdfast.base.errors import InvalidRequest
from holdfast.telemetry.context import frontend_context
from holdfast.telemetry.spans import NO_SPANS, TraceSettings, open_spans
from tests.frontend.support import Stack, stack

grpc = pytest.importorskip("grpc", reason="the extra holdfast[otel] is not installed")
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages  # noqa: E402
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service  # noqa: E402

from holdfast.telemetry.otlp import OtlpSpans  # noqa: E402

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


class Receiver(service.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        self.requests.append(request)
        return messages.ExportTraceServiceResponse()

    def spans(self) -> list[Any]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def services(self) -> set[str]:
        found = set()
        for request in self.requests:
            for one in request.resource_spans:
                found |= {a.value.string_value for a in one.resource.attributes if a.key == "service.name"}
        return found


@contextlib.contextmanager
def over_grpc() -> Iterator[tuple[Receiver, TraceSettings]]:
    receiver = Receiver()
    server = grpc.server(ThreadPoolExecutor(2))
    service.add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield receiver, TraceSettings(otel_export_enabled=True, otel_endpoint=f"http://127.0.0.1:{port}")
    finally:
        server.stop(0).wait(5)


@contextlib.contextmanager
def over_http() -> Iterator[tuple[Receiver, TraceSettings]]:
    receiver = Receiver()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            receiver.Export(messages.ExportTraceServiceRequest.FromString(body), None)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield (
            receiver,
            TraceSettings(otel_export_enabled=True, otel_endpoint=url, otel_traces_protocol="http/protobuf"),
        )
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@contextlib.contextmanager
def traced(built: Stack, settings: TraceSettings) -> Iterator[None]:
    """Export the spans of everything in a stack; sends what waits at the end."""
    clock = built.frontend.stories.clock
    exporters = [OtlpSpans(settings, "frontend", "f", clock=clock)]
    built.frontend.stories.spans = exporters[0]
    for worker, _ in built.workers.values():
        exporters.append(OtlpSpans(settings, "worker", worker.instance, clock=worker.calls.clock))
        worker.calls.spans = exporters[-1]
    yield
    for exporter in exporters:
        exporter.close()


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


@pytest.mark.parametrize("receiving", [over_grpc, over_http])
async def test_a_moved_request_is_one_trace(receiving: Any) -> None:
    with receiving() as (receiver, settings):
        async with stack(2) as built:
            with traced(built, settings):
                answer = await built.http.post(
                    "/v1/chat/completions",
                    json={
                        "model": "mock",
                        "messages": [{"role": "user", "content": "[[mock:abort-after 4]] the colour of the harbour"}],
                        "max_tokens": 12,
                    },
                    headers={"x-request-id": "mine", "traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "v=1"},
                )
                assert answer.status_code == 200
                await built.at_rest()
                await asyncio.to_thread(lambda: None)
        spans = {span.span_id.hex(): span for span in receiver.spans()}
        raw = b"".join(request.SerializeToString() for request in receiver.requests)
    by_name: dict[str, list[Any]] = {}
    for span in spans.values():
        by_name.setdefault(span.name, []).append(span)
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    assert {name: len(found) for name, found in by_name.items()} == {
        "http-request": 1, "client_request": 2, "handle_payload": 2
    }  # fmt: skip
    root = by_name["http-request"][0]
    assert root.parent_span_id.hex() == PARENT
    assert root.trace_state == "v=1"
    assert attributes(root)["x_request_id"] == "mine"
    assert attributes(root)["gen_ai.usage.output_tokens"] == 12
    first, second = sorted(by_name["client_request"], key=lambda span: attributes(span)["request.attempt"])
    assert {span.parent_span_id for span in (first, second)} == {root.span_id}
    assert [link.span_id for link in second.links] == [first.span_id]
    assert attributes(second)["migration.reason"].startswith("stream_incomplete")
    assert attributes(second)["migration.from_worker_id"] == attributes(first)["holdfast.worker"]
    assert (first.status.code, second.status.code) == (2, 0)
    assert {span.parent_span_id for span in by_name["handle_payload"]} == {first.span_id, second.span_id}
    for span in spans.values():
        assert root.start_time_unix_nano - 2_000_000 <= span.start_time_unix_nano <= span.end_time_unix_nano
        parent = spans.get(span.parent_span_id.hex())
        assert parent is None or span.end_time_unix_nano <= parent.end_time_unix_nano + 50_000_000
    assert receiver.services() == {"dynamo"}
    assert b"harbour" not in raw


async def test_what_the_client_does_not_sample_is_not_sent() -> None:
    with over_grpc() as (receiver, settings):
        async with stack(1) as built:
            with traced(built, settings):
                body = {"model": "mock", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
                for flags in ("00", "01"):
                    headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"}
                    await built.http.post("/v1/chat/completions", json=body, headers=headers)
                await built.at_rest()
        assert len(receiver.spans()) == 3


def test_sampling_takes_its_share_and_switching_off_costs_no_import() -> None:
    with over_grpc() as (_, settings):
        ids = [f"{n * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}" for n in range(1, 4001)]
        for ratio, low, high in ((0.0, 0, 0), (0.25, 900, 1100), (1.0, 4000, 4000)):
            spans = OtlpSpans(
                TraceSettings(otel_endpoint=settings.otel_endpoint, otel_sample_ratio=ratio), "frontend", "f"
            )
            assert low <= sum(spans.sampled(one) for one in ids) <= high
            spans.close()
    assert open_spans(TraceSettings(), "frontend", "f") is NO_SPANS
    assert not frontend_context("ab" * 16, "", "", "", sampled=NO_SPANS.sampled("ab" * 16)).sampled


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "holdfast.telemetry.otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(InvalidRequest, match=r"holdfast\[otel\]"):
        open_spans(TraceSettings(otel_export_enabled=True), "frontend", "f")


def test_endpoints_follow_opentelemetrys_rules() -> None:
    assert TraceSettings().target == "http://localhost:4317"
    general = TraceSettings(otel_protocol="http/protobuf", otel_endpoint="http://c:4318/")
    assert general.target == "http://c:4318/v1/traces"
    assert TraceSettings(otel_traces_endpoint="http://c/x", otel_protocol="http/protobuf").target == "http://c/x"
