"""Figures follow from the records, tables and pictures from the figures."""

import xml.dom.minidom

import msgspec
import pytest
from rich.console import Console

from holdfast.replay.driver import Job
from holdfast.replay.plot import curves, picture
from holdfast.replay.record import Recording
from holdfast.replay.report import MOST_BUCKETS, Report, Spread, bucket_ticks, spread, summarise
from holdfast.replay.svg import nice_ceiling
from holdfast.replay.tables import table
from holdfast.replay.trace import TraceRequest


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def recorded(plan: list[tuple[float, str, float, float, int]]) -> Recording:
    """Return a recording of requests (sent, worker, first token after, gap, tokens), one after the other in time."""
    clock = Clock()
    recording = Recording(clock)
    for index, (sent, worker, first, gap, tokens) in enumerate(plan):
        clock.now = 100.0 + sent
        note = recording.open(Job(index, TraceRequest(0.0, 1000, tokens, (1,))), sent - 0.5)
        note.worker(worker)
        clock.now += first
        for at in range(tokens):
            clock.now += gap if at else 0.0
            note.tokens()
        note.usage(1000, tokens, 250)
        note.ended("ok")
    return recording


def test_figures() -> None:
    report = summarise(recorded([(0.0, "a", 1.0, 0.5, 3), (0.0, "a", 2.0, 0.5, 3), (4.0, "b", 1.0, 0.25, 5)]), "t", "l")
    assert (report.requests, report.ok, report.rejected, report.failed, report.errors) == (3, 3, 0, 0, {})
    assert report.seconds == pytest.approx(6.0)
    assert report.output_tokens_per_second == pytest.approx(11 / 6)
    assert report.hit_rate == 0.25
    assert (report.time_to_first_token.p50, report.time_to_first_token.max) == pytest.approx((1.0, 2.0))
    assert report.latency.mean == pytest.approx((2 + 3 + 2) / 3)
    assert report.inter_token.count == 8
    assert report.inter_token.mean == pytest.approx((4 * 0.5 + 4 * 0.25) / 8)
    assert report.time_per_token.p50 == pytest.approx(0.5)
    assert report.late.mean == pytest.approx(0.5)
    a, b = report.workers
    assert (a.worker, a.requests, a.output_tokens, b.requests) == ("a", 2, 6, 1)
    assert a.mean_in_flight == pytest.approx(5 / 6)
    assert report.balance.requests == pytest.approx(2 / 1.5)
    width = report.bucket_seconds
    assert sum(a.in_flight) * width == pytest.approx(5.0)
    assert sum(a.tokens_per_second) * width == pytest.approx(6)
    assert a.in_flight[int(0.5 / width)] == pytest.approx(2.0)
    assert report.first_tokens[int(4.05 / width)].p99 == pytest.approx(1.0)
    assert report.first_tokens[int(3.05 / width)].p99 is None


def test_events_of_several_tokens_count_for_what_they_carry() -> None:
    clock = Clock()
    recording = Recording(clock)
    note = recording.open(Job(0, TraceRequest(0, 10, 8, (1,))))
    note.worker("a")
    for _ in range(4):
        clock.now += 0.05
        note.tokens()
    note.usage(10, 8, 0)
    note.ended("ok")
    report = summarise(recording, "t", "l")
    assert (report.output_tokens, report.inter_token.count) == (8, 3)
    assert sum(report.workers[0].tokens_per_second) * report.bucket_seconds == pytest.approx(8)
    assert report.time_per_token.p50 == pytest.approx(0.15 / 7)


def test_ends_of_other_kinds_are_counted_apart() -> None:
    clock = Clock()
    recording = Recording(clock)
    for at, (outcome, reason) in enumerate([("rejected", "overloaded"), ("failed", "x"), ("timeout", "deadline")]):
        recording.open(Job(at, TraceRequest(0, 10, 1, (1,)))).ended(outcome, reason)  # type: ignore[arg-type]
    recording.open(Job(9, TraceRequest(0, 10, 1, (1,))))
    report = summarise(recording, "t", "l")
    assert (report.ok, report.rejected, report.failed) == (0, 1, 3)
    assert report.errors == {"overloaded": 1, "x": 1, "deadline": 1, "unfinished": 1}
    assert report.time_to_first_token == Spread()
    assert "overloaded 1" in text_of([report])


def test_nothing_at_all_is_a_report_too() -> None:
    report = summarise(Recording(Clock()), "t", "l")
    assert report.requests == 0
    xml.dom.minidom.parseString(picture(report))
    assert text_of([report])


def test_quantiles_are_values_that_occurred() -> None:
    found = spread([float(n) for n in range(1, 101)] + [None])
    assert (found.count, found.p50, found.p90, found.p95, found.p99, found.max) == (100, 50, 90, 95, 99, 100)


@pytest.mark.parametrize("seconds", [0.0, 0.1, 10.0, 24.0, 24.1, 3600.0, 1e6])
def test_time_lines_are_bounded(seconds: float) -> None:
    assert seconds * 10 / bucket_ticks(seconds) <= MOST_BUCKETS


def text_of(reports: list[Report]) -> str:
    console = Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(table(reports))
    return console.export_text()


def test_reports_stand_side_by_side() -> None:
    one = summarise(recorded([(0.0, "worker-a", 1.0, 0.5, 3)]), "round-robin", "16 at once")
    two = summarise(recorded([(0.0, "worker-b", 0.5, 0.5, 3), (9.0, "worker-c", 0.5, 0.5, 3)]), "kv", "16 at once")
    text = text_of([one, two])
    for word in ("round-robin", "kv", "16 at once", "25.0%", "worker-a", "worker-c", "1,000 / 1,000"):
        assert word in text


def test_json_carries_all_of_it() -> None:
    report = summarise(recorded([(0.0, "a", 1.0, 0.5, 3)]), "t", "l")
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


def test_a_picture_shows_every_worker_and_escapes_names() -> None:
    names = [f"w{n}" for n in range(12)]
    report = summarise(recorded([(float(n), name, 0.5, 0.1, 4) for n, name in enumerate(names)]), "a <b> & c", "l")
    drawn = xml.dom.minidom.parseString(picture(report))
    lines = [path for path in drawn.getElementsByTagName("path") if path.getAttribute("fill") == "none"]
    assert len(lines) == 12 + 12 + 2
    assert "a &lt;b&gt; &amp; c" in picture(report)
    for path in lines:
        for pair in path.getAttribute("d").replace("h0", "").replace("L", "M").split("M")[1:]:
            x, y = map(float, pair.split())
            assert 0 <= x <= 960
            assert 0 <= y <= 800


@pytest.mark.parametrize(("value", "top"), [(0, 1), (0.23, 0.3), (1, 1), (1.01, 1.5), (7.5, 8), (9, 10), (999, 1000)])
def test_scales_are_round(value: float, top: float) -> None:
    assert nice_ceiling(value) == pytest.approx(top)


def test_kinds_of_runs_are_drawn_over_their_load() -> None:
    reports = [summarise(recorded([(0.0, "a", first, 0.1, 4)]), "t", "l") for first in (0.5, 1.0, 2.0)]
    drawn = curves("modes", "at once", {"kv": [(16, reports[0]), (64, reports[1])], "random": [(16, reports[2])]})
    document = xml.dom.minidom.parseString(drawn)
    assert len(document.getElementsByTagName("circle")) == 3 * 5
    for word in (">kv<", ">random<", ">16 at once<", ">64<", "prefix cache"):
        assert word in drawn
    xml.dom.minidom.parseString(curves("one point", "at once", {"kv": [(16, reports[0])]}))
