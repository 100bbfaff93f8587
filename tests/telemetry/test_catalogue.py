"""The catalogue keeps Prometheus' rules and the reference's names, and no process can feed what it does not list."""

from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from holdfast.base import errors
from holdfast.telemetry.catalogue import CATALOGUE, metrics_page
from holdfast.telemetry.metric import LabelValues, Metric, MetricSettings, Registry, logarithmic
from holdfast.telemetry.outcomes import error_type

REFERENCE = {
    "dynamo_frontend_requests_total": {"model", "endpoint", "request_type", "status", "error_type"},
    "dynamo_frontend_inflight_requests": {"model"},
    "dynamo_frontend_queued_requests": {"model"},
    "dynamo_frontend_disconnected_clients": set(),
    "dynamo_frontend_request_duration_seconds": {"model"},
    "dynamo_frontend_input_sequence_tokens": {"model"},
    "dynamo_frontend_output_sequence_tokens": {"model"},
    "dynamo_frontend_time_to_first_token_seconds": {"model"},
    "dynamo_frontend_inter_token_latency_seconds": {"model"},
    "dynamo_frontend_cached_tokens": {"model"},
    "dynamo_frontend_output_tokens_total": {"model"},
    "dynamo_frontend_model_migration_total": {"model", "migration_type"},
    "dynamo_frontend_model_migration_limit": {"model"},
    "dynamo_frontend_model_cancellation_total": {"model", "endpoint", "request_type"},
    "dynamo_frontend_model_rejection_total": {"model", "endpoint"},
    "dynamo_component_requests_total": {"dynamo_namespace", "dynamo_component", "dynamo_endpoint", "worker_id"},
    "dynamo_component_cancellation_total": {"dynamo_namespace", "dynamo_component", "dynamo_endpoint", "worker_id"},
    "dynamo_component_inflight_requests": {"dynamo_namespace", "dynamo_component", "dynamo_endpoint", "worker_id"},
    "dynamo_request_plane_queue_seconds": set(),
}
ABBREVIATED = re.compile(r"_(s|ms|us|ns|sec|b|kb|mb|gb|m|h|d)(_|$)")
"""What `promtool check metrics` objects to."""


def test_the_reference_names_and_labels_are_kept() -> None:
    listed = {metric.name: set(metric.labels) for metric in CATALOGUE}
    assert {name: listed.get(name) for name in REFERENCE} == REFERENCE


def test_names_are_unique_and_follow_prometheus() -> None:
    names = [metric.name for metric in CATALOGUE]
    assert len(set(names)) == len(names)
    for metric in CATALOGUE:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name), metric.name
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        given = metric.name.startswith("dynamo_router_overhead_")  # the reference's names, in milliseconds
        assert given or not ABBREVIATED.search(metric.name), f"{metric.name}: abbreviated unit"
        assert metric.help.endswith("."), metric.name
        assert not metric.name.endswith(("_count", "_sum", "_bucket", "_info")), metric.name
        assert bool(metric.buckets) == (metric.kind == "histogram"), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets)), metric.name


def test_newer_names_are_listed_themselves() -> None:
    names = {metric.name for metric in CATALOGUE}
    assert {metric.also for metric in CATALOGUE if metric.also} <= names


def test_only_what_is_listed_for_a_process_can_be_fed() -> None:
    registry = Registry(CATALOGUE, "worker")
    with pytest.raises(KeyError):
        registry.counter("dynamo_frontend_requests_total")
    with pytest.raises(KeyError):
        registry.counter("invented_total")
    with pytest.raises(KeyError, match="is a counter"):
        registry.gauge("dynamo_component_requests_total")


def test_prefix_and_buckets_follow_the_settings() -> None:
    settings = MetricSettings(
        metrics_prefix="acme_llm", metrics_ttft_min=0.1, metrics_ttft_max=10, metrics_ttft_count=3
    )
    registry = Registry(CATALOGUE, "frontend", settings)
    registry.histogram("dynamo_frontend_time_to_first_token_seconds").labels("m").observe(0.5)
    registry.histogram("dynamo_frontend_inter_token_latency_seconds").labels("m")
    registry.counter("holdfast_frontend_joins_total").labels("m", "exact").inc()
    families = {f.name: f for f in text_string_to_metric_families(registry.render().decode())}
    assert set(families) == {
        "acme_llm_time_to_first_token_seconds",
        "acme_llm_inter_token_latency_seconds",
        "holdfast_frontend_joins",
    }
    samples = families["acme_llm_time_to_first_token_seconds"].samples
    assert [s.labels["le"] for s in samples if s.name.endswith("_bucket")] == ["0.1", "1.0", "10.0", "+Inf"]


def test_logarithmic_bounds() -> None:
    assert logarithmic(1, 512, 10) == (1, 2, 4, 8, 16, 32, 64, 130, 260, 512)
    assert len(logarithmic(0.001, 480, 18)) == 18
    assert logarithmic(5, 5.001, 9) == (5, 5.001)


def test_label_values_are_bounded() -> None:
    values = LabelValues(most=2)
    assert [values.bounded(v) for v in ("a", "b", "c", "a", "d")] == ["a", "b", "other", "a", "other"]


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (None, ""),
        (errors.Cancelled("x"), "cancelled"),
        (errors.ClientStalled("x"), "client_stalled"),
        (errors.ModelNotFound("x"), "not_found"),
        (errors.ContextLengthExceeded("x"), "validation"),
        (errors.UnsupportedFeature("x"), "not_implemented"),
        (errors.WorkerSaturated("x"), "overload"),
        (errors.NoWorkers("x"), "unavailable"),
        (errors.StreamIncomplete("x"), "truncated_stream"),
        (errors.EngineFailed("x"), "backend_error"),
        (errors.Disconnected("x"), "backend_error"),
        (errors.DeadlineExceeded("x", stage="total"), "response_timeout"),
        (errors.WorkerStalled("x", stage="first token"), "first_token_timeout"),
        (errors.WorkerStalled("x", stage="next token"), "intra_token_timeout"),
        (errors.WorkerStalled("x"), "backend_error"),
        (errors.InternalError("x"), "internal"),
    ],
)
def test_error_types(error: errors.HoldfastError | None, word: str) -> None:
    assert error_type(error) == word


def test_the_page_has_a_row_per_metric() -> None:
    rows = [line for line in metrics_page().splitlines() if line.startswith("| `")]
    assert len(rows) == len(CATALOGUE)
    assert all(row.count(" | ") == 5 or "\\|" in row for row in rows)


def test_units_are_read_off_names() -> None:
    assert Metric("a_tokens_total", "counter", (), "x.").unit == "tokens"
    assert Metric("a_seconds", "gauge", (), "x.").unit == "seconds"
    assert Metric("a_state", "gauge", (), "x.").unit == ""
